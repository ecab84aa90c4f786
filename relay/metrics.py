"""Counters of one relay process, and the words to read them by.

Owns the numbers; must not know how they are shown. Every drop, refusal and gap is counted here: a loss
that is not counted is a bug.
"""

from collections import Counter
from dataclasses import dataclass, field

REFUSED_STATE = "relay.refused"
"""Where a server finds `Metrics.refused` in the lifespan's state, for what it refuses by itself."""


@dataclass(slots=True)
class Metrics:
    """Totals since the process started, unless a field says otherwise. Hot paths add to the fields directly."""

    events_in: int = 0
    """Events received from the broker."""
    events_unheard: int = 0
    """Of those, events on topics nobody here has joined."""
    deliveries: int = 0
    """Frames of events written, or queued, for a socket."""
    pushes_in: int = 0
    """Pushes received from clients."""
    pushes_out: int = 0
    """Of those, pushes the broker has taken."""
    joins: int = 0
    """Joins accepted."""
    sockets: int = 0
    """Sockets open now."""
    sockets_opened: int = 0
    """Sockets ever opened."""
    outbox_bytes: int = 0
    """Bytes waiting in the outboxes of all sockets now."""
    gaps: int = 0
    """Times the broker's link was interrupted, so that events may have been missed."""
    rejoins_asked: int = 0
    """Subscriptions told by ``phx_error`` to rejoin after a gap."""
    sent_away: int = 0
    """Sockets and subscriptions ended because their user was disconnected or kicked."""
    drained: int = 0
    """Sockets closed with 1012 because the relay was ending."""
    stalls: int = 0
    """Times the event loop stood still for more than half a second: something in this process blocks it."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Events not delivered, by reason."""
    dropped_topics: Counter[str] = field(default_factory=Counter)
    """Of those, events that slow readers missed, by the pattern in ``[[topics]]`` that their topic matches."""
    refused: Counter[str] = field(default_factory=Counter)
    """Handshakes, joins and pushes refused, by reason."""
    plugin_calls: Counter[str] = field(default_factory=Counter)
    """Handlers called, by plugin."""
    plugin_errors: Counter[str] = field(default_factory=Counter)
    """Handlers that raised or did not end in time, by plugin."""
    malformed: Counter[str] = field(default_factory=Counter)
    """Frames from clients that could not be understood, by close code."""

    def totals(self) -> dict[str, int | dict[str, int]]:
        """All counters by name, reasons as nested objects; what ``/health`` shows."""
        return {
            name: dict(value) if isinstance(value, Counter) else value
            for name in self.__slots__
            if (value := getattr(self, name)) is not None
        }
