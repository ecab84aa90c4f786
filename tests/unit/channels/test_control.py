"""`relay.channels.control`: orders among nodes, and what is none."""

import pytest

from relay.auth.decisions import Decisions
from relay.channels.control import ControlMessage, decode, encode


@pytest.mark.parametrize(
    "order",
    [
        ControlMessage("disconnect", "alice", "n1"),
        ControlMessage("disconnect", "é", "n1", reason="banned"),
        ControlMessage("kick", "a", "n", "room:1"),
    ],
)
def test_order_comes_back_as_it_was(order: ControlMessage) -> None:
    assert decode(encode(order)) == order


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"do":"reboot","user":"alice","sender":"n"}',
        b'{"do":"disconnect","user":"","sender":"n"}',
        b'{"do":"disconnect","user":7,"sender":"n"}',
        b'{"do":"disconnect","user":"alice"}',
        b'{"do":"kick","user":"alice","sender":"n"}',
        b"[" * 100_000,
        b'{"do":"kick","x":' + b"[" * 100_000,
    ],
)
def test_what_is_no_order_is_none(data: bytes) -> None:
    assert decode(data) is None


def test_order_of_a_later_version_with_more_in_it_is_understood() -> None:
    data = b'{"do":"disconnect","user":"alice","sender":"n","until":5}'
    assert decode(data) == ControlMessage("disconnect", "alice", "n")


def test_order_overtakes_decisions_that_began_before_it() -> None:
    decisions = Decisions()
    before = decisions.begin()
    decisions.order("alice")
    after = decisions.begin()
    assert decisions.overtaken(before, "alice") and decisions.overtaken(before, "alice", "room:1")
    assert not decisions.overtaken(after, "alice")
    assert not decisions.overtaken(before, "bob") and not decisions.overtaken(before, None)


def test_order_about_a_topic_overtakes_decisions_on_that_topic_alone() -> None:
    decisions = Decisions()
    before = decisions.begin()
    decisions.order("alice", "room:1")
    assert decisions.overtaken(before, "alice", "room:1")
    assert not decisions.overtaken(before, "alice") and not decisions.overtaken(before, "alice", "room:2")


def test_orders_are_kept_only_for_decisions_that_began_before_them() -> None:
    decisions = Decisions()
    for number in range(1000):
        decisions.order(f"user {number}")
    assert len(decisions) == 0, "nothing is under way"
    first = decisions.begin()
    decisions.order("alice")
    second = decisions.begin()
    decisions.order("bob")
    decisions.order("bob")
    third = decisions.begin()
    assert len(decisions) == 2
    decisions.end(first)
    assert len(decisions) == 1 and decisions.overtaken(second, "bob")
    decisions.end(second)
    assert len(decisions) == 0
    decisions.order("carol")
    assert decisions.overtaken(third, "carol")
    decisions.end(third)
    assert len(decisions) == 0


def test_orders_do_not_pile_up_while_decisions_follow_each_other_without_a_pause() -> None:
    decisions = Decisions()
    earlier = decisions.begin()
    for number in range(1000):
        decisions.order(f"user {number}")
        later = decisions.begin()
        decisions.end(earlier)
        assert len(decisions) <= 1
        earlier = later
    decisions.end(earlier)
    assert len(decisions) == 0
