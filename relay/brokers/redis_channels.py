"""The channels of topics that one process hears, where it subscribes to each topic and not to a pattern.

Owns which topics are wanted, which of them Redis has confirmed, and which have missed events in a gap; must not know
sockets, nor what messages contain.

What one turn of the event loop asks for goes out in one write, with one ``SUBSCRIBE`` for each topic, so that one which
Redis refuses costs no other anything. Redis confirms in order. A topic that no client has joined any more is kept for
``linger_s``, since clients come back, then unsubscribed together with others. After a gap all topics are subscribed to
again, those with most subscribers first, and the gap of each is reported once it is heard again.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

from relay.brokers.redis_connection import LinkLost, name_of
from relay.config_redis import RedisConfig
from relay.errors import BusUnavailable
from relay.metrics import Histogram

_logger = logging.getLogger("relay.redis")

WINDOW = 4096
"""Most topics that are subscribed to again without a confirmation."""

PORTION = 512
"""Most topics for which one turn of the event loop subscribes again, or unsubscribes."""

_PAUSE_S = 0.01
"""Seconds between two portions of topics that are unsubscribed."""


class ChannelWriter(Protocol):
    """The subscription's connection, as this module knows it."""

    def ask_channels(self, command: str, names: Sequence[bytes]) -> None:
        """Send ``SUBSCRIBE`` or ``UNSUBSCRIBE`` for each channel, in one write. Raises LinkLost."""

    def end(self, fault: str) -> None:
        """Cut the connection."""


class TopicChannel:
    """One topic's channel."""

    __slots__ = ("asked_at", "is_asked", "is_heard", "is_missed", "is_wanted", "name", "topic", "waiters")

    def __init__(self, topic: str, name: bytes) -> None:
        self.topic: str = topic
        self.name: bytes = name
        self.is_wanted: bool = False
        """Whether it was asked for and not given up since; else it lingers."""
        self.is_asked: bool = False
        """Whether a ``SUBSCRIBE`` is on its way, or about to be."""
        self.is_heard: bool = False
        """Whether Redis has confirmed it on this connection."""
        self.is_missed: bool = False
        """Whether it was heard before a gap, and is not heard again yet."""
        self.asked_at: float = 0.0
        self.waiters: list[asyncio.Future[None]] = []


class TopicChannels:
    """All of them, on whichever connection there is.

    Args: settings: ``topic_prefix``, ``timeout_s`` and ``linger_s`` are used.
          clock: monotonic seconds.
    """

    commands: tuple[str, str] = ("SUBSCRIBE", "UNSUBSCRIBE")

    def __init__(self, settings: RedisConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self.by_name: dict[bytes, TopicChannel] = {}
        """Those that are wanted or linger, by the channel's name in Redis."""
        self.count_subscribers: Callable[[str], int] = lambda topic: 0
        """Says how many subscribers a topic has here."""
        self.subscribe_time: Histogram = Histogram()
        """How long confirmations took that joins have waited for."""
        self.resubscribe_time: Histogram = Histogram()
        """How long those of missed topics took, since `attach`."""
        self._again_since: float = 0.0
        self._writer: ChannelWriter | None = None
        # Why there is no connection, or why there was none before this one.
        self.reason: str = "not started"
        # Sent and not confirmed, in order; and about to be sent at the end of this turn of the event loop.
        self._unconfirmed: deque[TopicChannel] = deque()
        self._outgoing: list[TopicChannel] = []
        # Given up, each with the time from which it may be unsubscribed, the earliest first.
        self._lingering: dict[bytes, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        # Who waits for a confirmation, each with the time until which it may, the earliest first.
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._late: asyncio.TimerHandle | None = None
        self._again: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._recovered: list[str] = []
        self._missed = 0

    @property
    def missed(self) -> int:
        """Topics that were heard before a gap, and are not heard again yet."""
        return self._missed

    @property
    def lingering(self) -> int:
        """Topics that no client has joined any more, and that are to be unsubscribed."""
        return len(self._lingering)

    @property
    def waits_since(self) -> float | None:
        """When the oldest ``SUBSCRIBE`` without an answer was sent; None where each has one."""
        return self._unconfirmed[0].asked_at if self._unconfirmed else None

    def hears(self, topic: str) -> bool:
        """Whether events of a topic are heard now."""
        channel = self.by_name.get(self._name(topic))
        return channel is not None and channel.is_heard and channel.is_wanted

    async def subscribe(self, topic: str) -> None:
        """Return once Redis has confirmed the topic. Raises BusUnavailable: nothing has changed then."""
        name = self._name(topic)
        channel = self.by_name.get(name)
        if self._writer is None:
            raise BusUnavailable(self.reason)
        if channel is None:
            channel = self.by_name[name] = TopicChannel(topic, name)
        was_wanted, channel.is_wanted = channel.is_wanted, True
        _ = self._lingering.pop(name, None)
        if channel.is_heard:
            return
        if not channel.is_asked:
            self._ask_soon(channel)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        channel.waiters.append(waiter)
        self._limit(waiter)
        try:
            await waiter
        except (BusUnavailable, asyncio.CancelledError):
            self._give_up(channel, waiter, was_wanted)
            raise

    def _limit(self, waiter: asyncio.Future[None]) -> None:
        """Refuse a waiter in time: by one timer for all, since most are answered within a millisecond."""
        waiting = self._waiting
        while waiting and waiting[0][1].done():
            _ = waiting.popleft()
        waiting.append((self._clock() + self._settings.timeout_s, waiter))
        if self._late is None:
            self._late = asyncio.get_running_loop().call_later(self._settings.timeout_s, self._refuse_late)

    def _refuse_late(self) -> None:
        self._late, waiting, now = None, self._waiting, self._clock()
        while waiting and (waiting[0][1].done() or waiting[0][0] <= now):
            _, waiter = waiting.popleft()
            if not waiter.done():
                fault = f"no answer to {self.commands[0]} within {self._settings.timeout_s:g} s"
                waiter.set_exception(BusUnavailable(fault))
        if waiting:
            self._late = asyncio.get_running_loop().call_later(max(waiting[0][0] - now, 0.001), self._refuse_late)

    def unsubscribe(self, topic: str) -> None:
        """Unsubscribe from a topic after a while, unless it is asked for again before."""
        channel = self.by_name.get(self._name(topic))
        if channel is not None and channel.is_wanted:
            self._let_linger(channel)

    def _give_up(self, channel: TopicChannel, waiter: asyncio.Future[None], was_wanted: bool) -> None:
        if waiter in channel.waiters:
            channel.waiters.remove(waiter)
        if not was_wanted and not channel.waiters and self.by_name.get(channel.name) is channel:
            self._let_linger(channel)

    def _let_linger(self, channel: TopicChannel) -> None:
        channel.is_wanted = False
        if not channel.is_heard and not channel.is_asked:
            self._forget(channel)
            return
        self._lingering[channel.name] = self._clock() + self._settings.linger_s
        if self._timer is None:
            self._wait(self._settings.linger_s)

    def _forget(self, channel: TopicChannel) -> None:
        del self.by_name[channel.name]
        _ = self._lingering.pop(channel.name, None)
        self._missed -= channel.is_missed

    # Unsubscribing.

    def _wait(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._end_lingering)

    def _end_lingering(self) -> None:
        """Unsubscribe a portion of the topics that have lingered long enough."""
        self._timer = None
        now, due = self._clock(), list[bytes]()
        for name, ends_at in islice(self._lingering.items(), PORTION):
            if ends_at > now:
                break
            due.append(name)
        self._flush()  # one that was asked for in this very turn is subscribed to before
        for name in due:
            self._forget(self.by_name[name])
        if due and self._writer is not None:
            self._send(self.commands[1], due)
        if self._lingering:
            self._wait(max(next(iter(self._lingering.values())) - now, _PAUSE_S))

    # Subscribing.

    def _ask_soon(self, channel: TopicChannel) -> None:
        if not self._outgoing:
            _ = asyncio.get_running_loop().call_soon(self._flush)
        channel.is_asked = True
        self._outgoing.append(channel)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing:
            self._ask(outgoing)

    def _ask(self, channels: Sequence[TopicChannel]) -> None:
        now = self._clock()
        for channel in channels:
            channel.is_asked = True
            channel.asked_at = now
        self._unconfirmed.extend(channels)
        self._send(self.commands[0], [channel.name for channel in channels])

    def _send(self, command: str, names: Sequence[bytes]) -> None:
        if self._writer is not None:
            try:
                self._writer.ask_channels(command, names)
            except LinkLost:
                self._writer = None  # `detach` follows, with the reason

    def confirm(self) -> None:
        """Learn that Redis has confirmed the oldest ``SUBSCRIBE``."""
        channel = self._unconfirmed.popleft()
        channel.is_asked = False
        if self.by_name.get(channel.name) is not channel:
            return  # it has been unsubscribed since
        channel.is_heard = True
        if channel.is_missed:
            channel.is_missed = False
            self._missed -= 1
            self._recovered.append(channel.topic)
        else:
            self.subscribe_time.observe(self._clock() - channel.asked_at)
        self._answer(channel, None)

    def refuse(self, fault: str) -> None:
        """Learn that Redis has refused the oldest ``SUBSCRIBE``."""
        channel = self._unconfirmed.popleft()
        if self.by_name.get(channel.name) is not channel:
            return
        if channel.is_missed:  # its subscribers have to learn it: they come back, and are refused
            self._recovered.append(channel.topic)
        self._forget(channel)
        self._answer(channel, fault)

    def _answer(self, channel: TopicChannel, fault: str | None) -> None:
        waiters, channel.waiters = channel.waiters, []
        for waiter in waiters:
            if waiter.done():
                continue
            if fault is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(BusUnavailable(fault))

    def take_recovered(self) -> list[str]:
        """The topics that are heard again after a gap, and have not been taken yet."""
        if len(self._unconfirmed) <= WINDOW - PORTION:
            self._room.set()
        recovered, self._recovered = self._recovered, []
        if recovered:
            topics = len(recovered) - recovered.count("")
            self.resubscribe_time.observe(self._clock() - self._again_since, topics)
        return recovered

    # Connections.

    def attach(self, writer: ChannelWriter) -> None:
        """Learn that there is a connection: subscribe again to what was heard on the last one."""
        self._writer = writer
        self._again_since = self._clock()
        if self._missed:
            self._again = asyncio.create_task(self._guard_again(writer), name="relay-redis-resubscribe")

    def detach(self, reason: str) -> None:
        """Learn that the connection has ended: who waits is refused, and what was heard is missed from now on."""
        self._writer, self.reason = None, reason
        if self._again is not None:
            self._again.cancel()
        self._unconfirmed.clear()
        self._outgoing.clear()
        self._lingering.clear()
        # What has just been heard again may be missed again: that is one gap, after the next confirmation.
        recovered = set(self._recovered)
        self._recovered.clear()
        forgotten: list[TopicChannel] = []
        for channel in self.by_name.values():  # 100 000 in one turn of the event loop: no call for each
            if channel.is_wanted and (channel.is_heard or channel.is_missed or channel.topic in recovered):
                if not channel.is_missed:
                    channel.is_missed = True
                    self._missed += 1
            else:
                forgotten.append(channel)
            channel.is_heard = channel.is_asked = False
            if channel.waiters:
                self._answer(channel, reason)
        for channel in forgotten:
            self._forget(channel)

    async def _guard_again(self, writer: ChannelWriter) -> None:
        try:
            await self._subscribe_again()
        except Exception as error:  # topics may not stay unheard while the link looks live
            _logger.exception("subscribing to topics again failed")
            writer.end(f"internal error: {type(error).__name__}")

    async def _subscribe_again(self) -> None:
        """Subscribe to all topics that were missed, those with most subscribers first."""
        by_subscribers: dict[int, list[TopicChannel]] = {}
        for portion in _portions(tuple(self.by_name.values())):
            for channel in portion:
                by_subscribers.setdefault(self.count_subscribers(channel.topic), []).append(channel)
            await asyncio.sleep(0)
        for count in sorted(by_subscribers, reverse=True):
            for portion in _portions(by_subscribers.pop(count)):
                while len(self._unconfirmed) > WINDOW - PORTION:
                    self._room.clear()
                    _ = await self._room.wait()
                # Others have been asked for by a join meanwhile, or are not wanted any more.
                self._ask([each for each in portion if each.is_missed and not each.is_asked and self._keeps(each)])
                await asyncio.sleep(0)

    def _keeps(self, channel: TopicChannel) -> bool:
        return self.by_name.get(channel.name) is channel

    def close(self) -> None:
        """End what is under way."""
        self.detach("the relay is stopping")
        for timer in (self._timer, self._late):
            if timer is not None:
                timer.cancel()

    def _name(self, topic: str) -> bytes:
        return (self._settings.topic_prefix + topic).encode()


def _portions(channels: Sequence[TopicChannel]) -> Iterable[Sequence[TopicChannel]]:
    return (channels[start : start + PORTION] for start in range(0, len(channels), PORTION))


def check_order(asked: "deque[tuple[str, bytes]]", kind: bytes, reply: Any) -> None:
    """See that a confirmation is that of the command whose turn it is. Raises LinkLost.

    Else one was lost, or has come on its own, and it is not known any more what is heard.

    Args: asked: commands whose replies are still to come, each with its channel or pattern.
          kind: of the reply, such as ``b"subscribe"``, whose second part is the channel.
    """
    command, name = asked[0] if asked else ("", b"")
    if command.endswith("SUBSCRIBE") and (kind != command.lower().encode() or reply[1] != name):
        raise LinkLost(f"{command} {name_of(name)} was not answered")
    if kind in (b"subscribe", b"unsubscribe") and kind != command.lower().encode():
        raise LinkLost(f"Redis has sent {kind.decode()} {name_of(reply[1] or b'')} without being asked")
