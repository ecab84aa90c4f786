"""`relay.protocol.state`: Phoenix's table of reactions row by row, and a state machine that tries them in any order."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.errors import Reason
from relay.protocol.frame import Frame
from relay.protocol.payload import EMPTY, Payload, encode_payload
from relay.protocol.serializer import Message, Ref, Version
from relay.protocol.state import Action, ChannelsProtocol, Join, Leave, Push, Send, Subscription, payload_size

TOPICS_MAX = 3
PAYLOAD_MAX_BYTES = 64


def make(version: Version = Version.V2, topics_max: int = TOPICS_MAX) -> ChannelsProtocol[Subscription]:
    return ChannelsProtocol(Subscription, version, topics_max=topics_max, payload_max_bytes=PAYLOAD_MAX_BYTES)


def message(join_ref: Ref, ref: Ref, topic: str, event: str, payload: Payload = EMPTY) -> Message:
    return Message(join_ref, ref, topic, event, payload)


def seen(frame: Frame) -> Any:
    """What the client reads."""
    assert frame.is_text
    return json.loads(frame.text)


def sent(action: Action[Subscription] | None) -> Any:
    """The one frame of a message that was answered at once."""
    assert isinstance(action, Send)
    return seen(action.frame)


def ask_join(
    protocol: ChannelsProtocol[Subscription], topic: str, join_ref: Ref = "10", ref: Ref = "11"
) -> Join[Subscription]:
    action = protocol.receive(message(join_ref, ref, topic, "phx_join"))
    assert isinstance(action, Join)
    return action


def join(protocol: ChannelsProtocol[Subscription], topic: str, join_ref: Ref = "10", ref: Ref = "11") -> Subscription:
    action = ask_join(protocol, topic, join_ref, ref)
    protocol.accept(action)
    return action.subscription


def push(
    protocol: ChannelsProtocol[Subscription], topic: str, join_ref: Ref, ref: Ref = "20", event: str = "new_msg"
) -> Push[Subscription]:
    action = protocol.receive(message(join_ref, ref, topic, event))
    assert isinstance(action, Push)
    return action


def error(reason: Reason) -> dict[str, Any]:
    return {"status": "error", "response": {"reason": reason.value}}


OK = {"status": "ok", "response": {}}

# Heartbeats.


def test_heartbeat_is_answered_with_its_ref_and_no_join_ref() -> None:
    """Source: Phoenix 1.9, ``socket.ex: handle_in``, the first clause."""
    protocol = make()
    assert sent(protocol.receive(message(None, "7", "phoenix", "heartbeat"))) == [None, "7", "phoenix", "phx_reply", OK]
    join(protocol, "room:1")
    assert sent(protocol.receive(message("5", "8", "phoenix", "heartbeat"))) == [None, "8", "phoenix", "phx_reply", OK]


def test_heartbeat_event_on_another_topic_is_a_push() -> None:
    protocol = make()
    join(protocol, "room:1")
    assert push(protocol, "room:1", "10", event="heartbeat").event == "heartbeat"


def test_nobody_joins_the_topic_phoenix() -> None:
    """Its join has no route. Source: Phoenix 1.9, ``socket.ex``: the reply's join_ref is null even if one was sent."""
    protocol = make()
    expected = [None, "2", "phoenix", "phx_reply", error(Reason.UNMATCHED_TOPIC)]
    assert sent(protocol.receive(message("1", "2", "phoenix", "phx_join"))) == expected
    assert protocol.subscriptions == {}


# Joins.


def test_join_is_answered_with_both_refs() -> None:
    protocol = make()
    action = ask_join(protocol, "room:1", "3", "4")
    assert (action.join_ref, action.ref, action.replaces) == ("3", "4", None)
    assert protocol.subscriptions == {}, "nothing is joined before it was decided"
    assert [seen(frame) for frame in protocol.accept(action)] == [["3", "4", "room:1", "phx_reply", OK]]
    assert protocol.subscriptions == {"room:1": action.subscription}
    assert (action.subscription.topic, action.subscription.join_ref) == ("room:1", "3")


def test_join_reply_carries_a_payload() -> None:
    protocol = make()
    frames = protocol.accept(ask_join(protocol, "room:1"), encode_payload({"history": [1]}))
    assert [seen(frame)[4] for frame in frames] == [{"status": "ok", "response": {"history": [1]}}]


def test_join_hands_on_its_parameters() -> None:
    action = make().receive(message("1", "1", "room:1", "phx_join", encode_payload({"token": "abc"})))
    assert isinstance(action, Join)
    assert isinstance(action.params, msgspec.Raw)
    assert bytes(action.params) == b'{"token":"abc"}'


def test_refused_join_leaves_nothing_joined() -> None:
    protocol = make()
    action = ask_join(protocol, "room:1", "3", "4")
    frames = protocol.refuse(action, encode_payload({"reason": "not you"}))
    payload = {"status": "error", "response": {"reason": "not you"}}
    assert [seen(frame) for frame in frames] == [["3", "4", "room:1", "phx_reply", payload]]
    assert protocol.subscriptions == {}
    assert not protocol.is_current(action.subscription)


def test_join_without_join_ref_is_known_by_its_ref() -> None:
    """The reply's join_ref is null as it came; later frames carry the ref. Source: Phoenix 1.9, ``socket.ex``."""
    protocol = make()
    action = ask_join(protocol, "room:1", None, "4")
    assert [seen(frame) for frame in protocol.accept(action)] == [[None, "4", "room:1", "phx_reply", OK]]
    assert action.subscription.join_ref == "4"
    frame = protocol.end(action.subscription)
    assert frame is not None
    assert seen(frame) == ["4", "4", "room:1", "phx_close", {}]


@pytest.mark.parametrize("topic", ["", "x" * 256, "a\nb", "\x7f"], ids=ascii)
def test_join_of_a_topic_that_cannot_be_is_refused(topic: str) -> None:
    protocol = make()
    expected = ["1", "2", topic, "phx_reply", error(Reason.INVALID_TOPIC)]
    assert sent(protocol.receive(message("1", "2", topic, "phx_join"))) == expected


def test_join_over_the_limit_is_refused_with_its_join_ref() -> None:
    """Source: Phoenix 1.8.9, ``max_channels_per_transport``."""
    protocol = make()
    for number in range(TOPICS_MAX):
        join(protocol, f"room:{number}")
    expected = ["1", "2", "room:x", "phx_reply", error(Reason.TOO_MANY_TOPICS)]
    assert sent(protocol.receive(message("1", "2", "room:x", "phx_join"))) == expected


def test_joins_being_decided_count_towards_the_limit() -> None:
    protocol = make()
    asked = [ask_join(protocol, f"room:{number}") for number in range(TOPICS_MAX)]
    assert sent(protocol.receive(message("1", "2", "room:x", "phx_join")))[4] == error(Reason.TOO_MANY_TOPICS)
    protocol.refuse(asked[0], EMPTY)
    join(protocol, "room:x")


def test_second_join_to_a_topic_is_no_further_topic() -> None:
    protocol = make(topics_max=1)
    join(protocol, "room:1", "1", "1")
    join(protocol, "room:1", "2", "2")
    assert len(protocol.subscriptions) == 1


def test_rejoin_keeps_its_place_though_the_old_subscription_ends_meanwhile() -> None:
    """Else another topic takes the place, and the socket has one too many."""
    protocol = make(topics_max=1)
    old = join(protocol, "room:1", "1", "1")
    rejoin = ask_join(protocol, "room:1", "2", "2")
    protocol.end(old, error=Reason.EVENTS_MISSED)
    assert sent(protocol.receive(message("3", "3", "room:2", "phx_join")))[4] == error(Reason.TOO_MANY_TOPICS)
    protocol.accept(rejoin)
    assert list(protocol.subscriptions) == ["room:1"]


def test_second_join_to_a_topic_closes_the_first() -> None:
    """The wire order is the new join's reply, then ``phx_close`` under the old join_ref. Source: Phoenix 1.9."""
    protocol = make()
    old = join(protocol, "room:1", "1", "1")
    action = ask_join(protocol, "room:1", "2", "3")
    assert action.replaces is old
    assert protocol.is_current(old), "the first stays until the second is decided"
    assert [seen(frame) for frame in protocol.accept(action)] == [
        ["2", "3", "room:1", "phx_reply", OK],
        ["1", "1", "room:1", "phx_close", {}],
    ]
    assert not protocol.is_current(old)
    assert protocol.is_current(action.subscription)
    frame = protocol.reply(push(protocol, "room:1", "2"), "ok")
    assert frame is not None
    assert seen(frame)[0] == "2", "later frames carry the new join_ref"


def test_refused_second_join_closes_the_first_too() -> None:
    """Source: raw frames of Phoenix 1.7.24: an error reply for the new join, then ``phx_close`` of the old channel."""
    protocol = make()
    join(protocol, "room:1", "1", "1")
    action = ask_join(protocol, "room:1", "2", "3")
    assert [seen(frame)[:4] for frame in protocol.refuse(action, EMPTY)] == [
        ["2", "3", "room:1", "phx_reply"],
        ["1", "1", "room:1", "phx_close"],
    ]
    assert protocol.subscriptions == {}


@pytest.mark.parametrize("accepted", [True, False])
def test_subscription_that_has_ended_is_not_closed_again_by_its_rejoin(accepted: bool) -> None:
    protocol = make()
    old = join(protocol, "room:1", "1", "1")
    rejoin = ask_join(protocol, "room:1", "2", "2")
    assert protocol.end(old, error=Reason.EVENTS_MISSED) is not None
    frames = protocol.accept(rejoin) if accepted else protocol.refuse(rejoin, EMPTY)
    assert [seen(frame)[3] for frame in frames] == ["phx_reply"]


def test_same_join_ref_twice_still_makes_two_subscriptions() -> None:
    protocol = make()
    first, second = join(protocol, "room:1", "1"), join(protocol, "room:1", "1")
    assert first != second
    assert protocol.end(first) is None
    assert protocol.is_current(second)


# Leaves.


@pytest.mark.parametrize("join_ref", ["10", None])
def test_leave_is_answered_then_closed(join_ref: Ref) -> None:
    """The reply carries the channel's join_ref, also when the leave had none. Source: Phoenix 1.9, ``socket.ex``."""
    protocol = make()
    subscription = join(protocol, "room:1", "10")
    action = protocol.receive(message(join_ref, "5", "room:1", "phx_leave"))
    assert isinstance(action, Leave)
    assert action.subscription is subscription
    assert [seen(frame) for frame in protocol.leave(action)] == [
        ["10", "5", "room:1", "phx_reply", OK],
        ["10", "10", "room:1", "phx_close", {}],
    ]
    assert protocol.subscriptions == {}


def test_leave_of_a_topic_not_joined_is_ok_and_closes_nothing() -> None:
    expected = ["9", "5", "room:1", "phx_reply", OK]
    assert sent(make().receive(message("9", "5", "room:1", "phx_leave"))) == expected
    assert sent(make().receive(message(None, "5", "room:1", "phx_leave"))) == [None, *expected[1:]]


def test_stale_leave_is_dropped() -> None:
    protocol = make()
    subscription = join(protocol, "room:1", "10")
    assert protocol.receive(message("9", "5", "room:1", "phx_leave")) is None
    assert protocol.is_current(subscription)


def test_push_after_a_leave_finds_no_topic() -> None:
    protocol = make()
    join(protocol, "room:1", "10")
    action = protocol.receive(message("10", "5", "room:1", "phx_leave"))
    assert isinstance(action, Leave)
    protocol.leave(action)
    expected = [None, "6", "room:1", "phx_reply", error(Reason.UNMATCHED_TOPIC)]
    assert sent(protocol.receive(message("10", "6", "room:1", "new_msg"))) == expected


# Pushes.


@pytest.mark.parametrize("join_ref", ["10", None])
def test_push_is_answered_under_its_ref_and_the_channels_join_ref(join_ref: Ref) -> None:
    """A null join_ref passes. Source: Phoenix 1.9, ``socket.ex``: ``is_nil(join_ref) or join_ref === …``."""
    protocol = make()
    subscription = join(protocol, "room:1", "10")
    action = push(protocol, "room:1", join_ref, "21")
    assert (action.subscription, action.event, action.ref) == (subscription, "new_msg", "21")
    frame = protocol.reply(action, "ok")
    assert frame is not None
    assert seen(frame) == ["10", "21", "room:1", "phx_reply", OK]


def test_push_may_be_answered_often_with_any_status() -> None:
    protocol = make()
    join(protocol, "room:1", "10")
    action = push(protocol, "room:1", "10", "21")
    for status in ("ok", "error", "later", "ok"):
        frame = protocol.reply(action, status, encode_payload([1]))
        assert frame is not None
        assert seen(frame) == ["10", "21", "room:1", "phx_reply", {"status": status, "response": [1]}]


def test_reply_of_bytes_is_a_binary_frame() -> None:
    protocol = make()
    join(protocol, "room:1", "10")
    frame = protocol.reply(push(protocol, "room:1", "10", "21"), "ok", b"\xff")
    assert frame is not None
    assert frame.data == b"\x01\x02\x02\x06\x021021room:1ok\xff"


def test_binary_push_keeps_its_bytes() -> None:
    protocol = make()
    join(protocol, "room:1", "10")
    action = protocol.receive(message("10", "21", "room:1", "data", b"\x00\xff"))
    assert isinstance(action, Push)
    assert action.payload == b"\x00\xff"


def test_push_without_ref_wants_no_answer() -> None:
    protocol = make()
    join(protocol, "room:1", "10")
    assert protocol.reply(push(protocol, "room:1", "10", None), "ok") is None


def test_answer_that_comes_after_the_leave_is_dropped() -> None:
    protocol = make()
    subscription = join(protocol, "room:1", "10")
    action = push(protocol, "room:1", "10")
    protocol.end(subscription)
    assert protocol.reply(action, "ok") is None
    join(protocol, "room:1", "10")
    assert protocol.reply(action, "ok") is None, "a new subscription is not the old one"


def test_push_to_a_topic_not_joined_finds_no_topic() -> None:
    """The join_ref is null even if one was sent, and the answer to a binary push is text. Source: Phoenix 1.7.24."""
    for payload in (EMPTY, b"\xff"):
        expected = [None, "6", "room:1", "phx_reply", error(Reason.UNMATCHED_TOPIC)]
        assert sent(make().receive(message("10", "6", "room:1", "new_msg", payload))) == expected


@pytest.mark.parametrize("stale", ["9", "", "010", 10])
def test_stale_push_is_dropped(stale: Ref) -> None:
    protocol = make()
    join(protocol, "room:1", "10")
    assert protocol.receive(message(stale, "6", "room:1", "new_msg")) is None


@pytest.mark.parametrize("event", ["", "a:b", "phx_reply", "phx_close", "x" * 256, "a\0"], ids=ascii)
def test_push_of_an_event_that_cannot_be_is_refused(event: str) -> None:
    """Clients may not invent the protocol's own events."""
    protocol = make()
    join(protocol, "room:1", "10")
    expected = ["10", "6", "room:1", "phx_reply", error(Reason.INVALID_EVENT)]
    assert sent(protocol.receive(message(None, "6", "room:1", event))) == expected


@pytest.mark.parametrize("as_bytes", [True, False])
def test_push_over_the_limit_is_refused(as_bytes: bool) -> None:
    protocol = make()
    join(protocol, "room:1", "10")

    def payload(size: int) -> Payload:
        return b"x" * size if as_bytes else encode_payload("x" * (size - 2))

    expected = ["10", "6", "room:1", "phx_reply", error(Reason.PAYLOAD_TOO_LARGE)]
    assert sent(protocol.receive(message("10", "6", "room:1", "e", payload(PAYLOAD_MAX_BYTES + 1)))) == expected
    assert isinstance(protocol.receive(message("10", "6", "room:1", "e", payload(PAYLOAD_MAX_BYTES))), Push)


def test_refs_come_back_as_they_came() -> None:
    """Source: phoenix.js compares with ``===``."""
    for ref in ("007", "", "ünïcode ✓", 12, 0):
        protocol = make()
        frames = protocol.accept(ask_join(protocol, "room:1", ref, ref))
        assert [seen(frame)[:2] for frame in frames] == [[ref, ref]]
        frame = protocol.reply(push(protocol, "room:1", ref, ref), "ok")
        assert frame is not None
        assert seen(frame)[:2] == [ref, ref]


# Ended from the relay's side.


def test_ending_with_a_reason_asks_the_client_to_rejoin() -> None:
    """Source: Phoenix 1.9: ``phx_error`` with a reason, the ref is the join_ref."""
    protocol = make()
    subscription = join(protocol, "room:1", "10")
    frame = protocol.end(subscription, error=Reason.EVENTS_MISSED)
    assert frame is not None
    assert seen(frame) == ["10", "10", "room:1", "phx_error", {"reason": "events may have been missed"}]
    assert protocol.subscriptions == {}


def test_ending_without_a_reason_tells_the_client_to_stay_away() -> None:
    """Source: phoenix.js: ``phx_close`` removes the channel for good."""
    protocol = make()
    frame = protocol.end(join(protocol, "room:1", "10"))
    assert frame is not None
    assert seen(frame) == ["10", "10", "room:1", "phx_close", {}]


def test_subscription_ends_once() -> None:
    protocol = make()
    subscription = join(protocol, "room:1")
    assert protocol.end(subscription) is not None
    assert protocol.end(subscription) is None
    assert protocol.end(subscription, error="again") is None


# Version 1.


def test_v1_socket_needs_no_join_ref() -> None:
    """V1 has no join_ref on the wire: the join's ref stands for it, messages without one pass."""
    protocol = make(Version.V1)
    action = ask_join(protocol, "room:1", None, 1)
    assert [seen(frame) for frame in protocol.accept(action)] == [
        {"topic": "room:1", "event": "phx_reply", "ref": 1, "payload": OK}
    ]
    frame = protocol.reply(push(protocol, "room:1", None, 2), "ok")
    assert frame is not None
    assert seen(frame) == {"topic": "room:1", "event": "phx_reply", "ref": 2, "payload": OK}
    rejoin = ask_join(protocol, "room:1", None, 3)
    assert [(seen(frame)["event"], seen(frame)["ref"]) for frame in protocol.accept(rejoin)] == [
        ("phx_reply", 3),
        ("phx_close", 1),
    ]


@given(st.one_of(st.binary(), st.text().map(encode_payload)))
def test_size_of_a_payload_is_that_of_its_bytes(payload: Payload) -> None:
    assert payload_size(payload) == len(bytes(payload))


# Any messages in any order.

TOPICS = ["a", "b", "c", "d", "e:1", "", "phoenix", "x" * 256]
EVENTS = ["phx_join", "phx_leave", "heartbeat", "new_msg", "phx_reply", "a:b", ""]
REFS: list[Ref] = [None, "", "1", "2", "007", 1, 2]
PAYLOADS: list[Payload] = [EMPTY, encode_payload("x" * 100), b"", b"x" * 65]


class AnyOrder(RuleBasedStateMachine):
    """A socket's client says anything; its owner decides in any order, and ends what it likes.

    The owner keeps to the one rule it has: a topic's next message waits for the join or leave under way.
    """

    @initialize(version=st.sampled_from([Version.V1, Version.V2]))
    def connect(self, version: Version) -> None:
        self.protocol = make(version)
        self.joined: dict[str, Subscription] = {}
        self.under_way: dict[str, Join[Subscription] | Leave[Subscription]] = {}
        self.pushes: list[Push[Subscription]] = []
        self.ended: list[Subscription] = []

    def check(self, frame: Frame, join_ref: Ref, ref: Ref, topic: str, event: str) -> Any:
        """Compare a frame's names, and return its payload."""
        fields = seen(frame)
        if self.protocol.version is Version.V1:
            assert (fields["ref"], fields["topic"], fields["event"]) == (ref, topic, event)
            return fields["payload"]
        assert fields[:4] == [join_ref, ref, topic, event]
        return fields[4]

    def gone(self, topic: str) -> None:
        if topic in self.joined:
            self.ended.append(self.joined.pop(topic))

    @rule(
        join_ref=st.sampled_from(REFS),
        ref=st.sampled_from(REFS),
        topic=st.sampled_from(TOPICS),
        event=st.sampled_from(EVENTS),
        payload=st.sampled_from(PAYLOADS),
    )
    def receive(self, join_ref: Ref, ref: Ref, topic: str, event: str, payload: Payload) -> None:
        if topic in self.under_way:
            return
        action = self.protocol.receive(message(join_ref, ref, topic, event, payload))
        current = self.joined.get(topic)
        if (topic, event) == ("phoenix", "heartbeat"):
            assert isinstance(action, Send)
            assert self.check(action.frame, None, ref, topic, "phx_reply") == OK
        elif event == "phx_join":
            self.check_join(action, join_ref, ref, topic)
        elif current is None and event == "phx_leave":
            assert isinstance(action, Send)
            assert self.check(action.frame, join_ref, ref, topic, "phx_reply") == OK
        elif current is None:
            assert isinstance(action, Send)
            answer = self.check(action.frame, None, ref, topic, "phx_reply")
            assert answer == error(Reason.UNMATCHED_TOPIC)
        elif join_ref is not None and (join_ref, type(join_ref)) != (current.join_ref, type(current.join_ref)):
            assert action is None, "a stale join_ref produces nothing"
        elif event == "phx_leave":
            assert isinstance(action, Leave)
            assert (action.subscription, action.ref) == (current, ref)
            self.under_way[topic] = action
        elif event in ("new_msg", "heartbeat") and len(bytes(payload)) <= PAYLOAD_MAX_BYTES:
            assert isinstance(action, Push)
            assert (action.subscription, action.ref, action.event) == (current, ref, event)
            self.pushes.append(action)
        else:
            assert isinstance(action, Send)
            reason = Reason.PAYLOAD_TOO_LARGE if event in ("new_msg", "heartbeat") else Reason.INVALID_EVENT
            assert self.check(action.frame, current.join_ref, ref, topic, "phx_reply") == error(reason)

    def check_join(self, action: Action[Subscription] | None, join_ref: Ref, ref: Ref, topic: str) -> None:
        taken = set(self.joined) | {name for name, action in self.under_way.items() if isinstance(action, Join)}
        if topic == "phoenix":
            reason, join_ref = Reason.UNMATCHED_TOPIC, None
        elif topic == "" or len(topic) > 255:
            reason = Reason.INVALID_TOPIC
        elif topic not in taken and len(taken) >= TOPICS_MAX:
            reason = Reason.TOO_MANY_TOPICS
        else:
            assert isinstance(action, Join)
            assert (action.join_ref, action.ref, action.replaces) == (join_ref, ref, self.joined.get(topic))
            assert action.subscription.topic == topic
            self.under_way[topic] = action
            return
        assert isinstance(action, Send)
        assert self.check(action.frame, join_ref, ref, topic, "phx_reply") == error(reason)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), accepted=st.booleans())
    def decide(self, data: st.DataObject, accepted: bool) -> None:
        topic = data.draw(st.sampled_from(sorted(self.under_way)))
        action = self.under_way.pop(topic)
        old = self.joined.get(topic)
        if isinstance(action, Leave):
            if not self.protocol.is_current(action.subscription):
                assert old is None, "it was ended while the leave waited"
                return
            frames = self.protocol.leave(action)
            assert self.check(frames[0], action.subscription.join_ref, action.ref, topic, "phx_reply") == OK
        else:
            response = encode_payload({"reason": "not you"})
            frames = self.protocol.accept(action) if accepted else self.protocol.refuse(action, response)
            answer = self.check(frames[0], action.join_ref, action.ref, topic, "phx_reply")
            assert answer["status"] == ("ok" if accepted else "error")
        self.gone(topic)
        closed = [] if old is None else [old]
        assert len(frames) == 1 + len(closed)
        for frame, subscription in zip(frames[1:], closed, strict=True):
            assert self.check(frame, subscription.join_ref, subscription.join_ref, topic, "phx_close") == {}
        if isinstance(action, Join) and accepted:
            self.joined[topic] = action.subscription

    @precondition(lambda self: self.joined)
    @rule(data=st.data(), reason=st.sampled_from([None, "gone"]))
    def end(self, data: st.DataObject, reason: str | None) -> None:
        topic = data.draw(st.sampled_from(sorted(self.joined)))
        subscription = self.joined[topic]
        frame = self.protocol.end(subscription, error=reason)
        assert frame is not None
        event, payload = ("phx_close", {}) if reason is None else ("phx_error", {"reason": reason})
        assert self.check(frame, subscription.join_ref, subscription.join_ref, topic, event) == payload
        self.gone(topic)

    @precondition(lambda self: self.pushes)
    @rule(data=st.data(), status=st.sampled_from(["ok", "error", "later"]))
    def reply(self, data: st.DataObject, status: str) -> None:
        push = data.draw(st.sampled_from(self.pushes))
        frame = self.protocol.reply(push, status)
        subscription = push.subscription
        if push.ref is None or self.joined.get(subscription.topic) is not subscription:
            assert frame is None
        else:
            assert frame is not None
            answer = self.check(frame, subscription.join_ref, push.ref, subscription.topic, "phx_reply")
            assert answer == {"status": status, "response": {}}

    @invariant()
    def what_is_joined_agrees(self) -> None:
        if hasattr(self, "protocol"):
            assert self.protocol.subscriptions == self.joined
            assert len(self.joined) <= TOPICS_MAX
            assert all(self.protocol.end(subscription) is None for subscription in self.ended)


TestAnyMessagesInAnyOrder = AnyOrder.TestCase
