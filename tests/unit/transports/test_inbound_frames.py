"""`relay.transports.inbound_frames`: which frames are read, and where the others end."""

import random

import pytest

from relay.transports.inbound_frames import Read, read_messages
from tests.support.frame_streams import frame

MAX_BYTES = 1000
GENERATOR = random.Random(1)


def of(first: int, payload: bytes, **form: object) -> bytes:
    return frame(GENERATOR, first, payload, **form)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 1, 125, 126, MAX_BYTES])
def test_whole_masked_frames_are_read(size: int) -> None:
    text, data = of(0x81, b"x" * size), of(0x82, bytes(size))
    assert read_messages(text + data, 4096, MAX_BYTES) == Read(["x" * size, bytes(size)], len(text + data), 0)
    assert read_messages(memoryview(text + data), 4096, MAX_BYTES).messages == ["x" * size, bytes(size)]


def test_no_further_frame_is_read_than_asked_for() -> None:
    one = of(0x81, b"x")
    assert read_messages(one * 10, len(one) + 1, MAX_BYTES) == Read(["x", "x"], 2 * len(one), 0)


@pytest.mark.parametrize(
    "other",
    [
        of(0x01, b"begin"),
        of(0x80, b"end"),
        of(0x88, b""),
        of(0x89, b"ping"),
        of(0x8A, b"pong"),
        of(0xC1, b"compressed"),
        of(0x83, b"reserved"),
        of(0x81, b"unmasked", masked=False),
        of(0x81, b"short", length_form=2),
        of(0x81, b"short", length_form=8),
        of(0x81, b"x" * 70_000),
        of(0x81, b"x" * (MAX_BYTES + 1)),
        of(0x81, b"\xff"),
        of(0x82, b"x" * 300)[:-1],
    ],
)
def test_all_other_frames_are_left_with_their_size(other: bytes) -> None:
    whole = len(other) + (1 if other[0] == 0x82 else 0)
    simple = of(0x81, b"x")
    assert read_messages(simple + other, 1_000_000, MAX_BYTES) == Read(["x"], len(simple), whole)


@pytest.mark.parametrize(
    ("head", "least"), [(of(0x81, b"x"), 2), (of(0x81, b"x" * 200), 4), (of(0x81, b"x" * 70_000), 10)]
)
def test_head_that_has_not_come_is_waited_for(head: bytes, least: int) -> None:
    for come in range(least):
        assert read_messages(head[:come], 4096, MAX_BYTES) == Read([], 0, 0)
    assert read_messages(head[:least], 4096, MAX_BYTES) == Read([], 0, len(head))
