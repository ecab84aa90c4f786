"""Webhooks: a program over HTTP decides; what is asked, what its answers do, and what its failures cost."""

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from relay import Join, Plugin, Push, Refused
from relay.auth.authenticator import UpgradeRequest
from tests.support.client import Client
from tests.support.faults import Authority
from tests.support.keys import token
from tests.support.long_poll import Poller
from tests.support.patience import PATIENCE
from tests.support.process import free_port
from tests.support.serving import Served, eventually, http_get, metric
from tests.support.webhook import ALLOW, SECRET, Asked, Behaviour, WebhookServer, answer, raw, status

Connect = Callable[..., Any]
ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

UNAVAILABLE = {"status": "error", "response": {"reason": "webhook unavailable"}}
OK = {"status": "ok", "response": {}}


@pytest.fixture
def direct() -> bool:
    """How frames are written makes no difference here."""
    return True


def by_user(request: UpgradeRequest) -> dict[str, Any] | None:
    user = request.query_params.get("user")
    return {"sub": user, "team": "red"} if user else None


def settings(server: WebhookServer, *on: str, **changes: Any) -> dict[str, Any]:
    hook = {"match": "room:*", "on": on or ("join", "push", "leave"), "url": server.url, "secrets": [SECRET], **changes}
    return {"broadcast_url": "memory://", "webhooks": [hook]}


async def join(client: Client, topic: str, payload: Any = None) -> Any:
    """Join under a ref of its own; returns the reply's payload."""
    ref = str(client.next_ref())
    await client.send(ref, ref, topic, "phx_join", payload or {})
    reply = await client.receive()
    assert reply[:4] == [ref, ref, topic, "phx_reply"]
    return reply[4], ref


async def outcome(served: Served, name: str, outcome: str) -> float:
    _, text = await http_get(f"{served.http}/metrics")
    return metric(text, "relay_webhook_requests_total", webhook=name, outcome=outcome)


# What is asked.


async def test_program_is_asked_about_joins_and_pushes_and_told_of_leaves(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    async with WebhookServer().running() as server:
        rights = {"authenticated": [{"match": "*", "rights": ["join", "push"]}]}
        served = await serve_relay(**settings(server), auth=rights, authenticate=by_user)
        alice = await connect(served, query="user=alice")
        reply, ref = await join(alice, "room:1", {"nick": "Al"})
        assert reply == OK
        assert await alice.push(ref, "room:1", "new_msg", {"text": "hi"}) == OK
        parts = [part.encode() for part in (ref, "99", "room:1", "photo")]
        await alice.send_raw(bytes((0, *map(len, parts))) + b"".join(parts) + b"\x00\xff")
        assert (await alice.receive())[4] == OK
        await alice.send(ref, "100", "room:1", "phx_leave", {})
        assert [(await alice.receive())[3] for _ in range(2)] == ["phx_reply", "phx_close"]
        await eventually(lambda: len(server.asked) == 4, "all requests")
        assert all(asked.is_signed() for asked in server.asked)
        assert {asked.target for asked in server.asked} == {"/hook"}
        assert len({asked.headers["webhook-id"] for asked in server.asked}) == 4
        (socket_id,) = served.relay.node.sockets
        common = {"topic": "room:1", "user": "alice", "socket": socket_id}
        assert server.take() == [
            {"type": "join", "payload": {"nick": "Al"}, **common},
            {"type": "push", "event": "new_msg", "payload": {"text": "hi"}, **common},
            {"type": "push", "event": "photo", "payload": {"base64": "AP8="}, **common},
            {"type": "leave", **common},
        ]
        _, _ = await join(alice, "other:1")
        assert server.asked == []
        assert await outcome(served, "room:*", "allowed") == 3
        assert await outcome(served, "room:*", "delivered") == 1


async def test_long_polling_clients_are_decided_on_too(serve_relay: ServeRelay) -> None:
    """Their leaves are sent as well: when they leave a topic, and when their session ends."""
    async with WebhookServer().running() as server:
        rights = {"authenticated": [{"match": "*", "rights": ["join", "push"]}]}
        served = await serve_relay(**settings(server), auth=rights, authenticate=by_user)
        async with Poller.connect(served.ws, user="alice") as alice:
            server.behaviour = answer({"allow": False, "reason": "closed"})
            await alice.send("1", "1", "room:1", "phx_join", {"nick": "Al"})
            assert (await alice.receive())[4] == {"status": "error", "response": {"reason": "closed"}}
            server.behaviour = answer({"allow": True, "reply": {"welcome": "alice"}})
            await alice.send("2", "2", "room:1", "phx_join", {})
            assert (await alice.receive())[4] == {"status": "ok", "response": {"welcome": "alice"}}
            assert await alice.push("2", "room:1", "new_msg", {}) == {"status": "ok", "response": {"welcome": "alice"}}
            server.behaviour = status(500)
            assert await alice.push("2", "room:1", "new_msg", {}) == UNAVAILABLE
            server.behaviour = ALLOW
            await alice.send("2", "5", "room:1", "phx_leave", {})
            assert [(await alice.receive())[3] for _ in range(2)] == ["phx_reply", "phx_close"]
            _ = await alice.join("room:2")
            await served.relay.disconnect(user="alice")
            await alice.expect_gone()
        await eventually(lambda: len(server.asked) == 7, "all requests")
        assert [(each["type"], each["topic"]) for each in server.take()] == [
            *[("join", "room:1")] * 2,
            *[("push", "room:1")] * 2,
            ("leave", "room:1"),
            ("join", "room:2"),
            ("leave", "room:2"),
        ]


async def test_claims_are_sent_where_asked_for_and_tokens_never(serve_relay: ServeRelay, connect: Connect) -> None:
    """Neither that of the socket, nor one that a join brings of its own, however its key is written."""
    key = "a secret of the tokens, long enough for HS256"
    rights = {"keys": [key], "authenticated": [{"match": "*", "rights": ["join", "push"]}]}
    own, other = token("alice", key=key, team="red"), token("bob", key=key, team="blue")
    async with WebhookServer().running() as server:
        served = await serve_relay(**settings(server, send_claims=True), auth=rights)
        alice = await connect(served, query=f"token={own}")
        params = f'{{"token":"{other}","nick":"Al","big":123456789012345678901234567890}}'
        await alice.send_raw(f'["1","1","room:1","phx_join",{params}]')
        assert (await alice.receive())[4] == OK
        assert (await alice.push("1", "room:1", "access_token", {"access_token": other}))["status"] == "ok"
        (asked,) = server.asked
        assert asked.json["user"] == "bob" and asked.json["claims"]["team"] == "blue"
        assert asked.json["payload"] == {"nick": "Al", "big": 123456789012345678901234567890}
        for secret in (own, other):
            assert secret.encode() not in asked.body and secret not in str(asked.headers)
        open_to_all = await serve_relay(**settings(server))
        client = await connect(open_to_all)
        await client.send_raw('["1","1","room:1","phx_join",{"access_token":"x","\\u0074oken":"x","token":[],"a":1}]')
        assert (await client.receive())[4] == OK
        assert server.asked[-1].json["payload"] == {"a": 1}
        assert server.asked[-1].json["user"] is None and "claims" not in server.asked[-1].json


async def test_only_pushes_that_the_patterns_name_are_sent_and_once(serve_relay: ServeRelay, connect: Connect) -> None:
    async with WebhookServer().running() as server:
        served = await serve_relay(**settings(server, "push", events=["new_*", "*_msg"]))
        client = await connect(served)
        _, ref = await join(client, "room:1")
        for event in ("new_msg", "old_msg", "typing"):
            assert await client.push(ref, "room:1", event) == OK
        assert [asked["event"] for asked in server.take()] == ["new_msg", "old_msg"]


async def test_program_is_asked_last_and_after_the_permissions(serve_relay: ServeRelay, connect: Connect) -> None:
    """What relay or a plugin refuses it never hears of; and "allow" gives no right that a client has not."""
    plugin = Plugin("strict")

    @plugin.on_join("room:*")
    async def enter(join: Join) -> None:
        if "out" in join.payload:
            raise Refused("not by me")

    async with WebhookServer().running() as server:
        rights = {"authenticated": [{"match": "room:*", "rights": ["join"]}]}
        served = await serve_relay(
            **settings(server, match="*"), auth=rights, authenticate=by_user, extra_plugins=(plugin,)
        )
        alice = await connect(served, query="user=alice")
        reply, _ = await join(alice, "secret:1")
        assert reply["response"] == {"reason": "unauthorized"}
        reply, _ = await join(alice, "room:1", {"out": 1})
        assert reply["response"] == {"reason": "not by me"}
        assert server.take() == []
        reply, ref = await join(alice, "room:1")
        assert reply == OK
        assert (await alice.push(ref, "room:1", "new_msg"))["response"] == {"reason": "unauthorized"}
        assert [asked["type"] for asked in server.take()] == ["join"]


# What answers do.


async def test_answers_reply_refuse_and_name_a_reason(serve_relay: ServeRelay, connect: Connect) -> None:
    async with WebhookServer().running() as server:
        served = await serve_relay(**settings(server))
        client = await connect(served)
        server.behaviour = answer({"allow": True, "reply": {"welcome": "Ada", "deep": [{"a": None}]}})
        reply, ref = await join(client, "room:1")
        assert reply == {"status": "ok", "response": {"welcome": "Ada", "deep": [{"a": None}]}}
        values: list[Any] = [[1, 2], "text", 7, {"a": {}}, True]
        for value in values:
            server.behaviour = answer({"allow": True, "reply": value})
            assert await client.push(ref, "room:1", "e") == {"status": "ok", "response": value}
        server.behaviour = answer({"allow": False, "reason": "full"})
        assert await client.push(ref, "room:1", "e") == {"status": "error", "response": {"reason": "full"}}
        reply, _ = await join(client, "room:2")
        assert reply == {"status": "error", "response": {"reason": "full"}}
        for given, reason in (({}, "refused"), ({"reason": ""}, "refused"), ({"reason": 5}, "refused")):
            server.behaviour = answer({"allow": False, **given, "unknown": 1})
            assert (await client.push(ref, "room:1", "e"))["response"] == {"reason": reason}
        server.behaviour = answer({"allow": False, "reason": "é" * 300})
        assert (await client.push(ref, "room:1", "e"))["response"] == {"reason": "é" * 127}
        assert await outcome(served, "room:*", "refused") == 6
        _, text = await http_get(f"{served.http}/metrics")
        assert metric(text, "relay_refused_total", kind="socket", reason="by_a_plugin") == 6


async def test_allowed_push_goes_on_to_redis_and_a_refused_one_does_not(
    serve_relay: ServeRelay, connect: Connect, valkey: Any
) -> None:
    from tests.support.serving import heard_on

    async with WebhookServer().running() as server:
        served = await serve_relay(webhooks=settings(server)["webhooks"], redis_url=valkey.url)
        client = await connect(served)
        _, ref = await join(client, "room:wh1")
        async with heard_on(valkey.url, "from:room:wh1:*") as hear:
            server.behaviour = answer({"allow": False})
            assert (await client.push(ref, "room:wh1", "one"))["status"] == "error"
            server.behaviour = ALLOW
            assert await client.push(ref, "room:wh1", "two") == OK
            assert (await hear())[0] == "from:room:wh1:two"


@pytest.mark.parametrize("presence", [True, "plugin"])
async def test_answer_says_what_is_listed_of_a_member(
    presence: bool | str, serve_relay: ServeRelay, connect: Connect
) -> None:
    async with WebhookServer().running() as server:
        server.behaviour = answer({"allow": True, "presence": {"name": "Ada", "phx_ref": "x"}})
        rights = {"authenticated": [{"match": "*", "rights": ["join", "presence"]}]}
        served = await serve_relay(
            **settings(server, "join"), topics=[{"match": "*", "presence": presence}], auth=rights, authenticate=by_user
        )
        alice = await connect(served, query="user=alice")
        reply, _ = await join(alice, "room:1", {"presence": {"name": "the queen"}})
        assert reply == OK
        await eventually(lambda: served.relay.metrics.presence_members == 1, "the member")
        members = await served.relay.presence("room:1")
        (meta,) = members["alice"]
        assert {name: value for name, value in meta.items() if name != "phx_ref"} == {
            "user": "alice",
            "meta": {"name": "Ada"},
        }


async def test_presence_for_a_topic_without_is_a_bad_answer(
    serve_relay: ServeRelay, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    async with WebhookServer().running() as server:
        server.behaviour = answer({"allow": True, "presence": {"name": "Ada"}})
        served = await serve_relay(**settings(server))
        reply, _ = await join(await connect(served), "room:1")
        assert reply == UNAVAILABLE
        assert "has no presence" in caplog.text


# Servers that fail.

HUGE = b'{"allow":true,"reply":"' + b"x" * 70_000 + b'"}'


async def trickle(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
    while True:
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)


async def endless(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"4000\r\n" + b" " * 0x4000 + b"\r\n")
        await writer.drain()


async def silence(asked: Asked, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


FAULTS: dict[str, tuple[Behaviour, str]] = {
    "silent": (silence, "timeout"),
    "trickling": (trickle, "timeout"),
    "endless": (endless, "answer_too_large"),
    "huge": (status(200, HUGE), "answer_too_large"),
    "error": (status(500, b'{"allow": true}'), "bad_status"),
    "forbidden": (status(403, b'{"allow": true}'), "bad_status"),
    "not modified": (status(304), "redirect"),
    "redirecting": (status(302, b'{"allow": true}', "location: /elsewhere\r\n"), "redirect"),
    "redirecting permanently": (status(308, b"", "location: http://169.254.169.254/\r\n"), "redirect"),
    "closing at once": (raw(b"", close=True), "connection_lost"),
    "closing in the head": (raw(b"HTTP/1.1 200 OK\r\ncontent-le", close=True), "connection_lost"),
    "closing in the body": (status(200, b'{"allow": true}', length=100), "connection_lost"),
    "no HTTP": (raw(b"\x16\x03\x01\x00 hello\r\n\r\n", close=True), "connection_lost"),
    "endless head": (raw(b"HTTP/1.1 200 OK\r\nx: " + b"x" * 200_000, close=True), "connection_lost"),
    "empty": (status(200), "bad_answer"),
    "no content": (status(204), "bad_answer"),
    "HTML": (status(200, b"<html>please log in</html>"), "bad_answer"),
    "a list": (answer([{"allow": True}]), "bad_answer"),
    "true": (answer(True), "bad_answer"),
    "nothing said": (answer({}), "bad_answer"),
    "allow as text": (answer({"allow": "true"}), "bad_answer"),
    "allow as a number": (answer({"allow": 1}), "bad_answer"),
    "allow in capitals": (answer({"Allow": True}), "bad_answer"),
    "a member misspelt": (answer({"allow": True, "repley": {}}), "bad_answer"),
    "two answers": (status(200, b'{"allow": true}{"allow": true}'), "bad_answer"),
    "not UTF-8": (status(200, b'{"allow": true, "reply": {"a": "\xff"}}'), "bad_answer"),
    "NaN": (status(200, b'{"allow": true, "reply": {"a": NaN}}'), "bad_answer"),
    "nested deep": (status(200, b'{"allow": true, "reply": {"a":' + b"[" * 9_000 + b"]" * 9_000 + b"}}"), "bad_answer"),
    "nested rather deep": (
        status(200, b'{"allow": true, "reply": {"a":' + b"[" * 300 + b"]" * 300 + b"}}"),
        "bad_answer",
    ),
    "compressed": (status(200, b'{"allow": true}', "content-encoding: gzip\r\n"), "bad_answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_failing_server_lets_nobody_in(
    fault: str, serve_relay: ServeRelay, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """Each failure refuses a join and a push, is counted by its kind, and hurts no other topic."""
    async with WebhookServer().running() as server:
        is_late = FAULTS[fault][1] == "timeout"
        served = await serve_relay(**settings(server, timeout_s=0.5 * PATIENCE if is_late else 9.0))
        client = await connect(served)
        reply, ref = await join(client, "room:1")
        assert reply == OK
        server.take()
        server.behaviour, kind = FAULTS[fault]
        assert await client.push(ref, "room:1", "new_msg") == UNAVAILABLE
        reply, _ = await join(client, "room:2")
        assert reply == UNAVAILABLE
        assert len(server.asked) == 2, "a request that has arrived is not repeated"
        assert await outcome(served, "room:*", kind) == 2
        assert "webhook room:*: push not answered" in caplog.text
        server.behaviour = ALLOW
        assert await client.push(ref, "room:1", "new_msg") == OK
        _, text = await http_get(f"{served.http}/metrics")
        assert metric(text, "relay_refused_total", kind="socket", reason="webhook_unavailable") == 2
        assert metric(text, "relay_plugin_errors_total", plugin="webhooks") == 0
        assert metric(text, "relay_webhook_pending", webhook="room:*") == 0


async def test_without_an_answer_the_settings_may_allow_but_no_refusal_is_overruled(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    async with WebhookServer().running() as server:
        served = await serve_relay(**settings(server, on_failure="allow"))
        client = await connect(served)
        server.behaviour = status(500)
        reply, ref = await join(client, "room:1")
        assert reply == OK
        assert await client.push(ref, "room:1", "e") == OK
        for value in ({"allow": False, "unknown": [1]}, {"allow": False, "reason": {}}, {"allow": False, "reply": 1}):
            server.behaviour = answer(value)
            assert (await client.push(ref, "room:1", "e"))["status"] == "error"


async def test_connection_that_was_never_made_is_tried_again_for_joins_and_leaves(
    serve_relay: ServeRelay, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = WebhookServer()
    server.port = free_port()
    served = await serve_relay(**settings(server, "join", "push", "leave"))
    client = await connect(served)
    tries: list[str] = []
    from httpx2 import AsyncHTTPTransport

    original = AsyncHTTPTransport.handle_async_request

    async def counted(self: Any, request: Any) -> Any:
        tries.append(json.loads(request.content)["type"])
        return await original(self, request)

    monkeypatch.setattr(AsyncHTTPTransport, "handle_async_request", counted)
    reply, _ = await join(client, "room:1")
    assert reply == UNAVAILABLE and tries == ["join", "join"]
    async with server.running(server.port):
        reply, ref = await join(client, "room:1")
        assert reply == OK
    tries.clear()
    await eventually(lambda: not server._writers, "the server's end")
    await asyncio.sleep(1.1)  # the idle connection is not used any more
    assert await client.push(ref, "room:1", "e") == UNAVAILABLE
    assert tries == ["push"]
    await client.send(ref, "9", "room:1", "phx_leave", {})
    await eventually(lambda: tries == ["push", "leave", "leave"], "the leave")
    assert await outcome(served, "room:*", "not_connected") == 3


async def test_breaker_stops_requests_after_ten_failures_and_closes_after_an_answer(
    serve_relay: ServeRelay, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relay.plugins import webhook_client

    monkeypatch.setattr(webhook_client, "_OPEN_S", 0.5 * PATIENCE)
    async with WebhookServer().running() as server:
        server.behaviour = status(500)
        served = await serve_relay(**settings(server, "join"), limits={"joins_burst": 1000})
        client = await connect(served)
        for n in range(15):
            reply, _ = await join(client, f"room:{n}")
            assert reply == UNAVAILABLE
        assert len(server.asked) == 10
        assert await outcome(served, "room:*", "bad_status") == 10
        assert await outcome(served, "room:*", "breaker_open") == 5
        _, text = await http_get(f"{served.http}/metrics")
        assert metric(text, "relay_webhook_open", webhook="room:*") == 1
        assert metric(text, "relay_webhook_openings_total", webhook="room:*") == 1
        server.behaviour = ALLOW
        await asyncio.sleep(0.6 * PATIENCE)
        reply, _ = await join(client, "room:x")
        assert reply == OK
        assert served.relay.metrics.webhook_open["room:*"] == 0


async def test_requests_over_the_limit_wait_and_over_the_queue_are_refused(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    go = asyncio.Event()

    async def slow(asked: Asked, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        await ALLOW(asked, writer)

    async with WebhookServer().running() as server:
        server.behaviour = slow
        served = await serve_relay(**settings(server, "join", requests_max=3, queue_max=4, timeout_s=9.0))
        client = await connect(served)
        for n in range(10):
            await client.send(str(n), str(n), f"room:{n}", "phx_join", {})
        refused = [(await client.receive())[4] for _ in range(3)]
        assert refused == [UNAVAILABLE] * 3
        assert await outcome(served, "room:*", "queue_full") == 3
        _, text = await http_get(f"{served.http}/metrics")
        assert metric(text, "relay_webhook_pending", webhook="room:*") == 7
        go.set()
        assert [(await client.receive())[4] for _ in range(7)] == [OK] * 7
        assert server.most_under_way == 3
        # Heartbeats and other topics were not held up.
        await client.expect_alive()


async def test_slow_program_holds_up_its_own_topic_alone(serve_relay: ServeRelay, connect: Connect) -> None:
    async with WebhookServer().running() as server:
        server.behaviour = silence
        served = await serve_relay(**settings(server, "join", timeout_s=9.0))
        client = await connect(served)
        await client.send("1", "1", "room:1", "phx_join", {})
        await eventually(lambda: server.asked, "the request")
        reply, _ = await join(client, "other:1")
        assert reply == OK
        await client.expect_alive()
        await client.connection.close()
        await eventually(lambda: not served.relay.node.sockets, "the end of the socket")


async def test_leave_comes_before_the_next_join_and_its_failure_is_counted_only(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    async with WebhookServer().running() as server:
        served = await serve_relay(**settings(server, "join", "leave"))
        client = await connect(served)
        _, ref = await join(client, "room:1")
        reply, second = await join(client, "room:1")
        assert reply == OK and (await client.receive())[3] == "phx_close"
        assert [asked["type"] for asked in server.take()] == ["join", "leave", "join"]
        server.behaviour = status(500)
        await client.connection.close()
        await eventually(lambda: len(server.asked) == 1, "the leave")
        counted = served.relay.metrics.webhook_requests
        await eventually(lambda: counted["room:*: bad_status"] == 1, "the count")


async def test_two_webhooks_are_asked_in_order_until_one_refuses(serve_relay: ServeRelay, connect: Connect) -> None:
    async with WebhookServer().running() as first, WebhookServer().running() as second:
        both = [*settings(first, "join")["webhooks"], *settings(second, "join", match="*")["webhooks"]]
        served = await serve_relay(broadcast_url="memory://", webhooks=both)
        client = await connect(served)
        first.behaviour = answer({"allow": True, "reply": {"a": 1, "b": 1}})
        second.behaviour = answer({"allow": True, "reply": {"b": 2}})
        reply, _ = await join(client, "room:1")
        assert reply["response"] == {"a": 1, "b": 2}
        first.behaviour = answer({"allow": False, "reason": "no"})
        second.take()
        reply, _ = await join(client, "room:2")
        assert reply["response"] == {"reason": "no"} and second.asked == []


async def test_environment_names_no_proxy_and_logs_and_errors_name_no_secret(
    serve_relay: ServeRelay,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with WebhookServer().running() as server:
        url = f"http://relay:hunter2@127.0.0.1:{server.port}/hook/secret-path?key=secret-query"
        served = await serve_relay(**settings(server, url=url))
        client = await connect(served)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        reply, ref = await join(client, "room:1")
        assert reply == OK
        (asked,) = server.asked
        assert asked.headers["authorization"] == "Basic cmVsYXk6aHVudGVyMg=="
        assert asked.target == "/hook/secret-path?key=secret-query"
        server.behaviour = status(500)
        await client.push(ref, "room:1", "e")
        for word in ("hunter2", "secret-path", "secret-query", SECRET, "cmVsYXk6"):
            assert word not in caplog.text


async def test_secrets_can_be_rotated(serve_relay: ServeRelay, connect: Connect, tmp_path: Any) -> None:
    file = tmp_path / "secret"
    file.write_text("a text of thirty-two bytes or more\n")
    async with WebhookServer().running() as server:
        served = await serve_relay(**settings(server, secrets=[SECRET, f"file:{file}"]))
        await join(await connect(served), "room:1")
        (asked,) = server.asked
        assert asked.is_signed() and asked.is_signed(b"a text of thirty-two bytes or more")
        assert not asked.is_signed(bytes(32))


async def test_stop_waits_for_leaves_and_closes_connections(serve_relay: ServeRelay, connect: Connect) -> None:
    async with WebhookServer().running() as server:
        served = await serve_relay(**settings(server))
        await join(await connect(served), "room:1")
        await served.relay.stop()
        assert [asked["type"] for asked in server.take()] == ["join", "leave"]
        await eventually(lambda: not server._writers, "the connections' end")


async def test_push_webhook_and_a_plugin_answer_together(serve_relay: ServeRelay, connect: Connect) -> None:
    plugin = Plugin("first")

    @plugin.on_push("room:*", "mine")
    async def mine(push: Push) -> str:
        return "from the plugin"

    async with WebhookServer().running() as server:
        server.behaviour = answer({"allow": True, "reply": "from the webhook"})
        served = await serve_relay(**settings(server, "push"), extra_plugins=(plugin,))
        client = await connect(served)
        _, ref = await join(client, "room:1")
        assert (await client.push(ref, "room:1", "mine"))["response"] == "from the plugin"
        assert (await client.push(ref, "room:1", "other"))["response"] == "from the webhook"
        assert len(server.asked) == 2


async def test_certificates_are_verified(
    serve_relay: ServeRelay, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the authorities of the system, or of SSL_CERT_FILE, as a team with its own has it; and for the right name."""
    authority = Authority(tmp_path)
    async with WebhookServer().running(ssl=authority.context()) as server:
        url = server.url.replace("http:", "https:")
        served = await serve_relay(**settings(server, "join", url=url))
        reply, _ = await join(await connect(served), "room:1")
        assert reply == UNAVAILABLE and await outcome(served, "room:*", "not_connected") == 1
        assert server.asked == []
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
        served = await serve_relay(**settings(server, "join", url=url))
        reply, _ = await join(await connect(served), "room:1")
        assert reply == OK and len(server.asked) == 1
        served = await serve_relay(**settings(server, "join", url=url.replace("127.0.0.1", "localhost")))
        reply, _ = await join(await connect(served), "room:1")
        assert reply == UNAVAILABLE and len(server.asked) == 1


async def test_stream_whose_topic_a_program_refuses_ends_with_a_status(serve_relay: ServeRelay) -> None:
    """Of server-sent events: a refusal is final, and no answer is not."""
    async with WebhookServer().running() as server:
        served = await serve_relay(**settings(server, "join"))
        server.behaviour = answer({"allow": False, "reason": "closed"})
        status_code, text = await http_get(f"{served.http}/socket/sse?topic=room:1")
        assert status_code == 403 and "closed" in text
        server.behaviour = status(500)
        status_code, text = await http_get(f"{served.http}/socket/sse?topic=room:1")
        assert "webhook unavailable" in text
        assert server.asked[0].json["type"] == "join"
