"""Faults where each topic is subscribed to by its own channel: what is heard is known, and each loss is reported.

Each client is held to: in order, nothing twice, and what is missing was reported at that place; and to no one else.
"""

import asyncio
import random
import time
from typing import Any

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from relay.brokers.base import Event
from relay.brokers.redis import RedisBroker
from relay.brokers.redis_channels import WINDOW
from relay.config_sections import Direction
from relay.errors import BusUnavailable
from tests.support.client import Client
from tests.support.faults import Proxy, Sentinels
from tests.support.patience import PATIENCE
from tests.support.process import Valkey, wait_for
from tests.support.redis_faults import BY_TOPIC, FAST, OK, UNAVAILABLE, Connect, ServeRelay, StartStream, expect_told
from tests.support.redis_link import Switch, ask, broker_on
from tests.support.serving import eventually
from tests.support.witness import Ticker, Witness


def channels(server: Valkey, pattern: str = "topic:*") -> set[str]:
    """The channels of topics that somebody subscribes to there."""
    return set(ask(server, "PUBSUB", "CHANNELS", pattern))


def calls(server: Valkey, command: str) -> int:
    with Redis(port=server.port) as redis:
        return int(redis.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


async def subscribe_all(broker: RedisBroker, topics: list[str], at_once: int = 5000) -> None:
    for start in range(0, len(topics), at_once):
        await asyncio.gather(*map(broker.subscribe, topics[start : start + at_once]))


async def leave(client: Client, join_ref: Any, topic: str) -> None:
    ref = client.next_ref()
    await client.send(join_ref, ref, topic, "phx_leave", {})
    assert await client.receive() == client.reply(join_ref, ref, topic)
    assert (await client.receive())[3] == "phx_close"


async def until_heard_again(broker: RedisBroker) -> None:
    await eventually(lambda: broker.link.live and not broker.degraded, "all topics to be heard again", 60)


# The link.


async def test_link_cut_while_10_000_joins_wait(server: Valkey) -> None:
    """Each is refused, at once, and nothing of them is left behind."""
    async with (
        Switch.open(server.port) as proxy,
        broker_on(proxy.url, timeout_s=60, ping_timeout_s=60, **BY_TOPIC) as (broker, sink, metrics),
    ):
        await broker.subscribe("heard")
        link = proxy.link(b"SUBSCRIBE")
        link["deaf"] = True
        waiting = [asyncio.create_task(broker.subscribe(f"t{number}")) for number in range(10_000)]
        await eventually(lambda: b"topic:t9999\r\n" in link["sent"], "all to be asked for")
        assert not any(task.done() for task in waiting)
        cut_at = time.monotonic()
        link["writer"].transport.abort()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert time.monotonic() - cut_at < 5 * PATIENCE and {type(answer) for answer in answers} == {BusUnavailable}
        await until_heard_again(broker)
        assert channels(server) == {"topic:heard"}
        assert (sink.told, metrics.gaps) == (["heard"], 1)


@pytest.mark.parametrize("count", [2, 100_000])
async def test_killed_and_restarted_with_many_topics(server: Valkey, count: int) -> None:
    """All are heard again, those with most subscribers first, and the gap of each is reported once."""
    topics = [f"t{number}" for number in range(count)]
    async with broker_on(server.url, timeout_s=30, ping_timeout_s=30, **BY_TOPIC) as (broker, sink, metrics):
        await subscribe_all(broker, topics)
        sink.subscribers = {topics[-1]: 3, topics[-2]: 2}
        server.kill()
        await eventually(lambda: not broker.link.live, "the link to be down")
        with pytest.raises(BusUnavailable):
            await broker.subscribe("new")
        assert sink.told == []
        await asyncio.to_thread(server.start)
        await until_heard_again(broker)
        assert sink.told[:2] == [topics[-1], topics[-2]]
        assert len(sink.told) == count and set(sink.told) == set(topics)
        assert metrics.gaps == 1
        assert int(ask(server, "PUBSUB", "NUMSUB", "topic:t0")[1]) == 1
        assert len(channels(server)) == count


async def test_output_buffer_cut_during_a_resubscribe(server: Valkey) -> None:
    """Redis cuts the connection off while a part of the topics is confirmed; the rest goes on at the next."""
    topics = [f"t{number}" for number in range(2 * WINDOW)]
    async with Proxy.open(server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        async with broker_on(url, timeout_s=30, ping_timeout_s=30, **BY_TOPIC) as (broker, sink, metrics):
            await subscribe_all(broker, topics)

            def missed() -> int:
                return 0 if broker.channels is None else broker.channels.missed

            proxy.chunk_bytes, proxy.delay_s = 4096, 0.02  # Redis's replies wait in Redis from now on
            ask(server, "CLIENT", "KILL", "TYPE", "pubsub")
            await eventually(lambda: 0 < missed() < len(topics), "the first to be heard again", 60)
            ask(server, "CONFIG", "SET", "client-output-buffer-limit", "pubsub 100000 0 0")
            async with AsyncRedis.from_url(server.url) as redis:
                while metrics.gaps < 2:
                    await redis.publish(f"topic:{sink.told[0]}", b"e:" + b"x" * 60_000)
                    if not broker.link.live:
                        proxy.chunk_bytes, proxy.delay_s = 65536, 0.0
            ask(server, "CONFIG", "SET", "client-output-buffer-limit", "pubsub 33554432 8388608 60")
            await until_heard_again(broker)
            assert len(channels(server)) == len(topics)
            assert set(sink.told) == set(topics), "each of them has missed something"
            await broker.publish(Direction.TO, topics[-1], "e", b"after")
            await eventually(lambda: sink.events[-1:] == [Event(topics[-1], "e", b"after")], "the last of them")


async def test_numbered_events_under_outages(stream: StartStream, server: Valkey) -> None:
    """Killed and restarted, and its connections killed: in order, nothing twice, each loss reported at its place."""
    async with stream(**BY_TOPIC) as run:
        server.kill()
        await eventually(lambda: not run.served.relay.node.link.live, "the outage")
        client = run.client
        await client.send("9", "9", "room:other", "phx_join", {})
        assert await client.receive() == client.refusal("9", "9", "room:other", "bus unavailable")
        await asyncio.to_thread(server.start)
        await run.until_told(1)
        await run.witness.progress()
        for gaps in (2, 3):
            ask(server, "CLIENT", "KILL", "TYPE", "pubsub")
            await run.until_told(gaps)
            await run.witness.progress()
        join_ref = await client.join("room:other")
        async with AsyncRedis.from_url(server.url) as redis:
            await redis.publish("topic:room:other", b"tick:1")
        await client.expect_event("room:other", "tick", 1)
        await client.expect_alive()
        assert await client.push(join_ref, "room:other", "shout") != UNAVAILABLE


async def test_failover_by_sentinel(serve_relay: ServeRelay, connect: Connect) -> None:
    with Sentinels(password="the-secret") as sentinels:
        served = await serve_relay(redis_url=sentinels.url, redis=FAST | BY_TOPIC)
        client = await connect(served)
        ports = sentinels.master.port, sentinels.replica.port
        urls = [f"redis://:the-secret@127.0.0.1:{port}" for port in ports]
        async with Ticker.run(urls[0], "room:fail", "topic") as ticker, Witness.run(client, "room:fail") as witness:
            await witness.progress()
            sentinels.master.kill()
            await asyncio.to_thread(wait_for, lambda: sentinels.master_port() == ports[1], "the failover")
            ticker.url = urls[1]
            await witness.until(lambda: witness.joins > 1)
            await witness.progress()
            _ = witness.check(ticker)
        assert served.relay.metrics.gaps == len(witness.told) == 1


async def test_nobody_is_told_of_a_gap_who_joined_after_it(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """A join that comes while topics are heard again waits for its own, and is not asked to rejoin."""
    served = await serve_relay(redis_url=server.url, redis=FAST | BY_TOPIC)
    client, late = await connect(served), await connect(served)
    ref = await client.join("room:1")
    ask(server, "CLIENT", "KILL", "TYPE", "pubsub")
    await expect_told(client, ("room:1", ref))
    _ = await late.join("room:1")
    _ = await client.join("room:1")
    async with AsyncRedis.from_url(server.url) as redis:
        await redis.publish("topic:room:1", b"tick:1")
    for each in (client, late):
        await each.expect_event("room:1", "tick", 1)
        await each.expect_alive()
    assert served.relay.metrics.rejoins_requested == 1


# Confirmations.


async def test_confirmation_that_never_comes_refuses_the_join_and_ends_the_connection(server: Valkey) -> None:
    """A proxy takes one reply out of the stream: what is heard is not known any more, so the relay connects anew."""
    async with Proxy.open(server.port) as proxy:
        async with broker_on(
            f"redis://127.0.0.1:{proxy.port}", **BY_TOPIC | {"ping_timeout_s": 5, "timeout_s": 30}
        ) as (
            broker,
            sink,
            metrics,
        ):
            await broker.subscribe("heard")
            reply = b"*3\r\n$9\r\nsubscribe\r\n$10\r\ntopic:lost\r\n:4\r\n"
            proxy.rewrite = lambda data: data.replace(reply, b"")
            with pytest.raises(BusUnavailable, match="was not answered"):
                await broker.subscribe("lost")
            proxy.rewrite = bytes
            await eventually(lambda: metrics.gaps == 1, "the gap")
            await until_heard_again(broker)
            assert sink.told == ["heard"]
            await broker.subscribe("lost")
            await broker.publish(Direction.TO, "lost", "e", b"1")
            await sink.expect(Event("lost", "e", b"1"))


async def test_answers_that_do_not_come_at_all_refuse_the_join_in_time(server: Valkey) -> None:
    async with (
        Switch.open(server.port) as proxy,
        broker_on(proxy.url, timeout_s=0.5, ping_interval_s=60, ping_timeout_s=60, **BY_TOPIC) as (broker, _, metrics),
    ):
        proxy.link(b"SUBSCRIBE")["deaf"] = True
        since = time.monotonic()
        with pytest.raises(BusUnavailable, match=r"no answer to SUBSCRIBE within 0\.5 s"):
            await broker.subscribe("room")
        assert time.monotonic() - since < 10
        assert metrics.gaps == 0


async def test_one_channel_that_is_not_permitted(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Its joins are refused, which is logged once with what allows it; the others' are not, even in the same turn."""
    rights = ("+subscribe", "+unsubscribe", "+publish", "+ping", "+role", "&topic:room:*", "&relay:control")
    ask(server, "ACL", "SETUSER", "relay", "on", ">pw", "resetchannels", "-@all", *rights)
    served = await serve_relay(redis_url=f"redis://relay:pw@127.0.0.1:{server.port}", redis=FAST | BY_TOPIC)
    client = await connect(served)
    for number in range(3):
        await client.send(f"{number}", f"{number}", ("room:0", "secret", "room:2")[number], "phx_join", {})
    answers = [await client.receive() for _ in range(3)]
    assert client.refusal("1", "1", "secret", "bus unavailable") in answers
    assert client.refusal("1", "1", "secret", "bus unavailable") == await _join(client, "secret", "1")
    async with AsyncRedis.from_url(server.url) as redis:
        for topic in ("secret", "room:0", "room:2"):
            await redis.publish(f"topic:{topic}", b"tick:1")
    for topic in ("room:0", "room:2"):
        await client.expect_event(topic, "tick", 1)
    assert served.relay.node.link.live and served.relay.metrics.gaps == 0
    said = [record.getMessage() for record in caplog.records if "no permission for SUBSCRIBE" in record.getMessage()]
    assert len(said) == 1 and "&topic:*" in said[0] and "topic:secret" in said[0]


async def _join(client: Any, topic: str, ref: str) -> Any:
    await client.send(ref, ref, topic, "phx_join", {})
    return await client.receive()


async def test_user_that_may_not_subscribe_is_not_live_and_it_says_why(server: Valkey) -> None:
    ask(server, "ACL", "SETUSER", "relay", "on", ">pw", "allchannels", "-@all", "+psubscribe", "+publish", "+ping")
    async with broker_on(f"redis://relay:pw@127.0.0.1:{server.port}", **BY_TOPIC) as (broker, _, _):
        assert "SUBSCRIBE relay:control" in broker.link.reason and "NOPERM" in broker.link.reason


async def test_topic_whose_permission_is_taken_away_is_reported(server: Valkey) -> None:
    """Redis ends the connection; the topic cannot be heard again, so its subscribers come back and are refused."""
    rights = ("+subscribe", "+unsubscribe", "+publish", "+ping", "+role", "&topic:*", "&relay:control")
    ask(server, "ACL", "SETUSER", "relay", "on", ">pw", "resetchannels", "-@all", *rights)
    async with broker_on(f"redis://relay:pw@127.0.0.1:{server.port}", **BY_TOPIC) as (broker, sink, _):
        await asyncio.gather(broker.subscribe("room"), broker.subscribe("secret"))
        ask(server, "ACL", "SETUSER", "relay", "resetchannels", "&topic:room", "&relay:control")
        await eventually(lambda: sorted(sink.told) == ["room", "secret"], "both")
        assert (broker.hears("room"), broker.hears("secret")) == (True, False)
        with pytest.raises(BusUnavailable, match="NOPERM"):
            await broker.subscribe("secret")


# Joins and leaves.


async def test_join_leave_join_within_the_linger_asks_redis_once(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    served = await serve_relay(redis_url=server.url, redis=FAST | BY_TOPIC)
    client = await connect(served)
    before = calls(server, "subscribe")
    for _ in range(5):
        ref = await client.join("room:1")
        await leave(client, ref, "room:1")
    _ = await client.join("room:1")
    async with AsyncRedis.from_url(server.url) as redis:
        await redis.publish("topic:room:1", b"tick:1")
    await client.expect_event("room:1", "tick", 1)
    assert (calls(server, "subscribe") - before, calls(server, "unsubscribe")) == (1, 0)


async def test_leave_during_the_subscribe_leaves_nothing_subscribed(server: Valkey) -> None:
    async with Proxy.open(server.port) as proxy:
        settings = BY_TOPIC | {"linger_s": 0.05, "ping_timeout_s": 5}
        async with broker_on(f"redis://127.0.0.1:{proxy.port}", **settings) as (broker, _, metrics):
            proxy.delay_s = 0.2
            joining = asyncio.create_task(broker.subscribe("room"))
            await asyncio.sleep(0)
            joining.cancel()
            await asyncio.gather(joining, return_exceptions=True)
            await broker.unsubscribe("room")
            await eventually(lambda: calls(server, "unsubscribe") == 1, "the end of the linger")
            assert channels(server) == set()
            proxy.delay_s = 0.0
            await broker.subscribe("room")
            assert (channels(server), metrics.gaps) == ({"topic:room"}, 0)


async def test_after_churn_exactly_the_joined_topics_are_subscribed(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Clients join and leave at random, some by closing; then Redis knows their topics, and no others."""
    served = await serve_relay(
        redis_url=server.url, redis=FAST | BY_TOPIC | {"linger_s": 0.1}, limits={"joins_per_s": 0, "joins_burst": 1000}
    )
    random.seed(18)
    clients = [await connect(served) for _ in range(4)]
    joined: list[dict[str, str]] = [{} for _ in clients]
    for _ in range(400):
        who = random.randrange(len(clients))
        topic = f"room:{random.randrange(12)}"
        if topic in joined[who]:
            await leave(clients[who], joined[who].pop(topic), topic)
        else:
            joined[who][topic] = await clients[who].join(topic)
        if random.random() < 0.05:
            await asyncio.sleep(0.1)
    expected = {f"topic:{topic}" for topics in joined for topic in topics}
    await eventually(lambda: channels(server) == expected, "the linger")
    assert served.relay.metrics.gaps == 0
    async with AsyncRedis.from_url(server.url) as redis:
        for name in expected:
            assert await redis.publish(name, b"tick:1") == 1


# Events.


async def test_event_that_no_client_has_joined_brings_no_byte(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """By the relay's own count and by that of a proxy on its connections."""
    received = 0
    quiet = BY_TOPIC | {"ping_interval_s": 600.0, "ping_timeout_s": 60.0}  # no sign of life is asked for meanwhile

    def count(data: bytes) -> bytes:
        nonlocal received
        received += len(data)
        return data

    async with Proxy.open(server.port) as proxy:
        served = await serve_relay(redis_url=f"redis://127.0.0.1:{proxy.port}", redis=quiet)
        client = await connect(served)
        assert await client.push(await client.join("room:1"), "room:1", "shout") == OK
        proxy.rewrite = count
        async with AsyncRedis.from_url(server.url) as redis:
            async with redis.pipeline(transaction=False) as commands:
                for number in range(1000):
                    _ = commands.publish(f"topic:other:{number}", b'tick:{"text":"nobody has joined"}')
                    _ = commands.publish(f"to:room:1:{number}", b"{}")
                assert await commands.execute() == [0] * 2000
            assert received == 0
            await redis.publish("topic:room:1", b"tick:1")
        await client.expect_event("room:1", "tick", 1)
        assert 0 < received < 100
        metrics = served.relay.metrics
        assert (metrics.events_in, metrics.events_on_topics, metrics.events_without_subscribers) == (1, 1, 0)


@pytest.mark.parametrize("subscribe", ["pattern", "topic"])
async def test_message_without_an_event_is_dropped_counted_and_logged_now_and_then(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture, subscribe: str
) -> None:
    redis_settings = FAST | {"publish_form": "topic", "subscribe": subscribe}
    served = await serve_relay(redis_url=server.url, redis=redis_settings)
    client = await connect(served)
    _ = await client.join("room:1")
    forgotten = (b'{"text":"hi"}', b'{"time":"10:30"}', b"[1:2]", b'"new_msg":1', b"hello", b"")
    async with AsyncRedis.from_url(server.url) as redis:
        for message in forgotten:
            assert await redis.publish("topic:room:1", message) == 1
        await redis.publish("topic:room:1", b'new_msg:{"text":"hi"}')
    await client.expect_event("room:1", "new_msg", {"text": "hi"})
    assert served.relay.metrics.dropped == {"message names no event": len(forgotten)}
    said = [
        record.getMessage() for record in caplog.records if "the name of the event is missing" in record.getMessage()
    ]
    assert len(said) == 1 and "topic:room:1" in said[0]
