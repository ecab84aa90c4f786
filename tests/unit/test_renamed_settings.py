"""Former names of settings: they work from every source, with one warning, and never beside the new names."""

import json
import logging
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay import Config, Relay
from relay.config_sources import load, variable
from relay.errors import ConfigError
from relay.renamed_settings import RENAMED, rename, rename_in_toml

VALUES: dict[str, Any] = {
    "origins": ["https://shop.example"],
    "anonymous": True,
    "page": False,
    "limits.outboxes_max_bytes": 5_000_000,
    "limits.rate_limited_max": 7,
    "topics.tell_dropped": True,
    "metrics.folder": "figures",
}
Source = Callable[[str, Any, Path, pytest.MonkeyPatch], Config]


def tree(name: str, value: Any) -> dict[str, Any]:
    """Settings with one key in them."""
    table, _, key = name.rpartition(".")
    if not table:
        return {key: value}
    return {table: [{"match": "a", key: value}] if table == "topics" else {key: value}}


def toml(name: str, value: Any) -> str:
    table, _, key = name.rpartition(".")
    header = {"": "", "topics": '[[topics]]\nmatch = "a"\n'}.get(table, f"[{table}]\n")
    return f"{header}{key} = {json.dumps(value)}\n"


def value_of(config: Config, new: str) -> Any:
    found: Any = config
    for part in new.split("."):
        found = getattr(found, part)
        found = found[0] if part == "topics" else found
    return list(found) if isinstance(found, tuple) else found


def from_file(name: str, value: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    (path / "relay.toml").write_text(toml(name, value))
    return load(path / "relay.toml")


def from_variable(name: str, value: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """By the setting's own variable; a list of tables has one alone."""
    if name.startswith("topics."):
        return from_json_variable(name, value, path, monkeypatch)
    monkeypatch.setenv(variable(name), value if isinstance(value, str) else json.dumps(value))
    return load()


def from_json_variable(name: str, value: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    ((key, found),) = tree(name, value).items()
    monkeypatch.setenv(variable(key), json.dumps(found))
    return load()


def from_flags(name: str, value: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    return load(flags=tree(name, value))


def from_config(name: str, value: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    return Config(**tree(name, value))


SOURCES = [from_file, from_variable, from_json_variable, from_flags, from_config]


def test_every_renamed_setting_is_tested() -> None:
    assert VALUES.keys() == RENAMED.keys()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("old", RENAMED)
def test_old_name_works_from_every_source(
    old: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = source(old, VALUES[old], tmp_path, monkeypatch)
    assert value_of(config, RENAMED[old]) == VALUES[old] != value_of(Config(**tree("topics.push", True)), RENAMED[old])
    assert config.old_names.renamed == {old: RENAMED[old]}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("old", RENAMED)
def test_new_name_is_no_old_name(old: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = source(RENAMED[old], VALUES[old], tmp_path, monkeypatch)
    assert value_of(config, RENAMED[old]) == VALUES[old]
    assert config.old_names.renamed == {}


@pytest.mark.parametrize("second", [from_variable, from_json_variable, from_flags])
@pytest.mark.parametrize("old", [name for name in RENAMED if not name.startswith("topics.")])
@pytest.mark.parametrize("is_old_in_file", [True, False])
def test_both_names_in_two_sources_are_an_error_that_names_both(
    old: str, second: Source, is_old_in_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (old, RENAMED[old]) if is_old_in_file else (RENAMED[old], old)
    path = tmp_path / "relay.toml"
    path.write_text(toml(names[0], VALUES[old]))
    monkeypatch.setenv("RELAY_CONFIG", str(path))
    with pytest.raises(ConfigError, match=f"{old} and {RENAMED[old]} are one setting; remove {old}") as caught:
        second(names[1], VALUES[old], tmp_path, monkeypatch)
    assert len(caught.value.problems) == 1


def test_both_names_in_the_environment_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_LIMITS", '{"rate_limited_max": 1}')
    monkeypatch.setenv("RELAY_LIMITS__RATE_LIMIT_VIOLATIONS_MAX", "2")
    with pytest.raises(ConfigError, match=r"limits\.rate_limited_max and limits\.rate_limit_violations_max"):
        load()
    monkeypatch.delenv("RELAY_LIMITS")
    assert load().limits.rate_limit_violations_max == 2


def test_both_names_in_one_entry_of_a_list_are_an_error() -> None:
    entries = [{"match": "a"}, {"match": "b", "tell_dropped": True, "notify_dropped": True}]
    with pytest.raises(ConfigError, match=r"topics\.1\.tell_dropped and topics\.1\.notify_dropped are one setting"):
        Relay(broadcast_url="memory://", topics=entries)


def test_old_name_of_one_source_is_overridden_by_the_same_name_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "relay.toml"
    path.write_text("[limits]\nrate_limited_max = 1\n")
    monkeypatch.setenv("RELAY_LIMITS__RATE_LIMITED_MAX", "2")
    assert load(path).limits.rate_limit_violations_max == 2


def test_bad_value_under_an_old_name_is_an_error_that_names_its_source(tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    path.write_text('page = "perhaps"')
    with pytest.raises(ConfigError, match=f"{path}: demo_page: expected a valid boolean"):
        load(path)


def test_setting_of_another_table_with_the_same_key_keeps_its_name() -> None:
    grant = {"match": "a", "rights": ["join"]}
    config = Config(auth={"anonymous": [grant]})
    assert config.auth.anonymous[0].match == "a"
    assert config.old_names.renamed == {}


def test_relay_logs_one_warning_with_all_old_names(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"origins": "any", "limits": {"rate_limited_max": 1, "outboxes_max_bytes": 0}}
    relay = Relay(broadcast_url="memory://", **settings)
    Relay(relay.config.model_copy(update={"port": 1}))
    (line,) = [record for record in caplog.records if "former names" in record.message]
    assert line.levelno == logging.WARNING
    for old in ("origins", "limits.rate_limited_max", "limits.outboxes_max_bytes"):
        assert f"{old} (now {RENAMED[old]})" in line.message


def test_relay_with_new_names_logs_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    Relay(broadcast_url="memory://", allowed_origins="any")
    assert caplog.records == []


def test_given_settings_are_not_changed() -> None:
    given = {"limits": {"rate_limited_max": 1}, "topics": [{"tell_dropped": True}]}
    rename(given)
    assert given == {"limits": {"rate_limited_max": 1}, "topics": [{"tell_dropped": True}]}


OLD_FILE = """\
# origins = "any" is for tests.
origins = "same" # origins = 5
  page=false
"anonymous" = true
limits.rate_limited_max = 4
metrics = {folder = "a folder = b", topics = ["page = 3"]}
auth = { anonymous = [{match = "anonymous = 1", rights = []}] }

[[topics]]
match = "a"
tell_dropped = true # not told otherwise

[[topics]]
match = "b"
notify_dropped = false
[[topics]]
match = "c"
tell_dropped\t= false
[redis]
control_channel = '''
page = 3
'''
"""

NEW_FILE = """\
# origins = "any" is for tests.
allowed_origins = "same" # origins = 5
  demo_page=false
"allow_anonymous" = true
limits.rate_limit_violations_max = 4
metrics = {dir = "a folder = b", topics = ["page = 3"]}
auth = { anonymous = [{match = "anonymous = 1", rights = []}] }

[[topics]]
match = "a"
notify_dropped = true # not told otherwise

[[topics]]
match = "b"
notify_dropped = false
[[topics]]
match = "c"
notify_dropped\t= false
[redis]
control_channel = '''
page = 3
'''
"""


def test_file_is_rewritten_key_for_key() -> None:
    assert rename_in_toml(OLD_FILE) == NEW_FILE
    assert rename_in_toml(NEW_FILE) == NEW_FILE
    assert rename(tomllib.loads(NEW_FILE))[1].renamed == {}


@pytest.mark.parametrize("old", RENAMED)
def test_each_old_name_in_a_file_is_rewritten(old: str) -> None:
    assert rename_in_toml(toml(old, VALUES[old])) == toml(RENAMED[old], VALUES[old])
