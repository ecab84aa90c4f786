"""`relay.brokers.redis_settings`: what relays leave in Redis for programs that publish."""

import json

import hiredis
import pytest

from relay.brokers.redis_settings import Settings, own_settings, renewal, settings_from
from relay.config import Config
from relay.config_sections import HistoryConfig

CONFIG = Config(
    redis_url="redis://none",
    topics=[{"match": "room:*", "history": {"size": 10, "ttl_s": 60}}, {"match": "*"}],
    redis={"topic_prefix": "t:"},
)
FIELDS = dict(zip(renewal(CONFIG)[0][2::2], renewal(CONFIG)[0][3::2], strict=True))


def read(reply: object) -> Settings:
    return settings_from(reply, Config()) or own_settings(Config())


def encoded(fields: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in fields.items()}


@pytest.mark.parametrize("protocol", [2, 3])
def test_settings_are_read_as_they_were_written(protocol: int) -> None:
    pairs = encoded(FIELDS)
    found = read(pairs if protocol == 3 else [part for pair in pairs.items() for part in pair])
    assert found == own_settings(CONFIG)
    assert (found.history("room:1"), found.history("other")) == (HistoryConfig(size=10, ttl_s=60), None)


def test_settings_of_a_newer_relay_are_understood() -> None:
    topics = [{"match": "room:*", "history": {"size": 10, "ttl_s": 60, "keep": "all"}, "presence": True}]
    found = read(encoded(FIELDS | {"topics": json.dumps(topics), "newer": "1"}))
    assert found.history("room:1") == HistoryConfig(size=10, ttl_s=60)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        [],
        hiredis.ReplyError("WRONGTYPE no hash"),
        encoded(FIELDS | {"topics": "nonsense"}),
        encoded(FIELDS | {"topics": '[{"match":"*","history":{"size":0,"ttl_s":1}}]'}),
        encoded(FIELDS | {"payload_max_bytes": "many"}),
        encoded({"topics": "[]"}),
        {b"topics": b"\xff"},
    ],
)
def test_settings_that_cannot_be_used_leave_the_configuration(reply: object) -> None:
    assert read(reply) == own_settings(Config())


def test_form_of_events_is_that_of_the_relays_and_older_ones_do_not_say_it() -> None:
    by_topic = Config(redis={"publish_form": "topic"})
    fields = dict(zip(renewal(by_topic)[0][2::2], renewal(by_topic)[0][3::2], strict=True))
    assert read(encoded(fields)).is_by_topic("any")
    assert not read(encoded(FIELDS)).is_by_topic("any")
    assert read(encoded(FIELDS)).is_by_topic("room:1"), "it has a history"
    del fields["publish_form"]
    assert not read(encoded(fields)).is_by_topic("any")
