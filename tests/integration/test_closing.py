"""Connections end in time, though their clients do not read, do not answer a close, or have said too much too early."""

import asyncio
import gc
import json
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from redis.asyncio import Redis

from relay import Relay
from relay.transports import uvicorn_websocket
from relay.transports.uvicorn_http import RelayHTTPProtocol
from tests.support.client import CLOSE, TEXT, RawSocket, client_frame
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.servers import AppServer
from tests.support.serving import eventually, serve

LIMITS = {"close_timeout_s": 0.5, "drain_timeout_s": 2.0}
MOUNTED = """
from relay import Relay
app = Relay(redis_url={url!r}, system_topic=False, limits={limits!r})
"""


async def filled(client: RawSocket, redis: Redis, topic: str, mebibytes: int = 1) -> None:
    """Join ``topic``, publish far more than the kernel takes for a client that reads nothing further."""
    await client.send_frame(TEXT, json.dumps(["1", "1", topic, "phx_join", {}]).encode())
    assert (await client.read_message())[3] == "phx_reply"
    for _ in range(mebibytes * 16):
        assert await redis.publish(f"to:{topic}:e", json.dumps("x" * 65_536)) == 1


# Ways in which the relay ends a socket.


async def test_terminated_relay_does_not_wait_for_a_client_that_reads_nothing(valkey: Valkey, redis: Redis) -> None:
    environ = {f"RELAY_LIMITS__{name.upper()}": str(value) for name, value in LIMITS.items()}
    with RelayProcess("--redis-url", valkey.url, environ=environ) as relay:
        async with (
            RawSocket.connect(relay.ws, receive_buffer=4096) as client,
            RawSocket.connect(relay.ws, receive_buffer=4096) as other,
        ):
            await filled(client, redis, "closing:term")
            await filled(other, redis, "closing:term:little", 0)
            began = time.monotonic()
            assert await asyncio.to_thread(relay.stop, signal.SIGTERM) == 0
            assert time.monotonic() - began < 8 * PATIENCE


@pytest.mark.parametrize("ws", ["relay.server:RelayWebSocketProtocol", "websockets-sansio", "wsproto"])
@pytest.mark.parametrize("amount", [0, 4], ids=["reads, does not answer", "reads nothing"])
async def test_socket_that_is_closed_is_cut_in_time_on_uvicorn(
    valkey: Valkey, redis: Redis, ws: str, amount: int
) -> None:
    """Its descriptor and its memory in the kernel are freed, and the metrics say what is the case."""
    topic = f"closing:{ws}:{amount}"
    app = Relay(redis_url=valkey.url, system_topic=False, limits=LIMITS)
    async with serve(app, ws=ws) as served, RawSocket.connect(served.ws, receive_buffer=4096) as client:
        await filled(client, redis, topic, amount)
        (held,) = app.node.sockets.values()
        held.disconnect("enough")
        process = psutil.Process()

        def is_open() -> bool:
            return any(
                one.laddr.port == served.port and one.status == "ESTABLISHED" for one in process.net_connections("tcp")
            )

        began = time.monotonic()
        await eventually(lambda: not app.node.sockets and not is_open(), "the connection to be cut")
        assert time.monotonic() - began < 8 * PATIENCE


async def test_client_that_closes_and_does_not_read_is_cut_in_time(valkey: Valkey, redis: Redis) -> None:
    app = Relay(redis_url=valkey.url, system_topic=False, limits=LIMITS)
    async with serve(app) as served, RawSocket.connect(served.ws, receive_buffer=4096) as client:
        await filled(client, redis, "closing:client", 4)
        await client.send_frame(CLOSE, (1000).to_bytes(2))
        process = psutil.Process()
        await eventually(
            lambda: (
                not any(
                    one.laddr.port == served.port and one.status in ("ESTABLISHED", "CLOSE_WAIT")
                    for one in process.net_connections("tcp")
                )
            ),
            "the connection to be cut",
            8.0,
        )


@pytest.mark.parametrize("name", ["uvicorn", "uvicorn with our class", "relay"])
async def test_server_ends_though_a_client_reads_nothing(name: str, valkey: Valkey, redis: Redis) -> None:
    source = MOUNTED.format(url=valkey.url, limits=LIMITS)
    with AppServer(name, source, ready="/health") as app:
        async with RawSocket.connect(app.ws + "/socket", receive_buffer=4096) as client:
            await filled(client, redis, f"closing:{name}", 4)
            began = time.monotonic()
            await asyncio.to_thread(app.stop)
            assert time.monotonic() - began < 10 * PATIENCE


WATCHED = """
from relay import Relay
relay = Relay(redis_url={url!r}, system_topic=False, limits={limits!r})

async def app(scope, receive, send):
    await relay(scope, receive, send)
    if scope["type"] == "websocket":
        print("returned", flush=True)
"""


@pytest.mark.parametrize("name", ["hypercorn", "granian"])
async def test_relay_is_done_in_time_with_a_socket_that_another_server_keeps(
    name: str, valkey: Valkey, redis: Redis
) -> None:
    """ASGI cannot cut a connection, so these servers keep it until its client goes."""
    with AppServer(
        name, WATCHED.format(url=valkey.url, limits=LIMITS | {"outbox_max_bytes": 16 << 20}), ready="/health"
    ) as app:
        async with RawSocket.connect(app.ws + "/socket", receive_buffer=4096) as client:
            await filled(client, redis, f"closing:{name}", 4)
            async with httpx.AsyncClient(base_url=f"{app.http}/api", trust_env=False) as operator:
                (socket_id,) = (await operator.get(f"/topics/closing:{name}")).json()["socket_ids"]
                began = time.monotonic()
                assert (await operator.delete("/sockets", params={"id": socket_id})).is_success
            await eventually(lambda: "returned" in app.output, "the relay's coroutine to return")
            assert time.monotonic() - began < 8 * PATIENCE


# Before the handshake is decided.


class _Slow:
    """An ``authenticate`` that lets nobody in before it is told."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, request: object) -> dict[str, str]:
        self.asked.set()
        await self.go.wait()
        return {"sub": "alice"}


def upgrade(port: int) -> bytes:
    return (
        f"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    ).encode()


@pytest.fixture
def undecided(
    valkey: Valkey,
) -> Callable[[Callable[[Any, _Slow, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]], Awaitable[None]]:
    """Runs a test's body while a handshake is being decided."""

    async def run(
        body: Callable[[Any, _Slow, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], early: bytes = b""
    ) -> None:
        slow = _Slow()
        relay = Relay(redis_url=valkey.url, system_topic=False, authenticate=slow)
        async with serve(relay, http=partial(RelayHTTPProtocol, handshake_timeout_s=30.0)) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(upgrade(served.port) + early)
            try:
                async with asyncio.timeout(20):
                    await slow.asked.wait()
                await body(served, slow, reader, writer)
            finally:
                slow.go.set()
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

    return run


async def test_nothing_is_read_before_the_handshake_is_decided(undecided: Any) -> None:
    """A client that sends fragments without end gets no further than the kernel's buffers."""

    async def body(served: Any, slow: _Slow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(high=0)
        sock = writer.get_extra_info("socket")
        fragment, sent = client_frame(0, b"x" * 60_000, first_byte=0), 0
        writer.write(client_frame(TEXT, b"x" * 60_000, first_byte=1))
        with suppress(TimeoutError):
            while sent < 64 * 2**20:
                writer.write(fragment)
                sent += len(fragment)
                async with asyncio.timeout(1.0):
                    await writer.drain()
        assert sent < 64 * 2**20, "all of it was read"
        assert sock.fileno() >= 0
        (protocol,) = _protocols(served)
        assert len(protocol._unparsed) + sum(map(len, protocol.frames)) <= 4096

    await undecided(body)


async def test_frames_sent_with_the_handshake_are_heard_after_it(undecided: Any) -> None:
    """No client has to, and what one sends all the same is not lost."""

    async def body(served: Any, slow: _Slow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(client_frame(TEXT, b'["2","2","room:2","phx_join",{}]'))
        slow.go.set()
        async with asyncio.timeout(20):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            await reader.readuntil(b'"1","room:1","phx_reply"')
            await reader.readuntil(b'"2","room:2","phx_reply"')

    await undecided(body, client_frame(TEXT, b'["1","1","room:1","phx_join",{}]'))


@pytest.mark.parametrize("how", ["reset", "end"])
async def test_client_that_goes_before_the_decision_is_noticed(undecided: Any, how: str) -> None:
    async def body(served: Any, slow: _Slow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"what is in its way")
        await writer.drain()
        (protocol,) = _protocols(served)
        if how == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.close()
        await eventually(lambda: protocol.disconnected, "the connection to be given up")

    await undecided(body)


def _protocols(served: Any) -> list[uvicorn_websocket.RelayWebSocketProtocol]:
    # By type(): isinstance() asks weak proxies too, and one whose object has gone raises ReferenceError.
    found = (one for one in gc.get_objects() if issubclass(type(one), uvicorn_websocket.RelayWebSocketProtocol))
    return [one for one in found if one.server is not None and one.server[1] == served.port]
