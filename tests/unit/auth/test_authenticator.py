"""`relay.auth.authenticator`: what an upgrade request proves. Over sockets: ``integration/test_auth.py``."""

import asyncio
from typing import Any

import pytest

from relay import Config, Refused
from relay.auth.authenticator import Authenticator, UpgradeRequest
from relay.errors import AuthenticationError, Reason
from relay.permissions import ALL, Right
from relay.plugins.dispatcher import HandlerRunner
from relay.telemetry import Telemetry

SCOPE: dict[str, Any] = {"type": "websocket", "path": "/", "query_string": b"", "headers": []}


class Clock:
    """Monotonic and wall clock, stepped apart."""

    def __init__(self) -> None:
        self.now = 500.0
        self.wall = 1_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall


def make(verified: Any = None, function: Any = None, **settings: Any) -> tuple[Authenticator, Clock]:
    clock = Clock()

    async def verify(token: str) -> Any:
        if token == "bad":
            raise AuthenticationError(401, "token", "bad")
        return verified

    auth = Authenticator(
        Config(**settings),
        HandlerRunner(5.0, Telemetry()),
        verify if verified is not None else None,
        function,
        clock=clock,
    )
    return auth, clock


async def refusal(auth: Authenticator, token: str | None = "t") -> AuthenticationError:
    with pytest.raises(AuthenticationError) as caught:
        await auth.authenticate_request(SCOPE, token)
    return caught.value


async def test_expiry_is_reckoned_on_the_monotonic_clock() -> None:
    auth, clock = make({"sub": "alice", "exp": 1_000_060}, auth={"leeway_s": 7})
    identity = await auth.authenticate_request(SCOPE, "t")
    assert identity.expires_at == 500 + 60 + 7
    clock.wall -= 3600  # whoever is in already does not notice
    assert identity.expires_at == 567
    assert identity.is_expired(567) and not identity.is_expired(566.9)


@pytest.mark.parametrize("exp", [999_993, 0, -1, False])
async def test_claims_that_have_expired_are_refused(exp: Any) -> None:
    auth, _ = make({"sub": "alice", "exp": exp}, auth={"leeway_s": 7})
    error = await refusal(auth)
    assert (error.kind, error.reason) == ("token expired", Reason.TOKEN_EXPIRED)


async def test_of_token_and_function_whichever_ends_first_counts() -> None:
    for mine, expected in ((1_000_030, 530), (1_000_090, 560), (None, 560)):

        async def function(request: UpgradeRequest, mine: Any = mine) -> Any:
            return {"sub": "alice", "exp": mine}

        auth, _ = make({"sub": "alice", "exp": 1_000_060}, function, auth={"leeway_s": 0})
        assert (await auth.authenticate_request(SCOPE, "t")).expires_at == expected


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": "alice", "topics": "room"},
        {"sub": "alice", "topics": {"*": ["all"]}},
        {"sub": ["alice"]},
        {"sub": True},
        {"sub": "al\ud800ice"},
        {"sub": "alice", "exp": "soon"},
        {"sub": "alice", "exp": [1]},
    ],
)
async def test_claims_that_cannot_be_read_are_refused(claims: Any) -> None:
    auth, _ = make(claims)
    assert (await refusal(auth)).kind == "token claims"


async def test_users_may_be_numbers_or_missing() -> None:
    for sub, user in ((7, "7"), ("7", "7"), (0, "0"), (None, None)):
        auth, _ = make({"sub": sub})
        assert (await auth.authenticate_request(SCOPE, "t")).user == user


async def test_rights_are_those_of_the_claim_and_of_the_settings() -> None:
    auth, _ = make(
        {"sub": "al*", "may": {"room:{sub}": "push"}, "topics": {"*": "join"}},
        auth={"rights_claim": "may", "authenticated": [{"match": "user:{sub}", "rights": ["join"]}]},
    )
    rights = (await auth.authenticate_request(SCOPE, "t")).rights
    assert (rights.on("user:al*"), rights.on("room:al*")) == (Right.JOIN, Right.PUSH)
    assert rights.on("user:alice") is rights.on("room:alice") is rights.on("x") is Right.NONE


async def test_without_a_token_only_where_anonymous_is_asked_for_or_nothing_checks() -> None:
    auth, _ = make({"sub": "alice"})
    assert (await refusal(auth, None)).kind == "no token"
    for auth, _ in (
        make({"sub": "alice"}, allow_anonymous=True, auth={"anonymous": [{"match": "a", "rights": ["join"]}]}),
        make(auth={"anonymous": [{"match": "a", "rights": ["join"]}, {"match": "{sub}", "rights": ["join"]}]}),
    ):
        identity = await auth.authenticate_request(SCOPE, None)
        assert (identity.user, identity.expires_at, identity.claims) == (None, None, {})
        assert (identity.rights.on("a"), identity.rights.on(""), identity.rights.on("b")) == (Right.JOIN, 0, 0)


async def test_refusal_without_a_token_says_what_was_expected() -> None:
    async def function(request: UpgradeRequest) -> Any:
        return None

    by_function = "a client that the application's function authenticate= knows; it returned None"
    for auth, expected in (
        (make({"sub": "alice"})[0], "a token"),
        (make(function=function)[0], by_function),
        (make({"sub": "alice"}, function)[0], f"a token or {by_function}"),
    ):
        assert str(await refusal(auth, None)) == f"expected {expected}"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("ada", 'expected a mapping with "sub", or None, got a str'),
        (
            {"user": "ada", "topics": {}},
            'expected "sub", the user, as text or as a number, got a mapping with user, topics only',
        ),
        ({}, 'expected "sub", the user, as text or as a number, got a mapping with nothing only'),
        ({"sub": 4.5}, 'expected "sub", the user, as text or as a number, got 4.5 (float)'),
        ({"sub": ""}, "expected \"sub\", the user, as text or as a number, got '' (str)"),
    ],
)
async def test_what_is_wrong_with_the_functions_answer_is_in_the_log(
    answer: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def function(request: UpgradeRequest) -> Any:
        return answer

    auth, _ = make(function=function)
    assert (await refusal(auth)).status == 503
    assert "function returned an invalid value" in caplog.text
    assert f"TypeError: {told}" in caplog.text


async def test_claims_of_the_function_are_not_called_those_of_a_token() -> None:
    async def function(request: UpgradeRequest) -> Any:
        return {"sub": "ada", "topics": {"room:*": "jion"}}

    auth, _ = make(function=function)
    assert str(await refusal(auth)) == (
        "what the application's function authenticate= returned is malformed: "
        "\"topics\": expected join, push or presence, got 'jion'"
    )


async def test_bad_token_does_not_make_anybody_anonymous() -> None:
    auth, _ = make({"sub": "alice"}, allow_anonymous=True)
    assert (await refusal(auth, "bad")).status == 401


async def test_functions_refusal_is_an_answer_and_its_fault_is_not() -> None:
    async def refusing(request: UpgradeRequest) -> Any:
        raise Refused("go away")

    async def failing(request: UpgradeRequest) -> Any:
        raise ValueError("hunter2")

    auth, _ = make(None, refusing)
    error = await refusal(auth)
    assert (error.status, str(error), error.reason) == (403, "go away", Reason.UNAUTHORIZED)
    auth, _ = make(None, failing, allow_anonymous=True)
    error = await refusal(auth)
    assert (error.status, error.reason) == (503, Reason.AUTH_UNAVAILABLE)
    assert "hunter2" not in str(error)


async def test_later_token_is_judged_without_what_the_handshake_brought() -> None:
    seen: list[UpgradeRequest] = []

    def function(request: UpgradeRequest) -> dict[str, str] | None:
        seen.append(request)
        return {"sub": "eve"} if "user" in request.session else None

    auth, _ = make(None, function)
    scope = {**SCOPE, "headers": [(b"cookie", b"a=b")], "session": {"user": "eve"}}
    assert (await auth.authenticate_request(scope, None)).user == "eve"
    with pytest.raises(AuthenticationError):
        await auth.authenticate_token("t")
    assert seen[-1].user.is_authenticated is False
    assert (seen[-1].token, dict(seen[-1].headers), seen[-1].client, seen[-1].cookies) == ("t", {}, None, {})
    auth._runner.close()


async def test_where_nothing_checks_tokens_they_prove_nothing() -> None:
    auth, _ = make(auth={"anonymous": [{"match": "a", "rights": ["join"]}]})
    assert not auth.checks_tokens
    with pytest.raises(AuthenticationError):
        await auth.authenticate_token("t")


async def test_tangrams_claims_open_one_topic_letter_by_letter() -> None:
    claims = {"id": "me", "channel": "room:*", "exp": 1_000_060}
    auth, _ = make(claims, auth={"tangram": True, "keys": ["x"]})
    identity = await auth.authenticate_request(SCOPE, "t")
    assert identity.user == "me"
    assert (identity.rights.on("room:*"), identity.rights.on("room:1")) == (ALL, Right.NONE)
    off, _ = make(claims)
    identity = await off.authenticate_request(SCOPE, "t")
    assert (identity.user, identity.rights.on("room:*")) == (None, Right.NONE)
    # Who has a subject has a token of ours.
    both, _ = make({**claims, "sub": "alice"}, auth={"tangram": True})
    assert (await both.authenticate_request(SCOPE, "t")).rights.on("room:*") is Right.NONE


async def test_tangrams_claims_open_nothing_that_the_settings_grant() -> None:
    """Their ``id`` is a name that the topic's owner chose, not the subject of a token."""
    granted = [{"match": "user:{sub}", "rights": ["join"]}, {"match": "lobby", "rights": ["join"]}]
    auth, _ = make({"id": "alice", "channel": "room"}, auth={"tangram": True, "authenticated": granted})
    rights = (await auth.authenticate_token("t")).rights
    assert (rights.on("room"), rights.on("user:alice"), rights.on("lobby")) == (ALL, Right.NONE, Right.NONE)
    # A token with a subject has them, beside what it says.
    auth, _ = make({"sub": "alice"}, auth={"tangram": True, "authenticated": granted})
    assert (await auth.authenticate_token("t")).rights.on("user:alice") is Right.JOIN


async def test_tangrams_token_that_anybody_gets_permits_what_the_settings_say_now() -> None:
    topics = [
        {"match": "*", "rights": ["join"]},
        {"match": "system", "rights": ["push"]},
        {"match": "streaming-{sub}", "rights": ["presence"]},
    ]
    settings: dict[str, Any] = {"tangram": "open", "tangram_topics": topics}

    async def rights(claims: dict[str, Any], topic: str, **others: Any) -> Right:
        auth, _ = make({"id": "me", "open": True, **claims}, auth={**settings, **others})
        return (await auth.authenticate_token("t")).rights.on(topic)

    assert await rights({"channel": "system"}, "system") == Right.JOIN | Right.PUSH
    assert await rights({"channel": "room:*"}, "room:*") == Right.JOIN
    assert await rights({"channel": "room:*"}, "room:1") is Right.NONE
    # "admin" tells who has joined what: no pattern opens it.
    assert await rights({"channel": "admin"}, "admin") is Right.NONE
    named = {"match": "admin", "rights": ["join"]}
    assert await rights({"channel": "admin"}, "admin", tangram_topics=[*topics, named]) is Right.JOIN
    # {sub} is the id of a token, whoever gave it; a token for one topic opens that one beside its own.
    assert await rights({"channel": "system"}, "streaming-me") is Right.PRESENCE
    assert await rights({"channel": "system"}, "streaming-you") is Right.NONE
    assert await rights({"channel": "system", "open": False}, "streaming-me") is Right.PRESENCE
    # Settings that no longer give such tokens take back those that were given.
    assert await rights({"channel": "system"}, "system", tangram=True, tangram_topics=[]) is Right.NONE


@pytest.mark.parametrize("channel", ["", None, 7, ["lobby"], {"lobby": 1}])
async def test_tangrams_claims_without_a_topic_are_refused(channel: Any) -> None:
    auth, _ = make(
        {"id": "alice", "channel": channel},
        auth={"tangram": True, "authenticated": [{"match": "*", "rights": ["join"]}]},
    )
    error = await refusal(auth)
    assert (error.kind, '"channel"' in str(error)) == ("token claims", True)


@pytest.mark.parametrize(
    ("claims", "claim"),
    [
        ({"sub": ["alice"]}, "sub"),
        ({"sub": ""}, "sub"),
        ({"sub": 10**5000}, "sub"),
        ({"sub": "alice", "topics": 5}, "topics"),
        ({"sub": "alice", "topics": "room:*:join"}, "topics"),
        ({"sub": "alice", "topics": [["room", "join"]]}, "topics"),
        ({"sub": "alice", "topics": {"room:*": True}}, "topics"),
        ({"sub": "alice", "topics": {"room:*": ["join", 1]}}, "topics"),
        ({"sub": "alice", "topics": {"": ["join"]}}, "topics"),
        ({"sub": "alice", "exp": "soon"}, "exp"),
        ({"sub": "alice", "exp": float("nan")}, "exp"),
        ({"sub": "alice", "exp": float("inf")}, "exp"),
        ({"sub": "alice", "exp": 10**400}, "exp"),
    ],
)
async def test_refusal_names_the_claim_that_cannot_be_read(claims: Any, claim: str) -> None:
    auth, _ = make(claims)
    error = await refusal(auth)
    assert (error.kind, f'malformed: "{claim}": ' in str(error)) == ("token claims", True)


async def test_handshakes_do_not_wait_for_each_other() -> None:
    gate = asyncio.Event()

    async def slow(request: UpgradeRequest) -> Any:
        if request.token == "slow":
            await gate.wait()
        return {"sub": request.token}

    auth, _ = make(None, slow)
    waiting = asyncio.create_task(auth.authenticate_request(SCOPE, "slow"))
    fast = await auth.authenticate_request(SCOPE, "fast")
    assert fast.user == "fast" and not waiting.done()
    gate.set()
    assert (await waiting).user == "slow"
