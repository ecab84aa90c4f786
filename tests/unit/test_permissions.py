"""`relay.permissions`: the grammar of claims, and what grants add up to."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.permissions import (
    ALL,
    EVERYTHING,
    Grant,
    Identity,
    Right,
    Rights,
    bind,
    escape,
    names_of,
    parse_claim,
    parse_rights,
)


@pytest.mark.parametrize(
    "claim",
    [
        {"room:*": ["join", "push"]},
        {"room:*": "join,push"},
        {"room:*": "push, join"},
        {"room:*": ("join", "push", "join")},
        ["room:*:join,push"],
        ["room:*:join", "room:*:push"],
    ],
)
def test_claim_has_two_shapes(claim: Any) -> None:
    rights = Rights(parse_claim(claim))
    assert rights.on("room:1") == Right.JOIN | Right.PUSH
    assert rights.on("rooms") is Right.NONE


def test_claim_that_is_not_there_grants_nothing() -> None:
    assert parse_claim(None) == parse_claim({}) == parse_claim([]) == ()
    assert Rights(()).on("room:1") is Right.NONE


@pytest.mark.parametrize(
    "claim",
    [
        "room:*:join",
        7,
        True,
        {"room:*": None},
        {"room:*": ["admin"]},
        {"room:*": [7]},
        {"room:*": ""},
        {"room:*": 7},
        {"": "join"},
        ["room"],
        ["room:1"],
        [":join"],
        [["room:*", "join"]],
        [None],
    ],
)
def test_claim_that_cannot_be_read_is_a_fault_and_grants_nothing(claim: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_claim(claim)


def test_topic_has_the_rights_of_all_patterns_that_match() -> None:
    rights = Rights(parse_claim({"*": "join", "room:*": "presence"}), parse_claim(["room:1:push"]))
    assert rights.on("news") == Right.JOIN
    assert rights.on("room:2") == Right.JOIN | Right.PRESENCE
    assert rights.on("room:1") == ALL
    assert EVERYTHING.on("anything") == ALL


@pytest.mark.parametrize(
    ("pattern", "topic", "matches"),
    [
        ("room:1", "room:1", True),
        ("room:1", "room:12", False),
        ("room:1", "room:1:x", False),
        ("room:*", "room:", True),
        ("room:*", "room:1:2", True),
        ("room:*", "Room:1", False),
        ("room:?", "room:1", True),
        ("room:?", "room:12", False),
        ("room:[ab]", "room:b", True),
        ("room:[ab]", "room:c", False),
        ("*:news", "world:news", True),
        ("[*", "[x", True),
        ("*", "", True),
    ],
)
def test_patterns_are_those_of_the_topics_settings(pattern: str, topic: str, matches: bool) -> None:
    assert Rights((Grant(pattern, Right.JOIN),)).on(topic) == (Right.JOIN if matches else Right.NONE)


@pytest.mark.parametrize("user", ["*", "a*", "?", "[a-z]", "[!a]", "[", "]", "{sub}", "a]*[b"])
def test_users_name_opens_no_more_than_itself(user: str) -> None:
    """A user called ``*`` must not have everybody's topics."""
    rights = Rights(bind(parse_claim({"user:{sub}": "join", "{sub}:{sub}:*": "push"}), user))
    assert rights.on(f"user:{user}") == Right.JOIN
    assert rights.on(f"{user}:{user}:x") == Right.PUSH
    for other in ("alice", "a", "ab", "b", "", "{sub}x", "x"):
        assert rights.on(f"user:{other}") is Right.NONE
        assert rights.on(f"{other}:{other}:x") is Right.NONE


@given(user=st.text(min_size=1), other=st.text())
def test_no_users_name_matches_anothers(user: str, other: str) -> None:
    rights = Rights(bind((Grant("user:{sub}", ALL),), user))
    assert rights.on(f"user:{user}") == ALL
    assert (rights.on(f"user:{other}") == ALL) == (user == other)


@pytest.mark.parametrize("user", [None, ""])
def test_without_a_user_patterns_that_name_one_grant_nothing(user: str | None) -> None:
    grants = parse_claim({"user:{sub}": "join", "news": "join"})
    assert [grant.pattern for grant in bind(grants, user)] == ["news"]


@given(st.text(), st.text())
def test_escaped_text_matches_itself_alone(text: str, other: str) -> None:
    rights = Rights((Grant(escape(text), ALL),))
    assert rights.on(text) == ALL
    assert (rights.on(other) == ALL) == (text == other)


def test_rights_are_shown_as_they_are_written() -> None:
    grants = parse_claim({"room:*": ["join", "push"], "user:{sub}": "join"})
    assert str(Rights(bind(grants, "a*"))) == "join,push on room:*; join on user:a[*]"
    assert str(Rights()) == "none"


def test_rights_have_names() -> None:
    assert names_of(ALL) == ["join", "push", "presence"]
    assert names_of(Right.NONE) == []
    assert parse_rights(names_of(ALL)) == ALL


def test_identity_expires_on_the_monotonic_clock_and_shows_no_claims() -> None:
    identity = Identity("alice", EVERYTHING, {"email": "alice@example.org"}, 10.0)
    assert [identity.is_expired(now) for now in (9.9, 10.0, 11.0)] == [False, True, True]
    assert not Identity(None, EVERYTHING).is_expired(1e9)
    assert "example.org" not in repr(identity)


def test_pattern_of_one_topic_holds_no_place_for_the_user() -> None:
    """tangram's token opens its channel and no other, whatever that is called."""
    for topic in ("user:{sub}", "{sub}", "{", "a{sub}*"):
        grants = (Grant(escape(topic), ALL),)
        rights = Rights(bind(grants, "alice"))
        assert rights.on(topic) == ALL
        assert rights.on(topic.replace("{sub}", "alice").replace("{", "x")) == Right.NONE
