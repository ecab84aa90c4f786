"""Every code block of these pages is run, top to bottom, as a reader would type it.

A page is one story in a fresh directory, with Redis behind it and one relay. Its language says what a block is:

``python``   A first line ``# some/file.py`` names a file: the block is written there. A block without one is added to
             the file of the last one that has one. On a page that has named none, it is executed, with ``await`` at
             its top level, in one namespace a page. One with ``# → what is printed`` runs on, as in ``python -m
             asyncio``, once it has printed the first of it.
``console``  Lines after ``$`` are typed, those of ``relay`` on a terminal. What is shown after them is compared with
             what comes: ``…`` is any text, or, alone on a line, any lines. What serves (``relay serve``, ``uvicorn``,
             …) runs on until the page ends or another is started; it is started anew when files have changed. Without
             one there is a ``relay serve``.
``js``       Run in Node. What follows each ``// →`` must be printed, in any order, and nothing else (``a → b``: both).
             A script that says ``joined`` runs on then: what follows on the page may be what it waits for.
``toml``     Settings of the relay; a first line ``# some/file.toml`` names a file here too.
``html``     A file, named by a first line ``<!-- some/file.html -->``.
``text``     A drawing.
``sql``      Run on Postgres, with a relay on it: browsers hear what it publishes.

Addresses are the test's: ``127.0.0.1:8000`` and ``localhost:6379`` are replaced. ``pip install .`` registers the entry
points of ``pyproject.toml`` here, and downloads nothing. A block that cannot be run stands behind a comment,
``<!-- not run: reason -->``.
"""

import argparse
import ast
import asyncio
import fcntl
import http.client
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import asyncpg
import jwt
import pytest
import redis

from relay import Config, Relay
from relay.channels.pubsub import _EVENTS_WAITING
from relay.config_sections import LimitsConfig
from relay.config_sources import load
from relay.plugins import Plugin
from tests.support.client import Client
from tests.support.node import SCRIPTS, need_browser, need_node, run_checks
from tests.support.patience import PATIENCE
from tests.support.process import Postgres, Valkey, free_port, wait_for
from tests.support.serving import serve
from tests.support.terminal import run_on_terminal

REPOSITORY = Path(__file__).parents[2]
# Kept from page to page, by one process of pytest after the other: what a page imports is most of the work.
MYPY_CACHE = REPOSITORY / ".mypy_cache" / "pages"
PAGES = [
    path
    for name in (
        "README",
        "docs/tutorial",
        "docs/coming-from",
        "docs/plugins",
        "docs/redis",
        "docs/history",
        "docs/presence",
        "docs/client-events",
        "docs/webhooks",
        "docs/mounting",
        "docs/publishing",
        "docs/testing",
        "docs/rest",
        "docs/sse",
        "docs/authentication",
        "docs/security",
        "docs/metrics",
        "docs/console",
        "docs/operations",
        "docs/deployment",
        "docs/scaling",
        "docs/troubleshooting",
        "clients/python/README",
    )
    if (path := REPOSITORY / f"{name}.md").exists()
]
LANGUAGES = ("python", "console", "js", "html", "toml", "text", "sql")
PATIENCE_S = 30.0


def name_of(page: Path) -> str:
    """A page's path, without its ending."""
    return page.relative_to(REPOSITORY).with_suffix("").as_posix()


_BLOCK = re.compile(
    r"^(?P<why><!-- not run: [^\n]+ -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_FILE = re.compile(r"^(?:# |<!-- )([\w./-]+\.\w+)(?: -->)?\n")
_SERVERS = ("uvicorn", "hypercorn", "granian")


class Block(NamedTuple):
    """One fenced block."""

    line: int
    language: str
    text: str
    is_run: bool


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(text.count("\n", 0, found.start("text")), found["language"], found["text"], not found["why"])
        for found in _BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page: Path) -> None:
    """An indented block would not be found, nor run."""
    blocks = blocks_of(page)
    assert blocks
    assert [block for block in blocks if block.is_run and block.language not in LANGUAGES] == []
    prose = _BLOCK.sub("", page.read_text("utf-8"))
    assert re.findall(r"\n\n {4,}\S.*", prose) == []
    assert "```" not in prose


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_the_page_works(page: Path, tmp_path: Path, valkey: Valkey) -> None:
    blocks = [block for block in blocks_of(page) if block.is_run]
    if any(block.language == "js" for block in blocks):
        need_node()
    with Story(page, tmp_path, valkey) as story:
        for block in blocks:
            story.tell(block)
        story.finish()


def test_map_of_the_tutorial_moves_until_its_door_is_closed(tmp_path: Path, valkey: Valkey) -> None:
    """Seen in a browser twice: before the block that asks for tokens, and at the end of the page."""
    need_browser()
    page = REPOSITORY / "docs" / "tutorial.md"
    blocks = [block for block in blocks_of(page) if block.is_run]
    closed = next(n for n, block in enumerate(blocks) if "[auth]" in block.text)
    with Story(page, tmp_path, valkey) as story:
        for block in blocks[:closed]:
            story.tell(block)
        passed = run_checks("tutorial-chromium.mjs", story.origin, redis_url=valkey.url)
        assert "without a token nothing is shown" not in passed
        for block in blocks[closed:]:
            story.tell(block)
        secret = (tmp_path / "reader" / "jwt-secret").read_text()
        claims = {"sub": "alice", "topics": ["aircraft:*:join"], "exp": int(time.time()) + 600}
        token = jwt.encode(claims, secret, algorithm="HS256")
        settings = tomllib.loads((tmp_path / "reader" / "relay.toml").read_text())
        key = settings["rest"]["api_key"]
        passed = run_checks("tutorial-chromium.mjs", story.origin, token, key, redis_url=valkey.url)
        assert {"without a token nothing is shown", "three aircraft fly"} <= set(passed)
        story.finish()


DEVELOPING = REPOSITORY / "docs" / "developing.md"
"""The page whose tables name the tests of what the user pages guarantee."""


def tables_of(page: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Each table of a page: its header's cells, and those of its rows."""
    for table in re.findall(r"(?:^\|.*\|\n)+", page.read_text("utf-8"), re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        yield header, rows


def names_of_tests() -> set[str]:
    """All tests of this repository, by name alone and behind their file, ``tests/test_x.py::test_y``."""
    found = set()
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        file = path.relative_to(REPOSITORY).as_posix()
        names = re.findall(r"^(?:async )?def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
        found |= {file, *names, *(f"{file}::{name}" for name in names)}
    return found


def test_every_test_that_the_developers_page_names_exists() -> None:
    """A test that is renamed must be renamed there too."""
    text = DEVELOPING.read_text("utf-8")
    named = set(re.findall(r"(?:[\w/]+/test_\w+\.py(?:::test_\w+)?|\btest_\w+\b(?!\.py))", text))
    assert len(named) > 100
    assert named - names_of_tests() == set()


def test_every_guarantee_of_the_user_pages_has_its_tests() -> None:
    """Limits by their first cell, all others by number; none of them names a test itself."""
    proved = {row[0]: row[-1] for header, rows in tables_of(DEVELOPING) if header[-1] == "Tests" for row in rows}
    assert all("test_" in tests for tests in proved.values())
    for name, least in (("limits", 40), ("reliability", 40), ("security", 40), ("history", 16), ("presence", 9)):
        page = REPOSITORY / "docs" / f"{name}.md"
        assert not re.search(r"\btest_", page.read_text("utf-8")), name
        keys = {
            row[0]
            for header, rows in tables_of(page)
            if header[0] in ("No.", "Limit", "Overflow policy")
            for row in rows
        }
        assert len(keys) > least
        assert keys - proved.keys() == set(), name


def test_every_promise_of_the_order_names_its_exception() -> None:
    """Slow readers of a topic with `overflow = "latest"` get a newer value in the place of the older one."""
    promises = ("order of redis", "order in which redis", "in another order than", "at most once and in order")
    found = [
        block
        for page in (REPOSITORY / "docs").glob("*.md")
        for block in re.split(r"\n\n(?!- )", page.read_text("utf-8"))  # a list belongs to what stands before it
        if any(promise in " ".join(block.lower().split()) for promise in promises)
    ]
    assert len(found) >= 3
    assert [block for block in found if not re.search('[`"]latest[`"]', block)] == []


def test_page_on_limits_has_every_limit_and_its_default() -> None:
    text = (REPOSITORY / "docs" / "limits.md").read_text("utf-8")
    for name in LimitsConfig.model_fields:
        assert f"`{name}`" in text, name
    for name in ("overflow", "latest_key", "notify_dropped", "trusted_proxies"):
        assert f"`{name}" in text, name


async def test_sql_of_the_pages_reaches_browsers() -> None:
    directory = Postgres.find()
    if directory is None:
        pytest.skip("no Postgres on this machine: neither /usr/lib/postgresql/*/bin nor PATH has its initdb")
    statements = [block.text for page in PAGES for block in blocks_of(page) if block.language == "sql" and block.is_run]
    assert statements
    with Postgres(directory) as postgres:
        relay = Relay(broadcast_url=postgres.url, system_topic=False)
        async with serve(relay) as served, Client.connect(served.ws) as client:
            await client.join("room:1")
            connection = await asyncpg.connect(postgres.url)
            for statement in statements:
                await connection.execute(statement)
                await client.expect_event("room:1", "new_msg", {"text": "hi"})
            await connection.close()


def test_page_on_plugins_shows_every_hook_with_its_signature() -> None:
    """A hook that is added, renamed or changed must be described."""
    text = (REPOSITORY / "docs" / "plugins.md").read_text("utf-8")
    hooks = [name for name in vars(Plugin) if name.startswith("on_")]
    assert len(hooks) == 8
    for name in hooks:
        parameters = list(inspect.signature(getattr(Plugin, name)).parameters.values())[1:]
        if parameters[0].name == "function":
            shown = f"@plugin.{name}`"
        else:
            defaults = (p.name if p.default is p.empty else f'{p.name}="{p.default}"' for p in parameters)
            shown = f"@plugin.{name}({', '.join(defaults)})`"
        assert shown in text, shown
    assert "`@plugin.service`" in text
    for setting in type(Config().plugins).model_fields:
        assert setting in text, setting


def test_number_of_events_that_may_wait_for_a_handler_is_documented() -> None:
    text = (REPOSITORY / "docs" / "plugins.md").read_text("utf-8")
    number = f"{_EVENTS_WAITING:_}".replace("_", " ")
    assert f"{number} events of one topic wait for `on_event`, or {number} messages for one `on_redis` handler" in text
    described = " ".join(str(Plugin.on_redis.__doc__).split())
    assert f"messages over {number} that wait are dropped and counted" in described


class Story:
    """One page while it is run."""

    def __init__(self, page: Path, directory: Path, valkey: Valkey) -> None:
        self._page = page
        self._valkey = valkey
        with redis.Redis.from_url(valkey.url) as client:
            client.flushall()  # the histories of other pages
        self._port = free_port()
        self.origin = f"http://127.0.0.1:{self._port}"
        self._directory = directory / "reader"
        self._site = directory / "site"  # what `pip install .` installs into
        self._bin = directory / "bin"
        for made in (self._directory, self._site, self._bin, self._directory / "node_modules"):
            made.mkdir()
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")} | {
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(map(str, (self._directory, self._site, REPOSITORY))),
            "XDG_RUNTIME_DIR": str(directory),
            "RELAY_REDIS_URL": valkey.url,
            "RELAY_PORT": str(self._port),
            "UVICORN_PORT": str(self._port),
            "GRANIAN_PORT": str(self._port),
            "NO_COLOR": "1",
        }
        self._write_programs()
        self._file: Path | None = None
        self._namespace: dict[str, Any] = {"__name__": "__page__"}
        self._runner = asyncio.Runner()
        self._server: Server | None = None
        self._is_stale = False
        self._scripts: list[Script] = []

    def _write_programs(self) -> None:
        """Put in the reader's PATH what the pages type: of this environment, and for these servers."""
        redis_cli = shutil.which("redis-cli")
        programs = {
            "relay": f'exec "{sys.executable}" -m relay "$@"',
            "pytest": f'exec "{sys.executable}" -m pytest -p no:cacheprovider "$@"',
            "pip": f'exec "{sys.executable}" "{__file__}" pip "{self._site}" "$@"',
            "python": f'exec "{sys.executable}" "$@"',
            **{name: f'exec "{sys.executable}" -m {name} "$@"' for name in _SERVERS},
            "redis-cli": f'exec "{redis_cli}" --no-raw -p {self._valkey.port} "$@"'
            if redis_cli
            else f'exec "{sys.executable}" "{__file__}" redis-cli "{self._valkey.url}" "$@"',
        }
        if shutil.which("curl") is None:
            programs["curl"] = f'exec "{sys.executable}" "{__file__}" curl "$@"'
        for name, line in programs.items():
            (self._bin / name).write_text(f"#!/bin/sh\n{line}\n")
            (self._bin / name).chmod(0o755)

    def tell(self, block: Block) -> None:
        """Run one block."""
        place = f"{self._page.name}, line {block.line}"
        text = re.sub(r"\b(127\.0\.0\.1|localhost):8000\b", rf"\1:{self._port}", block.text)
        text = re.sub(r"\b(127\.0\.0\.1|localhost):6379\b", rf"127.0.0.1:{self._valkey.port}", text)
        match block.language:
            case "python":
                self._run_python(text, place)
            case "toml":
                self._run_toml(text)
            case "console":
                self._run_console(text, place)
            case "js":
                self._run_js(text, place)
            case "html":
                file = self._named_file(text)
                assert file is not None, f"{place}: expected <!-- name.html --> first"
                file.write_text(text)
            case _:
                assert block.language in ("sql", "text"), "the others are refused by the test above"

    def _named_file(self, text: str) -> Path | None:
        found = _FILE.match(text)
        if found is None:
            return None
        file = self._directory / found[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        self._is_stale = True
        return file

    def _run_python(self, text: str, place: str) -> None:
        if "# → " in text:
            self._need_server()
            script = Script(text, self._directory, self._environ, place, "python")
            self._scripts.append(script)
            script.wait(until=script.expected[0])
            return
        named = self._named_file(text)
        if named is not None:
            self._file = named
            named.write_text(text)
        elif self._file is not None:
            with self._file.open("a") as file:
                file.write(f"\n\n{text}")
            self._is_stale = True
        else:
            code = compile(text, place, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            self._runner.run(self._execute(code))
        if self._file is not None:
            compile(self._file.read_text(), str(self._file), "exec")

    async def _execute(self, code: Any) -> None:
        value = eval(code, self._namespace)
        if inspect.isawaitable(value):
            await value

    def _run_toml(self, text: str) -> None:
        named = self._named_file(text)
        file = named or self._directory / "settings.toml"
        file.write_text(text)
        if file.name != "pyproject.toml":
            _ = load(file)
        if named is None:
            file.unlink()

    def _run_console(self, text: str, place: str) -> None:
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            arguments = shlex.split(command)
            environ = dict(self._environ)
            while "=" in arguments[0]:
                name, _, value = arguments.pop(0).partition("=")
                environ[name] = value
            if arguments[0] in _SERVERS or arguments[:2] == ["relay", "serve"]:
                self._serve(arguments, environ, shown)
                continue
            if arguments[0] in ("curl", "redis-cli") or arguments[:2] == ["relay", "publish"]:
                self._need_server()
            if arguments[0] == "relay":  # which prints something else where nobody reads along
                terminal = environ | {"TERM": "dumb", "COLUMNS": "200"}
                program = [str(self._bin / "relay"), *arguments[1:]]
                code, printed = run_on_terminal(program, cwd=self._directory, env=terminal)
            else:
                ended = subprocess.run(
                    arguments,
                    cwd=self._directory,
                    env=environ,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT if arguments[0] != "curl" else subprocess.DEVNULL,
                    text=True,
                    timeout=120 * PATIENCE,
                )
                code, printed = ended.returncode, ended.stdout
            if shown:
                assert is_shown(shown, printed), f"{place}: {command}\n{printed}"
            else:
                assert code == 0, f"{place}: {command}\n{printed}"

    def _need_server(self) -> None:
        if self._server is None:
            self._serve(["relay", "serve"], self._environ, "")
        elif self._is_stale:
            self._serve(self._server.arguments, self._server.environ, "")

    def _serve(self, arguments: list[str], environ: dict[str, str], shown: str) -> None:
        self._end_server()
        self._server = Server(arguments, environ, self._directory, self._port)
        self._is_stale = False
        self._server.wait_ready(shown)

    def _run_js(self, text: str, place: str) -> None:
        self._need_server()
        script = Script(text, self._directory, self._environ, place, "js")
        self._scripts.append(script)
        script.wait(until="joined" if "joined" in script.expected else None)

    def _end_server(self) -> None:
        for script in self._scripts:
            script.wait()
            script.end()
        self._scripts.clear()
        if self._server is not None:
            self._server.end()

    def finish(self) -> None:
        """See that nothing is still to come, and that what the page has written is typed."""
        self._end_server()
        if any(self._directory.rglob("*.py")):
            MYPY_CACHE.mkdir(parents=True, exist_ok=True)
            with (MYPY_CACHE / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                checked = subprocess.run(
                    [
                        *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--explicit-package-bases"),
                        *("--cache-dir", str(MYPY_CACHE), "."),
                    ],
                    cwd=self._directory,
                    env=self._environ | {"MYPYPATH": str(REPOSITORY)},
                    capture_output=True,
                    text=True,
                )
            assert checked.returncode == 0, checked.stdout + checked.stderr

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for script in self._scripts:
            script.end()
        if self._server is not None:
            self._server.end()
        self._runner.close()


class Server:
    """A server that a page has started."""

    def __init__(self, arguments: list[str], environ: dict[str, str], directory: Path, port: int) -> None:
        self.arguments = arguments
        self.environ = environ
        self._port = port
        self._log = directory.parent / "server.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                arguments, cwd=directory, env=environ, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_ready(self, shown: str) -> None:
        """Return once it listens, and has printed what the page shows."""
        wait_for(lambda: self._process.poll() is not None or self._listens(), "the server to listen", PATIENCE_S)
        if shown:
            wait_for(lambda: is_shown(shown, self._log.read_text()), f"{shown!r} in {self._log}", PATIENCE_S)
        assert self._process.poll() is None, self._log.read_text()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0

    def end(self) -> None:
        """Stop it in good order; nothing it logged may be a fault of a plugin's."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE_S)
        log = self._log.read_text()
        assert "Traceback" not in log, log


class Script:
    """A script that runs in Node or in Python, and what it is expected to print."""

    def __init__(self, text: str, directory: Path, environ: dict[str, str], place: str, language: str) -> None:
        self.expected = [
            line.strip() for found in re.findall(r"(?://|#) → (.*)$", text, re.MULTILINE) for line in found.split(" → ")
        ]
        assert self.expected, f"{place}: expected some `// → what is printed`"
        self._place = place
        file = directory / f"script-{place.rpartition(' ')[2]}.{'mjs' if language == 'js' else 'txt'}"
        file.write_text(text)
        if language == "python":
            command = [sys.executable, "-u", __file__, "await", file.name]
            environ = environ | {
                "PYTHONPATH": f"{environ['PYTHONPATH']}{os.pathsep}{REPOSITORY / 'clients' / 'python'}"
            }
        else:
            command = ["node", "--import", self._like_a_browser(directory).as_uri(), file.name]
        self._log = directory.parent / f"{file.name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=directory,
                env=environ | {"NODE_DISABLE_COLORS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _like_a_browser(self, directory: Path) -> Path:
        """Let scripts find phoenix and a WebSocket; returns what Node has to import first."""
        phoenix = directory / "node_modules" / "phoenix"
        if not phoenix.exists():
            phoenix.symlink_to(SCRIPTS / "node_modules" / "phoenix-1.8")
            # A browser has a WebSocket; Node has one since version 22.
            ws = (SCRIPTS / "node_modules" / "ws" / "wrapper.mjs").as_uri()
            (directory / "browser.mjs").write_text(f"import ws from {json.dumps(ws)}\nglobalThis.WebSocket ??= ws\n")
        return directory / "browser.mjs"

    def _printed(self) -> list[str]:
        # A line that is being written is none yet.
        return self._log.read_bytes().rpartition(b"\n")[0].decode().splitlines()

    def wait(self, until: str | None = None) -> None:
        """Wait for one line, or for all of them; then no other may have been printed."""

        def is_there() -> bool:
            printed = self._printed()
            return self._process.poll() is not None or (
                until in printed if until is not None else len(printed) >= len(self.expected)
            )

        wait_for(is_there, f"{self._place}: {self.expected}, printed {self._printed()}", PATIENCE_S)
        if until is None:
            assert sorted(self._printed()) == sorted(self.expected), self._place
        else:
            assert until in self._printed(), f"{self._place}: {self._printed()}"

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(PATIENCE_S)


def is_shown(shown: str, printed: str) -> bool:
    """Say whether a page shows what was printed; ``…`` is any text, or, alone on a line, any lines."""
    pattern = "".join(
        r"(?:.*\n)*?" if line == "…" else ".*?".join(map(re.escape, line.split("…"))) + r"\s*\n"
        for line in shown.strip().splitlines()
    )
    return re.fullmatch(pattern, printed.strip() + "\n") is not None


@pytest.mark.parametrize(
    ("shown", "printed", "matches"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\n", "a\nb\n", False),
        ("a\n…\n", "a\nb\nc\n", True),
        ("a\n…\n", "a", True),
        ("a … c", "a b c", True),
        ("a.c", "abc", False),
    ],
)
def test_what_is_shown_is_compared(shown: str, printed: str, matches: bool) -> None:
    assert is_shown(shown, printed) is matches


def programs(name: str, *arguments: str) -> Iterator[str]:
    """What stands in for a program: of pip here, and of the others where the machine has none."""
    if name == "pip" and arguments[1] == "install":
        assert arguments[2:] == (".",), arguments
        project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
        info = Path(arguments[0]) / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        groups = project["entry-points"].items()
        lines = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups)
        (info / "entry_points.txt").write_text("".join(lines))
    elif name == "await":  # a script with `await` at its top level
        code = compile(Path(arguments[0]).read_text(), arguments[0], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        asyncio.run(eval(code, {"__name__": "__page__"}))
    elif name == "pip":
        assert arguments[1:3] == ("uninstall", "--yes"), arguments
        [info] = Path(arguments[0]).glob(f"{arguments[3].replace('-', '_')}-*.dist-info")
        shutil.rmtree(info)
    elif name == "redis-cli":
        if arguments[1] == "FCALL":
            with redis.Redis.from_url(arguments[0]) as client:
                yield f'"{client.execute_command(*arguments[1:]).decode()}"'
            return
        *address, command, channel, payload = arguments[1:]
        assert (address[:1], command) in ((["-u"], "PUBLISH"), ([], "PUBLISH")), arguments
        with redis.Redis.from_url(address[-1] if address else arguments[0]) as client:
            yield f"(integer) {client.publish(channel, payload)}"
    else:
        yield curl(arguments)


def curl(arguments: tuple[str, ...]) -> str:
    """What curl prints of an answer: for the options that the pages use, where it is not installed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-s", action="store_true")
    for flag in ("-X", "-d", "-D", "-o"):
        parser.add_argument(flag)
    parser.add_argument("-i", action="store_true")
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("url")
    given = parser.parse_args(arguments)
    url = urlsplit(given.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
    headers = dict(header.split(": ", 1) for header in given.H)
    method = given.X or ("GET" if given.d is None else "POST")
    connection.request(method, given.url.partition(url.netloc)[2] or "/", given.d, headers)
    response = connection.getresponse()
    body = response.read().decode()
    head = f"HTTP/1.1 {response.status} {response.reason}\n"
    head += "".join(f"{name}: {value}\n" for name, value in response.getheaders()) + "\n"
    if given.o:
        Path(given.o).write_text(body, "utf-8")
        body = ""
    return (head if given.i or given.D == "-" else "") + body


if __name__ == "__main__":
    for _line in programs(*sys.argv[1:]):
        sys.stdout.write(f"{_line}\n")
