"""The relay: Redis channels to WebSocket topics, in the manner of Phoenix Channels.

A team's own code needs no more than this package's top level::

    from relay import Relay

    relay = Relay(redis_url="redis://localhost:6379")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from relay.version import __version__

__all__ = [
    "AsyncPublisher",
    "BusUnavailable",
    "Config",
    "ConfigError",
    "Event",
    "EventStream",
    "Join",
    "Joined",
    "Leave",
    "Plugin",
    "Published",
    "Publisher",
    "Push",
    "ReceivedEvent",
    "RedisMessage",
    "Refused",
    "Relay",
    "SlowReader",
    "UpgradeRequest",
    "__version__",
]

if TYPE_CHECKING:
    from relay.app import Relay
    from relay.auth.authenticator import UpgradeRequest
    from relay.channels.event_stream import EventStream, ReceivedEvent
    from relay.config import Config
    from relay.errors import BusUnavailable, ConfigError, SlowReader
    from relay.plugins import Plugin
    from relay.plugins.hooks import Event, Join, Joined, Leave, Push, RedisMessage, Refused
    from relay.publisher import AsyncPublisher, Published, Publisher

_HOMES = {
    "Relay": "relay.app",
    "Config": "relay.config",
    "BusUnavailable": "relay.errors",
    "ConfigError": "relay.errors",
    "SlowReader": "relay.errors",
    "EventStream": "relay.channels.event_stream",
    "ReceivedEvent": "relay.channels.event_stream",
    **dict.fromkeys(("Event", "Join", "Joined", "Leave", "Push", "RedisMessage", "Refused"), "relay.plugins.hooks"),
    "Plugin": "relay.plugins",
    "UpgradeRequest": "relay.auth.authenticator",
    **dict.fromkeys(("AsyncPublisher", "Published", "Publisher"), "relay.publisher"),
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that ``relay --help`` need not load a web server."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'relay' has no attribute {name!r}")
