"""`relay.brokers.memory_history`: histories in memory, with a clock that the test sets."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.brokers.base import GRACE_S, Event, Place, is_position
from relay.brokers.memory_history import MemoryHistory
from relay.config_sections import HistoryConfig
from relay.errors import NotRecovered

TOPIC = "room:1"
SETTINGS = HistoryConfig(size=10, ttl_s=60)


class World:
    """Histories, and what they have published."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.notices: list[Event] = []
        self.history = MemoryHistory(self.notices.append, lambda: self.now)

    def append(self, *payloads: bytes, topic: str = TOPIC, settings: HistoryConfig = SETTINGS) -> list[str]:
        return [str(self.history.append(topic, "e", payload, settings).position) for payload in payloads]

    async def fault(self, since: str, max_events: int = 100, max_bytes: int = 10_000) -> NotRecovered | None:
        return (await self.history.open(TOPIC, since, SETTINGS, max_events, max_bytes)).fault

    @property
    def topics(self) -> set[str]:
        """Those of which something is held."""
        return set(self.history._logs)


async def test_positions_are_consecutive_and_their_time_does_not_fall() -> None:
    world = World()
    first = world.append(b"1")
    world.now -= 50
    second = world.append(b"2")
    world.now += 100
    assert first + second + world.append(b"3") == ["1000000-1", "1000000-2", "1050000-3"]


async def test_event_is_kept_as_it_was_published() -> None:
    row = World().history.append(TOPIC, "e", b"\xff", SETTINGS, "n.1")
    assert row == Event(TOPIC, "e", b"\xff", "1000000-1", "n.1")


async def test_oldest_events_are_trimmed() -> None:
    world = World()
    positions = world.append(*[b"1"] * 15)
    assert await world.history.read(TOPIC, positions[4], 10) is None
    rows = await world.history.read(TOPIC, positions[5], 100)
    assert rows is not None and [row.position for row in rows] == positions[5:]
    assert await world.fault(positions[4]) is NotRecovered.EXPIRED
    assert await world.fault(positions[5]) is None


@pytest.mark.parametrize("size", [1, 2])
async def test_smallest_histories(size: int) -> None:
    world = World()
    settings = HistoryConfig(size=size, ttl_s=1)
    positions = world.append(b"1", b"2", b"3", settings=settings)
    assert await world.fault(positions[2]) is None
    assert await world.fault(positions[1]) is (NotRecovered.EXPIRED if size == 1 else None)
    assert [row.payload for row in await world.history.last(TOPIC, 10)] == [b"1", b"2", b"3"][-size:]


async def test_position_of_nothing_is_unknown() -> None:
    world = World()
    (position,) = world.append(b"1")
    place = Place.of(position)
    for other in (Place(place.ms + 1, 1), Place(place.ms, 2), Place(place.ms - 1, 1), Place(place.ms + 9, 0)):
        assert await world.fault(str(other)) is NotRecovered.UNKNOWN
        assert await world.history.read(TOPIC, str(other), 1) is None


async def test_first_position_of_a_topic_without_events_counts() -> None:
    world = World()
    newest = (await world.history.open(TOPIC, "0-0", SETTINGS, 1, 1)).newest
    assert newest == "1000000-0"
    world.append(b"1")
    assert await world.fault(newest) is None
    rows = await world.history.read(TOPIC, newest, 5)
    assert rows is not None and [(row.event, row.payload) for row in rows] == [("", b""), ("e", b"1")]
    summary = await world.history.describe(TOPIC)
    assert (summary.events, summary.first, summary.last, summary.bytes) == (1, "1000000-1", "1000000-1", 2)


async def test_more_than_is_wanted_is_too_many() -> None:
    world = World()
    positions = world.append(*[b"x" * 99] * 5)
    assert await world.fault(positions[0], max_events=4, max_bytes=400) is None
    assert await world.fault(positions[0], max_events=3) is NotRecovered.TOO_MANY
    assert await world.fault(positions[0], max_bytes=399) is NotRecovered.TOO_MANY


async def test_events_older_than_their_time_are_not_given() -> None:
    world = World()
    one, two = world.append(b"1", b"2")
    world.now += 61
    assert await world.fault(one) is NotRecovered.EXPIRED
    assert await world.fault(two) is None, "nothing came behind it"


async def test_newest_rows_come_oldest_first() -> None:
    world = World()
    positions = world.append(*[b"%d" % n for n in range(5)])
    assert [row.payload for row in await world.history.last(TOPIC, 2)] == [b"3", b"4"]
    assert [row.payload for row in await world.history.last(TOPIC, 2, positions[3])] == [b"1", b"2"]
    assert [row.event for row in await world.history.last(TOPIC, 9, positions[1])] == ["", "e"]
    assert await world.history.last(TOPIC, 9, "1000000-0") == []
    assert await world.history.last("room:2", 9) == []


async def test_notice_says_where_a_history_stands() -> None:
    world = World()
    await world.history.check(TOPIC, "", SETTINGS)
    (position,) = world.append(b"1")
    await world.history.check(TOPIC, "1-1", SETTINGS)
    assert world.notices == [Event(TOPIC, "", b"", "1000000-0"), Event(TOPIC, "", b"", position)]


async def test_nothing_is_known_of_a_topic_without_history() -> None:
    world = World()
    assert (await world.history.describe(TOPIC)).last is None
    assert await world.history.read(TOPIC, "1-1", 1) is None
    assert world.topics == set()


async def test_history_lives_while_it_is_checked_and_goes_when_it_is_not() -> None:
    world = World()
    (position,) = world.append(b"1")
    for _ in range(5):
        world.now += 300
        await world.history.check(TOPIC, "", SETTINGS)
        assert world.notices[-1].position == position
    world.now += 60 + GRACE_S
    assert await world.fault(position) is NotRecovered.UNKNOWN


async def test_short_histories_go_although_a_long_one_was_there_before_them() -> None:
    world = World()
    world.append(b"1", topic="long", settings=HistoryConfig(size=10, ttl_s=2_592_000))
    for n in range(100):
        world.append(b"1", topic=f"short:{n}")
        world.now += 10
    world.now += 60 + GRACE_S
    world.append(b"2", topic="long", settings=HistoryConfig(size=10, ttl_s=2_592_000))
    assert world.topics == {"long"}
    assert len(world.history._due) == 1


async def test_large_history_is_read_at_once() -> None:
    """A page costs what it has, wherever it begins."""
    world = World()
    settings = HistoryConfig(size=100_000, ttl_s=60)
    positions = world.append(*[b"1"] * 100_000, settings=settings)

    async def read(at: int) -> float:
        began = time.perf_counter()
        for _ in range(5):
            await world.history.read(TOPIC, positions[at], 64)
            await world.history.open(TOPIC, positions[at], settings, 100_000, 10_000_000)
        return time.perf_counter() - began

    # The quickest of several: whatever else the machine does makes it slower, and never quicker.
    first, last = [min([await read(at) for _ in range(10)]) for at in (0, 99_900)]
    assert first < 100 * last


@given(st.lists(st.one_of(st.just("append"), st.just("wait"), st.integers(1, 12)), max_size=40))
def test_page_is_whole(steps: list[str | int]) -> None:
    asyncio.run(_check_pages(steps))


async def _check_pages(steps: list[str | int]) -> None:
    world = World()
    positions = [(await world.history.open(TOPIC, "0-0", SETTINGS, 1, 1)).newest]
    for step in steps:
        if step == "append":
            positions += world.append(b"1")
        elif step == "wait":
            world.now += 1
        else:
            assert isinstance(step, int)
            for at, position in enumerate(positions):
                rows = await world.history.read(TOPIC, position, step)
                kept = len(positions) - at <= SETTINGS.size or len(positions) <= SETTINGS.size
                assert (rows is not None) == kept
                if rows is not None:
                    assert [row.position for row in rows] == positions[at : at + step]
    assert all(is_position(position) for position in positions)
