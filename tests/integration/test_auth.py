"""Who gets in, over real sockets and on both ways to write: tokens, rights, expiry, renewal, and users sent away."""

import asyncio
import base64
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlencode

import httpx2 as httpx
import pytest
from redis.asyncio import Redis
from websockets.exceptions import InvalidStatus

from relay import Plugin, Refused, Relay, UpgradeRequest
from relay.auth.authenticator import Authenticator
from relay.auth.session import SocketAuth
from relay.auth.tokens import TokenVerifier
from relay.channels.socket import Socket
from relay.config_sections import AuthConfig
from relay.log import SUBJECT
from tests.support.client import Client
from tests.support.keys import EC_PRIVATE, EC_PUBLIC, OTHER_SECRET, RSA_PRIVATE, RSA_PUBLIC, SECRET, jwk, token
from tests.support.node import need_node, run_checks
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually, heard_on, http_get, metric, serve
from tests.support.session_app import session_app

Connect = Callable[..., Any]
ServeRelay = Callable[..., Any]

AUTH = {"keys": [SECRET], "leeway_s": 0}
REST = {"api_key": "operators-key"}
AS_OPERATOR = {"X-API-Key": "operators-key"}
ROOMS = {"room:*": "join,push"}


def with_token(made: str, name: str = "token") -> str:
    return urlencode({name: made})


async def refused(served: Served, **options: Any) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of a handshake that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with Client.connect(served.ws, **options):
            pass
    response = caught.value.response
    return response.status_code, (response.body or b"").decode(), dict(response.headers)


async def refuse_join(client: Client, topic: str, params: Any = None) -> str:
    """Join, expect an error, and return its reason."""
    ref = client.next_ref()
    await client.send(ref, ref, topic, "phx_join", params or {})
    reply = await client.receive()
    assert reply[:4] == [ref, ref, topic, "phx_reply"] and reply[4]["status"] == "error", reply
    return str(reply[4]["response"]["reason"])


# Tokens: four ways in.


def bearer_subprotocol(made: str) -> dict[str, Any]:
    text = base64.b64encode(made.encode()).decode().rstrip("=")
    return {"subprotocols": ["phoenix", f"base64url.bearer.phx.{text}"]}


WAYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "authToken": bearer_subprotocol,
    "params.token": lambda made: {"query": with_token(made)},
    "Authorization": lambda made: {"additional_headers": {"Authorization": f"Bearer {made}"}},
    "userToken": lambda made: {"query": with_token(made, "userToken")},
}


@pytest.mark.parametrize("way", WAYS)
async def test_token_is_taken_from_each_place(serve_relay: ServeRelay, connect: Connect, way: str) -> None:
    served = await serve_relay(auth=AUTH)
    client = await connect(served, **WAYS[way](token("alice", ROOMS)))
    join_ref = await client.join("room:1")
    assert (await client.push(join_ref, "room:1", "shout"))["status"] == "ok"
    (socket,) = served.relay.node.sockets.values()
    assert (socket.user, socket.claims["sub"]) == ("alice", "alice")
    status, text, headers = await refused(served, **WAYS[way](token(key=OTHER_SECRET)))
    assert (status, text) == (401, "the token is not signed with a key that is known here\n")
    assert headers["www-authenticate"] == "Bearer"


async def test_first_place_counts_where_tokens_differ(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(auth=AUTH)
    names = ("authToken", "params.token", "Authorization", "userToken")
    options: dict[str, Any] = {}
    expected = []
    for name in reversed(names):
        way = WAYS[name](token(name))
        query = "&".join(filter(None, (way.pop("query", ""), options.get("query", ""))))
        options = options | way | {"query": query}
        await connect(served, **options)
        expected.append(name)
        assert [socket.user for socket in served.relay.node.sockets.values()] == expected
    # A bad first one is not made good by a second.
    assert (await refused(served, query=f"token=bad&userToken={token()}"))[0] == 401


@pytest.mark.parametrize("key", ["RS256", "ES256"])
async def test_public_keys_check_tokens(serve_relay: ServeRelay, connect: Connect, key: str) -> None:
    served = await serve_relay(auth={"keys": [RSA_PUBLIC, EC_PUBLIC]})
    private = {"RS256": RSA_PRIVATE, "ES256": EC_PRIVATE}[key]
    client = await connect(served, query=with_token(token("alice", ROOMS, key=private, algorithm=key)))
    await client.join("room:1")


@pytest.mark.parametrize(
    ("options", "status", "kind", "text"),
    [
        ({}, 401, "no token", "expected a token"),
        ({"query": "token=x"}, 401, "token", "no JWT"),
        ({"query": with_token(token(ttl_s=-60))}, 401, "token expired", "expired"),
        (
            {"query": with_token(token(topics={"room:*": "rule"}))},
            401,
            "token claims",
            "expected join, push or presence",
        ),
        ({"query": with_token(token(aud="other"))}, 401, "token audience", "another audience"),
        ({"additional_headers": {"Authorization": "Basic eDp5"}}, 401, "no token", "expected a token"),
        ({"origin": "https://evil.example"}, 403, "origin", "may not connect"),
    ],
)
async def test_refusal_before_the_handshake_carries_status_and_reason(
    serve_relay: ServeRelay, options: Any, status: int, kind: str, text: str
) -> None:
    """On the wire, by ASGI's denial response."""
    served = await serve_relay(auth=AUTH)
    found = await refused(served, **options)
    assert found[0] == status and text in found[1]
    _, metrics = await http_get(f"{served.http}/metrics")
    assert metric(metrics, "relay_refused_total", kind="handshake", reason=kind.replace(" ", "_")) == 1


async def test_raw_client_reads_the_refusal(serve_relay: ServeRelay) -> None:
    served = await serve_relay(auth=AUTH)
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(
        b"GET /socket/websocket?vsn=2.0.0&token=no HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert head.startswith(b"http/1.1 401 unauthorized\r\n") and b"www-authenticate: bearer\r\n" in head
    assert b"the token is no JWT" in await reader.readline()
    writer.close()
    await writer.wait_closed()


# Published keys.


class KeyServer(ThreadingHTTPServer):
    """A JWKS address over HTTP."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.keys = list(keys)
        self.status = 200
        self.asked: list[tuple[str, str | None]] = []
        """What for, and with which ``Authorization``."""

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.asked.append((handler.path, handler.headers.get("authorization")))
                body = json.dumps({"keys": self.keys}).encode()
                handler.send_response(self.status)
                handler.send_header("content-length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            def log_message(handler, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/jwks"


@contextmanager
def published(*keys: dict[str, Any]) -> Iterator[KeyServer]:
    with KeyServer(*keys) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def key_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with published() as server:
        yield server


async def test_keys_are_fetched_from_their_address_and_rolled_over(
    serve_relay: ServeRelay, connect: Connect, key_server: KeyServer
) -> None:
    made = with_token(token("alice", ROOMS, key=RSA_PRIVATE, algorithm="RS256", kid="a"))
    served = await serve_relay(auth={"jwks_url": key_server.url, "jwks_retry_s": 0.001})
    assert (await refused(served, query=made))[0] == 503
    key_server.keys = [jwk(RSA_PUBLIC, "a")]
    await (await connect(served, query=made)).join("room:1")
    key_server.keys = [jwk(EC_PUBLIC, "b")]
    newer = with_token(token("alice", ROOMS, key=EC_PRIVATE, algorithm="ES256", kid="b"))
    await (await connect(served, query=newer)).join("room:1")
    assert (await refused(served, query=made))[0] == 401
    key_server.status = 500
    await (await connect(served, query=newer)).join("room:1")


async def test_address_of_keys_is_asked_with_its_password_and_through_the_proxy_of_the_environment(
    key_server: KeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_server.keys = [jwk(RSA_PUBLIC, "a")]
    made = token("alice", key=RSA_PRIVATE, algorithm="RS256", kid="a")
    monkeypatch.setenv("HTTP_PROXY", f"127.0.0.1:{key_server.server_port}")
    for host in (f"127.0.0.1:{key_server.server_port}", "login.example.org"):
        verifier = TokenVerifier(AuthConfig(jwks_url=f"http://us%40er:p:w@{host}/jwks?apikey=a%20b"), ())
        assert (await verifier.verify(made))["sub"] == "alice"
        await verifier.close()
    authorization = "Basic " + base64.b64encode(b"us@er:p:w").decode()
    paths = ["/jwks?apikey=a%20b", "http://login.example.org/jwks?apikey=a%20b"]
    assert key_server.asked == [(path, authorization) for path in paths]


# Rights.


async def test_token_for_one_topic_never_opens_another(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(auth=AUTH)
    client = await connect(served, query=with_token(token("alice", {"room:1": "join,push"})))
    for topic in ("room:2", "room:12", "room:1:x", "room", "Room:1", "*", "room:*", "system"):
        assert await refuse_join(client, topic) == "unauthorized"
    join_ref = await client.join("room:1")
    assert (await client.push(join_ref, "room:1", "shout"))["status"] == "ok"
    _, metrics = await http_get(f"{served.http}/metrics")
    assert metric(metrics, "relay_refused_total", kind="socket", reason="unauthorized") == 8


async def test_joining_does_not_allow_to_push(serve_relay: ServeRelay, connect: Connect, redis: Redis) -> None:
    asked = []
    plugin = Plugin("curious")

    @plugin.on_push("*")
    async def push(push: Any) -> None:
        asked.append(push.event)

    @plugin.on_join("*")
    async def join(join: Any) -> None:
        asked.append(join.topic)

    served = await serve_relay(auth=AUTH, extra_plugins=(plugin,))
    client = await connect(served, query=with_token(token("alice", {"room:*": "join", "chat:*": "push"})))
    join_ref = await client.join("room:1")
    reply = await client.push(join_ref, "room:1", "shout")
    assert reply == {"status": "error", "response": {"reason": "unauthorized"}}
    assert await refuse_join(client, "chat:1") == "unauthorized"
    assert asked == ["room:1"], "plugins are asked after that"


async def test_settings_give_rights_to_those_without_and_to_all_with_a_token(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    served = await serve_relay(
        allow_anonymous=True,
        auth={
            **AUTH,
            "anonymous": [{"match": "public:*", "rights": ["join"]}],
            "authenticated": [{"match": "user:{sub}", "rights": ["join", "push"]}],
        },
    )
    nobody = await connect(served)
    join_ref = await nobody.join("public:1")
    assert (await nobody.push(join_ref, "public:1", "x"))["status"] == "error"
    assert await refuse_join(nobody, "user:") == "unauthorized"
    assert await refuse_join(nobody, "user:alice") == "unauthorized"
    alice = await connect(served, query=with_token(token("alice", {"room:{sub}:*": "join"})))
    join_ref = await alice.join("user:alice")
    assert (await alice.push(join_ref, "user:alice", "x"))["status"] == "ok"
    await alice.join("room:alice:1")
    for topic in ("user:bob", "room:bob:1", "public:1"):
        assert await refuse_join(alice, topic) == "unauthorized"
    star = await connect(served, query=with_token(token("*")))
    assert await refuse_join(star, "user:alice") == "unauthorized"


async def test_without_auth_everything_is_allowed_and_tokens_are_ignored(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    served = await serve_relay()
    client = await connect(served, query="token=anything")
    join_ref = await client.join("room:1", {"token": "anything"})
    assert (await client.push(join_ref, "room:1", "shout"))["status"] == "ok"


# A function of the team's own.


async def answering(answer: Any) -> Any:
    if isinstance(answer, BaseException):
        raise answer
    return answer


@pytest.mark.parametrize("plain", [False, True])
async def test_function_says_who_it_is(serve_relay: ServeRelay, connect: Connect, plain: bool) -> None:
    seen: list[UpgradeRequest] = []

    def decide(request: UpgradeRequest) -> Any:
        seen.append(request)
        if request.token == "evil":
            raise Refused("you are banned")
        return {"sub": 7, "topics": ROOMS} if request.token else None

    async def decide_later(request: UpgradeRequest) -> Any:
        return decide(request)

    served = await serve_relay(authenticate=decide if plain else decide_later, allow_anonymous=True)
    client = await connect(
        served, query="token=t&x=1", additional_headers={"Cookie": "theme=dark", "X-Test": "yes"}, origin=served.http
    )
    await client.join("room:1")
    assert [socket.user for socket in served.relay.node.sockets.values()] == ["7"]
    (request,) = seen
    assert (request.headers["x-test"], request.cookies, request.query_params["x"]) == ("yes", {"theme": "dark"}, "1")
    assert request.client is not None and request.client.host == "127.0.0.1"
    nobody = await connect(served)
    assert await refuse_join(nobody, "room:1") == "unauthorized"
    assert (await refused(served, query="token=evil"))[:2] == (403, "you are banned\n")


@pytest.mark.parametrize(
    "answer", [RuntimeError("secret inside"), True, "alice", {}, {"sub": ""}, {"sub": None}, {"sub": ["a"]}]
)
async def test_fault_in_the_function_lets_nobody_in(
    serve_relay: ServeRelay, answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def faulty(request: UpgradeRequest) -> Any:
        return await answering(answer)

    served = await serve_relay(authenticate=faulty, allow_anonymous=True)
    assert (await refused(served))[:2] == (503, "authentication has failed; try again\n")
    assert "plugin authenticate" in caplog.text
    assert served.relay.metrics.refused["handshake: authenticate failed"] == 1


async def test_function_that_hangs_lets_nobody_in(serve_relay: ServeRelay) -> None:
    async def hanging(request: UpgradeRequest) -> Any:
        await asyncio.Event().wait()

    served = await serve_relay(authenticate=hanging, allow_anonymous=True, plugins={"timeout_s": 0.05})
    assert (await refused(served))[0] == 503


async def test_function_is_asked_after_the_token_was_checked(serve_relay: ServeRelay, connect: Connect) -> None:
    """It may add to what the token says; None leaves it as it is."""

    async def add(request: UpgradeRequest) -> Any:
        assert request.claims is not None
        if request.claims["sub"] == "bob":
            raise Refused("banned")
        return {**request.claims, "topics": ROOMS} if request.claims["sub"] == "carol" else None

    served = await serve_relay(authenticate=add, auth=AUTH)
    alice = await connect(served, query=with_token(token("alice", {"a": "join"})))
    await alice.join("a")
    carol = await connect(served, query=with_token(token("carol")))
    await carol.join("room:1")
    assert (await refused(served, query=with_token(token("bob"))))[0] == 403
    assert (await refused(served, query=with_token(token("alice", key=OTHER_SECRET))))[0] == 401


async def test_fastapis_logged_in_user_is_known_by_session(direct: bool) -> None:
    app, relay = session_app()
    async with serve(relay, app=app, prefix="/relay", direct=direct) as served:
        base = served.http.removesuffix("/relay")
        async with httpx.AsyncClient(trust_env=False) as browser:
            await browser.post(f"{base}/login/ada")
            cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        async with Client.connect(served.ws, additional_headers={"Cookie": cookie}) as client:
            await client.join("user:ada")
            assert await refuse_join(client, "user:bob") == "unauthorized"
            # A session is good at the handshake alone: nothing renews by it.
            reply = await client.push(None, "user:ada", "access_token", {"access_token": "anything"})
            assert reply == {"status": "error", "response": {"reason": "invalid token"}}
        assert (await refused(served))[0] == 401
        assert (await refused(served, additional_headers={"Cookie": cookie[:-3]}))[0] == 401
        # A page of somebody else's, in the visitor's browser, with the visitor's cookies.
        evil = await refused(served, additional_headers={"Cookie": cookie}, origin="https://evil.example")
        assert evil[0] == 403


# Whose a topic is.


@pytest.mark.parametrize("owner", ["alice", None])
async def test_handlers_are_told_whose_token_opened_the_topic(
    serve_relay: ServeRelay, connect: Connect, caplog: pytest.LogCaptureFixture, owner: str | None
) -> None:
    """A join's own token says who acts there, in the log too; elsewhere the socket's does."""
    caplog.set_level(logging.INFO)
    told: list[tuple[str, str, str | None, object]] = []
    plugin = Plugin("curious")

    def note(kind: str, what: Any) -> None:
        logging.getLogger("relay.curious").info(json.dumps([kind, SUBJECT.get().user]))  # type: ignore[union-attr]
        told.append((kind, what.topic, what.user, what.claims.get("role")))
        assert what.socket.user == owner

    @plugin.on_join("room:*")
    async def join(join: Any) -> None:
        note("join", join)
        if "refuse" in join.payload:
            raise Refused("not now")

    @plugin.on_push("room:*")
    def push(push: Any) -> None:  # in a thread
        note("push", push)

    @plugin.on_leave("room:*")
    async def leave(leave: Any) -> None:
        note("leave", leave)

    grants = [{"match": "room:*", "rights": ["join", "push"]}]
    served = await serve_relay(auth={**AUTH, "anonymous": grants}, allow_anonymous=True, extra_plugins=(plugin,))
    query = with_token(token(owner, ROOMS, role="guest")) if owner else ""
    client = await connect(served, query=query)
    bobs = {"token": token("bob", ROOMS, role="admin")}
    assert await refuse_join(client, "room:3", {"refuse": True, **bobs}) == "not now"
    for topic, params in (("room:1", bobs), ("room:2", None)):
        assert (await client.push(await client.join(topic, params), topic, "shout"))["status"] == "ok"
    own = (owner, "guest" if owner else None)
    await served.relay.kick("room:1", user="bob")
    assert (await client.receive())[2:4] == ["room:1", "phx_close"]
    await client.send(None, client.next_ref(), "room:2", "phx_leave", {})
    await eventually(lambda: len(told) == 7, "all to be told")
    bob, me = ("bob", "admin"), own
    assert [entry[:2] for entry in told if entry[2:] == bob] == [
        ("join", "room:3"),
        ("join", "room:1"),
        ("push", "room:1"),
        ("leave", "room:1"),
    ]
    assert [entry[:2] for entry in told if entry[2:] == me] == [(kind, "room:2") for kind in ("join", "push", "leave")]
    about = [json.loads(record.message) for record in caplog.records if record.name == "relay.curious"]
    assert about == [[kind, user] for kind, _, user, _ in told]
    (refusal,) = [record.message for record in caplog.records if "join of 'room:3' refused" in record.message]
    assert refusal.endswith("user 'bob'")


# The end of a token, and its renewal.


async def test_expired_token_ends_topics_by_phx_error_and_then_the_socket(
    serve_relay: ServeRelay, connect: Connect
) -> None:
    served = await serve_relay(auth={**AUTH, "expiry_grace_s": 1 * PATIENCE})
    client = await connect(served, query=with_token(token("alice", ROOMS, ttl_s=2 * PATIENCE)))
    refs = {topic: await client.join(topic) for topic in ("room:1", "room:2")}
    for topic, ref in refs.items():
        assert await client.receive() == [ref, ref, topic, "phx_error", {"reason": "token expired"}]
    assert await refuse_join(client, "room:1") == "token expired"
    code, reason = await client.expect_closed()
    assert code == 1008 and "expired" in reason
    await eventually(lambda: served.relay.metrics.refused["token expired"] == 3, "the refusals to be counted")


def expire(socket: Socket) -> None:
    """Let a socket's identity expire now: a token of a second may have expired before a busy machine has connected."""
    assert socket.auth is not None
    socket.auth.identity = replace(socket.auth.identity, expires_at=time.monotonic())
    socket.auth._look()


async def test_new_token_in_a_joins_params_renews_an_expired_socket(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(auth={**AUTH, "expiry_grace_s": 3})
    for name in ("token", "access_token"):
        client = await connect(served, query=with_token(token("alice", ROOMS)))
        ref = await client.join("room:1")
        *_, socket = served.relay.node.sockets.values()
        expire(socket)
        assert (await client.receive())[:4] == [ref, ref, "room:1", "phx_error"]
        assert await refuse_join(client, "room:1", {"access_token": token("bob", ROOMS)}) == "token of another user"
        await client.join("room:1", {name: token("alice", ROOMS)})
        await client.join("room:2")
        assert not socket.auth.identity.is_expired(time.monotonic() + 30)


async def test_access_token_renews_in_place_and_nobody_else_sees_it(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    """Supabase's way; what is no longer allowed is closed for good."""
    seen = []
    plugin = Plugin("curious")

    @plugin.on_push("*")
    async def push(push: Any) -> None:
        seen.append(push.event)

    served = await serve_relay(auth=AUTH, extra_plugins=(plugin,))
    async with heard_on(valkey.url, "from:own:*") as hear:
        client = await connect(served, query=with_token(token("alice", {"own:*": "join,push"}, ttl_s=60)))
        one, two = await client.join("own:1"), await client.join("own:2")
        renewed = token("alice", {"own:1": "join"}, ttl_s=60)
        ref = client.next_ref()
        await client.send(one, ref, "own:1", "access_token", {"access_token": renewed})
        assert await client.receive() == [two, two, "own:2", "phx_close", {}]
        assert await client.receive() == client.reply(one, ref, "own:1")
        assert (await client.push(one, "own:1", "shout"))["response"] == {"reason": "unauthorized"}
        assert await refuse_join(client, "own:2") == "unauthorized"
        for bad, reason in (
            (token("bob", ROOMS), "token of another user"),
            (token(None, ROOMS), "token of another user"),
            (token("alice", key=OTHER_SECRET), "invalid token"),
            (token("alice", ttl_s=-5), "token expired"),
            (None, "invalid token"),
            (7, "invalid token"),
        ):
            reply = await client.push(one, "own:1", "access_token", {"access_token": bad})
            assert reply == {"status": "error", "response": {"reason": reason}}
        again = token("alice", {"own:*": "join,push"})
        assert (await client.push(one, "own:1", "access_token", {"access_token": again}))["status"] == "ok"
        assert (await client.push(one, "own:1", "last"))["status"] == "ok"
        assert await hear() == ("from:own:1:last", b"{}")
    assert seen == ["last"]


async def test_without_auth_an_access_token_goes_nowhere_either(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    served = await serve_relay()
    async with heard_on(valkey.url, "from:plain:*") as hear:
        client = await connect(served)
        ref = await client.join("plain:1")
        assert (await client.push(ref, "plain:1", "access_token", {"access_token": "x"}))["status"] == "ok"
        await client.push(ref, "plain:1", "last")
        assert (await hear())[0] == "from:plain:1:last"


async def test_token_of_a_join_is_for_that_join_alone(serve_relay: ServeRelay, connect: Connect) -> None:
    """tangram's way; and it expires by itself, without the socket."""
    served = await serve_relay(auth={**AUTH, "expiry_grace_s": 0.1}, allow_anonymous=True)
    client = await connect(served)
    assert await refuse_join(client, "room:1") == "unauthorized"
    assert await refuse_join(client, "room:1", {"token": token("bob", {"room:2": "join"})}) == "unauthorized"
    ref = await client.join("room:1", {"token": token("bob", ROOMS, ttl_s=2 * PATIENCE)})
    assert await refuse_join(client, "room:2") == "unauthorized"
    assert (await client.push(ref, "room:1", "shout"))["status"] == "ok"
    assert await client.receive() == [ref, ref, "room:1", "phx_error", {"reason": "token expired"}]
    assert await refuse_join(client, "room:1", {"token": "bad"}) == "invalid token"
    await client.expect_alive()


async def test_join_that_takes_longer_than_its_token_is_refused(serve_relay: ServeRelay, connect: Connect) -> None:
    plugin = Plugin("slow")
    expired = asyncio.Event()

    @plugin.on_join("room:*")
    async def join(join: Any) -> None:
        await expired.wait()

    served = await serve_relay(auth={**AUTH, "expiry_grace_s": 5}, extra_plugins=(plugin,))
    client = await connect(served, query=with_token(token("alice", ROOMS, ttl_s=2 * PATIENCE)))
    await client.send("1", "1", "room:1", "phx_join", {})
    (socket,) = served.relay.node.sockets.values()
    await eventually(lambda: socket.auth.identity.is_expired(time.monotonic()), "the end of the token")
    expired.set()
    assert await client.receive() == client.refusal("1", "1", "room:1", "token expired")
    assert served.relay.topics == {}


class WallClock:
    """The time of day as the process sees it, ``step_s`` off; by whatever name the relay reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step_s = 0.0
        self._real = time.time
        monkeypatch.setattr(time, "time", self)
        for function in (Authenticator.__init__, SocketAuth.__init__):
            found: Any = function.__defaults__
            mine = tuple(self if each is self._real else each for each in found)
            monkeypatch.setattr(function, "__defaults__", mine)

    def __call__(self) -> float:
        return self._real() + self.step_s


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
async def test_step_of_the_wall_clock_neither_ends_nor_prolongs_a_token(
    serve_relay: ServeRelay, connect: Connect, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    clock = WallClock(monkeypatch)
    served = await serve_relay(auth={**AUTH, "expiry_grace_s": 0.1})
    client = await connect(served, query=with_token(token("alice", ROOMS, ttl_s=2 * PATIENCE)))
    ref = await client.join("room:1")
    clock.step_s = step_s
    assert (await client.push(ref, "room:1", "shout"))["status"] == "ok"
    other = await client.join("room:2")
    for topic, join_ref in (("room:1", ref), ("room:2", other)):
        assert await client.receive() == [join_ref, join_ref, topic, "phx_error", {"reason": "token expired"}]
    assert (await client.expect_closed())[0] == 1008


# Sending users away, on every node.


@asynccontextmanager
async def two_nodes(**settings: Any) -> AsyncIterator[tuple[Served, Served]]:
    async with AsyncExitStack() as stack:
        relays = [Relay(system_topic=False, auth=AUTH, **settings) for _ in range(2)]
        one, two = [await stack.enter_async_context(serve(relay)) for relay in relays]
        yield one, two


async def test_user_is_kicked_and_disconnected_on_every_node(valkey: Valkey) -> None:
    alice, bob = (with_token(token(name, ROOMS)) for name in ("alice", "bob"))
    async with two_nodes(redis_url=valkey.url) as (one, two), AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(Client.connect(served.ws, query=query))
            for served, query in ((one, alice), (two, alice), (two, bob))
        ]
        refs = [(await client.join("room:1"), await client.join("room:2")) for client in clients]
        await one.relay.kick("room:1", user="alice")
        for client, (ref, _) in zip(clients[:2], refs, strict=False):
            assert await client.receive() == [ref, ref, "room:1", "phx_close", {}]
            await client.expect_alive()
        await clients[0].join("room:1")  # it is no ban
        await two.relay.disconnect(user="alice", reason="bye")
        for client in clients[:2]:
            assert await client.expect_closed() == (1001, "bye")
        await clients[2].expect_alive()
        assert (one.relay.metrics.disconnects_by_control, two.relay.metrics.disconnects_by_control) == (2, 2)


async def test_user_is_sent_away_with_the_memory_bus_too(connect: Connect, serve_relay: ServeRelay) -> None:
    served = await serve_relay(broadcast_url="memory://", auth=AUTH)
    client = await connect(served, query=with_token(token("alice", ROOMS)))
    ref = await client.join("room:1")
    await served.relay.kick("room:1", user="alice")
    assert await client.receive() == [ref, ref, "room:1", "phx_close", {}]
    await served.relay.disconnect(user="alice")
    assert (await client.expect_closed())[0] == 1001


async def test_rest_sends_users_away(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(auth=AUTH, rest=REST)
    client = await connect(served, query=with_token(token("auth0|a/b", ROOMS)))
    ref = await client.join("room:1/2")
    async with httpx.AsyncClient(trust_env=False, base_url=f"{served.http}/api", headers=AS_OPERATOR) as api:
        assert (await api.delete("/topics/room:1%2F2/users/auth0%7Ca%2Fb")).status_code == 204
        assert await client.receive() == [ref, ref, "room:1/2", "phx_close", {}]
        (socket_id,) = served.relay.node.sockets
        assert (await api.get(f"/sockets/{socket_id}")).json()["user"] == "auth0|a/b"
        assert (await api.delete("/users/auth0%7Ca%2Fb")).status_code == 204
        assert (await client.expect_closed())[0] == 1001
        assert (await api.delete("/users/nobody")).status_code == 204
        assert (await api.delete("/users/x", headers={"X-API-Key": "another"})).status_code == 401


async def test_user_is_sent_away_from_every_process(valkey: Valkey) -> None:
    """Two workers and a relay of its own, on one Redis; whichever process is asked, all carry it out."""
    environ = {"RELAY_AUTH__KEYS": json.dumps([SECRET]), "RELAY_REST": json.dumps(REST)}
    url = ("--redis-url", valkey.url)
    with RelayProcess(*url, "--workers", "2", environ=environ) as two, RelayProcess(*url, environ=environ) as one:
        async with AsyncExitStack() as stack, httpx.AsyncClient(trust_env=False, headers=AS_OPERATOR) as api:
            clients = [
                await stack.enter_async_context(Client.connect(relay.ws, query=with_token(token("alice", ROOMS))))
                for relay in (one, *[two] * 8)
            ]
            for client in clients:
                await client.join("room:1")
            bob = await stack.enter_async_context(Client.connect(two.ws, query=with_token(token("bob", ROOMS))))
            assert (await api.delete(f"{two.http}/api/users/alice")).status_code == 204
            for client in clients:
                assert (await client.expect_closed())[0] == 1001
            await bob.expect_alive()


async def test_control_message_that_cannot_be_published_is_applied_here_and_logged(
    connect: Connect, direct: bool
) -> None:
    with Valkey() as own:
        relay = Relay(redis_url=own.url, system_topic=False, auth=AUTH, rest=REST)
        async with serve(relay, direct=direct) as served:
            client = await connect(served, query=with_token(token("alice", ROOMS)))
            await client.join("room:1")
            own.kill()
            await eventually(lambda: not relay.link.live, "the loss of the link")
            async with httpx.AsyncClient(trust_env=False, headers=AS_OPERATOR) as api:
                answer = await api.delete(f"{served.http}/api/users/alice")
            assert answer.status_code == 503 and "publishing to the other nodes failed" in answer.json()["detail"]
            assert (await client.expect_closed())[0] == 1001


async def test_malformed_control_message_is_dropped_and_counted(
    serve_relay: ServeRelay, connect: Connect, redis: Redis
) -> None:
    served = await serve_relay(auth=AUTH)
    client = await connect(served, query=with_token(token("alice", ROOMS)))
    before = served.relay.metrics.dropped["control message not understood"]
    for data in (
        b"",
        b"\xff",
        b'{"do":"reboot","user":"alice","sender":"x"}',
        b'{"do":"kick","user":"a","sender":"x"}',
    ):
        await redis.publish("relay:control", data)
    await eventually(
        lambda: served.relay.metrics.dropped["control message not understood"] == before + 4,
        "the count of what was none",
    )
    await client.expect_alive()
    await redis.publish("relay:control", '{"do":"disconnect","user":"alice","sender":"a script"}')
    assert (await client.expect_closed())[0] == 1001


# tangram.


async def test_tangrams_token_opens_its_channel_and_no_other(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(auth={**AUTH, "tangram": True}, allow_anonymous=True, rest=REST)
    async with httpx.AsyncClient(trust_env=False, headers=AS_OPERATOR) as api:
        made = (await api.post(f"{served.http}/token", json={"channel": "room:*", "id": "me"})).json()
        given = (await api.post(f"{served.http}/token", json={"channel": "room:2"})).json()
        for body, status in ((b"{}", 422), (b"no", 422), (b'{"channel":""}', 422)):
            assert (await api.post(f"{served.http}/token", content=body)).status_code == status
        assert (await api.get(f"{served.http}/token")).status_code == 405
    assert (made["channel"], made["id"], len(given["id"])) == ("room:*", "me", 8)
    client = await connect(served, query=with_token(made["token"], "userToken"))
    await client.join("room:*")
    assert await refuse_join(client, "room:1") == "unauthorized"
    ref = await client.join("room:2", {"token": given["token"]})
    assert (await client.push(ref, "room:2", "x"))["status"] == "ok"
    (socket,) = served.relay.node.sockets.values()
    assert socket.user == "me"


async def test_tangrams_tokens_and_route_are_off_by_default(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(auth=AUTH)
    async with httpx.AsyncClient(trust_env=False) as api:
        assert (await api.post(f"{served.http}/token", json={"channel": "x"})).status_code == 404
    client = await connect(served, query=with_token(token(None, id="me", channel="room:1")))
    assert await refuse_join(client, "room:1") == "unauthorized"


async def test_token_route_asks_for_the_key_and_without_one_answers_nobody(serve_relay: ServeRelay) -> None:
    body = {"channel": "room:1"}
    async with httpx.AsyncClient(trust_env=False) as api:
        keyed = await serve_relay(auth={**AUTH, "tangram": True}, rest=REST)
        assert (await api.post(f"{keyed.http}/token", json=body)).status_code == 401
        assert (await api.post(f"{keyed.http}/token", json=body, headers=AS_OPERATOR)).status_code == 200
        keyless = await serve_relay(auth={**AUTH, "tangram": True})
        assert (await api.post(f"{keyless.http}/token", json=body, headers=AS_OPERATOR)).status_code == 403


async def test_nobody_operates_a_relay_that_asks_who_somebody_is_without_a_key(serve_relay: ServeRelay) -> None:
    """All its clients may come from a proxy on this machine that writes no header of its own."""
    served = await serve_relay(auth=AUTH)
    async with httpx.AsyncClient(trust_env=False) as api:
        answers = [await api.get(f"{served.http}/api/topics"), await api.get(f"{served.http}/console/access")]
        answers.append(await api.post(f"{served.http}/api/publish", json={"topic": "room:1", "event": "x"}))
    assert [answer.status_code for answer in answers] == [403] * 3
    assert all("set rest.api_key" in answer.json()["detail"] for answer in answers)


# The published client.


@pytest.mark.parametrize("client", ["phoenix-1.8", "phoenix-1.7"])
def test_phoenix_js_renews_by_rejoining_and_by_reconnecting(client: str) -> None:
    """Params functions are asked at each join, ``authToken`` at each connection; after a kick nothing is asked."""
    need_node()
    environ = {
        "RELAY_AUTH": json.dumps({"keys": [SECRET], "leeway_s": 0, "expiry_grace_s": 1 * PATIENCE}),
        "RELAY_ALLOWED_ORIGINS": "any",
        "RELAY_REST__API_KEY": "operators-key",
    }
    with RelayProcess(environ=environ) as relay:
        run_checks("auth-node.mjs", client, relay.ws, relay.http, SECRET)
