"""One encoded WebSocket frame, which any number of sockets share.

Owns a frame's bytes, with header and compressed; must not know what they say, but for one key of a payload.
"""

import zlib

import msgspec

from relay.protocol.payload import Payload

DEFLATE_WINDOW_BITS = 12
"""Window of shared compression, as a power of two. 4 kB: a larger one costs 60 µs a frame, for next to no gain."""

_DEFLATE_MEMORY_LEVEL = 5
_DEFLATE_MIN_BYTES = 128
"""Shorter messages are sent as they are: deflating them gains little or nothing."""


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
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


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

    __slots__ = ("_ws_frame_compressed", "_text", "_value", "_ws_frame", "data", "is_text", "position", "size")

    def __init__(self, data: bytes, is_text: bool) -> None:
        self.data: bytes = data
        self.is_text: bool = is_text
        self.size: int = len(data)
        self.position: str | None = None
        """Of an event of a topic with a history: its place there."""
        self._ws_frame: bytes | None = None
        self._ws_frame_compressed: bytes | None = None
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
    def ws_frame(self) -> bytes:
        """The frame as it goes to the transport: unmasked, unfragmented, header included; made once for all sockets.

        Source: RFC 6455, section 5.2 – FIN and opcode, then the length in 7, 16 or 64 bits.
        """
        if self._ws_frame is None:
            self._ws_frame = _header(b"\x81" if self.is_text else b"\x82", self.size) + self.data
        return self._ws_frame

    @property
    def ws_frame_compressed(self) -> bytes:
        """The same, compressed for sockets that negotiated it, once for all of them; as it is where that gains nothing.

        Each frame stands for itself, since the sockets have not all had the same ones before it.
        Source: RFC 7692, section 7.2.1 – RSV1 marks it, the empty block at its end is left out – and 7.1.1.1,
                ``server_no_context_takeover``.
        """
        if self._ws_frame_compressed is None:
            self._ws_frame_compressed = self.ws_frame
            if self.size >= _DEFLATE_MIN_BYTES:
                deflate = zlib.compressobj(wbits=-DEFLATE_WINDOW_BITS, memLevel=_DEFLATE_MEMORY_LEVEL)
                data = (deflate.compress(self.data) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]
                if len(data) < self.size:
                    self._ws_frame_compressed = _header(b"\xc1" if self.is_text else b"\xc2", len(data)) + data
        return self._ws_frame_compressed

    def __repr__(self) -> str:
        return f"Frame({self.data!r}, is_text={self.is_text})"


class LocalFrame(Frame):
    """An event for subscribers in this process, which never becomes bytes of a connection.

    Args: payload: of the event.
    """

    __slots__ = ("event", "payload")

    def __init__(self, event: str, payload: Payload) -> None:
        super().__init__(bytes(payload), isinstance(payload, msgspec.Raw))
        self.event: str = event
        self.payload: Payload = payload

    def payload_value(self, key: str) -> bytes | None:
        """The value under ``key`` in the payload, as JSON; None where there is none."""
        try:
            value = _decode_object(self.data).get(key) if self.is_text else None
        except msgspec.DecodeError:  # the payload is no object
            return None
        return None if value is None else bytes(value)


def _header(first: bytes, size: int) -> bytes:
    if size < 126:
        return first + size.to_bytes(1)
    if size < 65536:
        return first + b"\x7e" + size.to_bytes(2)
    return first + b"\x7f" + size.to_bytes(8)
