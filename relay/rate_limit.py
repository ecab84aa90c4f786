"""Rate limits: token buckets, and the message rates of one socket.

Owns the counting; must not know transports or the clock: the time is passed in, in monotonic seconds.
"""

import math

from relay.config_sections import LimitsConfig


class TokenBucket:
    """A token bucket: so many at once, and so many a second for long.

    Args: per_s: tokens that come in each second.
          burst: tokens it holds, and starts with.
          now: the time.
    """

    __slots__ = ("_burst", "_last", "_per_s", "_tokens", "violations")

    def __init__(self, per_s: float, burst: float, now: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._tokens = burst
        self._last = now
        self.violations: int = 0
        """Tokens that were requested and refused since it was last full."""

    def take(self, now: float, wanted: int = 1) -> bool:
        """Take a token, or several; False where there are not so many. More than it holds are taken from a full one."""
        tokens = self._tokens + (now - self._last) * self._per_s
        self._last = now
        if tokens >= self._burst:
            tokens = self._burst
            self.violations = 0
        if tokens < wanted and tokens < self._burst:
            self._tokens = tokens
            self.violations += wanted
            return False
        self._tokens = tokens - wanted
        return True


_ADDRESSES_MAX = 10_000
"""Addresses that are counted one by one; of more at once, the newest are not counted."""


class AddressBuckets:
    """A bucket for each address, forgotten once it is full again.

    In two generations: who asks is in the younger one, the older one is dropped with all who did not.

    Args: per_s: tokens of one address that come in each second.
          burst: tokens that it starts with.
          now: the time.
    """

    __slots__ = ("_burst", "_old", "_per_s", "_since", "_young")

    def __init__(self, per_s: float, burst: float, now: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._since = now
        self._young: dict[str, TokenBucket] = {}
        self._old: dict[str, TokenBucket] = {}

    def take(self, address: str, now: float) -> bool:
        """Take a token of an address; False where it has none."""
        if now - self._since >= self._burst / self._per_s:
            self._old, self._young, self._since = self._young, {}, now
        bucket = self._young.get(address) or self._old.pop(address, None)
        if bucket is None:
            if len(self) >= _ADDRESSES_MAX:
                return True
            bucket = TokenBucket(self._per_s, self._burst, now)
        self._young[address] = bucket
        return bucket.take(now)

    def __len__(self) -> int:
        """Addresses that are remembered."""
        return len(self._young) + len(self._old)


PORTION_BYTES = 65_536
"""A message counts once for each such portion of it that has begun: what it costs to read grows with its size."""


class MessageRateLimiter:
    """One socket's joins and pushes against the rates that the settings allow it."""

    __slots__ = ("_joins", "_pushes", "_violations_max")

    def __init__(self, limits: LimitsConfig, now: float) -> None:
        self._joins = TokenBucket(limits.joins_per_s, limits.joins_burst, now) if limits.joins_per_s else None
        self._pushes = TokenBucket(limits.pushes_per_s, limits.pushes_burst, now) if limits.pushes_per_s else None
        self._violations_max = limits.rate_limit_violations_max or math.inf

    def allows(self, event: str, now: float, size: int = 0) -> bool:
        """Take one message into account, and say whether it is within its rate. All but joins count as pushes.

        Args: size: of its frame, in bytes; of text in UTF-8.
        """
        bucket = self._joins if event == "phx_join" else self._pushes
        return bucket is None or bucket.take(now, 1 + size // PORTION_BYTES)

    @property
    def is_exhausted(self) -> bool:
        """Whether so many messages were over the rate, without a pause, that the socket is to be closed."""
        return any(
            bucket is not None and bucket.violations > self._violations_max for bucket in (self._joins, self._pushes)
        )
