"""`relay.auth.api_key`: who may operate the relay."""

from typing import Any

import pytest

from relay import Config
from relay.auth.api_key import ApiKeyAuth, api_key_from
from relay.config_sections import AuthConfig, KeyConfig, MetricsConfig, RestConfig

KEYLESS = ApiKeyAuth(Config(), authenticates=False)
KEYED = ApiKeyAuth(Config(rest=RestConfig(api_key="sésame"), allow_anonymous=True), authenticates=True)


def scope(client: str | None = "127.0.0.1", **headers: str) -> dict[str, Any]:
    named = {"host": "localhost:8000", **headers}
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]
    return {"type": "http", "asgi": {}, "headers": pairs, "client": (client, 1234) if client else None}


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
    assert api_key_from(scope(**headers)) == key.encode()


@pytest.mark.parametrize("client", ["127.0.0.1", "192.168.1.9", None])
def test_with_a_key_it_alone_decides(client: str | None) -> None:
    assert KEYED.check(scope(client, origin="https://elsewhere.example"), "sésame".encode()) is None
    for wrong in (b"", b"sesame", "sésame ".encode()):
        fault = KEYED.check(scope(client), wrong)
        assert fault == (401, "expected the API key", wrong != b"")


def test_wrong_key_is_logged_with_its_address_and_without_itself(caplog: pytest.LogCaptureFixture) -> None:
    operators = ApiKeyAuth(Config(rest=RestConfig(api_key="sésame")), authenticates=False)
    for given in ("sésame", "", "a-guess", "another-guess"):
        _ = operators.authorize(scope("192.168.1.9"), given.encode(), "rest")
    _ = operators.authorize(scope(None), b"a-guess", "console")
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("relay.operators", "WARNING", "wrong API key refused (rest); address 192.168.1.9"),
        ("relay.operators", "WARNING", "wrong API key refused (console); address None"),
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
        ("127.0.0.1", {"host": "[::1]evil.example"}),
        ("testclient", {}),
        ("localhost", {}),
        ("::1%lo", {}),
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
        (Config(allowed_origins="any"), False),
        (Config(allowed_origins=("https://relay.example",)), False),
        (Config(host="0.0.0.0"), False),
        (Config(allow_anonymous=True), False),
        (Config(auth=AuthConfig(keys=(KeyConfig(key="k"),))), True),
        (Config(), True),
    ],
)
def test_without_a_key_nobody_may_where_others_are_let_in(config: Config, authenticates: bool) -> None:
    """A proxy on this machine that writes no header makes everybody look local."""
    fault = ApiKeyAuth(config, authenticates).check(scope(), b"")
    assert fault is not None
    assert fault.status == 403
    assert "set rest.api_key" in fault.text


def test_pages_of_this_machine_are_no_reason_for_a_key() -> None:
    config = Config(allowed_origins=("same", "http://localhost:5173", "//app.localhost", "http://127.0.0.1:3000"))
    assert ApiKeyAuth(config, authenticates=False).check(scope(), b"") is None


# Who sees the metrics.

OPEN: dict[str, Any] = {"allow_anonymous": True}


def metrics(*, authenticates: bool = False, api_key: str = "", **settings: Any) -> ApiKeyAuth:
    opened = {name: settings.pop(name) for name in list(settings) if name in Config.model_fields}
    config = Config(metrics=MetricsConfig(**settings), rest=RestConfig(api_key=api_key), **opened)
    return ApiKeyAuth(config, authenticates)


@pytest.mark.parametrize(
    "opened",
    [
        {"allow_anonymous": True},
        {"host": "0.0.0.0"},
        {"allowed_origins": "any"},
        {"allowed_origins": ("https://relay.example",)},
        {"trusted_proxies": ("10.0.0.1",)},
        {"authenticates": True},
    ],
)
def test_metrics_are_for_this_machine_or_a_key_where_others_are_let_in(opened: dict[str, Any]) -> None:
    assert metrics(**opened).admit_to_metrics(scope()) is None
    strangers = [
        scope("192.168.1.9"),
        scope(host="relay.example"),
        scope(host="10.1.2.3:8000"),
        scope(x_forwarded_for="127.0.0.1"),
        scope("testclient"),
        scope(None),
    ]
    for stranger in strangers:
        refused = metrics(**opened).admit_to_metrics(stranger)
        assert refused is not None and refused.status == 403
        assert "metrics.key" in refused.text and "metrics.public = true" in refused.text
        assert metrics(public=True, **opened).admit_to_metrics(stranger) is None


@pytest.mark.parametrize(
    ("settings", "given", "passes"),
    [
        ({"key": "m-key"}, "m-key", True),
        ({"key": "m-key", "api_key": "a-key"}, "m-key", True),
        ({"key": "m-key", "api_key": "a-key"}, "a-key", False),
        ({"api_key": "a-key"}, "a-key", True),
        ({"key": "m-key"}, "wrong", False),
        ({"key": "m-key"}, "", False),
        ({}, "", False),
    ],
)
def test_key_opens_the_metrics(settings: dict[str, Any], given: str, passes: bool) -> None:
    came = scope("192.168.1.9", host="relay.example", authorization=f"Bearer {given}")
    refused = metrics(**OPEN, **settings).admit_to_metrics(came)
    assert (refused is None) is passes
    if refused is not None and settings:
        assert refused.status == 401 and refused.is_wrong_key is bool(given)
        assert "metrics.key" in refused.text and "metrics.public = true" in refused.text


def test_metrics_of_a_relay_for_this_machine_alone_are_checked_by_name_alone() -> None:
    assert metrics().admit_to_metrics(scope()) is None
    assert metrics().admit_to_metrics(scope(host="10.1.2.3:8000")) is None
    assert metrics().admit_to_metrics(scope(host="evil.example")) is not None
    assert metrics().admit_to_metrics(scope(x_forwarded_for="1.2.3.4")) is not None


# Who learns why the relay is not ready.


def test_reasons_are_for_this_machine_or_the_api_key() -> None:
    operators = metrics(**OPEN, api_key="a-key")
    assert operators.may_know_reasons(scope())
    assert operators.may_know_reasons(scope("192.168.1.9", host="x.example", authorization="Bearer a-key"))
    for stranger in (
        scope("192.168.1.9"),
        scope(host="evil.example"),
        scope(host="10.1.2.3:8000"),
        scope(x_forwarded_for="1.2.3.4"),
        scope(origin="https://evil.example"),
        scope("192.168.1.9", authorization="Bearer wrong"),
    ):
        assert not operators.may_know_reasons(stranger)
