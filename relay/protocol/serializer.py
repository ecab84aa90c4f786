"""Phoenix frames, V1 and V2, text and binary.

Owns the bytes; must not know what a message means, who sent it, or who will read it.

Text frames of V2 are five-element arrays, those of V1 are objects::

    ["join_ref", "ref", "topic", "event", {payload}]
    {"topic": "…", "event": "…", "payload": {…}, "ref": "…", "join_ref": "…"}

A payload stays undecoded: it is JSON (checked, verbatim) in a `msgspec.Raw`, or the bytes of a binary frame.

Source: Phoenix 1.9, ``lib/phoenix/socket/serializers/v1_json_serializer.ex`` and ``v2_json_serializer.ex``.
"""

import re
from enum import IntEnum
from typing import TypeAlias

import msgspec

from relay.errors import CloseCode, WireError
from relay.protocol import sse
from relay.protocol.frame import Frame, LocalFrame
from relay.protocol.payload import EMPTY, Payload, as_json, encode_payload, replace_lone_surrogates
from relay.protocol.topics import NAME_MAX_BYTES

Ref: TypeAlias = str | int | None
"""A client's number for a message or a join. phoenix.js sends strings, V1 clients also integers; echoed as it came."""


_COPY_FROM_BYTES = 4096
"""Of larger frames the payload is copied; below, a copy costs more than what else of the frame it would free."""

_VSN = re.compile(r"([12])\.0\.(?:0|[1-9][0-9]*)")


class Version(IntEnum):
    """The serializer a socket speaks, negotiated by ``vsn``; or what takes the place of one."""

    V1 = 1
    V2 = 2
    SSE = 3
    """What it is sent is `relay.protocol.sse`; what its transport says in its client's name is V2."""
    LOCAL = 4
    """Code in this process is the subscriber: `relay.protocol.frame.LocalFrame`."""


# Enum members are looked up slowly, and this one is asked for with each event.
_V2 = Version.V2


class BinaryKind(IntEnum):
    """First byte of a binary V2 frame."""

    PUSH = 0
    REPLY = 1
    BROADCAST = 2


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One decoded frame from a client, in the order of V2's fields; elements past the fifth are ignored."""

    join_ref: Ref
    ref: Ref
    topic: str
    event: str
    payload: Payload


# One struct per version for the decoder alone: it cannot choose between `Raw` and `bytes`.
class _TextV2(msgspec.Struct, array_like=True, gc=False):
    join_ref: Ref
    ref: Ref
    topic: str
    event: str
    payload: msgspec.Raw


class _TextV1(msgspec.Struct, gc=False):
    topic: str
    event: str
    payload: msgspec.Raw
    ref: Ref
    join_ref: Ref = None


_decode_v2 = msgspec.json.Decoder(_TextV2).decode
_decode_v1 = msgspec.json.Decoder(_TextV1).decode
_encode = msgspec.json.Encoder().encode


def negotiate(vsn: str) -> Version | None:
    """Choose the serializer for the ``vsn`` of a handshake; None where none fits (the handshake is refused, 403).

    Source: Phoenix 1.9, ``socket.ex: negotiate_serializer`` – V1 for ``~> 1.0.0``, V2 for ``~> 2.0.0``.
    """
    # As text: the client chooses the number of digits, and Python refuses to read more than 4300 of them.
    found = _VSN.fullmatch(vsn)
    return Version(int(found[1])) if found else None


def decode(frame: str | bytes, version: Version) -> Message:
    """Decode one frame sent by a client.

    Args:    frame: ``str`` for a text frame, ``bytes`` for a binary one.
    Returns: the message; ``payload`` is undecoded JSON, or the raw bytes of a binary push.
    Raises:  WireError: not what the version speaks; its text says what was expected and what came.
    Source:  Phoenix 1.9, ``V2.JSONSerializer.decode!/2`` and ``V1.JSONSerializer.decode!/2``.
    """
    # A payload may wait long. It points into what it was decoded from: that is UTF-8, since one emoji makes a str four
    # times larger, and is no large frame.
    try:
        if version is Version.V1:
            # Some V1 clients send their JSON in binary frames; decoding it here also proves it is UTF-8.
            text = frame if isinstance(frame, str) else frame.decode()
            old = _decode_v1(text if text.isascii() else text.encode())
            payload = old.payload if len(frame) <= _COPY_FROM_BYTES else old.payload.copy()
            return _checked(Message(old.join_ref, old.ref, old.topic, old.event, payload))
        if isinstance(frame, bytes):
            return _decode_binary(frame)
        new = _decode_v2(frame if frame.isascii() else frame.encode())
        payload = new.payload if len(frame) <= _COPY_FROM_BYTES else new.payload.copy()
        return _checked(Message(new.join_ref, new.ref, new.topic, new.event, payload))
    except msgspec.ValidationError as error:
        shape = "[join_ref, ref, topic, event, payload]" if version is Version.V2 else "{topic, event, payload, ref}"
        raise WireError(CloseCode.INVALID_PAYLOAD, f"expected {shape}: {error}") from None
    except msgspec.DecodeError as error:
        if isinstance(frame, str) and (whole := replace_lone_surrogates(frame)) != frame:
            return decode(whole, version)
        raise WireError(CloseCode.INVALID_PAYLOAD, f"expected JSON: {error}") from None
    except RecursionError:
        raise WireError(CloseCode.INVALID_PAYLOAD, "expected JSON: nested too deep") from None
    except UnicodeError:
        raise WireError(CloseCode.INVALID_PAYLOAD, "expected UTF-8 text") from None


def _checked(message: Message) -> Message:
    """Let a message pass whose refs a binary frame could hold: they are kept as long as it is under way, or joined."""
    if _is_long(message.join_ref) or _is_long(message.ref):
        raise WireError(CloseCode.INVALID_PAYLOAD, f"expected refs of at most {NAME_MAX_BYTES} bytes")
    return message


def _is_long(ref: Ref) -> bool:
    if isinstance(ref, int):  # which Python reads with up to 4300 digits
        return ref.bit_length() > 64 and len(str(ref)) > NAME_MAX_BYTES
    # A character takes one to four bytes.
    return ref is not None and len(ref) > NAME_MAX_BYTES // 4 and len(ref.encode()) > NAME_MAX_BYTES


def _decode_binary(frame: bytes) -> Message:
    """Decode a binary push: ``00 jl rl tl el join_ref ref topic event data``, each length one byte."""
    if not frame or frame[0] != BinaryKind.PUSH:
        came = f"kind {frame[0]}" if frame else "an empty frame"
        raise WireError(CloseCode.UNSUPPORTED, f"expected a binary push (kind 0), got {came}")
    ends = [5]
    for length in frame[1:5]:
        ends.append(ends[-1] + length)
    if len(ends) < 5 or ends[-1] > len(frame):
        raise WireError(CloseCode.INVALID_PAYLOAD, f"binary push cut short at {len(frame)} bytes")
    join_ref, ref, topic, event = (frame[start:end].decode() for start, end in zip(ends, ends[1:], strict=False))
    # Length 0 stands for null: there is no other way to write it.
    return Message(join_ref or None, ref or None, topic, event, frame[ends[-1] :])


def _name(name: str) -> bytes:
    """Write a name's bytes behind its length, as binary frames do."""
    data = name.encode()
    assert len(data) <= NAME_MAX_BYTES, "names are checked when they come in"
    return data


def _ref(ref: Ref) -> bytes:
    return b"" if ref is None else str(ref).encode()[:NAME_MAX_BYTES]


def _text_v2(join_ref: Ref, ref: Ref, topic: str, event: str, payload: msgspec.Raw) -> Frame:
    # The payload is spliced in as it came: a valid JSON text inside a valid JSON text cannot break it.
    head = _encode((join_ref, ref, topic, event))
    return Frame(b"%b,%b]" % (head[:-1], bytes(payload)), True)


def _text_v1(ref: Ref, topic: str, event: str, payload: Payload) -> Frame:
    head = _encode({"topic": topic, "event": event, "ref": ref})
    return Frame(b'%b,"payload":%b}' % (head[:-1], bytes(as_json(payload))), True)


def encode_broadcast(version: Version, topic: str, event: str, payload: Payload, position: str | None = None) -> Frame:
    """Encode one event for all subscribers of a topic: both refs null, so one frame serves them all.

    Args:   position: its place in the topic's history, where it has one; streams alone are sent it.
    Wire:   ``[null,null,topic,event,payload]``, or ``02 tl el topic event data`` for bytes.
    Source: Phoenix 1.9, ``V2.JSONSerializer.fastlane!/1``.
    """
    if version is _V2:
        if isinstance(payload, msgspec.Raw):
            # As `_text_v2` does: one call fewer for each event.
            frame = Frame(b"%b,%b]" % (_encode((None, None, topic, event))[:-1], bytes(payload)), True)
        else:
            topic_bytes, event_bytes = _name(topic), _name(event)
            lengths = bytes((BinaryKind.BROADCAST, len(topic_bytes), len(event_bytes)))
            frame = Frame(b"".join((lengths, topic_bytes, event_bytes, payload)), False)
    elif version is Version.V1:
        frame = _text_v1(None, topic, event, payload)
    elif version is Version.LOCAL:
        frame = LocalFrame(event, payload)
    else:
        frame = sse.StreamFrame(topic, sse.encode_lines(event, payload), position)
    if position is not None:
        frame.position = position
    return frame


POSITION_KEY = "_position"
"""Of an event's payload, and of the reply to a join, where the client has asked for positions."""

POSITION_EVENT = "relay:position"
"""Follows an event whose payload is no object; publishers cannot send it, since no event from the bus has a colon."""


def encode_positioned(
    version: Version, topic: str, event: str, payload: Payload, position: str | None
) -> list[tuple[str, Frame]]:
    """Encode one event for subscribers that have asked for positions: frames with the names of their events.

    The position is the last member of a payload that is an object. After any other payload a second event has it. An
    event without a position says so by null where its payload has a member of this name, since clients take the last.

    Wire: ``[null,null,topic,event,{…,"_position":"<ms>-<n>"}]``, or the event verbatim and then
          ``[null,null,topic,"relay:position",{"_position":"<ms>-<n>"}]``.
    """
    if version is Version.SSE or version is Version.LOCAL:
        return [(event, encode_broadcast(version, topic, event, payload, position))]
    spliced = splice(payload, position)
    if spliced is not None:
        frames = [(event, encode_broadcast(version, topic, event, spliced))]
    else:
        frames = [(event, encode_broadcast(version, topic, event, payload))]
        if position is not None:
            note = encode_payload({POSITION_KEY: position})
            frames.append((POSITION_EVENT, encode_broadcast(version, topic, POSITION_EVENT, note)))
    for _, frame in frames:
        frame.position = position
    return frames


def splice(payload: Payload, position: str | None) -> msgspec.Raw | None:
    """An object with a position as its last member, its bytes otherwise untouched; None for any other payload."""
    if not isinstance(payload, msgspec.Raw):
        return None
    data = bytes(payload).strip(b" \t\r\n")
    if not data.startswith(b"{"):
        return None
    if position is None and b'"_position"' not in data and b"\\u" not in data:
        return msgspec.Raw(data)
    head = data[:-1].rstrip(b" \t\r\n")
    value = b"null" if position is None else b'"%b"' % position.encode()
    return msgspec.Raw(b'%b%b"_position":%b}' % (head, b"" if head == b"{" else b",", value))


def encode_push(version: Version, join_ref: Ref, topic: str, event: str, payload: Payload) -> Frame:
    """Encode one message to one client: its join_ref, and no ref – phoenix.js takes any ref for its heartbeat's.

    Wire:   ``[join_ref,null,topic,event,payload]``, or ``00 jl tl el join_ref topic event data`` for bytes.
    """
    if version is Version.V1:
        return _text_v1(None, topic, event, payload)
    if version is Version.SSE:
        return sse.StreamFrame(topic, sse.encode_lines(event, payload))
    if not isinstance(payload, msgspec.Raw):
        join_bytes, topic_bytes, event_bytes = _ref(join_ref), _name(topic), _name(event)
        lengths = bytes((BinaryKind.PUSH, len(join_bytes), len(topic_bytes), len(event_bytes)))
        return Frame(b"".join((lengths, join_bytes, topic_bytes, event_bytes, payload)), False)
    return _text_v2(join_ref, None, topic, event, payload)


def encode_reply(version: Version, join_ref: Ref, ref: Ref, topic: str, status: str, response: Payload) -> Frame:
    """Encode the answer to a push, a join, a leave or a heartbeat, under the ref it came with.

    Wire: ``[join_ref,ref,topic,"phx_reply",{"status":status,"response":response}]``, or
          ``01 jl rl tl sl join_ref ref topic status data`` for bytes.
    """
    if version is Version.SSE:
        return sse.JoinReply(topic, status, response)
    if version is Version.V2 and not isinstance(response, msgspec.Raw):
        parts = (_ref(join_ref), _ref(ref), _name(topic), _name(status))
        lengths = bytes((BinaryKind.REPLY, *map(len, parts)))
        return Frame(b"".join((lengths, *parts, response)), False)
    body = b'{"status":%b,"response":%b}' % (_encode(status), bytes(as_json(response)))
    if version is Version.V1:
        return _text_v1(ref, topic, "phx_reply", msgspec.Raw(body))
    return _text_v2(join_ref, ref, topic, "phx_reply", msgspec.Raw(body))


def encode_close(version: Version, join_ref: Ref, topic: str) -> Frame:
    """Encode ``phx_close``: the subscription has ended and the client shall not rejoin automatically."""
    if version is Version.SSE:
        return sse.ChannelEnd(topic)
    return _encode_end(version, join_ref, topic, "phx_close", EMPTY)


def encode_error(version: Version, join_ref: Ref, topic: str, reason: str) -> Frame:
    """Encode ``phx_error``: the subscription broke, the client rejoins (phoenix.js after 1, 2, 5, 10 s)."""
    if version is Version.SSE:
        return sse.ChannelEnd(topic, reason)
    return _encode_end(version, join_ref, topic, "phx_error", encode_payload({"reason": reason}))


def _encode_end(version: Version, join_ref: Ref, topic: str, event: str, payload: msgspec.Raw) -> Frame:
    # Phoenix sends the join_ref in both places: ref = join_ref.
    if version is Version.V1:
        return _text_v1(join_ref, topic, event, payload)
    return _text_v2(join_ref, join_ref, topic, event, payload)
