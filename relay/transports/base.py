"""`Transport`: what a socket asks of the connection to its client, whichever way that works.

Owns the interface and the types of ASGI; must not know any one transport.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from relay.config_sections import LimitsConfig, Policy
from relay.errors import CloseCode
from relay.log import RateLimitedLogger
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.transports.outbox import OutboxBudget

Scope: TypeAlias = MutableMapping[str, Any]
ReceiveCallable: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
SendCallable: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class TransportServices:
    """What all transports of a node share."""

    limits: LimitsConfig
    metrics: Metrics
    log: RateLimitedLogger
    """For warnings about one of them."""
    outboxes: OutboxBudget | None = None
    """What their outboxes are counted in."""
    compression: bool = False
    """Whether frames of events are compressed for a client that negotiated it."""


class TransportOwner(Protocol):
    """The socket that a transport belongs to, as the transport knows it."""

    def readiness_changed(self) -> None:
        """Learn that `Transport.direct_write` returns something else than before."""

    def close_started(self) -> None:
        """Learn that the relay has begun to close the transport."""

    def fell_behind(self, topic: str, position: str) -> None:
        """Learn that events of a topic, from this position on, were dropped, since they are in its history."""

    @property
    def dropped_notice(self) -> Callable[[str, int], Frame]:
        """Makes the frame that tells the client how many events of a topic were dropped."""


class Transport(Protocol):
    """One client's connection: frames in, frames out. Used by one task, which reads from it and ends it."""

    id: str
    """Unique among all sockets of all nodes."""
    address: str | None
    """The client's address, as the server reports it."""
    query_string: bytes
    """The query of the request that opened it."""
    owner: TransportOwner | None
    last_received: float
    """When the client last sent a message, in monotonic seconds."""
    last_size: int
    """Bytes of that message, of text in UTF-8."""

    async def receive(self) -> str | bytes | None:
        """The next frame, ``str`` for text, ``bytes`` for binary; None once the connection has ended."""

    def send_control(self, frame: Frame) -> None:
        """Write a reply, a close or an error; never dropped, whatever the back-pressure."""

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        """Write an event's frame, or queue it as its topic's policy says. Never blocks, never raises."""

    def direct_write(self) -> Callable[[bytes], object] | None:
        """What writes frames to this client as they are, WebSocket header included; None where they must be queued."""

    @property
    def deflates(self) -> bool:
        """Whether `direct_write` takes `Frame.ws_frame_compressed`; else it takes `Frame.ws_frame`."""

    @property
    def write_mode(self) -> str:
        """How frames are written: ``direct`` to the server's transport, or through ASGI."""

    async def drained(self) -> None:
        """Return once nothing waits and the connection takes more; or it is being closed, or has ended."""

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait in its outbox."""

    @property
    def held_bytes(self) -> int:
        """The same, and bytes that were written and are not with the kernel yet, where the server says it."""

    @property
    def dropped(self) -> int:
        """Events that were dropped from its outbox since it opened."""

    def settle_dropped(self, topic: str, notice: Callable[[str, int], Frame]) -> None:
        """Queue the notice of dropped events of ``topic``, whose subscription ends."""

    def idle_s(self, now: float) -> float:
        """Seconds since the client's last message or ping, at the monotonic time ``now``."""

    def reject(self, code: CloseCode, reason: str) -> None:
        """Count a frame that cannot be understood, and close."""

    def evict(self, kind: str, reason: str) -> None:
        """Close with 1013, because the relay holds too much for this client."""

    def close(self, code: int, reason: str) -> bool:
        """Close after what is queued, with a reason of at most 123 bytes; False where it was closed already."""

    @property
    def closed_with(self) -> int | None:
        """The code with which the relay has begun to close it; None while it has not."""

    def is_own_cancellation(self) -> bool:
        """Say whether a cancellation of the reading task comes from here: the client did not answer a close."""

    @property
    def ending(self) -> tuple[int | None, str, str]:
        """Close code, reason, and who closed: ``relay`` or ``client``. For one that has ended."""

    def end(self) -> None:
        """Release the connection; called once by its reader, when nothing more can be received."""
