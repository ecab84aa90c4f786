"""What clients send and are sent by long polling: Phoenix frames, several to one request or one response.

Owns these bodies; must not know sessions, tokens or HTTP.

A request's body is one frame as JSON text or, as ``application/x-ndjson``, one frame a line: JSON, or the base64 of a
binary frame. A response has its frames as JSON *texts*, which have no place for bytes: a binary frame becomes a text
frame whose payload is ``{"base64": "…"}``.

Source: Phoenix 1.9, ``lib/phoenix/transports/long_poll.ex`` and ``assets/js/phoenix/longpoll.js``.
"""

import base64
import binascii
from collections.abc import Iterable, Iterator
from itertools import pairwise

import msgspec

from relay.errors import CloseCode, WireError
from relay.protocol import serializer
from relay.protocol.frame import Frame
from relay.protocol.payload import as_json
from relay.protocol.serializer import BinaryKind, Version

_JSON_BEGINS = (b"["[0], b"{"[0])
"""How a line begins that is no base64: a frame of V2, or of V1."""

_encode_texts = msgspec.json.Encoder().encode


def encode_frames(frames: Iterable[Frame]) -> bytes:
    """Encode frames as a JSON array of JSON texts."""
    return _encode_texts([frame.text if frame.is_text else as_text(frame).text for frame in frames])


def as_text(frame: Frame) -> Frame:
    """A binary frame of V2 as a text frame: its bytes stand there as ``{"base64": "…"}``.

    Args: frame: one of the relay's own, as `relay.protocol.serializer` has encoded it.
    """
    data = frame.data
    names = {BinaryKind.PUSH: 3, BinaryKind.REPLY: 4, BinaryKind.BROADCAST: 2}[BinaryKind(data[0])]
    ends = [1 + names]
    for length in data[1 : 1 + names]:
        ends.append(ends[-1] + length)
    parts = [data[start:end].decode() for start, end in pairwise(ends)]
    payload = as_json(data[ends[-1] :])
    if names == 2:
        topic, event = parts
        return serializer.encode_broadcast(Version.V2, topic, event, payload)
    if names == 3:
        join_ref, topic, event = parts
        return serializer.encode_push(Version.V2, join_ref or None, topic, event, payload)
    join_ref, ref, topic, status = parts
    return serializer.encode_reply(Version.V2, join_ref or None, ref or None, topic, status, payload)


def decode_body(body: bytes, frame_max_bytes: int, *, is_ndjson: bool) -> Iterator[str | bytes]:
    """Take the frames out of a request's body, one by one.

    Phoenix reads 100 lines at most and passes over the rest; here all are read, since phoenix.js before 1.8.6 sends as
    many as it has.

    Args:   is_ndjson: whether it has one frame a line. Else it is one frame: a text or, as phoenix.js 1.6 sends it, a
                binary one, whose first byte, unlike a text's, is 0.
    Raises: WireError: a frame is too large, no UTF-8, or no base64; the frames before it have been given out.
    """
    if not is_ndjson:
        if body:
            _check_size(len(body), frame_max_bytes)
            yield body if body[0] == BinaryKind.PUSH else _text(body)
        return
    start = 0
    while start < len(body):
        end = body.find(b"\n", start)
        end = len(body) if end < 0 else end
        line, start = body[start:end].strip(b" \t\r"), end + 1
        if not line:
            continue
        if line[0] in _JSON_BEGINS:
            _check_size(len(line), frame_max_bytes)
            yield _text(line)
        else:
            _check_size(len(line) // 4 * 3 - line[-2:].count(b"="), frame_max_bytes)
            yield _binary(line)


def _check_size(size: int, frame_max_bytes: int) -> None:
    if size > frame_max_bytes:
        raise WireError(CloseCode.TOO_BIG, f"expected frames of at most {frame_max_bytes} bytes")


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise WireError(CloseCode.INVALID_PAYLOAD, "expected UTF-8 text") from None


def _binary(line: bytes) -> bytes:
    try:
        return base64.b64decode(line, validate=True)
    except binascii.Error:
        text = "expected a line of JSON, or the base64 of a binary frame"
        raise WireError(CloseCode.INVALID_PAYLOAD, text) from None
