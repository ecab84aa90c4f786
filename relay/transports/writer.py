"""The way past ASGI's ``send``: what a server offers a socket that wants to write ready frames.

Owns the interface between the server's protocol classes and the transports, which do not know each other. A server
offers it as ``scope["extensions"]["relay.frames"]`` to WebSockets, and as ``["relay.stream"]`` to HTTP/1.1 requests,
where what is written has to be chunks of a response that has begun; where it is absent, the ASGI path serves.
"""

from asyncio import Transport
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

EXTENSION = "relay.frames"
STREAM_EXTENSION = "relay.stream"


class WriterOwner(Protocol):
    """The socket whose frames are written."""

    def flush(self) -> None:
        """Write what waits: the buffer has drained."""

    def readiness_changed(self) -> None:
        """Learn that ``ready`` is another than before."""


def cut(abort: Callable[[], object]) -> None:
    """Call the ``abort`` of a transport, whose connection may be lost already."""
    # Until 3.14 at least, asyncio's selector transport raises where it lost its connection after the last write of a
    # close: it has let go of its loop by then. Source: CPython, asyncio/selector_events.py, _write_ready.
    with suppress(AttributeError):
        abort()


class DirectWriter:
    """Writes frames of one socket, header included, straight to its transport.

    Args: deflates: whether the client takes frames compressed by `relay.protocol.frame.Frame.deflated`.

    ``ready`` says that the next frame may be written without queueing. The socket's owner gives it; the server only
    takes it away, when the transport's buffer is full or the socket is closing.
    """

    __slots__ = (
        "_transport",
        "close_timeout_s",
        "deflates",
        "last_ping",
        "on_shutdown",
        "open",
        "owner",
        "paused",
        "ready",
        "write",
    )

    def __init__(self, transport: Transport, deflates: bool = False) -> None:
        self.write: Callable[[bytes], object] = transport.write
        """Write one frame, or several. Never blocks; where that fills the buffer, ``paused`` is set on return."""
        self._transport = transport
        self.close_timeout_s: float = 5.0
        """Seconds from the end of the socket to that of its connection; then it is cut."""
        self.deflates: bool = deflates
        self.open: bool = True
        self.paused: bool = False
        self.ready: bool = False
        self.last_ping: float = 0.0
        """When the client last sent a WebSocket ping, in monotonic seconds; 0 for never."""
        self.on_shutdown: Callable[[], object] | None = None
        """Called when the server ends; the callee closes the socket in its own time."""
        self.owner: WriterOwner | None = None

    def writes_for(self, send: Any) -> bool:
        """Say whether ``send`` is the server's own: what middleware around it does to a response cannot be skipped."""
        return getattr(getattr(send, "__self__", None), "transport", None) is self._transport

    def abort(self) -> None:
        """Cut the connection at once; what is buffered is lost."""
        cut(self._transport.abort)

    def buffered_bytes(self) -> int:
        """How many bytes were written and are not with the kernel yet."""
        return self._transport.get_write_buffer_size()

    def set_ready(self, ready: bool) -> None:
        """Say whether the next frame may be written at once; the owner learns of a change."""
        if ready is not self.ready:
            self.ready = ready
            if self.owner is not None:
                self.owner.readiness_changed()

    def pause(self) -> None:
        """The transport's buffer is full."""
        self.paused = True
        self.set_ready(False)

    def resume(self) -> None:
        """The transport's buffer has drained."""
        self.paused = False
        if self.open and self.owner is not None:
            self.owner.flush()

    def end(self) -> None:
        """Take the socket out of use: nothing may follow a close frame."""
        self.open = False
        self.set_ready(False)
