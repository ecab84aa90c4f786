"""The application under test: the relays in it, and its start and stop by ASGI's lifespan.

Owns the task in which its lifespan runs; must not know clients.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from relay.app import Relay
from relay.errors import RelayError
from relay.testing.client import App, Message
from relay.testing.memory import in_memory

_NO_RELAY = "expected a Relay, an application in which one is mounted, or a TestClient of one"


def relays_in(app: object) -> list[tuple[Relay, str]]:
    """The relays of an application, each with its mount path. Raises RelayError where there is none."""
    found = list(_relays_in(app, "", set()))
    if not found:
        raise RelayError(f"no relay found in {type(app).__name__}; {_NO_RELAY}")
    return found


def _relays_in(app: Any, path: str, seen: set[int]) -> Iterator[tuple[Relay, str]]:
    """Look into mounts, and behind middleware that keeps what it wraps as ``app``."""
    if isinstance(app, Relay):
        yield app, path
    elif app is not None and id(app) not in seen:
        seen.add(id(app))
        for route in getattr(app, "routes", None) or ():
            if hasattr(route, "app"):
                yield from _relays_in(route.app, path + getattr(route, "path", ""), seen)
        yield from _relays_in(getattr(app, "app", None), path, seen)


@asynccontextmanager
async def started(app: App, relays: list[Relay]) -> AsyncIterator[None]:
    """Run an application for the block, its relays in memory; nothing where one of them runs already."""
    if any(relay.is_running for relay in relays):
        yield
        return
    with ExitStack() as stack:
        for relay in relays:
            stack.enter_context(in_memory(relay))
        lifespan = _Lifespan(app)
        await lifespan.start()
        try:
            yield
        finally:
            await lifespan.stop()
            for relay in relays:  # one that is mounted without its lifespan was started by its first request
                await relay.stop()


class _Lifespan:
    """ASGI's lifespan of an application, in a task of its own, as servers run it."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._asked: asyncio.Queue[Message] = asyncio.Queue()
        self._answers: asyncio.Queue[Message] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the application. Raises RelayError where its start fails."""
        scope: Message = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._task = asyncio.create_task(self._run(scope))
        await self._ask("startup")

    async def stop(self) -> None:
        """Stop it."""
        if self._task is not None and not self._task.done():
            await self._ask("shutdown")
            await self._task

    async def _run(self, scope: Message) -> None:
        try:
            await self._app(scope, self._asked.get, self._answers.put)
        finally:
            self._answers.put_nowait({"type": "lifespan.ended"})

    async def _ask(self, what: str) -> None:
        self._asked.put_nowait({"type": f"lifespan.{what}"})
        answer = await self._answers.get()
        if answer["type"] == f"lifespan.{what}.failed":
            assert self._task is not None, "it has answered"
            _ = await asyncio.gather(self._task, return_exceptions=True)
            raise RelayError(f"the application's {what} failed: {answer.get('message', '')}")
        if answer["type"] == "lifespan.ended" and self._task is not None:
            await self._task  # raises what it has raised
