"""`relay.metrics`: every counter is shown, and explained."""

import ast
import inspect
from collections import Counter
from dataclasses import fields

from relay import metrics as metrics_module
from relay.metrics import Metrics


def test_all_counters_start_at_nothing() -> None:
    assert all(value in (0, {}) for value in Metrics().totals().values())


def test_every_counter_is_among_the_totals() -> None:
    assert list(Metrics().totals()) == [field.name for field in fields(Metrics)]


def test_reasons_are_told_one_by_one() -> None:
    metrics = Metrics()
    metrics.dropped["slow reader"] += 2
    metrics.dropped["invalid event"] += 1
    metrics.deliveries += 5
    totals = metrics.totals()
    assert totals["dropped"] == {"slow reader": 2, "invalid event": 1}
    assert totals["deliveries"] == 5


def test_totals_are_a_copy() -> None:
    """What is shown does not change while it is written out."""
    metrics = Metrics()
    totals = metrics.totals()
    metrics.dropped["slow reader"] += 1
    metrics.joins += 1
    assert (totals["dropped"], totals["joins"]) == ({}, 0)
    assert type(totals["dropped"]) is dict


def test_two_relays_in_one_process_share_no_counter() -> None:
    one, two = Metrics(), Metrics()
    one.refused["x"] += 1
    assert two.refused == Counter()


def test_counter_that_does_not_exist_cannot_be_added_to() -> None:
    """A misspelt counter would lose what it counts."""
    assert not hasattr(Metrics(), "__dict__")


def test_every_counter_says_what_it_counts() -> None:
    (owner,) = (node for node in ast.parse(inspect.getsource(metrics_module)).body if isinstance(node, ast.ClassDef))
    explained = {
        field.target.id
        for field, text in zip(owner.body, owner.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr)
    }
    assert {field.name for field in fields(Metrics)} - explained == set()
