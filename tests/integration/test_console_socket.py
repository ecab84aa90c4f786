"""The console's own socket: who gets in, what is told, what can be done; on both paths."""

import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2 as httpx
import pytest
from redis.asyncio import Redis
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from relay.web.console import _LISTED_MAX, _SHOWN_MAX_BYTES, _TAIL_MAX, TOPIC
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.serving import Served, eventually, http_get, metric

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]


class Operator:
    """A client of the console."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._told: list[tuple[str, Any]] = []
        self._refs = iter(range(100, 10_000))

    async def ask(self, event: str, /, **payload: Any) -> Any:
        """The reply's response; the status must be ok."""
        reply = await self.push(event, payload)
        assert reply["status"] == "ok", reply
        return reply["response"]

    async def push(self, event: str, payload: Any) -> Any:
        """The payload of the reply."""
        ref = str(next(self._refs))
        await self.client.send(None, ref, TOPIC, event, payload)
        while True:
            _, came, topic, name, told = await self.client.receive()
            assert topic == TOPIC
            if name == "phx_reply" and came == ref:
                return told
            self._told.append((name, told))

    async def hear(self, event: str) -> Any:
        """The next payload of an event."""
        while True:
            for place, (name, payload) in enumerate(self._told):
                if name == event:
                    del self._told[place]
                    return payload
            _, _, _, name, payload = await self.client.receive()
            self._told.append((name, payload))


def with_key(key: str) -> list[Subprotocol] | None:
    """The subprotocols by which phoenix.js carries its ``authToken``."""
    encoded = base64.b64encode(key.encode()).decode().rstrip("=")
    return [Subprotocol("phoenix"), Subprotocol(f"base64url.bearer.phx.{encoded}")] if key else None


@asynccontextmanager
async def operator(served: Served, join: bool = True, key: str = "") -> AsyncIterator[Operator]:
    url = f"ws://127.0.0.1:{served.port}{served.prefix}/console/socket"
    async with Client.connect(url, subprotocols=with_key(key)) as client:
        if join:
            await client.join(TOPIC)
        yield Operator(client)


async def status_of(served: Served, key: str = "", **headers: str) -> int:
    """How a handshake ends."""
    url = f"ws://127.0.0.1:{served.port}/console/socket/websocket?vsn=2.0.0"
    origin = Origin(headers.pop("origin")) if "origin" in headers else None
    try:
        async with connect_websocket(
            url,
            subprotocols=with_key(key),
            additional_headers=headers,
            origin=origin,
            proxy=None,
        ):
            return 101
    except InvalidStatus as error:
        return error.response.status_code


# Who gets in.


async def test_with_a_key_nobody_gets_in_without_it(serve_relay: ServeRelay) -> None:
    served = await serve_relay(rest={"api_key": "sésame"})
    assert await status_of(served, "sésame") == 101
    assert await status_of(served, "sésame", origin="https://elsewhere.example") == 101
    assert await status_of(served) == 401
    assert await status_of(served, "sesame") == 401
    assert (await http_get(f"{served.http}/console/access"))[0] == 401
    assert served.relay.metrics.refused["handshake: console"] == 2


async def test_wrong_keys_are_counted_and_told_to_the_log_at_each_door(
    serve_relay: ServeRelay, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve_relay(rest={"api_key": "sésame"}, auth={"keys": [SECRET], "tangram": True})
    bad = {"X-API-Key": "a-guess"}
    assert await status_of(served, "a-guess") == 401
    async with httpx.AsyncClient(trust_env=False, base_url=served.http, headers=bad) as api:
        for answer in (await api.get("/console/access"), await api.get("/api/topics"), await api.post("/token")):
            assert answer.status_code == 401
    assert (await http_get(f"{served.http}/api/topics"))[0] == 401
    refused = served.relay.metrics.refused
    assert (refused["handshake: console"], refused["rest: wrong key"], refused["rest: not allowed"]) == (2, 2, 1)
    said = [record.message for record in caplog.records if record.name == "relay.operators"]
    assert said == [f"wrong API key refused ({door}); address 127.0.0.1" for door in ("console", "rest")]


async def test_without_a_key_only_this_machine_gets_in(serve_relay: ServeRelay) -> None:
    """And no page of another origin; nobody at all where those may connect as clients."""
    served = await serve_relay()
    assert await status_of(served) == 101
    assert await status_of(served, origin=f"http://127.0.0.1:{served.port}") == 101
    assert await status_of(served, origin="https://elsewhere.example") == 403
    assert await status_of(served, **{"X-Forwarded-For": "1.2.3.4"}) == 403
    status, body = await http_get(f"{served.http}/console/access")
    assert (status, json.loads(body)) == (200, {"detail": "welcome"})
    opened = await serve_relay(allowed_origins="any")
    assert await status_of(opened) == 403
    assert (await http_get(f"{opened.http}/console/access"))[0] == 403


async def test_console_that_is_turned_off_is_nowhere(serve_relay: ServeRelay) -> None:
    served = await serve_relay(console=False)
    assert await status_of(served) == 404
    for path in ("/console", "/console/access"):
        assert (await http_get(served.http + path))[0] == 404
    assert 'href=""' in (await http_get(served.http + "/"))[1], "the page leads to it nowhere"


async def test_page_of_the_console_holds_no_data_and_lets_nothing_in_from_elsewhere(serve_relay: ServeRelay) -> None:
    served = await serve_relay(rest={"api_key": "k"})
    status, page = await http_get(f"{served.http}/console")
    assert status == 200
    assert "://" not in page
    assert "style=" not in page and "onclick" not in page
    assert "{{" not in page


# What is told.


async def test_metrics_come_at_once_and_then_each_second(served: Served, connect: Connect) -> None:
    client = await connect(served)
    await client.join("room:1")
    async with operator(served) as watching:
        first, second = await watching.hear("metrics"), await watching.hear("metrics")
    assert 0 < second["at_ms"] - first["at_ms"] < 5000 * PATIENCE
    assert first["metrics"]["relay_joins"] == {"": 1}
    assert sum(first["metrics"]["relay_sockets"].values()) == 1, "the console is no client of the relay"
    assert first["link"] == {"live": True, "reason": "", "degraded": ""}
    assert len(first["metrics"]["relay_fan_out_seconds"][""]) == len(first["bounds_s"]) + 2


async def test_last_minutes_come_before_the_metrics_of_now(served: Served, connect: Connect, redis: Redis) -> None:
    """They were kept while nobody looked."""
    console: Any = served.relay._console
    await eventually(lambda: console._series.as_json()["rows"], "the first of them")
    client = await connect(served)
    await client.join("room:1")
    async with operator(served) as watching:
        name, told = (await watching.client.receive())[3:]
        assert name == "series"
        assert told["source"] == (await watching.hear("metrics"))["source"]
    first = dict(zip(told["names"], told["rows"][0], strict=True))
    assert (first["relay_workers"], first["relay_sockets"]) == (1, 0), "before anybody had connected"


async def test_several_workers_are_told_as_one(serve_relay: ServeRelay, connect: Connect, tmp_path: Path) -> None:
    """Two relays on one directory are what two processes are; each lists its own sockets."""
    both = [await serve_relay(metrics={"dir": str(tmp_path)}) for _ in range(2)]
    for served, topics in zip(both, (1, 2), strict=True):
        client = await connect(served)
        for number in range(topics):
            await client.join(f"room:{number}")
        served.relay.exporter.write()
    told = []
    for served in both:
        async with operator(served) as watching:
            told.append(await watching.hear("metrics"))
            assert (await watching.ask("sockets"))["total"] == 1
    for metrics in (one["metrics"] for one in told):
        assert (metrics["relay_workers"], metrics["relay_joins"]) == ({"": 2}, {"": 3})
        assert sum(metrics["relay_sockets"].values()) == 2
    assert told[0]["source"] == told[1]["source"], "their totals are the same"
    assert told[0]["link"]["live"]


async def test_worker_that_hears_nothing_is_told_by_the_others(
    serve_relay: ServeRelay, connect: Connect, tmp_path: Path
) -> None:
    metrics = {"dir": str(tmp_path)}
    with Valkey() as server:
        deaf = await serve_relay(metrics=metrics, redis_url=server.url)
        server.kill()
        await eventually(lambda: not deaf.relay.link.live, "the link to be lost")
        deaf.relay.exporter.write()
        async with operator(await serve_relay(metrics=metrics)) as watching:
            assert (await watching.hear("metrics"))["link"] == {"live": False, "reason": "", "degraded": ""}


async def test_metrics_of_another_process_are_told_apart(serve_relay: ServeRelay) -> None:
    served = await serve_relay()
    async with operator(served) as watching:
        first, second = await watching.hear("metrics"), await watching.hear("metrics")
    assert first["source"] == second["source"] != ""
    assert first["metrics"]["relay_workers"] == {"": 1}


async def test_nothing_is_told_before_the_join_nor_on_another_topic(served: Served) -> None:
    async with operator(served) as watching, operator(served, join=False) as stranger:
        client = stranger.client
        await client.send("1", "1", "room:1", "phx_join", {})
        assert await client.receive() == client.refusal("1", "1", "room:1", "unmatched topic")
        await client.send(None, "2", TOPIC, "topics", {})
        assert await client.receive() == client.refusal(None, "2", TOPIC, "unmatched topic")
        for _ in range(3):
            await watching.hear("metrics")
        await client.expect_alive()


async def test_topics_and_sockets_are_listed_and_searched(served: Served, connect: Connect) -> None:
    one, two = await connect(served), await connect(served)
    for topic in ("room:1", "Room:2"):
        await one.join(topic)
    await two.join("room:1")
    async with operator(served) as watching:
        found = await watching.ask("topics")
        assert [(row["topic"], row["sockets"]) for row in found["topics"]] == [("room:1", 2), ("Room:2", 1)]
        found = await watching.ask("topics", search="m:2")
        assert (found["total"], found["topics"][0]["topic"]) == (1, "Room:2")
        details = await watching.ask("topic", topic="room:1")
        assert (details["sockets"], len(details["joined"])) == (2, 2)
        nobody = await watching.ask("topic", topic="nobody")
        assert (nobody["sockets"], nobody["events_per_s"], nobody["joined"]) == (0, 0, [])
        sockets = await watching.ask("sockets")
        assert sockets["total"] == 2
        assert (await watching.ask("sockets", search="room:2"))["total"] == 1
        assert (await watching.ask("sockets", search="127.0.0.1"))["total"] == 2
        (found,) = (await watching.ask("sockets", search="ROOM:2"))["sockets"]
        moving = {name: found[name] for name in ("idle_s", "open_s")}
        shown = await watching.ask("socket", id=found["id"])
        assert found | {"positions": {}} == shown | moving
        assert 0 <= found["idle_s"] <= found["open_s"] < 60
        assert found["user"] is None
        assert found["topics"] == ["room:1", "Room:2"]


async def test_socket_is_told_with_its_user_and_found_by_it(serve_relay: ServeRelay) -> None:
    served = await serve_relay(auth={"keys": [SECRET]}, rest={"api_key": "k"})
    query = f"token={token('Ada|1', {'room:*': ['join']})}"
    async with Client.connect(served.ws, query=query) as client, operator(served, key="k") as watching:
        await client.join("room:1")
        (found,) = (await watching.ask("sockets", search="ada|"))["sockets"]
        assert found["user"] == "Ada|1"
        assert (await watching.ask("sockets", search="bob"))["total"] == 0
        (joined,) = (await watching.ask("topic", topic="room:1"))["joined"]
        assert joined["user"] == "Ada|1"


async def test_lists_are_cut_where_nobody_could_read_them(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(limits={"topics_per_socket": 1000, "joins_per_s": 1000, "joins_burst": 1000})
    client = await connect(served)
    for number in range(_LISTED_MAX + 5):
        await client.join(f"room:{number}")
    async with operator(served) as watching:
        found = await watching.ask("topics")
        assert (found["total"], len(found["topics"])) == (_LISTED_MAX + 5, _LISTED_MAX)


async def test_events_of_a_watched_topic_are_told_as_they_came(served: Served, redis: Redis) -> None:
    async with operator(served) as watching:
        await watching.ask("watch", topic="room:watched")
        await redis.publish("to:room:watched:e", '{"n": 1.0}')
        await redis.publish("to:room:watched:blob", b"\xff\x00")
        await redis.publish("to:room:watched:long", json.dumps("x" * 2 * _SHOWN_MAX_BYTES))
        events: list[Any] = []
        while len(events) < 3:
            told = await watching.hear("events")
            assert (told["topic"], told["left_out"]) == ("room:watched", 0)
            events += told["events"]
        assert [event["event"] for event in events] == ["e", "blob", "long"]
        assert events[0]["frame"] == '[null,null,"room:watched","e",{"n": 1.0}]'
        assert base64.b64decode(events[1]["base64"]).endswith(b"blob\xff\x00")
        assert len(events[2]["frame"]) == _SHOWN_MAX_BYTES < events[2]["size"]
        await watching.ask("watch", topic="")
        assert "room:watched" not in served.relay.node.hub


async def test_looking_at_a_topic_does_not_join_it(served: Served, connect: Connect) -> None:
    """What is looked at is told as it is: by the console itself, by REST and by the gauge."""
    async with operator(served) as watching:
        await watching.ask("watch", topic="room:1")
        assert (await watching.ask("topics"))["total"] == 0
        assert (served.relay.topics, served.relay.exporter.snapshot()["relay_topics"]) == ({}, {"": 0})
        await (await connect(served)).join("room:1")
        (row,) = (await watching.ask("topics"))["topics"]
        details = await watching.ask("topic", topic="room:1")
        assert row["sockets"] == details["sockets"] == 1


async def test_more_events_than_can_be_read_are_counted_and_left_out(served: Served, redis: Redis) -> None:
    async with operator(served) as watching:
        await watching.ask("watch", topic="room:flood")
        pipeline = redis.pipeline(transaction=False)
        for number in range(3 * _TAIL_MAX):
            _ = pipeline.publish("to:room:flood:e", number)
        await pipeline.execute()
        shown = left_out = 0
        while shown + left_out < 3 * _TAIL_MAX:
            told = await watching.hear("events")
            assert len(told["events"]) <= _TAIL_MAX
            shown, left_out = shown + len(told["events"]), left_out + told["left_out"]
        assert left_out > 0
        assert shown + left_out == 3 * _TAIL_MAX


async def test_watching_ends_with_the_connection(served: Served) -> None:
    async with operator(served) as watching:
        for topic in ("room:1", "room:2"):
            await watching.ask("watch", topic=topic)
        hub = served.relay.node.hub
        assert ("room:1" in hub, "room:2" in hub) == (False, True)
    await eventually(lambda: "room:2" not in hub, "the end of the watch")


async def test_topic_is_watched_on_a_bus_that_must_be_asked_for_it(serve_relay: ServeRelay) -> None:
    served = await serve_relay(broadcast_url="memory://")
    async with operator(served) as watching:
        await watching.ask("watch", topic="room:1")
        await watching.ask("publish", topic="room:1", event="e", payload={"n": 1})
        assert (await watching.hear("events"))["events"][0]["event"] == "e"


# What can be done.


async def test_event_is_published_to_all(served: Served, connect: Connect) -> None:
    client = await connect(served)
    await client.join("room:1")
    async with operator(served) as watching:
        assert await watching.ask("publish", topic="room:1", event="e", payload={"n": 1}) == {}
        await client.expect_event("room:1", "e", {"n": 1})
        await watching.ask("publish", topic="room:1", event="e")
        await client.expect_event("room:1", "e", {})


async def test_socket_is_disconnected(served: Served, connect: Connect) -> None:
    client = await connect(served)
    await client.join("room:1")
    async with operator(served) as watching:
        (socket,) = (await watching.ask("sockets"))["sockets"]
        assert await watching.ask("disconnect", id=socket["id"]) == {}
        assert await client.expect_closed() == (1001, "disconnected by the server")
        gone = {"status": "error", "response": {"reason": f"no socket {socket['id']!r} here"}}
        await eventually(lambda: not served.relay.node.sockets, "its end")
        assert await watching.push("disconnect", {"id": socket["id"]}) == gone
        assert await watching.push("socket", {"id": socket["id"]}) == gone


@pytest.mark.parametrize(
    ("event", "payload", "reason"),
    [
        ("nonsense", {}, "unknown"),
        ("topics", [], "expected an object"),
        ("topics", {"search": 5}, "search: expected text"),
        ("watch", {"topic": "a\nb"}, "no topic: 'a\\nb'"),
        ("watch", {"topic": "phoenix"}, "no topic: 'phoenix'"),
        (
            "publish",
            {"topic": "room:1", "event": "phx_close"},
            "expected a topic of 1 to 255 bytes and an event without colon, not phx_… or chan_reply_…, "
            "got 'room:1', 'phx_close'",
        ),
    ],
)
async def test_what_cannot_be_done_is_said(served: Served, event: str, payload: Any, reason: str) -> None:
    async with operator(served) as watching:
        assert await watching.push(event, payload) == {"status": "error", "response": {"reason": reason}}
        await watching.ask("topics")


@pytest.mark.parametrize("payload", ['{"n": 1e999}', "[" * 300 + "]" * 300, "9" * 5000])
async def test_payload_that_cannot_be_read_is_refused(served: Served, payload: str) -> None:
    async with operator(served) as watching:
        given = f'{{"topic": "room:1", "event": "e", "payload": {payload}}}'
        await watching.client.send_raw(f'[null, "unread", "{TOPIC}", "publish", {given}]')
        while (answer := await watching.client.receive())[1] != "unread":
            pass
        assert answer[4] == {"status": "error", "response": {"reason": "invalid payload"}}
        await watching.ask("topics")


async def test_console_works_while_the_bus_is_away(serve_relay: ServeRelay) -> None:
    """That is when it is needed most."""
    with Valkey() as server:
        served = await serve_relay(redis_url=server.url)
        server.kill()
        await eventually(lambda: not served.relay.link.live, "the link to be lost")
        async with operator(served) as watching:
            told = await watching.hear("metrics")
            assert not told["link"]["live"]
            assert "no subscription" in told["link"]["reason"]
            reply = await watching.push("publish", {"topic": "room:1", "event": "e"})
            assert reply["response"]["reason"].startswith("bus unavailable: ")


async def test_client_that_leaves_is_told_no_more_and_bad_frames_close_it(served: Served) -> None:
    async with operator(served) as watching:
        client = watching.client
        await client.send("9", "9", TOPIC, "phx_leave", {})  # of another join: dropped
        assert await watching.push("phx_leave", {}) == {"status": "ok", "response": {}}
        await client.send_raw("{")
        assert (await client.expect_closed())[0] == 1007
    assert metric((await http_get(f"{served.http}/metrics"))[1], "relay_malformed_total", code="1007") == 1


async def test_console_is_closed_when_the_relay_stops(served: Served) -> None:
    async with operator(served) as watching:
        await watching.ask("topics")
        await served.relay.stop()
        assert (await watching.client.expect_closed())[0] == 1012


# Histories.


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine may answer later than operators are to wait."""
    monkeypatch.setattr("relay.web.console._DESCRIBE_S", 10.0)


HISTORY = [{"match": "room:*", "history": {"size": 100, "ttl_s": 60}, "overflow": "recover"}]


@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_history_of_a_topic_is_shown(serve_relay: ServeRelay, valkey: Valkey, bus: str) -> None:
    topic = f"room:{uuid4().hex}"
    where = {"redis_url": valkey.url} if bus == "redis" else {"broadcast_url": "memory://"}
    served = await serve_relay(topics=HISTORY, **where)
    async with operator(served) as it:
        assert (await it.ask("topic", topic="other"))["history"] is None
        assert (await it.push("history", {"topic": "other"}))["status"] == "error"
        assert await it.ask("history", topic=topic) == {"topic": topic, "events": []}
        for number in range(24):
            await served.relay.publish(topic, "new", {"n": number})
        await served.relay.publish(topic, "raw", b"\xff")
        history = (await it.ask("topic", topic=topic))["history"]
        assert (history["size"], history["ttl_s"], history["events"], history["unavailable"]) == (100, 60, 25, None)
        assert history["bytes"] > 0
        answer = await it.ask("history", topic=topic)
        events = answer["events"]
        assert len(events) == 20
        assert json.loads(events[0]["frame"]) == [None, None, topic, "new", {"n": 5}]
        assert base64.b64decode(events[-1]["base64"]).endswith(b"\xff")
        assert events[-1]["position"] == history["last"]
        assert abs(events[-1]["at_ms"] / 1000 - time.time()) < 60


async def test_history_that_cannot_be_read_is_said_and_the_rest_is_shown(
    serve_relay: ServeRelay, connect: Connect, redis: Redis, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = f"room:{uuid4().hex}"
    await redis.set(f"topic:{topic}", "text")
    served = await serve_relay(topics=HISTORY, redis_url=valkey.url)
    client = await connect(served)
    await client.join(topic)
    async with operator(served) as it:
        shown = await it.ask("topic", topic=topic)
        assert shown["sockets"] == 1
        assert "WRONGTYPE" in shown["history"]["unavailable"]
        reply = await it.push("history", {"topic": topic})
        assert "history unavailable: " in reply["response"]["reason"]
        monkeypatch.setattr("relay.web.console._DESCRIBE_S", 0.05)
        valkey.pause()
        try:
            shown = await it.ask("topic", topic=topic)
        finally:
            valkey.resume()
        assert shown["sockets"] == 1
        assert shown["history"]["unavailable"] == "no answer within 0.05 s"


@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_members_of_a_topic_are_shown(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey, bus: str
) -> None:
    topic = f"room:{uuid4().hex}"
    where = {"redis_url": valkey.url} if bus == "redis" else {"broadcast_url": "memory://"}
    topics = [{"match": "room:*", "presence": True}, {"match": "many:*", "presence": "count"}]
    served = await serve_relay(topics=topics, **where)
    client = await connect(served)
    await client.send("1", "1", topic, "phx_join", {"presence": {"name": "Ada"}})
    await client.send("2", "2", f"many:{topic}", "phx_join", {})
    (key,) = served.relay.node.sockets
    async with operator(served) as it:
        assert (await it.ask("topic", topic="other"))["presence"] is None
        await eventually(lambda: served.relay.metrics.presence_members == 2, "both joins")
        member = {"key": key, "meta": '{"meta":{"name":"Ada"}}'}
        presence = (await it.ask("topic", topic=topic))["presence"]
        assert presence == {"count": 1, "members": [member], "unavailable": None}
        presence = (await it.ask("topic", topic=f"many:{topic}"))["presence"]
        assert presence == {"count": 1, "members": [], "unavailable": None}


async def test_members_that_cannot_be_read_are_said_to_be_so(serve_relay: ServeRelay) -> None:
    with Valkey() as server:
        served = await serve_relay(topics=[{"match": "*", "presence": True}], redis_url=server.url)
        async with operator(served) as it:
            assert (await it.ask("topic", topic="room:1"))["presence"]["count"] == 0
            server.kill()
            presence = (await it.ask("topic", topic="room:1"))["presence"]
            assert (presence["count"], presence["members"]) == (None, [])
            assert presence["unavailable"]


async def test_place_of_a_socket_in_a_history_is_shown(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    topic = f"room:{uuid4().hex}"
    served = await serve_relay(topics=HISTORY, redis_url=valkey.url, limits={"outbox_max_bytes": 2_000_000})
    client = await connect(served)
    await client.join(topic)
    await client.join("other")
    (socket,) = served.relay.node.sockets.values()
    await served.relay.publish(topic, "new", {"n": 1})
    await client.expect_event(topic, "new", {"n": 1})
    async with operator(served) as it:
        positions = (await it.ask("socket", id=socket.id))["positions"]
        assert list(positions) == [topic]
        assert positions[topic]["is_catching_up"] is False
        assert positions[topic]["position"].endswith("-1")
        assert "positions" not in (await it.ask("sockets", search=""))["sockets"][0]
        # A reader that is slow, until it has read.
        channel = socket.subscription(topic)
        assert channel is not None
        for number in range(2, 50):
            await served.relay.publish(topic, "new", {"n": number, "text": "x" * 500_000})
        await eventually(lambda: channel.recovered_to is not None, "the slow reader to fall behind")
        assert (await it.ask("socket", id=socket.id))["positions"][topic]["is_catching_up"] is True
