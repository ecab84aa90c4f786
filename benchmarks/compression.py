"""Point 9: what compression saves on the wire, and what it costs.

Owns the telemetry and the check of what came; the same event is published each time, so that compressed frames, too,
have one size and bytes count frames.
"""

import json
import zlib
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks import servers
from benchmarks.dialects import EVENT, Phoenix, Step, upgrade
from benchmarks.load import Group, Publisher, Run, publish_command
from benchmarks.scenarios import Bench, Row, describe, row
from benchmarks.servers import Server

PLAIN, COMPRESSED = "relay, direct", "relay, compressed"
SOCKETS = 500
RATE = 20

_STATES = [
    {
        "icao24": f"{0x3C6500 + 7919 * n:06x}",
        "lat": 48.1 + n / 7,
        "lon": 11.5 - n / 3,
        "alt": 32000 + 475 * n,
        "gs": 431 + n,
    }
    for n in range(6)
]
TELEMETRY = json.dumps({"aircraft": _STATES}, separators=(",", ":")).encode()
"""Six aircraft as a map wants them, some 500 bytes of JSON."""


class Compressing(Phoenix):
    """A client that offers compression, as browsers do."""

    def steps(self, topics: Sequence[str]) -> list[Step]:
        """As any client's, with the offer in the upgrade request."""
        first, *joins = super().steps(topics)
        assert first == upgrade(self.target), "the upgrade comes first"
        offer = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
        return [Step(first.send[:-2] + offer, first.expect), *joins]


def compression(bench: Bench) -> list[Row]:
    """500 sockets that offer compression, on a relay without and on one with it, in turns."""
    rows: list[Row] = []
    with ExitStack() as stack:
        started: list[tuple[Server, Group]] = []
        for name, environ in ((PLAIN, {}), (COMPRESSED, {"RELAY_COMPRESSION": "true"})):
            server = stack.enter_context(servers.relay(bench.cores, bench.redis_port, environ=environ))
            server.name = name
            group = stack.enter_context(Group(server.address, Compressing(), server.cpu_s))
            group.topics = [f"telemetry:{len(started)}"]
            _ = group.join(SOCKETS)
            _publish(bench.publisher, group)
            group.settle()
            started.append((server, group))
        runs: dict[str, list[Run]] = {name: [] for name in (PLAIN, COMPRESSED)}
        for _ in range(bench.plan.rounds + 1):
            for server, group in started:
                runs[server.name].append(_run(bench, group))
        for server, group in started:
            found = row(
                f"telemetry of {len(TELEMETRY)} bytes, {SOCKETS} sockets, {RATE}/s", server.name, runs[server.name]
            )
            found.wire_bytes = group.frame_bytes
            found.note = found.note or f"{group.frame_bytes} bytes on the wire"
            rows.append(found)
            bench.say(describe(found))
    return rows


def _publish(publisher: Publisher, group: Group) -> None:
    publisher.send(publish_command(*group.dialect.publication(group.topics[0], TELEMETRY)))


def _run(bench: Bench, group: Group) -> Run:
    """One event to learn its frame's size, then as many as the plan says."""
    group.settle(0.05)
    group.reset()
    _publish(bench.publisher, group)
    group.settle(0.1)
    sample = next(client for client in group.clients if client.chunks is not None)
    frame = b"".join(data for data, _ in sample.chunks or [])
    group.frame_bytes = len(frame)
    run = group.run(
        lambda _: _publish(bench.publisher, group), rate=RATE, seconds=bench.plan.seconds, timed=False, numbered=False
    )
    if _text(frame) != b'[null,null,"%s","%s",%s]' % (group.topics[0].encode(), EVENT.encode(), TELEMETRY):
        run.faults.append("the frame does not hold the event")
    return run


def _text(frame: bytes) -> bytes:
    """The message of one frame of the server's."""
    body = frame[2 if frame[1] < 126 else 4 :]
    return zlib.decompressobj(wbits=-15).decompress(body + b"\x00\x00\xff\xff") if frame[0] & 0x40 else body
