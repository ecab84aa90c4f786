"""The HTTP protocol class under its former dotted path; `relay.server` has both."""

from relay.transports.uvicorn_http import RelayHTTPProtocol

__all__ = ["RelayHTTPProtocol"]
