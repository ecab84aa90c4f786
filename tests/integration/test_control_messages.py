"""What is under way when a subscription ends, or when a control message for its user comes: pushes that wait, joins and
handshakes that are being decided. Over real sockets, on both ways to write."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from typing import Any

import httpx2 as httpx
import pytest
from redis.asyncio import Redis
from websockets.exceptions import InvalidStatus

from relay import Plugin, Relay
from relay.brokers.broadcaster import BroadcasterBroker
from relay.transports.handshake import accept
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.serving import Served, eventually, heard_on, serve

Connect = Callable[..., Any]
ServeRelay = Callable[..., Any]

AUTH = {"keys": [SECRET], "leeway_s": 0}
ROOMS = {"room:*": "join,push"}
ENDED = "subscription ended"
REMOVED = "removed by the server"


class Gate:
    """A handler's place to wait: it says that it has begun, and goes on when it is opened."""

    def __init__(self) -> None:
        self.begun = 0
        self.opened = asyncio.Event()

    async def pass_through(self) -> None:
        self.begun += 1
        await self.opened.wait()

    async def wait_begun(self, times: int = 1) -> None:
        await eventually(lambda: self.begun >= times, "what waits at the gate")


def query(user: str = "alice", topics: Any = ROOMS, **options: Any) -> str:
    return f"token={token(user, topics, **options)}"


class Pushing:
    """A relay with a handler of pushes at a gate, a client with pushes behind it, and what comes out on Redis."""

    def __init__(self, gate: Gate, handled: list[int]) -> None:
        self.gate = gate
        self.handled = handled
        self.served: Served
        self.client: Client
        self.join_ref: Any

    @property
    def refused(self) -> Any:
        return self.served.relay.metrics.refused

    async def push(self, numbers: range) -> None:
        for number in numbers:
            await self.client.send(self.join_ref, str(number), "room:1", "msg", {"i": number})
        await self.gate.wait_begun()
        metrics = self.served.relay.metrics
        (socket,) = self.served.relay.node.sockets.values()
        await eventually(lambda: socket.queue.pending == len(numbers), "all pushes to have come")
        assert metrics.pushes_in == 1, "the others wait for their turn"


async def make(serve_relay: ServeRelay, connect: Connect, **settings: Any) -> Pushing:
    gate, handled, plugin = Gate(), list[int](), Plugin("slow")

    @plugin.on_push("room:*", "msg")
    async def handle(push: Any) -> None:
        handled.append(push.payload["i"])
        await gate.pass_through()

    pushing = Pushing(gate, handled)
    own = settings.pop("query", None) or query()
    pushing.served = await serve_relay(auth=AUTH, extra_plugins=(plugin,), **settings)
    pushing.client = await connect(pushing.served, query=own)
    pushing.join_ref = await pushing.client.join("room:1")
    return pushing


@asynccontextmanager
async def nothing_published(valkey: Valkey, pushing: Pushing) -> AsyncIterator[None]:
    """Nothing of the client's comes out on Redis during the block, nor after it."""
    async with heard_on(valkey.url, "from:*") as hear, Redis.from_url(valkey.url) as redis:
        yield
        await eventually(lambda: not pushing.served.relay.node.connections.left_behind, "the handlers' end")
        await redis.publish("from:room:1:last", b"{}")
        channel, _ = await hear()
        while channel != "from:room:1:last":
            assert not channel.startswith("from:room:1:"), channel
            channel, _ = await hear()


# Pushes that wait.


async def test_pushes_that_wait_fall_with_a_disconnected_user(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    pushing = await make(serve_relay, connect)
    async with nothing_published(valkey, pushing):
        await pushing.push(range(20))
        await pushing.served.relay.disconnect(user="alice", reason="banned")
        assert pushing.refused[ENDED] == 19, "they are dropped at once, and counted"
        assert await pushing.client.expect_closed() == (1001, "banned")
        pushing.gate.opened.set()
        await eventually(lambda: pushing.refused[ENDED] == 20, "the one under way to be stopped")
    assert pushing.handled == [0]


@pytest.mark.parametrize("code", [1001, 1008, 1013])
async def test_pushes_that_wait_fall_with_a_socket_that_the_relay_closes(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey, code: int
) -> None:
    pushing = await make(serve_relay, connect)
    async with nothing_published(valkey, pushing):
        await pushing.push(range(5))
        (socket,) = pushing.served.relay.node.sockets.values()
        assert socket.close(code, "enough")
        assert await pushing.client.expect_closed() == (code, "enough")
        pushing.gate.opened.set()
        await eventually(lambda: pushing.refused[ENDED] == 5, "the count of all")
    assert pushing.handled == [0]


async def test_pushes_that_wait_fall_with_an_idle_socket(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    pushing = await make(serve_relay, connect, limits={"idle_timeout_s": 0.5 * PATIENCE})
    async with nothing_published(valkey, pushing):
        await pushing.push(range(5))
        assert (await pushing.client.expect_closed())[0] == 1001
        pushing.gate.opened.set()
        await eventually(lambda: pushing.refused[ENDED] == 5, "the count of all")
    assert pushing.handled == [0]


async def test_pushes_that_wait_fall_with_a_token_that_is_not_renewed(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    pushing = await make(serve_relay, connect, query=query(ttl_s=3 * PATIENCE))
    async with nothing_published(valkey, pushing):
        await pushing.push(range(5))
        await eventually(lambda: pushing.refused["token expired"], "the end of the token")
        pushing.gate.opened.set()
        await eventually(lambda: pushing.refused["unmatched topic"] == 4, "the others to be refused")
    assert (pushing.handled, pushing.refused[ENDED]) == ([0], 1)


async def test_kicked_users_pushes_are_refused_and_the_one_under_way_is_stopped(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    pushing = await make(serve_relay, connect)
    async with nothing_published(valkey, pushing):
        await pushing.push(range(5))
        await pushing.served.relay.kick("room:1", user="alice")
        assert await pushing.client.receive() == [pushing.join_ref, pushing.join_ref, "room:1", "phx_close", {}]
        pushing.gate.opened.set()
        for number in range(1, 5):
            assert await pushing.client.receive() == pushing.client.refusal(
                None, str(number), "room:1", "unmatched topic"
            )
        assert (pushing.refused[ENDED], pushing.refused["unmatched topic"]) == (1, 4)
    assert pushing.handled == [0]


async def test_push_under_way_when_events_may_have_been_missed_is_not_published(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    pushing = await make(serve_relay, connect)
    async with nothing_published(valkey, pushing):
        await pushing.push(range(2))
        pushing.served.relay.node.pubsub.on_gap("a test")
        assert (await pushing.client.receive())[3] == "phx_error"
        pushing.gate.opened.set()
        assert (await pushing.client.receive())[4]["response"] == {"reason": "unmatched topic"}
    assert (pushing.handled, pushing.refused[ENDED]) == ([0], 1)


async def test_handler_that_sends_its_socket_away_lets_nothing_more_pass(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    plugin = Plugin("strict")
    handled = []

    @plugin.on_push("room:*")
    async def first(push: Any) -> None:
        push.socket.disconnect("enough")

    @plugin.on_push("room:*")
    async def second(push: Any) -> None:
        handled.append(push.event)

    served = await serve_relay(auth=AUTH, extra_plugins=(plugin,))
    client = await connect(served, query=query())
    ref = await client.join("room:1")
    async with heard_on(valkey.url, "from:room:1:*") as hear, Redis.from_url(valkey.url) as redis:
        await client.send(ref, "1", "room:1", "msg", {})
        assert (await client.expect_closed())[0] == 1001
        await redis.publish("from:room:1:last", b"{}")
        assert (await hear())[0] == "from:room:1:last"
    assert (handled, served.relay.metrics.refused[ENDED]) == ([], 1)


async def test_right_to_push_is_asked_again_after_the_handlers(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    """A token with fewer rights, taken meanwhile by a join to another topic."""
    pushing = await make(serve_relay, connect)
    async with nothing_published(valkey, pushing):
        await pushing.push(range(2))
        await pushing.client.join("room:2", {"access_token": token("alice", {"room:*": "join"})})
        pushing.gate.opened.set()
        for number in "01":
            refusal = pushing.client.refusal(pushing.join_ref, number, "room:1", "unauthorized")
            assert await pushing.client.receive() == refusal
    assert pushing.handled == [0]


async def test_what_a_client_sent_before_it_left_is_handled(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    pushing = await make(serve_relay, connect)
    async with heard_on(valkey.url, "from:room:1:*") as hear:
        await pushing.push(range(3))
        await pushing.client.connection.close()
        await eventually(lambda: not pushing.served.relay.node.sockets, "the socket's end")
        pushing.gate.opened.set()
        assert [(await hear())[1] for _ in range(3)] == [b'{"i": %d}' % number for number in range(3)]
    assert pushing.refused[ENDED] == 0


async def test_pushes_before_a_restart_are_handled(serve_relay: ServeRelay, connect: Connect, valkey: Valkey) -> None:
    pushing = await make(serve_relay, connect)
    async with heard_on(valkey.url, "from:room:1:*") as hear:
        await pushing.push(range(3))
        pushing.served.relay.node.drain()
        assert (await pushing.client.expect_closed())[0] == 1012
        pushing.gate.opened.set()
        assert [(await hear())[1] for _ in range(3)] == [b'{"i": %d}' % number for number in range(3)]


@pytest.mark.parametrize("action", ["disconnect", "kick"])
async def test_control_message_reaches_what_a_socket_has_left_behind(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey, action: str
) -> None:
    """Who pushes much and is gone at once is not out of a control message's reach."""
    pushing = await make(serve_relay, connect)
    async with nothing_published(valkey, pushing):
        await pushing.push(range(5))
        await pushing.client.connection.close()
        await eventually(lambda: not pushing.served.relay.node.sockets, "the socket's end")
        relay = pushing.served.relay
        await (relay.disconnect(user="alice") if action == "disconnect" else relay.kick("room:1", user="alice"))
        pushing.gate.opened.set()
        await eventually(lambda: not relay.node.connections.left_behind, "the handlers' end")
    assert pushing.handled == [0]
    counted = {"disconnect": {ENDED: 5}, "kick": {ENDED: 1, "unmatched topic": 4}}[action]
    assert {reason: pushing.refused[reason] for reason in counted} == counted


@pytest.mark.parametrize("by", ["relay", "handler"])
async def test_socket_that_has_left_pushes_behind_can_be_disconnected(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey, by: str
) -> None:
    """By its id, and by the handler that is under way."""
    pushing = await make(serve_relay, connect)
    async with nothing_published(valkey, pushing):
        await pushing.push(range(5))
        (socket,) = pushing.served.relay.node.sockets.values()
        await pushing.client.connection.close()
        await eventually(lambda: not pushing.served.relay.node.sockets, "the socket's end")
        if by == "relay":
            assert pushing.served.relay.node.disconnect(socket.id, "banned")
        else:
            socket.disconnect("banned")
        assert pushing.refused[ENDED] == 4, "they are dropped at once, and counted"
        pushing.gate.opened.set()
        await eventually(lambda: pushing.refused[ENDED] == 5, "the one under way to be stopped")
        assert not pushing.served.relay.node.disconnect("another", "banned")
    assert pushing.handled == [0]


async def test_rights_of_what_is_left_behind_end_with_the_token(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey
) -> None:
    pushing = await make(serve_relay, connect, query=query(ttl_s=3 * PATIENCE))
    async with nothing_published(valkey, pushing):
        await pushing.push(range(3))
        await pushing.client.connection.close()
        await eventually(lambda: pushing.refused["token expired"], "the end of the token")
        pushing.gate.opened.set()
    assert pushing.handled == [0]


# Joins that wait behind a push.


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("action", ["kick", "leave", "kick of the join's own user"])
async def test_join_that_waits_is_overtaken_with_the_pushes_behind_it(
    serve_relay: ServeRelay, connect: Connect, valkey: Valkey, action: str, leaves: bool
) -> None:
    pushing = await make(serve_relay, connect)
    relay, client, old = pushing.served.relay, pushing.client, pushing.join_ref
    own = action.endswith("own user")
    # Of the old join's own push that is under way nothing comes out either, unless it is none of this user's.
    async with nullcontext() if own else nothing_published(valkey, pushing):
        await pushing.push(range(1))
        if leaves:
            await client.send(old, "leave", "room:1", "phx_leave", {})
        await client.send("9", "9", "room:1", "phx_join", {"token": token("bob", ROOMS)} if own else {})
        for number in range(1, 5):
            await client.send("9", str(10 + number), "room:1", "msg", {"i": number})
        (socket,) = relay.node.sockets.values()
        await eventually(lambda: socket.queue.pending == 6 + leaves, "all messages to have come")
        if action == "leave":
            assert socket.leave("room:1")
        else:
            await relay.kick("room:1", user="bob" if own else "alice")
        pushing.gate.opened.set()
        refusals = [client.refusal(None, str(10 + number), "room:1", "unmatched topic") for number in range(1, 5)]
        answers: list[Any] = []
        while refusals[-1] not in answers:
            answers.append(await client.receive())
        assert client.refusal("9", "9", "room:1", REMOVED) in answers
        assert [answer for answer in answers if answer in refusals] == refusals
        await eventually(lambda: relay.topics == {}, "the end of the first join")
    assert pushing.handled == [0]
    decisions = relay.node.pubsub.decisions
    assert not decisions._under_way and len(decisions) == 0
    ref = await client.join("room:1")
    assert ref, "who is not kicked again may come back"


async def test_decisions_on_joins_that_wait_end_with_their_socket(serve_relay: ServeRelay, connect: Connect) -> None:
    pushing = await make(serve_relay, connect)
    await pushing.push(range(1))
    decisions = pushing.served.relay.node.pubsub.decisions
    for number in range(3):
        await pushing.client.send(str(9 + number), str(9 + number), "room:1", "phx_join", {})
    await eventually(lambda: decisions._under_way, "the joins")
    await pushing.served.relay.disconnect(user="alice")
    assert not decisions._under_way and len(decisions) == 0
    pushing.gate.opened.set()


# Decisions that are under way.


@asynccontextmanager
async def one_or_two(valkey: Valkey, elsewhere: bool, direct: bool, **settings: Any) -> AsyncIterator[Any]:
    """A relay with ``settings``, and the relay that sends control messages: the same, or another on its Redis."""
    async with AsyncExitStack() as stack:
        relay = Relay(redis_url=valkey.url, system_topic=False, rest={"api_key": "k" * 16}, **settings)
        served = await stack.enter_async_context(serve(relay, direct=direct))
        other = served
        if elsewhere:
            relay = Relay(redis_url=valkey.url, system_topic=False, auth=AUTH, rest={"api_key": "k" * 16})
            other = await stack.enter_async_context(serve(relay, direct=direct))
        yield served, other
        decisions = served.relay.node.pubsub.decisions
        await eventually(lambda: not decisions._under_way, "the end of all decisions")
        assert len(decisions) == 0, "nothing is kept once no decision is under way"


async def send(action: str, served: Served, other: Served, topic: str = "room:1") -> None:
    """Send a control message, and wait until it has come to where the decision is."""
    messages: list[Any] = []
    node = served.relay.node
    carry_out = node._control._apply

    def note(message: Any) -> None:
        messages.append(message)
        carry_out(message)

    node._control._apply = note
    if action == "rest":
        async with httpx.AsyncClient(trust_env=False, headers={"X-API-Key": "k" * 16}) as api:
            assert (await api.delete(f"{other.http}/api/users/alice")).status_code == 204
    elif action == "rest-kick":
        async with httpx.AsyncClient(trust_env=False, headers={"X-API-Key": "k" * 16}) as api:
            assert (await api.delete(f"{other.http}/api/topics/{topic}/users/alice")).status_code == 204
    elif action == "disconnect":
        await other.relay.disconnect(user="alice", reason="banned")
    else:
        await other.relay.kick(topic, user="alice")
    await eventually(lambda: messages, "the control message to arrive")
    node._control._apply = carry_out


def slow_join(gate: Gate) -> Plugin:
    plugin = Plugin("slow")

    @plugin.on_join("room:*")
    async def join(join: Any) -> None:
        await gate.pass_through()

    return plugin


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("action", ["kick", "rest-kick", "disconnect", "rest"])
async def test_join_under_way_does_not_outlast_a_control_message(
    valkey: Valkey, direct: bool, action: str, elsewhere: bool
) -> None:
    gate = Gate()
    async with one_or_two(valkey, elsewhere, direct, auth=AUTH, extra_plugins=(slow_join(gate),)) as (served, other):
        async with Client.connect(served.ws, query=query()) as client:
            await client.send("1", "1", "room:1", "phx_join", {})
            await gate.wait_begun()
            await send(action, served, other)
            gate.opened.set()
            if action in ("disconnect", "rest"):
                assert (await client.expect_closed())[0] == 1001
            else:
                assert await client.receive() == client.refusal("1", "1", "room:1", REMOVED)
                await client.join("room:1")  # a decision that begins after the message is another one
        assert served.relay.metrics.joins == (1 if "kick" in action else 0)
        await eventually(lambda: not served.relay.topics, "nothing to stay joined")


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("action", ["kick", "disconnect"])
async def test_join_with_a_token_of_its_own_does_not_outlast_a_control_message(
    valkey: Valkey, direct: bool, action: str, elsewhere: bool
) -> None:
    """The token's user is not the socket's, and is known only once it has been checked."""
    gate = Gate()

    async def authenticate(request: Any) -> Any:
        if request.claims and request.claims["sub"] == "alice":
            await gate.pass_through()
        return request.claims

    settings: dict[str, Any] = {"auth": AUTH, "allow_anonymous": True, "authenticate": authenticate}
    async with one_or_two(valkey, elsewhere, direct, **settings) as (served, other):
        async with Client.connect(served.ws, query=query("bob")) as client:
            await client.send("1", "1", "room:1", "phx_join", {"token": token("alice", ROOMS)})
            await gate.wait_begun()
            await send(action, served, other)
            gate.opened.set()
            assert await client.receive() == client.refusal("1", "1", "room:1", REMOVED)
            await client.expect_alive()


async def test_join_that_waits_for_the_bus_does_not_outlast_a_control_message(
    serve_relay: ServeRelay, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    subscribe = BroadcasterBroker.subscribe

    async def slowly(self: BroadcasterBroker, topic: str) -> None:
        await gate.pass_through()
        await subscribe(self, topic)

    monkeypatch.setattr(BroadcasterBroker, "subscribe", slowly)
    served = await serve_relay(broadcast_url="memory://", auth=AUTH)
    client = await connect(served, query=query())
    await client.send("1", "1", "room:1", "phx_join", {})
    await gate.wait_begun()
    await served.relay.kick("room:1", user="alice")
    gate.opened.set()
    assert await client.receive() == client.refusal("1", "1", "room:1", REMOVED)
    assert len(served.relay.node.pubsub.decisions) == 0


async def test_rejoin_under_way_does_not_outlast_a_kick(valkey: Valkey, direct: bool) -> None:
    gate = Gate()
    gate.opened.set()
    async with one_or_two(valkey, False, direct, auth=AUTH, extra_plugins=(slow_join(gate),)) as (served, other):
        async with Client.connect(served.ws, query=query()) as client:
            ref = await client.join("room:1")
            gate.opened.clear()
            await client.send("1", "1", "room:1", "phx_join", {})
            await gate.wait_begun(2)
            await send("kick", served, other)
            assert await client.receive() == [ref, ref, "room:1", "phx_close", {}]
            gate.opened.set()
            assert await client.receive() == client.refusal("1", "1", "room:1", REMOVED)
            assert not served.relay.topics


@pytest.mark.parametrize("has_joined", [False, True])
@pytest.mark.parametrize("action", ["leave", "path", "query"])
async def test_join_under_way_does_not_outlast_the_removal_of_its_socket(
    valkey: Valkey, direct: bool, action: str, has_joined: bool
) -> None:
    """Without any users: the socket is named by its id."""
    gate = Gate()
    async with one_or_two(valkey, False, direct, extra_plugins=(slow_join(gate),)) as (served, _):
        async with Client.connect(served.ws) as client:
            ref = ""
            if has_joined:
                gate.opened.set()
                ref = await client.join("room:1")
                gate.opened.clear()
            (socket,) = served.relay.node.sockets.values()
            assert not socket.leave("room:2"), "it has nothing to do with this topic"
            await client.send("7", "7", "room:1", "phx_join", {})
            await gate.wait_begun(2 if has_joined else 1)
            if action == "leave":
                assert socket.leave("room:1")
            else:
                path = (
                    f"topics/room:1/sockets/{socket.id}" if action == "path" else f"sockets?id={socket.id}&topic=room:1"
                )
                async with httpx.AsyncClient(trust_env=False, headers={"X-API-Key": "k" * 16}) as api:
                    assert (await api.delete(f"{served.http}/api/{path}")).status_code == 204
            if has_joined:
                assert await client.receive() == [ref, ref, "room:1", "phx_close", {}]
            gate.opened.set()
            assert await client.receive() == client.refusal("7", "7", "room:1", REMOVED)
            assert not served.relay.topics
            await client.join("room:1")  # a later one is another decision


async def test_control_message_for_others_leaves_a_join_under_way_alone(valkey: Valkey, direct: bool) -> None:
    gate = Gate()
    async with one_or_two(valkey, False, direct, auth=AUTH, extra_plugins=(slow_join(gate),)) as (served, _):
        async with Client.connect(served.ws, query=query()) as client:
            await client.send("1", "1", "room:1", "phx_join", {})
            await gate.wait_begun()
            await served.relay.kick("room:2", user="alice")
            await served.relay.kick("room:1", user="bob")
            await served.relay.disconnect(user="bob")
            gate.opened.set()
            assert await client.receive() == client.reply("1", "1", "room:1")


async def test_renewal_under_way_does_not_outlast_a_control_message(valkey: Valkey, direct: bool) -> None:
    """A topic that was opened by a token of its own has ended; its renewal does not bring it back."""
    gate = Gate()

    async def authenticate(request: Any) -> Any:
        if request.claims and request.claims.get("renewed"):
            await gate.pass_through()
        return request.claims

    settings: dict[str, Any] = {"auth": AUTH, "authenticate": authenticate}
    async with one_or_two(valkey, False, direct, **settings) as (served, other):
        async with Client.connect(served.ws, query=query("bob")) as client:
            ref = await client.join("room:1", {"token": token("alice", ROOMS)})
            renewal = {"access_token": token("alice", ROOMS, renewed=True)}
            await client.send(ref, "9", "room:1", "access_token", renewal)
            await gate.wait_begun()
            await send("disconnect", served, other)
            assert await client.receive() == [ref, ref, "room:1", "phx_close", {}]
            gate.opened.set()
            await eventually(lambda: served.relay.metrics.refused[REMOVED] == 1, "the renewal to be refused")
            await client.expect_alive()


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("plain", [False, True])
async def test_handshake_under_way_does_not_outlast_a_control_message(
    valkey: Valkey, direct: bool, elsewhere: bool, plain: bool
) -> None:
    """Its user is known only once ``authenticate`` has said so."""
    gate = Gate()

    async def authenticate(request: Any) -> Any:
        await gate.pass_through()
        return {"sub": "alice", "topics": ROOMS}

    def authenticate_in_a_thread(request: Any) -> Any:
        asyncio.run_coroutine_threadsafe(gate.pass_through(), loop).result(20)
        return {"sub": "alice", "topics": ROOMS}

    loop = asyncio.get_running_loop()
    function = authenticate_in_a_thread if plain else authenticate
    async with one_or_two(valkey, elsewhere, direct, authenticate=function) as (served, other):

        async def connect() -> None:
            async with Client.connect(served.ws):
                pass

        connecting = asyncio.create_task(connect())
        await gate.wait_begun()
        await send("disconnect", served, other)
        gate.opened.set()
        with pytest.raises(InvalidStatus) as caught:
            await connecting
        assert caught.value.response.status_code == 503
        assert served.relay.metrics.refused["handshake: removed"] == 1
        async with Client.connect(served.ws) as client:  # it was no ban
            await client.join("room:1")


async def test_control_message_between_the_decision_and_the_open_socket_closes_it(
    valkey: Valkey, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()

    async def slowly(*arguments: Any) -> None:
        await gate.pass_through()
        await accept(*arguments)

    monkeypatch.setattr("relay.transports.handshake.accept", slowly)
    async with one_or_two(valkey, False, direct, auth=AUTH) as (served, other):

        async def connect() -> tuple[int, str]:
            async with Client.connect(served.ws, query=query()) as client:
                return await client.expect_closed()

        connecting = asyncio.create_task(connect())
        await gate.wait_begun()
        await send("disconnect", served, other)
        gate.opened.set()
        assert (await connecting)[0] == 1001


async def test_client_that_goes_during_its_handshake_leaves_no_decision(valkey: Valkey, direct: bool) -> None:
    gate = Gate()

    async def authenticate(request: Any) -> Any:
        await gate.pass_through()
        return {"sub": "alice"}

    async with one_or_two(valkey, False, direct, authenticate=authenticate) as (served, _):

        async def connect() -> None:
            async with Client.connect(served.ws):
                pass

        connecting = asyncio.create_task(connect())
        await gate.wait_begun()
        for number in range(100):
            await served.relay.disconnect(user=f"user {number}")
        connecting.cancel()
        with suppress(asyncio.CancelledError):
            await connecting
        assert len(served.relay.node.pubsub.decisions) == 100
        gate.opened.set()


# Messages that a node has missed.


@pytest.mark.parametrize("action", ["kick", "disconnect"])
async def test_control_message_in_a_gap_of_another_node_reaches_it_afterwards(valkey: Valkey, action: str) -> None:
    """What began after the message is not meant: a client that came back since stays."""
    async with one_or_two(valkey, True, True, auth=AUTH, topics=[{"match": "*", "on_gap": "ignore"}]) as (
        served,
        other,
    ):
        async with Client.connect(served.ws, query=query()) as client, Redis.from_url(valkey.url) as redis:
            await client.join("room:1")
            ids = {each["id"] for each in await redis.client_list(_type="pubsub")}
            node, gaps = served.relay.node, served.relay.metrics
            hearing = node.pubsub.receive_control
            node.pubsub.receive_control = lambda data: None
            if action == "kick":
                await other.relay.kick("room:1", user="alice")
            else:
                await other.relay.disconnect(user="alice", reason="banned")
            async with Client.connect(served.ws, query=query()) as back:
                await back.join("room:1")
                node.pubsub.receive_control = hearing
                for id in ids:
                    await redis.client_kill_filter(_id=id)
                await eventually(lambda: gaps.disconnects_by_control == 1, "the message to be applied after the gap")
                if action == "kick":
                    assert (await client.receive())[3] == "phx_close"
                else:
                    assert await client.expect_closed() == (1001, "banned")
                await back.expect_alive()
                assert served.relay.topics == {"room:1": 1}
