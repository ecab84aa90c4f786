"""Forwarding a prefix to another process: how a plugin in any language serves REST routes under the relay.

Owns HTTP forwarding over httpx2, streaming both ways; must not know what it carries.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable
from http import HTTPStatus
from urllib.parse import quote, unquote_to_bytes

import httpx2 as httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from relay.config_sections import ProxyConfig
from relay.log import RateLimitedLoggers
from relay.metrics import Metrics
from relay.paths import split_raw
from relay.transports.base import ReceiveCallable, Scope, SendCallable
from relay.transports.queued import abort_of

_SEGMENT = re.compile(rb"(?:^|[/\\])([^/\\;]*)")
"""A part of a path, without its parameters."""

# A stream may be silent for as long as it likes; connecting has a limit, and the head of an answer its own.
_TIMEOUT = httpx.Timeout(None, connect=5.0)
# One connection for each open stream: a bound here would be a standstill, where `Share` answers.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)

# Of one connection, not of the message: RFC 9110, section 7.6.1. httpx2 and the server write their own.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade".split()
)


class Share:
    """So many requests at a time; 0: no bound."""

    __slots__ = ("_limit", "_taken")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    def take(self) -> bool:
        """Count one more, unless there are too many."""
        if 0 < self._limit <= self._taken:
            return False
        self._taken += 1
        return True

    def give_back(self) -> None:
        """Count one less."""
        self._taken -= 1


class _ClientGone(Exception):
    """The client has gone while its body was on its way."""


class _Client:
    """What a client sends: its body, then its end."""

    def __init__(self, receive: ReceiveCallable, has_body: bool) -> None:
        self.receive = receive
        self.has_body = has_body
        self.on_wait: Callable[[bool], object] = _nothing
        """Called with True when the client is waited for, and with False when a part of its body has come."""
        self.is_read = asyncio.Event()
        """Set once its body is not read any further."""
        if not has_body:
            self.is_read.set()

    async def body(self) -> AsyncIterator[bytes]:
        """The body, part by part. Raises _ClientGone."""
        try:
            more = True
            while more:
                self.on_wait(True)
                message = await self.receive()
                self.on_wait(False)
                if message["type"] == "http.disconnect":
                    raise _ClientGone
                more = message.get("more_body", False)
                if data := message.get("body", b""):
                    yield data
        finally:
            self.is_read.set()

    async def gone(self) -> None:
        """Return once the client has gone; while its body is read, that tells."""
        await self.is_read.wait()
        while (await self.receive())["type"] != "http.disconnect":
            pass


class Proxy:
    """ASGI app that forwards to ``entry.target`` whatever it is mounted for.

    Args: of_all: what all prefixes of a relay may have under way together.
          metrics: where what is refused is counted.
          loggers: the relay's, where it is logged.
    """

    def __init__(
        self,
        entry: ProxyConfig,
        of_all: "Share | None" = None,
        metrics: Metrics | None = None,
        loggers: RateLimitedLoggers | None = None,
    ) -> None:
        self._entry = entry
        self._log = (loggers or RateLimitedLoggers()).get("relay.proxy")
        self._requests = Share(entry.requests_max)
        self._of_all = Share(0) if of_all is None else of_all
        self._metrics = Metrics() if metrics is None else metrics
        self._target = httpx.URL(entry.target)
        # httpx2's transport and not its client, which would follow its own mind: it keeps cookies, of all users in one
        # jar, and asks for compression. Bound to the event loop that uses it first; None until then, and after `close`.
        self._transport: httpx.AsyncHTTPTransport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

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
        mount, path = _split(scope)
        if any(segment in (b".", b"..") for segment in _SEGMENT.findall(unquote_to_bytes(path))):
            # It could lead out of the target's own path. Servers there are that take \ for /, or drop what follows a ;.
            await _problem(400, "expected a path without the segments . and ..")(scope, receive, send)
            return
        if self._transport is None or self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            self._transport = httpx.AsyncHTTPTransport(limits=_LIMITS, trust_env=False)
        if not self._requests.take():
            await self._refuse(503, "too many requests", "too many requests under way", scope, receive, send)
        elif not self._of_all.take():
            self._requests.give_back()
            await self._refuse(503, "too many requests", "too many requests under way in all", scope, receive, send)
        else:
            try:
                await self._serve(scope, _Client(receive, _has_body(Request(scope))), send, mount, path)
            finally:
                self._requests.give_back()
                self._of_all.give_back()

    async def _serve(self, scope: Scope, client: "_Client", send: SendCallable, mount: str, path: bytes) -> None:
        """Wait for the end of the answer or of the client, whichever comes first."""
        forwarding = asyncio.create_task(self._forward(scope, client, send, mount, path))
        leaving = asyncio.create_task(client.gone())
        try:
            await asyncio.wait((forwarding, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not forwarding.done():
                self._count("client gone")
        finally:
            for task in (forwarding, leaving):
                task.cancel()
            await asyncio.wait((forwarding, leaving))
            _ = leaving.cancelled() or leaving.exception()
        if not forwarding.cancelled() and (error := forwarding.exception()) is not None:
            raise error

    async def _forward(self, scope: Scope, client: "_Client", send: SendCallable, mount: str, path: bytes) -> None:
        assert self._transport is not None, "made before"
        request = self._request(Request(scope), client, mount, path)
        try:
            answer = await self._head(self._transport, request, client)
        except _ClientGone:
            self._count("client gone")
            return
        except TimeoutError:
            text = f"no answer within {self._entry.head_timeout_s:g} s"
            await self._refuse(504, "no answer in time", text, scope, client.receive, send)
            return
        except httpx.TransportError as error:
            self._warn("request to %s failed: %s", error)
            text = f"{self._entry.prefix}: the service behind it does not answer"
            await _problem(502, text)(scope, client.receive, send)
            return
        client.is_read.set()
        try:
            assert isinstance(answer.stream, httpx.AsyncByteStream), "an async transport answers so"
            headers = list(_end_to_end(answer.headers.raw))
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            async for data in answer.stream:  # the bytes as they come, still compressed as the headers say
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx.TransportError as error:
            self._warn("answer of %s broke off: %s", error)
            # The client sees that there is more to come by the end of its connection alone. Other servers than
            # Uvicorn end it when an application returns.
            if (abort := abort_of(client.receive)) is not None:
                abort()
                await client.gone()
        finally:
            await answer.aclose()

    async def _head(
        self, transport: httpx.AsyncHTTPTransport, request: httpx.Request, client: "_Client"
    ) -> httpx.Response:
        """Send the request, and wait for the head of the answer, so long after the last part of the body."""
        limit_s = self._entry.head_timeout_s
        if not limit_s:
            return await transport.handle_async_request(request)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limit_s) as timeout:
            client.on_wait = lambda waits: timeout.reschedule(None if waits else loop.time() + limit_s)
            try:
                return await transport.handle_async_request(request)
            finally:
                client.on_wait = _nothing

    def _warn(self, text: str, error: httpx.TransportError) -> None:
        self._log.warning(self._entry.prefix, text, self._entry.prefix, str(error) or type(error).__name__)

    def _count(self, kind: str) -> None:
        self._metrics.refused[f"proxy: {kind}"] += 1

    async def _refuse(
        self, status: int, kind: str, text: str, scope: Scope, receive: ReceiveCallable, send: SendCallable
    ) -> None:
        self._count(kind)
        self._log.warning(f"{self._entry.prefix}: {kind}", "request to %s refused: %s", self._entry.prefix, text)
        await _problem(status, f"{self._entry.prefix}: {text}")(scope, receive, send)

    def _request(self, request: Request, client: "_Client", mount: str, path: bytes) -> httpx.Request:
        if not self._entry.strip_prefix:
            mount, path = mount.removesuffix(self._entry.prefix), quote(self._entry.prefix).encode() + path
        # Which host is asked is the target's affair alone; what it is asked for stays as it came, byte for byte.
        asked = self._target.raw_path.split(b"?")[0].rstrip(b"/") + path or b"/"
        query = request.scope["query_string"]
        sent = httpx.Request(
            request.method,
            self._target,
            headers=_request_headers(request, mount),
            content=client.body() if client.has_body else None,
            extensions={"timeout": _TIMEOUT.as_dict(), "target": asked + (b"?" + query if query else b"")},
        )
        if not self._target.userinfo:
            return sent
        return next(httpx.BasicAuth(self._target.username, self._target.password).auth_flow(sent))


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
    """Leave out what is of one connection only, and what ``WebSocketTransport`` names besides."""
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


def _nothing(*_: object) -> None:
    return None


def _has_body(request: Request) -> bool:
    # HTTP/2 needs neither header for a body.
    streamed = request.scope["http_version"] not in ("1.0", "1.1") and request.method in ("POST", "PUT", "PATCH")
    return streamed or "content-length" in request.headers or "transfer-encoding" in request.headers
