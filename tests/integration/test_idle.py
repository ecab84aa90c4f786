"""What a relay does when nothing happens: next to nothing."""

import asyncio
import sys
from pathlib import Path

import pytest

from tests.support.client import Client
from tests.support.process import RelayProcess

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc counts the wake-ups, on Linux")

SECONDS = 2.0
WAKE_UPS_PER_S = 8
"""Twice what it needs, on a slow machine too; 10 more each second were looks whether the server is to end."""


def wake_ups(relay: RelayProcess) -> int:
    """How often the main thread has waited for something so far."""
    assert relay.process is not None
    status = Path(f"/proc/{relay.process.pid}/task/{relay.process.pid}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:", 1)[1].split(maxsplit=1)[0])


async def test_idle_relay_hardly_wakes(relay: RelayProcess) -> None:
    """Without a client, and with one that says nothing."""
    await asyncio.sleep(1)  # the last of its start
    before = wake_ups(relay)
    await asyncio.sleep(SECONDS)  # what is measured
    assert wake_ups(relay) - before <= WAKE_UPS_PER_S * SECONDS
    async with Client.connect(relay.ws) as client:
        await client.join("room:1")
        before = wake_ups(relay)
        await asyncio.sleep(SECONDS)
        assert wake_ups(relay) - before <= WAKE_UPS_PER_S * SECONDS


async def test_metrics_of_the_host_come_with_each_subscriber_and_stop_with_the_last(relay: RelayProcess) -> None:
    """The topic `system` costs no wake-up while it has no subscriber."""
    for _ in range(2):
        async with Client.connect(relay.ws) as first, Client.connect(relay.ws) as second:
            for client in (first, second):
                await client.join("system")
                _, _, topic, event, stats = await client.receive()
                assert (topic, event) == ("system", "stats") and stats["sockets"] >= 1
                assert stats["events_per_s"] < 100 and stats["cpu_percent"] >= 0
    await asyncio.sleep(1)  # the last look at the topic
    before = wake_ups(relay)
    await asyncio.sleep(SECONDS)
    assert wake_ups(relay) - before <= WAKE_UPS_PER_S * SECONDS
