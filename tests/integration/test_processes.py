"""What several processes have in common, and must not: ids, buses, and their end."""

import asyncio
import os
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import psutil
import pytest

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
