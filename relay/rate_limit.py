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
