"""`relay.service_links`: variables that Kubernetes and Docker set, and that only look like settings."""

import os

import pytest

from relay import Relay
from relay.config import Config
from relay.config_sources import load
from relay.service_links import service_links
from tests.support.settings import Write, problems

ALL_SETTINGS = "`relay config` lists all of them"

KUBERNETES = {
    # A Service named `relay` with one port, and with two named ones; IPv6.
    "relay": {
        "RELAY_SERVICE_HOST": "10.0.0.1",
        "RELAY_SERVICE_PORT": "80",
        "RELAY_PORT": "tcp://10.0.0.1:80",
        "RELAY_PORT_80_TCP": "tcp://10.0.0.1:80",
        "RELAY_PORT_80_TCP_PROTO": "tcp",
        "RELAY_PORT_80_TCP_PORT": "80",
        "RELAY_PORT_80_TCP_ADDR": "10.0.0.1",
    },
    "named ports, IPv6, UDP": {
        "RELAY_SERVICE_HOST": "fd00::1",
        "RELAY_SERVICE_PORT": "8080",
        "RELAY_SERVICE_PORT_HTTP": "8080",
        "RELAY_SERVICE_PORT_WEB_METRICS": "9090",
        "RELAY_PORT": "tcp://[fd00::1]:8080",
        "RELAY_PORT_8080_TCP": "tcp://[fd00::1]:8080",
        "RELAY_PORT_8080_TCP_ADDR": "fd00::1",
        "RELAY_PORT_53_UDP": "udp://[fd00::1]:53",
        "RELAY_PORT_53_UDP_PROTO": "udp",
    },
    "relay-redis and relay-web": {
        "RELAY_REDIS_SERVICE_HOST": "10.0.0.2",
        "RELAY_REDIS_SERVICE_PORT": "6379",
        "RELAY_REDIS_PORT": "tcp://10.0.0.2:6379",
        "RELAY_REDIS_PORT_6379_TCP_ADDR": "10.0.0.2",
        "RELAY_WEB_PORT": "tcp://10.0.0.3:80",
        "RELAY_WEB_SERVICE_HOST": "10.0.0.3",
        "RELAY_WEB_SERVICE_PORT_HTTPS": "443",
    },
    "relay-redis--url, which looks like a key of a table": {
        "RELAY_REDIS__URL_SERVICE_HOST": "10.0.0.4",
        "RELAY_REDIS__URL_PORT": "tcp://10.0.0.4:80",
    },
    "a link of Docker's": {
        "RELAY_NAME": "/web/relay",
        "RELAY_PORT": "tcp://172.17.0.5:8000",
        "RELAY_PORT_8000_TCP": "tcp://172.17.0.5:8000",
        "RELAY_PORT_8000_TCP_START": "tcp://172.17.0.5:8000",
        "RELAY_PORT_8000_TCP_END": "tcp://172.17.0.5:8004",
        "RELAY_PORT_8000_TCP_PORT_START": "8000",
        "RELAY_ENV_PATH": "/bin:/usr/bin",
        "RELAY_ENV_RELAY_HOST": "0.0.0.0",
    },
}


@pytest.mark.parametrize("variables", KUBERNETES.values(), ids=KUBERNETES)
def test_service_links_are_ignored(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources: kubernetes.io/docs/concepts/services-networking/service, docs.docker.com/engine/network/links."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load() == Config()
    assert service_links(os.environ) == sorted(variables)


def test_settings_beside_service_links_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KUBERNETES["relay"], "RELAY_PORT": "9000", "RELAY_HOST": "0.0.0.0"}.items():
        monkeypatch.setenv(name, value)
    config = load()
    assert (config.port, config.host) == (9000, "0.0.0.0")
    assert "RELAY_PORT" not in service_links(os.environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RELAY_SERVICE_HOST", "relay.internal"),
        ("RELAY_SERVICE_PORT", "80"),
        ("RELAY_SERVICE_PORT_HTTP", "80"),
        ("RELAY_REDIS_PORT", "6379"),
        ("RELAY_NAME", "/web/relay"),
        ("RELAY_ENV_PATH", "/bin"),
        ("RELAY_PORT_80_TCP_ADDR", "somewhere"),
        ("RELAY_ADDRESS", "tcp://10.0.0.1:80"),
    ],
)
def test_what_only_resembles_a_service_link_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert problems() == (f"environment: {name}: no such setting; {ALL_SETTINGS}",)


def test_typing_error_beside_service_links_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KUBERNETES["relay"], "RELAY_PROT": "9000", "RELAY_WEB_SERVICE_PORT": "80"}.items():
        monkeypatch.setenv(name, value)
    assert [problem.split(": ")[1] for problem in problems()] == ["RELAY_PROT", "RELAY_WEB_SERVICE_PORT"]


def test_port_that_is_no_link_and_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_PORT", "http://10.0.0.1:80")
    (problem,) = problems()
    assert problem.startswith("environment: port: expected a valid integer")


def test_service_links_are_logged_by_a_mounted_relay(
    write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RELAY_PORT", "tcp://10.0.0.1:80")
    caplog.set_level("INFO")
    Relay.from_file(write('broadcast_url = "memory://"'))
    assert [record.message for record in caplog.records] == [
        "variables of a Kubernetes service or container link ignored: RELAY_PORT"
    ]
