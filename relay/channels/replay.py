"""What one channel is given from its topic's history: after a join with a position, and when its client reads slowly.

Owns the way from a position to the live events; must not know where histories are kept.

Pages are sent as fast as the client reads, and nothing live is kept meanwhile: the history has it. The channel enters
the hub in the same turn of the event loop in which the last events delivered to others are sent to it.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import msgspec

from relay.brokers.base import Place
from relay.channels.groups import Subscriber
from relay.channels.history import History
from relay.channels.history_reader import Entry, Recovery
from relay.channels.hub import Hub, join_frames
from relay.config_sections import Overflow
from relay.errors import BusUnavailable
from relay.metrics import Metrics
from relay.protocol.payload import Payload

_ATTEMPTS, _AGAIN_S = 10, 0.5
"""How often a page is read before it counts as lost, and the seconds in between."""


class _Asked(msgspec.Struct):
    since: object = msgspec.UNSET
    last: object = msgspec.UNSET


_decode = msgspec.json.Decoder(_Asked).decode


class Asked(msgspec.Struct, frozen=True):
    """What a join asks for on a topic with a history."""

    since: object
    """The client's last position, or whatever it says instead; None where it has none."""
    last: object
    """How many of the newest events; None where it does not say."""


def asked(params: Payload) -> Asked | None:
    """Read the params of a join; None where they ask for neither events nor positions."""
    if not isinstance(params, msgspec.Raw):
        return None
    try:
        found = _decode(params)
    except (msgspec.MsgspecError, RecursionError):
        return None
    if found.since is msgspec.UNSET and found.last is msgspec.UNSET:
        return None
    return Asked(*(None if value is msgspec.UNSET else value for value in (found.since, found.last)))


class ReplayReader(Protocol):
    """The transport, as what replays to it knows it."""

    async def drained(self) -> None:
        """Return once nothing waits and it takes more; or it has ended."""

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for it."""

    @property
    def closed_with(self) -> int | None:
        """The code with which its close has begun; None while it has not."""


class ReplayOwner(Protocol):
    """The channel, as what replays to it knows it."""

    topic: str

    @property
    def subscriber(self) -> Subscriber:
        """Its socket, as the hub knows it."""

    @property
    def transport(self) -> ReplayReader:
        """Its socket's transport."""

    def lose_events(self) -> None:
        """End the subscription with ``phx_error``: events that it missed are lost."""


class Replay:
    """Gives a channel the events behind a position, then the live ones.

    Args: positioned: whether the client has asked for positions.
    """

    __slots__ = (
        "_began_at",
        "_behind",
        "_channel",
        "_history",
        "_hub",
        "_last",
        "_metrics",
        "_task",
        "place",
        "positioned",
    )

    def __init__(self, channel: ReplayOwner, history: History, hub: Hub, metrics: Metrics, positioned: bool) -> None:
        self._channel = channel
        self._history = history
        self._hub = hub
        self._metrics = metrics
        self.positioned: bool = positioned
        self.place: Place | None = None
        """How far it has caught up; None once the channel gets the live events."""
        self._task: asyncio.Task[None] | None = None
        # Where the join begins, and whether with the event there.
        self._began_at: tuple[Place, bool] | None = None
        # How many of the newest events the join asked for, until the first of them is sent.
        self._last = 0
        # From where on events were dropped once more, since the client did not take them.
        self._behind: tuple[Place, bool] | None = None

    def begin(self, recovery: Recovery) -> None:
        """Give a join what it is to be given; nothing where the channel stands there already."""
        if recovery.start is not None:
            self._began_at = recovery.start, recovery.is_included
            self._last = recovery.last
            self._start(recovery.start, recovery.is_included)

    def _start(self, place: Place, is_included: bool) -> None:
        """Begin behind a position, or at it. The channel is in the hub, and gets nothing from there until the end."""
        topic = self._channel.topic
        self._hub.hold(topic, self._channel.subscriber, is_lost=False)
        if not is_included and self._history.hand_over(topic, place) == ():
            self._enter()
        else:
            self.place = place
            self._task = self._history.spawn(self._run(place, is_included))

    def _enter(self) -> None:
        self._task = self.place = None
        self._hub.add(self._channel.topic, self._channel.subscriber, self.positioned)

    def fall_behind(self, position: str) -> None:
        """Begin at an event that the client did not take, and which was dropped with all behind it."""
        behind = Place.of(position), True
        if self._began_at is not None and behind[0] < _first_of(*self._began_at):
            behind = self._began_at  # what waited first was of the subscription before
        if self._task is None:
            self._metrics.history_catch_ups["slow reader"] += 1
            self._start(*behind)
        elif self._behind is None or behind[0] < self._behind[0]:
            self._behind = behind

    def stop(self) -> None:
        """End it: the subscription has ended."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._task = self.place = None

    async def _run(self, place: Place, is_included: bool) -> None:
        topic, transport, history = self._channel.topic, self._channel.transport, self._history
        if not is_included and history.is_ahead(topic, place):
            # What follows is on its way from the bus; the store may have trimmed it by the time that it is read.
            await history.reached(topic, place)
        attempts = 0
        while attempts < _ATTEMPTS:
            await asyncio.sleep(0)  # a client that reads fast may not keep others waiting
            await transport.drained()
            if transport.closed_with is not None:
                return
            if self._behind is not None:
                (place, is_included), self._behind = self._behind, None
            self.place = place
            recent = history.hand_over(topic, place, is_included)
            if recent is not None and self._end_of_portion(recent, 0) == len(recent):
                # Without waiting from here on: nothing may come in between.
                if self._send(recent, 0) == len(recent):
                    self._enter()
                    return
                assert self._behind is not None, "all of it may wait"
                continue
            if recent is not None:
                if await self._send_all(recent):
                    place, is_included = recent[-1].place, False
                continue
            try:
                page = await history.page(topic, place, is_included)
                if page is None and self._last:
                    recovery = await history.open_again(topic, self._last)
                    assert recovery.start is not None, "it could be read"
                    place, is_included, attempts = recovery.start, recovery.is_included, attempts + 1
                    continue
            except BusUnavailable:
                attempts += 1
                await asyncio.sleep(_AGAIN_S)
                continue
            if page is None:
                break
            if await self._send_all(page.entries):
                # A history that ends before what has been delivered here is read from a server that is behind.
                attempts = attempts + 1 if not page.entries else 0
                place, is_included, is_last = page.end, False, page.is_last
                del page  # it is with the transport: nothing is held twice while that is written
                if is_last and not await history.reached(topic, place):
                    break
                if attempts > 1:
                    await asyncio.sleep(_AGAIN_S)
        self._task = self.place = None
        self._channel.lose_events()

    def _end_of_portion(self, entries: Sequence[Entry], start: int) -> int:
        """Up to where events from a place on may wait for the client together; one always may."""
        room = self._history.replay_bytes - self._channel.transport.queued_bytes
        for at in range(start, len(entries)):
            frames = entries[at].frames(self._channel.subscriber.version, self.positioned)
            room -= sum(frame.size for _, frame in frames)
            if room < 0 and at > start:
                return at
        return len(entries)

    async def _send_all(self, entries: Sequence[Entry]) -> bool:
        """Send events as fast as the client takes them; False where it did not take all."""
        sent = self._send(entries, 0)
        while sent < len(entries) and self._behind is None:
            await self._channel.transport.drained()
            if self._channel.transport.closed_with is not None:
                return False
            sent = self._send(entries, sent)
        return self._behind is None

    def _send(self, entries: Sequence[Entry], start: int) -> int:
        """Send the first events from a place on, as many as may wait for the client. Returns the place of the next."""
        subscriber, end = self._channel.subscriber, self._end_of_portion(entries, start)
        portion = entries[start:end]
        write = subscriber.direct_write()
        if write is None:
            end = start + self._queue(portion)
        elif frames := [frame for entry in portion for _, frame in entry.frames(subscriber.version, self.positioned)]:
            # Nothing waits for this client: all of them in one write, as the hub does.
            write(join_frames(frames, subscriber.deflates))
        if end > start:
            self._last = 0
        self._metrics.history_replayed += sum(1 for entry in entries[start:end] if entry.event)
        return end

    def _queue(self, entries: Sequence[Entry]) -> int:
        """Have events wait for the client. Returns how many it has taken."""
        subscriber, topic = self._channel.subscriber, self._channel.topic
        policy = self._hub.policy(topic)
        if policy.overflow is Overflow.LATEST:  # they are all to come, and there is room
            policy = policy._replace(overflow=Overflow.DROP_OLDEST)
        for at, entry in enumerate(entries):
            for event, frame in entry.frames(subscriber.version, self.positioned):
                subscriber.send_event(frame, topic, event, policy)
                if self._behind is not None:
                    return at
        return len(entries)


def _first_of(place: Place, is_included: bool) -> Place:
    """The least position that what begins at one can have."""
    return place if is_included else Place(place.ms, place.n + 1)
