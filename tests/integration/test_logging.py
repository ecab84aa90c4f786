"""The log of a real relay: a line at each turn of a socket's life, as text and as JSON, with the socket's id."""

import asyncio
import json
import logging
import re
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from relay import log
from tests.integration.test_auth import refuse_join
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.process import RelayProcess, Valkey, wait_for
from tests.support.serving import Served, eventually

ServeRelay = Callable[..., Awaitable[Served]]

PLUGIN = """
import logging

from relay import Plugin

plugin = Plugin("chatty")
logger = logging.getLogger("relay.chatty")


@plugin.on_push("room:*", "says")
def says(push):  # in a thread
    logger.info("said", extra={"mood": "good"})


@plugin.on_push("room:*", "fails")
async def fails(push):
    raise RuntimeError("a fault")
"""


async def live(process: RelayProcess) -> None:
    """One socket that connects, joins, is refused, pushes too much, and goes."""
    ada = token("ada", {"room:1": ["join", "push"]})
    async with Client.connect(process.ws, query=f"token={ada}") as client:
        ref = await client.join("room:1")
        assert await refuse_join(client, "room:2", {}) == "unauthorized"
        large = {"x": "x" * 460_000}  # each takes 8 of the rate's portions
        await client.push(ref, "room:1", "says", large)
        await client.push(ref, "room:1", "fails", large)
        assert (await client.push(ref, "room:1", "says", large))["response"] == {"reason": "rate limited"}
        async with Redis.from_url(process.environ["RELAY_REDIS_URL"]) as redis:
            for number in range(3):
                await redis.publish("to:room:1:tick", str(number))
                await client.expect_event("room:1", "tick", number)
        await client.connection.close(4001, "bye")
    await asyncio.to_thread(wait_for, lambda: "disconnected by" in process.output, "the last line")


def settings(directory: Path, valkey: Valkey, log_format: str) -> dict[str, str]:
    plugin = directory / "chatty"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(textwrap.dedent(PLUGIN))
    return {
        "RELAY_REDIS_URL": valkey.url,
        "RELAY_LOG_FORMAT": log_format,
        "RELAY_AUTH__KEYS": json.dumps([SECRET]),
        "RELAY_PLUGINS__PATHS": json.dumps([str(directory)]),
        "RELAY_LIMITS__PUSHES_PER_S": "1",
        "RELAY_LIMITS__PUSHES_BURST": "16",
    }


async def test_each_turn_of_a_socket_is_one_json_line_with_its_id(tmp_path: Path, valkey: Valkey) -> None:
    with RelayProcess(environ=settings(tmp_path, valkey, "json")) as process:
        await live(process)
        output = process.output
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    (connect,) = [line for line in lines if line.get("kind") == "connect"]
    whose = {"socket": connect["socket"], "user": "ada", "address": "127.0.0.1"}
    about = [line for line in lines if "socket" in line]
    assert all(line.items() >= whose.items() for line in about)
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    assert [line.get("kind", line["message"]) for line in about] == [
        "connect",
        "join refused",
        "said",
        "plugin chatty: fails raised",
        "rate limited",
        "disconnect",
    ]
    refused, said, failed, limited, disconnect = about[1:]
    assert (refused["topic"], refused["reason"]) == ("room:2", "unauthorized")
    assert said["mood"] == "good"
    assert failed["level"] == "error" and failed["exception"].endswith("RuntimeError: a fault")
    assert limited["topic"] == "room:1"
    assert disconnect.pop("open_s") > 0
    assert (
        disconnect.items()
        >= {
            "level": "info",
            "logger": "relay.socket",
            "by": "client",
            "code": 4001,
            "reason": "bye",
            "joins": 1,
            "pushes": 2,
            "events": 3,
            "dropped": 0,
        }.items()
    ), "what was over the rate was not heard"


async def test_text_lines_say_the_same(tmp_path: Path, valkey: Valkey) -> None:
    with RelayProcess(environ=settings(tmp_path, valkey, "text")) as process:
        await live(process)
        output = process.output
    (connect,) = [line for line in output.splitlines() if line.endswith(": connected; address 127.0.0.1, user 'ada'")]
    socket = connect.split(" socket ")[1].split(":")[0]
    for text in (
        f"socket {socket}: join of 'room:2' refused: unauthorized (the client's permissions: join,push on room:1); ",
        f"relay.chatty: said [socket {socket}]",
        f"plugin chatty: fails raised [socket {socket}]\nTraceback",
        f"socket {socket}: rate limited: 'says' on 'room:1'; address",
        f"socket {socket}: disconnected by the client, code 4001 'bye', after ",
        " s; 1 joins, 2 pushes, 3 events, 0 of them dropped; address",
    ):
        assert text in output


async def test_disconnect_says_when_it_was_the_relay(serve_relay: ServeRelay, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "relay.socket")
    served = await serve_relay()
    async with Client.connect(served.ws) as client:
        await client.join("room:1")
        (socket_id,) = served.relay.node.sockets
        assert served.relay.disconnect(socket_id, "enough")
        await client.expect_closed()
        await eventually(lambda: "disconnected" in caplog.text, "the line")
    assert f"socket {socket_id}: disconnected by the relay, code 1001 'enough', after " in caplog.text


async def test_storm_of_sockets_writes_few_lines_and_tells_of_the_others(
    serve_relay: ServeRelay, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "LINES_MAX", 1)
    monkeypatch.setattr(log, "INTERVAL_S", 1.0)
    caplog.set_level(logging.INFO, "relay.socket")
    served = await serve_relay()
    for _ in range(20):
        async with Client.connect(served.ws):
            pass

    def accounted_for(what: str, kind: str) -> tuple[int, int]:
        """Lines that were written, and those that some line says were suppressed."""
        lines = [message for message in caplog.messages if what in message or message.endswith(f"suppressed ({kind})")]
        told = sum(int(count) for line in lines for count in re.findall(r"(\d+) similar messages? suppressed", line))
        return sum(what in line for line in lines), told

    for what, kind in ((": connected;", "connect"), (": disconnected by", "disconnect")):
        await eventually(lambda what=what, kind=kind: sum(accounted_for(what, kind)) == 20, f"all of {kind}")  # type: ignore[misc]
        assert 0 < accounted_for(what, kind)[0] < 20
