"""What all transports have in common: an outbox, the two ways to write, and what becomes of a slow reader.

Owns a client's outbox and the choice between the two ways; must not know how frames are encoded, nor how a connection
begins and ends.

A frame is written straight to the server's transport where the server offers that (`DirectWriter`), else a task of the
transport's own sends it through ASGI. Under pressure both queue in the outbox.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import partial

from relay.brokers.base import Place
from relay.config_sections import LimitsConfig, Overflow, Policy
from relay.errors import CloseCode
from relay.log import RateLimitedLogger
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.transports.base import ReceiveCallable, Scope, TransportOwner, TransportServices
from relay.transports.outbox import Outbox
from relay.transports.writer import DirectWriter, cut


class QueuedTransport(ABC):
    """One client's connection as far as frames to it are concerned.

    Args: id: for the log.
          services: what it shares with the other transports of its node.
    """

    __slots__ = (
        "_close",
        "_drained",
        "_ended",
        "_limits",
        "_log",
        "_metrics",
        "_outbox",
        "_outboxes",
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

    def __init__(self, id: str, scope: Scope, services: TransportServices) -> None:
        self.id: str = id
        client = scope.get("client")
        self.address: str | None = client[0] if client else None
        self.query_string: bytes = scope.get("query_string", b"")
        self.owner: TransportOwner | None = None
        self._log: RateLimitedLogger = services.log
        self._limits: LimitsConfig = services.limits
        self._metrics: Metrics = services.metrics
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
        # Resolved once the outbox is empty, for a close that waits for it.
        self._drained: asyncio.Future[None] | None = None
        # The ASGI path's task, and what it waits for when it has nothing to do: an event's frame, or None to
        # look into the outbox. A frame that is handed over so is spared the queue; most are.
        self._writing: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[Frame | None] | None = None
        self._writer: DirectWriter | None = None

    @property
    def closed_with(self) -> int | None:
        """The code with which the relay has begun to close it; None while it has not."""
        return None if self._close is None else self._close[0]

    @abstractmethod
    def _encode(self, frame: Frame) -> bytes:
        """A frame as the direct writer takes it."""

    def _encode_control(self, frame: Frame) -> bytes:
        """The same for a frame that goes to this client alone, and need not wait."""
        return self._encode(frame)

    @abstractmethod
    def close(self, code: int, reason: str) -> bool:
        """Close after what is queued; see `relay.transports.base.Transport.close`."""

    def direct_write(self) -> Callable[[bytes], object] | None:
        """What writes frames to this client as they are, header included; None where they must be queued."""
        return self._writer.write if self._writer is not None and self._writer.ready else None

    def readiness_changed(self) -> None:
        """Learn from the server that `direct_write` returns something else than before."""
        if self.owner is not None:
            self.owner.readiness_changed()

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        """Write an event's frame, or queue it as its topic's policy says. Never blocks, never raises."""
        writer = self._writer
        if writer is not None and writer.ready:
            writer.write(self._encode(frame))
            return
        if self._close is not None or self._ended:
            self._metrics.dropped["socket closed"] += 1
            return
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(frame)
            return
        outbox = self._queue()
        dropped = outbox.add_event(frame, topic, event, policy)
        if dropped is None and frame.position is not None and policy.overflow is Overflow.RECOVER:
            # What waits may be of an earlier join of the topic, and younger.
            positions = filter(None, (outbox.drop_recoverable(topic), frame.position))
            if self.owner is not None:
                self.owner.fell_behind(topic, min(positions, key=Place.of))
            return
        if dropped is None:
            self._lose(outbox, "slow reader disconnected", Counter((policy.match,)))
            self._warn("slow", "closed with 1013: outbox full, the client reads too slowly for topic %r", topic)
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
            writer.write(self._encode_control(frame))
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
        self._warn("outboxes", "closed with 1013: all outboxes together are full, and this one is the largest")
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
    def held_bytes(self) -> int:
        """The same, and bytes that were written and are not with the kernel yet, where the server says it."""
        return self.queued_bytes + (0 if self._writer is None else self._writer.buffered_bytes())

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
            writer.write(self._encode(outbox.pop()))
        writer.set_ready(writer.open and not writer.paused and self._close is None)
        if not outbox:
            resolve(self._drained)

    async def drained(self) -> None:
        """Return once nothing waits and the connection takes more; or it is being closed, or has ended."""
        while not self._ended and self._close is None and self._is_full():
            if self._drained is None or self._drained.done():
                self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait((self._drained,))

    def _is_full(self) -> bool:
        if self._writer is None:
            return bool(self._outbox) or self._is_sending()
        # One that is not open takes nothing more: its end is about to be noticed.
        return not self._writer.open or bool(self._outbox) or self._writer.paused

    def reject(self, code: CloseCode, reason: str) -> None:
        """Count a frame that cannot be understood, and close."""
        self._metrics.malformed[str(int(code))] += 1
        self._warn("malformed", "closed with %d: %s", code, reason)
        self.close(code, reason)

    def _warn(self, kind: str, text: str, *args: object) -> None:
        self._log.warning(kind, f"socket %s: {text}", self.id, *args, socket=self.id)

    async def _send_rest(self) -> None:
        """Return once what is queued is with the connection."""
        while self._outbox or self._is_sending():
            self._drained = asyncio.get_running_loop().create_future()
            self._wake_writer()
            await self._drained

    def _abort(self, receive: ReceiveCallable) -> None:
        """Cut the connection, where the server lets us: what the client has not read would keep it open without end.

        ASGI has no word for it. Uvicorn hands over a method of its own protocol class, which has the transport.
        """
        if self._writer is not None:
            self._metrics.cut_off_bytes += self._writer.buffered_bytes()
            self._writer.abort()
        elif (abort := abort_of(receive)) is not None:
            abort()

    def _is_sending(self) -> bool:
        """Whether the ASGI path has a frame under way."""
        return self._writing is not None and not self._writing.done() and (self._wake is None or self._wake.done())

    def end(self) -> None:
        """Release the connection; called once by its reader, when nothing more can be received."""
        self._ended = True
        resolve(self._drained)
        wake = self._wake
        if wake is not None and wake.done() and not wake.cancelled() and wake.result() is not None:
            self._metrics.dropped["socket closed"] += 1
        if self._outbox:
            self._lose(self._outbox, "socket closed")
        if self._writing is not None:
            self._writing.cancel()
        if self._writer is not None:
            self._writer.owner = None
        # What refers back to this connection: without a cycle it is freed at once, and not by a later collection.
        self.owner = None
        if self._outbox is not None:
            self._outbox.evict = _nothing
        self._writing = self._wake = None


def abort_of(receive: ReceiveCallable) -> Callable[[], object] | None:
    """What cuts a connection of Uvicorn's; None on other servers, and behind middleware that wraps ``receive``."""
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    abort = getattr(transport, "abort", None)
    return None if abort is None else partial(cut, abort)


def size_of(frame: str | bytes) -> int:
    """Bytes of a frame, of text in UTF-8."""
    if isinstance(frame, bytes) or frame.isascii():
        return len(frame)
    return len(frame.encode(errors="surrogatepass"))


def resolve(future: asyncio.Future[None] | None) -> None:
    """Wake the task that waits for ``future``, if there is one."""
    if future is not None and not future.done():
        future.set_result(None)


def _nothing() -> None:
    """The callback `evict` of a closed socket's outbox, which does nothing."""
