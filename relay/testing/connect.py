"""`connect`: a client of an application under test, with ``async with`` or ``with``.

Owns the order in which application and client begin and end.
"""

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

from relay.errors import RelayError
from relay.testing.application import relays_in, started
from relay.testing.blocking import BlockingSocket, Run
from relay.testing.client import WITHIN_S, App, Socket, make_scope
from relay.testing.memory import make_token


def connect(
    app: Any,
    *,
    user: str | None = None,
    claims: Mapping[str, Any] | None = None,
    token: str | None = None,
    params: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    path: str = "",
    within_s: float = WITHIN_S,
) -> "Connecting":
    """Connect a client to a relay in this process, with ``async with`` or ``with``; the block is its life.

    An application that does not run is started for the block, with its relays in memory; see `in_memory`. Further
    clients in the block use it too.

    Args:   app: a `Relay`, an ASGI application in which one is mounted, or a started Starlette ``TestClient`` of one,
                whose event loop and cookies are used then.
            user: the client has a token of this user, if the relay checks tokens.
            claims: further claims of the token, such as ``{"topics": ["room:1:join"]}``.
            token: a token of your own instead.
            params: of the connection, as of phoenix.js's ``new Socket(path, {params})``.
            headers: of the upgrade request, such as ``{"cookie": "session=…"}``.
            path: of the socket, such as ``"/relay/socket"``; found automatically.
            within_s: seconds for answers and expected events.
    Raises: RelayError: no relay is found in the application. At the beginning of the block ConnectionRefused, and
            RelayError if the application's start fails.
    """
    return Connecting(app, _Request(user, claims, token, params or {}, headers or {}, path), within_s)


class _Request(NamedTuple):
    user: str | None
    claims: Mapping[str, Any] | None
    token: str | None
    params: Mapping[str, str]
    headers: Mapping[str, str]
    path: str


class Connecting:
    """What `connect` returns."""

    def __init__(self, app: Any, request: _Request, within_s: float) -> None:
        self._test_client = app if hasattr(app, "portal") and hasattr(app, "app") else None
        self._app: App = app.app if self._test_client is not None else app
        self._relays = relays_in(self._app)
        self._request = request
        self._within_s = within_s
        self._stack: AsyncExitStack | None = None
        self._loop: _Loop | None = None
        self._run: Run | None = None

    async def __aenter__(self) -> Socket:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(started(self._app, [relay for relay, _ in self._relays]))
            socket = self._make_socket()
            await socket._open()
            stack.push_async_callback(socket.close)
            self._stack = stack.pop_all()
        return socket

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stack is not None:
            await self._stack.aclose()

    def _make_socket(self) -> Socket:
        (relay, mount), request = self._relays[0], self._request
        token = request.token
        if token is None and (request.user is not None or request.claims is not None):
            token = make_token(relay, request.user or "", request.claims or {})
        path = f"{request.path or mount + relay.config.socket_paths[0]}/websocket"
        headers = {**self._cookies(path), **request.headers}
        return Socket(self._app, make_scope(path, request.params, headers, token), self._within_s)

    def _cookies(self, path: str) -> dict[str, str]:
        """The header with those that the TestClient has by now and a browser would send to this path."""
        if self._test_client is None:
            return {}
        cookie = self._test_client.build_request("GET", path).headers.get("cookie")
        return {} if cookie is None else {"cookie": cookie}

    # Without an event loop.

    def __enter__(self) -> BlockingSocket:
        if self._test_client is not None and self._test_client.portal is None:
            raise RelayError("the TestClient is not started; expected `with TestClient(app) as client:` before")
        running = next((relay for relay, _ in self._relays if relay.is_running), None)
        if running is not None:  # by the TestClient, or by a client before this one
            self._run = partial(_run_in, running.node.pubsub.home.loop)
        else:
            self._loop = _Loop()
            self._run = self._loop.run
        try:
            return BlockingSocket(self._run(self.__aenter__()), self._run)
        except BaseException:
            self._close_loop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._run is not None:
                self._run(self.__aexit__(None, None, None))
        finally:
            self._close_loop()

    def _close_loop(self) -> None:
        if self._loop is not None:
            self._loop.close()
        self._loop = self._run = None


def _run_in(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(work, loop).result()


class _Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relay-testing", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine there, and return what it returns."""
        return _run_in(self._loop, work)

    def close(self) -> None:
        """End it."""
        self.run(self._loop.shutdown_asyncgens())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
