"""Where settings come from: a TOML file, ``RELAY_…`` variables and flags, in rising precedence.

Owns these sources, and the sentences about what is wrong in them; the settings themselves are in `relay.config`.
"""

import json
import os
import re
import tomllib
from collections.abc import Container, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    SettingsError,
)

from relay.config import BROADCAST_SCHEMES, CONFIG_VARIABLE, TOKEN_KEY_VARIABLE, Config
from relay.errors import ConfigError
from relay.renamed_settings import RENAMED, rename
from relay.service_links import ENV_PREFIX, service_links
from relay.setting_names import did_you_mean, meant_in_list, setting_names

_SECRET = re.compile(r"(^|[._])(url|keys?|secrets?)(\.|$)")
"""Settings whose values are not repeated."""

_BUSES = ("redis_url", "broadcast_url")

_ALL_SETTINGS = "`relay config` lists all of them"


def load(path: str | Path | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    """Read the settings from file, variables and flags; a later source wins, key by key.

    Args:   path: a TOML file; without one, the file named by ``RELAY_CONFIG``, or none.
            flags: values by setting, as the command line gives them; None means not given.
    Raises: ConfigError: a missing file, an unknown key or a bad value, naming source, key and what was expected.
    """
    return load_with_sources(path, flags)[0]


def load_with_sources(
    path: str | Path | None = None, flags: Mapping[str, Any] | None = None
) -> tuple[Config, list[tuple[str, dict[str, Any]]]]:
    """Read the settings as `load` does; returns name and values of each source too, the strongest last.

    The sources are the file, the environment and the command line, each perhaps without any value.
    """
    path = path or os.environ.get(CONFIG_VARIABLE) or None
    sources = [
        (str(path), _read_file(Path(path)) if path else {}),
        ("environment", _read_environment()),
        ("command line", {key: value for key, value in (flags or {}).items() if value is not None}),
    ]
    merged: dict[str, Any] = {}
    for _, values in sources:
        _merge(merged, values)
    _check_encoding(sources[2])
    try:
        config = Config(**merged)
    except ValidationError as error:
        raise ConfigError(*explain(error, sources)) from None
    return config, sources


def unread_file(path: str | Path | None) -> str | None:
    """Say that a settings file which is here is not read, because none is named; None if there is none, or it is read.

    Args: path: the file that is named, as of `load`.
    """
    name = "relay.toml"
    if path or os.environ.get(CONFIG_VARIABLE) or not Path(name).is_file():
        return None
    return f"{name} in this directory is not read; to use it, add --config {name}"


def empty_bus(config: Config) -> str | None:
    """Say that a variable for the bus is empty where no bus is named; None otherwise.

    It was made of one that is not set, as in ``RELAY_REDIS_URL=$REDIS_URL``: on another bus no event would arrive.
    """
    if config.redis_url or config.broadcast_url:
        return None
    environment = {name.upper(): value for name, value in os.environ.items()}
    names = [name for name in map(variable, _BUSES) if environment.get(name) == ""]
    return f"{names[0]} is empty, so relay has no Redis of yours; set it, or remove it" if names else None


def from_arguments(config: Config | str | None, settings: dict[str, Any]) -> Config:
    """Make the settings of the arguments of `Relay`.

    Args:   config: all settings, or the address of the bus: ``redis://…``, ``embedded``, ``memory://`` and so on.
            settings: single settings by name.
    Raises: ConfigError: a setting is invalid, or is given twice.
    """
    if isinstance(config, Config):
        if settings:
            names = ", ".join(settings)
            raise ConfigError(f"Relay: expected a Config or single settings, got a Config and {names}")
        return config
    if not isinstance(config, str | None):
        raise ConfigError(f"Relay: expected the address of the bus, or a Config, got a {type(config).__name__}")
    if isinstance(config, str):
        if "://" not in config and config.endswith(".toml"):
            raise ConfigError(f"Relay: expected the address of the bus; Relay.from_file({config!r}) reads a file")
        name = "broadcast_url" if config.partition("://")[0] in BROADCAST_SCHEMES else "redis_url"
        if name in settings:
            raise ConfigError(f"Relay: {name}: expected once, got it as the first argument and by name")
        settings = {name: config, **settings}
    try:
        return Config(**settings)
    except ValidationError as error:
        raise ConfigError(*explain(error, [("Relay", settings)])) from None


def explain(error: ValidationError, sources: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Put what pydantic found into one finished sentence for each problem.

    Args: sources: name and values of each source of settings, the strongest last.
    """
    try:
        renamed = [(name, rename(values)[0]) for name, values in sources]
    except ValueError:  # one has a setting under both names; the error says so
        renamed = sources
    problems = error.errors(include_url=False)
    wrong = {problem["loc"][:-1] for problem in problems}
    # A list of nothing but wrong items is not also too short.
    return [_explain(each, renamed) for each in problems if each["type"] != "too_short" or each["loc"] not in wrong]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # editors of Windows write a byte order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from None


def _read_environment() -> dict[str, Any]:
    """Read ``RELAY_PORT``, ``RELAY_LIMITS__TOPICS_PER_SOCKET`` and their like; lists and tables are JSON."""
    ignored = set(service_links(os.environ))
    known = {CONFIG_VARIABLE, TOKEN_KEY_VARIABLE, *_variables(Config, ENV_PREFIX), *map(variable, RENAMED)}
    unknown = sorted(
        name for name in os.environ if name.startswith(ENV_PREFIX) and name.upper() not in known and name not in ignored
    )
    if unknown:
        raise ConfigError(*(f"environment: {name}: no such setting; {_advice_on_variable(name)}" for name in unknown))
    _check_encoding(("environment", {name: os.environ[name] for name in os.environ if _is_setting(name, ignored)}))
    try:
        return _Environment(Config, {name.lower() for name in ignored})()
    except SettingsError as error:
        raise ConfigError(f"environment: {_not_json(error)}: expected JSON") from None


def _is_setting(name: str, ignored: Container[str]) -> bool:
    return name.upper().startswith(ENV_PREFIX) and name not in ignored and name != CONFIG_VARIABLE  # that is a path


def _check_encoding(source: tuple[str, Mapping[str, Any]]) -> None:
    """Refuse bytes that are not UTF-8, which Python takes for half surrogate pairs. Raises ConfigError."""
    for name, value in source[1].items():
        try:
            _ = str(value).encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{source[0]}: {name}: expected text in UTF-8") from None


def _not_json(error: SettingsError) -> str:
    """The variable that could not be read, or those that it may be."""
    field = re.search(r'field "(\w+)"', str(error))
    prefix = variable(field[1]) if field else ENV_PREFIX
    found = [name for name in os.environ if name.upper() == prefix or name.upper().startswith(f"{prefix}__")]
    return " or ".join(sorted(name for name in found if not _is_json(os.environ[name])))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _advice_on_variable(name: str) -> str:
    known = {variable(".".join(setting.path)): setting for setting in setting_names(Config) if not setting.in_list}
    close = get_close_matches(name.upper(), known, n=1, cutoff=0.85)
    return f"did you mean {close[0]}?" if close else _ALL_SETTINGS


class _Environment(EnvSettingsSource):
    """The variables, without those that are no settings."""

    def __init__(self, settings: type[BaseSettings], ignored: Container[str]) -> None:
        """Read the variables; those of ``ignored``, in lower case, are left out."""
        super().__init__(settings)
        self.env_vars: Mapping[str, str | None] = {
            name: value for name, value in self.env_vars.items() if name not in ignored
        }

    def __call__(self) -> dict[str, Any]:
        """Read the settings, those under their former names too. Former names in tables are read with the table."""
        values = super().__call__()
        for old, new in RENAMED.items():
            if "." not in old:
                field = Config.model_fields[new]
                text, _, is_complex = self.get_field_value(field, old)
                if text is not None:
                    values[old] = self.prepare_field_value(old, field, text, is_complex)
        return values


def variable(name: str) -> str:
    """The environment variable of a setting, such as ``RELAY_LIMITS__SOCKETS_MAX`` of ``limits.sockets_max``."""
    return ENV_PREFIX + name.upper().replace(".", "__")


def _variables(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name.upper()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation, f"{prefix}{name.upper()}__")


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def _explain(problem: ErrorDetails, sources: list[tuple[str, dict[str, Any]]]) -> str:
    """Say in one line where a bad value stands, which key it is, what was expected and what came."""
    # Branches of a union appear in the location under their type's name, `tuple[str, ...]`; they are not keys.
    unknown = problem["type"] == "extra_forbidden"
    location = [part for part in problem["loc"] if isinstance(part, int) or unknown or "[" not in part]
    key = ".".join(str(part) for part in location)
    where = next((name for name, values in reversed(sources) if holds(values, location)), "settings")
    if unknown:
        return f"{where}: {key}: no such setting; {did_you_mean(location, Config) or _ALL_SETTINGS}"
    text = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected").replace("tuple", "list")
    text = text.replace("Tuple", "list").replace(" after validation", "")
    if problem["type"] == "tuple_type" and where == "environment":
        text = """expected a list as JSON, such as '["one", "two"]'"""
    if problem["type"] == "model_type":
        text = "expected a table"
    # A URL may hold a password, also where it stands at the wrong key; and a whole table says nothing.
    came = repr(problem["input"])
    secret = _SECRET.search(key) or "@" in came or isinstance(problem["input"], dict | Config)
    shown = "" if secret else f", got {came}"
    advice = meant_in_list(location, Config) if problem["type"] == "model_type" else None
    text = "; ".join(filter(None, (text[:1].lower() + text[1:] + shown, advice)))
    return ": ".join(filter(None, (where, key, text)))


def holds(values: Any, location: Sequence[int | str]) -> bool:
    """Say whether a source sets the key at ``location``."""
    for part in location:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return False
    return bool(location)
