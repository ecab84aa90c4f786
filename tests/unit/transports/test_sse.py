"""`relay.transports.sse`: how a stream begins, what it is sent, and in which order it ends."""

import asyncio
import json
import logging
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from relay.config_sections import LimitsConfig, Overflow, Policy
from relay.errors import CloseCode, Reason
from relay.log import RateLimitedLoggers
from relay.metrics import Metrics
from relay.protocol import serializer
from relay.protocol.frame import Frame
from relay.protocol.payload import EMPTY, Payload, classify_payload, encode_payload
from relay.protocol.serializer import Version
from relay.transports import sse as module
from relay.transports.base import TransportServices
from relay.transports.outbox import OutboxBudget
from relay.transports.sse import SSETransport, is_server_ending
from relay.transports.sse_request import StreamRequest
from tests.support.asgi import Connection, until
from tests.support.sse import StreamEvent

ROOM = 2048
LIMITS = LimitsConfig(payload_max_bytes=1024, frame_max_bytes=ROOM, outbox_max_bytes=ROOM, close_timeout_s=20)
HURRY = LIMITS.model_copy(update={"close_timeout_s": 0.01})
DISCONNECT = Policy(Overflow.DISCONNECT, match="a*")
DROP_OLDEST = Policy(Overflow.DROP_OLDEST, match="b*", notify_dropped=True)


def frame(event: str = "e", size: int = 0, topic: str = "a", position: str | None = None) -> Frame:
    """An event; ``size`` is of its payload, nearly."""
    payload = encode_payload("x" * size) if size else EMPTY
    return serializer.encode_broadcast(Version.SSE, topic, event, payload, position)


class Owner:
    """The socket of a transport, as the transport knows it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def readiness_changed(self) -> None:
        self.calls.append("readiness")

    def close_started(self) -> None:
        self.calls.append("close")

    def fell_behind(self, topic: str, position: str) -> None:
        self.calls.append(f"{topic} behind {position}")

    @property
    def dropped_notice(self) -> Callable[[str, int], Frame]:
        return lambda topic, count: frame(f"{topic} lost {count}")


class Session:
    """A transport, and the task that reads from it until it ends, as `Socket.run` does."""

    def __init__(
        self,
        connection: Connection,
        topics: tuple[str, ...] = ("a",),
        limits: LimitsConfig = LIMITS,
        budget: OutboxBudget | None = None,
        since: dict[str, str] | None = None,
        last: int | None = None,
    ) -> None:
        self.connection = connection
        self.metrics = Metrics()
        self.owner = Owner()
        self.joins: list[serializer.Message] = []
        log = RateLimitedLoggers().get("relay.socket")
        self.transport = SSETransport(
            "s1",
            StreamRequest(topics, since or {}, last),
            connection.scope,
            connection.receive,
            connection.send,
            TransportServices(limits, self.metrics, log, budget),
        )
        self.transport.owner = self.owner
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while (received := await self.transport.receive()) is not None:
                self.joins.append(serializer.decode(received, Version.SSE))
        finally:
            self.transport.end()

    def reply(self, topic: str = "a", response: Payload = EMPTY, status: str = "ok") -> None:
        """Answer a join."""
        self.transport.send_control(serializer.encode_reply(Version.SSE, "1", "1", topic, status, response))

    def refuse(self, reason: str, topic: str = "a") -> None:
        self.reply(topic, encode_payload({"reason": reason}), "error")

    async def begun(self, *topics: str, response: Payload = EMPTY) -> "Session":
        """The stream, once its head is sent."""
        for topic in topics or ("a",):
            self.reply(topic, response)
        await until(lambda: self.connection.parser.retry_ms is not None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return self

    def event(self, event: str, size: int = 0, topic: str = "a", policy: Policy = DISCONNECT) -> None:
        self.transport.send_event(frame(event, size, topic), topic, event, policy)

    def block(self) -> None:
        """The client stops reading."""
        if self.connection.writer is not None:
            self.connection.writer.pause()
        self.connection.take_frames.clear()

    def unblock(self) -> None:
        self.connection.take_frames.set()
        if self.connection.writer is not None:
            self.connection.writer.resume()

    async def blocked(self) -> "Session":
        """A client that does not read, with one event (``first``) under way already where ASGI writes."""
        self.block()
        if self.connection.writer is None:
            self.event("first")
            await asyncio.sleep(0)
        return self

    @property
    def events(self) -> list[str]:
        return [event.event for event in self.connection.events if event.event not in ("first", "relay:join")]

    @property
    def last(self) -> tuple[str, Any]:
        event = self.connection.events[-1]
        return event.event, json.loads(event.data)

    async def finish(self) -> None:
        self.connection.disconnect()
        await self.task


@pytest.fixture(params=["direct", "asgi"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both write modes."""
    yield request.param


def connect(mode: str = "asgi", **options: Any) -> Connection:
    return Connection("/socket/sse", "topic=a", kind="http", direct=mode == "direct", **options)


# Joins.


async def test_topics_are_joined_as_a_client_would() -> None:
    session = Session(connect(), ("a", 'b"ü'), since={"a": "17-1"})
    await until(lambda: len(session.joins) == 2)
    assert [(join.topic, join.event, bytes(join.payload)) for join in session.joins] == [
        ("a", "phx_join", b'{"since":"17-1"}'),
        ('b"ü', "phx_join", b'{"since":null}'),
    ]
    assert all(join.ref == join.join_ref == "1" for join in session.joins)
    assert session.transport.last_size == len('["1","1","b\\"ü","phx_join",{"since":null}]'.encode())
    await session.finish()
    assert session.transport.ending == (None, "", "client")
    assert session.transport.closed_with is None


async def test_newest_events_are_asked_for_as_a_client_would() -> None:
    session = Session(connect(), last=50)
    await until(lambda: session.joins)
    assert bytes(session.joins[0].payload) == b'{"since":null,"last":50}'
    await session.finish()


async def test_response_begins_once_all_joins_are_accepted(mode: str) -> None:
    session = Session(connect(mode, headers=[("host", "h"), ("origin", "http://h")]), ("a", "b"))
    session.reply("a")
    session.event("early")
    await asyncio.sleep(0)
    assert session.connection.log == []
    session.reply("b")
    await until(lambda: session.events)
    connection = session.connection
    assert (connection.status, session.events) == (200, ["early"])
    assert connection.header("content-type") == "text/event-stream; charset=utf-8"
    assert connection.header("cache-control") == "no-store"
    assert connection.header("access-control-allow-origin") == "http://h"
    assert connection.parser.retry_ms is not None and 1000 <= connection.parser.retry_ms <= 3000
    await session.finish()


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.INVALID_TOPIC, 400),
        (Reason.TOKEN_EXPIRED, 401),
        (Reason.UNAUTHORIZED, 403),
        ("a plugin's own words", 403),
    ],
)
async def test_join_that_stays_refused_is_answered_with_its_status(mode: str, reason: str, status: int) -> None:
    session = Session(connect(mode), ("a", "b"))
    session.reply("a")
    session.event("e")
    session.refuse(reason, "b")
    await session.task
    assert session.connection.status == status
    assert session.connection.body == f"topic 'b': {reason}\n"
    assert session.connection.header("www-authenticate") == ("Bearer" if status == 401 else None)
    assert session.metrics.dropped == {"socket closed": 1}
    assert session.transport.ending == (1008, reason, "relay")


@pytest.mark.parametrize("response", [b'{"reason":5}', b'"no"', b"[]", b"\x00"])
async def test_refusal_in_other_words_is_answered_too(response: bytes) -> None:
    session = Session(connect())
    session.reply("a", classify_payload(response), "error")
    await session.task
    assert (session.connection.status, session.connection.body) == (403, "topic 'a': refused\n")


@pytest.mark.parametrize("reason", [Reason.BUS_UNAVAILABLE, Reason.JOIN_CRASHED, Reason.RATE_LIMITED])
async def test_join_that_may_be_accepted_later_is_answered_with_a_stream_that_ends(mode: str, reason: str) -> None:
    """`EventSource` comes back after a stream that ends, and after no other status."""
    session = Session(connect(mode), ("a", "b"))
    session.refuse(reason, "b")
    session.reply("a")  # too late
    await session.task
    assert session.connection.status == 200
    assert session.connection.is_complete
    assert session.last == ("relay:error", {"reason": f"topic 'b': {reason}"})
    retry_ms = session.connection.parser.retry_ms
    assert retry_ms is not None and 1000 <= retry_ms <= 5000


async def test_stream_that_is_closed_before_it_begins_may_come_back(mode: str) -> None:
    session = Session(connect(mode))
    assert session.transport.close(CloseCode.RESTART, "the relay is restarting")
    assert not session.transport.close(CloseCode.GOING_AWAY, "again")
    await session.task
    assert session.connection.status == 200
    assert session.last == ("relay:error", {"reason": "the relay is restarting"})
    assert session.owner.calls == ["close"]


async def test_joins_come_first_with_what_plugins_answer() -> None:
    session = Session(connect(), ("a", "b"))
    session.reply("a", encode_payload({"members": 3}))
    session.event("e")
    session.reply("b")
    await until(lambda: session.events)
    assert session.connection.events == [
        StreamEvent("relay:join", '{"topic":"a","response":{"members":3}}', ""),
        StreamEvent("relay:join", '{"topic":"b","response":{}}', ""),
        StreamEvent("e", "{}", ""),
    ]
    await session.finish()


# Positions.


async def test_position_of_a_join_is_the_first_id(mode: str) -> None:
    """A client that is cut before the first event comes back to it."""
    session = await Session(connect(mode)).begun(response=encode_payload({"_position": "17-1", "recovered": True}))
    assert session.connection.parser.last_id == "17-1"
    session.transport.send_event(frame(position="17-2"), "a", "e", DISCONNECT)
    session.event("live-only")
    await until(lambda: len(session.events) == 2)
    assert [event.id for event in session.connection.events] == ["17-1", "17-2", "17-2"]
    await session.finish()


async def test_events_that_the_history_has_lost_are_told() -> None:
    response = encode_payload({"_position": "18-0", "recovered": False, "reason": "unknown position"})
    session = await Session(connect()).begun(response=response)
    assert session.last == ("relay:lost", {"topic": "a", "reason": "unknown position"})
    await session.finish()


async def test_stream_of_several_topics_names_the_position_of_each(mode: str) -> None:
    session = Session(connect(mode), ("a:1", "b", "c"))
    session.reply("a:1", encode_payload({"_position": "17-1"}))
    session.reply("b", encode_payload({"_position": "18-1"}))
    session.reply("c")
    await until(lambda: session.connection.events)
    assert session.transport.direct_write() is None, "its events have ids of their own"
    session.transport.send_event(frame(topic="b", position="18-2"), "b", "e", DISCONNECT)
    session.event("live", topic="c")
    session.transport.send_event(frame(topic="a:1", position="17-2"), "a:1", "e", DISCONNECT)
    await until(lambda: session.events.count("e") == 2)
    assert [event.id for event in session.connection.events[-3:]] == [
        "a%3A1=17-1&b=18-2",
        "a%3A1=17-1&b=18-2",
        "a%3A1=17-2&b=18-2",
    ]
    await session.finish()


async def test_id_names_only_what_was_sent_before(mode: str) -> None:
    """Events wait, and what they are sent after is known when they are sent."""
    session = Session(connect(mode), ("a", "b"))
    session.reply("a", encode_payload({"_position": "1-1"}))
    session.reply("b", encode_payload({"_position": "1-1"}))
    await until(lambda: session.connection.events)
    await session.blocked()
    latest = Policy(Overflow.LATEST)
    for topic, position in (("a", "1-2"), ("b", "1-2"), ("a", "1-3")):
        session.transport.send_event(frame(topic=topic, position=position), topic, "e", latest)
    session.unblock()
    await until(lambda: session.events.count("e") == 2)
    assert [event.id for event in session.connection.events if event.event == "e"] == ["a=1-1&b=1-2", "a=1-3&b=1-2"]
    await session.finish()


# Events.


async def test_events_are_written_in_order(mode: str) -> None:
    session = await Session(connect(mode)).begun()
    for number in range(10):
        session.event(f"e{number}")
    session.transport.send_control(serializer.encode_push(Version.SSE, "1", "a", "pushed", EMPTY))
    await until(lambda: "pushed" in session.events)
    assert session.events == [*(f"e{number}" for number in range(10)), "pushed"]
    await session.finish()
    assert not session.metrics.dropped


async def test_stream_takes_no_events_before_all_joins_are_decided(mode: str) -> None:
    session = Session(connect(mode), ("a", "b"))
    session.reply("a")
    waiting = asyncio.create_task(session.transport.drained())
    await asyncio.sleep(0)
    assert not waiting.done()
    session.reply("b")
    await waiting
    await session.finish()


async def test_bytes_go_straight_to_the_transport_where_the_server_lets_them() -> None:
    session = await Session(connect("direct")).begun()
    write = session.transport.direct_write()
    assert write is not None
    write(frame("direct").ws_frame)
    assert session.events == ["direct"]
    assert session.owner.calls == ["readiness"]
    session.block()
    assert session.transport.direct_write() is None
    await session.finish()


async def test_middleware_around_send_is_not_passed_over() -> None:
    """It may compress the response, say."""
    connection, through = connect("direct"), list[str]()
    inner = connection.send

    async def send(message: Any) -> None:
        through.append(message["type"])
        await inner(message)

    connection.send = send  # type: ignore[method-assign]
    session = await Session(connection).begun()
    session.event("e")
    await until(lambda: session.events)
    assert session.transport.direct_write() is None
    assert through == ["http.response.start", "http.response.body", "http.response.body"]
    await session.finish()


async def test_events_that_wait_are_sent_together() -> None:
    session = await (await Session(connect(), limits=LimitsConfig()).begun()).blocked()
    for number in range(100):
        session.event(f"e{number}", 1000)
    session.unblock()
    await until(lambda: len(session.events) == 100)
    sizes = [len(message["body"]) for message in session.connection.log[3:]]
    assert all(30_000 < size < 34_000 for size in sizes[:-1])
    assert len(sizes) == 4
    await session.finish()


async def test_slow_reader_is_disconnected(mode: str) -> None:
    session = await (await Session(connect(mode)).begun()).blocked()
    for number in range(3):
        session.event(f"e{number}", 900)
    assert session.transport.closed_with == CloseCode.SLOW_READER
    session.event("late")
    session.unblock()
    await session.task
    assert session.last == ("relay:error", {"reason": "outbox full: this client reads too slowly"})
    assert session.metrics.dropped == {"slow reader disconnected": 3, "socket closed": 1}
    assert session.transport.dropped == 2


async def test_slow_reader_is_told_what_was_dropped(mode: str) -> None:
    session = await (await Session(connect(mode)).begun()).blocked()
    for number in range(4):
        session.event(f"e{number}", 900, policy=DROP_OLDEST)
    assert session.transport.queued_bytes > 1800
    session.unblock()
    await until(lambda: len(session.events) == 3)
    assert session.events == ["a lost 2", "e2", "e3"]
    assert session.metrics.dropped == {"slow reader, drop-oldest": 2}
    assert session.metrics.dropped_topics == {"b*": 2}
    await session.finish()


async def test_largest_outbox_of_too_many_is_emptied(mode: str) -> None:
    metrics = Metrics()
    session = await (await Session(connect(mode), budget=OutboxBudget(1500, metrics)).begun()).blocked()
    session.event("e0", 900)
    session.event("e1", 900)
    assert session.transport.closed_with == CloseCode.SLOW_READER
    assert session.metrics.refused == {"outboxes full": 1}
    session.unblock()
    await session.task


async def test_time_in_which_a_client_does_not_read_is_known(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    session = await Session(connect(mode)).begun()
    assert session.transport.idle_s(now + 100) == 0, "nothing waits for it"
    await session.blocked()
    assert session.transport.idle_s(now + 100) == 100
    session.unblock()
    await asyncio.sleep(0)
    assert session.transport.idle_s(now + 100) == 0
    await session.finish()


async def test_comments_prove_that_a_stream_without_events_is_alive(mode: str) -> None:
    hurry = LIMITS.model_copy(update={"idle_timeout_s": 0.01})
    session = await Session(connect(mode), limits=hurry).begun()
    await until(lambda: session.connection.parser.comments > 2)
    session.block()
    await asyncio.sleep(0.02)
    so_far = session.connection.parser.comments
    await asyncio.sleep(0.02)
    assert session.connection.parser.comments == so_far, "nothing is added to what is not read"
    assert session.events == []
    session.unblock()
    await session.finish()


# Ends.


async def test_subscription_that_ends_with_an_error_ends_the_stream(mode: str) -> None:
    """The client has no way to rejoin: it comes back."""
    session = await Session(connect(mode), ("a", "b")).begun("a", "b")
    session.event("e")
    session.transport.send_control(serializer.encode_error(Version.SSE, "1", "a", Reason.EVENTS_MISSED))
    session.transport.send_control(serializer.encode_error(Version.SSE, "1", "b", Reason.EVENTS_MISSED))
    session.event("late")
    await session.task
    assert session.events == ["e", "relay:error"]
    assert session.last == ("relay:error", {"topic": "a", "reason": "events may have been missed"})
    assert session.connection.is_complete
    assert session.transport.ending == (1001, "events may have been missed", "relay")
    assert session.metrics.dropped == {"socket closed": 1}


async def test_last_subscription_that_is_closed_ends_the_stream(mode: str) -> None:
    session = await Session(connect(mode), ("a", "b")).begun("a", "b")
    session.transport.send_control(serializer.encode_close(Version.SSE, "1", "a"))
    session.event("e", topic="b")
    await until(lambda: len(session.events) == 2)
    assert not session.connection.is_complete
    session.transport.send_control(serializer.encode_close(Version.SSE, "1", "b"))
    await session.task
    assert session.connection.events[2:] == [
        StreamEvent("relay:close", '{"topic":"a"}', ""),
        StreamEvent("e", "{}", ""),
        StreamEvent("relay:close", '{"topic":"b"}', ""),
    ]


async def test_close_comes_after_what_is_queued_and_gives_its_reason(mode: str) -> None:
    session = await (await Session(connect(mode)).begun()).blocked()
    session.event("queued")
    session.transport.close(CloseCode.RESTART, "the relay is restarting")
    assert session.events == []
    session.unblock()
    await session.task
    assert session.events == ["queued", "relay:error"]
    assert session.connection.is_complete
    retry_ms = session.connection.parser.retry_ms
    assert retry_ms is not None and 1000 <= retry_ms <= 5000


async def test_client_that_does_not_read_its_end_is_cut(mode: str) -> None:
    session = await (await Session(connect(mode), limits=HURRY).begun()).blocked()
    session.event("never read")
    session.connection.transport.buffered_bytes = 7
    session.transport.close(CloseCode.RESTART, "the relay is restarting")
    await session.task
    assert session.connection.transport.aborted == 1
    assert not session.connection.is_complete
    assert session.metrics.cut_off_bytes == (7 if mode == "direct" else 0)
    assert session.metrics.dropped["socket closed"] == 1


async def test_client_that_goes_while_its_stream_is_closed_ends_it(mode: str) -> None:
    session = await (await Session(connect(mode)).begun()).blocked()
    session.event("e")
    session.transport.close(CloseCode.RESTART, "the relay is restarting")
    await session.finish()
    assert session.connection.transport.aborted == 0


async def test_client_that_goes_before_the_joins_are_decided_is_noticed() -> None:
    session = Session(connect())
    await session.finish()
    session.reply()  # the join goes on without it
    assert session.connection.log == []


@pytest.mark.parametrize("at", ["start", "later"])
async def test_fault_of_the_server_while_it_sends_is_no_fault_of_ours(
    mode: str, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "relay.socket")
    connection = connect(mode)
    session = Session(connection)
    if at == "start":
        connection.fault = OSError("gone")
        session.reply()
        await until(lambda: "cannot be written to" in caplog.text)
    else:
        await session.begun()
        connection.fault = OSError("gone")
        session.transport.close(CloseCode.RESTART, "bye")
        await session.task
        assert "not closed in good order: OSError('gone')" in caplog.text
        return
    await session.finish()


async def test_fault_of_the_server_while_it_receives_ends_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "relay.socket")
    connection = connect()

    async def receive() -> dict[str, Any]:
        raise OSError("gone")

    connection.receive = receive  # type: ignore[method-assign]
    await Session(connection).task
    assert "cannot be read from: OSError('gone')" in caplog.text


async def test_body_of_the_request_means_nothing() -> None:
    session = await Session(connect()).begun()
    session.connection.put("http.request", body=b"x", more_body=True)
    session.event("e")
    await until(lambda: session.events)
    await session.finish()


async def test_cancelled_reader_is_not_taken_for_our_own_end() -> None:
    session = await Session(connect()).begun()
    session.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await session.task
    assert not session.transport.is_own_cancellation()
    assert session.transport.closed_with is None


async def test_nothing_follows_the_end(mode: str) -> None:
    session = await Session(connect(mode)).begun()
    session.transport.close(CloseCode.RESTART, "bye")
    await session.task
    before = len(session.connection.log)
    session.transport.send_control(serializer.encode_push(Version.SSE, "1", "a", "late", EMPTY))
    session.event("late")
    assert not session.transport.close(CloseCode.RESTART, "again")
    await asyncio.sleep(0)
    assert len(session.connection.log) == before


def test_uvicorn_is_asked_whether_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        should_exit = False

        def handle_exit(self, number: int, frame: object) -> None: ...

    server = Server()
    monkeypatch.setattr(signal, "getsignal", lambda number: server.handle_exit)
    assert not is_server_ending()
    server.should_exit = True
    assert is_server_ending()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    assert not is_server_ending()


def test_connection_that_is_lost_on_uvloop_is_no_fault_of_the_join() -> None:
    async def lose() -> None:
        loop, accepted = asyncio.get_running_loop(), asyncio.Queue[asyncio.BaseTransport]()

        class Server(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                accepted.put_nowait(transport)

        server = await loop.create_server(Server, "127.0.0.1", 0)
        client, _ = await loop.create_connection(asyncio.Protocol, *server.sockets[0].getsockname())
        transport = await accepted.get()
        client.abort()
        while transport.get_extra_info("socket").fileno() >= 0:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)
        server.close()
        module._limit_unacknowledged(_Receives(transport).receive, 60)

    uvloop.run(asyncio.wait_for(lose(), 20))


class _Receives:
    """What `receive` of Uvicorn's is a method of."""

    def __init__(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    async def receive(self) -> dict[str, Any]:
        raise AssertionError("nothing is asked for")
