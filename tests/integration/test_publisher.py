"""`Publisher` and `AsyncPublisher`: from other programs to a client, over a real Redis, and their errors."""

import asyncio
import dataclasses
import datetime
import subprocess
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from redis import Redis as SyncRedis

from relay import AsyncPublisher, BusUnavailable, Config, Published, Publisher
from relay.brokers.base import is_position
from relay.brokers.redis_commands import RedisCommands
from relay.brokers.redis_settings import renewal
from tests.integration.test_core_alone import FORBIDDEN, ROOT
from tests.support.client import Client
from tests.support.faults import Proxy
from tests.support.patience import PATIENCE
from tests.support.process import Valkey, wait_for
from tests.support.serving import Served

ServeRelay = Callable[..., Awaitable[Served]]
Connect = Callable[..., Awaitable[Client]]
Kind = type[Publisher] | type[AsyncPublisher]

TOPICS = [{"match": "room:*", "history": {"size": 1000, "ttl_s": 60}}]
FAST = {"timeout_s": 1 * PATIENCE}

pytestmark = pytest.mark.parametrize("kind", [Publisher, AsyncPublisher])


async def publish(publisher: Publisher | AsyncPublisher, *events: tuple[str, str, object]) -> list[Published]:
    """Publish without blocking this test's event loop."""
    if isinstance(publisher, AsyncPublisher):
        return await publisher.publish_many(events)
    return await asyncio.to_thread(publisher.publish_many, events)


async def close(publisher: Publisher | AsyncPublisher) -> None:
    if isinstance(publisher, AsyncPublisher):
        await publisher.close()
    else:
        publisher.close()


class Order(BaseModel):
    name: str
    at: datetime.date


@dataclasses.dataclass
class Place:
    x: int


@pytest.mark.parametrize("direct", [True], indirect=True)
async def test_events_reach_clients_with_every_kind_of_payload(
    kind: Kind, serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    served = await serve_relay()
    client = await connect(served)
    await client.join("shop:1")
    publisher = kind(valkey.url)
    at = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    payload = {"order": Order(name="Käse", at=at.date()), "place": Place(1), "at": at, "raw": None}
    published = await publish(publisher, ("shop:1", "new", payload), ("shop:1", "bytes", b"\xff\x00"))
    assert published == [Published(None, 1), Published(None, 1)]
    expected = {"order": {"name": "Käse", "at": "2026-01-02"}, "place": {"x": 1}, "at": "2026-01-02T03:04:05Z"}
    await client.expect_event("shop:1", "new", expected | {"raw": None})
    assert await client.receive_raw() == b"\x02\x06\x05shop:1bytes\xff\x00"
    await close(publisher)


@pytest.mark.parametrize("direct", [True], indirect=True)
async def test_history_is_known_from_the_relays_as_soon_as_they_have_said_it(
    kind: Kind, serve_relay: ServeRelay, connect: Connect, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay starts while the publisher is connected, and the script is not known to Redis."""
    monkeypatch.setattr("relay.brokers.redis_target._LOOK_EVERY_S", -1)
    with SyncRedis(port=valkey.port) as admin:
        admin.delete("relay:settings")
        publisher = kind(valkey.url)
        assert (await publish(publisher, ("room:1", "live", {})))[0].position is None
        served = await serve_relay(topics=TOPICS)
        client = await connect(served)
        reply = await client.push("9", "room:1", "phx_join", {"since": None})
        assert reply["status"] == "ok"
        await asyncio.to_thread(wait_for, lambda: admin.exists("relay:settings"), "the settings")
        admin.script_flush()
    for at in range(3):
        (published,) = await publish(publisher, ("room:1", "kept", {"at": at}))
        assert is_position(published.position)
        await client.expect_event("room:1", "kept", {"at": at, "_position": published.position})
    await close(publisher)


async def test_events_are_kept_after_redis_has_lost_the_settings(kind: Kind) -> None:
    with Valkey() as server, SyncRedis(port=server.port) as admin:
        execute: Any = admin.execute_command
        for command in renewal(Config(topics=TOPICS)):
            execute(*command)
        publisher = kind(server.url)
        assert is_position((await publish(publisher, ("room:1", "e", 1)))[0].position)
        admin.flushall()
        await close(publisher)
        assert is_position((await publish(publisher, ("room:1", "e", 2)))[0].position)
        await close(publisher)


@pytest.mark.parametrize("direct", [True], indirect=True)
async def test_batch_keeps_its_order_with_and_without_history(
    kind: Kind, serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    served = await serve_relay(topics=TOPICS)
    client = await connect(served)
    for topic in ("room:1", "other:1"):
        await client.join(topic)
    events = [(topic, "tick", at) for at in range(200) for topic in ("room:1", "other:1")]
    with SyncRedis(port=valkey.port) as admin:
        admin.script_flush()
    publisher = kind(valkey.url, topics=TOPICS)
    published = await publish(publisher, *events)
    assert [is_position(each.position) for each in published] == [topic == "room:1" for topic, _, _ in events]
    came: dict[str, list[Any]] = {"room:1": [], "other:1": []}
    for _ in events:
        _, _, topic, _, payload = await client.receive()
        came[topic].append(payload)
    assert list(came.values()) == [list(range(200))] * 2
    await close(publisher)


@pytest.mark.parametrize("denied", ["", "-evalsha"])
async def test_first_events_of_a_history_keep_the_order_of_the_calls(kind: Kind, denied: str) -> None:
    """Though Redis does not know the script yet, by which they are appended, or its user may not run it so."""
    with Valkey() as server, SyncRedis(port=server.port) as admin:
        rules = ("~*", "&*", "+@all", *denied.split())
        admin.execute_command("ACL", "SETUSER", "app", "on", ">secret", *rules)
        publisher = kind(server.url.replace("//", "//app:secret@"), topics=TOPICS)
        for _ in range(2):  # on two connections
            admin.script_flush()
            calls = [publish(publisher, ("room:1", "tick", at)) for at in range(200)]
            if kind is AsyncPublisher:
                tasks: list[asyncio.Task[Any]] = []
                for call in calls:
                    tasks.append(asyncio.create_task(call))
                    if len(tasks) % 3 == 0:
                        await asyncio.sleep(0)
                await asyncio.gather(*tasks)
            else:
                for call in calls:
                    await call
            rows: Any = admin.xrange("topic:room:1")
            assert [int(fields[b"d"]) for _, fields in rows[-200:]] == list(range(200))
            await close(publisher)


async def test_batch_takes_one_round_trip(kind: Kind, valkey: Valkey) -> None:
    """A proxy holds up each portion of replies for a tenth of a second: 100 events would take ten seconds."""
    async with Proxy.open(valkey.port) as proxy:
        publisher = kind(f"redis://127.0.0.1:{proxy.port}", redis={"timeout_s": 5})
        await publish(publisher, ("other:1", "e", 0))
        came: list[bytes] = []

        def record(data: bytes) -> bytes:
            came.append(data)
            return data

        proxy.rewrite = record
        proxy.delay_s = 0.1
        assert len(await publish(publisher, *[("other:1", "e", 0)] * 100)) == 100
        assert b"".join(came).startswith(b":0\r\n" * 100)
        assert len(came) < 10
        await close(publisher)


async def test_events_keep_their_order_while_settings_are_looked_for(
    kind: Kind, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.brokers.redis_target._LOOK_EVERY_S", -1)
    with SyncRedis(port=valkey.port) as admin, admin.pubsub() as listener:
        admin.delete("relay:settings")
        listener.subscribe("to:other:order:e")
        assert listener.get_message(timeout=10)
        publisher = kind(valkey.url)
        for at in range(20):
            events = [publish(publisher, ("other:order", "e", [at, number])) for number in range(3)]
            await asyncio.gather(*(events if kind is AsyncPublisher else events[:1]))
            for event in events[1:] if kind is Publisher else ():
                await event
        heard = [(listener.get_message(timeout=10) or {})["data"].decode() for _ in range(60)]
        assert heard == [f"[{at},{number}]" for at in range(20) for number in range(3)]
        await close(publisher)


async def test_events_that_go_on_while_settings_are_looked_for_keep_their_order(
    kind: Kind, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.brokers.redis_target._LOOK_EVERY_S", 0.01)
    with SyncRedis(port=valkey.port) as admin, admin.pubsub() as listener:
        admin.delete("relay:settings")
        listener.subscribe("to:other:order:e")
        assert listener.get_message(timeout=10)
        publisher = kind(valkey.url)
        tasks: list[asyncio.Task[Any]] = []
        for at in range(1000):
            tasks.append(asyncio.create_task(publish(publisher, ("other:order", "e", at))))
            if kind is Publisher:
                await tasks[-1]
            elif at % 2:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        heard = [int((listener.get_message(timeout=10) or {})["data"]) for _ in tasks]
        assert heard == list(range(1000))
        await close(publisher)


async def test_publisher_outlives_a_restart_of_redis(kind: Kind) -> None:
    with Valkey() as server:
        publisher = kind(server.url, redis=FAST)
        await publish(publisher, ("room:1", "e", 0))
        server.kill()
        for _ in range(2):
            with pytest.raises(BusUnavailable, match=rf"\(127\.0\.0\.1:{server.port}\)$"):
                await publish(publisher, ("room:1", "e", 0))
        server.start()
        assert await publish(publisher, ("room:1", "e", 0)) == [Published(None, 0)]
        await close(publisher)


async def test_connection_that_was_idle_is_made_anew(
    kind: Kind, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A firewall may have forgotten it meanwhile: what is sent on it gets no answer."""
    monkeypatch.setattr("relay.brokers.redis_blocking._IDLE_S", 1e-6)
    monkeypatch.setattr("relay.publisher.RedisCommands", partial(RedisCommands, idle_s=0))
    async with Proxy.open(valkey.port) as proxy:
        publisher = kind(f"redis://127.0.0.1:{proxy.port}", redis=FAST)
        for _ in range(3):
            assert await publish(publisher, ("other:1", "e", 0)) == [Published(None, 0)]
            proxy.forget()
        await close(publisher)


async def test_late_replies_are_not_taken_for_those_of_later_events(kind: Kind) -> None:
    with Valkey() as server:
        publisher = kind(server.url, redis={"timeout_s": 0.3 * PATIENCE})
        assert await publish(publisher, ("room:1", "e", 0)) == [Published(None, 0)]
        server.pause()
        with pytest.raises(BusUnavailable):
            await publish(publisher, *[("room:1", "e", 0)] * 3)
        server.resume()
        with SyncRedis(port=server.port) as admin, admin.pubsub() as listener:
            listener.subscribe("to:room:1:e")
            assert listener.get_message(timeout=10)
            assert await publish(publisher, ("room:1", "e", 0)) == [Published(None, 1)]
        await close(publisher)


async def test_publisher_that_is_closed_under_an_event(kind: Kind) -> None:
    with Valkey() as server:
        publisher = kind(server.url)
        assert await publish(publisher, ("room:1", "e", 0)) == [Published(None, 0)]
        server.pause()
        publishing = asyncio.create_task(publish(publisher, ("room:1", "e", 1)))
        await asyncio.sleep(0.2 * PATIENCE)
        await close(publisher)
        server.resume()
        if kind is Publisher:  # another thread's event
            assert await publishing == [Published(None, 0)]
        else:
            with pytest.raises(BusUnavailable, match="the publisher was closed"):
                await publishing
        assert await publish(publisher, ("room:1", "e", 2)) == [Published(None, 0)]
        await close(publisher)


async def test_replica_is_refused(kind: Kind, valkey: Valkey) -> None:
    with Valkey("--replicaof", "127.0.0.1", str(valkey.port)) as replica:
        publisher = kind(replica.url)
        for _ in range(2):
            with pytest.raises(BusUnavailable, match="is a replica.*: what is published there does not reach"):
                await publish(publisher, ("room:1", "e", 0))
        await close(publisher)


async def test_master_that_has_become_a_replica_is_refused_on_the_same_connection(kind: Kind, valkey: Valkey) -> None:
    """It is used again once it is a master."""
    with Valkey() as server, SyncRedis(port=server.port) as admin:
        publisher = kind(server.url)
        assert await publish(publisher, ("room:1", "e", 0)) == [Published(None, 0)]
        admin.replicaof("127.0.0.1", str(valkey.port))
        for _ in range(2):
            with pytest.raises(BusUnavailable, match="is a replica.*: what is published there does not reach"):
                await publish(publisher, ("room:1", "e", 0))
        admin.replicaof("NO", "ONE")
        assert await publish(publisher, ("room:1", "e", 0)) == [Published(None, 0)]
        await close(publisher)


async def test_user_without_the_right_to_ask_for_the_role_publishes(kind: Kind, valkey: Valkey) -> None:
    with SyncRedis(port=valkey.port) as admin:
        admin.execute_command("ACL", "SETUSER", "short", "on", ">secret", "allchannels", "~*", "+@all", "-role")
        publisher = kind(f"redis://short:secret@127.0.0.1:{valkey.port}")
        for _ in range(2):
            assert await publish(publisher, ("room:1", "e", 0)) == [Published(None, 0)]
        await close(publisher)
        admin.execute_command("ACL", "DELUSER", "short")


async def test_missing_right_is_named_with_the_rule_that_allows_it(kind: Kind, valkey: Valkey) -> None:
    with SyncRedis(port=valkey.port) as admin:
        admin.execute_command("ACL", "SETUSER", "mute", "on", ">secret", "resetchannels", "~*", "+@all")
        publisher = kind(f"redis://mute:secret@127.0.0.1:{valkey.port}")
        with pytest.raises(BusUnavailable) as caught:
            await publish(publisher, ("room:1", "e", 0))
        await close(publisher)
        admin.execute_command("ACL", "DELUSER", "mute")
    assert str(caught.value).startswith("PUBLISH to:room:1:e: NOPERM ")
    assert str(caught.value).endswith("; allow it with ACL SETUSER: &to:* +publish")


def test_many_threads_share_one_publisher(kind: Kind, valkey: Valkey) -> None:
    publisher = kind(valkey.url, topics=TOPICS)
    with SyncRedis(port=valkey.port) as admin:
        admin.delete("topic:room:threads")

        def work(number: int) -> list[str | None]:
            if isinstance(publisher, Publisher):
                return [publisher.publish("room:threads", "e", [number, at]).position for at in range(25)]

            async def run() -> list[str | None]:
                return [(await publisher.publish("room:threads", "e", [number, at])).position for at in range(25)]

            return asyncio.run(run())

        with ThreadPoolExecutor(8) as pool:
            positions = [position for found in pool.map(work, range(8)) for position in found]
        rows = admin.xrange("topic:room:threads")
        assert sorted(str(position) for position in positions) == sorted(row[0].decode() for row in rows)
    if isinstance(publisher, Publisher):
        publisher.close()


SCRIPT = """
import asyncio, os, sys, warnings
warnings.simplefilter("error")
from relay import AsyncPublisher, Publisher

publisher = {kind}({url!r})

def publish(text):
    if isinstance(publisher, Publisher):
        return publisher.publish("other:fork", "e", text)
    return asyncio.run(publisher.publish("other:fork", "e", text))

publish("before")
child = os.fork()
for at in range(20):
    publish(["child" if child == 0 else "parent", at])
if child == 0:
    os._exit(0)
_, status = os.waitpid(child, 0)
publish("after")
assert not {forbidden!r} & set(sys.modules), set(sys.modules) & {forbidden!r}
print(status)
"""


def test_forked_process_publishes_on_connections_of_its_own(kind: Kind, valkey: Valkey, tmp_path: Path) -> None:
    """Nor does it import a web server, or anything of the extras."""
    imported_by_redis_py = {"cryptography", "jwt", "opentelemetry", "psutil"}
    forbidden = {*FORBIDDEN, "starlette", "broadcaster"} - imported_by_redis_py
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(kind=kind.__name__, url=valkey.url, forbidden=forbidden))
    with SyncRedis(port=valkey.port) as admin, admin.pubsub() as listener:
        listener.subscribe("to:other:fork:e")
        assert listener.get_message(timeout=10)
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
        )
        assert (done.stdout, done.stderr) == ("0\n", "")
        heard = []
        while message := listener.get_message(timeout=0.1):
            heard.append(message["data"].decode())
    expected = ['"before"', '"after"', *(f'["{who}",{at}]' for who in ("parent", "child") for at in range(20))]
    assert sorted(heard) == sorted(expected)
