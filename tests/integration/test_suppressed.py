"""Messages that the log suppresses are counted for each relay and each server, and the counts are written.

The rule itself is tested in ``tests/unit/test_logs.py``.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2 as httpx
import pytest

from relay import Plugin, Relay
from relay.server_http import RelayHTTPProtocol
from tests.support.client import Client
from tests.support.process import RelayProcess, free_port
from tests.support.serving import Served, eventually, serve

MALFORMED = (
    b"GET /socket/websocket HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: none\r\n\r\n"
)


@asynccontextmanager
async def served_relay(**settings: Any) -> AsyncIterator[Served]:
    relay = Relay(system_topic=False, broadcast_url="memory://", **settings)
    async with serve(relay, http=RelayHTTPProtocol) as served:
        yield served


async def ask(served: Served, path: str, **headers: str) -> int:
    async with httpx.AsyncClient(base_url=served.http, trust_env=False) as client:
        return (await client.get(path, headers=headers)).status_code


async def send_malformed(port: int) -> bytes:
    """Ask for an upgrade in a way that the server refuses by itself; returns the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(MALFORMED)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


def suppressed(caplog: pytest.LogCaptureFixture) -> dict[str, tuple[str, int]]:
    """Level and number of what was suppressed, by its kind."""
    return {
        record.kind: (record.levelname, record.suppressed)  # type: ignore[attr-defined]
        for record in caplog.records
        if record.message.endswith("suppressed (" + getattr(record, "kind", "") + ")") and record.kind != "stall"  # type: ignore[attr-defined]
    }


async def test_two_relays_of_one_process_do_not_suppress_each_other(caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncExitStack() as stack:
        for host in ("one.example", "two.example"):
            served = await stack.enter_async_context(served_relay())
            for _ in range(3):
                assert await ask(served, "/api/other", Host=host) == 403
        for host in ("one.example", "two.example"):
            assert len([message for message in caplog.messages if f'allowed_hosts = ["{host}"]' in message]) == 1


async def fails(push: object) -> None:
    raise ValueError("broken")


async def test_relay_that_stops_writes_what_was_suppressed_last(caplog: pytest.LogCaptureFixture) -> None:
    """Of every part of it: what operators, proxied services, the bus and plugins are warned of."""
    plugin = Plugin("broken")
    plugin.on_push("room:*", "fails")(fails)
    proxy = [{"prefix": "/service", "target": f"http://127.0.0.1:{free_port()}"}]
    settings: dict[str, Any] = {"rest": {"api_key": "right"}, "proxy": proxy, "extra_plugins": (plugin,)}
    async with served_relay(**settings) as served:
        for _ in range(4):
            assert await ask(served, "/api/topics", Authorization="Bearer wrong") == 401
            assert await ask(served, "/service", Authorization="Bearer right") == 502
        async with Client.connect(served.ws) as client:
            join_ref = await client.join("room:1")
            for _ in range(4):
                assert (await client.push(join_ref, "room:1", "fails", {}))["status"] == "error"
                await served.relay.broadcast("room:1", "bytes", b'{"no": json}')
                await client.receive_raw()
        assert suppressed(caplog) == {}
    assert suppressed(caplog) == {
        "rest": ("WARNING", 3),
        "/service": ("WARNING", 3),
        "broken.fails": ("ERROR", 3),
        "no JSON": ("WARNING", 3),
    }


async def test_running_relay_writes_what_was_suppressed_after_the_interval(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    async with served_relay(rest={"api_key": "right"}) as served:
        monkeypatch.setattr(served.relay.components.api_key_auth._log, "_clock", lambda: now)
        for _ in range(3):
            assert await ask(served, "/api/topics", Authorization="Bearer wrong") == 401
        now = 10.0
        await eventually(lambda: suppressed(caplog) == {"rest": ("WARNING", 2)}, "the number")


async def test_plain_uvicorn_that_stops_writes_what_was_suppressed_last(caplog: pytest.LogCaptureFixture) -> None:
    async with served_relay() as served:
        _, idle = await asyncio.open_connection("127.0.0.1", served.port)
        for _ in range(13):
            assert b"400 Bad Request" in await send_malformed(served.port)
        assert suppressed(caplog) == {}
    idle.close()
    assert suppressed(caplog) == {"malformed": ("WARNING", 12)}


async def test_relay_serve_that_stops_writes_what_was_suppressed_last() -> None:
    with RelayProcess() as process:
        port = int(process.http.rpartition(":")[2])
        for _ in range(13):
            assert b"400 Bad Request" in await send_malformed(port)
        assert "similar messages" not in process.output
        assert process.stop() == 0
        line = "WARNING relay.server: 12 similar messages suppressed (malformed)\n"
        assert line in process.output


async def test_each_server_counts_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "relay.server")
    for _ in range(2):
        async with served_relay() as served:
            assert b"400 Bad Request" in await send_malformed(served.port)
    assert len([message for message in caplog.messages if "Sec-WebSocket-Key" in message]) == 2
