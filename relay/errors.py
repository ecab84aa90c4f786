"""Every reason, status and close code the relay gives, in one place.

Owns the words a client or an operator can meet; must not know who says them.

Exceptions::

    RelayError
    ├── ConfigError        the settings do not make sense; the start is stopped
    ├── WireError          a client's frame cannot be decoded; carries the close code
    ├── AuthenticationError        a client has not proved who it is
    ├── SlowReader         a loop over a topic's events has lost some of them
    └── BusUnavailable     the broker did not take a message
"""

from enum import IntEnum, StrEnum


class Reason(StrEnum):
    """What an ``error`` reply or a ``phx_error`` says, as ``{"reason": …}``.

    The first three are Phoenix's own words (``lib/phoenix/socket.ex``).
    """

    UNMATCHED_TOPIC = "unmatched topic"
    TOO_MANY_TOPICS = "too many channels joined"
    JOIN_CRASHED = "join crashed"
    INVALID_TOPIC = "invalid topic"
    INVALID_EVENT = "invalid event"
    INVALID_PAYLOAD = "invalid payload"
    PAYLOAD_TOO_LARGE = "payload too large"
    INVALID_PRESENCE = "invalid presence"
    PUSH_NOT_ALLOWED = "push not allowed"
    UNAUTHORIZED = "unauthorized"
    INVALID_TOKEN = "invalid token"
    TOKEN_EXPIRED = "token expired"
    ANOTHER_USER = "token of another user"
    AUTH_UNAVAILABLE = "authentication unavailable"
    WEBHOOK_UNAVAILABLE = "webhook unavailable"
    REMOVED = "removed by the server"
    RATE_LIMITED = "rate limited"
    BUS_UNAVAILABLE = "bus unavailable"
    EVENTS_MISSED = "events may have been missed"
    INTERNAL = "internal error"


class NotRecovered(StrEnum):
    """Why a join could not be given all that the client missed, as ``reason`` beside ``"recovered": false``."""

    UNKNOWN = "unknown position"
    """No entry of this position: none at all, of another topic, from before a flush, or lost in a failover."""
    EXPIRED = "history expired"
    """Older than what the history keeps, in number or in time."""
    TOO_MANY = "too many events missed"
    """More than ``limits.recover_max_events`` or ``limits.recover_max_bytes``."""
    FORKED = "history forked"
    """A failover lost acknowledged events behind it."""
    UNAVAILABLE = "history unavailable"
    """The store cannot be read."""


IN_FLIGHT_FULL = "in flight full"
"""Why a push that waits for a handler goes no further, for the counter alone: its socket is closed with 1013."""

SUBSCRIPTION_ENDED = "subscription ended"
"""Why a push that had to wait goes no further, for the counter alone: its client has been notified of the end."""


CLOSE_REASON_MAX_BYTES = 123
"""RFC 6455, section 5.5: a control frame has at most 125 bytes, two of which are the close code."""


def close_reason(text: str) -> str:
    """Cut a text to what fits into a close frame, in bytes of UTF-8."""
    return text.encode()[:CLOSE_REASON_MAX_BYTES].decode(errors="ignore")


class CloseCode(IntEnum):
    """WebSocket close codes the relay sends (RFC 6455, section 7.4.1, and the IANA registry).

    1000 is not among them: it tells phoenix.js never to come back.
    """

    GOING_AWAY = 1001
    """Idle for too long, or disconnected by the operator."""
    PROTOCOL_ERROR = 1002
    """Bytes that are no WebSocket frame; sent by the server, before the relay sees any of it."""
    UNSUPPORTED = 1003
    """A frame of a kind this socket does not speak."""
    INVALID_PAYLOAD = 1007
    """Not UTF-8, not JSON, or not a message of the negotiated version."""
    POLICY_VIOLATION = 1008
    """Messages over the rate for long, no topic joined in time, or an expired token that was not renewed in time."""
    TOO_BIG = 1009
    """A frame over ``limits.frame_max_bytes``."""
    RESTART = 1012
    """The relay is shutting down; come back."""
    SLOW_READER = 1013
    """The socket's outbox is full and its topic's policy is ``disconnect``, or it is the largest of too many."""


DROPPED = (
    Reason.INVALID_EVENT,
    Reason.INVALID_PAYLOAD,
    Reason.PAYLOAD_TOO_LARGE,
    Reason.EVENTS_MISSED,
    Reason.BUS_UNAVAILABLE,
    "by a plugin",
    "channel names no event",
    "control message not sent",
    "control message not understood",
    "message names no event",
    "no envelope",
    "on_event handler too slow",
    "on_redis handler too slow",
    "outboxes full",
    "presence message not understood",
    "slow reader disconnected",
    "slow reader, drop-oldest",
    "slow reader, latest",
    "slow reader, recover",
    "socket closed",
)
"""Why events are not delivered: all reasons of ``relay_dropped_total``."""


class RelayError(Exception):
    """Base class of the exceptions of relay."""


class ConfigError(RelayError):
    """The settings are invalid.

    ``problems`` contains one sentence per problem: the source, the key, the expected and the actual value.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class WireError(RelayError):
    """A frame that cannot be decoded.

    ``code`` is the close code to answer with; ``str(error)`` says what was expected and what came, in
    at most 123 bytes, so that it fits a close frame (RFC 6455, section 5.5).
    """

    def __init__(self, code: CloseCode, text: str) -> None:
        self.code = code
        super().__init__(close_reason(text))


class AuthenticationError(RelayError):
    """A client has not proved who it is, or may not come in.

    ``status`` and ``kind`` are for a handshake: HTTP status, and a short word for the counter. ``reason`` is for a
    join or a renewal. ``str(error)`` says what is wrong, and never repeats a token.
    """

    def __init__(self, status: int, kind: str, text: str, reason: Reason = Reason.INVALID_TOKEN) -> None:
        self.status = status
        self.kind = kind
        self.reason = reason
        super().__init__(text)


class SlowReader(RelayError):
    """A loop over a topic's events was too slow, and the policy is to end it rather than to drop events."""


class BusUnavailable(RelayError):
    """The bus did not accept a message; ``str(error)`` gives the reason, without secrets."""
