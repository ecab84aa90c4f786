"""Forwarding a prefix to another process: how a plugin in any language serves REST routes under the relay.

Owns HTTP forwarding over httpx2, streaming both ways; must not know what it carries.
"""

import logging
import re
from collections.abc import AsyncIterator, Iterable
from http import HTTPStatus
from urllib.parse import quote, unquote_to_bytes

import httpx2 as httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route

from relay.logs import Throttle
from relay.paths import split_raw
from relay.transport import ReceiveCallable, Scope, SendCallable
from relay.web_config import ProxyConfig

_throttle = Throttle(logging.getLogger("relay.proxy"))

_SEGMENT = re.compile(rb"(?:^|[/\\])([^/\\;]*)")
"""A part of a path, without its parameters."""

# A stream may be silent for as long as it likes; only connecting has a limit.
_TIMEOUT = httpx.Timeout(None, connect=5.0)
# One connection for each open stream: any bound would be a standstill.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)

# Of one connection, not of the message: RFC 9110, section 7.6.1. httpx2 and the server write their own.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)


class Proxy:
    """ASGI app that forwards to ``entry.target`` whatever it is mounted for."""

    def __init__(self, entry: ProxyConfig) -> None:
        self._entry = entry
        self._target = httpx.URL(entry.target)
        # httpx2's transport and not its client, which would follow its own mind: it keeps cookies, of all users in one
        # jar, and asks for compression. Bound to the event loop that uses it first; None until then, and after `close`.
        self._transport: httpx.AsyncHTTPTransport | None = None

    @property
    def routes(self) -> list[BaseRoute]:
        """The prefix with all below it, and the prefix itself, which a mount would redirect."""
        return [Mount(self._entry.prefix, self), Route(self._entry.prefix, _Bare(self))]

    async def close(self) -> None:
        """Close all connections, streams included; a request that comes later opens new ones."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    async def __call__(self, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        """Forward one request."""
        assert scope["type"] == "http", "the relay's sockets are dispatched before its routes"
        request = Request(scope, receive)
        mount, path = _split(scope)
        if any(segment in (b".", b"..") for segment in _SEGMENT.findall(unquote_to_bytes(path))):
            # It could lead out of the target's own path. Servers there are that take \ for /, or drop what follows a ;.
            await _problem(400, "expected a path without the segments . and ..")(scope, receive, send)
            return
        if self._transport is None:
            self._transport = httpx.AsyncHTTPTransport(limits=_LIMITS, trust_env=False)
        try:
            answer = await self._transport.handle_async_request(self._request(request, mount, path))
        except ClientDisconnect:
            return
        except httpx.TransportError as error:
            _throttle.warning(self._entry.prefix, "%s: %s", self._entry.prefix, str(error) or type(error).__name__)
            text = f"{self._entry.prefix}: the service behind it does not answer"
            await _problem(502, text)(scope, receive, send)
            return
        try:
            assert isinstance(answer.stream, httpx.AsyncByteStream), "an async transport answers so"
            # The bytes as they come, still compressed as the headers say.
            response = StreamingResponse(answer.stream, answer.status_code)
            response.raw_headers = list(_end_to_end(answer.headers.raw))
            await response(scope, receive, send)
        finally:
            await answer.aclose()

    def _request(self, request: Request, mount: str, path: bytes) -> httpx.Request:
        if not self._entry.strip_prefix:
            mount, path = mount.removesuffix(self._entry.prefix), quote(self._entry.prefix).encode() + path
        # Which host is asked is the target's affair alone; what it is asked for stays as it came, byte for byte.
        asked = self._target.raw_path.split(b"?")[0].rstrip(b"/") + path or b"/"
        query = request.scope["query_string"]
        return httpx.Request(
            request.method,
            self._target,
            headers=_request_headers(request, mount),
            content=_body(request),
            extensions={"timeout": _TIMEOUT.as_dict(), "target": asked + (b"?" + query if query else b"")},
        )


class _Bare:
    """The prefix itself, without a slash after it, as a mount would have it."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    async def __call__(self, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        await self._proxy({**scope, "root_path": scope["path"]}, receive, send)


def _problem(status: int, detail: str) -> Response:
    problem = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return JSONResponse(problem, status, media_type="application/problem+json")


def _split(scope: Scope) -> tuple[str, bytes]:
    """Split a path into the mount, decoded, and what follows it, encoded as the client sent it."""
    mount, rest, _ = split_raw(scope)
    return mount, rest


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    """Leave out what is of one connection only, and what ``Connection`` names besides."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {word.strip().lower() for name, value in pairs if name == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in pairs if name not in _HOP_BY_HOP and name not in named]


def _is_claim(name: bytes) -> bool:
    """Say whether a header tells of proxies before this one; many servers take ``_`` for ``-``."""
    name = name.replace(b"_", b"-")
    return name.startswith(b"x-forwarded-") or name in (b"forwarded", b"x-real-ip")


def _request_headers(request: Request, mount: str) -> list[tuple[bytes, bytes]]:
    # Replaced, not appended to: whatever a client claims here is not to be believed.
    headers = [pair for pair in _end_to_end(request.headers.raw) if pair[0] != b"host" and not _is_claim(pair[0])]
    for name, value in (
        ("x-forwarded-for", request.client.host if request.client else "unknown"),
        ("x-forwarded-host", request.headers.get("host", "")),
        ("x-forwarded-proto", request.url.scheme),
        ("x-forwarded-prefix", quote(mount)),
    ):
        if value:
            headers.append((name.encode(), value.encode("latin-1")))
    return headers


def _body(request: Request) -> AsyncIterator[bytes] | None:
    # HTTP/2 needs neither header for a body.
    streamed = request.scope["http_version"] not in ("1.0", "1.1") and request.method in ("POST", "PUT", "PATCH")
    has_body = streamed or "content-length" in request.headers or "transfer-encoding" in request.headers
    return request.stream() if has_body else None
