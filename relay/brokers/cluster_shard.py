"""One master of a Redis Cluster: a subscription and a publisher, supervised as those of one Redis.

Owns both; must not know the other nodes: what belongs to them goes back to the cluster.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count
from typing import Protocol

import hiredis

from relay.brokers.base import Link, Sink
from relay.brokers.cluster_channels import Receiver, ShardChannels
from relay.brokers.cluster_map import Endpoint, Redirect, read_redirect, slot_of
from relay.brokers.cluster_publisher import ShardPublisher
from relay.brokers.cluster_session import PROBES, ShardSession
from relay.brokers.redis import RedisBroker
from relay.brokers.redis_channels import TopicChannel
from relay.brokers.redis_connection import LinkLost, Role
from relay.brokers.redis_publisher import Sent
from relay.brokers.redis_scripts import SHARDED_CHECK, SHARDED_FUNCTION, SHARDED_PUBLISH
from relay.brokers.redis_streams import RedisHistory
from relay.config import SETTINGS_KEY, Config
from relay.log import RateLimitedLogger
from relay.metrics import Metrics, ShardTopics
from relay.redis_url import ClusterAddress

_REDIRECTS_MAX = 16
"""How often a message is sent to another node than the last."""


class ShardHistory(RedisHistory):
    """Reads the streams of one master; see `HistoryStore`."""

    check_script = SHARDED_CHECK


class ShardOwner(Protocol):
    """The cluster, as one of its masters knows it."""

    nodes_address: ClusterAddress
    config: Config
    metrics: Metrics
    log: RateLimitedLogger
    clock: Callable[[], float]
    held: "dict[int, Held]"
    """Messages of slots that are on their way to another node."""

    def slots_of(self, endpoint: Endpoint) -> Collection[int]:
        """The slots that a node serves."""

    def own_channels(self, endpoint: Endpoint) -> Mapping[bytes, Receiver]:
        """The channels of nodes that a node carries."""

    def doubt_map(self, endpoint: Endpoint) -> None:
        """Ask soon who serves which slots, this node first."""

    def is_replaced(self, shard: "Shard") -> bool:
        """Whether another one has been made for the same node since."""

    def place(self, channels: Sequence[TopicChannel]) -> None:
        """Subscribe to channels that a node has given up, wherever their slots are said to be next."""

    def place_at(self, channel: TopicChannel, redirect: Redirect) -> None:
        """Subscribe to a channel at the node that another has named."""

    def forward(self, sent: Sent, redirect: Redirect, origin: Endpoint) -> None:
        """Have another node take a message."""


class Held:
    """Messages of one slot that wait until it is known who serves it."""

    def __init__(self) -> None:
        self.refused: list[Sent] = []
        self.published: list[Sent] = []
        """Meanwhile; they follow the others."""
        self.may_go: bool = False
        """Whether the node that has refused the first has answered all others."""


class Shard(RedisBroker):
    """One master; see `RedisBroker`.

    Args: cluster: what it is a part of.
          endpoint: where it is.
    """

    _channels_type = ShardChannels
    _publisher_type = ShardPublisher
    _session_type = ShardSession
    _history_type = ShardHistory

    channels: ShardChannels
    publisher: ShardPublisher

    def __init__(self, cluster: ShardOwner, endpoint: Endpoint) -> None:
        self._cluster = cluster
        self.endpoint: Endpoint = endpoint
        config = cluster.config.model_copy(update={"redis_url": cluster.nodes_address.node_url(*endpoint)})
        super().__init__(config, cluster.metrics, (), cluster.log, cluster.clock)
        redis = config.redis
        if self._preparation is not None:
            self._preparation.has_key = self._has_settings
            self._preparation.publish_script = SHARDED_PUBLISH
            self._preparation.function = SHARDED_FUNCTION
        prefixes = (redis.from_prefix, redis.from_user_prefix) if redis.push_identity else (redis.from_prefix,)
        self.push_prefixes: tuple[bytes, ...] = tuple(prefix.encode() for prefix in prefixes)

    @property
    def node(self) -> str:
        """What metrics call it."""
        return str(self.endpoint)

    @property
    def _link(self) -> Link:
        return self._state

    @_link.setter
    def _link(self, state: Link) -> None:
        self._state = state
        self._cluster.metrics.shard_live[self.node] = int(state.live)

    @property
    def topics(self) -> ShardTopics:
        """How many topics are subscribed to here, without the channels of nodes."""
        own = sum(name in self.channels.by_name for name in self._cluster.own_channels(self.endpoint))
        lingering = self.channels.lingering
        return ShardTopics(max(len(self.channels.by_name) - own - lingering, 0), lingering)

    async def stop(self) -> None:
        """Close both connections; messages not yet taken fail."""
        await super().stop()
        if self._cluster.is_replaced(self):
            return  # another one for the same node
        for values in (self.metrics.shard_live, self.metrics.shard_lag_s):
            _ = values.pop(self.node, None)

    def note_lag(self) -> None:
        """Keep the lag that the subscription has just found; that of the whole link is the longest."""
        self.metrics.shard_lag_s[self.node] = self.metrics.link_lag_s
        self.metrics.link_lag_s = max(self.metrics.shard_lag_s.values())

    def _has_settings(self) -> bool:
        return slot_of(SETTINGS_KEY.encode()) in self._cluster.slots_of(self.endpoint)

    # The subscription.

    async def _listen(self, sink: Sink, on_live: Callable[[], None]) -> str:
        for name, receive in self._cluster.own_channels(self.endpoint).items():
            self.channels.want(name, receive)
        fault = await super()._listen(sink, on_live)
        self.doubt_map()
        return fault

    def _report_gap(self, sink: Sink, fault: str) -> None:
        """Count it; each channel has a gap of its own, once it is heard again."""
        self.metrics.shard_gaps[self.node] += 1

    def role_changed(self, role: Role) -> None:
        """Learn from the publisher that the server is no longer what it was."""
        super().role_changed(role)
        self.doubt_map()

    def probe_channel(self) -> bytes:
        """A channel for probes whose slot this node serves. Raises LinkLost where it serves none."""
        slots = set(self._cluster.slots_of(self.endpoint))
        if not slots:
            raise LinkLost("the server serves no slots any more")
        return next(name for n in count() if slot_of(name := f"{PROBES}{n}".encode()) in slots)

    def map_was_read(self) -> None:
        """Learn that it is known who serves which slots."""
        if isinstance(self._session, ShardSession):
            self._session.map_was_read()

    def is_probe(self, channel: bytes) -> bool:
        """Whether a channel is one for probes."""
        return channel.startswith(PROBES.encode())

    def doubt_map(self) -> None:
        """Have the cluster ask who serves which slots, this node first: it has just learned something."""
        self._cluster.doubt_map(self.endpoint)

    def take_lost(self, names: Sequence[bytes]) -> None:
        """Learn which channels the server has unsubscribed unasked, because their slots have gone."""
        lost = self.channels.withdraw(names)
        self.metrics.redirects["unsubscribed"] += len(lost)
        self._cluster.place(lost)
        self.doubt_map()

    def take_refused(self, channel: TopicChannel | None, error: hiredis.ReplyError) -> None:
        """Learn that the server does not take a subscription; ``channel`` has been given up."""
        if channel is None:
            return
        redirect = read_redirect(error, self.endpoint)
        if redirect is not None and not redirect.asks:
            self.metrics.redirects["moved"] += 1
            self._cluster.place_at(channel, redirect)
        else:
            self._cluster.place([channel])
        self.doubt_map()

    # The publisher.

    def held_for(self, channel: bytes) -> list[Sent] | None:
        """Where a message has to wait for others of its slot; None where it need not."""
        if not self._cluster.held or channel.startswith(self.push_prefixes):
            return None
        held = self._cluster.held.get(slot_of(channel))
        return None if held is None else held.published

    def redirect(self, sent: Sent, error: hiredis.ReplyError) -> bool:
        """Have another node take a message that was refused; False where that is no matter of nodes."""
        redirect = read_redirect(error, self.endpoint)
        if redirect is None:
            return False
        self.doubt_map()
        self.metrics.redirects["ask" if redirect.asks else "moved"] += 1
        sent.redirects += 1
        if self.is_probe(sent.channel) or sent.redirects > _REDIRECTS_MAX:
            return False
        self._cluster.forward(sent, redirect, self.endpoint)
        return True
