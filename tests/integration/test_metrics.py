"""``/metrics`` of a relay that works, and of several workers."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from tests.support.client import TEXT, Client, RawSocket
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess
from tests.support.serving import Served, eventually, http_get, metric

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]


async def test_work_is_counted(serve_relay: ServeRelay, connect: Connect, redis: Redis, direct: bool) -> None:
    served = await serve_relay(metrics={"topics": ["counted:*"]})
    one, two = await connect(served), await connect(served, vsn="1.0.0")
    for client in (one, two):
        await client.join("counted:1")
    await redis.publish("to:counted:1:e", '{"n":1}')
    for client in (one, two):
        await client.expect_event("counted:1", "e", {"n": 1})
    status, text = await http_get(f"{served.http}/metrics")
    assert status == 200
    assert len(list(text_string_to_metric_families(text))) > 20

    def value(name: str, **labels: Any) -> float:
        return metric(text, f"relay_{name}", **labels)

    assert value("sockets", path="direct" if direct else "asgi") == 2
    assert value("sockets", path="asgi" if direct else "direct") == 0
    assert (value("topics"), value("joins_total"), value("deliveries_total")) == (1, 2, 2)
    assert value("topic_events_total", topic="counted:*") == 1
    assert value("topic_deliveries_total", topic="counted:*") == 2
    frames = (
        len('[null,null,"counted:1","e",{"n":1}]'),
        len('{"topic":"counted:1","event":"e","payload":{"n":1},"ref":null}'),
    )
    assert value("delivered_bytes_total") == sum(frames)
    assert value("fan_out_seconds_count") == 1
    assert 0 < value("fan_out_seconds_sum") < 1
    assert (value("outbox_bytes"), value("link_live"), value("workers")) == (0, 1, 1)
    assert "counted:1" not in text, "topics are as many as clients like; labels must not be"


async def test_outbox_of_a_client_that_does_not_read_is_told(serve_relay: ServeRelay, redis: Redis) -> None:
    served = await serve_relay(server={"send_buffer": 8192})
    async with RawSocket.connect(served.ws, receive_buffer=4096) as slow:
        await slow.send_frame(TEXT, b'["1","1","room:outbox","phx_join",{}]')
        assert (await slow.read_message())[3] == "phx_reply"
        for _ in range(10):  # more than its transport and the kernel take, and less than its outbox
            await redis.publish("to:room:outbox:e", "[" + "1," * 25_000 + "1]")
        async with asyncio.timeout(20):
            while metric((await http_get(f"{served.http}/metrics"))[1], "relay_outbox_bytes") < 100_000:
                pass


async def test_any_worker_tells_the_sums_of_all_and_a_killed_one_is_not_forgotten(tmp_path: Path) -> None:
    with RelayProcess("--workers", "2", environ={"TMPDIR": str(tmp_path)}) as relay:

        async def scrape() -> str:
            return (await http_get(f"{relay.http}/metrics"))[1]

        async def until(name: str, wanted: Callable[[float], bool], **labels: Any) -> None:
            async with asyncio.timeout(30 * PATIENCE):
                while not wanted(metric(await scrape(), f"relay_{name}", **labels)):  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(0.05)

        async with AsyncExitStack() as stack, Redis.from_url(relay.redis_url) as redis:
            await until("workers", lambda count: count == 2)
            async with asyncio.timeout(30 * PATIENCE):
                while await redis.publish("to:nobody:e", "{}") < 2:  # noqa: ASYNC110 - the second may start later
                    await asyncio.sleep(0.01)
            port = int(relay.http.rpartition(":")[2])

            def serving() -> set[int]:
                found: set[int] = set()
                for child in relay.children():
                    with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                        for connection in child.net_connections("tcp"):
                            if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port:
                                found.add(child.pid)
                return found

            clients: list[Client] = []
            while len(serving()) < 2:
                assert len(clients) < 200, "one worker takes all clients"
                clients.append(await stack.enter_async_context(Client.connect(relay.ws)))
                await clients[-1].join("room:1")
            count = len(clients)

            async def all_agree() -> bool:
                texts = [await scrape() for _ in range(6)]  # whichever answers
                return all(metric(text, "relay_sockets", path="direct") == count for text in texts) and all(
                    metric(text, "relay_joins_total") == count for text in texts
                )

            async with asyncio.timeout(30 * PATIENCE):
                # What a worker has read is good for a second.
                while not await all_agree():  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.05)
            victim = min(serving())
            os.kill(victim, signal.SIGKILL)
            await eventually(lambda: not psutil.pid_exists(victim) or victim not in serving(), "the worker to end")

            def has_settled(text: str) -> bool:
                """Counters never fall, and the sockets of the ended worker are gone."""
                is_counted = metric(text, "relay_joins_total") == count and metric(text, "relay_workers") == 2
                return is_counted and metric(text, "relay_sockets", path="direct") < count

            async with asyncio.timeout(30 * PATIENCE):
                while not has_settled(await scrape()):  # noqa: ASYNC110 - as above
                    await asyncio.sleep(0.05)
    assert os.listdir(tmp_path) == [], "the directory is gone with the relay"
