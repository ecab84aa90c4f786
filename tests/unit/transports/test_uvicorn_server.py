"""`relay.transports.uvicorn_server`: what it makes of complaints of an event loop, and of lines about bad requests.

How it drains and what it does without file descriptors is tested on processes, in ``integration/faults``.
"""

import asyncio
import errno
import logging
import os
import socket
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.supervisors.basereload import BaseReload

from relay.log import RateLimitedLogger
from relay.transports.uvicorn_server import Server, _exception_handler, _Fewer, _Reloader, _State
from tests.support.process import wait_for
from tests.support.serving import eventually

_LOGGER = logging.getLogger("relay.server")


def test_complaints_about_descriptors_are_written_once_a_second_at_most(caplog: pytest.LogCaptureFixture) -> None:
    """Source: ``asyncio.selector_events``: one complaint for each place in the backlog (Python 3.11 to 3.13)."""
    now = 0.0
    handle = _exception_handler(RateLimitedLogger(_LOGGER, 1.0, clock=lambda: now))
    loop = asyncio.new_event_loop()
    context = {
        "message": "socket.accept() out of system resource",
        "exception": OSError(errno.EMFILE, "Too many open files"),
    }
    for _ in range(2048):
        handle(loop, context)
    assert len(caplog.records) == 1
    now = 1.0
    handle(loop, context)
    loop.close()
    assert [record.getMessage() for record in caplog.records] == [
        "accept failed: [Errno 24] Too many open files",
        "accept failed: [Errno 24] Too many open files (2047 similar messages suppressed)",
    ]


def test_other_complaints_of_the_loop_are_written_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    handle = _exception_handler(RateLimitedLogger(_LOGGER, 1.0))
    for _ in range(2):
        handle(loop, {"message": "something else"})
    loop.close()
    assert [record.getMessage() for record in caplog.records] == ["something else", "something else"]


@pytest.mark.parametrize(
    ("text", "passes"), [("Invalid HTTP request received.", False), ("Exception in ASGI application\n", True)]
)
def test_lines_that_anybody_can_cause_are_rate_limited(
    caplog: pytest.LogCaptureFixture, text: str, passes: bool
) -> None:
    fewer = _Fewer(RateLimitedLogger(_LOGGER, 1.0))
    record: Any = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, text, None, None)
    assert [fewer.filter(record) for _ in range(3)] == [passes] * 3
    assert len(caplog.records) == (not passes)


@pytest.mark.parametrize("begin", ["startup", "restart"])
def test_file_that_changes_while_the_process_starts_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    """The process may have read it before."""
    file = tmp_path / "relay.toml"
    file.touch()

    def change(self: BaseReload) -> None:
        later = file.stat().st_mtime + 10
        os.utime(file, (later, later))

    monkeypatch.setattr(BaseReload, begin, change)
    config = uvicorn.Config("app:app", reload_delay=0)
    config.reload_dirs = []
    with socket.socket() as listener:
        reloader = _Reloader(config, listener, [file])
        getattr(reloader, begin)()
        assert reloader.should_restart() == [file]


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application that is not asked."""


@pytest.mark.parametrize("by", ["its own loop", "a thread"])
async def test_server_waits_for_its_end_without_looking_for_it(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uvicorn's own looks ten times a second whether it is to end."""

    async def look(*_: object) -> bool:
        raise AssertionError("it is not to look")

    monkeypatch.setattr(Server, "on_tick", look)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(uvicorn.Config(_nothing, log_config=None, lifespan="off"))
        task = asyncio.create_task(server._serve([listener]))
        await eventually(lambda: server.started, "the server to start")
        assert not server.should_exit and not task.done()
        if by == "a thread":
            threading.Thread(target=setattr, args=(server, "should_exit", True)).start()
        else:
            server.should_exit = True
        async with asyncio.timeout(10):
            await task
    assert server.should_exit


def test_process_ends_although_a_handler_goes_on_after_a_start_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python waits for its task without a limit."""

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.failed", "message": "broken"})

    codes: list[int] = []
    monkeypatch.setattr("relay.transports.uvicorn_server._end_process", lambda clean_up, code: codes.append(code))
    server = Server(uvicorn.Config(fails, lifespan="on", log_config=None, port=0))
    server.ends_process = True
    with suppress(SystemExit):
        server.run()
    wait_for(lambda: codes == [3], "the thread that ends the process")


def test_server_that_has_ended_can_be_told_to_end() -> None:
    server = Server(uvicorn.Config(_nothing))
    server._loop = asyncio.new_event_loop()
    server._loop.close()
    server.should_exit = True
    assert server.should_exit


def test_date_of_an_answer_is_that_of_its_second() -> None:
    now = 0.0
    config = uvicorn.Config(_nothing, headers=[("x", "y")])
    config.load()
    state = _State(config, clock=lambda: now)
    first = state.default_headers
    made = parsedate_to_datetime(dict(first)[b"date"].decode())
    assert abs(datetime.now(UTC) - made) < timedelta(seconds=30) and (b"x", b"y") in first
    now = 0.9
    assert state.default_headers is first
    now = 1.0
    assert state.default_headers is not first
    config.date_header = False
    now = 2.0
    assert dict(state.default_headers).keys() == {b"server", b"x"}
