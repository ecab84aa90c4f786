"""What nodes say to each other about their members, as JSON on the Redis channel ``relay:presence``.

Must not know when it is sent, nor what follows from it.
"""

from collections.abc import Callable

import msgspec

from relay.protocol.presence import Difference, split

_PORTION = 5000
"""Members in one message at most. All of a node are announced again when Redis has lost them."""


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


def take_portion(outgoing: dict[str, Difference]) -> dict[str, Difference]:
    """Take what is sent next: no more than Redis takes at once, and than a subscriber's buffer there has room for."""
    portion: dict[str, Difference] = {}
    left = _PORTION
    while outgoing and left > 0:
        name, change = next(iter(outgoing.items()))
        del outgoing[name]
        portion[name], rest = split(change, left)
        left -= len(portion[name].joins) + len(portion[name].leaves)
        if rest:
            outgoing[name] = rest
    return portion
