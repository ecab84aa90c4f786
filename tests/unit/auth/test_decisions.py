"""`relay.auth.decisions`: which control message overtakes which decision."""

from relay.auth.decisions import Decisions


def test_disconnect_overtakes_decisions_that_began_before_it() -> None:
    decisions = Decisions()
    before = decisions.begin()
    decisions.overtake("alice")
    after = decisions.begin()
    assert decisions.overtaken(before, "alice") and decisions.overtaken(before, "alice", "room:1")
    assert not decisions.overtaken(after, "alice")
    assert not decisions.overtaken(before, "bob") and not decisions.overtaken(before, None)


def test_kick_overtakes_decisions_on_that_topic_alone() -> None:
    decisions = Decisions()
    before = decisions.begin()
    decisions.overtake("alice", "room:1")
    assert decisions.overtaken(before, "alice", "room:1")
    assert not decisions.overtaken(before, "alice") and not decisions.overtaken(before, "alice", "room:2")


def test_control_messages_are_kept_only_for_decisions_that_began_before_them() -> None:
    decisions = Decisions()
    for number in range(1000):
        decisions.overtake(f"user {number}")
    assert len(decisions) == 0, "nothing is under way"
    first = decisions.begin()
    decisions.overtake("alice")
    second = decisions.begin()
    decisions.overtake("bob")
    decisions.overtake("bob")
    third = decisions.begin()
    assert len(decisions) == 2
    decisions.end(first)
    assert len(decisions) == 1 and decisions.overtaken(second, "bob")
    decisions.end(second)
    assert len(decisions) == 0
    decisions.overtake("carol")
    assert decisions.overtaken(third, "carol")
    decisions.end(third)
    assert len(decisions) == 0


def test_control_messages_do_not_pile_up_while_decisions_follow_each_other_without_a_pause() -> None:
    decisions = Decisions()
    earlier = decisions.begin()
    for number in range(1000):
        decisions.overtake(f"user {number}")
        later = decisions.begin()
        decisions.end(earlier)
        assert len(decisions) <= 1
        earlier = later
    decisions.end(earlier)
    assert len(decisions) == 0
