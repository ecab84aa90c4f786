"""The command line: where the commands of `relay.cli` are entered.

Owns what is said of wrong usage, and the exit codes; leaves the work to the modules below it. Exit codes: 0
done, 1 failed, 2 wrong usage or settings.
"""

import errno
import sys
from typing import Annotated, Any

import typer

from relay.cli.auth import check, token
from relay.cli.bench import bench
from relay.cli.client import listen, presence, push, topics
from relay.cli.help import Command, Group
from relay.cli.options import epilog
from relay.cli.plugins import new_plugin, plugins
from relay.cli.publish import publish
from relay.cli.serve import serve
from relay.cli.topic_config import config as topic_config
from relay.errors import ConfigError
from relay.version import __version__

app: typer.Typer = typer.Typer(
    name="relay",
    cls=Group,
    help="Redis channels to WebSocket topics, in the manner of Phoenix Channels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What Typer raises for wrong usage; it exports no name for it."""


_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main() -> None:
    """Run the command line."""
    try:
        code = app(prog_name="relay", standalone_mode=False)
    except ConfigError as error:
        _say(*error.problems)
        code = 2
    except UsageError as error:
        code = _wrong_usage(error)
    except typer.Abort:
        code = 1
    except OSError as error:
        if error.errno not in _NOT_WRITTEN and not any(each.startswith("--install-completion") for each in sys.argv):
            raise
        _say(f"{error.filename or 'output'}: cannot be written: {error.strerror}")
        code = 1
    sys.exit(code)


def _wrong_usage(error: Any) -> int:
    """Say what is wrong in one line, and where to look it up; returns the exit code."""
    if type(error).__name__ != "NoArgsIsHelpError":  # then the help has been shown
        text = " ".join(error.format_message().split()).rstrip(".")
        command = error.ctx.command_path if error.ctx else "relay"
        _say(f"{text[:1].lower()}{text[1:]}; `{command} --help` shows how")
    return 2


def _say(*problems: str) -> None:
    for problem in problems:
        print(f"relay: {problem}", file=sys.stderr)  # noqa: T201 - the terminal is what this module is for


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


for _name, _command in (
    ("serve", serve),
    ("publish", publish),
    ("listen", listen),
    ("push", push),
    ("topics", topics),
    ("presence", presence),
    ("bench", bench),
    ("token", token),
    ("check", check),
    ("config", topic_config),
    ("plugins", plugins),
    ("new-plugin", new_plugin),
):
    app.command(_name, cls=Command, epilog=epilog(_name))(_command)
