"""An application on a real Uvicorn, in the test's own event loop and on a free port."""

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import uvicorn
from redis.asyncio import Redis

from relay import Relay
from tests.support.patience import PATIENCE


@dataclass
class Served:
    """A relay that is being served."""

    relay: Relay
    port: int
    prefix: str = ""

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}{self.prefix}/socket"


class _Server(uvicorn.Server):
    """Uvicorn's server without its looks at the clock each 0.1 s, which would be most of these tests' time.

    `relay serve` as a process is tested with the server as it is.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ending = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.ending.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in tuple(self.server_state.connections):
            connection.shutdown()
        while self.server_state.tasks:
            await asyncio.wait(tuple(self.server_state.tasks))
        await self.lifespan.shutdown()


@asynccontextmanager
async def serve(
    relay: Relay,
    *,
    direct: bool = True,
    app: Any = None,
    prefix: str = "",
    send_buffer: int | None = None,
    **options: Any,
) -> AsyncIterator[Served]:
    """Serve ``relay``, or ``app`` that contains it under ``prefix``.

    Args: direct: with our protocol class, or with Uvicorn's own.
          send_buffer: the kernel's, in bytes for each socket; a small one lets pressure arrive early.
          options: further settings of Uvicorn.
    """
    # With its protocol: asyncio sets TCP_NODELAY only then.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(("127.0.0.1", 0))
    settings: dict[str, Any] = {"log_config": None, "lifespan": "on", "ws_ping_interval": None}
    if direct:
        settings["ws"] = "relay.server:RelayWebSocketProtocol"
    server = _Server(uvicorn.Config(app or relay, **settings | options))
    task = asyncio.create_task(server._serve([listener]))
    try:
        await eventually(lambda: server.started or task.done(), "the server to start")
        assert server.started, "the server did not start"
        yield Served(relay, listener.getsockname()[1], prefix)
    finally:
        server.ending.set()
        await task
        listener.close()


async def eventually(condition: Callable[[], object], what: str, deadline_s: float = 20.0) -> None:
    """Wait in the event loop until ``condition()`` is true."""
    end = time.monotonic() + deadline_s * PATIENCE
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        await asyncio.sleep(0.002)


async def http_get(url: str) -> tuple[int, str]:
    """Status and body of a GET, asked for in a thread: the server may live in the caller's loop."""

    def get() -> tuple[int, str]:
        try:
            with urlopen(url, timeout=20) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(get)


def metric(metrics: str, name: str, **labels: str) -> float:
    """One metric out of what ``/metrics`` answers; 0 where it has not been counted yet. Labels not given are empty."""
    for shown, value in re.findall(rf"^{re.escape(name)}(?:{{(.*)}})? (\S+)$", metrics, re.MULTILINE):
        if {key: text for key, text in re.findall(r'(\w+)="([^"]*)"', shown) if text} == labels:
            return float(value)
    return 0.0


@asynccontextmanager
async def heard_on(redis_url: str, pattern: str) -> AsyncIterator[Callable[[], Awaitable[tuple[str, bytes]]]]:
    """What a backend hears: call the yielded function for the next (Redis channel, payload)."""
    async with Redis.from_url(redis_url) as redis, redis.pubsub() as subscription:
        await subscription.psubscribe(pattern)
        confirmed = await subscription.get_message(timeout=20)
        assert confirmed is not None and confirmed["type"] == "psubscribe"

        async def hear() -> tuple[str, bytes]:
            message = await subscription.get_message(ignore_subscribe_messages=True, timeout=20)
            assert message is not None, f"nothing was heard on {pattern}"
            return message["channel"].decode(), message["data"]

        yield hear
