"""Files of settings, and what is said of bad ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from relay.config_sources import load
from relay.errors import ConfigError

Write: TypeAlias = Callable[[str], Path]
"""Writes a configuration file: the fixture `write`."""


def problems(path: str | Path | None = None, flags: dict[str, Any] | None = None) -> tuple[str, ...]:
    """What is said of bad settings."""
    with pytest.raises(ConfigError) as caught:
        load(path, flags)
    error = caught.value
    assert error.__suppress_context__ or error.__context__ is None, "no traceback of pydantic's comes along"
    for problem in error.problems:
        assert problem and "\n" not in problem, "one line each"
        assert "pydantic" not in problem
        assert ": :" not in problem
    return error.problems
