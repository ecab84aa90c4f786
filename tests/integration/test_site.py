"""The documentation as a site: built as `make docs` does, where a link that leads nowhere is an error."""

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import relay
import relay_client
from relay.config import Config
from tests.support.node import need_browser, run_checks
from tests.support.patience import PATIENCE
from tools import reference

ROOT = Path(__file__).parents[2]

SEARCHED = (
    "celery=publishing",
    "django=coming-from",
    "docker=deployment",
    "kubernetes=deployment",
    "deploy=deployment",
    "scale=scaling",
    "test=mounting",
    "reconnect=reliability",
    "authentication=authentication",
)
"""Words, and a page that must be among what is found first."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    directory = tmp_path_factory.mktemp("docs")
    made, site = str(directory / "made"), directory / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", made, "docs", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300 * PATIENCE)
    assert done.returncode == 0, done.stderr
    return site


def test_search_of_the_site_finds_what_people_look_for(site: Path) -> None:
    """In a browser, as Sphinx's own search does it; and the front page has its picture, in light and dark."""
    need_browser()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            pictures = os.environ.get("TESTS_SCREENSHOTS_PAGES", "")
            run_checks("site-chromium.mjs", f"http://127.0.0.1:{server.server_port}", pictures, *SEARCHED)
        finally:
            server.shutdown()


def test_site_has_all_pages(site: Path) -> None:
    pages = {page.relative_to(site).with_suffix("") for page in site.rglob("*.html")}
    written = {page.relative_to(ROOT / "docs").with_suffix("") for page in (ROOT / "docs").rglob("*.md")}
    assert written <= pages
    for page in (
        "cli",
        "reference/settings",
    ):  # what stands there is typed: no “quotes”, and no dash for an option's two
        assert not re.search(r"[“”]|–[a-z]", (site / f"{page}.html").read_text()), page
    front = (site / "index.html").read_text()
    assert all(f'href="{page}.html"' in front for page in written - {Path("index")}), "every page is in the index"
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', front), "no request to another host"


def test_reference_names_every_setting_with_its_meaning() -> None:
    text = reference.settings()
    rows = re.findall(r"^\| `(\w+)` \| `.+` \| .* \| (.*) \|$", text, re.MULTILINE)
    assert all(meaning for _, meaning in rows)
    assert {"port", "jwks_url", "outbox_max_bytes", "latest_key", "strip_prefix", "api_key"} <= {
        name for name, _ in rows
    }
    assert set(Config.model_fields) <= {name for name, _ in rows} | set(
        re.findall(r"^## `\[+(\w+)\]+`$", text, re.MULTILINE)
    )


def test_reference_describes_every_hook_and_request() -> None:
    requests = reference.http()
    for page, names in (
        (reference.plugin(), ("on_join", "on_leave", "on_push", "on_event", "on_redis", "service", "include_router")),
        (reference.api(), ("install", "broadcast", "kick", "disconnect", "join", "push")),
    ):
        for name in names:
            described = rf"^###+ (?:async )?`{name}`\n\n```python\n{name}\([^`]*\)[^`]*\n```\n\n\S"
            assert re.search(described, page, re.MULTILINE), name
    assert "| `POST /publish` |" in requests
    assert "| `GET /sockets/{socket_id}` |" in requests


def test_reference_describes_the_public_names_of_both_packages() -> None:
    pages = reference.api() + reference.plugin() + reference.settings()
    constants = {"__version__", "Config", "Overflow", "REJOINED", "connect"}
    for name in {*relay.__all__, *relay_client.__all__} - constants:
        assert re.search(rf"^##+ `{name}`$", pages, re.MULTILINE), name


def test_reference_shows_sections_of_docstrings_as_lists() -> None:
    text = reference._paragraphs(
        "Do it.\n\nArgs: a: one;\n          more.\n      b, c: ``two``.\nRaises: ValueError: never; TypeError: or so."
    )
    assert text == [
        "Do it.",
        "",
        "**Args**",
        "",
        "- `a`: one; more.",
        "- `b, c`: `two`.",
        "",
        "**Raises**",
        "",
        "- `ValueError`: never",
        "- `TypeError`: or so.",
        "",
    ]
