"""Phoenix frames, V1 and V2, text and binary.

Owns the bytes; must not know what a message means, who sent it, or who will read it.

Text frames of V2 are five-element arrays, those of V1 are objects::

    ["join_ref", "ref", "topic", "event", {payload}]
    {"topic": "…", "event": "…", "payload": {…}, "ref": "…", "join_ref": "…"}

A payload stays undecoded: it is JSON (checked, verbatim) in a `msgspec.Raw`, or the bytes of a binary frame.

Source: Phoenix 1.9, ``lib/phoenix/socket/serializers/v1_json_serializer.ex`` and ``v2_json_serializer.ex``.
"""

import re
import zlib
from enum import IntEnum
from typing import TypeAlias

import msgspec

from relay.errors import CloseCode, WireError
from relay.topics import NAME_MAX_BYTES

Ref: TypeAlias = str | int | None
"""A client's number for a message or a join. phoenix.js sends strings, V1 clients also integers; echoed as it came."""

Payload: TypeAlias = msgspec.Raw | bytes
"""JSON that was checked and is forwarded verbatim, or the bytes of a binary frame.

Ask ``isinstance(payload, msgspec.Raw)``: msgspec's stubs call `Raw` a subclass of `bytes`, which it is not.
"""

EMPTY = msgspec.Raw(b"{}")
"""The payload of everything that has nothing to say."""

DEFLATE_WINDOW_BITS = 12
"""Window of shared compression, as a power of two. 4 kB: a larger one costs 60 µs a frame, for next to no gain."""

_DEFLATE_MEMORY_LEVEL = 5
_DEFLATE_MIN_BYTES = 128
"""Shorter messages are sent as they are: deflating them gains little or nothing."""

_COPY_FROM_BYTES = 4096
"""Of larger frames the payload is copied; below, a copy costs more than what else of the frame it would free."""

_VSN = re.compile(r"([12])\.0\.(?:0|[1-9][0-9]*)")


class Version(IntEnum):
    """The serializer a socket speaks, negotiated by ``vsn``."""

    V1 = 1
    V2 = 2


class Kind(IntEnum):
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


# One struct per version for the decoder alone: it cannot choose between `Raw` and `bytes` by itself.
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
_check_json = msgspec.json.Decoder(msgspec.Raw).decode
_encode = msgspec.json.Encoder().encode


class _PayloadV2(msgspec.Struct, array_like=True, gc=False):
    join_ref: msgspec.Raw
    ref: msgspec.Raw
    topic: msgspec.Raw
    event: msgspec.Raw
    payload: dict[str, msgspec.Raw]


class _PayloadV1(msgspec.Struct, gc=False):
    payload: dict[str, msgspec.Raw]


_decode_payload_v2 = msgspec.json.Decoder(_PayloadV2).decode
_decode_payload_v1 = msgspec.json.Decoder(_PayloadV1).decode


def _find_value(frame: "Frame", key: str) -> bytes | None:
    """Look into a frame of our own making."""
    if not frame.is_text:
        return None
    try:
        decode = _decode_payload_v2 if frame.data.startswith(b"[") else _decode_payload_v1
        value = decode(frame.data).payload.get(key)
    except msgspec.DecodeError:  # the payload is no object
        return None
    return None if value is None else bytes(value)


class Frame:
    """One encoded frame, ready for any number of sockets.

    Args: data: the message without its WebSocket header; text is UTF-8.
          is_text: a text frame (opcode 1) rather than a binary one (opcode 2).
    """

    __slots__ = ("_deflated", "_text", "_value", "_wire", "data", "is_text", "size")

    def __init__(self, data: bytes, is_text: bool) -> None:
        self.data: bytes = data
        self.is_text: bool = is_text
        self.size: int = len(data)
        self._wire: bytes | None = None
        self._deflated: bytes | None = None
        self._text: str | None = None
        # Set when asked for: (key, its value in the payload).
        self._value: tuple[str, bytes | None] | None = None

    def payload_value(self, key: str) -> bytes | None:
        """The value under ``key`` in the payload of a text frame, as JSON; None where there is none.

        Only a slow reader's outbox asks for it; it is found once for all sockets.
        """
        if self._value is None or self._value[0] != key:
            self._value = (key, _find_value(self, key))
        return self._value[1]

    @property
    def text(self) -> str:
        """The text of a text frame, as ASGI's ``websocket.send`` wants it; decoded once for all sockets."""
        if self._text is None:
            self._text = self.data.decode()
        return self._text

    @property
    def wire(self) -> bytes:
        """The frame as it goes to the transport: unmasked, unfragmented, header included; made once for all sockets.

        Source: RFC 6455, section 5.2 – FIN and opcode, then the length in 7, 16 or 64 bits.
        """
        if self._wire is None:
            self._wire = _header(b"\x81" if self.is_text else b"\x82", self.size) + self.data
        return self._wire

    @property
    def deflated(self) -> bytes:
        """The same, compressed for sockets that negotiated it, once for all of them; as it is where that gains nothing.

        Each frame stands for itself, since the sockets have not all had the same ones before it.
        Source: RFC 7692, section 7.2.1 – RSV1 marks it, the empty block at its end is left out – and 7.1.1.1,
                ``server_no_context_takeover``.
        """
        if self._deflated is None:
            self._deflated = self.wire
            if self.size >= _DEFLATE_MIN_BYTES:
                deflate = zlib.compressobj(wbits=-DEFLATE_WINDOW_BITS, memLevel=_DEFLATE_MEMORY_LEVEL)
                data = (deflate.compress(self.data) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]
                if len(data) < self.size:
                    self._deflated = _header(b"\xc1" if self.is_text else b"\xc2", len(data)) + data
        return self._deflated

    def __repr__(self) -> str:
        return f"Frame({self.data!r}, is_text={self.is_text})"


def _header(first: bytes, size: int) -> bytes:
    if size < 126:
        return first + size.to_bytes(1)
    if size < 65536:
        return first + b"\x7e" + size.to_bytes(2)
    return first + b"\x7f" + size.to_bytes(8)


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
        if isinstance(frame, str) and (whole := _replace_half_pairs(frame)) != frame:
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
    if not frame or frame[0] != Kind.PUSH:
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


def json_payload(value: object) -> msgspec.Raw:
    """Encode a Python value as a payload. Raises TypeError for what JSON cannot say."""
    return msgspec.Raw(_encode(value))


def check_payload(data: bytes) -> Payload:
    """Sort what somebody published: valid JSON is returned as JSON, verbatim; anything else as bytes.

    The one check of a payload: syntax by msgspec's decoder, which skips over the value without building
    it, and UTF-8 by Python's. 0.3 µs for 220 bytes.
    """
    try:
        _ = _check_json(data)
        if not data.isascii():
            data.decode()
    except (RecursionError, UnicodeDecodeError):
        return data
    except msgspec.DecodeError:
        if b"\\u" not in data or not _is_json_but_for_half_pairs(data):
            return data
    return msgspec.Raw(data)


_BOM = b"\xef\xbb\xbf"


def fault_of_json(data: bytes) -> str | None:
    """Say why bytes that `check_payload` has returned are no JSON; None where they were not meant to be.

    Meant is what begins with ``{`` or ``[``, a byte order mark and spaces set aside, and is text, or ends as JSON does.
    """
    text = data.removeprefix(_BOM).strip(b" \t\r\n")
    if not text.startswith((b"{", b"[")):
        return None
    try:
        _ = data.decode()
        is_text = b"\0" not in data
    except UnicodeDecodeError:
        is_text = False
        if text.endswith((b"}", b"]")):
            return "expected UTF-8"
    if not is_text:
        return None
    if data.startswith(_BOM):
        return "it begins with a byte order mark"
    if re.search(rb"[\s:,\[](-?(?:NaN|Infinity))\s*[,}\]]", data):
        return "NaN and Infinity are no JSON"
    try:
        _ = _check_json(data)
    except msgspec.DecodeError as error:
        return str(error).removeprefix("JSON is malformed: ")
    except RecursionError:
        return "nested too deep"
    return None


def _is_json_but_for_half_pairs(data: bytes) -> bool:
    try:
        _ = _check_json(_replace_half_pairs(data.decode()))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False
    return True


_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
# Both begin with the same two characters, which makes the search for them quick.
_HALF_PAIR = re.compile(rf"{_HIGH}(?!{_LOW})|{_LOW}(?<!{_HIGH}{_LOW})")


def _replace_half_pairs(text: str) -> str:
    r"""Put U+FFFD in the place of half a surrogate pair, as ``"\ud83d"``. Linear in time, whatever the text.

    JSON's grammar allows it, and ``JSON.stringify`` writes it for a string that was cut within an emoji. msgspec
    refuses it, and UTF-8 has no bytes for it.
    """
    if "\0" in text:  # no JSON
        return text
    # An escaped backslash begins no escape: out of the way, so that each backslash that is left does.
    return _HALF_PAIR.sub(r"\\ufffd", text.replace("\\\\", "\0")).replace("\0", "\\\\")


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
    return Frame(b'%b,"payload":%b}' % (head[:-1], bytes(_v1_payload(payload))), True)


def _v1_payload(payload: Payload) -> msgspec.Raw:
    # V1 has no binary frames, and its clients would not survive one: bytes travel as {"base64": "…"}.
    return payload if isinstance(payload, msgspec.Raw) else json_payload({"base64": payload})


def identified(user: str | None, socket_id: str, payload: Payload) -> msgspec.Raw:
    """Say whose a push is: ``{"user":…,"socket":…,"payload":…}``; bytes stand there as ``{"base64": "…"}``."""
    fields = (_encode(user), _encode(socket_id), bytes(_v1_payload(payload)))
    return msgspec.Raw(b'{"user":%b,"socket":%b,"payload":%b}' % fields)


def encode_broadcast(version: Version, topic: str, event: str, payload: Payload) -> Frame:
    """Encode one event for all subscribers of a topic: both refs null, so one frame serves them all.

    Wire:   ``[null,null,topic,event,payload]``, or ``02 tl el topic event data`` for bytes.
    Source: Phoenix 1.9, ``V2.JSONSerializer.fastlane!/1``.
    """
    if version is Version.V1:
        return _text_v1(None, topic, event, payload)
    if not isinstance(payload, msgspec.Raw):
        topic_bytes, event_bytes = _name(topic), _name(event)
        lengths = bytes((Kind.BROADCAST, len(topic_bytes), len(event_bytes)))
        return Frame(b"".join((lengths, topic_bytes, event_bytes, payload)), False)
    return _text_v2(None, None, topic, event, payload)


def encode_push(version: Version, join_ref: Ref, topic: str, event: str, payload: Payload) -> Frame:
    """Encode one message to one client: its join_ref, and no ref – phoenix.js takes any ref for its heartbeat's.

    Wire:   ``[join_ref,null,topic,event,payload]``, or ``00 jl tl el join_ref topic event data`` for bytes.
    """
    if version is Version.V1:
        return _text_v1(None, topic, event, payload)
    if not isinstance(payload, msgspec.Raw):
        join_bytes, topic_bytes, event_bytes = _ref(join_ref), _name(topic), _name(event)
        lengths = bytes((Kind.PUSH, len(join_bytes), len(topic_bytes), len(event_bytes)))
        return Frame(b"".join((lengths, join_bytes, topic_bytes, event_bytes, payload)), False)
    return _text_v2(join_ref, None, topic, event, payload)


def encode_reply(version: Version, join_ref: Ref, ref: Ref, topic: str, status: str, response: Payload) -> Frame:
    """Encode the answer to a push, a join, a leave or a heartbeat, under the ref it came with.

    Wire: ``[join_ref,ref,topic,"phx_reply",{"status":status,"response":response}]``, or
          ``01 jl rl tl sl join_ref ref topic status data`` for bytes.
    """
    if version is Version.V2 and not isinstance(response, msgspec.Raw):
        parts = (_ref(join_ref), _ref(ref), _name(topic), _name(status))
        lengths = bytes((Kind.REPLY, *map(len, parts)))
        return Frame(b"".join((lengths, *parts, response)), False)
    body = b'{"status":%b,"response":%b}' % (_encode(status), bytes(_v1_payload(response)))
    if version is Version.V1:
        return _text_v1(ref, topic, "phx_reply", msgspec.Raw(body))
    return _text_v2(join_ref, ref, topic, "phx_reply", msgspec.Raw(body))


def encode_close(version: Version, join_ref: Ref, topic: str) -> Frame:
    """Encode ``phx_close``: the subscription has ended and the client shall not rejoin by itself."""
    return _encode_end(version, join_ref, topic, "phx_close", EMPTY)


def encode_error(version: Version, join_ref: Ref, topic: str, reason: str) -> Frame:
    """Encode ``phx_error``: the subscription broke, the client rejoins (phoenix.js after 1, 2, 5, 10 s)."""
    return _encode_end(version, join_ref, topic, "phx_error", json_payload({"reason": reason}))


def _encode_end(version: Version, join_ref: Ref, topic: str, event: str, payload: msgspec.Raw) -> Frame:
    # Phoenix sends the join_ref in both places: ref = join_ref.
    if version is Version.V1:
        return _text_v1(join_ref, topic, event, payload)
    return _text_v2(join_ref, join_ref, topic, event, payload)
