"""`benchmarks.simulate`: the model behind the sizing table."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.simulate import BEGIN, DOCS, END, PLANS, Costs, Fleet, processes_reached, simulate, table

COSTS = Costs(unheard_us=2, heard_us=20, delivery_us=10, socket_kb=10)


@pytest.mark.parametrize(("processes", "audience"), [(1, 10), (2, 1), (8, 10), (40, 10), (40, 1000)])
def test_processes_that_hear_an_event_are_those_of_its_subscribers(processes: int, audience: int) -> None:
    expected = processes * (1 - (1 - 1 / processes) ** audience)
    assert processes_reached(processes, audience, random.Random(1)) == pytest.approx(expected, rel=0.03)


def test_one_process_needs_the_sum_of_its_costs() -> None:
    needs = simulate(Fleet(1, 1000, 100, audience=10, payload_bytes=140), COSTS)
    for mode in ("pattern", "topic"):
        assert needs[mode].cores == pytest.approx(100 * (20 + 9 * 10) / 1e6)
        assert needs[mode].redis_per_s == 100
        assert needs[mode].redis_mbit_s == pytest.approx(100 * 200 * 8 / 1e6)
        assert needs[mode].memory_mb == 10


def test_pattern_mode_ends_where_redis_does_and_topic_mode_does_not() -> None:
    fleet = Fleet(40, 1_000_000, 10_000)
    needs = simulate(fleet, COSTS)
    assert (needs["pattern"].redis_per_s, needs["pattern"].verdict) == (400_000, "no: Redis")
    assert needs["topic"].redis_per_s < 100_000
    assert needs["topic"].verdict == "yes"
    assert needs["topic"].cores < needs["pattern"].cores
    assert simulate(replace(fleet, processes=1), COSTS)["topic"].verdict == "no: CPU"


def test_more_processes_take_cpu_from_each_other() -> None:
    shares = [simulate(Fleet(count, 100_000, 1000), COSTS)["topic"].cores for count in (1, 2, 8, 40)]
    assert all(before > after for before, after in pairwise(shares))


def test_documented_table_is_what_the_measured_costs_give() -> None:
    text = DOCS.read_text("utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == table(PLANS, Costs.measured())
