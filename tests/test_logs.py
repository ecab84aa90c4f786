"""`relay.logs`: at most one line of a kind in an interval, and none forgotten."""

import inspect
import logging

import pytest

from relay.logs import Throttle

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
def throttle(clock: Clock, caplog: pytest.LogCaptureFixture) -> Throttle:
    caplog.set_level(logging.WARNING, logger.name)
    return Throttle(logger, 10.0, clock)


def test_first_line_of_a_kind_is_written_at_once(throttle: Throttle, caplog: pytest.LogCaptureFixture) -> None:
    throttle.warning("slow", "socket %s reads slowly", "1f")
    assert caplog.messages == ["socket 1f reads slowly"]
    assert caplog.records[0].levelno == logging.WARNING


def test_lines_within_the_interval_are_left_out_and_told_with_the_next(
    throttle: Throttle, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        throttle.warning("slow", "socket %d", number)
        clock.now += 3.0
    clock.now = 10.0
    throttle.warning("slow", "socket %d", 5)
    clock.now = 20.0
    throttle.warning("slow", "socket %d", 6)
    assert caplog.messages == ["socket 0", "socket 5 (3 more of this kind since the last line)", "socket 6"]


def test_interval_begins_with_the_line_that_was_written(
    throttle: Throttle, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a steady stream of lines would never be heard of again."""
    for _ in range(21):
        throttle.warning("slow", "line")
        clock.now += 1.0
    assert len(caplog.messages) == 3


def test_kinds_do_not_silence_each_other(throttle: Throttle, caplog: pytest.LogCaptureFixture) -> None:
    throttle.warning("slow", "one")
    throttle.warning("bus", "two")
    throttle.warning("slow", "three")
    assert caplog.messages == ["one", "two"]


def test_error_is_written_with_its_traceback_under_the_same_rule(
    throttle: Throttle, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    fault = ValueError("broken")
    throttle.error("plugin", fault, "plugin %r failed", "echo")
    throttle.error("plugin", fault, "plugin %r failed", "echo")
    clock.now = 10.0
    throttle.error("plugin", fault, "plugin %r failed", "echo")
    told = "plugin 'echo' failed (1 more of this kind since the last line)"
    assert caplog.messages == ["plugin 'echo' failed", told]
    assert all(record.levelno == logging.ERROR for record in caplog.records)
    assert all(record.exc_info is not None and record.exc_info[1] is fault for record in caplog.records)


def test_clock_is_monotonic_by_default() -> None:
    """A wall clock that is set back would silence the log."""
    assert inspect.signature(Throttle).parameters["clock"].default.__name__ == "monotonic"
