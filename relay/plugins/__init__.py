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

from relay.plugins.hooks import (
    Event,
    Handler,
    Hook,
    HookTable,
    Join,
    Leave,
    Push,
    RedisMessage,
    check_handler,
    is_async,
)

if TYPE_CHECKING:
    from fastapi import APIRouter

F = TypeVar("F", bound=Handler)

# What handlers look like, for editors and type checkers: a handler of the wrong kind is marked where it is written.
# `Any` stands for the `relay.Relay` that handlers are given: this module lies below it.
_JoinAnswer = Mapping[str, Any] | None
_EventAnswer = Event | None
JoinHandler = TypeVar("JoinHandler", bound=Callable[[Join], _JoinAnswer | Awaitable[_JoinAnswer]])
LeaveHandler = TypeVar("LeaveHandler", bound=Callable[[Leave], Awaitable[None] | None])
PushHandler = TypeVar("PushHandler", bound=Callable[[Push], object])
EventHandler = TypeVar("EventHandler", bound=Callable[[Event], _EventAnswer | Awaitable[_EventAnswer]])
RedisHandler = TypeVar("RedisHandler", bound=Callable[[RedisMessage, Any], Awaitable[None] | None])
Service = TypeVar("Service", bound=Callable[[Any], Awaitable[None]])
LifetimeHandler = TypeVar("LifetimeHandler", bound=Callable[[Any], Awaitable[None] | None])

_PARAMETERS = {
    "join": ("join",),
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

    Args: name: shown by ``relay plugins``, in logs and metrics: letters, digits, ``-`` and ``_``.

    A handler is a coroutine function, or a plain function, which runs in a thread (on_event: in the event loop) and
    may block; or anything else that is called like one: a method, a partial, an object with ``__call__``. One that
    cannot be called with what its hook gives it is refused where it is registered, with a TypeError. One that raises
    is logged and counted, and costs what it was called for, nothing else; so does one that takes longer than
    ``plugins.timeout_s``. A topic pattern has ``*`` for any text, ``?`` for one character, ``[abc]`` for one of these.
    """

    def __init__(self, name: str) -> None:
        if not name or not name.replace("-", "_").isidentifier():
            raise ValueError(f"expected a plugin name of letters, digits, - and _, got {name!r}")
        self.name: str = name
        self.hooks: HookTable = HookTable()
        """The handlers, in the order of definition."""
        self.routers: list[APIRouter] = []
        """The REST routes."""

    def on_join(self, topic: str = "*") -> Callable[[JoinHandler], JoinHandler]:
        """Decide on joins: ``handler(join: Join) -> dict | None``.

        Return None to allow, or a dict to allow and add it to the join reply; raise `Refused` to refuse. All
        matching handlers are asked, in order, until one refuses. What they allow, `on_leave` hears the end of.
        """
        return self._hook("join", topic)

    def on_leave(self, topic: str = "*") -> Callable[[LeaveHandler], LeaveHandler]:
        """Learn that a subscription has ended, for whatever reason: ``handler(leave: Leave) -> None``.

        Called once for each join that `on_join` allowed, after what was under way on the socket's topic, and before
        the socket's next join there.
        """
        return self._hook("leave", topic)

    def on_push(self, topic: str = "*", event: str = "*") -> Callable[[PushHandler], PushHandler]:
        """Handle pushes: ``handler(push: Push) -> response | None``.

        The returned value, if not None, is the reply's response; raise `Refused` for an error reply. All matching
        handlers are called, in order, until one refuses; the first value returned is the reply. Then the push goes
        on to Redis, unless a handler called ``push.stop()``; without a handler's reply it is answered with ``{}``.
        Pushes of one socket to one topic are handled in order.
        """
        return self._hook("push", topic, event)

    def on_event(self, topic: str = "*", event: str = "*") -> Callable[[EventHandler], EventHandler]:
        """See each event on its way out: ``handler(event: Event) -> Event | None``.

        Return it, or ``event.replace(payload)``, or None to drop it. A handler that raises drops it too. A plain
        function runs in the event loop: it must not block. Events of one topic stay in order; a coroutine function
        holds up its topic while it waits.
        """
        return self._hook("event", topic, event)

    def on_redis(self, channel: str) -> Callable[[RedisHandler], RedisHandler]:
        """Listen to Redis channels of somebody else's: ``handler(message: RedisMessage, relay: Relay) -> None``.

        ``channel`` is a Redis pattern (PSUBSCRIBE). Messages are handled in order, one at a time per handler;
        messages over 10 000 that wait are dropped and counted. Every relay process receives every message.
        """
        return self._hook("redis", channel)

    def service(self, function: Service) -> Service:
        """Run ``async function(relay: Relay)`` in the background, in every relay process, while the relay runs.

        When it ends or raises, it is started again, after 1 s at first and 30 s at most. When the relay stops, it is
        cancelled. Raises TypeError for a plain function.
        """
        check_handler("service", function, "relay")
        if not is_async(function):
            raise TypeError(f"expected a service to be a coroutine function (async def), got {function!r}")
        return self._hook("services", "*")(function)

    def on_startup(self, function: LifetimeHandler) -> LifetimeHandler:
        """Call ``function(relay: Relay)`` before the first socket is served. If it raises, the start is stopped."""
        return self._hook("startup", "*")(function)

    def on_shutdown(self, function: LifetimeHandler) -> LifetimeHandler:
        """Call ``function(relay: Relay)`` after the last socket has gone; also where the start was stopped."""
        return self._hook("shutdown", "*")(function)

    def include_router(self, router: "APIRouter") -> None:
        """Add REST routes: FastAPI's APIRouter, mounted in the relay's REST app or in the team's own."""
        if not hasattr(router, "routes"):
            raise TypeError(f"include_router: expected an APIRouter, got {router!r:.200}")
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
        if not topic or not event:
            raise ValueError(f"{name}: an empty pattern matches nothing; expected * for everything")

        def register(function: F) -> F:
            check_handler(name, function, *_PARAMETERS[kind])
            self.hooks.add(kind, Hook(self.name, function, topic, event))
            return function

        return register

    def __repr__(self) -> str:
        counts = ", ".join(f"{kind}: {len(hooks)}" for kind, hooks in self.hooks.entries.items())
        return f"<Plugin {self.name} ({counts})>"
