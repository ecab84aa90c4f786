"""Topic → subscribers, and the loop that hands each of them a frame.

Owns who is subscribed here; must not know brokers, transports or asyncio.

The loop is sliced: 10 000 sockets take some 90 ms, in which no heartbeat would be answered, so after
`SLICE_S` the rest is put off to the event loop's next turn. What comes later waits behind it, which keeps
the order of events for every socket.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from relay.errors import Reason
from relay.metrics import Metrics
from relay.outbox import Overflow
from relay.protocol import Subscription
from relay.wire import Frame, Payload, Version, encode_broadcast

SLICE_S = 0.002
"""Longest time one turn of the fan-out may take, in seconds."""

_CHECK_EVERY = 32
"""Subscribers written between two looks at the clock (about 0.3 ms)."""


class Subscriber(Protocol):
    """What the hub holds: one socket's outbox, under a topic."""

    version: Version

    def send_event(self, frame: Frame, topic: str, event: str, overflow: Overflow) -> None:
        """Write an event's frame, or queue it. Never blocks, never raises."""

    def subscription(self, topic: str) -> Subscription | None:
        """What this socket has joined under ``topic``."""

    def fail(self, subscription: Subscription, reason: Reason) -> bool:
        """End a subscription with ``phx_error``, so that the client rejoins; False where it has ended already."""


class Traffic(NamedTuple):
    """Events of a topic: since its first subscriber came, and per second of late."""

    events: int
    events_per_s: float


class _Topic:
    __slots__ = ("events", "mark", "overflow", "rate", "snapshot", "subscribers")

    def __init__(self, overflow: Overflow, now: float) -> None:
        self.overflow = overflow
        self.events = 0
        # Rate of the last full second with events, and when and at how many events the present one began.
        self.rate = 0.0
        self.mark = (now, 0)
        self.subscribers: dict[Subscriber, None] = {}
        # The subscribers as a tuple, made anew after each join or leave: what the loop walks.
        self.snapshot: tuple[Subscriber, ...] | None = None


class _Delivery:
    """One event on its way to the subscribers it found on its arrival; ``position`` says how far it came."""

    __slots__ = ("event", "frames", "payload", "position", "skip", "subscribers", "topic", "topic_name")

    def __init__(self, topic_name: str, topic: _Topic, event: str, payload: Payload, skip: Subscriber | None) -> None:
        self.skip = skip
        self.topic_name = topic_name
        self.topic = topic
        self.event = event
        self.payload = payload
        if topic.snapshot is None:
            topic.snapshot = tuple(topic.subscribers)
        self.subscribers = topic.snapshot
        self.position = 0
        # Encoded at most once per version, and only for versions somebody speaks.
        self.frames: dict[Version, Frame] = {}


class Hub:
    """Registry of subscribers by topic, and fan-out to them.

    Args: metrics: counts deliveries.
          overflow_of: the overflow policy of a topic, asked once when its first subscriber comes.
          call_soon: puts a callable off to the event loop's next turn.
          clock: monotonic seconds.
    """

    def __init__(
        self,
        metrics: Metrics,
        overflow_of: Callable[[str], Overflow],
        call_soon: Callable[[Callable[[], None]], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._metrics = metrics
        self._overflow_of = overflow_of
        self._call_soon = call_soon
        self._clock = clock
        self._topics: dict[str, _Topic] = {}
        self._deliveries: deque[_Delivery] = deque()
        self.on_idle: Callable[[], None] = lambda: None
        """Called when deliveries that had to wait are all done."""

    # Who is subscribed.

    def add(self, topic: str, subscriber: Subscriber) -> bool:
        """Subscribe; say whether it is the topic's first subscriber. Adding one twice changes nothing."""
        entry = self._topics.get(topic)
        first = entry is None
        if entry is None:
            entry = self._topics[topic] = _Topic(self._overflow_of(topic), self._clock())
        entry.subscribers[subscriber] = None
        entry.snapshot = None
        return first

    def remove(self, topic: str, subscriber: Subscriber) -> bool:
        """Unsubscribe; say whether it was the topic's last subscriber. Removing a stranger changes nothing."""
        entry = self._topics.get(topic)
        if entry is None or subscriber not in entry.subscribers:
            return False
        del entry.subscribers[subscriber]
        entry.snapshot = None
        if entry.subscribers:
            return False
        del self._topics[topic]
        return True

    def __contains__(self, topic: str) -> bool:
        return topic in self._topics

    def __len__(self) -> int:
        """Topics with at least one subscriber."""
        return len(self._topics)

    def count(self, topic: str) -> int:
        """Subscribers of one topic."""
        entry = self._topics.get(topic)
        return 0 if entry is None else len(entry.subscribers)

    def topics(self) -> dict[str, int]:
        """All topics joined here, with the number of their subscribers."""
        return {name: len(topic.subscribers) for name, topic in self._topics.items()}

    def pairs(self) -> "Iterator[tuple[str, Subscriber]]":
        """Each topic with each of its subscribers."""
        return ((name, subscriber) for name, topic in self._topics.items() for subscriber in topic.subscribers)

    def traffic(self, topic: str) -> Traffic | None:
        """How many events a topic has; None where nobody has joined it."""
        entry = self._topics.get(topic)
        if entry is None:
            return None
        since_s = self._clock() - entry.mark[0]
        recent = (entry.events - entry.mark[1]) / since_s if since_s > 0 else 0.0
        return Traffic(entry.events, entry.rate if since_s < 1 else recent)

    # Delivering.

    @property
    def busy(self) -> bool:
        """Whether deliveries are waiting for the event loop's next turn; a reader does well to wait for `on_idle`."""
        return bool(self._deliveries)

    def fan_out(self, topic: str, event: str, payload: Payload, skip: Subscriber | None = None) -> bool:
        """Deliver one event to all local subscribers of its topic, except ``skip``; False where there are none.

        Returns at once; under load the rest of the work is done in later turns, in order.
        """
        entry = self._topics.get(topic)
        if entry is None:
            return False
        delivery = _Delivery(topic, entry, event, payload, skip)
        now = self._clock()
        if now - entry.mark[0] >= 1:
            entry.rate = (entry.events - entry.mark[1]) / (now - entry.mark[0])
            entry.mark = (now, entry.events)
        entry.events += 1
        if self._deliveries:
            self._deliveries.append(delivery)
        elif not self._deliver(delivery, now + SLICE_S):
            self._deliveries.append(delivery)
            self._call_soon(self._go_on)
        return True

    def _go_on(self) -> None:
        deadline = self._clock() + SLICE_S
        while self._deliveries:
            if self._deliver(self._deliveries[0], deadline):
                self._deliveries.popleft()
            # Many deliveries to few subscribers each take as long as one to many.
            if self._deliveries and self._clock() >= deadline:
                self._call_soon(self._go_on)
                return
        self.on_idle()

    def _deliver(self, delivery: _Delivery, deadline: float) -> bool:
        """Write to subscribers from ``position`` on; False when the deadline came first."""
        topic, overflow = delivery.topic_name, delivery.topic.overflow
        event, frames, subscribers = delivery.event, delivery.frames, delivery.subscribers
        still_here, skip = delivery.topic.subscribers, delivery.skip
        count = len(subscribers)
        position = start = delivery.position
        delivered = 0
        while position < count:
            stop = min(position + _CHECK_EVERY, count)
            for subscriber in subscribers[position:stop]:
                # One that left while the delivery was put off has been told phx_close: nothing may follow it.
                if subscriber not in still_here or subscriber is skip:
                    continue
                version = subscriber.version
                frame = frames.get(version)
                if frame is None:
                    frame = frames[version] = encode_broadcast(version, topic, event, delivery.payload)
                subscriber.send_event(frame, topic, event, overflow)
                delivered += 1
            position = stop
            if position < count and self._clock() >= deadline:
                break
        self._metrics.deliveries += delivered
        delivery.position = position
        assert position > start or count == start, "a slice moves on, however late it is"
        return position >= count
