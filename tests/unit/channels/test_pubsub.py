"""`relay.channels.pubsub`: batches from the bus on their way to the hub, joined and paced."""

import asyncio
from collections.abc import Callable

import pytest

from relay.brokers.base import Broker, Event, Link, Sink
from relay.channels.hub import JOINED_MAX_BYTES, Hub
from relay.channels.pubsub import PubSub
from relay.config import Config, Direction, Policy
from relay.errors import Reason
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.protocol.payload import encode_payload
from relay.protocol.serializer import Version
from relay.protocol.state import Subscription


class Bus(Broker):
    """A broker that only takes note of what is published."""

    needs_subscribe = False
    link = Link(True, "")

    def __init__(self) -> None:
        self.published: list[Event] = []

    async def start(self, sink: Sink) -> None: ...
    async def stop(self) -> None: ...
    async def subscribe(self, topic: str) -> None: ...
    async def unsubscribe(self, topic: str) -> None: ...

    def publish_control(self, data: bytes) -> "asyncio.Future[None]":
        raise AssertionError("nobody orders")

    def publish(self, direction: Direction, topic: str, event: str, payload: bytes) -> asyncio.Future[None]:
        self.published.append((topic, event, payload))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future


class Reader:
    """A subscriber whose transport takes every frame, ``cost_s`` for each write."""

    version = Version.V2
    deflates = False

    def __init__(self, world: "World", cost_s: float = 0.0) -> None:
        self._world = world
        self._cost_s = cost_s
        self.writes: list[bytes] = []

    def direct_write(self) -> Callable[[bytes], object]:
        return self._write

    def _write(self, data: bytes) -> None:
        self.writes.append(data)
        self._world.now += self._cost_s

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        self._write(frame.ws_frame)  # the hub sends so to each where somebody is left out

    def subscription(self, topic: str) -> Subscription | None:
        raise AssertionError("nobody asks")

    def end_subscription(self, subscription: Subscription, reason: Reason) -> bool:
        raise AssertionError("nobody fails")

    def events(self) -> list[int]:
        """How many events each write held."""
        return [data.count(b"[null,null,") for data in self.writes]


class World:
    """A node with its surroundings, and a clock that only writes and rests move."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.rests: list[float] = []
        self.metrics = Metrics()
        self.hub = Hub(self.metrics, lambda topic: Policy(), asyncio.get_running_loop().call_soon, lambda: self.now)
        self.bus = Bus()
        self.pubsub = PubSub(Config(), self.bus, self.hub, self.metrics, clock=lambda: self.now, sleep=self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds

    def reader(self, *topics: str, cost_s: float = 0.0) -> Reader:
        reader = Reader(self, cost_s)
        for topic in topics:
            self.hub.add(topic, reader)
        return reader


async def test_events_of_a_topic_that_follow_each_other_are_one_write() -> None:
    """In the order of the bus, which is also that of a socket with several topics."""
    world = World()
    reader = world.reader("t", "u")
    topics = ["t", "t", "u", "t", "unheard", "t", "t"]
    await world.pubsub.receive_events([(topic, f"e{place}", b"{}") for place, topic in enumerate(topics)])
    assert reader.events() == [2, 1, 3]
    names = [f'"e{place}"'.encode() for place, topic in enumerate(topics) if topic != "unheard"]
    whole = b"".join(reader.writes)
    assert sorted(names, key=whole.index) == names
    assert (world.metrics.events_in, world.metrics.events_unheard, world.metrics.deliveries) == (7, 1, 6)


async def test_joined_events_are_no_more_than_a_transport_takes() -> None:
    world = World()
    reader = world.reader("t")
    payload = b'"' + b"x" * (JOINED_MAX_BYTES // 3) + b'"'
    await world.pubsub.receive_events([("t", "e", payload)] * 5)
    assert reader.events() == [2, 2, 1]


async def test_one_larger_than_that_goes_alone() -> None:
    world = World()
    reader = world.reader("t")
    large = b'"' + b"x" * JOINED_MAX_BYTES + b'"'
    await world.pubsub.receive_events([("t", "e", b"{}"), ("t", "e", large), ("t", "e", b"{}")])
    assert reader.events() == [1, 1, 1]


async def test_event_that_skips_somebody_keeps_its_place() -> None:
    world = World()
    one, two = world.reader("t"), world.reader("t")
    await world.pubsub.broadcast("t", "b", encode_payload({}), skip=one)
    await world.pubsub.receive_events([("t", name, b"{}") for name in "abc"])
    assert one.events() == [1, 1]
    assert two.events() == [1, 1, 1]
    assert [b'"a"' in data or b'"c"' in data for data in one.writes] == [True, True]
    assert not world.pubsub._skips


async def test_long_fan_out_is_followed_by_a_rest_as_long() -> None:
    """What comes meanwhile is delivered together; 5 ms is the most that an event waits for it."""
    world = World()
    world.reader("t", cost_s=0.002)
    await world.pubsub.receive_events([("t", "e", b"{}")])
    assert world.rests == [pytest.approx(0.002)]
    world.reader("t", cost_s=0.02)
    await world.pubsub.receive_events([("t", "e", b"{}")])
    assert world.rests[1:] == [0.005]


async def test_short_fan_out_and_full_load_take_no_rest() -> None:
    """Under full load many events come at once, and are joined anyway."""
    world = World()
    world.reader("t", cost_s=0.0005)
    await world.pubsub.receive_events([("t", "e", b"{}")])
    world.reader("u", cost_s=0.02)
    await world.pubsub.receive_events([("u", "e", b"{}")] * 8)
    assert world.rests == []
