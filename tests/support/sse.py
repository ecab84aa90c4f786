"""A client of server-sent events: the parser of the standard, and a connection that reads by it."""

import asyncio
import codecs
import json
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

from tests.support.patience import PATIENCE

DEADLINE_S = 20.0 * PATIENCE


class StreamEvent(NamedTuple):
    """What a page is given: the event's name, its data, and the last id until then."""

    event: str
    data: str
    id: str


class Parser:
    """Reads a stream piece by piece. Source: WHATWG HTML, section 9.2.6."""

    def __init__(self) -> None:
        self.parsed: list[StreamEvent] = []
        """For the owner's use."""
        self.retry_ms: int | None = None
        self.last_id = ""
        self.comments = 0
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._rest = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[StreamEvent]:
        """The events that are complete by now."""
        text = self._rest + self._decode(data)
        held = "\r" if text.endswith("\r") else ""  # half of a line end, perhaps
        lines = (text[: len(text) - len(held)]).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._rest = lines.pop() + held
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: str) -> StreamEvent | None:
        if not line:
            event, data = self._event or "message", self._data
            self._event, self._data = "", []
            return StreamEvent(event, "\n".join(data), self.last_id) if data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "":
                self.comments += 1
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self.last_id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_ms = int(value)
        return None


class Stream:
    """A response that is read as ``curl -N`` does it, over a plain connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parser = Parser()
        self.writer = writer
        self.read_id = ""
        """The id of the event that was received last."""
        self.joins: list[Any] = []
        """What the stream has said of its joins; these events are kept apart from the others."""
        self.is_complete = False
        """Whether the response has ended as HTTP has it, and was not cut."""
        self._reader = reader
        self._events: deque[StreamEvent] = deque()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        base: str,
        *topics: str,
        method: str = "GET",
        receive_buffer: int | None = None,
        headers: dict[str, str] | None = None,
        **query: str,
    ) -> AsyncIterator["Stream"]:
        """Ask for a stream below the socket's path ``base``, and read the head of the answer."""
        parts = urlsplit(base.replace("ws://", "http://", 1))
        assert parts.hostname is not None
        connection = socket.socket()
        try:
            if receive_buffer is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connection, (parts.hostname, parts.port))
            reader, writer = await asyncio.open_connection(sock=connection, limit=receive_buffer or 65_536)
        except BaseException:  # refused, or cancelled
            connection.close()
            raise
        target = f"{parts.path}/sse?{urlencode([*(('topic', topic) for topic in topics), *query.items()])}"
        lines = [
            f"{method} {target} HTTP/1.1",
            *(f"{n}: {v}" for n, v in {"Host": parts.netloc, **(headers or {})}.items()),
        ]
        writer.write("".join(f"{line}\r\n" for line in (*lines, "")).encode())
        stream = cls(reader, writer)
        try:
            async with asyncio.timeout(DEADLINE_S):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            stream.status = int(head[0].split()[1])
            pairs = (line.partition(":") for line in head[1:] if line)
            stream.headers = {name.lower(): value.strip() for name, _, value in pairs}
            yield stream
        finally:
            writer.transport.abort()

    async def _read(self) -> bytes:
        """A piece of the body; empty at its end."""
        if "content-length" in self.headers:
            self.is_complete = True
            body = await self._reader.readexactly(int(self.headers["content-length"]))
            self.headers.pop("content-length")
            return body
        if self.headers.get("transfer-encoding") != "chunked":
            return await self._reader.read(65_536)
        line = await self._reader.readline()
        size = int(line or b"0", 16)
        data = await self._reader.readexactly(size)
        self.is_complete = bool(line) and size == 0
        if line:
            await self._reader.readexactly(2)
        return data

    def _keep(self, data: bytes) -> None:
        for event in self.parser.feed(data):
            if event.event == "relay:join":
                self.joins.append(json.loads(event.data))
            else:
                self._events.append(event)

    async def body(self) -> str:
        """The whole of a body that ends."""
        async with asyncio.timeout(DEADLINE_S):
            parts = []
            while part := await self._read():
                parts.append(part)
                if self.is_complete:
                    break
        return b"".join(parts).decode()

    async def receive(self) -> StreamEvent:
        """The next event."""
        async with asyncio.timeout(DEADLINE_S):
            while not self._events:
                data = await self._read()
                assert data, "the stream has ended"
                self._keep(data)
        event = self._events.popleft()
        self.read_id = event.id
        return event

    async def expect_event(self, event: str, data: str) -> StreamEvent:
        """The next event has this name and this data."""
        seen = await self.receive()
        assert (seen.event, seen.data) == (event, data)
        return seen

    async def rest(self) -> list[StreamEvent]:
        """The events until the stream ends, or is cut, perhaps within an event."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            async with asyncio.timeout(DEADLINE_S):
                while not self.is_complete and (data := await self._read()):
                    self._keep(data)
        found = list(self._events)
        self._events.clear()
        return found
