"""The relay in tangram's own process: one port for its page, its plugins and its sockets, and no other origin.

tangram's file names it among ``core.plugins``, turns the channel service off and says where the page finds the relay:
at tangram's own address. ``RELAY_CONFIG`` names the relay's file, such as ``config/tangram.toml``.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import tangram_core
from fastapi import APIRouter
from starlette.routing import Route, WebSocketRoute

from relay import Relay


class Endpoint:
    """Passes requests on to the relay, which is made when tangram starts."""

    relay: Relay | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert self.relay is not None, "tangram's lifespan has made it"
        await self.relay(scope, receive, send)


endpoint = Endpoint()
router = APIRouter()
router.routes += [Route("/token", endpoint), Route("/sse", endpoint), WebSocketRoute("/websocket", endpoint)]


@asynccontextmanager
async def lifespan(state: tangram_core.BackendState) -> AsyncIterator[None]:
    """Run the relay as long as tangram runs."""
    endpoint.relay = Relay.from_file(os.environ.get("RELAY_CONFIG", "relay.toml"))
    async with endpoint.relay.lifespan():
        yield


plugin = tangram_core.Plugin(routers=[router], lifespan=lifespan)
