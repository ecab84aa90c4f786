"""`relay.channels.presence_limit`: changes over the rate of a socket are made later, the newest of each key."""

import asyncio
from collections.abc import Callable
from typing import Any

from relay.channels.presence_limit import ChangeLimiter
from relay.metrics import Metrics
from tests.support.clock import runner
from tests.support.transport import FakeTransport

__all__ = ["runner"]


class Channel:
    version: Any = None

    def __init__(self, socket: str) -> None:
        self.topic = "room:1"
        self.transport = FakeTransport(socket)


class World:
    def __init__(self, per_s: int = 10) -> None:
        self.metrics = Metrics()
        self.limiter = ChangeLimiter(per_s, self.metrics)
        self.made: list[str] = []

    def change(self, name: str) -> Callable[[], None]:
        return lambda: self.made.append(name)

    def run(self, channel: Channel, key: str | None, name: str, **options: bool) -> None:
        self.limiter.run(channel, key, self.change(name), **options)


async def test_changes_over_the_rate_are_made_later_and_the_newest_counts() -> None:
    world, channel = World(), Channel("s1")
    for number in range(100):
        world.run(channel, "ada", str(number))
    assert world.made == [str(number) for number in range(10)]
    assert world.metrics.presence_held_back == 90
    await asyncio.sleep(0.15)
    assert world.made[10:] == ["99"]
    await asyncio.sleep(10)
    assert len(world.made) == 11
    assert not world.limiter._sockets, "forgotten"


async def test_rate_is_that_of_the_setting_for_long() -> None:
    world, channel = World(5), Channel("s1")
    for number in range(1000):
        world.run(channel, f"key {number % 50}", str(number))
        await asyncio.sleep(0.01)
    assert 50 <= len(world.made) <= 5 + 50
    await asyncio.sleep(20)
    assert set(world.made) >= {str(number) for number in range(950, 1000)}, "the newest of each key"


async def test_sockets_do_not_wait_for_each_other() -> None:
    world = World()
    for name in ("s1", "s2"):
        channel = Channel(name)
        for number in range(10):
            world.run(channel, str(number), name)
    assert world.made == ["s1"] * 10 + ["s2"] * 10
    world.limiter.stop()


async def test_order_of_one_subscription_is_kept() -> None:
    """A removal under all keys falls behind nothing, and nothing before it comes after it."""
    world, channel = World(), Channel("s1")
    for number in range(10):
        world.run(channel, f"k{number}", "x")
    world.run(channel, "a", "track a")
    world.run(channel, "b", "track b")
    world.run(channel, None, "untrack")
    world.run(channel, "a", "track a again", is_first=True)
    await asyncio.sleep(1)
    assert world.made[10:] == ["untrack", "track a again"]
    world.limiter.stop()


async def test_first_listings_are_not_held_back() -> None:
    world = World()
    channels = [Channel("s1") for _ in range(100)]
    for channel in channels:
        channel.transport = channels[0].transport
        world.run(channel, "ada", "first", is_first=True)
    assert world.made == ["first"] * 100
    world.limiter.stop()


async def test_ended_subscription_is_not_changed() -> None:
    world, channel = World(), Channel("s1")
    for number in range(20):
        world.run(channel, str(number), "x")
    world.limiter.forget(channel)
    world.limiter.forget(Channel("s2"))
    await asyncio.sleep(5)
    assert len(world.made) == 10


async def test_stopped_limiter_makes_nothing_more() -> None:
    world, channel = World(), Channel("s1")
    for number in range(20):
        world.run(channel, str(number), "x")
    world.limiter.stop()
    await asyncio.sleep(5)
    assert len(world.made) == 10


async def test_without_a_limit_every_change_is_made() -> None:
    world, channel = World(0), Channel("s1")
    for number in range(1000):
        world.run(channel, "ada", str(number))
    assert len(world.made) == 1000
    assert world.metrics.presence_held_back == 0
