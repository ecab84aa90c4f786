"""Our Uvicorn protocol class: an ASGI extension that writes ready frames to the transport.

Owns what is particular to Uvicorn; must not know what the frames say. ``relay serve`` uses it by itself, a
team's own server by one line::

    uvicorn.run(app, ws="relay.server:RelayWebSocketProtocol", ws_ping_interval=None)

The extension (`relay.frames`) goes past ASGI's ``send``: a frame that is encoded once, header included, is
written to each socket in one synchronous call.
"""

import asyncio
import logging
from asyncio import BaseTransport, Transport
from time import monotonic
from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.frames import Close, Frame
from websockets.server import ServerProtocol

from relay.errors import CloseCode
from relay.frames import EXTENSION, FrameWriter
from relay.limits import Bucket
from relay.logs import Throttle
from relay.metrics import count_refusal
from relay.wire import DEFLATE_WINDOW_BITS

_PIECE_BYTES = 4096
"""Bytes parsed at a time."""

# Pings, pongs and small fragments: so many at once, and so many per second on average. Browsers send none.
_IDLE_FRAMES_MAX = 1000
_IDLE_FRAMES_PER_S = 20
_FRAGMENT_MIN_BYTES = 128

_HEAD_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\n"
    b"expected lines of at most 8 KiB and at most 128 headers\n"
)

_throttle = Throttle(logging.getLogger("relay.server"))

# Without contexts on the client's side too: each would hold 7 kB here.
_DEFLATE = ServerPerMessageDeflateFactory(server_no_context_takeover=True, client_no_context_takeover=True)


class RelayWebSocketProtocol(WebSocketsSansIOProtocol):
    """Uvicorn's own class, with the extension in its scope and without secrets in its log."""

    frame_writer: FrameWriter | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Offer compression, where it is on, without a context: with one, no frame could serve two sockets.

        What Uvicorn uses of a queue and an event for each socket takes less here than asyncio's own, which hold four
        deques: 3 kB of 20.
        """
        super().__init__(*args, **kwargs)
        self.queue: asyncio.Queue[Any] = cast("asyncio.Queue[Any]", _Inbox())
        self.writable: asyncio.Event = cast(asyncio.Event, _Gate())
        # What was read from the transport and is not parsed yet, while the application has messages to take.
        self._unparsed = b""
        # What the application is told once that is parsed too, where the connection was lost before.
        self._farewell: dict[str, Any] | None = None
        # Frames that carry nothing.
        self._idle_frames = Bucket(_IDLE_FRAMES_PER_S, _IDLE_FRAMES_MAX, monotonic())
        if self.config.ws_per_message_deflate:
            self.conn.available_extensions = [_DEFLATE]

    def connection_made(self, transport: BaseTransport) -> None:
        """Learn the transport; log nothing below a warning.

        Uvicorn logs each handshake with its query string, where tokens travel; the relay logs its own line.
        """
        super().connection_made(transport)
        # The HTTP protocol that hands its connection over has read all it will; its parser would hold it in a cycle.
        if hasattr(http := cast(Transport, transport).get_protocol(), "parser"):
            http.parser = None
        self.logger: logging.Logger = cast(logging.Logger, _quiet)
        self.conn.debug = False  # websockets would log every header and frame

    def data_received(self, data: bytes) -> None:
        """Parse what came, a little at a time and no further than the application keeps up.

        One read brings up to 256 kB: tens of thousands of frames, or, compressed, hundreds of MB.
        """
        self._unparsed = self._unparsed + data if self._unparsed else data
        self._parse()
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            self._refuse_head()

    def _parse(self) -> None:
        is_lost = self._farewell is not None
        while self._unparsed and not self.read_paused and (is_lost or not self.transport.is_closing()):
            piece, self._unparsed = self._unparsed[:_PIECE_BYTES], self._unparsed[_PIECE_BYTES:]
            super().data_received(piece)
        if self._farewell is not None and not self._unparsed:
            self.queue.put_nowait(self._farewell)
            self._farewell = None
            self._let_go()

    async def receive(self) -> Any:
        """Hand over the next message, and parse on when it was the last."""
        message = await super().receive()
        if self._unparsed:
            self._parse()
        return message

    def _refuse_head(self) -> None:
        """Answer a request that Uvicorn's HTTP parser has taken and websockets has not; Uvicorn would let it hang."""
        self.handshake_initiated = self.handshake_complete = self.close_sent = True
        count_refusal(self.app_state, "handshake: head too large")
        _throttle.warning("head", "handshake refused: %s", self.conn.handshake_exc)
        self.transport.write(_HEAD_REFUSAL)
        self.transport.close()

    def handle_connect(self, event: Any) -> None:
        """Offer the extension to the application."""
        super().handle_connect(event)
        if hasattr(self, "scope"):  # absent where the handshake was answered with an error
            self.frame_writer = FrameWriter(self.transport, _deflates(self.conn))
            extensions = cast(dict[str, Any], self.scope["extensions"])
            extensions[EXTENSION] = self.frame_writer

    def pause_writing(self) -> None:
        """Tell both paths that the transport's buffer is full."""
        super().pause_writing()
        if self.frame_writer is not None:
            self.frame_writer.pause()

    def resume_writing(self) -> None:
        """Tell both paths that the transport's buffer has drained."""
        super().resume_writing()
        if self.frame_writer is not None:
            self.frame_writer.resume()

    def handle_ping(self) -> None:
        """Answer, and note the sign of life; while the client reads nothing, answers to it must not pile up.

        Source: RFC 6455, section 5.5.3 – of pings not yet answered, all but the newest may be passed over.
        """
        if not self._may_idle():
            return
        writer = self.frame_writer
        if writer is not None and not self.frames:  # else it would keep an unfinished message here for ever
            writer.last_ping = monotonic()
        if not self.disconnected and (writer is None or not writer.paused):
            super().handle_ping()
        else:
            _ = self.conn.data_to_send()

    def handle_pong(self, event: Frame) -> None:
        """Note the answer to a ping of the server's, if it is one."""
        if self._may_idle():
            super().handle_pong(event)

    def handle_cont(self, event: Frame) -> None:
        """Keep a fragment."""
        if len(event.data) >= _FRAGMENT_MIN_BYTES or self._may_idle():
            super().handle_cont(event)

    def _may_idle(self) -> bool:
        """Let a frame pass that carries nothing or next to it; close where they come without an end.

        Such a frame costs as much as any, and no limit of the application's ever sees it.
        """
        if self.close_sent:
            return False
        if self._idle_frames.take(monotonic()):
            return True
        count_refusal(self.app_state, "empty frames")
        _throttle.warning("idle frames", "socket closed with 1008: too many pings, pongs or small fragments")
        self.frames.clear()
        self.conn.fail(CloseCode.POLICY_VIOLATION, "too many pings, pongs or small fragments")
        self.handle_parser_exception()
        return False

    def handle_close(self, event: Frame) -> None:
        """End the extension before the close frame is answered."""
        self._end_writer()
        if not self._ends_lost(self.conn.close_rcvd):
            super().handle_close(event)

    def handle_parser_exception(self) -> None:
        """End the extension before the close frame that tells what was wrong with the client's bytes."""
        self._end_writer()
        if not self._ends_lost(self.conn.close_sent):
            super().handle_parser_exception()

    def _ends_lost(self, close: Close | None) -> bool:
        """Say whether the connection was lost before; then nothing is answered, and nothing after this is read."""
        if self._farewell is None:
            return False
        assert close is not None, "the parser has it"
        self._farewell |= {"code": close.code, "reason": close.reason}
        self._unparsed = b""
        return True

    def drain(self) -> bool:
        """Tell the relay that the server ends and that it is to close the socket; False where there is none."""
        writer = self.frame_writer
        if writer is None or writer.on_shutdown is None or not writer.open:
            return False
        writer.on_shutdown()
        return True

    def shutdown(self) -> None:
        """Let the relay close the socket, at its pace; one that no relay has taken is closed with 1012 here."""
        if not self.drain():
            self._end_writer()
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the extension; the transport is gone.

        What was read before and is not parsed yet goes to the application first, at the pace that it takes it.
        """
        self._end_writer()
        is_over = self.close_sent or self.conn.close_rcvd is not None or not self.handshake_complete
        super().connection_lost(exc)
        break_cycle(self.transport)
        if self._unparsed and not is_over:
            self._farewell = cast(_Inbox, self.queue).take_back()
            self._parse()
        else:
            self._let_go()

    def _let_go(self) -> None:
        """Break the cycles of a connection whose end the application has been told.

        So it is freed at once and not by a later collection: the parser is a generator over its own protocol, and an
        exception that is kept has a traceback to it.
        """
        self._unparsed = b""
        self.frames.clear()
        self.conn.parser.close()
        for error in (self.conn.handshake_exc, self.conn.parser_exc):
            if error is not None:
                error.__traceback__ = error.__context__ = error.__cause__ = None
        self.conn.handshake_exc = self.conn.parser_exc = None
        self._forget_handshake()

    def _forget_handshake(self) -> None:
        for name in ("request", "response"):
            vars(self).pop(name, None)

    async def send(self, message: Any) -> None:
        """End the extension before the application's own close frame, after pressure has gone."""
        if message["type"] == "websocket.close":
            await self.writable.wait()
            self._end_writer()
        await super().send(message)
        if message["type"] == "websocket.close":
            self._parse()  # the client's answer may be among what was left, and an application that closes asks no more
        if message["type"] == "websocket.accept":
            # The handshake is over; its headers would stay for the life of the socket, 2 kB of them.
            self._forget_handshake()
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete: bool = True  # or Uvicorn logs an error, as if the handshake had not been answered

    def _end_writer(self) -> None:
        if self.frame_writer is not None:
            self.frame_writer.end()


def break_cycle(transport: BaseTransport) -> None:
    """Let a transport that is lost be freed at once: asyncio's own refers to itself by a bound method."""
    if hasattr(transport, "_read_ready_cb"):
        transport._read_ready_cb = _nothing


def _nothing() -> None:
    return None


class _Waiting:
    """Whoever waits for something to happen; nearly always nobody, or one."""

    __slots__ = ("_futures",)

    def __init__(self) -> None:
        self._futures: list[asyncio.Future[None]] = []

    async def _wait(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        try:
            await future
        finally:
            self._futures.remove(future)

    def _wake(self) -> None:
        for future in self._futures:
            if not future.done():
                future.set_result(None)


class _Inbox(_Waiting):
    """Messages for the application, in the manner of `asyncio.Queue`."""

    __slots__ = ("_messages",)

    def __init__(self) -> None:
        super().__init__()
        # A list: it holds no more than one read from the transport brings, since reading is paused until it is empty.
        self._messages: list[Any] = []

    def put_nowait(self, message: Any) -> None:
        self._messages.append(message)
        self._wake()

    async def get(self) -> Any:
        while not self._messages:
            await self._wait()
        return self._messages.pop(0)

    def take_back(self) -> Any:
        """Take what was put last."""
        return self._messages.pop()

    def empty(self) -> bool:
        return not self._messages


class _Gate(_Waiting):
    """Open or closed, in the manner of `asyncio.Event`; open at first."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        super().__init__()
        self._open = True

    def set(self) -> None:
        self._open = True
        self._wake()

    def clear(self) -> None:
        self._open = False

    async def wait(self) -> None:
        while not self._open:
            await self._wait()


def _deflates(conn: ServerProtocol) -> bool:
    """Say whether the client takes what `relay.wire.Frame.deflated` makes: it may have asked for a smaller window."""
    return any(
        isinstance(extension, PerMessageDeflate) and extension.local_max_window_bits >= DEFLATE_WINDOW_BITS
        for extension in conn.extensions
    )


class _QuietLogger(logging.LoggerAdapter[logging.Logger]):
    """Passes on what matters: warnings and errors, except a traceback for a client's bad UTF-8."""

    level = logging.WARNING

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if level >= logging.WARNING and msg != "Invalid UTF-8 sequence received from client.":
            super().log(level, msg, *args, **kwargs)


_quiet = _QuietLogger(logging.getLogger("uvicorn.error"), {})
