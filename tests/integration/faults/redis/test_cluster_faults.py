"""Redis Cluster under faults: what happens to one node concerns its topics alone, and no loss goes without a word.

After each fault every topic is probed from outside: a connection may be healthy and its subscription gone.
"""

import asyncio
from collections.abc import Iterator, Sequence

import pytest

from relay import AsyncPublisher
from tests.support.client import Client
from tests.support.cluster import Cluster, Node, replicate
from tests.support.cluster_stream import (
    MANY_TOPICS,
    TOPICS,
    ClusterStream,
    Connect,
    Start,
    broker_of,
    masters,
    owner_and_other,
    replica_of,
    slot,
)
from tests.support.process import sharded_servers, wait_for
from tests.support.redis_faults import ready
from tests.support.redis_link import PATIENT, Switch
from tests.support.serving import eventually, http_get, metric

EACH_SIZE = pytest.mark.parametrize("topics", [TOPICS, MANY_TOPICS], ids=lambda topics: f"{len(topics)} topics")


@pytest.fixture(scope="module", params=[None, *sharded_servers()], ids=lambda binary: "redis" if binary else "valkey")
def each_cluster(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Cluster]:
    """The common one, and one of each Redis of this machine that has sharded Pub/Sub."""
    if request.param is None:
        yield cluster
        return
    with Cluster(binary=request.param) as other:
        yield other


# Slots.


async def test_slot_that_moves_and_comes_back_is_told_to_its_topics_alone(start: Start, each_cluster: Cluster) -> None:
    topic = TOPICS[0]
    async with start(on=each_cluster) as stream:
        stream.affected = {each for each in TOPICS if slot(each) == slot(topic)}
        owner, other = await owner_and_other(each_cluster, topic)
        for count, to in enumerate((other, owner), 1):
            await asyncio.to_thread(each_cluster.move_slot, slot(topic), to)
            await eventually(lambda count=count: len(stream.listener.told[topic]) >= count, "the client to be told")  # type: ignore[misc]
            await stream.probe()
        metrics = stream.served.relay.metrics
        assert not metrics.dropped
        assert metrics.redirects["unsubscribed"] >= 2
        assert metrics.gaps == sum(metrics.shard_gaps.values()) == 2


async def test_channel_that_is_unsubscribed_unasked_by_its_own_node_is_subscribed_to_again(
    start: Start, cluster: Cluster
) -> None:
    """As a new owner sometimes does, some milliseconds after the subscription was confirmed."""
    topic = TOPICS[11]
    async with start() as stream:
        stream.affected = {each for each in TOPICS if slot(each) == slot(topic)}
        owner, _ = await owner_and_other(cluster, topic)
        for command in ("DELSLOTS", "ADDSLOTS"):
            await asyncio.to_thread(owner.ask, "CLUSTER", command, slot(topic))
        await stream.until_told(stream.affected)
        assert len(masters(stream)) == 3


@EACH_SIZE
@pytest.mark.parametrize("how", ["one by one", "atomically"])
async def test_slots_that_move_under_load_are_told_to_their_topics_alone(
    start: Start, cluster: Cluster, topics: Sequence[str], how: str
) -> None:
    """As ``redis-cli --cluster reshard`` moves them, those of a hundred topics at most; or half of a node's at once."""
    async with start(topics=topics) as stream:
        owner, other = await owner_and_other(cluster, topics[0])
        theirs = await asyncio.to_thread(cluster.slots_of, owner)
        move, moved = cluster.migrate_slots, theirs[: len(theirs) // 2]
        if how == "one by one":
            move, moved = cluster.move_slots, sorted(set(map(slot, topics)).intersection(theirs))[:100]
        stream.affected = {topic for topic in topics if slot(topic) in moved}
        for source, target in ((owner, other), (other, owner)):
            before = stream.times_told()
            await asyncio.to_thread(move, moved, source, target)
            await stream.until_told(stream.affected, before)
            await stream.probe()


async def test_node_is_added_serves_a_slot_and_is_forgotten(start: Start, cluster: Cluster) -> None:
    topic = TOPICS[1]
    async with start() as stream:
        stream.affected = {each for each in TOPICS if slot(each) == slot(topic)}
        owner, _ = await owner_and_other(cluster, topic)
        with Node() as added:
            cluster.nodes.append(added)
            try:
                await asyncio.to_thread(cluster.meet, added)
                await asyncio.to_thread(cluster.wait_until_known)
                await asyncio.to_thread(cluster.move_slot, slot(topic), added)
                await stream.until_told(stream.affected)
                await stream.probe()
                assert len(masters(stream)) == 4
                await asyncio.to_thread(cluster.move_slot, slot(topic), owner)
                await eventually(lambda: len(stream.listener.told[topic]) > 1, "the client to be told again")
                await eventually(lambda: len(masters(stream)) == 3, "the node to be left")
            finally:
                cluster.nodes.remove(added)
                name = await asyncio.to_thread(lambda: added.id)
        for node in cluster.nodes:
            await asyncio.to_thread(node.ask, "CLUSTER", "FORGET", name)


# Nodes.


@pytest.fixture
def old_cluster() -> Iterator[Cluster]:
    """One whose nodes do not stay."""
    with Cluster() as cluster:
        yield cluster


async def replace(cluster: Cluster, stream: ClusterStream, old: Node) -> None:
    """Have new nodes take the place of a master and of its replica, which are forgotten then."""
    old_replica = await replica_of(cluster, old)
    new, spare = [await asyncio.to_thread(cluster.add) for _ in range(2)]
    slots, before = await asyncio.to_thread(cluster.slots_of, old), stream.times_told()
    theirs = {topic for topic in TOPICS if slot(topic) in slots}
    stream.affected |= theirs
    await asyncio.to_thread(cluster.migrate_slots, slots, old, new)
    await stream.until_told(theirs, before)
    await asyncio.to_thread(replicate, spare, new)
    await asyncio.to_thread(cluster.wait_until_whole)
    for each in (old_replica, old):
        await asyncio.to_thread(cluster.remove, each)
    await stream.probe()
    told = {topic for topic, times in stream.times_told().items() if times > before[topic]}
    assert told == theirs


async def test_all_nodes_are_replaced_one_by_one(
    start: Start, old_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end relay, and a program that publishes, reach nodes that their address does not name."""
    monkeypatch.setattr("relay.brokers.cluster_commands._LOOK_S", 0.5)
    cluster, old = old_cluster, list(old_cluster.masters)
    async with start(on=cluster) as stream, AsyncPublisher(cluster.url) as publisher:
        for node in old:
            await replace(cluster, stream, node)
            _ = await publisher.publish("room:other", "tick", 1)
        assert not {node.port for node in cluster.nodes} & {port for _, port in broker_of(stream).nodes_address.nodes}
        new = {await asyncio.to_thread(cluster.owner, slot(topic)) for topic in TOPICS}
        before = stream.times_told()
        for kind in ("pubsub", "normal"):
            await asyncio.gather(*(asyncio.to_thread(node.ask, "CLIENT", "KILL", "TYPE", kind) for node in new))
        await stream.until_told(TOPICS, before)
        assert {each.port for each in masters(stream)} == {node.port for node in new}
        replicas = {node.port for node in cluster.nodes} - {node.port for node in new}
        # A node leaves out a replica that it takes for failing, on a slow machine say.
        found = broker_of(stream).map
        # Longer than relay waits between two looks.
        await eventually(lambda: {each.port for each in found.replicas} == replicas, "all replicas", 40)


# Masters.


@EACH_SIZE
async def test_master_that_is_killed_is_told_to_its_topics_alone(
    start: Start, each_cluster: Cluster, topics: Sequence[str]
) -> None:
    async with start(on=each_cluster, topics=topics) as stream:
        master, _ = await owner_and_other(each_cluster, TOPICS[2])
        stream.affected = stream.topics_of(master)
        master.kill()
        await stream.until_told(stream.affected)
        await stream.probe()
        await asyncio.to_thread(master.start)


@EACH_SIZE
async def test_master_that_is_killed_with_its_replica_refuses_its_topics_alone(
    start: Start, cluster: Cluster, connect: Connect, topics: Sequence[str]
) -> None:
    async with start(topics=topics) as stream:
        master, _ = await owner_and_other(cluster, TOPICS[3])
        replica = await replica_of(cluster, master)
        stream.affected = stream.topics_of(master)
        for node in (master, replica):
            node.kill()
        client: Client = await connect(stream.served)
        status, body = 0, {"status": ""}
        while body["status"] != "degraded":
            status, body = await ready(stream.served)
        assert status == 200
        assert body["reason"].startswith("1 of 3 nodes are not heard: ")
        assert f"(no subscription to 127.0.0.1:{master.port})" in body["reason"]
        for topic in TOPICS:
            ref = client.next_ref()
            await client.send("1", ref, topic, "phx_join", {})
            reply = await client.receive()
            while reply[1] != ref:
                reply = await client.receive()
            assert reply[4]["status"] == ("error" if topic in stream.affected else "ok"), topic
        assert not any(stream.listener.told.values())
        _, text = await http_get(f"{stream.served.http}/metrics")
        live = {str(each): metric(text, "relay_shard_live", node=str(each)) for each in masters(stream)}
        assert live.pop(f"127.0.0.1:{master.port}") == 0
        assert list(live.values()) == [1, 1]
        client.connection.transport.abort()  # it has not read what came
        for node in (master, replica):
            await asyncio.to_thread(node.start)
        await stream.until_told(stream.affected)


async def test_ordered_failover_is_told_to_the_topics_of_its_shard_alone(start: Start, each_cluster: Cluster) -> None:
    """The old master keeps its connections, and takes subscriptions as a replica."""
    async with start(on=each_cluster) as stream:
        master, _ = await owner_and_other(each_cluster, TOPICS[4])
        stream.affected = stream.topics_of(master)
        replica = await replica_of(each_cluster, master)
        await asyncio.to_thread(replica.ask, "CLUSTER", "FAILOVER")
        await stream.until_told(stream.affected)
        await stream.probe()
        await asyncio.to_thread(
            wait_for, lambda: master.ask("PUBSUB", "SHARDCHANNELS") == [], "its channels to be left"
        )


async def test_pause_that_is_shorter_than_the_time_limits_is_told_to_no_client(start: Start, cluster: Cluster) -> None:
    async with start(**PATIENT):
        master, _ = await owner_and_other(cluster, TOPICS[5])
        master.pause()
        await asyncio.sleep(0.4)
        master.resume()


async def test_master_that_is_paused_is_told_to_its_topics_alone(start: Start, cluster: Cluster) -> None:
    """Longer than the nodes wait: a replica has been promoted when it goes on, and it learns that late."""
    async with start() as stream:
        master, _ = await owner_and_other(cluster, TOPICS[6])
        stream.affected = stream.topics_of(master)
        master.pause()
        await stream.until_told(stream.affected)
        await stream.probe()
        master.resume()


# Connections.


async def test_subscription_that_a_node_cuts_is_told_to_its_topics_alone(start: Start, cluster: Cluster) -> None:
    """As it does when its output buffer is full."""
    async with start() as stream:
        master, _ = await owner_and_other(cluster, TOPICS[8])
        stream.affected = stream.topics_of(master)
        await asyncio.to_thread(master.ask, "CLIENT", "KILL", "TYPE", "pubsub")
        await stream.until_told(stream.affected)


@pytest.mark.parametrize("link", ["subscription", "publisher"])
async def test_one_way_loss_to_one_node(start: Start, cluster: Cluster, link: str) -> None:
    """What it sends gets lost: a subscription is told to its topics alone, a publisher to no client."""
    master, _ = await owner_and_other(cluster, TOPICS[9])
    async with Switch.open(master.port) as switch:
        await asyncio.to_thread(master.ask, "CONFIG", "SET", "cluster-announce-client-port", switch.port)
        try:
            await asyncio.to_thread(cluster.wait_until_whole)
            async with start() as stream:
                deaf = next(
                    each for each in switch.links if (b"SSUBSCRIBE" in each["sent"]) == (link == "subscription")
                )
                stream.affected = {t for t in TOPICS if stream.publisher.port(t) == switch.port}
                assert stream.affected
                deaf["deaf"] = True
                if link == "subscription":
                    await stream.until_told(stream.affected)
                else:
                    stream.affected = set()
                    await eventually(lambda: deaf["writer"].transport.is_closing(), "a new connection")
        finally:
            await asyncio.to_thread(master.ask, "CONFIG", "SET", "cluster-announce-client-port", 0)
            await asyncio.to_thread(cluster.wait_until_whole)


async def test_password_that_is_rotated_loses_no_connection_and_is_named_where_it_is_wrong(
    start: Start, cluster: Cluster
) -> None:
    for node in cluster.nodes:
        await asyncio.to_thread(node.ask, "ACL", "SETUSER", "relay", "reset", "on", ">old", "+@all", "~*", "&*")
    url = cluster.url.replace("://", "://relay:old@")
    async with start(url=url) as stream:
        for node in cluster.nodes:
            await asyncio.to_thread(node.ask, "ACL", "SETUSER", "relay", ">new", "<old")
        await stream.probe()
        master, _ = await owner_and_other(cluster, TOPICS[10])
        stream.affected = stream.topics_of(master)
        await asyncio.to_thread(master.ask, "CLIENT", "KILL", "USER", "relay")
        body = {"reason": ""}
        while "WRONGPASS" not in body.get("reason", ""):
            status, body = await ready(stream.served)
            assert status == 200
        for node in cluster.nodes:
            await asyncio.to_thread(node.ask, "ACL", "SETUSER", "relay", ">old")
        await stream.until_told(stream.affected)
