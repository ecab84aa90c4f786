"""``relay plugins`` lists what was found; ``relay new-plugin`` writes a first one.

Owns these two commands' words; must not know how plugins are found, nor what is written.
"""

import logging
from pathlib import Path
from typing import Annotated

import typer

from relay.cli.options import ConfigFile
from relay.cli.output import console, is_terminal, print_lines, printable
from relay.config_sources import load


def plugins(config: ConfigFile = None) -> None:
    """List the plugins that were found: where, what each registers, and what failed. Piped: a line of JSON each."""
    from relay.plugins.builtins import builtin_plugins
    from relay.plugins.loader import load_plugins
    from relay.telemetry import Telemetry

    settings = load(config)
    lenient = settings.plugins.model_copy(update={"on_error": "skip"})
    logging.getLogger("relay.plugins").setLevel(logging.CRITICAL)  # what failed is part of the list
    found = load_plugins(lenient, *builtin_plugins(settings, Telemetry())).found
    if is_terminal():
        screen = console()
        for one in found:
            screen.print(f"{one.name}  ({one.source})", style="bold")
            for line in one.registers():
                screen.print(f"  {line}")
            if one.fault:
                screen.print(f"  FAILED  {printable(one.fault)}", style="red")
    else:
        print_lines(
            {"name": one.name, "source": one.source, "registers": one.registers(), "fault": one.fault or None}
            for one in found
        )
    if any(one.fault for one in found):
        raise typer.Exit(1)


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the plugin: letters, digits and _.")],
    directory: Annotated[Path, typer.Option("--in", metavar="DIR", help="Where to put it.")] = Path("plugins"),
) -> None:
    """Write a small plugin with a test: a package, ready to run."""
    from relay.plugins.scaffold import write_plugin

    package = write_plugin(name, directory)
    typer.echo(f"wrote {package}/")
    typer.echo(f"""try it:   RELAY_PLUGINS__PATHS='["{directory}"]' relay serve""")
    typer.echo(f"test it:  pytest {package}")
