"""Where a client is, and under which name it asks: addresses, ``Host``, and what proxies write.

Owns how ``X-Forwarded-For`` and ``Host`` are read, and which network a client is counted by; must not know sockets or
limits.
"""

import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeAlias
from urllib.parse import urlsplit

Network: TypeAlias = IPv4Network | IPv6Network

_IP_MAX_LENGTH = 45
"""Characters of the longest address, IPv6 with IPv4 at its end."""

IPV6_PREFIX = 64
"""Bits of an IPv6 address that identify a client: a provider lets each client choose the others."""

FORWARDED = frozenset(
    b"forwarded via x-real-ip x-client-ip x-cluster-client-ip x-original-forwarded-for x-original-host "
    b"x-envoy-external-address cf-connecting-ip cf-connecting-ipv6 true-client-ip fastly-client-ip fly-client-ip "
    b"x-appengine-user-ip x-azure-clientip".split()
)
"""Headers that proxies write, besides those that begin with ``x-forwarded``. A proxy that writes none of them cannot be
distinguished from a client on this machine."""

_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]*)?", re.ASCII | re.IGNORECASE)

# Further forms of an IPv4 address, as inet_aton(3) reads them.
_NUMBERS = re.compile(r"(0x[\da-f]+|\d+)(\.(0x[\da-f]+|\d+)){0,3}")

_SCHEMES = {"http": "http", "https": "https", "ws": "http", "wss": "https"}


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Read addresses and networks in CIDR form, ``10.0.0.1`` or ``10.0.0.0/8``. Raises ValueError."""
    return tuple(_parse_network(text) for text in texts)


def _parse_network(text: str) -> Network:
    try:
        return ip_network(text)
    except ValueError as error:
        raise ValueError(f'expected addresses or networks such as "10.0.0.1" or "10.0.0.0/8": {error}') from None


def client_address(peer: str, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """Find out who the client is: the rightmost hop that is no trusted proxy.

    Each proxy appends the address it was called from, so the entries on the left are the client's own inventions, and
    only what a trusted proxy wrote is believed. An entry that is no address ends the search at the proxy that wrote it.

    Args: peer: who opened the connection.
          forwarded_for: the values of all ``X-Forwarded-For`` headers, in their order.
    """
    found = _parse_host(peer)
    if not trusted or found is None or not _is_in(found, trusted):
        return peer
    for text in reversed(",".join(forwarded_for).split(",")):
        hop = _parse_host(text.strip())
        if hop is None:
            break
        found = hop
        if not _is_in(hop, trusted):
            break
    return str(found)


def apply_forwarded_headers(scope: MutableMapping[str, Any], trusted: Sequence[Network]) -> MutableMapping[str, Any]:
    """Put the client's own address and scheme into an ASGI scope that came through trusted proxies.

    Returns: the scope itself where nothing is to be changed, else a copy.
    """
    peer = scope.get("client")
    if not trusted or not peer or (at := _parse_host(peer[0])) is None or not _is_in(at, trusted):
        return scope
    forwarded = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
    address = client_address(peer[0], forwarded, trusted)
    changes: dict[str, Any] = {}
    if address != peer[0]:
        changes["client"] = (address, 0)  # its port is not known
    for name, value in scope["headers"]:
        if name == b"x-forwarded-proto" and (scheme := _SCHEMES.get(value.decode("latin-1").strip().lower())):
            changes["scheme"] = scheme.replace("http", "ws") if scope["type"] == "websocket" else scheme
    return {**scope, **changes} if changes else scope


def rate_limit_key(address: str) -> str:
    """Say under which name an address is counted: itself, of IPv6 its /64 network; what is no address, as it is."""
    found = _parse_host(address)
    if isinstance(found, IPv6Address):
        return str(IPv6Network((int(found) >> IPV6_PREFIX << IPV6_PREFIX, IPV6_PREFIX)))
    return address if found is None else str(found)


def is_loopback_address(text: str) -> bool:
    """Say whether an IP address is one of this machine's own; no name is, and no address with a port or a zone."""
    found = parse_ip(text)
    return found is not None and found.is_loopback


def is_loopback_host(host: str) -> bool:
    """Say whether a host, as of `host_in`, names this machine: ``localhost``, names below it, loopback addresses."""
    return host == "localhost" or host.endswith(".localhost") or is_loopback_address(host)


def is_this_machine(host: str) -> bool:
    """Say whether a host is this machine: a loopback host in any form that connect(2) takes.

    Such forms are ``127.1``, ``0.0.0.0`` and ``::``, ``[::1]`` and ``LOCALHOST.`` among them.
    """
    host = host.lower().strip("[]").removesuffix(".")
    if is_loopback_host(host):
        return True
    found = parse_ip(host)
    if found is not None:
        return found.is_unspecified or (found.version == 4 and int(found) >> 24 == 0)
    if not _NUMBERS.fullmatch(host):
        return False
    first, dot, _ = host.partition(".")
    base = 16 if first.startswith("0x") else 8 if first.startswith("0") else 10
    try:
        number = int(first, base)
    except ValueError:  # 08
        return False
    return (number if dot else number >> 24) in (0, 127)


def host_in(authority: str) -> str:
    """The host of ``host:port``, in lower case and without brackets; empty where it cannot be read."""
    found = _AUTHORITY.fullmatch(authority)
    return "" if found is None else (found[1] or found[2].removesuffix(".")).lower()


def hosts_of(scope: Mapping[str, Any]) -> list[str]:
    """The values of all ``Host`` headers of an ASGI scope."""
    return [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]


def forwarded_header(scope: Mapping[str, Any]) -> str | None:
    """The name of a header in an ASGI scope that a proxy writes; None where there is none."""
    for name, _ in scope["headers"]:
        plain = name.replace(b"_", b"-")
        if plain in FORWARDED or plain.startswith(b"x-forwarded"):
            return str(name.decode("latin-1"))
    return None


def came_by(scope: Mapping[str, Any], known: Sequence[Network]) -> bool:
    """Say whether all that ``X-Forwarded-For`` names are addresses of known proxies, or of this machine."""
    forwarded = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for").decode("latin-1")
    hops = [_parse_host(text.strip()) for text in forwarded.split(",")]
    return all(hop is not None and (hop.is_loopback or _is_in(hop, known)) for hop in hops)


def parse_ip(text: str) -> IPv4Address | IPv6Address | None:
    """Read an IP address alone; None for anything else, with a zone too. IPv4 in IPv6 is IPv4."""
    return _parse_ip(text) if len(text) <= _IP_MAX_LENGTH else None


@lru_cache(4096)  # each handshake asks several times about the same addresses
def _parse_ip(text: str) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address(text)
    except ValueError:
        return None
    if isinstance(found, IPv4Address):
        return found
    # A listener for both families shows IPv4 clients as ::ffff:1.2.3.4.
    return (found.ipv4_mapped or found) if found.scope_id is None else None


def _parse_host(text: str) -> IPv4Address | IPv6Address | None:
    """Read an address, with or without a port: ``1.2.3.4:5``, ``::1``, ``[::1]:5``; None for other text."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    head, _, _ = text.partition("%")
    return parse_ip(head if ":" in head else text)  # a zone is this machine's own name for a network


def _is_in(address: IPv4Address | IPv6Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def origin_of(url: str) -> str:
    """Scheme, host and port of an address, which is what may be shown of it: no user, no path, no query."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "another address"
    host = parts.netloc.rpartition("@")[2]
    text = f"{parts.scheme}://{host}" if parts.scheme and host else "another address"
    return text if text.isascii() and text.isprintable() else "another address"
