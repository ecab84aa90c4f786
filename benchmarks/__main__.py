"""``python -m benchmarks [--full] [--only NAME … | --against REV]``: measure, print the table, write JSON and charts.

The quick form writes to ``benchmarks/out/``, the full one to ``benchmarks/results/`` and into ``docs/performance.md``.
"""

import argparse
import gc
import os
import resource
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.against import compare
from benchmarks.cluster import cluster, cluster_failover
from benchmarks.compression import compression
from benchmarks.history import HISTORY
from benchmarks.load import LoadError, Publisher
from benchmarks.long_poll import long_poll
from benchmarks.points import judge
from benchmarks.presence import PRESENCE
from benchmarks.scenarios import SCENARIOS, Bench, Plan, Row
from benchmarks.servers import HERE, Cores, Missing, valkey
from benchmarks.topic_mode import TOPIC_MODE

_ALL = (*SCENARIOS, compression, *HISTORY, *PRESENCE, long_poll, *TOPIC_MODE, cluster, cluster_failover)

_ROOM = 500
"""File descriptors beside the sockets."""


def main() -> int:
    """Run the scenarios; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What a delivered frame costs.")
    parser.add_argument("--full", action="store_true", help="the long form, which writes docs/performance.md")
    names = [scenario.__name__ for scenario in _ALL]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--against", metavar="REV", help="a git revision of the relay, measured in turns with this one")
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md also from the quick form")
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        report.show("the benchmark reads /proc and uses epoll: it needs Linux")
        return 1
    plan = Plan.full() if arguments.full else Plan()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < plan.big + _ROOM:
        report.show(f"RLIMIT_NOFILE is {hard}: {hard - _ROOM} sockets instead of {plan.big}")
        plan.big = hard - _ROOM
    cores = Cores.find()
    command = "make bench-full" if arguments.full else "make bench"
    report.show(f"{cores.text}; load average {os.getloadavg()[0]:.1f}")
    rows: list[Row] = []
    began, neighbours = time.monotonic(), report.Neighbours()
    gc.disable()  # a collection would be taken for latency
    with valkey(cores) as (port, redis_pid):
        if arguments.against:
            return _against(Bench(cores, port, redis_pid, plan, Publisher(port), report.show), arguments.against)
        for scenario in _ALL:
            if arguments.only and scenario.__name__ not in arguments.only:
                continue
            publisher = Publisher(port)
            try:
                rows += scenario(Bench(cores, port, redis_pid, plan, publisher, report.show))
            except (LoadError, OSError) as error:
                rows.append(Row(scenario.__name__, "", note=f"failed: {error}"))
                report.show(f"{scenario.__name__} failed: {error}")
            finally:
                publisher.close()
            gc.collect()
    points = judge(rows)
    found = report.result(rows, points, cores, command, time.monotonic() - began, neighbours)
    report.show("\n" + report.markdown(rows, points, found))
    docs = (arguments.full or arguments.docs) and not arguments.only
    directory = HERE / ("results" if docs else "out")
    report.write(rows, points, found, directory, docs)
    report.show(
        f"written: {_shown(directory / 'results.json')} and charts beside it"
        + (", docs/performance.md" if docs else "")
    )
    return 0


def _against(bench: Bench, revision: str) -> int:
    try:
        points, lines = compare(bench, revision)
    except (Missing, LoadError, OSError) as error:
        report.show(f"not measured: {error}")
        return 1
    finally:
        bench.publisher.close()
    report.show("\n".join(["", *lines, ""]))
    for point in points:
        report.show(f"{point.what}: {point.got}; asked {point.target}: {point.verdict}")
    return 0


def _shown(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())
