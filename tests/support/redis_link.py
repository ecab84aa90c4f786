"""A Redis broker alone, servers that change their role, and connections that can be moved or go deaf."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis import Redis

from relay.brokers.redis import RedisBroker
from relay.config import Config
from relay.errors import BusUnavailable
from relay.metrics import Metrics
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.redis_faults import FAST
from tests.support.serving import eventually
from tests.support.sink import Sink

WATCHFUL = FAST | {"ping_interval_s": 0.5, "ping_timeout_s": 0.25}
PATIENT = WATCHFUL | {"ping_timeout_s": 2.0}
"""For what must not be taken for a loss on a slow machine."""
NOTICED_S = 0.5 + 2 * 0.25
SLACK_S = 4.0 * PATIENCE
"""What a loaded machine may add."""


def ask(server: Valkey, *command: str) -> Any:
    with Redis(port=server.port, decode_responses=True) as redis:
        return redis.execute_command(*command)


def is_linked(server: Valkey) -> bool:
    with Redis(port=server.port) as redis:
        return str(redis.info("replication").get("master_link_status")) == "up"


def become_replica(server: Valkey, master: Valkey) -> None:
    ask(server, "REPLICAOF", "127.0.0.1", str(master.port))


@asynccontextmanager
async def broker_on(url: str, **redis: Any) -> AsyncIterator[tuple[RedisBroker, Sink, Metrics]]:
    metrics, sink = Metrics(), Sink()
    broker = RedisBroker(Config(redis_url=url, redis=WATCHFUL | redis), metrics)
    await broker.start(sink)
    try:
        yield broker, sink, metrics
    finally:
        await broker.stop()


async def within(condition: Callable[[], object], what: str, since: float) -> None:
    """Wait for ``condition``; it must come true in the time that is promised."""
    await eventually(condition, what)
    assert time.monotonic() - since < NOTICED_S + SLACK_S, f"{what} came late"


async def outcome(future: "asyncio.Future[None]") -> str:
    try:
        await future
    except BusUnavailable as error:
        return str(error)
    return "ok"


class Switch:
    """A TCP proxy that can move each of its connections to another server, or swallow what comes one way."""

    def __init__(self) -> None:
        self.port = 0
        self.targets: Callable[[int], int] = lambda number: 0
        self.links: list[dict[str, Any]] = []

    @classmethod
    @asynccontextmanager
    async def open(cls, target: int, port: int = 0) -> AsyncIterator["Switch"]:
        self = cls()
        self.targets = lambda number: target
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for link in self.links:
                link["task"].cancel()
            await asyncio.gather(*(link["task"] for link in self.links), return_exceptions=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link: dict[str, Any] = {"deaf": False, "sent": b"", "writer": writer, "task": asyncio.current_task()}
        self.links.append(link)
        try:
            with suppress(OSError, asyncio.CancelledError):
                await self._join(link, reader, writer)
        finally:
            writer.transport.abort()

    async def _join(self, link: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.targets(len(self.links) - 1))

        async def pump(source: asyncio.StreamReader, into: asyncio.StreamWriter, note: bool) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    if note:
                        link["sent"] += data
                    if not link["deaf"]:
                        into.write(data)

        pumps = [asyncio.create_task(pump(reader, far_writer, True))]
        pumps.append(asyncio.create_task(pump(far_reader, writer, False)))
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            far_writer.transport.abort()
            for each in pumps:
                each.cancel()

    def link(self, command: bytes) -> dict[str, Any]:
        """The newest connection on which ``command`` was sent."""
        return next(link for link in reversed(self.links) if command in link["sent"])
