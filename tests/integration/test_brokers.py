"""One suite over all brokers: what `relay.brokers.base` guarantees, on real servers and on a fake that can fail.

A bus that cannot be cut from outside (``memory://``) is left out where it has to be.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

import pytest
from broadcaster import BroadcastBackend
from broadcaster import Event as Published
from redis.asyncio import Redis

from relay.brokers.base import Broker, Event
from relay.brokers.broadcaster import BroadcasterBroker
from relay.brokers.envelope import pack
from relay.brokers.redis import RedisBroker
from relay.config import Config
from relay.config_sections import Direction
from relay.errors import BusUnavailable
from relay.metrics import Metrics
from tests.support.panic import Panic
from tests.support.patience import PATIENCE
from tests.support.process import Postgres, Valkey, redis_servers, redis_version
from tests.support.serving import eventually
from tests.support.sink import Sink

FAST = {"backoff_min_s": 0.02, "backoff_max_s": 0.1, "ping_interval_s": 0.2, "ping_timeout_s": 3}
"""Settings of a link that is cut on purpose."""


class Bus(Protocol):
    """A bus for the suite."""

    shared: bool
    """Whether two brokers hear each other."""

    def broker(self, metrics: Metrics, **settings: Any) -> Broker:
        """A broker on this bus, not started; settings of the ``redis`` table."""

    async def cut(self) -> None:
        """Take the bus away from all its brokers."""

    async def heal(self) -> None:
        """Bring it back."""


class RedisBus:
    shared = True

    def __init__(self, server: Valkey, **settings: Any) -> None:
        self._server = server
        self._settings = settings

    @property
    def url(self) -> str:
        return self._server.url

    def broker(self, metrics: Metrics, **settings: Any) -> Broker:
        return RedisBroker(Config(redis_url=self._server.url, redis=self._settings | settings), metrics)

    async def cut(self) -> None:
        self._server.kill()

    async def heal(self) -> None:
        await asyncio.to_thread(self._server.start)


class PostgresBus:
    shared = True

    def __init__(self, server: Postgres) -> None:
        self._server = server

    def broker(self, metrics: Metrics, **settings: Any) -> Broker:
        return BroadcasterBroker(Config(broadcast_url=self._server.url, redis=settings), metrics)

    async def cut(self) -> None:
        self._server.kill()

    async def heal(self) -> None:
        await asyncio.to_thread(self._server.start)


class MemoryBus:
    shared = False  # broadcaster's memory backend keeps to itself, even in one process

    def broker(self, metrics: Metrics, **settings: Any) -> Broker:
        return BroadcasterBroker(Config(broadcast_url="memory://", redis=settings), metrics)

    async def cut(self) -> None:
        raise NotImplementedError

    async def heal(self) -> None:
        raise NotImplementedError


class FakeBus:
    """A bus in this process that fails on demand: it is ``down``, or ``deaf``, or ``stuck``, or refuses messages."""

    shared = True

    def __init__(self, scheme: str = "") -> None:
        self._scheme = scheme
        self.backends: list[FakeBackend] = []
        self.down = False
        self.deaf = False
        self.stuck = False
        self.subscribing_s = 0.0
        self.refuses: Callable[[str], bool] = lambda message: False
        self.published: list[tuple[str, str]] = []

    def broker(self, metrics: Metrics, **settings: Any) -> Broker:
        # The address says which bus it pretends to be; nothing is ever connected there.
        config = Config(broadcast_url=f"{self._scheme or 'postgres'}://nowhere", redis=settings)
        return BroadcasterBroker(config, metrics, lambda: FakeBackend(self))

    async def cut(self) -> None:
        self.down = True
        for backend in self.backends:
            backend.queue.put_nowait(ConnectionError("the bus went down"))

    async def heal(self) -> None:
        self.down = False


class FakeBackend(BroadcastBackend):
    def __init__(self, bus: FakeBus) -> None:
        self._bus = bus
        self._channels: set[str] = set()
        self.queue: asyncio.Queue[Published | Exception] = asyncio.Queue()

    def _check(self) -> None:
        if self._bus.down:
            raise ConnectionError("the bus is down")

    async def connect(self) -> None:
        self._check()
        self._bus.backends.append(self)

    async def disconnect(self) -> None:
        if self in self._bus.backends:
            self._bus.backends.remove(self)

    async def subscribe(self, group: str) -> None:
        self._check()
        await asyncio.sleep(self._bus.subscribing_s)
        self._channels.add(group)

    async def unsubscribe(self, group: str) -> None:
        self._check()
        self._channels.remove(group)

    async def publish(self, channel: str, message: Any) -> None:
        self._check()
        if self._bus.stuck:
            await asyncio.Event().wait()
        if self._bus.refuses(message):
            raise ValueError("the bus does not take this message")
        self._bus.published.append((channel, message))
        for backend in () if self._bus.deaf else self._bus.backends:
            if channel in backend._channels:
                backend.queue.put_nowait(Published(channel, message))

    async def next_published(self) -> Published:
        item = await self.queue.get()
        if isinstance(item, Exception):
            raise item
        return item


# Which buses there are.

_REDIS = {"redis {}.{}".format(*redis_version(path)): path for path in redis_servers()}
_PROGRAMS = Postgres.find()
# Where there is none, one test alone is skipped for it, and says so in one line.
_POSTGRES = ["postgres"] if _PROGRAMS else []
# Redis where each topic is subscribed to by its own channel.
_TOPICS, _TOPIC_MODE = " by topic", {"publish_form": "topic", "subscribe": "topic", "linger_s": 0}
_ON_REDIS = [each + way for each in ("valkey", *_REDIS) for way in ("", _TOPICS)]
CAN_BE_CUT = [*_ON_REDIS, *_POSTGRES, "fake", "fake kafka"]
ALL = [*CAN_BE_CUT, "memory"]


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], Valkey | Postgres]]:
    """The module's servers by name, each started when first asked for; a test that cuts one brings it back."""
    running: dict[str, Valkey | Postgres] = {}

    def get(name: str) -> Valkey | Postgres:
        if name not in running:
            running[name] = _make_server(name)
            running[name].start()
        return running[name]

    yield get
    for server in running.values():
        server.__exit__(None, None, None)


def _make_server(name: str) -> Valkey | Postgres:
    if name == "postgres":
        if _PROGRAMS is None:
            pytest.skip("no Postgres on this machine: initdb is in no /usr/lib/postgresql/*/bin nor on PATH")
        return Postgres(_PROGRAMS)
    return Valkey(binary=_REDIS.get(name))


@pytest.fixture(params=ALL)
def bus(request: pytest.FixtureRequest, servers: Callable[[str], Valkey | Postgres]) -> Bus:
    """Each bus in turn."""
    if request.param.startswith("fake"):
        return FakeBus(request.param.removeprefix("fake").strip())
    if request.param == "memory":
        return MemoryBus()
    server = servers(request.param.removesuffix(_TOPICS))
    if isinstance(server, Postgres):
        return PostgresBus(server)
    return RedisBus(server, **(_TOPIC_MODE if request.param.endswith(_TOPICS) else {}))


only_those_that_can_be_cut = pytest.mark.parametrize("bus", CAN_BE_CUT, indirect=True)
only_shared = pytest.mark.parametrize("bus", CAN_BE_CUT, indirect=True)


class Pair(Protocol):
    """Somebody who hears ``room`` and ``other``, and somebody who publishes; one and the same on ``memory://``."""

    hearer: Broker
    speaker: Broker
    sink: Sink
    metrics: Metrics


Connect = Callable[..., Awaitable[Pair]]


@pytest.fixture
def connect(runner: asyncio.Runner, bus: Bus) -> Iterator[Connect]:
    """``await connect()`` gives a `Pair` of started brokers, which are stopped after the test."""
    stack = AsyncExitStack()

    class Both:
        def __init__(self, hearer: Broker, speaker: Broker, sink: Sink, metrics: Metrics) -> None:
            self.hearer, self.speaker, self.sink, self.metrics = hearer, speaker, sink, metrics

    async def connect(**settings: Any) -> Pair:
        sink, metrics = Sink(), Metrics()
        hearer = await stack.enter_async_context(started(bus.broker(metrics, **settings), sink))
        speaker = hearer
        if bus.shared:
            speaker = await stack.enter_async_context(started(bus.broker(Metrics(), **settings), Sink()))
        for topic in ("room", "other"):
            await hearer.subscribe(topic)
        return Both(hearer, speaker, sink, metrics)

    yield connect
    runner.run(stack.aclose())


@asynccontextmanager
async def started(broker: Broker, sink: Sink) -> AsyncIterator[Broker]:
    await broker.start(sink)
    yield broker
    await broker.stop()


# Events.


async def test_event_published_here_is_heard_there(connect: Connect) -> None:
    pair = await connect()
    assert pair.hearer.link == pair.speaker.link == (True, "")
    await pair.speaker.publish(Direction.TO, "room", "new_msg", b'{"a": 1}')
    await pair.sink.expect(Event("room", "new_msg", b'{"a": 1}'))
    assert not pair.sink.gaps


async def test_sender_is_that_of_the_own_event_among_equal_ones(connect: Connect) -> None:
    """Others publish the same bytes before, between and after."""
    pair = await connect()
    for sender in ("me.1", None, "me.2", "me.3"):
        await pair.speaker.publish(Direction.TO, "room", "e", b"{}")
        await pair.hearer.publish(Direction.TO, "room", "e", b"{}", sender)
    await pair.speaker.publish(Direction.TO, "room", "e", b"{}")
    senders = (None, "me.1", None, None, None, "me.2", None, "me.3", None)
    await pair.sink.expect(*[Event("room", "e", b"{}", None, sender) for sender in senders])
    assert not pair.metrics.dropped


@only_those_that_can_be_cut
async def test_sender_of_an_event_lost_in_a_gap_is_given_to_no_other(connect: Connect, bus: Bus) -> None:
    pair = await connect(**FAST)
    await bus.cut()
    lost = pair.hearer.publish(Direction.TO, "room", "e", b"{}", "me.1")
    await asyncio.gather(lost, return_exceptions=True)
    await _expect_down(pair.hearer, pair.speaker)
    await bus.heal()
    await _expect_live(pair.hearer, pair.speaker)
    for broker in (pair.hearer, pair.speaker):
        await _publish_again(broker)
    await eventually(lambda: [event.topic for event in pair.sink.events].count("other") == 2, "both to publish again")
    first = len(pair.sink.events)
    await pair.speaker.publish(Direction.TO, "room", "e", b"{}")
    await pair.hearer.publish(Direction.TO, "room", "e", b"{}", "me.2")
    await pair.speaker.publish(Direction.TO, "room", "e", b"{}")
    await eventually(lambda: len(pair.sink.events) >= first + 3, "the events after the gap")
    assert [event.sender for event in pair.sink.events[first:]] == [None, "me.2", None]


async def test_broker_hears_its_own_events_too(connect: Connect) -> None:
    pair = await connect()
    await pair.hearer.publish(Direction.TO, "room", "new_msg", b"1")
    await pair.sink.expect(Event("room", "new_msg", b"1"))


@pytest.mark.parametrize(
    "payload",
    [b"", b"null", b' {"text" : "\xc3\xbc",  "n":1.0} ', b"no json", b"\xff\x00", b'"\\u0000\\ud800"', b"x" * 4000],
    ids=["empty", "null", "spaces", "text", "bytes", "escapes", "4 000 bytes"],
)
async def test_payload_arrives_as_it_was_published(connect: Connect, payload: bytes) -> None:
    """Inside an envelope JSON loses the spaces around it, and nothing else."""
    pair = await connect()
    await pair.speaker.publish(Direction.TO, "room", "e", payload)
    await pair.sink.expect(Event("room", "e", payload if isinstance(pair.hearer, RedisBroker) else payload.strip()))


@pytest.mark.parametrize("topic", ["a:b:c", "a.b", 'q"\\*?[]', "ünï", "x" * 255, "ü" * 127, "Upper", "__x", "a b"])
async def test_any_topic_works_and_no_other_is_taken_for_it(connect: Connect, topic: str) -> None:
    """Postgres cuts names at 63 bytes, Kafka takes few characters; neither may show."""
    pair = await connect()
    await pair.hearer.subscribe(topic)
    near = (topic[:-1] or "-", topic + "!", topic.upper(), topic.replace(":", ".").replace(".", ":"))
    for other in near:
        if other != topic and not isinstance(pair.hearer, RedisBroker):
            await pair.speaker.publish(Direction.TO, other, "e", b"0")
    await pair.speaker.publish(Direction.FROM, topic, "e", b"0")
    await pair.speaker.publish(Direction.TO, topic, "é", b"1")
    await pair.sink.expect(Event(topic, "é", b"1"))


async def test_events_of_each_topic_come_in_order_and_once(connect: Connect) -> None:
    """Guarantees: order, at most once."""
    pair = await connect()
    futures = [pair.speaker.publish(Direction.TO, ("room", "other")[n % 2], "e", b"%d" % n) for n in range(1000)]
    await asyncio.gather(*futures)
    await eventually(lambda: len(pair.sink.events) >= 1000, "all events")
    for number, topic in enumerate(("room", "other")):
        heard = [int(event.payload) for event in pair.sink.events if event.topic == topic]
        assert heard == list(range(number, 1000, 2))


async def test_topics_that_come_and_go_hinder_no_publish_and_no_probe(connect: Connect) -> None:
    """Each side does all of it at once, on a bus that may have one connection for it."""
    pair = await connect(**FAST | {"ping_interval_s": 0.01})
    brokers = {id(broker): broker for broker in (pair.hearer, pair.speaker)}.values()

    async def come_and_go(broker: Broker, number: int) -> None:
        for _ in range(10):
            await broker.subscribe(f"other:{number}")
            await broker.publish(Direction.TO, "room", "e", b"0")
            await broker.unsubscribe(f"other:{number}")

    await asyncio.gather(*[come_and_go(broker, number) for broker in brokers for number in range(20)])
    await eventually(lambda: len(pair.sink.events) == 200 * len(brokers), "all events")
    assert not pair.sink.gaps
    assert all(broker.link.live for broker in brokers)


async def test_broker_reads_no_further_than_its_sink(connect: Connect) -> None:
    """`Sink.receive_events`: the broker reads no further until it returns, and loses nothing by it."""
    pair = await connect()
    pair.sink.room.clear()
    await asyncio.gather(*[pair.speaker.publish(Direction.TO, "room", "e", b"%d" % n) for n in range(100)])
    await eventually(lambda: pair.sink.events, "the first batch")
    first = len(pair.sink.events)
    for n in range(100, 120):
        await pair.speaker.publish(Direction.TO, "room", "e", b"%d" % n)
    assert len(pair.sink.events) == first
    pair.sink.room.set()
    await eventually(lambda: len(pair.sink.events) == 120, "the rest")
    assert [int(event.payload) for event in pair.sink.events] == list(range(120))


async def test_topic_that_was_given_up_is_heard_no_more(connect: Connect, bus: Bus) -> None:
    pair = await connect()
    await pair.hearer.unsubscribe("room")
    if isinstance(bus, RedisBus) and pair.hearer.needs_subscribe:  # it is unsubscribed in the background
        async with Redis.from_url(bus.url) as redis, asyncio.timeout(20):
            while await redis.pubsub_channels("topic:room"):  # noqa: ASYNC110  # what is waited for is the server's
                await asyncio.sleep(0.01)
    await pair.speaker.publish(Direction.TO, "room", "e", b"1")
    await pair.speaker.publish(Direction.TO, "other", "e", b"2")
    await eventually(lambda: Event("other", "e", b"2") in pair.sink.events, "the other topic")
    # Where every topic is heard anyway the node sorts out the strangers; so it does on Kafka.
    if pair.hearer.needs_subscribe and getattr(pair.hearer, "_scheme", "") != "kafka":
        assert pair.sink.events == [Event("other", "e", b"2")]
    await pair.hearer.subscribe("room")
    await pair.speaker.publish(Direction.TO, "room", "e", b"3")
    await eventually(lambda: Event("room", "e", b"3") in pair.sink.events, "the topic once more")


# A bus that goes away.


async def _expect_down(*brokers: Broker) -> None:
    for broker in brokers:
        await eventually(lambda broker=broker: not broker.link.live, "the link to be down")  # type: ignore[misc]
        assert broker.link.reason


async def _publish_again(broker: Broker, topic: str = "other", payload: bytes = b"{}") -> None:
    """Publish once the bus takes it: an attempt to connect that is older than the healing fails what waits for it."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await broker.publish(Direction.TO, topic, "e", payload)
            except BusUnavailable:
                await asyncio.sleep(0.01)


async def _expect_live(*brokers: Broker) -> None:
    for broker in brokers:
        live = lambda broker=broker: broker.link.live and not broker.degraded  # noqa: E731
        await eventually(live, "the link to be live")


@only_those_that_can_be_cut
async def test_loss_is_told_once_and_hearing_restored(
    connect: Connect, bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    """Guarantees: loss is told, once hearing is restored; nothing is delivered again."""
    caplog.set_level(logging.INFO, "relay")
    pair = await connect(**FAST)
    await pair.speaker.publish(Direction.TO, "room", "e", b"1")
    await pair.sink.expect(Event("room", "e", b"1"))
    await bus.cut()
    await _expect_down(pair.hearer, pair.speaker)
    assert pair.sink.gaps == []
    await bus.heal()
    await _expect_live(pair.hearer, pair.speaker)
    assert len(pair.sink.gaps) == pair.metrics.gaps == 1
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("gap: ")]
    assert len(lines) == 2, "one for each of the two"
    await _publish_again(pair.speaker, "room", b"2")
    await pair.speaker.publish(Direction.TO, "other", "e", b"3")
    await pair.sink.expect(Event("room", "e", b"1"), Event("room", "e", b"2"), Event("other", "e", b"3"))


@pytest.mark.parametrize("error", [Panic("boom"), asyncio.CancelledError()], ids=lambda error: type(error).__name__)
async def test_fault_of_the_sink_that_is_no_exception_is_a_gap_and_no_end(
    connect: Connect, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = await connect(**FAST)

    async def fail_once(events: Sequence[Event]) -> None:
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(pair.sink, "receive_events", fail_once)
    pair.speaker.publish(Direction.TO, "room", "e", b"1").add_done_callback(asyncio.Future.exception)
    await eventually(lambda: pair.sink.gaps, "the gap")
    await _expect_live(pair.hearer, pair.speaker)
    await _publish_again(pair.speaker, "room", b"2")
    await eventually(lambda: Event("room", "e", b"2") in pair.sink.events, "the next event")


async def test_listener_that_has_ended_is_no_live_link(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broker = RedisBroker(Config(redis_url=valkey.url), Metrics())

    async def listen(*arguments: object) -> str:
        raise Panic("boom")

    monkeypatch.setattr(broker, "_listen", listen)
    async with asyncio.timeout(20 * PATIENCE), started(broker, Sink()):
        assert broker.link == (False, "internal error: Panic")
    assert broker.link == (False, "stopped")
    assert "Redis listener has ended; restart relay" in caplog.text


@only_those_that_can_be_cut
async def test_message_fails_while_the_bus_is_away_and_never_comes_later(connect: Connect, bus: Bus) -> None:
    """Guarantees: publishing is answered; at most once."""
    pair = await connect(**FAST)
    await bus.cut()
    waiting = [pair.speaker.publish(Direction.TO, "room", "e", b"%d" % n) for n in range(3)]
    await _expect_down(pair.hearer, pair.speaker)
    waiting.append(pair.speaker.publish(Direction.TO, "room", "e", b"3"))
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(answer, BusUnavailable) and str(answer) for answer in answers), answers
    await bus.heal()
    await _expect_live(pair.hearer, pair.speaker)
    number = 4
    async with asyncio.timeout(20):
        while True:  # as in `_publish_again`; each time another message, since a failed one may have been published
            try:
                await pair.speaker.publish(Direction.TO, "room", "e", b"%d" % number)
                break
            except BusUnavailable as error:
                assert "stopping" not in str(error)
                number += 1
                await asyncio.sleep(0.01)
    await eventually(lambda: Event("room", "e", b"%d" % number) in pair.sink.events, "the message")
    heard = [int(event.payload) for event in pair.sink.events]
    assert heard == sorted(set(heard))
    assert heard[0] >= 4


@only_those_that_can_be_cut
async def test_bus_that_is_away_at_the_start_is_no_gap(connect: Connect, bus: Bus) -> None:
    """`Broker.start` returns after its first attempt and never raises for it; nothing could be missed yet."""
    await bus.cut()
    sink, metrics = Sink(), Metrics()
    broker = bus.broker(metrics, **FAST)
    await broker.start(sink)
    try:
        assert not broker.link.live
        assert broker.link.reason
        await bus.heal()
        await _expect_live(broker)
        await broker.subscribe("room")
        await _publish_again(broker, "room", b"1")
        await sink.expect(Event("room", "e", b"1"))
        assert not sink.gaps
    finally:
        await broker.stop()


@only_those_that_can_be_cut
async def test_each_cut_is_a_gap(connect: Connect, bus: Bus) -> None:
    pair = await connect(**FAST)
    for count in (1, 2):
        await bus.cut()
        await _expect_down(pair.hearer)
        await bus.heal()
        await _expect_live(pair.hearer)
        assert len(pair.sink.gaps) == count


@only_those_that_can_be_cut
async def test_topics_joined_and_left_while_the_bus_is_away(connect: Connect, bus: Bus) -> None:
    pair = await connect(**FAST)
    await bus.cut()
    await _expect_down(pair.hearer, pair.speaker)
    if pair.hearer.needs_subscribe:
        with pytest.raises(BusUnavailable):
            await pair.hearer.subscribe("new")
    await pair.hearer.unsubscribe("other")
    await bus.heal()
    await _expect_live(pair.hearer, pair.speaker)
    if pair.hearer.needs_subscribe:
        await _publish_again(pair.speaker, "new", b"0")  # not heard: the join of it was refused
    await pair.hearer.subscribe("new")
    for topic in ("room", "new"):
        await _publish_again(pair.speaker, topic, b"1")
    await pair.sink.expect(Event("room", "e", b"1"), Event("new", "e", b"1"))


# Orders among nodes.


async def test_message_on_the_control_channel_reaches_all_and_is_no_event(connect: Connect) -> None:
    pair = await connect()
    await pair.speaker.publish_control(b'{"do":"x"}')
    await pair.hearer.publish_control(b'{"do":"y"}')
    await eventually(lambda: len(pair.sink.control_messages) >= 2, "both messages")
    assert sorted(pair.sink.control_messages) == [b'{"do":"x"}', b'{"do":"y"}']
    await pair.speaker.publish(Direction.TO, "room", "e", b"1")
    await pair.sink.expect(Event("room", "e", b"1"))


async def test_without_a_control_channel_control_messages_stay_local(connect: Connect) -> None:
    pair = await connect(control_channel="")
    await pair.speaker.publish_control(b"{}")
    await pair.speaker.publish(Direction.TO, "room", "e", b"1")
    await pair.sink.expect(Event("room", "e", b"1"))
    assert pair.sink.control_messages == []


# The end.


async def test_stop_ends_everything(bus: Bus) -> None:
    """`Broker.stop` ends every task and connection; a leaked task fails the test by itself."""
    sink, before = Sink(), asyncio.all_tasks()
    broker = bus.broker(Metrics())
    await broker.start(sink)
    await broker.subscribe("room")
    await broker.publish(Direction.TO, "room", "e", b"1")
    await broker.stop()
    assert broker.link == (False, "stopped")
    assert asyncio.all_tasks() == before
    assert not sink.gaps


@only_those_that_can_be_cut
async def test_stop_fails_what_is_waiting(bus: Bus) -> None:
    """`Broker.stop`: messages not yet taken by the bus fail with `BusUnavailable`."""
    broker = bus.broker(Metrics(), **FAST)
    await broker.start(Sink())
    if isinstance(bus, FakeBus):
        bus.stuck = True
    waiting = [broker.publish(Direction.TO, "room", "e", b"%d" % n) for n in range(3)]
    await broker.stop()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(answer, BusUnavailable) for answer in answers), answers


@only_those_that_can_be_cut
async def test_stop_works_while_the_bus_is_away(bus: Bus) -> None:
    broker = bus.broker(Metrics(), **FAST)
    await broker.start(Sink())
    await bus.cut()
    await _expect_down(broker)
    waiting = broker.publish(Direction.TO, "room", "e", b"1")
    await broker.stop()
    with pytest.raises(BusUnavailable):
        await waiting
    await bus.heal()


async def test_broker_that_was_never_started_can_be_stopped(bus: Bus) -> None:
    broker = bus.broker(Metrics())
    assert broker.link == (False, "not started")
    await broker.stop()


async def test_too_many_messages_waiting_are_refused(bus: Bus) -> None:
    """Setting ``redis.publish_queue_max``."""
    broker = bus.broker(Metrics(), publish_queue_max=2)
    await broker.start(Sink())
    answers = await asyncio.gather(
        *[broker.publish(Direction.TO, "room", "e", b"1") for _ in range(5)], return_exceptions=True
    )
    await broker.stop()
    assert [type(answer) for answer in answers] == [type(None)] * 2 + [BusUnavailable] * 3
    assert "too many" in str(answers[-1])


async def test_messages_that_wait_are_bounded_in_bytes_too(bus: Bus) -> None:
    """Setting ``redis.publish_queue_max_bytes``; what has been taken counts no longer."""
    broker = bus.broker(Metrics(), publish_queue_max_bytes=10_000)
    await broker.start(Sink())
    for _ in range(3):
        answers = await asyncio.gather(
            *[broker.publish(Direction.TO, "room", "e", b"1" * 4_500) for _ in range(5)], return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [type(None)] * 2 + [BusUnavailable] * 3
        assert "too many" in str(answers[-1])
    await broker.stop()


# What only the broadcaster adapter has to see to; the fake does it on demand.

only_fake = pytest.mark.parametrize("bus", ["fake"], indirect=True)


@only_fake
async def test_gap_is_told_before_events_that_come_with_the_new_subscription(
    connect: Connect, bus: FakeBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bus is subscribed topic by topic: an event is there before the last of them is."""
    pair = await connect(**FAST)
    await bus.cut()
    await _expect_down(pair.hearer)
    subscribe = FakeBackend.subscribe
    heard_before: list[int] = []

    async def subscribe_with_an_event(backend: FakeBackend, channel: str) -> None:
        await subscribe(backend, channel)
        if "room" in channel:
            backend.queue.put_nowait(Published(channel, pack("room", "e", b"1")))

    monkeypatch.setattr(FakeBackend, "subscribe", subscribe_with_an_event)
    monkeypatch.setattr(pair.sink, "on_gap", lambda reason: heard_before.append(len(pair.sink.events)))
    await bus.heal()
    await pair.sink.expect(Event("room", "e", b"1"))
    assert heard_before == [0]


@only_fake
async def test_deaf_bus_is_found_out_by_its_probe(connect: Connect, bus: FakeBus) -> None:
    """asyncpg's listener waits for ever on a dead connection; the probe does not."""
    pair = await connect(**FAST | {"ping_interval_s": 0.05, "ping_timeout_s": 0.2})
    bus.deaf = True
    await _expect_down(pair.hearer)
    assert "probe" in pair.hearer.link.reason
    bus.deaf = False
    await eventually(lambda: pair.sink.gaps and pair.hearer.link.live and pair.speaker.link.live, "the bus to heal")
    await pair.speaker.publish(Direction.TO, "room", "e", b"1")
    await pair.sink.expect(Event("room", "e", b"1"))


@only_fake
async def test_link_comes_back_however_many_topics_are_joined(connect: Connect, bus: FakeBus) -> None:
    pair = await connect(**FAST, timeout_s=0.5 * PATIENCE)
    for number in range(40):
        await pair.hearer.subscribe(f"room:{number}")
    bus.subscribing_s = 0.02 * PATIENCE  # which is longer for all than the time limit
    await bus.cut()
    await _expect_down(pair.hearer)
    await bus.heal()
    await eventually(lambda: len(bus.backends) == 2, "an attempt to connect")
    await pair.hearer.unsubscribe("room:0")
    await eventually(lambda: pair.sink.gaps and pair.hearer.link.live and pair.speaker.link.live, "the link")
    for topic in ("room:0", "room:39"):
        await pair.speaker.publish(Direction.TO, topic, "e", b"1")
    await pair.sink.expect(Event("room:39", "e", b"1"))


@only_fake
async def test_stuck_bus_fails_messages_in_time_and_counts_as_lost(connect: Connect, bus: FakeBus) -> None:
    """Guarantee: a message never stays pending for longer than the time limit, also those behind it in the queue."""
    pair = await connect(**FAST, timeout_s=0.2)
    bus.stuck = True
    started = asyncio.get_running_loop().time()
    waiting = [pair.hearer.publish(Direction.TO, "room", "e", b"%d" % n) for n in range(50)]
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(answer, BusUnavailable) for answer in answers)
    assert asyncio.get_running_loop().time() - started < 5, "one limit for all, not one for each of the fifty"
    bus.stuck = False
    await eventually(lambda: pair.sink.gaps and pair.hearer.link.live, "the bus to heal")


@only_fake
async def test_message_under_way_fails_with_what_cut_it(connect: Connect, bus: FakeBus) -> None:
    """Not as if the relay were stopping."""
    pair = await connect(**FAST, timeout_s=20)
    bus.stuck = True
    waiting = [pair.hearer.publish(Direction.TO, "room", "e", b"%d" % n) for n in range(2)]
    await asyncio.sleep(0)
    await bus.cut()
    for answer in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(answer, BusUnavailable)
        assert str(answer) == "no connection to the bus: the bus went down"
    bus.stuck = False
    await bus.heal()
    await _expect_live(pair.hearer)


@only_fake
async def test_message_the_bus_refuses_costs_nobody_else_anything(connect: Connect, bus: FakeBus) -> None:
    pair = await connect(**FAST)
    bus.refuses = lambda message: "bad" in message
    bad = pair.hearer.publish(Direction.TO, "room", "e", b'"bad"')
    good = pair.hearer.publish(Direction.TO, "room", "e", b'"good"')
    with pytest.raises(BusUnavailable, match="does not take"):
        await bad
    await good
    await pair.sink.expect(Event("room", "e", b'"good"'))
    assert not pair.sink.gaps
    assert pair.hearer.link.live


@pytest.mark.parametrize("bus", ["postgres"], indirect=True)
async def test_payload_too_large_for_postgres_is_refused_and_the_link_stays(connect: Connect) -> None:
    """Postgres takes less than 8 000 bytes in one NOTIFY."""
    pair = await connect(**FAST)
    with pytest.raises(BusUnavailable, match="payload"):
        await pair.speaker.publish(Direction.TO, "room", "e", b'"' + b"x" * 9000 + b'"')
    await pair.speaker.publish(Direction.TO, "room", "e", b"1")
    await pair.sink.expect(Event("room", "e", b"1"))
    assert pair.speaker.link.live
    assert not pair.sink.gaps


@only_fake
async def test_what_is_no_envelope_is_dropped_and_counted(connect: Connect, bus: FakeBus) -> None:
    pair = await connect()
    backend = bus.backends[0]
    bad = (
        "",
        "{",
        "[]",
        '{"topic":"room"}',
        '{"topic":"room","event":"e"}',
        '{"topic":"room","event":"e","base64":"!"}',
    )
    for message in bad:
        await backend.publish("to:room", message)
    await backend.publish("to:room", '{"topic":"room","event":"e","payload":[1]}')
    await pair.sink.expect(Event("room", "e", b"[1]"))
    assert pair.metrics.dropped == {"no envelope": len(bad)}
    assert pair.hearer.link.live


@pytest.mark.parametrize("bus", ["fake kafka"], indirect=True)
async def test_kafka_gets_channel_names_it_takes(connect: Connect, bus: FakeBus) -> None:
    """Kafka takes 1 to 249 characters of ``[a-zA-Z0-9._-]``; a name that does not fit travels as a digest."""
    pair = await connect()
    for topic in ("room:1", "a.b", "a b", "ü", "x" * 255):
        await pair.speaker.publish(Direction.TO, topic, "e", b"1")
    await pair.speaker.publish(Direction.FROM, "room:1", "e", b"1")
    names = [channel for channel, _ in bus.published]
    assert names[0] == "to.room.1"
    assert names[-1] == "from.room.1"
    assert len(set(names)) == len(names)
    for name in names:
        assert name.isascii()
        assert len(name) <= 249
        assert name.replace(".", "").replace("-", "").replace("_", "").isalnum()


# What only Redis has.

on_redis = pytest.mark.parametrize("bus", ["valkey", *_REDIS], indirect=True)


async def test_plain_redis_publishes_have_no_sender_however_they_mix(valkey: Valkey) -> None:
    """Two nodes and a third publish the same bytes at once; each finds its own, in order, and no others."""
    count, sinks = 200, (Sink(), Sink())
    brokers = [RedisBroker(Config(redis_url=valkey.url), Metrics()) for _ in sinks]
    async with started(brokers[0], sinks[0]), started(brokers[1], sinks[1]), Redis.from_url(valkey.url) as redis:

        async def publish(broker: Broker, name: str) -> None:
            for number in range(count):
                future = broker.publish(Direction.TO, "room", "e", b"{}", f"{name}.{number}")
                if number % 3 == 0:  # else several in one write
                    await future

        async def publish_elsewhere() -> None:
            for _ in range(count):
                await redis.publish("to:room:e", b"{}")

        await asyncio.gather(publish(brokers[0], "a"), publish(brokers[1], "b"), publish_elsewhere())
        for sink, name in zip(sinks, "ab", strict=True):
            await eventually(lambda sink=sink: len(sink.events) >= 3 * count, "all events")  # type: ignore[misc]  # the default is what a lambda in a loop needs
            own = [event.sender for event in sink.events if event.sender is not None]
            assert own == [f"{name}.{number}" for number in range(count)]
            assert len(sink.events) == 3 * count


@on_redis
async def test_markers_reach_neither_events_nor_control_messages(bus: RedisBus) -> None:
    """One more message for each event with a sender, which every node ignores as it does probes."""
    sinks, metrics = (Sink(), Sink()), (Metrics(), Metrics())
    config = Config(redis_url=bus.url)
    brokers = [RedisBroker(config, counters) for counters in metrics]
    async with started(brokers[0], sinks[0]), started(brokers[1], sinks[1]), Redis.from_url(bus.url) as redis:
        async with redis.pubsub() as everything:
            await everything.psubscribe("*")
            await anext(everything.listen())
            await brokers[0].publish(Direction.TO, "room", "e", b"{}", "me.1")
            await brokers[0].publish(Direction.TO, "room", "e", b"{}")
            marker, own, other = [await anext(everything.listen()) for _ in range(3)]
        await sinks[0].expect(Event("room", "e", b"{}", None, "me.1"), Event("room", "e", b"{}"))
        await sinks[1].expect(*[Event("room", "e", b"{}")] * 2)
    assert marker["channel"] == b"relay:control"
    assert marker["data"].startswith(b'{"probe":"')
    assert own["channel"] == other["channel"] == b"to:room:e"
    for sink, counters in zip(sinks, metrics, strict=True):
        assert not sink.control_messages
        assert not counters.dropped


RIGHTS = [
    (("allchannels", "-@all", "+@pubsub"), True),
    (("allchannels", "-@all", "+@pubsub", "+multi"), True),
    (("resetchannels", "&to:*", "&from:*", "-@all", "+@pubsub"), True),
    (("resetchannels", "&to:*", "&from:*", "-@all", "+@pubsub", "+multi", "+exec"), False),
    (("resetchannels", "&to:*", "&from:*", "&relay:*", "-@all", "+@pubsub", "+multi", "+exec"), False),
]
"""Of a Redis user, and whether relay misses one that markers need. With ``&relay:*`` it may publish on the control
channel, and not subscribe to that very name."""


@pytest.mark.parametrize(("rules", "is_missed"), RIGHTS)
async def test_sender_is_found_with_few_rights_too(
    rules: tuple[str, ...], is_missed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with Valkey() as server:
        async with Redis.from_url(server.url) as redis:
            await redis.execute_command("ACL", "SETUSER", "few", "on", ">pw", *rules)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
            sink, url = Sink(), f"redis://few:pw@127.0.0.1:{server.port}"
            async with started(RedisBroker(Config(redis_url=url), Metrics()), sink) as broker:
                for sender in (None, "me.1", None, "me.2", None):
                    await broker.publish(Direction.TO, "room", "e", b"{}", sender)
                    await redis.publish("to:room:e", b"{}")
                await eventually(lambda: len(sink.events) == 10, "all events")
            assert [event.sender for event in sink.events if event.sender] == ["me.1", "me.2"]
            assert [sink.events[place].sender for place in (2, 6)] == ["me.1", "me.2"]
    missed = [record for record in caplog.records if "no permission for MULTI" in record.getMessage()]
    assert len(missed) == is_missed


async def test_markers_go_elsewhere_once_they_are_refused() -> None:
    """Without transactions the connection does not check them first: what was under way is delivered to its sender."""
    with Valkey() as server:
        async with Redis.from_url(server.url) as redis:
            rules = ("resetchannels", "&to:*", "&from:*", "-@all", "+@pubsub")
            await redis.execute_command("ACL", "SETUSER", "few", "on", ">pw", *rules)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
            url = f"redis://few:pw@127.0.0.1:{server.port}"
            sink, broker = Sink(), RedisBroker(Config(redis_url=url), Metrics())
            async with started(broker, sink):
                broker.publisher._marker_channels = [b"relay:control", b"to:relay:probe"]  # as it would be unchecked
                futures = [broker.publish(Direction.TO, "room", "e", b"%d" % n, f"me.{n}") for n in range(3)]
                await asyncio.gather(*futures)
                await broker.publish(Direction.TO, "room", "e", b"3", "me.3")
                await eventually(lambda: len(sink.events) == 4, "all events")
            assert [event.sender for event in sink.events] == [None, None, None, "me.3"]


async def test_rights_that_are_taken_while_connected_are_no_lost_event() -> None:
    """Without a transaction the event is published all the same; without PUBLISH it fails, and leaves no marker."""
    with Valkey() as server:
        async with Redis.from_url(server.url) as redis:

            async def allow(*rules: str) -> None:
                await redis.execute_command("ACL", "SETUSER", "few", "on", ">pw", "allchannels", *rules)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

            await allow("+@all")
            sink, url = Sink(), f"redis://few:pw@127.0.0.1:{server.port}"
            async with started(RedisBroker(Config(redis_url=url), Metrics()), sink) as broker:
                await broker.publish(Direction.TO, "room", "e", b"0", "me.0")
                await allow("-publish")
                with pytest.raises(BusUnavailable, match="PUBLISH to:room:e: NOPERM"):
                    await broker.publish(Direction.TO, "room", "e", b"1", "me.1")
                await redis.publish("to:room:e", b"1")
                await allow("+publish", "-multi")
                for number in (2, 3):
                    await broker.publish(Direction.TO, "room", "e", b"%d" % number, f"me.{number}")
                await sink.expect(
                    Event("room", "e", b"0", None, "me.0"),
                    Event("room", "e", b"1"),
                    Event("room", "e", b"2", None, "me.2"),
                    Event("room", "e", b"3", None, "me.3"),
                )


@pytest.mark.parametrize("bus", ["valkey", *_REDIS], indirect=True)
async def test_redis_channels_of_others_are_heard_beside_the_events(bus: RedisBus) -> None:
    """`Sink.receive_message`: each pattern is told apart, also one that covers the relay's own channels."""
    sink, patterns = Sink(), ("raw:*", "*:room:*")
    broker = RedisBroker(Config(redis_url=bus.url), Metrics(), patterns)
    async with started(broker, sink), Redis.from_url(bus.url) as redis:
        assert await redis.publish("raw:1", b"\xff") == 1
        assert await redis.publish("to:room:e", "1") == 2
        await sink.expect(Event("room", "e", b"1"))
        await eventually(lambda: len(sink.messages) == 2, "the raw messages")
    assert sink.messages == [("raw:*", "raw:1", b"\xff"), ("*:room:*", "to:room:e", b"1")]


async def test_lag_of_the_link_is_measured_also_while_it_is_busy(valkey: Valkey) -> None:
    """The answer to a PING waits behind the events; so the busiest link tells the most."""
    metrics, sink = Metrics(), Sink()
    broker = RedisBroker(Config(redis_url=valkey.url, redis=FAST | {"ping_timeout_s": 1 * PATIENCE}), metrics)
    async with started(broker, sink):
        await eventually(lambda: metrics.link_lag_s > 0, "the first answer")
        assert metrics.link_lag_s < 5 * PATIENCE
        metrics.link_lag_s = 0
        sink.room.clear()  # the reader is stopped, as by a hub that has enough to do
        await broker.publish(Direction.TO, "room", "e", b"1")
        await eventually(lambda: metrics.link_lag_s > 0.1, "an answer that is overdue")
        assert broker.link.live, "it is late, not lost"
        sink.room.set()
        await eventually(lambda: metrics.link_lag_s < 0.1, "the next answer")
        assert not sink.gaps
