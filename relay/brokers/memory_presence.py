"""Presence in memory, for the bus of one process.

Owns the members and leases of the nodes that share it; must not know who is shown what.
"""

import time
import uuid
from collections.abc import Callable, Sequence

from relay.brokers.base import Lease, OwnChange
from relay.protocol.presence import Members, apply


class SharedPresence:
    """What the nodes of one process share, in place of a server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock: Callable[[], float] = clock
        self.members: dict[tuple[str, str], Members] = {}
        """By topic and node."""
        self.leases: dict[str, float] = {}
        """When they end, by the clock."""
        self.listeners: list[Callable[[bytes], None]] = []
        """Called for each message of any node."""

    def publish(self, message: bytes) -> None:
        """Hand a message to all nodes."""
        for listener in tuple(self.listeners):
            listener(message)


class MemoryPresence:
    """Keeps the members of one node; see `PresenceStore`.

    Args: lease_s: seconds for which a renewal holds.
          shared: with the other nodes; by default there are no others.
    """

    def __init__(self, lease_s: float, shared: SharedPresence | None = None) -> None:
        self.node: str = uuid.uuid4().hex[:12]
        self._lease_s = lease_s
        self._shared = SharedPresence() if shared is None else shared

    async def write(self, changes: Sequence[OwnChange], message: bytes) -> None:
        """Write changes of this node's members and publish a message about them, as one step."""
        for topic, change, is_empty in changes:
            if is_empty:
                _ = self._shared.members.pop((topic, self.node), None)
            else:
                apply(self._shared.members.setdefault((topic, self.node), {}), change)
        self._shared.publish(message)

    async def renew(self, message: bytes) -> Lease:
        """Renew this node's lease, and publish a message."""
        now, leases = self._shared.clock(), self._shared.leases
        held = leases.get(self.node, float("-inf")) >= now
        leases[self.node] = now + self._lease_s
        self._shared.publish(message)
        return Lease(held, {node: ends_at - now for node, ends_at in leases.items()})

    async def read(self, topic: str, node: str) -> Members:
        """The members of one node."""
        return dict(self._shared.members.get((topic, node), {}))

    async def nodes(self) -> list[str]:
        """All nodes whose lease has not run out."""
        now = self._shared.clock()
        return [node for node, ends_at in self._shared.leases.items() if ends_at >= now]

    async def remove(self, node: str, message: bytes = b"") -> None:
        """Remove all members of a node, and its lease."""
        for key in [key for key in self._shared.members if key[1] == node]:
            del self._shared.members[key]
        _ = self._shared.leases.pop(node, None)
        if message:
            self._shared.publish(message)
