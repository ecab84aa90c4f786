"""The last 15 minutes of a relay's metrics, so that a console opened in an incident shows how it began.

Owns these samples, in bounded memory: 181 of 14 numbers, some 80 kB. They are kept whether anybody looks or not, since
what happened before is what is asked for.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

_logger = logging.getLogger("relay.console")

INTERVAL_S = 5.0
"""Seconds between two samples."""
KEPT = 181
"""Samples that are kept: those of 15 minutes."""

TOTALS = (
    "relay_workers",
    "relay_topics",
    "relay_sockets",
    "relay_outbox_bytes",
    "relay_link_lag_seconds",
    "relay_events_in",
    "relay_deliveries",
    "relay_pushes_in",
    "relay_dropped",
    "relay_gaps",
    "relay_delivered_bytes",
)
"""Metrics that are kept as the sum over their labels."""
HISTOGRAM = "relay_fan_out_seconds"
"""Kept as the number of its observations, and their sum in seconds."""


class ConsoleSeries:
    """Samples of a relay's metrics, taken while it runs.

    Args: read: the metrics by name and label, as `MetricsExporter.read` returns them.
          clock: seconds since 1970.
    """

    def __init__(
        self, read: Callable[[], Awaitable[Mapping[str, Mapping[str, Any]]]], clock: Callable[[], float] = time.time
    ) -> None:
        self._read = read
        self._clock = clock
        self._rows: deque[list[float]] = deque(maxlen=KEPT)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Take samples until `stop`."""
        self._rows.clear()
        self._task = asyncio.create_task(self._run(), name="relay-console-series")

    async def stop(self) -> None:
        """Take no more."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def take(self) -> None:
        """Take one sample."""
        metrics = await self._read()
        histogram = metrics.get(HISTOGRAM, {}).get("", [0.0])
        totals = (float(sum(metrics.get(name, {}).values())) for name in TOTALS)
        self._rows.append([round(self._clock() * 1000), *totals, float(sum(histogram[:-1])), float(histogram[-1])])

    def as_json(self) -> dict[str, object]:
        """The samples, oldest first: time in ms, the totals in their order, and the histogram's two numbers."""
        return {"names": ["at_ms", *TOTALS, f"{HISTOGRAM}_count", f"{HISTOGRAM}_sum"], "rows": list(self._rows)}

    async def _run(self) -> None:
        while True:
            try:
                await self.take()
            except Exception:  # a sample that is missing leaves a gap in a chart, no more
                _logger.exception("sample of the metrics failed")
            await asyncio.sleep(INTERVAL_S)
