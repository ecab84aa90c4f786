"""`relay.channels.client_events`: which pushes go to the other subscribers, and with what; on a fake broker."""

import json
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from relay.auth.authenticator import Authenticator
from relay.channels.client_events import is_client_event, outgoing_payload
from relay.config_sections import RESERVED_CLIENT_EVENT_PREFIXES, Direction, LimitsConfig, TopicConfig
from relay.errors import Reason
from relay.permissions import ALL, Grant, Identity, Right, Rights
from relay.plugins.hooks import Hook, Hooks, Push
from relay.protocol.payload import Payload
from relay.protocol.serializer import Version
from relay.protocol.topics import RESERVED_EVENT_PREFIXES
from tests.support.clock import until
from tests.support.transport import FakeBroker, FakeNode

LIMITS = LimitsConfig()


def topic(*patterns: str, sender: bool = False, **settings: Any) -> TopicConfig:
    return TopicConfig(client_events=patterns, client_events_sender=sender, **settings)


# Names.


@pytest.mark.parametrize(
    ("patterns", "event", "expected"),
    [
        (("typing",), "typing", True),
        (("typing",), "Typing", False),
        (("typing",), "typing2", False),
        (("cursor-*",), "cursor-move", True),
        (("cursor-*",), "cursor", False),
        (("typing", "cursor-?"), "cursor-x", True),
        (("[ab]",), "b", True),
        ((), "typing", False),
        (("*",), "typing", True),
        (("*",), "phx_reply", False),
        (("*",), "phx_", False),
        (("*",), "chan_reply_7", False),
        (("*",), "presence_state", False),
        (("*",), "presence_diff", False),
        (("*",), "relay", False),
        (("*",), "relay:position", False),
        (("*",), "relayed", False),
        (("*",), "access_token", False),
        (("*",), "access_token2", False),
        (("[pr]*",), "presence_state", False),
        (("?hx_*", "?elay*"), "phx_close", False),
        (("*",), "my_presence_state", True),
    ],
)
def test_patterns_match_whole_names_and_never_reserved_ones(
    patterns: tuple[str, ...], event: str, expected: bool
) -> None:
    assert is_client_event(topic(*patterns), event) is expected


def test_reserved_names_include_those_of_the_protocol() -> None:
    assert set(RESERVED_EVENT_PREFIXES) <= set(RESERVED_CLIENT_EVENT_PREFIXES)


@pytest.mark.parametrize("pattern", ["", "phx_x", "[a", "a:[bc]", "presence_*", "relay-mine", "access_token", "a:b"])
def test_pattern_that_cannot_match_is_refused_in_the_settings(pattern: str) -> None:
    with pytest.raises(ValidationError, match=r"never matches|expected patterns"):
        topic(pattern)


def test_sender_is_a_setting_of_client_events_alone() -> None:
    with pytest.raises(ValidationError, match="client_events_sender is for topics with client_events"):
        TopicConfig(client_events_sender=True)


# Payloads.


def raw(text: str) -> Payload:
    return msgspec.Raw(text.encode())


@pytest.mark.parametrize("payload", [raw('{"a": 1}'), raw("[1]"), raw('"x"'), raw('{"_user":"eve"}'), b"\x00\xff"])
def test_payload_without_sender_is_sent_as_it_came(payload: Payload) -> None:
    assert outgoing_payload(payload, topic("*"), LIMITS, "alice") is payload


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("{}", '{"_user":"alice"}'),
        ("{ \n}", '{"_user":"alice"}'),
        ('{"x": 1e400}', '{"x": 1e400,"_user":"alice"}'),
        (' {"x":1 } ', '{"x":1,"_user":"alice"}'),
        ('{"x":{"_user":"eve"}}', '{"x":{"_user":"eve"},"_user":"alice"}'),
        ('{"_User":"eve"}', '{"_User":"eve","_user":"alice"}'),
        ('{"x":"\\"_user\\":"}', '{"x":"\\"_user\\":","_user":"alice"}'),
        ('{"a":1,"a":2}', '{"a":1,"a":2,"_user":"alice"}'),
    ],
)
def test_sender_is_the_last_member_of_a_payload_that_stays_as_it_is(given: str, sent: str) -> None:
    found = outgoing_payload(raw(given), topic("*", sender=True), LIMITS, "alice")
    assert bytes(found).decode() == sent if not isinstance(found, Reason) else False


def test_sender_of_an_anonymous_client_is_null_and_names_are_escaped() -> None:
    settings = topic("*", sender=True)
    assert bytes(outgoing_payload(raw("{}"), settings, LIMITS, None)) == b'{"_user":null}'  # type: ignore[arg-type]  # no Reason
    name = 'a","admin":true,"b":"'
    found = outgoing_payload(raw("{}"), settings, LIMITS, name)
    assert not isinstance(found, Reason) and json.loads(bytes(found)) == {"_user": name}


@pytest.mark.parametrize(
    "payload",
    [
        raw('{"_user":"eve"}'),
        raw('{"_user":null}'),
        raw('{"a":1,"_user":"alice"}'),
        raw('{"\\u005fuser":"eve"}'),
        raw('{"\\u005F\\u0075ser":"eve"}'),
        raw('{"_user":"eve","_user":"eve"}'),
        raw('{"a":{}, "_us\\u0065r" : 1}'),
        raw("[]"),
        raw("null"),
        raw('"_user"'),
        raw("1"),
        raw('{"\\ud800":1}'),
        b'{"a":1}',
        b"\x00",
        b"",
    ],
)
def test_payload_that_has_a_sender_already_or_is_no_object_is_refused(payload: Payload) -> None:
    assert outgoing_payload(payload, topic("*", sender=True), LIMITS, "alice") is Reason.INVALID_PAYLOAD


@pytest.mark.parametrize("sender", [False, True])
def test_large_payload_is_refused(sender: bool) -> None:
    limits = LimitsConfig(client_events_max_bytes=10)
    assert outgoing_payload(raw('{"a":1234}'), topic("*", sender=sender), limits, "alice") != Reason.PAYLOAD_TOO_LARGE
    too_large = outgoing_payload(raw('{"a":12345}'), topic("*", sender=sender), limits, "alice")
    assert too_large is Reason.PAYLOAD_TOO_LARGE
    assert outgoing_payload(b"x" * 11, topic("*"), limits, None) is Reason.PAYLOAD_TOO_LARGE


def test_deep_payload_is_refused_or_passed_and_never_raises() -> None:
    deep = raw('{"a":' + "[" * 2000 + "]" * 2000 + "}")
    assert outgoing_payload(deep, topic("*", sender=True), LIMITS, "alice") is not Reason.PAYLOAD_TOO_LARGE


# On a channel.

PUBLISHED = ["ok", {}]


def error(reason: str) -> list[Any]:
    return ["error", {"reason": reason}]


def node_of(**settings: Any) -> FakeNode:
    return FakeNode(**{"topics": [{"match": "room:*", "client_events": ["typing", "say*"]}], **settings})


async def test_client_event_is_published_live_for_all_but_its_sender() -> None:
    handled: list[str] = []

    async def on_push(push: Push) -> None:
        handled.append(push.event)

    node = node_of(hooks=Hooks(push=(Hook("p", on_push),)), redis={"push_identity": True})
    alice, bob, old = node.connect(), node.connect(), node.connect(Version.V1)
    for client in (alice, bob, old):
        await client.join("room:1")
        client.frames()
    assert await alice.call("1", "2", "room:1", "typing", {"x": 1}) == PUBLISHED
    assert node.broker.published == [(Direction.LIVE, "room:1", "typing", b'{"x": 1}')]
    assert handled == [] and node.metrics.client_events == node.metrics.pushes_out == 1
    sender = node.broker.sender
    assert sender is not None
    await node.deliver("room:1", "typing", b'{"x": 1}', sender)
    assert alice.frames() == [["1", "2", "room:1", "phx_reply"]]
    assert bob.frames() == old.frames() == [[None, None, "room:1", "typing"]]
    # Others go their usual way.
    assert await alice.call("1", "3", "room:1", "new_msg") == PUBLISHED
    assert handled == ["new_msg"]
    assert [direction for direction, *_ in node.broker.published[1:]] == [Direction.FROM, Direction.FROM_USER]
    await node.end()


async def test_client_event_needs_the_right_to_push_and_no_other_setting() -> None:
    rights = Rights((Grant("room:reader", Right.JOIN), Grant("room:writer", ALL)))
    node = node_of(
        topics=[{"match": "room:*", "push": False, "client_events": ["typing"], "client_events_sender": True}]
    )
    node.authenticator = Authenticator(node.config, node.runner, None, None, node.pubsub.decisions)
    client = node.connect(identity=Identity("alice", rights))
    await client.join("room:reader", "1")
    await client.join("room:writer", "2")
    assert await client.call("1", "3", "room:reader", "typing") == error("unauthorized")
    assert await client.call("2", "4", "room:writer", "new_msg") == error("push not allowed")
    assert await client.call("2", "5", "room:writer", "typing") == PUBLISHED
    assert node.broker.published == [(Direction.LIVE, "room:writer", "typing", b'{"_user":"alice"}')]
    await node.end()


@pytest.mark.parametrize(
    "event", ["phx_x", "chan_reply_1", "relay:dropped", "a:b", "say\n", "say\u0085", "say" * 90, ""]
)
async def test_invalid_names_are_refused_before_any_pattern(event: str) -> None:
    node = node_of(topics=[{"match": "*", "client_events": ["*"]}])
    client = node.connect()
    await client.join("room:1")
    assert await client.call("1", "2", "room:1", event) == error("invalid event")
    assert node.broker.published == []
    await node.end()


async def test_reserved_names_that_are_valid_are_ordinary_pushes() -> None:
    node = node_of(topics=[{"match": "*", "client_events": ["*"]}])
    client = node.connect()
    await client.join("room:1")
    for event in ("presence_state", "relayed"):
        assert await client.call("1", "2", "room:1", event) == PUBLISHED
        client.frames()
    assert [direction for direction, *_ in node.broker.published] == [Direction.FROM] * 2
    await node.end()


async def test_flood_of_client_events_is_refused_and_counted() -> None:
    node = node_of(limits={"client_events_per_s": 3})
    client = node.connect()
    await client.join("room:1")
    answers = [await client.call("1", str(ref), "room:1", "typing") for ref in range(2, 8)]
    assert answers == [PUBLISHED] * 3 + [error("rate limited")] * 3
    assert node.metrics.refused == {Reason.RATE_LIMITED: 3} and node.metrics.client_events == 3
    assert await client.call("1", "9", "room:1", "new_msg") == PUBLISHED, "other pushes have their own rate"
    client.transport.last_received += 0.5
    assert await client.call("1", "10", "room:1", "say") == PUBLISHED
    assert await client.call("1", "11", "room:1", "say") == error("rate limited")
    await node.end()


async def test_rate_of_client_events_can_be_unlimited() -> None:
    node = node_of(limits={"client_events_per_s": 0})
    client = node.connect()
    await client.join("room:1")
    for ref in range(2, 50):
        assert await client.call("1", str(ref), "room:1", "typing") == PUBLISHED
    await node.end()


async def test_refused_payloads_are_counted() -> None:
    node = node_of(
        topics=[{"match": "*", "client_events": ["typing"], "client_events_sender": True}],
        limits={"client_events_max_bytes": 100},
    )
    client = node.connect()
    await client.join("room:1")
    assert await client.call("1", "2", "room:1", "typing", ["a"]) == error("invalid payload")
    assert await client.call("1", "3", "room:1", "typing", {"_user": "eve"}) == error("invalid payload")
    assert await client.call("1", "4", "room:1", "typing", {"a": "x" * 100}) == error("payload too large")
    assert node.metrics.refused == {Reason.INVALID_PAYLOAD: 2, Reason.PAYLOAD_TOO_LARGE: 1}
    assert node.broker.published == []
    await node.end()


async def test_client_event_that_the_bus_does_not_take_is_refused() -> None:
    broker = FakeBroker()
    node = node_of(broker=broker)
    client = node.connect()
    await client.join("room:1")
    broker.fails = True
    assert await client.call("1", "2", "room:1", "typing") == error("bus unavailable")
    assert node.pubsub._skips == {}
    broker.refusal = "the bus is away"
    assert await client.call("1", "3", "room:1", "typing") == error("bus unavailable")
    assert node.metrics.refused == {Reason.BUS_UNAVAILABLE: 2}
    await node.end()


async def test_reply_comes_before_the_answer_to_a_leave() -> None:
    broker = FakeBroker()
    node = node_of(broker=broker)
    client = node.connect()
    await client.join("room:1")
    client.frames()
    broker.is_slow = True
    client.send("1", "2", "room:1", "typing")
    client.send("1", "3", "room:1", "phx_leave")
    await until(lambda: broker.waiting)
    broker.answer()
    assert await client.reply("3") == PUBLISHED
    assert [frame[1] for frame in client.frames()] == ["2", "3", "1"]
    await node.end()
