"""Calls into the relay's event loop, from any thread and any event loop.

Owns the way there and back; must not know what is called.
"""

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, TypeVar

from relay.errors import BusUnavailable, RelayError

T = TypeVar("T")

LOOP_HAS_ENDED = (
    "the relay was started in an event loop that has ended: start it in the one that is used, by "
    "`async with relay.lifespan():`; in tests with Starlette's TestClient by `with TestClient(app) as client:`"
)

FORKED = (
    "this process was forked from the one in which the relay runs: nothing that is called here reaches it; publish "
    "with relay.Publisher"
)

ONE_LOOP = (
    "In tests with Starlette's TestClient write `with TestClient(app) as client:`, once, and open all sockets by that "
    "client: without `with`, each request and each socket has an event loop of its own"
)


class Call(Coroutine[Any, Any, None]):
    """Something that has been started already; may be awaited, in any event loop, and need not be.

    It is a coroutine for those who insist on one: ``asyncio.run(call)``, ``create_task(call)``.
    """

    __slots__ = ("_future", "_steps")

    def __init__(self, future: "asyncio.Future[None] | concurrent.futures.Future[None]") -> None:
        self._future = future
        self._steps: Generator[Any, Any, None] | None = None

    def __await__(self) -> Generator[Any, Any, None]:
        future = self._future
        if isinstance(future, concurrent.futures.Future):
            future = asyncio.wrap_future(future)
        elif (loop := future.get_loop()) is not asyncio.get_running_loop():
            future = asyncio.wrap_future(_bridge(loop, partial(_given, future)))
        return (yield from future)

    def send(self, value: Any) -> Any:
        """Go on, as coroutines do."""
        self._steps = self.__await__() if self._steps is None else self._steps
        return self._steps.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise an exception where it waits, as coroutines do."""
        self._steps = self.__await__() if self._steps is None else self._steps
        return self._steps.throw(*error)

    def close(self) -> None:
        """Wait no longer; what was started goes on."""
        if self._steps is not None:
            self._steps.close()


class Home:
    """The event loop that runs when this is made, as what others call into."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether the caller is in this very loop."""
        return threading.get_ident() == self._thread and _running_loop() is self.loop

    @property
    def is_forked(self) -> bool:
        """Whether the caller is in another process, which has a copy of this loop that does not run."""
        return os.getpid() != self._process

    @property
    def is_over(self) -> bool:
        """Whether nothing will run in this loop any more, as seen from this process."""
        return self.loop.is_closed() or self.is_forked

    @property
    def fault(self) -> str:
        """Why this loop cannot be called; empty where it can."""
        if self.is_forked:
            return FORKED
        return "" if self.loop.is_running() else LOOP_HAS_ENDED

    def call(self, begin: Callable[[], "asyncio.Future[None]"], timeout_s: float) -> Call:
        """Call ``begin`` in this loop, at once.

        In this loop, and in another one, it returns what may be awaited. In a thread without a loop it waits until the
        future that ``begin`` returns is done, and raises what that raises.

        Raises: RelayError: this loop has ended, or runs in another process; BusUnavailable: not done within
                ``timeout_s`` seconds.
        """
        if self.is_here:
            return Call(begin())
        if fault := self.fault:
            raise RelayError(fault)
        future = _bridge(self.loop, begin)
        if _running_loop() is None:
            try:
                future.result(timeout_s)
            except concurrent.futures.TimeoutError:
                raise BusUnavailable(f"no answer within {timeout_s:g} s") from None
        return Call(future)

    def ask(self, function: Callable[[], T], timeout_s: float) -> T:
        """Call a plain function in this loop, and return what it returns. Raises RelayError where it has ended.

        Between two runs of the loop, its own thread may call: nothing else changes then what the function reads.
        """
        is_between_runs = not self.loop.is_running() and not self.is_over
        if self.is_here or (is_between_runs and threading.get_ident() == self._thread):
            return function()
        if fault := self.fault:
            raise RelayError(fault)
        answers: list[T] = []

        def begin() -> "asyncio.Future[None]":
            answers.append(function())
            return _given(None)

        try:
            _bridge(self.loop, begin).result(timeout_s)
        except concurrent.futures.TimeoutError:
            raise RelayError(f"the relay's event loop did not answer within {timeout_s:g} s") from None
        return answers[0]

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine in this loop, and return what it returns. Raises RelayError where the loop has ended."""
        if self.is_here:
            return await work()
        if fault := self.fault:
            raise RelayError(fault)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), self.loop))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _given(future: "asyncio.Future[None] | None") -> "asyncio.Future[None]":
    """``future``, or one that is done."""
    if future is None:
        future = asyncio.get_running_loop().create_future()
        future.set_result(None)
    return future


def _bridge(
    loop: asyncio.AbstractEventLoop, begin: Callable[[], "asyncio.Future[None]"]
) -> "concurrent.futures.Future[None]":
    """Call ``begin`` at the next turn of ``loop``; the future returned is done when the one that it returns is."""
    outer: concurrent.futures.Future[None] = concurrent.futures.Future()

    def start() -> None:
        try:
            inner = begin()
        except BaseException as error:
            _settle(outer, error)
        else:
            inner.add_done_callback(finish)

    def finish(inner: "asyncio.Future[None]") -> None:
        _settle(outer, BusUnavailable("the relay is stopping") if inner.cancelled() else inner.exception())

    try:
        loop.call_soon_threadsafe(start)
    except RuntimeError:  # closed just now
        raise RelayError(LOOP_HAS_ENDED) from None
    return outer


def _settle(outer: "concurrent.futures.Future[None]", error: BaseException | None) -> None:
    if not outer.set_running_or_notify_cancel():
        return  # its caller waits no longer
    if error is None:
        outer.set_result(None)
    else:
        outer.set_exception(error)
