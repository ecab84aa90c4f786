"""Settings: one frozen tree, read from a TOML file, ``RELAY_…`` variables and flags, in rising precedence.

Owns every setting with its unit and default; must not know who uses it. ``config/relay.toml`` shows them all.
"""

import re
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
)

from relay import redis_url
from relay.errors import ConfigError
from relay.permissions import Grant, parse_rights
from relay.proxy_headers import host_in, is_loopback_host, parse_ip, parse_networks
from relay.redis_url import SENTINEL_SCHEMES
from relay.service_links import ENV_PREFIX

CONFIG_VARIABLE = "RELAY_CONFIG"
"""Names the configuration file where no ``--config`` does."""

TOKEN_KEY_VARIABLE = "RELAY_TOKEN_KEY"
"""Holds the key that ``relay token`` signs with; no setting."""

EMBEDDED = "embedded"
"""The value of ``redis_url`` that asks for a Valkey of the relay's own."""

ANY_HOST = "*"
"""In ``allowed_hosts``: whatever name the relay is asked under."""

_HOST_PATTERN = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)

_REDIS_SCHEMES = ("redis", "rediss", "unix", *SENTINEL_SCHEMES)
_BROADCAST_SCHEMES = ("memory", "postgres", "postgresql", "kafka")

Positive = Annotated[int, Field(gt=0)]

# Of these, zero means none: the limit is off.
OrOff = Annotated[int, Field(ge=0)]
SecondsOrOff = Annotated[float, Field(ge=0, allow_inf_nan=False)]


ENVELOPE_BYTES = 1_024
"""Room for what a frame has beside its payload: topic, event and refs, of at most 255 bytes each."""


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


class Policy(NamedTuple):
    """What a topic's settings say of slow readers."""

    overflow: Overflow = Overflow.DISCONNECT
    latest_key: str = ""
    """With ``latest``: keep one waiting event for each value of this key in the payload; of those without, and where
    this is empty, for each event name."""
    tell_dropped: bool = False
    """Tell the client how many of the topic's events it missed, before the next of them."""
    match: str = "*"
    """The pattern in ``[[topics]]`` that these settings stand under; what is dropped is counted by it."""


class OnGap(StrEnum):
    """What the subscribers of a topic are told when events may have been missed."""

    REJOIN = "rejoin"
    IGNORE = "ignore"


class RedisConfig(Table):
    """The link to Redis."""

    to_prefix: str = Field("to:", min_length=1, description="Redis channels towards browsers start with this")
    from_prefix: str = Field("from:", min_length=1, description="Redis channels of browsers' pushes start with this")
    push_identity: bool = Field(False, description="publish each push a second time, with user and socket")
    from_user_prefix: str = Field(
        "from-user:", min_length=1, description="Redis channels of pushes with user and socket start with this"
    )
    timeout_s: Seconds = Field(5.0, description="seconds to connect, and for Redis to take a message")
    ping_interval_s: Seconds = Field(10.0, description="seconds of silence before the subscription is pinged")
    ping_timeout_s: Seconds = Field(5.0, description="seconds for the answer, then the link counts as lost")
    backoff_min_s: Seconds = Field(0.1, description="seconds to the first new attempt, at most")
    backoff_max_s: Seconds = Field(5.0, description="seconds between two attempts, at most")
    publish_queue_max: Positive = Field(10_000, description="messages waiting for Redis before pushes are refused")
    publish_queue_max_bytes: Positive = Field(67_108_864, description="the same, in bytes of all of them together")
    control_channel: str = Field(
        "relay:control", description='Redis channel by which nodes tell each other to send users away; "" for none'
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
    """How much clients may ask for. Where zero is allowed, it turns the limit off; docs/limits.md has the reasons."""

    frame_max_bytes: Positive = Field(
        1_052_672, description="largest frame from a client, in bytes; payload_max_bytes and 1024 at least"
    )
    payload_max_bytes: Positive = Field(1_048_576, description="largest payload of an event or a push, in bytes")
    topics_per_socket: Positive = Field(100, description="topics one socket may have joined at a time")
    outbox_max_bytes: Positive = Field(
        2_097_152, description="events waiting for one slow socket, in bytes; payload_max_bytes and 1024 at least"
    )
    outboxes_max_bytes: OrOff = Field(
        268_435_456,
        description="what waits for all slow sockets together, in bytes; the largest goes first; 0: no bound",
    )
    in_flight_max_bytes: Positive = Field(
        4_194_304, description="what of one socket waits for handlers, in bytes, before it is read no further"
    )
    in_flight_total_max_bytes: OrOff = Field(
        268_435_456,
        description="the same of all sockets and events together, in bytes; that with the most is closed; 0: no bound",
    )
    pushes_in_flight: Positive = Field(256, description="messages of one socket under way before it is read no further")
    joins_per_s: OrOff = Field(20, description="joins of one socket per second, for long; 0: no bound")
    joins_burst: Positive = Field(200, description="joins one socket may send at once, after a pause")
    pushes_per_s: OrOff = Field(100, description="pushes of one socket per second, for long; 0: no bound")
    pushes_burst: Positive = Field(500, description="pushes one socket may send at once, after a pause")
    rate_limited_max: OrOff = Field(
        1000, description='messages over the rate before the socket is closed; 0: it is only answered "rate limited"'
    )
    sockets_per_address: OrOff = Field(1000, description="sockets of one client address; 0: no bound")
    sockets_max: OrOff = Field(50_000, description="sockets in one process; 0: no bound")
    handshakes_per_s: OrOff = Field(1000, description="handshakes per second in one process; 0: no bound")
    handshake_timeout_s: SecondsOrOff = Field(
        10.0, description="seconds for a request's head to arrive; 0: no bound; under relay serve"
    )
    first_join_timeout_s: SecondsOrOff = Field(
        300.0, description="seconds until a socket has joined a topic, or it is closed; 0: no bound"
    )
    idle_timeout_s: Seconds = Field(60.0, description="seconds without a message or ping before a socket is closed")
    close_timeout_s: Seconds = Field(5.0, description="seconds for a client to answer a close, then it is cut off")
    body_max_bytes: Positive = Field(8_388_608, description="largest body of a REST request, in bytes")
    proxied_max: OrOff = Field(
        1000, description="requests under way to all [[proxy]] prefixes together; further ones get 503; 0: no bound"
    )
    drain_per_s: Positive = Field(1000, description="at the relay's end: sockets closed per second")
    drain_timeout_s: Seconds = Field(20.0, description="seconds until all are; the pace is raised where it must be")

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
    """A key that tokens are signed with."""

    key: str = Field(
        min_length=1,
        repr=False,
        description="a secret; or a public key as PEM, base64 of DER, JWK or OpenSSH; or file:/path",
    )
    kid: str = Field("", description='the key\'s name, where tokens say which key signed them; "" fits every token')


class GrantConfig(Table):
    """Rights on topics."""

    match: str = Field(min_length=1, description="pattern of topics as in [[topics]]; {sub} stands for the user")
    rights: tuple[Literal["join", "push", "presence"], ...] = Field(description="what may be done there")

    @property
    def grant(self) -> Grant:
        """The same, to be asked."""
        return Grant(self.match, parse_rights(self.rights))


class AuthConfig(Table):
    """Who gets in, and what they may do. With nothing set here, whoever can connect may do everything."""

    algorithms: tuple[Literal["HS256", "RS256", "ES256"], ...] = Field(
        ("HS256", "RS256", "ES256"), min_length=1, description="signatures of tokens that are accepted"
    )
    keys: tuple[KeyConfig, ...] = Field((), repr=False, description="keys of tokens; several for rotation")
    jwks_url: str = Field("", repr=False, pattern="^(https?://.*)?$", description="where public keys are (JWKS)")
    jwks_cache_s: Seconds = Field(300.0, description="seconds until they are fetched again")
    jwks_retry_s: Seconds = Field(10.0, description="seconds between two fetches at least, whatever key a token names")
    issuer: str = Field("", description='what tokens must say in "iss"; "" for no matter what')
    audience: tuple[str, ...] = Field((), description='one of these must be in a token\'s "aud"; a list')
    leeway_s: float = Field(10.0, ge=0, allow_inf_nan=False, description="seconds by which clocks may differ")
    require_expiry: bool = Field(True, description="refuse tokens that never expire")
    expiry_grace_s: Seconds = Field(5.0, description="seconds to renew an expired token, then its socket is closed")
    rights_claim: str = Field("topics", min_length=1, description="claim of a token that holds its rights")
    anonymous: tuple[GrantConfig, ...] = Field((), description="rights of sockets without a token")
    authenticated: tuple[GrantConfig, ...] = Field((), description="rights of all others, besides their token's own")
    tangram: bool = Field(False, description="accept and make tangram's tokens, each for one topic: POST /token")
    tangram_ttl_s: Seconds = Field(3600.0, description="seconds for which those made here are good")

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
    """The REST interface."""

    path: str = Field("/api", description='where it is mounted; "" turns it off')
    api_key: str = Field(
        "",
        repr=False,
        description="asked for from all clients; without one, this machine alone is answered, "
        "and nobody where others are let in",
    )

    @field_validator("path")
    @classmethod
    def _clean_path(cls, path: str) -> str:
        if path and (not path.startswith("/") or not path.rstrip("/")):
            raise ValueError('expected a path like "/api", or "" for none')
        return path.rstrip("/")


class ProxyConfig(Table):
    """A prefix that another process serves."""

    prefix: str = Field(min_length=2, pattern="^/", description="path that is forwarded, with all below it")
    target: str = Field(pattern="^https?://", repr=False, description="where to, for example http://127.0.0.1:8001")
    strip_prefix: bool = Field(True, description="leave the prefix out of the forwarded path")
    requests_max: int = Field(
        500, ge=0, description="requests under way at a time, streams included; further ones get 503; 0: no bound"
    )
    head_timeout_s: float = Field(
        60.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds for the head of an answer, then 504; how long a body takes is free; 0: no bound",
    )

    @field_validator("target")
    @classmethod
    def _names_a_host(cls, target: str) -> str:
        return check_url(target)


class MetricsConfig(Table):
    """What ``/metrics`` tells."""

    topics: tuple[str, ...] = Field(
        (),
        description="patterns of topics whose events are counted by pattern; a topic counts for the first it matches",
    )
    folder: str = Field(
        "", description="where workers leave their figures for each other; `relay serve` makes one by itself"
    )

    key: str = Field(
        "",
        repr=False,
        description="bearer key for /metrics; without one, rest.api_key; this machine needs none",
    )
    public: bool = Field(
        False, description="let /metrics answer everybody without a key, also where other machines are let in"
    )

    def label(self, topic: str) -> str:
        """The pattern that a topic's events are counted under; empty for none."""
        return next((pattern for pattern in self.topics if fnmatchcase(topic, pattern)), "")


class PluginsConfig(Table):
    """Where plugins come from, and how long their handlers may take."""

    paths: tuple[Path, ...] = Field((), description="directories whose packages are plugins")
    disabled: tuple[str, ...] = Field((), description="names of plugins not to load")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description='one cannot be imported: "stop" the start, or "skip" it'
    )
    timeout_s: Seconds = Field(10.0, description="seconds until a handler is given up")


class TopicConfig(Table):
    """Settings of the topics that ``match``; the first entry that matches is used."""

    match: str = Field(
        "*", min_length=1, description="pattern of topics: * any text, ? one character, [abc] one of these"
    )
    overflow: Overflow = Field(Overflow.DISCONNECT, description='slow reader: "disconnect", "drop-oldest" or "latest"')
    latest_key: str = Field(
        "",
        description='with "latest": keep one event for each value of this key in the payload; "": for each event name',
    )
    tell_dropped: bool = Field(False, description='tell a slow reader what it missed, by the event "relay:dropped"')
    on_gap: OnGap = Field(OnGap.REJOIN, description='events may have been missed: "rejoin" or "ignore"')
    push: bool = Field(True, description="whether browsers may push here")

    @model_validator(mode="after")
    def _key_of_the_latest(self) -> "TopicConfig":
        if self.latest_key and self.overflow is not Overflow.LATEST:
            raise ValueError('latest_key is for overflow = "latest" alone')
        return self

    @property
    def policy(self) -> Policy:
        """What to do with events that a slow reader's outbox has no room for."""
        return Policy(self.overflow, self.latest_key, self.tell_dropped, self.match)


class Config(BaseSettings, env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True):
    """All settings of a relay. Unknown keys are refused."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; others than loopback need auth, or anonymous = true"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    workers: Positive = Field(1, description="processes to serve with")
    anonymous: bool = Field(False, description="let anybody connect without a token, also from other machines")
    redis_url: str = Field("", repr=False, description='redis://, rediss://, unix://, redis+sentinel://, or "embedded"')
    broadcast_url: str = Field(
        "", repr=False, description="instead of Redis: memory://, postgres:// or kafka:// address"
    )
    socket_paths: tuple[str, ...] = Field(("/socket",), min_length=1, description="paths for new Socket(path)")
    origins: Literal["same", "any"] | tuple[str, ...] = Field(
        "same",
        description='pages that may connect: "same" host, "any", or a list of "same", "https://example.org", '
        '"//*.example.org"',
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description='names that the relay may be asked under, such as "relay.example.org", "*.example.org", or "*" for '
        "any; names of this machine and IP addresses always pass; with none given, any where clients are authenticated",
    )
    compression: bool = Field(False, description="compress events for clients that offer it, once for all of them")
    trusted_proxies: tuple[str, ...] = Field(
        (), description='addresses or networks of proxies whose X-Forwarded-For is believed, such as "10.0.0.0/8"'
    )
    page: bool = Field(True, description="show the page at / that lets people try the relay")
    console: bool = Field(True, description="show the console at /console; for whom it answers is said by rest.api_key")
    system_topic: bool = Field(True, description='send host figures to subscribers of topic "system" each second')
    rejoins_per_s: Positive = Field(1000, description="after a gap: subscriptions asked to rejoin per second")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity of log lines")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people, or one JSON object each")
    tracing: bool = Field(False, description="make OpenTelemetry spans; needs the extra `otel`")
    redis: RedisConfig = RedisConfig()
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    plugins: PluginsConfig = PluginsConfig()
    rest: RestConfig = RestConfig()
    metrics: MetricsConfig = MetricsConfig()
    proxy: tuple[ProxyConfig, ...] = ()
    topics: tuple[TopicConfig, ...] = ()

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

    @field_validator("origins")
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
    def is_exposed(self) -> bool:
        """Whether other machines can reach it."""
        return self.host not in ("127.0.0.1", "::1", "localhost")

    def exposure(self, authenticates: bool) -> "Exposure":
        """Say who may reach a relay with these settings: the start, ``relay check``, REST and ``/metrics`` go by it.

        Args: authenticates: whether clients are asked who they are, by keys or by a function.
        """
        elsewhere = self.origins == "any" or any(not _is_local_page(origin) for origin in self.origins)
        opens = {
            "auth": authenticates,
            "anonymous": self.anonymous,
            "host": self.is_exposed,
            "origins": self.origins != "same" and elsewhere,
            "trusted_proxies": bool(self.trusted_proxies),
        }
        is_refused = self.is_exposed and not (authenticates or self.anonymous)
        everybody = self.anonymous and (self.is_exposed or bool(self.trusted_proxies or self.allowed_hosts))
        return Exposure(tuple(name for name, is_open in opens.items() if is_open), everybody, is_refused)

    def check_exposure(self, *, authenticates: bool = False) -> None:
        """Refuse to listen beyond this machine while anybody may connect. Raises ConfigError.

        Args: authenticates: a function of an app that the relay is mounted in says who gets in.
        """
        if self.exposure(authenticates or self.auth.has_keys).is_refused:
            raise ConfigError(
                f"host: {self.host} can be reached from other machines, and anybody could connect; set auth.keys or "
                "auth.jwks_url to let in whoever has a token, or give your app's relay authenticate=…, or set "
                "anonymous = true (or RELAY_ANONYMOUS=true) if anybody is meant"
            )


class Exposure(NamedTuple):
    """Who may reach a relay."""

    openings: tuple[str, ...]
    """The settings by which others than the user of this machine are let in. Where there are any, a request from this
    machine proves nothing: it may be a proxy's."""
    everybody: bool
    """Whether clients of all the world may connect without a token, by themselves or through a proxy."""
    is_refused: bool
    """Whether ``relay serve`` refuses to start: other machines could connect, and no setting says that they may."""


def _is_local_page(origin: str) -> bool:
    return origin == "same" or is_loopback_host(host_in(urlsplit(origin).netloc))


_DEFAULT_TOPIC = TopicConfig()
