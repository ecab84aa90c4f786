"""`relay.transports.websocket`: what is read, written, dropped and counted, and in which order a connection ends."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from relay.config_sections import LimitsConfig, Overflow, Policy
from relay.errors import CloseCode
from relay.log import RateLimitedLoggers
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.transports.base import TransportServices
from relay.transports.outbox import RECOVER_BYTES, OutboxBudget
from relay.transports.websocket import WebSocketTransport
from tests.support.asgi import Connection, until

ROOM = 2048
LIMITS = LimitsConfig(payload_max_bytes=1024, frame_max_bytes=ROOM, outbox_max_bytes=ROOM, close_timeout_s=20)
HURRY = LIMITS.model_copy(update={"close_timeout_s": 0.01})
DISCONNECT = Policy(Overflow.DISCONNECT, match="a*")
DROP_OLDEST = Policy(Overflow.DROP_OLDEST, match="b*", notify_dropped=True)
RECOVER = Policy(Overflow.RECOVER, match="a*")


def frame(text: str, size: int = 0) -> Frame:
    return Frame(text.encode().ljust(size, b"."), True)


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
        limits: LimitsConfig = LIMITS,
        compression: bool = False,
        budget: OutboxBudget | None = None,
    ) -> None:
        self.connection = connection
        self.metrics = Metrics()
        self.owner = Owner()
        self.frames: list[str | bytes] = []
        self.sizes: list[int] = []
        self.was_cut = False
        self._limits, self._compression, self._budget = limits, compression, budget
        self._task: asyncio.Task[None] | None = None
        self._transport: WebSocketTransport | None = None

    @property
    def transport(self) -> WebSocketTransport:
        assert self._transport is not None
        return self._transport

    @property
    def task(self) -> asyncio.Task[None]:
        assert self._task is not None
        return self._task

    async def open(self) -> "Session":
        await self.connection.receive()  # websocket.connect
        self._task = asyncio.create_task(self._read())
        await until(lambda: self._transport)
        return self

    async def _read(self) -> None:
        connection, log = self.connection, RateLimitedLoggers().get("relay.socket")
        self._transport = transport = WebSocketTransport(
            "s1",
            connection.scope,
            connection.receive,
            connection.send,
            TransportServices(self._limits, self.metrics, log, self._budget, self._compression),
        )
        transport.owner = self.owner
        try:
            while (received := await transport.receive()) is not None:
                self.frames.append(received)
                self.sizes.append(transport.last_size)
        except asyncio.CancelledError:
            if not transport.is_own_cancellation():
                raise
            self.was_cut = True
        finally:
            transport.end()

    def event(self, text: str, size: int = 0, topic: str = "a", policy: Policy = DISCONNECT) -> None:
        self.transport.send_event(frame(text, size), topic, "e", policy)

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
        """A client that does not read, with one frame (``first``) under way already where ASGI writes."""
        self.block()
        if self.connection.writer is None:
            self.transport.send_control(frame("first"))
            await asyncio.sleep(0)
        return self

    @property
    def sent(self) -> list[Any]:
        return [entry for entry in self.connection.sent if entry != "first"]

    async def finish(self) -> None:
        self.connection.disconnect()
        await self.task


@pytest.fixture(params=["direct", "asgi"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both write modes."""
    yield request.param


def connect(mode: str, **options: Any) -> Connection:
    return Connection(direct=mode == "direct", **options)


# Reading.


async def test_frames_are_received_in_order_with_their_size(mode: str) -> None:
    session = await Session(connect(mode)).open()
    session.connection.text("one")
    session.connection.text("zwölf")
    session.connection.put("websocket.receive", bytes=b"\x00\x01", text=None)
    await session.finish()
    assert session.frames == ["one", "zwölf", b"\x00\x01"]
    assert session.sizes == [3, 6, 2]


async def test_transport_reports_the_clients_address_and_query(mode: str) -> None:
    session = await Session(connect(mode, query="vsn=2.0.0&token=x", client=("10.1.2.3", 1))).open()
    assert (session.transport.address, session.transport.query_string) == ("10.1.2.3", b"vsn=2.0.0&token=x")
    assert session.transport.write_mode == mode
    await session.finish()
    unix = await Session(connect(mode, client=None)).open()
    assert unix.transport.address is None
    await unix.finish()


async def test_clients_close_is_reported_with_code_and_reason(mode: str) -> None:
    session = await Session(connect(mode)).open()
    session.connection.disconnect(4000, "bye")
    await session.task
    assert session.transport.ending == (4000, "bye", "client")
    assert not session.metrics.malformed
    assert not session.transport.close(1012, "too late"), "it has ended"


@pytest.mark.parametrize("large", ["x" * (ROOM + 1), "ö" * (ROOM // 2 + 1), b"x" * (ROOM + 1)])
async def test_frame_over_the_limit_closes_with_1009(mode: str, large: str | bytes) -> None:
    session = await Session(connect(mode)).open()
    key = "text" if isinstance(large, str) else "bytes"
    session.connection.put("websocket.receive", **{key: large})
    session.connection.text("comes after the close")
    await session.task
    assert (session.sent, session.frames) == ([CloseCode.TOO_BIG], [])
    assert session.metrics.malformed == {"1009": 1}


async def test_frame_at_the_limit_passes(mode: str) -> None:
    session = await Session(connect(mode)).open()
    session.connection.text("ö" * (ROOM // 2))
    await session.finish()
    assert session.sizes == [ROOM]


@pytest.mark.parametrize(("code", "count"), [(1002, 1), (1007, 1), (1009, 1), (1001, 0)])
async def test_fault_that_the_server_found_is_counted(mode: str, code: int, count: int) -> None:
    session = await Session(connect(mode)).open()
    session.connection.disconnect(code)
    await session.task
    assert session.metrics.malformed[str(code)] == count


async def test_client_that_repeats_the_relays_code_is_counted_once(mode: str) -> None:
    session = await Session(connect(mode)).open()
    session.transport.reject(CloseCode.INVALID_PAYLOAD, "no JSON")
    await session.task
    assert session.metrics.malformed == {"1007": 1}
    assert session.transport.ending == (1007, "no JSON", "relay")


async def test_idle_time_counts_from_the_last_message_or_ping(mode: str) -> None:
    session = await Session(connect(mode)).open()
    session.transport.last_received = 100.0
    assert session.transport.idle_s(160.0) == 60.0
    if session.connection.writer is not None:
        session.connection.writer.last_ping = 150.0
        assert session.transport.idle_s(160.0) == 10.0
    await session.finish()


# Writing.


async def test_replies_and_events_are_sent_in_order(mode: str) -> None:
    session = await Session(connect(mode)).open()
    session.transport.send_control(frame("reply"))
    session.event("1")
    session.transport.send_event(Frame(b"\x00\x01", False), "a", "e", DISCONNECT)
    session.event("3")
    await until(lambda: len(session.sent) == 4)
    assert session.sent == ["reply", "1", b"\x00\x01", "3"]
    await session.finish()


async def test_frame_for_an_idle_asgi_connection_needs_no_outbox() -> None:
    session = await Session(connect("asgi")).open()
    await asyncio.sleep(0)
    for number in range(3):
        session.event(str(number))
        assert session.transport.queued_bytes == 0
        await asyncio.sleep(0)
    session.transport.send_control(frame("reply"))
    await asyncio.sleep(0)
    assert session.sent == ["0", "1", "2", "reply"]
    await session.finish()


async def test_direct_write_is_offered_while_the_buffer_has_room() -> None:
    session = await Session(connect("direct")).open()
    assert session.transport.direct_write() is not None
    session.block()
    assert session.transport.direct_write() is None
    session.unblock()
    assert session.transport.direct_write() is not None
    assert session.owner.calls == ["readiness", "readiness"]
    session.transport.close(1012, "restart")
    assert session.transport.direct_write() is None
    await session.task


async def test_asgi_offers_no_direct_write() -> None:
    session = await Session(connect("asgi")).open()
    assert session.transport.direct_write() is None
    await session.finish()


@pytest.mark.parametrize(("compression", "deflates"), [(True, True), (True, False), (False, True)])
async def test_events_are_compressed_where_both_sides_want_it(compression: bool, deflates: bool) -> None:
    session = await Session(connect("direct", deflates=deflates), compression=compression).open()
    event, reply = frame("event", 500), frame("reply", 500)
    session.transport.send_event(event, "a", "e", DISCONNECT)
    session.transport.send_control(reply)
    session.block()
    session.transport.send_event(event, "a", "e", DISCONNECT)
    session.unblock()
    wanted = event.ws_frame_compressed if compression and deflates else event.ws_frame
    assert event.ws_frame_compressed != event.ws_frame
    assert session.transport.deflates is (compression and deflates)
    assert session.connection.log == [wanted, reply.ws_frame, wanted], "replies are not compressed"
    await session.finish()


async def test_frames_queued_under_back_pressure_leave_in_order(mode: str) -> None:
    session = await (await Session(connect(mode)).open()).blocked()
    session.event("1")
    session.transport.send_control(frame("reply"))
    session.event("2")
    assert session.transport.queued_bytes == len("1reply2")
    assert session.sent == []
    session.unblock()
    await until(lambda: len(session.sent) == 3)
    assert session.sent == ["1", "reply", "2"]
    assert session.transport.queued_bytes == 0
    await session.finish()


async def test_flush_stops_where_the_buffer_is_full_again() -> None:
    session = await (await Session(connect("direct")).open()).blocked()
    for number in range(3):
        session.event(str(number))
    writer = session.connection.writer
    assert writer is not None
    write = writer.write

    def fill(data: bytes) -> None:
        write(data)
        assert writer is not None
        writer.pause()

    writer.write = fill
    session.unblock()
    assert session.sent == ["0"]
    session.unblock()
    assert session.sent == ["0", "1"]
    assert session.transport.direct_write() is None, "2 comes first"
    await session.finish()
    assert session.metrics.dropped == {"socket closed": 1}


# What a slow reader loses.


async def test_full_outbox_closes_with_1013_where_no_event_may_be_missing(mode: str) -> None:
    session = await (await Session(connect(mode)).open()).blocked()
    for number in range(3):
        session.event(str(number), ROOM // 2)
    assert session.transport.closed_with == CloseCode.SLOW_READER
    assert session.metrics.dropped == {"slow reader disconnected": 3}
    assert session.metrics.dropped_topics == {"a*": 3}
    session.event("4")
    assert session.metrics.dropped["socket closed"] == 1
    session.unblock()
    await session.task
    assert session.sent == [CloseCode.SLOW_READER]


async def test_full_outbox_drops_the_oldest_and_counts_by_pattern(mode: str) -> None:
    session = await (await Session(connect(mode)).open()).blocked()
    for number in range(4):
        session.event(str(number), ROOM // 2, "b", DROP_OLDEST)
    assert session.metrics.dropped == {"slow reader, drop-oldest": 2}
    assert session.metrics.dropped_topics == {"b*": 2}
    assert session.transport.dropped == 2
    session.unblock()
    await until(lambda: len(session.sent) == 3)
    assert [text.rstrip(".") for text in session.sent] == ["b lost 2", "2", "3"]
    await session.finish()


async def test_slow_client_is_given_the_history_from_the_first_event_that_it_did_not_get(mode: str) -> None:
    """Also where what waits is of an earlier join of the topic, and younger."""
    session = await (await Session(connect(mode)).open()).blocked()

    def event(n: int) -> None:
        recorded = frame(str(n), RECOVER_BYTES // 2)
        recorded.position = f"1-{n}"
        session.transport.send_event(recorded, "a", "e", RECOVER)

    for n in (1, 2, 3):
        event(n)
    for n in (8, 9, 4):
        event(n)
    assert session.owner.calls[-2:] == ["a behind 1-1", "a behind 1-4"]
    assert (session.transport.queued_bytes, session.transport.dropped) == (0, 0)
    session.unblock()
    await session.finish()


async def test_notice_of_dropped_events_precedes_the_end_of_their_subscription(mode: str) -> None:
    session = await (await Session(connect(mode)).open()).blocked()
    for number in range(3):
        session.event(str(number), ROOM, "b", DROP_OLDEST)
    session.transport.settle_dropped("b", session.owner.dropped_notice)
    session.transport.send_control(frame("phx_close"))
    session.unblock()
    await until(lambda: len(session.sent) == 3)
    assert [text.rstrip(".") for text in session.sent] == ["b lost 2", "2", "phx_close"]
    await session.finish()


async def test_transport_without_back_pressure_has_nothing_to_settle(mode: str) -> None:
    session = await Session(connect(mode)).open()
    session.transport.settle_dropped("b", session.owner.dropped_notice)
    assert (session.transport.queued_bytes, session.transport.dropped) == (0, 0)
    await session.finish()
    assert session.sent == []


async def test_client_that_sends_and_does_not_read_is_closed_with_1013(mode: str) -> None:
    session = await (await Session(connect(mode)).open()).blocked()
    for _ in range(4):
        session.transport.send_control(frame("reply", ROOM // 2))
    assert session.transport.closed_with == CloseCode.SLOW_READER
    assert session.metrics.refused == {"sends and does not read": 1}
    session.unblock()
    await session.task
    assert [str(entry).rstrip(".") for entry in session.sent] == ["reply"] * 4 + ["1013"], "replies are never dropped"


async def test_largest_outbox_is_closed_where_all_together_are_too_large(mode: str) -> None:
    metrics = Metrics()
    budget = OutboxBudget(3000, metrics)
    small = await (await Session(connect(mode), budget=budget).open()).blocked()
    large = await (await Session(connect(mode), budget=budget).open()).blocked()
    large.event("1", 1200)
    small.event("1", 500)
    small.event("2", 500)
    assert small.transport.closed_with is None
    large.event("2", 800)
    assert (small.transport.closed_with, large.transport.closed_with) == (None, CloseCode.SLOW_READER)
    assert large.metrics.dropped == {"outboxes full": 2}
    assert large.metrics.refused == {"outboxes full": 1}
    assert large.transport.queued_bytes == 0
    for session in (small, large):
        session.unblock()
    await large.task
    await until(lambda: len(small.sent) == 2)
    await small.finish()
    assert metrics.outbox_bytes == 0


async def test_evicted_transport_is_closed_once_with_1013(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    session = await Session(connect(mode)).open()
    session.transport.evict("in flight", "too much waits")
    session.transport.evict("in flight", "too much waits")
    await session.task
    assert session.sent == [1013]
    assert [record.getMessage() for record in caplog.records] == ["socket s1: closed with 1013: too much waits"]


async def test_connection_is_drained_once_nothing_waits(mode: str) -> None:
    session = await Session(connect(mode)).open()
    await session.transport.drained()
    await session.blocked()
    session.event("e")
    waiting = asyncio.create_task(session.transport.drained())
    await asyncio.sleep(0)
    assert not waiting.done()
    session.unblock()
    await waiting
    await session.finish()


async def test_connection_that_is_lost_is_drained_once_its_reader_knows() -> None:
    """Until then it takes nothing more: what fills it again and again would not let the reader have its turn."""
    session = await Session(connect("direct")).open()
    assert session.connection.writer is not None
    session.connection.writer.end()
    waiting = asyncio.create_task(session.transport.drained())
    await asyncio.sleep(0)
    assert not waiting.done()
    session.connection.disconnect()
    await waiting


# Its end.


async def test_close_follows_what_is_queued(mode: str) -> None:
    session = await (await Session(connect(mode)).open()).blocked()
    session.event("1")
    assert session.transport.close(1012, "restart")
    assert not session.transport.close(1001, "again")
    session.event("2")
    session.transport.send_control(frame("reply"))
    assert session.owner.calls[-1] == "close"
    await asyncio.sleep(0)
    assert session.sent == []
    session.unblock()
    await session.task
    assert session.sent == ["1", "reply", 1012]
    assert session.metrics.dropped == {"socket closed": 1}, "the event that came after the close began"
    assert session.transport.ending == (1012, "restart", "relay")
    assert not session.connection.transport.aborted or mode == "asgi"


async def test_nothing_is_written_after_the_close_frame() -> None:
    session = await Session(connect("direct", answers_close=False)).open()
    session.transport.close(1012, "restart")
    await until(lambda: session.sent == [1012])
    session.transport.send_control(frame("reply"))
    session.connection.text("sent before the client saw the close")
    await session.finish()
    assert (session.sent, session.frames) == ([1012], [])


async def test_client_that_does_not_answer_the_close_is_cut_off(mode: str) -> None:
    session = await Session(connect(mode, answers_close=False), HURRY).open()
    session.connection.transport.buffered_bytes = 7
    session.transport.close(1012, "restart")
    await session.task
    assert (session.was_cut, session.sent) == (True, [1012])
    assert session.connection.transport.aborted
    assert session.metrics.cut_off_bytes == (7 if mode == "direct" else 0)


async def test_client_that_never_reads_is_cut_off_without_a_close_frame(mode: str) -> None:
    session = await (await Session(connect(mode), HURRY).open()).blocked()
    session.event("1")
    session.transport.close(1012, "restart")
    await session.task
    assert (session.was_cut, session.sent) == (True, [])
    assert session.metrics.dropped == {"socket closed": 1}


async def test_server_without_a_transport_to_abort_ends_the_reader_all_the_same() -> None:
    session = Session(connect("asgi", answers_close=False), HURRY)
    receive = session.connection.receive
    session.connection.receive = lambda: receive()  # type: ignore[method-assign]  # as middleware wraps it
    await session.open()
    session.transport.close(1012, "restart")
    await session.task
    assert (session.was_cut, session.connection.transport.aborted) == (True, 0)


async def test_cancellation_from_outside_is_passed_on(mode: str) -> None:
    session = await Session(connect(mode)).open()
    await asyncio.sleep(0)
    session.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await session.task
    assert not session.was_cut


async def test_cancellation_from_outside_during_a_close_is_passed_on(mode: str) -> None:
    """A server that shuts down cancels its tasks, also those whose client does not answer."""
    session = await Session(connect(mode, answers_close=False)).open()
    session.transport.close(1012, "restart")
    await until(lambda: session.sent == [1012])
    session.task.cancel()
    session.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await session.task
    assert not session.was_cut


async def test_frame_that_was_never_sent_is_counted_at_the_end() -> None:
    session = await Session(connect("asgi")).open()
    await asyncio.sleep(0)
    session.connection.disconnect()
    await asyncio.sleep(0)
    session.event("handed over in the turn of the disconnect")
    await session.task
    assert session.metrics.dropped["socket closed"] + len(session.sent) == 1


async def test_queued_events_are_counted_at_the_end_by_pattern(mode: str) -> None:
    session = await (await Session(connect(mode)).open()).blocked()
    session.event("1")
    session.event("2", topic="b", policy=DROP_OLDEST)
    session.transport.send_control(frame("reply"))
    await session.finish()
    assert session.metrics.dropped == {"socket closed": 2}
    assert session.metrics.dropped_topics == {"a*": 1, "b*": 1}
    session.event("3")
    assert session.metrics.dropped["socket closed"] == 3


async def test_send_that_raises_ends_neither_reader_nor_relay(mode: str) -> None:
    """What it raises for a client that is gone differs from server to server."""
    session = await Session(connect(mode), HURRY).open()
    session.connection.fault = OSError("gone")
    session.event("1")
    await asyncio.sleep(0)
    assert not session.task.done()
    session.transport.close(1012, "restart")
    await session.task
    assert session.was_cut


async def test_asgi_connection_whose_client_has_gone_is_aborted_after_a_while() -> None:
    """The server's own close would wait for a client that reads."""
    session = await Session(connect("asgi"), HURRY).open()
    aborted = asyncio.Event()
    session.connection.transport.on_abort = aborted.set
    await session.finish()
    assert not aborted.is_set()
    async with asyncio.timeout(20):
        await aborted.wait()


async def test_pending_receive_is_interrupted_for_the_close() -> None:
    """Granian (2.8) loses a close that is sent while a receive is pending."""
    session = Session(connect("asgi"))
    steps: list[str] = []
    receive, send = session.connection.receive, session.connection.send

    async def noting_receive() -> Any:
        steps.append("receive")
        try:
            return await receive()
        except asyncio.CancelledError:
            steps.append("interrupted")
            raise

    async def noting_send(message: Any) -> None:
        steps.append(message["type"])
        await send(message)

    await receive()
    session.connection.put("websocket.connect")
    session.connection.receive, session.connection.send = noting_receive, noting_send  # type: ignore[method-assign]
    await session.open()
    del steps[:]
    await until(lambda: steps == ["receive"])
    session.transport.close(1012, "restart")
    await session.task
    assert steps == ["receive", "interrupted", "websocket.close", "receive"]
