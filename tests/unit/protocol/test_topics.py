"""`relay.protocol.topics`: the grammar of names, and (topic, event) ↔ Redis channel both ways."""

import re

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from relay.protocol import topics as module
from relay.protocol.topics import from_redis_channel, glob_escape, is_event, is_topic, to_redis_channel

prefixes = st.text(min_size=1, max_size=10)
any_text = st.text(max_size=300)
letters = st.characters(exclude_categories=["Cc", "Cs"])
topics = st.text(letters, min_size=1, max_size=60).filter(is_topic)
events = st.text(letters.filter(lambda letter: letter != ":"), min_size=1, max_size=60).filter(is_event)

CONTROLS = ["\x00", "\t", "\n", "\r", "\x1b", "\x1f", "\x7f", "\x80", "\x9f"]

# The grammar.


@pytest.mark.parametrize(
    "name", ["a", "room", " ", "a b", "*", "[a]", "é", "\xa0", "☕", "x" * 255, "é" * 127, "{}", "phx_room", "Phoenix"]
)
def test_text_of_1_to_255_bytes_names_a_topic(name: str) -> None:
    assert is_topic(name)


@pytest.mark.parametrize("topic", ["room:42", ":", "a:b:c", ":a", "a:"])
def test_topic_may_hold_colons(topic: str) -> None:
    assert is_topic(topic)


@pytest.mark.parametrize("name", ["", "x" * 256, "é" * 128, "☕" * 86, "x" * 100_000])
def test_name_that_a_length_byte_cannot_say_is_none(name: str) -> None:
    """Source: Phoenix V2, binary frames give each length in one byte."""
    assert not is_topic(name)
    assert not is_event(name)


@pytest.mark.parametrize("control", CONTROLS, ids=ascii)
def test_name_with_a_control_character_is_none(control: str) -> None:
    for name in (control, f"{control}a", f"a{control}", f"a{control}b"):
        assert not is_topic(name)
        assert not is_event(name)


@pytest.mark.parametrize("name", ["\ud800", "a\udcffb", "\udfff"], ids=ascii)
def test_name_without_utf8_is_none(name: str) -> None:
    """Such strings come from bad bytes on a command line."""
    assert not is_topic(name)
    assert not is_event(name)


def test_phoenix_is_the_protocols_own_topic() -> None:
    """Source: Phoenix 1.9, ``socket.ex``: heartbeats go to ``phoenix``."""
    assert not is_topic("phoenix")
    assert is_topic("phoenix:1")
    assert is_event("phoenix")


@pytest.mark.parametrize(
    "event", ["new_msg", "e", "*", "phx", "PHX_JOIN", "chan_reply", "my_chan_reply_1", "x" * 255, "é" * 127, " "]
)
def test_event_is_a_name_without_colon(event: str) -> None:
    assert is_event(event)


@pytest.mark.parametrize(
    "event", ["a:b", ":", ":a", "a:", "phx_", "phx_join", "phx_reply", "phx_any", "chan_reply_", "chan_reply_3"]
)
def test_event_holds_no_colon_and_is_not_of_the_protocol(event: str) -> None:
    """The last colon splits topic from event; ``phx_…`` is Phoenix's, ``chan_reply_…`` phoenix.js's."""
    assert not is_event(event)


@given(any_text)
@example("\x9f")
@example("phx_x")
@example("chan_reply_1")
@example("phoenix")
@example("relay")
def test_grammar_is_what_its_docstring_says(name: str) -> None:
    a_name = 1 <= len(name.encode()) <= 255 and not any(
        ord(character) < 32 or 127 <= ord(character) < 160 for character in name
    )
    assert is_topic(name) == (a_name and name not in ("phoenix", "relay"))
    assert is_event(name) == (a_name and ":" not in name and not name.startswith(("phx_", "chan_reply_")))


# Redis channels.


@pytest.mark.parametrize(
    ("redis_channel", "names"),
    [
        (b"to:room:42:new_msg", ("room:42", "new_msg")),
        (b"to:room:new_msg", ("room", "new_msg")),
        (b"to:a::e", ("a:", "e")),
        (b"to::e", ("", "e")),
        (b"to:t:", ("t", "")),
        (b"to:zimmer:gr\xc3\xbcn:e", ("zimmer:grün", "e")),
        (b"to:e", None),
        (b"to:", None),
        (b"to:t\xff:e", None),
        (b"to:t:\xc3", None),
    ],
)
def test_last_colon_splits_topic_from_event(redis_channel: bytes, names: tuple[str, str] | None) -> None:
    """Source: tangram's ``channel`` service, ``rfind(':')``."""
    assert from_redis_channel(b"to:", redis_channel) == names


def test_prefix_is_no_part_of_the_topic_even_without_colon() -> None:
    assert to_redis_channel("app/", "room:1", "e") == b"app/room:1:e"
    assert from_redis_channel(b"app/", b"app/room:1:e") == ("room:1", "e")


def test_prefix_alone_does_not_count_as_the_splitting_colon() -> None:
    assert from_redis_channel(b"a:b:", b"a:b:c") is None


@given(prefixes, topics, events)
def test_redis_channel_round_trips(prefix: str, topic: str, event: str) -> None:
    redis_channel = to_redis_channel(prefix, topic, event)
    assert redis_channel.startswith(prefix.encode())
    assert from_redis_channel(prefix.encode(), redis_channel) == (topic, event)


@given(prefixes, topics, events, topics, events)
@example("to:", "a:b", "c", "a", "b")
def test_two_events_never_share_a_redis_channel(prefix: str, topic: str, event: str, topic2: str, event2: str) -> None:
    assume((topic, event) != (topic2, event2))
    assert to_redis_channel(prefix, topic, event) != to_redis_channel(prefix, topic2, event2)


@given(st.binary())
def test_any_redis_channel_is_split_or_not(rest: bytes) -> None:
    """Anybody may publish anything; the names are decoded, not judged."""
    names = from_redis_channel(b"to:", b"to:" + rest)
    if names is not None:
        assert to_redis_channel("to:", *names) == b"to:" + rest


# Patterns.


def redis_matches(pattern: str, text: str) -> bool:
    r"""Match as Redis does: ``*``, ``?``, ``[…]`` with ``^`` and ranges, and ``\`` before what is taken literally.

    Source: Redis ``util.c: stringmatchlen``, written anew with regular expressions.
    """
    regex = ""
    at = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "*":
            regex += ".*"
        elif character == "?":
            regex += "."
        elif character == "\\" and at + 1 < len(pattern):
            at += 1
            regex += re.escape(pattern[at])
        elif character == "[":
            end = pattern.find("]", at + 1)
            inside = re.escape(pattern[at + 1 : end]).replace(r"\^", "^").replace(r"\-", "-")
            regex += f"[{inside}]"
            at = end
        else:
            regex += re.escape(character)
        at += 1
    return re.fullmatch(regex, text, re.DOTALL) is not None


def test_redis_matcher_of_this_test_knows_the_special_characters() -> None:
    assert redis_matches("to:*", "to:a")
    assert redis_matches("h?llo", "hello")
    assert redis_matches("h[ae]llo", "hallo")
    assert not redis_matches("h[^e]llo", "hello")
    assert not redis_matches(r"h\*", "hello")


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("to:", "to:"),
        ("a*", r"a\*"),
        ("a?", r"a\?"),
        ("[a]", r"\[a\]"),
        ("\\", r"\\"),
        ("\\*", r"\\\*"),
        ("a-b^c", "a-b^c"),
    ],
)
def test_special_characters_of_a_pattern_are_escaped(text: str, escaped: str) -> None:
    assert glob_escape(text) == escaped


@given(st.text(alphabet="ab*?[]\\^-:", max_size=8), st.text(alphabet="ab*?[]\\^-:", max_size=8))
def test_escaped_text_matches_itself_alone(text: str, other: str) -> None:
    """A prefix such as ``app[1]:`` must not act as a pattern."""
    assert redis_matches(glob_escape(text), text)
    assert redis_matches(glob_escape(text), other) == (text == other)
    assert redis_matches(glob_escape(text) + "*", other) == other.startswith(text)


def test_names_whose_check_is_remembered_are_short() -> None:
    """Others come from whoever connects or publishes, and have any length."""
    module._is_event.cache_clear()
    assert is_event("e" * 255) and not is_event("e" * 256)
    assert module._is_event.cache_info().currsize == 1
