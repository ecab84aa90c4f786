"""What a socket and its channels share: the connection of the moment, the refs, and the replies waited for."""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from relay_client.errors import JoinError, PushError
from relay_client.wire import Message, Ref, encode

log = logging.getLogger("relay_client")

T = TypeVar("T")
Fresh: TypeAlias = T | Callable[[], T | Awaitable[T]]
"""A value, or a function, sync or async, that is asked for it each time it is needed."""


async def value_of(fresh: Fresh[T]) -> T:
    """The value; what a function raises is raised."""
    value: Any = fresh() if callable(fresh) else fresh
    if inspect.isawaitable(value):
        value = await value
    return value  # type: ignore[no-any-return]  # what comes out of the callable is its own affair


def refusal(topic: str, event: str, status: str, response: Any = None) -> PushError:
    """The error for a push, or for a join."""
    return (JoinError if event == "phx_join" else PushError)(topic, event, status, response)


class Link:
    """Sends messages while connected, and passes each reply to the caller that waits for it.

    Attributes: is_over: there will be no connection any more.
    """

    def __init__(self) -> None:
        self.is_over = False
        self._connection: ClientConnection | None = None
        self._is_open = asyncio.Event()
        self._last_ref = 0
        self._pending: dict[Ref, tuple[Message, asyncio.Future[Any]]] = {}

    def open(self, connection: ClientConnection) -> None:
        """Send over this connection from now on."""
        self._connection = connection
        self._is_open.set()

    def lose(self) -> None:
        """The connection is lost: fail all pending replies."""
        self._connection = None
        self._is_open.clear()
        self.fail("disconnected")

    async def opened(self) -> None:
        """Wait for a connection; returns at once while there is one."""
        await self._is_open.wait()

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._is_open.is_set()

    def next_ref(self) -> str:
        """A ref not used before on this socket."""
        self._last_ref += 1
        return str(self._last_ref)

    async def tell(self, message: Message) -> None:
        """Send. Raises PushError (``disconnected``), and what `encode` raises."""
        frame = encode(message)
        try:
            if self._connection is not None:
                return await self._connection.send(frame)
        except ConnectionClosed:
            pass
        raise refusal(message.topic, message.event, "disconnected")

    async def ask(self, message: Message, timeout_s: float) -> Any:
        """Send, and return the response of the ``ok`` reply. Raises PushError where none comes."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[message.ref] = message, reply
        try:
            async with asyncio.timeout(timeout_s):
                await self.tell(message)
                return await reply
        except TimeoutError:
            raise refusal(message.topic, message.event, "timeout") from None
        finally:
            del self._pending[message.ref]
            if reply.done() and not reply.cancelled():
                reply.exception()  # seen: it may have come while the caller was being cancelled

    def settle(self, reply: Message) -> None:
        """Pass on a reply; without a waiting caller it is too late, and ignored."""
        message, future = self._pending.get(reply.ref, (reply, None))
        if future is None or future.done():
            return
        status, response = reply.payload["status"], reply.payload["response"]
        if status == "ok":
            future.set_result(response)
        else:
            future.set_exception(refusal(message.topic, message.event, status, response))

    async def answered(self, topic: str) -> None:
        """Wait until no push to this topic waits for its reply."""
        while pending := [future for message, future in self._pending.values() if message.topic == topic]:
            await asyncio.wait(pending)
            await asyncio.sleep(0)  # for those who wait for the replies to take them

    def fail(self, status: str, topic: str | None = None) -> None:
        """Fail all pending replies of this topic, or of all topics."""
        for message, future in self._pending.values():
            if not future.done() and topic in (None, message.topic):
                future.set_exception(refusal(message.topic, message.event, status))
