"""What ``relay check --connect`` finds out: what a Redis is, what its user may do, whether a message comes back.

Owns these questions and the sentences about their answers; must not know who reads them. Nothing is changed in Redis:
commands are tried inside of ``MULTI``, where Redis checks the permission at once, and the connection is closed before
any of them is carried out. What is published is a probe, which relays ignore.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import hiredis

from relay import redis_url
from relay.brokers.base import NODE_CHANNEL, PRESENCE_CHANNEL
from relay.brokers.redis_connection import Connections, LinkLost, RedisConnection, words
from relay.brokers.redis_marker import Markers
from relay.brokers.redis_scripts import FUNCTION_NAME
from relay.brokers.redis_settings import is_unknown
from relay.config import SETTINGS_KEY, Config
from relay.protocol.topics import glob_escape

_PUBSUB_MIN_BYTES = 8 * 1024 * 1024
"""Least hard limit of ``client-output-buffer-limit pubsub``: with less, a burst of events cuts a relay off."""

_TRIED = "relay:check"
"""A topic that no client can have joined."""


class Finding(NamedTuple):
    """One thing that was found out."""

    about: str
    """``redis``, ``limits``, ``user``, ``probe``; or ``warning`` where something does not work."""
    text: str


async def examine(config: Config) -> list[Finding]:
    """Ask the Redis of a configuration; what cannot be found out is said too, and nothing is raised."""
    address = redis_url.shown(config.redis_url)
    connections = Connections(redis_url.parse(config.redis_url), config.redis.timeout_s)
    found: list[Finding] = []
    async for each in _sentinels(connections, config):
        found.append(each)  # noqa: PERF401 - what came before an error is kept
    try:
        async with connected(connections, config.redis.timeout_s) as connection:
            async for each in Examination(config, connections, connection, address).findings():
                found.append(each)  # noqa: PERF401 - as above
    except LinkLost as lost:
        found.append(Finding("warning", f"redis: {address}: {lost}"))
    return found


@asynccontextmanager
async def connected(connections: Connections, limit_s: float) -> AsyncIterator[RedisConnection]:
    """A connection for the block, closed at its end with what has made it. Raises LinkLost.

    Args: limit_s: seconds for each answer.
    """
    try:
        connection = await connections.open()
        connection.limit_s = limit_s
        try:
            yield connection
        finally:
            await connection.close()
    finally:
        await connections.close()


async def _sentinels(connections: Connections, config: Config) -> AsyncIterator[Finding]:
    """What each Sentinel says of the master."""
    sentinel = redis_url.parse(config.redis_url).sentinel
    if sentinel is None:
        return
    places: dict[str, str] = {}
    for (host, port), client in zip(sentinel.hosts, connections.sentinels, strict=True):
        try:
            async with asyncio.timeout(config.redis.timeout_s):
                place: Any = await client.execute_command(  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
                    "SENTINEL GET-MASTER-ADDR-BY-NAME", sentinel.service
                )
        except Exception as error:  # redis-py's, the event loop's, or the time limit's
            yield Finding("warning", f"redis: Sentinel {host}:{port} does not answer: {words(error)}")
            continue
        if not place:
            yield Finding("warning", f"redis: Sentinel {host}:{port} knows no master {sentinel.service}")
            continue
        places[f"{host}:{port}"] = f"{_text(place[0])}:{_text(place[1])}"
    for place in dict.fromkeys(places.values()):
        names = ", ".join(name for name, named in places.items() if named == place)
        yield Finding("redis", f"Sentinel {names}: {sentinel.service} is at {place}")
    if len(set(places.values())) > 1:
        yield Finding("warning", f"redis: the Sentinels name different masters of {sentinel.service}")


class Examination:
    """The questions to one server, on one connection; the subscription has another."""

    publish: str = "PUBLISH"

    def __init__(self, config: Config, connections: Connections, connection: RedisConnection, address: str) -> None:
        self._config = config
        self._connections = connections
        self._connection = connection
        self._address = address
        self._major = 0

    async def findings(self) -> AsyncIterator[Finding]:
        """Ask one question after the other. Raises LinkLost."""
        for part in (self._server, self._role, self._limits, self._probe, self._permissions):
            async for each in part():
                yield each

    async def _info(self, section: str) -> dict[str, str] | None:
        """A section of ``INFO``; None where the user may not ask."""
        reply = await self._connection.ask("INFO", section)
        if isinstance(reply, hiredis.ReplyError):
            return None
        pairs = (line.partition(":") for line in _text(reply).splitlines() if ":" in line)
        return {name: value for name, _, value in pairs}

    async def _server(self) -> AsyncIterator[Finding]:
        info = await self._info("server")
        if info is None:
            yield Finding("redis", f"{self._address}; its version is not known: allow +info")
            return
        compatible = info.get("redis_version", "")
        self._major = int(compatible.partition(".")[0]) if compatible.partition(".")[0].isdecimal() else 0
        yield Finding("redis", f"{_kind(info)} at {self._address}")
        if self.publish == "PUBLISH" and "cluster" in (info.get("redis_mode"), info.get("server_mode")):
            means = "histories and presence do not work" if self._stores else "each of its nodes receives every event"
            text = f"redis: this is a node of a cluster: {means}; expected redis+cluster://{self._address}"
            yield Finding("warning", text)
        if self._config.has_history:
            async for each in self._function():
                yield each

    @property
    def _stores(self) -> bool:
        return self._config.has_history or self._config.has_presence

    async def _function(self) -> AsyncIterator[Finding]:
        reply = await self._connection.ask("FUNCTION", "LIST", "LIBRARYNAME", FUNCTION_NAME)
        if isinstance(reply, hiredis.ReplyError):
            if is_unknown(reply):
                yield Finding(
                    "redis", "no functions, which Redis 7.0 has first: other programs publish history with EVAL"
                )
            else:
                yield Finding("redis", f"function {FUNCTION_NAME}: {words(reply)}; allow +function|list +function|load")
        else:
            said = "is loaded" if reply else "is not loaded; a relay loads it when it connects"
            yield Finding("redis", f"function {FUNCTION_NAME} {said}")

    async def _role(self) -> AsyncIterator[Finding]:
        try:
            role = await self._connection.role()
        except LinkLost as lost:  # a Sentinel, or an error other than NOPERM
            yield Finding("warning", f"redis: {lost}")
            return
        if role is None:
            yield Finding("redis", "its role is not known: allow +role, or only probes find a failover")
        elif role.is_master:
            yield Finding("redis", "it is a master")
        else:
            yield Finding("warning", f"redis: it is {role}: pushes are refused; expected a master")

    async def _limits(self) -> AsyncIterator[Finding]:
        limit = await self._setting("client-output-buffer-limit")
        if limit is None:
            yield Finding("limits", "client-output-buffer-limit and maxclients are not known: allow +config|get")
            return
        hard, soft, seconds = _pubsub_limit(limit)
        text = f"client-output-buffer-limit pubsub {hard} {soft} {seconds}"
        if 0 < hard < _PUBSUB_MIN_BYTES:
            yield Finding("warning", f"redis: {text}: a burst of events cuts relays off; expected {_PUBSUB_MIN_BYTES}")
        else:
            yield Finding("limits", f"{text} (bytes, bytes, s)")
        async for each in self._connections_left():
            yield each
        policy = await self._setting("maxmemory-policy")
        most = await self._setting("maxmemory")
        if self._stores and most not in (None, "0") and policy is not None and policy.startswith("allkeys"):
            yield Finding(
                "warning",
                f"redis: maxmemory-policy {policy} evicts histories and members; expected volatile-ttl or noeviction",
            )

    async def _connections_left(self) -> AsyncIterator[Finding]:
        most = await self._setting("maxclients")
        if most is None or not most.isdecimal():
            return
        config, used = self._config, (await self._info("clients") or {}).get("connected_clients", "")
        need = self._connections_each * config.workers
        text = f"maxclients {most}; a relay with {config.workers} process{'es' * (config.workers > 1)} takes {need}"
        if used:
            text += f", and {used} {'is' if used == '1' else 'are'} in use"
        if need > int(most) - (int(used) - 1 if used.isdecimal() else 0):  # one of them is this program
            yield Finding("warning", f"redis: {text}: not enough")
        else:
            yield Finding("limits", text)

    @property
    def _connections_each(self) -> int:
        """The most connections that one process has to this server."""
        return 2 + self._config.has_history + self._config.has_presence

    async def _setting(self, name: str) -> str | None:
        """A setting of the server; None where the user may not ask."""
        reply = await self._connection.ask("CONFIG", "GET", name)
        if isinstance(reply, hiredis.ReplyError) or not reply:
            return None
        return _text(next(iter(reply.values())) if isinstance(reply, dict) else reply[1])

    # What the user may do.

    async def _permissions(self) -> AsyncIterator[Finding]:
        tried = list(self._commands())
        reply = await self._connection.ask("MULTI")
        if isinstance(reply, hiredis.ReplyError):
            needed = _joined(rule for _, rule, _ in tried)
            text = (
                f"which commands it may use is not known ({words(reply)}): allow +multi for this check, or compare with"
            )
            yield Finding("user", f"{text} what is needed: {needed}")
            return
        missing: dict[str, list[str]] = {}
        unknown: dict[str, list[str]] = {}
        for command, rule, means in tried:
            reply = await self._connection.ask(*command)
            if not isinstance(reply, hiredis.ReplyError) or str(reply).startswith(("MOVED", "ASK")):
                continue
            if is_unknown(reply):
                unknown.setdefault(means, []).append(command[0])
            else:
                missing.setdefault(means, []).append(rule)
        for means, rules in missing.items():
            yield Finding("warning", f"redis: {means}: allow {_joined(rules)}")
        for means, names in unknown.items():
            yield Finding("warning", f"redis: {means}: this server knows no {', '.join(dict.fromkeys(names))}")
        if not missing and not unknown:
            yield Finding(
                "user", f"may use the {len({command[0] for command, _, _ in tried})} commands that are needed"
            )

    def _commands(self) -> Iterator[tuple[Sequence[str], str, str]]:
        """What a relay does with these settings, the ACL rule that allows it, and what its absence means."""
        redis = self._config.redis
        to_prefix = redis.topic_prefix if redis.publish_form == "topic" else redis.to_prefix
        channels = [
            (f"{to_prefix}{_TRIED}", f"{to_prefix}*", "events of REST and plugins are refused"),
            (f"{redis.from_prefix}{_TRIED}", f"{redis.from_prefix}*", "pushes of clients are refused"),
        ]
        if redis.push_identity:
            channels.append((f"{redis.from_user_prefix}{_TRIED}", f"{redis.from_user_prefix}*", channels[-1][2]))
        if redis.control_channel:
            channels.append((redis.control_channel,) * 2 + ("disconnect and kick do not reach other nodes",))
        if self._config.has_history:
            key = f"{redis.topic_prefix}{_TRIED}"
            channels.append((key, f"{redis.topic_prefix}*", _NO_HISTORY))
        if self._config.has_presence:
            channels.append((PRESENCE_CHANNEL, PRESENCE_CHANNEL, _NO_PRESENCE))
        if self._answers_for_others:
            channels.append((f"{NODE_CHANNEL}{_TRIED}", f"{NODE_CHANNEL}*", _NO_OTHERS))
        for channel, pattern, means in channels:
            # Pushes go to programs that listen with patterns, wherever they are connected.
            publish = "PUBLISH" if pattern in (f"{redis.from_prefix}*", f"{redis.from_user_prefix}*") else self.publish
            yield (publish, channel, ""), f"+{publish.lower()} &{pattern}", means
        yield ("PING",), "+ping", "the connections are guarded by probes alone"
        if self._config.has_history:
            yield from self._history_commands(f"{redis.topic_prefix}{_TRIED}", f"~{redis.topic_prefix}*")
        if self._config.has_presence:
            for name, *rest in _PRESENCE_COMMANDS:
                command = (name, "presence:nodes", *rest) if name not in ("EVAL", "EVALSHA", "TIME") else (name, *rest)
                yield command, f"+{name.lower()} ~presence:*", _NO_PRESENCE

    def _history_commands(self, key: str, pattern: str) -> Iterator[tuple[Sequence[str], str, str]]:
        for name, *rest in _HISTORY_COMMANDS:
            command = tuple(key if word == "KEY" else word for word in (name, *rest))
            rule = f"+{name.lower()}|{rest[0].lower()}" if name in ("XINFO", "MEMORY", "SCRIPT") else f"+{name.lower()}"
            yield command, f"{rule} {pattern}" if key in command else rule, _NO_HISTORY
        yield (
            ("HSET", SETTINGS_KEY, "a", "b"),
            f"+hset ~{SETTINGS_KEY}",
            "`relay publish` needs the configuration file",
        )

    # Whether a message comes back.

    async def _probe(self) -> AsyncIterator[Finding]:
        redis = self._config.redis
        async with self._subscription() as (subscription, missing):
            for command, name, means in missing:
                rule = "+unsubscribe" if command == "UNSUBSCRIBE" else f"+{command.lower()} &{name}"
                yield Finding("warning", f"redis: {command} {name} is refused, so {means}: allow {rule}")
            refused = {name for _, name, _ in missing}
            markers = Markers(redis)
            probe = markers.next_probe()
            for channel in markers.channels[:1] if redis.subscribe == "topic" else markers.channels:
                if channel.decode() in refused or (channel == markers.fallback and f"{redis.to_prefix}*" in refused):
                    continue
                sent_at = time.monotonic()
                reply = await self._connection.ask("PUBLISH", channel, probe)
                if isinstance(reply, hiredis.ReplyError):
                    continue  # the permissions say so
                try:
                    async with asyncio.timeout(redis.ping_timeout_s):
                        while not _is_message(await subscription.reply(), probe):
                            pass
                except TimeoutError:
                    why = f"a probe on {channel.decode()} did not come back within {redis.ping_timeout_s:g} s"
                    yield Finding("warning", f"redis: {why}: what is published does not reach what is subscribed")
                    return
                took_ms = 1000 * (time.monotonic() - sent_at)
                others = max(int(reply) - 1, 0)
                heard = f"; {others} relay{'' if others == 1 else 's'} listening" if channel != markers.fallback else ""
                yield Finding("probe", f"published and heard again after {took_ms:.1f} ms{heard}")
                return
            yield Finding("warning", "redis: no probe can be published and heard, so nothing is known of the link")

    @property
    def _answers_for_others(self) -> bool:
        """Whether processes answer long polls for each other."""
        config = self._config
        return bool(config.auth.secret or config.workers > 1) and "longpoll" in config.transports

    @asynccontextmanager
    async def _subscription(self) -> AsyncIterator[tuple[RedisConnection, list[tuple[str, str, str]]]]:
        """Subscribe as a relay does; gives the commands that are refused, for what, and what that means."""
        connection = await self._connections.open()
        connection.limit_s = self._config.redis.timeout_s
        try:
            missing: list[tuple[str, str, str]] = []
            for command, sent, name, means in self._subscriptions():
                if isinstance(await connection.ask(command, sent), hiredis.ReplyError):
                    missing.append((command, name, means))
            yield connection, missing
        finally:
            await connection.close()

    def _subscriptions(self) -> Iterator[tuple[str, str, str, str]]:
        """What a relay with these settings sends: command, channel, its name in a rule, and what its absence means."""
        redis, topics = self._config.redis, f"{self._config.redis.topic_prefix}*"
        by_name = redis.subscribe == "topic"
        if by_name:
            topic = f"{redis.topic_prefix}{_TRIED}"
            yield "UNSUBSCRIBE", topic, topics, "topics that were left are still heard"
            yield "SUBSCRIBE", topic, topics, "no event is heard"
        else:
            yield "PSUBSCRIBE", glob_escape(redis.to_prefix) + "*", f"{redis.to_prefix}*", "no event is heard"
        if redis.control_channel:
            name, means = redis.control_channel, "disconnect and kick of other nodes are not heard"
            yield ("SUBSCRIBE", name, name, means) if by_name else ("PSUBSCRIBE", glob_escape(name), name, means)
        elif by_name:
            name = Markers(redis).fallback.decode()
            yield "SUBSCRIBE", name, name, "what is heard is not checked by probes"
        if self._config.uses_topic_channels and not by_name:
            means = "events that are published there are not heard, and histories are not read"
            yield "PSUBSCRIBE", glob_escape(redis.topic_prefix) + "*", topics, means
        if self._config.has_presence:
            yield "PSUBSCRIBE", PRESENCE_CHANNEL, PRESENCE_CHANNEL, "relay is not live"
        if self._answers_for_others:
            yield "SUBSCRIBE", f"{NODE_CHANNEL}{_TRIED}", f"{NODE_CHANNEL}*", _NO_OTHERS


_NO_HISTORY = "histories do not work"
_NO_PRESENCE = "presence does not work"
_NO_OTHERS = "long polls that reach another process than their session's are not answered"

# With "KEY" for a topic's key. Redis checks the commands inside of a script like those that a user sends.
_HISTORY_COMMANDS = (
    ("EVAL", "return 1", "1", "KEY"),
    ("EVALSHA", "0" * 40, "1", "KEY"),
    ("SCRIPT", "LOAD", "return 1"),
    ("XADD", "KEY", "*", "a", "b"),
    ("XRANGE", "KEY", "-", "+"),
    ("XREVRANGE", "KEY", "+", "-"),
    ("XLEN", "KEY"),
    ("XINFO", "STREAM", "KEY"),
    ("MEMORY", "USAGE", "KEY"),
    ("EXISTS", "KEY"),
    ("EXPIRE", "KEY", "1"),
    ("TIME",),
)
# The key comes behind the name.
_PRESENCE_COMMANDS = (
    ("EVAL", "return 1", "1", "presence:nodes"),
    ("TIME",),
    ("SET", "1"),
    ("UNLINK",),
    ("HSET", "a", "b"),
    ("HDEL", "a"),
    ("HSCAN", "0"),
    ("SADD", "a"),
    ("SREM", "a"),
    ("SPOP",),
    ("ZADD", "1", "a"),
    ("ZREM", "a"),
    ("ZSCORE", "a"),
    ("ZRANGE", "0", "1"),
    ("ZRANGEBYSCORE", "0", "1"),
    ("EVALSHA", "0" * 40, "1", "presence:nodes"),
)


def _kind(info: dict[str, str]) -> str:
    """Name and version of a server, by its section ``server``."""
    for field, name in (
        ("valkey_version", "Valkey"),
        ("dragonfly_version", "Dragonfly"),
        ("keydb_version", "KeyDB"),
        ("redis_version", "Redis"),
    ):
        if version := info.get(field):
            return f"{name} {version.removeprefix('df-v')}"
    return "a server that does not say which"


def _pubsub_limit(text: str) -> tuple[int, int, int]:
    """Hard limit, soft limit and seconds: ``normal 0 0 0 slave … pubsub 33554432 8388608 60``."""
    parts = text.split()
    at = parts.index("pubsub") if "pubsub" in parts else -4
    numbers = [int(part) for part in parts[at + 1 : at + 4]] if at >= 0 else [0, 0, 0]
    return numbers[0], numbers[1], numbers[2]


def _is_message(reply: Any, payload: bytes) -> bool:
    return isinstance(reply, list) and reply[0] in (b"pmessage", b"message") and reply[-1] == payload


def _joined(rules: Iterable[str]) -> str:
    """Rules as one, with each command, key and channel once."""
    return " ".join(dict.fromkeys(" ".join(rules).split(" ")))


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
