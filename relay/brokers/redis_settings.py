"""``relay:settings`` in Redis: what relays there do, for programs that publish; and how a server is prepared for it.

Owns the hash's form and what is loaded into the server; must not know who publishes.

A program that publishes to a topic has to know whether the topic has a history. It finds the relays' ``[[topics]]`` in
this hash, which each relay with histories writes when it connects and renews while it runs.
"""

import logging
from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

import hiredis
import msgspec

from relay.brokers.redis_connection import is_denied, words
from relay.brokers.redis_scripts import FUNCTION, FUNCTION_NAME, FUNCTION_VERSION, PUBLISH, Script, version_of
from relay.config import SETTINGS_KEY, Config
from relay.config_sections import HistoryConfig
from relay.version import __version__

_logger = logging.getLogger("relay.redis")

_LIFETIME_S = 180
"""Seconds for which the hash stays without being renewed, after the last relay with histories has gone."""

Ask: TypeAlias = Callable[..., Awaitable[Any]]
"""Sends a command and returns its reply, an error among them."""

LOOK_EVERY_S = 5.0
"""Seconds after which relays look whether the hash is still there, and try again what has failed."""

RENEW_EVERY_S = 60.0
"""Seconds after which relays write the hash again, and programs that publish read it again."""


class _History(msgspec.Struct):
    size: int
    ttl_s: int


class _Topic(msgspec.Struct):
    match: str
    history: _History | None = None


class Settings(NamedTuple):
    """What a publisher has to know."""

    to_prefix: str
    topic_prefix: str
    topics: tuple[tuple[str, HistoryConfig | None], ...]
    payload_max_bytes: int
    publish_form: str = "to"

    def history(self, topic: str) -> HistoryConfig | None:
        """What is kept of a topic: as the first entry that matches it says."""
        return next((history for match, history in self.topics if fnmatchcase(topic, match)), None)

    def is_by_topic(self, topic: str) -> bool:
        """Whether events of a topic are published on the topic's own channel."""
        return self.publish_form == "topic" or self.history(topic) is not None


def own_settings(config: Config) -> Settings:
    """What a configuration says."""
    topics = tuple((entry.match, entry.history) for entry in config.topics)
    redis = config.redis
    return Settings(redis.to_prefix, redis.topic_prefix, topics, config.limits.payload_max_bytes, redis.publish_form)


def known_limit(config: Config) -> int | None:
    """The largest payload that relays deliver, in bytes, where the configuration says it."""
    return config.limits.payload_max_bytes if "payload_max_bytes" in config.limits.model_fields_set else None


def history_args(
    event: str, payload: bytes, history: HistoryConfig, sender: str | None, max_bytes: int
) -> tuple[bytes, ...]:
    """The arguments of ``publish.lua``."""
    numbers = (str(number).encode() for number in (history.size, history.ttl_s))
    return (event.encode(), payload, *numbers, (sender or "").encode(), str(max_bytes).encode())


def renewal(config: Config) -> list[tuple[str, ...]]:
    """The commands that write the hash."""
    topics = [
        _Topic(entry.match, None if entry.history is None else _History(entry.history.size, entry.history.ttl_s))
        for entry in config.topics
    ]
    fields = {
        "version": __version__,
        "to_prefix": config.redis.to_prefix,
        "topic_prefix": config.redis.topic_prefix,
        "publish_form": config.redis.publish_form,
        "payload_max_bytes": str(config.limits.payload_max_bytes),
        "topics": msgspec.json.encode(topics).decode(),
    }
    flat = (word for pair in fields.items() for word in pair)
    return [("HSET", SETTINGS_KEY, *flat), ("EXPIRE", SETTINGS_KEY, str(_LIFETIME_S))]


def says_itself(config: Config) -> bool:
    """Whether a configuration says which topics have histories, or under which names events are published."""
    return "topics" in config.model_fields_set or not config.redis.model_fields_set.isdisjoint(
        ("to_prefix", "topic_prefix", "publish_form")
    )


def settings_from(reply: object, config: Config) -> Settings | None:
    """What the relays on this Redis say, by the reply to ``HGETALL relay:settings``; None if the configuration counts.

    The configuration goes first where it has topics or prefixes of its own: relays of several applications may share
    a Redis, and write the same hash.
    """
    flat: Any = list(reply.items()) if isinstance(reply, dict) else reply
    if says_itself(config) or isinstance(reply, hiredis.ReplyError) or not flat:
        return None
    pairs = flat if isinstance(reply, dict) else zip(flat[::2], flat[1::2], strict=True)
    fields = {name.decode(): value.decode(errors="replace") for name, value in pairs}
    try:
        topics = msgspec.json.decode(fields["topics"], type=list[_Topic])
        found = tuple(
            (topic.match, None if (kept := topic.history) is None else HistoryConfig(size=kept.size, ttl_s=kept.ttl_s))
            for topic in topics
        )
        limit = int(fields["payload_max_bytes"])
        form = fields.get("publish_form", "to")
        return Settings(fields["to_prefix"], fields["topic_prefix"], found, limit, form)
    except (KeyError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        _logger.warning("%s in Redis was not understood, and is not used: %s", SETTINGS_KEY, error)
        return None


class Preparation:
    """Loads what programs that publish need into a server, and says once what it cannot do.

    Args: config: where some topic has a history, or events are published on the channels of topics.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._said: set[str] = set()
        # Whether all was done the last time that can be done, and whether the hash was written.
        self._is_done = True
        self._is_written = False
        self.has_key: Callable[[], bool] = lambda: True
        """Whether `SETTINGS_KEY` is on this server, and not on another one of its cluster."""
        self.publish_script: Script = PUBLISH
        self.function: str = FUNCTION

    async def prepare(self, ask: Ask) -> bool:
        """Do so, on a new connection and now and then; say whether the server knows the script. Raises as ``ask``."""
        is_done = is_written = True
        for command in renewal(self._config) if self.has_key() else ():
            reply = await ask(*command)
            if isinstance(reply, hiredis.ReplyError):
                self._say(
                    f"{SETTINGS_KEY} cannot be written ({words(reply)}): `relay publish` needs the configuration file"
                )
                is_done, is_written = _is_final(reply), False
                break
        has_script = False
        if self._config.has_history:
            is_done &= await self._load_function(ask)
            reply = await ask("SCRIPT", "LOAD", self.publish_script.text)
            has_script = not isinstance(reply, hiredis.ReplyError)
            if not has_script:
                self._say(
                    f"SCRIPT LOAD is not possible ({words(reply)}): EVAL is used, which sends the script each time"
                )
        if is_done and not self._is_done:
            _logger.info("history: what Redis had refused is loaded and written now")
        self._is_done, self._is_written = is_done, is_written
        return has_script

    async def is_due(self, ask: Ask) -> bool:
        """Whether something is to be done again: it has failed, or Redis has lost the hash. Raises as ``ask``."""
        if not self._is_done:
            return True
        # A server that was flushed, or restarted without persistence, says 0.
        return self._is_written and self.has_key() and await ask(*renewal(self._config)[-1]) == 0

    async def _load_function(self, ask: Ask) -> bool:
        """Load the function; False where that may succeed later."""
        reply = await ask("FUNCTION", "LIST", "LIBRARYNAME", FUNCTION_NAME, "WITHCODE")
        if isinstance(reply, hiredis.ReplyError):
            self._say_missing(_reason(reply))
            return _is_final(reply)
        if reply:
            version = version_of(_code_of(reply[0]))
            if version is None:
                self._say(f"a function library {FUNCTION_NAME} of another program is there: it is left alone")
            if version is None or version >= FUNCTION_VERSION:
                return True
        loaded = await ask("FUNCTION", "LOAD", "REPLACE", self.function)
        if isinstance(loaded, hiredis.ReplyError):
            self._say_missing(words(loaded))
            return _is_final(loaded)
        return True

    def _say_missing(self, reason: str) -> None:
        self._say(f"no function {FUNCTION_NAME} ({reason}): programs in other languages publish history with EVAL")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _logger.warning("history: %s", text)


def is_unknown(reply: hiredis.ReplyError) -> bool:
    """Whether the server knows no such command."""
    return "unknown" in str(reply).lower()


def _is_final(reply: hiredis.ReplyError) -> bool:
    """Whether a command will be refused again; else Redis may be loading, have no memory or too few replicas."""
    return is_denied(reply) or is_unknown(reply)


def _reason(reply: hiredis.ReplyError) -> str:
    """Why there are no functions."""
    if is_unknown(reply):
        return "it needs Redis 7.0 or later"
    return "not permitted" if is_denied(reply) else words(reply)


def _code_of(library: Any) -> str:
    """The code of one library in the reply to ``FUNCTION LIST … WITHCODE``; a map under RESP3."""
    pairs = library.items() if isinstance(library, dict) else zip(library[::2], library[1::2], strict=True)
    return next((value.decode(errors="replace") for name, value in pairs if name == b"library_code"), "")
