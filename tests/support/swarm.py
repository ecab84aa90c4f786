"""Many sockets that count what they get: ``python -m tests.support.swarm URL TOPIC SOCKETS``, a process of its own.

It prints ``joined`` once all have joined, ``rejoined`` once all have been told of a gap and have joined again, and,
when each has got the event ``end``, one JSON line: for each socket the runs of numbers it got, ``[first, last]``
each, in their order, and how often it was told of a gap. Events are ``tick`` with a number for a payload.
"""

import asyncio
import json
import re
import sys
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

from tests.support.client import TEXT, client_frame

RETRY_S = 0.05

_FRAME = re.compile(rb'"tick",(\d+)\]|"phx_reply",\{"status":"(ok|error)"|"(phx_error)"|"(end)"')


class Counter(asyncio.Protocol):
    """One socket. It does as little as it can for an event, so that two processors suffice for two hundred."""

    def __init__(self, topic: str, on_change: Callable[[], None]) -> None:
        self._topic = topic
        self._on_change = on_change
        self._tail = b""
        self._joins = 0
        self.joined = 0
        self.told = 0
        self.ended = False
        self.runs: list[list[int]] = [[0, -1]]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.transport.write(
            b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )

    def _join(self) -> None:
        self._joins += 1
        message = [str(self._joins), str(self._joins), self._topic, "phx_join", {}]
        self.transport.write(client_frame(TEXT, json.dumps(message).encode()))

    def data_received(self, data: bytes) -> None:
        data = self._tail + data
        if not self._joins:
            self._tail = data
            if data.endswith(b"\r\n\r\n"):
                assert data.startswith(b"HTTP/1.1 101 "), data
                self._tail = b""
                self._join()
            return
        end, run = 0, self.runs[-1]
        for found in _FRAME.finditer(data):
            end = found.end()
            if found.lastindex == 1:
                number = int(found[1])
                if number == run[1] + 1:
                    run[1] = number
                else:
                    run = [number, number]
                    self.runs.append(run)
            else:
                self._control(found)
        self._tail = data[end:]

    def _control(self, found: re.Match[bytes]) -> None:
        if found[2] == b"ok":
            self.joined += 1
        elif found[2] == b"error":
            asyncio.get_running_loop().call_later(RETRY_S, self._join)
        elif found[3]:
            self.told += 1
            self._join()
        else:
            self.ended = True
        self._on_change()


async def run(url: str, topic: str, count: int) -> None:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 0
    loop, changed = asyncio.get_running_loop(), asyncio.Event()
    counters = []
    for _ in range(count):
        _, counter = await loop.create_connection(lambda: Counter(topic, changed.set), host, port)
        counters.append(counter)
    said = 0
    while not all(counter.ended for counter in counters):
        changed.clear()
        await changed.wait()
        if min(counter.joined for counter in counters) > said:
            sys.stdout.write("rejoined\n" if said else "joined\n")
            sys.stdout.flush()
            said += 1
    result = [{"runs": [run for run in c.runs if run[1] >= run[0]], "told": c.told} for c in counters]
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    work = run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    try:
        import uvloop
    except ImportError:  # where there is none, the relay itself goes without
        asyncio.run(work)
    else:
        uvloop.run(work)
