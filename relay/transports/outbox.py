"""What a socket has yet to send: a FIFO of frames, bounded in bytes.

Owns the frames of one socket that its reader was too slow for, and the policies for what to do when they
grow too many; must not know transports or the hub.

Replies, ``phx_close`` and ``phx_error`` are control frames: never dropped. They have a bound of their own, past which
the socket must be closed: a client that asks and never reads.
"""

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from relay.config_sections import Overflow, Policy
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.protocol.serializer import POSITION_EVENT

_Key = tuple[str, str, bytes | None]
"""Topic, event, and the value of the topic's ``latest_key``."""


@dataclass(eq=False, slots=True)
class Entry:
    """A frame that waits."""

    frame: Frame
    key: _Key | None
    """Of an event; None for a control frame."""
    match: str
    """The pattern that its topic's policy stands under."""


RECOVER_BYTES = 32_768
"""Most bytes of events that wait for a socket under the policy ``recover``: beyond, they are in the history."""

ENTRY_BYTES = 140
"""What a waiting frame takes beside its own bytes: its entry, its key, its places in the queue and in the table."""


class OutboxBudget:
    """All outboxes of a relay: a bound for the memory of all, past which the largest goes first.

    A frame that waits for many sockets counts as often as it waits, though it is held once.

    Args: max_bytes: the bound, `ENTRY_BYTES` for each frame included; 0 for none.
          metrics: ``outbox_bytes`` there is the sum of the frames alone.
    """

    __slots__ = ("_held_bytes", "_members", "_metrics", "max_bytes")

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self.max_bytes: int = max_bytes
        self._metrics = metrics
        self._held_bytes = 0
        # Those in which something waits.
        self._members: set[Outbox] = set()

    def count(self, outbox: "Outbox", waiting_bytes: int, held_bytes: int) -> None:
        """Count what has come into an outbox, or left it; past the bound, have the largest emptied.

        Args: waiting_bytes: of its frames; negative for what has left.
              held_bytes: of the memory that they take, likewise.
        """
        self._metrics.outbox_bytes += waiting_bytes
        self._held_bytes += held_bytes
        if held_bytes > 0:
            self._members.add(outbox)
            while 0 < self.max_bytes < self._held_bytes:
                largest = max(self._members, key=lambda member: member.held_bytes)
                _ = largest.evict()
                assert largest not in self._members, "an outbox that is given up is emptied"
        elif not outbox.held_bytes:
            self._members.discard(outbox)


class Outbox:
    """Frames waiting for one socket, oldest first.

    Args: max_bytes: bound of all waiting events together, and of all waiting control frames.
          outboxes: what it is counted in, if any.
          evict: has to empty it, when all of them hold too much and this one most.
          notice: makes the frame that says how many events of a topic were dropped.
    """

    __slots__ = (
        "_counted",
        "_entries",
        "_latest",
        "_outboxes",
        "_notice",
        "_pending_notices",
        "control_bytes",
        "dropped",
        "event_bytes",
        "evict",
        "max_bytes",
        "max_events",
    )

    def __init__(
        self,
        max_bytes: int,
        outboxes: OutboxBudget | None = None,
        evict: Callable[[], object] = lambda: None,
        notice: Callable[[str, int], Frame] | None = None,
    ) -> None:
        self.max_bytes: int = max_bytes
        self.max_events: float = math.inf
        """Most events that may wait, besides the bound in bytes."""
        self.event_bytes: int = 0
        self.control_bytes: int = 0
        self.dropped: int = 0
        """Events dropped since the socket opened."""
        self._outboxes = outboxes
        self.evict: Callable[[], object] = evict
        # Its bytes and its frames, as they were counted last.
        self._counted = (0, 0)
        self._notice = notice
        self._entries: deque[Entry] = deque()
        # The waiting event of each key under the policy `latest`.
        self._latest: dict[_Key, Entry] = {}
        # How many events of which topics were dropped and not reported yet to a client that wants to know.
        self._pending_notices: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries) + len(self._pending_notices)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of all waiting frames."""
        return self.event_bytes + self.control_bytes

    @property
    def held_bytes(self) -> int:
        """Memory that they take."""
        return self.waiting_bytes + ENTRY_BYTES * len(self._entries)

    def add_control(self, frame: Frame) -> bool:
        """Queue a reply, a close or an error; False where that exceeds the bound: the socket must be closed."""
        self._entries.append(Entry(frame, None, ""))
        self.control_bytes += frame.size
        fits = self.control_bytes <= self.max_bytes
        self._count()
        return fits

    def add_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> int | None:
        """Queue an event, and make room for it as its topic's policy says.

        Returns: how many events were dropped (the new one, where it alone exceeds the bound), or None, where the event
                 was not queued: the socket must be closed; under ``recover`` it is given events from the history.
        """
        dropped = self._add_event(frame, topic, event, policy)
        if dropped:
            self.dropped += dropped
            if policy.notify_dropped and self._notice is not None:
                self._pending_notices[topic] = self._pending_notices.get(topic, 0) + dropped
        self._count()
        return dropped

    def _count(self) -> None:
        if self._outboxes is not None:
            waiting_bytes, frames = self.event_bytes + self.control_bytes, len(self._entries)
            more_bytes, more_frames = waiting_bytes - self._counted[0], frames - self._counted[1]
            self._counted = (waiting_bytes, frames)
            self._outboxes.count(self, more_bytes, more_bytes + ENTRY_BYTES * more_frames)

    def drop_recoverable(self, topic: str) -> str | None:
        """Drop what waits of a topic and is in its history; returns the position of the first, or None."""
        first: str | None = None
        kept: deque[Entry] = deque()
        for entry in self._entries:
            if entry.key is None or entry.key[0] != topic or entry.frame.position is None:
                kept.append(entry)
            elif first is None and entry.key[1] == POSITION_EVENT:
                kept.append(entry)  # of an event that has been written
            else:
                first = first or entry.frame.position
                self._forget(entry)
        self._entries = kept
        self._count()
        return first

    def _add_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> int | None:
        overflow = policy.overflow
        value = frame.payload_value(policy.latest_key) if policy.latest_key else None
        key = (topic, event, value)
        waiting = self._latest.get(key) if overflow is Overflow.LATEST else None
        dropped = 0
        if waiting is not None and self.event_bytes - waiting.frame.size + frame.size <= self.max_bytes:
            if frame.position is None:
                # The newer value takes the older one's place in the queue: O(1), and no value waits longer for
                # changing.
                self.event_bytes += frame.size - waiting.frame.size
                waiting.frame = frame
                return 1
            # Positions may not go back: a client that was cut off there would not be given what had to wait.
            self._remove(waiting)
            waiting, dropped = None, 1
        if overflow is Overflow.RECOVER and frame.position is not None:
            # The position of an event that waits, or has been written, goes with it.
            is_over = self.event_bytes + frame.size > RECOVER_BYTES or len(self._entries) >= self.max_events
            if is_over and event != POSITION_EVENT:
                return None
        elif not self._has_room(frame.size):
            if overflow is Overflow.DISCONNECT:
                return None
            if overflow is Overflow.RECOVER:  # an event that is in no history
                return 1
            if frame.size > self.max_bytes:
                return 1
            if waiting is not None:  # outgrown its place: the newer value goes to the end of the queue
                self._remove(waiting)
                dropped = 1
            dropped += self._make_room(topic, frame.size)
            if not self._has_room(frame.size):
                return dropped + 1  # the outbox is full of other topics' events
        entry = Entry(frame, key, policy.match)
        self._entries.append(entry)
        self.event_bytes += frame.size
        if overflow is Overflow.LATEST:
            self._latest[key] = entry
        return dropped

    def _has_room(self, size: int) -> bool:
        return self.event_bytes + size <= self.max_bytes and len(self._entries) < self.max_events

    def pop(self) -> Frame:
        """Take the oldest frame, or a notice that is due before it. Raises IndexError when there is none."""
        if self._pending_notices and (notice := self._pop_notice()) is not None:
            return notice
        entry = self._entries.popleft()
        self._forget(entry)
        self._count()
        return entry.frame

    def take(self, max_bytes: int) -> tuple[Entry, ...]:
        """Take the oldest frames: one at least, if there is any, and no more than ``max_bytes``."""
        taken: list[Entry] = []
        size = 0
        while self:
            if self._pending_notices and (notice := self._pop_notice()) is not None:
                entry = Entry(notice, None, "")
            elif taken and size + self._entries[0].frame.size > max_bytes:
                break
            else:
                entry = self._entries.popleft()
                self._forget(entry)
            taken.append(entry)
            size += entry.frame.size
        self._count()
        return tuple(taken)

    def put_back(self, entries: tuple[Entry, ...]) -> None:
        """Queue what was taken again, before all else."""
        for entry in entries:
            if entry.key is None:
                self.control_bytes += entry.frame.size
            else:
                self.event_bytes += entry.frame.size
        self._entries.extendleft(reversed(entries))
        self._count()

    def _pop_notice(self) -> Frame | None:
        """What the client has to know before the next frame: of that frame's topic, or, after the last one, of any."""
        assert self._notice is not None, "else no notice is pending"
        if self._entries:
            key = self._entries[0].key
            if key is None or key[0] not in self._pending_notices:
                return None
            topic = key[0]
        else:
            topic = next(iter(self._pending_notices))
        return self._notice(topic, self._pending_notices.pop(topic))

    def settle_dropped(self, topic: str, notice: Callable[[str, int], Frame]) -> None:
        """Put the pending notice of ``topic`` in its place: the subscription that missed it ends, or has a gap.

        That is before the topic's first waiting event, or, where none waits, before what follows. No event that comes
        later takes the place of one that waits: it would come before the notice of the gap, or the reply to the next
        join.
        """
        self._latest = {key: entry for key, entry in self._latest.items() if key[0] != topic}
        if not (count := self._pending_notices.pop(topic, 0)):
            return
        entry = Entry(notice(topic, count), None, "")
        place = (at for at, other in enumerate(self._entries) if other.key is not None and other.key[0] == topic)
        self._entries.insert(next(place, len(self._entries)), entry)
        self.control_bytes += entry.frame.size
        self._count()

    def clear(self) -> Counter[str]:
        """Drop everything, for a socket that is gone. Returns how many events were among it, by `Policy.match`."""
        events = Counter(entry.match for entry in self._entries if entry.key is not None)
        self.dropped += events.total()
        self._entries.clear()
        self._latest.clear()
        self._pending_notices.clear()
        self.event_bytes = self.control_bytes = 0
        self._count()
        return events

    def _remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        if entry.key is None:
            self.control_bytes -= entry.frame.size
        else:
            self.event_bytes -= entry.frame.size
            if self._latest.get(entry.key) is entry:
                del self._latest[entry.key]

    def _make_room(self, topic: str, size: int) -> int:
        """Drop events of ``topic``, oldest first, until ``size`` bytes fit or none is left; say how many."""
        dropped = 0
        kept: deque[Entry] = deque()
        # Nearly always the oldest entry is the one to drop, so the walk ends at once.
        while self._entries and not self._has_room(size):
            entry = self._entries.popleft()
            if entry.key is not None and entry.key[0] == topic:
                self._forget(entry)
                dropped += 1
            else:
                kept.append(entry)
        self._entries.extendleft(reversed(kept))
        return dropped
