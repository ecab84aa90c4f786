"""`relay.channels.history_reader`: what a position is worth, and pages that are read once for all."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.brokers.base import Event, Place
from relay.channels import history_reader as module
from relay.channels.history_reader import (
    ENTRY_BYTES,
    PAGE_BYTES,
    PAGE_IDLE_S,
    PAGE_ROWS,
    HistoryReader,
    Page,
    Recovery,
    rows_behind,
)
from relay.config import Config
from relay.errors import BusUnavailable, NotRecovered
from relay.metrics import Metrics
from relay.protocol.payload import Payload, encode_payload
from tests.support.history import HISTORY, TOPIC, FakeStore


class World:
    """A reader on a store that the test controls, and what is left of each row."""

    def __init__(self, **limits: Any) -> None:
        self.store = FakeStore()
        self.is_away = False
        self.metrics = Metrics()
        self.filtered: list[str] = []
        config = Config(redis_url="redis://none", topics=[HISTORY], limits=limits)
        self.reader = HistoryReader(config, lambda: None if self.is_away else self.store, self, self.metrics)

    async def filter_row(self, row: Event) -> tuple[str, Payload] | None:
        self.filtered.append(str(row.position))
        return None if row.event == "drop" else (row.event.upper(), encode_payload({}))

    def append(self, count: int = 1, payload: bytes = b"{}", event: str = "e") -> list[str]:
        return [str(self.store.append(payload, event).position) for _ in range(count)]

    async def open(self, since: object = None, last: object = None) -> Recovery:
        return await self.reader.open(TOPIC, since, last)

    async def page(self, place: Place, is_included: bool = False) -> Page | None:
        return await self.reader.page(TOPIC, place, is_included, 1024)

    def asked(self, kind: str) -> int:
        return [name for name, _ in self.store.calls].count(kind)


# What a position is worth.


async def test_position_that_is_there_is_recovered_from() -> None:
    world = World()
    positions = world.append(3)
    recovery = await world.open(positions[0])
    assert (recovery.position, recovery.start) == (positions[0], Place.of(positions[0]))
    assert recovery.response == {"_position": positions[0], "recovered": True}
    assert (world.metrics.history_recovered, world.metrics.history_not_recovered) == (1, {})


@pytest.mark.parametrize("since", ["9-9", "nonsense", "", 17, True, [], {"a": 1}, "1-", "1-1-1", "1" * 16 + "-1"])
async def test_position_that_is_not_there_begins_with_what_comes_next(since: object) -> None:
    world = World()
    *_, newest = world.append(3)
    recovery = await world.open(since)
    assert (recovery.start, recovery.is_included) == (Place.of(newest), False)
    assert recovery.response == {"_position": newest, "recovered": False, "reason": "unknown position"}
    assert world.metrics.history_not_recovered == {NotRecovered.UNKNOWN: 1}


@pytest.mark.parametrize("since", ["nonsense", 17, [], False])
async def test_what_is_no_position_is_unknown_on_an_empty_stream_too(since: object) -> None:
    """As one is left by ``XGROUP CREATE … MKSTREAM``: its newest position is 0-0."""
    world = World()
    world.store.streams[TOPIC] = [Event(TOPIC, "", b"", "0-0")]
    assert (await world.open(since)).fault is NotRecovered.UNKNOWN


async def test_position_may_be_written_with_zeros_in_front() -> None:
    world = World()
    world.append(2)
    recovery = await world.open("0001000-01")
    assert recovery.response == {"_position": "1000-1", "recovered": True}


async def test_who_asks_for_positions_alone_is_told_where_the_history_stands() -> None:
    world = World()
    recovery = await world.open()
    assert recovery.response == {"_position": "1000-0"}
    assert (recovery.start, world.metrics.history_not_recovered) == (Place(1000, 0), {})


async def test_questions_about_the_same_position_are_one() -> None:
    world = World()
    (position,) = world.append()
    found = await asyncio.gather(*(world.open(position) for _ in range(10)), *(world.open() for _ in range(10)))
    assert [recovery.is_recovered for recovery in found] == [True] * 10 + [False] * 10
    assert world.asked("open") == 2
    assert world.metrics.history_recovered == 10


async def test_who_gives_up_takes_no_answer_from_others() -> None:
    world = World()
    gate = world.store.hold_answers("open")
    one, two = asyncio.create_task(world.open()), asyncio.create_task(world.open())
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.sleep(0)
    gate.set()
    assert (await two).position == "1000-0"
    assert one.cancelled()


async def test_store_that_cannot_be_asked_is_said() -> None:
    world = World()
    world.store.fault = "away"
    for ask in (lambda: world.open("1-1"), lambda: world.open(None, 5), lambda: world.page(Place(1, 1))):
        with pytest.raises(BusUnavailable, match="away"):
            await ask()
    world.is_away = True
    with pytest.raises(BusUnavailable, match="cannot be heard"):
        await world.open("1-1")
    world.is_away, world.store.fault = False, ""
    assert (await world.open()).position == "1000-0", "the fault is not kept"


# The newest events.


@pytest.mark.parametrize(
    ("last", "position", "start", "included"),
    [
        (1, "1000-4", 5, True),
        (3, "1000-2", 3, True),
        (5, "1000-0", 1, True),
        (50, "1000-0", 1, True),
        (10**30, "1000-0", 1, True),
        (0, "1000-5", 5, False),
        (-1, "1000-5", 5, False),
        (True, "1000-5", 5, False),
        (False, "1000-5", 5, False),
        ("3", "1000-5", 5, False),
        (2.5, "1000-5", 5, False),
        (None, "1000-5", 5, False),
    ],
)
async def test_newest_events_begin_behind_the_one_before_them(
    last: object, position: str, start: int, included: bool
) -> None:
    world = World()
    world.append(5)
    recovery = await world.open(None, last)
    assert (recovery.position, recovery.start, recovery.is_included) == (position, Place(1000, start), included)
    assert recovery.response == {"_position": position}
    assert bool(recovery.last) == included


async def test_many_of_the_newest_events_are_found_in_portions() -> None:
    world = World(recover_max_events=500)
    world.append(800)
    recovery = await world.open(None, 10_000)
    assert (recovery.position, recovery.start) == ("1000-300", Place(1000, 301))
    assert world.asked("last") <= 7


async def test_newest_events_of_a_trimmed_history_begin_with_its_first() -> None:
    world = World()
    world.append(5)
    world.store.trim(2)
    recovery = await world.open(None, 10)
    assert (recovery.position, recovery.start) == ("1000-3", Place(1000, 4))


async def test_newest_events_are_neither_too_old_nor_too_many_bytes() -> None:
    world = World(recover_max_bytes=1000)
    world.append(2)
    world.store.now_ms += 3_600_001
    world.append(2, b"x" * 300)
    assert (await world.open(None, 10)).start == Place(3_601_001, 3)
    world.append(2, b"x" * 300)
    assert (await world.open(None, 10)).start == Place(3_601_001, 4)
    world.store.now_ms += 3_600_001
    recovery = await world.open(None, 10)
    assert (recovery.start, recovery.is_included) == (Place(3_601_001, 6), False)


async def test_newest_events_end_at_a_mark() -> None:
    world = World()
    world.append(2)
    world.store.streams[TOPIC].append(Event(TOPIC, "", b"1000-3", "1000-3"))
    world.append(2)
    recovery = await world.open(None, 10)
    assert (recovery.position, recovery.start) == ("1000-3", Place(1000, 4))


# For those who look at a history.


async def test_events_are_shown_as_they_are_stored() -> None:
    world = World()
    positions = world.append(5, event="drop")
    found = await world.reader.newest(TOPIC, 3)
    assert ([row.position for row in found.events], found.position) == (positions[2:], positions[4])
    found = await world.reader.behind(TOPIC, positions[1], 2)
    assert [row.position for row in found.events] == positions[2:4]
    assert (found.position, found.has_more, found.fault) == (positions[3], True, None)
    found = await world.reader.behind(TOPIC, positions[3], 2)
    assert ([row.position for row in found.events], found.position, found.has_more) == (
        positions[4:],
        positions[4],
        False,
    )
    assert world.filtered == []


async def test_history_without_events_shows_where_it_stands() -> None:
    world = World()
    found = await world.reader.newest(TOPIC, 3)
    assert (found.events, found.position) == ([], "1000-0")
    found = await world.reader.behind(TOPIC, "9-9", 3)
    assert (found.events, found.position, found.fault) == ((), "1000-0", NotRecovered.UNKNOWN)


async def test_many_events_are_shown_up_to_their_bytes() -> None:
    world = World(recover_max_bytes=1000)
    positions = world.append(200, b"x" * 9)
    found = await world.reader.behind(TOPIC, "1000-0", 150)
    assert len(found.events) == 111 and found.has_more
    found = await world.reader.behind(TOPIC, positions[99], 1000)
    assert len(found.events) == 100 and not found.has_more


@pytest.mark.parametrize("is_lost", [False, True])
async def test_history_that_changes_while_it_is_looked_at_has_a_fault(is_lost: bool) -> None:
    world = World()
    positions = world.append(5)
    gate = world.store.hold_questions("read")
    asking = asyncio.create_task(world.reader.behind(TOPIC, positions[0], 10))
    await asyncio.sleep(0.001)
    if is_lost:
        world.store.streams[TOPIC].append(Event(TOPIC, "", b"1000-6", "1000-6"))
    else:
        world.store.trim(2)
    gate.set()
    found = await asking
    assert (found.events, found.fault) == ((), NotRecovered.FORKED if is_lost else NotRecovered.EXPIRED)


async def test_stream_that_has_lost_all_entries_has_nothing_to_show() -> None:
    world = World()
    positions = world.append(2)

    async def read(topic: str, since: str, count: int) -> None:
        return None

    world.store.read = read  # type: ignore[method-assign]
    found = await world.reader.behind(TOPIC, positions[1], 10)
    assert (found.events, found.position, found.fault) == ([], positions[1], None)


# Pages.


async def test_pages_follow_each_other_to_the_end() -> None:
    world = World()
    positions = world.append(100)
    place, found = Place(1000, 0), []
    while True:
        page = await world.page(place)
        assert page is not None
        found += [str(entry.place) for entry in page.entries]
        place = page.end
        if page.is_last:
            break
    assert found == positions
    assert {entry.event for entry in page.entries} == {"E"}
    assert (await world.page(Place(1000, 100))).entries == []  # type: ignore[union-attr]


async def test_page_may_begin_with_its_event() -> None:
    world = World()
    world.append(3)
    page = await world.page(Place(1000, 2), is_included=True)
    assert page is not None and [entry.place.n for entry in page.entries] == [2, 3]


async def test_row_that_is_dropped_keeps_its_place() -> None:
    world = World()
    world.append(1)
    world.append(1, event="drop")
    page = await world.page(Place(1000, 0))
    assert page is not None and [entry.event for entry in page.entries] == ["E", ""]
    assert page.end == Place(1000, 2)
    assert page.size == 2 * (2 + ENTRY_BYTES)


async def test_rows_that_are_gone_or_lost_are_no_page() -> None:
    world = World()
    world.append(3)
    assert await world.page(Place(999, 2)) is None
    world.store.streams[TOPIC].append(Event(TOPIC, "", b"1000-4", "1000-4"))
    assert await world.page(Place(1000, 1)) is None


async def test_page_is_read_once_and_passed_through_handlers_once() -> None:
    world = World()
    world.append(200)
    pages = await asyncio.gather(*(world.page(Place(1000, 0)) for _ in range(5)))
    assert all(page is pages[0] for page in pages)
    assert await world.page(Place(1000, 0)) is pages[0], "whole, so it is kept"
    assert world.asked("read") == 1
    assert len(world.filtered) == len(set(world.filtered))


async def test_last_page_is_read_again() -> None:
    world = World()
    world.append(1)
    for count in (1, 2):
        page = await world.page(Place(1000, 0))
        assert page is not None and page.is_last and len(page.entries) == count
        world.append(1)
    assert world.reader.bytes == 0


async def test_pages_are_forgotten_the_least_recently_used_first() -> None:
    world = World()
    world.append(200)
    places = [Place(1000, n) for n in (0, 31, 63)]
    for place in places:
        await world.page(place)
    await world.page(places[0])
    assert world.reader.bytes > 0
    assert world.reader.forget_oldest()
    before = world.asked("read")
    await world.page(places[0])
    await world.page(places[2])
    assert world.asked("read") == before
    await world.page(places[1])
    assert world.asked("read") == before + 1
    world.reader.forget("room:2")
    assert world.reader.bytes > 0
    world.reader.forget(TOPIC)
    assert (world.reader.bytes, world.reader.forget_oldest()) == (0, False)


async def test_reads_under_way_are_ended() -> None:
    world = World()
    await world.reader.close()
    world.store.hold_answers("read")
    asking = asyncio.create_task(world.page(Place(1000, 0)))
    await asyncio.sleep(0.001)
    await world.reader.close()
    with pytest.raises(asyncio.CancelledError):
        await asking


@given(st.integers(0, 10_000), st.floats(1, 1e7))
def test_pages_begin_at_the_same_rows_for_all(n: int, row_bytes: float) -> None:
    rows = rows_behind(n, row_bytes)
    assert 1 <= rows <= PAGE_ROWS
    assert rows == 1 or rows * row_bytes <= PAGE_BYTES
    end = n + rows
    for other in range(n, end):
        assert other + rows_behind(other, row_bytes) == end


async def test_pages_are_forgotten_that_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would fill all the memory that they may have, though those who asked for them came back long ago."""
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    world = World()
    world.append(200)
    for n in (0, 31):
        await world.page(Place(1000, n))
    now += PAGE_IDLE_S
    await world.page(Place(1000, 0))
    world.reader.forget_unused(now)
    whole = world.reader.bytes
    now += 1
    world.reader.forget_unused(now)
    assert 0 < world.reader.bytes < whole, "one of them was asked for again"
    now += PAGE_IDLE_S
    world.reader.forget_unused(now)
    assert world.reader.bytes == 0
