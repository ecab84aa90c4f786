"""The master changes: by a failover of Sentinel, or of a server whose connections stay.

Each loss is noticed within ``ping_interval_s + 2 × ping_timeout_s``, and no push is answered ``ok`` where the relay
knows that the master's clients do not get it.
"""

import asyncio
import time
from typing import Any

import pytest
from redis.asyncio import Redis as AsyncRedis

from relay import AsyncPublisher, Publisher
from relay.brokers.base import Event
from relay.config_sections import Direction
from tests.support.faults import Sentinels
from tests.support.patience import PATIENCE
from tests.support.process import Valkey, free_port, wait_for
from tests.support.redis_faults import (
    FAST,
    OK,
    UNAVAILABLE,
    Connect,
    ServeRelay,
    until_not_ready,
)
from tests.support.redis_link import (
    NOTICED_S,
    WATCHFUL,
    ask,
    become_replica,
    broker_on,
    is_linked,
    outcome,
    within,
)
from tests.support.serving import Served, eventually, http_get, metric
from tests.support.witness import Ticker, Witness

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
            reason = await until_not_ready(served)
            assert "the-secret" not in reason
            await asyncio.to_thread(wait_for, lambda: sentinels.master_port() == ports[1], "the failover")
            ticker.url = urls[1]
            await witness.until(lambda: witness.joins > 1)
            await witness.progress()
            assert await client_push(served, connect) == OK
            async with AsyncPublisher(served.relay.config) as publisher:
                assert (await publisher.publish("room:nobody", "tick", 1)).listening == 1, "`relay publish` does too"
            with Publisher(served.relay.config) as publisher:
                assert publisher.publish("room:nobody", "tick", 1).listening == 1
            _ = witness.check(ticker)
        assert served.relay.metrics.gaps == len(witness.told) == 1
        metrics = (await http_get(f"{served.http}/metrics"))[1]
        assert metric(metrics, "relay_link_live") == 1


async def client_push(served: Served, connect: Connect) -> Any:
    """A push by a client of its own."""
    client = await connect(served)
    return await client.push(await client.join("room:push"), "room:push", "shout")


# The server's role.


async def test_master_that_becomes_a_replica_under_load_is_a_gap(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """``REPLICAOF`` while events flow; connections stay. Afterwards it hears the new master, and refuses pushes."""
    with Valkey() as other:
        served = await serve_relay(redis_url=server.url, redis=WATCHFUL)
        client = await connect(served)
        async with Ticker.run(server.url, "room:role") as ticker, Witness.run(client, "room:role") as witness:
            await witness.progress()
            since = time.monotonic()
            await asyncio.to_thread(become_replica, server, other)
            await within(lambda: served.relay.metrics.gaps or not served.relay.link.live, "the change of role", since)
            await asyncio.to_thread(wait_for, lambda: is_linked(server), "the replica")
            ticker.url = other.url
            await eventually(lambda: served.relay.metrics.gaps and served.relay.link.live, "the link")
            await witness.until(lambda: witness.joins > 1)
            assert len(witness.told) >= 1
            pusher = await connect(served)
            join_ref = await pusher.join("room:push")
            assert await pusher.push(join_ref, "room:push", "shout") == UNAVAILABLE
            _, metrics = await http_get(f"{served.http}/metrics")
            assert metric(metrics, "relay_link_live") == 1
            assert metric(metrics, "relay_link_pushes") == 0
            async with AsyncRedis.from_url(other.url) as redis:
                await redis.publish("to:room:push:tick", 1)
            await pusher.expect_event("room:push", "tick", 1)
        # When it is a master again, pushes are taken.
        ask(server, "REPLICAOF", "NO", "ONE")
        async with asyncio.timeout(20):
            while (answer := await pusher_answer(served, connect)) != OK:
                assert answer == UNAVAILABLE


async def pusher_answer(served: Served, connect: Connect) -> Any:
    client = await connect(served)
    ref = client.next_ref()
    await client.send(ref, ref, "room:again", "phx_join", {})
    if (await client.receive())[4]["status"] != "ok":
        return UNAVAILABLE
    return await client.push(ref, "room:again", "shout")


async def test_failover_with_connections_kept_and_replication_cut_after_it(server: Valkey, replica: Valkey) -> None:
    """``FAILOVER`` makes the two change places. Then the new master goes: no event can come, and it says so."""
    async with broker_on(server.url) as (broker, sink, metrics):
        assert await outcome(broker.publish(Direction.FROM, "room", "e", b"1")) == "ok"
        since = time.monotonic()
        await asyncio.to_thread(ask, server, "FAILOVER")
        await asyncio.to_thread(wait_for, lambda: is_linked(server), "the failover")
        await within(lambda: metrics.gaps == 1 and broker.link.live and broker.refusal, "the gap", time.monotonic())
        assert time.monotonic() - since < 20 * PATIENCE
        assert "is a replica" in await outcome(broker.publish(Direction.FROM, "room", "e", b"2"))
        ask(replica, "PUBLISH", "to:room:e", "3")
        await eventually(lambda: Event("room", "e", b"3") in sink.events, "an event from the new master")
        since = time.monotonic()
        replica.kill()
        await within(lambda: not broker.link.live, "the loss of the master", since)
        await eventually(
            lambda: broker.link.reason.startswith("the server is a replica that has lost its master"), "the reason"
        )
        ask(server, "REPLICAOF", "NO", "ONE")
        await eventually(lambda: broker.link.live and not broker.refusal, "the link")
        assert await outcome(broker.publish(Direction.TO, "room", "e", b"4")) == "ok"
        await eventually(lambda: Event("room", "e", b"4") in sink.events, "the last event")


async def test_replica_given_by_address_is_heard_and_takes_no_pushes(
    server: Valkey, replica: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader endpoint: heard while it is linked, with a warning; not live when it is not."""
    async with broker_on(replica.url, ping_timeout_s=1.0 * PATIENCE) as (broker, sink, metrics):
        await eventually(lambda: broker.refusal, "the role")
        assert broker.link == (True, "")
        for publish in (broker.publish(Direction.FROM, "room", "e", b"1"), broker.publish_control(b"{}")):
            assert "is a replica: what is published there does not reach its master's clients" in await outcome(publish)
        assert "is a replica; pushes are refused" in caplog.text
        await asyncio.sleep(2 * NOTICED_S)  # as long as it would take to mistake something for a loss
        assert metrics.gaps == 0
        ask(server, "PUBLISH", "to:room:e", "2")
        await sink.expect(Event("room", "e", b"2"))
        since = time.monotonic()
        server.kill()
        await within(lambda: not broker.link.live, "the loss of the master", since)
        await eventually(
            lambda: broker.link.reason.startswith("the server is a replica that has lost its master"), "the reason"
        )
        await asyncio.to_thread(server.start)
        await eventually(lambda: broker.link.live, "the link")
        assert metrics.gaps == 1


async def test_replica_of_a_master_that_is_not_there_is_not_live(server: Valkey) -> None:
    ask(server, "REPLICAOF", "127.0.0.1", str(free_port()))
    async with broker_on(server.url) as (broker, _, metrics):
        assert not broker.link.live
        assert broker.link.reason.startswith("the server is a replica that has lost its master")
        assert metrics.gaps == 0
