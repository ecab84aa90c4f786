"""One topic with a history that has a subscriber here: where it stands, and its last events.

Owns the ring of recent events, by which those who come back soon are caught up without a read; must not know the store.
"""

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Sequence

from relay.brokers.base import Event, Place
from relay.channels.history_reader import ENTRY_BYTES, Entry
from relay.config_sections import HistoryConfig

RING_BYTES = 65_536
"""Recent events of one topic that are kept, in bytes of their payloads and `ENTRY_BYTES` for each."""


class Followed:
    """What is known of one topic from its first subscriber to its last, or to the loss of what it missed."""

    __slots__ = (
        "catching_up",
        "certain",
        "delivered",
        "due_at",
        "gaps",
        "heard",
        "held",
        "held_bytes",
        "queued_at",
        "ring",
        "ring_bytes",
        "ring_start",
        "row_bytes",
        "settings",
        "topic",
        "waiters",
    )

    def __init__(self, topic: str, settings: HistoryConfig) -> None:
        self.topic: str = topic
        self.settings: HistoryConfig = settings
        self.heard: Place | None = None
        """The last position that was heard."""
        self.delivered: Place | None = None
        """The last that was delivered to the hub: handlers of on_event may be in between."""
        self.due_at: float = 0.0
        """When it is to be checked, in monotonic seconds."""
        self.queued_at: float = math.inf
        """When that is looked at."""
        self.catching_up: asyncio.Task[None] | None = None
        self.held: list[Event] = []
        """What has come from the bus while it is caught up."""
        self.held_bytes: int = 0
        self.gaps: int = 0
        """How often the link was interrupted."""
        self.certain: int = 0
        """How many of these times what was heard before was found to be there."""
        self.ring: deque[Entry] = deque()
        """The last events delivered, without a hole."""
        self.ring_start: Place | None = None
        """The position before the first of them, where that is known."""
        self.ring_bytes: int = 0
        self.row_bytes: float = 1024.0
        """Of a typical row; pages are so many rows that they have about `PAGE_BYTES`."""
        self.waiters: set[asyncio.Future[None]] = set()

    # What is known of it.

    @property
    def is_doubted(self) -> bool:
        """Whether the link was interrupted: what was heard last may be of a history that is no more."""
        return self.certain < self.gaps

    def settle(self, gaps: int) -> None:
        """Learn that what was heard last is there, after so many gaps."""
        self.certain = gaps
        self.wake()

    async def wait(self) -> None:
        """Return when something has happened to it."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.add(waiter)
        try:
            await waiter
        finally:
            self.waiters.discard(waiter)

    def wake(self) -> None:
        """Let those who wait look again."""
        waiters, self.waiters = self.waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # Its events.

    def hold(self, event: Event) -> None:
        """Keep an event from the bus until the topic is caught up; the store has it too."""
        size = len(event.payload) + ENTRY_BYTES
        if self.held_bytes + size > RING_BYTES:
            _ = self.take_held()
        self.held.append(event)
        self.held_bytes += size

    def take_held(self) -> list[Event]:
        """What was kept, which is kept no more."""
        held, self.held, self.held_bytes = self.held, [], 0
        return held

    def delivered_after(self, place: Place, is_included: bool) -> Sequence[Entry] | None:
        """What was delivered after a position, or from it on; None where that is not known, or not reached yet."""
        if self.delivered is None:
            return None
        if self.delivered == place and not is_included:
            return ()
        ring = self.ring
        at = place.n - ring[0].place.n if ring else len(ring)
        if not (0 if is_included else -1) <= at < len(ring):
            return None
        if (self.ring_start if at < 0 else ring[at].place) != place:
            return None
        return [ring[i] for i in range(at if is_included else at + 1, len(ring))]


class Rings:
    """The rings of all topics, least recently used first."""

    def __init__(self) -> None:
        self.bytes: int = 0
        """Of all of them."""
        self._topics: OrderedDict[str, Followed] = OrderedDict()

    def note(self, followed: Followed, place: Place, entry: Entry | None = None) -> None:
        """Learn what was delivered last; without an entry, only where the topic stands."""
        ring, delivered = followed.ring, followed.delivered
        if entry is None or delivered is None or delivered.n + 1 != place.n:
            self.clear(followed)
        elif not ring:
            followed.ring_start = delivered
        followed.delivered = place
        if entry is None or followed.ring_start is None:
            return
        ring.append(entry)
        followed.ring_bytes += entry.size
        self.bytes += entry.size
        self._topics[followed.topic] = followed
        self._topics.move_to_end(followed.topic)
        while followed.ring_bytes > RING_BYTES and len(ring) > 1:
            oldest = ring.popleft()
            followed.ring_start = oldest.place
            followed.ring_bytes -= oldest.size
            self.bytes -= oldest.size

    def clear(self, followed: Followed) -> None:
        """Forget a topic's recent events."""
        if followed.ring:
            del self._topics[followed.topic]
        self.bytes -= followed.ring_bytes
        followed.ring.clear()
        followed.ring_bytes = 0
        followed.ring_start = None

    def clear_oldest(self) -> None:
        """Forget those of the topic of which none came for longest."""
        self.clear(next(iter(self._topics.values())))
