"""The programs of docs/webhooks.md, as they stand there, behind a relay with its settings."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tests.integration.test_webhooks import join
from tests.support.node import SCRIPTS, need_node
from tests.support.process import free_port
from tests.support.serving import Served, http_get
from tests.support.webhook import SECRET, Asked, WebhookServer, answer, status

Connect = Callable[..., Any]
ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

PAGE = Path(__file__).parents[2] / "docs" / "webhooks.md"


@pytest.fixture
def direct() -> bool:
    """How frames are written makes no difference here."""
    return True


def block(first_line: str) -> str:
    (found,) = re.findall(rf"^```\w+\n((?:<\?php\n)?{re.escape(first_line)}\n.*?)^```$", PAGE.read_text(), re.M | re.S)
    return str(found)


@contextmanager
def running(command: list[str], directory: Path) -> "Iterator[subprocess.Popen[str]]":
    """A program with the secret in its environment."""
    environ = os.environ | {"RELAY_SECRET": SECRET}
    with subprocess.Popen(command, cwd=directory, env=environ, text=True, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.terminate()


async def until_listening(port: int, process: "subprocess.Popen[str]") -> None:
    async with asyncio.timeout(30):
        while process.poll() is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return
    raise AssertionError(f"it has ended: {process.communicate()}")


async def test_example_for_express_works(serve_relay: ServeRelay, connect: Connect, tmp_path: Path) -> None:
    """With the library of Standard Webhooks, so that the signature is checked by other people's code."""
    need_node()
    port = free_port()
    script = tmp_path / "server.mjs"
    script.write_text(block("// server.mjs").replace("8001", str(port)))
    (tmp_path / "node_modules").symlink_to(SCRIPTS / "node_modules")
    with running(["node", script.name], tmp_path) as process:
        await until_listening(port, process)
        await check_decisions(serve_relay, connect, f"http://127.0.0.1:{port}/relay")
        assert (await http_get(f"http://127.0.0.1:{port}/relay"))[0] == 404


async def test_example_for_django_works(serve_relay: ServeRelay, connect: Connect, monkeypatch: Any) -> None:
    """On a stand-in for what the example takes of Django."""

    class Response(NamedTuple):
        data: Any = None
        status: int = 200

    stand_in: dict[str, dict[str, Any]] = {
        "django.http": {"HttpResponse": lambda status: Response(None, status), "JsonResponse": Response},
        "django.views.decorators.csrf": {"csrf_exempt": lambda view: view},
        "django.views.decorators.http": {"require_POST": lambda view: view},
    }
    for name, members in stand_in.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("RELAY_SECRET", SECRET)
    example: dict[str, Any] = {}
    exec(block("# views.py"), example)

    async def behave(asked: Asked, writer: asyncio.StreamWriter) -> None:
        response = example["relay"](SimpleNamespace(headers=asked.headers, body=asked.body))
        await (answer(response.data) if response.status == 200 else status(response.status))(asked, writer)

    async with WebhookServer().running() as server:
        server.behaviour = behave
        await check_decisions(serve_relay, connect, server.url)


async def check_decisions(serve_relay: ServeRelay, connect: Connect, url: str) -> None:
    """What each of the examples decides."""
    hook = {"match": "room:*", "on": ["join", "push", "leave"], "url": url, "secrets": ["x" * 32, SECRET]}
    served = await serve_relay(broadcast_url="memory://", webhooks=[hook])
    client = await connect(served)
    reply, _ = await join(client, "room:closed")
    assert reply == {"status": "error", "response": {"reason": "closed"}}
    reply, ref = await join(client, "room:é")
    assert reply == {"status": "ok", "response": {"welcome": "stranger"}}
    assert (await client.push(ref, "room:é", "new_msg", {"text": "né"})) == {"status": "ok", "response": {}}
    refusal = {"status": "error", "response": {"reason": "nothing to say"}}
    assert (await client.push(ref, "room:é", "new_msg", {})) == refusal
    for payload in (None, [1], "text", 5, {"text": None}):
        await client.send(ref, "99", "room:é", "new_msg", payload)
        assert (await client.receive())[4] == refusal
    large = {"text": "x" * 1_000_000}
    assert (await client.push(ref, "room:é", "new_msg", large)) == {"status": "ok", "response": {}}
    other = await serve_relay(broadcast_url="memory://", webhooks=[{**hook, "secrets": ["y" * 32]}])
    reply, _ = await join(await connect(other), "room:1")
    assert reply == {"status": "error", "response": {"reason": "webhook unavailable"}}
    assert other.relay.metrics.webhook_requests["room:*: bad_status"] == 1
