"""Control messages between nodes: disconnect or kick a user.

Owns the format of these messages on the bus, and which decisions they overtake; must not know how they travel or who
carries them out. One is a JSON object::

    {"do": "disconnect", "user": "alice", "reason": "banned", "sender": "6f1c2a9e"}
    {"do": "kick", "user": "alice", "topic": "room:1", "sender": "6f1c2a9e"}
"""

from typing import Literal

import msgspec


class ControlMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One control message. The node ``sender`` has applied it already to its own sockets."""

    action: Literal["disconnect", "kick"] = msgspec.field(name="do")
    user: str
    sender: str
    topic: str = ""
    reason: str = ""


_decode = msgspec.json.Decoder(ControlMessage).decode


def encode(message: ControlMessage) -> bytes:
    """Encode a control message."""
    return msgspec.json.encode(message)


def decode(data: bytes) -> ControlMessage | None:
    """Decode a control message; None where it is invalid, or of a kind that this version does not know."""
    try:
        message = _decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    return None if not message.user or (message.action == "kick" and not message.topic) else message
