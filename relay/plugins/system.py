"""Host metrics on topic ``system``, once a second, so that there is something to see.

Event ``stats``, to the sockets of this process alone (each worker tells its own)::

    {"cpu_percent": 12.5, "memory_percent": 41.0, "memory_bytes": 10305794048, "sockets": 3, "topics": 2,
     "events_per_s": 4.0, "uptime_s": 12}

``cpu_percent`` and ``memory_…`` are the host's, the rest is the relay's; an event counts once for each delivery.
"""

import asyncio
import time
from contextlib import suppress
from typing import Any

from relay.plugins import Plugin

plugin: Plugin = Plugin("system")

TOPIC = "system"
EVENT = "stats"
INTERVAL_S = 1.0

_GATHER_S = 0.1
"""Seconds from a new subscriber to what it is sent, so that those who come together are sent it together."""


@plugin.service
async def tell(relay: Any) -> None:
    """Send the metrics each second, and at once to a new subscriber; sleeps while the topic has none."""
    import psutil  # of the extra `metrics`

    metrics, hub = relay.metrics, relay.node.hub
    started = last_time = time.monotonic()
    last_deliveries = metrics.deliveries
    came = asyncio.Event()
    hub.watch(TOPIC, came.set)
    try:
        while True:
            if not hub.count(TOPIC):
                came.clear()
                await came.wait()
                psutil.cpu_percent()  # sets the mark that the next call measures from
                last_time, last_deliveries = time.monotonic(), metrics.deliveries
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL_S):
                    await came.wait()
            if came.is_set():
                await asyncio.sleep(_GATHER_S)
                came.clear()
            if not hub.count(TOPIC):
                continue
            now, deliveries = time.monotonic(), metrics.deliveries
            memory = psutil.virtual_memory()
            stats = {
                "cpu_percent": psutil.cpu_percent(),
                "memory_percent": memory.percent,
                "memory_bytes": memory.used,
                "sockets": metrics.sockets,
                "topics": len(hub),
                "events_per_s": round((deliveries - last_deliveries) / (now - last_time), 1),
                "uptime_s": round(now - started),
            }
            relay.local_broadcast(TOPIC, EVENT, stats)
            last_time, last_deliveries = now, deliveries
    finally:
        hub.watch(TOPIC, None)
