"""What a loop over a topic gets, and the bounded queue it gets it from."""

import asyncio
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from relay_client.errors import QueueOverflow
from relay_client.link import log

Overflow: TypeAlias = Literal["drop-oldest", "latest", "raise", "recover"]
"""What happens if a loop is slower than its events.

``drop-oldest``: the oldest queued event is dropped. ``latest``: only the newest event of each name is queued.
``raise``: the loop receives the queued events, then `QueueOverflow`. ``recover``: the loop receives the queued events,
then the topic is rejoined and its history has those that follow.
"""

REJOINED = "relay_client:rejoined"
"""Name of the event that marks a rejoin: events that were sent before it, while the topic was lost, are missing.

Its payload is ``{"reason": why the topic was lost, "response": response of the new join}``.
"""


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a topic, or `REJOINED`.

    Attributes: payload: decoded JSON, or bytes.
                ref: None, unless the server sets it.
                dropped: number of events that this loop lost directly before this one because it was too slow.
                position: its place in the topic's history; None without a history, or if the join did not ask for
                    positions.
    """

    topic: str
    event: str
    payload: Any
    ref: str | int | None = None
    dropped: int = 0
    position: str | None = None


@dataclass(frozen=True, slots=True)
class Recovered(Event):
    """`REJOINED` without a loss: every event that was missed follows, in order, then those published from now on.

    The server does not say how many they are, or where the missed ones end.
    """


@dataclass(frozen=True, slots=True)
class Lost(Event):
    """`REJOINED` with a loss: events before it are missing and do not follow. Fetch the current state."""

    @property
    def reason(self) -> str:
        """Why they could not be recovered, as the server says: ``"history expired"``, ``"unknown position"``, …

        ``"frame not understood"``: an event came that cannot be decoded; the topic was not rejoined.
        """
        response = self.payload["response"]
        reason = response.get("reason") if isinstance(response, dict) else None
        return str(reason or "nothing to recover from")


class EventQueue:
    """At most ``limit`` events, in order, and what to do with more. `REJOINED` takes no room and is never dropped.

    Attributes: dropped: how many events were dropped so far.
                is_behind: whether events were refused that have to be recovered from the topic's history.
    """

    def __init__(self, topic: str, limit: int, overflow: Overflow) -> None:
        if limit < 1:
            raise ValueError(f"limit: expected 1 or more, got {limit}")
        if overflow not in ("drop-oldest", "latest", "raise", "recover"):
            raise ValueError(f"overflow: expected drop-oldest, latest, raise or recover, got {overflow!r}")
        self.dropped = 0
        self.is_behind = False
        self._topic = topic
        self._limit = limit
        self._overflow = overflow
        self._waiting: deque[Event] = deque()
        self._events = 0  # of those waiting, without `REJOINED`
        self._gap = 0  # dropped since the last `get`, before what waits
        self._refused = 0  # dropped behind what waits
        self._is_over = False
        self._error: BaseException | None = None
        self._wake = asyncio.Event()

    @property
    def is_empty(self) -> bool:
        """Whether no event waits."""
        return not self._waiting

    def put(self, event: Event) -> bool:
        """Add an event, or `REJOINED`; after the end nothing is added any more, and counted as dropped.

        Returns: whether it was added.
        """
        if event.event == REJOINED:
            if not self._is_over:
                self._mark(event)
            return not self._is_over
        is_full = self._events == self._limit
        if not self._is_over and self._overflow == "raise" and is_full:
            self.end(QueueOverflow(self._topic, self._limit))
        if self._is_over:
            self._count_dropped()
            return False
        if self._overflow == "recover" and (is_full or self.is_behind):
            if event.position is None:
                self._count_dropped()
                self._refused += 1
            else:
                self.is_behind = True
            return False
        if self._overflow == "latest":
            older = next((index for index, waiting in enumerate(self._waiting) if waiting.event == event.event), None)
            if older is not None:
                self._drop(older)
        if self._events == self._limit:
            self._drop(1 if self._waiting[0].event == REJOINED else 0)
        if self._refused:
            event, self._refused = replace(event, dropped=self._refused), 0
        self._waiting.append(event)
        self._events += 1
        self._wake.set()
        return True

    def recover_dropped(self) -> None:
        """Learn that the event that was dropped last has a position: it is not lost."""
        if self._overflow == "recover":
            self.is_behind = True
            self.dropped -= 1
            self._refused -= 1

    def _mark(self, event: Event) -> None:
        # Never two in a row, so that there are never more of them than events.
        if self._waiting and self._waiting[-1].event == REJOINED:
            older = self._waiting.pop()
            if isinstance(older, Lost) and isinstance(event, Recovered):
                event = older  # what was lost before the last rejoin is not back
        self._waiting.append(event)
        self._wake.set()

    def _drop(self, index: int) -> None:
        del self._waiting[index]
        around = [self._waiting[place].event for place in (index - 1, index) if 0 <= place < len(self._waiting)]
        if around == [REJOINED, REJOINED]:
            del self._waiting[index - 1]
        self._events -= 1
        self._gap += 1
        self._count_dropped()

    def _count_dropped(self) -> None:
        if not self.dropped:
            log.warning("%s: events are dropped, its loop is too slow; `dropped` counts them", self._topic)
        self.dropped += 1

    def end(self, error: BaseException | None = None) -> None:
        """Close the queue; a waiting loop receives the remaining events, then ``error``, or ends."""
        if not self._is_over:
            self._is_over, self._error = True, error
            self._wake.set()

    async def get(self) -> Event:
        """The next event; waits for it.

        Raises: StopAsyncIteration: the queue has ended. QueueOverflow, or what else it ended with.
        """
        while not self._waiting:
            if self._is_over:
                raise self._error or StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        event = self._waiting.popleft()
        self._events -= event.event != REJOINED
        if self._gap:
            event, self._gap = replace(event, dropped=self._gap), 0
        return event
