"""Nothing secret leaves the relay: all that a whole run says and publishes is searched for the secrets it used."""

import asyncio
import json
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import redis
from websockets.exceptions import InvalidStatus

from relay import Config, Relay
from relay.config_sources import load
from relay.errors import ConfigError
from tests.integration.test_auth import ROOMS, WAYS, KeyServer, published, refuse_join
from tests.support.client import Client
from tests.support.keys import EC_PRIVATE, EC_PUBLIC, OTHER_SECRET, RSA_PRIVATE, SECRET, jwk, token
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey, wait_for
from tests.support.servers import AppServer

PASSWORD = "redis-password-hunter2"
API_KEY = "api-key-hunter3"
JWKS_PASSWORD = "jwks-password-hunter4"
BAD = "bad-token-hunter5"
JWKS_KEY = "jwks-key-hunter6"
PEM_LINE = RSA_PRIVATE.splitlines()[3]

PLUGIN = """
from relay import Plugin

plugin = Plugin("failing")


@plugin.on_join("room:fails")
async def join(join):
    raise RuntimeError("a fault")


@plugin.on_push("room:*", "fails")
def push(push):
    raise RuntimeError("a fault")
"""


APP = """
import logging

from fastapi import FastAPI
from relay import Relay
from relay.config_sources import load

logging.basicConfig(level=logging.DEBUG)
app = FastAPI()
relay = Relay(load())
relay.install(app, path="/relay")
"""


def with_secrets(server: KeyServer) -> str:
    """The address of published keys, as somebody has it who must log in there."""
    return f"http://user:{JWKS_PASSWORD}@127.0.0.1:{server.server_port}/jwks?apikey={JWKS_KEY}"


class Monitor:
    """Every command that clients send to Redis, with all arguments."""

    def __init__(self, url: str) -> None:
        self._client: Any = redis.Redis.from_url(url)
        self._monitor: Any = self._client.monitor()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        self._monitor.__enter__()

    def all(self) -> str:
        self._client.publish("the:end", "the:end")
        said: list[str] = []
        while "the:end" not in (line := self._monitor.next_command()["command"]):
            said.append(line)
        self._monitor.__exit__(None, None, None)
        self._client.close()
        return "\n".join(said)


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_run_shows_none_of_the_secrets_it_used(tmp_path: Path, log_format: str) -> None:
    directory = tmp_path / "failing"
    directory.mkdir()
    (directory / "__init__.py").write_text(textwrap.dedent(PLUGIN))
    (tmp_path / "private.pem").write_text(RSA_PRIVATE)
    good = {way: token(f"user-{number}", ROOMS, ttl_s=300) for number, way in enumerate(WAYS)}
    joins, renewed, expired = token("eve", ROOMS), token("user-0", ROOMS, ttl_s=400), token("ada", ttl_s=-100)
    unknown, forged = token("ada", key=EC_PRIVATE, algorithm="ES256", kid="z"), token("ada", key=OTHER_SECRET)
    with Valkey("--requirepass", PASSWORD) as valkey, published(jwk(EC_PUBLIC, "y")) as key_server:
        url = f"redis://:{PASSWORD}@127.0.0.1:{valkey.port}"
        environ = {
            "RELAY_LOG_LEVEL": "debug",
            "RELAY_LOG_FORMAT": log_format,
            "RELAY_REDIS_URL": url,
            "RELAY_REST__API_KEY": API_KEY,
            "RELAY_AUTH__KEYS": json.dumps([SECRET, f"file:{tmp_path}/private.pem"]),
            "RELAY_AUTH__JWKS_URL": with_secrets(key_server),
            "RELAY_AUTH__JWKS_RETRY_S": "0.01",
            "RELAY_AUTH__TANGRAM": "true",
            "RELAY_AUTH__EXPIRY_GRACE_S": "0.1",
            "RELAY_PLUGINS__PATHS": json.dumps([str(tmp_path)]),
            "NO_PROXY": "127.0.0.1",
        }
        with RelayProcess(environ=environ) as process:
            monitor = Monitor(url)
            for way, made in good.items():
                async with Client.connect(process.ws, **WAYS[way](made)) as client:
                    ref = await client.join("room:1")
                    await client.push(ref, "room:1", "shout", {"text": "seen"})
                    await client.push(ref, "room:1", "fails", {})
                    assert await refuse_join(client, "room:fails", {"token": joins}) == "join crashed"
                    assert await refuse_join(client, "room:2", {"token": BAD}) == "invalid token"
                    for later in (renewed, BAD, joins, expired):
                        await client.push(ref, "room:1", "access_token", {"access_token": later})
                    await client.send_raw(f'["1","1","room:1","phx_join",{{"token":"{BAD}"')
                    assert (await client.expect_closed())[0] == 1007
                key_server.status = 503  # the keys that are known serve on, and the log says so
                for bad in (BAD, expired, unknown, forged, made + BAD):
                    with suppress(InvalidStatus):
                        async with Client.connect(process.ws, **WAYS[way](bad)):
                            raise AssertionError("it got in")
            async with httpx.AsyncClient(trust_env=False, timeout=20 * PATIENCE, base_url=process.http) as api:
                key = {"X-API-Key": API_KEY}
                made = (await api.post("/token", json={"channel": "room:9"}, headers=key)).json()["token"]
                async with Client.connect(process.ws, query=f"userToken={made}") as client:
                    await client.join("room:9")
                    shown = [
                        (await api.get(path, headers=key)).text
                        for path in (
                            "/metrics",
                            "/health",
                            "/ready",
                            "/api/topics",
                            "/api/topics/room:9",
                            "/api/openapi.json",
                        )
                    ]
                    (socket_id,) = (await api.get("/api/topics/room:9", headers=key)).json()["socket_ids"]
                    shown.append((await api.get(f"/api/sockets/{socket_id}", headers=key)).text)
                    await api.delete("/api/users/ada", headers=key)
                shown += [
                    (await api.get("/")).text,
                    (await api.get(f"/nowhere/websocket?token={BAD}")).text,
                    (await api.get("/api/topics", headers={"X-API-Key": BAD})).text,
                    (await api.post("/token", json={"channel": "", "id": BAD}, headers=key)).text,
                ]
            commands = monitor.all()
            valkey.kill()
            await asyncio.to_thread(wait_for, lambda: "is down" in process.output, "the loss of Redis to be told")
        output = process.output
    for line in (
        "handshake refused",
        "plugin failing",
        ": connected",
        ": join of ",
        ": disconnected by the ",
        "fetching the keys of auth.jwks_url failed (status 503)",
    ):
        assert line in output, "there was something to say"
    assert key_server.asked
    assert ('{"' in output) == (log_format == "json")
    assert commands.count("from:room:1:shout") == 4 and "relay:control" in commands
    assert "access_token" not in commands
    secrets = [SECRET, OTHER_SECRET, PASSWORD, API_KEY, JWKS_PASSWORD, JWKS_KEY, BAD, PEM_LINE]
    secrets += [each.rpartition(".")[2] for each in (*good.values(), joins, renewed, expired, unknown, forged, made)]
    for place, text in (("output", output), ("answers", "\n".join(shown)), ("Redis", commands)):
        for secret in secrets:
            assert secret not in text, f"{secret} is in the {place}"


@pytest.mark.parametrize("server", ["uvicorn", "uvicorn with our class"])
async def test_relay_in_an_app_that_logs_everything_shows_no_secret(server: str) -> None:
    """The app has all loggers at DEBUG, those of the relay's libraries too."""
    good, expired = token("ada", key=EC_PRIVATE, algorithm="ES256", kid="y", topics=ROOMS), token("ada", ttl_s=-100)
    joins, unknown = token("eve", ROOMS), token("ada", key=EC_PRIVATE, algorithm="ES256", kid="z")
    with Valkey("--requirepass", PASSWORD) as valkey, published(jwk(EC_PUBLIC, "y")) as key_server:
        environ = {
            "RELAY_REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:{valkey.port}",
            "RELAY_REST__API_KEY": API_KEY,
            "RELAY_AUTH__KEYS": json.dumps([SECRET]),
            "RELAY_AUTH__JWKS_URL": with_secrets(key_server),
            "RELAY_AUTH__JWKS_RETRY_S": "0.01",
            "NO_PROXY": "127.0.0.1",
        }
        with AppServer(server, APP, environ=environ, ready="/relay/ready") as app:
            # Not the two ways by the query, which is in the server's own log of requests.
            for way in (WAYS["authToken"], WAYS["Authorization"]):
                async with Client.connect(f"{app.ws}/relay/socket", **way(good)) as client:
                    ref = await client.join("room:1", {"token": joins})
                    await client.push(ref, "room:1", "shout", {"text": "seen"})
                    await client.push(ref, "room:1", "access_token", {"access_token": joins})
                    await client.push(ref, "room:1", "access_token", {"access_token": BAD})
                for bad in (BAD, expired, unknown):
                    with suppress(InvalidStatus):
                        async with Client.connect(f"{app.ws}/relay/socket", **way(bad)):
                            raise AssertionError("it got in")
            async with httpx.AsyncClient(trust_env=False, timeout=20 * PATIENCE, base_url=f"{app.http}/relay") as api:
                for key in (API_KEY, BAD):
                    _ = await api.get("/api/topics", headers={"X-API-Key": key})
                    _ = await api.get("/api/topics", headers={"Authorization": f"Bearer {key}"})
            valkey.kill()
            await asyncio.to_thread(wait_for, lambda: "is down" in app.output, "the loss of Redis to be told")
        output = app.output
    assert "DEBUG:httpcore2" in output and key_server.asked, "libraries have their say"
    secrets = [SECRET, PASSWORD, API_KEY, JWKS_PASSWORD, JWKS_KEY, BAD]
    secrets += [each.rpartition(".")[2] for each in (good, joins, expired, unknown)]
    for secret in secrets:
        assert secret not in output, f"{secret} is in the output"


def settings(directory: Path) -> dict[str, Any]:
    path = directory / "key"
    path.write_text(OTHER_SECRET)
    return {
        "redis_url": f"redis://:{PASSWORD}@localhost",
        "auth": {"keys": [SECRET, f"file:{path}"], "jwks_url": f"https://u:{JWKS_PASSWORD}@login.example.org"},
        "rest": {"api_key": API_KEY},
    }


def test_settings_show_no_secret(tmp_path: Path) -> None:
    relay = Relay(**settings(tmp_path))
    for shown in (repr(relay.config), str(relay.config), repr(relay.components.keys), repr(vars(relay))):
        for secret in (SECRET, OTHER_SECRET, PASSWORD, API_KEY, JWKS_PASSWORD):
            assert secret not in shown


def test_faults_in_settings_show_no_secret(tmp_path: Path) -> None:
    for number, text in enumerate(
        (
            f'[auth]\nkeys = "{SECRET}"',
            f'[auth]\nkeys = [["{SECRET}"]]',
            f'[[auth.keys]]\nkey = ["{SECRET}"]',
            f'[[auth.keys]]\nkey = "x"\nkid = ["{SECRET}"]',
            f'[[auth.keys]]\nsecret = "{SECRET}"',
            f'[auth]\nkey = "{SECRET}"',
            f'[auth]\njwks_url = "ftp://u:{SECRET}@x"',
            f'[auth]\nallow_anonymous = "{SECRET}"\nkeys = ["{SECRET}"]',
            f'[auth]\nsecret = "{SECRET[:31]}"',
            f'[auth]\nsecret = ["{SECRET}"]',
        )
    ):
        path = tmp_path / f"{number}.toml"
        path.write_text(text)
        try:
            load(path)
        except ConfigError as error:
            shown = [problem for problem in error.problems if "anonymous" not in problem]
            assert SECRET[:31] not in "\n".join(shown), text
        else:
            raise AssertionError(f"taken: {text}")
    assert Config(auth={"keys": [SECRET]}).auth.keys[0].key == SECRET
