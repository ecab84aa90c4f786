"""The command line: its words and its exit codes. What ``relay serve`` does is in ``integration/test_serve.py``."""

import subprocess
import sys
from pathlib import Path

import pytest

from relay import __version__
from relay.cli import main
from tests.support.process import Valkey, free_port


class Ran:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


class Run:
    """Runs ``relay`` with arguments in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Ran:
        self._monkeypatch.setattr(sys, "argv", ["relay", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = self._capsys.readouterr()
        code = caught.value.code
        return Ran(code if isinstance(code, int) else 0, out, err)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``run("publish", …)``, on a machine where no relay runs, in a terminal wide enough for every line."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return Run(monkeypatch, capsys)


def test_version_is_printed(run: Run) -> None:
    ran = run("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"{__version__}\n", "")


def test_module_is_the_command() -> None:
    ran = subprocess.run([sys.executable, "-m", "relay", "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{__version__}\n", "")


def test_help_names_the_commands_and_their_options(run: Run) -> None:
    for command, words in (
        ((), ("serve", "publish", "listen", "push", "topics")),
        (("serve",), ("--config", "--host", "--port", "--redis-url", "--workers", "--open")),
        (("listen",), ("TOPIC", "--config", "--url", "--token", "--params", "--count")),
        (("push",), ("TOPIC", "EVENT", "JSON", "--config", "--url", "--token", "--params")),
        (("topics",), ("--config", "--url")),
        (("publish",), ("TOPIC", "EVENT", "JSON", "--config", "--redis-url")),
    ):
        shown = run(*command, "--help").out
        assert [word for word in words if word not in shown] == []


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("serve", "--nonsense"), ("serve", "--port", "x"), ("publish", "t")]
)
def test_wrong_usage_is_exit_code_2(run: Run, arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.err
    assert "Traceback" not in ran.err


# Settings that make no sense: one line that names where, which and what was expected.


@pytest.mark.parametrize("command", [("serve",), ("publish", "room:1", "e", "{}")], ids=["serve", "publish"])
@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("prot = 9000", ["prot", "no such setting"]),
        ("port = 'x'", ["port", "expected", "'x'"]),
        ("port = 70000", ["port", "65535", "70000"]),
        ("[limits]\ntopics_per_socket = 0", ["limits.topics_per_socket", "greater than 0", "got 0"]),
        ("[limits]\nnonsense = 1", ["limits.nonsense", "no such setting"]),
        ("[redis]\ntimeout_s = 'soon'", ["redis.timeout_s", "number", "'soon'"]),
        ("[[topics]]\nmatch = '*'\noverflow = 'explode'", ["topics.0.overflow", "drop-oldest", "'explode'"]),
        ("redis_url = 'http://user:hidden@x'", ["redis_url", "redis://"]),
        ("port = ", ["not a TOML file"]),
        ("\x00", ["not a TOML file"]),
    ],
)
def test_bad_configuration_file_stops_the_start_with_one_line(
    run: Run, tmp_path: Path, command: tuple[str, ...], toml: str, expected: list[str]
) -> None:
    path = tmp_path / "relay.toml"
    path.write_text(toml)
    ran = run(*command, "--config", str(path))
    assert ran.code == 2
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith(f"relay: {path}: ")
    for words in expected:
        assert words in line
    assert "hidden" not in line


def test_missing_configuration_file_stops_the_start(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.toml"
    ran = run("serve", "--config", str(path))
    assert (ran.code, ran.err) == (2, f"relay: {path}: no such configuration file\n")


def test_each_problem_has_a_line_of_its_own(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    path.write_text("port = -1\nworkers = 0\n")
    lines = run("serve", "-c", str(path)).err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"relay: {path}: ") for line in lines)


def test_bad_variable_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_PORT", "x")
    ran = run("serve")
    assert ran.code == 2
    assert ran.err.startswith("relay: environment: port: ")


def test_bad_flag_is_named(run: Run) -> None:
    ran = run("serve", "--port", "70000")
    assert ran.code == 2
    assert ran.err.startswith("relay: command line: port: ")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_listening_beyond_this_machine_is_refused_until_anonymous_is_asked_for(run: Run, host: str) -> None:
    """Source: design.md, *Secure by default*."""
    ran = run("serve", "--host", host)
    assert ran.code == 2
    (line,) = ran.err.splitlines()
    assert host in line
    assert "anonymous" in line


# relay publish.


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("", "e", "{}"), "TOPIC"),
        (("x" * 256, "e", "{}"), "TOPIC"),
        (("phoenix", "e", "{}"), "TOPIC"),
        (("a\nb", "e", "{}"), "TOPIC"),
        (("room:1", "", "{}"), "EVENT"),
        (("room:1", "a:b", "{}"), "EVENT"),
        (("room:1", "phx_reply", "{}"), "EVENT"),
        (("room:1", "e", "{"), "JSON"),
        (("room:1", "e", "hi"), "JSON"),
        (("room:1", "e", ""), "JSON"),
    ],
)
def test_what_cannot_be_published_is_said_in_one_line(run: Run, arguments: tuple[str, ...], word: str) -> None:
    ran = run("publish", *arguments)
    assert ran.code == 2
    (line,) = ran.err.splitlines()
    assert line.startswith(f"relay: {word}: ")


def test_publishing_without_redis_and_without_a_relay_is_said_in_one_line(run: Run) -> None:
    ran = run("publish", "room:1", "e", "{}")
    assert ran.code == 2
    (line,) = ran.err.splitlines()
    assert "--redis-url" in line


def test_publishing_to_redis_says_who_listens(run: Run, valkey: Valkey) -> None:
    ran = run("publish", "room:cli", "e", '{"a": 1}', "--redis-url", valkey.url)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "published to room:cli; 0 relays listening\n"


def test_publishing_to_a_redis_that_is_away_is_exit_code_1(run: Run) -> None:
    ran = run("publish", "room:1", "e", "{}", "--redis-url", f"redis://:hidden@127.0.0.1:{free_port()}")
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert line.startswith("relay: not published: ")
    assert "hidden" not in line


def test_publishing_with_a_wrong_password_is_exit_code_1(run: Run) -> None:
    with Valkey("--requirepass", "right") as server:
        ran = run("publish", "room:1", "e", "{}", "--redis-url", f"redis://:hidden@127.0.0.1:{server.port}")
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert "hidden" not in line


def test_publishing_to_a_redis_that_hangs_is_exit_code_1(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "relay.toml"
    path.write_text("[redis]\ntimeout_s = 0.2\n")
    with Valkey() as server:
        server.pause()
        ran = run("publish", "room:1", "e", "{}", "--redis-url", server.url, "--config", str(path))
        server.resume()
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1


def test_redis_for_somebodys_own_app_is_refused(run: Run) -> None:
    """The app makes its relay itself: a setting that nothing would heed is not taken in silence."""
    ran = run("serve", "main:app", "--redis-url", "redis://localhost:1")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "relay: command line: --redis-url: main:app makes its relay itself; give it to Relay() there\n"


def test_what_is_no_app_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_app_here.py").write_text("app = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    ran = run("serve", "no_app_here:app", "--port", "0")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "relay: MODULE:APP: expected an ASGI app, got 3 for no_app_here:app\n"
