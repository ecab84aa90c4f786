"""The command line: its words and its exit codes. What ``relay serve`` does is in ``integration/test_serve.py``."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis
from typer.main import get_command

from relay import __version__
from relay.brokers.base import is_position
from relay.brokers.redis_scripts import FUNCTION
from relay.cli.main import app, main
from relay.cli.options import EXAMPLES
from tests.support.cli_page import PAGE, page
from tests.support.patience import PATIENCE
from tests.support.process import DEADLINE_S, Valkey, free_port
from tests.support.terminal import run_on_terminal

ROOT = Path(__file__).parents[2]


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


def test_program_name_is_relay_however_it_is_started() -> None:
    wrong = subprocess.run([sys.executable, "-m", "relay", "nonsense"], capture_output=True, text=True)
    assert wrong.stderr == "relay: no such command 'nonsense'; `relay --help` shows how\n"
    shown = subprocess.run([sys.executable, "-m", "relay", "serve", "--help"], capture_output=True, text=True)
    assert shown.stdout.split()[:3] == ["Usage:", "relay", "serve"]


def test_help_names_the_commands_and_their_options(run: Run) -> None:
    for command, words in (
        (
            (),
            (
                "serve",
                "publish",
                "listen",
                "push",
                "topics",
                "presence",
                "bench",
                "token",
                "check",
                "config",
                "plugins",
            ),
        ),
        (("bench",), ("URL", "--sockets", "--topics", "--rate", "--seconds", "--redis-url", "--token", "--json")),
        (("serve",), ("--config", "--host", "--port", "--redis-url", "--workers", "--open")),
        (("listen",), ("TOPIC", "--config", "--url", "--token", "--params", "--count", "--last", "--since")),
        (("push",), ("TOPIC", "EVENT", "JSON", "--config", "--url", "--token", "--params")),
        (("topics",), ("--config", "--url")),
        (("presence",), ("TOPIC", "--config", "--url")),
        (("publish",), ("TOPIC", "EVENT", "JSON", "--config", "--redis-url")),
    ):
        shown = run(*command, "--help").out
        assert [word for word in words if word not in shown] == []


@pytest.mark.parametrize(
    ("arguments", "said", "command"),
    [
        (("nonsense",), "no such command 'nonsense'", "relay"),
        (("serve", "--nonsense"), "no such option: --nonsense", "relay serve"),
        (("serve", "--port", "x"), "invalid value for '--port': ", "relay serve"),
        (("publish", "t"), "missing argument 'EVENT'", "relay publish"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line_that_says_where_to_look(
    run: Run, arguments: tuple[str, ...], said: str, command: str
) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert line.startswith(f"relay: {said}")
    assert line.endswith(f"; `{command} --help` shows how")


def test_help_shows_names_of_tables_in_their_brackets(run: Run) -> None:
    """Rich takes them for its markup."""
    assert "neither [[topics]] nor prefixes" in " ".join(run("publish", "--help").out.split())


def test_no_arguments_show_the_help(run: Run) -> None:
    ran = run()
    assert (ran.code, ran.err) == (2, "")
    assert "publish" in ran.out


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_of_each_command_teaches_by_examples_and_says_the_exit_codes(run: Run, name: str) -> None:
    shown = run(name, "--help").out
    for line in EXAMPLES[name]:
        assert line in shown
    assert "Exit codes: 0 done, 1 " in shown


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", ["", *EXAMPLES])
def test_help_is_tidy_in_terminals_of_usual_width(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run(*filter(None, [name]), "--help").out.splitlines()
    text = "\n".join(lines)
    assert "(127.0.0.1)" not in text and "[default: (" not in text and "<bool>" not in text
    words = itertools.takewhile(lambda line: not line.startswith("╭"), lines[3:])
    prose = [line.rstrip() for line in words]
    for line, following in itertools.pairwise(prose):
        if line and following:
            assert len(f"{line} {following.split()[0]}") > columns - 2, f"ends early: {line!r}"


def test_defaults_that_are_texts_are_shown_in_one_pair_of_brackets(run: Run) -> None:
    assert "Address to listen on. [default: 127.0.0.1]" in run("serve", "--help").out


def test_examples_are_of_all_commands_and_name_options_that_there_are(run: Run) -> None:
    commands: dict[str, Any] = vars(get_command(app))["commands"]
    assert set(EXAMPLES) == set(commands)
    for name, lines in EXAMPLES.items():
        known = {option for parameter in commands[name].params for option in parameter.opts}
        for line in lines:
            program, command, *words = shlex.split(line.partition("|")[0])
            assert (program, command) == ("relay", name)
            assert {word for word in words if word.startswith("--")} <= known, line


def test_page_on_the_command_line_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run python -m tests.support.cli_page"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("relay pu", {"publish", "push"}),
        ("relay be", {"bench"}),
        ("relay listen --co", {"--config", "--count"}),
    ],
)
def test_shell_completion_offers_commands_and_options(typed: str, offered: set[str]) -> None:
    words = typed.split()
    asked = {"_RELAY_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    # By its name: what a shell asks is the installed command.
    program = Path(sys.executable).with_name("relay")
    ran = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (ran.returncode, set(ran.stdout.split()), ran.stderr) == (0, offered, "")


def test_shell_completion_is_shown_for_a_shell(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert "_RELAY_COMPLETE=complete_bash" in run("--show-completion", "bash").out


def test_plugins_piped_are_a_line_of_json_each(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plugins" / "broken").mkdir(parents=True)
    (tmp_path / "plugins" / "broken" / "__init__.py").write_text("1 / 0")
    path = tmp_path / "relay.toml"
    path.write_text(f"[plugins]\npaths = ['{tmp_path}/plugins']\n")
    ran = run("plugins", "--config", str(path))
    assert (ran.code, ran.err) == (1, "")
    assert [json.loads(line) for line in ran.out.splitlines()] == [
        {"name": "system", "source": "built-in", "registers": ["service → tell"], "fault": None},
        {
            "name": "broken",
            "source": f"{tmp_path}/plugins/broken",
            "registers": [],
            "fault": "ZeroDivisionError: division by zero",
        },
    ]


def test_publish_on_a_terminal_is_for_reading(valkey: Valkey) -> None:
    command = [sys.executable, "-m", "relay", "publish", "room:cli", "e", "{}", "--redis-url", valkey.url]
    code, printed = run_on_terminal(command, cwd=Path.cwd(), env=os.environ)
    assert (code, printed) == (0, "published to room:cli; 0 relays listening\n")


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


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
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
    assert json.loads(ran.out) == {"topic": "room:cli", "event": "e", "relays": 0}


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


@pytest.mark.parametrize("option", ["--redis-url", "--config"])
@pytest.mark.parametrize("command", ["serve", "check"])
def test_option_of_an_unset_variable_of_the_shell_is_refused(run: Run, command: str, option: str) -> None:
    ran = run(command, option, "")
    assert (ran.code, ran.out) == (2, "")
    assert "it is empty; is a variable of the shell not set?" in ran.err and option in ran.err


@pytest.mark.parametrize("option", ["--rate", "--seconds"])
def test_bench_takes_finite_numbers(run: Run, option: str) -> None:
    ran = run("bench", option, "inf")
    assert (ran.code, ran.out) == (2, "")
    assert "expected a finite number, got inf" in ran.err


def in_shell(line: str, **environ: str) -> Ran:
    """Run a line of a shell, in which ``$RELAY`` is this command."""
    variables = os.environ | {"RELAY": f"{sys.executable} -m relay", "PYTHONPATH": str(ROOT)} | environ
    ran = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=variables, timeout=30 * PATIENCE)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


@pytest.mark.parametrize("command", ["config", "check", "--help", "--version"])
def test_full_disk_is_said_in_one_line(command: str) -> None:
    ran = in_shell(f"$RELAY {command} > /dev/full")
    assert (ran.code, ran.err) == (1, "relay: output: cannot be written: No space left on device\n")


def test_closed_output_is_no_fault() -> None:
    ran = in_shell("$RELAY config <&- >&-")
    assert (ran.code, ran.err) == (0, "")
    assert in_shell("$RELAY nonsense 2>&-").code == 2


def test_completion_that_cannot_be_installed_is_said_in_one_line() -> None:
    ran = in_shell(
        "$RELAY --install-completion bash", HOME="/proc/nowhere", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert ran.err.startswith("relay: /proc/nowhere")


@pytest.mark.parametrize("anonymous", ["true", "false"])
def test_name_that_does_not_resolve_is_said_of_the_host(
    run: Run, monkeypatch: pytest.MonkeyPatch, anonymous: str
) -> None:
    monkeypatch.setenv("RELAY_ALLOW_ANONYMOUS", anonymous)
    ran = run("serve", "--port", "0", "--host", "nowhere.invalid")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("relay: host: nowhere.invalid is no address of this machine, nor the name of one (")


def test_address_of_another_machine_is_said_of_the_host(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_ALLOW_ANONYMOUS", "true")
    ran = run("serve", "--port", "0", "--host", "192.0.2.1")  # RFC 5737: for documentation
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("relay: host: 192.0.2.1 is no address of this machine (")


def test_number_of_workers_that_is_a_port_is_refused(run: Run) -> None:
    ran = run("serve", "--workers", "8000")
    said = "relay: command line: workers: expected less than or equal to 1024, got 8000\n"
    assert (ran.code, ran.out, ran.err) == (2, "", said)


@pytest.mark.parametrize("value", ["two", "0", "-1", "1.5", "8000", "9" * 5000])
def test_web_concurrency_that_is_no_number_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", value)
    ran = run("serve")
    said = "relay: environment: WEB_CONCURRENCY: expected a number of workers, 1 to 1024, got "
    assert (ran.code, ran.out, ran.err) == (2, "", f"{said}{value!r:.60}\n")


# Histories.


SETTINGS = """\
[redis]
topic_prefix = "history:"
to_prefix = "live:"
[limits]
payload_max_bytes = 1000
[[topics]]
match = "room:*"
history = { size = 10, ttl_s = 60 }
"""


@pytest.fixture
def settings(tmp_path: Path, valkey: Valkey) -> Path:
    path = tmp_path / "relay.toml"
    path.write_text(f'redis_url = "{valkey.url}"\n{SETTINGS}')
    return path


def entries(valkey: Valkey, key: str) -> list[Any]:
    with Redis(port=valkey.port) as redis:
        return [{name: row[name] for name in (b"e", b"d")} for _, row in redis.xrange(key)]


def test_commands_that_config_prints_append_to_the_history(
    run: Run, settings: Path, valkey: Valkey, tmp_path: Path
) -> None:
    topic = f"room:it's {uuid4().hex}"
    ran = run("config", "--topic", topic, "--config", str(settings))
    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    assert printed["from"] == "topics.0: room:*"
    assert printed["history"] == {"size": 10, "ttl_s": 60}
    key = f"history:{topic}"
    args = ["new_msg", '{"text":"hi"}', "10", "60", "", "1000"]
    assert printed["fcall"] == ["redis-cli", "FCALL", "relay_publish", "1", key, *args]
    assert printed["eval"] == ["redis-cli", "--eval", "publish.lua", key, ",", *args]
    with Redis(port=valkey.port) as redis:
        redis.function_load(FUNCTION, replace=True)
        assert is_position(redis.execute_command(*printed["fcall"][1:]).decode())
        assert is_position(redis.eval(printed["script"], 1, key, *args).decode())
        assert 60 < redis.ttl(key) <= 360
    assert entries(valkey, key) == [{b"e": b"new_msg", b"d": b'{"text":"hi"}'}] * 2
    if redis_cli := shutil.which("redis-cli"):
        (tmp_path / "publish.lua").write_text(printed["script"])
        for command in (printed["fcall"], printed["eval"]):
            line = [redis_cli, "-p", str(valkey.port), *command[1:]]
            position = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
            assert is_position(position.strip())
        assert len(entries(valkey, key)) == 4


def test_config_of_a_topic_without_history(run: Run, settings: Path) -> None:
    printed = json.loads(run("config", "--topic", "other", "--config", str(settings)).out)
    assert (printed["from"], printed["history"], printed["overflow"]) == ("defaults", None, "disconnect")
    assert printed["publish"] == ["redis-cli", "PUBLISH", "live:other:new_msg", '{"text":"hi"}']
    assert not {"fcall", "eval", "script"} & set(printed)
    settings.write_text('broadcast_url = "memory://"\n[[topics]]\nmatch = "*"\nhistory = {}')
    printed = json.loads(run("config", "--topic", "other", "--config", str(settings)).out)
    assert printed["history"] == {"size": 1000, "ttl_s": 3600}
    assert not {"publish", "fcall", "eval"} & set(printed), "no other program can publish on this bus"


def test_config_on_a_terminal_is_for_pasting(settings: Path) -> None:
    command = [sys.executable, "-m", "relay", "config", "--topic", "room:it's", "--config", str(settings)]
    code, printed = run_on_terminal(command, cwd=Path.cwd(), env=dict(os.environ, TERM="dumb", COLUMNS="200"))
    assert code == 0
    lines = [shlex.split(line) for line in printed.splitlines() if line.startswith("  r")]
    args = ["history:room:it's", ",", "new_msg", '{"text":"hi"}', "10", "60", "", "1000"]
    assert lines[2] == ["redis-cli", "--eval", "publish.lua", *args]
    assert lines[1] == [*command[2:], "|", "jq", "-r", ".script", ">", "publish.lua"]
    assert "history         size = 10, ttl_s = 60\n" in printed
    settings.write_text('broadcast_url = "memory://"')
    assert (
        "The bus is not Redis"
        in run_on_terminal(command, cwd=Path.cwd(), env=dict(os.environ, TERM="dumb", COLUMNS="200"))[1]
    )


def test_publish_appends_under_the_names_of_the_settings(run: Run, settings: Path, valkey: Valkey) -> None:
    """Relays of another application on this Redis may have written other ones there."""
    topic = f"room:{uuid4().hex}"
    with Redis(port=valkey.port) as redis:
        other = {"to_prefix": "to:", "topic_prefix": "topic:", "payload_max_bytes": "9", "topics": "[]"}
        redis.hset("relay:settings", mapping=other)
    ran = run("publish", topic, "e", '{"n": 9007199254740993}', "--config", str(settings))
    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    assert is_position(printed.pop("position"))
    assert printed == {"topic": topic, "event": "e"}
    assert entries(valkey, f"history:{topic}") == [{b"e": b"e", b"d": b'{"n": 9007199254740993}'}]
    (line,) = run("publish", topic, "e", json.dumps("x" * 999), "--config", str(settings)).err.splitlines()
    assert line.startswith(
        f"relay: not published: event 'e' on topic '{topic}': expected a payload of at most 1000 bytes"
    )
    with Redis(port=valkey.port) as redis:
        redis.delete("relay:settings")
    ran = run("publish", topic, "e", "{}", "--redis-url", valkey.url)
    assert json.loads(ran.out)["relays"] == 0, "neither settings nor relays say that the topic has a history"


def test_publish_with_history_on_a_terminal(settings: Path) -> None:
    command = [sys.executable, "-m", "relay", "publish", "room:cli", "e", "{}", "--config", str(settings)]
    code, printed = run_on_terminal(command, cwd=Path.cwd(), env=dict(os.environ, TERM="dumb"))
    assert code == 0
    assert printed.startswith("published to room:cli at ")


def test_config_lists_all_settings_with_their_sources_and_without_secrets(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "relay.toml"
    file.write_text(
        'port = 9000\norigins = ["https://a.example"]\n[rest]\napi_key = "hunter2-hunter2"\npath = "/rest"\n'
        '[auth]\nkeys = ["hunter2-of-32-bytes-and-some-more"]\n[[topics]]\nmatch = "room:*"\npush = false\n'
    )
    monkeypatch.setenv("RELAY_LIMITS__SOCKETS_MAX", "77")
    monkeypatch.setenv("relay_redis", '{"to_prefix": "in:"}')
    monkeypatch.setenv("RELAY_ANONYMOUS", "true")
    ran = run("config", "-c", str(file), "--port", "9001", "--redis-url", "redis://ada:hunter2@redis.example/0")
    assert (ran.code, ran.err) == (0, "")
    assert "hunter2" not in ran.out
    lines = {line["setting"]: line for line in map(json.loads, ran.out.splitlines())}
    found = {
        name: (line["value"], line["source"], line["from"])
        for name, line in lines.items()
        if line["source"] != "default"
    }
    assert found == {
        "port": (9001, "flag", "--port"),
        "redis_url": ("redis://<redis_url>@redis.example/0", "flag", "--redis-url"),
        "limits.sockets_max": (77, "variable", "RELAY_LIMITS__SOCKETS_MAX"),
        "redis.to_prefix": ("in:", "variable", "relay_redis"),
        "allow_anonymous": (True, "variable", "RELAY_ANONYMOUS"),
        "allowed_origins": (["https://a.example"], "file", str(file)),
        "rest.api_key": ("<rest.api_key>", "file", str(file)),
        "rest.path": ("/rest", "file", str(file)),
        "auth.keys.0.key": ("<auth.keys.key>", "file", str(file)),
        "topics.0.match": ("room:*", "file", str(file)),
        "topics.0.push": (False, "file", str(file)),
    }
    assert lines["host"] == {"setting": "host", "value": "127.0.0.1", "source": "default", "from": None}
    assert lines["topics.0.history"]["source"] == "default"


def test_config_lists_the_settings_on_a_terminal() -> None:
    env = {**os.environ, "RELAY_PORT": "9009", "COLUMNS": "160"}
    code, shown = run_on_terminal([sys.executable, "-m", "relay", "config"], cwd=ROOT, env=env)
    shown = re.sub("\x1b\\[[0-9;]*m", "", shown)
    assert code == 0
    assert re.search(r"port +9009 +variable RELAY_PORT", shown)
    assert re.search(r'redis\.to_prefix +"to:" +default', shown)
