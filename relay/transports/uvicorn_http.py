"""Our Uvicorn protocol class for HTTP: bounds what a client may hold that sends no request, or reads no answer.

Owns what is particular to Uvicorn's httptools protocol; must not know what is asked for. ``relay serve`` uses it
automatically, a team's own server by one line::

    uvicorn.run(app, http="relay.server_http:RelayHTTPProtocol", ws="relay.server:RelayWebSocketProtocol")

Uvicorn gives a client all the time it wants, and any number of bytes and requests: a few thousand that send a byte a
minute (slowloris) would take all of a process's files, and a hundred that ask and never read 8 MB each.
"""

from asyncio import TimerHandle, Transport
from typing import Any, cast

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from relay.fd_limit import descriptors
from relay.metrics import count_refusal
from relay.transports.uvicorn_websocket import RelayWebSocketProtocol, break_cycle, server_loggers, warn
from relay.transports.writer import STREAM_EXTENSION, DirectWriter

HEAD_MAX_BYTES = 65_536
"""Largest head of a request: its first line and its headers."""

_RESERVE = 32
"""File descriptors kept free: the link to Redis needs one to come back, and so does a probe of ``/ready``."""

_PIPELINE_MAX = 16
"""Requests that may wait for the answer to the one before them; browsers send none so."""

_PIECE_BYTES = 4096
"""Bytes parsed at a time: a read brings up to 256 kB, which can contain 14 000 requests."""

_EARLY_MAX_BYTES = 16_384
"""Bytes behind an upgrade request that are kept until it is answered; a client has nothing to say before."""

_UNREAD_S = 60.0
"""Seconds in which a client must read something of what waits for it, or it is cut off; nginx's default too."""

_PATIENCE_S = 1.0
"""Seconds that a client may be waited for even while file descriptors are scarce."""

_SCHEMES = (b"http", b"https", b"ws", b"wss")

_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class RelayHTTPProtocol(HttpToolsProtocol):
    """Uvicorn's own class, with bounds: for the head of a request in time and in bytes, for requests that wait, and
    for the time in which an answer is not read.

    Args: handshake_timeout_s: seconds for the head to arrive, from the connection or the request's first byte on; 0:
              no bound.
          close_timeout_s: seconds in which something of an answer must be read once the server ends.
    """

    # With them the instance's dict would have more keys than instances can share: see `RelayWebSocketProtocol`.
    __slots__ = (
        "_answering",
        "_body_follows",
        "_close_timeout_s",
        "_cutter",
        "_head_bytes",
        "_in_head",
        "_is_body",
        "_is_replaying",
        "_stream_writer",
        "_timeout_s",
        "_unread_s",
        "_upgrade",
        "_waited_since",
        "_watch",
    )

    def __init__(
        self, *args: Any, handshake_timeout_s: float = 10.0, close_timeout_s: float = 5.0, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._close_timeout_s = close_timeout_s
        self._timeout_s = handshake_timeout_s
        # While a head is awaited: what cuts the connection, and the bytes that came.
        self._cutter: TimerHandle | None = None
        self._in_head = True
        # Bytes since the connection began, or the last that were of a body: a head, or trailers.
        self._head_bytes = 0
        self._is_body = False
        # Of a request whose upgrade is ignored: whether its body is still to be parsed, and whether its head is given
        # to a further parser, which has nothing to say of it.
        self._body_follows = self._is_replaying = False
        # Once an upgrade to WebSocket is asked for: what came behind the request.
        self._upgrade: bytes | None = None
        # What is being answered: not `cycle`, which is the newest request, where several have come.
        self._answering: RequestResponseCycle | None = None
        # Since when the client is waited for, in seconds of the loop's clock; None while it waits for us.
        self._waited_since: float | None = None
        # Seconds in which something of an answer must be read; None for the usual ones.
        self._unread_s: float | None = None
        # What an application may write the rest of that answer with.
        self._stream_writer: DirectWriter | None = None
        # What looks whether an answer is read, while it has to wait or is the last.
        self._watch: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        # The kernel gives the lowest free number, so the number tells how many are taken.
        taken, most = transport.get_extra_info("socket").fileno(), descriptors()
        if taken >= most - min(_RESERVE, most // 4) and not self._make_room():
            transport.write(_REFUSAL)
            self._cut("file descriptors", f"{taken} of {most} file descriptors are taken")
        else:
            self._await_head()

    def _make_room(self) -> bool:
        """Cut the half of those connections off that have been waited for longest; False where there are none."""
        now = self.loop.time()
        waited = [
            (connection._waited_since, connection)
            for connection in self.connections
            if isinstance(connection, RelayHTTPProtocol)
            and connection._waited_since is not None
            and now - connection._waited_since > _PATIENCE_S
        ]
        waited.sort(key=lambda one: one[0])
        for _, connection in waited[: (len(waited) + 1) // 2]:
            connection._cut("file descriptors", "to make room: file descriptors are scarce", at_once=True)
        return bool(waited)

    def data_received(self, data: bytes) -> None:
        """Read on, a little at a time, unless the head, or what follows the body, has grown too large."""
        self._unset_keepalive_if_required()
        if self._upgrade is not None and not self.transport.is_closing():
            self._upgrade += data  # the request before it reads on: it asks for more, or for its client's end
            self._hand_over()
            return
        start = 0
        while start < len(data) and not self.transport.is_closing() and self._upgrade is None:
            start += self._parse(data[start : start + _PIECE_BYTES])
            if self._upgrade is not None:
                self._upgrade += data[start:]
                self._hand_over()

    def _parse(self, data: bytes) -> int:
        """Parse a part of it; returns how much of that was HTTP."""
        self._is_body = False
        parsed, problem = len(data), None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            parsed = int(upgrade.args[0])
            if self._should_upgrade():
                self._upgrade = b""
                return parsed
            # Any other upgrade is ignored, and what follows is HTTP.
            if self._body_follows:
                self._parse_body()
        except httptools.HttpParserError as error:
            problem = str(error)
        if problem is not None:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response(f"Invalid HTTP request received: {problem[:200]}")
        self._head_bytes = 0 if self._is_body else self._head_bytes + parsed
        if self.transport.is_closing():  # 400 has been answered
            self._watch_reader()
        elif self._head_bytes > HEAD_MAX_BYTES:
            self._cut("handshake: head too large", f"more than {HEAD_MAX_BYTES} bytes of head, or behind a body")
        elif len(self.pipeline) > _PIPELINE_MAX:
            reason = f"more than {_PIPELINE_MAX} requests at once"
            self._cut("http: too many requests", reason, at_once=True)
        return parsed

    def _parse_body(self) -> None:
        """Go on with the body of a request whose upgrade is ignored: httptools takes it for another protocol's bytes.

        Java's HTTP client asks for an upgrade to HTTP/2 with each first request.
        """
        lines = [b"%s: %s\r\n" % pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        self._body_follows, self._is_replaying = False, True
        self.parser: httptools.HttpRequestParser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(lines) + b"\r\n")
        self._is_replaying = False

    def _hand_over(self) -> None:
        """Upgrade to WebSocket, as soon as the requests before it are answered."""
        assert self._upgrade is not None, "it has been asked for"
        early = self._upgrade
        is_answering = self._answering is not None and not self._answering.response_complete
        if len(early) > _EARLY_MAX_BYTES:
            if not is_answering:  # else it would be in the midst of another answer
                self.send_400_response("expected no data before the upgrade is answered")
            self._cut("handshake: malformed", "much data behind an upgrade request", at_once=is_answering)
        elif is_answering:
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()
            self.handle_websocket_upgrade()
            if early:
                cast(RelayWebSocketProtocol, self.transport.get_protocol()).data_received(early)

    def _get_upgrade(self) -> bytes | None:
        """What the client asks to upgrade to: ``websocket`` where that is among it.

        Both headers are lists, in one line or several. A server may ignore them, and has to in HTTP/1.0; with a body,
        or another method than GET, it is no WebSocket that is asked for (RFC 9110, section 7.8; RFC 6455, section 4.1).
        """
        if b"upgrade" not in self._elements(b"connection"):
            return None
        if self.parser.get_http_version() != "1.1" or self.parser.get_method() != b"GET" or self._has_body():
            return None
        asked = self._elements(b"upgrade")
        return b"websocket" if b"websocket" in asked else b", ".join(asked)

    def _has_body(self) -> bool:
        lengths = self._elements(b"content-length")
        return any(length.strip(b"0") for length in lengths) or bool(self._elements(b"transfer-encoding"))

    def _elements(self, wanted: bytes) -> list[bytes]:
        """The elements of a header that is a list, in lower case."""
        values = b",".join(value for name, value in self.headers if name == wanted)
        return [element for each in values.lower().split(b",") if (element := each.strip(b" \t"))]

    def _take_absolute_target(self) -> None:
        """Make ``http://host/path`` the path, and ``host`` the ``Host``: RFC 9112, section 3.2.2."""
        scheme, found, rest = self.url.partition(b"://")
        if not found or scheme.lower() not in _SCHEMES:
            return
        end = min((at for mark in b"/?#" if (at := rest.find(mark)) >= 0), default=len(rest))
        host, target = rest[:end].rpartition(b"@")[2], rest[end:].partition(b"#")[0]
        self.url: bytes = target if target.startswith(b"/") else b"/" + target
        others = [header for header in self.headers if header[0] != b"host"]
        if len(self.headers) - len(others) <= 1:  # two of them are refused, whatever they say
            self.headers[:] = [(b"host", host), *others]

    def on_body(self, body: bytes) -> None:
        """Learn that what came was not a head."""
        self._is_body = True
        super().on_body(body)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; one behind a body (a trailer) is dropped: Uvicorn would keep any number of them."""
        if self._in_head and not self._is_replaying:
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        """Begin to wait for the whole of a head."""
        if not self._is_replaying:
            super().on_message_begin()
            self._await_head()

    def on_url(self, url: bytes) -> None:
        """Keep a part of the request's target."""
        if not self._is_replaying:
            super().on_url(url)

    def on_headers_complete(self) -> None:
        """Wait for the body, if there is one: the head is there."""
        if self._is_replaying:
            return
        self._stop_waiting()
        self._waited_since = self.loop.time()
        self._take_absolute_target()
        self._body_follows = bool(self.parser.should_upgrade()) and self._has_body()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The client waits for us now."""
        if not self._body_follows:
            self._waited_since = None
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        if cycle.scope["http_version"] == "1.1":  # else there are no chunks
            self._stream_writer = DirectWriter(self.transport)
            cast(dict[str, Any], cycle.scope)["extensions"] = {STREAM_EXTENSION: self._stream_writer}
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Begin to wait for a further head; Uvicorn's own timer ends with the first byte that comes, whatever it is."""
        self._end_writer()
        is_next_here = bool(self.pipeline)
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reader()
        elif self._upgrade is not None and not is_next_here:
            self._hand_over()
        elif not is_next_here:
            self._await_head(after_s=self.timeout_keep_alive)

    def _end_writer(self) -> None:
        if self._stream_writer is not None:
            self._stream_writer.end()
            self._stream_writer = None

    def drain(self) -> bool:
        """Tell the relay that the server ends and that it is to end its stream; False where there is none."""
        writer = self._stream_writer
        if writer is None or writer.on_shutdown is None:
            return False
        if self._answering is not None:
            self._answering.keep_alive = False
        writer.on_shutdown()
        return True

    def shutdown(self) -> None:
        """Let what is being answered end; a client that does not read its answer is not waited for."""
        super().shutdown()
        self.drain()
        server_loggers(self.config).flush(at_once=True)
        self._unread_s = min(_UNREAD_S, self._close_timeout_s)
        self._watch_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, once the client has its answer."""
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def pause_writing(self) -> None:
        """Begin to watch whether the client reads."""
        super().pause_writing()
        self._waited_since = self.loop.time()
        self._watch_reader()
        if self._stream_writer is not None:
            self._stream_writer.pause()

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        self._waited_since = None
        if not self.transport.is_closing():
            _cancel(self._watch)
        if self._stream_writer is not None:
            self._stream_writer.resume()

    def _watch_reader(self) -> None:
        """Cut the client off unless less is unread in a while; a close alone would wait for it without a limit."""
        _cancel(self._watch)
        unread_s = _UNREAD_S if self._unread_s is None else self._unread_s
        self._watch = self.loop.call_later(unread_s, self._look_at_reader, self.transport.get_write_buffer_size())

    def _look_at_reader(self, unread_bytes: int) -> None:
        now_unread = self.transport.get_write_buffer_size()
        if now_unread < unread_bytes:
            self._waited_since = self.loop.time()
            self._watch_reader()
        elif now_unread or self.transport.is_closing():
            self._cut("http: answer not read", "nothing of an answer was read for too long", at_once=True)
        elif self._unread_s is not None:  # the server ends, and the application has not answered yet
            self._watch_reader()

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over, and let go of it."""
        make = self.ws_protocol_class
        if isinstance(make, type) and issubclass(make, RelayWebSocketProtocol):
            self.connections.discard(self)
            protocol = make(config=self.config, server_state=self.server_state, app_state=self.app_state)
            protocol.connection_made(self.transport)
            protocol.upgrade(self.url, self.headers)
            self.transport.set_protocol(protocol)
        else:
            super().handle_websocket_upgrade()
        self._let_go()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer: the client is gone. Nothing more is written, and what waits is not answered."""
        self._end_writer()
        super().connection_lost(exc)
        self.pipeline.clear()
        # Uvicorn tells its newest request alone, and the one in work would write to a closed transport.
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        self._let_go()
        break_cycle(self.transport)

    def _let_go(self) -> None:
        """Stop the timers, and break the cycles, so that all is freed at once and not by a later collection.

        The parser refers to this protocol, and so do a timer and a request that is not answered yet.
        """
        self._stop_waiting()
        _cancel(self._watch)
        self._unset_keepalive_if_required()  # after a reset Uvicorn leaves it running
        self._cutter = self._watch = None
        self._answering = None
        vars(self).update(cycle=None, parser=None)  # Uvicorn's own, and typed as if they were never gone

    def _await_head(self, after_s: float = 0.0) -> None:
        self._stop_waiting()
        self._in_head = True
        self._head_bytes = 0
        self._waited_since = self.loop.time()
        if self._timeout_s:
            reason = f"no whole head within {self._timeout_s:g} s"
            self._cutter = self.loop.call_later(after_s + self._timeout_s, self._cut, "handshake: too slow", reason)

    def _stop_waiting(self) -> None:
        self._in_head = False
        self._waited_since = None
        _cancel(self._cutter)

    def _cut(self, kind: str, reason: str, at_once: bool = False) -> None:
        """Close the connection, and count and log it; at once where nothing more can be sent to the client."""
        self._stop_waiting()
        count_refusal(self.app_state, kind)
        warn(self.config, kind, "connection cut: %s", reason)
        if at_once:
            self.transport.abort()
        else:
            self.transport.close()
            self._watch_reader()


def _cancel(timer: TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
