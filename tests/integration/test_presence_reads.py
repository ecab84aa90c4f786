"""What is said of a topic's members: ``relay.presence``, ``GET /api/presence``; with Redis and in memory."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlencode

import pytest
from redis.asyncio import Redis

from relay import BusUnavailable
from tests.integration.test_presence import PRESENCE, direct, enter, settings, topic
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.serving import Served, eventually, http_get

__all__ = ["direct", "enter", "topic"]

ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

COUNTED: dict[str, Any] = {"topics": [{"match": "room:*", "presence": "count"}]}


async def read(served: Served, topic: str, status: int = 200) -> Any:
    found, body = await http_get(f"{served.http}/api/presence?{urlencode({'topic': topic})}")
    assert found == status, body
    return json.loads(body)


@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_members_are_read(serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey, bus: str) -> None:
    served = await serve_relay(**settings(bus, valkey))
    assert await read(served, topic) == {"topic": topic, "count": 0, "members": {}}
    assert await served.relay.presence(topic) == {}
    one = await enter(served, topic, presence={"n": 9007199254740993})
    two = await enter(served, topic)
    await eventually(lambda: len(one.keys) == 2 and one.keys == two.keys, "both")
    first, second = one.state
    expected = {first: [{"meta": {"n": 9007199254740993}}], second: [{}]}
    assert await served.relay.presence(topic) == expected
    assert await served.relay.presence_count(topic) == 2
    assert await read(served, topic) == {"topic": topic, "count": 2, "members": expected}


async def test_members_are_read_by_a_node_without_subscribers(
    serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey
) -> None:
    served, other = await serve_relay(**settings("redis", valkey)), await serve_relay(**settings("redis", valkey))
    one = await enter(served, topic)
    await eventually(lambda: len(one.keys) == 1, "the state")
    members: dict[str, Any] = {}
    async with asyncio.timeout(20):
        while not members:
            members = await other.relay.presence(topic)
    assert members == {next(iter(one.keys)): [{}]}


@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_number_alone_is_read(serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey, bus: str) -> None:
    served = await serve_relay(**settings(bus, valkey) | COUNTED)
    people = [await enter(served, topic) for _ in range(3)]
    await eventually(lambda: all(person.count == 3 for person in people), "the number")
    assert await read(served, topic) == {"topic": topic, "count": 3, "members": None}
    assert await served.relay.presence_count(topic) == 3
    with pytest.raises(ValueError, match='has presence = "count"'):
        await served.relay.presence(topic)


async def test_more_members_than_are_shown_are_counted(
    serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey
) -> None:
    shared = settings("redis", valkey) | {"topics": [{"match": "room:*", "presence": True, "presence_max": 2}]}
    served = await serve_relay(**shared)
    people = [await enter(served, topic) for _ in range(3)]
    await eventually(lambda: all(person.count == 3 for person in people), "the number")
    assert await read(served, topic) == {"topic": topic, "count": 3, "members": None}
    assert len(await served.relay.presence(topic)) == 3


async def test_topic_without_presence_and_bad_topics(serve_relay: ServeRelay, valkey: Valkey) -> None:
    served = await serve_relay(**settings("redis", valkey))
    assert (await read(served, "other:1", 404))["detail"].startswith("topic 'other:1' has no presence; set presence")
    assert (await read(served, "phoenix", 422))["detail"] == "topic 'phoenix' cannot be"
    assert (await http_get(f"{served.http}/api/presence"))[0] == 422
    for call in (served.relay.presence, served.relay.presence_count):
        with pytest.raises(ValueError, match="has no presence"):
            await call("other:1")
    bare = await serve_relay(redis_url=valkey.url)
    await read(bare, "room:1", 404)
    with pytest.raises(ValueError, match="has no presence"):
        await bare.relay.presence("room:1")


async def test_key_is_needed_as_for_other_reads(serve_relay: ServeRelay, valkey: Valkey) -> None:
    served = await serve_relay(**settings("redis", valkey), rest={"api_key": "s3cret"})
    await read(served, "room:1", 401)


async def test_members_that_cannot_be_read(serve_relay: ServeRelay, enter: Any, topic: str) -> None:
    """While Redis is away, members of other nodes are not known: no answer is better than an old one."""
    with Valkey() as server:
        served = await serve_relay(**PRESENCE, redis_url=server.url, redis={"timeout_s": 0.5 * PATIENCE})
        one = await enter(served, topic)
        await eventually(lambda: len(one.keys) == 1, "the state")
        server.kill()
        await eventually(lambda: not served.relay.node.broker.link.live, "the outage")
        assert (await read(served, topic, 503))["detail"].startswith("presence unavailable: ")
        assert (await read(served, "room:other", 503))["status"] == 503
        with pytest.raises(BusUnavailable):
            await served.relay.presence(topic)


async def test_key_of_wrong_kind_cannot_be_read(serve_relay: ServeRelay, topic: str, valkey: Valkey) -> None:
    served, other = await serve_relay(**settings("redis", valkey)), await serve_relay(**settings("redis", valkey))
    store = other.relay.node.broker.presence
    assert store is not None
    async with Redis(port=valkey.port) as redis:
        async with asyncio.timeout(20):
            while await redis.zscore("presence:nodes", store.node) is None:  # noqa: ASYNC110 - Redis's
                await asyncio.sleep(0.01)
        await redis.set(f"presence:{topic}|{store.node}", "text")
    assert "WRONGTYPE" in (await read(served, topic, 503))["detail"]
