"""Redis Cluster in two parts: a relay that is left with the smaller one, and one that is left with the larger one.

Each side takes the other for dead. The larger one promotes the replica of the master that it has lost; the smaller one
notices, after the nodes' time limit, that it has no majority.
"""

import asyncio
import itertools
from collections.abc import Collection, Iterator, Sequence

import pytest

from relay import BusUnavailable
from tests.support.client import Client
from tests.support.cluster import Cluster, Node
from tests.support.cluster_stream import (
    PACE_S,
    TOPICS,
    Connect,
    Publisher,
    Start,
    masters,
    owner_and_other,
    replica_of,
    slot,
)
from tests.support.partition import PartitionedCluster
from tests.support.patience import PATIENCE
from tests.support.process import sharded_servers, wait_for
from tests.support.redis_faults import OK, UNAVAILABLE, ready
from tests.support.serving import eventually

FAR = -1_000_000
"""The first number that is published on the other side: below all others, so that no probe waits for one of these."""


@pytest.fixture(scope="module", params=[None, *sharded_servers()], ids=lambda binary: "redis" if binary else "valkey")
def partitioned(request: pytest.FixtureRequest) -> Iterator[PartitionedCluster]:
    with PartitionedCluster(binary=request.param) as cluster:
        yield cluster


def others(cluster: Cluster, *nodes: Node) -> list[Node]:
    return [node for node in cluster.nodes if node not in nodes]


async def until_promoted(replica: Node, witnesses: Sequence[Node]) -> None:
    """Wait until all these nodes say that a replica has been promoted."""

    def say_so() -> bool:
        return all(any(row[2][2] == replica.id for row in node.slots()) for node in witnesses)

    await asyncio.to_thread(wait_for, say_so, "the promotion")


async def publish_until_taken(publisher: Publisher, topics: Collection[str]) -> None:
    """Publish numbers until one of each topic has been acknowledged."""
    while not all(publisher.taken[topic] for topic in topics):
        _ = await publisher.publish(topics)
        await asyncio.sleep(PACE_S)


async def quiet_topic(cluster: Cluster, master: Node) -> str:
    """A topic of a master on which nothing is published."""
    slots = set(await asyncio.to_thread(cluster.slots_of, master))
    return next(topic for number in itertools.count() if slot(topic := f"quiet:{number}") in slots)


async def first_refusal(client: Client, ref: str, topic: str) -> object:
    """Push until a push is not answered ``ok``; returns that answer."""
    async with asyncio.timeout(20 * PATIENCE):
        while (answer := await client.push(ref, topic, "shout")) == OK:  # noqa: ASYNC110 - what is waited for is the server's
            await asyncio.sleep(PACE_S)
        return answer


async def test_relay_on_the_smaller_side_takes_no_pushes_and_reports_the_gap_at_the_end(
    start: Start, partitioned: PartitionedCluster, connect: Connect
) -> None:
    async with start(on=partitioned) as stream:
        master, _ = await owner_and_other(partitioned, TOPICS[0])
        replica = await replica_of(partitioned, master)
        theirs, stream.affected = stream.topics_of(master), set(TOPICS)
        quiet, client = await quiet_topic(partitioned, master), await connect(stream.served)
        ref = await client.join(quiet)
        far = stream.add_publisher(FAR, others(partitioned, master))
        with partitioned.partitioned(master, with_programs=True):
            await until_promoted(replica, others(partitioned, master))
            await publish_until_taken(far, theirs)
            await eventually(lambda: "sees 1 of 3" in stream.served.relay.node.broker.refusal, "the lost majority")
            assert await first_refusal(client, ref, quiet) == UNAVAILABLE
            with pytest.raises(BusUnavailable, match="sees 1 of 3 masters"):
                await stream.served.relay.publish(quiet, "tick", 1)
            status, body = await ready(stream.served)
            assert (status, body["status"]) == (200, "degraded")
            assert "sees 1 of 3 masters" in body["reason"]
            await stream.until_heard(theirs)  # what is published on this side
            assert not any(stream.times_told()[topic] for topic in theirs)
        await stream.until_told(TOPICS)
        await asyncio.to_thread(partitioned.wait_until_whole)
        await stream.probe()
        newest = await far.publish(TOPICS)
        while not all(newest in far.taken[topic] for topic in TOPICS):
            newest = await far.publish(TOPICS)
        await eventually(lambda: all(newest in each for each in stream.listener.numbers.values()), "the other side")
        assert (await client.receive())[3] == "phx_error"
        ref = await client.join(quiet)
        async with asyncio.timeout(20 * PATIENCE):
            # The connection to publish on may come later.
            while await client.push(ref, quiet, "shout") != OK:  # noqa: ASYNC110 - each answer is one
                await asyncio.sleep(0.05)


async def test_relay_on_the_larger_side_tells_the_topics_of_the_lost_master_alone(
    start: Start, partitioned: PartitionedCluster
) -> None:
    async with start(on=partitioned) as stream:
        master, _ = await owner_and_other(partitioned, TOPICS[0])
        stream.affected = stream.topics_of(master)
        with partitioned.partitioned(master, with_programs=False):
            await stream.until_told(stream.affected)
            await stream.probe()
        told, promoted = stream.times_told(), set(masters(stream))
        await asyncio.to_thread(partitioned.wait_until_whole)
        await stream.probe()
        # On a slow machine the nodes hold one more election; the slots move back, and that is a gap.
        is_promoted_again = set(masters(stream)) != promoted
        assert is_promoted_again or stream.times_told() == told, "the end of the partition is no gap"
        assert not stream.served.relay.node.broker.refusal


async def test_master_that_is_cut_off_with_its_replica_refuses_its_topics_alone(
    start: Start, partitioned: PartitionedCluster, connect: Connect
) -> None:
    """Nothing takes its place; the others are the majority."""
    async with start(on=partitioned) as stream:
        master, _ = await owner_and_other(partitioned, TOPICS[0])
        stream.affected = stream.topics_of(master)
        quiet, client = await quiet_topic(partitioned, master), await connect(stream.served)
        with partitioned.partitioned(master, await replica_of(partitioned, master), with_programs=False):
            status, body = await ready(stream.served)
            while body["status"] != "degraded":
                status, body = await ready(stream.served)
            assert status == 200
            await client.send("1", "1", quiet, "phx_join", {})
            assert (await client.receive())[4] == UNAVAILABLE
            await stream.until_heard(set(TOPICS) - stream.affected)
            assert not any(stream.times_told().values())
        await stream.until_told(stream.affected)
