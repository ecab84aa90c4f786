"""The ACL lines of docs/history.md, on real servers: they suffice, and each part of them is needed."""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from redis.asyncio import Redis

from relay import AsyncPublisher, Config
from relay.brokers.base import HistoryStore, is_position
from relay.brokers.embedded import EmbeddedValkey
from relay.brokers.redis import RedisBroker
from relay.brokers.redis_scripts import FUNCTION, PUBLISH
from relay.config_sections import Direction, HistoryConfig
from relay.errors import BusUnavailable
from relay.metrics import Metrics
from tests.integration.test_history import join
from tests.support.process import Valkey, redis_servers
from tests.support.redis_faults import BY_TOPIC, FAST, TOLD, UNAVAILABLE
from tests.support.serving import Served, eventually, http_get
from tests.support.sink import Sink

Connect = Callable[..., Any]
ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

PAGE = Path(__file__).parents[2] / "docs" / "history.md"
RULES = {
    user: rules.split()
    for user, rules in re.findall(r"^ACL SETUSER (\S+) on >secret (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
}
"""Of the lines of the page, by user."""

HISTORY = HistoryConfig(size=5, ttl_s=60)
TOPICS = [{"match": "room:*", "history": HISTORY.model_dump()}]
IN_USE_LATER = {"+ping", "-@all", "resetkeys", "resetchannels"}
"""What is needed after a while only, and what takes rights away."""


@pytest.fixture(scope="module", params=[None, *redis_servers()], ids=lambda binary: "redis" if binary else "valkey")
def server(request: pytest.FixtureRequest) -> Iterator[Valkey]:
    with Valkey(binary=request.param) as server:
        yield server


@pytest.fixture
def admin(server: Valkey) -> Iterator[redis_py.Redis]:
    with redis_py.Redis(port=server.port) as admin:
        empty(admin)
        yield admin


def empty(admin: redis_py.Redis) -> None:
    admin.flushall()
    admin.script_flush()
    if has_functions(admin):
        admin.function_flush()


def has_functions(admin: redis_py.Redis) -> bool:
    """Redis 6.2 has none."""
    info: Any = admin.info("server")
    return not str(info["redis_version"]).startswith("6.")


def allow(admin: redis_py.Redis, user: str, rules: list[str]) -> None:
    execute: Any = admin.execute_command
    known = [rule for rule in rules if has_functions(admin) or not rule.startswith(("+function|", "+fcall"))]
    execute("ACL", "SETUSER", user, "reset", "on", ">secret", *known)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log warns of, but that Redis has no functions."""
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [text for text in said if "it needs Redis 7.0 or later" not in text]


def url_of(server: Valkey, user: str) -> str:
    return f"redis://{user}:secret@127.0.0.1:{server.port}"


async def use_all(url: str, admin: redis_py.Redis | None = None) -> None:
    """Do on a server whatever a relay with histories does there. Raises BusUnavailable."""
    config = Config(redis_url=url, topics=TOPICS)
    broker = RedisBroker(config, Metrics())
    sink = Sink()
    await broker.start(sink)
    try:
        assert broker.link.live and not broker.degraded, broker.link.reason
        history = broker.history
        assert history is not None
        await use_history(broker, history, admin)
        await broker.publish(Direction.TO, "other:1", "typing", b"1", "6f1c2a9e.7")
        await broker.publish(Direction.FROM, "room:1", "typing", b"1")
        await broker.publish_control(b"{}")
        await eventually(lambda: sink.events and sink.events[-1].event == "typing", "the event")
    finally:
        await broker.stop()


async def use_history(broker: RedisBroker, history: HistoryStore, admin: redis_py.Redis | None) -> None:
    await broker.publish(Direction.TO, "room:1", "new_msg", b"1")
    newest = (await history.open("room:1", "1-1", HISTORY, 5, 500)).newest
    assert is_position(newest)
    assert await history.read("room:1", newest, 5)
    assert await history.last("room:1", 5)
    assert (await history.describe("room:1")).bytes
    await history.check("room:1", newest, HISTORY)
    if admin is not None:  # a stream without entries
        admin.xtrim("topic:room:1", 0)
        await broker.publish(Direction.TO, "room:1", "new_msg", b"2")
        admin.xtrim("topic:room:1", 0)
        await history.check("room:1", newest, HISTORY)
        await history.open("room:1", newest, HISTORY, 5, 500)


def test_rights_of_the_relay_suffice_and_each_is_needed(
    server: Valkey, admin: redis_py.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    rules = RULES["relay"]
    allow(admin, "relay", rules)
    asyncio.run(use_all(url_of(server, "relay"), admin))
    assert warnings(caplog) == []
    assert admin.exists("relay:settings")
    if has_functions(admin):
        assert is_position(admin.fcall("relay_publish", 1, "topic:room:1", "e", "1", 5, 60).decode())
    superfluous = []
    for rule in rules:
        if rule in IN_USE_LATER or (rule.startswith("+function|") and not has_functions(admin)):
            continue
        empty(admin)
        caplog.clear()
        allow(admin, "relay", [other for other in rules if other != rule])
        failed = True
        with suppress(BusUnavailable, AssertionError):
            asyncio.run(use_all(url_of(server, "relay"), admin))
            failed = False
        if not failed and not warnings(caplog):
            superfluous.append(rule)
    assert superfluous == []


@pytest.mark.parametrize("user", ["app", "app6"])
def test_rights_of_a_publisher_suffice_and_each_is_needed(server: Valkey, admin: redis_py.Redis, user: str) -> None:
    rules = RULES[user]
    if user == "app" and not has_functions(admin):
        return  # there is nothing that could be called
    if has_functions(admin):
        admin.function_load(FUNCTION)
    head = ("FCALL", "relay_publish") if user == "app" else ("EVAL", PUBLISH.text)

    def publish() -> None:
        with redis_py.Redis.from_url(url_of(server, user), protocol=2) as client:
            execute: Any = client.execute_command
            for _ in range(2):
                position = execute(*head, 1, "topic:room:1", "new_msg", "{}", 5, 60)
                assert is_position(position.decode())
                admin.xtrim("topic:room:1", 0)

    allow(admin, user, rules)
    publish()
    superfluous = []
    for rule in rules:
        if rule in IN_USE_LATER:
            continue
        admin.delete("topic:room:1")
        allow(admin, user, [other for other in rules if other != rule])
        with suppress(redis_py.RedisError):
            publish()
            superfluous.append(rule)
    assert superfluous == []
    allow(admin, user, rules)
    with redis_py.Redis.from_url(url_of(server, user), protocol=2) as client:
        for command in (("GET", "topic:room:1"), ("PUBLISH", "to:room:1:e", "{}"), ("DEL", "topic:room:1")):
            with pytest.raises(redis_py.exceptions.NoPermissionError):
                client.execute_command(*command)


def test_rights_of_relay_publish(server: Valkey, admin: redis_py.Redis) -> None:
    """The command reads what the relays there say of their topics."""
    allow(admin, "relay", RULES["relay"])
    asyncio.run(use_all(url_of(server, "relay")))

    async def publish() -> str | None:
        async with AsyncPublisher(url_of(server, "cli")) as publisher:
            return (await publisher.publish("room:1", "new_msg", {})).position

    allow(admin, "cli", RULES["cli"])
    assert is_position(asyncio.run(publish()))


async def test_relay_without_the_right_to_hear_histories_is_degraded(
    server: Valkey, admin: redis_py.Redis, serve_relay: ServeRelay, connect: Connect
) -> None:
    """Events of other topics reach its clients; a join that asks for missed events is answered."""
    allow(admin, "relay", [rule for rule in RULES["relay"] if rule != "&topic:*"])
    served = await serve_relay(redis_url=url_of(server, "relay"), topics=TOPICS)
    client = await connect(served)
    await client.join("other:1")
    await served.relay.publish("other:1", "new_msg", {})
    await client.expect_event("other:1", "new_msg", {})
    reason = "no permission to hear topic:*, so no history"
    status, body = await http_get(f"{served.http}/ready")
    assert (status, json.loads(body)) == (200, {"status": "degraded", "reason": reason})
    assert (await join(client, "room:1", since=None))["_position"] is None
    answer = await join(client, "room:2", since="1-1")
    assert (answer["recovered"], answer["reason"]) == (False, "history unavailable")


@pytest.mark.parametrize("subscribe", ["pattern", "topic"])
async def test_subscribers_learn_that_their_topic_may_not_be_heard_any_more(
    server: Valkey, admin: redis_py.Redis, serve_relay: ServeRelay, connect: Connect, subscribe: str
) -> None:
    """They rejoin: in topic mode the join is refused, with one pattern for all there is no history."""
    allow(admin, "relay", [*RULES["relay"], "+subscribe", "+unsubscribe"])
    mode = BY_TOPIC if subscribe == "topic" else {}
    served = await serve_relay(redis_url=url_of(server, "relay"), redis=FAST | mode, topics=TOPICS)
    client = await connect(served)
    position = (await join(client, "room:1", since=None))["_position"]
    history = served.relay.node.pubsub.history
    assert history is not None
    await eventually(lambda: history.follows("room:1"), "where the topic stands")
    execute: Any = admin.execute_command
    execute("ACL", "SETUSER", "relay", "resetchannels", "&to:*", "&from:*", "&relay:control")
    told = await client.receive()
    assert told[2:] == ["room:1", "phx_error", TOLD]
    if subscribe == "topic":
        await client.send("8", "8", "room:1", "phx_join", {"since": position})
        assert (await client.receive())[4] == UNAVAILABLE
    else:
        assert (await join(client, "room:1", since=position))["reason"] == "history unavailable"
    execute("ACL", "SETUSER", "relay", "&topic:*")
    execute("CLIENT", "KILL", "USER", "relay")
    if subscribe == "pattern":
        assert (await client.receive())[2:] == ["room:1", "phx_error", TOLD]
    await eventually(lambda: served.relay.metrics.gaps == 2, "the link")
    assert (await join(client, "room:1", since=position))["recovered"] is True


async def test_embedded_server_keeps_histories() -> None:
    server = EmbeddedValkey()
    try:
        await use_all(server.url)
        async with AsyncPublisher(server.url) as publisher:
            assert (await publisher.publish("room:1", "new_msg", {})).position is not None
        async with Redis.from_url(server.url) as client:
            position = await client.fcall("relay_publish", 1, "topic:room:1", "new_msg", "{}", 5, 60)
            assert is_position(position.decode())
    finally:
        server.stop()
