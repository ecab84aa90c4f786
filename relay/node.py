"""The parts of a started relay, bound to one event loop: made at its start, let go at its stop.

Owns their lifetime and order; `relay.app` is the public interface.
"""

import asyncio
import logging
import math
import random
import secrets
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from relay import runtime_dir
from relay.auth.api_key import ApiKeyAuth
from relay.auth.authenticator import Authenticate, Authenticator, known_user
from relay.auth.sealing import Sealer, derive
from relay.brokers.base import NODE_CHANNEL, PRESENCE_CHANNEL, Broker, Link
from relay.brokers.embedded import BESIDE_AUTH, EmbeddedValkey
from relay.channels import control
from relay.channels.channel import Services
from relay.channels.connections import Connections
from relay.channels.event_stream import EventStream
from relay.channels.history_reader import HistoryReader
from relay.channels.hub import Hub
from relay.channels.long_poll import LongPoll, Tokens
from relay.channels.long_poll_nodes import NodeSessions
from relay.channels.presence import Presence
from relay.channels.pubsub import PubSub
from relay.channels.socket import Socket
from relay.channels.tangram import TangramWire
from relay.concurrency import is_being_cancelled
from relay.config import EMBEDDED, Config
from relay.errors import ConfigError, close_reason
from relay.extras import describe, missing
from relay.log import ConnectionLog
from relay.metrics import ProcessState
from relay.plugins.dispatcher import HandlerError, HandlerRunner
from relay.plugins.hooks import Hook, to_payload
from relay.plugins.loader import PluginSet
from relay.protocol.presence import Members
from relay.protocol.topics import check_names, is_topic
from relay.siblings import Siblings
from relay.telemetry import Telemetry
from relay.threadsafe import Call
from relay.transports.network_access import NetworkAccess
from relay.transports.sse import is_server_ending

if TYPE_CHECKING:
    from relay.auth.keys import Key
    from relay.auth.tokens import TokenVerifier

_logger = logging.getLogger("relay")

_STALL_S = 0.5
"""Seconds the event loop may stand still before it is said. Heartbeats, limits and timers all wait meanwhile."""

_DRAIN_STEP_S = 0.05
"""Seconds between two portions of a drain."""

_SERVICE_BACKOFF_S = 1.0
_SERVICE_BACKOFF_MAX_S = 30.0


_WRITE_INTERVAL_S = 1.0
"""Seconds between two writes of a worker's metrics; what a worker has counted since is lost where it is killed."""


class Exporter(Protocol):
    """What writes the metrics of this process for the other workers, while it runs."""

    async def save(self) -> None:
        """Write them once more. Raises OSError."""

    def close(self) -> None:
        """Release what it writes with."""


@dataclass(frozen=True, slots=True)
class Components:
    """What a relay is made of before it starts."""

    config: Config
    telemetry: Telemetry
    plugins: PluginSet
    api_key_auth: ApiKeyAuth
    """Who may use the REST interface, the console and the metrics."""
    network_access: NetworkAccess
    keys: "tuple[Key, ...]" = ()
    """The static keys of tokens."""
    secret: bytes = b""
    """What all processes have in common; empty where they have nothing."""
    authenticate: Authenticate | None = None
    """The application's own authentication of clients."""
    without_redis: bool = False
    """Whether on_redis handlers may be there without a Redis, as in tests."""

    @property
    def authenticates(self) -> bool:
        """Whether clients are authenticated, by keys or by a function."""
        return self.config.auth.has_keys or self.authenticate is not None


class Node:
    """A running relay: one process among others on the same bus.

    Args: owner: what handlers are given as ``relay``.
          exporter: writes the metrics for the other workers.
    """

    def __init__(self, components: Components, owner: object, exporter: Exporter) -> None:
        config, telemetry, authenticate = components.config, components.telemetry, components.authenticate
        metrics, loggers, hooks = telemetry.metrics, telemetry.loggers, components.plugins.hooks
        self._tracer = telemetry.tracer
        self._loggers = loggers
        self._log = loggers.get("relay.socket")
        self._metrics = metrics
        self._exporter = exporter
        self._hooks = hooks
        self._owner = owner
        self._embedded: EmbeddedValkey | None = None
        self._announced = ExitStack()
        if config.redis_url == EMBEDDED:
            self._embedded = EmbeddedValkey()
            config = config.model_copy(update={"redis_url": self._embedded.url})
            self._announced.enter_context(runtime_dir.announce("", config.redis_url))
        self.config = config
        self.name: str = uuid.uuid4().hex[:8]
        # Where other nodes reach this one; "" where they cannot be answered.
        own_channel = f"{NODE_CHANNEL}{self.name}" if _answers_for_others(components) else ""
        self.broker: Broker = _make_broker(config, components, own_channel)
        loop = asyncio.get_running_loop()
        self.hub: Hub = Hub(
            metrics,
            lambda topic: config.topic(topic).policy,
            loop.call_soon,
            label_of=config.metrics.label,
            speedups=config.speedups,
        )
        self._runner = runner = HandlerRunner(config.plugins.timeout_s, telemetry, hooks, owner)
        self.pubsub: PubSub = PubSub(config, self.broker, self.hub, runner, telemetry)
        publish = self.pubsub.publish_control_message
        self._control = control.ControlMessages(self.name, publish, self._apply_control)
        self.pubsub.on_control = self._control.receive
        self.pubsub.after_gap.append(lambda: self.pubsub.spawn(self._control.recall()))
        self._verifier = _make_verifier(components)
        authenticator: Authenticator | None = None
        if self._verifier or authenticate or config.auth.anonymous or config.auth.authenticated:
            verify = self._verifier.verify if self._verifier else None
            authenticator = Authenticator(config, runner, verify, authenticate, self.pubsub.decisions)
        self.presence: Presence | None = None
        if self.broker.presence is not None:
            log = loggers.get("relay.presence")
            self.presence = Presence(
                config, self.broker.presence, lambda: self.broker.link.live, self.pubsub.spawn, metrics, log
            )
            self.pubsub.receivers[PRESENCE_CHANNEL] = self.presence.receive
            self.pubsub.after_gap.append(self.presence.after_gap)
        if self._embedded is not None and components.authenticates:
            _logger.warning("redis_url: %s", BESIDE_AUTH)
        self._siblings = Siblings(self._own_bus())
        tangram = TangramWire(self.pubsub.broadcast) if config.tangram.wire else None
        services = Services(
            config, self.pubsub, self.hub, metrics, ConnectionLog(loggers), authenticator, self.presence, tangram
        )
        self.connections: Connections = Connections(services, telemetry, components.network_access, self._siblings)
        secret = components.secret or secrets.token_bytes(32)
        self.long_poll: LongPoll = LongPoll(
            self.name, self.connections, telemetry, Tokens(derive(secret, "long poll tokens"))
        )
        if own_channel and self.broker.nodes is not None:
            sealer, local, spawn = Sealer(derive(secret, "messages")), self.long_poll.local, self.pubsub.spawn
            sessions = NodeSessions(self.name, self.broker.nodes, sealer, local, telemetry, spawn)
            self.long_poll.others = sessions
            self.pubsub.receivers[own_channel] = sessions.receive
            self.pubsub.after_gap.append(sessions.fail_all)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Hear the bus, then start the plugins. Raises ConfigError where one of them fails to start."""
        try:
            await self._check_metrics_dir()
            if self._verifier is not None:
                self._verifier.start()
            await self.pubsub.start()
            if self.presence is not None:
                self.presence.start()
            for hook in self._hooks.startup:
                try:
                    await self._runner.call_or_leave(hook, self._owner)
                except HandlerError as error:
                    raise ConfigError(f"plugin {hook.plugin} failed to start: its on_startup {error}") from error
        except BaseException:
            await self.stop()
            raise
        self._siblings.check()
        self._tasks.append(asyncio.create_task(self._check_idle()))
        if self.config.metrics.dir:
            self._tasks.append(asyncio.create_task(self._write_metrics_regularly()))
        self._tasks += [asyncio.create_task(self._run_service(hook)) for hook in self._hooks.services]

    def _own_bus(self) -> str:
        """The setting that makes a bus for this process alone; empty where others share it."""
        if self._embedded is not None:
            return 'redis_url = "embedded"'
        return 'broadcast_url = "memory://"' if self.config.broadcast_url.startswith("memory") else ""

    async def _check_metrics_dir(self) -> None:
        try:
            await self._exporter.save()
        except OSError as error:
            directory = self.config.metrics.dir
            raise ConfigError(f"metrics.dir: {directory} cannot be written: {error.strerror}") from None

    async def stop(self) -> None:
        """Drain, then stop the plugins, then the bus."""
        await self.connections.close()
        await self.pubsub.join_background(self.config.limits.close_timeout_s)
        for task in self._tasks:
            task.cancel()
        if self._tasks:  # a service that ignores its cancellation is left behind
            _ = await asyncio.wait(self._tasks, timeout=self.config.limits.close_timeout_s)
        for hook in self._hooks.shutdown:
            with suppress(HandlerError):  # logged and counted there
                await self._runner.call_or_leave(hook, self._owner)
        if self.presence is not None:
            await self.presence.stop()
        await self.pubsub.stop()
        if self._verifier is not None:
            await self._verifier.close()
        await self._write_metrics()
        self._exporter.close()
        self._siblings.leave()
        self._announced.close()
        self._loggers.flush(at_once=True)
        if self._embedded is not None:
            # In a thread of its own: handlers that hang may hold all those of the event loop.
            with ThreadPoolExecutor(1, "relay-embedded") as thread:
                await asyncio.get_running_loop().run_in_executor(thread, self._embedded.stop)

    def abandon(self) -> None:
        """Let go of what outlives the event loop, which has ended without `stop`."""
        self._runner.close()
        self._loggers.flush(at_once=True)
        if self._embedded is not None:
            self._embedded.stop()

    @property
    def is_draining(self) -> bool:
        """Whether the end has begun: no socket is taken any more."""
        return self.connections.is_draining

    @property
    def sockets(self) -> dict[str, Socket]:
        """The sockets of this process, by id."""
        return self.connections.sockets

    def drain(self) -> None:
        """Begin the end; see `Connections.drain`."""
        self.connections.drain()

    # What applications, plugins, REST and the console ask for.

    def publish(self, topic: str, event: str, payload: object) -> Call:
        """Send an event to all subscribers of a topic, on every node; see `relay.Relay.publish`."""
        check_names(topic, event)
        return self.pubsub.start_call(partial(self.pubsub.broadcast, topic, event, to_payload(payload)))

    def local_broadcast(self, topic: str, event: str, payload: object) -> bool:
        """Send an event to this process's own subscribers, past the bus; False where there are none."""
        check_names(topic, event)
        send = partial(self.pubsub.local_broadcast, topic, event, to_payload(payload))
        return self.pubsub.home.ask(send, self.config.redis.timeout_s)

    def subscribe(
        self, topic: str, max_events: int, overflow: str | None, since: str | None, last: int | None
    ) -> EventStream:
        """Receive a topic's events; see `relay.Relay.subscribe`. Raises ValueError."""
        return self.connections.event_streams.open(topic, max_events, overflow, since, last)

    def socket(self, socket_id: str) -> Socket | None:
        """A socket of this process by its id."""
        return self.sockets.get(socket_id)

    def disconnect(self, socket_id: str, reason: str = "") -> bool:
        """Close a socket of this process with 1001; False where there is none of this id."""
        ended = (socket for socket in self.connections.left_behind.values() if socket.id == socket_id)
        found = self.sockets.get(socket_id) or next(ended, None)
        if found is not None:
            found.disconnect(_reason(reason))
        return found is not None

    def disconnect_user(self, user: str | int, reason: str | None = "") -> Call:
        """Close all sockets of a user with 1001, on every node; BusUnavailable: only on this one. Raises ValueError."""
        name, text = known_user(user), _reason(reason)
        return self.pubsub.start_call(partial(self.send_control, "disconnect", name, reason=text))

    def kick(self, topic: str, user: str | int) -> Call:
        """Take a user out of a topic with ``phx_close``, on every node; BusUnavailable: only on this one.

        Raises ValueError: no user or no topic is called so.
        """
        if not is_topic(topic):
            raise ValueError(f"topic: expected 1 to 255 bytes without control characters, not reserved, got {topic!r}")
        return self.pubsub.start_call(partial(self.send_control, "kick", known_user(user), topic))

    @property
    def topics(self) -> dict[str, int]:
        """Topics joined in this process, with the number of their subscribers."""
        return self.pubsub.home.ask(self.hub.topics, self.config.redis.timeout_s)

    def history_of(self, topic: str) -> HistoryReader | None:
        """What reads a topic's history; None where it has none."""
        history = self.pubsub.history
        return None if history is None or history.settings(topic) is None else history.reader

    async def presence_members(self, topic: str) -> Members:
        """The members of a topic; see `relay.Relay.presence`. Raises ValueError, BusUnavailable."""
        presence = self._presence_of(topic)
        if self.config.topic(topic).presence == "count":
            raise ValueError(f'topic {topic!r} has presence = "count": only the number of its members is known')
        return await self.pubsub.home.run(partial(presence.list, topic))

    async def presence_count(self, topic: str) -> int:
        """How many members a topic has; see `relay.Relay.presence_count`. Raises ValueError, BusUnavailable."""
        return await self.pubsub.home.run(partial(self._presence_of(topic).count, topic))

    def _presence_of(self, topic: str) -> Presence:
        if self.presence is None or not self.config.topic(topic).presence:
            raise ValueError(f"topic {topic!r} has no presence; set presence for it in [[topics]]")
        return self.presence

    @property
    def link(self) -> Link:
        """State of the link to the bus."""
        home = self.pubsub.home
        return Link(False, home.fault) if home.is_over else self.broker.link

    # Control messages.

    def send_control(
        self, do: Literal["disconnect", "kick"], user: str, topic: str = "", reason: str = ""
    ) -> asyncio.Future[None]:
        """Disconnect or remove a user here and on all other nodes; BusUnavailable: only here."""
        return self._control.send(do, user, topic, reason)

    def _apply_control(self, message: control.ControlMessage) -> None:
        self.pubsub.decisions.overtake(message.user, message.topic)
        sent_at = time.monotonic() - message.age_s
        for socket in (*self.sockets.values(), *self.connections.left_behind.values()):
            if socket.auth is not None and socket.opened_at <= sent_at:
                self._metrics.disconnects_by_control += socket.auth.disconnect_user(
                    message.user, message.topic, message.reason
                )

    async def _check_idle(self) -> None:
        """Close idle sockets, say when the loop has stood still, and how many messages the log has suppressed.

        One coarse look at all sockets costs less than a timer for each. After a standstill the look is put off:
        heartbeats that came meanwhile have not been read yet.
        """
        limits = self.config.limits
        look_s = min(limits.idle_timeout_s, limits.first_join_timeout_s or math.inf) / 8
        pause_s = min(look_s, _STALL_S)
        last = due = time.monotonic()
        while True:
            await asyncio.sleep(pause_s)
            now = time.monotonic()
            late_s, last = now - last - pause_s, now
            if late_s > _STALL_S:
                self._metrics.event_loop_stalls += 1
                self._log.warning(
                    "stall", "event loop blocked for %.1f s (a handler blocks, or the machine is overloaded)", late_s
                )
                due = now + look_s
            self._loggers.flush()
            # Uvicorn waits for the requests under way to end, and does not let an application know.
            if self.connections.has_requests and is_server_ending():
                self.drain()
            if now < due:
                continue
            due = now + look_s
            self.connections.close_idle(now)

    async def _write_metrics_regularly(self) -> None:
        while True:
            await self._write_metrics()
            await asyncio.sleep(_WRITE_INTERVAL_S)

    async def _write_metrics(self) -> None:
        try:
            await self._exporter.save()
        except OSError as error:  # a full disk, say: the others see what was written last
            self._log.warning("metrics.dir", "writing metrics.dir failed: %s", error)

    @property
    def state(self) -> ProcessState:
        """What this process holds at this moment; asked for in another thread too."""
        return ProcessState(
            dict(self.connections.write_modes),
            len(self.hub),
            self.broker.link.live,
            self.pubsub.can_publish,
            self.broker.shard_topics,
        )

    async def _run_service(self, hook: Hook) -> None:
        """Run a plugin's service as long as the relay runs; when it ends or raises, start it again after a while."""
        wait_s = _SERVICE_BACKOFF_S
        while True:
            started = time.monotonic()
            try:
                self._metrics.plugin_calls[hook.plugin] += 1
                await hook.function(self._owner)
                if is_being_cancelled():
                    return
                _logger.warning("plugin %s: service %s has ended; starting it again", hook.plugin, hook.name)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt | GeneratorExit):
                    raise
                if is_being_cancelled():  # by stop(); an error then is one of its cleaning up
                    if not isinstance(error, asyncio.CancelledError):
                        _ = self._runner.record_failure(hook, "(a service) raised at its end:", error)
                    return
                text = f"(a service) raised; starting it again in {wait_s:g} s:"
                _ = self._runner.record_failure(hook, text, error)
            if time.monotonic() - started > _SERVICE_BACKOFF_MAX_S:
                wait_s = _SERVICE_BACKOFF_S
            await asyncio.sleep(random.uniform(wait_s / 2, wait_s))
            wait_s = min(2 * wait_s, _SERVICE_BACKOFF_MAX_S)


def _reason(reason: str | None) -> str:
    """What an application gives as the reason of a close, as far as a close has it. Raises ValueError."""
    try:
        return close_reason(reason or "")
    except (AttributeError, UnicodeEncodeError):
        raise ValueError(f"reason: expected text that UTF-8 can encode, got {reason!r:.60}") from None


def _make_verifier(components: Components) -> "TokenVerifier | None":
    if not components.config.auth.has_keys:
        return None
    from relay.auth.tokens import TokenVerifier  # needs the extra `auth`

    return TokenVerifier(components.config.auth, components.keys, loggers=components.telemetry.loggers)


def _answers_for_others(components: Components) -> bool:
    """Whether long polls that reach another process than their session's are answered."""
    config = components.config
    if not components.secret or config.broadcast_url or "longpoll" not in config.transports:
        return False
    if missing("auth"):
        _logger.warning("%s", describe("auth", "answering long polls for other processes"))
        return False
    return True


def _make_broker(config: Config, components: Components, own_channel: str) -> Broker:
    metrics, hooks = components.telemetry.metrics, components.plugins.hooks
    # Imported here: a relay on Redis needs no broadcaster, and the other way round.
    if config.broadcast_url:
        if hooks.redis and not components.without_redis:
            raise ConfigError(f"plugin {hooks.redis[0].plugin} listens with on_redis, which needs redis_url")
        from relay.brokers.broadcaster import BroadcasterBroker

        return BroadcasterBroker(config, metrics)
    patterns = [hook.topic for hook in hooks.redis]
    log = components.telemetry.loggers.get("relay.redis")
    own = [PRESENCE_CHANNEL] if config.has_presence else []
    if own_channel:
        own.append(own_channel)
    if config.is_cluster:
        if hooks.redis:
            raise ConfigError(
                f"plugin {hooks.redis[0].plugin} listens with on_redis, which does not work with redis+cluster://"
            )
        from relay.brokers.cluster import ClusterBroker

        return ClusterBroker(config, metrics, own, log)
    from relay.brokers.redis import RedisBroker

    return RedisBroker(config, metrics, [*patterns, *own], log)
