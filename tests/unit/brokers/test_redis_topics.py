"""`relay.brokers.redis_topics`: the messages on a topic's channel."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.brokers.base import Event, is_position
from relay.brokers.redis_topics import pack, unpack
from relay.protocol.topics import is_event

TOPIC = "room:{1}:a"


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (b'new_msg:{"text":"hi"}', Event(TOPIC, "new_msg", b'{"text":"hi"}')),
        (b"new_msg:", Event(TOPIC, "new_msg", b"")),
        (b"bytes:\xff:\x00\n", Event(TOPIC, "bytes", b"\xff:\x00\n")),
        ("größe:1".encode(), Event(TOPIC, "größe", b"1")),
        (b"e\xff:1", Event(TOPIC, "e\ufffd", b"1")),
        (b":17-3:new_msg:{}", Event(TOPIC, "new_msg", b"{}", "17-3")),
        (b":17-3:new_msg:", Event(TOPIC, "new_msg", b"", "17-3")),
        (b":17-3*6f1c2a9e.7:new_msg:{}", Event(TOPIC, "new_msg", b"{}", "17-3", "6f1c2a9e.7")),
        (b":*6f1c2a9e.7:new_msg:{}", Event(TOPIC, "new_msg", b"{}", None, "6f1c2a9e.7")),
        (b":17-3:", Event(TOPIC, "", b"", "17-3")),
        (b"::new_msg:{}", Event(TOPIC, "new_msg", b"{}")),
        (b"::[new]:{}", Event(TOPIC, "[new]", b"{}")),
        (b":*6f1c2a9e.7:[new]:{}", Event(TOPIC, "[new]", b"{}", None, "6f1c2a9e.7")),
        (b':17-3:"new":{}', Event(TOPIC, '"new"', b"{}", "17-3")),
    ],
)
def test_message_is_an_event_or_a_notice(message: bytes, event: Event) -> None:
    assert unpack(TOPIC, message) == event


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b":",
        b"::",
        b"new_msg",
        b'{"text":"hi"}',
        b"[1:2]",
        b'"a":1',
        b":17-3",
        b":17-3:new_msg",
        b":17-3::{}",
        b":17:new_msg:{}",
        b":a-b:new_msg:{}",
        b":-1-3:new_msg:{}",
        b":1234567890123456-1:new_msg:{}",
        b":*6f1c2a9e.7:",
        b":\xff-1:new_msg:{}",
    ],
)
def test_message_that_names_no_event_is_none(message: bytes) -> None:
    assert unpack(TOPIC, message) is None


@given(st.binary(max_size=40))
def test_no_message_raises(message: bytes) -> None:
    found = unpack(TOPIC, message)
    if found is not None:
        assert found.event or found.position is not None
        assert found.position is None or is_position(found.position)


@given(
    event=st.builds(str.__add__, st.sampled_from(["", "{", "[", '"', "*"]), st.text(max_size=20)).filter(is_event),
    payload=st.binary(max_size=40),
    sender=st.none() | st.from_regex(r"[0-9a-f]{8}\.[0-9]{1,6}", fullmatch=True),
)
def test_message_of_a_live_event_comes_back(event: str, payload: bytes, sender: str | None) -> None:
    assert unpack(TOPIC, pack(event, payload, sender)) == Event(TOPIC, event, payload, None, sender)
