"""What a command prints: for reading on a terminal, a line of JSON each when piped.

Owns that difference, and the one line on standard error before exit code 1.
"""

import json
import os
import stat
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console


class Failed(Exception):
    """What there is to say before exit code 1."""


def is_terminal() -> bool:
    """Whether standard output is a terminal."""
    return sys.stdout.isatty()


def is_kept() -> bool:
    """Whether what is printed is kept, for others to read: it goes to a file, or by a socket to the system's log."""
    try:
        mode = os.fstat(sys.stdout.fileno()).st_mode
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def console() -> "Console":
    """The terminal, for text that is printed as it is."""
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=True)


def print_lines(values: Iterable[Any]) -> None:
    """Print a line of JSON each."""
    for value in values:
        typer.echo(json_line(value))


def json_line(value: Any) -> str:
    """JSON in one line; what is not printable in it, or has no UTF-8, is escaped, which leaves it the same value."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    return json.dumps(char)[1:-1]


def printable(text: str, keep: str = "") -> str:
    """Without what would steer a terminal, wherever the text came from, but for the characters to ``keep``."""
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def fail(why: str) -> NoReturn:
    """Say why in one line, and end with exit code 1."""
    typer.echo(f"relay: {printable(why)}", err=True)
    raise typer.Exit(1)
