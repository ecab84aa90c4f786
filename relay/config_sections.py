"""Sections of the settings: the tables of `relay.config.Config`, each with its keys, units and defaults.

Must not know who uses them. ``config/relay.toml`` shows them all.
"""

import re
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from relay.patterns import event_pattern_fault, topic_pattern_fault
from relay.permissions import SUBJECT, Grant, parse_rights

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Of these, zero means none: the limit is off.
OrOff = Annotated[int, Field(ge=0)]
SecondsOrOff = Annotated[float, Field(ge=0, allow_inf_nan=False)]

SECRET_MIN_BYTES = 32
"""Of ``auth.secret``."""

ENVELOPE_BYTES = 1_024
"""Bytes for what a frame has beside its payload: topic, event and refs, of at most 255 bytes each."""


RESERVED_CLIENT_EVENT_PREFIXES = ("phx_", "chan_reply_", "presence_", "relay", "access_token")
"""Client events may not begin so, whatever the pattern: the events of the protocol and of relay itself do, and that by
which a client renews its token."""


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


_NO_SECRETS = (
    (r"\s+", "expected a secret, got nothing but spaces"),
    (
        r"(?:~|\.{1,2}|/(?:etc|run|var|home|root|opt|srv|mnt|secrets?|vault|app|usr|config|data|tmp))/\S+",
        "a path, which is no secret; write file: before it, where a file is read",
    ),
    (r"[A-Za-z][A-Za-z0-9+.-]*://.*", "an address, which is no secret"),
    (r"\$[A-Z_][A-Z0-9_]*|\$\{[^}]*\}|\{\{.*\}\}|<[^<>]*>", "a placeholder that nothing has replaced"),
    (r"-----BEGIN .*|(?:ssh-|ecdsa-|sk-)\S+\s+AAAA.*|wh[ps]k_.*", "a key of a key pair, which is no shared secret"),
)
"""Text that may stand where a secret belongs by mistake, and that others may know."""


def check_secret(text: str) -> str:
    """Give back a secret that may be one. Raises ValueError, which does not repeat it."""
    for pattern, fault in _NO_SECRETS:
        if re.fullmatch(pattern, text, re.DOTALL):
            raise ValueError(fault)
    return text


def check_key(key: str) -> str:
    """Give back a key that clients send in a header; empty for none. Raises ValueError, which does not repeat it."""
    if key.startswith("file:"):
        raise ValueError("expected the key itself; file: is not read here")
    if key and (key != key.strip() or not key.isprintable()):
        raise ValueError(
            "expected text without control characters, and without spaces at its ends, as headers carry it"
        )
    return check_secret(key) if key else key


def _check_pattern(pattern: str) -> str:
    """Give back a pattern of topics that can match. Raises ValueError."""
    if fault := topic_pattern_fault(pattern):
        raise ValueError(fault)
    return pattern


def check_grant_pattern(pattern: str) -> str:
    """Give back a pattern of topics that can match once ``{sub}`` in it is replaced by a user. Raises ValueError."""
    try:
        _ = _check_pattern(pattern.replace(SUBJECT, "x"))
    except ValueError as error:
        raise ValueError(f"expected {SUBJECT} where the user stands; {error}") from None
    return pattern


TopicPattern = Annotated[str, Field(min_length=1), AfterValidator(_check_pattern)]


class Direction(StrEnum):
    """Which way a message goes: to the browsers, or from one of them. `RedisConfig.prefix` has the prefix of each."""

    TO = "to"
    LIVE = "live"
    """To the browsers, and into no history."""
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
    client_events_per_s: OrOff = Field(
        20, description="client events of one socket per second, and at once after a pause; 0: no limit"
    )
    client_events_max_bytes: Positive = Field(4096, description="largest payload of a client event, in bytes")
    rate_limit_violations_max: OrOff = Field(
        1000, description="messages over the rate limit, before the socket is closed; 0: it is not closed"
    )
    sockets_per_address: OrOff = Field(1000, description="sockets of one client address; 0: no limit")
    sockets_max: OrOff = Field(50_000, description="sockets in one process; 0: no limit")
    handshakes_per_s: OrOff = Field(1000, description="handshakes per second in one process; 0: no limit")
    handshake_timeout_s: SecondsOrOff = Field(
        10.0, description="seconds for the head of a request, under relay serve; 0: no limit"
    )
    tokens_per_s: OrOff = Field(
        10,
        description="tokens of POST /token per second and client address, without the API key; ten times as many at "
        "once; 0: no limit",
    )
    first_join_timeout_s: SecondsOrOff = Field(
        300.0, description="seconds for a socket to join its first topic; 0: no limit"
    )
    idle_timeout_s: Seconds = Field(60.0, description="seconds without a message or ping before a socket is closed")
    longpoll_window_s: Seconds = Field(
        10.0,
        description="most seconds that a long poll waits for events; a session ends 1.5 times as long after its last",
    )
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
    presence_per_s: OrOff = Field(
        10, description="changes per second of what plugins list of one socket; more are held back; 0: no limit"
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

    _can_match = field_validator("match")(check_grant_pattern)

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
    secret: str = Field(
        "",
        repr=False,
        description="a secret of 32 bytes or more, or file:/path, that all processes share, to answer long polls for "
        "each other",
    )
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
    tangram: bool | Literal["open"] = Field(
        False,
        description='accept and create tangram tokens, each for one topic: POST /token; "open": also without the API '
        "key, for tangram_topics",
    )
    tangram_ttl_s: Seconds = Field(3600.0, description="lifetime in seconds of tangram tokens created here")
    tangram_topics: tuple[GrantConfig, ...] = Field(
        (),
        description="topics of tangram tokens that are given without the API key; entries with {sub}, the id of a "
        "token, are permissions of every tangram token",
    )

    @field_validator("keys", mode="before")
    @classmethod
    def _keys_as_tables(cls, keys: Any) -> Any:
        return (
            [{"key": key} if isinstance(key, str) else key for key in keys] if isinstance(keys, list | tuple) else keys
        )

    @field_validator("secret")
    @classmethod
    def _is_long_enough(cls, secret: str) -> str:
        if secret and not secret.startswith("file:"):
            if len(check_secret(secret).strip().encode()) < SECRET_MIN_BYTES:
                raise ValueError(f"expected {SECRET_MIN_BYTES} bytes at least; `openssl rand -hex 32` makes some")
        return secret

    @field_validator("jwks_url")
    @classmethod
    def _names_a_host(cls, url: str) -> str:
        return check_url(url) if url else url

    @field_validator("audience", mode="before")
    @classmethod
    def _one_or_several(cls, audience: Any) -> Any:
        return (audience,) if audience and isinstance(audience, str) else audience

    @model_validator(mode="after")
    def _topics_of_tangram(self) -> "AuthConfig":
        if self.tangram == "open" and all(SUBJECT in entry.match for entry in self.tangram_topics):
            raise ValueError(
                'tangram = "open" gives tokens without the API key; expected [[auth.tangram_topics]] with the '
                "topics that they may be for"
            )
        return self

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

    _is_key = field_validator("api_key")(check_key)

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

    topics: tuple[TopicPattern, ...] = Field(
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

    _is_key = field_validator("key")(check_key)

    def label(self, topic: str) -> str:
        """The pattern that a topic's events are counted under; empty for none."""
        return next((pattern for pattern in self.topics if fnmatchcase(topic, pattern)), "")


class PluginsConfig(Table):
    """Discovery of plugins, and the timeout of their handlers."""

    paths: tuple[Path, ...] = Field((), description="directories whose packages are plugins")
    path: str = Field("", description='path below which routes of plugins are served; "": below rest.path')
    disabled: tuple[str, ...] = Field((), description="names of plugins not to load")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description='if a plugin cannot be imported: "stop" the start, or "skip" the plugin'
    )
    timeout_s: Seconds = Field(10.0, description="timeout of a handler in seconds")

    @field_validator("path")
    @classmethod
    def _clean_path(cls, path: str) -> str:
        if path and not path.startswith("/"):
            raise ValueError('expected a path like "/" or "/plugins", or "" for rest.path')
        return (path.rstrip("/") or "/") if path else ""


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


class TangramConfig(Table):
    """What tangram's channel service does on the wire, and relay does not by default."""

    wire: bool = Field(
        False, description='add "id" to the replies to joins, and tell topic "admin" who has joined and left what'
    )
    binary_scalars: bool = Field(
        False, description="deliver published JSON that is neither an object nor an array as bytes"
    )


class HistoryConfig(Table):
    """What a topic keeps of its events."""

    size: int = Field(1000, ge=1, le=100_000, description="events kept of each topic")
    ttl_s: int = Field(3600, ge=1, le=2_592_000, description="seconds for which an event is kept")


class TopicConfig(Table):
    """Settings of the topics that ``match``; the first entry that matches is used."""

    match: TopicPattern = Field("*", description="topic pattern: * is any text, ? one character, [abc] one of these")
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
    push: bool = Field(
        True, description="whether clients may push to these topics; client_events may be pushed in any case"
    )
    client_events: tuple[str, ...] = Field(
        (),
        description='patterns of pushes that relay sends to the topic\'s other subscribers: ["typing", "cursor-*"]',
    )
    client_events_sender: bool = Field(
        False, description='add the sender to the payload of client events, as its last member "_user"'
    )
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

    @field_validator("client_events")
    @classmethod
    def _can_match(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            if fault := event_pattern_fault(pattern, RESERVED_CLIENT_EVENT_PREFIXES):
                raise ValueError(f'expected patterns of event names, such as "typing" or "cursor-*"; {fault}')
        return patterns

    @model_validator(mode="after")
    def _sender_of_client_events(self) -> "TopicConfig":
        if self.client_events_sender and not self.client_events:
            raise ValueError('client_events_sender is for topics with client_events, such as ["typing"]')
        return self

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
