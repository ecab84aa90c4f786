"""What ``relay bench`` counts: events lost, twice or out of order, and how late they were.

Owns these statistics; pure, and must not know where the events come from.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Listener:
    """What one socket has heard of its topic, whose events are numbered from 0."""

    topic: str
    received: int = 0
    """Events, each counted once."""
    duplicated: int = 0
    out_of_order: int = 0
    closed: str = ""
    """Why its connection or its subscription ended before its time."""
    _next: int = 0
    _missing: set[int] = field(default_factory=set)

    def hear(self, number: int) -> None:
        """Count one event."""
        if number >= self._next:
            self._missing.update(range(self._next, number))
            self._next = number + 1
        elif number in self._missing:
            self._missing.remove(number)
            self.out_of_order += 1
        else:
            self.duplicated += 1
            return
        self.received += 1


def percentile(ordered: Sequence[int], part: float) -> int:
    """The value that ``part`` of the ordered values do not exceed, by the nearest rank; 0 where there are none."""
    return ordered[max(math.ceil(part * len(ordered)), 1) - 1] if ordered else 0


def latencies_ms(latencies_ns: Iterable[int]) -> dict[str, float]:
    """Percentiles and the worst, in ms."""
    ordered = sorted(latencies_ns)
    parts = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: round(percentile(ordered, part) / 1e6, 2) for name, part in parts.items()}
