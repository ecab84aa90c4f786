"""`BlockingSocket` and `BlockingChannel`: the twins of `Socket` and `Channel` for tests without an event loop.

Owns nothing: each call is made in the event loop in which the application runs.
"""

from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from relay.testing.client import NOTHING_S, Channel, Socket

Run: TypeAlias = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine in the application's event loop, and returns what it returns."""


class BlockingSocket:
    """One client: `join` gives its topics. Made by `connect`."""

    def __init__(self, socket: Socket, run: Run) -> None:
        self._socket = socket
        self._run = run

    def join(self, topic: str, payload: object = None) -> "BlockingChannel":
        """As `Socket.join`."""
        channel: Channel = self._run(self._socket.join(topic, payload))
        return BlockingChannel(channel, self._run)

    def expect_closed(self, code: int | None = None) -> int:
        """As `Socket.expect_closed`."""
        found: int = self._run(self._socket.expect_closed(code))
        return found

    def close(self) -> None:
        """As `Socket.close`."""
        self._run(self._socket.close())


class BlockingChannel:
    """One joined topic. Events wait here until they are expected."""

    def __init__(self, channel: Channel, run: Run) -> None:
        self._channel = channel
        self._run = run

    @property
    def topic(self) -> str:
        """Its name."""
        return self._channel.topic

    @property
    def response(self) -> Any:
        """What the reply to the join said."""
        return self._channel.response

    @property
    def received(self) -> list[tuple[str, Any]]:
        """Events that came and were not expected yet: name and payload."""
        return list(self._channel.received)

    def push(self, event: str, payload: object = None) -> Any:
        """As `Channel.push`."""
        return self._run(self._channel.push(event, payload))

    def leave(self) -> None:
        """As `Channel.leave`."""
        self._run(self._channel.leave())

    def expect(self, event: str, *payload: Any, within_s: float | None = None, **members: Any) -> Any:
        """As `Channel.expect`."""
        return self._run(self._channel.expect(event, *payload, within_s=within_s, **members))

    def expect_nothing(
        self, event: str | None = None, *payload: Any, within_s: float = NOTHING_S, **members: Any
    ) -> None:
        """As `Channel.expect_nothing`."""
        self._run(self._channel.expect_nothing(event, *payload, within_s=within_s, **members))
