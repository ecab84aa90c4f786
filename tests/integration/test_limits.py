"""How much one client may ask for, through real sockets: each limit refuses with its reason, and is counted.

What is said of each limit to users is in ``docs/limits.md``, whose tables name these tests.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import SimpleNamespace

import httpx2 as httpx
import pytest
import websockets
from websockets.exceptions import InvalidStatus

from relay import Plugin, Push
from relay.transports.uvicorn_http import HEAD_MAX_BYTES, RelayHTTPProtocol
from tests.support.client import TEXT, Client, RawSocket
from tests.support.long_poll import Poller
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess
from tests.support.serving import Served, eventually, http_get, metric
from tests.support.sse import Stream

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]


async def counted(served: Served, reason: str, kind: str = "socket") -> float:
    """How often something was refused for ``reason``, as ``/metrics`` has it."""
    _, metrics = await http_get(f"{served.http}/metrics")
    return metric(metrics, "relay_refused_total", kind=kind, reason=reason)


# Joins and pushes per second.


async def test_pushes_over_the_rate_are_answered_and_go_nowhere(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(limits={"pushes_per_s": 1, "pushes_burst": 3})
    client, other = await connect(served), await connect(served)
    join_ref, other_ref = await client.join("room:1"), await other.join("room:1")
    for number in range(5):
        await client.send(join_ref, str(number), "room:1", "shout", {})
    answers = sorted([await client.receive() for _ in range(5)], key=lambda message: message[1])
    assert answers[:3] == [client.reply(join_ref, str(number), "room:1") for number in range(3)]
    assert answers[3:] == [client.refusal(join_ref, str(number), "room:1", "rate limited") for number in (3, 4)]
    assert served.relay.metrics.pushes_out == 3
    assert await counted(served, "rate_limited") == 2
    await client.send(join_ref, None, "room:1", "shout", {})
    await client.expect_alive()  # that one asked for no answer
    # Nobody else is concerned.
    assert (await other.push(other_ref, "room:1", "shout"))["status"] == "ok"


async def test_joins_over_the_rate_are_answered_and_change_nothing(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(limits={"joins_per_s": 1, "joins_burst": 2})
    client = await connect(served)
    await client.join("room:1")
    await client.join("room:2")
    await client.send("9", "9", "room:3", "phx_join", {})
    assert await client.receive() == client.refusal("9", "9", "room:3", "rate limited")
    assert served.relay.topics == {"room:1": 1, "room:2": 1}
    assert await counted(served, "rate_limited") == 1


async def test_leaves_and_heartbeats_are_never_refused(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(limits={"pushes_per_s": 1, "pushes_burst": 1})
    client = await connect(served)
    join_ref = await client.join("room:1")
    for _ in range(3):
        await client.expect_alive()
    await client.send(join_ref, "9", "room:1", "phx_leave", {})
    assert await client.receive() == client.reply(join_ref, "9", "room:1")
    assert served.relay.topics == {}


@pytest.mark.parametrize("what", ["shout", "heartbeat"])
async def test_socket_over_its_rate_for_long_is_closed(serve_relay: ServeRelay, connect: Connect, what: str) -> None:
    """1008, and not 1000: phoenix.js comes back, with an empty slate."""
    served = await serve_relay(limits={"pushes_per_s": 1, "pushes_burst": 5, "rate_limit_violations_max": 10})
    client = await connect(served)
    await client.join("room:1")
    for number in range(20):
        await client.send(None, str(number), "room:1" if what == "shout" else "phoenix", what, {})
    assert await client.expect_closed() == (1008, "rate limited for long: this client asks for too much")
    assert await counted(served, "rate_limited_for_long") == 1


async def test_large_pushes_are_over_the_rate_sooner(serve_relay: ServeRelay, connect: Connect) -> None:
    """A frame is read before it is known what it asks for: up to 30 ms for 1 MiB of odd text."""
    served = await serve_relay(limits={"pushes_per_s": 1, "pushes_burst": 10})
    client = await connect(served)
    join_ref = await client.join("room:1")
    answers = [(await client.push(join_ref, "room:1", "shout", "x" * 400_000))["status"] for _ in range(2)]
    assert answers == ["ok", "error"]
    assert await counted(served, "rate_limited") == 1


async def test_a_page_with_a_hundred_topics_is_not_limited_by_default(served: Served, connect: Connect) -> None:
    """phoenix.js joins all its channels again after each reconnect, and pushes what it kept for them."""
    client = await connect(served)
    for number in range(100):
        await client.push(await client.join(f"room:{number}"), f"room:{number}", "shout")
    assert served.relay.metrics.refused == {}


async def test_socket_is_read_no_further_while_too_much_is_under_way(serve_relay: ServeRelay, connect: Connect) -> None:
    plugin, gate = Plugin("slow"), asyncio.Event()

    @plugin.on_push("room:*")
    async def wait(push: Push) -> None:
        await gate.wait()

    served = await serve_relay(extra_plugins=(plugin,), limits={"pushes_in_flight": 2})
    client, other = await connect(served), await connect(served)
    join_refs = [await client.join(f"room:{number}") for number in range(3)]
    for number, join_ref in enumerate(join_refs):
        await client.send(join_ref, str(number), f"room:{number}", "shout", {})
    await eventually(lambda: served.relay.metrics.pushes_in == 2, "two pushes to be under way")
    for _ in range(10):
        await other.expect_alive()
    assert served.relay.metrics.pushes_in == 2
    gate.set()
    assert sorted([(await client.receive())[1] for _ in range(3)]) == ["0", "1", "2"]


# Who may come in: by WebSocket, and by a stream of server-sent events.


async def refusal(served: Served, **headers: str) -> tuple[int, str, str]:
    """Status, Retry-After and text of a handshake that must be refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with websockets.connect(f"{served.ws}/websocket?vsn=2.0.0", additional_headers=headers):
            pass
    response = caught.value.response
    return response.status_code, response.headers.get("Retry-After", ""), (response.body or b"").decode().strip()


class Door:
    """One of the transports, as a client of it comes in."""

    def __init__(self, transport: str) -> None:
        self.is_stream = transport == "sse"
        self.is_polled = transport == "longpoll"

    @asynccontextmanager
    async def connect(self, served: Served, **headers: str) -> AsyncIterator[Callable[[], Awaitable[object]]]:
        """Come in, and go at the end; what is yielded checks that the connection lives."""
        if self.is_polled:
            async with Poller.connect(served.ws, headers=headers) as poller:
                yield poller.expect_alive
                # Else the relay would wait for its next poll, for 1.5 windows.
                served.relay.disconnect(poller.socket_id)
            return
        if not self.is_stream:
            async with Client.connect(served.ws, additional_headers=headers) as client:
                yield client.expect_alive
            return
        async with Stream.open(served.ws, "room:door", headers=headers) as stream:

            async def expect_alive() -> None:
                await served.relay.publish("room:door", "alive", {})
                await stream.expect_event("alive", "{}")

            assert stream.status == 200
            yield expect_alive

    async def knock(self, served: Served, **headers: str) -> tuple[int, str, str]:
        """Be refused: status, Retry-After and reason. A stream that is to come back is answered 200, and ends."""
        if self.is_polled:
            async with Poller.connect(served.ws, headers=headers, opens=False) as poller:
                answer = await poller.open()
                return answer["status"], "", answer["reason"]
        if not self.is_stream:
            return await refusal(served, **headers)
        async with Stream.open(served.ws, "room:door", headers=headers) as stream:
            if stream.status != 200:
                return stream.status, "", (await stream.body()).strip()
            (event,) = await stream.rest()
            assert stream.is_complete and event.event == "relay:error"
            assert stream.parser.retry_ms is not None and 1000 <= stream.parser.retry_ms <= 5000
            return 200, "", str(json.loads(event.data)["reason"])

    async def refusal(self, served: Served, status: int, retry_after: str, **headers: str) -> str:
        """Be refused, with this answer to a WebSocket, and return the reason."""
        found = await self.knock(served, **headers)
        is_temporary = status in (429, 503)
        if self.is_polled:
            status, retry_after = 500 if is_temporary else 403, ""
        elif self.is_stream and is_temporary:
            status, retry_after = 200, ""
        assert found[:2] == (status, retry_after)
        return found[2]


@pytest.fixture(params=["websocket", "sse", "longpoll"])
def door(request: pytest.FixtureRequest) -> Door:
    """All transports: the same limits hold for each, and for all together."""
    return Door(request.param)


@pytest.fixture
def other_door(door: Door) -> Door:
    return Door("longpoll" if door.is_stream else "sse" if door.is_polled else "websocket")


async def test_one_address_may_have_so_many_sockets(serve_relay: ServeRelay, door: Door, other_door: Door) -> None:
    served = await serve_relay(limits={"sockets_per_address": 2})
    async with other_door.connect(served):
        async with door.connect(served) as expect_alive:
            assert await door.refusal(served, 429, "10") == "too many sockets of this address"
            await expect_alive()
        await eventually(lambda: served.relay.metrics.sockets == 1, "the second socket to end")
        async with door.connect(served) as expect_alive:
            await expect_alive()
    assert await counted(served, "sockets_per_address", "handshake") == 1


async def test_all_sockets_together_are_bounded(serve_relay: ServeRelay, door: Door, other_door: Door) -> None:
    served = await serve_relay(limits={"sockets_max": 1})
    async with other_door.connect(served):
        assert await door.refusal(served, 503, "10") == "no room for another socket; try again later"
    await eventually(lambda: served.relay.metrics.sockets == 0, "the socket to end")
    async with door.connect(served) as expect_alive:
        await expect_alive()
    assert await counted(served, "sockets_in_all", "handshake") == 1


async def test_handshakes_are_bounded_in_their_rate(
    serve_relay: ServeRelay, door: Door, other_door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve_relay(limits={"handshakes_per_s": 1})
    now = time.monotonic()  # it stands still: no handshake more is allowed
    monkeypatch.setattr("relay.channels.connections.time", SimpleNamespace(monotonic=lambda: now))
    async with other_door.connect(served):
        assert await door.refusal(served, 503, "1") == "too many handshakes at once; try again"
    assert await counted(served, "handshakes_per_second", "handshake") == 1


async def test_one_address_may_have_a_quarter_of_the_handshakes(
    serve_relay: ServeRelay, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await serve_relay(
        server={"proxy_headers": False},
        limits={"handshakes_per_s": 40},
        trusted_proxies=["127.0.0.1"],
        allow_anonymous=True,
    )
    headers = {"Origin": "http://evil.example", "X-Forwarded-For": "203.0.113.5"}
    now = time.monotonic()  # it stands still: none of the share comes back
    monkeypatch.setattr("relay.channels.connections.time", SimpleNamespace(monotonic=lambda: now))
    for _ in range(10):
        assert "may not connect" in (await door.knock(served, **headers))[2]
    assert "too many handshakes of this address" in (await door.knock(served, **headers))[2]
    assert await counted(served, "handshakes_per_address", "handshake") == 1


async def test_refused_handshakes_hold_no_place(serve_relay: ServeRelay, door: Door) -> None:
    """One that fails for its origin, or whatever else, must not be counted as a socket for ever."""
    served = await serve_relay(limits={"sockets_max": 1})
    for _ in range(3):
        await door.refusal(served, 403, "", Origin="http://evil.example")
    async with door.connect(served) as expect_alive:
        await expect_alive()


# Behind a proxy.


@pytest.mark.parametrize("proxy_headers", [False, True], ids=["alone", "with Uvicorn's own proxy_headers"])
async def test_clients_behind_a_trusted_proxy_are_counted_one_by_one(
    serve_relay: ServeRelay, door: Door, proxy_headers: bool
) -> None:
    served = await serve_relay(
        server={"proxy_headers": proxy_headers},
        limits={"sockets_per_address": 1},
        trusted_proxies=["127.0.0.1"],
        allow_anonymous=True,
    )
    forwarded = ({"X-Forwarded-For": address} for address in ("1.2.3.4", "1.2.3.5"))
    async with door.connect(served, **next(forwarded)), door.connect(served, **next(forwarded)):
        assert [socket.address for socket in served.relay.node.sockets.values()] == ["1.2.3.4", "1.2.3.5"]
        # What the client wrote into the header itself stands on the left, and does not help.
        forged = {"X-Forwarded-For": "6.6.6.6, 1.2.3.4"}
        assert await door.refusal(served, 429, "10", **forged) == "too many sockets of this address"


async def test_clients_of_one_ipv6_network_are_counted_together(serve_relay: ServeRelay, door: Door) -> None:
    served = await serve_relay(
        server={"proxy_headers": False},
        limits={"sockets_per_address": 1},
        trusted_proxies=["127.0.0.0/8"],
        allow_anonymous=True,
    )
    async with door.connect(served, **{"X-Forwarded-For": "2001:db8:1:2::3"}):
        await door.refusal(served, 429, "10", **{"X-Forwarded-For": "2001:db8:1:2:ffff::4"})
        async with door.connect(served, **{"X-Forwarded-For": "2001:db8:1:3::3"}):
            pass


async def test_forwarded_addresses_of_anybody_else_are_ignored(
    serve_relay: ServeRelay, door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve_relay(
        server={"proxy_headers": False},
        limits={"sockets_per_address": 1},
        trusted_proxies=["10.0.0.0/8"],
        allow_anonymous=True,
    )
    async with door.connect(served, **{"X-Forwarded-For": "1.2.3.4"}):
        await door.refusal(served, 429, "10", **{"X-Forwarded-For": "1.2.3.5"})
        assert [socket.address for socket in served.relay.node.sockets.values()] == ["127.0.0.1"]
    assert "is this a proxy that `trusted_proxies` should name?" in caplog.text


async def test_topics_of_one_socket_are_bounded(serve_relay: ServeRelay, connect: Connect, door: Door) -> None:
    served = await serve_relay(limits={"topics_per_socket": 2})
    if door.is_stream:
        async with Stream.open(served.ws, "a", "b", "c") as stream:
            assert (stream.status, await stream.body()) == (400, "expected at most 2 topics, got 3\n")
        return
    if door.is_polled:
        async with Poller.connect(served.ws) as poller:
            for topic in ("a", "b"):
                await poller.join(topic)
            await poller.send("9", "9", "c", "phx_join", {})
            refusal = {"status": "error", "response": {"reason": "too many channels joined"}}
            assert await poller.receive() == ["9", "9", "c", "phx_reply", refusal]
        return
    client = await connect(served)
    for topic in ("a", "b"):
        await client.join(topic)
    await client.send("9", "9", "c", "phx_join", {})
    assert await client.receive() == client.refusal("9", "9", "c", "too many channels joined")


async def test_outboxes_together_are_bounded(serve_relay: ServeRelay, door: Door) -> None:
    served = await serve_relay(
        server={"send_buffer": 4096},
        limits={
            "payload_max_bytes": 65_536,
            "outbox_max_bytes": 10_000_000,
            "outbox_total_max_bytes": 2_000_000,
            "close_timeout_s": 0.3,
        },
    )
    async with AsyncExitStack() as stack:
        if door.is_stream:
            await stack.enter_async_context(Stream.open(served.ws, "room:1", receive_buffer=4096))
        elif door.is_polled:
            poller = await stack.enter_async_context(Poller.connect(served.ws))
            await poller.send("1", "1", "room:1", "phx_join", {})
        else:
            slow = await stack.enter_async_context(RawSocket.connect(served.ws, receive_buffer=4096))
            await slow.send_frame(TEXT, b'["1","1","room:1","phx_join",{}]')
        await eventually(lambda: served.relay.topics == {"room:1": 1}, "the slow one to join")
        for _ in range(60):
            await served.relay.publish("room:1", "big", "x" * 60_000)
        await eventually(lambda: served.relay.metrics.sockets == 0, "the slow one to be cut off")
    assert await counted(served, "outboxes_full") == 1
    assert served.relay.metrics.outbox_bytes == 0


# Time.


FIRST_JOIN_S = 0.5 * PATIENCE
"""Those that do join have as long."""


async def test_socket_that_joins_nothing_is_closed(serve_relay: ServeRelay, connect: Connect) -> None:
    served = await serve_relay(limits={"first_join_timeout_s": FIRST_JOIN_S})
    joined, idle = await connect(served), await connect(served)
    join_ref = await joined.join("room:1")
    await joined.send(join_ref, "9", "room:1", "phx_leave", {})
    assert await idle.expect_closed() == (1008, f"no topic joined within {FIRST_JOIN_S:g} s")
    assert await counted(served, "no_join_in_time") == 1
    assert [await joined.receive(), await joined.receive()][0] == joined.reply(join_ref, "9", "room:1")
    await joined.expect_alive()


async def test_long_polling_client_that_joins_nothing_is_closed(serve_relay: ServeRelay) -> None:
    served = await serve_relay(limits={"first_join_timeout_s": FIRST_JOIN_S})
    async with Poller.connect(served.ws) as joined, Poller.connect(served.ws) as idle:
        await joined.join("room:1")
        await idle.expect_gone(f"no topic joined within {FIRST_JOIN_S:g} s")
        await joined.expect_alive()
    assert await counted(served, "no_join_in_time") == 1


async def test_long_polling_client_is_idle_between_polls_alone(serve_relay: ServeRelay) -> None:
    served = await serve_relay(limits={"idle_timeout_s": 0.5 * PATIENCE, "longpoll_window_s": 1.5 * PATIENCE})
    async with Poller.connect(served.ws) as polling, Poller.connect(served.ws) as idle:
        await polling.join("room:1")
        assert (await polling.poll())["status"] == 204
        await eventually(lambda: idle.socket_id not in served.relay.node.sockets, "the idle one to be closed")
        assert polling.socket_id in served.relay.node.sockets
        assert served.relay.metrics.refused["idle"] == 1  # the other is idle from now on


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes; it resets the connection where it has not read all that was sent."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send a byte at a time, until the server has enough of it."""
    try:
        for at in range(len(data)):
            writer.write(data[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0.02)
    except ConnectionError:
        pass


SLOWLY = b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nX-Padding: " + b"x" * 10_000


@pytest.mark.parametrize("sent", [b"", b"GET / HT", SLOWLY], ids=["nothing", "a part", "byte by byte"])
async def test_request_whose_head_does_not_come_is_cut(serve_relay: ServeRelay, sent: bytes) -> None:
    """Slowloris: it would hold a place for ever, and cost its sender next to nothing."""
    served = await serve_relay(server={"http": partial(RelayHTTPProtocol, handshake_timeout_s=0.3 * PATIENCE)})
    async with connection(served.port) as (reader, writer), asyncio.timeout(20):
        dripping = asyncio.create_task(drip(writer, sent))
        assert await read_to_end(reader) == b""
        dripping.cancel()
        await asyncio.wait((dripping,))
    assert await counted(served, "too_slow", "handshake") == 1


async def test_further_request_on_a_connection_is_cut_too(serve_relay: ServeRelay) -> None:
    served = await serve_relay(server={"http": partial(RelayHTTPProtocol, handshake_timeout_s=0.3 * PATIENCE)})
    async with connection(served.port) as (reader, writer), asyncio.timeout(20):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        dripping = asyncio.create_task(drip(writer, SLOWLY))
        assert (await reader.readuntil(b"}")).startswith(b'{"status"')
        assert await read_to_end(reader) == b""
        dripping.cancel()
        await asyncio.wait((dripping,))
    assert await counted(served, "too_slow", "handshake") == 1


async def test_socket_outlives_the_time_for_its_handshake(serve_relay: ServeRelay, connect: Connect) -> None:
    """A connection that is cut later shows that the time has passed."""
    served = await serve_relay(server={"http": partial(RelayHTTPProtocol, handshake_timeout_s=0.3 * PATIENCE)})
    client = await connect(served)
    async with connection(served.port) as (reader, _), asyncio.timeout(20):
        assert await read_to_end(reader) == b""
    await client.expect_alive()


async def test_no_time_limit_where_it_is_zero(serve_relay: ServeRelay) -> None:
    served = await serve_relay(server={"http": partial(RelayHTTPProtocol, handshake_timeout_s=0)})
    async with connection(served.port) as (reader, writer), asyncio.timeout(20):
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        await writer.drain()
        writer.write(b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


async def test_request_with_a_head_without_end_is_cut(serve_relay: ServeRelay) -> None:
    served = await serve_relay(server={"http": RelayHTTPProtocol})
    async with connection(served.port) as (reader, writer), asyncio.timeout(20):
        writer.write(b"GET / HTTP/1.1\r\nX-Padding: " + b"x" * (HEAD_MAX_BYTES + 1))
        try:
            assert await read_to_end(reader) == b""
        except ConnectionError:
            pass  # cut with bytes of ours unread
    assert await counted(served, "head_too_large", "handshake") == 1


async def test_relay_serve_cuts_slow_handshakes_and_looks_behind_proxies_itself() -> None:
    environ = {
        "RELAY_LIMITS__HANDSHAKE_TIMEOUT_S": str(0.3 * PATIENCE),
        "RELAY_LIMITS__SOCKETS_PER_ADDRESS": "1",
        "RELAY_TRUSTED_PROXIES": '["127.0.0.1"]',
        "RELAY_ALLOW_ANONYMOUS": "true",
    }
    with RelayProcess(environ=environ) as relay:
        address = f"{relay.ws}/websocket?vsn=2.0.0"
        first, second = ({"X-Forwarded-For": f"6.6.6.6, 1.2.3.{number}"} for number in (4, 5))
        async with (
            websockets.connect(address, additional_headers=first),
            websockets.connect(address, additional_headers=second),
        ):
            with pytest.raises(InvalidStatus) as caught:
                await websockets.connect(address, additional_headers=first)
            assert caught.value.response.status_code == 429
            async with connection(int(relay.http.rsplit(":", 1)[1])) as (reader, _), asyncio.timeout(20):
                assert await read_to_end(reader) == b""
        _, metrics = await http_get(f"{relay.http}/metrics")
    assert metric(metrics, "relay_refused_total", kind="handshake", reason="too_slow") == 1


async def test_relay_serve_believes_no_proxy_by_default() -> None:
    """Uvicorn alone would believe whoever calls from this machine."""
    with RelayProcess(environ={"RELAY_LIMITS__SOCKETS_PER_ADDRESS": "1", "RELAY_ALLOW_ANONYMOUS": "true"}) as relay:
        address = f"{relay.ws}/websocket?vsn=2.0.0"
        async with websockets.connect(address, additional_headers={"X-Forwarded-For": "1.2.3.4"}):
            with pytest.raises(InvalidStatus) as caught:
                await websockets.connect(address, additional_headers={"X-Forwarded-For": "1.2.3.5"})
            assert caught.value.response.status_code == 429


# REST.


@pytest.mark.parametrize("declared", [True, False], ids=["with its length", "in chunks"])
async def test_rest_body_over_the_bound_is_refused(serve_relay: ServeRelay, declared: bool) -> None:
    served = await serve_relay(limits={"body_max_bytes": 2000})
    body = b'{"topic": "room:1", "event": "new", "payload": "%s"}'

    async def chunks(data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), 500):
            yield data[start : start + 500]

    headers = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=f"{served.http}/api", trust_env=False, headers=headers) as client:
        answers = []
        for size in (1900, 2000):
            data = body % (b"x" * size)
            answers.append(await client.post("/publish", content=data if declared else chunks(data)))
    assert [answer.status_code for answer in answers] == [200, 413]
    assert answers[1].json()["detail"] == "body: expected at most 2000 bytes"
    assert await counted(served, "body_too_large", "rest") == 1
