"""What waits for plugins' handlers, in bytes: bounded for each socket and for all, and counted where it is dropped."""

import asyncio
import json
import statistics
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from relay.plugins import Plugin
from relay.plugins.hooks import Event, Push
from relay.protocol.serializer import Message, Version, decode
from relay.transports.read_budget import TURN_BYTES
from tests.support.client import CLOSE, TEXT, Client, RawSocket, client_frame
from tests.support.serving import Served, eventually

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]

ROOT = Path(__file__).parents[2]
EMOJI = "\U0001f600"


class Slow:
    """A plugin whose handlers wait at a gate."""

    def __init__(self) -> None:
        self.plugin = Plugin("slow")
        self.gate = asyncio.Event()
        self.begun = 0
        self.plugin.on_push("room:*")(self._push)

    async def _push(self, push: Push) -> None:
        self.begun += 1
        push.stop()
        await self.gate.wait()


async def push_many(client: RawSocket, topic: str, pushes: int, size: int) -> None:
    """Join, and push so many payloads of ``size`` characters, one of them an emoji; no longer than they are read."""
    await client.send_frame(TEXT, json.dumps(["1", "0", topic, "phx_join", {}]).encode())
    assert (await client.read_message())[4]["status"] == "ok"
    for number in range(1, pushes + 1):
        text = json.dumps(["1", str(number), topic, "x", "x" * (size - 1) + EMOJI], ensure_ascii=False)
        await client.send_frame(TEXT, text.encode())


async def test_socket_is_read_no_further_while_its_bytes_are_under_way(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    slow = Slow()
    served = await serve_relay(extra_plugins=(slow.plugin,), limits={"in_flight_max_bytes": 100_000})
    metrics, other = served.relay.metrics, await connect(served)
    async with RawSocket.connect(served.ws) as client:
        pushing = asyncio.create_task(push_many(client, "room:1", 10, 40_000))
        await eventually(lambda: metrics.in_flight_bytes >= 100_000, "the bound to be reached")
        for _ in range(10):
            await other.expect_alive()
        assert metrics.in_flight_bytes < 150_000, "three pushes of 40 kB"
        slow.gate.set()
        await pushing
        replies = [(await client.read_message())[1] for _ in range(10)]
        assert replies == [str(number) for number in range(1, 11)]
    await eventually(lambda: metrics.in_flight_bytes == 0, "all to be handled")
    assert +metrics.refused == {}


async def test_message_over_the_bound_passes_where_nothing_else_waits(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    slow = Slow()
    slow.gate.set()
    limits = {"in_flight_max_bytes": 1000, "in_flight_total_max_bytes": 0}
    served = await serve_relay(extra_plugins=(slow.plugin,), limits=limits)
    client = await connect(served)
    join_ref = await client.join("room:1")
    for _ in range(3):
        assert (await client.push(join_ref, "room:1", "x", "x" * 500_000))["status"] == "ok"
    assert served.relay.metrics.in_flight_bytes == 0


async def test_socket_with_the_most_is_closed_when_too_much_is_under_way(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    """What waits of it is dropped and counted; what others sent is handled."""
    slow = Slow()
    served = await serve_relay(extra_plugins=(slow.plugin,), limits={"in_flight_total_max_bytes": 300_000})
    metrics = served.relay.metrics
    async with RawSocket.connect(served.ws) as small, RawSocket.connect(served.ws) as large:
        await push_many(small, "room:small", 2, 40_000)
        await eventually(lambda: metrics.in_flight_bytes > 80_000, "two pushes")
        await push_many(large, "room:large", 6, 40_000)
        assert await large.read_close() == (1013, "too much of this client waits for handlers, and of all clients")
        assert metrics.in_flight_bytes <= 300_000
        assert metrics.refused["in flight full"] == 5, "one runs, and goes on"
        slow.gate.set()
        assert [(await small.read_message())[1] for _ in range(2)] == ["1", "2"]
    await eventually(lambda: metrics.in_flight_bytes == 0, "the rest to be handled")
    assert slow.begun == 3


async def test_what_ended_sockets_left_behind_counts_and_is_dropped_past_the_bound(serve_relay: ServeRelay) -> None:
    slow = Slow()
    served = await serve_relay(extra_plugins=(slow.plugin,), limits={"in_flight_total_max_bytes": 500_000})
    metrics = served.relay.metrics
    for number in range(10):
        async with RawSocket.connect(served.ws) as client:
            await push_many(client, f"room:{number}", 4, 40_000)
            await client.send_frame(TEXT, b'[null,"all","phoenix","heartbeat",{}]')
            opcode, frame = await client.read_frame()  # all is read, or it was itself the one with the most
            assert opcode == CLOSE or b'"all"' in frame
            client.reset()
    await eventually(lambda: not served.relay.node.sockets, "all sockets to end")
    await eventually(lambda: slow.begun == 10, "one handler for each")
    assert 0 < metrics.in_flight_bytes <= 500_000
    assert metrics.refused["in flight full"] > 0
    slow.gate.set()
    await eventually(lambda: metrics.in_flight_bytes == 0, "the rest to be handled")
    assert slow.begun == metrics.pushes_in == 10
    assert metrics.refused["in flight full"] <= 30


async def test_events_that_wait_for_a_slow_handler_are_bounded_in_bytes(
    serve_relay: ServeRelay, connect: Connect, redis: Redis
) -> None:
    plugin, gate = Plugin("slow"), asyncio.Event()

    @plugin.on_event("room:*")
    async def handle(event: Event) -> Event:
        await gate.wait()
        return event

    served = await serve_relay(extra_plugins=(plugin,), limits={"in_flight_total_max_bytes": 1_600_000})
    client, metrics = await connect(served), served.relay.metrics
    await client.join("room:1")
    for number in range(30):
        await redis.publish("to:room:1:e", json.dumps([number, "x" * 10_000]))
    await eventually(lambda: metrics.events_in == 30, "all events")
    assert metrics.in_flight_bytes <= 1_600_000 // 16 + 20_000
    dropped = metrics.dropped["on_event handler too slow"]
    assert dropped == 30 - 1 - 100_000 // (10_000 + 500)
    gate.set()
    assert [(await client.receive())[4][0] for _ in range(30 - dropped)] == list(range(30 - dropped))
    assert metrics.in_flight_bytes == 0


async def test_large_pushes_count_by_their_bytes_not_by_their_characters(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    """40 000 emoji are 160 000 bytes: three portions of 64 KiB."""
    served = await serve_relay(limits={"pushes_per_s": 1, "pushes_burst": 4})
    client = await connect(served)
    join_ref = await client.join("room:1")
    for status in ("ok", "error"):
        ref = str(client.next_ref())
        text = json.dumps([join_ref, ref, "room:1", "x", EMOJI * 40_000], ensure_ascii=False)
        await client.send_raw(text)
        assert (await client.receive())[4]["status"] == status


@pytest.mark.parametrize("text", ["x" * 100_000 + EMOJI, EMOJI * 25_000, "é" * 50_000, "x" * 100_000])
@pytest.mark.parametrize("version", [Version.V1, Version.V2])
def test_payload_that_waits_takes_its_bytes_and_not_those_of_its_frame(text: str, version: Version) -> None:
    fields: Any = [None, "1", "t", "e", text]
    padding = " " * 100_000
    if version is Version.V1:
        fields = {"topic": "t", "event": "e", "payload": text, "ref": "1"}
    frame = json.dumps(fields, ensure_ascii=False)
    frame = frame[:-1] + padding + frame[-1]
    tracemalloc.start()
    try:
        # Each of a text of its own, which nothing else keeps.
        kept: list[Message] = [decode(frame[:1] + frame[1:], version) for _ in range(20)]
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken < 1.1 * len(kept) * len(text.encode())


@pytest.mark.parametrize("direct", [True], ids=["direct"])
@pytest.mark.parametrize("fragments", [1, 4])
async def test_turn_of_the_event_loop_reads_a_bounded_part_of_what_all_clients_sent(
    fragments: int, serve_relay: ServeRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past its budget a turn begins nothing large: it ends the read that it is at, with the message in it."""
    slow, size, count, read, turns = Slow(), 150_000, 24, Counter[str](), list[int]()
    parse, hand_over = WebSocketsSansIOProtocol.data_received, WebSocketsSansIOProtocol.send_receive_event_to_app

    def count_bytes(protocol: WebSocketsSansIOProtocol, data: bytes) -> None:
        read["turn"] += len(data)
        parse(protocol, data)

    def count_message(protocol: WebSocketsSansIOProtocol) -> None:
        read["turn"] += sum(map(len, protocol.frames))
        hand_over(protocol)

    def tick() -> None:
        turns.append(read.pop("turn", 0))
        if metrics.pushes_in < count:
            loop.call_soon(tick)

    monkeypatch.setattr(WebSocketsSansIOProtocol, "data_received", count_bytes)
    monkeypatch.setattr(WebSocketsSansIOProtocol, "send_receive_event_to_app", count_message)
    slow.gate.set()
    served = await serve_relay(extra_plugins=(slow.plugin,))
    loop, metrics = asyncio.get_running_loop(), served.relay.metrics
    async with AsyncExitStack() as stack:
        bystander = await stack.enter_async_context(RawSocket.connect(served.ws))
        clients = [
            await stack.enter_async_context(RawSocket.connect(served.ws, send_buffer=200_000)) for _ in range(count)
        ]
        for client in clients:
            await push_many(client, "room:1", 0, 0)
        text = json.dumps(["1", "2", "room:1", "x", "x" * size]).encode()
        step = -(-len(text) // fragments)
        for client in clients:
            for start in range(0, len(text), step):
                first_byte = TEXT * (start == 0) | 0x80 * (start + step >= len(text))
                client.send_now(client_frame(TEXT, text[start : start + step], first_byte=first_byte))
        bystander.send_now(client_frame(TEXT, b'[null,"h","phoenix","heartbeat",{}]'))
        loop.call_soon(tick)
        assert (await bystander.read_message())[1] == "h"
        assert metrics.pushes_in < count // 2, "a small message waits for no turn"
        for client in clients:
            assert (await client.read_message())[4]["status"] == "ok"
    assert sum(turns) >= 2 * count * size
    assert max(turns) <= TURN_BYTES + 2 * (size + 1000)


async def test_bystander_is_answered_while_others_fill_the_bound(serve_relay: ServeRelay, connect: Connect) -> None:
    """Measured in the loop's own time, so that a busy machine does not count: 100 ms for its 99th percentile."""
    slow = Slow()
    served = await serve_relay(extra_plugins=(slow.plugin,), limits={"in_flight_total_max_bytes": 8_000_000})
    bystander, metrics, turns = await connect(served), served.relay.metrics, list[float]()
    command = (sys.executable, "-m", "tests.support.flooder", served.ws, "4", "480000")
    flooder = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
    try:
        await eventually(lambda: metrics.refused["in flight full"] > 0, "the bound to be passed")
        for _ in range(300):
            began = time.thread_time()
            await bystander.expect_alive()
            turns.append(time.thread_time() - began)
            assert metrics.in_flight_bytes <= 8_000_000
            await asyncio.sleep(0.002)
    finally:
        flooder.kill()
        _ = await flooder.wait()
    slow.gate.set()
    assert statistics.quantiles(turns, n=100)[98] < 0.1
