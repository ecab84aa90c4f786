"""Topic grammar, and (topic, event) ↔ Redis channel, both ways.

Owns the rules for names; must not know Redis, sockets or settings. A Redis channel is made and parsed
here alone::

    to:room:42:new_msg   →  prefix "to:", topic "room:42", event "new_msg"

The **last** colon splits topic from event: topics may contain colons, events may not.
"""

import re
from functools import lru_cache

NAME_MAX_BYTES = 255
"""Longest topic or event, in bytes of UTF-8: a binary frame gives its length in one byte."""

PROTOCOL_TOPIC = "phoenix"
"""The protocol's own topic: it carries heartbeats and cannot be joined."""

RELAY_TOPIC = "relay"
"""The relay's own topic: probes of the link to Redis may go there, no client can join it."""

RESERVED_TOPICS = (PROTOCOL_TOPIC, RELAY_TOPIC)
"""Those that no client can join."""

RESERVED_EVENT_PREFIXES = ("phx_", "chan_reply_")
"""Events of the protocol itself (``phx_join``, ``phx_reply`` …), and those by which phoenix.js hands a reply to the
push that waits for it (``chan_reply_<ref>``). Neither clients, publishers nor plugins may invent them.

Source: phoenix.js 1.6 to 1.8, ``constants.js: CHANNEL_EVENTS`` and ``channel.js: replyEventName``.
"""

RENEWAL = "access_token"
"""The push that renews a client's token, and the key in its payload, or in a join's params, under which the new token
stands. No handler of pushes and no subscriber sees it."""

# C0 controls, DEL and C1 controls: they have no place in a name and would spoil every log they reach. Lone
# surrogates (what Python makes of bad bytes on a command line) have no UTF-8.
_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_name(name: str) -> bool:
    """Whether this can be a name at all: 1 to 255 bytes of UTF-8 without control characters."""
    if _FORBIDDEN.search(name):
        return False
    # isascii() is a flag of the string: the common name is measured without being encoded.
    size = len(name) if name.isascii() else len(name.encode())
    return 0 < size <= NAME_MAX_BYTES


def is_topic(topic: str) -> bool:
    """Say whether a client may join ``topic``: 1 to 255 bytes of UTF-8, no control characters, not a reserved name."""
    return is_name(topic) and topic not in RESERVED_TOPICS


def is_event(event: str) -> bool:
    """Say whether ``event`` may be pushed or published: as a topic, but without colon, and not reserved."""
    return len(event) <= NAME_MAX_BYTES and _is_event(event)


@lru_cache(1024)  # an application has few names of events, and each event is asked about
def _is_event(event: str) -> bool:
    return is_name(event) and ":" not in event and not event.startswith(RESERVED_EVENT_PREFIXES)


def check_names(topic: str, event: str) -> None:
    """Check the names of an event that code publishes. Raises ValueError."""
    if not is_topic(topic) or not is_event(event):
        raise ValueError(
            "expected a topic of 1 to 255 bytes and an event without colon, not phx_… or chan_reply_…, "
            f"got {topic!r}, {event!r}"
        )


def to_redis_channel(prefix: str, topic: str, event: str) -> bytes:
    """Name the Redis channel of one event: ``<prefix><topic>:<event>``, in UTF-8.

    The caller has checked both names with `is_topic` and `is_event`; a colon in the event would not come back.
    """
    return f"{prefix}{topic}:{event}".encode()


def from_redis_channel(prefix: bytes, redis_channel: bytes) -> tuple[str, str] | None:
    """Split a Redis channel into (topic, event), or return None where it names no event.

    Names are decoded, not judged: whether anyone may join such a topic does not matter here, only whether
    someone has.

    Args:    prefix: as bytes; the channel is known to start with it, since it matched the pattern.
    Returns: None for a channel without a colon after the prefix, or one that is not UTF-8.
    """
    try:
        topic, colon, event = redis_channel[len(prefix) :].decode().rpartition(":")
    except UnicodeDecodeError:
        return None
    return (topic, event) if colon else None


def glob_escape(text: str) -> str:
    r"""Escape ``text`` so that a Redis pattern matches it literally.

    Source: Redis ``util.c: stringmatchlen`` – ``*``, ``?``, ``[``, ``]`` and ``\`` are special.
    """
    return re.sub(r"([*?\[\]\\])", r"\\\1", text)
