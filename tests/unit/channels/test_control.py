"""`relay.channels.control`: messages between nodes, and data that is not one."""

import pytest

from relay.channels.control import ControlMessage, decode, encode


@pytest.mark.parametrize(
    "message",
    [
        ControlMessage("disconnect", "alice", "n1"),
        ControlMessage("disconnect", "é", "n1", reason="banned"),
        ControlMessage("kick", "a", "n", "room:1"),
    ],
)
def test_message_comes_back_as_it_was(message: ControlMessage) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"do":"reboot","user":"alice","sender":"n"}',
        b'{"do":"disconnect","user":"","sender":"n"}',
        b'{"do":"disconnect","user":7,"sender":"n"}',
        b'{"do":"disconnect","user":"alice"}',
        b'{"do":"kick","user":"alice","sender":"n"}',
        b"[" * 100_000,
        b'{"do":"kick","x":' + b"[" * 100_000,
    ],
)
def test_data_that_is_not_a_message_is_ignored(data: bytes) -> None:
    assert decode(data) is None


def test_message_of_a_later_version_with_more_fields_is_understood() -> None:
    data = b'{"do":"disconnect","user":"alice","sender":"n","until":5}'
    assert decode(data) == ControlMessage("disconnect", "alice", "n")
