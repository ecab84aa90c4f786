"""Who may reach a relay at all, whatever is asked for: from where, and under which name.

Owns the check that every request passes before any route, as a pure function of an ASGI scope; must not know routes.

A relay that authenticates no clients answers this machine alone. Besides, the name it is asked under is checked: under
a name that its owner points here (DNS rebinding) any page of the web would be of the relay's own origin. That takes a
name, so IP addresses pass; health checks of clusters and balancers send them.
"""

from collections.abc import Mapping
from typing import Any

from relay.config import ANY_HOST, Config
from relay.proxy_headers import (
    came_by,
    forwarded_header,
    host_in,
    hosts_of,
    is_loopback_address,
    is_loopback_host,
    parse_ip,
    parse_networks,
)
from relay.transports.handshake import HandshakeRejected, is_allowed_origin

SEVERAL_HOSTS = HandshakeRejected(400, "expected one Host header", "several hosts")


def is_in_process(scope: Mapping[str, Any]) -> bool:
    """Say whether a test calls the relay with no server in between, as Starlette's `TestClient` does.

    Every server says which ASGI it speaks, `TestClient` does not, and no header of a request can take that away. Its
    address proves nothing: where a server believes ``X-Forwarded-For``, that text is the client's own.
    """
    return "asgi" not in scope and (scope.get("client") or ("",))[0] == "testclient"


def is_this_machine(scope: Mapping[str, Any]) -> bool:
    """Say whether a request comes from this machine, asked for under one of its names, and through no proxy."""
    if is_in_process(scope):
        return True
    hosts = hosts_of(scope)
    return len(hosts) == 1 and is_loopback_host(host_in(hosts[0])) and _is_from_here(scope)


def why_not_local_host(scope: Mapping[str, Any]) -> str:
    """What to add for a client on this machine that asks under another name, as tests do; empty for others."""
    host = host_in("".join(hosts_of(scope)))
    if not host or is_loopback_host(host) or not _is_from_here(scope):
        return ""
    return f", under localhost or another of its own names; got {host!r:.100}"


def is_foreign_page(scope: Mapping[str, Any]) -> bool:
    """Say whether a page sends a request that the relay has not served: open in a browser here, it is not from here."""
    host = "".join(hosts_of(scope))
    origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
    return not all(is_allowed_origin(origin, host, "same") for origin in origins)


def _is_from_here(scope: Mapping[str, Any]) -> bool:
    client = scope.get("client")
    return client is not None and is_loopback_address(client[0]) and forwarded_header(scope) is None


class NetworkAccess:
    """Who may reach one relay.

    Args: authenticates: whether it asks clients who they are, by keys or by a function.
    """

    def __init__(self, config: Config, authenticates: bool) -> None:
        self._trusted = parse_networks(config.trusted_proxies)
        self._here_alone = not (authenticates or config.allow_anonymous)
        self._hosts = config.allowed_hosts or ((ANY_HOST,) if authenticates else ())
        self._is_local = not config.is_exposed and not self._trusted

    def check(
        self, scope: Mapping[str, Any], seen: Mapping[str, Any] | None = None, *, is_socket: bool | None = None
    ) -> HandshakeRejected | None:
        """Say why a request is not answered, whatever it asks for; None where it may pass.

        Args: scope: as the server gives it.
              seen: the same with the client's own address in it, from behind trusted proxies.
              is_socket: whether it asks for events; by default, whether it is for a WebSocket.
        """
        if is_socket is None:
            is_socket = scope["type"] == "websocket"
        if is_in_process(scope):
            return None
        hosts = hosts_of(scope)
        if len(hosts) > 1:
            return SEVERAL_HOSTS
        if self._here_alone and (stranger := self._stranger(scope, seen or scope, is_socket)) is not None:
            return stranger
        host = host_in(hosts[0]) if hosts else ""
        if self._allows(host):
            return None
        if not host:
            return HandshakeRejected(403, "expected a Host header with the name of this relay", "host not allowed")
        text = f'host {host!r} is not allowed; where this relay has that name, set allowed_hosts = ["{host}"]'
        return HandshakeRejected(403, text, "host not allowed")

    def _stranger(self, scope: Mapping[str, Any], seen: Mapping[str, Any], is_socket: bool) -> HandshakeRejected | None:
        client = seen.get("client")
        is_local = client is not None and is_loopback_address(client[0])
        text = "this relay authenticates no clients, so it answers this machine alone; "
        what = "set auth, authenticate= or allow_anonymous"
        if is_socket and not is_local:
            return HandshakeRejected(403, text + what, "from another machine")
        if (header := forwarded_header(scope)) is None:
            return None
        if not (self._trusted and is_local and came_by(scope, self._trusted)):
            return HandshakeRejected(
                403, f"{text}the request came through a proxy ({header}); {what}", "from another machine"
            )
        return None

    def _allows(self, host: str) -> bool:
        if ANY_HOST in self._hosts or is_loopback_host(host) or parse_ip(host) is not None:
            return True
        return any(host.endswith(name[1:]) if name.startswith("*.") else host == name for name in self._hosts)

    def has_local_pages(self, scope: Mapping[str, Any]) -> bool:
        """Say whether pages of this machine's other servers may connect: development, with no proxy in sight."""
        server = scope.get("server")
        hosts = hosts_of(scope)
        return (
            self._is_local
            and server is not None
            and is_loopback_address(server[0])
            and len(hosts) == 1
            and is_loopback_host(host_in(hosts[0]))
            and _is_from_here(scope)
        )
