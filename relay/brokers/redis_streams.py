"""Histories in Redis Streams: one stream for each topic, under the name of its channel.

Owns how rows are read; must not know subscriptions. What appends to a stream is `publish.lua`, sent by the publisher.

A connection of its own, made when it is needed: a page of large rows would hold up pushes on the publisher's.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from relay.brokers.base import Event, Opened, Summary
from relay.brokers.redis_commands import RedisCommands
from relay.brokers.redis_connection import Connections
from relay.brokers.redis_scripts import CHECK, OPEN, Script
from relay.config import Config
from relay.config_sections import HistoryConfig
from relay.errors import NotRecovered

_ATTEMPTS = 5
"""How often a history is read whose connection ends: a join must not lose its position to a cut connection."""


class RedisHistory:
    """Reads the streams; see `HistoryStore`.

    Args: connections: where to connect; the caller closes it.
    """

    check_script: Script = CHECK

    def __init__(self, connections: Connections, config: Config) -> None:
        self._prefix = config.redis.topic_prefix
        self._commands = RedisCommands(
            connections, config.redis.timeout_s, "relay-redis-history", _ATTEMPTS, config.redis.ping_interval_s
        )

    async def open(self, topic: str, since: str, settings: HistoryConfig, max_events: int, max_bytes: int) -> Opened:
        """Say whether all events behind ``since`` are there."""
        fault, newest, now_ms = await self._commands.run(
            OPEN, (self._key(topic),), since, max_events, max_bytes, settings.ttl_s
        )
        return Opened(newest.decode(), now_ms, NotRecovered(fault.decode()) if fault else None)

    async def read(self, topic: str, since: str, count: int) -> list[Event] | None:
        """Up to ``count`` rows, the one at ``since`` first; None where that is gone."""
        rows = await self._commands.ask("XRANGE", self._key(topic), since, "+", "COUNT", count)
        if not rows or rows[0][0] != since.encode():
            # The newest position may be that of no row, where the stream has lost them all.
            return None
        return [_event(topic, row) for row in rows]

    async def last(self, topic: str, count: int, before: str | None = None) -> list[Event]:
        """Up to ``count`` newest rows, oldest first, of those older than ``before``."""
        end = "+" if before is None else f"({before}"
        rows = await self._commands.ask("XREVRANGE", self._key(topic), end, "-", "COUNT", count)
        return [_event(topic, row) for row in reversed(rows)]

    async def check(self, topic: str, heard: str, settings: HistoryConfig) -> None:
        """Publish the newest position as a notice."""
        _ = await self._commands.run(self.check_script, (self._key(topic),), heard, settings.ttl_s)

    async def describe(self, topic: str) -> Summary:
        """Say what is there."""
        key = self._key(topic)
        count, first, last, size = await asyncio.gather(
            self._commands.ask("XLEN", key),
            self._commands.ask("XRANGE", key, "-", "+", "COUNT", 2),
            self._commands.ask("XREVRANGE", key, "+", "-", "COUNT", 1),
            self._commands.ask("MEMORY", "USAGE", key),
        )
        if first and not _event(topic, first[0]).event:  # the birth of the history
            first, count = first[1:], count - 1
        if not first:
            return Summary(0, None, None, int(size or 0))
        return Summary(count, first[0][0].decode(), last[0][0].decode(), int(size or 0))

    async def write(self, commands: Iterable[tuple[str, ...]]) -> None:
        """Carry out commands that only have to succeed. Raises BusUnavailable."""
        for command in commands:
            await self._commands.ask(*command)

    def reconnect(self) -> None:
        """Give the connection up: its server is no longer what it was."""
        self._commands.reconnect()

    async def close(self) -> None:
        """End the connection."""
        await self._commands.close()

    def _key(self, topic: str) -> str:
        return self._prefix + topic


_FOREIGN = b"\0"
"""In the place of an event's name, in a row of another program that has none: no event may be named so."""


def _event(topic: str, row: Any) -> Event:
    """Make an event of a row: ``[id, [name, value, …]]``."""
    position, flat = row
    fields = dict(zip(flat[::2], flat[1::2], strict=True))
    sender = fields.get(b"s")
    event = fields.get(b"e", b"")
    if not event and b"m" not in fields and b"b" not in fields:
        event = _FOREIGN
    return Event(
        topic,
        event.decode(errors="replace"),
        fields.get(b"d", b"") if event else fields.get(b"m", b""),
        position.decode(),
        None if sender is None else sender.decode(errors="replace"),
    )
