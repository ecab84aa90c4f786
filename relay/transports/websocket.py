"""One WebSocket as frames in and frames out: reading, and the two ways to write.

Owns the connection; must not know messages, topics' subscribers or Redis.
"""

import asyncio
import logging
import time
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from relay.errors import CloseCode
from relay.protocol.frame import Frame
from relay.transports.base import ReceiveCallable, Scope, SendCallable, TransportServices
from relay.transports.queued import QueuedTransport, abort_of, resolve, size_of
from relay.transports.writer import EXTENSION

_logger = logging.getLogger("relay.socket")


_FOUND_BY_SERVER = (CloseCode.PROTOCOL_ERROR, CloseCode.INVALID_PAYLOAD, CloseCode.TOO_BIG)
"""Codes of a disconnect that say that the server closed for a frame which it could not read, or not hold."""

_HEAD_START_S = 0.5
"""Seconds for the server to take a close before it is asked for more messages; see `WebSocketTransport._next_event`."""


class WebSocketTransport(QueuedTransport):
    """An accepted WebSocket, used by one task: the one that made it and reads from it.

    Args: id: for the log.
          services: what it shares with the other transports of its node.
    """

    __slots__ = (
        "_closer",
        "_closing",
        "_deflates",
        "_gone",
        "_main",
        "_receive",
        "_receiving",
        "_send",
    )

    def __init__(
        self, id: str, scope: Scope, receive: ReceiveCallable, send: SendCallable, services: TransportServices
    ) -> None:
        super().__init__(id, scope, services)
        self._receive = receive
        self._send = send
        self._gone: tuple[int | None, str] = (None, "")  # code and reason, as the server tells of the end
        self._main = asyncio.current_task()
        self._closer: asyncio.Task[None] | None = None
        # The ASGI path's pending receive, and what is set once the close has been sent.
        self._receiving: asyncio.Future[MutableMapping[str, Any]] | None = None
        self._closing: asyncio.Event | None = None
        self._writer = (scope.get("extensions") or {}).get(EXTENSION)
        self._deflates = services.compression and self._writer is not None and self._writer.deflates
        if self._writer is not None:
            self._writer.owner = self
            self._writer.set_ready(self._writer.open and not self._writer.paused)
        else:
            self._writing = asyncio.create_task(self._write())

    @property
    def write_mode(self) -> str:
        """How frames are written: ``direct`` to the transport, or ``asgi`` through ASGI."""
        return "asgi" if self._writer is None else "direct"

    @property
    def ending(self) -> tuple[int | None, str, str]:
        """Close code, reason, and who closed: ``relay`` or ``client``. For one that has ended."""
        return (*self._gone, "client") if self._close is None else (*self._close, "relay")

    # Reading.

    async def receive(self) -> str | bytes | None:
        """The next frame, ``str`` for text, ``bytes`` for binary; None once the connection has ended."""
        limit = self._limits.frame_max_bytes
        while True:
            event = await self._next_event()
            if event["type"] == "websocket.disconnect":
                code = event.get("code")
                if self._close is None and code in _FOUND_BY_SERVER:
                    self._metrics.malformed[str(code)] += 1
                self._gone = (code, event.get("reason") or "")
                return None
            self.last_received: float = time.monotonic()
            if self._close is not None:
                continue  # what comes after our close is not for us any more
            frame: str | bytes = event["bytes"] if event.get("text") is None else event["text"]
            # Text has as many bytes as characters at least: what is too long is not encoded to learn it.
            size = len(frame) if len(frame) > limit else size_of(frame)
            if size <= limit:
                self.last_size: int = size
                return frame
            self.reject(CloseCode.TOO_BIG, f"expected frames of at most {limit} bytes")

    def is_own_cancellation(self) -> bool:
        """Say whether a cancellation of the reading task comes from here: the client did not answer a close."""
        return self._close is not None and self._main is not None and self._main.uncancel() == 0

    async def _next_event(self) -> MutableMapping[str, Any]:
        """Receive through ASGI; on the ASGI path so that `_finish` can interrupt it.

        Granian (2.8) loses a close that is sent while a receive is pending.
        """
        if self._writer is not None:
            return await self._receive()
        while True:
            if self._closing is not None:
                with suppress(TimeoutError):  # while it shuts down, Granian takes no close, and says so only here
                    async with asyncio.timeout(_HEAD_START_S):
                        await self._closing.wait()
            # A task of our own, since what `receive` returns need not be a coroutine.
            self._receiving = asyncio.ensure_future(_received(self._receive))
            try:
                return await self._receiving
            except asyncio.CancelledError:
                if self._closing is None or self._main is None or self._main.cancelling():
                    raise

    def idle_s(self, now: float) -> float:
        """Seconds since the client's last message or ping, at the monotonic time ``now``."""
        pinged = self._writer.last_ping if self._writer is not None else 0.0
        return now - max(self.last_received, pinged)

    # Writing.

    @property
    def deflates(self) -> bool:
        """Whether events are written as `relay.protocol.frame.Frame.deflated`."""
        return self._deflates

    def _encode(self, frame: Frame) -> bytes:
        """A frame as the direct writer takes it."""
        return frame.ws_frame_compressed if self._deflates else frame.ws_frame

    def _encode_control(self, frame: Frame) -> bytes:
        """The same for a frame that goes to this client alone: to compress it would not be shared with others."""
        return frame.ws_frame

    async def _write(self) -> None:
        """Send through ASGI, frame by frame: the path that works on any server."""
        outbox, send, loop = self._queue(), self._send, asyncio.get_running_loop()
        try:
            while True:
                while outbox:
                    await send(_message(outbox.pop()))
                self._wake = loop.create_future()
                resolve(self._drained)
                frame = await self._wake
                self._wake = None
                if frame is not None:
                    await send(_message(frame))
        except Exception as error:
            # The client is gone; what `send` raises then differs from server to server. The reader sees the end.
            _logger.debug("socket %s: cannot be written to: %r", self.id, error, extra={"socket": self.id})

    # Closing.

    def close(self, code: int, reason: str) -> bool:
        """Close after what is already queued; cut the client off if it does not answer in time.

        Args:    reason: at most 123 bytes; shown to the client.
        Returns: whether it was still open.
        """
        is_open = self._close is None and not self._ended
        if is_open:
            self._close = (code, reason)
            resolve(self._drained)  # for what waits in `drained`, which ends with the close
            if self._writer is not None:
                self._writer.set_ready(False)
            self._closer = asyncio.create_task(self._finish(code, reason))
            if self.owner is not None:
                self.owner.close_started()
        return is_open

    async def _finish(self, code: int, reason: str) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._limits.close_timeout_s
        try:
            async with asyncio.timeout_at(end):
                await self._send_rest()
                await self._send_close(code, reason)
        except Exception as error:
            # Timed out, or the client is gone: whatever `send` raises for that differs from server to server.
            _logger.debug("socket %s: not closed in good order: %r", self.id, error, extra={"socket": self.id})
        else:
            # The server tells of the client's answer by a disconnect, which ends the reader, and this task with it.
            await asyncio.sleep(end - loop.time())
        self._abort(self._receive)
        if self._main is not None:
            self._main.cancel()

    async def _send_close(self, code: int, reason: str) -> None:
        if self._writer is None:
            self._closing = asyncio.Event()
            if self._receiving is not None:
                self._receiving.cancel()
                await asyncio.wait((self._receiving,))
        try:
            await self._send({"type": "websocket.close", "code": code, "reason": reason})
        finally:
            if self._closing is not None:
                self._closing.set()

    def end(self) -> None:
        """Let go of the connection; called once by its reader, when nothing more can be received."""
        super().end()
        if self._closer is not None:
            self._closer.cancel()
        if self._writer is None and (abort := abort_of(self._receive)) is not None:
            # The server's own close waits for a client that reads.
            asyncio.get_running_loop().call_later(self._limits.close_timeout_s, abort)
        self._main = self._closer = self._receiving = None


def _message(frame: Frame) -> MutableMapping[str, Any]:
    if frame.is_text:
        return {"type": "websocket.send", "text": frame.text}
    return {"type": "websocket.send", "bytes": frame.data}


async def _received(receive: ReceiveCallable) -> MutableMapping[str, Any]:
    return await receive()
