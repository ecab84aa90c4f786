"""`relay.log`: at most one line of a kind in an interval, and none forgotten."""

import inspect
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import relay
from relay.log import (
    LOGGERS,
    SUBJECT,
    UVICORN_LOGGERS,
    JsonFormatter,
    RateLimitedLogger,
    RateLimitedLoggers,
    TextFormatter,
)

logger = logging.getLogger("relay.tests.logs")


class Clock:
    """Seconds, turned by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limited(clock: Clock, caplog: pytest.LogCaptureFixture) -> RateLimitedLogger:
    caplog.set_level(logging.WARNING, logger.name)
    return RateLimitedLogger(logger, 10.0, clock)


def test_first_line_of_a_kind_is_written_at_once(limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture) -> None:
    limited.warning("slow", "socket %s reads slowly", "1f")
    assert caplog.messages == ["socket 1f reads slowly"]
    assert caplog.records[0].levelno == logging.WARNING


def test_messages_within_the_interval_are_suppressed_and_counted_with_the_next(
    limited: RateLimitedLogger, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        limited.warning("slow", "socket %d", number)
        clock.now += 3.0
    clock.now = 10.0
    limited.warning("slow", "socket %d", 5)
    clock.now = 20.0
    limited.warning("slow", "socket %d", 6)
    assert caplog.messages == ["socket 0", "socket 5 (3 similar messages suppressed)", "socket 6"]


def test_interval_begins_with_the_line_that_was_written(
    limited: RateLimitedLogger, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a steady stream of lines would never be heard of again."""
    for _ in range(21):
        limited.warning("slow", "line")
        clock.now += 1.0
    assert len(caplog.messages) == 3


def test_kinds_do_not_silence_each_other(limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture) -> None:
    limited.warning("slow", "one")
    limited.warning("bus", "two")
    limited.warning("slow", "three")
    assert caplog.messages == ["one", "two"]


def test_error_is_written_with_its_traceback_under_the_same_rule(
    limited: RateLimitedLogger, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    fault = ValueError("broken")
    limited.error("plugin", fault, "plugin %r failed", "echo")
    limited.error("plugin", fault, "plugin %r failed", "echo")
    clock.now = 10.0
    limited.error("plugin", fault, "plugin %r failed", "echo")
    told = "plugin 'echo' failed (1 similar message suppressed)"
    assert caplog.messages == ["plugin 'echo' failed", told]
    assert all(record.levelno == logging.ERROR for record in caplog.records)
    assert all(record.exc_info is not None and record.exc_info[1] is fault for record in caplog.records)


def test_clock_is_monotonic_by_default() -> None:
    """A wall clock that is set back would silence the log."""
    assert inspect.signature(RateLimitedLogger).parameters["clock"].default.__name__ == "monotonic"


def test_so_many_lines_of_a_kind_are_written_in_an_interval(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limited = RateLimitedLogger(logger, 1.0, clock, lines=3)
    for number in range(10_000):
        limited.warning("storm", "line %d", number)
    clock.now = 1.0
    limited.warning("storm", "line")
    assert caplog.messages == ["line 0", "line 1", "line 2", "line (9997 similar messages suppressed)"]


def test_flush_says_how_many_messages_were_suppressed_of_which_kind_and_at_which_level(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger.name)
    limited = RateLimitedLogger(logger, 10.0, clock)
    for _ in range(13):
        limited.warning("malformed", "refused")
    for _ in range(3):
        limited.error("plugin", ValueError("broken"), "failed")
        limited.info("connect", Somebody(), "connected")
    caplog.clear()
    limited.flush()
    assert caplog.messages == [], "the interval is not over"
    clock.now = 10.0
    limited.flush()
    limited.flush()
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "12 similar messages suppressed (malformed)"),
        (logging.ERROR, "2 similar messages suppressed (plugin)"),
        (logging.INFO, "2 similar messages suppressed (connect)"),
    ]
    assert vars(caplog.records[0]).items() >= {"kind": "malformed", "suppressed": 12}.items()


def test_flush_at_once_does_not_wait_for_the_interval(
    limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        limited.warning("slow", "line")
    limited.flush(at_once=True)
    assert caplog.messages == ["line", "1 similar message suppressed (slow)"]


def test_flush_is_scheduled_for_the_end_of_the_interval_where_a_timer_is_given(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    timers: list[tuple[float, Callable[[], None]]] = []
    limited = RateLimitedLogger(logger, 10.0, clock, later=lambda delay_s, flush: timers.append((delay_s, flush)))
    limited.warning("slow", "line")
    clock.now = 4.0
    for _ in range(3):
        limited.warning("slow", "line")
    ((delay_s, flush),) = timers
    assert 6.0 < delay_s < 6.1
    clock.now += delay_s
    flush()
    assert caplog.messages == ["line", "3 similar messages suppressed (slow)"]


def test_loggers_of_one_owner_are_flushed_together(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    loggers, others = RateLimitedLoggers(clock), RateLimitedLoggers(clock)
    assert loggers.get("relay.node") is loggers.get("relay.node")
    for name in ("relay.node", "relay.proxy"):
        for _ in range(2):
            loggers.get(name).warning("kind", "line")
        others.get(name).warning("kind", "another's line")
    loggers.flush(at_once=True)
    others.flush(at_once=True)
    said = [record.name for record in caplog.records if record.message == "1 similar message suppressed (kind)"]
    assert said == ["relay.node", "relay.proxy"]
    assert caplog.messages.count("another's line") == 2


class Somebody:
    """A socket, as far as the log is concerned."""

    def __init__(self, user: str | None = "ada") -> None:
        self.id = "1f-7"
        self.user = user
        self.address = "10.0.0.1"


def test_line_about_a_socket_names_it(limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger.name)
    limited.info("one", Somebody(), "joined %d topics", 3, topics=3)
    limited.info("two", Somebody(None), "left")
    assert caplog.messages == [
        "socket 1f-7: joined 3 topics; address 10.0.0.1, user 'ada'",
        "socket 1f-7: left; address 10.0.0.1",
    ]
    fields = {"kind": "one", "socket": "1f-7", "user": "ada", "address": "10.0.0.1", "topics": 3}
    assert vars(caplog.records[0]).items() >= fields.items()
    assert not hasattr(caplog.records[1], "user")


def test_message_below_the_level_is_not_counted_as_suppressed(
    limited: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    limited.info("one", Somebody(), "unread")
    caplog.set_level(logging.INFO, logger.name)
    limited.info("one", Somebody(), "read")
    assert caplog.messages == ["socket 1f-7: read; address 10.0.0.1, user 'ada'"]


def record(text: str, *args: object, **more: Any) -> logging.LogRecord:
    return logger.makeRecord(
        logger.name, logging.WARNING, "x.py", 1, text, args, more.pop("exc_info", None), extra=more
    )


def test_json_line_is_one_object_with_its_fields() -> None:
    line = JsonFormatter().format(record("said %r\nand more", "\u2028", socket="1f-7", ids={1}, level="mine"))
    assert "\n" not in line and line.isascii()
    read = json.loads(line)
    time = read.pop("time")
    assert time.endswith("+00:00") and len(time) == len("2026-01-01T00:00:00.000+00:00")
    assert read == {
        "level": "warning",
        "logger": "relay.tests.logs",
        "message": "said '\\u2028'\nand more",
        "socket": "1f-7",
        "ids": "{1}",
    }


def test_json_line_holds_its_traceback() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        line = JsonFormatter().format(record("failed", exc_info=sys.exc_info()))
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("\nValueError: broken")


def test_lines_written_by_a_handler_are_about_its_socket() -> None:
    token = SUBJECT.set(Somebody())
    try:
        read = json.loads(JsonFormatter().format(record("from a plugin")))
        text = TextFormatter().format(record("from a plugin"))
        other = json.loads(JsonFormatter().format(record("about another", socket="1f-8")))
    finally:
        SUBJECT.reset(token)
    assert (read["socket"], read["user"], read["address"]) == ("1f-7", "ada", "10.0.0.1")
    assert text.endswith(" WARNING relay.tests.logs: from a plugin [socket 1f-7]")
    assert other["socket"] == "1f-8" and "user" not in other


def test_text_line_names_the_socket_once() -> None:
    assert TextFormatter().format(record("socket 1f-7: slow", socket="1f-7")).endswith(": socket 1f-7: slow")
    assert TextFormatter().format(record("plain")).endswith(": plain")


# What strangers write.

FORGED = "2026-01-01 00:00:00,000 INFO relay: FORGED"
EVIL = f"x\n{FORGED}\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\x1b[2J\x9b31m\u202e\x00\ud83d"


def raised(error: BaseException) -> Any:
    try:
        raise error
    except BaseException:
        return sys.exc_info()


def test_text_line_is_one_line_and_steers_no_terminal() -> None:
    for made in (record(EVIL), record("%s", EVIL), record("%s", ValueError(EVIL)), record("plain", socket=EVIL)):
        line = TextFormatter().format(made)
        assert len(line.splitlines()) == 1 and line.isprintable(), ascii(line)
        assert "\\n2026-01-01" in line and line.encode()


def test_line_breaks_at_the_end_of_a_message_are_left_out() -> None:
    """Uvicorn's "Exception in ASGI application" ends with one."""
    assert TextFormatter().format(record("failed\r\n")).endswith(": failed")


def test_json_line_has_control_characters_as_visible_escapes() -> None:
    line = JsonFormatter().format(record("%s", EVIL, reason=EVIL, odd={EVIL}))
    read = json.loads(line)
    for text in (read["message"], read["reason"], read["odd"]):
        assert text.replace("\n", "").isprintable(), ascii(text)
    assert read["message"].startswith(f"x\n{FORGED}\\r")


@pytest.mark.parametrize("value", [float("nan"), {(1, 2): 3}, [float("inf")]])
def test_json_line_is_json_whatever_its_fields_are(value: Any) -> None:
    endless: list[Any] = []
    endless.append(endless)
    for one in (value, endless):
        read = json.loads(JsonFormatter().format(record("said", odd=one)), parse_constant=pytest.fail)
        assert read["odd"] == repr(one) and read["message"] == "said"


def test_very_long_values_are_bounded() -> None:
    long = "x" * 1_000_000
    line = TextFormatter().format(record("%s", long, exc_info=raised(ValueError(long))))
    assert len(line) < 20_000 and "more characters)" in line
    line = JsonFormatter().format(record("%s", long, reason=long, odd=[long], exc_info=raised(ValueError(long))))
    assert len(line) < 50_000 and json.loads(line)["level"] == "warning"
    many = TextFormatter().format(record("m", exc_info=raised(ValueError("\n" * 100_000))))
    assert many.count("\n") < 500


def chained(text: str) -> Exception:
    error = RuntimeError(text)
    error.__cause__ = ValueError(text)
    error.__context__ = KeyError(text)
    error.add_note(text)
    return error


@pytest.mark.parametrize(
    "error",
    [
        ValueError(EVIL),
        chained(EVIL),
        ExceptionGroup(EVIL, [ValueError(EVIL), chained(EVIL)]),
        SyntaxError(EVIL, ("f.py", 1, 1, EVIL)),
    ],
    ids=["plain", "chained", "group", "syntax"],
)
def test_no_line_of_a_traceback_can_be_taken_for_one_of_the_log(error: BaseException) -> None:
    made = record("failed", exc_info=raised(error))
    text = TextFormatter().format(made)
    lines = text.splitlines()
    assert "Traceback (most recent call last):" in text
    assert sum("FORGED" in line for line in lines) >= 1
    assert not any(line.startswith(("2026", "INFO")) for line in lines[1:]), text
    assert all(char.isprintable() or char in "\n\t" for char in text)
    assert json.loads(JsonFormatter().format(made))["exception"] in text


def test_traceback_without_such_text_is_shown_as_python_shows_it() -> None:
    made = record("failed", exc_info=raised(chained("broken")))
    plain = logging.Formatter().formatException(made.exc_info)  # type: ignore[arg-type]
    assert TextFormatter().format(made).endswith(f": failed\n{plain}".replace("\nbroken", "\n    broken"))


def test_relays_loggers_clean_what_a_teams_own_formatter_shows() -> None:
    """Mounted in an app, the relay does not choose the formatter."""
    lines: list[str] = []

    class Own(logging.Handler):
        def emit(self, made: logging.LogRecord) -> None:
            lines.append(logging.Formatter("%(levelname)s:%(name)s:%(message)s").format(made))
            lines.append(f"{getattr(made, 'reason', '')}")

    for name in LOGGERS:
        own, asked = Own(), logging.getLogger(name)
        asked.addHandler(own)
        try:
            asked.warning("refused: %s", f"x\nINFO:relay:{FORGED}{EVIL}", extra={"reason": EVIL})
            asked.error("failed", exc_info=chained(f"x\nINFO:relay:{FORGED}{EVIL}"))
        finally:
            asked.removeHandler(own)
    assert len(lines) >= 4 * len(LOGGERS)
    for line in "\n".join(lines).splitlines():
        assert line.isprintable() and not line.startswith(("INFO", "2026")), ascii(line)


def test_record_without_such_text_keeps_its_pattern(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("relay").warning("said %s", "héllo", extra={"n": 1})
    (made,) = caplog.records
    assert (made.msg, made.args, made.exc_text) == ("said %s", ("héllo",), None)
    logging.getLogger("relay").warning("100 %%, %s", "a\nb")
    assert caplog.messages[-1] == "100 %, a\\nb"


@pytest.mark.parametrize("name", UVICORN_LOGGERS)
def test_tokens_in_addresses_are_masked_in_uvicorns_log(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, name)
    log = logging.getLogger(name)
    path = "/socket/sse?topic=a&token=secret&userToken=secret&tokens=3"
    log.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "GET", path, "1.1", 200)
    log.info("no arguments, no token=secret")
    log.info("%(a)s", {"a": 1})
    masked = "/socket/sse?topic=a&token=***&userToken=***&tokens=3"
    assert caplog.messages == [f'127.0.0.1:5 - "GET {masked} HTTP/1.1" 200', "no arguments, no token=secret", "1"]


def test_every_logger_of_the_relay_is_among_those_that_clean() -> None:
    directory = Path(relay.__file__).parent
    text = "".join(path.read_text() for path in directory.rglob("*.py"))
    named = set(re.findall(r"(?:getLogger|\.get)\(\"(relay[a-z_.]*)\"", text))
    assert named == set(LOGGERS)
