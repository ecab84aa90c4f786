"""tangram in the relay's process: its page, and its plugins with their routes, lifespans and services, unchanged.

``TANGRAM_CONFIG`` names tangram's own file, whose ``core.plugins`` are loaded and whose ``channel.public_url`` is the
relay's address. Its channel service is not started. The page is served at ``/``: set ``plugins.path = "/"`` and
``demo_page = false``. A service that fails, as tangram's do when Redis is restarted, is started again.
"""

import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
from fastapi import FastAPI
from redis.asyncio import Redis
from tangram_core import BackendState, Config
from tangram_core.backend import create_app, load_enabled_plugins

from relay import Plugin, Relay

plugin = Plugin("tangram_plugins")

config = Config.from_file(os.environ.get("TANGRAM_CONFIG", "tangram.toml"))
loaded = load_enabled_plugins(config)
opened = AsyncExitStack()
state: BackendState | None = None


@plugin.on_startup
async def start(relay: Relay) -> None:
    """Make what tangram gives its plugins, and enter their lifespans."""
    global state
    redis: Any = await opened.enter_async_context(Redis.from_url(config.core.redis_url))
    http = await opened.enter_async_context(httpx.AsyncClient(http2=True))
    state = BackendState(redis_client=redis, http_client=http, config=config)
    for each in loaded:
        if each.lifespan is not None:
            await opened.enter_async_context(each.lifespan(state))


def register_plugin(app: FastAPI) -> None:
    """Add tangram's page and the routes of its plugins."""
    assert state is not None, "on_startup has made it"
    page = create_app(state, loaded)
    page.state.backend_state = state
    app.mount("/", page)


@plugin.on_shutdown
async def stop(relay: Relay) -> None:
    """Leave the lifespans, and close the connections."""
    await opened.aclose()


def supervised(service: Callable[[BackendState], Awaitable[None]]) -> None:
    """Have the relay run a service of tangram's, and start it again when it fails."""

    async def run(relay: Relay) -> None:
        assert state is not None, "on_startup has made it"
        await service(state)

    run.__name__ = f"{service.__module__}.{service.__name__}"
    plugin.service(run)


for each in loaded:
    for _, service in sorted(each.services, key=lambda entry: (entry[0], entry[1].__name__)):
        supervised(service)
