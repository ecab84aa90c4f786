"""Histories in memory, for the bus of one process.

Owns the events kept; must not know who asks.
"""

import heapq
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

import msgspec

from relay.brokers.base import GRACE_S, Event, Opened, Place, Summary
from relay.config_sections import HistoryConfig
from relay.errors import NotRecovered


class _Entry(msgspec.Struct, frozen=True, gc=False):
    place: Place
    row: Event
    total_bytes: int


class _Log:
    """The history of one topic."""

    def __init__(self, born: Place) -> None:
        self.entries: deque[_Entry] = deque()
        self.newest = born
        self.expires_at = 0.0
        self.total_bytes = 0


class MemoryHistory:
    """Histories in this process's memory, which end with it.

    Args: notify: publishes a row or a notice on the bus, in order with the others.
          clock: seconds since 1970.
    """

    def __init__(self, notify: Callable[[Event], None], clock: Callable[[], float] = time.time) -> None:
        self._notify = notify
        self._clock = clock
        self._logs: dict[str, _Log] = {}
        # A heap: when a history that is there is looked at, which may have been renewed by then.
        self._due: list[tuple[float, str]] = []

    def append(
        self, topic: str, event: str, payload: bytes, settings: HistoryConfig, sender: str | None = None
    ) -> Event:
        """Keep an event and give it a position; the caller publishes it."""
        log = self._log(topic, settings)
        now_ms = int(self._clock() * 1000)
        log.newest = Place(max(log.newest.ms, now_ms), log.newest.n + 1)
        log.total_bytes += len(event) + len(payload)
        row = Event(topic, event, payload, str(log.newest), sender)
        log.entries.append(_Entry(log.newest, row, log.total_bytes))
        while len(log.entries) > settings.size:
            _ = log.entries.popleft()
        return row

    def _log(self, topic: str, settings: HistoryConfig) -> _Log:
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            _, other = heapq.heappop(self._due)
            if self._logs[other].expires_at <= now:
                del self._logs[other]
            else:
                heapq.heappush(self._due, (self._logs[other].expires_at, other))
        log = self._logs.get(topic)
        if log is None:
            log = self._logs[topic] = _Log(Place(int(now * 1000), 0))
            log.entries.append(_Entry(log.newest, Event(topic, "", b"", str(log.newest)), 0))
            heapq.heappush(self._due, (now + settings.ttl_s + GRACE_S, topic))
        log.expires_at = now + settings.ttl_s + GRACE_S
        return log

    async def open(self, topic: str, since: str, settings: HistoryConfig, max_events: int, max_bytes: int) -> Opened:
        """Say whether all events behind ``since`` are there."""
        log, place = self._log(topic, settings), Place.of(since)
        newest, now_ms = str(log.newest), int(self._clock() * 1000)
        if place == log.newest:
            return Opened(newest, now_ms)
        rows = _from(log, place, 2)
        if rows is None:
            first = log.entries[0].place
            is_older = place.ms <= first.ms and place.n < first.n
            return Opened(newest, now_ms, NotRecovered.EXPIRED if is_older else NotRecovered.UNKNOWN)
        if log.newest.n - place.n > max_events or log.total_bytes - rows[0].total_bytes > max_bytes:
            return Opened(newest, now_ms, NotRecovered.TOO_MANY)
        if rows[1].place.ms < (self._clock() - settings.ttl_s) * 1000:
            return Opened(newest, now_ms, NotRecovered.EXPIRED)
        return Opened(newest, now_ms)

    async def read(self, topic: str, since: str, count: int) -> list[Event] | None:
        """Up to ``count`` rows, the one at ``since`` first; None where that is gone."""
        log, place = self._logs.get(topic), Place.of(since)
        rows = None if log is None else _from(log, place, count)
        return None if rows is None else [entry.row for entry in rows]

    async def last(self, topic: str, count: int, before: str | None = None) -> list[Event]:
        """Up to ``count`` newest rows, oldest first, of those older than ``before``."""
        log = self._logs.get(topic)
        if log is None:
            return []
        younger = 0 if before is None else max(0, log.newest.n + 1 - Place.of(before).n)
        return [entry.row for entry in islice(reversed(log.entries), younger, younger + count)][::-1]

    async def check(self, topic: str, heard: str, settings: HistoryConfig) -> None:
        """Publish the newest position as a notice; memory loses nothing, so there are no marks."""
        self._notify(Event(topic, "", b"", str(self._log(topic, settings).newest)))

    async def describe(self, topic: str) -> Summary:
        """Say what is there."""
        log = self._logs.get(topic)
        events = [] if log is None else [entry for entry in log.entries if entry.row.event]
        if not events:
            return Summary(0, None, None, 0)
        size = sum(len(entry.row.payload) + len(entry.row.event) for entry in events)
        return Summary(len(events), str(events[0].place), str(events[-1].place), size)


def _from(log: _Log, place: Place, count: int) -> list[_Entry] | None:
    """Up to so many entries from one on; None where that is gone. It is found by its number: these are consecutive."""
    at = place.n - log.entries[0].place.n
    if not 0 <= at < len(log.entries) or log.entries[at].place != place:
        return None
    return [log.entries[i] for i in range(at, min(at + count, len(log.entries)))]
