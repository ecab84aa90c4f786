"""A small Phoenix client for tests: it says exactly what it is told and hides nothing."""

import asyncio
import itertools
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import websockets
from websockets.asyncio.client import ClientConnection

from tests.support.patience import PATIENCE

DEADLINE_S = 20.0 * PATIENCE


class Client:
    """One socket. Its join_refs and refs start apart, so that a server cannot take one for the other."""

    def __init__(self, connection: ClientConnection, version: str) -> None:
        self.connection = connection
        self.v1 = version.startswith("1")
        self._refs = itertools.count(7)
        self._join_refs = itertools.count(100)

    def next_ref(self) -> str | int:
        """A ref not used before: a string, or an integer as V1 clients send them."""
        return next(self._refs) if self.v1 else str(next(self._refs))

    def message(self, join_ref: Any, ref: Any, topic: str, event: str, payload: Any) -> Any:
        """Five fields as this client's version has them on the wire, decoded; V1 has no place for ``join_ref``."""
        if self.v1:
            return {"topic": topic, "event": event, "payload": payload, "ref": ref}
        return [join_ref, ref, topic, event, payload]

    def reply(self, join_ref: Any, ref: Any, topic: str, status: str = "ok", response: Any = None) -> Any:
        """A reply as this client expects it."""
        return self.message(join_ref, ref, topic, "phx_reply", {"status": status, "response": response or {}})

    def refusal(self, join_ref: Any, ref: Any, topic: str, reason: str) -> Any:
        """An error reply as this client expects it."""
        return self.reply(join_ref, ref, topic, "error", {"reason": reason})

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, *, vsn: str | None = "2.0.0", query: str = "", **options: Any
    ) -> AsyncIterator["Client"]:
        """Connect to ``<url>/websocket``; ``vsn=None`` leaves the version out."""
        parameters = "&".join(filter(None, (query, f"vsn={vsn}" if vsn else "")))
        address = f"{url}/websocket" + (f"?{parameters}" if parameters else "")
        async with websockets.connect(address, compression=None, max_size=None, **options) as connection:
            yield cls(connection, vsn or "1.0.0")

    async def send(self, *message: Any) -> None:
        """Send five fields."""
        await self.send_raw(json.dumps(self.message(*message)))

    async def send_raw(self, frame: str | bytes) -> None:
        """Send a frame as it is."""
        await self.connection.send(frame)

    async def receive_raw(self) -> str | bytes:
        """The next frame as it came."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.connection.recv()

    async def receive(self) -> Any:
        """The next text frame, decoded."""
        frame = await self.receive_raw()
        assert isinstance(frame, str), f"expected a text frame, got {frame!r}"
        return json.loads(frame)

    async def join(self, topic: str, payload: Any = None) -> Any:
        """Join, expect the ok reply next, and return the join_ref (of V1: the join's ref)."""
        ref = self.next_ref()
        join_ref = ref if self.v1 else str(next(self._join_refs))
        await self.send(join_ref, ref, topic, "phx_join", payload or {})
        assert await self.receive() == self.reply(join_ref, ref, topic)
        return join_ref

    async def push(self, join_ref: Any, topic: str, event: str, payload: Any = None) -> Any:
        """Push, expect its reply next, and return that reply's payload."""
        ref = self.next_ref()
        await self.send(join_ref, ref, topic, event, payload if payload is not None else {})
        reply = await self.receive()
        payload = reply["payload"] if self.v1 else reply[4]
        assert reply == self.message(reply[0] if not self.v1 else None, ref, topic, "phx_reply", payload)
        return payload

    async def expect_event(self, topic: str, event: str, payload: Any) -> None:
        """The next thing heard is this broadcast."""
        assert await self.receive() == self.message(None, None, topic, event, payload)

    async def expect_alive(self) -> None:
        """The next thing heard is the answer to a heartbeat: nothing else was on its way."""
        ref = self.next_ref()
        await self.send(None, ref, "phoenix", "heartbeat", {})
        assert await self.receive() == self.reply(None, ref, "phoenix")

    async def expect_closed(self) -> tuple[int, str]:
        """The server closes; returns code and reason."""
        async with asyncio.timeout(DEADLINE_S):
            await self.connection.wait_closed()
        return self.connection.close_code or 0, self.connection.close_reason or ""


TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class RawSocket:
    """A WebSocket by hand, over a plain socket: it sends any bytes as a frame, and reads only when told to."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()
        self.head = ""
        """The server's answer to the upgrade request."""

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str,
        *,
        vsn: str = "2.0.0",
        receive_buffer: int | None = None,
        send_buffer: int | None = None,
        extensions: str = "",
    ) -> AsyncIterator["RawSocket"]:
        """Connect to ``<url>/websocket``; a small ``receive_buffer`` (bytes) lets pressure arrive early.

        Args: send_buffer: what `send_now` may leave with the kernel, in bytes.
              extensions: those to offer, as the header says it.
        """
        parts = urlsplit(url)
        with socket.socket() as connection:
            connection.setblocking(False)
            if receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if send_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
            await asyncio.get_running_loop().sock_connect(connection, (parts.hostname, parts.port))
            self = cls(connection)
            await self.send_bytes(
                f"GET {parts.path}/websocket?vsn={vsn} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
                "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                f"{f'Sec-WebSocket-Extensions: {extensions}' + chr(13) + chr(10) if extensions else ''}\r\n".encode()
            )
            self.head = (await self._read_past(b"\r\n\r\n")).decode()
            assert self.head.startswith("HTTP/1.1 101 "), self.head
            yield self

    def reset(self) -> None:
        """Cut the connection with a reset, RST, instead of an end, FIN."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.close()

    async def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        await asyncio.get_running_loop().sock_sendall(self._connection, data)

    def send_now(self, data: bytes) -> None:
        """Hand bytes to the kernel, which must have room for them, before the event loop does anything else."""
        assert self._connection.send(data) == len(data)

    async def send_frame(self, opcode: int, payload: bytes, *, first_byte: int | None = None) -> None:
        """Send one frame; ``first_byte`` replaces FIN and opcode."""
        await self.send_bytes(client_frame(opcode, payload, first_byte=first_byte))

    async def read_frame(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload. Raises EOFError where the server has cut the connection."""
        first, payload = await self.read_frame_as_it_is()
        return first & 0x0F, payload

    async def read_frame_as_it_is(self) -> tuple[int, bytes]:
        """The next frame: its whole first byte, and its payload, compressed or not."""
        head = await self._read(2)
        size = head[1]
        if size >= 126:
            size = int.from_bytes(await self._read(2 if size == 126 else 8))
        return head[0], await self._read(size)

    async def read_message(self) -> Any:
        """The next frame, which must be text, decoded."""
        opcode, payload = await self.read_frame()
        assert opcode == TEXT, (opcode, payload[:200])
        return json.loads(payload)

    async def read_close(self) -> tuple[int, str]:
        """The next frame, which must be a close: code and reason."""
        opcode, payload = await self.read_frame()
        assert opcode == CLOSE, (opcode, payload[:200])
        return int.from_bytes(payload[:2]), payload[2:].decode()

    async def _read(self, size: int) -> bytes:
        while len(self._received) < size:
            await self._receive()
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    async def _read_past(self, end: bytes) -> bytes:
        while end not in self._received:
            await self._receive()
        return await self._read(self._received.index(end) + len(end))

    async def _receive(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            data = await asyncio.get_running_loop().sock_recv(self._connection, 65536)
        if not data:
            raise EOFError
        self._received += data


def client_frame(opcode: int, payload: bytes, *, first_byte: int | None = None) -> bytes:
    """One frame as a client sends it, under a mask of zeros, which changes nothing (RFC 6455, section 5.3)."""
    size = len(payload)
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 65536:
        length = b"\xfe" + size.to_bytes(2)
    else:
        length = b"\xff" + size.to_bytes(8)
    first = 0x80 | opcode if first_byte is None else first_byte
    return bytes((first,)) + length + bytes(4) + payload
