"""Writing a plugin: a module with ``plugin = Plugin("name")``, whose functions hook into the relay.

    from relay import Plugin, Push, Refused

    plugin = Plugin("chat")

    @plugin.on_push("room:*", "new_msg")
    async def new_msg(push: Push) -> None:
        if not push.payload.get("text"):
            raise Refused("nothing to say")
        await push.broadcast("new_msg", push.payload)

Owns what a plugin's author writes; `relay.plugins.hooks` says what each handler is given.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from relay.errors import RelayError
from relay.patterns import event_pattern_fault, topic_pattern_fault
from relay.plugins.handlers import Handler, check_handler, is_async
from relay.plugins.hooks import (
    Event,
    Hook,
    HookTable,
    Join,
    Joined,
    Leave,
    Push,
    RedisMessage,
)
from relay.protocol.topics import RENEWAL, RESERVED_EVENT_PREFIXES, RESERVED_TOPICS

if TYPE_CHECKING:
    from fastapi import APIRouter

F = TypeVar("F", bound=Handler)

# What handlers look like, for editors and type checkers: a handler of the wrong kind is marked where it is written.
# `Any` stands for the `relay.Relay` that handlers are given: this module lies below it.
_JoinAnswer = Mapping[str, Any] | None
_EventAnswer = Event | None
JoinHandler = TypeVar("JoinHandler", bound=Callable[[Join], _JoinAnswer | Awaitable[_JoinAnswer]])
JoinedHandler = TypeVar("JoinedHandler", bound=Callable[[Joined], Awaitable[None] | None])
LeaveHandler = TypeVar("LeaveHandler", bound=Callable[[Leave], Awaitable[None] | None])
PushHandler = TypeVar("PushHandler", bound=Callable[[Push], object])
EventHandler = TypeVar("EventHandler", bound=Callable[[Event], _EventAnswer | Awaitable[_EventAnswer]])
RedisHandler = TypeVar("RedisHandler", bound=Callable[[RedisMessage, Any], Awaitable[None] | None])
Service = TypeVar("Service", bound=Callable[[Any], Awaitable[None]])
LifetimeHandler = TypeVar("LifetimeHandler", bound=Callable[[Any], Awaitable[None] | None])

_PARAMETERS = {
    "join": ("join",),
    "joined": ("joined",),
    "leave": ("leave",),
    "push": ("push",),
    "event": ("event",),
    "redis": ("message", "relay"),
    "services": ("relay",),
    "startup": ("relay",),
    "shutdown": ("relay",),
}
"""What the handlers of each kind are given."""


class Plugin:
    """A named collection of handlers.

    Args: name: letters, digits, ``-`` and ``_``; shown by ``relay plugins``, in logs and in metrics.

    A handler is a coroutine function, or a plain function, which runs in a thread and may block (except for
    on_event, where it runs in the event loop). Methods, partials and objects with ``__call__`` work too. A handler
    whose parameters do not fit its hook raises TypeError when it is registered; a pattern that cannot match,
    ValueError; one that comes after ``Relay(…)`` has loaded the plugin, RelayError. An exception in a handler is logged
    and counted, and affects only the call that it was made for; so does a handler that takes longer than
    ``plugins.timeout_s``. A topic pattern has ``*`` for any text, ``?`` for one character, ``[abc]`` for one of these.
    """

    def __init__(self, name: str) -> None:
        if not str(name).replace("-", "_").isidentifier() or not isinstance(name, str):
            raise ValueError(f"expected a plugin name of letters, digits, - and _, got {name!r}")
        self.name: str = name
        self.hooks: HookTable = HookTable()
        """The handlers, in the order of definition."""
        self.routers: list[APIRouter] = []
        """The REST routes."""
        self.is_loaded: bool = False
        """Whether a relay has taken its handlers and routes: none can be added any more."""

    def on_join(self, topic: str = "*") -> Callable[[JoinHandler], JoinHandler]:
        """Accept or refuse joins: ``handler(join: Join) -> dict | None``.

        Return None to accept, or a dict to accept and add it to the join reply; raise `Refused` to refuse. All
        matching handlers are called, in order, until one refuses. `on_leave` is called at the end of accepted joins.
        """
        return self._hook("join", topic)

    def on_joined(self, topic: str = "*") -> Callable[[JoinedHandler], JoinedHandler]:
        """Called after the reply to an accepted join: ``handler(joined: Joined) -> None``.

        The place to list the subscription as a member, by ``joined.track``, and to send the client what it needs first.
        The socket's further messages on that topic wait until it returns.
        """
        return self._hook("joined", topic)

    def on_leave(self, topic: str = "*") -> Callable[[LeaveHandler], LeaveHandler]:
        """Called when a subscription has ended, for any reason: ``handler(leave: Leave) -> None``.

        Called once for each accepted join, after the messages in progress on that topic of the socket, and before
        its next join of the topic.
        """
        return self._hook("leave", topic)

    def on_push(self, topic: str = "*", event: str = "*") -> Callable[[PushHandler], PushHandler]:
        """Handle pushes: ``handler(push: Push) -> response | None``.

        The returned value, if not None, is the reply's response; raise `Refused` for an error reply. All matching
        handlers are called, in order, until one refuses; the first value returned is the reply. Then the push is
        published to Redis, unless a handler called ``push.stop()``; without a handler's reply it is answered ``{}``.
        Pushes of one socket to one topic are handled in order.
        """
        return self._hook("push", topic, event)

    def on_event(self, topic: str = "*", event: str = "*") -> Callable[[EventHandler], EventHandler]:
        """Called for each event before its delivery: ``handler(event: Event) -> Event | None``.

        Return the event, or ``event.replace(payload)``, or None to drop it. An exception drops it too. A plain
        function runs in the event loop and must not block. Events of one topic stay in order; a coroutine function
        delays the later events of its topic while it waits.
        """
        return self._hook("event", topic, event)

    def on_redis(self, channel: str) -> Callable[[RedisHandler], RedisHandler]:
        """Receive messages of other Redis channels: ``handler(message: RedisMessage, relay: Relay) -> None``.

        ``channel`` is a Redis pattern (PSUBSCRIBE). Messages are handled in order, one at a time per handler;
        messages over 10 000 that wait are dropped and counted. Every relay process receives every message.
        """
        return self._hook("redis", channel)

    def service(self, function: Service) -> Service:
        """Run ``async function(relay: Relay)`` in the background, in every relay process, while relay runs.

        If it returns or raises, it is restarted, after 1 s at first and up to 30 s later. It is cancelled when relay
        stops. Raises TypeError for a plain function.
        """
        check_handler("service", function, "relay")
        if not is_async(function):
            raise TypeError(f"expected a service to be a coroutine function (async def), got {function!r}")
        return self._hook("services", "*")(function)

    def on_startup(self, function: LifetimeHandler) -> LifetimeHandler:
        """Call ``function(relay: Relay)`` before the first socket is served. If it raises, relay does not start."""
        return self._hook("startup", "*")(function)

    def on_shutdown(self, function: LifetimeHandler) -> LifetimeHandler:
        """Call ``function(relay: Relay)`` after the last socket has closed; also if relay did not start."""
        return self._hook("shutdown", "*")(function)

    def include_router(self, router: "APIRouter") -> None:
        """Add REST routes: FastAPI's APIRouter, added to relay's REST API or to your application."""
        if not hasattr(router, "routes"):
            raise TypeError(f"include_router: expected an APIRouter, got {router!r:.200}")
        self._check_open("include_router")
        self.routers.append(router)

    def _hook(self, kind: str, topic: str, event: str = "*") -> Callable[[F], F]:
        name = kind if kind == "services" else f"on_{kind}"
        for pattern in (topic, event):
            given: object = pattern
            if isinstance(given, str):
                continue
            if callable(given):
                raise TypeError(f"{name}: expected parentheses, @plugin.{name}(…), before the function {given!r:.200}")
            raise TypeError(f"{name}: expected a pattern as text, got {given!r:.200}")
        fault = topic_pattern_fault(topic, RESERVED_TOPICS) or event_pattern_fault(event, RESERVED_EVENT_PREFIXES)
        if kind == "push" and event == RENEWAL:
            fault = f"{event!r} never matches: relay itself takes such a push, with which a client renews its token"
        if fault and (kind != "redis" or not topic):  # Redis has patterns of its own
            raise ValueError(f"{name}: {fault}")

        def register(function: F) -> F:
            check_handler(name, function, *_PARAMETERS[kind])
            self._check_open(name)
            self.hooks.add(kind, Hook(self.name, function, topic, event))
            return function

        return register

    def _check_open(self, what: str) -> None:
        """Refuse what no relay would know of. Raises RelayError."""
        if self.is_loaded:
            raise RelayError(
                f"{what}: expected it before a Relay loads the plugin {self.name}, which never calls what comes later; "
                "write it above Relay(…): in a handler, push.relay is the relay"
            )

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}: {len(hooks)}" for kind, hooks in self.hooks.entries.items())
        return f"<Plugin {self.name} ({counts})>"
