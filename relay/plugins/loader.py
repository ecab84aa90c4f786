"""Finding plugins and importing them: entry points, directories, built-ins.

Owns the order in which plugins are loaded: built-ins, then entry points by name, then each directory of
``plugins.paths`` in the order given, its packages by name.
"""

import importlib
import importlib.util
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from relay.config_sections import PluginsConfig
from relay.errors import ConfigError
from relay.plugins import Plugin
from relay.plugins.handlers import check_handler, is_async
from relay.plugins.hooks import Hooks, HookTable
from relay.plugins.routes import describe_route, flat_routes

_logger = logging.getLogger("relay.plugins")

ENTRY_POINTS = "relay.plugins"

_ENTRY_POINT = "entry point "

_PREFIX = "relay_plugin_"
"""Of the names of modules that are plugins of ``plugins.paths``."""

_DEFINITION = re.compile(r"^(?:\w+[^=\n]*=\s*(?:\w+\.)*Plugin\(|(?:async\s+)?def\s+register_plugin\b)", re.MULTILINE)
"""What makes a module a plugin, at its top level."""

_TEST = re.compile(r"test_.*|.*_test|conftest")


@dataclass
class PluginInfo:
    """One plugin that was found, loaded or not."""

    name: str
    source: str
    """Where: ``built-in``, an entry point's value, or a path."""
    plugin: Plugin | None = None
    register: Callable[[Any], object] | None = None
    """Its ``register_plugin(app)``, if it has one."""
    fault: str = ""
    """Why it could not be imported, in one line; empty when it was."""
    others: dict[str, Plugin] = field(default_factory=dict)
    """Further objects of the class Plugin in its modules, by their names."""

    def registers(self) -> list[str]:
        """What it adds, in words: ``on_push room:* new_msg``."""
        lines = []
        if self.plugin is not None:
            for kind, hooks in self.plugin.hooks.entries.items():
                for hook in hooks:
                    what = "service" if kind == "services" else f"on_{kind}"
                    patterns = {"push": f"{hook.topic} {hook.event}", "event": f"{hook.topic} {hook.event}"}
                    shown = patterns.get(kind, hook.topic if kind in ("join", "leave", "redis") else "")
                    lines.append(f"{what} {shown} → {hook.name}".replace("  ", " "))
            for router in self.plugin.routers:
                lines += [f"route {describe_route(path, methods)}" for path, methods in flat_routes(router.routes)]
        if self.register is not None:
            lines.append("register_plugin(app)")
        return lines


@dataclass
class PluginSet:
    """All plugins, and their hooks in the order they are called."""

    found: list[PluginInfo] = field(default_factory=list)
    hooks: Hooks = Hooks()

    @property
    def have_routes(self) -> bool:
        """Whether one of them has routes, or a ``register_plugin``."""
        return any(each.register is not None or (each.plugin and each.plugin.routers) for each in self.found)


def load_plugins(config: PluginsConfig, builtins: tuple[Plugin, ...] = (), last: tuple[Plugin, ...] = ()) -> PluginSet:
    """Find and import all plugins.

    Args:   builtins: those before all others.
            last: those behind all others.
    Raises: ConfigError: one cannot be imported, with its name and reason, unless ``on_error`` is ``skip``.
    """
    found = [PluginInfo(plugin.name, "built-in", plugin) for plugin in dict.fromkeys(builtins)]
    for name, source, load in _enabled(config):
        entry = PluginInfo(name, source)
        try:
            _examine(entry, load())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plugin's import may raise anything
            entry.fault = f"{type(error).__name__}: {error}"
            if config.on_error == "stop":
                shown = "".join(traceback.format_exception(error)).rstrip()
                raise ConfigError(f"plugin {name} ({source}) cannot be loaded: {entry.fault}\n{shown}") from error
            _logger.error("plugin %s (%s) cannot be loaded, going on without: %s", name, source, entry.fault)
        known = next((each for each in found if each.plugin is entry.plugin), None) if entry.plugin else None
        if known is not None:  # its handlers would be called twice
            _logger.info("plugin %s (%s) is loaded already, as %s", name, source, known.name)
            entry.plugin = None
        if known is None or entry.register is not None:
            found.append(entry)
    found += [PluginInfo(plugin.name, "built-in", plugin) for plugin in last]
    table = HookTable()
    for entry in found:
        for kind, hooks in entry.plugin.hooks.entries.items() if entry.plugin else ():
            for hook in hooks:
                table.add(kind, hook)
    for entry in found:
        if entry.plugin is not None:
            entry.plugin.is_loaded = True
    _check_others(found, config)
    return PluginSet(found, table.freeze())


def check_plugins(plugins: object) -> None:
    """Check what an application gives as ``extra_plugins``. Raises TypeError."""
    wrong: list[object] = [plugins]
    if isinstance(plugins, tuple | list):
        wrong = [each for each in plugins if not isinstance(each, Plugin)]
    if wrong:
        text = "extra_plugins: expected objects of the class Plugin in a tuple, (plugin,)"
        raise TypeError(f"{text}, got {wrong[0]!r:.200}")


def _check_others(found: list[PluginInfo], config: PluginsConfig) -> None:
    """Refuse a second plugin in a package, of which relay takes the one named ``plugin`` alone. Raises ConfigError."""
    for entry in found:
        for name, other in entry.others.items():
            if not other.is_loaded and (other.hooks.entries or other.routers):
                text = (
                    f"plugin {entry.name} ({entry.source}): expected one Plugin in a package, which is called plugin; "
                    f"{name} = {other!r} would not be loaded: move its handlers to that one, or to a package of its own"
                )
                if config.on_error == "stop":
                    raise ConfigError(text)
                entry.fault = text
                _logger.error("%s", text)


def _enabled(config: PluginsConfig) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """The `candidates` that are not disabled. Raises ConfigError, too, where a directory has a name of another."""
    sources: dict[str, str] = {}
    for name, source, load in candidates(config):
        if name in config.disabled:
            continue
        if name in sources and not source.startswith(_ENTRY_POINT):  # others' entry points cannot be renamed
            raise ConfigError(
                f"plugins.paths: expected plugins of different names, got two of the name {name}: "
                f"{sources[name]} and {source}; rename a directory"
            )
        sources[name] = source
        yield name, source, load


def candidates(config: PluginsConfig) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Name, source and import of each plugin there is, disabled or not, without importing any.

    Raises ConfigError: a directory has no plugin, or cannot be read.
    """
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        yield entry.name, f"{_ENTRY_POINT}{entry.value}", entry.load
    for directory in {os.path.realpath(path): path for path in config.paths}.values():
        for package in _packages(directory):
            yield package.name, str(package), partial(_import_package, package / "__init__.py")


def _packages(directory: Path) -> list[Path]:
    """The packages in a directory, by name.

    Raises ConfigError: there are none, it cannot be read, or a plugin in it would be passed over.
    """
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"plugins.paths: {directory} is not a directory") from None
    except OSError as error:
        raise _unreadable(directory, error) from None
    found = [directory / name for name in names if _is_package(directory / name)]
    if found:
        for name in names:
            if directory / name not in found:
                _check_is_no_plugin(directory / name)
        return found
    modules = [name.removesuffix(".py") for name in names if name.endswith(".py") and name != "__init__.py"]
    if "__init__.py" in names:
        advice = _advice_on_package(directory)
    elif modules:
        advice = f"move {modules[0]}.py to {modules[0]}/__init__.py"
    else:
        advice = "remove it from plugins.paths if there are no plugins"
    raise ConfigError(
        f"plugins.paths: expected packages in {directory}, such as {directory / 'chat' / '__init__.py'}, "
        f"found {', '.join(names[:5]) or 'nothing'}; {advice}"
    )


def _advice_on_package(directory: Path) -> str:
    return f"it is a package itself: write the directory that it is in, {directory.absolute().parent}"


def _check_is_no_plugin(path: Path) -> None:
    """Refuse a plugin that is no package: it may be the one that authorizes. Raises ConfigError."""
    name = path.name.removesuffix(".py")
    if not _is_name(name) or _TEST.fullmatch(name):
        return
    modules = [path] if path.suffix == ".py" else sorted(path.glob("*.py"))
    defining = next((module for module in modules if _DEFINITION.search(_text_of(module))), None)
    if defining is not None:
        is_init = name == "__init__"
        advice = f"move it to {name}/__init__.py, or out of this directory"
        raise ConfigError(
            f"plugins.paths: expected plugins in {path.parent} as packages, found one in "
            f"{defining.relative_to(path.parent)}, which would not be loaded; "
            f"{_advice_on_package(path.parent) if is_init else advice}"
        )
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"plugins.paths: {path} is a link to what is not there; mend it, or remove it")


def _text_of(module: Path) -> str:
    try:
        return module.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _is_package(path: Path) -> bool:
    """Whether it has an ``__init__.py``. Raises ConfigError where that cannot be seen of what may be a plugin."""
    try:
        _ = os.stat(path / "__init__.py")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if not _is_name(path.name):  # lost+found
            return False
        raise _unreadable(path, error) from None
    return True


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"plugins.paths: expected a directory that relay can read, got {path}: {error.strerror}; "
        "permit the user that runs relay to read it"
    )


def _is_name(name: str) -> bool:
    return f"{_PREFIX}{name}".replace("-", "_").isidentifier()


def _import_package(init: Path) -> ModuleType:
    """Import a package by its path, under a name of its own: one called ``json`` hides no other module."""
    name = f"{_PREFIX}{init.parent.name}"
    if not _is_name(init.parent.name):
        raise ImportError("expected a directory name of letters, digits, - and _")
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    # What another relay of this process has imported is that one's own, its modules below the package too: they would
    # not be executed again, and so add no handler to this relay's plugin.
    _forget_modules(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        _forget_modules(name)
        raise
    return module


def _modules_of(name: str) -> dict[str, ModuleType]:
    """A package and its modules, as far as they are imported, by name."""
    return {each: module for each, module in sys.modules.items() if each == name or each.startswith(f"{name}.")}


def _modules_to_look_at(thing: object) -> tuple[ModuleType, ...]:
    """Where further plugins may be: in all of a package of ``plugins.paths``, of an entry point in its module alone."""
    if not isinstance(thing, ModuleType):
        return ()
    return tuple(_modules_of(thing.__name__).values()) if thing.__name__.startswith(_PREFIX) else (thing,)


def _forget_modules(name: str) -> None:
    for each in _modules_of(name):
        del sys.modules[each]


@dataclass
class _Registration:
    """A plugin's ``register_plugin``, whose faults name the plugin. Raises ConfigError."""

    entry: PluginInfo
    register: Callable[[Any], object]

    def __call__(self, app: Any) -> None:
        try:
            _ = self.register(app)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # it may raise anything
            fault = f"its register_plugin raised {type(error).__name__}: {error}"
            raise ConfigError(f"plugin {self.entry.name} ({self.entry.source}): {fault}") from error


def _examine(entry: PluginInfo, thing: object) -> None:
    """Take out of a module, or of what an entry point names, what makes it a plugin."""
    if isinstance(thing, Plugin):
        entry.plugin = thing
        return
    plugin = getattr(thing, "plugin", None)
    register = getattr(thing, "register_plugin", None)
    if isinstance(plugin, Plugin):
        entry.plugin = plugin
    for module in _modules_to_look_at(thing):
        entry.others |= {name: each for name, each in vars(module).items() if isinstance(each, Plugin)}
    if callable(register):
        check_handler("register_plugin", register, "app")
        if is_async(register):
            raise TypeError("register_plugin: expected a plain function (def): its result is not awaited")
        entry.register = _Registration(entry, register)
    if entry.plugin is None and entry.register is None:
        raise ImportError('expected `plugin = Plugin("name")` or `def register_plugin(app)` in it, found neither')
