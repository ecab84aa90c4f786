"""The HTTP routes of plugins: their routers, and what their ``register_plugin(app)`` adds.

Owns when they are added, to which app, and the background tasks that come with them; must not know what they answer.

Routers are added when the relay is made. ``register_plugin`` is called when it starts, inside the running event loop,
with a set ``app.state.background_tasks``: seed-era plugins of tangram create tasks there. Both are undone at the stop,
so that a relay may be started again.
"""

import asyncio
import logging
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Match, Mount, Router, compile_path

from relay.errors import ConfigError
from relay.node import Components
from relay.paths import segments
from relay.plugins.loader import PluginInfo, PluginSet
from relay.plugins.routes import describe_route, flat_routes, sample_path
from relay.version import __version__
from relay.web.own_paths import OwnPaths
from relay.web.pages import docs_routes
from relay.web.rest import answer_problems

_logger = logging.getLogger("relay.plugins")


_ANY = "~"
"""Stands for a parameter of any text, where another route may have text that people write."""


class OwnRoutes(NamedTuple):
    """The relay's own routes, which are tried before those of plugins."""

    app: Starlette
    prefix: str = ""
    """What stands before the paths of plugins' routes, as the relay's own routes see them."""
    paths: OwnPaths | None = None
    """Those of sockets, which are no routes."""


class _Tasks(set["asyncio.Task[Any]"]):
    """Background tasks of plugins; the end of one by an error is logged."""

    def add(self, task: "asyncio.Task[Any]", /) -> None:
        """Keep a task until it ends."""
        if task not in self:
            super().add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _logger.error("background task %s of a plugin failed", task.get_name(), exc_info=error)


class PluginRoutes:
    """The routes of all plugins, in one app.

    Args: app: what they are added to.
          own: what comes before them; None where that is up to the owner of the app.
    """

    def __init__(self, plugins: PluginSet, app: FastAPI, own: OwnRoutes | None = None) -> None:
        self._plugins = plugins
        self._app = app
        self._own = own
        self._own_routes = [] if own is None else list(own.app.routes)
        self._tasks: _Tasks | None = None
        self._added: list[BaseRoute] = []
        for found in plugins.found:
            for router in found.plugin.routers if found.plugin else ():
                app.include_router(router)

    def check(self) -> None:
        """Check that the routers' routes can be reached. Raises ConfigError, which names both that clash."""
        _ = self._check_routers()

    def _check_routers(self) -> "list[_Taken]":
        taken: list[_Taken] = []
        for found in self._plugins.found:
            for router in found.plugin.routers if found.plugin else ():
                self._check(found, router.routes, taken)
        return taken

    def register(self) -> None:
        """Call ``register_plugin`` of all plugins. Raises ConfigError, which names the plugin."""
        taken = self._check_routers()
        if getattr(self._app.state, "background_tasks", None) is None:
            self._tasks = self._app.state.background_tasks = _Tasks()
        self._app.openapi_schema = None
        for found in self._plugins.found:
            if found.register is not None:
                before = list(self._app.router.routes)
                try:
                    found.register(self._app)
                finally:
                    added = [route for route in self._app.router.routes if not _is_in(route, before)]
                    self._added += added
                self._check(found, added, taken)

    def forget(self) -> "_Tasks | None":
        """Take away what ``register_plugin`` has added; returns the background tasks."""
        routes = self._app.router.routes
        routes[:] = [route for route in routes if not _is_in(route, self._added)]
        self._added.clear()
        self._app.openapi_schema = None
        tasks, self._tasks = self._tasks, None
        if tasks is not None:
            self._app.state.background_tasks = None
        return tasks

    async def stop(self, timeout_s: float) -> None:
        """Take away what ``register_plugin`` has added, and cancel the background tasks.

        Args: timeout_s: seconds for them to end; one that ignores its cancellation is left behind.
        """
        waiting = tuple(self.forget() or ())
        for task in waiting:
            task.cancel()
        if waiting:
            _ = await asyncio.wait(waiting, timeout=timeout_s)

    def _check(self, found: PluginInfo, added: Iterable[Any], taken: "list[_Taken]") -> None:
        if self._own is None:
            return
        for path, methods in flat_routes(added):
            for other in taken:
                if other.plugin != found.name and other.answers(path, methods):
                    which = "the same route" if other.path == path else f"the route {other.path}"
                    raise _clash(found, path, methods, f"{which} of plugin {other.plugin}")
            if (by := self._answered_by(self._own, path, methods)) is not None:
                raise _clash(found, path, methods, f"the relay's own {by}")
            taken.append(_Taken(path, methods, found.name))

    def _answered_by(self, own: OwnRoutes, path: str, methods: set[str]) -> str | None:
        """Which of the relay's own routes answers a path before a plugin's does."""
        sample = own.prefix + sample_path(path) or "/"
        if own.paths is not None and own.paths.is_for_sockets(segments(sample)):
            return sample
        scope: dict[str, Any] = {"type": "http", "path": sample, "root_path": "", "headers": []}
        for route in self._own_routes:
            for method in sorted(methods) or ["GET"]:
                match, _ = route.matches(scope | {"method": method})
                # Outside the REST app a route answers for its path whatever the method is.
                if match is Match.FULL or (match is Match.PARTIAL and own.paths is not None):
                    return "demo page at / (demo_page = false turns it off)" if sample == "/" else sample
        return None


class _Taken(NamedTuple):
    """A route of a plugin."""

    path: str
    methods: set[str]
    plugin: str

    def answers(self, path: str, methods: set[str]) -> bool:
        """Say whether it answers a path of a later plugin, for one of its methods; without methods it answers all."""
        if self.methods and methods and not self.methods & methods:
            return False
        if self.path == path or not self.methods or "{" not in self.path:
            return self.path == path
        return compile_path(self.path)[0].match(sample_path(path, _ANY)) is not None


def _is_in(route: BaseRoute, routes: Iterable[BaseRoute]) -> bool:
    return any(route is other for other in routes)


def _clash(found: PluginInfo, path: str, methods: set[str], other: str) -> ConfigError:
    text = (
        f"its route {describe_route(path, methods)} clashes with {other}, which is tried first; give it another prefix"
    )
    return ConfigError(f"plugin {found.name} ({found.source}): {text}, or set plugins.path")


def place_plugin_routes(
    components: Components, paths: OwnPaths, http: Starlette, rest: FastAPI | None, given: FastAPI | None
) -> PluginRoutes:
    """Add the routes of plugins where the settings want them.

    Args: http: what the relay answers over HTTP.
          rest: its REST interface; None where there is none.
          given: the app of its owner that shall have them instead.
    """
    plugins, path = components.plugins, components.config.plugins.path
    if given is not None:
        return PluginRoutes(plugins, given)
    if not path and rest is not None:
        return PluginRoutes(plugins, rest, OwnRoutes(rest))
    app = FastAPI(title="plugins of relay", version=__version__, redirect_slashes=False, docs_url=None, redoc_url=None)
    answer_problems(app)
    if path:
        mount = Mount(path.rstrip("/"), app)
        mount.path_regex = re.compile(mount.path_regex.pattern, re.DOTALL)
        http.router.routes += docs_routes(path.rstrip("/"))
        # Tried only where no route of the relay's own knows the path, whatever the method.
        http.router.default = Router([mount], redirect_slashes=False, default=http.router.default)
    return PluginRoutes(plugins, app, OwnRoutes(http, path.rstrip("/"), paths))
