"""`relay_client.position`: which position is kept, and when."""

from collections.abc import Callable
from typing import Any

import pytest

from relay_client import Event
from relay_client import position as module
from relay_client.events import EventQueue
from relay_client.position import Tracker
from tests.support.serving import eventually


def track(
    *payloads: Any, limit: int = 100, position: str | None = None, response: Any = None
) -> tuple[Tracker, EventQueue]:
    """A tracker that has joined, and received these payloads; text stands for the position that follows."""
    queue = EventQueue("t", limit, "recover")
    tracker = Tracker(queue, position, None)
    tracker.enter({"_position": "1-0"} if response is None else response)
    for payload in payloads:
        if isinstance(payload, str):
            tracker.receive(Event("t", "relay:position", {"_position": payload}))
        else:
            tracker.receive(Event("t", "n", payload))
    return tracker, queue


async def taken(queue: EventQueue) -> list[tuple[Any, str | None]]:
    """Payload and position of each event in a queue."""
    got = []
    while not queue.is_empty:
        event = await queue.get()
        got.append((event.payload, event.position))
    return got


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let a position come too late from now on."""
    monkeypatch.setattr(module, "WAIT_S", 3600)

    def late() -> None:
        monkeypatch.setattr(module, "WAIT_S", 0)

    return late


def test_join_asks_from_null_on_and_then_from_the_last_position() -> None:
    tracker, _ = track({"a": 1, "_position": "1-1"}, {"_position": "1-2"})
    assert tracker.params({"k": "v", "since": "mine"}) == {"k": "v", "since": "1-2"}
    queue = EventQueue("t", 1, "recover")
    assert Tracker(queue, None, 20).params({}) == {"since": None, "last": 20}
    assert Tracker(queue, "1-7", None).params({}) == {"since": "1-7"}


async def test_payload_is_the_one_that_was_published() -> None:
    tracker, queue = track({"a": 1, "_position": "1-1"}, {"a": 2, "_position": None}, {"a": 3}, {})
    assert await taken(queue) == [({"a": 1}, "1-1"), ({"a": 2}, None), ({"a": 3}, None), ({}, None)]
    assert tracker.position == "1-1"


@pytest.mark.parametrize("value", [None, 7, [], {"a": "1-9"}, True])
def test_position_is_kept_only_if_it_is_text(value: Any) -> None:
    tracker, _ = track({"_position": value}, response={"_position": value})
    assert tracker.position is None
    tracker.enter({"_position": "1-1"})
    tracker.receive(Event("t", "n", {"_position": value}))
    tracker.receive(Event("t", "relay:position", {"_position": value}))
    tracker.receive(Event("t", "relay:position", value))
    assert tracker.position == "1-1"


@pytest.mark.parametrize("response", [{}, {"other": 1}, [], b"bytes"])
async def test_without_a_history_the_member_belongs_to_the_application(response: Any) -> None:
    tracker, queue = track({"_position": "here"}, [1], "1-1", response=response)
    assert await taken(queue) == [({"_position": "here"}, None), ([1], None), ({"_position": "1-1"}, None)]
    assert tracker.position is None


@pytest.mark.parametrize(
    ("response", "recovered"),
    [
        ({"_position": "1-1", "recovered": True}, True),
        ({"_position": "1-1", "recovered": False, "reason": "history expired"}, False),
        ({"_position": "1-1"}, False),
        ({"_position": "1-1", "recovered": 1}, False),
        ({"recovered": True}, False),
        (None, False),
    ],
)
def test_response_says_whether_events_are_missing(response: Any, recovered: bool) -> None:
    assert Tracker(EventQueue("t", 1, "recover"), None, None).enter(response) is recovered


@pytest.mark.parametrize("payload", [[1], 7, None, True, b"bytes"])
async def test_event_whose_position_follows_is_given_on_with_it(late: Callable[[], None], payload: Any) -> None:
    tracker, queue = track(payload)
    assert (queue.is_empty, tracker.position) == (True, "1-0")
    tracker.receive(Event("t", "relay:position", {"_position": "1-1"}))
    assert await taken(queue) == [(payload, "1-1")]
    assert tracker.position == "1-1"


async def test_event_that_is_followed_by_another_has_no_position(late: Callable[[], None]) -> None:
    tracker, queue = track([1], {"_position": "1-1"}, [2], [3], "1-2")
    assert await taken(queue) == [([1], None), ({}, "1-1"), ([2], None), ([3], "1-2")]
    assert tracker.position == "1-2"


async def test_event_without_a_position_does_not_wait_long(late: Callable[[], None]) -> None:
    late()
    tracker, queue = track([1])
    await eventually(lambda: not queue.is_empty, "the event")
    tracker.receive(Event("t", "relay:position", {"_position": "1-1"}))
    assert await taken(queue) == [([1], None)]
    assert tracker.position == "1-1", "it came late"


async def test_event_whose_position_was_cut_off_is_left_to_the_next_join(late: Callable[[], None]) -> None:
    tracker, queue = track([1])
    tracker.forget()
    tracker.enter({"_position": "1-0", "recovered": True})
    assert (queue.is_empty, tracker.position) == (True, "1-0")


async def test_event_that_waits_comes_before_the_end(late: Callable[[], None]) -> None:
    tracker, queue = track([1])
    tracker.flush()
    assert await taken(queue) == [([1], None)]


async def test_position_never_passes_what_the_queue_did_not_take(late: Callable[[], None]) -> None:
    tracker, queue = track({"_position": "1-1"}, [2], "1-2", [3], "1-3", {"_position": "1-4"}, limit=2)
    assert tracker.position == "1-2"
    assert await taken(queue) == [({}, "1-1"), ([2], "1-2")]
    assert queue.is_behind
    late()
    tracker, queue = track({"_position": "1-1"}, [2], limit=1)
    await eventually(lambda: queue.dropped, "the event to be refused")
    tracker.receive(Event("t", "relay:position", {"_position": "1-2"}))
    assert (tracker.position, queue.is_behind, queue.dropped) == ("1-1", True, 0)
    assert await taken(queue) == [({}, "1-1")]
    queue.is_behind = False
    queue.put(Event("t", "n", [2], position="1-2"))
    assert (await queue.get()).dropped == 0
