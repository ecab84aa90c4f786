"""`relay.cli.connection`: the addresses of a running relay."""

import asyncio
from pathlib import Path

import pytest

from relay import Config, ConfigError
from relay.cli.connection import Lost, ask_rest, base_url, connected, rest_url, socket_url
from relay.cli.output import Failed
from tests.support.faults import Authority
from tests.support.servers import bad_gateway

SETTINGS = Config(port=9000, socket_paths=("/socket", "/live"))


@pytest.mark.parametrize(
    ("url", "socket", "rest"),
    [
        (None, "ws://127.0.0.1:9000/socket", "http://127.0.0.1:9000/api"),
        ("http://localhost:8000", "ws://localhost:8000/socket", "http://localhost:8000/api"),
        ("http://localhost:8000/", "ws://localhost:8000/socket", "http://localhost:8000/api"),
        ("https://example.org/relay", "wss://example.org/relay/socket", "https://example.org/relay/api"),
        ("https://example.org/relay/api/", "wss://example.org/relay/socket", "https://example.org/relay/api"),
        ("https://example.org/relay/live", "wss://example.org/relay/live", "https://example.org/relay/api"),
        ("wss://example.org/relay/socket", "wss://example.org/relay/socket", "https://example.org/relay/api"),
        ("wss://example.org", "wss://example.org/socket", "https://example.org/api"),
        ("ws://example.org/elsewhere", "ws://example.org/elsewhere", "http://example.org/elsewhere/api"),
        ("http://localhost:8000/x/", "ws://localhost:8000/x/socket", "http://localhost:8000/x/api"),
        ("http://[::1]:8000", "ws://[::1]:8000/socket", "http://[::1]:8000/api"),
    ],
)
def test_socket_and_rest_interface_are_found_from_one_address(url: str | None, socket: str, rest: str) -> None:
    assert socket_url(SETTINGS, url) == f"{socket}/websocket?vsn=2.0.0"
    assert rest_url(SETTINGS, url) == rest


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x", "http://", "http://x:y", "ws://x:y/socket", "http://x/?a=b", "http://x/#a"]
    + ["http://.example.org", f"http://{'x' * 64}.org", "http://x/\udcff"],
)
def test_address_that_is_none_is_refused(url: str) -> None:
    for use in (base_url, socket_url):
        with pytest.raises(ConfigError, match=r"--url: expected http\(s\)://host\[:port\]"):
            use(SETTINGS, url)


def test_socket_at_the_root_has_no_second_slash() -> None:
    settings = Config(socket_paths=("/",))
    assert socket_url(settings, "https://example.org/") == "wss://example.org/websocket?vsn=2.0.0"


async def test_page_of_a_proxy_is_not_repeated_in_the_error() -> None:
    async with await asyncio.start_server(bad_gateway, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/socket"
        with pytest.raises(Lost, match="^ws://[0-9.:]+/socket: HTTP 502: Bad Gateway$"):
            async with connected(url, None):
                pytest.fail("connected")


async def test_certificate_that_is_not_trusted_is_an_error_with_what_helps(tmp_path: Path) -> None:
    helps = (
        "self-signed certificate in certificate chain; SSL_CERT_FILE can name|unable to get local issuer.*; SSL_CERT"
    )
    context = Authority(tmp_path).context()
    async with await asyncio.start_server(bad_gateway, "127.0.0.1", 0, ssl=context) as server:
        place = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(Lost, match=helps):
            async with connected(f"wss://{place}/socket", None):
                pytest.fail("connected")
        with pytest.raises(Failed, match=helps):
            await asyncio.to_thread(ask_rest, Config(), f"https://{place}/api", "/topics")
