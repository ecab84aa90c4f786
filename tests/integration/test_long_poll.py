"""Long polling over real servers: sessions, their requests, refusals, authentication and end."""

import asyncio
import base64
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from redis.asyncio import Redis

from relay import Join, Plugin, Push
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.long_poll import Poller
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually, heard_on, http_get, metric, serve
from tests.support.session_app import log_in, session_app

Connect = Callable[..., Awaitable[Client]]
Serve = Callable[..., Awaitable[Served]]
Open = Callable[..., Awaitable[Poller]]

AUTH = {"keys": [SECRET], "leeway_s": 0}
ROOMS = {"room:*": ["join", "push"]}
BRIEF = {"longpoll_window_s": 1}


@pytest.fixture
def direct() -> bool:
    """Once is enough: long polling has one way to write."""
    return True


@pytest.fixture
def poller(runner: asyncio.Runner) -> Iterator[Open]:
    """``await poller(served)`` gives a client with a session."""
    stack = AsyncExitStack()

    async def poller(served: Served, **options: Any) -> Poller:
        return await stack.enter_async_context(Poller.connect(served.ws, **options))

    yield poller
    runner.run(stack.aclose())


async def counted(served: Served, reason: str, kind: str = "longpoll") -> float:
    _, metrics = await http_get(f"{served.http}/metrics")
    return metric(metrics, "relay_refused_total", kind=kind, reason=reason)


def push_frame(join_ref: str, ref: str, topic: str, event: str, data: bytes) -> str:
    """A line with a binary push."""
    names = [name.encode() for name in (join_ref, ref, topic, event)]
    return base64.b64encode(b"\0" + bytes(map(len, names)) + b"".join(names) + data).decode()


# A session.


async def test_events_pushes_and_replies(serve_relay: Serve, poller: Open, connect: Connect, redis: Redis) -> None:
    served = await serve_relay()
    client, other = await poller(served), await connect(served)
    join_ref = await client.join("room:1")
    await other.join("room:1")
    for number in range(200):
        await redis.publish("to:room:1:new_msg", f'{{"n":{number}}}')
    assert [(await client.receive())[4]["n"] for _ in range(200)] == list(range(200))
    assert [(await other.receive())[4]["n"] for _ in range(200)] == list(range(200))
    async with heard_on(served.relay.config.redis_url, "from:room:1:*") as hear:
        assert await client.push(join_ref, "room:1", "shout", {"a": 1}) == {"status": "ok", "response": {}}
        assert await hear() == ("from:room:1:shout", b'{"a": 1}')
        assert await client.post(push_frame(join_ref, "9", "room:1", "bytes", b"\xff\0")) == {"status": 200}
        assert await hear() == ("from:room:1:bytes", b"\xff\0")
    assert (await client.receive())[4] == {"status": "ok", "response": {}}


async def test_binary_events_come_as_base64_and_are_counted(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay()
    client = await poller(served)
    await client.join("room:1")
    await served.relay.publish("room:1", "bytes", b"\xff\0")
    await client.expect_event("room:1", "bytes", {"base64": "/wA="})
    _, metrics = await http_get(f"{served.http}/metrics")
    assert metric(metrics, "relay_longpoll_base64_total") == 1


async def test_poll_waits_for_an_event(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay()
    client = await poller(served)
    await client.join("room:1")
    poll = asyncio.create_task(client.poll())
    await eventually(lambda: transport_of(served)._polls, "the poll to wait")
    await served.relay.publish("room:1", "e", {})
    assert (await poll)["messages"] == ['[null,null,"room:1","e",{}]']


def transport_of(served: Served) -> Any:
    (found,) = served.relay.node.sockets.values()
    return found.transport


async def test_window_ends_with_204(serve_relay: Serve, poller: Open) -> None:
    client = await poller(await serve_relay(limits=BRIEF))
    assert await client.poll() == {"status": 204, "token": client.token, "messages": []}


async def test_version_1(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay()
    client = await poller(served, vsn="1.0.0")
    join = {"topic": "room:1", "event": "phx_join", "payload": {}, "ref": "1"}
    assert await client.post(json.dumps(join), kind="application/json") == {"status": 200}
    reply = {"topic": "room:1", "event": "phx_reply", "ref": "1", "payload": {"status": "ok", "response": {}}}
    assert await client.receive() == reply
    await served.relay.publish("room:1", "e", b"\xff")
    assert (await client.receive())["payload"] == {"base64": "/w=="}


async def test_batch_of_more_lines_than_phoenix_reads_is_handled(serve_relay: Serve, poller: Open) -> None:
    """phoenix.js 1.7 sends all that it has; Phoenix drops those after the hundredth without a sign."""
    client = await poller(await serve_relay())
    assert await client.post(*[json.dumps(["1", "1", "room:1", "phx_join", {}])]) == {"status": 200}
    batch = [json.dumps(["1", str(ref), "room:1", "e", {}]) for ref in range(2, 103)]
    assert len(batch) == 101
    assert await client.post(*batch) == {"status": 200}
    assert [(await client.receive())[1] for _ in range(102)] == [str(ref) for ref in range(1, 103)]


async def test_session_counts_as_a_socket_for_operators(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay()
    client = await poller(served)
    await client.join("room:1")
    _, metrics = await http_get(f"{served.http}/metrics")
    assert metric(metrics, "relay_sockets", path="longpoll") == 1
    async with httpx.AsyncClient(trust_env=False, base_url=f"{served.http}/api") as api:
        (socket_id,) = (await api.get("/topics/room:1")).json()["socket_ids"]
        details = (await api.get(f"/sockets/{socket_id}")).json()
        assert (details["path"], details["topics"], details["version"]) == ("longpoll", ["room:1"], 2)
        assert (await api.delete(f"/sockets/{socket_id}")).status_code == 204
    await client.expect_gone()
    await eventually(lambda: served.relay.metrics.sockets == 0, "the session to end")
    assert served.relay.metrics.refused == {"longpoll: session gone": 1}


async def test_plugins_see_a_session_as_a_socket(serve_relay: Serve, poller: Open) -> None:
    plugin, left = Plugin("p"), list[str]()

    @plugin.on_join("room:*")
    async def join(join: Join) -> dict[str, int]:
        await asyncio.sleep(0)
        return {"members": 3}

    @plugin.on_push("room:*", "hello")
    async def push(push: Push) -> dict[str, Any]:
        push.socket.push("room:1", "direct", push.payload)
        return {"got": push.payload}

    @plugin.on_leave("*")
    async def leave(leave: Any) -> None:
        left.append(leave.topic)

    served = await serve_relay(extra_plugins=(plugin,), limits=BRIEF)
    client = await poller(served, lang="de")
    join_ref = await client.join("room:1")
    (found,) = served.relay.node.sockets.values()
    assert found.query["lang"] == "de"
    await client.send(join_ref, "50", "room:1", "hello", {"n": 1})
    assert await client.receive() == [join_ref, None, "room:1", "direct", {"n": 1}]
    assert (await client.receive())[4] == {"status": "ok", "response": {"got": {"n": 1}}}
    await eventually(lambda: left == ["room:1"], "the leave of a client that polls no more")


async def test_session_without_polls_ends(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay(limits=BRIEF)
    client = await poller(served)
    await client.join("room:1")
    await eventually(lambda: served.relay.metrics.sockets == 0 and not served.relay.topics, "the session to end")
    await client.expect_gone()
    assert served.relay.metrics.refused["idle"] == 0


async def test_client_that_goes_in_mid_poll_takes_nothing_with_it(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay()
    client = await poller(served)
    await client.join("room:1")
    parts = urlsplit(client.path)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as connection:
        connection.sendall(
            f"GET {parts.path}?vsn=2.0.0&token={client.token} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
        )
        transport = transport_of(served)
        await eventually(lambda: transport._polls, "the poll to wait")
    await eventually(lambda: not transport._polls, "the poll to end")
    await served.relay.publish("room:1", "e", {})
    await client.expect_event("room:1", "e", {})


async def test_two_polls_at_once_share_the_events(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay(limits={"longpoll_window_s": 1})
    client = await poller(served)
    await client.join("room:1")
    polls = [asyncio.create_task(client.ask("GET")) for _ in range(2)]
    await eventually(lambda: len(transport_of(served)._polls) == 2, "both polls to wait")
    for number in range(3):
        await served.relay.publish("room:1", "e", {"n": number})
    found = [(await poll).json() for poll in polls]
    messages = [message for answer in found for message in answer["messages"]]
    while len(messages) < 3:
        messages += (await client.poll())["messages"]
    assert sorted(messages) == [f'[null,null,"room:1","e",{{"n":{number}}}]' for number in range(3)]


# Dead, forged and malformed.


async def test_dead_and_forged_tokens(serve_relay: Serve, poller: Open, caplog: pytest.LogCaptureFixture) -> None:
    """500 for a poll and 410 for a post: phoenix.js 1.6 and 1.7 never come back from a 410 in mid-session."""
    served, other = await serve_relay(), await serve_relay()
    client, foreign = await poller(served), await poller(other)
    client.token, of_this = client.token[:-1] + ("A" if client.token[-1] != "A" else "B"), client.token
    await client.expect_gone()
    for wrong in (foreign.token, "lp-", "lp-..", "lp-a.b", "lp-\udcff.b.c".encode("utf-8", "ignore").decode()):
        client.token = wrong
        await client.expect_gone()
    assert await counted(served, "token") == 12
    assert "set auth.secret" in caplog.text
    client.token = of_this
    await client.join("room:1")
    assert served.relay.disconnect(client.socket_id)
    await eventually(lambda: served.relay.metrics.sockets == 0, "the session to end")
    await client.expect_gone()


async def test_post_without_a_token(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay()
    client = await poller(served, opens=False)
    assert (await client.post("[]"))["status"] == 410
    assert await counted(served, "no_token") == 1


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        ("[1]", 1007, "expected [join_ref, ref, topic, event, payload]: "),
        ("no base64", 1007, "expected a line of JSON, or the base64 of a binary frame"),
        (base64.b64encode(b"\x07").decode(), 1003, "expected a binary push (kind 0), got kind 7"),
        ('["1","1","a","e","' + "x" * 2000 + '"]', 1009, "expected frames of at most 2000 bytes"),
    ],
)
async def test_malformed_post_ends_the_session(
    serve_relay: Serve, poller: Open, line: str, code: int, reason: str
) -> None:
    limits = {"payload_max_bytes": 900, "frame_max_bytes": 2000}
    served = await serve_relay(limits=limits)
    client, other = await poller(served), await poller(served)
    await other.join("room:1")
    answer = await client.post(line)
    assert answer["status"] == 410 and answer["reason"].startswith(reason)
    await client.expect_gone()
    assert served.relay.metrics.malformed == {str(code): 1}
    await served.relay.publish("room:1", "e", {})
    await other.expect_event("room:1", "e", {})


async def test_body_over_the_limit_ends_the_session(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay()
    client = await poller(served)
    answer = await client.post("A" * 10_000_000)
    assert answer == {"status": 413, "reason": "expected a body of at most 8388608 bytes"}
    await client.expect_gone()
    assert await counted(served, "body_too_large") == 1


async def test_flood_of_posts_is_bounded_as_that_of_a_socket(serve_relay: Serve, poller: Open) -> None:
    limits = {"pushes_per_s": 1, "pushes_burst": 10, "rate_limit_violations_max": 50}
    served = await serve_relay(limits=limits)
    client, other = await poller(served), await poller(served)
    join_ref = await client.join("room:1")
    await other.join("room:1")
    line = json.dumps([join_ref, "9", "room:1", "e", {}])
    answers = [await client.post(*[line] * 20) for _ in range(4)]
    assert [answer["status"] for answer in answers] == [200, 200, 200, 410]
    assert answers[-1]["reason"] == "rate limited for long: this client asks for too much"
    assert served.relay.metrics.refused["rate limited"] == 50
    await client.expect_gone()
    await served.relay.publish("room:1", "e", {})
    await other.expect_event("room:1", "e", {})


async def test_post_waits_for_handlers_and_too_many_are_refused(serve_relay: Serve, poller: Open) -> None:
    plugin, may_go = Plugin("p"), asyncio.Event()

    @plugin.on_push("*", "slow")
    async def slow(push: Push) -> None:
        await may_go.wait()

    served = await serve_relay(extra_plugins=(plugin,), limits={"pushes_in_flight": 2})
    client = await poller(served)
    join_ref = await client.join("room:1")
    lines = [json.dumps([join_ref, str(ref), "room:1", "slow", {}]) for ref in range(5)]
    first = asyncio.create_task(client.post(*lines))
    second = asyncio.create_task(client.post(*lines))
    await eventually(lambda: transport_of(served).posts == 2, "both posts to wait")
    assert (await client.post("[]"))["status"] == 429
    may_go.set()
    assert [await first, await second] == [{"status": 200}] * 2
    assert await counted(served, "too_many_posts") == 1


async def test_post_that_takes_too_long_is_answered(serve_relay: Serve, poller: Open) -> None:
    plugin, may_go = Plugin("p"), asyncio.Event()

    @plugin.on_push("*", "slow")
    async def slow(push: Push) -> None:
        await may_go.wait()

    served = await serve_relay(extra_plugins=(plugin,), limits={"pushes_in_flight": 1, **BRIEF})
    client = await poller(served)
    join_ref = await client.join("room:1")
    poll = asyncio.create_task(client.ask("GET"))
    answer = await client.post(*[json.dumps([join_ref, str(ref), "room:1", "slow", {}]) for ref in range(3)])
    assert answer == {"status": 408, "reason": "the frames could not all be handled within 2 s"}
    may_go.set()
    await poll


async def test_other_methods_and_options(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay(allowed_origins=["https://shop.example"])
    shop, evil = {"Origin": "https://shop.example"}, {"Origin": "https://evil.example"}
    client = await poller(served, opens=False)
    assert (await client.ask("PUT")).status_code == 400
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = await client.ask("OPTIONS", headers={**shop, **asks})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-headers"] == "content-type"
    assert preflight.headers["access-control-allow-origin"] == "https://shop.example"
    opened = await client.ask("GET", headers=shop)
    assert opened.headers["access-control-allow-origin"] == "https://shop.example"
    client.token = opened.json()["token"]
    for method in ("GET", "POST"):
        refused = await client.ask(method, headers=evil)
        assert (refused.status_code, refused.json()["status"]) == (200, 403)
        assert "access-control-allow-origin" not in refused.headers
    assert (await client.ask("GET", headers={"Sec-Fetch-Site": "cross-site"})).json()["status"] == 403
    assert await counted(served, "origin", "handshake") == 3


async def test_transport_that_is_off_says_so(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay(transports=["websocket"])
    client = await poller(served, opens=False)
    answer = await client.open()
    assert answer["status"] == 403 and "the setting `transports` names them" in answer["reason"]


async def test_relay_that_asks_nobody_answers_this_machine_alone(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay()
    for headers in ({"X-Forwarded-For": "127.0.0.1"}, {"Host": "rebound.example"}, {"Via": "1.1 proxy"}):
        client = await poller(served, opens=False, headers=headers)
        assert (await client.open())["status"] == 403


# Authentication.


@pytest.mark.parametrize("way", ["params", "header"])
async def test_token_says_who_it_is(serve_relay: Serve, poller: Open, way: str) -> None:
    served, made = await serve_relay(auth=AUTH), token("alice", ROOMS)
    options: Any = {"token": made} if way == "params" else {"headers": {"X-Phoenix-AuthToken": made}}
    client = await poller(served, **options)
    await client.join("room:1")
    (found,) = served.relay.node.sockets.values()
    assert found.user == "alice"
    await client.send("7", "7", "other", "phx_join", {})
    assert (await client.receive())[4] == {"status": "error", "response": {"reason": "unauthorized"}}


@pytest.mark.parametrize(("query", "reason"), [({}, "no_token"), ({"token": "nonsense"}, "token_malformed")])
async def test_client_without_a_valid_token_is_refused(
    serve_relay: Serve, poller: Open, query: dict[str, str], reason: str
) -> None:
    served = await serve_relay(auth=AUTH)
    client = await poller(served, opens=False, **query)
    assert (await client.open())["status"] == 403
    assert served.relay.metrics.refused.total() == 1
    assert served.relay.metrics.sockets == 0


async def test_session_ends_with_its_token_unless_it_is_renewed(serve_relay: Serve, poller: Open) -> None:
    auth = {**AUTH, "expiry_grace_s": 0.5}
    served = await serve_relay(auth=auth)
    renewing = await poller(served, token=token("alice", ROOMS, ttl_s=2 * PATIENCE))
    join_ref = await renewing.join("room:1")
    fresh = {"access_token": token("alice", ROOMS, ttl_s=600)}
    assert (await renewing.push(join_ref, "room:1", "access_token", fresh))["status"] == "ok"
    ending = await poller(served, token=token("alice", ROOMS, ttl_s=2 * PATIENCE))
    old_ref = await ending.join("room:1")
    assert await ending.receive() == [old_ref, old_ref, "room:1", "phx_error", {"reason": "token expired"}]
    await ending.expect_gone()
    await served.relay.publish("room:1", "e", {})
    await renewing.expect_event("room:1", "e", {})


async def test_function_authenticates_by_the_apps_session(direct: bool) -> None:
    app, relay = session_app()
    async with serve(relay, app=app, prefix="/relay", direct=direct) as served:
        cookie = await log_in(served, "ada")
        async with Poller.connect(served.ws, headers=cookie) as client:
            await client.join("user:ada")
            await relay.publish("user:ada", "hello", {})
            await client.expect_event("user:ada", "hello", {})
        async with Poller.connect(served.ws, opens=False) as client:
            assert (await client.open())["status"] == 403


async def test_user_is_kicked_and_disconnected(serve_relay: Serve, poller: Open) -> None:
    served = await serve_relay(auth=AUTH)
    client = await poller(served, token=token("alice", ROOMS))
    join_ref = await client.join("room:1")
    await served.relay.kick("room:1", user="alice")
    assert await client.receive() == [join_ref, join_ref, "room:1", "phx_close", {}]
    await served.relay.disconnect(user="alice", reason="bye")
    await client.expect_gone()


# Its end.


async def test_relay_that_ends_ends_its_sessions(valkey: Valkey) -> None:
    """Uvicorn waits for requests under way; they end with the drain."""
    with RelayProcess("--redis-url", valkey.url) as relay:
        async with Poller.connect(f"{relay.http}/socket") as client:
            await client.join("room:end")
            poll = asyncio.create_task(client.poll())
            await asyncio.sleep(0.3 * PATIENCE)  # the poll is under way, whatever else
            assert await asyncio.to_thread(relay.stop) == 0
            assert await poll == {"status": 500, "reason": "the relay is restarting"}


async def test_interrupted_bus_asks_sessions_to_rejoin(serve_relay: Serve, poller: Open) -> None:
    with Valkey() as server:
        served = await serve_relay(redis_url=server.url, redis={"backoff_max_s": 0.1})
        client = await poller(served)
        join_ref = await client.join("room:1")
        server.kill()
        await eventually(lambda: not served.relay.link.live, "the link to be lost")
        server.start()
        error = [join_ref, join_ref, "room:1", "phx_error", {"reason": "events may have been missed"}]
        assert await client.receive() == error
        await client.join("room:1")
        await served.relay.publish("room:1", "e", {})
        await client.expect_event("room:1", "e", {})
