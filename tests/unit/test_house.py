"""What every module keeps to: its size, its docstring, and constants alone at its top level.

Who may import whom is checked by import-linter, whose contracts are in ``pyproject.toml``.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import relay
from relay import log, logs, server, server_http
from relay.transports import uvicorn_http, uvicorn_websocket

PACKAGE = Path(relay.__file__).parent
LINES_MAX = 500
# A module that is longer, with its own limit and the reason; never above 700.
LONGER: dict[str, tuple[int, str]] = {
    "app": (600, "the whole API of a relay, with its docstrings"),
    "transports.uvicorn_websocket": (
        620,
        "one connection from its upgrade request to its end, and what stands in for asyncio there",
    ),
    "channels.channel": (565, "one join, from its decision to its end, with all that it has in between"),
    "plugins.hooks": (540, "what handlers of every kind are given: the reference of plugins' authors"),
    "config_sections": (570, "every table of the settings, a few lines for each key"),
    "web.prometheus": (545, "every metric with its meaning, a few lines for each"),
    "channels.pubsub": (560, "the bridge between bus and subscribers, in both directions"),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {module: ast.parse(path.read_text("utf-8"), str(path)) for module, path in SOURCES.items()}


def test_modules_are_small_enough_to_be_read_at_once() -> None:
    for module, path in SOURCES.items():
        limit, _ = LONGER.get(module, (LINES_MAX, ""))
        lines = len(path.read_text("utf-8").splitlines())
        assert lines <= limit <= 700, f"{path.relative_to(PACKAGE)} has {lines} lines; expected at most {limit}"
    assert LONGER.keys() <= SOURCES.keys()


def test_modules_have_a_docstring() -> None:
    assert [module for module, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_modules_are_in_the_list_of_the_architecture_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text("utf-8")
    names = {path.name for path in SOURCES.values()} - {"__init__.py", "__main__.py"}
    assert [name for name in sorted(names) if name not in page] == []


COLLABORATORS_MAX = 6


def test_constructors_take_few_collaborators() -> None:
    """What is given together belongs in one object, such as `Telemetry` or `TransportServices`."""
    for module, tree in TREES.items():
        for each in ast.walk(tree):
            if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                names = [arg.arg for arg in (*each.args.posonlyargs, *each.args.args, *each.args.kwonlyargs)][1:]
                text = f"relay.{module}, line {each.lineno}: a constructor takes {len(names)}: {', '.join(names)}"
                assert len(names) <= COLLABORATORS_MAX, f"{text}; expected at most {COLLABORATORS_MAX}"


MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "deque", "defaultdict", "Counter", "OrderedDict", "count", "cycle"}
MUTABLE_CALLS |= {"WeakValueDictionary", "WeakKeyDictionary", "WeakSet", "ContextVar", "Lock", "Event", "Queue"}
MUTABLE_CALLS |= {"RateLimitedLogger", "RateLimitedLoggers"}
CHANGING = {"append", "add", "update", "pop", "popleft", "popitem", "clear", "setdefault", "extend", "insert"}
CHANGING |= {"remove", "discard", "appendleft"}


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in MUTABLE_CALLS
    return False


def held(module: str) -> Iterator[tuple[str, ast.expr | None]]:
    """Names bound by a module's own statements, with their values."""
    for node in TREES[module].body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value


def changed(module: str) -> Iterator[tuple[str, int]]:
    """Names of the module that its functions rebind, or change in place."""
    names = {name for name, _ in held(module)}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Global):
            yield from ((name, node.lineno) for name in node.names)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if isinstance(node.value, ast.Name) and node.value.id in names:
                yield node.value.id, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            if isinstance(node.func.value, ast.Name) and node.func.value.id in names:
                yield node.func.value.id, node.lineno


def test_modules_hold_constants_only() -> None:
    """What can change has one owner, and that is an object which is passed by constructor."""
    for module in SOURCES:
        for name, line in changed(module):
            pytest.fail(f"relay.{module}, line {line}: {name} is changed")
        for name, value in held(module):
            is_constant = name.lstrip("_").isupper() or name == "__all__" or not is_mutable(value)
            assert is_constant, f"relay.{module}: {name} can be changed"


# The front door.


def test_public_names_are_pinned() -> None:
    """Applications import these; a name that goes is a breaking change."""
    assert sorted(relay.__all__) == [
        "AsyncPublisher",
        "BusUnavailable",
        "Config",
        "ConfigError",
        "Event",
        "EventStream",
        "Join",
        "Joined",
        "Leave",
        "Plugin",
        "Published",
        "Publisher",
        "Push",
        "ReceivedEvent",
        "RedisMessage",
        "Refused",
        "Relay",
        "SlowReader",
        "UpgradeRequest",
        "__version__",
    ]


@pytest.mark.parametrize("name", relay.__all__)
def test_public_name_can_be_imported(name: str) -> None:
    assert getattr(relay, name).__doc__


def test_public_names_are_those_that_type_checkers_see() -> None:
    """They are imported on first use, so that they are listed twice."""
    seen = {
        alias.asname or alias.name
        for node in TREES[""].body
        if isinstance(node, ast.If)
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen | {"__version__"} == set(relay.__all__)


def test_name_that_does_not_exist_is_told_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'relay' has no attribute 'Rely'"):
        getattr(relay, "Rely")  # noqa: B009 - a type checker would not let it pass otherwise


def test_version_is_of_three_numbers() -> None:
    assert all(part.isdecimal() for part in relay.__version__.split("."))
    assert relay.__version__.count(".") == 2


def test_former_dotted_paths_lead_to_the_same_classes() -> None:
    """Servers are started with some of them; a logging configuration may name the others."""
    assert server.RelayHTTPProtocol is server_http.RelayHTTPProtocol is uvicorn_http.RelayHTTPProtocol
    assert server.RelayWebSocketProtocol is uvicorn_websocket.RelayWebSocketProtocol
    with pytest.warns(DeprecationWarning, match=r"relay\.logs\.JsonFormatter is now relay\.log\.JsonFormatter"):
        assert logs.JsonFormatter is log.JsonFormatter
    for module in (server, logs):
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            getattr(module, "Nothing")  # noqa: B009 - a type checker would not let it pass otherwise
