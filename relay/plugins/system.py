"""Host metrics on topic ``system``, once a second, so that there is something to see.

Event ``stats``, to the sockets of this process alone (each worker tells its own)::

    {"cpu_percent": 12.5, "memory_percent": 41.0, "memory_bytes": 10305794048, "sockets": 3, "topics": 2,
     "events_per_s": 4.0, "uptime_s": 12}

``cpu_percent`` and ``memory_…`` are the host's, the rest is the relay's; an event counts once for each delivery.
"""

import asyncio
import time
from typing import Any

from relay.plugins import Plugin

plugin: Plugin = Plugin("system")

TOPIC = "system"
EVENT = "stats"
INTERVAL_S = 1.0

_LOOK_S = 0.1
"""A new subscriber gets the metrics at once, not at the next full second: how often to look for one."""


@plugin.service
async def tell(relay: Any) -> None:
    """Send the metrics each second; measures nothing while the topic has no subscriber."""
    import psutil  # of the extra `metrics`

    metrics, hub = relay.metrics, relay.node.hub
    started = last_time = time.monotonic()
    last_deliveries = metrics.deliveries
    last_subscribers = 0
    psutil.cpu_percent()  # the first call only sets the mark that the next one measures from
    while True:
        await asyncio.sleep(_LOOK_S)
        now, deliveries, subscribers = time.monotonic(), metrics.deliveries, hub.count(TOPIC)
        if subscribers <= last_subscribers and now - last_time < INTERVAL_S:
            continue
        if subscribers:
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
        last_subscribers, last_time, last_deliveries = subscribers, now, deliveries
