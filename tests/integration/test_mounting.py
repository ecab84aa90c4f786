"""The relay inside somebody's own app, under the servers people use, with a real client each time."""

import asyncio
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx2 as httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException
from fastapi.middleware.cors import CORSMiddleware
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from websockets.exceptions import InvalidStatus

from relay import Plugin, Relay
from tests.support.client import TEXT, Client, RawSocket
from tests.support.long_poll import Poller
from tests.support.node import need_browser, need_node, run_checks
from tests.support.process import DEADLINE_S, Valkey, wait_for
from tests.support.servers import AppServer
from tests.support.serving import Served, serve
from tests.support.sse import Stream

HINT = "relay started by its first request; `relay.install(app)` starts it with your app"


def memory_relay(**settings: Any) -> Relay:
    """A relay on a bus of its own, in the process."""
    return Relay(**{"broadcast_url": "memory://", "system_topic": False, **settings})


async def converse(served: Served, topic: str = "room:1", **options: Any) -> str:
    """Join, push, hear an event from the team's own code, leave; returns how the socket is written to."""
    async with Client.connect(served.ws, **options) as client:
        join_ref = await client.join(topic)
        assert await client.push(join_ref, topic, "shout", 1) == {"status": "ok", "response": {}}
        await served.relay.broadcast(topic, "new_msg", {"text": "hi"})
        await client.expect_event(topic, "new_msg", {"text": "hi"})
        (socket,) = [socket for socket in served.relay.node.sockets.values() if topic in socket.topics]
        return socket.write_mode


async def get(url: str, **options: Any) -> httpx.Response:
    """One GET, on a connection of its own, redirects not followed."""
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(url, **options)


async def refusal(served: Served, **headers: str) -> httpx.Response:
    """The answer to a handshake that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with Client.connect(served.ws, additional_headers=headers):
            pass
    refused = caught.value.response
    return httpx.Response(refused.status_code, content=bytes(refused.body or b""))


# install().


@pytest.mark.parametrize("direct", [True])
async def test_relay_that_asks_nobody_answers_this_machine_alone_wherever_it_is_mounted(direct: bool) -> None:
    """The app may listen anywhere, and a relay deep inside it does not know where. Uvicorn looks behind a proxy."""
    for settings, is_open in (({}, False), ({"allow_anonymous": True}, True)):
        relay, inner, app = memory_relay(**settings), Starlette(), FastAPI()
        relay.install(inner)
        app.mount("/inner", inner)
        async with relay.lifespan(), serve(relay, app=app, prefix="/inner/relay", direct=direct) as served:
            await converse(served)
            if is_open:
                await converse(served, additional_headers={"X-Forwarded-For": "192.0.2.7"})
                continue
            answer = await refusal(served, **{"X-Forwarded-For": "192.0.2.7"})
            assert answer.status_code == 403
            assert "set auth, authenticate= or allow_anonymous" in answer.text
            assert relay.metrics.refused == {"handshake: from another machine": 1}


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_installed_relay_serves_sockets_and_pages(framework: Any, direct: bool) -> None:
    app, relay = framework(), memory_relay()
    relay.install(app, path="/relay")
    async with serve(relay, app=app, prefix="/relay", direct=direct) as served:
        assert await converse(served) == ("direct" if direct else "asgi")
        assert (await get(f"{served.http}/health")).json()["status"] == "ok"
        assert (await get(f"{served.http}/ready")).json() == {"status": "ready"}
        assert (await get(f"{served.http}/api/topics")).json() == []


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
async def test_relay_is_up_before_the_apps_own_start_and_down_after_its_end(framework: Any) -> None:
    """The app's code may broadcast while it starts and while it ends; its lifespan state is its own."""
    relay, seen = memory_relay(), []

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, str]]:
        seen.append(("start", relay.link.live))
        await relay.broadcast("room:1", "starting", {})
        yield {"database": "connected"}
        await relay.broadcast("room:1", "ending", {})
        seen.append(("end", relay.link.live))

    async def show(request: Request) -> Response:
        return PlainTextResponse(request.state.database)

    app = framework(lifespan=lifespan, routes=[Route("/state", show)])
    relay.install(app)
    async with serve(relay, app=app, prefix="/relay") as served:
        assert seen == [("start", True)]
        assert (await get(served.http.removesuffix("/relay") + "/state")).text == "connected"
        await converse(served)
    assert seen == [("start", True), ("end", True)]
    assert not relay.link.live


async def test_app_that_fails_to_start_stops_the_relay() -> None:
    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        raise RuntimeError("no database")
        yield

    app, relay = Starlette(lifespan=lifespan), memory_relay()
    relay.install(app)
    with pytest.raises(RuntimeError, match="no database"):
        async with app.router.lifespan_context(app):
            pass
    assert relay.link.reason == "the relay is not running"


async def test_installed_relay_logs_no_hint(caplog: pytest.LogCaptureFixture) -> None:
    app, relay = Starlette(), memory_relay()
    relay.install(app)
    async with serve(relay, app=app, prefix="/relay") as served:
        await converse(served)
    assert HINT not in caplog.text


# A plain mount.


async def test_plain_mount_is_started_once_by_the_first_of_many_connections(
    caplog: pytest.LogCaptureFixture, direct: bool
) -> None:
    starts = 0
    plugin = Plugin("counting")

    @plugin.on_startup
    async def started(relay: Any) -> None:
        nonlocal starts
        starts += 1

    app = Starlette()
    relay = memory_relay(extra_plugins=(plugin,))
    app.mount("/relay", relay)
    try:
        async with serve(relay, app=app, prefix="/relay", direct=direct) as served:
            assert starts == 0
            await asyncio.gather(*(converse(served, f"room:{number}") for number in range(20)))
            assert (await get(f"{served.http}/ready")).status_code == 200
    finally:
        await relay.stop()
    assert starts == 1
    hints = [record for record in caplog.records if record.getMessage() == HINT]
    assert len(hints) == 1
    assert hints[0].levelno == logging.WARNING


async def test_nested_mounts_and_several_relays_keep_apart(direct: bool) -> None:
    first, second, third = memory_relay(), memory_relay(socket_paths=["/live", "/other"]), memory_relay()
    inner = Starlette()
    inner.mount("/relay", first)
    app = FastAPI()
    app.mount("/deep/er", inner)
    second.install(app, "/second")
    third.install(app, "/deep/third")
    async with AsyncExitStack() as stack, first.lifespan(), serve(first, app=app, direct=direct) as served:
        places = [
            Served(first, served.port, "/deep/er/relay"),
            Served(second, served.port, "/second"),
            Served(third, served.port, "/deep/third"),
        ]
        urls = [place.ws for place in places]
        urls[1] = urls[1].removesuffix("/socket") + "/other"
        clients = [await stack.enter_async_context(Client.connect(url)) for url in urls]
        for client in clients:
            await client.join("room:1")
        for number, place in enumerate(places):
            await place.relay.broadcast("room:1", "only", number)
            assert (await get(f"{place.http}/api/topics")).json() == [{"topic": "room:1", "sockets": 1}]
            schema = (await get(f"{place.http}/api/openapi.json")).json()
            assert schema["servers"] == [{"url": f"{place.prefix}/api"}]
        for number, client in enumerate(clients):
            await client.expect_event("room:1", "only", number)
            await client.expect_alive()
        await stack.aclose()


async def test_relay_at_the_root_beside_the_apps_own_routes() -> None:
    async def hello(request: Request) -> Response:
        return PlainTextResponse("hello")

    relay = memory_relay()
    app = Starlette(routes=[Route("/hello", hello)])
    relay.install(app, "/")
    async with serve(relay, app=app) as served:
        await converse(served)
        assert (await get(f"{served.http}/hello")).text == "hello"
        assert (await get(f"{served.http}/health")).status_code == 200


# Prefixes that the app does not see.


async def test_root_path_of_the_server(direct: bool) -> None:
    """A proxy in front that strips ``/outer``, and ``uvicorn --root-path /outer``, which puts it back."""
    relay, app = memory_relay(), FastAPI()
    relay.install(app)
    async with serve(relay, app=app, prefix="/relay", direct=direct, root_path="/outer") as served:
        await converse(served)
        schema = (await get(f"{served.http}/api/openapi.json")).json()
        assert schema["servers"] == [{"url": "/outer/relay/api"}]
        assert "'/outer/relay/api/openapi.json'" in (await get(f"{served.http}/api/docs")).text
        page = await get(f"{served.http}/")
        assert page.status_code == 200
        assert 'href="static/page.css"' in page.text
        assert (await get(f"{served.http}/static/relay.js")).status_code == 200


async def test_stripping_proxy_in_front_and_our_own_behind() -> None:
    """The relay's own ``[[proxy]]`` strips as well as any, and says what it has stripped."""
    inner, app = memory_relay(allow_anonymous=True), Starlette()
    inner.install(app)
    async with serve(inner, app=app, prefix="/relay") as behind:
        target = behind.http.removesuffix("/relay")
        outer = memory_relay(proxy=[{"prefix": "/outer", "target": target}])
        async with serve(outer) as served:
            assert (await get(f"{served.http}/outer/relay/ready")).json() == {"status": "ready"}
            page = await get(f"{served.http}/outer/relay/")
            assert page.status_code == 200
            for asset in re.findall(r'(?:href|src)="(static/[^"]+)"', page.text):
                assert (await get(f"{served.http}/outer/relay/{asset}")).status_code == 200


async def test_page_and_client_work_under_a_prefix() -> None:
    """Every address of the page is relative to it, so that nothing needs to know the prefix."""
    relay, app = memory_relay(socket_paths=["/live"]), FastAPI()
    relay.install(app, "/deep/relay")
    async with serve(relay, app=app, prefix="/deep/relay") as served:
        page = await get(served.http, follow_redirects=True)
        assert str(page.url) == f"{served.http}/"
        assert 'content="live"' in page.text
        assets = re.findall(r'(?:href|src)="([^"]+)"', page.text)
        assert {asset for asset in assets if asset.startswith("/")} == set()
        for asset in [*(asset for asset in assets if asset.startswith("static/")), "static/relay.js"]:
            answer = await get(f"{served.http}/{asset}")
            assert answer.status_code == 200, asset
            assert answer.content
        assert "javascript" in (await get(f"{served.http}/static/relay.js")).headers["content-type"]


async def test_page_works_in_a_browser_under_a_prefix(valkey: Valkey) -> None:
    need_browser()
    relay, app = Relay(redis_url=valkey.url), FastAPI()
    relay.install(app, "/deep/relay")
    async with serve(relay, app=app, prefix="/deep/relay") as served:
        await asyncio.to_thread(run_checks, "page-chromium.mjs", served.http, "-", "--width=1280", redis_url=valkey.url)


async def test_published_client_works_under_a_prefix(valkey: Valkey) -> None:
    need_node()
    relay, app = Relay(redis_url=valkey.url, system_topic=False), FastAPI()
    relay.install(app, "/relay")
    async with serve(relay, app=app, prefix="/relay") as served:
        await asyncio.to_thread(run_checks, "phoenix-node.mjs", "phoenix-1.8", served.ws, redis_url=valkey.url)


# The app's own middleware.


async def test_middleware_of_the_app_is_around_it_all(direct: bool) -> None:
    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1"]),
        Middleware(CORSMiddleware, allow_origins=["https://app.example"], allow_methods=["*"]),
        Middleware(SessionMiddleware, secret_key="x"),
        Middleware(GZipMiddleware, minimum_size=1),
    ]
    relay, app = memory_relay(), Starlette(middleware=middleware)
    relay.install(app)
    async with serve(relay, app=app, prefix="/relay", direct=direct) as served:
        assert await converse(served) == ("direct" if direct else "asgi")
        answer = await get(f"{served.http}/metrics", headers={"origin": "https://app.example"})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert answer.headers["content-encoding"] == "gzip"
        assert "relay_sockets" in answer.text
        refused = await get(f"{served.http}/health", headers={"host": "evil.example"})
        assert refused.status_code == 400
        with pytest.raises(InvalidStatus) as caught:
            # TrustedHost answers a handshake as well as a request.
            elsewhere = served.ws.replace("127.0.0.1", "evil.example")
            async with Client.connect(elsewhere, host="127.0.0.1", port=served.port):
                pass
        assert caught.value.response.status_code in (400, 403)


async def test_cors_of_the_app_does_not_open_the_sockets(direct: bool) -> None:
    """CORS is not for WebSockets: who may connect is the relay's own setting."""
    for origins, passes in (("same", False), (("https://app.example",), True)):
        relay = memory_relay(allowed_origins=origins)
        app = Starlette(middleware=[Middleware(CORSMiddleware, allow_origins=["*"])])
        relay.install(app)
        async with serve(relay, app=app, prefix="/relay", direct=direct) as served:
            if passes:
                await converse(served, additional_headers={"Origin": "https://app.example"})
                continue
            with pytest.raises(InvalidStatus) as caught:
                async with Client.connect(served.ws, additional_headers={"Origin": "https://app.example"}):
                    pass
            assert caught.value.response.status_code == 403


async def test_socket_beside_the_mount_is_refused_by_the_app_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    relay, app = memory_relay(), Starlette()
    relay.install(app)
    async with serve(relay, app=app, prefix="/relay") as served:
        with pytest.raises(InvalidStatus) as caught:
            async with Client.connect(served.ws.replace("/relay/", "/")):
                pass
        assert caught.value.response.status_code == 403
        await converse(served)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "relay.server"]
    assert line.startswith("the application refused a WebSocket at '/socket/websocket' with 403; ")
    assert line.endswith("clients of relay connect below its mount path")


# Plugins' routes in the app.


async def test_routes_of_plugins_in_the_app_have_its_dependencies_cors_and_docs() -> None:
    """Source: seed.md – "you can reuse … the authentication system, the CORS configuration"; `/docs` includes them."""
    plugin, router = Plugin("example"), APIRouter(prefix="/example", tags=["example"])

    @router.get("/")
    async def example() -> dict[str, str]:
        return {"data": "from the plugin"}

    plugin.include_router(router)

    async def authenticated(x_user: Annotated[str, Header()] = "") -> None:
        if x_user != "ada":
            raise HTTPException(401, "who are you?")

    app = FastAPI(dependencies=[Depends(authenticated)])
    app.add_middleware(CORSMiddleware, allow_origins=["https://app.example"])
    relay = memory_relay(extra_plugins=(plugin,))
    relay.install(app, plugin_routes_in_app=True)
    async with serve(relay, app=app, prefix="/relay") as served:
        root = served.http.removesuffix("/relay")
        assert (await get(f"{root}/example/")).status_code == 401
        answer = await get(f"{root}/example/", headers={"x-user": "ada", "origin": "https://app.example"})
        assert answer.json() == {"data": "from the plugin"}
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        schema = (await get(f"{root}/openapi.json")).json()
        assert schema["paths"]["/example/"]["get"]["tags"] == ["example"]
        own = (await get(f"{served.http}/api/openapi.json")).json()
        assert "/example/" not in own["paths"]
        assert (await get(f"{served.http}/api/example/")).status_code == 404
        assert (await get(f"{served.http}/api/topics")).json() == []
        await converse(served)


async def test_plugin_of_the_seed_is_registered_on_the_app(tmp_path: Path) -> None:
    """``register_plugin(app)`` is given the team's own FastAPI, as seed.md says."""
    package = tmp_path / "example"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from fastapi import FastAPI\n\n\ndef register_plugin(app: FastAPI) -> None:\n"
        "    app.add_api_route('/seed', lambda: app.title)\n"
    )
    app, relay = FastAPI(title="the team's"), memory_relay(plugins={"paths": [tmp_path]})
    relay.install(app, plugin_routes_in_app=True)
    async with serve(relay, app=app, prefix="/relay") as served:
        assert (await get(served.http.removesuffix("/relay") + "/seed")).json() == "the team's"


# Its life in other loops.


def test_relays_in_one_loop_after_another() -> None:
    """A script, a test suite, a notebook: each run has a loop of its own. A relay may also be started again."""
    again = memory_relay()

    async def once(relay: Relay) -> None:
        app = Starlette()
        app.mount("/relay", relay)
        async with serve(relay, app=app, prefix="/relay") as served:
            await asyncio.gather(*(converse(served, f"room:{number}") for number in range(3)))
        await relay.stop()
        assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    for relay in (memory_relay(), memory_relay(), again, again):
        asyncio.run(once(relay))


# Servers of all kinds, as processes.

APP = """
import os
from contextlib import asynccontextmanager
from fastapi import FastAPI
from relay import Relay

@asynccontextmanager
async def lifespan(app):
    print("app started:", relay.link.live, flush=True)
    yield
    print("app ended:", relay.link.live, flush=True)

app = FastAPI(lifespan=lifespan)
LIMITS = {"payload_max_bytes": 524_288, "outbox_max_bytes": 1_100_000}
relay = Relay(redis_url=os.environ["BUS"], system_topic=False, limits=LIMITS)
relay.install(app, path="/relay")
"""

SERVERS = ["uvicorn", "uvicorn with our class", "hypercorn", "granian", "relay"]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, valkey: Valkey) -> Iterator[AppServer]:
    """The same app under each server."""
    with AppServer(str(request.param), APP, environ={"BUS": valkey.url}, ready="/relay/ready") as server:
        yield server


def socket_url(server: AppServer) -> str:
    return f"{server.ws}/relay/socket"


async def path_of_socket(server: AppServer, topic: str) -> str:
    """How the one socket on ``topic`` is written to, as the REST interface tells."""
    found = (await get(f"{server.http}/relay/api/topics/{topic}")).json()
    (socket_id,) = found["socket_ids"]
    return str((await get(f"{server.http}/relay/api/sockets/{socket_id}")).json()["path"])


async def test_server_carries_joins_pushes_and_events(server: AppServer, redis: Redis) -> None:
    async with Client.connect(socket_url(server)) as client:
        join_ref = await client.join("room:servers")
        assert await client.push(join_ref, "room:servers", "shout", "ü") == {"status": "ok", "response": {}}
        await redis.publish("to:room:servers:new_msg", '{"text":"hi"}')
        await client.expect_event("room:servers", "new_msg", {"text": "hi"})
        await redis.publish("to:room:servers:bytes", b"\xff\x00")
        assert await client.receive_raw() == b"\x02\x0c\x05room:serversbytes\xff\x00"
        path = await path_of_socket(server, "room:servers")
        ours = any("RelayWebSocketProtocol" in word or word == "relay" for word in server.command)
        assert path == ("direct" if ours else "asgi")


async def test_server_carries_streams(server: AppServer, redis: Redis) -> None:
    async with Stream.open(socket_url(server), "room:streams") as stream:
        assert stream.status == 200
        for number in range(20):
            await redis.publish("to:room:streams:new_msg", str(number))
            await stream.expect_event("new_msg", str(number))
        assert await path_of_socket(server, "room:streams") == "sse"
    async with asyncio.timeout(DEADLINE_S):
        while (await get(f"{server.http}/relay/api/topics/room:streams")).status_code != 404:  # noqa: ASYNC110 - a server's
            await asyncio.sleep(0.02)
    async with Stream.open(socket_url(server), "phoenix") as stream:
        assert stream.status == 400
        assert (await stream.body()).startswith("expected topics")


async def expect_nothing_taken(poller: Poller, redis: Redis) -> None:
    """A client that goes in mid-poll takes nothing with it, once the server has seen that: sooner or later it does."""
    for pause_s in (0.2, 1, 5):
        poll = asyncio.create_task(poller.ask("GET"))
        await asyncio.sleep(pause_s / 2)
        poll.cancel()
        await asyncio.wait((poll,))
        await asyncio.sleep(pause_s)
        text = f"after {pause_s} s"
        await redis.publish("to:room:polled:new_msg", json.dumps({"text": text}))
        await asyncio.sleep(0.1)  # what the server answers to nobody holds the first alone
        await redis.publish("to:room:polled:mark", "{}")
        first = await poller.receive()
        if first[3:] == ["new_msg", {"text": text}]:
            return
        assert first[3] == "mark", first
    pytest.fail("the server does not report that a client has gone")


async def test_server_carries_long_polls(server: AppServer, redis: Redis) -> None:
    async with Poller.connect(socket_url(server)) as poller:
        join_ref = await poller.join("room:polled")
        assert await poller.push(join_ref, "room:polled", "shout", "ü") == {"status": "ok", "response": {}}
        poll = asyncio.create_task(poller.receive())
        await redis.publish("to:room:polled:new_msg", '{"text":"hi"}')
        assert await poll == [None, None, "room:polled", "new_msg", {"text": "hi"}]
        await redis.publish("to:room:polled:bytes", b"\xff\x00")
        await poller.expect_event("room:polled", "bytes", {"base64": "/wA="})
        large = "x" * 500_000
        assert (await poller.push(join_ref, "room:polled", "shout", large))["status"] == "ok"
        assert await path_of_socket(server, "room:polled") == "longpoll"
        await expect_nothing_taken(poller, redis)
        assert (await poller.post("no message"))["status"] == 410
        await poller.expect_gone()
    async with Poller.connect(socket_url(server), opens=False, vsn="9.9.9") as poller:
        assert (await poller.open())["status"] == 403


async def test_server_refuses_pages_of_other_origins(server: AppServer) -> None:
    for options, path, status in (
        ({"additional_headers": {"Origin": "https://evil.example"}}, "/socket", 403),
        ({"vsn": "9.9.9"}, "/socket", 403),
        ({}, "/nowhere", 404),
    ):
        with pytest.raises(InvalidStatus) as caught:
            async with Client.connect(f"{server.ws}/relay{path}", **options):
                pass
        assert caught.value.response.status_code == status
        assert caught.value.response.body, "a reason is given"


async def test_server_tells_close_codes(server: AppServer) -> None:
    async with Client.connect(socket_url(server)) as client:
        await client.join("room:codes")
        await client.send_raw("this is no message")
        code, reason = await client.expect_closed()
        assert (code, reason.startswith("expected JSON")) == (1007, True)
    async with Client.connect(socket_url(server)) as client:
        await client.join("room:codes")
        found = (await get(f"{server.http}/relay/api/topics/room:codes")).json()
        async with httpx.AsyncClient(base_url=f"{server.http}/relay/api", trust_env=False) as operator:
            await operator.delete(f"/sockets/{found['socket_ids'][0]}")
        assert await client.expect_closed() == (1001, "disconnected by the server")


async def test_server_bounds_what_waits_for_a_slow_reader(server: AppServer, redis: Redis) -> None:
    """100 MB for a client that reads nothing: the outbox is full after one, the rest of the process lives on."""
    async with (
        Client.connect(socket_url(server)) as bystander,
        RawSocket.connect(socket_url(server), receive_buffer=4096) as slow,
    ):
        await bystander.join("room:fast")
        await slow.send_frame(TEXT, b'["1","1","room:slow","phx_join",{}]')
        assert (await slow.read_message())[3] == "phx_reply"
        before = server.resident_bytes()
        for number in range(10):
            await asyncio.gather(*(redis.publish("to:room:slow:big", '"' + "x" * 100_000 + '"') for _ in range(100)))
            # Valkey gives up a subscriber that is 32 MB behind.
            await redis.publish("to:room:fast:mark", str(number))
            await bystander.expect_event("room:fast", "mark", number)
        assert server.resident_bytes() - before < 30_000_000
        metrics = (await get(f"{server.http}/relay/metrics")).text
        assert 'relay_dropped_total{overflow="disconnect",reason="slow_reader"}' in metrics


@pytest.mark.parametrize("name", SERVERS)
async def test_server_ends_in_good_order(name: str, valkey: Valkey) -> None:
    """Clients are told 1012 (Service Restart) where the server lets it be told; never 1000: none would come back."""
    with AppServer(name, APP, environ={"BUS": valkey.url}, ready="/relay/ready") as server:
        async with Client.connect(socket_url(server)) as client:
            await client.join("room:1")
            ending = asyncio.create_task(asyncio.to_thread(server.stop, signal.SIGTERM))
            # Hypercorn gives its sockets some seconds and then 1011; Granian cuts the connection. Since Python 3.12
            # asyncio's server waits until its connections are gone, and Hypercorn with it.
            if not (name == "hypercorn" and sys.version_info >= (3, 12)):
                code, _ = await client.expect_closed()
                assert code == {"hypercorn": 1011, "granian": 1006}.get(name, 1012)
        exit_code = await ending
        assert exit_code in (0, -signal.SIGTERM), server.output
        assert "app started: True" in server.output
        assert "app ended: True" in server.output


@pytest.mark.parametrize("name", SERVERS)
async def test_server_does_not_wait_for_streams_without_a_limit(name: str, valkey: Valkey) -> None:
    """Uvicorn waits until responses have ended, so the relay ends them; the others cut them, Granian where it may."""
    arguments = ("--workers-kill-timeout", "1") if name == "granian" else ()
    with AppServer(name, APP, *arguments, environ={"BUS": valkey.url}, ready="/relay/ready") as server:
        async with Stream.open(socket_url(server), "room:1") as stream:
            ending = asyncio.create_task(asyncio.to_thread(server.stop, signal.SIGTERM))
            # Since Python 3.12 asyncio's server waits until its connections are gone, and Hypercorn with it.
            if not (name == "hypercorn" and sys.version_info >= (3, 12)):
                events = [event.event for event in await stream.rest()]
                assert (events, stream.is_complete) == (
                    ([], False) if name in ("hypercorn", "granian") else (["relay:error"], True)
                )
        exit_code = await ending
        assert exit_code in (0, -signal.SIGTERM), server.output


async def worker_and_path(server: AppServer, topic: str) -> tuple[str, str] | None:
    """Which worker the one socket on ``topic`` is with, and how it is written to; None: another one has answered."""
    async with httpx.AsyncClient(base_url=f"{server.http}/relay/api", trust_env=False) as operator:
        # Over one connection, which stays with one worker.
        found = await operator.get(f"/topics/{topic}")
        if found.status_code == 404:
            return None
        (socket_id,) = found.json()["socket_ids"]
        details = (await operator.get(f"/sockets/{socket_id}")).json()
    return socket_id.split("-")[0], details["path"]


async def test_workers_of_relay_serve_answer_long_polls_for_each_other(valkey: Valkey) -> None:
    """Their parent makes the secret, as for a relay alone; the kernel gives a request to either worker."""
    with AppServer("relay", APP, "--workers", "2", environ={"BUS": valkey.url}, ready="/relay/ready") as server:
        for _ in range(3):
            async with Poller.connect(f"{server.http}/relay/socket") as poller:
                assert (await poller.push("1", "room:1", "phx_join", {}))["status"] == "ok"
                for _ in range(8):
                    assert (await poller.push("1", "room:1", "hello", {}))["status"] == "ok"
        assert "auth.secret" not in server.output


@pytest.mark.parametrize("name", ["uvicorn", "uvicorn with our class", "relay"])
async def test_two_workers_share_the_bus(name: str, valkey: Valkey, redis: Redis) -> None:
    """Each worker has its own sockets; an event from Redis, or from the code of one, reaches those of both."""
    source = APP + (
        "\n@app.get('/pid')\ndef pid() -> int:\n    return os.getpid()\n"
        "\n@app.post('/say')\nasync def say() -> None:\n    await relay.broadcast('room:both', 'said', os.getpid())\n"
    )
    async with AsyncExitStack() as stack:
        server = stack.enter_context(
            AppServer(name, source, "--workers", "2", environ={"BUS": valkey.url}, ready="/relay/ready")
        )
        workers: dict[str, Client] = {}
        async with asyncio.timeout(DEADLINE_S):
            # The kernel gives a connection to either worker: try until both have one.
            for number in itertools.count():
                client = await stack.enter_async_context(Client.connect(socket_url(server)))
                await client.join(f"room:{number}")
                await client.join("room:both")
                # Only the worker that has the socket knows it: ask until that one is met.
                while not (found := await worker_and_path(server, f"room:{number}")):
                    pass
                worker, path = found
                assert path == ("asgi" if name == "uvicorn" else "direct")
                workers.setdefault(worker, client)
                if len(workers) == 2:
                    break
        await redis.publish("to:room:both:new_msg", "1")
        for client in workers.values():
            await client.expect_event("room:both", "new_msg", 1)
        async with httpx.AsyncClient(trust_env=False) as asker:
            await asker.post(f"{server.http}/say")
        said = [await client.receive() for client in workers.values()]
        assert said[0][3:] == said[1][3:]
        assert said[0][3] == "said"
        assert await asyncio.to_thread(server.stop) in (0, -signal.SIGTERM)


async def test_app_with_a_plain_mount_ends_in_good_order(valkey: Valkey) -> None:
    source = APP.replace('relay.install(app, path="/relay")', 'app.mount("/relay", relay)')
    with AppServer("uvicorn with our class", source, environ={"BUS": valkey.url}) as server:
        await asyncio.to_thread(wait_for, lambda: "app started: False" in server.output, "the line")
        async with Client.connect(socket_url(server)) as client:
            await client.join("room:1")
            ending = asyncio.create_task(asyncio.to_thread(server.stop, signal.SIGTERM))
            assert (await client.expect_closed())[0] == 1012
            assert await ending in (0, -signal.SIGTERM)
        assert HINT in server.output


# relay serve module:app


def run_relay(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``relay serve`` that is expected to end by itself."""
    command = [sys.executable, "-m", "relay", "serve", "--port", "0", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "XDG_RUNTIME_DIR": str(directory)}
    return subprocess.run(
        command, cwd=directory, env=environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


@pytest.mark.parametrize(
    ("name", "source", "said"),
    [
        ("nowhere:app", "", 'MODULE:APP: Could not import module "nowhere".'),
        ("shop:application", "app = 1", 'MODULE:APP: Attribute "application" not found in module "shop".'),
        ("shop", "", 'MODULE:APP: Import string "shop" must be in format "<module>:<attribute>".'),
        ("shop:app", "import not_installed", "MODULE:APP: shop:app cannot be imported: ModuleNotFoundError: No module"),
        ("shop:app", "def app(:", "MODULE:APP: shop:app cannot be imported: SyntaxError: "),
        ("shop:app", "1 / 0", "MODULE:APP: shop:app cannot be imported: ZeroDivisionError: division by zero"),
        ("shop:app", "from relay import Relay\napp = Relay()", "redis_url: expected where to hear events"),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_app_that_cannot_be_imported_is_told_in_one_line(
    tmp_path: Path, name: str, source: str, said: str, workers: str
) -> None:
    (tmp_path / "shop.py").write_text(source)
    ended = run_relay(tmp_path, name, "--workers", workers)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"relay: {said}")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


def test_app_with_settings_of_its_own_keeps_them_under_several_workers(tmp_path: Path, valkey: Valkey) -> None:
    """What `relay serve` has read for itself must not override what the app reads for its relay."""
    settings = tmp_path / "relay.toml"
    settings.write_text(f'redis_url = "{valkey.url}"\n')
    source = (
        "from starlette.applications import Starlette\nfrom relay import Relay\napp = Starlette()\n"
        f"relay = Relay.from_file({str(settings)!r})\nrelay.install(app, '/relay')\n"
    )
    with AppServer("relay", source, "--workers", "2", ready="/relay/ready") as server:
        assert asyncio.run(get(f"{server.http}/relay/ready")).json() == {"status": "ready"}
