"""Logging: rate limits, text and JSON, the socket that a line is about, and the lines about sockets themselves.

Owns the decision whether a line is written now, and how it looks; must not know what has led to it.
"""

import json
import logging
import re
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol


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


class RateLimitedLogger:
    """Write the first messages of a kind at once, then so many each interval, and say how many were suppressed.

    The number comes with the next message of the kind, or from `flush`, whichever is first.

    Args: logger: where to.
          interval_s: seconds, counted from the first of the messages that were written in them.
          lines: of one kind in an interval.
          later: ``later(delay_s, flush)`` calls `flush` after a while; for an owner that does not call it by a clock.
    """

    def __init__(
        self,
        logger: logging.Logger,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        lines: int = 1,
        later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._lines = lines
        self._later = later
        # By kind: when the interval began, and how many lines it may still have.
        self._began: dict[str, float] = {}
        self._room: dict[str, int] = {}
        # By kind: how many messages were suppressed, and the level of the last.
        self._suppressed: dict[str, tuple[int, int]] = {}

    def warning(self, kind: str, text: str, *args: object, **fields: object) -> None:
        """Log ``text % args`` as a warning, unless the interval has all its lines of this ``kind``.

        Args: fields: what the JSON form has beside the message, and the ``kind``.
        """
        if self._is_due(kind, logging.WARNING):
            text += self._take_suppressed(kind)
            self._logger.warning(text, *args, extra={"kind": kind, **fields})

    def error(self, kind: str, error: BaseException, text: str, *args: object) -> None:
        """Log ``text % args`` as an error, with the traceback of ``error``, under the same rule."""
        if self._is_due(kind, logging.ERROR):
            text += self._take_suppressed(kind)
            self._logger.error(text, *args, exc_info=error)

    def info(self, kind: str, subject: Subject, text: str, *args: object, **fields: object) -> None:
        """Log ``text % args`` about a socket, which is named before and after it, under the same rule.

        The ``kind`` is one of the fields.
        """
        if self._logger.isEnabledFor(logging.INFO) and self._is_due(kind, logging.INFO):
            user = "" if subject.user is None else f", user {subject.user!r}"
            text = f"socket %s: {text}; address %s%s{self._take_suppressed(kind)}"
            extra = {"kind": kind, **about(subject), **fields}
            self._logger.info(text, subject.id, *args, subject.address, user, extra=extra)

    def _is_due(self, kind: str, level: int) -> bool:
        now = self._clock()
        began = self._began.get(kind)
        if began is None or now - began >= self._interval_s:
            self._began[kind] = now
            self._room[kind] = self._lines - 1
            return True
        if self._room[kind]:
            self._room[kind] -= 1
            return True
        count, _ = self._suppressed.get(kind, (0, 0))
        self._suppressed[kind] = count + 1, level
        if count == 0 and self._later is not None:
            self._later(began + self._interval_s - now + 0.01, self.flush)  # a timer may be early by a tick
        return False

    def flush(self, *, at_once: bool = False) -> None:
        """Say how many messages were suppressed of each kind whose interval is over, at the level that they had.

        Args: at_once: of each kind, since nothing comes later.
        """
        now = self._clock()
        for kind in tuple(self._suppressed):
            if at_once or now - self._began[kind] >= self._interval_s:
                count, level = self._suppressed.pop(kind)
                text = "%d similar message%s suppressed (%s)"
                extra = {"kind": kind, "suppressed": count}
                self._logger.log(level, text, count, "s" if count > 1 else "", kind, extra=extra)

    def _take_suppressed(self, kind: str) -> str:
        count, _ = self._suppressed.pop(kind, (0, 0))
        return f" ({count} similar message{'s' if count > 1 else ''} suppressed)" if count else ""


class RateLimitedLoggers:
    """The rate-limited loggers of one owner, a relay or a server, which flushes all of them together.

    Args: later: as of `RateLimitedLogger`.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self._clock = clock
        self._later = later
        self._made: dict[tuple[str, float, int], RateLimitedLogger] = {}

    def get(self, name: str, interval_s: float = 10.0, lines: int = 1) -> RateLimitedLogger:
        """The one that writes to the logger ``name`` at this rate: the same one at each call."""
        key = (name, interval_s, lines)
        if key not in self._made:
            self._made[key] = RateLimitedLogger(logging.getLogger(name), interval_s, self._clock, lines, self._later)
        return self._made[key]

    def flush(self, *, at_once: bool = False) -> None:
        """Flush each; see `RateLimitedLogger.flush`."""
        for logger in self._made.values():
            logger.flush(at_once=at_once)


_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
"""What every record has; anything else came as ``extra``. The last is Uvicorn's: the message in colours."""


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a record has beside its message: its ``extra``, and the socket it is about."""
    fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    subject = SUBJECT.get()
    return fields if subject is None or "socket" in fields else about(subject) | fields


class TextFormatter(logging.Formatter):
    """``<time> <level> <logger>: <message>``, and the socket where the message does not name it, all in one line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, and below it the traceback if there is one."""
        cached, record.exc_text = record.exc_text, None  # another formatter's
        try:
            return super().format(record)
        finally:
            record.exc_text = cached

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its traceback."""
        record.message = one_line(record.message)
        socket = fields_of(record).get("socket")
        named = socket is None or str(socket) in record.message
        return super().formatMessage(record) + ("" if named else one_line(f" [socket {socket}]"))

    def formatException(self, ei: Any) -> str:
        """The traceback, in which no line can be taken for one of the log."""
        return format_exception(ei)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, fields, and ``exception`` if any.

    Line breaks within a text stay, escaped as JSON has it; other control characters become visible.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The whole line; a traceback is text inside it."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage(), keep="\n"),
        }
        fields = fields_of(record)
        line = {name: printable(one, keep="\n") if isinstance(one, str) else one for name, one in fields.items()} | line
        if record.exc_info:
            line["exception"] = format_exception(record.exc_info)
        try:
            text = json.dumps(line, default=_shown, allow_nan=False)
        except (ValueError, TypeError, RecursionError):  # NaN, keys that are no text, what contains itself
            text = ""
        if text and len(text) <= _JSON_MAX:
            return text
        return json.dumps({name: one if isinstance(one, str) else _shown(one) for name, one in line.items()})


def _shown(value: object) -> str:
    return printable(repr(value))


# What strangers write must not look like another line, nor steer the terminal that shows it.

LINE_MAX = 8192
"""Characters of a message, or of a line of a traceback; what is beyond is counted and left out."""
_TRACEBACK_MAX = 400
"""Lines of a traceback."""
_JSON_MAX = 65_536
"""Characters of a line of JSON; in a longer one lists and objects become text of `LINE_MAX` characters at the most."""
_HEADS = ("Traceback (most recent call last):", "During handling of", "The above exception was")

_UNPRINTABLE = re.compile(
    "[\x00-\x08\n-\x1f\x7f-\x9f"  # C0 without the tab, DEL, C1: among them the escape of terminals
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff"  # line breaks of Unicode, what turns the direction of text
    "\ud800-\udfff]"  # half a surrogate pair, which no stream can write
)


def printable(text: str, keep: str = "") -> str:
    """With control characters as escapes, but for those to ``keep``, and of `LINE_MAX` characters at the most."""
    if len(text) > LINE_MAX:
        text = f"{text[:LINE_MAX]}… ({len(text) - LINE_MAX} more characters)"
    if _UNPRINTABLE.search(text) is None:
        return text
    return _UNPRINTABLE.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """The same, for a line of the log: a line break within it becomes ``\\n``, those at its end are left out."""
    return printable(text.rstrip("\r\n"))


def format_exception(exc_info: Any) -> str:
    """A traceback as Python shows it, but that no line of an exception's text or notes begins as one of the log may."""
    _, error, trace = exc_info
    lines = "".join(traceback.format_exception(error, error, trace)).rstrip("\n").split("\n")
    heads = (*_HEADS, *_names(error))
    lines = [printable(line if line.startswith((" ", *heads)) or not line else f"    {line}") for line in lines]
    if len(lines) > _TRACEBACK_MAX:
        half = _TRACEBACK_MAX // 2
        lines[half:-half] = [f"    … {len(lines) - 2 * half} more lines"]
    return "\n".join(lines)


def _names(error: BaseException | None) -> set[str]:
    """The types of an exception and of those behind it, as tracebacks name them."""
    names: set[str] = set()
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        name, module = type(one).__qualname__, type(one).__module__
        names.add(name if module in ("builtins", "__main__") else f"{module}.{name}")
        waiting += [one.__cause__, one.__context__]
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
    return names


LINES_MAX = 200
INTERVAL_S = 10.0
"""So many lines of one kind in so many seconds; then one says how many were suppressed."""


class Totals(NamedTuple):
    """What a socket did until its end."""

    open_s: float
    joins: int
    """Joins that were accepted."""
    pushes: int
    """Pushes that it sent, refused ones included."""
    events: int
    """Events of its topics while it had joined them."""
    dropped: int
    """Of these, events that it missed because it read too slowly."""


class ConnectionLog:
    """Writes these lines, all under one logger, ``relay.socket``."""

    def __init__(self, loggers: RateLimitedLoggers) -> None:
        self._log = loggers.get("relay.socket", INTERVAL_S, LINES_MAX)

    def connected(self, socket: Subject) -> None:
        """A handshake was accepted."""
        self._log.info("connect", socket, "connected")

    def join_refused(self, socket: Subject, topic: str, reason: str, because: str = "") -> None:
        """A join was answered with an error.

        Args: because: what the line says besides, and the client does not learn.
        """
        text = "join of %.255r refused: %.255s"
        said = _line(f"{reason} ({because})" if because else reason)
        self._log.info("join refused", socket, text, topic, said, topic=topic[:255], reason=reason[:255])

    def rate_limited(self, socket: Subject, topic: str, event: str) -> None:
        """A message over the rate was turned away."""
        text = "rate limited: %.255r on %.255r"
        self._log.info("rate limited", socket, text, event, topic, topic=topic[:255])

    def disconnected(self, socket: Subject, code: int | None, reason: str, by: str, totals: Totals) -> None:
        """A socket has ended.

        Args: code: of the close; None where there was none.
              by: "client" or "relay".
        """
        self._log.info(
            "disconnect",
            socket,
            "disconnected by the %s,%s %.123r, after %.1f s; %d joins, %d pushes, %d events, %d of them dropped",
            by,
            "" if code is None else f" code {code}",
            reason,
            *totals,
            code=code,
            reason=reason[:123],
            by=by,
            open_s=round(totals.open_s, 3),
            joins=totals.joins,
            pushes=totals.pushes,
            events=totals.events,
            dropped=totals.dropped,
        )


def _line(text: str) -> str:
    """Without line breaks: a plugin's own words may have some."""
    return " ".join(text.split())


LOGGERS = (
    "relay",
    "relay.auth",
    "relay.broadcaster",
    "relay.console",
    "relay.node",
    "relay.operators",
    "relay.plugins",
    "relay.presence",
    "relay.proxy",
    "relay.webhooks",
    "relay.redis",
    "relay.server",
    "relay.socket",
)
"""All loggers of the relay. Each cleans its records, since in a team's own app the formatter is the team's."""


def clean(record: logging.LogRecord) -> bool:
    """Clean a record, whatever formats it: its message, its fields and the text of its traceback. Always True."""
    try:
        message = record.getMessage()
    except Exception:  # a wrong number of arguments; the handler says so
        return True
    # Untouched where there is nothing to clean: who groups lines by their pattern finds it.
    if (cleaned := one_line(message)) != message:
        record.msg, record.args = cleaned, ()
    for name, value in vars(record).items():
        if name not in _STANDARD and isinstance(value, str):
            setattr(record, name, printable(value))
    if record.exc_info and record.exc_info[1] is not None:
        text = format_exception(record.exc_info)
        if text != "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n"):
            record.exc_text = text  # which formatters of `logging` take for the one that they would make
    return True


for _name in LOGGERS:
    logging.getLogger(_name).addFilter(clean)


UVICORN_LOGGERS = ("uvicorn.access", "uvicorn.error")
"""Loggers of Uvicorn that write the query of a request: the first of each request, the second of each handshake."""

_TOKEN = re.compile(r"([?&](?:token|userToken)=)[^&\s]+")


def mask_tokens(record: logging.LogRecord) -> bool:
    """Replace tokens in the query of an address by ``***``, where the server writes it to its log. Always True."""
    if isinstance(record.args, tuple):
        record.args = tuple(_TOKEN.sub(r"\1***", arg) if isinstance(arg, str) else arg for arg in record.args)
    return True


for _name in UVICORN_LOGGERS:
    logging.getLogger(_name).addFilter(mask_tokens)
