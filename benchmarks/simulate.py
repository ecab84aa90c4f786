"""``python -m benchmarks.simulate``: what a fleet of processes needs, by the unit costs of ``make bench-full``.

Owns the model behind the table in ``docs/scaling.md``; must not measure anything. The subscribers of an event are
spread over the processes at random, as a load balancer spreads sockets, and the processes that hear it are counted.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results" / "results.json"
DOCS = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- plans: written by `python -m benchmarks.simulate --docs` -->", "<!-- end of plans -->"

REDIS_PER_S = 300_000
"""Deliveries of one Redis that a plan may count on; it ends near twice as many (docs/scaling.md)."""
CHANNEL_BYTES = 240
"""Memory of Redis for one channel to which one process has subscribed; measured with Valkey 9.1."""
CORE = 2 / 3
"""Share of a core that a plan may use: the rest is for reconnects."""
OVERHEAD_BYTES = 60
"""Of one message on its way from Redis, besides payload: RESP, the channel's name, the event's name."""
_SAMPLES = 2000


@dataclass(frozen=True)
class Costs:
    """Unit costs of one relay process, in microseconds of CPU and kB."""

    unheard_us: float
    heard_us: float
    """Of an event with one subscriber."""
    delivery_us: float
    """Of each further one."""
    socket_kb: float

    @classmethod
    def measured(cls, path: Path = RESULTS) -> "Costs":
        """Read what ``make bench-full`` has written. Raises LookupError: a figure is missing."""
        rows = [each for each in json.loads(path.read_text("utf-8"))["rows"] if each["server"] == "relay, direct"]

        def figure(scenario: str, name: str = "cpu_us") -> float:
            found = [row[name] for row in rows if row["scenario"].startswith(scenario) and row[name] is not None]
            if not found:
                raise LookupError(f"expected {name} of {scenario!r} in {path}; run make bench-full")
            return float(found[0])

        return cls(
            figure("events without subscribers"),
            figure("1000 topics, one socket on each"),
            figure("fan-out, 500 sockets, 20/s"),
            figure("connect and join, 10000 sockets", "memory_kb"),
        )


@dataclass(frozen=True)
class Fleet:
    """What is planned."""

    processes: int
    sockets: int
    events_per_s: float
    audience: int = 10
    """Subscribers of each topic, on all processes. A socket joins one topic."""
    payload_bytes: int = 200


class Needs(NamedTuple):
    """What it needs, in one mode."""

    redis_per_s: float
    """Deliveries of Redis."""
    redis_mbit_s: float
    redis_mb: float
    """Memory of Redis for subscriptions."""
    cores: float
    """CPU time of each process, as a share of one core."""
    memory_mb: float
    """Of each process, for idle sockets."""

    @property
    def verdict(self) -> str:
        """Whether one Redis and the processes bear it."""
        if self.redis_per_s > REDIS_PER_S:
            return "no: Redis"
        return "yes" if self.cores <= CORE else "no: CPU"


def processes_reached(processes: int, audience: int, chance: random.Random) -> float:
    """How many processes have a subscriber of an event, on average."""
    draws = (len({chance.randrange(processes) for _ in range(audience)}) for _ in range(_SAMPLES))
    return sum(draws) / _SAMPLES


def simulate(fleet: Fleet, costs: Costs, seed: int = 1) -> dict[str, Needs]:
    """What a fleet needs in pattern mode and in topic mode."""
    events, count = fleet.events_per_s, fleet.processes
    reached = processes_reached(count, fleet.audience, random.Random(seed))
    heard_us = reached * costs.heard_us + (fleet.audience - reached) * costs.delivery_us
    memory_mb = fleet.sockets * costs.socket_kb / count / 1000
    found: dict[str, Needs] = {}
    for mode, hearing in (("pattern", float(count)), ("topic", reached)):
        unheard_us = (hearing - reached) * costs.unheard_us
        # In topic mode one channel for each topic and process that has joined it.
        channels = fleet.sockets / fleet.audience * reached if mode == "topic" else count
        found[mode] = Needs(
            redis_per_s=events * hearing,
            redis_mbit_s=events * hearing * (fleet.payload_bytes + OVERHEAD_BYTES) * 8 / 1e6,
            redis_mb=channels * CHANNEL_BYTES / 1e6,
            cores=events * (heard_us + unheard_us) / count / 1e6,
            memory_mb=memory_mb,
        )
    return found


def table(fleets: Sequence[Fleet], costs: Costs) -> str:
    """The needs of fleets, as a table in Markdown."""
    lines = [
        "| Processes | Sockets | Events/s | Mode | Redis: events/s | Mbit/s | MB | Process: CPU | Memory | Enough |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for fleet in fleets:
        for mode, needs in simulate(fleet, costs).items():
            cells = (
                f"{fleet.processes}",
                _grouped(fleet.sockets),
                _grouped(fleet.events_per_s),
                mode,
                _grouped(needs.redis_per_s),
                _grouped(needs.redis_mbit_s),
                _grouped(needs.redis_mb),
                f"{100 * needs.cores:.0f} %",
                f"{_grouped(needs.memory_mb)} MB",
                needs.verdict,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _grouped(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")


PLANS = (
    Fleet(1, 10_000, 500),
    Fleet(2, 50_000, 2_000),
    Fleet(8, 200_000, 10_000),
    Fleet(40, 1_000_000, 5_000),
    Fleet(40, 1_000_000, 30_000),
    Fleet(40, 1_000_000, 50_000),
)
"""What the table in ``docs/scaling.md`` is about."""


def write_docs() -> None:
    """Write the table into ``docs/scaling.md``."""
    head, rest = DOCS.read_text("utf-8").split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    _ = DOCS.write_text(f"{head}{BEGIN}\n\n{table(PLANS, Costs.measured())}\n\n{END}{tail}", "utf-8")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description="What a fleet needs.")
    parser.add_argument("--processes", type=_count, help="by default the plans of docs/scaling.md")
    parser.add_argument("--sockets", type=_count, default=100_000, help="on all processes, each joined to one topic")
    parser.add_argument("--events", type=_count, default=1000, help="per second, on all topics")
    parser.add_argument("--audience", type=_count, default=10, help="subscribers of a topic, on all processes")
    parser.add_argument("--payload-bytes", type=_count, default=200)
    parser.add_argument("--docs", action="store_true", help="write the table of docs/scaling.md")
    given = parser.parse_args()
    if given.docs:
        return write_docs()
    plans: Sequence[Fleet] = PLANS
    if given.processes is not None:
        plans = [Fleet(given.processes, given.sockets, given.events, given.audience, given.payload_bytes)]
    sys.stdout.write(table(plans, Costs.measured()) + "\n")
    return None


if __name__ == "__main__":
    main()
