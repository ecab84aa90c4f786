"""How many clients may connect: in all, from one address, and in a second.

Owns the counting; must not know transports or the clock: the time is passed in, in monotonic seconds.
"""

from relay.proxy_headers import is_loopback_address
from relay.rate_limit import AddressBuckets, TokenBucket
from relay.transports.handshake import HandshakeRejected

_OWN_NETWORK = "::/64"
"""The network of ``::1``, as it is counted."""


class ConnectionLimiter:
    """Counts who is in, and says who may still come. Zero turns a limit off.

    Args: sockets_max: sockets in all.
          sockets_per_address: sockets of one address; with zero, no address has a share of its own in handshakes.
          handshakes_per_s: handshakes in all, per second; as many may come at once. One address may have a quarter of
              them, or 10 where that is more.
          now: the time.
    """

    __slots__ = ("_addresses", "_handshakes", "_shares", "_sockets_max", "_sockets_per_address", "sockets")

    def __init__(self, *, sockets_max: int, sockets_per_address: int, handshakes_per_s: int, now: float) -> None:
        self.sockets: int = 0
        self._sockets_max = sockets_max
        self._sockets_per_address = sockets_per_address
        self._handshakes = TokenBucket(handshakes_per_s, handshakes_per_s, now) if handshakes_per_s else None
        shared, share = handshakes_per_s and sockets_per_address, max(10, handshakes_per_s / 4)
        self._shares = AddressBuckets(share, share, now) if shared else None
        self._addresses: dict[str, int] = {}

    def acquire(self, address: str | None, now: float) -> HandshakeRejected | None:
        """Let a client in, who must `release` later, or say why not.

        Args: address: what it is counted by; None is not counted.
        """
        # First its own share, so that what is refused here takes nothing from the others.
        # This machine has no share of its own: an operator's load test, or a proxy that the settings do not name.
        is_own = address is None or address == _OWN_NETWORK or is_loopback_address(address)
        shares = None if is_own else self._shares
        if shares is not None and address is not None and not shares.take(address, now):
            return HandshakeRejected(
                429, "too many handshakes of this address at once; try again", "handshakes per address", 1
            )
        if self._handshakes is not None and not self._handshakes.take(now):
            return HandshakeRejected(503, "too many handshakes at once; try again", "handshakes per second", 1)
        if 0 < self._sockets_max <= self.sockets:
            return HandshakeRejected(503, "no room for another socket; try again later", "sockets in all", 10)
        if address is not None:
            count = self._addresses.get(address, 0)
            if 0 < self._sockets_per_address <= count:
                return HandshakeRejected(429, "too many sockets of this address", "sockets per address", 10)
            self._addresses[address] = count + 1
        self.sockets += 1
        return None

    def release(self, address: str | None) -> None:
        """Count one that was let in as gone."""
        self.sockets -= 1
        if address is not None:
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]

    def __len__(self) -> int:
        """Addresses that are remembered: they have a socket, or have knocked in the last seconds."""
        return len(self._addresses) + (len(self._shares) if self._shares is not None else 0)
