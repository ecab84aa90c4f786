"""ASGI connections without a server: a scope, what `receive` returns, and a record of what was sent."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from relay.transports.writer import EXTENSION, STREAM_EXTENSION, DirectWriter
from tests.support.sse import Parser, StreamEvent


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until the condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is awaited differs from test to test
            await asyncio.sleep(0)


class ServerTransport(asyncio.Transport):
    """The transport below a WebSocket: records what is written and whether it was aborted."""

    def __init__(self, log: list[Any]) -> None:
        super().__init__()
        self._log = log
        self.aborted = 0
        self.buffered_bytes = 0
        self.on_abort: Callable[[], object] = lambda: None

    def write(self, data: Any) -> None:
        self._log.append(bytes(data))

    def abort(self) -> None:
        self.aborted += 1
        self.on_abort()

    def get_write_buffer_size(self) -> int:
        return self.buffered_bytes


class Connection:
    """One request or WebSocket as a server presents it.

    Args: direct: offer the extension `relay.frames`, or `relay.stream`.
          answers_close: the client answers the relay's close, and the server reports a disconnect.
    """

    def __init__(
        self,
        path: str = "/socket/websocket",
        query: str = "vsn=2.0.0",
        headers: Iterable[tuple[str, str]] = (("host", "localhost"),),
        client: tuple[str, int] | None = ("127.0.0.1", 50000),
        *,
        kind: str = "websocket",
        direct: bool = False,
        deflates: bool = False,
        answers_close: bool = True,
        method: str = "GET",
    ) -> None:
        self.log: list[Any] = []
        """Messages given to `send`, and bytes written to the transport, in order."""
        self.transport = ServerTransport(self.log)  # the name that Uvicorn's protocol class has for it
        self.writer = DirectWriter(self.transport, deflates) if direct else None
        self.scope: dict[str, Any] = {
            "type": kind,
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in headers],
            "client": client,
            "server": ("127.0.0.1", 8000),
            "extensions": {"websocket.http.response": {}},
        }
        if kind == "http":
            self.scope["method"] = method
        if self.writer is not None:
            self.scope["extensions"][EXTENSION if kind == "websocket" else STREAM_EXTENSION] = self.writer
        self._answers_close = answers_close
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.take_frames = asyncio.Event()
        """Cleared, it keeps `send` waiting, as a client that does not read."""
        self.take_frames.set()
        self.is_sending = False
        self.fault: Exception | None = None
        """What `send` raises, for a client that is gone."""
        self.put(f"{kind}.connect" if kind == "websocket" else "http.request")

    def put(self, type: str, **fields: Any) -> None:
        """Let `receive` return a message."""
        self._incoming.put_nowait({"type": type, **fields})

    def text(self, text: str) -> None:
        """Let the client send a text frame."""
        self.put("websocket.receive", text=text)

    def disconnect(self, code: int = 1000, reason: str = "") -> None:
        """Let the client, or the server, end the connection."""
        if self.scope["type"] == "http":
            self.put("http.disconnect")
        else:
            self.put("websocket.disconnect", code=code, reason=reason)

    async def receive(self) -> dict[str, Any]:
        """ASGI's ``receive``."""
        return await self._incoming.get()

    async def send(self, message: Any) -> None:
        """ASGI's ``send``."""
        if self.fault is not None:
            raise self.fault
        self.is_sending = True
        if message["type"] != "websocket.close":  # a close too early must be seen
            await self.take_frames.wait()
        self.is_sending = False
        self.log.append(message)
        if message["type"] == "websocket.close":
            if self.writer is not None:
                self.writer.end()
            if self._answers_close:
                self.disconnect(message["code"])

    @property
    def sent(self) -> list[Any]:
        """Payloads of the frames, and codes of the closes, in order."""
        found: list[Any] = []
        for entry in self.log:
            if isinstance(entry, bytes):
                found.append(_payload(entry))
            elif entry["type"] == "websocket.send":
                found.append(entry["text"] if entry.get("text") is not None else entry["bytes"])
            elif entry["type"] == "websocket.close":
                found.append(entry["code"])
        return found

    @property
    def status(self) -> int | None:
        """Status of the answer; 101 where the WebSocket was accepted."""
        for entry in self.log:
            if isinstance(entry, dict) and entry["type"].endswith("response.start"):
                return int(entry["status"])
            if isinstance(entry, dict) and entry["type"] == "websocket.accept":
                return 101
        return None

    @property
    def body(self) -> str:
        """The body of an HTTP answer."""
        parts = [entry["body"] for entry in self.log if isinstance(entry, dict) and "body" in entry]
        return b"".join(parts).decode()

    @property
    def parser(self) -> Parser:
        """What a client of server-sent events has read of an HTTP answer, its events in ``parsed``."""
        parser = Parser()
        for entry in self.log:
            data = _chunk(entry) if isinstance(entry, bytes) else entry.get("body", b"")
            parser.parsed += parser.feed(data)
        return parser

    @property
    def events(self) -> list[StreamEvent]:
        """The events in an HTTP answer."""
        return self.parser.parsed

    @property
    def is_complete(self) -> bool:
        """Whether the HTTP answer has ended."""
        bodies = [each for each in self.log if isinstance(each, dict) and each["type"] == "http.response.body"]
        return any(not body.get("more_body") for body in bodies)

    def header(self, name: str) -> str | None:
        """A header of an HTTP answer."""
        start = next(entry for entry in self.log if entry["type"].endswith("response.start"))
        return next((value.decode() for key, value in start["headers"] if key == name.encode()), None)


def _chunk(data: bytes) -> bytes:
    """What one or several chunks hold."""
    found = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        found, data = found + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return found


def _payload(frame: bytes) -> str | bytes:
    """The payload of one short WebSocket frame of the server, uncompressed."""
    size = frame[1]
    payload = frame[2:] if size < 126 else frame[4:]
    return payload.decode() if frame[0] == 0x81 else payload
