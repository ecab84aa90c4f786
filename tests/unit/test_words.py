"""The relay, its documentation and clients use plain technical English: no word of a list of unclear ones."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PLACES = ("README.md", "CONTRIBUTING.md", "docs", "clients", "config", "examples", "relay")
"""Files and directories in which no such word may stand."""

ENDINGS = {
    ".md",
    ".py",
    ".js",
    ".mjs",
    ".ts",
    ".html",
    ".css",
    ".toml",
    ".yaml",
    ".yml",
    ".json",
    ".conf",
    ".service",
    "",
}

LEFT_OUT = {"docs/reference"}
"""A page that is still to be rewritten; pages that are generated from `relay/`."""

UNCLEAR = {
    r"nobody|somebody|whoever|whomever": "name the client, the user or the program",
    r"anew|for ever|in vain": "say again, without a limit, without effect",
    r"heed(?:s|ed|ing)?": "say follow, use or apply",
    r"told": "say informed, notified, or what the message contains",
    r"(?<!\bnot )by (?:itself|themselves)": "say automatically, or alone",
    r"(?<!there )(?:is|are) none": "name what is missing",
    r"(?:is|are|was|were|been|be) sent away|send(?:s|ing)? (?:\w+ ){1,2}away": "say disconnect, close or redirect",
    r"sees? out|who is there|who gets in": "say finish, presence, authentication",
    r"house": "say structure, conventions",
    r"figures?": "say metrics, statistics or results",
    r"(?<!metrics\.)folders?": "say directory",
}
"""Patterns of whole words, and what to write instead. Names in code (`nobody_reads`) are not matched."""

_PATTERN = re.compile("|".join(rf"(?P<p{n}>\b(?:{words})\b)" for n, words in enumerate(UNCLEAR)), re.IGNORECASE)
_PYTHON_NONE = re.compile(r"\b(?:is|are) None\b")


def files() -> Iterator[Path]:
    for place in PLACES:
        path = ROOT / place
        for found in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = found.relative_to(ROOT).as_posix()
            is_left_out = any(name == left or name.startswith(f"{left}/") for left in LEFT_OUT)
            if found.is_file() and found.suffix in ENDINGS and not is_left_out and "node_modules" not in found.parts:
                yield found


def unclear(text: str) -> list[tuple[str, str]]:
    """Each unclear word of a text, and the advice about it."""
    advice = list(UNCLEAR.values())
    text = _PYTHON_NONE.sub("", text)
    return [(found[0], advice[int(str(found.lastgroup).removeprefix("p"))]) for found in _PATTERN.finditer(text)]


def test_relay_documentation_and_clients_are_in_plain_technical_english() -> None:
    checked = list(files())
    assert len(checked) > 30
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word!r}: {advice}"
        for path in checked
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        for word, advice in unclear(line)
    ]
    assert found == [], "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "nobody is answered",
        "Whoever has the key",
        "it heals by itself",
        "a text that is none",
        "users are sent away",
        "to send a user away",
        "the client is told",
        "the figures of this process",
        "a folder of plugins",
    ],
)
def test_unclear_words_are_found(text: str) -> None:
    assert len(unclear(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "if token is None:",
        "there are none",
        "test_answer_that_nobody_reads_is_cut",
        "the warehouse",
        "the folded text",
        "sent to a user who is away",
    ],
)
def test_other_words_are_not(text: str) -> None:
    assert unclear(text) == []
