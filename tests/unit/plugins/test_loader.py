"""Plugins are found in three ways, loaded in a known order, and named when they fail."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI

from relay import Relay
from relay.config_sections import PluginsConfig
from relay.errors import ConfigError
from relay.plugins import Plugin, loader
from relay.plugins.loader import PluginInfo, PluginSet, load_plugins

PLUGIN = """
from relay import Plugin

plugin = Plugin("{name}")

@plugin.on_push("{name}:*", "say")
def say(push): ...
"""

ZETA = "entry point entry_zeta"
REGISTER = "async def helper(): ...\n\ndef register_plugin(app):\n    app.state.x = 1\n"


def write(directory: Path, name: str, text: str | None = None) -> Path:
    package = directory / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PLUGIN.format(name=name) if text is None else text)
    return package


def load(*paths: Path, builtins: tuple[Plugin, ...] = (), **settings: Any) -> PluginSet:
    return load_plugins(PluginsConfig(paths=paths, **settings), builtins)


@pytest.fixture(autouse=True)
def leave_no_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("relay_plugin_", "entry_")):
            del sys.modules[name]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on ``sys.path`` with a distribution whose entry points are two plugins and a broken one."""
    directory = tmp_path / "site"
    info = directory / "some_plugins-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[relay.plugins]\nzeta = entry_zeta\nalpha = entry_alpha:chat\n\n[other]\nx = y\n"
    )
    (directory / "entry_zeta.py").write_text(PLUGIN.format(name="zeta"))
    (directory / "entry_alpha.py").write_text(PLUGIN.format(name="alpha") + "\nchat = plugin\n")
    monkeypatch.syspath_prepend(str(directory))
    return directory


# Finding.


def test_without_any_plugin_nothing_is_loaded() -> None:
    loaded = load()
    assert loaded.found == []
    assert loaded.hooks.push == ()


def test_plugins_come_from_built_ins_then_entry_points_then_directories(installed: Path, tmp_path: Path) -> None:
    """In this order their handlers are called."""
    for directory, name in (("two", "b"), ("one", "d"), ("one", "c")):
        write(tmp_path / directory, name)
    builtin = Plugin("builtin")
    builtin.on_push()(print)
    loaded = load(tmp_path / "two", tmp_path / "one", builtins=(builtin,))
    names = ["builtin", "alpha", "zeta", "b", "c", "d"]
    assert [found.name for found in loaded.found] == names
    assert [hook.plugin for hook in loaded.hooks.push] == names
    assert [found.source for found in loaded.found] == [
        "built-in",
        "entry point entry_alpha:chat",
        "entry point entry_zeta",
        str(tmp_path / "two" / "b"),
        str(tmp_path / "one" / "c"),
        str(tmp_path / "one" / "d"),
    ]
    assert not any(found.fault for found in loaded.found)


def test_disabled_plugins_are_not_even_imported(installed: Path, tmp_path: Path) -> None:
    write(tmp_path / "plugins", "broken", "raise RuntimeError")
    loaded = load(tmp_path / "plugins", disabled=("broken", "zeta"))
    assert [found.name for found in loaded.found] == ["alpha"]
    assert "entry_zeta" not in sys.modules


def test_only_packages_of_a_directory_are_plugins(tmp_path: Path) -> None:
    write(tmp_path, "chat")
    write(tmp_path, ".hidden", "raise RuntimeError")
    (tmp_path / "module.py").write_text("raise RuntimeError")
    (tmp_path / "directory").mkdir()
    assert [found.name for found in load(tmp_path).found] == ["chat"]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ((), "found nothing; remove it from plugins.paths if there are no plugins"),
        (("chat.py", "notes.txt"), "found chat.py, notes.txt; move chat.py to chat/__init__.py"),
        (("__init__.py", "parts.py"), "found __init__.py, parts.py; it is a package itself: write the directory that"),
        ((".hidden/__init__.py", "chat/plugin.py"), "found chat; remove it"),
    ],
)
def test_directory_without_a_plugin_stops_the_start(tmp_path: Path, files: tuple[str, ...], text: str) -> None:
    """What is in it may be what authorizes."""
    directory = tmp_path / "plugins"
    directory.mkdir()
    for file in files:
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_text(PLUGIN.format(name="chat"))
    expected = f"plugins.paths: expected packages in {directory}, such as {directory}/chat/__init__.py, {text}"
    for on_error in ("stop", "skip"):
        with pytest.raises(ConfigError, match=f"^{re.escape(expected)}"):
            load(directory, on_error=on_error)


@pytest.mark.parametrize("file", ["auth.py", "auth/plugin.py", "my-auth.py"])
@pytest.mark.parametrize("text", [PLUGIN.format(name="auth"), "import relay\nguard: X = relay.Plugin('g')\n", REGISTER])
def test_plugin_that_is_no_package_stops_the_start(tmp_path: Path, file: str, text: str) -> None:
    """It would be passed over, and may be the one that authorizes."""
    write(tmp_path, "chat")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    name = file.partition("/")[0].removesuffix(".py")
    for on_error in ("stop", "skip"):
        with pytest.raises(ConfigError, match=rf"found one in {file}, .*; move it to {name}/__init__\.py"):
            load(tmp_path, on_error=on_error)


def test_what_is_no_plugin_may_lie_beside_packages(tmp_path: Path) -> None:
    write(tmp_path, "chat")
    for file in ("test_chat.py", "conftest.py", "chat.bak.py", "notes.txt", "lost+found/plugin.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(PLUGIN.format(name="chat"))
    for file in ("helpers.py", "__init__.py"):
        (tmp_path / file).write_text("def make(): return Plugin('x')\n")
    assert [found.name for found in load(tmp_path).found] == ["chat"]


def test_package_with_packages_in_it_is_not_taken_for_their_directory(tmp_path: Path) -> None:
    write(write(tmp_path, "chat"), "parts")
    with pytest.raises(
        ConfigError, match=rf"found one in __init__\.py, .*: write the directory that it is in, {tmp_path}"
    ):
        load(tmp_path / "chat")


def test_link_to_a_plugin_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    write(tmp_path, "chat")
    (tmp_path / "auth").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="auth is a link to what is not there"):
        load(tmp_path)


@pytest.mark.parametrize("below", [False, True])
def test_second_plugin_of_a_package_stops_the_start(tmp_path: Path, below: bool) -> None:
    second = "from relay import Plugin\nguard = Plugin('guard')\n@guard.on_join('*')\ndef join(join): ...\n"
    package = write(tmp_path, "chat", PLUGIN.format(name="chat") + ("from . import parts" if below else second))
    (package / "parts.py").write_text(second)
    with pytest.raises(ConfigError, match=r"^plugin chat .*; guard = <Plugin guard \(join: 1\)> would not be loaded"):
        load(tmp_path)
    (found,) = load(tmp_path, on_error="skip").found
    assert (found.plugin and found.plugin.name, "would not be loaded" in found.fault) == ("chat", True)


def test_plugin_of_another_package_may_be_imported(tmp_path: Path, installed: Path) -> None:
    text = "from entry_alpha import chat\nfrom entry_zeta import plugin as zeta\nfrom relay import Plugin\n"
    write(tmp_path / "own", "chat", text + "unused = Plugin('unused')\nplugin = Plugin('own')\n")
    assert [found.fault for found in load(tmp_path / "own").found] == ["", "", ""]


def test_directory_whose_plugins_are_all_disabled_is_no_fault(tmp_path: Path) -> None:
    write(tmp_path, "chat")
    assert load(tmp_path, disabled=("chat",)).found == []


@pytest.mark.parametrize("which", ["", "chat"])
def test_directory_that_cannot_be_read_stops_the_start(
    tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "chat")
    write(tmp_path, "works")
    refused = {tmp_path: "listdir"} if not which else {tmp_path / "chat" / "__init__.py": "stat"}

    def refuse(of: str, path: Path, **options: Any) -> Any:
        if refused.get(path) == of:
            raise PermissionError(13, "Permission denied", path)
        return real[of](path, **options)

    real: dict[str, Any] = {"listdir": os.listdir, "stat": os.stat}
    monkeypatch.setattr(loader, "os", SimpleNamespace(path=os.path, **{of: partial(refuse, of) for of in real}))
    text = f"got {tmp_path / which}: Permission denied; permit the user that runs relay to read it"
    with pytest.raises(ConfigError, match=re.escape(text)):
        load(tmp_path)


def test_directory_that_no_plugin_can_be_in_need_not_be_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "chat")
    (tmp_path / "lost+found").mkdir()

    def stat(path: Path) -> os.stat_result:
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", path)
        return os.stat(path)

    monkeypatch.setattr(loader, "os", SimpleNamespace(path=os.path, listdir=os.listdir, stat=stat))
    assert [found.name for found in load(tmp_path).found] == ["chat"]


def test_directory_that_is_given_twice_is_loaded_once(tmp_path: Path) -> None:
    write(tmp_path / "one", "chat")
    write(tmp_path / "two", "b")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    paths = (tmp_path / "one", tmp_path / "two", tmp_path / "one" / ".." / "one", tmp_path / "link")
    assert [found.name for found in load(*paths).found] == ["chat", "b"]


def test_second_plugin_of_one_name_stops_the_start(installed: Path, tmp_path: Path) -> None:
    """Both would be one module."""
    one, two = write(tmp_path / "one", "chat"), write(tmp_path / "two", "chat")
    for on_error in ("stop", "skip"):
        with pytest.raises(ConfigError) as raised:
            load(tmp_path / "one", tmp_path / "two", on_error=on_error)
        assert str(raised.value).endswith(f"got two of the name chat: {one} and {two}; rename a directory")
    assert [found.name for found in load(one.parent, two.parent, disabled=("chat",)).found] == ["alpha", "zeta"]
    alpha = write(tmp_path / "three", "alpha")
    with pytest.raises(ConfigError, match=f"entry point entry_alpha:chat and {re.escape(str(alpha))}; rename"):
        load(tmp_path / "three")


def test_directory_that_is_none_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.paths: .*nowhere is not a directory"):
        load(tmp_path / "nowhere")


def test_package_is_imported_under_a_name_of_its_own(tmp_path: Path) -> None:
    """One called ``json`` hides nobody else's; its own parts are imported as those of any package."""
    package = write(tmp_path, "json", "from json import dumps\nfrom .parts import plugin\ntext = dumps({})\n")
    (package / "parts.py").write_text("from relay import Plugin\nplugin = Plugin('parts')\n")
    [found] = load(tmp_path).found
    assert found.plugin is not None
    assert found.plugin.name == "parts"
    import json

    assert "plugins" not in str(json.__file__)
    assert isinstance(sys.modules["relay_plugin_json.parts"], ModuleType)


def test_directory_may_have_a_hyphen_in_its_name(tmp_path: Path) -> None:
    package = write(tmp_path, "my-chat", "from .parts import plugin")
    (package / "parts.py").write_text("from relay import Plugin\nplugin = Plugin('my-chat')\n")
    assert [found.name for found in load(tmp_path).found] == ["my-chat"]


def test_each_relay_has_plugins_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, "chat")
    one, two = load(tmp_path), load(tmp_path)
    assert one.found[0].plugin is not two.found[0].plugin


def test_each_relay_has_the_handlers_of_all_modules_of_a_package(tmp_path: Path) -> None:
    package = write(tmp_path, "parts", "from relay import Plugin\n\nplugin = Plugin('parts')\n\nfrom . import joins\n")
    (package / "joins.py").write_text("from . import plugin\n\n@plugin.on_join('*')\ndef guard(join): ...\n")
    first, second = load(tmp_path), load(tmp_path)
    assert [hook.name for hook in second.hooks.join] == [hook.name for hook in first.hooks.join] == ["guard"]
    assert first.hooks.join != second.hooks.join


def test_plugin_that_is_found_twice_is_loaded_once(installed: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each push would be handled twice, and each event published twice."""
    caplog.set_level(logging.INFO)
    (alpha,) = (each.plugin for each in load().found if each.name == "alpha")
    assert alpha is not None
    loaded = load(builtins=(alpha, alpha))
    assert [(found.name, found.source) for found in loaded.found] == [("alpha", "built-in"), ("zeta", ZETA)]
    assert [hook.plugin for hook in loaded.hooks.push] == ["alpha", "zeta"]
    assert "plugin alpha (entry point entry_alpha:chat) is loaded already, as alpha" in caplog.messages


@pytest.mark.parametrize(
    "given", [Plugin("p"), (Plugin,), [ModuleType("chat")], ModuleType("chat"), None, {Plugin("p")}]
)
def test_extra_plugins_that_are_none_are_told(given: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^extra_plugins: expected objects of the class Plugin in a tuple, \(plugin,\), got "
    ):
        _ = Relay(broadcast_url="memory://", extra_plugins=given)


def test_register_plugin_may_stand_alone_or_beside_a_plugin(tmp_path: Path) -> None:
    write(tmp_path, "alone", "def register_plugin(app): app.append('alone')")
    write(tmp_path, "both", PLUGIN.format(name="both") + "\ndef register_plugin(app): app.append('both')")
    alone, both = load(tmp_path).found
    assert alone.plugin is None
    assert both.plugin is not None
    app: list[str] = []
    for found in (alone, both):
        assert found.register is not None
        found.register(app)
    assert app == ["alone", "both"]


# Failing.

FAULTS = {
    "raises": ("raise RuntimeError('no database')", "RuntimeError: no database"),
    "ends": ("import sys\nsys.exit('usage')", "SystemExit: usage"),
    "panics": ("class Panic(BaseException): ...\nraise Panic('in Rust')", "Panic: in Rust"),
    "misspelt": ("def register_plugin(app:", "SyntaxError: "),
    "lacks": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    "empty": ("", 'ImportError: expected `plugin = Plugin("name")` or `def register_plugin(app)` in it, found neither'),
    "mistaken": ("plugin = 'chat'", "ImportError: expected `plugin = "),
    "not.a.name": ("", "ImportError: expected a directory name of letters, digits, - and _"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_plugin_that_cannot_be_imported_stops_the_start_with_its_name_and_reason(tmp_path: Path, name: str) -> None:
    text, reason = FAULTS[name]
    package = write(tmp_path, name, text)
    with pytest.raises(ConfigError) as raised:
        load(tmp_path)
    message = str(raised.value)
    assert message.startswith(f"plugin {name} ({package}) cannot be loaded: {reason}")
    assert "Traceback (most recent call last):" in message


def test_half_imported_package_is_forgotten(tmp_path: Path) -> None:
    write(tmp_path, "broken", "half = 1\nraise RuntimeError")
    load(tmp_path, on_error="skip")
    assert "relay_plugin_broken" not in sys.modules


def test_on_error_skip_goes_on_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, (text, _) in FAULTS.items():
        write(tmp_path, name, text)
    write(tmp_path, "works")
    loaded = load(tmp_path, on_error="skip")
    assert {found.name for found in loaded.found if found.fault} == set(FAULTS)
    assert [hook.plugin for hook in loaded.hooks.push] == ["works"]
    for found in loaded.found:
        if found.fault:
            assert found.fault.startswith(FAULTS[found.name][1])
            assert found.registers() == []
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == len(FAULTS)
    assert any("raises" in text and "RuntimeError: no database" in text for text in errors)


def test_entry_point_that_fails_is_named_too(installed: Path) -> None:
    (installed / "entry_zeta.py").write_text("raise RuntimeError('boom')")
    with pytest.raises(
        ConfigError, match=r"plugin zeta \(entry point entry_zeta\) cannot be loaded: RuntimeError: boom"
    ):
        load()


def test_register_plugin_that_raises_is_named_too(tmp_path: Path) -> None:
    package = write(tmp_path, "chat", "def register_plugin(app): app.no_such_method()")
    [found] = load(tmp_path).found
    assert found.register is not None
    with pytest.raises(ConfigError) as raised:
        found.register(FastAPI())
    assert str(raised.value).startswith(f"plugin chat ({package}): its register_plugin raised AttributeError: ")


# Listing.


def test_list_says_what_each_plugin_registers() -> None:
    plugin = Plugin("chat")
    router = APIRouter(prefix="/chat")
    plugin.include_router(router)

    @router.get("/rooms")
    async def rooms() -> None: ...

    router.mount("/files", FastAPI())

    @plugin.on_join("room:*")
    def join(join: object) -> None: ...

    @plugin.on_leave("room:*")
    def leave(leave: object) -> None: ...

    @plugin.on_push("room:*", "say")
    def say(push: object) -> None: ...

    @plugin.on_event("room:*")
    def change(event: Any) -> Any: ...

    @plugin.on_redis("feed*")
    def feed(message: object, relay: object) -> None: ...

    @plugin.service
    async def clock(relay: object) -> None: ...

    @plugin.on_startup
    def begin(relay: object) -> None: ...

    lines = [
        line.replace(f"{test_list_says_what_each_plugin_registers.__name__}.<locals>.", "")
        for line in PluginInfo("chat", "built-in", plugin, print).registers()
    ]
    assert lines == [
        "on_join room:* → join",
        "on_leave room:* → leave",
        "on_push room:* say → say",
        "on_event room:* * → change",
        "on_redis feed* → feed",
        "service → clock",
        "on_startup → begin",
        "route GET /chat/rooms",
        "route /files",
        "register_plugin(app)",
    ]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("@plugin.on_push\nasync def handler(push): ...", "on_push: expected parentheses"),
        ("@plugin.on_join()\nasync def handler(): ...", r"on_join: handler \(.*__init__\.py:\d+\) cannot be called"),
        ("def register_plugin(): ...", r"register_plugin: .* cannot be called as handler\(app\)"),
        ("async def register_plugin(app): ...", "register_plugin: expected a plain function"),
    ],
)
def test_mistake_of_a_plugin_is_told_at_import_with_its_name(tmp_path: Path, text: str, word: str) -> None:
    write(tmp_path, "chat", f'from relay import Plugin\nplugin = Plugin("chat")\n{text}\n')
    with pytest.raises(ConfigError, match=f"plugin chat .*{word}"):
        load(tmp_path)
