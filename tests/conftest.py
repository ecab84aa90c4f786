"""Fixtures for all tests, the runner of coroutine tests, and the rule on skips."""

import asyncio
import gc
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from itertools import chain
from typing import Any

import pytest
from hypothesis import settings
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from relay import Relay
from tests.support.client import Client
from tests.support.cluster import Cluster
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey, old_redis
from tests.support.serving import Served, serve

NO_SKIP = "TESTS_NO_SKIP"
_LONGEST = {
    "test_long_poll_js.py",
    "test_console.py",
    "test_docs.py",
    "test_frame_streams.py",
    "test_history_clients.py",
}
"""Files with the tests that take longest."""
_TIMEOUT_S = 240.0 * PATIENCE

# A slow machine is no failure; what hangs is cut by the test's own time limit. Few examples in the ordinary run; `make
# fuzz` takes more.
settings.register_profile("relay", deadline=None, max_examples=int(os.environ.get("TESTS_EXAMPLES", "25")))
settings.load_profile("relay")


# Variables that platforms and shells set, and that the relay, its server, its command line or its clients read.
_PLATFORM = re.compile(
    r"relay_.*|uvicorn_.*|web_concurrency|forwarded_allow_ips|(https?|wss?|socks|all|no)_proxy|"
    r"force_color|no_color|py_colors|tty_\w+|terminal_width|columns|lines",
    re.IGNORECASE,
)


def pytest_sessionstart() -> None:
    """Settings of the machine must not reach the relays under test."""
    for name in [name for name in os.environ if _PLATFORM.fullmatch(name)]:
        del os.environ[name]
    if os.environ.get("TESTS_SPEEDUPS") == "0":
        os.environ["RELAY_SPEEDUPS"] = "0"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test in the test's own loop; a task left over afterwards is a failure."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    runner = pyfuncitem.funcargs["runner"]
    assert isinstance(runner, asyncio.Runner)
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

    async def run() -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            await pyfuncitem.obj(**arguments)

    runner.run(run())
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two processes for each core: almost half of the tests' time is spent waiting."""
    return 2 * (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every coroutine test its runner, and put what takes longest first, so that nothing is waited for alone.

    Each process of pytest begins with one part of the list after the other: each part gets a share of the longest.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    longest = [item for item in items if item.path.name in _LONGEST]
    others = [item for item in items if item.path.name not in _LONGEST]
    bounds = [len(others) * number // processes for number in range(processes + 1)]
    parts = ([*longest[number::processes], *others[bounds[number] : bounds[number + 1]]] for number in range(processes))
    items[:] = chain.from_iterable(parts)
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.fixturenames.insert(0, "runner")


def pytest_collection_finish() -> None:
    """Let the cycle collector leave out what all tests share: each full run would stop a relay under test for 0.3 s."""
    gc.collect()
    gc.freeze()


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancel tasks. The runner would wait without a limit for those that resist, so it shall not see them."""
    for task in tasks:
        task.cancel()
    _, resisting = await asyncio.wait(tasks, timeout=5)
    for task in resisting:
        asyncio.tasks._unregister_task(task)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """The test's event loop; fixtures that need one use it too."""
    with asyncio.Runner() as runner:
        yield runner
        left = [task for task in asyncio.all_tasks(runner.get_loop()) if not task.done()]
        if left:
            runner.run(_end(left))
    assert not left, f"tasks left over: {left}"


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """A Valkey server for the whole run; tests on it keep apart by their topics."""
    with Valkey() as server:
        yield server


@pytest.fixture(scope="session")
def old_server() -> Iterator[Valkey]:
    """A Redis 6.2 for the whole run, or what comes next to it."""
    with old_redis() as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A Valkey Cluster of three masters, each with a replica, for the whole run; its tests leave it whole."""
    with Cluster(binary=os.environ.get("TESTS_CLUSTER_SERVER")) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def log_as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command in this process would configure the log of all tests that follow: `relay serve`, `relay plugins`."""
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    before = _levels()
    yield
    for name in _levels():
        logging.getLogger(name).setLevel(before.get(name, logging.NOTSET))


def _levels() -> dict[str, int]:
    """Of the loggers of relay."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "relay"]
    return {name: logging.getLogger(name).level for name in names}


@pytest.fixture(autouse=True)
def settings_in_redis(request: pytest.FixtureRequest) -> None:
    """Forget which topics the relays of earlier tests had histories for: programs that publish go by that."""
    if "valkey" in request.fixturenames:
        with SyncRedis(port=request.getfixturevalue("valkey").port) as client:
            client.delete("relay:settings")


@pytest.fixture(params=["direct", "asgi"])
def direct(request: pytest.FixtureRequest) -> bool:
    """Both ways to write a frame: our Uvicorn protocol class, and any ASGI server's ``send``."""
    return bool(request.param == "direct")


@pytest.fixture
def served(runner: asyncio.Runner, valkey: Valkey, direct: bool) -> Iterator[Served]:
    """A relay on a real Uvicorn in the test's own loop, on both paths."""
    stack = AsyncExitStack()
    relay = Relay(redis_url=valkey.url, system_topic=False)
    yield runner.run(stack.enter_async_context(serve(relay, direct=direct)))
    runner.run(stack.aclose())


@pytest.fixture
def serve_relay(runner: asyncio.Runner, valkey: Valkey, direct: bool) -> Iterator[Callable[..., Any]]:
    """``await serve_relay(limits={…})`` serves a relay with settings of its own, on both paths, until the test ends.

    Without another bus it is on the common Valkey. ``server`` holds further settings of the server.
    """
    stack = AsyncExitStack()

    async def serve_relay(*, server: dict[str, Any] | None = None, **settings: Any) -> Served:
        if "broadcast_url" not in settings:
            settings.setdefault("redis_url", valkey.url)
        relay = Relay(**{"system_topic": False, **settings})
        return await stack.enter_async_context(serve(relay, direct=direct, **(server or {})))

    yield serve_relay
    runner.run(stack.aclose())


@pytest.fixture
def redis(runner: asyncio.Runner, valkey: Valkey) -> Iterator[Redis]:
    """A backend's client of the common Valkey."""
    client = Redis.from_url(valkey.url)
    yield client
    runner.run(client.aclose())


@pytest.fixture
def connect(runner: asyncio.Runner) -> Iterator[Callable[..., Any]]:
    """``await connect(served)`` gives a client, which is closed after the test."""
    stack = AsyncExitStack()

    async def connect(served: Served, **options: Any) -> Client:
        return await stack.enter_async_context(Client.connect(served.ws, **options))

    yield connect
    runner.run(stack.aclose())


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    """A ``relay serve`` process with its own embedded Valkey."""
    with RelayProcess() as process:
        yield process


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where the machine is meant to have everything, a skipped test is a failure."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return  # a worker of pytest-xdist; the process that gathers the results judges
    if os.environ.get(NO_SKIP) and reporter.stats.get("skipped") and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say why the run failed, when it is for a skip."""
    if os.environ.get(NO_SKIP) and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line(f"{NO_SKIP} is set: a skipped test is a failure", red=True)
