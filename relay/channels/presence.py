"""Presence: who has joined a topic, on all nodes.

Owns this node's members, and what nodes say to each other about theirs. Must not know how members are kept for other
nodes, nor what subscribers are shown.

Each node sends its own members' changes to the others, in numbered messages; no other node changes them. Where the link
was lost, a number is missing, or the digests that come with each sign of life do not agree with what is known of a
node, its members are read again, and the subscribers are sent the difference. So a lost message heals within one lease.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial

from relay.brokers.base import Lease, Numbering, OwnChange, PresenceStore
from relay.channels.presence_leases import NodeLeases
from relay.channels.presence_limit import ChangeLimiter
from relay.channels.presence_messages import Change, Message, decode, encode, packed, take_portion
from relay.channels.presence_topic import WINDOW_S, PresenceTopic, Watcher, count_members
from relay.config import Config
from relay.errors import BusUnavailable
from relay.log import RateLimitedLogger
from relay.metrics import Metrics
from relay.protocol import presence
from relay.protocol.presence import NOTHING, Difference, Member, Members

_AGAIN_S = 1.0
"""Seconds after which what could not be written is written again."""

_READS = 100
"""Reads of members under way at most. After an outage all topics' are due, and each read has a time limit."""

_LOOKS = 500
"""Topics of which one renewal of the lease looks whether the store still has their members from here."""

_COUNT_KEY = "#"
"""Key of what stands for all members of a node where their number alone is sent."""


class Presence:
    """The members of all topics with presence, as this node knows them.

    Args: store: keeps members for the other nodes.
          is_hearing: says whether messages of other nodes are received now.
          spawn: runs something until it ends or the relay stops.
    """

    def __init__(
        self,
        config: Config,
        store: PresenceStore,
        is_hearing: Callable[[], bool],
        spawn: Callable[[Coroutine[None, None, None]], "asyncio.Task[None]"],
        metrics: Metrics,
        log: RateLimitedLogger,
    ) -> None:
        self._config = config
        self._node = store.node
        self._store = store
        self._is_hearing = is_hearing
        self._spawn = spawn
        self._metrics = metrics
        self._log = log
        self._topics: dict[str, PresenceTopic] = {}
        # Nodes that are alive, each with the number of its last message; None before the first.
        self._nodes: dict[str, int | None] = {}
        self._leases = NodeLeases(config.presence.lease_s, asyncio.get_running_loop().time)
        self._number = 0
        # Number of the last write that was answered; whether Redis has lost something of what was written; and whether
        # all members are being written again.
        self._written = 0
        self._is_lost = False
        self._is_rewriting = False
        # Topics whose members are looked for in the store before the others, and whether that is due.
        self._unlooked: list[str] = []
        self._is_look_due = False
        # Changes to be sent to the other nodes, and topics that have changed since the last sign of life.
        self._outgoing: dict[str, Difference] = {}
        self._changed_topics: set[str] = set()
        self._wake = asyncio.Event()
        # Whether what is known of other nodes is as new as their last messages; and checks of that under way.
        self._could_renew = False
        self._checks = 0
        # Members to be read again, and how many tasks do so.
        self._unread: deque[tuple[PresenceTopic, str]] = deque()
        self._readers = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._limiter = ChangeLimiter(config.limits.presence_per_s, metrics)

    def start(self) -> None:
        """Begin to exchange members with other nodes."""
        self._tasks = [self._spawn(self._renew_regularly()), self._spawn(self._publish_regularly())]

    async def stop(self) -> None:
        """Let the other nodes know that no member is left here."""
        self._limiter.stop()
        for topic in self._topics.values():
            topic.stop()
        for task in self._tasks:
            task.cancel()
        message = encode(Message(self._node, self._number, is_last=True))
        try:
            await self._store.remove(self._node, message)
        except BusUnavailable as error:
            self._log.warning("presence", "members of this node are left behind: %s", error)

    # Members of this node.

    def track(self, channel: Watcher, key: str, meta: bytes) -> None:
        """List a channel under a key, or change what is said of it there; both as `check` has accepted them."""
        topic = self._topic(channel.topic)
        refs = topic.tracked.setdefault(channel, {})
        previous = refs.get(key, "")
        member = Member(secrets.token_hex(8), key, meta, previous)
        refs[key] = member.ref
        gone = {previous: topic.members[previous]} if previous else {}
        self._change_own(topic, Difference({member.ref: member}, gone))

    def track_later(self, channel: Watcher, key: str, meta: bytes, *, is_update: bool = False) -> None:
        """The same on behalf of a plugin, within the rate of the socket.

        Args: is_update: nothing is done where the channel is not listed under the key.
        """
        is_first = not is_update and not self._refs(channel)

        def change() -> None:
            if not is_update or key in self._refs(channel):
                self.track(channel, key, meta)

        self._limiter.run(channel, key, change, is_first=is_first)

    def untrack_later(self, channel: Watcher, key: str | None) -> None:
        """List a channel no more under a key, or under any, within the rate of the socket."""
        self._limiter.run(channel, key, partial(self.untrack, channel, key))

    def _refs(self, channel: Watcher) -> dict[str, str]:
        """What a channel is listed under: refs by key."""
        topic = self._topics.get(channel.topic)
        return {} if topic is None else topic.tracked.get(channel, {})

    def check(self, key: str, meta: bytes) -> bytes:
        """Check what a member is to be listed under and what is said of it; returns the latter without reserved names.

        Raises ValueError.
        """
        if not presence.is_key(key):
            raise ValueError(f"expected a key of 1 to 255 bytes without control characters, got {key!r:.60}")
        cleaned = presence.clean_meta(meta)
        most = self._config.limits.presence_meta_max_bytes
        if cleaned is None or len(cleaned) > most:
            raise ValueError(f"expected a JSON object of at most {most} bytes as meta, got {meta[:60]!r}")
        return cleaned

    def untrack(self, channel: Watcher, key: str | None = None) -> None:
        """List a channel no more under a key, or under any."""
        topic = self._topics.get(channel.topic)
        if topic is None or channel not in topic.tracked:
            return
        refs = topic.tracked[channel]
        keys = list(refs) if key is None else [key] if key in refs else []
        gone = {ref: topic.members[ref] for ref in map(refs.pop, keys)}
        if not refs:
            del topic.tracked[channel]
        if gone:
            self._change_own(topic, Difference({}, gone))

    def _change_own(self, topic: PresenceTopic, change: Difference) -> None:
        presence.apply(topic.members, change)
        self._metrics.presence_members += len(change.joins) - len(change.leaves)
        if topic.settings.presence == "count":
            count = Member(secrets.token_hex(8), _COUNT_KEY, b'{"count":%d}' % len(topic.members))
            change = Difference({count.ref: count} if topic.members else {}, dict(topic.own))
        presence.apply(topic.own, change)
        topic.changed()
        presence.extend(self._outgoing.setdefault(topic.name, Difference({}, {})), change)
        self._changed_topics.add(topic.name)
        self._wake.set()

    # Subscribers.

    def watch(self, channel: Watcher) -> None:
        """Send a channel's client the members, and from then on the changes."""
        topic = self._topic(channel.topic)
        topic.watchers[channel] = topic.newcomers[channel] = None
        topic.changed()

    def is_counted(self, name: str) -> bool:
        """Whether the subscribers of a topic are sent the number of its members, not the members."""
        topic = self._topics.get(name)
        return self._config.topic(name).presence == "count" or (topic is not None and topic.is_counted)

    def unwatch(self, channel: Watcher) -> None:
        """Send it nothing more, and list it no more: its subscription has ended."""
        self._limiter.forget(channel)
        self.untrack(channel)
        topic = self._topics.get(channel.topic)
        if topic is None:
            return
        _ = topic.watchers.pop(channel, None)
        _ = topic.newcomers.pop(channel, None)
        if topic.is_unused:
            topic.linger(self._config.presence.leave_delay_s, partial(self._drop, topic))

    def _drop(self, topic: PresenceTopic) -> None:
        if topic.is_unused and self._topics.get(topic.name) is topic:
            topic.stop()
            del self._topics[topic.name]

    def _topic(self, name: str) -> PresenceTopic:
        topic = self._topics.get(name)
        if topic is None:
            topic = self._topics[name] = PresenceTopic(name, self._config, self._metrics)
            for node in self._nodes:
                self._load(topic, node)
        return topic

    # Other nodes.

    def receive(self, data: bytes) -> None:
        """Take what a node has said; this one's own messages, and those that cannot be read, are ignored."""
        message = decode(data)
        if message is None:
            self._metrics.dropped["presence message not understood"] += 1
            self._log.warning("presence", "message about presence dropped: not understood")
            return
        node = message.node
        if node == self._node:
            return
        if message.is_last:
            self._forget(node)
            return
        before = self._nodes.get(node)
        expected = message.number if message.digests or not message.changes else message.number - 1
        is_known = node in self._nodes
        self._nodes[node] = message.number
        for change in message.changes:
            topic = self._topics.get(change.topic)
            if topic is not None:
                self._apply(topic, node, change)
        if not is_known or (before is not None and before != expected):
            if is_known:
                self._metrics.presence_heals["message missing"] += 1
            for topic in self._topics.values():
                self._load(topic, node)
            return
        for name, (count, digest) in message.digests.items():
            topic = self._topics.get(name)
            if topic is None or node in topic.loading:
                continue
            part = topic.parts.get(node, {})
            if (len(part), presence.digest(part)) != (count, digest):
                self._metrics.presence_heals["digest"] += 1
                self._load(topic, node)

    def after_gap(self) -> None:
        """Read the members of those nodes again whose messages have been lost."""
        self._checks += 1
        _ = self._spawn(self._check_numbers())

    async def _check_numbers(self) -> None:
        try:
            for node in await self._store.nodes():
                if node != self._node:
                    _ = self._nodes.setdefault(node, None)  # it has started meanwhile
            nodes = list(self._nodes)
            numbers = await self._store.numbers(nodes)
        except BusUnavailable as error:
            self._log.warning("presence", "whether messages about members were lost is not known: %s", error)
            self._could_renew = False  # all members are read again with the next lease
            return
        finally:
            self._checks -= 1
        for node, number in zip(nodes, numbers, strict=True):
            if number is None:
                self._could_renew = False
            elif node in self._nodes and number > (self._nodes[node] or 0):
                self._metrics.presence_heals["message missing"] += 1
                for topic in self._topics.values():
                    self._load(topic, node)

    def _apply(self, topic: PresenceTopic, node: str, change: Change) -> None:
        joins = {
            ref: Member(ref, key, bytes(meta), previous)
            for ref, key, meta, previous in change.joins
            if presence.is_member(key, meta)
        }
        gone = Difference(joins, {ref: _GONE for ref in change.leaves})
        if node in topic.loading:
            topic.loading[node].append(gone)
            return
        presence.apply(topic.parts.setdefault(node, {}), gone)
        topic.changed()

    def _load(self, topic: PresenceTopic, node: str) -> None:
        """Read the members of a node again."""
        if node != self._node and node not in topic.loading:
            topic.loading[node] = []
            self._unread.append((topic, node))
            if self._readers < _READS:
                self._readers += 1
                _ = self._spawn(self._load_parts())

    async def _load_parts(self) -> None:
        try:
            while self._unread:
                await self._load_part(*self._unread.popleft())
        finally:
            self._readers -= 1

    async def _load_part(self, topic: PresenceTopic, node: str) -> None:
        try:
            members = await self._store.read(topic.name, node, self._nodes.get(node) or 0)
        except BusUnavailable as error:
            self._log.warning("presence", "members of topic %r cannot be read: %s", topic.name, error)
            members = None
        finally:
            changes = topic.loading.pop(node, [])
        if members is None:
            # Redis has lost them, or does not answer: they are left as they are, and read again later.
            self._could_renew = False
            members = topic.parts.get(node, {})
        for change in changes:
            presence.apply(members, change)
        if node in self._nodes:
            topic.parts[node] = members
        topic.changed()

    def _forget(self, node: str) -> None:
        """Take a node's members for gone."""
        _ = self._nodes.pop(node, None)
        self._leases.forget(node)
        for topic in self._topics.values():
            if topic.parts.pop(node, None):
                topic.changed()

    async def _renew_regularly(self) -> None:
        """Give a sign of life, and look which nodes give one."""
        while True:
            topics, self._changed_topics = self._changed_topics, set()
            message = encode(Message(self._node, self._number, digests=self._digests(topics)))
            try:
                lease = await self._store.renew(message, self._written, is_new=not self._number)
            except BusUnavailable as error:
                # What is known of others is left as it is: it cannot be checked now.
                self._changed_topics |= topics
                self._could_renew = False
                self._log.warning("presence", "the lease of this node cannot be renewed: %s", error)
            else:
                self._take_lease(lease)
                self._is_look_due = True
                self._wake.set()
            await asyncio.sleep(self._config.presence.renew_s)

    def _digests(self, topics: set[str]) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for name in topics:
            if name not in self._outgoing:  # else the others cannot know of it yet
                topic = self._topics.get(name)
                own: Members = {} if topic is None else topic.own
                found[name] = (len(own), presence.digest(own))
        return found

    def _take_lease(self, lease: Lease) -> None:
        if not lease.held and self._number and not self._is_rewriting:
            self._metrics.presence_leases_lost += 1
            self._log.warning(
                "presence lease", "the lease of this node ended, or Redis lost it: its members are sent again"
            )
            self._is_lost = True
            self._wake.set()
        alive = {node for node, left_s in lease.nodes.items() if left_s >= 0 and node != self._node}
        without = [node for node in self._nodes if node not in alive]
        for node in [each for each in without if self._leases.is_dead(each, lease, is_certain=self._could_renew)]:
            removed = sum(len(topic.parts.get(node, ())) for topic in self._topics.values())
            self._metrics.presence_ghosts_removed += removed
            if removed:
                self._log.warning(
                    "presence ghosts", "%d members of node %s removed: its lease has ended", removed, node
                )
            self._forget(node)
        missed, self._could_renew = not self._could_renew, True
        for node in alive:
            self._leases.forget(node)
            if missed or node not in self._nodes:
                _ = self._nodes.setdefault(node, None)
                for topic in self._topics.values():
                    self._load(topic, node)
        for node in self._leases.long_dead(lease):
            _ = self._spawn(self._sweep(node))

    async def _sweep(self, node: str) -> None:
        try:
            await self._store.remove(node)
        except BusUnavailable as error:
            self._log.warning("presence", "members of a dead node cannot be removed: %s", error)

    async def _rewrite(self) -> None:
        """Write all members here again, and send them to the other nodes under the same refs.

        Redis has lost some, or the node has been taken for dead. Raises BusUnavailable.
        """
        await self._store.clear()
        self._written = 0
        self._is_lost, self._is_rewriting = False, True
        for name in tuple(self._topics):
            self._write_again(name)

    def _write_again(self, name: str) -> None:
        if (topic := self._topics.get(name)) is not None and topic.own:
            before = self._outgoing.get(name, NOTHING)
            self._outgoing[name] = presence.compose(before, Difference(dict(topic.own), {}))
            self._changed_topics.add(name)

    async def _look_for_own(self) -> None:
        """See whether the members here of some topics are still there: Redis may have evicted one key alone."""
        self._is_look_due = False
        self._unlooked = self._unlooked or list(self._topics)
        portion, self._unlooked = self._unlooked[:_LOOKS], self._unlooked[_LOOKS:]
        known = [name for name in portion if name not in self._outgoing and not self._has_none(name)]
        if not known or self._is_rewriting:
            return
        with suppress(BusUnavailable):  # the next look may be answered
            for name in await self._store.lost(known):
                self._log.warning("presence", "members of topic %r here were lost in Redis: they are sent again", name)
                self._write_again(name)

    async def _publish_regularly(self) -> None:
        """Send the other nodes what has changed here."""
        while True:
            _ = await self._wake.wait()
            self._wake.clear()
            outgoing: dict[str, Difference] = {}
            try:
                if self._is_lost:
                    await self._rewrite()
                elif self._is_look_due:
                    await self._look_for_own()
                outgoing = take_portion(self._outgoing)
                if not outgoing and not self._is_rewriting:
                    continue
                await self._write(outgoing)
            except BusUnavailable as error:
                self._log.warning("presence", "members cannot be written: %s", error)
                for name, change in outgoing.items():
                    self._outgoing[name] = presence.compose(change, self._outgoing.get(name, NOTHING))
                self._wake.set()
                await asyncio.sleep(_AGAIN_S)
            if self._outgoing or self._is_lost:
                self._wake.set()
            await asyncio.sleep(WINDOW_S)

    async def _write(self, outgoing: dict[str, Difference]) -> None:
        """Write and publish changes by topic, and learn whether Redis has lost earlier ones. Raises BusUnavailable."""
        self._number += 1
        is_whole = not self._is_rewriting or not self._outgoing
        changes = [OwnChange(name, change, self._has_none(name)) for name, change in outgoing.items()]
        message = Message(self._node, self._number, [packed(name, change) for name, change in outgoing.items()])
        numbering = Numbering(self._number, self._written, is_whole)
        if not await self._store.write(changes, encode(message), numbering):
            self._is_lost = True
        self._written = numbering.number
        if is_whole:
            self._is_rewriting = False

    def _has_none(self, name: str) -> bool:
        topic = self._topics.get(name)
        return topic is None or not topic.own

    # For those who ask.

    async def list(self, name: str) -> Members:
        """All members of a topic, on all nodes; with ``presence = "count"``, what stands for those of each.

        Raises: BusUnavailable: those of other nodes cannot be read.
        """
        topic = self._topics.get(name)
        is_current = self._could_renew and not self._checks and self._is_hearing()
        if topic is not None and is_current and not topic.loading:
            return topic.merged()
        found: Members = {}
        # With nodes that have just been heard: Redis may have lost their leases, and their members.
        for node in {*await self._store.nodes(), *self._nodes} - {self._node}:
            members = await self._store.read(name, node, self._nodes.get(node) or 0)
            if members is None:
                raise BusUnavailable(f"node {node} has not yet written its members again, which Redis has lost")
            found |= members
        topic = self._topics.get(name)
        return found if topic is None else found | topic.own

    async def count(self, name: str) -> int:
        """How many members a topic has, on all nodes. Raises BusUnavailable."""
        return count_members(await self.list(name), self._config.topic(name))


_GONE = Member("", "", b"{}")
