"""What a plugin can hook into: what each hook is given, and who is called for a topic, in which order.

Owns the hooks' signatures; must not know who calls them or how. Handlers are called in the order their plugins were
loaded, and within a plugin in the order of definition. Of one socket and topic, joins, pushes and leaves are handled
in order, one at a time.

    on_join(join)              allow by returning None, or a dict for the join reply; refuse by raising `Refused`
    on_joined(joined)          an allowed join has been answered
    on_leave(leave)            what on_join allowed has ended, for whatever reason
    on_push(push)              answer by returning a value, `push.reply`, or raising `Refused`
    on_event(event)            an event on its way out: return it, changed or not, or None to drop it
    on_redis(message, relay)   a message on a raw Redis channel of another program
    service(relay)             a background task for as long as the relay runs
"""

import math
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol

import msgspec

from relay.errors import RelayError
from relay.permissions import Identity
from relay.plugins.handlers import Handler, is_async
from relay.protocol.payload import NESTING_MAX, Payload, is_deeper
from relay.protocol.topics import is_event, is_name


class Refused(RelayError):
    """Raised by a handler to refuse a join or a push.

    Args:   reason: sent to the client as ``{"reason": reason}``.
            details: further members of that object.
    Raises: TypeError: the reason is not a string, or the details are not JSON-serializable.
    """

    def __init__(self, reason: str, **details: Any) -> None:
        super().__init__(reason)
        if not isinstance(reason, str):
            raise TypeError(f"expected a reason as text, got {reason!r}")
        self.reason: str = reason
        # Encoded here, so that a fault is met where the handler is, not where its answer is sent.
        self.response: Payload = to_payload({"reason": reason, **details})


class Socket(Protocol):
    """The socket of a join, push or leave. Its attributes and methods may be used in a thread."""

    @property
    def id(self) -> str:
        """Unique among all sockets of all nodes."""

    @property
    def address(self) -> str | None:
        """The client's address, as the server reports it."""

    @property
    def query(self) -> Mapping[str, str]:
        """The query parameters of the upgrade request: ``params`` of phoenix.js."""

    @property
    def user(self) -> str | None:
        """The subject of the socket's token; None for an anonymous one. A topic may be joined by another user."""

    @property
    def claims(self) -> Mapping[str, Any]:
        """The claims of the socket's token; empty for an anonymous one."""

    def push(self, topic: str, event: str, payload: object) -> bool:
        """Send an event to this socket only; returns False if it has not joined ``topic``.

        Args:   payload: a JSON-serializable value, or ``bytes`` for a binary event.
        Raises: ValueError: an invalid event name; TypeError: the payload is not JSON-serializable.
        """

    def leave(self, topic: str) -> bool:
        """End its subscription with ``phx_close``: the client does not rejoin. Returns False if there is none.

        A join of ``topic`` in progress is refused with ``removed by the server``.
        """

    def disconnect(self, reason: str = "") -> None:
        """Close the socket with 1001; the client reconnects unless authentication refuses it."""


class InvalidPayload(RelayError, ValueError):
    """A payload that is JSON and that Python cannot read: a number too large or too long, nested too deep.

    It is the fault of who sent it: a push or a join is refused with ``invalid payload``, an event is dropped.
    """

    def __init__(self, carrier: "_WithPayload", text: str) -> None:
        super().__init__(f"the payload cannot be read: {text}")
        self.carrier: _WithPayload = carrier
        """Whose payload it is."""


class _WithPayload:
    """A payload, decoded when it is first asked for."""

    __slots__ = ("_decoded", "data")

    def __init__(self, data: Payload) -> None:
        self.data: Payload = data
        """The payload as it came: JSON text in a `msgspec.Raw`, or the bytes of a binary frame."""
        self._decoded: Any = msgspec.UNSET

    @property
    def payload(self) -> Any:
        """The payload as Python values; ``bytes`` stay bytes. Raises InvalidPayload, a ValueError."""
        if self._decoded is msgspec.UNSET:
            try:
                decoded = msgspec.json.decode(self.data) if isinstance(self.data, msgspec.Raw) else self.data
            except (ValueError, msgspec.MsgspecError, RecursionError) as error:
                raise InvalidPayload(self, str(error)) from None
            if isinstance(self.data, msgspec.Raw) and is_deeper(bytes(self.data), NESTING_MAX):
                raise InvalidPayload(self, f"nested deeper than {NESTING_MAX} levels")
            self._decoded = decoded
        return self._decoded


class SocketInfo(NamedTuple):
    """Who acts, as a line of the log names it: a socket, and the user on whose behalf it does."""

    id: str
    user: str | None
    address: str | None


class _WithUser:
    """Something that a socket does on a topic, on behalf of a user."""

    __slots__ = ()

    socket: Socket
    _identity: Identity | None

    @property
    def user(self) -> str | None:
        """On whose behalf: the subject of the join's own token, else of the socket's; None for an anonymous client."""
        return self.socket.user if self._identity is None else self._identity.user

    @property
    def claims(self) -> Mapping[str, Any]:
        """What that token says; empty for an anonymous client."""
        return self.socket.claims if self._identity is None else self._identity.claims


class TopicActions(Protocol):
    """What a handler may do on a topic, from any thread."""

    @property
    def relay(self) -> Any:
        """The `relay.Relay` that calls the handler."""

    def broadcast(self, event: str, payload: object, to_all: bool) -> Awaitable[None]:
        """Send an event to the topic's subscribers, with or without the client itself."""

    def check_meta(self, meta: object) -> Payload:
        """Check what is to be said of a member of the topic. Raises ValueError, TypeError."""

    def track(self, key: str, meta: object, is_update: bool = False) -> None:
        """List the subscription as a member of the topic, or, with ``is_update``, change what is said of it."""

    def untrack(self, key: str | None) -> None:
        """List it no more."""


class PushActions(TopicActions, Protocol):
    """What a handler may do with a push, from any thread."""

    def reply(self, status: str, response: object) -> None:
        """Reply to the client, if it is still there. Raises TypeError: the response is not JSON-serializable."""


class _NoActions:
    """Of a join or a leave that a test has made."""

    def __getattr__(self, name: str) -> Any:
        raise RelayError(f"{name}: expected an object that relay has given to a handler")


_NO_ACTIONS: Any = _NoActions()


class _WithActions:
    """What can be done on the topic of a join, a leave or a push. May be used in a thread."""

    __slots__ = ()

    _actions: TopicActions

    @property
    def relay(self) -> Any:
        """The `relay.Relay` that calls the handler."""
        return self._actions.relay

    def broadcast(self, event: str, payload: object) -> Awaitable[None]:
        """Send an event to all subscribers of the topic, on every node.

        It starts at once. A coroutine function awaits it to find out whether the bus has accepted it; in a plain
        function the call returns then. ``payload`` is JSON-serializable, or ``bytes``.

        Raises: ValueError: an invalid event name; TypeError: the payload is not JSON-serializable; BusUnavailable.
        """
        return self._actions.broadcast(event, payload, True)

    def broadcast_from(self, event: str, payload: object) -> Awaitable[None]:
        """The same for all subscribers except this socket."""
        return self._actions.broadcast(event, payload, False)


class _WithPresence(_WithActions):
    """A subscription that is in force, as others may see it."""

    __slots__ = ()

    def track(self, key: str, meta: object) -> None:
        """List the subscription as a member of the topic, under a key; or change what is said of it there.

        It has no effect without the permission, or once the subscription has ended, as its listing does then. Changes
        over ``limits.presence_per_s`` are held back; of those under one key the newest is made.

        Args:   meta: an object for JSON.
        Raises: ValueError: the topic has no presence, an invalid key or meta; TypeError: not JSON-serializable.
        """
        self._actions.track(key, meta)

    def update(self, key: str, meta: object) -> None:
        """Change what is said of it under a key; no effect if it is not listed there. Raises as `track`."""
        self._actions.track(key, meta, True)

    def untrack(self, key: str | None = None) -> None:
        """List it no more under a key, or under any."""
        self._actions.untrack(key)


class Join(_WithUser, _WithActions, _WithPayload):
    """A join; ``payload`` is its params: in phoenix.js the second argument of ``socket.channel``."""

    __slots__ = ("_actions", "_identity", "meta", "socket", "topic")

    def __init__(
        self,
        socket: Socket,
        topic: str,
        data: Payload,
        identity: Identity | None = None,
        actions: TopicActions = _NO_ACTIONS,
    ) -> None:
        super().__init__(data)
        self.meta: Payload | None = None
        """What `set_presence` was given."""
        self._identity = identity
        self._actions = actions
        self.socket: Socket = socket
        """Who asks."""
        self.topic: str = topic
        """What for."""

    def set_presence(self, meta: object) -> None:
        """List the subscription as a member of the topic with this ``meta``, not with what the client says of itself.

        It is listed under its user, or its socket, once the join is accepted; also where ``presence = "plugin"``.
        ``meta`` is an object for JSON. For handlers of on_join.

        Raises: ValueError: the topic has no presence, an invalid meta; TypeError: not JSON-serializable.
        """
        self.meta = self._actions.check_meta(meta)


class Joined(_WithPresence, Join):
    """A join that was accepted, and from then on the subscription; may be kept, and used in a thread."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Leave(_WithUser, _WithActions):
    """The end of a subscription: the client left, joined again, disconnected, or was removed."""

    socket: Socket
    """Whose it was; may be closed already."""
    topic: str
    """What it was for."""
    _identity: Identity | None = field(default=None, repr=False)
    _actions: TopicActions = field(default=_NO_ACTIONS, repr=False, compare=False)


class Push(_WithUser, _WithPresence, _WithPayload):
    """A push of a client on a topic that it has joined. Attributes and methods may be used in a thread."""

    __slots__ = ("_actions", "_identity", "event", "forwarded", "replied", "socket", "topic")

    _actions: PushActions

    def __init__(
        self,
        socket: Socket,
        topic: str,
        event: str,
        data: Payload,
        actions: PushActions,
        identity: Identity | None = None,
    ) -> None:
        super().__init__(data)
        self._identity = identity
        self.socket: Socket = socket
        """Who pushes."""
        self.topic: str = topic
        """Where to."""
        self.event: str = event
        """What it calls the push."""
        self._actions: PushActions = actions
        self.forwarded: bool = True
        """Whether the push goes on to Redis, as ``from:<topic>:<event>``; see `stop`."""
        self.replied: bool = False
        """Whether a handler has answered, or has decided that there is no answer."""

    def reply(self, response: object = None, status: str = "ok") -> None:
        """Reply now, also after the handler has returned; may be called several times.

        It has no effect if the client has left, or requested no reply. The published phoenix client uses the first
        reply to a push and ignores others.

        Args:   response: a JSON-serializable value; None is sent as ``{}``.
                status: ``ok``, ``error``, or another status that the client handles.
        Raises: TypeError: the response is not JSON-serializable; ValueError: ``status`` is no text of 1 to 255 bytes.
        """
        _check_status(status)
        self.replied = True
        self._actions.reply(status, {} if response is None else response)

    def no_reply(self) -> None:
        """Do not reply when the handlers have returned; `reply` may be called later."""
        self.replied = True

    def stop(self) -> None:
        """Do not publish the push to Redis."""
        self.forwarded = False


class Event(_WithPayload):
    """An event on its way from the bus to the subscribers of its topic."""

    __slots__ = ("event", "topic")

    def __init__(self, topic: str, event: str, data: Payload) -> None:
        super().__init__(data)
        self.topic: str = topic
        """Where to."""
        self.event: str = event
        """What it is called."""

    def replace(self, payload: object = msgspec.UNSET, *, event: str | None = None) -> "Event":
        """A copy with another payload, or another event name.

        Raises: ValueError: an invalid event name; TypeError: the payload is not JSON-serializable.
        """
        if event is not None:
            check_event(event)
        data = self.data if payload is msgspec.UNSET else to_payload(payload)
        return Event(self.topic, self.event if event is None else event, data)


@dataclass(frozen=True, slots=True)
class RedisMessage:
    """A message on a Redis channel that a plugin listens to."""

    channel: str
    """Name of the Redis channel."""
    data: bytes
    """The message as it was published."""


def _plain(value: Any) -> Any:
    """Make what msgspec can write of what it cannot: Pydantic models, and mappings that are no dict."""
    dump = getattr(type(value), "model_dump", None)
    if callable(dump):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is not JSON-serializable")


def to_payload(value: object) -> Payload:
    """Make a payload of what code gives: ``bytes`` stay bytes, all else becomes JSON.

    Besides what JSON has, at any depth: Pydantic models, dataclasses, enums, dates and times, UUIDs, decimals, sets.

    Raises: TypeError: what is not JSON-serializable, NaN and infinite numbers among it.
    """
    if isinstance(value, msgspec.Raw | bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    try:
        data = msgspec.json.encode(value, enc_hook=_plain)
        # msgspec writes null for them; only where one stands is there anything to look for.
        if b"null" in data and _holds_no_number(msgspec.to_builtins(value, enc_hook=_plain)):
            raise ValueError("NaN and infinite numbers are no JSON")
        return msgspec.Raw(data)
    # A type that is unknown, half a surrogate pair, a list that contains itself; or whatever a model's own code raises.
    except Exception as error:
        why = str(error) or type(error).__name__
        raise TypeError(
            "expected a payload that is JSON-serializable (dict, list, text, number, bool, None, a Pydantic model, a "
            f"dataclass, a datetime) or bytes, got {type(value).__name__}: {why}"
        ) from error


def _holds_no_number(value: object) -> bool:
    """Whether a number among it is NaN or infinite, at any depth."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, float) and not math.isfinite(one):
            return True
        if isinstance(one, dict | list | tuple | set | frozenset):
            waiting.extend(one.values() if isinstance(one, dict) else one)
    return False


def check_event(event: str) -> None:
    """Check an event's name that a handler gives. Raises ValueError."""
    if not is_event(event):
        raise ValueError(f"expected an event of 1 to 255 bytes without colon, not phx_… or chan_reply_…, got {event!r}")


def _check_status(status: object) -> None:
    if not isinstance(status, str) or not is_name(status):
        raise ValueError(f"status: expected text of 1 to 255 bytes without control characters, got {status!r:.100}")


def to_response(answer: object) -> Payload | None:
    """Make a reply's response of what a handler of pushes returned; None stays None. Raises TypeError."""
    return None if answer is None else to_payload(answer)


def add_response(response: dict[str, Any], answer: object) -> None:
    """Add what a handler of joins returned. Raises TypeError where it is no dict for JSON: False is no refusal."""
    if answer is None:
        return
    data = to_payload(answer)  # here, so that a fault is met where the handler is
    # Read again: a mapping with code of its own need not say the same, or anything, the next time.
    found = msgspec.json.decode(data) if isinstance(data, msgspec.Raw) else None
    if not isinstance(found, dict):
        raise TypeError(f"expected None or a dict, got {answer!r}")
    response.update(found)


@dataclass(frozen=True, slots=True)
class Hook:
    """One handler, and what it is for."""

    plugin: str
    function: Handler
    topic: str = "*"
    """Pattern of topics (for on_redis, of Redis channels): ``*`` any text, ``?`` one character, ``[ab]`` a or b."""
    event: str = "*"
    """Pattern of events, likewise."""
    is_async: bool = field(init=False, repr=False, compare=False)
    """Whether calling it gives a coroutine."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_async", is_async(self.function))

    def __hash__(self) -> int:
        # By identity: an object that can be called need not have a hash.
        return hash((self.plugin, id(self.function), self.topic, self.event))

    @property
    def name(self) -> str:
        """What the handler is called."""
        return getattr(self.function, "__qualname__", None) or repr(self.function)

    def matches(self, topic: str, event: str = "") -> bool:
        """Say whether it is to be called."""
        return fnmatchcase(topic, self.topic) and (self.event == "*" or fnmatchcase(event, self.event))


@dataclass(frozen=True, slots=True)
class Hooks:
    """All handlers of all plugins, fixed at start-up, in the order they are called."""

    join: tuple[Hook, ...] = ()
    joined: tuple[Hook, ...] = ()
    leave: tuple[Hook, ...] = ()
    push: tuple[Hook, ...] = ()
    event: tuple[Hook, ...] = ()
    redis: tuple[Hook, ...] = ()
    services: tuple[Hook, ...] = ()
    startup: tuple[Hook, ...] = ()
    shutdown: tuple[Hook, ...] = ()


@dataclass(slots=True)
class HookTable:
    """Hooks while they are being collected, by the names of `Hooks`'s fields."""

    entries: dict[str, list[Hook]] = field(default_factory=dict)

    def add(self, kind: str, hook: Hook) -> None:
        """Add a handler behind those of its kind."""
        self.entries.setdefault(kind, []).append(hook)

    def freeze(self) -> Hooks:
        """The finished table."""
        return Hooks(**{kind: tuple(hooks) for kind, hooks in self.entries.items()})


def matching(hooks: tuple[Hook, ...], topic: str, event: str = "") -> Iterator[Hook]:
    """Those of ``hooks`` that are to be called, in order."""
    return (hook for hook in hooks if hook.matches(topic, event))
