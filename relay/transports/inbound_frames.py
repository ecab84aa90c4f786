"""Data frames of clients that are whole, masked and in one piece, read without a protocol core.

Owns where a frame ends, and what such a frame holds; must not decide on any other frame: websockets does.
Source: RFC 6455, sections 5.2 and 5.3.
"""

from typing import NamedTuple

try:
    from websockets.speedups import apply_mask
except ImportError:  # built without a compiler
    from websockets.utils import apply_mask

_TEXT, _BINARY = 0x81, 0x82
"""First bytes of data frames that begin and end a message, without reserved bits."""

_MASKED = 0x80
_LENGTH = 0x7F
_TWO_BYTES, _EIGHT_BYTES = 126, 127
"""Lengths that say in how many bytes the length follows."""


class Read(NamedTuple):
    """What `read_messages` found."""

    messages: list[str | bytes]
    taken: int
    """Bytes that these messages took."""
    other: int
    """Size of the frame behind them that was not read, also where it has not come as a whole; 0 where there is none, or
    its head has not come."""


def read_messages(data: bytes | memoryview, most_bytes: int, frame_max_bytes: int) -> Read:
    """Read messages from the start of ``data``, which is the start of a frame.

    Stops at a frame that is not simple: of a client it is masked, has a length of 7 or 16 bits in its shortest form, no
    reserved bit and no fragments, and what is text is UTF-8.

    Args: most_bytes: no further frame is read once so many bytes were.
          frame_max_bytes: larger frames are not simple.
    """
    messages: list[str | bytes] = []
    at, end = 0, len(data)
    while at < most_bytes:
        if end - at < 2:
            return Read(messages, at, 0)
        kind, length = data[at], data[at + 1]
        is_masked, length, start = length & _MASKED, length & _LENGTH, at + 2
        if length == _TWO_BYTES:
            start += 2
            if end < start:
                return Read(messages, at, 0)
            length = data[at + 2] << 8 | data[at + 3]
            is_simple = length >= _TWO_BYTES
        elif length == _EIGHT_BYTES:
            start += 8
            if end < start:
                return Read(messages, at, 0)
            length, is_simple = int.from_bytes(data[at + 2 : start], "big"), False
        else:
            is_simple = True
        if is_masked:
            start += 4
        stop = start + length
        size = stop - at
        if not (is_simple and is_masked and kind in (_TEXT, _BINARY) and stop <= end and length <= frame_max_bytes):
            return Read(messages, at, size)
        payload = apply_mask(data[start:stop], bytes(data[start - 4 : start]))
        if kind == _TEXT:
            try:
                messages.append(payload.decode())
            except UnicodeDecodeError:
                return Read(messages, at, size)
        else:
            messages.append(payload)
        at = stop
    return Read(messages, at, 0)
