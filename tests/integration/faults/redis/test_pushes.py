"""Pushes while Redis hangs, is slow, is full or refuses them: answered once, and ok only after Redis took them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from tests.support.client import TEXT, RawSocket
from tests.support.faults import Proxy
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.redis_faults import (
    FAST,
    OK,
    UNAVAILABLE,
    Connect,
    ServeRelay,
    command,
    ready,
    until_ready,
)
from tests.support.serving import eventually, heard_on


async def test_push_is_answered_only_after_redis_took_it(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    served = await serve_relay(redis_url=server.url)
    client = await connect(served)
    join_ref = await client.join("room:1")
    server.pause()
    refs = [client.next_ref() for _ in range(3)]
    for ref in refs:
        await client.send(join_ref, ref, "room:1", "shout", {})
    await client.send(join_ref, "leave", "room:1", "phx_leave", {})
    await client.expect_alive()  # the heartbeat overtakes them: nothing else has been answered
    server.resume()
    for ref in refs:
        assert await client.receive() == client.reply(join_ref, ref, "room:1")
    assert await client.receive() == client.reply(join_ref, "leave", "room:1")
    assert await client.receive() == client.message(join_ref, join_ref, "room:1", "phx_close", {})


async def test_push_through_a_slow_redis_is_answered_late_and_once(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    async with Proxy.open(server.port) as proxy, heard_on(server.url, "from:*") as heard:
        served = await serve_relay(redis_url=f"redis://127.0.0.1:{proxy.port}", redis=FAST | {"timeout_s": 1.5})
        client = await connect(served)
        join_ref = await client.join("room:slow")
        assert await client.push(join_ref, "room:slow", "shout", 0) == OK
        assert await heard() == ("from:room:slow:shout", b"0")
        proxy.delay_s = 0.3
        assert await client.push(join_ref, "room:slow", "shout", 1) == OK
        assert await heard() == ("from:room:slow:shout", b"1")
        proxy.delay_s = 4.0  # beyond the time limit: the client is told no, though Redis may have taken it
        assert await client.push(join_ref, "room:slow", "shout", 2) == UNAVAILABLE
        proxy.delay_s = 0.0
        async with asyncio.timeout(20):
            while await client.push(join_ref, "room:slow", "shout", 3) != OK:  # noqa: ASYNC110 - what was late still comes
                await asyncio.sleep(0.05)
        heard_now = [await heard()]
        while heard_now[-1][1] != b"3":
            heard_now.append(await heard())
        assert [payload for _, payload in heard_now] in ([b"2", b"3"], [b"3"]), "never twice"


# Refused.


@asynccontextmanager
async def full(server: Valkey) -> AsyncIterator[tuple[str, Callable[[bool], Awaitable[None]]]]:
    """A Redis that is full still takes PUBLISH, which stores nothing; what stands before one may refuse it."""
    refusal = b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"
    async with Proxy.open(server.port) as proxy:

        async def refuse(refuses: bool) -> None:
            proxy.rewrite = (lambda data: refusal if data == b":0\r\n" else data) if refuses else bytes

        yield f"redis://127.0.0.1:{proxy.port}", refuse


@asynccontextmanager
async def denied(server: Valkey) -> AsyncIterator[tuple[str, Callable[[bool], Awaitable[None]]]]:
    """A user whose permission to publish comes and goes."""
    await command(server.url, "ACL", "SETUSER", "pusher", "on", ">pw", "allchannels", "+@all")

    async def refuse(refuses: bool) -> None:
        await command(server.url, "ACL", "SETUSER", "pusher", "-publish" if refuses else "+publish")

    yield f"redis://pusher:pw@127.0.0.1:{server.port}", refuse


@pytest.mark.parametrize("redis_that_is", [full, denied])
async def test_push_that_redis_refuses_gets_an_error_and_the_link_stays(
    serve_relay: ServeRelay,
    connect: Connect,
    server: Valkey,
    redis_that_is: Callable[[Valkey], AbstractAsyncContextManager[tuple[str, Callable[[bool], Awaitable[None]]]]],
) -> None:
    """An error reply is this push's alone."""
    async with redis_that_is(server) as (url, refuse):
        served = await serve_relay(redis_url=url, redis=FAST)
        client = await connect(served)
        join_ref = await client.join("room:full")
        assert await client.push(join_ref, "room:full", "shout") == OK
        await refuse(True)
        assert await client.push(join_ref, "room:full", "shout") == UNAVAILABLE
        assert served.relay.metrics.refused == {"bus unavailable": 1}
        await command(server.url, "PUBLISH", "to:room:full:tick", "1")
        await client.expect_event("room:full", "tick", 1)
        assert (await ready(served))[0] == 200
        await refuse(False)
        assert await client.push(join_ref, "room:full", "shout") == OK
    assert served.relay.metrics.gaps == 0


async def test_full_redis_takes_pushes_and_hands_them_on(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    served = await serve_relay(redis_url=server.url, redis=FAST)
    client = await connect(served)
    join_ref = await client.join("room:full")
    await command(server.url, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    await command(server.url, "CONFIG", "SET", "maxmemory", "1mb")
    with pytest.raises(Exception, match="OOM|command not allowed"):
        await command(server.url, "SET", "key", "x" * 100)
    async with heard_on(server.url, "from:*") as heard:
        answer = await client.push(join_ref, "room:full", "shout", 1)
        assert answer == OK
        assert await heard() == ("from:room:full:shout", b"1")
    assert served.relay.metrics.gaps == 0


# Waiting.


async def test_messages_that_wait_for_redis_are_bounded(
    serve_relay: ServeRelay, connect: Connect, server: Valkey
) -> None:
    """Setting ``redis.publish_queue_max``; beyond it a push is refused at once."""
    served = await serve_relay(redis_url=server.url, redis={"publish_queue_max": 5})
    client = await connect(served)
    join_ref = await client.join("room:1")
    server.pause()
    await client.send(join_ref, "first", "room:1", "shout", {})
    await client.expect_alive()  # the first is on its way to Redis by now, or waits with the others
    for ref in range(20):
        await client.send(join_ref, ref, "room:1", "shout", {})
    refused = 0
    while refused < 14:
        message = await client.receive()
        assert message[4] == UNAVAILABLE
        refused += 1
    server.resume()
    answers = [(await client.receive())[4] for _ in range(21 - refused)]
    assert answers.count(OK) >= 5
    await client.expect_alive()


async def test_socket_that_is_closed_while_its_pushes_wait_ends_quietly(
    serve_relay: ServeRelay, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """It reads no further (``pushes_in_flight``), and its client does not answer the close: it is cut off."""
    limits = {"pushes_in_flight": 1, "idle_timeout_s": 0.4 * PATIENCE, "close_timeout_s": 0.2}
    served = await serve_relay(redis_url=server.url, limits=limits)
    async with RawSocket.connect(served.ws) as client:
        await client.send_frame(TEXT, b'["1","1","room:1","phx_join",{}]')
        await client.read_message()
        server.pause()
        for ref in b"23":
            await client.send_frame(TEXT, b'["1","%c","room:1","shout",{}]' % ref)
        assert (await client.read_close())[0] == 1001
        with pytest.raises((EOFError, ConnectionError)):
            await client.read_frame()
    await eventually(lambda: served.relay.metrics.sockets == 0, "the socket to end")
    server.resume()
    await until_ready(served)
    assert not [record.getMessage() for record in caplog.records if record.levelno > logging.WARNING]


async def test_client_that_goes_while_its_push_waits_leaves_nothing_behind(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve_relay(redis_url=server.url)
    client = await connect(served)
    join_ref = await client.join("room:1")
    async with heard_on(server.url, "from:*") as heard:
        server.pause()
        await client.send(join_ref, "1", "room:1", "shout", 1)
        await client.expect_alive()
        await client.connection.close()
        await eventually(lambda: served.relay.metrics.sockets == 0, "the socket to end")
        server.resume()
        assert await heard() == ("from:room:1:shout", b"1")
    assert not [record.getMessage() for record in caplog.records if record.levelno > logging.WARNING]
