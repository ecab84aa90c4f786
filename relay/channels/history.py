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
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Protocol

from relay.brokers.base import Event, HistoryStore, Place
from relay.channels.history_reader import ENTRY_BYTES, Entry, HistoryReader, Page, Recovery, rows_behind
from relay.config import Config, HistoryConfig
from relay.errors import BusUnavailable, NotRecovered
from relay.log import RateLimitedLogger
from relay.metrics import Metrics
from relay.protocol.payload import Payload

CHECK_MIN_S, CHECK_MAX_S = 30.0, 40.0
"""Seconds without an event or a notice after which a topic is checked; in between at random."""

CHECKS_PER_S = 200
"""Most topics that one process checks in a second; with more topics the interval grows."""

_CHECK_STEP_S = 0.1
_CHECK_AGAIN_S = 5.0

_READ_ATTEMPTS, _READ_AGAIN_S = 5, 0.5
"""How often a history that is to be caught up is read before it counts as lost, and the seconds in between."""

_RING_BYTES = 65_536
"""Recent events of one topic that are kept, in bytes of their payloads and `ENTRY_BYTES` for each."""

_REACHED_S = 1.0
"""Seconds a join waits for an event that is in the history and was not heard, before the topic is checked."""


class _Followed:
    """One topic with a history that has a subscriber here."""

    __slots__ = (
        "catching_up",
        "delivered",
        "due_at",
        "heard",
        "held",
        "held_bytes",
        "is_doubted",
        "ring",
        "ring_bytes",
        "ring_start",
        "row_bytes",
        "settings",
        "topic",
        "waiters",
    )

    def __init__(self, topic: str, settings: HistoryConfig) -> None:
        self.topic = topic
        self.settings = settings
        # The last position that was heard, and the last that was delivered: handlers of on_event may be in between.
        self.heard: Place | None = None
        self.delivered: Place | None = None
        self.due_at = 0.0
        # While it is caught up: what has come from the bus meanwhile.
        self.catching_up: asyncio.Task[None] | None = None
        self.held: list[Event] = []
        self.held_bytes = 0
        # Whether the link was interrupted since: what was heard last may be of a history that is no more.
        self.is_doubted = False
        # The last events delivered, without a hole, and the position before the first of them, where that is known.
        self.ring: deque[Entry] = deque()
        self.ring_start: Place | None = None
        self.ring_bytes = 0
        # Of a typical row; pages are so many rows that they have about `PAGE_BYTES`.
        self.row_bytes = 1024.0
        self.waiters: list[asyncio.Future[None]] = []

    def wake(self) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class HistoryOwner(Protocol):
    """What follows histories: the bridge between hub and broker."""

    def deliver_rows(self, rows: Sequence[Event]) -> None:
        """Deliver events to the topic's subscribers, as if they had come from the bus."""

    async def room_for_rows(self, topic: str) -> None:
        """Return when hub and handlers can take more of a topic."""

    async def filter_row(self, row: Event) -> tuple[str, Payload] | None:
        """What handlers and limits leave of an event; None for nothing."""

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
        self._followed: dict[str, _Followed] = {}
        self._checking: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        # Until then topics are checked at the pace of recoveries, after a gap.
        self._hurried: set[str] = set()
        # When the next join has its turn to be given what it missed.
        self._turn_at = 0.0
        self.reader: HistoryReader = HistoryReader(config, store, owner, metrics)
        # Of all rings.
        self._ring_bytes = 0

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run something until it ends or the relay stops."""
        return self._owner.spawn(work)

    def settings(self, topic: str) -> HistoryConfig | None:
        """What a topic keeps; None where it has no history."""
        return self._config.topic(topic).history

    # Following.

    def follow(self, topic: str) -> None:
        """Begin to follow a topic that has its first subscriber here; nothing where it has no history."""
        settings = self.settings(topic)
        if settings is None or topic in self._followed or self._store() is None:
            return
        self._followed[topic] = _Followed(topic, settings)
        if self._checking is None or self._checking.done():
            self._checking = self._owner.spawn(self._check_regularly())
        self._wake.set()

    def unfollow(self, topic: str) -> None:
        """Stop to follow a topic that has no subscriber here any more."""
        followed = self._followed.pop(topic, None)
        if followed is not None:
            self._hurried.discard(topic)
            self._clear_ring(followed)
            if followed.catching_up is not None:
                followed.catching_up.cancel()
            followed.wake()

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
            self._hold(followed, event)
            return False
        if followed.is_doubted:
            if place != heard:
                self._hold(followed, event)
                self._catch_up(followed, "gap")
            else:
                followed.is_doubted = False
                followed.wake()
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
        self._metrics.history_holes += 1
        self._hold(followed, event)
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

    def _note(self, followed: _Followed, place: Place, entry: Entry | None = None) -> None:
        ring, delivered = followed.ring, followed.delivered
        if entry is None or delivered is None or delivered.n + 1 != place.n:
            self._clear_ring(followed)
        elif not ring:
            followed.ring_start = delivered
        if entry is not None and followed.ring_start is not None:
            ring.append(entry)
            followed.ring_bytes += entry.size
            self._ring_bytes += entry.size
            while followed.ring_bytes > _RING_BYTES and len(ring) > 1:
                oldest = ring.popleft()
                followed.ring_start = oldest.place
                followed.ring_bytes -= oldest.size
                self._ring_bytes -= oldest.size
            self._make_room()
        followed.delivered = place
        if followed.waiters:
            followed.wake()

    def _clear_ring(self, followed: _Followed) -> None:
        self._ring_bytes -= followed.ring_bytes
        followed.ring.clear()
        followed.ring_bytes = 0
        followed.ring_start = None

    def _make_room(self) -> None:
        """Forget pages, then rings, where all together are too large."""
        most = self._limits.history_ring_max_bytes
        while self._ring_bytes + self.reader.bytes > most and self.reader.forget_oldest():
            pass
        if self._ring_bytes > most:
            for followed in self._followed.values():
                if self._ring_bytes <= most:
                    break
                self._clear_ring(followed)

    def _hold(self, followed: _Followed, event: Event) -> None:
        """Keep an event from the bus until the topic is caught up; the store has it too."""
        size = len(event.payload) + ENTRY_BYTES
        if followed.held_bytes + size > _RING_BYTES:
            followed.held.clear()
            followed.held_bytes = 0
        followed.held.append(event)
        followed.held_bytes += size

    # Catching up.

    def after_gap(self) -> None:
        """Check all topics, at the pace of recoveries: the link was interrupted."""
        for topic, followed in self._followed.items():
            if followed.heard is not None:
                followed.is_doubted = True
                self._hurried.add(topic)
        self._wake.set()

    def check_soon(self, topic: str) -> None:
        """Check a topic out of turn."""
        followed = self._followed.get(topic)
        if followed is not None:
            followed.due_at = 0.0
            self._wake.set()

    def _catch_up(self, followed: _Followed, cause: str) -> None:
        self._metrics.history_catch_ups[cause] += 1
        followed.catching_up = self._owner.spawn(self._run_catch_up(followed))

    async def _run_catch_up(self, followed: _Followed) -> None:
        """Deliver what is missing of a topic, from the position heard last."""
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
            followed.is_doubted = False
            followed.wake()

    async def _catch_up_step(self, followed: _Followed) -> bool:
        """Deliver one page; True once what comes from the bus follows on it."""
        topic = followed.topic
        assert followed.heard is not None, "there is no hole without something heard"
        await self._owner.room_for_rows(topic)
        count = 1 + rows_behind(followed.heard.n, followed.row_bytes)
        rows = await self.reader.store.read(topic, str(followed.heard), count)
        if self._followed.get(topic) is not followed:
            return True
        if rows is None or any(not row.event and row.payload for row in rows[1:]):
            await self._lose(followed)
            return True
        missing = [row for row in rows[1:] if row.event]
        self._metrics.history_replayed += len(missing)
        # Without waiting from here on: nothing may come in between.
        followed.heard = Place.of(str(rows[-1].position))
        self._owner.deliver_rows(missing)
        if len(rows) == count:
            return False
        held, followed.held, followed.held_bytes = followed.held, [], 0
        for event in held:
            place = Place.of(str(event.position))
            if place.n <= followed.heard.n and place.ms <= followed.heard.ms:
                continue
            if place.n != followed.heard.n + 1 or not event.event:
                return False  # the store has what lies between, by now
            followed.heard = place
            self._owner.deliver_rows([event])
        return True

    async def _lose(self, followed: _Followed) -> None:
        """Have the subscribers rejoin: what they missed is lost, or cannot be read. The topic begins again.

        First the store may mark the loss: a client that rejoins from before it must not get `recovered`.
        """
        self._metrics.history_lost += 1
        await self._check(followed)
        followed.heard = followed.delivered = None
        followed.held, followed.held_bytes = [], 0
        self._clear_ring(followed)
        self.reader.forget(followed.topic)
        followed.due_at = 0.0
        self._wake.set()
        if self._followed.get(followed.topic) is followed:
            self._owner.request_rejoins_of(followed.topic)

    # Checking.

    async def _check_regularly(self) -> None:
        """Check each topic that has been silent for long, the longest silent first, a few at a time."""
        while self._followed:
            now = time.monotonic()
            due = sorted(
                (
                    followed
                    for followed in self._followed.values()
                    if followed.due_at <= now and not followed.catching_up
                ),
                key=lambda followed: followed.due_at,
            )[: max(1, round(CHECKS_PER_S * _CHECK_STEP_S))]
            portion = max(1, round(self._limits.recover_per_s * _CHECK_STEP_S))
            for topic in sorted(self._hurried)[:portion]:
                self._hurried.discard(topic)
                if (followed := self._followed.get(topic)) is not None and followed not in due:
                    due.append(followed)
            for followed in due:
                followed.due_at = now + random.uniform(CHECK_MIN_S, CHECK_MAX_S)
            if due:
                _ = await asyncio.gather(*(self._check(followed) for followed in due))
                await asyncio.sleep(_CHECK_STEP_S)
                continue
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._wake.wait()

    async def _check(self, followed: _Followed) -> None:
        store = self._store()
        if store is None:
            return
        self._metrics.history_checks += 1
        heard = "" if followed.heard is None else str(followed.heard)
        try:
            await store.check(followed.topic, heard, followed.settings)
        except BusUnavailable as error:
            followed.due_at = time.monotonic() + _CHECK_AGAIN_S
            self._log.warning("history", "history check of topic %r failed: %s", followed.topic, error)

    # For joins.

    async def open(self, topic: str, since: object, last: object) -> Recovery:
        """Decide what a join is given, at the pace of recoveries; see `HistoryReader.open`. Never refuses it."""
        try:
            await self._wait_for_turn()
            await self._wait_for_certainty(topic)
            return await self.reader.open(topic, since, last)
        except BusUnavailable as error:
            self._log.warning("history", "history read of topic %r failed: %s", topic, error)
            self._metrics.history_not_recovered[NotRecovered.UNAVAILABLE] += 1
            return Recovery(None, None, None if since is None else NotRecovered.UNAVAILABLE)

    async def _wait_for_turn(self) -> None:
        """Keep to ``limits.recover_per_s``; what was not used within the last second may be used at once."""
        now = time.monotonic()
        self._turn_at = max(self._turn_at, now - 1.0) + 1 / self._limits.recover_per_s
        if self._turn_at > now:
            await asyncio.sleep(self._turn_at - now)

    async def _wait_for_certainty(self, topic: str) -> None:
        """After a gap: wait until it is known whether events were lost that were heard here. Raises BusUnavailable."""
        followed = self._followed.get(topic)
        if followed is None or not (followed.is_doubted or followed.catching_up):
            return
        self._hurried.add(topic)
        self._wake.set()
        try:
            async with asyncio.timeout(self._config.redis.timeout_s):
                while followed.is_doubted or followed.catching_up:
                    await self._wait(followed)
        except TimeoutError:
            raise BusUnavailable("the topic is still being caught up") from None

    async def _wait(self, followed: _Followed) -> None:
        """Return when something has happened to a topic."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        followed.waiters.append(waiter)
        await waiter

    def hand_over(self, topic: str, place: Place) -> Sequence[Entry] | None:
        """What was delivered here after a position; None where that is not known, or the position is not reached yet.

        A channel that is given this and enters the hub in the same turn of the event loop misses nothing.
        """
        followed = self._followed.get(topic)
        if followed is None or followed.delivered is None:
            return None
        if followed.delivered == place:
            return ()
        ring = followed.ring
        at = place.n - ring[0].place.n if ring else len(ring)
        if not -1 <= at < len(ring) or (followed.ring_start if at < 0 else ring[at].place) != place:
            return None
        return [ring[i] for i in range(at + 1, len(ring))]

    async def reached(self, topic: str, place: Place) -> bool:
        """Wait until a position has been delivered here; False where the topic is not followed any more."""
        while True:
            followed = self._followed.get(topic)
            if followed is None:
                return False
            delivered = followed.delivered
            if delivered is not None and (delivered.n >= place.n or delivered.ms > place.ms):
                return True
            try:
                async with asyncio.timeout(_REACHED_S):
                    await self._wait(followed)
            except TimeoutError:
                self.check_soon(topic)

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
