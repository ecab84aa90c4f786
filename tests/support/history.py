"""A node whose topics have histories, without Redis and without a network: a store, a bus and clients that the test
controls."""

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from relay.brokers.base import Event, HistoryStore, Opened, Place, Summary
from relay.channels.history import History
from relay.channels.hub import Hub
from relay.config_sections import HistoryConfig
from relay.errors import BusUnavailable, NotRecovered
from relay.metrics import Metrics
from relay.plugins.hooks import Hooks
from relay.protocol.frame import Frame
from relay.transports.base import TransportOwner
from relay.transports.queued import QueuedTransport
from relay.transports.writer import DirectWriter
from tests.support.transport import Client, FakeBroker, FakeNode, FakeTransport

TOPIC = "room:1"
HISTORY = {"match": "room:*", "history": {"size": 1000, "ttl_s": 3600}}


class FakeStore(HistoryStore):
    """Streams as in Redis, which answer when the test lets them and lose what it takes from them."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Event]] = {}
        self.now_ms = 1000
        self.publish: Callable[[Event], None] = lambda event: None
        """Gives what was published to the bus."""
        self.fault = ""
        """Why nothing is answered."""
        self.calls: list[tuple[str, str]] = []
        """What was asked, and of which topic or from which position."""
        self._gates: dict[str, asyncio.Event] = {}

    # What the test does.

    def append(self, payload: bytes = b"{}", event: str = "e", topic: str = TOPIC, sender: str | None = None) -> Event:
        """Append an event as the publish script does, without publishing it."""
        rows = self._rows(topic)
        newest = Place.of(str(rows[-1].position))
        place = Place(max(newest.ms, self.now_ms), newest.n + 1)
        rows.append(row := Event(topic, event, payload, str(place), sender))
        return row

    def trim(self, count: int, topic: str = TOPIC) -> None:
        """Keep the newest rows alone."""
        del self.streams[topic][:-count]

    def lose(self, count: int, topic: str = TOPIC) -> None:
        """Lose the newest rows, as a failover does."""
        del self.streams[topic][-count:]
        self.now_ms += 1

    def hold_questions(self, kind: str) -> asyncio.Event:
        """Keep the questions of a kind from the store until the event is set that is returned."""
        return self._gates.setdefault(f"{kind}?", asyncio.Event())

    def hold_answers(self, kind: str) -> asyncio.Event:
        """Keep the answers of a kind from the relay until the event is set that is returned."""
        return self._gates.setdefault(f"{kind}!", asyncio.Event())

    # What the relay asks.

    async def _ask(self, kind: str, about: str) -> None:
        self.calls.append((kind, about))
        await self._pass(f"{kind}?")

    async def _answer(self, kind: str) -> None:
        await self._pass(f"{kind}!")

    async def _pass(self, name: str) -> None:
        await asyncio.sleep(0)
        if name in self._gates:
            await self._gates[name].wait()
        if self.fault:
            raise BusUnavailable(self.fault)

    def _rows(self, topic: str) -> list[Event]:
        return self.streams.setdefault(topic, [Event(topic, "", b"", f"{self.now_ms}-0")])

    async def open(self, topic: str, since: str, settings: HistoryConfig, max_events: int, max_bytes: int) -> Opened:
        await self._ask("open", since)
        opened = self._open(topic, since, max_events)
        await self._answer("open")
        return opened

    def _open(self, topic: str, since: str, max_events: int) -> Opened:
        rows = self._rows(topic)
        newest, fault = str(rows[-1].position), None
        at = next((at for at, row in enumerate(rows) if row.position == since), None)
        if at is None:
            fault = NotRecovered.UNKNOWN
        elif any(not row.event and row.payload for row in rows[at + 1 :]):
            fault = NotRecovered.FORKED
        elif len(rows) - 1 - at > max_events:
            fault = NotRecovered.TOO_MANY
        return Opened(newest, self.now_ms, fault)

    async def read(self, topic: str, since: str, count: int) -> list[Event] | None:
        await self._ask("read", since)
        rows = self._rows(topic)
        at = next((at for at, row in enumerate(rows) if row.position == since), None)
        found = None if at is None else rows[at : at + count]
        await self._answer("read")
        return found

    async def last(self, topic: str, count: int, before: str | None = None) -> list[Event]:
        await self._ask("last", before or "")
        rows = [row for row in self._rows(topic) if before is None or Place.of(str(row.position)) < Place.of(before)]
        await self._answer("last")
        return rows[-count:]

    async def check(self, topic: str, heard: str, settings: HistoryConfig) -> None:
        await self._ask("check", heard)
        rows = self._rows(topic)
        if heard and not any(row.position == heard for row in rows):
            first, lost = Place.of(str(rows[0].position)), Place.of(heard)
            if first <= lost and not any(
                row.payload and not row.event and Place.of(str(row.position)) > lost for row in rows
            ):
                newest = Place.of(str(rows[-1].position))
                mark = Place(max(newest.ms, self.now_ms, lost.ms + 1), newest.n + 1)
                rows.append(Event(topic, "", heard.encode(), str(mark)))
        self.publish(Event(topic, "", b"", rows[-1].position))
        await self._answer("check")

    async def describe(self, topic: str) -> Summary:
        raise AssertionError("joins do not ask")


class _Pipe(asyncio.Transport):
    """A connection's buffer, which a client empties when it reads; over its bound the writer is paused."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.writer: DirectWriter | None = None
        self.data = bytearray()
        self._most = most

    def write(self, data: Any) -> None:
        self.data += data
        if self.writer is not None and len(self.data) > self._most:
            self.writer.pause()

    def get_write_buffer_size(self) -> int:
        return len(self.data)

    def abort(self) -> None:
        raise AssertionError("nobody cuts it")


class _Queued(QueuedTransport):
    """What real transports do with frames that wait."""

    def _encode(self, frame: Frame) -> bytes:
        return frame.ws_frame

    def close(self, code: int, reason: str) -> bool:
        owner: Any = self.owner
        return bool(owner.close(code, reason))


class SlowTransport(FakeTransport):
    """A connection with an outbox, whose client reads when the test says so.

    Args: buffer_bytes: that fit into the connection's buffer before frames wait in the outbox.
    """

    def __init__(self, id: str, node: FakeNode, buffer_bytes: int = 2048) -> None:
        super().__init__(id)
        self._pipe = _Pipe(buffer_bytes)
        log: Any = SimpleNamespace(warning=lambda *args, **kwargs: None)
        services: Any = SimpleNamespace(log=log, limits=node.config.limits, metrics=node.metrics, outboxes=None)
        self.inner = _Queued(id, {}, services)
        self.inner._writer = self.writer = self._pipe.writer = DirectWriter(self._pipe)
        self.writer.owner = self.inner
        self.writer.set_ready(True)
        owner: Any = self
        self.inner.owner = owner
        self.is_read = False
        """Whether the client reads all as soon as it comes."""

    def read(self) -> list[list[Any]]:
        """All frames in the connection's buffer; what has waited takes their place."""
        found, data = [], bytes(self._pipe.data)
        self._pipe.data.clear()
        while data:
            size, begin = data[1], 2
            if size > 125:
                begin = 4 if size == 126 else 10
                size = int.from_bytes(data[2:begin])
            found.append(json.loads(data[begin : begin + size]))
            data = data[begin + size :]
        if self.writer.paused:
            self.writer.resume()
        return found

    # For the inner transport.

    def readiness_changed(self) -> None:
        if self.owner is not None:
            self.owner.readiness_changed()

    def close_started(self) -> None:
        raise AssertionError("this one closes")

    def fell_behind(self, topic: str, position: str) -> None:
        owner: TransportOwner | None = self.owner
        assert owner is not None
        owner.fell_behind(topic, position)

    @property
    def dropped_notice(self) -> Callable[[str, int], Frame]:
        assert self.owner is not None
        return self.owner.dropped_notice

    # As the socket knows it.

    def send_control(self, frame: Frame) -> None:
        self.inner.send_control(frame)

    def send_event(self, frame: Frame, topic: str, event: str, policy: Any) -> None:
        self.inner.send_event(frame, topic, event, policy)

    def direct_write(self) -> Any:
        return self.inner.direct_write()

    async def drained(self) -> None:
        await self.inner.drained()

    @property
    def queued_bytes(self) -> int:  # type: ignore[override]
        return self.inner.queued_bytes

    def close(self, code: int, reason: str) -> bool:
        is_open = super().close(code, reason)
        self.inner._close = self.inner._close or (code, reason)
        return is_open

    def settle_dropped(self, topic: str, notice: Callable[[str, int], Frame]) -> None:
        self.inner.settle_dropped(topic, notice)

    def end(self) -> None:
        super().end()
        self.inner.end()


class HistoryNode(FakeNode):
    """A node whose topics ``room:*`` have a history; it hears what is published, one event after the other."""

    def __init__(self, hooks: Hooks | None = None, **settings: Any) -> None:
        self.store = FakeStore()
        broker = FakeBroker()
        broker.kept = self.store
        super().__init__(hooks, broker, **{"topics": [HISTORY], "redis_url": "redis://none", **settings})
        self.store.publish = self.hear
        self.is_deaf = False
        """Whether what is published does not come."""
        self._bus: asyncio.Queue[Event] = asyncio.Queue()
        self._hearing = asyncio.create_task(self._hear_all())

    @property
    def history(self) -> History:
        assert self.pubsub.history is not None
        return self.pubsub.history

    def hear(self, event: Event) -> None:
        """Have an event come from the bus."""
        if not self.is_deaf:
            self._bus.put_nowait(event)

    async def _hear_all(self) -> None:
        while True:
            event = await self._bus.get()
            await self.pubsub.receive_events([event])
            self._bus.task_done()

    async def heard(self) -> None:
        """Return once all that came from the bus has been dealt with."""
        await self._bus.join()

    def publish(self, *payloads: object, event: str = "e", topic: str = TOPIC) -> list[str]:
        """Publish events to a topic; returns their positions."""
        rows = [self.store.append(json.dumps(payload).encode(), event, topic) for payload in payloads]
        for row in rows:
            self.hear(row)
        return [str(row.position) for row in rows]

    def connect_slow(self, buffer_bytes: int = 2048) -> tuple[Client, SlowTransport]:
        """Open a socket whose client reads when the test says so."""
        transport = SlowTransport(f"socket-{len(self.clients)}", self, buffer_bytes)
        return self.serve(transport), transport

    async def end(self) -> None:
        self._hearing.cancel()
        await super().end()


@pytest.fixture
def instant_history(monkeypatch: pytest.MonkeyPatch, runner: asyncio.Runner) -> None:
    """Have histories go by the clock of the test's event loop."""
    monkeypatch.setattr("relay.channels.history.time", SimpleNamespace(monotonic=runner.get_loop().time))


def events(frames: list[list[Any]], topic: str = TOPIC) -> list[Any]:
    """The payloads of a topic's events in what a client was sent."""
    return [frame[4] for frame in frames if frame[2] == topic and not frame[3].startswith("phx_")]


def names(hub: Hub) -> set[str]:
    """The topics in a hub."""
    return set(hub.topics())


__all__ = ["HISTORY", "TOPIC", "FakeStore", "HistoryNode", "Metrics", "SlowTransport", "events", "instant_history"]
