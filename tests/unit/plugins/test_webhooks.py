"""`relay.plugins.webhooks` and what belongs to it: settings, secrets, signatures, the breaker; without connections."""

import base64
from typing import Any

import pytest
from pydantic import ValidationError

from relay.config import Config
from relay.config_sources import explain
from relay.config_webhooks import WebhookConfig
from relay.errors import ConfigError
from relay.plugins import webhook_client
from relay.plugins.builtins import builtin_plugins
from relay.plugins.hooks import Join
from relay.plugins.loader import load_plugins
from relay.plugins.webhook_client import Breaker
from relay.plugins.webhook_signature import read_secret, signature
from relay.plugins.webhooks import make_plugin
from relay.telemetry import Telemetry

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def hook(**changes: Any) -> dict[str, Any]:
    return {"match": "room:*", "on": ["join"], "url": "https://app.example/relay", "secrets": [SECRET], **changes}


# Signatures.


def test_signature_is_that_of_the_specification() -> None:
    """The example of the specification's reference libraries, with the secret that they use."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    expected = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signature((key,), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == expected
    two = signature((key, b"x" * 32), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert two.split(" ")[0] == expected and len(two.split(" ")) == 2


def test_secret_is_base64_or_text_or_a_file(tmp_path: Any) -> None:
    assert read_secret(SECRET) == bytes(range(32))
    assert read_secret("é" * 16) == ("é" * 16).encode()
    file = tmp_path / "secret"
    for text in (SECRET, f"{SECRET}\n", f"\ufeff{SECRET}\r\n"):
        file.write_text(text, encoding="utf-8")
        assert read_secret(f"file:{file}") == bytes(range(32))


@pytest.mark.parametrize(
    ("secret", "word"),
    [
        ("x" * 31, "32 bytes at least, got 31"),
        ("whsec_" + base64.b64encode(b"x" * 31).decode(), "32 bytes at least, got 31"),
        ("whsec_" + "x" * 41, "expected base64"),
        ("whsec_é" + "x" * 40, "expected base64"),
        ("", "got 0"),
        ("file:/no/such/file", "No such file"),
        ("file:/", "Is a directory"),
        ("file:\0", "cannot be read"),
    ],
)
def test_weak_or_unreadable_secret_stops_the_start_and_is_not_repeated(secret: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as raised:
        make_plugin((WebhookConfig(**hook(secrets=[SECRET, secret])),), Telemetry())
    assert "webhooks.0.secrets" in str(raised.value) and "xxxx" not in str(raised.value)


@pytest.mark.parametrize("changes", [{"match": "room:{id}"}, {"on": ["push"], "events": ["a:b"]}], ids=str)
def test_pattern_that_cannot_match_stops_the_start(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"webhooks\.0: on_\w+: .*write"):
        make_plugin((WebhookConfig(**hook(**changes)),), Telemetry())


# Settings.


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"url": "http://app.example/relay"}, "expected https://"),
        ({"url": "http://10.0.0.1/"}, "expected https://"),
        ({"url": "ftp://app.example"}, "expected https://"),
        ({"url": "https://"}, "with a host"),
        ({"url": "app.example"}, "expected https://"),
        ({"secrets": []}, "at least 1"),
        ({"on": []}, "at least 1"),
        ({"on": ["event"]}, "'join', 'push' or 'leave'"),
        ({"events": ["a"]}, "events is for"),
        ({"on_failure": "ignore"}, "'refuse' or 'allow'"),
        ({"timeout_s": 0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        WebhookConfig(**hook(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"url": "http://127.0.0.1:8001/"},
        {"url": "http://localhost/"},
        {"url": "http://[::1]:80/"},
        {"url": "http://app.internal/", "insecure": True},
        {"on": ["push"], "events": ["new_*"]},
        {"secrets": SECRET},
    ],
)
def test_settings_that_make_sense_are_taken(changes: dict[str, Any]) -> None:
    assert WebhookConfig(**hook(**changes)).label == "room:*"


def test_webhooks_have_names_of_their_own_and_less_time_than_plugins() -> None:
    with pytest.raises(ValidationError, match=r"webhooks\.1: there is another one called 'room:\*'; set name"):
        Config(webhooks=(hook(), hook(on=["leave"])))
    assert len(Config(webhooks=(hook(), hook(name="second"))).webhooks) == 2
    with pytest.raises(ValidationError, match=r"expected timeout_s below plugins.timeout_s = 10"):
        Config(webhooks=(hook(timeout_s=10.0),))


def test_secrets_are_shown_nowhere() -> None:
    config = Config(webhooks=(hook(url="https://ada:hunter2@app.example/?key=hunter2"),))
    assert SECRET not in repr(config) and "hunter2" not in repr(config)
    values: dict[str, Any] = {"webhooks": [hook(secrets=[5, SECRET], url="http://ada:hunter2@app.example")]}
    with pytest.raises(ValidationError) as raised:
        Config(**values)
    told = "\n".join(explain(raised.value, [("file", values)]))
    assert "webhooks.0.secrets.0" in told and SECRET not in told and "hunter2" not in told


# The plugin.


def test_webhooks_come_behind_all_other_plugins_and_say_where_they_ask() -> None:
    config = Config(
        webhooks=(hook(on=["join", "push", "leave"], events=["a", "b"], url="https://me:pw@app.example/secret"),)
    )
    first, last = builtin_plugins(config, Telemetry())
    found = load_plugins(config.plugins, first, last)
    assert [each.name for each in found.found] == ["system", "webhooks"]
    assert found.found[-1].registers() == [
        "on_startup → https://app.example",
        "on_join room:* → https://app.example",
        "on_push room:* a → https://app.example",
        "on_push room:* b → https://app.example",
        "on_leave room:* → https://app.example",
        "on_shutdown → https://app.example",
    ]
    assert builtin_plugins(Config(system_topic=False), Telemetry()) == ((), ())


def test_meta_of_a_join_needs_a_relay() -> None:
    with pytest.raises(Exception, match="expected an object that relay has given to a handler"):
        Join(None, "t", b"").set_presence({})  # type: ignore[arg-type]  # of a test


# The breaker.


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_breaker_opens_after_failures_in_a_row_and_tries_one_request() -> None:
    changes: list[bool] = []
    clock = Clock()
    breaker = Breaker(clock, changes.append)
    for _ in range(9):
        assert breaker.allows()
        breaker.failed()
    breaker.succeeded()
    for _ in range(9):
        breaker.failed()
    assert breaker.allows() and changes == []
    breaker.failed()
    assert breaker.is_open and not breaker.allows() and changes == [True]
    breaker.failed()  # of those that were under way
    clock.now = webhook_client._OPEN_S - 0.1
    assert not breaker.allows()
    clock.now = webhook_client._OPEN_S
    assert breaker.allows() and not breaker.allows() and not breaker.allows()
    breaker.failed()
    assert not breaker.allows() and changes == [True]
    clock.now += webhook_client._OPEN_S
    assert breaker.allows()
    breaker.gave_up()
    assert breaker.allows(), "the one that was tried was given up, so another is"
    breaker.succeeded()
    assert breaker.allows() and breaker.allows() and not breaker.is_open and changes == [True, False]
    for _ in range(10):
        breaker.failed()
    assert changes == [True, False, True]
