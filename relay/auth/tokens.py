"""Tokens (JWT): checking them, and making them, with static keys and those of a JWKS address.

Owns which keys there are at a time; must not know what a token's claims allow, nor sockets.

Each key is for one algorithm, which follows from what it is: a secret for HS256, an RSA key for RS256, a key on P-256
for ES256. So no token can have a public key taken for a secret, and ``none`` is no algorithm here.

Source: RFC 7515, 7517, 7519; RFC 8725 (best current practices), sections 3.1 and 3.2.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jwt
from jwt.exceptions import PyJWTError

from relay.auth.jwks import Fetch, PublishedKeys
from relay.auth.keys import Key, read_key
from relay.config_sections import AuthConfig
from relay.errors import AuthenticationError, ConfigError, Reason
from relay.log import RateLimitedLoggers

_TOKEN_MAX_BYTES = 16_384
_LAST_SECOND = 1e15
"""Seconds since 1970, in 31 million years: what is past it is no time, and neither is NaN."""
_FAULTS = (PyJWTError, ValueError, TypeError, OverflowError, RecursionError)
"""What PyJWT raises for an invalid token; some of it escapes from the JSON inside."""


def load_keys(config: AuthConfig) -> tuple[Key, ...]:
    """Read the static keys, from files where the settings say so. Raises ConfigError, which repeats no key."""
    keys = tuple(read_key(entry.key, entry.kid, f"auth.keys.{at}") for at, entry in enumerate(config.keys))
    for at, key in enumerate(keys):
        if key.algorithm not in config.algorithms:
            raise ConfigError(f"auth.keys.{at}: a key for {key.algorithm}, which is not among auth.algorithms")
    if config.tangram and not any(key.algorithm == "HS256" for key in keys):
        raise ConfigError("auth.tangram: its tokens are signed with a secret; expected one among auth.keys")
    return keys


def sign(claims: Mapping[str, Any], key: Key) -> str:
    """Make a token. Raises ConfigError where the key can only check them."""
    if key.private is None:
        raise ConfigError("a public key signs nothing; expected a secret or a private key")
    return jwt.encode(dict(claims), key.private, key.algorithm, {"kid": key.kid} if key.kid else None)


class TokenVerifier:
    """Checks tokens.

    Args: keys: the static ones.
          fetch: gets what is at ``jwks_url``; for tests.
          clock: monotonic seconds.
          loggers: the relay's, where a fetch that fails is logged.
    """

    def __init__(
        self,
        config: AuthConfig,
        keys: tuple[Key, ...],
        fetch: Fetch | None = None,
        clock: Callable[[], float] = time.monotonic,
        loggers: RateLimitedLoggers | None = None,
    ) -> None:
        self._config = config
        self._keys = keys
        log = (loggers or RateLimitedLoggers()).get("relay.auth")
        self._published = PublishedKeys(config, fetch, clock, log) if config.jwks_url else None

    def start(self) -> None:
        """Fetch published keys before the first client comes."""
        if self._published is not None:
            self._published.start()

    async def close(self) -> None:
        """End a fetch that is under way."""
        if self._published is not None:
            await self._published.close()

    async def verify(self, token: str) -> dict[str, Any]:
        """Check a token's signature, times, issuer and audience; returns its claims. Raises AuthenticationError."""
        if len(token) > _TOKEN_MAX_BYTES:
            raise AuthenticationError(401, "token", f"expected a token of at most {_TOKEN_MAX_BYTES} bytes")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as error:
            text = 'the token\'s header "kid" is no text' if "Key ID" in str(error) else "the token is no JWT"
            raise AuthenticationError(401, "token", text) from None
        except _FAULTS:
            raise AuthenticationError(401, "token", "the token is no JWT") from None
        algorithm, kid = header.get("alg"), header.get("kid") or ""
        if algorithm not in self._config.algorithms:
            allowed = ", ".join(self._config.algorithms)
            raise AuthenticationError(401, "token algorithm", f"expected a token signed with one of {allowed}")
        keys = _fitting(self._keys, algorithm, kid)
        if self._published is not None and not any(key.kid == kid for key in keys if kid):
            keys += _fitting(await self._published.keys(kid), algorithm, kid)
            if not keys and not self._published.are_known:
                raise AuthenticationError(
                    503, "no keys", "the keys of tokens cannot be fetched; try again", Reason.AUTH_UNAVAILABLE
                )
        for key in keys:
            try:
                return self._decode(token, key)
            except jwt.InvalidSignatureError:
                continue
        raise AuthenticationError(401, "token signature", "the token is not signed with a key that is known here")

    def _decode(self, token: str, key: Key) -> dict[str, Any]:
        config = self._config
        check = partial(jwt.decode, token, key.public, algorithms=[key.algorithm])
        fault: Exception | None = None
        try:
            claims: dict[str, Any] = check(
                issuer=config.issuer or None,
                audience=config.audience or None,
                leeway=config.leeway_s,
                options={"require": ["exp"] if config.require_expiry else []},
            )
        except jwt.InvalidSignatureError:
            raise
        except _FAULTS as error:
            claims, fault = _read_claims(check), error
        _check_types(claims)
        if fault is not None:
            raise self._refusal(fault)
        return claims

    def _refusal(self, error: Exception) -> AuthenticationError:
        """What is wrong with a token that is signed well, and whose claims have the right types."""
        if isinstance(error, jwt.ExpiredSignatureError):
            return AuthenticationError(401, "token expired", "the token has expired", Reason.TOKEN_EXPIRED)
        if isinstance(error, jwt.InvalidIssuerError):
            return AuthenticationError(401, "token issuer", "the token is of another issuer")
        if isinstance(error, jwt.InvalidAudienceError) and not self._config.audience:
            text = 'the token is for another audience: it has a claim "aud", and auth.audience is not set here'
            return AuthenticationError(401, "token audience", text)
        if isinstance(error, jwt.InvalidAudienceError):
            return AuthenticationError(401, "token audience", "the token is for another audience")
        if isinstance(error, jwt.ImmatureSignatureError):
            claim = "iat" if "(iat)" in str(error) else "nbf"
            text = f'the token is not valid yet: its claim "{claim}" lies in the future; do the clocks agree?'
            return AuthenticationError(401, "token time", text)
        if isinstance(error, jwt.MissingRequiredClaimError):
            return AuthenticationError(401, "token claims", f"the token lacks the claim {error.claim!r}")
        return AuthenticationError(401, "token claims", "the token's claims are malformed")


def _read_claims(check: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The claims of a token of which the signature is good and something else is not."""
    try:
        return check(options=_SIGNATURE_ALONE)
    except jwt.InvalidSignatureError:
        raise
    except _FAULTS:
        raise AuthenticationError(401, "token claims", "the token's claims are no JSON object") from None


_SIGNATURE_ALONE: Any = {f"verify_{claim}": False for claim in ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")}

_TYPES = {
    "sub": ("text", "4.1.2"),
    "iss": ("text", "4.1.1"),
    "jti": ("text", "4.1.7"),
    "aud": ("text or a list of texts", "4.1.3"),
    "exp": ("a number of seconds", "4.1.4"),
    "nbf": ("a number of seconds", "4.1.5"),
    "iat": ("a number of seconds", "4.1.6"),
}
"""What RFC 7519 says of its own claims, and where."""


def _check_types(claims: Mapping[str, Any]) -> None:
    """Check the types of registered claims. Raises AuthenticationError, which names the claim and no value."""
    for claim, (expected, section) in _TYPES.items():
        if claim in claims and not _has_type(claims[claim], expected):
            text = f'the token\'s claim "{claim}": expected {expected}, got {_type_of(claims[claim])}'
            raise AuthenticationError(401, "token claims", f"{text} (RFC 7519, section {section})")


def _has_type(value: object, expected: str) -> bool:
    if expected == "a number of seconds":
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LAST_SECOND
    if isinstance(value, list):
        return expected != "text" and all(isinstance(one, str) for one in value)
    return isinstance(value, str)


def _type_of(value: object) -> str:
    """The word for a value's type in JSON."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number" if abs(value) < _LAST_SECOND else "a number out of range"
    words = {str: "text", list: "a list", dict: "an object", type(None): "null"}
    return words.get(type(value), type(value).__name__)


def _fitting(keys: Iterable[Key], algorithm: str, kid: str) -> tuple[Key, ...]:
    """Those a token may be signed with; a key or a token without a ``kid`` fits any."""
    return tuple(key for key in keys if key.algorithm == algorithm and (not kid or not key.kid or key.kid == kid))
