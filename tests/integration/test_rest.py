"""REST as operators and backends use it: over a real server, with sockets that see what it does.

What is refused, and with which words, is in ``tests/unit/web/test_rest.py``.
"""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import httpx2 as httpx
import pytest
from redis.asyncio import Redis

from tests.support.client import Client
from tests.support.faults import Proxy
from tests.support.process import Valkey
from tests.support.serving import Served, eventually, heard_on

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]

TOPICS = [
    "room:1",
    "a/b",
    "a/sockets/b",
    "spaces and %25 and ?#&+",
    "zürich:鉄道:🚆",
    "/",
    "..",
    "a//b/",
    "x;y=1",
    "%2F",
]


async def ask(served: Served, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, on a connection of its own."""
    async with httpx.AsyncClient(base_url=f"{served.http}/api", trust_env=False) as client:
        return await client.request(method, path, **options)


async def ask_for_topic(served: Served, topic: str, rest: str = "", method: str = "GET") -> httpx.Response:
    """Ask as curl does with ``--path-as-is``: httpx would tidy up a path with dots in it."""
    target = f"/api/topics/{quote(topic, safe='')}{rest}".encode()
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.request(method, served.http, extensions={"target": target})


async def only_socket(served: Served, topic: str) -> str:
    """The id of the one socket that has joined ``topic``."""
    found = (await ask_for_topic(served, topic)).json()
    assert found["sockets"] == 1
    return str(found["socket_ids"][0])


async def test_published_event_reaches_redis_and_the_subscribers(
    served: Served, valkey: Valkey, connect: Connect
) -> None:
    client = await connect(served)
    await client.join("room:rest")
    async with heard_on(valkey.url, "to:room:rest:*") as heard:
        event = {"topic": "room:rest", "event": "new_msg", "payload": {"text": "zürich"}}
        answer = await ask(served, "POST", "/publish", json=event)
        assert (answer.status_code, answer.json()) == (200, {"published": 1})
        assert await heard() == ("to:room:rest:new_msg", '{"text":"zürich"}'.encode())
    await client.expect_event("room:rest", "new_msg", {"text": "zürich"})


async def test_batch_arrives_in_its_order_over_several_topics(served: Served, connect: Connect) -> None:
    client = await connect(served)
    topics = [f"batch:{number}" for number in range(3)]
    for topic in topics:
        await client.join(topic)
    events = [{"topic": topics[n % 3], "event": f"step{n}", "payload": n} for n in range(100)]
    assert (await ask(served, "POST", "/publish", json={"events": events})).json() == {"published": 100}
    for event in events:
        await client.expect_event(event["topic"], event["event"], event["payload"])  # type: ignore[arg-type]


@pytest.mark.parametrize("direct", [True], ids=["direct"])
async def test_events_of_a_batch_share_round_trips(serve_relay: ServeRelay, connect: Connect, valkey: Valkey) -> None:
    async with Proxy.open(valkey.port) as proxy:
        served = await serve_relay(redis_url=f"redis://127.0.0.1:{proxy.port}")
        client = await connect(served)
        await client.join("batch:fast")
        reads = 0

        def count(data: bytes) -> bytes:
            nonlocal reads
            reads += 1  # of what Valkey sends: at least one for each round trip
            return data

        proxy.rewrite = count
        events = [{"topic": "batch:fast", "event": f"step{number}", "payload": number} for number in range(200)]
        assert (await ask(served, "POST", "/publish", json={"events": events})).json() == {"published": 200}
        for number in range(200):
            await client.expect_event("batch:fast", f"step{number}", number)
        assert reads < 50


@pytest.mark.parametrize("direct", [True], ids=["direct"])
async def test_batch_that_redis_takes_in_part_is_answered_with_the_number(serve_relay: ServeRelay) -> None:
    with Valkey() as valkey:
        rules = ("allchannels", "-@all", "+psubscribe", "+publish", "+ping", "+role")
        async with Redis.from_url(valkey.url) as redis:
            execute: Any = redis.execute_command
            await execute("ACL", "SETUSER", "relay", "on", ">pw", *rules)
            served = await serve_relay(redis_url=valkey.url.replace("//", "//relay:pw@"))
            channels = ("&to:room:1:*", "&to:relay:*")
            await execute("ACL", "SETUSER", "relay", "resetchannels", *channels)
            events = [{"topic": topic, "event": "e"} for topic in ("room:1", "room:2", "room:1")]
            answer = await ask(served, "POST", "/publish", json={"events": events})
            assert answer.status_code == 503
            assert answer.json()["detail"].startswith("bus unavailable: PUBLISH to:room:2:e: ")
            assert answer.json()["detail"].endswith("; it has confirmed 2 of 3 events")


async def test_batch_with_one_bad_name_publishes_nothing(served: Served, connect: Connect) -> None:
    client = await connect(served)
    await client.join("room:atomic")
    events = [{"topic": "room:atomic", "event": name} for name in ("good", "good", "phx_error")]
    assert (await ask(served, "POST", "/publish", json={"events": events})).status_code == 422
    assert (await ask(served, "POST", "/publish", json={"topic": "room:atomic", "event": "last"})).status_code == 200
    await client.expect_event("room:atomic", "last", {})


@pytest.mark.parametrize("direct", [True], ids=["direct"])
async def test_bus_that_is_away_is_told_and_the_rest_still_works(serve_relay: ServeRelay, connect: Connect) -> None:
    with Valkey() as valkey:
        served = await serve_relay(redis_url=valkey.url, redis={"timeout_s": 2.0})
        client = await connect(served)
        await client.join("room:1")
        valkey.kill()
        await eventually(lambda: not served.relay.link.live, "the link to be found dead")
        answer = await ask(served, "POST", "/publish", json={"topic": "room:1", "event": "lost"})
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"].startswith("bus unavailable: ")
        assert [entry["topic"] for entry in (await ask(served, "GET", "/topics")).json()] == ["room:1"]
        valkey.start()
        await eventually(lambda: served.relay.link.live, "the link to heal")
        answer = await ask(served, "POST", "/publish", json={"topic": "room:1", "event": "found"})
        assert answer.json() == {"published": 1}


async def test_topics_are_listed_with_their_sockets(served: Served, connect: Connect) -> None:
    assert (await ask(served, "GET", "/topics")).json() == []
    first, second = await connect(served), await connect(served, vsn="1.0.0")
    for client, topic in ((first, "b"), (first, "a:1"), (second, "b")):
        await client.join(topic)
    assert (await ask(served, "GET", "/topics")).json() == [
        {"topic": "a:1", "sockets": 1},
        {"topic": "b", "sockets": 2},
    ]
    assert len((await ask(served, "GET", "/topics/b")).json()["socket_ids"]) == 2


@pytest.mark.parametrize("topic", TOPICS)
async def test_topic_of_any_letters_is_found_and_left(served: Served, connect: Connect, topic: str) -> None:
    client = await connect(served)
    await client.join(topic)
    found = (await ask_for_topic(served, topic)).json()
    assert (found["topic"], found["sockets"]) == (topic, 1)
    (socket_id,) = found["socket_ids"]
    left = await ask_for_topic(served, topic, f"/sockets/{socket_id}", "DELETE")
    assert (left.status_code, left.content) == (204, b"")
    assert (await client.receive())[2:] == [topic, "phx_close", {}]
    assert (await ask_for_topic(served, topic)).status_code == 404


async def test_topic_tells_its_traffic(served: Served, redis: Redis, connect: Connect) -> None:
    client = await connect(served)
    await client.join("room:rates")
    quiet = (await ask(served, "GET", "/topics/room:rates")).json()
    assert (quiet["events"], quiet["events_per_s"]) == (0, 0.0)
    started = served.relay.node.hub._clock()
    for number in range(50):
        await redis.publish("to:room:rates:tick", str(number))
        await client.expect_event("room:rates", "tick", number)

    clock = served.relay.node.hub._clock
    await eventually(lambda: clock() - started > 1, "a second to pass: a rate is of no less")
    found = (await ask(served, "GET", "/topics/room:rates")).json()
    assert found["events"] == 50
    assert 0 < found["events_per_s"] <= 50


async def test_socket_tells_who_and_how(served: Served, connect: Connect, direct: bool) -> None:
    client = await connect(served, vsn="1.0.0", query="token=secret")
    await client.join("room:1")
    await client.join("room:2")
    socket_id = await only_socket(served, "room:1")
    assert (await ask(served, "GET", f"/sockets/{socket_id}")).json() == {
        "id": socket_id,
        "address": "127.0.0.1",
        "version": 1,
        "user": None,
        "path": "direct" if direct else "asgi",
        "topics": ["room:1", "room:2"],
        "outbox_bytes": 0,
        "held_bytes": 0,
        "dropped": 0,
    }


async def test_disconnected_socket_is_closed_with_1001(served: Served, connect: Connect) -> None:
    """1001 and not 1000: phoenix.js comes back."""
    client, other = await connect(served), await connect(served)
    await client.join("room:1")
    await other.join("room:2")
    socket_id = await only_socket(served, "room:1")
    assert (await ask(served, "DELETE", f"/sockets/{socket_id}")).status_code == 204
    assert await client.expect_closed() == (1001, "disconnected by the server")
    assert (await ask(served, "DELETE", f"/sockets/{socket_id}")).status_code == 404
    await other.expect_alive()


async def test_socket_removed_from_a_topic_keeps_its_others(served: Served, redis: Redis, connect: Connect) -> None:
    """``phx_close`` under the subscription's join_ref; phoenix.js then does not rejoin."""
    client = await connect(served)
    join_ref = await client.join("room:1")
    await client.join("room:2")
    socket_id = await only_socket(served, "room:1")
    for _ in range(2):
        wrong = await ask(served, "DELETE", f"/topics/room:3/sockets/{socket_id}")
        assert wrong.json()["detail"] == f"socket '{socket_id}' has not joined 'room:3' here"
    assert (await ask(served, "DELETE", f"/topics/room:1/sockets/{socket_id}")).status_code == 204
    assert await client.receive() == client.message(join_ref, join_ref, "room:1", "phx_close", {})
    assert (await ask(served, "DELETE", f"/topics/room:1/sockets/{socket_id}")).status_code == 404
    await redis.publish("to:room:1:gone", "{}")
    await redis.publish("to:room:2:here", "{}")
    await client.expect_event("room:2", "here", {})


@pytest.mark.parametrize("direct", [True], ids=["direct"])
async def test_key_of_the_settings_is_the_one_that_is_asked_for(serve_relay: ServeRelay) -> None:
    served = await serve_relay(rest={"api_key": "from-the-settings"})
    assert (await ask(served, "GET", "/topics")).status_code == 401
    passed = await ask(served, "GET", "/topics", headers={"authorization": "Bearer from-the-settings"})
    assert passed.json() == []
