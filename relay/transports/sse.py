"""One stream of server-sent events, as a socket that joins its topics at the start and never says anything more.

Owns the HTTP response; must not know messages, topics' subscribers or Redis.

The response begins once all joins are decided: a refusal that will not change is answered with its status, since
`EventSource` then stops. A subscription that ends with an error ends the stream, and the client comes back: it has no
way to rejoin.
"""

import asyncio
import logging
import signal
import socket as sockets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import msgspec

from relay.errors import CloseCode
from relay.protocol import sse
from relay.protocol.frame import Frame
from relay.protocol.payload import Payload
from relay.protocol.sse import ChannelEnd, JoinReply, StreamFrame
from relay.transports.base import ReceiveCallable, Scope, SendCallable, TransportServices
from relay.transports.handshake import HandshakeRejected
from relay.transports.outbox import Outbox
from relay.transports.queued import QueuedTransport, resolve
from relay.transports.sse_request import StreamRequest, answer, first_lines, last_lines, stream_headers
from relay.transports.writer import STREAM_EXTENSION, DirectWriter

_logger = logging.getLogger("relay.socket")

COMMENT_INTERVAL_S = 15.0
"""Seconds between two comments, which prove to proxies, and to the kernel, that the stream is alive."""

_BODY_MAX_BYTES = 32_768
"""Most bytes of events that wait together and go through ASGI in one message; half of what a transport buffers."""


_COMMENT_CHUNK = sse.chunk(sse.COMMENT)


class _Joined(msgspec.Struct):
    """What the reply to a join says of the topic's history."""

    position: str | None = msgspec.field(default=None, name="_position")
    recovered: bool | None = None
    reason: str = ""


_encode_join = msgspec.json.Encoder().encode
_decode_joined = msgspec.json.Decoder(_Joined).decode


class SSETransport(QueuedTransport):
    """A stream, used by one task: the one that made it and reads from it.

    Args: id: for the log.
          request: the topics, and the positions that they are to be joined at.
          services: what it shares with the other transports of its node.
    """

    __slots__ = (
        "_blocked_since",
        "_closer",
        "_comments",
        "_first_events",
        "_is_over",
        "_joining",
        "_last",
        "_over",
        "_positions",
        "_receive",
        "_scope",
        "_send",
        "_several",
        "_since",
        "_to_join",
        "_topics",
    )

    deflates: bool = False
    write_mode: str = "sse"

    def __init__(
        self,
        id: str,
        request: StreamRequest,
        scope: Scope,
        receive: ReceiveCallable,
        send: SendCallable,
        services: TransportServices,
    ) -> None:
        super().__init__(id, scope, services)
        self._scope = scope
        self._receive = receive
        self._send = send
        self._since = request.since
        self._last = request.last
        self._several = len(request.topics) > 1
        # Topics whose join is to be sent, those of which none is decided yet, and all that have not ended.
        self._to_join = deque(request.topics)
        self._joining = set(request.topics)
        self._topics = set(request.topics)
        # By topic, the position that the client is to come back with; empty without histories.
        self._positions: dict[str, str] = {}
        # What the client is given once the stream begins.
        self._first_events: list[bytes] = []
        self._closer: asyncio.Task[None] | None = None
        # Whether the last of the response has begun, and what ends the reader after it.
        self._is_over = False
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Since when the client has to read before more can be sent, in monotonic seconds.
        self._blocked_since: float | None = None
        self._comments: asyncio.TimerHandle | None = None

    @property
    def ending(self) -> tuple[int | None, str, str]:
        """Close code, reason, and who closed: ``relay`` or ``client``. For one that has ended."""
        return (None, "", "client") if self._close is None else (*self._close, "relay")

    # Reading: the joins, then nothing until the client has gone.

    async def receive(self) -> str | bytes | None:
        """The join of the next topic, as a client would send it; None once the stream has ended."""
        if self._to_join:
            topic = self._to_join.popleft()
            params = {"since": self._since.get(topic)} | ({} if self._last is None else {"last": self._last})
            frame = _encode_join(["1", "1", topic, "phx_join", params]).decode()
            self.last_size: int = len(frame.encode())
            return frame
        gone = asyncio.ensure_future(self._wait_for_disconnect())
        try:
            await asyncio.wait((gone, self._over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        return None

    async def _wait_for_disconnect(self) -> None:
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass  # the body of a GET means nothing
        except Exception as error:
            _logger.debug("socket %s: cannot be read from: %r", self.id, error, extra={"socket": self.id})

    def is_own_cancellation(self) -> bool:
        """Say that no cancellation of the reading task comes from here."""
        return False

    def idle_s(self, now: float) -> float:
        """Seconds since the client should have read; 0 while nothing waits for it."""
        return 0.0 if self._blocked_since is None else now - self._blocked_since

    # What its channels say.

    def send_control(self, frame: Frame) -> None:
        """Begin or end the stream, where a join is answered or a subscription ends; write what else there is."""
        if self._is_over or self._ended:
            return
        if isinstance(frame, JoinReply):
            self._receive_reply(frame)
        elif not isinstance(frame, ChannelEnd):
            super().send_control(frame)
        elif self._close is None:
            self._topics.discard(frame.topic)
            if frame.reason is None and self._topics:
                super().send_control(frame)
            else:
                self._begin_close(CloseCode.GOING_AWAY, frame.reason or "its subscriptions were closed", frame.body)

    def _receive_reply(self, reply: JoinReply) -> None:
        topic = reply.topic
        self._joining.discard(topic)
        if self._close is not None:
            return
        joined = _read_reply(reply.response)
        if reply.status != "ok":
            reason = joined.reason or "refused"
            rejected = HandshakeRejected(sse.status_of(reason), f"topic {topic!r}: {reason}", "join")
            self._begin_close(CloseCode.POLICY_VIOLATION, reason, b"", rejected)
            return
        if joined.position is not None:
            self._positions[topic] = joined.position
        self._first_events.append(sse.encode_join(topic, reply.response))
        if joined.recovered is False:
            self._first_events.append(sse.encode_lost(topic, joined.reason))
        if not self._joining:
            self._begin()

    # Writing.

    def _begin(self) -> None:
        """Begin the response: all joins are accepted."""
        _limit_unacknowledged(self._receive, self._limits.idle_timeout_s)
        writer: DirectWriter | None = (self._scope.get("extensions") or {}).get(STREAM_EXTENSION)
        lines = first_lines(self._ids()) + b"".join(self._first_events)
        self._first_events.clear()
        if writer is not None and writer.writes_for(self._send):
            self._writing = asyncio.create_task(self._begin_direct(writer, lines))
        else:
            self._writing = asyncio.create_task(self._write(lines))
        self._set_comment_timer()

    def _ids(self) -> bytes:
        """The positions of all topics, as an ``id``; empty without any."""
        if self._several:
            return sse.encode_positions(self._positions)
        return next(iter(self._positions.values()), "").encode()

    async def _start(self, lines: bytes) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": stream_headers(self._scope)})
        await self._send_body(lines)

    async def _send_body(self, data: bytes) -> None:
        self._blocked_since = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._blocked_since = None

    async def _begin_direct(self, writer: DirectWriter, lines: bytes) -> None:
        """Send the head through ASGI; what follows goes to the server's transport, chunk by chunk."""
        try:
            await self._start(lines)
        except Exception as error:
            self._log_unwritable(error)
            return
        self._writer = writer
        writer.owner = self
        self.flush()

    async def _write(self, lines: bytes) -> None:
        """Send through ASGI: the path that works on any server."""
        outbox, loop = self._queue(), asyncio.get_running_loop()
        try:
            await self._start(lines)
            while True:
                while outbox:
                    await self._send_body(self._take(outbox))
                self._wake = loop.create_future()
                resolve(self._drained)
                frame = await self._wake
                self._wake = None
                if frame is not None:
                    await self._send_body(self._lines(frame))
                elif not outbox:
                    await self._send_body(sse.COMMENT)
        except Exception as error:
            self._log_unwritable(error)

    def _log_unwritable(self, error: Exception) -> None:
        # The client is gone; what `send` raises then differs from server to server. The reader sees the end.
        _logger.debug("socket %s: cannot be written to: %r", self.id, error, extra={"socket": self.id})

    def _take(self, outbox: Outbox) -> bytes:
        """Frames that wait, together."""
        parts = [self._lines(outbox.pop())]
        size = len(parts[0])
        while outbox and size < _BODY_MAX_BYTES:
            parts.append(self._lines(outbox.pop()))
            size += len(parts[-1])
        return b"".join(parts)

    def _lines(self, frame: Frame) -> bytes:
        """A frame as this stream has it: with several topics, its id names the positions of all."""
        if not self._has_own_ids or not isinstance(frame, StreamFrame) or frame.position is None:
            return frame.data
        self._positions[frame.topic] = frame.position
        return b"id: %b\n%b" % (sse.encode_positions(self._positions), frame.body)

    def _encode(self, frame: Frame) -> bytes:
        """A frame as the direct writer takes it."""
        return sse.chunk(self._lines(frame)) if self._has_own_ids else frame.ws_frame

    @property
    def _has_own_ids(self) -> bool:
        """Whether its events have other ids than those of other streams."""
        return self._several and bool(self._positions)

    def direct_write(self) -> Callable[[bytes], object] | None:
        """What writes frames to this client as they are; None where they must be queued, or have ids of their own."""
        return None if self._has_own_ids else super().direct_write()

    def readiness_changed(self) -> None:
        """Note since when the client has to read; have the hub ask for `direct_write` again."""
        self._note_pause()
        super().readiness_changed()

    def _is_full(self) -> bool:
        return self._writing is None or super()._is_full()  # nothing is sent before all joins are decided

    def flush(self) -> None:
        """Write what is queued to the transport, as far as its buffer takes it."""
        super().flush()
        self._note_pause()

    def _note_pause(self) -> None:
        is_paused = self._writer is not None and self._writer.paused
        self._blocked_since = time.monotonic() if is_paused else None

    def _set_comment_timer(self) -> None:
        interval_s = min(COMMENT_INTERVAL_S, self._limits.idle_timeout_s / 2)
        self._comments = asyncio.get_running_loop().call_later(interval_s, self._comment)

    def _comment(self) -> None:
        """Show that the stream is alive; not where something waits to be read anyway."""
        self._set_comment_timer()
        if self._writer is None:
            if self._wake is not None and not self._wake.done() and not self._outbox:
                self._wake.set_result(None)
        elif self._writer.ready:
            self._writer.write(_COMMENT_CHUNK)

    # Closing.

    def close(self, code: int, reason: str) -> bool:
        """End the stream after what is already queued, with an event that gives the reason.

        Returns: whether it was still open.
        """
        is_open = self._close is None and not self._ended
        if is_open:
            self._begin_close(code, reason, sse.encode_failure(reason))
        return is_open

    def _begin_close(self, code: int, reason: str, event: bytes, rejected: HandshakeRejected | None = None) -> None:
        """Begin to end it.

        Args: event: what the client is given last.
              rejected: what it is answered where the stream has not begun; by default that it may come back.
        """
        has_begun = self._writing is not None
        self._close = (code, reason)
        resolve(self._drained)  # for what waits in `drained`, which ends with the close
        if self._comments is not None:
            self._comments.cancel()
        if self._writer is not None:
            self._writer.set_ready(False)
        if has_begun:
            end = partial(self._end_stream, event)
        else:
            refusal = answer(self._scope, rejected or HandshakeRejected(503, reason, "join"))
            end = partial(refusal, self._scope, self._receive, self._send)
        self._closer = asyncio.create_task(self._finish(end))
        if self.owner is not None:
            self.owner.close_started()

    async def _finish(self, end: Callable[[], Awaitable[None]]) -> None:
        """Send what is left, cut the client off if it does not take it in time, and end the reader."""
        try:
            async with asyncio.timeout(self._limits.close_timeout_s):
                await end()
        except Exception as error:
            # Timed out, or the client is gone: whatever `send` raises for that differs from server to server.
            _logger.debug("socket %s: not closed in good order: %r", self.id, error, extra={"socket": self.id})
            self._abort(self._receive)
        resolve(self._over)

    async def _end_stream(self, event: bytes) -> None:
        await self._send_rest()
        self._is_over = True
        await self._send({"type": "http.response.body", "body": last_lines(event), "more_body": False})

    def end(self) -> None:
        """Release the stream; called once by its reader, when nothing more can be received."""
        super().end()
        if self._closer is not None:
            self._closer.cancel()
        if self._comments is not None:
            self._comments.cancel()
        self._closer = self._comments = None


def is_server_ending() -> bool:
    """Say whether Uvicorn is about to end: it waits for streams to end, and does not let an application know.

    Its handler of SIGTERM is a method of the server, which has the answer.
    """
    return getattr(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), "should_exit", False) is True


def _read_reply(response: Payload) -> _Joined:
    try:
        return _decode_joined(bytes(response))
    except (msgspec.MsgspecError, RecursionError, UnicodeError):  # a plugin's own words are of any type
        return _Joined()


def _limit_unacknowledged(receive: ReceiveCallable, timeout_s: float) -> None:
    """Have the kernel end the connection where the client acknowledges nothing for so long, comments included.

    A client that has vanished, and was not closed, would else be kept for a quarter of an hour. Linux alone, and
    servers that hand over their transport (see `abort_of`).
    """
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if (found := transport and transport.get_extra_info("socket")) and hasattr(sockets, "TCP_USER_TIMEOUT"):
        with suppress(OSError, ValueError):  # a Unix socket has no such option, and one that is lost has no number
            found.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_USER_TIMEOUT, round(timeout_s * 1000))
