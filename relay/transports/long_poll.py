"""One long-polling client: a session that outlives its requests, with what waits for its next poll.

Owns the session; must not know HTTP, tokens, topics' subscribers or Redis.

A poll waits until there is something to send. What a client posts is read by the session's socket at its own pace, and
a post is answered when all of it has been read: this is the back-pressure.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from relay.errors import WireError
from relay.protocol.frame import Frame
from relay.protocol.serializer import Version
from relay.transports.base import Scope, TransportServices
from relay.transports.outbox import Entry
from relay.transports.queued import QueuedTransport, resolve, size_of

SESSION_WINDOWS = 1.5
"""After so many windows (``limits.longpoll_window_s``) without a poll a session ends. Source: Phoenix."""

_POLLS_MAX = 4
"""Polls of one session that wait at once. A client has one; a second one comes where a proxy repeats a request."""

BATCH_MAX_BYTES = 1_048_576
"""Bytes of frames from which on the rest waits for the next poll."""


_READ_FRAMES = 64
_READ_BYTES = 1024
"""So many frames are read in one turn of the event loop; one of so many bytes more counts as one more."""


class PollRequest(NamedTuple):
    """A request for a session that may pass."""

    version: Version
    auth_token: str | None
    """phoenix.js's ``authToken``; a secret."""


class Taken(NamedTuple):
    """What a poll has found."""

    status: int
    """200: frames; 204: nothing within the window; 500: the session has ended."""
    entries: tuple[Entry, ...] = ()
    reason: str = ""
    """Why the session has ended."""
    batch: int = 0
    """Its number, of those with frames."""


@dataclass(eq=False, slots=True)
class _Post:
    frames: Iterator[str | bytes]
    done: asyncio.Future[bool]
    """Whether all of it has been read; False where the session has ended before."""


class LongPollTransport(QueuedTransport):
    """A session. One task reads from it and ends it; requests come from others, of the same event loop.

    Args: id: for the log.
          scope: the request that has opened it.
          services: what it shares with the other transports of its node.
    """

    __slots__ = (
        "_arrived",
        "_batch",
        "_expiry",
        "_gone",
        "_is_over",
        "_polled_at",
        "_polling",
        "_polls",
        "_posts",
        "_read",
        "_window_s",
    )

    deflates: bool = False
    write_mode: str = "longpoll"

    def __init__(self, id: str, scope: Scope, services: TransportServices) -> None:
        super().__init__(id, scope, services)
        self._window_s = services.limits.longpoll_window_s
        # What is posted and not read yet, and what the reader waits for.
        self._posts: deque[_Post] = deque()
        self._arrived: asyncio.Future[None] | None = None
        # What was read since the reader last left the turn to others.
        self._read = 0
        # The number of the last frames that were given out.
        self._batch = 0
        # Polls that wait, the oldest first; each result says whether the poll may go on.
        self._polls: list[asyncio.Future[bool]] = []
        # All polls under way, and when the last one ended, in monotonic seconds.
        self._polling = 0
        self._polled_at = self.last_received
        self._gone = ""
        # Whether nothing more is read, nor sent.
        self._is_over = False
        self._expiry: asyncio.TimerHandle | None = None
        self._set_expiry()

    @property
    def ending(self) -> tuple[int | None, str, str]:
        """Close code, reason, and who closed: ``relay`` or ``client``. For one that has ended."""
        return (None, self._gone, "client") if self._close is None else (*self._close, "relay")

    def is_own_cancellation(self) -> bool:
        """Say that no cancellation of the reading task comes from here."""
        return False

    def idle_s(self, now: float) -> float:
        """Seconds since the client's last poll or post, at the monotonic time ``now``; 0 while a poll waits."""
        return 0.0 if self._polling else now - max(self._polled_at, self.last_received)

    def _encode(self, frame: Frame) -> bytes:
        return frame.data

    # What the client posts.

    @property
    def posts(self) -> int:
        """Posts that are not read yet."""
        return len(self._posts)

    async def post(self, frames: Iterator[str | bytes], timeout_s: float) -> bool:
        """Hand in frames; returns when all have been read, or False where the session has ended before.

        Raises: TimeoutError: they were not; what is left of them is dropped.
        """
        if self._is_over or self._close is not None:
            return False
        post = _Post(frames, asyncio.get_running_loop().create_future())
        self._posts.append(post)
        resolve(self._arrived)
        try:
            async with asyncio.timeout(timeout_s):
                return await post.done
        finally:
            if not post.done.done() or post.done.cancelled():
                self._posts.remove(post)

    async def receive(self) -> str | bytes | None:
        """The next frame, ``str`` for text, ``bytes`` for binary; None once the session has ended."""
        self._read += 1 + self.last_size // _READ_BYTES
        if self._read >= _READ_FRAMES:
            self._read = 0
            await asyncio.sleep(0)
        while not self._is_over:
            if not self._posts:
                self._arrived = asyncio.get_running_loop().create_future()
                await self._arrived
                self._arrived = None
                continue
            post = self._posts[0]
            try:
                frame = None if self._close is not None else next(post.frames, None)
            except WireError as error:
                self.reject(error.code, str(error))
                continue
            if frame is not None:
                self.last_received: float = time.monotonic()
                self.last_size: int = size_of(frame)
                return frame
            self._posts.popleft()
            post.done.set_result(self._close is None)
        return None

    # What the client is sent, poll by poll.

    async def poll(self, gone: asyncio.Future[None], max_bytes: int = BATCH_MAX_BYTES) -> Taken | None:
        """Wait until there is something to send, or the window is over.

        Of several polls that wait at once the newest is given the frames: the client may have gone from the others
        without a sign.

        Args:    gone: is done when the client has gone from this poll.
                 max_bytes: of the frames that are taken; one larger one is taken alone.
        Returns: what to send; None where the client has gone, which has taken nothing then.
        """
        self._polling += 1
        if self._expiry is not None and self._close is None:  # else it ends a session whose client does not come back
            self._expiry.cancel()
        try:
            await self._wait(gone)
        finally:
            self._polling -= 1
            self._polled_at = time.monotonic()
            if not self._polling:
                self._set_expiry()
        if gone.done():
            self._wake_writer()  # it may have been woken in place of another
            return None
        return self._take(max_bytes)

    async def _wait(self, gone: asyncio.Future[None]) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self._window_s
        while not (self._outbox or self._close or self._is_over or gone.done()):
            left_s = end - loop.time()
            if left_s <= 0:
                return
            woken: asyncio.Future[bool] = loop.create_future()
            self._polls.append(woken)
            if len(self._polls) > _POLLS_MAX:
                self._polls.pop(0).set_result(False)
            try:
                _ = await asyncio.wait((woken, gone), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not woken.done():
                    self._polls.remove(woken)
            if woken.done() and not woken.result():
                return

    def _wake_writer(self) -> None:
        """Have the newest poll look; it does so in the loop's next turn, and takes what came meanwhile too."""
        if self._polls and self._outbox:
            self._polls.pop().set_result(True)

    def _wake_all(self) -> None:
        for woken in self._polls:
            woken.set_result(True)
        self._polls.clear()

    def _take(self, max_bytes: int) -> Taken:
        """What waits for the client, as much as one response has."""
        outbox = self._outbox
        entries = outbox.take(max_bytes) if outbox else ()
        if not outbox:
            resolve(self._drained)
            if self._close is not None:
                self._finish()
        if entries:
            self._batch += 1
            return Taken(200, entries, batch=self._batch)
        if self._close is None and not self._is_over:
            return Taken(204)
        return Taken(500, reason=self.ending[1] or "the session has ended")

    def put_back(self, taken: Taken) -> bool:
        """Take back what a poll was given and could not send: the next one is given it, before all else.

        Returns: False where that is too late, because another poll has been given what follows; or the session has
                 ended. Its events are counted as dropped then.
        """
        if self._ended or self._is_over or taken.batch != self._batch:
            lost = [entry for entry in taken.entries if entry.key is not None]
            self._metrics.dropped["socket closed"] += len(lost)
            return False
        self._queue().put_back(taken.entries)
        self._wake_writer()
        return True

    # Its end.

    def close(self, code: int, reason: str) -> bool:
        """End the session once its client has been given what is queued, within ``limits.close_timeout_s``.

        Returns: whether it was still open.
        """
        is_open = self._close is None and not self._ended and not self._is_over
        if is_open:
            self._close = (code, reason)
            resolve(self._drained)  # for what waits in `drained`, which ends with the close
            resolve(self._arrived)
            if self._expiry is not None:
                self._expiry.cancel()
            if self._outbox:
                loop = asyncio.get_running_loop()
                self._expiry = loop.call_later(self._limits.close_timeout_s, self._finish)
            else:
                self._finish()
            self._wake_all()
            if self.owner is not None:
                self.owner.close_started()
        return is_open

    def _set_expiry(self) -> None:
        if self._close is None and not self._is_over:
            after_s = SESSION_WINDOWS * self._window_s
            self._expiry = asyncio.get_running_loop().call_later(after_s, self._expire, after_s)

    def _expire(self, after_s: float) -> None:
        self._gone = f"no poll for {after_s:g} s"
        self._finish()

    def _finish(self) -> None:
        """Have the reader end it, and all requests that wait."""
        self._is_over = True
        resolve(self._arrived)
        self._wake_all()

    def end(self) -> None:
        """Release the session; called once by its reader, when nothing more can be received."""
        super().end()
        self._finish()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        for post in self._posts:
            if not post.done.done():
                post.done.set_result(False)
        self._posts.clear()
