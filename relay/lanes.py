"""Work in order per key, at once where nothing has to wait.

Owns which pieces of work are under way; must not know what they do. A piece is a callable that does what it
can right away and returns a coroutine for the rest, or None. While a key's coroutine runs, further pieces of
that key queue behind it; other keys go on.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from typing import TypeAlias

Rest: TypeAlias = Coroutine[None, None, None] | None
Piece: TypeAlias = Callable[[], Rest]


class Lanes:
    """Lanes of one owner; `close` ends them all."""

    __slots__ = ("_changed", "_tasks", "_waiting", "pending")

    def __init__(self) -> None:
        self.pending: int = 0
        """Pieces begun and not finished, or waiting for their turn."""
        self._waiting: dict[Hashable, deque[Piece]] = {}
        self._tasks: dict[asyncio.Task[None], Coroutine[None, None, None]] = {}
        self._changed: asyncio.Future[None] | None = None

    def run(self, key: Hashable, piece: Piece) -> None:
        """Do ``piece`` now, or behind those of its key that are under way."""
        lane = self._waiting.get(key)
        if lane is not None:
            self.pending += 1
            lane.append(piece)
        elif (rest := piece()) is not None:
            self.pending += 1
            self._waiting[key] = deque()
            task = asyncio.create_task(self._work_off(key, rest))
            self._tasks[task] = rest
            task.add_done_callback(self._tasks.pop)

    async def _work_off(self, key: Hashable, rest: Coroutine[None, None, None]) -> None:
        lane = self._waiting[key]
        try:
            await rest
            while lane:
                self.done()
                if (further := lane.popleft()()) is not None:
                    await further
        finally:
            # Also when a piece raises, which none should: the key must not stay blocked.
            del self._waiting[key]
            self.done(1 + len(lane))

    def done(self, pieces: int = 1) -> None:
        """So many pieces fewer are pending; for owners that add to ``pending`` by themselves."""
        self.pending -= pieces
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def wait_below(self, limit: int) -> None:
        """Return once fewer than ``limit`` pieces are pending. One waiter at a time."""
        while self.pending >= limit:
            self._changed = asyncio.get_running_loop().create_future()
            await self._changed

    @property
    def running(self) -> bool:
        """Whether a coroutine is under way."""
        return bool(self._tasks)

    async def wait(self) -> None:
        """Return once no coroutine is under way; what else is pending does not count."""
        while self._tasks:
            _ = await asyncio.wait(self._tasks)

    def waiting(self, key: Hashable) -> int:
        """How many pieces of a key wait for their turn."""
        return len(self._waiting.get(key, ()))

    def drop(self, goes: Callable[[Piece], bool]) -> int:
        """Drop the pieces that wait and of which ``goes`` is true; returns how many."""
        dropped = 0
        for lane in self._waiting.values():
            kept = [piece for piece in lane if not goes(piece)]
            dropped += len(lane) - len(kept)
            lane.clear()
            lane.extend(kept)
        self.done(dropped)
        return dropped

    async def close(self) -> None:
        """Drop what waits, cancel what runs, and wait for its end."""
        tasks = dict(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for rest in tasks.values():
            rest.close()  # a task cancelled before its first step has not begun it
