"""`relay.pytest_plugin`: pytest loads it in every project that relay is installed in."""

import ast
import tomllib
from pathlib import Path

from relay import pytest_plugin

ROOT = Path(__file__).parents[2]


def test_plugin_is_registered_under_the_name_of_its_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"relay": "relay.pytest_plugin"}


def test_nothing_of_relay_is_imported_before_a_fixture_is_used() -> None:
    tree = ast.parse(Path(pytest_plugin.__file__).read_text("utf-8"))
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"collections.abc", "functools", "pytest", "typing"}
