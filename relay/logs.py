"""Logging at a sane rate.

Owns the decision whether a line is worth writing now; must not know what it is about.
"""

import logging
import time
from collections.abc import Callable


class Throttle:
    """Write the first line of a kind at once, then at most one each interval, saying how many were left out.

    Args: logger: where to.
          interval_s: seconds between two lines of one kind.
    """

    def __init__(
        self, logger: logging.Logger, interval_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._last: dict[str, float] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, kind: str, text: str, *args: object) -> None:
        """Log ``text % args`` as a warning, unless a line of this ``kind`` was written less than an interval ago."""
        if self._is_due(kind):
            text += self._left_out_since(kind)
            self._logger.warning(text, *args)

    def error(self, kind: str, error: BaseException, text: str, *args: object) -> None:
        """Log ``text % args`` as an error, with the traceback of ``error``, under the same rule."""
        if self._is_due(kind):
            text += self._left_out_since(kind)
            self._logger.error(text, *args, exc_info=error)

    def _is_due(self, kind: str) -> bool:
        now = self._clock()
        last = self._last.get(kind)
        if last is not None and now - last < self._interval_s:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        self._last[kind] = now
        return True

    def _left_out_since(self, kind: str) -> str:
        left_out = self._left_out.pop(kind, 0)
        return f" ({left_out} more of this kind since the last line)" if left_out else ""
