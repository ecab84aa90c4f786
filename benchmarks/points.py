"""What the relay is to reach, point by point, held against the rows of one run.

Owns the targets; must not know how anything was measured. A result that falls short stays as it is, and so does a point
that this run could not judge.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks import cluster, topic_mode
from benchmarks.compression import COMPRESSED, PLAIN
from benchmarks.history import AGAIN, REDIS, WITH, WITHOUT
from benchmarks.scenarios import BROADCASTER, DIRECT, FLOOR, POLICIES, PORTABLE, SOCKETIO, TANGRAM, Row

YES, NO, UNKNOWN = "reached", "not reached", "not judged"


@dataclass
class Point:
    """One line: which of them, what is asked, what came."""

    number: int
    what: str
    target: str
    got: str
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Rows:
    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def find(self, scenario: str, server: str) -> Row | None:
        """The row of a scenario, by its beginning."""
        return next((row for row in self._rows if row.scenario.startswith(scenario) and row.server == server), None)

    def value(self, scenario: str, server: str, field: str = "cpu_us") -> float | None:
        """One result of it."""
        row = self.find(scenario, server)
        found: float | None = None if row is None else getattr(row, field)
        return found


def judge(rows: Sequence[Row]) -> list[Point]:
    """All points that can be measured today."""
    table = _Rows(rows)
    points: list[Point] = []

    def ratio(
        number: int,
        what: str,
        limit: float,
        mine: tuple[str, str],
        other: tuple[str, str],
        of: str,
        field: str = "cpu_us",
    ) -> None:
        value, base = table.value(*mine, field), table.value(*other, field)
        unit = "µs" if field == "cpu_us" else "ms"
        if value is None or base is None:
            points.append(Point(number, what, f"≤ {limit:g}× {of}", "–", UNKNOWN))
        else:
            got = value / base
            verdict = YES if got <= limit else NO
            points.append(
                Point(number, what, f"≤ {limit:g}× {of}", f"{got:.2f}× ({value:.1f} / {base:.1f} {unit})", verdict)
            )

    def most(number: int, what: str, limit: float, unit: str, value: float | None) -> None:
        points.append(_most(number, what, limit, unit, value))

    small, fast, big = "fan-out, 500 sockets, 20/s", "fan-out, 500 sockets, 200/s", "fan-out, 10000 sockets, 5/s"
    ratio(1, "500 sockets, 20/s", 1.15, (small, DIRECT), (small, FLOOR), "floor")
    ratio(1, "the same, p50 latency", 1.7, (small, DIRECT), (small, FLOOR), "floor", "p50_ms")
    ratio(1, "the same", 0.65, (small, DIRECT), (small, TANGRAM), "tangram")
    ratio(1, "the same", 0.15, (small, DIRECT), (small, SOCKETIO), "python-socketio")
    ratio(1, "500 sockets, 200/s", 1.1, (fast, DIRECT), (fast, FLOOR), "floor")
    ratio(1, "10 000 sockets, 5/s", 1.12, (big, DIRECT), (big, FLOOR), "floor")
    few = "fan-out, 100 sockets, 20/s"
    ratio(1, "100 sockets, 20/s", 1.5, (few, DIRECT), (few, FLOOR), "floor")
    most(1, "heartbeat replies meanwhile, p99", 50, "ms", table.value("heartbeat replies", DIRECT, "p99_ms"))
    ratio(2, "portable path, 500 sockets, 20/s", 2.3, (small, PORTABLE), (small, FLOOR), "floor")
    points.append(Point(3, "which path serves", "automatic, and shown", "by tests; `relay_sockets{path}`", UNKNOWN))
    # In deliveries of the floor: microseconds of two machines cannot be compared.
    unheard = table.find("events without subscribers", DIRECT)
    ratio(
        4, "event without subscribers, 200 000/s", 0.35, ("events without subscribers", DIRECT), (small, FLOOR), "floor"
    )
    lost = unheard is None or " 0 of " not in f" {unheard.note.split(', ')[-1]}"
    said = "–" if unheard is None else unheard.note
    points.append(Point(4, "of them lost", "none", said, UNKNOWN if unheard is None else NO if lost else YES))
    ratio(4, "1 000 topics, one socket on each", 2.9, ("1000 topics", DIRECT), (small, FLOOR), "floor")
    join = table.find("connect and join, 10000", DIRECT)
    burst = "connect and join, 500 sockets"
    ratio(5, burst, 0.75, (burst, DIRECT), (burst, BROADCASTER), "broadcaster")
    most(6, "memory of a joined idle socket", 12, "kB", None if join is None else join.memory_kb)
    ratio(7, "push with its reply", 7, ("push with reply", DIRECT), (small, FLOOR), "floor")
    alone = table.value("slow readers: none", DIRECT, "p99_ms")
    for policy in POLICIES:
        slow = table.find(f"slow readers: 10 of 1000, 50/s, {policy}", DIRECT)
        if slow is None or slow.p99_ms is None or not alone:
            points.append(Point(8, f"p99 with 10 slow readers, {policy}", "≤ 1.3×", "–", UNKNOWN))
            continue
        got = slow.p99_ms / alone
        text = f"{got:.2f}× ({slow.p99_ms:.1f} / {alone:.1f} ms); {slow.note}"
        good = got <= 1.3 and "NOT" not in slow.note
        points.append(Point(8, f"p99 with 10 slow readers, {policy}", "≤ 1.3×, all counted", text, YES if good else NO))
    points += _compression(table)
    growth = _growth(rows)
    points.append(Point(10, "growth in sockets and topics", "drawn", growth or "–", YES if growth else UNKNOWN))
    one, two = table.find("1 worker,", DIRECT), table.find("2 workers,", DIRECT)
    if one is None or two is None or not one.per_s or not two.per_s:
        points.append(Point(10, "two workers", "≥ 1.8×", "–", UNKNOWN))
    else:
        got = two.per_s / one.per_s
        verdict = YES if got >= 1.8 else UNKNOWN if "no room" in two.note else NO
        points.append(Point(10, "two workers", "≥ 1.8× one's load", f"{got:.2f}×; {two.note}".rstrip("; "), verdict))
    publish = "publish with history, 500 sockets, 20/s"
    ratio(11, "delivery with history", 1.1, (publish, DIRECT), ("bare publish, 500 sockets, 20/s", DIRECT), "bare")
    share = table.value("publish with history, 10 sockets, saturated", REDIS)
    most(11, "Redis's share of a publish with history", 40, "µs", share)
    ratio(11, "event recovered", 1, ("recovery of", DIRECT), ("live events beside", DIRECT), "live")
    # Positions may cost those who do not ask for them no more than two equal relays differ by.
    asked = [table.find("positions not asked for", server) for server in (WITHOUT, WITH, AGAIN)]
    points.append(_against_itself(11, "positions, for those who do not ask", asked))
    return points + _topic_mode(table) + _cluster(table)


def _against_itself(number: int, what: str, rows: Sequence[Row | None], limit: float | None = None) -> Point:
    """Compare a relay with the one that was measured before and after it.

    Args: rows: before, between, after.
          limit: what the ratio may be; without it, 1 and twice what the other two differ by.
    """
    target = "≤ 1 + 2 × spread of A/A" if limit is None else f"≤ {limit:g}×"
    before, now, after = ((found and found.cpu_us and found.rounds) or [] for found in rows)
    if not all(before) or not all(now) or not all(after) or not before or not now or not after:
        return Point(number, what, target, "–", UNKNOWN)
    control = [other / one for one, other in zip(before, after, strict=True)]
    # Measured between the two others, so that a steady drift of the machine cancels out.
    got = median(2 * value / (one + other) for one, value, other in zip(before, now, after, strict=True))
    spread = median(abs(value - 1) for value in control)
    text = f"{got:.3f}×; A/A {median(control):.3f}×, spread {spread:.3f}; medians of {len(control)} pairs"
    most = 1 + 2 * spread if limit is None else limit
    return Point(number, what, target, text, YES if got <= most else NO)


def _topic_mode(table: _Rows) -> list[Point]:
    """Topic mode against the pattern mode before and after it, and what is asked of it alone."""
    ways = (topic_mode.PATTERN, topic_mode.TOPIC, topic_mode.AGAIN)
    heard = [table.find("events heard by one socket", way) for way in ways]
    joined = [table.find(f"connect and join, {topic_mode.SOCKETS} sockets, a topic for each", way) for way in ways]
    alone = table.value("joins of new topics, one after the other", topic_mode.TOPIC, "p50_ms")
    again = f"{topic_mode.AGAIN_TOPICS} topics subscribed to again"
    return [
        _against_itself(13, "topic mode: event heard by one socket", heard),
        _against_itself(13, "topic mode: connect and join", joined, 1.15),
        _most(13, "topic mode: a join alone, p50", 1, "ms", alone),
        _most(13, f"topic mode: {again}", 2, "s", table.value(again, DIRECT, "seconds")),
        _most(13, "heartbeat replies meanwhile, p99", 50, "ms", table.value(again, DIRECT, "p99_ms")),
    ]


def _cluster(table: _Rows) -> list[Point]:
    """Three masters against one before and after them, and what an event costs the nodes that it does not concern."""
    shared = f"events on {cluster.SOCKETS} topics of a cluster"
    rows = [table.find(shared, f"Redis, {way}") for way in cluster.MASTERS]
    others = table.value("events of another node's topics", cluster.OTHERS)
    return [
        _against_itself(14, "cluster: an event, three masters together against one", rows),
        _most(14, "cluster: an event, each node that does not own its topic", 0.1, "µs", others),
    ]


def _most(number: int, what: str, limit: float, unit: str, value: float | None) -> Point:
    got = "–" if value is None else f"{value:.{1 if limit >= 1 else 2}f} {unit}"
    verdict = UNKNOWN if value is None else YES if value <= limit else NO
    return Point(number, what, f"≤ {limit:g} {unit}", got, verdict)


def _compression(table: _Rows) -> list[Point]:
    plain, compressed = table.find("telemetry", PLAIN), table.find("telemetry", COMPRESSED)
    targets = (("bytes on the wire", 0.5, "wire_bytes", "{:.0f} bytes"), ("CPU", 1.2, "cpu_us", "{:.1f} µs"))
    points: list[Point] = []
    for what, limit, field, form in targets:
        value, base = (None if found is None else getattr(found, field) for found in (compressed, plain))
        if not value or not base:
            points.append(Point(9, f"compression: {what}", f"≤ {limit:g}× plain", "–", UNKNOWN))
            continue
        text = f"{value / base:.2f}× ({form.format(value)} / {form.format(base)})"
        verdict = YES if value / base <= limit else NO
        points.append(Point(9, f"compression: {what}", f"≤ {limit:g}× plain", text, verdict))
    return points


def _growth(rows: Sequence[Row]) -> str:
    parts = []
    for title, curve in (("sockets", sockets_curve(rows, DIRECT)), ("topics", topics_curve(rows))):
        if curve:
            steps = ", ".join(f"{size}: {value:.1f}" for size, value in curve)
            parts.append(f"µs by {title}: {steps}")
    return "; ".join(parts)


def _curve(rows: Sequence[Row], server: str, size_of: Callable[[Row], int | None]) -> list[tuple[int, float]]:
    found = {size: row.cpu_us for row in rows if row.server == server and (size := size_of(row)) and row.cpu_us}
    return sorted(found.items())


def sockets_curve(rows: Sequence[Row], server: str) -> list[tuple[int, float]]:
    """CPU per delivery by number of sockets, of the runs of `many_sockets`."""

    def size_of(row: Row) -> int | None:
        words = row.scenario.split(" ")
        return int(words[1]) if words[0] == "fan-out," and words[1] != "500" else None

    return _curve(rows, server, size_of)


def topics_curve(rows: Sequence[Row]) -> list[tuple[int, float]]:
    """CPU per event by number of topics."""

    def size_of(row: Row) -> int | None:
        words = row.scenario.split(" ")
        return int(words[0]) if words[1] == "topics," else None

    return _curve(rows, DIRECT, size_of)


PEERS = (TANGRAM, SOCKETIO, BROADCASTER)
