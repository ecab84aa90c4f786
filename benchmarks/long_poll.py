"""What long polling costs: memory and CPU of clients that wait, and of each event.

Owns its clients, which poll over connections that are kept open, as browsers do; must not know how a result is shown.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from urllib.parse import quote

from benchmarks import servers
from benchmarks.dialects import EVENT, payload, payload_bytes
from benchmarks.load import LoadError, percentile, publish_command
from benchmarks.scenarios import DIRECT, Bench, Row, describe
from benchmarks.servers import Server

CLIENTS = 1000
RATE = 1
"""Events a second. Each makes a request of every client."""

IDLE_S = 20.0
"""Two windows of 10 s: each client polls twice."""

_TOPIC = "polled:1"
_SETTLE_S = 1.0
_EVENTS = 10
_DEADLINE_S = 60.0


@dataclass
class _Clients:
    """All clients, and what they have received."""

    port: int
    polls: int = 0
    latencies: list[float] = field(default_factory=list)
    """In seconds, from the publication of an event to its response."""
    numbers: list[list[int]] = field(default_factory=list)
    """Of the events of each client."""


class _Client:
    """One session, over one connection."""

    def __init__(self, clients: _Clients, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients = clients
        self._reader = reader
        self._writer = writer
        self._query = "vsn=2.0.0"
        self.numbers: list[int] = []
        clients.numbers.append(self.numbers)

    async def _ask(self, method: str, body: str = "") -> dict[str, object]:
        self._writer.write(
            f"{method} /socket/longpoll?{self._query} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        found: dict[str, object] = json.loads(await self._reader.readexactly(length))
        return found

    async def join(self) -> None:
        opened = await self._ask("GET")
        self._query += f"&token={quote(str(opened['token']))}"
        joined = await self._ask("POST", json.dumps(["1", "1", _TOPIC, "phx_join", {}]))
        replied = await self._ask("GET")
        if joined["status"] != 200 or replied["status"] != 200:
            raise LoadError(f"a client could not join: {joined}, {replied}")

    def close(self) -> None:
        """Cut the connection."""
        self._writer.transport.abort()

    async def poll(self) -> None:
        while True:
            answer = await self._ask("GET")
            self._clients.polls += 1
            if answer["status"] not in (200, 204):
                raise LoadError(f"a poll was answered {answer}")
            now, messages = time.time_ns(), answer["messages"]
            assert isinstance(messages, list)
            for message in messages:
                event = json.loads(message)[4]
                self.numbers.append(int(event["n"]))
                self._clients.latencies.append((now - int(event["t"])) / 1e9)


def long_poll(bench: Bench) -> list[Row]:
    """Clients that wait, then the same with events."""
    with bench.start(servers.relay) as (server, _):
        return asyncio.run(_measure(bench, server))


async def _measure(bench: Bench, server: Server) -> list[Row]:
    clients = _Clients(server.address[1])
    before_kb = server.rss_kb()
    joined: list[_Client] = []
    tasks: list[asyncio.Task[None]] = []
    try:
        for _ in range(CLIENTS):
            reader, writer = await asyncio.open_connection("127.0.0.1", clients.port)
            joined.append(_Client(clients, reader, writer))
            await joined[-1].join()
            tasks.append(asyncio.create_task(joined[-1].poll()))
        await asyncio.sleep(_SETTLE_S)
        rows = [await _idle(server, clients, before_kb), await _events(bench, server, clients)]
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        _ = await asyncio.gather(*tasks, return_exceptions=True)
        for client in joined:
            client.close()
    for each in rows:
        bench.say(describe(each))
    return rows


async def _idle(server: Server, clients: _Clients, before_kb: float) -> Row:
    used, polls, began = server.cpu_s(), clients.polls, time.perf_counter()
    await asyncio.sleep(IDLE_S)
    used, polls, wall = server.cpu_s() - used, clients.polls - polls, time.perf_counter() - began
    return Row(
        f"long polling, {CLIENTS} clients that wait",
        DIRECT,
        cpu_us=1e6 * used / polls,
        unit="poll",
        memory_kb=(server.rss_kb() - before_kb) / CLIENTS,
        server_busy=used / wall,
        per_s=polls / wall,
        note="memory with the client's connection, of which one poll is under way",
    )


async def _events(bench: Bench, server: Server, clients: _Clients) -> Row:
    size = payload_bytes(_TOPIC)
    events = _EVENTS
    used, own, began = server.cpu_s(), time.process_time(), time.perf_counter()
    channel = f"to:{_TOPIC}:{EVENT}".encode()
    for number in range(events):
        bench.publisher.send(publish_command(channel, payload(number, time.time_ns(), size)))
        await asyncio.sleep(max(0.0, began + (number + 1) / RATE - time.perf_counter()))
    end = time.monotonic() + _DEADLINE_S
    while any(len(numbers) < events for numbers in clients.numbers):
        if time.monotonic() > end:
            count = sum(map(len, clients.numbers))
            raise LoadError(f"{count} of {events * CLIENTS} deliveries have come within {_DEADLINE_S:g} s")
        await asyncio.sleep(0.05)
    used, own, wall = server.cpu_s() - used, time.process_time() - own, time.perf_counter() - began
    if any(numbers != list(range(events)) for numbers in clients.numbers):
        raise LoadError("a client did not receive every event once and in order")
    return Row(
        f"long polling, {CLIENTS} clients, {RATE}/s",
        DIRECT,
        cpu_us=1e6 * used / (events * CLIENTS),
        p50_ms=1000 * (percentile(clients.latencies, 0.5) or 0),
        p99_ms=1000 * (percentile(clients.latencies, 0.99) or 0),
        server_busy=used / wall,
        load_busy=own / wall,
        per_s=events * CLIENTS / wall,
    )
