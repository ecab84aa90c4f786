"""Subscribers of a topic in groups, each of which takes the same bytes in the same way.

Owns what the hub asks of a subscriber; must not know topics.
"""

from collections.abc import Callable, Container, Iterable
from typing import NamedTuple, Protocol

from relay.config_sections import Policy
from relay.errors import Reason
from relay.protocol.frame import Frame
from relay.protocol.serializer import Version
from relay.protocol.state import Subscription
from relay.transports.plain_sockets import PlainSockets, Write


class Subscriber(Protocol):
    """What the hub holds: one socket's outbox, under a topic."""

    version: Version

    @property
    def deflates(self) -> bool:
        """Whether `direct_write` takes `Frame.deflated`; else it takes `Frame.wire`."""

    def direct_write(self) -> Callable[[bytes], object] | None:
        """What writes frames to this socket as they are; None where they must go through `send_event`.

        When the answer changes, `Hub.refresh` must be called.
        """

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        """Write an event's frame, or queue it. Never blocks, never raises."""

    def subscription(self, topic: str) -> Subscription | None:
        """What this socket has joined under ``topic``."""

    def end_subscription(self, subscription: Subscription, reason: Reason) -> bool:
        """End a subscription with ``phx_error``, so that the client rejoins; False where it has ended already."""


class Group(NamedTuple):
    """Subscribers of a topic that take the same bytes, in the same way."""

    members: tuple[Subscriber, ...]
    writes: tuple[Write, ...] | None
    """Of each member, its `direct_write`; None where they go through `send_event`."""
    version: Version
    deflates: bool
    positioned: bool
    """Whether they have asked for positions."""
    sockets: PlainSockets | None
    """What is behind `writes`, where that can be written to all at once."""


def make_groups(
    subscribers: Iterable[Subscriber], positioned: Container[Subscriber], speedups: bool
) -> tuple[Group, ...]:
    """Sort subscribers into groups, in the order in which they come.

    Args: positioned: those that have asked for positions.
          speedups: whether plain sockets are written to in C, where that was built.
    """
    found: dict[tuple[Version, bool, bool, bool], list[tuple[Subscriber, Write | None]]] = {}
    for subscriber in subscribers:
        write = subscriber.direct_write()
        key = (subscriber.version, subscriber.deflates, write is not None, subscriber in positioned)
        found.setdefault(key, []).append((subscriber, write))
    return tuple([_group(key, entries, speedups) for key, entries in found.items()])


def _group(
    key: tuple[Version, bool, bool, bool], entries: list[tuple[Subscriber, Write | None]], speedups: bool
) -> Group:
    version, deflates, ready, is_positioned = key
    members = tuple([member for member, _ in entries])
    writes = tuple([write for _, write in entries if write is not None]) if ready else None
    sockets = PlainSockets.of(writes) if writes is not None and speedups else None
    return Group(members, writes, version, deflates, is_positioned, sockets)
