"""The ACL line of docs/presence.md, on real servers: it suffices, and each part of it is needed."""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py

from relay import Config
from relay.brokers.base import Numbering, OwnChange
from relay.brokers.redis import RedisBroker
from relay.config_sections import Direction
from relay.errors import BusUnavailable
from relay.metrics import Metrics
from relay.protocol.presence import Difference, Member
from tests.integration.test_history_rights import admin, allow, server, url_of
from tests.integration.test_presence import QUICK, direct, enter
from tests.support.process import Valkey
from tests.support.serving import Served, eventually
from tests.support.sink import Sink

__all__ = ["admin", "direct", "enter", "server"]

ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

PAGE = Path(__file__).parents[2] / "docs" / "presence.md"
(RULES,) = (
    rules.split() for rules in re.findall(r"^ACL SETUSER relay on >secret (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
)
IN_USE_LATER = {"+ping", "+role", "-@all", "resetkeys", "resetchannels", "&relay:control"}
"""What is needed after a while only or is not presence's, and what takes rights away."""

TOPICS = [{"match": "room:*", "presence": True}]


async def use_all(url: str) -> None:
    """Do on a server whatever a relay with presence does there. Raises BusUnavailable, AssertionError."""
    broker = RedisBroker(Config(redis_url=url, topics=TOPICS), Metrics(), ["relay:presence"])
    sink = Sink()
    await broker.start(sink)
    try:
        assert broker.link.live, broker.link.reason
        store = broker.presence
        assert store is not None
        assert not (await store.renew(b"{}", 0, is_new=True)).held
        assert (await store.renew(b"{}", 0, is_new=True)).held
        assert await store.nodes() == [store.node]
        one, two = Member("01", "ada", b"{}"), Member("02", "bob", b"{}")
        await store.write([OwnChange("room:1", Difference({"01": one, "02": two}, {}), False)], b"{}", Numbering(1, 0))
        await store.write([OwnChange("room:1", Difference({}, {"02": two}), False)], b"{}", Numbering(2, 1))
        assert await store.read("room:1", store.node, 0) == {"01": one}
        await store.write([OwnChange("room:1", Difference({}, {"01": one}), True)], b"{}", Numbering(3, 2))
        assert await store.read("room:1", store.node, 0) == {}
        await store.write([OwnChange("room:1", Difference({"01": one}, {}), False)], b"{}", Numbering(4, 3))
        await store.clear()
        await store.remove(store.node, b"{}")
        assert await store.read("room:1", store.node, 0) is None
        await store.remove("another")
        await broker.publish(Direction.TO, "room:1", "typing", b"1")
        await broker.publish(Direction.FROM, "room:1", "typing", b"1")
        await eventually(lambda: sink.events and sink.events[-1].event == "typing", "the event")
    finally:
        await broker.stop()


def test_rights_suffice_and_each_is_needed(
    server: Valkey, admin: redis_py.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    allow(admin, "relay", RULES)
    asyncio.run(use_all(url_of(server, "relay")))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    superfluous = []
    for rule in RULES:
        if rule in IN_USE_LATER:
            continue
        admin.flushall()
        admin.script_flush()
        allow(admin, "relay", [other for other in RULES if other != rule])
        with suppress(BusUnavailable, AssertionError):
            asyncio.run(use_all(url_of(server, "relay")))
            superfluous.append(rule)
    assert superfluous == []


async def test_members_of_other_nodes_are_unknown_without_the_right_to_the_keys(
    server: Valkey, admin: redis_py.Redis, serve_relay: ServeRelay, enter: Any
) -> None:
    """Clients are sent the members of their own node; whoever asks for all is answered that they cannot be read."""
    allow(admin, "relay", [rule for rule in RULES if rule != "~presence:*"])
    served = await serve_relay(redis_url=url_of(server, "relay"), topics=TOPICS, presence=QUICK)
    one, two = await enter(served, "room:1"), await enter(served, "room:1")
    await eventually(lambda: len(one.keys) == 2 and one.keys == two.keys, "both")
    with pytest.raises(BusUnavailable, match="(?i)permission"):
        await served.relay.presence("room:1")


async def test_relay_without_the_right_to_the_channel_is_not_ready(
    server: Valkey, admin: redis_py.Redis, serve_relay: ServeRelay
) -> None:
    allow(admin, "relay", [rule for rule in RULES if rule != "&relay:presence"])
    served = await serve_relay(redis_url=url_of(server, "relay"), topics=TOPICS, presence=QUICK)
    assert not served.relay.link.live
    assert served.relay.link.reason.startswith("PSUBSCRIBE relay:presence: NOPERM")
