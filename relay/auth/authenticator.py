"""Authentication: what an upgrade request, or a token that comes later, proves about its sender.

Owns the decision, and the identity that follows from it; must not know sockets or how tokens are checked.
"""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias

from starlette.authentication import AuthCredentials, UnauthenticatedUser
from starlette.requests import HTTPConnection

from relay.auth.decisions import Decisions
from relay.auth.tangram import TangramTopics
from relay.config import Config
from relay.errors import AuthenticationError, Reason
from relay.permissions import Grant, Identity, Rights, bind, parse_claim
from relay.plugins.dispatcher import HandlerError, HandlerRunner
from relay.plugins.hooks import Hook, Refused
from relay.transports.handshake import find_token

_LAST_SECOND = 1e15
"""Seconds since 1970, in 31 million years."""

Claims: TypeAlias = Mapping[str, Any]
Verify: TypeAlias = Callable[[str], Awaitable[Claims]]


class UpgradeRequest(HTTPConnection):
    """The upgrade request of a socket, passed to the ``authenticate`` function.

    It has the attributes of a Starlette request: ``headers``, ``cookies``, ``query_params``, ``client``; ``session``
    and ``user`` if middleware sets them. When a socket renews its token, only ``token`` and ``claims`` are set and
    all others are empty, because a session may have ended since the handshake.
    """

    def __init__(self, scope: Any, token: str | None, claims: Claims | None) -> None:
        super().__init__(scope)
        self.token: str | None = token
        """The token that came along; a secret."""
        self.claims: Claims | None = claims
        """What that token says, where keys to check it are configured."""


Authenticate: TypeAlias = Callable[[UpgradeRequest], Claims | Awaitable[Claims | None] | None]


class Clock(Protocol):
    """What says how late it is; the module `time` does."""

    def monotonic(self) -> float:
        """Monotonic seconds, by which identities expire."""

    def time(self) -> float:
        """Seconds since 1970, by which tokens say so."""


class Authenticator:
    """Authenticates upgrade requests and tokens.

    Args: config: ``auth`` and ``allow_anonymous`` are used.
          verify: checks a token; None where no keys are configured.
          function: the team's own, in a hook; asked after the token was checked.
          decisions: those under way, which a control message for their user overtakes.
    """

    def __init__(
        self,
        config: Config,
        runner: HandlerRunner,
        verify: Verify | None = None,
        function: Authenticate | None = None,
        decisions: Decisions | None = None,
        clock: Clock = time,
    ) -> None:
        self.decisions: Decisions = Decisions() if decisions is None else decisions
        self._settings = config.auth
        self._runner = runner
        self._verify = verify
        self._hook = None if function is None else Hook("authenticate", function)
        self._clock = clock
        self._lets_anonymous_in = config.allow_anonymous or not (verify or function)
        by_function = "a client that the application's function authenticate= knows; it returned None"
        self._expected = "expected " + " or ".join(["a token"] * (verify is not None) + [by_function] * bool(function))
        self._tangram_topics = TangramTopics(config.auth)
        self._granted = tuple(entry.grant for entry in config.auth.authenticated)
        self._anonymous = Identity(None, Rights(bind(tuple(entry.grant for entry in config.auth.anonymous), None)))

    @property
    def checks_tokens(self) -> bool:
        """Whether a token that comes later proves anything."""
        return self._verify is not None or self._hook is not None

    @property
    def grace_s(self) -> float:
        """Seconds in which an expired identity can be renewed."""
        return self._settings.expiry_grace_s

    async def authenticate_request(self, scope: Mapping[str, Any], auth_token: str | None) -> Identity:
        """Say who sends an upgrade request. Raises AuthenticationError."""
        identity = await self._identify(scope, find_token(scope, auth_token))
        if identity is not None:
            return identity
        if not self._lets_anonymous_in:
            raise AuthenticationError(401, "no token", self._expected)
        return self._anonymous

    async def authenticate_token(self, token: str) -> Identity:
        """Say whose token it is that came later. Raises AuthenticationError."""
        identity = await self._identify(_bare_scope(), token)
        if identity is None:
            raise AuthenticationError(401, "token", "nothing here checks tokens")
        return identity

    async def _identify(self, scope: Mapping[str, Any], token: str | None) -> Identity | None:
        began = self.decisions.begin()
        try:
            identity = await self._decide(scope, token)
            if identity is not None and self.decisions.overtaken(began, identity.user):
                text = "this user was disconnected in the meantime; try again"
                raise AuthenticationError(503, "removed", text, Reason.REMOVED)
            return identity
        finally:
            self.decisions.end(began)

    async def _decide(self, scope: Mapping[str, Any], token: str | None) -> Identity | None:
        claims = await self._verify(token) if self._verify is not None and token is not None else None
        whose = "the token's claims are"
        expiry = [] if claims is None else [claims.get("exp")]
        if self._hook is not None:
            request = UpgradeRequest(scope, token, claims)
            try:
                answer = await self._runner.call_with_result(self._hook, request, _checked)
            except Refused as refusal:
                raise AuthenticationError(403, "by authenticate", refusal.reason, Reason.UNAUTHORIZED) from None
            except HandlerError:  # logged and counted there
                raise AuthenticationError(
                    503, "authenticate failed", "authentication has failed; try again", Reason.AUTH_UNAVAILABLE
                ) from None
            if answer is not None:
                claims, whose = answer, "what the application's function authenticate= returned is"
                expiry.append(claims.get("exp"))
        return None if claims is None else self._identity(claims, expiry, whose)

    def _identity(self, claims: Claims, expiry: list[Any], whose: str) -> Identity:
        try:
            user, granted, grants = self._read(claims)
            # Of a token and a function that adds to it, whichever ends first.
            ends = min((_seconds(at) for at in expiry if at is not None), default=None)
        except ValueError as error:
            raise AuthenticationError(401, "token claims", f"{whose} malformed: {error}") from None
        expires_at = None
        if ends is not None:
            expires_at = self._clock.monotonic() + ends + self._settings.leeway_s - self._clock.time()
            if expires_at <= self._clock.monotonic():
                raise AuthenticationError(401, "token expired", "the token has expired", Reason.TOKEN_EXPIRED)
        return Identity(user, Rights(bind(granted, user), bind(grants, user)), dict(claims), expires_at)

    def _read(self, claims: Claims) -> tuple[str | None, tuple[Grant, ...], tuple[Grant, ...]]:
        """The user, what the settings grant to it, and what the claims grant. Raises ValueError, naming the claim."""
        subject = claims.get("sub")
        if self._settings.tangram and subject is None and "channel" in claims:
            # A token for one topic: what the settings grant to users is not for its holder.
            channel = claims["channel"]
            if not isinstance(channel, str) or not channel:
                raise ValueError('"channel": expected a topic as text')
            return user_name(claims.get("id"), "id"), (), self._tangram_topics.grants(claims, channel)
        claim = self._settings.rights_claim
        user = user_name(subject, "sub")
        try:
            return user, self._granted, parse_claim(claims.get(claim))
        except ValueError as error:
            raise ValueError(f'"{claim}": {error}') from None


def _bare_scope() -> dict[str, Any]:
    """A request that holds nothing: no user is logged in."""
    scope: dict[str, Any] = {"type": "websocket", "path": "", "query_string": b"", "headers": [], "session": {}}
    return scope | {"user": UnauthenticatedUser(), "auth": AuthCredentials()}


def user_name(subject: object, claim: str) -> str | None:
    """What a user is called here: text, as which a number counts too; None stays None. Raises ValueError."""
    if subject is None:
        return None
    if not isinstance(subject, str | int) or isinstance(subject, bool) or subject == "":
        raise ValueError(f'"{claim}": expected a user\'s name as text or as a number')
    try:
        user = str(subject)
        _ = user.encode()
    except ValueError:  # half a surrogate pair, which JSON's escapes can write; a number of thousands of digits
        raise ValueError(f'"{claim}": expected a user\'s name that UTF-8 can encode') from None
    return user


def known_user(user: object) -> str:
    """The name that sockets have of a user whom an application names. Raises ValueError."""
    name = user_name(user, "user")
    if name is None:
        raise ValueError("user: expected the user's name, got None")
    return name


def check_claims(claims: Claims, rights_claim: str) -> None:
    """Check the claims of a token that is to be made. Raises ValueError, naming the one that no relay takes."""
    _ = user_name(claims.get("sub"), "sub")
    try:
        _ = parse_claim(claims.get(rights_claim))
    except ValueError as error:
        raise ValueError(f'"{rights_claim}": {error}') from None
    for name in ("exp", "nbf", "iat"):
        at = claims.get(name, 0)
        if isinstance(at, bool) or not isinstance(at, int | float) or not abs(at) < _LAST_SECOND:
            raise ValueError(f'"{name}": expected a number of seconds since 1970, got {at!r:.40}')


def _seconds(at: Any) -> float:
    """When a claim says that it ends. Raises ValueError, which names the claim."""
    try:
        seconds = float(at)
    except (ValueError, TypeError, OverflowError):
        raise ValueError('"exp": expected a number of seconds since 1970') from None
    if not abs(seconds) < _LAST_SECOND:  # NaN is in no order, and would never come
        raise ValueError('"exp": expected a number of seconds since 1970, got one that is no time')
    return seconds


def _checked(answer: Any) -> Claims | None:
    """Take what an ``authenticate`` function returned. Raises TypeError: True is no proof of anything."""
    if answer is None:
        return None
    if not isinstance(answer, Mapping):
        raise TypeError(f'expected a mapping with "sub", or None, got a {type(answer).__name__}')
    sub = answer.get("sub")
    if not isinstance(sub, str | int) or sub == "":
        names = ", ".join(map(str, answer)) or "nothing"
        came = f"{sub!r:.40} ({type(sub).__name__})" if "sub" in answer else f"a mapping with {names:.200} only"
        raise TypeError(f'expected "sub", the user, as text or as a number, got {came}')
    return dict(answer)  # here, where a fault of a mapping with code of its own is the function's
