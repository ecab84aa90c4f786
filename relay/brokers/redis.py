"""Redis Pub/Sub behind the `Broker` interface: one pattern subscription, read in batches, and a publisher.

Owns the two connections to Redis and their supervision; must not know topics' subscribers or sockets.

The subscription's bytes go through ``hiredis.Reader`` directly, 1.2 µs an event; redis-py's own listener takes 20 µs,
and at 40 000 events/s Redis cut it off for its output buffer. Publishing writes each command at once and matches the
replies in order, a third of the cost of redis-py's pipeline. redis-py makes both connections: URL, TLS, Sentinel.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import hiredis
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from relay.brokers import address
from relay.brokers.base import Direction, Event, Link, Sink
from relay.config import Config, RedisConfig
from relay.errors import BusUnavailable
from relay.metrics import Metrics
from relay.topics import from_redis_channel, glob_escape, to_redis_channel

_logger = logging.getLogger("relay.redis")

_READ_BYTES = 256 * 1024
"""Most bytes taken from the socket at a time: some 1 000 events of 220 bytes."""


class RedisBroker:
    """Supervised link to one Redis or Valkey server.

    Args: config: ``redis_url`` and the ``redis`` table are used.
          metrics: counts gaps and events without a usable name.
          patterns: Redis patterns to hear besides, for `Sink.receive_message`.
          clock: for tests.
    """

    needs_subscribe = False

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        patterns: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patterns = tuple(dict.fromkeys(patterns))
        self._redis = config.redis
        self._metrics = metrics
        self._clock = clock
        self._pool, self._sentinels = _make_pool(config)
        self._publisher = _Publisher(self._pool, config.redis, clock)
        self._address = address.shown(config.redis_url)
        self._link = Link(False, "not started")
        self._listener: asyncio.Task[None] | None = None
        # When the reader began to wait for bytes; None while it is busy with what it has.
        self._waiting_since: float | None = None
        # When the subscription was last pinged, while the answer is still to come.
        self._pinged_at: float | None = None
        self._fault = ""

    @property
    def link(self) -> Link:
        """Whether ``PSUBSCRIBE`` is confirmed and its connection answers."""
        return self._link

    async def start(self, sink: Sink) -> None:
        """Start to listen; returns once the first attempt has succeeded or failed."""
        settled = asyncio.Event()
        self._listener = asyncio.create_task(self._supervise(sink, settled.set), name="relay-redis-listener")
        await settled.wait()

    async def stop(self) -> None:
        """Close both connections; messages not yet taken fail."""
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener
        await self._publisher.stop()
        for client in self._sentinels:
            await client.aclose()
        self._link = Link(False, "stopped")

    async def subscribe(self, topic: str) -> None:
        """Nothing to do: the one pattern hears every topic."""

    async def unsubscribe(self, topic: str) -> None:
        """Nothing to do."""

    # Listening.

    async def _supervise(self, sink: Sink, settled: Callable[[], None]) -> None:
        """Keep one subscription alive, for ever; tell the sink when it has been interrupted."""
        attempt = 0
        lost_at: float | None = None

        def on_live() -> None:
            nonlocal attempt, lost_at
            attempt = 0
            self._link = Link(True, "")
            _logger.info("subscribed to %s* on %s", self._redis.to_prefix, self._address)
            if lost_at is not None:
                away_s = self._clock() - lost_at
                self._metrics.gaps += 1
                _logger.warning("gap: events of the last %.1f s may have been missed", away_s)
                sink.receive_gap(self._fault)
                lost_at = None
            settled()

        while True:
            try:
                await self._listen(sink, on_live)
            except (RedisError, OSError, hiredis.HiredisError) as error:
                self._fault = self._fault or str(error) or type(error).__name__
            except Exception as error:  # a fault of our own must not leave the relay deaf
                self._fault = f"internal error: {type(error).__name__}"
                _logger.exception("the Redis listener failed")
            was_live = self._link.live
            if was_live:
                lost_at = self._clock()
            self._link = Link(False, f"no subscription to {self._address}: {self._fault}")
            settled()
            # Full jitter (a fleet of relays must not return in step), never quite zero.
            limit_s = min(self._redis.backoff_max_s, self._redis.backoff_min_s * 2**attempt)
            delay_s = self._redis.backoff_min_s / 2 + random.uniform(0, limit_s)
            if was_live or attempt == 0 or attempt % 10 == 0:
                _logger.warning("Redis link to %s is down: %s; trying again", self._address, self._fault)
            attempt = min(attempt + 1, 1000)
            await asyncio.sleep(delay_s)

    async def _listen(self, sink: Sink, on_live: Callable[[], None]) -> None:
        """Connect, subscribe, and hand events over until the connection ends, which raises."""
        self._fault = ""
        connection = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        await connection.connect()
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(self._watch(connection))
                try:
                    await self._read(connection, sink, on_live)
                finally:
                    watcher.cancel()
        except ExceptionGroup as errors:  # not `except*`, in which Python before 3.11.4 makes a group of what is raised
            known, unknown = errors.split((RedisError, OSError, hiredis.HiredisError))
            raise errors if known is None or unknown is not None else known.exceptions[0] from None
        finally:
            self._waiting_since = None
            await connection.disconnect(nowait=True)

    async def _read(self, connection: AbstractConnection, sink: Sink, on_live: Callable[[], None]) -> None:
        reader, writer = _streams(connection)
        prefix = self._redis.to_prefix.encode()
        parser = hiredis.Reader()
        pattern = (glob_escape(self._redis.to_prefix) + "*").encode()
        control = glob_escape(self._redis.control_channel).encode()
        # One command for all, so that live means all of them.
        patterns = (pattern, *((control,) if control else ()), *self._patterns)
        unconfirmed = len(patterns)
        raw = {raw.encode() for raw in self._patterns}  # Redis tells of one pattern once, whoever asked for it
        writer.write(hiredis.pack_command(("PSUBSCRIBE", *patterns)))
        while True:
            self._waiting_since = self._clock()
            data = await reader.read(_READ_BYTES)
            self._waiting_since = None
            if not data:
                raise ConnectionError("the connection was closed by Redis")
            parser.feed(data)
            events: list[Event] = []
            while (reply := parser.gets()) is not False:
                if isinstance(reply, hiredis.ReplyError):
                    raise ConnectionError(str(reply))
                # ["pmessage", pattern, channel, payload], ["psubscribe", pattern, 1] or ["pong", ""]
                if reply[0] == b"pmessage" and reply[1] == pattern:
                    names = from_redis_channel(prefix, reply[2])
                    if names is None:
                        self._metrics.dropped["channel names no event"] += 1
                    else:
                        events.append((*names, reply[3]))
                elif reply[0] == b"pmessage" and reply[1] == control:
                    sink.receive_control(reply[3])
                if reply[0] == b"pmessage" and reply[1] in raw:
                    sink.receive_message(reply[1].decode(), reply[2].decode(errors="replace"), reply[3])
                elif reply[0] == b"pong" and self._pinged_at is not None:
                    self._metrics.link_lag_s = self._clock() - self._pinged_at
                    self._pinged_at = None
                elif reply[0] == b"psubscribe":
                    unconfirmed -= 1
                    if not unconfirmed:
                        on_live()
            if events:
                await sink.receive_events(events)

    async def _watch(self, connection: AbstractConnection) -> None:
        """Ping the connection, and abort it when nothing comes back: a dead peer sends no FIN.

        A busy connection is pinged too: how long the answer takes is the lag of the events beside it.
        """
        _, writer = _streams(connection)
        self._pinged_at = None
        while True:
            await asyncio.sleep(self._redis.ping_interval_s / 2)
            looked_at = self._clock()
            if self._pinged_at is None:
                writer.write(hiredis.pack_command(("PING",)))
                self._pinged_at = looked_at
            await asyncio.sleep(self._redis.ping_timeout_s)
            since = self._waiting_since  # None: busy with what has come, so alive
            if since is not None and since <= looked_at:
                self._fault = f"no answer to PING within {self._redis.ping_timeout_s:g} s"
                writer.transport.abort()
                return
            if self._pinged_at is not None:  # the answer is still behind the events
                self._metrics.link_lag_s = self._clock() - self._pinged_at

    # Publishing.

    def publish(self, direction: Direction, topic: str, event: str, payload: bytes) -> asyncio.Future[None]:
        """``PUBLISH <prefix><topic>:<event> <payload>``; calls made in one turn of the loop share a round trip."""
        prefix = self._redis.to_prefix if direction is Direction.TO else self._redis.from_prefix
        return self._publisher.publish(to_redis_channel(prefix, topic, event), payload)

    def publish_control(self, data: bytes) -> asyncio.Future[None]:
        """``PUBLISH <control channel> <data>``; without such a channel it is done at once, and reaches nobody else."""
        if self._redis.control_channel:
            return self._publisher.publish(self._redis.control_channel.encode(), data)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future


class _Publisher:
    """Publishes on a connection of its own, made when it is first needed and again after a fault.

    Each command is written at once, replies come in the order of the commands. Nothing is ever sent twice: what had no
    reply when the connection broke has failed.
    """

    def __init__(self, pool: ConnectionPool, settings: RedisConfig, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._settings = settings
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        # Commands that wait for the connection; futures of all without a reply, with time and bytes; and those in all.
        self._unsent: list[bytes] = []
        self._unanswered: deque[tuple[asyncio.Future[None], float, int]] = deque()
        self._bytes = 0

    def publish(self, redis_channel: bytes, payload: bytes) -> asyncio.Future[None]:
        """Publish one message; see `Broker.publish`."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        most, size = self._settings, len(redis_channel) + len(payload)
        if len(self._unanswered) >= most.publish_queue_max or self._bytes + size > most.publish_queue_max_bytes:
            future.set_exception(BusUnavailable("too many messages are waiting for Redis"))
            return future
        self._unanswered.append((future, self._clock(), size))
        self._bytes += size
        command = hiredis.pack_command((b"PUBLISH", redis_channel, payload))  # type: ignore[arg-type]  # its stub forgets tuple[bytes, ...]
        if self._writer is not None:
            self._writer.write(command)
            return future
        self._unsent.append(command)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="relay-redis-publisher")
        return future

    async def stop(self) -> None:
        """Close the connection; what has no reply yet fails."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        """Connect, send what waits, and match replies until the connection ends."""
        fault = "the relay is stopping"
        connection = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        watcher: asyncio.Task[None] | None = None
        try:
            await connection.connect()
            reader, self._writer = _streams(connection)
            self._writer.writelines(self._unsent)
            self._unsent.clear()
            watcher = asyncio.create_task(self._watch(self._writer))
            await self._match_replies(reader)
        except (RedisError, OSError, hiredis.HiredisError) as error:
            fault = str(error) or type(error).__name__
        finally:
            if watcher is not None:
                watcher.cancel()
            self._writer = self._task = None
            self._unsent.clear()
            failed, self._unanswered, self._bytes = self._unanswered, deque(), 0
            for future, *_ in failed:
                if not future.done():
                    future.set_exception(BusUnavailable(fault))
            await connection.disconnect(nowait=True)

    async def _match_replies(self, reader: asyncio.StreamReader) -> None:
        parser = hiredis.Reader()
        while data := await reader.read(_READ_BYTES):
            parser.feed(data)
            while (reply := parser.gets()) is not False:
                future, _, size = self._unanswered.popleft()
                self._bytes -= size
                if future.done():
                    continue  # its caller has given up
                if isinstance(reply, hiredis.ReplyError):
                    future.set_exception(BusUnavailable(str(reply)))  # of this message alone: NOPERM, OOM
                else:
                    future.set_result(None)
        raise ConnectionError("the connection was closed by Redis")

    async def _watch(self, writer: asyncio.StreamWriter) -> None:
        """Abort a connection whose oldest command has had no reply for too long."""
        while True:
            await asyncio.sleep(self._settings.timeout_s / 4)
            if self._unanswered and self._clock() - self._unanswered[0][1] > self._settings.timeout_s:
                writer.transport.abort()
                return


def _streams(connection: AbstractConnection) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Take a connection over from redis-py, which has just made it.

    The streams are private in redis-py. To use them is safe: the handshake is over and nothing is in flight.
    Should they move, the tests fail.
    """
    reader, writer = connection._reader, connection._writer
    assert reader is not None and writer is not None, "connect() has returned"
    return reader, writer


def _make_pool(config: Config) -> tuple[ConnectionPool, list[Redis]]:
    """Make what connections come from, and the clients of Sentinels behind it, which are to be closed.

    A connection to a master that Sentinels know asks them for its address each time it is made.
    """
    settings: dict[str, Any] = {
        "protocol": 2,
        "socket_keepalive": True,
        "socket_connect_timeout": config.redis.timeout_s,
        "socket_timeout": config.redis.timeout_s,
        # A retried PUBLISH could be delivered twice; a retried connect is our supervisor's business.
        "retry": Retry(NoBackoff(), 0),
    }
    found = address.parse_sentinel(config.redis_url)
    if found is None:
        return ConnectionPool.from_url(config.redis_url, **settings), []
    options: dict[str, Any] = dict(parse_url(found.master_url))
    for name in ("host", "port"):
        options.pop(name, None)
    tls = {"ssl": True} if options.pop("connection_class", None) is not None else {}
    theirs = settings | tls | {name: value for name, value in options.items() if name.startswith("ssl_")}
    theirs |= {"username": found.username, "password": found.password}
    sentinel = Sentinel(found.hosts, sentinel_kwargs=theirs)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    pool: ConnectionPool = SentinelConnectionPool(found.service, sentinel, **(settings | tls | options))  # type: ignore[no-untyped-call]
    return pool, sentinel.sentinels


@asynccontextmanager
async def publishing(config: Config) -> AsyncIterator[Callable[[Sequence[tuple[str, str, bytes]]], Awaitable[int]]]:
    """Publish events towards browsers for the duration of the block, from a program that does nothing else.

    Yields: a function of topics, events and payloads, which publishes them in order. It returns how many
            subscriptions took the last: the relays that listen. It raises BusUnavailable where Redis took them not.
    """
    pool, sentinels = _make_pool(config)
    try:
        async with Redis.from_pool(pool) as client:

            async def publish(events: Sequence[tuple[str, str, bytes]]) -> int:
                pipeline = client.pipeline(transaction=False)
                for topic, event, payload in events:
                    _ = pipeline.publish(to_redis_channel(config.redis.to_prefix, topic, event), payload)
                try:
                    replies = await pipeline.execute()
                except (RedisError, OSError) as error:
                    raise BusUnavailable(str(error)) from error
                task = asyncio.current_task()
                # Under Python 3.11 redis-py's `wait_for` loses a cancellation at times.
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError
                return int(replies[-1])

            yield publish
    finally:
        for sentinel in sentinels:
            await sentinel.aclose()
