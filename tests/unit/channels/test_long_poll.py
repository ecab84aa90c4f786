"""`relay.channels.long_poll`: tokens of sessions, and requests without a server."""

import asyncio
import json
from typing import Any

import pytest

from relay import Relay
from relay.channels.long_poll import SessionId, Tokens
from tests.support.asgi import Connection, until

KEY = b"k" * 32
SESSION = SessionId("n0de", "a1-7")


def test_token_names_its_session() -> None:
    token = Tokens(KEY).make(SESSION)
    assert token.startswith("lp-n0de.a1-7.")
    assert Tokens(KEY).read(token) == SESSION
    assert Tokens(b"x" * 32).read(token) is None


@pytest.mark.parametrize(
    "token",
    ["", "lp-", "lp-..", "lp-n0de.a1-7", "lp-n0de.a1-7.", "lp-n0de.a1-8.{sign}", "lp-n0de.a1-7.é", "lp-\ud800.."],
)
def test_token_that_was_not_made_here_names_none(token: str) -> None:
    sign = Tokens(KEY).make(SESSION).rpartition(".")[2]
    assert Tokens(KEY).read(token.replace("{sign}", sign)) is None


async def ask(relay: Relay, method: str = "GET", token: str = "", body: bytes = b"") -> Connection:
    query = "vsn=2.0.0" + (f"&token={token}" if token else "")
    connection = Connection("/socket/longpoll", query, kind="http", method=method)
    _ = connection._incoming.get_nowait()
    connection.put("http.request", body=body, more_body=False)
    await relay(connection.scope, connection.receive, connection.send)
    return connection


def answer(connection: Connection) -> Any:
    return json.loads(connection.body)


async def test_response_that_cannot_be_sent_comes_with_the_next() -> None:
    relay = Relay(broadcast_url="memory://", system_topic=False, rest={"path": ""}, console=False)
    async with relay.lifespan():
        token = answer(await ask(relay))["token"]
        join = await ask(relay, "POST", token, b'["1","1","a","phx_join",{}]')
        assert answer(join) == {"status": 200}
        gone = Connection("/socket/longpoll", f"vsn=2.0.0&token={token}", kind="http")
        gone.fault = OSError("gone")
        with pytest.raises(OSError, match="gone"):
            await relay(gone.scope, gone.receive, gone.send)
        (message,) = answer(await ask(relay, token=token))["messages"]
        assert json.loads(message)[3] == "phx_reply"
        relay.node.disconnect(next(iter(relay.node.sockets)))
        await until(lambda: not relay.node.sockets)
        assert answer(await ask(relay, token=token))["status"] == 500


async def test_client_that_goes_while_it_posts_is_answered_nothing() -> None:
    relay = Relay(broadcast_url="memory://", system_topic=False, rest={"path": ""}, console=False)
    async with relay.lifespan():
        token = answer(await ask(relay))["token"]
        connection = Connection("/socket/longpoll", f"token={token}", kind="http", method="POST")
        _ = connection._incoming.get_nowait()
        connection.put("http.request", body=b"[", more_body=True)
        connection.disconnect()
        await relay(connection.scope, connection.receive, connection.send)
        assert connection.status is None
        relay.node.disconnect(next(iter(relay.node.sockets)))
        await until(lambda: not relay.node.sockets)


async def test_session_is_known_to_the_drain() -> None:
    relay = Relay(broadcast_url="memory://", system_topic=False, rest={"path": ""}, console=False)
    async with relay.lifespan():
        token = answer(await ask(relay))["token"]
        poll = asyncio.create_task(ask(relay, token=token))
        (socket,) = relay.node.sockets.values()
        await until(lambda: socket.transport.idle_s(1e12) == 0)
        assert relay.node.connections.has_requests
        relay.node.drain()
        assert answer(await poll) == {"status": 500, "reason": "the relay is restarting"}
        assert answer(await ask(relay)) == {"status": 500, "reason": "the relay is restarting"}
        assert relay.metrics.drained == 1
