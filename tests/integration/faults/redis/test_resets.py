"""Connections to Redis that are reset, and servers that are no Redis: a fault of that connection alone."""

import asyncio
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop

from relay.config_sections import Direction
from tests.support.client import Client
from tests.support.process import Valkey
from tests.support.redis_faults import (
    Connect,
    ServeRelay,
)
from tests.support.redis_link import (
    WATCHFUL,
    broker_on,
    outcome,
)
from tests.support.serving import eventually


@pytest.fixture
def loop(request: pytest.FixtureRequest) -> str:
    """Which event loop; each has exceptions of its own for a transport that has ended."""
    return getattr(request, "param", "asyncio")


@pytest.fixture
def runner(loop: str) -> Iterator[asyncio.Runner]:
    """The test's event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        yield runner


@asynccontextmanager
async def resetting(target: int) -> AsyncIterator[tuple[int, Callable[[], None]]]:
    """A TCP proxy; the yielded function resets all of its connections at once."""
    writers: list[asyncio.StreamWriter] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(OSError, asyncio.CancelledError):
                await join(reader, writer)
        finally:
            writer.transport.abort()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        writers.append(writer)

        async def pump(source: asyncio.StreamReader, into: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    into.write(data)

        pumps = [asyncio.create_task(pump(reader, far_writer)), asyncio.create_task(pump(far_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            far_writer.transport.abort()
            for each in pumps:
                each.cancel()

    def reset() -> None:
        for writer in writers:
            end = writer.get_extra_info("socket")
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        writers.clear()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], reset
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


both_loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop"], indirect=True)


@both_loops
async def test_reset_connections_to_redis_close_no_socket(
    loop: str, serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients push all the while. Each push is answered, REST with 200 or 503, and the log has no traceback."""
    async with resetting(server.port) as (port, reset):
        served = await serve_relay(
            redis_url=f"redis://127.0.0.1:{port}",
            redis=WATCHFUL | {"ping_timeout_s": 5.0},
            limits={"joins_per_s": 0, "pushes_per_s": 0},
        )
        clients = [await connect(served) for _ in range(10)]
        answers: list[str] = []
        statuses: list[int] = []
        ended = asyncio.Event()

        async def push(client: Client, topic: str) -> None:
            while not ended.is_set():
                ref = client.next_ref()
                await client.send(ref, ref, topic, "phx_join", {})
                while not ended.is_set():
                    await client.send(ref, client.next_ref(), topic, "shout", {})
                    message = await client.receive()
                    while message[3] not in ("phx_reply", "phx_error"):
                        message = await client.receive()
                    if message[3] == "phx_error":
                        break
                    response = message[4]["response"]
                    answers.append(response.get("reason", "ok"))
                    if response.get("reason") == "unmatched topic":
                        break
                    await asyncio.sleep(0)

        async def publish() -> None:
            body = json.dumps({"topic": "room:rest", "event": "e", "payload": {}}).encode()
            head = f"POST /api/publish HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            while not ended.is_set():
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(head.encode() + body)
                statuses.append(int((await reader.read())[9:12]))
                writer.close()
                await writer.wait_closed()

        async with asyncio.TaskGroup() as tasks:
            for place, client in enumerate(clients):
                tasks.create_task(push(client, f"room:{place}"))
            tasks.create_task(publish())
            for _ in range(15):
                await asyncio.sleep(0.1)
                reset()
            ended.set()
        assert set(statuses) <= {200, 503}
        assert "bus unavailable" in answers
        for client in clients:
            await client.send(None, "alive", "phoenix", "heartbeat", {})
            while await client.receive() != client.reply(None, "alive", "phoenix"):
                pass  # what was on its way
        assert served.relay.metrics.sockets == served.relay.metrics.sockets_opened == 10
        assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
        await eventually(lambda: served.relay.link.live, "the link")


@both_loops
async def test_peer_that_resets_at_each_step_is_a_reason_and_no_traceback(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While connecting, while AUTH, ROLE or PSUBSCRIBE is under way, and after it; the next attempt is not spoilt."""
    for steps in range(5):
        answers = [b"+OK\r\n", b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"][:steps]

        async def peer(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: Any = tuple(answers)
        ) -> None:
            with suppress(OSError):
                for answer in answers:
                    await reader.read(65536)
                    writer.write(answer)
                if len(answers) > 1:
                    await reader.read(65536)
            end = writer.get_extra_info("socket")
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        peers = await asyncio.start_server(peer, "127.0.0.1", 0)
        async with peers:
            port = peers.sockets[0].getsockname()[1]
            async with broker_on(f"redis://:pw@127.0.0.1:{port}", timeout_s=2.0) as (broker, _, metrics):
                answers_ = [await outcome(broker.publish(Direction.FROM, "room", "e", b"1")) for _ in range(20)]
                assert "ok" not in answers_
                assert not broker.link.live
                assert metrics.gaps == 0
    assert not [record.getMessage() for record in caplog.records if record.exc_info]
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@both_loops
async def test_peer_that_resets_during_the_tls_handshake_is_a_reason(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        end = writer.get_extra_info("socket")
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    peers = await asyncio.start_server(peer, "127.0.0.1", 0)
    async with peers:
        port = peers.sockets[0].getsockname()[1]
        async with broker_on(f"rediss://127.0.0.1:{port}", timeout_s=2.0) as (broker, _, _):
            assert "ok" != await outcome(broker.publish(Direction.FROM, "room", "e", b"1"))
            assert not broker.link.live
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


async def test_nonsense_instead_of_redis_is_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    """An HTTP server behind the address."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    peers = await asyncio.start_server(peer, "127.0.0.1", 0)
    async with peers:
        port = peers.sockets[0].getsockname()[1]
        async with broker_on(f"redis://127.0.0.1:{port}", timeout_s=2.0) as (broker, _, _):
            assert broker.link.reason.startswith("this is no Redis")
            assert "this is no Redis" in await outcome(broker.publish(Direction.FROM, "room", "e", b"1"))
    assert not [record.getMessage() for record in caplog.records if record.exc_info]
