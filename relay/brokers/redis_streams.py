"""Histories in Redis Streams: one stream for each topic, under the name of its channel.

Owns how rows are read; must not know subscriptions. What appends to a stream is `publish.lua`, sent by the publisher.

A connection of its own, made when it is needed: a page of large rows would hold up pushes on the publisher's.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any

import hiredis

from relay.brokers.base import Event, Opened, Summary
from relay.brokers.redis_connection import Connections, LinkLost, RedisConnection, packed, words
from relay.brokers.redis_scripts import CHECK, OPEN, Script
from relay.config import Config, HistoryConfig
from relay.errors import BusUnavailable, NotRecovered


class RedisHistory:
    """Reads the streams; see `HistoryStore`.

    Args: connections: where to connect; the caller closes it.
    """

    def __init__(self, connections: Connections, config: Config) -> None:
        self._connections = connections
        self._prefix = config.redis.topic_prefix
        self._timeout_s = config.redis.timeout_s
        self._connecting = asyncio.Lock()
        self._connection: RedisConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._unanswered: deque[asyncio.Future[Any]] = deque()

    async def open(self, topic: str, since: str, settings: HistoryConfig, max_events: int, max_bytes: int) -> Opened:
        """Say whether all events behind ``since`` are there."""
        fault, newest, now_ms = await self._run(OPEN, topic, since, max_events, max_bytes, settings.ttl_s)
        return Opened(newest.decode(), now_ms, NotRecovered(fault.decode()) if fault else None)

    async def read(self, topic: str, since: str, count: int) -> list[Event] | None:
        """Up to ``count`` rows, the one at ``since`` first; None where that is gone."""
        rows = await self._ask("XRANGE", self._key(topic), since, "+", "COUNT", count)
        if not rows or rows[0][0] != since.encode():
            # The newest position may be that of no row, where the stream has lost them all.
            return None
        return [_event(topic, row) for row in rows]

    async def last(self, topic: str, count: int, before: str | None = None) -> list[Event]:
        """Up to ``count`` newest rows, oldest first, of those older than ``before``."""
        end = "+" if before is None else f"({before}"
        rows = await self._ask("XREVRANGE", self._key(topic), end, "-", "COUNT", count)
        return [_event(topic, row) for row in reversed(rows)]

    async def check(self, topic: str, heard: str, settings: HistoryConfig) -> None:
        """Publish the newest position as a notice."""
        _ = await self._run(CHECK, topic, heard, settings.ttl_s)

    async def describe(self, topic: str) -> Summary:
        """Say what is there."""
        key = self._key(topic)
        count, first, last, size = await asyncio.gather(
            self._ask("XLEN", key),
            self._ask("XRANGE", key, "-", "+", "COUNT", 2),
            self._ask("XREVRANGE", key, "+", "-", "COUNT", 1),
            self._ask("MEMORY", "USAGE", key),
        )
        if first and not _event(topic, first[0]).event:  # the birth of the history
            first, count = first[1:], count - 1
        if not first:
            return Summary(0, None, None, int(size or 0))
        return Summary(count, first[0][0].decode(), last[0][0].decode(), int(size or 0))

    async def write(self, commands: Iterable[tuple[str, ...]]) -> None:
        """Carry out commands that only have to succeed. Raises BusUnavailable."""
        for command in commands:
            await self._ask(*command)

    def reconnect(self) -> None:
        """Give the connection up: its server is no longer what it was."""
        if self._connection is not None:
            self._connection.abort()

    async def close(self) -> None:
        """End the connection."""
        if self._reader is not None:
            self._reader.cancel()
            _ = await asyncio.gather(self._reader, return_exceptions=True)

    def _key(self, topic: str) -> str:
        return self._prefix + topic

    # Its connection.

    async def _run(self, script: Script, topic: str, *args: object) -> Any:
        try:
            return await self._ask("EVALSHA", script.sha, 1, self._key(topic), *args)
        except _NoScript:
            return await self._ask("EVAL", script.text, 1, self._key(topic), *args)

    async def _ask(self, *command: object) -> Any:
        """Send a command and wait for its reply. Raises BusUnavailable."""
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = self._connection or await self._connect()
                reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                self._unanswered.append(reply)
                connection.write(packed([tuple(_argument(part) for part in command)]))
                answer = await reply
        except LinkLost as lost:
            raise BusUnavailable(str(lost)) from lost
        except TimeoutError:
            self.reconnect()
            raise BusUnavailable(f"no reply to {command[0]} within {self._timeout_s:g} s") from None
        if isinstance(answer, hiredis.ReplyError):
            text = words(answer)
            if text.startswith("NOSCRIPT"):
                raise _NoScript(text)
            raise BusUnavailable(f"{command[0]} {command[3 if str(command[0]).startswith('EVAL') else 1]}: {text}")
        return answer

    async def _connect(self) -> RedisConnection:
        async with self._connecting:
            if self._connection is None:
                connection = await self._connections.open()
                self._unanswered = deque()
                self._connection = connection
                self._reader = asyncio.create_task(self._read(connection, self._unanswered), name="relay-redis-history")
            return self._connection

    async def _read(self, connection: RedisConnection, unanswered: deque[asyncio.Future[Any]]) -> None:
        fault: Exception = LinkLost("the relay is stopping")
        try:
            while True:
                reply = await connection.reply()
                future = unanswered.popleft()
                if not future.done():
                    future.set_result(reply)
        except (LinkLost, hiredis.HiredisError) as error:
            fault = error if isinstance(error, LinkLost) else LinkLost(words(error))
        except IndexError:
            fault = LinkLost("an unasked reply came")
        finally:
            if self._connection is connection:
                self._connection = None
            for future in unanswered:
                if not future.done():
                    future.set_exception(fault)
            await connection.close()


class _NoScript(BusUnavailable):
    """Redis does not know the script."""


def _argument(part: object) -> bytes:
    return str(part).encode()


def _event(topic: str, row: Any) -> Event:
    """Make an event of a row: ``[id, [name, value, …]]``."""
    position, flat = row
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    sender = fields.get(b"s")
    event = fields.get(b"e", b"")
    return Event(
        topic,
        event.decode(errors="replace"),
        fields.get(b"d", b"") if event else fields.get(b"m", b""),
        position.decode(),
        None if sender is None else sender.decode(errors="replace"),
    )
