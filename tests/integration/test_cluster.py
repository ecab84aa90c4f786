"""Redis Cluster: what is published in whichever way reaches clients on all nodes; what does not work is refused."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import uuid4

import httpx2 as httpx
import pytest

from relay import AsyncPublisher, BusUnavailable, Config, Plugin, Publisher
from relay.brokers.cluster_check import examine_cluster
from relay.brokers.cluster_map import slot_of
from relay.brokers.redis_check import Finding, examine
from tests.support.client import Client
from tests.support.cluster import Cluster, Node
from tests.support.cluster_stream import slot, until_whole
from tests.support.keys import SECRET, token
from tests.support.long_poll import Poller
from tests.support.patience import PATIENCE
from tests.support.process import Valkey, free_port, wait_for
from tests.support.redis_faults import FAST, OK, UNAVAILABLE, ready, until_not_ready
from tests.support.redis_link import Switch
from tests.support.serving import Served, eventually, heard_on, http_get, metric

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


def topics_everywhere(cluster: Cluster, count: int = 2) -> dict[str, Node]:
    """Topics of which each node with slots serves so many, with these nodes."""
    owners = cluster.owners()
    found: dict[str, Node] = {}
    for master in set(filter(None, owners)):
        made = (f"room:{uuid4().hex}" for _ in itertools.count())
        found |= dict.fromkeys(itertools.islice((t for t in made if owners[slot(t)] is master), count), master)
    return found


async def test_every_way_to_publish_reaches_clients_on_all_nodes(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster
) -> None:
    nodes = [await serve_relay(redis_url=cluster.url) for _ in range(2)]
    clients = [await connect(node) for node in nodes]
    topics = topics_everywhere(cluster)
    refs = {topic: [await client.join(topic) for client in clients] for topic in topics}
    async with httpx.AsyncClient() as http:
        for topic, owner in topics.items():
            assert owner.ask("SPUBLISH", f"topic:{topic}", 'tick:{"n":0}') == 2
            body = {"topic": topic, "event": "tick", "payload": {"n": 1}}
            assert (await http.post(f"{nodes[0].http}/api/publish", json=body)).status_code == 200
            await nodes[1].relay.publish(topic, "tick", {"n": 2})
            for client, number in itertools.product(clients, range(3)):
                await client.expect_event(topic, "tick", {"n": number})
            await nodes[0].relay.publish(topic, "[tick]", {})
            for client in clients:
                await client.expect_event(topic, "[tick]", {})
    # Pushes are published as on one Redis, and reach programs that listen at any node, by pattern.
    for topic in topics:
        async with heard_on(f"redis://127.0.0.1:{cluster.nodes[-1].port}", f"from:{topic}:*") as heard:
            assert await clients[0].push(refs[topic][0], topic, "shout", "hi") == OK
            assert await heard() == (f"from:{topic}:shout", b'"hi"')
    for client in clients:
        await client.expect_alive()
    assert [await ready(node) for node in nodes] == [(200, {"status": "ready"})] * 2


async def test_topic_is_unsubscribed_after_its_last_subscriber(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster
) -> None:
    served = await serve_relay(redis_url=cluster.url, redis={"linger_s": 0.1})
    client = await connect(served)
    for topic, owner in topics_everywhere(cluster, 1).items():
        channel = f"topic:{topic}"
        ref = await client.join(topic)
        assert owner.ask("SPUBLISH", channel, "tick:1") == 1
        await client.expect_event(topic, "tick", 1)
        await client.send(ref, "9", topic, "phx_leave", {})
        assert [(await client.receive())[3] for _ in range(2)] == ["phx_reply", "phx_close"]
        is_gone = partial(_is_unsubscribed, owner, channel)
        await eventually(is_gone, "the unsubscribe")
        assert owner.ask("SPUBLISH", channel, "tick:2") == 0


def _is_unsubscribed(node: Node, channel: str) -> bool:
    return channel not in node.ask("PUBSUB", "SHARDCHANNELS")


async def test_event_passes_over_its_sender(serve_relay: ServeRelay, connect: Connect, cluster: Cluster) -> None:
    plugin = Plugin("typing")

    @plugin.on_push("room:*", "typing")
    async def typing(push: Any) -> None:
        await push.broadcast_from("typing", {"who": "me"})
        push.stop()

    nodes = [await serve_relay(redis_url=cluster.url, extra_plugins=(plugin,)) for _ in range(2)]
    sender, other = await connect(nodes[0]), await connect(nodes[1])
    for topic in topics_everywhere(cluster, 1):
        ref = await sender.join(topic)
        _ = await other.join(topic)
        assert (await sender.push(ref, topic, "typing"))["status"] == "ok"
        await other.expect_event(topic, "typing", {"who": "me"})
        await sender.expect_alive()


async def test_control_messages_reach_other_nodes(serve_relay: ServeRelay, connect: Connect, cluster: Cluster) -> None:
    nodes = [await serve_relay(redis_url=cluster.url, auth={"keys": [SECRET]}) for _ in range(2)]
    client = await connect(nodes[0], query=f"token={token('alice', {'*': 'join'})}")
    ref = await client.join("room:1")
    await nodes[1].relay.kick("room:1", user="alice")
    assert await client.receive() == client.message(ref, ref, "room:1", "phx_close", {})


STORES: dict[str, Any] = {
    "topics": [{"match": "room:*", "history": {"size": 1000, "ttl_s": 60}, "presence": True}],
    "auth": {"keys": [SECRET]},
    "presence": {"lease_s": 1.5 * PATIENCE, "renew_s": 0.5, "leave_delay_s": 0.2},
}


def named(name: str) -> str:
    return f"token={token(name, {'*': 'join,push,presence'})}"


async def test_histories_and_presence_work_on_each_node(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster
) -> None:
    nodes = [await serve_relay(redis_url=cluster.url, **STORES) for _ in range(2)]
    for topic in topics_everywhere(cluster, 1):
        one = await connect(nodes[0], query=named("alice"))
        await one.send("1", "1", topic, "phx_join", {"since": None})
        position = (await one.receive())[4]["response"]["_position"]
        assert (await one.receive())[3] == "presence_state"
        await nodes[1].relay.publish(topic, "tick", {"n": 1})
        two = await connect(nodes[1], query=named("bob"))
        await two.send("1", "1", topic, "phx_join", {"since": position})
        assert (await two.receive())[4]["response"]["recovered"] is True
        assert {(await two.receive())[3] for _ in range(2)} == {"presence_state", "tick"}
        assert {(await one.receive())[3] for _ in range(2)} == {"presence_diff", "tick"}
        for node in nodes:
            assert set(await node.relay.presence(topic)) == {"alice", "bob"}
    assert all(node.relay.metrics.gaps == 0 and not node.relay.metrics.dropped for node in nodes)


async def test_function_for_other_programs_is_on_each_node(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster
) -> None:
    served = await serve_relay(redis_url=cluster.url, **STORES)
    client = await connect(served, query=f"token={token('carol', {'*': 'join'})}")
    for topic, owner in topics_everywhere(cluster, 1).items():
        _ = await client.join(topic)
        _ = owner.ask("FCALL", "relay_publish", 1, f"topic:{topic}", "tick", '{"n":1}', 1000, 60)
        await client.expect_event(topic, "tick", {"n": 1})


async def test_history_whose_slot_moves_is_complete_for_its_clients(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster
) -> None:
    """No client is told: what was published meanwhile is read from the history."""
    nodes = [await serve_relay(redis_url=cluster.url, **STORES) for _ in range(2)]
    (topic, owner), (_, other), *_ = topics_everywhere(cluster, 1).items()
    client = await connect(nodes[0], query=f"token={token('dave', {'*': 'join'})}")
    await client.send("1", "1", topic, "phx_join", {"since": None})
    assert (await client.receive())[4]["status"] == "ok"
    count = 0

    async def publish(seconds: float) -> None:
        nonlocal count
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            await nodes[1].relay.publish(topic, "tick", {"n": count})
            count += 1

    def is_owner(node: Node) -> bool:
        return cluster.owners()[slot(topic)] is node

    for source, target in ((owner, other), (other, owner)):
        publishing = asyncio.create_task(publish(1.0))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(
            source.ask, "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot(topic), slot(topic), "NODE", target.id
        )
        await publishing
        await asyncio.to_thread(wait_for, partial(is_owner, target), "the slot to move")
        await asyncio.to_thread(cluster.wait_until_whole)
    numbers = [(await client.receive())[4]["n"] for _ in range(count)]
    assert numbers == list(range(count))
    await client.expect_alive()


async def test_presence_outlives_the_node_that_keeps_it(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster
) -> None:
    nodes = [await serve_relay(redis_url=cluster.url, redis=FAST, **STORES) for _ in range(2)]
    keeper = cluster.owner(slot_of(b"relay:presence"))
    topic = next(topic for topic, owner in topics_everywhere(cluster, 1).items() if owner is not keeper)
    for name, node in zip(("alice", "bob"), nodes, strict=True):
        client = await connect(node, query=named(name))
        _ = await client.join(topic)
    assert keeper.ask("EXISTS", "presence:{relay:presence}nodes")
    keeper.kill()
    try:
        last = await connect(nodes[0], query=named("carol"))
        status, ref = "", itertools.count(1)
        while status != "ok":
            await asyncio.sleep(0.05)
            await last.send("1", str(next(ref)), topic, "phx_join", {})
            status = (await last.receive())[4]["status"]
        for node in nodes:
            names: set[str] = set()
            while names != {"alice", "bob", "carol"}:
                await asyncio.sleep(0.05)
                with suppress(BusUnavailable):
                    names = set(await node.relay.presence(topic))
    finally:
        await asyncio.to_thread(keeper.start)
        await asyncio.to_thread(cluster.wait_until_whole)


# Programs that publish.


async def test_publishers_reach_clients_and_follow_slots(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster
) -> None:
    served = await serve_relay(redis_url=cluster.url)
    client = await connect(served)
    topics = list(topics_everywhere(cluster, 1))
    for topic in topics:
        _ = await client.join(topic)
    events = [(topic, "tick", number) for number in range(3) for topic in topics]
    async with AsyncPublisher(cluster.url) as publisher:
        assert [each.listening for each in await publisher.publish_many(events)] == [1] * len(events)
        await expect_all(client, events)
        owner, other = cluster.owner(slot(topics[0])), cluster.owner(slot(topics[1]))
        with Publisher(cluster.url) as blocking:
            found = await asyncio.to_thread(blocking.publish_many, events)
            assert [each.listening for each in found] == [1] * len(events)
            await expect_all(client, events)
            for to in (other, owner):
                await asyncio.to_thread(cluster.move_slot, slot(topics[0]), to)
                assert (await client.receive())[3] == "phx_error"
                _ = await client.join(topics[0])
                assert (await publisher.publish(topics[0], "tick", 1)).listening == 1
                assert (await asyncio.to_thread(blocking.publish, topics[0], "tick", 2)).listening == 1
                await expect_all(client, [(topics[0], "tick", 1), (topics[0], "tick", 2)])


async def test_publishers_append_to_histories(serve_relay: ServeRelay, connect: Connect, cluster: Cluster) -> None:
    """Which topics have one they find in the cluster, where the relays write it."""
    served = await serve_relay(redis_url=cluster.url, **STORES)
    client = await connect(served, query=f"token={token('erin', {'*': 'join'})}")
    topics = list(topics_everywhere(cluster, 1))
    for topic in topics:
        _ = await client.join(topic)
    events = [(topic, "tick", {"n": 1}) for topic in topics]
    async with AsyncPublisher(cluster.url) as publisher:
        assert all([each.position for each in await publisher.publish_many(events)])
    with Publisher(cluster.url) as blocking:
        assert (await asyncio.to_thread(blocking.publish, topics[0], "tick", {"n": 1})).position
    await expect_all(client, [*events, events[0]])
    many = [(topics[0], "tick", {"n": number}) for number in range(300)]
    async with AsyncPublisher(cluster.url) as publisher:  # which connects while they come
        tasks: list[asyncio.Task[Any]] = []
        for event in many:
            tasks.append(asyncio.create_task(publisher.publish(*event)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
    await expect_all(client, many)


async def expect_all(client: Client, events: Iterable[tuple[str, str, Any]]) -> None:
    """These come next, in any order but that of each topic."""
    expected = list(events)
    came = [(each[2], each[3], each[4]) for each in [await client.receive() for _ in expected]]
    for topic in {event[0] for event in expected}:
        assert [each for each in came if each[0] == topic] == [each for each in expected if each[0] == topic]


async def test_publisher_says_why_no_node_can_be_reached() -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()}"
    async with AsyncPublisher(url) as publisher:
        with pytest.raises(BusUnavailable, match="Connection refused"):
            await publisher.publish("room:1", "tick", 1)
    with Publisher(url) as blocking, pytest.raises(BusUnavailable, match="Connection refused"):
        blocking.publish("room:1", "tick", 1)


# Programs that publish by PUBLISH.


def classic_clients(cluster: Cluster) -> list[tuple[Node, str]]:
    """Subscriptions by pattern, on whichever node, each with its number there."""
    found: list[tuple[Node, str]] = []
    for node in cluster.nodes:
        lines = node.raw("CLIENT", "LIST", "TYPE", "pubsub").splitlines()
        found += ((node, line.split()[0].removeprefix("id=")) for line in lines if " psub=1 " in line)
    return found


async def until_classic(cluster: Cluster, count: int) -> None:
    """Wait until so many relays have subscribed by pattern."""
    await asyncio.to_thread(wait_for, lambda: len(classic_clients(cluster)) == count, "subscriptions by pattern")


async def test_event_that_is_published_without_the_s_comes_once_and_is_counted(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """From any node, which passes it on to the others; and so does what relay itself publishes."""
    nodes = [await serve_relay(redis_url=cluster.url, redis=FAST) for _ in range(2)]
    clients = [await connect(node) for node in nodes]
    topics = topics_everywhere(cluster, 1)
    refs = {topic: [await client.join(topic) for client in clients] for topic in topics}
    await until_classic(cluster, 2)
    for topic, node in itertools.product(topics, cluster.masters):
        node.ask("PUBLISH", f"topic:{topic}", 'tick:{"n":1}')
        await nodes[0].relay.publish(topic, "tick", {"n": 2})
        for client in clients:
            assert {(await client.receive())[4]["n"] for _ in range(2)} == {1, 2}
        assert await clients[0].push(refs[topic][0], topic, "shout", "hi") == OK
    for served, client in zip(nodes, clients, strict=True):
        await client.expect_alive()
        _, text = await http_get(f"{served.http}/metrics")
        count = len(topics) * len(cluster.masters)
        assert {metric(text, "relay_events_in_total", form=form) for form in ("publish", "topic")} == {count}
        assert metric(text, "relay_events_in_total", form="to") == 0
    said = [record.getMessage() for record in caplog.records if "use SPUBLISH" in record.getMessage()]
    assert said[0].startswith("event on 'topic:room:") and len(said) <= 2 * len(topics)


async def test_subscription_by_pattern_is_made_again(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster
) -> None:
    served = await serve_relay(redis_url=cluster.url, redis=FAST)
    client = await connect(served)
    _ = await client.join("room:1")
    for number in range(3):
        await until_classic(cluster, 1)
        await asyncio.to_thread(cluster.masters[0].ask, "PUBLISH", "topic:room:1", f"tick:{number}")
        await client.expect_event("room:1", "tick", number)
        ((node, name),) = await asyncio.to_thread(classic_clients, cluster)
        await asyncio.to_thread(node.ask, "CLIENT", "KILL", "ID", name)
        await asyncio.to_thread(wait_for, partial(_has_ended, cluster, node, name), "the end of the connection")
    assert served.relay.metrics.gaps == 0


def _has_ended(cluster: Cluster, node: Node, name: str) -> bool:
    return (node, name) not in classic_clients(cluster)


async def test_user_who_may_not_subscribe_by_pattern_is_named_once(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    for node in cluster.nodes:
        await asyncio.to_thread(node.ask, "ACL", "SETUSER", "narrow", *"reset on >pw +@all -psubscribe ~* &*".split())
    served = await serve_relay(redis_url=cluster.url.replace("://", "://narrow:pw@"), redis=FAST)

    def denied() -> list[str]:
        return [each.getMessage() for each in caplog.records if "no permission for PSUBSCRIBE" in each.getMessage()]

    await eventually(denied, "the message")
    assert (
        "published by PUBLISH instead of SPUBLISH are not received; allow it with +psubscribe &topic:*" in denied()[0]
    )
    client = await connect(served)
    _ = await client.join("room:1")
    await served.relay.publish("room:1", "tick", 1)
    await client.expect_event("room:1", "tick", 1)
    assert (await ready(served), len(denied())) == ((200, {"status": "ready"}), 1)


# What is refused.


async def test_one_redis_is_no_cluster(serve_relay: ServeRelay, valkey: Valkey) -> None:
    served = await serve_relay(redis_url=f"redis+cluster://127.0.0.1:{valkey.port}", redis=FAST)
    assert "expected redis://host:port as its address" in await until_not_ready(served)


async def test_relay_waits_for_seeds_that_are_all_dead(
    serve_relay: ServeRelay, connect: Connect, cluster: Cluster
) -> None:
    dead = free_port()
    served = await serve_relay(redis_url=f"redis+cluster://127.0.0.1:{dead},127.0.0.1:1", redis=FAST)
    assert f"127.0.0.1:{dead}: Connection refused" in await until_not_ready(served)
    client = await connect(served)
    await client.send("1", "1", "room:1", "phx_join", {})
    assert (await client.receive())[4] == UNAVAILABLE
    async with Switch.open(cluster.masters[0].port, dead):
        await until_whole(served)
        _ = await client.join("room:1")


async def test_check_examines_each_master(cluster: Cluster) -> None:
    found = await examine_cluster(Config(redis_url=cluster.url, **STORES))
    assert not [each.text for each in found if each.about == "warning"]
    assert Finding("redis", "a cluster of 3 masters and 3 replicas") in found
    assert sum(each.about == "probe" for each in found) == 3
    assert sum(each.about == "user" for each in found) == 1


async def test_check_names_what_a_user_may_not_do(cluster: Cluster) -> None:
    rights = "reset on >pw resetchannels &topic:* &from:* &relay:* +@all -spublish -ssubscribe -psubscribe".split()
    for node in cluster.nodes:
        await asyncio.to_thread(node.ask, "ACL", "SETUSER", "weak", *rights)
    found = await examine_cluster(Config(redis_url=cluster.url.replace("://", "://weak:pw@")))
    warnings = " ".join(each.text for each in found if each.about == "warning")
    assert "+ssubscribe &topic:*" in warnings
    assert "+spublish &topic:*" in warnings
    assert "events that are published by PUBLISH are not heard: allow +psubscribe &topic:*" in warnings


async def test_check_counts_the_connections_of_a_process(cluster: Cluster) -> None:
    """Two to each master, one for each store, and one to any of them for what is published by PUBLISH."""
    texts = [each.text for each in await examine_cluster(Config(redis_url=cluster.url, workers=4, **STORES))]
    assert any("a relay with 4 processes takes 20" in text for text in texts), texts


async def test_check_says_what_a_cluster_behind_a_plain_address_needs(cluster: Cluster) -> None:
    node = cluster.nodes[0]
    found = await examine(Config(redis_url=node.url))
    assert any(f"expected redis+cluster://127.0.0.1:{node.port}" in each.text for each in found)


async def test_long_polls_reach_the_process_of_their_session(serve_relay: ServeRelay, cluster: Cluster) -> None:
    secret = {"secret": "the secret that all nodes have in common"}
    first, second = [await serve_relay(redis_url=cluster.url, auth=secret) for _ in range(2)]
    async with Poller.connect(first.ws, second.ws) as poller:
        join_ref = await poller.join("room:1")
        for number in range(4):
            assert (await poller.push(join_ref, "room:1", "hello", {"n": number}))["status"] == "ok"
            await second.relay.publish("room:1", "e", {"n": number})
            await poller.expect_event("room:1", "e", {"n": number})
    assert second.relay.metrics.sockets == 0
