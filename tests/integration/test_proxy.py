"""``[[proxy]]`` between real sockets: what the service behind it gets, and what comes back, byte by byte."""

import asyncio
import base64
import gzip
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2 as httpx
import pytest
from starlette.applications import Starlette

from relay import Relay
from tests.support.patience import PATIENCE
from tests.support.process import free_port
from tests.support.serving import Served, eventually, http_get, metric, serve
from tests.support.upstream import Exchange, Upstream

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@asynccontextmanager
async def proxied(target: str, *, prefix: str = "", server: dict[str, Any] | None = None, **entry: Any) -> Any:
    """A relay that forwards ``/api/node-plugin`` to ``target``, alone or mounted under ``prefix``."""
    settings = {"prefix": "/api/node-plugin", "target": target, **entry}
    relay = Relay(
        broadcast_url="memory://", system_topic=False, allow_anonymous=True, allowed_hosts="any", proxy=[settings]
    )
    app = Starlette()
    if prefix:
        relay.install(app, prefix)
    async with serve(relay, app=app if prefix else None, prefix=prefix, **(server or {})) as served:
        yield served


class Asked:
    """A request under way: what the upstream has got, and what the client will get."""

    def __init__(self, exchange: Exchange, answer: "asyncio.Task[httpx.Response]") -> None:
        self.exchange = exchange
        self._answer = answer

    async def answered(self, data: bytes = OK) -> httpx.Response:
        """Let the upstream answer, and return what arrives at the client."""
        await self.exchange.answer(data)
        return await self._answer


Ask = Callable[..., Awaitable[Asked]]


@pytest.fixture
def upstream(runner: asyncio.Runner) -> Any:
    stack = AsyncExitStack()
    yield runner.run(stack.enter_async_context(Upstream.start()))
    runner.run(stack.aclose())


@pytest.fixture
def served(runner: asyncio.Runner, upstream: Upstream) -> Any:
    """A relay in front of ``upstream``, the prefix stripped."""
    stack = AsyncExitStack()
    yield runner.run(stack.enter_async_context(proxied(upstream.url)))
    runner.run(stack.aclose())


@asynccontextmanager
async def client(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """A client that says as little as it can by itself."""
    async with httpx.AsyncClient(base_url=f"{served.http}/api/node-plugin", trust_env=False) as client:
        for name in ("accept", "accept-encoding", "user-agent"):
            del client.headers[name]
        yield client


@asynccontextmanager
async def asking(
    served: Served, upstream: Upstream, method: str = "GET", target: str | bytes = "/x", **options: Any
) -> AsyncIterator[Asked]:
    """Ask for ``target`` below the prefix; as ``bytes``, for exactly that."""
    if isinstance(target, bytes):
        options["extensions"], target = {"target": target}, "/"
    async with client(served) as asker:
        answer = asyncio.create_task(asker.request(method, target, **options))
        yield Asked(await upstream.next(), answer)
        await answer


# The path.


@pytest.mark.parametrize(
    ("strip", "base", "asked", "expected"),
    [
        (True, "", "/", "/"),
        (True, "", "/x/y", "/x/y"),
        (True, "/app", "/x", "/app/x"),
        (True, "/app/", "/x", "/app/x"),
        (False, "", "/", "/api/node-plugin/"),
        (False, "", "/x/y", "/api/node-plugin/x/y"),
        (False, "/app", "/x", "/app/api/node-plugin/x"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "/deep/relay"])
async def test_prefix_is_stripped_or_kept(
    upstream: Upstream, strip: bool, base: str, asked: str, expected: str, prefix: str
) -> None:
    """What the relay is mounted at is never forwarded: the upstream need not know it."""
    async with (
        proxied(upstream.url + base, strip_prefix=strip, prefix=prefix) as served,
        asking(served, upstream, target=asked) as asking_it,
    ):
        exchange = asking_it.exchange
        assert exchange.target == expected
        assert (await asking_it.answered()).text == "ok"
        assert exchange.values("x-forwarded-prefix") == list(
            filter(None, [prefix + ("/api/node-plugin" if strip else "")])
        )


@pytest.mark.parametrize(("strip", "expected"), [(True, "/?a=1"), (False, "/api/node-plugin?a=1")])
async def test_prefix_itself_is_forwarded_too(upstream: Upstream, strip: bool, expected: str) -> None:
    """Without the slash the REST app, mounted at ``/api``, would answer 404."""
    async with (
        proxied(upstream.url, strip_prefix=strip) as served,
        asking(served, upstream, target=b"/api/node-plugin?a=1") as asked,
    ):
        assert asked.exchange.target == expected
        assert (await asked.answered()).text == "ok"


async def test_neighbours_of_the_prefix_are_not_forwarded(served: Served, upstream: Upstream) -> None:
    async with client(served) as asker:
        for path in ("/api/node-plugins", "/api/node-plugi", "/api", "/node-plugin/x", "/API/node-plugin/x"):
            answer = await asker.get("/", extensions={"target": path.encode()})
            assert answer.status_code in (307, 404)
    assert upstream.is_idle


@pytest.mark.parametrize(
    "rest",
    [
        b"/a%2Fb",
        b"/a%2fb%20c",
        b"/%C3%BC/%E9%89%84",
        b"/%25%2F%3F",
        b"/a;b=1,2/c@d:e!$&'()*+",
        b"//double//slash/",
        b"//evil.example/x",
        b"/http://evil.example/x",
        b"/%FF",
        b"/a%0Ab",
        b"/a%0A",
        b"/...",
        b"/.well-known/x",
        b"/x?q=%2F%20+&q=2&empty=&=&%FF",
        b"/x?",
        b"/?",
    ],
)
async def test_encoded_paths_and_queries_reach_the_upstream_as_sent(
    served: Served, upstream: Upstream, rest: bytes
) -> None:
    async with asking(served, upstream, target=b"/api/node-plugin" + rest) as asked:
        assert asked.exchange.target == rest.decode().removesuffix("?")
        assert asked.exchange.values("host") == [f"127.0.0.1:{upstream.port}"]
        assert (await asked.answered()).status_code == 200


@pytest.mark.parametrize(
    "rest",
    [
        b"/..",
        b"/../x",
        b"/a/../../x",
        b"/%2e%2e/x",
        b"/.%2E%2Fx",
        b"/a%2F..%2F..%2Fx",
        b"/./x",
        b"/.",
        b"/a/%2e",
        b"/a;/..;x/b",
        b"/..%3Bx/b",
        b"/a/..%5C..%5Cb",
        b"/..%5Cb",
    ],
)
async def test_path_that_leads_out_of_the_target_is_refused(upstream: Upstream, rest: bytes) -> None:
    async with proxied(f"{upstream.url}/app/") as served, client(served) as asker:
        refused = await asker.get("/", extensions={"target": b"/api/node-plugin" + rest})
        assert refused.status_code == 400
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["detail"] == "expected a path without the segments . and .."
    assert upstream.is_idle


@pytest.mark.parametrize(
    "target",
    [
        b"//127.0.0.1:%d/api/node-plugin/x",
        b"/\\127.0.0.1:%d/api/node-plugin/x",
        b"http://127.0.0.1:%d/api/node-plugin/x",
        b"/api/node-plugin//127.0.0.1:%d/x",
        b"/api/node-plugin/@127.0.0.1:%d/x",
        b"/api/node-plugin/http://127.0.0.1:%d/x",
        b"/api/node-plugin:%d/x",
        b"/api/node-plugin@127.0.0.1:%d/x",
    ],
)
@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_no_path_reaches_another_host(upstream: Upstream, target: bytes, http: str) -> None:
    """Also in absolute form, of which RFC 9112, section 3.2.2, says that servers must accept it."""
    async with Upstream.start() as elsewhere, proxied(upstream.url, server={"http": http}) as served:

        async def answer() -> None:
            await (await upstream.next()).answer_ok()

        answering = asyncio.create_task(answer())
        async with client(served) as asker:
            await asker.get("/", extensions={"target": target % elsewhere.port})
        answering.cancel()
        assert elsewhere.is_idle


# The request.


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
async def test_methods_are_passed_on(served: Served, upstream: Upstream, method: str) -> None:
    async with asking(served, upstream, method, "/x") as asked:
        assert asked.exchange.method == method
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
        answer = await asked.answered(head if method == "HEAD" else head + b"ok")
        assert (answer.headers["content-length"], answer.text) == ("2", "" if method == "HEAD" else "ok")


async def test_body_with_a_length_arrives_with_it(served: Served, upstream: Upstream) -> None:
    async with asking(served, upstream, "POST", content=b"0123456789") as asked:
        assert asked.exchange.values("content-length") == ["10"]
        assert asked.exchange.values("transfer-encoding") == []
        assert await asked.exchange.read(10) == b"0123456789"
        await asked.answered()


async def test_request_without_a_body_gets_none(served: Served, upstream: Upstream) -> None:
    async with asking(served, upstream, "DELETE") as asked:
        assert asked.exchange.values("content-length") == []
        assert asked.exchange.values("transfer-encoding") == []
        await asked.answered()


async def test_upload_is_streamed_while_the_client_still_sends(served: Served, upstream: Upstream) -> None:
    go_on = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await go_on.wait()
        yield b"second"

    async with asking(served, upstream, "POST", content=body()) as asked:
        assert asked.exchange.values("transfer-encoding") == ["chunked"]
        assert await asked.exchange.read_chunk() == b"first"
        go_on.set()
        assert await asked.exchange.read_chunk() == b"second"
        assert await asked.exchange.read_chunk() == b""
        assert (await asked.answered()).text == "ok"


async def test_upload_broken_off_is_broken_off_behind_too(served: Served, upstream: Upstream) -> None:
    """A half upload must not look like a whole one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"POST /api/node-plugin/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n01234")
    exchange = await upstream.next()
    assert await exchange.read(5) == b"01234"
    writer.close()
    await writer.wait_closed()
    with pytest.raises(asyncio.IncompleteReadError):
        await exchange.read(5)


async def test_headers_are_passed_on_repeated_ones_in_order(served: Served, upstream: Upstream) -> None:
    headers = [("x-one", "1"), ("x-two", "a"), ("x-two", "b"), ("cookie", "a=1; b=2"), ("authorization", "Bearer t")]
    async with asking(served, upstream, headers=headers) as asked:
        came = [pair for pair in asked.exchange.headers if not pair[0].startswith("x-forwarded-")]
        assert came == [("host", f"127.0.0.1:{upstream.port}"), *headers]
        await asked.answered()


@pytest.mark.parametrize("own", [None, "Bearer t"])
async def test_user_and_password_of_the_target_are_sent(upstream: Upstream, own: str | None) -> None:
    headers = {} if own is None else {"authorization": own}
    async with (
        proxied(upstream.url.replace("//", "//user:hunter2%21@")) as served,
        asking(served, upstream, "POST", headers=headers, content=b"body") as asked,
    ):
        came = [value for name, value in asked.exchange.headers if name == "authorization"]
        assert came == ["Basic " + base64.b64encode(b"user:hunter2!").decode()]
        await asked.answered()


async def test_nothing_is_asked_for_that_the_client_did_not_ask_for(served: Served, upstream: Upstream) -> None:
    """An upstream that compresses because the proxy said it may would be unreadable for this client."""
    async with asking(served, upstream) as asked:
        names = {name for name, _ in asked.exchange.headers}
        assert not names & {"accept", "accept-encoding", "user-agent", "cookie", "connection"}
        await asked.answered()


async def test_headers_of_one_connection_are_not_passed_on(served: Served, upstream: Upstream) -> None:
    """RFC 9110, section 7.6.1."""
    headers = [
        ("connection", "keep-alive, X-Private, close"),
        ("x-private", "1"),
        ("keep-alive", "timeout=5"),
        ("te", "trailers"),
        ("trailer", "x-sum"),
        ("proxy-authorization", "Basic eDp5"),
        ("proxy-connection", "keep-alive"),
        ("x-public", "1"),
    ]
    async with asking(served, upstream, headers=headers) as asked:
        names = {name for name, _ in asked.exchange.headers}
        assert "x-public" in names
        assert not names & {"connection", *(name for name, _ in headers[:-1])}
        await asked.answered()


async def test_what_the_relay_knows_is_told_and_claims_are_not_believed(served: Served, upstream: Upstream) -> None:
    claims = {
        "x-forwarded-for": "8.8.8.8",
        "x-forwarded-host": "evil.example",
        "x-forwarded-proto": "gopher",
        "x-forwarded-prefix": "/evil",
        "x-forwarded-port": "1",
        "X_Forwarded_For": "8.8.8.8",
        "forwarded": "for=8.8.8.8",
        "x-real-ip": "8.8.8.8",
        "host": "relay.example.org:8080",
    }
    async with asking(served, upstream, headers=claims) as asked:
        told = sorted((name, value) for name, value in asked.exchange.headers if name != "host")
        assert told == [
            # Uvicorn believes a proxy on this machine, which here the client is.
            ("x-forwarded-for", told[0][1]),
            ("x-forwarded-host", "relay.example.org:8080"),
            ("x-forwarded-prefix", "/api/node-plugin"),
            ("x-forwarded-proto", told[3][1]),
        ]
        assert asked.exchange.values("host") == [f"127.0.0.1:{upstream.port}"]
        await asked.answered()


async def test_address_is_the_one_the_server_believes_in(upstream: Upstream) -> None:
    async with (
        proxied(upstream.url, server={"proxy_headers": False}) as served,
        asking(served, upstream, headers={"x-forwarded-for": "8.8.8.8", "x-forwarded-proto": "https"}) as asked,
    ):
        assert asked.exchange.values("x-forwarded-for") == ["127.0.0.1"]
        assert asked.exchange.values("x-forwarded-proto") == ["http"]
        await asked.answered()


# The response.


@pytest.mark.parametrize("status", [200, 201, 204, 304, 400, 401, 404, 418, 500, 503, 599])
async def test_status_is_passed_on(served: Served, upstream: Upstream, status: int) -> None:
    async with asking(served, upstream) as asked:
        length = b"" if status in (204, 304) else b"Content-Length: 0\r\n"
        answer = await asked.answered(b"HTTP/1.1 %d Whatever\r\n%sX-Seen: 1\r\n\r\n" % (status, length))
        assert (answer.status_code, answer.headers["x-seen"], answer.content) == (status, "1", b"")


async def test_repeated_headers_come_back_each(served: Served, upstream: Upstream) -> None:
    async with asking(served, upstream) as asked:
        answer = await asked.answered(
            b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1; Path=/, x\r\nSet-Cookie: b=2\r\nVary: a\r\nVary: b\r\n"
            b"Content-Length: 0\r\n\r\n"
        )
        assert answer.headers.get_list("set-cookie") == ["a=1; Path=/, x", "b=2"]
        assert answer.headers.get_list("vary") == ["a", "b"]


async def test_cookie_of_one_client_is_not_sent_for_another(served: Served, upstream: Upstream) -> None:
    """An HTTP client library keeps cookies; a proxy must not."""
    async with asking(served, upstream) as asked:
        await asked.answered(b"HTTP/1.1 200 OK\r\nSet-Cookie: session=secret; Path=/\r\nContent-Length: 0\r\n\r\n")
    async with asking(served, upstream) as asked:
        assert asked.exchange.values("cookie") == []
        await asked.answered()


async def test_headers_of_the_other_connection_do_not_come_back(served: Served, upstream: Upstream) -> None:
    async with asking(served, upstream) as asked:
        answer = await asked.answered(
            b"HTTP/1.1 200 OK\r\nConnection: X-Private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\nX-Public: 1\r\n"
            b"Proxy-Authenticate: Basic\r\nUpgrade: h2c\r\nTrailer: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nok\r\n0\r\n\r\n"
        )
        assert answer.text == "ok"
        names = set(answer.headers)
        assert "x-public" in names
        assert not names & {"x-private", "keep-alive", "proxy-authenticate", "upgrade", "trailer"}


async def test_events_arrive_as_they_are_sent(served: Served, upstream: Upstream) -> None:
    """Server-sent events: each chunk by itself, long before the end."""
    async with client(served) as asker:

        async def first_bytes() -> AsyncIterator[bytes]:
            async with asker.stream("GET", "/events") as response:
                assert response.headers["content-type"] == "text/event-stream"
                async for chunk in response.aiter_raw():
                    yield chunk

        chunks = first_bytes()
        waiting = asyncio.ensure_future(anext(chunks))
        exchange = await upstream.next()
        await exchange.answer(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for number in range(3):
            await exchange.answer(b"9\r\ndata: %d\n\n\r\n" % number)
            assert await waiting == b"data: %d\n\n" % number
            waiting = asyncio.ensure_future(anext(chunks, b"the end"))
        await exchange.answer(b"0\r\n\r\n")
        assert await waiting == b"the end"


async def test_client_that_goes_away_ends_the_stream_behind(served: Served, upstream: Upstream) -> None:
    """Else each closed tab would leave an open stream at the upstream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(b"GET /api/node-plugin/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    exchange = await upstream.next()
    await exchange.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
    assert b"hi" in await reader.readuntil(b"hi")
    writer.close()
    await writer.wait_closed()
    await exchange.closed()


async def test_streams_do_not_wait_for_each_other(served: Served, upstream: Upstream) -> None:
    """A pool of connections with a bound would be full of streams that never end."""
    async with AsyncExitStack() as stack:
        writers = []
        for _ in range(120):
            _, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writers.append(writer)
            stack.callback(writer.close)
            writer.write(b"GET /api/node-plugin/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for _ in range(120):
            await (await upstream.next()).answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        async with asking(served, upstream) as asked:
            assert (await asked.answered()).text == "ok"


async def test_compressed_body_passes_untouched(served: Served, upstream: Upstream) -> None:
    body = gzip.compress(b"hello " * 1000)
    async with client(served) as asker:
        task = asyncio.create_task(_raw_get(asker, {"accept-encoding": "gzip"}))
        exchange = await upstream.next()
        assert exchange.values("accept-encoding") == ["gzip"]
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
        await exchange.answer(head.encode() + body)
        headers, came = await task
        assert (headers["content-encoding"], headers["content-length"], came) == ("gzip", str(len(body)), body)


async def _raw_get(asker: httpx.AsyncClient, headers: dict[str, str]) -> tuple[httpx.Headers, bytes]:
    async with asker.stream("GET", "/x", headers=headers) as response:
        return response.headers, b"".join([chunk async for chunk in response.aiter_raw()])


@pytest.mark.parametrize("location", [b"/elsewhere", b"http://evil.example/", b"../x"])
async def test_redirect_is_passed_on_and_not_followed(served: Served, upstream: Upstream, location: bytes) -> None:
    async with asking(served, upstream) as asked:
        answer = await asked.answered(b"HTTP/1.1 302 F\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % location)
        assert (answer.status_code, answer.headers["location"]) == (302, location.decode())
    assert upstream.is_idle


# Faults.


async def test_service_that_is_down_is_told_with_502(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "relay.proxy"):
        async with proxied(f"http://user:hunter2@127.0.0.1:{free_port()}") as served, client(served) as asker:
            answers = [await asker.get("/x") for _ in range(3)]
    for answer in answers:
        assert answer.status_code == 502
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json() == {
            "title": "Bad Gateway",
            "status": 502,
            "detail": "/api/node-plugin: the service behind it does not answer",
        }
    lines = [record.getMessage() for record in caplog.records if record.name == "relay.proxy"]
    assert lines[0].startswith("request to /api/node-plugin failed: ")
    assert lines[1:] == ["2 similar messages suppressed (/api/node-plugin)"], "and not one line for each request"
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 20", b"nonsense\r\n\r\n"])
async def test_service_that_hangs_up_is_told_with_502(served: Served, upstream: Upstream, data: bytes) -> None:
    async with client(served) as asker:
        task = asyncio.create_task(asker.get("/x"))
        exchange = await upstream.next()
        await exchange.answer(data)
        exchange.close()
        assert (await task).status_code == 502


async def test_answer_that_breaks_off_breaks_off_for_the_client_too(
    served: Served, upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    """Half an answer must not look like a whole one."""
    async with client(served) as asker:
        task = asyncio.create_task(asker.get("/x"))
        exchange = await upstream.next()
        await exchange.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nha\r\n")
        exchange.close()
        with pytest.raises(httpx.RemoteProtocolError):
            await task
    assert "answer of /api/node-plugin broke off: " in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == [], "it is no fault of ours"


async def test_service_that_comes_back_is_found_again(upstream: Upstream) -> None:
    async with proxied(upstream.url) as served:
        async with asking(served, upstream) as asked:
            assert (await asked.answered()).text == "ok"
            asked.exchange.close()  # the connection that is kept for the next request
        async with asking(served, upstream) as asked:
            assert (await asked.answered()).text == "ok"


async def test_websocket_below_the_prefix_is_refused(served: Served) -> None:
    """The proxy carries HTTP; sockets are the relay's own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(
        b"GET /api/node-plugin/ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")
    writer.close()


# Its life.


def test_proxy_is_closed_with_the_relay_and_opens_again_in_another_loop() -> None:
    """Connections kept open belong to the loop that has ended; warnings are errors here."""
    port = free_port()
    proxies = [{"prefix": "/x", "target": f"http://127.0.0.1:{port}"}]
    relay = Relay(broadcast_url="memory://", system_topic=False, proxy=proxies)

    async def once() -> None:
        async with Upstream.start(port) as upstream, relay.lifespan():
            transport = httpx.ASGITransport(app=relay)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as asker:
                task = asyncio.create_task(asker.get("/x/y"))
                exchange = await upstream.next()
                await exchange.answer(OK)
                assert (await task).text == "ok"
            await relay.stop()
            await exchange.closed()

    asyncio.run(once())
    asyncio.run(once())


async def test_several_prefixes_each_have_their_target(upstream: Upstream) -> None:
    async with Upstream.start() as other:
        entries = [{"prefix": "/api/b/deep", "target": other.url}, {"prefix": "/api/b", "target": upstream.url}]
        relay = Relay(broadcast_url="memory://", system_topic=False, proxy=entries)
        async with serve(relay) as served:
            for path, answering in (("/api/b/deep/x", other), ("/api/b/x", upstream), ("/api/b/deeper/x", upstream)):
                async with asking(served, answering, target=path.encode()) as asked:
                    assert asked.exchange.target in ("/x", "/deeper/x")
                    await asked.answered()
            async with client(served) as asker:
                assert (await asker.get("/", extensions={"target": b"/api/topics"})).json() == []


async def test_stop_does_not_wait_for_an_idle_connection(upstream: Upstream) -> None:
    async with proxied(upstream.url) as served:
        async with asking(served, upstream) as asked:
            await asked.answered()
            exchange = asked.exchange
        await eventually(lambda: upstream.is_idle, "all requests to be answered")
    await exchange.closed()


# Clients that go, services that hang.


async def given_up(served: Served, upstream: Upstream, data: bytes = b"") -> Exchange:
    """A client that asks, and goes before it is answered."""
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    length = b"" if not data else b"Content-Length: 100000\r\n"
    method = b"POST" if data else b"GET"
    writer.write(method + b" /api/node-plugin/slow HTTP/1.1\r\nHost: localhost\r\n" + length + b"\r\n" + data)
    exchange = await upstream.next()
    writer.transport.abort()
    return exchange


@pytest.mark.parametrize("data", [b"", b"x" * 10], ids=["without a body", "while it uploads"])
async def test_client_that_goes_before_the_answer_ends_the_request_behind(
    served: Served, upstream: Upstream, data: bytes
) -> None:
    """Else a connection would stay for each, up to the last file descriptor."""
    for _ in range(20):
        exchange = await given_up(served, upstream, data)
        await (exchange.read_to_end() if data else exchange.closed())
    _, text = await http_get(served.http + "/metrics")
    assert metric(text, "relay_refused_total", kind="proxy", reason="client_gone") == 20


@pytest.mark.parametrize("of_all", [False, True])
async def test_more_requests_than_allowed_are_answered_503(upstream: Upstream, of_all: bool) -> None:
    """One that ends makes room for another."""
    entry: dict[str, Any] = {"prefix": "/api/node-plugin", "target": upstream.url}
    settings: dict[str, Any] = {"limits": {"proxied_max": 2}} if of_all else {}
    relay = Relay(broadcast_url="memory://", proxy=[entry if of_all else {**entry, "requests_max": 2}], **settings)
    async with serve(relay) as served, client(served) as asker:
        waiting = [asyncio.create_task(asker.get("/slow")) for _ in range(2)]
        exchanges = [await upstream.next() for _ in waiting]
        refused = await asker.get("/third")
        assert refused.status_code == 503 and "too many requests" in refused.json()["detail"]
        for exchange in exchanges:
            await exchange.answer_ok()
        assert [(await answer).status_code for answer in waiting] == [200, 200]
        further = asyncio.create_task(asker.get("/further"))
        await (await upstream.next()).answer_ok()
        assert (await further).status_code == 200
        _, text = await http_get(served.http + "/metrics")
        assert metric(text, "relay_refused_total", kind="proxy", reason="too_many_requests") == 1


async def test_service_that_does_not_answer_in_time_is_told_with_504(upstream: Upstream) -> None:
    """The time is one for the head: an answer's body, and an upload, may take longer."""
    limit_s = 0.3 * PATIENCE
    entry = {"prefix": "/api/node-plugin", "target": upstream.url, "head_timeout_s": limit_s}
    async with serve(Relay(broadcast_url="memory://", proxy=[entry])) as served, client(served) as asker:
        late = asyncio.create_task(asker.get("/slow"))
        exchange = await upstream.next()
        answer = await late
        assert answer.status_code == 504 and f"{limit_s:g} s" in answer.json()["detail"]
        await exchange.closed()

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(5):
                await asyncio.sleep(limit_s / 3)
                yield b"x"

        long = asyncio.create_task(asker.post("/upload", content=parts()))
        exchange = await upstream.next()
        for _ in range(6):
            await exchange.read_chunk()
        await exchange.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        for _ in range(5):
            await asyncio.sleep(limit_s / 3)
            await exchange.answer(b"y")
        assert (await long).content == b"yyyyy"
        _, text = await http_get(served.http + "/metrics")
        assert metric(text, "relay_refused_total", kind="proxy", reason="no_answer_in_time") == 1
