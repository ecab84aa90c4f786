"""What all tests of Redis faults share: a numbered stream under the fault, and what relay says of its link."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest
from redis.asyncio import Redis

from relay.metrics import Metrics
from tests.support.client import Client
from tests.support.patience import PATIENCE
from tests.support.serving import Served, heard_on, http_get, metric
from tests.support.witness import Ticker, Witness

Connect: TypeAlias = Callable[..., Awaitable[Client]]
ServeRelay: TypeAlias = Callable[..., Awaitable[Served]]

FAST = {"backoff_min_s": 0.02, "backoff_max_s": 0.1}
"""Settings of a link that is cut on purpose."""
BY_TOPIC = {"publish_form": "topic", "subscribe": "topic"}
"""Settings of a relay that subscribes to each topic by its own channel."""
OK = {"status": "ok", "response": {}}
UNAVAILABLE = {"status": "error", "response": {"reason": "bus unavailable"}}
TOLD = {"reason": "events may have been missed"}


async def command(url: str, *words: str) -> Any:
    """A command that redis-py has no typed method for."""
    async with Redis.from_url(url) as redis:
        execute: Any = redis.execute_command
        return await execute(*words)


async def ready(served: Served) -> tuple[int, dict[str, str]]:
    """Status and body of ``/ready``."""
    status, body = await http_get(f"{served.http}/ready")
    return status, json.loads(body)


async def until_ready(served: Served) -> None:
    """Wait for 200."""
    async with asyncio.timeout(20 * PATIENCE):
        while (answer := await ready(served))[0] != 200:  # noqa: ASYNC110 - what is waited for is the server's
            await asyncio.sleep(0.01)
    assert answer == (200, {"status": "ready"})


async def until_not_ready(served: Served) -> str:
    """Wait for 503; return the reason."""
    async with asyncio.timeout(20 * PATIENCE):
        while (answer := await ready(served))[0] != 503:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
    assert answer[1]["status"] == "not ready" and answer[1]["reason"]
    return answer[1]["reason"]


def gaps_logged(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.getMessage().startswith("gap: ") for record in caplog.records)


async def expect_told(client: Client, *joined: tuple[str, Any]) -> None:
    """The next things heard are a ``phx_error`` for each of these subscriptions, in any order."""
    told = [await client.receive() for _ in joined]
    for topic, join_ref in joined:
        assert client.message(join_ref, join_ref, topic, "phx_error", TOLD) in told
    assert len(told) == len(joined)


async def expect_working(served: Served, redis_url: str, client: Client) -> None:
    """After a rejoin events arrive once, and pushes come out."""
    join_ref = await client.join("room:after")
    for number in range(3):
        await command(redis_url, "PUBLISH", "to:room:after:tick", str(number))
    for number in range(3):
        await client.expect_event("room:after", "tick", number)
    async with heard_on(redis_url, "from:room:after:*") as heard:
        assert await client.push(join_ref, "room:after", "shout", "hi") == OK
        assert await heard() == ("from:room:after:shout", b'"hi"')
    await client.expect_alive()
    _, metrics = await http_get(f"{served.http}/metrics")
    assert metric(metrics, "relay_link_live") == 1


class Stream:
    """Numbered events that flow to a witness while something is broken, and a further client.

    At its end: each loss is one that the witness was told of, the relay has counted and logged a gap for it, heartbeats
    were answered throughout, and no socket was closed.
    """

    def __init__(self, served: Served, witness: Witness, ticker: Ticker, client: Client) -> None:
        self.served = served
        self.witness = witness
        self.ticker = ticker
        self.client = client
        self.others_told = 0
        """Subscriptions besides the witness's that were asked to rejoin."""
        self.lost = 0
        """Events that the witness did not get; known at the end."""

    @property
    def metrics(self) -> Metrics:
        return self.served.relay.metrics

    async def until_told(self, gaps: int) -> None:
        """Wait until the witness has joined again after so many gaps."""
        await self.witness.until(lambda: self.witness.joins > gaps)


StartStream: TypeAlias = Callable[..., Any]


@asynccontextmanager
async def stream_to(
    served: Served, connect: Connect, redis_url: str, caplog: pytest.LogCaptureFixture, **options: Any
) -> AsyncIterator[Stream]:
    """Run a `Stream`; ``options`` are of its further client."""
    watching, bystander, client = await connect(served), await connect(served), await connect(served, **options)
    form = served.relay.config.redis.publish_form
    async with Ticker.run(redis_url, "room:fault", form) as ticker, Witness.run(watching, "room:fault") as witness:
        stream = Stream(served, witness, ticker, client)
        await witness.progress()
        beats = asyncio.create_task(_beat(bystander))
        yield stream
        await witness.progress()
        beats.cancel()
        stream.lost = witness.check(ticker)
        assert not beats.done() or beats.cancelled()
        metrics = served.relay.metrics
        assert len(witness.told) == metrics.gaps == gaps_logged(caplog)
        assert metrics.rejoins_requested == metrics.gaps + stream.others_told
        assert metrics.sockets == metrics.sockets_opened == 3, "no socket was hurt"
        assert not metrics.dropped


async def _beat(bystander: Client) -> None:
    while True:
        async with asyncio.timeout(4 * PATIENCE):
            await bystander.expect_alive()
        await asyncio.sleep(0.05)
