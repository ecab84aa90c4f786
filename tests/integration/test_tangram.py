"""tangram's own page and plugins, unchanged, on the relay: in the place of its channel service, and in its process."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Self
from urllib.request import Request, urlopen

import pytest
import redis
from websockets.sync.client import connect

from tests.support.keys import SECRET
from tests.support.node import need_browser, run_checks
from tests.support.process import DEADLINE_S, RelayProcess, Valkey, free_port
from tests.support.tangram import ENVIRONMENT, AircraftStream, Tangram, environment, need_tangram

ROOT = Path(__file__).parents[2]
PROFILE = ROOT / "config" / "tangram.toml"
EXAMPLE = ROOT / "examples" / "tangram"

TIME_S = 300.0
"""How long a whole conversation with the page may take on a slow machine, with a restart of the relay and of Redis."""


@pytest.fixture
def bus() -> Iterator[Valkey]:
    """A server of this test's own, which is restarted."""
    with Valkey() as server:
        yield server


# As tangram's own plugins of the seed's time do it.
SEED_ERA_SYSTEM = """
import asyncio
import json
import os

import redis.asyncio as redis
from fastapi import FastAPI


async def server_events(redis_url):
    client = redis.Redis.from_url(redis_url)
    while True:
        await client.publish("to:system:update-node", json.dumps({"el": "uptime", "value": "0:00:01"}))
        await asyncio.sleep(0.1)


def register_plugin(app: FastAPI) -> None:
    task = asyncio.create_task(server_events(os.environ["REDIS_URL"]))
    app.state.background_tasks.add(task)
    task.add_done_callback(app.state.background_tasks.discard)
"""


class Conversation:
    """What a page cannot do itself, in the order in which it asks for it."""

    def __init__(
        self, bus: Valkey, tangram: Tangram | None, relay: "ProfiledRelay | None", aircraft: AircraftStream
    ) -> None:
        self._bus = bus
        self._tangram = tangram
        self._relay = relay
        self._aircraft = aircraft
        self.boxes: list[dict[str, Any]] = []
        self._client: redis.Redis | None = None
        self._heard: Any = None

    def act(self, asked: dict[str, Any]) -> None:
        match asked["do"]:
            case "publish aircraft":
                self._aircraft.show(asked["topic"], asked["count"])
            case "listen for a bounding box":
                self._client = redis.Redis.from_url(self._bus.url)
                self._heard = self._client.pubsub()  # type: ignore[no-untyped-call]
                self._heard.psubscribe("from:system:*")
                assert self._heard.get_message(timeout=DEADLINE_S) is not None, "the confirmation"
            case "expect a bounding box":
                self._expect_box(asked["id"])
            case "restart the relay":
                assert self._relay is not None
                self._relay.restart()
            case "restart Redis":
                # In its own process, its plugins end with their connection, without a word.
                if self._tangram is not None:
                    self._tangram.stop()
                self._bus.kill()
                self._bus.start()
                if self._tangram is not None:
                    self._tangram.start()
            case other:
                raise AssertionError(other)

    def _expect_box(self, page: str) -> None:
        assert self._client is not None and self._heard is not None
        end = time.monotonic() + DEADLINE_S
        with closing(self._client), closing(self._heard) as heard:
            while time.monotonic() < end:
                message = heard.get_message(timeout=1, ignore_subscribe_messages=True)
                if message is not None and message["channel"] == b"from:system:bound-box":
                    box = json.loads(message["data"])
                    if box["connectionId"] == page:
                        assert box["northEastLat"] > box["southWestLat"]
                        self.boxes.append(box)
                        return
        raise AssertionError("no bounding box came out on Redis")


class ProfiledRelay:
    """The relay with the profile as it is, but for ports, and a secret that is in no file; it can be restarted."""

    def __init__(self, bus: Valkey, page_port: int) -> None:
        self.port = free_port()
        origins = re.sub("2346", str(page_port), re.findall(r"^allowed_origins = (.*)$", PROFILE.read_text(), re.M)[0])
        self._variables = {
            "RELAY_REDIS_URL": bus.url,
            "RELAY_ALLOWED_ORIGINS": origins,
            "RELAY_AUTH__KEYS": json.dumps([SECRET]),
        }
        self._process = self._make()

    def _make(self) -> RelayProcess:
        return RelayProcess("--config", str(PROFILE), "--port", str(self.port), environ=self._variables)

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def restart(self) -> None:
        assert self._process.stop() == 0
        self._process.__exit__(None, None, None)
        self._process = self._make()
        self._process.__enter__()

    def __enter__(self) -> Self:
        self._process.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)


def converse(conversation: Conversation, page: str, relay: str, picture: Path, *restarts: str) -> None:
    """Have a browser open the page, and everything work at first and after each restart."""
    arguments = (page, relay, str(picture), *restarts)
    checks = run_checks("tangram-chromium.mjs", *arguments, act=conversation.act, deadline_s=TIME_S)
    assert len(conversation.boxes) == 1 + len(restarts)
    assert "nothing is asked of another host" in checks


def test_unchanged_page_of_tangram_works_on_the_relay_and_outlives_restarts(bus: Valkey, tmp_path: Path) -> None:
    need_browser()
    need_tangram()
    page_port = free_port()
    with ExitStack() as stack:
        relay = stack.enter_context(ProfiledRelay(bus, page_port))
        tangram = stack.enter_context(Tangram(bus.url, relay.url, port=page_port))
        aircraft = stack.enter_context(AircraftStream(bus.url))
        conversation = Conversation(bus, tangram, relay, aircraft)
        picture = tmp_path / "picture.png"
        converse(conversation, tangram.url, relay.url, picture, "restart the relay", "restart Redis")
        assert picture.stat().st_size > 10_000


def test_tangrams_page_and_plugins_run_in_the_relays_process(bus: Valkey, tmp_path: Path) -> None:
    """Source: examples/tangram/plugins. A service that ends with its connection to Redis is started again."""
    need_browser()
    need_tangram()
    port = free_port()
    with ExitStack() as stack:
        # Never started: its file is what the adapter reads.
        files = Tangram(bus.url, f"http://localhost:{port}")
        stack.callback(files.close)
        environ = environment(files.directory) | {
            "TANGRAM_CONFIG": str(files.config),
            "RELAY_REDIS_URL": bus.url,
            "RELAY_AUTH__KEYS": json.dumps([SECRET]),
            "RELAY_ALLOWED_ORIGINS": "same",
            "RELAY_DEMO_PAGE": "false",
            "RELAY_PLUGINS": json.dumps({"paths": [str(EXAMPLE / "plugins")], "path": "/"}),
        }
        relay = RelayProcess(
            "--config",
            str(PROFILE),
            "--port",
            str(port),
            environ=environ,
            program=(ENVIRONMENT / "bin" / "python", ROOT),
        )
        stack.enter_context(relay)
        aircraft = stack.enter_context(AircraftStream(bus.url))
        conversation = Conversation(bus, None, None, aircraft)
        url = f"http://localhost:{port}"
        converse(conversation, url, url, tmp_path / "picture.png", "restart Redis")
        with urlopen(f"{url}/jet1090/search?q=x") as answer:
            assert json.loads(answer.read()) == [], "a route of a plugin of tangram's"
        assert relay.stop() == 0


def test_relay_runs_in_tangrams_process(bus: Valkey, tmp_path: Path) -> None:
    """Source: examples/tangram/relay-in-tangram. One port, and no other origin."""
    need_browser()
    need_tangram()
    package = tmp_path / "package"
    shutil.copytree(EXAMPLE / "relay-in-tangram", package)
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--target", str(tmp_path / "site"), str(package)], check=True)
    variables = {
        "RELAY_CONFIG": str(PROFILE),
        "RELAY_REDIS_URL": bus.url,
        "RELAY_AUTH__KEYS": json.dumps([SECRET]),
        "RELAY_ALLOWED_ORIGINS": "same",
        "PYTHONPATH": str(tmp_path / "site"),
    }
    with ExitStack() as stack:
        tangram = stack.enter_context(Tangram(bus.url, plugins=("relay_in_tangram",), environ=variables))
        aircraft = stack.enter_context(AircraftStream(bus.url))
        conversation = Conversation(bus, tangram, None, aircraft)
        converse(conversation, tangram.url, tangram.url, tmp_path / "picture.png", "restart Redis")


def test_plugins_of_the_seeds_time_work_with_the_profile(bus: Valkey, tmp_path: Path) -> None:
    """Source: seed.md: its example answers at /example/; a plugin that publishes from a task of its own."""
    seed = (ROOT / "tests" / "data" / "seed_example_plugin.py.txt").read_text()
    for name, text in {"system": SEED_ERA_SYSTEM, "example": seed}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    port = free_port()
    environ = {
        "REDIS_URL": bus.url,
        "RELAY_REDIS_URL": bus.url,
        "RELAY_AUTH__KEYS": json.dumps([SECRET]),
        "RELAY_PLUGINS": json.dumps({"paths": [str(tmp_path)], "path": "/"}),
    }
    with RelayProcess("--config", str(PROFILE), "--port", str(port), environ=environ) as relay:
        made = token_for(port, "system")
        with urlopen(f"http://127.0.0.1:{port}/example/") as answer:
            assert json.loads(answer.read()) == {"data": "This is an example plugin response"}
        with connect(f"ws://127.0.0.1:{port}/websocket?vsn=2.0.0&userToken={made['token']}") as page:
            page.send('["1","1","system","phx_join",{}]')
            events = [json.loads(page.recv(DEADLINE_S)) for _ in range(3)]
            assert [event for _, _, _, event, _ in events] == ["phx_reply", "update-node", "update-node"]
            assert events[0][4]["response"]["id"].endswith(":system:1")
            assert events[1][4] == {"el": "uptime", "value": "0:00:01"}
            # Its pages use one token for all topics.
            for topic, status in ((f"streaming-{made['id']}", "ok"), ("streaming-other", "error")):
                page.send(json.dumps(["2", "2", topic, "phx_join", {}]))
                replies = (json.loads(page.recv(DEADLINE_S)) for _ in range(100))
                reply = next(reply for reply in replies if reply[2] == topic)
                assert reply[4]["status"] == status, reply
        assert relay.stop() == 0, "its task does not hold up the end"


def token_for(port: int, topic: str) -> dict[str, str]:
    """A token as a page gets it."""
    body, headers = json.dumps({"channel": topic}).encode(), {"content-type": "application/json"}
    with urlopen(Request(f"http://127.0.0.1:{port}/token", body, headers)) as answer:
        made: dict[str, str] = json.loads(answer.read())
        return made
