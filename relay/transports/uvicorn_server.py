"""Uvicorn's server as ``relay serve`` runs it: it drains before it ends, and outlives a lack of file descriptors.

Owns what Uvicorn has no setting for; must not know what is served.
"""

import asyncio
import gc
import logging
import math
import multiprocessing
import os
import signal
import socket as sockets
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from email.utils import formatdate
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.server import ServerState
from uvicorn.supervisors import Multiprocess, multiprocess
from uvicorn.supervisors.statreload import StatReload

from relay.errors import ConfigError
from relay.fd_limit import raise_descriptor_limit
from relay.log import RateLimitedLogger
from relay.transports.uvicorn_http import RelayHTTPProtocol
from relay.transports.uvicorn_websocket import RelayWebSocketProtocol, server_loggers

_logger = logging.getLogger("relay.server")

_LOOK_S = 0.05

_ORPHAN_MAX_S = 60.0
"""Seconds that a worker whose supervisor has ended may take to drain."""

_FORCE_S = 1.0
"""Seconds that Uvicorn's own shutdown has after a second Ctrl+C, which cuts it short where it can."""

_END_TIMEOUT_S = 3.0
"""Seconds that a process has to end after its shutdown."""


class _State(ServerState):
    """Makes the header ``Date`` when it is asked for, once a second at most, and not each second."""

    def __init__(self, config: uvicorn.Config, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._config = config
        self._clock = clock
        self._headers: list[tuple[bytes, bytes]] = []
        self._made_at = -math.inf

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """What each response begins with, as Uvicorn's own ``on_tick`` has it."""
        if (now := self._clock()) - self._made_at >= 1:
            self._made_at = now
            date = [(b"date", formatdate(usegmt=True).encode())] if self._config.date_header else []
            self._headers = [*date, *self._config.encoded_headers]
        return self._headers

    @default_headers.setter
    def default_headers(self, _: list[tuple[bytes, bytes]]) -> None:
        """Pass over what the base class begins with."""


class Server(uvicorn.Server):
    """Ends in three steps: the relay drains its sockets, at its pace; then it stops listening; then all ends.

    Uvicorn's own stops to listen first. Meanwhile a client is answered 503, which says why, and not by silence:
    with several workers a connection would else wait for a process that takes none any more.

    It waits for its end, where Uvicorn's own looks for it ten times a second: an idle relay would do little else.
    """

    ends_process = False
    """Whether the process is to end with it, even if a handler hangs in a thread, or ignores its cancellation."""

    clean_up: Callable[[], None] = staticmethod(lambda: None)
    """Called, in a thread, before a process is ended that does not end on its own."""

    def __init__(self, config: uvicorn.Config) -> None:
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._should_exit = False
        # Of what is under way and may hang: the start, which a signal limits, or the shutdown, which a second one does.
        self._limit: asyncio.Timeout | None = None
        super().__init__(config)
        self.server_state: ServerState = _State(config)

    @property
    def should_exit(self) -> bool:
        """Whether it is to end, or ends."""
        return self._should_exit

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        """Say so; from any thread, and from a signal's handler."""
        self._should_exit = value
        if value:
            self._call(self._end)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take note of a signal; a second Ctrl+C limits what is under way."""
        super().handle_exit(sig, frame)
        if self.force_exit:
            self._call(partial(self._limit_to, _FORCE_S))

    def _call(self, function: Callable[[], object]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, so it has ended
                self._loop.call_soon_threadsafe(function)

    def _end(self) -> None:
        self._ending.set()
        if not self.started:
            self._limit_to(self.config.timeout_graceful_shutdown or _FORCE_S)

    def _limit_to(self, seconds: float) -> None:
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + seconds)

    async def _within_limit(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do what may hang in the application; False where it was given up."""
        try:
            async with asyncio.timeout(None) as self._limit:
                await work
        except TimeoutError:
            return False
        finally:
            self._limit = None
        return True

    async def startup(self, sockets: list[sockets.socket] | None = None) -> None:
        """Start as Uvicorn does, with a log that clients cannot flood."""
        log = server_loggers(self.config).get("relay.server", interval_s=1.0)
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_exception_handler(log))
        logging.getLogger("uvicorn.error").addFilter(_Fewer(log))
        if self._should_exit:  # since before there was a loop
            self._call(self._end)
        try:
            is_complete = await self._within_limit(super().startup(sockets))
        finally:
            if not self.started:
                self._end_later(STARTUP_FAILURE)
        if not is_complete:
            _logger.warning("ending before the application has started: its start hangs")
            server_loggers(self.config).flush(at_once=True)
            return
        self._listeners = [*self.servers, *(sockets or ())]
        # Modules and settings stay: later collections pass them over, which are most of what a small relay has.
        gc.collect()
        gc.freeze()

    def stop_listening(self) -> None:
        """Let the address go at once, before the drain: another server may want it. From any thread."""
        if self.started and self._loop is not None:
            for listener in self._listeners:
                self._loop.call_soon_threadsafe(listener.close)

    async def main_loop(self) -> None:
        """Wait until it is to end."""
        while not self.should_exit:
            await self._ending.wait()

    async def shutdown(self, sockets: list[sockets.socket] | None = None) -> None:
        """Drain, then shut down as Uvicorn does."""
        draining = {
            connection
            for connection in self.server_state.connections
            if isinstance(connection, RelayHTTPProtocol | RelayWebSocketProtocol) and connection.drain()
        }
        while draining & self.server_state.connections and not self.force_exit:  # noqa: ASYNC110 - Uvicorn has no event
            await asyncio.sleep(_LOOK_S)
        await self._within_limit(super().shutdown(sockets))
        if self.force_exit:  # by a second Ctrl+C: Uvicorn leaves the application's end out, and so `on_shutdown`
            for connection in list(self.server_state.connections):
                connection.transport.abort()  # else the application waits for them
            with suppress(TimeoutError):
                async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                    await self.lifespan.shutdown()
        server_loggers(self.config).flush(at_once=True)
        self._end_later(0)

    def _end_later(self, code: int) -> None:
        if self.ends_process:
            threading.Thread(target=_end_process, args=(self.clean_up, code), name="relay-end", daemon=True).start()


def _end_process(clean_up: Callable[[], None], code: int) -> None:
    """End a process that does not end on its own: Python waits for threads and tasks without a limit."""
    time.sleep(_END_TIMEOUT_S)
    names = sorted(thread.name for thread in threading.enumerate() if not thread.daemon)
    logging.getLogger("relay.server").warning(
        "process did not end within %g s after its shutdown: a handler hangs (threads: %s); ending it",
        _END_TIMEOUT_S,
        ", ".join(names),
    )
    try:
        clean_up()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Worker(multiprocess.Process):
    """A worker with our server in it."""

    @property
    def server(self) -> uvicorn.Server:
        if self._server is None:
            self._server = Server(self.config)
            self._server.ends_process = True
        return self._server

    def target(self, sockets: list[sockets.socket] | None = None) -> None:
        """Serve; with settings that no longer make sense, end so that the supervisor does not retry without a limit."""
        assert isinstance(self.server, Server)
        _watch_parent(self.server)
        with _reported():
            super().target(sockets)


@contextmanager
def _reported() -> Iterator[None]:
    """Log what is wrong with the settings in one line, and end the process."""
    try:
        yield
    except ConfigError as error:
        logging.getLogger("relay.server").error("%s", error)
        sys.exit(STARTUP_FAILURE)


def _watch_parent(server: Server) -> None:
    """End when the supervisor does, whatever has ended it: a pipe from it, which multiprocessing makes, says so."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are spawned"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal: the supervisor ends it

    def wait() -> None:
        parent.join()
        _logger.warning("shutting down: the supervisor has ended")
        server.stop_listening()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ORPHAN_MAX_S)
        os._exit(1)  # a handler that blocks the event loop must not keep the process

    threading.Thread(target=wait, daemon=True).start()


class _Reloader(StatReload):
    """Starts the one process again when a file changes; with one that ended, at the next change.

    Args: files: watched besides the ``.py`` files below the current directory.
    """

    _PASSED_OVER = frozenset({"node_modules", "__pycache__", "site-packages"})

    def __init__(self, config: uvicorn.Config, listener: sockets.socket, files: Sequence[Path]) -> None:
        super().__init__(config, partial(_serve_once, config), [listener])
        self.reloader_name = "relay"
        self._files = files

    def startup(self) -> None:
        """Start; what changes meanwhile starts it again."""
        self.mtimes: dict[Path, float] = self._times()
        super().startup()

    def restart(self) -> None:
        """Start again, as above: Uvicorn's own notes the times of files some time after the start."""
        times = self._times()
        super().restart()
        self.mtimes = times

    def _times(self) -> dict[Path, float]:
        times: dict[Path, float] = {}
        for file in self.iter_py_files():
            with suppress(OSError):
                times[file] = file.stat().st_mtime
        return times

    def iter_py_files(self) -> Iterator[Path]:
        """The files that are watched: environments, packages and hidden directories are passed over."""
        yield from self._files
        for root in self.config.reload_dirs:
            for directory, names, files in os.walk(root):
                names[:] = [
                    name
                    for name in names
                    if name not in self._PASSED_OVER
                    and not name.startswith(".")
                    and not Path(directory, name, "pyvenv.cfg").exists()
                ]
                yield from (Path(directory, name) for name in files if name.endswith(".py"))


def _serve_once(config: uvicorn.Config, sockets: list[sockets.socket] | None) -> None:
    """Serve, in a process of its own, until it is ended for a reload."""
    server = Server(config)
    server.ends_process = True
    _watch_parent(server)
    with _reported():
        server.run(sockets=sockets)
    if not server.started:
        sys.exit(STARTUP_FAILURE)


class _Fewer(logging.Filter):
    """Writes what Uvicorn says of each bad request at a sane rate: anybody can send thousands."""

    _COMMON = ("Invalid HTTP request received.", "Unsupported upgrade request.")

    def __init__(self, log: RateLimitedLogger) -> None:
        super().__init__()
        self._log = log

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg not in self._COMMON:
            return True
        self._log.warning(str(record.msg), str(record.msg))
        return False


def _exception_handler(log: RateLimitedLogger) -> Any:
    """Make a handler of the event loop's complaints that writes the one about descriptors once a second at most.

    asyncio's own loop utters it once for each place in the backlog, 2 048 lines in one go (Python 3.11 to 3.13).
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept() out of system resource" in context["message"]:
            log.warning("accept", "accept failed: %s", context.get("exception"))
        else:
            loop.default_exception_handler(context)

    return handle


def run(config: uvicorn.Config, listener: sockets.socket, clean_up: Callable[[], None]) -> int:
    """Serve until stopped, here or in workers; returns the exit code.

    Args: clean_up: lets go of what the caller would let go of afterwards, where the process has to be ended before.
    """
    raise_descriptor_limit()
    if config.workers == 1:
        server = Server(config)
        server.ends_process = True
        server.clean_up = clean_up
        server.run(sockets=[listener])
        return 0 if server.started else STARTUP_FAILURE
    multiprocess.Process = _Worker  # type: ignore[misc]  # the supervisor has no other way to be given one
    hang_up = signal.getsignal(signal.SIGHUP)
    supervisor = Multiprocess(config, sockets=[listener])
    signal.signal(signal.SIGHUP, hang_up)  # Uvicorn's own starts the workers again when a terminal is closed
    supervisor.run()
    # It ends when a worker cannot start, and reports that neither by an exception nor by a result.
    failed = any(worker.exitcode == STARTUP_FAILURE for worker in supervisor.processes)
    return STARTUP_FAILURE if failed else 0


def run_reloading(config: uvicorn.Config, listener: sockets.socket, files: Sequence[Path]) -> int:
    """Serve in one process, which starts again when a ``.py`` file below the current directory or one of ``files``
    changes; returns the exit code.
    """
    raise_descriptor_limit()
    config.reload_dirs = [Path.cwd()]
    _Reloader(config, listener, files).run()
    return 0
