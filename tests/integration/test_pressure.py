"""A client that sends and never reads: what is owed to it is bounded too."""

import asyncio
import json
import socket
from itertools import count

import pytest

from relay import Relay
from relay.transports.websocket import WebSocketTransport
from tests.support.client import PING, PONG, TEXT, RawSocket, client_frame
from tests.support.process import Valkey
from tests.support.serving import eventually, serve

UPGRADE = (
    b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def masked(text: bytes) -> bytes:
    """A text frame from a client, with a mask of zeros (RFC 6455, section 5.3)."""
    assert len(text) < 126
    return bytes((0x81, 0x80 | len(text), 0, 0, 0, 0)) + text


async def test_client_that_sends_and_never_reads_is_closed(valkey: Valkey, direct: bool) -> None:
    limits = {"outbox_max_bytes": 100_000, "payload_max_bytes": 50_000, "close_timeout_s": 0.2, "pushes_per_s": 0}
    relay = Relay(redis_url=valkey.url, system_topic=False, limits=limits)
    heartbeats = masked(b'[null,"1","phoenix","heartbeat",{}]') * 1000
    async with serve(relay, direct=direct) as served:
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", served.port))
            await loop.sock_sendall(client, UPGRADE)

            async def flood() -> None:
                while relay.node.sockets or not relay.metrics.sockets_opened:
                    await loop.sock_sendall(client, heartbeats)

            flooding = asyncio.create_task(flood())
            await eventually(lambda: relay.metrics.sockets_opened, "the socket to open")
            await eventually(lambda: not relay.node.sockets, "the socket to be given up")
            flooding.cancel()
            _ = await asyncio.gather(flooding, return_exceptions=True)
        assert relay.metrics.refused["sends and does not read"] == 1


async def test_answers_to_pings_do_not_pile_up(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    """On servers other than ours this is the server's affair. So many pings would end the socket by themselves."""
    monkeypatch.setattr("relay.transports.uvicorn_websocket._IDLE_FRAMES_MAX", 100_000)
    relay = Relay(redis_url=valkey.url, system_topic=False)
    many = 40_000
    pings = client_frame(PING, b"x" * 125) * (many // 10)
    async with serve(relay, send_buffer=8192) as served:
        async with RawSocket.connect(served.ws, receive_buffer=4096) as client:
            (socket,) = relay.node.sockets.values()
            assert isinstance(socket.transport, WebSocketTransport)
            writer = socket.transport._writer
            assert writer is not None
            for _ in range(10):
                await client.send_bytes(pings)
            last = client_frame(TEXT, b'[null,"last","phoenix","heartbeat",{}]')
            await client.send_bytes(last)
            await eventually(lambda: socket.queued_bytes, "all pings to be read")
            transport = getattr(writer.write, "__self__")  # noqa: B009 - mypy knows no such attribute
            assert transport.get_write_buffer_size() < 500_000, "its bound, and the answers to what one read brings"
            # It is served as ever once it reads.
            while (frame := await client.read_frame())[0] == PONG:
                pass
            assert b'"last"' in frame[1]


@pytest.mark.parametrize("leaves", [True, False])
async def test_no_event_of_a_slow_reader_overtakes_the_reply_to_its_next_join(direct: bool, leaves: bool) -> None:
    topics = [{"match": "*", "overflow": "latest", "notify_dropped": True}]
    relay = Relay(broadcast_url="memory://", system_topic=False, topics=topics)
    async with serve(relay, direct=direct, send_buffer=8192) as served:
        async with RawSocket.connect(served.ws, receive_buffer=4096) as client:

            async def send(join_ref: str, event: str) -> None:
                await client.send_frame(TEXT, json.dumps([join_ref, join_ref, "t", event, {}]).encode())

            await send("1", "phx_join")
            assert (await client.read_message())[3] == "phx_reply"
            (socket,) = relay.node.sockets.values()
            fillers = count()
            while socket.queued_bytes < 1_000_000:  # more than the kernel takes meanwhile
                await relay.publish("t", f"filler-{next(fillers)}", "x" * 50_000)
            for number in (1, 2):
                await relay.publish("t", "state", number)
            if leaves:
                await send("1", "phx_leave")
            await send("3", "phx_join")
            await eventually(lambda: relay.metrics.joins == 2, "the second join")
            await relay.publish("t", "state", 3)
            got: list[list[object]] = []
            while not got or got[-1][3:] != ["state", 3]:
                message = await client.read_message()
                if not message[3].startswith("filler"):
                    got.append(message)
            replies = [["3", "3", "t", "phx_reply", {"status": "ok", "response": {}}], ["1", "1", "t", "phx_close", {}]]
            if leaves:
                replies = [["1", "1", "t", "phx_reply", {"status": "ok", "response": {}}], *replies[::-1]]
            notice = ["1", None, "t", "relay:dropped", {"dropped": 1}]
            assert got == [notice, [None, None, "t", "state", 2], *replies, [None, None, "t", "state", 3]]
