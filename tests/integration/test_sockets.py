"""The main job, through real sockets and a real server, on both ways to write a frame and in both versions.

Source of the rules where none is named: protocol.md, 1.3, which is Phoenix 1.9's ``socket.ex: handle_in``.
"""

import asyncio
import base64
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import websockets
from redis.asyncio import Redis
from websockets.exceptions import InvalidStatus

from relay import Relay
from tests.support.client import BINARY, PING, PONG, TEXT, Client, RawSocket, client_frame
from tests.support.process import Valkey
from tests.support.serving import Served, eventually, heard_on, serve

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]


@pytest.fixture(params=["2.0.0", "1.0.0"], ids=["V2", "V1"])
def vsn(request: pytest.FixtureRequest) -> str:
    """Both serializers; on V1 the client's refs are integers."""
    return str(request.param)


# Events from Redis.


async def test_published_event_reaches_the_subscriber_verbatim(served: Served, redis: Redis, connect: Connect) -> None:
    client = await connect(served)
    await client.join("room:verbatim")
    payload = b'{"text" : "hi",  "n":1.0, "\\u00fc": "\xc3\xbc"}'
    await redis.publish("to:room:verbatim:new_msg", payload)
    assert await client.receive_raw() == '[null,null,"room:verbatim","new_msg",' + payload.decode() + "]"


async def test_published_event_reaches_subscribers_of_both_versions(
    served: Served, redis: Redis, connect: Connect
) -> None:
    clients = [await connect(served, vsn=version) for version in ("2.0.0", "1.0.0")]
    for client in clients:
        await client.join("room:both")
    await redis.publish("to:room:both:new_msg", '{"text":"hi"}')
    for client in clients:
        await client.expect_event("room:both", "new_msg", {"text": "hi"})


async def test_last_colon_splits_topic_from_event(served: Served, redis: Redis, connect: Connect, vsn: str) -> None:
    """Source: design.md, *Redis, in and out*."""
    client = await connect(served, vsn=vsn)
    for topic in ("a", "a:b", "a:b:c", ":", "a:*", 'q"[]\\'):
        await client.join(topic)
    for topic in ("a", "a:b", "a:b:c", ":", "a:*", 'q"[]\\'):
        await redis.publish(f"to:{topic}:new", "[1]")
        await client.expect_event(topic, "new", [1])
    await client.expect_alive()


async def test_events_of_topics_not_joined_do_not_arrive(served: Served, redis: Redis, connect: Connect) -> None:
    client = await connect(served)
    await client.join("room:mine")
    await redis.publish("to:room:theirs:new", "{}")
    await redis.publish("to:room:mine2:new", "{}")
    await redis.publish("to:room:mine:new", "{}")
    await client.expect_event("room:mine", "new", {})
    assert served.relay.metrics.events_without_subscribers == 2


async def test_payload_that_is_no_json_arrives_as_a_binary_broadcast(
    served: Served, redis: Redis, connect: Connect
) -> None:
    """Source: ``v2_json_serializer.ex: fastlane!``, kind 2; V1 has no binary frames and gets base64."""
    new, old = await connect(served), await connect(served, vsn="1.0.0")
    await new.join("topic")
    await old.join("topic")
    await redis.publish("to:topic:event", b"efg\x00\xff")
    assert await new.receive_raw() == bytes.fromhex("020505") + b"topicevent" + b"efg\x00\xff"
    await old.expect_event("topic", "event", {"base64": base64.b64encode(b"efg\x00\xff").decode()})


async def test_relay_broadcasts_from_the_teams_own_code(served: Served, connect: Connect, vsn: str) -> None:
    client = await connect(served, vsn=vsn)
    await client.join("room:code")
    await served.relay.broadcast("room:code", "new_msg", {"text": "hi"})
    await client.expect_event("room:code", "new_msg", {"text": "hi"})


# Pushes to Redis.


async def test_push_is_published_to_redis_verbatim(served: Served, valkey: Valkey, connect: Connect, vsn: str) -> None:
    client = await connect(served, vsn=vsn)
    await client.join("room:push")
    ref = json.dumps(client.next_ref())
    async with heard_on(valkey.url, "from:room:push:*") as heard:
        payload = '{"text" : "hi",  "n":1.0}'
        if client.v1:
            frame = f'{{"topic":"room:push","event":"shout","payload":{payload},"ref":{ref}}}'
        else:
            frame = f'[null,{ref},"room:push","shout",{payload}]'
        await client.send_raw(frame)
        assert await heard() == ("from:room:push:shout", payload.encode())
    assert (await client.receive()) is not None


async def test_payload_of_a_push_may_be_any_json(served: Served, valkey: Valkey, connect: Connect) -> None:
    client = await connect(served)
    join_ref = await client.join("room:any")
    async with heard_on(valkey.url, "from:room:any:*") as heard:
        payloads: tuple[Any, ...] = ({}, [], 5, "text", None, True, {"deep": [[[1]]]})
        for payload in payloads:
            await client.send(join_ref, "1", "room:any", "shout", payload)
            assert await client.receive() == client.reply(join_ref, "1", "room:any")
            assert await heard() == ("from:room:any:shout", json.dumps(payload).encode())


async def test_joins_leaves_and_heartbeats_are_not_published(served: Served, valkey: Valkey, connect: Connect) -> None:
    """Source: design.md – tokens travel in joins."""
    client = await connect(served)
    async with heard_on(valkey.url, "from:*") as heard:
        join_ref = await client.join("room:quiet", {"token": "secret"})
        await client.expect_alive()
        await client.push(join_ref, "room:quiet", "shout", 1)
        assert await heard() == ("from:room:quiet:shout", b"1")


async def test_binary_push_is_published_as_its_bytes(served: Served, valkey: Valkey, connect: Connect) -> None:
    """Source: protocol.md, 1.2: ``00 jl rl tl el join_ref ref topic event data``."""
    client = await connect(served)
    join_ref = await client.join("topic")
    async with heard_on(valkey.url, "from:topic:*") as heard:
        names = (join_ref, "123", "topic", "event")
        head = bytes((0, *map(len, names))) + "".join(names).encode()
        for payload in (b"efg", b"\xff\x00", b""):
            await client.send_raw(head + payload)
            assert await client.receive() == client.reply(join_ref, "123", "topic")
            assert await heard() == ("from:topic:event", payload)
        await client.send_raw(bytes((0, 0, 1, 5, 5)) + b"1topicevent" + b"no join_ref")
        assert await client.receive() == client.reply(join_ref, "1", "topic")
        assert await heard() == ("from:topic:event", b"no join_ref")


async def test_v1_client_may_send_its_json_in_binary_frames(served: Served, valkey: Valkey, connect: Connect) -> None:
    """Source: protocol.md, 1.11 – PyPI's and npm's V1 clients do."""
    client = await connect(served, vsn=None)
    await client.send_raw(b'{"topic":"room:v1","event":"phx_join","payload":{},"ref":1}')
    assert await client.receive() == client.reply(None, 1, "room:v1")
    async with heard_on(valkey.url, "from:room:v1:*") as heard:
        await client.send_raw('{"topic":"room:v1","event":"shout","payload":"ü","ref":null}'.encode())
        assert await heard() == ("from:room:v1:shout", '"ü"'.encode())
    await client.expect_alive()


async def test_push_to_a_topic_whose_settings_forbid_it_is_refused(
    serve_relay: ServeRelay, valkey: Valkey, connect: Connect, vsn: str
) -> None:
    served = await serve_relay(topics=[{"match": "news:*", "push": False}])
    client = await connect(served, vsn=vsn)
    news, room = await client.join("news:1"), await client.join("room:1")
    async with heard_on(valkey.url, "from:*") as heard:
        refused = await client.push(news, "news:1", "shout", 1)
        assert refused == {"status": "error", "response": {"reason": "push not allowed"}}
        assert await client.push(room, "room:1", "shout", 2) == {"status": "ok", "response": {}}
        assert await heard() == ("from:room:1:shout", b"2")
    assert served.relay.metrics.refused == {"push not allowed": 1}


# The reaction table.


async def test_heartbeat_is_answered_at_any_time(served: Served, connect: Connect, vsn: str) -> None:
    client = await connect(served, vsn=vsn)
    await client.expect_alive()
    join_ref = await client.join("room:1")
    await client.expect_alive()
    await client.send(join_ref, client.next_ref(), "room:1", "phx_leave", {})
    await client.receive()
    await client.receive()
    await client.expect_alive()


async def test_heartbeat_reply_has_no_join_ref_whatever_the_client_sent(served: Served, connect: Connect) -> None:
    client = await connect(served)
    await client.send("5", "6", "phoenix", "heartbeat", {})
    assert await client.receive() == client.reply(None, "6", "phoenix")


async def test_topic_phoenix_cannot_be_joined(served: Served, connect: Connect, vsn: str) -> None:
    client = await connect(served, vsn=vsn)
    await client.send("3", 3, "phoenix", "phx_join", {})
    assert await client.receive() == client.refusal(None, 3, "phoenix", "unmatched topic")
    await client.expect_alive()


async def test_join_without_join_ref_goes_by_its_ref(served: Served, connect: Connect) -> None:
    """Source: protocol.md, 1.3 – the channel then uses ``ref`` for its own messages."""
    client = await connect(served)
    await client.send(None, "9", "room:1", "phx_join", {})
    assert await client.receive() == [None, "9", "room:1", "phx_reply", {"status": "ok", "response": {}}]
    await client.send(None, "10", "room:1", "phx_leave", {})
    assert await client.receive() == client.reply("9", "10", "room:1")
    assert await client.receive() == ["9", "9", "room:1", "phx_close", {}]


async def test_second_join_to_a_topic_closes_the_first(
    served: Served, redis: Redis, connect: Connect, vsn: str
) -> None:
    """Wire order: the new join's reply, then ``phx_close`` with the old ``join_ref``; one subscription is left."""
    client = await connect(served, vsn=vsn)
    first = await client.join("room:twice")
    second = await client.join("room:twice")
    assert await client.receive() == client.message(first, first, "room:twice", "phx_close", {})
    await redis.publish("to:room:twice:new", "{}")
    await client.expect_event("room:twice", "new", {})
    await client.send(second, 50, "room:twice", "shout", {})
    assert await client.receive() == client.reply(second, 50, "room:twice")
    if not client.v1:
        await client.send(first, 51, "room:twice", "shout", {})  # of the one that was closed: no answer
    await client.expect_alive()


async def test_leave_is_answered_then_the_topic_is_closed(
    served: Served, redis: Redis, connect: Connect, vsn: str
) -> None:
    client = await connect(served, vsn=vsn)
    join_ref = await client.join("room:left")
    await client.send(join_ref, 8, "room:left", "phx_leave", {})
    assert await client.receive() == client.reply(join_ref, 8, "room:left")
    assert await client.receive() == client.message(join_ref, join_ref, "room:left", "phx_close", {})
    await redis.publish("to:room:left:new", "{}")
    await client.send(join_ref, 9, "room:left", "shout", {})
    assert await client.receive() == client.refusal(None, 9, "room:left", "unmatched topic")
    await eventually(lambda: served.relay.metrics.events_in == 1, "the event to come in")
    await client.expect_alive()


async def test_leave_without_join_ref_is_a_leave(served: Served, connect: Connect) -> None:
    client = await connect(served)
    join_ref = await client.join("room:1")
    await client.send(None, "8", "room:1", "phx_leave", {})
    assert await client.receive() == client.reply(join_ref, "8", "room:1")
    assert await client.receive() == client.message(join_ref, join_ref, "room:1", "phx_close", {})


async def test_leave_under_a_stale_join_ref_is_dropped(served: Served, redis: Redis, connect: Connect) -> None:
    client = await connect(served)
    await client.join("room:stale")
    await client.send("1", "8", "room:stale", "phx_leave", {})
    await client.expect_alive()
    await redis.publish("to:room:stale:new", "{}")
    await client.expect_event("room:stale", "new", {})
    assert served.relay.metrics.refused["stale join_ref"] == 1


async def test_leave_of_a_topic_not_joined_is_ok_without_close(served: Served, connect: Connect, vsn: str) -> None:
    client = await connect(served, vsn=vsn)
    await client.send("4", 8, "room:never", "phx_leave", {})
    assert await client.receive() == client.reply("4", 8, "room:never")
    await client.expect_alive()


async def test_push_under_a_stale_join_ref_is_dropped_and_null_passes(
    served: Served, valkey: Valkey, connect: Connect
) -> None:
    client = await connect(served)
    join_ref = await client.join("room:stale")
    async with heard_on(valkey.url, "from:room:stale:*") as heard:
        await client.send("1", "8", "room:stale", "shout", "stale")
        await client.send(None, "9", "room:stale", "shout", "null")
        assert await client.receive() == client.reply(join_ref, "9", "room:stale")
        assert await heard() == ("from:room:stale:shout", b'"null"')
    await client.expect_alive()


async def test_push_to_a_topic_not_joined_is_refused(
    served: Served, valkey: Valkey, connect: Connect, vsn: str
) -> None:
    client = await connect(served, vsn=vsn)
    await client.join("room:mine")
    async with heard_on(valkey.url, "from:*") as heard:
        await client.send("4", 8, "room:other", "shout", {})
        assert await client.receive() == client.refusal(None, 8, "room:other", "unmatched topic")
        await client.push(None, "room:mine", "shout")
        assert (await heard())[0] == "from:room:mine:shout"


async def test_binary_push_to_a_topic_not_joined_is_refused_in_text(served: Served, connect: Connect) -> None:
    """Source: protocol.md, 1.10, as seen on a running Phoenix."""
    client = await connect(served)
    await client.send_raw(bytes((0, 1, 1, 5, 5)) + b"12topicevent" + b"data")
    assert await client.receive() == client.refusal(None, "2", "topic", "unmatched topic")


async def test_refs_are_echoed_as_they_came(served: Served, connect: Connect, vsn: str) -> None:
    """Source: protocol.md, 1.2 – phoenix.js compares with ``===``."""
    client = await connect(served, vsn=vsn)
    for number, ref in enumerate(("007", "", "ünïcode", " ", '"', "0" * 255, 0, 12, -1, 2**53)):
        topic = f"room:{number}"
        await client.send(None, ref, "phoenix", "heartbeat", {})
        assert await client.receive() == client.reply(None, ref, "phoenix")
        await client.send(ref, ref, topic, "phx_join", {})
        assert await client.receive() == client.reply(ref, ref, topic)
        await client.send(ref, ref, topic, "shout", {})
        assert await client.receive() == client.reply(ref, ref, topic)


async def test_push_without_ref_is_published_and_not_answered(
    served: Served, valkey: Valkey, connect: Connect, vsn: str
) -> None:
    client = await connect(served, vsn=vsn)
    join_ref = await client.join("room:1")
    async with heard_on(valkey.url, "from:room:1:*") as heard:
        await client.send(join_ref, None, "room:1", "shout", 1)
        await client.push(join_ref, "room:1", "shout", 2)
        assert [await heard(), await heard()] == [("from:room:1:shout", b"1"), ("from:room:1:shout", b"2")]


async def test_join_beyond_the_limit_of_topics_is_refused(served: Served, connect: Connect, vsn: str) -> None:
    """Source: Phoenix 1.8.9, ``max_channels_per_transport``, 100. A rejoin is no further topic, a leave makes room."""
    client = await connect(served, vsn=vsn)
    join_refs = [await client.join(f"room:{number}") for number in range(100)]
    await client.send(900, 900, "room:100", "phx_join", {})
    assert await client.receive() == client.refusal(900, 900, "room:100", "too many channels joined")
    again = await client.join("room:7")
    assert await client.receive() == client.message(join_refs[7], join_refs[7], "room:7", "phx_close", {})
    await client.send(again, 901, "room:7", "phx_leave", {})
    assert await client.receive() == client.reply(again, 901, "room:7")
    assert await client.receive() == client.message(again, again, "room:7", "phx_close", {})
    await client.join("room:100")


# Order.


def _burst(client_version: str, topic: str) -> tuple[list[bytes], list[Any]]:
    """Frames of a join, pushes and a leave, and what must come back, in order."""
    client = Client.__new__(Client)
    client.v1 = client_version.startswith("1")
    sent: list[tuple[Any, ...]] = [(3, 3, topic, "phx_join", {})]
    sent += [(3, ref, topic, "shout", {"n": ref}) for ref in range(10, 30)]
    sent += [(3, 30, topic, "phx_leave", {}), (3, 31, topic, "shout", {})]
    expected = [client.reply(3, ref, topic) for ref in (3, *range(10, 31))]
    expected += [client.message(3, 3, topic, "phx_close", {}), client.refusal(None, 31, topic, "unmatched topic")]
    return [json.dumps(client.message(*message)).encode() for message in sent], expected


@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_burst_of_join_pushes_and_leave_is_answered_in_order(serve_relay: ServeRelay, vsn: str, bus: str) -> None:
    """One write of the client; on ``memory://`` the join has to wait, and what comes behind it too."""
    served = await serve_relay(**({"broadcast_url": "memory://"} if bus == "memory" else {}))
    frames, expected = _burst(vsn, "room:burst")
    async with RawSocket.connect(served.ws, vsn=vsn) as client:
        await client.send_bytes(b"".join(client_frame(TEXT, frame) for frame in frames))
        received = [await client.read_message() for _ in expected]
    # A refusal needs no Redis and may overtake replies of pushes; here the leave stands between.
    assert received == expected


async def test_many_pushes_are_published_and_answered_in_order(
    serve_relay: ServeRelay, valkey: Valkey, connect: Connect, vsn: str
) -> None:
    client = await connect(await serve_relay(limits={"pushes_per_s": 0}), vsn=vsn)
    join_ref = await client.join("room:many")
    async with heard_on(valkey.url, "from:room:many:*") as heard:

        async def send() -> None:
            for number in range(1000):
                await client.send(join_ref, number, "room:many", "shout", number)

        sending = asyncio.create_task(send())
        for number in range(1000):
            assert await client.receive() == client.reply(join_ref, number, "room:many")
            assert await heard() == ("from:room:many:shout", b"%d" % number)
        await sending


async def test_no_event_comes_before_a_join_reply_or_after_a_close(
    served: Served, redis: Redis, connect: Connect, vsn: str
) -> None:
    """Somebody publishes without a pause while the client joins and leaves."""
    client = await connect(served, vsn=vsn)
    stop = asyncio.Event()

    async def publish() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            await redis.publish("to:room:busy:tick", number)

    publishing = asyncio.create_task(publish())
    for _ in range(30):
        join_ref = await client.join("room:busy")  # expects its reply next
        numbers = []
        for _ in range(3):
            event = await client.receive()
            payload = event["payload"] if client.v1 else event[4]
            assert event == client.message(None, None, "room:busy", "tick", payload)
            numbers.append(payload)
        ref = client.next_ref()
        await client.send(join_ref, ref, "room:busy", "phx_leave", {})
        while (event := await client.receive()) != client.reply(join_ref, ref, "room:busy"):
            numbers.append(event["payload"] if client.v1 else event[4])
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert await client.receive() == client.message(join_ref, join_ref, "room:busy", "phx_close", {})
        await client.expect_alive()
    stop.set()
    await publishing


async def test_events_of_several_topics_arrive_in_the_order_of_redis(
    served: Served, redis: Redis, connect: Connect, vsn: str
) -> None:
    client = await connect(served, vsn=vsn)
    for topic in ("a", "b", "c"):
        await client.join(topic)
    pipeline = redis.pipeline(transaction=False)
    for number in range(600):
        _ = pipeline.publish(f"to:{'abc'[number % 3]}:tick", number)
    await pipeline.execute()
    for number in range(600):
        await client.expect_event("abc"[number % 3], "tick", number)


# The handshake.


async def _refusal(served: Served, path: str = "/socket/websocket", **options: Any) -> tuple[int, str]:
    """Status and text of a handshake that must be refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with websockets.connect(f"ws://127.0.0.1:{served.port}{path}", **options):
            pass
    return caught.value.response.status_code, (caught.value.response.body or b"").decode()


async def test_unknown_vsn_is_refused(served: Served) -> None:
    """Source: ``socket.ex: negotiate_serializer`` – V1 for ``~> 1.0.0``, V2 for ``~> 2.0.0``."""
    unknown = ("1.1.0", "2.1.0", "3.0.0", "123.1.1", "x", "", "2", "2.0", "-2.0.0", "2.0.0-rc")
    for vsn in unknown:
        status, text = await _refusal(served, f"/socket/websocket?vsn={vsn}")
        assert status == 403, vsn
        assert "vsn=2.0.0" in text
    assert served.relay.metrics.refused == {"handshake: version": len(unknown)}


async def test_vsn_that_is_a_list_is_refused(served: Served) -> None:
    assert (await _refusal(served, "/socket/websocket?vsn[]=2.0.0"))[0] == 403


@pytest.mark.parametrize("vsn", ["2.0.9", "1.0.5", None])
async def test_compatible_vsn_is_accepted_and_none_means_v1(served: Served, connect: Connect, vsn: str | None) -> None:
    client = await connect(served, vsn=vsn, query="token=a%20b&x[y]=1")
    await client.join("room:1")


async def test_wrong_path_is_404_and_says_which_is_right(served: Served) -> None:
    wrong = ("/socket", "/websocket", "/socket/websocket/x", "/", "/socket/longpoll", "/other/websocket")
    for path in wrong:
        status, text = await _refusal(served, path)
        assert status == 404, path
        assert "/socket/websocket" in text
    assert served.relay.metrics.refused == {"handshake: path": len(wrong)}


async def test_several_socket_paths_may_be_set(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(socket_paths=["/live", "/v2/socket/"])
    for path in ("/live", "/v2/socket"):
        async with Client.connect(f"ws://127.0.0.1:{served.port}{path}") as client:
            await client.expect_alive()
    assert (await _refusal(served, "/socket/websocket"))[0] == 404


async def test_page_from_elsewhere_is_refused_with_the_reason(served: Served) -> None:
    status, text = await _refusal(served, "/socket/websocket?vsn=2.0.0", origin="https://evil.example")
    assert status == 403
    assert "https://evil.example" in text
    assert "origins" in text
    assert served.relay.metrics.refused == {"handshake: origin": 1}


async def test_page_from_the_same_host_and_port_is_accepted(served: Served, connect: Connect) -> None:
    await (await connect(served, origin=f"http://127.0.0.1:{served.port}")).expect_alive()
    assert (await _refusal(served, origin=f"http://192.168.1.5:{served.port}"))[0] == 403
    assert (await _refusal(served, origin="null"))[0] == 403


async def test_pages_that_the_settings_name_are_accepted(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(allowed_origins=["https://example.org", "//*.example.net"])
    for origin in ("https://example.org", "http://a.example.net:8080"):
        await (await connect(served, origin=origin)).expect_alive()
    for origin in ("http://example.org", "https://example.net", "https://example.org.evil.example"):
        assert (await _refusal(served, origin=origin))[0] == 403


def _token(text: str) -> str:
    return "base64url.bearer.phx." + base64.b64encode(text.encode()).decode().rstrip("=")


@pytest.mark.parametrize("token", ["secret", "a", "~~~???", "ünïcode", "eyJhbGciOi.J9-_x.yz"])
async def test_auth_token_subprotocol_is_answered_with_phoenix_alone(
    served: Served, connect: Connect, caplog: pytest.LogCaptureFixture, direct: bool, token: str
) -> None:
    """Source: protocol.md, 1.1 – browsers fail the connection without the echo."""
    caplog.set_level("DEBUG" if direct else "INFO")  # Uvicorn's own class logs headers for debugging
    offered = ["phoenix", _token(token).replace("+", "-").replace("/", "_")]
    client = await connect(served, subprotocols=offered)
    assert client.connection.subprotocol == "phoenix"
    await client.join("room:1")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("relay", "uvicorn"))]
    assert not any(_token(token) in line for line in ours)


async def test_no_subprotocol_is_answered_where_none_is_asked_for(served: Served, connect: Connect) -> None:
    assert (await connect(served)).connection.subprotocol is None


async def test_subprotocols_without_phoenix_are_refused(served: Served) -> None:
    status, text = await _refusal(served, subprotocols=["graphql-ws"])
    assert status == 403
    assert "phoenix" in text


async def test_auth_token_that_does_not_decode_is_refused(served: Served) -> None:
    """Source: protocol.md, 1.9, no. 10 – a 4xx, not a 500."""
    status, text = await _refusal(served, subprotocols=["phoenix", "base64url.bearer.phx.a!b"])
    assert status == 400
    assert "base64" in text
    assert "a!b" not in text


# The end of a socket.


async def test_silent_socket_is_closed_and_heartbeats_keep_one(
    serve_relay: ServeRelay, connect: Connect, vsn: str
) -> None:
    """Source: protocol.md, 1.1 ``timeout``; code 1001 lets phoenix.js come back."""
    served = await serve_relay(limits={"idle_timeout_s": 1.0})
    lively = await connect(served, vsn=vsn)  # the older of the two: were it not kept, it would end first
    silent = await connect(served, vsn=vsn)
    closed = asyncio.create_task(silent.expect_closed())
    while not closed.done():
        await lively.expect_alive()
        await asyncio.wait((closed,), timeout=0.1)
    assert await closed == (1001, "idle for 1 s; send heartbeats")
    await lively.expect_alive()
    assert served.relay.metrics.refused == {"idle": 1}


@pytest.mark.parametrize("direct", [True])
async def test_websocket_pings_keep_a_socket(serve_relay: ServeRelay, connect: Connect) -> None:
    """Source: protocol.md, 1.10. ASGI does not tell of pings, so this holds for our protocol class alone."""
    served = await serve_relay(limits={"idle_timeout_s": 1.0})
    async with RawSocket.connect(served.ws) as lively:
        silent = await connect(served)
        closed = asyncio.create_task(silent.expect_closed())
        while not closed.done():
            await lively.send_frame(PING, b"x")
            assert await lively.read_frame() == (PONG, b"x")
            await asyncio.wait((closed,), timeout=0.1)
        await lively.send_frame(PING, b"y")
        assert await lively.read_frame() == (PONG, b"y")


async def test_server_that_ends_closes_with_service_restart(valkey: Valkey, direct: bool) -> None:
    """Source: protocol.md, 1.5 – after 1012 phoenix.js comes back, after 1000 it would not."""
    async with serve(Relay(redis_url=valkey.url, system_topic=False), direct=direct) as served:
        async with Client.connect(served.ws) as client, Client.connect(served.ws, vsn="1.0.0") as old:
            await client.join("room:1")
            ending = asyncio.create_task(served.relay.stop())
            assert await client.expect_closed() == (1012, "the relay is restarting")
            assert (await old.expect_closed())[0] == 1012
            await ending
            assert served.relay.metrics.sockets == 0


async def test_uvicorn_that_ends_closes_with_service_restart(valkey: Valkey, connect: Connect, direct: bool) -> None:
    async with serve(Relay(redis_url=valkey.url, system_topic=False), direct=direct) as served:
        client = await connect(served)
        await client.join("room:1")
    assert (await client.expect_closed())[0] == 1012
    assert served.relay.metrics.sockets == 0


async def test_client_that_closes_leaves_nothing_behind(
    served: Served, redis: Redis, connect: Connect, vsn: str
) -> None:
    client = await connect(served, vsn=vsn)
    await client.join("room:1")
    await client.connection.close()
    await eventually(lambda: served.relay.metrics.sockets == 0, "the socket to end")
    await redis.publish("to:room:1:new", "{}")
    await eventually(lambda: served.relay.metrics.events_without_subscribers == 1, "the event to find nobody")


async def test_client_that_vanishes_leaves_nothing_behind(served: Served, redis: Redis) -> None:
    async with RawSocket.connect(served.ws) as client:
        await client.send_frame(TEXT, b'["1","1","room:1","phx_join",{}]')
        await client.read_message()
    await eventually(lambda: served.relay.metrics.sockets == 0, "the socket to end")
    await redis.publish("to:room:1:new", "{}")
    await eventually(lambda: served.relay.metrics.events_without_subscribers == 1, "the event to find nobody")


async def test_fragmented_message_is_put_together(served: Served) -> None:
    """Source: RFC 6455, section 5.4."""
    async with RawSocket.connect(served.ws) as client:
        await client.send_frame(TEXT, b'[null,"1","phoe', first_byte=TEXT)
        await client.send_frame(PING, b"between")
        await client.send_frame(0, b'nix","heartbeat",{}]')
        assert await client.read_frame() == (PONG, b"between")
        assert await client.read_message() == [None, "1", "phoenix", "phx_reply", {"status": "ok", "response": {}}]
        await client.send_frame(BINARY, bytes((0, 0, 1, 5)), first_byte=BINARY)
        await client.send_frame(0, bytes((5,)) + b"1topicevent")
        assert (await client.read_message())[4] == {"status": "error", "response": {"reason": "unmatched topic"}}
