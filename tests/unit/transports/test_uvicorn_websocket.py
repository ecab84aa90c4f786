"""`relay.transports.uvicorn_websocket`: what is read when, without a server."""

import random

import pytest
import uvicorn

from tests.support.frame_streams import Reading, difference, frame, protocol_config

GENERATOR = random.Random(1)


@pytest.fixture(scope="module")
def config() -> uvicorn.Config:
    return protocol_config()


def text(payload: bytes) -> bytes:
    return frame(GENERATOR, 0x81, payload)


def test_simple_frames_are_read_as_websockets_reads_them(config: uvicorn.Config) -> None:
    """A short form of `tests.integration.faults.test_frame_streams`."""
    for seed in range(500):
        assert difference(config, seed) == ""


def test_connection_is_read_on_while_a_message_waits_and_no_further_than_one_read(config: uvicorn.Config) -> None:
    """To pause and to resume the transport for each message would cost two calls of the kernel."""
    reading = Reading(config, True)
    reading.feed(text(b"1"))
    assert not reading.transport.is_paused
    reading.feed(text(b"2"))
    assert reading.transport.is_paused, "the application has not taken the first"
    reading.take(2)
    assert not reading.transport.is_paused
    assert [message["text"] for message in reading.messages] == ["1", "2"]


@pytest.mark.parametrize("reads_simple", [True, False])
def test_invalid_text_before_a_close_frame_ends_the_connection(config: uvicorn.Config, reads_simple: bool) -> None:
    """Both may come in one read, and websockets has answered the close by the time that the text is looked at."""
    reading = Reading(config, reads_simple)
    reading.protocol._reads_simple = reads_simple
    reading.feed(text(b"\xff") + frame(GENERATOR, 0x88, b"\x03\xe8"))
    assert reading.transport.is_closed
    reading.take(10)
    assert [(each["type"], each["code"]) for each in reading.messages] == [
        ("websocket.disconnect", 1007 if reads_simple else 1000)
    ]
