"""Client events through real servers: two nodes, the official client, V1, streams, histories and other buses."""

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from redis.asyncio import Redis

from relay import Event, Push, Relay
from relay.auth.authenticator import UpgradeRequest
from relay.plugins import Plugin
from tests.support.node import need_node, run_checks
from tests.support.process import Valkey
from tests.support.serving import Served, eventually, heard_on, http_get, metric, serve

Connect = Callable[..., Any]
ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

ROOM = {"match": "room:*", "client_events": ["typing", "cursor-*"]}


def by_user(request: UpgradeRequest) -> dict[str, str]:
    return {"sub": request.query_params["user"]}


@pytest.mark.parametrize("client", ["phoenix-1.8", "phoenix-1.7", "phoenix-1.6", "relay"])
async def test_official_client_sends_events_to_others_on_two_nodes(client: str, valkey: Valkey) -> None:
    """What ``client-events-node.mjs`` checks."""
    need_node()
    settings: dict[str, Any] = {
        "topics": [{**ROOM, "client_events_sender": True}, {"match": "plain:*", "client_events": ["raw", "bytes"]}],
        "redis_url": valkey.url,
        "auth": {"authenticated": [{"match": "*", "rights": ["join", "push"]}]},
        "authenticate": by_user,
        "system_topic": False,
    }
    async with serve(Relay(**settings)) as near, serve(Relay(**settings)) as far:
        await asyncio.to_thread(run_checks, "client-events-node.mjs", client, near.ws, far.ws)


async def test_client_event_reaches_subscribers_alone(
    serve_relay: ServeRelay, connect: Connect, redis: Redis, valkey: Valkey
) -> None:
    """No plugin's on_push, no ``from:`` channel; V1 clients and on_event are given it as any event."""
    pushes: list[str] = []
    plugin = Plugin("witness")

    @plugin.on_push()
    async def count(push: Push) -> None:
        pushes.append(push.event)

    @plugin.on_event("room:*", "cursor-*")
    def mark(event: Event) -> Event | None:
        return event.replace({**event.payload, "seen": True}) if "drop" not in event.payload else None

    served = await serve_relay(topics=[ROOM], extra_plugins=(plugin,), redis={"push_identity": True})
    alice, bob, old = await connect(served), await connect(served), await connect(served, vsn="1.0.0")
    joined = await alice.join("room:ce1")
    await bob.join("room:ce1")
    await old.join("room:ce1")
    async with heard_on(valkey.url, "from*") as hear:
        for payload in ({"drop": 1}, {"x": 1}):
            assert await alice.push(joined, "room:ce1", "cursor-move", payload) == {"status": "ok", "response": {}}
        await bob.expect_event("room:ce1", "cursor-move", {"x": 1, "seen": True})
        await old.expect_event("room:ce1", "cursor-move", {"x": 1, "seen": True})
        assert await alice.push(joined, "room:ce1", "new_msg", {}) == {"status": "ok", "response": {}}
        channels = {(await hear())[0] for _ in range(2)}
    assert channels == {"from:room:ce1:new_msg", "from-user:room:ce1:new_msg"}
    assert pushes == ["new_msg"]
    await alice.expect_alive()
    _, text = await http_get(f"{served.http}/metrics")
    assert metric(text, "relay_client_events_total") == 2


async def test_binary_client_event_reaches_v1_clients_as_base64(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(topics=[ROOM])
    alice, bob, old = await connect(served), await connect(served), await connect(served, vsn="1.0.0")
    joined = await alice.join("room:ce2")
    await bob.join("room:ce2")
    await old.join("room:ce2")
    parts = [part.encode() for part in (joined, "9", "room:ce2", "typing")]
    await alice.send_raw(bytes((0, *map(len, parts))) + b"".join(parts) + b"\x00\xff")
    assert await alice.receive() == alice.reply(joined, "9", "room:ce2")
    assert await bob.receive_raw() == bytes((2, 8, 6)) + b"room:ce2typing\x00\xff"
    await old.expect_event("room:ce2", "typing", {"base64": "AP8="})


@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_client_event_is_in_no_history(bus: str, serve_relay: ServeRelay, connect: Connect, redis: Redis) -> None:
    """Readers that ask for positions get it without one, and a forged one is taken away."""
    topic = f"room:ce-{bus}-{uuid.uuid4().hex[:8]}"
    url = {"broadcast_url": "memory://"} if bus == "memory" else {}
    served = await serve_relay(topics=[{**ROOM, "history": {"size": 10}}], **url)
    alice, reader = await connect(served), await connect(served)
    joined = await alice.join(topic)
    await reader.send("1", "1", topic, "phx_join", {"since": None})
    position = (await reader.receive())[4]["response"]["_position"]
    forged = {"_position": "9999999999999-1"}
    assert (await alice.push(joined, topic, "typing", forged))["status"] == "ok"
    assert (await reader.receive())[3:] == ["typing", {"_position": None}], "clients take the last of two members"
    await served.relay.publish(topic, "new_msg", {"n": 1})
    assert (await reader.receive())[4]["n"] == 1
    latecomer = await connect(served)
    await latecomer.send("1", "1", topic, "phx_join", {"since": position})
    reply = await latecomer.receive()
    assert reply[4]["response"]["recovered"] is True
    assert (await latecomer.receive())[3] == "new_msg"
    await latecomer.expect_alive()
    if bus == "redis":
        rows: Any = await redis.xrange(f"topic:{topic}")
        assert [fields[b"e"] for _, fields in rows if fields.get(b"e")] == [b"new_msg"]
    assert (await alice.receive())[3] == "new_msg"
    await alice.expect_alive()


async def test_flood_hurts_its_sender_alone(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(topics=[ROOM], limits={"client_events_per_s": 5})
    alice, bob = await connect(served), await connect(served)
    joined = await alice.join("room:ce3")
    other = await bob.join("room:ce3")
    for ref in range(100, 140):
        await alice.send(joined, str(ref), "room:ce3", "typing", {})
    answers = [(await alice.receive())[4] for _ in range(40)]
    refused = {"status": "error", "response": {"reason": "rate limited"}}
    assert 20 <= answers.count(refused) < 40
    for _ in range(40 - answers.count(refused)):
        await bob.expect_event("room:ce3", "typing", {})
    assert (await bob.push(other, "room:ce3", "typing", {}))["status"] == "ok"
    assert (await alice.receive())[3] == "typing"
    _, text = await http_get(f"{served.http}/metrics")
    assert metric(text, "relay_refused_total", kind="socket", reason="rate_limited") == answers.count(refused)


async def test_gap_does_not_bring_a_client_event_back_to_its_sender(valkey: Valkey, connect: Connect) -> None:
    """The event with the sender's marker is recognized on whatever subscription it comes."""
    relay = Relay(redis_url=valkey.url, system_topic=False, topics=[ROOM])
    async with serve(relay) as served:
        alice, bob = await connect(served), await connect(served)
        joined = await alice.join("room:ce4")
        await bob.join("room:ce4")
        async with Redis.from_url(valkey.url) as admin:
            await admin.client_kill_filter(_type="pubsub")
        error = [await alice.receive(), await bob.receive()]
        assert {frame[3] for frame in error} == {"phx_error"}
        await eventually(lambda: relay.node.broker.link.live, "the link")
        joined = await alice.join("room:ce4")
        await bob.join("room:ce4")
        assert (await alice.push(joined, "room:ce4", "typing", {}))["status"] == "ok"
        await bob.expect_event("room:ce4", "typing", {})
        await alice.expect_alive()
        await eventually(lambda: not relay.node.pubsub._skips, "nothing to be remembered")


@pytest.mark.parametrize("redis_settings", [{"publish_form": "topic"}, {"publish_form": "topic", "subscribe": "topic"}])
@pytest.mark.parametrize("history", [None, {"size": 10}])
async def test_client_event_takes_the_form_in_which_events_are_published(
    redis_settings: dict[str, str], history: dict[str, int] | None, valkey: Valkey, connect: Connect, redis: Redis
) -> None:
    """Where nodes hear topics one by one, nothing would hear it in the other form; and it is in no history either."""
    topic = f"room:ce-{uuid.uuid4().hex[:8]}"
    settings: dict[str, Any] = {
        "topics": [{**ROOM, "history": history}],
        "redis_url": valkey.url,
        "redis": redis_settings,
        "system_topic": False,
    }
    async with serve(Relay(**settings)) as near, serve(Relay(**settings)) as far:
        alice, bob, carol = await connect(near), await connect(near), await connect(far)
        joined = await alice.join(topic)
        for client in (bob, carol):
            await client.join(topic)
        assert await alice.push(joined, topic, "typing", {"x": 1}) == {"status": "ok", "response": {}}
        for client in (bob, carol):
            await client.expect_event(topic, "typing", {"x": 1})
        await near.relay.publish(topic, "new_msg", {})
        await alice.expect_event(topic, "new_msg", {})
        rows: Any = await redis.xrange(f"topic:{topic}")
        events = [fields[b"e"] for _, fields in rows if fields.get(b"e")]
        assert events == ([b"new_msg"] if history else [])
