"""The contract of every presence store: Redis on a real server, and memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from relay import Config
from relay.brokers.base import PRESENCE_CHANNEL, Lease, Numbering, OwnChange, PresenceStore
from relay.brokers.memory_presence import MemoryPresence, SharedPresence
from relay.brokers.redis import RedisBroker
from relay.metrics import Metrics
from relay.protocol.presence import Difference, Member
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.serving import eventually
from tests.support.sink import Sink

LEASE_S = 0.5 * PATIENCE
NOTHING_GONE: dict[str, Member] = {}
ADA = Member("00a1", "ada", b'{"n":9007199254740993}')
BOB = Member("00b2", "bob", b'{"text":"\xc3\xa9"}', "00b1")


class World:
    """Two nodes, and what has been published."""

    def __init__(self, stores: list[PresenceStore], messages: Callable[[], list[bytes]]) -> None:
        self.one, self.two = stores
        self.messages = messages
        self.topic = f"room:{uuid4().hex}"
        self._numbers = dict.fromkeys(stores, 0)

    def joins(self, *members: Member) -> list[OwnChange]:
        return [OwnChange(self.topic, Difference({member.ref: member for member in members}, {}), False)]

    def leaves(self, *members: Member, is_empty: bool = False) -> list[OwnChange]:
        return [OwnChange(self.topic, Difference({}, {member.ref: member for member in members}), is_empty)]

    async def write(self, store: PresenceStore, changes: list[OwnChange], message: bytes) -> bool:
        """As a node does: numbered."""
        known = self._numbers[store]
        self._numbers[store] += 1
        return await store.write(changes, message, Numbering(known + 1, known))

    async def renew(self, store: PresenceStore, message: bytes = b"") -> Lease:
        return await store.renew(message, self._numbers[store], is_new=not self._numbers[store])

    async def read(self, store: PresenceStore) -> dict[str, Member] | None:
        return await self.one.read(self.topic, store.node, 0)


@asynccontextmanager
async def on_redis(url: str) -> AsyncIterator[World]:
    config = Config(
        redis_url=url,
        topics=[{"match": "*", "presence": True}],
        presence={"lease_s": LEASE_S, "renew_s": LEASE_S / 2, "leave_delay_s": 0},
    )
    brokers = [RedisBroker(config, Metrics(), [PRESENCE_CHANNEL]) for _ in range(2)]
    sink = Sink()
    for broker in brokers:
        await broker.start(sink if broker is brokers[0] else Sink())
    stores: list[Any] = [broker.presence for broker in brokers]
    try:
        yield World(stores, lambda: [data for pattern, _, data in sink.messages if pattern == PRESENCE_CHANNEL])
    finally:
        for store in stores:
            await store.remove(store.node)
        for broker in brokers:
            await broker.stop()


@asynccontextmanager
async def in_memory() -> AsyncIterator[World]:
    shared, heard = SharedPresence(), list[bytes]()
    shared.listeners.append(heard.append)
    yield World([MemoryPresence(LEASE_S, shared), MemoryPresence(LEASE_S, shared)], lambda: heard)


@pytest.fixture(params=["redis", "redis, RESP3", "redis 6.2", "memory"])
def world(request: pytest.FixtureRequest, runner: asyncio.Runner, valkey: Valkey, old_server: Valkey) -> Any:
    urls = {"redis": valkey.url, "redis, RESP3": f"{valkey.url}?protocol=3", "redis 6.2": old_server.url}
    manager = on_redis(urls[request.param]) if request.param in urls else in_memory()
    yield runner.run(manager.__aenter__())
    runner.run(manager.__aexit__(None, None, None))


async def test_members_are_kept_verbatim_for_each_node(world: World) -> None:
    await world.write(world.one, world.joins(ADA), b"1")
    await world.write(world.two, world.joins(BOB), b"2")
    assert await world.read(world.one) == {ADA.ref: ADA}
    assert await world.read(world.two) == {BOB.ref: BOB}
    assert await world.one.read("room:other", world.one.node, 1) == {}


async def test_change_and_message_are_one_step(world: World) -> None:
    await world.write(world.one, world.joins(ADA, BOB), b"first")
    await eventually(lambda: b"first" in world.messages(), "the message")
    change = OwnChange(world.topic, Difference({}, {ADA.ref: ADA, "00ff": ADA}), False)
    await world.write(world.one, [change], b"second")
    assert await world.read(world.one) == {BOB.ref: BOB}
    await world.write(world.one, world.leaves(BOB, is_empty=True), b"third")
    assert await world.read(world.one) == {}
    await eventually(lambda: world.messages() == [b"first", b"second", b"third"], "the messages in order")


async def test_member_that_is_written_again_stays_one(world: World) -> None:
    for _ in range(2):
        await world.write(world.one, world.joins(ADA), b"1")
    assert await world.read(world.one) == {ADA.ref: ADA}


async def test_many_members_are_read_whole(world: World) -> None:
    many = [Member(f"{number:04x}", f"user {number}", b"{}") for number in range(2000)]
    await world.write(world.one, world.joins(*many), b"1")
    assert await world.read(world.one) == {member.ref: member for member in many}


async def test_topics_without_the_members_that_were_written_are_known(world: World) -> None:
    assert await world.write(world.two, world.joins(ADA), b"one")
    assert await world.two.lost([world.topic, "other"]) == ["other"]
    assert await world.write(world.two, world.leaves(ADA, is_empty=True), b"two")
    assert await world.two.lost([world.topic]) == [world.topic]


async def test_number_of_each_nodes_last_write_is_known(world: World) -> None:
    await world.write(world.one, world.joins(ADA), b"1")
    await world.write(world.one, world.joins(BOB), b"2")
    await world.one.write(world.joins(ADA), b"3", Numbering(7, 2, is_whole=False))
    await world.write(world.two, world.joins(BOB), b"1")
    nodes = [world.two.node, "no such node", world.one.node]
    assert await world.two.numbers(nodes) == [1, None, 7]
    assert await world.two.numbers([]) == []


async def test_lease_holds_until_its_end(world: World) -> None:
    assert not (await world.renew(world.one, b"first")).held, "there was none before"
    lease = await world.renew(world.one, b"second")
    assert lease.held
    assert 0 < lease.nodes[world.one.node] <= LEASE_S
    await eventually(lambda: world.messages() == [b"first", b"second"], "the messages")
    assert world.one.node in await world.two.nodes()
    await asyncio.sleep(1.2 * LEASE_S)
    assert world.one.node not in await world.two.nodes()
    lease = await world.renew(world.two, b"third")
    assert lease.nodes[world.one.node] < 0 < lease.nodes[world.two.node]
    assert not (await world.renew(world.one, b"fourth")).held


async def test_node_that_ends_leaves_nothing_behind(world: World) -> None:
    await world.write(world.one, world.joins(ADA), b"1")
    await world.write(world.two, world.joins(BOB), b"2")
    for store in (world.one, world.two):
        await world.renew(store)
    await world.one.remove(world.one.node, b"last")
    await eventually(lambda: b"last" in world.messages(), "the message")
    assert await world.read(world.one) is None
    assert await world.read(world.two) == {BOB.ref: BOB}
    assert world.one.node not in await world.two.nodes()


async def test_dead_node_is_removed_by_another(world: World) -> None:
    await world.write(world.one, world.joins(ADA), b"1")
    await world.renew(world.one)
    await world.two.remove(world.one.node)
    assert await world.read(world.one) is None
    assert world.one.node not in (await world.renew(world.two)).nodes


async def test_members_are_not_read_where_writes_are_missing(world: World) -> None:
    """A server was flushed, or its replica lags behind: what is left is not taken for all."""
    assert await world.read(world.one) is None
    assert not (await world.renew(world.one)).held
    assert await world.read(world.one) == {}, "it has none yet"
    assert await world.write(world.one, world.joins(ADA), b"1")
    assert await world.two.read(world.topic, world.one.node, 1) == {ADA.ref: ADA}
    assert await world.two.read(world.topic, world.one.node, 2) is None, "the second write is not there"
    assert (await world.renew(world.one)).held
    assert not (await world.one.renew(b"", 2, is_new=False)).held
    assert not await world.one.write(world.joins(BOB), b"3", Numbering(3, 2)), "nor is it now"
    assert await world.read(world.one) is None
    assert (await world.one.renew(b"", 3, is_new=False)).held


async def test_members_that_are_written_anew_are_read_when_all_are_there(world: World) -> None:
    await world.write(world.one, world.joins(ADA), b"1")
    await world.one.clear()
    assert await world.read(world.one) is None
    assert not (await world.one.renew(b"", 1, is_new=False)).held
    assert await world.read(world.one) is None
    assert await world.one.write(world.joins(BOB), b"2", Numbering(2, 0, is_whole=False))
    assert await world.read(world.one) is None
    assert await world.one.write([], b"3", Numbering(3, 2))
    assert await world.read(world.one) == {BOB.ref: BOB}
    assert await world.two.read(world.topic, world.one.node, 3) == {BOB.ref: BOB}


async def test_keys_of_redis_are_gone_with_the_last_member(valkey: Valkey) -> None:
    async with on_redis(valkey.url) as world, Redis(port=valkey.port) as redis:
        keys = (f"presence:{world.topic}|{world.one.node}", f"presence:|{world.one.node}")
        await world.write(world.one, world.joins(ADA), b"1")
        assert await redis.exists(*keys) == 2
        await world.write(world.one, world.leaves(ADA, is_empty=True), b"2")
        assert await redis.exists(*keys) == 0
