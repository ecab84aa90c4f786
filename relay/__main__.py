"""The command ``relay``, and ``python -m relay``: `relay.cli.main`, if the packages that it needs are installed."""

import sys

from relay.errors import ConfigError
from relay.extras import require


def main() -> None:
    """Run the command line; without its packages, say in one line what to install, and exit with 2."""
    try:
        require("cli", "the command relay")
    except ConfigError as error:
        sys.exit(_fail(str(error)))
    from relay.cli.main import main as run

    run()


def _fail(text: str) -> int:
    print(f"relay: {text}", file=sys.stderr)  # noqa: T201 - there is no command line yet
    return 2


if __name__ == "__main__":
    main()
