"""The Python client and the history of a topic: what it missed comes once, in order, or it is reported as lost."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from relay_client import REJOINED, Channel, Event, Lost, QueueOverflow, Recovered, Socket
from relay_client.wire import Message
from tests.integration.test_python_client import Answering, hold, next_of, quickly, scripted
from tests.support.process import Valkey
from tests.support.serving import Served, eventually

ServeRelay = Callable[..., Coroutine[Any, Any, Served]]


@pytest.fixture(params=["redis", "memory"])
def served(request: pytest.FixtureRequest, runner: asyncio.Runner, serve_relay: ServeRelay, valkey: Valkey) -> Served:
    bus = {"redis_url": valkey.url} if request.param == "redis" else {"broadcast_url": "memory://"}
    history = {"size": 100_000, "ttl_s": 60}
    topics = [{"match": "room:*", "history": history}, {"match": "short:*", "history": {"size": 2, "ttl_s": 60}}]
    limits = {"joins_per_s": 0, "recover_max_events": 100_000}
    return runner.run(serve_relay(topics=topics, limits=limits, **bus))


@pytest.fixture
def topic() -> str:
    return f"room:{uuid4().hex}"


def cut(socket: Socket) -> None:
    """Cut the connection off."""
    assert socket._link._connection is not None
    socket._link._connection.transport.abort()


def payload_of(number: int) -> Any:
    """Objects, other JSON, and bytes in turn."""
    kinds = {"n": number}, [number], str(number), number, str(number).encode() + b"\xff"
    return kinds[number % len(kinds)]


async def publish(served: Served, topic: str, *payloads: Any) -> None:
    for payload in payloads:
        await served.relay.publish(topic, "n", payload)


async def receive(room: Channel, count: int) -> list[Event]:
    """The next events, markers left out."""
    got: list[Event] = []
    while len(got) < count:
        event = await next_of(room)
        assert not isinstance(event, Lost), event
        if event.event != REJOINED:
            got.append(event)
    return got


async def test_missed_events_follow_the_rejoin(served: Served, topic: str) -> None:
    async with quickly(served.ws) as socket, socket.join(topic, {"nick": "ada"}, recover=True) as room:
        assert list(room.response) == ["_position"]
        await publish(served, topic, {"n": 1})
        first = await next_of(room)
        assert first == Event(topic, "n", {"n": 1}, position=first.position)
        assert first.position is not None
        cut(socket)
        await publish(served, topic, {"n": 2}, [3])
        rejoined = await next_of(room, REJOINED)
        assert isinstance(rejoined, Recovered)
        assert rejoined.payload == {"reason": "connection lost", "response": room.response}
        assert rejoined.position == first.position
        assert [event.payload for event in await receive(room, 2)] == [{"n": 2}, [3]]
        await publish(served, topic, {"n": 4})
        last = await next_of(room)
        assert last.payload == {"n": 4}
    await publish(served, topic, {"n": 5})
    assert last.position is not None
    async with quickly(served.ws) as socket, socket.join(topic, recover=last.position) as room:
        assert isinstance(await next_of(room, REJOINED), Recovered)
        assert (await next_of(room)).payload == {"n": 5}


async def test_latest_events_come_first(served: Served, topic: str) -> None:
    await publish(served, topic, *range(5))
    async with quickly(served.ws) as socket, socket.join(topic, last=2) as room:
        assert [event.payload for event in await receive(room, 2)] == [3, 4]
        cut(socket)
        await publish(served, topic, 5)
        assert isinstance(await next_of(room, REJOINED), Recovered)
        assert (await next_of(room)).payload == 5, "the rejoin does not ask for the latest again"


async def test_loss_is_reported_with_its_reason(served: Served) -> None:
    topic = f"short:{uuid4().hex}"
    async with quickly(served.ws) as socket, socket.join(topic, recover=True) as room:
        await publish(served, topic, 0)
        position = (await next_of(room)).position
        socket._reconnect_s = lambda tries: 3600
        cut(socket)
        await eventually(lambda: not room.is_joined, "the loss")
        await publish(served, topic, 1, 2, 3)
    async with quickly(served.ws) as socket, socket.join(topic, recover=str(position)) as room:
        lost = await next_of(room, REJOINED)
        assert isinstance(lost, Lost) and lost.reason == "history expired"
        await publish(served, topic, 4)
        assert (await next_of(room)).payload == 4, "and it goes on from there"
        cut(socket)
        await publish(served, topic, 5)
        assert isinstance(await next_of(room, REJOINED), Recovered)
        assert (await next_of(room)).payload == 5


async def test_event_that_cannot_be_decoded_is_reported_as_lost(served: Served, topic: str) -> None:
    async with quickly(served.ws) as socket, socket.join(topic, recover=True) as room, socket.join("other") as other:
        await publish(served, topic, {"n": 1})
        for number, beyond in enumerate((b'{"n":%b}' % (b"9" * 5000), b"9" * 5000)):
            await served.relay.publish(topic, "n", beyond)
            await served.relay.publish("other", "n", beyond)
            first = await next_of(room, "n")
            lost = await next_of(room)
            assert isinstance(lost, Lost) and lost.reason == "frame not understood"
            assert lost.position == first.position is not None
            assert isinstance(await next_of(other), Lost)
            await publish(served, topic, {"n": number})
        assert (await next_of(room, "n")).payload == {"n": 1}
        assert (socket.undecodable, socket.reconnects) == (4, 0)


async def test_topic_without_a_history_reports_each_rejoin_as_a_loss(served: Served) -> None:
    async with quickly(served.ws) as socket, socket.join("plain:1", recover=True) as room:
        await publish(served, "plain:1", {"_position": "mine"}, [1])
        assert [(event.payload, event.position) for event in await receive(room, 2)] == [
            ({"_position": "mine"}, None),
            ([1], None),
        ]
        cut(socket)
        lost = await next_of(room, REJOINED)
        assert isinstance(lost, Lost) and lost.reason == "nothing to recover from"


async def test_live_events_have_no_position(served: Served, topic: str, redis: Redis) -> None:
    async with quickly(served.ws) as socket, socket.join(topic, recover=True) as room:
        served.relay.local_broadcast(topic, "n", {"_position": "mine", "n": 1})
        served.relay.local_broadcast(topic, "n", [2])
        got = [(event.payload, event.position) for event in await receive(room, 2)]
        assert got == [({"n": 1}, None), ([2], None)]


async def test_each_event_comes_once_and_in_order_through_cuts_under_load(served: Served, topic: str) -> None:
    """Three publishers, payloads of all kinds; the connection is cut at random, also while events are replayed."""
    chance = random.Random(topic)
    count = 600
    published = asyncio.Event()
    cuts = 0

    async def flood(start: int) -> None:
        for number in range(start, count, 3):
            await publish(served, topic, payload_of(number))
            await asyncio.sleep(0)

    async with quickly(served.ws) as socket, socket.join(topic, recover=True) as room:

        async def cut_often() -> None:
            nonlocal cuts
            while not published.is_set() or cuts < 5:
                await asyncio.sleep(chance.uniform(0, 0.02))
                if room.is_joined:
                    cut(socket)
                    cuts += 1

        cutting = asyncio.create_task(cut_often())
        flooding = asyncio.gather(*map(flood, range(3)))
        got = await receive(room, count)
        await flooding
        published.set()
        await cutting
        expected = sorted(map(repr, map(payload_of, range(count))))
        assert sorted(repr(event.payload) for event in got) == expected
        places = [tuple(map(int, str(event.position).split("-"))) for event in got]
        assert places == sorted(places)
        assert [n for _, n in places] == list(range(places[0][1], places[0][1] + count))
        for start in range(3):
            own = [repr(payload_of(number)) for number in range(start, count, 3)]
            assert [repr(event.payload) for event in got if repr(event.payload) in set(own)] == own
        await publish(served, topic, "end")
        assert [event.payload for event in await receive(room, 1)] == ["end"]
    assert cuts >= 5
    assert served.relay.metrics.history_not_recovered.total() == 0


async def test_slow_loop_is_given_everything_and_its_pushes_are_answered(served: Served, topic: str) -> None:
    async with quickly(served.ws) as socket, socket.join(topic, recover=True, limit=7) as room:
        pushes: list[asyncio.Task[Any]] = []
        for start in range(0, 200, 50):
            await asyncio.gather(*(publish(served, topic, payload_of(start + number)) for number in range(50)))
            await eventually(lambda: room._queue.is_behind, "the queue to be full")
        for number in range(200):
            event = (await receive(room, 1))[0]
            assert (event.payload, event.dropped) == (payload_of(number), 0)
            pushes.append(asyncio.create_task(room.push("new_msg", number)))
        assert await asyncio.gather(*pushes) == [{}] * 200
        assert (room.dropped, socket.reconnects) == (0, 0)


async def test_loop_that_asks_to_be_ended_can_go_on_from_its_last_event(served: Served, topic: str) -> None:
    got: list[Event] = []
    async with quickly(served.ws) as socket, socket.join(topic, recover=True, limit=3, overflow="raise") as room:
        await publish(served, topic, *range(10))
        await eventually(lambda: room.dropped == 7, "all events")
        with pytest.raises(QueueOverflow):
            while True:
                got.append(await next_of(room))
    async with quickly(served.ws) as socket, socket.join(topic, recover=str(got[-1].position)) as room:
        got += await receive(room, 7)
    assert [event.payload for event in got] == list(range(10))


@pytest.mark.parametrize(
    "options",
    [
        {"recover": True, "overflow": "drop-oldest"},
        {"recover": "1-1", "overflow": "latest"},
        {"last": 5, "overflow": "latest"},
        {"overflow": "recover"},
        {"last": 0},
    ],
)
async def test_options_that_contradict_each_other_are_refused(served: Served, options: Any) -> None:
    async with quickly(served.ws) as socket:
        with pytest.raises(ValueError, match=r"^(overflow|last): expected"):
            socket.join("room:1", **options)


# Against a server that does what the test says.


async def say(server: Answering, *payloads: Any, topic: str = "t") -> None:
    for payload in payloads:
        await server.say(None, None, topic, "n", payload)


async def joined(server: Answering, since: str | None, **response: Any) -> Message:
    """Take a join with this position, and accept it."""
    join = await server.hear("phx_join")
    assert join.payload == {"since": since}
    await server.reply(join, response=response)
    return join


async def test_phx_error_means_a_join_with_the_last_position() -> None:
    async def script(server: Answering) -> None:
        join = await joined(server, None, _position="1-0")
        await say(server, {"n": 1, "_position": "1-1"})
        await server.say(join.join_ref, join.join_ref, "t", "phx_error", {"reason": "events may have been missed"})
        await say(server, {"n": "of no join", "_position": "1-2"})
        join = await joined(server, "1-1", _position="1-1", recovered=True)
        await say(server, {"n": 2, "_position": "1-2"})
        await server.say(join.join_ref, join.join_ref, "t", "phx_error", {})
        await joined(server, "1-2", _position="9-0", recovered=False, reason="history expired")
        await say(server, {"n": 3, "_position": "9-1"})
        await hold(server)

    async with scripted(script) as url, quickly(url) as socket, socket.join("t", recover=True) as room:
        got = [await next_of(room) for _ in range(5)]
    assert [(type(event), event.payload if event.event == "n" else None, event.position) for event in got] == [
        (Event, {"n": 1}, "1-1"),
        (Recovered, None, "1-1"),
        (Event, {"n": 2}, "1-2"),
        (Lost, None, "9-0"),
        (Event, {"n": 3}, "9-1"),
    ]


async def test_frame_whose_topic_is_not_found_may_have_been_an_event_of_any() -> None:
    """Those that recover events learn it, once the event before it has come; a reply that is lost is no event."""

    async def script(server: Answering) -> None:
        await server.reply(await server.hear("phx_join"), response={"_position": "1-0"})
        await server.reply(await server.hear("phx_join"))
        await say(server, "no position yet")
        for frame in ("{", '[null,"1","t","phx_reply",{}]'):
            await server.connection.send(frame)
        await say(server, {"n": 2, "_position": "1-2"})
        await say(server, {"n": 3}, topic="other")
        await hold(server)

    async with scripted(script) as url, quickly(url) as socket:
        async with socket.join("t", recover=True) as room, socket.join("other") as other:
            assert (await next_of(room, "n")).payload == "no position yet"
            lost = await next_of(room)
            assert isinstance(lost, Lost) and (lost.reason, lost.position) == ("frame not understood", "1-0")
            assert (await next_of(room, "n")).position == "1-2"
            assert (await next_of(other, "n")).payload == {"n": 3}


async def test_cut_between_an_event_and_its_position_repeats_nothing() -> None:
    async def first(server: Answering) -> None:
        await joined(server, None, _position="1-0")
        await say(server, [1])
        await server.say(None, None, "t", "relay:position", {"_position": "1-1"})
        await say(server, [2])

    async def second(server: Answering) -> None:
        await joined(server, "1-1", _position="1-1", recovered=True)
        await say(server, [2])
        await server.say(None, None, "t", "relay:position", {"_position": "1-2"})

    async def third(server: Answering) -> None:
        await joined(server, "1-2", _position="1-2", recovered=True)
        await hold(server)

    async with scripted(first, second, third) as url, quickly(url) as socket:
        async with socket.join("t", recover=True) as room:
            got = [await next_of(room) for _ in range(4)]
            assert [event.payload for event in got if event.event == "n"] == [[1], [2]]
            await eventually(lambda: room._queue.is_empty and socket.reconnects == 2 and room.is_joined, "the rejoin")


async def test_cut_within_the_replay_goes_on_where_it_ended() -> None:
    async def first(server: Answering) -> None:
        await joined(server, None, _position="1-0")

    async def second(server: Answering) -> None:
        await joined(server, "1-0", _position="1-0", recovered=True)
        await say(server, *({"n": n, "_position": f"1-{n}"} for n in range(1, 4)))

    async def third(server: Answering) -> None:
        await joined(server, "1-3", _position="1-3", recovered=True)
        await say(server, *({"n": n, "_position": f"1-{n}"} for n in range(4, 6)))
        await hold(server)

    async with scripted(first, second, third) as url, quickly(url) as socket:
        async with socket.join("t", recover=True) as room:
            assert [event.payload["n"] for event in await receive(room, 5)] == [1, 2, 3, 4, 5]


async def test_history_that_cannot_be_read_now_does_not_forget_the_position() -> None:
    async def first(server: Answering) -> None:
        await joined(server, None, _position="1-0")

    async def second(server: Answering) -> None:
        await joined(server, "1-0", _position=None, recovered=False, reason="history unavailable")

    async def third(server: Answering) -> None:
        await joined(server, "1-0", _position="1-0", recovered=True)
        await say(server, {"_position": "1-1"})
        await hold(server)

    async with scripted(first, second, third) as url, quickly(url) as socket:
        async with socket.join("t", recover=True) as room:
            lost = await next_of(room, REJOINED)
            assert isinstance(lost, Lost) and lost.reason == "history unavailable"
            while (event := await next_of(room)).event == REJOINED:
                pass
            assert event.position == "1-1"


async def test_events_that_wait_for_the_loop_count_as_received() -> None:
    """They are in the queue: the next join does not ask for them again."""

    async def first(server: Answering) -> None:
        await joined(server, None, _position="1-0")
        await say(server, *({"n": n, "_position": f"1-{n}"} for n in range(1, 6)))

    async def second(server: Answering) -> None:
        await joined(server, "1-3", _position="1-3", recovered=True)
        await say(server, *({"n": n, "_position": f"1-{n}"} for n in range(4, 6)))
        await server.hear("phx_join")
        await server.say(None, None, "t", "too late", {})
        await hold(server)

    async with scripted(first, second) as url, quickly(url) as socket:
        async with socket.join("t", recover=True, limit=3) as room:
            await eventually(lambda: socket.reconnects == 1 and room.is_joined, "the rejoin")
            # The queue was full before and still is: the server's second answer is refused too.
            await eventually(lambda: room._queue.is_behind, "the second answer")
            got = [(await next_of(room)) for _ in range(4)]
            assert [event.payload["n"] for event in got if event.event == "n"] == [1, 2, 3]
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anext(room)
            assert not room.is_joined
