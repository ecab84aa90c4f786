"""The published phoenix client on long polling, in Node and Chromium: alone, and as its fallback from WebSockets."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.support.faults import Proxy
from tests.support.keys import SECRET, token
from tests.support.node import need_browser, need_node, run_checks
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey, free_port

SETTINGS = f"""
allow_anonymous = true
system_topic = false
auth.keys = ["{SECRET}"]
auth.leeway_s = 0
auth.expiry_grace_s = 30
rest.api_key = "operators-key"
redis.backoff_max_s = 0.2
limits.longpoll_window_s = 3
[[auth.anonymous]]
match = "*"
rights = ["join", "push", "presence"]
[[topics]]
match = "kept:*"
history = {{ size = 100, ttl_s = 600 }}
[[topics]]
match = "lobby:*"
presence = true
"""

KEY = {"Authorization": "Bearer operators-key"}

CLIENTS = ["phoenix-1.8", "phoenix-1.7", "phoenix-1.6"]


def without_upgrade(data: bytes) -> bytes:
    """What a proxy does to a WebSocket that does not know any: it takes the header away."""
    return data.replace(b"Upgrade: websocket\r\n", b"").replace(b"upgrade: websocket\r\n", b"")


@contextmanager
def proxy_to(*ports: int, rewrite: Callable[[bytes], bytes] = bytes) -> Iterator[int]:
    """A proxy, or a balancer, in a thread of its own; gives its port."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    found: list[int] = []
    ending = asyncio.Event()

    async def run() -> None:
        async with Proxy.open(*ports) as proxy:
            proxy.rewrite = rewrite
            found.append(proxy.port)
            ready.set()
            await ending.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert ready.wait(20)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join()
        loop.close()


def run(
    tmp_path: Path, script: str, client: str, *, falls_back: bool = False, outage: bool = False, nodes: int = 1
) -> None:
    settings = tmp_path / "relay.toml"
    settings.write_text(SETTINGS)
    with Valkey() as redis, ExitStack() as stack:
        ports = [free_port() for _ in range(nodes)]
        arguments = ("--config", str(settings), "--redis-url", redis.url, "--port")
        environ = {"RELAY_AUTH__SECRET": SECRET} if nodes > 1 else {}
        relays: list[RelayProcess] = []

        def start() -> None:
            relays[:] = [stack.enter_context(RelayProcess(*arguments, str(port), environ=environ)) for port in ports]

        def cut(port: int) -> None:
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}/api", trust_env=False, headers=KEY, timeout=20 * PATIENCE
            ) as http:
                found = http.get("/topics/kept:1")  # 404 where no client of this node has joined it
                for socket_id in found.json()["socket_ids"] if found.status_code == 200 else ():
                    http.delete(f"/sockets/{socket_id}").raise_for_status()

        def act(asked: dict[str, Any]) -> None:
            match asked["do"]:
                case "cut":
                    for port in ports:
                        cut(port)
                case "stop":
                    assert [relay.stop() for relay in relays] == [0] * nodes
                case "start":
                    start()
                case "restart redis":
                    redis.kill()
                    redis.start()

        start()
        near = ports[0]
        if falls_back or nodes > 1:
            near = stack.enter_context(proxy_to(*ports, rewrite=without_upgrade if falls_back else bytes))
        options = {"longPollFallbackMs": round(1500 * PATIENCE)} if falls_back or outage else {}
        if outage:
            options["outage"] = 1
        rights = {"own:*": ["join", "push"]}
        # The scripts wait for the end of the first, which is joined with as soon as a browser has started.
        tokens = json.dumps([token("ada", rights, ttl_s=15 + 5 * PATIENCE), token("ada", rights, ttl_s=600)])
        origin = f"http://127.0.0.1:{near}"
        given = [f"{origin}/socket".replace("http", "ws"), f"{origin}/api"] if "node" in script else [origin]
        run_checks(script, client, *given, json.dumps(options), tokens, act=act, deadline_s=240)


@pytest.mark.parametrize("client", CLIENTS)
def test_phoenix_works_by_long_polling_in_node(tmp_path: Path, client: str) -> None:
    need_node()
    run(tmp_path, "long-poll-node.mjs", client)


@pytest.mark.parametrize("client", CLIENTS)
def test_phoenix_works_by_long_polling_on_two_nodes(tmp_path: Path, client: str) -> None:
    """Behind a balancer that knows no sessions."""
    need_node()
    run(tmp_path, "long-poll-node.mjs", client, nodes=2)


@pytest.mark.parametrize("client", CLIENTS)
def test_phoenix_works_by_long_polling_in_a_browser(tmp_path: Path, client: str) -> None:
    need_browser()
    run(tmp_path, "long-poll-chromium.mjs", client)


@pytest.mark.parametrize("client", CLIENTS[:2])
def test_phoenix_falls_back_in_node(tmp_path: Path, client: str) -> None:
    """Behind a proxy that lets no WebSocket pass; 1.6 knows no fallback."""
    need_node()
    run(tmp_path, "long-poll-node.mjs", client, falls_back=True)


@pytest.mark.parametrize("client", CLIENTS[:2])
def test_phoenix_falls_back_in_a_browser(tmp_path: Path, client: str) -> None:
    need_browser()
    run(tmp_path, "long-poll-chromium.mjs", client, falls_back=True)


@pytest.mark.parametrize("client", CLIENTS[:2])
def test_page_that_fell_back_in_an_outage_returns_in_node(tmp_path: Path, client: str) -> None:
    """Within 10 s of the relay's return; both versions remember the fallback."""
    need_node()
    run(tmp_path, "long-poll-node.mjs", client, outage=True)


@pytest.mark.parametrize("client", CLIENTS[:2])
def test_page_that_fell_back_in_an_outage_returns_in_a_browser(tmp_path: Path, client: str) -> None:
    need_browser()
    run(tmp_path, "long-poll-chromium.mjs", client, outage=True)
