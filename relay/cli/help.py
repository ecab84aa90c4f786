"""The look of ``--help``, where Typer's own is rough.

Owns that look; must not know any command.
"""

import inspect
from typing import Any

from rich.markup import escape
from typer.core import TyperCommand, TyperGroup


class _Tidy:
    """Paragraphs that fill the width, defaults in one pair of brackets, and flags without a type."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Tidy what is there, then let Typer write it; the program ends after that."""
        command: Any = self
        paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
        # Rich takes words in square brackets for its markup.
        command.help = escape("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))
        for parameter in command.get_params(ctx):
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
            if isinstance(parameter.show_default, str):  # Typer adds round brackets to a text
                parameter.default, parameter.show_default = parameter.show_default, True
        super().format_help(ctx, formatter)  # type: ignore[misc]  # Typer's, of the class that this is mixed in


class Command(_Tidy, TyperCommand):
    """A command with a tidy help."""


class Group(_Tidy, TyperGroup):
    """All commands, with a tidy help."""
