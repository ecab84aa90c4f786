"""`Relay`: the ASGI application, and what a team's own code and its plugins call.

Owns the application's public interface: settings, plugins, routes, and the start and stop of the node.
"""

import asyncio
import logging
import re
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import msgspec
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Mount
from starlette.types import ASGIApp

from relay.auth.api_key import ApiKeyAuth, api_key_from
from relay.auth.authenticator import Authenticate
from relay.auth.sealing import secret_of
from relay.brokers.base import Link
from relay.channels.event_stream import EventStream
from relay.channels.socket import Socket
from relay.config import EMBEDDED, Config
from relay.config_sources import from_arguments, load
from relay.errors import ConfigError, RelayError
from relay.extras import apply_extras, describe, missing
from relay.log import RateLimitedLoggers
from relay.metrics import IDLE, REFUSED_STATE, Metrics, ProcessState
from relay.node import Components, Node
from relay.paths import route_path, segments
from relay.plugins import Plugin
from relay.plugins.builtins import builtin_plugins
from relay.plugins.handlers import check_handler
from relay.plugins.loader import PluginSet, check_plugins, load_plugins
from relay.protocol.presence import metas_by_key
from relay.proxy_headers import apply_forwarded_headers, hosts_of, parse_networks
from relay.service_links import log_service_links
from relay.telemetry import Telemetry
from relay.threadsafe import FORKED, LOOP_HAS_ENDED, ONE_LOOP, Call
from relay.tracing import Tracer
from relay.transports import handshake, long_poll_request
from relay.transports.base import ReceiveCallable, Scope, SendCallable
from relay.transports.handshake import HandshakeRejected
from relay.transports.network_access import SEVERAL_HOSTS, NetworkAccess
from relay.web import pages
from relay.web.console import Console
from relay.web.deferred import DeferredApp
from relay.web.own_paths import CONSOLE_SOCKET, OwnPaths, check_install
from relay.web.prometheus import MetricsExporter

if TYPE_CHECKING:
    from relay.auth.keys import Key
    from relay.web.plugin_routes import PluginRoutes
    from relay.web.proxy import Proxy

_logger = logging.getLogger("relay")


class Relay:
    """An ASGI application: serve it alone, or mount it in another application.

    Args: config: all settings, or the address of the bus, ``Relay("redis://…")``; single settings are passed by name.
          extra_plugins: plugins in addition to those that are discovered; their handlers are called first.
          authenticate: authenticates clients: it is called with an `UpgradeRequest` and returns a mapping with ``sub``,
              or None for an anonymous client, or raises `Refused`. A plain function runs in a thread.

    Raises: ConfigError: no bus is configured, a setting is invalid or needs a missing extra, or a plugin cannot load;
            TypeError: ``extra_plugins`` are no plugins, or ``authenticate`` is no function of a request.
    """

    def __init__(
        self,
        config: Config | str | None = None,
        *,
        extra_plugins: tuple[Plugin, ...] = (),
        authenticate: Authenticate | None = None,
        **settings: Any,
    ) -> None:
        self.config: Config = apply_extras(from_arguments(config, settings))
        if not self.config.redis_url and not self.config.broadcast_url:
            raise ConfigError(
                'redis_url: expected where to hear events: redis_url="redis://localhost:6379", '
                f'redis_url="{EMBEDDED}" for a server of the relay\'s own, or broadcast_url="memory://"'
            )
        self.config.old_names.log()
        if authenticate is not None:
            check_handler("authenticate", authenticate, "request")
        check_plugins(extra_plugins)
        self.metrics: Metrics = Metrics()
        self.exporter: MetricsExporter = MetricsExporter(
            self.metrics, self._state, self.config.metrics.dir, old_names=self.config.metrics.old_names
        )
        self.components: Components = self._make_components(extra_plugins, authenticate)
        self._log = self.components.telemetry.loggers.get("relay.socket")
        self._trusted_proxies = parse_networks(self.config.trusted_proxies)
        self._node: Node | None = None
        self._starting = asyncio.Lock()
        self._console = Console(self.components, self._running_node, self.exporter) if self.config.console else None
        self._proxies = self._make_proxies()
        self._paths = OwnPaths(self.config)
        self._plugin_routes: PluginRoutes | None = None
        self._http = self._make_http()

    def _make_components(self, extra_plugins: tuple[Plugin, ...], authenticate: Authenticate | None) -> Components:
        config, loggers = self.config, RateLimitedLoggers()
        keys: tuple[Key, ...] = ()
        if config.auth.has_keys or config.auth.tangram:
            from relay.auth.tokens import load_keys

            keys = load_keys(config.auth)
        telemetry = Telemetry(self.metrics, loggers, Tracer() if config.tracing else None)
        first, last = builtin_plugins(config, telemetry)
        plugins = load_plugins(config.plugins, (*extra_plugins, *first), last)
        for name in (found.name for found in plugins.found if found.plugin):
            # Or the first fault would be no rise of anything.
            self.metrics.plugin_calls[name] = self.metrics.plugin_errors[name] = 0
        authenticates = config.auth.has_keys or authenticate is not None
        return Components(
            config,
            telemetry,
            plugins,
            ApiKeyAuth(config, authenticates, loggers),
            NetworkAccess(config, authenticates),
            keys,
            secret_of(config.auth.secret),
            authenticate,
        )

    @classmethod
    def from_file(cls, path: str | Path, *, authenticate: Authenticate | None = None) -> "Relay":
        """Create a relay from a TOML file and ``RELAY_…`` variables. Raises ConfigError."""
        config = load(path)
        log_service_links()
        return cls(config, authenticate=authenticate)

    @classmethod
    def from_env(cls, *, authenticate: Authenticate | None = None) -> "Relay":
        """Create a relay from ``RELAY_…`` variables, and from the file that ``RELAY_CONFIG`` names, if it is set.

        Raises: ConfigError: as `Relay`, or a variable is unknown.
        """
        log_service_links()
        return cls(load(), authenticate=authenticate)

    @property
    def authenticates(self) -> bool:
        """Whether clients are authenticated, by keys or by a function."""
        return self.components.authenticates

    @property
    def plugins(self) -> PluginSet:
        """The plugins that were found."""
        return self.components.plugins

    def _make_proxies(self) -> "list[Proxy]":
        if not self.config.proxy:
            return []
        from relay.web.proxy import Proxy, Share

        of_all = Share(self.config.limits.proxied_max)
        return [Proxy(entry, of_all, self.metrics, self.components.telemetry.loggers) for entry in self.config.proxy]

    def _make_http(self, plugins_in: Any = None) -> Starlette:
        rest: Any = None
        if self.config.rest.path:
            # Routes of plugins are checked, and some added, before the first request.
            rest = self._make_rest() if self.plugins.have_routes else DeferredApp(self._make_rest)
        app = Starlette(routes=self._routes(rest))
        app.router.redirect_slashes = False  # a redirect would repeat the request's own Host
        if self.plugins.have_routes and missing("rest"):
            _logger.warning("routes of plugins are off: %s", describe("rest", "register_plugin(app)"))
        elif self.plugins.have_routes:
            from relay.web.plugin_routes import place_plugin_routes

            self._plugin_routes = place_plugin_routes(self.components, self._paths, app, rest, plugins_in)
        return app

    def _make_rest(self) -> Any:
        from relay.web.rest import make_rest  # FastAPI is an extra, and a fifth of the start to import

        return make_rest(self.components, self._running_node)

    def _routes(self, rest: ASGIApp | None) -> list[BaseRoute]:
        routes: list[BaseRoute] = []
        for proxy in self._proxies:
            routes += proxy.routes
        if rest is not None:
            routes += pages.docs_routes(self.config.rest.path)
            routes.append(Mount(self.config.rest.path, rest))
        if self.config.auth.tangram:
            from relay.web.tangram import token_routes

            routes += token_routes(self.components)
        for mount in routes:
            if isinstance(mount, Mount):
                # Or a newline (%0A) would be no part of a path, and what is mounted would not be asked.
                mount.path_regex = re.compile(mount.path_regex.pattern, re.DOTALL)
        return routes + pages.routes(
            self.config,
            self.metrics,
            self.components.api_key_auth,
            lambda: self.link,
            self._refusal,
            lambda: self._node.broker.degraded if self._node is not None else "",
            None if missing("metrics") else self.exporter.current_text,
            lambda: self.publish_command,
        )

    # Lifetime.

    async def start(self) -> None:
        """Start. An unavailable bus does not fail the start: relay is not ready then, and continues to connect.

        Raises: ConfigError: the embedded server or a plugin cannot be started, or a plugin's route is one of the
                relay's own.
        """
        self._let_go_of_ended()
        if self._node is not None and not self.node.pubsub.home.is_here:
            raise RelayError(f"the relay has been started in another event loop; expected one for all. {ONE_LOOP}")
        async with self._starting:
            if self._node is None:
                node = Node(self.components, self, self.exporter)
                self._node = node  # plugins may use the relay while they start
                try:
                    await node.start()
                    await self._register_plugins(node)
                except BaseException:
                    self._node = None
                    raise
                if self._console is not None:
                    self._console.start()

    async def _register_plugins(self, node: Node) -> None:
        if self._plugin_routes is not None:
            try:
                self._plugin_routes.register()
            except BaseException:
                await self._plugin_routes.stop(self.config.limits.close_timeout_s)
                await node.stop()
                raise

    def check_routes(self) -> None:
        """Check that the routes of plugins can be reached, as the start does. Raises ConfigError."""
        if self._plugin_routes is not None:
            self._plugin_routes.check()

    async def stop(self) -> None:
        """Drain: close all sockets with 1012, which tells clients to reconnect. Then stop."""
        self._let_go_of_ended()
        node = self._node
        if node is not None and not node.pubsub.home.is_here:
            await node.pubsub.home.run(self.stop)
        elif node is not None:
            if self._console is not None:
                await self._console.close()
            try:
                if self._plugin_routes is not None:
                    await self._plugin_routes.stop(self.config.limits.close_timeout_s)
                await node.stop()
            finally:
                self._node = None
                self._starting = asyncio.Lock()  # the next start may be in another event loop
                for proxy in self._proxies:
                    await proxy.close()
                # What ending requests have left since the node's own flush.
                self.components.telemetry.loggers.flush(at_once=True)

    def _let_go_of_ended(self) -> None:
        """Forget a node whose event loop has ended: nothing of it can go on."""
        node = self._node
        if node is not None and node.pubsub.home.loop.is_closed():
            self._node = None
            self._starting = asyncio.Lock()
            node.abandon()
            if self._plugin_routes is not None:
                self._plugin_routes.forget()
            _logger.warning("starting again: %s", LOOP_HAS_ENDED)

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Run relay for the duration of an ``async with`` block; can be passed to Starlette as ``lifespan=``."""
        await self.start()
        try:
            yield
        finally:
            await self.stop()

    def install(self, app: Any, path: str = "/relay", *, plugin_routes_in_app: bool = False) -> None:
        """Mount relay in a Starlette or FastAPI application, and run it as long as the application runs.

        Args: path: mount path; browsers connect to ``<path>/socket``.
              plugin_routes_in_app: add the REST routes of plugins to ``app``, a FastAPI, instead of relay's own REST
                  API, so that its dependencies, middleware and ``/docs`` apply to them.

        Raises: TypeError: ``app`` is no such application; ValueError: ``path`` is no path, or a route of ``app``
                answers what is below it.
        """
        check_install(app, path, plugin_routes_in_app)
        if plugin_routes_in_app:
            self._http = self._make_http(plugins_in=app)
        app.mount(path, self)
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            async with self.lifespan(), inner(app) as state:
                yield state

        app.router.lifespan_context = lifespan

    @property
    def is_running(self) -> bool:
        """Whether it has been started and not stopped, in this process and in an event loop that has not ended."""
        return self._node is not None and not self._node.pubsub.home.is_over

    @property
    def node(self) -> Node:
        """The running parts. Raises RelayError while the relay does not run, or runs in another process."""
        return self._running_node()

    def _running_node(self) -> Node:
        if self._node is None:
            raise RelayError(
                "the relay is not running: expected its lifespan (`async with relay.lifespan():`) or start() first; "
                "a process without a running relay publishes with relay.Publisher"
            )
        if self._node.pubsub.home.is_forked:
            raise RelayError(FORKED)
        return self._node

    # What code beside it calls: the team's own, plugins, REST routes.

    def publish(self, topic: str, event: str, payload: object) -> Call:
        """Send an event to all subscribers of a topic, on every node; `broadcast` is an alias.

        It starts at once, in any thread and any event loop. In an event loop, ``await`` it to find out whether the bus
        has accepted the event; if it is not awaited, a failure is logged and counted. In a thread without an event
        loop it returns when the bus has accepted the event, after ``redis.timeout_s`` at most.

        Args:   payload: a JSON-serializable value (dicts, lists, Pydantic models, dataclasses, dates …), or ``bytes``
                    for a binary event.
        Raises: ValueError: an invalid topic or event; TypeError: the payload is not JSON-serializable;
                RelayError: relay is not running; BusUnavailable: the bus did not accept the event.
        """
        return self.node.publish(topic, event, payload)

    broadcast = publish

    def local_broadcast(self, topic: str, event: str, payload: object) -> bool:
        """Send an event to the subscribers of this process only, without the bus; False if there are no subscribers."""
        return self.node.local_broadcast(topic, event, payload)

    def broadcast_here(self, topic: str, event: str, payload: object) -> bool:
        """Call `local_broadcast`, under its former name."""
        warnings.warn("Relay.broadcast_here is now Relay.local_broadcast", DeprecationWarning, stacklevel=2)
        return self.local_broadcast(topic, event, payload)

    @property
    def engine(self) -> Node:
        """The running `node`, under its former name."""
        warnings.warn("Relay.engine is now Relay.node", DeprecationWarning, stacklevel=2)
        return self.node

    def socket(self, socket_id: str) -> Socket | None:
        """Return a socket of this process by its id, or None."""
        return self.node.socket(socket_id)

    def subscribe(
        self,
        topic: str,
        *,
        max_events: int = 1000,
        overflow: Literal["disconnect", "drop-oldest", "latest", "recover"] | None = None,
        since: str | None = None,
        last: int | None = None,
    ) -> EventStream:
        """Receive a topic's events in code of this process; no permission is checked and no handler is called.

            async with relay.subscribe("room:1", overflow="drop-oldest") as events:
                async for event in events:
                    print(event.event, event.payload)

        The loop ends when relay stops. Leaving the block unsubscribes. What a browser's client is informed of stands
        between the events: ``relay:dropped`` (the loop was too slow for some), ``relay:lost`` (some are missing after
        an interrupted link) and ``relay:recovered``; `ReceivedEvent.is_notice` is true for them.

        Args:   max_events: so many may wait for the loop, and ``limits.outbox_max_bytes`` of them.
                overflow: what happens to more; None for the topic's own setting. After ``"disconnect"`` the loop
                    receives what waits and then raises SlowReader.
                since: a position; events after it come first, if the topic's history has them all.
                last: the newest events of the topic's history come first, so many at most.
        Raises: ValueError: an invalid argument, or a topic without history; RelayError: relay is not running.
                The block raises BusUnavailable at its beginning if the bus cannot be heard, and RelayError in another
                event loop than relay's.
        """
        return self.node.subscribe(topic, max_events, overflow, since, last)

    @overload
    def disconnect(self, socket_id: str, reason: str = "") -> bool: ...

    @overload
    def disconnect(self, *, user: str | int, reason: str = "") -> Call: ...

    def disconnect(
        self, socket_id: str | None = None, reason: str = "", *, user: str | int | None = None
    ) -> bool | Call:
        """Close a socket of this process with 1001, or return False if there is no such socket; or all of a user.

        ``await relay.disconnect(user="alice")`` reaches every node, or raises BusUnavailable if it reached only this
        one. It starts at once, in any thread and any event loop, like `publish`. Clients reconnect unless
        authentication refuses them: let their tokens expire, or let ``authenticate`` refuse the user.

        Args:   user: what its tokens, or ``authenticate``, say as ``sub``; a number is taken as its text, as there.
        Raises: ValueError: no user is called so.
        """
        if user is not None:
            return self.node.disconnect_user(user, reason)
        return self.node.disconnect(socket_id or "", reason)

    def kick(self, topic: str, *, user: str | int) -> Call:
        """Remove a user from a topic with ``phx_close``, on every node; the client does not rejoin automatically.

        Raises BusUnavailable if it reached only this node, ValueError for a topic or a user that cannot be. It starts
        at once, in any thread and any event loop, like `publish`.
        """
        return self.node.kick(topic, user)

    async def presence(self, topic: str) -> dict[str, list[dict[str, Any]]]:
        """The members of a topic with presence, on all nodes: what is said of each, by key, without ``phx_ref``.

        A list has one entry for each join under the key: ``{"alice": [{"user": "alice", "meta": {"name": "Al"}}]}``.
        Members who have left are missing at once, while subscribers are informed after ``presence.leave_delay_s``.

        Raises: ValueError: a topic without presence, or with ``presence = "count"``; RelayError: relay is not running;
                BusUnavailable: the members of other nodes cannot be read.
        """
        members = await self.node.presence_members(topic)
        found = metas_by_key(members.values())
        return {key: [msgspec.json.decode(meta) for meta in metas] for key, metas in found.items()}

    async def presence_count(self, topic: str) -> int:
        """The number of members of a topic with presence, on all nodes; with ``presence = "count"``, too.

        Raises: ValueError: a topic without presence; RelayError, BusUnavailable: as of `presence`.
        """
        return await self.node.presence_count(topic)

    @property
    def topics(self) -> dict[str, int]:
        """Topics joined in this process, with the number of their subscribers."""
        return self.node.topics

    @property
    def link(self) -> Link:
        """State of the link to the bus."""
        if self._node is None:
            return Link(False, "the relay is not running")
        return self._node.link

    def _refusal(self) -> str:
        """Say why no client should be sent here; empty if the relay is ready."""
        if self._node is not None and self._node.is_draining:
            return "the relay is restarting"
        return "" if self.link.live else self.link.reason

    def _state(self) -> ProcessState:
        return IDLE if self._node is None else self._node.state

    @property
    def publish_command(self) -> str:
        """A command that publishes an event to this relay, for the page: it names no address, which is not for all."""
        return """relay publish room:1 new_msg '{"text":"hi"}'"""

    # ASGI.

    async def __call__(self, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        """Serve one lifespan, HTTP request or WebSocket."""
        if scope["type"] == "lifespan":
            scope.get("state", {})[REFUSED_STATE] = self.metrics.refused
            await self._serve_lifespan(receive, send)
            return
        came, scope = scope, apply_forwarded_headers(scope, self._trusted_proxies)
        path = segments(route_path(scope))
        refused = self._check_reach(came, scope, path)
        if refused is not None:
            await self._refuse(scope, receive, send, refused)
            return
        self._let_go_of_ended()
        if self._node is None:
            # Starlette runs no lifespan of a mounted app: the first request finds the relay asleep.
            _logger.warning("relay started by its first request; `relay.install(app)` starts it with your app")
            await self.start()
        elif self._starting.locked():  # by another request: plugins have not started yet
            await self.start()
        if self._is_socket(scope, path) and not self.node.pubsub.home.is_here:
            raise RelayError(f"a socket in another event loop than the relay's would hear no event. {ONE_LOOP}")
        if (off := self._transport_off(path)) is not None:
            await self._refuse(scope, receive, send, off)
        elif scope["type"] == "http":
            if path in self._paths.streams:
                await self.node.connections.serve(scope, receive, send)
            elif path in self._paths.long_polls:
                await self.node.long_poll.serve(scope, receive, send)
            elif path in self._paths.sockets:
                self.metrics.refused["handshake: no upgrade"] += 1
                await handshake.ask_for_upgrade(scope, receive, send)
            else:
                await self._http(self._paths.canonical(scope, path), receive, send)
        elif path in self._paths.sockets:
            await self.node.connections.serve(scope, receive, send)
        elif self._console is not None and path == CONSOLE_SOCKET:
            await self._console.serve(scope, receive, send)
        else:
            known = ", ".join(sorted("/" + "/".join(path) for path in self._paths.sockets))
            text = f"no socket here; expected {known}"
            await self._refuse(scope, receive, send, HandshakeRejected(404, text, "path"))

    def _is_socket(self, scope: Scope, path: tuple[str, ...]) -> bool:
        """Whether a request is for one of the transports, or for the console's socket."""
        return scope["type"] == "websocket" or path in self._paths.streams or path in self._paths.long_polls

    def _check_reach(self, came: Scope, scope: Scope, path: tuple[str, ...]) -> HandshakeRejected | None:
        """Check where a request comes from, and under which name, before any route.

        Args: came: the scope as the server gave it.
              path: its segments below the mount.
        """
        if len(hosts_of(scope)) > 1:
            return SEVERAL_HOSTS
        is_socket = self._is_socket(scope, path)
        if is_socket:
            is_exempt = path == CONSOLE_SOCKET  # it asks for the key, or for this machine
        else:
            is_exempt = self._paths.is_open(path) or self.components.api_key_auth.has_key(scope)
        refused = None if is_exempt else self.components.network_access.check(came, scope, is_socket=is_socket)
        if refused is None or is_socket or not self._paths.is_for_operators(path):
            return refused
        fault = self.components.api_key_auth.authorize(scope, api_key_from(scope), "rest")
        return fault and HandshakeRejected(
            fault.status, fault.text, "wrong key" if fault.is_wrong_key else "not allowed"
        )

    async def _refuse(
        self, scope: Scope, receive: ReceiveCallable, send: SendCallable, refused: HandshakeRejected
    ) -> None:
        """Refuse a request of either kind; counted, and logged at a sane rate."""
        if scope["type"] == "websocket":
            what, door = "handshake", "handshake"
        else:
            what, door = "request", "rest" if refused.kind in ("wrong key", "not allowed") else "http"
        self.metrics.refused[f"{door}: {refused.kind}"] += 1
        address = (scope.get("client") or (None,))[0]
        text = f"{what} refused: %s; address %s"
        self._log.warning(f"{door}: {refused.kind}", text, refused.text, address, address=address)
        if scope["type"] == "websocket":
            await handshake.refuse(scope, receive, send, refused)
            return
        if segments(route_path(scope)) in self._paths.long_polls:
            await long_poll_request.refuse(scope, refused, may_read=False)(scope, receive, send)
            return
        headers = {"www-authenticate": "Bearer"} if refused.status == HTTPStatus.UNAUTHORIZED else None
        await pages.problem(refused.status, refused.text, headers)(scope, receive, send)

    def _transport_off(self, path: tuple[str, ...]) -> HandshakeRejected | None:
        """Say that a path is of a transport that the settings do not list; None where it is not."""
        paths = {
            "websocket": self._paths.sockets,
            "sse": self._paths.streams,
            "longpoll": self._paths.long_polls,
        }
        name = next((name for name, known in paths.items() if path in known), None)
        if name is None or name in self.config.transports:
            return None
        text = f"expected one of the relay's transports, {', '.join(self.config.transports)}, got {name}"
        return HandshakeRejected(404, f"{text}; the setting `transports` names them", "transport")

    async def _serve_lifespan(self, receive: ReceiveCallable, send: SendCallable) -> None:
        _ = await receive()
        try:
            await self.start()
        except Exception as error:
            if not isinstance(error, ConfigError):
                _logger.exception("start failed")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        _ = await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})
