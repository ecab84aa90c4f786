"""A client's process that pushes large payloads on several sockets, as fast as they are read, and comes back when cut.

``python -m tests.support.flooder URL SOCKETS BYTES``
"""

import asyncio
import json
import sys

from tests.support.client import CLOSE, TEXT, RawSocket, client_frame


async def flood(url: str, number: int, size: int) -> None:
    """Push to one topic of its own for as long as the process runs."""
    topic = f"room:flood:{number}"
    join = client_frame(TEXT, json.dumps(["1", "0", topic, "phx_join", {}]).encode())
    push = client_frame(
        TEXT, json.dumps(["1", None, topic, "x", "x" * size + "\U0001f600"], ensure_ascii=False).encode()
    )
    while True:
        try:
            async with RawSocket.connect(url) as client:
                await client.send_bytes(join)
                _ = await client.read_frame()
                for _ in range(60):  # within its rate
                    await client.send_bytes(push)
                while (await client.read_frame())[0] != CLOSE:
                    pass
        except (OSError, EOFError, TimeoutError):
            await asyncio.sleep(0.02)


async def main(url: str, sockets: int, size: int) -> None:
    _ = await asyncio.gather(*(flood(url, number, size) for number in range(sockets)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
