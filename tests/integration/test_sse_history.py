"""Streams on topics with a history: what a client missed follows, whichever way it says where it stands."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from tests.support.process import Valkey
from tests.support.serving import Served, eventually
from tests.support.sse import Stream

Serve = Callable[..., Awaitable[Served]]

TOPICS = [
    {"match": "room:*", "history": {"size": 10_000, "ttl_s": 60}},
    {"match": "short:*", "history": {"size": 3, "ttl_s": 60}},
    {"match": "slow:*", "history": {"size": 10_000, "ttl_s": 60}, "overflow": "recover"},
]
LIMITS = {"payload_max_bytes": 65_536, "outbox_max_bytes": 200_000, "recover_max_events": 10_000}


@pytest.fixture(params=["redis", "memory"])
def served(
    request: pytest.FixtureRequest, runner: asyncio.Runner, serve_relay: Serve, valkey: Valkey, direct: bool
) -> Served:
    bus = {"redis_url": valkey.url} if request.param == "redis" else {"broadcast_url": "memory://"}
    server: dict[str, Any] = {"send_buffer": 4096}
    if direct:
        server["http"] = "relay.server:RelayHTTPProtocol"

    async def serve() -> Served:
        return await serve_relay(server=server, topics=TOPICS, limits=LIMITS, **bus)

    return runner.run(serve())


@pytest.fixture
def name() -> str:
    return uuid4().hex


async def publish(served: Served, topic: str, *numbers: int) -> None:
    for number in numbers:
        await served.relay.publish(topic, "new", {"n": number})


async def numbers(stream: Stream, count: int) -> list[int]:
    """The next events, as their numbers."""
    events = [await stream.receive() for _ in range(count)]
    assert {event.event for event in events} <= {"new"}, events
    return [json.loads(event.data)["n"] for event in events]


def back(stream: Stream, way: str) -> dict[str, Any]:
    """How a client says where it stands: as browsers do, or as a page does that opens another stream."""
    last = stream.parser.last_id
    return {"headers": {"Last-Event-ID": last}} if way == "header" else {"since": last}


@pytest.mark.parametrize("way", ["header", "query"])
async def test_missed_events_follow_the_join(served: Served, name: str, way: str) -> None:
    topic = f"room:{name}"
    async with Stream.open(served.ws, topic) as stream:
        await publish(served, topic, 1, 2)
        assert await numbers(stream, 2) == [1, 2]
    await publish(served, topic, 3, 4, 5)
    async with Stream.open(served.ws, topic, **back(stream, way)) as again:
        assert await numbers(again, 3) == [3, 4, 5]
        assert again.joins[0]["response"]["recovered"] is True
        await publish(served, topic, 6)
        assert await numbers(again, 1) == [6]


async def test_client_that_is_cut_before_the_first_event_misses_none(served: Served, name: str) -> None:
    topic = f"room:{name}"
    async with Stream.open(served.ws, topic) as stream:
        await eventually_joined(stream)
    assert stream.parser.last_id
    await publish(served, topic, 1, 2)
    async with Stream.open(served.ws, topic, **back(stream, "header")) as again:
        assert await numbers(again, 2) == [1, 2]


async def eventually_joined(stream: Stream) -> None:
    """Read until the stream has said that it has joined."""
    async with asyncio.timeout(20):
        while not stream.joins:
            stream._keep(await stream._read())


async def test_stream_may_begin_with_the_newest_events(served: Served, name: str) -> None:
    topic = f"room:{name}"
    await publish(served, topic, *range(10))
    async with Stream.open(served.ws, topic, last="3") as stream:
        assert await numbers(stream, 3) == [7, 8, 9]
        await publish(served, topic, 10)
        assert await numbers(stream, 1) == [10]
    await publish(served, topic, *range(11, 20))
    async with Stream.open(served.ws, topic, last="3", headers={"Last-Event-ID": stream.read_id}) as again:
        assert await numbers(again, 9) == list(range(11, 20)), "the position goes first"


async def test_several_topics_are_recovered_each_from_its_own_position(served: Served, name: str) -> None:
    one, two, live = f"room:{name}:1", f"room:{name}:2", f"live:{name}"
    topics = (one, two, live)
    async with Stream.open(served.ws, *topics) as stream:
        await publish(served, one, 1)
        await publish(served, two, 101)
        await publish(served, live, 201)
        assert sorted(await numbers(stream, 3)) == [1, 101, 201]  # the order is that of each topic
    async with Stream.open(served.ws, live) as other:
        await eventually_joined(other)
        await publish(served, two, 102, 103)
        await publish(served, live, 202)
        await publish(served, one, 2)
        assert await numbers(other, 1) == [202], "it has come, and is not on its way"
    async with Stream.open(served.ws, *topics, **back(stream, "header")) as again:
        seen = await numbers(again, 3)
        assert [number for number in seen if number > 100] == [102, 103]
        assert [number for number in seen if number < 100] == [2]
        recovered = {join["topic"]: join["response"].get("recovered") for join in again.joins}
        assert recovered == {one: True, two: True, live: None}
        await publish(served, live, 203)
        assert await numbers(again, 1) == [203]
    async with Stream.open(served.ws, two, one, **back(again, "query")) as third:
        await publish(served, one, 3)
        assert await numbers(third, 1) == [3], "nothing twice, whichever came last"


@pytest.mark.parametrize("since", ["1-1", "nonsense", "a=b", "%00"])
async def test_events_that_are_gone_are_reported_and_live_ones_go_on(served: Served, name: str, since: str) -> None:
    topic = f"short:{name}"
    await publish(served, topic, 1, 2, 3, 4, 5)
    async with Stream.open(served.ws, topic, since=since) as stream:
        if since != "a=b":  # names another topic: of this one nothing is said
            lost = await stream.receive()
            assert (lost.event, json.loads(lost.data)["topic"]) == ("relay:lost", topic)
            assert json.loads(lost.data)["reason"] in ("unknown position", "history expired")
        await publish(served, topic, 6)
        assert await numbers(stream, 1) == [6]
    await publish(served, topic, 7)
    async with Stream.open(served.ws, topic, **back(stream, "header")) as again:
        assert await numbers(again, 1) == [7]


async def test_slow_reader_is_given_every_event_once_and_in_order(served: Served, name: str) -> None:
    """Overflow policy ``recover``: what it does not take is read from the history as fast as it reads."""
    topic = f"slow:{name}"
    async with Stream.open(served.ws, topic, receive_buffer=4096) as slow, Stream.open(served.ws, topic) as quick:
        (found,) = [each for each in served.relay.node.sockets.values() if each.topics == (topic,)][:1]
        largest = 0
        for number in range(400):
            await served.relay.publish(topic, "new", {"n": number, "filler": "x" * 1000})
            largest = max(largest, *(each.queued_bytes for each in served.relay.node.sockets.values()))
        assert await numbers(quick, 400) == list(range(400))
        assert await numbers(slow, 400) == list(range(400))
        assert largest < 100_000 and found is not None
    assert served.relay.metrics.history_catch_ups["slow reader"] > 0


@pytest.mark.parametrize("served", ["redis"], indirect=True)
async def test_interrupted_link_loses_nothing_and_says_nothing(served: Served, name: str, redis: Redis) -> None:
    topic = f"room:{name}"
    async with Stream.open(served.ws, topic) as stream:
        for number in range(0, 30, 3):
            await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
            await eventually(lambda: served.relay.link.live, "the link to come back")
            await publish(served, topic, number, number + 1, number + 2)
        assert await numbers(stream, 30) == list(range(30))
    assert served.relay.metrics.rejoins_requested == 0


async def test_client_that_is_cut_at_random_sees_each_event_once_and_in_order(served: Served, name: str) -> None:
    topic, total, dice = f"room:{name}", 600, random.Random(7)

    async def flood() -> None:
        for number in range(total):
            await publish(served, topic, number)
            if dice.random() < 0.1:
                await asyncio.sleep(0)

    options: dict[str, Any] = {"since": ""}
    async with Stream.open(served.ws, topic) as stream:
        await eventually_joined(stream)
        options = back(stream, "header")
    flooding = asyncio.create_task(flood())
    seen: list[int] = []
    cuts = 0
    while len(seen) < total:
        async with Stream.open(served.ws, topic, **options) as stream:
            seen += await numbers(stream, min(dice.randrange(1, 60), total - len(seen)))
            # Only what was read counts as seen: an id behind it may have been parsed with it.
            options = {"headers": {"Last-Event-ID": stream.read_id}}
        cuts += 1
    await flooding
    assert seen == list(range(total))
    assert cuts > 5
