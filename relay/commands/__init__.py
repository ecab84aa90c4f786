"""Commands of ``relay``, a module for each group of them, and the options that several have.

A module here holds plain functions with Typer's annotations, which `relay.cli` enters; it must not know the others.
"""

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="TOML file with settings.")]
RedisUrl = Annotated[str | None, typer.Option(metavar="URL", help="Redis to use, e.g. redis://localhost:6379.")]
