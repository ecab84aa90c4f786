"""What Uvicorn uses of a queue and an event for each socket, in less memory than asyncio's own.

Must not know what waits in it.
"""

import asyncio
from typing import Any


class _Waiting:
    """The tasks that wait for something to happen; nearly always none, or one."""

    __slots__ = ("_futures",)

    def __init__(self) -> None:
        self._futures: list[asyncio.Future[None]] = []

    async def _wait(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        try:
            await future
        finally:
            self._futures.remove(future)

    def _wake(self) -> None:
        for future in self._futures:
            if not future.done():
                future.set_result(None)


class Inbox(_Waiting):
    """Messages for the application, in the manner of `asyncio.Queue`."""

    __slots__ = ("_messages",)

    def __init__(self) -> None:
        super().__init__()
        # A list: it holds no more than one read from the transport brings, since reading is paused until it is empty.
        self._messages: list[Any] = []

    def put_nowait(self, message: Any) -> None:
        """Add a message, and wake the reader."""
        self._messages.append(message)
        self._wake()

    async def get(self) -> Any:
        """Take the oldest message, once there is one."""
        while not self._messages:
            await self._wait()
        return self._messages.pop(0)

    def take_back(self) -> Any:
        """Take what was put last."""
        return self._messages.pop()

    def discard_disconnect(self) -> None:
        """Take back a disconnect that came last."""
        if self._messages and self._messages[-1]["type"] == "websocket.disconnect":
            self._messages.pop()

    def size(self) -> int:
        """Characters and bytes of the messages that wait."""
        return sum(len(message.get("text") or message.get("bytes") or b"") for message in self._messages)

    def empty(self) -> bool:
        """Whether no message waits."""
        return not self._messages


class Gate(_Waiting):
    """Open or closed, in the manner of `asyncio.Event`; open at first."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        super().__init__()
        self._open = True

    def set(self) -> None:
        self._open = True
        self._wake()

    def clear(self) -> None:
        self._open = False

    async def wait(self) -> None:
        while not self._open:
            await self._wait()
