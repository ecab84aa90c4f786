"""`relay.auth.session`: one socket's rights and their end. Over real sockets it is in ``integration/test_auth.py``."""

import asyncio
from typing import Any

import msgspec
import pytest

from relay import Config
from relay.auth.authenticator import Authenticator
from relay.auth.session import SocketAuth, tokens_in
from relay.errors import AuthenticationError, Reason
from relay.permissions import Identity, Rights, parse_claim
from relay.plugins.dispatcher import HandlerRunner
from relay.protocol.serializer import Version
from relay.protocol.state import ChannelsProtocol, Subscription
from relay.telemetry import Telemetry
from tests.support.serving import eventually


def raw(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (raw('{"token":"a","access_token":"b","x":{"token":"c"}}'), ("a", "b")),
        (raw('{"access_token":"b"}'), (None, "b")),
        (raw('{"token":""}'), (None, None)),
        (raw('{"token":7}'), (None, None)),
        (raw('{"token":null}'), (None, None)),
        (raw('"token"'), (None, None)),
        (raw('["token"]'), (None, None)),
        (raw("{}"), (None, None)),
        (b'{"token":"a"}', (None, None)),
        (raw('{"token":' + "[" * 20_000 + "]" * 20_000 + "}"), (None, None)),
    ],
)
def test_tokens_are_found_in_params(payload: Any, expected: Any) -> None:
    assert tokens_in(payload) == expected


class Owner:
    """What a socket does for its access, written down."""

    def __init__(self, identity: Identity, tokens: dict[str, Identity] | None = None, grace_s: float = 5.0) -> None:
        self.now = 100.0
        self.done: list[Any] = []
        self.tokens = tokens or {}
        self.counted: list[str] = []
        auth = Authenticator(Config(auth={"expiry_grace_s": grace_s}), HandlerRunner(5.0, Telemetry()), self._verify)
        auth.authenticate_token = self._identify  # type: ignore[method-assign]  # tokens are names here
        self.protocol = ChannelsProtocol(Subscription, Version.V2, topics_max=9, payload_max_bytes=99)
        self.subscriptions = self.protocol.subscriptions
        self.access = SocketAuth(auth, identity, self, lambda: self.now)

    async def _verify(self, token: str) -> dict[str, Any]:
        raise NotImplementedError

    async def _identify(self, token: str) -> Identity:
        if token not in self.tokens:
            raise AuthenticationError(401, "token", "bad")
        return self.tokens[token]

    def rights_changed(self, subscription: Subscription) -> None:
        """What follows from it is the channel's."""

    def end_subscription(self, subscription: Subscription, reason: Reason | None) -> bool:
        del self.subscriptions[subscription.topic]
        self.done.append((subscription.topic, reason))
        return True

    def close(self, code: int, reason: str) -> bool:
        self.done.append(code)
        return True

    def count_refusal(self, reason: str) -> None:
        self.counted.append(reason)

    async def join(self, topic: str, **params: str) -> Reason | None:
        subscription = Subscription(topic, "1")
        decided = self.access.authorize_join(subscription, msgspec.Raw(msgspec.json.encode(params)))
        if callable(decided):
            decided = await decided()
        if decided is None:
            self.subscriptions[topic] = subscription
        return decided

    async def wait_until_looked(self) -> None:
        """Let the timer, whose times are this clock's, come to its end."""
        timer = self.access._timer
        await eventually(lambda: self.access._timer is not timer, "the timer")


def identity(user: str | None = "alice", claim: Any = None, expires_at: float | None = None) -> Identity:
    return Identity(user, Rights(parse_claim({"*": "join,push"} if claim is None else claim)), {}, expires_at)


async def test_what_does_not_expire_has_no_timer() -> None:
    owner = Owner(identity())
    assert owner.access._timer is None
    owner.access.end()


async def test_topics_of_one_user_end_with_the_socket_and_those_of_others_do_not() -> None:
    """A topic under a token of its own has its own end; a rejoin of the socket's own user is what renews it."""
    tokens = {"bob": identity("bob"), "mine": identity("alice")}
    owner = Owner(identity(expires_at=100.02), tokens)
    assert [await owner.join("a"), await owner.join("b", token="bob"), await owner.join("c", token="mine")] == [
        None
    ] * 3
    owner.now = 100.03
    await owner.wait_until_looked()
    assert owner.done == [("a", Reason.TOKEN_EXPIRED), ("c", Reason.TOKEN_EXPIRED)]
    assert owner.counted == [Reason.TOKEN_EXPIRED] * 2
    assert await owner.join("a") is Reason.TOKEN_EXPIRED
    owner.now = 105.03
    owner.access._look()
    assert owner.done[2:] == [1008]
    owner.access.end()


async def test_renewed_socket_is_not_closed() -> None:
    tokens = {"new": identity(claim={"a": "join"}, expires_at=200.0)}
    owner = Owner(identity(expires_at=100.01), tokens)
    owner.now = 100.02
    await owner.wait_until_looked()
    assert await owner.join("a", token="new") is None
    assert owner.subscriptions["a"].identity is None and not owner.subscriptions["a"].may_push
    owner.now = 110.0
    owner.access._look()
    assert owner.done == []
    owner.access.end()


async def test_renewal_settles_each_topic_anew() -> None:
    tokens = {"less": identity(claim={"a": "join"}), "bob": identity("bob"), "bob2": identity("bob", {"x": "join"})}
    owner = Owner(identity(), tokens)
    for topic in ("a", "b"):
        assert await owner.join(topic) is None
    assert await owner.join("c", token="bob") is None
    assert owner.subscriptions["a"].may_push
    assert await owner.access.renew("less") is None
    assert owner.done == [("b", None)] and not owner.subscriptions["a"].may_push
    # The topic under bob's token is renewed by bob's alone.
    own = owner.subscriptions["c"]
    assert await owner.access.renew("less", own) is Reason.ANOTHER_USER
    assert await owner.access.renew("bob", own) is None
    assert await owner.access.renew("bob2", own) is None
    assert owner.done == [("b", None), ("c", None)]
    assert owner.access.identity.user == "alice"
    owner.access.end()


async def test_nobody_becomes_somebody_else() -> None:
    tokens = {"bob": identity("bob"), "nobody": identity(None)}
    for held in (identity("alice"), identity(None)):
        owner = Owner(held, tokens)
        assert await owner.access.renew("bob") is Reason.ANOTHER_USER
        assert await owner.access.renew("nobody") is Reason.ANOTHER_USER
        assert await owner.access.renew("bad") is Reason.INVALID_TOKEN
        assert await owner.access.renew(None) is Reason.INVALID_TOKEN
        assert await owner.join("a", access_token="bob") is Reason.ANOTHER_USER
        owner.access.end()


async def test_user_is_sent_away_from_a_topic_or_altogether() -> None:
    tokens = {"bob": identity("bob")}
    owner = Owner(identity("alice"), tokens)
    for topic, params in (("a", {}), ("b", {}), ("c", {"token": "bob"})):
        await owner.join(topic, **params)
    assert owner.access.disconnect_user("carol", "", "") == owner.access.disconnect_user("alice", "c", "") == 0
    assert owner.access.disconnect_user("alice", "a", "") == 1
    assert owner.access.disconnect_user("bob", "", "") == 1
    assert owner.done == [("a", None), ("c", None)]
    assert owner.access.disconnect_user("alice", "", "é" * 200) == 1
    assert owner.done[2:] == [1001]
    owner.access.end()


async def test_after_its_end_nothing_is_done_any_more() -> None:
    owner = Owner(identity(expires_at=100.01), {"new": identity(expires_at=100.02)})
    await owner.join("a")
    owner.access.end()
    assert owner.access._timer is None
    assert await owner.access.renew("new") is None
    assert owner.access._timer is None
    owner.now = 200.0
    owner.access._look()
    assert owner.done == []
    await asyncio.sleep(0)


async def test_end_that_is_far_away_is_waited_for_in_portions() -> None:
    owner = Owner(identity(expires_at=1e15))
    assert owner.access._timer is not None
    assert owner.access._timer.when() - asyncio.get_running_loop().time() <= 86_400
    owner.access.end()
