"""`relay.brokers.cluster_map`: slots, redirections, and which of two nodes' words counts."""

import binascii

import pytest

from relay.brokers.cluster_map import (
    SLOTS,
    Endpoint,
    Redirect,
    Row,
    SlotMap,
    read_isolation,
    read_redirect,
    read_rows,
    slot_of,
)

A, B, C = Endpoint("10.0.0.1", 7000), Endpoint("10.0.0.2", 7000), Endpoint("10.0.0.3", 7000)


def everything(master: Endpoint, epoch: int) -> list[Row]:
    return [Row(0, SLOTS - 1, master, epoch, ())]


def test_slots_are_those_of_the_specification() -> None:
    """Source: Redis Cluster specification: the CRC of 123456789 is 0x31C3."""
    assert slot_of(b"123456789") == 0x31C3
    assert slot_of(b"foo") == 12182


@pytest.mark.parametrize(
    ("name", "hashed"),
    [
        (b"{user1000}.following", b"user1000"),
        (b"foo{{bar}}zap", b"{bar"),
        (b"foo{bar}{zap}", b"bar"),
        (b"{relay:presence}x", b"relay:presence"),
    ],
)
def test_text_in_braces_alone_decides(name: bytes, hashed: bytes) -> None:
    assert slot_of(name) == slot_of(hashed) != slot_of(name.replace(b"{", b""))


@pytest.mark.parametrize("name", [b"foo{}{bar}", b"foo{bar", b"foo}bar"])
def test_braces_with_nothing_in_them_do_not_count(name: bytes) -> None:
    assert slot_of(name) == binascii.crc_hqx(name, 0) % SLOTS


def test_redirections_are_read() -> None:
    assert read_redirect("MOVED 3999 10.0.0.2:7000", A) == Redirect(3999, B, False)
    assert read_redirect("ASK 3999 10.0.0.2:7000", A) == Redirect(3999, B, True)
    assert read_redirect("MOVED 1 :7000", A) == Redirect(1, A, False)
    assert read_redirect("MOVED 1 ::1:7000", A) == Redirect(1, Endpoint("::1", 7000), False)


@pytest.mark.parametrize("error", ["ERR x", "MOVED", "MOVED a b:1", "MOVED 1 b:c", "CLUSTERDOWN Hash slot not served"])
def test_other_errors_are_no_redirections(error: str) -> None:
    assert read_redirect(error, A) is None


def test_rows_have_masters_replicas_and_epochs() -> None:
    slots = [
        [0, 5, [b"10.0.0.1", 7000, b"a", []], [b"10.0.0.3", 7000, b"c", []]],
        [6, 9, [b"", 7001, b"b", []], [b"?", 7000, b"d", []]],
        [10, 11, [b"?", 7000, b"e", []]],
    ]
    nodes = b"a 10.0.0.1:7000@1 master - 0 0 7 connected 0-5\nb x myself,master - 0 0 8 connected 6-9\n\nshort line\n"
    assert read_rows(slots, nodes, A) == [Row(0, 5, A, 7, (C,)), Row(6, 9, Endpoint("10.0.0.1", 7001), 8, ())]
    assert [row.epoch for row in read_rows(slots, RuntimeError("NOPERM"), A)] == [0, 0]


HEALTHY, SUSPECTED, FAILED = b"master", b"master,fail?", b"master,fail"


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ((HEALTHY, HEALTHY), ""),
        ((HEALTHY, SUSPECTED), ""),
        ((b"master,nofailover", SUSPECTED), ""),
        ((SUSPECTED, SUSPECTED), "sees 1 of 3 masters"),
        ((SUSPECTED, FAILED), "sees 1 of 3 masters"),
        ((SUSPECTED,), "sees 1 of 2 masters"),
        ((), ""),
    ],
)
def test_node_without_a_majority_of_the_masters_says_so(others: tuple[bytes, ...], expected: str) -> None:
    """Replicas, and masters without slots, have no vote."""
    lines = [b"a x myself,master - 0 0 1 connected 0-5"]
    lines += [b"b x %b - 0 0 2 disconnected 6-9" % flags for flags in others]
    lines += [b"c x slave,fail? b 0 0 2 disconnected", b"d x master,fail - 0 0 3 disconnected"]
    lines += [b"e x master,fail? - 0 0 4 disconnected [7-<-b]", b"", b"short line"]
    assert read_isolation(b"\n".join(lines)) == expected


def test_node_that_does_not_say_has_a_majority() -> None:
    assert read_isolation(RuntimeError("NOPERM")) == ""


def test_younger_word_counts() -> None:
    found = SlotMap()
    assert found.learn(everything(A, 2), lambda _: True)
    assert not found.learn(everything(A, 2), lambda _: True)
    assert not found.learn(everything(B, 1), lambda _: True)
    assert found.masters == (A,)
    assert found.learn(everything(B, 3), lambda _: True)
    assert found.masters == (B,)
    assert list(found.slots(B)) == list(range(SLOTS))


def test_older_word_counts_against_a_node_that_does_not_answer() -> None:
    found = SlotMap()
    assert found.learn(everything(A, 2), lambda _: True)
    assert not found.learn(everything(B, 1), lambda _: True)
    assert found.learn(everything(B, 1), lambda _: False)
    assert found.masters == (B,)


def test_word_of_a_redirection_holds_until_the_next_look() -> None:
    found = SlotMap()
    _ = found.learn(everything(A, 2), lambda _: True)
    found.move(7, B)
    assert found.owners[7] == B
    assert found.learn(everything(A, 2), lambda _: True)
    assert found.owners[7] == A


def test_slots_that_no_node_names_keep_their_owner() -> None:
    found = SlotMap()
    _ = found.learn(everything(A, 2), lambda _: True)
    _ = found.learn([Row(0, 9, B, 3, (C,))], lambda _: True)
    assert found.owners[9] == B
    assert found.owners[10] == A
    assert found.replicas == (C,)
