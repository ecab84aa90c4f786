"""Former names of settings, which work for one minor version.

Owns the table of them; must not know what the settings mean.
"""

import logging
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_logger = logging.getLogger("relay")

RENAMED = {
    "origins": "allowed_origins",
    "anonymous": "allow_anonymous",
    "page": "demo_page",
    "limits.outboxes_max_bytes": "limits.outbox_total_max_bytes",
    "limits.rate_limited_max": "limits.rate_limit_violations_max",
    "topics.tell_dropped": "topics.notify_dropped",
    "metrics.folder": "metrics.dir",
}
"""New names by former names. A name in a list of tables is written without the place in the list."""


@dataclass
class OldNames:
    """The former names that one set of settings uses."""

    renamed: dict[str, str] = field(default_factory=dict)
    """New names by former names, as in `RENAMED`."""
    is_logged: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        """List them for a warning."""
        names = ", ".join(f"{old} (now {new})" for old, new in self.renamed.items())
        return f"former names of settings are in use; the next minor version rejects them: {names}"

    def log(self) -> None:
        """Log one warning about all of them, at the first call."""
        if self.renamed and not self.is_logged:
            _logger.warning("%s", self)
        self.is_logged = True

    def name_in_use(self, new: str) -> str:
        """Return the name under which a setting is given, so that another source can override it."""
        return next((old for old, now in self.renamed.items() if now == new), new)


def rename(values: Mapping[str, Any]) -> tuple[dict[str, Any], OldNames]:
    """Return settings under their new names, and the former names among them.

    Raises: ValueError: a setting is given under both names.
    """
    renamed = dict(values)
    used = OldNames()
    for old, new in RENAMED.items():
        table, _, old_key = old.rpartition(".")
        new_key = new.rpartition(".")[2]
        for place, entry in _tables(renamed, table):
            if old_key in entry:
                if new_key in entry:
                    raise ValueError(f"{place}{old_key} and {place}{new_key} are one setting; remove {place}{old_key}")
                entry[new_key] = entry.pop(old_key)
                used.renamed[old] = new
    return renamed, used


def _tables(values: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Replace the tables of a name by copies, and yield each with the prefix of its keys."""
    found = values.get(name)
    if not name:
        yield "", values
    elif isinstance(found, Mapping):
        values[name] = dict(found)
        yield f"{name}.", values[name]
    elif isinstance(found, list | tuple):
        values[name] = [dict(entry) if isinstance(entry, Mapping) else entry for entry in found]
        yield from ((f"{name}.{at}.", entry) for at, entry in enumerate(values[name]) if isinstance(entry, dict))


def rename_in_toml(text: str) -> str:
    """Return a TOML file with the new names; everything else in it, comments too, stays as it is."""
    for old, new in rename(tomllib.loads(text))[1].renamed.items():
        old_key, new_key = old.rpartition(".")[2], new.rpartition(".")[2]
        keys = re.finditer(rf"(?<![\w-]){old_key}(?=[\"']?[ \t]*=)", text)
        for match in reversed(list(keys)):  # from the end: a replacement moves what follows it
            candidate = text[: match.start()] + new_key + text[match.end() :]
            if _is_same_but_for_names(text, candidate):
                text = candidate
    return text


def _is_same_but_for_names(text: str, candidate: str) -> bool:
    """Say whether a replacement has renamed a setting: no comment, part of a string, or key of another table."""
    try:
        before, after = tomllib.loads(text), tomllib.loads(candidate)
        return before != after and rename(before)[0] == rename(after)[0]
    except ValueError:  # also that of tomllib
        return False
