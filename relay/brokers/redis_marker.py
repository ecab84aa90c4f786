"""Probes and markers: how a node finds its own messages among those that Redis delivers.

Owns how both are written and read, and where they may go; must not know connections. A plain ``PUBLISH`` has no place
for a sender. An event with one is therefore published in one transaction with a marker before it, where probes go too::

    MULTI
    PUBLISH relay:control {"probe":"1f0c22ab","sender":"6f1c2a9e.7","digest":-529344067295497326}
    PUBLISH to:room:1:typing {}
    EXEC

Both reach the node's subscription with nothing in between, so that the event behind the marker is the node's own, and
equal ones of others are not. Other nodes ignore it as they ignore probes. The digest guards where there is no
transaction, because the Redis user may not use one, and where Redis has refused the event: the marker then belongs to
the next event with the same channel and payload, and is void when the next marker comes.
"""

import uuid
from itertools import count

import msgspec

from relay.config_redis import RedisConfig
from relay.protocol.topics import RELAY_TOPIC, to_redis_channel

PROBE = b'{"probe":'
"""How probes and markers begin. They are no control messages: those of other nodes are ignored."""


class Marker(msgspec.Struct, frozen=True, gc=False):
    """What stands before one event."""

    probe: str
    sender: str
    digest: int

    def belongs_to(self, channel: bytes, payload: bytes) -> bool:
        """Whether this is the event that it was published with."""
        return self.digest == _digest(channel, payload)


class Markers:
    """The probes and markers of one broker, on all its connections."""

    def __init__(self, settings: RedisConfig) -> None:
        control = settings.control_channel.encode()
        self.fallback: bytes = to_redis_channel(settings.to_prefix, RELAY_TOPIC, "probe")
        """Matched by the pattern for events."""
        self.channels: tuple[bytes, ...] = (control, self.fallback) if control else (self.fallback,)
        """Where probes and markers may go, the best first."""
        self.heard: list[bytes] = list(self.channels)
        """Those of them that are heard here, as far as is known."""
        self._name = uuid.uuid4().hex[:8]
        self._prefix = b'%b"%b",' % (PROBE, self._name.encode())
        self._numbers = count(1)
        self._decode = msgspec.json.Decoder(Marker).decode

    def next_probe(self) -> bytes:
        """A probe like no other."""
        return b'%b"%b:%d"}' % (PROBE, self._name.encode(), next(self._numbers))

    def pack(self, sender: str, channel: bytes, payload: bytes) -> bytes:
        """Write the marker of one event."""
        return msgspec.json.encode(Marker(self._name, sender, _digest(channel, payload)))

    def unpack(self, data: bytes) -> Marker | None:
        """Read a marker; None for a probe, and for a marker of another node."""
        if not data.startswith(self._prefix):
            return None
        try:
            return self._decode(data)
        except (msgspec.MsgspecError, ValueError):  # of another program, under our name
            return None


def _digest(channel: bytes, payload: bytes) -> int:
    return hash((channel, payload))  # only this process compares it
