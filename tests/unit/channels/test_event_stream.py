"""`relay.channels.event_stream`: what a loop over a topic's events receives, and what is never silent."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from relay import BusUnavailable, Event, Plugin, Relay, SlowReader
from relay.brokers.base import Link
from relay.channels.event_stream import EventStream, ReceivedEvent
from relay.errors import RelayError
from tests.support.asgi import until
from tests.unit.test_app import running

HISTORY = [{"match": "h:*", "history": {"size": 200, "ttl_s": 60}}]


def text(event: ReceivedEvent) -> tuple[str, Any]:
    return event.event, event.payload


async def take(stream: EventStream, count: int) -> list[tuple[str, Any]]:
    """The next so many events."""
    async with asyncio.timeout(30):
        return [text(await anext(stream)) for _ in range(count)]


async def publish(relay: Relay, topic: str, *payloads: object) -> None:
    """Publish events; returns when they have been delivered in this process."""
    before = relay.metrics.events_in
    for payload in payloads:
        await relay.publish(topic, "e", payload)
    await until(lambda: relay.metrics.events_in == before + len(payloads) and not relay.node.hub.busy)


def is_left(relay: Relay, topic: str) -> bool:
    return topic not in relay.node.hub and not relay.node.connections.event_streams.members


async def test_loop_receives_events_in_order_as_they_were_published() -> None:
    async with running() as relay, relay.subscribe("room:1") as events, relay.subscribe("room:1") as others:
        assert relay.topics == {"room:1": 2}
        await publish(relay, "room:1", {"n": 9007199254740993}, b"\xff", [])
        for stream in (events, others):
            first = await anext(stream)
            assert (first.topic, first.event, first.payload) == ("room:1", "e", {"n": 9007199254740993})
            assert (first.data, first.position, first.is_notice) == (
                msgspec.Raw(b'{"n":9007199254740993}'),
                None,
                False,
            )
            assert await take(stream, 2) == [("e", b"\xff"), ("e", [])]
        assert relay.metrics.deliveries == 6


async def test_handlers_of_events_come_before_the_loop() -> None:
    plugin = Plugin("double")

    @plugin.on_event("room:*")
    def double(event: Event) -> Event:
        return event.replace(event.payload * 2)

    async with running(plugin) as relay, relay.subscribe("room:1") as events:
        await publish(relay, "room:1", 21)
        assert await take(events, 1) == [("e", 42)]


# Leaving.


@pytest.mark.parametrize("how", ["end", "break", "error", "cancel"])
async def test_leaving_the_block_unsubscribes_in_every_case(how: str) -> None:
    async with running() as relay:

        async def loop() -> None:
            async with relay.subscribe("room:1") as events:
                if how == "end":
                    return
                async for _ in events:
                    if how == "break":
                        break
                    raise KeyError("of the loop's own")

        task = asyncio.create_task(loop())
        if how != "end":
            await until(lambda: "room:1" in relay.node.hub)
        if how in ("break", "error"):
            await relay.publish("room:1", "e", 1)
        elif how == "cancel":
            task.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(result, {"error": KeyError, "cancel": asyncio.CancelledError}.get(how, type(None)))
        assert is_left(relay, "room:1")


async def test_cancellation_while_it_subscribes_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(topics=HISTORY) as relay:
        history = relay.node.pubsub.history
        assert history is not None
        waiting = asyncio.Event()

        async def open(*_: object) -> None:
            waiting.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(history, "open", open)

        async def loop() -> None:
            async with relay.subscribe("h:1", last=5):
                pytest.fail("it was cancelled before")

        task = asyncio.create_task(loop())
        await waiting.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert is_left(relay, "h:1")


async def test_loop_ends_after_what_waits_when_relay_stops() -> None:
    async with running() as relay:
        async with relay.subscribe("room:1") as events:
            await publish(relay, "room:1", 1, 2)
            await relay.stop()
            assert [text(event) async for event in events] == [("e", 1), ("e", 2)]
        with pytest.raises(RelayError, match="not running"):
            relay.subscribe("room:1")


async def test_after_the_end_begins_nothing_is_subscribed_to() -> None:
    async with running() as relay:
        stream = relay.subscribe("room:1")
        relay.node.drain()
        with pytest.raises(RelayError, match="relay is stopping"):
            await stream.__aenter__()


# Slow loops.


async def test_drop_oldest_keeps_the_newest_and_says_what_is_missing() -> None:
    async with running() as relay, relay.subscribe("room:1", max_events=3, overflow="drop-oldest") as events:
        await publish(relay, "room:1", *range(10))
        assert await take(events, 4) == [("relay:dropped", {"dropped": 7}), ("e", 7), ("e", 8), ("e", 9)]
        assert events.dropped == 7
        assert relay.metrics.dropped["slow reader, drop-oldest"] == 7
        await publish(relay, "room:1", 10)
        assert await take(events, 1) == [("e", 10)]


async def test_bound_in_bytes_holds_too() -> None:
    limits = {"payload_max_bytes": 400, "outbox_max_bytes": 1424}
    async with running(limits=limits) as relay, relay.subscribe("room:1", overflow="drop-oldest") as events:
        await publish(relay, "room:1", *["x" * 398] * 5)
        assert await take(events, 4) == [("relay:dropped", {"dropped": 2}), *[("e", "x" * 398)] * 3]


async def test_latest_keeps_one_event_for_each_name_and_key() -> None:
    topics = [{"match": "aircraft:*", "overflow": "latest", "latest_key": "id"}]
    async with running(topics=topics) as relay, relay.subscribe("aircraft:1") as events:
        await publish(relay, "aircraft:1", *[{"id": id, "n": n} for n in range(3) for id in "ab"], b"\xff")
        dropped, *rest = await take(events, 4)
        assert dropped == ("relay:dropped", {"dropped": 4})
        assert rest == [("e", {"id": "a", "n": 2}), ("e", {"id": "b", "n": 2}), ("e", b"\xff")]


async def test_disconnect_ends_the_loop_with_an_error_after_what_waits() -> None:
    async with running() as relay, relay.subscribe("room:1", max_events=2) as events:
        await publish(relay, "room:1", *range(3))
        assert await take(events, 2) == [("e", 0), ("e", 1)]
        for _ in range(2):
            with pytest.raises(SlowReader, match="'room:1' was too slow: more events wait than max_events"):
                await anext(events)
        assert relay.metrics.dropped["slow reader disconnected"] == 1
        assert is_left(relay, "room:1")


async def test_slow_loops_together_hold_no_more_than_all_slow_readers_may() -> None:
    limits = {"outbox_total_max_bytes": 5000}
    async with running(limits=limits) as relay, relay.subscribe("room:1") as events:
        for _ in range(12):
            await relay.publish("room:1", "e", "x" * 398)
        await until(lambda: is_left(relay, "room:1"))
        with pytest.raises(SlowReader, match="all slow readers hold too much"):
            await take(events, 12)
        assert relay.metrics.dropped["outboxes full"] > 0
        assert relay.metrics.outbox_bytes == 0


async def test_recover_gives_a_slow_loop_every_event() -> None:
    async with running(topics=HISTORY) as relay:
        async with relay.subscribe("h:1", max_events=5, overflow="recover") as events:
            await publish(relay, "h:1", *range(150))
            assert await take(events, 150) == [("e", at) for at in range(150)]
            await publish(relay, "h:1", 150)
            assert await take(events, 1) == [("e", 150)]
        assert relay.metrics.history_catch_ups["slow reader"] >= 1
        assert events.dropped == 0


# Gaps.


async def test_gap_stands_between_the_events_once() -> None:
    async with running() as relay, relay.subscribe("room:1") as events, relay.subscribe("ignored:1"):
        await publish(relay, "room:1", 1)
        relay.node.pubsub.on_gap("test")
        relay.node.pubsub.on_gap("test")
        await publish(relay, "room:1", 2)
        lost = ("relay:lost", {"reason": "events may have been missed", "position": None})
        assert await take(events, 3) == [("e", 1), lost, ("e", 2)]
        assert relay.metrics.rejoins_requested == 0


async def test_no_event_from_behind_a_gap_overtakes_the_notice_of_it() -> None:
    async with running() as relay, relay.subscribe("room:1", overflow="latest") as events:
        await publish(relay, "room:1", 1, 2)
        relay.node.pubsub.on_gap("the link was lost")
        await publish(relay, "room:1", 3)
        lost = ("relay:lost", {"reason": "events may have been missed", "position": None})
        assert await take(events, 4) == [("relay:dropped", {"dropped": 1}), ("e", 2), lost, ("e", 3)]


async def test_those_that_wait_for_their_turn_after_a_gap_get_nothing_meanwhile() -> None:
    async with running(rejoins_per_s=20) as relay, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(relay.subscribe("room:1")) for _ in range(3)]
        relay.node.pubsub.on_gap("test")
        await publish(relay, "room:1", 1)
        assert [text(await anext(streams[0]))[0] for _ in range(2)] == ["relay:lost", "e"]
        await until(lambda: not relay.node.hub.is_held("room:1", streams[2]))
        await publish(relay, "room:1", 2)
        for stream in streams[1:]:
            assert [name for name, _ in await take(stream, 2)] == ["relay:lost", "e"]
        assert relay.metrics.dropped["events may have been missed"] == 2


async def test_topic_that_ignores_gaps_has_no_notice() -> None:
    topics = [{"match": "*", "on_gap": "ignore"}]
    async with running(topics=topics) as relay, relay.subscribe("room:1") as events:
        relay.node.pubsub.on_gap("test")
        await publish(relay, "room:1", 1)
        assert await take(events, 1) == [("e", 1)]


# Histories.


async def test_since_begins_behind_a_position() -> None:
    async with running(topics=HISTORY) as relay:
        async with relay.subscribe("h:1") as events:
            assert events.position is None
            await publish(relay, "h:1", *range(5))
            await take(events, 2)
            position = events.position
        assert position is not None
        async with relay.subscribe("h:1", since=position, max_events=1, overflow="drop-oldest") as events:
            assert await take(events, 4) == [
                ("relay:recovered", {"position": position}),
                *(("e", at) for at in (2, 3, 4)),
            ]
            assert events.position is not None and events.position > position
            await publish(relay, "h:1", 5)
            assert await take(events, 1) == [("e", 5)]


@pytest.mark.parametrize("since", ["1-1", "nonsense"])
async def test_position_that_is_gone_is_said(since: str) -> None:
    async with running(topics=HISTORY) as relay:
        async with relay.subscribe("h:1") as events:
            await publish(relay, "h:1", 1)
            await take(events, 1)
            newest = events.position
        async with relay.subscribe("h:1", since=since) as events:
            await publish(relay, "h:1", 2)
            lost = ("relay:lost", {"reason": "unknown position", "position": newest})
            assert await take(events, 2) == [lost, ("e", 2)]


async def test_last_begins_with_the_newest_events() -> None:
    async with running(topics=HISTORY) as relay:
        async with relay.subscribe("h:1"):
            await publish(relay, "h:1", *range(5))
        async with relay.subscribe("h:1", last=2, overflow="latest") as events:
            await publish(relay, "h:1", 5)
            assert await take(events, 3) == [("e", 3), ("e", 4), ("e", 5)]


async def test_lost_history_is_said_and_the_loop_goes_on() -> None:
    async with running(topics=HISTORY) as relay, relay.subscribe("h:1") as events:
        await publish(relay, "h:1", 1)
        relay.node.pubsub.request_rejoins_of("h:1")
        await publish(relay, "h:1", 2)
        assert [name for name, _ in await take(events, 3)] == ["e", "relay:lost", "e"]


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topic": "a\nb"}, "topic: expected 1 to 255 bytes"),
        ({"max_events": 0}, "max_events: expected 1 or more, got 0"),
        ({"overflow": "drop"}, "overflow: expected disconnect, drop-oldest, latest, recover, got 'drop'"),
        ({"last": 0, "topic": "h:1"}, "last: expected 1 or more, got 0"),
        ({"since": "1-1"}, "topic 'room:1' has no history"),
        ({"overflow": "recover"}, "topic 'room:1' has no history"),
    ],
)
async def test_invalid_argument_is_refused(arguments: dict[str, Any], message: str) -> None:
    async with running(topics=HISTORY) as relay:
        with pytest.raises(ValueError, match=message):
            relay.subscribe(**{"topic": "room:1", **arguments})


async def test_while_nothing_can_be_heard_the_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as relay:
        monkeypatch.setattr(type(relay.node.broker), "link", property(lambda self: Link(False, "away")))
        with pytest.raises(BusUnavailable, match="bus unavailable"):
            async with relay.subscribe("room:1"):
                pytest.fail("nothing would come")
        assert is_left(relay, "room:1")


async def test_loop_without_its_block_and_second_block_are_refused() -> None:
    async with running() as relay:
        stream = relay.subscribe("room:1")
        with pytest.raises(RelayError, match=r"expected `async with relay.subscribe"):
            await anext(stream)
        async with stream:
            with pytest.raises(RelayError, match="expected one `async with`"):
                await stream.__aenter__()
        with pytest.raises(RelayError, match="expected one `async with`"):
            await stream.__aenter__()
        assert is_left(relay, "room:1")


async def test_another_event_loop_is_refused() -> None:
    async with running() as relay:
        stream = relay.subscribe("room:1")

        def elsewhere(work: Callable[[], Any]) -> None:
            with pytest.raises(RelayError, match="another event loop than the relay's"):
                asyncio.run(work())

        await asyncio.to_thread(elsewhere, stream.__aenter__)
