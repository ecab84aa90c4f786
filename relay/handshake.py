"""What the upgrade request says, and whether it may pass: origin, subprotocol, token, version.

Owns the checks before a socket exists, as pure functions of an ASGI scope; must not know the settings' source or the
transport.

Source: Phoenix 1.9, ``lib/phoenix/socket/transport.ex`` (origin) and ``transports/websocket.ex`` (token, order).
"""

import base64
import binascii
import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from relay import wire
from relay.wire import Version

SUBPROTOCOL = "phoenix"
_TOKEN_PREFIX = "base64url.bearer.phx."
_TEST_CLIENT = "testclient"
"""The address of Starlette's `TestClient`, which no network brings here."""
_NO_HOST = frozenset("/#?@\\ \t")
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


class Refused(NamedTuple):
    """Why a handshake is refused: HTTP status, a sentence for the client, and a short word for the counter."""

    status: int
    text: str
    kind: str
    retry_after_s: int = 0
    """Seconds after which to try again, where that makes sense."""


class Handshake(NamedTuple):
    """An upgrade request that may pass."""

    version: Version
    subprotocol: str | None
    """What to answer: browsers fail the connection when they asked for one and none is answered."""
    auth_token: str | None
    """phoenix.js's ``authToken``; a secret."""


def check(
    scope: Mapping[str, Any], origins: str | tuple[str, ...], *, asks_nobody: bool = False
) -> Handshake | Refused:
    """Check an upgrade request, in Phoenix's order.

    Args: scope: an ASGI ``websocket`` scope.
          origins: the setting of that name.
          asks_nobody: whether nobody is asked who they are, so that only this machine is answered.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    if asks_nobody and (stranger := _stranger(scope, headers.get(b"host", ""), origins)) is not None:
        return stranger
    origin = headers.get(b"origin")
    if origin is not None and not is_allowed_origin(origin, headers.get(b"host", ""), origins):
        return Refused(
            403, f"origin {origin!r} may not connect; the relay's setting `origins` names those that may", "origin"
        )
    offered: list[str] = scope.get("subprotocols") or []
    token = None
    if offered:
        if SUBPROTOCOL not in offered:
            return Refused(403, f"expected subprotocol {SUBPROTOCOL!r} among those offered", "subprotocol")
        try:
            token = token_from(offered)
        except ValueError:
            return Refused(400, "the token in Sec-WebSocket-Protocol is not base64 of UTF-8 text", "token encoding")
    vsn = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    version = None if "vsn[]" in vsn else wire.negotiate(vsn.get("vsn", ["1.0.0"])[-1])
    if version is None:
        return Refused(403, "expected vsn=2.0.0 or vsn=1.0.0 in the query", "version")
    return Handshake(version, SUBPROTOCOL if offered else None, token)


def _stranger(scope: Mapping[str, Any], host: str, origins: str | tuple[str, ...]) -> Refused | None:
    """Refuse who comes from elsewhere, or may; None where it is a client on this machine."""
    client = (scope.get("client") or ("",))[0]
    if client == _TEST_CLIENT:
        return None
    if not is_loopback(client):
        text = "nobody is asked who they are, so this machine alone is answered; set auth, authenticate= or anonymous"
        return Refused(403, text, "from another machine")
    if origins == "same" and not is_loopback(host):
        # Under a name that its owner points here (DNS rebinding) any page of the web would be of the same origin.
        text = "this relay answers this machine alone; set anonymous, auth or origins to let others in"
        return Refused(403, text, "not under a name of this machine")
    return None


def token_from(offered: Iterable[str]) -> str | None:
    """Find ``authToken`` among the offered subprotocols; only exactly one counts.

    Wire:   ``phoenix, base64url.bearer.phx.<base64 of the token, without padding>``, in either alphabet.
    Raises: ValueError: it does not decode.
    """
    found = [entry.removeprefix(_TOKEN_PREFIX) for entry in offered if entry.startswith(_TOKEN_PREFIX)]
    if len(found) != 1:
        return None
    text = found[0].replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True).decode()
    except binascii.Error as error:
        raise ValueError("not base64") from error


def find_token(scope: Mapping[str, Any], auth_token: str | None) -> str | None:
    """Find the token of an upgrade request; the first that is there counts, whatever the others say.

    In this order: phoenix.js's ``authToken`` (a subprotocol), ``params.token`` (the query), ``Authorization: Bearer``,
    and ``userToken`` in the query, which is tangram's.
    """
    if auth_token:
        return auth_token
    query = parse_qs(scope["query_string"].decode("latin-1"))
    if "token" in query:
        return str(query["token"][-1])
    for name, value in scope["headers"]:
        scheme, _, credentials = value.decode("latin-1").partition(" ")
        if name == b"authorization" and scheme.lower() == "bearer" and credentials.strip():
            return str(credentials.strip())
    return str(query["userToken"][-1]) if "userToken" in query else None


def is_allowed_origin(origin: str, host: str, origins: str | tuple[str, ...]) -> bool:
    """Say whether a page from ``origin`` may connect to a relay asked for under ``host``.

    Args: origin: the request's ``Origin``, as ``scheme://host[:port]``, or ``null``.
          host: the request's ``Host``.
          origins: ``"any"``, ``"same"`` (same host and port; the scheme may differ, since TLS often ends
                   before the relay), or patterns: ``https://host[:port]``, ``//host[:port]``, ``//*.host``.
    """
    if origins == "any":
        return True
    try:
        came = urlsplit(origin)
        came_port = came.port or _DEFAULT_PORTS.get(came.scheme)
        asked = urlsplit(f"//{host}")
        asked_port = asked.port or _DEFAULT_PORTS.get(came.scheme)
    except ValueError:  # no URL, or a port that is no number
        return False
    if not came.hostname:
        return False
    if isinstance(origins, str):
        return (asked.hostname, asked_port) == (came.hostname, came_port)
    return any(_matches(came.scheme, came.hostname, came_port, pattern) for pattern in origins)


def is_loopback(authority: str) -> bool:
    """Say whether ``host``, ``host:port`` or an address without brackets names this machine."""
    # `urlsplit` would take what stands between them for the host.
    if not _NO_HOST.isdisjoint(authority):
        return False
    try:
        if authority.count(":") > 1 and not authority.startswith("["):
            authority = f"[{authority}]"
        host = urlsplit(f"//{authority}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _matches(scheme: str, hostname: str, port: int | None, pattern: str) -> bool:
    allowed = urlsplit(pattern)
    if allowed.scheme and allowed.scheme != scheme:
        return False
    wanted_port = allowed.port or _DEFAULT_PORTS.get(allowed.scheme)
    if wanted_port is not None and wanted_port != port:
        return False
    name = allowed.hostname or ""
    return hostname.endswith(name[1:]) if name.startswith("*.") else hostname == name
