"""``GET /api/history``, and what ``GET /api/topics/{topic}`` says of a history; in Redis and in memory."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import quote, urlencode
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from starlette.testclient import TestClient

from relay import Event, Plugin, Relay
from tests.integration.test_history import join
from tests.support.process import Valkey
from tests.support.serving import Served, http_get

Connect = Callable[..., Any]
ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

HISTORY = [{"match": "room:*", "history": {"size": 5, "ttl_s": 60}}]
LIMITS = {"recover_max_events": 5, "recover_max_bytes": 1000}


@pytest.fixture
def direct() -> bool:
    """HTTP has one way to be written."""
    return True


@pytest.fixture(params=["redis", "memory"])
def served(request: pytest.FixtureRequest, runner: asyncio.Runner, serve_relay: ServeRelay, valkey: Valkey) -> Served:
    bus = {"redis_url": valkey.url} if request.param == "redis" else {"broadcast_url": "memory://"}
    return runner.run(serve_relay(topics=HISTORY, limits=LIMITS, **bus))


@pytest.fixture
def topic() -> str:
    return f"room:{uuid4().hex}"


async def read(served: Served, topic: str, **query: object) -> Any:
    status, body = await http_get(f"{served.http}/api/history?{urlencode({'topic': topic, **query})}")
    assert status == 200, body
    return json.loads(body)


async def refusal(served: Served, status: int, **query: object) -> str:
    found, body = await http_get(f"{served.http}/api/history?{urlencode(query)}")
    assert found == status, body
    return str(json.loads(body)["detail"])


def payloads(answer: Any) -> list[Any]:
    return [event["payload"] for event in answer["events"]]


async def test_newest_events_come_oldest_first(served: Served, topic: str) -> None:
    for number in range(3):
        await served.relay.publish(topic, f"event{number}", {"n": number})
    answer = await read(served, topic)
    assert {name: answer[name] for name in ("topic", "more", "recovered", "reason")} == {
        "topic": topic,
        "more": False,
        "recovered": None,
        "reason": None,
    }
    assert [list(event) for event in answer["events"]] == [["event", "payload", "position"]] * 3
    assert [event["event"] for event in answer["events"]] == ["event0", "event1", "event2"]
    assert payloads(answer) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert answer["position"] == answer["events"][-1]["position"]
    assert payloads(await read(served, topic, limit=2)) == [{"n": 1}, {"n": 2}]


async def test_events_behind_a_position_are_read_page_by_page(served: Served, topic: str) -> None:
    start = (await read(served, topic))["position"]
    assert (await read(served, topic, since=start))["recovered"] is True
    for number in range(4):
        await served.relay.publish(topic, "new", number)
    first = await read(served, topic, since=start, limit=2)
    assert (payloads(first), first["recovered"], first["more"]) == ([0, 1], True, True)
    second = await read(served, topic, since=first["position"], limit=3)
    assert (payloads(second), second["recovered"], second["more"]) == ([2, 3], True, False)
    last = await read(served, topic, since=second["position"])
    assert (last["events"], last["recovered"], last["position"]) == ([], True, second["position"])
    exactly = await read(served, topic, since=first["position"], limit=2)
    assert (payloads(exactly), exactly["more"]) == ([2, 3], False)


async def test_events_that_are_gone_are_said(served: Served, topic: str) -> None:
    since = (await read(served, topic))["position"]
    for number in range(10):
        await served.relay.publish(topic, "new", number)
    answer = await read(served, topic, since=since)
    assert (answer["events"], answer["recovered"], answer["reason"]) == ([], False, "history expired")
    assert answer["position"] == (await read(served, topic))["position"]
    for other in ("9999999999999-1", "1-99"):
        answer = await read(served, topic, since=other)
        assert (answer["events"], answer["recovered"], answer["reason"]) == ([], False, "unknown position")


async def test_bytes_of_an_answer_are_bounded(served: Served, topic: str) -> None:
    start = (await read(served, topic))["position"]
    for number in range(3):
        await served.relay.publish(topic, "new", str(number) * 498)
    first = await read(served, topic, since=start)
    assert (len(first["events"]), first["more"]) == (2, True)
    second = await read(served, topic, since=first["position"])
    assert (payloads(second), second["more"]) == (["2" * 498], False)
    assert len((await read(served, topic))["events"]) == 2, "the newest"
    await served.relay.publish(topic, "new", "x" * 5000)
    large = await read(served, topic, since=second["position"])
    assert payloads(large) == ["x" * 5000], "one event at least, or reading would not go on"


async def test_payloads_are_verbatim(served: Served, topic: str) -> None:
    await served.relay.publish(topic, "new", {"n": 9007199254740993, "e": [], "x": 1.0})
    await served.relay.publish(topic, "new", b"\xff\x00")
    await served.relay.publish(topic, "new", b"")
    _, body = await http_get(f"{served.http}/api/history?topic={topic}")
    assert '"payload":{"n":9007199254740993,"e":[],"x":1.0}' in body
    assert payloads(json.loads(body))[1:] == [{"base64": "/wA="}, {"base64": ""}]


async def test_bad_requests_are_clear(served: Served, topic: str) -> None:
    assert "topic 'other:1' has no history; set history" in await refusal(served, 404, topic="other:1")
    assert "expected a position such as" in await refusal(served, 422, topic=topic, since="nonsense")
    assert "query.limit" in await refusal(served, 422, topic=topic, limit=0)
    assert "query.limit" in await refusal(served, 422, topic=topic, limit="x")
    assert "at most 5 (limits.recover_max_events), got 6" in await refusal(served, 422, topic=topic, limit=6)
    assert "query.topic" in await refusal(served, 422)
    assert "'phoenix' cannot be" in await refusal(served, 422, topic="phoenix")


async def test_topic_says_what_its_history_holds(served: Served, connect: Connect, topic: str) -> None:
    url = f"{served.http}/api/topics/{quote(topic)}"
    status, body = await http_get(url)
    assert (status, json.loads(body)["detail"].endswith("and its history is empty")) == (404, True)
    client = await connect(served)
    start = (await join(client, topic, since=None))["_position"]
    details = json.loads((await http_get(url))[1])
    assert details["sockets"] == 1
    assert details["history"]["events"] == 0
    for number in range(7):
        await served.relay.publish(topic, "new", number)
    stored = (await read(served, topic))["events"]
    history = json.loads((await http_get(url))[1])["history"]
    assert history.pop("bytes") > 0
    assert history == {
        "size": 5,
        "ttl_s": 60,
        "events": 5,
        "first": stored[0]["position"],
        "last": stored[-1]["position"],
        "unavailable": None,
    }
    assert start not in history.values()
    await client.connection.close()
    assert (await http_get(url))[0] == 200, "a history outlives the topic's sockets"
    await join(await connect(served), "other:1")
    assert json.loads((await http_get(f"{served.http}/api/topics/other:1"))[1])["history"] is None


async def test_history_that_cannot_be_read(
    serve_relay: ServeRelay, connect: Connect, topic: str, redis: Redis, valkey: Valkey
) -> None:
    served = await serve_relay(topics=HISTORY, redis_url=valkey.url)
    await redis.set(f"topic:{topic}", "text")
    assert "history unavailable: EVALSHA" in await refusal(served, 503, topic=topic)
    assert "WRONGTYPE" in await refusal(served, 503, topic=topic, since="1-1")
    client = await connect(served)
    await join(client, topic)
    details = json.loads((await http_get(f"{served.http}/api/topics/{topic}"))[1])
    assert details["sockets"] == 1
    assert details["history"]["events"] is None
    assert "WRONGTYPE" in details["history"]["unavailable"]


async def test_stored_events_are_those_before_the_handlers(serve_relay: ServeRelay, topic: str) -> None:
    plugin = Plugin("censor")

    @plugin.on_event("*")
    def drop(event: Event) -> None:
        return None

    served = await serve_relay(topics=HISTORY, broadcast_url="memory://", extra_plugins=(plugin,))
    await served.relay.publish(topic, "new", 1)
    assert payloads(await read(served, topic)) == [1]


async def test_lost_events_and_emptied_streams(
    serve_relay: ServeRelay, topic: str, redis: Redis, valkey: Valkey
) -> None:
    """As after a failover, and as after XTRIM."""
    served = await serve_relay(topics=HISTORY, redis_url=valkey.url)
    for number in range(3):
        await served.relay.publish(topic, "new", number)
    first, _, last = [event["position"] for event in (await read(served, topic))["events"]]
    await redis.xadd(f"topic:{topic}", {"m": last, "z": "0"}, id=f"{last.partition('-')[0]}-4")
    answer = await read(served, topic, since=first)
    assert (answer["events"], answer["recovered"], answer["reason"]) == ([], False, "history forked")
    assert (await read(served, topic))["events"] == [], "what is before the mark may be of another history"
    await redis.xtrim(f"topic:{topic}", maxlen=0, approximate=False)
    newest = (await read(served, topic))["position"]
    answer = await read(served, topic, since=newest)
    assert (answer["events"], answer["recovered"], answer["position"]) == ([], True, newest)


def test_history_is_read_from_another_event_loop() -> None:
    """As an app does that is tested without `with`: each request has a loop of its own."""
    relay = Relay(broadcast_url="memory://", topics=HISTORY, system_topic=False)
    with TestClient(relay, base_url="http://localhost") as client:
        for number in range(2):
            event = {"topic": "room:1", "event": "new", "payload": number}
            assert client.post("/api/publish", json=event).status_code == 200
        other = TestClient(relay, base_url="http://localhost")
        assert payloads(other.get("/api/history", params={"topic": "room:1"}).json()) == [0, 1]
        assert other.get("/api/topics/room:1").json()["history"]["events"] == 2
