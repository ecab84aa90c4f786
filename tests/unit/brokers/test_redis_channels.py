"""`relay.brokers.redis_channels`: which topics are subscribed to, in which order, and what a lost connection means."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from relay.brokers.redis_channels import PORTION, WINDOW, TopicChannels
from relay.brokers.redis_connection import LinkLost
from relay.config_redis import RedisConfig
from relay.errors import BusUnavailable
from tests.support.asgi import until


class Writer:
    """A connection that keeps what is written, one entry for each write."""

    def __init__(self) -> None:
        self.writes: list[tuple[str, list[str]]] = []
        self.ended: list[str] = []
        self.is_lost = False

    def ask_channels(self, command: str, names: Sequence[bytes]) -> None:
        if self.is_lost:
            raise LinkLost("gone")
        self.writes.append((command, [name.decode() for name in names]))

    def end(self, fault: str) -> None:
        self.ended.append(fault)

    def take(self) -> list[tuple[str, list[str]]]:
        writes, self.writes = self.writes, []
        return writes


def attached(**settings: Any) -> tuple[TopicChannels, Writer]:
    channels, writer = TopicChannels(RedisConfig(**settings)), Writer()
    channels.attach(writer)
    return channels, writer


async def join(channels: TopicChannels, *topics: str) -> list[asyncio.Task[None]]:
    """Begin to subscribe, and let this turn of the event loop end."""
    tasks = [asyncio.create_task(channels.subscribe(topic)) for topic in topics]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def heard(channels: TopicChannels, *topics: str) -> None:
    tasks = await join(channels, *topics)
    for _ in topics:
        channels.confirm()
    await asyncio.gather(*tasks)


async def fault_of(task: "asyncio.Task[None]") -> str:
    with pytest.raises(BusUnavailable) as raised:
        await task
    return str(raised.value)


async def test_what_one_turn_asks_for_goes_out_in_one_write() -> None:
    channels, writer = attached()
    first, second = await join(channels, "a", "b")
    assert writer.take() == [("SUBSCRIBE", ["topic:a", "topic:b"])]
    channels.confirm()
    await first
    assert (channels.hears("a"), channels.hears("b"), second.done()) == (True, False, False)
    channels.confirm()
    await second
    assert channels.waits_since is None


async def test_topic_that_is_heard_or_asked_for_is_not_asked_for_again() -> None:
    channels, writer = attached()
    first, second = await join(channels, "a", "a")
    channels.confirm()
    await asyncio.gather(first, second)
    await channels.subscribe("a")
    assert writer.take() == [("SUBSCRIBE", ["topic:a"])]


async def test_join_leave_join_within_the_linger_asks_for_nothing() -> None:
    channels, writer = attached(linger_s=30)
    await heard(channels, "a")
    for _ in range(3):
        channels.unsubscribe("a")
        assert not channels.hears("a")
        await channels.subscribe("a")
    assert writer.take() == [("SUBSCRIBE", ["topic:a"])]
    channels.close()


async def test_topics_are_unsubscribed_in_portions_after_the_linger() -> None:
    now = 100.0
    channels, writer = TopicChannels(RedisConfig(linger_s=30), lambda: now), Writer()
    channels.attach(writer)
    topics = [f"t{number}" for number in range(PORTION + 1)]
    await heard(channels, *topics)
    channels.unsubscribe("t0")
    await channels.subscribe("t0")
    for topic in topics[1:]:
        channels.unsubscribe(topic)
    now += 1
    channels.unsubscribe("t0")
    now += 29
    assert [command for command, _ in writer.take()] == ["SUBSCRIBE"]
    for _ in range(2):
        channels._end_lingering()
    assert writer.take() == [("UNSUBSCRIBE", [f"topic:{topic}" for topic in topics[1:]])]
    now += 1
    channels._end_lingering()
    assert writer.take() == [("UNSUBSCRIBE", ["topic:t0"])]
    assert not channels.by_name
    channels.close()


async def test_time_until_a_confirmation_is_kept_apart_for_joins_and_for_topics_of_a_gap() -> None:
    now = 100.0
    channels, writer = TopicChannels(RedisConfig(), lambda: now), Writer()
    channels.attach(writer)
    tasks = await join(channels, "a", "b")
    now += 0.002
    channels.confirm()
    now += 0.005
    channels.confirm()
    await asyncio.gather(*tasks)
    assert channels.subscribe_time.count == 2
    assert channels.subscribe_time.sum_s == pytest.approx(0.002 + 0.007)
    channels.detach("cut")
    now += 30  # without a connection
    channels.attach(writer)
    await until(lambda: len(writer.writes) == 2)
    now += 0.5
    channels.confirm()
    channels.confirm()
    assert channels.take_recovered() == ["a", "b"]
    assert (channels.subscribe_time.count, channels.resubscribe_time.count) == (2, 2)
    assert channels.resubscribe_time.sum_s == pytest.approx(2 * 0.5)
    channels.close()


async def test_leave_during_the_subscribe_unsubscribes_behind_it() -> None:
    """And a join that comes then is confirmed by its own SUBSCRIBE, not by the first one."""
    channels, writer = attached(linger_s=0)
    (first,) = await join(channels, "a")
    channels.unsubscribe("a")
    await until(lambda: len(writer.writes) == 2)
    (second,) = await join(channels, "a")
    subscribe, unsubscribe = ("SUBSCRIBE", ["topic:a"]), ("UNSUBSCRIBE", ["topic:a"])
    assert writer.take() == [subscribe, unsubscribe, subscribe]
    channels.confirm()
    assert not channels.hears("a")
    channels.confirm()
    await second
    assert channels.hears("a")
    _ = first.cancel()
    channels.close()


async def test_subscribe_of_this_turn_precedes_the_unsubscribe_of_the_same_topic() -> None:
    channels, writer = attached(linger_s=0)
    task = asyncio.create_task(channels.subscribe("a"))
    await asyncio.sleep(0)
    channels.unsubscribe("a")
    channels._end_lingering()
    assert [command for command, _ in writer.take()] == ["SUBSCRIBE", "UNSUBSCRIBE"]
    _ = task.cancel()
    channels.close()


async def test_confirmation_that_does_not_come_refuses_the_join_and_keeps_nothing() -> None:
    channels, writer = attached(timeout_s=0.05, linger_s=0)
    (waiting,) = await join(channels, "a")
    assert await fault_of(waiting) == "no answer to SUBSCRIBE within 0.05 s"
    await until(lambda: len(writer.writes) == 2)
    assert [command for command, _ in writer.take()] == ["SUBSCRIBE", "UNSUBSCRIBE"]
    assert not channels.by_name
    channels.confirm()  # late
    assert not channels.hears("a")
    channels.close()


async def test_refusal_of_one_topic_costs_no_other_anything() -> None:
    channels, _ = attached()
    refused, other = await join(channels, "a", "b")
    channels.refuse("SUBSCRIBE topic:a: NOPERM")
    channels.confirm()
    assert "NOPERM" in await fault_of(refused)
    await other
    assert list(channels.by_name) == [b"topic:b"]


async def test_lost_connection_refuses_who_waits_and_forgets_who_lingers() -> None:
    channels, _ = attached(linger_s=30)
    await heard(channels, "stays", "lingers")
    channels.unsubscribe("lingers")
    (waiting,) = await join(channels, "waits")
    channels.detach("cut")
    assert await fault_of(waiting) == "cut"
    assert (list(channels.by_name), channels.missed) == ([b"topic:stays"], 1)
    with pytest.raises(BusUnavailable, match="cut"):
        await channels.subscribe("new")
    channels.close()


async def test_topics_with_most_subscribers_are_heard_again_first() -> None:
    channels, _ = attached()
    await heard(channels, "one", "three", "two", "left")
    channels.count_subscribers = {"one": 1, "two": 2, "three": 3, "left": 4}.__getitem__
    channels.detach("cut")
    channels.unsubscribe("left")
    writer = Writer()
    channels.attach(writer)
    await until(lambda: sum(len(names) for _, names in writer.writes) == 3)
    asked = [name for _, names in writer.take() for name in names]
    assert asked == ["topic:three", "topic:two", "topic:one"]
    assert channels.take_recovered() == []
    channels.confirm()
    assert (channels.take_recovered(), channels.missed) == (["three"], 2)
    channels.refuse("NOPERM")
    channels.confirm()
    assert (channels.take_recovered(), channels.missed) == (["two", "one"], 0)
    assert not channels.hears("two")


async def test_window_of_unconfirmed_topics_is_kept_and_joins_pass_it() -> None:
    channels, _ = attached()
    topics = [f"t{number}" for number in range(2 * WINDOW)]
    await heard(channels, *topics)
    channels.detach("cut")
    writer = Writer()
    channels.attach(writer)

    def count() -> int:
        return sum(len(names) for _, names in writer.writes)

    await until(lambda: count() == WINDOW)
    for _ in range(20):
        await asyncio.sleep(0)
    assert count() == WINDOW
    new, early = await join(channels, "new", topics[-1])
    assert writer.writes[-1] == ("SUBSCRIBE", ["topic:new", f"topic:{topics[-1]}"])
    for _ in range(WINDOW + 2):
        channels.confirm()
    await asyncio.gather(new, early)
    assert len(channels.take_recovered()) == WINDOW + 1
    await until(lambda: count() == 2 * WINDOW + 1)  # each once
    for _ in range(WINDOW - 1):
        channels.confirm()
    assert (len(channels.take_recovered()), channels.missed) == (WINDOW - 1, 0)


async def test_second_loss_reports_each_topic_once_after_it_is_heard_again() -> None:
    channels, _ = attached()
    await heard(channels, "a", "b")
    channels.detach("cut")
    channels.attach(Writer())
    await until(lambda: channels.waits_since is not None)
    channels.confirm()
    channels.detach("cut again")
    assert (channels.take_recovered(), channels.missed) == ([], 2)
    writer = Writer()
    channels.attach(writer)
    await until(lambda: writer.writes)
    channels.confirm()
    channels.confirm()
    assert sorted(channels.take_recovered()) == ["a", "b"]


async def test_fault_of_our_own_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    channels, _ = attached()
    await heard(channels, "a")
    channels.detach("cut")

    def count_subscribers(topic: str) -> int:
        raise KeyError(topic)

    channels.count_subscribers = count_subscribers
    writer = Writer()
    channels.attach(writer)
    await until(lambda: writer.ended)
    assert writer.ended == ["internal error: KeyError"]
    assert "subscribing to topics again failed" in caplog.text


@pytest.mark.parametrize("act", [lambda c: c.unsubscribe("a"), lambda c: None])
async def test_connection_that_is_lost_in_a_write_raises_nothing(act: Callable[[TopicChannels], None]) -> None:
    channels, writer = attached(linger_s=0)
    await heard(channels, "a")
    writer.is_lost = True
    act(channels)
    (waiting,) = await join(channels, "b")
    channels.detach("cut")
    assert await fault_of(waiting) == "cut"
    channels.close()
