"""The Python client against a real relay; where a server must misbehave, against one that says what the test says."""

import ast
import asyncio
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets

import relay_client
from relay import Plugin, Refused
from relay_client import REJOINED, Channel, ConnectError, Event, JoinError, PushError, QueueOverflow, connect
from relay_client.wire import Message, decode, encode
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey, free_port
from tests.support.servers import bad_gateway
from tests.support.serving import Served, eventually, heard_on

DIRECTORY = Path(__file__).parents[2] / "clients" / "python"

# As `connect`, but it comes back at once.
quickly = partial(connect, reconnect_s=lambda tries: 0.01, rejoin_s=lambda tries: 0.01)

ServeRelay = Callable[..., Awaitable[Served]]


async def next_of(room: Channel, name: str | None = None) -> Event:
    """The next event, which must have this name where one is given."""
    async with asyncio.timeout(20):
        event = await anext(room)
    assert name in (None, event.event), event
    return event


class Answering:
    """One connection to `scripted`: what the client said, and the means to answer it."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection

    async def hear(self, event: str | None = None) -> Message:
        async with asyncio.timeout(20):
            frame = await self.connection.recv()
        # A client's binary push is not for the client to decode.
        message = decode(frame) if isinstance(frame, str) else Message(None, None, "", "bytes", frame)
        assert event in (None, message.event), message
        return message

    async def say(self, *fields: Any) -> None:
        frame = encode(Message(*fields))
        await self.connection.send(frame)

    async def reply(self, to: Message, status: str = "ok", response: Any = None) -> None:
        await self.say(to.join_ref, to.ref, to.topic, "phx_reply", {"status": status, "response": response or {}})


@asynccontextmanager
async def scripted(*scripts: Callable[[Answering], Awaitable[None]]) -> AsyncIterator[str]:
    """A server that plays one script a connection, and cuts the connection off when the script ends.

    Yields: the address for `connect`. A script that fails, fails the test.
    """
    left, faults = list(scripts), []

    async def play(connection: ServerConnection) -> None:
        try:
            if left:
                await left.pop(0)(Answering(connection))
        except Exception as error:
            faults.append(error)
        connection.transport.abort()

    async with serve_websockets(play, "127.0.0.1", 0, subprotocols=None) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/socket"
    if faults:
        raise faults[0]
    assert not left, f"{len(left)} connections were never made"


async def hold(server: Answering) -> None:
    """The end of a script that keeps the connection until the client closes it."""
    await server.connection.wait_closed()


# Joins, pushes, events.


def endless() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


def deep() -> Any:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    return value


UNSENDABLE = [
    "\ud83d",
    {"text": "half a pair: \udc4d"},
    {"a": [{"b": "\ud83d"}]},
    {"\ud83d": 1},
    float("nan"),
    {"a": [float("-inf")]},
    {float("nan"): 1},
    10**5000,
    object(),
    {"when": {1, 2}},
    {(1, 2): 3},
    endless(),
    deep(),
]


@pytest.mark.parametrize("payload", UNSENDABLE, ids=range(len(UNSENDABLE)))
async def test_payload_that_cannot_be_sent_fails_in_its_call_alone(served: Served, redis: Redis, payload: Any) -> None:
    async with connect(served.ws) as socket, socket.join("python:1") as room, socket.join("python:2") as other:
        for reply in (True, False):
            with pytest.raises((ValueError, TypeError), match="payload: "):
                await room.push("new_msg", payload, reply=reply)
        with pytest.raises((ValueError, TypeError), match="payload: "):
            async with socket.join("python:3", {"params": payload}):
                pass
        await redis.publish("to:python:2:new_msg", "1")
        assert (await next_of(other)).payload == 1
        assert await room.push("new_msg", {}) == {}
        assert (socket.reconnects, socket.is_connected) == (0, True)
        await redis.publish("to:python:1:new_msg", "2")
        assert (await next_of(room)).payload == 2, "neither topic was joined again"


@pytest.mark.parametrize("name", ["\ud83d", "a\udfff", 7, None, b"x"])
async def test_name_that_cannot_be_sent_fails_in_its_call_alone(served: Served, name: Any) -> None:
    error = ValueError if isinstance(name, str) else TypeError
    async with connect(served.ws) as socket, socket.join("python:1") as room:
        with pytest.raises(error, match="event: "):
            await room.push(name)
        with pytest.raises(error, match="event: "):
            await room.push(name, b"bytes")
        with pytest.raises(error, match="topic: "):
            socket.join(name)
        assert await room.push("new_msg") == {}
        assert socket.reconnects == 0


async def test_what_cannot_be_sent_is_refused_at_once_also_while_there_is_no_connection() -> None:
    async def joined(server: Answering) -> None:
        await server.reply(await server.hear("phx_join"))
        await server.say(None, None, "t", "phx_error", {})
        await hold(server)

    async with scripted(joined) as url, connect(url, rejoin_s=lambda tries: 60) as socket, socket.join("t") as room:
        await eventually(lambda: not room.is_joined, "the phx_error")
        async with asyncio.timeout(5):
            with pytest.raises(ValueError, match="ud83d"):
                await room.push("new_msg", "\ud83d", timeout_s=60)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"token": "hunter2\ud83d"}, "token"),
        ({"token": 7}, "token"),
        ({"params": {"a": "hunter2\ud83d"}}, "params"),
        ({"additional_headers": {"x": "hunter2\r\ny: z"}}, "additional_headers: 'x'"),
        ({"additional_headers": [("x", "hunter2\ud83d")]}, "additional_headers: 'x'"),
    ],
)
async def test_what_cannot_travel_with_the_handshake_is_refused_and_not_shown(
    served: Served, options: Any, word: str
) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        async with connect(served.ws, **options):
            pass
    assert "hunter2" not in str(caught.value)


async def test_token_that_cannot_be_sent_does_not_end_a_connection_that_is_made_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokens = iter(["one", "\ud83d", "two"])

    async def cut(server: Answering) -> None:
        await server.hear("phx_join")

    async def stay(server: Answering) -> None:
        await server.reply(await server.hear("phx_join"))
        await hold(server)

    async with scripted(cut, stay) as url, quickly(url, token=lambda: next(tokens)) as socket:
        async with socket.join("t"):
            assert socket.reconnects == 1
    assert "token: expected text" in caplog.text


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["ws://localhost:{port}/x?key=hunter2", "/elsewhere?key=hunter2"])
async def test_redirect_is_an_error_and_no_token_goes_along(status: int, location: str) -> None:
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        target = location.format(port=port)
        writer.write(f"HTTP/1.1 {status} X\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectError, match=f"HTTP {status}, a redirect to ws://") as caught:
            async with connect(f"ws://127.0.0.1:{port}/socket", token="hunter2"):
                pass
    assert len(heads) == 1, "asked once"
    assert "hunter2" not in str(caught.value)


async def test_join_push_reply_and_event(served: Served, redis: Redis, valkey: Valkey) -> None:
    async with connect(served.ws) as socket, heard_on(valkey.url, "from:python:1:*") as hear:
        async with socket.join("python:1", {"nick": "ada"}) as room:
            assert (socket.is_connected, room.is_joined, room.topic, room.response) == (True, True, "python:1", {})
            assert await room.push("new_msg", {"text": "hï"}) == {}
            assert await hear() == ("from:python:1:new_msg", '{"text":"hï"}'.encode())
            await room.push("empty")
            assert await hear() == ("from:python:1:empty", b"{}")
            await room.push("quiet", [1], reply=False)
            assert await hear() == ("from:python:1:quiet", b"[1]")
            await redis.publish("to:python:1:new_msg", '{"text":"hi"}')
            assert await next_of(room) == Event("python:1", "new_msg", {"text": "hi"}, None, 0)
        await eventually(lambda: "python:1" not in served.relay.topics, "the leave")
        assert not room.is_joined
        with pytest.raises(StopAsyncIteration):
            await anext(room)
        with pytest.raises(PushError) as refused:
            await room.push("late")
        assert refused.value.status == "closed"


async def test_binary_payloads_go_both_ways(served: Served, redis: Redis, valkey: Valkey) -> None:
    payload = bytes(range(256))
    async with (
        connect(served.ws) as socket,
        socket.join("python:bytes") as room,
        heard_on(valkey.url, "from:python:bytes:*") as hear,
    ):
        assert await room.push("raw", payload) == {}
        assert await hear() == ("from:python:bytes:raw", payload)
        await redis.publish("to:python:bytes:raw", payload)
        assert (await next_of(room, "raw")).payload == payload


async def test_refusals_carry_the_reason_of_the_server(serve_relay: ServeRelay) -> None:
    plugin = Plugin("doorman")

    @plugin.on_join("python:*")
    def join(join: Any) -> Any:
        if "nick" not in join.payload:
            raise Refused("nick is missing")
        return {"hello": join.payload["nick"]}

    @plugin.on_push("python:*", "say")
    def say(push: Any) -> Any:
        if not push.payload.get("text"):
            raise Refused("nothing to say")
        return {"seen": True}

    served = await serve_relay(extra_plugins=(plugin,))
    async with connect(served.ws) as socket:
        with pytest.raises(JoinError, match="phx_join on 'python:door': nick is missing") as refused:
            async with socket.join("python:door"):
                pytest.fail("joined")
        assert (refused.value.status, refused.value.reason) == ("error", "nick is missing")
        async with socket.join("python:door", {"nick": "ada"}) as room:
            assert room.response == {"hello": "ada"}
            assert await room.push("say", {"text": "hi"}) == {"seen": True}
            with pytest.raises(PushError, match="say on 'python:door': nothing to say"):
                await room.push("say", {"text": ""})


async def test_topics_are_apart_and_one_is_joined_once_at_a_time(served: Served, redis: Redis) -> None:
    async with connect(served.ws) as socket, socket.join("python:a") as one, socket.join("python:b") as other:
        with pytest.raises(RuntimeError, match="joined already"):
            async with socket.join("python:a"):
                pytest.fail("joined")
        for topic in ("python:b", "python:a"):
            await redis.publish(f"to:{topic}:to", json.dumps(topic))
        assert (await next_of(one)).payload == "python:a"
        assert (await next_of(other)).payload == "python:b"


async def test_what_follows_a_join_in_the_same_packet_arrives() -> None:
    async def script(server: Answering) -> None:
        join = await server.hear("phx_join")
        await server.say(None, None, "t", "early", {})  # of another join: this one is not answered yet
        await server.reply(join)
        await server.say(join.join_ref, None, "t", "first", {})
        await server.say("0", None, "t", "stale", {})
        await server.say(None, None, "t", "second", {})
        await hold(server)

    async with scripted(script) as url, connect(url) as socket, socket.join("t") as room:
        assert [(await next_of(room)).event for _ in range(2)] == ["first", "second"]


# A loop that is too slow. The relay sends in order, so that what a second topic hears comes after all of the first.


async def flood(served: Served, redis: Redis, overflow: Any, *, limit: int) -> tuple[Channel, list[Event], Any]:
    """Fifty events, ``a`` and ``b`` in turn, for a loop that begins when all have come."""
    got: list[Event] = []
    error = None
    async with (
        connect(served.ws) as socket,
        socket.join("python:flood", limit=limit, overflow=overflow) as room,
        socket.join("python:flood:end") as end,
    ):
        for number in range(50):
            await redis.publish(f"to:python:flood:{'ab'[number % 2]}", str(number))
        await redis.publish("to:python:flood:end:end", "1")
        await next_of(end, "end")
        try:
            while room._queue._waiting:
                got.append(await next_of(room))
            if overflow == "raise":
                await next_of(room)
        except QueueOverflow as raised:
            error = raised
    return room, got, error


async def test_slow_loop_loses_the_oldest_events_and_is_told(served: Served, redis: Redis) -> None:
    room, got, _ = await flood(served, redis, "drop-oldest", limit=10)
    assert [event.payload for event in got] == list(range(40, 50))
    assert ([event.dropped for event in got], room.dropped) == ([40] + [0] * 9, 40)


async def test_slow_loop_gets_the_latest_of_each_event(served: Served, redis: Redis) -> None:
    room, got, _ = await flood(served, redis, "latest", limit=10)
    assert [(event.event, event.payload, event.dropped) for event in got] == [("a", 48, 48), ("b", 49, 0)]
    assert room.dropped == 48


async def test_slow_loop_can_ask_to_be_ended(served: Served, redis: Redis) -> None:
    room, got, error = await flood(served, redis, "raise", limit=10)
    assert [event.payload for event in got] == list(range(10))
    assert (str(error), room.dropped) == ("'python:flood': over 10 events were waiting", 40)


async def test_loop_that_keeps_up_loses_nothing_of_a_burst_far_over_its_limit(served: Served) -> None:
    """Thousands of events come in one read: the loops have their turns in between."""
    async with connect(served.ws) as socket, socket.join("python:burst", limit=200) as room:
        for number in range(5000):
            served.relay.local_broadcast("python:burst", "n", number)
        assert [(await next_of(room)).payload for _ in range(5000)] == list(range(5000))
        assert room.dropped == 0


# What is lost is made again.


async def test_relay_that_is_killed_and_started_again_is_joined_with_fresh_params(
    valkey: Valkey, redis: Redis, tmp_path: Path
) -> None:
    plugins = tmp_path / "plugins" / "echo"
    plugins.mkdir(parents=True)
    (plugins / "__init__.py").write_text(
        "from relay import Plugin\n\nplugin = Plugin('echo')\n\n\n"
        "@plugin.on_join('python:*')\ndef join(join):\n    return join.payload\n"
    )
    environ = {"RELAY_PLUGINS__PATHS": json.dumps([str(plugins.parent)])}
    arguments = ("--port", str(free_port()), "--redis-url", valkey.url)
    joins, asked = count(1), 0

    def token() -> str:
        nonlocal asked
        asked += 1
        return f"t{asked}"

    async def params() -> dict[str, int]:
        return {"join": next(joins)}

    with RelayProcess(*arguments, environ=environ) as relay:
        async with quickly(relay.ws, token=token) as socket, socket.join("python:restart", params) as room:
            assert (room.response, asked) == ({"join": 1}, 1)
            assert relay.process is not None
            relay.process.kill()
            await eventually(lambda: not room.is_joined and socket._tries > 1, "a vain try to connect again")
            waiting = asyncio.create_task(room.push("meanwhile", {}))
            with RelayProcess(*arguments, environ=environ):
                payload = {"reason": "connection lost", "response": {"join": 2}}
                assert await next_of(room) == Event("python:restart", REJOINED, payload)
                assert (room.is_joined, room.response, socket.reconnects) == (True, {"join": 2}, 1)
                assert await waiting == {}
                assert asked > 1, "the token is asked anew too"
                await redis.publish("to:python:restart:n", "7")
                assert (await next_of(room)).payload == 7


async def test_gap_of_the_relay_is_visible_and_its_topic_joined_again(serve_relay: ServeRelay) -> None:
    with Valkey() as own:
        served = await serve_relay(redis_url=own.url)
        async with quickly(served.ws) as socket, socket.join("python:gap") as room:
            own.kill()
            own.start()
            rejoined = await next_of(room, REJOINED)
            assert rejoined.payload == {"reason": "events may have been missed", "response": {}}
            assert socket.reconnects == 0
            async with Redis.from_url(own.url) as redis:
                await redis.publish("to:python:gap:n", "7")
            assert (await next_of(room)).payload == 7


async def test_topic_that_the_server_closes_ends_its_loop_and_is_not_joined_again(served: Served, redis: Redis) -> None:
    async with quickly(served.ws) as socket, socket.join("python:closed") as room:
        await redis.publish("to:python:closed:last", "1")
        await eventually(lambda: room._queue._waiting, "the last event")
        # A second join beneath the client: the relay closes the first.
        await socket._link.tell(Message("x", "x", "python:closed", "phx_join", {}))
        assert [event.event async for event in room] == ["last"]
        assert (room.is_joined, socket.is_connected) == (False, True)
        with pytest.raises(PushError) as refused:
            await room.push("late")
        assert refused.value.status == "closed"


async def test_connection_that_the_server_closes_with_1000_is_not_made_again() -> None:
    async def script(server: Answering) -> None:
        await server.reply(await server.hear("phx_join"))
        await server.hear("unanswered")
        await server.connection.close(1000)

    async with scripted(script) as url, quickly(url) as socket, socket.join("t") as room:
        with pytest.raises(PushError) as refused:
            await room.push("unanswered")
        assert refused.value.status == "disconnected"
        assert [event async for event in room] == []
        with pytest.raises(JoinError) as refused:
            async with socket.join("other"):
                pytest.fail("joined")
        assert refused.value.status == "closed"


async def test_heartbeats_are_sent_and_one_without_an_answer_means_a_new_connection() -> None:
    async def first(server: Answering) -> None:
        await server.reply(await server.hear("phx_join"))
        for _ in range(3):
            beat = await server.hear("heartbeat")
            assert (beat.join_ref, beat.topic, beat.payload) == (None, "phoenix", {})
            await server.reply(beat)
        await server.hear("heartbeat")
        await hold(server)

    async def second(server: Answering) -> None:
        while (message := await server.hear()).event == "heartbeat":
            await server.reply(message)
        await server.reply(message)
        await hold(server)

    async with scripted(first, second) as url, quickly(url, heartbeat_s=0.05) as socket:
        async with socket.join("t") as room:
            assert (await next_of(room, REJOINED)).payload["reason"] == "connection lost"
            assert socket.reconnects == 1


async def test_relay_answers_heartbeats(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async with connect(served.ws, heartbeat_s=0.2) as socket:
        await eventually(lambda: socket._link._last_ref >= 5, "five heartbeats")
        assert (socket.reconnects, socket.is_connected) == (0, True)


async def test_program_that_blocks_its_event_loop_keeps_its_connection() -> None:
    """The answer to the heartbeat is there when it goes on, and has not been read."""

    async def script(server: Answering) -> None:
        await server.reply(await server.hear("phx_join"))
        beat = await server.hear("heartbeat")
        time.sleep(0.4)  # noqa: ASYNC251 - it blocks
        await server.reply(beat)
        for _ in range(3):
            await server.reply(await server.hear("heartbeat"))
        await server.say(None, None, "t", "beaten", {})
        await hold(server)

    async with scripted(script) as url, quickly(url, heartbeat_s=0.2) as socket, socket.join("t") as room:
        assert (await next_of(room, "beaten")).payload == {}
        assert socket.reconnects == 0


async def test_rejoin_goes_on_after_refusals_silence_and_params_that_raise(caplog: pytest.LogCaptureFixture) -> None:
    asked = count(1)

    def params() -> dict[str, int]:
        if (number := next(asked)) == 3:
            raise LookupError("no params today")
        return {"number": number}

    async def script(server: Answering) -> None:
        join = await server.hear("phx_join")
        await server.reply(join)
        await server.say(join.join_ref, join.join_ref, "t", "phx_error", {})
        refused = await server.hear("phx_join")
        assert refused.payload == {"number": 2}
        await server.reply(refused, "error", {"reason": "not today"})
        silent = await server.hear("phx_join")
        assert silent.payload == {"number": 4}
        leave = await server.hear("phx_leave")
        assert leave.join_ref == silent.join_ref
        await server.reply(silent)  # too late
        await server.reply(await server.hear("phx_join"), response={"n": 5})
        await hold(server)

    async with (
        scripted(script) as url,
        quickly(url, timeout_s=0.5 * PATIENCE) as socket,
        socket.join("t", params) as room,
    ):
        rejoined = await next_of(room)
        assert rejoined.payload == {"reason": "phx_error", "response": {"n": 5}}
    assert "not joined again: phx_join on 't': not today" in caplog.text
    assert "no params today" in caplog.text


async def test_reconnect_goes_on_when_the_token_cannot_be_had(caplog: pytest.LogCaptureFixture) -> None:
    asked = count(1)

    async def token() -> str:
        if (number := next(asked)) == 2:
            raise LookupError("no token today")
        return f"??????>{number}"

    offered = []

    async def script(server: Answering) -> None:
        assert server.connection.request is not None
        offered.append(server.connection.request.headers["Sec-WebSocket-Protocol"])
        await server.hear()

    async def last(server: Answering) -> None:
        await script(server)
        await hold(server)

    async with scripted(script, last) as url, quickly(url, token=token) as socket:
        for _ in range(2):
            await eventually(lambda: socket.is_connected, "a connection")
            sent = socket.reconnects
            await socket._link.tell(Message(None, "1", "t", "go on", {}))
            if not sent:
                await eventually(lambda: socket.reconnects, "the second connection")
    assert offered == [f"phoenix, base64url.bearer.phx.Pz8_Pz8_P{letter}" for letter in ("jE", "jM")]
    assert "no token today" in caplog.text


async def test_pushes_wait_for_the_join_and_fail_when_the_connection_is_lost() -> None:
    async def first(server: Answering) -> None:
        await server.reply(await server.hear("phx_join"))
        await server.hear("lost")

    async def second(server: Answering) -> None:
        join = await server.hear("phx_join")
        await server.say(None, None, "x", "go", {})
        await server.reply(join)
        for number in range(3):
            push = await server.hear("kept")
            assert (push.join_ref, push.payload) == (join.join_ref, number)
            await server.reply(push, response={"number": number})
        await server.hear("unanswered")
        await hold(server)

    async with scripted(first, second) as url, quickly(url) as socket, socket.join("t") as room:
        with pytest.raises(PushError) as refused:
            await room.push("lost")
        assert refused.value.status == "disconnected"
        replies = await asyncio.gather(*(room.push("kept", number) for number in range(3)))
        assert replies == [{"number": number} for number in range(3)]
        with pytest.raises(PushError) as refused:
            await room.push("unanswered", timeout_s=0.05)
        assert refused.value.status == "timeout"


async def test_push_to_a_topic_that_crashes_fails_when_it_is_joined_again() -> None:
    async def script(server: Answering) -> None:
        join = await server.hear("phx_join")
        await server.reply(join)
        late, lost = await server.hear("late"), await server.hear("lost")
        await server.say(join.join_ref, join.join_ref, "t", "phx_error", {})
        await server.reply(late, response={"number": 1})
        again = await server.hear("phx_join")
        await server.reply(again)
        await server.reply(lost)
        await server.reply(await server.hear("next"), response={"number": 2})
        await hold(server)

    async with scripted(script) as url, quickly(url, timeout_s=600) as socket, socket.join("t") as room:
        async with asyncio.timeout(20):
            replies = await asyncio.gather(room.push("late"), room.push("lost"), return_exceptions=True)
            assert replies[0] == {"number": 1}
            assert isinstance(replies[1], PushError) and replies[1].status == "disconnected"
            assert await room.push("next") == {"number": 2}


async def test_join_just_when_the_connection_is_lost_comes_after_the_next_one(served: Served) -> None:
    """At each turn of the loop around the loss; one where the join did not let the socket see it hung for ever."""
    async with quickly(served.ws) as socket:
        for turns in range(8):
            await eventually(lambda: socket.is_connected, "a connection")
            assert socket._link._connection is not None
            socket._link._connection.transport.abort()
            for _ in range(turns):
                await asyncio.sleep(0)
            async with socket.join("python:just") as room:
                assert room.is_joined


async def test_connection_is_closed_in_good_order_whatever_still_arrives() -> None:
    async def script(server: Answering) -> None:
        await server.reply(await server.hear("phx_join"))
        await server.hear("phx_leave")
        for number in range(1000):
            await server.say(None, None, "t", "n", number)
        await hold(server)

    async with scripted(script) as url:
        async with quickly(url, close_timeout=10 * PATIENCE) as socket:
            connection = socket._link._connection
            async with socket.join("t"):
                pass
        assert connection is not None and connection.close_code == 1000


async def test_frame_that_is_none_is_counted_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    async def script(server: Answering) -> None:
        join = await server.hear("phx_join")
        await server.reply(join)
        for frame in (
            "{",
            b"\7",
            '[null,null,"t","phx_reply",{}]',
            '["9","9","t","phx_reply",{"status":"ok","response":1}]',
        ):
            await server.connection.send(frame)
        await server.say(None, None, "t", "mark", {})
        await hold(server)

    async with scripted(script) as url, connect(url) as socket, socket.join("t") as room:
        await next_of(room, "mark")
        assert (socket.undecodable, socket.reconnects) == (3, 0)


# Connecting.


async def test_refused_connection_says_why_and_no_secret(served: Served) -> None:
    url = served.ws.replace("//", "//user:hidden@") + "?secret=hidden"
    headers = {"Origin": "http://elsewhere.example"}
    with pytest.raises(ConnectError) as refused:
        async with connect(url, token="hidden", params={"token": "hidden"}, additional_headers=headers):
            pytest.fail("connected")
    assert str(refused.value).startswith(f"{served.ws}/websocket: HTTP 403")
    assert "hidden" not in str(refused.value)
    assert refused.value.__cause__ is None and refused.value.__context__ is None


async def test_nobody_listening_is_a_connect_error_at_once() -> None:
    with pytest.raises(ConnectError, match="^ws://127.0.0.1:"):
        async with connect(f"ws://127.0.0.1:{free_port()}/socket"):
            pytest.fail("connected")


async def test_silent_server_is_a_connect_error_in_time() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectError, match="no answer within 0.05 s"):
            async with connect(f"ws://127.0.0.1:{port}/socket", timeout_s=0.05):
                pytest.fail("connected")


async def test_page_of_a_proxy_is_not_repeated_in_the_error() -> None:
    async with await asyncio.start_server(bad_gateway, "127.0.0.1", 0) as server:
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/socket"
        with pytest.raises(ConnectError, match="/socket/websocket: HTTP 502: Bad Gateway$"):
            async with connect(url):
                pytest.fail("connected")


@pytest.mark.parametrize("url", ["localhost:8000/socket", "ftp://x/socket", "ws:///socket", ""])
def test_address_that_makes_no_sense_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="^url: expected ws://host/path"):
        connect(url)


async def test_url_has_its_own_query_the_params_and_the_version_last(served: Served) -> None:
    seen = []

    async def script(server: Answering) -> None:
        assert server.connection.request is not None
        seen.append(server.connection.request.path)

    async with scripted(script) as url, connect(url.replace("ws", "http", 1) + "/?k=v", params={"d": "é&"}):
        await eventually(lambda: seen, "the connection")
    assert seen == ["/socket/websocket?k=v&d=%C3%A9%26&vsn=2.0.0"]


# Ends. `conftest.py` fails a test that leaves a task behind.


def tasks_of_clients() -> list[asyncio.Task[Any]]:
    """Those of the library, and of what it stands on; a relay here may still be making connections of its own."""
    places = ("relay_client", "websockets")
    codes = ((task, getattr(task.get_coro(), "cr_code", None)) for task in asyncio.all_tasks())
    return [task for task, code in codes if code is not None and any(part in code.co_filename for part in places)]


async def test_cancelled_loop_leaves_its_topic_and_no_task(served: Served) -> None:
    joined = asyncio.Event()

    async def listen() -> None:
        async with connect(served.ws) as socket, socket.join("python:cancelled") as room:
            joined.set()
            async for _ in room:
                pytest.fail("nothing was sent")

    task = asyncio.create_task(listen())
    await joined.wait()
    assert tasks_of_clients()
    assert served.relay.topics["python:cancelled"] == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: "python:cancelled" not in served.relay.topics, "the leave")
    await eventually(lambda: not tasks_of_clients(), "the end of the client's tasks")


async def test_cancellation_at_any_point_of_connect_and_join_leaves_nothing(served: Served) -> None:
    joined = False

    async def listen() -> None:
        nonlocal joined
        async with connect(served.ws) as socket, socket.join("python:early") as room:
            joined = True
            await next_of(room)

    for turns in count():
        task = asyncio.create_task(listen())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if joined:
            break
    await eventually(lambda: "python:early" not in served.relay.topics, "the leaves")
    await eventually(lambda: not tasks_of_clients(), "the end of the client's tasks")


async def test_join_that_is_not_answered_is_undone() -> None:
    async def script(server: Answering) -> None:
        join = await server.hear("phx_join")
        leave = await server.hear("phx_leave")
        assert leave.join_ref == join.join_ref
        await hold(server)

    async with scripted(script) as url, connect(url, timeout_s=0.5 * PATIENCE) as socket:
        with pytest.raises(JoinError) as refused:
            async with socket.join("t"):
                pytest.fail("joined")
        assert refused.value.status == "timeout"


async def test_fault_of_the_users_own_back_off_ends_the_loop_with_it(served: Served) -> None:
    def broken(tries: int) -> float:
        raise ZeroDivisionError

    async with connect(served.ws, reconnect_s=broken) as socket, socket.join("python:broken") as room:
        assert socket._link._connection is not None
        socket._link._connection.transport.abort()
        with pytest.raises(ZeroDivisionError):
            await next_of(room)


def test_waits_are_random_within_windows_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: low + high / 2)
    assert [relay_client.socket.reconnect_s(tries) for tries in (1, 2, 5, 5000)] == [0.5, 1, 5, 5]
    assert [relay_client.socket.rejoin_s(tries) for tries in (1, 2, 3, 4, 9)] == [0.5, 1, 2.5, 5, 5]


# The package.


def test_client_imports_nothing_but_websockets() -> None:
    """Above all not `relay`, which its users need not have."""
    found: set[str] = set()
    for path in (DIRECTORY / "relay_client").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").split(".")[0])
        assert len(path.read_text("utf-8").splitlines()) <= 400
    assert found - sys.stdlib_module_names == {"relay_client", "websockets"}


def test_wheel_is_built_and_works_by_itself(tmp_path: Path, relay: RelayProcess) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(DIRECTORY)], check=True, cwd=tmp_path, env={**os.environ, "PIP_NO_INDEX": "1"})
    [wheel] = tmp_path.glob("starlette_relay_client-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert {"relay_client/__init__.py", "relay_client/py.typed"} <= names
        assert not [name for name in names if not name.startswith(("relay_client/", "starlette_relay_client-"))]
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(wheel)!r})
from relay_client import connect, __version__
async def main():
    async with connect({relay.ws!r}) as socket, socket.join("python:wheel") as room:
        return await room.push("hello")
assert asyncio.run(main()) == {{}}
assert "relay" not in sys.modules
sys.stdout.write(__version__)
"""
    ran = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, relay_client.__version__, "")
