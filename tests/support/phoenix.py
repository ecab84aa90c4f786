"""Many light clients that come back as phoenix.js does, in the test's own loop.

Source: protocol.md, 1.4: after a close that is not 1000 a socket comes back after 10, 50, 100 … ms, without jitter, and
joins its topics again; after an error a topic is joined again after 1, 2, 5, then 10 s.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from tests.support.client import CLOSE, TEXT, client_frame
from tests.support.patience import PATIENCE

RECONNECT_MS = (10, 50, 100, 150, 200, 250, 500, 1000, 2000, 5000)
REJOIN_S = (1, 2, 5, 10)
HEARTBEAT_S = 0.5

_TICK = re.compile(rb'"tick",(\d+)\]$')


class PhoenixClient:
    """One client. Times are of the monotonic clock.

    Args: port: of the relay, or of a balancer before it.
          comes_back: whether it connects again after a close.
    """

    def __init__(self, port: int, topic: str, *, comes_back: bool = True) -> None:
        self.port = port
        self.topic = topic
        self.comes_back = comes_back
        self.joined = False
        self.joined_at: list[float] = []
        self.closed_at: list[float] = []
        self.codes: Counter[int] = Counter()
        """Close codes got; 1006 where a connection ended without one."""
        self.refusals: Counter[bytes] = Counter()
        """Status lines of refused handshakes."""
        self.numbers: list[int] = []
        self.local_port = 0
        self.tries = 0
        self._rejoins = 0
        self._transport: asyncio.Transport | None = None
        self._later: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = False

    def connect(self) -> None:
        task = asyncio.ensure_future(self._connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _ = await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self.port)
        except OSError:
            self.lost(0)

    def opened(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.local_port = transport.get_extra_info("sockname")[1]
        self.tries = 0
        self._join()
        self._beat()

    def _join(self) -> None:
        self._send("j", "j", self.topic, "phx_join")

    def _beat(self) -> None:
        self._send(None, "h", "phoenix", "heartbeat")
        self._later = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)

    def _send(self, *message: str | None) -> None:
        assert self._transport is not None
        self._transport.write(client_frame(TEXT, json.dumps([*message, {}]).encode()))

    def receive(self, payload: bytes) -> None:
        if found := _TICK.search(payload):
            self.numbers.append(int(found[1]))
            return
        _, ref, topic, event, response = json.loads(payload)
        if topic != self.topic:
            return
        if ref == "j" and event == "phx_reply" and response["status"] == "ok":
            self.joined = True
            self._rejoins = 0
            self.joined_at.append(time.monotonic())
        elif event in ("phx_error", "phx_reply"):
            self.joined = False
            asyncio.get_running_loop().call_later(REJOIN_S[min(self._rejoins, 3)], self._rejoin, self._transport)
            self._rejoins += 1

    def _rejoin(self, transport: asyncio.Transport | None) -> None:
        if transport is self._transport:
            self._join()

    def lost(self, code: int) -> None:
        """Learn of the end of a connection; 0 where there was no WebSocket yet."""
        self.joined = False
        self._transport = None
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if code:
            self.codes[code] += 1
            self.closed_at.append(time.monotonic())
        if self.comes_back and not self._ended:
            wait_ms = RECONNECT_MS[min(self.tries, len(RECONNECT_MS) - 1)]
            self.tries += 1
            self._later = asyncio.get_running_loop().call_later(wait_ms / 1000, self.connect)

    async def end(self) -> None:
        self._ended = True
        if self._later is not None:
            self._later.cancel()
        if self._transport is not None:
            self._transport.abort()
        for task in tuple(self._tasks):
            await task
        if self._transport is not None:
            self._transport.abort()


class _Connection(asyncio.Protocol):
    """Bytes to frames, for one connection of a client."""

    def __init__(self, client: PhoenixClient) -> None:
        self._client = client
        self._received = bytearray()
        self._is_open = False
        self._code = 1006

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(
            b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._is_open:
            head, end, rest = bytes(self._received).partition(b"\r\n\r\n")
            if not end:
                return
            status = head.split(b"\r\n")[0]
            if b" 101 " not in status:
                self._client.refusals[status] += 1
                self._transport.close()
                return
            self._is_open = True
            self._received = bytearray(rest)
            self._client.opened(self._transport)
        while (frame := self._frame()) is not None:
            opcode, payload = frame
            if opcode == CLOSE:
                self._code = int.from_bytes(payload[:2])
                self._transport.write(client_frame(CLOSE, payload[:2]))
                self._transport.close()
                return
            self._client.receive(payload)

    def _frame(self) -> tuple[int, bytes] | None:
        buffer = self._received
        if len(buffer) < 2:
            return None
        size, start = buffer[1], 2
        if size >= 126:
            start = 4 if size == 126 else 10
            size = int.from_bytes(buffer[2:start])
        if len(buffer) < start + size:
            return None
        opcode, payload = buffer[0] & 0x0F, bytes(buffer[start : start + size])
        del buffer[: start + size]
        return opcode, payload

    def connection_lost(self, error: Exception | None) -> None:
        self._client.lost(self._code if self._is_open else 0)


@asynccontextmanager
async def phoenix_clients(
    count: int, port: int, topic: str, *, comes_back: bool = True
) -> AsyncIterator[list[PhoenixClient]]:
    """That many clients, all joined."""
    clients = [PhoenixClient(port, topic, comes_back=comes_back) for _ in range(count)]
    try:
        for start in range(0, count, 50):
            for client in clients[start : start + 50]:
                client.connect()
            await until_joined(clients[: start + 50])
        yield clients
    finally:
        for client in clients:
            await client.end()
        await asyncio.sleep(0)


async def until_joined(clients: list[PhoenixClient], deadline_s: float = 20.0) -> None:
    """Wait until all have joined."""
    async with asyncio.timeout(deadline_s * PATIENCE):
        while not all(client.joined for client in clients):  # noqa: ASYNC110 - many clients' state
            await asyncio.sleep(0.01)
