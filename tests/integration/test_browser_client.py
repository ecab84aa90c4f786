"""The browser client: its own tests, its size, and a relay, in Node and in a real browser.

That it and the published ``phoenix`` take each other's place is in ``test_phoenix_js.py``, which runs with both.
"""

import gzip
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.node import DEADLINE_S, SCRIPTS, compile_typescript, need_browser, need_node, run_checks
from tests.support.process import RelayProcess

DIRECTORY = Path(__file__).parents[2] / "clients" / "browser"


def test_its_own_tests_pass_in_node() -> None:
    """The wire vectors among them. Source: ``clients/browser/test``."""
    need_node()
    ran = subprocess.run(
        ["node", "--test"], cwd=DIRECTORY, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counts = dict(re.findall(r"^\W*(pass|fail|skipped) (\d+)$", ran.stdout, re.MULTILINE))
    assert int(counts["pass"]) > 70
    assert (counts["fail"], counts["skipped"]) == ("0", "0")


def test_it_is_under_7_kb_gzipped() -> None:
    assert len(gzip.compress((DIRECTORY / "relay.js").read_bytes(), 9, mtime=0)) < 7000


def test_presence_is_under_1_5_kb_gzipped() -> None:
    assert len(gzip.compress((DIRECTORY / "presence.js").read_bytes(), 9, mtime=0)) < 1500


def test_its_modules_have_no_dependencies() -> None:
    package = json.loads((DIRECTORY / "package.json").read_text("utf-8"))
    assert {"dependencies", "peerDependencies"} & package.keys() == set()
    for name in ("relay.js", "presence.js"):
        text = (DIRECTORY / name).read_text("utf-8")
        assert not re.search(r"^import\b|\bimport\(|\brequire\(", text, re.MULTILINE), name
    assert all((DIRECTORY / name).exists() for name in package["files"])


@pytest.mark.parametrize("name", ["Socket", "Channel", "Push", "PushError", "encode", "decode", "Presence"])
def test_declaration_names_what_the_module_exports(name: str) -> None:
    pattern = rf"^export (class|function) {name}\b"
    for file in ("presence.js", "presence.d.ts") if name == "Presence" else ("relay.js", "relay.d.ts"):
        assert re.search(pattern, (DIRECTORY / file).read_text("utf-8"), re.MULTILINE), file


def test_declaration_is_what_typescript_understands_and_refuses_mistakes(tmp_path: Path) -> None:
    need_node()
    modules = {"client": DIRECTORY / "relay.d.ts", "presence": DIRECTORY / "presence.d.ts"}
    compile_typescript(tmp_path, SCRIPTS / "types" / "client.ts", **modules)


@pytest.mark.parametrize(
    "types", [DIRECTORY / "relay.d.ts", SCRIPTS / "node_modules/@types/phoenix/index.d.ts"], ids=["relay", "phoenix"]
)
def test_one_application_compiles_with_either_client(types: Path, tmp_path: Path) -> None:
    need_node()
    compile_typescript(tmp_path, SCRIPTS / "types" / "swap.ts", client=types)


def test_it_works_in_a_browser(relay: RelayProcess) -> None:
    """The wire vectors, ``await`` and ``for await``, a hidden page, a network that goes and comes."""
    need_browser()
    run_checks("client-chromium.mjs", relay.http, redis_url=relay.redis_url)
