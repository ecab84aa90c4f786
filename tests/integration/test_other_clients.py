"""Clients of others that docs/clients.md lists as tried: those on PyPI and npm."""

import asyncio
import re
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from phoenix_channels_python_client import PhoenixChannelsProtocolVersion, PHXChannelsClient
from phxsocket import Client as PhxSocket
from redis import Redis

from tests.support.node import SCRIPTS, need_node, run_checks
from tests.support.process import DEADLINE_S, RelayProcess, Valkey

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


@pytest.fixture(scope="module")
def relay(valkey: Valkey) -> Iterator[RelayProcess]:
    with RelayProcess("--redis-url", valkey.url) as process:
        yield process


def publish(valkey: Valkey) -> None:
    with Redis(port=valkey.port) as redis:
        assert redis.publish("to:room:1:new_msg", '{"text":"hi"}') == 1


def test_phxsocket(relay: RelayProcess, valkey: Valkey) -> None:
    heard: list[Any] = []
    arrived = threading.Event()

    def take(payload: Any) -> None:
        heard.append(payload)
        arrived.set()

    client = PhxSocket(f"{relay.ws}/websocket", {})
    assert client.connect()
    try:
        channel = client.channel("room:1", {})
        assert channel.join() == {}
        channel.on("new_msg", take)
        publish(valkey)
        assert arrived.wait(DEADLINE_S) and heard == [{"text": "hi"}]
        assert channel.push("shout", {"a": 1}, reply=True).wait_for_response() == {"status": "ok", "response": {}}
    finally:
        client.close()


@pytest.mark.parametrize("protocol", [PhoenixChannelsProtocolVersion.V1, PhoenixChannelsProtocolVersion.V2])
async def test_phoenix_channels_python_client(
    relay: RelayProcess, valkey: Valkey, protocol: PhoenixChannelsProtocolVersion
) -> None:
    """Under version 2 it drops events whose join_ref is null, as those of a broadcast are in Phoenix too."""
    heard: asyncio.Queue[Any] = asyncio.Queue()
    url = f"{relay.ws}/websocket"
    async with PHXChannelsClient(websocket_url=url, api_key="x", protocol_version=protocol) as client:
        await client.subscribe_to_topic("room:1", heard.put)
        await asyncio.to_thread(publish, valkey)
        if protocol is PhoenixChannelsProtocolVersion.V1:
            message = await asyncio.wait_for(heard.get(), DEADLINE_S)
            assert (message.topic, message.payload) == ("room:1", {"text": "hi"})
        await client.unsubscribe_from_topic("room:1")  # its reply comes behind the event
        assert heard.empty()


def test_phoenix_channels_of_npm(relay: RelayProcess, valkey: Valkey) -> None:
    need_node()
    run_checks("phoenix-channels-node.mjs", relay.ws, redis_url=valkey.url)


def test_page_names_the_versions_that_are_tried_here() -> None:
    text = PAGE.read_text()
    for name in ("phxsocket", "phoenix-channels-python-client"):
        assert f"`{name}` {version(name)}" in text
    assert f"`phoenix-channels` {_npm_version('phoenix-channels')}" in text


def _npm_version(name: str) -> str:
    found = re.search(rf'"node_modules/{name}": {{\s+"version": "([^"]+)"', (SCRIPTS / "package-lock.json").read_text())
    assert found is not None
    return found[1]
