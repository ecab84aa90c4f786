"""nginx and Caddy in front of a relay, with the files of ``config/``: names and ports are all that is changed."""

import asyncio
import json
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import websockets
from fastapi import APIRouter
from redis import Redis
from ruamel.yaml import YAML
from websockets.exceptions import InvalidStatus

from relay import Plugin, Relay
from relay.web.rest import make_rest
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.process import RelayProcess, Valkey, free_port, wait_for
from tests.support.serving import eventually, http_get, serve
from tests.support.sse import Stream

CONFIG = Path(__file__).parents[2] / "config"


def nginx_main(directory: Path) -> str:
    """What stands around a site when nginx is run in the foreground, in a directory of its own."""
    paths = "".join(
        f"{name}_temp_path {directory}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off; pid {directory}/nginx.pid; error_log stderr; events {{}}"
    return f"{main}\nhttp {{ access_log off; {paths}\n%s\n}}\n"


def command(proxy: str, directory: Path, port: int, relay_port: int) -> list[str]:
    """The proxy's file with its ports changed, and how it is run in the foreground."""
    program = shutil.which(proxy) or shutil.which(proxy, path="/usr/sbin:/sbin")
    if program is None:
        pytest.skip(f"{proxy} is not installed")
    if proxy == "caddy":
        text = (CONFIG / "Caddyfile").read_text()
        text = text.replace("relay.example.org {", f"http://127.0.0.1:{port} {{").replace(":8000", f":{relay_port}")
        (directory / "Caddyfile").write_text(re.sub("^{", "{\n\tadmin off", text, flags=re.MULTILINE))
        return [program, "run", "--adapter", "caddyfile", "--config", str(directory / "Caddyfile")]
    text = (CONFIG / "nginx.conf").read_text()
    text = text.replace("/var/log/nginx/", f"{directory}/")
    text = text.replace("listen 80;", f"listen 127.0.0.1:{port};").replace("127.0.0.1:8000", f"127.0.0.1:{relay_port}")
    (directory / "nginx.conf").write_text(nginx_main(directory) % text)
    return [program, "-e", "stderr", "-p", str(directory), "-c", str(directory / "nginx.conf")]


@asynccontextmanager
async def behind(proxy: str, directory: Path, relay_port: int) -> AsyncIterator[int]:
    """Run the proxy in front of a relay; gives its port."""
    port = free_port()
    environ = {**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    arguments = command(proxy, directory, port, relay_port)  # skips where the proxy is not installed
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*arguments, env=environ, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(30):
            while True:
                assert process.returncode is None, (directory / "log").read_text()
                try:
                    if (await http_get(f"http://127.0.0.1:{port}/health"))[0] == 200:
                        break
                except OSError:
                    await asyncio.sleep(0.02)
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
async def test_relay_works_behind_a_proxy_with_our_file(proxy: str, tmp_path: Path, valkey: Valkey) -> None:
    relay = Relay(redis_url=valkey.url, system_topic=False, trusted_proxies=["127.0.0.1"])
    async with serve(relay) as served, behind(proxy, tmp_path, served.port) as port:
        url = f"ws://127.0.0.1:{port}/socket"
        # Another address of this machine, to be told from the proxy's own.
        async with Client.connect(url, origin=f"http://127.0.0.1:{port}", local_addr=("127.0.0.2", 0)) as client:
            await client.join("room:1")
            assert [socket.address for socket in relay.node.sockets.values()] == ["127.0.0.2"]
            await relay.broadcast("room:1", "new_msg", {"text": "grüezi"})
            assert (await client.receive())[3:] == ["new_msg", {"text": "grüezi"}]
        with pytest.raises(InvalidStatus) as refused:
            await websockets.connect(f"{url}/websocket?vsn=2.0.0", origin="https://elsewhere.example")  # type: ignore[arg-type]  # a NewType of str
        assert refused.value.response.status_code == 403
        status, text = await http_get(f"http://127.0.0.1:{port}/ready")
        assert (status, json.loads(text)) == (200, {"status": "ready"})


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
async def test_streams_pass_a_proxy_with_our_file_and_their_tokens_are_not_logged(
    proxy: str, tmp_path: Path, valkey: Valkey
) -> None:
    relay = Relay(redis_url=valkey.url, system_topic=False, trusted_proxies=["127.0.0.1"], auth={"keys": [SECRET]})
    made = token("alice", {"room:*": "join"})
    async with (
        serve(relay, http="relay.server:RelayHTTPProtocol") as served,
        behind(proxy, tmp_path, served.port) as port,
    ):
        base = f"http://127.0.0.1:{port}/socket"
        async with Stream.open(base, "room:1", token=made, userToken="another") as stream:
            assert stream.status == 200
            for number in range(3):
                await relay.publish("room:1", "new_msg", number)
                await stream.expect_event("new_msg", str(number))  # at once, and not in a buffer
            relay.node.drain()
            assert [event.event for event in await stream.rest()] == ["relay:error"]
        log = tmp_path / ("access.log" if proxy == "nginx" else "log")
        await eventually(lambda: "topic=room" in log.read_text(), "the request to be logged")
        logged = log.read_text()
        assert ("token=***&userToken=***" if proxy == "nginx" else "token=REDACTED") in logged
        assert made not in logged and "another" not in logged


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
async def test_no_token_is_logged_of_requests_that_fail(proxy: str, tmp_path: Path, valkey: Valkey) -> None:
    """Lines about errors are others than those about requests; Caddy logs headers, of which one is the user's token."""
    relay = Relay(redis_url=valkey.url, system_topic=False, trusted_proxies=["127.0.0.1"], auth={"keys": [SECRET]})
    secrets = ["in-the-query", "lp-of-the-session", "in-the-protocol", "in-a-header", "in-the-referer"]
    query, session, protocol, header, referer = secrets
    headers = {
        "Sec-WebSocket-Protocol": f"phoenix, base64url.bearer.phx.{protocol}",
        "X-Phoenix-AuthToken": header,
        "Referer": f"http://127.0.0.1/?token={referer}",
    }
    path = f"/socket/longpoll?vsn=2.0.0&token={query}&token={session}"
    async with AsyncExitStack() as running:
        served = await running.enter_async_context(serve(relay))
        async with behind(proxy, tmp_path, served.port) as port:
            assert (await raw_get(port, path, headers))[0] == 200
            await running.aclose()
            assert (await raw_get(port, path, headers))[0] == 502
            await eventually(lambda: "502" in logs_in(tmp_path), "the request to be logged")
    assert not [secret for secret in secrets if secret in logs_in(tmp_path)]


def logs_in(directory: Path) -> str:
    return "".join(path.read_text() for path in directory.glob("*log"))


def plugin_with_a_route() -> Plugin:
    router = APIRouter(prefix="/example")

    @router.get("/{what:path}")
    async def get_example(what: str) -> dict[str, str]:
        return {"asked for": what}

    plugin = Plugin("example")
    plugin.include_router(router)
    return plugin


@pytest.mark.parametrize("proxy", ["nginx", "caddy"])
async def test_routes_of_plugins_pass_a_proxy_with_our_file_and_those_of_operators_do_not(
    proxy: str, tmp_path: Path
) -> None:
    """In whatever spelling: the proxy and the relay must not read a path in two ways."""
    relay = Relay(
        broadcast_url="memory://",
        system_topic=False,
        allow_anonymous=True,
        trusted_proxies=["127.0.0.1"],
        extra_plugins=(plugin_with_a_route(),),
        metrics={"public": True},
    )
    async with serve(relay) as served, behind(proxy, tmp_path, served.port) as port:
        status, text = await http_get(f"http://127.0.0.1:{port}/api/example/a/b")
        assert (status, json.loads(text)) == (200, {"asked for": "a/b"})
        own = [path.split("{")[0].rstrip("/") for path in relay_paths()]
        assert {"/publish", "/topics", "/sockets", "/users"} <= set(own)
        paths = ["/metrics", "/console", "/console/access", "/api", "/api/", *(f"/api{path}" for path in own)]
        paths += ["/api/docs", "/api/redoc", "/api/openapi.json", "/api/topics/example/x", "/api/topics/a%0Ab"]
        for path in paths:
            for spelled in (path, f"{path}/", f"/{path}", path.replace("/", "//"), path.replace("o", "%6F")):
                refused, _ = await raw_get(port, spelled)
                assert refused == 404, spelled


def relay_paths() -> list[str]:
    relay = Relay(broadcast_url="memory://")
    return [str(path) for path in make_rest(relay.components, lambda: relay.node).openapi()["paths"]]


async def raw_get(port: int, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """A GET with a path as it is: clients would tidy it up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = (f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", *map(": ".join, (headers or {}).items()))
    writer.write("\r\n".join((*lines, "Connection: close", "", "")).encode())
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1]), answer


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_site_of_the_compose_file_spreads_sockets_over_both_relays(tmp_path: Path, valkey: Valkey) -> None:
    """As Compose starts it: two relays, of which one is stopped."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
    if program is None:
        pytest.skip("nginx is not installed")
    compose = YAML(typ="safe").load((CONFIG / "compose.yaml").read_text())
    port = free_port()
    own_settings = compose["services"]["relay-1"]["environment"]
    environ = {name: own_settings[name] for name in ("RELAY_ALLOW_ANONYMOUS", "RELAY_ALLOWED_HOSTS")}
    environ |= {"RELAY_REDIS_URL": valkey.url, "RELAY_TRUSTED_PROXIES": '["127.0.0.1"]'}
    with RelayProcess(environ=environ) as first, RelayProcess(environ=environ) as second:
        site = compose["configs"]["nginx"]["content"].replace("$$", "$").replace("listen 8000", f"listen {port}")
        for name, relay in (("relay-1", first), ("relay-2", second)):
            site = site.replace(f"{name}:8000", relay.http.removeprefix("http://"))
        (tmp_path / "nginx.conf").write_text(nginx_main(tmp_path) % site)
        nginx = [program, "-e", "stderr", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
        process = await asyncio.create_subprocess_exec(*nginx, stderr=asyncio.subprocess.DEVNULL)
        try:
            wait_for(lambda: listens(port), "nginx to listen")
            url = f"ws://127.0.0.1:{port}/socket"
            async with Client.connect(url) as one, Client.connect(url) as two:
                await one.join("room:1")
                await two.join("room:1")
                health = [json.loads((await http_get(f"{relay.http}/health"))[1]) for relay in (first, second)]
                assert [each["sockets"] for each in health] == [1, 1]
                with Redis(port=valkey.port) as redis:
                    redis.publish("to:room:1:new_msg", "{}")
                for client in (one, two):
                    await client.expect_event("room:1", "new_msg", {})
                second.stop()
                await join_each(url, 3)
                # Nor does it count as dead once it is back: the other is restarted at once.
                with RelayProcess("--port", second.http.rpartition(":")[2], environ=environ):
                    first.stop()
                    await join_each(url, 3)
        finally:
            process.terminate()
            await process.wait()


async def join_each(url: str, count: int) -> None:
    """Connect and join, so often that the proxy has asked each relay."""
    for _ in range(count):
        async with Client.connect(url) as client:
            await client.join("room:1")


def logged_by_nginx(uri: str) -> str:
    """What the maps of our file make of a request, by Python's reading of their patterns."""
    text = (CONFIG / "nginx.conf").read_text()
    values = {"request_uri": uri}
    maps = re.findall(r"^map \$(\w+) \$(\w+) \{\n    default \$\w+;\n    \"~(.*)\" \"(.*)\";$", text, re.MULTILINE)
    for source, target, pattern, replacement in maps:
        found = re.search(pattern.replace("(?<", "(?P<").replace("(?P<!", "(?<!"), values[source])
        values[target] = values[source]
        if found is not None:
            values[target] = re.sub(r"\$(\w+)", lambda name, found=found: found[name[1]], replacement)  # type: ignore[misc]
    return values["relay_uri"]


@pytest.mark.parametrize(
    ("query", "logged"),
    [
        ("vsn=2.0.0&token=lp-a.b.c", "vsn=2.0.0&token=***"),
        ("token=eyJ.a.b&vsn=2.0.0&token=lp-a.b.c", "token=***&vsn=2.0.0&token=***"),
        ("token=eyJ.a.b&vsn=2.0.0", "token=***&vsn=2.0.0"),
        ("topic=a&token=eyJ.a.b&userToken=x&y=z", "topic=a&token=***&userToken=***&y=z"),
        ("vsn=2.0.0", "vsn=2.0.0"),
    ],
)
def test_nginx_masks_all_tokens_of_a_request(query: str, logged: str) -> None:
    """A long poll has two in parameters of one name: the user's and the session's."""
    assert logged_by_nginx(f"/socket/longpoll?{query}") == f"/socket/longpoll?{logged}"
