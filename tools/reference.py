"""The reference pages, made from the code each time the documentation is built: settings, hooks, HTTP, figures.

Owns their form alone; every word in them stands in the code.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from relay import Plugin, Relay
from relay.config import Config
from relay.plugins import hooks
from relay.web.prometheus import FIGURES
from relay.web.rest import make_rest

_HANDED = (hooks.Join, hooks.Leave, hooks.Push, hooks.Event, hooks.RedisMessage, hooks.Socket)
"""What handlers are given."""


def write(folder: Path) -> None:
    """Write all pages into ``folder``; those that have not changed keep their time, so that Sphinx leaves them."""
    folder.mkdir(exist_ok=True)
    for name, text in (("settings", settings()), ("hooks", plugin()), ("http", http()), ("figures", figures())):
        page = folder / f"{name}.md"
        if not page.exists() or page.read_text("utf-8") != text:
            page.write_text(text, "utf-8")


def settings() -> str:
    """Every setting: key, type, default, meaning, by table."""
    lines = [
        "# Settings",
        "",
        "From a TOML file, from variables (`RELAY_PORT`, `RELAY_LIMITS__TOPICS_PER_SOCKET`), flags, or as arguments",
        "of `Relay`. [config/relay.toml](../../config/relay.toml) has them all with their defaults.",
        "",
    ]
    for title, model in _tables(Config, ""):
        heading = f"`{title}`" if title else "At the top"
        lines += [f"## {heading}", "", *_paragraphs(model.__doc__ if title else None)]
        lines += ["| Setting | Type | Default | |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            if _table_of(field) is None:
                cells = (f"`{name}`", f"`{_type(field)}`", _default(field), field.description or "")
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
        return arguments[0], True
    return None


def _type(field: FieldInfo) -> str:
    text = inspect.formatannotation(field.annotation)
    text = re.sub(r"\b(?:typing|pathlib|[a-z_]+(?:\.[a-z_]+)*)\.(?=[A-Z])", "", text)
    return re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", '"').replace(", ", " or "), text)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "" if field.default_factory is not None else "must be set"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def plugin() -> str:
    """What a plugin can hook into, and what its handlers are given."""
    lines = ["# Plugins and `Relay`", "", "With examples: [plugins](../plugins.md), [mounting](../mounting.md).", ""]
    lines += ["## `Plugin`", "", *_docstring(Plugin), *_methods(Plugin)]
    lines += ["## `Relay`", "", *_docstring(Relay), *_methods(Relay)]
    for given in _HANDED:
        lines += [f"## `{given.__name__}`", "", *_docstring(given), *_methods(given)]
    return "\n".join(lines)


def _methods(owner: type) -> Iterator[str]:
    for name, member in vars(owner).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield from (f"### `{name}`", "", *_docstring(member.fget))
        elif isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
            function = inspect.unwrap(getattr(owner, name))
            kind = "async " if inspect.iscoroutinefunction(function) else ""
            yield from (f"### {kind}`{name}`", "", "```python", f"{name}{_signature(function)}", "```", "")
            yield from _docstring(function)


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [parameter for name, parameter in signature.parameters.items() if name not in ("self", "cls")]
    text = str(signature.replace(parameters=parameters))
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])|~", "", text)


def _docstring(owner: Any) -> list[str]:
    """The docstring as Markdown: its parts (Args, Returns, Raises) keep the form that they have in the code."""
    return _paragraphs(inspect.getdoc(owner))


def _paragraphs(text: str | None) -> list[str]:
    lines: list[str] = []
    for paragraph in (text or "").split("\n\n"):
        if re.match(r"[A-Z][a-z]+: ", paragraph) or paragraph.startswith("    "):
            lines += ["```text", *paragraph.splitlines(), "```", ""]
        elif paragraph:
            lines += [*paragraph.replace("``", "`").replace("::\n", ":\n").splitlines(), ""]
    return lines


def http() -> str:
    """The REST interface, out of its own description."""
    relay = Relay(broadcast_url="memory://")
    lines = ["# REST", "", "Below `rest.path`, which is `/api`; with examples: [rest](../rest.md).", ""]
    lines += ["| Request | | Answers |", "|---|---|---|"]
    for path, methods in make_rest(relay).openapi()["paths"].items():
        for method, about in methods.items():
            text = (about.get("description") or about["summary"]).split("\n\n")[0].replace("\n", " ").replace("``", "`")
            lines.append(f"| `{method.upper()} {path}` | {text} | {', '.join(about['responses'])} |")
    return "\n".join(lines) + "\n"


def figures() -> str:
    """What ``/metrics`` tells."""
    lines = ["# Figures", "", "At `/metrics`; what to watch: [metrics](../metrics.md).", ""]
    lines += ["| Name | Label | Kind | Meaning |", "|---|---|---|---|"]
    for figure in FIGURES:
        label = f"`{figure.label}`" if figure.label else ""
        lines.append(f"| `{figure.name}` | {label} | {figure.kind} | {figure.meaning} |")
    return "\n".join(lines) + "\n"
