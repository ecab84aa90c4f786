"""Closed connections are freed by reference counting alone: with the garbage collector off, nothing of them is left."""

import asyncio
import gc
import logging
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest
import uvicorn
import uvloop

from relay import Relay
from relay.transports.uvicorn_http import RelayHTTPProtocol
from tests.support.client import CLOSE, PING, TEXT, client_frame
from tests.support.process import Valkey, wait_for

JOIN = client_frame(TEXT, b'["1","1","room:1","phx_join",{}]')
PUSH = client_frame(TEXT, b'["1","2","room:1","shout",{"text":"hello"}]')
END = client_frame(CLOSE, struct.pack("!H", 1000))


def upgrade(
    *headers: str, target: str = "/socket/websocket?vsn=2.0.0", method: str = "GET", version: int = 13
) -> bytes:
    lines = [
        f"{method} {target} HTTP/1.1",
        "Host: 127.0.0.1",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Version: {version}",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *headers,
    ]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def get(path: str, *headers: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (f"GET {path} HTTP/1.1", "Host: 127.0.0.1", *headers, "")).encode()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def read_to_end(connection: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while connection.recv(65536):
            pass


def joined(connection: socket.socket, *headers: str) -> None:
    """Connect, join, push, and read what comes of it."""
    connection.sendall(upgrade(*headers))
    read_past(connection, b"\r\n\r\n")
    connection.sendall(JOIN + PUSH)
    read_past(connection, b'"2","room:1","phx_reply"')


def read_past(connection: socket.socket, end: bytes) -> None:
    received = b""
    while end not in received:
        data = connection.recv(65536)
        assert data, received
        received += data


def ends(data: bytes) -> Callable[[socket.socket], None]:
    """A socket that joins, pushes and sends ``data``, which ends it."""

    def live(connection: socket.socket) -> None:
        joined(connection)
        connection.sendall(data)
        read_to_end(connection)

    return live


def answered(*requests: bytes) -> Callable[[socket.socket], None]:
    """Requests whose connection the relay closes after the last."""

    def live(connection: socket.socket) -> None:
        for request in requests:
            connection.sendall(request)
        read_to_end(connection)

    return live


def recovers(connection: socket.socket, *, again: bool = False) -> None:
    """Join a topic with a history, from a position."""
    connection.sendall(upgrade())
    read_past(connection, b"\r\n\r\n")
    for number in range(1 + again):
        join = f'["{number}","{number}","kept:1","phx_join",{{"since":"1-1"}}]'
        connection.sendall(client_frame(TEXT, join.encode()))
        read_past(connection, f'"{number}","kept:1","phx_reply"'.encode())


def recovers_twice(connection: socket.socket) -> None:
    recovers(connection, again=True)


def recovers_and_leaves(connection: socket.socket) -> None:
    recovers(connection)
    connection.sendall(client_frame(TEXT, b'["0","9","kept:1","phx_leave",{}]'))
    read_past(connection, b'"phx_close"')


def vanishes(connection: socket.socket) -> None:
    joined(connection)
    connection.sendall(b"\x81\xfe\x10\x00half a frame")
    reset(connection)


def compressed_and_gone(connection: socket.socket) -> None:
    joined(connection, "Sec-WebSocket-Extensions: permessage-deflate")


def reads_nothing(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    joined(connection)
    connection.sendall(client_frame(TEXT, b'[null,"2","phoenix","heartbeat",{}]') * 500)
    reset(connection)


def keeps_alive(connection: socket.socket) -> None:
    for _ in range(3):
        connection.sendall(get("/health"))
        read_past(connection, b'"sockets"')


def keeps_alive_until_reset(connection: socket.socket) -> None:
    keeps_alive(connection)
    reset(connection)


def pipelines_and_is_gone(connection: socket.socket) -> None:
    connection.sendall(get("/health") * 5)
    reset(connection)


def leaves_half_a_head(connection: socket.socket) -> None:
    connection.sendall(b"GET / HT")


STREAM = get("/socket/sse?topic=room:1")


def streamed(connection: socket.socket) -> None:
    """A stream of server-sent events that has begun."""
    connection.sendall(STREAM)
    read_past(connection, b"relay:join")


def streamed_until_reset(connection: socket.socket) -> None:
    streamed(connection)
    reset(connection)


def stream_that_nobody_reads(connection: socket.socket) -> None:
    connection.sendall(STREAM * 2)  # the second waits for the end of the first
    reset(connection)


def polled(connection: socket.socket) -> str:
    """A long-polling client that joins and polls; gives where it goes on."""
    connection.sendall(get("/socket/longpoll?vsn=2.0.0"))
    token = b""
    while not token.endswith(b'"messages":[]}'):
        token += connection.recv(65536)
    name = token.partition(b'"token":"')[2].partition(b'"')[0].decode()
    target = f"/socket/longpoll?vsn=2.0.0&token={name}"
    post(connection, target, b'["1","1","room:1","phx_join",{}]')
    read_past(connection, b'"status":200')
    connection.sendall(get(target))
    read_past(connection, b"phx_reply")
    return target


def post(connection: socket.socket, target: str, body: bytes) -> None:
    head = f"POST {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)


def polled_until_reset(connection: socket.socket) -> None:
    connection.sendall(get(polled(connection)))
    reset(connection)


def polled_and_malformed(connection: socket.socket) -> None:
    target = polled(connection)
    post(connection, target, b"nonsense")
    read_past(connection, b'"status":410')
    connection.sendall(get(target, "Connection: close"))
    read_to_end(connection)


LIVES: dict[str, Callable[[socket.socket], object]] = {
    "closed by the client": ends(END),
    "closed by the relay": ends(client_frame(TEXT, b"[") + END),
    "reset in mid-frame": vanishes,
    "gone": joined,
    "gone, with compression": compressed_and_gone,
    "history, gone": recovers,
    "history, joined twice": recovers_twice,
    "history, left": recovers_and_leaves,
    "slow": reads_nothing,
    "unmasked frame": ends(b"\x81\x02hi"),
    "too big": ends(b"\x81\xff\x00\x00\x00\x00\x10\x00\x00\x00abcd"),
    "bad UTF-8": ends(client_frame(TEXT, b"\xff\xff")),
    "too many pings": ends(client_frame(PING, b"") * 1500),
    "another origin": answered(upgrade("Origin: http://elsewhere.example")),
    "no socket there": answered(upgrade(target="/nowhere/websocket")),
    "another version of WebSocket": answered(upgrade(version=12)),
    "upgrade by POST": answered(upgrade("Connection: close", method="POST")),
    "upgrade with a body": answered(upgrade("Content-Length: 5", "Connection: close") + b"hello"),
    "no HTTP": answered(b"hello\r\n\r\n"),
    "closed after the answer": answered(get("/health"), get("/metrics", "Connection: close")),
    "keep-alive": keeps_alive,
    "keep-alive, then reset": keeps_alive_until_reset,
    "pipelined, then reset": pipelines_and_is_gone,
    "half a head": leaves_half_a_head,
    "long poll, gone": polled,
    "long poll, reset in mid-poll": polled_until_reset,
    "long poll, malformed": polled_and_malformed,
    "stream, gone": streamed,
    "stream, reset": streamed_until_reset,
    "stream, not read": stream_that_nobody_reads,
    "stream, refused": answered(get("/socket/sse?topic=a", "Sec-Fetch-Site: cross-site", "Connection: close")),
    "stream, of a topic that cannot be": answered(get("/socket/sse?topic=phoenix", "Connection: close")),
}


@pytest.fixture(autouse=True)
def _no_log() -> Iterator[None]:
    """pytest keeps each log record, with all that it mentions."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@contextmanager
def served(app: Any, loop_factory: Callable[[], asyncio.AbstractEventLoop], **options: Any) -> Iterator[uvicorn.Server]:
    """Uvicorn in a thread of its own, on ``server.port``."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws_ping_interval=None, **options)
    server: Any = uvicorn.Server(config)
    server.port = listener.getsockname()[1]

    def serve() -> None:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(server.serve([listener]))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        wait_for(lambda: server.started, "the server to start")
        yield server
    finally:
        server.should_exit = True
        thread.join(60)


def live(server: Any, life: Callable[[socket.socket], object], times: int) -> None:
    """Have ``times`` clients live one after another, and wait until the server has let go of them all."""
    for _ in range(times):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            life(connection)
    wait_for(lambda: not server.server_state.connections and not server.server_state.tasks, "all to be gone")


@contextmanager
def no_collector() -> Iterator[None]:
    """Objects are freed by reference counting alone; those that are there already are not looked at again and again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
        gc.collect()


def objects() -> Counter[str]:
    kinds = Counter(map(type, gc.get_objects()))
    return Counter({f"{kind.__module__}.{kind.__qualname__}": count for kind, count in kinds.items()})


def left_by(server: Any, life: Callable[[socket.socket], object], times: int, kept: set[str]) -> dict[str, int]:
    """Objects that are left for each of ``times`` clients, and for as many again: what happens once is no leak."""
    found: dict[str, int] = {}
    for _ in range(2):
        before = objects()
        live(server, life, times)

        def grown(before: Counter[str] = before) -> dict[str, int]:
            more = objects() - before
            return {kind: more[kind] for kind in more if more[kind] >= times * 3 // 4 and kind not in kept}

        with suppress(AssertionError):
            wait_for(lambda: not grown(), "its objects to be freed", 2.0)
        if not (found := grown()):
            break
    return found


@pytest.mark.parametrize(
    ("loop_factory", "connections", "kept"),
    [
        pytest.param(uvloop.new_event_loop, 1000, set(), id="uvloop"),
        # asyncio drops cancelled timers from its heap once there are many; they refer to nothing any more.
        pytest.param(
            asyncio.SelectorEventLoop, 420, {"asyncio.events.TimerHandle", "_contextvars.Context"}, id="asyncio"
        ),
    ],
)
def test_closed_connections_leave_nothing_for_the_collector(
    valkey: Valkey, loop_factory: Callable[[], asyncio.AbstractEventLoop], connections: int, kept: set[str]
) -> None:
    """Each way to end, so often that a single object left by one of them shows."""
    each = connections // len(LIVES)
    options = {"ws": "relay.server:RelayWebSocketProtocol", "http": partial(RelayHTTPProtocol, handshake_timeout_s=30)}
    topics = [{"match": "kept:*", "history": {"size": 10}}]
    relay = Relay(redis_url=valkey.url, system_topic=False, limits={"longpoll_window_s": 0.3}, topics=topics)
    with served(relay, loop_factory, **options) as server:
        for life in LIVES.values():  # what is made once and stays
            live(server, life, 2)
        with no_collector():
            left = {name: found for name, life in LIVES.items() if (found := left_by(server, life, each, kept))}
    assert not left


@pytest.mark.parametrize("ws", ["websockets-sansio", "wsproto", "relay.server:RelayWebSocketProtocol"])
def test_on_stock_uvicorn_the_relays_own_part_leaves_nothing(valkey: Valkey, ws: str) -> None:
    """What Uvicorn's own classes leave is not ours, so only the relay's objects are counted."""
    relay = Relay(redis_url=valkey.url, system_topic=False, limits={"longpoll_window_s": 0.3})
    with served(relay, uvloop.new_event_loop, ws=ws) as server:
        live(server, joined, 2)
        with no_collector():
            before = objects()
            for name in (
                "closed by the client",
                "closed by the relay",
                "reset in mid-frame",
                "gone",
                "stream, gone",
                "stream, reset",
                "long poll, gone",
                "long poll, reset in mid-poll",
                "long poll, malformed",
            ):
                live(server, LIVES[name], 20)

            def grown() -> dict[str, int]:
                now = objects()
                return {kind: now[kind] - before[kind] for kind in now if kind.startswith("relay.")}

            wait_for(lambda: not any(more >= 10 for more in grown().values()), f"these to be freed: {grown()}")
