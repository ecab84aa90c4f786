"""The processes that are measured: started on a core of their own, waited for, ended by their own id.

Owns processes and what the kernel says about them; must not know what is sent to them. CPU time is the process clock of
all threads, the sum that ``utime + stime`` of ``/proc/<pid>/stat`` gives in steps of 10 ms, read in nanoseconds.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.dialects import (
    FRAME_BYTES,
    Bare,
    Broadcaster,
    Dialect,
    Phoenix,
    SocketIO,
    Tangram,
)
from tests.support.process import RelayProcess, Valkey, free_port

HERE = Path(__file__).parent
ROOT = HERE.parent
_VENV = HERE / ".venv"
_LOCK = HERE / "requirements.lock"
_START_S = 30.0

# Sockets in the benchmark send no heartbeats except where these are what is measured; and all come from one address, as
# fast as they can.
_NO_LIMITS = (
    "joins_per_s",
    "pushes_per_s",
    "sockets_per_address",
    "sockets_max",
    "handshakes_per_s",
    "first_join_timeout_s",
)
_RELAY_ENVIRON = {
    "RELAY_LIMITS__IDLE_TIMEOUT_S": "3600",
    **{f"RELAY_LIMITS__{name.upper()}": "0" for name in _NO_LIMITS},
}


class Missing(Exception):
    """A server that cannot be measured here; the text says why."""


@dataclass
class Cores:
    """Which cores the server and the load run on; empty sets where nothing can be pinned."""

    server: set[int] = field(default_factory=set)
    load: set[int] = field(default_factory=set)

    @classmethod
    def find(cls) -> "Cores":
        """The first core for the server, the others for the load."""
        if not hasattr(os, "sched_setaffinity"):
            return cls()
        cores = sorted(os.sched_getaffinity(0))
        return cls({cores[0]}, set(cores[1:])) if len(cores) > 1 else cls()

    @property
    def text(self) -> str:
        """How it is in words."""
        if not self.server:
            return "not pinned: one core, or no way to pin"
        return f"server on core {_names(self.server)}, load and Redis on {_names(self.load)}"

    @contextmanager
    def of_server(self, cores: set[int] | None = None) -> Iterator[None]:
        """Have processes started in the block run on the server's core."""
        if not self.server:
            yield
            return
        os.sched_setaffinity(0, cores or self.server)
        try:
            yield
        finally:
            os.sched_setaffinity(0, self.load)

    def pin_load(self) -> None:
        """Keep this process, and what it starts from now on, off the server's core."""
        if self.load:
            os.sched_setaffinity(0, self.load)


def _names(cores: set[int]) -> str:
    return ", ".join(map(str, sorted(cores)))


@dataclass
class Server:
    """A running server.

    Args: pids: the processes whose CPU time and memory count.
          start_events: of the floor: has it send so many events at such a rate.
    """

    name: str
    address: tuple[str, int]
    dialect: Dialect
    pids: Sequence[int]
    start_events: Callable[[float, int], None] | None = None

    def cpu_s(self) -> float:
        """Seconds of CPU time so far."""
        return sum(cpu_s(pid) for pid in self.pids)

    def rss_kb(self) -> float:
        """Resident memory in kB."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids) / 1024

    def peak_kb(self) -> float:
        """Most resident memory so far, in kB."""
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids]
        return sum(float(status.split("VmHWM:", 1)[1].split(maxsplit=1)[0]) for status in statuses)


def cpu_s(pid: int) -> float:
    """Seconds of CPU time of a process so far."""
    # clock_getcpuclockid(3): the CPU clock of another process, all threads (CPUCLOCK_SCHED).
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def valkey(cores: Cores) -> Iterator[tuple[int, int]]:
    """The Redis of the whole run; gives its port and its process id."""
    cores.pin_load()
    with Valkey() as server:
        assert server.process is not None
        yield server.port, server.process.pid


@contextmanager
def _process(
    command: Sequence[str], port: int, environ: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that listens on ``port``, ended when the block is left."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, env={**os.environ, **(environ or {})}
        )
        try:
            end = time.monotonic() + _START_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise Missing(f"did not start: {log.read()[-400:].decode(errors='replace')}")
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def floor(cores: Cores, redis_port: int) -> Iterator[Server]:
    """One ``write(2)`` for each frame, in C. Raises Missing where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Missing("no C compiler")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="relay-bench-") as directory:
        binary = f"{directory}/floor"
        subprocess.run([compiler, "-O2", "-o", binary, str(HERE / "floor.c")], check=True)
        with cores.of_server():
            context = _process([binary, str(port), str(FRAME_BYTES)], port)
            process = context.__enter__()
        try:
            stdin = process.stdin
            assert stdin is not None

            def start_events(rate: float, count: int) -> None:
                stdin.write(b"%f %d\n" % (rate, count))
                stdin.flush()

            yield Server("floor: write(2) in C", ("127.0.0.1", port), Bare(), [process.pid], start_events)
        finally:
            context.__exit__(None, None, None)


@contextmanager
def relay(
    cores: Cores,
    redis_port: int,
    *,
    workers: int = 1,
    environ: dict[str, str] | None = None,
    on: set[int] | None = None,
    program: tuple[Path, Path] | None = None,
    redis_url: str = "",
) -> Iterator[Server]:
    """``relay serve``: the direct path.

    Args: program: another relay than this: the interpreter, and the directory that holds the package.
          redis_url: another Redis than the one of the run.
    """
    arguments = ["--redis-url", redis_url or f"redis://127.0.0.1:{redis_port}", "--workers", str(workers)]
    process = RelayProcess(*arguments, environ={**_RELAY_ENVIRON, **(environ or {})}, program=program)
    with cores.of_server(on):
        process.start()
    try:
        assert process.process is not None
        pids = [process.process.pid]
        if workers > 1:
            # Multiprocessing's resource tracker is a child too; it does nothing.
            pids = [
                child.pid
                for child in psutil.Process(pids[0]).children()
                if "resource_tracker" not in " ".join(child.cmdline())
            ]
        port = int(process.http.rsplit(":", 1)[1])
        yield Server(
            "relay, direct" if workers == 1 else f"relay, {workers} workers", ("127.0.0.1", port), Phoenix(), pids
        )
    finally:
        process.__exit__(None, None, None)


@contextmanager
def _served(
    cores: Cores, name: str, dialect: Dialect, command: Sequence[str], port: int, environ: dict[str, str] | None = None
) -> Iterator[Server]:
    with cores.of_server():
        context = _process(command, port, environ)
        process = context.__enter__()
    try:
        yield Server(name, ("127.0.0.1", port), dialect, [process.pid])
    finally:
        context.__exit__(None, None, None)


@contextmanager
def portable(cores: Cores, redis_port: int) -> Iterator[Server]:
    """The same app under Uvicorn's own protocol class: the portable path."""
    port = free_port()
    # No server pings while it is measured: the clients would have to answer.
    arguments = ["--port", str(port), "--log-level", "warning", "--ws-ping-interval", "3600"]
    command = [sys.executable, "-m", "uvicorn", "benchmarks.portable:app", *arguments]
    environ = {**_RELAY_ENVIRON, "RELAY_REDIS_URL": f"redis://127.0.0.1:{redis_port}"}
    with _served(cores, "relay, portable", Phoenix(), command, port, environ) as server:
        yield server


@contextmanager
def _peer(cores: Cores, redis_port: int, name: str, dialect: Dialect, program: str) -> Iterator[Server]:
    python = _peers_python()
    port = free_port()
    command = [str(python), str(HERE / "peers" / program), str(port), f"redis://127.0.0.1:{redis_port}"]
    with _served(cores, name, dialect, command, port) as server:
        yield server


@contextmanager
def tangram(cores: Cores, redis_port: int) -> Iterator[Server]:
    """tangram's `channel` service, in Rust."""
    dialect = Tangram("benchmark")
    with _peer(cores, redis_port, "tangram channel (Rust)", dialect, "tangram_server.py") as server:
        yield server


@contextmanager
def socketio(cores: Cores, redis_port: int) -> Iterator[Server]:
    """python-socketio with its Redis manager."""
    with _peer(cores, redis_port, "python-socketio", SocketIO(), "socketio_server.py") as server:
        yield server


@contextmanager
def broadcaster(cores: Cores, redis_port: int) -> Iterator[Server]:
    """The chat of broadcaster's README."""
    with _peer(cores, redis_port, "broadcaster README", Broadcaster(), "broadcaster_server.py") as server:
        yield server


def _peers_python() -> Path:
    """The Python of the peers' environment. Raises Missing where that cannot be made."""
    python = _VENV / "bin" / "python"
    stamp = _VENV / ".lock"
    if not stamp.exists() or stamp.read_bytes() != _LOCK.read_bytes():
        shutil.rmtree(_VENV, ignore_errors=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(_LOCK)]
        try:
            subprocess.run([sys.executable, "-m", "venv", str(_VENV)], check=True, capture_output=True)
            subprocess.run(install, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Missing(f"the peers' environment cannot be made: {error}") from None
        stamp.write_bytes(_LOCK.read_bytes())
    return python


def peer_versions() -> dict[str, str]:
    """Versions of the peers, as the lock says."""
    wanted = ("tangram-core", "python-socketio", "broadcaster", "uvicorn", "redis")
    pairs = [line.split(" ")[0].split("==") for line in _LOCK.read_text().splitlines() if "==" in line]
    return {pair[0]: pair[1] for pair in pairs if pair[0] in wanted}
