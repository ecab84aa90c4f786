"""`relay.config_sources`: where settings come from, and what is said of bad ones."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from relay.config import Config
from relay.config_redis import RedisConfig
from relay.config_sections import LimitsConfig, Overflow, TopicConfig
from relay.config_sources import empty_bus, load
from relay.errors import ConfigError
from tests.support.settings import Write, problems

SECRET = "hunter2"

ALL_SETTINGS = "`relay config` lists all of them"

# Where settings come from.


def test_without_any_source_all_settings_have_their_defaults() -> None:
    assert load() == Config()


def test_file_sets_what_it_names_and_nothing_else(write: Write) -> None:
    config = load(write('port = 9000\n[limits]\ntopics_per_socket = 5\n[[topics]]\nmatch = "a:*"\npush = false\n'))
    assert (config.port, config.host) == (9000, "127.0.0.1")
    assert config.limits == LimitsConfig(topics_per_socket=5)
    assert config.topics == (TopicConfig(match="a:*", push=False),)


def test_byte_order_mark_before_the_file_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    path.write_bytes(b"\xef\xbb\xbfport = 9000\r\n")
    assert load(path).port == 9000


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
    ("text", "key", "advice"),
    [
        ("prot = 1", "prot", "did you mean port?"),
        ('redis-url = "x"', "redis-url", "did you mean redis_url?"),
        ('"a b" = 1', "a b", ALL_SETTINGS),
        ('"a[b" = 1', "a[b", ALL_SETTINGS),
        ("authenticat = 1", "authenticat", ALL_SETTINGS),
        ("match = 1", "match", ALL_SETTINGS),
        ("api_key = 1", "api_key", "did you mean rest.api_key?"),
        ("history = { size = 5 }", "history", "did you mean history in [[topics]]?"),
        ("requests_max = 5", "requests_max", "did you mean requests_max in [[proxy]] or requests_max in [[webhooks]]?"),
        ("[limits]\nframe_max = 1", "limits.frame_max", "did you mean limits.frame_max_bytes?"),
        ("[redis]\nurl = 1", "redis.url", "did you mean redis_url?"),
        ('[[topics]]\nmatch = "a"\n[[topics]]\nmach = "a"', "topics.1.mach", "did you mean match in [[topics]]?"),
        ("[[topics]]\nhistory = { ttl = 5 }", "topics.0.history.ttl", "did you mean topics.history.ttl_s?"),
    ],
)
def test_unknown_key_is_named_with_its_file_and_what_may_be_meant(
    write: Write, text: str, key: str, advice: str
) -> None:
    path = write(text)
    assert problems(path) == (f"{path}: {key}: no such setting; {advice}",)


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
        ("presence = true", "presence: expected a table, got True; did you mean presence in [[topics]]?"),
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
        ('socket_paths = [""]', "socket_paths: expected paths like \"/socket\", got ['']"),
        (
            '[auth]\ntangram = "open"',
            'auth: tangram = "open" gives tokens without the API key; expected [[auth.tangram_topics]] with the topics '
            "that they may be for",
        ),
        (
            'allowed_origins = ["example.org"]',
            'allowed_origins: expected "any", or a list of "same", "https://host[:port]", "//host" and "//*.host", '
            "got ['example.org']",
        ),
        (
            'allowed_origins = ["https://example.org/app"]',
            'allowed_origins: expected "any", or a list of "same", "https://host[:port]", "//host" and "//*.host", '
            "got ['https://example.org/app']",
        ),
        (
            'allowed_origins = ["https://*"]',
            'allowed_origins: expected "any", or a list of "same", "https://host[:port]", "//host" and "//*.host", '
            "got ['https://*']",
        ),
        (
            'allowed_origins = ["https://bücher.example"]',
            'allowed_origins: expected names as browsers send them, such as "https://xn--bcher-kva.example", '
            "got ['https://bücher.example']",
        ),
        (
            'socket_paths = ["/so cket?x"]',
            "socket_paths: expected paths without ?, # and control characters, which no request has in its path, "
            "got ['/so cket?x']",
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
            "rediss+sentinel:// or redis+cluster:// or rediss+cluster://",
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


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("RELAY_PROT", "did you mean RELAY_PORT?"),
        ("RELAY_LIMITS__FRAMES", ALL_SETTINGS),
        ("RELAY_LIMITS_FRAME_MAX_BYTES", "did you mean RELAY_LIMITS__FRAME_MAX_BYTES?"),
        ("RELAY_", ALL_SETTINGS),
    ],
)
def test_unknown_variable_is_named_with_what_may_be_meant(
    name: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    assert problems() == (f"environment: {name}: no such setting; {advice}",)


def test_unknown_key_within_a_variables_json_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_LIMITS", '{"frames": 1}')
    assert problems() == (f"environment: limits.frames: no such setting; {ALL_SETTINGS}",)


@pytest.mark.parametrize(
    ("name", "value"), [("SOCKET_PATHS", "/a"), ("LIMITS", "5x"), ("TOPICS", "[{"), ("AUTH__KEYS", "secret")]
)
def test_variable_that_is_not_json_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_AUTH__LEEWAY_S", "5")
    monkeypatch.setenv(f"RELAY_{name}", value)
    assert problems() == (f"environment: RELAY_{name}: expected JSON",)


@pytest.mark.parametrize("name", ["RELAY_REDIS_URL", "RELAY_BROADCAST_URL"])
def test_empty_variable_of_the_bus_is_noticed_where_none_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``RELAY_REDIS_URL=$REDIS_URL``: the relay would be ready, and no event would arrive."""
    assert empty_bus(load()) is None
    monkeypatch.setenv(name, "")
    said = empty_bus(load())
    assert said is not None and said.startswith(f"{name} is empty, so relay has no Redis of yours")
    assert empty_bus(load(None, {"redis_url": "redis://localhost"})) is None


@pytest.mark.parametrize("name", ["RELAY_REST__API_KEY", "RELAY_HOST", "RELAY_REDIS_URL"])
def test_variable_that_is_not_utf_8_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "a\udcff")  # as Python reads the byte 0xff
    assert problems() == (f"environment: {name}: expected text in UTF-8",)


def test_option_that_is_not_utf_8_is_named() -> None:
    with pytest.raises(ConfigError, match="^command line: redis_url: expected text in UTF-8$"):
        load(None, {"redis_url": "redis://\udcff"})


@pytest.mark.parametrize(("name", "value"), [("ALLOWED_ORIGINS", "one"), ("PLUGINS__PATHS", ""), ("TOPICS", "{}")])
def test_variable_of_a_list_is_answered_with_its_form(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"RELAY_{name}", value)
    assert """expected a list as JSON, such as '["one", "two"]'""" in problems()[-1]


@pytest.mark.parametrize("address", ["memory", "postgres", "kafka", "memory:"])
def test_address_of_a_bus_without_slashes_is_refused(address: str) -> None:
    """It passed, and no bus was ever reached."""
    with pytest.raises(ConfigError, match="broadcast_url: expected a URL that starts with memory://"):
        load(None, {"broadcast_url": address})
    with pytest.raises(ConfigError, match="redis_url: expected a URL that starts with redis://"):
        load(None, {"redis_url": "redis"})


def test_wrong_items_of_a_list_are_named_alone(write: Write) -> None:
    told = problems(write('transports = ["ws"]'))
    assert [text.partition(": ")[2] for text in told] == [
        "transports.0: expected 'websocket', 'longpoll' or 'sse', got 'ws'"
    ]
    (told_of_none,) = problems(write("transports = []"))
    assert "transports: list should have at least 1 item" in told_of_none


def test_key_of_relay_token_is_no_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_TOKEN_KEY", SECRET)
    assert load() == Config()


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
