"""Sockets, channels, hub and pubsub together: any messages, handlers, ends and answers of the broker, in any order.

Handlers wait for the test or hang, the broker answers when the test lets it, and the clock stands still until the test
moves it. After each step the event loop runs until nothing can happen any more: a failure is the same in every run.
"""

import asyncio
import json
import selectors
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from relay.config import Config
from relay.config_sections import Direction
from relay.errors import CloseCode, Reason
from relay.plugins.hooks import Hook, Hooks, Join, Leave, Push, Refused
from tests.support.transport import Client, FakeBroker, FakeNode

TIMEOUT_S = 1.0
TOPICS = ["a", "b"]
OPEN_MAX = 3
CONFIG = Config(plugins={"timeout_s": TIMEOUT_S}, limits={"joins_per_s": 0, "pushes_per_s": 0})
OUTCOMES = ["ok", "refuse", "raise"]
JOINS = ["ok", *OUTCOMES, "wait", "hang", "leave"]
PUSHES = [*OUTCOMES, "wait", "hang", "stop", "leave", "disconnect"]
LEAVES = ["ok", "ok", "raise", "wait", "hang"]
REVOKING = (CloseCode.GOING_AWAY, CloseCode.POLICY_VIOLATION, CloseCode.SLOW_READER)


class _Selector(selectors.SelectSelector):
    """Never waits: it reports that nothing is ready to run."""

    def __init__(self) -> None:
        super().__init__()
        self.on_idle: Callable[[], None] = lambda: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self.on_idle()
        return super().select(0)


class StillLoop(asyncio.SelectorEventLoop):
    """An event loop with a clock that the test moves; `settle` runs it until all that is left waits for the test."""

    def __init__(self) -> None:
        selector = _Selector()
        self.now = 0.0
        super().__init__(selector)
        selector.on_idle = self.stop
        self.faults: list[dict[str, Any]] = []
        self.set_exception_handler(lambda loop, context: self.faults.append(context))

    def time(self) -> float:
        return self.now

    def settle(self) -> None:
        self.run_forever()
        assert self.faults == []

    def do(self, action: Callable[[], object]) -> None:
        """Call something in the loop, and settle."""
        self.call_soon(action)
        self.settle()

    def spawn(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """The same for a coroutine function, which may still wait afterwards."""
        self.do(lambda: self.create_task(make()))


@dataclass
class Sent:
    """A message of a client."""

    topic: str
    event: str
    join_ref: str | None


@dataclass(eq=False)
class Stream:
    """What one client has sent, and what it may read: checked frame by frame."""

    client: Client
    sent: dict[str, Sent] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)
    """Status of each reply, by ref."""
    live: dict[str, str] = field(default_factory=dict)
    """By topic, the ``join_ref`` that is in force for the client."""
    closing: tuple[str, str] | None = None
    """The topic and ``join_ref`` that the next frame has to close."""
    newest: dict[tuple[str, bool], int] = field(default_factory=dict)
    """The newest ref that has a reply, for each topic, and for its pushes without handlers."""
    events: list[int] = field(default_factory=list)
    joins: dict[str, str] = field(default_factory=dict)
    """By topic, the newest join."""
    removed: set[str] = field(default_factory=set)
    """Joins that were being decided when the socket was taken out of their topic."""
    read: int = 0

    @property
    def is_open(self) -> bool:
        return not self.client.transport.closes and not self.client.transport.ended

    def send(self, topic: str, event: str, join_ref: str | None, payload: object = None) -> str:
        ref = str(len(self.sent) + 1)
        if event == "phx_join":
            join_ref = self.joins[topic] = ref
        self.sent[ref] = Sent(topic, event, join_ref)
        self.client.send(join_ref, ref, topic, event, payload)
        return ref

    def check_new(self) -> None:
        written = self.client.transport.written
        for frame in written[self.read :]:
            self.check(*frame)
        self.read = len(written)

    def check(self, join_ref: str | None, ref: str | None, topic: str, event: str, payload: Any) -> None:
        if self.closing is not None:
            assert (topic, join_ref, event) == (*self.closing, "phx_close"), "the close follows the reply"
        if event == "phx_reply":
            assert ref is not None
            self.check_reply(join_ref, ref, topic, payload["status"], payload["response"])
        elif event in ("phx_close", "phx_error"):
            if self.closing is None:
                assert self.live.pop(topic) == join_ref, "it ends what is joined"
            self.closing = None
        else:
            assert topic in self.live and (join_ref, ref) == (None, None), (
                "no event before the reply, or after the close"
            )
            self.events.append(payload["n"])

    def check_reply(self, join_ref: str | None, ref: str, topic: str, status: str, response: Any) -> None:
        sent = self.sent[ref]
        assert sent.topic == topic and ref not in self.answered
        self.answered[ref] = status
        key = (topic, sent.event == "plain")
        assert int(ref) > self.newest.get(key, 0), "replies come in order"
        self.newest[key] = int(ref)
        current = self.live.get(topic)
        if sent.event == "phx_join":
            assert join_ref == ref
            if current is not None:
                self.closing = (topic, self.live.pop(topic))
            if status == "ok":
                assert response == {"handled": ref} and ref not in self.removed
                self.live[topic] = ref
        elif response == {"reason": "unmatched topic"}:
            assert current is None and join_ref is None
        elif sent.event == "phx_leave" and current is None:
            assert (status, join_ref) == ("ok", sent.join_ref)
        elif sent.event == "heartbeat":
            assert (status, join_ref) == ("ok", None)
        else:
            assert join_ref == sent.join_ref == current, "under the join_ref that is in force"
            if sent.event == "phx_leave":
                earlier = [one for one in self.sent if int(one) < int(ref) and self.sent[one].topic == topic]
                pushes = [one for one in earlier if self.sent[one].join_ref == current and one != current]
                assert [one for one in pushes if one not in self.answered] == [], "pushes are answered before"
                self.closing = (topic, self.live.pop(topic))


class Channels(RuleBasedStateMachine):
    """Clients, plugins, broker and node each do anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = StillLoop()
        self.streams: list[Stream] = []
        self.gates: list[asyncio.Future[str]] = []
        self.leave_does = "ok"
        # By socket and topic: joins that on_join has allowed, and calls of on_leave.
        self.allowed: Counter[tuple[str, str]] = Counter()
        self.left: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self.events = 0

    @initialize(needs_subscribe=st.sampled_from([True, True, False]))
    def start(self, needs_subscribe: bool) -> None:
        hooks = Hooks(
            join=(Hook("p", self.on_join),),
            push=(Hook("p", self.on_push, event="handled"),),
            leave=(Hook("p", self.on_leave),),
        )
        broker = FakeBroker(needs_subscribe)
        broker.on_publish = self.on_publish

        def make() -> None:
            self.node = FakeNode(hooks, broker, CONFIG)

        self.loop.do(make)
        self.connect()

    # The plugin.

    async def act(self, does: str, given: Join | Push | Leave) -> None:
        if does in ("wait", "hang"):
            gate: asyncio.Future[str] = self.loop.create_future()
            if does == "wait":
                self.gates.append(gate)
            does = await gate
        if does == "refuse":
            raise Refused("no")
        if does == "raise":
            raise ValueError("boom")
        if does == "stop" and isinstance(given, Push):
            given.stop()
        if does == "leave":
            given.socket.leave(given.topic)
        if does == "disconnect":
            given.socket.disconnect()

    async def on_join(self, join: Join) -> dict[str, str]:
        key = (join.socket.id, join.topic)
        if self.left[key] != self.allowed[key]:
            self.faults.append(f"join of {key} before the handlers of its end")
        await self.act(join.payload["does"], join)
        self.allowed[key] += 1
        return {"handled": join.payload["ref"]}

    async def on_push(self, push: Push) -> None:
        if self.stream(push.socket.id).client.transport.closed_with in REVOKING:
            self.faults.append("push handled after the end of its permissions")
        await self.act(push.payload["does"], push)

    async def on_leave(self, leave: Leave) -> None:
        self.left[leave.socket.id, leave.topic] += 1
        await self.act(self.leave_does, leave)

    def on_publish(self, payload: bytes) -> None:
        if self.stream(json.loads(payload)["socket"]).client.transport.closed_with in REVOKING:
            self.faults.append("push published after the end of its permissions")

    def stream(self, socket_id: str) -> Stream:
        [found] = [stream for stream in self.streams if stream.client.socket.id == socket_id]
        return found

    # Clients.

    def send(self, stream: Stream, topic: str, event: str, does: str = "ok", stale: bool = False) -> None:
        join_ref = "0" if stale else stream.joins.get(topic, "0")
        payload = {"does": does, "ref": str(len(stream.sent) + 1), "socket": stream.client.socket.id}
        self.loop.do(lambda: stream.send(topic, event, None if topic == "phoenix" else join_ref, payload))

    @precondition(lambda self: len(self.open) < OPEN_MAX)
    @rule()
    def connect(self) -> None:
        self.loop.do(lambda: self.streams.append(Stream(self.node.connect())))

    @rule(data=st.data(), topic=st.sampled_from(TOPICS), does=st.sampled_from(JOINS))
    def join(self, data: st.DataObject, topic: str, does: str) -> None:
        self.send(self.draw(data), topic, "phx_join", does)

    @rule(data=st.data(), topic=st.sampled_from(TOPICS))
    def join_without_delay(self, data: st.DataObject, topic: str) -> None:
        self.send(self.draw(data), topic, "phx_join")

    @rule(data=st.data(), topic=st.sampled_from(TOPICS), does=st.sampled_from(PUSHES), stale=st.booleans())
    def push_to_handler(self, data: st.DataObject, topic: str, does: str, stale: bool) -> None:
        self.send(self.draw(data), topic, "handled", does, stale)

    @rule(data=st.data(), topic=st.sampled_from(TOPICS), leaves=st.booleans())
    def push(self, data: st.DataObject, topic: str, leaves: bool) -> None:
        stream = self.draw(data)
        self.send(stream, topic, "plain")
        if leaves:
            self.send(stream, topic, "phx_leave")

    @rule(data=st.data(), topic=st.sampled_from(TOPICS), stale=st.booleans())
    def leave(self, data: st.DataObject, topic: str, stale: bool) -> None:
        self.send(self.draw(data), topic, "phx_leave", stale=stale)

    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        stream = self.draw(data)
        self.send(stream, "phoenix", "heartbeat")
        if stream.is_open:
            stream.check_new()
            assert stream.answered[str(len(stream.sent))] == "ok", "whatever waits"

    @property
    def open(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.is_open]

    def draw(self, data: st.DataObject) -> Stream:
        """A socket that is open: most of what is asked of another one does nothing."""
        if not self.open:
            self.connect()
        return data.draw(st.sampled_from(self.open))

    # Handlers and time.

    @precondition(lambda self: self.gates)
    @rule(data=st.data(), outcome=st.sampled_from(OUTCOMES))
    def release_handler(self, data: st.DataObject, outcome: str) -> None:
        gate = self.gates.pop(data.draw(st.integers(0, len(self.gates) - 1)))
        if not gate.done():  # else it has been given up
            self.loop.do(lambda: gate.set_result(outcome))

    @rule(does=st.sampled_from(LEAVES))
    def set_leave_handler(self, does: str) -> None:
        self.leave_does = does

    @rule()
    def let_handlers_time_out(self) -> None:
        self.loop.now += TIMEOUT_S + 0.1
        self.loop.settle()

    # The broker.

    @rule(how=st.sampled_from(["quick", "slow", "fails"]))
    def set_broker(self, how: str) -> None:
        self.node.broker.is_slow, self.node.broker.fails = how == "slow", how == "fails"

    @precondition(lambda self: self.node.broker.waiting)
    @rule(error=st.sampled_from(["", "", "away"]))
    def answer_of_broker(self, error: str) -> None:
        self.loop.do(lambda: self.node.broker.answer(error))

    @rule(topic=st.sampled_from(TOPICS))
    def event(self, topic: str) -> None:
        self.events += 1
        number, payload = self.events, json.dumps({"n": self.events}).encode()
        joined = [stream for stream in self.streams if topic in stream.live and stream.is_open]
        self.loop.spawn(lambda: self.node.deliver(topic, "event", payload))
        for stream in self.streams:
            stream.check_new()
            assert (number in stream.events) is (stream in joined), "to all that have joined, and to no other"

    @rule()
    def gap(self) -> None:
        self.loop.do(lambda: self.node.pubsub.on_gap("the link was lost"))
        self.loop.now += 0.06
        self.loop.settle()

    # The node and its operators.

    @rule(data=st.data(), topic=st.sampled_from(TOPICS), reason=st.sampled_from([None, Reason.EVENTS_MISSED]))
    def end_subscription(self, data: st.DataObject, topic: str, reason: Reason | None) -> None:
        stream = self.draw(data)
        socket = stream.client.socket
        if (channel := socket.subscription(topic)) is not None:
            self.loop.do(lambda: socket.end_subscription(channel, reason))
            assert socket.subscription(topic) is None
            assert not socket.end_subscription(channel, reason)

    @rule(data=st.data(), topic=st.sampled_from(TOPICS))
    def take_out(self, data: st.DataObject, topic: str) -> None:
        stream = self.draw(data)
        socket = stream.client.socket
        if (join := socket.protocol.joining(topic)) is not None:
            stream.removed.add(str(join.ref))
        stream.removed |= {str(message.ref) for message in stream.client.waiting(topic) if message.event == "phx_join"}
        self.loop.do(lambda: socket.leave(topic))
        assert socket.subscription(topic) is None

    @rule(data=st.data(), code=st.sampled_from([None, None, CloseCode.GOING_AWAY, CloseCode.RESTART]))
    def end_socket(self, data: st.DataObject, code: CloseCode | None) -> None:
        """The client hangs up, or the relay closes; then one that was closed may hang up."""
        client = data.draw(st.sampled_from(self.streams)).client
        if code is None:
            self.loop.do(lambda: client.transport.feed(None))
            assert client.task.done()
        else:
            self.loop.do(lambda: client.socket.close(code, "enough"))
            assert client.socket.is_closed

    # What always holds.

    @invariant()
    def clients_read_what_they_may(self) -> None:
        assert self.faults == []
        for stream in self.streams:
            stream.check_new()
            assert stream.closing is None
            late = [
                (ref, payload) for _, ref, _, event, payload in stream.client.transport.late if event == "phx_reply"
            ]
            accepted = [
                ref for ref, payload in late if stream.sent[ref].event == "phx_join" and payload["status"] == "ok"
            ]
            assert accepted == [], "no join is accepted after the close"

    @invariant()
    def subscriptions_agree(self) -> None:
        if not self.streams:
            return
        subscribed = set(self.node.hub.pairs())
        for stream in self.streams:
            socket = stream.client.socket
            topics = {topic for topic, subscriber in subscribed if subscriber is socket}
            if stream.is_open:
                joined = {topic: channel.join_ref for topic, channel in socket.protocol.subscriptions.items()}
                assert joined == stream.live and topics == set(stream.live)
            elif socket.has_ended:
                assert topics == set()
        if self.node.broker.needs_subscribe:
            topics = {topic for topic, _ in subscribed}
            assert topics <= self.node.broker.heard
            if not self.node.broker.waiting:
                assert topics == self.node.broker.heard, "a topic without subscribers is given back"

    @invariant()
    def handlers_of_an_end_are_called_once(self) -> None:
        for key, times in self.left.items():
            assert self.allowed[key] - 1 <= times <= self.allowed[key]

    def teardown(self) -> None:
        if not self.streams:
            self.loop.close()
            return
        try:
            self.finish()
        finally:
            self.loop.close()

    def finish(self) -> None:
        """Let everything come to its end, and see that nothing is left of it."""
        broker, node = self.node.broker, self.node
        self.leave_does, broker.is_slow, broker.fails = "ok", False, False
        for _ in range(100):  # each round lets at least one step of each topic's queue go on
            if broker.waiting:
                self.loop.do(lambda: broker.answer())
            self.let_handlers_time_out()
        assert not broker.waiting
        self.clients_read_what_they_may()
        self.subscriptions_agree()
        for stream in self.streams:
            if stream.is_open:
                must = [ref for ref, sent in stream.sent.items() if sent.event in ("phx_join", "heartbeat")]
                assert [ref for ref in must if ref not in stream.answered] == [], "each has its reply"
        self.loop.spawn(node.end)
        assert asyncio.all_tasks(self.loop) == set()
        assert len(node.pubsub.decisions) == 0 and not node.pubsub.decisions._under_way
        assert [stream.client.socket.queue.pending for stream in self.streams] == [0] * len(self.streams)
        assert self.left == +self.allowed
        assert list(node.hub.pairs()) == [] and broker.heard == broker.asked == set()
        assert node.metrics.sockets == 0 and node.metrics.in_flight_bytes == 0
        assert all(direction is Direction.FROM for direction, *_ in broker.published)


Channels.TestCase.settings = settings(stateful_step_count=60)
TestChannelsInAnyOrder = Channels.TestCase
