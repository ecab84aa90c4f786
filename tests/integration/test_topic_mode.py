"""Topic mode: what is published in whichever way reaches clients on all nodes, and the way there loses nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import httpx2 as httpx
import pytest
from redis.asyncio import Redis

from relay import AsyncPublisher, Plugin
from relay.plugins.hooks import Push
from tests.integration.test_console_socket import operator
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.process import RelayProcess, Valkey
from tests.support.redis_faults import BY_TOPIC
from tests.support.serving import Served, http_get, metric

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]

BY_PATTERN = {"publish_form": "topic"}
PREPARED = {"topic_prefix": "topic:"}


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


@pytest.fixture
def topic() -> str:
    return f"room:{uuid4().hex}"


@pytest.fixture
def server() -> Any:
    """A server of the test's own: `relay:settings` is one for all relays of a server."""
    with Valkey() as server:
        yield server


async def receive_ticks(client: Client, topic: str, *numbers: int) -> None:
    for number in numbers:
        await client.expect_event(topic, "tick", number)


async def test_every_way_to_publish_reaches_clients_on_all_nodes(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, topic: str
) -> None:
    nodes = [await serve_relay(redis_url=server.url, redis=BY_TOPIC) for _ in range(2)]
    clients = [await connect(node) for node in nodes]
    for client in clients:
        _ = await client.join(topic)
    async with Redis.from_url(server.url) as redis:
        assert await redis.publish(f"topic:{topic}", b"tick:0") == 2
        assert await redis.publish(f"to:{topic}:tick", b"-1") == 0
        assert await redis.hget("relay:settings", "publish_form") == b"topic"
    async with httpx.AsyncClient() as http:
        body = {"topic": topic, "event": "tick", "payload": 1}
        assert (await http.post(f"{nodes[0].http}/api/publish", json=body)).status_code == 200
    await nodes[1].relay.publish(topic, "tick", 2)
    async with AsyncPublisher(server.url) as publisher:
        assert (await publisher.publish(topic, "tick", 3)).listening == 2
    for client in clients:
        await receive_ticks(client, topic, 0, 1, 2, 3)
        await client.expect_alive()
    for node in nodes:
        _, text = await http_get(f"{node.http}/metrics")
        assert metric(text, 'relay_events_in_total{form="topic"}') == 4
        assert metric(text, 'relay_events_in_total{form="to"}') == 0


@pytest.mark.parametrize("name", ["{tick", "[tick]", '"tick"'])
@pytest.mark.parametrize("has_history", [False, True])
async def test_events_whose_names_begin_like_json_reach_clients(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, topic: str, name: str, has_history: bool
) -> None:
    history = [{"match": "room:*", "history": {"size": 100, "ttl_s": 60}}] if has_history else []
    topics = [*history, {"match": "room:*", "client_events": ["*"]}][:1]
    served = await serve_relay(redis_url=server.url, redis=BY_TOPIC, topics=topics)
    client, other = await connect(served), await connect(served)
    _ = await client.join(topic)
    await served.relay.publish(topic, name, 0)
    async with AsyncPublisher(server.url) as publisher:
        await publisher.publish(topic, name, 1)
    for number in range(2):
        await client.expect_event(topic, name, number)
    if not has_history:
        ref = await other.join(topic)
        assert (await other.push(ref, topic, name, 2))["status"] == "ok"
        await client.expect_event(topic, name, 2)
    assert not served.relay.metrics.dropped["message names no event"]


async def test_broadcast_from_passes_over_its_sender_on_its_node_alone(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, topic: str
) -> None:
    """The sender is a part of the message; no marker precedes it, and no transaction is needed."""
    plugin = Plugin("typing")

    @plugin.on_push("room:*", "typing")
    async def typing(push: Push) -> None:
        await push.broadcast_from("typing", {"who": "me"})
        push.stop()

    rights = ("+subscribe", "+unsubscribe", "+publish", "+ping", "+role", "&topic:*", "&from:*", "&relay:control")
    async with Redis.from_url(server.url) as redis:
        await redis.execute_command("ACL", "SETUSER", "relay", "on", ">pw", "resetchannels", "-@all", *rights)  # type: ignore[no-untyped-call]
    url = f"redis://relay:pw@127.0.0.1:{server.port}"
    nodes = [await serve_relay(redis_url=url, redis=BY_TOPIC, extra_plugins=(plugin,)) for _ in range(2)]
    sender, beside, elsewhere = await connect(nodes[0]), await connect(nodes[0]), await connect(nodes[1])
    ref = await sender.join(topic)
    for client in (beside, elsewhere):
        _ = await client.join(topic)
    assert (await sender.push(ref, topic, "typing"))["status"] == "ok"
    for client in (beside, elsewhere):
        await client.expect_event(topic, "typing", {"who": "me"})
    await sender.expect_alive()


async def test_history_presence_and_control_messages_work(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, topic: str
) -> None:
    settings: dict[str, Any] = {
        "redis_url": server.url,
        "redis": BY_TOPIC,
        "topics": [{"match": "room:*", "history": {"size": 100, "ttl_s": 60}, "presence": True}],
        "auth": {"keys": [SECRET]},
    }
    nodes = [await serve_relay(**settings) for _ in range(2)]
    one = await connect(nodes[0], query=f"token={token('alice', {'*': 'join,push,presence'})}")
    await one.send("1", "1", topic, "phx_join", {"since": None})
    reply = await one.receive()
    position = reply[4]["response"]["_position"]
    assert (await one.receive())[3] == "presence_state"
    await nodes[1].relay.publish(topic, "tick", {"n": 1})
    two = await connect(nodes[1], query=f"token={token('bob', {'*': 'join,push,presence'})}")
    await two.send("1", "1", topic, "phx_join", {"since": position})
    assert (await two.receive())[4]["response"]["recovered"] is True
    came = [await two.receive() for _ in range(2)]
    assert {event[3] for event in came} == {"presence_state", "tick"}
    came = [await one.receive() for _ in range(2)]
    assert {event[3] for event in came} == {"presence_diff", "tick"}
    assert set(await nodes[0].relay.presence(topic)) == {"alice", "bob"}
    await nodes[0].relay.kick(topic, user="bob")
    while (event := await two.receive())[3] != "phx_close":
        assert event[3] in ("presence_diff", "tick")
    assert all(node.relay.metrics.gaps == 0 for node in nodes)


async def test_console_sees_events_of_a_topic_that_no_client_has_joined(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, topic: str
) -> None:
    served = await serve_relay(redis_url=server.url, redis=BY_TOPIC)
    async with Redis.from_url(server.url) as redis, operator(served) as watching:
        await watching.ask("watch", topic=topic)
        assert await redis.publish(f"topic:{topic}", b"tick:1") == 1
        assert [event["event"] for event in (await watching.hear("events"))["events"]] == ["tick"]


# From pattern mode to topic mode.


async def expect_fleet_delivers(
    serve_relay: ServeRelay, connect: Connect, url: str, topic: str, old: dict[str, Any], new: dict[str, Any]
) -> tuple[list[Served], list[Client]]:
    """Two relays, as in the middle of a rolling restart: what each publishes reaches the clients of both."""
    nodes = [await serve_relay(redis_url=url, redis=each) for each in (old, new)]
    clients = [await connect(node) for node in nodes]
    for client in clients:
        _ = await client.join(topic)
    for number, node in enumerate((*nodes, *nodes)):
        await node.relay.publish(topic, "tick", number)
    for client in clients:
        await receive_ticks(client, topic, 0, 1, 2, 3)
    return nodes, clients


@pytest.mark.parametrize(
    ("old", "new"), [({}, PREPARED), (PREPARED, BY_PATTERN), (BY_PATTERN, BY_TOPIC)], ids=["step 1", "step 2", "step 3"]
)
async def test_fleet_in_the_middle_of_each_step_loses_nothing(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, topic: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    nodes, clients = await expect_fleet_delivers(serve_relay, connect, server.url, topic, old, new)
    for client in clients:
        await client.expect_alive()
    assert all(not node.relay.metrics.dropped for node in nodes)


async def test_publishers_may_be_moved_one_by_one_in_step_2(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, topic: str
) -> None:
    """Both forms are heard by all, in the order of their publication; the counter shows what is left to move."""
    nodes, clients = await expect_fleet_delivers(serve_relay, connect, server.url, topic, PREPARED, BY_PATTERN)
    async with Redis.from_url(server.url) as redis:
        for number in range(0, 20, 2):
            assert await redis.publish(f"to:{topic}:tick", number) == 2
            assert await redis.publish(f"topic:{topic}", b"tick:%d" % (number + 1)) == 2
    for node, client in zip(nodes, clients, strict=True):
        await receive_ticks(client, topic, *range(20))
        _, text = await http_get(f"{node.http}/metrics")
        assert metric(text, 'relay_events_in_total{form="to"}') == 12
        assert metric(text, 'relay_events_in_total{form="topic"}') == 12


async def test_default_hears_no_channels_of_topics(server: Valkey) -> None:
    with RelayProcess("--redis-url", server.url):
        async with Redis.from_url(server.url) as redis, asyncio.timeout(20):
            while not await redis.publish("to:a:b", b"{}"):  # noqa: ASYNC110  # what is waited for is another process
                await asyncio.sleep(0.01)
            assert await redis.publish("topic:a", b"b:{}") == 0
            assert not await redis.exists("relay:settings")
