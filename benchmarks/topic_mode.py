"""Topic mode beside pattern mode: events that are heard or not, joins, and topics that are subscribed to again.

Owns what is compared with what; must not know how a result is shown. Servers run one at a time, in turns: pattern mode,
topic mode, pattern mode again, then in the opposite order. What the two runs of pattern mode differ by is what the
machine does.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from redis import Redis

from benchmarks import servers
from benchmarks.dialects import EVENT, Phoenix, heartbeat_frame, payload, payload_bytes, text_frame
from benchmarks.load import Client, Group, heartbeat_latencies, percentile, publish_command
from benchmarks.scenarios import DIRECT, Bench, Row, counters, describe
from benchmarks.servers import Server

PATTERN, TOPIC, AGAIN = "relay, pattern mode", "relay, topic mode", "relay, pattern mode again"

SOCKETS = 1000
"""Each joins a topic of its own, so that each join subscribes."""
_UNHEARD = 20_000
_JOINS_ALONE = 300
_AGAIN_SOCKETS, _AGAIN_EACH = 1000, 100
AGAIN_TOPICS = _AGAIN_SOCKETS * _AGAIN_EACH
_PATIENCE_S = 120

_BY_TOPIC = {"RELAY_REDIS__PUBLISH_FORM": "topic", "RELAY_REDIS__SUBSCRIBE": "topic"}


class ByTopic(Phoenix):
    """Events are published on the channel of their topic."""

    def publication(self, topic: str, payload: bytes) -> tuple[bytes, bytes]:
        """``topic:<topic>``, with the event's name in the message."""
        return f"topic:{topic}".encode(), EVENT.encode() + b":" + payload


@dataclass
class _Figures:
    join: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    heard: list[float] = field(default_factory=list)
    unheard: list[float] = field(default_factory=list)
    alone_ms: list[float] = field(default_factory=list)


def topic_mode(bench: Bench) -> list[Row]:
    """Connect and join, one event for one socket, an event for none, and joins one after the other."""
    found = {way: _Figures() for way in (PATTERN, TOPIC, AGAIN)}
    for number in range(bench.plan.pairs):
        for way in (PATTERN, TOPIC, AGAIN) if number % 2 else (AGAIN, TOPIC, PATTERN):
            environ = _BY_TOPIC if way == TOPIC else {}
            with bench.start(partial(servers.relay, environ=environ)) as (server, group):
                if way == TOPIC:
                    group.dialect = ByTopic()
                _measure(bench, server, group, found[way])
    things = {
        "join": (f"connect and join, {SOCKETS} sockets, a topic for each", "socket"),
        "again": (f"connect and join, {SOCKETS} further sockets on these topics", "socket"),
        "heard": (f"events heard by one socket, {SOCKETS} topics, saturated", "event"),
        "unheard": ("events that no client has joined", "event"),
    }
    rows: list[Row] = []
    for thing, (what, unit) in things.items():
        for way, figures in found.items():
            rounds: list[float] = getattr(figures, thing)
            rows.append(Row(what, way, cpu_us=median(rounds), unit=unit, rounds=rounds))
        rows[-2].note = compared(*(getattr(figures, thing) for figures in found.values()))
    for way, figures in found.items():
        p50, p99 = percentile(figures.alone_ms, 0.5), percentile(figures.alone_ms, 0.99)
        rows.append(Row("joins of new topics, one after the other", way, unit="join", p50_ms=p50, p99_ms=p99))
    for each in rows:
        bench.say(describe(each))
    return rows


def compared(pattern: list[float], topic: list[float], again: list[float]) -> str:
    """Against the mean of the two runs around it, so that a steady drift of the machine cancels out."""
    if not all(pattern) or not all(again):
        return ""
    ratio = median(2 * value / (one + other) for one, value, other in zip(pattern, topic, again, strict=True))
    control = [other / one for one, other in zip(pattern, again, strict=True)]
    spread = median(abs(value - 1) for value in control)
    return f"{ratio:.3f}×; the first against itself {median(control):.3f}×, spread {spread:.3f}; {len(control)} pairs"


def _measure(bench: Bench, server: Server, group: Group, figures: _Figures) -> None:
    group.topics = [f"topic:{number:06d}" for number in range(SOCKETS)]
    further: list[Client] = []
    for into in (figures.join, figures.again):
        cpu = server.cpu_s()
        further = group.join(SOCKETS, topics=lambda number: (number,), at_once=200)
        group.settle()
        into.append(1e6 * (server.cpu_s() - cpu) / SOCKETS)
    group.close(further)
    group.settle(1.0)
    bench.warm_up(server, group)
    run = group.saturate(group.sender(bench.publisher), seconds=bench.plan.saturate_s, outstanding=2000)
    figures.heard.append(1e6 * run.server_cpu_s / run.events)
    body = payload(0, 0, payload_bytes(group.topics[0]))
    unheard = [publish_command(*group.dialect.publication(f"nobody:{topic}", body)) for topic in range(1000)]
    cpu = server.cpu_s()
    for _ in range(_UNHEARD // len(unheard)):
        bench.publisher.send(b"".join(unheard))
    group.settle(1.0)
    figures.unheard.append(1e6 * (server.cpu_s() - cpu) / _UNHEARD)
    (client,) = group.join(1)
    figures.alone_ms += [_join_alone(client, f"alone:{number}") for number in range(_JOINS_ALONE)]


def _join_alone(client: Client, topic: str) -> float:
    """Milliseconds until the reply."""
    client.sock.setblocking(True)
    began = time.perf_counter()
    client.sock.sendall(text_frame(f'["9","9","{topic}","phx_join",{{}}]'.encode()))
    while b'"phx_reply"' not in client.sock.recv(65536):
        pass
    return 1000 * (time.perf_counter() - began)


def _topics_of(number: int) -> range:
    return range(number * _AGAIN_EACH, (number + 1) * _AGAIN_EACH)


def topic_mode_again(bench: Bench) -> list[Row]:
    """100 000 topics are subscribed to again after their connection was cut, while sockets send heartbeats."""
    count = AGAIN_TOPICS
    with bench.start(partial(servers.relay, environ=_BY_TOPIC)) as (server, group):
        group.topics = [f"topic:{number:06d}" for number in range(count)]
        _ = group.join(_AGAIN_SOCKETS, topics=_topics_of, at_once=20)
        group.settle()
        beats = group.heartbeats()
        for client in beats.clients:
            client.chunks = []
        redis: Any = Redis(port=bench.redis_port)
        with redis:
            cpu = server.cpu_s()
            redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            began, number, looked_at = time.monotonic(), 0, 0.0
            first_s = last_s = 0.0
            while not last_s and time.monotonic() - began < _PATIENCE_S:
                beats.sent[number] = time.time_ns()
                beats.clients[number % len(beats.clients)].sock.send(heartbeat_frame(number))
                number += 1
                group.pump(beats.interval_s)
                if (now := time.monotonic()) - looked_at > 0.1:
                    looked_at = now
                    subscribed = sum(int(each.get("sub", 0)) for each in redis.client_list(_type="pubsub"))
                    first_s = first_s or (now - began if subscribed else 0.0)
                    last_s = now - began if subscribed >= count else 0.0
            cpu = server.cpu_s() - cpu
        group.settle()
        latencies = heartbeat_latencies(beats)
        gaps = counters(server)["gaps"]
    row = Row(
        f"{count} topics subscribed to again",
        DIRECT,
        cpu_us=1e6 * cpu / count,
        unit="topic",
        p50_ms=percentile(latencies, 0.5),
        p99_ms=percentile(latencies, 0.99),
        seconds=last_s or None,
        note=f"the first within {first_s:.1f} s, all within {last_s:.1f} s of the cut; {gaps} gap; the latencies are "
        f"those of {len(latencies)} heartbeats meanwhile",
    )
    bench.say(describe(row))
    return [row]


TOPIC_MODE: tuple[Callable[[Bench], list[Row]], ...] = (topic_mode, topic_mode_again)
