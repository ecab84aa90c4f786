"""The way past ASGI's ``send``: what a server offers a socket that wants to write ready frames.

Owns the interface between `relay.server` and `relay.transport`, which do not know each other. A server
offers it as ``scope["extensions"]["relay.frames"]``; where it is absent, the portable path serves.
"""

from asyncio import Transport
from collections.abc import Callable

EXTENSION = "relay.frames"


class FrameWriter:
    """Writes frames of one socket, header included, straight to its transport.

    ``ready`` is the socket's: it says that the next frame may be written without queueing. The server only
    takes it away, when the transport's buffer is full or the socket is closing.
    """

    __slots__ = ("abort", "last_ping", "on_resume", "open", "paused", "ready", "write")

    def __init__(self, transport: Transport) -> None:
        self.write: Callable[[bytes], object] = transport.write
        """Write one frame. Never blocks; where that fills the buffer, ``paused`` is set on return."""
        self.abort: Callable[[], object] = transport.abort
        """Cut the connection at once; what is buffered is lost."""
        self.open: bool = True
        self.paused: bool = False
        self.ready: bool = False
        self.last_ping: float = 0.0
        """When the client last sent a WebSocket ping, in monotonic seconds; 0 for never."""
        self.on_resume: Callable[[], None] | None = None
        """Called when the buffer has drained after ``paused``."""

    def pause(self) -> None:
        """The transport's buffer is full."""
        self.paused = True
        self.ready = False

    def resume(self) -> None:
        """The transport's buffer has drained."""
        self.paused = False
        if self.open and self.on_resume is not None:
            self.on_resume()

    def end(self) -> None:
        """Take the socket out of use: nothing may follow a close frame."""
        self.open = self.ready = False
