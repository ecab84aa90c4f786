"""Logging at a sane rate, as text or as JSON, and whom a line is about.

Owns the decision whether a line is worth writing now, and how it looks; must not know what it is about.
"""

import json
import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Protocol


class Subject(Protocol):
    """A socket, as a line about it names it."""

    @property
    def id(self) -> str:
        """Unique among all nodes."""

    @property
    def user(self) -> str | None:
        """Whose it is, where a token says so."""

    @property
    def address(self) -> str | None:
        """Where its client is."""


SUBJECT: ContextVar[Subject | None] = ContextVar("relay.subject", default=None)
"""The socket whose join, push or leave a handler deals with: lines that the handler writes are about it."""


def about(subject: Subject) -> dict[str, object]:
    """Fields that name a socket: ``socket``, and ``user`` and ``address`` where they are known."""
    fields = {"socket": subject.id, "user": subject.user, "address": subject.address}
    return {name: value for name, value in fields.items() if value is not None}


class Throttle:
    """Write the first lines of a kind at once, then so many each interval, saying how many were left out.

    Args: logger: where to.
          interval_s: seconds, counted from the first of the lines that were written in them.
          lines: of one kind in an interval.
    """

    def __init__(
        self,
        logger: logging.Logger,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        lines: int = 1,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._lines = lines
        # By kind: when the interval began, and how many lines it may still have.
        self._began: dict[str, float] = {}
        self._room: dict[str, int] = {}
        self._left_out: dict[str, int] = {}

    def warning(self, kind: str, text: str, *args: object, **fields: object) -> None:
        """Log ``text % args`` as a warning, unless the interval has all its lines of this ``kind``.

        Args: fields: what the JSON form has beside the message, and the ``kind``.
        """
        if self._is_due(kind):
            text += self._left_out_since(kind)
            self._logger.warning(text, *args, extra={"kind": kind, **fields})

    def error(self, kind: str, error: BaseException, text: str, *args: object) -> None:
        """Log ``text % args`` as an error, with the traceback of ``error``, under the same rule."""
        if self._is_due(kind):
            text += self._left_out_since(kind)
            self._logger.error(text, *args, exc_info=error)

    def info(self, kind: str, subject: Subject, text: str, *args: object, **fields: object) -> None:
        """Log ``text % args`` about a socket, which is named before and after it, under the same rule.

        The ``kind`` is one of the fields.
        """
        if self._logger.isEnabledFor(logging.INFO) and self._is_due(kind):
            user = "" if subject.user is None else f", user {subject.user!r}"
            text = f"socket %s: {text}; address %s%s{self._left_out_since(kind)}"
            extra = {"kind": kind, **about(subject), **fields}
            self._logger.info(text, subject.id, *args, subject.address, user, extra=extra)

    def _is_due(self, kind: str) -> bool:
        now = self._clock()
        began = self._began.get(kind)
        if began is None or now - began >= self._interval_s:
            self._began[kind] = now
            self._room[kind] = self._lines - 1
            return True
        if self._room[kind]:
            self._room[kind] -= 1
            return True
        self._left_out[kind] = self._left_out.get(kind, 0) + 1
        return False

    def flush(self, level: int = logging.WARNING) -> None:
        """Say how many lines were left out of each kind whose interval is over and that has had no line since."""
        now = self._clock()
        for kind in [kind for kind in self._left_out if now - self._began[kind] >= self._interval_s]:
            self._logger.log(level, "%d more lines of the kind %r were left out", self._left_out.pop(kind), kind)

    def _left_out_since(self, kind: str) -> str:
        left_out = self._left_out.pop(kind, 0)
        return f" ({left_out} more of this kind since the last line)" if left_out else ""


_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
"""What every record has; anything else came as ``extra``. The last is Uvicorn's: the message in colours."""


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a record has beside its message: its ``extra``, and the socket it is about."""
    fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    subject = SUBJECT.get()
    return fields if subject is None or "socket" in fields else about(subject) | fields


class TextFormatter(logging.Formatter):
    """``<time> <level> <logger>: <message>``, and the socket where the message does not name it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its traceback."""
        socket = fields_of(record).get("socket")
        named = socket is None or str(socket) in record.message
        return super().formatMessage(record) + ("" if named else f" [socket {socket}]")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, fields, and ``exception`` if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The whole line; a traceback is text inside it."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line = fields_of(record) | line
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=repr)
