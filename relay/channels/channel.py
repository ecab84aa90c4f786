"""`Channel`: one joined topic of one socket, from its join to its end.

Owns all that a join has: its permissions, what plugins say to it and to its pushes, the push that is under way, and
what its end sets off. Must not know the socket's other topics, nor how frames travel.

A join is decided in four steps: the socket's authentication, the plugins' handlers, the broker's subscription, the
reply. Where none of them has to wait, all are done at once.
"""

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from relay.auth.authenticator import Authenticator
from relay.auth.session import Decision, explain, tokens_in
from relay.brokers.base import Place
from relay.channels import client_events, groups, replay
from relay.channels.actions import ChannelActions, ChannelPushActions
from relay.channels.handle import SocketHandle
from relay.channels.history_reader import Recovery
from relay.channels.hub import Hub
from relay.channels.presence import Presence
from relay.channels.pubsub import PubSub
from relay.channels.replay import Asked, Replay
from relay.channels.tangram import TangramWire
from relay.concurrency import Continuation, KeyedQueue
from relay.config import Config
from relay.config_sections import Direction, Policy, TopicConfig
from relay.errors import SUBSCRIPTION_ENDED, BusUnavailable, Reason
from relay.log import ConnectionLog
from relay.metrics import Metrics
from relay.permissions import Identity
from relay.plugins import hooks
from relay.plugins.dispatcher import HandlerError
from relay.plugins.hooks import Hook, SocketInfo
from relay.protocol.frame import Frame
from relay.protocol.payload import EMPTY, Payload, add_members, encode_payload
from relay.protocol.presence import EVENT_PREFIX, as_params, is_key, presence_meta
from relay.protocol.serializer import Ref, Version
from relay.protocol.state import ChannelsProtocol, Join, Leave, Push, Subscription
from relay.protocol.topics import RENEWAL
from relay.tracing import Trace
from relay.transports.base import Transport

_COUNTED = {"presence": "count"}
"""What a join's reply says where the client is sent the number of members, not the members."""


@dataclass(frozen=True, slots=True)
class Services:
    """What all sockets of a node share."""

    config: Config
    pubsub: PubSub
    hub: Hub
    metrics: Metrics
    connection_log: ConnectionLog
    authenticator: Authenticator | None = None
    """None where clients are not authenticated."""
    presence: Presence | None = None
    """None where no topic has presence."""
    tangram: TangramWire | None = None


class ChannelOwner(SocketHandle):
    """The socket of a channel, as its channels know it; the hub knows it as a `Subscriber`."""

    __slots__ = ()

    send_event: Callable[[Frame, str, str, Policy], None]
    services: Services
    protocol: "ChannelsProtocol[Channel]"
    queue: KeyedQueue
    """Messages and hooks that wait, in order for each topic."""
    trace: Trace | None
    announced: "dict[str, Channel]"
    """By topic, the channel that handlers of on_leave have not been called for yet."""

    @property
    def deflates(self) -> bool:
        """Whether its events are written compressed."""
        return self.transport.deflates

    def direct_write(self) -> Callable[[bytes], object] | None:
        """What writes frames to it as they are; None where they go through `send_event`."""
        return self.transport.direct_write()

    @property
    @abstractmethod
    def is_revoked(self) -> bool:
        """Whether the relay has ended the socket's permissions: nothing that waits may go on."""

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Whether the socket has ended, or its close has begun."""

    @abstractmethod
    def count_join(self) -> None:
        """Count a join that was accepted."""

    @abstractmethod
    def count_push(self) -> None:
        """Count a push that has come."""

    @abstractmethod
    def allows_client_event(self) -> bool:
        """Take one client event into account, and say whether it is within its rate."""

    @abstractmethod
    def count_events(self, events: int) -> None:
        """Count the events of a subscription that has ended."""

    @abstractmethod
    def count_refusal(self, reason: str) -> None:
        """Count a join or a push that was refused."""


class Channel(Subscription):
    """One join, and what follows from it."""

    __slots__ = ("_last_push", "_socket", "replay")

    _socket: ChannelOwner

    def __init__(self, topic: str, join_ref: Ref) -> None:
        # Without super().__init__(): one call fewer for each join.
        self.topic: str = topic
        self.join_ref: Ref = join_ref
        self.may_push: bool = True
        self.has_presence: bool = True
        self.identity: Identity | None = None
        # The newest push without an answer: a leave waits for it, so that its reply comes first.
        self._last_push: asyncio.Future[None] | None = None
        self.replay: Replay | None = None
        """Gives it events from the topic's history; None where that was never needed."""

    # The join.

    def join(self, socket: ChannelOwner, join: "Join[Channel]", asked_at: int | None = None) -> Continuation:
        """Decide on the join that opens this channel: at once, or in the coroutine that is returned."""
        self._socket = socket
        pubsub = socket.services.pubsub
        join.began = pubsub.decisions.begin(asked_at)
        decision = self._authorize(join)
        handlers = tuple(hooks.matching(pubsub.hooks.join, self.topic)) if pubsub.hooks.join else ()
        if isinstance(decision, Reason):
            self._refuse_join(join, decision)
        elif (
            decision is not None
            or handlers
            or self.topic in socket.announced
            or pubsub.must_subscribe(self.topic)
            or (pubsub.history is not None and self._asks_history(join) is not None)
        ):
            return self._join_later(join, decision, handlers)
        else:
            self._announce()
            self._accept_join(join, EMPTY)
        pubsub.decisions.end(join.began)
        return None

    def _authorize(self, join: "Join[Channel]") -> Reason | None | Decision:
        """Why the join is refused, or None; or what decides, where it brings a token."""
        socket = self._socket
        reason = socket.services.pubsub.refuse_join()
        if reason is not None or socket.auth is None:
            return reason
        return socket.auth.authorize_join(self, join.params)

    async def _join_later(self, join: "Join[Channel]", decision: Decision | None, handlers: tuple[Hook, ...]) -> None:
        """The same where authentication, handlers or the broker have to be waited for."""
        pubsub = self._socket.services.pubsub
        try:
            reason = None if decision is None else await decision()
            if reason is not None:
                self._refuse_join(join, reason)
                return
            is_asked = handlers or self.topic in self._socket.announced
            response, meta = await self._call_join_handlers(join, handlers) if is_asked else (EMPTY, None)
            self._announce()
            async with pubsub.subscribe(self.topic):
                recovery: Recovery | None = None
                if pubsub.history is not None and (asked := self._asks_history(join)) is not None:
                    recovery = await pubsub.history.open(self.topic, asked.since, asked.last, self._is_wanted)
                self._accept_join(join, response, recovery, meta)
        except hooks.Refused as refusal:
            self._refuse_join(join, refusal.reason, refusal.response)
        except hooks.InvalidPayload:
            self._refuse_join(join, Reason.INVALID_PAYLOAD)
        except HandlerError:
            self._refuse_join(join, Reason.JOIN_CRASHED)
        except BusUnavailable:
            self.release()
            self._refuse_join(join, Reason.BUS_UNAVAILABLE)
        except asyncio.CancelledError:  # cut off, since too much of its socket is under way
            self._socket.queue.run(self.topic, self._call_leave_handlers)
            raise
        finally:
            pubsub.decisions.end(join.began)

    def _asks_history(self, join: "Join[Channel]") -> Asked | None:
        """What the join asks for of the topic's history; None where it asks for nothing, or the topic has none."""
        asks = replay.asked(join.params)
        return asks if asks is not None and self._socket.services.config.topic(self.topic).history else None

    async def _call_join_handlers(
        self, join: "Join[Channel]", handlers: tuple[Hook, ...]
    ) -> tuple[Payload, Payload | None]:
        """What the join's reply says once all handlers allow it, and what they say of the member.

        Raises Refused, InvalidPayload, HandlerError.
        """
        socket, runner = self._socket, self._socket.services.pubsub.runner
        # A handler hears of a channel's end before it is asked about the next one.
        previous = socket.announced.get(self.topic)
        if previous is not None and (leaving := previous._call_leave_handlers()) is not None:
            await leaving
        request = hooks.Join(socket, self.topic, join.params, self.identity, ChannelActions(self, socket))
        answers: dict[str, Any] = {}
        for hook in handlers:
            await runner.call_with_result(hook, request, partial(hooks.add_response, answers))
        return hooks.to_payload(answers), request.meta

    def _call_joined_handlers(self, params: Payload) -> Continuation:
        runner = self._socket.services.pubsub.runner
        handlers = tuple(hooks.matching(runner.hooks.joined, self.topic))
        return self._call_joined_later(handlers, params) if handlers else None

    async def _call_joined_later(self, handlers: tuple[Hook, ...], params: Payload) -> None:
        socket = self._socket
        joined = hooks.Joined(socket, self.topic, params, self.identity, ChannelActions(self, socket))
        for hook in handlers:
            with suppress(HandlerError):  # logged and counted there
                await socket.services.pubsub.runner.call(hook, joined)

    def _announce(self) -> None:
        """Plugins have allowed the join: they are to hear of its end, whatever becomes of it."""
        if self._socket.services.pubsub.hooks.leave:
            self._socket.announced[self.topic] = self

    def _accept_join(
        self,
        join: "Join[Channel]",
        response: Payload,
        recovery: Recovery | None = None,
        said_meta: Payload | None = None,
    ) -> None:
        """Reply and subscribe, with nothing in between: no event comes before the reply, none is lost after it."""
        socket, topic = self._socket, self.topic
        if socket.is_closed:
            self.release()
            return
        services = socket.services
        # Again, since handlers and the broker may have taken their time.
        reason = None if socket.auth is None else socket.auth.judge(self, join.began)
        if reason is not None or services.pubsub.decisions.overtaken(join.began, socket, topic):
            self.release()
            self._refuse_join(join, reason or Reason.REMOVED)
            return
        meta: bytes | None = None
        if services.presence is not None and services.config.topic(topic).presence and self.has_presence:
            own = join.params if said_meta is None else as_params(said_meta)
            meta = presence_meta(own, self._user, services.config.limits.presence_meta_max_bytes)
            if meta is None or not is_key(self._presence_key):
                self.release()
                self._refuse_join(join, Reason.INVALID_PRESENCE)
                return
        if join.replaces is not None:
            join.replaces.settle()
        if recovery is not None:
            response = add_members(response, recovery.response)
        if meta is not None and services.presence is not None and services.presence.is_counted(topic):
            response = add_members(response, _COUNTED)
        if services.tangram is not None:
            response = services.tangram.accept(socket.id, self, response, join.replaces)
        for frame in socket.protocol.accept(join, response):
            socket.transport.send_control(frame)
        services.hub.add(topic, socket, recovery is not None)
        if services.tangram is not None:
            services.tangram.joined(topic)
        if services.pubsub.history is not None:
            services.pubsub.history.follow(topic)
        socket.count_join()
        if meta is not None and services.presence is not None:
            if said_meta is not None or services.config.topic(topic).presence != "plugin":
                services.presence.track(self, self._presence_key, meta)
            services.presence.watch(self)
            if join.replaces is not None:
                services.presence.unwatch(join.replaces)
        if services.pubsub.hooks.joined:
            socket.queue.run(topic, partial(self._call_joined_handlers, join.params))
        if recovery is not None:
            self._make_replay(positioned=True).begin(recovery)

    def _refuse_join(self, join: "Join[Channel]", reason: str, response: Payload | None = None) -> None:
        socket, own = self._socket, self.identity
        socket.count_refusal(reason)
        subject = socket if own is None else SocketInfo(socket.id, own.user, socket.address)
        socket.services.connection_log.join_refused(subject, self.topic, reason, explain(socket.auth, self, reason))
        if join.replaces is not None:
            join.replaces.release()
        for frame in socket.protocol.refuse(join, response or encode_payload({"reason": reason})):
            socket.transport.send_control(frame)

    # Its presence.

    @property
    def _user(self) -> str | None:
        return self._socket.user if self.identity is None else self.identity.user

    @property
    def _presence_key(self) -> str:
        """What it is listed under: its user, or its socket, where that has none."""
        return self._user or self._socket.id

    def rights_changed(self) -> None:
        """End what a renewed token does not allow any more."""
        presence = self._socket.services.presence
        if presence is not None and not self.has_presence:
            presence.unwatch(self)

    @property
    def is_current(self) -> bool:
        """Whether its subscription is still in force, and its client has not gone from handlers that still run."""
        return not self._socket.has_ended and self._socket.protocol.is_current(self)

    @property
    def version(self) -> Version:
        """What its client speaks."""
        return self._socket.version

    # Its history.

    def _is_wanted(self) -> bool:
        """Whether the client still waits for the answer to the join."""
        return not self._socket.is_closed

    def _make_replay(self, *, positioned: bool) -> Replay:
        services = self._socket.services
        history = services.pubsub.history
        assert history is not None, "events have positions where there is one"
        if self.replay is None:
            self.replay = Replay(self, history, services.hub, services.metrics, positioned)
        return self.replay

    def settle(self) -> None:
        """Give the client no more of what it missed, and tell it in its place of what was dropped."""
        if self.replay is not None:
            self.replay.stop()
        self.replay = None  # it refers to this channel: together they would be left to the cycle collector
        notice = partial(self._socket.protocol.dropped_notice, subscription=self)
        self._socket.transport.settle_dropped(self.topic, notice)

    @property
    def recovered_to(self) -> Place | None:
        """How far it has been given what its client missed; None while it gets the live events."""
        return None if self.replay is None else self.replay.place

    def fall_behind(self, position: str) -> None:
        """Give the client, as fast as it reads, the events from a position on, which were dropped."""
        self._make_replay(positioned=False).fall_behind(position)

    @property
    def subscriber(self) -> groups.Subscriber:
        """Its socket, as the hub knows it."""
        return self._socket

    @property
    def transport(self) -> Transport:
        """Its socket's transport."""
        return self._socket.transport

    def lose_events(self) -> None:
        """End the subscription with ``phx_error``: events that it missed are lost."""
        if self.end(Reason.EVENTS_MISSED):
            self._socket.services.metrics.rejoins_requested += 1

    # Its end.

    def leave(self, leave: "Leave[Channel]") -> Continuation:
        """Answer the client's leave, behind the reply to its last push."""
        if self._last_push is not None:
            return self._leave_after(self._last_push, leave)
        socket = self._socket
        if socket.protocol.is_current(self):  # else it was ended from this side while the leave waited
            self.release()
            for frame in socket.protocol.leave(leave):
                socket.transport.send_control(frame)
        return None

    async def _leave_after(self, push: asyncio.Future[None], leave: "Leave[Channel]") -> None:
        await asyncio.wait((push,))
        self.leave(leave)

    def end(self, reason: Reason | None) -> bool:
        """End it from this side: ``phx_error`` with a reason, ``phx_close`` without; False where it has ended."""
        frame = self._socket.protocol.end(self, reason)
        if frame is None:
            return False
        self.release()
        self._socket.transport.send_control(frame)
        return True

    def release(self) -> None:
        """Deliver nothing more; handlers of on_leave are called after what is under way on the topic."""
        socket, topic, services = self._socket, self.topic, self._socket.services
        self._last_push = None
        self.settle()
        if services.presence is not None:
            services.presence.unwatch(self)
        socket.count_events(services.hub.events_for(topic, socket))
        services.hub.remove(topic, socket)
        if services.tangram is not None:
            services.tangram.left(self)
        if topic not in services.hub:
            services.pubsub.unsubscribe(topic)
        socket.queue.run(topic, self._call_leave_handlers)

    def _call_leave_handlers(self) -> Continuation:
        announced = self._socket.announced
        if announced.get(self.topic) is not self:
            return None
        del announced[self.topic]
        leave = hooks.Leave(self._socket, self.topic, self.identity, ChannelActions(self, self._socket))
        return self._socket.services.pubsub.call_leave_handlers(leave)

    # Its pushes.

    def push(self, push: "Push[Channel]") -> Continuation:
        """Pass a push on to handlers, or to the broker, and answer it; later in the coroutine that is returned."""
        socket, topic, pubsub = self._socket, self.topic, self._socket.services.pubsub
        socket.count_push()
        if push.event == RENEWAL:
            return self._renew(push)  # whatever becomes of it: push handlers and subscribers may not see a token
        if not self.may_push:
            self._refuse_push(push, Reason.UNAUTHORIZED)
            return None
        settings = socket.services.config.topic(topic)
        if settings.presence and push.event.startswith(EVENT_PREFIX):
            self._refuse_push(push, Reason.INVALID_EVENT)
            return None
        if settings.client_events and client_events.is_client_event(settings, push.event):
            self._send_client_event(push, settings)
            return None
        if not settings.push:
            self._refuse_push(push, Reason.PUSH_NOT_ALLOWED)
            return None
        if pubsub.hooks.push and (handlers := tuple(hooks.matching(pubsub.hooks.push, topic, push.event))):
            return self._call_push_handlers(push, handlers)
        if not pubsub.can_publish:
            self._refuse_push(push, Reason.BUS_UNAVAILABLE)
            return None
        self._await_published(push, pubsub.publish_push(topic, push.event, push.payload, self._user, socket.id))
        return None

    def _send_client_event(self, push: "Push[Channel]", settings: TopicConfig) -> None:
        """Send a push to the topic's other subscribers, on every node."""
        socket, services = self._socket, self._socket.services
        payload = client_events.outgoing_payload(push.payload, settings, services.config.limits, self._user)
        if isinstance(payload, Reason):
            self._refuse_push(push, payload)
        elif not socket.allows_client_event():
            self._refuse_push(push, Reason.RATE_LIMITED)
            services.connection_log.rate_limited(socket, self.topic, push.event)
        elif not services.pubsub.can_publish:
            self._refuse_push(push, Reason.BUS_UNAVAILABLE)
        else:
            services.metrics.client_events += 1
            sent = services.pubsub.broadcast(self.topic, push.event, payload, socket, Direction.LIVE)
            self._await_published(push, sent)

    def _await_published(self, push: "Push[Channel]", published: asyncio.Future[None]) -> None:
        """Answer a push once the broker has taken it."""
        socket = self._socket
        socket.queue.pending += 1
        self._last_push = published
        published.add_done_callback(partial(self._pushed, push))
        if socket.trace is not None:
            socket.trace.until(published)

    def _pushed(self, push: "Push[Channel]", published: asyncio.Future[None]) -> None:
        """Answer a push: ok only now that the broker has taken it."""
        self._socket.queue.done()
        if self._last_push is published:
            self._last_push = None
        if published.cancelled() or published.exception() is not None:
            self._refuse_push(push, Reason.BUS_UNAVAILABLE)
            return
        self._socket.services.metrics.pushes_out += 1
        self._reply(push, "ok", EMPTY)

    async def _call_push_handlers(self, push: "Push[Channel]", handlers: tuple[Hook, ...]) -> None:
        """Have handlers deal with a push, then publish it, unless one of them stopped it."""
        socket, pubsub = self._socket, self._socket.services.pubsub
        actions = ChannelPushActions(self, socket, partial(self._reply, push))
        request = hooks.Push(socket, self.topic, push.event, push.payload, actions, self.identity)
        answer: Payload | None = None
        for hook in handlers:
            if self._is_stopped(push):
                return
            try:
                value = await pubsub.runner.call_with_result(hook, request, hooks.to_response)
                answer = value if answer is None else answer
            except hooks.Refused as refusal:
                self._refuse_push(push, refusal.reason, refusal.response)
                return
            except hooks.InvalidPayload:
                self._refuse_push(push, Reason.INVALID_PAYLOAD)
                return
            except HandlerError:
                self._refuse_push(push, Reason.INTERNAL)
                return
        if self._is_stopped(push):  # again: handlers may have taken their time
            return
        if request.forwarded and not await self._publish(push, request.user):
            self._refuse_push(push, Reason.BUS_UNAVAILABLE)
        elif answer is not None or not request.replied:
            self._reply(push, "ok", EMPTY if answer is None else answer)

    async def _publish(self, push: "Push[Channel]", user: str | None) -> bool:
        services = self._socket.services
        if not services.pubsub.can_publish:
            return False
        try:
            await services.pubsub.publish_push(self.topic, push.event, push.payload, user, self._socket.id)
        except BusUnavailable:
            return False
        services.metrics.pushes_out += 1
        return True

    async def _renew(self, push: "Push[Channel]") -> None:
        """Take the token that a push brings for the one that was given before."""
        auth = self._socket.auth
        _, token = tokens_in(push.payload)
        reason = None if auth is None else await auth.renew(token, self)
        if reason is None:
            self._reply(push, "ok", EMPTY)
        else:
            self._refuse_push(push, reason)

    def _is_stopped(self, push: "Push[Channel]") -> bool:
        """Refuse a push that had to wait and has lost its permission; False where it may go on."""
        socket = self._socket
        if socket.is_revoked or not socket.protocol.is_current(self):
            socket.services.metrics.refused[SUBSCRIPTION_ENDED] += 1
            return True
        reason = None if socket.auth is None else socket.auth.may_push(self)
        if reason is not None:
            self._refuse_push(push, reason)
        return reason is not None

    def _refuse_push(self, push: "Push[Channel]", reason: str, response: Payload | None = None) -> None:
        self._socket.count_refusal(reason)
        self._reply(push, "error", response or encode_payload({"reason": reason}))

    def _reply(self, push: "Push[Channel]", status: str, response: Payload) -> None:
        """Answer a push; nothing where its subscription has ended, or it asked for no answer."""
        frame = self._socket.protocol.reply(push, status, response)
        if frame is not None:
            self._socket.transport.send_control(frame)
