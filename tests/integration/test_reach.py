"""Who reaches which route: hosts, forwarded headers and paths, over a real server, alone and mounted."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request
from starlette.testclient import TestClient

from relay import Plugin, Relay
from tests.support.client import Client
from tests.support.servers import AppServer
from tests.support.serving import Served, eventually, serve

UPGRADE = (
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
SOCKET = "/socket/websocket?vsn=2.0.0"
PATHS = ["/", "/console", "/static/page.js", "/api/docs", "/api/openapi.json", "/api/example/x", "/svc/x"]


async def ask(port: int, path: str, host: str | None, *lines: str, method: str = "GET") -> tuple[int, str]:
    """Status and body of a request with headers as they are given."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    hosts = [] if host is None else [f"Host: {host}"]
    is_upgrade = "/websocket" in path
    rest = UPGRADE if is_upgrade else "Connection: close\r\n"
    head = "\r\n".join((f"{method} {path} HTTP/1.1", *hosts, *lines))
    writer.write(f"{head}\r\n{rest}\r\n".encode())
    answer = await reader.readuntil(b"\r\n\r\n")
    body = b"" if answer.startswith(b"HTTP/1.1 101") else await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]), body.decode()


async def statuses(served: Served, host: str | None, *lines: str, socket: bool = True) -> set[int]:
    """What is answered on all routes that are not for operators, and by a handshake."""
    paths = [*PATHS, SOCKET] if socket else PATHS
    return {(await ask(served.port, f"{served.prefix}{path}", host, *lines))[0] for path in paths}


@asynccontextmanager
async def service() -> AsyncIterator[str]:
    """A process behind `[[proxy]]`; gives its address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@asynccontextmanager
async def served_relay(prefix: str = "", **settings: Any) -> AsyncIterator[Served]:
    router, plugin = APIRouter(prefix="/example"), Plugin("example")

    @router.get("/{what}")
    async def get_example(what: str) -> dict[str, str]:
        return {"example": what}

    plugin.include_router(router)
    async with service() as target:
        relay = Relay(
            **{"broadcast_url": "memory://", "system_topic": False, "extra_plugins": (plugin,), **settings},
            proxy=[{"prefix": "/svc", "target": target}],
        )
        app = None
        if prefix:
            app = FastAPI()
            relay.install(app, prefix)

            @app.get("/own")
            async def own(request: Request) -> str:
                return "own"

        async with serve(relay, app=app, prefix=prefix) as served:
            yield served


@pytest.mark.parametrize("prefix", ["", "/relay"])
@pytest.mark.parametrize("settings", [{}, {"allow_anonymous": True}])
async def test_host_is_checked_before_any_route(prefix: str, settings: dict[str, Any]) -> None:
    """DNS rebinding reaches neither pages nor plugins' routes, other processes behind `[[proxy]]` or sockets."""
    async with served_relay(prefix, **settings) as served:
        for host in (f"127.0.0.1:{served.port}", "localhost", "app.localhost:1", "[::1]:8000", "10.244.1.7:8000"):
            assert await statuses(served, host) <= {200, 101}, host
        for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", None):
            assert await statuses(served, name) == {403}, name
        assert await statuses(served, "localhost", "Host: evil.example") == {400}
        refused = served.relay.metrics.refused
        assert refused["http: host not allowed"] > 0 and refused["handshake: host not allowed"] > 0
        assert refused["http: several hosts"] > 0 and refused["handshake: several hosts"] > 0
        status, body = await ask(served.port, f"{prefix}/api/example/x", "relay.example.org")
        assert 'allowed_hosts = [\\"relay.example.org\\"]' in body
        if prefix:
            assert (await ask(served.port, "/own", "evil.example")) == (200, '"own"'), "the app is not the relay's"


async def test_hosts_of_the_settings_and_authenticated_clients_pass() -> None:
    async with served_relay(allow_anonymous=True, allowed_hosts=["relay.example.org"]) as served:
        assert await statuses(served, "relay.example.org:8000") <= {200, 101}
        assert await statuses(served, "evil.example") == {403}
    async with served_relay(authenticate=lambda request: {"sub": "ada"}) as served:
        assert await statuses(served, "any.example") <= {200, 101}
    async with served_relay(auth={"keys": ["a secret of thirty-two bytes, or more"]}) as served:
        assert await statuses(served, "any.example", socket=False) == {200}


@pytest.mark.parametrize("prefix", ["", "/relay"])
async def test_requests_through_a_proxy_are_refused_where_clients_are_not_authenticated(prefix: str) -> None:
    for header in ("X-Forwarded-For: 203.0.113.9", "X-Forwarded-For: testclient", "Forwarded: for=127.0.0.1"):
        async with served_relay(prefix) as served:
            assert await statuses(served, "127.0.0.1", header) == {403}
            assert (await ask(served.port, f"{prefix}/health", "127.0.0.1", header))[0] == 200
        async with served_relay(prefix, allow_anonymous=True) as served:
            assert await statuses(served, "127.0.0.1", header) <= {200, 101}


async def test_refusals_are_logged_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    async with served_relay() as served:
        for _ in range(5):
            await ask(served.port, "/api/example/x", "evil.example")
    lines = [record.message for record in caplog.records if "evil.example" in record.message]
    assert len(lines) == 1 and 'allowed_hosts = ["evil.example"]' in lines[0]


@pytest.mark.parametrize("settings", [{}, {"allow_anonymous": True}])
async def test_health_and_readiness_are_told_to_all_and_the_reason_to_operators(settings: dict[str, Any]) -> None:
    """As kubelets ask, under the pod's own address."""
    redis_url = "redis://svc:secret@127.0.0.1:1/0"
    settings = {**settings, "broadcast_url": "", "redis_url": redis_url, "rest": {"api_key": "k"}}
    async with served_relay(**settings) as served:
        await eventually(lambda: served.relay.link.reason, "a reason")
        for host in ("10.244.1.7:8000", "evil.example", "relay.default.svc.cluster.local", None):
            assert (await ask(served.port, "/health", host))[0] == 200
            assert await ask(served.port, "/ready", host) == (503, '{"status":"not ready"}')
            status, body = await ask(served.port, "/ready", host, "Authorization: Bearer k")
            assert (status, "127.0.0.1:1" in body) == (503, True)
        status, body = await ask(served.port, "/ready", "localhost")
        assert (status, "127.0.0.1:1" in body) == (503, True)
        for line in ("X-Forwarded-For: 127.0.0.1", "Origin: https://evil.example"):
            assert await ask(served.port, "/ready", "localhost", line) == (503, '{"status":"not ready"}')


async def test_api_key_is_enough_under_any_name() -> None:
    async with served_relay(allow_anonymous=True, rest={"api_key": "k"}) as served:
        assert (await ask(served.port, "/api/topics", "evil.example"))[0] == 401
        for path in ("/api/topics", "/api/example/x", "/metrics"):
            assert (await ask(served.port, path, "evil.example", "Authorization: Bearer k"))[0] == 200


async def test_metrics_ask_for_a_key_where_others_are_let_in() -> None:
    async with served_relay(allow_anonymous=True, metrics={"key": "m"}, rest={"api_key": "k"}) as served:
        for key, status in (("m", 200), ("k", 401), ("wrong", 401)):
            answer = await ask(served.port, "/metrics", "10.244.1.7:8000", f"Authorization: Bearer {key}")
            assert answer[0] == status
        status, body = await ask(served.port, "/metrics", "10.244.1.7:8000")
        assert status == 401 and "metrics.key" in body and "metrics.public = true" in body
        assert (await ask(served.port, "/metrics", "localhost"))[0] == 200
        assert served.relay.metrics.refused["metrics: wrong key"] == 2
        assert served.relay.metrics.refused["metrics: not allowed"] == 1
    async with served_relay(allow_anonymous=True, metrics={"public": True}) as served:
        assert (await ask(served.port, "/metrics", "evil.example"))[0] == 200
    async with served_relay() as served:
        assert (await ask(served.port, "/metrics", "evil.example"))[0] == 403
        assert (await ask(served.port, "/metrics", "10.244.1.7:8000"))[0] == 200


# What a server in front says.

APP = """
from fastapi import FastAPI, Request
from relay import Relay

app = FastAPI()

@app.get("/who")
def who(request: Request):
    return f"{request.client.host} {request.url.scheme}"

Relay(broadcast_url="memory://", system_topic=False).install(app, path="/relay")
"""


async def who(**environ: str) -> tuple[str, str]:
    """What an app under `relay serve` is told of a client that claims to be another; and what was logged."""
    with AppServer("relay", APP, environ=environ) as server:
        forwarded = ("X-Forwarded-For: 203.0.113.9", "X-Forwarded-Proto: https")
        status, body = await ask(server.port, "/who", "localhost", *forwarded)
        assert status == 200
        return body.strip('"'), server.output


async def test_relay_serve_believes_no_proxy_of_an_app_that_the_settings_do_not_name() -> None:
    assert (await who())[0] == "127.0.0.1 http"
    told, output = await who(FORWARDED_ALLOW_IPS="*")
    assert told == "127.0.0.1 http"
    assert "FORWARDED_ALLOW_IPS ignored" in output
    assert (await who(RELAY_TRUSTED_PROXIES='["127.0.0.1"]'))[0] == "203.0.113.9 https"
    assert (await who(RELAY_TRUSTED_PROXIES='["10.0.0.1"]'))[0] == "127.0.0.1 http"


@pytest.mark.parametrize("claim", ["testclient", "localhost", "127.0.0.1", "::1", "127.0.0.1:80", "unix:", "::1%x"])
async def test_client_that_a_header_names_is_a_stranger_whatever_the_server_believes(claim: str) -> None:
    relay = Relay(broadcast_url="memory://", system_topic=False)
    async with serve(relay, forwarded_allow_ips="*") as served:
        for host in ("localhost", "example.org"):
            assert (await ask(served.port, SOCKET, host, f"X-Forwarded-For: {claim}"))[0] == 403


def test_relay_under_test_answers_starlettes_test_client() -> None:
    relay = Relay(broadcast_url="memory://", system_topic=False)
    with TestClient(relay) as client:
        assert client.get("/").status_code == 200
        assert client.get("/api/topics").json() == []
        assert client.get("/metrics").status_code == 200
        with client.websocket_connect(SOCKET) as socket:
            socket.send_json(["1", "1", "room:1", "phx_join", {}])
            assert socket.receive_json()[4]["status"] == "ok"
    with TestClient(relay, client=("127.0.0.1", 50000), base_url="http://localhost") as client:
        assert client.get("/api/topics").json() == []


# Paths.


@pytest.mark.parametrize("prefix", ["", "/relay"])
async def test_paths_are_compared_by_segments(prefix: str) -> None:
    """`new Socket("/socket/")` asks for `/socket//websocket`."""
    async with served_relay(prefix, socket_paths=["/socket", "/deep/socket"]) as served:
        port, host = served.port, "localhost"
        for path in ("/socket//websocket", "//socket/websocket", "/deep//socket///websocket", "/socket/websocket/"):
            assert (await ask(port, f"{prefix}{path}?vsn=2.0.0", host))[0] == 101, path
        for path in ("/socketwebsocket", "/socket/x/websocket", "/websocket", "/Socket/websocket"):
            assert (await ask(port, f"{prefix}{path}?vsn=2.0.0", host))[0] == 404, path
        for path in ("//health", "/health/", "//ready", "/metrics/", "//static//page.js", "//console", "/api//topics"):
            assert (await ask(port, f"{prefix}{path}", host))[0] == 200, path
        for path in ("//api/topics", "/api/topics/", "/api//example/x", "/api/docs/", "/api//openapi.json"):
            assert (await ask(port, f"{prefix}{path}", host))[0] == 200, path
        for path in ("//evil.example", "//evil.example/", "//evil.example/console/", "/console//", "/api", "/api//"):
            status, _ = await ask(port, f"{prefix}{path}", host)
            assert status in (200, 404), f"no redirect: {path}"
        assert (await ask(port, f"{prefix}/svc//x/", host))[0] == 200


async def test_socket_path_with_a_slash_joins() -> None:
    async with served_relay() as served, Client.connect(f"{served.ws}/") as client:
        await client.join("room:1")


async def test_long_poll_path_with_slashes_opens_a_session() -> None:
    async with served_relay("/relay") as served:
        status, body = await ask(served.port, "/relay/socket//longpoll?vsn=2.0.0", "localhost")
        assert (status, json.loads(body)["status"]) == (200, 410)
        status, body = await ask(served.port, "/relay/socket/longpoll?vsn=2.0.0", "rebound.example")
        assert (status, json.loads(body)["status"]) == (200, 403)


# Pages of other servers on this machine.


async def test_page_of_a_development_server_may_connect(caplog: pytest.LogCaptureFixture) -> None:
    vite = "Origin: http://localhost:5173"
    async with served_relay() as served:
        for origin in (vite, "Origin: http://127.0.0.1:3000", "Origin: http://[::1]:3000"):
            assert (await ask(served.port, SOCKET, f"127.0.0.1:{served.port}", origin))[0] == 101
        assert (await ask(served.port, SOCKET, "localhost", "Origin: https://shop.example"))[0] == 403
        assert (await ask(served.port, SOCKET, "10.244.1.7", vite))[0] == 403
        assert (await ask(served.port, SOCKET, "localhost", vite, "X-Forwarded-For: 127.0.0.1"))[0] == 403
    (line,) = [record.message for record in caplog.records if "shop.example" in record.message]
    assert 'set allowed_origins = ["same", "https://shop.example"]' in line
    async with served_relay(allow_anonymous=True, trusted_proxies=["10.0.0.1"]) as served:
        assert (await ask(served.port, SOCKET, "localhost", vite))[0] == 403
    async with served_relay(allowed_origins=["https://shop.example"]) as served:
        assert (await ask(served.port, SOCKET, "localhost", vite))[0] == 403
