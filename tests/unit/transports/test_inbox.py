"""`relay.transports.inbox`: the replacements for asyncio's queue and event, without a server."""

import asyncio

import pytest

from relay.transports.inbox import Gate, Inbox


async def test_messages_are_handed_over_in_order_as_a_queue_does() -> None:
    inbox = Inbox()
    assert inbox.empty()
    inbox.put_nowait(1)
    inbox.put_nowait(2)
    assert not inbox.empty()
    assert (await inbox.get(), await inbox.get()) == (1, 2)
    assert inbox.empty()


async def test_whoever_waits_gets_the_message_that_comes() -> None:
    inbox = Inbox()
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        first, second = group.create_task(inbox.get()), group.create_task(inbox.get())
        await asyncio.sleep(0)
        inbox.put_nowait(1)
        await asyncio.sleep(0)
        inbox.put_nowait(2)
    assert (first.result(), second.result()) == (1, 2)


async def test_message_that_came_for_one_who_gave_up_is_kept() -> None:
    inbox = Inbox()
    task = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put_nowait(1)
    _ = task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await inbox.get() == 1


async def test_gate_lets_all_pass_while_it_is_open() -> None:
    gate = Gate()
    await gate.wait()
    gate.clear()
    waiting = [asyncio.create_task(gate.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    gate.clear()
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting), "closed again before they came to look"
    gate.set()
    async with asyncio.timeout(10):
        _ = await asyncio.gather(*waiting)
