"""`Socket`: one client, from its handshake to its end.

Owns the client's transport and its channels by topic, and hands each message to its channel; must not know what a join
or a push leads to, nor the other sockets.

Messages of one topic are handled strictly in order; a topic that has to wait (for a broker, a plugin) holds up neither
the socket's other topics nor its heartbeats.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from relay.auth.session import SocketAuth
from relay.channels.channel import Channel, ChannelOwner, Services
from relay.channels.pubsub import PubSub
from relay.concurrency import Continuation, Job, KeyedQueue
from relay.config_sections import Policy
from relay.errors import IN_FLIGHT_FULL, SUBSCRIPTION_ENDED, CloseCode, Reason, WireError
from relay.log import Totals
from relay.permissions import Identity
from relay.protocol import serializer
from relay.protocol.frame import Frame
from relay.protocol.serializer import Message, Version
from relay.protocol.state import ChannelsProtocol, Join, Leave, Push, Send, Subscription
from relay.rate_limit import MessageRateLimiter, TokenBucket
from relay.tracing import Trace
from relay.transports.base import Transport


class Socket(ChannelOwner):
    """One client connection; the hub knows it as a subscriber, plugins as `relay.plugins.hooks.Socket`.

    Args: transport: its connection, which belongs to this socket from now on.
          version: the serializer negotiated in the handshake.
          services: what it shares with the other sockets of its node.
          identity: who the client is; None where clients are not authenticated.
          trace: makes spans of its joins and pushes; None where the settings want none.
    """

    __slots__ = (
        "_client_events",
        "_ended",
        "_events",
        "_is_revoked",
        "_joins",
        "_pushes",
        "_waiting_joins",
        "_waiting_since",
        "announced",
        "auth",
        "joinless_since",
        "opened_at",
        "protocol",
        "queue",
        "send_event",
        "services",
        "trace",
        "transport",
        "version",
    )

    def __init__(
        self,
        transport: Transport,
        version: Version,
        services: Services,
        identity: Identity | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.transport: Transport = transport
        self.version: Version = version
        self.services: Services = services
        self.trace: Trace | None = trace
        # The hub calls this for each event: one call fewer for each subscriber.
        self.send_event: Callable[[Frame, str, str, Policy], None] = transport.send_event
        transport.owner = self
        limits = services.config.limits
        self.opened_at: float = transport.last_received
        """In monotonic seconds."""
        self.joinless_since: float = self.opened_at
        """When it was opened; infinite once it has joined a topic."""
        self.protocol: ChannelsProtocol[Channel] = ChannelsProtocol(
            Channel, version, topics_max=limits.topics_per_socket, payload_max_bytes=limits.payload_max_bytes
        )
        self.queue: KeyedQueue = KeyedQueue(services.pubsub.in_flight, self._evict)
        self.announced: dict[str, Channel] = {}
        self._joins = self._pushes = self._events = 0
        # How many joins of a topic wait behind what is under way there; and when the first of them was asked for. None
        # where no join waits: most sockets never need it.
        self._waiting_joins: Counter[str] | None = None
        self._waiting_since = 0
        # Their rate; None before the first.
        self._client_events: TokenBucket | None = None
        self._ended = False
        self._is_revoked = False
        self.auth: SocketAuth | None = None
        if services.authenticator is not None and identity is not None:
            self.auth = SocketAuth(services.authenticator, identity, self)

    @property
    def pubsub(self) -> PubSub:
        """The bridge to the broker."""
        return self.services.pubsub

    # Its life.

    async def run(self) -> None:
        """Serve the socket until it is closed by either side."""
        transport, queue, services = self.transport, self.queue, self.services
        limits = services.config.limits
        rate_limiter = MessageRateLimiter(limits, transport.last_received)
        # Chosen once: without tracing a message costs what it did.
        handle = self._handle if self.trace is None else partial(self.trace.handle, self._handle)
        services.metrics.sockets += 1
        services.metrics.sockets_opened += 1
        services.connection_log.connected(self)
        try:
            while (frame := await transport.receive()) is not None:
                size = transport.last_size
                try:
                    message = serializer.decode(frame, self.version)
                except WireError as error:
                    transport.reject(error.code, str(error))
                    continue
                finally:
                    del frame  # or the last one would be kept until the next comes
                allowed = rate_limiter.allows(message.event, transport.last_received, size)
                if allowed or not self._refuse_over_limit(rate_limiter, message):
                    if message.event == "phx_join" and queue.is_busy(message.topic):
                        self._let_join_wait(message, size)
                    else:
                        queue.run(message.topic, partial(handle, message), size)
                del message
                if queue.pending >= limits.pushes_in_flight or queue.held_bytes >= limits.in_flight_max_bytes:
                    await queue.wait_below(limits.pushes_in_flight, limits.in_flight_max_bytes)
        except asyncio.CancelledError:
            if not transport.is_own_cancellation():  # any other goes on its way
                raise
        finally:
            self._end()

    def _end(self) -> None:
        transport, services = self.transport, self.services
        self._ended = True
        services.metrics.sockets -= 1
        for channel in tuple(self.protocol.subscriptions.values()):
            channel.release()
        transport.end()
        open_s = time.monotonic() - self.opened_at
        totals = Totals(open_s, self._joins, self._pushes, self._events, transport.dropped)
        services.connection_log.disconnected(self, *transport.ending, totals)

    def finish_in_background(self) -> asyncio.Task[None] | None:
        """Release a socket that has ended, once the handlers that it leaves behind have; None where there are none.

        What plugins have begun, or are still to hear of, is not cut off by a client that has gone. Its permissions end
        meanwhile as those of a client that stayed.
        """
        task = self.services.pubsub.finish_in_background(self.queue)
        if task is None:
            self._release()
        else:
            task.add_done_callback(self._release)
        return task

    def _release(self, _: object = None) -> None:
        """End its authentication, and break the cycles that refer back to this socket, so that it is freed at once."""
        if self.auth is not None:
            self.auth.end()
        self._forget_waiting_joins()
        self.queue.evict = None
        self.protocol.clear()
        self.announced.clear()

    def close(self, code: int, reason: str) -> bool:
        """Close the socket after what is already queued for it; False where it was closed already."""
        if self._ended:
            self._revoke()
        return self.transport.close(code, reason)

    def _revoke(self) -> None:
        """Drop what the client sent and what still waits: the relay has ended all its subscriptions."""
        self._is_revoked = True
        if dropped := self._drop_messages():
            self.services.metrics.refused[SUBSCRIPTION_ENDED] += dropped

    def _evict(self) -> None:
        """Drop what waits for handlers, and close: of all sockets too much is under way, and of this one most."""
        self.services.metrics.refused[IN_FLIGHT_FULL] += self._drop_messages()
        self.transport.evict("in flight", "too much of this client waits for handlers, and of all clients")

    def idle_s(self, now: float) -> float:
        """Seconds since the client's last message or ping, at the monotonic time ``now``."""
        return self.transport.idle_s(now)

    # What the client sent.

    def _let_join_wait(self, message: Message, size: int) -> None:
        """Queue a join behind what is under way on its topic; a control message that comes meanwhile overtakes it."""
        decisions = self.pubsub.decisions
        if self._waiting_joins is None:
            self._waiting_joins, self._waiting_since = Counter(), decisions.begin()
        self._waiting_joins[message.topic] += 1
        handle = partial(self._handle_late, decisions.generation)
        if self.trace is not None:
            handle = partial(self.trace.handle, handle)
        self.queue.run(message.topic, partial(handle, message), size)

    def _handle_late(self, asked_at: int, message: Message) -> Continuation:
        try:
            return self._handle(message, asked_at)
        finally:
            if self._waiting_joins is not None:
                self._waiting_joins -= Counter((message.topic,))  # without those of which no join is left
                if not self._waiting_joins:
                    self._forget_waiting_joins()

    def _forget_waiting_joins(self) -> None:
        if self._waiting_joins is not None:
            self._waiting_joins = None
            self.pubsub.decisions.end(self._waiting_since)

    def _drop_messages(self) -> int:
        self._forget_waiting_joins()
        return self.queue.drop(_is_message)

    def _handle(self, message: Message, asked_at: int | None = None) -> Continuation:
        """Do what a message asks for; the coroutine returned, if any, is what is left to wait for.

        Args: asked_at: of a join that had to wait.
        """
        match self.protocol.receive(message):
            case Send(frame, refused):
                if refused is not None:
                    self.count_refusal(refused)
                    if message.event == "phx_join":
                        self.services.connection_log.join_refused(self, message.topic, refused)
                self.transport.send_control(frame)
            case Join() as join:
                channel: Channel = join.subscription
                return channel.join(self, join, asked_at)
            case Leave() as leave:
                channel = leave.subscription
                return channel.leave(leave)
            case Push() as push:
                channel = push.subscription
                return channel.push(push)
            case None:
                self.services.metrics.refused["stale join_ref"] += 1
        return None

    def _refuse_over_limit(self, rate_limiter: MessageRateLimiter, message: Message) -> bool:
        """Refuse a message over the rate limit, or close the socket; False where it has to be handled all the same."""
        metrics = self.services.metrics
        if rate_limiter.is_exhausted:
            metrics.refused["rate limited for long"] += 1
            self.transport.close(CloseCode.POLICY_VIOLATION, "rate limited for long: this client asks for too much")
            return True
        refusal = self.protocol.refuse_unheard(message, Reason.RATE_LIMITED)
        if refusal is not None:
            metrics.refused[Reason.RATE_LIMITED] += 1
            self.services.connection_log.rate_limited(self, message.topic, message.event)
            if message.ref is not None:  # else it asks for no answer
                self.transport.send_control(refusal.frame)
        return refusal is not None

    # For its channels.

    @property
    def is_revoked(self) -> bool:
        """Whether the relay has ended the socket's permissions: nothing that waits may go on."""
        return self._is_revoked

    @property
    def has_ended(self) -> bool:
        """Whether its connection has ended: nothing reaches the client any more."""
        return self._ended

    @property
    def is_closed(self) -> bool:
        """Whether the socket has ended, or its close has begun."""
        return self._ended or self.transport.closed_with is not None

    def count_join(self) -> None:
        """Count a join that was accepted."""
        self.joinless_since = float("inf")
        self.services.metrics.joins += 1
        self._joins += 1

    def count_push(self) -> None:
        """Count a push that has come."""
        self.services.metrics.pushes_in += 1
        self._pushes += 1

    def allows_client_event(self) -> bool:
        """Take one client event into account, and say whether it is within its rate."""
        per_s, now = self.services.config.limits.client_events_per_s, self.transport.last_received
        if not per_s:
            return True
        if self._client_events is None:
            self._client_events = TokenBucket(per_s, per_s, now)
        return self._client_events.take(now)

    def count_events(self, events: int) -> None:
        """Count the events of a subscription that has ended."""
        self._events += events

    def count_refusal(self, reason: str) -> None:
        """Count a join or a push that was refused."""
        # A plugin's own words are as many as it likes; the counter's labels must not be.
        kind = reason if reason in _REASONS else "by a plugin"
        self.services.metrics.refused[kind] += 1
        if self.trace is not None:
            self.trace.note(kind)

    # For its transport.

    def readiness_changed(self) -> None:
        """Have the hub ask for `direct_write` again."""
        self.services.hub.refresh(self.protocol.subscriptions)

    def close_started(self) -> None:
        """End the permissions, where the close is of a kind that does."""
        if self.transport.closed_with in _REVOKING:
            self._revoke()

    def fell_behind(self, topic: str, position: str) -> None:
        """Have the channel of a topic given events from its history: the client reads too slowly for them."""
        channel = self.protocol.subscriptions.get(topic)
        if channel is not None:
            channel.fall_behind(position)

    @property
    def dropped_notice(self) -> Callable[[str, int], Frame]:
        """Makes the frame that tells the client how many events of a topic were dropped."""
        return self.protocol.dropped_notice

    # For the hub, the node, and those who look at it.

    def subscription(self, topic: str) -> Channel | None:
        """What this socket has joined under ``topic``."""
        return self.protocol.subscriptions.get(topic)

    def is_joining(self, topic: str) -> bool:
        """Whether a join of ``topic`` is being decided, or waits for that."""
        is_waiting = self._waiting_joins is not None and topic in self._waiting_joins
        return is_waiting or self.protocol.joining(topic) is not None

    def end_subscription(self, subscription: Subscription, reason: Reason | None) -> bool:
        """End a subscription with ``phx_error`` (rejoin) or ``phx_close`` (do not); False where it has ended."""
        channel = self.protocol.subscriptions.get(subscription.topic)
        return channel.end(reason) if channel is not None and channel is subscription else False

    def rights_changed(self, subscription: Subscription) -> None:
        """Learn that a channel goes on with other rights."""
        channel = self.protocol.subscriptions.get(subscription.topic)
        if channel is not None and channel is subscription:
            channel.rights_changed()

    @property
    def topics(self) -> tuple[str, ...]:
        """All topics this socket has joined."""
        return tuple(self.protocol.subscriptions)

    @property
    def write_mode(self) -> str:
        """How frames are written: ``direct`` to the server's transport, or through ASGI."""
        return self.transport.write_mode

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait because the client reads slowly."""
        return self.transport.queued_bytes

    @property
    def held_bytes(self) -> int:
        """All bytes that are held for the client: what waits, and what the server has not written yet."""
        return self.transport.held_bytes

    @property
    def dropped(self) -> int:
        """Events that it has missed because it reads slowly."""
        return self.transport.dropped


def _is_message(job: Job) -> bool:
    """Whether a job is a message of the client's: the others tell plugins of an end."""
    return isinstance(job, partial) and isinstance(job.args[-1], Message)


_REASONS = frozenset(Reason)
_REVOKING = (CloseCode.GOING_AWAY, CloseCode.POLICY_VIOLATION, CloseCode.SLOW_READER)
"""Closes that end a client's permissions; at the others, what was sent before is dealt with."""
