"""Text that looks like JSON and is none: what each of the five doors answers."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from relay.plugins.hooks import to_payload
from tests.support.client import Client
from tests.support.serving import Served, http_get, metric

Connect = Callable[..., Awaitable[Client]]


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


async def test_from_redis_it_is_binary_and_counted_and_said(
    serve_relay: Callable[..., Awaitable[Served]], connect: Connect, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "relay")
    served = await serve_relay()
    client = await connect(served)
    await client.join("room:nan")
    for payload in (b'{"x":NaN}', b'\xef\xbb\xbf{"x":1}', b'{"x":1,}', b"not json", b'{"x":null}'):
        await redis.publish("to:room:nan:e", payload)
        if payload == b'{"x":null}':
            await client.expect_event("room:nan", "e", {"x": None})
        else:
            frame = await client.connection.recv()
            assert isinstance(frame, bytes)
            assert frame.endswith(payload)
    _, metrics = await http_get(f"{served.http}/metrics")
    assert metric(metrics, "relay_events_not_json_total") == 3
    said = [record.getMessage() for record in caplog.records if "looks like JSON" in record.getMessage()]
    assert said == [
        "event 'e' on topic 'room:nan' delivered as binary: its payload looks like JSON but is not valid: NaN and "
        "Infinity are no JSON"
    ]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [lambda n: n, lambda n: {"x": n}, lambda n: [None, {"y": [n]}], lambda n: (1, n)])
async def test_broadcast_refuses_it(
    serve_relay: Callable[..., Awaitable[Served]], number: float, place: Callable[[float], Any]
) -> None:
    """It became ``null``, which no caller had written."""
    served = await serve_relay()
    with pytest.raises(TypeError, match="NaN and infinite numbers are no JSON"):
        await served.relay.broadcast("room:nan", "e", place(number))
    assert bytes(to_payload({"x": None, "y": "null", "z": 1.5})) == b'{"x":null,"y":"null","z":1.5}'
