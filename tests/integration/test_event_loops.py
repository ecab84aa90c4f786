"""Calls from threads and from other event loops, and relays whose event loop has ended: Starlette's TestClient, tests
with a loop of their own each."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from signal import SIGTERM
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.testclient import TestClient

from relay import Plugin, Push, Relay
from relay.errors import BusUnavailable, RelayError
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually, serve

Connect = Callable[..., Any]
ServeRelay = Callable[..., Any]

SOCKET = "/relay/socket/websocket?vsn=2.0.0"
JOIN = ["1", "1", "room:1", "phx_join", {}]
JOINED = ["1", "1", "room:1", "phx_reply", {"status": "ok", "response": {}}]
AUTH = {"keys": [SECRET]}


def said(number: int) -> list[Any]:
    return [None, None, "room:1", "said", {"n": number}]


def in_thread(function: Callable[[], Any]) -> Awaitable[Any]:
    """What ``function`` returns in a thread that has no event loop."""
    return asyncio.wait_for(asyncio.to_thread(function), 20)


async def awaited(start: Callable[[], Awaitable[Any]]) -> Any:
    return await start()


# One call, from anywhere.


WAYS: dict[str, Callable[[Relay, int], Any]] = {
    "called": lambda relay, n: relay.broadcast("room:1", "said", {"n": n}),
    "publish": lambda relay, n: relay.publish("room:1", "said", {"n": n}),
    "asyncio.run of the call": lambda relay, n: asyncio.run(relay.broadcast("room:1", "said", {"n": n})),
    "awaited in another loop": lambda relay, n: asyncio.run(
        awaited(lambda: relay.broadcast("room:1", "said", {"n": n}))
    ),
}


@pytest.mark.parametrize("way", WAYS)
async def test_thread_publishes_again_and_again_between_calls_of_the_loop(
    serve_relay: ServeRelay, connect: Connect, way: str
) -> None:
    served = await serve_relay()
    client = await connect(served)
    await client.join("room:1")
    for number in range(0, 6, 2):
        await served.relay.broadcast("room:1", "said", {"n": number})
        assert await client.receive() == said(number)
        await in_thread(lambda number=number: WAYS[way](served.relay, number + 1))  # type: ignore[misc]
        assert await client.receive() == said(number + 1)


async def test_call_that_is_not_awaited_starts_at_once(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay()
    client = await connect(served)
    await client.join("room:1")
    _ = served.relay.broadcast("room:1", "said", {"n": 1})
    assert await client.receive() == said(1)
    tasks = [asyncio.create_task(served.relay.broadcast("room:1", "said", {"n": n})) for n in (2, 3)]
    await asyncio.gather(*tasks, served.relay.broadcast("room:1", "said", {"n": 4}))
    assert sorted([(await client.receive())[4]["n"] for _ in range(3)]) == [2, 3, 4]


async def test_call_blocks_no_other_loop_while_it_is_awaited(valkey: Valkey, direct: bool) -> None:
    with Valkey() as own:
        relay = Relay(redis_url=own.url, system_topic=False, redis={"timeout_s": 5})
        async with serve(relay, direct=direct):
            await relay.broadcast("room:1", "said", {})
            own.pause()
            turns = 0

            async def elsewhere() -> int:
                nonlocal turns
                call = relay.broadcast("room:1", "said", {})
                waiting = asyncio.ensure_future(call)
                while not waiting.done() and turns < 20:
                    turns += 1
                    await asyncio.sleep(0.005)
                own.resume()
                await waiting
                return turns

            assert await in_thread(lambda: asyncio.run(elsewhere())) == 20


async def test_thread_waits_no_longer_than_the_time_limit(direct: bool) -> None:
    with Valkey() as own:
        relay = Relay(redis_url=own.url, system_topic=False, redis={"timeout_s": 0.5})
        async with serve(relay, direct=direct):
            await relay.broadcast("room:1", "said", {})
            own.pause()
            began = time.monotonic()
            with pytest.raises(BusUnavailable):
                await in_thread(lambda: relay.broadcast("room:1", "said", {}))
            assert time.monotonic() - began < 10 * PATIENCE
            own.resume()


async def test_failure_that_nothing_awaits_is_logged_and_counted(
    direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with Valkey() as own:
        relay = Relay(redis_url=own.url, system_topic=False, auth=AUTH)
        async with serve(relay, direct=direct):
            own.kill()
            await eventually(lambda: not relay.link.live, "the loss of the link")
            _ = relay.broadcast("room:1", "said", {})
            _ = relay.kick("room:1", user="alice")
            dropped = relay.metrics.dropped
            await eventually(lambda: dropped["bus unavailable"] == 1, "the count of the event")
            await eventually(lambda: dropped["control message not sent"] == 1, "the count of the order")
            assert any("publish failed" in record.message for record in caplog.records)
            with pytest.raises(BusUnavailable):
                await relay.broadcast("room:1", "said", {})


async def test_users_are_sent_away_from_any_thread_and_loop(serve_relay: ServeRelay, connect: Connect) -> None:
    served: Served = await serve_relay(auth=AUTH)
    for act in (
        lambda: served.relay.kick("room:1", user="alice"),
        lambda: asyncio.run(served.relay.kick("room:1", user="alice")),
        lambda: asyncio.run(awaited(lambda: served.relay.kick("room:1", user="alice"))),
    ):
        client = await connect(served, query=f"token={token('alice', {'room:*': 'join'})}")
        await client.join("room:1")
        await in_thread(act)
        assert (await client.receive())[3] == "phx_close"
        await in_thread(lambda: served.relay.disconnect(user="alice", reason="bye"))
        assert await client.expect_closed() == (1001, "bye")


async def test_own_sockets_are_reached_and_topics_listed_from_a_thread(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    served = await serve_relay()
    client = await connect(served)
    await client.join("room:1")
    assert await in_thread(lambda: served.relay.local_broadcast("room:1", "said", {"n": 1})) is True
    assert await client.receive() == said(1)
    assert await in_thread(lambda: served.relay.topics) == {"room:1": 1}
    assert await in_thread(lambda: asyncio.run(awaited_value(lambda: served.relay.topics))) == {"room:1": 1}
    (socket_id,) = served.relay.node.sockets
    assert await in_thread(lambda: served.relay.disconnect(socket_id)) is True
    assert (await client.expect_closed())[0] == 1001


async def awaited_value(get: Callable[[], Any]) -> Any:
    return get()


@pytest.mark.parametrize("coroutine", [True, False])
async def test_handlers_broadcast_need_not_be_awaited(
    serve_relay: ServeRelay, connect: Connect, coroutine: bool
) -> None:
    plugin = Plugin("loud")

    @plugin.on_push("room:*", "from a coroutine")
    async def one(push: Push) -> None:
        push.stop()
        _ = push.broadcast("said", {"n": 1})

    @plugin.on_push("room:*", "from a function")
    def two(push: Push) -> None:
        push.stop()
        _ = push.broadcast("said", {"n": 1})

    served = await serve_relay(extra_plugins=(plugin,))
    client, other = await connect(served), await connect(served)
    ref = await client.join("room:1")
    await other.join("room:1")
    await client.send(ref, "5", "room:1", "from a coroutine" if coroutine else "from a function", {})
    assert await other.receive() == said(1)


# What is sent.


class Order(BaseModel):
    number: int
    at: datetime


@dataclass
class Basket:
    orders: list[Order]


AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ORDER, AS_JSON = Order(number=7, at=AT), {"number": 7, "at": "2026-01-02T03:04:05Z"}


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (ORDER, AS_JSON),
        ({"order": ORDER, "at": AT}, {"order": AS_JSON, "at": "2026-01-02T03:04:05Z"}),
        ([ORDER, [ORDER]], [AS_JSON, [AS_JSON]]),
        (Basket([ORDER]), {"orders": [AS_JSON]}),
    ],
)
async def test_models_are_sent_by_every_call(
    serve_relay: ServeRelay, connect: Connect, payload: Any, expected: Any
) -> None:
    plugin = Plugin("typed")
    as_dict = payload if isinstance(payload, BaseModel | Basket) else {"payload": payload}
    expected_dict = expected if as_dict is payload else {"payload": expected}

    @plugin.on_join("room:*")
    async def join(join: Any) -> Any:
        return as_dict

    @plugin.on_push("room:*", "return")
    async def returned(push: Push) -> Any:
        push.stop()
        return payload

    @plugin.on_push("room:*", "reply")
    def reply(push: Push) -> None:
        push.stop()
        push.reply(payload)

    @plugin.on_push("room:*", "broadcast")
    async def broadcast(push: Push) -> None:
        push.stop()
        push.no_reply()
        await push.broadcast("sent", payload)

    @plugin.on_push("room:*", "push")
    async def push(push: Push) -> None:
        push.stop()
        push.no_reply()
        push.socket.push("room:1", "sent", payload)

    @plugin.on_event("room:*", "replaced")
    async def replace(event: Any) -> Any:
        return event.replace(payload)

    served = await serve_relay(extra_plugins=(plugin,))
    client = await connect(served)
    await client.send(*JOIN)
    assert (await client.receive())[4] == {"status": "ok", "response": expected_dict}
    assert (await client.push("1", "room:1", "return"))["response"] == expected
    assert (await client.push("1", "room:1", "reply"))["response"] == expected
    for event in ("broadcast", "push"):
        await client.send("1", "9", "room:1", event, {})
        assert (await client.receive())[3:] == ["sent", expected]
    await served.relay.broadcast("room:1", "sent", payload)
    assert (await client.receive())[3:] == ["sent", expected]
    await served.relay.broadcast("room:1", "replaced", {})
    assert (await client.receive())[3:] == ["replaced", expected]
    served.relay.local_broadcast("room:1", "sent", payload)
    assert (await client.receive())[3:] == ["sent", expected]


async def test_payload_that_is_not_serializable_raises_at_the_call(serve_relay: ServeRelay) -> None:
    served = await serve_relay()
    loop_of_its_own: list[Any] = []
    loop_of_its_own.append(loop_of_its_own)
    for payload in (object(), {"a": object()}, {"a": [lambda: 1]}, "\ud83d", loop_of_its_own, {object(): 1}):
        for call in (served.relay.publish, served.relay.broadcast, served.relay.local_broadcast):
            with pytest.raises(
                TypeError, match="expected a payload that is JSON-serializable.*got (object|dict|str|list)"
            ):
                call("room:1", "said", payload)
    with pytest.raises(ValueError, match="expected a topic"):
        served.relay.publish("", "said", {})


# Event loops that come and go.


def shop() -> tuple[FastAPI, Relay]:
    """An app with routes of its own that broadcast, and a relay in it."""
    app = FastAPI()
    relay = Relay(broadcast_url="memory://", system_topic=False)

    @app.post("/say/{number}")
    async def say(number: int) -> None:
        await relay.broadcast("room:1", "said", {"n": number})

    @app.post("/say-in-a-thread/{number}")
    def say_in_a_thread(number: int) -> None:
        _ = relay.broadcast("room:1", "said", {"n": number})

    relay.install(app)
    return app, relay


def test_client_with_a_lifespan_works() -> None:
    app, relay = shop()
    with TestClient(app) as client, client.websocket_connect(SOCKET) as socket:
        socket.send_json(JOIN)
        assert socket.receive_json() == JOINED
        assert client.post("/say/1").is_success and client.post("/say-in-a-thread/2").is_success
        _ = relay.broadcast("room:1", "said", {"n": 3})  # the test itself is a thread of its own
        body = {"topic": "room:1", "event": "said", "payload": {"n": 4}}
        assert client.post("/relay/api/publish", json=body).status_code in (200, 403)
        assert [socket.receive_json() for _ in range(3)] == [said(1), said(2), said(3)]
        assert relay.topics == {"room:1": 1}


def test_client_without_a_lifespan_works_for_one_socket_and_any_requests() -> None:
    """Each request and each session has an event loop of its own there."""
    app, _ = shop()
    client = TestClient(app)
    assert client.get("/relay/health").is_success
    assert client.get("/relay/health").is_success
    for session in range(2):
        with client.websocket_connect(SOCKET) as socket:
            socket.send_json(JOIN)
            assert socket.receive_json() == JOINED
            assert client.post("/say/1").is_success
            assert socket.receive_json() == said(1), session
            assert client.post("/say-in-a-thread/2").is_success
            assert socket.receive_json() == said(2), session
            assert client.get("/relay/ready").is_success


def test_second_socket_in_another_loop_is_an_error_that_says_what_to_write() -> None:
    app, _ = shop()
    client, another = TestClient(app), TestClient(app)
    with client.websocket_connect(SOCKET) as socket:
        socket.send_json(JOIN)
        assert socket.receive_json() == JOINED
        for second in (client, another):
            with pytest.raises(RelayError, match=r"with TestClient\(app\) as client:"):
                with second.websocket_connect(SOCKET):
                    pass
        assert client.post("/say/1").is_success
        assert socket.receive_json() == said(1), "the first goes on"


def test_second_lifespan_in_another_loop_is_an_error_and_the_first_goes_on() -> None:
    app, _ = shop()
    with TestClient(app) as client, client.websocket_connect(SOCKET) as socket:
        socket.send_json(JOIN)
        assert socket.receive_json() == JOINED
        with pytest.raises(RelayError, match=r"with TestClient\(app\) as client:"):
            with TestClient(app):
                pass
        assert client.post("/say/1").is_success
        assert socket.receive_json() == said(1)


def test_one_relay_serves_one_client_after_the_other() -> None:
    app, _ = shop()
    for number in range(3):
        with TestClient(app) as client, client.websocket_connect(SOCKET) as socket:
            socket.send_json(JOIN)
            assert socket.receive_json() == JOINED
            assert client.post(f"/say/{number}").is_success
            assert socket.receive_json() == said(number)


def test_call_after_its_event_loop_has_ended_is_an_error_that_says_what_to_write() -> None:
    app, relay = shop()
    client = TestClient(app)
    assert client.get("/relay/health").is_success  # starts it, in a loop that ends with the request
    for call in (
        lambda: relay.broadcast("room:1", "said", {}),
        lambda: asyncio.run(awaited(lambda: relay.broadcast("room:1", "said", {}))),
        lambda: relay.local_broadcast("room:1", "said", {}),
        lambda: relay.disconnect(user="alice"),
        lambda: client.post("/say/1"),
    ):
        with pytest.raises(RelayError, match=r"with TestClient\(app\) as client:"):
            call()
    assert not relay.link.live


@pytest.mark.parametrize("bus", ["memory", "redis"])
def test_relay_of_a_module_serves_tests_with_a_loop_of_their_own_each(valkey: Valkey, bus: str) -> None:
    """As pytest-asyncio has it: the first test starts the relay and stops nothing, the second has another loop."""
    where = {"redis_url": valkey.url} if bus == "redis" else {"broadcast_url": "memory://"}
    relay = Relay(system_topic=False, **where)  # type: ignore[arg-type]

    async def starts_by_its_first_request() -> None:
        transport = httpx.ASGITransport(app=relay)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            assert (await client.get("/health")).status_code == 200
        await relay.broadcast("room:1", "said", {"n": 1})

    async def starts_by_hand() -> None:
        await relay.start()
        await relay.broadcast("room:1", "said", {"n": 1})

    async def serves() -> None:
        async with serve(relay) as served, Client.connect(served.ws) as client:
            await client.join("room:1")
            await relay.broadcast("room:1", "said", {"n": 2})
            assert await client.receive() == said(2)

    for test in (starts_by_its_first_request, starts_by_hand, serves, starts_by_hand, serves):
        asyncio.run(test())
    asyncio.run(relay.stop())


def test_relay_is_stopped_from_another_loop() -> None:
    relay = Relay(broadcast_url="memory://", system_topic=False)
    started, ended = threading.Event(), threading.Event()

    async def live() -> None:
        await relay.start()
        started.set()
        _ = await asyncio.to_thread(ended.wait, 20)

    thread = threading.Thread(target=asyncio.run, args=(live(),))
    thread.start()
    try:
        assert started.wait(20)
        asyncio.run(relay.stop())
        assert not relay.link.live
    finally:
        ended.set()
        thread.join()


# The end.

HANGING = """
import asyncio, time
from relay import Plugin

plugin = Plugin("hang")

@plugin.on_push("room:*", "executor")
async def executor(push):
    push.reply()
    await asyncio.to_thread(time.sleep, 600)

@plugin.on_push("room:*", "stubborn")
async def stubborn(push):
    push.reply()
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass
"""


def announced(process: RelayProcess) -> list[Path]:
    """The files by which other programs find a relay."""
    return list(Path(process.environ["XDG_RUNTIME_DIR"]).glob("*/*"))


@pytest.mark.parametrize("kind", ["executor", "stubborn"])
async def test_handler_that_hangs_does_not_keep_the_process(tmp_path: Path, kind: str) -> None:
    (tmp_path / "hanging").mkdir()
    (tmp_path / "hanging" / "__init__.py").write_text(HANGING)
    environ = {"RELAY_PLUGINS__PATHS": json.dumps([str(tmp_path)]), "RELAY_LIMITS__CLOSE_TIMEOUT_S": "0.5"}
    with RelayProcess(environ=environ) as process:
        async with Client.connect(process.ws) as client:
            assert (await client.push(await client.join("room:1"), "room:1", kind))["status"] == "ok"
            assert process.process is not None
            process.process.send_signal(SIGTERM)
            assert (await client.expect_closed())[0] == 1012
            assert announced(process)
        assert await asyncio.to_thread(process.wait) == 0
        assert "process did not end within" in process.output
        assert not announced(process)


async def test_embedded_server_ends_while_handlers_hold_all_threads_of_the_loop() -> None:
    hang = threading.Event()
    relay = Relay(redis_url="embedded", system_topic=False)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    async with relay.lifespan():
        hanging = loop.run_in_executor(None, hang.wait)
        stopping = asyncio.create_task(relay.stop())
        done, _ = await asyncio.wait({stopping}, timeout=20)
        hang.set()
        assert done, "the stop waits for a thread of the event loop"
        assert await hanging
        await stopping


def test_topics_are_listed_between_two_runs_of_the_loop() -> None:
    relay = Relay(broadcast_url="memory://", system_topic=False)
    with asyncio.Runner() as runner:
        runner.run(relay.start())
        assert relay.topics == {}
        runner.run(relay.stop())
