"""A program behind a webhook: it keeps what it is asked, and answers what the test says."""

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()


@dataclass
class Asked:
    """One request."""

    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def is_signed(self, key: bytes = KEY) -> bool:
        """Whether one of the signatures is by this key; written from the specification alone."""
        text = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + self.body
        made = base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
        return f"v1,{made}" in self.headers["webhook-signature"].split(" ")


Behaviour = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


def raw(data: bytes, *, close: bool = False) -> Behaviour:
    """Answer with these bytes."""

    async def behave(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()
        if close:
            writer.close()

    return behave


def status(code: int, body: bytes = b"", headers: str = "", *, length: int | None = None) -> Behaviour:
    """Answer with a status; ``length`` may be a lie, after which the connection is closed."""
    size = len(body) if length is None else length
    head = f"HTTP/1.1 {code} X\r\ncontent-length: {size}\r\n{headers}\r\n".encode()
    return raw(head + body, close=size != len(body))


def answer(value: object) -> Behaviour:
    """Answer with JSON."""
    return status(200, json.dumps(value).encode(), "content-type: application/json\r\n")


ALLOW = answer({"allow": True})


class WebhookServer:
    """Serves HTTP/1.1 on a loopback port, in the test's own event loop."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.behaviour: Behaviour = ALLOW
        self.under_way = 0
        self.most_under_way = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None] | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def take(self) -> list[Any]:
        """What was asked since it was called last."""
        asked, self.asked = self.asked, []
        return [each.json for each in asked]

    @asynccontextmanager
    async def running(self, port: int = 0, **options: Any) -> AsyncIterator["WebhookServer"]:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, **options)
        self.port = self._server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            self._server.close()
            tasks = [task for task in self._tasks if task is not None]
            for task in tasks:
                task.cancel()
            _ = await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._tasks.add(asyncio.current_task())
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while not writer.is_closing():
                    await self._serve_one(reader, writer)
        finally:
            self._writers.discard(writer)
            self._tasks.discard(asyncio.current_task())
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.removesuffix("\r\n\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        asked = Asked(line.split(" ")[1], headers, body)
        self.asked.append(asked)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.behaviour(asked, writer)
        finally:
            self.under_way -= 1
