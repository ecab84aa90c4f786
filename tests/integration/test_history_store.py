"""The contract of every history store: Redis Streams on a real server, and memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from relay import AsyncPublisher, Config, redis_url
from relay.brokers.base import Broker, Event, HistoryStore, Opened, Place, is_position
from relay.brokers.broadcaster import BroadcasterBroker
from relay.brokers.redis import RedisBroker
from relay.brokers.redis_connection import Connections
from relay.brokers.redis_scripts import PUBLISH
from relay.brokers.redis_streams import RedisHistory
from relay.config_sections import Direction, HistoryConfig
from relay.errors import BusUnavailable, NotRecovered
from relay.metrics import Metrics
from relay.protocol import topics
from tests.support.faults import Proxy
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.serving import eventually
from tests.support.sink import Sink

SIZE = 10
SETTINGS = HistoryConfig(size=SIZE, ttl_s=60)


class Store:
    """A started broker with a topic of its own that has a history."""

    def __init__(self, broker: Broker, sink: Sink) -> None:
        self.broker = broker
        self.sink = sink
        self.topic = f"room:{uuid4().hex}"

    @property
    def history(self) -> HistoryStore:
        assert self.broker.history is not None
        return self.broker.history

    async def publish(self, *payloads: bytes) -> list[str]:
        """Append events; returns their positions, once they have been heard."""
        before = len(self.sink.events)
        for payload in payloads:
            await self.broker.publish(Direction.TO, self.topic, "e", payload)
        await eventually(lambda: len(self.sink.events) >= before + len(payloads), "the events")
        return [str(event.position) for event in self.sink.events[before:]]

    async def open(self, since: str, max_events: int = 100, max_bytes: int = 10_000) -> Opened:
        return await self.history.open(self.topic, since, SETTINGS, max_events, max_bytes)


@asynccontextmanager
async def started(**settings: Any) -> AsyncIterator[Store]:
    config = Config(topics=[{"match": "*", "history": SETTINGS.model_dump()}], **settings)
    metrics, sink = Metrics(), Sink()
    broker: Broker = RedisBroker(config, metrics) if config.redis_url else BroadcasterBroker(config, metrics)
    await broker.start(sink)
    store = Store(broker, sink)
    await broker.subscribe(store.topic)
    try:
        yield store
    finally:
        await broker.stop()


@pytest.fixture(params=["redis", "redis, RESP3", "redis 6.2", "memory"])
def store(request: pytest.FixtureRequest, runner: asyncio.Runner, valkey: Valkey, old_server: Valkey) -> Any:
    urls = {"redis": valkey.url, "redis, RESP3": f"{valkey.url}?protocol=3", "redis 6.2": old_server.url}
    manager = started(redis_url=urls.get(request.param, ""), broadcast_url="" if request.param in urls else "memory://")
    yield runner.run(manager.__aenter__())
    runner.run(manager.__aexit__(None, None, None))


async def test_positions_rise_by_one_and_time_does_not_fall(store: Store) -> None:
    positions = [Place.of(position) for position in await store.publish(*[b"1"] * 5)]
    assert [place.n for place in positions] == [1, 2, 3, 4, 5]
    assert [place.ms for place in positions] == sorted(place.ms for place in positions)
    assert all(is_position(str(place)) for place in positions)


async def test_payload_and_sender_are_kept_verbatim(store: Store) -> None:
    for payload in (b'{"a":9007199254740993,"b":[]}', b"\x00\xff:\n", b""):
        await store.broker.publish(Direction.TO, store.topic, "e", payload, "6f1c2a9e.7")
    await eventually(lambda: len(store.sink.events) == 3, "the events")
    rows = await store.history.last(store.topic, 3)
    assert rows == store.sink.events
    assert [row.sender for row in rows] == ["6f1c2a9e.7"] * 3
    assert rows[0].payload == b'{"a":9007199254740993,"b":[]}'
    assert rows[1].payload == b"\x00\xff:\n"


async def test_own_position_there_is_recovered(store: Store) -> None:
    positions = await store.publish(b"1", b"2", b"3")
    for position in positions:
        assert (await store.open(position))[::2] == (positions[-1], None)
    rows = await store.history.read(store.topic, positions[0], 10)
    assert rows is not None
    assert [row.payload for row in rows] == [b"1", b"2", b"3"]
    assert [row.position for row in rows] == positions
    page = await store.history.read(store.topic, positions[0], 2)
    assert page == rows[:2]


async def test_position_that_was_never_given_is_unknown(store: Store) -> None:
    (position,) = await store.publish(b"1")
    place = Place.of(position)
    for other in (Place(place.ms + 60_000, place.n), Place(place.ms, place.n + 1), Place(place.ms - 1, place.n)):
        assert (await store.open(str(other)))[::2] == (position, NotRecovered.UNKNOWN)
        assert await store.history.read(store.topic, str(other), 1) is None


async def test_trimmed_position_has_expired(store: Store) -> None:
    positions = await store.publish(*[b"1"] * (SIZE + 2))
    assert (await store.open(positions[1]))[::2] == (positions[-1], NotRecovered.EXPIRED)
    assert (await store.open(positions[2]))[::2] == (positions[-1], None)
    summary = await store.history.describe(store.topic)
    assert (summary.events, summary.first, summary.last) == (SIZE, positions[2], positions[-1])
    assert summary.bytes > 0


async def test_more_than_the_limits_is_too_many(store: Store) -> None:
    positions = await store.publish(*[b"x" * 99] * 5)
    assert (await store.open(positions[0], max_events=4))[::2] == (positions[-1], None)
    assert (await store.open(positions[0], max_events=3))[::2] == (positions[-1], NotRecovered.TOO_MANY)
    assert (await store.open(positions[0], max_bytes=400))[::2] == (positions[-1], None)
    assert (await store.open(positions[0], max_bytes=399))[::2] == (positions[-1], NotRecovered.TOO_MANY)


async def test_last_rows_come_oldest_first(store: Store) -> None:
    positions = await store.publish(b"1", b"2", b"3")
    assert [row.payload for row in await store.history.last(store.topic, 2)] == [b"2", b"3"]
    assert [row.payload for row in await store.history.last(store.topic, 2, positions[1])][-1] == b"1"
    assert await store.history.last(f"{store.topic}:other", 2) == []


async def test_notice_says_where_the_history_stands_in_order_with_the_events(store: Store) -> None:
    await store.history.check(store.topic, "", SETTINGS)
    await eventually(lambda: len(store.sink.events) == 1, "the notice")
    born = Place.of(str(store.sink.events[0].position))
    assert (store.sink.events[0].event, born.n) == ("", 0)
    (position,) = await store.publish(b"1")
    assert Place.of(position).n == 1
    assert (await store.open(str(born)))[::2] == (position, None)
    await store.history.check(store.topic, position, SETTINGS)
    await eventually(lambda: len(store.sink.events) == 3, "the notice")
    assert store.sink.events[2] == Event(store.topic, "", b"", position)


async def test_empty_topic_gives_a_position_that_counts(store: Store) -> None:
    opened = await store.open("1-1")
    assert opened.fault is NotRecovered.UNKNOWN
    (position,) = await store.publish(b"1")
    assert (await store.open(opened.newest))[::2] == (position, None)


async def test_event_that_memory_has_kept_is_published_too() -> None:
    """As text it is larger than its payload; a publisher that is refused may publish it once more."""
    async with started(broadcast_url="memory://", redis={"publish_queue_max_bytes": 1000}) as store:
        (position,) = await store.publish(b"\xff" * 900)
        with pytest.raises(BusUnavailable, match="too many messages"):
            await store.broker.publish(Direction.TO, store.topic, "e", b"\xff" * 1001)
        assert (await store.open("1-1")).newest == position


# What only Redis can lose.


@pytest.fixture(params=["valkey", "redis 6.2"])
def server(request: pytest.FixtureRequest, valkey: Valkey, old_server: Valkey) -> Valkey:
    return valkey if request.param == "valkey" else old_server


@pytest.fixture
def client(runner: asyncio.Runner, server: Valkey) -> Any:
    client = Redis.from_url(server.url)
    yield client
    runner.run(client.aclose())


async def test_history_that_was_flushed_and_filled_again_is_unknown(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        positions = await store.publish(b"1", b"2", b"3")
        await client.delete(f"topic:{store.topic}")
        assert (await store.open(positions[-1])).fault is NotRecovered.UNKNOWN
        again = await store.publish(b"4", b"5", b"6")
        assert [Place.of(position).n for position in again] == [1, 2, 3]
        for position in positions:
            assert (await store.open(position)).fault is NotRecovered.UNKNOWN


async def test_lost_event_leaves_one_mark_and_older_positions_are_not_recovered(server: Valkey, client: Any) -> None:
    """As after a failover: the entry heard last is not there, older and younger ones are."""
    async with started(redis_url=server.url) as store:
        one, two, lost = await store.publish(b"1", b"2", b"3")
        await client.xdel(f"topic:{store.topic}", lost)
        for _ in range(8):
            await store.history.check(store.topic, lost, SETTINGS)
        rows = await store.history.last(store.topic, 10)
        marks = [row for row in rows if not row.event and row.payload]
        assert [row.payload.decode() for row in marks] == [lost]
        assert Place.of(str(marks[0].position)) > Place.of(lost)
        after = await store.publish(b"4")
        for position in (one, two):
            assert (await store.open(position)).fault is NotRecovered.FORKED
        assert (await store.open(lost)).fault is NotRecovered.UNKNOWN
        assert (await store.open(str(marks[0].position)))[::2] == (after[0], None)


async def test_restored_backup_is_not_claimed(server: Valkey, client: Any) -> None:
    """What came after the backup is unknown, and what was before it has a mark behind it, once a relay has looked."""
    async with started(redis_url=server.url) as store:
        key = f"topic:{store.topic}"
        one, two, three = await store.publish(b"1", b"2", b"3")
        backup = await client.dump(key)
        lost = (await store.publish(b"4", b"5"))[-1]
        await client.restore(key, 0, backup, replace=True)
        await store.history.check(store.topic, lost, SETTINGS)
        again = await store.publish(b"6")
        assert Place.of(again[0]) > Place.of(lost)
        assert (await store.open(lost)).fault is NotRecovered.UNKNOWN
        for position in (one, two, three):
            assert (await store.open(position)).fault is NotRecovered.FORKED


async def test_history_that_has_left_the_heard_event_behind_gets_no_mark(server: Valkey) -> None:
    async with started(redis_url=server.url) as store:
        positions = await store.publish(*[b"1"] * (SIZE * 2))
        for _ in range(8):
            await store.history.check(store.topic, positions[0], SETTINGS)
        assert (await store.open(positions[SIZE]))[::2] == (positions[-1], None)


async def test_clock_that_steps_back_does_not_harm_positions(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        far = "9999999999999-7"
        await client.xadd(f"topic:{store.topic}", {"e": "e", "d": "1", "z": "2"}, id=far)
        (position,) = await store.publish(b"2")
        assert position == "9999999999999-8"
        assert (await store.open(far))[::2] == (position, None)


async def test_stream_lives_longer_than_its_events(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        await store.publish(b"1")
        assert SETTINGS.ttl_s < await client.ttl(f"topic:{store.topic}") <= SETTINGS.ttl_s + 300


async def test_events_older_than_the_ttl_have_expired(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        (position,) = await store.publish(b"1")
        now = (await client.time())[0]
        old = f"room:{uuid4().hex}"
        await client.xadd(f"topic:{old}", {"e": "e", "d": "1", "z": "2"}, id=f"{(now - 100) * 1000}-1")
        await client.xadd(f"topic:{old}", {"e": "e", "d": "1", "z": "4"}, id=f"{(now - 90) * 1000}-2")
        opened = await store.history.open(old, f"{(now - 100) * 1000}-1", SETTINGS, 100, 1000)
        assert opened.fault is NotRecovered.EXPIRED
        newest = await store.history.open(old, f"{(now - 90) * 1000}-2", SETTINGS, 100, 1000)
        assert newest.fault is None, "nothing came behind it: its age does not matter"


async def test_key_of_another_type_is_an_error_of_that_topic_alone(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        await client.set(f"topic:{store.topic}", "text")
        with pytest.raises(BusUnavailable, match="WRONGTYPE"):
            await store.broker.publish(Direction.TO, store.topic, "e", b"1")
        with pytest.raises(BusUnavailable, match="WRONGTYPE"):
            await store.open("1-1")
        await store.broker.publish(Direction.TO, f"{store.topic}:other", "e", b"1")
        await eventually(lambda: len(store.sink.events) == 1, "the other topic's event")


async def test_row_of_another_program_is_an_event_that_cannot_be_delivered(server: Valkey, client: Any) -> None:
    """It has a place between the others, and a name that no event may have."""
    async with started(redis_url=server.url) as store:
        (position,) = await store.publish(b"1")
        foreign = (await client.xadd(f"topic:{store.topic}", {"hello": "world"})).decode()
        (after,) = await store.publish(b"2")
        rows = await store.history.read(store.topic, position, 10)
        assert rows is not None
        assert [row.position for row in rows] == [position, foreign, after]
        assert [topics.is_event(row.event) for row in rows] == [True, False, True]
        assert all(row.event for row in rows), "neither the birth of the history nor a mark"
        assert (await store.open(position))[::2] == (after, None)


async def test_empty_stream_of_a_consumer_group_is_a_history(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        await client.xgroup_create(f"topic:{store.topic}", "workers", mkstream=True)
        assert (await store.open("1-1"))[::2] == ("0-0", NotRecovered.UNKNOWN)
        await store.history.check(store.topic, "", SETTINGS)
        await eventually(lambda: store.sink.events, "the notice")
        assert store.sink.events == [Event(store.topic, "", b"", "0-0")]
        (position,) = await store.publish(b"1")
        assert Place.of(position).n == 1
        assert (await store.open(position))[::2] == (position, None)


async def test_script_that_redis_has_forgotten_is_sent_again(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        await store.publish(b"1")
        await client.script_flush()
        futures = [store.broker.publish(Direction.TO, store.topic, "e", b"%d" % number) for number in range(2, 20)]
        await asyncio.gather(*futures)
        await eventually(lambda: len(store.sink.events) == 19, "the events")
        assert [event.payload for event in store.sink.events] == [b"%d" % number for number in range(1, 20)]
        await client.script_flush()
        assert (await store.open("1-1")).fault is NotRecovered.EXPIRED


async def test_order_is_that_of_the_calls_while_redis_forgets_the_script(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        futures: list[asyncio.Future[None]] = []

        async def publish() -> None:
            for number in range(1000):
                futures.append(store.broker.publish(Direction.TO, store.topic, "e", b"%d" % number))
                if number % 3 == 0:
                    await asyncio.sleep(0)

        publishing = asyncio.create_task(publish())
        while not publishing.done():
            await client.script_flush()
        await publishing
        _ = await asyncio.gather(*futures)
        await eventually(lambda: len(store.sink.events) == 1000, "the events")
        assert [int(event.payload) for event in store.sink.events] == list(range(1000))


async def test_read_whose_connection_is_cut_is_read_again(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        positions = await store.publish(b"1", b"2")
        for _ in range(20):
            opening = asyncio.gather(*(store.open(positions[0]) for _ in range(50)))
            await client.client_kill_filter(_type="normal", skipme=True)
            assert {opened[::2] for opened in await opening} == {(positions[1], None)}


# The door for other programs.


@pytest.mark.parametrize(
    ("server", "head"),
    [("valkey", ("FCALL", "relay_publish")), ("redis 6.2", ("EVAL", PUBLISH.text))],
    indirect=["server"],
    ids=["function", "script"],
)
async def test_function_and_script_publish_as_the_relay_does(
    server: Valkey, client: Any, head: tuple[str, str]
) -> None:
    call = partial(client.execute_command, *head)
    async with started(redis_url=server.url) as store:
        key = f"topic:{store.topic}"
        await store.publish(b"1")
        position = await call(1, key, "new_msg", '{"a": 1}', SIZE, 60)
        await eventually(lambda: len(store.sink.events) == 2, "the event")
        assert store.sink.events[1:] == [Event(store.topic, "new_msg", b'{"a": 1}', position.decode())]
        for args in (
            ("", "1"),
            ("a:b", "1"),
            ("phx_reply", "1"),
            ("chan_reply_1", "1"),
            ("a\nb", "1"),
            ("x" * 256, "1"),
            ("a\x85b", "1"),
            *(
                (event, "1")
                for event in (b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xc3\xc2\xa0\xa0")
            ),
        ):
            with pytest.raises(Exception, match="expected an event name"):
                await call(1, key, *args, SIZE, 60)
        for sizes in ((0, 60), (SIZE, 0), (10**6, 60), (SIZE, "90.5"), ("10.5", 60), (SIZE, "nan"), ("nan", 60)):
            with pytest.raises(Exception, match="expected a size"):
                await call(1, key, "e", "1", *sizes)
        with pytest.raises(Exception, match="expected event, payload, size and ttl_s"):
            await call(1, key, "e", "1")
        with pytest.raises(Exception, match="at most 1048576 bytes"):
            await call(1, key, "e", "x" * 1_048_577, SIZE, 60)
        assert await client.xlen(key) == 2, "nothing is kept of what is refused"
        names = ["é", "a\xa0b", "日本", "\ud7ff\ue000\uffff", "\U00010000\U000e0000\U0010ffff", "߿ࠀ"]
        for name in names:
            assert is_position((await call(1, key, name, "1", SIZE, 60)).decode())
        await eventually(lambda: [event.event for event in store.sink.events[2:]] == names, "the events")


async def test_foreign_library_of_the_same_name_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    code = "#!lua name=relay_publish\nredis.register_function('relay_publish', function() return 'theirs' end)"
    newer = code.replace("\n", "\n-- version 99\n", 1)
    with Valkey() as server:
        client = Redis(port=server.port)
        for library, words in ((code, "of another program"), (newer, "")):
            await client.function_load(library, replace=True)
            caplog.clear()
            async with started(redis_url=server.url) as store:
                await store.publish(b"1")
            assert await client.fcall("relay_publish", 0) == b"theirs"
            assert words in caplog.text
            assert bool(words) == bool(caplog.records)
        await client.function_load(code.replace("\n", "\n-- version 0\n", 1), replace=True)
        async with started(redis_url=server.url) as store:
            await store.publish(b"1")  # by then the publisher has prepared the server
            position = await client.fcall("relay_publish", 1, f"topic:{store.topic}", "e", "1", SIZE, 60)
            assert is_position(position.decode())
        await client.aclose()


async def test_history_is_read_on_a_new_connection_where_the_last_was_idle(valkey: Valkey) -> None:
    """A firewall may have forgotten it meanwhile: what is sent on it gets no answer."""
    async with Proxy.open(valkey.port) as proxy:
        config = Config(
            redis_url=f"redis://127.0.0.1:{proxy.port}", redis={"ping_interval_s": 1e-6, "timeout_s": PATIENCE}
        )
        connections = Connections(redis_url.parse(config.redis_url), config.redis.timeout_s)
        history = RedisHistory(connections, config)
        for _ in range(3):
            assert await history.last("room:idle", 1) == []
            proxy.forget()
        await history.close()
        await connections.close()


async def test_program_that_publishes_learns_of_histories_from_redis(server: Valkey) -> None:
    async with started(redis_url=server.url) as store, AsyncPublisher(server.url) as publisher:
        first = await publisher.publish(store.topic, "e", 1)
        second = await publisher.publish(store.topic, "e", 2)
        await eventually(lambda: len(store.sink.events) == 2, "the events")
        assert [first.position, second.position] == [event.position for event in store.sink.events]


@pytest.mark.parametrize("renew_s", [0, 60], ids=["each time", "when they are lost"])
async def test_settings_for_other_programs_are_renewed_while_a_relay_runs(
    renew_s: float, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.brokers.redis.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("relay.brokers.redis.RENEW_EVERY_S", renew_s)
    async with started(redis_url=valkey.url) as store:
        await store.publish(b"1")
        with SyncRedis(port=valkey.port) as admin:
            for _ in range(2):
                assert admin.delete("relay:settings")
                await eventually(lambda: admin.exists("relay:settings"), "the settings")
                await eventually(lambda: 120 < int(str(admin.ttl("relay:settings"))) <= 180, "their lifetime")


async def test_settings_that_cannot_be_renewed_are_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("relay.brokers.redis.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("relay.brokers.redis.RENEW_EVERY_S", 0)
    with Valkey() as server:
        client = Redis(port=server.port)
        async with started(redis_url=server.url) as store:
            await store.publish(b"1")
            assert "relay:settings" not in caplog.text
            await client.set("relay:settings", "text")
            await eventually(lambda: "relay:settings cannot be written" in caplog.text, "the warning")
            await store.publish(b"2", b"3", b"4")
        assert caplog.text.count("relay:settings cannot be written") == 1
        await client.aclose()


async def test_what_cannot_be_loaded_at_the_start_is_loaded_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis has no memory for a while."""
    caplog.set_level("INFO", "relay")
    monkeypatch.setattr("relay.brokers.redis.LOOK_EVERY_S", 0.01)
    with Valkey("--maxmemory", "1") as server, SyncRedis(port=server.port) as admin:
        async with started(redis_url=server.url):
            await eventually(lambda: "no function relay_publish (OOM" in caplog.text, "the warning")
            assert not admin.exists("relay:settings")
            admin.config_set("maxmemory", "0")
            await eventually(lambda: admin.exists("relay:settings"), "the settings")
            await eventually(lambda: admin.function_list("relay_publish"), "the function")
            await eventually(lambda: "what Redis had refused is loaded and written now" in caplog.text, "the log")


async def test_function_that_was_flushed_is_loaded_with_the_next_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.brokers.redis.LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("relay.brokers.redis.RENEW_EVERY_S", 0)
    with Valkey() as server, SyncRedis(port=server.port) as admin:
        async with started(redis_url=server.url):
            await eventually(lambda: admin.function_list("relay_publish"), "the function")
            admin.function_flush("SYNC")
            await eventually(lambda: admin.function_list("relay_publish"), "the function again")


async def test_live_events_on_the_topics_channel(server: Valkey, client: Any) -> None:
    async with started(redis_url=server.url) as store:
        channel = f"topic:{store.topic}"
        await client.publish(channel, 'new_msg:{"a":1}')
        await client.publish(channel, ":*6f1c2a9e.7:typing:{}")
        for wrong in ('{"a":1}', "[1]", '"a":1', "name", ":", "", "::{}", ":1-x:e:{}", ":1-1"):
            await client.publish(channel, wrong)
        await client.publish(channel, "end:")
        await eventually(lambda: len(store.sink.events) == 3, "the events")
        assert store.sink.events == [
            Event(store.topic, "new_msg", b'{"a":1}'),
            Event(store.topic, "typing", b"{}", None, "6f1c2a9e.7"),
            Event(store.topic, "end", b""),
        ]


async def test_user_who_may_not_use_scripts_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with Valkey() as server:
        client = Redis(port=server.port)
        rights = ("+@pubsub", "+ping", "+role", "+multi", "+exec", "allchannels", "~topic:*")
        await client.acl_setuser("relay", enabled=True, passwords=["+password"], reset_channels=False)
        await client.execute_command("ACL", "SETUSER", "relay", *rights)  # type: ignore[no-untyped-call]
        async with started(redis_url=f"redis://relay:password@127.0.0.1:{server.port}") as store:
            with pytest.raises(BusUnavailable, match="NOPERM"):
                await store.broker.publish(Direction.TO, store.topic, "e", b"1")
            with pytest.raises(BusUnavailable, match="NOPERM"):
                await store.open("1-1")
            await client.publish(f"topic:{store.topic}", "e:1")
            await eventually(lambda: len(store.sink.events) == 1, "live events")
        assert "SCRIPT LOAD" in caplog.text
        await client.execute_command("ACL", "SETUSER", "relay", "resetchannels", "&to:*", "&relay:control")  # type: ignore[no-untyped-call]
        async with started(redis_url=f"redis://relay:password@127.0.0.1:{server.port}") as store:
            assert store.broker.link.live
            assert "topic:*" in store.broker.degraded
            assert store.broker.history is None
        await client.aclose()
