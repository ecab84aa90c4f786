"""This relay beside an earlier revision of it: ``python -m benchmarks --against REV``.

The revision is checked out below ``build/against`` with an environment of its own. Servers run one at a time, in turns:
the revision, this relay, the revision again, then in the opposite order. What the two runs of the revision differ by is
what the machine does; absolute figures of two machines, or of two hours, say nothing of each other.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks import servers
from benchmarks.load import Group, LoadError, PushLoad
from benchmarks.points import NO, UNKNOWN, YES, Point
from benchmarks.scenarios import Bench
from benchmarks.servers import ROOT, Cores, Missing, Server

SOCKETS = 1000
"""Sockets that connect and join at once, and are then measured idle."""
FANNED_OUT = 500
RATE = 20
PUSHING = 100
AT_MOST = 1.03
"""The ratio that is asked for where the spread of the revision against itself is small."""

BEFORE, NOW, AGAIN = "before", "now", "again"


class Revision(NamedTuple):
    """An earlier relay that can be started."""

    name: str
    directory: Path

    @property
    def python(self) -> Path:
        """The interpreter that has its dependencies."""
        return self.directory / ".venv" / "bin" / "python"

    @classmethod
    def prepare(cls, name: str) -> "Revision":
        """Check it out and install what its lock file names. Raises Missing."""
        try:
            commit = _git("rev-parse", "--verify", f"{name}^{{commit}}")
        except subprocess.CalledProcessError:
            raise Missing(f"{name} is no revision of this repository") from None
        revision = cls(name, ROOT / "build" / "against" / commit[:12])
        stamp = revision.directory / ".made"
        if not stamp.exists():
            shutil.rmtree(revision.directory, ignore_errors=True)
            revision.directory.mkdir(parents=True)
            archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", str(revision.directory)], input=archive, check=True)
            lock = str(revision.directory / "requirements.lock")
            install = [str(revision.python), "-m", "pip", "install", "--quiet", "--require-hashes", "-r", lock]
            subprocess.run([sys.executable, "-m", "venv", str(revision.directory / ".venv")], check=True)
            subprocess.run(install, check=True)
            stamp.touch()
        return revision


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


@dataclass
class Figures:
    """What one start of a server gave, and of several: a list for each thing."""

    join: list[float] = field(default_factory=list)
    """CPU to connect and join, in microseconds for each socket."""
    memory: list[float] = field(default_factory=list)
    """Resident memory, in kB for each joined idle socket."""
    fan_out: list[float] = field(default_factory=list)
    """CPU in microseconds for each delivery."""
    push: list[float] = field(default_factory=list)
    """CPU in microseconds for each push with its reply."""


THINGS = {
    "join": f"connect and join, {SOCKETS} sockets at once, CPU",
    "memory": f"memory of {SOCKETS} joined idle sockets",
    "fan_out": f"fan-out, {FANNED_OUT} sockets, {RATE}/s, CPU per delivery",
    "push": f"push with its reply, {PUSHING} sockets, CPU",
}


def compare(bench: Bench, name: str) -> tuple[list[Point], list[str]]:
    """Measure; returns a point for each thing, and a table of all runs. Raises Missing."""
    revision = Revision.prepare(name)
    found = {way: Figures() for way in (BEFORE, NOW, AGAIN)}
    for number in range(bench.plan.pairs):
        order = (BEFORE, NOW, AGAIN) if number % 2 else (AGAIN, NOW, BEFORE)
        for way in order:
            with _start(bench.cores, bench.redis_port, None if way == NOW else revision) as (server, group):
                _measure(bench, server, group, found[way])
        last = "; ".join(f"{way} {_last(found[way])}" for way in order)
        bench.say(f"{number + 1} of {bench.plan.pairs}: {last}")
    return [_judge(thing, what, name, found) for thing, what in THINGS.items()], _table(found)


@contextmanager
def _start(cores: Cores, redis_port: int, revision: Revision | None) -> Iterator[tuple[Server, Group]]:
    program = None if revision is None else (revision.python, revision.directory)
    with (
        servers.relay(cores, redis_port, program=program) as server,
        Group(server.address, server.dialect, server.cpu_s) as group,
    ):
        yield server, group


def _measure(bench: Bench, server: Server, group: Group, figures: Figures) -> None:
    group.topics = ["room:0"]
    cpu, rss = server.cpu_s(), server.rss_kb()
    _ = group.join(SOCKETS, at_once=SOCKETS)
    group.settle()
    figures.join.append(1e6 * (server.cpu_s() - cpu) / SOCKETS)
    figures.memory.append((server.rss_kb() - rss) / SOCKETS)
    group.close(group.clients[FANNED_OUT:])
    group.settle(1.0)  # until the server has seen it
    bench.warm_up(server, group)
    run = bench.one(server, group, RATE)
    if run.faults:
        raise LoadError(run.faults[0])
    figures.fan_out.append(run.cpu_us)
    group.close(group.clients[PUSHING:])
    group.settle(1.0)
    load, count = PushLoad(group, bench.plan.pushes), bench.plan.pushes
    cpu = server.cpu_s()
    load.run(count)
    if load.answered != count or load.refused or load.out_of_order:
        raise LoadError(f"{load.answered} of {count} pushes answered, {load.refused} refused")
    figures.push.append(1e6 * (server.cpu_s() - cpu) / count)


def _last(figures: Figures) -> str:
    return " ".join(f"{getattr(figures, thing)[-1]:.1f}" for thing in THINGS)


def _judge(thing: str, what: str, name: str, found: dict[str, Figures]) -> Point:
    before, now, again = (getattr(found[way], thing) for way in (BEFORE, NOW, AGAIN))
    if not before:
        return Point(12, what, f"≤ {AT_MOST}× {name}", "–", UNKNOWN)
    # Measured between the two others, so that a steady drift of the machine cancels out.
    ratio = median(2 * value / (one + other) for one, value, other in zip(before, now, again, strict=True))
    control = [other / one for one, other in zip(before, again, strict=True)]
    spread = median(abs(value - 1) for value in control)
    text = (
        f"{ratio:.3f}× ({median(now):.1f} / {median([*before, *again]):.1f}); the revision against itself "
        f"{median(control):.3f}×, spread {spread:.3f}; medians of {len(before)} pairs"
    )
    return Point(12, what, f"≤ {AT_MOST}× {name}", text, YES if ratio <= AT_MOST else NO)


def _table(found: dict[str, Figures]) -> list[str]:
    lines: list[str] = []
    for thing, what in THINGS.items():
        lines += [what, *(f"  {way:7}" + _numbers(getattr(found[way], thing)) for way in found)]
    return lines


def _numbers(values: Sequence[float]) -> str:
    return "".join(f"{value:8.1f}" for value in values)
