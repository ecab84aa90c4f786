"""`EventSource` in a real browser, with its own reconnection and the lines of ``docs/sse.md``."""

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2 as httpx
import websockets.sync.client

from tests.support.node import need_browser, run_checks
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey, free_port

PAGE = Path(__file__).parents[2] / "docs" / "sse.md"

REDIS = {"ping_interval_s": 0.3 * PATIENCE, "ping_timeout_s": 0.3 * PATIENCE, "backoff_max_s": 0.2}
SETTINGS = {
    "RELAY_TOPICS": json.dumps([{"match": "room:*", "history": {"size": 1000, "ttl_s": 600}}]),
    "RELAY_LIMITS__SOCKETS_MAX": "3",
    "RELAY_REDIS": json.dumps(
        {"ping_interval_s": 0.3 * PATIENCE, "ping_timeout_s": 0.3 * PATIENCE, "backoff_max_s": 0.2}
    ),
    "RELAY_SYSTEM_TOPIC": "false",
}


def blocks() -> list[str]:
    """The page's JavaScript: of a live topic, of one with a history, and what outlives a proxy's own answer."""
    return re.findall(r"^```js\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def test_eventsource_outlives_whatever_passes(valkey: Valkey) -> None:
    need_browser()
    with Valkey() as redis, ExitStack() as stack:
        arguments = ("--redis-url", redis.url, "--port", str(free_port()))
        relays = [stack.enter_context(RelayProcess(*arguments, environ=SETTINGS))]
        api = stack.enter_context(
            httpx.Client(base_url=f"{relays[0].http}/api", trust_env=False, timeout=20 * PATIENCE)
        )
        others: list[Any] = []

        def act(asked: dict[str, Any]) -> None:
            match asked["do"]:
                case "publish":
                    for number in asked["numbers"]:
                        message = {"topic": asked["topic"], "event": "new_msg", "payload": {"n": number}}
                        api.post("/publish", json=message).raise_for_status()
                case "cut":
                    for socket_id in api.get("/topics/room:1").json()["socket_ids"]:
                        api.delete(f"/sockets/{socket_id}").raise_for_status()
                case "restart":
                    assert relays[-1].stop() == 0
                    relays.append(stack.enter_context(RelayProcess(*arguments, environ=SETTINGS)))
                case "pause redis":
                    redis.pause()
                case "resume redis":
                    redis.resume()
                case "fill":
                    url = f"{relays[-1].ws}/websocket?vsn=2.0.0"
                    others.extend(stack.enter_context(websockets.sync.client.connect(url)) for _ in range(2))
                case "empty":
                    others.pop().close()

        run_checks("sse-chromium.mjs", relays[0].http, json.dumps(blocks()), act=act, deadline_s=180)
