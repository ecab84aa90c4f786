"""Every setting is described, in `relay.config` and in the example `config/relay.toml`, which has them all."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from relay.config import Config
from relay.config_sections import TopicConfig
from relay.config_sources import load

EXAMPLE = Path(__file__).parents[2] / "config" / "relay.toml"


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting that holds a value, by its dotted name; a table in a list is named with ``[]``."""
    for name, field in model.model_fields.items():
        table, listed = table_of(field)
        if table is not None:
            yield from leaves(table, f"{prefix}{name}[]." if listed else f"{prefix}{name}.")
        else:
            yield prefix + name, field


def table_of(field: FieldInfo) -> tuple[type[BaseModel] | None, bool]:
    """The table that a setting is, or is a list of."""
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for argument in get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument, True
    return None, False


LEAVES = dict(leaves(Config))
NOT_SECRET = {"topics[].latest_key"}
"""Settings whose names only sound so."""


def test_settings_that_hold_secrets_are_not_shown() -> None:
    secret = {name for name in LEAVES if re.search("_url$|key$|secret|password|token$|target$", name)}
    assert {name for name in secret if LEAVES[name].repr} == NOT_SECRET
    assert len(secret) > 5


UNITS = {"_s": "second", "_bytes": "byte", "_per_s": "per second"}


def unit_of(name: str) -> str:
    """The word for a setting's unit; empty for one without."""
    return next((word for suffix, word in reversed(UNITS.items()) if name.endswith(suffix)), "")


def test_every_setting_has_a_description_which_names_its_unit() -> None:
    for name, field in LEAVES.items():
        assert field.description, f"{name} has no description"
        assert unit_of(name) in field.description, f"{name}: the description does not say {unit_of(name)!r}"


# The example, config/relay.toml.

TEXT = EXAMPLE.read_text("utf-8")
# An optional table stands in a comment: TOML has no way to say that there is none.
GIVEN = tomllib.loads(re.sub(r"^# (history = )", r"\1", TEXT, flags=re.MULTILINE))


def given(name: str) -> Any:
    """The value of a setting in the example; a list of tables has one entry there."""
    value: Any = GIVEN
    for part in name.split("."):
        value = value[part.removesuffix("[]")]
        if isinstance(value, list) and part.endswith("[]"):
            (value,) = value
    return value


def comment_of(name: str) -> str:
    """What is said of a setting: the comment above its line or the lines it stands among, and behind it."""
    name = re.sub(r"(\.history)\[\]\.\w+$", r"\1", name)  # a setting in an inline table
    table, _, key = name.rpartition(".")
    header = f"[[{table[:-2]}]]" if table.endswith("[]") else f"[{table}]" if table else ""
    lines = TEXT.splitlines()
    start = next(at for at, line in enumerate(lines) if line.lstrip("# ") == header) if header else 0
    at = next(at for at in range(start, len(lines)) if re.match(rf"(# )?{key} = ", lines[at]))
    behind = lines[at].partition("  #")[2]
    while lines[at] and not lines[at].startswith("#"):
        at -= 1
    above: list[str] = []
    while lines[at].startswith("#"):
        above.insert(0, lines[at].lstrip("# "))
        at -= 1
    return " ".join((*above, behind)).strip()


def has_default(name: str) -> bool:
    """False within a list of tables of which some key must be given: such a list is empty by default."""
    table = name.rpartition(".")[0]
    return all(
        field.default is not PydanticUndefined
        for other, field in LEAVES.items()
        if other.rpartition(".")[0] == table and table.endswith("[]")
    )


def test_example_sets_every_setting_to_its_default() -> None:
    with_default = [name for name in LEAVES if has_default(name)]
    assert len(with_default) > 80
    for name in with_default:
        default = LEAVES[name].default
        if isinstance(default, tuple):
            default = list(default)
        kind = str if isinstance(default, str) else type(default)
        assert (given(name), type(given(name))) == (default, kind), f"config/relay.toml: {name} is not the default"


def test_example_shows_settings_that_have_no_default_in_a_comment() -> None:
    for name in [name for name in LEAVES if not has_default(name)]:
        table, _, key = name.rpartition(".")
        pattern = rf"^# \[\[{re.escape(table[:-2])}\]\]\n(# \w+ = .*\n)*# {key} = "
        assert re.search(pattern, TEXT, re.MULTILINE), f"config/relay.toml: a comment should show {name}"


def test_example_says_what_every_setting_means_and_in_which_unit() -> None:
    for name in LEAVES:
        comment = comment_of(name).lower()
        assert len(comment) > 5, f"config/relay.toml: no comment explains {name}"
        assert unit_of(name) in comment, f"config/relay.toml: {name}: the comment does not say {unit_of(name)!r}"


def test_example_names_no_setting_that_does_not_exist() -> None:
    config = load(EXAMPLE)
    assert config == Config(topics=(TopicConfig(),))


def test_example_is_short_of_nothing_when_uncommented(tmp_path: Path) -> None:
    """What stands there in comments is right too."""
    path = tmp_path / "relay.toml"
    path.write_text(re.sub(r"^# (\[\[[\w.]+\]\]$|\w+ = )", r"\1", TEXT, flags=re.MULTILINE), encoding="utf-8")
    load(path)
