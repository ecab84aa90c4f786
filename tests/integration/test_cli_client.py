"""``relay listen``, ``push``, ``topics`` and ``presence`` as processes, on a terminal and piped."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.request import Request, urlopen
from uuid import uuid4

import pytest
import redis
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_websocket

from tests.support.process import DEADLINE_S, RelayProcess, Valkey, free_port, wait_for
from tests.support.servers import AppServer
from tests.support.terminal import run_on_terminal

ROOT = Path(__file__).parents[2]


def relay_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "relay", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        relay_command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


class OneEvent:
    """A server that answers the join, tells one event, and notes how clients close."""

    def __init__(self) -> None:
        self.close_codes: list[int | None] = []

    def _serve(self, connection: ServerConnection) -> None:
        join_ref, ref, topic, *_ = json.loads(connection.recv())
        connection.send(json.dumps([join_ref, ref, topic, "phx_reply", {"status": "ok", "response": {}}]))
        connection.send(json.dumps([None, None, topic, "n", {}]))
        with suppress(ConnectionClosed):
            connection.recv()
        self.close_codes.append(connection.close_code)

    def __enter__(self) -> Self:
        self._server = serve_websocket(self._serve, "127.0.0.1", 0)
        self.url = f"ws://127.0.0.1:{self._server.socket.getsockname()[1]}/socket"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()


class Listening:
    """A running ``relay listen``, joined; its output goes to a pipe, or to a terminal of its own."""

    def __init__(self, relay: RelayProcess, topic: str, *arguments: str, terminal: bool = False) -> None:
        self._ours, theirs = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            relay_command("listen", topic, "--url", relay.ws, *arguments),
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(theirs)
        self._pieces: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        wait_for(lambda: topic in joined(relay) or self.process.poll() is not None, "the join")

    def _read(self) -> None:
        try:
            while piece := os.read(self._ours, 65536):
                self._pieces.append(piece)
        except OSError:  # how a terminal ends
            pass

    @property
    def output(self) -> str:
        return b"".join(self._pieces).decode()

    def end(self, *, code: int) -> str:
        """Wait for the end; returns what was said on standard error."""
        _, errors = self.process.communicate(timeout=DEADLINE_S)
        self._reader.join(DEADLINE_S)
        assert self.process.returncode == code, errors
        return errors

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        self._reader.join(DEADLINE_S)
        os.close(self._ours)


@contextmanager
def listening(*arguments: Any, **options: Any) -> Iterator[Listening]:
    it = Listening(*arguments, **options)
    try:
        yield it
    finally:
        it.close()


def joined(relay: RelayProcess) -> dict[str, int]:
    with urlopen(f"{relay.http}/api/topics", timeout=DEADLINE_S) as response:
        return {one["topic"]: one["sockets"] for one in json.load(response)}


def publish(relay: RelayProcess, redis_channel: str, *payloads: bytes) -> None:
    publish_to(relay.redis_url, redis_channel, *payloads)


def publish_to(redis_url: str, redis_channel: str, *payloads: bytes) -> None:
    with redis.Redis.from_url(redis_url) as client, client.pipeline(transaction=False) as pipeline:
        for payload in payloads:
            pipeline.publish(redis_channel, payload)
        pipeline.execute()


def test_listen_piped_is_a_line_of_json_each(relay: RelayProcess) -> None:
    with listening(relay, "cli:piped", "--count", "2") as it:
        publish(relay, "to:cli:piped:new_msg", '{"text":"hï"}'.encode())
        publish(relay, "to:cli:piped:raw", b"\0\xff")
        assert it.end(code=0) == ""
        assert [json.loads(line) for line in it.output.splitlines()] == [
            {"topic": "cli:piped", "event": "new_msg", "payload": {"text": "hï"}},
            {"topic": "cli:piped", "event": "raw", "payload_base64": "AP8="},
        ]


def test_listen_on_a_terminal_is_for_reading_and_shows_rates_when_there_is_too_much(relay: RelayProcess) -> None:
    with listening(relay, "cli:terminal", terminal=True) as it:
        publish(relay, "to:cli:terminal:new_msg", '{"text":"hi \u009b31m"}'.encode())
        wait_for(lambda: "new_msg" in it.output, "the event")
        assert '{"text": "hi \\x9b31m"}' in it.output, "and nothing in it steers the terminal"
        publish(relay, "to:cli:terminal:tick", *(str(number).encode() for number in range(500)))
        wait_for(lambda: "not shown" in it.output, "the rates")
        assert "events/s" in it.output and it.output.count("tick") < 100
        it.process.send_signal(signal.SIGINT)
        assert it.end(code=0) == "listening to cli:terminal; Ctrl+C ends\n"


def test_listen_says_a_gap_and_joins_again() -> None:
    with Valkey() as own, RelayProcess("--redis-url", own.url) as relay:
        with listening(relay, "cli:gap", "--count", "1") as it:
            own.kill()
            own.start()

            def is_over() -> bool:
                with redis.Redis.from_url(own.url) as client:
                    client.publish("to:cli:gap:n", "7")
                return it.process.poll() is not None

            wait_for(is_over, "an event after the gap")
            assert it.end(code=0) == "relay: cli:gap: events may have been missed; joining again\n"
            assert json.loads(it.output)["payload"] == 7


def test_listen_connects_again_when_the_relay_restarts_and_says_the_gap(valkey: Valkey) -> None:
    arguments = ("--redis-url", valkey.url, "--port", str(free_port()))
    with ExitStack() as stack:
        with RelayProcess(*arguments) as relay:
            it = stack.enter_context(listening(relay, "cli:lost", "--count", "1"))
        with RelayProcess(*arguments) as again:
            wait_for(lambda: "cli:lost" in joined(again), "the join")
            publish_to(valkey.url, "to:cli:lost:n", b"7")
            said = f"relay: {again.ws}/websocket: connection lost: 1012 "
            assert it.end(code=0).startswith(said)
        assert json.loads(it.output)["payload"] == 7


def test_listen_ends_when_it_is_refused_after_a_restart(valkey: Valkey) -> None:
    arguments = ("--redis-url", valkey.url, "--port", str(free_port()))
    with ExitStack() as stack:
        with RelayProcess(*arguments) as relay:
            it = stack.enter_context(listening(relay, "cli:lost"))
        with RelayProcess(*arguments, environ={"RELAY_AUTH__KEYS": f'["{"k" * 32}"]'}):
            lost, refused = it.end(code=1).splitlines()
        assert lost.endswith("; events may be missed; connecting again")
        assert ": HTTP 401: " in refused


def test_push_shows_the_reply(relay: RelayProcess) -> None:
    ran = run("push", "cli:push", "new_msg", '{"text":"hi"}', "--url", relay.ws, "--token", "t")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "{}\n", "")


def test_refusal_is_exit_code_1_with_the_reason(valkey: Valkey, tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text('[[topics]]\nmatch = "*"\npush = false\n')
    with RelayProcess("--redis-url", valkey.url, "--config", str(config)) as relay:
        ran = run("push", "cli:refused", "e", "{}", "--url", relay.ws)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "relay: e on cli:refused: push not allowed\n"


HISTORY = {"RELAY_TOPICS": json.dumps([{"match": "room:*", "history": {"size": 5, "ttl_s": 60}}])}


def post(relay: RelayProcess, topic: str, *payloads: Any) -> None:
    events = [{"topic": topic, "event": "new", "payload": payload} for payload in payloads]
    body = json.dumps({"events": events}).encode()
    request = Request(f"{relay.http}/api/publish", body, {"content-type": "application/json"})
    with urlopen(request, timeout=DEADLINE_S) as response:
        assert json.load(response) == {"published": len(payloads)}


def shown(it: Listening) -> list[Any]:
    return [json.loads(line) for line in it.output.splitlines()]


def test_listen_begins_with_the_last_events_or_behind_a_position(valkey: Valkey) -> None:
    topic = f"room:{uuid4().hex}"
    with RelayProcess("--redis-url", valkey.url, environ=HISTORY) as relay:
        post(relay, topic, {"n": 1}, [2], {"n": 3}, "four")
        listed = run("listen", topic, "--url", relay.ws, "--last", "3", "--count", "3")
        assert (listed.returncode, listed.stderr) == (0, "")
        events = [json.loads(line) for line in listed.stdout.splitlines()]
        assert [event["payload"] for event in events] == [[2], {"n": 3}, "four"]
        assert [event["position"].partition("-")[2] for event in events] == ["2", "3", "4"]
        since = events[0]["position"]
        with listening(relay, topic, "--since", since, "--count", "4") as it:
            wait_for(lambda: len(it.output.splitlines()) == 2, "the missed events")
            publish_to(valkey.url, f"to:{topic}:live", b'{"n":5}')
            publish_to(valkey.url, f"to:{topic}:live", b"6")
            assert it.end(code=0) == ""
            assert [event["payload"] for event in shown(it)] == [{"n": 3}, "four", {"n": 5}, 6]
            assert ["position" in event for event in shown(it)] == [True, True, False, False]
        post(relay, topic, *range(10))
        with listening(relay, topic, "--since", since, "--count", "1", terminal=True) as it:
            post(relay, topic, {"n": 7})
            assert f"relay: {topic}: not recovered: history expired; events may be missing\n" in it.end(code=0)
            assert '{"n": 7} 1' in re.sub("\x1b\\[[0-9;]*m", "", it.output)
        with listening(relay, "other:1", "--last", "1", "--count", "1") as it:
            publish_to(valkey.url, "to:other:1:live", b"{}")
            assert "the topic has no history; nothing is recovered" in it.end(code=0)


def test_listen_catches_up_after_a_restart_of_the_relay(valkey: Valkey) -> None:
    with ExitStack() as stack:
        port = str(free_port())
        arguments = ("--redis-url", valkey.url, "--port", port)
        with RelayProcess(*arguments, environ=HISTORY) as relay:
            it = stack.enter_context(listening(relay, "room:back", "--last", "0", "--count", "3"))
            post(relay, "room:back", {"n": 1})
            wait_for(lambda: it.output, "the event")
        with RelayProcess(*arguments, environ=HISTORY) as relay:
            post(relay, "room:back", {"n": 2}, {"n": 3})
            errors = it.end(code=0)
            assert [event["payload"]["n"] for event in shown(it)] == [1, 2, 3]
            assert "connecting again" in errors
            assert "missed" not in errors


@pytest.mark.parametrize("command", [("listen", "secret"), ("push", "secret", "e", "{}")], ids=["listen", "push"])
def test_refused_join_is_exit_code_1_with_the_reason(valkey: Valkey, tmp_path: Path, command: tuple[str, ...]) -> None:
    config = tmp_path / "relay.toml"
    config.write_text('[[auth.anonymous]]\nmatch = "open"\nrights = ["join"]\n')
    with RelayProcess("--redis-url", valkey.url, "--config", str(config)) as relay:
        ran = run(*command, "--url", relay.ws)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "relay: phx_join on secret: unauthorized\n"


def test_wrong_address_is_exit_code_1_with_what_the_server_said(relay: RelayProcess) -> None:
    ran = run("push", "t", "e", "{}", "--url", f"{relay.ws}/nowhere", "--token", "hidden")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith(f"relay: {relay.ws}/nowhere/websocket: HTTP 404")
    assert "hidden" not in ran.stderr


@pytest.mark.parametrize(
    "command",
    [("listen", "t"), ("push", "t", "e", "{}"), ("topics",), ("presence", "t")],
    ids=["listen", "push", "topics", "presence"],
)
def test_nobody_there_is_exit_code_1_in_one_line(command: tuple[str, ...]) -> None:
    place = f"127.0.0.1:{free_port()}/x"
    url = f"http://{place}"
    ran = run(*command, "--url", url)
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    scheme, path = ("http", "/api") if command[0] in ("topics", "presence") else ("ws", "/socket/websocket")
    assert line.startswith(f"relay: {scheme}://{place}{path}")
    assert line.endswith(": no server listens there; does `relay serve` run?")


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("listen", ""), "TOPIC"),
        (("listen", "t", "--params", "{"), "--params"),
        (("listen", "t", "--url", "ftp://x"), "--url"),
        (("listen", "t", "--since", "x"), "--since"),
        (("listen", "t", "--last", "-1"), "invalid value for '--last'"),
        (("listen", "t", "--last", "1", "--params", "[]"), "--params"),
        (("topics", "--url", "nonsense"), "--url"),
        (("presence", "t", "--url", "nonsense"), "--url"),
        (("presence", "phoenix"), "TOPIC: 'phoenix' belongs to the protocol"),
        (("push", "phoenix", "e", "{}"), "TOPIC: 'phoenix' belongs to the protocol"),
        (("push", "t", "a:b", "{}"), "EVENT"),
        (("push", "t", "e", "{"), "JSON"),
    ],
)
def test_wrong_usage_is_exit_code_2_in_one_line(command: tuple[str, ...], word: str) -> None:
    ran = run(*command)
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"relay: {word}: ")


def test_topics_are_listed_with_their_sockets_and_the_key_of_the_settings(valkey: Valkey, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "relay.toml"
    config.write_text(f"port = {port}\nredis_url = '{valkey.url}'\n[rest]\napi_key = 'a key'\n")
    with RelayProcess("--config", str(config), "--port", str(port)) as relay:
        ran = run("topics", "--config", str(config))
        assert (ran.returncode, ran.stderr) == (0, "")
        assert [json.loads(line)["topic"] for line in ran.stdout.splitlines()] == []
        refused = run("topics", "--url", f"{relay.http}/api")
        said = "HTTP 401: expected the API key; set rest.api_key or RELAY_REST__API_KEY as it is set there"
        assert (refused.returncode, refused.stderr) == (1, f"relay: {relay.http}/api: {said}\n")
        joining = relay_command("listen", "cli:listed", "--config", str(config), "--count", "1")
        process = subprocess.Popen(joining, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: run("topics", "--config", str(config)).stdout, "the join")
            ran = run("topics", "--config", str(config))
            assert json.loads(ran.stdout) == {"topic": "cli:listed", "sockets": 1}
        finally:
            process.terminate()
            process.wait()


@pytest.mark.parametrize("body", [b"nothing", b'{"title": "x"}', b"[]"])
def test_answer_of_somebody_else_is_told_by_its_status(body: bytes) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404) if body == b"nothing" else self.send_response(404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x"
        ran = run("topics", "--url", url)
    assert (ran.returncode, ran.stderr) == (1, f"relay: {url}/api: HTTP 404: Not Found\n")


MOUNTED = """
from relay import Relay
from starlette.applications import Starlette
app = Starlette()
Relay("embedded", topics=[{"match": "cli:*", "presence": True}]).install(app, "/relay")
"""


@pytest.mark.parametrize("end", ["", "/", "/socket", "/api"])
def test_one_url_serves_all_client_commands(end: str) -> None:
    with AppServer("relay", MOUNTED, ready="/relay/ready") as server:
        url = f"{server.http}/relay{end}"
        joining = relay_command("listen", "cli:one", "--url", url)
        process = subprocess.Popen(joining, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            wait_for(lambda: run("topics", "--url", url).stdout, "the join")
            assert json.loads(run("topics", "--url", url).stdout) == {"topic": "cli:one", "sockets": 1}
            assert len(run("presence", "cli:one", "--url", url).stdout.splitlines()) == 1
            assert run("push", "cli:one", "e", "{}", "--url", url).returncode == 0
            bench = run("bench", "--url", url, "--sockets", "1", "--seconds", "0.2", "--rate", "10")
            assert json.loads(bench.stdout)["lost"] == 0
        finally:
            process.terminate()
            process.communicate()


def test_topics_of_one_of_several_workers_are_told_to_be_that() -> None:
    with RelayProcess("--workers", "2") as relay:
        ran = run("topics", "--url", f"{relay.http}/api/")
    assert (ran.returncode, ran.stdout) == (0, "")
    assert ran.stderr == "relay: these are the topics of one of 2 workers; each knows its own sockets alone\n"


def test_listen_ends_quietly_when_nobody_reads_any_more(relay: RelayProcess) -> None:
    """As with ``| head -1``."""
    command = relay_command("listen", "cli:unread", "--url", relay.ws)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: "cli:unread" in joined(relay), "the join")
        assert process.stdout is not None
        process.stdout.close()
        publish(relay, "to:cli:unread:n", b"1")
        assert process.wait(DEADLINE_S) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize("arguments", [(), ("--count", "1")], ids=["Ctrl+C", "count"])
def test_listen_closes_its_connection_in_good_order(arguments: tuple[str, ...]) -> None:
    with OneEvent() as server:
        command = relay_command("listen", "t", "--url", server.url, *arguments)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline()
        if not arguments:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
        wait_for(lambda: server.close_codes == [1000], "the close")


def test_topics_on_a_terminal_are_a_table(relay: RelayProcess) -> None:
    command = relay_command("topics", "--url", f"{relay.http}/api")
    environ = {**os.environ, "TERM": "dumb", "COLUMNS": "80"}
    with listening(relay, "cli:table:1"), listening(relay, "cli:table:1"), listening(relay, "cli:table:2"):
        wait_for(lambda: joined(relay).get("cli:table:1") == 2, "both joins")
        code, printed = run_on_terminal(command, cwd=ROOT, env=environ)
    header, *rows = [line.split() for line in printed.splitlines()]
    assert (code, header) == (0, ["topic", "sockets"])
    assert [row for row in rows if row[0].startswith("cli:table")] == [["cli:table:1", "2"], ["cli:table:2", "1"]]


PRESENCE = {
    "RELAY_TOPICS": json.dumps([{"match": "room:*", "presence": True}, {"match": "many:*", "presence": "count"}]),
    "RELAY_PRESENCE__LEAVE_DELAY_S": "0",
}


def test_members_are_listed(valkey: Valkey) -> None:
    with RelayProcess("--redis-url", valkey.url, environ=PRESENCE) as relay:
        command = ("presence", "--url", f"{relay.http}/api")
        assert (run(*command, "room:zürich & 1").returncode, run(*command, "room:zürich & 1").stdout) == (0, "")
        with (
            listening(relay, "room:zürich & 1", "--params", '{"presence": {"name": "Ada\\u001b[31m"}}'),
            listening(relay, "many:1"),
            listening(relay, "many:1"),
        ):
            wait_for(lambda: run(*command, "room:zürich & 1").stdout, "the join")
            (member,) = map(json.loads, run(*command, "room:zürich & 1").stdout.splitlines())
            assert member == {"key": member["key"], "meta": {"meta": {"name": "Ada\x1b[31m"}}}
            wait_for(lambda: run(*command, "many:1").stdout == '{"count": 2}\n', "both joins")
            environ = {**os.environ, "TERM": "dumb", "COLUMNS": "80"}
            code, printed = run_on_terminal(relay_command(*command, "room:zürich & 1"), cwd=ROOT, env=environ)
            header, row = printed.splitlines()
            assert (code, header.split(), row.split()[0]) == (0, ["key", "meta"], member["key"])
            assert "Ada" in row and "\x1b" not in row
            assert run_on_terminal(relay_command(*command, "many:1"), cwd=ROOT, env=environ) == (0, "members: 2\n")
        refused = run(*command, "other:1")
        detail = "topic 'other:1' has no presence; set presence for it in [[topics]]"
        assert (refused.returncode, refused.stderr) == (1, f"relay: {relay.http}/api: HTTP 404: {detail}\n")


class Redirecting:
    """An HTTP server that answers with a redirect to itself, and notes what it was asked with."""

    def __init__(self, location: str) -> None:
        heads = self.heads = []  # type: list[dict[str, str]]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                heads.append({name.lower(): value for name, value in self.headers.items()})
                self.send_response(302)
                port = self.headers["Host"].rpartition(":")[2]
                self.send_header("Location", location.format(port=port))
                self.send_header("Content-Length", "0")
                self.send_header("Connection", "close")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.parametrize("command", ["listen", "push", "topics", "bench"])
def test_redirect_is_an_error_and_no_token_or_key_goes_along(command: str, tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text('[rest]\napi_key = "hunter2-and-nine"\n')
    scheme = "http" if command == "topics" else "ws"
    with Redirecting(f"{scheme}://localhost:{{port}}/x?key=hunter2") as server:
        url = f"{scheme}://{server.address}"
        arguments = {
            "listen": ("listen", "t", "--token", "hunter2", "--url", url),
            "push": ("push", "t", "e", "{}", "--token", "hunter2", "--url", url),
            "topics": ("topics", "--url", url, "--config", str(config)),
            "bench": ("bench", url, "--sockets", "1", "--topics", "1", "--seconds", "1"),
        }
        ran = run(*arguments[command])
        port = server.address.partition(":")[2]
        assert len(server.heads) == 1, "asked once"
    assert (ran.returncode, ran.stdout) == (1, "")
    assert f"HTTP 302, a redirect to {scheme}://localhost:{port}; none is followed" in ran.stderr
    assert "hunter2" not in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (("push", "t", "e", '"\\ud83d"'), "JSON: expected text that UTF-8 can encode"),
        (("push", "t", "e", '{"\\ud83d": 1}'), "JSON: expected text that UTF-8 can encode"),
        (("push", "t", "e", b'"\xff"'), "JSON: expected text that UTF-8 can encode"),
        (("push", "t", "e", '{"x": NaN}'), "JSON: NaN is no JSON"),
        (("push", "t", "e", "[-Infinity]"), "JSON: -Infinity is no JSON"),
        (("push", "t", "e", "[" * 50_000), "JSON: "),
        (("push", "t", "e", "1" * 5_000), "JSON: "),
        (("push", "t", b"\xff", "{}"), "EVENT: "),
        (("push", b"\xff", "e", "{}"), "TOPIC: "),
        (("push", "t", "e", "{}", "--params", '{"a": "\\ud83d"}'), "--params: expected text that UTF-8 can encode"),
        (("listen", "t", "--params", "NaN"), "--params: NaN is no JSON"),
        (("listen", "t", "--token", b"hunter2\xff"), "--token: expected text"),
        (("publish", "t", "e", '{"x": NaN}'), "JSON: NaN is no JSON"),
        (("publish", "t", "e", b'"\xff"'), "JSON: expected text that UTF-8 can encode"),
    ],
)
def test_what_cannot_be_sent_is_exit_code_2_in_one_line(command: tuple[Any, ...], word: str) -> None:
    ran = subprocess.run([*relay_command(), *command], cwd=ROOT, capture_output=True, timeout=DEADLINE_S, check=False)
    error = ran.stderr.decode()
    assert (ran.returncode, error.count("\n")) == (2, 1), error
    assert word in error and "hunter2" not in error and len(error) < 1500


def test_what_would_steer_a_terminal_is_shown_and_not_obeyed() -> None:
    """A hostile server: escape sequences, C1 controls, half a pair, text that runs backwards."""
    evil = "\x1b[31m\x9b2J\u202e\u2028\x7f"

    def serve(connection: ServerConnection) -> None:
        join_ref, ref, topic, *_ = json.loads(connection.recv())
        connection.send(json.dumps([join_ref, ref, topic, "phx_reply", {"status": "ok", "response": {}}]))
        connection.send(json.dumps([None, None, topic, f"n{evil}", {"a": f"{evil}\ud83d"}]))
        connection.send(json.dumps([join_ref, None, topic, "phx_error", {"reason": evil}]))
        with suppress(ConnectionClosed):
            join_ref, ref, topic, *_ = json.loads(connection.recv())
            connection.send(json.dumps([join_ref, ref, topic, "phx_reply", {"status": "ok", "response": {}}]))
            connection.send(json.dumps([None, None, topic, "n", {}]))
            connection.recv()

    with serve_websocket(serve, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}/socket"
        piped = run("listen", "t", "--url", url, "--count", "2")
        command = relay_command("listen", "t", "--url", url, "--count", "2")
        _, shown = run_on_terminal(command, cwd=ROOT, env=dict(os.environ))
        server.shutdown()
    lines = piped.stdout.splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0]) == {"topic": "t", "event": f"n{evil}", "payload": {"a": f"{evil}\ud83d"}}
    for text in (piped.stdout, piped.stderr):
        assert all(char.isprintable() or char == "\n" for char in text), ascii(text)
    assert not any(char in shown for char in ("\x9b", "\u202e", "\u2028", "\x7f", "\x1b[31m"))
