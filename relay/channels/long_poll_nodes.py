"""Long polling across processes: requests that reach another process than the one in which their session lives.

Owns the messages between nodes about them; must not know HTTP or what frames mean.

A request is sent to the node that its token names, on a channel of that node alone, and waits for the answer; nothing
is kept in Redis. All messages are sealed: they hold tokens of joins, and other people's data. A node keeps what it has
answered to a poll until the other has confirmed that it was sent to the client; if that remains unknown, the session
ends, and its client joins again: an event is neither lost without a sign nor sent twice.
"""

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from itertools import count
from typing import TypeAlias

import msgspec

from relay.auth.sealing import Sealer
from relay.brokers.base import NodeBus
from relay.channels.long_poll import NOT_HERE, Answer, LocalSessions, Polled, SessionId, post_timeout_s
from relay.config import Config
from relay.errors import BusUnavailable
from relay.telemetry import Telemetry

_POSTS_MAX = 64
"""Posts on their way to other nodes at once; further ones wait. Polls are not limited so: each session has a few."""

_BATCH_MAX_BYTES = 262_144
"""Bytes of frames in an answer to another node. Redis holds them for a reader that is slow, all others' too."""


class _Poll(msgspec.Struct, tag="poll"):
    """A poll for a session of the receiver."""

    number: int
    sender: str
    session: str


class _Post(msgspec.Struct, tag="post"):
    """A post for a session of the receiver."""

    number: int
    sender: str
    session: str
    body: bytes
    is_ndjson: bool
    # Whether the sender expects `_Taken`; older nodes neither expect it nor send it.
    wants_taken: bool = False


class _Taken(msgspec.Struct, tag="taken"):
    """A post has come: its sender may send others. The answer follows once its messages have been read."""

    number: int


class _End(msgspec.Struct, tag="end"):
    """What has become of a poll at its sender: its answer is with the client, or the client has gone."""

    number: int
    sender: str
    is_sent: bool


class _Answer(msgspec.Struct, tag="answer"):
    """The answer of the receiver of a poll or a post."""

    number: int
    status: int
    messages: bytes
    reason: str


_Message: TypeAlias = _Poll | _Post | _Taken | _End | _Answer

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Message).decode


class NodeSessions:
    """The sessions of other nodes, and this node's own for those.

    Args: node: the name of this one.
          bus: carries messages to one node.
          local: the sessions of this process.
          spawn: runs a coroutine until it ends, or the relay does.
    """

    def __init__(
        self,
        node: str,
        bus: NodeBus,
        sealer: Sealer,
        local: LocalSessions,
        telemetry: Telemetry,
        spawn: Callable[[Coroutine[None, None, None]], object],
    ) -> None:
        self._node = node
        self._bus = bus
        self._sealer = sealer
        self._local = local
        self._metrics = telemetry.metrics
        self._log = telemetry.loggers.get("relay.socket")
        self._spawn = spawn
        config: Config = local.config
        self._answer_s = post_timeout_s(config.limits.longpoll_window_s)
        self._confirm_s = config.redis.timeout_s
        self._body_max_bytes = config.limits.body_max_bytes
        self._numbers = count(1)
        # Requests that are with other nodes, and those that others have sent here, with what ends them.
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._polls: dict[tuple[str, int], Callable[[bool], None]] = {}
        # Posts on their way: done when the other node has them.
        self._taken: dict[int, asyncio.Future[None]] = {}
        self._posts = asyncio.Semaphore(_POSTS_MAX)
        self._room = asyncio.Condition()
        self._posted_bytes = 0

    # Requests for sessions of other nodes.

    async def poll(self, session: SessionId, gone: asyncio.Future[None]) -> Polled | None:
        """See `relay.channels.long_poll.Sessions.poll`."""
        number = next(self._numbers)
        future = self._begin(number)
        try:
            if not await self._send(session.node, _Poll(number, self._node, session.id)):
                return Polled(Answer(500, reason=NOT_HERE), _ignore)
            _ = await asyncio.wait((future, gone), timeout=self._answer_s, return_when=asyncio.FIRST_COMPLETED)
            end = partial(self._end_poll, session.node, number)
            if future.done():
                answer = future.result()
                return Polled(answer, end if answer.messages else _ignore)
            end(False)
            return None if gone.done() else Polled(self._unanswered(500), _ignore)
        finally:
            del self._pending[number]

    async def post(self, session: SessionId, body: bytes, *, is_ndjson: bool) -> Answer:
        """See `relay.channels.long_poll.Sessions.post`."""
        number = next(self._numbers)
        future = self._begin(number)
        try:
            async with asyncio.timeout(self._answer_s):
                if await self._hand_over(session.node, _Post(number, self._node, session.id, body, is_ndjson, True)):
                    return await future
                return Answer(410, reason=NOT_HERE)
        except TimeoutError:
            return self._unanswered(408)
        finally:
            del self._pending[number]

    async def _hand_over(self, node: str, post: _Post) -> bool:
        """Send a post, and wait until the node has it: one that takes long to read holds up no other session's."""
        async with self._posts:
            taken = self._taken[post.number] = asyncio.get_running_loop().create_future()
            try:
                await self._take_room(len(post.body))
                try:
                    is_sent = await self._send(node, post)
                    if is_sent:
                        waited_for = (taken, self._pending[post.number])
                        _ = await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
                    return is_sent
                finally:
                    await self._give_room(len(post.body))
            finally:
                del self._taken[post.number]

    async def _take_room(self, size: int) -> None:
        """Wait until all posts on their way are no larger than one may be: Redis ends slow readers of much."""
        async with self._room:
            while self._posted_bytes and self._posted_bytes + size > self._body_max_bytes:
                _ = await self._room.wait()
            self._posted_bytes += size

    async def _give_room(self, size: int) -> None:
        async with self._room:
            self._posted_bytes -= size
            self._room.notify_all()

    def _begin(self, number: int) -> asyncio.Future[Answer]:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        return future

    def _unanswered(self, status: int) -> Answer:
        self._metrics.refused["longpoll: no answer"] += 1
        return Answer(status, reason=f"the session's process has not answered within {self._answer_s:g} s")

    def _end_poll(self, node: str, number: int, is_sent: bool) -> None:
        _ = self._spawn(self._send_quietly(node, _End(number, self._node, is_sent)))

    def fail_all(self) -> None:
        """Answer all that waits for other nodes: their answers may have been lost with the link to the bus."""
        for future in self._pending.values():
            if not future.done():
                future.set_result(Answer(500, reason="the link between relay's processes was interrupted"))

    # Messages.

    async def _send(self, node: str, message: _Message) -> bool:
        """Send a message; False where no such node has received it."""
        try:
            receivers = await self._bus.publish_to_node(node, self._sealer.seal(_encode(message), node))
        except BusUnavailable as error:
            self._log.warning("longpoll bus", "long poll not forwarded to another process: %s", error)
            return False
        return receivers > 0

    async def _send_quietly(self, node: str, message: _Message) -> None:
        _ = await self._send(node, message)

    def receive(self, sealed: bytes) -> None:
        """Take a message for this node."""
        data = self._sealer.open(sealed, self._node)
        try:
            message = None if data is None else _decode(data)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):  # of another version
            message = None
        match message:
            case _Poll():
                _ = self._spawn(self._serve_poll(message))
            case _Post():
                _ = self._spawn(self._serve_post(message))
            case _Taken():
                if (taken := self._taken.get(message.number)) is not None and not taken.done():
                    taken.set_result(None)
            case _End():
                if (end := self._polls.get((message.sender, message.number))) is not None:
                    end(message.is_sent)
            case _Answer():
                future = self._pending.get(message.number)
                if future is not None and not future.done():
                    future.set_result(Answer(message.status, message.messages, message.reason))
            case None:
                self._metrics.refused["longpoll: message not understood"] += 1
                text = "message of another process dropped: not sealed with this auth.secret, or of another version"
                self._log.warning("longpoll message", text)

    # Requests of other nodes for sessions of this one.

    async def _serve_poll(self, poll: _Poll) -> None:
        key, session = (poll.sender, poll.number), SessionId(self._node, poll.session)
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._polls[key] = lambda is_sent: None if gone.done() else gone.set_result(None)
        try:
            polled = await self._local.poll(session, gone, _BATCH_MAX_BYTES)
            if polled is not None:
                await self._answer_poll(poll, session, polled)
        finally:
            del self._polls[key]

    async def _answer_poll(self, poll: _Poll, session: SessionId, polled: Polled) -> None:
        answer = polled.answer
        message = _Answer(poll.number, answer.status, answer.messages, answer.reason)
        if not answer.messages:
            await self._send_quietly(poll.sender, message)
            return
        sent: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._polls[poll.sender, poll.number] = lambda is_sent: None if sent.done() else sent.set_result(is_sent)
        with self._local.unconfirmed(session):
            if not await self._send(poll.sender, message):
                polled.end(False)
                return
            try:
                async with asyncio.timeout(self._confirm_s):
                    is_sent = await sent
            except TimeoutError:
                self._local.lose(session)
            else:
                polled.end(is_sent)

    async def _serve_post(self, post: _Post) -> None:
        if post.wants_taken:
            _ = self._spawn(self._send_quietly(post.sender, _Taken(post.number)))
        answer = await self._local.post(SessionId(self._node, post.session), post.body, is_ndjson=post.is_ndjson)
        await self._send_quietly(post.sender, _Answer(post.number, answer.status, b"", answer.reason))


def _ignore(is_sent: bool) -> None:
    """The end of a poll that holds nothing."""
