"""`relay.web.prometheus`: what ``/metrics`` shows, of one process and of several workers; and that the docs tell it."""

import asyncio
import fcntl
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from relay import Plugin, Relay
from relay.config_sections import Overflow
from relay.errors import DROPPED, Reason
from relay.metrics import Metrics, ProcessState, ShardTopics
from relay.web.multiprocess import SnapshotStore
from relay.web.prometheus import METRIC_SPECS, READ_INTERVAL_S, MetricsExporter, dropped_labels

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def read(exporter: MetricsExporter) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample, as Prometheus's own parser reads it, by name and label values, sorted by label."""
    families = list(text_string_to_metric_families(exporter.text().decode()))
    assert all(family.documentation for family in families)
    return {
        (sample.name, tuple(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


def state(sockets: int = 0, topics: int = 0, live: bool = True) -> ProcessState:
    return ProcessState({"direct": sockets, "asgi": 0}, topics, live)


def lone(metrics: Metrics, now: Callable[[], ProcessState] = state) -> MetricsExporter:
    return MetricsExporter(metrics, now)


def test_every_counter_of_the_relay_is_shown() -> None:
    """Each field is set to a number of its own, and comes out under some name."""
    metrics = Metrics()
    wanted: set[float] = set()
    for place, field in enumerate(fields(Metrics)):
        number = 1000 + place
        value = getattr(metrics, field.name)
        if isinstance(value, int | float):
            setattr(metrics, field.name, number)
        elif hasattr(value, "observe"):
            value.observe(number)
        elif field.name.endswith("_time"):
            value["p"].observe(number)
        else:
            value["x"] += number
        # By how frames are written, and less those that came on the channels of topics.
        if field.name not in ("sockets", "events_in"):
            wanted.add(number)
    assert wanted - set(read(lone(metrics)).values()) == set()


def test_drops_of_each_kind_and_faults_of_each_plugin_are_there_from_the_start() -> None:
    """A series that begins with its first drop has no rise, and no alarm rings."""
    relay = Relay(broadcast_url="memory://", extra_plugins=(Plugin("chatty"),))
    samples = read(relay.exporter)
    shown = {labels for name, labels in samples if name == "relay_dropped_total"}
    assert shown == {dropped_labels(reason)[::-1] for reason in DROPPED}
    assert len(shown) == len(DROPPED)
    assert samples["relay_plugin_errors_total", ("chatty",)] == samples["relay_plugin_calls_total", ("chatty",)] == 0


def test_reasons_of_drops_are_those_of_the_table() -> None:
    code = "".join(path.read_text("utf-8") for path in (DOCS.parents[1] / "relay").rglob("*.py"))
    used = set(re.findall(r"""(?:dropped\[|_lose\([^"()]*)"([^"]+)"[\],)]""", code))
    assert len(used) >= 7
    assert used | {f"slow reader, {overflow}" for overflow in Overflow if overflow is not Overflow.DISCONNECT} <= set(
        DROPPED
    )


def test_names_and_units_follow_the_conventions() -> None:
    """promtool check metrics: a unit is a base unit, and last but for ``_total``; only counters end in it."""
    for spec in METRIC_SPECS:
        assert spec.name.startswith(("relay_", "process_"))
        assert not spec.name.endswith(("_total", "_s", "_ms", "_milliseconds", "_count", "_sum", "_bucket", "_info_"))
        assert spec.kind != "histogram" or spec.name.endswith("_seconds")
        assert spec.meaning.endswith("."), spec.name
        assert ":" not in spec.name
    assert len({spec.name for spec in METRIC_SPECS}) == len(METRIC_SPECS)


def test_histogram_counts_what_is_no_larger_than_each_bound() -> None:
    metrics = Metrics()
    for duration_s in (0.0001, 0.002, 0.002, 50):
        metrics.fan_out.observe(duration_s)
    samples = read(lone(metrics))
    assert samples["relay_fan_out_seconds_bucket", ("0.0001",)] == 1
    assert samples["relay_fan_out_seconds_bucket", ("0.001",)] == 1
    assert samples["relay_fan_out_seconds_bucket", ("0.003",)] == 3
    assert samples["relay_fan_out_seconds_bucket", ("10.0",)] == 3
    assert samples["relay_fan_out_seconds_bucket", ("+Inf",)] == 4
    assert samples["relay_fan_out_seconds_count", ()] == 4
    assert samples["relay_fan_out_seconds_sum", ()] == pytest.approx(50.0041)


def test_label_may_hold_anything() -> None:
    metrics = Metrics()
    metrics.topic_events['a "quoted" \\ pattern\nof two lines'] += 3
    assert read(lone(metrics))["relay_topic_events_total", ('a "quoted" \\ pattern\nof two lines',)] == 3


@pytest.mark.parametrize(
    ("reason", "labels"),
    [
        ("handshake: no token", ("handshake", "no_token")),
        ("rest: body too large", ("rest", "body_too_large")),
        ("proxy: client gone", ("proxy", "client_gone")),
        ("stale join_ref", ("socket", "stale_join_ref")),
        (Reason.RATE_LIMITED, ("socket", "rate_limited")),
    ],
)
def test_refusals_are_shown_by_kind_and_reason(reason: str, labels: tuple[str, str]) -> None:
    metrics = Metrics()
    metrics.refused[reason] += 3
    assert read(lone(metrics))["relay_refused_total", labels] == 3


@pytest.mark.parametrize(
    ("reason", "labels"),
    [
        ("slow reader disconnected", ("slow_reader", "disconnect")),
        ("slow reader, drop-oldest", ("slow_reader", "drop_oldest")),
        ("slow reader, latest", ("slow_reader", "latest")),
        ("on_event handler too slow", ("on_event_handler_too_slow", "")),
        (Reason.EVENTS_MISSED, ("events_may_have_been_missed", "")),
    ],
)
def test_drops_are_shown_by_reason_and_overflow_policy(reason: str, labels: tuple[str, str]) -> None:
    assert reason in DROPPED
    metrics = Metrics()
    metrics.dropped[reason] += 3
    assert read(lone(metrics))["relay_dropped_total", labels[::-1]] == 3


def test_label_values_are_snake_case() -> None:
    for labels in map(dropped_labels, DROPPED):
        assert all(re.fullmatch(r"[a-z][a-z0-9_]*|", value) for value in labels)


FORMER = {
    "events_without_subscribers": "events_unheard",
    "rejoins_requested": "rejoins_asked",
    "disconnects_by_control": "sent_away",
    "event_loop_stalls": "stalls",
}


def test_former_names_and_label_values_are_exported_beside_the_new_ones_where_asked_for() -> None:
    metrics = Metrics(events_without_subscribers=1, rejoins_requested=2, disconnects_by_control=3, event_loop_stalls=4)
    metrics.refused["handshake: no token"] = 5
    metrics.dropped["slow reader, drop-oldest"] = 6
    former: dict[tuple[str, tuple[str, ...]], float] = {
        (f"relay_{old}_total", ()): getattr(metrics, new) for new, old in FORMER.items()
    }
    former["relay_refused_total", ("handshake: no token",)] = 5
    former["relay_dropped_total", ("slow reader, drop-oldest",)] = 6
    former["relay_sockets", ("portable",)] = 8
    now: dict[tuple[str, tuple[str, ...]], float] = {
        (f"relay_{new}_total", ()): getattr(metrics, new) for new in FORMER
    }
    now["relay_refused_total", ("handshake", "no_token")] = 5
    now["relay_dropped_total", ("drop_oldest", "slow_reader")] = 6
    now["relay_sockets", ("asgi",)] = 8
    new = read(MetricsExporter(metrics, lambda: ProcessState({"direct": 7, "asgi": 8}, 0, True)))
    both = MetricsExporter(metrics, lambda: ProcessState({"direct": 7, "asgi": 8}, 0, True), old_names=True)
    assert now.items() <= new.items() and not former.keys() & new.keys()
    samples = read(both)
    assert (now | former).items() <= samples.items()
    assert samples.keys() - new.keys() >= former.keys()
    text = both.text().decode()
    helps = re.findall(r"^# HELP (\S+)", text, re.MULTILINE)
    assert len(helps) == len(set(helps)), "each name has one header"
    series = re.findall(r"^(relay_\S+?(?:\{.*\})?) \S+$", text, re.MULTILINE)
    assert len(series) == len(set(series)) > 50, "no series comes twice"


def test_setting_exports_former_names() -> None:
    relay = Relay(broadcast_url="memory://", metrics={"old_names": True})
    assert ("relay_stalls_total", ()) in read(relay.exporter)
    assert ("relay_stalls_total", ()) not in read(Relay(broadcast_url="memory://").exporter)


def test_metrics_of_the_process_are_its_own() -> None:
    samples = read(lone(Metrics()))
    assert samples["process_resident_memory_bytes", ()] > 1_000_000
    assert samples["process_cpu_seconds_total", ()] > 0
    assert 2 < samples["process_open_fds", ()] <= samples["process_max_fds", ()]
    assert samples["relay_workers", ()] == 1


# Workers.


def test_any_worker_tells_the_sums_of_all(tmp_path: Path) -> None:
    one, two = Metrics(), Metrics()
    first = MetricsExporter(one, lambda: state(3, 2), str(tmp_path))
    second = MetricsExporter(two, lambda: state(4, 1, live=False), str(tmp_path))
    one.joins, two.joins = 10, 5
    one.outbox_bytes, two.outbox_bytes = 100, 20
    one.dropped["a"] += 1
    two.dropped["a"] += 2
    two.dropped["b"] += 4
    one.link_lag_s, two.link_lag_s = 0.5, 0.25
    one.plugin_time["p"].observe(0.2)
    two.plugin_time["p"].observe(0.02)
    first.write()
    second.write()
    for samples in (read(first), read(second)):
        assert samples["relay_joins_total", ()] == 15
        assert (samples["relay_dropped_total", ("", "a")], samples["relay_dropped_total", ("", "b")]) == (3, 4)
        assert samples["relay_sockets", ("direct",)] == 7
        assert (samples["relay_topics", ()], samples["relay_outbox_bytes", ()]) == (3, 120)
        assert samples["relay_link_live", ()] == 0, "one of them is deaf"
        assert samples["relay_link_lag_seconds", ()] == 0.5
        assert samples["relay_plugin_seconds_count", ("p",)] == 2
        assert samples["relay_plugin_seconds_bucket", ("0.03", "p")] == 1
        assert samples["relay_workers", ()] == 2


def test_sums_of_all_are_a_snapshot_too_and_of_one_alone_its_own(tmp_path: Path) -> None:
    one, two = Metrics(joins=10), Metrics(joins=5)
    first = MetricsExporter(one, lambda: state(3), str(tmp_path))
    MetricsExporter(two, lambda: state(4), str(tmp_path)).write()
    del two
    ended = first.of_all()
    assert ended["relay_joins"] == {"": 15}
    assert (ended["relay_sockets"]["direct"], ended["relay_workers"]) == (3, {"": 1})
    alone = lone(one).of_all()
    assert alone["relay_joins"] == {"": 10} and alone.keys() == ended.keys() == first.snapshot().keys()


def test_worker_that_is_asked_tells_its_own_metrics_as_they_are_now(tmp_path: Path) -> None:
    metrics = Metrics()
    exporter = MetricsExporter(metrics, state, str(tmp_path))
    for joins in (1, 2):
        metrics.joins = joins
        assert read(exporter)["relay_joins_total", ()] == joins


def test_what_an_ended_worker_counted_stays_and_what_it_held_goes(tmp_path: Path) -> None:
    living = MetricsExporter(Metrics(), lambda: state(1), str(tmp_path))
    for place in range(1, 4):
        metrics = Metrics(joins=5, outbox_bytes=10)
        ending = MetricsExporter(metrics, lambda: state(10, 10), str(tmp_path))
        ending.write()
        assert read(living)["relay_sockets", ("direct",)] == 11
        del ending  # as a process that ends, the system closes its files
        samples = read(living)
        assert samples["relay_joins_total", ()] == 5 * place
        assert (samples["relay_sockets", ("direct",)], samples["relay_outbox_bytes", ()]) == (1, 0)
        assert samples["relay_workers", ()] == 1


# While a relay runs.


async def test_metrics_are_read_in_another_thread_and_once_a_second() -> None:
    """To list descriptors and to wait for a lock takes milliseconds, in which the event loop would do nothing else."""
    now, metrics = [100.0], Metrics(joins=1)
    threads: list[threading.Thread] = []

    def ask_state() -> ProcessState:
        threads.append(threading.current_thread())
        return state(1)

    exporter = MetricsExporter(metrics, ask_state, clock=lambda: now[0])
    texts = await asyncio.gather(*(exporter.current_text() for _ in range(20)))
    assert len(threads) == 1 and threads[0] is not threading.main_thread()
    assert len(set(texts)) == 1 and b"relay_joins_total 1.0" in texts[0]
    metrics.joins = 2
    now[0] += READ_INTERVAL_S / 2
    assert await exporter.current_text() == texts[0]
    now[0] += READ_INTERVAL_S / 2
    assert (await exporter.current())["relay_joins"] == {"": 2}
    assert len(threads) == 2, "of which the second is what the console sees, for itself"
    assert b"relay_joins_total 2.0" in await exporter.current_text()
    exporter.close()


async def test_event_loop_goes_on_while_the_lock_of_the_directory_is_waited_for(tmp_path: Path) -> None:
    exporter = MetricsExporter(Metrics(), state, str(tmp_path))
    exporter.write()
    with (tmp_path / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = [asyncio.create_task(exporter.save()), asyncio.create_task(exporter.current_text())]
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert not any(task.done() for task in waiting)
        fcntl.flock(lock, fcntl.LOCK_UN)
        await asyncio.gather(*waiting)
    exporter.close()


def test_open_files_are_counted_without_a_list_of_them_where_the_system_knows() -> None:
    before = MetricsExporter(Metrics(), state).snapshot()["process_open_fds"][""]
    kept = [os.dup(0) for _ in range(200)]
    try:
        after = MetricsExporter(Metrics(), state).snapshot()["process_open_fds"][""]
    finally:
        for number in kept:
            os.close(number)
    assert isinstance(before, int) and isinstance(after, int)
    assert abs(after - before - 200) <= 2


# The directory.


def total(values: list[int]) -> int:
    return sum(values)


def test_ended_workers_do_not_fill_the_folder(tmp_path: Path) -> None:
    for _ in range(20):
        SnapshotStore(tmp_path, total).write(1)
    directory = SnapshotStore(tmp_path, total)
    directory.write(100)
    assert directory.read() == [100, 20]
    assert len(list(tmp_path.iterdir())) <= 4


def test_shorter_value_replaces_a_longer_one(tmp_path: Path) -> None:
    directory = SnapshotStore(tmp_path, list)
    directory.write(["long"] * 100)
    directory.write(["short"])
    assert directory.read()[0] == ["short"]


def test_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    directory = SnapshotStore(tmp_path / "a" / "b", list)
    directory.write([])
    assert (tmp_path / "a" / "b").stat().st_mode & 0o077 == 0
    (path,) = (path for path in (tmp_path / "a" / "b").glob("*.json") if path.name != "ended.json")
    assert path.stat().st_mode & 0o077 == 0
    assert json.loads(path.read_text()) == []


# The documentation.


def test_documentation_tells_every_metric() -> None:
    rows = [
        f"| `{spec.shown_name}`{' by ' if spec.labels else ''}{', '.join(f'`{name}`' for name in spec.labels)} "
        f"| {spec.kind} | {spec.meaning} |"
        for spec in METRIC_SPECS
    ]
    told = [line for line in DOCS.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert told == rows, "the table of docs/metrics.md should be:\n" + "\n".join(rows)


def test_topics_of_a_cluster_are_shown_by_master() -> None:
    topics = {"one:6379": ShardTopics(3, 1), "two:6379": ShardTopics(0, 2)}
    shown = read(lone(Metrics(), lambda: state()._replace(shard_topics=topics)))
    assert [shown["relay_shard_topics", (node,)] for node in topics] == [3, 0]
    assert [shown["relay_shard_lingering_topics", (node,)] for node in topics] == [1, 2]
