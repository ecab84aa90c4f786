"""`relay.cli.connection`: the addresses of a running relay."""

import pytest

from relay import Config, ConfigError
from relay.cli.connection import base_url, rest_url, socket_url

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
    "url", ["localhost:8000", "ftp://x", "http://", "http://x:y", "ws://x:y/socket", "http://x/?a=b"]
)
def test_address_that_is_none_is_refused(url: str) -> None:
    for use in (base_url, socket_url):
        with pytest.raises(ConfigError, match=r"--url: expected http\(s\)://host\[:port\]"):
            use(SETTINGS, url)


def test_socket_at_the_root_has_no_second_slash() -> None:
    settings = Config(socket_paths=("/",))
    assert socket_url(settings, "https://example.org/") == "wss://example.org/websocket?vsn=2.0.0"
