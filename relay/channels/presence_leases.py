"""Which nodes count as dead, by the leases that they renew in the store.

Owns since when a node without a lease is given time; must not know members.
"""

from collections.abc import Callable, Iterator

from relay.brokers.base import Lease

_DEAD_LEASES = 3
"""Leases after the end of its own for which the members of a node are left where they are."""


class NodeLeases:
    """The leases of other nodes.

    Args: lease_s: how long each lasts.
          clock: monotonic seconds.
    """

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self._lease_s = lease_s
        self._clock = clock
        # Nodes without a lease that may still renew it, each with when it counts as dead.
        self._missing: dict[str, float] = {}

    def is_dead(self, node: str, lease: Lease, *, is_certain: bool) -> bool:
        """Whether a node without a lease counts as dead.

        One that has none since a flush may still renew it; so may one whose lease has ended while this node could not
        renew its own: Redis was away, refused to write, or its clock was set.

        Args: is_certain: whether this node could renew its own lease the last time.
        """
        if node in lease.nodes and node not in self._missing and lease.held and is_certain:
            return True
        now = self._clock()
        return now > self._missing.setdefault(node, now + self._lease_s)

    def forget(self, node: str) -> None:
        """Learn that a node is alive, or counts as dead."""
        _ = self._missing.pop(node, None)

    def long_dead(self, lease: Lease) -> Iterator[str]:
        """The nodes whose members are to be removed from the store."""
        for node, left_s in lease.nodes.items():
            if left_s < -_DEAD_LEASES * self._lease_s and node not in self._missing:
                yield node
