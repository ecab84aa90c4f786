"""``relay new-plugin`` writes a package that works, with a test that passes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from relay.config_sections import PluginsConfig
from relay.errors import ConfigError
from relay.plugins.loader import load_plugins
from relay.plugins.scaffold import write_plugin
from tests.support.patience import PATIENCE


@pytest.mark.parametrize("name", ["hello", "my_plugin2"])
def test_written_plugin_passes_its_own_test(tmp_path: Path, name: str) -> None:
    directory = write_plugin(name, tmp_path / "plugins")
    assert directory == tmp_path / "plugins" / name
    assert sorted(path.name for path in directory.iterdir()) == ["__init__.py", f"test_{name}.py"]
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"plugins/{name}"]
    repository = str(Path(__file__).parents[2])
    environ = {**os.environ, "PYTHONPATH": repository, "COLUMNS": "200"}
    ended = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120 * PATIENCE)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 passed" in ended.stdout


def test_written_plugin_is_typed_and_in_the_one_format(tmp_path: Path) -> None:
    directory = write_plugin("hello", tmp_path)
    repository = Path(__file__).parents[2]
    for command in (
        ["ruff", "check", "--config"],
        ["ruff", "format", "--check", "--config"],
        ["mypy", "--config-file"],
    ):
        line = [sys.executable, "-m", *command, str(repository / "pyproject.toml"), str(directory)]
        ended = subprocess.run(line, cwd=repository, capture_output=True, text=True, timeout=300 * PATIENCE)
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_written_plugin_is_found_by_the_loader(tmp_path: Path) -> None:
    write_plugin("hello", tmp_path)
    [found] = load_plugins(PluginsConfig(paths=(tmp_path,))).found
    assert found.registers() == [
        "on_join hello:* → welcome",
        "on_push hello:* say → say",
        "route GET /hello/",
    ]


@pytest.mark.parametrize("name", ["", "two words", "1st", "my-plugin", "a/b", "../up", "größe"])
def test_name_that_is_no_package_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="NAME: expected letters, digits and _"):
        write_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["relay", "json", "redis", "class"])
def test_name_of_another_module_is_refused(tmp_path: Path, name: str) -> None:
    """The plugin's test would import the plugin for the module."""
    with pytest.raises(ConfigError, match=f"NAME: '{name}' is a word or a module of Python"):
        write_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_plugin_that_exists_is_not_written_over(tmp_path: Path) -> None:
    directory = write_plugin("hello", tmp_path)
    (directory / "__init__.py").write_text("mine")
    with pytest.raises(ConfigError, match=r"NAME: .*hello exists already"):
        write_plugin("hello", tmp_path)
    assert (directory / "__init__.py").read_text() == "mine"


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"NAME: .*hello cannot be written: Not a directory"):
        write_plugin("hello", tmp_path / "file")
