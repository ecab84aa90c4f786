"""The console in a real browser, with sockets that see what it does, and the pictures of it.

``TESTS_SCREENSHOTS=docs make test ARGS="-k test_console"`` keeps the pictures in that directory.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.support.client import Client
from tests.support.cluster import Cluster, Node
from tests.support.node import need_browser, run_checks
from tests.support.process import RelayProcess

ROOT = Path(__file__).parents[2]
QUICK = {
    "RELAY_REDIS__PING_INTERVAL_S": "0.2",
    "RELAY_REDIS__BACKOFF_MIN_S": "0.05",
    "RELAY_REDIS__BACKOFF_MAX_S": "0.2",
}
"""How a relay finds faults of its bus within a second."""
PNG = b"\x89PNG\r\n\x1a\n"
TOPIC = "room:console"


async def drive(relay: RelayProcess, *flags: str) -> tuple[list[str], tuple[int, str]]:
    """Run the checks against a relay with one client; returns what it got, and how it was closed."""
    heard: list[str] = []

    async def hear() -> None:
        while True:
            heard.append(str(await client.receive_raw()))

    async with Client.connect(relay.ws) as client:
        await client.join(TOPIC)
        hearing = asyncio.create_task(hear())
        try:
            assert relay.process is not None
            arguments = (relay.http, TOPIC, f"--pid={relay.process.pid}", *flags)
            await asyncio.to_thread(run_checks, "console-chromium.mjs", *arguments, redis_url=relay.redis_url)
            await asyncio.wait((hearing,), timeout=20)
            assert hearing.done(), "the client was not disconnected"
        finally:
            hearing.cancel()
            _ = await asyncio.gather(hearing, return_exceptions=True)
        return heard, await client.expect_closed()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--width=1280"], id="wide"),
        pytest.param(["--width=360", "--height=780", "--dark"], id="narrow"),
    ],
)
async def test_operators_see_and_do_what_they_need(flags: list[str]) -> None:
    """No error in the browser, no request to another host, nothing wider than the window."""
    need_browser()
    topics = [{"match": TOPIC, "history": {"size": 100, "ttl_s": 60}, "presence": True}]
    with RelayProcess(environ={"RELAY_SYSTEM_TOPIC": "false", "RELAY_TOPICS": json.dumps(topics)}) as relay:
        heard, closed = await drive(relay, "--history", *flags)
        assert any("from the console" in frame for frame in heard)
        assert closed == (1001, "disconnected by the server")
        assert "disconnected at the console, by 127.0.0.1" in relay.output
        assert "published to topic 'room:console' at the console, by 127.0.0.1" in relay.output


async def test_axe_finds_nothing_on_the_pages() -> None:
    """Light and dark, wide and narrow; ``TESTS_SCREENSHOTS_PAGES`` names a directory for pictures of each."""
    need_browser()
    topics = [{"match": TOPIC, "history": {"size": 100, "ttl_s": 60}, "presence": True}]
    with RelayProcess(environ={"RELAY_TOPICS": json.dumps(topics)}) as relay:
        async with Client.connect(relay.ws) as client, Redis.from_url(relay.redis_url) as redis:
            await client.join(TOPIC)

            async def publish() -> None:
                while True:
                    await redis.publish(f"to:{TOPIC}:tick", json.dumps({"text": "x" * 500}))
                    await asyncio.sleep(0.1)

            under_way = [asyncio.create_task(publish()), asyncio.create_task(_drain(client))]
            pictures = os.environ.get("TESTS_SCREENSHOTS_PAGES", "")
            try:
                arguments = ("axe-chromium.mjs", relay.http, TOPIC, pictures)
                await asyncio.to_thread(run_checks, *arguments, deadline_s=240)
            finally:
                for task in under_way:
                    task.cancel()
                _ = await asyncio.gather(*under_way, return_exceptions=True)


async def test_console_shows_several_workers_as_one() -> None:
    """And names the one whose lists it shows."""
    need_browser()
    with RelayProcess("--workers", "2", environ={"RELAY_SYSTEM_TOPIC": "false"}) as relay:
        await asyncio.to_thread(run_checks, "console-workers.mjs", relay.http)


async def test_console_shows_each_master_of_a_cluster(cluster: Cluster) -> None:
    """Light and dark, wide and narrow, also while one is down; ``TESTS_SCREENSHOTS_PAGES`` keeps pictures."""
    need_browser()
    stopped: list[Node] = []

    def act(said: dict[str, Any]) -> None:
        if said["do"] == "stop":
            (node,) = [node for node in cluster.nodes if f"127.0.0.1:{node.port}" == said["node"]]
            stopped.extend([node, *_replicas(cluster, node)])
            for each in reversed(stopped):
                each.kill()
        else:
            for each in stopped:
                each.start()

    with RelayProcess("--redis-url", cluster.url, environ={"RELAY_SYSTEM_TOPIC": "false", **QUICK}) as relay:
        async with Client.connect(relay.ws) as client:
            for number in range(12):
                _ = await client.join(f"room:{number}")
            pictures = os.environ.get("TESTS_SCREENSHOTS_PAGES", "")
            try:
                arguments = ("console-cluster.mjs", relay.http, "12", pictures)
                await asyncio.to_thread(run_checks, *arguments, deadline_s=120, act=act)
            finally:
                for each in stopped:
                    if each.process is None or each.process.poll() is not None:
                        await asyncio.to_thread(each.start)
                await asyncio.to_thread(cluster.wait_until_whole)


def _replicas(cluster: Cluster, master: Node) -> list[Node]:
    """Those of the moment: an earlier test may have made one of them a master."""
    rows = [row for row in master.slots() if row[2][1] == master.port]
    ports = {each[1] for row in rows for each in row[3:]}
    return [node for node in cluster.nodes if node.port in ports]


async def test_console_asks_for_the_key_where_one_is_set() -> None:
    need_browser()
    with RelayProcess(environ={"RELAY_SYSTEM_TOPIC": "false", "RELAY_REST__API_KEY": "sésame"}) as relay:
        await drive(relay, "--key=sésame")
        assert "sésame" not in relay.output


@asynccontextmanager
async def busy(relay: RelayProcess) -> AsyncIterator[None]:
    """A relay with the example plugins on a day of work: flights, orders, people who chat."""
    simulate = [sys.executable, "examples/aircraft/simulate.py", "--redis-url", relay.redis_url]
    flights = await asyncio.create_subprocess_exec(*simulate, cwd=ROOT, stdout=subprocess.DEVNULL)
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(Redis.from_url(relay.redis_url))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        tasks: list[asyncio.Task[None]] = []
        for number in range(40):
            client = await stack.enter_async_context(Client.connect(relay.ws))
            tiles = [f"aircraft:{south}:{west}" for south in range(35, 60, 5) for west in range(-10, 30, 5)]
            for topic in [*random.sample(tiles, 6), f"order:{10_400 + number % 24}", f"room:{number % 7}"]:
                ref = client.next_ref()
                await client.send(ref, ref, topic, "phx_join", {})  # its reply comes among events
            tasks.append(group.create_task(_drain(client)))
        chatter = await stack.enter_async_context(Client.connect(relay.ws))
        await chatter.send("1", "1", "chat:lobby", "phx_join", {"nick": "Ada"})
        tasks += [group.create_task(_publish(redis)), group.create_task(_chat(chatter))]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            flights.terminate()
            await flights.wait()


async def _drain(client: Client) -> None:
    """Read what comes: a client whose buffer is full reads no pong either, and gives up after 40 s."""
    while True:
        await client.connection.recv()


async def _chat(client: Client) -> None:
    """What is said in the lobby; now and then nothing, which the plugin refuses."""
    task = asyncio.create_task(_drain(client))
    try:
        for number in range(100_000):
            text = f"Gate B{number % 40}, please." if number % 9 else ""
            await client.send(None, client.next_ref(), "chat:lobby", "new_msg", {"text": text})
            await asyncio.sleep(random.uniform(0.05, 0.6))
    finally:
        task.cancel()
        _ = await asyncio.gather(task, return_exceptions=True)


async def _publish(redis: Redis) -> None:
    """Orders that are paid and shipped, in waves; and what nobody can be told."""
    rate = 60.0
    while True:
        rate = min(160.0, max(15.0, rate + random.uniform(-9, 9)))
        number = random.randrange(10_400, 10_424)
        paid = {"order": number, "total": f"{random.uniform(5, 250):.2f}", "express": random.random() < 0.3}
        await redis.publish(f"to:order:{number}:{random.choice(('paid', 'packed', 'shipped'))}", json.dumps(paid))
        if random.random() < 0.01:
            await redis.publish(f"to:order:{number}:phx_close", "{}")
        await asyncio.sleep(1 / rate)


async def test_console_is_shown_at_work(tmp_path: Path) -> None:
    need_browser()
    kept = os.environ.get("TESTS_SCREENSHOTS")
    directory = ROOT / kept if kept else tmp_path
    seconds = "62" if kept else "2"  # as far as a chart goes back at first
    with RelayProcess("--config", "examples/relay.toml") as relay:
        async with busy(relay):
            topic = "order:10412"
            arguments = ("console-pictures.mjs", relay.http, str(directory), seconds, topic)
            await asyncio.to_thread(run_checks, *arguments, deadline_s=200)
    for name in ("light", "dark", "narrow", "topic"):
        picture = (directory / f"console-{name}.png").read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) < 200_000
