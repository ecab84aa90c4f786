"""Work in order per key: at once where nothing waits, behind its own key where something does."""

import asyncio
import gc
from collections.abc import Coroutine
from functools import partial

import pytest

from relay.concurrency import JOB_BYTES, InFlight, KeyedQueue
from relay.errors import IN_FLIGHT_FULL
from relay.metrics import Metrics


class Work:
    """Pieces of work that note their begin and end, and go on when they are told to."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    def job(self, name: str) -> Coroutine[None, None, None]:
        self.log.append(f"{name} called")
        self.gates[name] = asyncio.Event()
        return self._rest(name)

    async def _rest(self, name: str) -> None:
        await self.gates[name].wait()
        self.log.append(f"{name} done")

    def quick(self, name: str) -> None:
        self.log.append(f"{name} called")


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_job_without_a_rest_is_done_at_once() -> None:
    queue, work = KeyedQueue(), Work()
    queue.run("a", lambda: work.quick("1"))
    assert work.log == ["1 called"]
    assert queue.pending == 0
    assert queue.waiting("a") == 0


async def test_jobs_of_one_key_run_in_order_one_at_a_time() -> None:
    queue, work = KeyedQueue(), Work()
    queue.run("a", lambda: work.job("1"))
    queue.run("a", lambda: work.quick("2"))
    queue.run("a", lambda: work.job("3"))
    assert work.log == ["1 called"]
    assert (queue.pending, queue.waiting("a")) == (3, 2)
    work.gates["1"].set()
    await turns()
    assert work.log == ["1 called", "1 done", "2 called", "3 called"]
    assert (queue.pending, queue.waiting("a")) == (1, 0)
    work.gates["3"].set()
    await turns()
    assert work.log[-1] == "3 done"
    assert queue.pending == 0


async def test_other_keys_go_on_while_one_waits() -> None:
    queue, work = KeyedQueue(), Work()
    queue.run("a", lambda: work.job("1"))
    queue.run("b", lambda: work.job("2"))
    queue.run("c", lambda: work.quick("3"))
    assert work.log == ["1 called", "2 called", "3 called"]
    work.gates["2"].set()
    await turns()
    assert work.log[-1] == "2 done"
    assert queue.pending == 1
    await queue.close()


async def test_key_is_free_again_in_the_very_turn_in_which_its_last_job_ends() -> None:
    queue, work = KeyedQueue(), Work()

    async def first() -> None:
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(queue.run, "a", lambda: work.quick("2"))

    queue.run("a", first)
    await turns()
    assert work.log == ["2 called"]
    assert queue.pending == 0


async def test_job_may_begin_another_of_its_own_key() -> None:
    """A socket's leave tells plugins of it in the queue of its topic, from within that queue."""
    queue, work = KeyedQueue(), Work()

    def outer() -> None:
        work.quick("outer")
        queue.run("a", lambda: work.job("inner"))

    queue.run("a", outer)
    queue.run("a", lambda: work.quick("after"))
    assert work.log == ["outer called", "inner called"]
    work.gates["inner"].set()
    await turns()
    assert work.log == ["outer called", "inner called", "inner done", "after called"]


async def test_job_that_raises_costs_no_other_of_its_key_anything(caplog: pytest.LogCaptureFixture) -> None:
    queue, work = KeyedQueue(), Work()

    async def broken() -> None:
        raise RuntimeError("boom")

    def broken_at_once() -> None:
        raise RuntimeError("bang")

    queue.run("a", broken, 100)
    queue.run("a", lambda: work.quick("1"), 100)
    queue.run("a", broken_at_once, 100)
    queue.run("a", lambda: work.job("2"), 100)
    await turns()
    assert work.log == ["1 called", "2 called"]
    work.gates["2"].set()
    await turns()
    assert queue.pending == queue.held_bytes == 0
    assert not queue.is_busy("a")
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["boom", "bang"]


async def test_waiter_goes_on_once_enough_jobs_are_done() -> None:
    queue, work = KeyedQueue(), Work()
    for name in ("1", "2", "3"):
        queue.run(name, lambda name=name: work.job(name))  # type: ignore[misc]
    waiter = asyncio.create_task(queue.wait_below(2))
    work.gates["1"].set()
    await turns()
    assert not waiter.done()
    work.gates["2"].set()
    work.gates["3"].set()
    await turns()
    assert waiter.done()
    await queue.wait_below(1)


async def test_owner_may_count_jobs_of_its_own() -> None:
    queue = KeyedQueue()
    queue.pending += 2
    waiter = asyncio.create_task(queue.wait_below(1))
    await turns()
    queue.done()
    queue.done()
    await waiter


async def test_close_cancels_what_runs_and_drops_what_waits() -> None:
    queue, work = KeyedQueue(), Work()
    queue.run("a", lambda: work.job("1"))
    queue.run("a", lambda: work.quick("2"))
    await turns()
    await queue.close()
    assert work.log == ["1 called"]
    assert queue.pending == 0
    await queue.wait_below(1)


async def test_close_before_a_job_has_begun_leaves_no_coroutine_behind() -> None:
    """Python warns of a coroutine that was never awaited, and a warning fails the test."""
    queue, work = KeyedQueue(), Work()
    queue.run("a", lambda: work.job("1"))
    await queue.close()
    del queue
    gc.collect()
    assert work.log == ["1 called"]


async def test_close_of_idle_queue_does_nothing() -> None:
    queue = KeyedQueue()
    await queue.close()
    assert queue.pending == 0


async def test_waiting_jobs_are_dropped_and_others_keep_their_order() -> None:
    queue, work = KeyedQueue(), Work()
    for key in "ab":
        queue.run(key, partial(work.job, f"{key}1"))
        for number in "234":
            queue.run(key, partial(work.quick, key + number))
    assert queue.pending == 8
    assert queue.drop(lambda job: getattr(job, "args", ("",))[-1][1:] in ("2", "4")) == 4
    assert (queue.pending, queue.waiting("a"), queue.waiting("b")) == (4, 1, 1)
    for gate in work.gates.values():
        gate.set()
    await queue.wait()
    assert [entry for entry in work.log if entry.startswith("a")] == ["a1 called", "a1 done", "a3 called"]
    assert queue.pending == 0


# What they hold.


async def test_bytes_count_while_a_job_waits_or_runs() -> None:
    metrics, work = Metrics(), Work()
    queue = KeyedQueue(InFlight(0, metrics))
    queue.run("a", lambda: work.quick("0"), 1000)
    assert (queue.held_bytes, metrics.in_flight_bytes) == (0, 0), "what is done at once is not counted"
    queue.run("a", lambda: work.job("1"), 10)
    queue.run("a", lambda: work.job("2"), 20)
    queue.run("a", lambda: work.quick("3"), 30)
    queue.run("b", lambda: work.job("4"), 40)
    assert queue.held_bytes == metrics.in_flight_bytes == 100 + 2 * JOB_BYTES
    assert queue.waiting_bytes("a") == 50 + 2 * JOB_BYTES
    work.gates["1"].set()
    await turns()
    assert queue.held_bytes == metrics.in_flight_bytes == 90 + 2 * JOB_BYTES
    work.gates["2"].set()
    await turns()
    assert queue.held_bytes == metrics.in_flight_bytes == 40
    work.gates["4"].set()
    await turns()
    assert (queue.held_bytes, metrics.in_flight_bytes, queue.pending) == (0, 0, 0)


async def test_bytes_of_what_is_dropped_or_closed_count_no_more() -> None:
    metrics, work = Metrics(), Work()
    queue = KeyedQueue(InFlight(0, metrics))
    for name in "123":
        queue.run("a", partial(work.job, name), 10)
    assert queue.drop(lambda job: isinstance(job, partial) and job.args == ("2",)) == 1
    assert queue.held_bytes == metrics.in_flight_bytes == 20 + JOB_BYTES
    await queue.close()
    assert (metrics.in_flight_bytes, queue.running) == (0, False)


async def test_waiting_for_bytes_ends_when_there_are_fewer() -> None:
    queue, work = KeyedQueue(), Work()
    queue.run("a", lambda: work.job("1"), 1000)
    waiting = asyncio.ensure_future(queue.wait_below(10, 1000))
    await turns()
    assert not waiting.done()
    work.gates["1"].set()
    await waiting


async def test_queue_with_the_most_gives_up_when_all_hold_too_much() -> None:
    metrics, work, gone = Metrics(), Work(), list[str]()
    in_flight = InFlight(3000 + 2 * JOB_BYTES, metrics)

    def make(name: str) -> KeyedQueue:
        def give_up() -> None:
            gone.append(name)
            assert queue.drop(lambda job: True) == 1

        queue = KeyedQueue(in_flight, give_up)
        return queue

    small, large = make("small"), make("large")
    for queue, size in ((small, 500), (large, 1000)):
        for number in (1, 2):
            queue.run("a", partial(work.job, f"{size} {number}"), size)
    assert gone == []
    small.run("b", lambda: work.job("more"), 1)
    assert gone == ["large"]
    assert (large.held_bytes, small.held_bytes) == (1000, 1001 + JOB_BYTES)
    assert metrics.in_flight_bytes == 2001 + JOB_BYTES
    for gate in ("500 1", "1000 1", "more"):
        work.gates[gate].set()
    await turns(6)
    work.gates["500 2"].set()
    await turns(6)
    assert "1000 2 called" not in work.log
    assert metrics.in_flight_bytes == 0


async def test_running_job_is_cut_off_where_nothing_waits_and_the_next_of_its_key_goes_on() -> None:
    """As a join's on_leave, which holds nothing, must be called whatever became of the push before it."""
    metrics, work = Metrics(), Work()
    queue = KeyedQueue(InFlight(1000, metrics), lambda: None)
    queue.run("a", lambda: work.job("large"), 900)
    queue.run("b", lambda: work.job("larger"), 901)
    assert metrics.refused[IN_FLIGHT_FULL] == 2
    queue.run("a", lambda: work.quick("after"))
    await turns(6)
    assert work.log == ["large called", "larger called", "after called"]
    assert (metrics.in_flight_bytes, queue.pending, queue.running) == (0, 0, False)


async def test_owner_that_cannot_give_up_has_half_and_each_of_its_keys_a_sixteenth() -> None:
    metrics, work = Metrics(), Work()
    in_flight = InFlight(16_000, metrics)
    queue = KeyedQueue(in_flight)
    assert in_flight.has_room(queue, "a", 100_000), "it need not wait"
    queue.run("a", lambda: work.job("1"), 7500)
    assert in_flight.has_room(queue, "a", 500)
    assert not in_flight.has_room(queue, "a", 501)
    queue.run("b", lambda: work.job("2"), 0)
    assert in_flight.has_room(queue, "b", 500)
    await queue.close()
    queue = KeyedQueue(in_flight)
    queue.run("a", lambda: work.job("3"), 0)
    assert in_flight.has_room(queue, "a", 1000)
    assert not in_flight.has_room(queue, "a", 1001)
    await queue.close()
