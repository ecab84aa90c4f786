"""A client for the relay, and for any server that speaks Phoenix Channels V2.

async with connect("ws://localhost:8000/socket") as socket:
    async with socket.join("room:1") as room:
        await room.push("new_msg", {"text": "hi"})
        async for event in room:
            ...
"""

from relay_client.channel import Channel
from relay_client.errors import ClientError, ConnectError, JoinError, PushError, QueueOverflow
from relay_client.events import REJOINED, Event, Lost, Overflow, Recovered
from relay_client.presence import Presence, PresenceChange
from relay_client.socket import Socket, connect

__version__ = "0.1.0"

__all__ = [
    "REJOINED",
    "Channel",
    "ClientError",
    "ConnectError",
    "Event",
    "JoinError",
    "Lost",
    "Overflow",
    "Presence",
    "PresenceChange",
    "PushError",
    "QueueOverflow",
    "Recovered",
    "Socket",
    "connect",
]
