"""Point 12: what presence costs: a crowd that joins one topic, members that are only counted, and members at rest.

Owns the crowd and what it must know in the end; must not know how a result is shown. Phoenix sends each join to all who
are there, as one difference: n joins are n² messages. The relay sends differences together, and past ``presence_max``
the number alone.
"""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from redis import Redis

from benchmarks import servers
from benchmarks.dialects import Phoenix, text_frame, upgrade
from benchmarks.load import Client, Group, LoadError
from benchmarks.scenarios import DIRECT, Bench, Row, counters, describe
from benchmarks.servers import cpu_s

CROWD, JOINS_PER_S = 5000, 1000
TOPIC = "room:1"
_SOCKETS, _TOPICS_EACH = 1000, 100
"""Of 100 000 members, each a join of one socket on one topic."""
_IDLE_S = 20.0
_PATIENCE_S = 120
_EXTENDED = 126


class _Connected(Phoenix):
    """A client that connects, and joins later."""

    def steps(self, topics: Any) -> Any:
        """The upgrade alone."""
        return [upgrade(self.target)]


def presence_crowd(bench: Bench) -> list[Row]:
    """5 000 sockets join one topic in 5 s, each with the list of all, and with the default of ``presence_max``."""
    return [_crowd(bench, most) for most in (CROWD, 1000)]


def _crowd(bench: Bench, presence_max: int) -> Row:
    topics = [{"match": "room:*", "presence": True, "presence_max": presence_max}]
    environ = {"RELAY_TOPICS": json.dumps(topics)}
    with bench.start(partial(servers.relay, environ=environ)) as (server, group):
        group.dialect = _Connected()
        _ = group.join(CROWD)
        group.reset()
        used, own, began = server.cpu_s(), time.process_time(), time.monotonic()
        join = text_frame(f'["1","1","{TOPIC}","phx_join",{{}}]'.encode())
        for number, client in enumerate(group.clients):
            while (early_s := began + number / JOINS_PER_S - time.monotonic()) > 0:
                group.pump(early_s)
            client.sock.sendall(join)
            if number % 20 == 0:
                group.pump(0)
        sent_at = time.time_ns()
        joined_s = time.monotonic() - began
        _receive_all(group)
        used, own, wall = server.cpu_s() - used, time.process_time() - own, time.monotonic() - began
        sampled = [client for client in group.clients if client.chunks is not None]
        seen = [_Seen(client) for client in sampled]
        if wrong := [each.members for each in seen if each.members != CROWD]:
            raise LoadError(f"{len(wrong)} of {len(seen)} sampled clients know of {wrong[0]} members, not of {CROWD}")
        frames = sum(each.frames for each in seen) / len(seen) * CROWD
        lost = sum(client.ended for client in group.clients)
        stalls = counters(server)["event_loop_stalls"]
        last_s = (max(each.complete_at for each in seen) - sent_at) / 1e9
    found = Row(
        f"{CROWD} sockets join one topic, presence_max = {presence_max}",
        DIRECT,
        cpu_us=1e6 * used / CROWD,
        unit="join",
        server_busy=used / wall,
        load_busy=own / wall,
        wire_bytes=round(group.received / CROWD),
        note=f"all joins sent in {joined_s:.1f} s; {max(0.0, last_s):.1f} s later the last client knew all; "
        f"{group.received / 1e6:.0f} MB, {frames / 1e6:.2f} million messages (one difference to all for each join: "
        f"{CROWD**2 / 1e6:.0f} million); {lost} clients lost, event loop blocked {stalls} times",
    )
    bench.say(describe(found))
    return found


def _receive_all(group: Group) -> None:
    """Receive until nothing has come for longer than a number is held back."""
    group.settle(2.5, _PATIENCE_S)


class _Seen:
    """What a sampled client knew in the end, and when it first knew as much."""

    def __init__(self, client: Client) -> None:
        self.frames = 0
        self.members = 0
        self.complete_at = 0
        refs: set[str] = set()
        data = bytearray()
        for chunk, at in client.chunks or []:
            data += chunk
            for text in _frames(data):
                self.frames += 1
                _, _, _, event, payload = json.loads(text)
                if event == "presence_count":
                    refs, known = set(), payload["count"]
                elif event == "presence_state":
                    refs = _refs(payload)
                    known = len(refs)
                elif event == "presence_diff":
                    refs = (refs | _refs(payload["joins"])) - _refs(payload["leaves"])
                    known = len(refs)
                else:
                    continue
                if known != self.members:
                    self.members, self.complete_at = known, at


def _refs(entries: dict[str, Any]) -> set[str]:
    return {meta["phx_ref"] for entry in entries.values() for meta in entry["metas"]}


def _frames(data: bytearray) -> Iterator[bytes]:
    """Take complete frames of a server off the beginning."""
    while len(data) >= 2:
        size, at = data[1], 2
        if size >= _EXTENDED:
            at = 4 if size == _EXTENDED else 10
            size = int.from_bytes(data[2:at])
        if len(data) < at + size:
            return
        yield bytes(data[at : at + size])
        del data[: at + size]


def presence_counts(bench: Bench) -> list[Row]:
    """100 000 members of 100 topics whose subscribers are sent the number alone; then at rest."""
    return _many(bench, "count", _TOPICS_EACH, lambda number: range(_TOPICS_EACH))


def presence_listed(bench: Bench) -> list[Row]:
    """100 000 members of 10 000 topics, ten on each, who are listed; then at rest."""

    def of(number: int) -> range:
        first = number // 10 * _TOPICS_EACH
        return range(first, first + _TOPICS_EACH)

    return _many(bench, "true", _SOCKETS * _TOPICS_EACH // 10, of)


def _many(bench: Bench, presence: str, topics: int, of: Callable[[int], range]) -> list[Row]:
    members = _SOCKETS * _TOPICS_EACH
    settings = [{"match": "room:*", "presence": "count" if presence == "count" else True}]
    with bench.start(partial(servers.relay, environ={"RELAY_TOPICS": json.dumps(settings)})) as (server, group):
        group.dialect = _Connected()
        _ = group.join(_SOCKETS)
        group.reset()
        before_kb, used, began = server.rss_kb(), server.cpu_s(), time.monotonic()
        for place in range(_TOPICS_EACH):  # one after the other: a number changes once a second on each
            for number, client in enumerate(group.clients):
                client.sock.sendall(text_frame(b'["%d","1","room:%d","phx_join",{}]' % (place, of(number)[place])))
                if number % 20 == 0:
                    group.pump(0)
            group.settle(0.05)
        _receive_all(group)
        joined = sum(data.count(b'"phx_reply"') for client in group.clients for data, _ in client.chunks or [])
        if joined != _TOPICS_EACH * sum(client.chunks is not None for client in group.clients):
            raise LoadError(f"sampled clients have joined {joined} topics")
        used, wall = server.cpu_s() - used, time.monotonic() - began
        with Redis(port=bench.redis_port) as redis:
            time.sleep(6.0)  # until what has changed has been compared once more
            scripts, relay, store = _calls(redis), server.cpu_s(), cpu_s(bench.redis_pid)
            time.sleep(_IDLE_S)
            commands = {name: calls - scripts.get(name, 0) for name, calls in _calls(redis).items()}
            relay, store = server.cpu_s() - relay, cpu_s(bench.redis_pid) - store
        memory_kb = (server.rss_kb() - before_kb) / members
    what = f"{members} members, presence = {presence}, {topics} topics"
    writes = {name: calls / _IDLE_S for name, calls in commands.items() if name in _WRITES and calls}
    rows = [
        Row(
            what,
            DIRECT,
            cpu_us=1e6 * used / members,
            unit="join",
            memory_kb=memory_kb,
            server_busy=used / wall,
            per_s=members / wall,
            wire_bytes=round(group.received / members),
            note=f"{wall:.1f} s until all knew; memory is for each member, with its join",
        ),
        Row(
            f"{what}, at rest",
            DIRECT,
            server_busy=relay / _IDLE_S,
            note=f"Redis: {commands.get('evalsha', 0) / _IDLE_S:.2f} scripts/s, writes "
            + (", ".join(f"{name} {rate:.2f}/s" for name, rate in writes.items()) or "none")
            + f", {1000 * store / _IDLE_S:.2f} ms of CPU a second",
        ),
    ]
    for each in rows:
        bench.say(describe(each))
    return rows


_WRITES = ("zadd", "zrem", "hset", "hdel", "sadd", "srem", "unlink", "del", "expire", "set", "spop")


def _calls(redis: "Redis") -> dict[str, int]:
    found: Any = redis.info("commandstats")
    return {name.removeprefix("cmdstat_"): int(stats["calls"]) for name, stats in found.items()}


PRESENCE: tuple[Callable[[Bench], list[Row]], ...] = (presence_crowd, presence_counts, presence_listed)
