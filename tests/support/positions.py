"""Clients of each kind on topics with histories, which read slowly and come back, and what their positions must be.

Of a subscription that was recovered the first event is the one behind the client's position. Where no event may be
dropped each is the one behind the one before it; where some may be, none is older. There the first may be a later one
too, if nothing was missed: live events that wait behind the reply to the join are dropped as others are.
"""

import asyncio
import itertools
import json
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import parse_qsl

import websockets

from relay.brokers.base import Place
from tests.support.client import Client
from tests.support.sse import Stream


class Subscription:
    """The positions of one subscription, as a client is given them.

    Args: loses: whether events may be dropped, because the client reads slowly.
    """

    def __init__(self, topic: str, response: dict[str, Any], since: str | None, loses: bool) -> None:
        self.errors: list[str] = []
        self.is_recovered = response.get("recovered") is True
        position = response["_position"]
        if self.is_recovered and position != since:
            self.errors.append(f"{topic}: recovered from {since}, and the reply says {position}")
        self._topic = topic
        self._loses = loses
        self._place = None if position is None else Place.of(position)
        self._is_first = True
        self.skips_first = False
        """Whether it was recovered, and began with a later event than the next."""

    def take(self, position: str, what: str) -> None:
        """Take the position of the next event."""
        place, before = Place.of(position), self._place
        if before is not None and place != before:
            if place.n <= before.n or (place.n != before.n + 1 and not self._loses):
                self.errors.append(f"{self._topic}: {what} at {place} came after {before}")
            self.skips_first = self._is_first and self.is_recovered and place.n != before.n + 1
        self._is_first = False
        self._place = place


class Reader:
    """A client that comes back after each cut."""

    def __init__(self, urls: Sequence[str], topics: Sequence[str], seed: int, loses: bool) -> None:
        self.urls = urls
        self.topics = topics
        self.loses = loses
        self.random = random.Random(seed)
        self.pause = (0.0, 0.05, 0.3, 0.5)[seed % 4]
        """How often it stops for a moment."""
        self.count = self.recovered = self.skipped_first = 0
        self.lost: Counter[str] = Counter()
        self.errors: list[str] = []

    async def run(self) -> None:
        """Read until cancelled."""
        while True:
            with suppress(websockets.WebSocketException, OSError, EOFError, AssertionError, TimeoutError):
                await self.read(self.random.choice(self.urls))
            await asyncio.sleep(0.02)

    @abstractmethod
    async def read(self, url: str) -> None:
        """Read one connection to its end."""

    @abstractmethod
    def cut(self) -> None:
        """Cut the connection, wherever it stands."""

    def begin(self, topic: str, response: dict[str, Any], since: str | None) -> Subscription:
        """Begin a subscription."""
        subscription = Subscription(topic, response, since, self.loses)
        if subscription.is_recovered:
            self.recovered += 1
        else:
            self.lost[response.get("reason", "asked for nothing")] += 1
        self.errors += subscription.errors
        return subscription

    async def take(self, subscription: Subscription, position: str, what: str) -> None:
        """Take an event, and stop for a moment now and then."""
        subscription.errors.clear()
        subscription.take(position, what)
        self.errors += subscription.errors
        self.skipped_first += subscription.skips_first
        subscription.skips_first = False
        self.count += 1
        if self.random.random() < self.pause:
            await asyncio.sleep(self.random.random() / 50)


class SocketReader(Reader):
    """A WebSocket with one topic."""

    def __init__(
        self, urls: Sequence[str], topic: str, seed: int, loses: bool, version: str = "2.0.0", deflates: bool = False
    ) -> None:
        super().__init__(urls, [topic], seed, loses)
        self._version = version
        self._deflates = deflates
        self._since: str | None = None
        self._client: Client | None = None

    def cut(self) -> None:
        if self._client is not None:
            self._client.connection.transport.abort()

    async def read(self, url: str) -> None:
        compression = "deflate" if self._deflates else None
        address = f"{url}/websocket?vsn={self._version}"
        async with websockets.connect(address, compression=compression, max_size=None, max_queue=2) as connection:
            self._client = Client(connection, self._version)
            try:
                await self._serve(self._client)
            finally:
                connection.transport.abort()  # to close it in good order may wait, and be cancelled half way

    async def _serve(self, client: Client) -> None:
        (topic,) = self.topics
        refs = itertools.count(1)
        ref: str = ""
        subscription: Subscription | None = None

        async def join() -> None:
            nonlocal ref
            ref = str(next(refs))
            await client.send(ref, ref, topic, "phx_join", {"since": self._since})

        await join()
        while True:
            frame = await client.receive_raw()
            if isinstance(frame, bytes):
                continue  # its position follows
            message = json.loads(frame)
            if isinstance(message, dict):
                message = [None, message["ref"], message["topic"], message["event"], message["payload"]]
            _, of, _, event, payload = message
            if event == "phx_error" or (event == "phx_reply" and payload["status"] == "error"):
                await asyncio.sleep(0.05)
                await join()
            elif event == "phx_reply" and of == ref:
                subscription = self.begin(topic, payload["response"], self._since)
                self._since = payload["response"]["_position"]
            elif isinstance(payload, dict) and payload.get("_position") and subscription is not None:
                self._since = payload["_position"]
                await self.take(subscription, payload["_position"], event)


class StreamReader(Reader):
    """A stream of server-sent events with one topic or several."""

    def __init__(self, urls: Sequence[str], topics: Sequence[str], seed: int, loses: bool) -> None:
        super().__init__(urls, topics, seed, loses)
        self._last_id = ""
        self._stream: Stream | None = None

    def cut(self) -> None:
        if self._stream is not None:
            self._stream.writer.transport.abort()

    def _positions(self, id: str) -> dict[str, str]:
        if not id:
            return {}
        return dict(parse_qsl(id)) if len(self.topics) > 1 else {self.topics[0]: id}

    async def read(self, url: str) -> None:
        headers = {"Last-Event-ID": self._last_id} if self._last_id else {}
        async with Stream.open(url, *self.topics, headers=headers, receive_buffer=8192) as self._stream:
            subscriptions: dict[str, Subscription] = {}
            while True:
                event = await self._stream.receive()
                if not subscriptions and self._stream.joins:
                    since = self._positions(self._last_id)
                    for join in self._stream.joins:
                        topic = join["topic"]
                        subscriptions[topic] = self.begin(topic, join["response"], since.get(topic))
                if not event.event.startswith("relay:") and event.id != self._last_id:
                    before = self._positions(self._last_id)
                    for topic, position in self._positions(event.id).items():
                        if before.get(topic) != position:
                            await self.take(subscriptions[topic], position, event.event)
                self._last_id = event.id or self._last_id


@asynccontextmanager
async def running(readers: Sequence[Reader]) -> AsyncIterator[None]:
    """Have them read for the duration of the block."""
    tasks = [asyncio.create_task(reader.run()) for reader in readers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        _ = await asyncio.gather(*tasks, return_exceptions=True)
