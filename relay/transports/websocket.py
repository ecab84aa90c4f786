"""One WebSocket as frames in and frames out: reading, and the two ways to write.

Owns the connection and its outbox; must not know messages, topics' subscribers or Redis.

A frame is written straight to the transport where the server offers that (``relay.frames``), else through
ASGI's ``send`` by a task of the connection's own. Under pressure both queue in the outbox.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any

from relay.config import Policy
from relay.errors import CloseCode
from relay.protocol.frame import Frame
from relay.transports.base import ReceiveCallable, Scope, SendCallable, TransportOwner, TransportServices
from relay.transports.outbox import Outbox
from relay.transports.writer import EXTENSION, DirectWriter

_logger = logging.getLogger("relay.socket")


_FOUND_BY_SERVER = (CloseCode.PROTOCOL_ERROR, CloseCode.INVALID_PAYLOAD, CloseCode.TOO_BIG)
"""Codes of a disconnect that say that the server closed for a frame which it could not read, or not hold."""

_HEAD_START_S = 0.5
"""Seconds for the server to take a close before it is asked for more messages; see `WebSocketTransport._next_event`."""


class WebSocketTransport:
    """An accepted WebSocket, used by one task: the one that made it and reads from it.

    Args: id: for the log.
          services: what it shares with the other transports of its node.
    """

    __slots__ = (
        "_close",
        "_closer",
        "_closing",
        "_deflates",
        "_drained",
        "_ended",
        "_gone",
        "_limits",
        "_log",
        "_main",
        "_metrics",
        "_outbox",
        "_outboxes",
        "_receive",
        "_receiving",
        "_send",
        "_wake",
        "_writer",
        "_writing",
        "address",
        "id",
        "last_received",
        "last_size",
        "owner",
        "query_string",
    )

    def __init__(
        self, id: str, scope: Scope, receive: ReceiveCallable, send: SendCallable, services: TransportServices
    ) -> None:
        self.id: str = id
        client = scope.get("client")
        self.address: str | None = client[0] if client else None
        self.query_string: bytes = scope.get("query_string", b"")
        self.owner: TransportOwner | None = None
        self._log = services.log
        self._receive = receive
        self._send = send
        self._limits = services.limits
        self._metrics = services.metrics
        self._outboxes = services.outboxes
        # Made when there is pressure for the first time: most sockets never have any, and it takes 1 kB.
        self._outbox: Outbox | None = None
        self.last_received: float = time.monotonic()
        """When the client last sent a message, in monotonic seconds."""
        self.last_size: int = 0
        """Bytes of that message, of text in UTF-8."""
        # Set by close(), and by the end whatever its cause.
        self._close: tuple[int, str] | None = None
        self._ended = False
        self._gone: tuple[int | None, str] = (None, "")  # code and reason, as the server tells of the end
        self._main = asyncio.current_task()
        self._closer: asyncio.Task[None] | None = None
        # The ASGI path's pending receive, and what is set once the close has been sent.
        self._receiving: asyncio.Future[MutableMapping[str, Any]] | None = None
        self._closing: asyncio.Event | None = None
        # Resolved once the outbox is empty, for a close that waits for it.
        self._drained: asyncio.Future[None] | None = None
        # The ASGI path's task, and what it waits for when it has nothing to do: an event's frame, or None to
        # look into the outbox. A frame that is handed over so is spared the queue; most are.
        self._writing: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[Frame | None] | None = None
        self._writer: DirectWriter | None = (scope.get("extensions") or {}).get(EXTENSION)
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

    @property
    def closed_with(self) -> int | None:
        """The code with which the relay has begun to close it; None while it has not."""
        return None if self._close is None else self._close[0]

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
            self.last_received = time.monotonic()
            if self._close is not None:
                continue  # what comes after our close is not for us any more
            frame: str | bytes = event["bytes"] if event.get("text") is None else event["text"]
            size = len(frame)
            if size <= limit and isinstance(frame, str) and not frame.isascii():
                size = _size(frame)
            if size <= limit:
                self.last_size = size
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

    def direct_write(self) -> Callable[[bytes], object] | None:
        """What writes frames to this socket as they are, header included; None where they must be queued."""
        return self._writer.write if self._writer is not None and self._writer.ready else None

    def readiness_changed(self) -> None:
        """Learn from the server that `direct_write` returns something else than before."""
        if self.owner is not None:
            self.owner.readiness_changed()

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        """Write an event's frame, or queue it as its topic's policy says. Never blocks, never raises."""
        writer = self._writer
        if writer is not None and writer.ready:
            writer.write(frame.ws_frame_compressed if self._deflates else frame.ws_frame)
            return
        if self._close is not None or self._ended:
            self._metrics.dropped["socket closed"] += 1
            return
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(frame)
            return
        outbox = self._queue()
        dropped = outbox.add_event(frame, topic, event, policy)
        if dropped is None:
            self._lose(outbox, "slow reader disconnected", Counter((policy.match,)))
            self._warn("slow", "reads too slowly for topic %r, outbox full; closed with 1013", topic)
            self.close(CloseCode.SLOW_READER, "outbox full: this client reads too slowly")
            return
        if dropped:
            self._metrics.dropped[f"slow reader, {policy.overflow}"] += dropped
            self._metrics.dropped_topics[policy.match] += dropped
        self._wake_writer()

    def send_control(self, frame: Frame) -> None:
        """Write a reply, a close or an error; never dropped, whatever the pressure."""
        writer = self._writer
        if writer is not None and writer.ready:
            writer.write(frame.ws_frame)
        elif writer is not None and not writer.open:
            return  # after a close frame, or the connection's loss: what is still read of it gets no answer
        elif not self._ended:
            if not self._queue().add_control(frame) and self._close is None:
                self._metrics.refused["sends and does not read"] += 1
                self.close(CloseCode.SLOW_READER, "outbox full: this client sends and does not read")
            self._wake_writer()

    def _queue(self) -> Outbox:
        if self._outbox is None:
            notice = None if self.owner is None else self.owner.dropped_notice
            self._outbox = Outbox(self._limits.outbox_max_bytes, self._outboxes, self._evict_outbox, notice)
        return self._outbox

    def _lose(self, outbox: Outbox, reason: str, more: Counter[str] | None = None) -> None:
        """Empty the outbox of a socket that is closed, and count what was in it, and ``more``."""
        lost = outbox.clear() + (more or Counter())
        if lost:
            self._metrics.dropped[reason] += lost.total()
            self._metrics.dropped_topics += lost

    def _evict_outbox(self) -> None:
        """Empty the outbox and close: all outboxes together hold too much, and this one holds most."""
        assert self._outbox is not None, "it is the largest"
        self._lose(self._outbox, "outboxes full")
        self._metrics.refused["outboxes full"] += 1
        self._warn("outboxes", "the largest outbox of too many; closed with 1013")
        self.close(CloseCode.SLOW_READER, "this client reads too slowly, and too much waits for all such")

    def evict(self, kind: str, reason: str) -> None:
        """Close a socket of which the relay holds too much; nothing where it is closed already."""
        if self.close(CloseCode.SLOW_READER, reason):
            self._warn(kind, "closed with 1013: %s", reason)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait in its outbox."""
        return 0 if self._outbox is None else self._outbox.waiting_bytes

    @property
    def dropped(self) -> int:
        """Events that were dropped from its outbox since it opened."""
        return 0 if self._outbox is None else self._outbox.dropped

    def settle_dropped(self, topic: str, notice: Callable[[str, int], Frame]) -> None:
        """Queue the notice of dropped events of ``topic``, whose subscription ends."""
        if self._outbox is not None:
            self._outbox.settle_dropped(topic, notice)

    def _wake_writer(self) -> None:
        """See to it that what was queued is sent."""
        if self._writer is None:
            if self._wake is not None and not self._wake.done():
                self._wake.set_result(None)
        elif not self._writer.paused:
            self.flush()

    def flush(self) -> None:
        """Write what is queued to the transport, as far as its buffer takes it."""
        writer, outbox = self._writer, self._outbox
        assert writer is not None, "the ASGI path has a task for this"
        while outbox and not writer.paused and writer.open:
            frame = outbox.pop()
            writer.write(frame.ws_frame_compressed if self._deflates else frame.ws_frame)
        writer.set_ready(writer.open and not writer.paused and self._close is None)
        if not outbox:
            _resolve(self._drained)

    async def _write(self) -> None:
        """Send through ASGI, frame by frame: the path that works on any server."""
        outbox, send, loop = self._queue(), self._send, asyncio.get_running_loop()
        try:
            while True:
                while outbox:
                    await send(_message(outbox.pop()))
                self._wake = loop.create_future()
                _resolve(self._drained)
                frame = await self._wake
                self._wake = None
                if frame is not None:
                    await send(_message(frame))
        except Exception as error:
            # The client is gone; what `send` raises then differs from server to server. The reader sees the end.
            _logger.debug("socket %s: cannot be written to: %r", self.id, error, extra={"socket": self.id})

    # Closing.

    def reject(self, code: CloseCode, reason: str) -> None:
        """Count a frame that cannot be understood, and close."""
        self._metrics.malformed[str(int(code))] += 1
        self._warn("malformed", "closed with %d: %s", code, reason)
        self.close(code, reason)

    def _warn(self, kind: str, text: str, *args: object) -> None:
        self._log.warning(kind, f"socket %s: {text}", self.id, *args, socket=self.id)

    def close(self, code: int, reason: str) -> bool:
        """Close after what is already queued; cut the client off if it does not answer in time.

        Args:    reason: at most 123 bytes; shown to the client.
        Returns: whether it was still open.
        """
        is_open = self._close is None and not self._ended
        if is_open:
            self._close = (code, reason)
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
                while self._outbox or self._is_sending():
                    self._drained = loop.create_future()
                    self._wake_writer()
                    await self._drained
                await self._send_close(code, reason)
        except Exception as error:
            # Timed out, or the client is gone: whatever `send` raises for that differs from server to server.
            _logger.debug("socket %s: not closed in good order: %r", self.id, error, extra={"socket": self.id})
        else:
            # The server tells of the client's answer by a disconnect, which ends the reader, and this task with it.
            await asyncio.sleep(end - loop.time())
        self._abort()
        if self._main is not None:
            self._main.cancel()

    def _is_sending(self) -> bool:
        """Whether the ASGI path has a frame under way."""
        return self._writing is not None and not self._writing.done() and (self._wake is None or self._wake.done())

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

    def _abort(self) -> None:
        """Cut the connection, where the server lets us: what the client has not read would keep it open without end.

        ASGI has no word for it. Uvicorn hands over a method of its own protocol class, which has the transport.
        """
        if self._writer is not None:
            self._metrics.cut_off_bytes += self._writer.buffered_bytes()
            self._writer.abort()
        elif (abort := _abort_of(self._receive)) is not None:
            abort()

    def end(self) -> None:
        """Let go of the connection; called once by its reader, when nothing more can be received."""
        self._ended = True
        wake = self._wake
        if wake is not None and wake.done() and not wake.cancelled() and wake.result() is not None:
            self._metrics.dropped["socket closed"] += 1
        if self._outbox:
            self._lose(self._outbox, "socket closed")
        for task in (self._closer, self._writing):
            if task is not None:
                task.cancel()
        if self._writer is not None:
            self._writer.owner = None
        elif (abort := _abort_of(self._receive)) is not None:
            # The server's own close waits for a client that reads.
            asyncio.get_running_loop().call_later(self._limits.close_timeout_s, abort)
        # What refers back to this connection: without a cycle it is freed at once, and not by a later collection.
        self.owner = None
        if self._outbox is not None:
            self._outbox.evict = _nothing
        self._main = self._closer = self._writing = self._receiving = self._wake = None


def _abort_of(receive: ReceiveCallable) -> Callable[[], object] | None:
    """What cuts a connection of Uvicorn's; None on other servers, and behind middleware that wraps ``receive``."""
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    return getattr(transport, "abort", None)


def _nothing() -> None:
    """The callback `evict` of a closed socket's outbox, which does nothing."""


def _size(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _message(frame: Frame) -> MutableMapping[str, Any]:
    if frame.is_text:
        return {"type": "websocket.send", "text": frame.text}
    return {"type": "websocket.send", "bytes": frame.data}


async def _received(receive: ReceiveCallable) -> MutableMapping[str, Any]:
    return await receive()


def _resolve(future: asyncio.Future[None] | None) -> None:
    """Wake the task that waits for ``future``, if there is one."""
    if future is not None and not future.done():
        future.set_result(None)
