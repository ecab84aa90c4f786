"""What this process knows of topics' histories: where each stands here, what was heard last, and what is missing.

Owns the order of positioned events: each is delivered once, after the one before it, and where one is missing it is
read from the store. Must not know sockets or the wire.

A topic is followed from its first subscriber here to its last. `accept` looks at each event from the bus; a hole, an
interrupted link and a check that finds something newer all lead to `catch_up`, which delivers what is missing as if it
had come from the bus. Where the store has lost it too, the subscribers are asked to rejoin.

A join with a position is given pages of rows as fast as its client reads. At their end it enters the hub in one turn of
the event loop, with what was delivered since then, which the ring of recent events has.
"""

import asyncio
import heapq
import math
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from itertools import count, islice
from typing import Protocol, TypeAlias

from relay.brokers.base import Event, HistoryStore, Place
from relay.channels.followed import RING_BYTES, Followed, Rings
from relay.channels.history_reader import ENTRY_BYTES, Entry, HistoryReader, Page, Recovery, rows_behind
from relay.config import Config
from relay.config_sections import HistoryConfig
from relay.errors import BusUnavailable, NotRecovered, Reason
from relay.log import RateLimitedLogger
from relay.metrics import Metrics
from relay.protocol.payload import Payload

CHECK_MIN_S, CHECK_MAX_S = 30.0, 40.0
"""Seconds without an event or a notice after which a topic is checked; in between at random."""

CHECKS_PER_S = 200
"""Most topics that one process checks in a second; with more topics the interval grows."""

_CHECK_STEP_S = 0.1
_CHECK_AGAIN_S = 5.0
_LOOKED_AT = 1000
"""Most topics of which one step finds out whether they are due."""

_READ_ATTEMPTS, _READ_AGAIN_S = 5, 0.5
"""How often a history that is to be caught up is read before it counts as lost, and the seconds in between."""

_REACHED_S = 1.0
"""Seconds a join waits for an event that is in the history and was not heard, before the topic is checked."""

_Entry: TypeAlias = tuple[float, int, Followed]


class HistoryOwner(Protocol):
    """What follows histories: the bridge between hub and broker."""

    def deliver_rows(self, rows: Sequence[Event]) -> int:
        """Deliver events to the topic's subscribers, as if they came from the bus; returns how many were taken."""

    async def room_for_rows(self, topic: str, payload: bytes = b"") -> None:
        """Return when hub and handlers can take more of a topic, an event with this payload at least."""

    async def filter_row(self, row: Event) -> tuple[str, Payload] | None:
        """What handlers and limits leave of an event; None for nothing."""

    def refuse_join(self) -> Reason | None:
        """Say why no client can join now; None when they can."""

    def request_rejoins_of(self, topic: str) -> None:
        """Tell the subscribers of a topic that they may have missed events."""

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run something until it ends or the relay stops."""


class History:
    """The histories of the topics that are joined here.

    Args: store: gives what reads them, or None while that is impossible.
    """

    def __init__(
        self,
        config: Config,
        store: Callable[[], HistoryStore | None],
        owner: HistoryOwner,
        metrics: Metrics,
        log: RateLimitedLogger,
    ) -> None:
        self._config = config
        self._limits = config.limits
        self._store = store
        self._owner = owner
        self._metrics = metrics
        self._log = log
        self._followed: dict[str, Followed] = {}
        self._checking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        # A heap: when a topic is to be looked at, a number of its own, and the topic. One that has an earlier entry by
        # now, or is followed no more, is passed over.
        self._queue: list[_Entry] = []
        self._numbers = count()
        # Topics that are checked out of turn, at the pace of recoveries, the first first.
        self._hurried: dict[str, None] = {}
        # Held by the join whose turn is next to be given what it missed, and when that is.
        self._turn = asyncio.Lock()
        self._turn_at = 0.0
        self.reader: HistoryReader = HistoryReader(config, store, owner, metrics)
        self.replay_bytes: int = min(RING_BYTES // 2, self._limits.outbox_max_bytes)
        """Of frames from a history that may wait for one client; a single event may have more."""
        self._rings = Rings()

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run something until it ends or the relay stops."""
        return self._owner.spawn(work)

    def settings(self, topic: str) -> HistoryConfig | None:
        """What a topic keeps; None where it has no history."""
        return self._config.topic(topic).history

    # Following.

    def follow(self, topic: str) -> None:
        """Begin to follow a topic that has a subscriber here; nothing where it is followed, or has no history."""
        if topic in self._followed or (settings := self.settings(topic)) is None or self._store() is None:
            return
        self._begin(topic, settings)
        if self._checking is None or self._checking.done():
            self._checking = self._owner.spawn(self._check_regularly())

    def _begin(self, topic: str, settings: HistoryConfig) -> None:
        """Know nothing yet of where a topic stands, and have it checked at once."""
        self._followed[topic] = followed = Followed(topic, settings)
        self._schedule(followed, 0.0)
        self._wake.set()

    def unfollow(self, topic: str) -> None:
        """Stop to follow a topic that has no subscriber here any more."""
        followed = self._followed.pop(topic, None)
        if followed is None:
            return
        _ = self._hurried.pop(topic, None)
        self._rings.clear(followed)
        if followed.catching_up is not None:
            followed.catching_up.cancel()
        if followed.is_doubted:  # what was heard here may be known nowhere else
            _ = self._owner.spawn(self._check(followed))
        followed.wake()
        if len(self._queue) > 2 * len(self._followed):  # entries of such topics would stay until they are due
            self._queue = [entry for entry in self._queue if self._is_queued(entry)]
            heapq.heapify(self._queue)

    def epoch(self, topic: str) -> object:
        """What stays the same while a topic is followed without a loss; None while it is not followed."""
        return self._followed.get(topic)

    def follows(self, topic: str) -> bool:
        """Whether what is lost of this topic can be found: a position is known."""
        followed = self._followed.get(topic)
        return followed is not None and followed.heard is not None

    def delivered(self, topic: str) -> Place | None:
        """The position of the last event delivered here; None where none is known."""
        followed = self._followed.get(topic)
        return None if followed is None else followed.delivered

    def accept(self, event: Event) -> bool:
        """Look at an event with a position; False where it must not be delivered now, or not again."""
        followed = self._followed.get(event.topic)
        if followed is None:
            return bool(event.event)
        assert event.position is not None, "the caller has looked"
        place, heard = Place.of(event.position), followed.heard
        followed.due_at = time.monotonic() + random.uniform(CHECK_MIN_S, CHECK_MAX_S)
        if followed.catching_up is not None:
            followed.hold(event)
            return False
        if followed.is_doubted:
            if place == heard:
                followed.settle(followed.gaps)
            else:
                followed.hold(event)
                self._catch_up(followed, "gap")
            return False
        if heard is None:
            followed.heard = place
            if not event.event:
                self._note(followed, place)
            return bool(event.event)
        if place.n == heard.n + 1 and place.ms >= heard.ms and event.event:
            followed.heard = place
            return True
        if place == heard or (place.n <= heard.n and place.ms <= heard.ms):
            return False  # heard already: what was caught up comes from the bus too
        self._metrics.history_holes += bool(event.event)
        followed.hold(event)
        self._catch_up(followed, "hole" if event.event else "check")
        return False

    def note(self, topic: str, position: str, event: str, payload: Payload, size: int) -> None:
        """Learn that an event with a position has been delivered to the hub, or was dropped on the way to it.

        Args: event: empty where it was dropped.
        """
        followed = self._followed.get(topic)
        if followed is None:
            return
        place = Place.of(position)
        followed.row_bytes += (size + ENTRY_BYTES - followed.row_bytes) / 16
        self._note(followed, place, Entry(topic, place, event, payload, size))

    def _note(self, followed: Followed, place: Place, entry: Entry | None = None) -> None:
        self._rings.note(followed, place, entry)
        self._make_room()
        if followed.waiters:
            followed.wake()

    def _make_room(self) -> None:
        """Forget pages, then rings, where all together are too large."""
        most = self._limits.history_ring_max_bytes
        while self._rings.bytes + self.reader.bytes > most and self.reader.forget_oldest():
            pass
        while self._rings.bytes > most:
            self._rings.clear_oldest()

    # Catching up.

    def forget_unheard(self, hears: Callable[[str], bool], topics: Iterable[str] | None = None) -> None:
        """Know nothing more of topics, all or some, that may not be heard any more: nothing will catch them up."""
        is_readable = self._store() is not None
        for topic in tuple(self._followed) if topics is None else topics:
            followed = self._followed.get(topic)
            if followed is not None and not (is_readable and hears(topic)):
                self.unfollow(topic)
                self._begin(topic, followed.settings)

    def after_gap(self, topics: Iterable[str] | None = None) -> None:
        """Check all topics, or some, at the pace of recoveries: the link was interrupted."""
        for topic in self._followed if topics is None else topics:
            followed = self._followed.get(topic)
            if followed is not None and followed.heard is not None:
                followed.gaps += 1
                self._hurried[topic] = None
        self._wake.set()

    def check_soon(self, topic: str) -> None:
        """Check a topic out of turn."""
        if topic in self._followed:
            self._hurried[topic] = None
            self._wake.set()

    def _catch_up(self, followed: Followed, cause: str) -> None:
        self._metrics.history_catch_ups[cause] += 1
        followed.catching_up = self._owner.spawn(self._run_catch_up(followed))

    async def _run_catch_up(self, followed: Followed) -> None:
        """Deliver what is missing of a topic, from the position heard last; cancelled when it is followed no more."""
        attempts = 0
        try:
            while True:
                try:
                    if await self._catch_up_step(followed):
                        break
                    attempts = 0
                except BusUnavailable as error:
                    attempts += 1
                    self._log.warning("history", "history read of topic %r failed: %s", followed.topic, error)
                    if attempts == _READ_ATTEMPTS:
                        await self._lose(followed)
                        break
                    await asyncio.sleep(_READ_AGAIN_S)
        finally:
            followed.catching_up = None
            followed.wake()

    async def _catch_up_step(self, followed: Followed) -> bool:
        """Deliver one page; True once what comes from the bus follows on it."""
        topic, gaps = followed.topic, followed.gaps
        assert followed.heard is not None, "there is no hole without something heard"
        most = 1 + rows_behind(followed.heard.n, followed.row_bytes)
        rows = await self.reader.store.read(topic, str(followed.heard), most)
        if rows is None or any(row.is_mark for row in rows[1:]):
            await self._lose(followed)
            return True
        followed.settle(gaps)
        missing = [row for row in rows[1:] if row.event]
        self._metrics.history_replayed += len(missing)
        await self._deliver(followed, missing)
        # Without waiting from here on: nothing may come in between.
        followed.heard = Place.of(str(rows[-1].position))
        # What the store said before a gap says nothing of what was lost in it.
        return len(rows) < most and self._release_held(followed) and not followed.is_doubted

    async def _deliver(self, followed: Followed, rows: Sequence[Event]) -> None:
        """Deliver rows as far as handlers take them, one portion after the other."""
        while rows:
            await self._owner.room_for_rows(followed.topic, rows[0].payload)
            taken = self._owner.deliver_rows(rows)
            assert taken, "there is room"
            followed.heard = Place.of(str(rows[taken - 1].position))
            rows = rows[taken:]

    def _release_held(self, followed: Followed) -> bool:
        """Deliver what has come from the bus meanwhile; False where the store has to be read again before."""
        for event in followed.take_held():
            place, heard = Place.of(str(event.position)), followed.heard
            assert heard is not None, "it was caught up"
            if place.n <= heard.n and place.ms <= heard.ms:
                continue
            if place.n != heard.n + 1 or place.ms < heard.ms or not event.event:
                return False  # the store has what lies between, by now
            if not self._owner.deliver_rows([event]):
                return False
            followed.heard = place
        return True

    async def _lose(self, followed: Followed) -> None:
        """Have the subscribers rejoin: what they missed is lost, or cannot be read. The topic begins again.

        First the store may mark the loss: a client that rejoins from before it must not get `recovered`.
        """
        topic = followed.topic
        self._metrics.history_lost += 1
        self.reader.forget(topic)
        await self._check(followed)
        self._rings.clear(followed)
        self._begin(topic, followed.settings)
        self._owner.request_rejoins_of(topic)

    # Checking.

    def _schedule(self, followed: Followed, at: float) -> None:
        """Have a topic checked at a time, unless something is heard of it before."""
        followed.due_at = at
        if at < followed.queued_at:
            followed.queued_at = at
            heapq.heappush(self._queue, (at, next(self._numbers), followed))

    def _is_queued(self, entry: _Entry) -> bool:
        """Whether a topic is to be looked at by this entry, and not by an earlier one, and is followed still."""
        at, _, followed = entry
        return at == followed.queued_at and self._followed.get(followed.topic) is followed

    def _take_due(self, now: float) -> list[Followed]:
        """Some of the topics that have been silent for long, the longest silent first."""
        due: list[Followed] = []
        for _ in range(_LOOKED_AT):
            if not self._queue or self._queue[0][0] > now or len(due) == max(1, round(CHECKS_PER_S * _CHECK_STEP_S)):
                break
            entry = heapq.heappop(self._queue)
            if not self._is_queued(entry):
                continue
            followed = entry[2]
            followed.queued_at = math.inf
            if followed.due_at > now:
                self._schedule(followed, followed.due_at)
            elif followed.catching_up is not None:
                self._schedule(followed, now + _CHECK_AGAIN_S)
            else:
                due.append(followed)
        return due

    async def _check_regularly(self) -> None:
        """Check each topic that has been silent for long, a few at a time."""
        while self._followed:
            now = time.monotonic()
            self.reader.forget_unused(now)
            due = self._take_due(now)
            portion = max(1, round(self._limits.recover_per_s * _CHECK_STEP_S))
            for topic in tuple(islice(self._hurried, portion)):
                del self._hurried[topic]
                if (followed := self._followed[topic]) not in due:
                    due.append(followed)
            for followed in due:
                self._schedule(followed, now + random.uniform(CHECK_MIN_S, CHECK_MAX_S))
            if due:
                _ = await asyncio.gather(*(self._check(followed) for followed in due))
                await asyncio.sleep(_CHECK_STEP_S)
                continue
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(1.0, self._queue[0][0] - now) if self._queue else 1.0):
                    await self._wake.wait()
        self.reader.forget_unused(math.inf)

    async def _check(self, followed: Followed) -> None:
        store = self._store()
        if store is None:
            return
        self._metrics.history_checks += 1
        heard = "" if followed.heard is None else str(followed.heard)
        try:
            await store.check(followed.topic, heard, followed.settings)
        except BusUnavailable as error:
            self._schedule(followed, time.monotonic() + _CHECK_AGAIN_S)
            self._log.warning("history", "history check of topic %r failed: %s", followed.topic, error)

    # For joins.

    async def open(self, topic: str, since: object, last: object, is_wanted: Callable[[], bool]) -> Recovery:
        """Decide what a join is given, at the pace of recoveries; see `HistoryReader.open`.

        Args:   is_wanted: whether the client still waits for that, when it is its turn.
        Raises: BusUnavailable, where every join is refused: the client comes back with its position.
        """
        try:
            if not await self._wait_for_turn(is_wanted):
                return Recovery(None, None)
            await self._wait_for_certainty(topic)
            return await self.reader.open(topic, since, last)
        except BusUnavailable as error:
            self._log.warning("history", "history read of topic %r failed: %s", topic, error)
            if self._owner.refuse_join() is not None:
                raise
            if since is None:
                return Recovery(None, None)
            self._metrics.history_not_recovered[NotRecovered.UNAVAILABLE] += 1
            return Recovery(None, None, NotRecovered.UNAVAILABLE)

    async def _wait_for_turn(self, is_wanted: Callable[[], bool]) -> bool:
        """Keep to ``limits.recover_per_s``; what was not used within the last second may be used at once.

        Returns: False for a client that has gone: its turn is the next one's.
        """
        async with self._turn:
            if not is_wanted():
                return False
            now = time.monotonic()
            self._turn_at = max(self._turn_at, now - 1.0) + 1 / self._limits.recover_per_s
            if self._turn_at > now:
                await asyncio.sleep(self._turn_at - now)
            return is_wanted()

    async def _wait_for_certainty(self, topic: str) -> None:
        """After a gap: wait until it is known whether events were lost that were heard here. Raises BusUnavailable."""
        followed = self._followed.get(topic)
        if followed is None or not followed.is_doubted:
            return
        try:
            async with asyncio.timeout(self._config.redis.timeout_s):
                if topic in self._hurried:  # others may be before it
                    del self._hurried[topic]
                    await self._check(followed)
                while self._followed.get(topic) is followed and followed.is_doubted:
                    await followed.wait()
        except TimeoutError:
            raise BusUnavailable("the topic is still being caught up") from None

    def hand_over(self, topic: str, place: Place, is_included: bool = False) -> Sequence[Entry] | None:
        """What was delivered here after a position, or from it on; None where that is not known, or not reached yet.

        A channel that is given this and enters the hub in the same turn of the event loop misses nothing.
        """
        followed = self._followed.get(topic)
        return None if followed is None else followed.delivered_after(place, is_included)

    def is_ahead(self, topic: str, place: Place) -> bool:
        """Whether a position of the history that is followed has not been delivered here yet."""
        followed = self._followed.get(topic)
        if followed is None or followed.delivered is None:
            return False
        return place.n > followed.delivered.n and place.ms >= followed.delivered.ms

    async def reached(self, topic: str, place: Place) -> bool:
        """Wait until a position has been delivered here; False where the topic is not followed any more."""
        while True:
            followed = self._followed.get(topic)
            if followed is None:
                return False
            delivered = followed.delivered
            if delivered is not None and delivered >= place:  # else it may be of a history that was deleted
                return True
            try:
                async with asyncio.timeout(_REACHED_S):
                    await followed.wait()
            except TimeoutError:
                self.check_soon(topic)

    async def open_again(self, topic: str, last: int) -> Recovery:
        """Find the newest events once more: those that were found are gone by now. Raises BusUnavailable."""
        return await self.reader.open(topic, None, last)

    async def page(self, topic: str, place: Place, is_included: bool = False) -> Page | None:
        """The rows behind a position, or from it on; None where that is gone, or events behind it were lost.

        Raises: BusUnavailable.
        """
        followed = self._followed.get(topic)
        if followed is None:
            return None
        page = await self.reader.page(topic, place, is_included, followed.row_bytes)
        if page is not None and page.entries:
            followed.row_bytes += (page.size / len(page.entries) - followed.row_bytes) / 4
            self._make_room()
        return page

    async def close(self) -> None:
        """End what is being read."""
        await self.reader.close()
