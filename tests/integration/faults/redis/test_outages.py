"""Redis that is killed, hangs, cuts connections or is slow, while numbered events flow.

Events come in order and none twice; where some are missing the client has been told, the gap is counted and logged, and
no socket is closed. While the link is down a push is answered ``bus unavailable``, never ok.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias

import pytest
from redis.asyncio import Redis

from relay import Relay
from tests.support.client import Client
from tests.support.faults import Proxy
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.redis_faults import (
    FAST,
    OK,
    UNAVAILABLE,
    Connect,
    ServeRelay,
    Stream,
    command,
    expect_told,
    expect_working,
    until_not_ready,
    until_ready,
)
from tests.support.serving import eventually, http_get, serve

StartStream: TypeAlias = Callable[..., AbstractAsyncContextManager[Stream]]


# Killed.


@pytest.mark.parametrize("vsn", ["2.0.0", "1.0.0"])
async def test_killed_and_restarted(stream: StartStream, server: Valkey, vsn: str) -> None:
    """Twice. Meanwhile pushes and joins are refused, and the sockets live."""
    async with stream(topics=({"match": "map:*", "on_gap": "ignore"},), vsn=vsn) as run:
        served, client = run.served, run.client
        await until_ready(served)
        one, two = await client.join("room:1"), await client.join("room:2")
        ignoring = await client.join("map:1")
        server.kill()
        assert "no subscription to 127.0.0.1" in await until_not_ready(served)
        assert await client.push(one, "room:1", "shout") == UNAVAILABLE
        refs = client.next_ref(), client.next_ref()
        await client.send(refs[0], refs[1], "room:3", "phx_join", {})
        assert await client.receive() == client.refusal(refs[0], refs[1], "room:3", "bus unavailable")
        await client.expect_alive()
        assert run.metrics.gaps == 0
        server.start()
        await expect_told(client, ("room:1", one), ("room:2", two))
        await until_ready(served)
        # The topic that ignores gaps is still joined, the others are not.
        assert await client.push(ignoring, "map:1", "shout") == OK
        assert (await client.push(None, "room:1", "shout"))["response"] == {"reason": "unmatched topic"}
        await expect_working(served, server.url, client)
        await run.until_told(1)
        server.kill()
        server.start()
        await run.until_told(2)
        run.others_told = 3  # the last is the topic by which `expect_working` tries it
    assert run.metrics.gaps == 2


async def test_join_refused_while_the_bus_is_away_ends_the_subscription_it_would_replace(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Source: protocol.md, 1.10 – an error reply for the new join, then ``phx_close`` of the old."""
    served = await serve_relay(redis_url=server.url, redis=FAST)
    client = await connect(served)
    old = await client.join("room:1")
    server.kill()
    await until_not_ready(served)
    await client.send("900", "901", "room:1", "phx_join", {})
    assert await client.receive() == client.refusal("900", "901", "room:1", "bus unavailable")
    assert await client.receive() == client.message(old, old, "room:1", "phx_close", {})


async def test_relay_started_before_redis_serves_once_redis_is_there(serve_relay: ServeRelay, connect: Connect) -> None:
    with Valkey() as server:
        server.kill()
        served = await serve_relay(redis_url=server.url, redis=FAST)
        assert "no subscription to" in await until_not_ready(served)
        assert (await http_get(f"{served.http}/health"))[0] == 200
        client = await connect(served)
        await client.expect_alive()
        server.start()
        await until_ready(served)
        assert served.relay.metrics.gaps == 0
        await expect_working(served, server.url, client)


# Hanging.


async def test_paused_until_the_link_is_given_up(stream: StartStream, server: Valkey) -> None:
    """A server that hangs sends no FIN: the PING detects it, and pushes fail within the time limit."""
    async with stream(ping_interval_s=0.4 * PATIENCE, ping_timeout_s=0.5 * PATIENCE, timeout_s=0.5 * PATIENCE) as run:
        join_ref = await run.client.join("map:1")
        server.pause()
        assert await run.client.push(join_ref, "map:1", "shout") == UNAVAILABLE
        assert "no answer to PING" in await until_not_ready(run.served)
        server.resume()
        await expect_told(run.client, ("map:1", join_ref))
        await run.until_told(1)
        await until_ready(run.served)
        await expect_working(run.served, server.url, run.client)
        run.others_told = 1
    assert run.metrics.gaps == 1


async def test_pause_shorter_than_the_time_limits_is_no_gap(stream: StartStream, server: Valkey) -> None:
    async with stream() as run:
        server.pause()
        await asyncio.sleep(1)
        server.resume()
    assert (run.metrics.gaps, run.lost) == (0, 0)


async def test_relay_stops_while_redis_hangs(server: Valkey) -> None:
    async with serve(Relay(redis_url=server.url, system_topic=False)) as served, Client.connect(served.ws) as client:
        join_ref = await client.join("room:1")
        server.pause()
        await client.send(join_ref, "1", "room:1", "shout", 1)
        await client.expect_alive()
        async with asyncio.timeout(4):  # less than Redis's time limit
            await served.relay.stop()
        server.resume()


# Cut off.


async def test_connection_killed_again_and_again(stream: StartStream, server: Valkey) -> None:
    """``CLIENT KILL TYPE pubsub``: pushes go on, since their connection is another."""
    async with stream() as run:
        for count in range(1, 6):
            assert await command(server.url, "CLIENT", "KILL", "TYPE", "pubsub") == 1
            await run.until_told(count)
        await until_ready(run.served)
        await expect_working(run.served, server.url, run.client)
    assert run.metrics.gaps == 5


async def test_output_buffer_cut_under_flood(stream: StartStream, server: Valkey) -> None:
    """Source: ``client-output-buffer-limit pubsub``: Redis cuts off who reads too slowly."""
    async with stream() as run:
        await command(server.url, "CONFIG", "SET", "client-output-buffer-limit", "pubsub 100kb 100kb 0")
        join_ref = await run.client.join("room:flood")
        async with Redis.from_url(server.url) as redis:
            pipeline = redis.pipeline(transaction=True)  # one block: the server writes nothing before its end
            for number in range(300):
                _ = pipeline.publish("to:room:flood:tick", json.dumps([number, "x" * 10_000]))
            await pipeline.execute()
        await command(server.url, "CONFIG", "SET", "client-output-buffer-limit", "pubsub 32mb 8mb 60")
        numbers = []
        while (message := await run.client.receive())[3] == "tick":
            numbers.append(message[4][0])
        assert message == [join_ref, join_ref, "room:flood", "phx_error", {"reason": "events may have been missed"}]
        assert numbers == list(range(len(numbers))) and len(numbers) < 300
        await run.until_told(1)
        run.others_told = 1
    assert run.metrics.gaps == 1


# Slow.


async def test_slow_redis_is_no_gap(stream: StartStream, server: Valkey) -> None:
    """Its bytes come in pieces of 50, each late by 20 ms: frames of RESP are cut anywhere."""
    async with Proxy.open(server.port) as proxy:
        async with stream(f"redis://127.0.0.1:{proxy.port}") as run:
            proxy.delay_s, proxy.chunk_bytes = 0.02, 50
            await asyncio.sleep(2)
            proxy.delay_s, proxy.chunk_bytes = 0, 65536
            last = run.ticker.taken[-1]
            await run.witness.until(lambda: run.witness.numbers[-1] >= last)
    assert (run.metrics.gaps, run.lost) == (0, 0)


# A fault of our own.


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
    await expect_working(served, server.url, client)
