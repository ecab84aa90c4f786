"""Presence in memory, for the bus of one process.

Owns the members and leases of the nodes that share it; must not know who is shown what.
"""

import time
import uuid
from collections.abc import Callable, Sequence

from relay.brokers.base import Lease, Numbering, OwnChange
from relay.protocol.presence import Members, apply


class SharedPresence:
    """What the nodes of one process share, in place of a server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock: Callable[[], float] = clock
        self.members: dict[tuple[str, str], Members] = {}
        """By topic and node."""
        self.leases: dict[str, float] = {}
        """When they end, by the clock."""
        self.written: dict[str, int] = {}
        """Number of each node's last write; negative where not all of its members are there."""
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

    async def write(self, changes: Sequence[OwnChange], message: bytes, numbering: Numbering) -> bool:
        """Write changes of this node's members and publish a message about them, as one step."""
        for topic, change, is_empty in changes:
            if is_empty:
                _ = self._shared.members.pop((topic, self.node), None)
            else:
                apply(self._shared.members.setdefault((topic, self.node), {}), change)
        is_kept = self._is_kept(numbering.known)
        self._shared.written[self.node] = numbering.number if is_kept and numbering.is_whole else -numbering.number
        self._shared.publish(message)
        return is_kept

    def _is_kept(self, known: int) -> bool:
        return abs(self._shared.written.get(self.node, 0)) >= known

    async def clear(self) -> None:
        """Remove this node's members, before they are written again."""
        self._clear(self.node)

    def _clear(self, node: str) -> None:
        _ = self._shared.written.pop(node, None)
        for key in [key for key in self._shared.members if key[1] == node]:
            del self._shared.members[key]

    async def renew(self, message: bytes, known: int, *, is_new: bool) -> Lease:
        """Renew this node's lease, and publish a message."""
        now, leases = self._shared.clock(), self._shared.leases
        if is_new:
            _ = self._shared.written.setdefault(self.node, 0)
        held = leases.get(self.node, float("-inf")) >= now and self._is_kept(known)
        leases[self.node] = now + self._lease_s
        self._shared.publish(message)
        return Lease(held, {node: ends_at - now for node, ends_at in leases.items()})

    async def read(self, topic: str, node: str, known: int) -> Members | None:
        """The members of one node; None where not all that it has written is there."""
        if self._shared.written.get(node, -1) < known:
            return None
        return dict(self._shared.members.get((topic, node), {}))

    async def lost(self, topics: Sequence[str]) -> list[str]:
        """Those of these topics, of which this node has members, that have none of them left."""
        return [topic for topic in topics if not self._shared.members.get((topic, self.node))]

    async def numbers(self, nodes: Sequence[str]) -> list[int | None]:
        """The number of each node's last write; None where it is not there."""
        written = self._shared.written
        return [abs(written[node]) if node in written else None for node in nodes]

    async def nodes(self) -> list[str]:
        """All nodes whose lease has not run out."""
        now = self._shared.clock()
        return [node for node, ends_at in self._shared.leases.items() if ends_at >= now]

    async def remove(self, node: str, message: bytes = b"") -> None:
        """Remove all members of a node, and its lease."""
        self._clear(node)
        _ = self._shared.leases.pop(node, None)
        if message:
            self._shared.publish(message)
