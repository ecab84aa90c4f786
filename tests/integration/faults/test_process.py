"""The relay's own process broken: ended under load, killed, blocked, its clock turned back, out of descriptors."""

import ast
import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from redis.asyncio import Redis

import relay as package
from tests.support.client import CLOSE, TEXT, Client, RawSocket
from tests.support.patience import PATIENCE
from tests.support.phoenix import PhoenixClient, phoenix_clients, until_joined
from tests.support.process import RelayProcess, Valkey, wait_for
from tests.support.serving import eventually, http_get, metric
from tests.support.witness import Ticker, Witness

OK = {"status": "ok", "response": {}}
HANDSHAKE = (
    b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def port_of(relay: RelayProcess) -> int:
    return int(relay.http.rpartition(":")[2])


async def metrics_of(relay: RelayProcess) -> str:
    return (await http_get(f"{relay.http}/metrics"))[1]


async def status_of_handshake(port: int) -> str:
    """Status line of an upgrade request; nothing where nobody listens."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return ""
    writer.write(HANDSHAKE)
    try:
        return (await reader.readline()).decode().strip()
    except OSError:
        return ""
    finally:
        writer.close()


def expect_unbroken(numbers: list[int]) -> None:
    """Every number from the first to the last, once and in order."""
    assert numbers == list(range(numbers[0], numbers[-1] + 1))


# The end, in good order.


@pytest.mark.parametrize("workers", [1, 2])
async def test_sigterm_under_load_drains_at_its_pace(workers: int) -> None:
    """New sockets get 503, those that are here 1012 in portions, with all that was published until then."""
    count, pace = 120, 60
    limits = {"RELAY_LIMITS__DRAIN_PER_S": str(pace // workers), "RELAY_LIMITS__DRAIN_TIMEOUT_S": "10"}
    with (
        Valkey() as server,
        RelayProcess("--redis-url", server.url, "--workers", str(workers), environ=limits) as relay,
    ):
        port = port_of(relay)
        async with (
            phoenix_clients(count, port, "room:end", comes_back=False) as clients,
            Ticker.run(server.url, "room:end") as ticker,
        ):
            await eventually(lambda: all(len(client.numbers) > 20 for client in clients), "events")
            signalled = time.monotonic()
            ending = asyncio.create_task(asyncio.to_thread(relay.stop))
            refused = 0
            while not all(client.closed_at for client in clients):
                assert time.monotonic() - signalled < 15 * PATIENCE
                status = await status_of_handshake(port)
                # Of two workers one may learn of the signal later than the other.
                assert "101" not in status or not refused or workers == 2, "the signal was seen before"
                refused += "503" in status
                await asyncio.sleep(0.05)
            assert await ending == 0
            took_s = time.monotonic() - signalled
            assert {code for client in clients for code in client.codes} == {1012}
            assert refused > 0
            # When a close is seen says little of the pace: this process may stand still for a while.
            assert took_s > 0.6 * count / pace, "not all at once"
            assert took_s < 10 * PATIENCE
            for client in clients:
                expect_unbroken(client.numbers)
            # Whoever was closed last has seen what was published until shortly before.
            last = max(clients, key=lambda client: client.closed_at[0])
            assert last.numbers[-1] >= max(client.numbers[-1] for client in clients) - (5 if workers == 1 else 50)
            assert ticker.taken
        wait_for(relay.nothing_is_left, "all processes to end")
        assert "Traceback" not in relay.output
        assert "ERROR" not in relay.output


async def test_outbox_of_a_slow_reader_is_sent_before_the_close() -> None:
    """It reads only after the signal, and gets all that was queued, then 1012."""
    topics = '[{"match": "*", "overflow": "drop-oldest"}]'
    environ = {
        "RELAY_TOPICS": topics,
        "RELAY_LIMITS__OUTBOX_MAX_BYTES": "2097152",
        "RELAY_LIMITS__CLOSE_TIMEOUT_S": str(5 * PATIENCE),
        "RELAY_LIMITS__DRAIN_TIMEOUT_S": str(20 * PATIENCE),
    }
    with RelayProcess(environ=environ) as relay:
        async with RawSocket.connect(relay.ws, receive_buffer=4096) as slow, Client.connect(relay.ws) as fast:
            await slow.send_frame(TEXT, b'["1","1","room:slow","phx_join",{}]')
            await slow.read_message()
            await fast.join("room:slow")
            async with Redis.from_url(relay.redis_url) as redis:
                for number in range(600):  # 6 MB: more than the kernel holds, less than kernel and outbox
                    await redis.publish("to:room:slow:tick", json.dumps([number, "x" * 10_000]))
            for number in range(600):
                assert (await fast.receive())[4][0] == number
            dropped = metric(
                await metrics_of(relay), "relay_dropped_total", reason="slow_reader", overflow="drop_oldest"
            )
            ending = asyncio.create_task(asyncio.to_thread(relay.stop))
            assert (await fast.expect_closed())[0] == 1012
            numbers = []
            while (frame := await slow.read_frame())[0] == TEXT:
                numbers.append(json.loads(frame[1])[4][0])
            assert frame == (CLOSE, (1012).to_bytes(2) + b"the relay is restarting")
            await slow.send_frame(CLOSE, (1012).to_bytes(2))
            assert await ending == 0
        assert numbers == sorted(set(numbers))
        assert numbers[-1] == 599
        assert len(numbers) == 600 - dropped


async def test_drain_with_many_sockets_is_hurried_to_end_in_time() -> None:
    """The pace set would take a minute; ``limits.drain_timeout_s`` goes first."""
    limits = {"RELAY_LIMITS__DRAIN_PER_S": "1", "RELAY_LIMITS__DRAIN_TIMEOUT_S": "2"}
    with RelayProcess(environ=limits) as relay:
        async with phoenix_clients(60, port_of(relay), "room:many", comes_back=False) as clients:
            started = time.monotonic()
            assert await asyncio.to_thread(relay.stop) == 0
            assert 1 < time.monotonic() - started < 20 * PATIENCE
            await eventually(lambda: all(client.closed_at for client in clients), "the closes")
            assert {code for client in clients for code in client.codes} == {1012}


async def test_ready_says_no_while_the_relay_drains() -> None:
    """A load balancer sends nobody here any more, while those that are here are still served."""
    with RelayProcess(environ={"RELAY_LIMITS__DRAIN_PER_S": "4"}) as relay:
        async with phoenix_clients(20, port_of(relay), "room:lb", comes_back=False) as clients:
            assert relay.process is not None
            relay.process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(5 * PATIENCE):
                while (answer := await http_get(f"{relay.http}/ready"))[0] != 503:  # noqa: ASYNC110 - another process's state
                    await asyncio.sleep(0.02)
            assert json.loads(answer[1])["reason"] == "the relay is restarting"
            last = clients[-1]
            assert not last.closed_at
            async with Redis.from_url(relay.redis_url) as redis:
                await redis.publish("to:room:lb:tick", 7)
            await eventually(lambda: last.numbers == [7] or last.closed_at, "the event")
            assert last.numbers == [7]
        assert await asyncio.to_thread(relay.wait) == 0


# The end, in bad order.


def connections(pid: int, port: int) -> set[int]:
    """The clients' ports of a worker's connections."""
    with suppress(psutil.NoSuchProcess):
        return {
            connection.raddr.port
            for connection in psutil.Process(pid).net_connections("tcp")
            if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == port
        }
    return set()


async def test_sigkill_of_one_worker_of_two_leaves_the_others_sockets_alone() -> None:
    with Valkey() as server, RelayProcess("--redis-url", server.url, "--workers", "2") as relay:
        port = port_of(relay)
        async with Redis.from_url(server.url) as redis, asyncio.timeout(20 * PATIENCE):
            while await redis.publish("to:nobody:e", "{}") < 2:  # noqa: ASYNC110 - the second may start later
                await asyncio.sleep(0.01)
        async with AsyncExitStack() as stack, Ticker.run(server.url, "room:two"):
            clients: list[PhoenixClient] = []
            served: dict[int, set[int]] = {}
            while len(clients) < 60 or sum(map(bool, served.values())) < 2:  # one may be quicker to accept a burst
                clients += await stack.enter_async_context(phoenix_clients(20, port, "room:two"))
                served = {child.pid: connections(child.pid, port) for child in relay.children()}
                assert len(clients) < 1000
            await eventually(lambda: all(len(client.numbers) > 20 for client in clients), "events")
            victim = min((pid for pid in served if served[pid]), key=lambda pid: len(served[pid]))
            hurt = [client for client in clients if client.local_port in served[victim]]
            unhurt = [client for client in clients if client.local_port not in served[victim]]
            assert hurt and unhurt
            os.kill(victim, signal.SIGKILL)
            await eventually(lambda: all(client.closed_at for client in hurt), "the connections to end")
            await until_joined(clients)
            seen = [len(client.numbers) for client in clients]
            await eventually(
                lambda: all(len(c.numbers) > count + 20 for c, count in zip(clients, seen, strict=True)), "events"
            )
            for client in unhurt:
                assert client.codes == {}
                expect_unbroken(client.numbers)
            for client in hurt:
                assert client.codes == {1006: 1}
                assert client.numbers == sorted(set(client.numbers))

            def replaced() -> bool:
                with suppress(psutil.Error):
                    return len([child for child in relay.children() if "spawn_main" in str(child.cmdline())]) == 2
                return False

            await eventually(replaced, "another in its place")


# Blocked, and with another clock.


@pytest.fixture
def naughty(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RelayProcess]:
    """A relay with a plugin that blocks the event loop, or turns the clock back, when it is pushed to do so.

    Its parameter, if any, is ``limits.idle_timeout_s``.
    """
    directory = tmp_path / "plugins" / "naughty"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text(
        "import asyncio, time\n"
        "from relay.plugins import Plugin\n"
        'plugin = Plugin("naughty")\n'
        "real = time.time\n"
        "relays = []\n"
        "plugin.on_startup(relays.append)\n"
        '@plugin.on_push("room:knob", "block")\n'
        "async def block(push):\n"
        "    on_its_way = asyncio.ensure_future(relays[0].broadcast('room:other', 'tick', 1))\n"
        "    await asyncio.sleep(0)\n"
        "    time.sleep(2)\n"
        "    await on_its_way\n"
        '@plugin.on_push("room:knob", "stutter")\n'
        "async def stutter(push):\n"
        "    for _ in range(5):\n"
        "        time.sleep(0.9)\n"
        "        await asyncio.sleep(0.001)\n"
        '@plugin.on_push("room:knob", "step")\n'
        "async def step(push):\n"
        "    time.time = lambda: real() - 3600\n"
    )
    environ = {
        "RELAY_PLUGINS__PATHS": json.dumps([str(tmp_path / "plugins")]),
        # Time limits that a standstill of 2 s is beyond.
        "RELAY_REDIS__PING_INTERVAL_S": "0.4",
        "RELAY_REDIS__PING_TIMEOUT_S": "0.8",
        "RELAY_REDIS__TIMEOUT_S": "1.2",
        "RELAY_LIMITS__IDLE_TIMEOUT_S": str(getattr(request, "param", 1.6)),
        "RELAY_SYSTEM_TOPIC": "false",
    }
    with RelayProcess(environ=environ) as relay:
        yield relay


async def test_plugin_that_blocks_the_loop_for_two_seconds_costs_no_event(naughty: RelayProcess) -> None:
    """Everything waits, nothing is lost: no gap, no socket closed, no push refused; and it is counted and logged."""
    async with (
        phoenix_clients(20, port_of(naughty), "room:naughty", comes_back=False) as clients,
        # Pings of WebSocket keep these two open: they send nothing while the other waits for its event.
        Client.connect(naughty.ws, ping_interval=0.2) as client,
        Client.connect(naughty.ws, ping_interval=0.2) as pusher,
        Ticker.run(naughty.redis_url, "room:naughty") as ticker,
    ):
        await eventually(lambda: all(len(client.numbers) > 20 for client in clients), "events")
        await pusher.join("room:other")
        knob = await client.join("room:knob")
        for _ in range(3):
            began = time.monotonic()
            assert await client.push(knob, "room:knob", "block") == OK
            await pusher.expect_event("room:other", "tick", 1)
            assert time.monotonic() - began > 2, "it did block"
            for _ in range(4):
                await client.expect_alive()
                await pusher.expect_alive()
                await asyncio.sleep(0.2)
        last = ticker.taken[-1]
        await eventually(lambda: all(client.numbers[-1] >= last for client in clients), "what waited")
        for found in clients:
            assert found.closed_at == []
            assert len(found.joined_at) == 1
            expect_unbroken(found.numbers)
        metrics = await metrics_of(naughty)
    assert metric(metrics, "relay_gaps_total") == 0
    stalls = metric(metrics, "relay_event_loop_stalls_total")
    assert stalls >= 3
    assert 1 <= naughty.output.count("event loop blocked for") < stalls, "not a line for each"


async def test_loop_that_stands_still_while_redis_is_asked_for_a_sign_of_life_keeps_its_link(
    naughty: RelayProcess,
) -> None:
    """The answer to PING has come, and nobody has read it: five standstills, each longer than the time limit."""
    async with Client.connect(naughty.ws, ping_interval=0.2) as client:
        assert await client.push(await client.join("room:knob"), "room:knob", "stutter") == OK
        await client.expect_alive()
        assert metric(await metrics_of(naughty), "relay_gaps_total") == 0
        assert await http_get(f"{naughty.http}/ready") == (200, '{"status":"ready"}')


@pytest.mark.parametrize("naughty", [1.6 * PATIENCE], indirect=True)
async def test_clock_stepped_back_one_hour_changes_nothing(naughty: RelayProcess) -> None:
    """Heartbeats, time limits, supervision and log throttles go by a clock that only goes forward."""
    async with (
        phoenix_clients(20, port_of(naughty), "room:naughty", comes_back=False) as clients,
        Client.connect(naughty.ws) as client,
        Ticker.run(naughty.redis_url, "room:naughty") as ticker,
        RawSocket.connect(naughty.ws) as silent,
    ):
        assert await client.push(await client.join("room:knob"), "room:knob", "step") == OK
        assert (await silent.read_close())[0] == 1001, "idle sockets are still closed"
        await asyncio.sleep(2)
        last = ticker.taken[-1]
        await eventually(lambda: all(client.numbers[-1] >= last for client in clients), "events")
        for found in clients:
            assert found.closed_at == [], "and those that beat their hearts are not"
            expect_unbroken(found.numbers)
        metrics = await metrics_of(naughty)
    assert metric(metrics, "relay_gaps_total") == 0


# Modules that read the wall clock, each with its reason.
WALL_CLOCK = {
    "auth/authenticator.py": "read once as a token is taken; from then on it expires by the other clock",
    "brokers/memory_history.py": "a position begins with the time of day, as in Redis: it is newer after a restart",
    "web/tangram.py": "a token says the time of day at which it expires",
    "cli/auth.py": "the same",
    "web/console.py": "the time of day that the page shows beside an event",
    "web/console_series.py": "the same, for the charts",
    "plugins/webhook_client.py": "the time of day that a request is signed with",
}


WALL_CLOCK_CALLS = {
    "time.time",
    "time.time_ns",
    "_clock.time",
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
}


def test_nothing_in_the_relay_reads_the_wall_clock() -> None:
    directory = Path(package.__file__).parent
    found = set()
    for path in directory.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                if f"{owner}.{node.attr}" in WALL_CLOCK_CALLS:
                    found.add(str(path.relative_to(directory)))
    assert found == set(WALL_CLOCK)


async def test_bad_requests_write_few_log_lines() -> None:
    """Uvicorn writes one for each, and anybody can send thousands."""
    with RelayProcess() as relay:
        began = time.monotonic()
        for _ in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", port_of(relay))
            writer.write(b"\x00\r\n\r\n")
            await writer.drain()
            writer.close()
        assert (await http_get(f"{relay.http}/health"))[0] == 200
        await asyncio.sleep(1)
        assert 1 <= relay.output.count("Invalid HTTP request") <= time.monotonic() - began + 1


# File descriptors.


def test_relay_takes_as_many_descriptors_as_it_may() -> None:
    """The soft limit is often 1 024, and a socket takes one."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 700))\n"
        "from relay.fd_limit import raise_descriptor_limit as go\n"
        "go(); print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "(700, 700)"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
async def test_relay_out_of_descriptors_keeps_its_clients_and_its_redis() -> None:
    """Who comes then gets 503 at the door; some descriptors stay free, so that the link to Redis can come back.

    All that there are have been taken by sockets, of which none is given up for another.
    """
    with Valkey() as server, RelayProcess("--redis-url", server.url) as relay:
        assert relay.process is not None
        port = port_of(relay)
        async with (
            Client.connect(relay.ws) as client,
            Ticker.run(server.url, "room:full") as ticker,
            Witness.run(client, "room:full") as witness,
        ):
            resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, (100, 100))
            with ExitStack() as stack:
                began = time.monotonic()
                idlers = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(300)]
                for idler in idlers:
                    with suppress(OSError):  # refused already
                        idler.sendall(HANDSHAKE)
                await asyncio.sleep(2.2)
                assert "503" in await status_of_handshake(port)
                lines = relay.output.count("file descriptors are taken")
                assert 1 <= lines <= time.monotonic() - began + 1, "once a second at most"
                cpu_s = sum(psutil.Process(relay.process.pid).cpu_times()[:2])
                # The link is cut meanwhile, and comes back.
                async with Redis.from_url(server.url) as redis:
                    await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
                await witness.until(lambda: witness.joins == 2)
                await witness.progress()
                assert sum(psutil.Process(relay.process.pid).cpu_times()[:2]) - cpu_s < 1, "it does not spin"
                assert len(idlers) == 300
            async with asyncio.timeout(20 * PATIENCE):
                while "101" not in await status_of_handshake(port):  # noqa: ASYNC110 - another process's state
                    await asyncio.sleep(0.05)
            metrics = await metrics_of(relay)
            assert metric(metrics, "relay_refused_total", kind="socket", reason="file_descriptors") > 200
            _ = witness.check(ticker)
            assert len(witness.told) == metric(metrics, "relay_gaps_total") == 1
        assert "Traceback" not in relay.output


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process are Linux's")
async def test_connections_that_wait_for_their_client_make_room_for_others() -> None:
    """However many one client holds open and does nothing with: it alone is cut off, and sockets are not.

    Nor is it waited for until it is too slow.
    """
    with RelayProcess(environ={"RELAY_LIMITS__HANDSHAKE_TIMEOUT_S": "0"}) as relay:
        assert relay.process is not None
        port = port_of(relay)
        async with Client.connect(relay.ws) as client:
            ref = await client.join("room:1")
            resource.prlimit(relay.process.pid, resource.RLIMIT_NOFILE, (100, 100))
            with ExitStack() as stack:
                idlers = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(200)]
                for idler in idlers[::2]:
                    with suppress(OSError):
                        idler.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
                async with asyncio.timeout(20 * PATIENCE):
                    while "101" not in await status_of_handshake(port):  # noqa: ASYNC110 - another process's state
                        await asyncio.sleep(0.05)
                assert (await http_get(f"{relay.http}/health"))[0] == 200
            assert (await client.push(ref, "room:1", "shout"))["status"] == "ok"
            assert (
                metric(await metrics_of(relay), "relay_refused_total", kind="socket", reason="file_descriptors") > 100
            )
        assert relay.output.count("to make room") <= 2, "a line in ten seconds"


def test_many_clients_one_after_another_use_no_descriptors_up() -> None:
    with RelayProcess() as relay:
        assert relay.process is not None
        process = psutil.Process(relay.process.pid)

        async def come_and_go(count: int) -> None:
            clients = [PhoenixClient(port_of(relay), "room:go", comes_back=False) for _ in range(count)]
            for client in clients:
                client.connect()
            await until_joined(clients)
            for client in clients:
                await client.end()

        asyncio.run(come_and_go(50))
        wait_for(lambda: process.num_fds() < 30, "the descriptors to be free")
