"""Any ``broadcaster.BroadcastBackend`` behind the `Broker` interface: memory, Postgres, Kafka.

Owns the bus channels and the supervision the backends lack; must not know who subscribes.

One bus channel per topic and direction, the event inside an envelope (`relay.brokers.envelope`).

A backend does not report that it no longer receives (asyncpg's listener waits without a limit on a dead
connection), so
the adapter publishes a probe to a channel of its own and expects to hear it.
"""

import asyncio
import logging
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import blake2b
from urllib.parse import urlsplit

from broadcaster import Broadcast, BroadcastBackend

from relay.brokers.base import Event, Link, Place, PresenceStore, Sink
from relay.brokers.envelope import pack, unpack
from relay.brokers.memory_history import MemoryHistory
from relay.brokers.memory_presence import MemoryPresence
from relay.concurrency import ends_task
from relay.config import Config
from relay.config_sections import Direction, HistoryConfig
from relay.errors import BusUnavailable
from relay.metrics import Metrics, ShardTopics

_logger = logging.getLogger("relay.broadcaster")


def bus_channel(prefix: str, topic: str, *, kafka: bool = False) -> str:
    """Name the bus channel of a topic: ``<prefix><topic>``, or a digest where the bus would not take that.

    Postgres cuts names at 63 bytes (NAMEDATALEN - 1); Kafka takes 249 of ``[a-zA-Z0-9._-]``.
    """
    name = prefix + topic
    if kafka:
        name = name.replace(":", ".")
        # A topic with dots of its own could be taken for another: only plain ones keep their name.
        usable = "." not in topic and bool(re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", name))
    else:
        usable = len(name.encode()) <= 63
    if usable:
        return name
    digest = blake2b(f"{prefix}\0{topic}".encode(), digest_size=16).hexdigest()
    return f"relay.{digest}"


class BroadcasterBroker:
    """Supervised link over a broadcaster backend.

    Args: config: ``broadcast_url`` and the ``redis`` table's prefixes, intervals and time limits are used.
          backend: instead of what ``broadcast_url`` names: a function that makes one, called for each connection.
    """

    needs_subscribe = True

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        backend: Callable[[], BroadcastBackend] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = config.redis
        self._metrics = metrics
        self._clock = clock
        # `Broadcast` itself is not used: its queues have no bound. Choosing the backend by URL is all it does here.
        self._make: Callable[[], BroadcastBackend] = backend or (lambda: Broadcast(config.broadcast_url)._backend)
        self._scheme = urlsplit(config.broadcast_url).scheme
        self._probe_channel = f"relay.probe.{uuid.uuid4().hex}"
        self._probe_heard = 0.0
        control = config.redis.control_channel
        self._control_channel = bus_channel("", control, kafka=self._scheme == "kafka") if control else ""
        self._backend: BroadcastBackend | None = None
        self._wanted: set[str] = set()
        self._link = Link(False, "not started")
        self._supervisor: asyncio.Task[None] | None = None
        self._outgoing: asyncio.Queue[tuple[str, str, asyncio.Future[None]]] = asyncio.Queue(
            config.redis.publish_queue_max
        )
        self._outgoing_bytes = 0
        self._under_way: asyncio.Future[None] | None = None
        # A backend may have one connection for all, which takes one command at a time (asyncpg refuses a second). Each
        # backend gets a lock of its own: a command that hangs on a lost connection must not hold up the next one.
        self._one_at_a_time = asyncio.Lock()
        self._config = config
        self.history: MemoryHistory | None = MemoryHistory(self._notify) if config.has_history else None
        self._presence = MemoryPresence(config.presence.lease_s) if config.has_presence else None

    @property
    def link(self) -> Link:
        """Whether the backend is connected and its probes come back."""
        return self._link

    @property
    def nodes(self) -> None:
        """No channels of single nodes: not every backend can say whether a node listens."""

    @property
    def presence(self) -> PresenceStore | None:
        """Keeps the members of topics, of this one process; None where no topic has presence."""
        return self._presence

    @property
    def degraded(self) -> str:
        """Empty: all works, or nothing."""
        return ""

    @property
    def shard_topics(self) -> dict[str, ShardTopics]:
        """Empty: this is no cluster."""
        return {}

    @property
    def refusal(self) -> str:
        """Empty: one connection hears and publishes."""
        return ""

    async def start(self, sink: Sink) -> None:
        """Connect; returns once the first attempt has succeeded or failed."""
        settled = asyncio.Event()
        self._supervisor = asyncio.create_task(self._supervise(sink, settled.set), name="relay-broadcaster")
        await settled.wait()

    async def stop(self) -> None:
        """Disconnect; messages not yet taken fail."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        self._link = Link(False, "stopped")
        self._fail_outgoing("the relay is stopping")

    async def subscribe(self, topic: str) -> None:
        """Hear the bus channel of ``topic``. Raises BusUnavailable where the backend does not take it in time."""
        channel = self._channel(Direction.TO, topic)
        if self._backend is None:
            raise BusUnavailable(self._link.reason)
        self._wanted.add(channel)
        try:
            await self._in_turn(self._backend.subscribe, channel)
        except Exception as error:  # each backend has exceptions of its own
            self._wanted.discard(channel)
            raise BusUnavailable(str(error) or type(error).__name__) from error

    def hears(self, topic: str) -> bool:
        """True: all topics are subscribed to again before the link counts as live."""
        return True

    async def unsubscribe(self, topic: str) -> None:
        """Stop hearing the bus channel of ``topic``."""
        channel = self._channel(Direction.TO, topic)
        self._wanted.discard(channel)
        # broadcaster's Kafka backend would unsubscribe from everything; there, strangers are filtered by the node.
        if self._backend is not None and self._scheme != "kafka":
            try:
                await self._in_turn(self._backend.unsubscribe, channel)
            except Exception as error:  # as above; hearing more than is wanted does no harm
                _logger.warning("unsubscribe from %r failed: %s", channel, error)

    def publish(
        self, direction: Direction, topic: str, event: str, payload: bytes, sender: str | None = None
    ) -> asyncio.Future[None]:
        """Publish an envelope on the topic's bus channel."""
        settings = self._config.topic(topic).history if self.history is not None else None
        if settings is not None and direction is Direction.TO:
            return self._append(topic, event, payload, settings, sender)
        return self._put(self._channel(direction, topic), pack(topic, event, payload, sender))

    def _append(
        self, topic: str, event: str, payload: bytes, settings: HistoryConfig, sender: str | None
    ) -> asyncio.Future[None]:
        assert self.history is not None, "the topic has one"
        if (refusal := self._refuse(len(payload))) is not None:
            return refusal
        row = self.history.append(topic, event, payload, settings, sender)
        self._metrics.history_appended += 1
        self._metrics.history_trimmed += Place.of(str(row.position)).n > settings.size
        # It is kept by now, so it must not be refused any more.
        return self._enqueue(self._channel(Direction.TO, topic), pack(topic, event, payload, sender, row.position))

    def _notify(self, row: Event) -> None:
        future = self._put(
            self._channel(Direction.TO, row.topic), pack(row.topic, row.event, row.payload, None, row.position)
        )
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # the next notice makes up for it

    def publish_control(self, data: bytes) -> asyncio.Future[None]:
        """Publish on the control channel; without one it is done at once, and reaches no other node."""
        if self._control_channel:
            return self._put(self._control_channel, data.decode())
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_result(None)
        return future

    def _put(self, channel: str, text: str) -> asyncio.Future[None]:
        refusal = self._refuse(len(text.encode()))
        return self._enqueue(channel, text) if refusal is None else refusal

    def _enqueue(self, channel: str, text: str) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outgoing.put_nowait((channel, text, future))
        self._outgoing_bytes += len(text.encode())
        return future

    def _refuse(self, size: int) -> asyncio.Future[None] | None:
        """A future that has failed, where a message of so many bytes cannot wait for the bus."""
        fault = ""
        if not self._link.live:  # it would wait for as long as the bus is away
            fault = self._link.reason
        elif self._outgoing.full() or self._outgoing_bytes + size > self._redis.publish_queue_max_bytes:
            fault = "too many messages are waiting for the bus"
        if not fault:
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_exception(BusUnavailable(fault))
        return future

    def _channel(self, direction: Direction, topic: str) -> str:
        prefix = self._redis.prefix(direction)
        return bus_channel(prefix, topic, kafka=self._scheme == "kafka")

    # Supervision.

    async def _supervise(self, sink: Sink, settled: Callable[[], None]) -> None:
        attempt = 0
        lost_at: float | None = None
        while True:
            fault = ""
            try:
                backend = await self._connect()
                self._backend, self._one_at_a_time = backend, asyncio.Lock()
                self._link = Link(True, "")
                attempt = 0
                _logger.info("connected to the %s bus", self._scheme or type(backend).__name__)
                if lost_at is not None:
                    self._metrics.gaps += 1
                    _logger.warning("gap: events of the last %.1f s may have been missed", self._clock() - lost_at)
                    sink.on_gap("the bus was away")
                    lost_at = None
                settled()
                await self._serve(backend, sink)
            except BaseException as error:  # each backend has exceptions of its own; all mean the same here
                if ends_task(error):
                    raise
                errors = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)
                fault = str(errors[0]) or type(errors[0]).__name__
            finally:
                lost_at = self._clock() if self._link.live else lost_at
                self._link = Link(False, f"no connection to the bus: {fault}")
                self._fail_outgoing(self._link.reason if fault else "the relay is stopping")
                lost, self._backend = self._backend, None
                if lost is not None:
                    await self._disconnect(lost)
            settled()
            _logger.warning("bus link is down: %s; trying again", fault)
            limit_s = min(self._redis.backoff_max_s, self._redis.backoff_min_s * 2**attempt)
            attempt = min(attempt + 1, 1000)
            await asyncio.sleep(self._redis.backoff_min_s / 2 + random.uniform(0, limit_s))

    async def _connect(self) -> BroadcastBackend:
        """Connect, and subscribe to all that is wanted; the time limit is that of each step: there may be thousands."""
        backend, own = self._make(), {self._probe_channel, self._control_channel}
        async with asyncio.timeout(self._redis.timeout_s):
            await backend.connect()
        try:
            for channel in filter(None, (*own, *sorted(self._wanted))):
                if channel in own or channel in self._wanted:  # still
                    async with asyncio.timeout(self._redis.timeout_s):
                        await backend.subscribe(channel)
        except BaseException:
            await self._disconnect(backend)
            raise
        return backend

    async def _disconnect(self, backend: BroadcastBackend) -> None:
        with suppress(Exception):  # it is broken already, or the relay is stopping
            async with asyncio.timeout(self._redis.timeout_s):
                await backend.disconnect()

    async def _serve(self, backend: BroadcastBackend, sink: Sink) -> None:
        """Listen, publish and probe until one of the three fails."""
        self._probe_heard = self._clock()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(backend, sink))
            group.create_task(self._publish_outgoing(backend))
            group.create_task(self._probe(backend))

    async def _listen(self, backend: BroadcastBackend, sink: Sink) -> None:
        while True:
            received = await backend.next_published()
            if received.channel == self._probe_channel:
                self._probe_heard = self._clock()
                continue
            if received.channel == self._control_channel:
                sink.receive_control(received.message.encode())
                continue
            try:
                event = unpack(received.message)
            except ValueError:
                self._metrics.dropped["no envelope"] += 1
                continue
            await sink.receive_events((event,))

    async def _publish_outgoing(self, backend: BroadcastBackend) -> None:
        while True:
            channel, text, future = await self._outgoing.get()
            self._outgoing_bytes -= len(text.encode())
            self._under_way = future
            try:
                await self._in_turn(backend.publish, channel, text)
            except Exception as error:  # as above
                if not future.done():
                    future.set_exception(BusUnavailable(str(error) or type(error).__name__))
                if isinstance(error, TimeoutError):
                    raise
                # The message may be at fault (Postgres takes less than 8 000 bytes), or the bus: a probe tells.
                await self._send_probe(backend)
            if not future.done():
                future.set_result(None)

    def _fail_outgoing(self, reason: str) -> None:
        if self._under_way is not None and not self._under_way.done():
            self._under_way.set_exception(BusUnavailable(reason))
        self._outgoing_bytes = 0
        while not self._outgoing.empty():
            *_, future = self._outgoing.get_nowait()
            if not future.done():
                future.set_exception(BusUnavailable(reason))

    async def _probe(self, backend: BroadcastBackend) -> None:
        while True:
            await asyncio.sleep(self._redis.ping_interval_s)
            sent_at = self._clock()
            await self._send_probe(backend)
            await asyncio.sleep(self._redis.ping_timeout_s)
            if self._probe_heard < sent_at:
                raise ConnectionError(f"a probe was not heard within {self._redis.ping_timeout_s:g} s")

    async def _send_probe(self, backend: BroadcastBackend) -> None:
        await self._in_turn(backend.publish, self._probe_channel, "{}")

    async def _in_turn(self, command: Callable[..., Awaitable[None]], *arguments: str) -> None:
        """Have the backend do one thing after the other; the time limit is that of each."""
        async with self._one_at_a_time, asyncio.timeout(self._redis.timeout_s):
            await command(*arguments)
