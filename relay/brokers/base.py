"""The `Broker` interface, with its guarantees.

A broker carries events to and from other processes. The node is its only caller and its only sink.

Guarantees of every broker:

- **Order.** Events of one topic are handed over in the order the bus has them, in one task.
- **At most once.** Nothing is handed over twice, and nothing is delivered again after a fault.
- **Loss is reported.** Each time events may have been missed, `Sink.on_gap` is called, once hearing is restored.
- **Publishing is answered.** The future of `publish` is done when the bus has taken the message, or fails
  with `BusUnavailable`; it never stays pending for longer than the broker's time limit.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from relay.config import Direction


class Event(msgspec.Struct, frozen=True, gc=False):
    """One event from the bus, its names decoded but not judged, its payload as published."""

    topic: str
    event: str
    payload: bytes
    position: str | None = None
    """Its place in the topic's history, where it has one."""
    sender: str | None = None
    """What `Broker.publish` was given, on whichever node; None where that was None, or the bus has no place for it."""


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

    def on_gap(self, reason: str) -> None:
        """Learn that events may have been missed; hearing has been restored."""


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
        """Return once events of ``topic`` are heard. Called for a topic's first subscriber."""

    async def unsubscribe(self, topic: str) -> None:
        """Stop hearing ``topic``; called after its last subscriber has left."""

    needs_subscribe: bool
    """False where every topic is heard anyway: then `subscribe` and `unsubscribe` need not be called."""

    def publish(
        self, direction: Direction, topic: str, event: str, payload: bytes, sender: str | None = None
    ) -> "asyncio.Future[None]":
        """Publish one message, in the order of the calls.

        Args:    sender: ASCII letters, digits, ``.`` and ``-``; this node finds it in `Event.sender` when it receives
                     this very event, and in no other. Events only: ``direction`` is `Direction.TO`.
        Returns: a future that is done when the bus has taken it, or fails with `BusUnavailable`.
        """

    def publish_control(self, data: bytes) -> "asyncio.Future[None]":
        """Publish a message for all nodes, this one too; see `publish`. Text, since not every bus carries bytes."""
