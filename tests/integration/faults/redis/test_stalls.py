"""Replies that come while the event loop is blocked: they are read before a time limit counts."""

import asyncio
import socket
import time

import pytest

from relay.brokers.redis_commands import RedisCommands
from relay.brokers.redis_connection import limited
from relay.config_sections import Direction
from relay.errors import BusUnavailable
from tests.integration.faults.redis.test_resets import both_loops, loop, runner
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.redis_link import broker_on, outcome

__all__ = ["loop", "runner"]

LIMIT_S = 0.4 * PATIENCE


pytestmark = both_loops


async def block(server: Valkey) -> None:
    """Let what was begun reach its socket, then stand still for longer than the limit; meanwhile it is answered.

    In a callback of a socket: those of others follow, with uvloop after all timers.
    """
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    ours, theirs = socket.socketpair()

    def stand_still() -> None:
        loop.remove_reader(ours)
        server.resume()
        time.sleep(1.5 * LIMIT_S)
        done.set_result(None)

    for _ in range(3):
        await asyncio.sleep(0)
    with ours, theirs:
        loop.add_reader(ours, stand_still)
        theirs.send(b"1")
        await done


async def test_published_events_have_not_failed(loop: str, server: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    async with broker_on(server.url, timeout_s=LIMIT_S, ping_timeout_s=5.0) as (broker, _, _):
        assert await outcome(broker.publish(Direction.TO, "room", "e", b"0")) == "ok"
        for round_ in range(5):
            server.pause()
            futures = [broker.publish(Direction.TO, "room", "e", b"%d" % n) for n in range(100)]
            await block(server)
            assert {await outcome(future) for future in futures} == {"ok"}, round_
        assert broker.link.live
    assert not [record for record in caplog.records if "no reply within" in record.getMessage()]


async def test_commands_have_not_failed(loop: str, server: Valkey) -> None:
    async with broker_on(server.url) as (broker, _, _):
        commands = RedisCommands(broker.connections, LIMIT_S, "test")
        try:
            assert await commands.ask("PING") == b"PONG"
            for _ in range(5):
                server.pause()
                asked = [asyncio.ensure_future(commands.ask("PING")) for _ in range(20)]
                await block(server)
                assert await asyncio.gather(*asked) == [b"PONG"] * 20
        finally:
            await commands.close()


async def test_server_that_does_not_answer_is_given_up_in_time(loop: str, server: Valkey) -> None:
    async with broker_on(server.url, timeout_s=LIMIT_S, ping_timeout_s=5.0) as (broker, _, _):
        commands = RedisCommands(broker.connections, LIMIT_S, "test")
        try:
            assert await commands.ask("PING") == b"PONG"
            server.pause()
            began = time.monotonic()
            with pytest.raises(BusUnavailable, match=f"no reply to PING within {LIMIT_S:g} s"):
                await commands.ask("PING")
            assert f"no reply within {LIMIT_S:g} s" in await outcome(broker.publish(Direction.TO, "room", "e", b"0"))
            assert time.monotonic() - began < 20
        finally:
            server.resume()
            await commands.close()


async def test_limit_ends_with_its_block(loop: str) -> None:
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    async with limited(0.01):
        pass
    await asyncio.sleep(0.05)
    assert faults == []
    with pytest.raises(TimeoutError):
        async with limited(0.01):
            await asyncio.sleep(20)
