"""Frames of Phoenix Channels V2, to and from messages. It does no I/O.

Source: Phoenix 1.9, ``v2_json_serializer.ex`` and ``assets/js/phoenix/serializer.js``.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

VSN = "2.0.0"

PUSH, REPLY, BROADCAST = 0, 1, 2
"""First byte of a binary frame."""

Ref: TypeAlias = str | int | None

_TEXT = r'("(?:[^"\\]|\\.)*")'
_REF = rf"(?:null|-?\d+|{_TEXT})"
_NAMES = re.compile(rf"\s*\[\s*{_REF}\s*,\s*{_REF}\s*,\s*{_TEXT}\s*,\s*{_TEXT}")
"""How a text frame begins, up to its topic and its event."""


@dataclass(frozen=True, slots=True)
class Message:
    """The five fields of one frame; ``payload`` is decoded JSON, or bytes where the frame is binary.

    Of a ``phx_reply`` it is ``{"status": str, "response": …}``, and the response may be bytes.
    """

    join_ref: Ref
    ref: Ref
    topic: str
    event: str
    payload: Any


class JsonText(str):
    """A payload that is JSON already, as `encode_payload` makes it."""


def check_text(what: str, text: object) -> str:
    """Check a name, or another text that is sent. Raises TypeError: no text; ValueError: UTF-8 cannot encode it."""
    if not isinstance(text, str):
        raise TypeError(f"{what}: expected text, got {type(text).__name__}")
    try:
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: expected text that UTF-8 can encode, got {_around(error)}") from None
    return text


def encode_payload(payload: Any) -> JsonText | bytes:
    """To JSON text, or to bytes where it is binary.

    Raises: ValueError: it has no JSON (``nan``, half a surrogate pair, a list that contains itself).
            TypeError: it is nothing that JSON knows.
    """
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload)
    if isinstance(payload, JsonText):
        return payload
    try:
        text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"payload: expected text that UTF-8 can encode, got {_around(error)}") from None
    except RecursionError:
        raise ValueError("payload: nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise type(error)(f"payload: {error}") from None
    return JsonText(text)


def _around(error: UnicodeEncodeError) -> str:
    """What cannot be encoded, with a little of what is beside it: half of a surrogate pair as a rule."""
    return repr(error.object[max(error.start - 10, 0) : error.end + 10])


def encode(message: Message) -> str | bytes:
    """To a text frame, or, where the payload is bytes, to ``00 jl rl tl el join_ref ref topic event payload``.

    Raises: ValueError, TypeError: as `encode_payload`, also for the names; a name is over 255 bytes in a binary frame.
    """
    join_ref, ref, topic, event = message.join_ref, message.ref, message.topic, message.event
    _ = check_text("topic", topic), check_text("event", event)
    payload = encode_payload(message.payload)
    if isinstance(payload, str):
        fields = json.dumps([join_ref, ref, topic, event], ensure_ascii=False, separators=(",", ":"))
        return f"{fields[:-1]},{payload}]"
    names = [("" if name is None else str(name)).encode() for name in (join_ref, ref, topic, event)]
    if max(map(len, names)) > 255:
        raise ValueError("expected names of up to 255 bytes in a binary frame")
    return bytes((PUSH, *map(len, names))) + b"".join(names) + payload


def decode(frame: str | bytes) -> Message:
    """From a text frame, or from a binary push, reply or broadcast.

    Raises: ValueError: not a valid frame.
    """
    message = _decode_text(frame) if isinstance(frame, str) else _decode_binary(frame)
    if message.event == "phx_reply":
        reply = message.payload
        if not (isinstance(reply, dict) and isinstance(reply.get("status"), str) and "response" in reply):
            raise ValueError("expected status and response in a reply")
    return message


def names_in(frame: str | bytes) -> tuple[str, str] | None:
    """Topic and event of a text frame that `decode` refuses; None where they cannot be found."""
    found = _NAMES.match(frame) if isinstance(frame, str) else None
    try:
        return None if found is None else (json.loads(found[3]), json.loads(found[4]))
    except ValueError:
        return None


def _decode_text(frame: str) -> Message:
    try:
        fields = json.loads(frame)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not (isinstance(fields, list) and len(fields) >= 5):
        raise ValueError("expected [join_ref, ref, topic, event, payload]")
    join_ref, ref, topic, event, payload = fields[:5]
    if not (isinstance(join_ref, Ref) and isinstance(ref, Ref) and isinstance(topic, str) and isinstance(event, str)):
        raise ValueError("expected refs and names that are strings")
    return Message(join_ref, ref, topic, event, payload)


def _decode_binary(frame: bytes) -> Message:
    kind = frame[0] if frame else None
    if kind == PUSH:
        (join_ref, topic, event), payload = _split(frame, 3)
        return Message(join_ref or None, None, topic, event, payload)
    if kind == REPLY:
        (join_ref, ref, topic, status), response = _split(frame, 4)
        return Message(join_ref or None, ref or None, topic, "phx_reply", {"status": status, "response": response})
    if kind == BROADCAST:
        (topic, event), payload = _split(frame, 2)
        return Message(None, None, topic, event, payload)
    raise ValueError(f"binary frame of unknown kind {kind}")


def _split(frame: bytes, count: int) -> tuple[list[str], bytes]:
    """``count`` names, their lengths before them, and the rest."""
    end = 1 + count
    names = []
    for length in frame[1:end]:
        names.append(frame[end : end + length].decode())
        end += length
    if len(names) < count or end > len(frame):
        raise ValueError("binary frame cut short")
    return names, frame[end:]
