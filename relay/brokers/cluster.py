"""Redis Cluster behind the `Broker` interface: a subscription and a publisher for each of its masters.

Owns the map of slots and what follows from its changes; must not know what one connection says.

A topic is heard where its slot is served. When the slot goes to another node, the topic's channel is given to that
one's `Shard`, which subscribes to it and reports its gap. What happens to one node concerns its topics alone.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from relay import redis_url
from relay.brokers.base import NODE_CHANNEL, HistoryStore, Link, NodeBus, PresenceStore, Sink
from relay.brokers.cluster_channels import Receiver
from relay.brokers.cluster_classic import ClassicSubscription
from relay.brokers.cluster_commands import ask_map
from relay.brokers.cluster_map import Endpoint, Redirect, Row, SlotMap, slot_of
from relay.brokers.cluster_shard import Held, Shard
from relay.brokers.cluster_stores import ClusterHistory, ClusterPresence
from relay.brokers.redis_channels import TopicChannel
from relay.brokers.redis_connection import LinkLost
from relay.brokers.redis_publisher import Sent
from relay.config import Config
from relay.config_sections import Direction
from relay.errors import BusUnavailable
from relay.log import RateLimitedLogger
from relay.metrics import Metrics, ShardTopics
from relay.redis_url import ClusterAddress

_logger = logging.getLogger("relay.redis")

_LOOK_S = 30.0
"""Seconds between two looks at the map while all is well."""

_FAULTY_LOOK_S = 0.5
"""The same while a node cannot be reached, or a channel waits for its slot."""

_PAUSE_S = 0.05
"""Least seconds between two looks."""

_MOVED_PAUSE_S = 0.2
"""Seconds for which a node's word about a slot is not followed again: two may name each other."""


class ClusterBroker:
    """Supervised links to all masters of a cluster; see `Broker`.

    Args: config: ``redis_url`` and the ``redis`` table are used.
          metrics: counts gaps and events without a usable name.
          channels: channels of nodes to hear besides, for `Sink.receive_message`.
          log: for messages that are dropped.
          clock: for tests.
    """

    needs_subscribe: bool = True

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        channels: Sequence[str] = (),
        log: RateLimitedLogger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        address = redis_url.parse_cluster(config.redis_url)
        assert address is not None, "expected the address of a cluster"
        self.nodes_address: ClusterAddress = address
        self.address: str = redis_url.shown(config.redis_url)
        self.config: Config = config
        self.metrics: Metrics = metrics
        self.log: RateLimitedLogger = log or RateLimitedLogger(_logger)
        self.clock: Callable[[], float] = clock
        self.map: SlotMap = SlotMap()
        self.shards: dict[Endpoint, Shard] = {}
        """The masters that serve slots."""
        self.held: dict[int, Held] = {}
        self._retiring: set[Shard] = set()
        self._history = ClusterHistory(self) if config.has_history else None
        self._presence = ClusterPresence(self) if config.has_presence else None
        self._channels = tuple(channels)
        self._own: dict[bytes, Receiver] = {}
        self._sink: Sink | None = None
        self._fault = "not started"
        # Why nothing may be published: no node that answers has a majority of the masters on its side.
        self._isolation = ""
        self._keeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # Who is asked next for the map, and when it is asked.
        self._doubted: list[Endpoint] = []
        self._look = asyncio.Event()
        # Channels that wait for the next look; and when a node's word about a slot was followed.
        self._homeless: list[TopicChannel] = []
        self._moved_at: dict[int, float] = {}

    # State.

    @property
    def link(self) -> Link:
        """Live while one node at least is heard; the others refuse their own topics."""
        if any(shard.link.live for shard in self.shards.values()):
            return Link(True, "")
        return Link(False, next((shard.link.reason for shard in self.shards.values()), self._fault))

    @property
    def refusal(self) -> str:
        """Why nothing can be published at all."""
        if self._isolation:
            return self._isolation
        refusals = [shard.refusal for shard in self.shards.values()]
        return "" if not refusals or not all(refusals) else refusals[0]

    @property
    def degraded(self) -> str:
        """What does not work while the rest does; empty if all does."""
        if self._isolation:
            return f"nothing is published: {self._isolation}"
        lost = [shard for shard in self.shards.values() if not shard.link.live]
        if lost:
            return f"{len(lost)} of {len(self.shards)} nodes are not heard: {lost[0].link.reason}"
        missed = sum(shard.channels.missed for shard in self.shards.values()) + len(self._homeless)
        return f"subscribing again to {missed} topics after a gap" if missed else ""

    @property
    def shard_topics(self) -> dict[str, ShardTopics]:
        """Topics that are subscribed to, by master; asked for in another thread too."""
        return {str(endpoint): shard.topics for endpoint, shard in tuple(self.shards.items())}

    @property
    def history(self) -> HistoryStore | None:
        """Reads the streams; None where no topic has a history."""
        return self._history

    @property
    def presence(self) -> PresenceStore | None:
        """Keeps the members of topics for other nodes; None where no topic has presence."""
        return self._presence

    @property
    def nodes(self) -> NodeBus:
        """Publishes on the channels of single nodes."""
        return self

    def hears(self, topic: str) -> bool:
        """Whether events of a topic are heard now."""
        shard = self._shard(self._name(topic))
        return shard is not None and shard.channels.hears(topic)

    # Lifetime.

    async def start(self, sink: Sink) -> None:
        """Start to listen; returns once the first attempt at each node has succeeded or failed."""
        self._sink = sink
        control = self.config.redis.control_channel
        if control:
            self._own[control.encode()] = sink.receive_control
        for name in self._channels:
            self._own[name.encode()] = partial(sink.receive_message, name, name)
        await self._look_at_map()
        self._keeper = asyncio.create_task(self._keep_map(), name="relay-redis-cluster")
        if self._tasks:
            _ = await asyncio.wait(tuple(self._tasks))
        self._spawn(ClassicSubscription(self, sink).run())

    async def stop(self) -> None:
        """Close all connections; messages not yet taken fail."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        if self._presence is not None:
            await self._presence.close()
        for shard in (*self.shards.values(), *self._retiring):
            await shard.stop()
        for task in tuple(self._tasks):
            task.cancel()
        _ = await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in tuple(self.held):
            self._fail_held(slot, "the relay is stopping")
        self._answer(self._homeless, "the relay is stopping")
        self.shards.clear()
        self._fault = "stopped"

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Topics.

    async def subscribe(self, topic: str) -> None:
        """Subscribe to the topic's channel where its slot is served. Raises BusUnavailable."""
        name = self._name(topic)
        shard = self.shard(name)
        try:
            await shard.channels.subscribe(topic)
        except BusUnavailable:
            if (now := self._shard(name)) is not None and now is not shard:
                now.channels.release(topic)  # it was given to that one meanwhile
            raise

    async def unsubscribe(self, topic: str) -> None:
        """Unsubscribe from it after ``redis.linger_s``."""
        name = self._name(topic)
        for channel in self._homeless:
            if channel.name == name:
                channel.is_wanted = False
        if (shard := self._shard(name)) is not None:
            shard.channels.unsubscribe(topic)

    def _name(self, topic: str) -> bytes:
        return (self.config.redis.topic_prefix + topic).encode()

    def shard(self, name: bytes) -> Shard:
        """The master that serves a name. Raises BusUnavailable."""
        found = self._shard(name)
        if found is None:
            raise BusUnavailable(self._unserved(name))
        return found

    def _shard(self, name: bytes) -> Shard | None:
        owner = self.map.owners[slot_of(name)]
        return None if owner is None else self.shards.get(owner)

    def _unserved(self, name: bytes) -> str:
        return f"no node serves slot {slot_of(name)}" if self.shards else self._fault

    # What its masters report.

    def slots_of(self, endpoint: Endpoint) -> Collection[int]:
        """The slots that a node serves."""
        return tuple(self.map.slots(endpoint))

    def own_channels(self, endpoint: Endpoint) -> Mapping[bytes, Receiver]:
        """The channels of nodes that a node carries."""
        return {name: take for name, take in self._own.items() if self.map.owners[slot_of(name)] == endpoint}

    def doubt_map(self, endpoint: Endpoint) -> None:
        """Ask soon who serves which slots, this node first."""
        if endpoint not in self._doubted:
            self._doubted.append(endpoint)
        self._look.set()

    def is_replaced(self, shard: Shard) -> bool:
        """Whether another one has been made for the same node since."""
        return self.shards.get(shard.endpoint, shard) is not shard

    def place(self, channels: Sequence[TopicChannel]) -> None:
        """Subscribe to channels that a node has given up, after the next look at the map."""
        self._homeless += channels
        self._look.set()

    def place_at(self, channel: TopicChannel, redirect: Redirect) -> None:
        """Subscribe to a channel at the node that another has named."""
        if self._follow(redirect):
            self.shards[redirect.endpoint].channels.adopt([channel])
        else:
            self.place([channel])

    def _follow(self, redirect: Redirect) -> bool:
        """Take a node's word for who serves a slot, unless it was given a moment ago."""
        slot, now = redirect.slot, self.clock()
        if redirect.endpoint not in self.shards:
            return False
        if self.map.owners[slot] == redirect.endpoint:
            return True
        if now - self._moved_at.get(slot, -_MOVED_PAUSE_S) < _MOVED_PAUSE_S:
            return False
        self._moved_at[slot] = now
        self.map.move(slot, redirect.endpoint)
        return True

    # Messages that a node has refused.

    def forward(self, sent: Sent, redirect: Redirect, origin: Endpoint) -> None:
        """Have the node that was named take a message; others of its slot wait behind it."""
        slot = redirect.slot
        if redirect.asks and slot not in self.held and (asked := self.shards.get(redirect.endpoint)) is not None:
            asked.publisher.resend(sent, asking=True)
            return
        is_known = not redirect.asks and self._follow(redirect)
        held = self.held.get(slot)
        if held is None:
            held = self.held[slot] = Held()
            _ = asyncio.get_running_loop().call_later(self.config.redis.timeout_s, self._expire_held, slot, held)
            # All that was sent there before has to come back first: the order is theirs.
            shard = self.shards.get(origin)
            if shard is None:
                held.may_go = True
            else:
                shard.publisher.barrier().add_done_callback(partial(self._let_go, held, slot, is_known))
        held.refused.append(sent)

    def _let_go(self, held: Held, slot: int, is_known: bool, _: object = None) -> None:
        held.may_go = True
        if is_known and self.held.get(slot) is held:
            self._release(slot)

    def _release(self, slot: int) -> None:
        """Send what was held to the node that serves the slot."""
        owner = self.map.owners[slot]
        shard = None if owner is None else self.shards.get(owner)
        if shard is None:
            self._fail_held(slot, f"no node serves slot {slot}")
            return
        held = self.held.pop(slot)
        for sent in (*held.refused, *held.published):
            shard.publisher.resend(sent)

    def _expire_held(self, slot: int, held: Held) -> None:
        if self.held.get(slot) is held:
            self._fail_held(slot, f"slot {slot} has moved, and its node was not found")

    def _fail_held(self, slot: int, fault: str) -> None:
        held = self.held.pop(slot)
        for sent in (*held.refused, *held.published):
            if not sent.future.done():
                sent.future.set_exception(BusUnavailable(fault))

    # The map.

    async def _keep_map(self) -> None:
        """Look at the map when there is a reason, and now and then, until cancelled."""
        while True:
            is_live = self.shards and all(shard.link.live for shard in self.shards.values())
            is_well = is_live and not self._homeless and not self._isolation
            limit_s = _LOOK_S if is_well else _FAULTY_LOOK_S
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(limit_s / 2, limit_s)):
                    await self._look.wait()
            self._look.clear()
            try:
                await self._look_at_map()
            except Exception:  # a fault of our own must not end the looking
                _logger.exception("reading the map of the cluster failed")
            await asyncio.sleep(_PAUSE_S)

    async def _look_at_map(self) -> None:
        """Ask one node after the other until one answers that has a majority on its side, and take what they say."""
        faults: list[str] = []
        isolation: str | None = None
        limit_s = min(self.config.redis.timeout_s, self.config.redis.ping_timeout_s)
        for endpoint in self._whom_to_ask():
            if isolation is not None and not self._is_alive(endpoint):
                break  # those that are heard have been asked
            try:
                rows, why = await ask_map(self.nodes_address, endpoint, limit_s)
            except LinkLost as lost:
                faults.append(f"{endpoint}: {lost}")
                continue
            self._doubted.clear()
            self._take_rows(rows)
            isolation = why and f"{endpoint} {why}, which is no majority"
            if not isolation:
                break
        if isolation is None:
            self._take_silence(faults[0] if faults else "no node is known")
        else:
            self._take_isolation(isolation)
            for shard in tuple(self.shards.values()):
                shard.map_was_read()
        homeless, self._homeless = self._homeless, []
        self._adopt(homeless)
        for slot in [slot for slot, held in self.held.items() if held.may_go]:
            self._release(slot)

    def _take_silence(self, fault: str) -> None:
        if fault != self._fault:
            _logger.warning("no node of the %s says who serves which slots: %s", self.address, fault)
        self._fault = fault

    def _take_isolation(self, isolation: str) -> None:
        """Learn why nothing may be published, or that there is no reason."""
        if isolation and not self._isolation:
            _logger.warning("part of the %s: %s: publishing is refused", self.address, isolation)
        elif self._isolation and not isolation:
            _logger.info("a majority of the %s is reached again", self.address)
        self._isolation = isolation

    def _whom_to_ask(self) -> Iterable[Endpoint]:
        """Nodes in doubt first, where they can be reached; then those that are heard, replicas, and the rest."""
        live = [endpoint for endpoint, shard in self.shards.items() if shard.link.live]
        replicas = list(self.map.replicas)
        random.shuffle(live)
        random.shuffle(replicas)
        doubted = [endpoint for endpoint in self._doubted if endpoint in live]
        given = (Endpoint(*node) for node in self.nodes_address.nodes)
        return dict.fromkeys((*doubted, *live, *replicas, *self.shards, *given))

    def _take_rows(self, rows: Sequence[Row]) -> None:
        if not self.map.learn(rows, self._is_alive):
            return
        masters = self.map.masters
        for endpoint in masters:
            if endpoint not in self.shards:
                shard = self.shards[endpoint] = Shard(self, endpoint)
                assert self._sink is not None
                shard.channels.count_subscribers = self._sink.count_subscribers
                self._spawn(shard.start(self._sink))
        _logger.info("cluster: %d slots are served by %s", *self._served())
        moved: list[TopicChannel] = []
        for endpoint, shard in tuple(self.shards.items()):
            moved += shard.channels.withdraw_unless(partial(self._serves, endpoint))
            if endpoint not in masters:
                del self.shards[endpoint]
                self._retiring.add(shard)
                self._spawn(self._retire(shard))
        if self._presence is not None:
            self._presence.reconnect()
        self._adopt(moved)

    async def _retire(self, shard: Shard) -> None:
        """Stop what serves no slots any more, once it has answered what was sent there."""
        _ = await asyncio.wait((shard.publisher.barrier(),), timeout=self.config.redis.ping_timeout_s)
        await shard.stop()
        self._retiring.discard(shard)

    def _serves(self, endpoint: Endpoint, name: bytes) -> bool:
        return self.map.owners[slot_of(name)] == endpoint

    def _served(self) -> tuple[int, str]:
        owners = self.map.owners
        return sum(owner is not None for owner in owners), ", ".join(str(each) for each in self.map.masters)

    def _is_alive(self, endpoint: Endpoint) -> bool:
        shard = self.shards.get(endpoint)
        return shard is not None and shard.link.live

    def _adopt(self, channels: Sequence[TopicChannel]) -> None:
        """Give channels to the masters that serve their slots by now."""
        by_shard: dict[Shard, list[TopicChannel]] = {}
        for channel in channels:
            shard = self._shard(channel.name)
            if shard is None:
                self._answer([channel], self._unserved(channel.name))
                self._homeless.append(channel)
            else:
                by_shard.setdefault(shard, []).append(channel)
        missed = sum(channel.is_missed and channel.is_wanted for channel in channels)
        if missed:
            self.metrics.gaps += 1
            places = ", ".join(str(shard.endpoint) for shard in by_shard)
            _logger.warning("gap: slots have moved to %s: events of %d topics may have been missed", places, missed)
            for shard in by_shard:
                self.metrics.shard_gaps[str(shard.endpoint)] += 1
        for shard, theirs in by_shard.items():
            shard.channels.adopt(theirs)

    def _answer(self, channels: Iterable[TopicChannel], fault: str) -> None:
        for channel in channels:
            waiters, channel.waiters = channel.waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(BusUnavailable(fault))

    # Publishing.

    def publish(
        self, direction: Direction, topic: str, event: str, payload: bytes, sender: str | None = None
    ) -> asyncio.Future[None]:
        """``SPUBLISH <topic_prefix><topic> <event>:<payload>``; pushes of clients go out by ``PUBLISH``."""
        name = self._name(topic)
        shard = self._shard(name)
        if shard is None or self._isolation:
            return self._refused(name)
        return shard.publish(direction, topic, event, payload, sender)

    def publish_to_node(self, node: str, data: bytes) -> asyncio.Future[int]:
        """``SPUBLISH relay:node:<node> <data>``."""
        name = f"{NODE_CHANNEL}{node}".encode()
        shard = self._shard(name)
        return self._refused(name) if shard is None else shard.publish_to_node(node, data)

    def publish_control(self, data: bytes) -> asyncio.Future[None]:
        """``SPUBLISH <control channel> <data>``; without such a channel it is done at once, for no other node."""
        name = self.config.redis.control_channel.encode()
        if not name:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.set_result(None)
            return future
        shard = self._shard(name)
        return self._refused(name) if shard is None or self._isolation else shard.publish_control(data)

    def _refused(self, name: bytes) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_exception(BusUnavailable(self._isolation or self._unserved(name)))
        return future
