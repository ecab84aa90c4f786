"""`relay.channels.pubsub`: batches from the bus on their way to the hub, joined and paced."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.brokers.base import Broker, Event, Link, Sink
from relay.channels.hub import JOINED_MAX_BYTES, Hub
from relay.channels.pubsub import PubSub
from relay.config import Config, Direction, Policy
from relay.errors import BusUnavailable, Reason
from relay.metrics import Metrics
from relay.plugins import Plugin
from relay.plugins.hooks import Hooks
from relay.protocol.frame import Frame
from relay.protocol.payload import encode_payload
from relay.protocol.serializer import Version
from relay.protocol.state import Subscription
from tests.support.serving import eventually


class Bus(Broker):
    """A broker that only takes note of what is published."""

    needs_subscribe = False
    link = Link(True, "")

    def __init__(self) -> None:
        self.published: list[Event] = []
        self.is_down = False

    async def start(self, sink: Sink) -> None: ...
    async def stop(self) -> None: ...
    async def subscribe(self, topic: str) -> None: ...
    async def unsubscribe(self, topic: str) -> None: ...

    def publish_control(self, data: bytes) -> "asyncio.Future[None]":
        raise AssertionError("nobody orders")

    def publish(
        self, direction: Direction, topic: str, event: str, payload: bytes, sender: str | None = None
    ) -> asyncio.Future[None]:
        self.published.append(Event(topic, event, payload, None, sender))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.is_down:
            future.set_exception(BusUnavailable("down"))
        else:
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

    def __init__(self, hooks: Hooks | None = None, **settings: Any) -> None:
        self.now = 1000.0
        self.rests: list[float] = []
        self.metrics = Metrics()
        self.hub = Hub(self.metrics, lambda topic: Policy(), asyncio.get_running_loop().call_soon, lambda: self.now)
        self.bus = Bus()
        self.pubsub = PubSub(
            Config(**settings),
            self.bus,
            self.hub,
            self.metrics,
            hooks or Hooks(),
            clock=lambda: self.now,
            sleep=self._sleep,
        )

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
    await world.pubsub.receive_events([Event(topic, f"e{place}", b"{}") for place, topic in enumerate(topics)])
    assert reader.events() == [2, 1, 3]
    names = [f'"e{place}"'.encode() for place, topic in enumerate(topics) if topic != "unheard"]
    whole = b"".join(reader.writes)
    assert sorted(names, key=whole.index) == names
    assert (world.metrics.events_in, world.metrics.events_without_subscribers, world.metrics.deliveries) == (7, 1, 6)


async def test_joined_events_are_no_more_than_a_transport_takes() -> None:
    world = World()
    reader = world.reader("t")
    payload = b'"' + b"x" * (JOINED_MAX_BYTES // 3) + b'"'
    await world.pubsub.receive_events([Event("t", "e", payload)] * 5)
    assert reader.events() == [2, 2, 1]


async def test_one_larger_than_that_goes_alone() -> None:
    world = World()
    reader = world.reader("t")
    large = b'"' + b"x" * JOINED_MAX_BYTES + b'"'
    await world.pubsub.receive_events([Event("t", "e", b"{}"), Event("t", "e", large), Event("t", "e", b"{}")])
    assert reader.events() == [1, 1, 1]


async def test_event_that_skips_somebody_keeps_its_place() -> None:
    world = World()
    one, two = world.reader("t"), world.reader("t")
    await world.pubsub.broadcast("t", "b", encode_payload({}), skip=one)
    events = [Event("t", "a", b"{}"), *world.bus.published, Event("t", "c", b"{}")]
    await world.pubsub.receive_events(events)
    assert one.events() == [1, 1]
    assert two.events() == [1, 1, 1]
    assert [b'"a"' in data or b'"c"' in data for data in one.writes] == [True, True]
    assert not world.pubsub._skips


# Broadcasts from a subscriber.

EQUAL = Event("t", "b", b"{}")
"""What others publish, byte for byte what `broadcast_from` does."""


async def broadcast_from(world: World, skip: Reader) -> Event:
    """The event as it comes back from the bus."""
    await world.pubsub.broadcast("t", "b", encode_payload({}), skip=skip)
    return world.bus.published[-1]


def counts(*readers: Reader) -> list[int]:
    return [sum(reader.events()) for reader in readers]


async def test_equal_event_of_another_node_skips_nobody() -> None:
    """Before the broadcast's own, and after it."""
    world = World()
    one, two = world.reader("t"), world.reader("t")
    own = await broadcast_from(world, one)
    for event, heard in ((EQUAL, [1, 1]), (own, [1, 2]), (EQUAL, [2, 3])):
        await world.pubsub.receive_events([event])
        assert counts(one, two) == heard


async def test_senders_of_other_nodes_skip_nobody() -> None:
    here, there = World(), World()
    one, two = here.reader("t"), there.reader("t")
    own, other = await broadcast_from(here, one), await broadcast_from(there, two)
    await here.pubsub.receive_events([other])
    assert counts(one) == [1]
    await there.pubsub.receive_events([own])
    assert counts(two) == [1]


@given(st.data())
@settings(max_examples=60)
def test_each_interleaving_skips_exactly_the_own_events(data: st.DataObject) -> None:
    """Property: whoever broadcasts receives all events but its own, each in its place, however they come."""

    async def check() -> None:
        world = World()
        readers = [world.reader("t") for _ in range(3)]
        sources = data.draw(st.lists(st.sampled_from([None, 0, 1]), max_size=20), label="who publishes, in order")
        events = [EQUAL if source is None else await broadcast_from(world, readers[source]) for source in sources]
        expected = [0, 0, 0]
        while events:
            size = data.draw(st.integers(1, len(events)), label="read together")
            batch, events = events[:size], events[size:]
            await world.pubsub.receive_events(batch)
            for source in sources[:size]:
                for number in range(3):
                    expected[number] += number != source
            del sources[:size]
            assert counts(*readers) == expected
        assert not world.pubsub._skips

    asyncio.run(check())


async def test_gap_neither_forgets_whom_to_skip_nor_skips_for_others() -> None:
    """What was published before the gap may be delivered after it, or never."""
    world = World(topics=[{"match": "*", "on_gap": "ignore"}])
    one, two = world.reader("t"), world.reader("t")
    own = await broadcast_from(world, one)
    world.pubsub.on_gap("the bus was away")
    await world.pubsub.receive_events([EQUAL])
    assert counts(one, two) == [1, 1]
    await world.pubsub.receive_events([own])
    assert counts(one, two) == [1, 2]


async def test_failed_broadcast_skips_nobody() -> None:
    world = World()
    one, two = world.reader("t"), world.reader("t")
    world.bus.is_down = True
    with pytest.raises(BusUnavailable):
        await broadcast_from(world, one)
    await eventually(lambda: not world.pubsub._skips, "the failure to be noticed")
    await world.pubsub.receive_events([EQUAL, world.bus.published[-1]])  # the bus has taken it after all
    assert counts(one, two) == [2, 2]
    assert world.metrics.dropped == {Reason.BUS_UNAVAILABLE: 1}


async def test_skip_of_an_event_that_never_comes_back_is_forgotten() -> None:
    """After `redis.timeout_s`: neither it nor its socket stays in memory."""
    world = World(redis={"timeout_s": 0.05})
    one, two = world.reader("t"), world.reader("t")
    lost = [await broadcast_from(world, one) for _ in range(3)]
    assert len(world.pubsub._skips) == 3
    await eventually(lambda: not world.pubsub._skips, "the end of the time limit")
    await world.pubsub.receive_events([EQUAL, *lost])
    assert counts(one, two) == [4, 4]


async def test_skip_goes_through_handlers_of_events() -> None:
    plugin = Plugin("p")
    plugin.on_event("*")(lambda event: event)
    world = World(plugin.hooks.freeze())
    one, two = world.reader("t"), world.reader("t")
    own = await broadcast_from(world, one)
    await world.pubsub.receive_events([EQUAL, own, EQUAL])
    assert counts(one, two) == [2, 3]


async def test_long_fan_out_is_followed_by_a_rest_as_long() -> None:
    """What comes meanwhile is delivered together; 5 ms is the most that an event waits for it."""
    world = World()
    world.reader("t", cost_s=0.002)
    await world.pubsub.receive_events([Event("t", "e", b"{}")])
    assert world.rests == [pytest.approx(0.002)]
    world.reader("t", cost_s=0.02)
    await world.pubsub.receive_events([Event("t", "e", b"{}")])
    assert world.rests[1:] == [0.005]


async def test_short_fan_out_and_full_load_take_no_rest() -> None:
    """Under full load many events come at once, and are joined anyway."""
    world = World()
    world.reader("t", cost_s=0.0005)
    await world.pubsub.receive_events([Event("t", "e", b"{}")])
    world.reader("u", cost_s=0.02)
    await world.pubsub.receive_events([Event("u", "e", b"{}")] * 8)
    assert world.rests == []
