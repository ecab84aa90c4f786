"""Upgrade requests in unusual but legal forms are accepted, and what is wrong with the others is said."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from relay import Relay
from relay.transports.uvicorn_http import RelayHTTPProtocol
from tests.support.client import TEXT, client_frame
from tests.support.process import Valkey
from tests.support.serving import Served, eventually, http_get, metric, serve

TARGET = "/socket/websocket?vsn=2.0.0"
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
VERSION = "Sec-WebSocket-Version: 13"
LINES = ("Host: {host}", "Upgrade: websocket", "Connection: Upgrade", VERSION, KEY)


@asynccontextmanager
async def served(valkey: Valkey, **options: Any) -> AsyncIterator[Served]:
    http = partial(RelayHTTPProtocol, handshake_timeout_s=30.0)
    async with serve(Relay(redis_url=valkey.url, system_topic=False), http=http, **options) as one:
        yield one


async def ask(port: int, *lines: str, first: str = f"GET {TARGET} HTTP/1.1", then: bytes = b"") -> tuple[str, bytes]:
    """Send a request; returns the answer's head and, of a refusal, its body; of a socket, the answer to a join."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    host = f"127.0.0.1:{port}"
    head = "".join(f"{line}\r\n" for line in (first, *lines, "")).replace("{host}", host)
    try:
        async with asyncio.timeout(20):
            writer.write(head.encode("latin-1") + then)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            if answer.startswith("HTTP/1.1 101 "):
                writer.write(client_frame(TEXT, b'["1","1","room:1","phx_join",{}]'))
                return answer, await reader.readuntil(b"phx_reply")
            length = int(answer.lower().partition("content-length:")[2].split()[0])
            return answer, await reader.readexactly(length)
    finally:
        writer.close()


def but(*others: str) -> tuple[str, ...]:
    """The usual lines, with those of the same names replaced."""
    names = {other.partition(":")[0].lower() for other in others}
    return (*(line for line in LINES if line.partition(":")[0].lower() not in names), *filter(None, others))


@pytest.mark.parametrize(
    "lines",
    [
        but("Connection: keep-alive", "Connection: Upgrade"),
        but("Connection: Upgrade", "Connection: keep-alive"),
        but("Connection: keep-alive, ,\tUPGRADE ,"),
        but("connection:upgrade"),
        but("Upgrade: WebSocket"),
        but("Upgrade:\twebsocket \t"),
        but("Upgrade: h2c, websocket"),
        but("Upgrade: websocket", "Upgrade: h2c"),
        but("Upgrade: ,websocket"),
        but("Content-Length: 0"),
        but("SEC-WEBSOCKET-VERSION:13", "sec-websocket-key:dGhlIHNhbXBsZSBub25jZQ=="),
        but("Sec-WebSocket-Protocol:"),
        but("Sec-WebSocket-Protocol: ,phoenix"),
        but("Sec-WebSocket-Protocol: phoenix", "Sec-WebSocket-Protocol: base64url.bearer.phx.YQ"),
        but("Sec-WebSocket-Protocol: base64url.bearer.phx.YQ,", "Sec-WebSocket-Protocol: ,phoenix"),
        but("Sec-WebSocket-Extensions: permessage-deflate", "Sec-WebSocket-Extensions: x-unknown; a=b"),
        but('Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits="15"'),
        but("Sec-WebSocket-Extensions: , permessage-deflate ;\tclient_max_window_bits ,"),
        but("Sec-WebSocket-Extensions:"),
        but("X-Text: \xe9", "X-Empty:"),
        but("Expect: 100-continue"),
    ],
    ids=lambda lines: "; ".join(line for line in lines if line not in LINES) or "usual",
)
async def test_unusual_lines_are_accepted(valkey: Valkey, lines: tuple[str, ...]) -> None:
    async with served(valkey) as relay:
        answer, body = await ask(relay.port, *lines)
        assert answer.startswith("HTTP/1.1 101 "), (answer, body)


@pytest.mark.parametrize(
    "target",
    [
        "http://{host}/socket/websocket?vsn=2.0.0",
        "ws://{host}/socket/websocket?vsn=2.0.0",
        "HTTP://{host}/socket/websocket?vsn=2.0.0",
        "/%73ocket/websocket?vsn=2.0.0",
        "/socket/websocket?vsn=2.0.0&x=%ff",
    ],
)
async def test_forms_of_the_target_are_accepted(valkey: Valkey, target: str) -> None:
    async with served(valkey) as relay:
        answer, body = await ask(relay.port, *LINES, first=f"GET {target} HTTP/1.1")
        assert answer.startswith("HTTP/1.1 101 "), (answer, body)


async def test_host_of_an_absolute_target_goes_before_the_header(valkey: Valkey) -> None:
    """RFC 9112, section 3.2.2: the header is ignored."""
    async with served(valkey) as relay:
        lines = but("Host: elsewhere.example")
        answer, body = await ask(relay.port, *lines, first="GET http://{host}/socket/websocket?vsn=2.0.0 HTTP/1.1")
        assert answer.startswith("HTTP/1.1 101 "), (answer, body)
        answer, body = await ask(relay.port, *LINES, first="GET http://elsewhere.example/socket/websocket HTTP/1.1")
        assert answer.startswith("HTTP/1.1 403 "), (answer, body)
        answer, body = await ask(relay.port, "Host: {host}", first="GET http://{host} HTTP/1.1")
        assert answer.startswith("HTTP/1.1 200 "), (answer, body)


@pytest.mark.parametrize("version", ["12", "8", "14", "13, 8", ""])
async def test_other_versions_are_told_the_one_that_is_spoken(valkey: Valkey, version: str) -> None:
    """RFC 6455, section 4.4."""
    async with served(valkey) as relay:
        answer, body = await ask(relay.port, *but(f"Sec-WebSocket-Version: {version}" if version else ""), *())
        if not version:
            lines = tuple(line for line in LINES if line != VERSION)
            answer, body = await ask(relay.port, *lines)
        assert answer.startswith("HTTP/1.1 426 "), answer
        assert "Sec-WebSocket-Version: 13\r\n" in answer
        assert b"Sec-WebSocket-Version: 13" in body
        _, text = await http_get(f"{relay.http}/metrics")
        assert metric(text, "relay_refused_total", kind="handshake", reason="websocket_version") >= 1


@pytest.mark.parametrize(
    ("first", "lines", "then", "status", "word"),
    [
        ("GET", but("Content-Length: 5"), b"hello", 426, b"body"),
        ("GET", but("Transfer-Encoding: chunked"), b"5\r\nhello\r\n0\r\n\r\n", 426, b"body"),
        ("POST", but("Content-Length: 0"), b"", 426, b"GET"),
        ("GET", but("Sec-WebSocket-Key: short"), b"", 400, b"Sec-WebSocket-Key"),
        ("GET", tuple(line for line in LINES if line != KEY), b"", 400, b"Sec-WebSocket-Key"),
        ("GET", (*LINES, KEY), b"", 400, b"Sec-WebSocket-Key"),
        ("GET", but("Sec-WebSocket-Extensions: permessage-deflate; ;="), b"", 400, b"Sec-WebSocket-Extensions"),
        ("GET", tuple(line for line in LINES if not line.startswith("Connection")), b"", 426, b"Connection"),
        ("GET", tuple(line for line in LINES if not line.startswith("Upgrade")), b"", 426, b"Upgrade"),
        ("GET", ("Host: {host}",), b"", 426, b"WebSocket"),
    ],
)
async def test_refusal_names_the_cause(
    valkey: Valkey, first: str, lines: tuple[str, ...], then: bytes, status: int, word: bytes
) -> None:
    async with served(valkey) as relay:
        answer, body = await ask(relay.port, *lines, first=f"{first} {TARGET} HTTP/1.1", then=then)
        assert answer.startswith(f"HTTP/1.1 {status} "), (answer, body)
        assert word in body and b"8 KiB" not in body


async def test_upgrade_by_http_1_0_is_told_what_the_proxy_lacks(valkey: Valkey) -> None:
    """nginx speaks HTTP/1.0 unless it is told otherwise."""
    async with served(valkey) as relay:
        answer, body = await ask(relay.port, *LINES, first=f"GET {TARGET} HTTP/1.0")
        assert answer.split()[1] == "426" and b"HTTP/1.0" in body, (answer, body)


async def test_other_upgrades_are_ignored_and_the_connection_goes_on(valkey: Valkey) -> None:
    """RFC 9110, section 7.8: curl --http2 asks for h2c."""
    async with served(valkey) as relay:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        request = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{relay.port}\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        writer.write(f"{request}Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n".encode() * 2)
        async with asyncio.timeout(20):
            for _ in range(2):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                await reader.readuntil(b"}")
            writer.write(f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{relay.port}\r\n\r\n".encode())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_of_a_request_that_asks_for_another_upgrade_arrives(valkey: Valkey, chunked: bool) -> None:
    """Java's HTTP client asks for h2c with each first request, whatever its method."""
    async with served(valkey) as relay:
        body = b'{"topic": "room:1", "event": "new_msg", "payload": {"text": "' + b"x" * 10_000 + b'"}}'
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
        sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
        lines = ("Host: {host}", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
        first = "POST /api/publish HTTP/1.1"
        answer, text = await ask(relay.port, *lines, "Content-Type: application/json", length, first=first, then=sent)
        assert answer.startswith("HTTP/1.1 20"), (answer, text)


async def test_upgrade_behind_another_request_waits_for_its_answer(valkey: Valkey) -> None:
    async with served(valkey) as relay:
        reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
        host = f"Host: 127.0.0.1:{relay.port}\r\n"
        upgrade = "".join(f"{line}\r\n" for line in (f"GET {TARGET} HTTP/1.1", *LINES[1:])) + host + "\r\n"
        writer.write(f"GET /health HTTP/1.1\r\n{host}\r\nGET /health HTTP/1.1\r\n{host}\r\n{upgrade}".encode())
        async with asyncio.timeout(20):
            for _ in range(2):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                await reader.readuntil(b"}")
            await reader.readuntil(b"HTTP/1.1 101 Switching Protocols\r\n")
        writer.close()


@pytest.mark.parametrize("early_bytes", [0, 20_000])
async def test_what_arrives_while_an_upgrade_waits_is_kept_up_to_a_bound(valkey: Valkey, early_bytes: int) -> None:
    """The request before it may ask for more of its body, or for its client's end, which reads on."""
    read, answer_now = bytearray(), asyncio.Event()

    class Http(RelayHTTPProtocol):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            read.extend(data)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            lost.set()

    lost = asyncio.Event()
    relay = Relay(redis_url=valkey.url, system_topic=False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != "/slow":
            await relay(scope, receive, send)
            return
        await receive()
        end = asyncio.create_task(receive())
        await answer_now.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        await end

    async with serve(relay, app=app, http=Http) as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        host = f"Host: 127.0.0.1:{one.port}\r\n"
        upgrade = "".join(f"{line}\r\n" for line in (f"GET {TARGET} HTTP/1.1", *LINES[1:])) + host + "\r\n"
        sent = f"GET /slow HTTP/1.1\r\n{host}\r\n{upgrade}".encode()
        writer.write(sent)
        await eventually(lambda: len(read) == len(sent), "the upgrade request to be read")
        early = bytes(early_bytes) or client_frame(TEXT, b'["1","1","room:1","phx_join",{}]')
        try:
            async with asyncio.timeout(20):
                writer.write(early)
                await eventually(lambda: len(read) == len(sent + early) or lost.is_set(), "the bytes to be read")
                if early_bytes:
                    await lost.wait()
                    assert await reader.read() == b""
                    return
                answer_now.set()
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                await reader.readuntil(b"okHTTP/1.1 101 Switching Protocols\r\n")
                await reader.readuntil(b'"phx_reply",{"status":"ok"')
        finally:
            answer_now.set()
            writer.close()
