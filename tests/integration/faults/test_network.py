"""The network broken between a client and the relay: it costs that client, and nobody else an event."""

import asyncio
import json
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from relay import Relay
from relay.log import INTERVAL_S, LINES_MAX
from relay.plugins import Plugin
from relay.plugins.hooks import Push
from tests.support.client import CLOSE, TEXT, Client, RawSocket, client_frame
from tests.support.faults import lossy_network
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually, heard_on, http_get, metric, serve
from tests.support.witness import Ticker, Witness

Connect = Callable[..., Awaitable[Client]]
ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def program(*command: str) -> AsyncIterator[Process]:
    """A client's process that has said ``joined``; killed at the end."""
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60 * PATIENCE):
            assert await process.stdout.readline() == b"joined\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_metric(relay: RelayProcess, name: str, value: float, deadline_s: float = 20) -> str:
    """Wait until one metric of ``/metrics``, of the direct path, has this value; returns them all."""
    async with asyncio.timeout(deadline_s * PATIENCE):
        while metric(metrics := (await http_get(f"{relay.http}/metrics"))[1], name, path="direct") != value:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.05)
    return metrics


async def test_half_open_clients_are_closed_and_cost_nobody_else() -> None:
    """Every packet is lost and nobody is told: their heartbeats stop, and the relay lets go of them.

    Where the machine allows no network of the test's own, the clients' process is stopped instead: it neither reads nor
    answers.
    """
    idle_s = 1.5 * PATIENCE
    limits = {"RELAY_LIMITS__IDLE_TIMEOUT_S": str(idle_s), "RELAY_LIMITS__CLOSE_TIMEOUT_S": "0.5"}
    environ = {"RELAY_ALLOW_ANONYMOUS": "true", "RELAY_SYSTEM_TOPIC": "false", **limits}
    with lossy_network() as network, RelayProcess("--host", "0.0.0.0", environ=environ) as relay:
        port = relay.http.rpartition(":")[2]
        host, prefix = (network.address, network.command) if network is not None else ("127.0.0.1", ())
        beater = (sys.executable, "-m", "tests.support.beater", f"ws://{host}:{port}", "room:half", "20")
        async with (
            Client.connect(f"ws://127.0.0.1:{port}/socket") as client,
            Ticker.run(relay.redis_url, "room:half") as ticker,
            Witness.run(client, "room:half") as witness,
            beating(client),
            program(*prefix, *beater) as process,
        ):
            await until_metric(relay, "relay_sockets", 21)
            await asyncio.sleep(idle_s + 0.5)  # longer than the time limit: heartbeats keep them
            await until_metric(relay, "relay_sockets", 21)
            if network is not None:
                network.cut()
            else:
                process.send_signal(signal.SIGSTOP)
            metrics = await until_metric(relay, "relay_sockets", 1)
            await witness.progress()
            assert witness.check(ticker) == 0
            assert witness.told == []
        assert metric(metrics, "relay_refused_total", kind="socket", reason="idle") == 20
        assert "Traceback" not in relay.output


@asynccontextmanager
async def beating(client: Client) -> AsyncIterator[None]:
    """Heartbeats beside what a witness reads; their answers pass it by."""

    async def beat() -> None:
        while True:
            await client.send(None, "beat", "phoenix", "heartbeat", {})
            await asyncio.sleep(0.3)

    beats = asyncio.create_task(beat())
    try:
        yield
    finally:
        beats.cancel()
        _ = await asyncio.gather(beats, return_exceptions=True)


@pytest.mark.parametrize("cut_at", ["header", "payload", "fragments"])
async def test_reset_in_mid_frame_ends_that_socket_alone(
    served: Served, redis: Redis, connect: Connect, caplog: pytest.LogCaptureFixture, cut_at: str
) -> None:
    """Source: RFC 793, RST; by ``SO_LINGER`` 0."""
    topic, other = f"room:{cut_at}", await connect(served)
    await other.join(topic)
    frame = client_frame(TEXT, json.dumps(["1", "2", topic, "shout", "x" * 1000]).encode())
    part = {"header": frame[:3], "payload": frame[:500], "fragments": b"\x01\x81" + bytes(4) + b"["}[cut_at]
    async with heard_on(f"redis://127.0.0.1:{redis.connection_pool.connection_kwargs['port']}", "from:*") as heard:
        for _ in range(5):
            async with RawSocket.connect(served.ws) as client:
                await client.send_frame(TEXT, json.dumps(["1", "1", topic, "phx_join", {}]).encode())
                await client.read_message()
                await client.send_bytes(part)
                client.reset()
        await eventually(lambda: served.relay.metrics.sockets == 1, "the sockets to end")
        assert served.relay.topics == {topic: 1}
        for number in range(3):
            await redis.publish(f"to:{topic}:tick", number)
        for number in range(3):
            await other.expect_event(topic, "tick", number)
        await other.push(None, topic, "shout", 1)
        assert await heard() == (f"from:{topic}:shout", b"1"), "nothing of the half frames came out"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("end", ["reset", "close"])
@pytest.mark.parametrize("handled", [False, True], ids=["passed on", "handled"])
async def test_what_came_before_the_end_of_a_connection_is_handled(
    valkey: Valkey, direct: bool, end: str, handled: bool
) -> None:
    """400 pushes, a close frame, and gone at once: the replies meet a reset while most of them are still to be read."""
    plugin, pushes, topic = Plugin("p"), 400, f"room:gone:{direct}:{end}:{handled}"
    if handled:
        plugin.on_push("room:*")(_take)
    relay = Relay(redis_url=valkey.url, system_topic=False, extra_plugins=(plugin,))
    async with serve(relay, direct=direct) as served, heard_on(valkey.url, f"from:{topic}:*") as heard:
        async with RawSocket.connect(served.ws) as client:
            await client.send_frame(TEXT, json.dumps(["1", "1", topic, "phx_join", {}]).encode())
            assert (await client.read_message())[4]["status"] == "ok"
            frames = [json.dumps(["1", str(n), topic, "say", n]).encode() for n in range(pushes)]
            everything = b"".join(client_frame(TEXT, frame) for frame in frames)
            await client.send_bytes(everything + client_frame(CLOSE, (1001).to_bytes(2)))
            if end == "reset":
                client.reset()
        assert [int((await heard())[1]) for _ in range(pushes)] == list(range(pushes))
        await eventually(lambda: not relay.node.sockets, "the socket's end")
        await eventually(lambda: relay.metrics.pushes_out == pushes, "the last push")
        assert +relay.metrics.refused == {}


async def _take(push: Push) -> dict[str, str]:
    await asyncio.sleep(0)
    return {"a longer": "reply" * 20}


async def test_thousand_clients_that_vanish_at_once_cost_nobody_else() -> None:
    """Their process is killed while events flow; the one that stays gets them all, in order."""
    began = time.monotonic()
    # All of this crowd come from one address.
    with RelayProcess(environ={"RELAY_LIMITS__SOCKETS_PER_ADDRESS": "0"}) as relay:
        swarm = (sys.executable, "-m", "tests.support.swarm", relay.ws, "room:crowd", "1000")
        async with (
            Client.connect(relay.ws) as client,
            Ticker.run(relay.redis_url, "room:stay") as ticker,
            Witness.run(client, "room:stay") as witness,
            Redis.from_url(relay.redis_url) as redis,
        ):
            async with program(*swarm) as process:
                await until_metric(relay, "relay_sockets", 1001)
                for number in range(20):
                    await redis.publish("to:room:crowd:tick", number)
                process.kill()
            metrics = await until_metric(relay, "relay_sockets", 1)
            await witness.progress()
            assert witness.check(ticker) == 0
            assert witness.told == []
            _, answer = await http_get(f"{relay.http}/health")
            assert json.loads(answer)["sockets"] == 1
        assert metric(metrics, "relay_gaps_total") == 0
        lines = relay.output.splitlines()
        intervals = (time.monotonic() - began) // INTERVAL_S + 1
        assert len(lines) < 2 * LINES_MAX * intervals + 60, "a thousand that come and go are not two thousand lines"
        assert "Traceback" not in relay.output


@pytest.mark.parametrize("vsn", ["2.0.0", "1.0.0"])
async def test_frames_that_come_byte_by_byte_are_read(served: Served, redis: Redis, vsn: str) -> None:
    join = ["1", "1", "room:drip", "phx_join", {}]
    push = ["1", "2", "room:drip", "shout", {"text": "é" * 70}]  # a header with two length bytes
    if vsn.startswith("1"):
        names = ("join_ref", "ref", "topic", "event", "payload")
        messages: list[object] = [dict(zip(names[1:], message[1:], strict=True)) for message in (join, push)]
    else:
        messages = [join, push]
    async with RawSocket.connect(served.ws, vsn=vsn) as client:
        for message in messages:
            for byte in client_frame(TEXT, json.dumps(message).encode()):
                await client.send_bytes(bytes((byte,)))
                await asyncio.sleep(0)
            reply = await client.read_message()
            assert (reply["payload"] if isinstance(reply, dict) else reply[4]) == {"status": "ok", "response": {}}
        await redis.publish("to:room:drip:tick", 1)
        heard = await client.read_message()
        assert (heard["payload"] if isinstance(heard, dict) else heard[4]) == 1
