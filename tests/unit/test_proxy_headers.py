"""`relay.proxy_headers`: who a client is behind proxies, and what it is counted by."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay import proxy_headers
from relay.proxy_headers import (
    apply_forwarded_headers,
    client_address,
    origin_of,
    parse_ip,
    parse_networks,
    rate_limit_key,
)

PROXIES = parse_networks(("127.0.0.1", "10.0.0.0/8", "fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        # Nobody is believed who is no trusted proxy.
        ("9.9.9.9", ["1.2.3.4"], "9.9.9.9"),
        ("127.0.0.1", [], "127.0.0.1"),
        ("127.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        # What stands on the left is the client's own invention.
        ("127.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("127.0.0.1", ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        ("127.0.0.1", ["10.6.6.6, 1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        # All of them trusted: the one furthest off.
        ("127.0.0.1", ["10.0.0.9, 10.0.0.2"], "10.0.0.9"),
        # What is no address is not passed.
        ("127.0.0.1", ["1.2.3.4, unknown"], "127.0.0.1"),
        ("127.0.0.1", ["1.2.3.4, unknown, 10.0.0.2"], "10.0.0.2"),
        ("127.0.0.1", [""], "127.0.0.1"),
        ("127.0.0.1", ["1.2.3.4,"], "127.0.0.1"),
        # Ports and brackets; IPv4 in IPv6.
        ("127.0.0.1", ["1.2.3.4:5678"], "1.2.3.4"),
        ("fd00::1", ["[2001:db8::1]:443"], "2001:db8::1"),
        ("::ffff:127.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        ("::ffff:127.0.0.1", ["::ffff:1.2.3.4"], "1.2.3.4"),
        ("a socket's name", ["1.2.3.4"], "a socket's name"),
    ],
)
def test_client_is_the_rightmost_hop_that_is_no_trusted_proxy(peer: str, forwarded: list[str], expected: str) -> None:
    assert client_address(peer, forwarded, PROXIES) == expected


def test_without_trusted_proxies_the_peer_is_the_client() -> None:
    assert client_address("127.0.0.1", ["1.2.3.4"], ()) == "127.0.0.1"


@given(st.lists(st.text(max_size=30)))
def test_no_header_makes_it_raise(forwarded: list[str]) -> None:
    assert client_address("127.0.0.1", forwarded, PROXIES)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("1.2.3.4", "1.2.3.4"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("testclient", "testclient"),
    ],
)
def test_ipv6_clients_are_counted_by_their_network(address: str, expected: str) -> None:
    assert rate_limit_key(address) == expected


def scope(kind: str, peer: str | None, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    client = None if peer is None else (peer, 1234)
    return {"type": kind, "client": client, "scheme": "ws" if kind == "websocket" else "http", "headers": list(headers)}


FORWARDED = ((b"x-forwarded-for", b"1.2.3.4"), (b"x-forwarded-proto", b"https"))


@pytest.mark.parametrize(("kind", "scheme"), [("http", "https"), ("websocket", "wss")])
def test_scope_behind_a_trusted_proxy_shows_the_client(kind: str, scheme: str) -> None:
    came = scope(kind, "10.0.0.1", *FORWARDED)
    seen = apply_forwarded_headers(came, PROXIES)
    assert (seen["client"], seen["scheme"]) == (("1.2.3.4", 0), scheme)
    assert came == scope(kind, "10.0.0.1", *FORWARDED), "the server's own is left as it is"


@pytest.mark.parametrize("peer", ["9.9.9.9", None])
def test_scope_of_anybody_else_stays_as_it_is(peer: str | None) -> None:
    came = scope("websocket", peer, *FORWARDED)
    assert apply_forwarded_headers(came, PROXIES) is came
    trusted = scope("websocket", "10.0.0.1", (b"x-forwarded-proto", b"gopher"))
    assert apply_forwarded_headers(trusted, PROXIES) is trusted
    assert apply_forwarded_headers(scope("http", "10.0.0.1", *FORWARDED), ()) == scope("http", "10.0.0.1", *FORWARDED)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://alice:hunter2@login.example.org:8443/a/hunter2?token=hunter2#x", "https://login.example.org:8443"),
        ("wss://[::1]:9/x", "wss://[::1]:9"),
        ("/elsewhere", "another address"),
        ("http://[broken/", "another address"),
        ("http://x:port/", "another address"),
        ("http://ex\x1b[31mample/", "another address"),
        ("", "another address"),
    ],
)
def test_what_is_shown_of_an_address_is_scheme_host_and_port(url: str, shown: str) -> None:
    assert origin_of(url) == shown


def test_longest_address_is_read() -> None:
    text = "1111:2222:3333:4444:5555:6666:255.255.255.255"
    assert str(parse_ip(text)) == "1111:2222:3333:4444:5555:6666:ffff:ffff"


def test_addresses_that_are_remembered_are_short() -> None:
    """What clients write into headers has any length."""
    proxy_headers._parse_ip.cache_clear()
    assert parse_ip("1" * 45) is None and parse_ip("1" * 46) is None
    assert proxy_headers._parse_ip.cache_info().currsize == 1
