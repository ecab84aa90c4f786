"""Who is asked to rejoin, because events of a topic may have been missed, and at which pace.

Owns the queue of those whose turn is still to come; must not know what was missed.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable

from relay.channels.groups import Subscriber
from relay.channels.hub import Hub
from relay.config import Config
from relay.config_sections import OnGap
from relay.errors import Reason
from relay.metrics import Metrics
from relay.protocol.state import Subscription

_PAUSE_S = 0.05


class Rejoins:
    """Ends subscriptions with ``phx_error``, at ``rejoins_per_s``, unless their topic ignores gaps.

    Those whose turn is still to come get no events meanwhile: one from behind the hole would be applied to a state with
    a hole.

    Args: spawn: runs a coroutine in the background.
    """

    def __init__(
        self,
        config: Config,
        hub: Hub,
        metrics: Metrics,
        spawn: Callable[[Coroutine[None, None, None]], asyncio.Task[None]],
    ) -> None:
        self._config = config
        self._hub = hub
        self._metrics = metrics
        self._spawn = spawn
        self._waiting: deque[tuple[Subscriber, Subscription]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._portion = max(1, round(config.rejoins_per_s / 20))
        """So many in 50 ms: all at once would be answered by all at once, as soon as Redis is back."""

    def request_all(self, pairs: Iterable[tuple[str, Subscriber]]) -> None:
        """Begin a new round, of these topics' subscribers; what remains of an earlier round is to be among them."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
        self._request(self._found(pairs), self._portion)

    def request(self, pairs: Iterable[tuple[str, Subscriber]]) -> None:
        """Ask further subscribers, behind those that wait already."""
        found = self._found((topic, each) for topic, each in pairs if not self._hub.is_held(topic, each))
        self._request(found, 0 if self._task is not None and not self._task.done() else self._portion)

    def _found(self, pairs: Iterable[tuple[str, Subscriber]]) -> list[tuple[Subscriber, Subscription]]:
        return [
            (subscriber, subscription)
            for topic, subscriber in pairs
            if self._config.topic(topic).on_gap is OnGap.REJOIN
            and (subscription := subscriber.subscription(topic)) is not None
        ]

    def _request(self, found: list[tuple[Subscriber, Subscription]], at_once: int) -> None:
        """Ask the first at once, and have the others wait."""
        for subscriber, subscription in found[at_once:]:
            self._hub.hold(subscription.topic, subscriber)
        self._waiting.extend(found[at_once:])
        self._ask(found[:at_once])
        if found and (self._task is None or self._task.done() or self._task.cancelling()):
            self._task = self._spawn(self._run())

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_PAUSE_S)
            if not self._waiting:
                return
            self._ask([self._waiting.popleft() for _ in range(min(self._portion, len(self._waiting)))])

    def _ask(self, portion: Iterable[tuple[Subscriber, Subscription]]) -> None:
        for subscriber, subscription in portion:
            if subscriber.end_subscription(subscription, Reason.EVENTS_MISSED):
                self._metrics.rejoins_requested += 1
