"""Histories under faults, for clients of all kinds that read slowly, whatever the policy and the payloads."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from redis.asyncio import Redis

from relay import Event, Plugin
from relay.config_sections import Direction, Overflow
from relay.errors import BusUnavailable
from tests.support.patience import PATIENCE
from tests.support.positions import Reader, SocketReader, StreamReader, running
from tests.support.process import Valkey
from tests.support.serving import Served

ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

FAST = {"backoff_min_s": 0.01, "backoff_max_s": 0.05, "ping_interval_s": 0.5, "ping_timeout_s": 5.0, "timeout_s": 10.0}
LIMITS = {
    "joins_per_s": 0,
    "sockets_per_address": 0,
    "handshakes_per_s": 0,
    "recover_max_events": 100_000,
    "recover_max_bytes": 1_000_000_000,
    "payload_max_bytes": 200_000,
    "frame_max_bytes": 210_000,
    "outbox_max_bytes": 210_000,
}


@pytest.fixture
def server() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


def payload_of(source: random.Random) -> bytes:
    """An object, another value, or bytes; some of them large."""
    text = "x" * source.choice([10, 100, 1000, 1000, 10_000, 100_000 if source.random() < 0.1 else 10])
    kind = source.random()
    if kind < 0.2:
        return b"\xff" + text.encode()
    return json.dumps({"t": text} if kind < 0.7 else [text]).encode()


@asynccontextmanager
async def publishing(served: list[Served]) -> AsyncIterator[None]:
    """Events on a topic of each policy, from each relay, as long as the block."""
    ended = asyncio.Event()

    async def publish(seed: int) -> None:
        source = random.Random(seed)
        pubsub = served[seed].relay.node.pubsub
        while not ended.is_set():
            for overflow in Overflow:
                with suppress(BusUnavailable):
                    event = source.choice("abc")
                    await pubsub.publish(Direction.TO, f"{overflow}:1", event, payload_of(source))
            await asyncio.sleep(0.002)

    async with asyncio.TaskGroup() as tasks:
        for seed in range(len(served)):
            tasks.create_task(publish(seed))
        try:
            yield
        finally:
            ended.set()


async def progress(readers: list[Reader], count: int = 20) -> None:
    goals = [reader.count + count for reader in readers]
    async with asyncio.timeout(60 * PATIENCE):
        while any(reader.count < goal for reader, goal in zip(readers, goals, strict=True)):  # noqa: ASYNC110 - other tasks'
            await asyncio.sleep(0.01)


def slow_plugin() -> Plugin:
    plugin, source = Plugin("slow"), random.Random(1)

    @plugin.on_event("*")
    async def wait(event: Event) -> Event:
        if source.random() < 0.05:
            await asyncio.sleep(source.random() / 50)
        return event

    return plugin


@pytest.mark.parametrize("is_flushed", [False, True])
async def test_positions_are_given_in_order_to_clients_of_all_kinds(
    serve_relay: ServeRelay, server: Valkey, direct: bool, is_flushed: bool
) -> None:
    """Clients and links are cut again and again, and all histories are lost at times."""
    own = {"http": "relay.server:RelayHTTPProtocol"} if direct else {}
    served = [
        await serve_relay(
            server={"send_buffer": 16_384, **own},
            redis_url=server.url,
            redis=FAST,
            limits=LIMITS,
            topics=[
                {"match": f"{overflow}:*", "overflow": overflow, "history": {"size": 60 if is_flushed else 100_000}}
                for overflow in Overflow
            ],
            extra_plugins=(slow_plugin(),),
        )
        for _ in range(2)
    ]
    urls = [each.ws for each in served]
    readers: list[Reader] = []
    for overflow in Overflow:
        loses, topic = overflow in (Overflow.LATEST, Overflow.DROP_OLDEST), f"{overflow}:1"
        readers += [SocketReader(urls, topic, seed, loses) for seed in range(4)]
        readers.append(SocketReader(urls, topic, 2, loses, version="1.0.0"))
        readers.append(SocketReader(urls, topic, 2, loses, deflates=True))
        readers.append(StreamReader(urls, [topic], 2, loses))
    readers.append(StreamReader(urls, [f"{overflow}:1" for overflow in Overflow], 1, True))
    source = random.Random(2)
    async with running(readers), publishing(served), Redis(port=server.port) as redis:
        execute: Any = redis.execute_command
        await progress(readers)
        for _ in range(15):
            for reader in source.sample(readers, len(readers) // 4):
                reader.cut()
            if source.random() < 0.3:
                await execute("CLIENT", "KILL", "TYPE", source.choice(["normal", "pubsub"]))
            if is_flushed and source.random() < 0.3:
                await execute("FLUSHALL")
            await progress(readers, 5)
    assert [error for reader in readers for error in reader.errors] == []
    recovered = sum(reader.recovered for reader in readers)
    assert recovered >= (20 if is_flushed else 60)
    assert sum(reader.skipped_first for reader in readers) <= 3 + recovered // 20
    if not is_flushed:
        assert sum(reader.lost.total() for reader in readers) <= len(readers) + 10, "each the first time"
