"""`ReadBudget`: how much of large messages one turn of the event loop reads, of all connections of a server.

Owns the count and the connections that wait for their turn; must not know what they read. Without it a turn
takes as long as everything that all clients have sent, and other clients are read and answered only between two turns.
"""

import asyncio
from collections import deque
from collections.abc import Callable

LARGE_BYTES = 16_384
"""Reads and messages from this size on are counted; to count smaller ones would cost more than it bounds."""

TURN_BYTES = 262_144
"""Bytes of a turn, as much as one read from a transport brings at most."""


class ReadBudget:
    """The budget of one event loop: what is spent comes back at its next turn.

    Args: loop: the loop that the connections are read in.
    """

    __slots__ = ("_is_scheduled", "_loop", "_spent", "_waiting", "is_spent")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._spent = 0
        self.is_spent: bool = False
        """Whether nothing large is to be read in this turn any more."""
        self._is_scheduled = False
        self._waiting: deque[Callable[[], object]] = deque()

    def spend(self, size: int) -> None:
        """Count so many bytes that have been read, or handed over as a message."""
        self._spent += size
        self.is_spent = self._spent >= TURN_BYTES
        self._schedule()

    def wait(self, proceed: Callable[[], object]) -> None:
        """Have ``proceed`` called in a turn with budget left, behind those that wait already."""
        self._waiting.append(proceed)
        self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._spent = 0
        self.is_spent = self._is_scheduled = False
        while self._waiting and not self.is_spent:
            self._waiting.popleft()()
        if self._waiting:
            self._schedule()
