"""Histories under faults: a client that is told that it recovered has received each event once and in order."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from relay.channels import history as history_module
from relay.config_sections import Direction
from tests.support.faults import Proxy
from tests.support.follower import Follower, Source, progress
from tests.support.process import Valkey, wait_for
from tests.support.serving import Served, eventually

ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

FAST = {"backoff_min_s": 0.01, "backoff_max_s": 0.05, "ping_interval_s": 0.5, "ping_timeout_s": 5.0, "timeout_s": 10.0}
LIMITS = {"joins_per_s": 0, "pushes_per_s": 0, "sockets_per_address": 0, "handshakes_per_s": 0}
TOPIC = "room:1"


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


@pytest.fixture
def server() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


class Run:
    """Relays on one Redis, followers of one topic, and publishers on each relay."""

    def __init__(self, server: Valkey, relays: list[Served], followers: list[Follower], source: Source) -> None:
        self.server = server
        self.relays = relays
        self.followers = followers
        self.source = source
        self.random = random.Random(1)

    async def command(self, *words: str) -> Any:
        async with Redis(port=self.server.port) as redis:
            execute: Any = redis.execute_command
            return await execute(*words)


async def run_with(
    serve_relay: ServeRelay,
    server: Valkey,
    fault: Callable[[Run], Coroutine[Any, Any, None]],
    *,
    url: str = "",
    relays: int = 2,
    followers: int = 12,
    size: int = 100_000,
    rounds: int = 3,
) -> Run:
    """Have a fault occur again and again while events flow, then check what the followers got."""
    settings = {
        "redis_url": url or server.url,
        "redis": FAST,
        "limits": LIMITS | {"recover_max_events": 100_000},
        "topics": [{"match": "*", "history": {"size": size, "ttl_s": 60}}],
    }
    served = [await serve_relay(**settings) for _ in range(relays)]
    urls = [each.ws for each in served]
    source = Source()

    async def publish(at: int, payload: bytes) -> None:
        await served[at].relay.node.pubsub.publish(Direction.TO, TOPIC, "tick", payload)

    async with Follower.run(urls, TOPIC, followers) as following:
        run = Run(server, served, following, source)
        async with source.run(partial(publish, 0)), source.run(partial(publish, -1)):
            await progress(following)
            for _ in range(rounds):
                await fault(run)
                await progress(following)
        for follower in following:
            follower.check(source)
    assert sum(len(chain) for follower in following for chain in follower.chains) > 0
    return run


async def cut_clients(run: Run) -> None:
    for follower in run.random.sample(run.followers, len(run.followers) // 2):
        follower.cut()


async def cut_links(run: Run) -> None:
    """Every connection of the relays to Redis, while clients come and go."""
    await cut_clients(run)
    await run.command("CLIENT", "KILL", "TYPE", run.random.choice(["normal", "pubsub"]))
    await asyncio.sleep(run.random.random() / 20)
    await run.command("CLIENT", "KILL", "TYPE", "pubsub")
    await cut_clients(run)


async def test_clients_that_are_cut_lose_nothing(serve_relay: ServeRelay, server: Valkey) -> None:
    run = await run_with(serve_relay, server, cut_clients, rounds=10)
    assert sum(follower.recovered for follower in run.followers) >= 30
    assert all(list(follower.lost) == ["asked for nothing"] for follower in run.followers)


async def test_links_that_are_cut_lose_nothing_and_no_client_has_to_rejoin(
    serve_relay: ServeRelay, server: Valkey
) -> None:
    run = await run_with(serve_relay, server, cut_links, rounds=10)
    assert all(list(follower.lost) == ["asked for nothing"] for follower in run.followers)
    assert sum(served.relay.metrics.gaps for served in run.relays) >= 10
    assert sum(served.relay.metrics.rejoins_requested for served in run.relays) == 0


async def test_flushed_history_is_not_claimed(serve_relay: ServeRelay, server: Valkey) -> None:
    async def flush(run: Run) -> None:
        await cut_clients(run)
        await run.command("FLUSHALL")
        await cut_clients(run)

    run = await run_with(serve_relay, server, flush, rounds=5)
    assert all(follower.lost["unknown position"] > 0 for follower in run.followers)


async def test_restart_of_redis_without_persistence_is_not_claimed(serve_relay: ServeRelay, server: Valkey) -> None:
    async def restart(run: Run) -> None:
        run.server.kill()
        await cut_clients(run)
        await asyncio.to_thread(run.server.start)

    run = await run_with(serve_relay, server, restart)
    assert all(follower.lost["unknown position"] > 0 for follower in run.followers)


async def test_clock_of_redis_that_steps_back_does_no_harm(serve_relay: ServeRelay, server: Valkey) -> None:
    """An entry from the future stands for a clock that has stepped back since."""

    script = """
    local ms, n = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1][1]:match('(%d+)-(%d+)')
    local id = string.format('%.0f-%.0f', ms + 3600000, n + 1)
    return redis.call('XADD', KEYS[1], id, 'e', 'other', 'd', '{}', 'z', '0')
    """

    async def step(run: Run) -> None:
        await run.command("EVAL", script, "1", f"topic:{TOPIC}")
        await cut_clients(run)

    # The entry itself is announced to nobody: it is the hole that the next event shows.
    run = await run_with(serve_relay, server, step, relays=1, rounds=1)
    assert run.relays[0].relay.metrics.history_holes >= 1


async def test_cut_longer_than_the_history_leaves_no_mark(serve_relay: ServeRelay, server: Valkey) -> None:
    """Eight relays come back to a history that has gone on without them: younger positions are recovered."""

    async def outage(run: Run) -> None:
        await run.command("CLIENT", "PAUSE", "1")
        for _ in range(20):
            await run.command("CLIENT", "KILL", "TYPE", "pubsub")
            await asyncio.sleep(0.02)

    run = await run_with(serve_relay, server, outage, relays=8, followers=8, size=20, rounds=2)
    async with Redis(port=server.port) as redis:
        rows: Any = await redis.xrange(f"topic:{TOPIC}")
    assert not [row for row in rows if b"m" in row[1]]
    assert run.followers


@pytest.mark.parametrize("relays", [2, 8])
async def test_promotion_of_a_lagging_replica_is_not_claimed(
    serve_relay: ServeRelay, server: Valkey, relays: int
) -> None:
    """Acknowledged events are lost that relays have heard: one mark stands for it, and no older position counts."""
    async with Proxy.open(server.port) as replication, Proxy.open(server.port) as front:
        with Valkey("--replicaof", f"127.0.0.1 {replication.port}", "--repl-diskless-sync-delay", "0") as replica:
            await asyncio.to_thread(wait_for, lambda: is_linked(replica), "the replica")

            async def promote(run: Run) -> None:
                replication.delay_s = 60.0
                await progress(run.followers)
                await cut_clients(run)
                server.kill()
                async with Redis(port=replica.port) as redis:
                    await redis.execute_command("REPLICAOF", "NO", "ONE")  # type: ignore[no-untyped-call]
                front.targets[:] = [replica.port]
                await cut_clients(run)

            url = f"redis://127.0.0.1:{front.port}"
            run = await run_with(serve_relay, server, promote, url=url, relays=relays, followers=16, rounds=1)
            async with Redis(port=replica.port) as redis:
                rows: Any = await redis.xrange(f"topic:{TOPIC}")
    assert len([row for row in rows if b"m" in row[1]]) == 1
    for follower in run.followers:
        assert follower.lost["unknown position"] + follower.lost["history forked"] >= 1


def is_linked(replica: Valkey) -> bool:
    with SyncRedis(port=replica.port) as redis:
        return str(redis.info("replication").get("master_link_status")) == "up"


async def test_silent_topic_keeps_its_positions(
    serve_relay: ServeRelay, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times as long as events are kept: nobody has to rejoin, and a rejoin is recovered."""
    monkeypatch.setattr(history_module, "CHECK_MIN_S", 0.2)
    monkeypatch.setattr(history_module, "CHECK_MAX_S", 0.3)
    served = await serve_relay(
        redis_url=server.url, redis=FAST, topics=[{"match": "*", "history": {"size": 10, "ttl_s": 1}}]
    )
    source = Source()
    async with Follower.run([served.ws], TOPIC, 2) as followers:
        await eventually(lambda: all(follower.since for follower in followers), "the joins")
        await served.relay.publish(TOPIC, "tick", {"p": 0, "k": 0})
        await progress(followers, 1)
        checks = served.relay.metrics.history_checks
        await eventually(lambda: served.relay.metrics.history_checks >= checks + 12, "three seconds' checks")
        async with Redis(port=server.port) as redis:
            assert await redis.ttl(f"topic:{TOPIC}") > 200, "the stream lives while somebody is subscribed"
        for follower in followers:
            follower.cut()
        await eventually(lambda: all(follower.recovered for follower in followers), "the rejoins")
        for follower in followers:
            follower.check(source)
            assert list(follower.lost) == ["asked for nothing"]
    assert served.relay.metrics.rejoins_requested == 0


async def test_event_that_was_not_heard_is_found_by_a_check(
    serve_relay: ServeRelay, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that no message has announced, as after a demotion of the master that a subscriber stays on."""
    monkeypatch.setattr(history_module, "CHECK_MIN_S", 0.2)
    monkeypatch.setattr(history_module, "CHECK_MAX_S", 0.3)
    served = await serve_relay(
        redis_url=server.url, redis=FAST, topics=[{"match": "*", "history": {"size": 10, "ttl_s": 60}}]
    )
    async with Follower.run([served.ws], TOPIC, 2) as followers:
        await eventually(lambda: all(follower.since for follower in followers), "the joins")
        await served.relay.publish(TOPIC, "tick", {"p": 0, "k": 0})
        await progress(followers, 1)
        async with Redis(port=server.port) as redis:
            newest: Any = await redis.xrevrange(f"topic:{TOPIC}", count=1)
            last = newest[0][0].decode()
            ms, _, n = last.partition("-")
            await redis.xadd(f"topic:{TOPIC}", {"e": "tick", "d": '{"p":0,"k":1}', "z": "99"}, id=f"{ms}-{int(n) + 1}")
        await progress(followers, 1)
    assert served.relay.metrics.history_catch_ups == {"check": 1}


@pytest.mark.parametrize("bus_is_cut", [False, True])
async def test_redis_that_is_cut_at_each_step_of_a_join(
    serve_relay: ServeRelay, server: Valkey, bus_is_cut: bool
) -> None:
    """The connection ends at the first answer of Redis after the join, at the second, and so on."""
    async with Proxy.open(server.port) as front:
        answers = 0
        cut_at = 0

        def count(data: bytes) -> bytes:
            nonlocal answers
            answers += 1
            if answers == cut_at or (bus_is_cut and answers == cut_at + 1):
                raise ConnectionResetError
            return data

        async def cut(run: Run) -> None:
            nonlocal answers, cut_at
            for follower in run.followers:
                follower.cut()
            answers, cut_at = 0, cut_at + 1

        front.rewrite = count
        url = f"redis://127.0.0.1:{front.port}"
        run = await run_with(serve_relay, server, cut, url=url, relays=1, followers=3, rounds=25)
    for follower in run.followers:
        # What is read of the history is read a second time.
        assert set(follower.lost) <= {"asked for nothing", *(["history unavailable"] if bus_is_cut else [])}
        assert follower.recovered >= 20
