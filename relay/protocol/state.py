"""The state of one socket, sans I/O: messages in, actions out.

Owns what a socket has joined and under which ``join_ref``; must not know transports, brokers or the clock.

The owner feeds decoded messages to `ChannelsProtocol.receive` and does what the returned action says. A `Join`,
`Leave` or `Push` is answered through the protocol again, so that the wire's rules live in one place::

    message ─► receive() ─► None            dropped: the message was stale
                            Send(frame)     already answered, write it
                            Join            decide, then accept() or refuse()
                            Leave           take the subscriber out, then leave()
                            Push            handle, then reply() – or not

At most one message per topic is under way: the owner finishes one before it feeds the next of that topic.

Source: Phoenix 1.9, ``lib/phoenix/socket.ex: handle_in`` – one clause per situation, in its order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import msgspec

from relay.errors import Reason
from relay.permissions import Identity
from relay.protocol import serializer, topics
from relay.protocol.frame import Frame
from relay.protocol.payload import EMPTY, Payload, encode_payload
from relay.protocol.serializer import Message, Ref, Version

DROPPED_EVENT = "relay:dropped"
"""Tells a slow reader what it missed; publishers cannot send it, since no event from the bus has a colon."""


@dataclass(eq=False, slots=True)
class Subscription:
    """One socket's joined topic (Phoenix calls it a channel). Two are never equal: a rejoin makes a new one."""

    topic: str
    join_ref: Ref
    """The join's ``join_ref``, or its ``ref`` where the client gave none."""
    may_push: bool = True
    """Whether the client has the right to push here; decided once, when it joins."""
    has_presence: bool = True
    """Whether it has the right to be listed here, and to see the members."""
    identity: Identity | None = None
    """Whose token opened it, where the join brought one of its own; else it is the socket's."""


S = TypeVar("S", bound=Subscription)
"""What the owner of a protocol keeps for each joined topic."""


@dataclass(slots=True)
class Send:
    """Write this frame."""

    frame: Frame
    refused: Reason | None = None
    """Why, where the frame refuses something; to be counted."""


@dataclass(slots=True)
class Join(Generic[S]):
    """The client asks for a topic. Decide, then call `ChannelsProtocol.accept` or `ChannelsProtocol.refuse`."""

    subscription: S
    join_ref: Ref
    """As it came, for the reply; may be null."""
    ref: Ref
    params: Payload
    replaces: S | None
    """What this socket had under the same topic: it ends whether the join is accepted or not."""
    began: int = 0
    """When its decision began, as `relay.auth.decisions.Decisions` counts."""


@dataclass(slots=True)
class Leave(Generic[S]):
    """The client gives a topic up. Take the subscriber out, then call `ChannelsProtocol.leave`."""

    subscription: S
    ref: Ref


@dataclass(slots=True)
class Push(Generic[S]):
    """The client pushes an event to a topic it has joined; answer with `ChannelsProtocol.reply`, if at all."""

    subscription: S
    ref: Ref
    event: str
    payload: Payload


Action: TypeAlias = Send | Join[S] | Leave[S] | Push[S]


class ChannelsProtocol(Generic[S]):
    """Joins, refs and stale rules of one socket.

    Args: subscription_type: made of a topic and a ``join_ref`` for each join: `Subscription`, or a class below it.
          version: the serializer negotiated in the handshake.
          topics_max: topics this socket may have joined at a time.
          payload_max_bytes: largest payload of a push.
    """

    __slots__ = ("_joining", "_payload_max_bytes", "_subscription_type", "_topics_max", "subscriptions", "version")

    def __init__(
        self, subscription_type: Callable[[str, Ref], S], version: Version, *, topics_max: int, payload_max_bytes: int
    ) -> None:
        self._subscription_type = subscription_type
        self.version: Version = version
        self.subscriptions: dict[str, S] = {}
        # Topics whose join is being decided: they count towards the limit already.
        self._joining: dict[str, Join[S]] = {}
        self._topics_max = topics_max
        self._payload_max_bytes = payload_max_bytes

    # What the client sent.

    def receive(self, message: Message) -> Action[S] | None:
        """Take one message and say what it asks for. Never raises, whatever the message says.

        Returns: the action, or None for a message under an outdated ``join_ref``: dropped without an answer.
        """
        topic, event = message.topic, message.event
        if _is_heartbeat(message):
            return Send(serializer.encode_reply(self.version, None, message.ref, topic, "ok", EMPTY))
        current = self.subscriptions.get(topic)
        if event == "phx_join":
            return self._receive_join(message, current)
        if current is None:
            if event == "phx_leave":
                return Send(serializer.encode_reply(self.version, message.join_ref, message.ref, topic, "ok", EMPTY))
            return self._error(None, message, Reason.UNMATCHED_TOPIC)
        if message.join_ref is not None and message.join_ref != current.join_ref:
            return None
        if event == "phx_leave":
            return Leave(current, message.ref)
        return self._receive_push(message, current)

    def _receive_join(self, message: Message, current: S | None) -> Action[S]:
        topic = message.topic
        if topic == topics.PROTOCOL_TOPIC:
            return self._error(None, message, Reason.UNMATCHED_TOPIC)
        if not topics.is_topic(topic):
            return self._error(message.join_ref, message, Reason.INVALID_TOPIC)
        if current is None and len(self.subscriptions.keys() | self._joining.keys()) >= self._topics_max:
            return self._error(message.join_ref, message, Reason.TOO_MANY_TOPICS)
        # A rejoin too: what it replaces may be ended from this side before it is decided.
        own_ref = message.ref if message.join_ref is None else message.join_ref
        join = Join(self._subscription_type(topic, own_ref), message.join_ref, message.ref, message.payload, current)
        self._joining[topic] = join
        return join

    def _receive_push(self, message: Message, current: S) -> Action[S]:
        if not topics.is_event(message.event):
            return self._error(current.join_ref, message, Reason.INVALID_EVENT)
        if payload_size(message.payload) > self._payload_max_bytes:
            return self._error(current.join_ref, message, Reason.PAYLOAD_TOO_LARGE)
        return Push(current, message.ref, message.event, message.payload)

    def refuse_unheard(self, message: Message, reason: Reason) -> Send | None:
        """Answer a message that is not dealt with at all; None for one that has to be.

        To refuse a leave would keep what the client gives up, and to refuse a heartbeat cut off one that is alive.
        """
        if message.event == "phx_leave" or _is_heartbeat(message):
            return None
        return self._error(message.join_ref, message, reason)

    def _error(self, join_ref: Ref, message: Message, reason: Reason) -> Send:
        response = encode_payload({"reason": reason})
        frame = serializer.encode_reply(self.version, join_ref, message.ref, message.topic, "error", response)
        return Send(frame, reason)

    # What was decided.

    def accept(self, join: Join[S], response: Payload = EMPTY) -> list[Frame]:
        """Enter the subscription. Returns the frames in wire order: the new join's reply, then the old one's close."""
        topic = join.subscription.topic
        frames = self._answer_join(join, "ok", response)
        self.subscriptions[topic] = join.subscription
        return frames

    def refuse(self, join: Join[S], response: Payload) -> list[Frame]:
        """Refuse the join; a subscription it would have replaced is gone too, as in Phoenix."""
        frames = self._answer_join(join, "error", response)
        self.subscriptions.pop(join.subscription.topic, None)
        return frames

    def _answer_join(self, join: Join[S], status: str, response: Payload) -> list[Frame]:
        topic = join.subscription.topic
        _ = self._joining.pop(topic, None)
        frames = [serializer.encode_reply(self.version, join.join_ref, join.ref, topic, status, response)]
        # One that was ended from this side in the meantime has been notified already.
        if join.replaces is not None and self.is_current(join.replaces):
            frames.append(serializer.encode_close(self.version, join.replaces.join_ref, topic))
        return frames

    def leave(self, leave: Leave[S]) -> list[Frame]:
        """Drop the subscription. Returns the reply, then ``phx_close``."""
        gone = leave.subscription
        del self.subscriptions[gone.topic]
        return [
            serializer.encode_reply(self.version, gone.join_ref, leave.ref, gone.topic, "ok", EMPTY),
            serializer.encode_close(self.version, gone.join_ref, gone.topic),
        ]

    def reply(self, push: Push[S], status: str, response: Payload = EMPTY) -> Frame | None:
        """Answer a push under its ref; None where the client has left in the meantime, or asked for no answer."""
        if push.ref is None or not self.is_current(push.subscription):
            return None
        subscription = push.subscription
        return serializer.encode_reply(
            self.version, subscription.join_ref, push.ref, subscription.topic, status, response
        )

    def end(self, subscription: Subscription, error: str | None = None) -> Frame | None:
        """End a subscription from this side: ``phx_error`` with a reason (rejoin), or ``phx_close`` (do not).

        Returns None where it has ended already.
        """
        if not self.is_current(subscription):
            return None
        del self.subscriptions[subscription.topic]
        if error is None:
            return serializer.encode_close(self.version, subscription.join_ref, subscription.topic)
        return serializer.encode_error(self.version, subscription.join_ref, subscription.topic, error)

    def dropped_notice(self, topic: str, count: int, subscription: Subscription | None = None) -> Frame:
        """Tell of so many events that the client reads too slowly for, under the ``join_ref`` that is in force.

        Args: subscription: that which missed them, where it may have ended already.
        """
        subscription = subscription or self.subscriptions.get(topic)
        join_ref = None if subscription is None else subscription.join_ref
        return serializer.encode_push(self.version, join_ref, topic, DROPPED_EVENT, encode_payload({"dropped": count}))

    def clear(self) -> None:
        """Forget all subscriptions and joins: the socket has ended."""
        self.subscriptions.clear()
        self._joining.clear()

    def joining(self, topic: str) -> Join[S] | None:
        """The join of ``topic`` that is being decided."""
        return self._joining.get(topic)

    def is_current(self, subscription: Subscription) -> bool:
        """Say whether this very subscription is still in force."""
        return self.subscriptions.get(subscription.topic) is subscription


def _is_heartbeat(message: Message) -> bool:
    return message.topic == topics.PROTOCOL_TOPIC and message.event == "heartbeat"


def payload_size(payload: Payload) -> int:
    """Size of a payload in bytes, without copying it."""
    return len(memoryview(payload) if isinstance(payload, msgspec.Raw) else payload)
