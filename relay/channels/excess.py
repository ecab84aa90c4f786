"""What becomes of a socket's message over its rate.

Owns the answer and its counting; must not know the clock, nor what the message asks for.
"""

from relay.errors import CloseCode, Reason
from relay.journal import ConnectionLog
from relay.logs import Subject
from relay.metrics import Metrics
from relay.protocol.serializer import Message
from relay.protocol.state import ChannelsProtocol
from relay.rate_limit import MessageRateLimiter
from relay.transports.websocket import WebSocketTransport


def turn_away(
    pace: MessageRateLimiter,
    protocol: ChannelsProtocol,
    connection: WebSocketTransport,
    metrics: Metrics,
    journal: ConnectionLog,
    socket: Subject,
    message: Message,
) -> bool:
    """Refuse a message over the rate, or close the socket; False where it has to be dealt with all the same."""
    if pace.is_exhausted:
        metrics.refused["rate limited for long"] += 1
        connection.close(CloseCode.POLICY_VIOLATION, "rate limited for long: this client asks for too much")
        return True
    refusal = protocol.refuse_unheard(message, Reason.RATE_LIMITED)
    if refusal is not None:
        metrics.refused[Reason.RATE_LIMITED] += 1
        journal.rate_limited(socket, message.topic, message.event)
        if message.ref is not None:  # else it asks for no answer
            connection.send_control(refusal.frame)
    return refusal is not None
