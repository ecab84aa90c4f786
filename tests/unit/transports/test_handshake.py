"""`relay.transports.handshake`: origin, subprotocol, token and version of an upgrade request."""

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.protocol.serializer import Version
from relay.transports.handshake import (
    HandshakeAccepted,
    HandshakeRejected,
    check,
    find_token,
    is_allowed_origin,
    token_from,
)

PREFIX = "base64url.bearer.phx."
Origins = str | tuple[str, ...]


def scope(
    query: str = "vsn=2.0.0",
    *,
    origin: str | None = None,
    host: str | None = "relay.example",
    subprotocols: list[str] | None = None,
) -> dict[str, Any]:
    """What an ASGI server says of an upgrade request; header names come in lower case."""
    named = ((b"host", host), (b"origin", origin))
    headers = [(name, value.encode("latin-1")) for name, value in named if value is not None]
    return {"type": "websocket", "query_string": query.encode(), "headers": headers, "subprotocols": subprotocols or []}


def accepted(result: HandshakeAccepted | HandshakeRejected) -> HandshakeAccepted:
    assert isinstance(result, HandshakeAccepted), result
    return result


def refused(result: HandshakeAccepted | HandshakeRejected) -> tuple[int, str]:
    assert isinstance(result, HandshakeRejected), result
    assert result.text
    return result.status, result.kind


# Version.


@pytest.mark.parametrize(
    ("query", "version"),
    [
        ("", Version.V1),
        ("token=x", Version.V1),
        ("vsn=1.0.0", Version.V1),
        ("vsn=1.0.5", Version.V1),
        ("vsn=2.0.0", Version.V2),
        ("vsn=2.0.9", Version.V2),
        ("a[b]=c&vsn=2.0.0", Version.V2),
        ("vsn=1.0.0&vsn=2.0.0", Version.V2),
        ("vsn=2%2E0%2E0", Version.V2),
        ("token=%ff&vsn=2.0.0", Version.V2),
    ],
)
def test_vsn_chooses_the_version(query: str, version: Version) -> None:
    """Absent means V1. Source: Phoenix 1.9, ``socket.ex: negotiate_serializer``."""
    assert accepted(check(scope(query), "same")) == HandshakeAccepted(version, None, None)


@pytest.mark.parametrize(
    "query",
    ["vsn=1.1.0", "vsn=2.1.0", "vsn=123.1.1", "vsn=x", "vsn=", "vsn", "vsn[]=2", "vsn[]=2.0.0", "vsn%5B%5D=2.0.0"],
)
def test_vsn_that_no_serializer_speaks_is_refused(query: str) -> None:
    assert refused(check(scope(query), "same")) == (403, "version")


def test_vsn_of_5000_digits_is_refused() -> None:
    assert refused(check(scope(f"vsn={'1' * 5000}.0.0"), "same")) == (403, "version")


# Origin.

LISTED = ("https://app.example", "https://other.example:8443", "//any.example", "//*.wild.example")


@pytest.mark.parametrize(
    ("origin", "host", "origins", "allowed"),
    [
        # Same host and port; TLS may end before the relay.
        ("http://relay.example", "relay.example", "same", True),
        ("https://relay.example", "relay.example", "same", True),
        ("http://relay.example:80", "relay.example", "same", True),
        ("http://relay.example", "relay.example:80", "same", True),
        ("https://relay.example:443", "relay.example", "same", True),
        ("http://relay.example:8000", "relay.example:8000", "same", True),
        ("HTTP://RELAY.example", "relay.EXAMPLE", "same", True),
        ("http://[::1]:8000", "[::1]:8000", "same", True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "same", True),
        ("http://other.example", "relay.example", "same", False),
        ("http://relay.example.evil.example", "relay.example", "same", False),
        ("http://evil.example/relay.example", "relay.example", "same", False),
        ("http://relay.example@evil.example", "relay.example", "same", False),
        ("http://relay.example:8001", "relay.example:8000", "same", False),
        ("http://relay.example", "relay.example:8000", "same", False),
        ("http://localhost:8000", "127.0.0.1:8000", "same", False),
        ("http://relay.example", "", "same", False),
        ("null", "relay.example", "same", False),
        ("", "relay.example", "same", False),
        ("file://", "relay.example", "same", False),
        ("relay.example", "relay.example", "same", False),
        ("http://relay.example:port", "relay.example", "same", False),
        ("http://relay.example:99999", "relay.example", "same", False),
        ("http://[::1", "relay.example", "same", False),
        ("http://relay.example", "relay.example:port", "same", False),
        # A list of patterns.
        ("https://app.example", "relay.example", LISTED, True),
        ("https://app.example:443", "relay.example", LISTED, True),
        ("http://app.example", "relay.example", LISTED, False),
        ("https://app.example:444", "relay.example", LISTED, False),
        ("https://other.example:8443", "relay.example", LISTED, True),
        ("https://other.example", "relay.example", LISTED, False),
        ("http://any.example", "relay.example", LISTED, True),
        ("https://any.example:1234", "relay.example", LISTED, True),
        ("https://sub.any.example", "relay.example", LISTED, False),
        ("https://a.wild.example", "relay.example", LISTED, True),
        ("http://a.b.wild.example:99", "relay.example", LISTED, True),
        ("https://wild.example", "relay.example", LISTED, False),
        ("https://evilwild.example", "relay.example", LISTED, False),
        ("https://a.wild.example.evil.example", "relay.example", LISTED, False),
        ("https://relay.example", "relay.example", LISTED, False),
        ("null", "relay.example", LISTED, False),
        ("https://app.example", "relay.example", (), False),
        # Any.
        ("https://anywhere.example", "relay.example", "any", True),
        ("null", "relay.example", "any", True),
        ("nonsense", "relay.example", "any", True),
    ],
)
def test_origin_is_allowed_or_not(origin: str, host: str, origins: Origins, allowed: bool) -> None:
    """Source: Phoenix 1.9, ``transport.ex: check_origin``, its forms ``:conn`` and list."""
    assert is_allowed_origin(origin, host, origins) is allowed
    result = check(scope(origin=origin, host=host), origins)
    if allowed:
        accepted(result)
    else:
        assert refused(result) == (403, "origin")


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:5173", True),
        ("https://localhost", True),
        ("http://127.0.0.1:3000", True),
        ("http://[::1]:3000", True),
        ("http://app.localhost:5173", True),
        ("http://localhost.evil.example:5173", False),
        ("http://evil.example", False),
        ("http://evil.example@localhost", False),
        ("http://192.168.1.5:5173", False),
        ("file://localhost", False),
        ("null", False),
        ("", False),
    ],
)
def test_pages_of_this_machine_may_connect_where_the_relay_is_for_it_alone(origin: str, allowed: bool) -> None:
    """A development server, as Vite's at http://localhost:5173."""
    request = scope(origin=origin, host="127.0.0.1:8000")
    assert isinstance(check(request, "same", has_local_pages=True), HandshakeAccepted) is allowed
    assert refused(check(request, "same")) == (403, "origin")
    assert refused(check(request, ("//app.example",), has_local_pages=True)) == (403, "origin")


@pytest.mark.parametrize(
    ("origin", "origins", "line"),
    [
        ("http://localhost:5173", "same", 'allowed_origins = ["same", "http://localhost:5173"]'),
        ("https://B.example", LISTED[:1], 'allowed_origins = ["https://app.example", "https://b.example"]'),
        ("https://b.example", ("same", "//a"), 'allowed_origins = ["same", "//a", "https://b.example"]'),
        ("null", "same", ""),
        ('http://a"]\nallow_anonymous = true', "same", ""),
        ("http://a b", "same", ""),
        ("javascript://x", "same", ""),
    ],
)
def test_refused_origin_comes_with_the_line_to_paste(origin: str, origins: Origins, line: str) -> None:
    result = check(scope(origin=origin), origins)
    assert isinstance(result, HandshakeRejected)
    assert result.hint == line


def test_same_can_stand_beside_others() -> None:
    origins = ("same", "//app.example")
    assert is_allowed_origin("http://relay.example:8000", "relay.example:8000", origins)
    assert is_allowed_origin("http://app.example", "relay.example:8000", origins)
    assert not is_allowed_origin("http://other.example", "relay.example:8000", origins)


@pytest.mark.parametrize("origins", ["same", "any", (), LISTED])
def test_request_without_origin_may_pass(origins: Origins) -> None:
    """No browser sends it: programs need not be protected from other sites' pages."""
    accepted(check(scope(), origins))


def test_request_without_host_has_no_same_origin() -> None:
    assert refused(check(scope(origin="http://relay.example", host=None), "same")) == (403, "origin")


@given(st.text(), st.text(), st.sampled_from(["same", LISTED]))
def test_any_origin_is_judged_without_a_fault(origin: str, host: str, origins: Origins) -> None:
    assert is_allowed_origin(origin, host, origins) in (True, False)


# Subprotocol and token.


def encoded(token: str, *, urlsafe: bool = False) -> str:
    encode = base64.urlsafe_b64encode if urlsafe else base64.b64encode
    return PREFIX + encode(token.encode()).decode().rstrip("=")


def test_phoenix_is_answered_where_it_was_offered() -> None:
    """Browsers fail the connection otherwise. Source: RFC 6455, section 4.1."""
    assert accepted(check(scope(subprotocols=["phoenix"]), "same")) == HandshakeAccepted(Version.V2, "phoenix", None)
    assert accepted(check(scope(subprotocols=["chat", "phoenix"]), "same")).subprotocol == "phoenix"
    assert accepted(check(scope(), "same")).subprotocol is None


def test_subprotocols_may_be_absent_from_the_scope() -> None:
    bare = scope()
    del bare["subprotocols"]
    assert accepted(check(bare, "same")).subprotocol is None


def test_other_subprotocols_are_refused() -> None:
    """Source: Phoenix 1.9, ``transport.ex: check_subprotocols``."""
    assert refused(check(scope(subprotocols=["chat"]), "same")) == (403, "subprotocol")
    assert refused(check(scope(subprotocols=[encoded("secret")]), "same")) == (403, "subprotocol")


@pytest.mark.parametrize("token", ["secret", "a", "ab", "abc", "", "ü☕", "??>>~~", "x" * 4000])
@pytest.mark.parametrize("urlsafe", [True, False])
def test_auth_token_is_read_in_either_alphabet(token: str, urlsafe: bool) -> None:
    """Source: phoenix.js 1.8, ``socket.js: authToken``: ``btoa`` with its padding taken off."""
    shake = accepted(check(scope(subprotocols=["phoenix", encoded(token, urlsafe=urlsafe)]), "same"))
    assert (shake.subprotocol, shake.auth_token) == ("phoenix", token)


def test_alphabets_of_this_test_differ() -> None:
    assert {"+", "/"} & set(encoded("??>>~~")) and {"-", "_"} & set(encoded("??>>~~", urlsafe=True))


@given(st.text(), st.booleans())
def test_auth_token_round_trips(token: str, urlsafe: bool) -> None:
    assert token_from(["phoenix", encoded(token, urlsafe=urlsafe)]) == token


def test_padded_token_is_read_too() -> None:
    assert token_from([f"{PREFIX}YQ=="]) == "a"


def test_two_tokens_count_as_none() -> None:
    """Source: Phoenix 1.8, ``websocket.ex``: only exactly one prefixed entry."""
    assert token_from(["phoenix", encoded("a"), encoded("b")]) is None
    assert accepted(check(scope(subprotocols=["phoenix", encoded("a"), encoded("b")]), "same")).auth_token is None


@pytest.mark.parametrize("text", ["a", "!!!!", "abc d", "YQ=Y", "ü", "YWJj%", "/w", "gICA"])
def test_token_that_is_not_base64_of_utf8_is_the_clients_fault(text: str) -> None:
    """A 4xx, never a 500; and what was sent is not repeated, it is a secret."""
    with pytest.raises(ValueError):
        token_from([PREFIX + text])
    result = check(scope(subprotocols=["phoenix", PREFIX + text]), "same")
    assert refused(result) == (400, "token encoding")
    assert isinstance(result, HandshakeRejected)
    assert text not in result.text or len(text) < 3


def test_checks_come_in_phoenixs_order() -> None:
    """Source: Phoenix 1.9, ``websocket.ex``: origin, then subprotocol and token, then version."""
    everything_wrong = scope("vsn=9", origin="http://evil.example", subprotocols=["chat"])
    assert refused(check(everything_wrong, "same"))[1] == "origin"
    assert refused(check(scope("vsn=9", subprotocols=["chat"]), "same"))[1] == "subprotocol"
    assert refused(check(scope("vsn=9", subprotocols=["phoenix", f"{PREFIX}!"]), "same"))[1] == "token encoding"
    assert refused(check(scope("vsn=9", subprotocols=["phoenix"]), "same"))[1] == "version"


@pytest.mark.parametrize(
    ("query", "headers", "auth_token", "found"),
    [
        ("", {}, None, None),
        ("token=b&userToken=d", {"authorization": "Bearer c"}, "a", "a"),
        ("token=b&userToken=d", {"authorization": "Bearer c"}, None, "b"),
        ("token=b&userToken=d", {"authorization": "Bearer c"}, "", "b"),
        ("token=&userToken=d", {"authorization": "bearer  c "}, None, "c"),
        ("userToken=d", {"authorization": "Basic c"}, None, "d"),
        ("userToken=d", {"authorization": "Bearer"}, None, "d"),
        ("token=b1&token=b2", {}, None, "b2"),
        ("token=%C3%A9%00", {}, None, "é\0"),
        ("Token=b", {}, None, None),
    ],
)
def test_first_token_that_is_there_counts(
    query: str, headers: dict[str, str], auth_token: str | None, found: str | None
) -> None:
    scope = {
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    assert find_token(scope, auth_token) == found
