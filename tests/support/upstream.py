"""A server to be forwarded to: it shows each request byte by byte as it comes, and answers what the test says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.patience import PATIENCE

_TIMEOUT_S = 20.0 * PATIENCE


class Exchange:
    """One request, its head read and its body not, and the way to answer it."""

    def __init__(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.ended = asyncio.Event()
        line, *fields = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        self.method, self.target, _ = line.split(" ")
        self.headers: list[tuple[str, str]] = []
        for field in fields:
            name, value = field.split(":", 1)
            self.headers.append((name.lower(), value.strip()))

    def values(self, name: str) -> list[str]:
        """All values of one header."""
        return [value for key, value in self.headers if key == name]

    async def read(self, size: int) -> bytes:
        """The next ``size`` bytes of the body, framing included."""
        async with asyncio.timeout(_TIMEOUT_S):
            return await self._reader.readexactly(size)

    async def read_chunk(self) -> bytes:
        """The next chunk of a body with chunked coding; empty at its end."""
        async with asyncio.timeout(_TIMEOUT_S):
            size = int(await self._reader.readline(), 16)
            return (await self._reader.readexactly(size + 2))[:-2]

    async def answer(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def answer_ok(self) -> None:
        """Answer with nothing but success."""
        await self.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def closed(self) -> None:
        """Return once the other side has closed the connection."""
        async with asyncio.timeout(_TIMEOUT_S):
            await self.ended.wait()

    async def read_to_end(self) -> None:
        """Return once the other side has closed the connection, also in the midst of a body."""
        async with asyncio.timeout(_TIMEOUT_S):
            try:
                await self._reader.read()
            except ConnectionError:
                pass

    def close(self) -> None:
        """Close the connection, whatever has been sent."""
        self._writer.close()


class Upstream:
    """Serves HTTP/1.1 on a free loopback port, in the test's own event loop."""

    def __init__(self) -> None:
        self.port = 0
        self._exchanges: asyncio.Queue[Exchange] = asyncio.Queue()

    @classmethod
    @asynccontextmanager
    async def start(cls, port: int = 0) -> AsyncIterator["Upstream"]:
        self = cls()
        writers: set[asyncio.StreamWriter] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.add(writer)
            exchange = None
            try:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    exchange = Exchange(head, reader, writer)
                    self._exchanges.put_nowait(exchange)
                    if exchange.values("content-length") or exchange.values("transfer-encoding"):
                        return  # the test reads the rest
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                if exchange is not None:
                    exchange.ended.set()

        server = await asyncio.start_server(serve, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in writers:
                writer.close()
            await server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def next(self) -> Exchange:
        """The next request that comes."""
        async with asyncio.timeout(_TIMEOUT_S):
            return await self._exchanges.get()

    @property
    def is_idle(self) -> bool:
        """Whether every request that came has been taken with `next`."""
        return self._exchanges.empty()
