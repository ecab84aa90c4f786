"""Long polling: requests of clients to their sessions, which live in one process and go on between requests.

Owns the tokens of sessions and what a request leads to; must not know the frames' meaning.

A session's token is ``lp-<node>.<socket id>.<signature>``. It names no user, but a request with it
is the client's.
"""

import asyncio
import base64
import hmac
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import NamedTuple, Protocol

from relay.channels.connections import Connections
from relay.config import Config
from relay.errors import CloseCode
from relay.protocol import long_poll
from relay.telemetry import Telemetry
from relay.transports import long_poll_request as requests
from relay.transports.base import ReceiveCallable, Scope, SendCallable
from relay.transports.handshake import HandshakeRejected
from relay.transports.long_poll import BATCH_MAX_BYTES, LongPollTransport
from relay.transports.long_poll_request import Bodies, BodyRefused
from relay.transports.outbox import Entry
from relay.transports.queued import resolve

_SIGNATURE_BYTES = 18

NOT_HERE = "the session has ended, or is of another process; open a new one"


class SessionId(NamedTuple):
    """Where a session is: the node, and the id of its socket there."""

    node: str
    id: str


class Tokens:
    """Makes and reads the tokens of sessions.

    Args: key: signs them; of this process, or of all that may read each other's.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def make(self, session: SessionId) -> str:
        """The token of a session."""
        name = f"{session.node}.{session.id}"
        return f"{requests.TOKEN_BEGINS}{name}.{self._sign(name)}"

    def read(self, token: str) -> SessionId | None:
        """Say which session a token is of; None where it was not made with this key."""
        name, _, signature = token.removeprefix(requests.TOKEN_BEGINS).rpartition(".")
        node, _, id = name.partition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(name).encode()):
            return None
        return SessionId(node, id)

    def _sign(self, name: str) -> str:
        digest = hmac.digest(self._key, name.encode(errors="replace"), sha256)
        return base64.urlsafe_b64encode(digest[:_SIGNATURE_BYTES]).decode()


class Answer(NamedTuple):
    """What a session answers to a request."""

    status: int
    messages: bytes = b""
    """A JSON array of JSON texts, for a poll that has found some."""
    reason: str = ""


class Polled(NamedTuple):
    """What a poll is answered."""

    answer: Answer
    end: Callable[[bool], object]
    """Has to be called with whether the answer was sent to the client; else it comes first in the next."""


class Sessions(Protocol):
    """Where sessions are: in this process, or in another."""

    async def poll(self, session: SessionId, gone: asyncio.Future[None]) -> Polled | None:
        """Wait for what a session has to send; None where the client has gone meanwhile."""

    async def post(self, session: SessionId, body: bytes, *, is_ndjson: bool) -> Answer:
        """Have a session read what its client sends."""


class LocalSessions:
    """The sessions of this process."""

    def __init__(self, connections: Connections) -> None:
        self.config: Config = connections.config
        self._connections = connections
        self._limits = connections.config.limits
        # Sessions of which an answer is on its way to another node, with what is done once its fate is known.
        self._unconfirmed: dict[SessionId, asyncio.Future[None]] = {}

    def find(self, session: SessionId) -> LongPollTransport | None:
        """The session of an id; None where it has ended."""
        socket = self._connections.sockets.get(session.id)
        return socket.transport if socket is not None and isinstance(socket.transport, LongPollTransport) else None

    @contextmanager
    def unconfirmed(self, session: SessionId) -> Iterator[None]:
        """Let further polls of a session wait: what it has answered last may have to come first in the next answer."""
        self._unconfirmed[session] = known = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            if self._unconfirmed.get(session) is known:
                del self._unconfirmed[session]
            resolve(known)

    def lose(self, session: SessionId) -> None:
        """End a session: it is not known whether its client has had an answer."""
        transport = self.find(session)
        if transport is not None and transport.close(CloseCode.GOING_AWAY, "an answer may have been lost on its way"):
            self._connections.metrics.refused["longpoll: answer lost"] += 1

    async def poll(
        self, session: SessionId, gone: asyncio.Future[None], max_bytes: int = BATCH_MAX_BYTES
    ) -> Polled | None:
        """See `Sessions.poll`.

        Args: max_bytes: of the frames of the answer; one larger one is given out alone.
        """
        while (unknown := self._unconfirmed.get(session)) is not None:
            _ = await asyncio.wait((unknown,))
        transport = self.find(session)
        taken = None if transport is None else await transport.poll(gone, max_bytes)
        if transport is None:
            return Polled(Answer(500, reason=NOT_HERE), _nothing)
        if taken is None:
            return None

        def end(is_sent: bool) -> None:
            if not is_sent and not transport.put_back(taken):
                self.lose(session)

        messages = long_poll.encode_frames([entry.frame for entry in taken.entries]) if taken.entries else b""
        self._count_binary(taken.entries)
        return Polled(Answer(taken.status, messages, taken.reason), end)

    def _count_binary(self, entries: tuple[Entry, ...]) -> None:
        binary = sum(1 for entry in entries if not entry.frame.is_text)
        if binary:
            self._connections.metrics.longpoll_base64 += binary

    async def post(self, session: SessionId, body: bytes, *, is_ndjson: bool) -> Answer:
        """See `Sessions.post`."""
        transport = self.find(session)
        if transport is None:
            return Answer(410, reason=NOT_HERE)
        if transport.posts >= self._limits.pushes_in_flight:
            self._connections.metrics.refused["longpoll: too many posts"] += 1
            return Answer(429, reason="too many posts at once; wait for the answers")
        frames = long_poll.decode_body(body, self._limits.frame_max_bytes, is_ndjson=is_ndjson)
        timeout_s = post_timeout_s(self._limits.longpoll_window_s)
        try:
            if await transport.post(frames, timeout_s):
                return Answer(200)
        except TimeoutError:
            self._connections.metrics.refused["longpoll: posts too slow"] += 1
            return Answer(408, reason=f"the frames could not all be handled within {timeout_s:g} s")
        return Answer(410, reason=transport.ending[1] or NOT_HERE)


def post_timeout_s(window_s: float) -> float:
    """Seconds for a post, and for the answer of another node."""
    return 2 * window_s


class LongPoll:
    """Serves long-polling clients.

    Args: node: the name of this one.
          connections: opens sessions, and knows those of this process.
          tokens: of all sessions that may be asked for here.
    """

    def __init__(self, node: str, connections: Connections, telemetry: Telemetry, tokens: Tokens) -> None:
        self._node = node
        self._connections = connections
        self._metrics = telemetry.metrics
        self._log = telemetry.loggers.get("relay.socket")
        self._tokens = tokens
        self.others: Sessions | None = None
        """The sessions of other processes; None where those cannot be reached."""
        self.local: LocalSessions = LocalSessions(connections)
        limits = connections.config.limits
        self._bodies = Bodies(limits)
        self._post_timeout_s = post_timeout_s(limits.longpoll_window_s)

    async def serve(self, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        """Serve one request."""
        method, foreign = scope["method"], self._connections.check_page(scope)
        token = requests.session_token(scope)
        refused = foreign if method in ("GET", "POST") else requests.wrong_method(scope)
        if method == "OPTIONS":
            await requests.answer_options(scope, may_read=foreign is None)(scope, receive, send)
        elif method == "GET" and token is None:
            await self._open(scope, receive, send)
        elif refused is not None:
            self._connections.note_refusal(scope, refused)
            await requests.refuse(scope, refused, may_read=foreign is None)(scope, receive, send)
        elif method == "POST":
            await self._serve_post(token, scope, receive, send)
        elif token is not None:
            await self._serve_poll(token, scope, receive, send)

    async def _open(self, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        opened = await self._connections.open_session(scope)
        if isinstance(opened, HandshakeRejected):
            may_read = self._connections.check_page(scope) is None
            await requests.refuse(scope, opened, may_read=may_read)(scope, receive, send)
            return
        token = self._tokens.make(SessionId(self._node, opened.id))
        await requests.answer(scope, 410, token=token)(scope, receive, send)

    def _find(self, token: str | None) -> tuple[SessionId, Sessions] | None:
        """Where the session of a token is; None, counted, where it cannot be said or reached."""
        session = None if token is None else self._tokens.read(token)
        if session is None:
            kind = "no token" if token is None else "token"
            self._metrics.refused[f"longpoll: {kind}"] += 1
            if token is not None:
                self._log.warning("longpoll token", "long poll refused: %s", self._unreadable)
            return None
        if session.node == self._node:
            return session, self.local
        if self.others is None:
            self._metrics.refused["longpoll: other process"] += 1
            self._log.warning("longpoll node", "long poll refused: the session is of another process; %s", _SET_SECRET)
            return None
        return session, self.others

    @property
    def _unreadable(self) -> str:
        if self.others is not None:
            return "the token is forged, or of a relay with another auth.secret"
        return f"the token is forged, or of another process, or of before a restart; {_SET_SECRET}"

    async def _serve_poll(self, token: str, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        found = self._find(token)
        if found is None:
            await requests.answer(scope, 500, reason=NOT_HERE)(scope, receive, send)
            return
        session, sessions = found
        gone: asyncio.Future[None] = asyncio.ensure_future(requests.wait_until_gone(receive))
        try:
            polled = await sessions.poll(session, gone)
            if polled is None:
                return
            answer = polled.answer
            if answer.status == 500:
                self._metrics.refused["longpoll: session gone"] += 1
                token = ""
            response = requests.answer(
                scope, answer.status, token=token, messages=answer.messages, reason=answer.reason
            )
            is_sent = False
            try:
                if not gone.done():
                    await response(scope, receive, send)
                    is_sent = True
            finally:
                polled.end(is_sent)
        finally:
            gone.cancel()

    async def _serve_post(self, token: str | None, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        found = self._find(token)
        if found is None:
            await requests.answer(scope, 410, reason=NOT_HERE)(scope, receive, send)
            return
        session, sessions = found
        try:
            body = await self._bodies.read(session.id, scope, receive, self._post_timeout_s)
        except ConnectionError:
            return
        except BodyRefused as refused:
            self._metrics.refused[f"longpoll: {refused.kind}"] += 1
            if refused.status == 413 and (transport := self.local.find(session)) is not None:
                transport.reject(CloseCode.TOO_BIG, refused.reason)
            await requests.answer(scope, refused.status, reason=refused.reason)(scope, receive, send)
            return
        size = len(body)
        try:
            answer = await sessions.post(session, body, is_ndjson=requests.is_ndjson(scope))
        finally:
            self._bodies.release(session.id, size)
        await requests.answer(scope, answer.status, reason=answer.reason)(scope, receive, send)


_SET_SECRET = "with several processes or nodes, set auth.secret to the same value in all of them, on one Redis"


def _nothing(is_sent: bool) -> None:
    """The end of a poll whose answer holds nothing."""
