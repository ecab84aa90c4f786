"""python-socketio with its Redis manager: ``python socketio_server.py PORT REDIS_URL``."""

import sys
from typing import Any

import socketio  # type: ignore[import-not-found]  # installed where this runs, not where it is checked
import uvicorn


def main(port: int, redis_url: str) -> None:
    """Serve until the process is ended."""
    # In its favour: no client is pinged while it is measured, and nothing is logged.
    server = socketio.AsyncServer(
        async_mode="asgi", client_manager=socketio.AsyncRedisManager(redis_url), ping_interval=3600
    )

    async def connect(sid: str, environ: dict[str, Any]) -> None:
        await server.enter_room(sid, "room:1")

    server.on("connect", connect)
    uvicorn.run(socketio.ASGIApp(server), port=port, log_level="warning", ws_ping_interval=None)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
