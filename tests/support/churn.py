"""Clients that join and leave in topic mode, and at the end exactly their topics are subscribed to in Redis."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from redis.asyncio import Redis
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.support.client import Client

TOPICS = 2000
CLIENTS = 60
TURNS_PER_S = 20.0
LIFE_S = 10.0
"""How long a client lives, on average."""
HEARTBEAT_S = 10.0
SETTLE_S = 60.0
"""Within which all joins are answered, all gaps reported, and topics that linger unsubscribed."""
ENVIRON = {
    "RELAY_REDIS__PUBLISH_FORM": "topic",
    "RELAY_REDIS__SUBSCRIBE": "topic",
    "RELAY_REDIS__LINGER_S": "1",
    "RELAY_LIMITS__JOINS_PER_S": "0",
}
"""Of the relay."""

_GONE = (ConnectionClosed, InvalidHandshake, OSError, EOFError, TimeoutError)


class Churner:
    """One client after another that joins and leaves at random; the last of them stays.

    Args: url: the relay's socket.
          done: what happened, by name.
    """

    def __init__(self, url: str, done: Counter[str]) -> None:
        self._url = url
        self._done = done
        self.joined: dict[str, str] = {}
        """Topics with their join_ref, as far as the relay has said."""
        self.pending: dict[str, str] = {}
        """The same of joins that are not answered yet."""
        self.ticks: Counter[str] = Counter()
        """Events of the client that stays, by topic."""

    async def run(self, end: float, released: asyncio.Event) -> None:
        """Churn until ``end``, then hold what is joined until it is released."""
        while time.monotonic() < end:
            with suppress(*_GONE):
                async with self._connected() as client:
                    await self._live(client, min(end, time.monotonic() + random.expovariate(1 / LIFE_S)))
                self._done["clients"] += 1
        async with self._connected() as client:
            await self._live(client, end + 1)
            while not released.is_set():
                await client.send(None, client.next_ref(), "phoenix", "heartbeat", {})
                with suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S):
                        await released.wait()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Client]:
        async with Client.connect(self._url) as client:
            self.joined.clear()
            self.pending.clear()
            self.ticks.clear()
            reading = asyncio.create_task(self._read(client))
            try:
                yield client
                if random.random() < 0.3:  # without a word
                    client.connection.transport.abort()
            finally:
                reading.cancel()
                _ = await asyncio.gather(reading, return_exceptions=True)

    async def _live(self, client: Client, end: float) -> None:
        while time.monotonic() < end:
            topic, ref = f"room:{random.randrange(TOPICS)}", str(client.next_ref())
            if (join_ref := self.joined.pop(topic, None)) is not None or (self.joined and random.random() < 0.4):
                if join_ref is None:
                    topic, join_ref = self.joined.popitem()
                await client.send(join_ref, ref, topic, "phx_leave", {})
                self._done["leaves"] += 1
            else:
                self.pending[topic] = ref
                await client.send(ref, ref, topic, "phx_join", {})
                self._done["joins"] += 1
            await asyncio.sleep(random.expovariate(TURNS_PER_S))

    async def _read(self, client: Client) -> None:
        while True:
            join_ref, ref, topic, event, payload = json.loads(await client.connection.recv())
            if event == "phx_reply" and self.pending.get(topic) == ref:
                del self.pending[topic]
                if payload["status"] == "ok":
                    self.joined[topic] = ref
                else:
                    self._done["refused"] += 1
            elif event in ("phx_error", "phx_close") and self.joined.get(topic) == join_ref:
                del self.joined[topic]
                self._done["notified of a gap"] += event == "phx_error"
            elif event == "tick":
                self.ticks[topic] += 1


async def churn(url: str, redis_url: str, end: float, done: Counter[str]) -> list[str]:
    """Churn until ``end``; returns what is wrong with what is subscribed to then.

    Args: url: the socket of a relay with `ENVIRON`, the only one on its Redis.
          done: filled with what happened.
    """
    released = asyncio.Event()
    churners = [Churner(url, done) for _ in range(CLIENTS)]
    async with asyncio.TaskGroup() as group:
        for churner in churners:
            group.create_task(churner.run(end, released))
        await asyncio.sleep(max(0.0, end + 1 - time.monotonic()))
        try:
            async with Redis.from_url(redis_url, decode_responses=True) as redis:
                return await _compare(redis, churners, done)
        finally:
            released.set()


async def _compare(redis: Redis, churners: list[Churner], done: Counter[str]) -> list[str]:
    def expected() -> set[str]:
        return {f"topic:{topic}" for churner in churners for topic in churner.joined}

    async def subscribed() -> set[str]:
        return set(map(str, await redis.pubsub_channels("topic:*")))

    deadline = time.monotonic() + SETTLE_S
    while any(churner.pending for churner in churners) or await subscribed() != expected():
        if time.monotonic() > deadline:
            return _differences(await subscribed(), expected(), sum(len(churner.pending) for churner in churners))
        await asyncio.sleep(0.1)
    done["topics at the end"] = len(expected())
    for name in expected():
        await redis.publish(name, b"tick:1")
    while deaf := sum(churner.ticks != Counter(dict.fromkeys(churner.joined, 1)) for churner in churners):
        if time.monotonic() > deadline:
            return [f"{deaf} clients did not receive one event of each topic"]
        await asyncio.sleep(0.1)
    return [] if expected() else ["no topic is joined"]


def _differences(subscribed: set[str], expected: set[str], pending: int) -> list[str]:
    return [
        f"{count} {what}"
        for count, what in (
            (pending, "joins without an answer"),
            (len(expected - subscribed), f"joined topics are not subscribed to: {sorted(expected - subscribed)[:5]}"),
            (
                len(subscribed - expected),
                f"topics are subscribed to and not joined: {sorted(subscribed - expected)[:5]}",
            ),
        )
        if count
    ]
