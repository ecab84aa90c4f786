"""What a socket has yet to send: a FIFO of frames, bounded in bytes.

Owns the frames of one socket that its reader was too slow for, and the policies for what to do when they
grow too many; must not know transports or the hub.

Replies, ``phx_close`` and ``phx_error`` are control frames: never dropped. They have a bound of their own, past which
the socket must be closed: a client that asks and never reads.
"""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from relay.wire import Frame


class Overflow(StrEnum):
    """What happens to a slow reader's events once its outbox is full; a setting of each topic."""

    DISCONNECT = "disconnect"
    """Close the socket: it comes back and starts afresh. For events of which none may be missing."""
    DROP_OLDEST = "drop-oldest"
    """Drop this topic's oldest waiting events to make room."""
    LATEST = "latest"
    """Keep one waiting event per topic and event name, the newest. For values that replace each other."""


@dataclass(eq=False, slots=True)
class _Entry:
    frame: Frame
    key: tuple[str, str] | None
    """(topic, event) of an event; None for a control frame."""


class Outbox:
    """Frames waiting for one socket, oldest first.

    Args: max_bytes: bound of all waiting events together, and of all waiting control frames.
    """

    __slots__ = ("_entries", "_latest", "control_bytes", "event_bytes", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes: int = max_bytes
        self.event_bytes: int = 0
        self.control_bytes: int = 0
        self._entries: deque[_Entry] = deque()
        # The waiting event of each (topic, event) under the policy `latest`.
        self._latest: dict[tuple[str, str], _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add_control(self, frame: Frame) -> bool:
        """Queue a reply, a close or an error; False where that exceeds the bound: the socket must be closed."""
        self._entries.append(_Entry(frame, None))
        self.control_bytes += frame.size
        return self.control_bytes <= self.max_bytes

    def add_event(self, frame: Frame, topic: str, event: str, overflow: Overflow) -> int | None:
        """Queue an event, and make room for it as its topic's policy says.

        Returns: how many events were dropped (the new one, where it alone exceeds the bound), or None:
                 the socket must be closed, and the event was not queued.
        """
        key = (topic, event)
        waiting = self._latest.get(key) if overflow is Overflow.LATEST else None
        if waiting is not None and self.event_bytes - waiting.frame.size + frame.size <= self.max_bytes:
            # The newer value takes the older one's place in the queue: O(1), and it arrives no later.
            self.event_bytes += frame.size - waiting.frame.size
            waiting.frame = frame
            return 1
        dropped = 0
        if self.event_bytes + frame.size > self.max_bytes:
            if overflow is Overflow.DISCONNECT:
                return None
            if frame.size > self.max_bytes:
                return 1
            if waiting is not None:  # outgrown its place: the newer value goes to the end of the queue
                self._entries.remove(waiting)
                self._forget(waiting)
                dropped = 1
            dropped += self._make_room(topic, frame.size)
            if self.event_bytes + frame.size > self.max_bytes:
                return dropped + 1  # the outbox is full of other topics' events
        entry = _Entry(frame, key)
        self._entries.append(entry)
        self.event_bytes += frame.size
        if overflow is Overflow.LATEST:
            self._latest[key] = entry
        return dropped

    def pop(self) -> Frame:
        """Take the oldest frame. Raises IndexError when there is none."""
        entry = self._entries.popleft()
        self._forget(entry)
        return entry.frame

    def clear(self) -> int:
        """Drop everything, for a socket that is gone. Returns how many events were among it."""
        events = sum(entry.key is not None for entry in self._entries)
        self._entries.clear()
        self._latest.clear()
        self.event_bytes = self.control_bytes = 0
        return events

    def _forget(self, entry: _Entry) -> None:
        if entry.key is None:
            self.control_bytes -= entry.frame.size
        else:
            self.event_bytes -= entry.frame.size
            if self._latest.get(entry.key) is entry:
                del self._latest[entry.key]

    def _make_room(self, topic: str, size: int) -> int:
        """Drop events of ``topic``, oldest first, until ``size`` bytes fit or none is left; say how many."""
        dropped = 0
        kept: deque[_Entry] = deque()
        # Nearly always the oldest entry is the one to drop, so the walk ends at once.
        while self._entries and self.event_bytes + size > self.max_bytes:
            entry = self._entries.popleft()
            if entry.key is not None and entry.key[0] == topic:
                self._forget(entry)
                dropped += 1
            else:
                kept.append(entry)
        self._entries.extendleft(reversed(kept))
        return dropped
