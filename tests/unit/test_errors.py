"""`relay.errors`: the words and codes that clients and operators meet."""

import pytest

from relay import errors
from relay.errors import BusUnavailable, CloseCode, ConfigError, Reason, RelayError, WireError


def test_every_error_of_the_relay_is_caught_by_one_name() -> None:
    for error in (ConfigError, WireError, BusUnavailable):
        assert issubclass(error, RelayError)


def test_config_error_holds_one_sentence_for_each_problem() -> None:
    error = ConfigError("file: port: expected a number", "file: host: expected a string")
    assert error.problems == ("file: port: expected a number", "file: host: expected a string")
    assert str(error) == "file: port: expected a number\nfile: host: expected a string"


@pytest.mark.parametrize("size", [0, 122, 123, 124, 1000])
def test_wire_error_fits_a_close_frame(size: int) -> None:
    """Source: RFC 6455, section 5.5: 125 bytes, of which two are the code."""
    error = WireError(CloseCode.INVALID_PAYLOAD, "x" * size)
    assert error.code is CloseCode.INVALID_PAYLOAD
    assert str(error) == "x" * min(size, 123)


def test_close_codes_are_of_the_registry_and_let_clients_come_back() -> None:
    """Source: phoenix.js does not reconnect after 1000; RFC 6455, section 7.4, and the IANA registry."""
    assert set(CloseCode) <= {1001, 1002, 1003, 1007, 1008, 1009, 1011, 1012, 1013}


def test_phoenixs_own_reasons_are_worded_as_phoenix_does() -> None:
    """Source: Phoenix 1.9, ``lib/phoenix/socket.ex``."""
    phoenix = {Reason.UNMATCHED_TOPIC, Reason.TOO_MANY_TOPICS, Reason.JOIN_CRASHED}
    assert phoenix == {"unmatched topic", "too many channels joined", "join crashed"}


def test_reasons_are_short_words_for_people() -> None:
    for reason in Reason:
        assert reason.isascii() and reason == reason.lower() and 0 < len(reason) < 60


def test_every_close_code_says_when_it_is_sent() -> None:
    source = errors.__file__
    with open(source, encoding="utf-8") as file:
        text = file.read()
    for code in CloseCode:
        after = text.split(f"{code.name} = {code.value}\n", 1)[1]
        assert after.lstrip().startswith('"""'), code
