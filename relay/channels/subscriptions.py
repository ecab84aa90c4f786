"""Which topics the broker is asked for, where it carries only those.

Owns the topics that are heard, from the first join here that needs one to the leave of its last subscriber; must not
know events.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from relay.brokers.base import Broker
from relay.channels.hub import Hub
from relay.errors import BusUnavailable


class TopicSubscriptions:
    """The topics of one node at its broker.

    Args: hub: whose subscribers need them.
          spawn: runs a coroutine in the background.
    """

    def __init__(self, broker: Broker, hub: Hub, spawn: Callable[[Coroutine[None, None, None]], object]) -> None:
        self._broker = broker
        self._hub = hub
        self._spawn = spawn
        # Topics the broker was asked for, and whether it has answered; how many joins of each are under way; and the
        # lock under which each is asked for or given back.
        self._heard: dict[str, bool] = {}
        self._joining: Counter[str] = Counter()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def is_heard(self, topic: str) -> bool:
        """Whether events of ``topic`` are heard now, so that a subscriber may be added to the hub at once."""
        return self._heard.get(topic, False) and self._broker.hears(topic)

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[None]:
        """Hear events of ``topic`` in the block, in which a subscriber is added to the hub; else it is given back.

        Raises: BusUnavailable, at its beginning.
        """
        self._joining[topic] += 1
        try:
            async with self._lock(topic):
                was_heard = self._heard.get(topic, False)
                if not was_heard or not self._broker.hears(topic):
                    self._heard[topic] = was_heard
                    try:
                        await self._broker.subscribe(topic)
                    except BusUnavailable:
                        if not was_heard:
                            del self._heard[topic]
                        raise
                    self._heard[topic] = True
            yield
        finally:
            self._joining[topic] -= 1
            if not self._joining[topic]:
                del self._joining[topic]
            if topic not in self._hub:
                self.unsubscribe(topic)

    def unsubscribe(self, topic: str) -> None:
        """Stop to hear ``topic`` unless it is subscribed to again: it has no local subscriber any more."""
        if topic in self._heard:
            self._spawn(self._stop_hearing(topic))

    async def _stop_hearing(self, topic: str) -> None:
        async with self._lock(topic):
            # A socket may have joined while this waited for the lock, or be about to.
            if topic in self._heard and topic not in self._hub and topic not in self._joining:
                del self._heard[topic]
                await self._broker.unsubscribe(topic)

    def _lock(self, topic: str) -> asyncio.Lock:
        return self._locks.setdefault(topic, asyncio.Lock())
