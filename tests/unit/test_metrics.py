"""`relay.metrics`: every counter is explained, and none can be misspelt."""

import ast
import inspect
from collections import Counter
from dataclasses import fields

import pytest

from relay import metrics as metrics_module
from relay.metrics import BOUNDS_S, Histogram, Metrics


def test_two_relays_in_one_process_share_no_counter() -> None:
    one, two = Metrics(), Metrics()
    one.refused["x"] += 1
    one.fan_out.observe(1)
    one.plugin_time["p"].observe(1)
    assert two.refused == Counter()
    assert two.fan_out.count == len(two.plugin_time) == 0


def test_counter_that_does_not_exist_cannot_be_added_to() -> None:
    """A misspelt counter would lose what it counts."""
    assert not hasattr(Metrics(), "__dict__")


def test_every_counter_says_what_it_counts() -> None:
    tree = ast.parse(inspect.getsource(metrics_module))
    (owner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Metrics")
    explained = {
        field.target.id
        for field, text in zip(owner.body, owner.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
    assert {field.name for field in fields(Metrics)} - explained == set()


@pytest.mark.parametrize("place", range(len(BOUNDS_S)))
def test_duration_is_counted_under_the_first_bound_it_does_not_exceed(place: int) -> None:
    histogram = Histogram()
    histogram.observe(BOUNDS_S[place])
    histogram.observe(BOUNDS_S[place] * 1.01)
    assert histogram.buckets[place : place + 2] == [1, 1]
    assert histogram.count == 2
    assert histogram.sum_s == pytest.approx(BOUNDS_S[place] * 2.01)


def test_duration_beyond_all_bounds_is_counted_too() -> None:
    histogram = Histogram()
    histogram.observe(BOUNDS_S[-1] * 100)
    assert histogram.buckets[-1] == histogram.count == 1
