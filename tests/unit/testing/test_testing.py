"""`relay.testing`: clients in the test's own process, in event loops and without, and the pytest plugin's fixtures."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI, Response
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from relay import Join, Plugin, Push, RedisMessage, Relay, UpgradeRequest, pytest_plugin
from relay.errors import RelayError
from relay.testing import (
    BlockingSocket,
    Connecting,
    ConnectionRefused,
    Refused,
    connect,
    in_memory,
    send_redis_message,
)

NOWHERE = "redis://127.0.0.1:1"
SECRET = "0123456789abcdef0123456789abcdef"


def make_plugin() -> Plugin:
    plugin = Plugin("test")

    @plugin.on_join("room:*")
    def greet(join: Join) -> dict[str, Any]:
        if join.topic == "room:closed":
            raise Refused("closed", until="Monday")
        return {"user": join.user}

    @plugin.on_push("room:*", "say")
    async def say(push: Push) -> dict[str, int]:
        await push.broadcast("said", push.payload)
        return {"length": len(push.payload)}

    @plugin.on_redis("planes*")
    async def inject(message: RedisMessage, relay: Relay) -> None:
        await relay.publish("room:1", "plane", {"channel": message.channel, "data": message.data.decode()})

    return plugin


def make(**settings: Any) -> tuple[FastAPI, Relay]:
    """An application with a relay on a Redis that is not there."""
    common = {"redis_url": NOWHERE, "system_topic": False, "rest": {"path": ""}, "extra_plugins": (make_plugin(),)}
    relay = Relay(**{**common, **settings})
    app = FastAPI()
    relay.install(app, "/live")

    @app.post("/orders")
    def order(name: str) -> None:
        _ = relay.publish("room:1", "order", {"name": name, "paid": False})

    return app, relay


# In event loops.


async def test_client_joins_pushes_and_receives_without_redis() -> None:
    app, relay = make()
    async with connect(app) as alice, connect(relay) as bob:
        room = await alice.join("room:1")
        assert room.response == {"user": None}
        other = await bob.join("room:1")
        assert await room.push("say", {"text": "hi"}) == {"length": 1}
        assert await room.expect("said", text="hi") == {"text": "hi"}
        assert await other.expect("said", {"text": "hi"}) == {"text": "hi"}
        assert await room.push("say", b"\xff\x00") == {"length": 2}
        assert await room.expect("said") == b"\xff\x00"
        await other.expect("said", b"\xff\x00")
        await other.expect_nothing(within_s=0.01)
        await other.leave()
        assert relay.topics == {"room:1": 1}
    assert not relay.is_running
    assert relay.config.redis_url == NOWHERE


async def test_events_wait_until_they_are_expected() -> None:
    app, relay = make()
    async with connect(app) as socket:
        room = await socket.join("room:1")
        for name in ("first", "second"):
            await relay.publish("room:1", "order", {"name": name})
        await relay.publish("room:1", "other", [1])
        await room.expect("other", [1])
        assert room.received == [("order", {"name": "first"}), ("order", {"name": "second"})]
        await room.expect_nothing("order", name="third", within_s=0.01)
        await room.expect("order", name="second")
        await room.expect("order", name="first")


async def test_failures_say_what_came_instead() -> None:
    app, relay = make()
    async with connect(app) as socket:
        room = await socket.join("room:1")
        text = "expected event 'order' with name='cheese' on topic 'room:1' within 0.01 s, got nothing"
        with pytest.raises(AssertionError, match=re.escape(text)):
            await room.expect("order", name="cheese", within_s=0.01)
        await relay.publish("room:1", "order", {"name": "bread"})
        with pytest.raises(AssertionError, match=r"got order \{'name': 'bread'\}"):
            await room.expect("order", name="cheese", within_s=0.05)
        with pytest.raises(AssertionError, match=r"expected no event on topic 'room:1', got order \{'name': 'bread'\}"):
            await room.expect_nothing()
        with pytest.raises(AssertionError, match="expected no event 'order' with name='bread'"):
            await room.expect_nothing("order", name="bread")


async def test_refusals_are_raised_with_their_reasons() -> None:
    app, _ = make(topics=[{"match": "room:2", "push": False}])
    async with connect(app) as socket:
        with pytest.raises(Refused, match="^closed$") as refused:
            await socket.join("room:closed")
        assert bytes(refused.value.response) == b'{"reason":"closed","until":"Monday"}'
        room = await socket.join("room:2")
        with pytest.raises(Refused, match="push not allowed"):
            await room.push("typing")


async def test_ends_are_expected_like_events() -> None:
    app, relay = make()
    async with connect(app) as socket:
        room = await socket.join("room:1")
        relay.node.pubsub.on_gap("test")
        await room.expect("phx_error", reason="events may have been missed")
        room = await socket.join("room:1")
        (found,) = relay.node.sockets.values()
        assert relay.disconnect(found.id)
        assert await socket.expect_closed(1001) == 1001
        with pytest.raises(AssertionError, match="the connection was closed with 1001"):
            await room.expect("order")
        with pytest.raises(RelayError, match="the connection is closed"):
            await room.push("say", {})
        with pytest.raises(AssertionError, match="expected close code 1012, got 1001"):
            await socket.expect_closed(1012)


async def test_histories_work_in_memory() -> None:
    app, relay = make(topics=[{"match": "room:*", "history": {"size": 10, "ttl_s": 60}}])
    async with connect(app) as socket:
        for at in range(3):
            await relay.publish("room:1", "order", {"at": at})
        room = await socket.join("room:1", {"last": 2})
        await room.expect("order", at=1)
        await room.expect("order", at=2)
        await room.expect_nothing(within_s=0.01)


async def test_raw_redis_messages_reach_handlers() -> None:
    app, relay = make()
    async with connect(app) as socket:
        room = await socket.join("room:1")
        send_redis_message(relay, "planes-full", "1")
        await room.expect("plane", {"channel": "planes-full", "data": "1"})
        with pytest.raises(RelayError, match=r"no on_redis handler listens to 'ships'; expected one of planes\*"):
            send_redis_message(relay, "ships", b"1")


async def test_failed_start_is_raised() -> None:
    @asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        raise ValueError("no database")
        yield

    app = Starlette(lifespan=lifespan)
    relay = make()[1]
    relay.install(app)
    with pytest.raises((RelayError, ValueError), match="no database"):
        async with connect(app):
            pytest.fail("it was not started")
    assert relay.config.redis_url == NOWHERE


async def test_plain_mount_is_started_by_the_client_and_stopped() -> None:
    relay = make()[1]
    async with connect(Starlette(routes=[Mount("/live", app=relay)])) as socket:
        await socket.join("room:1")
    assert not relay.is_running


async def test_application_without_a_relay_is_refused() -> None:
    with pytest.raises(RelayError, match="no relay found in Starlette; expected a Relay, an application"):
        connect(Starlette())


async def test_running_relay_is_not_put_in_memory() -> None:
    relay = make()[1]
    with in_memory(relay):
        async with relay.lifespan():
            with pytest.raises(RelayError, match="running already"):
                in_memory(relay)
            async with connect(relay) as socket:
                await socket.join("room:1")
            assert relay.is_running


# Permissions.


async def test_user_and_claims_make_a_token_of_the_relays_own_rules() -> None:
    auth = {"keys": [SECRET], "issuer": "shop", "audience": ["live"]}
    app, _ = make(auth=auth)
    async with connect(app, user="alice", claims={"topics": ["room:1:join"]}) as socket:
        room = await socket.join("room:1")
        assert room.response == {"user": "alice"}
        with pytest.raises(Refused, match="unauthorized"):
            await room.push("say", {})
        with pytest.raises(Refused, match="unauthorized"):
            await socket.join("room:2")
        with pytest.raises(ConnectionRefused) as refused:
            async with connect(app):
                pytest.fail("it has no token")
        assert refused.value.status == 401
        with pytest.raises(ConnectionRefused, match="^401: "):
            async with connect(app, token="nonsense"):
                pytest.fail("its token is no token")


async def test_published_keys_are_not_fetched() -> None:
    app, relay = make(auth={"jwks_url": "https://127.0.0.1:1/keys", "algorithms": ["ES256"]})
    async with connect(app, user="alice", claims={"topics": ["room:*:join"]}) as socket:
        await socket.join("room:1")
    assert relay.config.auth.jwks_url


async def test_function_sees_headers_and_params() -> None:
    def authenticate(request: UpgradeRequest) -> dict[str, str] | None:
        return {"sub": request.cookies["session"] + request.query_params["tab"]}

    app, _ = make(authenticate=authenticate, auth={"authenticated": [{"match": "*", "rights": ["join"]}]})
    async with connect(app, headers={"Cookie": "session=alice"}, params={"tab": "1"}) as socket:
        assert (await socket.join("room:1")).response == {"user": "alice1"}
        with pytest.raises(RelayError, match="authenticates by a function: pass headers"):
            async with connect(app, user="alice"):
                pytest.fail("there is no token")


# Without event loops.


def test_blocking_client_does_the_same() -> None:
    app, relay = make()
    with connect(app) as alice, connect(app) as bob:
        room = alice.join("room:1")
        assert (room.topic, room.response) == ("room:1", {"user": None})
        with pytest.raises(Refused, match="closed"):
            bob.join("room:closed")
        assert room.push("say", {"text": "hi"}) == {"length": 1}
        room.expect("said", text="hi")
        room.expect_nothing(within_s=0.01)
        _ = relay.publish("room:1", "order", 1)
        room.expect_nothing("other", within_s=0.01)
        assert room.received == [("order", 1)]
        room.leave()
        _ = relay.disconnect(user="other")
        bob.close()
        assert bob.expect_closed() == 1006
    assert not relay.is_running


def test_test_client_and_socket_share_an_application() -> None:
    app, relay = make()
    with in_memory(relay), TestClient(app) as client, connect(client) as socket:
        room = socket.join("room:1")
        assert client.post("/orders", params={"name": "cheese"}).status_code == 200
        room.expect("order", name="cheese")
    with pytest.raises(RelayError, match="the TestClient is not started"), connect(TestClient(app)):
        pytest.fail("its lifespan does not run")


def test_socket_has_the_cookies_of_its_test_client() -> None:
    async def authenticate(request: UpgradeRequest) -> dict[str, Any] | None:
        user = request.cookies.get("user")
        return {"sub": user, "topics": {"*": "join"}} if user else None

    app, relay = make(authenticate=authenticate)

    @app.post("/login")
    def login(response: Response) -> None:
        response.set_cookie("user", "ada")
        response.set_cookie("elsewhere", "x", path="/admin")

    with in_memory(relay), TestClient(app) as client:
        with pytest.raises(ConnectionRefused, match="401"), connect(client):
            pytest.fail("not logged in")
        client.post("/login")
        with connect(client) as socket:
            assert socket.join("room:1").response == {"user": "ada"}
        with connect(client, headers={"Cookie": "user=bob"}) as socket:
            assert socket.join("room:1").response == {"user": "bob"}
        with pytest.raises(ConnectionRefused, match="401"), connect(app):
            pytest.fail("another client")


# Fixtures.


def fixture(function: Any, *arguments: Any) -> Any:
    return function.__wrapped__(*arguments)


def test_fixtures_connect_to_the_application() -> None:
    app, _ = make()
    connecting: Callable[..., Connecting] = fixture(pytest_plugin.relay_connect, app)
    sockets: Iterator[BlockingSocket] = fixture(pytest_plugin.relay_socket, connecting)
    socket = next(sockets)
    assert socket.join("room:1").response == {"user": None}
    assert next(sockets, None) is None


def test_fixture_that_has_to_be_overridden_says_so() -> None:
    with pytest.raises(pytest.UsageError, match="relay_app: expected a fixture of this name"):
        fixture(pytest_plugin.relay_app)


def test_each_test_may_have_an_event_loop_of_its_own() -> None:
    app, _ = make()

    async def run() -> None:
        async with connect(app) as socket:
            await socket.join("room:1")

    for _ in range(2):
        asyncio.run(run())
