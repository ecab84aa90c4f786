"""A node's side of a broker: it keeps what it is handed."""

import asyncio
from collections.abc import Collection, Sequence

from relay.brokers.base import Event
from tests.support.serving import eventually


class Sink:
    """What a broker hands over."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.gaps: list[str] = []
        self.control_messages: list[bytes] = []
        self.messages: list[tuple[str, str, bytes]] = []
        self.told: list[str] = []
        """Topics that gaps were told of, where that is not all of them."""
        self._round: set[str] = set()
        self.subscribers: dict[str, int] = {}
        """How many a topic has; others have one."""
        self.room = asyncio.Event()
        self.room.set()

    async def receive_events(self, events: Sequence[Event]) -> None:
        self.events += events
        await self.room.wait()

    def receive_message(self, pattern: str, channel: str, data: bytes) -> None:
        self.messages.append((pattern, channel, data))

    def receive_control(self, data: bytes) -> None:
        self.control_messages.append(data)

    def on_gap(self, reason: str, topics: Collection[str] | None = None) -> None:
        if topics is not None and not topics:
            return
        if topics is None or not self._round or not self._round.isdisjoint(topics):
            self.gaps.append(reason)
            self._round = set()
        self._round.update(topics or ())
        self.told += topics or ()

    def count_subscribers(self, topic: str) -> int:
        return self.subscribers.get(topic, 1)

    async def expect(self, *events: Event) -> None:
        """These have come, and no others."""
        await eventually(lambda: len(self.events) >= len(events), f"{len(events)} events")
        assert self.events == list(events)
