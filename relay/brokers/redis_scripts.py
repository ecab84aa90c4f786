"""The Lua scripts of histories, and the function by which other programs publish with history.

Owns their texts and versions; must not know connections. Each begins with ``history.lua``, which they share.

`PUBLISH` runs inside the relay by ``EVALSHA``. The same text is a Redis function, `FUNCTION_NAME`, for programs in
other languages: ``FCALL relay_publish 1 topic:room:1 new_msg '{}' 1000 3600``.
"""

import hashlib
from importlib.resources import files
from typing import NamedTuple

FUNCTION_NAME = "relay_publish"
"""Of the function, and of its library."""

FUNCTION_VERSION = 3
"""Raised whenever ``publish.lua`` or ``history.lua`` changes.

A relay replaces an older function, and leaves a newer one alone.
"""


class Script(NamedTuple):
    """A script as Redis knows it."""

    text: str
    sha: str
    """SHA-1 of the text, in hex."""


def _script(name: str, head: str = "") -> Script:
    return _made_of(head + _text(name))


def _made_of(text: str) -> Script:
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def _sharded(text: str) -> str:
    """The same for a cluster, whose subscribers are on the channels of its shards."""
    return text.replace("redis.call('PUBLISH'", "redis.call('SPUBLISH'")


def _text(name: str) -> str:
    return files("relay.brokers").joinpath("lua", name).read_text("utf-8")


_SHARED = _text("history.lua")

PUBLISH = _script("publish.lua", f"{_SHARED}local keys, args = KEYS, ARGV\n")
CHECK = _script("check.lua", _SHARED)
OPEN = _script("open.lua", _SHARED)
RENEW_LEASE = _script("presence.lua")
NUMBER_WRITE = _script("number.lua")

FUNCTION = (
    f"#!lua name={FUNCTION_NAME}\n"
    f"-- version {FUNCTION_VERSION}\n"
    f"{_SHARED}"
    "local function publish(keys, args)\n"
    f"{_text('publish.lua')}"
    "end\n"
    f"redis.register_function('{FUNCTION_NAME}', publish)\n"
)

SHARDED_PUBLISH = _made_of(_sharded(PUBLISH.text))
SHARDED_CHECK = _made_of(_sharded(CHECK.text))
SHARDED_RENEW_LEASE = _made_of(_sharded(RENEW_LEASE.text))
SHARDED_FUNCTION = _sharded(FUNCTION)
"""For Redis Cluster."""


def version_of(library: str) -> int | None:
    """The version of a library's code; None where it is no library of the relay's."""
    _, found, rest = library.partition("\n-- version ")
    number = rest.partition("\n")[0]
    return int(number) if found and number.isdecimal() else None
