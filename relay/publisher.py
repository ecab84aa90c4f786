"""`Publisher` and `AsyncPublisher`: publish events from any Python program, without a relay in it.

Owns what such a program calls, and which Redis is meant; how events become commands is in
`relay.brokers.redis_target`. The core of the package is enough: no web server is imported.
"""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias
from weakref import WeakKeyDictionary

from pydantic import ValidationError

from relay import redis_url, runtime_dir
from relay.brokers.cluster_commands import BlockingCluster, ClusterCommands
from relay.brokers.redis_blocking import Ask, BlockingConnections
from relay.brokers.redis_commands import FOR_PUBLISHERS, RedisCommands, Turns
from relay.brokers.redis_connection import Connections, LinkLost, RedisConnection, is_denied
from relay.brokers.redis_target import QUESTIONS, Command, Outgoing, Published, Target
from relay.config import EMBEDDED, Config
from relay.config_sources import explain, load
from relay.errors import BusUnavailable, ConfigError
from relay.plugins.hooks import to_payload
from relay.protocol.topics import check_names

__all__ = ["AsyncPublisher", "Publisher", "Published"]

_Commands: TypeAlias = RedisCommands | ClusterCommands


class _Publisher:
    """What both publishers have in common."""

    def __init__(self, config: Config | str, **settings: Any) -> None:
        if isinstance(config, str):
            settings = {"redis_url": config, **settings}
            try:
                config = Config(**settings)
            except ValidationError as error:
                raise ConfigError(*explain(error, [(type(self).__name__, settings)])) from None
        elif settings or not isinstance(config, Config):
            raise TypeError(f"expected an address with settings, or a Config without, got a {type(config).__name__}")
        config = config.model_copy(update={"redis_url": _address_of(config)})
        self._address = redis_url.parse(config.redis_url)
        self._cluster = redis_url.parse_cluster(config.redis_url)
        self._timeout_s = config.redis.timeout_s
        self._target = Target(config)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Create a publisher from a relay's TOML file and ``RELAY_…`` variables. Raises ConfigError."""
        return cls(load(path))

    @classmethod
    def from_env(cls) -> Self:
        """Create a publisher from ``RELAY_…`` variables, such as ``RELAY_REDIS_URL`` and ``RELAY_CONFIG``.

        Raises: ConfigError.
        """
        return cls(load())

    def _encode(self, events: Iterable[tuple[str, str, object]]) -> list[Outgoing]:
        encoded: list[Outgoing] = []
        for topic, event, payload in events:
            check_names(topic, event)
            encoded.append((topic, event, bytes(to_payload(payload))))
        return encoded

    def _unavailable(self, error: Exception) -> BusUnavailable:
        text = str(error)
        return BusUnavailable(text if self._target.address in text else f"{text} ({self._target.address})")


class Publisher(_Publisher):
    """Publishes events from code without an event loop: Django, Flask, Celery, a script.

        publisher = Publisher("redis://localhost:6379")
        publisher.publish("room:1", "new_msg", {"text": "hi"})

    One object serves a whole program: any thread may use it, and a forked process has connections of its own. It
    connects at the first event, and again after a fault. An event of a topic with a history is appended to that; which
    topics have one is read from Redis, where the relays write it, when it connects and every 60 s, and each second
    while it is not there. If the settings
    have ``topics`` or prefixes, they count instead. ``Publisher.from_file("relay.toml")`` and ``Publisher.from_env()``
    take the settings of a relay.

    Args:   config: address of Redis or Valkey, as of ``redis_url``, or a `Config`; ``"embedded"`` for that of the relay
                that was started last on this machine.
            settings: settings as of `Config`, such as ``redis={"timeout_s": 2}``.
    Raises: ConfigError: an invalid address or setting.
    """

    def __init__(self, config: Config | str, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._connections: BlockingConnections | BlockingCluster = (
            BlockingConnections(self._address, self._timeout_s, self._ask_questions)
            if self._cluster is None
            else BlockingCluster(self._cluster, self._timeout_s, self._ask_questions)
        )

    def publish(self, topic: str, event: str, payload: object) -> Published:
        """Publish an event to all subscribers of a topic; return when Redis has accepted it.

        Args:   payload: as of `Relay.publish`: JSON-serializable values, Pydantic models, dataclasses, dates, or bytes.
        Raises: BusUnavailable: Redis has not accepted it, or has not said so within ``redis.timeout_s``; it is not sent
                    again, since that could deliver it twice.
                ValueError: an invalid topic or event, or a payload that relays would drop.
                TypeError: the payload is not JSON-serializable.
        """
        return self.publish_many([(topic, event, payload)])[0]

    def publish_many(self, events: Iterable[tuple[str, str, object]]) -> list[Published]:
        """Publish several events, in order, in one round trip; each is topic, event and payload.

        Raises: as of `publish`. After ValueError and TypeError nothing has been published, after BusUnavailable some
                events may have been.
        """
        encoded = self._encode(events)
        if not encoded:
            return []
        try:
            with self._connections.connection() as ask:
                if self._target.take_due():
                    self._ask_questions(ask)
                self._target.check(encoded)
                replies = self._send(ask, encoded)
        except LinkLost as lost:
            raise self._unavailable(lost) from lost
        return self._target.results(encoded, replies)

    def _send(self, ask: Ask, events: Sequence[Outgoing]) -> Sequence[object]:
        commands = self._target.commands(events, with_script=len(events) > 1)
        replies = ask(commands)
        if self._target.needs_script(commands, replies):
            commands = self._target.commands(events, with_script=True)
            replies = ask(commands)
        return self._target.take_replies(commands, replies)

    def _ask_questions(self, ask: Ask) -> None:
        self._target.learn(*ask(QUESTIONS))

    def close(self) -> None:
        """Close the connections; one on which another thread publishes stays. A later event makes a new one."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncPublisher(_Publisher):
    """Publishes events from ``async def``: the twin of `Publisher`, with the same arguments and errors.

        publisher = AsyncPublisher("redis://localhost:6379")
        await publisher.publish("room:1", "new_msg", {"text": "hi"})

    Events that are published at the same time share a connection and a round trip, in the order of the calls. Each
    event loop that uses it has a connection of its own.
    """

    def __init__(self, config: Config | str, **settings: Any) -> None:
        super().__init__(config, **settings)
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = WeakKeyDictionary()

    async def publish(self, topic: str, event: str, payload: object) -> Published:
        """Publish an event to all subscribers of a topic; return when Redis has accepted it.

        Raises: BusUnavailable, ValueError, TypeError: as of `Publisher.publish`.
        """
        return (await self.publish_many([(topic, event, payload)]))[0]

    async def publish_many(self, events: Iterable[tuple[str, str, object]]) -> list[Published]:
        """Publish several events, in order, in one round trip; each is topic, event and payload.

        Raises: as of `Publisher.publish_many`.
        """
        encoded = self._encode(events)
        if not encoded:
            return []
        target, loop = self._target, self._loop()
        commands = loop.commands
        try:
            await commands.connect()
            await self._ask_if_due(loop)
            target.check(encoded)
            sent = target.commands(encoded, with_script=len(encoded) > 1 or not loop.has_script)
            replies = await commands.replies(sent)
            if target.needs_script(sent, replies):
                loop.forget_script(replies[0])
                sent = target.commands(encoded, with_script=True)
                replies = await commands.replies(sent)
            loop.learn_script(sent, replies)
            answers = target.take_replies(sent, replies)
        except LinkLost as lost:
            commands.reconnect()
            raise self._unavailable(lost) from lost
        except BusUnavailable as error:
            raise self._unavailable(error) from error
        return target.results(encoded, answers)

    def _loop(self) -> "_Loop":
        """What the running event loop has."""
        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None:
            if self._cluster is not None:
                found = _Loop(None, ClusterCommands(self._cluster, self._timeout_s, self._ask_questions))
            else:
                connections = _Prepared(self)
                found = _Loop(connections, RedisCommands(connections, self._timeout_s, FOR_PUBLISHERS))
            self._loops[loop] = found
        return found

    async def _ask_if_due(self, loop: "_Loop") -> None:
        """Ask the questions again where they are due; events that come meanwhile wait too, or they would overtake."""
        is_due = not loop.turns.are_taken and self._target.take_due()
        if not is_due and not loop.turns.are_taken:
            return
        async with loop.turns:
            if is_due:
                asking = self._ask_questions(loop.commands)
                loop.asking = asyncio.create_task(asking, name="relay-publisher-questions")
                await asyncio.shield(loop.asking)

    async def _ask_questions(self, commands: _Commands) -> None:
        replies = await commands.replies(QUESTIONS)
        try:
            self._target.learn(*replies)
        except LinkLost as lost:
            commands.reconnect()
            raise BusUnavailable(str(lost)) from lost

    async def close(self) -> None:
        """Close the connection of the running event loop. A later event makes a new one."""
        found = self._loops.pop(asyncio.get_running_loop(), None)
        if found is not None:
            await found.commands.close()
            if found.connections is not None:
                await found.connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _Loop:
    """What one event loop has."""

    def __init__(self, connections: "_Prepared | None", commands: _Commands) -> None:
        self.connections: _Prepared | None = connections
        self.commands: _Commands = commands
        self.asking: asyncio.Task[None] | None = None
        self.turns: Turns = Turns()

    @property
    def has_script(self) -> bool:
        """Whether Redis knows the script, as far as is known; a cluster has many servers, which are asked first.

        An event that is refused since Redis does not know it would be sent again behind those that came after it.
        """
        return self.connections is None or self.connections.has_script

    def learn_script(self, commands: Sequence[Command], replies: Sequence[object]) -> None:
        """Learn that Redis has been given the script, if it has."""
        if self.connections is not None and self.connections.may_use_sha:
            pairs = zip(commands, replies, strict=True)
            self.connections.has_script |= any(each[0] == "EVAL" and isinstance(reply, bytes) for each, reply in pairs)

    def forget_script(self, refusal: object) -> None:
        """Learn that Redis does not know the script any more, or that its user may not run it by its digest."""
        if self.connections is not None:
            self.connections.learn_refusal(refusal)


class _Prepared(Connections):
    """Makes connections that a publisher may use: to a master, with the settings of the relays there read."""

    def __init__(self, publisher: AsyncPublisher) -> None:
        super().__init__(publisher._address, publisher._timeout_s)
        self._target = publisher._target
        self.has_script: bool = False
        """Whether the server of the last connection knows the script, as far as is known."""
        self.may_use_sha: bool = True
        """Whether its user may run the script by its digest."""

    async def open(self) -> RedisConnection:
        """Connect, and learn what has to be known. Raises LinkLost."""
        opened = await super().open()
        self.has_script, self.may_use_sha = False, True
        try:
            self._target.learn(*[await opened.ask(*question) for question in QUESTIONS])
            if (question := self._target.script_question()) is not None:
                self.has_script = True
                self.learn_refusal(await opened.ask(*question))
        except BaseException:
            await opened.close()
            raise
        return opened

    def learn_refusal(self, reply: object) -> None:
        """Learn from the reply to the script's digest; other errors are no matter of the script."""
        if is_denied(reply):
            self.has_script = self.may_use_sha = False
        elif str(reply).startswith("NOSCRIPT"):
            self.has_script = False


def _address_of(config: Config) -> str:
    """The address of the Redis that is meant. Raises ConfigError."""
    if config.redis_url and config.redis_url != EMBEDDED:
        return runtime_dir.with_password(config.redis_url)
    if config.broadcast_url:
        raise ConfigError("broadcast_url: publishing from outside needs Redis; use POST /api/publish instead")
    running = runtime_dir.newest()
    if running is None:
        raise ConfigError(
            "no Redis is configured and no relay with an embedded one runs here; set redis_url, or give --redis-url"
        )
    return running
