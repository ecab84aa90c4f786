"""The WebSocket handshake: what the upgrade request says, whether it may pass, and how it is answered.

Owns the checks before a socket exists, as pure functions of an ASGI scope; must not know the settings' source or the
transport.

Source: Phoenix 1.9, ``lib/phoenix/socket/transport.ex`` (origin) and ``transports/websocket.ex`` (token, order).
"""

import base64
import binascii
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from relay.protocol import serializer
from relay.protocol.serializer import Version
from relay.proxy_headers import host_in, is_loopback_host
from relay.transports.base import ReceiveCallable, Scope, SendCallable

SUBPROTOCOL = "phoenix"
_TOKEN_PREFIX = "base64url.bearer.phx."
_OWN_SITE = ("same-origin", "none")
_DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}


class HandshakeRejected(NamedTuple):
    """Why a handshake is refused: HTTP status, a sentence for the client, and a short word for the counter."""

    status: int
    text: str
    kind: str
    retry_after_s: int = 0
    """Seconds after which to try again, where that makes sense."""
    hint: str = ""
    """The line of the settings that would let it pass; for the log alone."""


class HandshakeAccepted(NamedTuple):
    """An upgrade request that may pass."""

    version: Version
    subprotocol: str | None
    """What to answer: browsers fail the connection when they asked for one and none is answered."""
    auth_token: str | None
    """phoenix.js's ``authToken``; a secret."""


def check(
    scope: Mapping[str, Any], origins: str | tuple[str, ...], *, has_local_pages: bool = False
) -> HandshakeAccepted | HandshakeRejected:
    """Check an upgrade request, in Phoenix's order.

    Args: scope: an ASGI ``websocket`` scope.
          origins: the setting ``allowed_origins``.
          has_local_pages: whether, with ``"same"``, pages of this machine's other servers may connect too.
    """
    foreign = check_origin(scope, origins, has_local_pages=has_local_pages)
    if foreign is not None:
        return foreign
    offered = _subprotocols(scope)
    token = None
    if offered:
        if SUBPROTOCOL not in offered:
            return HandshakeRejected(403, f"expected subprotocol {SUBPROTOCOL!r} among those offered", "subprotocol")
        try:
            token = token_from(offered)
        except ValueError:
            return HandshakeRejected(
                400, "the token in Sec-WebSocket-Protocol is not base64 of UTF-8 text", "token encoding"
            )
    version = find_version(scope)
    if isinstance(version, HandshakeRejected):
        return version
    return HandshakeAccepted(version, SUBPROTOCOL if offered else None, token)


def find_version(scope: Mapping[str, Any]) -> Version | HandshakeRejected:
    """The version of the protocol that a request asks for with ``vsn``."""
    vsn = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    version = None if "vsn[]" in vsn else serializer.negotiate(vsn.get("vsn", ["1.0.0"])[-1])
    return (
        HandshakeRejected(403, "expected vsn=2.0.0 or vsn=1.0.0 in the query", "version")
        if version is None
        else version
    )


def check_origin(
    scope: Mapping[str, Any], origins: str | tuple[str, ...], *, has_local_pages: bool
) -> HandshakeRejected | None:
    """Say why the page that sends a request may not connect; None where it may, or no page sends it. See `check`."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    origin = headers.get(b"origin")
    if origin is None or is_allowed_origin(origin, headers.get(b"host", ""), origins):
        return None
    if has_local_pages and origins == "same" and is_loopback_host(_host_of_page(origin)):
        return None
    text = f"origin {origin!r} may not connect; the relay's setting `allowed_origins` names those that may"
    return HandshakeRejected(403, text, "origin", hint=_line_to_paste(origin, origins))


def check_page(
    scope: Mapping[str, Any], origins: str | tuple[str, ...], *, has_local_pages: bool
) -> HandshakeRejected | None:
    """As `check_origin`, for a plain request: a page's GET may come without ``Origin``; browsers say so otherwise."""
    foreign = check_origin(scope, origins, has_local_pages=has_local_pages)
    if foreign is not None:
        return foreign
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    site = headers.get(b"sec-fetch-site")
    if b"origin" not in headers and site is not None and site not in _OWN_SITE:
        text = f"expected Sec-Fetch-Site same-origin or none in a request without Origin, got {site!r}"
        return HandshakeRejected(403, text, "origin")
    return None


def _host_of_page(origin: str) -> str:
    parts = origin.partition("://")
    return host_in(parts[2]) if parts[0] in ("http", "https") else ""


def _line_to_paste(origin: str, origins: str | tuple[str, ...]) -> str:
    """The setting that would let the pages of an origin connect; empty where the text is not an origin."""
    if not _host_of_page(origin):
        return ""
    named = ("same",) if isinstance(origins, str) else origins
    return f"allowed_origins = {json.dumps([*named, origin.lower()])}"


def _subprotocols(scope: Mapping[str, Any]) -> list[str]:
    """The subprotocols offered, in one line or several; elements of the list may be empty."""
    lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"sec-websocket-protocol"]
    elements = ",".join(lines).split(",") if lines else scope.get("subprotocols") or []
    return [element for each in elements if (element := each.strip(" \t"))]


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
          origins: ``"any"``, ``"same"`` (same host and port; the scheme may differ, since TLS often ends before the
                   relay), or patterns: ``"same"``, ``https://host[:port]``, ``//host[:port]``, ``//*.host``.
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
    is_same = (asked.hostname, asked_port) == (came.hostname, came_port)
    if isinstance(origins, str):
        return is_same
    hostname: str = came.hostname
    return any(
        is_same if pattern == "same" else _matches(came.scheme, hostname, came_port, pattern) for pattern in origins
    )


def _matches(scheme: str, hostname: str, port: int | None, pattern: str) -> bool:
    allowed = urlsplit(pattern)
    if allowed.scheme and allowed.scheme != scheme:
        return False
    wanted_port = allowed.port or _DEFAULT_PORTS.get(allowed.scheme)
    if wanted_port is not None and wanted_port != port:
        return False
    name = allowed.hostname or ""
    return hostname.endswith(name[1:]) if name.startswith("*.") else hostname == name


async def accept(receive: ReceiveCallable, send: SendCallable, subprotocol: str | None) -> None:
    """Answer an upgrade request with 101."""
    await receive()
    await send({"type": "websocket.accept", "subprotocol": subprotocol})


async def refuse(scope: Scope, receive: ReceiveCallable, send: SendCallable, refused: HandshakeRejected) -> None:
    """Answer an upgrade request with an HTTP error: the ASGI denial response where the server has it, else 403."""
    await receive()
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1008, "reason": refused.text})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.retry_after_s:
        headers.append((b"retry-after", str(refused.retry_after_s).encode()))
    await send({"type": "websocket.http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": f"{refused.text}\n".encode()})


async def ask_for_upgrade(scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
    """Answer a plain HTTP request for a socket with 426, and say what it lacks."""
    headers = [(b"upgrade", b"websocket"), (b"connection", b"Upgrade"), (b"sec-websocket-version", b"13")]
    text = f"this is a WebSocket: {_lack(scope)}\n".encode()
    headers += [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 426, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def _lack(scope: Scope) -> str:
    """What keeps a request from being an upgrade; RFC 6455, section 4.1."""
    version, method = scope.get("http_version", "1.1"), scope["method"]
    if version != "1.1":
        return f"expected HTTP/1.1, got HTTP/{version}; a proxy in between has to pass HTTP/1.1 on"
    if method != "GET":
        return f"expected GET, got {method}"
    if "websocket" not in _elements(scope, b"upgrade"):
        return "expected the header Upgrade: websocket; a proxy in between has to pass it on"
    if "upgrade" not in _elements(scope, b"connection"):
        return "expected the header Connection: Upgrade; a proxy in between has to pass it on"
    return "expected an upgrade request without a body"


def _elements(scope: Scope, wanted: bytes) -> list[str]:
    lines = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == wanted]
    return [element.strip(" \t") for element in ",".join(lines).split(",")]
