"""What a newcomer types first: the Makefile's words, and the packages that npm is asked for."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def test_make_test_runs_tests_alone_and_says_how_long_it_takes() -> None:
    """Not through a target that it needs either; those that are files set up the environment."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = dict(re.findall(r"^(\w+):([^#\n]*## .*)$", makefile, re.MULTILINE))
    needed, _, help_text = targets["test"].partition("##")
    assert [name for name in needed.split() if name in targets] == []
    assert re.search(r"\d+ minutes", help_text)
    assert {"format", "lint"} <= set(re.findall(r"\w+", targets["check"]))


def test_ci_runs_checks_and_tests() -> None:
    words = re.findall(r"^(?:exec )?make (\w+)", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    assert {"check", "test"} <= set(words)


def test_packages_of_the_browser_tests_are_locked_in_a_form_that_npm_9_reads() -> None:
    """It ends with an error where a dependency of a dependency is overridden by an alias, `npm:name@version`."""
    directory = ROOT / "tests" / "js"
    package: dict[str, Any] = json.loads((directory / "package.json").read_text("utf-8"))
    lock: dict[str, Any] = json.loads((directory / "package-lock.json").read_text("utf-8"))
    assert lock["lockfileVersion"] in (2, 3)
    aliases = {
        path.rpartition("node_modules/")[2] for path, entry in lock["packages"].items() if path and "name" in entry
    }
    assert aliases <= package["devDependencies"].keys()
    assert "npm:" not in json.dumps(package.get("overrides", {}))
