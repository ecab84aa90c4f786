"""`relay.app`: what is answered to which path, who is answered at all, and start and stop in which event loop."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount, Router

from relay import ConfigError, Plugin, Publisher, Relay
from relay.config import Config
from relay.errors import RelayError
from relay.testing import in_memory
from relay.web.console import SOCKET_PATH
from tests.support.asgi import Connection, until

REST = {"path": "/api"}


def make(*plugins: Plugin, **settings: Any) -> Relay:
    """A relay on memory://, without the REST interface, which takes most of the time to make."""
    common = {"broadcast_url": "memory://", "system_topic": False, "rest": {"path": ""}, "extra_plugins": plugins}
    return Relay(**{**common, **settings})


async def ask(app: Any, path: str, **options: Any) -> Connection:
    """One HTTP request, answered."""
    connection = Connection(path, "", kind="http", **options)
    await app(connection.scope, connection.receive, connection.send)
    return connection


async def knock(app: Any, path: str, **options: Any) -> Connection:
    """One upgrade request, which is refused."""
    connection = Connection(path, **options)
    await app(connection.scope, connection.receive, connection.send)
    return connection


@asynccontextmanager
async def running(*plugins: Plugin, **settings: Any) -> AsyncIterator[Relay]:
    relay = make(*plugins, **settings)
    async with relay.lifespan():
        yield relay


# Settings.


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"broadcast_url": ""}, "redis_url: expected where to hear events"),
        ({"port": "eighty"}, "port"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_settings_that_make_no_relay_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make(**settings)


def test_authenticate_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="authenticate"):
        make(authenticate=lambda: None)


def test_relay_is_made_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "relay.toml").write_text('broadcast_url = "memory://"\nsocket_paths = ["/live"]\n')
    relay = Relay.from_file(tmp_path / "relay.toml")
    assert (relay.config.socket_paths, relay.authenticates) == (("/live",), False)


@pytest.mark.parametrize(
    ("address", "setting"),
    [
        ("redis://localhost:6379", "redis_url"),
        ("redis+sentinel://a,b/main", "redis_url"),
        ("embedded", "redis_url"),
        ("memory://", "broadcast_url"),
        ("postgres://localhost/app", "broadcast_url"),
    ],
)
def test_relay_is_made_from_the_address_of_its_bus(address: str, setting: str) -> None:
    relay = Relay(address, system_topic=False)
    assert (getattr(relay.config, setting), relay.config.system_topic) == (address, False)


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected a Config or single settings, got a Config and port"):
        Relay(Config(broadcast_url="memory://"), port=9000)
    with pytest.raises(ConfigError, match="redis_url: expected once"):
        Relay("redis://localhost", redis_url="redis://other")
    with pytest.raises(ConfigError, match="Relay: redis_url: expected a URL that starts with redis://"):
        Relay("http://localhost:6379")
    with pytest.raises(ConfigError, match="exclude each other"):
        Relay("redis://localhost", broadcast_url="memory://")


def test_relay_is_made_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "relay.toml").write_text('socket_paths = ["/live"]\n')
    monkeypatch.setenv("RELAY_BROADCAST_URL", "memory://")
    assert Relay.from_env().config.socket_paths == ("/socket",)
    monkeypatch.setenv("RELAY_CONFIG", str(tmp_path / "relay.toml"))
    relay = Relay.from_env(authenticate=lambda request: None)
    assert (relay.config.broadcast_url, relay.config.socket_paths, relay.authenticates) == (
        "memory://",
        ("/live",),
        True,
    )
    monkeypatch.setenv("RELAY_NONSENSE", "1")
    with pytest.raises(ConfigError, match="environment: RELAY_NONSENSE: no such setting"):
        Relay.from_env()


def test_relay_that_does_not_run_says_so() -> None:
    relay = make()
    assert relay.link == (False, "the relay is not running")
    for use in (lambda: relay.topics, lambda: relay.publish("t", "e", {}), lambda: relay.node):
        with pytest.raises(RelayError, match=r"the relay is not running: .* publishes with relay\.Publisher"):
            use()


# Paths.


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/health", 200),
        ("//health/", 200),
        ("/ready", 200),
        ("/metrics", 200),
        ("/", 200),
        ("/console", 200),
        ("/static/console.js", 200),
        ("/api/topics", 200),
        ("/api//topics/", 200),
        ("/api/docs", 200),
        ("/socket/websocket", 426),
        ("/socket/sse", 400),
        ("/socket//sse/", 400),
        ("/socket/longpoll", 200),
        ("/socket", 404),
        ("/nothing", 404),
    ],
)
async def test_path_is_answered(path: str, status: int) -> None:
    async with running(rest=REST if path.startswith("/api") else {"path": ""}) as relay:
        assert (await ask(relay, path)).status == status


@pytest.mark.parametrize("path", ["/", "/console", "/api/topics"])
async def test_what_is_switched_off_is_not_found(path: str) -> None:
    async with running(demo_page=False, console=False, rest={"path": ""}) as relay:
        assert (await ask(relay, path)).status == 404
        assert (await ask(relay, "/health")).status == 200


async def test_transport_that_is_not_listed_is_not_served() -> None:
    async with running(transports=["websocket"]) as relay:
        answer = await ask(relay, "/socket/sse")
        assert answer.status == 404
        assert "expected one of the relay's transports, websocket, got sse" in json.loads(answer.body)["detail"]
        assert relay.metrics.refused == {"http: transport": 1}
    async with running(transports=["sse"]) as relay:
        for refused in (await knock(relay, "/socket/websocket"), await ask(relay, "/socket/websocket")):
            assert refused.status == 404
        assert (await ask(relay, "/socket/sse")).status == 400


async def test_refused_long_poll_has_a_status_that_phoenix_js_knows() -> None:
    """At any other in the JSON it stops working, and does not try again."""
    async with running(transports=["websocket"], socket_paths=("/live",)) as relay:
        answer = await ask(relay, "/live/longpoll")
        content = json.loads(answer.body)
        assert (answer.status, content["status"]) == (404, 403)
        assert "expected one of the relay's transports, websocket, got longpoll" in content["reason"]
        await ask(relay, "/live/websocket")
        assert relay.metrics.refused == {"http: transport": 1, "handshake: no upgrade": 1}


async def test_websocket_elsewhere_is_refused_with_the_paths_that_exist(caplog: pytest.LogCaptureFixture) -> None:
    async with running(socket_paths=("/b", "/a")) as relay:
        answer = await knock(relay, "/socket/websocket")
        assert (answer.status, answer.body) == (404, "no socket here; expected /a/websocket, /b/websocket\n")
        assert "handshake refused: no socket here; expected /a/websocket, /b/websocket; address" in caplog.text
        assert relay.metrics.refused == {"handshake: path": 1}


async def test_console_has_a_socket_of_its_own() -> None:
    async with running() as relay:
        connection = Connection(SOCKET_PATH)
        task = asyncio.create_task(relay(connection.scope, connection.receive, connection.send))
        await until(lambda: connection.status is not None)
        assert connection.status == 101
        connection.disconnect()
        await task
        assert not relay.node.sockets, "it is no client"


async def test_name_of_a_topic_keeps_its_slashes() -> None:
    async with running(rest=REST) as relay:
        connection = Connection("/api//topics/a//b", "", kind="http")
        connection.scope["raw_path"] = b"/api//topics/a%2F%2Fb"
        await relay(connection.scope, connection.receive, connection.send)
        assert (connection.status, "'a//b' in this process" in json.loads(connection.body)["detail"]) == (404, True)


# Who is answered.


async def test_stranger_is_refused_and_counted() -> None:
    async with running() as relay:
        answer = await knock(relay, "/socket/websocket", client=("10.0.0.1", 1))
        assert (answer.status, relay.metrics.refused) == (403, {"handshake: from another machine": 1})
        page = await ask(relay, "/", headers=[("host", "evil.example")])
        assert (page.status, relay.metrics.refused["http: host not allowed"]) == (403, 1)
        assert (await ask(relay, "/health", headers=[("host", "evil.example")])).status == 200


async def test_request_with_two_hosts_is_refused() -> None:
    async with running() as relay:
        answer = await ask(relay, "/health", headers=[("host", "localhost"), ("host", "evil.example")])
        assert (answer.status, relay.metrics.refused) == (400, {"http: several hosts": 1})


async def test_rest_asks_for_the_key_before_it_asks_for_the_host() -> None:
    async with running(rest={"api_key": "s3cret"}) as relay:
        host = ("host", "relay.example")
        without = await ask(relay, "/api/topics", headers=[host])
        assert (without.status, without.header("www-authenticate")) == (401, "Bearer")
        wrong = await ask(relay, "/api/topics", headers=[host, ("authorization", "Bearer no")])
        assert wrong.status == 401
        right = await ask(relay, "/api/topics", headers=[host, ("authorization", "Bearer s3cret")])
        assert right.status == 200
        assert {kind.partition(":")[0] for kind in relay.metrics.refused} == {"rest"}


async def test_address_behind_a_trusted_proxy_is_the_clients() -> None:
    async with running(trusted_proxies=("127.0.0.1",), allow_anonymous=True) as relay:
        headers = [("host", "localhost"), ("x-forwarded-for", "10.1.2.3")]
        connection = Connection(headers=headers)
        task = asyncio.create_task(relay(connection.scope, connection.receive, connection.send))
        await until(lambda: relay.node.sockets)
        assert [socket.transport.address for socket in relay.node.sockets.values()] == ["10.1.2.3"]
        connection.disconnect()
        await task


# Former names.


async def test_former_names_work_and_warn() -> None:
    async with running() as relay:
        with pytest.warns(DeprecationWarning, match=r"Relay\.engine is now Relay\.node"):
            assert relay.engine is relay.node
        with pytest.warns(DeprecationWarning, match=r"broadcast_here is now Relay\.local_broadcast"):
            assert not relay.broadcast_here("t", "e", {})
        assert Relay.broadcast is Relay.publish


async def test_calls_are_passed_to_the_node() -> None:
    async with running() as relay:
        await relay.publish("t", "e", {})
        await relay.kick("t", user="alice")
        await relay.disconnect(user="alice")
        assert (relay.disconnect("none"), relay.socket("none"), relay.topics) == (False, None, {})
        with pytest.raises(ValueError, match="expected a topic"):
            await relay.publish("", "e", {})


# Start and stop.


async def serve_lifespan(relay: Relay) -> tuple[list[dict[str, Any]], asyncio.Queue[dict[str, Any]], Any]:
    sent: list[dict[str, Any]] = []
    incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    incoming.put_nowait({"type": "lifespan.startup"})

    async def send(message: Any) -> None:
        sent.append(message)

    state: dict[str, Any] = {}
    task = asyncio.create_task(relay({"type": "lifespan", "state": state}, incoming.get, send))
    await until(lambda: sent)
    return sent, incoming, (task, state)


async def test_lifespan_starts_and_stops_the_relay() -> None:
    relay = make()
    sent, incoming, (task, state) = await serve_lifespan(relay)
    assert sent == [{"type": "lifespan.startup.complete"}]
    assert relay.link.live
    assert state["relay.refused"] is relay.metrics.refused, "the server counts there what it refuses"
    incoming.put_nowait({"type": "lifespan.shutdown"})
    await task
    assert sent[1:] == [{"type": "lifespan.shutdown.complete"}]
    assert not relay.link.live


@pytest.mark.parametrize("error", [ConfigError("this is wrong"), OSError("this is wrong")])
async def test_start_that_fails_is_reported_to_the_server(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = make()

    async def fail() -> None:
        raise error

    monkeypatch.setattr(relay, "start", fail)
    sent, _, (task, _) = await serve_lifespan(relay)
    await task
    assert sent == [{"type": "lifespan.startup.failed", "message": "this is wrong"}]


async def test_start_and_stop_may_be_called_twice() -> None:
    relay = make()
    await asyncio.gather(relay.start(), relay.start())
    node = relay.node
    await relay.start()
    assert relay.node is node
    await relay.stop()
    await relay.stop()
    await relay.start()
    assert relay.node is not node
    await relay.stop()


async def test_first_request_starts_a_relay_that_no_lifespan_has_started(caplog: pytest.LogCaptureFixture) -> None:
    relay = make()
    assert (await ask(relay, "/ready")).status == 200
    assert "relay started by its first request" in caplog.text
    await relay.stop()


async def test_requests_wait_until_the_relay_that_the_first_one_starts_has_started(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plugin, begun, gate = Plugin("p"), asyncio.Event(), asyncio.Event()

    @plugin.on_startup
    async def connect(relay: Relay) -> None:
        begun.set()
        await gate.wait()

    relay = make(plugin)
    app = Starlette()
    app.mount("/relay", relay)
    first = asyncio.create_task(ask(app, "/relay/health"))
    await begun.wait()
    sockets = [Connection("/relay/socket/websocket"), Connection("/relay/socket/websocket")]
    served = [asyncio.create_task(app(each.scope, each.receive, each.send)) for each in sockets]
    done, _ = await asyncio.wait([first, *served], timeout=0.05)
    assert not done
    assert not relay.node.sockets
    gate.set()
    assert (await first).status == 200
    await until(lambda: len(relay.node.sockets) == 2)
    await relay.stop()
    await asyncio.gather(*served)
    assert caplog.text.count("relay started by its first request") == 1


async def test_relay_that_drains_is_not_ready() -> None:
    async with running() as relay:
        relay.node.drain()
        answer = await ask(relay, "/ready")
        assert (answer.status, json.loads(answer.body)["reason"]) == (503, "the relay is restarting")


def test_relay_starts_again_in_another_event_loop_once_the_first_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    relay = make()

    async def start() -> None:
        await relay.start()
        await relay.publish("t", "e", {})

    async def again() -> None:
        async with relay.lifespan():
            await relay.publish("t", "e", {})

    asyncio.run(start())
    assert not relay.link.live
    asyncio.run(again())
    assert "starting again: the relay was started in an event loop that has ended" in caplog.text


async def test_relay_belongs_to_the_event_loop_that_started_it() -> None:
    async with running() as relay:

        def elsewhere() -> list[str]:
            errors = list[str]()
            for call in (relay.start, lambda: knock(relay, "/socket/websocket")):
                with pytest.raises(RelayError) as caught:
                    asyncio.run(call())
                errors.append(str(caught.value))
            return errors

        start, socket = await asyncio.to_thread(elsewhere)
        assert "started in another event loop" in start
        assert "would hear no event" in socket


async def test_stop_in_another_event_loop_stops_the_relay_in_its_own() -> None:
    relay = make()
    await relay.start()
    await asyncio.to_thread(lambda: asyncio.run(relay.stop()))
    assert not relay.link.live


# In another application.


async def test_installed_relay_lives_as_long_as_the_application() -> None:
    steps: list[str] = []
    relay = make()

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, int]]:
        steps.append(f"app starts, relay live: {relay.link.live}")
        yield {"of": 1}
        steps.append(f"app ends, relay live: {relay.link.live}")

    app = Starlette(lifespan=lifespan)
    relay.install(app, "/live")
    async with app.router.lifespan_context(app) as state:
        assert state == {"of": 1}
        assert (await ask(app, "/live/health")).status == 200
        assert (await ask(app, "/live/socket/websocket")).status == 426
    assert steps == ["app starts, relay live: True", "app ends, relay live: True"]
    assert not relay.link.live


async def test_plugin_routes_are_in_relays_rest_or_in_the_application() -> None:
    plugin, router = Plugin("p"), APIRouter()

    @router.get("/hello")
    async def hello() -> str:
        return "hello"

    plugin.include_router(router)
    for in_app, found in ((False, ["/relay/api/hello"]), (True, ["/hello"])):
        app, relay = FastAPI(), make(plugin, rest=REST)
        relay.install(app, plugin_routes_in_app=in_app)
        async with relay.lifespan():
            paths = ["/hello", "/relay/hello", "/relay/api/hello"]
            assert [path for path in paths if (await ask(app, path)).status == 200] == found


def test_wrong_arguments_are_named() -> None:
    """Each was an error from elsewhere that named another thing."""
    for given, name in ((5, "int"), ({"redis_url": "redis://localhost"}, "dict")):
        with pytest.raises(ConfigError, match=f"expected the address of the bus, or a Config, got a {name}"):
            Relay(given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Relay.from_file\('relay.toml'\) reads a file"):
        Relay("relay.toml")
    with pytest.raises(ValueError, match="expected a plugin name of letters, digits, - and _, got 1"):
        Plugin(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an address with settings, or a Config without, got a int"):
        Publisher(1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="in_memory: expected a Relay, got a Starlette"):
        in_memory(Starlette())  # type: ignore[arg-type]


def test_install_in_what_cannot_serve_it_is_refused() -> None:
    """Each was a traceback from elsewhere, or a relay that no request reaches."""
    relay = make()
    for app in (Router(), APIRouter(), "main:app"):
        with pytest.raises(TypeError, match=f"expected a Starlette or FastAPI application, got a {type(app).__name__}"):
            relay.install(app)
    with pytest.raises(TypeError, match="expected a FastAPI application, got a Starlette"):
        relay.install(Starlette(), plugin_routes_in_app=True)
    with pytest.raises(ValueError, match="expected a path such as \"/relay\", got 'relay'"):
        relay.install(Starlette(), "relay")
    pages = Starlette(routes=[Mount("/", Starlette(), name="pages")])
    with pytest.raises(ValueError, match="answered by what is mounted at '/' before; install the relay first"):
        relay.install(pages)
    beside = Starlette(routes=[Mount("/static", Starlette())])
    relay.install(beside)
    assert [route.path for route in beside.routes if isinstance(route, Mount)] == ["/static", "/relay"]
