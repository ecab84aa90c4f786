"""What a relay reports about itself: counters, log lines, spans.

Owns nothing; keeps together what most parts of a relay are given.
"""

from dataclasses import dataclass, field

from relay.log import RateLimitedLoggers
from relay.metrics import Metrics
from relay.tracing import Tracer


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Where the parts of one relay report to."""

    metrics: Metrics = field(default_factory=Metrics)
    loggers: RateLimitedLoggers = field(default_factory=RateLimitedLoggers)
    tracer: Tracer | None = None
    """Makes spans; None where the settings want none."""
