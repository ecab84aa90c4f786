"""`relay.operators`: who may operate the relay."""

from typing import Any

import pytest

from relay import Config
from relay.auth_config import AuthConfig, KeyConfig
from relay.operators import Operators, key_in
from relay.web_config import RestConfig

KEYLESS = Operators(Config(), authenticates=False)
KEYED = Operators(Config(rest=RestConfig(api_key="sésame"), anonymous=True), authenticates=True)


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
    assert key_in(scope(**headers)) == key.encode()


@pytest.mark.parametrize("client", ["127.0.0.1", "192.168.1.9", None])
def test_with_a_key_it_alone_decides(client: str | None) -> None:
    assert KEYED.check(scope(client, origin="https://elsewhere.example"), "sésame".encode()) is None
    for wrong in (b"", b"sesame", "sésame ".encode()):
        fault = KEYED.check(scope(client), wrong)
        assert fault == (401, "expected the API key", wrong != b"")


def test_wrong_key_is_logged_with_its_address_and_without_itself(caplog: pytest.LogCaptureFixture) -> None:
    operators = Operators(Config(rest=RestConfig(api_key="sésame")), authenticates=False)
    for given in ("sésame", "", "a-guess", "another-guess"):
        _ = operators.admit(scope("192.168.1.9"), given.encode(), "rest")
    _ = operators.admit(scope(None), b"a-guess", "console")
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("relay.operators", "WARNING", "rest: refused a wrong API key; address 192.168.1.9"),
        ("relay.operators", "WARNING", "console: refused a wrong API key; address None"),
    ]


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
    assert KEYLESS.check(scope(client, **headers), b"") is None


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
        fault = KEYLESS.check(scope(client, **headers), given)
        assert fault is not None
        assert fault.status == 403


@pytest.mark.parametrize(
    ("config", "authenticates"),
    [
        (Config(trusted_proxies=("10.0.0.1",)), False),
        (Config(origins="any"), False),
        (Config(origins=("https://relay.example",)), False),
        (Config(host="0.0.0.0"), False),
        (Config(anonymous=True), False),
        (Config(auth=AuthConfig(keys=(KeyConfig(key="k"),))), True),
        (Config(), True),
    ],
)
def test_without_a_key_nobody_may_where_others_are_let_in(config: Config, authenticates: bool) -> None:
    """A proxy on this machine that writes no header makes everybody look local."""
    fault = Operators(config, authenticates).check(scope(), b"")
    assert fault is not None
    assert fault.status == 403
    assert "set rest.api_key" in fault.text
