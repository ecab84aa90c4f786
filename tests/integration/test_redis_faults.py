"""The Redis link cut and healed under real clients: what they are told, what is counted, and what ``/ready`` says.

Source: design.md, *Redis, in and out*: the link is supervised, a gap is counted and logged each time events may have
been missed, and while the link is down a push is answered ``bus unavailable``, never ok.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import hiredis
import pytest
from redis.asyncio import Redis

from relay import Relay
from tests.support.client import TEXT, Client, RawSocket
from tests.support.process import Valkey
from tests.support.serving import Served, eventually, heard_on, http_get, metric, serve
from tests.support.witness import Ticker, Witness

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]

FAST = {"backoff_min_s": 0.02, "backoff_max_s": 0.1}
UNAVAILABLE = {"status": "error", "response": {"reason": "bus unavailable"}}
OK = {"status": "ok", "response": {}}


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


@pytest.fixture
def server() -> Iterator[Valkey]:
    """A Valkey of the test's own, to be maltreated."""
    with Valkey() as server:
        yield server


async def ready(served: Served) -> tuple[int, dict[str, str]]:
    """Status and body of ``/ready``."""
    status, body = await http_get(f"{served.http}/ready")
    return status, json.loads(body)


async def expect_ready(served: Served) -> None:
    async with asyncio.timeout(20):
        while (answer := await ready(served))[0] != 200:  # noqa: ASYNC110 - what is waited for is the server's
            await asyncio.sleep(0.01)
    assert answer == (200, {"status": "ready"})


async def expect_not_ready(served: Served) -> str:
    """Wait for 503; return the reason."""
    async with asyncio.timeout(20):
        while True:
            status, body = await ready(served)
            if status == 503:
                assert body["status"] == "not ready"
                assert body["reason"]
                return body["reason"]
            await asyncio.sleep(0.01)


async def command(redis: Redis, *words: str) -> Any:
    """A command that redis-py has no typed method for."""
    execute: Any = redis.execute_command
    return await execute(*words)


def gaps_logged(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.getMessage().startswith("gap: ") for record in caplog.records)


async def expect_told(client: Client, *joined: tuple[str, Any]) -> None:
    """The next things heard are a ``phx_error`` for each of these subscriptions, in any order."""
    told = [await client.receive() for _ in joined]
    payload = {"reason": "events may have been missed"}
    for topic, join_ref in joined:
        assert client.message(join_ref, join_ref, topic, "phx_error", payload) in told
    assert len(told) == len(joined)


async def expect_working(served: Served, server: Valkey, client: Client) -> None:
    """After a rejoin events arrive once, and pushes come out."""
    join_ref = await client.join("room:after")
    async with Redis.from_url(server.url) as redis:
        for number in range(3):
            await redis.publish("to:room:after:tick", number)
    for number in range(3):
        await client.expect_event("room:after", "tick", number)
    async with heard_on(server.url, "from:room:after:*") as heard:
        assert await client.push(join_ref, "room:after", "shout", "hi") == OK
        assert await heard() == ("from:room:after:shout", b'"hi"')
    await client.expect_alive()
    _, metrics = await http_get(f"{served.http}/metrics")
    assert metric(metrics, "relay_link_live") == 1


@pytest.mark.parametrize("vsn", ["2.0.0", "1.0.0"])
async def test_server_killed_and_restarted(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture, vsn: str
) -> None:
    caplog.set_level(logging.INFO, "relay")
    served = await serve_relay(redis_url=server.url, redis=FAST, topics=[{"match": "map:*", "on_gap": "ignore"}])
    await expect_ready(served)
    client = await connect(served, vsn=vsn)
    one, two = await client.join("room:1"), await client.join("room:2")
    ignoring = await client.join("map:1")
    server.kill()
    assert "no subscription to 127.0.0.1" in await expect_not_ready(served)

    # While it is down: pushes and joins are refused, the socket lives.
    assert await client.push(one, "room:1", "shout") == UNAVAILABLE
    refs = client.next_ref(), client.next_ref()
    await client.send(refs[0], refs[1], "room:3", "phx_join", {})
    assert await client.receive() == client.refusal(refs[0], refs[1], "room:3", "bus unavailable")
    await client.expect_alive()
    assert served.relay.metrics.gaps == 0

    server.start()
    await expect_told(client, ("room:1", one), ("room:2", two))
    await expect_ready(served)
    assert served.relay.metrics.gaps == 1
    assert served.relay.metrics.rejoins_requested == 2
    assert gaps_logged(caplog) == 1
    # The topic that ignores gaps is still joined, the others are not.
    assert await client.push(ignoring, "map:1", "shout") == OK
    assert (await client.push(None, "room:1", "shout"))["response"] == {"reason": "unmatched topic"}
    await expect_working(served, server, client)


async def test_join_refused_while_the_bus_is_away_ends_the_subscription_it_would_replace(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Source: protocol.md, 1.10 – an error reply for the new join, then ``phx_close`` of the old."""
    served = await serve_relay(redis_url=server.url, redis=FAST)
    client = await connect(served)
    old = await client.join("room:1")
    server.kill()
    await expect_not_ready(served)
    await client.send("900", "901", "room:1", "phx_join", {})
    assert await client.receive() == client.refusal("900", "901", "room:1", "bus unavailable")
    assert await client.receive() == client.message(old, old, "room:1", "phx_close", {})


async def test_server_paused_and_resumed(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that hangs sends no FIN; the PING finds it out, and pushes fail within the time limit."""
    caplog.set_level(logging.INFO, "relay")
    times = {"ping_interval_s": 0.4, "ping_timeout_s": 0.5, "timeout_s": 0.5}
    served = await serve_relay(redis_url=server.url, redis=FAST | times)
    client = await connect(served)
    join_ref = await client.join("room:1")
    server.pause()
    ref = client.next_ref()
    await client.send(join_ref, ref, "room:1", "shout", {})
    assert await client.receive() == client.refusal(join_ref, ref, "room:1", "bus unavailable")
    assert "no answer to PING" in await expect_not_ready(served)
    await client.expect_alive()
    server.resume()
    await expect_told(client, ("room:1", join_ref))
    assert served.relay.metrics.gaps >= 1
    assert gaps_logged(caplog) == served.relay.metrics.gaps
    await expect_ready(served)
    await expect_working(served, server, client)


async def test_push_is_answered_only_after_redis_took_it(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    served = await serve_relay(redis_url=server.url)
    client = await connect(served)
    join_ref = await client.join("room:1")
    server.pause()
    refs = [client.next_ref() for _ in range(3)]
    for ref in refs:
        await client.send(join_ref, ref, "room:1", "shout", {})
    await client.send(join_ref, "leave", "room:1", "phx_leave", {})
    await client.expect_alive()  # the heartbeat overtakes them: nothing else has been answered
    server.resume()
    for ref in refs:
        assert await client.receive() == client.reply(join_ref, ref, "room:1")
    assert await client.receive() == client.reply(join_ref, "leave", "room:1")
    assert await client.receive() == client.message(join_ref, join_ref, "room:1", "phx_close", {})


async def test_socket_that_is_closed_while_its_pushes_wait_ends_quietly(
    serve_relay: ServeRelay, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """It reads no further (``pushes_in_flight``), and its client does not answer the close: it is cut off."""
    limits = {"pushes_in_flight": 1, "idle_timeout_s": 0.4, "close_timeout_s": 0.2}
    served = await serve_relay(redis_url=server.url, limits=limits)
    async with RawSocket.connect(served.ws) as client:
        await client.send_frame(TEXT, b'["1","1","room:1","phx_join",{}]')
        await client.read_message()
        server.pause()
        for ref in b"23":
            await client.send_frame(TEXT, b'["1","%c","room:1","shout",{}]' % ref)
        assert (await client.read_close())[0] == 1001
        with pytest.raises((EOFError, ConnectionError)):
            await client.read_frame()
    await eventually(lambda: served.relay.metrics.sockets == 0, "the socket to end")
    server.resume()
    await expect_ready(served)
    assert not [record.getMessage() for record in caplog.records if record.levelno > logging.WARNING]


async def test_client_that_goes_while_its_push_waits_leaves_nothing_behind(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve_relay(redis_url=server.url)
    client = await connect(served)
    join_ref = await client.join("room:1")
    async with heard_on(server.url, "from:*") as heard:
        server.pause()
        await client.send(join_ref, "1", "room:1", "shout", 1)
        await client.expect_alive()
        await client.connection.close()
        await eventually(lambda: served.relay.metrics.sockets == 0, "the socket to end")
        server.resume()
        assert await heard() == ("from:room:1:shout", b"1")
    assert not [record.getMessage() for record in caplog.records if record.levelno > logging.WARNING]


async def test_relay_stops_while_redis_hangs(server: Valkey) -> None:
    async with serve(Relay(redis_url=server.url, system_topic=False)) as served, Client.connect(served.ws) as client:
        join_ref = await client.join("room:1")
        server.pause()
        await client.send(join_ref, "1", "room:1", "shout", 1)
        await client.expect_alive()
        async with asyncio.timeout(4):  # less than Redis's time limit
            await served.relay.stop()
        server.resume()


async def test_killed_subscription_is_a_gap(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """``CLIENT KILL TYPE pubsub``: pushes go on, since their connection is another."""
    caplog.set_level(logging.INFO, "relay")
    served = await serve_relay(redis_url=server.url, redis=FAST)
    client = await connect(served)
    async with Redis.from_url(server.url) as redis:
        for count in (1, 2):
            join_ref = await client.join("room:1")
            assert await command(redis, "CLIENT", "KILL", "TYPE", "pubsub") == 1
            await expect_told(client, ("room:1", join_ref))
            assert served.relay.metrics.gaps == count
            assert gaps_logged(caplog) == count
    await expect_ready(served)
    await expect_working(served, server, client)


async def test_fault_of_our_own_is_a_gap_and_leaves_nobody_deaf(
    serve_relay: ServeRelay,
    connect: Connect,
    server: Valkey,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = await serve_relay(redis_url=server.url, redis=FAST)
    client = await connect(served)
    join_ref = await client.join("room:1")

    async def fail(events: object) -> None:
        raise ZeroDivisionError("a mistake")

    with monkeypatch.context() as broken:
        broken.setattr(served.relay.node.pubsub, "receive_events", fail)
        async with Redis.from_url(server.url) as redis:
            await redis.publish("to:room:1:new_msg", "1")
        await eventually(lambda: not served.relay.link.live or served.relay.metrics.gaps, "the fault to be noticed")
    await expect_told(client, ("room:1", join_ref))
    assert served.relay.metrics.gaps == 1
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [
        "Redis listener failed"
    ]
    await expect_working(served, server, client)


async def test_cut_output_buffer_is_a_gap_and_nothing_comes_twice(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis cuts a subscriber off that reads too slowly (``client-output-buffer-limit pubsub``)."""
    caplog.set_level(logging.INFO, "relay")
    served = await serve_relay(redis_url=server.url, redis=FAST)
    client = await connect(served)
    join_ref = await client.join("room:1")
    async with Redis.from_url(server.url) as redis:
        await redis.config_set("client-output-buffer-limit", "pubsub 100kb 100kb 0")
        pipeline = redis.pipeline(transaction=True)  # one block: the server writes nothing before its end
        for number in range(300):
            _ = pipeline.publish("to:room:1:tick", json.dumps([number, "x" * 10_000]))
        await pipeline.execute()
        await redis.config_set("client-output-buffer-limit", "pubsub 32mb 8mb 60")
    numbers = []
    while (message := await client.receive())[3] == "tick":
        numbers.append(message[4][0])
    assert message == [join_ref, join_ref, "room:1", "phx_error", {"reason": "events may have been missed"}]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) < 300
    assert served.relay.metrics.gaps == gaps_logged(caplog) == 1
    await expect_ready(served)
    await expect_working(served, server, client)


async def test_subscribers_are_told_at_the_pace_that_is_set(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Setting ``rejoins_per_s``: all at once would be answered by all at once."""
    served = await serve_relay(redis_url=server.url, redis=FAST, rejoins_per_s=100)
    clients = [await connect(served) for _ in range(3)]
    joined = [[(f"room:{n}", await client.join(f"room:{n}")) for n in range(20)] for client in clients]
    loop = asyncio.get_running_loop()
    async with Redis.from_url(server.url) as redis:
        await command(redis, "CLIENT", "KILL", "TYPE", "pubsub")
    await eventually(lambda: served.relay.metrics.gaps == 1, "the gap")
    started = loop.time()
    for client, subscriptions in zip(clients, joined, strict=True):
        await expect_told(client, *subscriptions)
    assert loop.time() - started > 0.4, "60 subscriptions at 100 a second take some 0.6 s"
    assert served.relay.metrics.rejoins_requested == 60


async def test_client_that_rejoins_by_itself_is_not_asked_again(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Asked are the subscriptions that the gap found, and no newer ones; here one each 50 ms."""
    served = await serve_relay(redis_url=server.url, redis=FAST, rejoins_per_s=20)
    client = await connect(served)
    before = [(f"room:{n}", await client.join(f"room:{n}")) for n in range(10)]
    old = await client.join("room:again")
    after = ("room:last", await client.join("room:last"))
    async with Redis.from_url(server.url) as redis:
        await command(redis, "CLIENT", "KILL", "TYPE", "pubsub")
    await expect_told(client, before[0])
    await client.send("900", "901", "room:again", "phx_join", {})
    heard = [await client.receive() for _ in range(12)]
    assert client.reply("900", "901", "room:again") in heard
    assert client.message(old, old, "room:again", "phx_close", {}) in heard
    assert [message[2] for message in heard if message[3] == "phx_error"] == [
        *(topic for topic, _ in before[1:]),
        after[0],
    ]
    assert await client.push("900", "room:again", "shout") == OK


async def test_wrong_password_is_a_reason_and_no_secret_in_any_log(
    serve_relay: ServeRelay, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """The start is not stopped by it: somebody may be about to put it right on the Redis side."""
    caplog.set_level(logging.DEBUG)
    with Valkey("--requirepass", "right-secret") as server:
        url = f"redis://:wrong-secret@127.0.0.1:{server.port}"
        served = await serve_relay(redis_url=url, redis=FAST)
        reason = await expect_not_ready(served)
        assert "password" in reason
        client = await connect(served)
        await client.send("1", "1", "room:1", "phx_join", {})
        assert await client.receive() == client.refusal("1", "1", "room:1", "bus unavailable")
        _, page = await http_get(f"{served.http}/")
        _, metrics = await http_get(f"{served.http}/metrics")
        async with Redis.from_url(f"redis://:right-secret@127.0.0.1:{server.port}") as redis:
            await redis.config_set("requirepass", "wrong-secret")
        await expect_ready(served)
        await client.join("room:1")
        assert served.relay.metrics.gaps == 0, "nothing was heard before, so nothing was missed"
        ours = [record.getMessage() for record in caplog.records if record.name.startswith(("relay", "uvicorn"))]
        assert ours
        for text in (*ours, reason, page, metrics, repr(served.relay.config)):
            assert "-secret" not in text


async def test_password_in_the_settings_works(connect: Connect, serve_relay: ServeRelay) -> None:
    with Valkey("--requirepass", "secret") as server:
        served = await serve_relay(redis_url=f"redis://:secret@127.0.0.1:{server.port}/0")
        await expect_ready(served)
        client = await connect(served)
        await client.join("room:1")
        async with Redis.from_url(f"redis://:secret@127.0.0.1:{server.port}") as redis:
            await redis.publish("to:room:1:new", "1")
        await client.expect_event("room:1", "new", 1)


@asynccontextmanager
async def limited_user(server: Valkey, *rules: str) -> AsyncIterator[tuple[str, Redis]]:
    """A user with ``rules``: its URL, and a client that may change it."""
    async with Redis.from_url(server.url) as redis:
        await command(redis, "ACL", "SETUSER", "pusher", "on", ">pw", "allchannels", "+@all", *rules)
        yield f"redis://pusher:pw@127.0.0.1:{server.port}", redis


async def test_redis_that_refuses_a_push_is_no_lost_link(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """An error reply (a full Redis, or no permission) is this push's alone."""
    async with limited_user(server, "-publish") as (url, redis):
        served = await serve_relay(redis_url=url, redis=FAST)
        client = await connect(served)
        join_ref = await client.join("room:1")
        assert await client.push(join_ref, "room:1", "shout") == UNAVAILABLE
        assert (await ready(served))[0] == 200
        await redis.publish("to:room:1:tick", 1)
        await client.expect_event("room:1", "tick", 1)
        await command(redis, "ACL", "SETUSER", "pusher", "+publish")
        assert await client.push(join_ref, "room:1", "shout") == OK
        assert served.relay.metrics.gaps == 0
        assert served.relay.metrics.refused == {"bus unavailable": 1}


async def test_full_redis_loses_no_link(serve_relay: ServeRelay, connect: Connect, server: Valkey) -> None:
    """``maxmemory`` with ``noeviction``: what Redis answers to PUBLISH then, the client learns."""
    served = await serve_relay(redis_url=server.url, redis=FAST)
    client = await connect(served)
    join_ref = await client.join("room:1")
    async with Redis.from_url(server.url) as redis:
        await redis.config_set("maxmemory-policy", "noeviction")
        await redis.config_set("maxmemory", "1mb")
        assert await client.push(join_ref, "room:1", "shout") in (OK, UNAVAILABLE)
        assert (await ready(served))[0] == 200
        await redis.config_set("maxmemory", "0")
    assert await client.push(join_ref, "room:1", "shout") == OK
    await expect_working(served, server, client)


async def test_redis_that_forbids_the_subscription_is_a_reason(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    async with limited_user(server, "-psubscribe") as (url, redis):
        served = await serve_relay(redis_url=url, redis=FAST)
        assert "permission" in (await expect_not_ready(served)).lower()
        await command(redis, "ACL", "SETUSER", "pusher", "+psubscribe")
        await expect_ready(served)
        await (await connect(served)).join("room:1")


async def test_relay_started_before_redis_serves_once_redis_is_there(serve_relay: ServeRelay, connect: Connect) -> None:
    with Valkey() as server:
        server.kill()
        served = await serve_relay(redis_url=server.url, redis=FAST)
        assert "no subscription to" in await expect_not_ready(served)
        assert (await http_get(f"{served.http}/health"))[0] == 200
        client = await connect(served)
        await client.expect_alive()
        server.start()
        await expect_ready(served)
        assert served.relay.metrics.gaps == 0
        await expect_working(served, server, client)


async def test_messages_that_wait_for_redis_are_bounded(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Setting ``redis.publish_queue_max``; beyond it a push is refused at once."""
    served = await serve_relay(redis_url=server.url, redis={"publish_queue_max": 5})
    client = await connect(served)
    join_ref = await client.join("room:1")
    server.pause()
    await client.send(join_ref, "first", "room:1", "shout", {})
    await client.expect_alive()  # the first is on its way to Redis by now, or waits with the others
    for ref in range(20):
        await client.send(join_ref, ref, "room:1", "shout", {})
    refused = 0
    while refused < 14:
        message = await client.receive()
        assert message[4] == UNAVAILABLE
        refused += 1
    server.resume()
    answers = [(await client.receive())[4] for _ in range(21 - refused)]
    assert answers.count(OK) >= 5
    await client.expect_alive()


async def test_nothing_from_behind_the_hole_comes_before_the_word(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Those that wait for their paced ``phx_error`` get no events meanwhile; a second gap comes in the middle of it.

    Each witness is held to it: where numbers are missing, it has been told at that very place.
    """
    topics = [{"match": "map:*", "on_gap": "ignore"}]
    served = await serve_relay(redis_url=server.url, redis=FAST, rejoins_per_s=20, topics=topics)
    metrics = served.relay.metrics

    def has_gaps(count: int) -> bool:
        return metrics.gaps == count

    async with AsyncExitStack() as stack:
        ticker = await stack.enter_async_context(Ticker.run(server.url, "room:1"))
        other = await stack.enter_async_context(Ticker.run(server.url, "map:1"))
        clients = [await connect(served) for _ in range(12)]
        witnesses = [await stack.enter_async_context(Witness.run(client, "room:1")) for client in clients]
        unasked = await stack.enter_async_context(Witness.run(await connect(served), "map:1"))
        for witness in witnesses:
            await witness.progress(5)
        async with Redis.from_url(server.url) as redis:
            for count in (1, 2):
                assert await command(redis, "CLIENT", "KILL", "TYPE", "pubsub") == 1
                await eventually(partial(has_gaps, count), "the gap")
                await unasked.progress(5)
        assert any(not witness.told for witness in witnesses), "some still wait for their turn"
        late = await stack.enter_async_context(Witness.run(await connect(served), "room:1"))
        await late.progress(5)  # who joins while others wait gets events
        for witness in witnesses:
            await witness.until(lambda witness=witness: witness.told and witness.joins > len(witness.told))
            await witness.progress(5)
        for witness in (*witnesses, late):
            witness.check(ticker)
        assert not unasked.told
        assert unasked.numbers == sorted(set(unasked.numbers))
        assert other.taken
    assert metrics.dropped["events may have been missed"] > 0
    assert set(metrics.dropped) == {"events may have been missed"}


async def test_events_read_together_with_the_confirmation_come_after_the_word(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    """A stand-in for Redis: 1 to 3, a break in which 4 and 5 are lost, then the confirmation and 6 in one write."""

    def event(number: int) -> bytes:
        return b"*4\r\n$8\r\npmessage\r\n$4\r\nto:*\r\n$14\r\nto:room:1:tick\r\n$1\r\n%d\r\n" % number

    subscriptions: list[asyncio.StreamWriter] = []
    joined = asyncio.Event()

    async def stand_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        while data := await reader.read(65536):
            parser.feed(data)
            answer = b""
            while (words := parser.gets()) is not False:
                if words[0] == b"PSUBSCRIBE":
                    for pattern in words[1:]:
                        answer += b"*3\r\n$10\r\npsubscribe\r\n$%d\r\n%s\r\n:1\r\n" % (len(pattern), pattern)
                elif words[0] == b"ROLE":
                    answer += b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"
                elif words[0] == b"PUBLISH":
                    answer += b":1\r\n"
                else:
                    answer += b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"
            if b"to:*" in data:
                subscriptions.append(writer)
                if len(subscriptions) > 1:
                    answer += event(6)
            writer.write(answer)
            if b"to:*" in data and len(subscriptions) == 1:
                await joined.wait()
                writer.write(event(1) + event(2) + event(3))
                await writer.drain()
                writer.close()
                return
        writer.close()

    async with await asyncio.start_server(stand_in, "127.0.0.1", 0) as stands:
        url = f"redis://127.0.0.1:{stands.sockets[0].getsockname()[1]}"
        served = await serve_relay(redis_url=url, redis=FAST, rejoins_per_s=20)
        clients = [await connect(served) for _ in range(3)]
        refs = [await client.join("room:1") for client in clients]
        joined.set()
        for client, ref in zip(clients, refs, strict=True):
            for number in (1, 2, 3):
                await client.expect_event("room:1", "tick", number)
            await expect_told(client, ("room:1", ref))
        await served.relay.stop()
