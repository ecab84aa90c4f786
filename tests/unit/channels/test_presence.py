"""`relay.channels.presence`: several nodes in one process, and a store that fails as it is told.

A model keeps the truth. Whatever was lost, sent twice, delayed or forgotten: after quiet of one lease, every node and
every client has the truth.
"""

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Sequence
from itertools import pairwise
from typing import Any

import pytest

from relay.brokers.base import Lease, Numbering, OwnChange
from relay.brokers.memory_presence import MemoryPresence, SharedPresence
from relay.channels.presence import Presence
from relay.config import Config
from relay.errors import BusUnavailable
from relay.log import RateLimitedLoggers
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.protocol.presence import Member
from relay.protocol.serializer import Version
from tests.support.clock import runner
from tests.support.transport import FakeTransport, read_frame

__all__ = ["runner"]

LEASE_S, RENEW_S, DELAY_S = 1.5, 0.5, 0.5
QUIET_S = 2 * LEASE_S + 2 * RENEW_S + DELAY_S + 1.5
"""With a second lease for nodes that all could not renew theirs, and what is written again after a second."""
TOPIC = "room:1"


def config(delay_s: float = DELAY_S, **topic: Any) -> Config:
    topics = [{"match": "room:*", **({"presence": True} | topic)}]
    return Config(topics=topics, presence={"lease_s": LEASE_S, "renew_s": RENEW_S, "leave_delay_s": delay_s})


class Store(MemoryPresence):
    """Fails where a test wants it."""

    is_away = False
    reads = 0
    fails_late = 0
    """So many writes are made and yet fail: the answer is lost."""

    async def write(self, changes: Sequence[OwnChange], message: bytes, numbering: Numbering) -> bool:
        self._check()
        is_kept = await super().write(changes, message, numbering)
        if self.fails_late:
            self.fails_late -= 1
            raise BusUnavailable("no answer")
        return is_kept

    async def clear(self) -> None:
        self._check()
        await super().clear()

    async def renew(self, message: bytes, known: int, *, is_new: bool) -> Lease:
        self._check()
        _ = await self.may_renew.wait()
        return await super().renew(message, known, is_new=is_new)

    async def read(self, topic: str, node: str, known: int) -> Any:
        self._check()
        self.reads += 1
        await asyncio.sleep(0.05)
        return await super().read(topic, node, known)

    async def numbers(self, nodes: Sequence[str]) -> list[int | None]:
        self._check()
        await asyncio.sleep(0.05)
        return await super().numbers(nodes)

    async def nodes(self) -> list[str]:
        self._check()
        return await super().nodes()

    async def remove(self, node: str, message: bytes = b"") -> None:
        self._check()
        await super().remove(node, message)

    def __init__(self, lease_s: float, shared: SharedPresence) -> None:
        super().__init__(lease_s, shared)
        self.may_renew = asyncio.Event()
        self.may_renew.set()

    def _check(self) -> None:
        if self.is_away:
            raise BusUnavailable("away")


class Client:
    """A channel whose client keeps the members as phoenix.js does."""

    version = Version.V2

    def __init__(self, name: str, topic: str = TOPIC) -> None:
        self.topic = topic
        self.name = name
        self.state: dict[str, set[str]] | None = None
        self.gone: list[str] = []
        """Keys that it saw leave."""
        self.diffs = 0
        self.count: int | None = None
        self.transport = _Transport(self)

    def take(self, frame: Frame) -> None:
        _, _, topic, event, payload = read_frame(frame)
        assert topic == self.topic
        if event == "presence_state":
            self.state = {key: _refs(entry) for key, entry in payload.items()}
        elif event == "presence_count":
            self.count = payload["count"]
        else:
            assert self.state is not None, "a difference before the state"
            self.diffs += 1
            for key, entry in payload["joins"].items():
                self.state[key] = self.state.get(key, set()) | _refs(entry)
            for key, entry in payload["leaves"].items():
                assert self.state[key] >= _refs(entry)
                self.state[key] -= _refs(entry)
                if not self.state[key]:
                    del self.state[key]
                    self.gone.append(key)

    @property
    def keys(self) -> set[str] | None:
        return None if self.state is None else set(self.state)


class _Transport(FakeTransport):
    def __init__(self, client: Client) -> None:
        super().__init__(client.name)
        self._client = client

    def send_control(self, frame: Frame) -> None:
        self._client.take(frame)


def _refs(entry: dict[str, Any]) -> set[str]:
    return {meta["phx_ref"] for meta in entry["metas"]}


class Node:
    """One node of a world, with its clients."""

    def __init__(self, shared: SharedPresence, settings: Config, loss: Callable[[], bool]) -> None:
        self._shared = shared
        self._loss = loss
        self.store = Store(LEASE_S, shared)
        self.metrics = Metrics()
        self._tasks: set[asyncio.Task[None]] = set()
        self.presence = Presence(
            settings,
            self.store,
            lambda: self.is_hearing,
            self._spawn,
            self.metrics,
            RateLimitedLoggers().get("relay.presence"),
        )
        self.clients: list[Client] = []
        self.is_stalled = False
        self.is_hearing = True
        shared.listeners.append(self._receive)
        self.presence.start()

    def _spawn(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _receive(self, message: bytes) -> None:
        if self.is_hearing and not self._loss():
            # Later, as on a network: not in the midst of what the sender does.
            asyncio.get_running_loop().call_soon(self.presence.receive, message)

    def enter(self, name: str, topic: str = TOPIC) -> Client:
        client = Client(name, topic)
        self.presence.track(client, name, b'{"n":1}')
        self.presence.watch(client)
        self.clients.append(client)
        return client

    def leave(self, client: Client) -> None:
        self.presence.unwatch(client)
        self.clients.remove(client)

    async def kill(self) -> None:
        """End without a word."""
        self._shared.listeners.remove(self._receive)
        for topic in self.presence._topics.values():
            topic.stop()
        await self._end_tasks()
        self.clients.clear()

    async def stop(self) -> None:
        await self.presence.stop()
        self._shared.listeners.remove(self._receive)
        await self._end_tasks()
        self.clients.clear()

    async def _end_tasks(self) -> None:
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        _ = await asyncio.gather(*tasks, return_exceptions=True)


Copy = tuple[dict[tuple[str, str], dict[str, Member]], dict[str, float], dict[str, int]]


class World:
    """Nodes, and how often a message between them is lost."""

    def __init__(self, settings: Config | None = None, nodes: int = 2) -> None:
        self.shared = SharedPresence(asyncio.get_running_loop().time)
        self.settings = settings or config()
        self.loses = False
        self._copy: Copy = ({}, {}, {})
        self.chance = random.Random(1)
        self.nodes = [self.start() for _ in range(nodes)]

    def start(self) -> Node:
        return Node(self.shared, self.settings, lambda: self.loses and self.chance.random() < 0.3)

    @property
    def clients(self) -> list[Client]:
        return [client for node in self.nodes for client in node.clients]

    def copy(self) -> None:
        """Let the replica of the store catch up."""
        members = {key: dict(part) for key, part in self.shared.members.items()}
        self._copy = members, dict(self.shared.leases), dict(self.shared.written)

    def fail_over(self) -> None:
        """Put the replica in its place: empty where it has never caught up."""
        self.shared.members, self.shared.leases, self.shared.written = self._copy
        self._copy = ({}, {}, {})

    async def check(self) -> None:
        """After quiet, everybody knows the truth."""
        await asyncio.sleep(QUIET_S)
        truth = {client.name for client in self.clients}
        for node in self.nodes:
            found = {member.key for member in (await node.presence.list(TOPIC)).values()}
            assert found == truth
            for client in node.clients:
                assert client.keys == truth, client.name

    async def end(self) -> None:
        for node in self.nodes:
            await node.kill()


@pytest.mark.parametrize("seed", range(12))
async def test_every_node_has_the_truth_in_the_end(seed: int) -> None:
    """Members come, go and move, messages are lost, writes fail late, nodes are cut off, killed and restarted."""
    world = World(nodes=3)
    chance = world.chance = random.Random(seed)
    for number in range(30):
        world.loses = chance.random() < 0.3
        node = chance.choice(world.nodes)
        match chance.randrange(10):
            case 0 | 1 | 2:
                node.enter(f"m{number}")
            case 3 | 4 if node.clients:
                node.leave(chance.choice(node.clients))
            case 5:
                node.store.is_away = not node.store.is_away
            case 6:
                node.store.fails_late = 2
            case 7:
                await (node.kill() if chance.random() < 0.5 or node.store.is_away else node.stop())
                world.nodes[world.nodes.index(node)] = world.start()
            case 8:
                world.fail_over()
            case 9:
                world.copy()
        await asyncio.sleep(chance.choice([0, 0.01, 0.1, 0.3, 2]))
    world.loses = False
    for node in world.nodes:
        node.store.is_away = False
    await world.check()
    await world.end()


async def test_write_that_fails_late_leaves_no_ghost() -> None:
    """The member was written and announced, the answer lost; it left before the write was made again."""
    world = World()
    bystander = world.nodes[1].enter("bystander")
    await asyncio.sleep(1)
    world.nodes[0].store.fails_late = 1
    client = world.nodes[0].enter("ghost")
    await asyncio.sleep(0.05)
    assert client.name in (bystander.keys or ())
    world.nodes[0].leave(client)
    await world.check()
    assert bystander.keys == {"bystander"}
    assert (TOPIC, world.nodes[0].store.node) not in world.shared.members
    await world.end()


async def test_rejoin_on_another_node_within_the_delay_is_not_seen() -> None:
    world = World(nodes=3)
    bystander = world.nodes[2].enter("bystander")
    member = world.nodes[0].enter("ada")
    await asyncio.sleep(1)
    assert bystander.keys == {"bystander", "ada"}
    (before,) = (bystander.state or {})["ada"]
    diffs = bystander.diffs
    world.nodes[0].leave(member)
    await asyncio.sleep(DELAY_S / 2)
    world.nodes[1].enter("ada")
    await world.check()
    assert (bystander.gone, bystander.diffs) == ([], diffs + 1)
    assert (bystander.state or {})["ada"] != {before}
    await world.end()


async def test_clients_that_all_rejoin_at_once_do_not_see_each_other_leave() -> None:
    """After a gap: the first that is back finds none of the others listed, on no node, and is sent all the same."""
    world = World()
    names = [("ada", "bob"), ("eve", "zoe")]
    for node, pair in zip(world.nodes, names, strict=True):
        for name in pair:
            node.enter(name)
    await asyncio.sleep(RENEW_S)
    for node in world.nodes:
        for client in tuple(node.clients):
            node.leave(client)
    await asyncio.sleep(DELAY_S / 2)
    first = world.nodes[0].enter("ada")
    await asyncio.sleep(0.2)
    assert first.keys == {"ada", "bob", "eve", "zoe"}
    world.nodes[0].enter("bob")
    world.nodes[1].enter("eve")
    await world.check()
    assert first.gone == ["zoe"], "the one that did not come back"
    await world.end()


async def test_topic_without_subscribers_is_forgotten() -> None:
    world = World()
    for _ in range(3):
        client = world.nodes[0].enter("ada")
        await asyncio.sleep(0.2)
        world.nodes[0].leave(client)
    await asyncio.sleep(DELAY_S + 0.1)
    assert not world.nodes[0].presence._topics
    await world.end()


async def test_flush_is_not_seen_by_clients(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    clients = [node.enter(name) for node, name in zip(world.nodes, ("ada", "bob"), strict=True)]
    await asyncio.sleep(RENEW_S)
    world.fail_over()
    await world.check()
    assert [client.gone for client in clients] == [[], []]
    assert [node.metrics.presence_leases_lost for node in world.nodes] == [1, 1]
    assert "the lease of this node ended, or Redis lost it: its members are sent again" in caplog.messages
    assert await world.nodes[0].store.read(TOPIC, world.nodes[1].store.node, 1)
    await world.end()


@pytest.mark.parametrize("outage_s", [1.5 * LEASE_S, 6 * LEASE_S])
async def test_outage_that_is_longer_than_leases_is_not_seen_by_clients(outage_s: float) -> None:
    world = World(config(delay_s=0.0))
    one, two = world.nodes
    clients = [one.enter("a"), two.enter("b")]
    await asyncio.sleep(1)
    one.store.is_away = two.store.is_away = True
    await asyncio.sleep(outage_s)
    one.store.is_away = False
    await asyncio.sleep(1.5 * RENEW_S)
    assert one.metrics.presence_leases_lost == 1
    two.store.is_away = False  # which is later, as each node has its own pace
    await asyncio.sleep(QUIET_S)
    assert [client.gone for client in clients] == [[], []]
    await world.check()
    await world.nodes.pop().kill()
    await asyncio.sleep(QUIET_S)
    assert clients[0].gone == ["b"]
    await world.end()


async def test_members_that_redis_has_lost_stay_until_their_node_has_written_them_again() -> None:
    """A node reads them again, since a message was lost, before their own node has renewed its lease."""
    world = World(config(delay_s=0))
    bystander = world.nodes[0].enter("bystander")
    for number in range(3):
        world.nodes[1].enter(f"m{number}")
    await asyncio.sleep(RENEW_S)
    receive, world.nodes[0].presence.receive = world.nodes[0].presence.receive, lambda data: None  # type: ignore[method-assign]
    world.nodes[1].enter("unheard")
    await asyncio.sleep(0.2)
    world.nodes[0].presence.receive = receive  # type: ignore[method-assign]
    owner = world.nodes[1].store
    owner.may_renew.clear()
    world.fail_over()
    with pytest.raises(BusUnavailable, match="has not yet written its members again"):
        _ = await world.nodes[0].presence.list("room:elsewhere")
    world.nodes[1].enter("heard")
    await asyncio.sleep(1)
    assert world.nodes[0].metrics.presence_heals == {"message missing": 1}
    assert bystander.gone == []
    owner.may_renew.set()
    await world.check()
    assert bystander.gone == []
    assert await world.nodes[0].presence.list("room:elsewhere") == {}
    await world.end()


async def test_lost_writes_of_a_lagging_replica_are_made_again() -> None:
    """The lease is there, and later writes too: what is missing is found by their numbers."""
    world = World(config(delay_s=0))
    bystander = world.nodes[0].enter("bystander")
    leaver = world.nodes[1].enter("leaver")
    await asyncio.sleep(RENEW_S)
    world.copy()
    world.nodes[1].leave(leaver)
    for number in range(3):
        world.nodes[1].enter(f"m{number}")
    await asyncio.sleep(0.3)
    assert bystander.gone == ["leaver"]
    world.fail_over()
    world.nodes[1].enter("first behind the loss")
    await asyncio.sleep(0.3)
    late = world.start()
    world.nodes.append(late)
    newcomer = late.enter("newcomer")
    await world.check()
    assert (bystander.gone, newcomer.gone) == (["leaver"], [])
    await world.end()


async def test_node_that_is_killed_is_gone_within_lease_renewal_and_delay(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    bystander = world.nodes[0].enter("bystander")
    for number in range(100):
        world.nodes[1].enter(f"m{number}")
    await asyncio.sleep(RENEW_S)
    assert len(bystander.keys or ()) == 101
    dead = world.nodes.pop()
    await dead.kill()
    await asyncio.sleep(LEASE_S - RENEW_S - 0.1)
    assert len(bystander.keys or ()) == 101
    await asyncio.sleep(2 * RENEW_S + DELAY_S + 0.1)
    assert bystander.keys == {"bystander"}
    assert len(bystander.gone) == 100
    assert world.nodes[0].metrics.presence_ghosts_removed == 100
    assert f"100 members of node {dead.store.node} removed: its lease has ended" in caplog.messages
    assert world.shared.members.keys() == {(TOPIC, world.nodes[0].store.node), (TOPIC, dead.store.node)}
    await asyncio.sleep(4 * LEASE_S)
    assert world.shared.members.keys() == {(TOPIC, world.nodes[0].store.node)}, "swept"
    await world.end()


async def test_lost_message_heals_within_one_renewal() -> None:
    world = World()
    bystander = world.nodes[0].enter("bystander")
    world.nodes[1].enter("ada")
    await asyncio.sleep(RENEW_S)
    receive, world.nodes[0].presence.receive = world.nodes[0].presence.receive, lambda data: None  # type: ignore[method-assign]
    world.nodes[1].enter("bob")
    await asyncio.sleep(0.2)
    world.nodes[0].presence.receive = receive  # type: ignore[method-assign]
    assert bystander.keys == {"bystander", "ada"}
    await asyncio.sleep(RENEW_S + 0.2)
    assert bystander.keys == {"bystander", "ada", "bob"}
    assert world.nodes[0].metrics.presence_heals == {"message missing": 1}
    await world.end()


async def test_members_are_read_again_after_a_gap() -> None:
    """And meanwhile nobody is told what was known before it."""
    world = World()
    deaf, other = world.nodes
    bystander = deaf.enter("bystander")
    ada = other.enter("ada")
    await asyncio.sleep(RENEW_S)
    deaf.is_hearing = False
    other.enter("bob")
    other.leave(ada)
    await asyncio.sleep(0.2)
    assert bystander.keys == {"bystander", "ada"}
    assert {member.key for member in (await deaf.presence.list(TOPIC)).values()} == {"bystander", "bob"}
    assert await deaf.presence.count(TOPIC) == 2
    deaf.store.is_away = True
    with pytest.raises(BusUnavailable):
        await deaf.presence.list(TOPIC)
    deaf.store.is_away, deaf.is_hearing = False, True
    deaf.presence.after_gap()
    await asyncio.sleep(0.2)
    assert bystander.keys is not None
    assert "bob" in bystander.keys, "before another message shows that one is missing"
    assert deaf.metrics.presence_heals == {"message missing": 1}
    await asyncio.sleep(DELAY_S)
    assert bystander.keys == {"bystander", "bob"}
    await world.end()


async def test_gap_without_a_lost_message_costs_no_reading() -> None:
    world = World()
    one, other = world.nodes
    bystander = one.enter("bystander")
    other.enter("ada")
    await asyncio.sleep(2 * RENEW_S)
    reads = one.store.reads
    one.presence.after_gap()
    members = await one.presence.list(TOPIC)  # from the store: it is not known yet whether all has been heard
    assert {member.key for member in members.values()} == {"bystander", "ada"}
    assert one.store.reads == reads + 1
    await asyncio.sleep(RENEW_S)
    assert await one.presence.count(TOPIC) == 2
    assert one.store.reads == reads + 1
    assert bystander.diffs == 1
    await world.end()


async def test_node_that_started_during_a_gap_is_found_after_it() -> None:
    world = World(nodes=1)
    deaf = world.nodes[0]
    bystander = deaf.enter("bystander")
    await asyncio.sleep(RENEW_S + 0.05)
    deaf.is_hearing = False
    world.nodes.append(world.start())
    world.nodes[1].enter("ada")
    await asyncio.sleep(0.05)
    deaf.is_hearing = True
    deaf.presence.after_gap()
    await asyncio.sleep(0.25)  # and not with the next lease
    assert bystander.keys == {"bystander", "ada"}
    await world.end()


async def test_gap_that_cannot_be_examined_has_all_read_again() -> None:
    world = World()
    one, other = world.nodes
    bystander = one.enter("bystander")
    await asyncio.sleep(RENEW_S)
    one.is_hearing = False
    other.enter("ada")
    await asyncio.sleep(0.2)
    one.is_hearing = one.store.is_away = True
    one.presence.after_gap()
    await asyncio.sleep(0.1)
    with pytest.raises(BusUnavailable):
        await one.presence.list(TOPIC)
    one.store.is_away = False
    await asyncio.sleep(2 * RENEW_S)
    assert bystander.keys == {"bystander", "ada"}
    await world.end()


async def test_members_of_many_topics_are_read_a_few_at_a_time() -> None:
    world = World()
    one, other = world.nodes
    names = [f"room:{number}" for number in range(500)]
    for name in names:
        other.enter(f"of {name}", name)
    await asyncio.sleep(RENEW_S)
    under_way = most = most_tasks = 0
    read = MemoryPresence.read

    async def counted(topic: str, node: str, known: int) -> Any:
        nonlocal under_way, most, most_tasks
        under_way += 1
        most, most_tasks = max(most, under_way), max(most_tasks, len(asyncio.all_tasks()))
        await asyncio.sleep(0.01)
        under_way -= 1
        return await read(one.store, topic, node, known)

    one.store.read = counted  # type: ignore[method-assign]
    clients = [one.enter("bystander", name) for name in names]
    await asyncio.sleep(1)
    assert most == 100
    assert most_tasks < 200, "a task for each would block the event loop, in which all of them begin at once"
    assert [client.keys for client in clients] == [{"bystander", f"of {name}"} for name in names]
    await world.end()


async def test_message_that_is_not_understood_is_counted() -> None:
    world = World(nodes=1)
    for message in (b"", b"{}", b"\xff", b"[]", b'{"node":1,"number":1}'):
        world.nodes[0].presence.receive(message)
    assert world.nodes[0].metrics.dropped == {"presence message not understood": 5}
    await world.end()


async def test_members_that_cannot_be_are_left_out_of_a_message() -> None:
    world = World(nodes=1)
    client = world.nodes[0].enter("ada")
    joins = '[["1","__proto__",{},""],["2","bob",5,""],["3","a\\nb",{},""],["4","eve",{},""]]'
    message = f'{{"node":"x","number":1,"changes":[["{TOPIC}",{joins},[]]]}}'
    world.nodes[0].presence.receive(message.encode())
    world.shared.members[TOPIC, "x"] = {"4": Member("4", "eve", b"{}")}
    world.shared.written["x"] = 1
    await asyncio.sleep(0.3)
    assert client.keys == {"ada", "eve"}
    await world.end()


async def test_number_is_right_while_nodes_have_other_settings() -> None:
    """In the midst of an upgrade that turns a list into a number."""
    world = World(config(presence="count"))
    client = world.nodes[0].enter("ada")
    world.nodes[1].presence._config = config()
    world.nodes[1].enter("bob")
    world.nodes[1].enter("eve")
    await asyncio.sleep(2)
    assert client.count == 3
    await world.end()


@pytest.mark.parametrize("size", [10, 100])
async def test_topic_does_not_change_back_and_forth_between_list_and_number(size: int) -> None:
    world = World(config(presence_max=size), nodes=1)
    node = world.nodes[0]
    clients = [node.enter(f"m{number}") for number in range(size)]
    await asyncio.sleep(3)
    assert len(clients[0].keys or ()) == size
    more = node.enter("one more")
    await asyncio.sleep(3)
    assert clients[0].count == more.count == size + 1
    assert more.state is None
    node.leave(more)
    await asyncio.sleep(3)
    assert clients[0].count == size
    while len(node.clients) > 0.9 * size:
        node.leave(node.clients[-1])
    await asyncio.sleep(3)
    assert len(clients[0].keys or ()) == 0.9 * size
    await world.end()


async def test_large_topic_leaves_the_event_loop_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With slices so short that each has one client: all are sent everything, in order, and others come between."""
    monkeypatch.setattr("relay.channels.presence_topic._SLICE_S", 0)
    world = World(nodes=1)
    node = world.nodes[0]
    turns: list[int] = []
    node.enter("first")
    await asyncio.sleep(0.3)
    clients = [node.enter(f"m{number}") for number in range(50)]
    for number in range(200):  # without time: each of these is a turn of the event loop
        turns.append(sum(client.state is not None for client in clients))
        if number == 20:
            node.leave(clients.pop())
            clients.append(node.enter("late"))
        await asyncio.sleep(0)
    while turns[-1] < 50:
        await asyncio.sleep(0.001)
        turns.append(sum(client.state is not None for client in clients))
    assert all(after - before <= 1 for before, after in pairwise(turns)), turns
    await world.check()
    await world.end()


async def test_many_members_are_announced_in_portions() -> None:
    """After a flush a node announces all that it has: in messages that a subscriber of Redis has room for."""
    world = World()
    sizes: list[int] = []
    world.shared.listeners.append(
        lambda message: sizes.extend(
            len(joins) + len(leaves) for _, joins, leaves in json.loads(message).get("changes", [])
        )
    )
    client = world.nodes[0].enter("ada")
    for number in range(12_000):
        world.nodes[0].presence.track(client, f"key {number}", b"{}")
    await asyncio.sleep(1)
    assert (max(sizes), sum(sizes)) == (5000, 12_001)
    sizes.clear()
    world.fail_over()
    await asyncio.sleep(2)
    assert (max(sizes), sum(sizes)) == (5000, 12_001)
    assert len(await world.nodes[1].store.read(TOPIC, world.nodes[0].store.node, 1)) == 12_001
    assert await world.nodes[1].presence.count(TOPIC) == 12_001
    await world.end()
