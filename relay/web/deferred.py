"""An ASGI application that is made for its first request.

Owns when it is made, and where: in a thread, as its imports would block the event loop. Must not know what it does.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from starlette.types import ASGIApp, Receive, Scope, Send


class DeferredApp:
    """An application that is made when it is first asked, once.

    Args: make: imports and makes it; what it raises, the request raises, and the next request tries again.
    """

    def __init__(self, make: Callable[[], ASGIApp]) -> None:
        self._make = make
        self._app: ASGIApp | None = None
        # One thread: requests that come together make one. Not the loop's own, which handlers may have filled.
        self._thread = ThreadPoolExecutor(1, "relay-deferred")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        app = self._app
        if app is None:
            app = await asyncio.get_running_loop().run_in_executor(self._thread, self._made)
            self._thread.shutdown(wait=False)  # it ends after the requests that came meanwhile
        await app(scope, receive, send)

    def _made(self) -> ASGIApp:
        if self._app is None:
            self._app = self._make()
        return self._app
