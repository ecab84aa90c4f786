"""`relay.log`: one line at each turn of a socket's life, and a bounded number of them."""

import logging

import pytest

from relay.log import INTERVAL_S, LINES_MAX, ConnectionLog, RateLimitedLoggers, Totals


class Somebody:
    """A socket, as far as the log is concerned."""

    id = "1f-7"
    user: str | None = None
    address = "10.0.0.1"


def test_storm_of_connects_writes_few_lines_and_tells_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "relay.socket")
    now = 0.0
    loggers = RateLimitedLoggers(lambda: now)
    log = ConnectionLog(loggers)
    for _ in range(10_000):
        log.connected(Somebody())
    assert len(caplog.messages) == LINES_MAX
    log.join_refused(Somebody(), "room:1", "unauthorized")
    assert "refused" in caplog.messages[-1], "other kinds go on"
    now = INTERVAL_S
    log.connected(Somebody())
    assert caplog.messages[-1].endswith(f" ({10_000 - LINES_MAX} similar messages suppressed)")


def test_suppressed_lines_are_counted_though_none_comes_after_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "relay.socket")
    now = 0.0
    loggers = RateLimitedLoggers(lambda: now)
    log = ConnectionLog(loggers)
    for _ in range(LINES_MAX + 3):
        log.connected(Somebody())
    loggers.flush()
    assert len(caplog.messages) == LINES_MAX, "the interval is not over"
    now = INTERVAL_S
    loggers.flush()
    loggers.flush()
    assert caplog.messages[LINES_MAX:] == ["3 similar messages suppressed (connect)"]


def test_nothing_that_a_client_says_breaks_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "relay.socket")
    log = ConnectionLog(RateLimitedLoggers())
    bad = "%s\nERROR relay: \x1b[31mforged" + 1000 * "x"
    log.join_refused(Somebody(), bad, bad.replace("\x1b", ""))
    log.rate_limited(Somebody(), bad, bad)
    log.disconnected(Somebody(), 1000, bad, "client", Totals(1.0, 0, 0, 0, 0))
    assert len(caplog.messages) == 3
    for message in caplog.messages:
        assert "\n" not in message and "\x1b" not in message and len(message) < 700
