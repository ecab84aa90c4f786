"""Our Uvicorn protocol class for HTTP: cuts off a client that does not send the head of its request in time, and
refuses who comes while file descriptors are scarce.

Owns what is particular to Uvicorn's httptools protocol; must not know what is asked for. ``relay serve`` uses it by
itself, a team's own server by one line::

    uvicorn.run(app, http="relay.server_http:RelayHTTPProtocol", ws="relay.server:RelayWebSocketProtocol")

Uvicorn gives a client all the time it wants, and any number of bytes: a few thousand that send a byte a minute
(slowloris) would take all of a process's files.
"""

import logging
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from relay.descriptors import descriptors
from relay.logs import Throttle
from relay.metrics import count_refusal

HEAD_MAX_BYTES = 65_536
"""Largest head of a request: its first line and its headers."""

_RESERVE = 32
"""File descriptors kept free: the link to Redis needs one to come back, and so does whoever looks into ``/ready``."""

_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

_throttle = Throttle(logging.getLogger("relay.server"))


class RelayHTTPProtocol(HttpToolsProtocol):
    """Uvicorn's own class, with a bound for the head of a request: in time, and in bytes.

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

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        # The kernel gives the lowest free number, so the number tells how many are taken.
        taken, most = transport.get_extra_info("socket").fileno(), descriptors()
        if taken >= most - min(_RESERVE, most // 4):
            transport.write(_REFUSAL)
            self._cut("file descriptors", f"{taken} of {most} file descriptors are taken")
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read on, unless the head, or what follows the body, has grown too large."""
        self._is_body = False
        super().data_received(data)
        self._head_bytes = 0 if self._is_body else self._head_bytes + len(data)
        if self._head_bytes > HEAD_MAX_BYTES and not self.transport.is_closing():
            self._cut("handshake: head too large", f"more than {HEAD_MAX_BYTES} bytes of head, or behind a body")

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
        """Wait no longer: the head is there."""
        self._stop_waiting()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Begin to wait for a further head; Uvicorn's own timer ends with the first byte that comes, whatever it is."""
        is_next_here = bool(self.pipeline)
        super().on_response_complete()
        if not is_next_here and not self.transport.is_closing():
            self._await_head(after_s=self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer: the client is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_head(self, after_s: float = 0.0) -> None:
        self._stop_waiting()
        self._in_head = True
        self._head_bytes = 0
        if self._timeout_s:
            reason = f"no whole head within {self._timeout_s:g} s"
            self._cutter = self.loop.call_later(after_s + self._timeout_s, self._cut, "handshake: too slow", reason)

    def _stop_waiting(self) -> None:
        self._in_head = False
        if self._cutter is not None:
            self._cutter.cancel()
            self._cutter = None

    def _cut(self, kind: str, reason: str) -> None:
        self._stop_waiting()
        count_refusal(self.app_state, kind)
        _throttle.warning(kind, "connection cut: %s", reason)
        self.transport.close()
