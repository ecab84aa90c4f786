"""Our Uvicorn protocol class for HTTP: bounds what a client may hold that sends no request, or reads no answer.

Owns what is particular to Uvicorn's httptools protocol; must not know what is asked for. ``relay serve`` uses it by
itself, a team's own server by one line::

    uvicorn.run(app, http="relay.server_http:RelayHTTPProtocol", ws="relay.server:RelayWebSocketProtocol")

Uvicorn gives a client all the time it wants, and any number of bytes and requests: a few thousand that send a byte a
minute (slowloris) would take all of a process's files, and a hundred that ask and never read 8 MB each.
"""

import logging
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from relay.descriptors import descriptors
from relay.logs import Throttle
from relay.metrics import count_refusal
from relay.server import break_cycle

HEAD_MAX_BYTES = 65_536
"""Largest head of a request: its first line and its headers."""

_RESERVE = 32
"""File descriptors kept free: the link to Redis needs one to come back, and so does whoever looks into ``/ready``."""

_PIPELINE_MAX = 16
"""Requests that may wait for the answer to the one before them; browsers send none so."""

_PIECE_BYTES = 4096
"""Bytes parsed at a time: a read brings up to 256 kB, in which there is room for 14 000 requests."""

_UNREAD_S = 60.0
"""Seconds in which a client must read something of what waits for it, or it is cut off; nginx's default too."""

_PATIENCE_S = 1.0
"""Seconds that a client may be waited for even while file descriptors are scarce."""

_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

_throttle = Throttle(logging.getLogger("relay.server"))


class RelayHTTPProtocol(HttpToolsProtocol):
    """Uvicorn's own class, with bounds: for the head of a request in time and in bytes, for requests that wait, and
    for the time in which an answer is not read.

    Args: handshake_timeout_s: seconds for the head to arrive, from the connection or the request's first byte on; 0:
              no bound.
    """

    def __init__(self, *args: Any, handshake_timeout_s: float = 10.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timeout_s = handshake_timeout_s
        # While a head is awaited: what cuts the connection, and the bytes that came.
        self._cutter: TimerHandle | None = None
        self._in_head = True
        # Bytes since the connection began, or the last that were of a body: a head, or trailers.
        self._head_bytes = 0
        self._is_body = False
        # What is being answered: not `cycle`, which is the newest request, where several have come.
        self._answering: RequestResponseCycle | None = None
        # Since when the client is waited for, in seconds of the loop's clock; None while it waits for us.
        self._waited_since: float | None = None
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
        for start in range(0, len(data), _PIECE_BYTES):
            self._parse(data[start : start + _PIECE_BYTES])
            if self.transport.is_closing() or self.transport.get_protocol() is not self:  # closed, or upgraded
                return

    def _parse(self, data: bytes) -> None:
        self._is_body = False
        super().data_received(data)
        if self.transport.get_protocol() is not self:
            return
        self._head_bytes = 0 if self._is_body else self._head_bytes + len(data)
        if self.transport.is_closing():  # Uvicorn has answered 400
            self._watch_reader()
        elif self._head_bytes > HEAD_MAX_BYTES:
            self._cut("handshake: head too large", f"more than {HEAD_MAX_BYTES} bytes of head, or behind a body")
        elif len(self.pipeline) > _PIPELINE_MAX:
            reason = f"more than {_PIPELINE_MAX} requests at once"
            self._cut("http: too many requests", reason, at_once=True)

    def on_body(self, body: bytes) -> None:
        """Learn that what came was not a head."""
        self._is_body = True
        super().on_body(body)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; one behind a body (a trailer) is nobody's, and Uvicorn would keep any number of them."""
        if self._in_head:
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        """Begin to wait for the whole of a head."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """Wait for the body, if there is one: the head is there."""
        self._stop_waiting()
        self._waited_since = self.loop.time()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The client waits for us now."""
        self._waited_since = None
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """Begin to wait for a further head; Uvicorn's own timer ends with the first byte that comes, whatever it is."""
        is_next_here = bool(self.pipeline)
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_reader()
        elif not is_next_here:
            self._await_head(after_s=self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, once the client has its answer."""
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def pause_writing(self) -> None:
        """Begin to watch whether the client reads."""
        super().pause_writing()
        self._waited_since = self.loop.time()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        self._waited_since = None
        if not self.transport.is_closing():
            _cancel(self._watch)

    def _watch_reader(self) -> None:
        """Cut the client off unless less is unread in a while; a close alone would wait for it for ever."""
        _cancel(self._watch)
        self._watch = self.loop.call_later(_UNREAD_S, self._look_at_reader, self.transport.get_write_buffer_size())

    def _look_at_reader(self, unread_bytes: int) -> None:
        if self.transport.get_write_buffer_size() < unread_bytes:
            self._waited_since = self.loop.time()
            self._watch_reader()
        else:
            self._cut("http: answer not read", f"nothing of an answer was read in {_UNREAD_S:g} s", at_once=True)

    def handle_websocket_upgrade(self) -> None:
        """Hand the connection over, and let go of it."""
        super().handle_websocket_upgrade()
        self._let_go()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer: the client is gone. Nothing more is written, and what waits is not answered."""
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
        self.cycle = None  # type: ignore[assignment]
        self.parser = None  # type: ignore[assignment]

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
        """Close the connection, and count and log it; at once where nothing more can be told to the client."""
        self._stop_waiting()
        count_refusal(self.app_state, kind)
        _throttle.warning(kind, "connection cut: %s", reason)
        if at_once:
            self.transport.abort()
        else:
            self.transport.close()
            self._watch_reader()


def _cancel(timer: TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
