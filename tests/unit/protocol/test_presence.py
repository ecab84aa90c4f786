"""`relay.protocol.presence`: differences compose, and what a client makes of them is the state."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.presence import (
    NOTHING,
    Difference,
    Member,
    Members,
    apply,
    clean_meta,
    compose,
    difference,
    digest,
    encode_difference,
    encode_state,
    is_key,
    is_member,
    metas_by_key,
    split,
)

refs = st.sampled_from("abcdefgh")
names = st.sampled_from(["ada", "bob", "zoë", 'a"b\\', "1", "length"])


def members(ref: str, key: str) -> Member:
    return Member(ref, key, b'{"n":"%b"}' % ref.encode())


states = st.dictionaries(refs, names).map(lambda found: {ref: members(ref, key) for ref, key in found.items()})


@st.composite
def changes(draw: st.DrawFn) -> Difference:
    """As a node makes one: no ref both comes and goes."""
    joins = draw(states)
    return Difference(joins, {ref: members(ref, "x") for ref in draw(st.sets(refs)) - set(joins)})


def after(state: Members, *steps: Difference) -> Members:
    state = dict(state)
    for step in steps:
        apply(state, step)
    return state


class Client:
    """What phoenix.js keeps. Source: Phoenix 1.8, ``presence.js: syncState, syncDiff``."""

    def __init__(self, state: msgspec.Raw) -> None:
        self.state = self._read(json.loads(bytes(state)))

    @staticmethod
    def _read(entries: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {key: {meta["phx_ref"]: meta for meta in entry["metas"]} for key, entry in entries.items()}

    def take(self, diff: msgspec.Raw) -> None:
        found = json.loads(bytes(diff))
        for key, metas in self._read(found["joins"]).items():
            self.state.setdefault(key, {}).update(metas)
        for key, metas in self._read(found["leaves"]).items():
            for ref in metas:
                _ = self.state.get(key, {}).pop(ref, None)
            if not self.state.get(key, True):
                del self.state[key]


def as_seen(state: Members) -> dict[str, dict[str, Any]]:
    return Client(encode_state(state.values())).state


@given(states, states)
def test_difference_makes_one_state_of_the_other(before: Members, now: Members) -> None:
    change = difference(before, now)
    assert set(after(before, change)) == set(now)
    assert bool(change) == (set(before) != set(now))


@given(states, changes(), changes())
def test_composed_change_does_what_both_do(state: Members, first: Difference, second: Difference) -> None:
    assert after(state, compose(first, second)) == after(state, first, second)


@given(states, changes(), changes())
def test_composed_change_undoes_a_first_that_was_made_already(
    state: Members, first: Difference, second: Difference
) -> None:
    """A write that failed may have reached others: what is sent afterwards contains it, and leads to the same."""
    assert after(state, first, compose(first, second)) == after(state, first, second)


@given(states, changes(), changes(), changes())
def test_changes_may_be_composed_in_any_grouping(
    state: Members, first: Difference, second: Difference, third: Difference
) -> None:
    left, right = compose(compose(first, second), third), compose(first, compose(second, third))
    assert after(state, left) == after(state, right)
    assert compose(NOTHING, first) == first == compose(first, NOTHING)


@given(states, changes(), st.integers(0, 20))
def test_change_in_two_parts_does_what_it_does_whole(state: Members, change: Difference, most: int) -> None:
    first, rest = split(change, most)
    assert len(first.joins) + len(first.leaves) == min(most, len(change.joins) + len(change.leaves))
    assert after(state, first, rest) == after(state, rest, first) == after(state, change)


@given(states, changes())
def test_change_made_twice_changes_nothing_more(state: Members, change: Difference) -> None:
    assert after(state, change, change) == after(state, change)


@given(states, st.permutations("abcdefgh"))
def test_digest_does_not_depend_on_the_order(state: Members, order: list[str]) -> None:
    assert digest(state) == digest([ref for ref in order if ref in state])
    assert digest([*state, "another"]) != digest(state)


@given(states, states)
def test_client_that_takes_the_difference_has_the_state(before: Members, now: Members) -> None:
    # Refs are never used again under another key.
    now = {ref: before.get(ref, member) for ref, member in now.items()}
    client = Client(encode_state(before.values()))
    client.take(encode_difference(difference(before, now)))
    assert client.state == as_seen(now)


def test_update_is_a_join_that_names_the_ref_before_it() -> None:
    old, new = Member("1", "ada", b'{"a": 1}'), Member("2", "ada", b"{ }", "1")
    client = Client(encode_state([old]))
    client.take(encode_difference(Difference({"2": new}, {"1": old})))
    assert client.state == {"ada": {"2": {"phx_ref": "2", "phx_ref_prev": "1"}}}
    assert metas_by_key([old, new]) == {"ada": [msgspec.Raw(b'{"a": 1}'), msgspec.Raw(b"{ }")]}


@pytest.mark.parametrize(
    "key", ["__proto__", "constructor", "toString", "hasOwnProperty", "", "a\n", "é" * 128, "\ud800"]
)
def test_hostile_keys_are_refused(key: str) -> None:
    """Source: CVE-2026-56812 for the names of ``Object.prototype``."""
    assert not is_key(key)
    assert not is_member(key, msgspec.Raw(b"{}"))


@pytest.mark.parametrize("key", ["ada", "é" * 127, "a:b", "prototype", '"', "phx_ref"])
def test_other_keys_are_accepted(key: str) -> None:
    assert is_key(key)
    assert list(as_seen({"1": Member("1", key, b"{}")})) == [key]


DEEP = b'{"a":' + b"[" * 256 + b"]" * 256 + b"}"


@pytest.mark.parametrize("meta", [b"[]", b"1", b'"x"', b"null", DEEP])
def test_member_of_another_program_needs_an_object(meta: bytes) -> None:
    assert not is_member("ada", msgspec.Raw(meta))


def test_meta_keeps_numbers_and_nested_objects_and_loses_reserved_names() -> None:
    sent = b'{"phx_ref":"x","phx_ref_prev":1,"phx_refs":2,"n":9007199254740993,"o":{"phx_ref":1,"__proto__":{}}}'
    assert clean_meta(sent) == b'{"n":9007199254740993,"o":{"phx_ref":1,"__proto__":{}}}'


@pytest.mark.parametrize(
    "meta",
    [b"", b"[]", b"1", b"null", b'{"a":}', b"\xff", b'{"a":' + b"[" * 100_000, b'{"\xff":1}', b'{"n":1e999}', DEEP],
)
def test_meta_that_is_no_object_or_cannot_be_read_is_refused(meta: bytes) -> None:
    assert clean_meta(meta) is None
