"""What nodes say to each other about their members, as JSON on the Redis channel ``relay:presence``.

Must not know when it is sent, nor what follows from it.
"""

from collections.abc import Callable

import msgspec

from relay.protocol.presence import Difference


class Change(msgspec.Struct, array_like=True):
    """What has changed among a node's members in one topic."""

    topic: str
    joins: list[tuple[str, str, msgspec.Raw, str]]
    """Ref, key, what is said of the member, and the ref that this one replaces."""
    leaves: list[str]
    """Refs."""


class Message(msgspec.Struct, omit_defaults=True):
    """What a node says to the others."""

    node: str
    number: int
    changes: list[Change] = []
    digests: dict[str, tuple[int, int]] = {}
    """Number of members and digest of their refs, of topics that have changed since the last sign of life."""
    is_last: bool = False
    """Whether the node is about to end."""


encode: Callable[[Message], bytes] = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Message).decode


def decode(data: bytes) -> Message | None:
    """Decode a message; None where it cannot be read."""
    try:
        return _decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None


def packed(name: str, change: Difference) -> Change:
    """A difference in the form in which it is sent."""
    joins = [(each.ref, each.key, msgspec.Raw(each.meta), each.previous) for each in change.joins.values()]
    return Change(name, joins, list(change.leaves))
