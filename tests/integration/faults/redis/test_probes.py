"""Hearing is proved, not the connection: connections that lead elsewhere, or nowhere, are found by probes."""

import asyncio
import time

import pytest
from redis import Redis

from relay.brokers.base import Event
from relay.config_sections import Direction
from tests.support.faults import Proxy
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.redis_faults import (
    Connect,
    ServeRelay,
)
from tests.support.redis_link import (
    NOTICED_S,
    PATIENT,
    Switch,
    ask,
    broker_on,
    outcome,
    within,
)
from tests.support.serving import eventually


async def test_connections_that_lead_to_two_masters_are_found_by_a_probe(server: Valkey) -> None:
    """A proxy moves one of the two: both answer, both are masters, and nothing that is published is heard."""
    with Valkey() as other:
        async with Switch.open(server.port) as proxy, broker_on(proxy.url) as (broker, sink, m):
            await broker.publish(Direction.TO, "room", "e", b"1")
            await sink.expect(Event("room", "e", b"1"))
            proxy.targets = lambda number: other.port
            since = time.monotonic()
            proxy.link(b"PUBLISH")["writer"].transport.abort()  # and the next leads elsewhere
            await eventually(lambda: len(proxy.links) > 2, "the connection for pushes")
            await within(lambda: not broker.link.live, "the unheard probe", since)
            await eventually(lambda: broker.link.live, "the link")
            assert m.gaps == 1
            await broker.publish(Direction.TO, "room", "e", b"2")
            await eventually(lambda: Event("room", "e", b"2") in sink.events, "an event at the other master")


async def test_link_that_was_doubted_is_live_only_after_a_probe(server: Valkey) -> None:
    """While the two go on to lead elsewhere there is one gap to be told, not one after the other."""
    with Valkey() as other:
        async with Switch.open(server.port) as proxy, broker_on(proxy.url) as (broker, sink, m):
            await eventually(lambda: len(proxy.links) == 2, "both connections")
            ports: dict[int, int] = {}

            def split(number: int) -> int:  # the odd ones to the other server
                return ports.setdefault(number, (server.port, other.port)[number % 2])

            proxy.targets = split
            for link in proxy.links:
                link["writer"].transport.abort()
            await eventually(lambda: "a probe that was published did not come back" in broker.link.reason, "the reason")
            proxy.targets = lambda number: server.port
            await eventually(lambda: broker.link.live, "the link")
            assert m.gaps <= 2
            assert len(sink.gaps) == m.gaps


async def test_probe_passes_from_a_master_to_a_subscription_on_its_replica(server: Valkey, replica: Valkey) -> None:
    """A proxy moves the subscription to a replica: what is published at the master is heard there."""
    async with (
        Switch.open(server.port) as proxy,
        broker_on(f"redis://127.0.0.1:{proxy.port}", ping_timeout_s=1.0 * PATIENCE) as (broker, sink, metrics),
    ):
        await eventually(lambda: len(proxy.links) == 2, "both connections")
        proxy.targets = lambda number: replica.port
        proxy.link(b"PSUBSCRIBE")["writer"].transport.abort()
        await eventually(lambda: metrics.gaps == 1 and broker.link.live, "the gap")
        proxy.targets = lambda number: server.port
        assert not broker.refusal
        await asyncio.sleep(2 * NOTICED_S)  # several probes
        assert metrics.gaps == 1
        await broker.publish(Direction.TO, "room", "e", b"1")
        await sink.expect(Event("room", "e", b"1"))
        since = time.monotonic()
        ask(replica, "REPLICAOF", "127.0.0.1", "1")
        await within(lambda: metrics.gaps == 2 or not broker.link.live, "the cut replication", since)
        await eventually(lambda: broker.link.live, "the link")


@pytest.mark.parametrize("command", [b"PSUBSCRIBE", b"PUBLISH"])
async def test_connection_that_a_nat_has_forgotten_is_found_before_it_is_needed(server: Valkey, command: bytes) -> None:
    """Nothing is pushed for a while, and one of the two connections swallows what is sent; no end is told."""
    async with (
        Switch.open(server.port) as proxy,
        broker_on(f"redis://127.0.0.1:{proxy.port}") as (broker, sink, metrics),
    ):
        await broker.publish(Direction.TO, "room", "e", b"0")
        await sink.expect(Event("room", "e", b"0"))
        before = len(proxy.links)
        since = time.monotonic()
        proxy.link(command)["deaf"] = True
        await within(lambda: len(proxy.links) > before, "a new connection", since)
        await eventually(lambda: broker.link.live, "the link")
        started = time.monotonic()
        assert await outcome(broker.publish(Direction.TO, "room", "e", b"1")) == "ok"
        assert time.monotonic() - started < 3 * PATIENCE
        await eventually(lambda: sink.events[-1:] == [Event("room", "e", b"1")], "the event")
        assert metrics.gaps == (1 if command == b"PSUBSCRIBE" else 0)


async def test_idle_link_and_busy_link_ask_no_more_than_they_say(server: Valkey) -> None:
    """One ROLE and one probe per interval while nothing comes; no probe while events flow."""

    def count(name: str) -> int:
        with Redis(port=server.port) as redis:
            return int(redis.info("commandstats").get(f"cmdstat_{name}", {}).get("calls", 0))

    async with broker_on(server.url, ping_interval_s=0.3, ping_timeout_s=3.0) as (broker, sink, metrics):
        await eventually(lambda: count("role") == 2, "both roles")
        started, role, publish = time.monotonic(), count("role"), count("publish")
        await eventually(lambda: count("publish") >= publish + 4, "probes")
        intervals = (time.monotonic() - started) / 0.3
        assert count("role") - role <= intervals + 1
        assert count("publish") - publish <= intervals + 1
        started, taken = time.monotonic(), 0
        publish = count("publish")
        while time.monotonic() - started < 1.5:
            await broker.publish(Direction.TO, "room", "e", b"1")
            taken += 1
            await asyncio.sleep(0.01)
        assert count("publish") - publish - taken <= 1, "the one that was under way"
        assert metrics.gaps == 0


async def test_probe_alone_finds_a_dead_connection_where_ping_is_not_allowed(server: Valkey) -> None:
    ask(server, "ACL", "SETUSER", "relay", "on", ">pw", "allchannels", "-@all", "+psubscribe", "+publish")
    async with Switch.open(server.port) as proxy:
        url = f"redis://relay:pw@127.0.0.1:{proxy.port}"
        async with broker_on(url, ping_timeout_s=1.0 * PATIENCE) as (broker, _, metrics):
            await asyncio.sleep(2 * NOTICED_S)
            assert metrics.gaps == 0
            since = time.monotonic()
            proxy.link(b"PSUBSCRIBE")["deaf"] = True
            await within(lambda: metrics.gaps or not broker.link.live, "the dead connection", since)
            await eventually(lambda: broker.link.live, "the link")


@pytest.mark.parametrize("control", ["relay:control", ""])
async def test_probes_are_neither_events_nor_control_messages(server: Valkey, control: str) -> None:
    """Of this node and of others; on the control channel, or where there is none on one that the pattern matches."""
    settings = {"control_channel": control, "ping_interval_s": 0.1, "ping_timeout_s": 3.0}
    async with broker_on(server.url, **settings) as (one, ours, m), broker_on(server.url, **settings) as (_, theirs, _):
        with Redis(port=server.port) as redis:
            before = (
                redis.info("commandstats")["cmdstat_publish"]["calls"]
                if "cmdstat_publish" in redis.info("commandstats")
                else 0
            )
            await eventually(
                lambda: redis.info("commandstats").get("cmdstat_publish", {"calls": 0})["calls"] > before + 6, "probes"
            )
        assert not (ours.events or theirs.events or ours.control_messages or theirs.control_messages)
        assert not m.dropped
        assert one.link.live


async def test_error_that_answers_a_ping_is_a_sign_of_life(server: Valkey) -> None:
    """``BUSY``, ``LOADING``: a reply that is an error is not a lost link."""
    async with Proxy.open(server.port) as proxy:
        async with broker_on(f"redis://127.0.0.1:{proxy.port}", **PATIENT | {"ping_interval_s": 0.2}) as (
            broker,
            sink,
            m,
        ):
            pong = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"
            proxy.rewrite = lambda data: data.replace(pong, b"-BUSY Redis is busy running a script.\r\n")
            await asyncio.sleep(1.5)
            assert broker.link == (True, "")
            assert m.gaps == 0
            await broker.publish(Direction.TO, "room", "e", b"1")
            await sink.expect(Event("room", "e", b"1"))


async def test_reserved_topic_cannot_be_joined(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay()
    client = await connect(served)
    await client.send("1", "1", "relay", "phx_join", {})
    assert await client.receive() == client.refusal("1", "1", "relay", "invalid topic")
