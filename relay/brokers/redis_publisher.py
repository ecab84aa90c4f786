"""Publishing on a connection of its own, which is kept open, watched, and made again after a fault.

Owns the messages on their way to Redis and the role of the server that takes them; must not know who is subscribed.

Commands of one turn of the event loop are written together, and replies come in their order: less than a third of the
cost of redis-py's pipeline. Nothing is ever sent twice: what had no reply when the connection broke has failed.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import hiredis
import msgspec

from relay.brokers.redis_connection import (
    MASTER,
    Connections,
    LinkLost,
    RedisConnection,
    Role,
    is_denied,
    name_of,
    not_published,
    packed,
    read_role,
    words,
)
from relay.brokers.redis_marker import Markers
from relay.brokers.redis_scripts import PUBLISH
from relay.config_redis import RedisConfig
from relay.errors import BusUnavailable

_logger = logging.getLogger("relay.redis")

_STOPPING = "the relay is stopping"


class Sent(msgspec.Struct):
    """What was published or asked, and has no reply yet."""

    future: asyncio.Future[Any]
    at: float
    size: int
    """Bytes of channel and payload."""
    channel: bytes = b""
    """Empty for the publisher's own commands."""
    expects: int = 1
    """Replies: 1; 2 with a marker before the message; 4 with both in a transaction."""
    replies: tuple[Any, ...] = ()
    """The first of several that have come."""
    marker_channel: bytes = b""
    is_counted: bool = False
    """Whether the number of receivers is wanted."""
    history: tuple[bytes, ...] = ()
    """Arguments of ``publish.lua``, which appends it to its topic's history; empty for a plain message."""
    payload: bytes = b""
    """To be sent again, where another node of a cluster has to take it."""
    redirects: int = 0
    """How often another node was named."""
    asks_role: bool = False


class PublisherOwner(Protocol):
    """The broker, as its publisher knows it."""

    @property
    def address(self) -> str:
        """Where the server is, for people."""

    def role_changed(self, role: Role) -> None:
        """Learn that the server is no longer what it was: subscriptions there may have gone deaf."""

    def appended(self, position: bytes, size: int) -> None:
        """Learn that an event was appended to a history of at most ``size``, and where."""

    async def prepare(self, connection: RedisConnection) -> bool:
        """Prepare the server for histories, if there are any; say whether it knows the script. Raises LinkLost."""

    def report_denied(self, what: str, means: str, allow: str) -> None:
        """Log, once each, what the Redis user may not do, what that means, and what allows it."""


class Publisher:
    """Publishes, and asks the server each ``ping_interval_s`` what it is.

    Args: markers: writes what precedes a message with a sender.
          owner: the broker.
    """

    def __init__(
        self,
        connections: Connections,
        settings: RedisConfig,
        markers: Markers,
        owner: PublisherOwner,
        clock: Callable[[], float],
    ) -> None:
        self._connections = connections
        self._settings = settings
        self._clock = clock
        self._owner = owner
        self._markers = markers
        # Where this connection may publish markers, the best first, and whether in transactions.
        self._marker_channels: list[bytes] = []
        self._is_atomic = False
        # Whether the server knows the script that appends to histories.
        self._has_script = False
        self._task: asyncio.Task[None] | None = None
        self._connection: RedisConnection | None = None
        self._role: Role | None = None
        self._refusal = ""
        self._wake = asyncio.Event()
        self._wakes_at = 0.0
        # Messages that wait for the connection, with payload and sender; all without a reply; and the bytes of these.
        self._unsent: list[tuple[Sent, bytes, str | None]] = []
        self._unanswered: deque[Sent] = deque()
        self._bytes = 0
        # Messages for histories whose script Redis has forgotten, later ones, and what was sent last before these.
        self._refused, self._behind = list[Sent](), list[Sent]()
        self._sent_last: Sent | None = None
        # Commands of this turn of the event loop, which are written at its end.
        self._outgoing: list[bytes] = []

    @property
    def refusal(self) -> str:
        """Why nothing can be published now; empty while it can, or a connection is being made."""
        return self._refusal

    @property
    def is_at_master(self) -> bool:
        """Whether its server is a master, as far as is known."""
        return self._role is None or self._role.is_master

    def start(self) -> None:
        """Begin to connect, in the background."""
        if self._task is None:
            self._task = asyncio.create_task(self._supervise(), name="relay-redis-publisher")

    async def stop(self) -> None:
        """Close the connection; what has no reply yet fails, and so does what comes later."""
        self._refusal = _STOPPING
        self._fail_all(_STOPPING)
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def wake(self) -> None:
        """Connect now, where it waits for its next attempt: Redis is there again."""
        self._wake.set()

    def reconnect(self) -> None:
        """Give the connection up for a new one."""
        if self._connection is not None:
            self._connection.abort()

    def mark_elsewhere(self, channel: bytes) -> None:
        """Publish no more markers on a channel that the subscription cannot hear."""
        for channels in (self._markers.heard, self._marker_channels):
            with suppress(ValueError):
                channels.remove(channel)

    def publish(self, channel: bytes, payload: bytes, sender: str | None = None) -> asyncio.Future[None]:
        """Publish one message; see `Broker.publish`."""
        return self._send(channel, payload, sender, ())

    def publish_counted(self, channel: bytes, payload: bytes) -> asyncio.Future[int]:
        """Publish one message; the future has the number of those who have received it."""
        return self._send(channel, payload, None, (), is_counted=True)

    async def ask(self, *command: str) -> Any:
        """Carry out a command and return its reply, an error among them. Raises BusUnavailable without connection."""
        if self._connection is None:
            raise BusUnavailable("there is no connection to Redis")
        reply = self._ask(self._connection, *command)
        _ = await asyncio.wait((reply,))
        if reply.cancelled():
            raise BusUnavailable("the connection to Redis has ended")
        return reply.result()

    def append(self, channel: bytes, args: tuple[bytes, ...]) -> asyncio.Future[None]:
        """Publish an event and append it to the history of its topic.

        Args: channel: of the topic; its stream has the same name.
              args: of ``publish.lua``: event, payload, and the topic's settings.
        """
        return self._send(channel, args[1], None, args)

    def _send(
        self,
        channel: bytes,
        payload: bytes,
        sender: str | None,
        history: tuple[bytes, ...],
        *,
        is_counted: bool = False,
    ) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        most, size = self._settings, len(channel) + len(payload)
        if self._refusal and not self._may_wait():
            future.set_exception(BusUnavailable(self._refusal))
            return future
        waiting = len(self._unanswered) + len(self._refused) + len(self._behind)
        if waiting >= most.publish_queue_max or self._bytes + size > most.publish_queue_max_bytes:
            future.set_exception(BusUnavailable("too many messages are waiting for Redis"))
            return future
        sent = Sent(future, self._clock(), size, channel, is_counted=is_counted, history=history)
        self._bytes += size
        if self._refused and history:
            self._behind.append(sent)
            return future
        self._unanswered.append(sent)
        connection = self._connection
        if connection is None:
            self._unsent.append((sent, payload, sender))
            self.start()
            return future
        self._write(connection, self._command(sent, payload, sender))
        return future

    def _write(self, connection: RedisConnection, command: bytes) -> None:
        """Write a command at the end of this turn of the event loop, with its others: each write is a system call."""
        if not self._outgoing:
            _ = asyncio.get_running_loop().call_soon(self._flush, connection)
        self._outgoing.append(command)

    def _flush(self, connection: RedisConnection) -> None:
        if connection is not self._connection:
            return  # it has ended, and what was to be sent on it has failed
        outgoing, self._outgoing = self._outgoing, []
        try:
            connection.write(b"".join(outgoing))
        except LinkLost as lost:
            self._lose(connection, str(lost))

    def _command(self, sent: Sent, payload: bytes, sender: str | None) -> bytes:
        """What publishes a message, as this connection may do it."""
        if sent.history:
            script = ("EVALSHA", PUBLISH.sha) if self._has_script else ("EVAL", PUBLISH.text)
            return packed([(*script, b"1", sent.channel, *sent.history)])
        if sender is None or not self._marker_channels:
            return packed([(b"PUBLISH", sent.channel, payload)])
        sent.marker_channel = self._marker_channels[0]
        marker = self._markers.pack(sender, sent.channel, payload)
        commands = [(b"PUBLISH", sent.marker_channel, marker), (b"PUBLISH", sent.channel, payload)]
        if self._is_atomic:
            sent.expects = 4
            return packed([(b"MULTI",), *commands, (b"EXEC",)])
        sent.expects = 2
        means = "an event of a process that excludes its sender may be mistaken for an equal one published meanwhile"
        self._owner.report_denied("MULTI", means, "+multi +exec")
        return packed(commands)

    def _may_wait(self) -> bool:
        """Whether a new attempt to connect is due, so that a message may wait for it."""
        if self._connection is not None or self._refusal == _STOPPING or self._clock() < self._wakes_at:
            return False
        self._refusal = ""
        self._wake.set()
        return True

    # Its connection.

    async def _supervise(self) -> None:
        """Keep a connection open until cancelled."""
        attempt = 0
        while True:
            fault, was_open = await self._serve()
            attempt = 0 if was_open else attempt + 1
            limit_s = min(self._settings.backoff_max_s, self._settings.backoff_min_s * 2 ** min(attempt, 20))
            if not was_open:
                self._refusal = fault
                self._fail_all(fault)
                self._wakes_at = self._clock() + self._settings.backoff_min_s
                if attempt == 1:
                    _logger.warning("publishing connection to %s failed: %s; trying again", self._owner.address, fault)
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(self._settings.backoff_min_s / 4, limit_s)):
                    await self._wake.wait()
            if not was_open:
                self._refusal = ""

    async def _serve(self) -> tuple[str, bool]:
        """Serve one connection to its end. Returns why it has ended, and whether it was open at all."""
        try:
            connection = await self._connections.open()
        except LinkLost as lost:
            return str(lost), False
        keeper: asyncio.Task[None] | None = None
        was_open, fault = False, _STOPPING
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                role = await connection.role()
            if role is None:
                self._owner.report_denied("ROLE", "whether Redis is a master is not checked", "+role")
            async with asyncio.timeout(self._settings.timeout_s):
                await self._check_markers(connection)
                self._has_script = await self._owner.prepare(connection)
            is_same = self._take_role(role or MASTER)
            if not self._refusal:
                connection.write(b"".join([self._command(*message) for message in self._unsent]))
                self._unsent.clear()
            was_open = True
            self._connection = connection
            if not is_same:
                self._owner.role_changed(role or MASTER)
            keeper = asyncio.create_task(self._keep(connection, asks_role=role is not None))
            await self._match_replies(connection)
        except TimeoutError:
            fault = f"no answer to ROLE, MULTI or SCRIPT within {self._settings.timeout_s:g} s"
        except LinkLost as lost:
            fault = str(lost)
        except hiredis.HiredisError as error:
            fault = words(error)
        finally:
            if keeper is not None:
                keeper.cancel()
            self._lose(connection, fault)
            await connection.close()
        return fault, was_open

    async def _check_markers(self, connection: RedisConnection) -> None:
        """See whether the user may use transactions, and publish markers where. Publishes nothing. Raises LinkLost."""
        connection.write(packed([("MULTI",), ("EXEC",)]))
        self._is_atomic = isinstance((await connection.reply(), await connection.reply())[1], list)
        channels = self._markers.channels
        denied: set[bytes] = set()
        if self._is_atomic:  # else a marker that is refused costs no message; see _outcome
            # Without arguments the last command is an error, by which Redis discards the others.
            checks = [("PUBLISH", channel, "") for channel in channels]
            connection.write(packed([("MULTI",), *checks, ("PUBLISH",), ("EXEC",)]))
            replies = [await connection.reply() for _ in range(len(checks) + 3)]
            denied = {channel for channel, reply in zip(channels, replies[1:-2], strict=True) if is_denied(reply)}
        # After the last reply: meanwhile the subscription may have found out that it does not hear one.
        self._marker_channels = [channel for channel in self._markers.heard if channel not in denied]

    def _lose(self, connection: RedisConnection, fault: str) -> None:
        """Fail what was sent on a connection that has ended; what comes later waits for the next."""
        if self._connection is connection:
            self._connection = None
            self._fail_all(fault)
            connection.abort()

    def _fail_all(self, fault: str) -> None:
        self._unsent.clear()
        self._outgoing.clear()
        failed = (*self._unanswered, *self._refused, *self._behind)
        self._unanswered, self._refused, self._behind, self._sent_last, self._bytes = deque(), [], [], None, 0
        for sent in failed:
            if not sent.channel:
                sent.future.cancel()
            elif not sent.future.done():
                sent.future.set_exception(BusUnavailable(fault))

    async def _match_replies(self, connection: RedisConnection) -> None:
        gets = connection.replies.gets
        while True:
            await connection.read()
            while (reply := gets()) is not False:
                if not self._unanswered:
                    raise LinkLost(words(reply) if isinstance(reply, hiredis.ReplyError) else "an unasked reply came")
                sent = self._unanswered[0]
                if sent.expects > 1:
                    sent.replies += (reply,)
                    if len(sent.replies) < sent.expects:
                        continue
                    reply = self._outcome(sent)
                _ = self._unanswered.popleft()
                self._bytes -= sent.size
                if not sent.channel:
                    self._take_answer(sent, reply)
                elif sent.future.done():
                    pass  # its caller has given up
                elif sent.history and isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOSCRIPT"):
                    self._hold(sent)
                elif isinstance(reply, hiredis.ReplyError):  # of this message alone: NOPERM, OOM
                    if not self._redirect(sent, reply):
                        sent.future.set_exception(BusUnavailable(f"PUBLISH {name_of(sent.channel)}: {words(reply)}"))
                else:
                    sent.future.set_result(reply if sent.is_counted else None)
                    if sent.history:
                        self._owner.appended(reply, int(sent.history[2]))
                if sent is self._sent_last:
                    self._send_again(connection)

    def _redirect(self, sent: Sent, error: hiredis.ReplyError) -> bool:
        """Have another node take a message, where there are several and this one has refused it."""
        return False

    def _hold(self, sent: Sent) -> None:
        """Keep a message that Redis has refused, having forgotten the script, until all before it are answered."""
        if not self._refused:
            self._sent_last = self._unanswered[-1] if self._unanswered else sent
        self._has_script = False
        self._refused.append(sent)
        self._bytes += sent.size

    def _send_again(self, connection: RedisConnection) -> None:
        """Send those that were kept, in the order of the calls, with the whole script."""
        again = (*self._refused, *self._behind)
        self._refused, self._behind, self._sent_last = [], [], None
        self._unanswered.extend(again)
        self._write(connection, b"".join([self._command(sent, b"", None) for sent in again]))

    def _outcome(self, sent: Sent) -> Any:
        """The reply to a message, out of those to it and its marker."""
        if sent.expects == 2:
            marker, message = sent.replies
            if is_denied(marker) and sent.marker_channel in self._marker_channels:
                self._marker_channels.remove(sent.marker_channel)
            return message
        *queued, executed = sent.replies
        if isinstance(executed, list):
            return executed[1]
        if is_denied(queued[0]):  # since a moment ago; the others were carried out one by one
            self._is_atomic = False
            return queued[2]
        return next((reply for reply in queued if isinstance(reply, hiredis.ReplyError)), executed)

    # What the server is.

    def _take_role(self, role: Role) -> bool:
        """Note what the server is; False where it was something else before."""
        before, self._role = self._role, role
        if role.is_master:
            self._refusal = ""
        else:
            self._refusal = not_published(self._owner.address, role)
            self._fail_all(self._refusal)
        if before != role and not (before is None and role.is_master):
            _logger.warning(
                "Redis role: %s is %s%s", self._owner.address, role, "" if role.is_master else "; pushes are refused"
            )
        return before is None or before == role

    def _take_answer(self, sent: Sent, reply: object) -> None:
        """Take the answer to a command of the publisher's own."""
        if not sent.future.done():
            sent.future.set_result(reply)
        if sent.asks_role and isinstance(reply, list):
            role = read_role(reply)
            if not self._take_role(role):
                self._owner.role_changed(role)
                raise LinkLost(f"{self._owner.address} has become {role}")

    async def _keep(self, connection: RedisConnection, *, asks_role: bool) -> None:
        """Ask for a sign of life at each interval; end a connection that gives none, or keeps a message too long."""
        settings = self._settings
        commands = ["ROLE", "PING"] if asks_role else ["PING"]
        asked_at = self._clock()
        asked: asyncio.Future[Any] | None = None
        while True:
            next_s = asked_at + (settings.ping_timeout_s if asked else settings.ping_interval_s) - self._clock()
            await asyncio.sleep(max(0.001, min(next_s, settings.timeout_s / 4)))
            now = self._clock()
            first = self._unanswered[0] if self._unanswered else None
            if first is not None and now - first.at > settings.timeout_s:
                # Once more round the loop: what has come while it was blocked is not read yet. Where replies come, if
                # late, the connection is kept.
                await asyncio.sleep(settings.timeout_s / 20)
                if self._unanswered and self._unanswered[0] is first:
                    self._give_up(connection, f"no reply within {settings.timeout_s:g} s")
                    return
            if asked is not None and asked.cancelled():
                return  # with its connection
            if asked is not None and asked.done():
                if is_denied(asked.result()):
                    denied = commands.pop(0)
                    self._owner.report_denied(
                        denied, "the connections are guarded by probes alone", f"+{denied.lower()}"
                    )
                asked = None
            if asked is not None and now - asked_at > settings.ping_timeout_s:
                await asyncio.sleep(settings.ping_timeout_s / 4)  # for the same reason
                if not asked.done() and self._clock() - connection.read_at > settings.ping_timeout_s:
                    self._give_up(connection, f"no answer to {commands[0]} within {settings.ping_timeout_s:g} s")
                    return
            elif asked is None and now - asked_at >= settings.ping_interval_s:
                if not self.is_at_master:
                    connection.abort()  # for a new one: by now the address may lead to a master
                    return
                asked_at = now
                asked = self._ask(connection, commands[0]) if commands else None

    def _give_up(self, connection: RedisConnection, fault: str) -> None:
        _logger.warning("publishing connection to %s lost: %s", self._owner.address, fault)
        self._lose(connection, fault)

    def _ask(self, connection: RedisConnection, *command: str) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._unanswered.append(Sent(future, self._clock(), 0, asks_role=command == ("ROLE",)))
        self._write(connection, packed([command]))
        return future
