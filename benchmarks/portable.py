"""The relay as any ASGI server runs it, for `uvicorn benchmarks.portable:app`: without the relay's protocol class."""

from relay.app import Relay
from relay.config_sources import load

app = Relay(load())
