"""What one socket may do, and until when: rights on its topics, expiry and renewal.

Owns a socket's identity and the timer of its end; must not know frames, Redis or how an identity is proved.

At its expiry each topic gets a ``phx_error``: the client rejoins, and phoenix.js calls its params function again. A
token in those params, or in an ``access_token`` event, renews; a socket that has not been renewed after the grace is
closed, and phoenix.js connects again with a new ``authToken``.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias

import msgspec

from relay.auth.authenticator import Authenticator
from relay.errors import AuthenticationError, CloseCode, Reason, close_reason
from relay.permissions import Identity, Right
from relay.protocol.payload import Payload
from relay.protocol.state import ChannelsProtocol, Subscription

Decision: TypeAlias = Callable[[], Coroutine[None, None, Reason | None]]
"""Says why a join is refused, or None. No coroutine yet: one that is never awaited is a warning."""

_WAIT_MAX_S = 86_400.0


class _Tokens(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None


_decode = msgspec.json.Decoder(_Tokens).decode
_NONE = _Tokens()


def tokens_in(payload: Payload) -> tuple[str | None, str | None]:
    """``token`` and ``access_token`` of a join's params or a renewal's payload, where they stand there as text."""
    if not isinstance(payload, msgspec.Raw) or b"token" not in bytes(payload):
        return None, None
    try:
        found = _decode(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None, None
    return found.token or None, found.access_token or None


class AuthOwner(Protocol):
    """The socket whose permissions these are."""

    @property
    def protocol(self) -> ChannelsProtocol[Any]:
        """Its subscriptions."""

    def end_subscription(self, subscription: Subscription, reason: Reason | None) -> bool:
        """End a subscription: with a reason by ``phx_error``, without one by ``phx_close``."""

    def rights_changed(self, subscription: Subscription) -> None:
        """Learn that a subscription goes on with other rights."""

    def close(self, code: int, reason: str) -> bool:
        """Close the socket."""

    def count_refusal(self, reason: str) -> None:
        """Count what is refused."""


class SocketAuth:
    """One socket's permissions and their end.

    Args: authenticator: checks the tokens that come later.
          identity: who the client is, as its handshake has shown.
          owner: the socket.
    """

    __slots__ = ("_auth", "_clock", "_closes_at", "_owner", "_timer", "identity")

    def __init__(
        self,
        authenticator: Authenticator,
        identity: Identity,
        owner: AuthOwner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity: Identity = identity
        self._auth = authenticator
        # None once the socket has ended.
        self._owner: AuthOwner | None = owner
        self._clock = clock
        # Set while the identity has expired and is not renewed yet.
        self._closes_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._set_timer()

    # Joins.

    def authorize_join(self, subscription: Subscription, params: Payload) -> Reason | None | Decision:
        """Decide on a join: why it is refused, or None; or what decides, where it brings a token."""
        token, access_token = tokens_in(params)
        if (token is None and access_token is None) or not self._auth.checks_tokens:
            return self.judge(subscription)
        return partial(self._admit_with, subscription, token, access_token)

    async def _admit_with(
        self, subscription: Subscription, token: str | None, access_token: str | None
    ) -> Reason | None:
        if access_token is not None and (reason := await self.renew(access_token)) is not None:
            return reason
        if token is not None:
            try:
                identity = await self._auth.authenticate_token(token)
            except AuthenticationError as error:
                return error.reason
            if self.identity.is_expired(self._clock()) and _same_user(identity, self.identity):
                self._take(identity)
            else:
                subscription.identity = identity
        return self.judge(subscription)

    def judge(self, subscription: Subscription, began: int | None = None) -> Reason | None:
        """Settle a subscription's rights as they are now: why it may not be, or None.

        Args: began: of a join's decision, which a control message may have overtaken.
        """
        identity = subscription.identity or self.identity
        if began is not None and self._auth.decisions.overtaken(began, identity.user, subscription.topic):
            return Reason.REMOVED
        if identity.is_expired(self._clock()):
            return Reason.TOKEN_EXPIRED
        rights = identity.rights.on(subscription.topic)
        if not rights & Right.JOIN:
            return Reason.UNAUTHORIZED
        subscription.may_push = bool(rights & Right.PUSH)
        subscription.has_presence = bool(rights & Right.PRESENCE)
        if subscription.identity is not None:
            self._set_timer(subscription.identity.expires_at)
        return None

    def may_push(self, subscription: Subscription) -> Reason | None:
        """Ask again for the right of a push that had to wait: why it has none by now, or None."""
        if (subscription.identity or self.identity).is_expired(self._clock()):
            return Reason.TOKEN_EXPIRED
        return None if subscription.may_push else Reason.UNAUTHORIZED

    # Renewal.

    async def renew(self, token: str | None, subscription: Subscription | None = None) -> Reason | None:
        """Take a new token of the same user: why it is refused, or None.

        Args: subscription: renew this one alone where it has been opened by a token of its own.
        """
        if token is None:
            return Reason.INVALID_TOKEN
        try:
            identity = await self._auth.authenticate_token(token)
        except AuthenticationError as error:
            return error.reason
        own = None if subscription is None else subscription.identity
        if subscription is not None and own and self._subscriptions().get(subscription.topic) is not subscription:
            return Reason.REMOVED
        if not _same_user(identity, own or self.identity):
            return Reason.ANOTHER_USER
        if subscription is None or own is None:
            self._take(identity)
        else:
            subscription.identity = identity
            self._settle(subscription)
        return None

    def _take(self, identity: Identity) -> None:
        """Go on under a new identity; topics that it does not allow are closed."""
        self.identity = identity
        self._closes_at = None
        self._set_timer()
        for subscription in tuple(self._subscriptions().values()):
            if subscription.identity is None:
                self._settle(subscription)

    def _settle(self, subscription: Subscription) -> None:
        if (reason := self.judge(subscription)) is not None:
            self._count_refusal(reason)
            self._end_subscription(subscription, None)
        elif self._owner is not None:
            self._owner.rights_changed(subscription)

    # Expiry.

    def _set_timer(self, also_at: float | None = None) -> None:
        """Look again at the next time at which something expires."""
        if self._owner is None:
            return
        now = self._clock()
        times = [self._closes_at or self.identity.expires_at, also_at]
        times += [each.identity.expires_at for each in self._subscriptions().values() if each.identity is not None]
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at := [time for time in times if time is not None]:
            # Rounded up by the least the loop can tell, and never so far ahead that it cannot.
            delay_s = min(max(min(at) - now, 0.0) + 0.001, _WAIT_MAX_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        """End what has expired."""
        self._timer = None
        now = self._clock()
        if self.identity.is_expired(now) and self._closes_at is None:
            assert self.identity.expires_at is not None, "it has expired"
            self._closes_at = self.identity.expires_at + self._auth.grace_s
        for subscription in tuple(self._subscriptions().values()):
            own = subscription.identity
            # Those of the same user too, whatever their own token says: their rejoin is what renews the socket.
            mine = own is None or _same_user(own, self.identity)
            if (mine and self._closes_at is not None) or (own is not None and own.is_expired(now)):
                self._count_refusal(Reason.TOKEN_EXPIRED)
                self._end_subscription(subscription, Reason.TOKEN_EXPIRED)
        if self._closes_at is not None and now >= self._closes_at:
            self._close(CloseCode.POLICY_VIOLATION, "the token has expired; come back with a new one")
        else:
            self._set_timer()

    # Control messages.

    def disconnect_user(self, user: str, topic: str, reason: str) -> int:
        """Close the socket if it is this user's, or with a ``topic`` that one alone; returns how much was ended.

        A topic that was opened by a token of its own is that token's user's.
        """
        if not topic and self.identity.user == user:
            text = close_reason(reason or "disconnected by the server")
            self._close(CloseCode.GOING_AWAY, text)
            return 1
        ended = 0
        for subscription in tuple(self._subscriptions().values()):
            owner = (subscription.identity or self.identity).user
            if owner == user and topic in ("", subscription.topic):
                self._end_subscription(subscription, None)
                ended += 1
        return ended

    def end(self, _: object = None) -> None:
        """Release the socket, which has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._owner = None

    # The socket, as long as it has not ended.

    def _subscriptions(self) -> Mapping[str, Subscription]:
        return {} if self._owner is None else self._owner.protocol.subscriptions

    def _end_subscription(self, subscription: Subscription, reason: Reason | None) -> None:
        if self._owner is not None:
            self._owner.end_subscription(subscription, reason)

    def _close(self, code: int, reason: str) -> None:
        if self._owner is not None:
            self._owner.close(code, reason)

    def _count_refusal(self, reason: str) -> None:
        if self._owner is not None:
            self._owner.count_refusal(reason)


def _same_user(one: Identity, other: Identity) -> bool:
    return one.user is not None and one.user == other.user


def explain(auth: SocketAuth | None, subscription: Subscription, reason: str) -> str:
    """What an operator needs to know of a refused join besides the reason: the client's permissions, or nothing."""
    if auth is None or reason != Reason.UNAUTHORIZED:
        return ""
    return f"the client's permissions: {(subscription.identity or auth.identity).rights}"
