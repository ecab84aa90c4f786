"""The clients of one node: how each comes in, which of them are here, and how all are closed at the end.

Owns the sockets, from the request that opens one to its end; must not know what their messages mean.
"""

import asyncio
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

from relay.channels.channel import Services
from relay.channels.event_stream import EventStreams
from relay.channels.socket import Socket
from relay.config import Config
from relay.errors import AuthenticationError, CloseCode
from relay.metrics import Metrics
from relay.permissions import Identity
from relay.protocol.serializer import Version
from relay.proxy_headers import rate_limit_key
from relay.siblings import Siblings
from relay.telemetry import Telemetry
from relay.tracing import Trace
from relay.transports import handshake, long_poll_request, sse_request
from relay.transports.admission import ConnectionLimiter
from relay.transports.base import ReceiveCallable, Scope, SendCallable, Transport, TransportServices
from relay.transports.handshake import HandshakeAccepted, HandshakeRejected
from relay.transports.long_poll import LongPollTransport
from relay.transports.network_access import NetworkAccess
from relay.transports.outbox import OutboxBudget
from relay.transports.sse import SSETransport
from relay.transports.sse_request import StreamRequest
from relay.transports.websocket import WebSocketTransport
from relay.transports.writer import EXTENSION, STREAM_EXTENSION, DirectWriter

_logger = logging.getLogger("relay")

_DRAIN_STEP_S = 0.05
"""Seconds between two portions of a drain."""

_RESTARTING = HandshakeRejected(503, "the relay is restarting", "restarting")


class Connections:
    """The sockets of one process.

    Args: services: what each socket is given.
          network_access: whether pages of this machine's other servers may connect.
          siblings: other processes of the same app, looked for when the first socket has come.
    """

    def __init__(
        self, services: Services, telemetry: Telemetry, network_access: NetworkAccess, siblings: Siblings
    ) -> None:
        self.config: Config = services.config
        limits, metrics = self.config.limits, telemetry.metrics
        self.sockets: dict[str, Socket] = {}
        self.left_behind: dict[asyncio.Task[None], Socket] = {}
        """Sockets that have ended, with handlers under way for what they sent: control messages are about these too."""
        self.write_modes: Counter[str] = Counter({"direct": 0, "asgi": 0, "sse": 0, "longpoll": 0})
        """Sockets open, by how frames are written."""
        # Ids of sockets are unique among all nodes: a random part, then a number. Made at the start: forked processes
        # have the import's state in common.
        self.numbers: Iterator[str] = map(f"{uuid.uuid4().hex[:8]}-{{}}".format, count(1))
        self._services = services
        self._pubsub = services.pubsub
        self.metrics: Metrics = metrics
        self._tracer = telemetry.tracer
        self._log = telemetry.loggers.get("relay.socket")
        outboxes = OutboxBudget(limits.outbox_total_max_bytes, metrics)
        self.event_streams: EventStreams = EventStreams(services, outboxes)
        """The loops of code in this process over events of topics."""
        self._transport_services = TransportServices(limits, metrics, self._log, outboxes, self.config.compression)
        self._admission = ConnectionLimiter(
            sockets_max=limits.sockets_max,
            sockets_per_address=limits.sockets_per_address,
            handshakes_per_s=limits.handshakes_per_s,
            now=time.monotonic(),
        )
        self._network_access = network_access
        self._siblings = siblings
        self._no_sockets = asyncio.Event()
        self._no_sockets.set()
        self._draining: asyncio.Task[None] | None = None
        self._on_shutdown = self.drain  # one for all sockets

    @property
    def has_requests(self) -> bool:
        """Whether some sockets are plain requests, or are asked for by them; loops may stand in responses."""
        return bool(self.write_modes["sse"] or self.write_modes["longpoll"] or self.event_streams.members)

    # Their end.

    @property
    def is_draining(self) -> bool:
        """Whether the end has begun: no socket is taken any more."""
        return self._draining is not None

    def drain(self) -> None:
        """Begin the end: refuse new sockets with 503, close those that are here with 1012 (come back), at a pace.

        All at once would be back all at once, wherever they go. What is queued for a socket is sent before its close.
        """
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
            self.event_streams.close()

    async def close(self) -> None:
        """Drain, and wait for the sockets' end, for ``limits.close_timeout_s`` after the last was closed at most."""
        self.drain()
        assert self._draining is not None, "drain() has made it"
        await self._draining
        with suppress(TimeoutError):
            async with asyncio.timeout(self.config.limits.close_timeout_s):
                await self._no_sockets.wait()
        if self.metrics.drained:
            _logger.info("shutting down: %d sockets closed, %d left", self.metrics.drained, len(self.sockets))

    async def _drain(self) -> None:
        limits, waiting = self.config.limits, list(self.sockets.values())
        if waiting:
            _logger.info("shutting down: closing %d sockets", len(waiting))
        # The last ones need time for their close, too.
        time_s = max(limits.drain_timeout_s - limits.close_timeout_s, limits.drain_timeout_s / 2)
        per_s = max(limits.drain_per_s, len(waiting) / time_s)
        portion = max(1, round(per_s * _DRAIN_STEP_S))
        for start in range(0, len(waiting), portion):
            if start:
                await asyncio.sleep(max(_DRAIN_STEP_S, 1 / per_s))
            for socket in waiting[start : start + portion]:
                self._close_for_restart(socket)

    def _close_for_restart(self, socket: Socket) -> None:
        if socket.id in self.sockets:
            self.metrics.drained += 1
            socket.close(CloseCode.RESTART, "the relay is restarting")

    def close_idle(self, now: float) -> None:
        """Close the sockets that are idle for too long, or have not joined in time, at the monotonic time ``now``."""
        limits = self.config.limits
        timeout_s, join_s = limits.idle_timeout_s, limits.first_join_timeout_s or math.inf
        for socket in self.sockets.values():
            if socket.idle_s(now) > timeout_s:
                if socket.close(CloseCode.GOING_AWAY, f"idle for {timeout_s:g} s; send heartbeats"):
                    self.metrics.refused["idle"] += 1
            elif now - socket.joinless_since > join_s:
                if socket.close(CloseCode.POLICY_VIOLATION, f"no topic joined within {join_s:g} s"):
                    self.metrics.refused["no join in time"] += 1

    # Their life.

    async def serve(self, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        """Serve one ``websocket`` scope, or an ``http`` scope that asks for a stream, from handshake to end."""
        if scope["type"] == "http" and scope["method"] != "GET":
            await self._answer_other_method(scope, receive, send)
            return
        trace = None if self._tracer is None else self._tracer.begin(scope)
        try:
            await self._serve(scope, receive, send, trace)
        finally:
            if trace is not None:
                trace.end_handshake()

    async def _serve(self, scope: Scope, receive: ReceiveCallable, send: SendCallable, trace: Trace | None) -> None:
        address, refused = self._admit(scope)
        if refused is not None:
            await self._refuse(scope, receive, send, refused)
            return
        try:
            began = self._pubsub.decisions.begin()
            try:
                socket = await self._accept(scope, receive, send, trace)
                if socket is not None:
                    if trace is not None:
                        trace.accepted(socket.id)
                    self._enter(socket, began)
            finally:
                self._pubsub.decisions.end(began)
            if socket is not None:
                await self._run(socket)
        finally:
            self._admission.release(address)

    def _admit(self, scope: Scope) -> tuple[str | None, HandshakeRejected | None]:
        """Let a client in, by the address that has to be released later, or say why not."""
        if self.is_draining:
            return None, _RESTARTING
        client = scope.get("client")
        address = rate_limit_key(client[0]) if client else None
        return address, self._admission.acquire(address, time.monotonic())

    async def open_session(self, scope: Scope) -> Socket | HandshakeRejected:
        """Open the session of a long-polling client, which goes on after its request; say why not, if not."""
        trace = None if self._tracer is None else self._tracer.begin(scope)
        try:
            opened = await self._open_session(scope, trace)
            if isinstance(opened, HandshakeRejected):
                self.note_refusal(scope, opened)
            elif trace is not None:
                trace.accepted(opened.id)
            return opened
        finally:
            if trace is not None:
                trace.end_handshake()

    async def _open_session(self, scope: Scope, trace: Trace | None) -> Socket | HandshakeRejected:
        address, refused = self._admit(scope)
        if refused is not None:
            return refused
        began = self._pubsub.decisions.begin()
        session: Socket | None = None
        try:
            shake = self.check_page(scope) or long_poll_request.check(scope)
            if isinstance(shake, HandshakeRejected):
                return shake
            try:
                identity = await self._authenticate(scope, shake.auth_token)
            except AuthenticationError as error:
                return HandshakeRejected(error.status, str(error), error.kind)
            transport = LongPollTransport(next(self.numbers), scope, self._transport_services)
            session = Socket(transport, shake.version, self._services, identity, trace)
            self._enter(session, began)
            _ = self._pubsub.spawn(self._run_session(session, address))
            return session
        finally:
            self._pubsub.decisions.end(began)
            if session is None:
                self._admission.release(address)

    async def _run_session(self, session: Socket, address: str | None) -> None:
        try:
            await self._run(session)
        finally:
            self._admission.release(address)

    def _enter(self, socket: Socket, began: int) -> None:
        self.sockets[socket.id] = socket
        self.write_modes[socket.write_mode] += 1
        self._no_sockets.clear()
        if self.is_draining:  # the end began during its handshake
            self._close_for_restart(socket)
        elif socket.user is not None and self._pubsub.decisions.overtaken(began, socket.user):
            socket.disconnect()
            self.metrics.disconnects_by_control += 1

    async def _run(self, socket: Socket) -> None:
        try:
            self._siblings.check_once()
            await socket.run()
        finally:
            del self.sockets[socket.id]
            self.write_modes[socket.write_mode] -= 1
            if (task := socket.finish_in_background()) is not None:
                self.left_behind[task] = socket
                task.add_done_callback(self.left_behind.pop)
            if not self.sockets:
                self._no_sockets.set()

    # Their handshake.

    async def _refuse(
        self, scope: Scope, receive: ReceiveCallable, send: SendCallable, refused: HandshakeRejected
    ) -> None:
        self.note_refusal(scope, refused)
        if scope["type"] == "websocket":
            await handshake.refuse(scope, receive, send, refused)
        else:
            await sse_request.answer(scope, refused, may_read=self._may_read(scope))(scope, receive, send)

    def note_refusal(self, scope: Scope, refused: HandshakeRejected) -> None:
        """Count and log a handshake that is refused."""
        self.metrics.refused[f"handshake: {refused.kind}"] += 1
        if self._tracer is not None:
            self._tracer.note(refused.kind)
        hint = refused.hint and f"; to let it, set {refused.hint}"
        if refused.status == 429 and any(name == b"x-forwarded-for" for name, _ in scope["headers"]):
            hint = "; it came with X-Forwarded-For: is this a proxy that `trusted_proxies` should name?"
        address = (scope.get("client") or (None,))[0]
        self._log.warning(
            refused.kind, "handshake refused: %s%s; address %s", refused.text, hint, address, address=address
        )

    def check_page(self, scope: Scope) -> HandshakeRejected | None:
        """Say why the page that sends a plain request may not connect; None where it may, or no page sends it."""
        is_local = self._network_access.has_local_pages(scope)
        return handshake.check_page(scope, self.config.allowed_origins, has_local_pages=is_local)

    def _may_read(self, scope: Scope) -> bool:
        """Whether the page that sends a request, if one does, may read its answer."""
        is_local = self._network_access.has_local_pages(scope)
        return handshake.check_origin(scope, self.config.allowed_origins, has_local_pages=is_local) is None

    async def _answer_other_method(self, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        if scope["method"] == "OPTIONS":
            await sse_request.answer_options(scope, may_read=self._may_read(scope))(scope, receive, send)
        else:
            await self._refuse(scope, receive, send, sse_request.wrong_method(scope))

    def _check(self, scope: Scope) -> HandshakeAccepted | StreamRequest | HandshakeRejected:
        origins, is_local = self.config.allowed_origins, self._network_access.has_local_pages(scope)
        if scope["type"] == "websocket":
            return handshake.check(scope, origins, has_local_pages=is_local)
        return sse_request.check(scope, origins, self.config.limits, has_local_pages=is_local)

    async def _accept(
        self, scope: Scope, receive: ReceiveCallable, send: SendCallable, trace: Trace | None
    ) -> Socket | None:
        """Do the handshake; None where it was refused."""
        shake = self._check(scope)
        identity: Identity | None = None
        if not isinstance(shake, HandshakeRejected):
            try:
                identity = await self._authenticate(scope, shake.auth_token)
            except AuthenticationError as error:
                shake = HandshakeRejected(error.status, str(error), error.kind)
        if isinstance(shake, HandshakeRejected):
            await self._refuse(scope, receive, send, shake)
            return None
        transport: Transport
        if isinstance(shake, StreamRequest):
            version, extension = Version.SSE, STREAM_EXTENSION
            transport = SSETransport(next(self.numbers), shake, scope, receive, send, self._transport_services)
        else:
            version, extension = shake.version, EXTENSION
            await handshake.accept(receive, send, shake.subprotocol)
            transport = WebSocketTransport(next(self.numbers), scope, receive, send, self._transport_services)
        writer: DirectWriter | None = (scope.get("extensions") or {}).get(extension)
        if writer is not None:
            writer.on_shutdown = self._on_shutdown
            writer.close_timeout_s = self.config.limits.close_timeout_s
        return Socket(transport, version, self._services, identity, trace)

    async def _authenticate(self, scope: Scope, auth_token: str | None) -> Identity | None:
        """Who sends a request; None where clients are not authenticated. Raises AuthenticationError."""
        authenticator = self._services.authenticator
        return None if authenticator is None else await authenticator.authenticate_request(scope, auth_token)
