"""The published phoenix client, and the relay's own in its place, in Node and in a real browser, on ``relay serve``."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.support.node import need_browser, need_node, run_checks
from tests.support.process import RelayProcess

CLIENTS = ["phoenix-1.8", "phoenix-1.7", "phoenix-1.6", "relay"]


class Heard:
    """What backends hear on ``from:*``, in the order of Redis."""

    def __init__(self, url: str) -> None:
        self._redis: Any = redis.Redis.from_url(url)
        self._pubsub: Any = self._redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        self._pubsub.psubscribe("from:*")
        self._next()  # the confirmation: from here on nothing is missed

    def _next(self) -> dict[str, Any] | None:
        message: dict[str, Any] | None = self._pubsub.get_message(timeout=5.0)
        return message

    def all(self) -> list[tuple[str, bytes]]:
        """Everything published until now."""
        # A message of our own after all others: Redis keeps their order.
        self._redis.publish("from:the:end", b"")
        heard: list[tuple[str, bytes]] = []
        end = time.monotonic() + 30
        while time.monotonic() < end:
            message = self._next()
            if message is None:
                continue
            redis_channel = message["channel"].decode()
            if redis_channel == "from:the:end":
                return heard
            heard.append((redis_channel, message["data"]))
        raise AssertionError(f"the end was not heard after {heard}")

    def close(self) -> None:
        self._pubsub.close()
        self._redis.close()


@pytest.fixture
def heard(relay: RelayProcess) -> Iterator[Heard]:
    """A backend that listens from before the test on."""
    with contextlib.closing(Heard(relay.redis_url)) as heard:
        yield heard


@pytest.mark.parametrize("client", CLIENTS)
def test_the_client_works_in_node(relay: RelayProcess, heard: Heard, client: str) -> None:
    """Joins, pushes, broadcasts, binaries, leaves, heartbeats and rejoins, as ``phoenix-node.mjs`` lists them."""
    need_node()
    run_checks("phoenix-node.mjs", client, relay.ws, redis_url=relay.redis_url)
    pushes = heard.all()
    assert pushes[:3] == [
        ("from:room:1:new_msg", b'{"text":"hello"}'),
        ("from:room:1:shout", b'{"text":"from node"}'),
        ("from:room:1:bytes", bytes([0, 1, 254, 255])),
    ]
    assert ("from:zürich:鉄道:🚆:1:grüezi", '{"text":"日本"}'.encode()) in pushes
    steps = [payload for redis_channel, payload in pushes if redis_channel == "from:room:buffered:step"]
    assert steps == [b'{"n":1}', b'{"n":2}', b'{"n":3}']
    # Joins, leaves and heartbeats are the relay's own business.
    assert not [name for name, _ in pushes if "phx_" in name or name.startswith("from:phoenix:")]


@pytest.mark.parametrize("client", CLIENTS)
def test_the_client_works_in_a_browser(relay: RelayProcess, heard: Heard, client: str) -> None:
    """A Redis publish reaches a page in Chromium, and the page's push comes out on Redis."""
    need_browser()
    run_checks("phoenix-chromium.mjs", relay.http, client, "-", redis_url=relay.redis_url)
    assert heard.all() == [("from:room:1:shout", b'{"text":"from the browser"}')]
