"""``relay check --connect``: what it finds out of real servers, and of users who may do too little."""

import asyncio
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from relay.brokers.cluster_map import slot_of
from relay.brokers.redis_check import Finding, examine
from relay.brokers.redis_unheard import count_unheard
from relay.cli.check_redis import ask_redis
from relay.config import Config
from tests.integration.test_cli_client import run
from tests.support.cluster import Cluster
from tests.support.faults import Sentinels
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey, free_port, wait_for
from tests.support.serving import eventually

DOCS = Path(__file__).parents[2] / "docs"

KINDS: dict[str, dict[str, Any]] = {
    "history": {"topics": [{"match": "*", "history": {"size": 10, "ttl_s": 60}}]},
    "presence": {"topics": [{"match": "*", "presence": True}]},
    "plain": {"auth": {"secret": "the secret that all nodes have in common"}},
    "topic mode": {
        "auth": {"secret": "the secret that all nodes have in common"},
        "redis": {"subscribe": "topic", "publish_form": "topic"},
    },
}


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


def acl_of(kind: str) -> list[str]:
    """The rules for a relay's user, as a page of the documentation has them."""
    page = DOCS / f"{kind if kind in ('history', 'presence') else 'redis'}.md"
    found = re.findall(r"ACL SETUSER relay on >secret (.*)", page.read_text())
    return [*found[kind == "topic mode"].split(), *(["+multi"] if kind == "topic mode" else [])]


PLAIN = acl_of("plain")


def set_user(valkey: Valkey, *rules: str) -> None:
    with Redis(port=valkey.port) as redis:
        assert redis.execute_command("ACL", "SETUSER", "relay", "reset", "on", ">secret", *rules)


async def examined(valkey: Valkey, kind: str = "plain", **settings: Any) -> list[Finding]:
    url = f"redis://relay:secret@127.0.0.1:{valkey.port}"
    return await examine(Config(redis_url=url, **{**KINDS[kind], **settings}))


def warnings_in(found: list[Finding]) -> str:
    return "\n".join(each.text for each in found if each.about == "warning")


def text_of(found: list[Finding]) -> str:
    return "\n".join(f"{each.about}: {each.text}" for each in found)


async def test_server_role_limits_and_round_trip_are_reported(valkey: Valkey) -> None:
    set_user(valkey, "allkeys", "allchannels", "+@all")
    found = await examined(valkey, "history", workers=2)
    text = text_of(found)
    assert warnings_in(found) == ""
    assert re.search(rf"redis: Valkey \d+\.\d+\.\d+ at 127.0.0.1:{valkey.port}\n", text)
    assert "redis: it is a master\n" in text
    assert "redis: function relay_publish is not loaded; a relay loads it when it connects\n" in text
    assert "limits: client-output-buffer-limit pubsub 33554432 8388608 60 (bytes, bytes, s)\n" in text
    assert "limits: maxclients 10000; a relay with 2 processes takes 6, and 1 is in use\n" in text
    assert re.search(r"probe: published and heard again after \d+\.\d ms; 0 relays listening\n", text)
    assert re.search(r"user: may use the \d+ commands that are needed", text)


async def test_relays_that_listen_are_counted_and_nothing_is_left_in_redis(valkey: Valkey) -> None:
    set_user(valkey, "allkeys", "allchannels", "+@all")
    with RelayProcess("--redis-url", valkey.url) as relay, Redis(port=valkey.port) as redis:
        assert "1 relay listening" in text_of(await examined(valkey))
        _ = await examined(valkey, "history"), await examined(valkey, "presence")
        assert redis.keys() == []
        assert "control message" not in relay.output


@pytest.mark.parametrize("kind", list(KINDS))
async def test_documented_permissions_are_enough(valkey: Valkey, kind: str) -> None:
    set_user(valkey, *acl_of(kind))
    found = await examined(valkey, kind)
    assert warnings_in(found) == ""
    assert "its version is not known: allow +info" in text_of(found)
    assert "maxclients are not known: allow +config|get" in text_of(found)


def missing_cases() -> Iterator[tuple[str, str]]:
    passed_over = ("reset", "-@", "+exec", "+function", "+role", "+multi")
    for kind in KINDS:
        for rule in acl_of(kind):
            if not rule.startswith(passed_over):
                yield kind, rule


@pytest.mark.parametrize(("kind", "rule"), list(missing_cases()))
async def test_missing_permission_is_named_with_the_rule_that_grants_it(valkey: Valkey, kind: str, rule: str) -> None:
    set_user(valkey, *(each for each in acl_of(kind) if each != rule))
    assert re.search(rf"{re.escape(rule)}(\s|$)", warnings_in(await examined(valkey, kind)), re.MULTILINE)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            "+multi",
            "allow +multi for this check, or compare with what is needed: +publish &to:* &from:* &relay:control",
        ),
        ("+role", "its role is not known: allow +role"),
    ],
)
async def test_what_cannot_be_found_out_is_said(valkey: Valkey, rule: str, said: str) -> None:
    set_user(valkey, *(each for each in PLAIN if each != rule))
    assert said in text_of(await examined(valkey))


async def test_command_that_the_server_does_not_have_is_no_matter_of_permissions() -> None:
    with Valkey("--rename-command", "XADD", "") as server:
        set_user(server, "allkeys", "allchannels", "+@all")
        said = warnings_in(await examined(server, "history"))
    assert said == "redis: histories do not work: this server knows no XADD"


async def test_limits_that_are_too_low_are_warnings() -> None:
    limits = ("--client-output-buffer-limit", "pubsub 1mb 1mb 60", "--maxclients", "5")
    memory = ("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    with Valkey(*limits, *memory) as server:
        set_user(server, "allkeys", "allchannels", "+@all")
        said = warnings_in(await examined(server, "presence", workers=2))
    assert "client-output-buffer-limit pubsub 1048576 1048576 60: a burst of events cuts relays off" in said
    assert "maxclients 5; a relay with 2 processes takes 6, and 1 is in use: not enough" in said
    assert "maxmemory-policy allkeys-lru evicts histories and members" in said


async def test_server_that_does_not_answer_is_a_warning() -> None:
    with Valkey() as server:
        server.pause()
        found = await examine(Config(redis_url=server.url, redis={"timeout_s": 1}))
        server.resume()
    assert found == [Finding("warning", f"redis: 127.0.0.1:{server.port}: no answer to INFO within 1 s")]


async def test_replica_is_a_warning(valkey: Valkey) -> None:
    with Valkey("--replicaof", f"127.0.0.1 {valkey.port}") as replica:
        with Redis(port=replica.port) as redis:
            wait_for(lambda: redis.info("replication")["master_link_status"] == "up", "the replication")
        set_user(replica, "allkeys", "allchannels", "+@all")
        assert "it is a replica: pushes are refused; expected a master" in warnings_in(await examined(replica))


async def test_sentinels_are_asked_each() -> None:
    with Sentinels() as sentinels:
        found = await examine(Config(redis_url=sentinels.url))
        assert f"{sentinels.service} is at 127.0.0.1:{sentinels.master.port}" in text_of(found)
        assert (warnings_in(found), "redis: it is a master" in text_of(found)) == ("", True)
        away = sentinels.url.replace("redis+sentinel://", f"redis+sentinel://127.0.0.1:{free_port()},")
        assert re.search(r"Sentinel 127.0.0.1:\d+ does not answer", warnings_in(await examine(Config(redis_url=away))))
        wrong = sentinels.url.replace(f"/{sentinels.service}/", "/nonsense/")
        assert "knows no master nonsense" in warnings_in(await examine(Config(redis_url=wrong)))


def test_command_line_shows_it_and_no_password(valkey: Valkey) -> None:
    set_user(valkey, *PLAIN)
    ran = run("check", "--connect", "--redis-url", f"redis://relay:secret@127.0.0.1:{valkey.port}")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert '{"about": "redis", "text": "it is a master"}' in ran.stdout
    wrong = run("check", "--connect", "--redis-url", f"redis://relay:hunter2@127.0.0.1:{valkey.port}")
    assert wrong.returncode == 1
    assert "WRONGPASS" in wrong.stdout and "hunter2" not in wrong.stdout
    away = run("check", "--connect", "--redis-url", f"redis://127.0.0.1:{free_port()}")
    assert (away.returncode, "Connection refused" in away.stdout) == (1, True)
    none = run("check", "--connect")
    said = "relay: --connect: expected redis_url, the address of a Redis; got the relay's own Valkey\n"
    assert (none.returncode, none.stderr) == (2, said)


# Events that relays in topic mode do not receive.

WITHIN_S = 1.0 * PATIENCE
TOPIC_FORM: dict[str, Any] = {"redis": {"publish_form": "topic"}}


async def counted(config: Config, server: Valkey, *messages: tuple[str, str]) -> Finding:
    """What is found while these are published on a server; on a channel that begins with S by ``SPUBLISH``."""
    with Redis(port=server.port) as redis:
        patterns = 2 if config.is_cluster else 1
        counting = asyncio.create_task(count_unheard(config, WITHIN_S))
        await eventually(lambda: redis.pubsub_numpat() == patterns, "the subscription")
        pipeline = redis.pipeline(transaction=False)
        for channel, message in messages:
            pipeline.execute_command(
                "SPUBLISH" if channel.startswith("S ") else "PUBLISH", channel.removeprefix("S "), message
            )
        pipeline.execute()
    (finding,) = await counting
    return finding


async def test_events_in_the_other_form_are_counted_and_named(valkey: Valkey) -> None:
    config = Config(redis_url=valkey.url, **TOPIC_FORM)
    messages = [("to:room:1:new_msg", "{}")] * 2 + [("to:room:2:tick", "1")]
    others = [("topic:room:1", "new_msg:{}"), ("to:relay:probe", '{"probe":"1f0c22ab:7"}'), ("from:room:1:e", "1")]
    assert await counted(config, valkey, *messages, *others) == Finding(
        "warning",
        f"redis: 3 events on to:* within {WITHIN_S:g} s, which relays in topic mode do not receive (to:room:1:new_msg, "
        "to:room:2:tick): publish them with PUBLISH topic:<topic> '<event>:<payload>'",
    )
    many = [(f"to:room:{number}:tick", "1") for number in range(1005)]
    found = await counted(config, valkey, *many, *[("to:busy:tick", "1")] * 3)
    assert "1008 events" in found.text
    assert "(more than 1000 channels such as to:room:0:tick, " in found.text
    assert await counted(config, valkey) == Finding("redis", f"no events on to:* within {WITHIN_S:g} s")


async def test_user_who_may_not_listen_to_the_other_form_is_told_which_rule_allows_it(valkey: Valkey) -> None:
    """The check goes on: relays in topic mode do not need this right, so it is no warning."""
    set_user(valkey, *acl_of("topic mode"))
    url = f"redis://relay:secret@127.0.0.1:{valkey.port}"
    (finding,) = await count_unheard(Config(redis_url=url, **TOPIC_FORM), 1.0)
    assert finding.about == "redis"
    assert "events on to:* are not counted (NOPERM" in finding.text
    assert finding.text.endswith("allow +psubscribe &to:* for this check")


async def test_connection_that_ends_while_events_are_counted_is_a_warning(valkey: Valkey) -> None:
    with Redis(port=valkey.port) as redis:
        counting = asyncio.create_task(count_unheard(Config(redis_url=valkey.url, **TOPIC_FORM), 60))
        await eventually(lambda: redis.pubsub_numpat() == 1, "the subscription")
        redis.client_kill_filter(_type="pubsub")
    (finding,) = await counting
    assert finding.about == "warning"
    assert finding.text.startswith("redis: counting events on to:* has ended: ")


async def test_publish_instead_of_spublish_is_counted_on_a_cluster(cluster: Cluster) -> None:
    config = Config(redis_url=cluster.url)
    topic = next(f"topic:{number}" for number in count() if slot_of(b"topic:%d" % number) < 5461)
    messages = [("to:room:1:e", "1"), ("topic:room:1", "tick:1"), (f"S {topic}", "tick:1")]
    found = await counted(config, cluster.masters[0], *messages)
    assert (
        f"2 events on to:* and topic:* within {WITHIN_S:g} s, of which relays receive those on topic:* without"
        in found.text
    )
    assert found.text.endswith("publish them with SPUBLISH topic:<topic> '<event>:<payload>'")


def test_events_are_counted_only_where_the_form_is_that_of_topic_mode(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of a relay in pattern mode takes no longer than before."""

    def said(seconds: float, **settings: Any) -> str:
        return " ".join(text for _, text in ask_redis(Config(redis_url=valkey.url, **settings), seconds))

    assert "events on to:*" not in said(0.1)
    assert "no events on to:* within 0.1 s" in said(0.1, **TOPIC_FORM)
    assert "events on to:*" not in said(0, **TOPIC_FORM)
    monkeypatch.setenv("RELAY_REDIS__PUBLISH_FORM", "topic")
    ran = run("check", "--connect", "--redis-url", valkey.url, "--seconds", "0.1")
    assert "no events on to:* within 0.1 s" in ran.stdout
