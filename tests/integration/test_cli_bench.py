"""``relay bench``: what it counts, and its words and exit codes against ``relay serve``."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from relay.cli.stats import Listener, latencies_ms, percentile
from tests.support.patience import PATIENCE
from tests.support.process import DEADLINE_S, RelayProcess, Valkey, free_port, wait_for
from tests.support.terminal import run_on_terminal

ROOT = Path(__file__).parents[2]
SHORT = ("--sockets", "6", "--topics", "3", "--rate", "200", "--seconds", "0.5")


def bench(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "relay", "bench", *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def assert_all_came(results: dict[str, Any]) -> None:
    assert results["published"] > 0
    assert results["received"] == results["published"] * 2, "each of 3 topics has 2 sockets"
    assert [results[name] for name in ("lost", "duplicated", "out_of_order", "closed", "problem")] == [0, 0, 0, 0, None]
    latency = results["latency_ms"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    assert results["joins_per_s"] > 0


# What is counted.


@pytest.mark.parametrize(
    ("numbers", "received", "duplicated", "out_of_order"),
    [
        ((), 0, 0, 0),
        ((0, 1, 2), 3, 0, 0),
        ((0, 2), 2, 0, 0),
        ((1, 0), 2, 0, 1),
        ((0, 3, 2, 1, 4), 5, 0, 2),
        ((0, 0, 1), 2, 1, 0),
        ((1, 0, 0), 2, 1, 1),
    ],
)
def test_listener_counts_each_event_once_and_what_comes_late_or_twice(
    numbers: tuple[int, ...], received: int, duplicated: int, out_of_order: int
) -> None:
    listener = Listener("t")
    for number in numbers:
        listener.hear(number)
    assert (listener.received, listener.duplicated, listener.out_of_order) == (received, duplicated, out_of_order)


def test_percentiles_are_by_the_nearest_rank() -> None:
    thousand = range(1, 1001)
    assert [percentile(thousand, part) for part in (0.5, 0.99, 0.999, 1.0)] == [500, 990, 999, 1000]
    assert [percentile([7], part) for part in (0.0, 0.5, 1.0)] == [7, 7, 7]
    assert percentile([], 0.5) == 0


def test_latencies_are_told_in_ms() -> None:
    assert latencies_ms([3_000_000, 1_000_000, 2_004_000]) == {"p50": 2.0, "p99": 3.0, "p99.9": 3.0, "max": 3.0}


# Against a relay.


def test_piped_it_is_a_line_of_json_through_the_redis_of_the_relay_here(relay: RelayProcess) -> None:
    ran = bench(relay.ws, *SHORT, environ=relay.environ)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert_all_came(json.loads(ran.stdout))


def test_without_a_known_redis_it_publishes_by_rest_with_the_key_of_the_settings(
    valkey: Valkey, tmp_path: Path
) -> None:
    config = tmp_path / "key.toml"
    config.write_text("[rest]\napi_key = 'a key'\n")
    with RelayProcess("--redis-url", valkey.url, "--config", str(config)) as relay:
        ran = bench(relay.ws, *SHORT, "--config", str(config), environ=relay.environ)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert_all_came(json.loads(ran.stdout))
        ran = bench(relay.ws, *SHORT, environ=relay.environ)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith(f"relay: {relay.http}/api: HTTP 401: expected the API key; set rest.api_key")


def test_on_a_terminal_it_is_shown_live_and_ends_with_a_report(relay: RelayProcess) -> None:
    command = [sys.executable, "-m", "relay", "bench", relay.ws, *SHORT]
    environ = relay.environ | {"TERM": "xterm", "COLUMNS": "120"}
    code, printed = run_on_terminal(command, cwd=ROOT, env=environ)
    assert code == 0
    assert "joining" in printed and "latency now" in printed, "while it ran"
    report = printed[printed.rindex("relay ") :]
    assert "6 sockets to 3 topics" in report and "p99.9 " in report
    assert "0 lost, 0 duplicated, 0 out of order, 0 closed" in report
    code, printed = run_on_terminal([*command, "--json"], cwd=ROOT, env=environ)
    assert code == 0
    assert_all_came(json.loads(printed))


def test_sockets_beyond_the_limits_of_the_relay_are_told_with_status_and_reason(valkey: Valkey, tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text("[limits]\nsockets_per_address = 4\n")
    with RelayProcess("--redis-url", valkey.url, "--config", str(config)) as relay:
        ran = bench(relay.ws, *SHORT)
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert " of 6 sockets joined, then " in line
    assert "HTTP 429: too many sockets of this address; the relay's settings `limits` say how many" in line


def test_refused_join_is_told_with_its_reason(valkey: Valkey, tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text('[[auth.anonymous]]\nmatch = "room:*"\nrights = ["join"]\n')
    with RelayProcess("--redis-url", valkey.url, "--config", str(config)) as relay:
        ran = bench(relay.ws, *SHORT)
    assert ran.returncode == 1
    assert ran.stderr.startswith("relay: 0 of 6 sockets joined, then phx_join on bench:")
    assert ran.stderr.endswith(": unauthorized\n")


def test_lost_events_are_counted_and_exit_code_1(valkey: Valkey, tmp_path: Path) -> None:
    plugin = tmp_path / "plugins" / "lossy" / "__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(
        "from relay import Plugin\n\nplugin = Plugin('lossy')\n\n\n@plugin.on_event('bench:*', 'tick')\n"
        "def lose(event):\n    return None if event.payload['number'] % 5 == 0 else event\n"
    )
    config = tmp_path / "relay.toml"
    config.write_text(f"[plugins]\npaths = ['{plugin.parents[1]}']\n")
    with RelayProcess("--redis-url", valkey.url, "--config", str(config)) as relay:
        ran = bench(relay.ws, *SHORT, "--redis-url", valkey.url)
    assert (ran.returncode, ran.stderr) == (1, "")
    results = json.loads(ran.stdout)
    assert results["lost"] > 0
    assert results["received"] + results["lost"] == 2 * results["published"]


def test_relay_that_ends_meanwhile_closes_all_and_is_exit_code_1(valkey: Valkey) -> None:
    with RelayProcess("--redis-url", valkey.url) as relay:
        command = [sys.executable, "-m", "relay", "bench", relay.ws, "--redis-url", valkey.url, "--sockets", "2"]
        process = subprocess.Popen(
            [*command, "--topics", "1", "--seconds", "60"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        try:
            wait_for(lambda: events_of(relay) > 0, "events")
            assert relay.stop() == 0
            out, _ = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
            process.wait()
    results = json.loads(out)
    assert (process.returncode, results["closed"]) == (1, 2)
    assert "connection lost: 1012" in results["problem"]


def events_of(relay: RelayProcess) -> int:
    with urlopen(f"{relay.http}/api/topics", timeout=DEADLINE_S) as response:
        found = json.load(response)
    if not found or found[0]["sockets"] < 2:
        return 0
    with urlopen(f"{relay.http}/api/topics/{found[0]['topic']}", timeout=DEADLINE_S) as response:
        return int(json.load(response)["events"])


def test_redis_of_another_relay_is_told(relay: RelayProcess, valkey: Valkey) -> None:
    ran = bench(relay.ws, *SHORT, "--redis-url", valkey.url)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "relay: no relay listens to this Redis; give the --redis-url of the one to load\n"


def test_nobody_there_is_exit_code_1_in_one_line() -> None:
    url = f"ws://127.0.0.1:{free_port()}/socket"
    ran = bench(url)
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"relay: 0 of 100 sockets joined, then {url}")
    assert line.endswith(": no server listens there; does `relay serve` run?")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--sockets", "2", "--topics", "3"), "--topics"),
        (("ftp://x",), "URL"),
        (("ftp://x", "--url", "http://x"), "URL"),
    ],
)
def test_wrong_usage_is_exit_code_2_in_one_line(arguments: tuple[str, ...], word: str) -> None:
    ran = bench(*arguments)
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"relay: {word}: ")


def test_topics_are_no_more_than_sockets_unless_it_is_said(relay: RelayProcess) -> None:
    ran = bench(relay.ws, "--sockets", "3", "--seconds", "0.2", environ=relay.environ)
    assert ran.stderr == ""
    assert (ran.returncode, json.loads(ran.stdout)["topics"]) == (0, 3)


def test_waiting_for_late_events_is_told_as_that(valkey: Valkey, tmp_path: Path) -> None:
    """Here for the last event, which a plugin keeps back."""
    plugin = tmp_path / "plugins" / "lossy" / "__init__.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(
        "from relay import Plugin\n\nplugin = Plugin('lossy')\n\n\n@plugin.on_event('bench:*', 'tick')\n"
        "def lose(event):\n    return event if event.payload['number'] == 0 else None\n"
    )
    with RelayProcess(
        "--redis-url", valkey.url, environ={"RELAY_PLUGINS__PATHS": json.dumps([str(plugin.parents[1])])}
    ) as relay:
        command = [
            sys.executable,
            "-m",
            "relay",
            "bench",
            relay.ws,
            *SHORT[:-1],
            str(2 * PATIENCE),
            "--redis-url",
            valkey.url,
        ]
        environ = relay.environ | {"TERM": "xterm", "COLUMNS": "120"}
        code, printed = run_on_terminal(command, cwd=ROOT, env=environ)
    assert code == 1
    assert "publishing" in printed and "waiting for what is under way" in printed


def test_ctrl_c_ends_it_with_a_report_of_what_there_was(relay: RelayProcess) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "relay", "bench", relay.ws, "--seconds", "60"],
        cwd=ROOT,
        env=os.environ | {"XDG_RUNTIME_DIR": relay.environ["XDG_RUNTIME_DIR"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: events_of(relay) > 0, "events")
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, errors) == (130, "")
    results = json.loads(out)
    assert results["published"] > 0
    assert [results[name] for name in ("lost", "closed", "problem")] == [0, 0, None]
