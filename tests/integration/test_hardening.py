"""What a client may do below the application: bytes, frames and requests that no limit of the relay's own ever sees.

On the relay's own protocol classes, as `relay serve` uses them; on others these are the server's affair.
"""

import asyncio
import json
import zlib
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from relay import Relay
from relay.server import _Inbox
from relay.server_http import HEAD_MAX_BYTES, RelayHTTPProtocol
from tests.support.client import CLOSE, PING, PONG, TEXT, Client, RawSocket, client_frame
from tests.support.process import Valkey
from tests.support.serving import eventually, figure, http_get, serve

CONT = 0
CHUNKED = b"POST /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


async def send_until_cut(port: int, first: bytes, then: bytes, most: int) -> int:
    """Send ``then`` again and again; how many bytes it took until the server cut the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = 0
    try:
        writer.write(first)
        async with asyncio.timeout(30):
            while sent < most:
                writer.write(then)
                sent += len(then)
                await writer.drain()
                await asyncio.sleep(0)
                if reader.at_eof():
                    break
    except (ConnectionError, BrokenPipeError):
        pass
    finally:
        writer.transport.abort()
    return sent


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"0\r\n", b"x-a: " + b"b" * 60 + b"\r\n"),
        (b"0\r\nx: ", b"z" * 4096),
        (b"5;ext=", b"z" * 4096),
    ],
    ids=["trailers", "one trailer", "chunk extension"],
)
async def test_what_follows_a_body_is_bounded_as_the_head_is(valkey: Valkey, first: bytes, then: bytes) -> None:
    """Uvicorn would keep any number of trailers."""
    async with serve(Relay(redis_url=valkey.url), http=RelayHTTPProtocol) as served:
        most = 400 * HEAD_MAX_BYTES  # what the kernel takes on the way is lost, and not held
        assert await send_until_cut(served.port, CHUNKED + first, then, most) < most
        assert (await http_get(f"{served.http}/health"))[0] == 200


@pytest.mark.parametrize(
    "request_",
    [b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"],
)
async def test_connection_that_does_nothing_more_after_an_answer_is_cut(valkey: Valkey, request_: bytes) -> None:
    """Uvicorn's own timer ends with the first byte, though it be a line end that begins nothing."""
    protocol = partial(RelayHTTPProtocol, handshake_timeout_s=0.2)
    async with serve(Relay(redis_url=valkey.url), http=protocol, timeout_keep_alive=1) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request_)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 ")
        writer.write(b"\r\n" if request_.startswith(b"GET") else b"x")
        async with asyncio.timeout(20):
            await reader.read()
        writer.close()


@pytest.mark.parametrize("headers", ["Cookie: " + "c" * 9000 + "\r\n", "X-A: b\r\n" * 200], ids=["line", "number"])
async def test_upgrade_that_websockets_cannot_read_is_answered(valkey: Valkey, headers: str) -> None:
    """httptools has taken the head before; Uvicorn would let the client wait for ever, and fail at its own end."""
    async with serve(Relay(redis_url=valkey.url), http=RelayHTTPProtocol) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(
            b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
            + headers.encode()
            + b"\r\n"
        )
        async with asyncio.timeout(20):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 431 ") and b"at most 128 headers" in answer
        writer.close()
        _, text = await http_get(f"{served.http}/metrics")
        assert figure(text, "relay_refused_total", reason="handshake: head too large") == 1


@pytest.mark.parametrize("opcode", [PING, PONG, CONT], ids=["ping", "pong", "fragment"])
async def test_frames_that_carry_nothing_may_not_go_on_for_ever(valkey: Valkey, opcode: int) -> None:
    relay = Relay(redis_url=valkey.url, system_topic=False)
    async with serve(relay) as served, Client.connect(served.ws) as other, RawSocket.connect(served.ws) as raw:
        begin = client_frame(TEXT, b"[", first_byte=TEXT) if opcode == CONT else b""  # a message without its end
        flood = asyncio.create_task(
            raw.send_bytes(begin + client_frame(opcode, b"", first_byte=0x80 * (opcode > 0) | opcode) * 50_000)
        )
        with suppress(ConnectionResetError):  # it is closed with bytes of its own still on the way to the server
            while (frame := await raw.read_frame())[0] != CLOSE:
                assert frame[0] == PONG
            assert int.from_bytes(frame[1][:2]) == 1008
        _ = flood.cancel()
        _ = await asyncio.gather(flood, return_exceptions=True)
        await other.expect_alive()
        await eventually(lambda: len(relay.engine.sockets) == 1, "the end of the other socket")
        assert relay.metrics.refused["empty frames"] == 1


async def test_some_pings_and_fragments_are_fine(valkey: Valkey) -> None:
    async with serve(Relay(redis_url=valkey.url)) as served, RawSocket.connect(served.ws) as raw:
        for _ in range(200):
            await raw.send_frame(PING, b"")
            assert await raw.read_frame() == (PONG, b"")
        heartbeat = b'[null,"1","phoenix","heartbeat",{}]'
        await raw.send_frame(TEXT, heartbeat[:1], first_byte=TEXT)
        for place in range(1, len(heartbeat)):
            last = place == len(heartbeat) - 1
            await raw.send_frame(CONT, heartbeat[place : place + 1], first_byte=0x80 if last else 0)
        assert (await raw.read_message())[4] == {"status": "ok", "response": {}}


async def test_one_read_is_not_inflated_further_than_the_application_keeps_up(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 kB of compressed frames are 200 MB."""
    waiting = 0
    put = _Inbox.put_nowait

    def put_nowait(self: Any, message: Any) -> None:
        nonlocal waiting
        put(self, message)
        waiting = max(waiting, len(self._messages))

    monkeypatch.setattr(_Inbox, "put_nowait", put_nowait)
    relay = Relay(redis_url=valkey.url, system_topic=False, compression=True)
    deflate = zlib.compressobj(wbits=-15)
    text = json.dumps([None, "1", "phoenix", "heartbeat", {"a": " " * 500_000}]).encode()
    data = (deflate.compress(text) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]
    count = 200
    async with (
        serve(relay, ws_per_message_deflate=True) as served,
        RawSocket.connect(served.ws, extensions="permessage-deflate") as raw,
    ):
        await raw.send_bytes(client_frame(TEXT, data, first_byte=0xC1) * count)
        for _ in range(count):
            assert (await raw.read_message())[4]["status"] == "ok"
    assert 0 < waiting <= 4096 // len(data) + 2


async def test_close_is_answered_though_the_application_reads_no_further(valkey: Valkey) -> None:
    """The client's own close lies behind more than is parsed at a time, and the application has gone."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            _ = await receive()
            await send({"type": "websocket.accept"})
            _ = await receive()
            await send({"type": "websocket.close", "code": 1000})

    # It has no lifespan, and the relay is there for `serve` alone.
    async with (
        serve(Relay(redis_url=valkey.url), app=app, lifespan="off") as served,
        RawSocket.connect(served.ws) as raw,
        asyncio.timeout(5),  # Uvicorn gives a client 10 s
    ):
        message, close = client_frame(TEXT, b"x" * 200), client_frame(CLOSE, (1000).to_bytes(2))
        await raw.send_bytes(message * 100 + close)
        assert (await raw.read_close())[0] == 1000
        with pytest.raises(EOFError):
            await raw.read_frame()
