"""The chat of broadcaster's README, without its page: ``python broadcaster_server.py PORT REDIS_URL``."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import uvicorn
from broadcaster import Broadcast
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket


def make_app(redis_url: str) -> Starlette:
    """The README's app; only its lifespan is spelled as Starlette 1.0 wants it."""
    broadcast = Broadcast(redis_url)

    async def chatroom(websocket: WebSocket) -> None:
        await websocket.accept()
        async with anyio.create_task_group() as group:

            async def receive_until_closed() -> None:
                await receive(websocket)
                group.cancel_scope.cancel()

            group.start_soon(receive_until_closed)
            await send(websocket)

    async def receive(websocket: WebSocket) -> None:
        async for message in websocket.iter_text():
            await broadcast.publish(channel="chatroom", message=message)

    async def send(websocket: WebSocket) -> None:
        async with broadcast.subscribe(channel="chatroom") as subscriber:
            async for event in subscriber:  # type: ignore[union-attr]  # the README's words
                await websocket.send_text(event.message)  # type: ignore[union-attr]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with broadcast:
            yield

    return Starlette(routes=[WebSocketRoute("/", chatroom)], lifespan=lifespan)


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[2]), port=int(sys.argv[1]), log_level="warning", ws_ping_interval=None)
