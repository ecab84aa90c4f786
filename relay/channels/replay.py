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
from relay.channels.history import History
from relay.channels.history_reader import Entry
from relay.channels.hub import Hub, Subscriber, join_frames
from relay.errors import BusUnavailable
from relay.metrics import Metrics
from relay.protocol.payload import Payload
from relay.transports.base import Transport

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
    except msgspec.MsgspecError:
        return None
    if found.since is msgspec.UNSET and found.last is msgspec.UNSET:
        return None
    return Asked(*(None if value is msgspec.UNSET else value for value in (found.since, found.last)))


class ReplayOwner(Protocol):
    """The channel, as what replays to it knows it."""

    topic: str

    @property
    def subscriber(self) -> Subscriber:
        """Its socket, as the hub knows it."""

    @property
    def transport(self) -> Transport:
        """Its socket's transport."""

    def lose_events(self) -> None:
        """End the subscription with ``phx_error``: events that it missed are lost."""


class Replay:
    """Gives a channel the events behind a position, then the live ones.

    Args: positioned: whether the client has asked for positions.
    """

    __slots__ = ("_behind", "_channel", "_history", "_hub", "_metrics", "_task", "place", "positioned")

    def __init__(self, channel: ReplayOwner, history: History, hub: Hub, metrics: Metrics, positioned: bool) -> None:
        self._channel = channel
        self._history = history
        self._hub = hub
        self._metrics = metrics
        self.positioned: bool = positioned
        self.place: Place | None = None
        """How far it has caught up; None once the channel gets the live events."""
        self._task: asyncio.Task[None] | None = None
        # From where on events were dropped once more, since the client did not take them.
        self._behind: Place | None = None

    def start(self, place: Place, is_included: bool = False) -> None:
        """Begin behind a position, or at it; nothing where the channel stands there already.

        The channel is in the hub. It gets nothing from there until it has caught up.
        """
        topic = self._channel.topic
        if is_included or self._history.hand_over(topic, place) != ():
            self._hub.hold(topic, self._channel.subscriber, is_lost=False)
            self.place = place
            self._task = self._history.spawn(self._run(place, is_included))

    def fall_behind(self, position: str) -> None:
        """Begin at an event that the client did not take, and which was dropped with all behind it."""
        place = Place.of(position)
        if self._task is None:
            self._metrics.history_catch_ups["slow reader"] += 1
            self.start(place, is_included=True)
        elif self._behind is None or place < self._behind:
            self._behind = place

    def stop(self) -> None:
        """End it: the subscription has ended."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._task = self.place = None

    async def _run(self, place: Place, is_included: bool) -> None:
        topic, transport, history = self._channel.topic, self._channel.transport, self._history
        attempts = 0
        while attempts < _ATTEMPTS:
            await transport.drained()
            if transport.closed_with is not None:
                return
            if self._behind is not None:
                place, is_included, self._behind = self._behind, True, None
            self.place = place
            if not is_included and (recent := history.hand_over(topic, place)) is not None:
                # Without waiting from here on: nothing may come in between.
                if self._send(recent):
                    self._task = self.place = None
                    self._hub.add(topic, self._channel.subscriber, self.positioned)
                    return
                continue
            try:
                page = await history.page(topic, place, is_included)
            except BusUnavailable:
                attempts += 1
                await asyncio.sleep(_AGAIN_S)
                continue
            if page is None:
                break
            if self._send(page.entries):
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

    def _send(self, entries: Sequence[Entry]) -> bool:
        """Send events; False where the client did not take all of them."""
        subscriber, topic, policy = self._channel.subscriber, self._channel.topic, self._hub.policy(self._channel.topic)
        write = subscriber.direct_write()
        if write is not None and self._behind is None:
            # Nothing waits for this client: all of them in one write, as the hub does.
            frames = [frame for entry in entries for _, frame in entry.frames(subscriber.version, self.positioned)]
            if frames:
                write(join_frames(frames, subscriber.deflates))
            self._metrics.history_replayed += len(entries)
            return True
        sent = 0
        for entry in entries:
            for event, frame in entry.frames(subscriber.version, self.positioned):
                subscriber.send_event(frame, topic, event, policy)
            if self._behind is not None:
                break
            sent += 1
        self._metrics.history_replayed += sent
        return self._behind is None
