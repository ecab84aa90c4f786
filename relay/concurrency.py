"""Work in order per key, at once where nothing has to wait.

Owns which jobs are under way; must not know what they do. A job is a callable that does what it can right away and
returns its continuation, a coroutine, or None. While a key's continuation runs, further jobs of that key queue behind
it; other keys go on.
"""

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from typing import TypeAlias

from relay.errors import IN_FLIGHT_FULL
from relay.metrics import Metrics

Continuation: TypeAlias = Coroutine[None, None, None] | None
Job: TypeAlias = Callable[[], Continuation]

_logger = logging.getLogger("relay")

_CLOSE_TIMEOUT_S = 5.0


def is_being_cancelled() -> bool:
    """Whether a CancelledError comes from outside; else code raised it, waiting for a task that was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def ends_task(error: BaseException) -> bool:
    """Whether an exception has to go on, since the task is cancelled or the process interrupted.

    All others are faults of the code that raised them, those too that are no `Exception`: a CancelledError of a task
    that it waited for, a panic in an extension.
    """
    if isinstance(error, asyncio.CancelledError):
        return is_being_cancelled()
    return isinstance(error, KeyboardInterrupt | GeneratorExit)


JOB_BYTES = 500
"""What a job that waits takes beside what it is about: itself, its message, its place in the queue."""


class InFlight:
    """What is under way in all queues of a relay, in bytes: past a bound, the owner with the most gives up.

    Args: max_bytes: the bound, `JOB_BYTES` for each job that waits included; 0 for none.
          metrics: ``in_flight_bytes`` there is the sum.
    """

    __slots__ = ("_max_bytes", "_members", "_metrics")

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._max_bytes = max_bytes
        self._metrics = metrics
        # Those with an owner that can give up, and in which something is under way.
        self._members: set[KeyedQueue] = set()

    def count(self, queue: "KeyedQueue", more_bytes: int) -> None:
        """Count what has come into a queue, or left it; past the bound, have the queue with the most given up."""
        self._metrics.in_flight_bytes += more_bytes
        if more_bytes <= 0:
            if not queue.held_bytes:
                self._members.discard(queue)
            return
        if queue.evict is not None:
            self._members.add(queue)
        while self._members and 0 < self._max_bytes < self._metrics.in_flight_bytes:
            before = self._metrics.in_flight_bytes
            most = max(self._members, key=lambda member: member.held_bytes)
            assert most.evict is not None, "else it is no member"
            most.evict()
            if self._metrics.in_flight_bytes == before:  # nothing of it waits: running handlers hold all that there is
                self._metrics.refused[IN_FLIGHT_FULL] += most.cut_off()

    def has_room(self, queue: "KeyedQueue", key: Hashable, more_bytes: int) -> bool:
        """Say whether more may wait in a queue whose owner cannot give up: a sixteenth for each key, half for all keys.

        What need not wait for others of its key may always come.
        """
        if not self._max_bytes or not queue.is_busy(key):
            return True
        return (
            queue.held_bytes + more_bytes <= self._max_bytes // 2
            and queue.waiting_bytes(key) + more_bytes <= self._max_bytes // 16
        )


class _KeyJobs:
    """The jobs of one key: one that runs, and those that wait, each with its size."""

    __slots__ = ("number", "size", "task", "waiting", "waiting_bytes")

    def __init__(self, size: int) -> None:
        self.waiting: deque[tuple[Job, int]] = deque()
        self.waiting_bytes = 0
        # Of the one that runs: its size, and its number since the key became busy.
        self.size = size
        self.number = 0
        self.task: asyncio.Task[None] | None = None

    def pop(self) -> Job:
        job, self.size = self.waiting.popleft()
        self.waiting_bytes -= self.size
        self.number += 1
        return job

    def cancel(self, number: int) -> None:
        """Cancel the job that runs, if it is this one still."""
        if self.number == number and self.task is not None:
            self.task.cancel()


class KeyedQueue:
    """The jobs of one owner, in order per key; `close` ends them all.

    Args: in_flight: where their bytes are counted, if anywhere.
          evict: has to `drop` what waits, when all queues together hold too much and this one most.
    """

    __slots__ = ("_by_key", "_changed", "_cut", "_in_flight", "_tasks", "evict", "held_bytes", "pending")

    def __init__(self, in_flight: InFlight | None = None, evict: Callable[[], object] | None = None) -> None:
        self.pending: int = 0
        """Jobs begun and not finished, or waiting for their turn."""
        self.held_bytes: int = 0
        """Bytes that those are about, and what those that wait take besides."""
        self.evict: Callable[[], object] | None = evict
        self._in_flight = in_flight
        # Whether what ran has been cut off; what comes then is not counted any more.
        self._cut = False
        self._by_key: dict[Hashable, _KeyJobs] = {}
        self._tasks: dict[asyncio.Task[None], Coroutine[None, None, None]] = {}
        self._changed: asyncio.Future[None] | None = None

    def run(self, key: Hashable, job: Job, size: int = 0) -> None:
        """Run ``job`` now, or behind those of its key that are under way.

        Args: size: of what it is about, in bytes; not counted where it is done at once.
        """
        jobs = self._by_key.get(key)
        if jobs is not None:
            size += JOB_BYTES
            self.pending += 1
            jobs.waiting.append((job, size))
            jobs.waiting_bytes += size
            self._hold(size)
        elif (rest := job()) is not None:
            self.pending += 1
            jobs = self._by_key[key] = _KeyJobs(size)
            jobs.task = task = asyncio.create_task(self._work_off(key, jobs, rest))
            self._tasks[task] = rest
            task.add_done_callback(self._tasks.pop)
            self._hold(size)

    def _hold(self, more_bytes: int) -> None:
        if not self._cut:
            self.held_bytes += more_bytes
            if self._in_flight is not None:
                self._in_flight.count(self, more_bytes)

    async def _work_off(self, key: Hashable, jobs: _KeyJobs, rest: Continuation) -> None:
        job: Job | None = None
        try:
            while True:
                try:
                    if job is not None:
                        rest, job = job(), None
                    if rest is not None:
                        await rest
                except asyncio.CancelledError:
                    if not self._cut or jobs.task is None or jobs.task.uncancel():
                        raise
                except Exception:  # none should raise; those behind it are not lost
                    _logger.exception("job failed; going on with those behind it")
                finally:
                    job = None
                    rest = None
                    self._hold(-jobs.size)
                    jobs.size = 0
                if not jobs.waiting:
                    return
                self.done()
                job = jobs.pop()
        finally:
            # Also when it is cancelled: the key must not stay blocked.
            del self._by_key[key]
            self._hold(-jobs.waiting_bytes - jobs.size)
            jobs.task = None
            self.done(1 + len(jobs.waiting))

    def done(self, jobs: int = 1) -> None:
        """So many jobs fewer are pending; for owners that add to ``pending`` directly."""
        self.pending -= jobs
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def wait_below(self, limit: int, max_bytes: float = math.inf) -> None:
        """Return once fewer than ``limit`` jobs are pending, and they hold less. One waiter at a time."""
        while self.pending >= limit or self.held_bytes >= max_bytes:
            self._changed = asyncio.get_running_loop().create_future()
            await self._changed

    @property
    def running(self) -> bool:
        """Whether a coroutine is under way."""
        return bool(self._tasks)

    async def wait(self) -> None:
        """Return once no coroutine is under way; what else is pending does not count."""
        while self._tasks:
            _ = await asyncio.wait(self._tasks)

    def waiting(self, key: Hashable) -> int:
        """How many jobs of a key wait for their turn."""
        jobs = self._by_key.get(key)
        return 0 if jobs is None else len(jobs.waiting)

    def waiting_bytes(self, key: Hashable) -> int:
        """What those hold."""
        jobs = self._by_key.get(key)
        return 0 if jobs is None else jobs.waiting_bytes

    def is_busy(self, key: Hashable) -> bool:
        """Whether a further job of a key would have to wait."""
        return key in self._by_key

    def drop(self, goes: Callable[[Job], bool]) -> int:
        """Drop the jobs that wait and of which ``goes`` is true; returns how many."""
        dropped = dropped_bytes = 0
        for jobs in self._by_key.values():
            kept = [entry for entry in jobs.waiting if not goes(entry[0])]
            kept_bytes = sum(size for _, size in kept)
            dropped += len(jobs.waiting) - len(kept)
            dropped_bytes += jobs.waiting_bytes - kept_bytes
            jobs.waiting.clear()
            jobs.waiting.extend(kept)
            jobs.waiting_bytes = kept_bytes
        self._hold(-dropped_bytes)
        self.done(dropped)
        return dropped

    def cut_off(self) -> int:
        """Cancel what runs and holds bytes, and count this queue no more. Returns how many jobs that are."""
        self._hold(-self.held_bytes)
        self._cut = True
        running = [jobs for jobs in self._by_key.values() if jobs.size]
        for jobs in running:
            # At the next turn: one that is cancelled before its first step would leave its key blocked.
            asyncio.get_running_loop().call_soon(jobs.cancel, jobs.number)
        return len(running)

    async def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Drop what waits, cancel what runs, and wait for its end; what ignores its cancellation is left behind."""
        tasks, self._cut = dict(self._tasks), False
        held, self._in_flight, in_flight = self.held_bytes, None, self._in_flight
        if in_flight is not None:
            self.held_bytes = 0
            in_flight.count(self, -held)
        for task in tasks:
            task.cancel()
        if tasks:
            done, _ = await asyncio.wait(tasks, timeout=timeout_s)
            tasks = {task: rest for task, rest in tasks.items() if task in done}
        for rest in tasks.values():
            rest.close()  # a task cancelled before its first step has not begun it
