"""Numbered events under a fault: who published them, who got them, and whether any was lost without a word.

The invariant of every fault: what a client gets is in order, nothing comes twice, and where numbers are missing it has
been told, at that very place, that events may have been missed.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tests.support.client import Client
from tests.support.patience import PATIENCE

PACE_S = 0.003


class Ticker:
    """Publishes ``tick`` with 0, 1, 2 … to one topic, whatever happens to Redis; no number is tried twice.

    Args: url: of Redis; may be changed.
          form: "to" for ``to:<topic>:tick``, "topic" for the topic's own channel.
    """

    def __init__(self, url: str, topic: str, form: str = "to") -> None:
        self.url = url
        self.topic = topic
        self.form = form
        self.taken: list[int] = []
        """Numbers that Redis has confirmed, and handed to at least one subscriber."""
        self.pace_s = PACE_S
        self._ended = False

    @classmethod
    @asynccontextmanager
    async def run(cls, url: str, topic: str, form: str = "to") -> AsyncIterator["Ticker"]:
        self = cls(url, topic, form)
        task = asyncio.create_task(self._publish())
        try:
            yield self
        finally:
            self._ended = True  # redis-py's time limits may swallow a cancellation
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _publish(self) -> None:
        numbers = itertools.count()
        while not self._ended:
            retry: Retry = Retry(NoBackoff(), 0)
            with suppress(RedisError, OSError):
                async with Redis.from_url(self.url, retry=retry, socket_timeout=2) as redis:
                    for number in numbers:
                        if self._ended:
                            return
                        payload = b"%d" % number
                        by_topic = self.form == "topic"
                        channel = f"topic:{self.topic}" if by_topic else f"to:{self.topic}:tick"
                        if await redis.publish(channel, b"tick:" + payload if by_topic else payload):
                            self.taken.append(number)
                        await asyncio.sleep(self.pace_s)
            await asyncio.sleep(PACE_S)


class Witness:
    """A client that joins one topic, again and again as it is told, and remembers what it got."""

    def __init__(self, client: Client, topic: str) -> None:
        self.client = client
        self.topic = topic
        self.numbers: list[int] = []
        self.told: list[int] = []
        """How many numbers it had each time it was told that some may be missing."""
        self.joins = 0
        self._refs = itertools.count(1)

    @classmethod
    @asynccontextmanager
    async def run(cls, client: Client, topic: str) -> AsyncIterator["Witness"]:
        self = cls(client, topic)
        task = asyncio.create_task(self._listen())
        try:
            await self.until(lambda: self.joins)
            yield self
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _listen(self) -> None:
        await self._join()
        while True:
            _, _, topic, event, payload = await self.client.receive()
            if topic != self.topic:
                continue
            if event == "tick":
                self.numbers.append(payload)
            elif event == "phx_error":
                self.told.append(len(self.numbers))
                await self._join()
            elif payload["status"] == "ok":
                self.joins += 1
            else:
                await asyncio.sleep(0.05)
                await self._join()

    async def _join(self) -> None:
        ref = str(next(self._refs))
        await self.client.send(ref, ref, self.topic, "phx_join", {})

    async def until(self, condition: object, deadline_s: float = 20.0) -> None:
        """Wait until ``condition()``."""
        assert callable(condition)
        async with asyncio.timeout(deadline_s * PATIENCE):
            while not condition():  # noqa: ASYNC110 - what is waited for is another process's
                await asyncio.sleep(0.01)

    async def progress(self, count: int = 50) -> None:
        """Wait until that many more numbers have come."""
        goal = len(self.numbers) + count
        await self.until(lambda: len(self.numbers) >= goal)

    def check(self, ticker: Ticker) -> int:
        """Hold the witness to the invariant; return how many of the events that Redis took it never got."""
        numbers = self.numbers
        assert numbers == sorted(set(numbers)), "out of order, or twice"
        missing, lost = set(ticker.taken) - set(numbers), 0
        for position in range(1, len(numbers)):
            hole = missing.intersection(range(numbers[position - 1] + 1, numbers[position]))
            assert not hole or position in self.told, f"{sorted(hole)[:5]} lost without a word"
            lost += len(hole)
        return lost
