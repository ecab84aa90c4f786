"""Redis behind the `Broker` interface: one subscription, one publisher, and the streams of histories.

Owns these and the supervision of the subscription; must not know topics' subscribers or sockets.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from relay import redis_url
from relay.brokers import redis_topics
from relay.brokers.base import NODE_CHANNEL, HistoryStore, Link, NodeBus, PresenceStore, Sink
from relay.brokers.redis_channels import TopicChannels
from relay.brokers.redis_connection import (
    Connections,
    LinkLost,
    RedisConnection,
    Role,
)
from relay.brokers.redis_marker import Markers
from relay.brokers.redis_presence import RedisPresence
from relay.brokers.redis_publisher import Publisher
from relay.brokers.redis_session import Session
from relay.brokers.redis_settings import LOOK_EVERY_S, RENEW_EVERY_S, Preparation, history_args
from relay.brokers.redis_streams import RedisHistory
from relay.concurrency import ends_task
from relay.config import Config
from relay.config_redis import RedisConfig
from relay.config_sections import Direction
from relay.errors import BusUnavailable
from relay.log import RateLimitedLogger
from relay.metrics import Metrics, ShardTopics
from relay.protocol.topics import glob_escape, to_redis_channel

_logger = logging.getLogger("relay.redis")


class RedisBroker:
    """Supervised link to one Redis or Valkey server.

    Args: config: ``redis_url`` and the ``redis`` table are used.
          metrics: counts gaps and events without a usable name.
          patterns: Redis patterns to hear besides, for `Sink.receive_message`.
          log: for messages that are dropped.
          clock: for tests.
    """

    # What a node of a cluster has others of.
    _channels_type: type[TopicChannels] = TopicChannels
    _publisher_type: type[Publisher] = Publisher
    _session_type: type[Session] = Session
    _history_type: type[RedisHistory] = RedisHistory

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        patterns: Sequence[str] = (),
        log: RateLimitedLogger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.patterns: tuple[str, ...] = tuple(dict.fromkeys(patterns))
        self.settings: RedisConfig = config.redis
        self.metrics: Metrics = metrics
        self.clock: Callable[[], float] = clock
        self.connections: Connections = Connections(redis_url.parse(config.redis_url), config.redis.timeout_s, clock)
        self.address: str = redis_url.shown(config.redis_url)
        self.markers: Markers = Markers(config.redis)
        self.publisher: Publisher = self._publisher_type(self.connections, config.redis, self.markers, self, clock)
        self._config = config
        self._log = log or RateLimitedLogger(_logger)
        topic_mode = config.redis.subscribe == "topic"
        self.needs_subscribe: bool = topic_mode
        self.channels: TopicChannels | None = self._channels_type(config.redis, clock) if topic_mode else None
        if self.channels is not None:
            self.channels.subscribe_time = metrics.subscribe_time[self.node]
            self.channels.resubscribe_time = metrics.resubscribe_time[self.node]
        self.topics_pattern: bytes = b""
        if config.uses_topic_channels and not topic_mode:
            self.topics_pattern = f"{glob_escape(config.redis.topic_prefix)}*".encode()
        # None where no topic has a history; and what prepares a server for them.
        self._streams = self._history_type(self.connections, config) if config.has_history else None
        self._preparation = Preparation(config) if config.has_history or config.redis.publish_form == "topic" else None
        self._presence = RedisPresence(self.connections, config) if config.has_presence else None
        self.hears_topics: bool = True
        self._link = Link(False, "not started")
        self._listener: asyncio.Task[None] | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._session: Session | None = None
        # Whether hearing has to be proved by a probe before the next subscription counts as live.
        self.is_doubted: bool = False
        # What the Redis user may not do, each logged once.
        self._denied: set[str] = set()

    @property
    def node(self) -> str:
        """What metrics call it."""
        return ""

    @property
    def link(self) -> Link:
        """Whether ``PSUBSCRIBE`` is confirmed and its connection answers."""
        return self._link

    @property
    def history(self) -> HistoryStore | None:
        """Reads the streams; None where no topic has a history, or none may be heard."""
        return self._streams if self.hears_topics else None

    @property
    def presence(self) -> PresenceStore | None:
        """Keeps the members of topics for other nodes; None where no topic has presence."""
        return self._presence

    @property
    def nodes(self) -> NodeBus:
        """Publishes on the channels of single nodes."""
        return self

    @property
    def degraded(self) -> str:
        """What does not work while the rest does; empty if all does."""
        if self.channels is not None and self.channels.missed and self._link.live:
            return f"subscribing again to {self.channels.missed} topics after a gap"
        if self.hears_topics:
            return ""
        means = "no history" if self._config.has_history else "events that are published there are not received"
        return f"no permission to hear {self.settings.topic_prefix}*, so {means}"

    @property
    def shard_topics(self) -> dict[str, ShardTopics]:
        """Empty: this is no cluster."""
        return {}

    @property
    def refusal(self) -> str:
        """Why nothing can be published: on a replica, or without a connection to publish on."""
        return self.publisher.refusal

    async def start(self, sink: Sink) -> None:
        """Start to listen; returns once the first attempt has succeeded or failed."""
        settled = asyncio.Event()
        self.publisher.start()
        if self.channels is not None:
            self.channels.count_subscribers = sink.count_subscribers
        self._listener = asyncio.create_task(self._supervise(sink, settled.set), name="relay-redis-listener")
        self._listener.add_done_callback(self._listener_ended)
        self._listener.add_done_callback(lambda _: settled.set())
        if self._preparation is not None:
            preparing = self._keep_prepared(self._preparation)
            self._preparing = asyncio.create_task(preparing, name="relay-redis-settings")
        await settled.wait()

    async def stop(self) -> None:
        """Close both connections; messages not yet taken fail."""
        await self.publisher.stop()
        for task in (self._listener, self._preparing):
            if task is not None:
                task.cancel()
                _ = await asyncio.wait((task,))
        for commands in (self._streams, self._presence):
            if commands is not None:
                await commands.close()
        await self.connections.close()
        self._link = Link(False, "stopped")
        if self.channels is not None:
            self.channels.close()

    async def subscribe(self, topic: str) -> None:
        """Subscribe to the topic's channel; nothing to do where one pattern hears all. Raises BusUnavailable."""
        if self.channels is not None:
            await self.channels.subscribe(topic)

    async def unsubscribe(self, topic: str) -> None:
        """Unsubscribe from it after ``redis.linger_s``."""
        if self.channels is not None:
            self.channels.unsubscribe(topic)

    def hears(self, topic: str) -> bool:
        """Whether events of a topic are heard now, as far as that depends on `subscribe`."""
        return self.channels is None or self.channels.hears(topic)

    # Listening.

    async def _supervise(self, sink: Sink, settled: Callable[[], None]) -> None:
        """Keep one subscription alive until cancelled; tell the sink when it has been interrupted."""
        attempt = 0
        lost_at: float | None = None

        def on_live() -> None:
            nonlocal attempt, lost_at
            attempt = 0
            self.is_doubted = False
            self._link = Link(True, "")
            self.publisher.wake()
            what = f"{self.settings.to_prefix}*" if self.channels is None else "channels of joined topics"
            _logger.info("subscribed to %s on %s", what, self.address)
            if lost_at is not None:
                away_s = self.clock() - lost_at
                self.metrics.gaps += 1
                _logger.warning("gap: events of the last %.1f s may have been missed", away_s)
                self._report_gap(sink, fault)
                lost_at = None
            settled()

        fault = ""
        while True:
            fault = await self._listen(sink, on_live)
            was_live = self._link.live
            if was_live:
                lost_at = self.clock()
            self._link = Link(False, f"{fault} (no subscription to {self.address})")
            settled()
            # Full jitter (a fleet of relays must not return in step), never quite zero.
            limit_s = min(self.settings.backoff_max_s, self.settings.backoff_min_s * 2**attempt)
            delay_s = self.settings.backoff_min_s / 2 + random.uniform(0, limit_s)
            if was_live or attempt == 0 or attempt % 10 == 0:
                _logger.warning("Redis link to %s is down: %s; trying again", self.address, fault)
            attempt = attempt + 1 if attempt < 1000 else 991
            await asyncio.sleep(delay_s)

    def _listener_ended(self, listener: asyncio.Task[None]) -> None:
        """Where that is not by `stop`, no event is heard any more: see that the relay does not count as ready."""
        if not listener.cancelling():
            error = None if listener.cancelled() else listener.exception()
            _logger.critical("Redis listener has ended; restart relay", exc_info=error)
            self._link = Link(False, f"internal error: {type(error).__name__}")

    def _report_gap(self, sink: Sink, fault: str) -> None:
        # Where topics are subscribed to one by one, each has its gap once it is heard again.
        sink.on_gap(fault, None if self.channels is None else ())

    async def _listen(self, sink: Sink, on_live: Callable[[], None]) -> str:
        """Connect, subscribe, and hand events over until the connection ends. Returns why it has."""
        try:
            connection = await self.connections.open()
        except LinkLost as lost:
            return str(lost)
        self._session = session = self._session_type(self, connection, sink, on_live)
        fault = "the relay is stopping"
        try:
            fault = await session.run()
        except BaseException as error:  # a fault of our own must not leave the relay deaf
            if ends_task(error):
                raise
            _logger.exception("Redis listener failed")
            fault = f"internal error: {type(error).__name__}"
        finally:
            self._session = None
            if self.channels is not None:
                self.channels.detach(fault)
            await connection.close()
        return fault

    def role_changed(self, role: Role) -> None:
        """Learn from the publisher that its server is no longer what it was: what it sends on may not reach us."""
        for commands in (self._streams, self._presence):
            if commands is not None:
                commands.reconnect()
        # A session that saw the same role when it subscribed goes on.
        if self._session is not None and self._session.role != role:
            self._session.end(f"the server has become {role}")

    def appended(self, position: bytes, size: int) -> None:
        """Count an event that was appended to a history."""
        self.metrics.history_appended += 1
        self.metrics.history_trimmed += int(position.rpartition(b"-")[2]) > size

    async def prepare(self, connection: RedisConnection) -> bool:
        """Prepare the server for programs that publish; say whether it knows the script. Raises LinkLost."""
        return self._preparation is not None and await self._preparation.prepare(connection.ask)

    async def _keep_prepared(self, preparation: Preparation) -> None:
        """Prepare the server again and again: it may lose all, and ``relay:settings`` expires with the last relay."""
        renew_at = self.clock() + RENEW_EVERY_S
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not self._link.live or not self.publisher.is_at_master:
                continue
            with suppress(BusUnavailable):  # its connection has ended: the next one is prepared
                if self.clock() >= renew_at or await preparation.is_due(self.publisher.ask):
                    _ = await preparation.prepare(self.publisher.ask)
                    renew_at = self.clock() + RENEW_EVERY_S

    def report_denied(self, what: str, means: str, allow: str) -> None:
        """Log, once each, what the Redis user may not do, what that means, and what allows it."""
        if what not in self._denied:
            self._denied.add(what)
            _logger.warning("no permission for %s on %s: %s; allow it with %s", what, self.address, means, allow)

    def report_nameless(self, topic: str) -> None:
        """Count a message on the channel of a topic that names no event, and say so now and then."""
        self.metrics.dropped["message names no event"] += 1
        text = (
            "message on %r dropped: expected <event>:<payload>, such as new_msg:{…}; the name of the event is missing"
        )
        self._log.warning("message names no event", text, f"{self.settings.topic_prefix}{topic}")

    # Publishing.

    def publish(
        self, direction: Direction, topic: str, event: str, payload: bytes, sender: str | None = None
    ) -> asyncio.Future[None]:
        """``PUBLISH <prefix><topic>:<event> <payload>``; calls made in one turn of the loop share a round trip.

        With ``publish_form = "topic"`` an event goes out as ``PUBLISH <topic_prefix><topic> <event>:<payload>``. One of
        a topic with a history is appended to that too, by the script.
        """
        if self._streams is not None and direction is Direction.TO:
            history = self._config.topic(topic).history
            if history is not None:
                args = history_args(event, payload, history, sender, self._config.limits.payload_max_bytes)
                return self.publisher.append(f"{self.settings.topic_prefix}{topic}".encode(), args)
        if direction in (Direction.TO, Direction.LIVE) and self.settings.publish_form == "topic":
            channel = f"{self.settings.topic_prefix}{topic}".encode()
            return self.publisher.publish(channel, redis_topics.pack(event, payload, sender))
        prefix = self.settings.prefix(direction)
        return self.publisher.publish(to_redis_channel(prefix, topic, event), payload, sender)

    def publish_to_node(self, node: str, data: bytes) -> asyncio.Future[int]:
        """``PUBLISH relay:node:<node> <data>``."""
        return self.publisher.publish_counted(f"{NODE_CHANNEL}{node}".encode(), data)

    def publish_control(self, data: bytes) -> asyncio.Future[None]:
        """``PUBLISH <control channel> <data>``; without such a channel it is done at once, for no other node."""
        if self.settings.control_channel:
            return self.publisher.publish(self.settings.control_channel.encode(), data)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future
