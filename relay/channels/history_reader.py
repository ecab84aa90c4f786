"""Reads histories for those who join: what a position is worth, and pages of rows.

Owns what is read once for all who ask for it; must not know what comes from the bus.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

from relay.brokers.base import Event, HistoryStore, Opened, Place, is_position
from relay.config import Config
from relay.config_sections import HistoryConfig
from relay.errors import BusUnavailable, NotRecovered
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.protocol.payload import Payload
from relay.protocol.serializer import Version, encode_broadcast, encode_positioned

PAGE_BYTES, PAGE_ROWS = 32_768, 64
"""A page has as many rows as have about so many bytes, and no more than so many."""

ENTRY_BYTES = 256
"""What an event in memory takes beside its payload."""

PAGE_IDLE_S = 60.0
"""Seconds for which a page is kept without being asked for."""

_NOWHERE = "0-0"
"""No event has this position."""

_ANY_NUMBER = 2**53
"""More than any history has."""

_ReadKey = tuple[str, str, object]


class Entry:
    """One event of a history, encoded at most once for each form in which it is sent."""

    __slots__ = ("_frames", "event", "payload", "place", "size", "topic")

    def __init__(self, topic: str, place: Place, event: str, payload: Payload, size: int) -> None:
        self.topic: str = topic
        self.place: Place = place
        self.event: str = event
        """Empty where a plugin has dropped it, or it cannot be delivered."""
        self.payload: Payload = payload
        self.size: int = size + ENTRY_BYTES
        self._frames: dict[tuple[Version, bool], Sequence[tuple[str, Frame]]] = {}

    def frames(self, version: Version, positioned: bool) -> Sequence[tuple[str, Frame]]:
        """Its frames, each with the name of its event."""
        if not self.event:
            return ()
        key = (version, positioned)
        frames = self._frames.get(key)
        if frames is None:
            position = str(self.place)
            if positioned:
                frames = encode_positioned(version, self.topic, self.event, self.payload, position)
            else:
                frames = [(self.event, encode_broadcast(version, self.topic, self.event, self.payload, position))]
            self._frames[key] = frames
        return frames


class Page:
    """Rows of a history that follow each other."""

    __slots__ = ("asked_at", "end", "entries", "is_last", "size")

    def __init__(self, entries: Sequence[Entry], end: Place, is_last: bool) -> None:
        self.entries: Sequence[Entry] = entries
        self.end: Place = end
        """Of the last row, delivered or not: the next page begins behind it."""
        self.is_last: bool = is_last
        """Whether there was nothing behind it."""
        self.size: int = sum(entry.size for entry in entries)
        self.asked_at: float = 0.0
        """When it was asked for last, in monotonic seconds."""


class Recovery:
    """What a join on a topic with a history is given."""

    __slots__ = ("fault", "is_included", "is_recovered", "last", "position", "start")

    def __init__(
        self,
        position: str | None,
        start: Place | None,
        fault: NotRecovered | None = None,
        *,
        is_recovered: bool = False,
        is_included: bool = False,
        last: int = 0,
    ) -> None:
        self.position: str | None = position
        """What the reply says: the events that follow it are delivered."""
        self.start: Place | None = start
        """Where they begin; None for the next event that is heard."""
        self.fault: NotRecovered | None = fault
        self.is_recovered: bool = is_recovered
        self.is_included: bool = is_included
        """Whether the event at `start` is delivered too."""
        self.last: int = last
        """How many of the newest events begin there; 0 where that is of no interest."""

    @property
    def response(self) -> dict[str, object]:
        """Members of the reply to the join."""
        fields: dict[str, object] = {"_position": self.position}
        if self.is_recovered:
            fields["recovered"] = True
        elif self.fault is not None:
            fields |= {"recovered": False, "reason": str(self.fault)}
        return fields


class Stored(NamedTuple):
    """Events of a history, for those who look at it."""

    events: Sequence[Event]
    position: str
    """What came later is behind this."""
    fault: NotRecovered | None = None
    """Why not all events behind the given position are there."""
    has_more: bool = False
    """Whether there are more events behind `position`."""


class Description(NamedTuple):
    """What a history may hold, and what it holds now; None where that cannot be read."""

    size: int
    ttl_s: int
    events: int | None = None
    first: str | None = None
    """Position of the oldest event."""
    last: str | None = None
    bytes: int | None = None
    """Memory it takes; approximate."""
    unavailable: str | None = None
    """Why it cannot be read."""


class RowFilter(Protocol):
    """What decides on each row."""

    async def filter_row(self, row: Event) -> tuple[str, Payload] | None:
        """What handlers and limits leave of an event; None for nothing."""


class HistoryReader:
    """Reads the store, once for all who ask for the same.

    Args: store: gives what reads histories, or None while that is impossible.
    """

    def __init__(
        self, config: Config, store: Callable[[], HistoryStore | None], row_filter: RowFilter, metrics: Metrics
    ) -> None:
        self._config = config
        self._limits = config.limits
        self._store = store
        self._filter = row_filter
        self._metrics = metrics
        # Reads under way, and pages that are whole, least recently used first.
        self._reads: dict[_ReadKey, asyncio.Task[object]] = {}
        self._pages: OrderedDict[_ReadKey, Page] = OrderedDict()
        self.bytes: int = 0
        """Of the pages in memory."""

    @property
    def store(self) -> HistoryStore:
        """What reads histories. Raises BusUnavailable where that is impossible now."""
        store = self._store()
        if store is None:
            raise BusUnavailable("histories cannot be heard")
        return store

    def _settings(self, topic: str) -> HistoryConfig:
        settings = self._config.topic(topic).history
        assert settings is not None, "the caller has looked"
        return settings

    # What a position is worth.

    async def open(self, topic: str, since: object, last: object) -> Recovery:
        """Decide what a join is given.

        Args:   since: the client's position, as it says; any other value is not recovered, and None asks for nothing.
                last: how many of the newest events it asks for instead; ignored where that is no number.
        Raises: BusUnavailable.
        """
        count = min(last, self._limits.recover_max_events) if isinstance(last, int) and last is not True else 0
        if since is None and count > 0:
            return await self._open_last(topic, count)
        place = Place.of(since) if is_position(since) else None
        opened = await self._open(topic, _NOWHERE if place is None else str(place))
        newest = Place.of(opened.newest)
        if since is None:
            return Recovery(opened.newest, newest)
        fault = NotRecovered.UNKNOWN if place is None else opened.fault
        if fault is None:
            self._metrics.history_recovered += 1
            return Recovery(str(place), place, is_recovered=True)
        self._metrics.history_not_recovered[fault] += 1
        return Recovery(opened.newest, newest, fault)

    async def _open(self, topic: str, since: str) -> Opened:
        limits = self._limits
        read = self.store.open(topic, since, self._settings(topic), limits.recover_max_events, limits.recover_max_bytes)
        opened = await self._share((topic, since, "open"), read)
        assert isinstance(opened, Opened), "it was asked for"
        return opened

    async def _open_last(self, topic: str, count: int) -> Recovery:
        opened, found, before = await self._find_last(topic, count)
        if not found:
            return Recovery(opened.newest, Place.of(opened.newest))
        first = Place.of(str(found[0].position))
        return Recovery(before or str(Place(first.ms, first.n - 1)), first, is_included=True, last=count)

    async def _find_last(self, topic: str, count: int) -> tuple[Opened, list[Event], str | None]:
        """The last events, oldest first, and the position before them, where that is known. Raises BusUnavailable."""
        store, opened = self.store, await self._open(topic, _NOWHERE)
        oldest_ms = opened.now_ms - self._settings(topic).ttl_s * 1000
        newest_first: list[Event] = []
        size, step = 0, 16
        before: str | None = None
        while rows := await store.last(topic, min(step, count + 1 - len(newest_first)), before):
            for row in reversed(rows):
                before = row.position
                size += len(row.payload)
                is_too_old = Place.of(str(before)).ms < oldest_ms
                if len(newest_first) == count or not row.event or is_too_old or size > self._limits.recover_max_bytes:
                    return opened, newest_first[::-1], before
                newest_first.append(row)
            step = min(step * 2, 256)
        return opened, newest_first[::-1], None

    # For those who look at a history.

    def empty(self, topic: str) -> Description:
        """What may be there."""
        return Description(**self._settings(topic).model_dump())

    async def describe(self, topic: str) -> Description:
        """Say what is there."""
        empty = self.empty(topic)
        try:
            found = await self.store.describe(topic)
        except BusUnavailable as error:
            return empty._replace(unavailable=str(error))
        return empty._replace(**found._asdict())

    async def newest(self, topic: str, count: int) -> Stored:
        """The last events as they are stored, ``count`` at most. Raises BusUnavailable."""
        opened, found, _ = await self._find_last(topic, count)
        return Stored(found, str(found[-1].position) if found else opened.newest)

    async def behind(self, topic: str, since: str, count: int) -> Stored:
        """The events behind a position as they are stored, ``count`` at most. Raises BusUnavailable."""
        opened = await self.store.open(topic, since, self._settings(topic), _ANY_NUMBER, _ANY_NUMBER)
        found: list[Event] = []
        position, size, fault = since, 0, opened.fault
        while fault is None:
            wanted = min(count + 1 - len(found), PAGE_ROWS) + 1
            rows = await self.store.read(topic, position, wanted)
            if rows is None and position == opened.newest:
                break  # the stream has lost all its entries, and nothing came behind them
            for row in rows[1:] if rows is not None else ():
                size += len(row.payload)
                if len(found) == count or (found and size > self._limits.recover_max_bytes):
                    return Stored(found, position, has_more=True)
                if row.event:
                    found.append(row)
                elif row.payload:
                    fault = NotRecovered.FORKED
                position = str(row.position)
            if rows is None:
                fault = NotRecovered.EXPIRED
            elif len(rows) < wanted:
                break
        return Stored(found, position) if fault is None else Stored((), opened.newest, fault)

    # Pages.

    async def page(self, topic: str, place: Place, is_included: bool, row_bytes: float) -> Page | None:
        """The rows behind a position, or from it on; None where that is gone, or events behind it were lost.

        Args:   row_bytes: of a typical row.
        Raises: BusUnavailable.
        """
        key = (topic, str(place), is_included)
        page = self._pages.get(key)
        if page is not None:
            self._pages.move_to_end(key)
            page.asked_at = time.monotonic()
            return page
        read = await self._share(key, self._read_page(topic, place, is_included, row_bytes))
        assert read is None or isinstance(read, Page), "it was asked for"
        if read is not None and not read.is_last and key not in self._pages:
            self._pages[key] = read
            read.asked_at = time.monotonic()
            self.bytes += read.size
        return read

    async def _read_page(self, topic: str, place: Place, is_included: bool, row_bytes: float) -> Page | None:
        before = place.n - 1 if is_included else place.n
        count = rows_behind(before, row_bytes) + (0 if is_included else 1)
        rows = await self.store.read(topic, str(place), count)
        if rows is None:
            return None
        entries: list[Entry] = []
        for row in rows if is_included else rows[1:]:
            if row.event:
                left = await self._filter.filter_row(row)
                event, payload = ("", row.payload) if left is None else left
                entries.append(Entry(topic, Place.of(str(row.position)), event, payload, len(row.payload)))
            elif row.is_mark:
                return None
        return Page(entries, Place.of(str(rows[-1].position)), len(rows) < count)

    def forget_oldest(self) -> bool:
        """Forget the page that was not asked for for longest; False where there is none."""
        if not self._pages:
            return False
        _, page = self._pages.popitem(last=False)
        self.bytes -= page.size
        return True

    def forget_unused(self, now: float) -> None:
        """Forget the pages that were not asked for in a while: clients that were cut off together have come back."""
        while self._pages and next(iter(self._pages.values())).asked_at < now - PAGE_IDLE_S:
            self.forget_oldest()

    def forget(self, topic: str) -> None:
        """Forget all pages of a topic."""
        for key in [key for key in self._pages if key[0] == topic]:
            self.bytes -= self._pages.pop(key).size

    async def _share(self, key: _ReadKey, read: Awaitable[object]) -> object:
        """Read once for all who ask meanwhile."""
        task = self._reads.get(key)
        if task is None:
            task = self._reads[key] = asyncio.ensure_future(read)
            task.add_done_callback(lambda done: self._reads.pop(key, None))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        elif asyncio.iscoroutine(read):
            read.close()
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End what is being read."""
        for task in tuple(self._reads.values()):
            task.cancel()
        if self._reads:
            _ = await asyncio.gather(*self._reads.values(), return_exceptions=True)


def rows_behind(n: int, row_bytes: float) -> int:
    """How many rows to read behind one: pages begin at the same rows for all who read them."""
    rows = PAGE_ROWS
    while rows > 1 and rows * row_bytes > PAGE_BYTES:
        rows //= 2
    return rows - (n + 1) % rows
