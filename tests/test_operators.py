"""`relay.operators`: who may operate the relay."""

from typing import Any

import pytest

from relay import Config, operators
from relay.web_config import RestConfig

KEYLESS = Config()
KEYED = Config(rest=RestConfig(api_key="sésame"))


def scope(client: str | None = "127.0.0.1", **headers: str) -> dict[str, Any]:
    named = {"host": "localhost:8000", **headers}
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
    return {"headers": pairs, "client": (client, 1234) if client else None}


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer sésame"}, "sésame"),
        ({"authorization": "bearer sésame"}, "sésame"),
        ({"x_api_key": "sésame"}, "sésame"),
        ({"authorization": "Basic abc", "x_api_key": "k"}, "k"),
        ({"authorization": "Basic abc"}, ""),
        ({}, ""),
    ],
)
def test_key_is_found_in_two_headers(headers: dict[str, str], key: str) -> None:
    assert operators.key_in(scope(**headers)) == key.encode()


@pytest.mark.parametrize("client", ["127.0.0.1", "192.168.1.9", None])
def test_with_a_key_it_alone_decides(client: str | None) -> None:
    assert operators.check(scope(client, origin="https://elsewhere.example"), "sésame".encode(), KEYED) is None
    for wrong in (b"", b"sesame", "sésame ".encode()):
        fault = operators.check(scope(client), wrong, KEYED)
        assert fault == (401, "expected the API key")


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        ("127.0.0.1", {}),
        ("::1", {"host": "[::1]:8000"}),
        ("127.0.0.1", {"origin": "http://localhost:8000"}),
        ("127.8.8.8", {"host": "127.0.0.1"}),
    ],
)
def test_without_a_key_this_machine_may(client: str, headers: dict[str, str]) -> None:
    assert operators.check(scope(client, **headers), b"", KEYLESS) is None


@pytest.mark.parametrize(
    ("client", "headers"),
    [
        ("192.168.1.9", {}),
        (None, {}),
        ("127.0.0.1", {"host": "relay.example"}),  # DNS rebinding
        ("127.0.0.1", {"host": "[::1"}),
        *(("127.0.0.1", {"host": f"localhost{mark}evil.example"}) for mark in "/#?\\ \t"),
        ("127.0.0.1", {"host": "evil.example@localhost"}),
        ("127.0.0.1", {"x_forwarded_for": "1.2.3.4"}),
        ("127.0.0.1", {"forwarded": "for=1.2.3.4"}),
        ("127.0.0.1", {"x_real_ip": "1.2.3.4"}),
        ("127.0.0.1", {"via": "1.1 proxy"}),
        ("127.0.0.1", {"x_forwarded_host": "relay.example"}),
        ("127.0.0.1", {"x_forwarded_proto": "https"}),
        ("127.0.0.1", {"cf_connecting_ip": "1.2.3.4"}),
        ("127.0.0.1", {"origin": "https://elsewhere.example"}),
        ("127.0.0.1", {"origin": "http://localhost:9999"}),
        ("127.0.0.1", {"origin": "null"}),
    ],
)
def test_without_a_key_nobody_else_may(client: str | None, headers: dict[str, str]) -> None:
    """Nor a page of theirs, in a browser on this machine; whatever they send for a key."""
    for given in (b"", b"key"):
        fault = operators.check(scope(client, **headers), given, KEYLESS)
        assert fault is not None
        assert fault.status == 403


@pytest.mark.parametrize(
    "config", [Config(trusted_proxies=("10.0.0.1",)), Config(origins="any"), Config(origins=("https://relay.example",))]
)
def test_without_a_key_nobody_may_where_others_are_expected(config: Config) -> None:
    """A proxy on this machine that writes no header makes everybody look local."""
    fault = operators.check(scope(), b"", config)
    assert fault is not None
    assert fault.status == 403
    assert "set rest.api_key" in fault.text
