"""`relay.control`: orders among nodes, and what is none."""

import pytest

from relay.control import Order, decode, encode


@pytest.mark.parametrize(
    "order",
    [
        Order("disconnect", "alice", "n1"),
        Order("disconnect", "é", "n1", reason="banned"),
        Order("kick", "a", "n", "room:1"),
    ],
)
def test_order_comes_back_as_it_was(order: Order) -> None:
    assert decode(encode(order)) == order


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
def test_what_is_no_order_is_none(data: bytes) -> None:
    assert decode(data) is None


def test_order_of_a_later_version_with_more_in_it_is_understood() -> None:
    data = b'{"do":"disconnect","user":"alice","sender":"n","until":5}'
    assert decode(data) == Order("disconnect", "alice", "n")
