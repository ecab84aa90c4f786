"""Server-sent events: what a stream is sent, as ``text/event-stream``.

Owns the bytes; must not know HTTP, nor who reads them. An event is a block of lines that ends with an empty one::

    id: 1764150000000-17        its position in the topic's history, where it has one
    event: new_msg
    data: {"text":"hi"}

Source: WHATWG HTML, section 9.2, "Server-sent events".
"""

import re
from collections.abc import Mapping
from urllib.parse import quote, unquote

import msgspec

from relay.errors import Reason
from relay.protocol.frame import Frame
from relay.protocol.payload import Payload, as_json, encode_payload

COMMENT = b":\n\n"
"""What is written to a stream without events, so that no proxy takes it for dead; clients ignore it."""

JOIN_EVENT, ERROR_EVENT, CLOSE_EVENT, LOST_EVENT = "relay:join", "relay:error", "relay:close", "relay:lost"
"""Names of relay's own events; a publisher cannot use them, since no event from the bus has a colon."""

POSITIONS_MAX_BYTES = 4096
"""Longest ``id`` of a stream with several topics; a browser sends it back as a header."""

_POSITION_BYTES = 40
"""Bytes that one position takes in it, its topic aside: a time in milliseconds, up to 20 digits more, three signs."""

_LINE_END = re.compile(rb"\r\n|\n|\r")

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class StreamFrame(Frame):
    """One event, ready for any number of streams with one topic.

    Args: topic: where it was published.
          body: its lines but for the ``id``, and the empty line.
          position: its place in the topic's history, where it has one.
    """

    __slots__ = ("body", "topic")

    def __init__(self, topic: str, body: bytes, position: str | None = None) -> None:
        super().__init__(body if position is None else b"id: %b\n%b" % (position.encode(), body), True)
        self.topic: str = topic
        self.body: bytes = body
        self.position = position

    @property
    def ws_frame(self) -> bytes:
        """The event as it goes to the transport: one chunk of an HTTP/1.1 response, made once for all streams.

        Source: RFC 9112, section 7.1.
        """
        if self._ws_frame is None:
            self._ws_frame = chunk(self.data)
        return self._ws_frame

    def payload_value(self, key: str) -> bytes | None:
        """The value under ``key`` in the payload, as JSON; None where there is none."""
        if self._value is None or self._value[0] != key:
            lines = self.body.split(b"\n")
            data = b"\n".join(line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: "))
            try:
                value = _decode_object(data).get(key)
            except msgspec.DecodeError:  # the payload is no object
                value = None
            self._value = (key, None if value is None else bytes(value))
        return self._value[1]


class JoinReply(Frame):
    """The reply to a join: no client reads it, and the transport begins the stream by it."""

    __slots__ = ("response", "status", "topic")

    def __init__(self, topic: str, status: str, response: Payload) -> None:
        super().__init__(b"", True)
        self.topic: str = topic
        self.status: str = status
        self.response: Payload = response


class ChannelEnd(StreamFrame):
    """The end of a subscription from relay's side: an error, after which the client is to come back, or a close."""

    __slots__ = ("reason",)

    def __init__(self, topic: str, reason: str | None = None) -> None:
        super().__init__(topic, encode_end(topic, reason))
        self.reason: str | None = reason


def chunk(data: bytes) -> bytes:
    """Some bytes as one chunk of an HTTP/1.1 response."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_lines(event: str, payload: Payload) -> bytes:
    """Encode one event without its ``id``; bytes stand there as ``{"base64": "…"}``.

    A payload may hold line ends of any kind, of which the stream's parser makes ``\\n``: white space in JSON.
    """
    data = bytes(as_json(payload))
    if b"\n" in data or b"\r" in data:
        data = b"\ndata: ".join(_LINE_END.split(data))
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data)


def encode_join(topic: str, response: Payload) -> bytes:
    """Encode that a topic is joined, and what plugins have answered: ``relay:join``."""
    data = b'{"topic":%b,"response":%b}' % (bytes(encode_payload(topic)), bytes(as_json(response)))
    return encode_lines(JOIN_EVENT, msgspec.Raw(data))


def encode_end(topic: str, reason: str | None) -> bytes:
    """Encode the end of a subscription: ``relay:error`` with a reason, ``relay:close`` without."""
    if reason is None:
        return encode_lines(CLOSE_EVENT, encode_payload({"topic": topic}))
    return encode_lines(ERROR_EVENT, encode_payload({"topic": topic, "reason": reason}))


def encode_failure(reason: str) -> bytes:
    """Encode why a stream ends: ``relay:error`` without a topic."""
    return encode_lines(ERROR_EVENT, encode_payload({"reason": reason}))


def encode_lost(topic: str, reason: str) -> bytes:
    """Encode that events since the client's position are not in the history any more: ``relay:lost``."""
    return encode_lines(LOST_EVENT, encode_payload({"topic": topic, "reason": reason}))


def retry(milliseconds: int) -> bytes:
    """Encode after how many milliseconds the client is to come back when the stream ends."""
    return b"retry: %d\n" % milliseconds


# Positions, as the client is given them and gives them back.


def encode_positions(positions: Mapping[str, str]) -> bytes:
    """Encode the positions of a stream with several topics: ``quote(topic)=position`` joined by ``&``."""
    return "&".join(f"{quote(topic, safe='')}={position}" for topic, position in positions.items()).encode()


def decode_positions(text: str, topics: tuple[str, ...]) -> dict[str, str]:
    """Read what `encode_positions` has written, or, with one topic, its position alone.

    Never raises: a text that is no position is for the history to refuse, and topics not asked for are left out.
    """
    if not text or len(text) > POSITIONS_MAX_BYTES:
        return {}
    if "=" not in text:
        return {topics[0]: text} if len(topics) == 1 else {}
    pairs = (pair.partition("=") for pair in text.split("&"))
    found = {unquote(name): position for name, _, position in pairs if position}
    return {topic: found[topic] for topic in topics if topic in found}


def fits_positions(topics: tuple[str, ...]) -> bool:
    """Say whether the positions of these topics fit into `POSITIONS_MAX_BYTES`."""
    return (
        len(topics) == 1 or sum(len(quote(topic, safe="")) + _POSITION_BYTES for topic in topics) <= POSITIONS_MAX_BYTES
    )


# How a refused join is answered.

_STATUS = {
    Reason.INVALID_TOPIC: 400,
    Reason.TOO_MANY_TOPICS: 400,
    Reason.INVALID_PAYLOAD: 400,
    Reason.INVALID_TOKEN: 401,
    Reason.TOKEN_EXPIRED: 401,
    Reason.UNMATCHED_TOPIC: 404,
    # These pass: the client is to come back.
    Reason.AUTH_UNAVAILABLE: 503,
    Reason.WEBHOOK_UNAVAILABLE: 503,
    Reason.BUS_UNAVAILABLE: 503,
    Reason.INTERNAL: 503,
    Reason.JOIN_CRASHED: 503,
    Reason.RATE_LIMITED: 503,
    Reason.REMOVED: 503,
}


def status_of(reason: str) -> int:
    """The HTTP status of a refused join; 503 where it may be accepted later, 403 for what a plugin says."""
    return next((status for known, status in _STATUS.items() if known == reason), 403)
