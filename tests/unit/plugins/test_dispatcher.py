"""Handlers are called in time, off the loop where they may block, and keep their faults to themselves."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from relay.metrics import Metrics
from relay.plugins import dispatcher
from relay.plugins.dispatcher import HandlerError, HandlerRunner
from relay.plugins.hooks import Hook, Refused, to_response
from relay.telemetry import Telemetry
from tests.support.panic import Panic
from tests.support.patience import PATIENCE
from tests.support.serving import eventually


@asynccontextmanager
async def calls(timeout_s: float = 20.0) -> AsyncIterator[tuple[HandlerRunner, Metrics]]:
    metrics = Metrics()
    runner = HandlerRunner(timeout_s, Telemetry(metrics))
    yield runner, metrics
    runner.close()


def as_is(answer: Any) -> Any:
    return answer


def hook(function: Callable[..., Any], plugin: str = "p") -> Hook:
    return Hook(plugin, function)


def plain(argument: str) -> str:
    return f"{argument} in {threading.current_thread().name}"


async def coroutine(argument: str) -> str:
    return plain(argument)


def wrapped(argument: str) -> Awaitable[str]:
    """What a decorator makes of a coroutine function that it does not know for one."""
    return coroutine(argument)


async def test_coroutine_function_runs_in_the_loop_and_plain_function_in_a_thread() -> None:
    async with calls() as (runner, metrics):
        assert await runner.call(hook(coroutine), "hi") == "hi in MainThread"
        assert await runner.call(hook(plain), "hi") == "hi in relay-plugin"
        assert await runner.call(hook(wrapped), "hi") == "hi in MainThread"
        assert await runner.call_with_result(hook(plain), "hi", str.upper) == "HI IN RELAY-PLUGIN"
        assert metrics.plugin_calls == {"p": 4}
        assert metrics.plugin_errors == {}


async def test_time_of_handlers_is_counted_however_they_end() -> None:
    limit_s = 0.3 * PATIENCE
    async with calls(timeout_s=limit_s) as (runner, metrics):
        assert await runner.call(hook(coroutine), "hi")
        runner.call_inline(hook(plain), "hi")
        with pytest.raises(HandlerError):
            await runner.call(hook(raises(ValueError("no"))), "hi")
        assert metrics.plugin_time["p"].sum_s < limit_s
        with pytest.raises(HandlerError):
            await runner.call(hook(asyncio.Event().wait, "slow"))
        assert metrics.plugin_time["p"].count == 3
        assert metrics.plugin_time["slow"].count == 1
        assert metrics.plugin_time["slow"].sum_s >= limit_s


def raises(error: BaseException) -> Callable[[object], None]:
    def handler(argument: object) -> None:
        raise error

    return handler


def raises_later(error: BaseException) -> Callable[[object], Awaitable[None]]:
    async def handler(argument: object) -> None:
        raise error

    return handler


@pytest.mark.parametrize("make", [raises, raises_later], ids=["plain", "coroutine"])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("boom"),
        SystemExit(3),
        TimeoutError("of its own"),
        StopIteration(),
        asyncio.CancelledError(),
        Panic("boom"),
        BaseExceptionGroup("of a task group", [Panic("boom")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_fault_of_a_handler_is_logged_once_and_counted(
    make: Callable[[BaseException], Callable[..., Any]], error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those that end a program, or a task."""
    async with calls() as (runner, metrics):
        broken = hook(make(error))
        for _ in range(3):
            with pytest.raises(HandlerError) as failed:
                await runner.call(broken, None)
            assert "did not end" not in str(failed.value)
        assert metrics.plugin_errors == {"p": 3}
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.name == "relay.plugins"
    assert record.getMessage().startswith("plugin p: raises")
    assert record.exc_info is not None


async def test_refusal_is_an_answer_only_where_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    async with calls() as (runner, metrics):
        for refuses in (hook(raises(Refused("no"))), hook(raises_later(Refused("no")))):
            with pytest.raises(Refused, match="no"):
                await runner.call_with_result(refuses, None, as_is)
        assert metrics.plugin_errors == {}
        with pytest.raises(HandlerError):
            await runner.call(hook(raises(Refused("no"))), None)
        assert metrics.plugin_errors == {"p": 1}
    assert "only on_join and on_push may" in caplog.text


async def test_answer_that_cannot_be_sent_is_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    async with calls() as (runner, metrics):
        with pytest.raises(HandlerError):
            await runner.call_with_result(hook(lambda argument: object()), None, to_response)
        for error in (ConnectionError("gone"), Panic("boom"), asyncio.CancelledError()):
            with pytest.raises(HandlerError):
                await runner.call_with_result(hook(plain), "hi", raises(error))
        assert metrics.plugin_errors == {"p": 4}
    assert "returned an invalid value" in caplog.text


async def test_hook_on_the_way_of_every_event_is_called_in_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    async with calls() as (runner, metrics):
        assert runner.call_inline(hook(plain), "hi") == "hi in MainThread"
        for error in (ValueError("boom"), SystemExit(), asyncio.CancelledError(), Panic("boom")):
            with pytest.raises(HandlerError):
                runner.call_inline(hook(raises(error)), None)
        assert metrics.plugin_calls == {"p": 5}
        assert metrics.plugin_errors == {"p": 4}


async def test_handlers_that_hang_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    async def hangs(argument: object) -> None:
        await asyncio.Event().wait()

    def hangs_in_thread(argument: object) -> None:
        released.wait()

    async with calls(timeout_s=0.05) as (runner, metrics):
        for function in (hangs, hangs_in_thread):
            with pytest.raises(HandlerError, match=r"did not end within 0\.05 s"):
                await runner.call(hook(function), None)
        assert metrics.plugin_errors == {"p": 2}
        assert caplog.text.count("did not end within 0.05 s") == 2
        released.set()  # what it returns now is ignored
        answer = None
        while answer is None:  # a busy machine may need more than one call's time
            with suppress(HandlerError):
                answer = await runner.call(hook(plain), "hi")
        assert answer == "hi in relay-plugin"


async def test_cancellation_from_outside_goes_on_its_way() -> None:
    async with calls() as (runner, metrics):

        async def hangs(argument: object) -> None:
            await asyncio.Event().wait()

        task = asyncio.create_task(runner.call(hook(hangs), None))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert metrics.plugin_errors == {}


async def test_threads_of_one_plugin_are_no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_THREADS", 2)
    released = threading.Event()

    def blocks(argument: object) -> None:
        released.wait()

    async with calls(timeout_s=20) as (runner, metrics):
        blocked = [asyncio.create_task(runner.call(hook(blocks, "bad"), None)) for _ in range(3)]
        await eventually(lambda: metrics.plugin_calls["bad"] == 3, "the calls")
        assert await runner.call(hook(plain, "good"), "hi") == "hi in relay-plugin"
        blocked[2].cancel()  # it waits for a thread, and will not be called any more
        released.set()
        await asyncio.gather(*blocked, return_exceptions=True)
        assert await runner.call(hook(plain, "bad"), "hi") == "hi in relay-plugin"


async def test_handler_given_up_before_its_turn_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_THREADS", 1)
    released = threading.Event()
    called: list[str] = []

    def blocks(argument: object) -> None:
        released.wait()

    async with calls(timeout_s=0.05) as (runner, _):
        first = asyncio.create_task(runner.call(hook(blocks), None))
        second = asyncio.create_task(runner.call(hook(called.append), "late"))
        for task in (first, second):
            with pytest.raises(HandlerError):
                await task
        released.set()
        while "next" not in called:  # a busy machine may need more than one call's time
            with suppress(HandlerError):
                await runner.call(hook(called.append), "next")
    assert set(called) == {"next"}


async def test_threads_are_reused_and_end_with_the_caller() -> None:
    before = set(threading.enumerate())
    async with calls() as (runner, _):
        for _ in range(5):
            await runner.call(hook(plain), "hi")
        [thread] = set(threading.enumerate()) - before
        assert thread.name == "relay-plugin"
    await eventually(lambda: not thread.is_alive(), "the thread to end")
