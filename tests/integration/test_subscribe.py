"""`relay.subscribe`: events from a real Redis, its restart, and loops in responses of an app that ends."""

import asyncio
import json
from typing import Any
from urllib.request import urlopen

import pytest
from redis.asyncio import Redis

from relay import Relay
from relay.channels.event_stream import EventStream
from relay.errors import RelayError
from tests.support.patience import PATIENCE
from tests.support.process import Valkey, wait_for
from tests.support.servers import AppServer
from tests.support.serving import eventually

FAST = {"backoff_min_s": 0.02, "backoff_max_s": 0.1, "ping_interval_s": 0.2, "ping_timeout_s": 2, "timeout_s": 2}
TOPICS = [{"match": "h:*", "history": {"size": 100, "ttl_s": 60}}]


async def take(stream: EventStream, count: int) -> list[tuple[str, Any]]:
    async with asyncio.timeout(30):
        return [(event.event, event.payload) for event in [await anext(stream) for _ in range(count)]]


async def test_events_of_other_programs_arrive_and_a_restart_of_redis_is_reported() -> None:
    with Valkey() as server:
        relay = Relay(redis_url=server.url, redis=FAST, system_topic=False)
        async with relay.lifespan(), relay.subscribe("room:1") as events, relay.subscribe("room:1") as others:
            async with Redis.from_url(server.url) as redis:
                await redis.publish("to:room:1:new_msg", '{"text":"hi"}')
            assert await take(events, 1) == [("new_msg", {"text": "hi"})]
            server.kill()
            await eventually(lambda: not relay.link.live, "the loss of the link")
            server.start()
            await eventually(lambda: relay.link.live, "the link")
            async with Redis.from_url(server.url) as redis:
                await redis.publish("to:room:1:new_msg", "2")
            lost = ("relay:lost", {"reason": "events may have been missed", "position": None})
            assert await take(events, 2) == [lost, ("new_msg", 2)]
            assert await take(others, 3) == [("new_msg", {"text": "hi"}), lost, ("new_msg", 2)]


async def test_loop_over_a_history_misses_nothing_of_an_interrupted_link(valkey: Valkey) -> None:
    relay = Relay(redis_url=valkey.url, redis=FAST, system_topic=False, topics=TOPICS)
    topic = "h:interrupted"
    async with relay.lifespan(), relay.subscribe(topic) as events:
        await relay.publish(topic, "e", 0)
        assert await take(events, 1) == [("e", 0)]
        async with Redis.from_url(valkey.url) as redis:
            gaps = relay.metrics.gaps
            await redis.client_kill_filter(_type="pubsub")
            for at in range(1, 5):
                await relay.publish(topic, "e", at)
            await eventually(lambda: relay.metrics.gaps > gaps, "the gap")
            await relay.publish(topic, "e", 5)
            assert await take(events, 5) == [("e", at) for at in range(1, 6)]


@pytest.mark.parametrize("bus", ["memory", "redis"])
async def test_loop_that_has_not_begun_when_relay_stops_ends(valkey: Valkey, bus: str) -> None:
    """It waits for its turn to read the history."""
    where: dict[str, Any] = {"redis_url": valkey.url} if bus == "redis" else {"broadcast_url": "memory://"}
    relay = Relay(system_topic=False, topics=TOPICS, limits={"recover_per_s": 1}, **where)
    ended: list[str] = []

    async def loop() -> None:
        try:
            async with relay.subscribe("h:stopping", last=1) as events:
                async for _ in events:
                    pass
            ended.append("")
        except RelayError as error:
            ended.append(str(error))

    async with relay.lifespan():
        await relay.publish("h:stopping", "e", 0)
        loops = [asyncio.create_task(loop()) for _ in range(3)]
        await eventually(lambda: relay.topics, "the first of them")
    async with asyncio.timeout(20 * PATIENCE):
        await asyncio.gather(*loops)
    assert sorted(ended)[0] == "" and sorted(ended)[-1].startswith("the relay is stopping")


APP = """
import json
import os

from relay import Relay
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

relay = Relay(redis_url=os.environ["BUS"], system_topic=False)


async def stream(request):
    async def lines():
        async with relay.subscribe("room:1") as events:
            yield "begin\\n"
            async for event in events:
                yield json.dumps([event.event, event.payload]) + "\\n"

    return StreamingResponse(lines())


async def topics(request):
    return JSONResponse(relay.topics)


def publish(request):
    relay.publish("room:1", "e", 1)
    return JSONResponse("published")


app = Starlette(routes=[Route("/stream", stream), Route("/topics", topics), Route("/publish", publish)])
relay.install(app)
"""


@pytest.mark.parametrize("server", ["relay", "uvicorn"])
def test_loop_in_a_response_ends_with_its_client_and_with_the_server(server: str, valkey: Valkey) -> None:
    """Uvicorn waits for responses before it stops the application, without a limit in time."""
    with AppServer(server, APP, environ={"BUS": valkey.url}, ready="/relay/ready") as served:

        def topics() -> Any:
            with urlopen(f"{served.http}/topics", timeout=20) as response:
                return json.load(response)

        wait_for(lambda: urlopen(f"{served.http}/relay/ready", timeout=20).status == 200, "the relay")
        with (
            urlopen(f"{served.http}/stream", timeout=20) as first,
            urlopen(f"{served.http}/stream", timeout=20) as other,
        ):
            assert [first.readline(), other.readline()] == [b"begin\n"] * 2
            assert topics() == {"room:1": 2}
            first.close()
            wait_for(lambda: topics() == {"room:1": 1}, "the end of the first")
            urlopen(f"{served.http}/publish", timeout=20).close()
            assert other.readline() == b'["e", 1]\n'
            assert served.process is not None
            served.process.terminate()
            assert other.read() == b""
        assert served.process.wait(timeout=20) in (0, -15)
