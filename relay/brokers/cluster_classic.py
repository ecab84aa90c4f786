"""Events that programs publish to a Redis Cluster by ``PUBLISH``, where ``SPUBLISH`` is expected.

Owns one subscription by pattern, on any node; must not know the sharded subscriptions.

The nodes pass on to each other what is published by ``PUBLISH``, so one connection receives all of it. relay publishes
no event in this way, so none comes twice. That a program does is a mistake which Redis does not report: the event is
delivered, counted and warned about. No gap is reported for such events.
"""

import asyncio
import logging
import random
from typing import Protocol

import hiredis

from relay.brokers import redis_topics
from relay.brokers.base import Event, Sink
from relay.brokers.cluster_map import Endpoint
from relay.brokers.cluster_shard import Shard
from relay.brokers.redis_connection import LinkLost, RedisConnection, is_denied, packed
from relay.concurrency import ends_task
from relay.config import Config
from relay.log import RateLimitedLogger
from relay.metrics import Metrics
from relay.protocol.topics import glob_escape

_logger = logging.getLogger("relay.redis")


class ClassicOwner(Protocol):
    """The cluster, as this subscription knows it."""

    config: Config
    metrics: Metrics
    log: RateLimitedLogger
    shards: dict[Endpoint, Shard]

    def hears(self, topic: str) -> bool:
        """Whether events of a topic are heard now."""


class ClassicSubscription:
    """Receives what is published by ``PUBLISH`` on the channels of topics, while some node can be reached."""

    def __init__(self, cluster: ClassicOwner, sink: Sink) -> None:
        self._cluster = cluster
        self._sink = sink
        self._settings = settings = cluster.config.redis
        self._pattern = f"{glob_escape(settings.topic_prefix)}*"
        self._topic_at = len(settings.topic_prefix.encode())

    async def run(self) -> None:
        """Listen until cancelled, or until Redis does not permit it."""
        settings, may_listen = self._settings, True
        while may_listen:
            live = [shard for shard in self._cluster.shards.values() if shard.link.live]
            if live:
                try:
                    may_listen = await self._listen(random.choice(live))
                except (LinkLost, TimeoutError, hiredis.HiredisError) as error:
                    _logger.debug("subscription to %s ended: %s", self._pattern, error)
                except BaseException as error:  # a fault of our own must not end the listening
                    if ends_task(error):
                        raise
                    _logger.exception("subscription to %s failed", self._pattern)
            await asyncio.sleep(random.uniform(settings.backoff_min_s, settings.backoff_max_s))

    async def _listen(self, shard: Shard) -> bool:
        """Listen on one node until the connection ends; False where Redis does not permit it."""
        connection = await shard.connections.open()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                reply = await connection.ask("PSUBSCRIBE", self._pattern)
            if is_denied(reply):
                means = "events that are published by PUBLISH instead of SPUBLISH are not received"
                shard.report_denied(f"PSUBSCRIBE {self._pattern}", means, f"+psubscribe &{self._pattern}")
                return False
            if isinstance(reply, hiredis.ReplyError):
                return True
            while True:
                await self._read(connection)
                if events := self._events(shard, connection):
                    await self._sink.receive_events(events)
        finally:
            await connection.close()

    async def _read(self, connection: RedisConnection) -> None:
        """Wait for bytes, and ask for a sign of life where none come. Raises LinkLost and TimeoutError."""
        try:
            async with asyncio.timeout(self._settings.ping_interval_s):
                await connection.read()
        except TimeoutError:
            connection.write(packed([("PING",)]))
            async with asyncio.timeout(self._settings.ping_timeout_s):
                await connection.read()

    def _events(self, shard: Shard, connection: RedisConnection) -> list[Event]:
        """What has come of topics that are heard."""
        found: list[Event] = []
        while (reply := connection.replies.gets()) is not False:
            if not isinstance(reply, list) or reply[0] != b"pmessage":
                continue
            topic = reply[2][self._topic_at :].decode(errors="replace")
            if not self._cluster.hears(topic):
                continue
            self._warn(topic)
            if (event := redis_topics.unpack(topic, reply[3])) is None:
                shard.report_nameless(topic)
            else:
                self._cluster.metrics.events_by_publish += 1
                found.append(event)
        return found

    def _warn(self, topic: str) -> None:
        name = f"{self._settings.topic_prefix}{topic}"
        text = "event on %r was published by PUBLISH, which all nodes of the cluster receive: use SPUBLISH"
        self._cluster.log.warning("published by PUBLISH", text, name)
