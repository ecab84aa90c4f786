"""Prometheus's text format, by the package prometheus-client, which the extra `metrics` brings.

Owns the format; must not know which metrics there are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from relay.metrics import BOUNDS_S


class Family(NamedTuple):
    """One metric with its values by labels; a histogram's are the counts of its buckets, then its sum in seconds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    labels: tuple[str, ...]
    values: Mapping[tuple[str, ...], float | list[float]]


def write_text(families: Iterable[Family]) -> bytes:
    """Write metrics in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Families(tuple(families)))
    return generate_latest(registry)


class _Families(Collector):
    """The metrics, as prometheus-client wants them."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        metrics: dict[str, Metric] = {}
        for metric in map(_metric, self._families):
            known = metrics.setdefault(metric.name, metric)
            if known is not metric:  # the text may have each name once
                known.samples += [sample for sample in metric.samples if sample not in known.samples]
        yield from metrics.values()


def _metric(family: Family) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.meaning, labels=family.labels)
        for labels, value in family.values.items():
            assert isinstance(value, list), "a histogram has buckets"
            *counts, sum_s = value
            bounds = [*map(str, BOUNDS_S), "+Inf"]
            so_far = [sum(counts[: place + 1]) for place in range(len(counts))]
            histogram.add_metric(labels, list(zip(bounds, so_far, strict=True)), sum_s)
        return histogram
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric: CounterMetricFamily | GaugeMetricFamily = make(family.name, family.meaning, labels=family.labels)
    for labels, value in family.values.items():
        assert not isinstance(value, list), "a number"
        metric.add_metric(labels, value)
    return metric
