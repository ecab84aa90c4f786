"""Streams of WebSocket frames as clients may send them, and a connection that reads one without a network.

For comparing what the relay reads itself with what websockets reads: the same bytes, cut at the same places.
"""

import asyncio
import random
import struct
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState
from websockets.protocol import State
from websockets.utils import apply_mask

from relay.transports import uvicorn_websocket as module
from relay.transports.inbound_frames import Read, read_messages
from relay.transports.uvicorn_websocket import RelayWebSocketProtocol

FRAME_MAX_BYTES = 2_000


class FakeTransport(asyncio.Transport):
    """Notes what is done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_closed = self.is_paused = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class _Timer:
    def cancel(self) -> None:
        pass


class _Loop:
    """Runs what is to be called soon when it is told to."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], object]] = []

    def call_soon(self, call: Callable[[], object]) -> None:
        self.calls.append(call)

    def call_later(self, delay_s: float, *call: Any) -> _Timer:
        return _Timer()


def protocol_config() -> uvicorn.Config:
    """Settings of a server without compression and without pings."""

    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("no handshake is made")

    config = uvicorn.Config(app, ws_max_size=FRAME_MAX_BYTES, ws_ping_interval=None, ws_per_message_deflate=False)
    config.load()
    return config


class Reading:
    """One connection after its handshake.

    Args: reads_simple: whether the relay reads simple frames itself; else websockets reads all.
    """

    def __init__(self, config: uvicorn.Config, reads_simple: bool) -> None:
        self.loop = _Loop()
        vars(config).pop("read_budget", None)  # it belongs to a loop
        self.protocol = RelayWebSocketProtocol(config, ServerState(), {}, self.loop)
        self.transport = FakeTransport()
        self.protocol.connections.add(self.protocol)
        self.protocol.transport = self.transport
        self.protocol.handshake_initiated = self.protocol.handshake_complete = True
        self.protocol.logger = self.protocol.conn.logger = _Silent()  # type: ignore[assignment]
        conn = self.protocol.conn
        conn.state = State.OPEN
        conn.parser = conn.parse()
        next(conn.parser)
        self.protocol._reads_simple = True
        self._limit = config.ws_max_size if reads_simple else -1
        self.messages: list[dict[str, Any]] = []

    def feed(self, data: bytes) -> None:
        """Receive some bytes; a transport that is closed gives none."""
        if not self.transport.is_closed:
            setattr(module, "read_messages", self._read_messages)  # noqa: B010 - a name that it imports
            self.protocol.data_received(data)

    def _read_messages(self, data: bytes | memoryview, most_bytes: int, frame_max_bytes: int) -> Read:
        # Without simple frames websockets reads all, frame by frame, as it must where the relay finds their ends.
        return read_messages(data, most_bytes, min(frame_max_bytes, self._limit))

    def take(self, most: int) -> None:
        """Be the application: take so many messages, as `receive` hands them over."""
        setattr(module, "read_messages", self._read_messages)  # noqa: B010 - a name that it imports
        while most and not self.protocol.queue.empty():
            self.messages.append(self.protocol.queue._messages.pop(0))
            most -= 1
            if self.protocol.queue.empty():
                self.protocol._read_on()
        calls, self.loop.calls = self.loop.calls, []
        for call in calls:
            call()

    def lose(self) -> None:
        """Lose the connection, and take all that came before."""
        self.protocol.connection_lost(ConnectionResetError())
        self.take(1_000_000)

    def result(self) -> tuple[list[dict[str, Any]], bytes, bool]:
        """Messages, bytes of answers, and whether it was closed."""
        return self.messages, bytes(self.transport.written), self.transport.is_closed


class _Silent:
    level = 100

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def isEnabledFor(self, level: int) -> bool:
        return False


def frame(
    generator: random.Random, first: int, payload: bytes, *, masked: bool = True, length_form: int | None = None
) -> bytes:
    """A frame with a first byte and a payload.

    Args: length_form: in how many bytes its length follows the second byte: 0, 2 or 8; by default as few as can be.
    """
    size = len(payload)
    form = length_form if length_form is not None else (0 if size < 126 else 2 if size < 65_536 else 8)
    mask = 0x80 if masked else 0
    if form == 0:
        head = bytes((first, mask | size))
    elif form == 2:
        head = bytes((first, mask | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first, mask | 127)) + struct.pack("!Q", size)
    if not masked:
        return head + payload
    key = generator.randbytes(4)
    return head + key + apply_mask(payload, key)


_TEXTS = (b"", b"{}", b'["1","1","room:1","phx_join",{}]', "täst ☃".encode(), b"x" * 125, b"y" * 126, b"z" * 300)
_CLOSES = (b"", b"\x03\xe8", b"\x03\xe8bye", b"\x00", b"\x03\xe8\xff")
_BAD_TEXTS = (b"\xff", b"\xc3", b"\xed\xa0\x80", "☃".encode()[:2])


def stream(generator: random.Random) -> bytes:
    """Some frames: mostly what clients send, and now and then what none should."""
    parts: list[bytes] = []
    for _ in range(generator.randrange(1, 6)):
        kind = generator.random()
        text = generator.choice(_TEXTS)
        if kind < 0.55:
            parts.append(frame(generator, generator.choice((0x81, 0x82)), text))
        elif kind < 0.65:  # in fragments, with a ping between them now and then
            parts.append(frame(generator, generator.choice((0x01, 0x02)), text))
            if generator.random() < 0.5:
                parts.append(frame(generator, 0x89, b"ping"))
            if generator.random() < 0.8:
                parts.append(frame(generator, generator.choice((0x80, 0x80, 0x00, 0x81)), generator.choice(_TEXTS)))
        elif kind < 0.75:
            parts.append(frame(generator, generator.choice((0x89, 0x8A)), text[:125]))
        elif kind < 0.80:
            parts.append(frame(generator, 0x88, generator.choice(_CLOSES)))
        elif kind < 0.85:
            parts.append(frame(generator, 0x81, generator.choice(_BAD_TEXTS) + text))
        elif kind < 0.90:  # a length in a longer form than needed, or no mask
            parts.append(frame(generator, 0x81, text[:100], length_form=generator.choice((2, 8))))
        elif kind < 0.94:
            parts.append(frame(generator, 0x81, text, masked=False))
        elif kind < 0.97:  # around the limit
            size = FRAME_MAX_BYTES + generator.randrange(-1, 2)
            parts.append(frame(generator, generator.choice((0x81, 0x82, 0x01)), b"x" * size))
        else:
            parts.append(frame(generator, generator.randrange(256), text[:125]))
    data = bytearray(b"".join(parts))
    if generator.random() < 0.2:
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    if generator.random() < 0.2:
        del data[generator.randrange(len(data)) :]
    return bytes(data)


def pieces(generator: random.Random, data: bytes) -> list[bytes]:
    """The same bytes, as reads from a connection may bring them."""
    cuts = sorted(generator.randrange(len(data) + 1) for _ in range(generator.choice((0, 0, 1, 3, len(data)))))
    return [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True) if stop > start]


def difference(config: uvicorn.Config, seed: int) -> str:
    """What the two ways to read a stream differ in; empty for nothing."""
    generator = random.Random(seed)
    data = stream(generator)
    parts = pieces(generator, data)
    taken = [generator.choice((0, 1, 1_000)) for _ in parts]
    is_lost = generator.random() < 0.3
    found = []
    for reads_simple in (True, False):
        reading = Reading(config, reads_simple)
        for part, most in zip(parts, taken, strict=True):
            reading.feed(part)
            reading.take(most)
        if is_lost:
            reading.lose()
        else:
            reading.take(1_000_000)
        found.append(reading.result())
    return "" if found[0] == found[1] else f"seed {seed}: {data.hex()} in {len(parts)} parts: {found[0]} and {found[1]}"
