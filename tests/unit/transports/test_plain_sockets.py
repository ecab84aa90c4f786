"""Writing to many sockets at once: real connections, on both event loops."""

import asyncio
import gc
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from relay.transports import plain_sockets
from relay.transports.plain_sockets import BATCH, PlainSockets
from tests.support.faults import Authority
from tests.support.serving import eventually

needs_c = pytest.mark.skipif(plain_sockets.send_to_each is None, reason="relay/transports/speedups.c is not built")
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture(params=LOOPS, autouse=True)
def loop_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def runner(loop_name: str) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=LOOPS[loop_name]) as runner:
        yield runner


class Protocol(asyncio.Protocol):
    """The server's end of one connection."""

    def __init__(self, made: "list[Protocol]") -> None:
        self._made = made
        self.paused = False
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._made.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False


class Pair:
    """One connection, both ends of it."""

    def __init__(self, client: socket.socket, protocol: Protocol) -> None:
        self.client = client
        self.protocol = protocol
        self.transport = protocol.transport

    async def read(self, size: int) -> bytes:
        loop, data = asyncio.get_running_loop(), b""
        while len(data) < size and (more := await loop.sock_recv(self.client, 1 << 20)):
            data += more
        return data

    def has_nothing(self) -> bool:
        try:
            return self.client.recv(1) is None
        except BlockingIOError:
            return True


@asynccontextmanager
async def connected(
    count: int, *, unix: Path | None = None, send_buffer: int | None = None
) -> AsyncIterator[list[Pair]]:
    """So many connections to a server in this loop; their clients read what they are asked to."""
    loop, made = asyncio.get_running_loop(), list[Protocol]()
    listener = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(str(unix) if unix else ("127.0.0.1", 0))
    create = loop.create_unix_server if unix else loop.create_server
    server = await create(lambda: Protocol(made), sock=listener)
    pairs: list[Pair] = []
    try:
        for _ in range(count):
            client = socket.socket(listener.family)
            if send_buffer is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            await eventually(lambda: len(made) > len(pairs), "the server to accept")
            pairs.append(Pair(client, made[-1]))
        yield pairs
    finally:
        for pair in pairs:
            pair.client.close()
            pair.transport.abort()
        await eventually(lambda: all(each.is_lost for each in made), "all connections to end")
        server.close()
        await server.wait_closed()
        listener.close()


def is_free(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def sockets_of(pairs: list[Pair]) -> PlainSockets:
    found = PlainSockets.of([pair.transport.write for pair in pairs])
    assert found is not None
    return found


@needs_c
@pytest.mark.parametrize("is_unix", [False, True], ids=["tcp", "unix"])
async def test_every_socket_gets_the_same_bytes(is_unix: bool, tmp_path: Path) -> None:
    async with connected(BATCH + 3, unix=tmp_path / "s" if is_unix else None) as pairs:
        sockets = sockets_of(pairs)
        sockets.write(b"one", 0, BATCH)
        sockets.write(b"one", BATCH, len(pairs))
        sockets.write(b"two", 1, 2)
        for place, pair in enumerate(pairs):
            expected = b"onetwo" if place == 1 else b"one"
            assert await pair.read(len(expected)) == expected
            assert pair.has_nothing()


@needs_c
async def test_what_the_kernel_does_not_take_goes_through_the_transport_in_order() -> None:
    """Part of a frame, then whole frames behind it; the transport pauses its protocol, as ever."""
    async with connected(3, send_buffer=8192) as pairs:
        sockets, slow = sockets_of(pairs), pairs[1]
        frames = [bytes([number]) * 3000 for number in range(100)]
        for frame in frames:
            sockets.write(frame, 0, 3)
            assert [await pair.read(3000) for pair in (pairs[0], pairs[2])] == [frame, frame]
        assert slow.protocol.paused and slow.transport.get_write_buffer_size() > 65_536
        assert await slow.read(300_000) == b"".join(frames)
        await eventually(lambda: not slow.protocol.paused, "the transport to drain")
        assert not pairs[0].protocol.paused


@needs_c
async def test_what_waits_in_the_transport_goes_first() -> None:
    async with connected(2, send_buffer=8192) as pairs:
        sockets, filled = sockets_of(pairs), pairs[0]
        first = b"1" * 200_000
        filled.transport.write(first)
        assert filled.transport.get_write_buffer_size()
        sockets.write(b"2", 0, 2)
        assert await pairs[1].read(1) == b"2"
        assert await filled.read(200_001) == first + b"2"


@needs_c
@pytest.mark.parametrize("ending", ["abort", "close", "client"])
async def test_descriptor_that_belongs_to_another_is_not_written_to(ending: str) -> None:
    """The worst that could happen: bytes in another connection, which has been given the number."""
    mine, other = socket.socketpair()
    other.setblocking(False)
    async with connected(4) as pairs:
        sockets, gone = sockets_of(pairs), pairs[2]
        sockets.write(b"once ", 0, 4)
        number = gone.transport.get_extra_info("socket").fileno()
        if ending == "client":
            gone.client.close()
        else:
            getattr(gone.transport, ending)()
        await eventually(lambda: gone.protocol.is_lost, "the connection to end")
        await eventually(lambda: is_free(number), "the descriptor to be closed, which both loops do after that")
        os.dup2(mine.fileno(), number)
        try:
            with suppress(RuntimeError):  # uvloop's transport says that it is closed, once the others have been served
                sockets.write(b"data", 0, 4)
            with pytest.raises(BlockingIOError):
                other.recv(1)
        finally:
            os.close(number)
            mine.close()
            other.close()
        for pair in (pairs[0], pairs[1], pairs[3]):
            assert await pair.read(9) == b"once data"


@needs_c
async def test_client_that_has_reset_its_connection_is_found_lost() -> None:
    """No exception, no signal; the transport learns it as from its own write."""
    async with connected(3) as pairs:
        sockets, gone = sockets_of(pairs), pairs[1]
        gone.transport.pause_reading()  # so that nothing but a write can find it
        gone.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.client.close()
        for _ in range(3):
            sockets.write(b"data", 0, 3)
        await eventually(lambda: gone.protocol.is_lost, "the loss to be found")
        assert [await pair.read(12) for pair in (pairs[0], pairs[2])] == [b"data" * 3] * 2


@needs_c
async def test_fault_of_one_transport_leaves_no_other_with_half_a_frame() -> None:
    async with connected(3, send_buffer=8192) as pairs:
        sockets = sockets_of(pairs)
        frame = b"x" * 500_000
        pairs[0].transport.write_eof()
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="write_eof"):
            sockets.write(frame, 0, 3)
        for pair in pairs[1:]:
            assert len(await pair.read(len(frame))) == len(frame)


@needs_c
async def test_tls_keeps_its_own_write(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = ssl.create_default_context(cafile=authority.path)
    loop, made = asyncio.get_running_loop(), list[Protocol]()
    server = await loop.create_server(lambda: Protocol(made), "127.0.0.1", 0, ssl=authority.context())
    port = server.sockets[0].getsockname()[1]
    clients = [
        (await loop.create_connection(lambda: Protocol([]), "127.0.0.1", port, ssl=context))[0] for _ in range(3)
    ]
    await eventually(lambda: len(made) == 3, "the server to accept")
    assert PlainSockets.of([each.transport.write for each in made]) is None
    for client in clients:
        client.abort()
    await eventually(lambda: all(each.is_lost for each in made), "all connections to end")
    server.close()
    await server.wait_closed()


@needs_c
async def test_one_other_writer_keeps_all_of_them_apart() -> None:
    async with connected(2) as pairs:
        writes: list[Any] = [pair.transport.write for pair in pairs]
        assert PlainSockets.of(writes) is not None
        assert PlainSockets.of(writes[:1]) is None, "no call is saved"
        assert PlainSockets.of([*writes, bytearray().extend]) is None
        assert PlainSockets.of([*writes, lambda data: None]) is None


@needs_c
async def test_no_reference_is_kept_to_what_was_written() -> None:
    async with connected(3) as pairs:
        sockets = sockets_of(pairs)
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(1000):
            sockets.write(b"some data of this test", 0, 3)
            for pair in pairs:
                _ = await pair.read(22)
        gc.collect()
        assert len(gc.get_objects()) < before + 100


@needs_c
def test_what_is_no_range_is_refused() -> None:
    send = plain_sockets.send_to_each
    assert send is not None
    for start, stop in ((0, BATCH + 1), (-1, 1), (2, 1)):
        with pytest.raises(ValueError, match=f"at most {BATCH} sockets"):
            send((), (), start, stop, b"x")
    with pytest.raises(IndexError):
        send((), (), 0, 1, b"x")
    with pytest.raises(TypeError):
        send([], [], 0, 0, b"x")  # type: ignore[arg-type]


@needs_c
def test_transport_that_fails_to_answer_stops_before_anything_is_sent() -> None:
    mine, other = socket.socketpair()

    class Broken:
        def get_write_buffer_size(self) -> int:
            raise KeyError("broken")

    class Fine:
        def get_write_buffer_size(self) -> int:
            return 0

    with mine, other:
        other.setblocking(False)
        send: Any = plain_sockets.send_to_each
        with pytest.raises(KeyError):
            send((Fine(), Broken()), (mine, mine), 0, 2, b"x")
        with pytest.raises(BlockingIOError):
            other.recv(1)
        assert send((Fine(), Fine()), (mine, mine), 0, 2, b"x") is None
        assert other.recv(9) == b"xx"


async def test_without_the_extension_there_are_no_plain_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_sockets, "send_to_each", None)
    async with connected(2) as pairs:
        assert PlainSockets.of([pair.transport.write for pair in pairs]) is None
    assert plain_sockets.form(enabled=True) == "python"


@needs_c
def test_form_is_named() -> None:
    assert (plain_sockets.form(enabled=True), plain_sockets.form(enabled=False)) == ("c", "python")
