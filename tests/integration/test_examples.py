"""The examples, each run for real: what their READMEs say one does, and what one sees then."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from redis.asyncio import Redis

from relay import Relay
from tests.support.client import Client
from tests.support.node import SCRIPTS, need_browser, need_node, run_checks
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey, free_port, wait_for
from tests.support.serving import heard_on, http_get, serve

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NODE_PLUGIN = EXAMPLES / "node-plugin"
VITE = EXAMPLES / "vite"


@pytest.fixture(scope="module")
def examples() -> Iterator[RelayProcess]:
    """``relay serve --config examples/relay.toml``."""
    with RelayProcess("--config", "examples/relay.toml") as process:
        yield process


async def ask(client: Client, join_ref: str, topic: str, event: str, payload: Any) -> tuple[str, Any]:
    """Send, and return status and response of the reply; events that come before it are left out."""
    ref = client.next_ref()
    await client.send(join_ref, ref, topic, event, payload)
    while (message := await client.receive())[1] != ref:
        assert message[3] != "phx_reply", message
    return message[4]["status"], message[4]["response"]


@pytest.mark.parametrize(
    ("path", "lines_max"),
    [("chat/__init__.py", 82), ("aircraft/__init__.py", 79), ("node-plugin/plugin.js", 40)],
)
def test_an_example_is_short(path: str, lines_max: int) -> None:
    """Blank lines, comments and docstrings counted."""
    assert len((EXAMPLES / path).read_text(encoding="utf-8").splitlines()) <= lines_max


_CHAT, _PAGE = "test_chat_tells_everybody_what_one_says_and_answers", "test_a_page_works_in_a_browser"
_NODE, _VITE = (
    "test_a_plugin_in_node_answers_pushes_and_serves_a_route",
    "test_a_page_served_by_vite_reaches_the_relay_and_a_plugin",
)
_BOT = """redis-cli -u redis://127.0.0.1:6379 PUBLISH to:chat:lobby:new_msg '{"nick": "bot", "text": "Hi", """
TYPED = {
    ".venv/bin/relay serve --config examples/relay.toml": _CHAT,
    ".venv/bin/relay serve --config examples/relay.toml --open": _PAGE,
    ".venv/bin/python examples/aircraft/simulate.py": "test_the_simulator_says_what_the_aircraft_plugin_understands",
    "redis-cli -u redis://127.0.0.1:6379 PSUBSCRIBE 'from:chat:*'": _CHAT,
    f"""{_BOT}"at": "2026-01-01T12:00:00Z"}}'""": _PAGE,
    ".venv/bin/relay serve --config examples/node-plugin/relay.toml": _NODE,
    "npm ci --prefix examples/node-plugin": _NODE,
    "npm start --prefix examples/node-plugin": _NODE,
    "curl http://127.0.0.1:8000/api/node-plugin/": _NODE,
    '{"plugin":"node","answered":0}': _NODE,
    "npm ci --prefix examples/node-plugin && npm start --prefix examples/node-plugin": _VITE,
    "npm install --prefix examples/vite && npm run dev --prefix examples/vite": _VITE,
}
"""Each line that the READMEs have one type, or show, and the test here that does it."""


def test_every_line_of_the_readmes_is_tried_by_a_test_here() -> None:
    lines = {
        line.strip()
        for path in (ROOT / "examples").glob("*/README.md")
        for line in re.findall(r"^ {4}(\S.*)$", path.read_text("utf-8"), re.MULTILINE)
    }
    assert lines == set(TYPED)
    assert all(callable(globals()[name]) for name in TYPED.values())


def test_lock_file_of_the_node_plugin_holds_no_address() -> None:
    assert "://" not in (NODE_PLUGIN / "package-lock.json").read_text(encoding="utf-8")


# The chat.


async def test_chat_lets_in_whoever_brings_a_nick_that_is_free(examples: RelayProcess) -> None:
    async with Client.connect(examples.ws) as ada, Client.connect(examples.ws) as grace:
        payloads: tuple[Any, ...] = ({}, {"nick": "  "}, {"nick": 7}, [], None)
        for payload in payloads:
            assert await ask(ada, "1", "chat:a", "phx_join", payload) == ("error", {"reason": "nick is missing"})
        refusal = {"reason": "nick has over 24 characters"}
        assert await ask(ada, "1", "chat:a", "phx_join", {"nick": "a" * 25}) == ("error", refusal)

        assert await ask(ada, "2", "chat:a", "phx_join", {"nick": " Ada "}) == ("ok", {"nick": "Ada"})
        taken = ("error", {"reason": "nick is taken"})
        assert await ask(grace, "1", "chat:a", "phx_join", {"nick": "ada"}) == taken
        assert await ask(grace, "2", "chat:b", "phx_join", {"nick": "Ada"}) == ("ok", {"nick": "Ada"}), "another room"

        assert await ask(ada, "2", "chat:a", "phx_leave", {}) == ("ok", {})
        assert await ask(grace, "3", "chat:a", "phx_join", {"nick": "Ada"}) == ("ok", {"nick": "Ada"}), "free again"


async def test_chat_frees_the_nick_of_a_socket_that_is_gone(examples: RelayProcess) -> None:
    async with Client.connect(examples.ws) as lost:
        assert (await ask(lost, "1", "chat:c", "phx_join", {"nick": "Ada"}))[0] == "ok"
    async with Client.connect(examples.ws) as client, asyncio.timeout(20):
        while (await ask(client, "1", "chat:c", "phx_join", {"nick": "Ada"}))[0] != "ok":
            pass  # the relay may not have seen the end of the other yet


async def test_second_join_of_a_socket_changes_its_nick(examples: RelayProcess) -> None:
    async with Client.connect(examples.ws) as ada, Client.connect(examples.ws) as other:
        assert await ask(ada, "1", "chat:d", "phx_join", {"nick": "Ada"}) == ("ok", {"nick": "Ada"})
        assert await ask(ada, "2", "chat:d", "phx_join", {"nick": "Countess"}) == ("ok", {"nick": "Countess"})
        taken = ("error", {"reason": "nick is taken"})
        assert await ask(other, "1", "chat:d", "phx_join", {"nick": "countess"}) == taken
        assert await ask(other, "2", "chat:d", "phx_join", {"nick": "Ada"}) == ("ok", {"nick": "Ada"})


async def test_chat_tells_everybody_what_one_says_and_answers(examples: RelayProcess) -> None:
    async with (
        Client.connect(examples.ws) as ada,
        Client.connect(examples.ws) as grace,
        heard_on(examples.redis_url, "from:chat:*") as hear,
    ):
        for client, nick in ((ada, "Ada"), (grace, "Grace")):
            assert (await ask(client, "1", "chat:e", "phx_join", {"nick": nick}))[0] == "ok"
        for text in (None, "", "   ", 7):
            refused = await ask(ada, "1", "chat:e", "new_msg", {"text": text})
            assert refused == ("error", {"reason": "text is missing"})

        status, response = await ask(ada, "1", "chat:e", "new_msg", {"text": " Hello "})
        assert status == "ok"
        told = {"nick": "Ada", "text": "Hello", "at": response["at"]}
        while (message := await grace.receive())[3].startswith("presence_"):
            pass
        assert message == [None, None, "chat:e", "new_msg", told]
        assert await hear() == ("from:chat:e:new_msg", b'{"text": " Hello "}'), "backends hear it as it was pushed"


async def test_chat_lists_members_and_sends_the_others_who_is_typing(examples: RelayProcess) -> None:
    async with Client.connect(examples.ws) as ada, Client.connect(examples.ws) as grace:
        for client, nick in ((ada, "__proto__"), (grace, "Grace")):  # a nick may have any name
            assert (await ask(client, "1", "chat:f", "phx_join", {"nick": nick}))[0] == "ok"
        typing = {"nick": "__proto__", "typing": True}
        assert await ask(ada, "1", "chat:f", "typing", typing) == ("ok", {})
        members: set[str] = set()
        events: list[Any] = []
        async with asyncio.timeout(20):
            while members != {"__proto__", "Grace"} or not events:
                _, _, _, event, payload = await grace.receive()
                if event.startswith("presence_"):
                    for entry in payload.get("joins", payload).values():
                        members |= {meta["meta"]["nick"] for meta in entry["metas"]}
                else:
                    events.append((event, payload))
        assert events == [("typing", typing)]


# The aircraft.


async def count_lines(relay: RelayProcess) -> dict[str, int]:
    """What `GET /api/aircraft/lines` answers."""
    status, body = await http_get(f"{relay.http}/api/aircraft/lines")
    assert status == 200, body
    counts: dict[str, int] = json.loads(body)
    return counts


async def test_aircraft_are_told_on_the_topic_of_their_tile(examples: RelayProcess) -> None:
    reports = [
        {"icao24": "39de4f", "latitude": 45.7, "longitude": 5.1, "altitude": 35000, "df": "17", "bds": "05"},
        {"icao24": "e49123", "latitude": -3.2, "longitude": -60.1, "callsign": "TAM3301", "track": 12.5},
        {"icao24": "39de50", "latitude": 49.99, "longitude": 9.99},
    ]
    ignored = [
        '{"icao24": "39de51", "altitude": 1000}',
        "{",
        "",
        '{"icao24":"a","latitude":91,"longitude":0}',
        "\udcff",
    ]
    before = await count_lines(examples)
    async with Client.connect(examples.ws) as client, Redis.from_url(examples.redis_url) as redis:
        for topic in ("aircraft:45:5", "aircraft:-5:-65"):
            assert await ask(client, "1", topic, "phx_join", {}) == ("ok", {"aircraft": []})
        lines = "\n".join([*map(json.dumps, reports), *ignored])
        assert await redis.publish("jet1090-full-lfbo", lines.encode(errors="surrogateescape")) == 1

        seen = {"icao24": "39de4f", "latitude": 45.7, "longitude": 5.1, "altitude": 35000.0}
        await client.expect_event("aircraft:45:5", "positions", {"aircraft": [seen, reports[2]]})
        await client.expect_event("aircraft:-5:-65", "positions", {"aircraft": [reports[1]]})
        await client.expect_alive()

        async with Client.connect(examples.ws) as late:
            there = await ask(late, "1", "aircraft:45:5", "phx_join", {})
            assert there == ("ok", {"aircraft": [seen, reports[2]]}), "who comes later sees them at once"
    after = await count_lines(examples)
    assert {key: after[key] - before[key] for key in after} == {"positions": 3, "ignored": 5}


async def test_the_simulator_says_what_the_aircraft_plugin_understands(examples: RelayProcess) -> None:
    """It finds the relay by itself, as the README has it."""
    before = await count_lines(examples)
    command = [
        sys.executable,
        "examples/aircraft/simulate.py",
        "--aircraft",
        "150",
        "--interval",
        "0.1",
        "--reports",
        "3",
    ]
    environ = {**examples.environ, "PYTHONPATH": str(ROOT)}
    ended = await asyncio.to_thread(
        subprocess.run,
        command,
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=50 * PATIENCE,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "150 aircraft, each 0.1 s, to jet1090-full; Ctrl+C ends it\n"
    async with asyncio.timeout(20):
        while (after := await count_lines(examples))["positions"] < before["positions"] + 450:
            pass  # what has been published may still be on its way
    assert after == {"positions": before["positions"] + 450, "ignored": before["ignored"]}


# Their pages.


@pytest.mark.parametrize("name", ["chat", "aircraft"])
@pytest.mark.parametrize(
    "flags",
    [["--width=1280"], ["--width=1280", "--dark"], ["--width=360", "--height=740"]],
    ids=["light", "dark", "phone"],
)
def test_a_page_works_in_a_browser(valkey: Valkey, tmp_path: Path, name: str, flags: list[str]) -> None:
    """No error on the console, which a breach of the page's strict policy would be; no request to another host."""
    need_browser()
    with RelayProcess("--config", "examples/relay.toml", "--redis-url", valkey.url) as relay:
        picture = kept_picture(tmp_path, "-".join([name, *(flag.strip("-") for flag in flags)]))
        run_checks("examples-chromium.mjs", relay.http, name, str(picture), *flags, redis_url=valkey.url)
        assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["chat", "aircraft"])
async def test_a_page_works_in_a_relay_that_is_mounted(valkey: Valkey, tmp_path: Path, name: str) -> None:
    need_browser()
    topics = [{"match": "chat:*", "presence": "plugin", "client_events": ["typing"]}]
    relay = Relay(redis_url=valkey.url, plugins={"paths": [EXAMPLES]}, topics=topics)
    app = FastAPI()
    relay.install(app, "/live/relay")
    async with serve(relay, app=app, prefix="/live/relay") as served:
        arguments = ("examples-chromium.mjs", served.http, name, str(tmp_path / "page.png"))
        await asyncio.to_thread(run_checks, *arguments, redis_url=valkey.url)


def kept_picture(tmp_path: Path, name: str) -> Path:
    """Where a picture goes; TESTS_SCREENSHOTS names a directory that keeps them."""
    directory = Path(os.environ.get("TESTS_SCREENSHOTS") or tmp_path).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"example-{name}.png"


# The plugin in Node.


@contextmanager
def node_process(command: list[str], directory: Path, ready: str, **environ: str) -> Iterator[None]:
    """A command that is ended afterwards, and that has said ``ready`` before; it may not end by itself."""
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, "NO_COLOR": "1", **environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    said: list[str] = []
    reader = threading.Thread(target=said.extend, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        wait_for(lambda: any(ready in line for line in said) or process.poll() is not None, ready)
        assert process.poll() is None, said
        yield
        assert process.poll() is None, said
    finally:
        process.terminate()
        process.wait()
        reader.join(5)
        process.stdout.close()


def node_plugin(redis_url: str, port: int) -> AbstractContextManager[None]:
    """``npm start`` in the plugin's directory, but without npm between it and us."""
    ready = f"serving http://127.0.0.1:{port}\n"
    return node_process(["node", "plugin.js"], NODE_PLUGIN, ready, REDIS_URL=redis_url, PORT=str(port))


@pytest.fixture(scope="module")
def node_packages() -> None:
    """The plugin's packages; tools/browser.sh installs them."""
    need_node()
    if not (NODE_PLUGIN / "node_modules" / "redis").is_dir():
        pytest.skip("the packages of the example are not installed: npm ci --prefix examples/node-plugin")


async def test_a_plugin_in_node_answers_pushes_and_serves_a_route(
    node_packages: None, valkey: Valkey, tmp_path: Path
) -> None:
    port = free_port()
    text = (NODE_PLUGIN / "relay.toml").read_text(encoding="utf-8")
    assert "redis://localhost:6379" in text and "127.0.0.1:8001" in text
    config = tmp_path / "relay.toml"
    config.write_text(text.replace("redis://localhost:6379", valkey.url).replace("127.0.0.1:8001", f"127.0.0.1:{port}"))

    with RelayProcess("--config", str(config)) as relay:
        status, body = await http_get(f"{relay.http}/api/node-plugin/")
        assert (status, json.loads(body)["title"]) == (502, "Bad Gateway"), "it does not run yet"

        with node_plugin(valkey.url, port):
            async with Client.connect(relay.ws) as client:
                join_ref = await client.join("calc")
                await client.send_raw(b"\0\1\1\4\3" + b"9" + b"9" + b"calc" + b"sum" + b"\xff not JSON")
                for request_id, numbers, answer in (
                    ("a1", [1, 2, 3], {"sum": 6}),
                    ("a2", [], {"sum": 0}),
                    ("a3", ["1", "2"], {"error": "expected numbers: [1, 2, …]"}),
                    ("a4", None, {"error": "expected numbers: [1, 2, …]"}),
                ):
                    await client.send(join_ref, None, "calc", "sum", {"request_id": request_id, "numbers": numbers})
                    while (message := await client.receive())[3] == "phx_reply":
                        pass
                    assert message == [None, None, "calc", "result", {"request_id": request_id, **answer}]

            assert await http_get(f"{relay.http}/api/node-plugin/") == (200, '{"plugin":"node","answered":4}')
            assert await http_get(f"{relay.http}/api/node-plugin/x?y=1") == (404, '{"error":"no /x?y=1 here"}')


# Vite's dev server before all of them.


def test_a_page_served_by_vite_reaches_the_relay_and_a_plugin(
    node_packages: None, valkey: Valkey, tmp_path: Path
) -> None:
    """The proxy lines of ``vite.config.js``, with only their addresses changed, in a real browser."""
    need_browser()
    directory = tmp_path / "vite"
    shutil.copytree(VITE, directory, ignore=shutil.ignore_patterns("node_modules", "package-lock.json"))
    packages = directory / "node_modules"
    packages.mkdir()
    for name, installed in (("vite", "vite"), ("phoenix", "phoenix-1.8")):
        (packages / name).symlink_to(SCRIPTS / "node_modules" / installed)
    port, plugin_port = free_port(), free_port()
    with (
        RelayProcess("--redis-url", valkey.url) as relay,
        node_plugin(valkey.url, plugin_port),
    ):
        config = directory / "vite.config.js"
        text = config.read_text("utf-8")
        for address, own in (("http://127.0.0.1:8000", relay.http), ("127.0.0.1:8001", f"127.0.0.1:{plugin_port}")):
            assert address in text
            text = text.replace(address, own)
        config.write_text(text, "utf-8")
        # As `npm run dev`, but on a port of the test's choice, or not at all.
        vite = ["node", "node_modules/vite/bin/vite.js", "--host", "127.0.0.1", "--port", str(port), "--strictPort"]
        with node_process(vite, directory, f"http://127.0.0.1:{port}/"):
            run_checks("vite-chromium.mjs", f"http://127.0.0.1:{port}")
