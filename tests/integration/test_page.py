"""The relay's page in a real browser, and the pictures of it.

``TESTS_SCREENSHOTS=docs/images make test ARGS="-k test_page"`` keeps the pictures in that directory.
"""

import json
import os
from pathlib import Path

import pytest

from relay.plugins.scaffold import write_plugin
from tests.support.keys import OTHER_SECRET, SECRET, token
from tests.support.node import need_browser, run_checks
from tests.support.process import RelayProcess, Valkey

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("page", ["--width=1280"]),
        ("page-dark", ["--width=1280", "--dark"]),
        ("page-phone", ["--width=390", "--height=844"]),
    ],
)
def test_the_page_connects_and_shows_what_happens(
    relay: RelayProcess, tmp_path: Path, name: str, flags: list[str]
) -> None:
    """No error on the console, no request to another host, nothing wider than the window."""
    need_browser()
    kept = os.environ.get("TESTS_SCREENSHOTS")
    directory = Path(kept or tmp_path).resolve()
    if kept:
        flags = [*flags, "--story"]
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / f"{name}.png"
    run_checks("page-chromium.mjs", relay.http, str(picture), *flags, redis_url=relay.redis_url)
    assert picture.read_bytes().startswith(PNG)


def test_pages_of_a_relay_that_asks_for_tokens_ask_for_one(valkey: Valkey) -> None:
    need_browser()
    environ = {"RELAY_AUTH__KEYS": json.dumps([SECRET]), "RELAY_REST__API_KEY": "k"}
    made = token("ada", {"room:*": ["join", "push"]})
    with RelayProcess("--redis-url", valkey.url, environ=environ) as relay:
        run_checks("token-chromium.mjs", relay.http, made, token(key=OTHER_SECRET), "k", redis_url=valkey.url)


def test_page_of_the_rest_interface_works_without_the_internet(tmp_path: Path) -> None:
    """No file comes from elsewhere, where the API key is typed."""
    need_browser()
    write_plugin("example", tmp_path)
    environ = {"RELAY_REST__API_KEY": "schlüssel", "RELAY_PLUGINS__PATHS": json.dumps([str(tmp_path)])}
    with RelayProcess(environ=environ) as relay:
        run_checks("docs-chromium.mjs", relay.http, "schlüssel", "/example/")
