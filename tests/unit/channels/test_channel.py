"""`relay.channels.channel`: one join and what follows from it, on a fake transport and a fake broker."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from relay.auth.authenticator import Authenticator
from relay.brokers.base import Event, Link
from relay.config_sections import Direction
from relay.errors import IN_FLIGHT_FULL, SUBSCRIPTION_ENDED, AuthenticationError, CloseCode, Reason
from relay.permissions import ALL, Grant, Identity, Right, Rights
from relay.plugins.hooks import Hook, Hooks, Join, Leave, Push, Refused
from relay.protocol.topics import RENEWAL
from tests.support.transport import Client, FakeBroker, FakeNode

OK: list[Any] = ["ok", {}]


def error(reason: str) -> list[Any]:
    return ["error", {"reason": reason}]


@asynccontextmanager
async def node_of(
    hooks: Hooks | None = None, broker: FakeBroker | None = None, **settings: Any
) -> AsyncIterator[FakeNode]:
    node = FakeNode(hooks, broker, **settings)
    yield node
    await node.end()
    assert len(node.pubsub.decisions) == 0 and not node.pubsub.decisions._under_way
    assert [client.socket.queue.pending for client in node.clients] == [0] * len(node.clients)
    assert list(node.hub.pairs()) == []


def hook(function: Callable[..., Any], event: str = "*") -> Hook:
    return Hook("p", function, event=event)


async def turns(count: int = 20) -> None:
    """Let everything run that does not wait for the test."""
    for _ in range(count):
        await asyncio.sleep(0)


# The join.


async def test_join_is_answered_and_subscribed_in_one_step() -> None:
    async with node_of() as node:
        client = node.connect()
        assert await client.join("t") == OK
        assert [(topic, subscriber) for topic, subscriber in node.hub.pairs()] == [("t", client.socket)]
        await node.deliver("t", "e")
        assert client.frames() == [["1", "1", "t", "phx_reply"], [None, None, "t", "e"]]
        assert node.metrics.joins == 1


async def test_join_is_refused_while_the_bus_is_away() -> None:
    async with node_of() as node:
        node.broker.link = Link(False, "away")
        assert await node.connect().join("t") == error("bus unavailable")
        assert node.metrics.refused == {Reason.BUS_UNAVAILABLE: 1}


async def test_rejoin_replaces_the_first_join_after_its_own_reply() -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t", "1")
        await client.join("t", "2")
        assert client.frames()[1:] == [["2", "2", "t", "phx_reply"], ["1", "1", "t", "phx_close"]]
        assert node.hub.count("t") == 1


async def test_answers_of_join_handlers_are_one_reply() -> None:
    async def one(join: Join) -> dict[str, int]:
        return {"a": 1, "b": 1}

    async def two(join: Join) -> dict[str, int]:
        return {"b": join.payload["n"]}

    async with node_of(Hooks(join=(hook(one), hook(two)))) as node:
        assert await node.connect().join("t", params={"n": 2}) == ["ok", {"a": 1, "b": 2}]


async def refuses(given: Any) -> None:
    raise Refused("not you", because="so")


async def crashes(given: Any) -> None:
    raise ValueError("boom")


async def reads(given: Any) -> Any:
    return given.payload


async def hangs(given: Any) -> None:
    await asyncio.Event().wait()


UNREADABLE: Any = {"n": [[]]}
for _ in range(300):
    UNREADABLE = {"n": [UNREADABLE]}


@pytest.mark.parametrize(
    ("handler", "params", "answer", "counted"),
    [
        (refuses, {}, ["error", {"reason": "not you", "because": "so"}], "by a plugin"),
        (crashes, {}, error("join crashed"), Reason.JOIN_CRASHED),
        (hangs, {}, error("join crashed"), Reason.JOIN_CRASHED),
        (reads, UNREADABLE, error("invalid payload"), Reason.INVALID_PAYLOAD),
    ],
)
async def test_refused_join_also_ends_the_subscription_it_would_replace(
    handler: Callable[[Any], Awaitable[Any]], params: Any, answer: list[Any], counted: str
) -> None:
    handlers: list[Callable[[Any], Awaitable[Any]]] = [reads, handler]
    leaves: list[str] = []

    async def on_join(join: Join) -> Any:
        return await handlers.pop(0)(join)

    async def on_leave(leave: Leave) -> None:
        leaves.append(leave.topic)

    async with node_of(Hooks(join=(hook(on_join),), leave=(hook(on_leave),)), plugins={"timeout_s": 0.02}) as node:
        client = node.connect()
        assert await client.join("t", "1") == OK
        assert await client.join("t", "2", params) == answer
        assert client.frames()[1:] == [["2", "2", "t", "phx_reply"], ["1", "1", "t", "phx_close"]]
        assert list(node.hub.pairs()) == [] and client.socket.topics == ()
        assert node.metrics.refused == {counted: 1}
        assert leaves == ["t"], "for the first join; the second was not allowed"


async def test_no_event_comes_before_the_reply_of_a_join_that_waits_for_the_broker() -> None:
    async with node_of(broker=FakeBroker(needs_subscribe=True)) as node:
        one, two = node.connect(), node.connect()
        assert await one.join("t") == OK
        node.broker.heard.clear()  # as if the second were on another node
        node.pubsub._subscriptions._topics.clear()
        node.broker.is_slow = True
        two.send("1", "1", "t", "phx_join")
        await turns()
        assert [kind for kind, _ in node.broker.waiting] == ["subscribe"]
        await node.pubsub.receive_events([Event("t", "e", b"{}")])
        assert two.frames() == []
        assert node.broker.answer() == "subscribe"
        assert await two.reply("1") == OK
        node.broker.is_slow = False


async def test_join_that_the_broker_does_not_take_is_refused_and_handlers_are_informed_of_its_end() -> None:
    leaves: list[str] = []

    async def on_leave(leave: Leave) -> None:
        leaves.append(leave.topic)

    async with node_of(Hooks(leave=(hook(on_leave),)), FakeBroker(needs_subscribe=True)) as node:
        client = node.connect()
        node.broker.fails = True
        assert await client.join("t", "1") == error("bus unavailable")
        await turns()
        assert leaves == ["t"] and node.broker.heard == set()
        node.broker.fails = False
        assert await client.join("t", "2") == OK
        assert node.broker.heard == {"t"}
        assert await client.call("2", "3", "t", "phx_leave") == OK
        await turns()
        assert node.broker.heard == set() and leaves == ["t", "t"]


async def test_nothing_is_left_of_a_refused_join_of_a_topic_that_the_console_observes() -> None:
    async with node_of(broker=FakeBroker(needs_subscribe=True)) as node:
        observer: Any = node.connect().socket
        node.hub.add_observer("t", observer)
        node.broker.fails = True
        assert await node.connect().join("t") == error("bus unavailable")
        await turns()
        assert node.pubsub._subscriptions._topics == {}
        _ = node.hub.remove("t", observer)


@pytest.mark.parametrize("end", ["hang up", "close"])
async def test_join_that_is_allowed_after_its_socket_has_ended_is_given_back(end: str) -> None:
    leaves: list[str] = []

    async def on_leave(leave: Leave) -> None:
        leaves.append(leave.topic)

    async with node_of(Hooks(leave=(hook(on_leave),)), FakeBroker(needs_subscribe=True)) as node:
        client = node.connect()
        node.broker.is_slow = True
        client.send("1", "1", "t", "phx_join")
        await turns()
        if end == "close":
            client.socket.close(CloseCode.RESTART, "come back")
        else:
            client.transport.feed(None)
        await turns()
        node.broker.is_slow = False
        node.broker.answer()
        await turns()
        assert client.transport.written == client.transport.late == []
        assert leaves == ["t"]
        assert node.broker.heard == set() and node.metrics.joins == 0


async def test_join_is_refused_where_a_handler_removes_the_socket_meanwhile() -> None:
    async def on_join(join: Join) -> None:
        assert join.socket.leave(join.topic)

    async with node_of(Hooks(join=(hook(on_join),))) as node:
        assert await node.connect().join("t") == error("removed by the server")
        assert node.metrics.refused == {Reason.REMOVED: 1}


async def test_handlers_of_on_leave_end_before_the_next_join_of_the_topic_is_decided() -> None:
    order: list[str] = []
    gate = asyncio.Event()

    async def on_join(join: Join) -> None:
        order.append("join")

    async def on_leave(leave: Leave) -> None:
        order.append("leave begins")
        await gate.wait()
        order.append("leave ends")

    async with node_of(Hooks(join=(hook(on_join),), leave=(hook(on_leave),))) as node:
        client = node.connect()
        await client.join("t", "1")
        client.send("2", "2", "t", "phx_join")
        await turns()
        assert order == ["join", "leave begins"]
        gate.set()
        assert await client.reply("2") == OK
        assert order == ["join", "leave begins", "leave ends", "join"]
    assert order[4:] == ["leave begins", "leave ends"]


async def test_allowed_join_that_is_cut_off_while_it_waits_for_the_broker_is_ended_for_its_handlers() -> None:
    """Too much of this client is under way, and what runs is cancelled."""
    leaves: list[str] = []

    async def on_leave(leave: Leave) -> None:
        leaves.append(leave.topic)

    async with node_of(
        Hooks(leave=(hook(on_leave),)), FakeBroker(needs_subscribe=True), limits={"in_flight_total_max_bytes": 100}
    ) as node:
        client = node.connect()
        node.broker.is_slow = True
        client.send("1", "1", "t", "phx_join", {"long": "x" * 200})
        await turns()
        assert client.transport.evicted == ["in flight"]
        assert node.metrics.refused == {IN_FLIGHT_FULL: 1}
        assert leaves == ["t"]
        node.broker.is_slow = False
        while node.broker.waiting:
            node.broker.answer()
        await turns()
        assert node.broker.asked == set(), "the broker may have taken the topic, and is told to give it back"


# Its end.


@pytest.mark.parametrize(("reason", "event"), [(Reason.EVENTS_MISSED, "phx_error"), (None, "phx_close")])
async def test_end_from_this_side_is_sent_once(reason: Reason | None, event: str) -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        channel = client.socket.subscription("t")
        assert channel is not None
        assert client.socket.end_subscription(channel, reason)
        assert not client.socket.end_subscription(channel, reason) and not channel.end(reason)
        assert [frame[3] for frame in client.frames()] == ["phx_reply", event]
        assert client.transport.settled == ["t"], "what a slow reader has missed is reported before"


async def test_leave_is_answered_behind_the_reply_to_the_last_push() -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        node.broker.is_slow = True
        client.send("1", "2", "t", "e")
        client.send("1", "3", "t", "phx_leave")
        await turns()
        assert len(client.frames()) == 1
        node.broker.answer()
        await client.reply("3")
        assert client.frames() == [
            ["1", "2", "t", "phx_reply"],
            ["1", "3", "t", "phx_reply"],
            ["1", "1", "t", "phx_close"],
        ]


async def test_leave_that_waits_for_a_push_has_no_answer_where_the_subscription_ends_meanwhile() -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        node.broker.is_slow = True
        client.send("1", "2", "t", "e")
        client.send("1", "3", "t", "phx_leave")
        await turns()
        assert client.socket.leave("t")
        node.broker.answer()
        await turns()
        assert client.frames() == [["1", "1", "t", "phx_reply"], ["1", "1", "t", "phx_close"]]


# Its pushes.


async def test_push_is_answered_once_the_broker_has_taken_it() -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        node.broker.is_slow = True
        client.send("1", "2", "t", "e", {"a": 1})
        client.send("1", "3", "t", "e", {"a": 2})
        await turns()
        assert client.frames()[1:] == [] and node.metrics.pushes_out == 0
        node.broker.answer()
        assert await client.reply("2") == OK
        node.broker.answer("full")
        assert await client.reply("3") == error("bus unavailable")
        assert node.broker.published[0] == (Direction.FROM, "t", "e", b'{"a": 1}')
        assert (node.metrics.pushes_in, node.metrics.pushes_out) == (2, 1)


async def test_push_whose_publish_is_cancelled_is_refused() -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        node.broker.is_slow = True
        client.send("1", "2", "t", "e")
        await turns()
        [(_, future)] = node.broker.waiting
        future.cancel()
        assert await client.reply("2") == error("bus unavailable")


async def test_push_is_refused_where_its_topic_or_the_bus_takes_none() -> None:
    async with node_of(topics=[{"match": "quiet", "push": False}]) as node:
        client = node.connect()
        await client.join("quiet", "1")
        await client.join("t", "2")
        assert await client.call("1", "3", "quiet", "e") == error("push not allowed")
        node.broker.refusal = "read only"
        assert await client.call("2", "4", "t", "e") == error("bus unavailable")
        assert node.broker.published == []


async def test_push_handlers_answer_in_order_and_the_first_answer_counts() -> None:
    async def silent(push: Push) -> None:
        return None

    async def one(push: Push) -> dict[str, str]:
        return {"by": "one", "event": push.event}

    async def two(push: Push) -> dict[str, str]:
        return {"by": "two"}

    async with node_of(Hooks(push=(hook(silent), hook(one, "a*"), hook(two)))) as node:
        client = node.connect()
        await client.join("t")
        assert await client.call("1", "2", "t", "a") == ["ok", {"by": "one", "event": "a"}]
        assert await client.call("1", "3", "t", "b") == ["ok", {"by": "two"}]
        assert [event for _, _, event, _ in node.broker.published] == ["a", "b"]
        assert node.metrics.pushes_out == 2


async def test_push_handler_may_reply_stop_and_give_no_answer() -> None:
    async def on_push(push: Push) -> None:
        if push.event == "reply":
            push.reply({"n": 1}, status="later")
        elif push.event == "silent":
            push.no_reply()
        push.stop()

    async with node_of(Hooks(push=(hook(on_push),))) as node:
        client = node.connect()
        await client.join("t")
        assert await client.call("1", "2", "t", "reply") == ["later", {"n": 1}]
        client.send("1", "3", "t", "silent")
        assert await client.call("1", "4", "t", "other") == OK
        assert [frame[1] for frame in client.frames()] == ["1", "2", "4"], "one reply to each, and none to the silent"
        assert node.broker.published == []


@pytest.mark.parametrize(
    ("handler", "payload", "answer", "counted"),
    [
        (refuses, {}, ["error", {"reason": "not you", "because": "so"}], "by a plugin"),
        (crashes, {}, error("internal error"), Reason.INTERNAL),
        (hangs, {}, error("internal error"), Reason.INTERNAL),
        (reads, UNREADABLE, error("invalid payload"), Reason.INVALID_PAYLOAD),
    ],
)
async def test_push_that_a_handler_refuses_is_not_published(
    handler: Callable[[Any], Awaitable[Any]], payload: Any, answer: list[Any], counted: str
) -> None:
    async with node_of(Hooks(push=(hook(handler),)), plugins={"timeout_s": 0.02}) as node:
        client = node.connect()
        await client.join("t")
        assert await client.call("1", "2", "t", "e", payload) == answer
        assert node.broker.published == [] and node.metrics.refused == {counted: 1}


async def test_push_that_handlers_allow_is_refused_where_the_bus_does_not_take_it() -> None:
    async with node_of(Hooks(push=(hook(reads),))) as node:
        client = node.connect()
        await client.join("t")
        node.broker.fails = True
        assert await client.call("1", "2", "t", "e") == error("bus unavailable")
        node.broker.refusal = "read only"
        assert await client.call("1", "3", "t", "e") == error("bus unavailable")
        assert len(node.broker.published) == 1 and node.metrics.pushes_out == 0


async def test_push_handler_broadcasts_to_all_or_to_all_others() -> None:
    async def on_push(push: Push) -> None:
        push.stop()
        await push.broadcast("all", {"n": 1})
        await push.broadcast_from("others", {"n": 2})
        with pytest.raises(ValueError, match="colon"):
            _ = push.broadcast("a:b", {})

    async with node_of(Hooks(push=(hook(on_push),))) as node:
        one, two = node.connect(), node.connect()
        await one.join("t")
        await two.join("t")
        assert await one.call("1", "2", "t", "e") == OK
        assert node.broker.published == [
            (Direction.TO, "t", "all", b'{"n":1}'),
            (Direction.TO, "t", "others", b'{"n":2}'),
        ]
        await node.deliver("t", "all", b'{"n":1}')
        await node.deliver("t", "others", b'{"n":2}', node.broker.sender)
        assert [frame[3] for frame in one.frames()] == ["phx_reply", "phx_reply", "all"]
        assert [frame[3] for frame in two.frames()] == ["phx_reply", "all", "others"]


async def test_push_whose_subscription_ends_at_its_handler_goes_no_further() -> None:
    calls: list[str] = []

    async def leaves(push: Push) -> None:
        calls.append(push.event)
        push.socket.leave(push.topic)

    async def second(push: Push) -> None:
        raise AssertionError("it has ended")

    async with node_of(Hooks(push=(hook(leaves), hook(second, "a")))) as node:
        client = node.connect()
        for ref, event in (("1", "a"), ("3", "b")):
            await client.join("t", ref)
            client.send(ref, "9", "t", event)
            await client.transport.until(lambda frame, ref=ref: frame[0] == ref and frame[3] == "phx_close")  # type: ignore[misc]
        await turns()
        assert calls == ["a", "b"] and node.broker.published == []
        assert node.metrics.refused == {SUBSCRIPTION_ENDED: 2}
        assert "9" not in [frame[1] for frame in client.frames()]


# Authentication.


def rights(pattern: str, right: Right = ALL) -> Rights:
    return Rights([Grant(pattern, right)])


class Tokens(Authenticator):
    """Tokens are names of identities."""

    def __init__(self, node: FakeNode, **identities: Identity) -> None:
        async def verify(token: str) -> dict[str, Any]:
            raise NotImplementedError

        super().__init__(node.config, node.runner, verify, decisions=node.pubsub.decisions)
        self.identities = identities
        node.authenticator = self

    async def authenticate_token(self, token: str) -> Identity:
        await asyncio.sleep(0)
        if token not in self.identities:
            raise AuthenticationError(401, "token", "bad")
        return self.identities[token]


ALICE = Identity("alice", rights("room:*", Right.JOIN))


async def test_rights_decide_on_joins_and_pushes() -> None:
    async with node_of() as node:
        Tokens(node)
        client = node.connect(identity=ALICE)
        assert await client.join("other", "1") == error("unauthorized")
        assert await client.join("room:1", "2") == OK
        assert await client.call("2", "3", "room:1", "e") == error("unauthorized")
        assert node.broker.published == [] and node.metrics.refused == {Reason.UNAUTHORIZED: 2}


async def test_token_of_a_join_is_whose_topic_it_is(caplog: pytest.LogCaptureFixture) -> None:
    users: list[str | None] = []

    async def on_join(join: Join) -> None:
        users.append(join.user)
        if join.topic == "full":
            raise Refused("full")

    caplog.set_level("INFO", "relay.socket")
    async with node_of(Hooks(join=(hook(on_join),)), redis={"push_identity": True}) as node:
        Tokens(node, bob=Identity("bob", rights("*")))
        client = node.connect(identity=ALICE)
        assert await client.join("other", "1", {"token": "forged"}) == error("invalid token")
        assert await client.join("other", "2", {"token": "bob"}) == OK
        assert await client.join("full", "3", {"token": "bob"}) == error("full")
        assert await client.call("2", "4", "other", "e") == OK
        assert users == ["bob", "bob"]
        [_, (direction, _, _, payload)] = node.broker.published
        assert direction is Direction.FROM_USER and msgspec.json.decode(payload)["user"] == "bob"
    assert any("'full' refused" in record.getMessage() and "bob" in str(vars(record)) for record in caplog.records)


async def test_control_message_overtakes_a_join_that_waits() -> None:
    gate = asyncio.Event()

    async def on_join(join: Join) -> None:
        await gate.wait()

    async with node_of(Hooks(join=(hook(on_join),))) as node:
        Tokens(node)
        client = node.connect(identity=ALICE)
        client.send("1", "1", "room:1", "phx_join")
        await turns()
        node.pubsub.decisions.overtake("alice", "room:1")
        gate.set()
        assert await client.reply("1") == error("removed by the server")


async def test_push_is_refused_where_its_permission_ends_at_a_handler() -> None:
    gate = asyncio.Event()

    async def on_push(push: Push) -> None:
        await gate.wait()

    async with node_of(Hooks(push=(hook(on_push),))) as node:
        Tokens(node)
        client = node.connect(identity=Identity("alice", rights("*")))
        await client.join("t")
        client.send("1", "2", "t", "e")
        await turns()
        channel = client.socket.subscription("t")
        assert channel is not None
        channel.may_push = False
        gate.set()
        assert await client.reply("2") == error("unauthorized")
        assert node.broker.published == []


async def test_token_in_a_push_renews_and_is_never_published() -> None:
    async with node_of() as node:
        Tokens(node, newer=Identity("alice", rights("*")), bob=Identity("bob", rights("*")))
        client = node.connect(identity=ALICE)
        await client.join("room:1")

        async def renew(ref: str, token: str) -> list[Any]:
            return await client.call("1", ref, "room:1", RENEWAL, {"access_token": token})

        assert await renew("2", "bob") == error("token of another user")
        assert await renew("3", "newer") == OK
        assert await client.call("1", "4", "room:1", "e") == OK, "the new token allows pushes"
        assert [event for _, _, event, _ in node.broker.published] == ["e"]


async def test_renewal_where_clients_are_not_authenticated_is_accepted_and_not_published() -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        assert await client.call("1", "2", "t", RENEWAL, {"access_token": "x"}) == OK
        assert node.broker.published == []


async def test_client_reads_nothing_after_its_socket_has_ended_at_a_push() -> None:
    async with node_of() as node:
        client: Client = node.connect()
        await client.join("t")
        node.broker.is_slow = True
        client.send("1", "2", "t", "e")
        await turns()
        await client.end()
        assert node.hub.count("t") == 0
        node.broker.answer()
        await turns()
        assert [frame[1] for frame in client.frames()] == ["1"] and client.transport.late == []
