"""`relay.transports.uvicorn_server`: what it makes of complaints of an event loop, and of lines about bad requests.

How it drains and what it does without file descriptors is tested on processes, in ``integration/faults``.
"""

import asyncio
import errno
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.supervisors.basereload import BaseReload

from relay.log import RateLimitedLogger
from relay.transports.uvicorn_server import _exception_handler, _Fewer, _Reloader

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
