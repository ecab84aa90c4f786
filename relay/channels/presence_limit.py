"""How often the presence of one socket may change.

Owns what waits; must not know what a change does. A change over the rate is held back, not refused: of several changes
under one key the newest is made, as soon as the rate allows it. So a status that a client sends with each keystroke
costs the other clients no more than the rate, and is right in the end.
"""

import asyncio
from collections.abc import Callable

from relay.channels.presence_topic import Watcher
from relay.metrics import Metrics
from relay.rate_limit import TokenBucket

_IDLE_S = 1.0
"""Seconds after which a socket whose presence does not change is forgotten: its bucket is full again."""


class _Socket:
    __slots__ = ("bucket", "timer", "used_at", "waiting")

    def __init__(self, bucket: TokenBucket) -> None:
        self.bucket = bucket
        # By channel and key; no key: all keys of the channel.
        self.waiting: dict[tuple[Watcher, str | None], Callable[[], None]] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.used_at = 0.0


class ChangeLimiter:
    """Makes changes of presence, within the rate of their socket.

    Args: per_s: changes of one socket per second; 0: no limit.
    """

    def __init__(self, per_s: int, metrics: Metrics) -> None:
        self._per_s = per_s
        self._metrics = metrics
        self._sockets: dict[str, _Socket] = {}

    def run(self, channel: Watcher, key: str | None, change: Callable[[], None], *, is_first: bool = False) -> None:
        """Make a change now, or later.

        Args: key: what the change is about; None: all keys of the channel.
              is_first: whether the channel is not listed yet: this has no limit of its own, as joins have one.
        """
        if not self._per_s:
            change()
            return
        loop, id = asyncio.get_running_loop(), channel.transport.id
        socket = self._sockets.get(id)
        if socket is None:
            if is_first:
                change()
                return
            bucket = TokenBucket(self._per_s, self._per_s, loop.time())
            socket = self._sockets[id] = _Socket(bucket)
            socket.timer = loop.call_later(_IDLE_S, self._go_on, id, socket)
        waits = any(other is channel for other, _ in socket.waiting)
        if key is None:
            self._drop(socket, channel)
        socket.used_at = loop.time()
        if not waits and (is_first or (not socket.waiting and socket.bucket.take(loop.time()))):
            change()
            return
        self._metrics.presence_held_back += 1
        socket.waiting[channel, key] = change
        self._wait(id, socket, 1 / self._per_s)

    def _wait(self, id: str, socket: _Socket, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if socket.timer is not None:
            if socket.timer.when() <= loop.time() + delay_s:
                return
            socket.timer.cancel()
        socket.timer = loop.call_later(delay_s, self._go_on, id, socket)

    def _go_on(self, id: str, socket: _Socket) -> None:
        now = asyncio.get_running_loop().time()
        socket.timer = None
        while socket.waiting and socket.bucket.take(now):
            socket.used_at = now
            socket.waiting.pop(next(iter(socket.waiting)))()
        if socket.waiting:
            self._wait(id, socket, 1 / self._per_s)
        elif now - socket.used_at >= _IDLE_S:
            del self._sockets[id]
        else:
            self._wait(id, socket, _IDLE_S)

    def forget(self, channel: Watcher) -> None:
        """Make no change of a channel any more: its subscription has ended."""
        socket = self._sockets.get(channel.transport.id)
        if socket is not None:
            self._drop(socket, channel)

    @staticmethod
    def _drop(socket: _Socket, channel: Watcher) -> None:
        for place in [place for place in socket.waiting if place[0] is channel]:
            del socket.waiting[place]

    def stop(self) -> None:
        """Make none of those that wait."""
        for socket in self._sockets.values():
            if socket.timer is not None:
                socket.timer.cancel()
        self._sockets.clear()
