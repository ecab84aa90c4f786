"""Tokens (JWT): checking them, and making them, with static keys and those of a JWKS address.

Owns which keys there are at a time; must not know what a token's claims allow, nor sockets.

Each key is for one algorithm, which follows from what it is: a secret for HS256, an RSA key for RS256, a key on P-256
for ES256. So no token can have a public key taken for a secret, and ``none`` is no algorithm here.

Source: RFC 7515, 7517, 7519; RFC 8725 (best current practices), sections 3.1 and 3.2.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx2 as httpx
import jwt
import msgspec
from jwt.exceptions import PyJWTError

from relay import __version__
from relay.addresses import is_this_machine, origin_of
from relay.auth_config import AuthConfig
from relay.errors import ConfigError, NotAdmitted, Reason
from relay.keys import Key, key_of_jwk, read_key
from relay.logs import RateLimitedLogger, RateLimitedLoggers

_TOKEN_MAX_BYTES = 16_384
_JWKS_MAX_BYTES = 1_048_576
_LAST_SECOND = 1e15
"""Seconds since 1970, in 31 million years: what is past it is no time, and neither is NaN."""
_FETCH_TIMEOUT_S = 5.0
_TIMEOUT = httpx.Timeout(_FETCH_TIMEOUT_S)
_FAULTS = (PyJWTError, ValueError, TypeError, OverflowError, RecursionError)
"""What PyJWT raises for a token that is none; some of it escapes from the JSON inside."""

Fetch = Callable[[], Awaitable[bytes]]


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


class Verifier:
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
        self._published = _PublishedKeys(config, fetch, clock, log) if config.jwks_url else None

    def start(self) -> None:
        """Fetch published keys before the first client comes."""
        if self._published is not None:
            self._published.start()

    async def close(self) -> None:
        """End a fetch that is under way."""
        if self._published is not None:
            await self._published.close()

    async def verify(self, token: str) -> dict[str, Any]:
        """Check a token's signature, times, issuer and audience; returns its claims. Raises NotAdmitted."""
        if len(token) > _TOKEN_MAX_BYTES:
            raise NotAdmitted(401, "token", f"expected a token of at most {_TOKEN_MAX_BYTES} bytes")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as error:
            text = 'the token\'s header "kid" is no text' if "Key ID" in str(error) else "the token is no JWT"
            raise NotAdmitted(401, "token", text) from None
        except _FAULTS:
            raise NotAdmitted(401, "token", "the token is no JWT") from None
        algorithm, kid = header.get("alg"), header.get("kid") or ""
        if algorithm not in self._config.algorithms:
            allowed = ", ".join(self._config.algorithms)
            raise NotAdmitted(401, "token algorithm", f"expected a token signed with one of {allowed}")
        keys = _fitting(self._keys, algorithm, kid)
        if self._published is not None and not any(key.kid == kid for key in keys if kid):
            keys += _fitting(await self._published.keys(kid), algorithm, kid)
            if not keys and not self._published.are_known:
                raise NotAdmitted(
                    503, "no keys", "the keys of tokens cannot be fetched; try again", Reason.AUTH_UNAVAILABLE
                )
        for key in keys:
            try:
                return self._decode(token, key)
            except jwt.InvalidSignatureError:
                continue
        raise NotAdmitted(401, "token signature", "the token is not signed with a key that is known here")

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

    def _refusal(self, error: Exception) -> NotAdmitted:
        """What is wrong with a token that is signed well, and whose claims have the right types."""
        if isinstance(error, jwt.ExpiredSignatureError):
            return NotAdmitted(401, "token expired", "the token has expired", Reason.TOKEN_EXPIRED)
        if isinstance(error, jwt.InvalidIssuerError):
            return NotAdmitted(401, "token issuer", "the token is of another issuer")
        if isinstance(error, jwt.InvalidAudienceError) and not self._config.audience:
            text = 'the token is for another audience: it has a claim "aud", and auth.audience is not set here'
            return NotAdmitted(401, "token audience", text)
        if isinstance(error, jwt.InvalidAudienceError):
            return NotAdmitted(401, "token audience", "the token is for another audience")
        if isinstance(error, jwt.ImmatureSignatureError):
            claim = "iat" if "(iat)" in str(error) else "nbf"
            text = f'the token is not valid yet: its claim "{claim}" lies in the future; do the clocks agree?'
            return NotAdmitted(401, "token time", text)
        if isinstance(error, jwt.MissingRequiredClaimError):
            return NotAdmitted(401, "token claims", f"the token lacks the claim {error.claim!r}")
        return NotAdmitted(401, "token claims", "the token's claims are malformed")


def _read_claims(check: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The claims of a token of which the signature is good and something else is not."""
    try:
        return check(options=_SIGNATURE_ALONE)
    except jwt.InvalidSignatureError:
        raise
    except _FAULTS:
        raise NotAdmitted(401, "token claims", "the token's claims are no JSON object") from None


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
    """Check the types of registered claims. Raises NotAdmitted, which names the claim and no value."""
    for claim, (expected, section) in _TYPES.items():
        if claim in claims and not _has_type(claims[claim], expected):
            text = f'the token\'s claim "{claim}": expected {expected}, got {_type_of(claims[claim])}'
            raise NotAdmitted(401, "token claims", f"{text} (RFC 7519, section {section})")


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


class _PublishedKeys:
    """The keys at ``jwks_url``, fetched when they are needed, by one task at a time.

    While the address does not answer, the keys that are known serve on.
    """

    def __init__(
        self, config: AuthConfig, fetch: Fetch | None, clock: Callable[[], float], log: RateLimitedLogger
    ) -> None:
        self._config = config
        self._log = log
        self._fetch = fetch or self._get
        self._clock = clock
        self._keys: tuple[Key, ...] = ()
        self._fetched_at = self._tried_at = float("-inf")
        self._task: asyncio.Task[None] | None = None

    @property
    def are_known(self) -> bool:
        """Whether any were fetched yet."""
        return bool(self._keys)

    def start(self) -> None:
        self._refresh()

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def keys(self, kid: str) -> tuple[Key, ...]:
        """All keys, fetched anew where they are old or ``kid`` is not among them; not more often than allowed."""
        is_old = self._clock() - self._fetched_at > self._config.jwks_cache_s
        is_missing = not self._keys or (bool(kid) and all(key.kid != kid for key in self._keys))
        if is_old or is_missing:
            failed_last = self._tried_at > self._fetched_at
            self._refresh()
            # Clients wait for what may help them; not for an address that has not answered while old keys will do.
            if self._task is not None and (is_missing or not failed_last):
                await asyncio.wait((self._task,))
        return self._keys

    def _refresh(self) -> None:
        running = self._task is not None and not self._task.done()
        if not running and self._clock() - self._tried_at >= self._config.jwks_retry_s:
            self._tried_at = self._clock()
            self._task = asyncio.create_task(self._run(), name="relay-jwks")

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(_FETCH_TIMEOUT_S):
                keys = parse_jwks(await self._fetch())
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            # Its text may name the address, which may hold a password.
            what = str(error) if isinstance(error, _JwksError) else type(error).__name__
            known = "those known serve on" if self._keys else "no token can be checked against them"
            self._log.warning("jwks", "auth.jwks_url: the keys cannot be fetched (%s); %s", what, known)
        else:
            self._keys = keys
            self._fetched_at = self._tried_at

    async def _get(self) -> bytes:
        url = httpx.URL(self._config.jwks_url)
        headers = {"accept": "application/json", "user-agent": f"relay/{__version__}"}
        request = httpx.Request("GET", url, headers=headers, extensions={"timeout": _TIMEOUT.as_dict()})
        if url.userinfo:
            request = next(httpx.BasicAuth(url.username, url.password).auth_flow(request))
        # httpx2's transport and not its client, whose log shows the whole address, with its password and its query.
        async with httpx.AsyncHTTPTransport(proxy=_proxy_for(url)) as transport:
            response = await transport.handle_async_request(request)
            try:
                return await _read(response, url)
            finally:
                await response.aclose()


async def _read(response: httpx.Response, url: httpx.URL) -> bytes:
    if response.is_redirect:
        raise _JwksError(
            f"status {response.status_code}, a redirect to {_target(response, url)}, which is not followed"
        )
    if response.status_code != 200:
        raise _JwksError(f"status {response.status_code}")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _JWKS_MAX_BYTES:
            raise _JwksError(f"more than {_JWKS_MAX_BYTES} bytes")
    return bytes(body)


def _target(response: httpx.Response, url: httpx.URL) -> str:
    """Scheme and host to which a redirect points: its path may hold a secret."""
    try:
        return origin_of(str(url.join(response.headers.get("location", ""))))
    except (httpx.InvalidURL, ValueError):
        return "another address"


def _proxy_for(url: httpx.URL) -> str | None:
    """The proxy that the environment names: ``HTTPS_PROXY``, ``HTTP_PROXY``, ``ALL_PROXY``, but for ``NO_PROXY``.

    None for this machine, whatever the environment says.
    """
    if is_this_machine(url.host):
        return None
    proxies = getproxies()
    found = proxies.get(url.scheme) or proxies.get("all")
    if not found or proxy_bypass(url.host):
        return None
    return found if "://" in found else f"http://{found}"


class _JwksError(ValueError):
    """What was fetched is no key set; the text is fit for the log."""


def parse_jwks(data: bytes) -> tuple[Key, ...]:
    """Read a key set: its RSA keys and those on P-256, for signatures. Raises ValueError where it holds none.

    Secrets in it (``oct``) are passed over: nobody publishes a secret that is one.
    """
    try:
        entries = msgspec.json.decode(data)["keys"]
    except (msgspec.MsgspecError, KeyError, TypeError, RecursionError, UnicodeError):
        raise _JwksError("no key set") from None
    keys = tuple(key for entry in entries if (key := _parse_jwk(entry))) if isinstance(entries, list) else ()
    if not keys:
        raise _JwksError("no usable key in it")
    return keys


def _parse_jwk(entry: object) -> Key | None:
    try:
        return key_of_jwk(entry) if isinstance(entry, dict) else None
    except _FAULTS:
        return None
