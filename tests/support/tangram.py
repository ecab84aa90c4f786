"""tangram itself, for tests: its server and plugins, in an environment that ``tools/tangram.sh`` makes."""

import json
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import redis

from tests.support.process import DEADLINE_S, Started, free_port, wait_for

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / "build" / "tangram"


def need_tangram() -> None:
    """Fail where tangram is not installed: its tests are not skipped silently."""
    if not (ENVIRONMENT / ".made").is_file():
        pytest.fail("tangram is not installed: run tools/tangram.sh, as `make test` does, and see what it says")


def environment(directory: Path) -> dict[str, str]:
    """Variables for a process of tangram's, whose files are below a directory."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    return {**own, "XDG_CACHE_HOME": str(directory), "XDG_CONFIG_HOME": str(directory), "NO_COLOR": "1"}


class Tangram(Started):
    """``tangram serve``, without its channel service, as a context manager.

    Args: redis_url: where its plugins publish.
          relay_url: where its page finds the relay; by default, tangram's own address.
          plugins: further ones than ``tangram_system`` and ``tangram_jet1090``.
          environ: further environment variables.
    """

    def __init__(
        self,
        redis_url: str,
        relay_url: str | None = None,
        *,
        plugins: tuple[str, ...] = (),
        environ: dict[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="relay-test-")
        self.directory = Path(self._directory.name)
        self.port = free_port() if port is None else port
        self.url = f"http://localhost:{self.port}"
        style = {"version": 8, "name": "plain", "sources": {}, "layers": [BACKGROUND]}
        (self.directory / "style.json").write_text(json.dumps(style))
        names = ["tangram_system", "tangram_jet1090", *plugins]
        self.config = self.directory / "tangram.toml"
        self.config.write_text(
            f"""
[core]
redis_url = "{redis_url}"
plugins = {json.dumps(names)}

[server]
port = {self.port}

[channel]
host = "off"
public_url = "{relay_url or self.url}"

[map]
style = "style.json"
center_lat = 48.0
center_lon = 7.0

[plugins.tangram_jet1090]
aircraft_db_url = "http://127.0.0.1:1/none.zip"
path_cache = "{self.directory}"
jet1090_url = "http://127.0.0.1:1"
"""
        )
        self._log = (self.directory / "log").open("w+")
        self._environ = environment(self.directory) | (environ or {})
        self.process: subprocess.Popen[str] | None = None

    @property
    def output(self) -> str:
        """Everything printed and logged so far."""
        return (self.directory / "log").read_text("utf-8")

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [str(ENVIRONMENT / "bin" / "tangram"), "serve", "--config", str(self.config)]
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, text=True, env=self._environ, cwd=self.directory
        )
        wait_for(self._answers_or_has_ended, "tangram to answer")
        assert self.process.poll() is None, f"tangram ended:\n{self.output}"

    def stop(self) -> None:
        """End the process."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answers_or_has_ended(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            return True
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/manifest.json", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        self.close()

    def close(self) -> None:
        """Remove its files."""
        self._log.close()
        self._directory.cleanup()


BACKGROUND = {"id": "background", "type": "background", "paint": {"background-color": "#d6e4ee"}}


class AircraftStream:
    """What tangram_jet1090 publishes for a page, several times a second, until the block ends."""

    def __init__(self, redis_url: str) -> None:
        self._client = redis.Redis.from_url(redis_url)
        self._ended = threading.Event()
        self._message: tuple[str, str] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def show(self, topic: str, count: int) -> None:
        """Publish one aircraft of so many to a topic from now on."""
        self._message = f"to:{topic}:new-jet1090-data", json.dumps({"count": count, "aircraft": [AIRCRAFT]})

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            try:
                if self._message is not None:
                    self._client.publish(*self._message)
            except redis.RedisError:
                continue  # it is being restarted

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join(DEADLINE_S)
        self._client.close()


AIRCRAFT = {
    "icao24": "3944f0",
    "callsign": "AFR123",
    "registration": "F-GKXQ",
    "typecode": "A320",
    "latitude": 48.2,
    "longitude": 7.3,
    "altitude": 35000,
    "groundspeed": 450.0,
    "track": 60.0,
    "firstseen": 1,
    "lastseen": 4_000_000_000,
    "count": 1,
}
