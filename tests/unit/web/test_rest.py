"""REST in one process and without a server: who is answered, what is refused with which reason, and the schema.

What sockets see of it is in ``tests/integration/test_rest.py``.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from functools import cache
from typing import Any
from urllib.parse import unquote

import httpx2 as httpx
import msgspec
import pytest
import schemathesis
from fastapi import APIRouter, HTTPException
from hypothesis import HealthCheck, given, settings
from schemathesis.config import SchemathesisConfig
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.applications import Starlette
from starlette.routing import Mount

from relay import BusUnavailable, Plugin, Relay
from tests.support.serving import eventually

KEY = "s3cret-kéy"
EVENT = {"topic": "room:1", "event": "new_msg", "payload": {"text": "hi"}}

WRITES = [
    ("POST", "/publish", EVENT),
    ("DELETE", "/sockets/none", None),
    ("DELETE", "/topics/room:1/sockets/none", None),
    ("DELETE", "/sockets?id=none", None),
]
READS = [
    ("GET", "/topics", None),
    ("GET", "/history?topic=room:1", None),
    ("GET", "/presence?topic=room:1", None),
    ("GET", "/topics/room:1", None),
    ("GET", "/sockets/none", None),
]
ROUTES = [*WRITES, *READS]


def make(*plugins: Plugin, **options: Any) -> Relay:
    return Relay(broadcast_url="memory://", system_topic=False, extra_plugins=plugins, **options)


@cache
def plain() -> Relay:
    """One without options, started by each test anew: to make FastAPI's routes takes most of a test's time."""
    return make()


@asynccontextmanager
async def rest(
    *plugins: Plugin, client: str | None = "127.0.0.1", host: str = "localhost", **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a relay's REST app, asked for from ``client`` under the name ``host``."""
    relay = make(*plugins, **options) if plugins or options else plain()
    async with relay.lifespan(), asking(relay, client=client, host=host) as asker:
        yield asker


@asynccontextmanager
async def asking(
    app: Any, *, client: str | None = "127.0.0.1", host: str = "localhost"
) -> AsyncIterator[httpx.AsyncClient]:
    # httpx's own stub has no word for a client without address, which servers on a Unix socket report.
    address: Any = None if client is None else (client, 50000)
    transport = httpx.ASGITransport(app=app, client=address, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}/api") as asker:
        yield asker


def reason(response: httpx.Response, status: int) -> str:
    """The detail of a problem, which must be a whole one (RFC 9457)."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert sorted(problem) == ["detail", "status", "title"]
    assert problem["status"] == status
    assert problem["title"]
    assert isinstance(problem["detail"], str)
    return problem["detail"]


# Who is answered.


@pytest.mark.parametrize(("method", "path", "body"), ROUTES)
async def test_with_a_key_each_route_asks_for_it(method: str, path: str, body: Any) -> None:
    async with rest(rest={"api_key": KEY}, client="192.0.2.1", host="relay.example.org") as ask:
        encoded = KEY.encode()
        for name, value in (
            (b"x-other", encoded),
            (b"authorization", b"Bearer wrong"),
            (b"authorization", b"Bearer"),
            (b"authorization", b"Basic " + encoded),
            (b"authorization", b"Bearer " + encoded + b"x"),
            (b"x-api-key", b"wrong"),
            (b"x-api-key", b""),
            (b"x-api-key", b"\xff"),
        ):
            refused = await ask.request(method, path, json=body, headers=[(name, value)])
            assert reason(refused, 401) == "expected the API key"
            assert refused.headers["www-authenticate"] == "Bearer"
        for name, value in (
            (b"authorization", b"bearer " + encoded),
            (b"authorization", b"Bearer  " + encoded),
            (b"x-api-key", encoded),
        ):
            passed = await ask.request(method, path, json=body, headers=[(name, value)])
            assert passed.status_code in (200, 404)
        both = [(b"authorization", b"Bearer a user's token"), (b"x-api-key", encoded)]
        assert (await ask.request(method, path, json=body, headers=both)).status_code in (200, 404)


async def test_key_is_asked_for_before_the_body_is_read() -> None:
    """Anybody could have the relay read and check whatever they like."""

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    async with rest(rest={"api_key": KEY}) as ask:
        refused = await ask.post("/publish", content=body(), headers={"content-type": "application/json"})
        assert reason(refused, 401) == "expected the API key"


@pytest.mark.parametrize("client", ["192.0.2.1", "10.0.0.1", "2001:db8::1", "testclient", "", None])
async def test_without_a_key_only_this_machine_is_answered(client: str | None) -> None:
    async with rest(client=client) as ask:
        for method, path, body in ROUTES:
            refused = await ask.request(method, path, json=body)
            assert reason(refused, 403).startswith("only clients on this machine are answered"), (method, path)


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1"])
@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"])
async def test_without_a_key_this_machine_is_answered(client: str, host: str) -> None:
    async with rest(client=client, host=host) as ask:
        for method, path, body in ROUTES:
            assert (await ask.request(method, path, json=body)).status_code in (200, 404)


@pytest.mark.parametrize("host", ["relay.example.org", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil"])
async def test_without_a_key_only_names_of_this_machine_are_answered(host: str) -> None:
    """Else a page whose own name points to 127.0.0.1 would be let in (DNS rebinding), and all clients of a proxy."""
    async with rest(host=host) as ask:
        refused = await ask.post("/publish", json=EVENT, headers={"origin": f"http://{host}"})
        assert reason(refused, 403).startswith("only clients on this machine")
        name = host.partition(":")[0]
        assert f"under localhost or another of its own names; got {name!r}" in reason(refused, 403)


@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded", "x-real-ip"])
async def test_without_a_key_nobody_is_answered_through_a_proxy(name: str) -> None:
    async with rest() as ask:
        refused = await ask.get("/topics", headers={name: "for=192.0.2.1"})
        assert reason(refused, 403).startswith("only clients on this machine")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:9999", "http://[", "no url"])
async def test_without_a_key_pages_of_other_origins_are_not_answered(origin: str) -> None:
    """A browser on this machine is on this machine; the page it shows is not."""
    async with rest(host="localhost:8000") as ask:
        refused = await ask.post("/publish", json=EVENT, headers={"origin": origin})
        assert reason(refused, 403).startswith("pages of other origins")
        passed = await ask.post("/publish", json=EVENT, headers={"origin": "http://localhost:8000"})
        assert passed.status_code == 200


async def test_with_a_key_the_origin_does_not_matter() -> None:
    async with rest(rest={"api_key": "k"}) as ask:
        headers = {"x-api-key": "k", "origin": "https://elsewhere.example"}
        assert (await ask.post("/publish", json=EVENT, headers=headers)).json() == {"published": 1}


# What is refused.


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "body.Event.topic: Field required; body.Event.event: Field required"),
        ({"topic": "room:1"}, "body.Event.event: Field required"),
        ({**EVENT, "extra": 1}, "body.Event.extra: Extra inputs are not permitted"),
        ({**EVENT, "topic": 5}, "body.Event.topic: Input should be a valid string"),
        ({**EVENT, "topic": ""}, "body.Event.topic: String should have at least 1 character"),
        ({**EVENT, "topic": "phoenix"}, "topic 'phoenix' or event 'new_msg' cannot be"),
        ({**EVENT, "topic": "é" * 128}, f"topic '{'é' * 128}' or event 'new_msg' cannot be"),
        ({**EVENT, "event": "a:b"}, "body.Event.event: String should match pattern"),
        ({**EVENT, "event": "phx_close"}, "topic 'room:1' or event 'phx_close' cannot be"),
        ({"events": []}, "body.Events.events: List should have at least 1 item"),
        ({"events": [EVENT] * 1001}, "body.Events.events: List should have at most 1000 items"),
        ({"events": [EVENT, {"topic": "a"}]}, "body.Events.events.1.event: Field required"),
        ([EVENT], "body.Event: Input should be a valid dictionary"),
        (None, "body"),
    ],
)
async def test_request_that_makes_no_sense_is_refused_with_where_and_why(body: Any, said: str) -> None:
    async with rest() as ask:
        # Not `json=`, for which None is no body at all.
        refused = await ask.post("/publish", content=_json(body), headers={"content-type": "application/json"})
        assert reason(refused, 422).startswith(said)


def _json(value: Any) -> bytes:
    return httpx.Request("POST", "http://localhost", json=value).content if value is not None else b"null"


@pytest.mark.parametrize("payload", ['"\\ud800"', "NaN", "-Infinity", "1e999", '{"\\udfff": 1}'])
async def test_payload_that_json_cannot_say_is_refused(payload: str) -> None:
    """Python's parser takes them for JSON; no client does."""
    async with rest() as ask:
        body = f'{{"topic": "room:1", "event": "new_msg", "payload": {payload}}}'
        refused = await ask.post("/publish", content=body, headers={"content-type": "application/json"})
        assert reason(refused, 422) == "payload of 'new_msg': holds what JSON cannot say, in UTF-8"


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000])
async def test_body_that_cannot_be_read_is_refused(content: bytes) -> None:
    async with rest() as ask:
        refused = await ask.post("/publish", content=content, headers={"content-type": "application/json"})
        assert reason(refused, 400) == "There was an error parsing the body"


async def test_body_that_is_no_json_is_refused() -> None:
    async with rest() as ask:
        refused = await ask.post("/publish", content=b"{no", headers={"content-type": "application/json"})
        assert reason(refused, 422).startswith("body.1: JSON decode error")


async def test_body_of_another_type_is_refused_with_a_hint() -> None:
    """It is what ``curl -d`` sends without ``-H``, and what a form on any page may send."""
    async with rest() as ask:
        content = b'{"topic": "room:1", "event": "new_msg"}'
        refused = await ask.post(
            "/publish", content=content, headers={"content-type": "application/x-www-form-urlencoded"}
        )
        expected = "; expected content-type application/json, got application/x-www-form-urlencoded"
        assert reason(refused, 422).endswith(expected)


async def test_payload_larger_than_any_relay_delivers_is_refused() -> None:
    async with rest(limits={"payload_max_bytes": 10}) as ask:
        assert (await ask.post("/publish", json={**EVENT, "payload": "12345678"})).status_code == 200
        refused = await ask.post("/publish", json={**EVENT, "payload": "éééé+"})
        assert reason(refused, 413) == "payload of 'new_msg': 11 bytes; expected at most 10"


class Bus:
    """Stands in for `Node.publish`: notes what is published, and answers when it is told to."""

    def __init__(self) -> None:
        self.published: list[tuple[str, str, bytes]] = []
        self.answers: list[asyncio.Future[None]] = []

    def publish(self, topic: str, event: str, payload: msgspec.Raw) -> asyncio.Future[None]:
        self.published.append((topic, event, bytes(payload)))
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]

    @classmethod
    @asynccontextmanager
    async def behind_rest(cls, **settings: Any) -> AsyncIterator[tuple["Bus", httpx.AsyncClient]]:
        bus, relay = cls(), make(**settings) if settings else plain()
        async with relay.lifespan(), asking(relay) as ask:
            relay.node.publish = bus.publish  # type: ignore[method-assign, assignment]
            yield bus, ask

    async def answer(self, asking: asyncio.Task[httpx.Response], *faults: str) -> httpx.Response:
        """Wait for as many events as ``faults``, all of them started, and answer each: "" is taken."""
        await eventually(lambda: len(self.answers) == len(faults) or asking.done(), "the events to be started")
        for answer, fault in zip(self.answers, faults, strict=True):
            if fault:
                answer.set_exception(BusUnavailable(fault))
            else:
                answer.set_result(None)
        return await asking


BATCH = [{"topic": "t", "event": f"e{number}", "payload": number} for number in range(5)]


async def test_batch_is_published_as_a_whole_or_not_at_all() -> None:
    async with Bus.behind_rest() as (bus, ask):
        for wrong in ({"event": "é" * 128}, {"topic": "phoenix"}, {"event": "phx_join"}):
            _ = reason(await ask.post("/publish", json={"events": [*BATCH, {**EVENT, **wrong}]}), 422)
        assert bus.published == []


async def test_all_events_of_a_batch_are_published_before_the_bus_has_answered_for_the_first() -> None:
    async with Bus.behind_rest() as (bus, ask):
        asking = asyncio.create_task(ask.post("/publish", json={"events": BATCH}))
        answer = await bus.answer(asking, *[""] * 5)
        assert (answer.status_code, answer.json()) == (200, {"published": 5})
        assert bus.published == [("t", f"e{number}", b"%d" % number) for number in range(5)]


async def test_batch_that_the_bus_has_not_taken_in_full_is_answered_with_the_number_that_it_has() -> None:
    """Every answer is waited for: an exception that nobody retrieves is a warning, which fails this test."""
    async with Bus.behind_rest() as (bus, ask):
        asking = asyncio.create_task(ask.post("/publish", json={"events": BATCH}))
        answer = await bus.answer(asking, "", "no permission", "", "connection lost", "connection lost")
        assert reason(answer, 503) == "bus unavailable: no permission; it has confirmed 2 of 5 events"


@pytest.mark.parametrize("setting", ["publish_queue_max", "publish_queue_max_bytes"])
async def test_batch_larger_than_the_queue_to_the_bus_is_refused_as_a_whole(setting: str) -> None:
    async with Bus.behind_rest(redis={setting: 4}) as (bus, ask):
        said = reason(await ask.post("/publish", json={"events": BATCH}), 413)
        assert said.startswith("events: 5 events of 5 bytes; expected at most ")
        assert f"4 (redis.{setting})" in said
        assert bus.published == []


async def test_payload_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its size and for the bus together."""
    payloads = [{"number": number} for number in range(3)]
    encoded: list[object] = []

    def observe(encode: Callable[..., Any]) -> Callable[..., Any]:
        def observed(value: object, **options: Any) -> Any:
            if value in payloads:
                encoded.append(value)
            return encode(value, **options)

        return observed

    async with rest() as ask:
        body = json.dumps({"events": [{**EVENT, "payload": payload} for payload in payloads]})
        with monkeypatch.context() as patch:
            patch.setattr(json, "dumps", observe(json.dumps))
            patch.setattr(msgspec.json, "encode", observe(msgspec.json.encode))
            answer = await ask.post("/publish", content=body, headers={"content-type": "application/json"})
        assert answer.json() == {"published": 3}
    assert encoded == payloads


async def test_payload_left_out_is_an_empty_object() -> None:
    async with Bus.behind_rest() as (bus, ask):
        events = [{"topic": "t", "event": "e"}, {"topic": "t", "event": "e", "payload": None}]
        asking = asyncio.create_task(ask.post("/publish", json={"events": events}))
        assert (await bus.answer(asking, "", "")).status_code == 200
        assert [payload for _, _, payload in bus.published] == [b"{}", b"null"]


async def test_bus_that_is_away_is_told_with_503() -> None:
    async with Bus.behind_rest() as (bus, ask):
        asking = asyncio.create_task(ask.post("/publish", json=EVENT))
        answer = await bus.answer(asking, "connection refused")
        assert reason(answer, 503) == "bus unavailable: connection refused"


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("GET", "/topics/room:1", "no socket has joined 'room:1' in this process"),
        ("GET", "/topics/a%2Fb%20c%25/%C3%BC", "no socket has joined 'a/b c%/ü' in this process"),
        ("GET", "/sockets/none", "no socket 'none' here"),
        ("DELETE", "/sockets/none", "no socket 'none' here"),
        ("DELETE", "/topics/a/sockets/b/sockets/none", "socket 'none' has not joined 'a/sockets/b' here"),
        ("GET", "/nowhere", "Not Found"),
        ("GET", "/topics/a%0Ab", "Not Found"),
        ("GET", "/topics/a%0A", "no socket has joined 'a' in this process"),
    ],
)
async def test_what_is_not_there_is_told_with_404(method: str, path: str, said: str) -> None:
    async with rest() as ask:
        assert reason(await ask.request(method, path), 404) == said


@pytest.mark.parametrize(("method", "path"), [("PUT", "/topics"), ("GET", "/publish"), ("PATCH", "/sockets/none")])
async def test_method_that_is_not_there_is_told_with_405(method: str, path: str) -> None:
    async with rest() as ask:
        refused = await ask.request(method, path)
        assert reason(refused, 405) == "Method Not Allowed"
        assert refused.headers["allow"]


# Plugins' routes.


def _plugin() -> Plugin:
    plugin, router = Plugin("example"), APIRouter(prefix="/example", tags=["example"])

    @router.get("/{what}")
    async def get(what: str) -> dict[str, str]:
        if what == "odd":
            raise HTTPException(499, "odd")
        if what == "broken":
            raise RuntimeError("the database's password is hunter2")
        return {"example": what}

    plugin.include_router(router)
    return plugin


async def test_routes_of_plugins_are_open_to_all_and_in_the_schema() -> None:
    """A plugin's author decides who is answered; `docs/rest.md` says so."""
    async with rest(_plugin(), rest={"api_key": KEY}, client="192.0.2.1") as ask:
        assert (await ask.get("/example/1")).json() == {"example": "1"}
        assert "/example/{what}" in (await ask.get("/openapi.json")).json()["paths"]


async def test_errors_of_plugins_are_problems_too_and_tell_nothing() -> None:
    async with rest(_plugin()) as ask:
        assert reason(await ask.get("/example/odd"), 499) == "odd"
        assert reason(await ask.get("/example/broken"), 500) == "internal error"


# Names with slashes.

SPLITS = [
    ("/topics/room/users/x%2Fusers%2Fvictim", ("kick", "x/users/victim", "room")),
    ("/topics/room/users/x%2Fsockets%2F1", ("kick", "x/sockets/1", "room")),
    ("/topics/room%2Fusers%2Fx/users/ada", ("kick", "ada", "room/users/x")),
    ("/topics/a/b/users/ada", ("kick", "ada", "a/b")),
    ("/topics/a/users/b/users/c", ("kick", "c", "a/users/b")),
    ("/topics/room:1/users/a/b", ("kick", "a/b", "room:1")),
    ("/topics/room/users/%2525%20z%C3%BCrich%3F", ("kick", "%25 zürich?", "room")),
    ("/users/x%2Fusers%2Fvictim", ("disconnect", "x/users/victim", "")),
    ("/users/%2525", ("disconnect", "%25", "")),
    ("/users?user=x%2Fusers%2Fvictim", ("disconnect", "x/users/victim", "")),
    ("/users?user=x/y&topic=a/users/b%25", ("kick", "x/y", "a/users/b%")),
]


@asynccontextmanager
async def ordered(
    *, gives_raw_path: bool = True, prefix: str = ""
) -> AsyncIterator[tuple[httpx.AsyncClient, list[tuple[str, ...]]]]:
    """A client of a relay, and the control messages about users that it sends."""
    relay = plain()
    orders: list[tuple[str, ...]] = []
    async with relay.lifespan():
        node = relay.node
        order = node.send_control

        def noted(do: Any, user: str, topic: str = "", reason: str = "") -> Any:
            orders.append((do, user, topic))
            return order(do, user, topic, reason)

        node.send_control = noted  # type: ignore[method-assign]

        outer = Starlette(routes=[Mount(unquote(prefix) or "/", relay)])

        async def app(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
            await outer(scope if gives_raw_path else {**scope, "raw_path": None}, receive, send)

        async with asking(app) as ask:
            ask.base_url = httpx.URL(f"http://localhost{prefix}/api")
            yield ask, orders


@pytest.mark.parametrize(("path", "order"), SPLITS)
async def test_path_is_split_before_it_is_decoded(path: str, order: tuple[str, ...]) -> None:
    """A user chooses their name; it must not be one that sends another away."""
    async with ordered() as (ask, orders):
        assert (await ask.delete(path)).status_code == 204
        assert orders == [order]


@pytest.mark.parametrize("path", ["/topics//users/ada", "/topics/phoenix/users/ada", "/users?user=ada&topic=relay"])
async def test_user_is_taken_out_of_a_topic_that_can_be_alone(path: str) -> None:
    """An empty variable in the path would disconnect the user."""
    async with ordered() as (ask, orders):
        answer = await ask.delete(path)
        assert (answer.status_code, orders) == (422, [])
        assert answer.json()["detail"].startswith("topic: expected")


@pytest.mark.parametrize("prefix", ["/relay", "/re%20lay"])
async def test_path_is_split_behind_a_mount_too(prefix: str) -> None:
    async with ordered(prefix=prefix) as (ask, orders):
        for path, order in SPLITS:
            assert (await ask.delete(path)).status_code == 204, path
            assert orders.pop() == order


async def test_path_that_can_be_read_in_two_ways_is_refused_where_the_server_has_decoded_it() -> None:
    async with ordered(gives_raw_path=False) as (ask, orders):
        for path in ("/topics/room/users/x%2Fusers%2Fvictim", "/topics/room/users/x%2Fsockets%2F1"):
            assert "DELETE /users" in reason(await ask.delete(path), 422)
        assert orders == []
        for path, order in (*SPLITS[3:4], *SPLITS[5:]):
            assert (await ask.delete(path)).status_code == 204, path
            assert orders.pop() == order


@pytest.mark.parametrize("query", ["", "user=", "topic=a", "user=a&topic=", "user=a&topics=b", "id=1"])
async def test_request_with_a_misspelt_query_does_nothing(query: str) -> None:
    """To leave its topic out would say more than was meant."""
    async with ordered() as (ask, orders):
        assert (await ask.delete(f"/users?{query}")).status_code == 422
        assert orders == []


@pytest.mark.parametrize("path", ["users/alice", "users/a%2Fb", "sockets/1"])
async def test_topic_in_the_query_of_a_request_by_path_is_refused(path: str) -> None:
    """Without it the order would be about all of the user's sockets, or about the whole socket."""
    async with ordered() as (ask, orders):
        assert "topic" in reason(await ask.delete(f"/{path}?topic=room:1"), 422)
        assert orders == []


async def test_socket_is_named_in_the_query_too() -> None:
    async with ordered() as (ask, _):
        assert reason(await ask.delete("/sockets?id=none"), 404) == "no socket 'none' here"
        said = reason(await ask.delete("/sockets?id=none&topic=a/sockets/b"), 404)
        assert said == "socket 'none' has not joined 'a/sockets/b' here"
        assert (await ask.delete("/sockets?topic=a")).status_code == 422


# Where it is.


async def test_path_is_a_setting() -> None:
    async with rest(rest={"path": "/manage/v1/"}) as ask:
        ask.base_url = httpx.URL("http://localhost")
        assert (await ask.get("/manage/v1/topics")).json() == []
        assert (await ask.get("/api/topics")).status_code == 404


async def test_empty_path_turns_it_off() -> None:
    async with rest(rest={"path": ""}) as ask:
        ask.base_url = httpx.URL("http://localhost")
        for path in ("/api/topics", "/topics", "/api/docs", "/docs", "/openapi.json", "/publish"):
            assert (await ask.get(path)).status_code == 404
        assert (await ask.get("/health")).status_code == 200


@pytest.mark.parametrize("prefix", ["", "/relay", "/deep/down/relay"])
async def test_docs_and_schema_work_under_a_prefix(prefix: str) -> None:
    """The page names the schema by its whole path, and the schema the server that "Try it out" asks."""
    relay = Relay(broadcast_url="memory://", system_topic=False)
    app = Starlette()
    app.mount(prefix or "/", relay)
    async with relay.lifespan(), asking(app) as ask:
        ask.base_url = httpx.URL("http://localhost")
        page = await ask.get(f"{prefix}/api/docs")
        assert page.status_code == 200
        assert f"'{prefix}/api/openapi.json'" in page.text
        assert not re.search(r'(?:src|href)=["\'](?:https?:)?//', page.text), "nothing is loaded from elsewhere"
        assert "script-src 'self'" in page.headers["content-security-policy"]
        for asset in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            assert (await ask.get(str(page.url.join(asset)))).status_code == 200, asset
        assert (await ask.get(f"{prefix}/api/redoc")).headers["location"] == "docs"
        schema = (await ask.get(f"{prefix}/api/openapi.json")).json()
        (server,) = schema["servers"]
        assert server["url"] == f"{prefix}/api"
        assert (await ask.get(server["url"] + "/topics")).json() == []
        assert sorted(schema["paths"]) == [
            "/history",
            "/presence",
            "/publish",
            "/sockets",
            "/sockets/{socket_id}",
            "/topics",
            "/topics/{topic}",
            "/topics/{topic}/sockets/{socket_id}",
            "/topics/{topic}/users/{user}",
            "/users",
            "/users/{user}",
        ]


async def test_schema_asks_for_the_key_where_there_is_one() -> None:
    """Swagger shows its button "Authorize" for these."""
    async with rest(rest={"api_key": KEY}) as ask:
        schema = (await ask.get("/openapi.json")).json()
        assert schema["paths"]["/topics"]["get"]["security"] == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
        assert KEY not in str(schema)
    async with rest() as ask:
        assert "security" not in (await ask.get("/openapi.json")).json()["paths"]["/topics"]["get"]


# The schema holds.


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: str(mode.value))
def test_schema_holds_for_whatever_is_asked(mode: GenerationMode) -> None:
    """Schemathesis: no 5xx, and each answer has a status, a content type and a body as the schema says."""
    relay = make(rest={"api_key": "k"})
    keys = {"APIKeyHeader": {"api_key": "k"}}
    config = SchemathesisConfig.from_dict({"auth": {"openapi": keys}})
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", relay, config=config)
    asked = 0
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result

        @given(result.ok().as_strategy(generation_mode=mode))
        @settings(
            max_examples=max(5, settings().max_examples // 4),
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: Any) -> None:
            nonlocal asked
            asked += 1
            # A schema cannot count bytes, which is how long a name may be.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        ask()
    assert asked > 50, "it has asked for next to nothing"
    relay.components.telemetry.loggers.flush(at_once=True)  # or the process writes them at its end
