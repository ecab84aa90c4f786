"""Fixtures of unit tests."""

from pathlib import Path

import pytest

from tests.support.settings import Write


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file."""

    def write(text: str) -> Path:
        path = tmp_path / "relay.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write
