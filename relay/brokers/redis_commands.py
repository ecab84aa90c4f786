"""Commands to Redis besides publishing: on a connection of their own, which is made when it is needed.

Owns the connection and matches replies to commands; must not know what is asked. A large reply holds up the commands
behind it, and no push.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

import hiredis

from relay.brokers.redis_connection import Connections, LinkLost, RedisConnection, limited, packed, words
from relay.brokers.redis_scripts import Script
from relay.errors import BusUnavailable

_IDLE_S = 30.0

FOR_PUBLISHERS = "relay-publisher"
"""Name of the task in programs that publish, in which no relay runs."""

_AGAIN_S = 0.05
"""Seconds before a command is sent a second time; before the third twice as many, and so on."""


class Turns:
    """A lock for what is to be done before something is sent: those that wait for it are not overtaken."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._taken = 0

    @property
    def are_taken(self) -> bool:
        """Whether the lock is held or waited for: further ones have to wait behind them."""
        return self._taken > 0

    async def __aenter__(self) -> None:
        self._taken += 1
        try:
            _ = await self._lock.acquire()
        except BaseException:
            self._taken -= 1
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._taken -= 1
        self._lock.release()


class RedisCommands:
    """Sends commands and waits for their replies.

    Args: connections: where to connect; the caller closes it.
          timeout_s: seconds for a reply, connecting included.
          name: of the task that reads.
          attempts: how often a command is sent whose connection ends before the reply; more than once only where it
              may be carried out again.
          idle_s: seconds without a reply after which the next command is sent on a new connection: a firewall
              may have forgotten it, without a word.
    """

    def __init__(
        self, connections: Connections, timeout_s: float, name: str, attempts: int = 1, idle_s: float = _IDLE_S
    ) -> None:
        self._connections = connections
        self._timeout_s = timeout_s
        self._name = name
        self._attempts = attempts
        self._idle_s = idle_s
        self._connecting = Turns()
        self._connection: RedisConnection | None = None
        self._reader: asyncio.Task[None] | None = None
        self._unanswered: deque[asyncio.Future[Any]] = deque()

    async def run(self, script: Script, keys: tuple[str, ...], *args: object) -> Any:
        """Run a script. Raises BusUnavailable."""
        try:
            return await self.ask("EVALSHA", script.sha, len(keys), *keys, *args)
        except _NoScript:
            return await self.ask("EVAL", script.text, len(keys), *keys, *args)

    async def ask(self, *command: object) -> Any:
        """Send a command and wait for its reply. Raises BusUnavailable."""
        return (await self.ask_all([command]))[0]

    async def ask_all(self, commands: Sequence[Sequence[object]]) -> list[Any]:
        """Send commands together and wait for all replies. Raises BusUnavailable, also for an error among them."""
        answers = await self.replies(commands)
        for command, answer in zip(commands, answers, strict=True):
            if isinstance(answer, hiredis.ReplyError):
                text = words(answer)
                if text.startswith("NOSCRIPT"):
                    raise _NoScript(text)
                about = command[3 if str(command[0]).startswith("EVAL") else 1] if len(command) > 1 else ""
                raise BusUnavailable(f"{command[0]} {about}: {text}")
        return answers

    async def replies(self, commands: Sequence[Sequence[object]]) -> list[Any]:
        """Send commands together and wait for all replies, errors among them. Raises BusUnavailable."""
        async with self._limited(f"no reply to {commands[0][0]}"):
            return await self._send(commands)

    async def connect(self) -> None:
        """Connect now where there is no connection, in the order of the calls. Raises BusUnavailable."""
        if self._usable() is None or self._connecting.are_taken:
            async with self._limited("no answer"):
                _ = await self._connect()

    @asynccontextmanager
    async def _limited(self, fault: str) -> AsyncIterator[None]:
        """Limit the time that the block takes; what goes wrong in it is BusUnavailable."""
        try:
            async with limited(self._timeout_s):
                yield
        except LinkLost as lost:
            raise BusUnavailable(str(lost)) from lost
        except TimeoutError:
            self.reconnect()
            raise BusUnavailable(f"{fault} within {self._timeout_s:g} s") from None

    async def _send(self, commands: Sequence[Sequence[object]]) -> list[Any]:
        """Send commands, again where their connection ends, and return the replies. Raises LinkLost."""
        for attempt in range(1, self._attempts + 1):
            replies: list[asyncio.Future[Any]] = []
            try:
                connection = (None if self._connecting.are_taken else self._usable()) or await self._connect()
                replies += (asyncio.get_running_loop().create_future() for _ in commands)
                self._unanswered.extend(replies)
                connection.write(packed([tuple(map(_argument, command)) for command in commands]))
                return await asyncio.gather(*replies)
            except LinkLost:
                for reply in replies:
                    _ = reply.cancel()
                if attempt == self._attempts:
                    raise
                await asyncio.sleep(_AGAIN_S * attempt)
        raise AssertionError("there is one attempt at least")

    def _usable(self) -> RedisConnection | None:
        """The connection, unless it was idle for too long."""
        connection = self._connection
        if connection is not None and not self._unanswered and connection.idle_s > self._idle_s:
            self.reconnect()
        return self._connection

    def reconnect(self) -> None:
        """Give the connection up: its server is no longer what it was."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    async def close(self) -> None:
        """End the connection."""
        if self._reader is not None:
            self._reader.cancel()
            _ = await asyncio.gather(self._reader, return_exceptions=True)

    async def _connect(self) -> RedisConnection:
        async with self._connecting:
            if self._connection is None:
                connection = await self._connections.open()
                self._unanswered = deque()
                self._connection = connection
                self._reader = asyncio.create_task(self._read(connection, self._unanswered), name=self._name)
            return self._connection

    async def _read(self, connection: RedisConnection, unanswered: deque[asyncio.Future[Any]]) -> None:
        closed = "the publisher was closed" if self._name == FOR_PUBLISHERS else "the relay is stopping"
        fault: Exception = LinkLost(closed)
        try:
            while True:
                reply = await connection.reply()
                future = unanswered.popleft()
                if not future.done():
                    future.set_result(reply)
        except (LinkLost, hiredis.HiredisError) as error:
            fault = error if isinstance(error, LinkLost) else LinkLost(words(error))
        except IndexError:
            fault = LinkLost("an unasked reply came")
        finally:
            if self._connection is connection:
                self._connection = None
            for future in unanswered:
                if not future.done():
                    future.set_exception(fault)
            await connection.close()


class _NoScript(BusUnavailable):
    """Redis does not know the script."""


def _argument(part: object) -> bytes:
    return part if isinstance(part, bytes) else str(part).encode()
