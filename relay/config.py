"""Settings: one frozen tree, read from a TOML file, ``RELAY_…`` variables and flags, in rising precedence.

Owns every setting with its unit and default; must not know who uses it. ``config/relay.toml`` shows them all.
"""

import re
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from relay import redis_url
from relay.config_redis import RedisConfig
from relay.config_sections import (
    AuthConfig,
    LimitsConfig,
    MetricsConfig,
    PluginsConfig,
    Positive,
    PresenceConfig,
    ProxyConfig,
    RestConfig,
    TangramConfig,
    TopicConfig,
)
from relay.config_webhooks import WebhookConfig
from relay.errors import ConfigError
from relay.proxy_headers import host_in, is_loopback_host, parse_ip, parse_networks
from relay.redis_url import CLUSTER_SCHEMES, SENTINEL_SCHEMES
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

_OWN_NAMES = (SETTINGS_KEY, "relay:presence", "relay:node:", "presence:nodes")
"""Keys and channels of relay's own, or how they begin, besides ``redis.control_channel``."""

_HOST_PATTERN = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.ASCII)

_NOT_IN_HOST = re.compile(r"[/@\[\]\s]")
_FOUR_NUMBERS = re.compile(r"\d+(\.\d+){3}")

_REDIS_SCHEMES = ("redis", "rediss", "unix", *SENTINEL_SCHEMES, *CLUSTER_SCHEMES)
_REDIS_FORMS = 'redis://, rediss://, unix://, redis+sentinel://, redis+cluster://, or "embedded"'

WORKERS_MAX = 1024
"""Beyond it, a number of processes is more probably a port."""

BROADCAST_SCHEMES = ("memory", "postgres", "postgresql", "kafka")
"""How ``broadcast_url`` may begin."""


class Config(BaseSettings, env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True):
    """All settings. Unknown keys are refused."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; other than loopback requires [auth], or allow_anonymous = true"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    workers: Positive = Field(1, le=WORKERS_MAX, description="number of processes")
    allow_anonymous: bool = Field(False, description="accept clients without a token, also from other machines")
    redis_url: str = Field("", repr=False, description=_REDIS_FORMS)
    broadcast_url: str = Field(
        "", repr=False, description="another message bus instead of Redis: memory://, postgres:// or kafka://"
    )
    socket_paths: tuple[str, ...] = Field(("/socket",), min_length=1, description="paths of sockets: new Socket(path)")
    transports: tuple[Literal["websocket", "longpoll", "sse"], ...] = Field(
        ("websocket", "longpoll", "sse"),
        min_length=1,
        description='how clients may connect, each below the path of a socket: "websocket", "longpoll" (the fallback '
        'of phoenix.js), "sse" (server-sent events)',
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
    speedups: bool = Field(True, description="write events to sockets without TLS in C, if the extension was built")
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
    tangram: TangramConfig = TangramConfig()
    proxy: tuple[ProxyConfig, ...] = ()
    webhooks: tuple[WebhookConfig, ...] = ()
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

    @field_validator("host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        address = host.partition("%")[0]  # without the zone of an IPv6 address
        looks_like_ip = ":" in host or _FOUR_NUMBERS.fullmatch(host)
        if _NOT_IN_HOST.search(host) or not host or (looks_like_ip and parse_ip(address) is None):
            raise ValueError('expected an address or a name alone, such as "127.0.0.1", "0.0.0.0" or "::1"')
        return host

    @field_validator("redis_url", "broadcast_url")
    @classmethod
    def _known_scheme(cls, url: str, info: Any) -> str:
        if not url or (info.field_name == "redis_url" and url == EMBEDDED):
            return url
        allowed = _REDIS_SCHEMES if info.field_name == "redis_url" else BROADCAST_SCHEMES
        scheme = url.partition("://")[0] if "://" in url else ""
        if scheme in _REDIS_SCHEMES and info.field_name == "redis_url":
            _ = redis_url.parse(url)  # raises ValueError, naming what is wrong
            return url
        try:
            _ = urlsplit(url).port  # raises ValueError for a port that is no number
        except ValueError:
            # Not repeated: urllib quotes what it could not read, which may be a part of the password.
            raise ValueError("expected scheme://user:password@host:port, special characters written as %XX") from None
        if scheme not in allowed:
            raise ValueError(f"expected a URL that starts with {' or '.join(f'{s}://' for s in allowed)}")
        return url

    @field_validator("socket_paths")
    @classmethod
    def _clean_paths(cls, paths: tuple[str, ...]) -> tuple[str, ...]:
        if not all(path.startswith("/") for path in paths):
            raise ValueError('expected paths like "/socket"')
        if not all(path.isprintable() and not {"?", "#"} & {*path} for path in paths):
            raise ValueError("expected paths without ?, # and control characters, which no request has in its path")
        return tuple(path.rstrip("/") or "/" for path in paths)

    @field_validator("allowed_origins")
    @classmethod
    def _clean_origins(cls, origins: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for origin in () if isinstance(origins, str) else origins:
            if origin == "same":
                continue
            parts = urlsplit(origin)
            _ = parts.port  # raises ValueError here, or it would at each handshake
            if not origin.isascii():
                raise ValueError('expected names as browsers send them, such as "https://xn--bcher-kva.example"')
            host = (parts.hostname or "").removesuffix(".")
            is_host = _HOST_PATTERN.fullmatch(host) is not None or parse_ip(host) is not None
            if not is_host or parts.path not in ("", "/") or parts.query or parts.fragment:
                raise ValueError('expected "any", or a list of "same", "https://host[:port]", "//host" and "//*.host"')
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
    def _cluster_by_topic(self) -> "Config":
        """On a cluster each topic is subscribed to by its own channel: sharded Pub/Sub has no patterns."""
        if not self.is_cluster:
            return self
        given = self.redis.model_fields_set
        for name, value in (("subscribe", "pattern"), ("publish_form", "to")):
            if name in given and getattr(self.redis, name) == value:
                raise ValueError(
                    f'redis.{name} = "{value}" is for one Redis; remove it: a cluster is subscribed to by topic'
                )
        by_topic = self.redis.model_copy(update={"subscribe": "topic", "publish_form": "topic"})
        by_topic.model_fields_set.intersection_update(given)
        object.__setattr__(self, "redis", by_topic)
        return self

    @model_validator(mode="after")
    def _one_bus(self) -> "Config":
        if self.redis_url and self.broadcast_url:
            raise ValueError("redis_url and broadcast_url exclude each other; set one of them")
        if self.has_history and self.broadcast_url and not self.broadcast_url.startswith("memory"):
            raise ValueError("history needs Redis or memory://; set redis_url, or remove history from [[topics]]")
        if self.broadcast_url and self.redis.publish_form == "topic":
            raise ValueError(
                "redis.publish_form and redis.subscribe are for Redis; set redis_url, or remove them: on other buses "
                "each topic has a channel of its own in any case"
            )
        if self.uses_topic_channels:
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
            if own := next((name for name in _OWN_NAMES if name.startswith(prefix)), None):
                raise ValueError(
                    f"redis.topic_prefix = {prefix!r} would give a topic the name {own}, which is relay's own"
                )
        if self.has_presence and self.broadcast_url and not self.broadcast_url.startswith("memory"):
            raise ValueError("presence needs Redis or memory://; set redis_url, or remove presence from [[topics]]")
        if self.broadcast_url.startswith("memory") and self.workers > 1:
            raise ValueError("broadcast_url memory:// reaches one process only; use Redis, or workers = 1")
        return self

    @model_validator(mode="after")
    def _webhooks_fit(self) -> "Config":
        labels: set[str] = set()
        for at, webhook in enumerate(self.webhooks):
            if webhook.label in labels:
                raise ValueError(f"webhooks.{at}: there is another one called {webhook.label!r}; set name")
            labels.add(webhook.label)
            if webhook.timeout_s >= self.plugins.timeout_s:
                raise ValueError(
                    f"webhooks.{at}: expected timeout_s below plugins.timeout_s = {self.plugins.timeout_s:g}, "
                    f"got {webhook.timeout_s:g}"
                )
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
    def is_cluster(self) -> bool:
        """Whether ``redis_url`` is that of a Redis Cluster."""
        return self.redis_url.partition("://")[0] in CLUSTER_SCHEMES

    @property
    def uses_topic_channels(self) -> bool:
        """Whether events may be published on the channels of topics.

        That is so with histories and with ``publish_form = "topic"``. Who sets ``topic_prefix`` has the process hear
        them already, before any relay publishes there: the first step of the way to topic mode.
        """
        redis = self.redis
        return self.has_history or redis.publish_form == "topic" or "topic_prefix" in redis.model_fields_set

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
