"""Who pushed: `redis.push_identity` publishes each push a second time, with user and socket."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from relay import Plugin, Push
from relay.config_sources import load
from relay.errors import ConfigError
from relay.protocol.payload import identified
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.process import Valkey
from tests.support.serving import Served, heard_on

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]
OK = {"status": "ok", "response": {}}
UNAVAILABLE = {"status": "error", "response": {"reason": "bus unavailable"}}


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


async def test_push_is_published_with_user_and_socket_beside_the_unchanged_one(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    settings = {"auth": {"keys": [SECRET]}, "redis": {"push_identity": True}}
    served = await serve_relay(**settings)
    made = token("alice", {"room:*": ["join", "push"]})
    client = await connect(served, additional_headers={"Authorization": f"Bearer {made}"})
    join_ref = await client.join("room:id")
    async with heard_on(valkey.url, "from*room:id:*") as heard:
        payload = {"text": "hi", "user": "bob"}  # what the client says of itself stays a part of its payload
        assert await client.push(join_ref, "room:id", "shout", payload) == OK
        told = dict([await heard(), await heard()])
        assert json.loads(told["from:room:id:shout"]) == payload
        (socket_id,) = served.relay.node.sockets
        assert json.loads(told["from-user:room:id:shout"]) == {"user": "alice", "socket": socket_id, "payload": payload}


async def test_push_through_a_handler_has_it_too_and_by_default_nothing_more_is_published(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    plugin = Plugin("pass")

    @plugin.on_push("room:*")
    def on_push(push: Push) -> None:
        """Let it pass."""

    for switched_on in (True, False):
        redis = {"push_identity": switched_on, "from_user_prefix": "who:"}
        served = await serve_relay(redis=redis, extra_plugins=(plugin,))
        client = await connect(served)
        join_ref = await client.join("room:handler")
        async with heard_on(valkey.url, "*room:handler:*") as heard:
            assert await client.push(join_ref, "room:handler", "shout", 1) == OK
            assert await heard() == ("from:room:handler:shout", b"1")
            if switched_on:
                channel, data = await heard()
                assert channel == "who:room:handler:shout"
                (socket_id,) = served.relay.node.sockets
                assert json.loads(data) == {"user": None, "socket": socket_id, "payload": 1}
            async with Redis.from_url(valkey.url) as publisher:
                await publisher.publish("end:room:handler:e", "")
            assert (await heard())[0] == "end:room:handler:e", "nothing else"


async def test_push_is_ok_only_when_both_were_taken(serve_relay: ServeRelay, connect: Connect) -> None:
    with Valkey() as server:
        async with Redis.from_url(server.url) as redis:
            execute: Any = redis.execute_command
            rules = ("resetchannels", "&to:*", "&from:*", "&relay:control", "+@all")
            await execute("ACL", "SETUSER", "relay", "on", ">pw", *rules)
            url = f"redis://relay:pw@127.0.0.1:{server.port}"
            served = await serve_relay(redis_url=url, redis={"push_identity": True})
            client = await connect(served)
            join_ref = await client.join("room:both")
            assert await client.push(join_ref, "room:both", "shout", 1) == UNAVAILABLE
            await execute("ACL", "SETUSER", "relay", "&from-user:*")
            assert await client.push(join_ref, "room:both", "shout", 1) == OK


def test_binary_payload_stands_there_as_base64() -> None:
    data = json.loads(bytes(identified('a"b', "s-1", b"\x00\xff")))
    assert data == {"user": 'a"b', "socket": "s-1", "payload": {"base64": "AP8="}}


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_REDIS__PUSH_IDENTITY", "true")
    monkeypatch.setenv("RELAY_REDIS__FROM_USER_PREFIX", "who:")
    redis = load().redis
    assert (redis.push_identity, redis.from_user_prefix) == (True, "who:")


@pytest.mark.parametrize("prefix", ["from:user:", "to:", "t", "f", "relay:"])
def test_prefix_under_which_a_client_could_forge_it_is_refused(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.setenv("RELAY_REDIS__FROM_USER_PREFIX", prefix)
    assert load().redis.from_user_prefix == prefix, "without push_identity nothing is published there"
    monkeypatch.setenv("RELAY_REDIS__PUSH_IDENTITY", "true")
    with pytest.raises(ConfigError, match="must not begin"):
        load()
