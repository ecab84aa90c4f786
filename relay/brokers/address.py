"""The addresses of Redis that the relay takes, and how each is shown.

Owns the form of ``redis_url``, Sentinel's included; opens nothing. What is shown never holds user, password or query.
"""

from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

SENTINEL_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
"""Schemes that ask Sentinels for the master, and the scheme of the master's own address."""

_SENTINEL_PORT = 26379


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
        return _parse(url, scheme)
    except ValueError:
        # Not repeated: urllib quotes what it could not read, which may be a part of the password.
        raise ValueError("expected redis+sentinel://user:password@host:port,host:port/master/db") from None


def _parse(url: str, scheme: str) -> SentinelAddress:
    # No URL has several hosts, and newer Pythons refuse a second one in brackets: urllib sees what is behind them.
    netloc, _, rest = url.partition("://")[2].partition("/")
    parts = urlsplit(f"//_/{rest}")
    credentials, at, places = netloc.rpartition("@")
    hosts = tuple(_host(place) for place in places.split(","))
    service, _, database = parts.path.strip("/").partition("/")
    if not all(host for host, _ in hosts) or not service or "/" in database:
        raise ValueError
    options = parse_qs(parts.query)
    username, password = (options.pop(name, [None])[-1] for name in ("sentinel_username", "sentinel_password"))
    query = urlencode(options, doseq=True)
    first = places.split(",")[0]
    master_url = f"{scheme}://{credentials}{at}{first}/{database}" + (f"?{query}" if query else "")
    return SentinelAddress(hosts, unquote(service), master_url, username, password)


def _host(place: str) -> tuple[str, int]:
    parts = urlsplit(f"//{place}")
    return parts.hostname or "", parts.port or _SENTINEL_PORT


def shown(url: str) -> str:
    """Where Redis is, for logs."""
    sentinel = parse_sentinel(url)
    if sentinel is not None:
        return f"{sentinel.service} of Sentinel {','.join(f'{host}:{port}' for host, port in sentinel.hosts)}"
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
