"""`relay.transports.writer`: when a frame may go straight to the transport."""

import asyncio
import socket
from asyncio import Transport
from typing import Any

import pytest

from relay.transports.writer import EXTENSION, DirectWriter


class FakeTransport(Transport):
    """Notes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def writer(transport: FakeTransport) -> DirectWriter:
    return DirectWriter(transport)


def test_extension_has_a_name_of_its_own() -> None:
    """Source: ASGI, "Extensions": the scope's dictionary is shared with the server's."""
    assert EXTENSION == "relay.frames"


def test_frames_go_straight_to_the_transport(writer: DirectWriter, transport: FakeTransport) -> None:
    writer.write(b"\x81\x02{}")
    assert transport.written == [b"\x81\x02{}"]
    writer.abort()
    assert transport.aborted


def test_writer_waits_for_its_socket_to_be_ready(writer: DirectWriter) -> None:
    assert (writer.open, writer.paused, writer.ready, writer.last_ping) == (True, False, False, 0.0)


class Owner:
    """Notes what it is told, and how the writer was then: whether paused, and whether ready."""

    def __init__(self, writer: DirectWriter) -> None:
        self.told: list[tuple[str, bool, bool]] = []
        self._writer = writer
        writer.owner = self

    def flush(self) -> None:
        self.told.append(("flush", self._writer.paused, self._writer.ready))

    def readiness_changed(self) -> None:
        self.told.append(("changed", self._writer.paused, self._writer.ready))


def test_full_buffer_takes_readiness_away(writer: DirectWriter) -> None:
    writer.set_ready(True)
    writer.pause()
    assert (writer.paused, writer.ready, writer.open) == (True, False, True)


def test_owner_learns_of_each_change_of_readiness_once(writer: DirectWriter) -> None:
    """Whoever writes without asking each time relies on it."""
    owner = Owner(writer)
    writer.set_ready(True)
    writer.set_ready(True)
    writer.pause()
    writer.pause()
    writer.end()
    assert owner.told == [("changed", False, True), ("changed", True, False)]


def test_drained_buffer_leaves_readiness_to_the_socket(writer: DirectWriter) -> None:
    """It has an outbox to send first."""
    owner = Owner(writer)
    writer.pause()
    writer.resume()
    assert owner.told == [("flush", False, False)]


def test_drained_buffer_wakes_nobody_where_nobody_listens(writer: DirectWriter) -> None:
    writer.pause()
    writer.resume()
    assert not writer.paused


def test_ended_writer_is_neither_open_nor_ready(writer: DirectWriter) -> None:
    """The next event must not be written behind the close frame."""
    writer.set_ready(True)
    writer.end()
    assert (writer.open, writer.ready) == (False, False)


def test_nothing_follows_a_close_frame(writer: DirectWriter) -> None:
    """Source: RFC 6455, section 5.5.1."""
    writer.set_ready(True)
    writer.pause()
    owner = Owner(writer)
    writer.end()
    writer.resume()
    assert (writer.open, writer.ready, owner.told) == (False, False, [])


async def test_connection_that_is_lost_already_can_be_cut() -> None:
    """asyncio's selector transport has let go of its loop where the last write of a close found the client gone."""
    near, far = socket.socketpair()
    near.setblocking(False)
    lost = asyncio.Event()

    class Client(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.set()

    transport, _ = await asyncio.get_running_loop().create_connection(Client, sock=near)
    writer = DirectWriter(transport)
    writer.write(bytes(1 << 24))
    transport.close()

    def read_all() -> None:
        while far.recv(1 << 20):
            pass

    reading = asyncio.create_task(asyncio.to_thread(read_all))
    await lost.wait()
    writer.abort()
    await reading
    far.close()
