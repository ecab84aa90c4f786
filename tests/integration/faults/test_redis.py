"""Redis broken in every way while events flow: in order, nothing twice, and no loss that is not told and counted."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.brokers.redis_publish_once import publishing
from tests.support.client import Client
from tests.support.faults import Authority, Proxy, Sentinels
from tests.support.process import Valkey, free_port, redis_servers, wait_for
from tests.support.serving import Served, eventually, heard_on, http_get, metric
from tests.support.witness import Ticker, Witness

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]

FAST = {"backoff_min_s": 0.02, "backoff_max_s": 0.1}
OK = {"status": "ok", "response": {}}
UNAVAILABLE = {"status": "error", "response": {"reason": "bus unavailable"}}


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


@pytest.fixture
def server() -> Iterator[Valkey]:
    """A Valkey of the test's own, to be maltreated."""
    with Valkey() as server:
        yield server


async def is_ready(served: Served) -> bool:
    return (await http_get(f"{served.http}/ready"))[0] == 200


async def until_ready(served: Served, ready: bool = True) -> str:
    """Wait for what ``/ready`` says; return its body."""
    async with asyncio.timeout(20):
        while await is_ready(served) is not ready:  # noqa: ASYNC110 - what is waited for is the server's
            await asyncio.sleep(0.01)
    return (await http_get(f"{served.http}/ready"))[1]


async def command(url: str, *words: str) -> Any:
    async with Redis.from_url(url) as redis:
        execute: Any = redis.execute_command
        return await execute(*words)


@pytest.fixture
def under_fault(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> Callable[[Callable[[Witness, Ticker], Awaitable[None]]], Awaitable[tuple[Served, int]]]:
    """Run a fault while events flow to a witness and a bystander beats its heart; returns relay and events lost.

    Each loss is one that the witness was told of, and the relay has counted a gap for it.
    """

    async def under_fault(
        fault: Callable[[Witness, Ticker], Awaitable[None]], url: str = "", **redis: Any
    ) -> tuple[Served, int]:
        served = await serve_relay(redis_url=url or server.url, redis=FAST | redis)
        client, bystander = await connect(served), await connect(served)
        async with Ticker.run(server.url, "room:fault") as ticker, Witness.run(client, "room:fault") as witness:
            await witness.progress()
            beats = asyncio.create_task(beat(bystander))
            await fault(witness, ticker)
            await witness.progress()
            beats.cancel()
            lost = witness.check(ticker)
            assert not beats.done() or beats.cancelled()
            metrics = served.relay.metrics
            assert len(witness.told) == metrics.gaps == metrics.rejoins_requested
            assert metrics.sockets == metrics.sockets_opened == 2, "no socket was hurt"
            assert not metrics.dropped
        return served, lost

    async def beat(bystander: Client) -> None:
        while True:
            async with asyncio.timeout(2):
                await bystander.expect_alive()
            await asyncio.sleep(0.05)

    return under_fault


UnderFault = Callable[..., Awaitable[tuple[Served, int]]]


async def test_killed_and_restarted(under_fault: UnderFault, server: Valkey) -> None:
    async def fault(witness: Witness, ticker: Ticker) -> None:
        for count in (1, 2):
            server.kill()
            server.start()
            await witness.until(lambda count=count: witness.joins > count)

    served, _ = await under_fault(fault)
    assert served.relay.metrics.gaps == 2


async def test_paused_for_ten_seconds(under_fault: UnderFault, server: Valkey) -> None:
    """The link is given up after 4 s of silence; what was published meanwhile is a gap."""

    async def fault(witness: Witness, ticker: Ticker) -> None:
        server.pause()
        await asyncio.sleep(10)
        server.resume()
        await witness.until(lambda: witness.joins > 1)

    served, _ = await under_fault(fault, ping_interval_s=2.0, ping_timeout_s=2.0, timeout_s=2.0)
    assert served.relay.metrics.gaps == 1


async def test_pause_shorter_than_the_time_limits_is_no_gap(under_fault: UnderFault, server: Valkey) -> None:
    async def fault(witness: Witness, ticker: Ticker) -> None:
        server.pause()
        await asyncio.sleep(1)
        server.resume()

    served, lost = await under_fault(fault)
    assert (served.relay.metrics.gaps, lost) == (0, 0)


async def test_connection_killed_again_and_again(under_fault: UnderFault, server: Valkey) -> None:
    async def fault(witness: Witness, ticker: Ticker) -> None:
        for count in range(1, 6):
            assert await command(server.url, "CLIENT", "KILL", "TYPE", "pubsub") == 1
            await witness.until(lambda count=count: witness.joins > count)

    served, _ = await under_fault(fault)
    assert served.relay.metrics.gaps == 5


async def test_output_buffer_cut_under_flood(under_fault: UnderFault, server: Valkey) -> None:
    """Source: ``client-output-buffer-limit pubsub``: Redis cuts off who reads too slowly."""

    async def fault(witness: Witness, ticker: Ticker) -> None:
        await command(server.url, "CONFIG", "SET", "client-output-buffer-limit", "pubsub 100kb 100kb 0")
        async with Redis.from_url(server.url) as redis:
            pipeline = redis.pipeline(transaction=True)  # one block: the server writes nothing before its end
            for number in range(300):
                _ = pipeline.publish("to:room:elsewhere:tick", json.dumps([number, "x" * 10_000]))
            await pipeline.execute()
        await command(server.url, "CONFIG", "SET", "client-output-buffer-limit", "pubsub 32mb 8mb 60")
        await witness.until(lambda: witness.joins > 1)

    served, _ = await under_fault(fault)
    assert served.relay.metrics.gaps == 1


async def test_slow_redis_is_no_gap(under_fault: UnderFault, server: Valkey) -> None:
    """Its bytes come in pieces of 50, each late by 20 ms: frames of RESP are cut anywhere."""
    async with Proxy.open(server.port) as proxy:

        async def fault(witness: Witness, ticker: Ticker) -> None:
            proxy.delay_s, proxy.chunk_bytes = 0.02, 50
            await asyncio.sleep(2)
            proxy.delay_s, proxy.chunk_bytes = 0, 65536
            last = ticker.taken[-1]
            await witness.until(lambda: witness.numbers[-1] >= last)

        served, lost = await under_fault(fault, f"redis://127.0.0.1:{proxy.port}")
    assert (served.relay.metrics.gaps, lost) == (0, 0)


async def test_push_through_a_slow_redis_is_answered_late_and_once(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    async with Proxy.open(server.port) as proxy, heard_on(server.url, "from:*") as heard:
        served = await serve_relay(redis_url=f"redis://127.0.0.1:{proxy.port}", redis=FAST | {"timeout_s": 1.5})
        client = await connect(served)
        join_ref = await client.join("room:slow")
        assert await client.push(join_ref, "room:slow", "shout", 0) == OK
        assert await heard() == ("from:room:slow:shout", b"0")
        proxy.delay_s = 0.3
        assert await client.push(join_ref, "room:slow", "shout", 1) == OK
        assert await heard() == ("from:room:slow:shout", b"1")
        proxy.delay_s = 4.0  # beyond the time limit: the client is told no, though Redis may have taken it
        assert await client.push(join_ref, "room:slow", "shout", 2) == UNAVAILABLE
        proxy.delay_s = 0.0
        async with asyncio.timeout(20):
            while await client.push(join_ref, "room:slow", "shout", 3) != OK:  # noqa: ASYNC110 - what was late still comes
                await asyncio.sleep(0.05)
        heard_now = [await heard()]
        while heard_now[-1][1] != b"3":
            heard_now.append(await heard())
        assert [payload for _, payload in heard_now] in ([b"2", b"3"], [b"3"]), "never twice"


async def test_push_that_a_full_redis_refuses_gets_an_error(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """A Redis that is full still takes PUBLISH, which stores nothing; what stands before one may refuse it."""
    refusal = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    async with Proxy.open(server.port) as proxy:
        served = await serve_relay(redis_url=f"redis://127.0.0.1:{proxy.port}", redis=FAST)
        client = await connect(served)
        join_ref = await client.join("room:full")
        assert await client.push(join_ref, "room:full", "shout") == OK
        proxy.rewrite = lambda data: refusal if data == b":0\r\n" else data
        assert await client.push(join_ref, "room:full", "shout") == UNAVAILABLE
        assert served.relay.metrics.refused == {"bus unavailable": 1}
        await command(server.url, "PUBLISH", "to:room:full:tick", "1")
        await client.expect_event("room:full", "tick", 1)
        assert await is_ready(served)
        proxy.rewrite = bytes
        assert await client.push(join_ref, "room:full", "shout") == OK
    assert served.relay.metrics.gaps == 0


async def test_full_redis_takes_pushes_and_hands_them_on(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    served = await serve_relay(redis_url=server.url, redis=FAST)
    client = await connect(served)
    join_ref = await client.join("room:full")
    await command(server.url, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    await command(server.url, "CONFIG", "SET", "maxmemory", "1mb")
    with pytest.raises(Exception, match="OOM|command not allowed"):
        await command(server.url, "SET", "key", "x" * 100)
    async with heard_on(server.url, "from:*") as heard:
        answer = await client.push(join_ref, "room:full", "shout", 1)
        assert answer == OK
        assert await heard() == ("from:room:full:shout", b"1")
    assert served.relay.metrics.gaps == 0


async def test_password_rotated_away_and_back(
    serve_relay: ServeRelay, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """A rotated password ends no connection by itself; the next one fails with it, and heals with the right one."""
    caplog.set_level(logging.DEBUG)
    with Valkey("--requirepass", "old-secret") as server:
        old, new = (f"redis://:{word}@127.0.0.1:{server.port}" for word in ("old-secret", "new-secret"))
        served = await serve_relay(redis_url=old, redis=FAST)
        client = await connect(served)
        async with Ticker.run(old, "room:turn") as ticker, Witness.run(client, "room:turn") as witness:
            await witness.progress()
            await command(old, "CONFIG", "SET", "requirepass", "new-secret")
            await witness.progress()
            assert served.relay.metrics.gaps == 0
            ticker.url = new
            await command(new, "CLIENT", "KILL", "TYPE", "pubsub")
            await eventually(lambda: "password" in served.relay.link.reason, "the reason")
            reason = await until_ready(served, False)
            await command(new, "CONFIG", "SET", "requirepass", "old-secret")
            ticker.url = old
            await command(old, "CLIENT", "KILL", "TYPE", "normal")
            await witness.until(lambda: witness.joins > 1)
            await witness.progress()
            _ = witness.check(ticker)
    assert served.relay.metrics.gaps == len(witness.told) == 1
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("relay", "uvicorn"))]
    assert ours
    for text in (*ours, reason):
        assert "-secret" not in text


# TLS.


def tls_servers() -> list[str]:
    """What speaks TLS: a proxy before Valkey, on any machine, and the machine's own Redis where there is one."""
    return ["proxy", *redis_servers()[:1]]


@pytest.mark.parametrize("kind", tls_servers(), ids=lambda kind: kind.rpartition("/")[2])
async def test_tls_certificate_is_checked(
    serve_relay: ServeRelay, connect: Connect, tmp_path: Path, kind: str, valkey: Valkey
) -> None:
    """One that nobody vouches for, or that is another's, is a reason in ``/ready``; a good one serves."""
    good, other = Authority(tmp_path / "good"), Authority(tmp_path / "other")
    async with AsyncExitStack() as stack:
        if kind == "proxy":
            target = valkey.port
            port = (await stack.enter_async_context(Proxy.open(target, tls=good.context()))).port
            wrong = (await stack.enter_async_context(Proxy.open(target, tls=good.context("redis.example")))).port
        else:
            port, wrong = (start_tls(stack, kind, good, name) for name in ("127.0.0.1", "redis.example"))
        for address, authority, fault in (
            (port, other.path, "certificate verify failed"),
            (wrong, good.path, "certificate verify failed"),
        ):
            url = f"rediss://127.0.0.1:{address}?ssl_ca_certs={authority}"
            served = await serve_relay(redis_url=url, redis=FAST)
            reason = await until_ready(served, False)
            assert fault in reason
            client = await connect(served)
            await client.send("1", "1", "room:tls", "phx_join", {})
            assert await client.receive() == client.refusal("1", "1", "room:tls", "bus unavailable")
        served = await serve_relay(redis_url=f"rediss://127.0.0.1:{port}?ssl_ca_certs={good.path}", redis=FAST)
        await until_ready(served)
        client = await connect(served)
        join_ref = await client.join("room:tls")
        assert await client.push(join_ref, "room:tls", "shout") == OK
        await served.relay.broadcast("room:tls", "tick", 1)
        await client.expect_event("room:tls", "tick", 1)


def start_tls(stack: AsyncExitStack, binary: str, authority: Authority, name: str) -> int:
    """Start the machine's Redis with a certificate; returns its TLS port."""
    certificate, key = authority.server(name)
    port = free_port()
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(authority.path))
    server = Valkey("--tls-port", str(port), *files, "--tls-auth-clients", "no", binary=binary)
    stack.enter_context(server)
    return port


# Sentinel.


async def test_failover_by_sentinel(serve_relay: ServeRelay, connect: Connect) -> None:
    """Three Sentinels, a master, its replica; the master is killed, and then the new one gives up its office."""
    with Sentinels(password="the-secret") as sentinels:
        served = await serve_relay(redis_url=sentinels.url, redis=FAST)
        client = await connect(served)
        ports = sentinels.master.port, sentinels.replica.port
        urls = [f"redis://:the-secret@127.0.0.1:{port}" for port in ports]
        async with Ticker.run(urls[0], "room:fail") as ticker, Witness.run(client, "room:fail") as witness:
            await witness.progress()
            sentinels.master.kill()
            reason = await until_ready(served, False)
            assert "the-secret" not in reason
            await asyncio.to_thread(wait_for, lambda: sentinels.master_port() == ports[1], "the failover")
            ticker.url = urls[1]
            await witness.until(lambda: witness.joins > 1)
            await witness.progress()
            assert await client_push(served, connect) == OK
            async with publishing(served.relay.config) as publish:
                assert (await publish([("room:nobody", "tick", b"1")])).listening == 1, "`relay publish` does too"
            _ = witness.check(ticker)
        assert served.relay.metrics.gaps == len(witness.told) == 1
        metrics = (await http_get(f"{served.http}/metrics"))[1]
        assert metric(metrics, "relay_link_live") == 1


async def client_push(served: Served, connect: Connect) -> Any:
    """A push by a client of its own."""
    client = await connect(served)
    return await client.push(await client.join("room:push"), "room:push", "shout")
