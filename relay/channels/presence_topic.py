"""What subscribers of one topic are shown of its members.

Owns the members as they are known here, and what was shown last; must not know how nodes exchange them.

Changes are sent together once in `WINDOW_S`, the first of a quiet topic at once. A leave waits for
``presence.leave_delay_s``, unless its key is still there: a page that is loaded again, or finds another node, does not
flicker.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Protocol

import msgspec

from relay.config import Config
from relay.config_sections import TopicConfig
from relay.metrics import Metrics
from relay.protocol import presence
from relay.protocol.frame import Frame
from relay.protocol.payload import encode_payload
from relay.protocol.presence import Difference, Members
from relay.protocol.serializer import Version, encode_broadcast
from relay.transports.base import Transport

WINDOW_S = 0.1
"""Seconds for which changes of a topic are held together, after the first of a quiet topic was sent at once."""

_SLICE_S = 0.002
"""Seconds after which what is left to be sent waits for the event loop's next turn, as in the fan-out of events."""

_COUNT_WINDOW_S = 1.0
"""The same where subscribers are sent the number of members."""


class Watcher(Protocol):
    """A channel whose client is sent the members."""

    topic: str

    @property
    def version(self) -> Version:
        """What its client speaks."""

    @property
    def transport(self) -> Transport:
        """Its socket's transport."""


class PresenceTopic:
    """One topic with subscribers or members here.

    Args: config: how it is shown.
    """

    __slots__ = (
        "_config",
        "_lingering",
        "_metrics",
        "_unsent",
        "counted_at",
        "flush_at",
        "flushed_at",
        "is_counted",
        "leaves_due",
        "loading",
        "members",
        "name",
        "newcomers",
        "own",
        "parts",
        "settings",
        "shown",
        "shown_count",
        "timer",
        "tracked",
        "watchers",
    )

    def __init__(self, name: str, config: Config, metrics: Metrics) -> None:
        self.name: str = name
        self._config = config
        self._metrics = metrics
        self.settings: TopicConfig = config.topic(name)
        # Members of this node; and what other nodes know of them, which is their number alone with presence = "count".
        self.members: Members = {}
        self.own: Members = {}
        # Refs by key, of each channel that has any.
        self.tracked: dict[Watcher, dict[str, str]] = {}
        self.parts: dict[str, Members] = {}
        # Nodes whose members are being read, each with the changes that have come meanwhile.
        self.loading: dict[str, list[Difference]] = {}
        self.watchers: dict[Watcher, None] = {}
        self.newcomers: dict[Watcher, None] = {}
        # What watchers know; and when leaves that they do not know yet are due.
        self.shown: Members = {}
        self.leaves_due: dict[str, float] = {}
        self.is_counted: bool = False
        self.shown_count: int = -1
        self.counted_at: float = float("-inf")
        self.flushed_at: float = float("-inf")
        self.timer: asyncio.TimerHandle | None = None
        self.flush_at: float = float("inf")
        self._lingering: asyncio.TimerHandle | None = None
        self._unsent: deque[_Sending] = deque()

    @property
    def is_unused(self) -> bool:
        """Whether no channel here is listed, or sent the members."""
        return not self.watchers and not self.members

    def linger(self, delay_s: float, drop: Callable[[], None]) -> None:
        """Call ``drop`` after the delay of leaves.

        Subscribers that all rejoin at once, after a gap, then find the members as they were shown last: those of other
        nodes rejoin at the same time, and are not listed for a moment.
        """
        if self._lingering is not None:
            self._lingering.cancel()
        self._lingering = asyncio.get_running_loop().call_later(delay_s, drop)

    def stop(self) -> None:
        """Send nothing more."""
        for timer in (self.timer, self._lingering):
            if timer is not None:
                timer.cancel()
        self._unsent.clear()

    def merged(self) -> Members:
        """All members on all nodes."""
        found = dict(self.own)
        for part in self.parts.values():
            found |= part
        return found

    # Showing.

    def changed(self) -> None:
        """Send it to the watchers, at once where the topic was quiet, else with what comes within the window."""
        self._flush_by(self.flushed_at + WINDOW_S)

    def _flush_by(self, at: float) -> None:
        if at >= self.flush_at:
            return
        if self.timer is not None:
            self.timer.cancel()
        self.flush_at = at
        delay_s = max(0.0, at - asyncio.get_running_loop().time())
        self.timer = asyncio.get_running_loop().call_later(delay_s, self._flush)

    def _flush(self) -> None:
        now = asyncio.get_running_loop().time()
        self.timer, self.flush_at, self.flushed_at = None, float("inf"), now
        if self._unsent:  # a large topic is shown as often as its subscribers can be written to
            self.changed()
            return
        members = self.merged()
        if self._is_counted(members):
            self._show_count(members, now)
        else:
            self._show_members(members, now)

    def _is_counted(self, members: Members) -> bool:
        settings = self.settings
        if settings.presence == "count":
            return True
        # A topic that has been counted is so until clearly fewer are there: it must not change back and forth.
        share = 0.9 if self.is_counted else 1
        return (
            len(members) > share * settings.presence_max
            or sum(len(member.meta) for member in members.values())
            > share * self._config.limits.presence_state_max_bytes
        )

    def _show_count(self, members: Members, now: float) -> None:
        if not self.is_counted:
            self.is_counted, self.shown_count = True, -1
            if self.settings.presence != "count":
                self._metrics.presence_counted += 1
            self.shown.clear()
            self.leaves_due.clear()
        if self.loading:
            return
        count = count_members(members, self.settings)
        if now - self.counted_at < _COUNT_WINDOW_S and count != self.shown_count:
            self._flush_by(self.counted_at + _COUNT_WINDOW_S)
            watchers, count = self.newcomers, max(self.shown_count, 0)
        elif count != self.shown_count:
            self.shown_count, self.counted_at = count, now
            watchers = self.watchers
        else:
            watchers = self.newcomers
        self._send(watchers, presence.COUNT_EVENT, encode_payload({"count": count}))
        self.newcomers.clear()

    def _show_members(self, members: Members, now: float) -> None:
        if self.is_counted:  # not any more
            self.is_counted = False
            self.newcomers.update(self.watchers)
        change = self._visible(members, now)
        if change:
            presence.apply(self.shown, change)
            others = {watcher: None for watcher in self.watchers if watcher not in self.newcomers}
            if others:
                self._metrics.presence_diffs += 1
                self._send(others, presence.DIFF_EVENT, presence.encode_difference(change))
        if self.newcomers and not self.loading:
            self._send(self.newcomers, presence.STATE_EVENT, presence.encode_state(self.shown.values()))
            self.newcomers.clear()

    def _visible(self, members: Members, now: float) -> Difference:
        """What the watchers are sent now: a leave waits, unless the key is still there."""
        change = presence.difference(self.shown, members)
        keys = {member.key for member in members.values()} if change.leaves else set()
        leaves: Members = {}
        due: dict[str, float] = {}
        for ref, member in change.leaves.items():
            at = self.leaves_due.get(ref, now + self._config.presence.leave_delay_s)
            if member.key in keys or at <= now:
                leaves[ref] = member
            else:
                due[ref] = at
        self.leaves_due = due
        if due:
            self._flush_by(min(due.values()))
        return Difference(change.joins, leaves)

    def _send(self, watchers: Iterable[Watcher], event: str, payload: msgspec.Raw) -> None:
        self._unsent.append(_Sending(tuple(watchers), event, payload))
        if len(self._unsent) == 1:
            self._go_on()

    def _go_on(self) -> None:
        """Send what is to be sent, and leave the event loop to others after a while: a list may be half a megabyte."""
        until = time.perf_counter() + _SLICE_S
        while self._unsent:
            sending = self._unsent[0]
            for watcher in islice(sending.watchers, sending.sent, None):
                sending.sent += 1
                if watcher in self.watchers:  # still
                    watcher.transport.send_control(sending.frame(watcher.version, self.name))
                if time.perf_counter() > until:
                    _ = asyncio.get_running_loop().call_soon(self._go_on)
                    return
            _ = self._unsent.popleft()


class _Sending:
    """One event on its way to the watchers."""

    __slots__ = ("_event", "_frames", "_payload", "sent", "watchers")

    def __init__(self, watchers: tuple[Watcher, ...], event: str, payload: msgspec.Raw) -> None:
        self.watchers = watchers
        self._event = event
        self._payload = payload
        self._frames: dict[Version, Frame] = {}
        self.sent = 0

    def frame(self, version: Version, topic: str) -> Frame:
        """Encoded once for all that speak the same version."""
        frame = self._frames.get(version)
        if frame is None:
            frame = self._frames[version] = encode_broadcast(version, topic, self._event, self._payload)
        return frame


class _Count(msgspec.Struct):
    count: int


_decode_count = msgspec.json.Decoder(_Count).decode


def count_members(members: Members, settings: TopicConfig) -> int:
    """How many members there are; where only their number is known, as what stands for those of each node says."""
    if settings.presence != "count":
        return len(members)
    return sum(_count_of(member.meta) for member in members.values())


def _count_of(meta: bytes) -> int:
    try:
        return max(0, _decode_count(meta).count)
    except (
        msgspec.MsgspecError
    ):  # one member: of a node where the topic has another setting, until that one is restarted
        return 1
