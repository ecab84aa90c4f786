"""`Channel.presence` of the Python client, against a real relay."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest

from relay_client import REJOINED, connect
from tests.integration.test_presence import QUICK, direct, topic
from tests.integration.test_python_client import next_of, quickly
from tests.support.serving import Served, eventually

__all__ = ["direct", "topic"]

ServeRelay = Callable[..., Coroutine[Any, Any, Served]]


@pytest.fixture
def served(runner: asyncio.Runner, serve_relay: ServeRelay) -> Served:
    topics = [{"match": "room:*", "presence": True, "presence_max": 2}]
    return runner.run(serve_relay(broadcast_url="memory://", topics=topics, presence=QUICK))


def names(metas: tuple[Any, ...]) -> list[str]:
    return [meta["meta"]["name"] for meta in metas]


async def test_members_come_and_go(served: Served, topic: str) -> None:
    async with connect(served.ws) as socket, socket.join(topic, {"x": 1}, presence={"name": "Ada"}) as room:
        changes = room.presence.changes()
        ((own, metas),) = (await anext(changes)).joined.items()
        assert (dict(room.presence), names(metas)) == ({own: metas}, ["Ada"])
        async with connect(served.ws) as other, other.join(topic, presence={"name": "Bob"}):
            change = await anext(changes)
            ((key, metas),) = change.joined.items()
            assert (names(metas), set(room.presence), room.presence.count) == (["Bob"], {own, key}, 2)
        assert set((await anext(changes)).left) == {key}
        assert set(room.presence) == {own}
        await served.relay.publish(topic, "new_msg", 1)
        assert (await next_of(room)).event == "new_msg", "events about members are not the loop's"
    with pytest.raises(StopAsyncIteration):
        await anext(changes)


async def test_members_are_right_after_a_rejoin(served: Served, topic: str) -> None:
    async with quickly(served.ws) as socket, socket.join(topic, presence={}) as room:
        await eventually(lambda: len(room.presence) == 1, "the state")
        (before,) = room.presence
        served.relay.disconnect(next(iter(served.relay.node.sockets)))
        await next_of(room, REJOINED)
        await eventually(lambda: list(room.presence) not in ([], [before]) and len(room.presence) == 1, "the new key")


async def test_number_of_too_many_members(served: Served, topic: str) -> None:
    async with AsyncExitStack() as stack:
        rooms = []
        for _ in range(3):
            socket = await stack.enter_async_context(connect(served.ws))
            rooms.append(await stack.enter_async_context(socket.join(topic, presence={})))
        await eventually(lambda: all(room.presence.count == 3 for room in rooms), "the number")
        assert dict(rooms[0].presence) == {}


async def test_channel_without_presence_gets_the_events(served: Served, topic: str) -> None:
    async with connect(served.ws) as socket, socket.join(topic) as room:
        assert (await next_of(room)).event == "presence_state"
        with pytest.raises(RuntimeError, match="joined without presence"):
            _ = room.presence
