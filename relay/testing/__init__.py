"""Testing an application or a plugin with relay: clients in the test's own process, without network and Redis.

    from relay.testing import connect

    async def test_new_message_reaches_everybody() -> None:
        async with connect(app, user="alice") as socket:
            room = await socket.join("room:1")
            await room.push("new_msg", {"text": "hi"})
            await room.expect("new_msg", text="hi")

`connect` takes a `Relay`, an application in which one is mounted, or Starlette's `TestClient`; with ``with`` instead of
``async with`` it is for tests without an event loop. `in_memory` keeps a relay from Redis for longer.
"""

from relay.plugins.hooks import Refused
from relay.testing.blocking import BlockingChannel, BlockingSocket
from relay.testing.client import Channel, ConnectionRefused, Socket
from relay.testing.connect import Connecting, connect
from relay.testing.memory import InMemory, in_memory, send_redis_message

__all__ = [
    "BlockingChannel",
    "BlockingSocket",
    "Channel",
    "Connecting",
    "ConnectionRefused",
    "InMemory",
    "Refused",
    "Socket",
    "connect",
    "in_memory",
    "send_redis_message",
]
