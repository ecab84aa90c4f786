"""One sharded subscription to one master of a Redis Cluster.

Owns what is heard there; must not know the other nodes. What guards it is that of a single Redis: see `Session`.

The server unsubscribes a channel unasked when its slot goes to another node, and says so between other replies; the
new owner sometimes does the same a few milliseconds after it was subscribed to. Neither is an answer to anything.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import hiredis

from relay.brokers.base import Event, Sink
from relay.brokers.cluster_channels import OwnChannel, ShardChannels
from relay.brokers.redis_channels import TopicChannel
from relay.brokers.redis_connection import LinkLost, RedisConnection, Role, is_channel_denied, is_denied, name_of, words
from relay.brokers.redis_session import AGAIN_BYTES, Session, SessionOwner
from relay.brokers.redis_topics import NO_NAME
from relay.errors import Reason

PROBES = "relay:probe:"
"""What the channels of probes begin with; a number follows, by which a node serves their slot."""

NEEDS = "redis+cluster:// needs sharded Pub/Sub: Redis 7.0 or later, or Valkey"


class ShardSessionOwner(Protocol):
    """The master, as its subscription knows it, besides what is in `SessionOwner`."""

    channels: ShardChannels

    def report_denied(self, what: str, means: str, allow: str) -> None:
        """Log, once each, what the Redis user may not do, what that means, and what allows it."""

    def probe_channel(self) -> bytes:
        """A channel for probes whose slot this node serves. Raises LinkLost where it serves none."""

    def is_probe(self, channel: bytes) -> bool:
        """Whether a channel is one for probes."""

    def note_lag(self) -> None:
        """Keep the lag that the subscription has just found."""

    def doubt_map(self) -> None:
        """Have the cluster ask who serves which slots."""

    def take_lost(self, names: Sequence[bytes]) -> None:
        """Learn which channels the server has unsubscribed unasked."""

    def take_refused(self, channel: TopicChannel | None, error: hiredis.ReplyError) -> None:
        """Learn that the server does not take a subscription; ``channel`` has been given up."""


class ShardSession(Session):
    """One subscription from its handshake to the end of its connection."""

    def __init__(
        self, shard: ShardSessionOwner, connection: RedisConnection, sink: Sink, on_live: Callable[[], None]
    ) -> None:
        super().__init__(cast(SessionOwner, shard), connection, sink, on_live)
        self._shard = shard
        # Channels that the server has unsubscribed unasked; and whether the channel of probes is heard.
        self._lost: list[bytes] = []
        self._probe_confirmed = asyncio.Event()

    async def _check_role(self) -> None:
        """See that this is a master. Raises LinkLost."""
        self.role: Role | None = await self._connection.role()
        role = self.role
        if role is None:
            self._shard.report_denied("ROLE", "whether Redis is a master is not checked", "+role")
        elif not role.is_master:
            self._shard.doubt_map()
            raise LinkLost(f"the server is {role}, and its slots have another master")

    async def _read(self) -> None:
        connection, sink, metrics, channels = self._connection, self._sink, self._metrics, self._shard.channels
        self._unconfirmed = 1
        self._ask_probe_channel()
        by_name, gets = channels.by_name, connection.replies.gets
        while True:
            self._waiting_since = self._clock()
            await (connection.read(AGAIN_BYTES) if channels.missed else connection.read())
            self._waiting_since = None
            events: list[Event] = []
            while (reply := gets()) is not False:
                if isinstance(reply, hiredis.ReplyError):
                    self._take_refusal(reply)
                    continue
                if reply[0] != b"smessage":
                    self._take_answer(reply)
                    continue
                _, name, payload = reply
                heard, colon = by_name.get(name), payload.find(b":")
                if type(heard) is TopicChannel:
                    if heard.is_missed:  # from before its gap, which is not reported yet
                        metrics.dropped[Reason.EVENTS_MISSED] += 1
                    elif colon > 0 and payload[0] not in NO_NAME:  # a plain live event
                        events.append(
                            Event(heard.topic, payload[:colon].decode(errors="replace"), payload[colon + 1 :])
                        )
                        metrics.events_on_topics += 1
                    elif (event := self._unpack(heard.topic, payload)) is not None:
                        events.append(event)
                elif isinstance(heard, OwnChannel):
                    heard.receive(payload)
                elif payload == self._probe:
                    self._take_probe()
            # Before the events that follow on the gap.
            if recovered := channels.take_recovered():
                self._report_gap(channels.reason, recovered)
                await asyncio.sleep(0)  # many are read at once, and heartbeats are to be answered between them
            if events:
                self._heard_at = connection.read_at
                await sink.receive_events(events)
            # Behind the events that came before: another connection brings those that follow.
            if self._lost:
                lost, self._lost = self._lost, []
                self._take_lost(lost)

    def _report_gap(self, reason: str, recovered: list[str]) -> None:
        topics = [topic for topic in recovered if topic]
        if len(topics) < len(recovered):
            self._sink.on_gap(reason, ())
        if topics:
            self._sink.on_gap(reason, topics)

    def _ask_probe_channel(self) -> None:
        self._probe_confirmed.clear()
        self._probe_channels = [self._shard.probe_channel()]
        self.ask_channels("SSUBSCRIBE", self._probe_channels)

    def _take_lost(self, names: list[bytes]) -> None:
        self._shard.take_lost(names)
        if self._probe_channels and self._probe_channels[0] in names:
            self._probe_confirmed.clear()

    def map_was_read(self) -> None:
        """Learn that it is known who serves which slots: another channel is taken for probes, if its slot has gone."""
        if self._confirmed.is_set() and self._probe_channels and not self._probe_confirmed.is_set():
            try:
                self._ask_probe_channel()
            except LinkLost as lost:
                self.end(str(lost))

    # Answers.

    def _take_answer(self, reply: Any) -> None:
        """Take a confirmation, or what the server says without being asked. Raises LinkLost."""
        kind = reply if isinstance(reply, bytes) else reply[0]
        if kind == b"ssubscribe":
            command, name = self._asked.popleft() if self._asked else ("", b"")
            if command != "SSUBSCRIBE" or name != reply[1]:
                raise LinkLost(f"{command or 'nothing'} {name_of(name)} was not answered")
            self._confirm(name)
        elif kind == b"sunsubscribe":
            if self._asked and self._asked[0] == ("SUNSUBSCRIBE", reply[1]):
                _ = self._asked.popleft()
            else:
                self._lost.append(reply[1])
        else:
            if self._asked and self._asked[0][0] != "PING":
                raise LinkLost(f"{self._asked[0][0]} {name_of(self._asked[0][1])} was not answered")
            super()._take_answer(reply)

    def _confirm(self, name: bytes) -> None:
        if self._probe_channels and name == self._probe_channels[0]:
            self._probe_confirmed.set()
            if not self._confirmed.is_set():
                self._confirm_one()
        elif not self._shard.is_probe(name):
            self._shard.channels.confirm()

    def _take_refusal(self, error: hiredis.ReplyError) -> None:
        """Take an error reply. Raises LinkLost where nothing can be heard without what it refuses."""
        command, name = self._asked[0] if self._asked else ("", b"")
        if command == "SSUBSCRIBE":
            _ = self._asked.popleft()
            if self._shard.is_probe(name):
                self._refuse_probe(name, error)
            else:
                self._refuse(name, error)
        elif command == "SUNSUBSCRIBE":  # else its slot has moved, and with it the subscription
            _ = self._asked.popleft()
            if is_denied(error):
                means = "topics that were left are still heard here"
                self._shard.report_denied("SUNSUBSCRIBE", means, "+sunsubscribe")
        else:
            super()._take_refusal(error)

    def _refuse_probe(self, name: bytes, error: hiredis.ReplyError) -> None:
        if "unknown command" in str(error).lower():
            raise LinkLost(f"{NEEDS} (this server knows no SSUBSCRIBE)")
        if is_channel_denied(error):
            self._shard.report_denied(
                f"SSUBSCRIBE {name_of(name)}", "what is heard is not checked by probes", f"&{PROBES}*"
            )
            self._probe_channels = []
            self._confirm_one()
            return
        self._shard.doubt_map()
        if not self._confirmed.is_set():
            raise LinkLost(f"SSUBSCRIBE {name_of(name)}: {words(error)}")

    def _refuse(self, name: bytes, error: hiredis.ReplyError) -> None:
        channels, shard = self._shard.channels, self._shard
        if not is_denied(error):  # MOVED, CLUSTERDOWN, LOADING: the map says who is to be asked next
            shard.take_refused(channels.withdraw_refused(), error)
        elif isinstance(channels.by_name.get(name), OwnChannel):
            means = "messages of other nodes are not heard"
            shard.report_denied(f"SSUBSCRIBE {name_of(name)}", means, f"&{name_of(name)}")
            channels.refuse(words(error))
        else:
            prefix = self._settings.topic_prefix
            means = f"clients cannot join topics that the Redis user may not hear, such as {name_of(name)}"
            shard.report_denied(f"SSUBSCRIBE {prefix}*", means, f"+ssubscribe &{prefix}*")
            channels.refuse(f"SSUBSCRIBE {name_of(name)}: {words(error)}")

    # Guarding.

    def _take_pong(self) -> None:
        super()._take_pong()
        self._shard.note_lag()

    async def _send_probe(self) -> bool:
        """Publish a probe, once its channel is heard; see `Session`. Raises LinkLost."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._probe_confirmed.wait()
        except TimeoutError:
            raise LinkLost(f"no answer to SSUBSCRIBE within {self._settings.timeout_s:g} s") from None
        return await super()._send_probe()
