"""`relay.channels.tangram`: ids of joins, what topic ``admin`` is told, and scalars as bytes."""

from typing import Any

import msgspec
import pytest

from relay.channels.tangram import _LISTED_MAX, TangramWire, classifier
from relay.config_sections import TangramConfig
from relay.protocol.payload import Payload
from relay.protocol.state import Subscription


class Told:
    """What was published, decoded."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def publish(self, topic: str, event: str, payload: Payload) -> None:
        assert topic == "admin"
        self.events.append((event, msgspec.json.decode(bytes(payload))))

    def take(self) -> list[tuple[str, Any]]:
        events, self.events = self.events, []
        return events


def reply(payload: Payload) -> Any:
    return msgspec.json.decode(bytes(payload))


def test_joins_have_ids_and_admin_is_told_of_their_coming_and_going() -> None:
    """Source: tangram 0.6.0: ``channel.add``, ``.join``, ``.list``, ``.leave``, ``.remove``, with their members."""
    told = Told()
    wire = TangramWire(told.publish)
    one, two, admin = Subscription("room:1", "4"), Subscription("room:1", None), Subscription("admin", "9")
    assert reply(wire.accept("a", one, msgspec.Raw(b"{}"))) == {"id": "a:room:1:4"}
    assert told.take() == [
        ("channel.add", {"channel": "room:1", "channels": ["room:1"]}),
        ("channel.join", {"agent": "a:room:1:4", "channel": "room:1", "agents": ["a:room:1:4"]}),
    ]
    assert reply(wire.accept("b", two, msgspec.Raw(b'{"nick": "B"}'))) == {"nick": "B", "id": "b:room:1:None"}
    wire.joined("room:1")
    told.take()
    wire.accept("a", admin, msgspec.Raw(b"{}"))
    told.take()
    wire.joined("admin")
    assert told.take() == [
        ("channel.list", {"channel": "room:1", "agents": ["a:room:1:4", "b:room:1:None"]}),
        ("channel.list", {"channel": "admin", "agents": ["a:admin:9"]}),
    ]
    wire.left(one)
    wire.left(one)
    wire.left(Subscription("room:1", "4"))
    wire.left(two)
    assert told.take() == [
        ("channel.leave", {"agent": "a:room:1:4", "channel": "room:1", "agents": ["b:room:1:None"]}),
        ("channel.leave", {"agent": "b:room:1:None", "channel": "room:1", "agents": []}),
        ("channel.remove", {"channel": "room:1", "channels": ["admin"]}),
    ]


def test_rejoin_ends_what_it_replaces() -> None:
    told = Told()
    wire = TangramWire(told.publish)
    old, new = Subscription("t", "1"), Subscription("t", "2")
    wire.accept("a", old, msgspec.Raw(b"{}"))
    told.take()
    wire.accept("a", new, msgspec.Raw(b"{}"), old)
    assert [event for event, _ in told.events] == ["channel.leave", "channel.remove", "channel.add", "channel.join"]
    assert told.events[-1][1]["agents"] == ["a:t:2"]


@pytest.mark.parametrize("response", [b'{"id": 7}', b"[1]"])
def test_what_a_plugin_answers_stays(response: bytes) -> None:
    assert bytes(TangramWire(Told().publish).accept("a", Subscription("t", "1"), msgspec.Raw(response))) == response


def test_names_in_one_event_are_bounded() -> None:
    told = Told()
    wire = TangramWire(told.publish)
    for number in range(_LISTED_MAX + 5):
        wire.accept("a", Subscription("t", str(number)), msgspec.Raw(b"{}"))
    assert len(told.events[-1][1]["agents"]) == _LISTED_MAX


@pytest.mark.parametrize(
    ("data", "binary"),
    [(b"{}", False), (b"[1]", False), (b"{x", True), (b"42", True), (b'"text"', True), (b"null", True), (b"", True)],
)
def test_json_is_what_begins_with_a_bracket(data: bytes, binary: bool) -> None:
    classify = classifier(TangramConfig(binary_scalars=True))
    assert isinstance(classify(data), bytes) is binary
    assert not isinstance(classifier(TangramConfig())(b"42"), bytes)
