"""`SocketHandle`: what plugins see of a socket. Handlers may run in threads.

Owns the way from a handler's call to the event loop; must not know the socket's messages.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from relay.auth.session import SocketAuth
from relay.channels.pubsub import PubSub
from relay.errors import CloseCode, Reason, close_reason
from relay.plugins import hooks
from relay.protocol import serializer
from relay.protocol.serializer import Version
from relay.protocol.state import Subscription
from relay.transports.base import Transport


class SocketHandle(ABC):
    """The part of a socket that handlers use; `relay.plugins.hooks.Socket` documents it.

    The attributes are set by `relay.channels.socket.Socket`.
    """

    __slots__ = ()

    auth: SocketAuth | None
    transport: Transport
    version: Version

    @property
    @abstractmethod
    def pubsub(self) -> PubSub:
        """The bridge to the broker, which knows the event loop."""

    @property
    @abstractmethod
    def has_ended(self) -> bool:
        """Whether its connection has ended: nothing reaches the client any more."""

    @abstractmethod
    def subscription(self, topic: str) -> Subscription | None:
        """What this socket has joined under ``topic``."""

    @abstractmethod
    def is_joining(self, topic: str) -> bool:
        """Whether a join of ``topic`` is being decided, or waits for that."""

    @abstractmethod
    def close(self, code: int, reason: str) -> bool:
        """Close the socket; False where it was closed already."""

    @abstractmethod
    def end_subscription(self, subscription: Subscription, reason: Reason | None) -> bool:
        """End a subscription with ``phx_error`` or ``phx_close``."""

    @property
    def id(self) -> str:
        """Unique among all sockets of all nodes."""
        return self.transport.id

    @property
    def address(self) -> str | None:
        """The client's address, as the server reports it."""
        return self.transport.address

    @property
    def user(self) -> str | None:
        """Whose socket it is: the subject of its token; None for an anonymous one."""
        return None if self.auth is None else self.auth.identity.user

    @property
    def claims(self) -> Mapping[str, Any]:
        """What the client has proved about itself; empty for an anonymous one."""
        return {} if self.auth is None else self.auth.identity.claims

    @property
    def query(self) -> Mapping[str, str]:
        """The query of the upgrade request: phoenix.js's ``params``."""
        return dict(parse_qsl(self.transport.query_string.decode("latin-1"), keep_blank_values=True))

    def push(self, topic: str, event: str, payload: object) -> bool:
        """Send an event to this socket alone; False where it has not joined ``topic``, or has ended."""
        hooks.check_event(event)
        subscription = self.subscription(topic)
        if subscription is None or self.has_ended:
            return False
        frame = serializer.encode_push(self.version, subscription.join_ref, topic, event, hooks.to_payload(payload))
        self.pubsub.call_in_loop(partial(self.transport.send_control, frame))
        return True

    def leave(self, topic: str) -> bool:
        """End its subscription with ``phx_close``, and refuse a join that is being decided; False for neither."""
        found = self.subscription(topic) is not None or self.is_joining(topic)
        if found:
            self.pubsub.call_in_loop(partial(self._leave, topic))
        return found

    def _leave(self, topic: str) -> None:
        self.pubsub.decisions.overtake(self, topic)
        subscription = self.subscription(topic)
        if subscription is not None:
            self.end_subscription(subscription, None)

    def disconnect(self, reason: str = "") -> None:
        """Close the socket with 1001."""
        text = close_reason(reason or "disconnected by the server")
        self.pubsub.call_in_loop(partial(self.close, CloseCode.GOING_AWAY, text))
