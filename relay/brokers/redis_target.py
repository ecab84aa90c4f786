"""What a program has to know of a Redis to publish there, and how events become commands; without I/O.

Owns what the server said of itself, and what the relays there said of their topics; must not know connections.

`relay.publisher` uses it on connections of its own: `relay.brokers.redis_commands` in event loops,
`relay.brokers.redis_blocking` without.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import hiredis

from relay import redis_url
from relay.brokers import redis_topics
from relay.brokers.redis_connection import LinkLost, is_denied, name_of, not_published, read_role, words
from relay.brokers.redis_scripts import PUBLISH, SHARDED_PUBLISH
from relay.brokers.redis_settings import (
    RENEW_EVERY_S,
    history_args,
    known_limit,
    own_settings,
    says_itself,
    settings_from,
)
from relay.config import SETTINGS_KEY, Config
from relay.errors import BusUnavailable
from relay.protocol.topics import to_redis_channel

_logger = logging.getLogger("relay.redis")

Outgoing: TypeAlias = tuple[str, str, bytes]
"""Topic, event and payload."""

Command: TypeAlias = tuple[bytes | str, ...]

_ROLE: Command = ("ROLE",)

QUESTIONS: tuple[Command, ...] = (_ROLE, ("HGETALL", SETTINGS_KEY))
"""What is asked on each new connection, every `RENEW_EVERY_S` seconds, and sooner while there are no settings."""

_LOOK_EVERY_S = 1.0
"""Seconds after which settings that are missing are looked for again."""

_KEEP_S = 2 * RENEW_EVERY_S
"""Seconds for which the last settings count after Redis has lost them; a relay that is there has written them again."""


class Published(NamedTuple):
    """What Redis answered to one event."""

    position: str | None
    """Its position in the topic's history; None if the topic has no history."""
    listening: int | None
    """Subscriptions that received it, which is the number of relays that listen; None if the topic has a history."""


class Target:
    """One Redis, as far as it has to be known.

    Args: config: ``redis_url``, ``topics``, the prefixes and ``limits.payload_max_bytes`` are used.
          clock: monotonic seconds.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self.address: str = redis_url.shown(config.redis_url)
        self._config = config
        self._clock = clock
        self._settings = own_settings(config)
        # On a cluster the subscribers are on the channels of its shards.
        self._publish = "SPUBLISH" if config.is_cluster else "PUBLISH"
        self._script = SHARDED_PUBLISH if config.is_cluster else PUBLISH
        self._payload_max_bytes = known_limit(config)
        self._asked_at = clock()
        self._may_ask_role = True
        # Whether there were no settings when they were looked for last, and since when there are none that can be read.
        self._is_missing = False
        self._missing_since: float | None = None
        # Whether relays have said what they do, and whether it was said that they cannot be asked.
        self._has_learned = False
        self._has_warned = False

    def take_due(self) -> bool:
        """Whether `QUESTIONS` have to be asked again before the next event; True once each time."""
        now = self._clock()
        if now - self._asked_at <= (_LOOK_EVERY_S if self._is_missing else RENEW_EVERY_S):
            return False
        self._asked_at = now
        return True

    def learn(self, role: object, fields: object) -> None:
        """Learn the replies to `QUESTIONS`. Raises LinkLost: what is published there reaches no client."""
        self._take_role(role)
        now = self._asked_at = self._clock()
        if isinstance(fields, hiredis.ReplyError) and not says_itself(self._config):
            self._take_refusal(fields)
            return
        settings = settings_from(fields, self._config)
        self._is_missing = not fields and not says_itself(self._config)
        if settings is not None:
            self._missing_since, self._has_learned = None, True
            self._settings, self._payload_max_bytes = settings, settings.payload_max_bytes
        elif self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since > _KEEP_S:
            self._settings, self._payload_max_bytes = own_settings(self._config), known_limit(self._config)

    def _take_refusal(self, error: hiredis.ReplyError) -> None:
        """Redis does not give the settings: the last ones count. Raises LinkLost where there are none and may be."""
        if not is_denied(error):
            if not self._has_learned:
                raise LinkLost(f"HGETALL {SETTINGS_KEY}: {words(error)}")
        elif not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "no permission to read %s on %s: events may not be appended to the history of their topic, and do not "
                "reach relays in topic mode; allow it with +hgetall ~%s, or give the publisher the settings",
                SETTINGS_KEY,
                self.address,
                SETTINGS_KEY,
            )

    def _take_role(self, role: object) -> None:
        self._may_ask_role = not is_denied(role)
        if isinstance(role, hiredis.ReplyError):
            if self._may_ask_role:
                raise LinkLost(words(role))
        elif not (found := read_role(role)).is_master:
            raise LinkLost(not_published(self.address, found))

    # Events.

    def check(self, events: Sequence[Outgoing]) -> None:
        """Refuse payloads that relays would drop. Raises ValueError."""
        most = self._payload_max_bytes
        for topic, event, payload in events:
            if most is not None and len(payload) > most:
                raise ValueError(
                    f"event {event!r} on topic {topic!r}: expected a payload of at most {most} bytes "
                    f"(limits.payload_max_bytes), got {len(payload)}"
                )

    def commands(self, events: Sequence[Outgoing], *, with_script: bool) -> list[Command]:
        """The commands that publish events, in order, with one reply each; `take_replies` takes the replies.

        Behind those that a replica would carry out too, what the server is is asked: the connection may have outlived
        a failover. In a cluster, what is published on a replica reaches the clients of its master.

        Args: with_script: send the text of the script with the first event of a history; else Redis has to know it.
        """
        found: list[Command] = []
        for topic, event, payload in events:
            channel, history = self._channel(topic, event), self._settings.history(topic)
            if history is None:
                is_named = self._settings.publish_form == "topic"
                found.append((self._publish, channel, redis_topics.pack(event, payload) if is_named else payload))
                continue
            args = history_args(event, payload, history, None, self._settings.payload_max_bytes)
            how = ("EVAL", self._script.text) if with_script else ("EVALSHA", self._script.sha)
            found.append((*how, "1", channel, *args))
            with_script = with_script and self._publish == "SPUBLISH"  # each node has to be given it
        if self._may_ask_role and any(command[0] == "PUBLISH" for command in found):
            found.append(_ROLE)
        return found

    def script_question(self) -> Command | None:
        """What shows whether Redis knows the script, which refuses it without arguments; None without a history."""
        if all(history is None for _, history in self._settings.topics):
            return None
        return ("EVALSHA", self._script.sha, "1", self._settings.topic_prefix)

    def take_replies(self, commands: Sequence[Command], replies: Sequence[object]) -> Sequence[object]:
        """The replies to events, of all to their commands. Raises LinkLost: the events have reached no client."""
        if commands[-1] != _ROLE:
            return replies
        self._take_role(replies[-1])
        return replies[:-1]

    def needs_script(self, commands: Sequence[Command], replies: Sequence[object]) -> bool:
        """Whether the only event has to be sent again with the script: Redis does not know it, or forbids EVALSHA.

        Of several events some may have been published: to send the others again would change their order.
        """
        if len(replies) != 1 or commands[0][0] != "EVALSHA":
            return False
        return is_denied(replies[0]) or str(replies[0]).startswith("NOSCRIPT")

    def results(self, events: Sequence[Outgoing], replies: Sequence[object]) -> list[Published]:
        """Make sense of the replies. Raises BusUnavailable if Redis refused an event; it has published the others."""
        found: list[Published] = []
        faults: list[str] = []
        for (topic, event, _), reply in zip(events, replies, strict=True):
            if isinstance(reply, hiredis.ReplyError):
                faults.append(self._fault(topic, event, reply))
            elif isinstance(reply, bytes):
                found.append(Published(reply.decode(), None))
            elif isinstance(reply, int):
                found.append(Published(None, reply))
        if faults:
            count = "" if len(events) == 1 else f"{len(faults)} of {len(events)} events were refused: "
            raise BusUnavailable(f"{count}{faults[0]}")
        return found

    def _fault(self, topic: str, event: str, reply: hiredis.ReplyError) -> str:
        has_history = self._settings.history(topic) is not None
        prefix = self._settings.topic_prefix if self._settings.is_by_topic(topic) else self._settings.to_prefix
        text = f"{self._publish} {name_of(self._channel(topic, event))}: {words(reply)}"
        if not is_denied(reply):
            return text
        publish = f"+{self._publish.lower()}"
        rights = f"~{prefix}* &{prefix}* +eval +evalsha +xadd +xrevrange +xinfo +exists +time +expire {publish}"
        return f"{text}; allow it with ACL SETUSER: {rights if has_history else f'&{prefix}* {publish}'}"

    def _channel(self, topic: str, event: str) -> bytes:
        if not self._settings.is_by_topic(topic):
            return to_redis_channel(self._settings.to_prefix, topic, event)
        return f"{self._settings.topic_prefix}{topic}".encode()
