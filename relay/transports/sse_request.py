"""The request for a stream of server-sent events: what it asks for, whether it may pass, and how it is refused.

Owns the checks before a stream exists, as pure functions of an ASGI scope; must not know the settings' source or the
transport.

A browser's `EventSource` comes back after a stream that ends, and after no answer, but never after another status than
200. So what will not change is answered with its status, and what passes with a stream that says so and ends.
"""

import random
from collections.abc import Mapping
from typing import NamedTuple

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response

from relay.config_sections import LimitsConfig
from relay.protocol import sse
from relay.protocol.topics import is_topic
from relay.transports.base import Scope
from relay.transports.cors import headers
from relay.transports.handshake import HandshakeRejected, check_page

TOPICS_MAX = 10
"""Topics of one stream."""

_COUNT_MAX_DIGITS = 9
"""Of ``last=``; the history bounds the number."""

_METHODS = "GET, OPTIONS"

_TEMPORARY = (429, 503)

# In milliseconds: all come back after a restart of the relay, and not at the same moment.
_RETRY_MIN_MS, _RETRY_MAX_MS = 1000, 3000
_LATER_MIN_MS, _LATER_MAX_MS = 1000, 5000


class StreamRequest(NamedTuple):
    """A request that may pass."""

    topics: tuple[str, ...]
    since: Mapping[str, str]
    """By topic, the position of the last event that the client has had; not judged yet."""
    last: int | None = None
    """How many of the newest events it asks for where it names no position."""
    auth_token: None = None
    """A stream's token is in its query or its headers."""


def check(
    scope: Scope, origins: str | tuple[str, ...], limits: LimitsConfig, *, has_local_pages: bool = False
) -> StreamRequest | HandshakeRejected:
    """Check a request for a stream.

    Args: scope: an ASGI ``http`` scope of a GET.
          origins, has_local_pages: as of `relay.transports.handshake.check`.
    """
    foreign = check_page(scope, origins, has_local_pages=has_local_pages)
    if foreign is not None:
        return foreign
    request = HTTPConnection(scope)
    topics = tuple(dict.fromkeys(request.query_params.getlist("topic")))
    if not topics:
        return HandshakeRejected(400, "expected topic=… in the query, once for each topic", "topics")
    most = min(TOPICS_MAX, limits.topics_per_socket, limits.joins_burst if limits.joins_per_s else TOPICS_MAX)
    if len(topics) > most:
        return HandshakeRejected(400, f"expected at most {most} topics, got {len(topics)}", "topics")
    for topic in topics:
        if not is_topic(topic):
            text = f"expected topics of 1 to 255 bytes without control characters, none of relay's own, got {topic!r}"
            return HandshakeRejected(400, text, "topics")
    if not sse.fits_positions(topics):
        text = f"expected topics whose names and positions fit into {sse.POSITIONS_MAX_BYTES} bytes, URL-encoded"
        return HandshakeRejected(400, f"{text}, got longer ones; open several streams", "topics")
    position = request.headers.get("last-event-id") or request.query_params.get("since", "")
    count = request.query_params.get("last", "")
    last = int(count) if count.isascii() and count.isdigit() and len(count) <= _COUNT_MAX_DIGITS else None
    return StreamRequest(topics, sse.decode_positions(position, topics), last)


def wrong_method(scope: Scope) -> HandshakeRejected:
    """Why a request that is no GET is refused."""
    text = f"expected GET for a stream of server-sent events, got {scope['method']}"
    return HandshakeRejected(405, text, "method")


def first_lines(ids: bytes) -> bytes:
    """What a stream begins with: when to come back after its end, and the positions that it begins at, if any."""
    return sse.retry(random.randint(_RETRY_MIN_MS, _RETRY_MAX_MS)) + (b"id: %b\n\n" % ids if ids else b"\n")


def last_lines(event: bytes) -> bytes:
    """What a stream ends with: when to come back, and ``event``, which says why it ends."""
    return sse.retry(random.randint(_LATER_MIN_MS, _LATER_MAX_MS)) + event


def stream_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The same for a stream that begins, as ASGI has them."""
    given = {**headers(scope), "content-type": "text/event-stream; charset=utf-8"}
    return [(name.encode(), value.encode("latin-1")) for name, value in given.items()]


def answer(scope: Scope, refused: HandshakeRejected, *, may_read: bool = True) -> Response:
    """The answer to a request that is refused: a stream that ends where the reason passes, else the status."""
    given = headers(scope, may_read=may_read)
    if refused.status in _TEMPORARY:
        body = last_lines(sse.encode_failure(refused.text))
        return Response(body, headers=given, media_type="text/event-stream")
    if refused.status == 401:
        given["www-authenticate"] = "Bearer"
    if refused.status == 405:
        given["allow"] = _METHODS
    return PlainTextResponse(f"{refused.text}\n", refused.status, given)


def answer_options(scope: Scope, *, may_read: bool) -> Response:
    """The answer to OPTIONS: browsers ask so before a `fetch` with a token; `EventSource` needs none."""
    given = {**headers(scope, may_read=may_read), "allow": _METHODS}
    if may_read:
        given |= {
            "access-control-allow-methods": "GET",
            "access-control-allow-headers": "authorization, cache-control, last-event-id",
            "access-control-max-age": "600",
        }
    return Response(status_code=204, headers=given)
