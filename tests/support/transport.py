"""A node's channels without a network: sockets over a fake `Transport`, with a fake `Broker` that the test controls."""

import asyncio
import json
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from relay.auth.authenticator import Authenticator
from relay.brokers.base import Broker, Event, HistoryStore, Link, Sink
from relay.channels.batch_pause import BatchPause
from relay.channels.channel import Services
from relay.channels.hub import Hub
from relay.channels.pubsub import PubSub
from relay.channels.socket import Socket
from relay.config import Config
from relay.config_sections import Direction, Policy
from relay.errors import BusUnavailable, CloseCode
from relay.log import ConnectionLog, RateLimitedLoggers
from relay.metrics import Metrics
from relay.permissions import Identity
from relay.plugins.dispatcher import HandlerRunner
from relay.plugins.hooks import Hooks
from relay.protocol.frame import Frame
from relay.protocol.serializer import Message, Version
from relay.telemetry import Telemetry
from relay.tracing import Trace
from relay.transports.base import Transport, TransportOwner


def read_frame(frame: Frame) -> list[Any]:
    """A text frame as ``[join_ref, ref, topic, event, payload]``, of either version."""
    assert frame.is_text, "these tests send no binary payloads"
    fields = json.loads(frame.data)
    if isinstance(fields, dict):
        return [fields.get("join_ref"), fields["ref"], fields["topic"], fields["event"], fields["payload"]]
    assert isinstance(fields, list) and len(fields) == 5
    return fields


class FakeTransport(Transport):
    """A connection whose client is the test: it feeds frames, and reads what was written.

    What is sent after the close is kept apart, as a real connection would not write it.
    """

    write_mode = "fake"
    deflates = False
    queued_bytes = 0
    held_bytes = 0
    dropped = 0

    def __init__(self, id: str, query_string: bytes = b"") -> None:
        self.id = id
        self.address: str | None = "192.0.2.1"
        self.query_string = query_string
        self.owner: TransportOwner | None = None
        self.last_received = 100.0
        self.last_size = 0
        self.written: list[list[Any]] = []
        self.late: list[list[Any]] = []
        """Frames that were sent after the close, or after the end."""
        self.closes: list[tuple[int, str]] = []
        self.rejected: list[tuple[int, str]] = []
        self.evicted: list[str] = []
        self.settled: list[str] = []
        """Topics whose dropped events were settled."""
        self.ended = False
        self.cancels_reader = False
        """Whether a cancellation of the reading task counts as its own."""
        self._fed: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self._changed: list[asyncio.Future[None]] = []

    # The client.

    def feed(self, frame: str | bytes | None) -> None:
        """Have `receive` return a frame; None ends the connection."""
        self._fed.put_nowait(frame)

    async def until(self, condition: Callable[[list[Any]], bool]) -> list[Any]:
        """The first frame written that fulfils a condition; waits for it."""
        while True:
            for frame in self.written:
                if condition(frame):
                    return frame
            self._changed.append(changed := asyncio.get_running_loop().create_future())
            await changed

    # The transport.

    async def receive(self) -> str | bytes | None:
        while (frame := await self._fed.get()) is not None and self.closes:
            pass  # what comes after the close is ignored
        self.last_size = 0 if frame is None else len(frame)
        return frame

    async def drained(self) -> None:
        """What is written is read at once."""

    def send_control(self, frame: Frame) -> None:
        (self.late if self.closes or self.ended else self.written).append(read_frame(frame))
        for changed in self._changed:
            changed.set_result(None)
        self._changed.clear()

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        self.send_control(frame)

    def direct_write(self) -> None:
        return None

    def settle_dropped(self, topic: str, notice: Callable[[str, int], Frame]) -> None:
        self.settled.append(topic)

    def idle_s(self, now: float) -> float:
        return now - self.last_received

    def reject(self, code: CloseCode, reason: str) -> None:
        self.rejected.append((code, reason))
        self.close(code, reason)

    def evict(self, kind: str, reason: str) -> None:
        if self.close(CloseCode.SLOW_READER, reason):
            self.evicted.append(kind)

    def close(self, code: int, reason: str) -> bool:
        if self.closes or self.ended:
            return False
        self.closes.append((code, reason))
        assert self.owner is not None
        self.owner.close_started()
        return True

    @property
    def closed_with(self) -> int | None:
        return self.closes[0][0] if self.closes else None

    def is_own_cancellation(self) -> bool:
        task = asyncio.current_task()
        return self.cancels_reader and task is not None and task.uncancel() == 0

    @property
    def ending(self) -> tuple[int | None, str, str]:
        return (*self.closes[0], "relay") if self.closes else (1000, "", "client")

    def end(self) -> None:
        assert not self.ended, "a transport is ended once"
        self.ended = True


class FakeBroker(Broker):
    """A bus that does what the test says: at once, later, or not at all."""

    link = Link(True, "")
    refusal = ""

    def __init__(self, needs_subscribe: bool = False) -> None:
        self.needs_subscribe = needs_subscribe
        self.is_slow = False
        """Whether `subscribe`, `unsubscribe` and `publish` wait until the test calls `answer`."""
        self.fails = False
        """Whether `subscribe` and `publish` fail, where they do not wait."""
        self.heard: set[str] = set()
        self.asked: set[str] = set()
        """What is heard, and what may be, since a subscribe was cancelled before it was answered."""
        self.waiting: deque[tuple[str, asyncio.Future[None]]] = deque()
        """What waits for `answer`, oldest first: subscribe, unsubscribe or publish."""
        self.published: list[tuple[Direction, str, str, bytes]] = []
        self.sender: str | None = None
        """The sender of what was published last."""
        self.on_publish: Callable[[bytes], None] = lambda payload: None
        self.kept: HistoryStore | None = None
        """What reads histories."""

    @property
    def history(self) -> HistoryStore | None:
        return self.kept

    def answer(self, error: str = "") -> str:
        """Let the oldest call that waits succeed, or fail; returns which kind it was."""
        kind, future = self.waiting.popleft()
        if future.cancelled():
            return kind
        if error and kind != "unsubscribe":
            future.set_exception(BusUnavailable(error))
        else:
            future.set_result(None)
        return kind

    def _start(self, kind: str) -> asyncio.Future[None]:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((kind, future))
        if not self.is_slow and len(self.waiting) == 1:
            self.answer("the bus is away" if self.fails else "")
        return future

    async def start(self, sink: Sink) -> None: ...

    async def stop(self) -> None: ...

    async def subscribe(self, topic: str) -> None:
        assert topic not in self.heard, "asked for twice"
        self.asked.add(topic)
        try:
            await self._start("subscribe")
        except BusUnavailable:
            self.asked.remove(topic)
            raise
        self.heard.add(topic)

    async def unsubscribe(self, topic: str) -> None:
        assert topic in self.asked, "given back twice"
        await self._start("unsubscribe")
        self.asked.remove(topic)
        self.heard.discard(topic)

    def publish(
        self, direction: Direction, topic: str, event: str, payload: bytes, sender: str | None = None
    ) -> asyncio.Future[None]:
        self.on_publish(payload)
        self.sender = sender
        self.published.append((direction, topic, event, payload))
        return self._start("publish")

    def publish_control(self, data: bytes) -> asyncio.Future[None]:
        raise AssertionError("channels send no control messages")


class Client:
    """One client of a `FakeNode`: what it sends, and what it reads."""

    def __init__(self, socket: Socket, transport: FakeTransport) -> None:
        self.socket = socket
        self.transport = transport
        self.task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        try:
            await self.socket.run()
        finally:
            self.left_behind = self.socket.finish_in_background()

    def send(self, join_ref: str | None, ref: str | None, topic: str, event: str, payload: object = None) -> None:
        """Send a message, V1 or V2 as the socket speaks."""
        payload = {} if payload is None else payload
        if self.socket.version is Version.V1:
            fields: object = {"topic": topic, "event": event, "payload": payload, "ref": ref}
        else:
            fields = [join_ref, ref, topic, event, payload]
        self.transport.feed(json.dumps(fields))

    async def call(self, join_ref: str | None, ref: str, topic: str, event: str, payload: object = None) -> list[Any]:
        """Send a message, and wait for the reply to its ref: ``[status, response]``."""
        self.send(join_ref, ref, topic, event, payload)
        return await self.reply(ref)

    async def reply(self, ref: str) -> list[Any]:
        """The reply to a ref: ``[status, response]``; waits for it."""
        frame = await self.transport.until(lambda frame: frame[1] == ref and frame[3] == "phx_reply")
        return [frame[4]["status"], frame[4]["response"]]

    async def join(self, topic: str, ref: str = "1", params: object = None) -> list[Any]:
        """Join under ``ref``; returns ``[status, response]``."""
        return await self.call(ref, ref, topic, "phx_join", params)

    def waiting(self, topic: str) -> list[Message]:
        """Messages that wait for their turn on a topic."""
        jobs: Any = self.socket.queue._by_key.get(topic)
        waiting = () if jobs is None else jobs.waiting
        return [job.args[-1] for job, _ in waiting if isinstance(job, partial) and isinstance(job.args[-1], Message)]

    def frames(self) -> list[list[Any]]:
        """What was written since it was asked last, without the payloads' keys: ``[join_ref, ref, topic, event]``."""
        frames, self.transport.written = [frame[:4] for frame in self.transport.written], []
        return frames

    async def end(self) -> None:
        """Hang up, and wait until the socket and its handlers have ended."""
        self.transport.feed(None)
        await self.task
        if self.left_behind is not None:
            await self.left_behind


class FakeNode:
    """What the sockets of a node share, on a fake broker; made in a running event loop.

    Args: config: made of ``settings`` where it is not given.
    """

    def __init__(
        self,
        hooks: Hooks | None = None,
        broker: FakeBroker | None = None,
        config: Config | None = None,
        **settings: Any,
    ) -> None:
        self.config = Config(**settings) if config is None else config
        self.metrics = Metrics()
        self.broker = FakeBroker() if broker is None else broker
        loop, loggers = asyncio.get_running_loop(), RateLimitedLoggers()
        self.hub = Hub(self.metrics, lambda topic: self.config.topic(topic).policy, loop.call_soon, lambda: 0.0)
        telemetry = Telemetry(self.metrics, loggers)
        self.runner = HandlerRunner(self.config.plugins.timeout_s, telemetry, hooks or Hooks())
        self.pubsub = PubSub(self.config, self.broker, self.hub, self.runner, telemetry, BatchPause(clock=lambda: 0.0))
        self.authenticator: Authenticator | None = None
        self._log = ConnectionLog(loggers)
        self.clients: list[Client] = []

    def connect(
        self,
        version: Version = Version.V2,
        identity: Identity | None = None,
        query_string: bytes = b"",
        trace: Trace | None = None,
    ) -> Client:
        """Open a socket, and serve it in a task."""
        return self.serve(FakeTransport(f"socket-{len(self.clients)}", query_string), version, identity, trace)

    def serve(
        self,
        transport: FakeTransport,
        version: Version = Version.V2,
        identity: Identity | None = None,
        trace: Trace | None = None,
    ) -> Client:
        """Serve a socket on a transport, in a task."""
        services = Services(self.config, self.pubsub, self.hub, self.metrics, self._log, self.authenticator)
        client = Client(Socket(transport, version, services, identity, trace), transport)
        self.clients.append(client)
        return client

    async def deliver(self, topic: str, event: str, payload: bytes = b"{}", sender: str | None = None) -> None:
        """Deliver an event of the bus, where the broker hears its topic."""
        if not self.broker.needs_subscribe or topic in self.broker.heard:
            await self.pubsub.receive_events([Event(topic, event, payload, None, sender)])

    async def end(self) -> None:
        """End all sockets that have not ended, then the bridge to the broker."""
        for client in self.clients:
            if not client.task.done():
                await client.end()
        await self.pubsub.stop()
