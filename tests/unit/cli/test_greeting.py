"""`relay.cli.greeting`: what is printed once the relay answers."""

import shutil
import sys
from pathlib import Path

import pytest

from relay.cli import greeting


def test_command_is_named_by_its_whole_path_in_a_directory_that_was_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/relay"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert greeting._own_name() == "/opt/venv/bin/relay"
