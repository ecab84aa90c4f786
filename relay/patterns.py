"""Patterns of topics and events: whether one can match what it is meant for.

Owns what is said of one that cannot; must not know which names are reserved, nor what patterns are used for. In a
pattern ``*`` is any text, ``?`` one character, ``[abc]`` one of these.
"""

import re
from collections.abc import Collection

# As fnmatch reads it: a ] that comes first, or behind a !, is one of the characters.
_SET = re.compile(r"\[!?+\]?+[^\]]*\]")
_PLACEHOLDER = re.compile(r"\{[^\W\d]\w*\}|<(?:[^\W\d]\w*:)?[^\W\d]\w*>")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def topic_pattern_fault(pattern: str, reserved: Collection[str] = ()) -> str:
    """Why no topic matches a pattern, and what to write instead; empty for one that topics may match.

    Args: reserved: names of topics that no client can join.
    """
    if pattern in reserved:
        return f"{pattern!r} never matches: no client can join this topic; write that of another"
    return _fault(pattern)


def event_pattern_fault(pattern: str, reserved: tuple[str, ...]) -> str:
    """The same for a pattern of events.

    Args: reserved: prefixes that no such event has.
    """
    if ":" in _SET.sub("", pattern):
        alone = pattern.rpartition(":")[2] or "*"
        return f"{pattern!r} never matches: no event contains a colon; write the event alone, such as {alone!r}"
    if pattern.startswith(reserved):
        return f"{pattern!r} never matches: names that begin with {', '.join(reserved)} are reserved"
    return _fault(pattern)


def _fault(pattern: str) -> str:
    if not pattern:
        return "an empty pattern matches nothing; write * for everything"
    if _CONTROL.search(pattern):
        written = _CONTROL.sub("", pattern) or "*"
        return f"{pattern!r} never matches: no name contains a control character; write {written!r}"
    if found := _PLACEHOLDER.search(pattern):
        instead = f"{_PLACEHOLDER.sub('*', pattern)!r} for any text there"
        return f"{pattern!r} matches {found[0]} literally; write {instead}, or '[{found[0][0]}]' for the character"
    if "[" in _SET.sub("", pattern):
        return f"{pattern!r} has a [ that is not closed; write [abc] for one of these, or '[[]' for the character"
    return ""
