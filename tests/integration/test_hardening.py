"""What a client may do below the application: bytes, frames and requests that no limit of the relay's own ever sees.

On the relay's own protocol classes, as `relay serve` uses them; on others these are the server's affair.
"""

import asyncio
import json
import re
import socket
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import psutil
import pytest
from fastapi import APIRouter
from starlette.responses import Response, StreamingResponse

from relay import Plugin, Relay
from relay.config_sections import LimitsConfig
from relay.transports import uvicorn_http
from relay.transports.inbox import Inbox
from relay.transports.uvicorn_http import HEAD_MAX_BYTES, RelayHTTPProtocol
from tests.support.client import CLOSE, PING, PONG, TEXT, Client, RawSocket, client_frame
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually, http_get, metric, serve

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
    protocol = partial(RelayHTTPProtocol, handshake_timeout_s=0.2 * PATIENCE)
    async with serve(Relay(redis_url=valkey.url), http=protocol, timeout_keep_alive=1) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request_)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 ")
        writer.write(b"\r\n" if request_.startswith(b"GET") else b"x")
        async with asyncio.timeout(20):
            await reader.read()
        writer.close()


BIG = 16 * 2**20
"""Bytes of an answer that no kernel's buffers take."""


@asynccontextmanager
async def served_with_a_big_answer(valkey: Valkey, **options: Any) -> AsyncIterator[Served]:
    """A relay that answers ``GET /api/big`` in pieces, and ``GET /api/whole`` at once."""
    plugin, router = Plugin("big"), APIRouter()

    @router.get("/big")
    async def big() -> StreamingResponse:
        return StreamingResponse(b"x" * 65_536 for _ in range(BIG // 65_536))

    @router.get("/whole")
    async def whole() -> Response:
        return Response(b"x" * BIG)

    plugin.include_router(router)
    relay = Relay(redis_url=valkey.url, extra_plugins=(plugin,))
    async with serve(relay, http=RelayHTTPProtocol, **options) as served:
        yield served


@asynccontextmanager
async def one_that_reads_nothing(port: int, request_: bytes) -> AsyncIterator[socket.socket]:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port))
        async with asyncio.timeout(20):
            with suppress(ConnectionError):
                await loop.sock_sendall(client, request_)
        yield client


def established(port: int, process: psutil.Process | None = None) -> int:
    """Connections that a server holds on this port; one here, or in another process."""
    connections = (process or psutil.Process()).net_connections("tcp")
    return [one.status for one in connections if one.laddr[1:] == (port,)].count(psutil.CONN_ESTABLISHED)


async def is_cut_off(served: Served, kind: str) -> None:
    """Wait until a connection was cut for this; then nothing is left of it, and others are answered."""
    refused = served.relay.metrics.refused
    await eventually(lambda: refused[kind], f"{kind}, of {refused}")
    assert (await http_get(f"{served.http}/health"))[0] == 200


def get(path: str, more: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{more}\r\n".encode()


async def test_client_that_asks_on_and_on_and_reads_nothing_is_cut(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Each request that waits holds 2 kB, and there are thousands in one read; Uvicorn would keep them all."""
    async with served_with_a_big_answer(valkey) as served:
        async with one_that_reads_nothing(served.port, get("/api/big") + get("/") * 5000):
            await is_cut_off(served, "http: too many requests")
    assert "Traceback" not in caplog.text


async def test_few_requests_at_once_are_answered_in_order(valkey: Valkey) -> None:
    async with served_with_a_big_answer(valkey) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(get("/health") + get("/nothing") * 14 + get("/ready", "Connection: close\r\n"))
        async with asyncio.timeout(20):
            answers = (await reader.read()).decode()
        assert re.findall(r"HTTP/1.1 (\d+) ", answers) == ["200", *["404"] * 14, "200"]
        writer.close()


@pytest.mark.parametrize("path", ["/api/big", "/api/whole"])
async def test_answer_that_nobody_reads_is_cut(valkey: Valkey, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn_http, "_UNREAD_S", 0.3)
    async with served_with_a_big_answer(valkey) as served, one_that_reads_nothing(served.port, get(path)):
        await is_cut_off(served, "http: answer not read")


async def test_answer_that_is_read_slowly_is_not_cut(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes several times as long as an answer may lie unread."""
    unread_s = 0.5 * PATIENCE
    monkeypatch.setattr(uvicorn_http, "_UNREAD_S", unread_s)
    loop = asyncio.get_running_loop()
    async with (
        served_with_a_big_answer(valkey, send_buffer=65_536) as served,  # a larger one hides what is read
        one_that_reads_nothing(served.port, get("/api/whole", "Connection: close\r\n")) as client,
    ):
        began, got, pauses = loop.time(), 0, 0
        async with asyncio.timeout(60 * PATIENCE):
            while data := await loop.sock_recv(client, BIG // 40):
                got += len(data)
                if got // 65_536 > pauses:
                    pauses += 1
                    await asyncio.sleep(0.02)
        assert got > BIG
        assert loop.time() - began > 3 * unread_s
        assert not served.relay.metrics.refused


@pytest.mark.parametrize("path", ["/static/relay.js", "/api/whole"])
async def test_closed_connection_whose_last_bytes_nobody_reads_is_aborted(
    valkey: Valkey, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close alone waits for a buffer that nobody empties."""
    monkeypatch.setattr(uvicorn_http, "_UNREAD_S", 0.3)
    request_ = get(path, "Connection: close\r\n")
    async with served_with_a_big_answer(valkey, send_buffer=4096) as served:
        async with one_that_reads_nothing(served.port, request_):
            await eventually(lambda: established(served.port) == 0, "the connection to be gone")


async def test_reset_while_requests_wait_writes_no_traceback() -> None:
    """Uvicorn tells the newest request alone; uvloop refuses what the one in work writes to a closed transport."""
    with RelayProcess() as relay:
        port = int(relay.http.rpartition(":")[2])
        process = psutil.Process(relay.process.pid if relay.process else 0)
        for _ in range(10):
            async with one_that_reads_nothing(port, get("/static/relay.js") * 16) as client:
                assert await asyncio.get_running_loop().sock_recv(client, 100), "the answers are under way"
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await eventually(lambda: established(port, process) == 0, "the connections to be gone")
        assert (await http_get(f"{relay.http}/health"))[0] == 200
        assert relay.stop() == 0
    assert "Traceback" not in relay.output and "Exception" not in relay.output


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
        assert metric(text, "relay_refused_total", kind="handshake", reason="head_too_large") == 1


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
        await eventually(lambda: len(relay.node.sockets) == 1, "the end of the other socket")
        assert relay.metrics.refused["empty frames"] == 1


async def test_pings_do_not_keep_an_unfinished_message(valkey: Valkey) -> None:
    """It holds up to a frame's bound of memory, which nothing counts."""
    relay = Relay(redis_url=valkey.url, limits=LimitsConfig(idle_timeout_s=0.5))
    async with serve(relay, http=RelayHTTPProtocol) as served, RawSocket.connect(served.ws) as client:
        await client.send_frame(TEXT, b'["1","1"', first_byte=TEXT)
        opcode, data = PONG, b""
        async with asyncio.timeout(20):
            while opcode == PONG:
                await client.send_frame(PING, b"")
                opcode, data = await client.read_frame()
                await asyncio.sleep(0.05)  # the pace of its pings, which are bounded too
        assert (opcode, data[:2]) == (CLOSE, (1001).to_bytes(2))
        assert relay.metrics.refused == {"idle": 1}


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
    put = Inbox.put_nowait

    def put_nowait(self: Any, message: Any) -> None:
        nonlocal waiting
        put(self, message)
        waiting = max(waiting, len(self._messages))

    monkeypatch.setattr(Inbox, "put_nowait", put_nowait)
    # Else they would be too many, by their size.
    limits = LimitsConfig(pushes_per_s=0)
    relay = Relay(redis_url=valkey.url, system_topic=False, compression=True, limits=limits)
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
