"""Our Uvicorn protocol class: an ASGI extension that writes ready frames to the transport.

Owns what is particular to Uvicorn; must not know what the frames say. ``relay serve`` uses it automatically,
a team's own server by one line::

    uvicorn.run(app, ws="relay.server:RelayWebSocketProtocol", ws_ping_interval=None)

The extension ``relay.frames`` goes past ASGI's ``send``: a frame that is encoded once, header included, is
written to each socket in one synchronous call.
"""

import asyncio
import logging
import select
from asyncio import BaseTransport, TimerHandle, Transport
from http import HTTPStatus
from time import monotonic
from typing import Any, cast
from urllib.parse import unquote

import uvicorn
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState, SecurityError
from websockets.extensions.permessage_deflate import PerMessageDeflate, ServerPerMessageDeflateFactory
from websockets.frames import Close, Frame
from websockets.protocol import State
from websockets.server import ServerProtocol

from relay.errors import CloseCode
from relay.log import RateLimitedLoggers
from relay.metrics import count_refusal
from relay.protocol.frame import DEFLATE_WINDOW_BITS
from relay.rate_limit import TokenBucket
from relay.transports.inbound_frames import read_messages
from relay.transports.inbox import Gate, Inbox
from relay.transports.read_budget import LARGE_BYTES, ReadBudget
from relay.transports.upgrade import accept_plain, refusal, switching_protocols, tidy
from relay.transports.writer import EXTENSION, DirectWriter

_PIECE_BYTES = 4096
"""Bytes parsed at a time."""

_CLOSE_TIMEOUT_S = 5.0
"""Seconds from the close of a connection to its end, where no relay says otherwise."""

_HANG_UP_CHECK_S = 0.5
"""Seconds between two looks whether a client has gone whose handshake is being decided."""

# Pings, pongs and small fragments: so many at once, and so many per second on average. Browsers send none.
_IDLE_FRAMES_MAX = 1000
_IDLE_FRAMES_PER_S = 20
_FRAGMENT_MIN_BYTES = 128

# Without contexts on the client's side too: each would hold 7 kB here.
_DEFLATE = ServerPerMessageDeflateFactory(server_no_context_takeover=True, client_no_context_takeover=True)


def server_loggers(config: uvicorn.Config) -> RateLimitedLoggers:
    """The rate-limited loggers of one server, which all its connections share.

    A connection is made, and may be refused, before any relay is known, or where there is none. Its server's settings
    are what it has in common with the others, so they hold the loggers. Under plain Uvicorn nothing calls a flush
    by a clock: a timer does, and the server's end.
    """
    found: RateLimitedLoggers | None = vars(config).get("rate_limited_loggers")
    if found is None:
        found = RateLimitedLoggers(later=lambda delay_s, flush: asyncio.get_running_loop().call_later(delay_s, flush))
        vars(config)["rate_limited_loggers"] = found
    return found


def _read_budget(config: uvicorn.Config, loop: asyncio.AbstractEventLoop) -> ReadBudget:
    """What all connections of one server share; kept where `server_loggers` are."""
    found: ReadBudget | None = vars(config).get("read_budget")
    if found is None:
        found = vars(config)["read_budget"] = ReadBudget(loop)
    return found


def warn(config: uvicorn.Config, kind: str, text: str, *args: object) -> None:
    """Log a warning about a connection of this server; see `RateLimitedLogger.warning`."""
    server_loggers(config).get("relay.server").warning(kind, text, *args)


class RelayWebSocketProtocol(WebSocketsSansIOProtocol):
    """Uvicorn's own class, with the extension in its scope and without secrets in its log."""

    # Uvicorn's attributes too: in the instance's dict they would be more than Python lets instances share the keys of,
    # and such a dict takes 1.6 kB. What a later Uvicorn adds is in the dict.
    # fmt: off
    __slots__ = (
        "_accept", "_awaits_turn", "_budget", "_conn", "_farewell", "_hang_up_check", "_idle_frames", "_is_measured",
        "_owed", "_reads_large", "_reads_simple", "_unparsed", "app", "app_state", "asgi_version", "client",
        "close_sent", "close_timeout", "close_timer", "config", "connections", "curr_msg_data_type", "default_headers",
        "disconnected", "frame_writer", "frames", "handshake_complete", "handshake_initiated", "initial_response",
        "last_ping_rtt", "logger", "loop", "pending_ping_payload", "ping_interval", "ping_sent_at", "ping_timeout",
        "ping_timer", "pong_timer", "queue", "read_paused", "root_path", "scheme", "scope", "server", "tasks",
        "transport", "writable",
    )
    # fmt: on

    handshake_complete: bool  # `_refuse` sets both in one statement, which cannot be annotated
    close_sent: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Offer compression, where it is on, without a context: with one, no frame could serve two sockets.

        What Uvicorn uses of a queue and an event takes less here than asyncio's own, with four deques: 3 kB of 20.
        """
        # The protocol core of websockets, once something needs it.
        self._conn: ServerProtocol | None = None
        # What cuts a connection that is being closed; Uvicorn's own name, since 0.54.
        self.close_timer: TimerHandle | None = None
        super().__init__(*args, **kwargs)
        self.frame_writer: DirectWriter | None = None
        # Set while the handshake is being decided.
        self._hang_up_check: TimerHandle | None = None
        self.queue: Inbox = Inbox()  # type: ignore[assignment]
        self.writable: asyncio.Event = cast(asyncio.Event, Gate())
        # What was read from the transport and is not parsed yet, while the application has messages to take.
        self._unparsed = b""
        self._budget = _read_budget(self.config, self.loop)
        # What the application receives once that is parsed too, where the connection was lost before.
        self._farewell: dict[str, Any] | None = None
        # Frames that carry nothing.
        self._idle_frames = TokenBucket(_IDLE_FRAMES_PER_S, _IDLE_FRAMES_MAX, monotonic())
        # Whether messages may be larger than what is read of them (compressed, or in fragments), whether the last one
        # was large, and whether the connection waits for a turn to parse in.
        self._is_measured = False
        self._reads_large = False
        self._awaits_turn = False
        # Whether simple frames are read here, not compressed ones, and the bytes of a frame that websockets reads.
        self._reads_simple = False
        self._owed = 0
        # The answer to an upgrade request that websockets has not seen.
        self._accept: bytes | None = None
        if self.config.ws_per_message_deflate:
            self.conn.available_extensions = [_DEFLATE]

    @property
    def conn(self) -> ServerProtocol:
        """The protocol core: it is made when something needs it, since most sockets never do, and it takes 4 kB."""
        if self._conn is None:
            self._conn = ServerProtocol(state=State.OPEN, max_size=self.config.ws_max_size, logger=_quiet)
            self._conn.debug = False
        return self._conn

    @conn.setter
    def conn(self, conn: ServerProtocol) -> None:
        self._conn = conn

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
        if self.read_paused and not self.transport.is_closing():  # the application has not taken what came before
            self.transport.pause_reading()
        self._parse()
        if not self.handshake_initiated and self.conn.handshake_exc is not None:
            self._refuse_head()

    def _parse(self) -> None:
        size = len(self._unparsed) + (0 if self._conn is None else len(self._conn.reader.buffer))
        is_large = size >= LARGE_BYTES or self._is_measured
        before = len(self._unparsed)
        if is_large:
            if self._budget.is_spent and self._may_wait(size):
                self._await_turn()
                return
            self._unparsed = memoryview(self._unparsed)  # type: ignore[assignment]  # of it no piece copies the rest
        is_lost = self._farewell is not None
        while self._unparsed and not self.read_paused and (is_lost or not self.transport.is_closing()):
            if self._reads_simple and not self._owed:
                if not self._read_simple():
                    break
                continue
            size = min(_PIECE_BYTES, self._owed) if self._reads_simple else _PIECE_BYTES
            piece, self._unparsed = self._unparsed[:size], self._unparsed[size:]
            if self._reads_simple:
                self._owed -= len(piece)
            super().data_received(piece)
        if is_lost and not self.read_paused:
            self._unparsed = b""  # the head of a frame at most, whose rest does not come any more
        if is_large:
            self._unparsed = bytes(self._unparsed)
            self._count_large(before - len(self._unparsed))
        if self._farewell is not None and not self._unparsed:
            self.queue.put_nowait(self._farewell)
            self._farewell = None
            self._let_go()
        self._watch_end()

    def _read_simple(self) -> bool:
        """Read the frames that need no websockets, and see how much of what follows does.

        Returns: whether there was something; False where more has to come first.
        """
        # A message in fragments goes on, or nothing is handed over any more: websockets reads all.
        limit = -1 if self.frames or self.close_sent else self.config.ws_max_size
        messages, taken, self._owed = read_messages(self._unparsed, _PIECE_BYTES, limit)
        self._unparsed = self._unparsed[taken:]
        for message in messages:
            kind = "text" if isinstance(message, str) else "bytes"
            self.queue.put_nowait({"type": "websocket.receive", kind: message})
            self.read_paused = True
        return bool(taken or self._owed)

    def _may_wait(self, size: int) -> bool:
        """Whether there is something to parse that is large or belongs to a message that is; all else comes between."""
        if not self._unparsed or self.read_paused or not self.handshake_complete:
            return False
        return size >= LARGE_BYTES or bool(self.frames) or self._reads_large

    def _count_large(self, parsed: int) -> None:
        """Count what was parsed, and the messages that came of it: to handle those is part of what a turn takes."""
        messages = self.queue.size() if self.read_paused else 0
        if self.read_paused:
            self._reads_large = messages >= LARGE_BYTES
        if parsed + messages >= LARGE_BYTES:
            self._budget.spend(parsed + messages)

    def _await_turn(self) -> None:
        """Parse on in a later turn of the event loop, and read nothing meanwhile."""
        if not self.transport.is_closing():
            self.transport.pause_reading()
        if not self._awaits_turn:
            self._awaits_turn = True
            self._budget.wait(self._take_turn)

    def _take_turn(self) -> None:
        self._awaits_turn = False
        if not self.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()
        self._parse()

    async def receive(self) -> Any:
        """Hand over the next message, and read on when it was the last."""
        message = await self.queue.get()
        if self.handshake_complete and self.queue.empty():
            self._read_on()
        return message

    def _read_on(self) -> None:
        if self.read_paused:
            self.read_paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()
        if self._unparsed:
            self._parse()

    def _await_decision(self) -> None:
        """Read nothing until the application has decided on the handshake; a client has nothing to say before.

        A connection that is not read from does not tell that the client has gone, so it is looked at.
        """
        if self.transport.is_closing():
            return
        self.read_paused: bool = True
        self.transport.pause_reading()
        self._hang_up_check = self.loop.call_later(_HANG_UP_CHECK_S, self._check_hang_up)

    def _check_hang_up(self) -> None:
        if has_hung_up(self.transport):
            self.transport.abort()
        else:
            self._hang_up_check = self.loop.call_later(_HANG_UP_CHECK_S, self._check_hang_up)

    def _decided(self) -> None:
        if self._hang_up_check is not None:
            self._hang_up_check.cancel()
            self._hang_up_check = None

    def _watch_end(self) -> None:
        """Cut a connection that is being closed, if it has not ended in time: a close waits for a client that reads."""
        if self.close_timer is None and self.transport.is_closing() and not self.disconnected:
            self._cut_later()

    def _cut_later(self) -> None:
        timeout_s = _CLOSE_TIMEOUT_S if self.frame_writer is None else self.frame_writer.close_timeout_s
        self.close_timer = self.loop.call_later(timeout_s, self.transport.abort)

    def _refuse_head(self) -> None:
        """Answer a request that Uvicorn's HTTP parser has taken and websockets has not; Uvicorn would let it hang."""
        error = self.conn.handshake_exc
        cause = error and (error.__cause__ or error)
        if isinstance(cause, SecurityError):
            self._refuse(431, "expected lines of at most 8 KiB and at most 128 headers", "head too large")
        else:
            self._refuse(400, f"the upgrade request cannot be read: {cause}", "malformed")

    def _refuse(self, status: int, text: str, kind: str, *headers: str) -> None:
        """Answer an upgrade request with an HTTP error, and close."""
        self.handshake_initiated = self.handshake_complete = self.close_sent = True
        count_refusal(self.app_state, f"handshake: {kind}")
        warn(self.config, kind, "handshake refused: %.255s", " ".join(text.split()))
        body = f"{text}\n".encode(errors="replace")
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "Connection: close",
            "Content-Type: text/plain; charset=utf-8",
            f"Content-Length: {len(body)}",
            *headers,
        )
        self.transport.write("".join(f"{line}\r\n" for line in (*head, "")).encode() + body)
        self.transport.close()
        self._watch_end()

    def upgrade(self, target: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Begin the handshake, with the request as httptools has read it; websockets reads it again where it is odd.

        Args: headers: names in lower case, and values.
        """
        accept = accept_plain(target, headers, negotiates=self.config.ws_per_message_deflate)
        if accept is None:
            lines = (b"GET %b HTTP/1.1" % target, *(b"%b: %b" % header for header in headers), b"", b"")
            self.data_received(b"\r\n".join(lines))
            return
        self.conn.parser.close()  # Uvicorn has made it; the parser is a cycle
        self._accept, self._conn = accept, None
        self.handshake_initiated: bool = True
        path, _, query = target.partition(b"?")
        protocols = next((value for name, value in headers if name == b"sec-websocket-protocol"), b"")
        self.scope: Any = {
            "type": "websocket",
            "asgi": {"version": self.asgi_version, "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": self.scheme,
            "server": self.server,
            "client": self.client,
            "root_path": self.root_path,
            "path": self.root_path + unquote(path.decode()),
            "raw_path": self.root_path.encode() + path,
            "query_string": query,
            "headers": headers,
            "subprotocols": [each.strip() for each in protocols.decode().split(",") if each],
            "state": self.app_state.copy(),
            "extensions": {"websocket.http.response": {}},
        }
        self._offer(DirectWriter(self.transport))
        self.queue.put_nowait({"type": "websocket.connect"})
        task = self.loop.create_task(self.run_asgi())
        task.add_done_callback(self.on_task_complete)
        self.tasks.add(task)

    def _offer(self, writer: DirectWriter) -> None:
        """Put the extension into the scope, and wait for the application's decision."""
        self.frame_writer = writer
        cast(dict[str, Any], self.scope["extensions"])[EXTENSION] = writer
        self._await_decision()

    def handle_connect(self, event: Any) -> None:
        """Check the request, and offer the extension to the application."""
        if (why := refusal(event.headers)) is not None:
            self._refuse(*why)
            return
        tidy(event.headers)
        super().handle_connect(event)
        if hasattr(self, "scope"):
            self.scope["subprotocols"] = [each for each in self.scope["subprotocols"] if each]
            self._is_measured = bool(self.conn.extensions)
            self._offer(DirectWriter(self.transport, _deflates(self.conn)))
        else:  # the handshake was answered with an error: of a header that is not checked above
            count_refusal(self.app_state, "handshake: malformed")
            warn(self.config, "malformed", "handshake refused: %.255s", self.conn.handshake_exc)

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
        if writer is not None and not self.frames:  # else it would keep an unfinished message here
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
        self._is_measured = True
        if len(event.data) >= _FRAGMENT_MIN_BYTES or self._may_idle():
            super().handle_cont(event)

    def send_receive_event_to_app(self) -> None:
        """Hand over a message, unless it is text that is no UTF-8."""
        try:
            super().send_receive_event_to_app()
        except InvalidState:  # it is not, and the close frame behind it has been answered already
            self.handle_parser_exception()

    def _may_idle(self) -> bool:
        """Let a frame pass that carries nothing or next to it; close where they come without an end.

        Such a frame costs as much as any, and no limit of the application's ever sees it.
        """
        if self.close_sent:
            return False
        if self._idle_frames.take(monotonic()):
            return True
        count_refusal(self.app_state, "empty frames")
        warn(self.config, "idle frames", "socket closed with 1008: too many pings, pongs or small fragments")
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
        server_loggers(self.config).flush(at_once=True)
        if not self.drain():
            self._end_writer()
            super().shutdown()
            self._watch_end()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the extension; the transport is gone.

        What was read before and is not parsed yet goes to the application first, at the pace that it takes it.
        """
        self._end_writer()
        self._decided()
        if self.close_timer is not None:
            self.close_timer.cancel()
            self.close_timer = None
        has_closed = self._conn is not None and self._conn.close_rcvd is not None
        is_over = self.close_sent or has_closed or not self.handshake_complete
        super().connection_lost(exc)
        break_cycle(self.transport)
        if self._unparsed and not is_over:
            self._farewell = self.queue.take_back()
            self._parse()
        else:
            self._let_go()

    def _let_go(self) -> None:
        """Break the reference cycles of a connection whose end the application has received.

        So it is freed at once and not by a later collection: the parser is a generator over its own protocol, and an
        exception that is kept has a traceback to it.
        """
        self._unparsed = b""
        self.frames.clear()
        if (conn := self._conn) is not None:
            conn.parser.close()
            for error in (conn.handshake_exc, conn.parser_exc):
                if error is not None:
                    error.__traceback__ = error.__context__ = error.__cause__ = None
            conn.handshake_exc = conn.parser_exc = None
        self._forget_handshake()

    def _forget_handshake(self) -> None:
        for name in ("request", "response"):
            vars(self).pop(name, None)

    async def send(self, message: Any) -> None:
        """End the extension before the application's own close frame, after pressure has gone.

        The disconnect that follows is the client's answer to the close, or the end of the connection: Uvicorn tells of
        one as soon as the close is sent, and an application that believes it leaves the connection to itself.
        """
        kind = message["type"]
        if kind == "websocket.close":
            await self.writable.wait()
            self._end_writer()
        is_closed, is_accepted = self.close_sent, self.handshake_complete
        is_first = not is_accepted and self.initial_response is None
        if kind == "websocket.close" and is_first:  # a relay that refuses answers with a text, and logs it
            text = (
                "the application refused a WebSocket at %.255r with 403; clients of relay connect below its mount path"
            )
            warn(self.config, "refused by the application", text, self.scope["path"])
        if kind == "websocket.accept" and self._accept is not None and is_first:
            await self._send_accept(message)
        else:
            await super().send(message)
        if kind == "websocket.close":
            if is_accepted and self.close_sent and not is_closed:
                self.queue.discard_disconnect()
                if self.close_timer is not None:
                    self.close_timer.cancel()  # Uvicorn's own, which waits for a client that reads
                self._cut_later()
            self._parse()  # the client's answer may be among what was left, and an application that closes asks no more
        if kind == "websocket.accept":
            # The handshake is over; its headers would stay for the life of the socket, 2 kB of them.
            self._forget_handshake()
            self._decided()
            self._reads_simple = self._accept is not None or not self.conn.extensions
            if self.queue.empty():
                self._read_on()
        if kind == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete: bool = True  # or Uvicorn logs an error, as if the handshake had not been answered
        self._watch_end()

    async def _send_accept(self, message: Any) -> None:
        """Accept a handshake that websockets has not seen."""
        await self.writable.wait()
        if self.disconnected:
            raise ClientDisconnected
        assert self._accept is not None, "else websockets has"
        if not self.transport.is_closing():
            self.handshake_complete = True
            headers = (*self.default_headers, *message.get("headers", ()))
            self.transport.write(switching_protocols(self._accept, headers, message.get("subprotocol")))
            self.start_keepalive()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        """See to it that a connection which the application leaves behind ends in time."""
        super().on_task_complete(task)
        self._watch_end()

    def keepalive_timeout(self) -> None:
        """Close a connection whose client does not answer pings, in time."""
        super().keepalive_timeout()
        self._watch_end()

    def _end_writer(self) -> None:
        if self.frame_writer is not None:
            self.frame_writer.end()


def has_hung_up(transport: BaseTransport) -> bool:
    """Whether the other side has closed the connection, though nothing is read from it."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))  # POLLHUP and POLLERR come unasked


def break_cycle(transport: BaseTransport) -> None:
    """Let a transport that is lost be freed at once: asyncio's own refers to itself by a bound method."""
    if hasattr(transport, "_read_ready_cb"):
        transport._read_ready_cb = _nothing


def _nothing() -> None:
    return None


def _deflates(conn: ServerProtocol) -> bool:
    """Say whether the client takes `Frame.deflated`: it may have asked for a smaller window."""
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
