"""``relay token`` makes a token; ``relay check`` says in plain words who may do what.

Owns these two commands' words and exit codes.
"""

import json
import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from relay.brokers.embedded import BESIDE_AUTH
from relay.cli.check_redis import ask_redis
from relay.cli.check_tangram import open_tokens, tangram_rights
from relay.cli.masking import mask_secrets
from relay.cli.options import ConfigFile, RedisUrl
from relay.cli.output import console, is_terminal, print_lines
from relay.cli.topic_warnings import topic_facts, topic_warnings
from relay.config import ANY_HOST, CONFIG_VARIABLE, EMBEDDED, TOKEN_KEY_VARIABLE, Config, Exposure
from relay.config_sections import ENVELOPE_BYTES, AuthConfig, GrantConfig, Overflow, check_grant_pattern
from relay.config_sources import empty_bus, load, unread_file
from relay.errors import ConfigError
from relay.extras import require
from relay.permissions import SUBJECT, Right, names_of, parse_claim
from relay.plugins.loader import candidates
from relay.proxy_headers import is_this_machine, origin_of, parse_networks
from relay.redis_url import parse_cluster, parse_sentinel, shown
from relay.renamed_settings import rename_in_toml
from relay.service_links import service_links
from relay.transports.plain_sockets import form

if TYPE_CHECKING:
    from relay.auth.keys import Key

_DURATION = re.compile(r"(\d+)([smhd]?)")
_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SECRET_MIN_BYTES = 32
"""RFC 7518, section 3.2: a secret for HS256 has 256 bits at least."""
_RSA_MIN_BITS = 2048
"""RFC 7518, section 3.3."""
_API_KEY_MIN = 16
"""Characters: 80 bits where they are drawn from 32 letters."""
_NETWORK_MIN_BITS = {4: 8, 6: 7}
"""By IP version: 10.0.0.0/8 and fc00::/7 are the widest private networks."""


# relay token.


def token(
    sub: Annotated[str, typer.Option(metavar="USER", help="Whose it is.")],
    topic: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN:RIGHTS", help="What it opens, e.g. room:*:join,push; repeatable."),
    ] = None,
    ttl: Annotated[str, typer.Option(metavar="TIME", help="How long it is good: 30s, 15m, 1h, 7d.")] = "1h",
    claim: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A further claim, JSON or else text; repeatable.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar=TOKEN_KEY_VARIABLE,
            help="A secret or a private key, or file:/path of either.",
            show_default="the first of auth.keys that signs",
        ),
    ] = None,
    config: ConfigFile = None,
) -> None:
    """Make a token and print it, alone on its line."""
    require("auth", "relay token")
    from relay.auth.authenticator import check_claims
    from relay.auth.keys import read_key
    from relay.auth.tokens import load_keys, sign

    auth = load(config).auth
    claims: dict[str, Any] = {"sub": sub, "iat": int(time.time())}
    claims["exp"] = claims["iat"] + _seconds(ttl)
    if auth.issuer:
        claims["iss"] = auth.issuer
    if auth.audience:
        claims["aud"] = auth.audience[0]
    try:
        rights: dict[str, Right] = {}
        for grant in parse_claim(topic or ()):
            pattern = check_grant_pattern(grant.pattern)
            rights[pattern] = rights.get(pattern, Right.NONE) | grant.rights
    except ValueError as error:
        raise ConfigError(f"--topic: {error}") from None
    if rights:
        claims[auth.rights_claim] = {pattern: names_of(right) for pattern, right in rights.items()}
    for entry in claim or ():
        name, equals, value = entry.partition("=")
        if not name or not equals:
            raise ConfigError(f"--claim: expected NAME=VALUE, got {entry!r}")
        if name == "sub" or (rights and name == auth.rights_claim):
            raise ConfigError(
                f"--claim: {name} is what {'--sub' if name == 'sub' else '--topic'} says; give one of them"
            )
        claims[name] = _json_or_text(value)
    try:
        check_claims(claims, auth.rights_claim)
    except ValueError as error:
        raise ConfigError(f"claim {error}; no relay would take the token") from None
    keys = load_keys(auth) if key is None else (read_key(key, "", "--key"),)
    signing = _signing(keys)
    if weakness := _weakness(signing):
        typer.echo(f"relay: warning: {weakness}", err=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyJWT says the same, with a line of its source
        typer.echo(sign(claims, signing))


def _weakness(key: "Key") -> str:
    """What is wrong with a key, if anything is."""
    if key.algorithm == "RS256" and key.public.key_size < _RSA_MIN_BITS:
        return f"an RSA key of {key.public.key_size} bits can be broken; expected {_RSA_MIN_BITS}"
    if key.algorithm != "HS256" or len(key.public) >= _SECRET_MIN_BYTES:
        return ""
    return f"a secret of {len(key.public)} bytes can be guessed; expected {_SECRET_MIN_BYTES}"


def _signing(keys: "tuple[Key, ...]") -> "Key":
    for key in keys:
        if key.private is not None:
            return key
    raise ConfigError("--key: expected a secret or a private key, or one among auth.keys; a public key signs nothing")


def _seconds(text: str) -> int:
    found = _DURATION.fullmatch(text)
    if not found or not int(found[1]):
        raise ConfigError(f"--ttl: expected a time such as 30s, 15m, 1h or 7d, got {text!r}")
    return int(found[1]) * _UNITS_S[found[2]]


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


# relay check.


def check(
    config: ConfigFile = None,
    redis_url: RedisUrl = None,
    connect: Annotated[
        bool, typer.Option("--connect", help="Ask Redis too: its version and role, and what its user may do.")
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            metavar="S", min=0, help="With --connect in topic mode: how long to count events in the other form; 0: not."
        ),
    ] = 10.0,
) -> None:
    """Say in plain words who may connect and do what, and warn. Piped: a line of JSON each.

    With --connect, Redis is asked what it is, which of the commands that the settings need its user may use, how many
    connections it takes, and whether a message that is published comes back. Nothing is changed there. With
    redis.publish_form = "topic" and on a cluster, events are counted that are still published on to:*, which relays
    in topic mode do not receive.

    Where the file uses former names of settings, it is printed with the new names, and without its secrets.

    What `relay serve` would refuse is refused here: the relay is made as there, with its plugins, and not started.
    """
    from relay.app import Relay

    settings = load(config, {"redis_url": redis_url})
    settings.old_names.is_logged = True  # it is one of the warnings below
    has_bus = settings.redis_url or settings.broadcast_url
    relay = Relay(settings if has_bus else settings.model_copy(update={"redis_url": EMBEDDED}))
    relay.check_routes()
    keys, found = relay.components.keys, relay.plugins.found
    warned = [("warning", str(settings.old_names))] if settings.old_names.renamed else []
    warned += [
        ("warning", text)
        for text in (*_warnings(settings, keys), *_contradictions(settings), *topic_warnings(settings))
    ]
    warned += [("warning", f"plugin {each.name}: cannot be loaded: {each.fault}") for each in found if each.fault]
    found_out = ask_redis(settings, seconds) if connect else []
    warned += [(about, text) for about, text in found_out if about == "warning"]
    unread, unnamed = unread_file(config), empty_bus(settings)
    warned += [("warning", unnamed)] if unnamed else []
    said = [
        *_facts(settings, keys),
        *topic_facts(settings),
        *(each for each in found_out if each[0] != "warning"),
        *([("note", unread)] if unread else []),
        *warned,
    ]
    if not is_terminal():
        print_lines({"about": about, "text": text} for about, text in said)
    else:
        screen = console()
        for about, text in said:
            style = {"warning": "bold yellow", "note": "yellow"}.get(about)
            screen.print(f"{about}: {text}" if style else f"{about:<10} {text}", style=style)
    _print_renamed(config)
    if warned:
        raise typer.Exit(1)


def _print_renamed(config: Path | None) -> None:
    """Print the file with the new names of settings, where it uses former ones."""
    path = config or os.environ.get(CONFIG_VARIABLE)
    text = Path(path).read_bytes().decode("utf-8-sig") if path else ""
    if (renamed := rename_in_toml(text)) == text:
        return
    shown = mask_secrets(renamed)
    if is_terminal():
        typer.echo(f"\n{path} with the new names{_fill_in(shown != renamed)}:\n\n{shown}")
    else:
        print_lines([{"about": "file", "text": shown}])


def _fill_in(is_masked: bool) -> str:
    return ", and without its secrets: fill in what stands in <…>" if is_masked else ""


def _fan_out(config: Config) -> str:
    if form(config.speedups) == "c":
        return "in C, for sockets without TLS"
    return "in Python; the part in C is " + ("not built" if config.speedups else "switched off by speedups = false")


def _facts(config: Config, keys: "tuple[Key, ...]") -> Iterator[tuple[str, str]]:
    auth = config.auth
    exposure = config.exposure(auth.has_keys)
    if config.is_exposed:
        from_where = "other machines can reach it"
    elif exposure.everybody or config.trusted_proxies:
        from_where = "other machines can reach it through a proxy on this one"
    else:
        from_where = "only this machine can reach it"
    yield "address", f"{config.host}:{config.port}; {from_where}"
    yield "sockets", ", ".join(config.socket_paths)
    yield (
        "transports",
        ", ".join(f"{name} at {config.socket_paths[0].rstrip('/')}/{name}" for name in config.transports),
    )
    if "longpoll" in config.transports:
        yield "long polls", _long_polls(config)
    yield "bus", _bus(config)
    yield "fan-out", _fan_out(config)
    yield "pages", _pages(config)
    trusted = ", ".join(config.trusted_proxies)
    yield "proxies", f"{trusted}; X-Forwarded-For is believed from there" if trusted else "none is believed"
    if config.allowed_hosts or (exposure.openings and not auth.has_keys):
        yield "hosts", _hosts(config)
    yield "connect", _who_connects(config, exposure)
    if auth.has_keys:
        yield "tokens", _tokens(config, keys)
        for at, key in enumerate(keys):
            yield "key", f"auth.keys.{at}: {key.describe()}"
    limited = bool(auth.has_keys or auth.anonymous or auth.authenticated)
    if not limited:
        yield "rights", "everybody who connects may join every topic and push to it"
    else:
        if config.allow_anonymous or not auth.has_keys:
            yield from _rights("without a token", auth.anonymous)
        yield from _rights("with a token", auth.authenticated)
        yield "rights", f'with a token besides: what its claim "{auth.rights_claim}" says'
        if auth.tangram:
            yield from tangram_rights(auth)
    for entry in config.topics:
        if entry.history is not None:
            yield "history", f"{entry.match}: {entry.history.size} events of each topic, for {entry.history.ttl_s} s"
    for entry in config.topics:
        if not entry.push:
            but = f", but {', '.join(entry.client_events)}" if entry.client_events else ""
            yield "rights", f"no client may push to {entry.match}, whatever a token says{but}"
    for entry in config.topics:
        if entry.client_events:
            sender = "with their sender" if entry.client_events_sender else "without their sender"
            yield "clients", f"{', '.join(entry.client_events)} on {entry.match} go to the other subscribers, {sender}"
    for hook in config.webhooks:
        otherwise = "refused" if hook.on_failure == "refuse" else "allowed"
        what = f"{', '.join(hook.on)} on {hook.match} are sent to {origin_of(hook.url)}"
        yield "webhooks", f"{what}, and without an answer {otherwise}; {len(hook.secrets)} secret(s)"
    yield "rest", _rest(config, exposure)
    if config.metrics.public or config.metrics.key or (exposure.openings and not config.rest.api_key):
        yield "metrics", _metrics(config)
    if ignored := service_links(os.environ):
        yield "note", f"variables of a Kubernetes service or container link are ignored: {', '.join(ignored)}"
    for at, entry in enumerate(config.topics):
        if entry.history is not None and entry.history.size > (most := config.limits.recover_max_events):
            yield (
                "note",
                f"topics.{at}: history.size = {entry.history.size}, and a join is given {most} events at most "
                "(limits.recover_max_events)",
            )
    for at, hook in enumerate(config.webhooks):
        if hook.on_failure == "allow":
            yield "note", f'webhooks.{at}: on_failure = "allow": a client that makes the program fail is let in'
    if config.is_exposed:
        yield "note", "the relay speaks no TLS; without a proxy that does, tokens can be read on their way"


def _pages(config: Config) -> str:
    if config.allowed_origins == "any":
        return "those of any host"
    if config.allowed_origins != "same":
        return ", ".join(config.allowed_origins)
    local = "" if config.is_exposed or config.trusted_proxies else ", and of other servers on this machine"
    return f"those of the relay's own host and port{local}"


def _bus(config: Config) -> str:
    url = config.redis_url or config.broadcast_url
    if not url or url == EMBEDDED:
        return "a Valkey of the relay's own"
    if (sentinel := parse_sentinel(url)) is not None:
        return f"{sentinel.service}, of the Sentinels {', '.join(f'{host}:{port}' for host, port in sentinel.hosts)}"
    if parse_cluster(url) is not None:
        return f"Redis {shown(url)}"
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    port = parts.port or (6379 if config.redis_url else None)
    return f"{parts.scheme}://{parts.hostname or ''}" + (f":{port}" if port else "")


def _long_polls(config: Config) -> str:
    if config.broadcast_url:
        return "answered by the process of their session alone"
    if config.auth.secret:
        return "answered by all processes with this auth.secret"
    if config.workers > 1:
        return "answered by all workers; several nodes need auth.secret"
    return "answered by this process; several processes or nodes need auth.secret"


def _hosts(config: Config) -> str:
    if ANY_HOST in config.allowed_hosts:
        return "any name"
    return ", ".join(("names of this machine", "IP addresses", *config.allowed_hosts))


def _who_connects(config: Config, exposure: Exposure) -> str:
    if exposure.is_refused:
        return "no client: `relay serve` refuses to start; set auth.keys or auth.jwks_url, or allow_anonymous = true"
    if config.auth.has_keys:
        return "clients with a token" + (", and clients without one" if config.allow_anonymous else "")
    if exposure.everybody:
        return "anybody, from any machine"
    if config.allow_anonymous:
        return "anybody on this machine, and clients that reach it through a proxy or a tunnel"
    return "anybody on this machine"


def _tokens(config: Config, keys: "tuple[Key, ...]") -> str:
    auth = config.auth
    said = [f"signed with {' or '.join(auth.algorithms)}", f"{len(keys)} key{'' if len(keys) == 1 else 's'} here"]
    if auth.jwks_url:
        said.append(f"those published at {urlsplit(auth.jwks_url).hostname}")
    said.append(f"issuer {auth.issuer}" if auth.issuer else "any issuer")
    said.append(f"audience {' or '.join(auth.audience)}" if auth.audience else "no audience")
    return "; ".join(said)


def _rights(who: str, grants: tuple[GrantConfig, ...]) -> Iterator[tuple[str, str]]:
    if not grants:
        yield "rights", f"{who}: none"
    for grant in grants:
        yield "rights", f"{who}: {', '.join(names_of(grant.grant.rights)) or 'nothing'} on {grant.match}"


def _metrics(config: Config) -> str:
    if config.metrics.public:
        who = "everybody"
    elif config.metrics.key:
        who = "programs on this machine, and clients with metrics.key"
    else:
        who = "programs on this machine; set metrics.key for others"
    return f"/metrics, for {who}"


def _rest(config: Config, exposure: Exposure) -> str:
    if not config.rest.path:
        return "off"
    if config.rest.api_key:
        who = "clients with the key"
    elif exposure.openings:
        who = "no client; set rest.api_key"
    else:
        who = "programs on this machine"
    return f"{config.rest.path}, for {who}"


def _warnings(config: Config, keys: "tuple[Key, ...]") -> Iterator[str]:
    auth = config.auth
    exposure = config.exposure(auth.has_keys)
    if exposure.is_refused:
        yield "relay serve refuses this address: anybody could connect; an app of your own may give authenticate=…"
    if exposure.everybody and not auth.has_keys:
        yield "anybody can connect, from any machine (allow_anonymous = true, and no keys)"
    if 0 < len(config.metrics.key) < _API_KEY_MIN:
        yield f"metrics.key: {len(config.metrics.key)} characters can be guessed; expected {_API_KEY_MIN}"
    if config.allowed_origins == "any":
        yield (
            'allowed_origins = "any": pages of any site may connect; '
            "where authenticate= reads cookies, as their visitor"
        )
    for network in parse_networks(config.trusted_proxies):
        if network.prefixlen < _NETWORK_MIN_BITS[network.version]:
            yield f"trusted_proxies: {network} trusts everybody: any client may claim any address"
    if config.rest.path and 0 < len(config.rest.api_key) < _API_KEY_MIN:
        yield f"rest.api_key: {len(config.rest.api_key)} characters can be guessed; expected {_API_KEY_MIN}"
    yield from _auth_warnings(auth, keys)
    if auth.tangram == "open":
        yield open_tokens(config)
    opened = [entry for entry in auth.anonymous if entry.match == "*" and entry.grant.rights & Right.PUSH]
    if opened and config.allow_anonymous:
        yield "clients without a token may push to every topic (auth.anonymous)"
    if auth.has_keys and (not (config.redis_url or config.broadcast_url) or config.redis_url == EMBEDDED):
        yield f"redis_url: {BESIDE_AUTH}"
    for at, hook in enumerate(config.webhooks):
        if hook.url.startswith("http://") and not is_this_machine(urlsplit(hook.url).hostname or ""):
            yield f"webhooks.{at}: url is not https: others on the network can read payloads, and decide in its place"
    if config.redis_url.startswith("redis://") and not _is_here(config.redis_url):
        yield "redis_url is not rediss://: events and its password travel in the clear"


def _auth_warnings(auth: AuthConfig, keys: "tuple[Key, ...]") -> Iterator[str]:
    for at, key in enumerate(keys):
        if weakness := _weakness(key):
            yield f"auth.keys.{at}: {weakness}"
    if auth.has_keys and not auth.require_expiry:
        yield "auth.require_expiry = false: a stolen token without expiry stays valid until its key is removed"
    parts = urlsplit(auth.jwks_url)
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
        yield "auth.jwks_url is not https: an attacker on the network path can supply other keys"
    if auth.has_keys and not (auth.issuer or auth.audience) and auth.jwks_url:
        yield "neither auth.issuer nor auth.audience is set: a token made for another service is good here too"
    if auth.jwks_url and not keys and auth.algorithms == ("HS256",):
        yield 'auth.algorithms = ["HS256"], and no secret: keys at auth.jwks_url are for others, so no token is good'
    for entry in auth.authenticated:
        if entry.match.startswith("{sub}") and entry.match != "{sub}":
            taken = entry.match.replace("{sub}", "room")
            yield f"auth.authenticated: {entry.match} begins with {{sub}}: a user who is called room has {taken}"


def _contradictions(config: Config) -> Iterator[str]:
    """Settings that other settings leave without effect, or with an unwanted one."""
    limits, redis, auth = config.limits, config.redis, config.auth
    least = limits.payload_max_bytes + ENVELOPE_BYTES
    sizes = [
        ("limits.in_flight_total_max_bytes", limits.in_flight_total_max_bytes, "such a push closes its socket"),
        ("limits.outbox_total_max_bytes", limits.outbox_total_max_bytes, "such an event cannot wait for a slow reader"),
        ("redis.publish_queue_max_bytes", redis.publish_queue_max_bytes, "such a push never reaches Redis"),
        ("limits.body_max_bytes", limits.body_max_bytes, "REST refuses such an event"),
    ]
    if config.has_history:
        sizes.append(("limits.recover_max_bytes", limits.recover_max_bytes, "such an event cannot be recovered"))
    for name, value, follows in sizes:
        if 0 < value < least:
            yield f"{name} = {value} is too small for limits.payload_max_bytes = {least - ENVELOPE_BYTES}: {follows}"
    if auth.anonymous and auth.has_keys and not config.allow_anonymous:
        yield "auth.anonymous has no effect: clients without a token are refused unless allow_anonymous = true"
    for entry in auth.tangram_topics:
        if auth.tangram != "open" and (SUBJECT not in entry.match or not auth.tangram):
            yield f'auth.tangram_topics: {entry.match} has no effect unless auth.tangram = "open"'
    for at, topic in enumerate(config.topics):
        if topic.notify_dropped and topic.overflow is Overflow.DISCONNECT:
            yield f'topics.{at}: notify_dropped has no effect with overflow = "disconnect": no event is dropped'
    yield from _never_used("topics", [topic.match for topic in config.topics])
    yield from _never_used("metrics.topics", config.metrics.topics)
    prefixes = [proxy.prefix.rstrip("/") for proxy in config.proxy]
    for at, prefix in enumerate(prefixes):
        if hides := next((other for other in prefixes[:at] if f"{prefix}/".startswith(f"{other}/")), None):
            yield f"proxy.{at}: {prefix} is never asked: all below {hides} is forwarded by an entry before it"
        if config.rest.path and f"{config.rest.path}/".startswith(f"{prefix}/"):
            yield f"proxy.{at}: {prefix} hides the REST interface at {config.rest.path}; set another rest.path"
    known = {name for name, _, _ in candidates(config.plugins)}
    for name in sorted(set(config.plugins.disabled) - known):
        yield f"plugins.disabled: there is no plugin {name}"


def _never_used(name: str, patterns: Sequence[str]) -> Iterator[str]:
    for at, pattern in enumerate(patterns):
        if (before := next((other for other in patterns[:at] if other in ("*", pattern)), None)) is not None:
            yield f"{name}.{at}: {pattern} is never used: {before} stands before it, and the first match counts"


def _is_here(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost", None)
