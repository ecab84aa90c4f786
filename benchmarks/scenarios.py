"""What is measured, one small function for each thing.

Owns sizes, rates and durations; must not know how a result is shown. Every function gives rows; a server that cannot be
measured gives a row that says why. A run in which a frame was missing, doubled or out of order gives no result.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, TypeAlias
from urllib.request import urlopen

from benchmarks import servers
from benchmarks.dialects import payload, payload_bytes
from benchmarks.load import (
    Beats,
    Group,
    LoadError,
    Publisher,
    PushLoad,
    Run,
    heartbeat_latencies,
    numbers,
    percentile,
    publish_command,
)
from benchmarks.servers import Cores, Missing, Server

FLOOR = "floor: write(2) in C"
DIRECT = "relay, direct"
PORTABLE = "relay, portable"
TANGRAM = "tangram channel (Rust)"
SOCKETIO = "python-socketio"
BROADCASTER = "broadcaster README"

SLOW = 10
"""Slow readers among the sockets of that scenario."""
POLICIES = ("disconnect", "drop-oldest", "latest")

Maker: TypeAlias = Callable[[Cores, int], AbstractContextManager[Server]]


@dataclass
class Plan:
    """How long and how much; the quick form unless told otherwise."""

    seconds: float = 2.0
    rounds: int = 2
    big: int = 10_000
    sizes: tuple[int, ...] = (1000, 100)
    topics: tuple[int, ...] = (10, 1000, 10_000)
    unheard_s: float = 1.0
    pushes: int = 10_000
    slow_s: float = 4.0
    saturate_s: float = 2.0
    returning: tuple[int, int] = (200, 500)
    """Clients that recover, and events that each has missed."""
    pairs: int = 4

    @classmethod
    def full(cls) -> "Plan":
        """The long form."""
        return cls(
            seconds=10.0,
            rounds=3,
            sizes=(3000, 1000, 300, 100),
            topics=(10, 100, 1000, 10_000, 100_000),
            unheard_s=5.0,
            pushes=50_000,
            slow_s=30.0,
            saturate_s=10.0,
            returning=(1000, 1000),
            pairs=10,
        )


@dataclass
class Row:
    """One measurement. CPU is the server's, in microseconds for each ``unit``; None is what was not measured."""

    scenario: str
    server: str
    cpu_us: float | None = None
    unit: str = "delivery"
    p50_ms: float | None = None
    p99_ms: float | None = None
    p999_ms: float | None = None
    memory_kb: float | None = None
    server_busy: float | None = None
    load_busy: float | None = None
    per_s: float | None = None
    wire_bytes: int | None = None
    seconds: float | None = None
    """Until the last of what was asked for was done, where that is measured."""
    rounds: list[float] | None = None
    """CPU of each round, where rounds are compared one by one."""
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass
class Bench:
    """What all scenarios need."""

    cores: Cores
    redis_port: int
    redis_pid: int
    plan: Plan
    publisher: Publisher
    say: Callable[[str], None]

    @contextmanager
    def start(self, make: Maker) -> Iterator[tuple[Server, Group]]:
        """Start a server, with a group of sockets for it."""
        with (
            make(self.cores, self.redis_port) as server,
            Group(server.address, server.dialect, server.cpu_s) as group,
        ):
            yield server, group

    def one(self, server: Server, group: Group, rate: float, seconds: float | None = None) -> Run:
        """One run at a rate, of a server with or without a timer of its own."""
        seconds = seconds or self.plan.seconds
        if server.start_events is not None:
            return group.run_itself(server.start_events, rate=rate, seconds=seconds)
        return group.run(group.sender(self.publisher), rate=rate, seconds=seconds)

    def warm_up(self, server: Server, group: Group) -> None:
        """Learn the frame's size; see `Group.warm_up`."""
        start = server.start_events
        if start is not None:
            group.warm_up(lambda _: start(1, 1))
        else:
            quiet_s = 0.3 if server.name.startswith("relay") else 1.0
            group.warm_up(group.sender(self.publisher), quiet_s)


def row(scenario: str, server: str, runs: Sequence[Run], unit: str = "delivery") -> Row:
    """A row from the runs of one thing: the median run's CPU, the latencies of all."""
    faults = [fault for run in runs for fault in run.faults]
    if faults:
        return Row(scenario, server, unit=unit, note=f"does not count: {faults[0]}")
    latencies = [value for run in runs for value in run.latencies]
    return Row(
        scenario,
        server,
        cpu_us=median(run.cpu_us for run in runs),
        unit=unit,
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        p999_ms=percentile(latencies, 0.999),
        server_busy=median(run.server_cpu_s / run.wall_s for run in runs),
        load_busy=median(run.load_cpu_s / run.wall_s for run in runs),
        per_s=median(run.delivered / run.wall_s for run in runs),
    )


def _join(server: Server, group: Group, count: int, at_once: int = 1000) -> Row:
    """Connect and join; CPU and memory for each socket."""
    cpu, rss, began, own = server.cpu_s(), server.rss_kb(), time.perf_counter(), time.process_time()
    _ = group.join(count, at_once=at_once)
    wall = time.perf_counter() - began
    busy, load = (server.cpu_s() - cpu) / wall, (time.process_time() - own) / wall
    group.settle()
    return Row(
        f"connect and join, {count} sockets",
        server.name,
        cpu_us=1e6 * (server.cpu_s() - cpu) / count,
        unit="socket",
        memory_kb=(server.rss_kb() - rss) / count,
        server_busy=busy,
        load_busy=load,
        per_s=count / wall,
    )


# 1 and 2: fan-out.


def fan_out(bench: Bench) -> list[Row]:
    """500 sockets on one topic: floor and both paths in turns, so that a drift of the machine hits all alike."""
    rows: list[Row] = []
    with ExitStack() as stack:
        started: list[tuple[Server, Group]] = []
        for name, make in ((FLOOR, servers.floor), (DIRECT, servers.relay), (PORTABLE, servers.portable)):
            try:
                server, group = stack.enter_context(bench.start(make))
            except Missing as error:
                rows.append(Row("fan-out, 500 sockets, 20/s", name, note=f"left out: {error}"))
                continue
            group.topics = [f"room:{len(started)}"]  # its own: both relays hear the same Redis
            rows.append(_join(server, group, 500))
            bench.warm_up(server, group)
            started.append((server, group))
        for rate in (20, 200):
            runs: dict[str, list[Run]] = {server.name: [] for server, _ in started}
            for _ in range(bench.plan.rounds):
                for server, group in started:
                    # The portable path is measured at a rate that one core can do.
                    at = 60 if server.name == PORTABLE and rate == 200 else rate
                    runs[server.name].append(bench.one(server, group, at))
            for server, _ in started:
                at = 60 if server.name == PORTABLE and rate == 200 else rate
                rows.append(row(f"fan-out, 500 sockets, {at}/s", server.name, runs[server.name]))
                bench.say(describe(rows[-1]))
    return rows


def peers(bench: Bench) -> list[Row]:
    """The same for the peers, one after the other."""
    rows: list[Row] = []
    for name, make, rates in (
        (TANGRAM, servers.tangram, (20, 60)),
        (SOCKETIO, servers.socketio, (20,)),
        (BROADCASTER, servers.broadcaster, (20,)),
    ):
        try:
            with bench.start(make) as (server, group):
                if name == BROADCASTER:
                    # Of the first subscribers of a channel broadcaster 0.3.1 hears none where one comes alone (its
                    # listener has given up by then), and forgets some where several come at once. So a few come before.
                    group.pause(group.join(5))
                    group.settle(1.0)
                rows.append(_join(server, group, 500, at_once=50))
                bench.warm_up(server, group)
                for rate in rates:
                    runs = [bench.one(server, group, rate) for _ in range(bench.plan.rounds)]
                    rows.append(row(f"fan-out, 500 sockets, {rate}/s", name, runs))
                    bench.say(describe(rows[-1]))
        except (Missing, LoadError) as error:
            rows.append(Row("fan-out, 500 sockets, 20/s", name, note=f"left out: {error}"))
            bench.say(describe(rows[-1]))
    return rows


# 1, 5, 6 and 10: many sockets.


def many_sockets(bench: Bench) -> list[Row]:
    """10 000 sockets join in a burst and idle; then fan-out with heartbeats; then fewer and fewer of them."""
    rows: list[Row] = []
    for name, make in ((FLOOR, servers.floor), (DIRECT, servers.relay)):
        try:
            with bench.start(make) as (server, group):
                rows.append(_join(server, group, bench.plan.big))
                bench.say(describe(rows[-1]))
                bench.warm_up(server, group)
                rows += _shrink(bench, server, group)
        except (Missing, LoadError) as error:
            rows.append(Row(f"fan-out, {bench.plan.big} sockets, 5/s", name, note=f"left out: {error}"))
            bench.say(describe(rows[-1]))
    return rows


def _shrink(bench: Bench, server: Server, group: Group) -> Iterator[Row]:
    for size in (bench.plan.big, *bench.plan.sizes):
        group.close(group.clients[size:])
        group.settle(1.0)  # until the server has seen it
        # Some 50 000 deliveries a second at most, half of what a core does.
        rate = min(20, max(5, 50_000 // size))
        beats: Beats | None = None
        if size == bench.plan.big and server.start_events is None:
            beats = group.heartbeats()
            run = group.run(group.sender(bench.publisher), rate=rate, seconds=max(5.0, bench.plan.seconds), beats=beats)
            group.close(beats.clients)
        else:
            run = bench.one(server, group, rate)
        found = row(f"fan-out, {size} sockets, {rate}/s", server.name, [run])
        bench.say(describe(found))
        yield found
        if beats is not None:
            late = heartbeat_latencies(beats)
            found = Row(
                f"heartbeat replies meanwhile, {size} sockets",
                server.name,
                p50_ms=percentile(late, 0.5),
                p99_ms=percentile(late, 0.99),
                p999_ms=percentile(late, 0.999),
                note=f"{len(late)} heartbeats",
            )
            bench.say(describe(found))
            yield found


# 4 and 10: events and topics.


def unheard(bench: Bench) -> list[Row]:
    """200 000 events a second on topics without subscribers."""
    offered, batch = 200_000, 2000
    count = int(offered * bench.plan.unheard_s)
    body = payload(0, 0, payload_bytes())
    commands = b"".join(publish_command(b"to:nobody:%d:new_msg" % topic, body) for topic in range(batch))
    with bench.start(servers.relay) as (server, _):
        _ = counters(server)  # the first look loads what it needs
        cpu, began, own = server.cpu_s(), time.perf_counter(), time.process_time()
        for sent in range(0, count, batch):
            ahead = began + sent / offered - time.perf_counter()
            if ahead > 0:
                time.sleep(ahead)
            bench.publisher.send(commands)
        rate = count / (time.perf_counter() - began)
        end, idle = time.monotonic() + 20, -1.0
        # Until all have come, or the relay does nothing any more: a look at /metrics would cost it time.
        while time.monotonic() < end and server.cpu_s() - idle > 0.002:
            idle = server.cpu_s()
            time.sleep(0.2)
        used, wall, own = server.cpu_s() - cpu, time.perf_counter() - began, time.process_time() - own
        came = counters(server)["events_without_subscribers"]
    lost = count - came
    found = Row(
        f"events without subscribers, {offered} /s offered",
        DIRECT,
        cpu_us=1e6 * used / count,
        unit="event",
        server_busy=used / wall,
        load_busy=own / wall,
        per_s=rate,
        note=f"{rate:.0f}/s published, {lost} of {count} lost",
    )
    bench.say(describe(found))
    return [found]


def topics(bench: Bench) -> list[Row]:
    """Events for one socket each, on more and more topics, as many as are delivered."""
    rows: list[Row] = []
    for count in bench.plan.topics:
        sockets = min(count, 1000)
        each = count // sockets
        with bench.start(servers.relay) as (server, group):
            group.topics = [f"topic:{number:06d}" for number in range(count)]
            _ = group.join(sockets, topics=_slice(each), at_once=200)
            bench.warm_up(server, group)
            run = group.saturate(group.sender(bench.publisher), seconds=bench.plan.saturate_s, outstanding=2000)
        rows.append(row(f"{count} topics, one socket on each, saturated", DIRECT, [run], "event"))
        bench.say(describe(rows[-1]))
    return rows


def _slice(each: int) -> Callable[[int], Sequence[int]]:
    return lambda number: range(number * each, (number + 1) * each)


# 7: pushes.


def pushes(bench: Bench) -> list[Row]:
    """100 sockets push, each again as soon as it is answered."""
    count = bench.plan.pushes
    with bench.start(servers.relay) as (server, group):
        _ = group.join(100)
        group.settle()
        load = PushLoad(group, count)
        cpu, began, own = server.cpu_s(), time.perf_counter(), time.process_time()
        load.run(count)
        wall = time.perf_counter() - began
        used, own = server.cpu_s() - cpu, time.process_time() - own
        taken = counters(server)["pushes_out"]
    whole = load.answered == count == taken and not load.refused and not load.out_of_order
    found = Row(
        "push with reply, 100 sockets",
        DIRECT,
        cpu_us=1e6 * used / count if whole else None,
        unit="push",
        server_busy=used / wall,
        load_busy=own / wall,
        per_s=load.answered / wall,
        note="" if whole else f"does not count: {load.answered} answers, {load.refused} refusals, {taken} taken",
    )
    bench.say(describe(found))
    return [found]


# 8: slow readers.


def slow_readers(bench: Bench) -> list[Row]:
    """1000 sockets, 10 of which read nothing at all: what the others feel, and what becomes of the frames."""
    outbox = 131_072
    environ = {
        "RELAY_LIMITS__OUTBOX_MAX_BYTES": str(outbox),
        "RELAY_LIMITS__PAYLOAD_MAX_BYTES": "65536",
        "RELAY_LIMITS__CLOSE_TIMEOUT_S": "120",  # so that what a closed slow reader was sent can be read to the end
        "RELAY_TOPICS": json.dumps([{"match": f"{policy}:*", "overflow": policy} for policy in POLICIES]),
    }
    rows: list[Row] = []

    def make(cores: Cores, redis_port: int) -> AbstractContextManager[Server]:
        return servers.relay(cores, redis_port, environ=environ)

    for policy in ("", *POLICIES):
        with bench.start(make) as (server, group):
            group.topics = [f"{policy or 'latest'}:1"]
            slow = group.join(SLOW, receive_buffer=4096) if policy else []
            _ = group.join(1000 - len(slow))
            # 2 kB, so that also in a short time the kernel's buffers fill.
            send = group.sender(bench.publisher, 2048)
            group.warm_up(send)
            before = counters(server)["dropped"]
            group.pause(slow)
            rss = server.rss_kb()
            run = group.run(send, rate=50, seconds=bench.plan.slow_s)
            grown = server.rss_kb() - rss
            note = ""
            if policy:
                group.resume(slow)
                group.settle(1.5)
                dropped = counters(server)["dropped"] - before
                note = _judge(policy, [numbers(client) for client in slow], run.events, dropped)
                note += f"; memory grew by {grown:.0f} kB"
        name = f"slow readers: {SLOW} of 1000, 50/s, {policy}" if policy else "slow readers: none, 1000 sockets, 50/s"
        found = row(name, DIRECT, [run])
        found.note = "; ".join(filter(None, (found.note, note)))
        rows.append(found)
        bench.say(describe(found))
    return rows


def _judge(policy: str, got: Sequence[Sequence[int]], events: int, dropped: int) -> str:
    """Whether the slow readers got what their policy says, and the counters say the rest."""
    received = sum(map(len, got))
    sums = received + dropped == events * len(got)
    total = f"{'all' if sums else 'NOT all'} {events * len(got)}"
    text = f"{received} frames read late + {dropped} counted as dropped = {total}"
    ordered = all(list(numbers) == sorted(set(numbers)) for numbers in got)
    if policy == "disconnect":
        kept = all(list(numbers) == list(range(len(numbers))) for numbers in got)
        says = "a beginning without holes, then closed" if kept and dropped else "NOT as it says"
    elif policy == "drop-oldest":
        kept = ordered and all(numbers and numbers[-1] == events - 1 for numbers in got)
        says = "in order, with the newest" if kept and dropped else "NOT as it says"
    else:
        kept = ordered and all(numbers and numbers[-1] == events - 1 for numbers in got)
        says = "in order, with the last value" if kept and dropped else "NOT as it says"
    return f"{text}; {says}"


# 10: workers.


def workers(bench: Bench) -> list[Row]:
    """What one worker and two carry, saturated, each on a core of its own."""
    rows: list[Row] = []
    all_cores = sorted(bench.cores.server | bench.cores.load)
    room = len(all_cores) >= 4
    for count in (1, 2):
        on = set(all_cores[:count]) if all_cores else None

        def make(
            cores: Cores, redis_port: int, count: int = count, on: set[int] | None = on
        ) -> AbstractContextManager[Server]:
            return servers.relay(cores, redis_port, workers=count, on=on)

        with bench.start(make) as (server, group):
            _ = group.join(500)
            bench.warm_up(server, group)
            run = group.saturate(group.sender(bench.publisher), seconds=bench.plan.saturate_s, outstanding=32)
        found = row(f"{count} worker{'s' if count > 1 else ''}, 500 sockets, saturated", DIRECT, [run])
        if count > 1 and not room:
            found.note = "; ".join(
                filter(None, (found.note, f"no room: the load shares {len(all_cores) or 1} cores with them"))
            )
        rows.append(found)
        bench.say(describe(found))
    return rows


def counters(server: Server) -> Counter[str]:
    """The relay's counters by name, those with reasons summed up."""
    host, port = server.address
    found: Counter[str] = Counter()
    time.sleep(1.0)  # for so long it shows what it has read
    with urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("relay_"):
                name, value = line.rsplit(" ", 1)
                found[name.split("{")[0].removeprefix("relay_").removesuffix("_total")] += int(float(value))
    return found


def describe(found: Row) -> str:
    """A row in one line."""
    parts = [f"{found.scenario} | {found.server}"]
    if found.cpu_us is not None:
        parts.append(f"{found.cpu_us:.2f} us CPU per {found.unit}")
    if found.p50_ms is not None and found.p99_ms is not None:
        parts.append(f"p50 {found.p50_ms:.1f} ms, p99 {found.p99_ms:.1f} ms")
    if found.memory_kb is not None:
        parts.append(f"{found.memory_kb:.1f} kB per socket")
    return " | ".join([*parts, *filter(None, [found.note])])


SCENARIOS: tuple[Callable[[Bench], list[Row]], ...] = (
    fan_out,
    peers,
    many_sockets,
    unheard,
    topics,
    pushes,
    slow_readers,
    workers,
)
