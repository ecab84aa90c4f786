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
# Command line

<!-- Written by `python -m tests.support.cli_page`; a test compares. -->

This page is the reference of the `relay` command. `relay COMMAND --help` prints the same information. On a terminal,
output is formatted for reading; when it is piped, `relay publish`, `listen`, `push`, `topics`, `presence`, `bench`,
`check`, `config` and `plugins` print one JSON object per line. Errors go to standard error, in one line where possible.
Exit codes: 0 success, 1 failure, 2 wrong usage or settings.

`relay --install-completion` installs completion of commands and options for your shell (bash, zsh, fish, PowerShell);
`relay --show-completion` prints what it would install.

`relay bench` measures a running relay, including its machine, network and plugins. Events contain a number and a
timestamp, so that lost, duplicate and reordered events are counted; latency is the time from the publication to the
receipt at each socket. It includes the time of the client, one Python process that receives about 20 000 events/s; at
higher rates the client is the bottleneck. See [Performance](performance.md) for benchmarks.

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
    yield "| Argument or option | Meaning | Default |"
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
