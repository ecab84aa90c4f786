"""Somebody's own app under a server of their choice, as a process; told apart from ours by its own module."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import psutil

from tests.support.process import DEADLINE_S, Started, free_port, wait_for

_ROOT = Path(__file__).parents[2]

COMMANDS = {
    "uvicorn": "uvicorn app:app --port {port} --ws websockets-sansio",
    "uvicorn with our class": "uvicorn app:app --port {port} --ws relay.server:RelayWebSocketProtocol",
    "hypercorn": "hypercorn app:app --bind 127.0.0.1:{port} --graceful-timeout 1",
    "granian": "granian --interface asgi --port {port} app:app",
    "relay": "relay serve app:app --port {port}",
}
"""Each server's command line as people type it, by the server's name."""


class AppServer(Started):
    """A server process with an app; ready when it is entered.

    Args: server: one of `COMMANDS`.
          source: the module ``app``, with an ASGI app of that name in it.
          arguments: further ones of the command line.
          environ: further environment variables.
          ready: a path that answers, with whatever status, once the server is ready.
    """

    def __init__(
        self,
        server: str,
        source: str,
        *arguments: str,
        environ: dict[str, str] | None = None,
        ready: str = "/",
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="relay-test-")
        Path(self._directory.name, "app.py").write_text(source, "utf-8")
        self.port = free_port()
        program, *rest = COMMANDS[server].format(port=self.port).split()
        self.command = [sys.executable, "-m", program, *rest, *arguments]
        self._ready_path = ready
        own = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
        paths = os.pathsep.join((self._directory.name, str(_ROOT)))
        self.environ = {**own, "PYTHONPATH": paths, "XDG_RUNTIME_DIR": self._directory.name, **(environ or {})}
        self._lines: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    @property
    def http(self) -> str:
        """``http://127.0.0.1:<port>``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        """``ws://127.0.0.1:<port>``."""
        return f"ws://127.0.0.1:{self.port}"

    @property
    def output(self) -> str:
        """Everything printed and logged so far."""
        return "".join(self._lines)

    def start(self, *, wait: bool = True) -> None:
        """Start, and wait until it answers."""
        self.process = subprocess.Popen(
            self.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environ,
            cwd=self._directory.name,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        if wait:
            wait_for(self._answers, f"{' '.join(self.command)} to answer")

    def _read(self, stream: Iterable[str]) -> None:
        self._lines.extend(stream)

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, f"the server has ended:\n{self.output}"
        try:
            urllib.request.urlopen(self.http + self._ready_path, timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
        except OSError:
            return False
        return True

    def resident_bytes(self) -> int:
        """Memory of the process and of those it has started."""
        assert self.process is not None
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(process.memory_info().rss for process in tree)

    def wait(self) -> int:
        """The exit code, once the process has ended by itself."""
        assert self.process is not None
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the process in good order; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(self.process.pid, signal.SIGKILL)
                    self.process.wait(10)
            self._reader.join(10)
            assert self.process.stdout is not None
            self.process.stdout.close()
        self._directory.cleanup()


async def bad_gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A proxy that has a page for each error."""
    _ = await reader.readuntil(b"\r\n\r\n")
    page = b"<html>\r\n<h1>502 Bad Gateway</h1>\r\n</html>"
    head = f"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: {len(page)}\r\n\r\n"
    writer.write(head.encode() + page)
    await writer.drain()
    writer.close()
