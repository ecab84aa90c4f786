"""The life of sockets in the log: a line when one connects, is refused a join, asks for too much, disconnects.

Owns the words of these lines; must not know what led to them. Of each kind there are at most `LINES_MAX` in
`INTERVAL_S`, so that a storm of clients does not fill a disk.
"""

from typing import NamedTuple

from relay.logs import RateLimitedLoggers, Subject

LINES_MAX = 200
INTERVAL_S = 10.0
"""So many lines of one kind in so many seconds; then one says how many were suppressed."""


class Totals(NamedTuple):
    """What a socket did until its end."""

    open_s: float
    joins: int
    """Joins that were accepted."""
    pushes: int
    """Pushes that it sent, refused ones included."""
    events: int
    """Events of its topics while it had joined them."""
    dropped: int
    """Of these, events that it missed because it read too slowly."""


class ConnectionLog:
    """Writes these lines, all under one logger, ``relay.socket``."""

    def __init__(self, loggers: RateLimitedLoggers) -> None:
        self._log = loggers.get("relay.socket", INTERVAL_S, LINES_MAX)

    def connected(self, socket: Subject) -> None:
        """A handshake was accepted."""
        self._log.info("connect", socket, "connected")

    def join_refused(self, socket: Subject, topic: str, reason: str) -> None:
        """A join was answered with an error."""
        text = "join of %.255r refused: %.255s"
        self._log.info("join refused", socket, text, topic, _line(reason), topic=topic[:255], reason=reason[:255])

    def rate_limited(self, socket: Subject, topic: str, event: str) -> None:
        """A message over the rate was turned away."""
        text = "rate limited: %.255r on %.255r"
        self._log.info("rate limited", socket, text, event, topic, topic=topic[:255])

    def disconnected(self, socket: Subject, code: int | None, reason: str, by: str, totals: Totals) -> None:
        """A socket has ended.

        Args: code: of the close; None where there was none.
              by: "client" or "relay".
        """
        self._log.info(
            "disconnect",
            socket,
            "disconnected by the %s, code %s %.123r, after %.1f s; %d joins, %d pushes, %d events, %d of them dropped",
            by,
            code,
            reason,
            *totals,
            code=code,
            reason=reason[:123],
            by=by,
            open_s=round(totals.open_s, 3),
            joins=totals.joins,
            pushes=totals.pushes,
            events=totals.events,
            dropped=totals.dropped,
        )


def _line(text: str) -> str:
    """Without line breaks: a plugin's own words may have some."""
    return " ".join(text.split())
