"""Topic → subscribers, and the loop that hands each of them a frame.

Owns who is subscribed here; must not know brokers, nor asyncio, nor how a transport writes.

A topic keeps the ready sockets' ``write`` methods side by side, so that delivering is one loop over a tuple of C
functions: whatever else is visited between two system calls has left the processor's caches by then. Where they are of
plain sockets, that loop is in C (`relay.transports.plain_sockets`).

The loop is sliced: 10 000 sockets take some 90 ms, in which no heartbeat would be answered, so after
`SLICE_S` the rest is put off to the event loop's next turn. What comes later waits behind it, which keeps
the order of events for every socket.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from relay.channels.groups import Group, Subscriber, make_groups
from relay.config_sections import Policy
from relay.errors import Reason
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.protocol.payload import Payload
from relay.protocol.serializer import Version, encode_broadcast, encode_positioned
from relay.transports.plain_sockets import BATCH

SLICE_S = 0.002
"""Longest time one turn of the fan-out may take, in seconds."""

_CHECK_EVERY = BATCH
"""Subscribers written between two looks at the clock (about 0.3 ms)."""

JOINED_MAX_BYTES = 32_768
"""Most bytes of events that are to go to a socket in one write; half of what a transport buffers."""

Outgoing: TypeAlias = tuple[str, Payload, str | None]
"""An event's name, its payload, and its position in the topic's history, where it has one."""


class Traffic(NamedTuple):
    """Events of a topic: since its first subscriber came, and per second of late."""

    events: int
    events_per_s: float


class _Topic:
    __slots__ = (
        "entered",
        "events",
        "groups",
        "held",
        "label",
        "mark",
        "policy",
        "positioned",
        "rate",
        "subscribers",
    )

    def __init__(self, policy: Policy, label: str, now: float) -> None:
        self.policy = policy
        # What its events are counted under besides; empty for most topics.
        self.label = label
        self.events = 0
        # Rate of the last full second with events, and when and at how many events the present one began.
        self.rate = 0.0
        self.mark = (now, 0)
        # Each with `events` as it was when it came: what it was sent is known at its end, and costs nothing until then.
        self.subscribers: dict[Subscriber, int] = {}
        # The subscribers as the loop walks them; built again after a join, a leave, or a change of readiness.
        self.groups: tuple[Group, ...] | None = None
        # Those of them that get no events for now, each with `events` as it was then; negative where they miss none.
        self.held: dict[Subscriber, int] | None = None
        # Those that have asked for positions.
        self.positioned: set[Subscriber] | None = None
        # Those that were held and are not any more, each with `events` as it was at that moment: what is still on its
        # way from before has reached them already.
        self.entered: dict[Subscriber, int] | None = None

    def sort(self, speedups: bool) -> tuple[Group, ...]:
        """The subscribers that get events now, in groups."""
        if self.groups is None:
            held = self.held or {}
            present = (each for each in self.subscribers if each not in held)
            self.groups = make_groups(present, self.positioned or (), speedups)
        return self.groups

    def sort_recovering(self, speedups: bool) -> tuple[Group, ...]:
        """Those that are given events from the topic's history for now, in groups."""
        recovering = (each for each, since in (self.held or {}).items() if since < 0)
        return make_groups(recovering, self.positioned or (), speedups)


class _Delivery:
    """Events of one topic on their way to subscribers: in groups, as they were on the events' arrival."""

    __slots__ = ("came_at", "events", "frames", "group", "groups", "number", "position", "skip", "topic", "topic_name")

    def __init__(
        self,
        topic_name: str,
        topic: _Topic,
        groups: tuple[Group, ...],
        events: Sequence[Outgoing],
        skip: Subscriber | None,
        now: float,
    ) -> None:
        self.skip = skip
        # How many events its topic had before.
        self.number = topic.events - len(events)
        self.came_at = now
        self.topic_name = topic_name
        self.topic = topic
        self.events = events
        # How far they came: all groups before `group`, and of that one the members before `position`.
        self.groups = groups
        self.group = 0
        self.position = 0
        # Encoded at most once per version, with positions and without, and only where a subscriber takes it so.
        self.frames: dict[tuple[Version, bool], tuple[list[Frame], list[str]]] = {}

    def encoded(self, group: Group) -> tuple[list[Frame], list[str]]:
        """The frames of the events as a group takes them, and the name of each one's event."""
        key = (group.version, group.positioned)
        frames = self.frames.get(key)
        if frames is None:
            if group.positioned:
                named = _encode_positioned(group.version, self.topic_name, self.events)
                frames = [frame for _, frame in named], [event for event, _ in named]
            else:
                frames = _encode(group.version, self.topic_name, self.events), [event for event, _, _ in self.events]
            self.frames[key] = frames
        return frames


def _encode(version: Version, topic: str, events: Sequence[Outgoing]) -> list[Frame]:
    return [encode_broadcast(version, topic, event, payload, position) for event, payload, position in events]


def _encode_positioned(version: Version, topic: str, events: Sequence[Outgoing]) -> list[tuple[str, Frame]]:
    return [named for event in events for named in encode_positioned(version, topic, *event)]


def join_frames(frames: Sequence[Frame], deflates: bool) -> bytes:
    """All frames joined together, as sockets that deflate take them, or as others do."""
    if len(frames) == 1:
        return frames[0].ws_frame_compressed if deflates else frames[0].ws_frame
    return b"".join([frame.ws_frame_compressed if deflates else frame.ws_frame for frame in frames])


class Hub:
    """Registry of subscribers by topic, and fan-out to them.

    Args: metrics: counts deliveries.
          policy_of: the policy of a topic for slow readers, asked once when its first subscriber comes.
          call_soon: puts a callable off to the event loop's next turn.
          clock: monotonic seconds.
          label_of: what a topic's events are counted under besides, asked once when its first subscriber comes;
              empty for nothing.
          speedups: whether plain sockets are written to in C, where that was built.
    """

    def __init__(
        self,
        metrics: Metrics,
        policy_of: Callable[[str], Policy],
        call_soon: Callable[[Callable[[], None]], object],
        clock: Callable[[], float] = time.perf_counter,
        label_of: Callable[[str], str] = lambda topic: "",
        speedups: bool = True,
    ) -> None:
        self._metrics = metrics
        self._policy_of = policy_of
        self._label_of = label_of
        self._speedups = speedups
        self._call_soon = call_soon
        self._clock = clock
        self._topics: dict[str, _Topic] = {}
        # Subscribers that only look on, each with its topic.
        self._observers: dict[Subscriber, str] = {}
        self._deliveries: deque[_Delivery] = deque()
        self._watchers: dict[str, Callable[[], None]] = {}
        self.on_idle: Callable[[], None] = lambda: None
        """Called when deliveries that had to wait are all done."""

    # Who is subscribed.

    def add(self, topic: str, subscriber: Subscriber, positioned: bool = False) -> bool:
        """Subscribe; say whether it is the topic's first subscriber. Adding one twice changes nothing.

        Args: positioned: whether it has asked for positions.
        """
        entry = self._topics.get(topic)
        first = entry is None
        if entry is None:
            entry = self._topics[topic] = _Topic(self._policy_of(topic), self._label_of(topic), self._clock())
        _ = entry.subscribers.setdefault(subscriber, entry.events)
        self._release(entry, subscriber)
        if self._watchers and (watcher := self._watchers.get(topic)) is not None:
            watcher()
        if positioned:
            entry.positioned = entry.positioned or set()
            entry.positioned.add(subscriber)
        elif entry.positioned is not None:  # a rejoin that does not ask for them any more
            entry.positioned.discard(subscriber)
        entry.groups = None
        return first

    def hold(self, topic: str, subscriber: Subscriber, *, is_lost: bool = True) -> None:
        """Deliver nothing to a subscriber until it is removed, or added again.

        Args: is_lost: whether it misses what comes meanwhile, which is then counted as dropped at the end, so that
                       deliveries cost what they did; False where it gets from the topic's history what is there.
        """
        entry = self._topics.get(topic)
        if entry is not None and subscriber in entry.subscribers:
            entry.held = entry.held or {}
            if is_lost and entry.held.get(subscriber, 0) < 0:
                del entry.held[subscriber]
            _ = entry.held.setdefault(subscriber, entry.events if is_lost else -1)
            entry.groups = None

    def is_held(self, topic: str, subscriber: Subscriber) -> bool:
        """Whether a subscriber misses what comes."""
        held = self._topics[topic].held if topic in self._topics else None
        return held is not None and held.get(subscriber, -1) >= 0

    def _release(self, entry: _Topic, subscriber: Subscriber) -> None:
        if entry.held is not None and (since := entry.held.pop(subscriber, None)) is not None:
            if since < 0:
                if self._deliveries:
                    entry.entered = entry.entered or {}
                    entry.entered[subscriber] = entry.events
            elif entry.events > since:
                self._metrics.dropped[Reason.EVENTS_MISSED] += entry.events - since
            if not entry.held:
                entry.held = None

    def add_observer(self, topic: str, subscriber: Subscriber) -> None:
        """Subscribe an observer, which does not count as joined: a topic with observers alone is in no list."""
        _ = self.add(topic, subscriber)
        self._observers[subscriber] = topic

    def watch(self, topic: str, watcher: Callable[[], None] | None) -> None:
        """Have ``watcher``, one for a topic, called when a subscriber comes; None for nothing any more."""
        _ = self._watchers.pop(topic, None)
        if watcher is not None:
            self._watchers[topic] = watcher

    def remove(self, topic: str, subscriber: Subscriber) -> bool:
        """Unsubscribe; say whether it was the topic's last subscriber. Removing a stranger changes nothing."""
        entry = self._topics.get(topic)
        if entry is None or subscriber not in entry.subscribers:
            return False
        self._release(entry, subscriber)
        del entry.subscribers[subscriber]
        if entry.positioned is not None:
            entry.positioned.discard(subscriber)
        if entry.entered is not None:
            _ = entry.entered.pop(subscriber, None)
        _ = self._observers.pop(subscriber, None)
        entry.groups = None
        if entry.subscribers:
            return False
        del self._topics[topic]
        return True

    def refresh(self, topics: Iterable[str]) -> None:
        """Learn that a subscriber of these topics has become ready for direct writes, or is no longer so."""
        for topic in topics:
            entry = self._topics.get(topic)
            if entry is not None:
                entry.groups = None

    def __contains__(self, topic: str) -> bool:
        return topic in self._topics

    def __len__(self) -> int:
        """Topics that are joined."""
        observers = Counter(self._observers.values())
        return len(self._topics) - sum(self.count(topic) == count for topic, count in observers.items())

    def count(self, topic: str) -> int:
        """Subscribers of one topic, observers included: whether sending has an effect."""
        entry = self._topics.get(topic)
        return 0 if entry is None else len(entry.subscribers)

    def events_for(self, topic: str, subscriber: Subscriber) -> int:
        """Events that were meant for a subscriber since it came, dropped ones included; 0 for a stranger."""
        entry = self._topics.get(topic)
        return 0 if entry is None else entry.events - entry.subscribers.get(subscriber, entry.events)

    def topics(self) -> dict[str, int]:
        """All topics joined here, with how many have joined them."""
        observers = Counter(self._observers.values())
        counts = ((name, len(topic.subscribers) - observers.get(name, 0)) for name, topic in self._topics.items())
        return {name: count for name, count in counts if count}

    def pairs(self, topics: Iterable[str] | None = None) -> "Iterator[tuple[str, Subscriber]]":
        """Each topic, or each of some, with each of its subscribers."""
        entries = self._topics.items() if topics is None else ((name, self._topics.get(name)) for name in topics)
        return ((name, each) for name, entry in entries if entry is not None for each in entry.subscribers)

    def stats(self, topic: str) -> Traffic | None:
        """How many events a topic has; None where no socket has joined it."""
        entry = self._topics.get(topic)
        if entry is None:
            return None
        since_s = self._clock() - entry.mark[0]
        recent = (entry.events - entry.mark[1]) / since_s if since_s > 0 else 0.0
        return Traffic(entry.events, entry.rate if since_s < 1 else recent)

    # Delivering.

    def policy(self, topic: str) -> Policy:
        """The policy of a topic for slow readers."""
        entry = self._topics.get(topic)
        return self._policy_of(topic) if entry is None else entry.policy

    @property
    def busy(self) -> bool:
        """Whether deliveries are waiting for the event loop's next turn; a reader does well to wait for `on_idle`."""
        return bool(self._deliveries)

    def fan_out(
        self, topic: str, event: str, payload: Payload, skip: Subscriber | None = None, position: str | None = None
    ) -> bool:
        """Deliver one event to all local subscribers of its topic, except ``skip``; False where there are none.

        Returns at once; under load the rest of the work is done in later turns, in order.
        """
        return self.fan_out_all(topic, [(event, payload, position)], skip)

    def fan_out_all(self, topic: str, events: Sequence[Outgoing], skip: Subscriber | None = None) -> bool:
        """Deliver events of one topic that have come together: one write for each socket, where it is ready."""
        entry = self._topics.get(topic)
        if entry is None:
            return False
        now = self._clock()
        if now - entry.mark[0] >= 1:
            entry.rate = (entry.events - entry.mark[1]) / (now - entry.mark[0])
            entry.mark = (now, entry.events)
        entry.events += len(events)
        if entry.label:
            self._metrics.topic_events[entry.label] += len(events)
        groups = entry.sort(self._speedups)
        is_alone = skip is None and entry.held is None and not self._deliveries
        if is_alone and len(groups) == 1 and len(groups[0].members) <= _CHECK_EVERY:
            # Most topics have few subscribers, all alike: no need to remember how far this came.
            _, writes, version, deflates, positioned, sockets = groups[0]
            if writes is not None:
                if positioned:
                    frames = [frame for _, frame in _encode_positioned(version, topic, events)]
                else:
                    frames = _encode(version, topic, events)
                data = join_frames(frames, deflates)
                if sockets is not None:
                    sockets.write(data, 0, len(writes))
                else:
                    for write in writes:
                        write(data)
                self._count(entry, frames, len(writes))
                self._metrics.fan_out.observe(self._clock() - now, len(events))
                return True
        if skip is not None and skip in entry.subscribers:
            entry.subscribers[skip] += len(events)
        self._begin(_Delivery(topic, entry, groups, events, skip, now))
        if entry.held is not None:
            unrecorded = [outgoing for outgoing in events if outgoing[2] is None]
            if unrecorded and (recovering := entry.sort_recovering(self._speedups)):
                self._begin(_Delivery(topic, entry, recovering, unrecorded, skip, now))
        return True

    def _begin(self, delivery: _Delivery) -> None:
        if self._deliveries:
            self._deliveries.append(delivery)
        elif not self._deliver(delivery, delivery.came_at + SLICE_S):
            self._deliveries.append(delivery)
            self._call_soon(self._go_on)

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
        """Write to subscribers from where the delivery stands; False when the deadline came first."""
        while delivery.group < len(delivery.groups):
            group = delivery.groups[delivery.group]
            # What has changed since the groups were made may have changed for any member. Within one turn nothing
            # does, but for a socket that a write has filled: it is not met again.
            if group.writes is not None and delivery.skip is None and delivery.topic.groups is delivery.groups:
                done = self._write(delivery, group.writes, group, deadline)
            else:
                done = self._send(delivery, group, deadline)
            if not done:
                return False
            delivery.group += 1
            delivery.position = 0
        self._metrics.fan_out.observe(self._clock() - delivery.came_at, len(delivery.events))
        return True

    def _is_recovering(self, entry: _Topic, subscriber: Subscriber) -> bool:
        """Whether a subscriber gets what comes from the topic's history."""
        return entry.held is not None and entry.held.get(subscriber, 0) < 0

    def _count(self, entry: _Topic, frames: Sequence[Frame], sockets: int) -> None:
        """Count frames that were delivered to so many sockets each."""
        metrics = self._metrics
        metrics.deliveries += sockets * len(frames)
        metrics.delivered_bytes += sockets * (frames[0].size if len(frames) == 1 else sum(f.size for f in frames))
        if entry.label:
            metrics.topic_deliveries[entry.label] += sockets * len(frames)

    def _write(
        self, delivery: _Delivery, writes: tuple[Callable[[bytes], object], ...], group: Group, deadline: float
    ) -> bool:
        """Write to the sockets that are ready; the loop that all is about."""
        frames, _ = delivery.encoded(group)
        data = join_frames(frames, group.deflates)
        count, start = len(writes), delivery.position
        position = start
        while position < count:
            end = min(position + _CHECK_EVERY, count)
            if group.sockets is not None:
                group.sockets.write(data, position, end)
            else:
                for write in writes[position:end]:
                    write(data)
            position = end
            if position < count and self._clock() >= deadline:
                break
        self._count(delivery.topic, frames, position - start)
        delivery.position = position
        return position == count

    def _send(self, delivery: _Delivery, group: Group, deadline: float) -> bool:
        """Send to each socket separately, as it is now; the events of each one after the other."""
        topic, policy, skip = delivery.topic_name, delivery.topic.policy, delivery.skip
        members, still_here = group.members, delivery.topic.subscribers
        frames, events = delivery.encoded(group)
        entered = delivery.topic.entered
        count, position, delivered = len(members), delivery.position, 0
        while position < count:
            for subscriber in members[position : position + _CHECK_EVERY]:
                # One that left while the delivery was put off has been sent phx_close: nothing may follow it.
                if subscriber not in still_here or subscriber is skip:
                    continue
                is_past = entered is not None and entered.get(subscriber, 0) > delivery.number
                for event, frame in zip(events, frames, strict=True):
                    # What has a position reaches those that are given the history from there, and none of them twice.
                    if frame.position is None or not (is_past or self._is_recovering(delivery.topic, subscriber)):
                        subscriber.send_event(frame, topic, event, policy)
                delivered += 1
            position = min(position + _CHECK_EVERY, count)
            if position < count and self._clock() >= deadline:
                break
        self._count(delivery.topic, frames, delivered)
        delivery.position = position
        return position == count
