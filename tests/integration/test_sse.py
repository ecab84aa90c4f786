"""Streams of server-sent events over real servers: what they are sent, how they are refused, and how they end."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, cast

import httpx2 as httpx
import pytest
from fastapi import Request
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response

from relay import Join, Plugin, Refused, Relay
from relay.transports.sse import SSETransport
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually, http_get, metric, serve
from tests.support.session_app import log_in, session_app
from tests.support.sse import Stream, StreamEvent

Connect = Callable[..., Awaitable[Client]]
Serve = Callable[..., Awaitable[Served]]
Open = Callable[..., Awaitable[Stream]]

AUTH = {"keys": [SECRET], "leeway_s": 0}
ROOMS = {"room:*": "join"}


def server_of(direct: bool) -> dict[str, Any]:
    """Our protocol class for HTTP, which lets streams write to the transport, or Uvicorn's own."""
    return {"http": "relay.server:RelayHTTPProtocol"} if direct else {}


@pytest.fixture
def serve_streams(serve_relay: Serve, direct: bool) -> Serve:
    """As `serve_relay`, with streams on both ways to write too."""

    async def serve_streams(*, server: dict[str, Any] | None = None, **settings: Any) -> Served:
        return await serve_relay(server={**server_of(direct), **(server or {})}, **settings)

    return serve_streams


@pytest.fixture
def open_stream(runner: asyncio.Runner) -> Iterator[Open]:
    """``await open_stream(served, "topic", …)`` gives a stream, which is cut off after the test."""
    stack = AsyncExitStack()

    async def open_stream(served: Served, *topics: str, **options: Any) -> Stream:
        return await stack.enter_async_context(Stream.open(served.ws, *topics, **options))

    yield open_stream
    runner.run(stack.aclose())


def error(reason: str, topic: str | None = None) -> list[tuple[str, Any]]:
    """What a stream ends with."""
    return [("relay:error", {"reason": reason} if topic is None else {"topic": topic, "reason": reason})]


async def end_of(stream: Stream) -> list[tuple[str, Any]]:
    """What comes until the stream's orderly end."""
    found = [(event.event, json.loads(event.data)) for event in await stream.rest()]
    assert stream.is_complete
    return found


async def counted(served: Served, reason: str, kind: str = "handshake") -> float:
    _, metrics = await http_get(f"{served.http}/metrics")
    return metric(metrics, "relay_refused_total", kind=kind, reason=reason)


# Events.


async def test_events_reach_streams_and_sockets_alike(
    serve_streams: Serve, open_stream: Open, connect: Connect, redis: Redis
) -> None:
    served = await serve_streams()
    client, stream = await connect(served), await open_stream(served, "room:1")
    await client.join("room:1")
    assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    for number in range(200):
        await redis.publish("to:room:1:new_msg", f'{{"n":{number}}}')
    await redis.publish("to:room:1:bytes", b"\xff\x00")
    assert [await stream.receive() for _ in range(200)] == [
        StreamEvent("new_msg", f'{{"n":{number}}}', "") for number in range(200)
    ]
    await stream.expect_event("bytes", '{"base64":"/wA="}')
    assert [(await client.receive())[4] for _ in range(200)] == [{"n": number} for number in range(200)]
    await served.relay.publish("room:1", "from_code", {"a": 1})
    await stream.expect_event("from_code", '{"a":1}')
    assert stream.parser.retry_ms is not None and 1000 <= stream.parser.retry_ms <= 3000


async def test_stream_counts_as_a_socket_for_operators(serve_streams: Serve, open_stream: Open) -> None:
    served = await serve_streams()
    stream = await open_stream(served, "room:1", "room:2")
    _, metrics = await http_get(f"{served.http}/metrics")
    assert metric(metrics, "relay_sockets", path="sse") == 1
    assert served.relay.topics == {"room:1": 1, "room:2": 1}
    async with httpx.AsyncClient(trust_env=False, base_url=f"{served.http}/api") as api:
        (socket_id,) = (await api.get("/topics/room:1")).json()["socket_ids"]
        details = (await api.get(f"/sockets/{socket_id}")).json()
        assert (details["path"], details["topics"]) == ("sse", ["room:1", "room:2"])
        assert (await api.delete(f"/sockets/{socket_id}")).status_code == 204
    assert await end_of(stream) == error("disconnected by the server")
    await eventually(lambda: served.relay.metrics.sockets == 0, "the stream to end")
    assert served.relay.topics == {}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_reads_a_stream(valkey: Valkey) -> None:
    """``curl -N``, as the documentation has it."""
    with RelayProcess("--redis-url", valkey.url) as relay:
        curl = await asyncio.create_subprocess_exec(
            "curl", "-sN", f"{relay.http}/socket/sse?topic=room:curl", stdout=subprocess.PIPE
        )
        assert curl.stdout is not None
        assert (await curl.stdout.readline()).startswith(b"retry: ")
        async with Redis.from_url(valkey.url) as redis:
            await redis.publish("to:room:curl:new_msg", '{"text":"hi"}')
        lines = [await curl.stdout.readline() for _ in range(7)]
        assert lines[:3] == [b"\n", b"event: relay:join\n", b'data: {"topic":"room:curl","response":{}}\n']
        assert lines[3:] == [b"\n", b"event: new_msg\n", b'data: {"text":"hi"}\n', b"\n"]
        assert await asyncio.to_thread(relay.stop) == 0, "it does not wait for the stream"
        rest = await curl.stdout.read()
        assert re.fullmatch(rb'retry: \d+\nevent: relay:error\ndata: {"reason":"the relay is restarting"}\n\n', rest)
        assert await curl.wait() == 0


async def test_topic_is_left_when_its_last_stream_ends(serve_streams: Serve, open_stream: Open) -> None:
    served = await serve_streams()
    stream = await open_stream(served, "room:1")
    stream.writer.transport.abort()
    await eventually(lambda: served.relay.metrics.sockets == 0 and not served.relay.topics, "the stream to be freed")


async def test_plugins_see_a_stream_as_a_socket(serve_streams: Serve, open_stream: Open) -> None:
    plugin, left = Plugin("p"), list[str]()

    @plugin.on_join("room:*")
    async def join(join: Join) -> dict[str, int]:
        if join.topic == "room:closed":
            raise Refused("closed", until="noon")
        await asyncio.sleep(0)
        join.socket.push("room:1", "not yet", {})  # it has not joined
        return {"members": 3}

    @plugin.on_leave("*")
    async def leave(leave: Any) -> None:
        left.append(leave.topic)

    served = await serve_streams(extra_plugins=(plugin,))
    stream = await open_stream(served, "room:1", "other", lang="de")
    (found,) = served.relay.node.sockets.values()
    assert found.query["lang"] == "de"
    assert found.push("other", "hello", {"to": "you"})
    await stream.expect_event("hello", '{"to":"you"}')
    joins = [{"topic": "room:1", "response": {"members": 3}}, {"topic": "other", "response": {}}]
    assert sorted(stream.joins, key=lambda join: -len(join["topic"])) == joins
    refused = await open_stream(served, "room:closed")
    assert (refused.status, await refused.body()) == (403, "topic 'room:closed': closed\n")
    stream.writer.transport.abort()
    await eventually(lambda: sorted(left) == ["other", "room:1"], "the leaves")


# Refusals.


@pytest.mark.parametrize(
    ("topics", "query", "status", "text"),
    [
        ((), {}, 400, "expected topic=… in the query, once for each topic\n"),
        (("room:1", "phoenix"), {}, 400, "expected topics of 1 to 255 bytes"),
        (("room:1",), {}, 401, "expected a token"),
        (("room:1",), {"token": "nonsense"}, 401, "the token"),
        (("room:1", "other"), {"token": token("alice", ROOMS)}, 403, "topic 'other': unauthorized\n"),
    ],
)
async def test_permanent_refusal_is_a_status(
    serve_streams: Serve, open_stream: Open, topics: tuple[str, ...], query: dict[str, str], status: int, text: str
) -> None:
    """`EventSource` then stops for good, and `onerror` finds it closed."""
    served = await serve_streams(auth=AUTH)
    stream = await open_stream(served, *topics, **query)
    assert (stream.status, stream.headers["cache-control"]) == (status, "no-store")
    assert (await stream.body()).startswith(text)
    await eventually(lambda: served.relay.metrics.sockets == 0, "the stream to end")
    assert not served.relay.topics


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT"])
async def test_other_methods_are_refused(serve_streams: Serve, open_stream: Open, method: str) -> None:
    stream = await open_stream(await serve_streams(), "room:1", method=method)
    assert (stream.status, stream.headers["allow"]) == (405, "GET, OPTIONS")


async def test_pages_of_other_origins_are_refused(serve_streams: Serve, open_stream: Open) -> None:
    served = await serve_streams(allowed_origins=["https://shop.example"])
    evil = await open_stream(served, "room:1", headers={"Origin": "https://evil.example"})
    assert evil.status == 403 and "access-control-allow-origin" not in evil.headers
    image = await open_stream(served, "room:1", headers={"Sec-Fetch-Site": "cross-site"})
    assert image.status == 403
    shop = await open_stream(served, "room:1", headers={"Origin": "https://shop.example"})
    assert shop.headers["access-control-allow-origin"] == "https://shop.example"
    preflight = await open_stream(served, "room:1", method="OPTIONS", headers={"Origin": "https://shop.example"})
    assert preflight.status == 204 and "authorization" in preflight.headers["access-control-allow-headers"]
    assert await counted(served, "origin") == 2


@pytest.mark.parametrize("direct", [True])
async def test_relay_that_asks_nobody_streams_to_this_machine_alone(serve_streams: Serve, open_stream: Open) -> None:
    served = await serve_streams()
    for headers in ({"X-Forwarded-For": "127.0.0.1"}, {"Host": "rebound.example"}, {"Via": "1.1 proxy"}):
        stream = await open_stream(served, "room:1", headers=headers)
        assert stream.status == 403
    key = {"Host": "rebound.example", "Authorization": "Bearer operators-key"}
    other = await serve_streams(rest={"api_key": "operators-key"})
    assert (await open_stream(other, "room:1", headers=key)).status == 403, "the key is for REST"


async def test_transport_that_is_off_says_so(serve_streams: Serve, open_stream: Open, connect: Connect) -> None:
    served = await serve_streams(transports=["websocket"])
    stream = await open_stream(served, "room:1")
    assert stream.status == 404
    assert "the setting `transports` names them" in await stream.body()
    await (await connect(served)).join("room:1")
    other = await serve_streams(transports=["sse"])
    assert (await open_stream(other, "room:1")).status == 200
    with pytest.raises(Exception, match="404"):
        await connect(other)
    assert await counted(other, "transport") == 1


async def test_stream_of_a_relay_without_its_bus_ends_and_may_come_back(
    serve_streams: Serve, open_stream: Open
) -> None:
    with Valkey() as server:
        served = await serve_streams(redis_url=server.url, redis={"backoff_max_s": 0.1})
        server.kill()
        await eventually(lambda: not served.relay.link.live, "the link to be lost")
        stream = await open_stream(served, "room:1")
        assert stream.status == 200
        assert await end_of(stream) == error("topic 'room:1': bus unavailable")
        assert stream.parser.retry_ms is not None and 1000 <= stream.parser.retry_ms <= 5000
        server.start()
        await eventually(lambda: served.relay.link.live, "the link to come back")
        again = await open_stream(served, "room:1")
        await served.relay.publish("room:1", "e", {})
        await again.expect_event("e", "{}")


# Authentication.


@pytest.mark.parametrize("way", ["query", "header"])
async def test_token_says_who_it_is(serve_streams: Serve, open_stream: Open, way: str) -> None:
    served, made = await serve_streams(auth=AUTH), token("alice", ROOMS)
    given: dict[str, Any] = {"token": made} if way == "query" else {"headers": {"Authorization": f"Bearer {made}"}}
    stream = await open_stream(served, "room:1", **given)
    assert stream.status == 200
    (found,) = served.relay.node.sockets.values()
    assert found.user == "alice"


async def test_stream_ends_with_its_token(serve_streams: Serve, open_stream: Open) -> None:
    served, made = await serve_streams(auth=AUTH), token("alice", ROOMS, ttl_s=1.2 * PATIENCE)
    stream = await open_stream(served, "room:1", "room:2", token=made)
    [(event, data)] = await end_of(stream)
    assert (event, data["reason"]) == ("relay:error", "token expired")
    again = await open_stream(served, "room:1", token=made)
    assert (again.status, await again.body()) == (401, "the token has expired\n")


async def test_function_authenticates_streams_by_the_apps_session(direct: bool) -> None:
    app, relay = session_app()
    async with serve(relay, app=app, prefix="/relay", direct=direct, **server_of(direct)) as served:
        cookie = await log_in(served, "ada")
        async with Stream.open(served.ws, "user:ada", headers=cookie) as stream:
            await relay.publish("user:ada", "hello", {})
            await stream.expect_event("hello", "{}")
        for topic, headers, status in (("user:bob", cookie, 403), ("user:ada", {}, 401)):
            async with Stream.open(served.ws, topic, headers=headers) as stream:
                assert stream.status == status
        evil = {**cookie, "Origin": "https://evil.example"}
        async with Stream.open(served.ws, "user:ada", headers=evil) as stream:
            assert stream.status == 403


async def test_user_is_kicked_and_disconnected(serve_streams: Serve, open_stream: Open) -> None:
    served, made = await serve_streams(auth=AUTH), token("alice", ROOMS)
    one = await open_stream(served, "room:1", token=made)
    both = await open_stream(served, "room:1", "room:2", token=made)
    await served.relay.kick("room:1", user="alice")
    assert await end_of(one) == [("relay:close", {"topic": "room:1"})]
    await both.expect_event("relay:close", '{"topic":"room:1"}')
    await served.relay.disconnect(user="alice", reason="bye")
    assert await end_of(both) == error("bye")


# Gaps and slow readers.


async def test_gap_ends_streams_so_that_they_come_back(serve_streams: Serve, open_stream: Open) -> None:
    with Valkey() as server:
        served = await serve_streams(redis_url=server.url, redis={"backoff_max_s": 0.1})
        streams = [await open_stream(served, "room:1") for _ in range(3)]
        async with Redis.from_url(server.url) as redis:
            await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
        for stream in streams:
            assert await end_of(stream) == error("events may have been missed", "room:1")
        assert served.relay.metrics.rejoins_requested == 3
        await eventually(lambda: served.relay.metrics.sockets == 0, "the streams to end")


@pytest.mark.parametrize("policy", ["disconnect", "drop-oldest"])
async def test_reader_that_reads_nothing_costs_its_outbox_and_no_more(
    serve_streams: Serve, open_stream: Open, policy: str
) -> None:
    limits = {"payload_max_bytes": 65_536, "outbox_max_bytes": 200_000, "close_timeout_s": 0.3}
    served = await serve_streams(
        server={"send_buffer": 4096}, limits=limits, topics=[{"match": "*", "overflow": policy, "notify_dropped": True}]
    )
    slow = await open_stream(served, "room:1", receive_buffer=4096)
    (found,) = served.relay.node.sockets.values()
    bystander = await open_stream(served, "room:1")
    for number in range(100):
        await served.relay.publish("room:1", "big", f"{number:05}" + "x" * 10_000)
        assert json.loads((await bystander.receive()).data).startswith(f"{number:05}"), "nobody else waits"
    if policy == "disconnect":
        await eventually(lambda: served.relay.metrics.sockets == 1, "the slow one to be cut off")
        assert not [event for event in await slow.rest() if event.event.startswith("relay:")], "it was cut"
        assert not slow.is_complete
        return
    assert found.queued_bytes <= 200_000
    seen = [await slow.receive()]
    while not (seen[-1].event == "big" and json.loads(seen[-1].data).startswith("00099")):
        seen.append(await slow.receive())
    dropped = sum(json.loads(event.data)["dropped"] for event in seen if event.event == "relay:dropped")
    assert dropped == found.dropped == 100 - sum(event.event == "big" for event in seen) > 0


async def test_terminated_relay_does_not_wait_for_a_stream_that_is_not_read(valkey: Valkey) -> None:
    environ = {"RELAY_LIMITS__CLOSE_TIMEOUT_S": "1", "RELAY_SYSTEM_TOPIC": "false"}
    with RelayProcess("--redis-url", valkey.url, environ=environ) as relay:
        async with Stream.open(relay.ws, "room:unread", receive_buffer=4096), Redis.from_url(valkey.url) as redis:
            for _ in range(30):  # less than the outbox takes
                await redis.publish("to:room:unread:big", '"' + "x" * 60_000 + '"')
            began = time.monotonic()
            assert await asyncio.to_thread(relay.stop) == 0
            assert time.monotonic() - began < 10 * PATIENCE


@pytest.mark.parametrize("direct", [False])
async def test_stream_that_takes_nothing_is_closed_as_idle(serve_streams: Serve, open_stream: Open) -> None:
    """Uvicorn alone waits for a reader without a limit."""
    limits = {"idle_timeout_s": 0.4 * PATIENCE, "close_timeout_s": 0.2}
    served = await serve_streams(server={"send_buffer": 4096}, limits=limits)
    slow, reader = await open_stream(served, "room:1", receive_buffer=4096), await open_stream(served, "room:2")
    await served.relay.publish("room:1", "big", "x" * 1_000_000)
    await served.relay.publish("room:1", "small", "x")
    await eventually(lambda: served.relay.metrics.sockets == 1, "the slow one to be cut off")
    assert await counted(served, "idle", "socket") == 1
    await served.relay.publish("room:2", "e", {})
    await reader.expect_event("e", "{}")
    assert reader.parser.comments > 0
    assert not slow.is_complete


async def test_kernel_ends_the_connection_of_a_client_that_has_vanished(
    serve_streams: Serve, open_stream: Open
) -> None:
    served = await serve_streams(limits={"idle_timeout_s": 7})
    await open_stream(served, "room:1")
    (found,) = served.relay.node.sockets.values()
    assert isinstance(found.transport, SSETransport)
    transport = cast(Any, found.transport._receive).__self__.transport
    option = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    assert transport.get_extra_info("socket").getsockopt(*option) == 7000


# Inside an app.


class Quiet(BaseHTTPMiddleware):
    """A middleware as many apps have one: it stands between the relay and the server."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers["x-quiet"] = "yes"
        return response


@pytest.mark.parametrize(
    "middleware", [[], [Middleware(GZipMiddleware)], [Middleware(Quiet)]], ids=["", "gzip", "base"]
)
async def test_stream_inside_an_app(direct: bool, middleware: list[Middleware]) -> None:
    relay = Relay(broadcast_url="memory://", system_topic=False)
    app = Starlette(middleware=middleware)
    relay.install(app, path="/deep/relay")
    async with serve(relay, app=app, prefix="/deep/relay", direct=direct, **server_of(direct)) as served:
        async with Stream.open(served.ws, "room:1", headers={"Accept-Encoding": "gzip"}) as stream:
            assert stream.headers.get("content-encoding") is None
            for number in range(3):
                await relay.publish("room:1", "new_msg", {"n": number})
                await stream.expect_event("new_msg", f'{{"n":{number}}}')
        await eventually(lambda: relay.metrics.sockets == 0, "the stream to be freed")
        async with Stream.open(served.ws, "room:1") as stream:
            relay.node.drain()
            assert await end_of(stream) == error("the relay is restarting")
