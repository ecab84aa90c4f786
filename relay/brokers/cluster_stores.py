"""Histories and presence on a Redis Cluster: what is asked goes to the master that serves the slot.

Owns that, and that a question is asked again where its slot has moved; must not know what is stored.

A history is where its topic is. Presence is in one slot, that of its channel: a node's write is one transaction over
the members of several topics and the number of the write.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from relay.brokers.base import PRESENCE_CHANNEL, Event, HistoryStore, Opened, Summary
from relay.brokers.cluster_shard import Shard
from relay.brokers.redis_commands import RedisCommands
from relay.brokers.redis_connection import Connections, LinkLost, RedisConnection
from relay.brokers.redis_presence import RedisPresence
from relay.brokers.redis_scripts import SHARDED_RENEW_LEASE
from relay.config import Config
from relay.config_sections import HistoryConfig
from relay.errors import BusUnavailable

_ATTEMPTS = 5
_AGAIN_S = 0.05
"""Seconds before a question is asked a second time; before the third twice as many, and so on."""

_MOVED = ("MOVED", "ASK", "CLUSTERDOWN", "EXECABORT", "TRYAGAIN", "READONLY", "MASTERDOWN", "LOADING")
"""What a server answers that does not serve the slot, or not yet; it has carried nothing out."""

_Found = TypeVar("_Found")


class Cluster(Protocol):
    """The cluster, as its stores know it."""

    config: Config

    def shard(self, name: bytes) -> Shard:
        """The master that serves a name. Raises BusUnavailable."""


def _has_moved(error: BusUnavailable) -> bool:
    return any(f": {kind} " in str(error) for kind in _MOVED)


async def _ask(shard: Callable[[], Shard], question: Callable[[Shard], Awaitable[_Found]]) -> _Found:
    loop = asyncio.get_running_loop()
    began = loop.time()
    for attempt in range(1, _ATTEMPTS + 1):
        asked = shard()
        try:
            return await question(asked)
        except BusUnavailable as error:
            if attempt == _ATTEMPTS or not _has_moved(error) or loop.time() - began > asked.settings.timeout_s:
                raise
            asked.doubt_map()
            await asyncio.sleep(_AGAIN_S * attempt)
    raise AssertionError("the last attempt returns or raises")


class ClusterHistory:
    """Reads the streams; see `HistoryStore`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def _of(self, topic: str, question: Callable[[HistoryStore], Awaitable[_Found]]) -> _Found:
        name = f"{self._cluster.config.redis.topic_prefix}{topic}".encode()

        def asked(shard: Shard) -> Awaitable[_Found]:
            assert shard.history is not None, "some topic has a history"
            return question(shard.history)

        return await _ask(lambda: self._cluster.shard(name), asked)

    async def open(self, topic: str, since: str, settings: HistoryConfig, max_events: int, max_bytes: int) -> Opened:
        """Say whether all events behind ``since`` are there."""
        return await self._of(topic, lambda store: store.open(topic, since, settings, max_events, max_bytes))

    async def read(self, topic: str, since: str, count: int) -> list[Event] | None:
        """Up to ``count`` rows, the one at ``since`` first; None where that is gone."""
        return await self._of(topic, lambda store: store.read(topic, since, count))

    async def last(self, topic: str, count: int, before: str | None = None) -> list[Event]:
        """Up to ``count`` newest rows, oldest first, of those older than ``before``."""
        return await self._of(topic, lambda store: store.last(topic, count, before))

    async def check(self, topic: str, heard: str, settings: HistoryConfig) -> None:
        """Publish the newest position as a notice."""
        await self._of(topic, lambda store: store.check(topic, heard, settings))

    async def describe(self, topic: str) -> Summary:
        """Say what is there."""
        return await self._of(topic, lambda store: store.describe(topic))


class _OwnerConnections(Connections):
    """Makes connections to whichever master serves one slot."""

    def __init__(self, cluster: Cluster, name: bytes) -> None:
        self._cluster = cluster
        self._name = name

    async def open(self) -> RedisConnection:
        """Connect. Raises LinkLost."""
        try:
            shard = self._cluster.shard(self._name)
        except BusUnavailable as error:
            raise LinkLost(str(error)) from error
        return await shard.connections.open()


class _OwnerCommands(RedisCommands):
    """Sends commands to whichever master serves one slot."""

    def __init__(self, cluster: Cluster, name: bytes, connections: Connections) -> None:
        super().__init__(connections, cluster.config.redis.timeout_s, "relay-redis-presence")
        self._cluster = cluster
        self._slot_name = name
        self._asked: Shard | None = None

    async def ask_all(self, commands: Sequence[Sequence[object]]) -> list[Any]:
        """Send commands together and wait for all replies. Raises BusUnavailable, also for an error among them."""

        async def ask(shard: Shard) -> list[Any]:
            if shard is not self._asked:
                self._asked = shard
                self.reconnect()
            try:
                return await super(_OwnerCommands, self).ask_all(commands)
            except BusUnavailable as error:
                if _has_moved(error):
                    self.reconnect()
                raise

        return await _ask(lambda: self._cluster.shard(self._slot_name), ask)


class ClusterPresence(RedisPresence):
    """Keeps the members of one node; see `PresenceStore`."""

    prefix = f"presence:{{{PRESENCE_CHANNEL}}}"
    publish = "SPUBLISH"
    renew_script = SHARDED_RENEW_LEASE

    def __init__(self, cluster: Cluster) -> None:
        name = PRESENCE_CHANNEL.encode()
        connections = _OwnerConnections(cluster, name)
        super().__init__(connections, cluster.config, _OwnerCommands(cluster, name, connections))
