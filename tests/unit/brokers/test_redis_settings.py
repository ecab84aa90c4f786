"""`relay.brokers.redis_settings`: what relays leave in Redis for programs that publish."""

import json

import hiredis
import pytest

from relay.brokers.redis_settings import Preparation, Settings, own_settings, renewal, settings_from
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


class Server:
    """Answers commands: those of ``refused`` with an error, others as one that has just been flushed."""

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}
        self.asked: list[str] = []
        self.is_flushed = False

    async def ask(self, *command: str) -> object:
        self.asked.append(command[0])
        if command[0] in self.refused:
            return hiredis.ReplyError(self.refused[command[0]])
        return int(not self.is_flushed) if command[0] == "EXPIRE" else []


async def test_server_is_prepared_again_where_it_has_lost_what_was_written() -> None:
    server, one = Server(), Preparation(CONFIG)
    assert await one.prepare(server.ask)
    assert not await one.is_due(server.ask)
    server.is_flushed = True
    assert await one.is_due(server.ask)


@pytest.mark.parametrize("command", ["HSET", "EXPIRE", "FUNCTION"])
@pytest.mark.parametrize(
    ("error", "is_due"),
    [
        ("OOM command not allowed", True),
        ("NOREPLICAS Not enough good replicas", True),
        ("LOADING Redis is loading", True),
        ("NOPERM no permissions", False),
        ("ERR unknown command", False),
    ],
)
async def test_what_has_failed_is_tried_again_unless_it_is_forbidden(command: str, error: str, is_due: bool) -> None:
    server, one = Server(), Preparation(CONFIG)
    server.refused = {command: error}
    await one.prepare(server.ask)
    server.asked.clear()
    server.is_flushed = command != "FUNCTION" and not is_due
    assert await one.is_due(server.ask) is is_due
    assert server.asked == (["EXPIRE"] if command == "FUNCTION" and not is_due else [])
