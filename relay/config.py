"""Settings: one frozen tree, read from a TOML file, ``RELAY_…`` variables and flags, in rising precedence.

Owns every setting with its unit and default; must not know who uses it. ``config/relay.toml`` shows them all.
"""

import re
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, PrivateAttr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
)

from relay import redis_url
from relay.errors import ConfigError
from relay.permissions import Grant, parse_rights
from relay.proxy_headers import host_in, is_loopback_host, parse_ip, parse_networks
from relay.redis_url import SENTINEL_SCHEMES
from relay.renamed_settings import OldNames, rename
from relay.service_links import ENV_PREFIX

CONFIG_VARIABLE = "RELAY_CONFIG"
"""Names the configuration file where no ``--config`` does."""

TOKEN_KEY_VARIABLE = "RELAY_TOKEN_KEY"
"""Holds the key that ``relay token`` signs with; no setting."""

EMBEDDED = "embedded"
"""The value of ``redis_url`` that asks for a Valkey of the relay's own."""

ANY_HOST = "*"
"""In ``allowed_hosts``: whatever name the relay is asked under."""

SETTINGS_KEY = "relay:settings"
"""The key in Redis under which relays with histories say which topics have them."""

_HOST_PATTERN = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)

_REDIS_SCHEMES = ("redis", "rediss", "unix", *SENTINEL_SCHEMES)
_BROADCAST_SCHEMES = ("memory", "postgres", "postgresql", "kafka")

Positive = Annotated[int, Field(gt=0)]

# Of these, zero means none: the limit is off.
OrOff = Annotated[int, Field(ge=0)]
SecondsOrOff = Annotated[float, Field(ge=0, allow_inf_nan=False)]


ENVELOPE_BYTES = 1_024
"""Bytes for what a frame has beside its payload: topic, event and refs, of at most 255 bytes each."""


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Table(BaseModel, extra="forbid", frozen=True):
    """Unknown keys are refused, and nothing changes after the start."""


def check_url(url: str) -> str:
    """Give back an http:// or https:// address that names a host. Raises ValueError, which does not repeat it."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number or too large; not repeated, it may be a part of a password
        named = False
    if not named:
        raise ValueError("expected http[s]://host[:port], with a host, and a port of 1 to 65535")
    return url


class Direction(StrEnum):
    """Which way a message goes: to the browsers, or from one of them. `RedisConfig.prefix` has the prefix of each."""

    TO = "to"
    FROM = "from"
    FROM_USER = "from-user"
    """From one of them, with who that is."""


class Overflow(StrEnum):
    """What happens to a slow reader's events once its outbox is full; a setting of each topic."""

    DISCONNECT = "disconnect"
    """Close the socket: it comes back and starts afresh. For events of which none may be missing."""
    DROP_OLDEST = "drop-oldest"
    """Drop this topic's oldest waiting events to make room."""
    LATEST = "latest"
    """Keep one waiting event per topic and event name, the newest. For values that replace each other.

    A newer value takes the place in which the older one waits. So the events of one name arrive in order, and those of
    several may not: a1 b2 a3 arrives as a3 b2. At the end of the queue instead, a name whose value changes faster than
    the queue is read would wait without end.
    """
    RECOVER = "recover"
    """Drop what waits and deliver it from the topic's history, as fast as the client reads."""


class Policy(NamedTuple):
    """What a topic's settings say of slow readers."""

    overflow: Overflow = Overflow.DISCONNECT
    latest_key: str = ""
    """With ``latest``: keep one waiting event for each value of this key in the payload; of those without, and where
    this is empty, for each event name."""
    notify_dropped: bool = False
    """Tell the client how many of the topic's events it missed, before the next of them."""
    match: str = "*"
    """The pattern in ``[[topics]]`` that these settings stand under; what is dropped is counted by it."""


class OnGap(StrEnum):
    """What the subscribers of a topic receive when events may have been missed."""

    REJOIN = "rejoin"
    IGNORE = "ignore"


class RedisConfig(Table):
    """Connection to Redis."""

    to_prefix: str = Field("to:", min_length=1, description="Redis channels towards browsers start with this")
    from_prefix: str = Field("from:", min_length=1, description="Redis channels of browsers' pushes start with this")
    topic_prefix: str = Field(
        "topic:",
        min_length=1,
        description="names of topics' histories start with this: of the stream, and of the channel that announces it",
    )
    push_identity: bool = Field(False, description="publish each push a second time, with user and socket")
    from_user_prefix: str = Field(
        "from-user:", min_length=1, description="Redis channels of pushes with user and socket start with this"
    )
    timeout_s: Seconds = Field(5.0, description="seconds to connect, and for Redis to accept a message")
    ping_interval_s: Seconds = Field(10.0, description="seconds of silence before the subscription is pinged")
    ping_timeout_s: Seconds = Field(5.0, description="seconds for the answer; then the connection counts as lost")
    backoff_min_s: Seconds = Field(0.1, description="maximum seconds before the first attempt to reconnect")
    backoff_max_s: Seconds = Field(5.0, description="maximum seconds between two attempts")
    publish_queue_max: Positive = Field(10_000, description="messages waiting for Redis before pushes are refused")
    publish_queue_max_bytes: Positive = Field(67_108_864, description="the same, in bytes of all waiting messages")
    control_channel: str = Field(
        "relay:control", description='Redis channel by which nodes disconnect users on all nodes; "" for none'
    )

    def prefix(self, direction: Direction) -> str:
        """What Redis channels of a direction start with."""
        if direction is Direction.TO:
            return self.to_prefix
        return self.from_prefix if direction is Direction.FROM else self.from_user_prefix

    @model_validator(mode="after")
    def _prefixes_differ(self) -> "RedisConfig":
        if self.to_prefix.startswith(self.from_prefix) or self.from_prefix.startswith(self.to_prefix):
            raise ValueError("to_prefix and from_prefix must not begin alike, or the relay would hear its own pushes")
        if self.control_channel.startswith((self.to_prefix, self.from_prefix)):
            # What starts with from_prefix is named by browsers.
            raise ValueError("control_channel must not begin with to_prefix or from_prefix")
        if self.push_identity:
            for name, other in (("to_prefix", self.to_prefix), ("from_prefix", self.from_prefix)):
                if self.from_user_prefix.startswith(other) or other.startswith(self.from_user_prefix):
                    raise ValueError(
                        f"from_user_prefix and {name} must not begin alike: a client could forge who pushed"
                    )
            if self.control_channel.startswith(self.from_user_prefix):
                raise ValueError("control_channel must not begin with from_user_prefix")
        if self.backoff_min_s > self.backoff_max_s:
            raise ValueError(
                f"backoff_min_s = {self.backoff_min_s:g} must not be more than backoff_max_s = {self.backoff_max_s:g}"
            )
        return self


class LimitsConfig(Table):
    """Limits on clients. docs/limits.md describes them."""

    frame_max_bytes: Positive = Field(
        1_052_672, description="largest frame from a client, in bytes; at least payload_max_bytes + 1024"
    )
    payload_max_bytes: Positive = Field(1_048_576, description="largest payload of an event or a push, in bytes")
    topics_per_socket: Positive = Field(100, description="topics that one socket may have joined at a time")
    outbox_max_bytes: Positive = Field(
        2_097_152, description="bytes queued for one slow socket; at least payload_max_bytes + 1024"
    )
    outbox_total_max_bytes: OrOff = Field(
        268_435_456,
        description="bytes queued for all slow sockets; over it, the largest is closed; 0: no limit",
    )
    in_flight_max_bytes: Positive = Field(
        4_194_304, description="bytes of one socket waiting for handlers, before relay stops reading it"
    )
    in_flight_total_max_bytes: OrOff = Field(
        268_435_456,
        description="the same in bytes of all sockets and events; over it, the one with most is closed; 0: no limit",
    )
    pushes_in_flight: Positive = Field(
        256, description="messages of one socket in progress, before relay stops reading it"
    )
    joins_per_s: OrOff = Field(20, description="joins of one socket per second; 0: no limit")
    joins_burst: Positive = Field(200, description="joins that one socket may send at once, after a pause")
    pushes_per_s: OrOff = Field(100, description="pushes of one socket per second; 0: no limit")
    pushes_burst: Positive = Field(500, description="pushes that one socket may send at once, after a pause")
    rate_limit_violations_max: OrOff = Field(
        1000, description="messages over the rate limit, before the socket is closed; 0: it is not closed"
    )
    sockets_per_address: OrOff = Field(1000, description="sockets of one client address; 0: no limit")
    sockets_max: OrOff = Field(50_000, description="sockets in one process; 0: no limit")
    handshakes_per_s: OrOff = Field(1000, description="handshakes per second in one process; 0: no limit")
    handshake_timeout_s: SecondsOrOff = Field(
        10.0, description="seconds for the head of a request, under relay serve; 0: no limit"
    )
    first_join_timeout_s: SecondsOrOff = Field(
        300.0, description="seconds for a socket to join its first topic; 0: no limit"
    )
    idle_timeout_s: Seconds = Field(60.0, description="seconds without a message or ping before a socket is closed")
    close_timeout_s: Seconds = Field(5.0, description="seconds for a client to answer a close, then it is cut off")
    body_max_bytes: Positive = Field(8_388_608, description="largest body of a REST request, in bytes")
    proxied_max: OrOff = Field(
        1000, description="requests in progress to all [[proxy]] prefixes; further ones get 503; 0: no limit"
    )
    recover_per_s: Positive = Field(1000, description="joins per second in one process that ask for missed events")
    recover_max_events: Positive = Field(1000, description="most missed events that a join is given")
    recover_max_bytes: Positive = Field(8_388_608, description="the same in bytes")
    history_ring_max_bytes: Positive = Field(
        67_108_864, description="bytes of recent events of all histories that one process keeps in memory"
    )
    presence_meta_max_bytes: Positive = Field(1024, description="bytes of what a client says of itself, for presence")
    presence_state_max_bytes: Positive = Field(
        1_048_576, description="bytes of all that is said of a topic's members; with more, only their number is sent"
    )
    drain_per_s: Positive = Field(1000, description="at shutdown: sockets closed per second")
    drain_timeout_s: Seconds = Field(
        20.0, description="at shutdown: seconds for closing all sockets; the pace is raised if necessary"
    )

    @model_validator(mode="after")
    def _payload_fits(self) -> "LimitsConfig":
        least = self.payload_max_bytes + ENVELOPE_BYTES
        bounds = {"frame_max_bytes": self.frame_max_bytes, "outbox_max_bytes": self.outbox_max_bytes}
        if small := [f"{name} = {value}" for name, value in bounds.items() if value < least]:
            raise ValueError(
                f"expected {least} bytes at least (payload_max_bytes = {self.payload_max_bytes}, and "
                f"{ENVELOPE_BYTES} for what surrounds a payload), got {' and '.join(small)}"
            )
        return self


class KeyConfig(Table):
    """A key that signs tokens."""

    key: str = Field(
        min_length=1,
        repr=False,
        description="a secret; or a public key as PEM, base64 of DER, JWK or OpenSSH; or file:/path",
    )
    kid: str = Field("", description='name of the key, if tokens name their key; "" for every token')


class GrantConfig(Table):
    """Permissions on topics."""

    match: str = Field(min_length=1, description="topic pattern as in [[topics]]; {sub} is replaced by the user")
    rights: tuple[Literal["join", "push", "presence"], ...] = Field(description="permissions on these topics")

    @property
    def grant(self) -> Grant:
        """The same, to be asked."""
        return Grant(self.match, parse_rights(self.rights))


class AuthConfig(Table):
    """Authentication and authorization. Without settings here, every client that can connect may do everything."""

    algorithms: tuple[Literal["HS256", "RS256", "ES256"], ...] = Field(
        ("HS256", "RS256", "ES256"), min_length=1, description="accepted signature algorithms of tokens"
    )
    keys: tuple[KeyConfig, ...] = Field((), repr=False, description="keys of tokens; several for rotation")
    jwks_url: str = Field("", repr=False, pattern="^(https?://.*)?$", description="URL of the public keys (JWKS)")
    jwks_cache_s: Seconds = Field(300.0, description="seconds until the key set is fetched again")
    jwks_retry_s: Seconds = Field(10.0, description="minimum seconds between two fetches for unknown keys")
    issuer: str = Field("", description='required "iss" of tokens; "" accepts any')
    audience: tuple[str, ...] = Field((), description='accepted values of "aud" in tokens')
    leeway_s: float = Field(10.0, ge=0, allow_inf_nan=False, description="tolerated clock difference in seconds")
    require_expiry: bool = Field(True, description="refuse tokens without an expiry time")
    expiry_grace_s: Seconds = Field(5.0, description="seconds to renew an expired token, then its socket is closed")
    rights_claim: str = Field("topics", min_length=1, description="claim that contains the permissions of a token")
    anonymous: tuple[GrantConfig, ...] = Field((), description="permissions of clients without a token")
    authenticated: tuple[GrantConfig, ...] = Field(
        (), description="permissions of all others, in addition to those in their token"
    )
    tangram: bool = Field(False, description="accept and create tangram tokens, each for one topic: POST /token")
    tangram_ttl_s: Seconds = Field(3600.0, description="lifetime in seconds of tangram tokens created here")

    @field_validator("keys", mode="before")
    @classmethod
    def _keys_as_tables(cls, keys: Any) -> Any:
        return (
            [{"key": key} if isinstance(key, str) else key for key in keys] if isinstance(keys, list | tuple) else keys
        )

    @field_validator("jwks_url")
    @classmethod
    def _names_a_host(cls, url: str) -> str:
        return check_url(url) if url else url

    @field_validator("audience", mode="before")
    @classmethod
    def _one_or_several(cls, audience: Any) -> Any:
        return (audience,) if audience and isinstance(audience, str) else audience

    @property
    def has_keys(self) -> bool:
        """Whether tokens can be checked."""
        return bool(self.keys or self.jwks_url)


class RestConfig(Table):
    """The REST API."""

    path: str = Field("/api", description='path of the REST API; "" disables it')
    api_key: str = Field(
        "",
        repr=False,
        description="API key of the REST API and the console; without one, only clients on the same machine have "
        "access, and no client at all if relay accepts others",
    )

    @field_validator("path")
    @classmethod
    def _clean_path(cls, path: str) -> str:
        if path and (not path.startswith("/") or not path.rstrip("/")):
            raise ValueError('expected a path like "/api", or "" for none')
        return path.rstrip("/")


class ProxyConfig(Table):
    """A path prefix that is forwarded to another process."""

    prefix: str = Field(min_length=2, pattern="^/", description="path prefix to forward")
    target: str = Field(
        pattern="^https?://", repr=False, description="URL of the service, for example http://127.0.0.1:8001"
    )
    strip_prefix: bool = Field(True, description="remove the prefix from the forwarded path")
    requests_max: int = Field(
        500, ge=0, description="requests in progress, including streams; further ones get 503; 0: no limit"
    )
    head_timeout_s: float = Field(
        60.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds for the head of a response, then 504; bodies are not timed; 0: no limit",
    )

    @field_validator("target")
    @classmethod
    def _names_a_host(cls, target: str) -> str:
        return check_url(target)


class MetricsConfig(Table):
    """Metrics at ``/metrics``."""

    topics: tuple[str, ...] = Field(
        (),
        description="patterns of topics whose events are counted by pattern; a topic counts for the first it matches",
    )
    dir: str = Field("", description="directory in which workers share their metrics; `relay serve` creates one")
    old_names: bool = Field(False, description="export renamed metrics under their former names too")

    key: str = Field(
        "",
        repr=False,
        description="bearer token for /metrics; by default rest.api_key; not required on the same machine",
    )
    public: bool = Field(False, description="serve /metrics to every client without a key")

    def label(self, topic: str) -> str:
        """The pattern that a topic's events are counted under; empty for none."""
        return next((pattern for pattern in self.topics if fnmatchcase(topic, pattern)), "")


class PluginsConfig(Table):
    """Discovery of plugins, and the timeout of their handlers."""

    paths: tuple[Path, ...] = Field((), description="directories whose packages are plugins")
    disabled: tuple[str, ...] = Field((), description="names of plugins not to load")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description='if a plugin cannot be imported: "stop" the start, or "skip" the plugin'
    )
    timeout_s: Seconds = Field(10.0, description="timeout of a handler in seconds")


class PresenceConfig(Table):
    """How nodes find out that others have gone."""

    lease_s: Seconds = Field(15.0, description="seconds after which a node that is not heard of counts as dead")
    renew_s: Seconds = Field(5.0, description="seconds between two signs of life of a node")
    leave_delay_s: SecondsOrOff = Field(
        2.0, description="seconds for which a leave is held back: a page that is loaded again does not flicker; 0: none"
    )

    @model_validator(mode="after")
    def _lease_outlives_a_renewal(self) -> "PresenceConfig":
        if self.lease_s < 2 * self.renew_s:
            raise ValueError(f"expected lease_s of at least 2 × renew_s, got {self.lease_s:g} and {self.renew_s:g}")
        return self


class HistoryConfig(Table):
    """What a topic keeps of its events."""

    size: int = Field(1000, ge=1, le=100_000, description="events kept of each topic")
    ttl_s: int = Field(3600, ge=1, le=2_592_000, description="seconds for which an event is kept")


class TopicConfig(Table):
    """Settings of the topics that ``match``; the first entry that matches is used."""

    match: str = Field(
        "*", min_length=1, description="topic pattern: * is any text, ? one character, [abc] one of these"
    )
    overflow: Overflow = Field(
        Overflow.DISCONNECT,
        description='overflow policy for slow readers: "disconnect", "drop-oldest", "latest", or "recover"',
    )
    latest_key: str = Field(
        "",
        description='with "latest": keep one event for each value of this key in the payload; "": for each event name',
    )
    notify_dropped: bool = Field(
        False, description='report missed events to slow readers, by the event "relay:dropped"'
    )
    on_gap: OnGap = Field(OnGap.REJOIN, description='after a gap: ask subscribers to "rejoin", or "ignore" it')
    push: bool = Field(True, description="whether clients may push to these topics")
    presence: bool | Literal["count", "plugin"] = Field(
        False,
        description='send subscribers the members: true; those that plugins list: "plugin"; their number: "count"',
    )
    presence_max: Positive = Field(
        1000, description="most members of a topic that are sent; with more, only their number is"
    )
    history: HistoryConfig | None = Field(
        None, description="events kept for clients that rejoin: { size = 1000, ttl_s = 3600 }; null: none"
    )

    @model_validator(mode="after")
    def _key_of_the_latest(self) -> "TopicConfig":
        if self.latest_key and self.overflow is not Overflow.LATEST:
            raise ValueError('latest_key is for overflow = "latest" alone')
        if self.overflow is Overflow.RECOVER and self.history is None:
            raise ValueError('overflow = "recover" needs a history; set history = { size = 1000, ttl_s = 3600 }')
        return self

    @property
    def policy(self) -> Policy:
        """What to do with events that a slow reader's outbox has no room for."""
        return Policy(self.overflow, self.latest_key, self.notify_dropped, self.match)


class Config(BaseSettings, env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True):
    """All settings. Unknown keys are refused."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; other than loopback requires [auth], or allow_anonymous = true"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    workers: Positive = Field(1, description="number of processes")
    allow_anonymous: bool = Field(False, description="accept clients without a token, also from other machines")
    redis_url: str = Field("", repr=False, description='redis://, rediss://, unix://, redis+sentinel://, or "embedded"')
    broadcast_url: str = Field(
        "", repr=False, description="another message bus instead of Redis: memory://, postgres:// or kafka://"
    )
    socket_paths: tuple[str, ...] = Field(("/socket",), min_length=1, description="paths of sockets: new Socket(path)")
    transports: tuple[Literal["websocket", "sse"], ...] = Field(
        ("websocket", "sse"),
        min_length=1,
        description='how clients may connect: "websocket" at <socket path>/websocket, "sse" (server-sent events) at '
        "<socket path>/sse",
    )
    allowed_origins: Literal["same", "any"] | tuple[str, ...] = Field(
        "same",
        description='pages that may connect: "same" host, "any", or a list of "same", "https://example.org", '
        '"//*.example.org"',
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description='accepted names in Host, such as "relay.example.org", "*.example.org", or "*" for any; names of '
        "this machine and IP addresses always pass; if empty, any name is accepted if clients are authenticated",
    )
    compression: bool = Field(False, description="compress events, once for all clients that support it")
    trusted_proxies: tuple[str, ...] = Field(
        (), description='addresses or networks of proxies whose X-Forwarded-For is trusted, such as "10.0.0.0/8"'
    )
    demo_page: bool = Field(True, description="serve the demo page at /")
    console: bool = Field(True, description="serve the console at /console; rest.api_key controls the access")
    system_topic: bool = Field(True, description='send metrics of the host to the topic "system" every second')
    rejoins_per_s: Positive = Field(1000, description="after a gap: subscriptions asked to rejoin per second")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum severity of log lines")
    log_format: Literal["text", "json"] = Field(
        "text", description="format of log lines: text, or one JSON object each"
    )
    tracing: bool = Field(False, description="create OpenTelemetry spans; requires the extra `otel`")
    redis: RedisConfig = RedisConfig()
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    plugins: PluginsConfig = PluginsConfig()
    rest: RestConfig = RestConfig()
    metrics: MetricsConfig = MetricsConfig()
    presence: PresenceConfig = PresenceConfig()
    proxy: tuple[ProxyConfig, ...] = ()
    topics: tuple[TopicConfig, ...] = ()
    _old_names: OldNames = PrivateAttr(default_factory=OldNames)

    @property
    def old_names(self) -> OldNames:
        """The former names of settings that these were given under."""
        return self._old_names

    @model_validator(mode="wrap")
    @classmethod
    def _rename(cls, values: Any, handler: "ModelWrapValidatorHandler[Config]") -> "Config":
        if not isinstance(values, dict):
            return handler(values)
        renamed, old_names = rename(values)
        config = handler(renamed)
        config._old_names = old_names
        return config

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take given values alone: `load` brings file and variables in, so that an error can name its source."""
        return (init_settings,)

    @field_validator("redis_url", "broadcast_url")
    @classmethod
    def _known_scheme(cls, url: str, info: Any) -> str:
        if not url or (info.field_name == "redis_url" and url == EMBEDDED):
            return url
        allowed = _REDIS_SCHEMES if info.field_name == "redis_url" else _BROADCAST_SCHEMES
        if url.partition("://")[0] in _REDIS_SCHEMES and info.field_name == "redis_url":
            _ = redis_url.parse(url)  # raises ValueError, naming what is wrong
            return url
        try:
            _ = urlsplit(url).port  # raises ValueError for a port that is no number
        except ValueError:
            # Not repeated: urllib quotes what it could not read, which may be a part of the password.
            raise ValueError("expected scheme://user:password@host:port, special characters written as %XX") from None
        if url.partition("://")[0] not in allowed:
            raise ValueError(f"expected a URL that starts with {' or '.join(f'{s}://' for s in allowed)}")
        return url

    @field_validator("socket_paths")
    @classmethod
    def _clean_paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        if not all(path.startswith("/") and path.rstrip("/") for path in paths):
            raise ValueError('expected paths like "/socket"')
        return tuple(path.rstrip("/") for path in paths)

    @field_validator("allowed_origins")
    @classmethod
    def _clean_origins(cls, origins: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for origin in () if isinstance(origins, str) else origins:
            if origin == "same":
                continue
            parts = urlsplit(origin)
            _ = parts.port  # raises ValueError here, or it would at each handshake
            if not parts.netloc or parts.path not in ("", "/"):
                raise ValueError('expected "https://host[:port]", "//host" or "//*.host" in each place')
        return origins

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _one_or_several_hosts(cls, hosts: Any) -> Any:
        if isinstance(hosts, str):
            hosts = (hosts,) if hosts else ()
        return (
            tuple(ANY_HOST if host == "any" else host for host in hosts) if isinstance(hosts, list | tuple) else hosts
        )

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        cleaned = tuple(host.lower().removesuffix(".") for host in hosts)
        for host in cleaned:
            if host != ANY_HOST and _HOST_PATTERN.fullmatch(host) is None and parse_ip(host.strip("[]")) is None:
                raise ValueError(
                    f'expected names without port such as "relay.example.org", "*.example.org", or "*", got {host!r}'
                )
        return cleaned

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        _ = parse_networks(proxies)
        return proxies

    @model_validator(mode="after")
    def _one_bus(self) -> "Config":
        if self.redis_url and self.broadcast_url:
            raise ValueError("redis_url and broadcast_url exclude each other; set one of them")
        if self.has_history:
            if self.broadcast_url and not self.broadcast_url.startswith("memory"):
                raise ValueError("history needs Redis or memory://; set redis_url, or remove history from [[topics]]")
            redis, prefix = self.redis, self.redis.topic_prefix
            others = {"to_prefix": redis.to_prefix, "from_prefix": redis.from_prefix}
            if redis.push_identity:
                others["from_user_prefix"] = redis.from_user_prefix
            for name, other in others.items():
                if prefix.startswith(other) or other.startswith(prefix):
                    raise ValueError(
                        f"redis.topic_prefix = {prefix!r} and redis.{name} = {other!r} must not begin alike: events "
                        "would be delivered twice, or a client could forge them"
                    )
            if redis.control_channel.startswith(prefix):
                raise ValueError("redis.control_channel must not begin with redis.topic_prefix")
        if self.has_presence and self.broadcast_url and not self.broadcast_url.startswith("memory"):
            raise ValueError("presence needs Redis or memory://; set redis_url, or remove presence from [[topics]]")
        if self.broadcast_url.startswith("memory") and self.workers > 1:
            raise ValueError("broadcast_url memory:// reaches one process only; use Redis, or workers = 1")
        return self

    def topic(self, topic: str) -> TopicConfig:
        """Settings of one topic: the first entry of ``topics`` that matches it, else the defaults."""
        for entry in self.topics:
            if fnmatchcase(topic, entry.match):
                return entry
        return _DEFAULT_TOPIC

    @property
    def has_history(self) -> bool:
        """Whether some topic has a history."""
        return any(entry.history is not None for entry in self.topics)

    @property
    def has_presence(self) -> bool:
        """Whether some topic has presence."""
        return any(entry.presence for entry in self.topics)

    @property
    def is_exposed(self) -> bool:
        """Whether other machines can reach it."""
        return self.host not in ("127.0.0.1", "::1", "localhost")

    def exposure(self, authenticates: bool) -> "Exposure":
        """Say who may reach a relay with these settings: the start, ``relay check``, REST and ``/metrics`` go by it.

        Args: authenticates: whether clients are asked who they are, by keys or by a function.
        """
        elsewhere = self.allowed_origins == "any" or any(not _is_local_page(origin) for origin in self.allowed_origins)
        opens = {
            "auth": authenticates,
            "allow_anonymous": self.allow_anonymous,
            "host": self.is_exposed,
            "allowed_origins": self.allowed_origins != "same" and elsewhere,
            "trusted_proxies": bool(self.trusted_proxies),
        }
        is_refused = self.is_exposed and not (authenticates or self.allow_anonymous)
        everybody = self.allow_anonymous and (self.is_exposed or bool(self.trusted_proxies or self.allowed_hosts))
        return Exposure(tuple(name for name, is_open in opens.items() if is_open), everybody, is_refused)

    def check_exposure(self, *, authenticates: bool = False) -> None:
        """Refuse to listen beyond this machine while anybody may connect. Raises ConfigError.

        Args: authenticates: a function of an app that the relay is mounted in authenticates clients.
        """
        if self.exposure(authenticates or self.auth.has_keys).is_refused:
            raise ConfigError(
                f"host: {self.host} can be reached from other machines, and anybody could connect; set auth.keys or "
                "auth.jwks_url to let in clients with a token, or give your app's relay authenticate=…, or set "
                "allow_anonymous = true (or RELAY_ALLOW_ANONYMOUS=true) if anybody is meant"
            )


class Exposure(NamedTuple):
    """Who may reach a relay."""

    openings: tuple[str, ...]
    """The settings by which others than the user of this machine are let in. Where there are any, a request from this
    machine proves nothing: it may be a proxy's."""
    everybody: bool
    """Whether clients of all the world may connect without a token, directly or through a proxy."""
    is_refused: bool
    """Whether ``relay serve`` refuses to start: other machines could connect, and no setting says that they may."""


def _is_local_page(origin: str) -> bool:
    return origin == "same" or is_loopback_host(host_in(urlsplit(origin).netloc))


_DEFAULT_TOPIC = TopicConfig()
