"""Many events to many sockets: once each and in order, with Redis cut in the middle, and past readers that are slow.

Source: design.md, *Fan-out*: an outbox bounded in bytes, and its topic's overflow policy.
"""

import asyncio
import json
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.support.client import TEXT, Client, RawSocket
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually, http_get, metric

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]

SWARM_DEADLINE_S = 100 * PATIENCE


class Swarm:
    """The process of counting sockets."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def line(self) -> str:
        assert self._process.stdout is not None
        async with asyncio.timeout(SWARM_DEADLINE_S):
            return (await self._process.stdout.readline()).decode().strip()

    async def result(self) -> list[dict[str, Any]]:
        """What each socket got; after the event ``end``."""
        found = json.loads(await self.line())
        assert isinstance(found, list)
        return found


@asynccontextmanager
async def swarm(ws: str, topic: str, count: int) -> AsyncIterator[Swarm]:
    """Sockets that have joined ``topic``."""
    command = (sys.executable, "-m", "tests.support.swarm", ws, topic, str(count))
    process = await asyncio.create_subprocess_exec(
        *command, stdout=PIPE, limit=64 * 1024 * 1024, cwd=Path(__file__).parents[2]
    )
    try:
        found = Swarm(process)
        assert await found.line() == "joined"
        yield found
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def publish_ticks(redis: Redis, topic: str, numbers: range) -> None:
    """Publish ``tick`` with each of these numbers, a hundred at a time."""
    for start in range(0, len(numbers), 100):
        pipeline = redis.pipeline(transaction=False)
        for number in numbers[start : start + 100]:
            _ = pipeline.publish(f"to:{topic}:tick", number)
        await pipeline.execute()


async def test_ten_thousand_events_reach_two_hundred_sockets_once_and_in_order() -> None:
    """`relay serve` as it is, with its own Valkey."""
    # These sockets send no heartbeats.
    with RelayProcess(environ={"RELAY_LIMITS__IDLE_TIMEOUT_S": "600"}) as relay:
        async with swarm(relay.ws, "room:flood", 200) as sockets, Redis.from_url(relay.redis_url) as redis:
            await publish_ticks(redis, "room:flood", range(10_000))
            await redis.publish("to:room:flood:end", "{}")
            result = await sockets.result()
        assert result == [{"runs": [[0, 9_999]], "told": 0}] * 200
        _, metrics = await http_get(f"{relay.http}/metrics")
        assert metric(metrics, "relay_deliveries_total") == 200 * 10_001
        assert not re.search(r"^relay_dropped_total\{.*\} [^0]", metrics, re.MULTILINE)


async def test_events_reach_many_sockets_on_both_paths(served: Served, redis: Redis) -> None:
    async with swarm(served.ws, "room:many", 25) as sockets:
        await publish_ticks(redis, "room:many", range(2_000))
        await redis.publish("to:room:many:end", "{}")
        result = await sockets.result()
    assert result == [{"runs": [[0, 1_999]], "told": 0}] * 25
    assert not served.relay.metrics.dropped


async def test_redis_killed_and_restarted_under_ten_thousand_events() -> None:
    """The relay heals by itself, says so in the log and in ``/ready``, and every client is told, once."""
    topic = "room:cut"
    environ = {"RELAY_LIMITS__IDLE_TIMEOUT_S": "600"}
    with Valkey() as valkey, RelayProcess("--redis-url", valkey.url, environ=environ) as relay:
        async with swarm(relay.ws, topic, 200) as sockets:
            lost = 0
            async with Redis.from_url(valkey.url) as redis:
                for start in range(0, 5_000, 100):
                    if start == 2_500:
                        valkey.kill()
                    try:
                        await publish_ticks(redis, topic, range(start, start + 100))
                    except (RedisConnectionError, OSError):
                        lost += 100
            assert lost == 2_500, "everything after the kill failed"
            async with asyncio.timeout(20 * PATIENCE):
                while (answer := await http_get(f"{relay.http}/ready"))[0] != 503:  # noqa: ASYNC110 - another process's state
                    await asyncio.sleep(0.01)
            assert "no subscription to" in json.loads(answer[1])["reason"]
            valkey.start()
            assert await sockets.line() == "rejoined"
            assert (await http_get(f"{relay.http}/ready"))[0] == 200
            async with Redis.from_url(valkey.url) as redis:
                await publish_ticks(redis, topic, range(5_000, 10_000))
                await redis.publish(f"to:{topic}:end", "{}")
            result = await sockets.result()
        _, metrics = await http_get(f"{relay.http}/metrics")
        log = relay.output
    for socket in result:
        assert socket["told"] == 1
        # Numbers rise without a break up to the kill, then from the rejoin to the end: in order, nothing twice.
        *before, after = socket["runs"]
        assert after == [5_000, 9_999]
        assert before in ([], [[0, before[0][1]]] if before else [])
        assert not before or before[0][1] < 2_500
    assert metric(metrics, "relay_gaps_total") == 1
    assert metric(metrics, "relay_rejoins_requested_total") == 200
    assert log.count("gap: events of the last") == 1
    assert log.count("is down") == 1
    assert "Traceback" not in log


# Readers that are slow. Kernel buffers are made small, so that pressure comes early.

SIZE = 5_000
COUNT = 300
OUTBOX = 100_000


@pytest.fixture
def serve_slow(serve_relay: ServeRelay) -> ServeRelay:
    """A relay whose sockets are soon under pressure, with a policy for topic ``flood``."""

    async def serve_slow(overflow: str, topic: dict[str, Any] | None = None, **limits: Any) -> Served:
        return await serve_relay(
            server={"send_buffer": 8192},
            limits={"outbox_max_bytes": OUTBOX, "payload_max_bytes": OUTBOX // 2, "close_timeout_s": 5.0 * PATIENCE}
            | limits,
            topics=[{"match": "flood", "overflow": overflow, **(topic or {})}],
        )

    return serve_slow


@asynccontextmanager
async def slow_reader(served: Served) -> AsyncIterator[RawSocket]:
    """A socket that has joined ``flood`` and reads only what it is told to."""
    async with RawSocket.connect(served.ws, receive_buffer=4096) as slow:
        await slow.send_frame(TEXT, b'["1","1","flood","phx_join",{}]')
        assert (await slow.read_message())[3] == "phx_reply"
        yield slow


async def flood(redis: Redis, fast: Client, events: tuple[str, ...] = ("tick",)) -> None:
    """Publish many events, a few at a time, and see all of them reach the socket that reads."""
    few = len(events) if len(events) > 1 else 10  # of several names one each: `latest` keeps no more, in any burst
    for start in range(0, COUNT, few):
        numbers = range(start, start + few)
        pipeline = redis.pipeline(transaction=False)
        for number in numbers:
            _ = pipeline.publish(f"to:flood:{events[number % len(events)]}", json.dumps([number, "x" * SIZE]))
        await pipeline.execute()
        for number in numbers:
            message = await fast.receive()
            assert message[3:] == [events[number % len(events)], [number, "x" * SIZE]]


async def read_until_heartbeat(slow: RawSocket) -> list[tuple[str, int]]:
    """Everything queued: event and number of each, up to the answer to a heartbeat."""
    await slow.send_frame(TEXT, b'[null,"now","phoenix","heartbeat",{}]')
    received = []
    while (message := await slow.read_message())[1] != "now":
        received.append((message[3], message[4][0]))
    return received


async def counts(served: Served, *reasons: str) -> list[float]:
    """How many events were dropped, by reason, and policy where there is one."""
    _, metrics = await http_get(f"{served.http}/metrics")
    labels = [dict(zip(("reason", "overflow"), reason.split(), strict=False)) for reason in reasons]
    return [metric(metrics, "relay_dropped_total", **given) for given in labels]


async def test_drop_oldest_keeps_the_newest_events(serve_slow: ServeRelay, redis: Redis, connect: Connect) -> None:
    """Dropped and received make up what was sent, to the last event; others are not delayed."""
    served = await serve_slow("drop-oldest")
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served) as slow:
        await flood(redis, fast)
        assert served.relay.metrics.deliveries == 2 * COUNT
        numbers = [number for _, number in await read_until_heartbeat(slow)]
        assert numbers == sorted(set(numbers))
        assert numbers[0] == 0, "what was on its way already is not taken back"
        assert numbers[-OUTBOX // (2 * SIZE) :] == list(range(COUNT - OUTBOX // (2 * SIZE), COUNT))
        dropped = COUNT - len(numbers)
        assert await counts(served, "slow_reader drop_oldest") == [dropped]
        # The outbox, one frame more in the transport, 64 KiB there, and the kernel's buffers of both sides.
        assert len(numbers) * SIZE < OUTBOX + SIZE + 65_536 + 65_536
        # Having caught up it is as good as any other.
        await redis.publish("to:flood:tick", "[1]")
        assert await slow.read_message() == [None, None, "flood", "tick", [1]]
        assert served.relay.metrics.dropped == {"slow reader, drop-oldest": dropped}


async def test_latest_keeps_one_event_of_each_name(serve_slow: ServeRelay, redis: Redis, connect: Connect) -> None:
    served = await serve_slow("latest")
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served) as slow:
        await flood(redis, fast, events=("a", "b", "c"))
        received = await read_until_heartbeat(slow)
        assert sorted(received[-3:]) == [("a", COUNT - 3), ("b", COUNT - 2), ("c", COUNT - 1)]
        # What had gone to the transport came in order, without a hole; then nothing but the newest.
        assert [number for _, number in received[:-3]] == list(range(len(received) - 3))
        dropped = COUNT - len(received)
        assert dropped > 0
        assert await counts(served, "slow_reader latest") == [dropped]
        assert served.relay.metrics.dropped.total() == dropped


async def test_latest_keeps_one_event_for_each_value_of_a_key(
    serve_slow: ServeRelay, redis: Redis, connect: Connect
) -> None:
    served = await serve_slow("latest", {"latest_key": "icao24"})
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served) as slow:
        for number in range(COUNT):
            event = {"icao24": "abc"[number % 3], "n": number, "more": "x" * SIZE}
            await redis.publish("to:flood:position", json.dumps(event))
            assert (await fast.receive())[4] == event
        await slow.send_frame(TEXT, b'[null,"now","phoenix","heartbeat",{}]')
        received = []
        while (message := await slow.read_message())[1] != "now":
            received.append((message[4]["icao24"], message[4]["n"]))
    assert sorted(received[-3:]) == [("a", COUNT - 3), ("b", COUNT - 2), ("c", COUNT - 1)]
    assert [number for _, number in received[:-3]] == list(range(len(received) - 3))
    assert await counts(served, "slow_reader latest") == [COUNT - len(received)]


async def test_slow_reader_is_told_what_it_missed(serve_slow: ServeRelay, redis: Redis, connect: Connect) -> None:
    """Right where it is missing: before the next event of the topic, under the subscription's ``join_ref``."""
    served = await serve_slow("drop-oldest", {"notify_dropped": True})
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served) as slow:
        await flood(redis, fast)
        (socket,) = (socket for socket in served.relay.node.sockets.values() if socket.queued_bytes)
        _, shown = await http_get(f"{served.http}/api/sockets/{socket.id}")
        await slow.send_frame(TEXT, b'[null,"now","phoenix","heartbeat",{}]')
        expected = missed = 0
        while (message := await slow.read_message())[1] != "now":
            if message[3] == "relay:dropped":
                assert message[:3] == ["1", None, "flood"]
                missed += message[4]["dropped"]
                expected += message[4]["dropped"]
            else:
                assert message[4][0] == expected, "events and what is told of them make up what was sent, in order"
                expected += 1
        assert expected == COUNT
        assert missed > 0
    assert json.loads(shown)["dropped"] == missed
    assert OUTBOX / 2 < json.loads(shown)["outbox_bytes"] <= OUTBOX
    _, metrics = await http_get(f"{served.http}/metrics")
    assert metric(metrics, "relay_dropped_topics_total", match="flood") == missed
    await fast.expect_alive()


async def test_slow_reader_is_told_what_it_missed_though_its_subscription_ends(
    serve_slow: ServeRelay, redis: Redis, connect: Connect
) -> None:
    """What waited still comes, after a hole: the note stands before it, and all of it before ``phx_close``."""
    served = await serve_slow("drop-oldest", {"notify_dropped": True})
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served) as slow:
        await flood(redis, fast)
        (socket,) = (socket for socket in served.relay.node.sockets.values() if socket.queued_bytes)
        assert socket.leave("flood")
        expected = 0
        while (message := await slow.read_message())[3] != "phx_close":
            if message[3] == "relay:dropped":
                assert message[:3] == ["1", None, "flood"]
                expected += message[4]["dropped"]
            else:
                assert message[4][0] == expected
                expected += 1
        assert expected == COUNT


async def test_largest_outbox_goes_first_when_all_hold_too_much(
    serve_slow: ServeRelay, redis: Redis, connect: Connect
) -> None:
    served = await serve_slow("drop-oldest", outbox_total_max_bytes=2 * OUTBOX - 20_000)
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served) as one, slow_reader(served) as other:
        await flood(redis, fast)
        assert served.relay.metrics.refused == {"outboxes full": 1}
        assert served.relay.metrics.outbox_bytes <= OUTBOX
        endings = []
        for slow in (one, other):
            await slow.send_frame(TEXT, b'[null,"now","phoenix","heartbeat",{}]')
            while (frame := await slow.read_frame())[0] == TEXT and b'"now"' not in frame[1]:
                pass
            endings.append(frame)
        (closed,) = (payload for opcode, payload in endings if opcode != TEXT)
        assert closed[:2] == (1013).to_bytes(2)
        assert b"too much waits" in closed
        (lost,) = await counts(served, "outboxes_full")
        assert lost > 0
    await eventually(lambda: served.relay.metrics.sockets == 1, "the slow sockets to end")
    assert served.relay.metrics.outbox_bytes == 0
    await fast.expect_alive()


async def test_disconnect_closes_the_slow_socket_alone(serve_slow: ServeRelay, redis: Redis, connect: Connect) -> None:
    served = await serve_slow("disconnect")
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served) as slow:
        await flood(redis, fast)
        numbers = []
        while (frame := await slow.read_frame())[0] == TEXT:
            numbers.append(json.loads(frame[1])[4][0])
        assert frame[1][:2] == (1013).to_bytes(2)
        assert b"reads too slowly" in frame[1]
        assert numbers == list(range(len(numbers)))
        lost = await counts(served, "slow_reader disconnect", "socket_closed")
        assert len(numbers) + sum(lost) == COUNT
        assert lost[0] >= OUTBOX // (SIZE + 100)
        await slow.send_frame(8, (1013).to_bytes(2))
        await eventually(lambda: served.relay.metrics.sockets == 1, "the slow socket to end")
    await fast.expect_alive()


async def test_slow_socket_that_never_reads_is_cut_off(serve_slow: ServeRelay, redis: Redis, connect: Connect) -> None:
    served = await serve_slow("disconnect", close_timeout_s=0.3)
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served):
        await flood(redis, fast)
        await eventually(lambda: served.relay.metrics.sockets == 1, "the slow socket to end")
        if any(socket.write_mode == "direct" for socket in served.relay.node.sockets.values()):
            assert served.relay.metrics.cut_off_bytes > 0, "what its transport still held"
    await fast.expect_alive()


async def test_replies_are_never_dropped(serve_slow: ServeRelay, redis: Redis, connect: Connect) -> None:
    served = await serve_slow("drop-oldest")
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served) as slow:
        await flood(redis, fast)
        for ref in range(200):
            await slow.send_frame(TEXT, json.dumps(["1", str(ref), "flood", "shout", {}]).encode())
        await eventually(lambda: served.relay.metrics.pushes_out == 200, "all pushes to be taken")
        refs: list[str] = []
        while len(refs) < 200:
            message = await slow.read_message()
            if message[3] == "phx_reply":
                refs.append(message[1])
        assert refs == [str(ref) for ref in range(200)]


async def test_events_that_a_vanished_socket_never_got_are_counted(
    serve_slow: ServeRelay, redis: Redis, connect: Connect
) -> None:
    served = await serve_slow("drop-oldest")
    fast = await connect(served)
    await fast.join("flood")
    async with slow_reader(served):
        await flood(redis, fast)
    await eventually(lambda: served.relay.metrics.sockets == 1, "the slow socket to end")
    dropped = await counts(served, "slow_reader drop_oldest", "socket_closed")
    assert dropped[0] > 0
    assert dropped[1] >= OUTBOX // (SIZE + 100) - 1
    await fast.expect_alive()
