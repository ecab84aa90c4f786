"""Numbered events on many topics of a cluster, and clients that are held to what they were told.

The invariant: what a client gets of a topic is in order, nothing comes twice, what is missing was told at that very
place, and clients of other topics were told nothing.
"""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from relay.brokers.cluster import ClusterBroker
from relay.brokers.cluster_map import Endpoint, slot_of
from relay.brokers.cluster_shard import Shard
from tests.support.client import Client
from tests.support.cluster import Cluster, Node
from tests.support.patience import PATIENCE
from tests.support.redis_faults import ready
from tests.support.serving import Served, eventually

TOPICS = tuple(f"room:{number}" for number in range(60))
MANY_TOPICS = tuple(f"room:{number}" for number in range(3000))
AT_ONCE = 500
"""Most topics on which a number is published in one turn."""
PACE_S = 0.03
MANY_PACE_S = 0.08
"""The same where there are more topics than that."""


def slot(topic: str) -> int:
    return slot_of(f"topic:{topic}".encode())


async def until_whole(served: Served) -> None:
    """Wait until ``/ready`` says that all nodes are heard."""
    async with asyncio.timeout(20 * PATIENCE):
        while await ready(served) != (200, {"status": "ready"}):  # noqa: ASYNC110 - what is waited for is the server's
            await asyncio.sleep(0.01)


class Publisher:
    """Any client of a cluster: ``SPUBLISH`` at the slot's owner, which it asks for after a fault.

    No number is tried twice on a topic.

    Args: first: its first number.
          near: the only nodes that it reaches, past any network; all by their announced ports where it is empty.
    """

    def __init__(self, cluster: Cluster, first: int = 0, near: Collection[Node] = ()) -> None:
        self.cluster = cluster
        self.first = first
        self.taken: dict[str, set[int]] = defaultdict(set)
        """Numbers that were acknowledged, by topic."""
        self._near = {node.announced[0]: node.port for node in near}
        self._owners: dict[int, int] = {}
        self._clients: dict[int, Redis] = {}
        self._numbers = itertools.count(first)

    def port(self, topic: str) -> int | None:
        """Where it publishes a topic."""
        return self._owners.get(slot(topic))

    async def publish(self, topics: Collection[str]) -> int:
        """Publish the next number on each topic; returns it."""
        number = next(self._numbers)
        by_port: dict[int, list[str]] = defaultdict(list)
        for topic in topics:
            if (port := self._owners.get(slot(topic))) is not None:
                by_port[port].append(topic)
        if not self._owners or sum(map(len, by_port.values())) < len(topics):
            await self._learn()
        _ = await asyncio.gather(*(self._send(port, theirs, number) for port, theirs in by_port.items()))
        return number

    async def _send(self, port: int, topics: list[str], number: int) -> None:
        try:
            async with self._client(port).pipeline(transaction=False) as pipeline:
                for topic in topics:
                    pipeline.execute_command("SPUBLISH", f"topic:{topic}", f"tick:{number}")
                replies = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError):
            replies = [None] * len(topics)
        for topic, reply in zip(topics, replies, strict=True):
            if isinstance(reply, int):
                self.taken[topic].add(number)
            else:
                self._owners.clear()

    async def _learn(self) -> None:
        for announced in self._near or [node.announced[0] for node in self.cluster.nodes]:
            with suppress(RedisError, OSError):
                client = self._client(announced)
                execute: Any = client.execute_command
                for first, last, (_, port, *_), *_ in await execute("CLUSTER SLOTS"):
                    self._owners |= dict.fromkeys(range(first, last + 1), port)
                return

    def _client(self, port: int) -> Redis:
        if port not in self._clients:
            reached = self._near[port] if self._near else port
            self._clients[port] = Redis(port=reached, socket_timeout=0.5, retry=Retry(NoBackoff(), 0))
            self._clients[port].response_callbacks.clear()
        return self._clients[port]

    async def close(self) -> None:
        for client in self._clients.values():
            await client.aclose()


class Listener:
    """A client that has joined topics, and joins each again as it is told."""

    def __init__(self, client: Client, topics: Collection[str]) -> None:
        self.client = client
        self.topics = topics
        self.numbers: dict[str, list[int]] = {topic: [] for topic in topics}
        self.told: dict[str, list[int]] = {topic: [] for topic in topics}
        """How many numbers of a topic had come each time it was told that some may be missing."""
        self.joined: set[str] = set()
        self.refused: set[str] = set()
        """Topics whose join was refused at least once."""
        self._refs = itertools.count(1)
        self._later: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        for topic in self.topics:
            await self._join(topic)
        while True:
            _, _, topic, event, payload = await self.client.receive()
            if event == "tick":
                self.numbers[topic].append(payload)
            elif event == "phx_error":
                self.told[topic].append(len(self.numbers[topic]))
                self.joined.discard(topic)
                await self._join(topic)
            elif payload["status"] == "ok":
                self.joined.add(topic)
            else:
                self.refused.add(topic)
                task = asyncio.create_task(self._join_later(topic))
                self._later.add(task)
                task.add_done_callback(self._later.discard)

    async def _join(self, topic: str) -> None:
        ref = str(next(self._refs))
        await self.client.send(ref, ref, topic, "phx_join", {})

    async def _join_later(self, topic: str) -> None:
        await asyncio.sleep(0.1)
        await self._join(topic)

    async def close(self) -> None:
        for task in tuple(self._later):
            task.cancel()
        _ = await asyncio.gather(*self._later, return_exceptions=True)


class ClusterStream:
    """What flows while something is broken."""

    def __init__(self, served: Served, publisher: Publisher, listener: Listener) -> None:
        self.served = served
        self.publisher = publisher
        self.publishers = [publisher]
        """All whose numbers are held to the invariant."""
        self.listener = listener
        self.affected: set[str] = set()
        """Topics whose clients may be told."""

    def topics_of(self, node: Node) -> set[str]:
        """Topics whose slots a node serves, as far as the publisher knows."""
        return {topic for topic in self.listener.topics if self.publisher.port(topic) == node.announced[0]}

    def add_publisher(self, first: int, near: Collection[Node]) -> Publisher:
        """Another program, whose numbers are held to the invariant too; see `Publisher`."""
        publisher = Publisher(self.publisher.cluster, first, near)
        self.publishers.append(publisher)
        return publisher

    async def until_heard(self, topics: Collection[str]) -> None:
        """Wait until a further number of each of these topics has come."""
        numbers = self.listener.numbers
        before = {topic: len(numbers[topic]) for topic in topics}
        await eventually(lambda: all(len(numbers[each]) > n for each, n in before.items()), "an event of each topic")

    def times_told(self) -> dict[str, int]:
        """How often the clients of each topic were told."""
        return {topic: len(told) for topic, told in self.listener.told.items()}

    async def until_told(self, topics: Collection[str], before: Mapping[str, int] | None = None) -> None:
        """Wait until the clients of all these topics were told, more often than ``before``."""
        told, known = self.listener.told, before or {}
        await eventually(lambda: all(len(told[each]) > known.get(each, 0) for each in topics), "all clients to be told")

    async def probe(self) -> None:
        """One event for each topic, from outside, reaches its client: no connection is healthy and deaf."""
        await eventually(lambda: len(self.listener.joined) == len(self.listener.topics), "all topics to be joined")
        goals = {topic: max(taken, default=0) for topic, taken in self.publisher.taken.items()}
        await eventually(
            lambda: all(
                numbers and numbers[-1] > goals.get(topic, -1) for topic, numbers in self.listener.numbers.items()
            ),
            "an event of each topic",
        )

    def check(self) -> None:
        """Hold the client to the invariant."""
        for topic, numbers in self.listener.numbers.items():
            assert len(numbers) == len(set(numbers)), f"{topic}: twice"
            was_told = bool(self.listener.told[topic])
            assert not was_told or topic in self.affected, f"{topic} was told, and nothing had happened to it"
            for publisher in self.publishers:
                self._check_numbers(topic, publisher)

    def _check_numbers(self, topic: str, publisher: Publisher) -> None:
        """See that those that one publisher had acknowledged are in order, and that holes were told where they are."""
        # Of the others nothing is known: a node that was paused carries out late what its publisher gave up.
        taken, told = publisher.taken[topic], self.listener.told[topic]
        last, were_told = publisher.first - 1, False
        for place, number in enumerate(self.listener.numbers[topic]):
            were_told |= place in told
            if number not in taken:
                continue
            assert number > last, f"{topic}: {number} came after {last}"
            hole = [n for n in range(last + 1, number) if n in taken]
            assert not hole or were_told, f"{topic}: {hole[:5]} lost without a word"
            last, were_told = number, False


Connect = Callable[..., Awaitable[Client]]
Start: TypeAlias = Callable[..., AbstractAsyncContextManager[ClusterStream]]


@asynccontextmanager
async def cluster_stream(
    served: Served, connect: Connect, cluster: Cluster, topics: Sequence[str] = TOPICS
) -> AsyncIterator[ClusterStream]:
    """Run a `ClusterStream`; at its end every topic is probed, and the invariant is checked."""
    publisher, listener = Publisher(cluster), Listener(await connect(served), topics)
    listening = asyncio.create_task(listener.listen())
    await eventually(lambda: len(listener.joined) == len(topics), "all topics to be joined")
    publishing = asyncio.create_task(_publish(publisher, topics))
    stream = ClusterStream(served, publisher, listener)
    try:
        await stream.probe()
        yield stream
        await stream.probe()
        await stream.probe()
        assert not listening.done() and not publishing.done()
    finally:
        for task in (publishing, listening):
            task.cancel()
        _ = await asyncio.gather(publishing, listening, return_exceptions=True)
        await listener.close()
        listener.client.connection.transport.abort()  # in good order it would wait for what is not read any more
        for each in stream.publishers:
            await each.close()
    stream.check()


async def _publish(publisher: Publisher, topics: Sequence[str]) -> None:
    while True:
        for start in range(0, len(topics), AT_ONCE):
            await publisher.publish(topics[start : start + AT_ONCE])
            await asyncio.sleep(PACE_S if len(topics) <= AT_ONCE else MANY_PACE_S)


# Who serves what.


async def owner_and_other(cluster: Cluster, topic: str) -> tuple[Node, Node]:
    """Who serves a topic's slot, and another master."""
    owners = await asyncio.to_thread(cluster.owners)
    owner = owners[slot(topic)]
    other = next(each for each in owners if each is not owner)
    assert owner is not None and other is not None
    return owner, other


async def replica_of(cluster: Cluster, master: Node) -> Node:
    """A replica of a master, as it says itself."""

    def find() -> Node:
        name = master.id
        said = ((node, node.raw("CLUSTER", "NODES")) for node in cluster.nodes)
        return next(node for node, text in said if f"myself,slave {name}" in text)

    return await asyncio.to_thread(find)


def masters(stream: ClusterStream) -> Mapping[Endpoint, Shard]:
    """The masters that the relay knows."""
    return broker_of(stream).shards


def broker_of(stream: ClusterStream) -> ClusterBroker:
    """The relay's links to the cluster."""
    broker = stream.served.relay.node.broker
    assert isinstance(broker, ClusterBroker)
    return broker
