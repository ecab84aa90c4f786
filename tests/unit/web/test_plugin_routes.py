"""`relay.web.plugin_routes`: when and where plugins' routes are added, what they may not hide, and background tasks."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from relay import ConfigError, Plugin, Relay
from relay.plugins.routes import flat_routes

SEED = (Path(__file__).parents[2] / "data" / "seed_example_plugin.py.txt").read_text("utf-8")

# As tangram's own plugins of the seed's time do it.
SYSTEM = """
import asyncio

from fastapi import FastAPI

beats = []


async def beat():
    try:
        while True:
            beats.append("beat")
            await asyncio.sleep(0)
    finally:
        beats.append("end")


def register_plugin(app: FastAPI) -> None:
    task = asyncio.create_task(beat())
    app.state.background_tasks.add(task)
    task.add_done_callback(app.state.background_tasks.discard)
"""


def put(directory: Path, name: str, text: str) -> Path:
    (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / name / "__init__.py").write_text(text)
    return directory


def plugin_with(path: str, *, name: str = "extra", methods: tuple[str, ...] = ("GET",), prefix: str = "") -> Plugin:
    """A plugin with one route."""
    plugin, router = Plugin(name), APIRouter(prefix=prefix)
    router.add_api_route(path, lambda: {"from": name}, methods=list(methods))
    plugin.include_router(router)
    return plugin


def make(*plugins: Plugin, **settings: Any) -> Relay:
    return Relay(broadcast_url="memory://", system_topic=False, extra_plugins=plugins, **settings)


@asynccontextmanager
async def client_of(relay: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(relay, client=("127.0.0.1", 50_000))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@asynccontextmanager
async def served(*plugins: Plugin, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    relay = make(*plugins, **settings)
    async with relay.lifespan(), client_of(relay) as client:
        yield client


async def test_example_of_the_seed_answers_at_the_root_as_in_the_guide(tmp_path: Path) -> None:
    """Source: seed.md, *Extend the FastAPI application*; ``/docs`` includes the endpoint."""
    async with served(plugins={"paths": [put(tmp_path, "example", SEED)], "path": "/"}) as client:
        answer = await client.get("/example/")
        assert (answer.status_code, answer.json()) == (200, {"data": "This is an example plugin response"})
        schema = (await client.get("/openapi.json")).json()
        assert (list(schema["paths"]), schema["paths"]["/example/"]["get"]["tags"]) == (["/example/"], ["example"])
        docs = await client.get("/docs")
        assert docs.status_code == 200
        assert "content='/openapi.json'" in docs.text and 'src="./static/docs.js"' in docs.text
        assert (await client.get("/static/docs.js")).status_code == 200
        assert "/example/" not in (await client.get("/api/openapi.json")).json()["paths"]
        assert (await client.get("/api/example/")).status_code == 404


async def test_routes_of_the_relays_own_come_first(tmp_path: Path) -> None:
    """A route for any path is no clash: it answers what is left."""
    catch_all = plugin_with("/{rest:path}", methods=("GET", "POST"))
    async with served(catch_all, plugins={"path": "/"}) as client:
        assert (await client.get("/anything/else")).json() == {"from": "extra"}
        assert (await client.get("/health")).json()["status"] == "ok"
        assert (await client.post("/health")).status_code == 405, "the path is the relay's own"
        assert (await client.get("/api/topics")).json() == []
        assert (await client.get("/socket/websocket")).status_code == 426


@pytest.mark.parametrize(
    ("prefix", "path", "status"), [("/ext", "/ext/a", 200), ("/ext", "/a", 404), ("/ext", "/ext/nothing", 404)]
)
async def test_routes_may_stand_below_a_path_of_their_own(prefix: str, path: str, status: int) -> None:
    async with served(plugin_with("/a"), plugins={"path": prefix}, rest={"path": ""}) as client:
        answer = await client.get(path)
        assert answer.status_code == status
        assert (await client.get("/ext/docs")).status_code == 200


@pytest.mark.parametrize(
    ("route", "methods", "settings", "own"),
    [
        ("/health", ("GET",), {"plugins": {"path": "/"}}, "/health"),
        ("/health", ("POST",), {"plugins": {"path": "/"}}, "/health"),
        ("/static/{name}", ("GET",), {"plugins": {"path": "/"}}, "/static/x"),
        ("/api/mine", ("GET",), {"plugins": {"path": "/"}}, "/api/mine"),
        ("/", ("GET",), {"plugins": {"path": "/"}}, "demo page at / (demo_page = false turns it off)"),
        ("/", ("GET",), {"plugins": {"path": "/"}, "demo_page": False}, None),
        ("/docs", ("GET",), {"plugins": {"path": "/"}}, "/docs"),
        ("/socket/websocket", ("GET",), {"plugins": {"path": "/"}}, "/socket/websocket"),
        ("/live/{kind}", ("GET",), {"plugins": {"path": "/"}, "socket_paths": ["/live/x"]}, None),
        ("/sse", ("GET",), {"plugins": {"path": "/"}, "socket_paths": ["/"]}, "/sse"),
        ("/topics/{name:int}", ("GET",), {}, "/topics/1"),
        ("/publish", ("GET",), {}, None),
        ("/publish", ("POST",), {}, "/publish"),
    ],
)
async def test_clash_stops_the_start_and_names_both(
    route: str, methods: tuple[str, ...], settings: dict[str, Any], own: str | None
) -> None:
    relay = make(plugin_with(route, methods=methods), **settings)
    if own is None:
        async with relay.lifespan():
            return
    for check in (relay.start(), asyncio.to_thread(relay.check_routes)):
        with pytest.raises(ConfigError) as caught:
            await check
        text = str(caught.value)
        assert text.startswith(f"plugin extra (built-in): its route {methods[0]} {route} clashes with the relay's own ")
        assert f"the relay's own {own}, which is tried first" in text
    with pytest.raises(Exception, match="not running"):
        _ = relay.node


async def test_app_at_the_root_does_not_hide_behind_the_demo_page(tmp_path: Path) -> None:
    put(
        tmp_path,
        "files",
        "from starlette.responses import Response\n\n\ndef register_plugin(app):\n"
        "    app.mount('/', Response('mounted'))\n",
    )
    settings: dict[str, Any] = {"plugins": {"paths": [tmp_path], "path": "/"}}
    with pytest.raises(ConfigError, match="plugin files .* clashes with the relay's own demo page"):
        await make(**settings).start()
    async with served(**settings, demo_page=False) as client:
        assert (await client.get("/")).text == (await client.get("/assets/x.js")).text == "mounted"
        assert (await client.get("/health")).json()["status"] == "ok"


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ("/rooms/{id}", "/rooms/{name}", True),
        ("/rooms/{id}", "/rooms/stats", True),
        ("/{rest:path}", "/rooms/stats", True),
        ("/rooms/{id}", "/rooms/{number:int}", True),
        ("/rooms/stats", "/rooms/{id}", False),
        ("/rooms/x", "/rooms/{id}", False),
        ("/rooms/x/{id}", "/rooms/{name}/{id}", False),
        ("/rooms/{number:int}", "/rooms/{name}", False),
        ("/rooms/{id}", "/rooms/{id}/members", False),
    ],
)
async def test_route_that_another_plugins_route_hides_stops_the_start(first: str, second: str, clash: bool) -> None:
    plugins = plugin_with(first, name="first"), plugin_with(second, name="second")
    if clash:
        with pytest.raises(
            ConfigError, match=re.escape(f"plugin second (built-in): its route GET {second} clashes with")
        ):
            make(*plugins).check_routes()
    else:
        make(*plugins).check_routes()
    make(plugins[0], plugin_with(second, name="second", methods=("POST",))).check_routes()


async def test_two_plugins_with_one_route_are_both_named(tmp_path: Path) -> None:
    put(tmp_path, "second", SEED)
    relay = make(plugin_with("/", prefix="/example", name="first"), plugins={"paths": [tmp_path]})
    with pytest.raises(ConfigError, match="plugin second .* GET /example/ clashes with the same route of plugin first"):
        await relay.start()
    relay = make(plugin_with("/a", name="first"), plugin_with("/a", name="second", methods=("POST",)))
    async with relay.lifespan():
        pass


async def test_register_plugin_runs_in_the_loop_and_its_tasks_end_with_the_relay(tmp_path: Path) -> None:
    relay = make(plugins={"paths": [put(tmp_path, "system", SYSTEM), put(tmp_path, "example", SEED)]})
    import sys

    beats: list[str] = sys.modules["relay_plugin_system"].beats
    assert beats == [], "not before the start"
    for _ in range(2):  # it may be started again
        async with relay.lifespan(), client_of(relay) as client:
            for _ in range(3):
                await asyncio.sleep(0)
            assert beats[-1] == "beat"
            assert (await client.get("/api/example/")).status_code == 200
        assert beats[-1] == "end"
        beats.clear()
        async with client_of(relay._http) as client:
            assert (await client.get("/api/example/")).status_code == 404, "taken away at the stop"


async def test_plugin_without_routes_is_registered_without_a_rest_interface(tmp_path: Path) -> None:
    relay = make(plugins={"paths": [put(tmp_path, "system", SYSTEM)]}, rest={"path": ""})
    import sys

    async with relay.lifespan():
        await asyncio.sleep(0)
        assert sys.modules["relay_plugin_system"].beats == ["beat"]


async def test_failed_background_task_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failing = SYSTEM.replace('beats.append("beat")', 'raise RuntimeError("no antenna")')
    relay = make(plugins={"paths": [put(tmp_path, "system", failing)]})
    async with relay.lifespan():
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    (record,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert "background task" in record.getMessage() and "no antenna" in str(record.exc_info)


async def test_register_plugin_that_raises_stops_the_start_and_leaves_nothing_behind(tmp_path: Path) -> None:
    put(tmp_path, "a_system", SYSTEM)
    put(tmp_path, "broken", "def register_plugin(app): raise RuntimeError('no database')")
    relay = make(plugins={"paths": [tmp_path]})
    before = asyncio.all_tasks()
    with pytest.raises(ConfigError, match="plugin broken .*its register_plugin raised RuntimeError: no database"):
        await relay.start()
    await asyncio.sleep(0)
    assert {task for task in asyncio.all_tasks() - before if not task.done()} == set()


async def test_app_of_its_owner_keeps_its_own_tasks(tmp_path: Path) -> None:
    app, tasks = FastAPI(), set[Any]()
    app.state.background_tasks = tasks
    relay = make(plugins={"paths": [put(tmp_path, "example", SEED)]})
    relay.install(app, plugin_routes_in_app=True)
    count = len(app.routes)
    async with relay.lifespan(), client_of(app) as client:
        assert (await client.get("/example/")).status_code == 200
        assert app.state.background_tasks is tasks
    assert len(app.routes) == count


def test_routes_are_listed_however_they_were_included() -> None:
    inner, outer, app = APIRouter(prefix="/b"), APIRouter(prefix="/a"), FastAPI(docs_url=None, redoc_url=None)
    inner.add_api_route("/c", lambda: None, methods=["POST"])
    outer.include_router(inner, prefix="/x")
    app.include_router(outer, prefix="/y")
    app.router.routes.append(Mount("/files", StaticFiles(directory=".")))
    assert [route for route in flat_routes(app.routes) if route[0] != "/openapi.json"] == [
        ("/y/a/x/b/c", {"POST"}),
        ("/files", set()),
    ]
