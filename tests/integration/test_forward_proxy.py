"""With a proxy in the environment: this machine is never asked through it, which would be given tokens and keys."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest

import relay_client
from relay.auth.jwks import _proxy_for
from relay.proxy_headers import is_this_machine
from tests.support.patience import PATIENCE
from tests.support.process import DEADLINE_S, RelayProcess

ROOT = Path(__file__).parents[2]
NAMES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WS_PROXY", "WSS_PROXY", "SOCKS_PROXY")
KEY = "an API key that no proxy may see"


class Recorder:
    """A proxy that takes connections, keeps the first bytes of each, and answers none."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.environ = {name: f"http://127.0.0.1:{port}" for upper in NAMES for name in (upper, upper.lower())} | {
            "NO_PROXY": "",
            "no_proxy": "",
        }
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    self.asked.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                except OSError as error:
                    self.asked.append(repr(error).encode())

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(DEADLINE_S)


@pytest.fixture(scope="module")
def proxy() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.close()


@pytest.fixture(scope="module")
def relay(proxy: Recorder) -> Iterator[RelayProcess]:
    """A relay whose greeting has come, with the proxy in its environment."""
    with RelayProcess(environ={**proxy.environ, "RELAY_REST__API_KEY": KEY}) as process:
        yield process


@pytest.fixture(autouse=True)
def nothing_asked(proxy: Recorder) -> Iterator[None]:
    """Whatever a test does here, the proxy is not asked."""
    yield
    assert proxy.asked == []


def test_relay_greets(relay: RelayProcess) -> None:
    assert "is ready" in relay.output


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("push", "room:1", "shout", "{}", "--url"), "socket"),
        (("topics", "--url"), "api"),
        (("bench", "--sockets", "2", "--rate", "20", "--seconds", "0.2"), "socket"),
    ],
)
def test_commands_ask_this_machine_directly(
    relay: RelayProcess, arguments: tuple[str, ...], path: str, host: str
) -> None:
    port = relay.http.rpartition(":")[2]
    scheme = "http" if path == "api" else "ws"
    command = [sys.executable, "-m", "relay", *arguments, f"{scheme}://{host}:{port}/{path}"]
    environ = {**relay.environ, "RELAY_REDIS_URL": relay.redis_url}
    ran = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert ran.returncode == 0, ran.stderr


def test_listen_asks_this_machine_directly(relay: RelayProcess) -> None:
    command = [sys.executable, "-m", "relay", "listen", "system", "--count", "1", "--url", relay.ws]
    ran = subprocess.run(command, env=relay.environ, cwd=ROOT, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert json.loads(ran.stdout)["event"] == "stats", ran.stderr


async def test_python_client_asks_this_machine_directly(
    relay: RelayProcess, proxy: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in proxy.environ.items():
        monkeypatch.setenv(name, value)
    async with relay_client.connect(relay.ws, token="a token that no proxy may see") as connection:
        assert connection.is_connected


def test_keys_published_on_this_machine_are_fetched_directly(proxy: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in proxy.environ.items():
        monkeypatch.setenv(name, value)
    for host in ("127.0.0.1", "localhost", "[::1]"):
        assert _proxy_for(httpx.URL(f"http://{host}:9/jwks")) is None
    assert _proxy_for(httpx.URL("https://login.example.org/jwks")) == proxy.environ["HTTPS_PROXY"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST.", "a.localhost", "127.0.0.1", "127.9.9.9", "127.1", "0x7f000001", "2130706433"]
    + ["0.0.0.0", "::1", "[::1]", "::", "::ffff:127.0.0.1", "0"],
)
def test_this_machine_is_known_in_every_form(host: str) -> None:
    assert is_this_machine(host)
    assert relay_client.socket._is_this_machine(host.lower().strip("[]"))


@pytest.mark.parametrize(
    "host", ["", "example.org", "localhost.example.org", "10.0.0.1", "::2", "128.1", "notlocalhost"]
)
def test_other_machines_are_not_this_one(host: str) -> None:
    assert not is_this_machine(host)
    assert not relay_client.socket._is_this_machine(host)


class TestElsewhere:
    """Other machines are asked as the libraries do: through the proxy, where the environment names one."""

    @pytest.fixture(autouse=True)
    def nothing_asked(self) -> None:
        """Here it is."""

    @pytest.mark.parametrize(
        ("arguments", "asked"),
        [
            (("topics", "--url", "http://relay.example/api"), b"GET http://relay.example/api/topics "),
            (("push", "a", "b", "{}", "--url", "ws://relay.example/socket"), b"CONNECT relay.example:80 "),
        ],
    )
    async def test_proxy_is_asked(self, arguments: tuple[str, ...], asked: bytes) -> None:
        proxy = Recorder()
        try:
            command = [sys.executable, "-m", "relay", *arguments]
            environ = {**os.environ, **proxy.environ}
            ran = await asyncio.to_thread(
                subprocess.run, command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60 * PATIENCE
            )
            assert ran.returncode == 1
            assert len(proxy.asked) == 1
            assert proxy.asked[0].startswith(asked)
        finally:
            proxy.close()
