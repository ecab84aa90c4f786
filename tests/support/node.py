"""Runs the scripts of ``tests/js`` and talks with them: they say what they saw, a line of JSON each."""

import base64
import contextlib
import functools
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.patience import PATIENCE

SCRIPTS = Path(__file__).parents[1] / "js"
DEADLINE_S = 60.0 * PATIENCE
"""How long a whole script may take on a slow machine; one takes a few seconds when all is well."""

_MIN_NODE = 18
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_MAC_BROWSERS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)


@functools.cache
def _node_fault() -> str | None:
    node = shutil.which("node")
    if node is None:
        return "node is not installed"
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    if not version.startswith("v") or int(version[1:].split(".")[0]) < _MIN_NODE:
        return f"node {_MIN_NODE} or later is needed, this is {version or 'broken'}"
    if not (SCRIPTS / "node_modules").is_dir():
        return "the packages of tests/js are not installed: npm ci --prefix tests/js"
    return None


def need_node() -> None:
    """Skip the test, with one line saying what is missing, where the scripts cannot run."""
    if fault := _node_fault():
        pytest.skip(fault)


def need_browser() -> None:
    """Skip the test where the scripts, or the browser they drive, cannot run."""
    need_node()
    named = os.environ.get("CHROMIUM")
    if not named and not any(map(shutil.which, _BROWSERS)) and not any(map(os.path.exists, _MAC_BROWSERS)):
        pytest.skip("no Chromium or Chrome is installed; CHROMIUM=/path/to/it names one")


def compile_typescript(directory: Path, *files: Path, **modules: Path) -> None:
    """Have TypeScript look at files, as strictly as it can; fails with all that it finds.

    Args: directory: an empty one, for the settings.
          modules: where the declarations of a module are that the files import.
    """
    options = {
        "strict": True,
        "noEmit": True,
        "target": "es2022",
        "module": "esnext",
        "moduleResolution": "bundler",
        "lib": ["es2023", "dom", "dom.iterable", "dom.asynciterable"],
        "types": [],
        "skipDefaultLibCheck": True,  # TypeScript's own declarations, twice the work of all else
        "paths": {name: [str(path)] for name, path in modules.items()},
    }
    if any(file.suffix == ".tsx" for file in files):
        options["jsx"] = "react-jsx"
    settings = directory / "tsconfig.json"
    settings.write_text(json.dumps({"compilerOptions": options, "files": [str(file) for file in files]}))
    compiler = SCRIPTS / "node_modules" / "typescript" / "bin" / "tsc"
    done = subprocess.run(
        ["node", str(compiler), "--project", str(settings)],
        capture_output=True,
        text=True,
        timeout=120 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Script:
    """One running script, as a context manager that ends it whatever happens."""

    def __init__(self, name: str, *arguments: str) -> None:
        self._name = name
        self._process = subprocess.Popen(
            ["node", name, *arguments],
            cwd=SCRIPTS,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(self._process.stderr)

    def lines(self, deadline_s: float = 60.0) -> Iterator[dict[str, Any]]:
        """What the script says, until it ends; fails when it takes too long."""
        deadline_s *= PATIENCE
        end = time.monotonic() + deadline_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"{self._name} did not end within {deadline_s} s\n{self.errors}")
            if line is None:
                return
            yield json.loads(line)

    def wait(self) -> int:
        """The exit code, once its output has ended."""
        return self._process.wait(DEADLINE_S)

    @property
    def errors(self) -> str:
        """What the script wrote to standard error so far."""
        return "".join(self._errors)

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            # SIGTERM first: puppeteer then ends the browser it started.
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for reader, stream in zip(self._readers, (self._process.stdout, self._process.stderr), strict=True):
            reader.join(5)
            assert stream is not None
            stream.close()


def run_checks(
    name: str,
    *arguments: str,
    redis_url: str | None = None,
    deadline_s: float = 60.0,
    act: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Run a script to its end and publish what it waits for; fails with every check that failed.

    Args: act: does what the script asks for with ``{"do": …}``.

    Returns: the detail of each check, by the check's name.
    """
    passed: dict[str, Any] = {}
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        # The real client publishes: what is tested is what any backend does.
        bus = None
        if redis_url is not None:
            bus = stack.enter_context(contextlib.closing(redis.Redis.from_url(redis_url)))
        script = stack.enter_context(Script(name, *arguments))
        for said in script.lines(deadline_s):
            if "waiting" in said:
                assert bus is not None, f"{name} waits for {said['waiting']}, and there is no Redis to publish to"
                # In one write: how fast several come does not depend on the machine.
                with bus.pipeline(transaction=False) as commands:
                    for message in said["publish"]:
                        encoded = message.get("payload_base64")
                        payload = message["payload"].encode() if encoded is None else base64.b64decode(encoded)
                        commands.publish(message["redis_channel"], payload)
                    commands.execute()
            elif "do" in said:
                assert act is not None, f"{name} asks for {said['do']}"
                act(said)
            elif said["ok"]:
                passed[said["name"]] = said["detail"]
            else:
                failed.append(f"{said['name']}: {said['detail']}")
        code = script.wait()
        errors = script.errors
    assert not failed, "\n".join([*failed, errors])
    assert code == 0, f"{name} ended with {code}\n{errors}"
    assert passed, f"{name} checked nothing\n{errors}"
    return passed
