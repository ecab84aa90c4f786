"""Writing one frame to many sockets in C, where that was built: it costs a system call for each, and little more.

Owns which sockets may be written to past their transport, and what becomes of what they do not take; must not know
topics nor frames.

What a transport's `write` costs besides the system call is mostly its objects, which have left the processor's caches.
Here a transport is only asked for its descriptor and for what it holds back, just before the write: no descriptor is
kept, so none is written to that has been closed and belongs to another connection meanwhile.
"""

from asyncio import Transport
from asyncio.trsock import TransportSocket
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

Write: TypeAlias = Callable[[bytes], object]

_SendToEach: TypeAlias = Callable[
    [tuple[Transport, ...], tuple[TransportSocket, ...], int, int, bytes], list[tuple[int, int]] | None
]

send_to_each: _SendToEach | None
try:
    from relay.transports import speedups
except ImportError:  # not built: see hatch_build.py
    send_to_each = None
else:
    send_to_each = speedups.send_to_each

BATCH = 32
"""Sockets of one call, which nothing interrupts."""

_FEWEST = 2
"""Sockets that are worth a call."""

_PLAIN = frozenset(
    {
        ("asyncio.selector_events", "_SelectorSocketTransport"),
        ("uvloop.loop", "TCPTransport"),
        ("uvloop.loop", "UnixTransport"),
    }
)
"""Transports whose `write` sends bytes as they are; those of TLS are others."""


class PlainSockets:
    """Sockets without TLS that take the same bytes.

    Bytes go to the kernel where nothing waits in the transport before them. What the kernel does not take, whatever the
    reason, is left to the transport, which buffers it, pauses its protocol, or finds the connection lost.
    """

    __slots__ = ("_sockets", "_transports")

    def __init__(self, transports: tuple[Transport, ...], sockets: tuple[TransportSocket, ...]) -> None:
        self._transports = transports
        self._sockets = sockets

    @classmethod
    def of(cls, writes: Sequence[Write]) -> "PlainSockets | None":
        """The sockets behind transports' ``write`` methods; None where they have to be written to one by one."""
        if send_to_each is None or len(writes) < _FEWEST:
            return None
        transports: tuple[Any, ...] = tuple([getattr(write, "__self__", None) for write in writes])
        if not _PLAIN.issuperset({(type(each).__module__, type(each).__qualname__) for each in transports}):
            return None
        sockets = tuple([each.get_extra_info("socket") for each in transports])
        return None if None in sockets else cls(transports, sockets)

    def write(self, data: bytes, start: int, stop: int) -> None:
        """Write to those from ``start`` to before ``stop``, `BATCH` at most. Never blocks."""
        assert send_to_each is not None, "else there is no instance"
        left = send_to_each(self._transports, self._sockets, start, stop, data)
        if left is None:
            return
        fault: Exception | None = None
        for place, taken in left:
            try:
                self._transports[place].write(data[taken:])
            except Exception as error:  # the others have to get the rest of what they have begun to receive
                fault = error
        if fault is not None:
            raise fault


def form(enabled: bool) -> Literal["c", "python"]:
    """What the loop of a fan-out is written in."""
    return "c" if enabled and send_to_each is not None else "python"
