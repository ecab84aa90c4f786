"""Events that are dropped, or delivered otherwise than their publisher meant, on their way from the bus.

Owns how they are counted and logged; must not know who would have been given them.
"""

from relay.errors import Reason
from relay.log import RateLimitedLogger
from relay.metrics import Metrics
from relay.plugins.hooks import InvalidPayload
from relay.protocol.payload import fault_of_json


class EventFaults:
    """Counts such events, and says why now and then."""

    def __init__(self, metrics: Metrics, log: RateLimitedLogger) -> None:
        self._metrics = metrics
        self._log = log

    def count_invalid(self, topic: str, fault: str) -> None:
        """Count an event that no client may be given."""
        self._metrics.dropped[fault] += 1
        self._log.warning(fault, "event on topic %r dropped: %s", topic, fault)

    def count_unreadable(self, topic: str, error: InvalidPayload) -> None:
        """Count an event with JSON that a handler asked for and Python cannot read."""
        self._metrics.dropped[Reason.INVALID_PAYLOAD] += 1
        self._log.warning(Reason.INVALID_PAYLOAD, "event on topic %r dropped for its publisher: %s", topic, error)

    def count_waiting(self, topic: str) -> None:
        """Count an event that may not wait for handlers, since too many do."""
        self._metrics.dropped["on_event handler too slow"] += 1
        self._log.warning("on_event", "event on topic %r dropped: plugins are too slow", topic)

    def count_dropped_by_plugin(self) -> None:
        """Count an event that a handler has dropped, which is its right."""
        self._metrics.dropped["by a plugin"] += 1

    def note_binary(self, topic: str, event: str, data: bytes) -> None:
        """Count an event that is delivered as bytes although its publisher meant JSON."""
        if (fault := fault_of_json(data)) is not None:
            self._metrics.events_not_json += 1
            text = "event %r on topic %r delivered as binary: its payload looks like JSON but is not valid: %s"
            self._log.warning("no JSON", text, event, topic, fault)
