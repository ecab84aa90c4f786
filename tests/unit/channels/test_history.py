"""`relay.channels.history`: what a process knows of its topics' histories, with a store that the test controls."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from relay.brokers.base import Event, Link, Place
from relay.channels import history as module
from relay.channels.history_reader import Entry
from relay.config_sections import OnGap
from relay.errors import NotRecovered, Reason
from relay.plugins.hooks import Event as HookedEvent
from relay.plugins.hooks import Hook, Hooks
from relay.protocol.payload import EMPTY
from relay.protocol.serializer import Version
from tests.support.clock import runner, until
from tests.support.history import HISTORY, TOPIC, HistoryNode, events, instant_history
from tests.support.transport import Client

__all__ = ["runner"]

pytestmark = pytest.mark.usefixtures(instant_history.__name__)


@asynccontextmanager
async def node_of(hooks: Hooks | None = None, **settings: Any) -> AsyncIterator[HistoryNode]:
    node = HistoryNode(hooks, **settings)
    try:
        yield node
    finally:
        await node.end()
    assert list(node.hub.pairs()) == []


def on_event(handler: Callable[[HookedEvent], Awaitable[HookedEvent | None]]) -> Hooks:
    return Hooks(event=(Hook("p", handler),))


async def join(client: Client, ref: str = "1", topic: str = TOPIC, **params: Any) -> dict[str, Any]:
    """Join; returns the response."""
    status, response = await client.join(topic, ref, params)
    assert status == "ok", response
    return dict(response)


def numbers(client: Client) -> list[int]:
    """The numbers in the events that a client was sent."""
    return [payload["n"] for payload in events(client.transport.written)]


def places(client: Client) -> list[int]:
    """The numbers in the positions of the events that a client was sent."""
    return [Place.of(payload["_position"]).n for payload in events(client.transport.written)]


async def settled(node: HistoryNode) -> None:
    """Let everything run that does not wait for the test, or for long."""
    await node.heard()
    await asyncio.sleep(0.4)


def number(n: int) -> dict[str, int]:
    return {"n": n}


# Live events.


async def test_events_are_delivered_in_order_and_once() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client, since=None)
        await until(lambda: node.history.follows(TOPIC))
        rows = [node.store.append(b'{"n":%d}' % n) for n in range(1, 4)]
        for row in (rows[0], rows[1], rows[1], rows[0], rows[2], rows[2]):
            node.hear(row)
        await settled(node)
        assert (numbers(client), places(client)) == ([1, 2, 3], [1, 2, 3])
        assert node.metrics.history_holes == 0


async def test_hole_is_filled_from_the_store_before_what_came_after_it() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        node.store.append(b'{"n":2}')
        node.store.append(b'{"n":3}')
        node.publish(number(4), number(5))
        await settled(node)
        assert numbers(client) == [1, 2, 3, 4, 5]
        assert (node.metrics.history_holes, node.metrics.history_catch_ups) == (1, {"hole": 1})


async def test_topics_that_were_checked_and_are_joined_no_more_are_forgotten() -> None:
    """Before their next checks, which are due in half a minute; as many may be left as are joined still."""
    async with node_of() as node:
        stays, client = node.connect(), node.connect()
        await join(stays)
        topics = [f"{TOPIC}{number}" for number in range(5)]
        for place, topic in enumerate(topics):
            await join(client, str(place), topic)
        await until(lambda: all(map(node.history.follows, topics)))
        await settled(node)
        await client.end()
        assert len(node.history._queue) <= 2


async def test_topic_that_is_looked_at_before_it_is_joined_is_followed_all_the_same() -> None:
    """The console is no subscriber whose coming begins anything."""
    async with node_of() as node:
        observer: Any = node.connect().socket
        node.hub.add_observer(TOPIC, observer)
        client = node.connect()
        node.publish(number(1))
        since = (await join(client, since=None))["_position"]
        node.publish(number(2))
        await settled(node)
        assert numbers(client) == [2]
        assert (await join(node.connect(), since=since))["recovered"] is True
        await settled(node)
        assert node.metrics.rejoins_requested == 0
        node.hub.remove(TOPIC, observer)


async def test_notice_of_another_node_counts_as_no_event() -> None:
    async with node_of() as node:
        node.hear(Event("room:elsewhere", "", b"", "1000-1"))
        await settled(node)
        assert (node.metrics.events_in, node.metrics.events_without_subscribers) == (0, 0)


# Slow handlers.


class SlowHandler:
    """An on_event handler that keeps the first call for each of some numbers waiting, until it is told to go on."""

    def __init__(self, *held: int) -> None:
        self._held = set(held)
        self._gate = asyncio.Event()
        self.calls: list[int] = []

    @property
    def hooks(self) -> Hooks:
        return on_event(self.handle)

    async def handle(self, event: HookedEvent) -> HookedEvent:
        n = event.payload["n"]
        self.calls.append(n)
        if n in self._held:
            self._held.remove(n)
            await self._gate.wait()
        return event

    def go_on(self) -> None:
        self._gate.set()


async def test_events_of_handlers_from_before_the_last_leave_reach_no_later_join() -> None:
    """They are in the history, which the later join is given."""
    handler = SlowHandler(1)
    async with node_of(handler.hooks) as node:
        one = node.connect()
        since = (await join(one, since=None))["_position"]
        await settled(node)
        node.publish(*map(number, range(1, 11)))
        await settled(node)
        await one.end()
        two = node.connect()
        assert (await join(two, since=since))["recovered"] is True
        await settled(node)
        assert places(two) == list(range(1, 11))
        handler.go_on()
        node.publish(number(11))
        await settled(node)
        assert places(two) == list(range(1, 12))


async def test_events_of_handlers_from_before_a_loss_do_not_follow_it() -> None:
    handler = SlowHandler(2)
    async with node_of(handler.hooks, topics=[HISTORY | {"on_gap": OnGap.IGNORE}]) as node:
        one = node.connect()
        await join(one, since=None)
        await settled(node)
        node.publish(*map(number, range(1, 6)))
        await settled(node)
        node.store.streams.clear()
        node.store.now_ms += 1
        node.publish(number(1))  # a new history: what is heard is lost
        await settled(node)
        assert node.metrics.history_lost == 1
        client = node.connect()
        position = (await join(client, since=None))["_position"]
        assert Place.of(position).n == 1
        await settled(node)
        handler.go_on()
        await settled(node)
        node.publish(number(2))
        await settled(node)
        assert places(client) == [2]


async def test_rows_wait_for_room_instead_of_being_dropped() -> None:
    """What waits for handlers is bounded in bytes, and a page of large rows has more."""
    handler = SlowHandler(1)
    async with node_of(handler.hooks, limits={"in_flight_total_max_bytes": 160_000}) as node:
        client = node.connect()
        await join(client, since=None)
        await settled(node)
        text = "x" * 2000
        node.publish({"n": 1, "t": text})
        await settled(node)
        for n in range(2, 30):
            node.store.append(b'{"n":%d,"t":"%b"}' % (n, text.encode()))
        node.publish({"n": 30, "t": text})
        await settled(node)
        handler.go_on()
        await until(lambda: len(numbers(client)) >= 30 or node.metrics.dropped)
        assert numbers(client) == list(range(1, 31))
        assert not node.metrics.dropped


async def test_event_that_a_handler_sends_elsewhere_takes_no_position_along() -> None:
    async def redirect(event: HookedEvent) -> HookedEvent:
        return HookedEvent("room:2", event.event, event.data)

    async with node_of(on_event(redirect)) as node:
        source, client = node.connect(), node.connect()
        await join(source, since=None)
        await join(client, topic="room:2", since=None)
        await settled(node)
        node.publish(number(1))
        await settled(node)
        assert events(client.transport.written, "room:2") == [{"n": 1}]


# Gaps.


async def test_gap_is_caught_up_and_nobody_has_to_rejoin() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        node.is_deaf = True
        node.publish(number(2), number(3))
        node.is_deaf = False
        node.pubsub.on_gap("the bus was away")
        await until(lambda: len(numbers(client)) == 3)
        node.publish(number(4))
        await settled(node)
        assert numbers(client) == [1, 2, 3, 4]
        assert (node.metrics.rejoins_requested, node.metrics.history_catch_ups) == (0, {"gap": 1})


@pytest.mark.parametrize("lost", ["store", "topic"])
async def test_gap_of_a_topic_that_may_not_be_heard_any_more_is_told_to_its_subscribers(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing will catch it up; once it is heard again, nothing is taken to follow on what came before."""
    unheard = {TOPIC}
    async with node_of() as node:
        client, other = node.connect(), node.connect()
        await join(client)
        await join(other, topic="room:2")
        node.publish(number(1))
        await settled(node)
        if lost == "store":
            node.broker.kept = None
        else:
            monkeypatch.setattr(node.broker, "hears", lambda topic: topic not in unheard)
        node.pubsub.on_gap("no permission any more", [TOPIC])
        assert (client.socket.topics, other.socket.topics) == ((), ("room:2",))
        node.broker.kept = node.store
        unheard.clear()
        node.store.append(b'{"n":2}')
        await join(client, "2")
        node.publish(number(3))
        await settled(node)
        assert numbers(client) == [1, 3]


async def test_gap_during_a_catch_up_is_caught_up_too() -> None:
    """What the store answered before the gap says nothing of what was lost in it."""
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        gate = node.store.hold_answers("read")
        node.store.append(b'{"n":2}')
        node.publish(number(3))
        await until(lambda: ("read", node.store.streams[TOPIC][1].position) in node.store.calls)
        await settled(node)
        node.is_deaf = True
        node.publish(number(4))
        node.is_deaf = False
        check = node.store.hold_questions("check")
        node.pubsub.on_gap("once more")
        gate.set()
        await until(lambda: len(numbers(client)) >= 3)
        await settled(node)
        assert numbers(client) == [1, 2, 3, 4], "before any check"
        check.set()


async def test_second_gap_forgets_nobody_that_waits_to_be_told_of_the_first() -> None:
    """The topic has no position at the first gap, and one at the second."""
    async with node_of(rejoins_per_s=20) as node:
        check = node.store.hold_questions("check")
        node.is_deaf = True
        clients = [node.connect() for _ in range(4)]
        for client in clients:
            await join(client)
        assert not node.history.follows(TOPIC)
        node.pubsub.on_gap("the bus was away")
        node.is_deaf = False
        node.publish(number(1))
        await node.heard()
        assert node.history.follows(TOPIC)
        node.pubsub.on_gap("again")
        check.set()
        await asyncio.sleep(1)
        assert node.metrics.rejoins_requested == 4
        assert [client.socket.topics for client in clients] == [()] * 4


async def test_last_leave_after_a_gap_leaves_a_mark_of_what_was_lost() -> None:
    """The client that heard it is the only one here, and goes before the topic is checked."""
    async with node_of(limits={"recover_per_s": 1}) as node:
        client = node.connect()
        since = (await join(client, since=None))["_position"]
        await join(client, topic="room:0")
        await settled(node)
        node.publish(number(1), number(2))
        await settled(node)
        node.store.lose(1)
        node.store.append(b'{"n":3}')
        node.pubsub.on_gap("failover")
        await client.end()
        other = node.connect()
        answer = await join(other, since=since)
        assert (answer["recovered"], answer["reason"]) == (False, NotRecovered.FORKED)


async def test_join_does_not_wait_for_a_topic_that_was_left_meanwhile() -> None:
    async with node_of() as node:
        one, two = node.connect(), node.connect()
        since = (await join(one, since=None))["_position"]
        await settled(node)
        gate = node.store.hold_questions("check")
        node.is_deaf = True
        node.pubsub.on_gap("the bus was away")
        two.send("1", "1", TOPIC, "phx_join", {"since": since})
        await settled(node)
        assert two.transport.written == [], "it waits for the check"
        await one.end()
        gate.set()
        node.is_deaf = False
        assert (await two.reply("1"))[1]["recovered"] is True


async def test_join_on_a_topic_that_is_being_caught_up_is_answered() -> None:
    """Where handlers are too slow for a topic it always is; that says nothing against a position."""
    async with node_of() as node:
        one = node.connect()
        since = (await join(one, since=None))["_position"]
        await settled(node)
        gate = node.store.hold_answers("read")
        node.publish(number(1))
        node.store.append(b'{"n":2}')
        node.publish(number(3))
        await settled(node)
        assert node.metrics.history_catch_ups == {"hole": 1}
        two = node.connect()
        began = asyncio.get_running_loop().time()
        assert (await join(two, since=since))["recovered"] is True
        assert asyncio.get_running_loop().time() - began < 1
        gate.set()
        await until(lambda: places(two) == [1, 2, 3])


async def test_join_does_not_wait_for_longer_than_redis_may_take() -> None:
    async with node_of(redis={"timeout_s": 2}) as node:
        one, two = node.connect(), node.connect()
        since = (await join(one, since=None))["_position"]
        await settled(node)
        check = node.store.hold_questions("check")
        node.is_deaf = True
        node.pubsub.on_gap("the bus was away")
        answer = await join(two, since=since)
        assert (answer["recovered"], answer["reason"]) == (False, NotRecovered.UNAVAILABLE)
        assert node.metrics.history_not_recovered == {NotRecovered.UNAVAILABLE: 1}
        check.set()


async def test_topics_are_checked_after_a_gap_at_a_pace_and_those_that_are_joined_first() -> None:
    async with node_of(limits={"recover_per_s": 10}) as node:
        client = node.connect()
        for n in range(30):
            await join(client, str(n), topic=f"room:{n}", since=None)
        await settled(node)
        await asyncio.sleep(20)
        node.store.calls.clear()
        node.is_deaf = True
        node.pubsub.on_gap("the bus was away")
        node.is_deaf = False
        began = asyncio.get_running_loop().time()
        await join(node.connect(), topic="room:29", since="1000-0")
        assert asyncio.get_running_loop().time() - began < 0.5
        await asyncio.sleep(1)
        assert 10 <= len([kind for kind, _ in node.store.calls if kind == "check"]) <= 13
        await asyncio.sleep(3)
        assert len([kind for kind, _ in node.store.calls if kind == "check"]) == 30


# What is lost.


async def test_hole_that_the_store_has_too_is_told_to_the_subscribers() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client, since=None)
        node.publish(number(1))
        await settled(node)
        node.store.trim(1)
        node.store.append(b'{"n":2}')
        node.publish(number(3))
        node.store.trim(2)
        await settled(node)
        assert client.transport.written[-1][3:] == ["phx_error", {"reason": Reason.EVENTS_MISSED}]
        assert (node.metrics.history_lost, node.metrics.rejoins_requested) == (1, 1)
        assert numbers(client) == [1]


async def test_mark_behind_what_was_heard_is_a_loss() -> None:
    """Another node heard events that a failover has lost."""
    async with node_of() as node:
        client = node.connect()
        since = (await join(client, since=None))["_position"]
        node.publish(number(1))
        await settled(node)
        mark = Event(TOPIC, "", b"1000-2", "1002-2")
        node.store.streams[TOPIC].append(mark)
        node.hear(Event(TOPIC, "", b"", mark.position))
        await settled(node)
        assert client.transport.written[-1][3] == "phx_error"
        assert (await join(client, "2", since=since))["reason"] == NotRecovered.FORKED


async def test_history_that_cannot_be_read_for_long_is_lost() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        node.store.append(b'{"n":2}')
        node.store.fault = "away"
        node.publish(number(3))
        await asyncio.sleep(1)
        assert node.metrics.history_lost == 0
        await until(lambda: node.metrics.history_lost)
        assert client.transport.written[-1][3] == "phx_error"
        assert numbers(client) == [1]


async def test_history_that_cannot_be_read_for_a_moment_is_not_lost() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        node.store.append(b'{"n":2}')
        node.store.fault = "away"
        node.publish(number(3))
        await asyncio.sleep(1)
        node.store.fault = ""
        await until(lambda: numbers(client) == [1, 2, 3])
        assert node.metrics.history_lost == 0


# Catching up.


async def test_what_comes_while_a_topic_is_caught_up_follows() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        gate = node.store.hold_answers("read")
        rows = [node.store.append(b'{"n":%d}' % n) for n in range(2, 4)]
        node.hear(rows[1])
        await settled(node)
        node.publish(number(4))  # the answer does not have it
        node.hear(rows[0])  # the answer has it
        node.publish(number(5))
        gate.set()
        await settled(node)
        assert numbers(client) == [1, 2, 3, 4, 5]


async def test_more_than_is_kept_while_a_topic_is_caught_up_is_read() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        gate = node.store.hold_answers("read")
        node.store.append(b'{"n":2}')
        node.publish(number(3))
        await settled(node)
        node.publish(*({"n": n, "t": "x" * 10_000} for n in range(4, 20)))
        await settled(node)
        followed = node.history._followed[TOPIC]
        assert followed.held_bytes <= 65_536
        gate.set()
        await settled(node)
        assert numbers(client) == list(range(1, 20))


async def test_notice_while_a_topic_is_caught_up_leads_to_another_read() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        gate = node.store.hold_answers("read")
        node.store.append(b'{"n":2}')
        node.publish(number(3))
        await settled(node)
        row = node.store.append(b'{"n":4}')
        node.hear(Event(TOPIC, "", b"", row.position))
        gate.set()
        await settled(node)
        assert numbers(client) == [1, 2, 3, 4]
        assert node.metrics.history_holes == 1


async def test_last_leave_ends_catching_up() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        gate = node.store.hold_answers("read")
        node.store.append(b'{"n":2}')
        node.publish(number(3))
        await settled(node)
        await client.end()
        gate.set()
        other = node.connect()
        await join(other)
        await settled(node)
        node.publish(number(4))
        await settled(node)
        assert numbers(other) == [4]


async def test_position_that_nothing_was_published_with_changes_nothing() -> None:
    """A forged one, or one of a Redis that shares its channels with this one."""
    async with node_of() as node:
        client = node.connect()
        await join(client)
        node.publish(number(1))
        await settled(node)
        node.hear(Event(TOPIC, "e", b'{"n":99}', "9999-99"))
        node.hear(Event(TOPIC, "", b"", "9999-99"))
        node.publish(number(2))
        await settled(node)
        assert numbers(client) == [1, 2]
        assert len([kind for kind, _ in node.store.calls if kind == "read"]) < 6


# Checks.


def checks(node: HistoryNode) -> int:
    return len([kind for kind, _ in node.store.calls if kind == "check"])


async def test_silent_topic_is_checked_now_and_then_and_one_with_events_is_not() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        await join(client, "2", "room:2")
        await settled(node)
        assert checks(node) == 2, "the first time at once"
        for _ in range(5):
            await asyncio.sleep(20)
            node.publish(number(1), topic="room:2")
        assert 2 + 2 <= checks(node) <= 2 + 3


async def test_event_that_did_not_come_is_found_by_a_check() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client)
        await settled(node)
        node.store.append(b'{"n":1}')
        await asyncio.sleep(module.CHECK_MAX_S + 2)
        assert numbers(client) == [1]
        assert (node.metrics.history_catch_ups, node.metrics.history_holes) == ({"check": 1}, 0)


async def test_check_that_fails_is_made_again_soon() -> None:
    async with node_of() as node:
        await join(node.connect())
        await settled(node)
        node.store.fault = "away"
        await asyncio.sleep(module.CHECK_MAX_S + 1)
        before = checks(node)
        await asyncio.sleep(25)
        assert 4 <= checks(node) - before <= 6
        node.store.fault = ""
        await asyncio.sleep(6)
        before = checks(node)
        await asyncio.sleep(25)
        assert checks(node) == before


async def test_many_topics_are_checked_a_few_at_a_time_the_longest_silent_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHECKS_PER_S", 20)
    monkeypatch.setattr(module, "_LOOKED_AT", 7)
    async with node_of(limits={"topics_per_socket": 1000, "joins_per_s": 0}) as node:
        client = node.connect()
        for n in range(1000):
            await join(client, str(n), f"room:{n}")
        asked: list[str] = []
        check = node.store.check

        async def note(topic: str, heard: str, settings: Any) -> None:
            asked.append(topic)
            await check(topic, heard, settings)

        node.store.check = note  # type: ignore[method-assign]
        await asyncio.sleep(30)
        assert 500 <= len(asked) <= 620
        await asyncio.sleep(70)
        assert len(set(asked[:900])) == 900, "each once before any a second time"


async def test_history_that_may_not_be_heard_is_not_followed_until_it_may() -> None:
    async with node_of() as node:
        node.broker.kept = None
        client = node.connect()
        answer = await join(client, since="1000-0")
        assert (answer["_position"], answer["reason"]) == (None, NotRecovered.UNAVAILABLE)
        await settled(node)
        assert node.store.calls == []
        node.broker.kept = node.store
        other = node.connect()
        await join(other, since=None)
        node.publish(number(1))
        await settled(node)
        assert numbers(client) == numbers(other) == [1]
        node.broker.kept = None
        await asyncio.sleep(module.CHECK_MAX_S + 2)
        assert checks(node) == 1


# Joins at a pace.


async def test_joins_have_their_turns_at_a_pace() -> None:
    async with node_of(limits={"recover_per_s": 10}) as node:
        clients = [node.connect() for _ in range(40)]
        for client in clients:
            client.send("1", "1", TOPIC, "phx_join", {"since": None})
        await asyncio.sleep(0.01)
        assert 9 <= sum(bool(client.transport.written) for client in clients) <= 11, "of the last second"
        await asyncio.sleep(1)
        assert 19 <= sum(bool(client.transport.written) for client in clients) <= 21
        await asyncio.sleep(3)
        assert all(client.transport.written for client in clients)


async def test_client_that_has_gone_takes_no_turn_of_another() -> None:
    async with node_of(limits={"recover_per_s": 10}) as node:
        gone = [node.connect() for _ in range(100)]
        for client in gone:
            client.send("1", "1", TOPIC, "phx_join", {"since": None})
        await asyncio.sleep(0.01)
        last = node.connect()
        last.send("1", "1", TOPIC, "phx_join", {"since": None})
        for client in gone:
            client.transport.feed(None)
        await asyncio.sleep(0.5)
        assert last.transport.written
        for client in gone:
            await client.end()
        assert node.hub.count(TOPIC) == 1


# The rings of recent events.


async def test_who_comes_back_soon_is_given_what_was_missed_without_a_read() -> None:
    async with node_of() as node:
        one, two = node.connect(), node.connect()
        await join(one)
        since = (await join(two, since=None))["_position"]
        await settled(node)
        await two.end()
        node.store.calls.clear()
        node.publish(*map(number, range(1, 101)))
        await settled(node)
        for start in (0, 1, 50, 99, 100):
            client = node.connect()
            await join(client, since=since if start == 0 else f"1000-{start}")
            await settled(node)
            assert places(client) == list(range(start + 1, 101))
        assert {kind for kind, _ in node.store.calls} == {"open"}


async def test_rings_are_bounded_and_the_least_recently_used_goes_first() -> None:
    async with node_of(limits={"history_ring_max_bytes": 22_000}) as node:
        client = node.connect()
        for n in range(4):
            await join(client, str(n), f"room:{n}")
        await settled(node)
        for n in (0, 1, 2, 0, 3):
            node.publish(*[{"t": "x" * 1000}] * 4, topic=f"room:{n}")
            await settled(node)
        rings = node.history._rings
        assert list(rings._topics) == ["room:2", "room:0", "room:3"]
        assert rings.bytes == sum(followed.ring_bytes for followed in rings._topics.values()) <= 22_000
        await client.end()
        assert (rings.bytes, len(rings._topics)) == (0, 0)


async def test_pages_are_forgotten_before_rings() -> None:
    async with node_of(limits={"history_ring_max_bytes": 70_000}) as node:
        for n in range(3):
            await join(node.connect(), topic=f"room:{n}")
        await settled(node)
        for n in range(3):
            node.publish(*[{"t": "x" * 1000}] * 60, topic=f"room:{n}")
            await settled(node)
        assert 60_000 < node.history._rings.bytes <= 70_000
        client = node.connect()
        await join(client, topic="room:0", since="1000-0")
        await until(lambda: len(events(client.transport.written, "room:0")) == 60)
        assert node.history.reader.bytes + node.history._rings.bytes <= 70_000


async def test_large_event_is_kept_alone() -> None:
    async with node_of() as node:
        client = node.connect()
        await join(client, since=None)
        await settled(node)
        node.publish(number(1), {"n": 2, "t": "x" * 100_000})
        await settled(node)
        followed = node.history._followed[TOPIC]
        assert [entry.place.n for entry in followed.ring] == [2]
        assert node.history.hand_over(TOPIC, Place(1000, 1)) == [followed.ring[0]]
        assert node.history.hand_over(TOPIC, Place(1000, 1), is_included=True) is None
        assert node.history.hand_over(TOPIC, Place(1000, 2), is_included=True) == [followed.ring[0]]
        assert node.history.hand_over(TOPIC, Place(999, 2), is_included=True) is None


async def test_topic_that_is_not_joined_has_nothing_to_hand_over() -> None:
    async with node_of() as node:
        history = node.history
        place = Place(1, 1)
        assert history.hand_over(TOPIC, place) is None
        assert not history.is_ahead(TOPIC, place)
        assert not await history.reached(TOPIC, place)
        assert await history.page(TOPIC, place) is None
        assert not history.follows(TOPIC)
        history.note(TOPIC, "1-1", "e", EMPTY, 2)
        history.check_soon(TOPIC)
        history.unfollow(TOPIC)
        assert history.accept(Event(TOPIC, "e", b"", "1-1"))
        assert not history.accept(Event(TOPIC, "", b"", "1-1"))
        assert history.settings("elsewhere") is None


async def test_waiting_for_a_silent_topic_leaves_nothing_behind() -> None:
    async with node_of() as node:
        node.is_deaf = True
        client = node.connect()
        await join(client, since=None)
        await asyncio.sleep(60)
        assert len(node.history._followed[TOPIC].waiters) <= 1
        assert checks(node) >= 50, "each second, while the join waits for it"


def test_entry_is_encoded_once_for_each_form() -> None:
    entry = Entry(TOPIC, Place(1, 1), "e", EMPTY, 2)
    for positioned in (False, True):
        frames = entry.frames(Version.V2, positioned)
        assert entry.frames(Version.V2, positioned) is frames
        assert [frame.position for _, frame in frames] == ["1-1"]
    assert Entry(TOPIC, Place(1, 1), "", EMPTY, 2).frames(Version.V2, True) == ()


async def test_join_is_refused_where_the_bus_is_lost_while_it_is_decided() -> None:
    """The client comes back with its position; told that it is not recovered, it would give that up."""
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        await settled(node)
        gate = node.store.hold_answers("open")
        client = node.connect()
        client.send("1", "1", TOPIC, "phx_join", {"since": since})
        await settled(node)
        node.store.fault = "away"
        node.broker.link = Link(False, "away")
        gate.set()
        assert await client.reply("1") == ["error", {"reason": Reason.BUS_UNAVAILABLE}]
        assert node.metrics.history_not_recovered == {}
        node.store.fault = ""
        node.broker.link = Link(True, "")
        assert (await join(client, "2", since=since))["recovered"] is True
