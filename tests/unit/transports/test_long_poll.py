"""`relay.transports.long_poll`: a session between its requests."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from relay.config_sections import LimitsConfig, Overflow, Policy
from relay.errors import CloseCode, WireError
from relay.log import RateLimitedLoggers
from relay.metrics import Metrics
from relay.protocol import serializer
from relay.protocol.frame import Frame
from relay.protocol.payload import encode_payload
from relay.protocol.serializer import Version
from relay.transports.base import TransportServices
from relay.transports.long_poll import LongPollTransport, Taken
from relay.transports.outbox import OutboxBudget
from tests.support.asgi import Connection, until
from tests.support.patience import PATIENCE

LIMITS = LimitsConfig(longpoll_window_s=20, close_timeout_s=20)
BRIEF = LIMITS.model_copy(update={"longpoll_window_s": 0.02})
KEEP = Policy(Overflow.DISCONNECT, match="a*")


def frame(event: str, size: int = 0) -> Frame:
    return serializer.encode_broadcast(Version.V2, "a", event, encode_payload("x" * size))


def texts(*frames: str | bytes) -> Iterator[str | bytes]:
    return iter(frames)


class Owner:
    def __init__(self) -> None:
        self.closes = 0

    def readiness_changed(self) -> None:
        raise AssertionError("frames are never written directly")

    def close_started(self) -> None:
        self.closes += 1

    def fell_behind(self, topic: str, position: str) -> None:
        raise AssertionError("no topic here has a history")

    @property
    def dropped_notice(self) -> Callable[[str, int], Frame]:
        return lambda topic, count: frame(f"lost {count}")


class Session:
    """A transport, and the task that reads from it until it ends, as `Socket.run` does."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.metrics = Metrics()
        self.owner = Owner()
        self.budget = OutboxBudget(0, self.metrics)
        self.read: list[str | bytes] = []
        self.may_read = asyncio.Event()
        self.may_read.set()
        log = RateLimitedLoggers().get("relay.socket")
        services = TransportServices(limits, self.metrics, log, self.budget)
        self.transport = LongPollTransport("s1", Connection(kind="http").scope, services)
        self.transport.owner = self.owner
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (frame := await self.transport.receive()) is not None:
            self.read.append(frame)
            await self.may_read.wait()
        self.transport.end()

    def send(self, *events: str, size: int = 0) -> None:
        for event in events:
            self.transport.send_event(frame(event, size), "a", event, KEEP)

    def poll(self, gone: asyncio.Future[None] | None = None) -> asyncio.Task[Taken | None]:
        return asyncio.create_task(self.transport.poll(self.gone if gone is None else gone))

    async def waiting(self, polls: int = 1) -> None:
        await until(lambda: len(self.transport._polls) == polls)


def events(taken: Taken | None) -> list[str]:
    assert taken is not None and taken.status == 200
    return [entry.key[1] if entry.key else entry.frame.text for entry in taken.entries]


@asynccontextmanager
async def session(limits: LimitsConfig = LIMITS) -> AsyncIterator[Session]:
    found = Session(limits)
    yield found
    found.transport.close(CloseCode.GOING_AWAY, "the test is over")
    found.transport._finish()
    await found.task
    assert found.metrics.outbox_bytes == 0


# Polls.


async def test_poll_takes_what_waits() -> None:
    async with session() as s:
        s.send("1", "2")
        assert events(await s.poll()) == ["1", "2"]
        assert s.transport.queued_bytes == 0


async def test_poll_waits_for_what_comes_and_takes_all_of_one_turn() -> None:
    async with session() as s:
        poll = s.poll()
        await s.waiting()
        s.send("1", "2", "3")
        assert events(await poll) == ["1", "2", "3"]


async def test_poll_finds_nothing_within_its_window() -> None:
    async with session(BRIEF) as s:
        assert await s.poll() == Taken(204)


async def test_large_frames_are_given_out_one_by_one() -> None:
    async with session() as s:
        s.send("1", "2", size=900_000)
        assert events(await s.poll()) == ["1"]
        assert events(await s.poll()) == ["2"]


async def test_of_two_polls_the_newest_is_given_each_event_once() -> None:
    async with session() as s:
        first, second = s.poll(), s.poll()
        await s.waiting(2)
        s.send("1", "2")
        assert events(await second) == ["1", "2"]
        assert not first.done()
        s.send("3")
        assert events(await first) == ["3"]


async def test_poll_woken_beside_another_waits_on() -> None:
    """Both are woken in one turn, and the first has taken everything."""
    async with session() as s:
        first, second = s.poll(), s.poll()
        await s.waiting(2)
        s.send("1")
        s.transport._wake_writer()  # nothing has been taken yet
        assert events(await second) == ["1"]
        await s.waiting()
        s.send("2")
        assert events(await first) == ["2"]


async def test_oldest_of_too_many_polls_is_answered() -> None:
    async with session() as s:
        polls = [s.poll() for _ in range(5)]
        assert await polls[0] == Taken(204)
        await s.waiting(4)


async def test_client_that_has_gone_takes_nothing() -> None:
    async with session() as s:
        gone = asyncio.get_running_loop().create_future()
        poll = s.poll(gone)
        await s.waiting()
        gone.set_result(None)
        assert await poll is None
        s.send("1")
        assert events(await s.poll()) == ["1"]


async def test_event_for_a_client_that_goes_in_the_same_turn_wakes_the_other_poll() -> None:
    async with session() as s:
        other = s.poll()
        await s.waiting()
        gone = asyncio.get_running_loop().create_future()
        poll = s.poll(gone)
        await s.waiting(2)
        s.send("1")
        gone.set_result(None)
        assert await poll is None
        assert events(await other) == ["1"]


async def test_answer_that_cannot_be_sent_comes_first_in_the_next() -> None:
    async with session() as s:
        s.send("1", "2")
        taken = await s.poll()
        s.send("3")
        assert taken is not None
        assert s.transport.put_back(taken)
        assert events(await s.poll()) == ["1", "2", "3"]
        assert s.metrics.outbox_bytes == 0


async def test_answer_that_comes_back_after_the_end_is_counted_as_lost() -> None:
    async with session() as s:
        s.send("1", "2")
        s.transport.send_control(frame("reply"))
        taken = await s.poll()
        assert taken is not None
        s.transport.close(CloseCode.GOING_AWAY, "bye")
        await s.task
        assert not s.transport.put_back(taken)
        assert s.metrics.dropped == {"socket closed": 2}


async def test_answer_does_not_come_back_behind_the_next() -> None:
    async with session() as s:
        s.send("1")
        taken = await s.poll()
        s.send("2")
        assert events(await s.poll()) == ["2"]
        assert taken is not None and not s.transport.put_back(taken)
        assert s.metrics.dropped == {"socket closed": 1}


async def test_outbox_has_its_bounds_between_polls(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "relay.socket")
    async with session() as s:
        s.send("1", "2", "3", size=1_000_000)
        assert s.transport.closed_with == CloseCode.SLOW_READER
        assert s.metrics.dropped == {"slow reader disconnected": 3}
        assert "outbox full" in caplog.text
        taken = await s.poll()
        assert taken == Taken(500, reason="outbox full: this client reads too slowly")
        await s.task


async def test_drained_is_when_a_poll_has_taken_all() -> None:
    async with session() as s:
        s.send("1", size=900_000)
        s.send("2", size=900_000)
        drained = asyncio.create_task(s.transport.drained())
        await s.poll()
        await asyncio.sleep(0)
        assert not drained.done()
        await s.poll()
        await drained


# Posts.


async def test_post_is_answered_when_all_of_it_has_been_read() -> None:
    async with session() as s:
        s.may_read.clear()
        post = asyncio.create_task(s.transport.post(texts("1", b"2"), 20))
        await until(lambda: s.read)
        assert (s.read, post.done(), s.transport.posts) == (["1"], False, 1)
        s.may_read.set()
        assert await post
        assert (s.read, s.transport.posts) == (["1", b"2"], 0)
        assert s.transport.last_size == 1


async def test_posts_are_read_in_their_order() -> None:
    async with session() as s:
        s.may_read.clear()
        posts = [asyncio.create_task(s.transport.post(texts(f"{n}a", f"{n}b"), 20)) for n in range(3)]
        await until(lambda: s.transport.posts == 3)
        s.may_read.set()
        assert await asyncio.gather(*posts) == [True] * 3
        assert s.read == ["0a", "0b", "1a", "1b", "2a", "2b"]


async def test_post_that_is_not_read_in_time_is_dropped() -> None:
    async with session() as s:
        s.may_read.clear()
        first = asyncio.create_task(s.transport.post(texts("1"), 20))
        await until(lambda: s.read)  # and waits after it
        with pytest.raises(TimeoutError):
            await s.transport.post(texts("2"), 0.01)
        assert s.transport.posts == 1
        s.may_read.set()
        assert await first
        assert await s.transport.post(texts("3"), 20)
        assert s.read == ["1", "3"]


async def test_long_post_leaves_turns_to_others() -> None:
    """Whatever it holds, the event loop is not blocked until its end."""
    async with session() as s:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while not post.done():
                turns += 1
                await asyncio.sleep(0)

        post = asyncio.create_task(s.transport.post(texts(*["x"] * 6400), 20))
        await count()
        assert turns >= 100


async def test_malformed_post_closes_the_session() -> None:
    def broken() -> Iterator[str | bytes]:
        yield "1"
        raise WireError(CloseCode.INVALID_PAYLOAD, "expected JSON")

    async with session() as s:
        assert not await s.transport.post(broken(), 20)
        assert s.read == ["1"]
        assert (s.metrics.malformed, s.transport.ending) == ({"1007": 1}, (1007, "expected JSON", "relay"))
        await s.task
        assert not await s.transport.post(texts("2"), 20)


# Its end.


async def test_session_without_polls_ends() -> None:
    async with session(BRIEF) as s:
        await s.task
        assert s.transport.ending == (None, "no poll for 0.03 s", "client")
        assert await s.transport.poll(s.gone) == Taken(500, reason="no poll for 0.03 s")


async def test_session_lives_as_long_as_it_is_polled() -> None:
    async with session(BRIEF) as s:
        for _ in range(5):
            assert await s.poll() == Taken(204)
        poll = s.poll()
        await s.waiting()
        assert s.transport.idle_s(1e12) == 0
        await poll
        assert s.transport.idle_s(1e12) > 0


async def test_close_ends_the_poll_that_waits() -> None:
    async with session() as s:
        poll = s.poll()
        await s.waiting()
        assert s.transport.close(CloseCode.RESTART, "restarting")
        assert not s.transport.close(CloseCode.RESTART, "again")
        assert await poll == Taken(500, reason="restarting")
        await s.task
        assert s.owner.closes == 1
        assert s.transport.ending == (CloseCode.RESTART, "restarting", "relay")


async def test_what_waits_is_sent_before_the_close() -> None:
    async with session() as s:
        s.send("1")
        s.transport.send_control(frame("phx_error"))
        s.transport.close(CloseCode.RESTART, "restarting")
        s.send("late")
        assert s.metrics.dropped == {"socket closed": 1}
        assert events(await s.poll())[0] == "1"
        await s.task
        assert await s.poll() == Taken(500, reason="restarting")


async def test_close_does_not_wait_for_a_client_that_takes_a_part_and_does_not_come_back() -> None:
    async with session(LIMITS.model_copy(update={"close_timeout_s": 0.05})) as s:
        s.send("1", "2", "3", size=100)
        s.transport.close(CloseCode.RESTART, "restarting")
        assert events(await s.transport.poll(s.gone, max_bytes=1)) == ["1"]
        vanished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        vanished.set_result(None)
        assert await s.poll(vanished) is None
        async with asyncio.timeout(20 * PATIENCE):
            await s.task
        assert s.metrics.dropped == {"socket closed": 2}


async def test_close_waits_for_a_poll_no_longer_than_its_timeout() -> None:
    async with session(LIMITS.model_copy(update={"close_timeout_s": 0.01})) as s:
        s.send("1")
        s.transport.close(CloseCode.RESTART, "restarting")
        await s.task
        assert s.metrics.dropped == {"socket closed": 1}


async def test_post_under_way_ends_with_the_session() -> None:
    async with session() as s:
        s.may_read.clear()
        post = asyncio.create_task(s.transport.post(texts("1", "2", "3"), 20))
        await until(lambda: s.read)
        s.transport.close(CloseCode.POLICY_VIOLATION, "too much")
        s.may_read.set()
        assert not await post
        assert s.read == ["1"]
