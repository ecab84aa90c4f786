"""After a gap: who is asked to rejoin, at which pace, and that no event from behind the hole comes before the word."""

import asyncio
from contextlib import AsyncExitStack
from functools import partial

import hiredis
import pytest

from tests.support.process import Valkey
from tests.support.redis_faults import (
    FAST,
    OK,
    Connect,
    ServeRelay,
    command,
    expect_told,
)
from tests.support.serving import eventually
from tests.support.witness import Ticker, Witness


async def test_subscribers_are_told_at_the_pace_that_is_set(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Setting ``rejoins_per_s``: all at once would be answered by all at once."""
    served = await serve_relay(redis_url=server.url, redis=FAST, rejoins_per_s=100)
    clients = [await connect(served) for _ in range(3)]
    joined = [[(f"room:{n}", await client.join(f"room:{n}")) for n in range(20)] for client in clients]
    loop = asyncio.get_running_loop()
    await command(server.url, "CLIENT", "KILL", "TYPE", "pubsub")
    await eventually(lambda: served.relay.metrics.gaps == 1, "the gap")
    started = loop.time()
    for client, subscriptions in zip(clients, joined, strict=True):
        await expect_told(client, *subscriptions)
    assert loop.time() - started > 0.4, "60 subscriptions at 100 a second take some 0.6 s"
    assert served.relay.metrics.rejoins_requested == 60


async def test_client_that_rejoins_by_itself_is_not_asked_again(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Asked are the subscriptions that the gap found, and no newer ones; here one each 50 ms."""
    served = await serve_relay(redis_url=server.url, redis=FAST, rejoins_per_s=20)
    client = await connect(served)
    before = [(f"room:{n}", await client.join(f"room:{n}")) for n in range(10)]
    old = await client.join("room:again")
    after = ("room:last", await client.join("room:last"))
    await command(server.url, "CLIENT", "KILL", "TYPE", "pubsub")
    await expect_told(client, before[0])
    await client.send("900", "901", "room:again", "phx_join", {})
    heard = [await client.receive() for _ in range(12)]
    assert client.reply("900", "901", "room:again") in heard
    assert client.message(old, old, "room:again", "phx_close", {}) in heard
    assert [message[2] for message in heard if message[3] == "phx_error"] == [
        *(topic for topic, _ in before[1:]),
        after[0],
    ]
    assert await client.push("900", "room:again", "shout") == OK


async def test_nothing_from_behind_the_hole_comes_before_the_word(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait for their paced ``phx_error`` get no events meanwhile; a second gap comes in the middle of it.

    Each witness is held to it: where numbers are missing, it has been told at that very place.
    """
    topics = [{"match": "map:*", "on_gap": "ignore"}]
    served = await serve_relay(redis_url=server.url, redis=FAST, rejoins_per_s=20, topics=topics)
    metrics = served.relay.metrics
    monkeypatch.setattr("relay.channels.rejoins._PAUSE_S", 0.25)  # the turns come slower than gaps

    def has_gaps(count: int) -> bool:
        return metrics.gaps == count

    async with AsyncExitStack() as stack:
        ticker = await stack.enter_async_context(Ticker.run(server.url, "room:1"))
        other = await stack.enter_async_context(Ticker.run(server.url, "map:1"))
        clients = [await connect(served) for _ in range(12)]
        witnesses = [await stack.enter_async_context(Witness.run(client, "room:1")) for client in clients]
        unasked = await stack.enter_async_context(Witness.run(await connect(served), "map:1"))
        for witness in witnesses:
            await witness.progress(5)
        for count in (1, 2):
            assert await command(server.url, "CLIENT", "KILL", "TYPE", "pubsub") == 1
            await eventually(partial(has_gaps, count), "the gap")
            await unasked.progress(5)
        assert any(not witness.told for witness in witnesses), "some still wait for their turn"
        late = await stack.enter_async_context(Witness.run(await connect(served), "room:1"))
        await late.progress(5)  # who joins while others wait gets events
        for witness in witnesses:
            await witness.until(lambda witness=witness: witness.told and witness.joins > len(witness.told))
            await witness.progress(5)
        for witness in (*witnesses, late):
            witness.check(ticker)
        assert not unasked.told
        assert unasked.numbers == sorted(set(unasked.numbers))
        assert other.taken
    assert metrics.dropped["events may have been missed"] > 0
    assert set(metrics.dropped) == {"events may have been missed"}


async def test_events_read_together_with_the_confirmation_come_after_the_word(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    """A stand-in for Redis: 1 to 3, a break in which 4 and 5 are lost, then the confirmation and 6 in one write."""

    def event(number: int) -> bytes:
        return b"*4\r\n$8\r\npmessage\r\n$4\r\nto:*\r\n$14\r\nto:room:1:tick\r\n$1\r\n%d\r\n" % number

    subscriptions: list[asyncio.StreamWriter] = []
    joined = asyncio.Event()

    async def stand_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser = hiredis.Reader()
        while data := await reader.read(65536):
            parser.feed(data)
            answer = b""
            while (words := parser.gets()) is not False:
                if words[0] == b"PSUBSCRIBE":
                    for pattern in words[1:]:
                        answer += b"*3\r\n$10\r\npsubscribe\r\n$%d\r\n%s\r\n:1\r\n" % (len(pattern), pattern)
                elif words[0] == b"ROLE":
                    answer += b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"
                elif words[0] == b"PUBLISH":
                    answer += b":1\r\n"
                else:
                    answer += b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"
            if b"to:*" in data:
                subscriptions.append(writer)
                if len(subscriptions) > 1:
                    answer += event(6)
            writer.write(answer)
            if b"to:*" in data and len(subscriptions) == 1:
                await joined.wait()
                writer.write(event(1) + event(2) + event(3))
                await writer.drain()
                writer.close()
                return
        writer.close()

    async with await asyncio.start_server(stand_in, "127.0.0.1", 0) as stands:
        url = f"redis://127.0.0.1:{stands.sockets[0].getsockname()[1]}"
        served = await serve_relay(redis_url=url, redis=FAST, rejoins_per_s=20)
        clients = [await connect(served) for _ in range(3)]
        refs = [await client.join("room:1") for client in clients]
        joined.set()
        for client, ref in zip(clients, refs, strict=True):
            for number in (1, 2, 3):
                await client.expect_event("room:1", "tick", number)
            await expect_told(client, ("room:1", ref))
        await served.relay.stop()
