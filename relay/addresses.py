"""Where a client is: its address behind trusted proxies, and the network it is counted by.

Owns how ``X-Forwarded-For`` is read; must not know sockets or limits.
"""

from collections.abc import Iterable, MutableMapping, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeAlias

Network: TypeAlias = IPv4Network | IPv6Network

IPV6_PREFIX = 64
"""Bits of an IPv6 address that clients are told apart by: a provider gives each of them the rest to choose from."""

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


def look_behind_proxies(scope: MutableMapping[str, Any], trusted: Sequence[Network]) -> MutableMapping[str, Any]:
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


def counted_as(address: str) -> str:
    """Say under which name an address is counted: itself, of IPv6 its /64 network; what is no address, as it is."""
    found = _parse_host(address)
    if isinstance(found, IPv6Address):
        return str(IPv6Network((int(found) >> IPV6_PREFIX << IPV6_PREFIX, IPV6_PREFIX)))
    return address if found is None else str(found)


def _parse_host(text: str) -> IPv4Address | IPv6Address | None:
    """Read an address, with or without a port: ``1.2.3.4:5``, ``::1``, ``[::1]:5``; None for what is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text)
    except ValueError:
        return None
    # A listener for both families shows IPv4 clients as ::ffff:1.2.3.4.
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _is_in(address: IPv4Address | IPv6Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
