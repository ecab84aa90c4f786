"""Clients that recover what they missed, through cuts under load: with the lines of the documentation, in Node and in a
real browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_phoenix_js import CLIENTS
from tests.support.node import need_browser, need_node, run_checks
from tests.support.process import RelayProcess


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings with histories."""
    path = tmp_path_factory.mktemp("history") / "relay.toml"
    limits = "limits = { recover_max_events = 5000 }\n"
    path.write_text(limits + '[[topics]]\nmatch = "room:*"\nhistory = { size = 10000, ttl_s = 3600 }\n')
    return path


@pytest.fixture
def relay(config: Path) -> Iterator[RelayProcess]:
    """One for each test: its histories begin with the test."""
    with RelayProcess("--config", str(config)) as process:
        yield process


@pytest.mark.parametrize("client", CLIENTS)
def test_each_event_comes_once_and_in_order_in_node(relay: RelayProcess, client: str) -> None:
    need_node()
    run_checks("history-node.mjs", client, relay.http)


@pytest.mark.parametrize("client", CLIENTS)
def test_each_event_comes_once_and_in_order_in_a_browser(relay: RelayProcess, client: str) -> None:
    need_browser()
    run_checks("history-chromium.mjs", client, relay.http)
