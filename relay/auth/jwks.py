"""Published keys (JWKS): fetched when they are needed, and kept while their address does not answer.

Owns which of them are known at a time; must not know tokens.

Source: RFC 7517.
"""

import asyncio
from collections.abc import Awaitable, Callable
from urllib.request import getproxies, proxy_bypass

import httpx2 as httpx
import msgspec
from jwt.exceptions import PyJWTError

from relay.auth.keys import Key, key_of_jwk
from relay.config_sections import AuthConfig
from relay.log import RateLimitedLogger
from relay.proxy_headers import is_this_machine, origin_of
from relay.version import __version__

_FAULTS = (PyJWTError, ValueError, TypeError, OverflowError, RecursionError)
"""What is raised for an entry that is not a key."""

_JWKS_MAX_BYTES = 1_048_576
_FETCH_TIMEOUT_S = 5.0
_TIMEOUT = httpx.Timeout(_FETCH_TIMEOUT_S)
Fetch = Callable[[], Awaitable[bytes]]


class PublishedKeys:
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
        """All keys, fetched again where they are old or ``kid`` is not among them; not more often than allowed."""
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
            self._log.warning("jwks", "fetching the keys of auth.jwks_url failed (%s); %s", what, known)
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

    Secrets in it (``oct``) are ignored: a published secret is not secret.
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
