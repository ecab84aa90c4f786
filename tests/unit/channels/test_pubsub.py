"""`relay.channels.pubsub`: batches from the bus on their way to the hub, joined and paced."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.brokers.base import Broker, Event, HistoryStore, Link, Sink
from relay.brokers.memory_history import MemoryHistory
from relay.channels import pubsub as module
from relay.channels.batch_pause import BatchPause
from relay.channels.control import ControlMessage
from relay.channels.hub import JOINED_MAX_BYTES, Hub
from relay.channels.pubsub import PubSub
from relay.concurrency import KeyedQueue
from relay.config import Config
from relay.config_sections import Direction, Policy
from relay.errors import BusUnavailable, Reason, RelayError
from relay.metrics import Metrics
from relay.plugins import Plugin
from relay.plugins.dispatcher import HandlerRunner
from relay.plugins.hooks import Event as HookedEvent
from relay.plugins.hooks import Hooks, RedisMessage
from relay.plugins.hooks import Leave as HookedLeave
from relay.protocol.frame import Frame
from relay.protocol.payload import encode_payload
from relay.protocol.serializer import Version
from relay.protocol.state import Subscription
from relay.telemetry import Telemetry
from tests.support.asgi import until
from tests.support.serving import eventually


class Bus(Broker):
    """A broker that records what it is asked for.

    Args: needs_subscribe: whether topics have to be asked for.
    """

    link = Link(True, "")
    refusal = ""

    def __init__(self, needs_subscribe: bool = False) -> None:
        self.needs_subscribe = needs_subscribe
        self.fault: str | None = None
        """Why it takes no message."""
        self.held: list[asyncio.Future[None]] | None = None
        """Where this is a list, messages wait in it for the bus."""
        self.published: list[Event] = []
        self.directions: list[Direction] = []
        self.control_messages: list[bytes] = []
        self.calls: list[str] = []
        self.unheard: set[str] = set()
        """Topics that were subscribed to, and are not heard for now."""
        self.open = asyncio.Event()
        """Cleared, it keeps `subscribe` waiting."""
        self.kept: HistoryStore | None = None
        self.open.set()

    @property
    def history(self) -> HistoryStore | None:
        return self.kept

    async def start(self, sink: Sink) -> None:
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")

    async def subscribe(self, topic: str) -> None:
        await self.open.wait()
        if self.fault is not None:
            raise BusUnavailable(self.fault)
        self.calls.append(f"subscribe {topic}")

    async def unsubscribe(self, topic: str) -> None:
        self.calls.append(f"unsubscribe {topic}")

    def hears(self, topic: str) -> bool:
        return topic not in self.unheard

    def publish_control(self, data: bytes) -> "asyncio.Future[None]":
        self.control_messages.append(data)
        return self._answer()

    def publish(
        self, direction: Direction, topic: str, event: str, payload: bytes, sender: str | None = None
    ) -> asyncio.Future[None]:
        self.published.append(Event(topic, event, payload, None, sender))
        self.directions.append(direction)
        return self._answer()

    def _answer(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.held is not None:
            self.held.append(future)
        elif self.fault is None:
            future.set_result(None)
        else:
            future.set_exception(BusUnavailable(self.fault))
        return future


class Reader:
    """A subscriber whose transport takes every frame, ``cost_s`` for each write."""

    deflates = False

    def __init__(self, world: "World", cost_s: float = 0.0) -> None:
        self.version = Version.V2
        self._world = world
        self._cost_s = cost_s
        self.writes: list[bytes] = []
        self.subscriptions: dict[str, Subscription] = {}
        self.ended: list[tuple[str, Reason]] = []

    def direct_write(self) -> Callable[[bytes], object]:
        return self._write

    def _write(self, data: bytes) -> None:
        self.writes.append(data)
        self._world.now += self._cost_s

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        self._write(frame.ws_frame)  # the hub sends so to each where somebody is left out

    def subscription(self, topic: str) -> Subscription | None:
        return self.subscriptions.get(topic)

    def end_subscription(self, subscription: Subscription, reason: Reason) -> bool:
        if self.subscriptions.pop(subscription.topic, None) is None:
            return False
        self._world.hub.remove(subscription.topic, self)
        self.ended.append((subscription.topic, reason))
        return True

    def events(self) -> list[int]:
        """How many events each write held."""
        return [data.count(b"[null,null,") for data in self.writes]


class World:
    """A node with its surroundings, and a clock that only writes and rests move."""

    def __init__(self, plugin: Plugin | None = None, needs_subscribe: bool = False, **settings: Any) -> None:
        self.now = 1000.0
        self.rests: list[float] = []
        self.metrics = Metrics()
        self.hub = Hub(self.metrics, lambda topic: Policy(), asyncio.get_running_loop().call_soon, lambda: self.now)
        self.bus = Bus(needs_subscribe)
        config, telemetry = Config(**settings), Telemetry(self.metrics)
        hooks = Hooks() if plugin is None else plugin.hooks.freeze()
        runner = HandlerRunner(config.plugins.timeout_s, telemetry, hooks, "the relay")
        pause = BatchPause(lambda: self.now, self._sleep)
        self.pubsub = PubSub(config, self.bus, self.hub, runner, telemetry, pause)

    async def _sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds

    def reader(self, *topics: str, cost_s: float = 0.0) -> Reader:
        reader = Reader(self, cost_s)
        for topic in topics:
            reader.subscriptions[topic] = Subscription(topic, "1")
            self.hub.add(topic, reader)
        return reader

    async def receive(self, *payloads: bytes, topic: str = "t", event: str = "e") -> None:
        await self.pubsub.receive_events([Event(topic, event, payload) for payload in payloads])


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


async def test_position_of_an_event_reaches_those_that_are_given_it() -> None:
    world = World()
    reader, other = world.reader("t"), world.reader("t")
    reader.version = Version.SSE
    await world.pubsub.broadcast("t", "b", encode_payload({}), skip=other)
    skipping = world.bus.published[0]
    await world.pubsub.receive_events(
        [
            Event("t", "a", b"{}", "17-1"),
            Event("t", skipping.event, skipping.payload, "17-2", skipping.sender),
            Event("t", "c", b"{}"),
        ]
    )
    heads = [line for data in reader.writes for line in data.split(b"\n") if line.startswith((b"id:", b"event:"))]
    assert heads == [b"id: 17-1", b"event: a", b"id: 17-2", b"event: b", b"event: c"]
    assert all(b"17-" not in data for data in other.writes)


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
    world.bus.fault = "down"
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
    world = World(plugin)
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


# What is dropped, and how it is counted.


async def test_event_with_an_invalid_name_or_a_large_payload_is_dropped_and_counted() -> None:
    limits = {"payload_max_bytes": 10, "frame_max_bytes": 2000, "outbox_max_bytes": 2000}
    world = World(limits=limits)
    reader = world.reader("t")
    await world.receive(b"{}", event="phx_close")
    await world.receive(b"[1,2,3,4,5]")
    await world.receive(b"[1,2,3,45]")
    assert reader.events() == [1]
    assert world.metrics.dropped == {Reason.INVALID_EVENT: 1, Reason.PAYLOAD_TOO_LARGE: 1}


async def test_payload_that_only_looks_like_json_is_delivered_as_binary_and_counted() -> None:
    world = World()
    reader = world.reader("t")
    await world.receive(b'{"a":', b"\x00\x01")
    assert world.metrics.events_not_json == 1, "the second is binary in any case"
    joined = b"".join(reader.writes)
    assert joined[0] == 0x82
    assert b'{"a":' in joined
    assert joined.endswith(b"\x00\x01")


# Handlers of events.


def on_event(*functions: Callable[[HookedEvent], Any]) -> Plugin:
    plugin = Plugin("p")
    for function in functions:
        plugin.on_event("t")(function)
    return plugin


def renamed(event: HookedEvent) -> HookedEvent:
    return event.replace({"by": "plain"})


async def renamed_later(event: HookedEvent) -> HookedEvent:
    await asyncio.sleep(0)
    return event.replace({"by": "async", "had": event.payload})


def awaitable(event: HookedEvent) -> Awaitable[HookedEvent]:
    """What a decorator makes of a coroutine function."""
    return renamed_later(event)


def dropping(event: HookedEvent) -> None:
    return None


async def dropping_later(event: HookedEvent) -> None:
    await asyncio.sleep(0)


def raising(event: HookedEvent) -> HookedEvent:
    raise ValueError("broken")


async def raising_later(event: HookedEvent) -> HookedEvent:
    raise ValueError("broken")


def not_an_event(event: HookedEvent) -> Any:
    return {"not": "an event"}


def badly_named(event: HookedEvent) -> HookedEvent:
    return HookedEvent(event.topic, "phx_reply", event.data)


def reading(event: HookedEvent) -> HookedEvent:
    assert event.payload is not None
    return event


async def reading_later(event: HookedEvent) -> HookedEvent:
    return reading(event)


@pytest.mark.parametrize(
    ("functions", "wanted"),
    [
        ([renamed], b'{"by":"plain"}'),
        ([renamed_later], b'{"by":"async","had":{}}'),
        ([awaitable], b'{"by":"async","had":{}}'),
        ([renamed, awaitable], b'{"by":"async","had":{"by":"plain"}}'),
        ([renamed, renamed_later], b'{"by":"async","had":{"by":"plain"}}'),
        ([renamed_later, renamed], b'{"by":"plain"}'),
        ([renamed_later, awaitable], b'{"by":"async","had":{"by":"async","had":{}}}'),
    ],
)
async def test_each_handler_is_given_what_the_one_before_it_returned(functions: list[Any], wanted: bytes) -> None:
    world = World(on_event(*functions))
    reader = world.reader("t")
    await world.receive(b"{}")
    await until(lambda: reader.writes)
    assert wanted in reader.writes[0]
    assert not world.metrics.dropped
    await world.pubsub.stop()


@pytest.mark.parametrize("functions", [[renamed], [renamed_later], [awaitable, renamed]])
async def test_event_keeps_its_position_whatever_handlers_make_of_it(functions: list[Any]) -> None:
    world = World(on_event(*functions))
    reader = world.reader("t")
    reader.version = Version.SSE
    await world.pubsub.receive_events([Event("t", "e", b"{}", "17-1")])
    await until(lambda: reader.writes)
    assert b"id: 17-1\nevent: e\n" in reader.writes[0]
    assert b'"by"' in reader.writes[0]
    await world.pubsub.stop()


@pytest.mark.parametrize(
    ("functions", "errors"),
    [
        ([dropping], 0),
        ([dropping_later], 0),
        ([dropping, renamed], 0),
        ([dropping_later, renamed], 0),
        ([raising], 1),
        ([raising_later, renamed], 1),
        ([renamed_later, raising], 1),
        ([not_an_event], 1),
        ([badly_named], 1),
    ],
)
async def test_event_that_a_handler_drops_or_fails_on_is_counted(functions: list[Any], errors: int) -> None:
    world = World(on_event(*functions))
    reader = world.reader("t")
    await world.receive(b"{}")
    await until(lambda: world.metrics.dropped["by a plugin"] == 1)
    assert not reader.writes
    assert world.metrics.plugin_errors["p"] == errors
    await world.pubsub.stop()


@pytest.mark.parametrize("function", [reading, reading_later])
async def test_payload_that_no_handler_can_read_is_its_publishers_fault(function: Any) -> None:
    world = World(on_event(function))
    reader = world.reader("t")
    await world.receive(b"1" + b"0" * 5000)
    await until(lambda: world.metrics.dropped)
    assert world.metrics.dropped == {Reason.INVALID_PAYLOAD: 1}
    assert (world.metrics.plugin_errors["p"], reader.writes) == (0, [])
    await world.pubsub.stop()


async def test_events_of_a_topic_stay_in_order_behind_a_handler_that_waits() -> None:
    world = World(on_event(renamed_later))
    reader = world.reader("t", "u")
    await world.receive(b"1", b"2", b"3")
    await world.receive(b"9", topic="u")
    assert b"9" in reader.writes[0], "no other topic waits"
    await until(lambda: len(reader.writes) == 4)
    assert [data[data.index(b'"had":') + 6 :][:1] for data in reader.writes[1:]] == [b"1", b"2", b"3"]
    await world.pubsub.stop()


async def test_events_that_a_slow_handler_leaves_waiting_are_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_EVENTS_WAITING", 2)
    world = World(on_event(renamed_later))
    reader = world.reader("t")
    await world.receive(b"1", b"2", b"3", b"4", b"5")
    assert world.metrics.dropped == {"on_event handler too slow": 2}
    await until(lambda: len(reader.writes) == 3)
    await world.pubsub.stop()


# Raw Redis messages.


async def test_raw_messages_reach_the_handlers_of_their_pattern_in_order() -> None:
    plugin, seen = Plugin("p"), list[tuple[str, str, bytes, object]]()

    @plugin.on_redis("a.*")
    async def first(message: RedisMessage, relay: object) -> None:
        await asyncio.sleep(0)
        seen.append(("a", message.channel, message.data, relay))
        raise ValueError("does not matter to the next")

    @plugin.on_redis("b.*")
    async def second(message: RedisMessage, relay: object) -> None:
        seen.append(("b", message.channel, message.data, relay))

    world = World(plugin)
    for data in (b"1", b"2"):
        world.pubsub.receive_message("a.*", "a.x", data)
    await until(lambda: len(seen) == 2)
    assert seen == [("a", "a.x", b"1", "the relay"), ("a", "a.x", b"2", "the relay")]
    await until(lambda: world.metrics.plugin_errors["p"] == 2)
    await world.pubsub.stop()


async def test_raw_messages_for_a_slow_handler_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EVENTS_WAITING", 1)
    plugin, go, seen = Plugin("p"), asyncio.Event(), list[bytes]()

    @plugin.on_redis("a")
    async def slow(message: RedisMessage, relay: object) -> None:
        await go.wait()
        seen.append(message.data)

    world = World(plugin)
    for data in (b"1", b"2", b"3"):
        world.pubsub.receive_message("a", "a", data)
    go.set()
    await until(lambda: len(seen) == 2)
    assert seen == [b"1", b"2"]
    assert world.metrics.dropped == {"on_redis handler too slow": 1}
    await world.pubsub.stop()


async def test_leave_handlers_are_called_in_order_whatever_one_raises() -> None:
    plugin, seen = Plugin("p"), list[str]()

    @plugin.on_leave("t")
    async def first(leave: HookedLeave) -> None:
        seen.append("first")
        raise ValueError("broken")

    @plugin.on_leave("t")
    async def second(leave: HookedLeave) -> None:
        seen.append("second")

    world = World(plugin)
    socket: Any = type("Socket", (), {"id": "s1", "user": None, "address": None, "auth": None})()
    await world.pubsub.call_leave_handlers(HookedLeave(socket, "t", None))
    assert seen == ["first", "second"]


# Control messages.


async def test_control_message_of_another_node_is_handed_on() -> None:
    world, received = World(), list[ControlMessage]()
    world.pubsub.on_control = received.append
    message = ControlMessage("kick", "alice", "n1", "room:1")
    await world.pubsub.publish_control_message(message)
    world.pubsub.receive_control(world.bus.control_messages[0])
    assert received == [message]
    world.pubsub.receive_control(b"{}")
    assert received == [message]
    assert world.metrics.dropped == {"control message not understood": 1}


async def test_control_message_that_the_bus_does_not_take_is_counted() -> None:
    world = World()
    world.bus.fault = "away"
    with pytest.raises(BusUnavailable):
        await world.pubsub.publish_control_message(ControlMessage("disconnect", "alice", "n1"))
    await until(lambda: world.metrics.dropped)
    assert world.metrics.dropped == {"control message not sent": 1}


# Gaps.


async def test_gap_asks_subscribers_to_rejoin_at_a_pace_and_holds_events_back_meanwhile() -> None:
    world = World(rejoins_per_s=20)
    readers = [world.reader("t") for _ in range(3)]
    world.pubsub.on_gap("the bus was away")
    assert sum(len(reader.ended) for reader in readers) == 1
    await world.receive(b"{}")
    assert [reader.writes for reader in readers] == [[], [], []]
    await until(lambda: world.metrics.rejoins_requested == 3)
    assert [reader.ended for reader in readers] == [[("t", Reason.EVENTS_MISSED)]] * 3
    await world.pubsub.stop()


async def test_topic_that_ignores_gaps_goes_on() -> None:
    world = World(topics=[{"match": "t", "on_gap": "ignore"}])
    reader, other = world.reader("t"), world.reader("u")
    world.pubsub.on_gap("the bus was away")
    await world.receive(b"{}")
    assert (reader.ended, reader.events(), len(other.ended)) == ([], [1], 1)
    await world.pubsub.stop()


async def test_gap_of_some_topics_leaves_the_others_alone() -> None:
    world = World(topics=[{"match": "quiet", "on_gap": "ignore"}])
    missed, quiet, other = world.reader("t"), world.reader("quiet"), world.reader("u")
    world.pubsub.on_gap("the bus was away", ["t", "quiet", "left"])
    assert (len(missed.ended), quiet.ended, other.ended) == (1, [], [])
    assert world.pubsub.count_subscribers("u") == 1
    await world.pubsub.stop()


async def test_gaps_of_some_topics_after_each_other_share_one_pace() -> None:
    """Those whose turn is still to come get no events, and none is asked twice."""
    world = World(rejoins_per_s=20)
    first, second, third = world.reader("t"), world.reader("u"), world.reader("v")
    world.pubsub.on_gap("cut", ["t"])
    world.pubsub.on_gap("cut", ["u"])
    world.pubsub.on_gap("cut again", ["u", "v"])
    assert [len(reader.ended) for reader in (first, second, third)] == [1, 0, 0]
    for topic in ("u", "v"):
        await world.receive(b"{}", topic=topic)
    assert second.writes == third.writes == []
    await until(lambda: world.metrics.rejoins_requested == 3)
    assert [len(reader.ended) for reader in (first, second, third)] == [1, 1, 1]
    await world.pubsub.stop()


async def test_second_gap_starts_a_new_round_and_asks_each_once() -> None:
    world = World(rejoins_per_s=20)
    readers = [world.reader("t") for _ in range(3)]
    world.pubsub.on_gap("the bus was away")
    world.pubsub.on_gap("again")
    assert world.metrics.rejoins_requested == 2
    await until(lambda: world.metrics.rejoins_requested == 3)
    assert [len(reader.ended) for reader in readers] == [1, 1, 1]
    await world.pubsub.stop()


# Subscriptions.


async def hear(world: World, topic: str) -> Reader:
    """Join a topic, as a socket does."""
    async with world.pubsub.subscribe(topic):
        return world.reader(topic)


def leave(world: World, *readers: Reader) -> None:
    for reader in readers:
        if world.hub.remove("t", reader):
            world.pubsub.unsubscribe("t")


async def test_topic_that_is_heard_already_needs_no_subscribe_until_it_is_not_heard() -> None:
    world = World(needs_subscribe=True)
    async with world.pubsub.subscribe("t"):
        world.reader("t")
    assert not world.pubsub.must_subscribe("t")
    assert world.pubsub.must_subscribe("u")
    world.bus.unheard.add("t")
    assert world.pubsub.must_subscribe("t")
    world.bus.fault = "cut"
    with pytest.raises(BusUnavailable):
        async with world.pubsub.subscribe("t"):
            pass
    world.bus.fault = None
    async with world.pubsub.subscribe("t"):
        pass
    assert world.bus.calls == ["subscribe t", "subscribe t"], "it has a subscriber all the time"
    await world.pubsub.stop()


async def test_topic_is_subscribed_to_once_and_given_back_after_its_last_subscriber() -> None:
    world = World(needs_subscribe=True)
    assert world.pubsub.must_subscribe("t")
    one, two = await asyncio.gather(hear(world, "t"), hear(world, "t"))
    assert world.bus.calls == ["subscribe t"]
    leave(world, one)
    await until(lambda: not world.pubsub._tasks)
    assert world.bus.calls == ["subscribe t"]
    leave(world, two)
    await until(lambda: world.bus.calls == ["subscribe t", "unsubscribe t"])
    world.pubsub.unsubscribe("t")
    await hear(world, "t")
    assert world.bus.calls[2:] == ["subscribe t"]
    await world.pubsub.stop()


async def test_topic_that_is_joined_again_at_once_is_kept() -> None:
    world = World(needs_subscribe=True)
    leave(world, await hear(world, "t"))
    world.reader("t")
    await until(lambda: not world.pubsub._tasks)
    assert world.bus.calls == ["subscribe t"]


async def test_topic_without_a_subscriber_after_its_join_is_given_back() -> None:
    world = World(needs_subscribe=True)
    with pytest.raises(RuntimeError, match="refused"):
        async with world.pubsub.subscribe("t"):
            raise RuntimeError("refused")
    await until(lambda: world.bus.calls == ["subscribe t", "unsubscribe t"])


async def test_topic_is_not_given_back_while_another_join_of_it_is_under_way() -> None:
    world = World(needs_subscribe=True)
    one = await hear(world, "t")
    async with world.pubsub.subscribe("t"):
        leave(world, one)
        await until(lambda: not world.pubsub._tasks)  # as long as the join waits for its history, say
        world.reader("t")
    await until(lambda: not world.pubsub._tasks)
    assert world.bus.calls == ["subscribe t"]


async def test_subscription_that_is_cancelled_is_given_back() -> None:
    """The bus may have taken it all the same."""
    world = World(needs_subscribe=True)
    world.bus.open.clear()
    joining = asyncio.create_task(hear(world, "t"))
    await until(lambda: world.bus.open._waiters)
    joining.cancel()
    await asyncio.wait((joining,))
    world.bus.open.set()
    await until(lambda: world.bus.calls == ["unsubscribe t"])
    await hear(world, "t")
    assert world.bus.calls == ["unsubscribe t", "subscribe t"]
    await world.pubsub.stop()


async def test_join_behind_one_that_is_cancelled_subscribes_itself() -> None:
    world = World(needs_subscribe=True)
    world.bus.open.clear()
    joining = asyncio.create_task(hear(world, "t"))
    await until(lambda: world.bus.open._waiters)
    behind = asyncio.create_task(hear(world, "t"))
    await asyncio.sleep(0)
    joining.cancel()
    await asyncio.wait((joining,))
    world.bus.open.set()
    await behind
    await until(lambda: not world.pubsub._tasks)
    assert world.bus.calls == ["subscribe t"]
    await world.pubsub.stop()


async def test_topic_that_the_bus_does_not_take_is_asked_for_again() -> None:
    world = World(needs_subscribe=True)
    world.bus.fault = "away"
    with pytest.raises(BusUnavailable, match="away"):
        await hear(world, "t")
    world.bus.fault = None
    await hear(world, "t")
    assert world.bus.calls == ["subscribe t"]


async def test_bus_that_carries_every_topic_is_not_asked() -> None:
    world = World()
    leave(world, await hear(world, "t"))
    assert (world.bus.calls, world.pubsub.must_subscribe("t")) == ([], False)


# Histories.

HISTORY: dict[str, Any] = {"topics": [{"match": "*", "history": {"size": 10, "ttl_s": 60}}]}


class WithHistory(World):
    """A node whose topics have a history in memory, and a subscriber of ``t`` that is followed."""

    def __init__(self, plugin: Plugin | None = None) -> None:
        super().__init__(plugin, **HISTORY)
        self.store = MemoryHistory(lambda row: None)
        self.bus.kept = self.store
        self.subscriber = self.reader("t")
        history = self.pubsub.history
        assert history is not None
        self.history = history
        history.follow("t")

    def row(self, payload: bytes = b"{}", event: str = "e", topic: str = "t") -> Event:
        """The next event of a history, as it comes from the bus."""
        settings = self.history.settings(topic)
        assert settings is not None
        return self.store.append(topic, event, payload, settings)


async def test_event_with_a_position_is_delivered_once_and_in_its_place() -> None:
    world = WithHistory()
    one, two = world.row(), world.row()
    await world.pubsub.receive_events([one, two])
    await world.pubsub.receive_events([one])
    assert world.subscriber.events() == [2], "what was heard already comes no more"
    assert world.metrics.history_holes == 0
    await world.pubsub.stop()


async def test_event_of_a_topic_that_is_not_subscribed_to_leaves_nothing_behind() -> None:
    world = WithHistory()
    world.pubsub._skips["s"] = world.subscriber
    await world.pubsub.receive_events([Event("u", "e", b"{}", None, "s")])
    assert world.pubsub._skips == {} and world.metrics.events_without_subscribers == 1
    await world.pubsub.stop()


@pytest.mark.parametrize("drops", [True, False])
async def test_history_learns_what_handlers_leave_of_an_event(drops: bool) -> None:
    plugin = Plugin("p")

    @plugin.on_event("t")
    def change(event: HookedEvent) -> HookedEvent | None:
        return None if drops else event.replace(payload={"changed": True})

    world = WithHistory(plugin)
    row = world.row()
    await world.pubsub.receive_events([row])
    assert len(world.subscriber.writes) == (0 if drops else 1)
    assert world.metrics.dropped == ({"by a plugin": 1} if drops else {})
    await world.pubsub.receive_events([world.row()])
    assert world.metrics.history_holes == 0, "it has heard both"
    await world.pubsub.stop()


async def test_event_with_a_position_that_cannot_be_delivered_is_no_hole() -> None:
    world = WithHistory()
    await world.pubsub.receive_events([world.row(), world.row(event="a:b"), world.row()])
    assert world.metrics.dropped == {"invalid event": 1}
    assert (sum(world.subscriber.events()), world.metrics.history_holes) == (2, 0)
    await world.pubsub.stop()


async def test_row_of_a_history_goes_through_the_same_limits_and_handlers() -> None:
    plugin = Plugin("p")

    @plugin.on_event("t", "change")
    def change(event: HookedEvent) -> HookedEvent:
        return event.replace(payload={"n": event.payload["n"] + 1})

    @plugin.on_event("t", "later")
    async def later(event: HookedEvent) -> HookedEvent | None:
        return None

    @plugin.on_event("t", "elsewhere")
    def elsewhere(event: HookedEvent) -> HookedEvent:
        return HookedEvent("u", event.event, event.data)

    world = WithHistory(plugin)

    async def left_of(event: str, payload: bytes) -> tuple[str, bytes] | None:
        left = await world.pubsub.filter_row(Event("t", event, payload, "1-1"))
        return None if left is None else (left[0], bytes(left[1]))

    assert await left_of("plain", b"{}") == ("plain", b"{}")
    assert await left_of("change", b'{"n":1}') == ("change", b'{"n":2}')
    assert await left_of("later", b"{}") is None
    assert await left_of("elsewhere", b"{}") is None
    assert await left_of("change", b'{"n":' + b"9" * 5000 + b"}") is None, "a number that Python cannot read"
    assert await left_of("a:b", b"{}") is None
    assert world.metrics.dropped == {"invalid event": 1, "by a plugin": 1, "invalid payload": 1}
    await world.pubsub.stop()


async def test_row_of_a_history_stays_as_it_is_without_handlers() -> None:
    assert await World().pubsub.filter_row(Event("t", "e", b"1", "1-1")) == ("e", encode_payload(1))


async def test_rows_wait_for_handlers_that_are_busy_with_their_topic() -> None:
    plugin, go = Plugin("p"), asyncio.Event()

    @plugin.on_event("t")
    async def slow(event: HookedEvent) -> HookedEvent:
        await go.wait()
        return event

    world = WithHistory(plugin)
    world.pubsub.deliver_rows([world.row() for _ in range(1100)])
    room = asyncio.create_task(world.pubsub.room_for_rows("t"))
    await asyncio.sleep(0)
    assert not room.done()
    go.set()
    await room
    await until(lambda: sum(world.subscriber.events()) == 1100)
    await world.pubsub.stop()


async def test_subscribers_of_one_topic_are_asked_to_rejoin() -> None:
    world = WithHistory()
    other = world.reader("u")
    world.pubsub.request_rejoins_of("t")
    world.pubsub.request_rejoins_of("nobody's")
    await until(lambda: world.subscriber.ended)
    assert world.subscriber.ended == [("t", Reason.EVENTS_MISSED)] and other.ended == []
    await world.pubsub.stop()


async def test_after_a_gap_a_topic_whose_position_is_known_is_checked_and_not_rejoined() -> None:
    world = WithHistory()
    await world.pubsub.receive_events([world.row()])
    unknown = world.reader("u")
    world.pubsub.on_gap("cut")
    await until(lambda: unknown.ended)
    assert world.subscriber.ended == []
    world.pubsub.unsubscribe("t")
    assert not world.history.follows("t")
    await world.pubsub.stop()


async def test_joins_are_refused_while_the_link_is_down_and_pushes_while_the_bus_refuses_them() -> None:
    world = World()
    assert (world.pubsub.refuse_join(), world.pubsub.can_publish) == (None, True)
    world.bus.refusal = "read only"
    assert (world.pubsub.refuse_join(), world.pubsub.can_publish) == (None, False)
    world.bus.refusal, world.bus.link = "", Link(False, "away")
    assert (world.pubsub.refuse_join(), world.pubsub.can_publish) == (Reason.BUS_UNAVAILABLE, False)


# Publishing.


async def test_local_broadcast_does_not_use_the_bus() -> None:
    world = World()
    reader = world.reader("t")
    assert world.pubsub.local_broadcast("t", "e", encode_payload({}))
    assert not world.pubsub.local_broadcast("u", "e", encode_payload({}))
    assert (reader.events(), world.bus.published) == ([1], [])


async def test_push_goes_towards_the_backends_alone() -> None:
    world = World()
    await world.pubsub.publish_push("t", "e", encode_payload({"a": 1}), "alice", "s1")
    assert world.bus.published == [Event("t", "e", b'{"a":1}')]
    assert world.bus.directions == [Direction.FROM]


async def test_push_with_identity_is_done_when_the_bus_has_taken_both_messages() -> None:
    world = World(redis={"push_identity": True})
    world.bus.held = []
    push = world.pubsub.publish_push("t", "e", encode_payload({"a": 1}), "alice", "s1")
    assert world.bus.directions == [Direction.FROM, Direction.FROM_USER]
    assert world.bus.published[1] == Event("t", "e", b'{"user":"alice","socket":"s1","payload":{"a":1}}')
    world.bus.held[1].set_result(None)
    await asyncio.sleep(0)
    assert not push.done()
    world.bus.held[0].set_result(None)
    await push


@pytest.mark.parametrize("place", [0, 1])
async def test_push_with_identity_fails_where_the_bus_takes_one_message_alone(place: int) -> None:
    world = World(redis={"push_identity": True})
    world.bus.held = []
    push = world.pubsub.publish_push("t", "e", encode_payload({}), None, "s1")
    world.bus.held[place].set_exception(BusUnavailable("away"))
    world.bus.held[1 - place].set_result(None)
    with pytest.raises(BusUnavailable, match="away"):
        await push


async def test_push_whose_caller_waits_no_longer_is_let_go() -> None:
    world = World(redis={"push_identity": True})
    world.bus.held = []
    push = world.pubsub.publish_push("t", "e", encode_payload({}), None, "s1")
    push.cancel()
    for future in world.bus.held:
        future.set_result(None)
    await asyncio.sleep(0)
    assert push.cancelled()


# Its loop, and its end.


async def test_call_from_a_thread_runs_in_the_event_loop() -> None:
    world, threads = World(), list[int]()

    def note() -> None:
        threads.append(threading.get_ident())

    world.pubsub.call_in_loop(note)
    await asyncio.to_thread(world.pubsub.call_in_loop, note)
    await until(lambda: len(threads) == 2)
    assert threads == [threading.get_ident()] * 2


def test_call_into_a_loop_that_has_ended_says_so() -> None:
    async def make() -> World:
        return World()

    world = asyncio.run(make())
    with pytest.raises(RelayError, match="event loop that has ended"):
        world.pubsub.call_in_loop(lambda: None)


async def test_what_a_socket_leaves_behind_is_waited_for_up_to_the_deadline() -> None:
    world, go, done = World(), asyncio.Event(), list[str]()

    async def handler() -> None:
        await go.wait()
        done.append("handler")

    queue = KeyedQueue(world.pubsub.in_flight)
    assert world.pubsub.finish_in_background(queue) is None
    await world.pubsub.join_background(20)
    queue.run("t", handler)
    task = world.pubsub.finish_in_background(queue)
    assert task is not None
    await world.pubsub.join_background(0.001)
    assert not task.done()
    go.set()
    await world.pubsub.join_background(20)
    assert (task.done(), done) == (True, ["handler"])


async def test_stop_cancels_what_is_under_way_and_then_leaves_the_bus() -> None:
    world = World(needs_subscribe=True)
    await world.pubsub.start()
    await hear(world, "t")
    queue, ended = KeyedQueue(world.pubsub.in_flight), list[str]()

    async def handler() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("handler")
            ended.extend(call for call in world.bus.calls if call == "stop")

    queue.run("t", handler)
    await asyncio.sleep(0)
    assert world.pubsub.finish_in_background(queue) is not None
    await asyncio.sleep(0)
    await world.pubsub.stop()
    assert ended == ["handler"]
    assert world.bus.calls == ["start", "subscribe t", "stop"]
