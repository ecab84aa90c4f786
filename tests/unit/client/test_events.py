"""`relay_client.events`: what a slow loop gets, and that each loss is counted where it was."""

import asyncio
import random

import pytest

from relay_client import REJOINED, Event, Lost, Overflow, QueueOverflow, Recovered
from relay_client.events import EventQueue


def event(number: int, name: str = "n") -> Event:
    return Event("t", name, number)


def rejoined(number: int) -> Event:
    return Event("t", REJOINED, number)


def fill(overflow: Overflow, *events: Event, limit: int = 3) -> EventQueue:
    queue = EventQueue("t", limit, overflow)
    for one in events:
        queue.put(one)
    queue.end()
    return queue


async def drain(queue: EventQueue) -> list[tuple[int, int]]:
    """Payload and `dropped` of each event that is left."""
    left: list[tuple[int, int]] = []
    while True:
        try:
            got = await queue.get()
        except StopAsyncIteration:
            return left
        left.append((got.payload, got.dropped))


async def test_events_come_in_order_and_nothing_is_dropped_within_the_limit() -> None:
    queue = fill("drop-oldest", event(1), event(2), event(3))
    assert (await drain(queue), queue.dropped) == ([(1, 0), (2, 0), (3, 0)], 0)


async def test_oldest_events_make_room_and_the_next_one_says_how_many() -> None:
    queue = fill("drop-oldest", *map(event, range(8)))
    assert (await drain(queue), queue.dropped) == ([(5, 5), (6, 0), (7, 0)], 5)


async def test_latest_keeps_the_newest_of_each_event_name() -> None:
    queue = fill("latest", event(1, "a"), event(2, "b"), event(3, "a"), event(4, "a"))
    assert (await drain(queue), queue.dropped) == ([(2, 2), (4, 0)], 2)


async def test_latest_is_bounded_too() -> None:
    queue = fill("latest", *(event(number, str(number)) for number in range(5)))
    assert (await drain(queue), queue.dropped) == ([(2, 2), (3, 0), (4, 0)], 2)


async def test_raise_gives_what_waits_and_then_raises() -> None:
    queue = fill("raise", *map(event, range(5)))
    assert [(await queue.get()).payload for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(QueueOverflow, match="'t': over 3 events were waiting"):
            await queue.get()
    assert queue.dropped == 2


async def test_a_rejoin_stands_where_it_was_and_is_never_dropped() -> None:
    queue = fill("drop-oldest", event(1), rejoined(-1), event(2), event(3), event(4), event(5))
    assert (await drain(queue), queue.dropped) == ([(-1, 2), (3, 0), (4, 0), (5, 0)], 2)


async def test_of_rejoins_with_nothing_between_them_the_newest_stays() -> None:
    queue = fill("drop-oldest", rejoined(-1), rejoined(-2), event(1), rejoined(-3), event(2), limit=1)
    assert await drain(queue) == [(-3, 1), (2, 0)]


def positioned(number: int) -> Event:
    return Event("t", "n", number, position=f"1-{number}")


async def test_full_queue_that_recovers_takes_nothing_until_its_topic_is_rejoined() -> None:
    queue = EventQueue("t", 2, "recover")
    assert [queue.put(positioned(number)) for number in range(4)] == [True, True, False, False]
    assert (queue.is_behind, queue.is_empty, queue.dropped) == (True, False, 0)
    assert (await queue.get()).payload == 0
    assert not queue.put(positioned(4)), "two and three are still missing"
    assert (await queue.get()).payload == 1
    assert queue.is_empty
    queue.is_behind = False
    assert queue.put(positioned(2))
    assert [(await queue.get()).dropped, queue.dropped] == [0, 0]


async def test_event_in_no_history_is_dropped_by_a_full_queue_and_counted() -> None:
    queue = EventQueue("t", 1, "recover")
    assert [queue.put(event(number)) for number in range(3)] == [True, False, False]
    assert not queue.is_behind, "nothing can be recovered"
    assert (await queue.get()).payload == 0
    assert queue.put(positioned(3))
    assert ((await queue.get()).dropped, queue.dropped) == (2, 2)


@pytest.mark.parametrize(
    ("marks", "left"),
    [
        ([Lost, Recovered], Lost),
        ([Recovered, Lost], Lost),
        ([Lost, Recovered, Recovered], Lost),
        ([Recovered, Recovered], Recovered),
    ],
)
async def test_loss_is_not_hidden_by_a_later_recovery(marks: list[type[Event]], left: type[Event]) -> None:
    queue = EventQueue("t", 1, "recover")
    for number, mark in enumerate(marks):
        queue.put(mark("t", REJOINED, number))
    assert type(await queue.get()) is left
    assert queue.is_empty


async def test_after_the_end_nothing_is_added() -> None:
    queue = fill("drop-oldest", event(1))
    queue.put(event(2))
    queue.put(rejoined(-1))
    assert (await drain(queue), queue.dropped) == ([(1, 0)], 1)


async def test_an_error_comes_after_what_waits() -> None:
    queue = EventQueue("t", 3, "latest")
    queue.put(event(1))
    queue.end(LookupError())
    queue.end()
    assert (await queue.get()).payload == 1
    with pytest.raises(LookupError):
        await queue.get()


async def test_whoever_waits_is_woken_each_by_an_event_of_its_own() -> None:
    queue = EventQueue("t", 3, "drop-oldest")
    waiting = [asyncio.ensure_future(queue.get()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.put(event(1))
    queue.put(event(2))
    queue.end()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [getattr(result, "payload", type(result)) for result in results] == [1, 2, StopAsyncIteration]


@pytest.mark.parametrize("overflow", ["drop-oldest", "latest"])
@pytest.mark.parametrize("seed", range(20))
async def test_whatever_comes_every_event_is_taken_or_counted(overflow: Overflow, seed: int) -> None:
    """And rejoins never outnumber the events they stand between, however long nobody takes anything."""
    chance = random.Random(seed)
    queue = EventQueue("t", 4, overflow)
    came, got = 0, []
    for number in range(2000):
        what = chance.choice(["put", "put", "rejoin", "get"])
        if what == "put":
            came += 1
            queue.put(event(number, chance.choice("abcdef")))
        elif what == "rejoin":
            queue.put(rejoined(number))
        elif queue._waiting:
            got.append(await queue.get())
        assert len(queue._waiting) <= 2 * 4 + 1
    got += [await queue.get() for _ in range(len(queue._waiting))]
    assert came == queue.dropped + sum(one.event != REJOINED for one in got)
    assert queue.dropped == sum(one.dropped for one in got) > 0


@pytest.mark.parametrize(("limit", "overflow"), [(0, "latest"), (1, "explode")])
def test_a_queue_that_makes_no_sense_is_refused(limit: int, overflow: Overflow) -> None:
    with pytest.raises(ValueError, match="expected"):
        EventQueue("t", limit, overflow)
