"""`relay.brokers.cluster_channels`: channels that come and go with their slots, and what their gaps are."""

import asyncio
from collections.abc import Sequence

import pytest

from relay.brokers.cluster_channels import OwnChannel, ShardChannels
from relay.config_redis import RedisConfig
from relay.errors import BusUnavailable

A, B = b"topic:a", b"topic:b"


class Writer:
    """A connection that says what was sent on it."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []

    def ask_channels(self, command: str, names: Sequence[bytes]) -> None:
        self.sent += ((command, name) for name in names)

    def end(self, fault: str) -> None:
        raise AssertionError(fault)


def node() -> tuple[ShardChannels, Writer]:
    channels, writer = ShardChannels(RedisConfig(linger_s=0)), Writer()
    channels.attach(writer)
    return channels, writer


async def heard(channels: ShardChannels, *topics: str) -> None:
    """Subscribe to topics and confirm them."""
    asked = [asyncio.create_task(channels.subscribe(topic)) for topic in topics]
    await asyncio.sleep(0.01)
    for _ in topics:
        channels.confirm()
    _ = await asyncio.gather(*asked)


async def test_topic_that_was_unsubscribed_unasked_has_its_gap_at_the_next_node() -> None:
    old, _ = node()
    new, writer = node()
    await heard(old, "a", "b")
    lost = old.withdraw([A, b"topic:unknown"])
    assert [channel.topic for channel in lost] == ["a"]
    assert not old.hears("a") and old.hears("b")
    new.adopt(lost)
    assert new.missed == 1 and not new.hears("a")
    await asyncio.sleep(0.01)
    assert writer.sent == [("SSUBSCRIBE", A)]
    new.confirm()
    assert (new.take_recovered(), new.missed, new.hears("a")) == (["a"], 0, True)
    old.close()
    new.close()


async def test_time_of_topics_that_have_moved_begins_with_the_move_and_leaves_out_channels_of_nodes() -> None:
    now = 100.0
    old, _ = node()
    new = ShardChannels(RedisConfig(linger_s=0), lambda: now)
    new.want(b"relay:control", lambda payload: None)
    new.attach(Writer())
    await asyncio.sleep(0.01)
    new.confirm()
    assert (new.take_recovered(), new.resubscribe_time.count) == ([""], 0)
    await heard(old, "a")
    now += 60
    new.adopt(old.withdraw([A]))
    await asyncio.sleep(0.01)
    now += 0.25
    new.confirm()
    assert new.take_recovered() == ["a"]
    assert new.resubscribe_time.count == 1
    assert new.resubscribe_time.sum_s == pytest.approx(0.25)
    old.close()
    new.close()


async def test_gap_that_was_not_reported_yet_is_reported_by_the_next_node() -> None:
    """The topic had just been heard again where it is served no more."""
    old, _ = node()
    new, _ = node()
    await heard(old, "a")
    old.adopt(old.withdraw([A]))
    await asyncio.sleep(0.01)
    old.confirm()
    new.adopt(old.withdraw_unless(lambda name: False))
    assert old.take_recovered() == []
    await asyncio.sleep(0.01)
    new.confirm()
    assert new.take_recovered() == ["a"]


async def test_join_that_waits_goes_on_at_the_next_node() -> None:
    old, _ = node()
    new, writer = node()
    asked = asyncio.create_task(old.subscribe("a"))
    await asyncio.sleep(0.01)
    channel = old.withdraw_refused()
    assert channel is not None
    new.adopt([channel])
    await asyncio.sleep(0.01)
    assert writer.sent == [("SSUBSCRIBE", A)]
    new.confirm()
    await asked
    assert new.hears("a") and new.take_recovered() == [], "there was no gap"


async def test_join_is_refused_where_the_next_node_is_not_connected() -> None:
    old, _ = node()
    new = ShardChannels(RedisConfig())
    asked = asyncio.create_task(old.subscribe("a"))
    await asyncio.sleep(0.01)
    channel = old.withdraw_refused()
    assert channel is not None
    new.adopt([channel])
    with pytest.raises(BusUnavailable, match="not started"):
        await asked
    assert not new.by_name


async def test_topic_that_is_heard_there_already_has_its_gap_at_once() -> None:
    """A join was quicker."""
    old, _ = node()
    new, writer = node()
    await heard(old, "a")
    lost = old.withdraw([A])
    await heard(new, "a")
    new.adopt(lost)
    assert new.take_recovered() == ["a"]
    assert writer.sent == [("SSUBSCRIBE", A)]


async def test_topic_that_was_left_is_not_taken_along() -> None:
    old, _ = node()
    new, writer = node()
    await heard(old, "a", "b")
    old.unsubscribe("a")
    new.adopt(old.withdraw_unless(lambda name: name == B))
    await asyncio.sleep(0.01)
    assert not new.by_name and not writer.sent and list(old.by_name) == [B]
    old.close()


async def test_refused_channel_that_was_left_is_nothing() -> None:
    old, _ = node()
    asked = asyncio.create_task(old.subscribe("a"))
    await asyncio.sleep(0.01)
    _ = old.withdraw_unless(lambda name: False)
    assert old.withdraw_refused() is None
    asked.cancel()
    _ = await asyncio.gather(asked, return_exceptions=True)


async def test_late_confirmation_of_a_channel_that_has_gone_changes_nothing() -> None:
    old, _ = node()
    new, _ = node()
    asked = asyncio.create_task(old.subscribe("a"))
    await asyncio.sleep(0.01)
    new.adopt(old.withdraw_unless(lambda name: False))
    old.confirm()
    assert not new.hears("a") and not asked.done()
    await asyncio.sleep(0.01)
    new.confirm()
    await asked


async def test_channel_of_nodes_is_subscribed_to_again_and_moves() -> None:
    taken: list[bytes] = []
    old, new = ShardChannels(RedisConfig()), ShardChannels(RedisConfig())
    old.want(b"relay:control", taken.append)
    old.want(b"relay:control", taken.append)
    writers = Writer(), Writer()
    for channels, writer in zip((old, new), writers, strict=True):
        channels.attach(writer)
    await asyncio.sleep(0.01)
    old.confirm()
    assert old.take_recovered() == [""], "it is of no topic"
    new.adopt(old.withdraw([b"relay:control"]))
    await asyncio.sleep(0.01)
    new.confirm()
    moved = new.by_name[b"relay:control"]
    assert isinstance(moved, OwnChannel)
    moved.receive(b"x")
    assert taken == [b"x"]
    assert [writer.sent for writer in writers] == [[("SSUBSCRIBE", b"relay:control")]] * 2


async def test_subscription_that_no_join_waits_for_is_released() -> None:
    channels, _ = node()
    asked = asyncio.create_task(channels.subscribe("a"))
    await asyncio.sleep(0.01)
    channels.release("a")
    assert A in channels.by_name, "a join waits"
    channels.by_name[A].waiters.clear()
    channels.release("a")
    assert not channels.by_name[A].is_wanted
    asked.cancel()
    _ = await asyncio.gather(asked, return_exceptions=True)
    channels.close()
