"""Sockets that join a topic and beat their hearts: ``python -m tests.support.beater URL TOPIC SOCKETS``.

A process of its own, to be run in another network, stopped or killed. It prints ``joined`` once all have joined.
"""

import asyncio
import sys
from urllib.parse import urlsplit

from tests.support.client import TEXT, client_frame

HEARTBEAT = client_frame(TEXT, b'[null,"h","phoenix","heartbeat",{}]')
BEAT_S = 0.2


async def run(url: str, topic: str, count: int) -> None:
    parts = urlsplit(url)
    writers = []
    drains = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(
            b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        writer.write(client_frame(TEXT, b'["1","1","%s","phx_join",{}]' % topic.encode()))
        await reader.readuntil(b"phx_reply")
        writers.append(writer)
        for each in writers:  # those that have come wait for the others
            each.write(HEARTBEAT)
        drains.append(asyncio.create_task(reader.read()))
    sys.stdout.write("joined\n")
    sys.stdout.flush()
    while True:
        for writer in writers:
            writer.write(HEARTBEAT)
        await asyncio.sleep(BEAT_S)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3])))
