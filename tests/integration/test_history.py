"""Joins that are given what they missed, on a real server with Redis and in memory, on both ways to write a frame."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from redis.asyncio import Redis

from relay.brokers.base import Place
from relay.channels.history_reader import Recovery
from relay.errors import NotRecovered
from tests.support.client import TEXT, Client, RawSocket
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually, http_get, metric

Connect = Callable[..., Any]
ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

HISTORY = [{"match": "room:*", "history": {"size": 100, "ttl_s": 60}}]


@pytest.fixture(params=["redis", "memory"])
def served(request: pytest.FixtureRequest, runner: asyncio.Runner, serve_relay: ServeRelay, valkey: Valkey) -> Served:
    bus = {"redis_url": valkey.url} if request.param == "redis" else {"broadcast_url": "memory://"}
    return runner.run(serve_relay(topics=HISTORY, limits={"joins_per_s": 0}, **bus))


@pytest.fixture
def topic() -> str:
    return f"room:{uuid4().hex}"


async def join(client: Client, topic: str, **params: Any) -> dict[str, Any]:
    """Join, expect the ok reply next, and return its response."""
    ref = client.next_ref()
    await client.send(ref, ref, topic, "phx_join", params)
    reply = await client.receive()
    assert reply[1:4] == [ref, topic, "phx_reply"], reply
    assert reply[4]["status"] == "ok", reply
    return dict(reply[4]["response"])


async def publish(served: Served, topic: str, *numbers: int) -> None:
    for number in numbers:
        await served.relay.publish(topic, "new", {"n": number})


async def receive_events(client: Client, topic: str, count: int) -> list[dict[str, Any]]:
    events = [await client.receive() for _ in range(count)]
    assert [event[:4] for event in events] == [[None, None, topic, "new"]] * count, events
    return [event[4] for event in events]


async def test_join_that_does_not_ask_sees_what_it_saw_before(served: Served, connect: Connect, topic: str) -> None:
    client = await connect(served)
    assert await join(client, topic) == {}
    await publish(served, topic, 1)
    assert await receive_events(client, topic, 1) == [{"n": 1}]
    assert await join(client, f"other:{topic}", since=None, last=3) == {}, "no history there"


async def test_missed_events_follow_the_join(served: Served, connect: Connect, topic: str) -> None:
    client = await connect(served)
    first = await join(client, topic, since=None)
    assert list(first) == ["_position"]
    await publish(served, topic, 1, 2)
    events = await receive_events(client, topic, 2)
    assert [event["n"] for event in events] == [1, 2]
    positions = [Place.of(event["_position"]) for event in events]
    assert [place.n for place in positions] == [1, 2]
    await client.connection.close()
    await publish(served, topic, 3, 4, 5)
    back = await connect(served)
    since = events[-1]["_position"]
    assert await join(back, topic, since=since) == {"_position": since, "recovered": True}
    assert [event["n"] for event in await receive_events(back, topic, 3)] == [3, 4, 5]
    await publish(served, topic, 6)
    assert [event["n"] for event in await receive_events(back, topic, 1)] == [6]
    await back.expect_alive()
    again = await connect(served)
    assert (await join(again, topic, since=first["_position"]))["recovered"] is True
    assert [event["n"] for event in await receive_events(again, topic, 6)] == [1, 2, 3, 4, 5, 6]
    await again.expect_alive()
    assert served.relay.metrics.history_recovered == 2


async def test_nothing_missed_is_recovered_too(served: Served, connect: Connect, topic: str) -> None:
    client = await connect(served)
    since = (await join(client, topic, since=None))["_position"]
    for _ in range(2):
        assert await join(await connect(served), topic, since=since) == {"_position": since, "recovered": True}


async def test_deleted_entries_are_passed_over(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey, topic: str
) -> None:
    """As docs/history.md says of XDEL."""
    served = await serve_relay(topics=HISTORY, redis_url=valkey.url)
    await publish(served, topic, 1, 2, 3, 4)
    async with Redis(port=valkey.port) as admin:
        rows: Any = await admin.xrange(f"topic:{topic}")
        positions = [row[0].decode() for row in rows]
        assert await admin.xdel(f"topic:{topic}", *positions[1:3]) == 2
    back = await connect(served)
    assert (await join(back, topic, since=positions[0]))["recovered"] is True
    assert [event["n"] for event in await receive_events(back, topic, 1)] == [4]
    assert (await join(await connect(served), topic, since=positions[1]))["recovered"] is False
    await publish(served, topic, 5)
    assert [event["n"] for event in await receive_events(back, topic, 1)] == [5]


async def test_join_finds_that_the_history_was_deleted(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey, topic: str
) -> None:
    served = await serve_relay(topics=HISTORY, redis_url=valkey.url)
    clients = [await connect(served), await connect(served)]
    _ = await join(clients[0], topic, since=None)
    await publish(served, topic, 1, 2)
    _ = await receive_events(clients[0], topic, 2)
    async with Redis(port=valkey.port) as admin:
        assert await admin.delete(f"topic:{topic}") == 1
    _ = await join(clients[1], topic, since=None)
    async with asyncio.timeout(3 * PATIENCE):
        for client in clients:  # once each: what others published meanwhile may be lost too
            assert (await client.receive())[3] == "phx_error"
    for client in clients:
        _ = await join(client, topic, since=None)
    await publish(served, topic, 3)
    for client in clients:
        assert [event["n"] for event in await receive_events(client, topic, 1)] == [3]


@pytest.mark.parametrize(
    "since",
    ["9999999999999-1", "1-1", "nonsense", "", 17, True, [], {"a": 1}, "1-", "-1", "1-1-1", "١-١", "1" * 300 + "-1"],
)
async def test_since_that_cannot_be_never_refuses_the_join(
    served: Served, connect: Connect, topic: str, since: Any
) -> None:
    await publish(served, topic, 1)
    client = await connect(served)
    answer = await join(client, topic, since=since)
    assert answer["recovered"] is False
    assert answer["reason"] in ("unknown position", "history expired")
    assert Place.of(answer["_position"]).n == 1
    await publish(served, topic, 2)
    assert [event["n"] for event in await receive_events(client, topic, 1)] == [2]
    assert served.relay.metrics.history_not_recovered.total() == 1


async def test_position_of_another_topic_is_unknown(served: Served, connect: Connect, topic: str) -> None:
    await publish(served, topic, 1, 2)
    other = await connect(served)
    answer = await join(other, topic, since="0-0")
    stranger = await join(await connect(served), f"{topic}:2", since=answer["_position"])
    assert (stranger["recovered"], stranger["reason"]) == (False, "unknown position")


async def test_trimmed_events_are_not_recovered(served: Served, connect: Connect, topic: str) -> None:
    client = await connect(served)
    await join(client, topic, since=None)
    await publish(served, topic, 0)
    since = (await receive_events(client, topic, 1))[0]["_position"]
    await client.connection.close()
    await publish(served, topic, *range(1, 102))
    answer = await join(await connect(served), topic, since=since)
    assert (answer["recovered"], answer["reason"]) == (False, "history expired")
    assert Place.of(answer["_position"]).n == 102


async def test_last_events_on_join(served: Served, connect: Connect, topic: str) -> None:
    await publish(served, topic, 1, 2, 3)
    for last, expected in ((1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (50, [1, 2, 3]), (10**9, [1, 2, 3])):
        client = await connect(served)
        answer = await join(client, topic, last=last)
        assert list(answer) == ["_position"]
        events = await receive_events(client, topic, len(expected))
        assert [event["n"] for event in events] == expected
        assert Place.of(answer["_position"]).n == expected[0] - 1
        await client.expect_alive()
        if last == 2:  # what a client keeps from the reply alone is recovered from
            again = await connect(served)
            assert (await join(again, topic, since=answer["_position"], last=1))["recovered"] is True
            assert [event["n"] for event in await receive_events(again, topic, 2)] == [2, 3]
    for refused in (0, -1, "3", None, True, 1.5):
        client = await connect(served)
        assert list(await join(client, topic, last=refused)) == ["_position"]
        await client.expect_alive()


async def test_position_follows_a_payload_that_is_no_object(served: Served, connect: Connect, topic: str) -> None:
    client, other = await connect(served), await connect(served)
    await join(client, topic, since=None)
    await join(other, topic)
    for payload in ([1, 2], "text", 17, None):
        await served.relay.publish(topic, "new", payload)
        event, position = await client.receive(), await client.receive()
        assert event == [None, None, topic, "new", payload]
        assert position[2:4] == [topic, "relay:position"]
        assert Place.of(position[4]["_position"]).n > 0
        assert await other.receive() == [None, None, topic, "new", payload]
    await served.relay.publish(topic, "new", b"\xff")
    assert isinstance(await client.receive_raw(), bytes)
    assert (await client.receive())[3] == "relay:position"
    assert isinstance(await other.receive_raw(), bytes)
    await other.expect_alive()


async def test_position_is_spliced_into_an_object(served: Served, connect: Connect, topic: str) -> None:
    client = await connect(served)
    await join(client, topic, since=None)
    for text in ("{}", "{ }", ' {"a" : [ 1 ] } ', '{"_position":"mine"}', '{"a":"}"}'):
        await served.relay.publish(topic, "new", json.loads(text))
        payload = (await receive_events(client, topic, 1))[0]
        assert Place.of(payload.pop("_position")).n > 0
        assert payload == {key: value for key, value in json.loads(text).items() if key != "_position"}


async def test_live_only_event_has_no_position(
    serve_relay: ServeRelay, connect: Connect, topic: str, redis: Redis, valkey: Valkey
) -> None:
    served = await serve_relay(topics=HISTORY, redis_url=valkey.url)
    client = await connect(served)
    await join(client, topic, since=None)
    await redis.publish(f"to:{topic}:new", '{"n":1}')
    assert await receive_events(client, topic, 1) == [{"n": 1}]
    await redis.publish(f"topic:{topic}", 'new:{"n":2,"_position":"1-1"}')
    assert await receive_events(client, topic, 1) == [{"n": 2, "_position": None}]


async def test_rejoin_with_position_on_the_same_socket(served: Served, connect: Connect, topic: str) -> None:
    client = await connect(served)
    since = (await join(client, topic, since=None))["_position"]
    await publish(served, topic, 1)
    await receive_events(client, topic, 1)
    ref = client.next_ref()
    await client.send(ref, ref, topic, "phx_join", {"since": since})
    assert (await client.receive())[4]["response"]["recovered"] is True
    assert (await client.receive())[3] == "phx_close"
    assert [event["n"] for event in await receive_events(client, topic, 1)] == [1]
    ref = client.next_ref()
    await client.send(ref, ref, topic, "phx_join", {})
    assert (await client.receive())[4]["response"] == {}
    assert (await client.receive())[3] == "phx_close"
    await publish(served, topic, 2)
    assert await receive_events(client, topic, 1) == [{"n": 2}]


@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_joins_during_a_flood_see_each_event_once(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey, bus: str
) -> None:
    """Three publishers; clients join with their position, read a while, and come back."""
    served = await serve_relay(
        topics=[{"match": "*", "history": {"size": 100_000, "ttl_s": 60}}],
        limits={"joins_per_s": 0, "recover_max_events": 100_000},
        **({"redis_url": valkey.url} if bus == "redis" else {"broadcast_url": "memory://"}),
    )
    stop = asyncio.Event()

    async def flood() -> None:
        while not stop.is_set():
            await publish(served, topic, 1)
            await asyncio.sleep(0)

    async def follow(rounds: int) -> None:
        since: str | None = None
        for _ in range(rounds):
            client = await connect(served)
            answer = await join(client, topic, since=since)
            assert answer.get("recovered") is (None if since is None else True), answer
            since = answer["_position"]
            number = Place.of(since).n
            for _ in range(100):
                event = (await client.receive())[4]
                place = Place.of(event["_position"])
                assert place.n == number + 1, (number, event)
                number, since = place.n, event["_position"]
            client.connection.transport.abort()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(flood())
        await asyncio.gather(*(follow(5) for _ in range(10)))
        stop.set()
    assert served.relay.metrics.history_recovered == 40


async def test_gap_is_caught_up_and_nobody_is_told(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    served = await serve_relay(
        topics=HISTORY, redis_url=valkey.url, redis={"backoff_min_s": 0.01, "backoff_max_s": 0.1}
    )
    other = await serve_relay(topics=HISTORY, redis_url=valkey.url)
    plain, asking = await connect(served), await connect(served)
    await join(plain, topic)
    await join(asking, topic, since=None)
    await publish(other, topic, 1)
    await receive_events(plain, topic, 1)
    await receive_events(asking, topic, 1)
    async with Redis(port=valkey.port) as admin:
        for client in await admin.client_list():
            if client["psub"] != "0":
                await admin.client_kill_filter(_id=client["id"])
        await publish(other, topic, 2, 3)
    assert await receive_events(plain, topic, 2) == [{"n": 2}, {"n": 3}]
    assert [event["n"] for event in await receive_events(asking, topic, 2)] == [2, 3]
    await eventually(lambda: served.relay.metrics.gaps, "the gap")
    await publish(other, topic, 4)
    assert await receive_events(plain, topic, 1) == [{"n": 4}]
    await plain.expect_alive()


async def test_slow_reader_gets_every_event_in_order(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    topics = [{"match": "room:*", "history": {"size": 10_000, "ttl_s": 60}, "overflow": "recover"}]
    served = await serve_relay(topics=topics, redis_url=valkey.url)
    client = await connect(served)
    await join(client, topic)
    other = await connect(served)
    await join(other, topic)
    text = "x" * 1000
    for start in range(0, 5000, 100):
        await asyncio.gather(
            *(served.relay.publish(topic, "new", {"n": number, "t": text}) for number in range(start, start + 100))
        )
        for number in range(start, start + 100):
            assert (await other.receive())[4]["n"] == number
    for number in range(5000):
        assert (await client.receive())[4]["n"] == number
    await client.expect_alive()
    assert served.relay.metrics.history_catch_ups["slow reader"] >= 1


async def test_memory_of_a_slow_reader_is_bounded(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    """It reads a tenth of what is published; it gets every event, and never are more than 128 kB held for it."""
    topics = [{"match": "room:*", "history": {"size": 100_000, "ttl_s": 60}, "overflow": "recover"}]
    served = await serve_relay(topics=topics, redis_url=valkey.url)
    ended = asyncio.Event()
    most = published = 0
    text = "x" * 1000

    async def publish_all() -> None:
        nonlocal published
        while not ended.is_set():
            await asyncio.gather(
                *(served.relay.publish(topic, "new", {"n": published + each, "t": text}) for each in range(20))
            )
            published += 20
            await asyncio.sleep(0.002)

    async with RawSocket.connect(served.ws, receive_buffer=4096) as client:
        await client.send_frame(TEXT, json.dumps(["1", "1", topic, "phx_join", {}]).encode())
        assert (await client.read_message())[3] == "phx_reply"
        (socket,) = served.relay.node.sockets.values()
        publishing = asyncio.create_task(publish_all())
        for number in range(1000):
            assert (await client.read_message())[4]["n"] == number
            most = max(most, socket.held_bytes)
            while published < min(10 * number, 8000):
                await asyncio.sleep(0)
                most = max(most, socket.held_bytes)
        ended.set()
        await publishing
        for number in range(1000, published):
            assert (await client.read_message())[4]["n"] == number
            most = max(most, socket.held_bytes)
    assert published >= 8000
    assert served.relay.metrics.history_catch_ups["slow reader"] >= 1
    assert 16_384 < most < 131_072, most


async def test_two_hundred_slow_readers_take_little_memory(tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text(
        "limits = { joins_per_s = 0 }\n[[topics]]\nmatch = '*'\noverflow = 'recover'\nhistory = { size = 20000 }\n"
    )
    with RelayProcess("--config", str(config)) as relay:
        async with AsyncExitStack() as stack, Redis.from_url(relay.redis_url) as redis:
            assert relay.process is not None
            process = psutil.Process(relay.process.pid)
            readers = [
                await stack.enter_async_context(RawSocket.connect(relay.ws, receive_buffer=4096)) for _ in range(200)
            ]
            for reader in readers:
                await reader.send_frame(TEXT, b'["1","1","room:1","phx_join",{}]')
                assert (await reader.read_message())[3] == "phx_reply"
            payload = json.dumps({"t": "x" * 1000})
            before = process.memory_info().rss
            for _ in range(20):
                async with redis.pipeline(transaction=False) as pipeline:
                    for _ in range(200):
                        _ = pipeline.fcall("relay_publish", 1, "topic:room:1", "new", payload, "20000", "60")
                    await pipeline.execute()
            caught_up, cause = "relay_history_catch_ups_total", {"cause": "slow reader"}
            async with asyncio.timeout(20 * PATIENCE):
                while metric((await http_get(f"{relay.http}/metrics"))[1], caught_up, **cause) < 200:  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(0.1)
            assert process.memory_info().rss - before < 40 * 2**20, process.memory_info().rss - before


async def test_slow_reader_is_given_positions_though_the_history_could_not_be_read_at_its_join(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics = [{"match": "room:*", "history": {"size": 10_000, "ttl_s": 60}, "overflow": "recover"}]
    served = await serve_relay(topics=topics, redis_url=valkey.url)

    async def open(*asked: object) -> Recovery:
        return Recovery(None, None, NotRecovered.UNAVAILABLE)

    history = served.relay.node.pubsub.history
    assert history is not None
    monkeypatch.setattr(history, "open", open)
    client = await connect(served)
    assert (await join(client, topic, since="1-1"))["_position"] is None
    text = "x" * 1000
    for start in range(0, 5000, 100):
        await asyncio.gather(
            *(served.relay.publish(topic, "new", {"n": number, "t": text}) for number in range(start, start + 100))
        )
    await eventually(lambda: served.relay.metrics.history_catch_ups["slow reader"], "the history to be needed")
    for number in range(5000):
        payload = (await client.receive())[4]
        assert (payload["n"], Place.of(payload["_position"]).n) == (number, number + 1)


async def test_more_missed_events_than_the_limits_are_not_recovered(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    limits = {"recover_max_events": 3, "recover_max_bytes": 1000}
    served = await serve_relay(topics=HISTORY, limits=limits, redis_url=valkey.url)
    since = (await join(await connect(served), topic, since=None))["_position"]
    await publish(served, topic, 1, 2, 3)
    client = await connect(served)
    assert (await join(client, topic, since=since))["recovered"] is True
    third = (await receive_events(client, topic, 3))[-1]["_position"]
    await publish(served, topic, 4)
    answer = await join(await connect(served), topic, since=since)
    assert (answer["recovered"], answer["reason"]) == (False, "too many events missed")
    await served.relay.publish(topic, "new", "x" * 1000)
    answer = await join(await connect(served), topic, since=third)
    assert (answer["recovered"], answer["reason"]) == (False, "too many events missed")
    last = await connect(served)
    assert Place.of((await join(last, topic, last=9))["_position"]).n == 5, "not even one of the last fits"


async def test_joins_that_ask_wait_for_their_turn(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    served = await serve_relay(topics=HISTORY, limits={"recover_per_s": 10}, redis_url=valkey.url)
    clients = [await connect(served) for _ in range(14)]
    began = time.monotonic()
    await asyncio.gather(*(join(client, topic, since=None) for client in clients))
    assert time.monotonic() - began >= 0.3
    began = time.monotonic()
    await asyncio.gather(*(join(client, f"{topic}:2") for client in clients))
    assert time.monotonic() - began < 0.3 * 14 * PATIENCE, "those that do not ask need not wait"


async def test_recent_events_of_all_topics_are_bounded_in_bytes(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    served = await serve_relay(topics=HISTORY, limits={"history_ring_max_bytes": 5000}, redis_url=valkey.url)
    history = served.relay.node.pubsub.history
    assert history is not None
    clients = [await connect(served) for _ in range(3)]
    for number, client in enumerate(clients):
        await join(client, f"{topic}:{number}", since=None)
    for number, client in enumerate(clients):
        await publish(served, f"{topic}:{number}", *range(20))
        events = await receive_events(client, f"{topic}:{number}", 20)
        assert history._rings.bytes + history.reader.bytes <= 5000
        late = await connect(served)
        answer = await join(late, f"{topic}:{number}", since=events[0]["_position"])
        assert answer["recovered"] is True
        assert [event["n"] for event in await receive_events(late, f"{topic}:{number}", 19)] == list(range(1, 20))


async def publish_many(served: Served, topic: str, start: int, stop: int) -> None:
    """Publish numbers in arrays of 1 kB."""
    text = "x" * 1000
    for first in range(start, stop, 100):
        numbers = range(first, min(first + 100, stop))
        await asyncio.gather(*(served.relay.publish(topic, "new", [n, text]) for n in numbers))


async def receive_pairs(client: Client, topic: str, start: int, stop: int) -> None:
    """Receive these numbers, each followed by its position."""
    for number in range(start, stop):
        event, position = await client.receive(), await client.receive()
        assert (event[:4], event[4][0]) == ([None, None, topic, "new"], number), number
        assert position[3] == "relay:position", number
        assert Place.of(position[4]["_position"]).n == number + 1


async def join_and_catch_up(served: Served, client: Client, topic: str) -> str:
    """Join, be given the topic's one event, and return the position before it, once live events follow."""
    since = (await join(client, topic, since=None))["_position"]
    await publish_many(served, topic, 0, 1)
    await receive_pairs(client, topic, 0, 1)
    await eventually(lambda: not served.relay.node.hub._topics[topic].held, "the end of what the history has")
    return str(since)


async def test_slow_reader_gets_each_event_once_and_its_position_behind_it(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    topics = [{"match": "room:*", "history": {"size": 10_000, "ttl_s": 60}, "overflow": "recover"}]
    served = await serve_relay(topics=topics, redis_url=valkey.url)
    client = await connect(served)
    await join_and_catch_up(served, client, topic)
    await publish_many(served, topic, 1, 5000)
    await receive_pairs(client, topic, 1, 5000)
    await client.expect_alive()
    assert served.relay.metrics.history_catch_ups["slow reader"] >= 1


async def test_slow_reader_that_joins_again_gets_every_event_after_its_position(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    """Younger events of its first join still wait for it then."""
    topics = [{"match": "room:*", "history": {"size": 10_000, "ttl_s": 60}, "overflow": "recover"}]
    served = await serve_relay(topics=topics, redis_url=valkey.url, limits={"recover_max_events": 10_000})
    client = await connect(served)
    since = await join_and_catch_up(served, client, topic)
    await publish_many(served, topic, 1, 5000)
    await eventually(lambda: served.relay.metrics.history_catch_ups["slow reader"], "the history to be needed")
    ref = client.next_ref()
    await client.send(ref, ref, topic, "phx_join", {"since": since})
    await eventually(lambda: served.relay.metrics.history_recovered, "the second join")
    while (frame := await client.receive())[3] != "phx_reply":
        assert frame[3] in ("new", "relay:position")
    assert frame[4]["response"] == {"_position": since, "recovered": True}
    assert (await client.receive())[3] == "phx_close"
    await receive_pairs(client, topic, 0, 5000)
    await client.expect_alive()
