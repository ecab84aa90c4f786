"""What plugins' handlers may do on the topic of a channel, from any thread.

Owns the way from a handler's thread into the event loop; must not know what a join or a push leads to.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import msgspec

from relay.channels.groups import Subscriber
from relay.channels.presence import Presence
from relay.channels.presence_topic import Watcher
from relay.channels.pubsub import PubSub
from relay.config import Config
from relay.plugins import hooks
from relay.protocol.payload import Payload


class ActingServices(Protocol):
    """What sockets share, as far as handlers act on it."""

    @property
    def config(self) -> Config:
        """The settings."""

    @property
    def pubsub(self) -> PubSub:
        """The bridge to the broker."""

    @property
    def presence(self) -> Presence | None:
        """The members of topics; None where no topic has presence."""


class ActingSocket(Subscriber, Protocol):
    """The socket of a channel."""

    @property
    def id(self) -> str:
        """Unique among all sockets of all nodes."""

    @property
    def services(self) -> ActingServices:
        """What it shares with the others."""


class ActingChannel(Watcher, Protocol):
    """The channel that handlers act on."""

    has_presence: bool
    """Whether its client may be listed, and be sent the members."""

    @property
    def is_current(self) -> bool:
        """Whether its subscription is still in force."""


class ChannelActions:
    """What handlers may do on the topic of a channel; they may run in threads."""

    __slots__ = ("_channel", "_socket")

    def __init__(self, channel: ActingChannel, socket: ActingSocket) -> None:
        self._channel = channel
        self._socket = socket

    @property
    def relay(self) -> Any:
        return self._socket.services.pubsub.runner.relay

    def broadcast(self, event: str, payload: object, to_all: bool) -> Awaitable[None]:
        hooks.check_event(event)
        pubsub, skip = self._socket.services.pubsub, None if to_all else self._socket
        send = partial(pubsub.broadcast, self._channel.topic, event, hooks.to_payload(payload), skip)
        return pubsub.start_call(send)

    def check_meta(self, meta: object) -> Payload:
        return msgspec.Raw(self._checked(self._socket.id, meta))

    def _checked(self, key: str, meta: object) -> bytes:
        services, topic = self._socket.services, self._channel.topic
        if services.presence is None or not services.config.topic(topic).presence:
            raise ValueError(f"topic {topic!r} has no presence; expected presence in its [[topics]]")
        return services.presence.check(key, bytes(hooks.to_payload(meta)))

    def track(self, key: str, meta: object, is_update: bool = False) -> None:
        cleaned = self._checked(key, meta)
        self._socket.services.pubsub.call_in_loop(partial(self._track, key, cleaned, is_update))

    def _track(self, key: str, meta: bytes, is_update: bool) -> None:
        services, channel = self._socket.services, self._channel
        if services.presence is not None and channel.is_current and channel.has_presence:
            services.presence.track_later(channel, key, meta, is_update=is_update)

    def untrack(self, key: str | None) -> None:
        services = self._socket.services
        if services.presence is not None:
            services.pubsub.call_in_loop(partial(self._untrack, key))

    def _untrack(self, key: str | None) -> None:
        services, channel = self._socket.services, self._channel
        if services.presence is not None and channel.is_current:
            services.presence.untrack_later(channel, key)


class ChannelPushActions(ChannelActions):
    """What handlers of a push may do."""

    __slots__ = ("_reply",)

    def __init__(self, channel: ActingChannel, socket: ActingSocket, reply: Callable[[str, Payload], object]) -> None:
        super().__init__(channel, socket)
        self._reply = reply

    def reply(self, status: str, response: object) -> None:
        self._socket.services.pubsub.call_in_loop(partial(self._reply, status, hooks.to_payload(response)))
