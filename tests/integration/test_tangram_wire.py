"""What pages and plugins of tangram may look for on the wire, over real sockets: ``[tangram]``, and presence."""

import json
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis

from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.serving import Served

Connect = Callable[..., Any]
ServeRelay = Callable[..., Any]

TANGRAM = {"wire": True, "binary_scalars": True}


def params(channel: str, name: str) -> dict[str, str]:
    return {"token": token(None, id=name, channel=channel)}


async def serve(serve_relay: ServeRelay, **settings: Any) -> Served:
    auth = {"keys": [SECRET], "tangram": True}
    served: Served = await serve_relay(auth=auth, allow_anonymous=True, tangram=TANGRAM, **settings)
    return served


async def join(client: Client, topic: str, name: str) -> Any:
    """Join with a token of tangram's; returns what the reply says."""
    ref = client.next_ref()
    await client.send(ref, ref, topic, "phx_join", params(topic, name))
    reply = await client.receive()
    assert reply[:4] == [ref, ref, topic, "phx_reply"] and reply[4]["status"] == "ok", reply
    return reply[4]["response"]


async def test_reply_to_a_join_has_an_id_and_members_have_the_ids_of_their_tokens(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    served = await serve(serve_relay, topics=[{"match": "room:*", "presence": True}])
    client = await connect(served)
    answer = await join(client, "room:1", "page-1")
    (socket,) = served.relay.node.sockets.values()
    assert answer["id"].startswith(f"{socket.id}:room:1:")
    state = await client.receive()
    assert (state[3], list(state[4])) == ("presence_state", ["page-1"])
    other = await connect(served)
    await join(other, "room:1", "page-2")
    diff = await client.receive()
    assert (diff[3], list(diff[4]["joins"]), diff[4]["leaves"]) == ("presence_diff", ["page-2"], {})


async def test_admin_hears_who_joins_and_leaves(serve_relay: ServeRelay, connect: Connect, redis: Redis) -> None:
    served = await serve(serve_relay)
    async with redis.pubsub() as heard:
        await heard.psubscribe("to:admin:channel.add")  # as tangram_jet1090 does
        _ = await heard.get_message(timeout=10)
        admin = await connect(served)
        await join(admin, "admin", "operator")
        assert json.loads((await heard.get_message(timeout=10))["data"])["channel"] == "admin"
    assert [(await admin.receive())[3] for _ in range(3)] == ["channel.add", "channel.join", "channel.list"]
    client = await connect(served)
    agent = (await join(client, "room:1", "page-1"))["id"]
    assert [(await admin.receive())[3:] for _ in range(2)] == [
        ["channel.add", {"channel": "room:1", "channels": ["admin", "room:1"]}],
        ["channel.join", {"agent": agent, "channel": "room:1", "agents": [agent]}],
    ]
    await client.send(None, client.next_ref(), "room:1", "phx_leave", {})
    left = [(await admin.receive())[3:] for _ in range(2)]
    assert left[0] == ["channel.leave", {"agent": agent, "channel": "room:1", "agents": []}]
    assert left[1] == ["channel.remove", {"channel": "room:1", "channels": ["admin"]}]


async def test_scalars_come_as_bytes(serve_relay: ServeRelay, connect: Connect, redis: Redis) -> None:
    served = await serve(serve_relay)
    client = await connect(served)
    await join(client, "room:1", "page-1")
    for data in (b'"Hello from plugin"', b"42", b'{"a":1}'):
        await redis.publish("to:room:1:message", data)
    frames = [await client.receive_raw() for _ in range(3)]
    assert frames[:2] == [b"\x02\x06\x07room:1message" + data for data in (b'"Hello from plugin"', b"42")]
    assert json.loads(frames[2])[4] == {"a": 1}


async def test_what_differs_from_tangrams_channel_service(
    serve_relay: ServeRelay, connect: Connect, redis: Redis
) -> None:
    """Source: tangram 0.6.0 publishes joins with their tokens, takes topics for globs, and permits pushes to any."""
    served = await serve(serve_relay)
    async with redis.pubsub() as heard:
        await heard.psubscribe("from:*")
        _ = await heard.get_message(timeout=10)
        client = await connect(served)
        await join(client, "room:*", "page-1")
        await client.send(None, client.next_ref(), "phoenix", "heartbeat", {})
        assert (await client.receive())[4]["status"] == "ok"
        ref = client.next_ref()
        await client.send(ref, ref, "room:2", "phx_join", params("room:1", "page-1"))
        assert (await client.receive())[4] == {"status": "error", "response": {"reason": "unauthorized"}}
        await client.send(None, client.next_ref(), "room:3", "x", {})
        assert (await client.receive())[4] == {"status": "error", "response": {"reason": "unmatched topic"}}
        await client.send(None, client.next_ref(), "room:*", "x", {"a": 1})
        assert (await client.receive())[4]["status"] == "ok", "a push is answered"
        await client.send(None, client.next_ref(), "room:*", "phx_leave", {})
        assert [(await client.receive())[3] for _ in range(2)] == ["phx_reply", "phx_close"]
        message = await heard.get_message(timeout=10)
        assert (message["channel"], message["data"]) == (b"from:room:*:x", b'{"a": 1}'), "and nothing before it"
        assert await heard.get_message(timeout=0.1) is None, "nor behind it"
    await join(client, "room:*", "page-1")
    await redis.publish("to:room:1:x", b"{}")
    await redis.publish("to:room:*:x", b"{}")
    assert await client.receive() == [None, None, "room:*", "x", {}], "its own event, without a ref"
