"""Tokens (JWT): the keys they are signed with, checking them, and making them.

Owns keys, static ones and those of a JWKS address; must not know what a token's claims allow, nor sockets.

Each key is for one algorithm, which follows from what it is: a secret for HS256, an RSA key for RS256, a key on P-256
for ES256. So no token can have a public key taken for a secret, and ``none`` is no algorithm here.

Source: RFC 7515, 7517, 7519; RFC 8725 (best current practices), sections 3.1 and 3.2.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import getproxies, proxy_bypass

import httpx2 as httpx
import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate
from jwt.exceptions import PyJWTError

from relay import __version__
from relay.auth_config import AuthConfig
from relay.errors import ConfigError, NotAdmitted, Reason
from relay.logs import Throttle

_throttle = Throttle(logging.getLogger("relay.auth"))

_FILE = "file:"
_TOKEN_MAX_BYTES = 16_384
_JWKS_MAX_BYTES = 1_048_576
_FETCH_TIMEOUT_S = 5.0
_TIMEOUT = httpx.Timeout(_FETCH_TIMEOUT_S)
_FAULTS = (PyJWTError, ValueError, TypeError, OverflowError, RecursionError)
"""What PyJWT raises for a token that is none; some of it escapes from the JSON inside."""

Fetch = Callable[[], Awaitable[bytes]]


class Key(NamedTuple):
    """A key and the one algorithm it is for; ``private`` is what signs, if that is known here."""

    kid: str
    algorithm: str
    public: Any
    private: Any = None

    def __repr__(self) -> str:
        return f"Key({self.kid!r}, {self.algorithm})"


def load_keys(config: AuthConfig) -> tuple[Key, ...]:
    """Read the static keys, from files where the settings say so. Raises ConfigError, which repeats no key."""
    keys = tuple(read_key(entry.key, entry.kid, f"auth.keys.{at}") for at, entry in enumerate(config.keys))
    for at, key in enumerate(keys):
        if key.algorithm not in config.algorithms:
            raise ConfigError(f"auth.keys.{at}: a key for {key.algorithm}, which is not among auth.algorithms")
    if config.tangram and not any(key.algorithm == "HS256" for key in keys):
        raise ConfigError("auth.tangram: its tokens are signed with a secret; expected one among auth.keys")
    return keys


def read_key(text: str, kid: str, where: str) -> Key:
    """Make a key of a secret, a PEM, or ``file:`` with either in it; white space around it does not count.

    Args:   where: the setting or flag it comes from, for the error.
    Raises: ConfigError: no such file, or a key that is none of ours.
    """
    if text.startswith(_FILE):
        path = text.removeprefix(_FILE)
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: {path}: cannot be read: {getattr(error, 'strerror', 'no text')}") from None
    text = text.strip()
    if not text:
        raise ConfigError(f"{where}: expected a key, got an empty one")
    if not text.startswith("-----BEGIN "):
        return Key(kid, "HS256", text.encode(), text.encode())
    public, private = _read_pem(text.encode(), where)
    algorithm = _algorithm_of(public)
    if algorithm is None:
        raise ConfigError(f"{where}: expected an RSA key, or one on the curve P-256")
    return Key(kid, algorithm, public, private)


def _read_pem(pem: bytes, where: str) -> tuple[Any, Any]:
    try:
        if b" PRIVATE KEY-----" in pem:
            private = load_pem_private_key(pem, None)
            return private.public_key(), private
        if b"-----BEGIN CERTIFICATE-----" in pem:
            return load_pem_x509_certificate(pem).public_key(), None
        return load_pem_public_key(pem), None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"{where}: cannot be read as PEM; a key under a passphrase cannot be used") from None


def _algorithm_of(key: object) -> str | None:
    if isinstance(key, rsa.RSAPublicKey):
        return "RS256"
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return "ES256"
    return None


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
    """

    def __init__(
        self,
        config: AuthConfig,
        keys: tuple[Key, ...],
        fetch: Fetch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._keys = keys
        self._published = _PublishedKeys(config, fetch, clock) if config.jwks_url else None

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
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key.public,
                algorithms=[key.algorithm],
                issuer=config.issuer or None,
                audience=config.audience or None,
                leeway=config.leeway_s,
                options={"require": ["exp"] if config.require_expiry else []},
            )
        except jwt.InvalidSignatureError:
            raise
        except jwt.ExpiredSignatureError:
            raise NotAdmitted(401, "token expired", "the token has expired", Reason.TOKEN_EXPIRED) from None
        except jwt.InvalidIssuerError:
            raise NotAdmitted(401, "token issuer", "the token is of another issuer") from None
        except jwt.InvalidAudienceError:
            raise NotAdmitted(401, "token audience", "the token is for another audience") from None
        except (jwt.ImmatureSignatureError, jwt.InvalidIssuedAtError):
            raise NotAdmitted(401, "token time", "the token is not good yet; do the clocks agree?") from None
        except jwt.MissingRequiredClaimError as error:
            raise NotAdmitted(401, "token claims", f"the token lacks the claim {error.claim!r}") from None
        except _FAULTS:
            raise NotAdmitted(401, "token claims", "the token's claims are malformed") from None
        return claims


def _fitting(keys: Iterable[Key], algorithm: str, kid: str) -> tuple[Key, ...]:
    """Those a token may be signed with; a key or a token without a ``kid`` fits any."""
    return tuple(key for key in keys if key.algorithm == algorithm and (not kid or not key.kid or key.kid == kid))


class _PublishedKeys:
    """The keys at ``jwks_url``, fetched when they are needed, by one task at a time.

    While the address does not answer, the keys that are known serve on.
    """

    def __init__(self, config: AuthConfig, fetch: Fetch | None, clock: Callable[[], float]) -> None:
        self._config = config
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
            _throttle.warning("jwks", "auth.jwks_url: the keys cannot be fetched (%s); %s", what, known)
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
                return await _read(response)
            finally:
                await response.aclose()


async def _read(response: httpx.Response) -> bytes:
    if response.status_code != 200:
        raise _JwksError(f"status {response.status_code}")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _JWKS_MAX_BYTES:
            raise _JwksError(f"more than {_JWKS_MAX_BYTES} bytes")
    return bytes(body)


def _proxy_for(url: httpx.URL) -> str | None:
    """The proxy that the environment names: ``HTTPS_PROXY``, ``HTTP_PROXY``, ``ALL_PROXY``, but for ``NO_PROXY``."""
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
    if not isinstance(entry, dict) or entry.get("kty") not in ("RSA", "EC") or entry.get("use", "sig") != "sig":
        return None
    try:
        public = jwt.PyJWK({name: value for name, value in entry.items() if name != "d"}).key
    except _FAULTS:
        return None
    algorithm = _algorithm_of(public)
    kid = entry.get("kid")
    if algorithm is None or entry.get("alg", algorithm) != algorithm:
        return None
    return Key(kid if isinstance(kid, str) else "", algorithm, public)
