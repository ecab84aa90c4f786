"""The reference pages, made from the code each time the documentation is built: settings, Python, HTTP, metrics.

Owns their form alone; every word in them stands in the code.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from textwrap import dedent
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import relay.testing
import relay_client
from relay import (
    AsyncPublisher,
    BusUnavailable,
    ConfigError,
    EventStream,
    Plugin,
    Published,
    Publisher,
    ReceivedEvent,
    Refused,
    Relay,
    SlowReader,
    UpgradeRequest,
)
from relay.config import Config
from relay.errors import RelayError
from relay.plugins import hooks
from relay.web.prometheus import METRIC_SPECS
from relay.web.rest import make_rest

_HANDED = (hooks.Join, hooks.Joined, hooks.Leave, hooks.Push, hooks.Event, hooks.RedisMessage, hooks.Socket)
"""What handlers are given."""

_NOT_CONSTRUCTED = frozenset(
    (
        *_HANDED,
        UpgradeRequest,
        EventStream,
        Published,
        ReceivedEvent,
        relay.testing.Channel,
        relay.testing.Socket,
        relay_client.Channel,
        relay_client.Event,
        relay_client.Recovered,
        relay_client.Lost,
        relay_client.Presence,
        relay_client.PresenceChange,
    )
)
"""Classes whose objects relay creates: their constructors are not part of the API."""

_APPLICATION: tuple[type, ...] = (
    Relay,
    Publisher,
    AsyncPublisher,
    Published,
    EventStream,
    ReceivedEvent,
    UpgradeRequest,
    Refused,
    RelayError,
    ConfigError,
    BusUnavailable,
    SlowReader,
)

_CLIENT: tuple[type, ...] = (
    relay_client.Socket,
    relay_client.Channel,
    relay_client.Event,
    relay_client.Recovered,
    relay_client.Lost,
    relay_client.Presence,
    relay_client.PresenceChange,
    relay_client.ClientError,
    relay_client.ConnectError,
    relay_client.PushError,
    relay_client.JoinError,
    relay_client.QueueOverflow,
)

_SIGNATURE_MAX = 90
"""Characters of a signature on one line."""

_OF_A_SUBSCRIBER = (
    "close closed_with direct_write drained end_subscription lose_events queued_bytes send_event"
    " subscriber subscription transport"
).split()

_INTERNAL = frozenset(
    {
        *(("EventStream", name) for name in _OF_A_SUBSCRIBER),
        ("Channel", "receive"),
        ("Channel", "lose"),
        ("Channel", "end"),
        ("Relay", "publish_command"),
    }
)
"""Public methods that only other modules of the same package call."""

_DEPRECATED = frozenset({("Relay", "broadcast_here"), ("Relay", "engine")})


def write(directory: Path) -> None:
    """Write all pages into ``directory``; those that have not changed keep their time, so that Sphinx leaves them."""
    directory.mkdir(exist_ok=True)
    for name, make in _PAGES.items():
        page, text = directory / f"{name}.md", make()
        if not page.exists() or page.read_text("utf-8") != text:
            page.write_text(text, "utf-8")


def settings() -> str:
    """Every setting: key, type, default, meaning, by table."""
    lines = [
        "# Settings",
        "",
        "This page lists every setting. relay reads settings from a TOML file (`relay serve --config FILE`), from",
        "environment variables (`RELAY_PORT`, `RELAY_LIMITS__TOPICS_PER_SOCKET`; lists and tables as JSON), from",
        "command-line flags, and from the arguments of `Relay`. Flags take precedence over variables, and",
        "variables over the file.",
        "[config/relay.toml](../../config/relay.toml) contains all settings with their defaults.",
        "",
    ]
    for title, model in _tables(Config, ""):
        heading = f"`{title}`" if title else "Top level"
        lines += [f"## {heading}", "", *_paragraphs(model.__doc__ if title else None)]
        lines += ["| Setting | Type | Default | Meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            if _table_of(field) is None:
                cells = (f"`{name}`", f"`{_type(field.annotation)}`", _default(field), field.description or "")
                lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _tables(model: type[BaseModel], title: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield title, model
    for name, field in model.model_fields.items():
        table = _table_of(field)
        if table is not None:
            inner = f"{title.strip('[]')}.{name}".lstrip(".")
            yield from _tables(table[0], f"[[{inner}]]" if table[1] else f"[{inner}]")


def _table_of(field: FieldInfo) -> tuple[type[BaseModel], bool] | None:
    """The model of a table, and whether there may be several of them."""
    found = field.annotation
    if isinstance(found, type) and issubclass(found, BaseModel):
        return found, False
    arguments: tuple[Any, ...] = getattr(found, "__args__", ())
    if len(arguments) == 2 and isinstance(arguments[0], type) and issubclass(arguments[0], BaseModel):
        return arguments[0], get_origin(found) is tuple  # else the table is optional
    return None


_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}


def _type(annotation: Any) -> str:
    """A type as TOML has it."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if get_origin(annotation) is tuple:
        return f"list of {_TYPES[arguments[0]]}s" if arguments[0] in _TYPES else f"list of {_type(arguments[0])}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_type(each) for each in arguments if each is not NoneType)
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return " or ".join(f'"{each.value}"' for each in annotation)
    return _TYPES.get(annotation) or re.sub(r"\b[a-z_.]+\.(?=[A-Z])", "", inspect.formatannotation(annotation))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "" if field.default_factory is not None else "must be set"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def plugin() -> str:
    """What a plugin can hook into, and what its handlers are given."""
    lines = ["# Plugin API", "", "This page is the reference of `Plugin` and of the objects that handlers receive.", ""]
    lines += ["For a guide with examples, see [Plugins](../plugins.md); for `Relay`, see [Python API](api.md).", ""]
    for owner in (Plugin, *_HANDED):
        lines += _class(owner)
    return "\n".join(lines)


def api() -> str:
    """The Python API: what an application calls, and the Python client."""
    lines = [
        "# Python API",
        "",
        "This page is the reference of `relay.Relay`, its exceptions, and the Python client.",
        "",
    ]
    lines += ["- [relay](#relay): the ASGI application, for [your own application](../mounting.md)"]
    lines += ["- [relay_client](#relay-client): the Python client, `clients/python`", ""]
    lines += ["For plugins, see [Plugin API](hooks.md).", "", "## `relay`", "", "```python", "from relay import Relay"]
    lines += [
        "```",
        "",
        "`Authenticate` is a function of an `UpgradeRequest`, as described at `Relay`. `Call` is awaitable.",
        "",
    ]
    for owner in _APPLICATION:
        lines += _class(owner, level=3)
    lines += ["## `relay_client`", "", "```python", "from relay_client import connect", "```", ""]
    lines += [
        "`connect(url, …)` is an alias of `Socket(url, …)`. `Fresh[T]` is a value of type `T`, or a function, sync or"
    ]
    lines += ["async, that returns one.", ""]
    for owner in _CLIENT:
        lines += _class(owner, level=3)
    return "\n".join(lines)


def testing() -> str:
    """`relay.testing`: what tests of an application call."""
    lines = [
        "# Testing API",
        "",
        "This page is the reference of `relay.testing`; [Testing](../testing.md) is the guide. `BlockingSocket` and",
        "`BlockingChannel` have the methods of `Socket` and `Channel` without `await`.",
        "",
    ]
    for function in (relay.testing.connect, relay.testing.in_memory, relay.testing.send_redis_message):
        lines += [f"## `{function.__name__}`", "", "```python", f"{function.__name__}{_signature(function)}", "```", ""]
        lines += _docstring(function)
    for owner in (relay.testing.Socket, relay.testing.Channel, relay.testing.ConnectionRefused):
        lines += _class(owner)
    return "\n".join(lines)


def _class(owner: type, level: int = 2) -> list[str]:
    """A class with its constructor, unless it takes no arguments, and its methods."""
    lines = [f"{'#' * level} `{owner.__name__}`", ""]
    if not issubclass(owner, BaseException) and owner not in _NOT_CONSTRUCTED:
        lines += ["```python", f"{owner.__name__}{_signature(owner.__init__)}".removesuffix(" -> None"), "```", ""]
    bases = [base.__name__ for base in owner.__bases__ if issubclass(base, Exception)]
    if bases:
        lines += [f"Base class: `{bases[0]}`.", ""]
    return [*lines, *_docstring(owner), *_methods(owner, level + 1)]


def _methods(owner: type, level: int) -> Iterator[str]:
    heading = "#" * level
    for name, member in vars(owner).items():
        if name.startswith("_") or (owner.__name__, name) in _INTERNAL | _DEPRECATED:
            continue
        if isinstance(member, property):
            yield from (f"{heading} `{name}`", "", *_docstring(member.fget))
        elif isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
            function = inspect.unwrap(getattr(owner, name))
            kind = "async " if inspect.iscoroutinefunction(function) else ""
            yield from (f"{heading} {kind}`{name}`", "", "```python", f"{name}{_signature(function)}", "```", "")
            yield from _docstring(function)


def _signature(function: Any) -> str:
    """The signature as it stands in the code, on one line if it is short."""
    (definition,) = ast.parse(dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef)
    parameters = list(_parameters(definition.args))
    returned = f" -> {_annotation(definition.returns)}"
    text = f"({', '.join(parameters)}){returned}"
    if len(text) <= _SIGNATURE_MAX:
        return text
    return "(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){returned}"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    for argument, default in zip(positional, defaults, strict=True):
        if argument.arg not in ("self", "cls"):
            yield _parameter(argument, default)
    if arguments.vararg is not None:
        yield f"*{_parameter(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg is not None:
        yield f"**{_parameter(arguments.kwarg, None)}"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    text = f"{argument.arg}: {_annotation(argument.annotation)}"
    return text if default is None else f"{text} = {ast.unparse(default)}"


def _annotation(annotation: ast.expr | None) -> str:
    assert annotation is not None, "all public functions have types"
    return (
        str(annotation.value) if isinstance(annotation, ast.Constant) and annotation.value else ast.unparse(annotation)
    )


def _docstring(owner: Any) -> list[str]:
    """The docstring as Markdown: its sections (Args, Returns, Raises) become lists."""
    return _paragraphs(inspect.getdoc(owner))


_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes):\s+", re.MULTILINE)
_ENTRY = re.compile(r"(?:^ *|; (?=[A-Z]))((?:[A-Za-z_]\w*)(?:, [A-Za-z_]\w*)*): ", re.MULTILINE)


def _paragraphs(text: str | None) -> list[str]:
    lines: list[str] = []
    for paragraph in (text or "").split("\n\n"):
        if _SECTION.match(paragraph):
            lines += _sections(paragraph)
        elif paragraph.startswith("    "):
            lines += ["```python", *inspect.cleandoc(paragraph).splitlines(), "```", ""]
        elif paragraph:
            lines += [*paragraph.replace("``", "`").replace("::\n", ":\n").splitlines(), ""]
    return lines


def _sections(paragraph: str) -> list[str]:
    """Sections of a docstring: each a title, and a list of its entries, ``name: text``, or one text."""
    lines: list[str] = []
    _, *parts = _SECTION.split(paragraph)
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        lines += [f"**{title}**", ""]
        before, *entries = _ENTRY.split(body)
        texts = [before] if before.strip() else []
        texts += [f"`{name}`: {text}" for name, text in zip(entries[::2], entries[1::2], strict=True)]
        lines += [f"- {' '.join(text.replace('``', '`').split()).rstrip(';')}" for text in texts]
        lines.append("")
    return lines


def http() -> str:
    """The REST interface, out of its own description."""
    relay = Relay(broadcast_url="memory://")
    lines = ["# HTTP routes", "", "The routes of the REST API, below `rest.path`, by default `/api`.", ""]
    lines += ["For examples, see [REST API](../rest.md).", "", "| Route | Meaning | Responses |", "|---|---|---|"]
    for path, methods in make_rest(relay.components, lambda: relay.node).openapi()["paths"].items():
        for method, about in methods.items():
            text = (about.get("description") or about["summary"]).split("\n\n")[0].replace("\n", " ").replace("``", "`")
            lines.append(f"| `{method.upper()} {path}` | {text} | {', '.join(about['responses'])} |")
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """What ``/metrics`` exports."""
    lines = [
        "# Metrics reference",
        "",
        "All metrics at `/metrics`. For what to watch, see [Metrics](../metrics.md).",
        "",
    ]
    lines += ["| Name | Labels | Kind | Meaning |", "|---|---|---|---|"]
    for spec in METRIC_SPECS:
        label = ", ".join(f"`{name}`" for name in spec.labels)
        lines.append(f"| `{spec.shown_name}` | {label} | {spec.kind} | {spec.meaning} |")
    return "\n".join(lines) + "\n"


_PAGES = {"settings": settings, "api": api, "testing": testing, "hooks": plugin, "http": http, "metrics": metrics}
"""The pages, by file name, and what makes each."""
