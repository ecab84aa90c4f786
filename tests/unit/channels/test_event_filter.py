"""`relay.channels.event_filter`: what handlers of on_event leave of an event."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from relay.channels.event_filter import EventFilter
from relay.metrics import Metrics
from relay.plugins.dispatcher import HandlerRunner
from relay.plugins.hooks import Event, Hook, Hooks, InvalidPayload
from relay.telemetry import Telemetry

UNREADABLE = msgspec.Raw(b'{"n":' + b"9" * 5000 + b"}")


class Filter:
    """An event filter with handlers of topics ``t``, in order."""

    def __init__(self, *handlers: Callable[..., Any], event: str = "*") -> None:
        self.metrics = Metrics()
        hooks = Hooks(event=tuple(Hook("p", handler, "t", event) for handler in handlers))
        self._filter = EventFilter(HandlerRunner(0.02, Telemetry(self.metrics), hooks))

    def pass_on(self, payload: bytes = b"{}", topic: str = "t", event: str = "e") -> Event | None | Awaitable[Any]:
        return self._filter.filter(Event(topic, event, msgspec.Raw(payload)))

    async def left(self, payload: bytes = b"{}", topic: str = "t", event: str = "e") -> tuple[str, str] | None:
        """Name and payload of what is left."""
        left = self.pass_on(payload, topic, event)
        if left is not None and not isinstance(left, Event):
            left = await left
        return None if left is None else (left.event, bytes(left.data).decode())

    @property
    def faults(self) -> int:
        return self.metrics.plugin_errors["p"]


def rename(event: Event) -> Event:
    return event.replace(event=event.event + "!")


def drop(event: Event) -> None:
    return None


async def rename_later(event: Event) -> Event:
    await asyncio.sleep(0)
    return rename(event)


async def drop_later(event: Event) -> None:
    await asyncio.sleep(0)


def rename_by_an_awaitable(event: Event) -> Awaitable[Event]:
    """A plain function, whose call alone shows that there is something to be awaited."""
    return rename_later(event)


def drop_by_an_awaitable(event: Event) -> Awaitable[None]:
    return drop_later(event)


async def hang(event: Event) -> Event:
    await asyncio.Event().wait()
    return event


def crash(event: Event) -> Event:
    raise ValueError("boom")


async def crash_later(event: Event) -> Event:
    raise ValueError("boom")


def answer_nonsense(event: Event) -> Any:
    return {"event": "e"}


async def answer_nonsense_later(event: Event) -> Any:
    return 17


def answer_a_reserved_name(event: Event) -> Event:
    return Event(event.topic, "phx_reply", event.data)


def read(event: Event) -> Event:
    assert event.payload is not None
    return event


async def read_later(event: Event) -> Event:
    return read(event)


async def test_event_of_another_topic_or_name_is_passed_on_as_it_is() -> None:
    filter = Filter(drop, event="x*")
    event = Event("t", "e", msgspec.Raw(b"{}"))
    assert filter._filter.filter(event) is event
    assert isinstance(filter.pass_on(topic="u", event="x"), Event)
    assert await filter.left(event="x1") is None


@pytest.mark.parametrize("first", [rename, rename_later, rename_by_an_awaitable])
@pytest.mark.parametrize("second", [rename, rename_later, rename_by_an_awaitable])
async def test_handlers_are_called_one_after_the_other(first: Callable[..., Any], second: Callable[..., Any]) -> None:
    assert await Filter(first, second, rename).left(b"[1]") == ("e!!!", "[1]")


@pytest.mark.parametrize("handler", [drop, drop_later, drop_by_an_awaitable])
@pytest.mark.parametrize("first", [rename, rename_later, rename_by_an_awaitable])
async def test_handlers_behind_one_that_drops_an_event_are_not_called(
    handler: Callable[..., Any], first: Callable[..., Any]
) -> None:
    filter = Filter(first, handler, crash)
    assert await filter.left() is None
    assert filter.faults == 0


async def test_plain_handlers_are_called_at_once() -> None:
    left = Filter(rename, rename).pass_on()
    assert isinstance(left, Event) and left.event == "e!!"


@pytest.mark.parametrize(
    "handler", [crash, crash_later, hang, answer_nonsense, answer_nonsense_later, answer_a_reserved_name]
)
@pytest.mark.parametrize("first", [rename, rename_later])
async def test_event_of_a_handler_that_fails_is_dropped(handler: Callable[..., Any], first: Callable[..., Any]) -> None:
    """It may be the one that takes out what nobody may see."""
    filter = Filter(first, handler, rename)
    assert await filter.left() is None
    assert filter.faults == 1


@pytest.mark.parametrize("handlers", [(read,), (read_later,), (rename_later, read)])
async def test_event_that_cannot_be_read_is_the_fault_of_its_publisher(handlers: tuple[Any, ...]) -> None:
    filter = Filter(*handlers)
    with pytest.raises(InvalidPayload):
        await filter.left(bytes(UNREADABLE))
    assert filter.faults == 0
