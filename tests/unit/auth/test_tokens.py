"""`relay.auth.tokens`: keys, checking tokens against them, and the keys of a JWKS address."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest

from relay.auth.jwks import parse_jwks
from relay.auth.keys import Key, read_key
from relay.auth.tokens import TokenVerifier, load_keys, sign
from relay.config_sections import AuthConfig
from relay.errors import AuthenticationError, ConfigError, Reason
from tests.support.keys import (
    EC_PRIVATE,
    EC_PUBLIC,
    OTHER_SECRET,
    P384_PRIVATE,
    P384_PUBLIC,
    RSA_PRIVATE,
    RSA_PUBLIC,
    SECRET,
    b64,
    jwk,
    token,
    unsigned,
)


def verifier(*keys: Any, **settings: Any) -> TokenVerifier:
    config = AuthConfig(keys=keys, **settings)
    return TokenVerifier(config, load_keys(config))


async def refusal(verifier: TokenVerifier, token: str) -> AuthenticationError:
    with pytest.raises(AuthenticationError) as caught:
        await verifier.verify(token)
    assert token not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value


# Keys.


@pytest.mark.parametrize(
    ("text", "algorithm", "can_sign"),
    [
        (SECRET, "HS256", True),
        (RSA_PUBLIC, "RS256", False),
        (RSA_PRIVATE, "RS256", True),
        (EC_PUBLIC, "ES256", False),
        (f"\n {EC_PRIVATE}\n", "ES256", True),
    ],
)
def test_key_is_for_one_algorithm_that_follows_from_what_it_is(
    text: str, algorithm: str, can_sign: bool, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    path.write_text(text + "\n")
    for key in (read_key(text, "k", "here"), read_key(f"file:{path}", "k", "here")):
        assert (key.kid, key.algorithm, key.private is not None) == ("k", algorithm, can_sign)
        assert text.strip()[30:60] not in repr(key) and SECRET not in repr(key)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (P384_PUBLIC, "P-256"),
        (P384_PRIVATE, "P-256"),
        ("-----BEGIN PUBLIC KEY-----\nhunter2\n-----END PUBLIC KEY-----", "PEM"),
        ("-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----", "PEM"),
        ("-----BEGIN CERTIFICATE-----\nhunter2\n-----END CERTIFICATE-----", "PEM"),
        ("   ", "empty"),
        ("file:/nowhere/hunter", "/nowhere/hunter: cannot be read"),
    ],
)
def test_key_that_is_none_stops_the_start_without_being_shown(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        load_keys(AuthConfig(keys=(SECRET, text)))
    assert str(caught.value).startswith("auth.keys.1: ")
    assert "hunter2" not in str(caught.value)


def test_key_for_an_algorithm_that_is_not_accepted_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"auth\.keys\.0: a key for HS256"):
        verifier(SECRET, algorithms=["RS256"])


def test_tangrams_tokens_need_a_secret() -> None:
    with pytest.raises(ConfigError, match=r"auth\.tangram: .* a secret"):
        verifier(RSA_PUBLIC, tangram=True)


@pytest.mark.parametrize("text", [SECRET, RSA_PRIVATE, EC_PRIVATE])
async def test_token_that_is_made_here_is_accepted_here(text: str) -> None:
    made = sign({"sub": "alice", "exp": time.time() + 60}, read_key(text, "k", "here"))
    assert (await verifier(text).verify(made))["sub"] == "alice"
    assert jwt.get_unverified_header(made)["kid"] == "k"


def test_public_key_signs_nothing() -> None:
    with pytest.raises(ConfigError, match="public key"):
        sign({}, read_key(RSA_PUBLIC, "", "here"))


# Checking.


@pytest.mark.parametrize(
    ("key", "private", "algorithm"),
    [(SECRET, SECRET, "HS256"), (RSA_PUBLIC, RSA_PRIVATE, "RS256"), (EC_PUBLIC, EC_PRIVATE, "ES256")],
)
async def test_token_is_accepted_under_each_algorithm(key: str, private: str, algorithm: str) -> None:
    claims = await verifier(key).verify(token(key=private, algorithm=algorithm))
    assert claims["sub"] == "alice"


async def test_any_of_several_keys_will_do_while_one_replaces_another() -> None:
    both = verifier(SECRET, OTHER_SECRET, RSA_PUBLIC)
    for key in (SECRET, OTHER_SECRET):
        await both.verify(token(key=key))
    assert (await refusal(verifier(OTHER_SECRET), token())).kind == "token signature"


async def test_key_with_a_name_is_for_tokens_that_name_it_or_none() -> None:
    named = verifier({"key": SECRET, "kid": "old"}, {"key": OTHER_SECRET, "kid": "new"})
    await named.verify(token(kid="old"))
    await named.verify(token(key=OTHER_SECRET, kid="new"))
    await named.verify(token())
    assert (await refusal(named, token(kid="new"))).kind == "token signature"
    assert (await refusal(named, token(kid="unknown"))).kind == "token signature"


async def test_token_without_a_signature_is_refused() -> None:
    """Source: RFC 8725, section 3.2: ``none`` in any spelling."""
    for name in ("none", "None", "NONE", "nOnE", ""):
        claims = {"sub": "alice", "exp": time.time() + 60}
        assert (await refusal(verifier(SECRET, RSA_PUBLIC), unsigned({"alg": name}, claims))).kind in (
            "token algorithm",
            "token",
        )


@pytest.mark.parametrize("public", [RSA_PUBLIC, EC_PUBLIC])
async def test_public_key_is_never_taken_for_a_secret(public: str) -> None:
    """Source: RFC 8725, section 2.1: whoever knows the public key signs with it as if it were a secret."""
    head, body = b64(b'{"alg":"HS256"}'), b64(json.dumps({"sub": "mallory", "exp": time.time() + 60}).encode())
    for key in (public, public.strip(), public.strip() + "\n"):
        signature = hmac.new(key.encode(), f"{head}.{body}".encode(), hashlib.sha256).digest()
        forged = f"{head}.{body}.{b64(signature)}"
        assert (await refusal(verifier(public), forged)).kind == "token signature"
        assert (await refusal(verifier(public, SECRET), forged)).kind == "token signature"


async def test_algorithm_that_is_not_accepted_is_refused() -> None:
    only = verifier(RSA_PUBLIC, algorithms=["RS256"])
    assert (await refusal(only, token())).kind == "token algorithm"
    made = token(key=SECRET * 2, algorithm="HS512")
    assert (await refusal(verifier(SECRET), made)).kind == "token algorithm"


async def test_times_of_a_token_count_with_leeway() -> None:
    checked = verifier(SECRET, leeway_s=10)
    await checked.verify(token(ttl_s=-5))
    expired = await refusal(checked, token(ttl_s=-15))
    assert (expired.status, expired.kind, expired.reason) == (401, "token expired", Reason.TOKEN_EXPIRED)
    await checked.verify(token(nbf=time.time() + 5))
    assert (await refusal(checked, token(nbf=time.time() + 60))).kind == "token time"
    assert (await refusal(checked, token(iat=time.time() + 60))).kind == "token time"


async def test_token_without_expiry_is_refused_unless_that_is_allowed() -> None:
    assert "'exp'" in str(await refusal(verifier(SECRET), token(ttl_s=None)))
    await verifier(SECRET, require_expiry=False).verify(token(ttl_s=None))


async def test_issuer_counts_where_it_is_set() -> None:
    await verifier(SECRET).verify(token(iss="https://anybody"))
    checked = verifier(SECRET, issuer="https://login")
    await checked.verify(token(iss="https://login"))
    assert (await refusal(checked, token(iss="https://other"))).kind == "token issuer"
    assert (await refusal(checked, token())).kind == "token claims"


async def test_audience_counts_and_a_token_for_somebody_else_is_refused() -> None:
    """Source: RFC 7519, section 4.1.3: who is not among the audience must reject the token."""
    assert (await refusal(verifier(SECRET), token(aud="billing"))).kind == "token audience"
    checked = verifier(SECRET, audience=["relay", "live"])
    await checked.verify(token(aud="live"))
    await checked.verify(token(aud=["billing", "relay"]))
    assert (await refusal(checked, token(aud="billing"))).kind == "token audience"
    assert (await refusal(checked, token())).kind == "token claims"


def signed(body: bytes, head: bytes = b'{"alg":"HS256"}') -> str:
    text = f"{b64(head)}.{b64(body)}"
    return f"{text}.{b64(hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).digest())}"


@pytest.mark.parametrize(
    "made",
    [
        "",
        ".",
        "..",
        "a.b.c",
        "hunter2",
        "é.é.é",
        "\x00",
        signed(b"[]"),
        signed(b"7"),
        signed(b"\xff"),
        signed(b'{"exp":"never"}'),
        signed(b'{"exp":Infinity}'),
        signed(b'{"exp":NaN}'),
        signed(b'{"exp":1e400}'),
        signed(b'{"exp":[9e9]}'),
        signed(b'{"exp":9e9,"sub":7}'),
        signed(b"[" * 5_000),
        signed(b"{}", head=b"[" * 5_000),
        signed(b"{}", head=b'{"alg":["HS256"]}'),
        signed(b"{}", head=b'{"alg":{"a":1}}'),
        signed(b"{}", head=b'{"alg":"HS256","kid":7}'),
        signed(b"{}", head=b'{"alg":"HS256","crit":["x"]}'),
        "x" * 20_000,
    ],
)
async def test_token_that_is_malformed_is_refused_and_nothing_is_raised(made: str) -> None:
    error = await refusal(verifier(SECRET, RSA_PUBLIC), made) if made else None
    if error is None:
        with pytest.raises(AuthenticationError) as caught:
            await verifier(SECRET).verify(made)
        error = caught.value
    assert error.status == 401


@pytest.mark.parametrize(
    ("body", "claim", "expected", "came"),
    [
        (b'{"sub":42}', "sub", "text", "a number"),
        (b'{"sub":null}', "sub", "text", "null"),
        (b'{"sub":["a"]}', "sub", "text", "a list"),
        (b'{"sub":{"a":1}}', "sub", "text", "an object"),
        (b'{"sub":true}', "sub", "text", "true or false"),
        (b'{"iss":1}', "iss", "text", "a number"),
        (b'{"jti":1}', "jti", "text", "a number"),
        (b'{"aud":1}', "aud", "text or a list of texts", "a number"),
        (b'{"aud":["relay",1]}', "aud", "text or a list of texts", "a list"),
        (b'{"aud":{"a":1}}', "aud", "text or a list of texts", "an object"),
        (b'{"exp":"123"}', "exp", "a number of seconds", "text"),
        (b'{"exp":"9999999999"}', "exp", "a number of seconds", "text"),
        (b'{"exp":true}', "exp", "a number of seconds", "true or false"),
        (b'{"exp":1e400}', "exp", "a number of seconds", "a number out of range"),
        (b'{"exp":NaN}', "exp", "a number of seconds", "a number out of range"),
        (b'{"nbf":"2026-01-01"}', "nbf", "a number of seconds", "text"),
        (b'{"nbf":[1]}', "nbf", "a number of seconds", "a list"),
        (b'{"iat":"now"}', "iat", "a number of seconds", "text"),
        (b'{"iat":null}', "iat", "a number of seconds", "null"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"audience": ["relay"], "issuer": "us"}])
async def test_claim_of_the_wrong_type_is_named_with_what_came(
    body: bytes, claim: str, expected: str, came: str, settings: dict[str, Any]
) -> None:
    """Source: RFC 7519, section 4.1: the types of registered claims."""
    rest = {"exp": 9_999_999_999, "iss": "us"} | ({"aud": "relay"} if settings else {})
    rest = {name: value for name, value in rest.items() if name != claim}
    made = signed(body[:-1] + b"," + json.dumps(rest).encode()[1:])
    error = await refusal(verifier(SECRET, **settings), made)
    assert (error.status, error.kind) == (401, "token claims")
    assert str(error).startswith(
        f'the token\'s claim "{claim}": expected {expected}, got {came} (RFC 7519, section 4.1.'
    )


async def test_type_of_a_claim_is_told_to_the_signer_alone() -> None:
    made = token(key=OTHER_SECRET, jti=7)
    assert (await refusal(verifier(SECRET), made)).kind == "token signature"


async def test_refusal_names_the_claim_that_lies_in_the_future_and_a_name_that_is_no_text() -> None:
    later: dict[str, Any] = {"iat": token(iat=time.time() + 3600), "nbf": token(nbf=time.time() + 3600)}
    for claim, made in later.items():
        error = await refusal(verifier(SECRET), made)
        assert f'"{claim}" lies in the future' in str(error)
    assert "auth.audience is not set" in str(await refusal(verifier(SECRET), token(aud="relay")))
    assert '"kid"' in str(await refusal(verifier(SECRET), signed(b"{}", head=b'{"alg":"HS256","kid":7}')))


# Published keys.


class Published:
    """A JWKS address, and a clock."""

    def __init__(self, *keys: dict[str, Any], **settings: Any) -> None:
        self.keys = list(keys)
        self.fetches = 0
        self.now = 1000.0
        self.fault: Exception | None = None
        self.gate: asyncio.Event | None = None
        config = AuthConfig(jwks_url="https://login.example.org/jwks", **settings)
        fetch: Callable[[], Awaitable[bytes]] = self._fetch
        self.verifier = TokenVerifier(config, load_keys(config), fetch, lambda: self.now)

    async def _fetch(self) -> bytes:
        self.fetches += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        return json.dumps({"keys": self.keys}).encode()

    async def accepts(self, kid: str | None = "a", key: str = RSA_PRIVATE, algorithm: str = "RS256") -> bool:
        try:
            await self.verifier.verify(token(key=key, algorithm=algorithm, kid=kid))
        except AuthenticationError:
            return False
        return True


async def test_published_keys_are_fetched_once_and_kept() -> None:
    published = Published(jwk(RSA_PUBLIC, "a"), jwk(EC_PUBLIC, "b"))
    for _ in range(3):
        assert await published.accepts()
        assert await published.accepts("b", EC_PRIVATE, "ES256")
        assert await published.accepts(None)
    assert published.fetches == 1
    published.now += 301
    assert await published.accepts()
    assert published.fetches == 2


async def test_unknown_kid_makes_the_keys_be_fetched_anew_but_not_at_every_token() -> None:
    published = Published(jwk(RSA_PUBLIC, "a"))
    assert await published.accepts()
    published.keys = [jwk(EC_PUBLIC, "b")]
    for _ in range(5):
        assert not await published.accepts("b", EC_PRIVATE, "ES256")
    assert published.fetches == 1, "the first fetch is not long enough ago"
    published.now += 10
    assert await published.accepts("b", EC_PRIVATE, "ES256")
    assert not await published.accepts("a"), "it has been rolled over"
    for _ in range(5):
        assert not await published.accepts("made up")
    assert published.fetches == 2


async def test_many_tokens_wait_for_one_fetch_and_the_loop_goes_on() -> None:
    published = Published(jwk(RSA_PUBLIC, "a"))
    published.gate = asyncio.Event()
    waiting = [asyncio.create_task(published.accepts()) for _ in range(20)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    published.gate.set()
    assert all(await asyncio.gather(*waiting))
    assert published.fetches == 1


async def test_cached_keys_serve_on_while_the_address_is_down(caplog: pytest.LogCaptureFixture) -> None:
    published = Published(jwk(RSA_PUBLIC, "a"))
    assert await published.accepts()
    published.fault = OSError("connection to https://user:hunter2@login refused")
    published.now += 301
    with caplog.at_level(logging.WARNING):
        assert await published.accepts()
    assert published.fetches == 2
    (record,) = [record for record in caplog.records if record.name == "relay.auth"]
    assert "those known serve on" in record.getMessage() and "hunter2" not in record.getMessage()
    # A second look does not wait for an address that does not answer.
    published.now += 11
    published.gate = asyncio.Event()
    assert await published.accepts()
    await asyncio.wait_for(published.verifier.close(), 5)


async def test_without_any_key_a_token_is_answered_503_until_they_can_be_fetched() -> None:
    published = Published(jwk(RSA_PUBLIC, "a"))
    published.fault = TimeoutError()
    error = await refusal(published.verifier, token(key=RSA_PRIVATE, algorithm="RS256", kid="a"))
    assert (error.status, error.kind, error.reason) == (503, "no keys", Reason.AUTH_UNAVAILABLE)
    published.fault = None
    published.now += 10
    assert await published.accepts()


async def test_static_key_of_that_name_needs_no_fetch() -> None:
    published = Published(keys=[{"key": SECRET, "kid": "s"}])
    await published.verifier.verify(token(kid="s"))
    assert published.fetches == 0


async def test_fetch_under_way_is_ended_with_the_relay() -> None:
    published = Published()
    published.gate = asyncio.Event()
    published.verifier.start()
    await asyncio.sleep(0)
    assert published.fetches == 1
    await published.verifier.close()


def test_key_set_gives_its_public_keys_for_signatures() -> None:
    entries = [
        jwk(RSA_PUBLIC, "rsa", use="sig", alg="RS256"),
        jwk(EC_PUBLIC, None),
        jwk(RSA_PUBLIC, "encrypts", use="enc"),
        jwk(RSA_PUBLIC, "pss", alg="PS256"),
        jwk(P384_PUBLIC, "p384"),
        {"kty": "oct", "k": b64(SECRET.encode()), "kid": "secret", "alg": "HS256"},
        {"kty": "RSA", "n": "!", "e": "AQAB"},
        {"kty": "OKP", "crv": "Ed25519", "x": b64(bytes(32))},
        "no key",
    ]
    keys = parse_jwks(json.dumps({"keys": entries}).encode())
    assert [(key.kid, key.algorithm, key.private) for key in keys] == [("rsa", "RS256", None), ("", "ES256", None)]


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"keys":7}', b'{"keys":[]}', b'{"keys":[{}]}', b"[" * 100_000])
def test_what_is_no_key_set_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="key"):
        parse_jwks(data)


def test_key_shows_nothing_of_itself() -> None:
    assert repr(Key("k", "HS256", b"hunter2", b"hunter2")) == "Key('k', HS256)"
