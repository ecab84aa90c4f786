"""One client connection with its protocol state: what its messages ask for, and what is sent to it.

Owns a socket's life between handshake and end; must not know Redis or the other sockets.

Messages of one topic are handled strictly in order; a topic that has to wait (for a broker, a plugin) holds
up neither the socket's other topics nor its heartbeats.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial

from relay.auth.session import RENEWAL, Decision, SocketAuth
from relay.channels import excess
from relay.channels.asking import ask_about_join, ask_about_push, renew
from relay.channels.handle import Face
from relay.channels.hub import Hub
from relay.channels.pubsub import PubSub
from relay.concurrency import Continuation, Job, KeyedQueue
from relay.config import Config, Policy
from relay.errors import IN_FLIGHT_FULL, SUBSCRIPTION_ENDED, BusUnavailable, CloseCode, Reason, WireError
from relay.journal import ConnectionLog, Totals
from relay.metrics import Metrics
from relay.plugins import hooks
from relay.plugins.dispatcher import HandlerError
from relay.plugins.hooks import Hook, SocketInfo
from relay.protocol import serializer
from relay.protocol.frame import Frame
from relay.protocol.payload import EMPTY, Payload, encode_payload
from relay.protocol.serializer import Message, Version
from relay.protocol.state import ChannelsProtocol, Join, Leave, Push, Send, Subscription
from relay.rate_limit import MessageRateLimiter
from relay.tracing import Trace
from relay.transports.base import Scope
from relay.transports.handshake import HandshakeAccepted
from relay.transports.websocket import WebSocketTransport


class Socket(Face):
    """One client connection; the hub knows it as a subscriber, plugins as `relay.plugins.hooks.Socket`."""

    __slots__ = (
        "_config",
        "_connection",
        "_ended",
        "_events",
        "_hub",
        "_joins",
        "_journal",
        "_known",
        "_lanes",
        "_last_push",
        "_metrics",
        "_pubsub",
        "_protocol",
        "_pushes",
        "_query",
        "_revoked",
        "_trace",
        "access",
        "address",
        "id",
        "joinless_since",
        "opened_at",
        "send_event",
        "version",
    )

    def __init__(
        self,
        shake: HandshakeAccepted,
        scope: Scope,
        connection: WebSocketTransport,
        *,
        config: Config,
        pubsub: PubSub,
        hub: Hub,
        metrics: Metrics,
        journal: ConnectionLog,
        access: Callable[..., SocketAuth] | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.id: str = connection.id
        client = scope.get("client")
        self.address: str | None = client[0] if client else None
        self._query: bytes = scope["query_string"]
        self.version: Version = shake.version
        self._config = config
        self._pubsub = pubsub
        self._hub = hub
        self._metrics = metrics
        self._journal = journal
        self._trace = trace
        self._joins = self._pushes = self._events = 0
        self._connection = connection
        # The hub calls this for each event: one call fewer for each subscriber.
        self.send_event: Callable[[Frame, str, str, Policy], None] = connection.send_event
        connection.on_readiness = self._readiness_changed
        connection.on_close = self._closing
        limits = config.limits
        self.opened_at: float = connection.last_received
        """In monotonic seconds."""
        self.joinless_since: float = self.opened_at
        """When it was opened; infinite once it has joined a topic."""
        self._protocol = ChannelsProtocol(
            shake.version, topics_max=limits.topics_per_socket, payload_max_bytes=limits.payload_max_bytes
        )
        connection.notify_dropped = self._protocol.notify_dropped
        self._lanes = KeyedQueue(pubsub.in_flight, self._give_up_waiting)
        # The newest unanswered push of each topic: a leave waits for it, so that its reply comes first.
        self._last_push: dict[str, asyncio.Future[None]] = {}
        # Joins that plugins have allowed, by topic, and whose end they are still to be told.
        self._known: dict[str, Subscription] = {}
        self._ended = False
        # Whether the relay has ended all there was, so that nothing that waits may go on.
        self._revoked = False
        self.access: SocketAuth | None = None
        if access is not None:
            self.access = access(self._protocol.subscriptions, self.end_subscription, self.close, self._count_refusal)

    # Its life.

    async def run(self) -> None:
        """Serve the socket until it is closed by either side."""
        connection, lanes, busy = self._connection, self._lanes, self._config.limits.pushes_in_flight
        most_bytes = self._config.limits.in_flight_max_bytes
        pace = MessageRateLimiter(self._config.limits, connection.last_received)
        turn_away = partial(excess.turn_away, pace, self._protocol, connection, self._metrics, self._journal, self)
        # Chosen once: without tracing a message costs what it did.
        handle = self._handle if self._trace is None else partial(self._trace.handle, self._handle)
        self._metrics.sockets += 1
        self._metrics.sockets_opened += 1
        self._journal.connected(self)
        try:
            while (frame := await connection.receive()) is not None:
                size = connection.last_size
                try:
                    message = serializer.decode(frame, self.version)
                except WireError as error:
                    connection.reject(error.code, str(error))
                    continue
                finally:
                    del frame  # or the last one would be kept until the next comes
                if pace.allows(message.event, connection.last_received, size) or not turn_away(message):
                    lanes.run(message.topic, partial(handle, message), size)
                del message
                if lanes.pending >= busy or lanes.held_bytes >= most_bytes:
                    await lanes.wait_below(busy, most_bytes)
        except asyncio.CancelledError:
            if not connection.has_given_up():  # any other cancellation goes on its way
                raise
        finally:
            self._ended = True
            self._metrics.sockets -= 1
            for subscription in tuple(self._protocol.subscriptions.values()):
                self._unsubscribe(subscription)
            connection.end()
            open_s = time.monotonic() - self.opened_at
            totals = Totals(open_s, self._joins, self._pushes, self._events, connection.dropped)
            self._journal.disconnected(self, *connection.ending, totals)

    def finish_in_background(self) -> asyncio.Task[None] | None:
        """Let go of a socket that has ended, once what it leaves behind has come to its end; None where nothing has.

        What plugins have begun, or are still to hear of, is not cut off by a client that has gone. Its rights end
        meanwhile as those of a client that stayed.
        """
        task = self._pubsub.finish_in_background(self._lanes)
        if task is None:
            self._let_go()
        else:
            task.add_done_callback(self._let_go)
        return task

    def _let_go(self, _: object = None) -> None:
        """End the rights, and break the cycle by which the lanes refer to this socket: it is freed at once."""
        if self.access is not None:
            self.access.end()
        self._lanes.give_up = None

    def close(self, code: int, reason: str) -> bool:
        """Close the socket after what is already queued for it; False where it was closed already."""
        if self._ended:
            self._drop_pushes()
        return self._connection.close(code, reason)

    def _closing(self) -> None:
        if self._connection.closed_with in _REVOKING:
            self._drop_pushes()

    def _drop_pushes(self) -> None:
        """Drop what the client sent and what still waits: all its subscriptions have ended, by the relay's will."""
        self._revoked = True
        if dropped := self._lanes.drop(_is_message):
            self._metrics.refused[SUBSCRIPTION_ENDED] += dropped

    def _give_up_waiting(self) -> None:
        """Drop what waits for handlers, and close: of all sockets too much is under way, and of this one most."""
        self._metrics.refused[IN_FLIGHT_FULL] += self._lanes.drop(_is_message)
        self._connection.evict("in flight", "too much of this client waits for handlers, and of all clients")

    def idle_s(self, now: float) -> float:
        """Seconds since the client's last message or ping, at the monotonic time ``now``."""
        return self._connection.idle_s(now)

    # What the client sent.

    def _handle(self, message: Message) -> Continuation:
        """Do what a message asks for; the coroutine returned, if any, is what is left to wait for."""
        match self._protocol.receive(message):
            case Send(frame, refused):
                if refused is not None:
                    self._count_refusal(refused)
                    if message.event == "phx_join":
                        self._journal.join_refused(self, message.topic, refused)
                self._connection.send_control(frame)
            case Join() as join:
                return self._join(join)
            case Leave() as leave:
                return self._leave(leave)
            case Push() as push:
                return self._push(push)
            case None:
                self._metrics.refused["stale join_ref"] += 1
        return None

    def _join(self, join: Join) -> Continuation:
        join.began = self._pubsub.decisions.begin()
        if (rest := self._admit(join)) is not None:
            return self._decide(join, rest)
        self._pubsub.decisions.end(join.began)
        return None

    async def _decide(self, join: Join, rest: Coroutine[None, None, None]) -> None:
        try:
            await rest
        finally:
            self._pubsub.decisions.end(join.began)

    def _admit(self, join: Join) -> Continuation:
        reason = self._pubsub.refuse_join()
        if reason is None and self.access is not None:
            admitted = self.access.authorize_join(join.subscription, join.params)
            if callable(admitted):
                return self._join_later(join, admitted)
            reason = admitted
        return self._admitted(join, reason)

    async def _join_later(self, join: Join, decide: Decision) -> None:
        if (rest := self._admitted(join, await decide())) is not None:
            await rest

    def _admitted(self, join: Join, reason: Reason | None) -> Continuation:
        """Go on with a join that has the right to be, unless there is a ``reason`` why not."""
        if reason is not None:
            self._refuse_join(join, reason)
            return None
        topic = join.subscription.topic
        found = tuple(hooks.matching(self._pubsub.hooks.join, topic))
        return self._ask_to_join(join, found) if found or topic in self._known else self._enter(join, EMPTY)

    async def _ask_to_join(self, join: Join, found: tuple[Hook, ...]) -> None:
        """Have handlers decide on a join, once they know of the end of the one before it."""
        topic = join.subscription.topic
        request = hooks.Join(self, topic, join.params, join.subscription.identity)
        if topic in self._known and (told := self._tell_left(self._known[topic])) is not None:
            await told
        try:
            response = await ask_about_join(self._pubsub, request, found)
        except hooks.Refused as refusal:
            self._refuse_join(join, refusal.reason, refusal.response)
        except hooks.InvalidPayload:
            self._refuse_join(join, Reason.INVALID_PAYLOAD)
        except HandlerError:
            self._refuse_join(join, Reason.JOIN_CRASHED)
        else:
            if (rest := self._enter(join, response)) is not None:
                await rest

    def _enter(self, join: Join, response: Payload) -> Continuation:
        """Reply and subscribe, as soon as the broker hears the topic."""
        if self._pubsub.hooks.leave:
            self._known[join.subscription.topic] = join.subscription

        def enter() -> None:
            if self._ended or self._connection.closed_with is not None:
                self._unsubscribe(join.subscription)
                return
            # Again, since handlers and the broker may have taken their time.
            reason = None if self.access is None else self.access.judge(join.subscription, join.began)
            if reason is not None or join.removed:
                self._unsubscribe(join.subscription)
                self._refuse_join(join, reason or Reason.REMOVED)
                return
            _ = self._last_push.pop(join.subscription.topic, None)  # of what this join replaces
            for frame in self._protocol.accept(join, response):
                self._connection.send_control(frame)
            _ = self._hub.add(join.subscription.topic, self)
            self.joinless_since = float("inf")
            self._metrics.joins += 1
            self._joins += 1

        hearing = self._pubsub.subscribe(join.subscription.topic, enter)
        return None if hearing is None else self._enter_later(join, hearing)

    async def _enter_later(self, join: Join, hearing: Coroutine[None, None, None]) -> None:
        try:
            await hearing
        except BusUnavailable:
            self._unsubscribe(join.subscription)  # allowed, and come to nothing
            self._refuse_join(join, Reason.BUS_UNAVAILABLE)

    def _refuse_join(self, join: Join, reason: str, response: Payload | None = None) -> None:
        self._count_refusal(reason)
        topic, own = join.subscription.topic, join.subscription.identity
        self._journal.join_refused(self if own is None else SocketInfo(self.id, own.user, self.address), topic, reason)
        if join.replaces is not None:
            self._unsubscribe(join.replaces)
        for frame in self._protocol.refuse(join, response or encode_payload({"reason": reason})):
            self._connection.send_control(frame)

    def _leave(self, leave: Leave) -> Continuation:
        pushed = self._last_push.get(leave.subscription.topic)
        if pushed is not None:
            return self._leave_after(pushed, leave)
        if self._protocol.is_current(leave.subscription):  # else it was ended from this side while the leave waited
            self._unsubscribe(leave.subscription)
            for frame in self._protocol.leave(leave):
                self._connection.send_control(frame)
        return None

    async def _leave_after(self, pushed: asyncio.Future[None], leave: Leave) -> None:
        _ = await asyncio.wait((pushed,))
        _ = self._leave(leave)

    def _push(self, push: Push) -> Continuation:
        topic = push.subscription.topic
        self._metrics.pushes_in += 1
        self._pushes += 1
        if push.event == RENEWAL:
            return renew(self, self.access, push)  # whatever becomes of it: a token is for nobody else to see
        if not push.subscription.may_push:
            self.refuse_push(push, Reason.UNAUTHORIZED)
            return None
        if not self._config.topic(topic).push:
            self.refuse_push(push, Reason.PUSH_NOT_ALLOWED)
            return None
        found = tuple(hooks.matching(self._pubsub.hooks.push, topic, push.event))
        if found:
            return ask_about_push(self, self._pubsub, self._metrics, push, found)
        if not self._pubsub.can_publish:
            self.refuse_push(push, Reason.BUS_UNAVAILABLE)
            return None
        self._lanes.pending += 1
        own = push.subscription.identity
        user = self.user if own is None else own.user
        future = self._pubsub.publish_push(topic, push.event, push.payload, user, self.id)
        self._last_push[topic] = future
        future.add_done_callback(partial(self._pushed, push))
        if self._trace is not None:
            self._trace.until(future)
        return None

    def _pushed(self, push: Push, future: asyncio.Future[None]) -> None:
        """Answer a push: ok only now that the bus has taken it."""
        self._lanes.done()
        if self._last_push.get(push.subscription.topic) is future:
            del self._last_push[push.subscription.topic]
        if future.cancelled() or future.exception() is not None:
            self.refuse_push(push, Reason.BUS_UNAVAILABLE)
            return
        self._metrics.pushes_out += 1
        self.reply(push, "ok", EMPTY)

    def refuse_push(self, push: Push, reason: str, response: Payload | None = None) -> None:
        """Answer a push with an error, and count it."""
        self._count_refusal(reason)
        self.reply(push, "error", response or encode_payload({"reason": reason}))

    def stop_push(self, push: Push) -> bool:
        """Refuse a push that had to wait and has no right any more to go on; False where it has."""
        if self._revoked or not self._protocol.is_current(push.subscription):
            self._metrics.refused[SUBSCRIPTION_ENDED] += 1
            return True
        reason = None if self.access is None else self.access.may_push(push.subscription)
        if reason is not None:
            self.refuse_push(push, reason)
        return reason is not None

    def _count_refusal(self, reason: str) -> None:
        # A plugin's own words are as many as it likes; the counter's labels must not be.
        kind = reason if reason in _REASONS else "by a plugin"
        self._metrics.refused[kind] += 1
        if self._trace is not None:
            self._trace.note(kind)

    def reply(self, push: Push, status: str, response: Payload) -> None:
        """Answer a push; nothing where its subscription has ended, or it asked for no answer."""
        frame = self._protocol.reply(push, status, response)
        if frame is not None:
            self._connection.send_control(frame)

    def _unsubscribe(self, subscription: Subscription) -> None:
        """Deliver nothing more; plugins hear of the end after what is under way on the topic."""
        topic = subscription.topic
        _ = self._last_push.pop(topic, None)
        self._connection.settle_dropped(topic, partial(self._protocol.notify_dropped, subscription=subscription))
        self._events += self._hub.events_for(topic, self)
        if self._hub.remove(topic, self):
            self._pubsub.unsubscribe(topic)
        self._lanes.run(topic, partial(self._tell_left, subscription))

    def _tell_left(self, subscription: Subscription) -> Continuation:
        if self._known.get(subscription.topic) is not subscription:
            return None
        del self._known[subscription.topic]
        return self._pubsub.tell_left(hooks.Leave(self, subscription.topic, subscription.identity))

    # What others send through it: the node's side, and the hub's.

    @property
    def deflates(self) -> bool:
        """Whether its events are written compressed."""
        return self._connection.deflates

    def direct_write(self) -> Callable[[bytes], object] | None:
        """What writes frames to it as they are; None where they go through `send_event`."""
        return self._connection.direct_write()

    def _readiness_changed(self) -> None:
        self._hub.refresh(self._protocol.subscriptions)

    def subscription(self, topic: str) -> Subscription | None:
        """What this socket has joined under ``topic``."""
        return self._protocol.subscriptions.get(topic)

    def joining(self, topic: str) -> Join | None:
        """The join of ``topic`` that is being decided."""
        return self._protocol.joining(topic)

    @property
    def topics(self) -> tuple[str, ...]:
        """All topics this socket has joined."""
        return tuple(self._protocol.subscriptions)

    @property
    def path(self) -> str:
        """How frames are written: ``direct`` to the transport, or ``portable`` through ASGI."""
        return self._connection.path

    @property
    def pressure(self) -> tuple[int, int]:
        """How slowly it reads: bytes that wait for it, and events it has missed."""
        return self._connection.waiting_bytes, self._connection.dropped

    def end_subscription(self, subscription: Subscription, reason: Reason | None) -> bool:
        """End a subscription with ``phx_error`` (rejoin) or ``phx_close`` (do not); False where it has ended."""
        frame = self._protocol.end(subscription, reason)
        if frame is None:
            return False
        self._unsubscribe(subscription)
        self._connection.send_control(frame)
        return True


def _is_message(piece: Job) -> bool:
    """Whether a piece of work is a message of the client's: the others tell plugins of an end."""
    return isinstance(piece, partial) and isinstance(piece.args[-1], Message)


_REASONS = frozenset(Reason)
_REVOKING = (CloseCode.GOING_AWAY, CloseCode.POLICY_VIOLATION, CloseCode.SLOW_READER)
"""Closes that end a client's rights; at the others, what was sent before is dealt with."""
