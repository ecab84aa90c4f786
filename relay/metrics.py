"""Counters of one relay process, and the words to read them by.

Owns the numbers; must not know how they are shown (`relay.web.prometheus` does). Every drop, refusal and gap is counted
here: a loss that is not counted is a bug.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

REFUSED_STATE = "relay.refused"
"""Where a server finds `Metrics.refused` in the lifespan's state, for what the server itself refuses."""

BOUNDS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Upper bounds of a histogram's buckets, in seconds; what takes longer has a bucket of its own."""


def count_refusal(state: MutableMapping[str, Any], kind: str) -> None:
    """Count what the server itself refuses.

    Args: state: of the lifespan. Where a team's own app is served it holds no counter, and nothing is counted.
    """
    counter = state.get(REFUSED_STATE)
    if isinstance(counter, Counter):
        counter[kind] += 1


class Histogram:
    """How often something took how long."""

    __slots__ = ("buckets", "sum_s")

    def __init__(self) -> None:
        self.buckets: list[int] = [0] * (len(BOUNDS_S) + 1)
        """Observations that took no longer than the bound of the same place, and longer than the one before it."""
        self.sum_s: float = 0.0
        """Seconds of all observations together."""

    def observe(self, duration_s: float, times: int = 1) -> None:
        """Count an observation, or several alike."""
        self.buckets[bisect_left(BOUNDS_S, duration_s)] += times
        self.sum_s += duration_s * times

    @property
    def count(self) -> int:
        """How many observations there were."""
        return sum(self.buckets)


@dataclass(slots=True)
class Metrics:
    """Totals since the process started, unless a field says otherwise. Hot paths add to the fields directly."""

    events_in: int = 0
    """Events received from the broker."""
    events_on_topics: int = 0
    """Of those, events that were published on the channel of their topic."""
    events_by_publish: int = 0
    """Of the others, events that were published there on a cluster, by ``PUBLISH`` instead of ``SPUBLISH``."""
    events_not_json: int = 0
    """Events that were delivered as bytes, although their payload begins as JSON does."""
    events_without_subscribers: int = 0
    """Of those, events on topics that no socket of this process has joined."""
    deliveries: int = 0
    """Frames of events written, or queued, for a socket."""
    delivered_bytes: int = 0
    """Bytes of those frames, before compression and without their WebSocket headers."""
    cut_off_bytes: int = 0
    """Bytes written to sockets that were cut off before the kernel had taken them; whole events and parts of them."""
    fan_out: Histogram = field(default_factory=Histogram)
    """For each event, the time from its arrival at the hub to the last of its deliveries."""
    pushes_in: int = 0
    """Pushes received from clients."""
    pushes_out: int = 0
    """Of those, pushes the broker has taken."""
    client_events: int = 0
    """Of those received, pushes that were sent to the other subscribers of their topic."""
    joins: int = 0
    """Joins accepted."""
    sockets: int = 0
    """Sockets open now."""
    sockets_opened: int = 0
    """Sockets ever opened."""
    outbox_bytes: int = 0
    """Bytes waiting in the outboxes of all sockets now."""
    in_flight_bytes: int = 0
    """Bytes of messages and events that wait for plugins' handlers, or are with them, now."""
    gaps: int = 0
    """Times the broker's link was interrupted, so that events may have been missed."""
    link_lag_s: float = 0.0
    """Seconds that the broker's link took to answer its last ping; 0 before the first, and where it has none."""
    shard_live: Counter[str] = field(default_factory=Counter)
    """1 for each master of a Redis Cluster that is heard, else 0."""
    shard_lag_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds that each took to answer its last ping."""
    shard_gaps: Counter[str] = field(default_factory=Counter)
    """Gaps, by the master at which the topics are heard again."""
    subscribe_time: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    """How long Redis took to confirm that a topic is subscribed to, by master of a cluster; "" is one Redis."""
    resubscribe_time: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    """For each topic of a gap, the time from the new connection to its confirmation, by the same name."""
    redirects: Counter[str] = field(default_factory=Counter)
    """Times a slot was found to be served by another master, by how that was learned."""
    rejoins_requested: int = 0
    """Subscriptions that a ``phx_error`` asked to rejoin after a gap."""
    disconnects_by_control: int = 0
    """Sockets and subscriptions ended because their user was disconnected or kicked."""
    drained: int = 0
    """Sockets closed with 1012 because the relay was ending."""
    event_loop_stalls: int = 0
    """Times the event loop stood still for more than half a second: something in this process blocks it."""
    history_appended: int = 0
    """Events that this process has appended to histories."""
    history_trimmed: int = 0
    """Events that histories gave up for those, because they were full."""
    history_recovered: int = 0
    """Joins that were given all that their clients had missed."""
    history_not_recovered: Counter[str] = field(default_factory=Counter)
    """Joins that could not be, by reason."""
    history_replayed: int = 0
    """Events read from histories for joins, slow readers, and topics that were caught up."""
    history_catch_ups: Counter[str] = field(default_factory=Counter)
    """Times events were read from a history because they had not come from the bus, by cause."""
    history_holes: int = 0
    """Times an event's position did not follow the one before it."""
    history_checks: int = 0
    """Times a topic was checked against its history."""
    history_lost: int = 0
    """Times a topic's history had lost what had not come from the bus, so that its subscribers were asked to rejoin."""
    presence_members: int = 0
    """Members that this process lists now."""
    presence_diffs: int = 0
    """Differences of members that were sent to subscribers."""
    presence_held_back: int = 0
    """Changes of a socket's presence over its rate, which were made later, or given up for a newer one."""
    presence_counted: int = 0
    """Times a topic had too many members to list, so that its subscribers were sent their number from then on."""
    presence_heals: Counter[str] = field(default_factory=Counter)
    """Times the members of another node were read again, because what was known of them was wrong, by cause."""
    presence_ghosts_removed: int = 0
    """Members of nodes that gave no sign of life any more."""
    presence_leases_lost: int = 0
    """Times others may have taken this process for dead, so that it announced its members again."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Events not delivered, by reason."""
    dropped_topics: Counter[str] = field(default_factory=Counter)
    """Of those, events that slow readers missed, by the pattern in ``[[topics]]`` that their topic matches."""
    refused: Counter[str] = field(default_factory=Counter)
    """Handshakes, joins, pushes and REST requests refused, by reason."""
    topic_events: Counter[str] = field(default_factory=Counter)
    """Events that had a subscriber, by the pattern in ``metrics.topics`` that their topic matches first."""
    topic_deliveries: Counter[str] = field(default_factory=Counter)
    """Deliveries of those events, by the same pattern."""
    plugin_calls: Counter[str] = field(default_factory=Counter)
    """Handlers called, by plugin."""
    plugin_errors: Counter[str] = field(default_factory=Counter)
    """Handlers that raised or did not end in time, by plugin."""
    plugin_time: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    """How long handlers took, their waiting included, by plugin; services, which do not end, are not among them."""
    longpoll_base64: int = 0
    """Binary frames that long-polling clients were sent as text, in base64."""
    webhook_requests: Counter[str] = field(default_factory=Counter)
    """Requests to webhooks, as ``<webhook>: <outcome>``."""
    webhook_time: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))
    """How long they took, their waiting included, by webhook."""
    webhook_pending: Counter[str] = field(default_factory=Counter)
    """Requests under way or waiting now, by webhook."""
    webhook_open: Counter[str] = field(default_factory=Counter)
    """1 while a webhook is not asked because it has failed often in a row."""
    webhook_openings: Counter[str] = field(default_factory=Counter)
    """Times that has begun, by webhook."""
    malformed: Counter[str] = field(default_factory=Counter)
    """Frames from clients that could not be understood, by close code."""


class ShardTopics(NamedTuple):
    """How many topics are subscribed to on one master of a Redis Cluster."""

    joined: int
    lingering: int
    """Topics that no client has joined any more, and that are to be unsubscribed."""


class ProcessState(NamedTuple):
    """What a process holds at this moment; everything else is in `Metrics`."""

    sockets: Mapping[str, int]
    """Sockets open, by how frames are written."""
    topics: int
    link_live: bool
    link_pushes: bool = True
    """Whether the bus takes pushes."""
    shard_topics: Mapping[str, ShardTopics] = MappingProxyType({})
    """By master of a Redis Cluster."""


IDLE = ProcessState({}, 0, False, False)
"""Of a relay that does not run."""
