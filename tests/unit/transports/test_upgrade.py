"""`relay.transports.upgrade`: which requests need no second parser."""

import random

import pytest
from websockets.http11 import Request
from websockets.server import ServerProtocol

from relay.transports.upgrade import RawHeaders, accept_plain, switching_protocols

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""Source: RFC 6455, section 1.3."""
TARGET = b"/socket/websocket?vsn=2.0.0"
PLAIN = (
    (b"host", b"127.0.0.1:8000"),
    (b"upgrade", b"websocket"),
    (b"connection", b"Upgrade"),
    (b"sec-websocket-version", b"13"),
    (b"sec-websocket-key", KEY),
)


def accepts(*headers: tuple[bytes, bytes], target: bytes = TARGET, negotiates: bool = False) -> bool:
    return accept_plain(target, headers, negotiates) is not None


def without(name: bytes) -> list[tuple[bytes, bytes]]:
    return [header for header in PLAIN if header[0] != name]


def test_key_is_answered_as_the_standard_says() -> None:
    assert accept_plain(TARGET, PLAIN, negotiates=True) == ACCEPT


@pytest.mark.parametrize("connection", [b"Upgrade", b"upgrade", b"keep-alive, Upgrade", b"Upgrade, Keep-Alive"])
@pytest.mark.parametrize("protocol", [b"phoenix", b"phoenix, base64url.bearer.phx.YWJj", b"a,b"])
def test_what_browsers_send_is_plain(connection: bytes, protocol: bytes) -> None:
    further = ((b"sec-websocket-protocol", protocol), (b"origin", b"http://localhost"), (b"cookie", b"a=b; c=\xe4"))
    assert accepts(*without(b"connection"), (b"connection", connection), *further)


@pytest.mark.parametrize(
    "odd",
    [
        [*PLAIN, (b"sec-websocket-key", KEY)],
        [*PLAIN, (b"upgrade", b"websocket")],
        [*PLAIN, (b"origin", b"a"), (b"origin", b"b")],
        [*PLAIN, (b"sec-websocket-protocol", b"a"), (b"sec-websocket-protocol", b"b")],
        [*PLAIN, (b"sec-websocket-protocol", b"")],
        [*PLAIN, (b"sec-websocket-protocol", b"a,,b")],
        [*PLAIN, (b"sec-websocket-protocol", b"a b")],
        [*PLAIN, (b"content-length", b"0")],
        [*PLAIN, (b"transfer-encoding", b"identity")],
        [*PLAIN, (b"x", b"y" * 5000)],
        [*PLAIN, *((b"x", b"y") for _ in range(100))],
        [*without(b"upgrade"), (b"upgrade", b"websocket, h2c")],
        [*without(b"connection"), (b"connection", b"Upgrade,")],
        [*without(b"sec-websocket-version"), (b"sec-websocket-version", b"8")],
        *(
            [*without(b"sec-websocket-key"), (b"sec-websocket-key", key)]
            for key in (b"", b"x" * 24, KEY[:-4], b" " + KEY)
        ),
        *(without(name) for name, _ in PLAIN[1:]),
    ],
)
def test_anything_odd_is_left_to_websockets(odd: RawHeaders) -> None:
    assert not accepts(*odd)


def test_long_and_non_ascii_targets_are_left_to_websockets() -> None:
    assert not accepts(*PLAIN, target=b"/" + b"x" * 5000)
    assert not accepts(*PLAIN, target=b"/\xe4")


def test_extensions_are_negotiated_by_websockets_where_there_are_any() -> None:
    offered = (b"sec-websocket-extensions", b"permessage-deflate; client_max_window_bits")
    assert accepts(*PLAIN, offered, negotiates=False)
    assert not accepts(*PLAIN, offered, negotiates=True)


def test_what_is_plain_is_accepted_by_websockets_with_the_same_answer() -> None:
    """Heads with parts that are left out, repeated and changed."""
    generator = random.Random(1)
    values = (
        b"",
        b"websocket",
        b"Upgrade",
        b"keep-alive, Upgrade",
        b"13",
        KEY,
        b"a,b",
        b"a, b",
        b"x y",
        b"\xe4",
        b"1=",
    )
    plain = 0
    for _ in range(5000):
        headers = [(name, generator.choice(values) if generator.random() < 0.1 else value) for name, value in PLAIN]
        headers += [(b"sec-websocket-protocol", generator.choice(values)) for _ in range(generator.randrange(3))]
        headers += [(b"origin", generator.choice(values)) for _ in range(generator.randrange(2))]
        if generator.random() < 0.1:
            headers.pop(generator.randrange(len(headers)))
        accept = accept_plain(TARGET, headers, negotiates=False)
        if accept is not None:
            plain += 1
            assert accept == accepted_by_websockets(headers), headers
    assert plain > 500


def accepted_by_websockets(headers: RawHeaders) -> bytes:
    protocol = ServerProtocol()
    protocol.receive_data(
        b"GET %b HTTP/1.1\r\n" % TARGET + b"".join(b"%b: %b\r\n" % each for each in headers) + b"\r\n"
    )
    (request,) = protocol.events_received()
    assert isinstance(request, Request)
    response = protocol.accept(request)
    assert response.status_code == 101, response.body
    return response.headers["Sec-WebSocket-Accept"].encode()


def test_answer_has_the_headers_of_server_and_application() -> None:
    answer = switching_protocols(ACCEPT, [(b"server", b"uvicorn"), (b"set-cookie", b"a=b")], "phoenix")
    assert answer == (
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-accept: "
        + ACCEPT
        + b"\r\nserver: uvicorn\r\nset-cookie: a=b\r\nsec-websocket-protocol: phoenix\r\n\r\n"
    )
    assert b"protocol" not in switching_protocols(ACCEPT, [], None)
