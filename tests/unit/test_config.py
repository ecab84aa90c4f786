"""`relay.config`: where settings come from, what is said of bad ones, and the example that names them all."""

import os
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from relay import Relay
from relay.config import (
    AuthConfig,
    Config,
    GrantConfig,
    KeyConfig,
    LimitsConfig,
    MetricsConfig,
    OnGap,
    Overflow,
    Policy,
    ProxyConfig,
    RedisConfig,
    RestConfig,
    TopicConfig,
)
from relay.config_sources import load
from relay.errors import ConfigError
from relay.service_links import service_links

EXAMPLE = Path(__file__).parents[2] / "config" / "relay.toml"
SECRET = "hunter2"

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("RELAY_"):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file."""

    def write(text: str) -> Path:
        path = tmp_path / "relay.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path: str | Path | None = None, flags: dict[str, Any] | None = None) -> tuple[str, ...]:
    """What is said of bad settings."""
    with pytest.raises(ConfigError) as caught:
        load(path, flags)
    error = caught.value
    assert error.__suppress_context__ or error.__context__ is None, "no traceback of pydantic's comes along"
    for problem in error.problems:
        assert problem and "\n" not in problem, "one line each"
        assert "pydantic" not in problem
        assert ": :" not in problem
    return error.problems


# Where settings come from.


def test_without_any_source_all_settings_have_their_defaults() -> None:
    assert load() == Config()


def test_file_sets_what_it_names_and_nothing_else(write: Write) -> None:
    config = load(write('port = 9000\n[limits]\ntopics_per_socket = 5\n[[topics]]\nmatch = "a:*"\npush = false\n'))
    assert (config.port, config.host) == (9000, "127.0.0.1")
    assert config.limits == LimitsConfig(topics_per_socket=5)
    assert config.topics == (TopicConfig(match="a:*", push=False),)


def test_environment_wins_over_the_file_and_flags_over_both(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('host = "::1"\nport = 1\nworkers = 2\n')
    monkeypatch.setenv("RELAY_PORT", "2")
    monkeypatch.setenv("RELAY_WORKERS", "3")
    config = load(path, {"workers": 4})
    assert (config.host, config.port, config.workers) == ("::1", 2, 4)


def test_tables_are_merged_key_by_key(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("[limits]\ntopics_per_socket = 5\nidle_timeout_s = 7\n")
    monkeypatch.setenv("RELAY_LIMITS__TOPICS_PER_SOCKET", "6")
    assert load(path).limits == LimitsConfig(topics_per_socket=6, idle_timeout_s=7)


def test_flag_that_is_not_given_changes_nothing(write: Write) -> None:
    assert load(write("port = 1"), {"port": None, "host": None}).port == 1


def test_flag_may_be_false_or_zero(write: Write) -> None:
    config = load(write("port = 1\ndemo_page = true"), {"port": 0, "demo_page": False})
    assert (config.port, config.demo_page) == (0, False)


def test_lists_and_tables_in_the_environment_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_SOCKET_PATHS", '["/a", "/b"]')
    monkeypatch.setenv("RELAY_ALLOWED_ORIGINS", '["https://example.org"]')
    monkeypatch.setenv("RELAY_TOPICS", '[{"match": "a", "overflow": "latest"}]')
    monkeypatch.setenv("RELAY_REDIS", '{"to_prefix": "x:"}')
    config = load()
    assert (config.socket_paths, config.allowed_origins) == (("/a", "/b"), ("https://example.org",))
    assert config.topics == (TopicConfig(match="a", overflow=Overflow.LATEST),)
    assert config.redis == RedisConfig(to_prefix="x:")


def test_variables_are_read_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("relay_port", "9001")
    assert load().port == 9001


def test_relay_config_names_the_file_where_no_flag_does(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("port = 9000")
    monkeypatch.setenv("RELAY_CONFIG", str(path))
    assert load().port == 9000
    other = tmp_path / "other.toml"
    other.write_text("port = 9001")
    assert load(other).port == 9001
    monkeypatch.setenv("RELAY_CONFIG", "")
    assert load().port == 8000


def test_settings_given_to_the_tree_itself_ignore_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay mounted in another app is configured by that app's code."""
    monkeypatch.setenv("RELAY_PORT", "9000")
    assert Config().port == 8000


def test_settings_never_change() -> None:
    config = Config(topics=(TopicConfig(),))
    for table in (config, config.limits, config.redis, config.topics[0]):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, next(iter(type(table).model_fields)), 1)


# What is said of bad settings.


def test_missing_file_is_named() -> None:
    assert problems("/nowhere/relay.toml") == ("/nowhere/relay.toml: no such configuration file",)


def test_missing_file_of_relay_config_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_CONFIG", "/nowhere/relay.toml")
    assert problems() == ("/nowhere/relay.toml: no such configuration file",)


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path) == (f"{tmp_path}: cannot be read: Is a directory",)


@pytest.mark.parametrize("content", [b"port 8000", b"{}", b"port = 1\nport = 2", b'host = "\xff"'])
def test_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "relay.toml"
    path.write_bytes(content)
    (problem,) = problems(path)
    assert problem.startswith(f"{path}: not a TOML file: ")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("prot = 1", "prot"),
        ('redis-url = "x"', "redis-url"),
        ('"a b" = 1', "a b"),
        ('"a[b" = 1', "a[b"),
        ("[limits]\nframe_max = 1", "limits.frame_max"),
        ("[redis]\nurl = 1", "redis.url"),
        ('[[topics]]\nmatch = "a"\n[[topics]]\nmach = "a"', "topics.1.mach"),
    ],
)
def test_unknown_key_is_named_with_its_file(write: Write, text: str, key: str) -> None:
    path = write(text)
    assert problems(path) == (f"{path}: {key}: no such setting; see config/relay.toml for all of them",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('port = "many"', "port: expected a valid integer, unable to parse string as an integer, got 'many'"),
        ("port = 65536", "port: expected less than or equal to 65535, got 65536"),
        ("port = -1", "port: expected greater than or equal to 0, got -1"),
        ("workers = 0", "workers: expected greater than 0, got 0"),
        ("host = 5", "host: expected a valid string, got 5"),
        ('demo_page = "perhaps"', "demo_page: expected a valid boolean, unable to interpret input, got 'perhaps'"),
        ('log_level = "loud"', "log_level: expected 'debug', 'info', 'warning' or 'error', got 'loud'"),
        ("limits = 5", "limits: expected a table, got 5"),
        ("topics = 5", "topics: expected a valid list, got 5"),
        ("topics = [5]", "topics.0: expected a table, got 5"),
        ("[limits]\nidle_timeout_s = 0", "limits.idle_timeout_s: expected greater than 0, got 0"),
        ("[limits]\nidle_timeout_s = inf", "limits.idle_timeout_s: expected a finite number, got inf"),
        ("[limits]\nidle_timeout_s = nan", "limits.idle_timeout_s: expected a finite number, got nan"),
        ("[limits]\noutbox_max_bytes = 0", "limits.outbox_max_bytes: expected greater than 0, got 0"),
        (
            '[[topics]]\noverflow = "x"',
            "topics.0.overflow: expected 'disconnect', 'drop-oldest', 'latest' or 'recover', got 'x'",
        ),
        ('[[topics]]\non_gap = "x"', "topics.0.on_gap: expected 'rejoin' or 'ignore', got 'x'"),
        ('[[topics]]\nmatch = ""', "topics.0.match: string should have at least 1 character, got ''"),
        ('socket_paths = ["socket"]', "socket_paths: expected paths like \"/socket\", got ['socket']"),
        ('socket_paths = ["/"]', "socket_paths: expected paths like \"/socket\", got ['/']"),
        (
            'allowed_origins = ["example.org"]',
            'allowed_origins: expected "https://host[:port]", "//host" or "//*.host" in each place, '
            "got ['example.org']",
        ),
        (
            'allowed_origins = ["https://example.org/app"]',
            'allowed_origins: expected "https://host[:port]", "//host" or "//*.host" in each place, '
            "got ['https://example.org/app']",
        ),
        (
            'allowed_origins = ["https://a:99999"]',
            "allowed_origins: port out of range 0-65535, got ['https://a:99999']",
        ),
        ('[rest]\npath = "api"', 'rest.path: expected a path like "/api", or "" for none, got \'api\''),
        ('[rest]\npath = "/"', 'rest.path: expected a path like "/api", or "" for none, got \'/\''),
        (
            'redis_url = "localhost:6379"',
            "redis_url: expected a URL that starts with redis:// or rediss:// or unix:// or redis+sentinel:// or "
            "rediss+sentinel://",
        ),
        (
            'redis_url = "redis+sentinel://h:26379"',
            "redis_url: expected redis+sentinel://user:password@host:port,host:port/master/db",
        ),
        (
            'redis_url = "redis+sentinel://:pass@h:x,i/mymaster"',
            "redis_url: expected redis+sentinel://user:password@host:port,host:port/master/db",
        ),
        (
            'broadcast_url = "redis://h"',
            "broadcast_url: expected a URL that starts with memory:// or postgres:// or postgresql:// or kafka://",
        ),
        (
            '[redis]\nto_prefix = "a"\nfrom_prefix = "ab"',
            "redis: to_prefix and from_prefix must not begin alike, or the relay would hear its own pushes",
        ),
        (
            '[redis]\nto_prefix = "from:x"',
            "redis: to_prefix and from_prefix must not begin alike, or the relay would hear its own pushes",
        ),
    ],
)
def test_bad_value_is_told_with_file_key_and_what_was_expected(write: Write, text: str, told: str) -> None:
    path = write(text)
    assert problems(path) == (f"{path}: {told}",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            'redis_url = "redis://h"\nbroadcast_url = "memory://"',
            "settings: redis_url and broadcast_url exclude each other; set one of them",
        ),
        (
            'broadcast_url = "memory://"\nworkers = 2',
            "settings: broadcast_url memory:// reaches one process only; use Redis, or workers = 1",
        ),
    ],
)
def test_settings_that_exclude_each_other_are_told(write: Write, text: str, told: str) -> None:
    assert problems(write(text)) == (told,)


def test_every_problem_is_told_at_once(write: Write) -> None:
    told = problems(write("port = -1\nprot = 1\n[limits]\nframe_max_bytes = 0"))
    assert [line.split(": ")[1] for line in told] == ["port", "limits.frame_max_bytes", "prot"]


def test_value_that_fits_neither_form_is_told_for_both(write: Write) -> None:
    path = write("allowed_origins = 5")
    assert problems(path) == (
        f"{path}: allowed_origins: expected 'same' or 'any', got 5",
        f"{path}: allowed_origins: expected a valid list, got 5",
    )


def test_bad_value_is_told_with_the_source_it_comes_from(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("port = -1")
    monkeypatch.setenv("RELAY_PORT", "-2")
    assert problems(path, {"port": -3}) == ("command line: port: expected greater than or equal to 0, got -3",)
    assert problems(path) == ("environment: port: expected greater than or equal to 0, got '-2'",)
    monkeypatch.delenv("RELAY_PORT")
    assert problems(path) == (f"{path}: port: expected greater than or equal to 0, got -1",)


@pytest.mark.parametrize("name", ["RELAY_PROT", "RELAY_LIMITS__FRAMES", "RELAY_LIMITS_FRAME_MAX_BYTES", "RELAY_"])
def test_unknown_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert problems() == (f"environment: {name}: no such setting; see config/relay.toml",)


KUBERNETES = {
    # A Service named `relay` with one port, and with two named ones; IPv6.
    "relay": {
        "RELAY_SERVICE_HOST": "10.0.0.1",
        "RELAY_SERVICE_PORT": "80",
        "RELAY_PORT": "tcp://10.0.0.1:80",
        "RELAY_PORT_80_TCP": "tcp://10.0.0.1:80",
        "RELAY_PORT_80_TCP_PROTO": "tcp",
        "RELAY_PORT_80_TCP_PORT": "80",
        "RELAY_PORT_80_TCP_ADDR": "10.0.0.1",
    },
    "named ports, IPv6, UDP": {
        "RELAY_SERVICE_HOST": "fd00::1",
        "RELAY_SERVICE_PORT": "8080",
        "RELAY_SERVICE_PORT_HTTP": "8080",
        "RELAY_SERVICE_PORT_WEB_METRICS": "9090",
        "RELAY_PORT": "tcp://[fd00::1]:8080",
        "RELAY_PORT_8080_TCP": "tcp://[fd00::1]:8080",
        "RELAY_PORT_8080_TCP_ADDR": "fd00::1",
        "RELAY_PORT_53_UDP": "udp://[fd00::1]:53",
        "RELAY_PORT_53_UDP_PROTO": "udp",
    },
    "relay-redis and relay-web": {
        "RELAY_REDIS_SERVICE_HOST": "10.0.0.2",
        "RELAY_REDIS_SERVICE_PORT": "6379",
        "RELAY_REDIS_PORT": "tcp://10.0.0.2:6379",
        "RELAY_REDIS_PORT_6379_TCP_ADDR": "10.0.0.2",
        "RELAY_WEB_PORT": "tcp://10.0.0.3:80",
        "RELAY_WEB_SERVICE_HOST": "10.0.0.3",
        "RELAY_WEB_SERVICE_PORT_HTTPS": "443",
    },
    "relay-redis--url, which looks like a key of a table": {
        "RELAY_REDIS__URL_SERVICE_HOST": "10.0.0.4",
        "RELAY_REDIS__URL_PORT": "tcp://10.0.0.4:80",
    },
    "a link of Docker's": {
        "RELAY_NAME": "/web/relay",
        "RELAY_PORT": "tcp://172.17.0.5:8000",
        "RELAY_PORT_8000_TCP": "tcp://172.17.0.5:8000",
        "RELAY_PORT_8000_TCP_START": "tcp://172.17.0.5:8000",
        "RELAY_PORT_8000_TCP_END": "tcp://172.17.0.5:8004",
        "RELAY_PORT_8000_TCP_PORT_START": "8000",
        "RELAY_ENV_PATH": "/bin:/usr/bin",
        "RELAY_ENV_RELAY_HOST": "0.0.0.0",
    },
}


@pytest.mark.parametrize("variables", KUBERNETES.values(), ids=KUBERNETES)
def test_service_links_are_ignored(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources: kubernetes.io/docs/concepts/services-networking/service, docs.docker.com/engine/network/links."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load() == Config()
    assert service_links(os.environ) == sorted(variables)


def test_settings_beside_service_links_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KUBERNETES["relay"], "RELAY_PORT": "9000", "RELAY_HOST": "0.0.0.0"}.items():
        monkeypatch.setenv(name, value)
    config = load()
    assert (config.port, config.host) == (9000, "0.0.0.0")
    assert "RELAY_PORT" not in service_links(os.environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RELAY_SERVICE_HOST", "relay.internal"),
        ("RELAY_SERVICE_PORT", "80"),
        ("RELAY_SERVICE_PORT_HTTP", "80"),
        ("RELAY_REDIS_PORT", "6379"),
        ("RELAY_NAME", "/web/relay"),
        ("RELAY_ENV_PATH", "/bin"),
        ("RELAY_PORT_80_TCP_ADDR", "somewhere"),
        ("RELAY_ADDRESS", "tcp://10.0.0.1:80"),
    ],
)
def test_what_only_resembles_a_service_link_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert problems() == (f"environment: {name}: no such setting; see config/relay.toml",)


def test_typing_error_beside_service_links_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KUBERNETES["relay"], "RELAY_PROT": "9000", "RELAY_WEB_SERVICE_PORT": "80"}.items():
        monkeypatch.setenv(name, value)
    assert [problem.split(": ")[1] for problem in problems()] == ["RELAY_PROT", "RELAY_WEB_SERVICE_PORT"]


def test_port_that_is_no_link_and_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_PORT", "http://10.0.0.1:80")
    (problem,) = problems()
    assert problem.startswith("environment: port: expected a valid integer")


def test_key_of_relay_token_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_TOKEN_KEY", SECRET)
    assert load() == Config()


def test_service_links_are_logged_by_a_mounted_relay(
    write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RELAY_PORT", "tcp://10.0.0.1:80")
    caplog.set_level("INFO")
    Relay.from_file(write('broadcast_url = "memory://"'))
    assert [record.message for record in caplog.records] == [
        "variables of a Kubernetes service or container link ignored: RELAY_PORT"
    ]


def test_unknown_key_within_a_variables_json_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_LIMITS", '{"frames": 1}')
    assert problems() == ("environment: limits.frames: no such setting; see config/relay.toml for all of them",)


@pytest.mark.parametrize(("name", "value"), [("SOCKET_PATHS", "/a"), ("LIMITS", "5x"), ("TOPICS", "[{")])
def test_variable_that_is_not_json_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"RELAY_{name}", value)
    (problem,) = problems()
    assert problem.startswith("environment: ")
    assert name.lower() in problem
    assert problem.endswith("expected JSON")


# Secrets.

SPOILT = [
    f'redis_url = "http://user:{SECRET}@host"',
    f'redis_url = "redis://user:{SECRET}/x@host:6379"',
    f'redis_url = "redis://user:{SECRET}#x@host:6379"',
    f'redis_url = "redis://user:p@{SECRET}:x"',
    f'redis_url = "redis://[{SECRET}@host"',
    f'redis_url = "redis://user:{SECRET}\uff0f@host"',
    f'redis_url = ["redis://user:{SECRET}@host"]',
    f'redis_url = "redis://user:{SECRET}@host"\nbroadcast_url = "memory://"',
    f'redis_url = "redis://user:{SECRET}@host"\nport = -1',
    f'redis = "redis://user:{SECRET}@host"',
    f'redis_ulr = "redis://user:{SECRET}@host"',
    f'host = ["redis://user:{SECRET}@host"]',
    f'port = "redis://user:{SECRET}@host"',
    f'broadcast_url = "postgres://user:{SECRET}@host:x/db"',
    f'broadcast_url = "mysql://user:{SECRET}@host/db"',
    f'[redis]\nurl = "redis://user:{SECRET}@host"',
    f'[rest]\napi_key = ["{SECRET}"]',
    f'[rest]\nkey = "{SECRET}"',
    f'[[proxy]]\nprefix = "/x"\ntarget = "ftp://user:{SECRET}@host"',
]


@pytest.mark.parametrize("text", SPOILT)
def test_no_password_is_told_with_a_problem(write: Write, text: str) -> None:
    """Errors reach logs; urllib's own quote what they could not read."""
    with pytest.raises(ConfigError) as caught:
        load(write(text))
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize("name", ["REDIS_URL", "REDIS", "BROADCAST_URL", "PORT"])
def test_no_password_in_a_variable_is_told_with_a_problem(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"RELAY_{name}", f"http://user:{SECRET}@host")
    assert all(SECRET not in problem for problem in problems())


def test_no_password_is_shown_by_the_settings() -> None:
    for config in (
        Config(redis_url=f"redis://user:{SECRET}@host"),
        Config(broadcast_url=f"postgres://user:{SECRET}@host/db"),
        Config(rest=RestConfig(api_key=SECRET)),
        Config(proxy=(ProxyConfig(prefix="/x", target=f"http://user:{SECRET}@host"),)),
    ):
        assert SECRET not in repr(config)
        assert SECRET not in str(config)


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


@pytest.mark.parametrize(
    "name", [name for name in LEAVES if re.search("_url$|api_key$|secret|password|token$|target$", name)]
)
def test_setting_that_holds_a_secret_is_not_shown(name: str) -> None:
    assert LEAVES[name].repr is False


# Rules.


def test_latest_key_is_for_the_policy_latest_alone() -> None:
    topic = TopicConfig(match="aircraft:*", overflow=Overflow.LATEST, latest_key="icao24", notify_dropped=True)
    assert topic.policy == Policy(Overflow.LATEST, "icao24", True, "aircraft:*")
    with pytest.raises(ValidationError, match="latest_key"):
        TopicConfig(latest_key="icao24")


@pytest.mark.parametrize("networks", [("nonsense",), ("10.0.0.1/8",), ("",)])
def test_trusted_proxies_are_addresses_or_networks(networks: tuple[str, ...]) -> None:
    good = ("127.0.0.1", "10.0.0.0/8", "fd00::/8")
    assert Config(trusted_proxies=good).trusted_proxies == good
    with pytest.raises(ValidationError, match="trusted_proxies"):
        Config(trusted_proxies=networks)


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"payload_max_bytes": 2_000_000}, "frame_max_bytes = 1052672"),
        ({"payload_max_bytes": 4_000_000}, "frame_max_bytes = 1052672 and outbox_max_bytes = 2097152"),
        ({"payload_max_bytes": 4_000_000, "frame_max_bytes": 5_000_000}, "outbox_max_bytes = 2097152"),
        ({"frame_max_bytes": 1_049_599}, "frame_max_bytes = 1049599"),
        ({"outbox_max_bytes": 1_049_599}, "outbox_max_bytes = 1049599"),
    ],
)
def test_bounds_that_a_payload_does_not_fit_are_refused_with_the_minimum(
    limits: dict[str, int], told: str, write: Write
) -> None:
    """Who raises ``payload_max_bytes`` alone learns which keys go with it, and what they must be."""
    payload = limits.get("payload_max_bytes", 1_048_576)
    lines = "\n".join(f"{key} = {value}" for key, value in limits.items())
    path = write(f"[limits]\n{lines}")
    assert problems(path) == (
        f"{path}: limits: expected {payload + 1024} bytes at least (payload_max_bytes = {payload}, and 1024 for what "
        f"surrounds a payload), got {told}",
    )


def test_payload_of_a_mebibyte_passes_by_default_and_the_least_bounds_are_allowed() -> None:
    limits = LimitsConfig()
    assert (limits.payload_max_bytes, limits.frame_max_bytes, limits.outbox_max_bytes) == (
        1_048_576,
        1_052_672,
        2_097_152,
    )
    LimitsConfig(payload_max_bytes=1000, frame_max_bytes=2024, outbox_max_bytes=2024)


def test_least_wait_between_attempts_is_not_above_the_longest() -> None:
    RedisConfig(backoff_min_s=3, backoff_max_s=3)
    with pytest.raises(ValidationError, match="backoff_min_s = 6 must not be more than backoff_max_s = 5"):
        RedisConfig(backoff_min_s=6)


@pytest.mark.parametrize(
    "url", ["http://", "https://:8000", "http://h:99999", "http://h:port", "http://h:0", "http://[x"]
)
def test_address_without_a_host_or_with_an_impossible_port_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="with a host, and a port of 1 to 65535"):
        ProxyConfig(prefix="/x", target=url)
    with pytest.raises(ValidationError, match="with a host, and a port of 1 to 65535"):
        AuthConfig(jwks_url=url)


LIMITS_THAT_CAN_BE_OFF = [
    name for name, field in LimitsConfig.model_fields.items() if "0:" in (field.description or "")
]


@pytest.mark.parametrize("name", LimitsConfig.model_fields)
def test_zero_turns_a_limit_off_where_that_is_said(name: str) -> None:
    if name in LIMITS_THAT_CAN_BE_OFF:
        assert getattr(LimitsConfig(**{name: 0}), name) == 0
    else:
        with pytest.raises(ValidationError):
            LimitsConfig(**{name: 0})


@pytest.mark.parametrize(
    "url",
    [
        "",
        "embedded",
        "redis://localhost",
        "redis://user:p%40ss@host:6379/0",
        "rediss://host",
        "unix:///run/redis.sock",
    ],
)
def test_redis_may_be_named_so(url: str) -> None:
    assert Config(redis_url=url).redis_url == url


@pytest.mark.parametrize("url", ["", "memory://", "postgres://h/db", "postgresql://h/db", "kafka://h:9092"])
def test_broadcast_may_be_named_so(url: str) -> None:
    assert Config(broadcast_url=url).broadcast_url == url


def test_only_redis_can_be_embedded() -> None:
    with pytest.raises(ValidationError):
        Config(broadcast_url="embedded")


@pytest.mark.parametrize("channel", ["from:room:1:x", "to:room:1:x", "from:"])
def test_browsers_cannot_name_the_control_channel(channel: str) -> None:
    """A push is published on what starts with ``from_prefix``; the rest of that name is the browser's."""
    with pytest.raises(ValidationError, match="control_channel"):
        RedisConfig(control_channel=channel)
    assert RedisConfig(control_channel="").control_channel == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listening_to_other_machines_is_fine_where_somebody_asks_who_it_is(host: str) -> None:
    Config(host=host, auth=AuthConfig(keys=(KeyConfig(key="x"),))).check_exposure()
    Config(host=host, auth=AuthConfig(jwks_url="https://login.example.org/jwks")).check_exposure()
    Config(host=host).check_exposure(authenticates=True)
    with pytest.raises(ConfigError, match="auth.keys"):
        Config(host=host, auth=AuthConfig(anonymous=(GrantConfig(match="*", rights=("join",)),))).check_exposure()


def test_socket_paths_lose_their_last_slash() -> None:
    assert Config(socket_paths=("/socket/", "/a/b")).socket_paths == ("/socket", "/a/b")


@pytest.mark.parametrize(("path", "clean"), [("", ""), ("/api", "/api"), ("/a/b/", "/a/b")])
def test_rest_path_loses_its_last_slash(path: str, clean: str) -> None:
    assert RestConfig(path=path).path == clean


@pytest.mark.parametrize(
    "origins", ["same", "any", (), ("https://a",), ("https://a:1", "//b", "//*.c", "https://d/", "http://[::1]:8000")]
)
def test_origins_may_be_named_so(origins: Any) -> None:
    assert Config(allowed_origins=origins).allowed_origins == origins


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "relay.example", ""])
def test_listening_to_other_machines_must_be_meant(host: str) -> None:
    with pytest.raises(ConfigError, match="allow_anonymous = true") as caught:
        Config(host=host).check_exposure()
    assert len(caught.value.problems) == 1
    Config(host=host, allow_anonymous=True).check_exposure()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_listening_to_this_machine_needs_no_permission(host: str) -> None:
    Config(host=host).check_exposure()


@pytest.mark.parametrize(
    ("topic", "match"),
    [
        ("aircraft:1", "aircraft:*"),
        ("aircraft:", "aircraft:*"),
        ("aircraft:fast", "aircraft:*"),
        ("room:1", "room:[0-9]"),
        ("room:12", "room:??"),
        ("room:x", "*x"),
        ("Aircraft:1", "*"),
        ("anything", "*"),
    ],
)
def test_first_entry_that_matches_a_topic_is_used(topic: str, match: str) -> None:
    entries = ("aircraft:*", "aircraft:fast", "room:[0-9]", "room:??", "*x", "*", "never")
    config = Config(topics=tuple(TopicConfig(match=entry) for entry in entries))
    assert config.topic(topic).match == match


def test_topic_that_no_entry_matches_has_the_defaults() -> None:
    config = Config(topics=(TopicConfig(match="a", push=False),))
    assert config.topic("b") == TopicConfig()
    defaults = TopicConfig()
    assert (defaults.overflow, defaults.on_gap, defaults.push) == (Overflow.DISCONNECT, OnGap.REJOIN, True)


@pytest.mark.parametrize(("topic", "label"), [("aircraft:1", "aircraft:*"), ("a", "a*"), ("b", "")])
def test_topic_counts_for_the_first_pattern_it_matches(topic: str, label: str) -> None:
    assert MetricsConfig(topics=("aircraft:*", "a*", "aircraft:1")).label(topic) == label


@pytest.mark.parametrize("name", LEAVES)
def test_every_setting_has_a_description(name: str) -> None:
    assert LEAVES[name].description


UNITS = {"_s": "second", "_bytes": "byte", "_per_s": "per second"}


@pytest.mark.parametrize("name", [name for name in LEAVES if name.endswith(tuple(UNITS))])
def test_setting_with_a_unit_says_which(name: str) -> None:
    unit = next(word for suffix, word in reversed(UNITS.items()) if name.endswith(suffix))
    assert unit in (LEAVES[name].description or "")


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


@pytest.mark.parametrize("name", [name for name in LEAVES if has_default(name)])
def test_example_sets_every_setting_to_its_default(name: str) -> None:
    default = LEAVES[name].default
    if isinstance(default, tuple):
        default = list(default)
    assert (given(name), type(given(name))) == (default, type(default) if not isinstance(default, str) else str)


@pytest.mark.parametrize("name", [name for name in LEAVES if not has_default(name)])
def test_example_shows_settings_that_have_no_default_in_a_comment(name: str) -> None:
    table, _, key = name.rpartition(".")
    assert re.search(rf"^# \[\[{re.escape(table[:-2])}\]\]\n(# \w+ = .*\n)*# {key} = ", TEXT, re.MULTILINE)


@pytest.mark.parametrize("name", LEAVES)
def test_example_says_what_every_setting_means_and_in_which_unit(name: str) -> None:
    comment = comment_of(name).lower()
    assert len(comment) > 5
    unit = next((word for suffix, word in reversed(UNITS.items()) if name.endswith(suffix)), "")
    assert unit in comment


def test_example_names_no_setting_that_does_not_exist() -> None:
    config = load(EXAMPLE)
    assert config == Config(topics=(TopicConfig(),))


def test_example_is_short_of_nothing_when_uncommented(tmp_path: Path) -> None:
    """What stands there in comments is right too."""
    path = tmp_path / "relay.toml"
    path.write_text(re.sub(r"^# (\[\[[\w.]+\]\]$|\w+ = )", r"\1", TEXT, flags=re.MULTILINE), encoding="utf-8")
    load(path)
