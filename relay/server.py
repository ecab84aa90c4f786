"""Our Uvicorn protocol class: an ASGI extension that writes ready frames to the transport.

Owns what is particular to Uvicorn; must not know what the frames say. ``relay serve`` uses it by itself, a
team's own server by one line::

    uvicorn.run(app, ws="relay.server:RelayWebSocketProtocol", ws_ping_interval=None)

The extension (`relay.frames`) goes past ASGI's ``send``: a frame that is encoded once, header included, is
written to each socket in one synchronous call.
"""

import asyncio
import logging
from asyncio import BaseTransport
from time import monotonic
from typing import Any, cast

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.frames import Frame
from websockets.server import ServerProtocol

from relay.frames import EXTENSION, FrameWriter
from relay.wire import DEFLATE_WINDOW_BITS

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
        if self.config.ws_per_message_deflate:
            self.conn.available_extensions = [_DEFLATE]

    def connection_made(self, transport: BaseTransport) -> None:
        """Learn the transport; log nothing below a warning.

        Uvicorn logs each handshake with its query string, where tokens travel; the relay logs its own line.
        """
        super().connection_made(transport)
        self.logger: logging.Logger = cast(logging.Logger, _quiet)
        self.conn.debug = False  # websockets would log every header and frame

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
        writer = self.frame_writer
        if writer is not None:
            writer.last_ping = monotonic()
        if writer is None or not writer.paused:
            super().handle_ping()
        else:
            _ = self.conn.data_to_send()

    def handle_close(self, event: Frame) -> None:
        """End the extension before the close frame is answered."""
        self._end_writer()
        super().handle_close(event)

    def handle_parser_exception(self) -> None:
        """End the extension before the close frame that tells what was wrong with the client's bytes."""
        self._end_writer()
        super().handle_parser_exception()

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
        """End the extension; the transport is gone."""
        self._end_writer()
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        """End the extension before the application's own close frame, after pressure has gone."""
        if message["type"] == "websocket.close":
            await self.writable.wait()
            self._end_writer()
        await super().send(message)
        if message["type"] == "websocket.accept":
            # The handshake is over; its headers would stay for the life of the socket, 2 kB of them.
            del self.request, self.response
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True  # or Uvicorn logs an error, as if the handshake had not been answered

    def _end_writer(self) -> None:
        if self.frame_writer is not None:
            self.frame_writer.end()


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
