"""A client of a topic with a history, and what it may rely on: the positions that it is given.

A chain is what a client got from a join that was not recovered, over joins that were, to the next that was not. Within
a chain no event comes twice, none is missing that Redis has acknowledged, and positions follow each other by one.
"""

import asyncio
import itertools
import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import websockets

from relay.brokers.base import Place
from relay.errors import BusUnavailable
from tests.support.client import Client
from tests.support.patience import PATIENCE


class Source:
    """Publishers that number their events, and what was acknowledged of them."""

    def __init__(self) -> None:
        self.acknowledged: set[tuple[int, int]] = set()
        self._names = itertools.count()

    @asynccontextmanager
    async def run(
        self, publish: Callable[[bytes], Awaitable[None]], count: int = 3, pace_s: float = 0.002
    ) -> AsyncIterator[None]:
        """Publish from several tasks, each in order, until the block ends.

        Args: publish: raises BusUnavailable where the event was not acknowledged.
        """
        ended = asyncio.Event()
        names = [next(self._names) for _ in range(count)]

        async def work(name: int) -> None:
            for number in itertools.count():
                if ended.is_set():
                    return
                with suppress(BusUnavailable):
                    await publish(json.dumps({"p": name, "k": number}).encode())
                    self.acknowledged.add((name, number))
                await asyncio.sleep(pace_s)

        async with asyncio.TaskGroup() as tasks:
            for name in names:
                tasks.create_task(work(name))
            try:
                yield
            finally:
                ended.set()


class Follower:
    """One client that comes back after each cut, with its last position."""

    def __init__(self, urls: list[str], topic: str, seed: int) -> None:
        self.urls = urls
        self.topic = topic
        self.random = random.Random(seed)
        self.chains: list[list[tuple[int, int]]] = []
        self.recovered = 0
        self.lost: dict[str, int] = defaultdict(int)
        self.errors: list[str] = []
        self.since: str | None = None
        self.count = 0
        """Events received."""
        self._client: Client | None = None

    @classmethod
    @asynccontextmanager
    async def run(cls, urls: list[str], topic: str, count: int) -> AsyncIterator[list["Follower"]]:
        """Several of them for the duration of the block."""
        followers = [cls(urls, topic, seed) for seed in range(count)]
        tasks = [asyncio.create_task(follower._follow()) for follower in followers]
        try:
            yield followers
        finally:
            for task in tasks:
                task.cancel()
            _ = await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Cut its connection, wherever it stands."""
        if self._client is not None:
            self._client.connection.transport.abort()

    async def _follow(self) -> None:
        while True:
            with suppress(websockets.WebSocketException, OSError, TimeoutError):
                async with Client.connect(self.random.choice(self.urls)) as client:
                    self._client = client
                    await self._serve(client)
            self._client = None
            await asyncio.sleep(0.01)

    async def _serve(self, client: Client) -> None:
        """Join, and take what comes; join again after an error or a refusal."""
        refs = itertools.count(1)
        ref = ""
        place: Place | None = None

        async def join() -> None:
            nonlocal ref
            ref = str(next(refs))
            await client.send(ref, ref, self.topic, "phx_join", {"since": self.since})

        await join()
        while True:
            join_ref, _, topic, event, payload = await client.receive()
            if topic != self.topic:
                continue
            if event == "phx_error":
                await asyncio.sleep(0.01)
                await join()
            elif event == "phx_reply" and payload["status"] == "error":
                await asyncio.sleep(0.05)
                await join()
            elif event == "phx_reply":
                assert join_ref == ref
                place = self._take_reply(payload["response"])
            elif event == "tick":
                place = self._take_event(payload, place)
            elif "_position" in payload:
                self.since = payload["_position"]
                place = Place.of(payload["_position"])

    def _take_reply(self, response: dict[str, object]) -> Place | None:
        position = response["_position"]
        if response.get("recovered") is True:
            self.recovered += 1
            if position != self.since:
                self.errors.append(f"recovered from {self.since}, and the reply says {position}")
        else:
            self.lost[str(response.get("reason", "asked for nothing"))] += 1
            self.chains.append([])
        self.since = position if isinstance(position, str) else None
        return None if self.since is None else Place.of(self.since)

    def _take_event(self, payload: dict[str, object], place: Place | None) -> Place | None:
        position = payload["_position"]
        if not isinstance(position, str):
            return place
        own = Place.of(position)
        if place is not None and own.n != place.n + 1:
            self.errors.append(f"{own} came after {place}")
        self.since = position
        name, number = payload["p"], payload["k"]
        assert isinstance(name, int)
        assert isinstance(number, int)
        self.chains[-1].append((name, number))
        self.count += 1
        return own

    def check(self, source: Source) -> None:
        """No chain has an event twice, or misses one that was acknowledged."""
        assert not self.errors, self.errors[:5]
        for chain in self.chains:
            last: dict[int, int] = {}
            for name, number in chain:
                before = last.get(name)
                if before is not None:
                    assert number > before, f"({name}, {number}) came after ({name}, {before})"
                    missing = [each for each in range(before + 1, number) if (name, each) in source.acknowledged]
                    assert not missing, f"missing of {name}: {missing} between {before} and {number}"
                last[name] = number


async def progress(followers: list[Follower], count: int = 30, deadline_s: float = 30.0) -> None:
    """Wait until each has received so many events more."""
    goals = [follower.count + count for follower in followers]
    async with asyncio.timeout(deadline_s * PATIENCE):
        while any(each.count < goal for each, goal in zip(followers, goals, strict=True)):  # noqa: ASYNC110 - other processes'
            await asyncio.sleep(0.01)
