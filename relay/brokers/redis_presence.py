"""Presence in Redis: for each topic and node a hash of the node's members, and a lease for each node.

Owns the keys; must not know who is shown what::

    presence:room:1|5c1e…     hash: ref → [key, meta, previous ref]
    presence:|5c1e…           set: the topics of which this node has members; no topic is called ""
    presence:nodes            sorted set: node → when its lease ends, in ms by Redis's clock
    presence:nodes:written    sorted set: node → number of its last write; negative where members are missing

No key has a lifetime of its own: 100 000 members would cost thousands of writes a second. Those of a dead node are
removed by the first that sees its lease ended for long.
"""

import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import hiredis
import msgspec

from relay.brokers.base import PRESENCE_CHANNEL, Lease, Numbering, OwnChange
from relay.brokers.redis_commands import RedisCommands
from relay.brokers.redis_connection import Connections, words
from relay.brokers.redis_scripts import NUMBER_WRITE, RENEW_LEASE, Script
from relay.config import Config
from relay.errors import BusUnavailable
from relay.protocol.presence import Member, Members, is_member

_SCAN_COUNT = 500
"""Members read at a time: a whole hash of 100 000 would block Redis for seconds."""

_REMOVE_COUNT = 100
_SWEEP_S = 30


class _Value(msgspec.Struct, array_like=True):
    key: str
    meta: msgspec.Raw
    previous: str = ""


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Value).decode


class RedisPresence:
    """Keeps the members of one node; see `PresenceStore`.

    Args: connections: where to connect; the caller closes it.
          commands: sends commands, in place of what would be made of ``connections``.
    """

    prefix: str = "presence:"
    publish: str = "PUBLISH"
    renew_script: Script = RENEW_LEASE

    def __init__(self, connections: Connections, config: Config, commands: RedisCommands | None = None) -> None:
        self._commands = commands or RedisCommands(connections, config.redis.timeout_s, "relay-redis-presence")
        self._nodes = f"{self.prefix}nodes"
        self._written = f"{self._nodes}:written"
        self.node: str = uuid.uuid4().hex[:12]
        self._lease_ms = round(config.presence.lease_s * 1000)

    async def write(self, changes: Sequence[OwnChange], message: bytes, numbering: Numbering) -> bool:
        """Write changes of this node's members and publish a message about them, as one step."""
        number, known, is_whole = numbering
        commands: list[tuple[object, ...]] = [
            ("MULTI",),
            # By its text: a transaction goes on behind a script that the server does not have yet.
            ("EVAL", NUMBER_WRITE.text, 1, self._written, self.node, number, known, int(is_whole)),
        ]
        for topic, change, is_empty in changes:
            key, topics = self._key(topic, self.node), self._topics(self.node)
            if is_empty:
                commands += [("UNLINK", key), ("SREM", topics, topic)]
                continue
            if change.leaves:
                commands.append(("HDEL", key, *change.leaves))
            if change.joins:
                pairs = [each for member in change.joins.values() for each in (member.ref, _pack(member))]
                commands += [("HSET", key, *pairs), ("SADD", topics, topic)]
        commands += [(self.publish, PRESENCE_CHANNEL, message), ("EXEC",)]
        answers = await self._commands.ask_all(commands)
        if not isinstance(answers[-1], list):
            raise BusUnavailable("EXEC: the transaction was discarded")
        return bool(answers[-1][0])

    async def clear(self) -> None:
        """Remove this node's members, before they are written again."""
        await self._clear(self.node)

    async def _clear(self, node: str) -> None:
        # First, so that no other node takes what is left for all.
        _ = await self._commands.ask("ZREM", self._written, node)
        while topics := await self._commands.ask("SPOP", self._topics(node), _REMOVE_COUNT):
            _ = await self._commands.ask("UNLINK", *(self._key(topic.decode(), node) for topic in topics))

    async def renew(self, message: bytes, known: int, *, is_new: bool) -> Lease:
        """Renew this node's lease, and publish a message."""
        args = (self.node, self._lease_ms, PRESENCE_CHANNEL, message, known, int(is_new))
        held, *flat = await self._commands.run(self.renew_script, (self._nodes, self._written), *args)
        nodes = {node.decode(errors="replace"): left / 1000 for node, left in zip(flat[::2], flat[1::2], strict=True)}
        return Lease(bool(held), nodes)

    async def read(self, topic: str, node: str, known: int) -> Members | None:
        """The members of one node; None where not all that it has written is there."""
        members: Members = {}
        written = ("ZSCORE", self._written, node)
        cursor: Any = b"0"
        while True:
            # Asked before and after: they may be lost meanwhile, and written again.
            before, (cursor, flat), after = await self._commands.ask_all(
                [written, ("HSCAN", self._key(topic, node), cursor, "COUNT", _SCAN_COUNT), written]
            )
            if any(number is None or float(number) < known for number in (before, after)):
                return None
            for ref, data in zip(flat[::2], flat[1::2], strict=True):
                with suppress(msgspec.MsgspecError, RecursionError, UnicodeError):  # what another program has put there
                    value = _decode(data)
                    if not is_member(value.key, value.meta):
                        continue
                    members[ref.decode()] = Member(ref.decode(), value.key, bytes(value.meta), value.previous)
            if cursor == b"0":
                return members

    async def lost(self, topics: Sequence[str]) -> list[str]:
        """Those of these topics, of which this node has members, that have none of them left."""
        found: list[str] = []
        commands = [("HSCAN", self._key(topic, self.node), "0", "COUNT", 1) for topic in topics]
        for topic, (_, key, *_), reply in zip(topics, commands, await self._commands.replies(commands), strict=True):
            if isinstance(reply, list) and reply[1]:
                continue
            if isinstance(reply, hiredis.ReplyError):
                if not str(reply).startswith("WRONGTYPE"):
                    raise BusUnavailable(f"HSCAN {key}: {words(reply)}")
                _ = await self._commands.ask("UNLINK", key)  # what another program has put in its place
            found.append(topic)
        return found

    async def numbers(self, nodes: Sequence[str]) -> list[int | None]:
        """The number of each node's last write; None where Redis has lost it."""
        answers = await self._commands.ask_all([("ZSCORE", self._written, node) for node in nodes]) if nodes else []
        return [None if answer is None else abs(int(float(answer))) for answer in answers]

    async def nodes(self) -> list[str]:
        """All nodes whose lease has not run out."""
        seconds, micros = await self._commands.ask("TIME")
        now = int(seconds) * 1000 + int(micros) // 1000
        return [
            node.decode(errors="replace")
            for node in await self._commands.ask("ZRANGEBYSCORE", self._nodes, now, "+inf")
        ]

    async def remove(self, node: str, message: bytes = b"") -> None:
        """Remove all members of a node, and its lease."""
        if node != self.node:
            if await self._commands.ask("SET", f"{self._nodes}:sweep:{node}", self.node, "NX", "EX", _SWEEP_S) is None:
                return  # another node does it
        await self._clear(node)
        _ = await self._commands.ask("ZREM", self._nodes, node)
        if message:
            _ = await self._commands.ask(self.publish, PRESENCE_CHANNEL, message)

    def _key(self, topic: str, node: str) -> str:
        return f"{self.prefix}{topic}|{node}"

    def _topics(self, node: str) -> str:
        return f"{self.prefix}|{node}"

    def reconnect(self) -> None:
        """Give the connection up: its server is no longer what it was."""
        self._commands.reconnect()

    async def close(self) -> None:
        """End the connection."""
        await self._commands.close()


def _pack(member: Member) -> bytes:
    return _encode(_Value(member.key, msgspec.Raw(member.meta), member.previous))
