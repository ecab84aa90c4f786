"""Bad input, from clients and from Redis: an answer or a close code with a reason, a count, and nobody else notices.

Source: where protocol.md says what to answer it is named; elsewhere the codes of RFC 6455, section 7.4.1.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
from redis.asyncio import Redis

from relay.config_sections import LimitsConfig
from tests.support.client import BINARY, TEXT, Client, RawSocket
from tests.support.serving import Served, eventually, http_get, metric

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]

LIMIT = LimitsConfig().frame_max_bytes
PAYLOAD_LIMIT = LimitsConfig().payload_max_bytes
TOPIC = "room:1"

OF_UVICORNS_OWN = (
    "Invalid UTF-8 sequence received from client.",
    "ASGI callable returned without completing handshake.",
)
"""Errors that Uvicorn's own protocol class logs by itself, the second for every refusal; no application can help it."""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture, direct: bool) -> Iterator[None]:
    """Whatever comes in, nothing is logged above a warning, by us or by Uvicorn, and no traceback."""
    caplog.set_level(logging.DEBUG, "relay")
    yield
    loud = [
        record
        for record in caplog.get_records("call")
        if (record.levelno > logging.WARNING or record.exc_info)
        and (direct or not record.getMessage().startswith(OF_UVICORNS_OWN))
    ]
    assert not loud, [(record.name, record.getMessage(), record.exc_info) for record in loud]


@asynccontextmanager
async def bystander(served: Served, redis: Redis) -> AsyncIterator[None]:
    """Another socket on the same relay: it gets the event after the block, and nothing else."""
    async with Client.connect(served.ws) as client:
        await client.join("by:stander")
        yield
        await redis.publish("to:by:stander:after", "[1]")
        await client.expect_event("by:stander", "after", [1])
        await client.expect_alive()


async def counted(served: Served, name: str, reason: str) -> float:
    """One reason's metric on ``/metrics``; of what is malformed, one close code's."""
    label = "code" if name == "malformed" else "reason"
    labels = {label: reason.replace(" ", "_")} | ({"kind": "socket"} if name == "refused" else {})
    return metric((await http_get(f"{served.http}/metrics"))[1], f"relay_{name}_total", **labels)


class Bad(NamedTuple):
    """A frame that closes its socket."""

    name: str
    opcode: int
    payload: bytes
    code: int
    reason: str
    vsn: str = "2.0.0"


DEEP = b"[" * 10_000 + b"]" * 10_000

CLOSING = [
    Bad("no json", TEXT, b"no json", 1007, "expected JSON"),
    Bad("empty text", TEXT, b"", 1007, "expected JSON"),
    Bad("json cut short", TEXT, b'["1","2","room:1","shout",{"a":', 1007, "expected JSON"),
    Bad("something behind the json", TEXT, b'["1","2","room:1","shout",{}]]', 1007, "expected JSON"),
    Bad("nan", TEXT, b'["1","2","room:1","shout",NaN]', 1007, "expected JSON"),
    Bad("four elements", TEXT, b'["1","2","room:1","shout"]', 1007, "expected [join_ref, ref, topic, event, payload]"),
    Bad("no elements", TEXT, b"[]", 1007, "expected [join_ref, ref, topic, event, payload]"),
    Bad("a number", TEXT, b"5", 1007, "expected [join_ref, ref, topic, event, payload]"),
    Bad("null", TEXT, b"null", 1007, "expected [join_ref, ref, topic, event, payload]"),
    Bad("topic is a number", TEXT, b'["1","2",3,"shout",{}]', 1007, "expected [join_ref"),
    Bad("topic is null", TEXT, b'["1","2",null,"shout",{}]', 1007, "expected [join_ref"),
    Bad("event is an object", TEXT, b'["1","2","room:1",{},{}]', 1007, "expected [join_ref"),
    Bad("ref is an object", TEXT, b'["1",{},"room:1","shout",{}]', 1007, "expected [join_ref"),
    Bad("join_ref is a fraction", TEXT, b'[1.5,"2","room:1","shout",{}]', 1007, "expected [join_ref"),
    Bad("V1 map on V2", TEXT, b'{"topic":"t","event":"e","payload":{},"ref":"1"}', 1007, "expected [join_ref"),
    Bad("10 000 deep", TEXT, b'["1","2","room:1","shout",' + DEEP + b"]", 1007, "nested too deep"),
    Bad("10 000 deep and nothing else", TEXT, DEEP, 1007, "expected"),
    Bad("surrogates in utf-8", TEXT, b'[null,"\xed\xa0\x80","phoenix","heartbeat",{}]', 1007, ""),
    Bad("no utf-8", TEXT, b'[null,"\xff","phoenix","heartbeat",{}]', 1007, ""),
    Bad(
        "one byte over the limit", TEXT, b'[null,"1","phoenix","heartbeat",{}]'.ljust(LIMIT + 1), 1009, "1052672 bytes"
    ),
    Bad("over the limit in bytes only", TEXT, ('"' + "ü" * (LIMIT // 2) + '"').encode(), 1009, "1052672 bytes"),
    Bad("binary over the limit", BINARY, bytes(LIMIT + 1), 1009, "1052672 bytes"),
    Bad("empty binary", BINARY, b"", 1003, "an empty frame"),
    Bad("text in a binary frame", BINARY, b'["1","2","room:1","shout",{}]', 1003, "got kind 91"),
    Bad("kind reply", BINARY, bytes((1, 1, 1, 1, 1)) + b"abcd", 1003, "got kind 1"),
    Bad("kind broadcast", BINARY, bytes((2, 1, 1)) + b"abcd", 1003, "got kind 2"),
    Bad("kind of Supabase", BINARY, bytes((3, 1, 1, 6, 1, 0, 1)) + b"12room:1e{}", 1003, "got kind 3"),
    Bad("unknown kind", BINARY, bytes((255,)) * 20, 1003, "got kind 255"),
    Bad("binary without lengths", BINARY, bytes((0, 1, 1)), 1007, "cut short at 3 bytes"),
    Bad("binary cut short", BINARY, bytes((0, 1, 1, 6, 5)) + b"12room:1sho", 1007, "cut short at 16 bytes"),
    Bad("binary topic is no utf-8", BINARY, bytes((0, 1, 1, 2, 1)) + b"12\xff\xfee", 1007, "expected UTF-8 text"),
    Bad("array on V1", TEXT, b'["1","2","room:1","shout",{}]', 1007, "expected {topic, event, payload, ref}", "1.0.0"),
    Bad("V1 without ref", TEXT, b'{"topic":"t","event":"e","payload":{}}', 1007, "expected {topic", "1.0.0"),
    Bad("V1 without payload", TEXT, b'{"topic":"t","event":"e","ref":1}', 1007, "expected {topic", "1.0.0"),
    Bad("V1 topic is a list", TEXT, b'{"topic":[],"event":"e","payload":{},"ref":1}', 1007, "expected {topic", "1.0.0"),
    Bad("V1 10 000 deep", TEXT, b'{"x":' + DEEP + b"}", 1007, "nested too deep", "1.0.0"),
    Bad("binary push on V1", BINARY, bytes((0, 1, 1, 5, 5)) + b"12topicevent", 1007, "expected JSON", "1.0.0"),
    Bad("V1 binary that is no utf-8", BINARY, b'{"topic":"\xff"}', 1007, "expected UTF-8 text", "1.0.0"),
]


@pytest.mark.parametrize("bad", CLOSING, ids=lambda bad: bad.name)
async def test_frame_that_says_nothing_closes_its_socket_with_code_and_reason(
    served: Served, redis: Redis, bad: Bad
) -> None:
    """Phoenix closes with 1011 and no word (protocol.md, 1.10); ours says what was wrong."""
    async with bystander(served, redis):
        async with RawSocket.connect(served.ws, vsn=bad.vsn) as client:
            await client.send_frame(bad.opcode, bad.payload)
            code, reason = await client.read_close()
            assert code == bad.code
            assert bad.reason in reason
            # The closing handshake: our answer, then the end of the connection.
            await client.send_frame(8, code.to_bytes(2))
            with pytest.raises((EOFError, ConnectionError)):
                await client.read_frame()
        await eventually(lambda: served.relay.metrics.malformed.total() == 1, "the frame to be counted")
        assert await counted(served, "malformed", str(bad.code)) == 1


@pytest.mark.parametrize("size", [LIMIT + 1, LIMIT + 2, 20 * LIMIT])
@pytest.mark.parametrize("by_server", [True, False], ids=["server's limit", "relay's limit"])
async def test_frame_over_the_limit_is_refused_by_whoever_sees_it_first(
    serve_relay: ServeRelay, redis: Redis, size: int, by_server: bool
) -> None:
    """`relay serve` gives Uvicorn the same limit, so that no more is ever held in memory."""
    served = await serve_relay(server={"ws_max_size": LIMIT if by_server else 64 * LIMIT})
    async with bystander(served, redis), RawSocket.connect(served.ws) as client:
        try:
            await client.send_frame(TEXT, b'[null,"1","phoenix","heartbeat",{}]'.ljust(size))
            code, _ = await client.read_close()
        except ConnectionError:  # the rest of the frame met a connection already closed, and its answer was lost
            assert by_server
        else:
            assert code == 1009
        await eventually(lambda: served.relay.metrics.malformed == {"1009": 1}, "the frame to be counted")


async def test_frame_of_exactly_the_limit_is_taken(served: Served, redis: Redis) -> None:
    async with bystander(served, redis), RawSocket.connect(served.ws) as client:
        await client.send_frame(TEXT, b'[null,"1","phoenix","heartbeat",{}]'.ljust(LIMIT))
        assert (await client.read_message())[1] == "1"
        text = '[null,"2","phoenix","heartbeat","' + "ü" * 1000
        await client.send_frame(TEXT, (text + "x" * (LIMIT - 2 - len(text.encode())) + '"]').encode())
        assert (await client.read_message())[1] == "2"
    assert not served.relay.metrics.malformed


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xc1\x80\x00\x00\x00\x00", id="reserved bit"),
        pytest.param(b"\x83\x80\x00\x00\x00\x00", id="unknown opcode"),
        pytest.param(b"\x81\x02[]", id="no mask"),
        pytest.param(b"\x09\x80\x00\x00\x00\x00", id="ping in fragments"),
        pytest.param(b"\x80\x80\x00\x00\x00\x00", id="continuation of nothing"),
    ],
)
async def test_broken_websocket_framing_closes_with_protocol_error(served: Served, redis: Redis, data: bytes) -> None:
    """Source: RFC 6455, section 5."""
    async with bystander(served, redis):
        async with RawSocket.connect(served.ws) as client:
            await client.send_bytes(data)
            assert (await client.read_close())[0] == 1002
        await eventually(lambda: served.relay.metrics.malformed == {"1002": 1}, "the frame to be counted")


async def test_close_frame_that_is_no_utf8_ends_the_socket_alone(served: Served, redis: Redis) -> None:
    async with bystander(served, redis):
        async with RawSocket.connect(served.ws) as client:
            await client.send_frame(8, b"\x03\xe8\xff\xff")
            assert (await client.read_close())[0] in (1002, 1007)
        await eventually(lambda: served.relay.metrics.sockets == 1, "the socket to end")


# Frames that make sense and ask for what cannot be.


@pytest.mark.parametrize("vsn", ["2.0.0", "1.0.0"])
async def test_join_to_an_invalid_topic_is_refused(served: Served, connect: Connect, redis: Redis, vsn: str) -> None:
    async with bystander(served, redis):
        client = await connect(served, vsn=vsn)
        for topic in ("", "x" * 256, "ü" * 128, "a\nb", "\x00", "a\x7f", "a\x85b"):
            await client.send("1", 2, topic, "phx_join", {})
            assert await client.receive() == client.refusal("1", 2, topic, "invalid topic")
        await client.expect_alive()


async def test_topic_of_255_bytes_may_be_joined(served: Served, connect: Connect, redis: Redis) -> None:
    client = await connect(served)
    for topic in ("x" * 255, "ü" * 127 + "x", " ", "\u2028"):
        await client.join(topic)
        await redis.publish(f"to:{topic}:{'e' * 255}", b"\xff")
        head = bytes((2, len(topic.encode()), 255))
        assert await client.receive_raw() == head + topic.encode() + b"e" * 255 + b"\xff"


@pytest.mark.parametrize("vsn", ["2.0.0", "1.0.0"])
async def test_push_of_an_invalid_event_is_refused(served: Served, connect: Connect, redis: Redis, vsn: str) -> None:
    async with bystander(served, redis):
        client = await connect(served, vsn=vsn)
        join_ref = await client.join(TOPIC)
        for event in ("", "a:b", ":", "x" * 256, "a\nb", "\x00", "phx_reply", "phx_error", "phx_", "chan_reply_3"):
            await client.send(join_ref, 2, TOPIC, event, {})
            assert await client.receive() == client.refusal(join_ref, 2, TOPIC, "invalid event")
        await client.expect_alive()


async def test_push_with_too_large_a_payload_is_refused(
    serve_relay: ServeRelay, connect: Connect, redis: Redis
) -> None:
    served = await serve_relay(limits={"payload_max_bytes": 1000})
    async with bystander(served, redis):
        client = await connect(served)
        join_ref = await client.join(TOPIC)
        assert await client.push(join_ref, TOPIC, "e", "x" * 998) == {"status": "ok", "response": {}}
        refused = {"status": "error", "response": {"reason": "payload too large"}}
        assert await client.push(join_ref, TOPIC, "e", "x" * 999) == refused
        await client.send_raw(bytes((0, 0, 1, 6, 1)) + b"5room:1e" + bytes(1001))
        assert await client.receive() == client.refusal(join_ref, "5", TOPIC, "payload too large")


async def test_elements_past_the_fifth_are_ignored(served: Served, connect: Connect) -> None:
    """Source: protocol.md, 1.2."""
    client = await connect(served)
    await client.send_raw('[null,"1","phoenix","heartbeat",{},6,[7]]')
    assert await client.receive() == client.reply(None, "1", "phoenix")


async def test_refusals_are_counted(served: Served, connect: Connect) -> None:
    client = await connect(served)
    join_ref = await client.join(TOPIC)
    await client.send("1", "2", "", "phx_join", {})
    await client.send("1", "2", "phoenix", "phx_join", {})
    await client.send("1", "2", "nowhere", "shout", {})
    await client.send(join_ref, "2", TOPIC, "a:b", {})
    for _ in range(4):
        assert (await client.receive())[4]["status"] == "error"
    reasons = ("invalid topic", "unmatched topic", "invalid event")
    assert [await counted(served, "refused", reason) for reason in reasons] == [1, 2, 1]


async def test_many_bad_clients_write_few_log_lines(
    served: Served, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Source: style.md – a flood of bad frames must not become a flood of lines."""
    async with bystander(served, redis):
        for _ in range(30):
            async with RawSocket.connect(served.ws) as client:
                await client.send_frame(TEXT, b"{")
                await client.read_close()
        await eventually(lambda: served.relay.metrics.malformed == {"1007": 30}, "all to be counted")
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([record for record in warnings if getattr(record, "kind", "") != "stall"]) <= 1


# Bad input over plain HTTP.


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        pytest.param(b"GET /socket/websocket HTTP/1.1\r\nHost: localhost\r\n\r\n", b"426", id="no upgrade"),
        pytest.param(
            b"POST /socket/websocket HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", b"426", id="post"
        ),
        pytest.param(b"\x00\x01\x02\r\n\r\n", b"400", id="no http"),
        pytest.param(
            b"GET /socket/websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\n\r\n",
            b"400",
            id="no key",
        ),
        pytest.param(
            b"GET /socket/websocket?vsn=%ff%00 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            b"403",
            id="vsn is no text",
        ),
        pytest.param(
            b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\n"
            b"Origin: http://[:::\xff\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            b"403",
            id="origin is no url",
        ),
    ],
)
async def test_bad_request_is_answered_with_a_status(
    served: Served, redis: Redis, request_bytes: bytes, status: bytes
) -> None:
    async with bystander(served, redis):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request_bytes)
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n")
        writer.close()
        await writer.wait_closed()
        assert head.startswith(b"HTTP/1.1 " + status), head
        assert b"Traceback" not in head


# From Redis.


@pytest.mark.parametrize(
    "payload", [b"", b"hi", b"{", b"\xff\xfe", b"NaN", b'"\xff"', b'"\xed\xa0\x80"', b"[1]]", b'"\n"', DEEP]
)
async def test_published_payload_that_is_no_json_arrives_as_bytes(
    served: Served, connect: Connect, redis: Redis, payload: bytes
) -> None:
    """Nothing published can break the frame around it (design.md, *Redis, in and out*)."""
    client = await connect(served)
    await client.join(TOPIC)
    async with bystander(served, redis):
        await redis.publish(f"to:{TOPIC}:new", payload)
        assert await client.receive_raw() == bytes((2, 6, 3)) + b"room:1new" + payload
        await client.expect_alive()


@pytest.mark.parametrize("payload", [b" {} ", b"\n[1,\t2]\r\n", b'"\\ud800"', b"1e999", b'{"a":1,"a":2}', b"null"])
async def test_published_payload_that_is_json_arrives_verbatim(
    served: Served, connect: Connect, redis: Redis, payload: bytes
) -> None:
    client = await connect(served)
    await client.join(TOPIC)
    await redis.publish(f"to:{TOPIC}:new", payload)
    frame = await client.receive_raw()
    assert frame == '[null,null,"room:1","new",' + payload.decode() + "]"
    json.loads(frame)
    await client.expect_alive()


@pytest.mark.parametrize(
    ("channel", "reason"),
    [
        (b"to:room:1:a\nb", "invalid event"),
        (b"to:room:1:\x00", "invalid event"),
        (b"to:room:1:a\xc2\x85", "invalid event"),
        (b"to:room:1:", "invalid event"),
        (b"to:room:1:" + b"x" * 256, "invalid event"),
        (b"to:room:1:phx_reply", "invalid event"),
        (b"to:room:1:phx_close", "invalid event"),
        (b"to:room:1:\xff", "channel names no event"),
        (b"to:room", "channel names no event"),
        (b"to:", "channel names no event"),
    ],
)
async def test_published_event_without_a_usable_name_is_dropped_and_counted(
    served: Served, connect: Connect, redis: Redis, channel: bytes, reason: str
) -> None:
    client = await connect(served)
    await client.join(TOPIC)
    await client.join("room")
    async with bystander(served, redis):
        await redis.publish(channel, "{}")
        await redis.publish(f"to:{TOPIC}:after", "{}")
        await client.expect_event(TOPIC, "after", {})
        assert await counted(served, "dropped", reason) == 1
    await client.expect_alive()


@pytest.mark.parametrize(
    "payload", [b'"' + b"x" * PAYLOAD_LIMIT + b'"', b"\xff" * (PAYLOAD_LIMIT + 1), b" " * (3 * PAYLOAD_LIMIT)]
)
async def test_published_payload_over_the_limit_is_dropped_and_counted(
    served: Served, connect: Connect, redis: Redis, payload: bytes
) -> None:
    client = await connect(served)
    await client.join(TOPIC)
    async with bystander(served, redis):
        await redis.publish(f"to:{TOPIC}:big", payload)
        await redis.publish(f"to:{TOPIC}:after", b'"' + b"x" * (PAYLOAD_LIMIT - 2) + b'"')
        await client.expect_event(TOPIC, "after", "x" * (PAYLOAD_LIMIT - 2))
        assert await counted(served, "dropped", "payload too large") == 1
    await client.expect_alive()


@pytest.mark.parametrize("topic", ["phoenix", "", "a\nb", "x" * 300])
async def test_published_event_on_a_topic_nobody_can_join_is_heard_by_nobody(
    served: Served, redis: Redis, topic: str
) -> None:
    async with bystander(served, redis):
        await redis.publish(f"to:{topic}:heartbeat", "{}")
        await eventually(lambda: served.relay.metrics.events_without_subscribers == 1, "the event to be counted")
