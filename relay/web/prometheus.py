"""What ``/metrics`` shows: every metric by its Prometheus name, of one process or of all workers together.

Owns names, meanings and the text format; must not know sockets or the bus. ``docs/metrics.md`` holds the same table;
a test compares the two.

Each of several workers writes its metrics to a directory (`relay.web.multiprocess`) once a second. The one that is
asked adds them all up. What a worker that has ended had counted stays in the sums, what it held (sockets, bytes) does
not.

Without the extra `metrics` the metrics of the process are left out, and there is no text: the console shows the rest.
"""

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from relay.errors import DROPPED, ConfigError
from relay.extras import missing
from relay.fd_limit import descriptors
from relay.metrics import Histogram, Metrics, ProcessState
from relay.version import __version__

if TYPE_CHECKING:
    import psutil

    from relay.web.multiprocess import SnapshotStore

READ_INTERVAL_S = 1.0
"""Seconds for which a reading is reused, however often it is asked for."""


T = TypeVar("T")

Value: TypeAlias = float | list[float]
"""A number, or a histogram: the counts of its buckets, then its sum in seconds."""

Snapshot: TypeAlias = dict[str, dict[str, Value]]
"""Values by metric and label; "" where a metric has no label."""

Source: TypeAlias = "Callable[[Metrics, ProcessState, psutil.Process | None], Mapping[str, float | Histogram]]"


def _whole(word: str) -> tuple[str, ...]:
    return (word,)


def _snake_case(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def refused_labels(reason: str) -> tuple[str, str]:
    """Return kind and reason of a refusal: "handshake: no token" is ``handshake``, ``no_token``.

    What happens on an open socket is counted without a kind; it is ``socket``.
    """
    kind, found, rest = reason.partition(": ")
    return (_snake_case(kind), _snake_case(rest)) if found else ("socket", _snake_case(reason))


def dropped_labels(reason: str) -> tuple[str, str]:
    """Return reason and overflow policy of a drop: "slow reader, latest" is ``slow_reader``, ``latest``."""
    if reason == "slow reader disconnected":
        return "slow_reader", "disconnect"
    reason, _, overflow = reason.partition(", ")
    return _snake_case(reason), _snake_case(overflow)


def webhook_labels(word: str) -> tuple[str, str]:
    """Return webhook and outcome of a request: "room:*: timeout" is ``room:*``, ``timeout``."""
    name, _, outcome = word.rpartition(": ")
    return name, outcome


class MetricSpec(NamedTuple):
    """One metric: its name (a counter's without ``_total``), what it means, and how it is read."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...]
    read: Source
    merge: Callable[[list[float]], float] = sum
    """What makes one number of those of all workers."""
    split: Callable[[str], tuple[str, ...]] = _whole
    """Makes the values of the labels of the word that is counted."""

    @property
    def shown_name(self) -> str:
        """The name as Prometheus has it."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _of(field: str) -> Source:
    """Read a field of `Metrics`."""

    def read(
        metrics: Metrics, state: ProcessState, process: "psutil.Process | None"
    ) -> Mapping[str, float | Histogram]:
        value = getattr(metrics, field)
        return value if isinstance(value, dict) else {"": value}

    return read


def _counter(field: str, meaning: str, *labels: str, split: Callable[[str], tuple[str, ...]] = _whole) -> MetricSpec:
    return MetricSpec(f"relay_{field}", "counter", meaning, labels, _of(field), split=split)


def _gauge(
    field: str, meaning: str, *labels: str, merge: Callable[[list[float]], float] = sum, name: str = ""
) -> MetricSpec:
    return MetricSpec(f"relay_{name or field}", "gauge", meaning, labels, _of(field), merge)


def _histogram(field: str, meaning: str, *labels: str) -> MetricSpec:
    return MetricSpec(f"relay_{field.removesuffix('_time')}_seconds", "histogram", meaning, labels, _of(field))


def _of_process(read_process: "Callable[[psutil.Process], float]") -> Source:
    """Read a metric of the process; without psutil there is none."""

    def read(
        metrics: Metrics, state: ProcessState, process: "psutil.Process | None"
    ) -> Mapping[str, float | Histogram]:
        return {} if process is None else {"": read_process(process)}

    return read


def _this_process() -> "psutil.Process":
    import psutil

    return psutil.Process()


def _open_files(process: "psutil.Process") -> int:
    """How many file descriptors are open. To list 8 000 of them takes milliseconds; Linux 6.2 and later know it."""
    try:
        return os.stat("/proc/self/fd").st_size or process.num_fds()
    except OSError:  # no Linux
        return process.num_fds()


METRIC_SPECS: tuple[MetricSpec, ...] = (
    MetricSpec(
        "relay_sockets",
        "gauge",
        "Sockets open now, by how frames are written; streams of server-sent events are `sse`, long-polling clients "
        "`longpoll`.",
        ("path",),
        lambda m, s, p: s.sockets,
    ),
    _counter("sockets_opened", "Sockets opened."),
    MetricSpec(
        "relay_topics",
        "gauge",
        "Topics with at least one subscriber; a topic counts once for each worker.",
        (),
        lambda m, s, p: {"": s.topics},
    ),
    _counter("joins", "Joins accepted."),
    _counter("pushes_in", "Pushes received from clients."),
    _counter("pushes_out", "Of those, pushes that the bus has accepted."),
    _counter("client_events", "Of those received, pushes that were sent to the other subscribers of their topic."),
    MetricSpec(
        "relay_events_in",
        "counter",
        "Events received from the bus, by where they were published: `to` for `to:<topic>:<event>`, `topic` for "
        "`topic:<topic>`, `publish` for `PUBLISH` there on a cluster; an event counts once for each worker.",
        ("form",),
        lambda m, s, p: {
            "to": max(m.events_in - m.events_on_topics - m.events_by_publish, 0),
            "topic": m.events_on_topics,
            "publish": m.events_by_publish,
        },
    ),
    _counter("events_without_subscribers", "Of those, events on topics without subscribers in that worker."),
    _counter("events_not_json", "Events whose payload looks like JSON but is not valid JSON: delivered as binary."),
    _counter("deliveries", "Frames of events written, or queued, for a socket."),
    _counter("delivered_bytes", "Bytes of those frames, before compression and without their WebSocket headers."),
    _counter("cut_off_bytes", "Bytes written to sockets that were cut off before the kernel had accepted them."),
    _histogram("fan_out", "For each event, the time from its arrival at the hub to the last of its deliveries."),
    MetricSpec(
        "relay_outbox_bytes",
        "gauge",
        "Bytes waiting for sockets that read too slowly.",
        (),
        _of("outbox_bytes"),
    ),
    MetricSpec(
        "relay_dropped",
        "counter",
        "Events not delivered, by reason; of slow readers, by overflow policy too.",
        ("reason", "overflow"),
        # With a zero for each that has not come yet: the first of them would else be no rise, and raise no alert.
        lambda m, s, p: {**dict.fromkeys(DROPPED, 0), **m.dropped},
        split=dropped_labels,
    ),
    _counter("dropped_topics", "Of those, events that slow readers missed, by pattern in `[[topics]]`.", "match"),
    _counter(
        "refused",
        "Handshakes, joins, pushes and REST requests refused, and sockets closed, by reason.",
        "kind",
        "reason",
        split=refused_labels,
    ),
    _counter("longpoll_base64", "Binary frames that long-polling clients were sent as text, in base64."),
    _counter("malformed", "Malformed frames from clients, by close code.", "code"),
    MetricSpec(
        "relay_in_flight_bytes",
        "gauge",
        "Bytes of messages and events that wait for plugin handlers, or are being handled.",
        (),
        _of("in_flight_bytes"),
    ),
    _counter("gaps", "Times the link to the bus was interrupted, so that events may have been missed."),
    _counter("history_appended", "Events that this worker appended to histories."),
    _counter("history_trimmed", "Events that full histories dropped for them."),
    _counter("history_recovered", "Joins that got all the events that their clients had missed."),
    _counter("history_not_recovered", "Joins that did not, by reason.", "reason"),
    _counter("history_replayed", "Events read from histories: for joins, slow readers and after interruptions."),
    _counter("history_catch_ups", "Times events that had not come from the bus were read, by cause.", "cause"),
    _counter("history_holes", "Times an event did not follow the one before it."),
    _counter("history_checks", "Times a topic was compared with its history."),
    _counter("history_lost", "Times missing events were not in the history either, so that subscribers had to rejoin."),
    MetricSpec("relay_presence_members", "gauge", "Members that are listed now.", (), _of("presence_members")),
    _counter("presence_diffs", "Differences of presence that were sent to subscribers."),
    _counter("presence_held_back", "Changes of a socket's presence over `limits.presence_per_s`, made later."),
    _counter("presence_counted", "Times a topic had too many members to list, so that only their number is sent."),
    _counter("presence_heals", "Times the members of another node were read again, by cause.", "cause"),
    _counter("presence_ghosts_removed", "Members removed because their node was dead."),
    _counter("presence_leases_lost", "Times this worker announced its members again, because its lease had ended."),
    _counter("rejoins_requested", "Subscriptions asked to rejoin after a gap."),
    _counter("disconnects_by_control", "Sockets and subscriptions ended because a user was disconnected or removed."),
    _counter("drained", "Sockets closed because relay shuts down."),
    _counter("event_loop_stalls", "Times the event loop was blocked for too long."),
    MetricSpec(
        "relay_link_live",
        "gauge",
        "1 while the subscription to the bus is live, in every worker.",
        (),
        lambda m, s, p: {"": s.link_live},
        min,
    ),
    MetricSpec(
        "relay_link_pushes",
        "gauge",
        "1 while the bus accepts pushes, in every worker; 0 on a replica, without a publishing connection, or without "
        "a majority of a cluster's masters.",
        (),
        lambda m, s, p: {"": s.link_pushes},
        min,
    ),
    MetricSpec(
        "relay_link_lag_seconds",
        "gauge",
        "Duration of the subscription's last ping, of the slowest worker; 0 before the first, and on a bus "
        "without pings.",
        (),
        _of("link_lag_s"),
        max,
    ),
    _gauge("shard_live", "1 while a master of a Redis Cluster is heard, in every worker.", "node", merge=min),
    _gauge(
        "shard_lag_s",
        "Duration of the last ping of a master, of the slowest worker.",
        "node",
        merge=max,
        name="shard_lag_seconds",
    ),
    _histogram(
        "subscribe_time",
        "Time until Redis confirmed the subscription of a join, by master of a cluster; `node` is empty on one Redis.",
        "node",
    ),
    _histogram(
        "resubscribe_time",
        "For each topic of a gap, the time from the new connection until Redis confirmed it, by the same label.",
        "node",
    ),
    MetricSpec(
        "relay_shard_topics",
        "gauge",
        "Joined topics that are subscribed to on a master; a topic counts once for each worker.",
        ("node",),
        lambda m, s, p: {node: topics.joined for node, topics in s.shard_topics.items()},
    ),
    MetricSpec(
        "relay_shard_lingering_topics",
        "gauge",
        "Topics that are subscribed to on a master until `redis.linger_s` after the last leave.",
        ("node",),
        lambda m, s, p: {node: topics.lingering for node, topics in s.shard_topics.items()},
    ),
    _counter("shard_gaps", "Gaps of a Redis Cluster, by the master at which topics are heard again.", "node"),
    _counter(
        "redirects",
        "Times a slot of a Redis Cluster had moved: `moved` and `ask` are answers, `unsubscribed` is a notice.",
        "kind",
    ),
    _counter("topic_events", "Events that had a subscriber, by pattern in `metrics.topics`.", "topic"),
    _counter("topic_deliveries", "Deliveries of those events, by the same pattern.", "topic"),
    _counter("plugin_calls", "Handlers and services called, by plugin.", "plugin"),
    _counter("plugin_errors", "Handlers that raised an exception or timed out, by plugin.", "plugin"),
    _histogram(
        "plugin_time",
        "Duration of handler calls, including waiting, by plugin; services are not included.",
        "plugin",
    ),
    _counter(
        "webhook_requests",
        "Requests to webhooks, by outcome: allowed, refused, delivered (a leave), or why there was no answer.",
        "webhook",
        "outcome",
        split=webhook_labels,
    ),
    _histogram("webhook_time", "Duration of those requests, including waiting, by webhook.", "webhook"),
    _gauge("webhook_pending", "Requests to webhooks in progress or waiting, by webhook.", "webhook"),
    _gauge(
        "webhook_open",
        "Workers that send no requests to a webhook because it has failed ten times in a row.",
        "webhook",
    ),
    _counter("webhook_openings", "Times a worker stopped sending requests to a webhook for that reason.", "webhook"),
    MetricSpec("relay_workers", "gauge", "Processes included in these metrics.", (), lambda m, s, p: {"": 1}),
    MetricSpec(
        "relay_info",
        "gauge",
        "1, labelled with the running version.",
        ("version",),
        lambda m, s, p: {__version__: 1},
        max,
    ),
    MetricSpec(
        "process_cpu_seconds",
        "counter",
        "Processor time, user and system.",
        (),
        _of_process(lambda p: sum(p.cpu_times()[:2])),
    ),
    MetricSpec(
        "process_resident_memory_bytes",
        "gauge",
        "Resident memory; memory shared by workers counts once for each.",
        (),
        _of_process(lambda p: p.memory_info().rss),
    ),
    MetricSpec("process_open_fds", "gauge", "Open file descriptors.", (), _of_process(_open_files)),
    MetricSpec(
        "process_max_fds",
        "gauge",
        "Maximum number of file descriptors, summed over workers.",
        (),
        lambda m, s, p: {"": descriptors()},
    ),
    MetricSpec(
        "process_start_time_seconds",
        "gauge",
        "Start time of the process in seconds since 1970; of workers, the earliest of those running.",
        (),
        _of_process(lambda p: p.create_time()),
        min,
    ),
)


def _former(present: str, **changes: Any) -> tuple[str, MetricSpec]:
    return present, next(spec for spec in METRIC_SPECS if spec.name == present)._replace(**changes)


FORMER_METRIC_SPECS: tuple[tuple[str, MetricSpec], ...] = (
    _former("relay_events_without_subscribers", name="relay_events_unheard"),
    _former("relay_rejoins_requested", name="relay_rejoins_asked"),
    _former("relay_disconnects_by_control", name="relay_sent_away"),
    _former("relay_event_loop_stalls", name="relay_stalls"),
    _former("relay_sockets", split=lambda word: ("portable" if word == "asgi" else word,)),
    _former("relay_dropped", labels=("reason",), split=_whole),
    _former("relay_refused", labels=("reason",), split=_whole),
)
"""Metrics by their present names, as they were before they or the values of their labels were renamed."""


class _Kept(Generic[T]):
    """What was read last, good for `READ_INTERVAL_S`. Used in one thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kept: tuple[float, T] | None = None

    def get(self, read: Callable[[], T]) -> T:
        if self._kept is None or self._clock() - self._kept[0] >= READ_INTERVAL_S:
            value = read()
            self._kept = self._clock(), value
        return self._kept[1]


class MetricsExporter:
    """The metrics of one relay, and of its fellow workers.

    Reading them lists files and waits for locks, so a running relay reads them in a thread, by the coroutines here.

    Args: state: what the process holds, asked for each time they are read, in any thread.
          directory: where workers leave their metrics for each other; empty for one process alone.
          clock: monotonic seconds.
          old_names: whether the text has renamed metrics under their former names too.
    """

    def __init__(
        self,
        metrics: Metrics,
        state: Callable[[], ProcessState],
        directory: str = "",
        clock: Callable[[], float] = time.monotonic,
        *,
        old_names: bool = False,
    ) -> None:
        self._old_names = old_names
        self._metrics = metrics
        self._state = state
        self._process = None if missing("metrics") else _this_process()
        self._store = _open(directory) if directory else None
        self._thread: ThreadPoolExecutor | None = None
        self._snapshot: _Kept[Snapshot] = _Kept(clock)
        self._text: _Kept[bytes] = _Kept(clock)

    async def current(self) -> Snapshot:
        """The metrics of all workers, at most `READ_INTERVAL_S` old."""
        return await self._in_thread(lambda: self._snapshot.get(self.of_all))

    async def read(self) -> Snapshot:
        """The metrics of all workers as they are now; a look at the console gets none that are older by it."""
        return await self._in_thread(self.of_all)

    async def current_text(self) -> bytes:
        """The same in Prometheus's text format; read for itself: a look at the console makes no scrape older."""
        return await self._in_thread(lambda: self._text.get(self.text))

    async def save(self) -> None:
        """Leave the metrics of this process for the others; nothing where it is alone."""
        if self._store is not None:
            await self._in_thread(self.write)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._thread is None:  # made by the process that runs, which may be a fork of the one that made this object
            self._thread = ThreadPoolExecutor(1, "relay-metrics")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """End the thread; what is asked for later begins another."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown(wait=False)

    def snapshot(self) -> Snapshot:
        """The metrics of this process, now."""
        process, state = self._process, self._state()
        if process is not None and process.pid != os.getpid():
            process = self._process = _this_process()
        return {
            spec.name: {
                str(label): [*value.buckets, value.sum_s] if isinstance(value, Histogram) else value
                # A copy: the event loop may count meanwhile, and a new label would end an iteration.
                for label, value in dict(spec.read(self._metrics, state, process)).items()
            }
            for spec in METRIC_SPECS
        }

    def of_all(self) -> Snapshot:
        """The metrics of all workers, now; those of the others are as old as a second at most."""
        snapshot = self.snapshot()
        if self._store is None:
            return snapshot
        self._store.write(snapshot)
        return _merged(self._store.read())

    def text(self) -> bytes:
        """All metrics in Prometheus's text format, now: of all workers, where there are several."""
        return _text(self.of_all(), self._old_names)

    def write(self) -> None:
        """As `save`, in the thread of the caller."""
        if self._store is not None:
            self._store.write(self.snapshot())


def _text(snapshot: Snapshot, old_names: bool) -> bytes:
    from relay.web.exposition import Family, write_text  # needs the extra `metrics`

    specs = [(spec.name, spec) for spec in METRIC_SPECS]
    return write_text(
        Family(
            spec.name,
            spec.kind,
            spec.meaning,
            spec.labels,
            {spec.split(word) if spec.labels else (): value for word, value in snapshot[source].items()},
        )
        for source, spec in (*specs, *(FORMER_METRIC_SPECS if old_names else ()))
    )


def _open(directory: str) -> "SnapshotStore":
    from relay.web.multiprocess import SnapshotStore  # locks files, which not every system can

    path = Path(directory)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        with TemporaryDirectory(dir=there):  # by trying: modes do not say it of root, nor of /proc
            pass
    except OSError:
        raise ConfigError(
            f"metrics.dir: expected a directory that can be made and written to, got {directory}"
        ) from None
    return SnapshotStore(path, _counted)


def _counted(snapshots: list[Snapshot]) -> Snapshot:
    """What is left of workers that have ended: what they have counted, and nothing that they held."""
    merged = _merged(snapshots)
    return {spec.name: merged[spec.name] for spec in METRIC_SPECS if spec.kind != "gauge"}


def _merged(snapshots: list[Snapshot]) -> Snapshot:
    merged: Snapshot = {}
    for spec in METRIC_SPECS:
        found = [snapshot.get(spec.name, {}) for snapshot in snapshots]
        labels = dict.fromkeys(label for values in found for label in values)
        merged[spec.name] = {
            label: _one(spec, [values[label] for values in found if label in values]) for label in labels
        }
    return merged


def _one(spec: MetricSpec, values: list[Value]) -> Value:
    histograms = [value for value in values if isinstance(value, list)]
    if histograms:
        return [sum(parts) for parts in zip(*histograms, strict=True)]
    return spec.merge([value for value in values if not isinstance(value, list)])
