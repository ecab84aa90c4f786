"""An event loop whose clock jumps: what waits for a time goes on at once, where nothing else is left to be done."""

import asyncio
import selectors
from collections.abc import Callable, Iterator

import pytest


class _Selector(selectors.SelectSelector):
    """Does not wait: its loop's clock goes on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found:
            assert timeout is not None, "all tasks wait for each other"
            self.now += max(timeout, 0.0)
        return found


class InstantLoop(asyncio.SelectorEventLoop):
    """For tests without processes, connections and threads."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Seconds of its own clock."""
        return self._clock.now


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run, and its clock go on, until the condition holds."""
    async with asyncio.timeout(100):
        while not condition():  # noqa: ASYNC110 - what is awaited differs from test to test
            await asyncio.sleep(0.001)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """In the place of the common fixture: the test's event loop has a clock that jumps."""
    with asyncio.Runner(loop_factory=InstantLoop) as runner:
        yield runner
        left = [task for task in asyncio.all_tasks(runner.get_loop()) if not task.done()]
    assert not left, f"tasks left over: {left}"
