"""One subscription to Redis, from its handshake to the end of its connection, with what guards it.

Owns what is heard and the proof that it is heard; must not know when another is begun.

The subscription's bytes go through ``hiredis.Reader`` directly, 1.2 µs an event; redis-py's own listener takes 20 µs,
and at 40 000 events/s Redis cut it off for its output buffer.

A connection that answers may hear nothing: its server has become a replica, or another one than that which takes the
pushes. So the relay asks for the server's role, and publishes probes that must come back on the subscription.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol

import hiredis

from relay.brokers import redis_topics
from relay.brokers.base import NODE_CHANNEL, Event, Sink
from relay.brokers.redis_channels import TopicChannels, check_order
from relay.brokers.redis_connection import (
    Connections,
    LinkLost,
    RedisConnection,
    Role,
    is_channel_denied,
    is_denied,
    name_of,
    packed,
    read_role,
    words,
)
from relay.brokers.redis_marker import PROBE, Markers
from relay.brokers.redis_publisher import Publisher
from relay.brokers.redis_topics import NO_NAME
from relay.config_redis import RedisConfig
from relay.errors import BusUnavailable, Reason
from relay.metrics import Metrics
from relay.protocol.topics import from_redis_channel, glob_escape

_logger = logging.getLogger("relay.redis")

_PROBE_EVERY_S = 60.0
"""Seconds between two probes while events flow."""


AGAIN_BYTES = 16 * 1024
"""Most bytes read at a time while topics are subscribed to again: some 350 confirmations, each with a gap to report."""


class SessionOwner(Protocol):
    """The broker, as its subscription knows it."""

    address: str
    settings: RedisConfig
    metrics: Metrics
    clock: Callable[[], float]
    connections: Connections
    publisher: Publisher
    markers: Markers
    patterns: tuple[str, ...]
    """Raw patterns to hear besides."""
    is_doubted: bool
    """Whether hearing has to be proved by a probe before the subscription counts as live."""
    channels: TopicChannels | None
    """The topics that are subscribed to one by one; None where all are heard by patterns."""
    topics_pattern: bytes
    """Matches the topics' own channels; empty where they are not heard by a pattern."""
    hears_topics: bool
    """Whether the topics' own channels may be heard."""

    def report_denied(self, what: str, means: str, allow: str) -> None:
        """Log, once each, what the Redis user may not do, what that means, and what allows it."""

    def report_nameless(self, topic: str) -> None:
        """Count a message on the channel of a topic that names no event."""


class Session:
    """One subscription from its handshake to the end of its connection, with what guards it."""

    def __init__(
        self, broker: SessionOwner, connection: RedisConnection, sink: Sink, on_live: Callable[[], None]
    ) -> None:
        self._broker = broker
        self._connection = connection
        self._sink = sink
        self._on_live = on_live
        self._settings = settings = broker.settings
        self._metrics = broker.metrics
        self._clock = broker.clock
        self._channels = broker.channels
        self._pattern = (glob_escape(settings.to_prefix) + "*").encode()
        # A pattern or, where topics are subscribed to one by one, a channel.
        escape = glob_escape if broker.channels is None else str
        self._control = escape(settings.control_channel).encode()
        # Subscribed to by their names: a rule such as &relay:node:* allows no pattern but itself.
        self._own = sorted(raw.encode() for raw in broker.patterns if raw.startswith(NODE_CHANNEL))
        # Until Redis says that they may not be heard.
        broker.hears_topics = True
        self._probe_channels = list(broker.markers.channels)
        # Commands whose replies are still to come, with their pattern; and how many patterns are not confirmed yet.
        self._asked: deque[tuple[str, bytes]] = deque()
        self._asked_together: Sequence[bytes] = ()
        self._unconfirmed = 0
        self._confirmed = asyncio.Event()
        self._is_live = False
        self.role: Role | None = None
        self._fault = ""
        # When the reader began to wait for bytes; None while it is busy with what it has.
        self._waiting_since: float | None = None
        # When the subscription was pinged, while the answer is still to come; and when the last ping answered was sent.
        self._pinged_at: float | None = None
        self._answered_ping = 0.0
        self._may_ping = True
        # When an event came last; the probe that is under way, and whether it has come back.
        self._heard_at = self._clock()
        self._probe = b""
        self._probe_heard = asyncio.Event()

    def end(self, fault: str) -> None:
        """Cut the connection."""
        self._fault = self._fault or fault
        self._connection.abort()

    async def run(self) -> str:
        """Serve the connection to its end; returns why it has ended."""
        guards: list[asyncio.Task[None]] = []
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._check_role()
            guards = [asyncio.create_task(self._guard(work)) for work in (self._watch, self._prove)]
            await self._read()
        except (LinkLost, hiredis.HiredisError) as lost:
            return self._fault or (str(lost) if isinstance(lost, LinkLost) else words(lost))
        except TimeoutError:
            return f"no answer to ROLE within {self._settings.timeout_s:g} s"
        else:
            raise AssertionError("reading ends with an exception")
        finally:
            for guard in guards:
                guard.cancel()
            _ = await asyncio.gather(*guards, return_exceptions=True)

    async def _guard(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        try:
            await work()
        except LinkLost as lost:
            self.end(str(lost))
        except Exception as error:  # an unguarded subscription may go deaf
            _logger.exception("guard of the Redis subscription failed")
            self.end(f"internal error: {type(error).__name__}")

    # Reading.

    async def _check_role(self) -> None:
        """See that there is something to be heard. Raises LinkLost."""
        broker, connection = self._broker, self._connection
        self.role = role = await connection.role()
        if role is None:
            broker.report_denied("ROLE", "whether Redis is a master is not checked", "+role")
        elif not role.is_linked or (broker.connections.asks_sentinels and not role.is_master):
            raise LinkLost(f"the server is {role}")
        elif not role.is_master:
            _logger.warning("subscribing on a replica: %s; events are heard through its master", broker.address)
            # Under RESP3 it can be asked again while it is subscribed; where it knows none, the probes are left.
            if connection.protocol == 2 and not isinstance(await connection.ask("HELLO", "3"), hiredis.ReplyError):
                connection.protocol = 3

    async def _read(self) -> None:
        connection, sink, metrics = self._connection, self._sink, self._metrics
        prefix = self._settings.to_prefix.encode()
        pattern, control, fallback = self._pattern, self._control, self._broker.markers.fallback
        read_marker, marker = self._broker.markers.unpack, None
        raw = {raw.encode() for raw in self._broker.patterns}.difference(self._own)  # each is reported once
        # Those for events come last: none is heard before all are confirmed, so that live means all of them.
        topics, topic_at = self._broker.topics_pattern, len(self._settings.topic_prefix.encode())
        channels = self._channels
        own = self._own if channels is None else [*self._own, *filter(None, (control, fallback))]
        patterns = (*sorted(raw), *(filter(None, (control, pattern, topics)) if channels is None else ()))
        self._unconfirmed = len(patterns) + len(own)
        self.ask_channels("SUBSCRIBE", own)
        self._subscribe(patterns, one_by_one=channels is not None)
        by_name = {} if channels is None else channels.by_name
        gets = connection.replies.gets
        while True:
            self._waiting_since = self._clock()
            await (connection.read(AGAIN_BYTES) if channels is not None and channels.missed else connection.read())
            self._waiting_since = None
            events: list[Event] = []
            while (reply := gets()) is not False:
                if isinstance(reply, hiredis.ReplyError):
                    self._take_refusal(reply)
                    continue
                if reply[0] != b"pmessage":
                    if reply[0] != b"message":
                        self._take_answer(reply)
                        continue
                    _, channel, payload = reply
                    heard, colon = by_name.get(channel), payload.find(b":")
                    if heard is not None and colon > 0 and payload[0] not in NO_NAME:  # a plain live event
                        events.append(
                            Event(heard.topic, payload[:colon].decode(errors="replace"), payload[colon + 1 :])
                        )
                        metrics.events_on_topics += 1
                    elif (event := self._take_message(channel, payload)) is not None:
                        events.append(event)
                    continue
                _, of, channel, payload = reply
                if of == pattern and channel != fallback:
                    names = from_redis_channel(prefix, channel)
                    if names is None:
                        metrics.dropped["channel names no event"] += 1
                    elif marker is not None and marker.belongs_to(channel, payload):
                        events.append(Event(*names, payload, None, marker.sender))
                        marker = None
                    else:
                        events.append(Event(names[0], names[1], payload))
                elif of == topics:
                    event = self._unpack(channel[topic_at:], payload)
                    if event is not None:
                        events.append(event)
                elif payload.startswith(PROBE) and (channel == fallback or of == control):
                    if payload == self._probe:
                        self._take_probe()
                    marker = read_marker(payload) or marker
                    continue
                elif of == control:
                    sink.receive_control(payload)
                if of in raw:
                    sink.receive_message(of.decode(), channel.decode(errors="replace"), payload)
            # Before the events that follow on the gap.
            if channels is not None and (recovered := channels.take_recovered()):
                sink.on_gap(channels.reason, recovered)
                await asyncio.sleep(0)  # many are read at once, and heartbeats are to be answered between them
            if events:
                self._heard_at = connection.read_at
                if self._is_live:
                    await sink.receive_events(events)
                else:
                    metrics.dropped[Reason.EVENTS_MISSED] += len(events)

    def _unpack(self, topic: bytes | str, data: bytes) -> Event | None:
        """Read a message on a topic's channel; None, counted, where it names no event."""
        try:
            event = redis_topics.unpack(topic if isinstance(topic, str) else topic.decode(), data)
        except UnicodeDecodeError:
            self._metrics.dropped["channel names no event"] += 1
            return None
        if event is None:
            self._broker.report_nameless(topic if isinstance(topic, str) else topic.decode())
        elif event.event or event.position is None:
            self._metrics.events_on_topics += 1
        return event

    def _take_message(self, name: bytes, payload: bytes) -> Event | None:
        """Take a message on a channel that is subscribed to by its name."""
        if name in self._own:
            self._sink.receive_message(name.decode(), name.decode(), payload)
            return None
        if self._channels is not None and (channel := self._channels.by_name.get(name)) is not None:
            return self._unpack(channel.topic, payload)
        if name in (self._control, self._broker.markers.fallback):
            if payload.startswith(PROBE):
                if payload == self._probe:
                    self._take_probe()
            elif name == self._control:
                self._sink.receive_control(payload)
            return None
        return self._unpack(name[len(self._settings.topic_prefix.encode()) :], payload)  # it was left a moment ago

    def _subscribe(self, patterns: Sequence[bytes], *, one_by_one: bool = False) -> None:
        """Ask for patterns in one command, which a server refuses as a whole, or in one for each."""
        self._asked_together = () if one_by_one else patterns
        self._asked.extend(("PSUBSCRIBE", each) for each in patterns)
        commands = [(b"PSUBSCRIBE", each) for each in patterns] if one_by_one else [(b"PSUBSCRIBE", *patterns)]
        self._connection.write(packed(commands))

    def ask_channels(self, command: str, names: Sequence[bytes]) -> None:
        """Send ``SUBSCRIBE`` or ``UNSUBSCRIBE`` for each channel, in one write. Raises LinkLost."""
        self._asked.extend((command, name) for name in names)
        head = b"*2\r\n$%d\r\n%b\r\n$" % (len(command), command.encode())
        self._connection.write(b"".join([b"%b%d\r\n%b\r\n" % (head, len(name), name) for name in names]))

    def _take_answer(self, reply: Any) -> None:
        """Take the answer to a command: ``["psubscribe", pattern, 1]``, ``["pong", ""]``, or what `read_role` reads."""
        kind = reply if isinstance(reply, bytes) else reply[0]
        if self._channels is not None:
            check_order(self._asked, kind, reply)
        if kind == b"psubscribe":
            _ = self._asked.popleft()
            self._confirm_one()
        elif kind == b"subscribe":
            _ = self._asked.popleft()
            if self._channels is not None and self._confirmed.is_set():
                self._channels.confirm()
            else:
                self._confirm_one()
        elif kind == b"unsubscribe" and self._channels is not None:
            _ = self._asked.popleft()
        elif kind in (b"pong", b"PONG"):
            _ = self._asked.popleft()
            self._take_pong()
        elif kind in (b"master", b"slave", b"sentinel"):
            _ = self._asked.popleft()
            if (role := read_role(reply)) != self.role:
                raise LinkLost(f"the server has become {role}")

    def _take_refusal(self, error: hiredis.ReplyError) -> None:
        """Take an error reply. Raises LinkLost where nothing can be heard without what it refuses."""
        command, pattern = self._asked.popleft() if self._asked else ("", b"")
        if command == "PING":
            self._take_pong()  # a sign of life, whatever it says
            if is_denied(error):
                self._may_ping = False
                self._broker.report_denied("PING", "the connections are guarded by probes alone", "+ping")
        elif command == "PSUBSCRIBE" and len(self._asked_together) > 1 and is_denied(error):
            self._asked.clear()  # nothing else is asked before all patterns are confirmed
            self._subscribe(self._asked_together, one_by_one=True)
        elif (
            pattern
            and pattern == self._control
            and (is_denied(error) if command == "PSUBSCRIBE" else is_channel_denied(error))
        ):
            del self._probe_channels[0]
            self._broker.publisher.mark_elsewhere(self._settings.control_channel.encode())
            self._control_denied()
            self._confirm_one()
        elif command == "PSUBSCRIBE" and pattern == self._broker.topics_pattern and is_denied(error):
            name = self._settings.topic_prefix
            means = "events that are published there are not heard here, and histories are not read"
            self._broker.report_denied(f"PSUBSCRIBE {name}*", means, f"~{name}* &{name}*")
            self._broker.hears_topics = False
            self._confirm_one()
        elif pattern in self._own and is_denied(error):
            means = "long polls that reach another process than their session's are not answered here"
            allow = f"{'' if is_channel_denied(error) else '+subscribe '}&{NODE_CHANNEL}*"
            self._broker.report_denied(f"SUBSCRIBE {NODE_CHANNEL}*", means, allow)
            self._confirm_one()
        elif command == "SUBSCRIBE" and self._channels is not None and is_channel_denied(error):
            self._channel_denied(self._channels, pattern, words(error))
        elif command.endswith("PSUBSCRIBE") or (command == "SUBSCRIBE" and not self._confirmed.is_set()):
            raise LinkLost(f"{command} {name_of(pattern)}: {words(error)}")
        elif command == "SUBSCRIBE" and self._channels is not None:
            self._channels.refuse(f"SUBSCRIBE {name_of(pattern)}: {words(error)}")
        elif command == "UNSUBSCRIBE" and is_denied(error):
            self._broker.report_denied("UNSUBSCRIBE", "topics that were left are still heard here", "+unsubscribe")
        elif command != "ROLE":
            raise LinkLost(words(error))

    def _channel_denied(self, channels: TopicChannels, name: bytes, why: str) -> None:
        """Learn that one channel may not be heard: that of a topic, or of probes."""
        if self._confirmed.is_set():
            prefix = self._settings.topic_prefix
            means = f"clients cannot join topics that the Redis user may not hear, such as {name_of(name)}"
            self._broker.report_denied(f"SUBSCRIBE {prefix}*", means, f"&{prefix}*")
            channels.refuse(f"SUBSCRIBE {name_of(name)}: {why}")
            return
        self._probe_channels.remove(name)
        if not self._probe_channels:
            means = "what is heard is not checked by probes"
            self._broker.report_denied(f"SUBSCRIBE {name_of(name)}", means, f"&{name_of(name)}")
        self._confirm_one()

    def _control_denied(self) -> None:
        name = self._settings.control_channel
        means = "control messages of other nodes (disconnect, kick) are not heard here"
        self._broker.report_denied(f"PSUBSCRIBE {name}", means, f"&{name}")

    def _confirm_one(self) -> None:
        self._unconfirmed -= 1
        if not self._unconfirmed:
            self._confirmed.set()
            if not self._broker.is_doubted:
                self._go_live()

    def _go_live(self) -> None:
        if not self._is_live:
            self._is_live = True
            self._on_live()
            if self._channels is not None:
                self._channels.attach(self)

    # Guarding.

    def _take_pong(self) -> None:
        if self._pinged_at is not None:
            self._metrics.link_lag_s = self._clock() - self._pinged_at
            self._answered_ping = self._pinged_at
            self._pinged_at = None

    def _ping(self) -> None:
        if self._may_ping and self._pinged_at is None:
            self._asked.append(("PING", b""))
            self._pinged_at = self._clock()
            self._connection.write(packed([("PING",)]))

    async def _watch(self) -> None:
        """Ping the connection, and abort it when nothing comes back: a dead peer sends no FIN.

        A busy connection is pinged too: how long the answer takes is the lag of the events beside it.
        """
        settings, timeout_s = self._settings, self._settings.ping_timeout_s
        try:
            async with asyncio.timeout(settings.timeout_s):
                await self._confirmed.wait()
        except TimeoutError:
            raise LinkLost(f"no answer to PSUBSCRIBE within {settings.timeout_s:g} s") from None
        pause_s = max(settings.ping_interval_s - timeout_s, settings.ping_interval_s / 2)
        while True:
            await asyncio.sleep(pause_s)
            looked_at = self._clock()
            self._ping()
            if self.role is not None and not self.role.is_master and self._connection.protocol == 3:
                self._asked.append(("ROLE", b""))
                self._connection.write(packed([("ROLE",)]))
            await asyncio.sleep(timeout_s)
            if self._is_silent_since(looked_at) and self._pinged_at is not None:
                await asyncio.sleep(timeout_s / 8)  # what came while the loop was blocked is read first
                if self._is_silent_since(looked_at) and self._pinged_at is not None:
                    raise LinkLost(f"no answer to PING within {timeout_s:g} s")
            if self._pinged_at is not None:  # the answer is still behind the events
                self._metrics.link_lag_s = self._clock() - self._pinged_at
            asked_at = None if self._channels is None else self._channels.waits_since
            if (
                asked_at is not None
                and self._clock() - asked_at > settings.timeout_s
                and self._waiting_since is not None
            ):
                raise LinkLost(f"no answer to SUBSCRIBE within {settings.timeout_s:g} s")

    def _is_silent_since(self, then: float) -> bool:
        since = self._waiting_since  # None: busy with what has come, so alive
        return since is not None and since <= then

    async def _prove(self) -> None:
        """Publish a probe after each interval without an event, and once a minute with, and see that it is heard."""
        interval_s = self._settings.ping_interval_s
        await self._confirmed.wait()
        probed_at = self._clock()
        is_due = self._broker.is_doubted
        while self._probe_channels:
            due_at = min(max(self._heard_at, probed_at) + interval_s, probed_at + max(_PROBE_EVERY_S, interval_s))
            if not is_due and (wait_s := due_at - self._clock()) > 0:
                await asyncio.sleep(wait_s)
                continue
            probed_at = self._clock()
            # A replica's own messages reach its own clients only: there the role says what can be said.
            if not self._broker.publisher.is_at_master or await self._send_probe():
                self._go_live()
            is_due = not self._is_live
        self._go_live()

    async def _send_probe(self) -> bool:
        """Publish a probe; False where it could not be published. Raises LinkLost where it was not heard."""
        self._probe = self._broker.markers.next_probe()
        self._probe_heard.clear()
        channel = self._probe_channels[0]
        sent_at = self._clock()
        try:
            await self._broker.publisher.publish(channel, self._probe)
        except BusUnavailable as error:
            if "NOPERM" not in str(error):
                await asyncio.sleep(self._settings.ping_timeout_s)  # the publisher looks after its own connection
                return False
            self._probe_channels.remove(channel)
            name = name_of(channel)
            means = "another channel is tried" if self._probe_channels else "what is heard is not checked by probes"
            self._broker.report_denied(f"PUBLISH {name}", means, f"+publish &{name}")
            return bool(self._probe_channels) and await self._send_probe()
        await self._expect_probe(sent_at)
        return True

    async def _expect_probe(self, sent_at: float) -> None:
        timeout_s = self._settings.ping_timeout_s
        if await self._hears(timeout_s):
            return
        self._ping()
        # A ping sent later and answered has nothing waiting before it any more.
        while not await self._hears(timeout_s / 2):
            is_read_up = self._answered_ping > sent_at if self._may_ping else self._waiting_since is not None
            if is_read_up or self._is_silent_since(sent_at):
                self._broker.is_doubted = True
                self._broker.publisher.reconnect()
                raise LinkLost(f"a probe that was published did not come back within {timeout_s:g} s")
            self._ping()

    async def _hears(self, timeout_s: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._probe_heard.wait()
        return self._probe_heard.is_set()

    def _take_probe(self) -> None:
        if not self._may_ping:
            self._metrics.link_lag_s = 0.0
        self._probe_heard.set()
