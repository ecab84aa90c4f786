"""What several processes have in common, and must not: ids, buses, and their end."""

import asyncio
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen

import psutil
import pytest

from relay import threadsafe
from tests.support.client import Client
from tests.support.process import has_ended, wait_for
from tests.support.servers import AppServer

APP = """
from starlette.applications import Starlette
from relay import Relay
relay = Relay({settings}, system_topic=False)
app = Starlette()
relay.install(app)
"""
WARNING = "several processes serve this app (this one and "


@pytest.mark.parametrize(
    ("server", "settings", "arguments"),
    [
        ("uvicorn", 'broadcast_url="memory://"', ("--workers", "2")),
        ("uvicorn", 'redis_url="embedded"', ("--workers", "2")),
        ("hypercorn", 'broadcast_url="memory://"', ("--workers", "2")),
        ("granian", 'broadcast_url="memory://"', ("--workers", "2")),
        ("relay", 'broadcast_url="memory://"', ("--workers", "2")),
    ],
)
def test_workers_of_one_app_with_a_bus_each_are_warned_of(
    server: str, settings: str, arguments: tuple[str, ...]
) -> None:
    """A broadcast would reach a part of the sockets, in silence."""
    with AppServer(server, APP.format(settings=settings), *arguments) as app:
        wait_for(lambda: WARNING in app.output, "the warning")
        assert settings.replace("=", " = ") in app.output
        assert 'set redis_url = "redis://…", or serve with one worker' in app.output


@pytest.mark.parametrize(
    ("server", "settings", "arguments"),
    [
        ("uvicorn", 'broadcast_url="memory://"', ()),
        ("hypercorn", 'broadcast_url="memory://"', ("--workers", "1")),
        ("uvicorn", 'redis_url="redis://127.0.0.1:1"', ("--workers", "2")),
    ],
)
async def test_single_process_or_common_bus_is_not_warned_of(
    server: str, settings: str, arguments: tuple[str, ...]
) -> None:
    """Two relays of one user, each alone, have the same parent and the same directory."""
    with AppServer(server, APP.format(settings=settings), *arguments, ready="/relay/health") as app:
        own = {"XDG_RUNTIME_DIR": str(Path(app.environ["XDG_RUNTIME_DIR"]))}
        with AppServer(server, APP.format(settings=settings), *arguments, environ=own, ready="/relay/health") as other:
            for one in (app, other):
                async with Client.connect(f"{one.ws}/relay/socket") as client:
                    await client.expect_alive()
                assert WARNING not in one.output


async def test_embedded_server_of_an_app_ends_with_it_when_it_is_killed() -> None:
    with AppServer("uvicorn", APP.format(settings='redis_url="embedded"'), ready="/relay/ready") as app:
        assert app.process is not None
        children = [child.pid for child in psutil.Process(app.process.pid).children(recursive=True)]
        assert children
        app.process.kill()
        wait_for(lambda: all(map(has_ended, children)), "the server to end")


FORKED = """
import asyncio, os, sys
import psutil
from relay import Relay

relay = Relay(broadcast_url="memory://", system_topic=False)


async def ids():
    async with relay.lifespan():
        relay.node.sockets
        started = relay.exporter.snapshot()["process_start_time_seconds"][""]
        assert started == psutil.Process().create_time(), "the metrics are those of this process"
        return [next(relay.node.connections.numbers) for _ in range(3)]


reading, writing = os.pipe()
for _ in range(2):
    pid = os.fork()
    if not pid:
        os.write(writing, (" ".join(asyncio.run(ids())) + " ").encode())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
os.close(writing)
sys.stdout.write(os.fdopen(reading).read())
"""


async def test_processes_forked_from_one_that_has_imported_the_app_make_ids_of_their_own() -> None:
    """As gunicorn does with ``--preload``."""

    def run() -> list[str]:
        with Popen([sys.executable, "-c", FORKED], stdout=PIPE, text=True, env=dict(os.environ)) as process:
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            return out.split()

    ids = await asyncio.to_thread(run)
    assert len(set(ids)) == 6


IN_A_FORK = """
import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from relay import Relay
from relay.errors import RelayError

relay = Relay(broadcast_url="memory://", system_topic=False)


async def start():
    await relay.start()


async def stop():
    await relay.stop()


async def publish():
    await relay.publish("room:1", "e", {})


async def presence():
    await relay.presence("room:1")


def job():
    assert not relay.is_running and not relay.link.live
    said = {relay.link.reason}
    for call in (
        lambda: relay.publish("room:1", "e", {}),
        lambda: relay.local_broadcast("room:1", "e", {}),
        lambda: relay.disconnect(user="alice"),
        lambda: relay.topics,
        *(lambda work=work: asyncio.run(work()) for work in (start, stop, publish, presence)),
    ):
        try:
            call()
        except RelayError as error:
            said.add(str(error))
        else:
            said.add("no error")
    return said


async def main():
    async with relay.lifespan():
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            print(*await asyncio.get_running_loop().run_in_executor(pool, job))
        await relay.publish("room:1", "e", {})


asyncio.run(main())
"""


async def test_call_in_a_forked_process_is_an_error_that_says_what_to_use() -> None:
    """Which would vanish, or wait for an event loop that does not run there."""
    run = partial(subprocess.run, [sys.executable, "-c", IN_A_FORK], capture_output=True, text=True, timeout=60)
    ran = await asyncio.to_thread(run)
    assert (ran.returncode, ran.stdout.strip()) == (0, threadsafe.FORKED), ran.stderr
