"""Redis Cluster: what an event costs the masters together, a node that does not own its topic, and relay; and what
clients notice when a master is killed.

Owns what is compared with what; must not know how a result is shown. A cluster of one master, of three, and of one
again are measured in turns. What the two of one master differ by is what the machine does.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from benchmarks import servers
from benchmarks.load import Group, LoadError, Publisher
from benchmarks.scenarios import DIRECT, Bench, Row, describe
from benchmarks.servers import Server, cpu_s
from benchmarks.topic_mode import ByTopic, compared
from relay.brokers.cluster_map import SLOTS, slot_of
from tests.support.cluster import NODE_TIMEOUT_MS, Cluster, Node
from tests.support.phoenix import PhoenixClient, until_joined

ONE, THREE, AGAIN = "1 master", "3 masters", "1 master again"
MASTERS = {ONE: 1, THREE: 3, AGAIN: 1}
OTHERS = "nodes that do not own the topic"
SOCKETS = 999
"""Each joins a topic of its own."""
_SETTLE_S = 2.0


@dataclass
class _Figures:
    masters: list[float] = field(default_factory=list)
    """CPU of all masters together, in microseconds for each event."""
    relay: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """CPU of each node that does not own the topics, in microseconds for each event."""


def cluster(bench: Bench) -> list[Row]:
    """Events heard by one socket each, on topics of all masters, and on topics of one of them."""
    found = {way: _Figures() for way in MASTERS}
    for number in range(bench.plan.pairs):
        for way in MASTERS if number % 2 else reversed(MASTERS):
            with Cluster(MASTERS[way], 0) as nodes:
                with bench.start(partial(servers.relay, redis_url=nodes.url)) as (server, group):
                    _measure(bench, nodes.masters, server, group, found[way])
    rows: list[Row] = []
    for what, whose in (("masters", "Redis"), ("relay", "relay")):
        for way, figures in found.items():
            rounds: list[float] = getattr(figures, what)
            scenario = f"events on {SOCKETS} topics of a cluster, saturated"
            rows.append(Row(scenario, f"{whose}, {way}", cpu_us=median(rounds), unit="event", rounds=rounds))
        rows[-2].note = compared(*(getattr(figures, what) for figures in found.values()))
    rounds = found[THREE].others
    rows.append(Row("events of another node's topics", OTHERS, cpu_us=median(rounds), unit="event", rounds=rounds))
    for each in rows:
        bench.say(describe(each))
    return rows


def cluster_failover(bench: Bench) -> list[Row]:
    """A master of three is killed: who is notified, and when the last of them has joined again."""
    with Cluster(3, 1) as nodes, servers.relay(bench.cores, bench.redis_port, redis_url=nodes.url) as server:
        row = asyncio.run(_fail_over(nodes, server))
    bench.say(describe(row))
    return [row]


async def _fail_over(nodes: Cluster, server: Server) -> Row:
    clients = [PhoenixClient(server.address[1], f"topic:{number:06d}") for number in range(SOCKETS)]
    try:
        for client in clients:
            client.connect()
        await until_joined(clients, 60)
        concerned = [client for client in clients if _owner(client.topic, 3) == 0]
        killed_at = time.monotonic()
        await asyncio.to_thread(nodes.masters[0].kill)
        async with asyncio.timeout(60):
            while not all(len(client.joined_at) > 1 for client in concerned):  # noqa: ASYNC110 - many clients' state
                await asyncio.sleep(0.05)
        await asyncio.sleep(_SETTLE_S)
        told = [client for client in clients if len(client.joined_at) > 1]
        again = [client.joined_at[1] - killed_at for client in told]
    finally:
        for client in clients:
            await client.end()
    others = len(told) - len(concerned)
    note = (
        f"{len(told)} of {SOCKETS} clients were notified, {others} of them on topics of other masters; the first had "
        f"joined again after {min(again):.1f} s, the last after {max(again):.1f} s; the nodes wait for "
        f"{NODE_TIMEOUT_MS / 1000:g} s before they replace a master, and clients for 1 s before they join again"
    )
    return Row("a master of three is killed", DIRECT, seconds=max(again), note=note)


def _measure(bench: Bench, masters: Sequence[Node], server: Server, group: Group, figures: _Figures) -> None:
    group.dialect = ByTopic()
    # Those of one master behind each other: it is sent as many at a time as the only master is.
    topics = (f"topic:{number:06d}" for number in range(SOCKETS))
    group.topics = sorted(topics, key=lambda topic: _owner(topic, len(masters)))
    _ = group.join(SOCKETS, topics=lambda number: (number,), at_once=200)
    group.settle()
    used, events, relay_us = _saturated(bench, masters, server, group)
    figures.masters.append(1e6 * sum(used) / events)
    figures.relay.append(relay_us)
    if len(masters) > 1:
        own = [place for place, topic in enumerate(group.topics) if _owner(topic, len(masters)) == 0]
        group.close([client for client in group.clients if client.topics[0] not in own])
        group.topics = [group.topics[place] for place in own]
        for place, client in enumerate(group.clients):
            client.topics = (place,)
        used, events, _ = _saturated(bench, masters, server, group)
        figures.others.append(1e6 * sum(used[1:]) / len(used[1:]) / events)


def _owner(topic: str, masters: int) -> int:
    """The place of the master that serves a topic: see `Cluster.start`."""
    slot = slot_of(f"topic:{topic}".encode())
    return next(number for number in range(masters) if slot < SLOTS * (number + 1) // masters)


def _saturated(bench: Bench, masters: Sequence[Node], server: Server, group: Group) -> tuple[list[float], int, float]:
    """Seconds of CPU of each master, the number of events, and microseconds of relay's CPU for each of them."""
    with _sender(masters, group) as send:
        group.warm_up(send)
        before = _cpu(masters)
        run = group.saturate(send, seconds=bench.plan.saturate_s, outstanding=2000)
        used = [after - earlier for after, earlier in zip(_cpu(masters), before, strict=True)]
    if run.faults:
        raise LoadError(run.faults[0])
    return used, run.events, 1e6 * run.server_cpu_s / run.events


@contextmanager
def _sender(masters: Sequence[Node], group: Group) -> Iterator[Callable[[int], None]]:
    """A function that publishes the n-th event, on the topics in turn, each at the master that serves it."""
    with ExitStack() as stack:
        publishers = [Publisher(node.port) for node in masters]
        for publisher in publishers:
            stack.callback(publisher.close)
        senders = [group.sender(publisher, command=b"SPUBLISH") for publisher in publishers]
        owners = [senders[_owner(topic, len(masters))] for topic in group.topics]
        yield lambda number: owners[number % len(owners)](number)


def _cpu(masters: Sequence[Node]) -> list[float]:
    return [cpu_s(node.process.pid) for node in masters if node.process is not None]
