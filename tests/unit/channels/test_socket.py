"""`relay.channels.socket` and `relay.channels.handle`, on a fake transport and a fake broker."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from relay.auth.authenticator import Authenticator
from relay.concurrency import Continuation
from relay.config_sections import Overflow
from relay.errors import IN_FLIGHT_FULL, SUBSCRIPTION_ENDED, CloseCode, Reason, RelayError
from relay.permissions import ALL, Grant, Identity, Rights
from relay.plugins.hooks import Hook, Hooks, Join, Leave, Push
from relay.protocol.serializer import Message, Version
from relay.tracing import Trace
from tests.support.transport import FakeBroker, FakeNode

OK: list[Any] = ["ok", {}]


@asynccontextmanager
async def node_of(
    hooks: Hooks | None = None, broker: FakeBroker | None = None, **settings: Any
) -> AsyncIterator[FakeNode]:
    node = FakeNode(hooks, broker, **settings)
    yield node
    await node.end()
    assert node.metrics.sockets == 0 and node.metrics.in_flight_bytes == 0
    assert list(node.hub.pairs()) == []


async def turns(count: int = 20) -> None:
    """Let everything run that does not wait for the test."""
    for _ in range(count):
        await asyncio.sleep(0)


class Gate:
    """A handler that waits until the test opens it, and notes the events of pushes."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.opened = asyncio.Event()

    async def __call__(self, given: Join | Push | Leave) -> None:
        self.calls.append(given.event if isinstance(given, Push) else given.topic)
        await self.opened.wait()


# Messages.


@pytest.mark.parametrize("version", [Version.V1, Version.V2])
async def test_heartbeat_is_answered_in_both_versions(version: Version) -> None:
    async with node_of() as node:
        assert await node.connect(version).call(None, "1", "phoenix", "heartbeat") == OK


async def test_message_without_a_topic_joined_is_refused_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "relay.socket")
    async with node_of(limits={"topics_per_socket": 1}) as node:
        client = node.connect()
        assert await client.call("1", "1", "t", "e") == ["error", {"reason": "unmatched topic"}]
        assert await client.call("1", "2", "t", "phx_leave") == OK
        assert await client.join("t", "3") == OK
        assert await client.join("u", "4") == ["error", {"reason": "too many channels joined"}]
        client.send("1", "5", "t", "e")
        assert await client.call("3", "6", "t", "e") == OK
        assert "5" not in [frame[1] for frame in client.frames()]
        refused = {Reason.UNMATCHED_TOPIC: 1, Reason.TOO_MANY_TOPICS: 1, "stale join_ref": 1}
        assert node.metrics.refused == refused
    assert [record.getMessage() for record in caplog.records if "refused" in record.getMessage()] == [
        "socket socket-0: join of 'u' refused: too many channels joined; address 192.0.2.1"
    ]


async def test_frame_that_cannot_be_decoded_closes_the_socket_and_nothing_after_it_is_read() -> None:
    async with node_of() as node:
        client = node.connect()
        client.transport.feed("{}")
        client.send("1", "1", "t", "phx_join")
        await client.end()
        [(code, text)] = client.transport.rejected
        assert code == CloseCode.INVALID_PAYLOAD and text.startswith("expected [join_ref")
        assert client.transport.written == client.transport.late == []
        assert client.transport.ended


async def test_topic_that_waits_delays_no_other_topic_and_no_heartbeat() -> None:
    gate = Gate()
    async with node_of(Hooks(join=(Hook("p", gate, "slow"),))) as node:
        client = node.connect()
        client.send("1", "1", "slow", "phx_join")
        client.send("1", "2", "slow", "e")
        client.send("3", "3", "quick", "phx_join")
        client.send(None, "4", "phoenix", "heartbeat")
        await client.reply("4")
        assert [frame[1] for frame in client.frames()] == ["3", "4"]
        gate.opened.set()
        await client.reply("2")
        assert [frame[1] for frame in client.frames()] == ["1", "2"]


async def test_client_is_read_no_further_while_too_much_of_it_is_under_way() -> None:
    gate = Gate()
    async with node_of(Hooks(join=(Hook("p", gate),)), limits={"pushes_in_flight": 2}) as node:
        client = node.connect()
        for ref in ("1", "2", "3"):
            client.send(ref, ref, f"t{ref}", "phx_join")
        await turns()
        assert gate.calls == ["t1", "t2"]
        gate.opened.set()
        assert await client.reply("3") == OK


async def test_messages_over_the_rate_are_refused_then_the_socket_is_closed() -> None:
    limits = {"pushes_per_s": 1, "pushes_burst": 2, "rate_limit_violations_max": 3}
    async with node_of(limits=limits) as node:
        client = node.connect()
        assert await client.join("t", "1") == OK
        assert await client.call("1", "2", "t", "e") == OK
        assert await client.call("1", "3", "t", "e") == OK
        assert await client.call("1", "4", "t", "e") == ["error", {"reason": "rate limited"}]
        client.send("1", None, "t", "e")
        assert await client.call(None, "6", "phoenix", "heartbeat") == OK, "it shows that the client is alive"
        client.send("1", "7", "t", "e")
        await turns()
        assert client.transport.closed_with == CloseCode.POLICY_VIOLATION
        assert [frame[1] for frame in client.frames()] == ["1", "2", "3", "4", "6"]
        assert node.metrics.refused == {Reason.RATE_LIMITED: 2, "rate limited for long": 1}
        assert len(node.broker.published) == 2


# Its end.


async def test_handlers_of_a_client_that_has_gone_come_to_their_end() -> None:
    gate = Gate()
    async with node_of(Hooks(join=(Hook("p", gate),), leave=(Hook("q", gate),))) as node:
        gate.opened.set()
        client = node.connect()
        await client.join("t", "1")
        await client.join("u", "2")
        gate.opened.clear()
        gate.calls.clear()
        client.transport.feed(None)
        await client.task
        assert client.transport.ended and client.socket.has_ended and client.socket.is_closed
        assert list(node.hub.pairs()) == []
        assert client.left_behind is not None and not client.left_behind.done()
        await turns()
        assert gate.calls == ["t", "u"]
        gate.opened.set()
        await client.left_behind
        assert client.socket.announced == {} and client.socket.topics == () and client.socket.queue.pending == 0


async def test_socket_without_handlers_is_released_at_once() -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        await client.end()
        assert client.left_behind is None and client.socket.topics == () and client.socket.queue.evict is None
        assert client.transport.settled == ["t"]


@pytest.mark.parametrize("own", [True, False])
async def test_only_a_cancellation_of_the_transports_own_ends_quietly(own: bool) -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        client.transport.cancels_reader = own
        client.task.cancel()
        await asyncio.wait((client.task,))
        assert client.task.cancelled() is not own
        assert client.transport.ended and node.metrics.sockets == 0


@pytest.mark.parametrize(
    ("code", "handled"),
    [
        (CloseCode.RESTART, ["a", "b"]),
        (CloseCode.GOING_AWAY, ["a"]),
        (CloseCode.POLICY_VIOLATION, ["a"]),
        (CloseCode.SLOW_READER, ["a"]),
    ],
)
async def test_pushes_that_wait_are_dropped_at_a_close_that_ends_permissions(code: int, handled: list[str]) -> None:
    gate = Gate()
    async with node_of(Hooks(push=(Hook("p", gate),))) as node:
        client = node.connect()
        await client.join("t")
        client.send("1", "2", "t", "a")
        client.send("1", "3", "t", "b")
        await turns()
        assert client.socket.close(code, "enough")
        assert not client.socket.close(code, "again")
        gate.opened.set()
        await turns()
        assert gate.calls == handled
        assert [event for _, _, event, _ in node.broker.published] == (handled if code == CloseCode.RESTART else [])
        ended = 0 if code == CloseCode.RESTART else 2
        assert node.metrics.refused[SUBSCRIPTION_ENDED] == ended
        assert client.socket.is_revoked is (ended > 0) and client.transport.closes == [(code, "enough")]


async def test_close_after_the_end_drops_what_still_waits() -> None:
    gate = Gate()
    async with node_of(Hooks(push=(Hook("p", gate),))) as node:
        client = node.connect()
        await client.join("t")
        client.send("1", "2", "t", "a")
        client.send("1", "3", "t", "b")
        await turns()
        client.transport.feed(None)
        await client.task
        assert not client.socket.close(CloseCode.GOING_AWAY, "disconnected")
        gate.opened.set()
        assert client.left_behind is not None
        await client.left_behind
        assert gate.calls == ["a"] and node.broker.published == []
        assert node.metrics.refused == {SUBSCRIPTION_ENDED: 2}


async def test_socket_with_most_under_way_is_evicted_where_all_together_hold_too_much() -> None:
    gate = Gate()
    async with node_of(Hooks(push=(Hook("p", gate),)), limits={"in_flight_total_max_bytes": 2000}) as node:
        small, large = node.connect(), node.connect()
        for client in (small, large):
            await client.join("t")
            client.send("1", "2", "t", "first")
        await turns()
        for ref in ("3", "4", "5", "6"):
            large.send("1", ref, "t", "more", "x" * 100)
        await turns()
        assert large.transport.evicted == ["in flight"] and small.transport.evicted == []
        assert node.metrics.refused[IN_FLIGHT_FULL] > 0
        gate.opened.set()
        assert await small.reply("2") == OK
        await turns()
        assert gate.calls == ["first", "first"] and len(node.broker.published) == 1


# What the hub and the node ask of it.


async def test_socket_reports_what_its_transport_does() -> None:
    async with node_of(topics=[{"match": "*", "overflow": Overflow.DROP_OLDEST}]) as node:
        client = node.connect(query_string=b"vsn=2.0.0&empty=&name=%C3%A9")
        socket = client.socket
        assert (socket.id, socket.address, socket.user, socket.claims) == ("socket-0", "192.0.2.1", None, {})
        assert socket.query == {"vsn": "2.0.0", "empty": "", "name": "é"}
        assert (socket.write_mode, socket.queued_bytes, socket.dropped, socket.deflates) == ("fake", 0, 0, False)
        assert socket.direct_write() is None and socket.idle_s(103.0) == 3.0
        assert socket.joinless_since == socket.opened_at == 100.0
        assert await client.join("t") == OK
        assert socket.topics == ("t",) and socket.joinless_since == float("inf")
        client.frames()
        socket.readiness_changed()
        await node.deliver("t", "e")
        assert client.frames() == [[None, None, "t", "e"]]
        client.transport.send_control(socket.dropped_notice("t", 3))
        assert client.transport.written == [["1", None, "t", "relay:dropped", {"dropped": 3}]]


async def test_subscription_of_another_socket_cannot_be_ended() -> None:
    async with node_of() as node:
        one, two = node.connect(), node.connect()
        await one.join("t")
        await two.join("t")
        other = two.socket.subscription("t")
        assert other is not None and not one.socket.end_subscription(other, None)
        assert one.socket.topics == two.socket.topics == ("t",)


async def test_events_of_ended_subscriptions_are_in_the_line_about_the_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "relay.socket")
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        await node.deliver("t", "e")
        await node.deliver("t", "e")
        assert await client.call("1", "2", "t", "phx_leave") == OK
        await client.end()
    [line] = [record.getMessage() for record in caplog.records if "disconnected by" in record.getMessage()]
    assert "disconnected by the client" in line and "1 joins, 0 pushes, 2 events" in line


# What plugins ask of it.


async def test_handle_sends_to_one_socket_alone() -> None:
    async with node_of() as node:
        one, two = node.connect(), node.connect()
        await one.join("t")
        await two.join("t")
        assert one.socket.push("t", "hi", {"n": 1})
        assert one.transport.written[-1] == ["1", None, "t", "hi", {"n": 1}]
        assert not one.socket.push("u", "hi", {})
        with pytest.raises(ValueError, match="colon"):
            one.socket.push("t", "a:b", {})
        with pytest.raises(TypeError, match="JSON-serializable"):
            one.socket.push("t", "hi", object())
        await one.end()
        assert not one.socket.push("t", "hi", {})
        assert [frame[3] for frame in two.frames()] == ["phx_reply"]


async def test_handle_leaves_what_is_joined_and_what_is_being_joined() -> None:
    gate = Gate()
    async with node_of(Hooks(join=(Hook("p", gate, "slow"),))) as node:
        client = node.connect()
        assert not client.socket.leave("t")
        await client.join("t", "1")
        assert client.socket.leave("t") and not client.socket.leave("t")
        client.send("2", "2", "slow", "phx_join")
        await turns()
        client.send("3", "3", "slow", "phx_join")  # it waits until the first is decided
        await turns()
        assert client.socket.is_joining("slow") and client.socket.leave("slow")
        gate.opened.set()
        for ref in "23":
            assert await client.reply(ref) == ["error", {"reason": "removed by the server"}]
        assert [frame[3] for frame in client.frames()] == ["phx_reply", "phx_close", "phx_reply", "phx_reply"]
        assert not client.socket.is_joining("slow") and not client.socket.leave("slow")
        client.send("4", "4", "slow", "phx_join")
        assert (await client.reply("4"))[0] == "ok", "what is asked for later is decided anew"
        assert not client.socket.pubsub.decisions._under_way


@pytest.mark.parametrize(
    ("reason", "text"),
    [("", "disconnected by the server"), ("banned", "banned"), ("é" * 100, "é" * 61)],
)
async def test_handle_disconnects_with_a_reason_that_fits_a_close(reason: str, text: str) -> None:
    async with node_of() as node:
        client = node.connect()
        client.socket.disconnect(reason)
        assert client.transport.closes == [(CloseCode.GOING_AWAY, text)]


async def test_handle_may_be_used_in_a_thread() -> None:
    async with node_of() as node:
        client = node.connect()
        await client.join("t")
        assert await asyncio.to_thread(client.socket.push, "t", "hi", {})
        await client.transport.until(lambda frame: frame[3] == "hi")
        assert await asyncio.to_thread(client.socket.leave, "t")
        await client.transport.until(lambda frame: frame[3] == "phx_close")
        await asyncio.to_thread(client.socket.disconnect)
        await turns()
        assert client.transport.closed_with == CloseCode.GOING_AWAY


def test_handle_refuses_a_call_after_its_event_loop_has_ended() -> None:
    with asyncio.Runner() as runner:

        async def connect() -> FakeNode:
            node = FakeNode()
            client = node.connect()
            await client.join("t")
            return node

        node = runner.run(connect())
        socket = node.clients[0].socket
        with pytest.raises(RelayError, match="event loop that has ended"):
            socket.disconnect()
        runner.run(node.end())


async def test_handle_knows_its_user() -> None:
    async with node_of() as node:
        node.authenticator = Authenticator(node.config, node.runner)
        identity = Identity("alice", Rights([Grant("*", ALL)]), claims={"role": "x"})
        client = node.connect(identity=identity)
        assert (client.socket.user, client.socket.claims) == ("alice", {"role": "x"})
        assert await client.join("t") == OK
        await client.end()
        assert client.socket.auth is not None and client.socket.auth._owner is None, "its timers have ended"


class Notes(Trace):
    """Notes what a socket asks of its trace, without OpenTelemetry."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.futures: list[asyncio.Future[None]] = []

    def handle(self, handle: Callable[[Message], Continuation], message: Message) -> Continuation:
        self.notes.append(message.event)
        return handle(message)

    def note(self, outcome: str) -> None:
        self.notes.append(outcome)

    def until(self, future: asyncio.Future[None]) -> None:
        self.futures.append(future)


async def test_trace_has_each_message_and_what_was_refused() -> None:
    notes = Notes()
    async with node_of() as node:
        client = node.connect(trace=notes)
        await client.join("t")
        assert await client.call("1", "2", "t", "e") == OK
        assert await client.call("3", "3", "u", "e") == ["error", {"reason": "unmatched topic"}]
        assert notes.notes == ["phx_join", "e", "e", "unmatched topic"]
        assert [future.done() for future in notes.futures] == [True]
