"""The members of a topic as the Python client keeps them."""

import asyncio
import logging
from typing import Any

import pytest

from relay_client.presence import Presence, PresenceChange


def entry(*metas: tuple[str, Any]) -> dict[str, Any]:
    return {"metas": [{"phx_ref": ref, "n": n} for ref, n in metas]}


def state(presence: Presence, **entries: Any) -> None:
    presence.receive("presence_state", entries)


def diff(presence: Presence, joins: dict[str, Any] | None = None, leaves: dict[str, Any] | None = None) -> None:
    presence.receive("presence_diff", {"joins": joins or {}, "leaves": leaves or {}})


def test_state_and_differences_make_the_mapping() -> None:
    presence = Presence()
    state(presence, ada=entry(("1", 1)))
    assert dict(presence) == {"ada": ({"n": 1},)}
    diff(presence, {"bob": entry(("2", 2)), "ada": entry(("3", 3))})
    assert dict(presence) == {"ada": ({"n": 1}, {"n": 3}), "bob": ({"n": 2},)}
    assert (len(presence), presence.count) == (2, 3)
    diff(presence, {"bob": {"metas": [{"phx_ref": "4", "phx_ref_prev": "2", "n": 4}]}}, {"bob": entry(("2", 2))})
    assert presence["bob"] == ({"n": 4},)
    diff(presence, {}, {"bob": entry(("4", 4)), "ada": entry(("1", 1)), "zoe": entry(("9", 9))})
    assert dict(presence) == {"ada": ({"n": 3},)}


def test_differences_before_the_state_are_applied_to_it() -> None:
    presence = Presence()
    state(presence, ada=entry(("1", 1)))
    presence.enter()
    diff(presence, {"bob": entry(("2", 2))})
    assert list(presence) == ["ada"], "as it was, until the new state comes"
    state(presence, zoe=entry(("3", 3)))
    assert set(presence) == {"zoe", "bob"}


def test_number_takes_the_place_of_the_members_and_back() -> None:
    presence = Presence()
    state(presence, ada=entry(("1", 1)))
    presence.receive("presence_count", {"count": 2000})
    assert (dict(presence), presence.count) == ({}, 2000)
    state(presence, ada=entry(("1", 1)))
    assert (list(presence), presence.count) == (["ada"], 1)


@pytest.mark.parametrize(
    "payload",
    [None, [], {"ada": 1}, {"ada": {"metas": [{}]}}, {"ada": {"metas": [1]}}, b"x", {"count": float("inf")}],
)
@pytest.mark.parametrize("event", ["presence_state", "presence_diff", "presence_count"])
def test_what_is_not_understood_is_logged(caplog: pytest.LogCaptureFixture, event: str, payload: Any) -> None:
    presence = Presence()
    state(presence, ada=entry(("1", 1)))
    presence.receive(event, payload)
    assert list(presence) == ["ada"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_changes_are_yielded_and_merged_for_a_slow_loop() -> None:
    presence = Presence()
    changes = presence.changes()
    first = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    state(presence, ada=entry(("1", 1)), bob=entry(("2", 2)))
    assert await first == PresenceChange(joined={"ada": ({"n": 1},), "bob": ({"n": 2},)})
    diff(presence, {"zoe": entry(("3", 3))})
    diff(presence, {"bob": entry(("4", 4))}, {"bob": entry(("2", 2)), "ada": entry(("1", 1))})
    diff(presence, {"eve": entry(("5", 5))})
    diff(presence, {}, {"eve": entry(("5", 5))})
    assert await anext(changes) == PresenceChange(
        joined={"zoe": ({"n": 3},)}, updated={"bob": ({"n": 4},)}, left={"ada": ({"n": 1},)}
    )
    diff(presence, {}, {"zoe": entry(("3", 3))})
    presence.end()
    assert (await anext(changes)).left == {"zoe": ({"n": 3},)}
    with pytest.raises(StopAsyncIteration):
        await anext(changes)
    assert [change async for change in presence.changes()] == [PresenceChange(joined={"bob": ({"n": 4},)})]
