"""A connection to a running relay, as its clients make it.

Owns the address, the token on the way there, and the words for a connection that is refused or lost.
"""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from relay.commands.terminal import Failed
from relay.config import Config
from relay.errors import ConfigError

TIMEOUT_S = 10.0
"""For the connection, and for each reply."""


def host_of(settings: Config) -> str:
    """Host and port at which a program on this machine reaches a relay with these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"


def socket_url(settings: Config, url: str | None, name: str = "--url") -> str:
    """The address of a relay's socket, the one of the settings where none is given. Raises ConfigError."""
    url = url or f"ws://{host_of(settings)}{settings.socket_paths[0]}"
    if not url.startswith(("ws://", "wss://")):
        raise ConfigError(f"{name}: expected ws://… or wss://…, got {url!r}")
    return f"{url.rstrip('/')}/websocket?vsn=2.0.0"


@asynccontextmanager
async def connected(url: str, token: str | None, **options: Any) -> AsyncIterator[ClientConnection]:
    """Connect for the duration of the block.

    Args:   url: as of `socket_url`.
            options: further ones of websockets.
    Raises: Failed: it was refused, with status and reason, or lost; in the block too.
    """
    subprotocols = None
    if token:
        text = base64.b64encode(token.encode(), altchars=b"+_").rstrip(b"=").decode()
        subprotocols = [Subprotocol("phoenix"), Subprotocol(f"base64url.bearer.phx.{text}")]
    address = url.partition("?")[0]
    try:
        # Its pings keep the connection; a relay's own limit is on frames that come from clients.
        async with connect_websocket(
            url, subprotocols=subprotocols, open_timeout=TIMEOUT_S, max_size=None, close_timeout=1.0, **options
        ) as connection:
            yield connection
    except InvalidStatus as error:
        body = (error.response.body or b"").decode(errors="replace").strip()
        raise Failed(f"{address}: HTTP {error.response.status_code}{body and f': {body}'}") from None
    except ConnectionClosed as error:
        closed = error.rcvd
        raise Failed(f"{address}: connection lost{f': {closed.code} {closed.reason}' if closed else ''}") from None
    except TimeoutError:
        raise Failed(f"{address}: no answer within {TIMEOUT_S:g} s") from None
    except (OSError, WebSocketException) as error:
        raise Failed(f"{address}: {error}") from None


def ask_rest(settings: Config, address: str, path: str, body: Any = None) -> Any:
    """Ask the REST interface, with the API key of the settings; a body is posted. Raises Failed."""
    request = Request(f"{address.rstrip('/')}{path}", headers={"Accept": "application/json"})
    if body is not None:
        request.data = json.dumps(body, ensure_ascii=False).encode()
        request.add_header("Content-Type", "application/json")
    if settings.rest.api_key:
        request.add_header("Authorization", f"Bearer {settings.rest.api_key}")
    try:
        with urlopen(request, timeout=TIMEOUT_S) as response:
            return json.load(response)
    except HTTPError as error:
        error.close()
        raise Failed(f"{address}: HTTP {error.code} {error.reason}") from None
    except (URLError, OSError, ValueError) as error:
        raise Failed(f"{address}: {getattr(error, 'reason', error)}") from None
