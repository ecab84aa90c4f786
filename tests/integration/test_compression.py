"""Shared compression: a frame is deflated once for all sockets that negotiated it, and the others get it plain.

Source: RFC 7692 (permessage-deflate).
"""

import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import websockets
from redis.asyncio import Redis

from relay import Relay
from tests.support.client import Client, RawSocket, client_frame
from tests.support.node import need_browser, need_node, run_checks
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, serve

OFFER = "permessage-deflate; client_max_window_bits"
TELEMETRY = {"aircraft": [{"icao24": f"{n:06x}", "lat": 48.5, "lon": 11.25} for n in range(12)]}
MESSAGE = [None, None, "t", "e", TELEMETRY]


@asynccontextmanager
async def compressing(valkey: Valkey) -> AsyncIterator[Served]:
    relay = Relay(redis_url=valkey.url, system_topic=False, compression=True)
    async with serve(relay, ws_per_message_deflate=True) as served:
        yield served


async def join(raw: RawSocket) -> None:
    await raw.send_frame(1, b'["1","1","t","phx_join",{}]')
    assert (await raw.read_message())[3] == "phx_reply", "a reply is for one socket alone, and goes plain"


def inflate(payload: bytes, window_bits: int = 15) -> bytes:
    return zlib.decompressobj(wbits=-window_bits).decompress(payload + b"\x00\x00\xff\xff")


async def test_event_is_deflated_for_those_that_negotiated_it_alone(valkey: Valkey) -> None:
    async with (
        compressing(valkey) as served,
        RawSocket.connect(served.ws, extensions=OFFER) as offering,
        RawSocket.connect(served.ws) as plain,
        RawSocket.connect(served.ws, extensions="permessage-deflate; server_max_window_bits=12") as enough,
        RawSocket.connect(served.ws, extensions="permessage-deflate; server_max_window_bits=11") as small,
    ):
        assert "server_no_context_takeover" in offering.head, "no frame may lean on the one before it"
        assert "client_no_context_takeover" in offering.head, "a context for each client is memory here"
        assert "Sec-WebSocket-Extensions" not in plain.head
        for raw in (offering, plain, enough, small):
            await join(raw)
        for _ in range(2):  # the second frame must not need the first
            await served.relay.broadcast("t", "e", TELEMETRY)
        for raw, compressed in ((offering, True), (plain, False), (enough, True), (small, False)):
            for _ in range(2):
                first, payload = await raw.read_frame_as_it_is()
                assert first == (0xC1 if compressed else 0x81)
                message = inflate(payload, 12) if compressed else payload
                assert json.loads(message) == MESSAGE
                if compressed:
                    assert len(payload) < len(message) / 2


async def test_client_may_compress_its_pushes(valkey: Valkey) -> None:
    async with compressing(valkey) as served, RawSocket.connect(served.ws, extensions=OFFER) as raw:
        await join(raw)
        deflate = zlib.compressobj(wbits=-15)
        push = json.dumps(["1", "2", "t", "shout", TELEMETRY]).encode()
        data = (deflate.compress(push) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]
        await raw.send_bytes(client_frame(1, data, first_byte=0xC1))
        assert (await raw.read_message())[4] == {"status": "ok", "response": {}}


async def test_inflated_size_counts_for_the_limit(valkey: Valkey) -> None:
    """A small frame may inflate to a large message: it is closed with 1009, and was never held whole."""
    relay = Relay(redis_url=valkey.url, compression=True)
    async with (
        serve(relay, ws_per_message_deflate=True, ws_max_size=100_000) as served,
        RawSocket.connect(served.ws, extensions=OFFER) as raw,
    ):
        deflate = zlib.compressobj(wbits=-15)
        data = (deflate.compress(bytes(10_000_000)) + deflate.flush(zlib.Z_SYNC_FLUSH))[:-4]
        assert len(data) < 20_000
        await raw.send_bytes(client_frame(1, data, first_byte=0xC1))
        assert (await raw.read_close())[0] == 1009


async def test_a_client_library_sees_no_difference(valkey: Valkey) -> None:
    async with (
        compressing(valkey) as served,
        websockets.connect(f"{served.ws}/websocket?vsn=2.0.0", compression="deflate") as connection,
    ):
        client = Client(connection, "2.0.0")
        await client.join("t")
        for size in (0, 100, 1000, 70_000):
            await served.relay.broadcast("t", "e", {"text": "ab" * size})
            assert await client.receive() == [None, None, "t", "e", {"text": "ab" * size}]


async def test_slow_reader_gets_its_queue_compressed_and_in_order(valkey: Valkey) -> None:
    relay = Relay(redis_url=valkey.url, system_topic=False, compression=True)
    count, text = 600, "".join(chr(33 + n * n % 90) for n in range(3000))
    async with (
        serve(relay, ws_per_message_deflate=True, send_buffer=4096) as served,
        RawSocket.connect(served.ws, extensions=OFFER, receive_buffer=4096) as raw,
    ):
        await join(raw)
        for number in range(count):
            await relay.broadcast("t", "e", {"n": number, "text": text})
        got = []
        for _ in range(count):
            first, payload = await raw.read_frame_as_it_is()
            assert first == 0xC1
            got.append(json.loads(inflate(payload))[4]["n"])
        assert got == list(range(count))
        assert not relay.metrics.dropped


@pytest.mark.parametrize("compression", [False, True])
async def test_without_the_setting_nothing_is_compressed(valkey: Valkey, compression: bool) -> None:
    """Neither where the server offers it and the relay does not, nor the other way round."""
    relay = Relay(redis_url=valkey.url, system_topic=False, compression=compression)
    async with (
        serve(relay, ws_per_message_deflate=not compression) as served,
        RawSocket.connect(served.ws, extensions=OFFER) as raw,
    ):
        await join(raw)
        await relay.broadcast("t", "e", TELEMETRY)
        first, payload = await raw.read_frame_as_it_is()
        assert (first, json.loads(payload)) == (0x81, MESSAGE)


async def test_published_client_works_with_compression() -> None:
    """`relay serve` with the setting: phoenix in Node, and in Chromium, which offers compression by itself."""
    need_node()
    need_browser()
    with RelayProcess(environ={"RELAY_COMPRESSION": "true"}) as relay:
        async with RawSocket.connect(relay.ws, extensions=OFFER) as raw:
            assert "permessage-deflate" in raw.head
            await join(raw)
            async with Redis.from_url(relay.redis_url) as redis:
                await redis.publish("to:t:e", json.dumps(TELEMETRY))
            first, payload = await raw.read_frame_as_it_is()
            assert (first, json.loads(inflate(payload))) == (0xC1, MESSAGE)
        run_checks("phoenix-node.mjs", "phoenix-1.8", relay.ws, redis_url=relay.redis_url)
        run_checks("phoenix-chromium.mjs", relay.http, "phoenix-1.8", "-", redis_url=relay.redis_url)
