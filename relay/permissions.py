"""Who may do what on which topics: rights by pattern, and what a token's claim says of them.

Owns the grammar of rights, as pure functions; must not know tokens, sockets or the settings' source.

A claim maps patterns of topics to rights, in one of two shapes::

    {"room:*": ["join", "push"], "news": "join"}
    ["room:*:join,push", "news:join"]               the last colon splits pattern from rights

Patterns are those of ``[[topics]]``: ``*`` any text, ``?`` one character, ``[abc]`` one of these. ``{sub}`` in one
stands for the user, letter by letter: a user called ``*`` opens no more than any other.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntFlag
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

SUBJECT = "{sub}"
"""In a pattern, what stands for the user."""

_GLOB = re.compile(r"[*?[]")
_SPECIAL = re.compile(r"([*?[{])")
"""What means more than itself in a pattern, ``{sub}`` included."""


class Right(IntFlag):
    """What may be done on a topic."""

    NONE = 0
    JOIN = 1
    PUSH = 2
    PRESENCE = 4


ALL: Right = Right.JOIN | Right.PUSH | Right.PRESENCE

_NAMES = {"join": Right.JOIN, "push": Right.PUSH, "presence": Right.PRESENCE}


class Grant(NamedTuple):
    """Rights on all topics that match a pattern."""

    pattern: str
    rights: Right


class Rights:
    """What grants add up to; a topic has the rights of all that match it."""

    __slots__ = ("_grants",)

    def __init__(self, *grants: Iterable[Grant]) -> None:
        self._grants: tuple[Grant, ...] = tuple(grant for several in grants for grant in several)

    def on(self, topic: str) -> Right:
        """The rights on one topic. Not for hot paths: it asks every pattern."""
        found = Right.NONE
        for pattern, rights in self._grants:
            if _matches(pattern, topic):
                found |= rights
        return found

    def __str__(self) -> str:
        """As lines of the log say it: ``join,push on room:*; join on news``, or ``none``."""
        return "; ".join(f"{','.join(names_of(rights))} on {pattern}" for pattern, rights in self._grants) or "none"


EVERYTHING = Rights((Grant("*", ALL),))


@dataclass(frozen=True, slots=True)
class Identity:
    """What a client has proved about itself, and what follows from it."""

    user: str | None
    """The subject; None for an anonymous client, or a token without one."""
    rights: Rights = field(repr=False)
    claims: Mapping[str, Any] = field(default_factory=dict, repr=False)
    expires_at: float | None = None
    """Monotonic seconds: no step of the wall clock moves it. None: it does not expire."""

    def is_expired(self, now: float) -> bool:
        """Say whether it has expired at the monotonic time ``now``."""
        return self.expires_at is not None and now >= self.expires_at


def parse_rights(value: object) -> Right:
    """Read ``"join,push"`` or ``["join", "push"]``. Raises ValueError."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise ValueError("expected rights as a list or as text")
    rights = Right.NONE
    for name in names:
        right = _NAMES.get(name.strip()) if isinstance(name, str) else None
        if right is None:
            raise ValueError(f"expected join, push or presence, got {name!r:.40}")
        rights |= right
    return rights


def parse_claim(claim: object) -> tuple[Grant, ...]:
    """Read a claim with rights in either shape; None has none. Raises ValueError, which names the fault."""
    if claim is None:
        return ()
    if isinstance(claim, Mapping):
        return tuple(Grant(_pattern(pattern), parse_rights(rights)) for pattern, rights in claim.items())
    if isinstance(claim, list | tuple):
        return tuple(map(_parse_entry, claim))
    raise ValueError("expected an object of patterns and rights, or a list of pattern:rights")


def _parse_entry(entry: object) -> Grant:
    pattern, colon, rights = entry.rpartition(":") if isinstance(entry, str) else ("", "", "")
    if not colon:
        raise ValueError(f"expected pattern:rights, for example room:*:join,push, got {entry!r:.40}")
    return Grant(_pattern(pattern), parse_rights(rights))


def _pattern(pattern: object) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"expected a pattern of topics, got {pattern!r:.40}")
    return pattern


def bind(grants: tuple[Grant, ...], user: str | None) -> tuple[Grant, ...]:
    """Put ``user`` where the patterns say ``{sub}``; without a user such a grant is left out."""
    if not any(SUBJECT in grant.pattern for grant in grants):
        return grants
    return tuple(
        grant._replace(pattern=grant.pattern.replace(SUBJECT, escape(user or "")))
        for grant in grants
        if user or SUBJECT not in grant.pattern
    )


def escape(text: str) -> str:
    """A pattern that matches ``text`` and nothing else."""
    return _SPECIAL.sub(r"[\1]", text)


def names_of(rights: Right) -> list[str]:
    """The words for some rights, in their order."""
    return [name for name, right in _NAMES.items() if right & rights]


def _matches(pattern: str, topic: str) -> bool:
    # fnmatch keeps 256 compiled patterns in Python 3.11; of users' own there are as many as users.
    if not _GLOB.search(pattern):
        return pattern == topic
    if pattern[-1] == "*" and not _GLOB.search(pattern[:-1]):
        return topic.startswith(pattern[:-1])
    return fnmatchcase(topic, pattern)
