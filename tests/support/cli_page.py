"""``docs/cli.md``, written from what Typer knows of the commands: ``python -m tests.support.cli_page``."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from relay.cli.main import app
from relay.cli.options import EXAMPLES, EXIT_CODES

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"

HEAD = """\
# The command line

<!-- Written by `python -m tests.support.cli_page`; a test compares. -->

Every command teaches itself: `relay COMMAND --help`. Output is for reading on a terminal; piped, what a program may
want is a line of JSON each (`relay publish`, `listen`, `push`, `topics`, `bench`, `check`, `plugins`). What goes wrong
is said on standard error, in one line where that is possible. Exit codes: 0 done, 1 failed, 2 wrong usage or settings.

`relay --install-completion` teaches your shell to complete commands and options (bash, zsh, fish, PowerShell);
`relay --show-completion` prints what that would add.

`relay bench` measures a relay that runs, with the machine, network and plugins it has. Events carry their number and
their time: what is lost, comes twice or out of order is counted, and times are from the publishing to the receipt at
each socket. They include the time of this client, one process of Python that receives some 20 000 events/s; beyond
that it measures itself. [performance.md](performance.md) says what the relay can do.

"""


def page() -> str:
    """The whole page."""
    commands: dict[str, Any] = vars(get_command(app))["commands"]
    names = list(EXAMPLES)
    listed = "\n".join(f"- [`relay {name}`](#relay-{name}): {_first(commands[name])}" for name in names)
    return f"{HEAD}{listed}\n\n" + "\n".join("\n".join(_command(name, commands[name])) for name in names)


def _first(command: Any) -> str:
    return " ".join(inspect.cleandoc(command.help).split("\n\n")[0].split())


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"## relay {name}\n"
    yield f"{inspect.cleandoc(command.help)}\n"
    yield "```sh"
    yield from EXAMPLES[name]
    yield "```\n"
    for code, meaning in EXIT_CODES.get(name, {}).items():
        yield f"Exit code {code}: {meaning}.\n"
    rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
    yield "| Argument or option | What it says | Default |"
    yield "|---|---|---|"
    yield from rows
    yield ""


def _row(parameter: Any) -> str:
    metavar = parameter.metavar or ""
    is_flag = getattr(parameter, "is_flag", False)
    is_argument = parameter.param_type_name == "argument"
    names = metavar if is_argument else ", ".join(name if is_flag else f"{name} {metavar}" for name in parameter.opts)
    shown = getattr(parameter, "show_default", None)
    default = shown if isinstance(shown, str) else parameter.default
    if parameter.required:
        told = "required"
    else:
        told = (
            "" if default is None or default is False else f"`{default}`" if isinstance(shown, bool) else str(default)
        )
    return f"| `{names}` | {parameter.help} | {told} |"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
