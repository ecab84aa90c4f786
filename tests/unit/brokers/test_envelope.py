"""`relay.brokers.envelope`: what relays of all versions put on a bus, and read from it."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.brokers.base import Event
from relay.brokers.envelope import pack, unpack


class OldEnvelope(msgspec.Struct, omit_defaults=True):
    """As relays without senders read one."""

    topic: str
    event: str
    payload: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    base64: str | msgspec.UnsetType = msgspec.UNSET


OLD = [
    ('{"topic":"room:1","event":"new_msg","payload":{"text":"hi"}}', Event("room:1", "new_msg", b'{"text":"hi"}')),
    ('{"topic":"room:1","event":"photo","base64":"AP8="}', Event("room:1", "photo", b"\x00\xff")),
]
"""Envelopes as relays without senders write them."""


@pytest.mark.parametrize(("text", "event"), OLD)
def test_old_envelopes_are_read(text: str, event: Event) -> None:
    assert unpack(text) == event


@pytest.mark.parametrize(("text", "event"), OLD)
def test_without_a_sender_the_bytes_are_the_old_ones(text: str, event: Event) -> None:
    assert pack(event.topic, event.event, event.payload) == text


@pytest.mark.parametrize(("text", "event"), OLD)
def test_old_relays_read_envelopes_with_a_sender(text: str, event: Event) -> None:
    with_sender = pack(event.topic, event.event, event.payload, "6f1c2a9e.7")
    assert json.loads(with_sender) == json.loads(text) | {"sender": "6f1c2a9e.7"}
    assert msgspec.json.decode(with_sender, type=OldEnvelope) == msgspec.json.decode(text, type=OldEnvelope)


def test_unknown_members_are_ignored() -> None:
    assert unpack('{"later":[1],"topic":"t","event":"e","payload":1,"sender":null}') == Event("t", "e", b"1")


@given(st.text(), st.text(), st.binary(), st.none() | st.text())
def test_what_is_packed_is_unpacked(topic: str, event: str, payload: bytes, sender: str | None) -> None:
    read = unpack(pack(topic, event, payload, sender))
    assert (read.topic, read.event, read.sender) == (topic, event, sender)
    assert read.payload.strip() == payload.strip()
