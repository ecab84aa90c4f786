"""Both forms of the fan-out, in C and in Python: the same events in the same order give every client the same bytes.

Two relays on one Valkey get the same schedule: events of all sizes on several topics, clients that come and go, some
that answer nothing and read nothing until the end, so that every way from the kernel's buffer to the outbox is taken.
"""

import asyncio
import json
import random
import re
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from relay.transports import plain_sockets
from tests.support.client import TEXT, client_frame
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import eventually, http_get, metric

pytestmark = pytest.mark.skipif(plain_sockets.send_to_each is None, reason="relay/transports/speedups.c is not built")

TOPICS = ("a", "b", "c")
_UPGRADE = (
    b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
_REPLY = b'"h","phoenix","phx_reply",{"status":"ok","response":{}}]'
_LIMITS = {
    "RELAY_LIMITS__OUTBOX_MAX_BYTES": str(64 << 20),
    "RELAY_LIMITS__OUTBOX_TOTAL_MAX_BYTES": str(1 << 30),
    "RELAY_LIMITS__SOCKETS_PER_ADDRESS": "0",
    "RELAY_LIMITS__IDLE_TIMEOUT_S": "3600",
}


@pytest.fixture(scope="module")
def relays(valkey: Valkey) -> Iterator[tuple[RelayProcess, RelayProcess]]:
    """One that writes in C, and one that does not."""
    with (
        RelayProcess("--redis-url", valkey.url, environ=_LIMITS) as in_c,
        RelayProcess("--redis-url", valkey.url, environ={**_LIMITS, "RELAY_SPEEDUPS": "0"}) as in_python,
    ):
        yield in_c, in_python


class Reader:
    """A client that keeps every byte it is sent after the handshake."""

    def __init__(self, connection: socket.socket, topics: tuple[str, ...]) -> None:
        self._connection = connection
        self.topics = topics
        self.data = bytearray()
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def join(cls, relay: RelayProcess, topics: tuple[str, ...], receive_buffer: int | None) -> "Reader":
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            # Segments as on a network: with loopback's, 64 kB, the kernel would buffer megabytes for this socket.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        connection.setblocking(False)
        loop, port = asyncio.get_running_loop(), urlsplit(relay.http).port
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, _UPGRADE)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await loop.sock_recv(connection, 1)
        reader = cls(connection, topics)
        reader.resume()
        for topic in topics:
            await reader.send(["1", "1", topic, "phx_join", {}])
        await eventually(lambda: reader.data.count(b'"phx_reply"') == len(topics), "the replies to the joins")
        return reader

    async def send(self, message: list[object]) -> None:
        frame = client_frame(TEXT, json.dumps(message).encode())
        await asyncio.get_running_loop().sock_sendall(self._connection, frame)

    def resume(self) -> None:
        self._reading = asyncio.create_task(self._read())

    async def pause(self) -> None:
        assert self._reading is not None
        self._reading.cancel()
        await asyncio.wait((self._reading,))
        self._reading = None

    async def _read(self) -> None:
        while data := await asyncio.get_running_loop().sock_recv(self._connection, 1 << 20):
            self.data += data

    @property
    def is_reading(self) -> bool:
        return self._reading is not None

    async def close(self, by_reset: bool = False) -> None:
        if self._reading is not None:
            await self.pause()
        if by_reset:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with suppress(OSError):
            self._connection.close()


class Schedule:
    """What happens, on both relays alike; all decided by a seed."""

    def __init__(self, relays: tuple[RelayProcess, RelayProcess], redis: Redis, seed: int) -> None:
        self._relays = relays
        self._redis = redis
        self.random = random.Random(seed)
        self.pairs: list[tuple[Reader, Reader]] = []
        self.ended: list[tuple[Reader, Reader]] = []
        self._marks = dict.fromkeys(TOPICS, 0)
        self._number = 0

    async def come(self, receive_buffer: int | None = None) -> None:
        await self.settle()
        topics = tuple(sorted(self.random.sample(TOPICS, self.random.randint(1, 3))))
        first, second = [await Reader.join(relay, topics, receive_buffer) for relay in self._relays]
        self.pairs.append((first, second))

    async def publish(self) -> None:
        topic = self.random.choice(TOPICS)
        commands = self._redis.pipeline(transaction=False)
        for _ in range(self.random.choice((1, 1, 2, 20))):
            size = self.random.choice((0, 10, 200, 3000, 20_000, 60_000))
            self._number += 1
            _ = commands.publish(f"to:{topic}:new_msg", json.dumps({"n": self._number, "x": "y" * size}))
        await commands.execute()

    async def flood(self) -> None:
        """More than the kernel holds for a client that reads nothing."""
        commands = self._redis.pipeline(transaction=False)
        for _ in range(60):
            _ = commands.publish(f"to:{self.pairs[0][0].topics[0]}:flood", json.dumps("z" * 60_000))
        await commands.execute()
        await self.settle()

    async def stall(self, which: int | None = None) -> None:
        """From now on a client reads nothing."""
        for reader in self.pairs[self.random.randrange(len(self.pairs)) if which is None else which]:
            if reader.is_reading:
                await reader.pause()

    async def beat(self) -> None:
        """A reply between the events, where it cannot come at another place on the other relay."""
        await self.settle()
        for reader in self.random.choice(self.pairs):
            if reader.is_reading:
                await reader.send([None, "h", "phoenix", "heartbeat", {}])
                await eventually(partial(reader.data.endswith, _REPLY), "the reply")

    async def go(self) -> None:
        """A client goes; what it was sent until then is known."""
        await self.settle()
        pair = self.pairs.pop(self.random.randrange(1, len(self.pairs)))
        if pair[0].is_reading:
            self.ended.append(pair)
        by_reset = self.random.random() < 0.5
        for reader in pair:
            await reader.close(by_reset)

    async def settle(self) -> None:
        """Wait until all that read have been sent everything."""
        for topic in TOPICS:
            self._marks[topic] += 1
            await self._redis.publish(f"to:{topic}:mark", f'"mark {topic} {self._marks[topic]} {id(self)}"')
        for pair in self.pairs:
            for reader in pair:
                if reader.is_reading:
                    await self._wait_for_marks(reader)

    async def _wait_for_marks(self, reader: Reader) -> None:
        ends = [f'"mark {topic} {self._marks[topic]} {id(self)}"'.encode() for topic in reader.topics]
        await eventually(lambda: all(end in reader.data[-2000:] for end in ends), "all events")

    async def end(self) -> None:
        """Let all read to the end."""
        for pair in self.pairs:
            for reader in pair:
                if not reader.is_reading:
                    reader.resume()
        await self.settle()


@asynccontextmanager
async def scheduled(relays: tuple[RelayProcess, RelayProcess], redis: Redis, seed: int) -> AsyncIterator[Schedule]:
    schedule = Schedule(relays, redis, seed)
    try:
        yield schedule
    finally:
        for pair in (*schedule.pairs, *schedule.ended):
            for reader in pair:
                await reader.close()


async def test_relays_say_which_form_they_use(relays: tuple[RelayProcess, RelayProcess]) -> None:
    forms = [json.loads((await http_get(f"{relay.http}/health"))[1])["fan_out"] for relay in relays]
    assert forms == ["c", "python"]


@pytest.mark.parametrize("seed", range(2))
async def test_both_forms_send_the_same_bytes(
    relays: tuple[RelayProcess, RelayProcess], redis: Redis, seed: int
) -> None:
    async with scheduled(relays, redis, seed) as schedule:
        await schedule.come(receive_buffer=32_768)
        await schedule.stall(0)
        for _ in range(11):
            await schedule.come(schedule.random.choice((None, 32_768)))
        steps = [schedule.publish] * 12 + [schedule.come, schedule.go, schedule.stall, schedule.beat]
        for _ in range(80):
            await schedule.random.choice(steps)()
        await schedule.flood()
        for relay in relays:
            assert metric((await http_get(f"{relay.http}/metrics"))[1], "relay_outbox_bytes") > 0, "there was pressure"
        await schedule.end()
        for first, second in (*schedule.pairs, *schedule.ended):
            assert first.data == second.data
        numbers = [int(number) for number in re.findall(rb'{"n": (\d+)', schedule.pairs[0][0].data)]
        assert numbers == sorted(set(numbers)) and len(numbers) > 50
