"""`EventStream`: a topic's events for code in this process, as a loop receives them.

Owns what waits for one loop, and its way into the hub and out of it; must not know sockets. A stream is a subscriber of
the hub like any socket: policies for slow readers, gaps, histories and counters are the same. What a socket's client is
informed of by frames of its own stands between the events here, under names that no publisher can use:

    relay:dropped    {"dropped": 3}                           the loop was too slow for so many events
    relay:lost       {"reason": "…", "position": …}           events before it are missing and do not follow
    relay:recovered  {"position": …}                          what was missed since then follows, then the live events
"""

import asyncio
import math
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from relay.brokers.base import Place
from relay.channels.channel import Services
from relay.channels.groups import Subscriber
from relay.channels.history_reader import Recovery
from relay.channels.replay import Replay, ReplayReader
from relay.config_sections import Overflow, Policy
from relay.errors import BusUnavailable, CloseCode, Reason, RelayError, SlowReader
from relay.plugins.hooks import Event
from relay.protocol.frame import Frame, LocalFrame
from relay.protocol.payload import Payload, encode_payload
from relay.protocol.serializer import Version
from relay.protocol.state import DROPPED_EVENT, Subscription
from relay.protocol.topics import is_topic
from relay.threadsafe import ONE_LOOP
from relay.transports.outbox import Outbox, OutboxBudget

LOST_EVENT, RECOVERED_EVENT = "relay:lost", "relay:recovered"


class ReceivedEvent(Event):
    """An event of a topic, as a loop over `Relay.subscribe` receives it.

    ``payload`` is decoded when it is first asked for; ``data`` is what was published.
    """

    __slots__ = ("position",)

    def __init__(self, topic: str, event: str, data: Payload, position: str | None) -> None:
        super().__init__(topic, event, data)
        self.position: str | None = position
        """Its place in the topic's history; None if the topic has no history."""

    @property
    def is_notice(self) -> bool:
        """Whether it is no event of a publisher, but ``relay:dropped``, ``relay:lost`` or ``relay:recovered``."""
        return self.event in (DROPPED_EVENT, LOST_EVENT, RECOVERED_EVENT)


class EventStream:
    """The events of one topic: ``async with`` subscribes and unsubscribes, ``async for`` receives `ReceivedEvent`s."""

    version: Version = Version.LOCAL
    deflates: bool = False

    def __init__(
        self,
        streams: "EventStreams",
        topic: str,
        policy: Policy,
        max_events: int,
        start: tuple[str | None, int | None],
    ) -> None:
        # The arguments have been checked by `streams`; `start` is the position and the number of newest events.
        self.topic: str = topic
        self.position: str | None = None
        """Where to begin again: that of the last event received, or the ``since`` of a new loop; None for unknown."""
        self._streams = streams
        self._services = services = streams.services
        self._policy = policy
        self._max_events = max_events
        self._start = start
        self._outbox = Outbox(services.config.limits.outbox_max_bytes, streams.outboxes, self._evict, _dropped_notice)
        # More may wait while the history is read, as far as the bound in bytes allows, and until that is received.
        self._is_behind = False
        self._subscription: Subscription | None = None
        self._replay: Replay | None = None
        self._error: Exception | None = None
        self._has_ended = False
        # Whether the newest that waits says that events were lost: it need not say so twice.
        self._is_loss_newest = False
        self._arrived = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()

    # Its life.

    async def __aenter__(self) -> Self:
        """Subscribe. Raises BusUnavailable: nothing is heard now; RelayError: in another event loop than relay's."""
        pubsub, hub = self._services.pubsub, self._services.hub
        if not pubsub.home.is_here:
            raise RelayError(f"a loop in another event loop than the relay's would receive no event. {ONE_LOOP}")
        if self._subscription is not None or self._has_ended:
            raise RelayError("expected one `async with` for each call of relay.subscribe()")
        self._streams.check_open()
        if (reason := pubsub.refuse_join()) is not None:
            raise BusUnavailable(f"{reason}: no event can be received now")
        async with pubsub.subscribe(self.topic):
            recovery: Recovery | None = None
            since, last = self._start
            if pubsub.history is not None and (since is not None or last is not None):
                recovery = await pubsub.history.open(self.topic, since, last, lambda: not self._streams.is_closed)
            self._streams.check_open()
            # Without waiting from here on: no event may come in between.
            self._subscription = Subscription(self.topic, None)
            hub.add(self.topic, self)
            self._streams.members.add(self)
            if pubsub.history is not None:
                pubsub.history.follow(self.topic)
                if recovery is not None:
                    self._begin(recovery)
        return self

    def _begin(self, recovery: Recovery) -> None:
        self.position = recovery.position
        if recovery.is_recovered:
            self._notify(RECOVERED_EVENT, position=recovery.position)
        elif recovery.fault is not None:
            self._notify(LOST_EVENT, reason=str(recovery.fault), position=recovery.position)
        self._is_behind = True
        self._make_replay().begin(recovery)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        self._outbox.clear()

    def close(self, error: Exception | None = None) -> None:
        """Leave the topic: the loop receives what waits, then ``error``, or it ends."""
        if self._subscription is None:
            return
        self._subscription, self._has_ended, self._error = None, True, error
        if self._replay is not None:
            self._replay.stop()
            self._replay = None  # it refers to this stream
        self._services.hub.remove(self.topic, self)
        if self.topic not in self._services.hub:
            self._services.pubsub.unsubscribe(self.topic)
        self._arrived.set()
        self._drained.set()
        self._streams.members.discard(self)

    # For its loop.

    def __aiter__(self) -> AsyncIterator[ReceivedEvent]:
        return self

    async def __anext__(self) -> ReceivedEvent:
        """The next event; waits for it. Raises SlowReader: events were lost, and ``overflow`` is ``"disconnect"``."""
        while not self._outbox:
            if self._has_ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            if self._subscription is None:
                raise RelayError("expected `async with relay.subscribe(…) as events:` around the loop")
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._outbox.pop()
        self._is_loss_newest = self._is_loss_newest and bool(self._outbox)
        if not self._outbox:
            self._drained.set()
        assert isinstance(frame, LocalFrame), "the hub encodes for the version"
        if frame.position is not None:
            self.position = frame.position
        return ReceivedEvent(self.topic, frame.event, frame.payload, frame.position)

    @property
    def dropped(self) -> int:
        """Number of events that the loop was too slow for."""
        return self._outbox.dropped

    # For the hub.

    def direct_write(self) -> None:
        """Nothing that bytes could be written to."""

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        """Keep an event until the loop asks for it, or drop one as the policy says. Never blocks, never raises."""
        metrics, outbox = self._services.metrics, self._outbox
        if self._has_ended:
            metrics.dropped["socket closed"] += 1
            return
        if self._is_behind and self.closed_with is None:
            is_replaying = self._replay is not None and self._replay.place is not None
            self._is_behind = is_replaying or len(outbox) > self._max_events
        outbox.max_events = math.inf if self._is_behind else self._max_events
        policy = self._policy
        if self._is_behind and policy.overflow is Overflow.LATEST:  # what was missed is all to come
            policy = policy._replace(overflow=Overflow.DROP_OLDEST)
        dropped = outbox.add_event(frame, topic, event, policy)
        self._is_loss_newest = False
        if dropped is None and frame.position is not None and policy.overflow is Overflow.RECOVER:
            positions = filter(None, (outbox.drop_recoverable(topic), frame.position))
            self._is_behind = True
            self._make_replay().fall_behind(min(positions, key=Place.of))
        elif dropped is None:
            metrics.dropped["slow reader disconnected"] += 1
            metrics.dropped_topics[policy.match] += 1
            self.close(SlowReader(f"the loop over topic {topic!r} was too slow: more events wait than max_events"))
        elif dropped:
            metrics.dropped[f"slow reader, {policy.overflow}"] += dropped
            metrics.dropped_topics[policy.match] += dropped
        self._wake()

    def _wake(self) -> None:
        if self._outbox:
            self._drained.clear()
            self._arrived.set()
        else:  # what waited is to come from the history
            self._drained.set()

    def _notify(self, event: str, **fields: str | None) -> None:
        if not self._is_loss_newest:
            self._outbox.settle_dropped(self.topic, _dropped_notice)  # no later event takes a place before this one
            self._outbox.add_control(LocalFrame(event, encode_payload(fields)))
            self._is_loss_newest = event == LOST_EVENT
            self._wake()

    def _evict(self) -> None:
        """Empty the outbox and end: all outboxes together hold too much, and this one holds most."""
        metrics = self._services.metrics
        lost = self._outbox.clear()
        metrics.dropped["outboxes full"] += lost.total()
        metrics.dropped_topics += lost
        metrics.refused["outboxes full"] += 1
        self.close(SlowReader(f"the loop over topic {self.topic!r} was too slow: all slow readers hold too much"))

    def subscription(self, topic: str) -> Subscription | None:
        """What a gap has to be reported to."""
        return self._subscription

    def end_subscription(self, subscription: Subscription, reason: Reason) -> bool:
        """Report that events are missing, and go on: there is no client that could rejoin."""
        if self._subscription is not None:
            self.lose_events(reason)
        return False

    # For what replays the history to it.

    def _make_replay(self) -> Replay:
        history = self._services.pubsub.history
        assert history is not None, "events have positions where there is one"
        if self._replay is None:
            self._replay = Replay(self, history, self._services.hub, self._services.metrics, positioned=False)
        return self._replay

    @property
    def subscriber(self) -> Subscriber:
        """This, as the hub knows it."""
        return self

    @property
    def transport(self) -> ReplayReader:
        """This, as what replays to it knows it."""
        return self

    async def drained(self) -> None:
        """Return once nothing waits for the loop, or it has ended."""
        await self._drained.wait()

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the loop."""
        return self._outbox.waiting_bytes

    @property
    def closed_with(self) -> int | None:
        """The code of its end; None while it is subscribed."""
        return CloseCode.GOING_AWAY if self._has_ended else None

    def lose_events(self, reason: str = Reason.EVENTS_MISSED) -> None:
        """Report that events are missing, and go on with the live ones."""
        if self._replay is not None:
            self._replay.stop()
        self._services.hub.add(self.topic, self)
        self._notify(LOST_EVENT, reason=reason, position=None)


class EventStreams:
    """The streams of one node.

    Args: outboxes: what waits for their loops is counted in it.
    """

    def __init__(self, services: Services, outboxes: OutboxBudget) -> None:
        self.services: Services = services
        self.outboxes: OutboxBudget = outboxes
        self.members: set[EventStream] = set()
        """Those that are subscribed."""
        self.is_closed: bool = False

    def open(
        self, topic: str, max_events: int, overflow: str | None, since: str | None, last: int | None
    ) -> EventStream:
        """Make one, which ``async with`` subscribes; see `relay.Relay.subscribe`. Raises ValueError."""
        settings = self.services.config.topic(topic)
        if not is_topic(topic):
            raise ValueError(f"topic: expected 1 to 255 bytes without control characters, got {topic!r}")
        if max_events < 1:
            raise ValueError(f"max_events: expected 1 or more, got {max_events}")
        if overflow is not None and overflow not in list(Overflow):
            raise ValueError(f"overflow: expected {', '.join(Overflow)}, got {overflow!r}")
        policy = settings.policy if overflow is None else settings.policy._replace(overflow=Overflow(overflow))
        if settings.history is None and (since is not None or last is not None or policy.overflow is Overflow.RECOVER):
            raise ValueError(f"topic {topic!r} has no history; set history for it in [[topics]]")
        if last is not None and last < 1:
            raise ValueError(f"last: expected 1 or more, got {last}")
        return EventStream(self, topic, policy._replace(notify_dropped=True), max_events, (since, last))

    def check_open(self) -> None:
        """Raise RelayError where the relay is stopping: a loop that began now would never end."""
        if self.is_closed:
            raise RelayError("the relay is stopping: no topic can be subscribed to")

    def close(self) -> None:
        """End all loops, after what waits for them: the relay stops."""
        self.is_closed = True
        for stream in tuple(self.members):
            stream.close()


def _dropped_notice(topic: str, count: int) -> Frame:
    return LocalFrame(DROPPED_EVENT, encode_payload({"dropped": count}))
