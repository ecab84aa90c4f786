"""Prometheus's text format, by the package prometheus-client, which the extra `metrics` brings.

Owns the format; must not know which figures there are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from relay.metrics import BOUNDS_S


class Family(NamedTuple):
    """One figure with its values by label; a histogram's are the counts of its buckets, then its sum in seconds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    meaning: str
    label: str
    values: Mapping[str, float | list[float]]


def write_text(families: Iterable[Family]) -> bytes:
    """Write figures in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Families(tuple(families)))
    return generate_latest(registry)


class _Families(Collector):
    """The figures, as prometheus-client wants them."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield _metric(family)


def _metric(family: Family) -> Metric:
    names = [family.label] if family.label else []
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.meaning, labels=names)
        for label, value in family.values.items():
            assert isinstance(value, list), "a histogram has buckets"
            *counts, sum_s = value
            bounds = [*map(str, BOUNDS_S), "+Inf"]
            so_far = [sum(counts[: place + 1]) for place in range(len(counts))]
            histogram.add_metric([label] if names else [], list(zip(bounds, so_far, strict=True)), sum_s)
        return histogram
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric: CounterMetricFamily | GaugeMetricFamily = make(family.name, family.meaning, labels=names)
    for label, value in family.values.items():
        assert not isinstance(value, list), "a number"
        metric.add_metric([label] if names else [], value)
    return metric
