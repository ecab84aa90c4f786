"""`relay.transports.read_budget`: what one turn of the event loop reads."""

import asyncio

from relay.transports.read_budget import TURN_BYTES, ReadBudget


async def test_spent_budget_comes_back_at_the_next_turn() -> None:
    budget = ReadBudget(asyncio.get_running_loop())
    budget.spend(TURN_BYTES - 1)
    assert not budget.is_spent
    budget.spend(1)
    assert budget.is_spent
    await asyncio.sleep(0)
    assert not budget.is_spent


async def test_each_turn_lets_as_many_proceed_as_its_budget_takes_in_their_order() -> None:
    budget, proceeded = ReadBudget(asyncio.get_running_loop()), list[int]()

    def proceed(number: int) -> None:
        proceeded.append(number)
        budget.spend(TURN_BYTES // 2)

    budget.spend(TURN_BYTES)
    for number in range(5):
        budget.wait(lambda number=number: proceed(number))  # type: ignore[misc]
    assert proceeded == []
    for expected in ([0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
        await asyncio.sleep(0)
        assert proceeded == expected


async def test_one_that_waits_again_goes_behind_the_others() -> None:
    budget, proceeded = ReadBudget(asyncio.get_running_loop()), list[str]()

    def first() -> None:
        proceeded.append("first")
        budget.spend(TURN_BYTES)
        if len(proceeded) < 3:
            budget.wait(first)

    budget.wait(first)
    budget.wait(lambda: proceeded.append("second"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert proceeded == ["first", "second", "first"]
