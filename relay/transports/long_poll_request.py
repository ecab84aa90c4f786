"""Requests of long-polling clients: what they say, how they are answered, and how much of their bodies is held.

Owns these, for one request at a time; must not know the settings' source or a session's state.

phoenix.js looks at the ``status`` in an answer's JSON alone. For it, 403 of a GET is a refusal, and 500 of a GET, or
anything but 200 of a POST, is the end of the session; after all of these it tries again. At any other status of a GET
it stops working, so no other is given.
"""

import asyncio
from collections import Counter
from contextlib import suppress
from urllib.parse import parse_qs

import msgspec
from starlette.responses import Response

from relay.config_sections import LimitsConfig
from relay.transports import cors
from relay.transports.base import ReceiveCallable, Scope
from relay.transports.handshake import HandshakeRejected, find_version
from relay.transports.long_poll import PollRequest

TOKEN_BEGINS = "lp-"
"""How a session's token begins: the query has a parameter of the same name for the token of a user."""

_NDJSON = "application/x-ndjson"
_TEMPORARY = (429, 503)

_encode = msgspec.json.Encoder().encode


class BodyRefused(Exception):
    """A body is not read to its end; the status and the reason to answer with, and a word for the counter."""

    def __init__(self, status: int, reason: str, kind: str) -> None:
        self.status = status
        self.reason = reason
        self.kind = kind
        super().__init__(reason)


def check(scope: Scope) -> PollRequest | HandshakeRejected:
    """Check a request for a new session, whose page has been checked."""
    version = find_version(scope)
    if isinstance(version, HandshakeRejected):
        return version
    return PollRequest(version, cors.header(scope, b"x-phoenix-authtoken"))


def session_token(scope: Scope) -> str | None:
    """The token of the session that a request belongs to; None where it belongs to no session yet.

    It is the last ``token`` in the query, or the header that phoenix.js has since 1.9.
    """
    found = cors.header(scope, b"x-phoenix-longpoll-token")
    if found is None:
        query = parse_qs(scope["query_string"].decode("latin-1"))
        found = query["token"][-1] if "token" in query else None
    return found if found is not None and found.startswith(TOKEN_BEGINS) else None


def is_ndjson(scope: Scope) -> bool:
    """Whether the body has one frame a line."""
    return (cors.header(scope, b"content-type") or "").partition(";")[0].strip().lower() == _NDJSON


def answer(
    scope: Scope, status: int, *, token: str = "", messages: bytes = b"", reason: str = "", may_read: bool = True
) -> Response:
    """An answer to a session's request, or to one that has opened a session.

    Args: status: what phoenix.js goes by.
          messages: a JSON array of JSON texts.
          reason: for people, and for other clients.
    """
    content: dict[str, object] = {"status": status}
    if token:
        content |= {"token": token, "messages": msgspec.Raw(messages or b"[]")}
    if reason:
        content["reason"] = reason
    return Response(_encode(content), headers=cors.headers(scope, may_read=may_read), media_type="application/json")


def refuse(scope: Scope, refused: HandshakeRejected, *, may_read: bool = True) -> Response:
    """The answer to a request that is refused: 403, or, where the reason passes, 500."""
    status = 500 if refused.status in _TEMPORARY else 403
    response = answer(scope, status, reason=refused.text, may_read=may_read)
    if refused.status in (400, 404):
        response.status_code = refused.status
    return response


def wrong_method(scope: Scope) -> HandshakeRejected:
    """Why a request is refused that is no GET, POST or OPTIONS."""
    return HandshakeRejected(400, f"expected GET, POST or OPTIONS for long polling, got {scope['method']}", "method")


def answer_options(scope: Scope, *, may_read: bool) -> Response:
    """The answer to OPTIONS: browsers ask so before a request to another origin, which has headers of its own."""
    given = cors.headers(scope, may_read=may_read)
    if may_read:
        given |= {
            "access-control-allow-methods": "get, post, options",
            "access-control-allow-headers": cors.header(scope, b"access-control-request-headers") or "",
            "access-control-max-age": "3600",
        }
    return Response(status_code=204, headers=given)


async def wait_until_gone(receive: ReceiveCallable) -> None:
    """Return when the client of a request has gone."""
    with suppress(Exception):  # what `receive` raises for a client that has gone differs from server to server
        while (await receive())["type"] != "http.disconnect":
            pass  # the body of a GET means nothing


class Bodies:
    """The bodies of posts that are being read, or are read and wait for their session: bounded in bytes.

    Args: limits: ``body_max_bytes`` is for the posts of one session, ``in_flight_total_max_bytes`` for all.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._total = 0
        self._by_session: Counter[str] = Counter()

    def __len__(self) -> int:
        """Sessions whose posts are under way."""
        return len(self._by_session)

    async def read(self, session: str, scope: Scope, receive: ReceiveCallable, timeout_s: float) -> bytes:
        """Read a body; `release` has to follow, with its size.

        Raises: BodyRefused: it is too large, or too slow, or too much is under way; ConnectionError: the client has
                gone.
        """
        most = self._limits.body_max_bytes
        length = cors.header(scope, b"content-length") or ""
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > most):
            raise BodyRefused(413, f"expected a body of at most {most} bytes", "body too large")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError("the client has gone")
                    part = message.get("body", b"")
                    size += len(part)
                    self._hold(session, len(part))
                    parts.append(part)
                    if size > most:
                        raise BodyRefused(413, f"expected a body of at most {most} bytes", "body too large")
                    if self._by_session[session] > most:
                        raise BodyRefused(429, f"expected posts of at most {most} bytes at once", "too many posts")
                    if self._has_too_much(session):
                        raise BodyRefused(503, "too much is posted at once by all clients; try again", "posts full")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            self.release(session, size)
            raise BodyRefused(408, f"expected the whole body within {timeout_s:g} s", "body too slow") from None
        except BaseException:
            self.release(session, size)
            raise

    def _hold(self, session: str, size: int) -> None:
        self._total += size
        self._by_session[session] += size

    def _has_too_much(self, session: str) -> bool:
        """Whether all have too much, and this session more than its share: who posts little is never refused."""
        most = self._limits.in_flight_total_max_bytes
        return 0 < most < self._total and self._by_session[session] > most / len(self._by_session)

    def release(self, session: str, size: int) -> None:
        """Hold a body no longer."""
        self._hold(session, -size)
        if not self._by_session[session]:
            del self._by_session[session]
