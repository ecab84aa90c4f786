"""The interfaces `Broker` and `HistoryStore`, with their guarantees.

A broker carries events to and from other processes. The node is its only caller and its only sink.

Guarantees of every broker:

- **Order.** Events of one topic are handed over in the order the bus has them, in one task.
- **At most once.** Nothing is handed over twice, and nothing is delivered again after a fault.
- **Loss is reported.** Each time events may have been missed, `Sink.on_gap` is called, once hearing is restored.
- **Publishing is answered.** The future of `publish` is done when the bus has taken the message, or fails
  with `BusUnavailable`; it never stays pending for longer than the broker's time limit.

Guarantees of every store:

- **Positions.** Each event has one, ``<ms>-<n>``: ``ms`` does not fall and ``n`` is consecutive for the life of a
  history, so that a missing event shows as a hole.
- **Recovered is never claimed falsely.** `open` finds no fault only if the entry of exactly the given position is still
  there, or is the newest, and every event behind it is there too.
- **A page is whole.** `read` returns rows only if the first is exactly the one that was asked for.
"""

import asyncio
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeGuard

import msgspec

from relay.config_sections import Direction, HistoryConfig
from relay.errors import NotRecovered
from relay.metrics import ShardTopics
from relay.protocol.presence import Difference, Members


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event from the bus, its names decoded but not judged, its payload as published."""

    topic: str
    event: str
    payload: bytes
    position: str | None = None
    """Its place in the topic's history, where it has one."""
    sender: str | None = None
    """What `Broker.publish` was given, on whichever node; None where that was None, or the bus has no place for it."""

    @property
    def is_mark(self) -> bool:
        """Whether it is the entry of a history that says that acknowledged events before it are lost."""
        return not self.event and bool(self.payload)


class Link(NamedTuple):
    """State of the subscription. ``reason`` says in words what is wrong while it is not live."""

    live: bool
    reason: str


class Sink(Protocol):
    """Who receives what the broker hears."""

    async def receive_events(self, events: Sequence[Event]) -> None:
        """Take a batch in order. The broker reads no further until this returns: pressure reaches the bus."""

    def receive_message(self, pattern: str, channel: str, data: bytes) -> None:
        """Take a message on a raw Redis channel that matched one of the further patterns."""

    def receive_control(self, data: bytes) -> None:
        """Take what a node has published by `Broker.publish_control`; its own too."""

    def on_gap(self, reason: str, topics: Collection[str] | None = None) -> None:
        """Learn that events may have been missed, of all topics or of some; hearing them has been restored.

        Without any topic it means other messages, on control channels and patterns: they are heard again before topics.
        """

    def count_subscribers(self, topic: str) -> int:
        """How many subscribers a topic has here: those with most are heard again first."""


class Broker(Protocol):
    """A connection to the bus, supervised until it is stopped."""

    @property
    def link(self) -> Link:
        """Whether the subscription is live now."""

    @property
    def refusal(self) -> str:
        """Why nothing can be published now although the subscription may be live; empty where it can."""
        return ""

    async def start(self, sink: Sink) -> None:
        """Connect, and supervise in the background.

        Returns once the first attempt has succeeded or failed; never raises for a bus that is away.
        """

    async def stop(self) -> None:
        """End every task and connection. Messages not yet taken by the bus fail with `BusUnavailable`."""

    async def subscribe(self, topic: str) -> None:
        """Return once events of ``topic`` are heard. Called for a topic's first subscriber.

        Where it is cancelled, `unsubscribe` follows. Raises BusUnavailable: nothing has changed then.
        """

    async def unsubscribe(self, topic: str) -> None:
        """Stop hearing ``topic``; called after its last subscriber has left."""

    needs_subscribe: bool
    """False where every topic is heard anyway: then `subscribe` and `unsubscribe` need not be called."""

    def hears(self, topic: str) -> bool:
        """Whether events of a topic that was subscribed to are heard now; False while a fault is being mended."""
        return True

    def publish(
        self, direction: Direction, topic: str, event: str, payload: bytes, sender: str | None = None
    ) -> "asyncio.Future[None]":
        """Publish one message, in the order of the calls.

        Args:    sender: ASCII letters, digits, ``.`` and ``-``; this node finds it in `Event.sender` when it receives
                     this very event, and in no other. Events only: ``direction`` is `Direction.TO` or `Direction.LIVE`.
        Returns: a future that is done when the bus has taken it, or fails with `BusUnavailable`.
        """

    @property
    def history(self) -> "HistoryStore | None":
        """Reads the histories of topics, to which `publish` appends; None where no topic has one."""
        return None

    @property
    def presence(self) -> "PresenceStore | None":
        """Keeps the members of topics for other nodes; None where no topic has presence."""
        return None

    @property
    def nodes(self) -> "NodeBus | None":
        """Carries messages to one node alone; None where no node can be reached so."""
        return None

    @property
    def degraded(self) -> str:
        """What does not work while the rest does; empty if all does."""
        return ""

    @property
    def shard_topics(self) -> Mapping[str, ShardTopics]:
        """Topics that are subscribed to, by master of a Redis Cluster; asked for in another thread too."""
        return {}

    def publish_control(self, data: bytes) -> "asyncio.Future[None]":
        """Publish a message for all nodes, this one too; see `publish`. Text, since not every bus carries bytes."""


NODE_CHANNEL = "relay:node:"
"""What the Redis channel of one node begins with; its name follows."""


class NodeBus(Protocol):
    """Messages for one node alone, which `Sink.receive_message` is given there."""

    def publish_to_node(self, node: str, data: bytes) -> "asyncio.Future[int]":
        """Publish a message for a node; see `Broker.publish`.

        Returns: a future of the number of receivers: 0 where there is no such node.
        """


# Presence.

PRESENCE_CHANNEL = "relay:presence"
"""Where nodes tell each other who has come and gone."""


class Lease(NamedTuple):
    """What `PresenceStore.renew` found."""

    held: bool
    """Whether the lease had not run out, else others have taken the node for dead; and nothing written is lost."""
    nodes: dict[str, float]
    """All nodes, with the seconds that are left of their leases; negative for the dead."""


class OwnChange(NamedTuple):
    """What has changed of a node's own members of one topic."""

    topic: str
    change: Difference
    is_empty: bool
    """Whether none is left."""


class Numbering(NamedTuple):
    """How a node's write is numbered, so that what the store has lost of earlier ones is found."""

    number: int
    """Of this write; each has a greater one."""
    known: int
    """Of the last write that was answered; 0 where there was none since `PresenceStore.clear`."""
    is_whole: bool = True
    """Whether the store has all members of the node with this write."""


class PresenceStore(Protocol):
    """Keeps each node's own members where the others find them. Every method raises `BusUnavailable`.

    The store may lose what was written: a server is flushed, or its replica, which lags behind, takes its place.
    """

    node: str
    """The name of this node: another one at each start."""

    async def write(self, changes: Sequence[OwnChange], message: bytes, numbering: Numbering) -> bool:
        """Write changes of this node's members and publish a message about them, as one step.

        Returns: whether all that was written before is still there.
        """

    async def clear(self) -> None:
        """Remove this node's members, before they are written again."""

    async def renew(self, message: bytes, known: int, *, is_new: bool) -> Lease:
        """Renew this node's lease, and publish a message.

        Args: known: number of the last write that was answered.
              is_new: whether nothing was written yet, not even with an answer that was lost.
        """

    async def read(self, topic: str, node: str, known: int) -> Members | None:
        """The members of one node; None where not all that it has written is there.

        Args: known: number of the last write that the node is known to have made.
        """

    async def lost(self, topics: Sequence[str]) -> list[str]:
        """Those of these topics, of which this node has members, that have none of them left."""

    async def numbers(self, nodes: Sequence[str]) -> list[int | None]:
        """The number of each node's last write; None where the store has lost it."""

    async def nodes(self) -> list[str]:
        """All nodes whose lease has not run out."""

    async def remove(self, node: str, message: bytes = b"") -> None:
        """Remove all members of a node, and its lease: this node's at its end, with a message, or a dead one's."""


# Histories.

GRACE_S = 300
"""Seconds for which Redis keeps a stream longer than its ``ttl_s``."""

_POSITION = re.compile(r"[0-9]{1,15}-[0-9]{1,15}", re.ASCII)


def is_position(text: object) -> TypeGuard[str]:
    """Whether this may be the position of an event."""
    return isinstance(text, str) and _POSITION.fullmatch(text) is not None


class Place(NamedTuple):
    """A position, to be compared: by age within one history, or across a history that began again."""

    ms: int
    n: int

    @classmethod
    def of(cls, position: str) -> "Place":
        """Read a position that `is_position` has accepted."""
        ms, _, n = position.partition("-")
        return cls(int(ms), int(n))

    def __str__(self) -> str:
        return f"{self.ms}-{self.n}"


class Opened(NamedTuple):
    """What `HistoryStore.open` found."""

    newest: str
    """Position of the newest event, or where the first one will follow."""
    now_ms: int
    """The store's clock, which positions are made by, in milliseconds since 1970."""
    fault: NotRecovered | None = None
    """Why not every event behind the given position can be delivered."""


class Summary(NamedTuple):
    """What a history holds."""

    events: int
    first: str | None
    last: str | None
    bytes: int
    """Memory it takes; approximate."""


class HistoryStore(Protocol):
    """Reads histories. Every method raises `BusUnavailable` where the history cannot be read."""

    async def open(self, topic: str, since: str, settings: HistoryConfig, max_events: int, max_bytes: int) -> Opened:
        """Say whether all events behind ``since`` are there."""

    async def read(self, topic: str, since: str, count: int) -> list[Event] | None:
        """Up to ``count`` rows, the one at ``since`` first; None where that is gone.

        A row whose event is empty is no event: the birth of a history, or a mark that acknowledged events were lost.
        Of these two, a mark has a payload, which is the position that was lost.
        """

    async def last(self, topic: str, count: int, before: str | None = None) -> list[Event]:
        """Up to ``count`` newest rows, oldest first, of those older than ``before``."""

    async def check(self, topic: str, heard: str, settings: HistoryConfig) -> None:
        """Publish the newest position as a notice, an event without a name, in order with the topic's events.

        Keeps the history alive for ``ttl_s`` more. Where the event at ``heard`` has been lost while younger ones are
        there, or older ones alone, this leaves a mark.

        Args: heard: position of the last event that was heard of the topic; empty for none.
        """

    async def describe(self, topic: str) -> Summary:
        """Say what is there."""
