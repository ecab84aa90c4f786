"""`relay.brokers.redis_target`: what a publisher sends, and what it makes of the replies."""

from typing import Any

import hiredis
import pytest

from relay.brokers.redis_connection import LinkLost
from relay.brokers.redis_scripts import PUBLISH
from relay.brokers.redis_settings import renewal
from relay.brokers.redis_target import Published, Target
from relay.config import Config
from relay.errors import BusUnavailable

HISTORY = [{"match": "room:*", "history": {"size": 10, "ttl_s": 60}}]
RELAY = Config(redis_url="redis://one", topics=HISTORY, redis={"to_prefix": "t/"}, limits={"payload_max_bytes": 100})
FIELDS = [word.encode() for word in renewal(RELAY)[0][2:]]
MASTER = [b"master", 0, []]
EVENTS = [("other", "e", b"1"), ("room:1", "e", b"2"), ("room:2", "e", b"3")]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def target(**settings: Any) -> Target:
    return Target(Config(redis_url="redis://user:secret@one", **settings))


def test_events_go_where_the_relays_there_say() -> None:
    one = target()
    one.learn(MASTER, FIELDS)
    plain, first, second, role = one.commands(EVENTS, with_script=True)
    assert role == ("ROLE",)
    assert plain == ("PUBLISH", b"t/other:e", b"1")
    assert first[:6] == ("EVAL", PUBLISH.text, "1", b"topic:room:1", b"e", b"2")
    assert second[:6] == ("EVALSHA", PUBLISH.sha, "1", b"topic:room:2", b"e", b"3")
    assert first[6:] == (b"10", b"60", b"", b"100")
    assert one.commands(EVENTS[1:2], with_script=False)[0][0] == "EVALSHA"


def test_without_settings_in_redis_events_are_published_live() -> None:
    one = target()
    replies: list[object] = [[], hiredis.ReplyError("NOPERM no")]
    for fields in replies:
        one.learn(MASTER, fields)
        assert one.commands(EVENTS, with_script=True)[1] == ("PUBLISH", b"to:room:1:e", b"2")


def test_user_that_may_not_read_the_settings_is_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    refusal = hiredis.ReplyError("NOPERM User app has no permissions to run the 'hgetall' command")
    one = target()
    for _ in range(2):
        one.learn(MASTER, refusal)
    assert [record.getMessage() for record in caplog.records] == [
        "no permission to read relay:settings on one:6379: events may not be appended to the history of their topic, "
        "and do not reach relays in topic mode; allow it with +hgetall ~relay:settings, "
        "or give the publisher the settings"
    ]
    target(topics=HISTORY).learn(MASTER, refusal)
    assert len(caplog.records) == 1, "it has no use for them"


@pytest.mark.parametrize(
    "text", ["LOADING Redis is loading", "WRONGTYPE no hash", "MASTERDOWN no link", "BUSY a script"]
)
def test_nothing_is_published_before_settings_could_be_read(text: str) -> None:
    one, fault = target(), hiredis.ReplyError(text)
    with pytest.raises(LinkLost, match=f"HGETALL relay:settings: {text}"):
        one.learn(MASTER, fault)
    target(topics=HISTORY).learn(MASTER, fault)
    one.learn(MASTER, FIELDS)
    one.learn(MASTER, fault)
    assert one.commands(EVENTS[1:2], with_script=False)[0][0] == "EVALSHA", "the last ones count"


def test_settings_that_cannot_be_understood_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    for topics in (b"[", b"[" * 9999, b'[{"match":1}]', b"\xff"):
        fields = [b"topics" if word == b"topics" else word for word in FIELDS]
        fields[fields.index(b"topics") + 1] = topics
        target().learn(MASTER, fields)
    assert len(caplog.records) == 4


def test_topics_of_the_own_settings_count_instead_of_those_in_redis() -> None:
    one = target(topics=[{"match": "x"}])
    one.learn(MASTER, FIELDS)
    assert one.commands(EVENTS[1:2], with_script=True)[0] == ("PUBLISH", b"to:room:1:e", b"2")


def test_settings_that_redis_has_lost_count_until_relays_have_written_them_again() -> None:
    clock = Clock()
    one = Target(Config(redis_url="redis://one"), clock)
    one.learn(MASTER, FIELDS)
    clock.now += 3600
    lost: list[object] = [[], hiredis.ReplyError("LOADING no"), {}]
    for fields in lost:
        one.learn(MASTER, fields)
        clock.now += 30
        assert one.commands(EVENTS[1:2], with_script=False)[0][0] == "EVALSHA"
        with pytest.raises(ValueError, match="at most 100 bytes"):
            one.check([("other", "e", b"1" * 101)])
    one.learn(MASTER, FIELDS)
    one.learn(MASTER, [])
    clock.now += 121
    one.learn(MASTER, [])
    assert one.commands(EVENTS[1:2], with_script=False)[0] == ("PUBLISH", b"to:room:1:e", b"2")


def test_missing_settings_are_looked_for_each_second() -> None:
    clock = Clock()
    one = Target(Config(redis_url="redis://one"), clock)
    one.learn(MASTER, [])
    clock.now += 1
    assert not one.take_due()
    clock.now += 0.1
    assert [one.take_due(), one.take_due()] == [True, False]
    for fields in (FIELDS, hiredis.ReplyError("NOPERM no"), [b"topics", b"nonsense"]):
        one.learn(MASTER, fields)
        clock.now += 2
        assert not one.take_due()


def test_questions_are_due_each_minute() -> None:
    clock = Clock()
    one = Target(RELAY, clock)
    assert not one.take_due()
    clock.now += 61
    assert [one.take_due(), one.take_due()] == [True, False]
    clock.now += 61
    one.learn(MASTER, [])
    assert not one.take_due()


def test_replica_and_other_faults_refuse_the_connection() -> None:
    one = target()
    with pytest.raises(LinkLost, match=r"one:6379 is a replica: what is published there does not reach"):
        one.learn([b"slave", b"host", 6379, b"connected", 0], [])
    with pytest.raises(LinkLost, match="LOADING"):
        one.learn(hiredis.ReplyError("LOADING Redis is loading"), [])
    one.learn(hiredis.ReplyError("NOPERM no permissions to run the 'role' command"), [])


def test_server_is_asked_with_each_event_whether_it_is_still_a_master() -> None:
    one = target()
    commands = one.commands(EVENTS, with_script=True)
    assert one.take_replies(commands, [1, 1, 1, MASTER]) == [1, 1, 1]
    with pytest.raises(LinkLost, match="is a replica"):
        one.take_replies(commands, [1, 1, 1, [b"slave", b"host", 6379, b"connected", 0]])
    denied = hiredis.ReplyError("NOPERM no permissions to run the 'role' command")
    assert one.take_replies(commands, [1, 1, 1, denied]) == [1, 1, 1]
    assert one.commands(EVENTS[:1], with_script=True) == [("PUBLISH", b"to:other:e", b"1")], "it is not asked again"
    assert one.take_replies(one.commands(EVENTS[:1], with_script=True), [1]) == [1]
    with_history = target(topics=HISTORY)
    assert len(with_history.commands(EVENTS[1:2], with_script=True)) == 1, "a replica refuses that by itself"
    cluster = Target(Config(redis_url="redis+cluster://one"))
    assert [command[0] for command in cluster.commands(EVENTS, with_script=True)] == ["SPUBLISH"] * 3


def test_payload_that_relays_would_drop_is_refused_where_the_limit_is_known() -> None:
    large = [("other", "e", b"1" * 101)]
    one = target()
    one.check(large)  # a relay without histories leaves no settings
    one.learn(MASTER, FIELDS)
    with pytest.raises(ValueError, match=r"expected a payload of at most 100 bytes .* got 101"):
        one.check(large)
    with pytest.raises(ValueError, match="at most 100 bytes"):
        Target(RELAY).check(large)


def test_replies_become_results() -> None:
    one = target()
    assert one.results(EVENTS, [2, b"1-1", b"1-2"]) == [
        Published(None, 2),
        Published("1-1", None),
        Published("1-2", None),
    ]


def test_refused_events_are_counted_in_the_error_which_says_what_to_allow() -> None:
    one = target()
    one.learn(MASTER, FIELDS)
    denied = hiredis.ReplyError("NOPERM No permissions to access a channel")
    with pytest.raises(BusUnavailable) as caught:
        one.results(EVENTS, [denied, b"1-1", hiredis.ReplyError("OOM full")])
    assert str(caught.value) == (
        "2 of 3 events were refused: PUBLISH t/other:e: NOPERM No permissions to access a channel; "
        "allow it with ACL SETUSER: &t/* +publish"
    )
    with pytest.raises(BusUnavailable, match=r"^PUBLISH topic:room:1: .*; allow it with ACL SETUSER: ~topic:\* &topic"):
        one.results(EVENTS[1:2], [denied])


@pytest.mark.parametrize(("text", "needed"), [("NOSCRIPT no", True), ("NOPERM evalsha", True), ("OOM full", False)])
def test_one_event_is_sent_again_with_the_script(text: str, needed: bool) -> None:
    one = target()
    one.learn(MASTER, FIELDS)
    reply = hiredis.ReplyError(text)
    assert one.needs_script(one.commands(EVENTS[1:2], with_script=False), [reply]) is needed
    assert not one.needs_script(one.commands(EVENTS[1:2], with_script=True), [reply])
    assert not one.needs_script(one.commands(EVENTS[1:], with_script=False), [reply, reply])


@pytest.mark.parametrize("known_from", ["redis", "configuration"])
def test_events_go_to_the_channel_of_the_topic_where_relays_publish_there(known_from: str) -> None:
    relay = Config(redis_url="redis://one", topics=HISTORY, redis={"publish_form": "topic"})
    one = target() if known_from == "redis" else target(topics=HISTORY, redis={"publish_form": "topic"})
    one.learn(MASTER, [word.encode() for word in renewal(relay)[0][2:]])
    plain, kept, *_ = one.commands(EVENTS, with_script=True)
    assert plain == ("PUBLISH", b"topic:other", b"e:1")
    assert kept[:6] == ("EVAL", PUBLISH.text, "1", b"topic:room:1", b"e", b"2")
    with pytest.raises(BusUnavailable, match=r"PUBLISH topic:other: NOPERM no; allow it with .*&topic:\*"):
        one.results(EVENTS[:1], [hiredis.ReplyError("NOPERM no")])
