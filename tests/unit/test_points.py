"""`benchmarks.points`: what the relay is to reach in topic mode, held against rows."""

import pytest

from benchmarks import cluster, topic_mode
from benchmarks.points import NO, UNKNOWN, YES, judge
from benchmarks.scenarios import DIRECT, Row

WAYS = (topic_mode.PATTERN, topic_mode.TOPIC, topic_mode.AGAIN)


def rows(
    heard: float = 1.0, joined: float = 1.1, alone_ms: float = 0.5, seconds: float = 1.5, p99_ms: float = 40
) -> list[Row]:
    """As a run of `topic_mode` and `topic_mode_again` gives them, with these costs against pattern mode."""
    found = [
        Row(what, way, cpu_us=100.0 * times, rounds=[100.0 * times, 104.0 * times])
        for what, ratio in (
            ("events heard by one socket, 1000 topics, saturated", heard),
            (f"connect and join, {topic_mode.SOCKETS} sockets, a topic for each", joined),
        )
        for way, times in zip(WAYS, (1.0, ratio, 1.02), strict=True)
    ]
    found.append(Row("joins of new topics, one after the other", topic_mode.TOPIC, p50_ms=alone_ms))
    again = f"{topic_mode.AGAIN_TOPICS} topics subscribed to again"
    return [*found, Row(again, DIRECT, cpu_us=10, seconds=seconds, p99_ms=p99_ms)]


def verdicts(rows: list[Row], number: int = 13) -> list[str]:
    return [point.verdict for point in judge(rows) if point.number == number]


@pytest.mark.parametrize(
    ("costs", "place"),
    [({"heard": 1.06}, 0), ({"joined": 1.17}, 1), ({"alone_ms": 1.01}, 2), ({"seconds": 2.1}, 3), ({"p99_ms": 51}, 4)],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_target_of_topic_mode_that_is_missed_is_said(costs: dict[str, float], place: int) -> None:
    expected = [YES] * 5
    assert verdicts(rows()) == expected
    expected[place] = NO
    assert verdicts(rows(**costs)) == expected


@pytest.mark.parametrize(
    ("shared", "others", "expected"), [(1.02, 0.1, [YES, YES]), (1.06, 0.1, [NO, YES]), (1.02, 0.11, [YES, NO])]
)
def test_target_of_a_cluster_that_is_missed_is_said(shared: float, others: float, expected: list[str]) -> None:
    """With a cluster of one master that differs from itself by 2 %."""
    scenario = f"events on {cluster.SOCKETS} topics of a cluster, saturated"
    found = [
        Row(scenario, f"Redis, {way}", cpu_us=10 * times, rounds=[10 * times, 11 * times])
        for way, times in zip(cluster.MASTERS, (1.0, shared, 1.02), strict=True)
    ]
    rows = [*found, Row("events of another node's topics", cluster.OTHERS, cpu_us=others)]
    assert verdicts(rows, 14) == expected


def test_what_was_not_measured_is_not_judged() -> None:
    assert {point.verdict for point in judge([]) if point.number != 3} == {UNKNOWN}
    unfinished = rows()[:-1] + [Row(f"{topic_mode.AGAIN_TOPICS} topics subscribed to again", DIRECT, seconds=None)]
    assert verdicts(unfinished)[3:] == [UNKNOWN, UNKNOWN]
