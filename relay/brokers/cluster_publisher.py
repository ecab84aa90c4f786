"""Publishing to one master of a Redis Cluster.

Owns what is sent there, and has other nodes take what this one refuses because its slots have moved; must not know the
map of slots. A refused message was not carried out: to send it again is not to send it twice. Those of one slot keep
their order: what is published meanwhile waits behind them.
"""

import asyncio
from typing import Any, Protocol

import hiredis

from relay.brokers.redis_connection import RedisConnection, packed
from relay.brokers.redis_publisher import Publisher, PublisherOwner, Sent
from relay.brokers.redis_scripts import SHARDED_PUBLISH
from relay.errors import BusUnavailable

_ASKING = packed([("ASKING",)])


class ShardPublisherOwner(PublisherOwner, Protocol):
    """The master, as its publisher knows it."""

    push_prefixes: tuple[bytes, ...]
    """What the channels of clients' pushes begin with."""

    def held_for(self, channel: bytes) -> list[Sent] | None:
        """Where a message has to wait for others of its slot; None where it need not."""

    def redirect(self, sent: Sent, error: hiredis.ReplyError) -> bool:
        """Have another node take a message that was refused; False where that is no matter of nodes."""


class ShardPublisher(Publisher):
    """Publishes, and asks the server each ``ping_interval_s`` what it is."""

    _owner: ShardPublisherOwner

    async def _check_markers(self, connection: RedisConnection) -> None:
        """Nothing: a message on the channel of a topic has a place for its sender."""

    def _send(
        self,
        channel: bytes,
        payload: bytes,
        sender: str | None,
        history: tuple[bytes, ...],
        *,
        is_counted: bool = False,
    ) -> asyncio.Future[Any]:
        holds = self._owner.held_for(channel)
        if holds is None:
            return super()._send(channel, payload, sender, history, is_counted=is_counted)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if len(holds) >= self._settings.publish_queue_max:
            future.set_exception(BusUnavailable("too many messages are waiting for a slot that moves"))
            return future
        size = len(channel) + len(payload)
        sent = Sent(future, self._clock(), size, channel, is_counted=is_counted, history=history, payload=payload)
        holds.append(sent)
        return future

    def _command(self, sent: Sent, payload: bytes, sender: str | None) -> bytes:
        sent.payload = payload
        if sent.history:
            script = ("EVALSHA", SHARDED_PUBLISH.sha) if self._has_script else ("EVAL", SHARDED_PUBLISH.text)
            return packed([(*script, b"1", sent.channel, *sent.history)])
        # Pushes of clients go to programs that listen with patterns, which sharded channels do not have.
        is_push = sent.channel.startswith(self._owner.push_prefixes)
        return packed([(b"PUBLISH" if is_push else b"SPUBLISH", sent.channel, payload)])

    def _redirect(self, sent: Sent, error: hiredis.ReplyError) -> bool:
        return self._owner.redirect(sent, error)

    def resend(self, sent: Sent, *, asking: bool = False) -> None:
        """Send what another node has refused; ``asking`` where its slot is on its way to this one."""
        connection = self._connection
        if sent.future.done():
            return
        if self._refusal and not self._may_wait():
            sent.future.set_exception(BusUnavailable(self._refusal))
            return
        sent.expects, sent.replies = 2 if asking else 1, ()
        self._unanswered.append(sent)
        self._bytes += sent.size
        if connection is None:  # a node that was added just now
            self._unsent.append((sent, sent.payload, None))
            self.start()
            return
        self._write(connection, (_ASKING if asking else b"") + self._command(sent, sent.payload, None))

    def barrier(self) -> asyncio.Future[object]:
        """A future that is done when all that was sent before has its reply, or the connection has ended."""
        if self._connection is None:
            future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
            future.cancel()
            return future
        return self._ask(self._connection, "PING")
