"""The paths of a relay's own: sockets, streams, tokens, REST, pages; and what stands before its routes.

Owns which path is what; must not know what is answered there.
"""

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.routing import Match, Mount

from relay.config import Config
from relay.paths import below, replace_route_path, route_path, segments, split_raw
from relay.transports.base import Scope
from relay.web import console

CONSOLE_SOCKET = segments(console.SOCKET_PATH)
_PAGES = frozenset({(), ("health",), ("ready",), ("metrics",), ("console",), ("console", "access"), ("token",)})
_REST_NAMES = frozenset({("publish",), ("topics",), ("users",), ("sockets",), ("history",), ("presence",)})
"""What stands first in the REST interface's own paths."""

_REST_PAGES = frozenset({(), *_REST_NAMES, ("docs",), ("redoc",), ("openapi.json",)})
_OPEN_PATHS = frozenset({("health",), ("ready",), ("metrics",), ("console", "access")})
"""Paths of routes that say nothing to strangers, or check themselves who asks."""


def token_paths(config: Config) -> frozenset[tuple[str, ...]]:
    """Where tangram's tokens are made: at the root, and beside each socket path; nowhere without ``auth.tangram``."""
    if not config.auth.tangram:
        return frozenset()
    return _below(("/", *config.socket_paths), "token")


def _below(paths: Iterable[str], name: str) -> frozenset[tuple[str, ...]]:
    return frozenset((*segments(path), name) for path in paths)


class OwnPaths:
    """Which path is what. All are given as their segments, below the mount."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.sockets: frozenset[tuple[str, ...]] = _below(config.socket_paths, "websocket")
        self.streams: frozenset[tuple[str, ...]] = _below(config.socket_paths, "sse")
        self.long_polls: frozenset[tuple[str, ...]] = _below(config.socket_paths, "longpoll")
        self._tokens = token_paths(config)
        self._rest = segments(config.rest.path)
        self._proxied = tuple(segments(entry.prefix) for entry in config.proxy)

    def is_for_sockets(self, path: tuple[str, ...]) -> bool:
        """Say whether a socket, a stream, or the advice to use one is there."""
        return path in self.sockets | self.streams | self.long_polls or path == CONSOLE_SOCKET

    def is_proxied(self, path: tuple[str, ...]) -> bool:
        """Say whether another process answers."""
        return any(path[: len(prefix)] == prefix for prefix in self._proxied)

    def is_open(self, path: tuple[str, ...]) -> bool:
        """Say whether its route may be reached from anywhere."""
        return path in _OPEN_PATHS and not self.is_proxied(path)

    def is_for_operators(self, path: tuple[str, ...]) -> bool:
        """Say whether it is of the REST interface, which says itself what it expects."""
        depth = len(self._rest)
        is_rest = depth > 0 and path[:depth] == self._rest and path[depth : depth + 1] in _REST_NAMES
        is_token = path in self._tokens and self._config.auth.tangram is True
        return (is_rest or is_token) and not self.is_proxied(path)

    def canonical(self, scope: Scope, path: tuple[str, ...]) -> Scope:
        """The scope of a request for one of the relay's own routes with single slashes in its path.

        What follows in names of topics and users, and what is a plugin's or another process's, stays as it is.
        """
        if self.is_proxied(path):
            return scope
        given, depth = route_path(scope), len(self._rest)
        _, raw, is_raw = split_raw(scope)
        encoded = raw.decode("latin-1")
        wanted, wanted_raw = given, encoded
        if path in _PAGES or path in self._tokens or path[:1] == ("static",):
            wanted = "/" + "/".join(path)
            wanted_raw = quote(wanted)
        elif depth and path[:depth] == self._rest:
            rest, raw_rest = below(given, depth) or "", below(encoded, depth) or ""
            # A name may be a slash, which only the path as it came tells from one too many.
            if path[depth:] in _REST_PAGES and is_raw and segments(raw_rest) == path[depth:]:
                rest = raw_rest = "/" + "/".join(path[depth:])
            wanted, wanted_raw = self._config.rest.path + rest, quote(self._config.rest.path) + raw_rest
        return scope if wanted == given else replace_route_path(scope, wanted, wanted_raw.encode("latin-1"))


def check_install(app: Any, path: str, needs_fastapi: bool) -> None:
    """Check the arguments of `Relay.install`. Raises TypeError, ValueError."""
    if not isinstance(app, Starlette) or (needs_fastapi and not hasattr(app, "include_router")):
        kind = "FastAPI" if needs_fastapi else "Starlette or FastAPI"
        raise TypeError(f"install: expected a {kind} application, got a {type(app).__name__}")
    if path and not path.startswith("/"):
        raise ValueError(f'install: expected a path such as "/relay", got {path!r}')
    socket = {"type": "websocket", "path": f"{path.rstrip('/')}/socket/websocket", "root_path": "", "headers": []}
    for route in app.routes:
        if isinstance(route, Mount) and route.matches(socket)[0] == Match.FULL:
            raise ValueError(
                f"install: requests below {path!r} are answered by what is mounted at {route.path or '/'!r} before; "
                "install the relay first"
            )
