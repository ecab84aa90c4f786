"""When an application is made that is made for its first request."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import MutableMapping
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from relay.web.deferred import DeferredApp

SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": []}


async def ask(app: ASGIApp) -> bytes:
    """The body of what an application answers."""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await app(SCOPE, receive, send)
    return b"".join(message.get("body", b"") for message in sent)


async def test_requests_that_come_together_have_it_made_once_and_the_loop_goes_on() -> None:
    made: list[threading.Thread] = []
    may_go_on = threading.Event()

    def make() -> ASGIApp:
        made.append(threading.current_thread())
        assert may_go_on.wait(60), "the event loop has been held up"
        return PlainTextResponse("here")

    app = DeferredApp(make)
    asyncio.get_running_loop().call_later(0.01, may_go_on.set)
    assert set(await asyncio.gather(ask(app), ask(app))) == {b"here"}
    assert await ask(app) == b"here"
    assert len(made) == 1
    assert made[0] is not threading.current_thread()
    await asyncio.to_thread(made[0].join, 60)
    assert not made[0].is_alive(), "the thread has nothing more to do"


async def test_fault_is_that_of_its_request_and_the_next_tries_again() -> None:
    results: list[ASGIApp | Exception] = [ImportError("no such module"), PlainTextResponse("here")]

    def make() -> ASGIApp:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    app = DeferredApp(make)
    with pytest.raises(ImportError, match="no such module"):
        _ = await ask(app)
    assert await ask(app) == b"here"


def test_relay_is_made_without_fastapi() -> None:
    """It is a fifth of the CPU time of a start."""
    code = "import sys; from relay import Relay; Relay(broadcast_url='memory://'); print('fastapi' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
