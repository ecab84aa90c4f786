"""`relay.config`: rules that settings keep to, and what is not shown of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from relay.auth.keys import read_key
from relay.auth.sealing import load_secret
from relay.config import Config
from relay.config_redis import RedisConfig
from relay.config_sections import (
    AuthConfig,
    GrantConfig,
    KeyConfig,
    LimitsConfig,
    MetricsConfig,
    OnGap,
    Overflow,
    Policy,
    ProxyConfig,
    RestConfig,
    TopicConfig,
)
from relay.config_sources import explain
from relay.errors import ConfigError
from relay.plugins.webhook_signature import read_secret
from tests.support.settings import Write, problems

SECRET = "hunter2"


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


def test_zero_turns_a_limit_off_where_that_is_said() -> None:
    refused = set()
    for name in LimitsConfig.model_fields:
        try:
            assert getattr(LimitsConfig(**{name: 0}), name) == 0
        except ValidationError:
            refused.add(name)
    assert LimitsConfig.model_fields.keys() - refused == set(LIMITS_THAT_CAN_BE_OFF)


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
    assert Config(socket_paths=("/", "//")).socket_paths == ("/", "/")


@pytest.mark.parametrize(("path", "clean"), [("", ""), ("/api", "/api"), ("/a/b/", "/a/b")])
def test_rest_path_loses_its_last_slash(path: str, clean: str) -> None:
    assert RestConfig(path=path).path == clean


@pytest.mark.parametrize(
    "origins",
    [
        "same",
        "any",
        (),
        ("https://a",),
        ("https://a:1", "//b", "//*.c", "https://d/", "http://[::1]:8000", "tauri://localhost", "https://*.E.org.:1"),
    ],
)
def test_origins_may_be_named_so(origins: Any) -> None:
    assert Config(allowed_origins=origins).allowed_origins == origins


@pytest.mark.parametrize("host", ["", "http://127.0.0.1", "127.0.0.1:9000", "256.1.1.1", "[::1]", "a b", "localhost:1"])
def test_host_is_an_address_or_a_name_alone(host: str) -> None:
    with pytest.raises(ValidationError, match="expected an address or a name alone"):
        Config(host=host)


@pytest.mark.parametrize(
    "host", ["::1", "fe80::1%eth0", "::ffff:127.0.0.1", "localhost", "127.1", "my_host", "bücher.example"]
)
def test_host_may_be_written_so(host: str) -> None:
    assert Config(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "relay.example"])
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


def test_no_password_is_shown_by_the_settings() -> None:
    for config in (
        Config(redis_url=f"redis://user:{SECRET}@host"),
        Config(broadcast_url=f"postgres://user:{SECRET}@host/db"),
        Config(rest=RestConfig(api_key=SECRET)),
        Config(proxy=(ProxyConfig(prefix="/x", target=f"http://user:{SECRET}@host"),)),
    ):
        assert SECRET not in repr(config)
        assert SECRET not in str(config)


# Topic mode.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"redis": {"subscribe": "topic"}}, 'requires publish_form = "topic"'),
        ({"redis": {"publish_form": "topic", "to_prefix": "topic:to:"}}, "must not begin alike"),
        ({"redis": {"topic_prefix": "to:"}}, "must not begin alike"),
        ({"redis": {"topic_prefix": "presence:"}}, "would give a topic the name presence:nodes"),
        ({"redis": {"topic_prefix": "relay:", "control_channel": ""}}, "would give a topic the name relay:settings"),
        ({"redis": {"publish_form": "topic", "control_channel": "topic:control"}}, "must not begin with"),
        ({"broadcast_url": "memory://", "redis": {"publish_form": "topic"}}, "for Redis"),
    ],
)
def test_settings_by_which_events_would_be_lost_or_come_twice_are_refused(
    settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValidationError, match=expected):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "uses"),
    [
        ({}, False),
        ({"redis": {"topic_prefix": "topic:"}}, True),
        ({"redis": {"publish_form": "topic"}}, True),
        ({"redis": {"publish_form": "topic", "subscribe": "topic"}}, True),
        ({"topics": [{"match": "*", "history": {"size": 10, "ttl_s": 60}}]}, True),
    ],
)
def test_channels_of_topics_are_used_where_something_is_published_there(settings: dict[str, Any], uses: bool) -> None:
    """Who sets the prefix by hand hears them before any relay publishes there."""
    assert Config(**settings).uses_topic_channels is uses


def test_what_other_programs_publish_follows_the_form_of_events() -> None:
    assert RedisConfig(to_prefix="t/").published("room:1", "e", "{}") == ("t/room:1:e", "{}")
    by_topic = RedisConfig(publish_form="topic", topic_prefix="topics/")
    assert by_topic.published("room:1", "e", "{}") == ("topics/room:1", "e:{}")


# Redis Cluster.


def test_cluster_is_subscribed_to_by_topic() -> None:
    config = Config(redis_url="redis+cluster://one,two")
    assert (config.redis.subscribe, config.redis.publish_form) == ("topic", "topic")
    assert not config.redis.model_fields_set
    assert Config(redis_url="redis+cluster://one", redis={"subscribe": "topic", "publish_form": "topic"}).is_cluster


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"redis": {"subscribe": "pattern"}}, 'redis.subscribe = "pattern" is for one Redis'),
        ({"redis": {"publish_form": "to"}}, 'redis.publish_form = "to" is for one Redis'),
    ],
)
def test_what_a_cluster_does_not_have_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Config(redis_url="redis+cluster://one", **settings)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("room:{id}", "matches {id} literally"),
        ("room:<int:id>", "matches <int:id> literally"),
        ("room:[ab", "a [ that is not closed"),
        ("room:1\n", "no name contains a control character"),
    ],
)
def test_pattern_of_topics_that_cannot_match_is_refused(pattern: str, text: str) -> None:
    grant = {"match": pattern, "rights": ["join"]}
    for settings in (
        {"topics": [{"match": pattern}]},
        {"metrics": {"topics": [pattern]}},
        {"auth": {"authenticated": [grant]}},
        {"auth": {"anonymous": [grant]}},
        {"auth": {"tangram_topics": [grant]}},
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            Config.model_validate(settings)
    with pytest.raises(ValueError, match="expected {sub} where the user stands"):
        Config.model_validate({"auth": {"authenticated": [grant]}})


def test_pattern_of_grants_may_name_the_user() -> None:
    grants = [{"match": match, "rights": ["join"]} for match in ("user:{sub}", "[{]id}:[[]a", "user:{sub}:[ab]")]
    assert len(Config.model_validate({"auth": {"authenticated": grants}}).auth.authenticated) == 3


NO_SECRETS = [
    "/run/secrets/relay-secret-of-all-the-nodes",
    "./secrets/relay-secret-of-all-the-nodes",
    "https://vault.example.org/relay-secret-of-all",
    "${RELAY_SECRET_OF_ALL_THE_NODES_HERE}",
    "$RELAY_SECRET_OF_ALL_THE_NODES_HERE",
    "{{ relay_secret_of_all_the_nodes_here }}",
    "<the secret that all the nodes share here>",
    "whpk_ZWQyNTUxOSBwdWJsaWMga2V5IG9mIDMyIGJ5dGVz",
    "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPublicKeyOfSomebody a@b",
    " " * 40,
]
SECRETS = [
    "/etcW8n3+fJx0Qm2r5u8w/A?D(G+KbPeSh",
    "$ecret-of-all-the-nodes-that-share-it",
    "s3cret/with/slashes/in/it/0123456789",
]


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_others_may_know_is_no_secret(text: str, tmp_path: Path) -> None:
    """A path, a public key or a placeholder in its place: the settings would work, and anybody could guess it."""
    (tmp_path / "secret").write_text(text)
    makers: list[Callable[[], object]] = [
        lambda: AuthConfig(secret=text),
        lambda: load_secret(f"file:{tmp_path}/secret"),
        lambda: read_key(text, "", "auth.keys.0"),
        lambda: read_key(f"file:{tmp_path}/secret", "", "auth.keys.0"),
        lambda: read_secret(text),
        lambda: read_secret(f"file:{tmp_path}/secret"),
        lambda: RestConfig(api_key=text),
        lambda: MetricsConfig(key=text),
    ]
    for make in makers:
        with pytest.raises((ValueError, ConfigError)) as raised:
            make()
        shown = explain(raised.value, []) if isinstance(raised.value, ValidationError) else [str(raised.value)]
        assert text.strip() == "" or text not in shown[0]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_of_any_letters_pass(text: str) -> None:
    assert load_secret(text) == read_secret(text) == text.encode()
    assert read_key(text, "", "auth.keys.0").algorithm == "HS256"
    assert AuthConfig(secret=text).secret == RestConfig(api_key=text).api_key == MetricsConfig(key=text).key == text


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("file:/run/secrets/key", "file: is not read here"),
        ("s3cret\n", "as headers carry it"),
        (" s3cret", "as headers carry it"),
        ("s3\x00cret", "as headers carry it"),
    ],
)
def test_api_key_that_no_request_can_bring_is_refused(key: str, text: str) -> None:
    for make in (lambda: RestConfig(api_key=key), lambda: MetricsConfig(key=key)):
        with pytest.raises(ValidationError, match=text) as raised:
            make()
        assert key not in explain(raised.value, [])[0]
