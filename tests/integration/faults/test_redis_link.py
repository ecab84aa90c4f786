"""Hearing is proved, not the connection: servers that change their role, connections that lead elsewhere.

Each loss is noticed within ``ping_interval_s + 2 × ping_timeout_s``; no push is answered ``ok`` where the relay knows
that the master's clients do not get it; and a fault of a connection to Redis is a fault of that connection alone.
"""

import asyncio
import json
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvloop
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from relay.brokers.base import Event
from relay.brokers.redis import RedisBroker
from relay.config import Config, Direction
from relay.errors import BusUnavailable
from relay.metrics import Metrics
from tests.integration.test_brokers import Sink
from tests.support.client import Client
from tests.support.faults import Proxy
from tests.support.process import Valkey, free_port, wait_for
from tests.support.serving import Served, eventually, http_get, metric
from tests.support.witness import Ticker, Witness

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]

FAST = {"backoff_min_s": 0.02, "backoff_max_s": 0.1, "ping_interval_s": 0.5, "ping_timeout_s": 0.25}
PATIENT = FAST | {"ping_timeout_s": 2.0}
"""For what must not be taken for a loss on a slow machine."""
NOTICED_S = 0.5 + 2 * 0.25
SLACK_S = 2.0
"""What a loaded machine may add."""
OK = {"status": "ok", "response": {}}
UNAVAILABLE = {"status": "error", "response": {"reason": "bus unavailable"}}
TOLD = {"reason": "events may have been missed"}


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


@pytest.fixture
def loop(request: pytest.FixtureRequest) -> str:
    """Which event loop; each has exceptions of its own for a transport that has ended."""
    return getattr(request, "param", "asyncio")


@pytest.fixture
def runner(loop: str) -> Iterator[asyncio.Runner]:
    """The test's event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        yield runner


@pytest.fixture
def server() -> Iterator[Valkey]:
    """A Valkey of the test's own, to be maltreated."""
    with Valkey() as server:
        yield server


@pytest.fixture
def replica(server: Valkey) -> Iterator[Valkey]:
    """A replica of it, that hears it."""
    with Valkey("--replicaof", f"127.0.0.1 {server.port}", "--repl-diskless-sync-delay", "0") as replica:
        wait_for(lambda: is_linked(replica), "the replica")
        yield replica


def ask(server: Valkey, *command: str) -> Any:
    with Redis(port=server.port, decode_responses=True) as redis:
        return redis.execute_command(*command)


def is_linked(server: Valkey) -> bool:
    with Redis(port=server.port) as redis:
        return str(redis.info("replication").get("master_link_status")) == "up"


def become_replica(server: Valkey, master: Valkey) -> None:
    ask(server, "REPLICAOF", "127.0.0.1", str(master.port))


@asynccontextmanager
async def broker_on(url: str, **redis: Any) -> AsyncIterator[tuple[RedisBroker, Sink, Metrics]]:
    metrics, sink = Metrics(), Sink()
    broker = RedisBroker(Config(redis_url=url, redis=FAST | redis), metrics)
    await broker.start(sink)
    try:
        yield broker, sink, metrics
    finally:
        await broker.stop()


async def within(condition: Callable[[], object], what: str, since: float) -> None:
    """Wait for ``condition``; it must come true in the time that is promised."""
    await eventually(condition, what)
    assert time.monotonic() - since < NOTICED_S + SLACK_S, f"{what} came late"


async def outcome(future: "asyncio.Future[None]") -> str:
    try:
        await future
    except BusUnavailable as error:
        return str(error)
    return "ok"


# The server's role.


async def test_master_that_becomes_a_replica_under_load_is_a_gap(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """``REPLICAOF`` while events flow; connections stay. Afterwards it hears the new master, and refuses pushes."""
    with Valkey() as other:
        served = await serve_relay(redis_url=server.url, redis=FAST)
        client = await connect(served)
        async with Ticker.run(server.url, "room:role") as ticker, Witness.run(client, "room:role") as witness:
            await witness.progress()
            since = time.monotonic()
            await asyncio.to_thread(become_replica, server, other)
            await within(lambda: served.relay.metrics.gaps or not served.relay.link.live, "the change of role", since)
            await asyncio.to_thread(wait_for, lambda: is_linked(server), "the replica")
            ticker.url = other.url
            await eventually(lambda: served.relay.metrics.gaps and served.relay.link.live, "the link")
            await witness.until(lambda: witness.joins > 1)
            assert len(witness.told) >= 1
            pusher = await connect(served)
            join_ref = await pusher.join("room:push")
            assert await pusher.push(join_ref, "room:push", "shout") == UNAVAILABLE
            _, metrics = await http_get(f"{served.http}/metrics")
            assert metric(metrics, "relay_link_live") == 1
            assert metric(metrics, "relay_link_pushes") == 0
            async with AsyncRedis.from_url(other.url) as redis:
                await redis.publish("to:room:push:tick", 1)
            await pusher.expect_event("room:push", "tick", 1)
        # When it is a master again, pushes are taken.
        ask(server, "REPLICAOF", "NO", "ONE")
        async with asyncio.timeout(20):
            while (answer := await pusher_answer(served, connect)) != OK:
                assert answer == UNAVAILABLE


async def pusher_answer(served: Served, connect: Connect) -> Any:
    client = await connect(served)
    ref = client.next_ref()
    await client.send(ref, ref, "room:again", "phx_join", {})
    if (await client.receive())[4]["status"] != "ok":
        return UNAVAILABLE
    return await client.push(ref, "room:again", "shout")


async def test_failover_with_connections_kept_and_replication_cut_after_it(server: Valkey, replica: Valkey) -> None:
    """``FAILOVER`` makes the two change places. Then the new master goes: no event can come, and it says so."""
    async with broker_on(server.url) as (broker, sink, metrics):
        assert await outcome(broker.publish(Direction.FROM, "room", "e", b"1")) == "ok"
        since = time.monotonic()
        await asyncio.to_thread(ask, server, "FAILOVER")
        await asyncio.to_thread(wait_for, lambda: is_linked(server), "the failover")
        await within(lambda: metrics.gaps == 1 and broker.link.live and broker.refusal, "the gap", time.monotonic())
        assert time.monotonic() - since < 20
        assert "is a replica" in await outcome(broker.publish(Direction.FROM, "room", "e", b"2"))
        ask(replica, "PUBLISH", "to:room:e", "3")
        await eventually(lambda: Event("room", "e", b"3") in sink.events, "an event from the new master")
        since = time.monotonic()
        replica.kill()
        await within(lambda: not broker.link.live, "the loss of the master", since)
        await eventually(
            lambda: broker.link.reason.startswith("the server is a replica that has lost its master"), "the reason"
        )
        ask(server, "REPLICAOF", "NO", "ONE")
        await eventually(lambda: broker.link.live and not broker.refusal, "the link")
        assert await outcome(broker.publish(Direction.TO, "room", "e", b"4")) == "ok"
        await eventually(lambda: Event("room", "e", b"4") in sink.events, "the last event")


async def test_replica_given_by_address_is_heard_and_takes_no_pushes(
    server: Valkey, replica: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader endpoint: heard while it is linked, with a warning; not live when it is not."""
    async with broker_on(replica.url) as (broker, sink, metrics):
        await eventually(lambda: broker.refusal, "the role")
        assert broker.link == (True, "")
        for publish in (broker.publish(Direction.FROM, "room", "e", b"1"), broker.publish_control(b"{}")):
            assert "is a replica: what is published there does not reach its master's clients" in await outcome(publish)
        assert "is a replica; pushes are refused" in caplog.text
        await asyncio.sleep(2 * NOTICED_S)  # as long as it would take to mistake something for a loss
        assert metrics.gaps == 0
        ask(server, "PUBLISH", "to:room:e", "2")
        await sink.expect(Event("room", "e", b"2"))
        since = time.monotonic()
        server.kill()
        await within(lambda: not broker.link.live, "the loss of the master", since)
        await eventually(
            lambda: broker.link.reason.startswith("the server is a replica that has lost its master"), "the reason"
        )
        await asyncio.to_thread(server.start)
        await eventually(lambda: broker.link.live, "the link")
        assert metrics.gaps == 1


async def test_replica_of_a_master_that_is_not_there_is_not_live(server: Valkey) -> None:
    ask(server, "REPLICAOF", "127.0.0.1", str(free_port()))
    async with broker_on(server.url) as (broker, _, metrics):
        assert not broker.link.live
        assert broker.link.reason.startswith("the server is a replica that has lost its master")
        assert metrics.gaps == 0


# Connections that lead elsewhere.


class Switch:
    """A TCP proxy that can move each of its connections to another server, or swallow what comes one way."""

    def __init__(self) -> None:
        self.port = 0
        self.targets: Callable[[int], int] = lambda number: 0
        self.links: list[dict[str, Any]] = []

    @classmethod
    @asynccontextmanager
    async def open(cls, target: int) -> AsyncIterator["Switch"]:
        self = cls()
        self.targets = lambda number: target
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for link in self.links:
                link["task"].cancel()
            await asyncio.gather(*(link["task"] for link in self.links), return_exceptions=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link: dict[str, Any] = {"deaf": False, "sent": b"", "writer": writer, "task": asyncio.current_task()}
        self.links.append(link)
        try:
            with suppress(OSError, asyncio.CancelledError):
                await self._join(link, reader, writer)
        finally:
            writer.transport.abort()

    async def _join(self, link: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.targets(len(self.links) - 1))

        async def pump(source: asyncio.StreamReader, into: asyncio.StreamWriter, note: bool) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    if note:
                        link["sent"] += data
                    if not link["deaf"]:
                        into.write(data)

        pumps = [asyncio.create_task(pump(reader, far_writer, True))]
        pumps.append(asyncio.create_task(pump(far_reader, writer, False)))
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            far_writer.transport.abort()
            for each in pumps:
                each.cancel()

    def link(self, command: bytes) -> dict[str, Any]:
        """The newest connection on which ``command`` was sent."""
        return next(link for link in reversed(self.links) if command in link["sent"])


async def test_connections_that_lead_to_two_masters_are_found_by_a_probe(server: Valkey) -> None:
    """A proxy moves one of the two: both answer, both are masters, and nothing that is published is heard."""
    with Valkey() as other:
        async with Switch.open(server.port) as proxy, broker_on(proxy.url) as (broker, sink, m):
            await broker.publish(Direction.TO, "room", "e", b"1")
            await sink.expect(Event("room", "e", b"1"))
            proxy.targets = lambda number: other.port
            since = time.monotonic()
            proxy.link(b"PUBLISH")["writer"].transport.abort()  # and the next leads elsewhere
            await eventually(lambda: len(proxy.links) > 2, "the connection for pushes")
            await within(lambda: not broker.link.live, "the unheard probe", since)
            await eventually(lambda: broker.link.live, "the link")
            assert m.gaps == 1
            await broker.publish(Direction.TO, "room", "e", b"2")
            await eventually(lambda: Event("room", "e", b"2") in sink.events, "an event at the other master")


async def test_link_that_was_doubted_is_live_only_after_a_probe(server: Valkey) -> None:
    """While the two go on to lead elsewhere there is one gap to be told, not one after the other."""
    with Valkey() as other:
        async with Switch.open(server.port) as proxy, broker_on(proxy.url) as (broker, sink, m):
            await eventually(lambda: len(proxy.links) == 2, "both connections")
            ports: dict[int, int] = {}

            def split(number: int) -> int:  # the odd ones to the other server
                return ports.setdefault(number, (server.port, other.port)[number % 2])

            proxy.targets = split
            for link in proxy.links:
                link["writer"].transport.abort()
            await eventually(lambda: "a probe that was published did not come back" in broker.link.reason, "the reason")
            proxy.targets = lambda number: server.port
            await eventually(lambda: broker.link.live, "the link")
            assert m.gaps <= 2
            assert len(sink.gaps) == m.gaps


async def test_probe_passes_from_a_master_to_a_subscription_on_its_replica(server: Valkey, replica: Valkey) -> None:
    """A proxy moves the subscription to a replica: what is published at the master is heard there."""
    async with (
        Switch.open(server.port) as proxy,
        broker_on(f"redis://127.0.0.1:{proxy.port}") as (broker, sink, metrics),
    ):
        await eventually(lambda: len(proxy.links) == 2, "both connections")
        proxy.targets = lambda number: replica.port
        proxy.link(b"PSUBSCRIBE")["writer"].transport.abort()
        await eventually(lambda: metrics.gaps == 1 and broker.link.live, "the gap")
        proxy.targets = lambda number: server.port
        assert not broker.refusal
        await asyncio.sleep(2 * NOTICED_S)  # several probes
        assert metrics.gaps == 1
        await broker.publish(Direction.TO, "room", "e", b"1")
        await sink.expect(Event("room", "e", b"1"))
        since = time.monotonic()
        ask(replica, "REPLICAOF", "127.0.0.1", "1")
        await within(lambda: metrics.gaps == 2 or not broker.link.live, "the cut replication", since)
        await eventually(lambda: broker.link.live, "the link")


@pytest.mark.parametrize("command", [b"PSUBSCRIBE", b"PUBLISH"])
async def test_connection_that_a_nat_has_forgotten_is_found_before_it_is_needed(server: Valkey, command: bytes) -> None:
    """Nothing is pushed for a while, and one of the two connections swallows what is sent; no end is told."""
    async with (
        Switch.open(server.port) as proxy,
        broker_on(f"redis://127.0.0.1:{proxy.port}") as (broker, sink, metrics),
    ):
        await broker.publish(Direction.TO, "room", "e", b"0")
        await sink.expect(Event("room", "e", b"0"))
        before = len(proxy.links)
        since = time.monotonic()
        proxy.link(command)["deaf"] = True
        await within(lambda: len(proxy.links) > before, "a new connection", since)
        await eventually(lambda: broker.link.live, "the link")
        started = time.monotonic()
        assert await outcome(broker.publish(Direction.TO, "room", "e", b"1")) == "ok"
        assert time.monotonic() - started < 1
        await eventually(lambda: sink.events[-1] == Event("room", "e", b"1"), "the event")
        assert metrics.gaps == (1 if command == b"PSUBSCRIBE" else 0)


async def test_idle_link_and_busy_link_ask_no_more_than_they_say(server: Valkey) -> None:
    """One ROLE and one probe per interval while nothing comes; no probe while events flow."""

    def count(name: str) -> int:
        with Redis(port=server.port) as redis:
            return int(redis.info("commandstats").get(f"cmdstat_{name}", {}).get("calls", 0))

    async with broker_on(server.url, ping_interval_s=0.3, ping_timeout_s=3.0) as (broker, sink, metrics):
        await eventually(lambda: count("role") == 2, "both roles")
        started, role, publish = time.monotonic(), count("role"), count("publish")
        await eventually(lambda: count("publish") >= publish + 4, "probes")
        intervals = (time.monotonic() - started) / 0.3
        assert count("role") - role <= intervals + 1
        assert count("publish") - publish <= intervals + 1
        started, taken = time.monotonic(), 0
        publish = count("publish")
        while time.monotonic() - started < 1.5:
            await broker.publish(Direction.TO, "room", "e", b"1")
            taken += 1
            await asyncio.sleep(0.01)
        assert count("publish") - publish - taken <= 1, "the one that was under way"
        assert metrics.gaps == 0


# A Redis user with the least rights.


@pytest.mark.parametrize(
    ("rules", "missing"),
    [
        (("allchannels", "-@all", "+psubscribe", "+publish"), {"ROLE", "PING"}),
        (("allchannels", "-@all", "+@pubsub"), {"ROLE", "PING"}),
        (("allchannels", "-@all", "+@pubsub", "+ping"), {"ROLE"}),
        (("allchannels", "-@all", "+@pubsub", "+role", "+ping"), set()),
        (("resetchannels", "&to:*", "&from:*", "-@all", "+@pubsub"), {"ROLE", "PING", "PSUBSCRIBE relay:control"}),
    ],
)
@pytest.mark.parametrize("protocol", [2, 3])
async def test_user_with_few_rights_works_and_what_is_missing_is_said_once(
    server: Valkey, caplog: pytest.LogCaptureFixture, rules: tuple[str, ...], missing: set[str], protocol: int
) -> None:
    ask(server, "ACL", "SETUSER", "relay", "on", ">pw", *rules)
    url = f"redis://relay:pw@127.0.0.1:{server.port}?protocol={protocol}"
    async with broker_on(url, ping_interval_s=0.2, ping_timeout_s=2.0) as (broker, sink, metrics):
        assert broker.link == (True, "")
        assert await outcome(broker.publish(Direction.TO, "room", "e", b"1")) == "ok"
        assert await outcome(broker.publish(Direction.FROM, "room", "e", b"1")) == "ok"
        await asyncio.sleep(1)  # some five intervals
        await sink.expect(Event("room", "e", b"1"))
        assert metrics.gaps == 0
        assert not sink.control_messages
        assert broker.link == (True, "")
    said = [record.getMessage() for record in caplog.records if "no permission for" in record.getMessage()]
    assert {text.split(" on 127")[0].removeprefix("no permission for ") for text in said} == missing
    assert len(said) == len(missing)
    assert all("allow it with " in text for text in said)


@pytest.mark.parametrize(("rules", "calls"), [((), 1), (("resetchannels", "&to:*", "&from:*"), 3)])
async def test_patterns_are_asked_for_in_one_command_unless_one_is_denied(
    server: Valkey, rules: tuple[str, ...], calls: int
) -> None:
    """Redis refuses a command as a whole; a refused one is asked for again, pattern by pattern."""
    ask(server, "ACL", "SETUSER", "relay", "on", ">pw", "allchannels", "+@all", *rules)
    async with broker_on(f"redis://relay:pw@127.0.0.1:{server.port}") as (broker, sink, _):
        assert broker.link == (True, "")
        assert await outcome(broker.publish(Direction.TO, "room", "e", b"1")) == "ok"
        await sink.expect(Event("room", "e", b"1"))
    with Redis(port=server.port) as redis:
        counted = redis.info("commandstats")["cmdstat_psubscribe"]
    assert counted["calls"] + counted["rejected_calls"] == calls


async def test_probe_alone_finds_a_dead_connection_where_ping_is_not_allowed(server: Valkey) -> None:
    ask(server, "ACL", "SETUSER", "relay", "on", ">pw", "allchannels", "-@all", "+psubscribe", "+publish")
    async with Switch.open(server.port) as proxy:
        url = f"redis://relay:pw@127.0.0.1:{proxy.port}"
        async with broker_on(url) as (broker, _, metrics):
            await asyncio.sleep(2 * NOTICED_S)
            assert metrics.gaps == 0
            since = time.monotonic()
            proxy.link(b"PSUBSCRIBE")["deaf"] = True
            await within(lambda: metrics.gaps or not broker.link.live, "the dead connection", since)
            await eventually(lambda: broker.link.live, "the link")


@pytest.mark.parametrize("control", ["relay:control", ""])
async def test_probes_are_no_events_and_no_orders(server: Valkey, control: str) -> None:
    """Of this node and of others; on the control channel, or where there is none on one that the pattern matches."""
    settings = {"control_channel": control, "ping_interval_s": 0.1, "ping_timeout_s": 3.0}
    async with broker_on(server.url, **settings) as (one, ours, m), broker_on(server.url, **settings) as (_, theirs, _):
        with Redis(port=server.port) as redis:
            before = (
                redis.info("commandstats")["cmdstat_publish"]["calls"]
                if "cmdstat_publish" in redis.info("commandstats")
                else 0
            )
            await eventually(
                lambda: redis.info("commandstats").get("cmdstat_publish", {"calls": 0})["calls"] > before + 6, "probes"
            )
        assert not (ours.events or theirs.events or ours.control_messages or theirs.control_messages)
        assert not m.dropped
        assert one.link.live


async def test_reserved_topic_cannot_be_joined(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay()
    client = await connect(served)
    await client.send("1", "1", "relay", "phx_join", {})
    assert await client.receive() == client.refusal("1", "1", "relay", "invalid topic")


async def test_error_that_answers_a_ping_is_a_sign_of_life(server: Valkey) -> None:
    """``BUSY``, ``LOADING``: a reply that is an error is not a lost link."""
    async with Proxy.open(server.port) as proxy:
        async with broker_on(f"redis://127.0.0.1:{proxy.port}", **PATIENT | {"ping_interval_s": 0.2}) as (
            broker,
            sink,
            m,
        ):
            pong = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"
            proxy.rewrite = lambda data: data.replace(pong, b"-BUSY Redis is busy running a script.\r\n")
            await asyncio.sleep(1.5)
            assert broker.link == (True, "")
            assert m.gaps == 0
            await broker.publish(Direction.TO, "room", "e", b"1")
            await sink.expect(Event("room", "e", b"1"))


# Resets.


@asynccontextmanager
async def resetting(target: int) -> AsyncIterator[tuple[int, Callable[[], None]]]:
    """A TCP proxy; the yielded function resets all of its connections at once."""
    writers: list[asyncio.StreamWriter] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            with suppress(OSError, asyncio.CancelledError):
                await join(reader, writer)
        finally:
            writer.transport.abort()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        writers.append(writer)

        async def pump(source: asyncio.StreamReader, into: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    into.write(data)

        pumps = [asyncio.create_task(pump(reader, far_writer)), asyncio.create_task(pump(far_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            far_writer.transport.abort()
            for each in pumps:
                each.cancel()

    def reset() -> None:
        for writer in writers:
            end = writer.get_extra_info("socket")
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        writers.clear()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], reset
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


both_loops = pytest.mark.parametrize("loop", ["asyncio", "uvloop"], indirect=True)


@both_loops
async def test_reset_connections_to_redis_close_no_socket(
    loop: str, serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients push all the while. Each push is answered, REST with 200 or 503, and the log has no traceback."""
    async with resetting(server.port) as (port, reset):
        served = await serve_relay(
            redis_url=f"redis://127.0.0.1:{port}",
            redis=FAST | {"ping_timeout_s": 5.0},
            limits={"joins_per_s": 0, "pushes_per_s": 0},
        )
        clients = [await connect(served) for _ in range(10)]
        answers: list[str] = []
        statuses: list[int] = []
        ended = asyncio.Event()

        async def push(client: Client, topic: str) -> None:
            while not ended.is_set():
                ref = client.next_ref()
                await client.send(ref, ref, topic, "phx_join", {})
                while not ended.is_set():
                    await client.send(ref, client.next_ref(), topic, "shout", {})
                    message = await client.receive()
                    while message[3] not in ("phx_reply", "phx_error"):
                        message = await client.receive()
                    if message[3] == "phx_error":
                        break
                    response = message[4]["response"]
                    answers.append(response.get("reason", "ok"))
                    if response.get("reason") == "unmatched topic":
                        break
                    await asyncio.sleep(0)

        async def publish() -> None:
            body = json.dumps({"topic": "room:rest", "event": "e", "payload": {}}).encode()
            head = f"POST /api/publish HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            while not ended.is_set():
                reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
                writer.write(head.encode() + body)
                statuses.append(int((await reader.read())[9:12]))
                writer.close()
                await writer.wait_closed()

        async with asyncio.TaskGroup() as tasks:
            for place, client in enumerate(clients):
                tasks.create_task(push(client, f"room:{place}"))
            tasks.create_task(publish())
            for _ in range(15):
                await asyncio.sleep(0.1)
                reset()
            ended.set()
        assert set(statuses) <= {200, 503}
        assert "bus unavailable" in answers
        for client in clients:
            await client.send(None, "alive", "phoenix", "heartbeat", {})
            while await client.receive() != client.reply(None, "alive", "phoenix"):
                pass  # what was on its way
        assert served.relay.metrics.sockets == served.relay.metrics.sockets_opened == 10
        assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
        await eventually(lambda: served.relay.link.live, "the link")


@both_loops
async def test_peer_that_resets_at_each_step_is_a_reason_and_no_traceback(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While connecting, while AUTH, ROLE or PSUBSCRIBE is under way, and after it; the next attempt is not spoilt."""
    for steps in range(5):
        answers = [b"+OK\r\n", b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"][:steps]

        async def peer(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: Any = tuple(answers)
        ) -> None:
            with suppress(OSError):
                for answer in answers:
                    await reader.read(65536)
                    writer.write(answer)
                if len(answers) > 1:
                    await reader.read(65536)
            end = writer.get_extra_info("socket")
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        peers = await asyncio.start_server(peer, "127.0.0.1", 0)
        async with peers:
            port = peers.sockets[0].getsockname()[1]
            async with broker_on(f"redis://:pw@127.0.0.1:{port}", timeout_s=2.0) as (broker, _, metrics):
                answers_ = [await outcome(broker.publish(Direction.FROM, "room", "e", b"1")) for _ in range(20)]
                assert "ok" not in answers_
                assert not broker.link.live
                assert metrics.gaps == 0
    assert not [record.getMessage() for record in caplog.records if record.exc_info]
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@both_loops
async def test_peer_that_resets_during_the_tls_handshake_is_a_reason(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        end = writer.get_extra_info("socket")
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    peers = await asyncio.start_server(peer, "127.0.0.1", 0)
    async with peers:
        port = peers.sockets[0].getsockname()[1]
        async with broker_on(f"rediss://127.0.0.1:{port}", timeout_s=2.0) as (broker, _, _):
            assert "ok" != await outcome(broker.publish(Direction.FROM, "room", "e", b"1"))
            assert not broker.link.live
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


async def test_nonsense_instead_of_redis_is_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    """An HTTP server behind the address."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    peers = await asyncio.start_server(peer, "127.0.0.1", 0)
    async with peers:
        port = peers.sockets[0].getsockname()[1]
        async with broker_on(f"redis://127.0.0.1:{port}", timeout_s=2.0) as (broker, _, _):
            assert broker.link.reason.startswith("this is no Redis")
            assert "this is no Redis" in await outcome(broker.publish(Direction.FROM, "room", "e", b"1"))
    assert not [record.getMessage() for record in caplog.records if record.exc_info]
