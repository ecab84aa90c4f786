"""Point 11: what a history costs: to publish, to recover, and for those who do not ask for positions.

Owns the topics with a history and what is compared with what; must not know how a result is shown. Redis's share is the
CPU time of its process, which serves nothing else meanwhile.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial

from redis import Redis

from benchmarks import servers
from benchmarks.dialects import EVENT, Phoenix, payload, payload_bytes
from benchmarks.load import SAMPLES, Client, Group, LoadError, Publisher, Run, append_command, numbers
from benchmarks.scenarios import DIRECT, Bench, Row, describe, row
from benchmarks.servers import Cores, Server, cpu_s

REDIS = "Redis"
WITHOUT, AGAIN, WITH = "relay, no history", "relay, no history again", "relay, history"

SIZE, TTL_S = 1000, 3600
SOCKETS, RATE = 500, 20
FEW = 10
"""Sockets of the saturated run, in which a publish counts for more than its deliveries."""
MISSED_BYTES = 200
"""Payload of an event that is missed."""
_RECOVERY_S = 120

_KEPT = {"RELAY_TOPICS": json.dumps([{"match": "kept:*", "history": {"size": SIZE, "ttl_s": TTL_S}}])}


def _relay_with_history(cores: Cores, redis_port: int) -> AbstractContextManager[Server]:
    return servers.relay(cores, redis_port, environ=_KEPT)


def _append(publisher: Publisher, topic: str) -> Callable[[int], None]:
    """A function that publishes the n-th event with history."""
    key, event, size = f"topic:{topic}".encode(), EVENT.encode(), payload_bytes(topic)

    def publish(number: int) -> None:
        publisher.send(append_command(key, event, payload(number, time.time_ns(), size), SIZE, TTL_S))

    return publish


# A publish.


@dataclass
class _Way:
    """One way to publish, and the sockets that hear it."""

    name: str
    group: Group
    send: Callable[[int], None]


def history_publish(bench: Bench) -> list[Row]:
    """A bare PUBLISH and a publish with history in turns, on one relay: at a rate, and as many as are delivered."""
    rows: list[Row] = []
    for sockets, what in ((SOCKETS, f"{SOCKETS} sockets, {RATE}/s"), (FEW, f"{FEW} sockets, saturated")):
        with ExitStack() as stack:
            server, live = stack.enter_context(bench.start(_relay_with_history))
            kept = stack.enter_context(Group(server.address, Phoenix(), server.cpu_s))
            live.topics, kept.topics = ["live:1"], ["kept:1"]
            ways = (
                _Way("bare publish", live, live.sender(bench.publisher)),
                _Way("publish with history", kept, _append(bench.publisher, kept.topics[0])),
            )
            for way in ways:
                _ = way.group.join(sockets)
                way.group.warm_up(way.send)
            runs: dict[str, list[Run]] = {way.name: [] for way in ways}
            shares: dict[str, list[float]] = {way.name: [] for way in ways}
            for _ in range(bench.plan.rounds + 1):
                for way in ways:
                    used = cpu_s(bench.redis_pid)
                    if sockets == FEW:
                        run = way.group.saturate(way.send, seconds=bench.plan.saturate_s, outstanding=256)
                    else:
                        run = way.group.run(way.send, rate=RATE, seconds=bench.plan.seconds)
                    runs[way.name].append(run)
                    shares[way.name].append(1e6 * (cpu_s(bench.redis_pid) - used) / run.events)
        for way in ways:
            name = f"{way.name}, {what}"
            rows.append(row(name, DIRECT, runs[way.name]))
            bench.say(describe(rows[-1]))
            share = sorted(shares[way.name])[len(shares[way.name]) // 2]
            rows.append(Row(name, REDIS, cpu_us=share, unit="publish"))
            bench.say(describe(rows[-1]))
    return rows


# Recovery.


class _Returning(Phoenix):
    """A client that comes back with its last position."""

    def __init__(self, since: str) -> None:
        self.params = json.dumps({"since": since})


def history_recovery(bench: Bench) -> list[Row]:
    """The relay ends, events are published, another relay is started, and all clients come back to it at once."""
    clients, events = bench.plan.returning
    with bench.start(_relay_with_history) as (server, group):
        group.topics = ["kept:2"]
        send = _append(bench.publisher, group.topics[0])
        _ = group.join(clients)
        group.warm_up(send)
        live = row(
            f"live events beside, {clients} sockets, {RATE}/s",
            DIRECT,
            [group.run(send, rate=RATE, seconds=bench.plan.seconds)],
        )
        idle_kb = server.rss_kb()
        group.close(list(group.clients))
        group.settle(1.0)  # until the server has seen it
        since = _miss(bench.redis_port, group.topics[0], events)
        # One alone: all that come to the next relay must be given as many bytes.
        group.dialect = _Returning(since)
        whole = _recover(group, 1, 0)[0].received
    with bench.start(_relay_with_history) as (server, group):
        group.topics = ["kept:2"]
        group.dialect = _Returning(since)
        used, redis = server.cpu_s(), cpu_s(bench.redis_pid)
        began, own = time.perf_counter(), time.process_time()
        came = _recover(group, clients, whole)
        wall = time.perf_counter() - began
        used, redis, own = server.cpu_s() - used, cpu_s(bench.redis_pid) - redis, time.process_time() - own
        peak_kb = server.peak_kb() - idle_kb
        _verify(came, whole, events)
    name = f"recovery of {events} events by each of {clients} clients after a restart"
    count = clients * events
    found = Row(
        name,
        DIRECT,
        cpu_us=1e6 * used / count,
        unit="event",
        memory_kb=peak_kb / clients,
        server_busy=used / wall,
        load_busy=own / wall,
        per_s=count / wall,
        note=f"{wall:.1f} s to the last event, connecting included; at most {peak_kb / 1024:.0f} MB more than "
        f"with as many idle sockets",
    )
    share = Row(name, REDIS, cpu_us=1e6 * redis / clients, unit="client", note=f"{1000 * redis:.0f} ms for all")
    for each in (live, found, share):
        bench.say(describe(each))
    return [live, found, share]


def _miss(redis_port: int, topic: str, events: int) -> str:
    """Publish what will have been missed; returns the position before it."""
    with Redis(port=redis_port) as redis:
        append = partial(redis.fcall, "relay_publish", 1, f"topic:{topic}", EVENT)
        since = append("{}", str(events + 1), str(TTL_S))
        for number in range(events):
            append(payload(number, 0, MISSED_BYTES).decode(), str(events + 1), str(TTL_S))
    return str(since.decode())


def _recover(group: Group, count: int, whole: int) -> list[Client]:
    """Have clients come back and receive ``whole`` bytes each; 0: until no more come."""
    group.received = 0
    clients = group.join(count, keep=min(count, SAMPLES))
    end = time.monotonic() + _RECOVERY_S
    if not whole:
        group.settle()
    while group.received < whole * count:
        group.pump(0.1)
        if time.monotonic() > end:
            raise LoadError(f"{group.received} of {whole * count} bytes came within {_RECOVERY_S} s")
    return clients


def _verify(clients: Sequence[Client], whole: int, events: int) -> None:
    """Raises LoadError: not each client was given every event once and in order."""
    wrong = sum(client.received != whole for client in clients)
    kept = [client for client in clients if client.chunks is not None]
    for client in kept:
        said = b"".join(data for data, _ in client.chunks or [])
        wrong += b'"recovered":true' not in said or numbers(client) != list(range(events))
    if wrong or not kept:
        raise LoadError(f"{wrong} of {len(clients)} clients did not recover every event once and in order")


# Those who do not ask.


def history_unasked(bench: Bench) -> list[Row]:
    """The same fan-out on a relay without history, on another such one, and with history, in turns."""
    rows: list[Row] = []
    with ExitStack() as stack:
        ways: list[_Way] = []
        for name, topic in ((WITHOUT, "live:3"), (WITH, "kept:3"), (AGAIN, "live:4")):
            _, group = stack.enter_context(bench.start(_relay_with_history if name == WITH else servers.relay))
            group.topics = [topic]
            send = _append(bench.publisher, topic) if name == WITH else group.sender(bench.publisher)
            _ = group.join(SOCKETS)
            group.warm_up(send)
            ways.append(_Way(name, group, send))
        runs: dict[str, list[Run]] = {way.name: [] for way in ways}
        for number in range(bench.plan.pairs):
            for way in ways if number % 2 else reversed(ways):
                runs[way.name].append(way.group.run(way.send, rate=RATE, seconds=bench.plan.seconds))
    for way in ways:
        found = row(f"positions not asked for, {SOCKETS} sockets, {RATE}/s", way.name, runs[way.name])
        found.rounds = [run.cpu_us for run in runs[way.name]]
        rows.append(found)
        bench.say(describe(found))
    return rows


HISTORY: tuple[Callable[[Bench], list[Row]], ...] = (history_publish, history_recovery, history_unasked)
