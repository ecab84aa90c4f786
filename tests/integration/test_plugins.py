"""Plugins over real sockets: found, asked, heard, and kept from hurting anybody else.

Source of the rules where none is named: docs/plugins.md.
"""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException
from redis.asyncio import Redis

from relay import BusUnavailable, ConfigError, Event, Join, Leave, Plugin, Push, RedisMessage, Refused, Relay, node
from relay.channels import pubsub
from relay.plugins.hooks import Socket
from tests.support.client import Client
from tests.support.panic import Panic
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually, heard_on, http_get, serve

Connect = Callable[..., Awaitable[Client]]
ServePlugin = Callable[..., Awaitable[Served]]

SEED = (Path(__file__).parents[1] / "data" / "seed_example_plugin.py.txt").read_text("utf-8")
INTERNAL = {"status": "error", "response": {"reason": "internal error"}}
JOIN_CRASHED = {"status": "error", "response": {"reason": "join crashed"}}
GATE_S = 20.0
"""How long a handler that waits for its test may wait."""


@pytest.fixture
def serve_plugin(runner: asyncio.Runner, valkey: Valkey) -> Iterator[ServePlugin]:
    """``await serve_plugin(plugin, …)`` serves a relay with these plugins and settings until the test ends."""
    stack = AsyncExitStack()

    async def serve_plugin(*plugins: Plugin, direct: bool = True, **settings: Any) -> Served:
        if "broadcast_url" not in settings:
            settings.setdefault("redis_url", valkey.url)
        relay = Relay(extra_plugins=plugins, **{"system_topic": False, **settings})
        return await stack.enter_async_context(serve(relay, direct=direct))

    yield serve_plugin
    runner.run(stack.aclose())


@pytest.fixture(params=["coroutine", "plain"])
def both(request: pytest.FixtureRequest) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make of a plain function a handler of either kind."""

    def both(function: Callable[..., Any]) -> Callable[..., Any]:
        if request.param == "plain":
            return function

        async def coroutine(*arguments: Any) -> Any:
            return function(*arguments)

        return coroutine

    return both


Both = Callable[[Callable[..., Any]], Callable[..., Any]]


async def ask_to_join(client: Client, topic: str, params: Any = None) -> tuple[str, Any]:
    """Join, whatever comes of it; returns the join_ref and the reply's payload."""
    ref = str(client.next_ref())
    join_ref = f"j{ref}"
    await client.send(join_ref, ref, topic, "phx_join", params or {})
    reply = await client.receive()
    assert reply[:4] == [join_ref, ref, topic, "phx_reply"]
    return join_ref, reply[4]


async def send_push(client: Client, join_ref: str, topic: str, event: str, payload: Any = None) -> str:
    """Push, and leave the answer for later; returns the ref."""
    ref = str(client.next_ref())
    await client.send(join_ref, ref, topic, event, {} if payload is None else payload)
    return ref


def ok(response: Any = None) -> dict[str, Any]:
    return {"status": "ok", "response": response or {}}


def errors_of(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "relay.plugins" and record.levelno == logging.ERROR]


def put(directory: Path, name: str, text: str) -> Path:
    package = directory / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    return directory


ANSWERS = """
from relay import Plugin

plugin = Plugin("{name}")

@plugin.on_push("{name}:*", "who")
def who(push):
    return "{name}"
"""


# Discovery.


async def test_plugins_are_found_in_all_three_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve_plugin: ServePlugin, connect: Connect
) -> None:
    info = tmp_path / "site" / "installed-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[relay.plugins]\ninstalled = relay_test_installed\n")
    (tmp_path / "site" / "relay_test_installed.py").write_text(ANSWERS.format(name="installed"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    directory = put(tmp_path / "plugins", "dropped", ANSWERS.format(name="dropped"))
    served = await serve_plugin(plugins={"paths": [directory]}, system_topic=True)
    client = await connect(served)
    for name in ("installed", "dropped"):
        join_ref = await client.join(f"{name}:1")
        assert await client.push(join_ref, f"{name}:1", "who") == ok(name)
    await client.join("system")
    assert (await client.receive())[3] == "stats"
    sys.modules.pop("relay_test_installed")


async def test_example_plugin_of_the_seed_works_unchanged(tmp_path: Path, serve_plugin: ServePlugin) -> None:
    """Source: seed.md, *Extend the FastAPI application*; the file is its code block, byte for byte."""
    directory = put(tmp_path, "example", SEED)
    served = await serve_plugin(plugins={"paths": [directory]})
    status, body = await http_get(f"{served.http}/api/example/")
    assert (status, json.loads(body)) == (200, {"data": "This is an example plugin response"})
    status, body = await http_get(f"{served.http}/api/openapi.json")
    route = json.loads(body)["paths"]["/example/"]["get"]
    assert route["tags"] == ["example"]
    assert route["description"] == "An example endpoint that returns some data."
    assert route["responses"]["404"]["description"] == "Not found"
    assert "ExampleResponse" in json.dumps(route["responses"]["200"])
    status, body = await http_get(f"{served.http}/api/docs")
    assert status == 200
    assert "openapi.json" in body


async def test_plugins_routes_may_be_served_by_the_teams_own_app(tmp_path: Path, valkey: Valkey) -> None:
    """Its dependencies and its ``/docs`` are theirs too; the relay's REST app has them no longer."""

    def forbid() -> None:
        raise HTTPException(401, "who are you?")

    app = FastAPI(dependencies=[Depends(forbid)])
    directory = put(tmp_path, "example", SEED)
    relay = Relay(redis_url=valkey.url, plugins={"paths": [directory]}, system_topic=False)
    relay.install(app, plugin_routes_in_app=True)
    async with serve(relay, app=app) as served:
        assert (await http_get(f"{served.http}/example/"))[0] == 401
        assert "/example/" in json.loads((await http_get(f"{served.http}/openapi.json"))[1])["paths"]
        assert (await http_get(f"{served.http}/relay/api/example/"))[0] == 404


# Joins.


async def test_join_is_allowed_and_its_reply_is_merged(serve_plugin: ServePlugin, connect: Connect, both: Both) -> None:
    plugin, seen = Plugin("p"), []

    def first(join: Join) -> dict[str, Any]:
        seen.append((join.topic, join.payload, join.socket.address, join.socket.query, dict(join.socket.claims)))
        return {"a": 1, "b": 1}

    plugin.on_join("room:*")(both(first))
    plugin.on_join("*")(both(lambda join: None))
    plugin.on_join("room:?")(both(lambda join: {"b": 2, "id": join.socket.id}))
    plugin.on_join("other:*")(both(lambda join: {"c": 3}))
    served = await serve_plugin(plugin)
    client = await connect(served, query="user=ada")
    _, reply = await ask_to_join(client, "room:1", {"token": "t"})
    [socket_id] = served.relay.node.sockets
    assert reply == ok({"a": 1, "b": 2, "id": socket_id})
    assert seen == [("room:1", {"token": "t"}, "127.0.0.1", {"user": "ada", "vsn": "2.0.0"}, {})]
    assert (await ask_to_join(client, "elsewhere"))[1] == ok()


async def test_join_is_refused_with_details_and_the_next_handlers_are_not_asked(
    serve_plugin: ServePlugin, connect: Connect, both: Both
) -> None:
    plugin, asked = Plugin("p"), []

    def refuse(join: Join) -> None:
        raise Refused("full", seats=0, try_again_s=60)

    plugin.on_join("room:*")(both(refuse))
    plugin.on_join("*")(both(lambda join: asked.append(join.topic)))
    served = await serve_plugin(plugin)
    client = await connect(served)
    join_ref, reply = await ask_to_join(client, "room:1")
    assert reply == {"status": "error", "response": {"reason": "full", "seats": 0, "try_again_s": 60}}
    assert asked == []
    assert await client.push(join_ref, "room:1", "say") == {
        "status": "error",
        "response": {"reason": "unmatched topic"},
    }
    assert served.relay.metrics.refused == {"by a plugin": 1, "unmatched topic": 1}
    assert +served.relay.metrics.plugin_errors == {}


@pytest.mark.parametrize("answer", [False, ["a"], {"a": object()}])
async def test_join_with_an_answer_that_is_no_dict_is_refused(
    serve_plugin: ServePlugin, connect: Connect, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = Plugin("careless")
    plugin.on_join()(lambda join: answer)
    served = await serve_plugin(plugin)
    client = await connect(served)
    assert (await ask_to_join(client, "room:1"))[1] == JOIN_CRASHED
    assert served.relay.topics == {}
    assert +served.relay.metrics.plugin_errors == {"careless": 1}
    assert [record.getMessage()[:16] for record in errors_of(caplog)] == ["plugin careless:"]


# Pushes and their answers.


async def test_returned_value_is_the_reply_and_the_first_one_counts(
    serve_plugin: ServePlugin, connect: Connect, valkey: Valkey, both: Both
) -> None:
    plugin, called = Plugin("p"), []

    def handler(name: str, answer: Any) -> Callable[[Push], Any]:
        def handle(push: Push) -> Any:
            called.append((name, push.topic, push.event, push.payload))
            return answer

        return both(handle)

    plugin.on_push("room:*", "say")(handler("first", None))
    plugin.on_push("room:*", "s*")(handler("second", {"n": 2}))
    plugin.on_push("*")(handler("third", {"n": 3}))
    plugin.on_push("room:*", "other")(handler("never", {"n": 4}))
    served = await serve_plugin(plugin)
    client = await connect(served)
    join_ref = await client.join("room:1")
    async with heard_on(valkey.url, "from:room:1:*") as heard:
        assert await client.push(join_ref, "room:1", "say", {"text": "hi"}) == ok({"n": 2})
        assert await heard() == ("from:room:1:say", b'{"text": "hi"}')
    assert called == [(name, "room:1", "say", {"text": "hi"}) for name in ("first", "second", "third")]
    assert +served.relay.metrics.plugin_calls == {"p": 3}


async def test_binary_push_reaches_a_handler_as_bytes(serve_plugin: ServePlugin, connect: Connect) -> None:
    plugin = Plugin("p")

    @plugin.on_push()
    def size(push: Push) -> int:
        assert isinstance(push.payload, bytes)
        return len(push.payload)

    client = await connect(await serve_plugin(plugin))
    join_ref = await client.join("topic")
    names = (join_ref, "5", "topic", "event")
    head = bytes([0, *map(len, names)])
    await client.send_raw(head + "".join(names).encode() + b"\x00\xff\x01")
    assert await client.receive() == client.reply(join_ref, "5", "topic", response=3)


async def test_refused_push_gets_an_error_reply_and_goes_nowhere(
    serve_plugin: ServePlugin, connect: Connect, valkey: Valkey, both: Both
) -> None:
    plugin, called = Plugin("p"), []

    def refuse(push: Push) -> None:
        if push.payload == 1:
            raise Refused("nothing to say", min_length=1)

    plugin.on_push("*", "say")(both(refuse))
    plugin.on_push("*", "say")(both(lambda push: called.append(push.payload)))
    client = await connect(await serve_plugin(plugin))
    join_ref = await client.join("room:1")
    async with heard_on(valkey.url, "from:room:1:*") as heard:
        refusal = {"status": "error", "response": {"reason": "nothing to say", "min_length": 1}}
        assert await client.push(join_ref, "room:1", "say", 1) == refusal
        assert await client.push(join_ref, "room:1", "say", 2) == ok()
        assert await heard() == ("from:room:1:say", b"2")
    assert called == [2]


async def test_several_replies_or_none_are_possible(serve_plugin: ServePlugin, connect: Connect, both: Both) -> None:
    plugin, kept = Plugin("p"), []

    def several(push: Push) -> dict[str, int]:
        push.reply({"n": 1})
        push.reply(status="working")
        push.reply({"n": 2}, "error")
        return {"n": 3}

    def later(push: Push) -> None:
        push.no_reply()
        kept.append(push)

    plugin.on_push("*", "several")(both(several))
    plugin.on_push("*", "one")(both(lambda push: push.reply({"n": 1})))
    plugin.on_push("*", "later")(both(later))
    client = await connect(await serve_plugin(plugin))
    join_ref = await client.join("room:1")
    ref = await send_push(client, join_ref, "room:1", "several")
    for status, response in (("ok", {"n": 1}), ("working", {}), ("error", {"n": 2}), ("ok", {"n": 3})):
        assert await client.receive() == client.reply(join_ref, ref, "room:1", status, response)
    assert await client.push(join_ref, "room:1", "one") == ok({"n": 1})
    await client.expect_alive()
    ref = await send_push(client, join_ref, "room:1", "later")
    assert await client.push(join_ref, "room:1", "one") == ok({"n": 1})  # nothing came before it
    kept[0].reply({"at": "last"})
    assert await client.receive() == client.reply(join_ref, ref, "room:1", "ok", {"at": "last"})


@pytest.mark.parametrize("how", ["leave", "close"])
async def test_reply_after_the_client_has_gone_is_dropped_silently(
    serve_plugin: ServePlugin, connect: Connect, direct: bool, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    plugin, kept = Plugin("p"), []

    @plugin.on_push()
    async def later(push: Push) -> None:
        push.no_reply()
        kept.append(push)

    served = await serve_plugin(plugin, direct=direct)
    client = await connect(served)
    join_ref = await client.join("room:1")
    await send_push(client, join_ref, "room:1", "say")
    await eventually(lambda: kept, "the push")
    if how == "leave":
        await client.push(join_ref, "room:1", "phx_leave")
        assert (await client.receive())[3] == "phx_close"
    else:
        await client.connection.close()
        await eventually(lambda: not served.relay.node.sockets, "the socket's end")
    push = kept[0]
    push.reply({"too": "late"})
    push.socket.disconnect()
    assert not push.socket.push("room:1", "hi", {})
    if how == "leave":
        assert await client.expect_closed() == (1001, "disconnected by the server")
    assert errors_of(caplog) == []
    told = [record for record in caplog.records if record.levelno > logging.INFO]
    assert not [record for record in told if getattr(record, "kind", "") != "stall"], "but for a loaded machine"


async def test_what_a_client_pushed_is_handled_to_the_end_after_it_has_gone(
    serve_plugin: ServePlugin, connect: Connect, valkey: Valkey
) -> None:
    """And in order, before on_leave: who says something and closes the page has said it."""
    plugin, log, gate = Plugin("p"), [], asyncio.Event()

    @plugin.on_push("*", "say")
    async def say(push: Push) -> None:
        await gate.wait()
        log.append(push.payload)
        push.reply({"nobody": "hears this"})

    @plugin.on_leave()
    async def leave(leave: Leave) -> None:
        log.append("left")

    served = await serve_plugin(plugin)
    client = await connect(served)
    join_ref = await client.join("room:gone")
    async with heard_on(valkey.url, "from:room:gone:*") as heard:
        for number in range(3):
            await send_push(client, join_ref, "room:gone", "say", number)
        await eventually(lambda: served.relay.metrics.plugin_calls["p"], "the first push")
        await client.connection.close()
        await eventually(lambda: not served.relay.node.sockets, "the socket's end")
        assert log == []
        gate.set()
        assert [await heard() for _ in range(3)] == [("from:room:gone:say", b"%d" % number) for number in range(3)]
    await eventually(lambda: "left" in log, "on_leave")
    assert log == [0, 1, 2, "left"]
    assert +served.relay.metrics.plugin_errors == {}


async def test_stop_keeps_a_push_from_redis(
    serve_plugin: ServePlugin, connect: Connect, valkey: Valkey, both: Both
) -> None:
    plugin = Plugin("p")
    plugin.on_push("*", "secret")(both(lambda push: push.stop()))
    client = await connect(await serve_plugin(plugin))
    join_ref = await client.join("room:1")
    async with heard_on(valkey.url, "from:room:1:*") as heard:
        assert await client.push(join_ref, "room:1", "secret") == ok()
        assert await client.push(join_ref, "room:1", "public") == ok()
        assert await heard() == ("from:room:1:public", b"{}")


async def test_push_without_a_handler_is_forwarded_and_acknowledged(
    serve_plugin: ServePlugin, connect: Connect, valkey: Valkey
) -> None:
    plugin, called = Plugin("p"), []
    plugin.on_push("room:*", "say")(lambda push: called.append(push.event))
    client = await connect(await serve_plugin(plugin))
    join_ref = await client.join("elsewhere:1")
    async with heard_on(valkey.url, "from:elsewhere:1:*") as heard:
        assert await client.push(join_ref, "elsewhere:1", "say", {"a": 1}) == ok()
        assert await heard() == ("from:elsewhere:1:say", b'{"a": 1}')
    assert called == []


async def test_push_is_not_acknowledged_while_the_bus_is_away(connect: Connect) -> None:
    plugin, called = Plugin("p"), []
    plugin.on_push("*", "say")(lambda push: called.append(push.event))

    @plugin.on_push("*", "handled")
    async def handled(push: Push) -> str:
        push.stop()
        return "done"

    with Valkey() as own:
        relay = Relay(redis_url=own.url, extra_plugins=(plugin,), system_topic=False)
        async with serve(relay) as served, Client.connect(served.ws) as client:
            join_ref = await client.join("room:1")
            own.kill()
            await eventually(lambda: not relay.link.live, "the link to break")
            refusal = {"status": "error", "response": {"reason": "bus unavailable"}}
            assert await client.push(join_ref, "room:1", "say") == refusal
            assert await client.push(join_ref, "room:1", "handled") == ok("done")
            own.start()
            await eventually(lambda: relay.link.live, "the link to heal")
    assert called == ["say"]


async def test_handled_push_that_the_bus_does_not_take_is_not_acknowledged(
    serve_plugin: ServePlugin, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is live, and this one message fails: Redis is out of memory, say."""
    plugin = Plugin("p")
    plugin.on_push()(lambda push: "handled")
    served = await serve_plugin(plugin)
    client = await connect(served)
    join_ref = await client.join("room:1")

    def publish(*message: object) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.set_exception(BusUnavailable("OOM"))
        return future

    monkeypatch.setattr(served.relay.node.pubsub, "_publish", publish)
    refusal = {"status": "error", "response": {"reason": "bus unavailable"}}
    assert await client.push(join_ref, "room:1", "say") == refusal


# What a handler, a service and a route can send.


async def test_broadcasts_reach_all_subscribers_or_all_others(
    serve_plugin: ServePlugin, connect: Connect, both: Both
) -> None:
    """A coroutine function awaits them, a plain function just calls them, in its thread."""
    plugin = Plugin("p")

    async def shout(push: Push) -> None:
        await push.broadcast("said", {"text": push.payload})
        await push.broadcast_from("noted", b"\x00")

    def shout_plainly(push: Push) -> None:
        _ = push.broadcast("said", {"text": push.payload})
        _ = push.broadcast_from("noted", b"\x00")

    is_plain = both(shout_plainly) is shout_plainly
    plugin.on_push("*", "shout")(shout_plainly if is_plain else shout)
    served = await serve_plugin(plugin)
    ada, bob, eve = [await connect(served) for _ in range(3)]
    join_ref = await ada.join("room:b")
    await bob.join("room:b")
    await eve.join("room:c")
    ref = await send_push(ada, join_ref, "room:b", "shout", "hi")
    heard = [await ada.receive(), await ada.receive()]
    assert [None, None, "room:b", "said", {"text": "hi"}] in heard
    assert ada.reply(join_ref, ref, "room:b") in heard
    await ada.expect_alive()
    await bob.expect_event("room:b", "said", {"text": "hi"})
    assert isinstance(await bob.receive_raw(), bytes)
    await bob.expect_alive()
    await eve.expect_alive()


async def test_plain_function_may_have_an_event_loop_of_its_own(serve_plugin: ServePlugin, connect: Connect) -> None:
    plugin = Plugin("p")

    @plugin.on_push("*", "shout")
    def shout(push: Push) -> str:
        async def shout() -> str:
            await push.broadcast_from("said", {})
            return "said"

        return asyncio.run(shout())

    served = await serve_plugin(plugin)
    ada, bob = await connect(served), await connect(served)
    join_ref = await ada.join("room:own")
    await bob.join("room:own")
    assert await ada.push(join_ref, "room:own", "shout") == ok("said")
    await bob.expect_event("room:own", "said", {})


async def test_broadcast_that_cannot_be_is_the_handlers_fault(
    serve_plugin: ServePlugin, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """``a:b`` would be event ``b`` of another topic."""
    plugin = Plugin("p")

    @plugin.on_push("*", "name")
    async def name(push: Push) -> None:
        await push.broadcast("a:b", {})

    @plugin.on_push("*", "payload")
    async def payload(push: Push) -> None:
        await push.broadcast_from("ab", object())

    @plugin.on_push("*", "push")
    async def push(push: Push) -> None:
        push.socket.push(push.topic, "phx_close", {})

    served = await serve_plugin(plugin)
    client = await connect(served)
    join_ref = await client.join("room:1")
    for event in ("name", "payload", "push"):
        assert await client.push(join_ref, "room:1", event) == INTERNAL
    assert +served.relay.metrics.plugin_errors == {"p": 3}


async def test_broadcast_while_the_bus_is_away_raises_in_the_handler(connect: Connect, both: Both) -> None:
    plugin, caught = Plugin("p"), []

    async def shout(push: Push) -> None:
        push.stop()
        for broadcast in (push.broadcast, push.broadcast_from):
            try:
                await broadcast("said", {})
            except BusUnavailable as error:
                caught.append(str(error))

    def shout_plainly(push: Push) -> None:
        push.stop()
        for broadcast in (push.broadcast, push.broadcast_from):
            try:
                _ = broadcast("said", {})
            except BusUnavailable as error:
                caught.append(str(error))

    is_plain = both(shout_plainly) is shout_plainly
    plugin.on_push()(shout_plainly if is_plain else shout)
    with Valkey() as own:
        relay = Relay(redis_url=own.url, extra_plugins=(plugin,), system_topic=False)
        async with serve(relay) as served, Client.connect(served.ws) as client:
            join_ref = await client.join("room:1")
            own.kill()
            await eventually(lambda: not relay.link.live, "the link to break")
            assert await client.push(join_ref, "room:1", "shout") == ok()
    assert len(caught) == 2


async def test_broadcast_from_passes_over_its_sender_alone_among_equal_payloads(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis
) -> None:
    """Others publish the very same bytes meanwhile: each of two senders misses one of them, and no more."""
    plugin, count = Plugin("p"), 20
    payload = '{"text":"hi"}'

    @plugin.on_push("*", "tell")
    async def tell(push: Push) -> None:
        push.stop()
        await push.broadcast_from("said", {"text": "hi"})

    served = await serve_plugin(plugin)
    ada, bob, eve = [await connect(served) for _ in range(3)]
    refs = [await client.join("room:same") for client in (ada, bob, eve)]

    async def publish() -> None:
        for _ in range(count):
            await redis.publish("to:room:same:said", payload)

    async def push(client: Client, join_ref: str) -> None:
        for _ in range(count):
            await send_push(client, join_ref, "room:same", "tell")

    await asyncio.gather(publish(), push(ada, refs[0]), push(bob, refs[1]))
    await eventually(lambda: served.relay.metrics.events_in >= 3 * count, "all events")
    await redis.publish("to:room:same:end", "1")

    async def said(client: Client) -> int:
        heard = 0
        while (message := await client.receive())[3] != "end":
            heard += message[3] == "said"
        return heard

    assert [await said(client) for client in (ada, bob, eve)] == [2 * count, 2 * count, 3 * count]


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_equal_events_of_others_reach_the_sender_of_a_broadcast_from(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis, bus: str, filtered: bool
) -> None:
    """One by one: each event of others reaches it at its place, its own ones never."""
    plugin = Plugin("p")

    @plugin.on_push("*", "tell")
    async def tell(push: Push) -> None:
        push.stop()
        await push.broadcast_from("said", {"n": 1})

    if filtered:
        plugin.on_event("*")(lambda event: event)
    served = await serve_plugin(plugin, **({"broadcast_url": "memory://"} if bus == "memory" else {}))

    async def publish_elsewhere(event: str = "said") -> None:
        if bus == "redis":
            await redis.publish(f"to:room:same:{event}", '{"n":1}')
        else:
            await served.relay.broadcast("room:same", event, {"n": 1})

    ada, bob = await connect(served), await connect(served)
    refs = [await client.join("room:same") for client in (ada, bob)]
    for _ in range(3):
        await publish_elsewhere()
        assert (await ada.receive())[3] == (await bob.receive())[3] == "said"
        await send_push(ada, refs[0], "room:same", "tell")
        assert (await bob.receive())[3] == "said"
        await publish_elsewhere("mark")
        messages = [await ada.receive(), await ada.receive()]  # the reply to its push, and nothing of its own
        assert sorted(message[3] for message in messages) == ["mark", "phx_reply"]
        assert (await bob.receive())[3] == "mark"
    assert not served.relay.node.pubsub._skips


async def test_services_and_routes_speak_through_the_relay(
    serve_plugin: ServePlugin, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, router, relays = Plugin("p"), APIRouter(prefix="/p"), []
    begin = asyncio.Event()
    plugin.include_router(router)

    @plugin.on_startup
    def keep(relay: Relay) -> None:
        relays.append(relay)

    @plugin.service
    async def clock(relay: Relay) -> None:
        await begin.wait()
        await relay.broadcast("room:s", "tick", {"n": 1})
        relay.local_broadcast("room:s", "tock", {"n": 2})
        await asyncio.Event().wait()

    @router.get("/shout")
    async def shout() -> dict[str, Any]:
        [relay] = relays
        await relay.broadcast("room:s", "shouted", {})
        return {"topics": relay.topics, "here": relay.local_broadcast("nobody", "x", {})}

    @router.get("/end/{socket_id}")
    def end(socket_id: str) -> bool:
        found: bool = relays[0].disconnect(socket_id, "bye")
        return found

    served = await serve_plugin(plugin)
    assert relays == [served.relay]
    client = await connect(served)
    await client.join("room:s")
    begin.set()
    heard = [await client.receive(), await client.receive()]
    assert {message[3] for message in heard} == {"tick", "tock"}
    status, body = await http_get(f"{served.http}/api/p/shout")
    assert (status, json.loads(body)) == (200, {"topics": {"room:s": 1}, "here": False})
    await client.expect_event("room:s", "shouted", {})
    [socket_id] = served.relay.node.sockets
    assert (await http_get(f"{served.http}/api/p/end/nobody"))[1] == "false"
    assert (await http_get(f"{served.http}/api/p/end/{socket_id}"))[1] == "true"
    assert await client.expect_closed() == (1001, "bye")


async def test_handler_pushes_to_its_socket_and_ends_topic_and_socket(
    serve_plugin: ServePlugin, connect: Connect, both: Both
) -> None:
    """Also from a thread, where plain functions run."""
    plugin, answers = Plugin("p"), []

    def whisper(push: Push) -> None:
        answers.append(push.socket.push(push.topic, "psst", {"n": 1}))
        answers.append(push.socket.push("elsewhere", "psst", {}))

    def kick(push: Push) -> None:
        answers.append(push.socket.leave("room:other"))
        answers.append(push.socket.leave("elsewhere"))

    plugin.on_push("*", "whisper")(both(whisper))
    plugin.on_push("*", "kick")(both(kick))
    plugin.on_push("*", "bye")(both(lambda push: push.socket.disconnect("so long")))
    served = await serve_plugin(plugin)
    ada, bob = await connect(served), await connect(served)
    await bob.join("room:1")
    join_ref, other_ref = await ada.join("room:1"), await ada.join("room:other")
    ref = await send_push(ada, join_ref, "room:1", "whisper")
    assert await ada.receive() == [join_ref, None, "room:1", "psst", {"n": 1}]
    assert await ada.receive() == ada.reply(join_ref, ref, "room:1")
    await bob.expect_alive()
    ref = await send_push(ada, join_ref, "room:1", "kick")
    assert await ada.receive() == [other_ref, other_ref, "room:other", "phx_close", {}]
    assert await ada.receive() == ada.reply(join_ref, ref, "room:1")
    assert answers == [True, False, True, False]
    assert served.relay.topics == {"room:1": 2}
    await send_push(ada, join_ref, "room:1", "bye")
    assert await ada.expect_closed() == (1001, "so long")


# Isolation.


async def test_exception_costs_that_push_an_error_reply_and_nothing_else(
    serve_plugin: ServePlugin, connect: Connect, both: Both, caplog: pytest.LogCaptureFixture
) -> None:
    plugin, good = Plugin("broken-one"), Plugin("good")

    def boom(push: Push) -> None:
        raise RuntimeError("the password is hunter2")

    plugin.on_push("*", "boom")(both(boom))
    plugin.on_push("*", "object")(both(lambda push: object()))
    good.on_push("*", "fine")(both(lambda push: "fine"))
    served = await serve_plugin(plugin, good)
    client = await connect(served)
    join_ref = await client.join("room:1")
    ref = await send_push(client, join_ref, "room:1", "boom")
    frame = await client.receive_raw()
    assert isinstance(frame, str)
    assert json.loads(frame) == client.reply(join_ref, ref, "room:1", "error", {"reason": "internal error"})
    assert "hunter2" not in frame
    for _ in range(4):
        assert await client.push(join_ref, "room:1", "boom") == INTERNAL
    [record] = errors_of(caplog)
    assert record.getMessage().startswith("plugin broken-one: ")
    assert record.getMessage().endswith(" raised")
    assert record.exc_info is not None
    assert await client.push(join_ref, "room:1", "object") == INTERNAL
    assert await client.push(join_ref, "room:1", "fine") == ok("fine")
    assert +served.relay.metrics.plugin_errors == {"broken-one": 6}
    assert +served.relay.metrics.plugin_calls == {"broken-one": 6, "good": 1}
    metrics = (await http_get(f"{served.http}/metrics"))[1]
    assert re.search(r'^relay_plugin_errors_total\{\w+="broken-one"\} 6', metrics, re.MULTILINE)
    assert re.search(r'^relay_plugin_calls_total\{\w+="good"\} 1', metrics, re.MULTILINE)


async def test_exception_in_a_join_is_a_crashed_join(
    serve_plugin: ServePlugin, connect: Connect, both: Both, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = Plugin("broken")

    def boom(join: Join) -> None:
        raise RuntimeError("the password is hunter2")

    plugin.on_join("room:*")(both(boom))
    served = await serve_plugin(plugin)
    client = await connect(served)
    for _ in range(3):
        assert (await ask_to_join(client, "room:1"))[1] == JOIN_CRASHED
    assert len(errors_of(caplog)) == 1
    assert +served.relay.metrics.plugin_errors == {"broken": 3}
    assert served.relay.metrics.refused == {"join crashed": 3}
    await client.join("elsewhere")


@pytest.mark.parametrize("error", [ZeroDivisionError("boom"), Panic("boom")], ids=lambda error: type(error).__name__)
async def test_answer_that_raises_while_it_is_serialized_costs_no_other_message_anything(
    serve_plugin: ServePlugin, connect: Connect, both: Both, error: BaseException
) -> None:
    plugin, gate = Plugin("broken"), asyncio.Event()

    class Model:
        def model_dump(self, **options: Any) -> Any:
            raise error

    async def slow(push: Push) -> Any:
        await gate.wait()
        return {"a": [Model()]}

    plugin.on_push("*", "slow")(slow)
    plugin.on_push("*", "broken")(both(lambda push: Model()))
    plugin.on_join("bad")(both(lambda join: Model()))
    served = await serve_plugin(plugin)
    client = await connect(served)
    join_ref = await client.join("room:1")
    refs = [await send_push(client, join_ref, "room:1", event) for event in ("slow", "broken", "fine")]
    gate.set()
    for ref, status in zip(refs, ("error", "error", "ok"), strict=True):
        response = {"reason": "internal error"} if status == "error" else {}
        assert await client.receive() == client.reply(join_ref, ref, "room:1", status, response)
    for _ in range(2):
        assert (await ask_to_join(client, "bad"))[1] == JOIN_CRASHED
    assert +served.relay.metrics.plugin_errors == {"broken": 4}


@pytest.mark.parametrize("kind", ["coroutine", "plain"])
async def test_handler_that_hangs_is_cut_and_blocks_nobody(
    serve_plugin: ServePlugin, connect: Connect, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    plugin, released, hung = Plugin("stuck"), threading.Event(), []

    async def hangs(thing: Join | Push) -> None:
        hung.append(thing)
        await asyncio.Event().wait()

    def hangs_in_thread(thing: Join | Push) -> None:
        hung.append(thing)
        released.wait(GATE_S)

    limit_s = 0.6 * PATIENCE
    handler: Any = hangs if kind == "coroutine" else hangs_in_thread
    plugin.on_push("*", "hang")(handler)
    plugin.on_join("hang:*")(handler)
    try:
        served = await serve_plugin(plugin, plugins={"timeout_s": limit_s})
        client, other = await connect(served), await connect(served)
        join_ref, second_ref = await client.join("room:1"), await client.join("room:2")
        other_ref = await other.join("room:1")
        ref = await send_push(client, join_ref, "room:1", "hang")
        join = str(client.next_ref())
        await client.send("9", join, "hang:1", "phx_join", {})
        await eventually(lambda: len(hung) == 2, "both handlers to hang")
        # The same socket's other topics and heartbeats, and other sockets on the same topic, go on meanwhile.
        await client.expect_alive()
        assert await client.push(second_ref, "room:2", "say") == ok()
        assert await other.push(other_ref, "room:1", "say") == ok()
        await other.expect_alive()
        assert +served.relay.metrics.plugin_errors == {}
        answers = [await client.receive(), await client.receive()]
        assert client.reply(join_ref, ref, "room:1", "error", {"reason": "internal error"}) in answers
        assert client.reply("9", join, "hang:1", "error", {"reason": "join crashed"}) in answers
        assert await client.push(join_ref, "room:1", "say") == ok()
        assert +served.relay.metrics.plugin_errors == {"stuck": 2}
        assert [record.getMessage().endswith(f"did not end within {limit_s:g} s") for record in errors_of(caplog)] == [
            True
        ]
    finally:
        released.set()


def test_relay_with_a_handler_that_hangs_in_a_thread_can_be_stopped(tmp_path: Path) -> None:
    directory = put(
        tmp_path,
        "stuck",
        "import threading\nfrom relay import Plugin\nplugin = Plugin('stuck')\n"
        "@plugin.on_join()\ndef hang(join):\n    threading.Event().wait()\n",
    )
    environ = {"RELAY_PLUGINS__PATHS": json.dumps([str(directory)]), "RELAY_PLUGINS__TIMEOUT_S": "0.1"}

    async def join(ws: str) -> None:
        async with Client.connect(ws) as client:
            assert (await ask_to_join(client, "room:1"))[1] == JOIN_CRASHED

    with RelayProcess(environ=environ) as process:
        asyncio.run(join(process.ws))
        assert process.stop(signal.SIGTERM) == 0, process.output
    assert "plugin stuck: hang did not end within 0.1 s" in process.output


async def test_pushes_of_one_socket_and_topic_are_handled_in_order(serve_plugin: ServePlugin, connect: Connect) -> None:
    """Also where an earlier one takes longer, and whichever handler each has."""
    plugin, log, gate = Plugin("p"), [], asyncio.Event()

    @plugin.on_push("room:*", "slow")
    async def slow(push: Push) -> None:
        await gate.wait()
        log.append(push.payload)

    @plugin.on_push("room:*", "plain")
    def plain(push: Push) -> None:
        log.append(push.payload)

    @plugin.on_push("room:*", "quick")
    async def quick(push: Push) -> None:
        log.append(push.payload)

    client = await connect(await serve_plugin(plugin))
    one, two = await client.join("room:1"), await client.join("room:2")
    events = ("slow", "quick", "plain", "quick", "unhandled", "slow", "plain")
    refs = [await send_push(client, one, "room:1", event, number) for number, event in enumerate(events)]
    other = await send_push(client, two, "room:2", "quick", "other")
    assert await client.receive() == client.reply(two, other, "room:2")
    assert log == ["other"]
    gate.set()
    for ref in refs:
        assert await client.receive() == client.reply(one, ref, "room:1")
    assert log == ["other", 0, 1, 2, 3, 5, 6]


# Leaves.


async def test_on_leave_is_called_once_for_each_way_a_subscription_ends(
    serve_plugin: ServePlugin, connect: Connect, both: Both
) -> None:
    plugin, log = Plugin("p"), []
    plugin.on_leave("room:*")(both(lambda leave: log.append(("first", leave.topic, leave.socket.id))))
    plugin.on_leave()(both(lambda leave: log.append(("second", leave.topic, leave.socket.id))))
    served = await serve_plugin(plugin)
    client = await connect(served)
    [socket_id] = served.relay.node.sockets
    socket = served.relay.node.sockets[socket_id]

    async def expect(topic: str, *names: str) -> None:
        await eventually(lambda: len(log) >= len(names), f"on_leave of {topic}")
        await client.expect_alive()
        assert log == [(name, topic, socket_id) for name in names]
        log.clear()

    join_ref = await client.join("room:left")
    assert await client.push(join_ref, "room:left", "phx_leave") == ok()
    assert (await client.receive())[3] == "phx_close"
    await expect("room:left", "first", "second")

    await client.join("room:sent-away")
    assert socket.leave("room:sent-away")
    assert (await client.receive())[3] == "phx_close"
    await expect("room:sent-away", "first", "second")

    await client.join("room:gap")
    served.relay.node.pubsub.on_gap("test")
    assert (await client.receive())[3] == "phx_error"
    await expect("room:gap", "first", "second")

    await client.join("room:twice")
    await ask_to_join(client, "room:twice")
    assert (await client.receive())[3] == "phx_close"
    await expect("room:twice", "first", "second")

    assert await client.push(None, "room:never", "phx_leave") == ok()
    await client.join("elsewhere")
    await client.connection.close()
    await eventually(lambda: len(log) == 3, "on_leave of both topics")
    assert sorted(log) == [
        ("first", "room:twice", socket_id),
        ("second", "elsewhere", socket_id),
        ("second", "room:twice", socket_id),
    ]


@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_leave_of_a_subscription_is_handled_before_the_join_that_follows_it(
    serve_plugin: ServePlugin, connect: Connect, bus: str
) -> None:
    """Else a plugin that keeps a list of members would lose one that is there."""
    plugin, members = Plugin("p"), []
    log: list[str] = []

    @plugin.on_join()
    def enter(join: Join) -> None:
        log.append("join")
        members.append(join.socket.id)

    @plugin.on_leave()
    async def leave(leave: Leave) -> None:
        await asyncio.sleep(0.02)
        log.append("leave")
        members.remove(leave.socket.id)

    served = await serve_plugin(plugin, **({"broadcast_url": "memory://"} if bus == "memory" else {}))
    client = await connect(served)
    for _ in range(3):
        await client.send("1", "1", "room:1", "phx_join", {})
    await client.send("1", "2", "room:1", "phx_leave", {})
    await client.send("3", "3", "room:1", "phx_join", {})
    await eventually(lambda: log == ["join", "leave"] * 3 + ["join"], "all joins and leaves")
    assert members == list(served.relay.node.sockets)
    await client.connection.close()
    await eventually(lambda: not members, "the last leave")


async def test_join_that_was_allowed_in_vain_is_left_too(serve_plugin: ServePlugin, connect: Connect) -> None:
    plugin, log, gate = Plugin("p"), [], asyncio.Event()

    @plugin.on_join()
    async def enter(join: Join) -> None:
        await gate.wait()
        log.append("allowed")

    @plugin.on_leave()
    async def leave(leave: Leave) -> None:
        log.append("left")

    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.send("1", "1", "room:1", "phx_join", {})
    await eventually(lambda: served.relay.metrics.plugin_calls["p"], "the join")
    await client.connection.close()
    await eventually(lambda: not served.relay.node.sockets, "the socket's end")
    gate.set()
    await eventually(lambda: log == ["allowed", "left"], "on_leave")
    assert served.relay.topics == {}


async def test_join_that_the_bus_does_not_take_is_left_too(
    serve_plugin: ServePlugin, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, log = Plugin("p"), []
    plugin.on_join()(lambda join: log.append("allowed"))
    plugin.on_leave()(lambda leave: log.append("left"))
    served = await serve_plugin(plugin, broadcast_url="memory://")
    client = await connect(served)

    async def subscribe(topic: str) -> None:
        raise BusUnavailable("no")

    monkeypatch.setattr(served.relay.node.broker, "subscribe", subscribe)
    assert (await ask_to_join(client, "room:1"))[1] == {"status": "error", "response": {"reason": "bus unavailable"}}
    await eventually(lambda: log == ["allowed", "left"], "on_leave")


async def test_on_leave_is_not_called_for_a_join_that_was_refused(serve_plugin: ServePlugin, connect: Connect) -> None:
    plugin, left = Plugin("p"), []

    @plugin.on_join("room:*")
    def refuse(join: Join) -> None:
        if join.payload.get("no"):
            raise Refused("no")

    plugin.on_leave()(lambda leave: left.append(leave.topic))
    served = await serve_plugin(plugin)
    client = await connect(served)
    await ask_to_join(client, "room:1", {"no": 1})
    await client.join("room:2")
    # A refused rejoin ends what it would have replaced.
    assert (await ask_to_join(client, "room:2", {"no": 1}))[1]["status"] == "error"
    assert (await client.receive())[3] == "phx_close"
    await client.connection.close()
    await eventually(lambda: not served.relay.node.sockets, "the socket's end")
    assert left == ["room:2"]


async def test_fault_in_on_leave_keeps_no_other_handler_from_it(
    serve_plugin: ServePlugin, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    plugin, left = Plugin("p"), []

    @plugin.on_leave()
    def broken(leave: Leave) -> None:
        raise Refused("too late")

    plugin.on_leave()(lambda leave: left.append(leave.topic))
    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.join("room:1")
    await client.connection.close()
    await eventually(lambda: left, "on_leave")
    assert +served.relay.metrics.plugin_errors == {"p": 1}


# Events on their way out.


async def test_event_is_changed_renamed_or_dropped_on_its_way_out(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis, both: Both
) -> None:
    plugin, seen = Plugin("p"), []

    def change(event: Event) -> Event | None:
        seen.append((event.topic, event.event, event.payload))
        if event.payload == "drop":
            return None
        if event.payload == "rename":
            return event.replace(event="renamed")
        if event.payload == "as it is":
            return event
        if isinstance(event.payload, bytes):
            return event.replace(event.payload + b"!")
        return event.replace({"changed": event.payload})

    plugin.on_event("room:*", "new*")(both(change))
    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.join("room:1")
    await client.join("elsewhere")
    for payload in ('"a"', '"drop"', '"rename"', '"as it is"', "not json"):
        await redis.publish("to:room:1:new_msg", payload)
    await redis.publish("to:room:1:old", '"b"')
    await redis.publish("to:room:nobody:new", '"unheard"')
    await client.expect_event("room:1", "new_msg", {"changed": "a"})
    await client.expect_event("room:1", "renamed", "rename")
    await client.expect_event("room:1", "new_msg", "as it is")
    frame = await client.receive_raw()
    assert isinstance(frame, bytes)
    assert frame.endswith(b"new_msgnot json!")
    await client.expect_event("room:1", "old", "b")
    await redis.publish("to:elsewhere:new", '"c"')  # later: the order of two topics is not kept
    await client.expect_event("elsewhere", "new", "c")
    assert [event for _, event, _ in seen] == ["new_msg"] * 5
    assert served.relay.metrics.dropped == {"by a plugin": 1}


async def test_handlers_of_events_are_called_in_order_and_stop_at_a_drop(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis
) -> None:
    plugin = Plugin("p")

    def add(letter: str) -> Callable[[Event], Event | None]:
        return lambda event: None if event.payload == "drop" else event.replace(event.payload + letter)

    async def add_later(event: Event) -> Event:
        await asyncio.sleep(0)
        assert isinstance(event.payload, str)
        return event.replace(event.payload + "b")

    plugin.on_event("*", "new")(add("a"))
    plugin.on_event("later", "new")(add_later)
    plugin.on_event("*", "new")(add("c"))
    served = await serve_plugin(plugin)
    client = await connect(served)
    for topic, expected in (("now", "_ac"), ("later", "_abc")):
        await client.join(topic)
        await redis.publish(f"to:{topic}:new", '"drop"')
        await redis.publish(f"to:{topic}:new", '"_"')
        await client.expect_event(topic, "new", expected)
    assert served.relay.metrics.dropped == {"by a plugin": 2}
    assert +served.relay.metrics.plugin_errors == {}


@pytest.mark.parametrize("fault", ["raises", "refuses", "mistakes", "is cancelled", "panics"])
async def test_event_whose_handler_fails_is_dropped_and_counted(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis, both: Both, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = Plugin("broken")

    def handle(event: Event) -> Any:
        if event.event == "bad":
            if fault == "mistakes":
                return {"not": "an event"}
            errors = {"refuses": Refused("no"), "is cancelled": asyncio.CancelledError(), "panics": Panic("boom")}
            raise errors.get(fault, RuntimeError("boom"))
        return event

    plugin.on_event("room:*")(both(handle))
    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.join("room:1")
    for event in ("bad", "good", "bad", "good"):
        await redis.publish(f"to:room:1:{event}", "1")
    await client.expect_event("room:1", "good", 1)
    await client.expect_event("room:1", "good", 1)
    assert served.relay.metrics.dropped == {"by a plugin": 2}
    assert +served.relay.metrics.plugin_errors == {"broken": 2}
    assert served.relay.metrics.gaps == 0
    assert len(errors_of(caplog)) == 1


@pytest.mark.parametrize("name", ["chan_reply_3", "phx_reply", "a:b", "x" * 256])
@pytest.mark.parametrize("how", ["replaces", "sets"])
async def test_event_renamed_to_a_name_that_cannot_be_is_dropped_and_counted(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis, both: Both, name: str, how: str
) -> None:
    """To phoenix.js ``chan_reply_3`` is the reply to the push with ref 3."""
    plugin = Plugin("renames")

    def rename(event: Event) -> Event:
        if how == "replaces":
            return event.replace(event=name)
        event.event = name
        return event

    plugin.on_event("room:*", "old")(both(rename))
    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.join("room:1")
    for event in ("old", "good"):
        await redis.publish(f"to:room:1:{event}", "1")
    await client.expect_event("room:1", "good", 1)
    assert served.relay.metrics.dropped == {"by a plugin": 1}
    assert +served.relay.metrics.plugin_errors == {"renames": 1}


UNREADABLE = {"5000 digits": b"9" * 5000, "too large": b"1e999", "too small": b"-1e999", "in a list": b"[{},[1e999]]"}
"""JSON that Python cannot read."""


@pytest.mark.parametrize("payload", UNREADABLE.values(), ids=UNREADABLE)
async def test_payload_that_cannot_be_read_is_the_clients_fault(
    serve_plugin: ServePlugin, connect: Connect, both: Both, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = Plugin("reads")

    def join(join: Join) -> None:
        assert join.payload != 1

    def push(push: Push) -> object:
        push.stop()
        return {"read": push.payload == 1} if push.event == "read" else None

    plugin.on_join("room:*")(both(join))
    plugin.on_push("room:*")(both(push))
    served = await serve_plugin(plugin)
    client = await connect(served)
    refused = {"status": "error", "response": {"reason": "invalid payload"}}
    await client.send_raw(f'["1","1","room:1","phx_join",{{"a":{payload.decode()}}}]')
    assert (await client.receive())[4] == refused
    await client.join("room:1")
    await client.send_raw(f'[null,"2","room:1","read",{{"a":{payload.decode()}}}]')
    assert (await client.receive())[4] == refused
    await client.send_raw(f'[null,"3","room:1","unread",{{"a":{payload.decode()}}}]')
    assert (await client.receive())[4] == ok()
    assert served.relay.metrics.refused["invalid payload"] == 2
    assert +served.relay.metrics.plugin_errors == {}
    assert errors_of(caplog) == []


@pytest.mark.parametrize(("depth", "is_read"), [(250, True), (255, True), (256, False), (500, False), (750, False)])
@pytest.mark.parametrize("answer", ["return", "reply", "broadcast", "push", "join"])
async def test_nested_payload_is_answered_as_it_came_or_is_the_clients_fault(
    serve_plugin: ServePlugin, connect: Connect, both: Both, answer: str, depth: int, is_read: bool
) -> None:
    """What a handler may read it may also send on, with levels of its own around it."""
    plugin = Plugin("echo")

    def join(join: Join) -> object:
        return {"in": {"it": join.payload}}

    def push(push: Push) -> object:
        push.stop()
        payload = {"in": {"it": push.payload}}
        if answer == "reply":
            push.reply(payload)
        elif answer == "broadcast":
            _ = push.broadcast("echo", payload)
        elif answer == "push":
            push.socket.push(push.topic, "echo", payload)
        return payload if answer == "return" else None

    plugin.on_join("room:2")(both(join))
    plugin.on_push("room:1")(both(push))
    served = await serve_plugin(plugin)
    client = await connect(served)
    nested = '{"a":' + "[" * depth + "null" + "]" * depth + "}"
    if answer == "join":
        await client.send_raw(f'["1","1","room:2","phx_join",{nested}]')
    else:
        await client.join("room:1")
        await client.send_raw(f'[null,"1","room:1","read",{nested}]')
    texts = [str(await client.receive_raw())]
    if is_read and answer in ("broadcast", "push"):
        texts.append(str(await client.receive_raw()))
    assert any(nested in text for text in texts) == is_read
    assert +served.relay.metrics.plugin_errors == {}
    assert +served.relay.metrics.refused == ({} if is_read else {"invalid payload": 1})


@pytest.mark.parametrize("payload", [*UNREADABLE.values(), b'"\\ud83d"'], ids=[*UNREADABLE, "half a surrogate pair"])
async def test_event_that_cannot_be_read_is_the_publishers_fault(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis, both: Both, payload: bytes
) -> None:
    """It is dropped for a reason of its own; where no handler reads it, it passes as it came."""
    plugin = Plugin("reads")

    def read(event: Event) -> Event | None:
        return event if event.payload is not None else None

    plugin.on_event("room:*", "read")(both(read))
    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.join("room:1")
    await redis.publish("to:room:1:read", payload)
    await redis.publish("to:room:1:unread", payload)
    frame = await client.receive_raw()
    assert isinstance(frame, str)
    assert frame.encode() == b'[null,null,"room:1","unread",%b]' % payload
    assert served.relay.metrics.dropped == {"invalid payload": 1}
    assert +served.relay.metrics.plugin_errors == {}


async def test_handler_that_reads_another_pushs_payload_is_at_fault_itself(
    serve_plugin: ServePlugin, connect: Connect
) -> None:
    plugin, kept = Plugin("keeps"), list[Push]()

    @plugin.on_push("room:*")
    async def push(push: Push) -> object:
        push.stop()
        kept.append(push)
        return kept[0].payload if push.event == "first" else None

    served = await serve_plugin(plugin)
    client = await connect(served)
    join_ref = await client.join("room:1")
    await client.send_raw('[null,"2","room:1","keep",{"a":1e999}]')
    assert (await client.receive())[4] == ok()
    failed = {"status": "error", "response": {"reason": "internal error"}}
    assert await client.push(join_ref, "room:1", "first") == failed
    assert +served.relay.metrics.plugin_errors == {"keeps": 1}


async def test_events_of_a_topic_stay_in_order_behind_a_slow_handler(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis
) -> None:
    plugin, gate = Plugin("p"), asyncio.Event()

    @plugin.on_event("slow", "wait")
    async def wait(event: Event) -> Event:
        await gate.wait()
        return event

    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.join("slow")
    await client.join("quick")
    for number, event in enumerate(("go", "wait", "go", "wait", "go"), 1):
        await redis.publish(f"to:slow:{event}", str(number))
    await redis.publish("to:quick:go", "0")
    await client.expect_event("slow", "go", 1)
    await client.expect_event("quick", "go", 0)  # other topics go on
    gate.set()
    for number, event in enumerate(("wait", "go", "wait", "go"), 2):
        await client.expect_event("slow", event, number)


async def test_event_handler_that_hangs_is_cut_and_its_topic_goes_on(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis
) -> None:
    plugin = Plugin("stuck")

    @plugin.on_event("room:*", "hang")
    async def hang(event: Event) -> Event:
        await asyncio.Event().wait()
        return event

    served = await serve_plugin(plugin, plugins={"timeout_s": 0.1})
    client = await connect(served)
    await client.join("room:1")
    await redis.publish("to:room:1:hang", "1")
    await redis.publish("to:room:1:go", "2")
    await client.expect_event("room:1", "go", 2)
    assert +served.relay.metrics.plugin_errors == {"stuck": 1}
    assert served.relay.metrics.dropped == {"by a plugin": 1}


async def test_events_too_many_for_a_hanging_handler_are_dropped_and_counted_and_hold_up_no_other_topic(
    serve_plugin: ServePlugin,
    connect: Connect,
    redis: Redis,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(pubsub, "_EVENTS_WAITING", 3)
    plugin, gate = Plugin("p"), asyncio.Event()

    @plugin.on_event("stuck:*")
    async def wait(event: Event) -> Event:
        await gate.wait()
        return event

    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.join("stuck:1")
    await client.join("free:1")
    for number in range(10):
        await redis.publish("to:stuck:1:n", str(number))
    for number in range(10):
        await redis.publish("to:free:1:n", str(number))
    for number in range(10):
        await client.expect_event("free:1", "n", number)
    assert served.relay.metrics.dropped == {"on_event handler too slow": 6}
    assert "event on topic 'stuck:1' dropped: plugins are too slow" in caplog.text
    gate.set()
    for number in range(4):
        await client.expect_event("stuck:1", "n", number)
    await client.expect_alive()


async def test_handler_that_keeps_up_loses_none_of_a_burst(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis
) -> None:
    """One read from Redis brings some thousand small events at once, all before the handler's first turn."""
    plugin = Plugin("p")

    @plugin.on_event("burst:*")
    async def pass_on(event: Event) -> Event:
        await asyncio.sleep(0)
        return event

    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.join("burst:1")
    async with redis.pipeline(transaction=False) as pipeline:
        for number in range(5000):
            _ = pipeline.publish("to:burst:1:n", number)
        await pipeline.execute()
    for number in range(5000):
        await client.expect_event("burst:1", "n", number)
    assert served.relay.metrics.dropped == {}


# Foreign Redis channels.


async def test_foreign_redis_channel_becomes_events(serve_plugin: ServePlugin, connect: Connect, redis: Redis) -> None:
    """JSON lines, as a feed of positions has them."""
    plugin = Plugin("aircraft")

    @plugin.on_redis("test-feed*")
    async def decode(message: RedisMessage, relay: Relay) -> None:
        for line in message.data.splitlines():
            position = json.loads(line)
            tile = f"{position['latitude'] // 10:.0f}"
            await relay.broadcast(f"aircraft:{tile}", "position", {"icao24": position["icao24"]})

    client = await connect(await serve_plugin(plugin))
    await client.join("aircraft:4")
    lines = [{"icao24": f"a{number}", "latitude": 43.6 if number % 2 else 51.0} for number in range(6)]
    await redis.publish("test-feed-1", "\n".join(json.dumps(line) for line in lines))
    await redis.publish("another-feed", "not for us")
    for number in (1, 3, 5):
        await client.expect_event("aircraft:4", "position", {"icao24": f"a{number}"})
    await client.expect_alive()


async def test_foreign_messages_are_handled_in_order_by_each_handler(
    serve_plugin: ServePlugin, redis: Redis, both: Both
) -> None:
    plugin, other, heard, noted = Plugin("p"), Plugin("other"), [], []

    def handle(message: RedisMessage, relay: Relay) -> None:
        heard.append((message.channel, int(message.data)))
        if message.data == b"3":
            raise Refused("only on_join and on_push may")

    def note(message: RedisMessage, relay: Relay) -> None:
        noted.append(int(message.data))

    plugin.on_redis("test-order-?")(both(handle))
    other.on_redis("test-order-?")(both(note))
    other.on_redis("test-order-a")(both(note))
    served = await serve_plugin(plugin, other)
    for number in range(20):
        await redis.publish("test-order-a", number)
    await eventually(lambda: len(heard) == 20 and len(noted) == 40, "all messages")
    assert heard == [("test-order-a", number) for number in range(20)]
    assert sorted(noted) == sorted([*range(20), *range(20)])
    assert +served.relay.metrics.plugin_errors == {"p": 1}


async def test_relays_own_channels_can_be_listened_to_as_well(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis
) -> None:
    """Redis tells of a pattern once, whoever of one connection asked for it."""
    plugin, heard = Plugin("p"), []

    @plugin.on_redis("to:*")
    async def note(message: RedisMessage, relay: Relay) -> None:
        if message.channel == "to:own:1:e":
            heard.append(message.data)

    client = await connect(await serve_plugin(plugin))
    await client.join("own:1")
    await redis.publish("to:own:1:e", "1")
    await client.expect_event("own:1", "e", 1)
    await eventually(lambda: heard == [b"1"], "the raw message")


async def test_messages_too_many_for_a_slow_handler_are_dropped_and_counted(
    serve_plugin: ServePlugin, redis: Redis, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pubsub, "_EVENTS_WAITING", 2)
    plugin, heard, gate = Plugin("slow"), [], asyncio.Event()

    @plugin.on_redis("test-flood")
    async def handle(message: RedisMessage, relay: Relay) -> None:
        await gate.wait()
        heard.append(int(message.data))

    served = await serve_plugin(plugin)
    for number in range(10):
        await redis.publish("test-flood", number)
    dropped = served.relay.metrics.dropped
    await eventually(lambda: dropped["on_redis handler too slow"] == 7, "the drops")
    gate.set()
    await eventually(lambda: len(heard) == 3, "the rest")
    assert heard == [0, 1, 2]
    assert "message on test-flood dropped: plugin slow is too slow" in caplog.text


async def test_foreign_channels_need_redis() -> None:
    plugin = Plugin("feed")
    plugin.on_redis("feed*")(lambda message, relay: None)
    relay = Relay(broadcast_url="memory://", extra_plugins=(plugin,))
    with pytest.raises(ConfigError, match="plugin feed listens with on_redis, which needs redis_url"):
        await relay.start()


# Services, start and stop.


@pytest.fixture
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Services are started again at once; the list holds the waits there would have been."""
    monkeypatch.setattr(node, "_SERVICE_BACKOFF_S", 10)
    monkeypatch.setattr(node, "_SERVICE_BACKOFF_MAX_S", 40)
    waits: list[float] = []

    def uniform(low: float, high: float) -> float:
        waits.append(high)
        return 0.001

    monkeypatch.setattr(node.random, "uniform", uniform)  # type: ignore[attr-defined]
    return waits


async def test_service_that_dies_is_started_again_with_back_off_and_counted(
    serve_plugin: ServePlugin,
    quick_backoff: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plugin, runs, clock = Plugin("dying"), [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(node, "time", SimpleNamespace(monotonic=lambda: clock.now))
    forever = asyncio.Event()

    async def cancelled_by_itself() -> None:
        task = asyncio.create_task(asyncio.sleep(20))
        await asyncio.sleep(0)
        task.cancel()
        await task

    @plugin.service
    async def dies(relay: Relay) -> None:
        runs.append(relay)
        match len(runs):
            case 1 | 2:
                raise RuntimeError("boom")
            case 3:
                return
            case 4:
                await cancelled_by_itself()
            case 5:
                sys.exit("usage")
            case 6:
                clock.now += 41  # it has lived long enough for the wait to begin anew
            case 7:
                await forever.wait()

    served = await serve_plugin(plugin)
    await eventually(lambda: len(runs) == 7, "the seventh start")
    assert set(runs) == {served.relay}
    assert +served.relay.metrics.plugin_errors == {"dying": 4}
    assert +served.relay.metrics.plugin_calls == {"dying": 7}
    assert quick_backoff == [10, 20, 40, 40, 40, 10]
    assert len(errors_of(caplog)) == 1
    assert "service" in errors_of(caplog)[0].getMessage()
    assert "has ended; starting it again" in caplog.text


async def test_service_that_resists_its_end_does_not_keep_the_relay_from_stopping(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    plugin, ended, released = Plugin("stubborn"), [], asyncio.Event()

    @plugin.service
    async def resists(relay: Relay) -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                ended.append("resists")

    @plugin.service
    async def breaks(relay: Relay) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError("in its cleaning up")

    @plugin.on_shutdown
    def over(relay: Relay) -> None:
        ended.append("shutdown")

    relay = Relay(redis_url=valkey.url, extra_plugins=(plugin,), system_topic=False, limits={"close_timeout_s": 0.05})
    async with relay.lifespan():
        await eventually(lambda: relay.metrics.plugin_calls["stubborn"] == 2, "the services")
    assert ended == ["resists", "shutdown"]
    assert [record.getMessage().endswith("raised at its end:") for record in errors_of(caplog)] == [True]
    released.set()
    await eventually(lambda: len(asyncio.all_tasks()) == 1, "the service to end at last")


async def test_plugins_start_before_and_stop_after_all_sockets(valkey: Valkey, both: Both) -> None:
    plugin, log = Plugin("p"), []

    def note(word: str) -> Callable[[Any], Any]:
        return both(lambda given: log.append(word))

    plugin.on_startup(note("startup 1"))
    plugin.on_startup(note("startup 2"))
    plugin.on_join()(note("join"))
    plugin.on_leave()(note("leave"))
    plugin.on_shutdown(note("shutdown 1"))

    def broken(relay: Relay) -> None:
        raise Refused("no")

    plugin.on_shutdown(both(broken))
    plugin.on_shutdown(note("shutdown 3"))
    relay = Relay(redis_url=valkey.url, extra_plugins=(plugin,), system_topic=False)
    async with AsyncExitStack() as stack:
        async with serve(relay) as served:
            client = await stack.enter_async_context(Client.connect(served.ws))
            assert (await ask_to_join(client, "room:1"))[1] == ok()
        assert (await client.expect_closed())[0] == 1012
    assert log == ["startup 1", "startup 2", "join", "leave", "shutdown 1", "shutdown 3"]
    assert +relay.metrics.plugin_errors == {"p": 1}


@pytest.mark.parametrize("fault", [RuntimeError("no database"), Refused("no database")])
async def test_plugin_that_fails_to_start_stops_the_start_with_its_name(
    valkey: Valkey, both: Both, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    plugin, log = Plugin("needs-database"), []

    def broken(relay: Relay) -> None:
        raise fault

    plugin.on_startup(both(broken))
    plugin.on_startup(both(lambda relay: log.append("never")))
    plugin.on_shutdown(both(lambda relay: log.append("shutdown")))
    relay = Relay(redis_url=valkey.url, extra_plugins=(plugin,), system_topic=False)
    with pytest.raises(ConfigError, match="plugin needs-database failed to start: its on_startup raised"):
        await relay.start()
    assert log == ["shutdown"]
    assert not relay.link.live
    assert len(errors_of(caplog)) == 1


# The command line.


def run_relay(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    return subprocess.run(
        [sys.executable, "-m", "relay", *arguments],
        cwd=cwd,
        env={**own, "PYTHONPATH": str(Path(__file__).parents[2]), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_list_of_plugins_says_where_what_and_what_failed(tmp_path: Path) -> None:
    put(tmp_path / "plugins", "broken", "raise RuntimeError('no database')")
    put(tmp_path / "plugins", "chat", ANSWERS.format(name="chat"))
    put(tmp_path / "plugins", "example", SEED)
    paths = json.dumps([str(tmp_path / "plugins")])
    listed = run_relay("plugins", cwd=tmp_path, RELAY_PLUGINS__PATHS=paths)
    directory = tmp_path / "plugins"
    chat = {"name": "chat", "source": f"{directory}/chat", "registers": ["on_push chat:* who → who"], "fault": None}
    assert [json.loads(line) for line in listed.stdout.splitlines()] == [
        {"name": "system", "source": "built-in", "registers": ["service → tell"], "fault": None},
        {"name": "broken", "source": f"{directory}/broken", "registers": [], "fault": "RuntimeError: no database"},
        chat,
        {"name": "example", "source": f"{directory}/example", "registers": ["register_plugin(app)"], "fault": None},
    ]
    assert listed.stderr == ""
    assert listed.returncode == 1
    listed = run_relay(
        "plugins",
        cwd=tmp_path,
        RELAY_PLUGINS__PATHS=paths,
        RELAY_PLUGINS__DISABLED='["broken", "example"]',
        RELAY_SYSTEM_TOPIC="false",
    )
    assert json.loads(listed.stdout) == chat
    assert listed.returncode == 0


def test_new_plugin_is_written_listed_and_served(tmp_path: Path) -> None:
    """The commands it prints are the ones to type next."""
    written = run_relay("new-plugin", "hello", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.splitlines()[0] == "wrote plugins/hello/"
    found = re.search(r"RELAY_PLUGINS__PATHS='(.*)' relay serve", written.stdout)
    assert found is not None
    listed = run_relay("plugins", cwd=tmp_path, RELAY_PLUGINS__PATHS=found[1], RELAY_SYSTEM_TOPIC="false")
    registers = ["on_join hello:* → welcome", "on_push hello:* say → say", "route GET /hello/"]
    assert json.loads(listed.stdout) == {
        "name": "hello",
        "source": "plugins/hello",
        "registers": registers,
        "fault": None,
    }
    assert listed.returncode == 0
    again = run_relay("new-plugin", "hello", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == "relay: NAME: plugins/hello exists already\n"
    with RelayProcess(environ={"RELAY_PLUGINS__PATHS": json.dumps([str(tmp_path / "plugins")])}) as process:
        with urlopen(f"{process.http}/api/hello/", timeout=20) as response:
            assert json.load(response) == {"plugin": "hello"}


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_plugin_that_cannot_be_imported_stops_the_server_or_is_skipped(tmp_path: Path, on_error: str) -> None:
    directory = put(tmp_path, "broken", "raise RuntimeError('no database')")
    environ = {"RELAY_PLUGINS__PATHS": json.dumps([str(directory)]), "RELAY_PLUGINS__ON_ERROR": on_error}
    if on_error == "stop":
        ended = run_relay("serve", "--port", "0", cwd=tmp_path, **environ)
        assert ended.returncode == 2
        assert ended.stderr.startswith(
            f"relay: plugin broken ({directory}/broken) cannot be loaded: RuntimeError: no database\nTraceback"
        )
    else:
        with RelayProcess(environ=environ) as process:
            assert process.stop() == 0
        assert "broken" in process.output
        assert "going on without: RuntimeError: no database" in process.output


def test_socket_given_to_handlers_is_what_the_types_say() -> None:
    """`relay.plugins.hooks.Socket` is the promise; the real one has all of it."""
    from relay.channels.socket import Socket as RealSocket

    promised = {name for name in dir(Socket) if not name.startswith("_")}
    assert promised == {"address", "claims", "disconnect", "id", "leave", "push", "query", "user"}
    assert promised <= set(dir(RealSocket))


# Every kind of callable.


class Recording:
    """An object that is called as a coroutine function is."""

    def __init__(self, answer: Callable[[Any], Any] = lambda given: None) -> None:
        self.given: list[Any] = []
        self.loops: list[Any] = []
        self._answer = answer

    async def __call__(self, given: Any, *_: Any) -> Any:
        self.given.append(given)
        self.loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return self._answer(given)


def returning(handler: Recording) -> Callable[..., Any]:
    """A plain function that returns an awaitable."""
    return lambda *arguments: handler(*arguments)


@pytest.mark.parametrize("kind", [lambda handler: handler, partial, returning], ids=["object", "partial", "returning"])
async def test_handlers_of_every_kind_are_awaited_at_every_hook(
    kind: Callable[[Recording], Any], connect: Connect, redis: Redis, valkey: Valkey
) -> None:
    plugin = Plugin("kinds")
    leave, heard, starting, ending, serving = (Recording() for _ in range(5))
    join = Recording(lambda given: {"joined": given.topic})
    push = Recording(lambda given: {"pushed": given.event})
    event = Recording(lambda given: given.replace({"seen": True}))
    person = Recording(lambda given: {"sub": "ada"})
    plugin.on_join()(kind(join))
    plugin.on_leave()(kind(leave))
    plugin.on_push()(kind(push))
    plugin.on_event()(kind(event))
    plugin.on_redis("kinds-feed")(kind(heard))
    plugin.on_startup(kind(starting))
    plugin.on_shutdown(kind(ending))
    if kind is not returning:  # a service must be known to be one
        plugin.service(kind(serving))
    auth = {"authenticated": [{"match": "*", "rights": ["join", "push"]}]}
    relay = Relay(
        extra_plugins=(plugin,), redis_url=valkey.url, system_topic=False, auth=auth, authenticate=kind(person)
    )
    async with serve(relay) as served:
        client = await connect(served)
        join_ref, reply = await ask_to_join(client, "kinds:1")
        assert reply == ok({"joined": "kinds:1"})
        assert await client.push(join_ref, "kinds:1", "say", {}) == ok({"pushed": "say"})
        await redis.publish("to:kinds:1:new", "{}")
        await client.expect_event("kinds:1", "new", {"seen": True})
        await redis.publish("kinds-feed", "line")
        await eventually(lambda: bool(heard.given), "the message of the feed")
        assert await client.push(join_ref, "kinds:1", "phx_leave") == ok()
        await eventually(lambda: bool(leave.given), "the leave")
        await eventually(lambda: kind is returning or bool(serving.given), "the service")
        assert not any(served.relay.metrics.plugin_errors.values())
    here = asyncio.get_running_loop()
    for one in (join, leave, push, event, heard, starting, ending, person):
        assert one.given and set(one.loops) == {here}, "in the relay's own loop"


async def test_events_of_a_topic_stay_in_order_where_a_plain_function_returns_an_awaitable(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis
) -> None:
    plugin, calls = Plugin("p"), []

    async def later(event: Event) -> Event | None:
        await asyncio.sleep(0.01 if event.payload % 2 else 0)
        return None if event.payload == 3 else event.replace(event.payload * 10)

    def last(event: Event) -> Event:
        calls.append(event.payload)
        return event

    plugin.on_event()(lambda event: later(event))
    plugin.on_event()(last)
    served = await serve_plugin(plugin)
    client = await connect(served)
    await client.join("room:1")
    for number in range(6):
        await redis.publish("to:room:1:n", str(number))
    for number in (0, 1, 2, 4, 5):
        await client.expect_event("room:1", "n", number * 10)
    assert calls == [0, 10, 20, 40, 50]
    assert served.relay.metrics.dropped == {"by a plugin": 1}


async def test_awaitable_of_a_plain_function_that_fails_or_hangs_costs_its_event(
    serve_plugin: ServePlugin, connect: Connect, redis: Redis
) -> None:
    plugin = Plugin("p")

    async def fails(event: Event) -> Event:
        if event.payload == "hang":
            await asyncio.Event().wait()
        if event.payload == "raise":
            raise ValueError("broken")
        return event

    plugin.on_event()(lambda event: fails(event))
    served = await serve_plugin(plugin, plugins={"timeout_s": 0.2})
    client = await connect(served)
    await client.join("room:1")
    for word in ("raise", "hang", "pass"):
        await redis.publish("to:room:1:e", json.dumps(word))
    await client.expect_event("room:1", "e", "pass")
    assert served.relay.metrics.dropped == {"by a plugin": 2}
    assert served.relay.metrics.plugin_errors == {"p": 2}


def test_hanging_handler_does_not_keep_the_process_alive() -> None:
    """The standard library's thread pool joins its threads at exit, and would wait for ever."""
    script = """
import asyncio, threading, time
from relay.plugins.dispatcher import HandlerRunner, HandlerError
from relay.plugins.hooks import Hook
from relay.telemetry import Telemetry

later = threading.Event()

def hangs(argument):
    threading.Event().wait()

def ends_late(argument):
    later.wait()

async def main():
    runner = HandlerRunner(0.05, Telemetry())
    for function in (hangs, ends_late):
        try:
            await runner.call(Hook("p", function), None)
        except HandlerError:
            print("given up")
    runner.close()

asyncio.run(main())
later.set()  # its thread finds the loop closed
time.sleep(0.1)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0
    assert ended.stdout == "given up\ngiven up\n"
    assert "Exception in thread" not in ended.stderr
