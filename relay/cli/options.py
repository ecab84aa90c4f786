"""Commands of ``relay``, a module for each group of them, the options that several have, and what their help teaches.

A module here holds plain functions with Typer's annotations, which `relay.cli` enters; it must not know the others, but
for `help`, `link` and `terminal`, which have no commands.
"""

import json
import math
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from relay.errors import ConfigError
from relay.protocol.topics import PROTOCOL_TOPIC, RELAY_TOPIC, is_event, is_topic


def _not_empty(value: Any) -> Any:
    """Refuse what a shell makes of a variable that is not set. Raises typer.BadParameter."""
    if value in ("", Path("")):
        raise typer.BadParameter("it is empty; is a variable of the shell not set?")
    return value


def finite(value: float) -> float:
    """Refuse ``inf``, which is a number to Python. Raises typer.BadParameter."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}")
    return value


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="TOML file with settings.", callback=_not_empty),
]
RelayFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="The relay's TOML file.", callback=_not_empty),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Redis to use, e.g. redis://localhost:6379.", callback=_not_empty),
]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="The relay, with the path that it is mounted at.", show_default="http://127.0.0.1:8000"
    ),
]
Topic = Annotated[str, typer.Argument(metavar="TOPIC", help="Topic, e.g. room:1.")]
EventName = Annotated[str, typer.Argument(metavar="EVENT", help="Event, e.g. new_msg.")]
Payload = Annotated[str, typer.Argument(metavar="JSON", help='Payload, e.g. \'{"text":"hi"}\'.')]
Token = Annotated[str | None, typer.Option(metavar="TOKEN", help="Token to connect with, as authToken of phoenix.js.")]
Params = Annotated[str, typer.Option(metavar="JSON", help="Payload of the join.")]

EXAMPLES = {
    "serve": (
        "relay serve --open",
        "relay serve --redis-url redis://localhost:6379 --workers 4",
        "relay serve main:app --reload",
        "relay serve --factory main:create_app",
    ),
    "publish": ("""relay publish room:1 new_msg '{"text":"hi"}'""",),
    "listen": (
        "relay listen room:1",
        "relay listen room:1 --last 20",
        "relay listen room:1 --count 1 | jq .payload",
    ),
    "push": ("""relay push room:1 shout '{"text":"hi"}'""",),
    "topics": ("relay topics", "relay topics --url https://example.org/relay --config relay.toml"),
    "presence": ("relay presence room:1", "relay presence room:1 | jq -r .key | sort -u"),
    "bench": (
        "relay bench --url http://127.0.0.1:8000",
        "relay bench --sockets 500 --topics 50 --rate 1000 --seconds 30",
    ),
    "token": ("""relay token --sub alice --topic "room:*:join,push" --ttl 1h""",),
    "check": ("relay check --config relay.toml", "relay check --connect --redis-url redis://localhost:6379"),
    "config": (
        "relay config --config relay.toml",
        """relay config | jq -r 'select(.source != "default") | "\\(.setting) = \\(.value)"'""",
        "relay config --topic room:1 --config relay.toml",
    ),
    "plugins": ("relay plugins --config relay.toml",),
    "new-plugin": ("relay new-plugin hello", "relay new-plugin hello --in plugins"),
}
"""What to type, for each command: its help and docs/cli.md show it, and a test reads each."""

EXIT_CODES = {
    "serve": {3: "your app or a plugin did not start"},
    "check": {1: "there are warnings"},
    "bench": {1: "refused, or an event was lost, came twice or out of order", 130: "ended by Ctrl+C"},
    "plugins": {1: "a plugin cannot be loaded"},
}
"""Where there is more to them than `USUAL_CODES` says."""

USUAL_CODES = {0: "done", 1: "failed", 2: "wrong usage or settings"}


def epilog(name: str) -> str:
    """What stands under the help of a command: examples, and its exit codes."""
    examples = "\n".join(f"  {line}" for line in EXAMPLES[name])
    codes = ", ".join(f"{code} {meaning}" for code, meaning in (USUAL_CODES | EXIT_CODES.get(name, {})).items())
    return f"\b\nFor example:\n{examples}\n\nExit codes: {codes}."


def topic_of(text: str) -> str:
    """A topic from the command line. Raises ConfigError."""
    if text == PROTOCOL_TOPIC:
        raise ConfigError(f"TOPIC: {text!r} belongs to the protocol: it carries heartbeats and cannot be joined")
    if text == RELAY_TOPIC:
        raise ConfigError(f"TOPIC: {text!r} is reserved for the relay's own messages")
    if not is_topic(text):
        raise ConfigError(f"TOPIC: expected 1 to 255 bytes without control characters, got {text!r}")
    return text


def event_of(text: str) -> str:
    """An event's name from the command line. Raises ConfigError."""
    if not is_event(text):
        raise ConfigError(f"EVENT: expected 1 to 255 bytes without colon, not phx_… or chan_reply_…, got {text!r}")
    return text


def json_of(name: str, text: str) -> Any:
    """The value of JSON from the command line; ``name`` is that of the argument.

    Raises: ConfigError: no JSON, or a value that the wire cannot carry: half a surrogate pair, NaN.
    """
    try:
        value = json.loads(text, parse_constant=_no_constant)
        # Ends of pairs may stand there as escapes; those of the text itself come from bytes that are no UTF-8.
        _ = text.encode(), json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name}: expected text that UTF-8 can encode; got {text!r}") from None
    except (ValueError, RecursionError) as error:
        is_bare = 0 < len(text) <= _BARE_MAX and text[0] not in '{["'
        hint = f"; a text has quotes of its own: {shlex.quote(json.dumps(text, ensure_ascii=False))}" if is_bare else ""
        raise ConfigError(f"{name}: {error}; got {text!r:.500}{hint}") from None
    return value


_BARE_MAX = 80
"""Characters of a text that is shown as JSON, where the command line has it without quotes."""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def token_of(text: str | None) -> str | None:
    """A token from the command line. Raises ConfigError, which does not show it."""
    if text is not None and not text.isprintable():
        raise ConfigError("--token: expected text without control characters")
    return text
