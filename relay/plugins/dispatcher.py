"""Calling handlers: in time, off the loop where they may block, and with their faults kept to themselves.

Owns the isolation of plugins; must not know what the hooks mean.
"""

import asyncio
import inspect
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from relay.concurrency import ends_task
from relay.log import SUBJECT
from relay.plugins.hooks import Hook, Hooks, InvalidPayload, Join, Leave, Push, Refused, SocketInfo
from relay.telemetry import Telemetry

T = TypeVar("T")

_THREADS = 32
"""Plain functions of one plugin that may run at a time; further ones wait for one to end."""

_IGNORED_S = 1.0
"""Seconds for which a handler may go on after it was cancelled, to clean up."""

_NO_HOOKS = Hooks()


class HandlerError(Exception):
    """A handler raised, or did not end in time. It has been logged and counted; ``str(error)`` is for no client."""


class HandlerRunner:
    """All plugins' handlers, and what calls them, with a time limit.

    Coroutine functions run in the event loop, plain functions in threads, where they may block.

    Args: timeout_s: seconds until a handler is given up. A thread cannot be ended; what it returns is ignored.
          telemetry: where calls and faults are counted, logged and traced.
          hooks: the handlers, in the order in which they are called.
          relay: what handlers are given that take ``relay``.
    """

    def __init__(self, timeout_s: float, telemetry: Telemetry, hooks: Hooks = _NO_HOOKS, relay: object = None) -> None:
        self.hooks: Hooks = hooks
        self.relay: object = relay
        self._metrics = telemetry.metrics
        self._timeout_s = timeout_s
        self._tracer = telemetry.tracer
        self._log = telemetry.loggers.get("relay.plugins")
        # Each plugin has its own: one whose handlers hang in all of them blocks no other.
        self._threads: defaultdict[str, _Threads] = defaultdict(_Threads)

    async def call_with_result(self, hook: Hook, argument: object, take: Callable[[Any], T]) -> T:
        """Call a handler that may refuse, and give what ``take`` makes of its answer.

        Args:   take: raises TypeError for an answer that will not do.
        Raises: Refused, which is an answer; InvalidPayload, the client's fault; HandlerError.
        """
        with _about(argument):
            answer = await self._call(hook, argument)
            try:
                return take(answer)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a model's own code may run, and raise anything
                raise self.record_failure(hook, "returned an invalid value", error) from None

    async def call(self, hook: Hook, *arguments: object) -> Any:
        """Call a handler that has nothing to refuse. Raises InvalidPayload, HandlerError."""
        with _about(*arguments[:1]):
            try:
                return await self._call(hook, *arguments)
            except Refused as error:
                raise self.record_failure(hook, "raised Refused, which only on_join and on_push may", error) from None

    async def call_or_leave(self, hook: Hook, *arguments: object) -> None:
        """The same, and leave a handler behind that ignores its cancellation. Raises InvalidPayload, HandlerError."""
        call = asyncio.create_task(self.call(hook, *arguments))
        try:
            _ = await asyncio.wait((call,), timeout=self._timeout_s + _IGNORED_S)
        finally:
            call.cancel()
        if not call.done():
            text = "plugin %s: %s ignores that it was cancelled; going on without it"
            self._log.warning(f"{hook.plugin}.{hook.name}", text, hook.plugin, hook.name)
            raise HandlerError("did not end in time, and ignores that it was cancelled")
        call.result()

    async def _call(self, hook: Hook, *arguments: object) -> Any:
        if self._tracer is None:
            return await self._run(hook, *arguments)
        with self._tracer.handler(hook.plugin, hook.name):
            return await self._run(hook, *arguments)

    async def wait(self, hook: Hook, answer: Awaitable[Any], *arguments: object) -> Any:
        """Wait for what a handler has returned to `call_inline`, to be awaited. Raises InvalidPayload, HandlerError."""
        with _about(*arguments[:1]):
            try:
                return await self._in_time(hook, answer, arguments)
            except Refused as error:
                raise self.record_failure(hook, "raised Refused, which only on_join and on_push may", error) from None

    async def _run(self, hook: Hook, *arguments: object) -> Any:
        self._metrics.plugin_calls[hook.plugin] += 1
        return await self._in_time(hook, self._answer(hook, arguments), arguments)

    async def _answer(self, hook: Hook, arguments: tuple[object, ...]) -> Any:
        if hook.is_async:
            return await hook.function(*arguments)
        # In the caller's context: what the function logs and traces there belongs to the same socket.
        call = partial(copy_context().run, hook.function, *arguments)
        value = await self._threads[hook.plugin].run(call)
        return await value if inspect.isawaitable(value) else value

    async def _in_time(self, hook: Hook, answer: Awaitable[Any], arguments: tuple[object, ...]) -> Any:
        began = time.perf_counter()
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                return await answer
        except Refused:
            raise
        except InvalidPayload as error:
            raise self._judged(error, hook, arguments) from None
        except TimeoutError as error:
            what = f"did not end within {self._timeout_s:g} s" if limit.expired() else "raised"
            raise self.record_failure(hook, what, error) from None
        except BaseException as error:  # sys.exit() in a handler would end the relay
            if ends_task(error):
                raise
            is_cancelled = isinstance(error, asyncio.CancelledError)
            what = "was cancelled, but not by the relay" if is_cancelled else "raised"
            raise self.record_failure(hook, what, error) from None
        finally:
            self._metrics.plugin_time[hook.plugin].observe(time.perf_counter() - began)

    def call_inline(self, hook: Hook, *arguments: object) -> Any:
        """Call a plain function in the event loop, for hooks on the way of every event.

        Raises: InvalidPayload, HandlerError.
        """
        self._metrics.plugin_calls[hook.plugin] += 1
        began = time.perf_counter()
        try:
            return hook.function(*arguments)
        except InvalidPayload as error:
            raise self._judged(error, hook, arguments) from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a CancelledError too: no task is cancelled while it runs a plain function
            raise self.record_failure(hook, "raised", error) from None
        finally:
            self._metrics.plugin_time[hook.plugin].observe(time.perf_counter() - began)

    def _judged(self, error: InvalidPayload, hook: Hook, arguments: tuple[object, ...]) -> Exception:
        """The same, where it is about what the handler was given, and so no fault of the plugin's."""
        return error if error.carrier in arguments else self.record_failure(hook, "raised", error)

    def record_failure(self, hook: Hook, what: str, error: BaseException) -> HandlerError:
        """Log and count a handler's fault."""
        self._metrics.plugin_errors[hook.plugin] += 1
        # The first of a kind with its traceback, the others as a number: a broken handler is called often.
        self._log.error(f"{hook.plugin}.{hook.name}", error, "plugin %s: %s %s", hook.plugin, hook.name, what)
        return HandlerError(what)

    def close(self) -> None:
        """End the threads that wait for work, and wait for none that hangs."""
        for threads in self._threads.values():
            threads.close()


@contextmanager
def _about(argument: object = None) -> Iterator[None]:
    """Let lines of the log that are written meanwhile be about the socket of a join, a push or a leave."""
    if not isinstance(argument, Join | Push | Leave):
        yield
        return
    token = SUBJECT.set(SocketInfo(argument.socket.id, argument.user, argument.socket.address))
    try:
        yield
    finally:
        SUBJECT.reset(token)


class _Threads:
    """Threads for the handlers of one plugin, up to `_THREADS` of them, each started when all others are busy.

    The standard library's pool waits for its threads when the process ends: with one that hangs, without a limit.
    """

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started = 0
        self._busy = 0

    async def run(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` in a thread; returns or raises what it does."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            self._busy -= 1
            if future.done():
                return  # given up
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(error)

        def work() -> None:
            value: Any = None
            error: BaseException | None = None
            try:
                if not future.done():  # else given up while it waited for its turn
                    value = function()
            except StopIteration:
                error = RuntimeError("StopIteration")  # no future takes it
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # the loop is closed: it had been given up, and the relay has ended
                loop.call_soon_threadsafe(settle, value, error)

        self._work.put(work)
        self._busy += 1
        if self._busy > self._started and self._started < _THREADS:
            self._started += 1
            threading.Thread(target=self._serve, name="relay-plugin", daemon=True).start()
        return await future

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def close(self) -> None:
        """Let each thread end once it has nothing to do."""
        for _ in range(self._started):
            self._work.put(None)
