"""The Uvicorn protocol classes, under the dotted paths that servers are started with.

``uvicorn app:app --ws relay.server:RelayWebSocketProtocol --http relay.server:RelayHTTPProtocol``
"""

from typing import TYPE_CHECKING, Any

from relay.extras import require

require("server", __name__)

from relay.transports.uvicorn_websocket import RelayWebSocketProtocol  # noqa: E402 - says first what is not installed

if TYPE_CHECKING:
    from relay.transports.uvicorn_http import RelayHTTPProtocol

__all__ = ["RelayHTTPProtocol", "RelayWebSocketProtocol"]


def __getattr__(name: str) -> Any:
    """Import the HTTP class on first use: it needs httptools, which not every platform has."""
    if name == "RelayHTTPProtocol":
        from relay.transports.uvicorn_http import RelayHTTPProtocol

        return RelayHTTPProtocol
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
