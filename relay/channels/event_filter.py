"""Plugins' handlers of on_event, which change or drop events on their way to subscribers.

Owns their order and what they may return; must not know who is given what they leave of an event.
"""

from collections.abc import Awaitable
from inspect import isawaitable
from typing import Any, NamedTuple

from relay.channels.groups import Subscriber
from relay.plugins.dispatcher import HandlerError, HandlerRunner
from relay.plugins.hooks import Event, Hook, matching
from relay.protocol import topics


class Origin(NamedTuple):
    """Where an event comes from that waits for handlers."""

    topic: str
    position: str | None
    epoch: object
    """What `History.epoch` said when it came."""
    skip: Subscriber | None


class EventFilter:
    """Passes events through the handlers for them, one after the other."""

    def __init__(self, runner: HandlerRunner) -> None:
        self._runner = runner

    def filter(self, event: Event) -> Event | None | Awaitable[Event | None]:
        """What the handlers leave of an event; to be awaited where one of them is. Raises InvalidPayload."""
        found = tuple(matching(self._runner.hooks.event, event.topic, event.event))
        if any(hook.is_async for hook in found):
            return self._filter_later(found, event)
        left: Event | None = event
        for at, hook in enumerate(found):
            if left is None:
                break
            try:
                answer = self._runner.call_inline(hook, left)
                if not isinstance(answer, Event) and isawaitable(
                    answer
                ):  # of a plain function: its call alone shows it
                    return self._filter_later(found[at:], left, answer)
                left = self._checked(hook, answer)
            except HandlerError:
                left = None
        return left

    async def _filter_later(
        self, found: tuple[Hook, ...], event: Event, answer: Awaitable[Any] | None = None
    ) -> Event | None:
        """The same for handlers that are awaited; ``answer`` is what the first of them has returned already."""
        left: Event | None = event
        for hook in found:
            if left is None:
                break
            try:
                if hook.is_async:
                    left = self._checked(hook, await self._runner.call(hook, left))
                    continue
                given: Any = self._runner.call_inline(hook, left) if answer is None else answer
                answer = None
                given = await self._runner.wait(hook, given, left) if isawaitable(given) else given
                left = self._checked(hook, given)
            except HandlerError:
                left = None
        return left

    def _checked(self, hook: Hook, answer: object) -> Event | None:
        if answer is None:
            return None
        if not isinstance(answer, Event):
            error = TypeError(type(answer).__name__)
            raise self._runner.record_failure(hook, "returned neither an Event nor None", error)
        if not topics.is_event(answer.event):
            raise self._runner.record_failure(hook, "returned an event with an invalid name", ValueError(answer.event))
        return answer
