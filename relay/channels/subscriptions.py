"""Which topics the broker is asked for, where it carries only those.

Owns the topics that are heard, from the first join here that needs one to the leave of its last subscriber; must not
know events.
"""

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType

from relay.brokers.base import Broker
from relay.channels.hub import Hub
from relay.errors import BusUnavailable


class _Topic:
    """One topic that the broker was asked for, or is about to be."""

    __slots__ = ("is_asked", "is_heard", "joining", "lock", "stopping")

    def __init__(self) -> None:
        self.is_asked = False
        """Whether the broker was asked for it, and it was not given back."""
        self.is_heard = False
        """Whether the broker has answered."""
        # Joins under way, and attempts to give it back: as long as there are some, they share this lock.
        self.joining = 0
        self.stopping = 0
        self.lock = asyncio.Lock()


class TopicSubscriptions:
    """The topics of one node at its broker.

    Args: hub: whose subscribers need them.
          spawn: runs a coroutine in the background.
    """

    def __init__(self, broker: Broker, hub: Hub, spawn: Callable[[Coroutine[None, None, None]], object]) -> None:
        self._broker = broker
        self._hub = hub
        self._spawn = spawn
        self._topics: dict[str, _Topic] = {}

    def is_heard(self, topic: str) -> bool:
        """Whether events of ``topic`` are heard now, so that a subscriber may be added to the hub at once."""
        known = self._topics.get(topic)
        return known is not None and known.is_heard and self._broker.hears(topic)

    def subscribe(self, topic: str) -> "_Subscribing":
        """Hear events of ``topic`` in the block, in which a subscriber is added to the hub; else it is given back.

        Raises: BusUnavailable, at its beginning.
        """
        return _Subscribing(self, topic)

    async def begin(self, topic: str) -> None:
        """Hear events of ``topic``; `end` must follow unless it raises. Raises BusUnavailable."""
        known = self._topics.get(topic)
        if known is None:
            known = self._topics[topic] = _Topic()
        known.joining += 1
        try:
            async with known.lock:
                if not known.is_heard or not self._broker.hears(topic):
                    known.is_asked = True
                    try:
                        await self._broker.subscribe(topic)
                    except BusUnavailable:
                        known.is_asked = known.is_heard
                        raise
                    known.is_heard = True
        except BaseException:
            self.end(topic)
            raise

    def end(self, topic: str) -> None:
        """A join has ended: the topic is given back unless it has a subscriber now."""
        known = self._topics[topic]
        known.joining -= 1
        if topic not in self._hub:
            self.unsubscribe(topic)
        self._forget_unused(topic, known)

    def unsubscribe(self, topic: str) -> None:
        """Stop to hear ``topic`` unless it is subscribed to again: it has no local subscriber any more."""
        known = self._topics.get(topic)
        if known is not None and known.is_asked:
            known.stopping += 1
            self._spawn(self._stop_hearing(topic, known))

    async def _stop_hearing(self, topic: str, known: _Topic) -> None:
        try:
            async with known.lock:
                # A socket may have joined while this waited for the lock, or be about to.
                if known.is_asked and topic not in self._hub and not known.joining:
                    known.is_asked = known.is_heard = False
                    await self._broker.unsubscribe(topic)
        finally:
            known.stopping -= 1
            self._forget_unused(topic, known)

    def _forget_unused(self, topic: str, known: _Topic) -> None:
        if not known.is_asked and not known.joining and not known.stopping:
            del self._topics[topic]


class _Subscribing:
    """One join's `TopicSubscriptions.subscribe`: there is one for each join, and a generator takes longer."""

    __slots__ = ("_subscriptions", "_topic")

    def __init__(self, subscriptions: TopicSubscriptions, topic: str) -> None:
        self._subscriptions = subscriptions
        self._topic = topic

    async def __aenter__(self) -> None:
        await self._subscriptions.begin(self._topic)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._subscriptions.end(self._topic)
