"""The command ``relay``, and ``python -m relay``: `relay.cli.main`, if the packages that it needs are installed."""

import os
import sys

from relay.errors import ConfigError
from relay.extras import require


def main() -> None:
    """Run the command line; without its packages, say in one line what to install, and exit with 2."""
    _open_closed_streams()
    try:
        require("cli", "the command relay")
    except ConfigError as error:
        sys.exit(_fail(str(error)))
    from relay.cli.main import main as run

    run()


def _open_closed_streams() -> None:
    """Open /dev/null for standard streams that are closed, as by ``>&-``: a socket would take their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each takes the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _fail(text: str) -> int:
    print(f"relay: {text}", file=sys.stderr)  # noqa: T201 - there is no command line yet
    return 2


if __name__ == "__main__":
    main()
