"""The addresses of Redis that the relay takes, what their options mean, and how each is shown.

Owns the form of ``redis_url``, Sentinel's included; opens nothing. What is shown never holds user, password or query.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

SENTINEL_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
"""Schemes that ask Sentinels for the master, and the scheme of the master's own address."""

CLUSTER_SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
"""Schemes of a Redis Cluster, and the scheme of each node's own address."""

_SENTINEL_PORT = 26379
_REDIS_PORT = 6379

_FORM = "expected scheme://user:password@host:port, special characters written as %XX"


class SentinelAddress(NamedTuple):
    """A master that Sentinels know."""

    hosts: tuple[tuple[str, int], ...]
    """The Sentinels: host and port."""
    service: str
    """The master's name among them."""
    master_url: str
    """``redis://`` or ``rediss://`` address with the master's credentials, database and options; its host is
    a Sentinel's, and to be replaced."""
    username: str | None
    """Of the Sentinels themselves."""
    password: str | None


class ClusterAddress(NamedTuple):
    """A Redis Cluster, by some of its nodes."""

    nodes: tuple[tuple[str, int], ...]
    """Host and port of those that are asked first who serves which slots."""
    scheme: str
    credentials: str
    """As they stand in the address, with the @."""
    query: str

    def node_url(self, host: str, port: int) -> str:
        """The address of one node, with the credentials and options of all."""
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return f"{self.scheme}://{self.credentials}{place}" + (f"?{self.query}" if self.query else "")


class RedisAddress(NamedTuple):
    """A parsed ``redis_url``: where the server is, and what the handshake with it says."""

    transport: Literal["tcp", "tls", "unix"]
    options: Mapping[str, Any]
    """Keyword arguments of redis-py's connection for this transport."""
    username: str | None
    password: str | None
    db: int
    client_name: str
    protocol: int
    """Version of RESP: 2, or 3 where the address asks for it."""
    sentinel: SentinelAddress | None
    """The Sentinels to ask for the master; host and port are then not among the options."""


def parse_sentinel(url: str) -> SentinelAddress | None:
    """Take an address of Sentinels apart; None where it is of another kind.

    Args:   url: ``redis+sentinel://[user:password@]host[:port][,host[:port]…]/master[/db][?option=value…]``;
                ``rediss+sentinel`` for TLS to all of them. The Sentinels' own credentials are the options
                ``sentinel_username`` and ``sentinel_password``.
    Raises: ValueError: no host, a port that is no number, or no master; says what was expected, not what came.
    """
    scheme = SENTINEL_SCHEMES.get(url.partition("://")[0])
    if scheme is None:
        return None
    try:
        return _parse_sentinel(url, scheme)
    except ValueError:
        # Not repeated: urllib quotes what it could not read, which may be a part of the password.
        raise ValueError("expected redis+sentinel://user:password@host:port,host:port/master/db") from None


def _parse_sentinel(url: str, scheme: str) -> SentinelAddress:
    # No URL has several hosts, and newer Pythons refuse a second one in brackets: urllib sees what is behind them.
    netloc, _, rest = url.partition("://")[2].partition("/")
    parts = urlsplit(f"//_/{rest}")
    credentials, at, places = netloc.rpartition("@")
    hosts = tuple(_host(place) for place in places.split(","))
    service, _, database = parts.path.strip("/").partition("/")
    if not all(host for host, _ in hosts) or not service or "/" in database:
        raise ValueError
    options = parse_qsl(parts.query, keep_blank_values=True)
    own = dict(options)
    username, password = (own.get(name) or None for name in ("sentinel_username", "sentinel_password"))
    query = urlencode([(name, value) for name, value in options if not name.startswith("sentinel_")])
    unknown = [name for name, _ in options if name.startswith("sentinel_") and name not in _SENTINEL_OPTIONS]
    if unknown:
        query = urlencode([(unknown[0], "")])  # to be refused by its name
    first = places.split(",")[0]
    master_url = f"{scheme}://{credentials}{at}{first}/{database}" + (f"?{query}" if query else "")
    fragment = f"#{parts.fragment}" if parts.fragment else ""
    return SentinelAddress(hosts, unquote(service), master_url + fragment, username, password)


def _host(place: str, port: int = _SENTINEL_PORT) -> tuple[str, int]:
    parts = urlsplit(f"//{place}")
    return parts.hostname or "", parts.port or port


def parse_cluster(url: str) -> ClusterAddress | None:
    """Take the address of a Redis Cluster apart; None where it is of another kind.

    Args:   url: ``redis+cluster://[user:password@]host[:port][,host[:port]…][?option=value…]``; ``rediss+cluster`` for
                TLS to all nodes.
    Raises: ValueError: no host, a port that is no number, or a database; says what was expected, not what came.
    """
    scheme = CLUSTER_SCHEMES.get(url.partition("://")[0])
    if scheme is None:
        return None
    netloc, _, query = url.partition("://")[2].partition("?")
    credentials, at, places = netloc.rpartition("@")
    try:
        nodes = tuple(_host(place, _REDIS_PORT) for place in places.rstrip("/").split(","))
    except ValueError:
        nodes = ()  # not repeated, as above
    if not nodes or not all(host and "/" not in host for host, _ in nodes) or "/" in places.rstrip("/"):
        raise ValueError("expected redis+cluster://user:password@host:port,host:port, without a database")
    return ClusterAddress(nodes, scheme, credentials + at, query)


def shown(url: str) -> str:
    """Where Redis is, for logs."""
    cluster = parse_cluster(url)
    if cluster is not None:
        return f"cluster of {','.join(f'{host}:{port}' for host, port in cluster.nodes)}"
    sentinel = parse_sentinel(url)
    if sentinel is not None:
        return f"{sentinel.service} of Sentinel {','.join(f'{host}:{port}' for host, port in sentinel.hosts)}"
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"


# Options.


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError
    return int(text)


def _positive(text: str) -> int:
    if (number := _number(text)) == 0:
        raise ValueError
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf or "_" in text:
        raise ValueError
    return seconds


def _flag(text: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]


def _text(text: str) -> str:
    return text


def _word(text: str) -> str:
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError
    return text


def _path(text: str) -> str:
    if not text:
        raise ValueError
    return text


def _protocol(text: str) -> int:
    return {"2": 2, "3": 3}[text]


def _requirement(text: str) -> str:
    return {"none": "none", "optional": "optional", "required": "required"}[text]


def _tls_version(text: str) -> int:
    return {"TLSv1.2": 771, "771": 771, "TLSv1.3": 772, "772": 772}[text]


_Option = tuple[Callable[[str], Any], str]

OPTIONS: dict[str, _Option] = {
    "username": (_text, "text"),
    "password": (_text, "text"),
    "db": (_number, "a number, 0 or more"),
    "client_name": (_word, "a name without spaces"),
    "protocol": (_protocol, "2 or 3"),
    "timeout": (_seconds, "a number of seconds"),
    "socket_timeout": (_seconds, "a number of seconds"),
    "socket_connect_timeout": (_seconds, "a number of seconds"),
    # These are redis-py's; the relay has no use for them, and takes them since they have always been harmless.
    "health_check_interval": (_number, "a number of seconds"),
    "max_connections": (_positive, "a number, 1 or more"),
    "retry_on_timeout": (_flag, "true or false"),
}
"""Options of every address: how the text is read (raising ValueError or KeyError), and what is expected."""

TCP_OPTIONS: dict[str, _Option] = {"socket_keepalive": (_flag, "true or false")}
"""Further ones, of addresses with a host."""

TLS_OPTIONS: dict[str, _Option] = {
    "ssl_ca_certs": (_path, "the path of a file"),
    "ssl_ca_path": (_path, "the path of a directory"),
    "ssl_ca_data": (_path, "certificates as PEM"),
    "ssl_certfile": (_path, "the path of a file"),
    "ssl_keyfile": (_path, "the path of a file"),
    "ssl_password": (_text, "text"),
    "ssl_cert_reqs": (_requirement, "none, optional or required"),
    "ssl_check_hostname": (_flag, "true or false"),
    "ssl_min_version": (_tls_version, "TLSv1.2 or TLSv1.3"),
    "ssl_ciphers": (_path, "names of ciphers"),
}
"""Further ones, of ``rediss://`` and ``rediss+sentinel://``."""

_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")

_WITHOUT_EFFECT = ("health_check_interval", "max_connections", "retry_on_timeout")
_SECRET_OPTIONS = ("password", "ssl_password", "ssl_ca_data", "username")

_HINTS = {
    "ssl": "for TLS begin the address with rediss://",
    "tls": "for TLS begin the address with rediss://",
    "database": "the database is the path, redis://host:port/0",
    "defaultdatabase": "the database is the path, redis://host:port/0",
    "user": "the user is redis://user:password@host:port, or the option username",
    "name": "the connection's name is the option client_name",
    "clientname": "the connection's name is the option client_name",
    "connecttimeout": "the option is socket_connect_timeout, in seconds",
    "mastername": "the master of Sentinels is the path, redis+sentinel://host:port/master",
}


def parse(url: str) -> RedisAddress:
    """Take ``redis_url`` apart, and check each of its options. Of a cluster it is the address of the first node.

    Raises: ValueError: naming the option or the part, and what was expected; never repeats a secret.
    """
    sentinel = parse_sentinel(url)
    if sentinel is not None:
        url = sentinel.master_url
    cluster = parse_cluster(url)
    if cluster is not None:
        url = cluster.node_url(*cluster.nodes[0])
        if any(name == "db" for name, _ in parse_qsl(cluster.query)):
            raise ValueError("option db: expected none; a cluster has database 0 alone")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        # Not repeated, as above.
        raise ValueError(_FORM) from None
    if parts.fragment or "@" in parts.query.partition("=")[0] or (parts.scheme != "unix" and "@" in parts.path):
        raise ValueError(f"{_FORM}: # as %23, ? as %3F, / as %2F")  # a password that urllib has cut off
    transport: Literal["tcp", "tls", "unix"] = "tcp"
    known = OPTIONS | TCP_OPTIONS
    if parts.scheme == "unix":
        transport, known = "unix", dict(OPTIONS)
    elif parts.scheme == "rediss":
        transport, known = "tls", known | TLS_OPTIONS
    options = _read_options(parts.query, known)
    given: int | None = options.pop("db", None)
    database = given or 0
    if transport == "unix":
        if parts.netloc.rpartition("@")[2] or not parts.path.strip("/"):
            raise ValueError("expected unix:///path/of/the/socket, with three slashes")
        options["path"] = unquote(parts.path)
    else:
        database = _database(parts.path, given)
        if sentinel is None:
            _check_host(parts.hostname, port)
            options |= {"host": unquote(parts.hostname or "localhost"), "port": port or 6379}
    username = unquote(parts.username) if parts.username else options.pop("username", None)
    password = unquote(parts.password) if parts.password else options.pop("password", None)
    for name in ("username", "password", *_WITHOUT_EFFECT):
        options.pop(name, None)
    if (seconds := options.pop("timeout", None)) is not None:
        options = {"socket_timeout": seconds, "socket_connect_timeout": seconds} | options
    name, protocol = options.pop("client_name", ""), options.pop("protocol", 2)
    return RedisAddress(transport, options, username or None, password or None, database, name, protocol, sentinel)


def _read_options(query: str, known: Mapping[str, _Option]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise ValueError(_unknown(name, known))
        if name in found:
            raise ValueError(f"option {name}: expected once, came twice")
        read, expected = known[name]
        try:
            found[name] = read(text)
        except (ValueError, KeyError):
            came = "" if name in _SECRET_OPTIONS else f", got {text[:40]!r}"
            raise ValueError(f"option {name}: expected {expected}{came}") from None
    return found


def _unknown(name: str, known: Mapping[str, _Option]) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.\- ]{0,40}", name):
        return f"{_FORM}, and options as ?name=value&name=value"
    if name in TLS_OPTIONS:
        return f"option {name}: expected with rediss:// or rediss+sentinel:// alone"
    if name in TCP_OPTIONS:
        return f"option {name}: expected with a host, not with unix://"
    if name in _SENTINEL_OPTIONS:
        return f"option {name}: expected with redis+sentinel:// or rediss+sentinel:// alone"
    hint = _HINTS.get(re.sub("[^a-z]", "", name.lower()), "")
    names = ", ".join(sorted(set(known) - set(_WITHOUT_EFFECT)))
    return f"option {name}: not known; {f'{hint}; ' if hint else ''}expected one of {names}"


def _database(path: str, given: int | None) -> int:
    text = unquote(path).strip("/")
    if not text:
        return given or 0
    try:
        number = _number(text)
    except ValueError:
        raise ValueError("expected a database number as the path, redis://host:port/0") from None
    if given not in (None, number):
        raise ValueError(f"option db: expected as in the path, {number}, got {given}")
    return number


def _check_host(host: str | None, port: int | None) -> None:
    if port == 0:
        raise ValueError("expected a port from 1 to 65535, got 0")
    if host and re.search(r"[,\s]", unquote(host)):
        raise ValueError(
            "expected one host; several Sentinels are redis+sentinel://host:port,host:port/master, and several nodes "
            "of a cluster redis+cluster://host:port,host:port"
        )
    try:
        _ = unquote(host or "").encode("idna")
    except UnicodeError:
        raise ValueError("expected a host without empty parts, and of 63 characters at most in each") from None
