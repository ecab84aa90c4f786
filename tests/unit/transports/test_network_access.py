"""`relay.transports.network_access`: from where, and under which name, a request may reach any route."""

from typing import Any

import pytest
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from relay import Config
from relay.proxy_headers import host_in, is_loopback_address, is_loopback_host
from relay.transports.network_access import NetworkAccess, is_in_process, is_this_machine

ASGI = {"version": "3.0"}
STRANGERS = [
    "testclient",
    "localhost",
    "unix:",
    "unknown",
    "",
    "127.0.0.1:80",
    "[::1]",
    "::1%lo",
    "127.0.0.1 ",
    "127.1",
    "0x7f000001",
    "127.evil",
    "192.168.1.9",
    "::ffff:192.168.1.9",
    "2001:db8::1",
    None,
]
HERE = ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"]


def scope(
    client: str | None = "127.0.0.1",
    host: str | None = "localhost:8000",
    kind: str = "websocket",
    server: str = "127.0.0.1",
    **headers: str,
) -> dict[str, Any]:
    """What a server says of a request."""
    named = {"host": host, **headers}
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items() if value is not None]
    return {
        "type": kind,
        "asgi": ASGI,
        "headers": pairs,
        "client": client if client is None else (client, 1234),
        "server": (server, 8000),
    }


def reach(authenticates: bool = False, **settings: Any) -> NetworkAccess:
    return NetworkAccess(Config(**settings), authenticates)


# Addresses and names.


@pytest.mark.parametrize("address", HERE)
def test_loopback_address_is_this_machine(address: str) -> None:
    assert is_loopback_address(address)
    assert reach().check(scope(address)) is None
    assert is_this_machine(scope(address))


@pytest.mark.parametrize("address", STRANGERS)
def test_client_without_a_loopback_ip_address_is_a_stranger(address: str | None) -> None:
    """A header may have set the text, where the server believes it; nor is a Unix socket's client known."""
    assert not is_loopback_address(address or "")
    refused = reach().check(scope(address))
    assert refused is not None
    assert (refused.status, refused.kind) == (403, "from another machine")
    assert "set auth, authenticate= or allow_anonymous" in refused.text
    assert not is_this_machine(scope(address))


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        ("localhost", "localhost"),
        ("LOCALHOST:8000", "localhost"),
        ("localhost.:8000", "localhost"),
        ("[::1]:8000", "::1"),
        ("10.0.0.7:8000", "10.0.0.7"),
        ("relay_1:80", "relay_1"),
        ("[::1]evil.example", ""),
        ("evil.example[::1]", ""),
        ("evil.example@localhost", ""),
        ("localhost:80:80", ""),
        ("::1", ""),
        ("localhost, evil.example", ""),
        *((f"localhost{mark}evil.example", "") for mark in "/#?\\ \t\n"),
        ("zürich.example", ""),
        ("", ""),
    ],
)
def test_host_is_read_without_its_port(authority: str, host: str) -> None:
    assert host_in(authority) == host


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        ("localhost", True),
        ("app.localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost.evil.example", False),
        ("notlocalhost", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.7", False),
        ("", False),
    ],
)
def test_names_of_this_machine_are_known(host: str, is_here: bool) -> None:
    assert is_loopback_host(host) is is_here


# Which host may be asked for.

NAMES = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "relay", "2130706433"]
ADDRESSES = ["10.1.2.3:8000", "[2001:db8::7]:8000", "127.0.0.1", "[::1]:8000", "203.0.113.9"]


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "settings", [{}, {"allow_anonymous": True}, {"allow_anonymous": True, "allowed_origins": "any"}]
)
def test_only_names_of_this_machine_pass_where_clients_are_not_authenticated(
    settings: dict[str, Any], kind: str
) -> None:
    """DNS rebinding: under a name that points here, any page of the web is of the same origin. It needs a name."""
    judge = reach(**settings)
    for host in (*NAMES, "", "localhost/evil.example", None):
        refused = judge.check(scope(host=host, kind=kind))
        assert refused is not None and (refused.status, refused.kind) == (403, "host not allowed"), host
    for host in (*ADDRESSES, "localhost", "localhost:8000", "app.localhost"):
        assert judge.check(scope(host=host, kind=kind)) is None, host


def test_refused_host_is_told_the_line_that_allows_it() -> None:
    refused = reach().check(scope(host="Relay.Example.org:8000"))
    assert refused is not None and 'allowed_hosts = ["relay.example.org"]' in refused.text


@pytest.mark.parametrize("host", [*NAMES, *ADDRESSES, None])
def test_any_name_passes_where_clients_are_authenticated(host: str | None) -> None:
    assert reach(authenticates=True).check(scope("192.0.2.1", host=host)) is None


@pytest.mark.parametrize("authenticates", [True, False])
def test_names_of_the_settings_pass_and_no_others(authenticates: bool) -> None:
    judge = reach(authenticates, allow_anonymous=True, allowed_hosts=["Relay.example.org", "*.wild.example"])
    for host in ("relay.example.org", "RELAY.example.org:8000", "a.wild.example", "a.b.wild.example:1", *ADDRESSES):
        assert judge.check(scope("192.0.2.1", host=host)) is None, host
    for host in ("example.org", "x.relay.example.org", "wild.example", "evilwild.example", "evil.example"):
        assert judge.check(scope("192.0.2.1", host=host)) is not None, host


@pytest.mark.parametrize("hosts", ["any", "*", ["*"], ["any"]])
def test_any_name_can_be_allowed(hosts: Any) -> None:
    judge = reach(allow_anonymous=True, allowed_hosts=hosts)
    assert all(judge.check(scope("192.0.2.1", host=host)) is None for host in (*NAMES, *ADDRESSES))


@pytest.mark.parametrize("authenticates", [True, False])
def test_two_host_headers_are_malformed(authenticates: bool) -> None:
    twice = scope()
    twice["headers"].append((b"host", b"localhost:8000"))
    refused = reach(authenticates).check(twice)
    assert refused is not None and refused.status == 400
    assert not is_this_machine(twice)


# Proxies.

FORWARDED = [
    "x_forwarded_for",
    "forwarded",
    "via",
    "x_real_ip",
    "x_forwarded_host",
    "x_forwarded_proto",
    "x_forwarded_port",
    "cf_connecting_ip",
    "true_client_ip",
    "x_client_ip",
]


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("header", FORWARDED)
def test_request_through_a_proxy_is_no_request_of_this_machine(header: str, kind: str) -> None:
    for value in ("203.0.113.9", "127.0.0.1", "testclient", ""):
        request = scope(kind=kind, **{header: value})
        refused = reach().check(request)
        assert refused is not None and refused.status == 403
        assert header.replace("_", "-") in refused.text
        assert not is_this_machine(request)
        assert reach(allow_anonymous=True).check(request) is None


@pytest.mark.parametrize(
    ("forwarded", "seen", "passes"),
    [
        ("127.0.0.2", "127.0.0.2", True),
        ("10.0.0.1, 127.0.0.2", "127.0.0.2", True),
        ("203.0.113.9, 127.0.0.2", "127.0.0.2", False),
        ("203.0.113.9", "203.0.113.9", False),
        ("testclient", "127.0.0.1", False),
        ("unix:", "127.0.0.1", False),
        ("unknown, 127.0.0.2", "127.0.0.2", False),
        ("", "127.0.0.1", False),
    ],
)
def test_trusted_proxy_must_name_an_address_of_this_machine(forwarded: str, seen: str, passes: bool) -> None:
    judge = reach(trusted_proxies=["127.0.0.1", "10.0.0.1"])
    came = scope(x_forwarded_for=forwarded)
    assert (judge.check(came, {**came, "client": (seen, 0)}) is None) is passes


# Pages of other servers on this machine.


def test_pages_of_this_machine_may_connect_where_all_is_on_it() -> None:
    assert reach().has_local_pages(scope())
    assert reach().has_local_pages(scope("::1", host="[::1]:8000", server="::1"))
    assert not reach().has_local_pages(scope("192.168.1.9"))
    assert not reach().has_local_pages(scope(host="10.0.0.7:8000"))
    assert not reach().has_local_pages(scope(host="relay.example.org"))
    assert not reach().has_local_pages(scope(server="192.168.1.5"))
    assert not reach().has_local_pages(scope(x_forwarded_for="127.0.0.1"))
    assert not reach(trusted_proxies=["10.0.0.1"]).has_local_pages(scope())
    assert not reach(host="0.0.0.0", allow_anonymous=True).has_local_pages(scope())
    assert not reach().has_local_pages({**scope(), "server": None})


# Tests without a server.


def test_test_client_is_known_by_what_no_header_can_take_away() -> None:
    """Its scope does not say which ASGI it speaks, as every server's does."""
    found: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    TestClient(app).get("/", headers={"x-forwarded-for": "testclient"})
    assert is_in_process(found[0]) and is_this_machine(found[0])
    assert reach().check(found[0]) is None
    assert not is_in_process({**found[0], "asgi": ASGI})
    assert not is_in_process({**found[0], "client": ("192.0.2.1", 1)})
