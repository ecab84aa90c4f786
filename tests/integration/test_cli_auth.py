"""``relay token`` and ``relay check``: their words and exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from relay.auth.tokens import TokenVerifier, load_keys
from relay.cli.main import main
from relay.config_sections import AuthConfig
from relay.transports import plain_sockets
from tests.support.keys import EC_PRIVATE, EC_PUBLIC, RSA_PRIVATE, RSA_PUBLIC, SECRET
from tests.support.process import DEADLINE_S, RelayProcess, wait_for
from tests.support.servers import AppServer
from tests.support.terminal import run_on_terminal

FAN_OUT = {
    "c": "fan-out in C, for sockets without TLS",
    "python": "fan-out in Python; the part in C is not built",
}[plain_sockets.form(enabled=True)]


class Command:
    """Runs ``relay`` in this process, with a settings file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], directory: Path) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.file = directory / "relay.toml"

    def __call__(self, *arguments: str, settings: str = "") -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.file.write_text(settings, "utf-8")
        self._monkeypatch.setattr(sys, "argv", ["relay", *arguments, "--config", str(self.file)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = self._capsys.readouterr()
        return (caught.value.code if isinstance(caught.value.code, int) else 0), out, err


def with_redis(settings: str) -> str:
    """Settings with a Redis, unless they name a bus: authentication beside the embedded server is warned of."""
    return settings if "redis_url" in settings else f'redis_url = "redis://127.0.0.1"\n{settings}'


@pytest.fixture
def relay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return Command(monkeypatch, capsys, tmp_path)


def claims_of(made: str, key: str = SECRET) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(made, key, ["HS256", "RS256", "ES256"], options={"verify_aud": False})
    return claims


# relay token.


def test_token_is_printed_alone_and_says_what_was_asked_for(relay: Command) -> None:
    arguments = (
        "--topic",
        "room:*:join,push",
        "--topic",
        "news:join",
        "--ttl",
        "2h",
        "--claim",
        "n=1",
        "--claim",
        "w=x=y",
    )
    code, out, err = relay("token", "--sub", "alice", *arguments, settings=f'[auth]\nkeys = ["{SECRET}"]')
    assert (code, err, out.count("\n")) == (0, "", 1)
    claims = claims_of(out.strip())
    assert abs(claims.pop("exp") - time.time() - 7200) < 60 and abs(claims.pop("iat") - time.time()) < 60
    topics = {"room:*": ["join", "push"], "news": ["join"]}
    assert claims == {"sub": "alice", "topics": topics, "n": 1, "w": "x=y"}


async def test_token_fits_the_settings_it_is_made_under(relay: Command) -> None:
    text = (
        f'[auth]\nissuer = "us"\naudience = ["relay", "x"]\nrights_claim = "may"\nkeys = [{{key="{SECRET}", kid="k"}}]'
    )
    _, out, _ = relay("token", "--sub", "alice", "--topic", "a:join", settings=text)
    config = AuthConfig(issuer="us", audience=("relay",), keys=({"key": SECRET, "kid": "k"},))
    claims = await TokenVerifier(config, load_keys(config)).verify(out.strip())
    assert (claims["may"], jwt.get_unverified_header(out.strip())["kid"]) == ({"a": ["join"]}, "k")


def test_token_with_a_secret_that_can_be_guessed_is_made_with_a_warning_of_one_line() -> None:
    """As a process: PyJWT warns too, through Python's warnings."""
    command = [sys.executable, "-m", "relay", "token", "--sub", "alice", "--key", "short"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (ran.returncode, ran.stdout.count(".")) == (0, 2)
    assert ran.stderr == "relay: warning: a secret of 5 bytes can be guessed; expected 32\n"


@pytest.mark.parametrize(("private", "public"), [(RSA_PRIVATE, RSA_PUBLIC), (EC_PRIVATE, EC_PUBLIC), (SECRET, SECRET)])
def test_token_is_signed_with_the_key_in_a_file(relay: Command, tmp_path: Path, private: str, public: str) -> None:
    path = tmp_path / "key"
    path.write_text(private)
    _, out, _ = relay("token", "--sub", "alice", "--key", f"file:{path}")
    assert claims_of(out.strip(), public)["sub"] == "alice"


def test_permissions_of_one_pattern_add_up(relay: Command) -> None:
    arguments = ("--topic", "room:*:join", "--topic", "room:*:push,presence", "--topic", "user:{sub}:push")
    _, out, _ = relay("token", "--sub", "alice", "--key", SECRET, *arguments)
    assert claims_of(out.strip())["topics"] == {"room:*": ["join", "push", "presence"], "user:{sub}": ["push"]}


def test_key_may_come_from_the_environment(relay: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is in no list of processes."""
    monkeypatch.setenv("RELAY_AUTH__KEYS", f'["{SECRET}"]')
    _, out, _ = relay("token", "--sub", "alice")
    assert claims_of(out.strip())["sub"] == "alice"


@pytest.mark.parametrize(
    ("arguments", "settings", "word"),
    [
        ((), "", "--key"),
        ((), f"[auth]\nkeys = ['''{RSA_PUBLIC}''']", "--key: expected a secret or a private key"),
        (("--key", "file:/nowhere"), "", "--key: /nowhere: cannot be read"),
        (("--key", SECRET, "--ttl", "soon"), "", "--ttl"),
        (("--key", SECRET, "--ttl", "0h"), "", "--ttl"),
        (("--key", SECRET, "--topic", "room"), "", "--topic: expected pattern:rights"),
        (("--key", SECRET, "--topic", "room:rule"), "", "--topic: expected join, push or presence"),
        (
            ("--key", SECRET, "--topic", "room:{id}:join"),
            "",
            "--topic: expected {sub} where the user stands; 'room:{id}'",
        ),
        (("--key", SECRET, "--claim", "x"), "", "--claim"),
        (("--key", SECRET, "--claim", "sub=bob"), "", "--claim: sub is what --sub says"),
        (("--key", SECRET, "--topic", "a:join", "--claim", "topics={}"), "", "--claim: topics is what --topic says"),
        (("--key", SECRET, "--sub", ""), "", 'claim "sub": expected a user\'s name'),
        (("--key", SECRET, "--sub", "\udcff"), "", 'claim "sub": expected a user\'s name that UTF-8 can encode'),
        (
            ("--key", SECRET, "--claim", "exp=soon"),
            "",
            "claim \"exp\": expected a number of seconds since 1970, got 'soon'",
        ),
        (("--key", SECRET, "--claim", "nbf=true"), "", 'claim "nbf": expected a number of seconds'),
        (("--key", SECRET, "--claim", "topics=room"), "", 'claim "topics": expected an object'),
        (("--key", SECRET, "--ttl", f"{10**14}d"), "", 'claim "exp": expected a number of seconds'),
    ],
)
def test_what_makes_no_token_is_said_in_one_line(
    relay: Command, arguments: tuple[str, ...], settings: str, word: str
) -> None:
    code, out, err = relay("token", "--sub", "alice", *arguments, settings=settings)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert word in err and SECRET not in err


# relay check.


def lines(out: str) -> list[str]:
    return ["{about} {text}".format_map(json.loads(line)) for line in out.splitlines()]


def test_check_of_no_settings_says_that_all_is_open_on_this_machine(relay: Command) -> None:
    code, out, _ = relay("check")
    assert code == 0
    assert lines(out) == [
        "address 127.0.0.1:8000; only this machine can reach it",
        "sockets /socket",
        "transports websocket at /socket/websocket, longpoll at /socket/longpoll, sse at /socket/sse",
        "long polls answered by this process; several processes or nodes need auth.secret",
        "bus a Valkey of the relay's own",
        FAN_OUT,
        "pages those of the relay's own host and port, and of other servers on this machine",
        "proxies none is believed",
        "connect anybody on this machine",
        "rights everybody who connects may join every topic and push to it",
        "rest /api, for programs on this machine",
    ]


def test_check_warns_of_an_empty_variable_of_the_bus(monkeypatch: pytest.MonkeyPatch, relay: Command) -> None:
    monkeypatch.setenv("RELAY_REDIS_URL", "")
    code, out, _ = relay("check")
    assert code == 1
    said = [json.loads(line) for line in out.splitlines()]
    assert any(each["about"] == "warning" and "RELAY_REDIS_URL is empty" in each["text"] for each in said)


def test_check_says_that_a_file_of_settings_here_is_not_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relay.toml").write_text("port = 9000\n")
    note = "note relay.toml in this directory is not read; to use it, add --config relay.toml"
    for options, environ, is_read in (
        ((), "", False),
        (("--config", "relay.toml"), "", True),
        ((), "relay.toml", True),
    ):
        monkeypatch.setenv("RELAY_CONFIG", environ)
        monkeypatch.setattr(sys, "argv", ["relay", "check", *options])
        with pytest.raises(SystemExit) as caught:
            main()
        said = lines(capsys.readouterr().out)
        assert (caught.value.code or 0, note in said) == (0, not is_read)
        assert said[0].startswith(f"address 127.0.0.1:{9000 if is_read else 8000}; ")


def test_check_says_which_events_clients_send_to_each_other(relay: Command) -> None:
    topics = '[[topics]]\nmatch = "room:*"\npush = false\nclient_events = ["typing", "cursor-*"]\n'
    code, out, _ = relay("check", settings=topics + "client_events_sender = true")
    assert code == 0
    assert "rights no client may push to room:*, whatever a token says, but typing, cursor-*" in lines(out)
    assert "clients typing, cursor-* on room:* go to the other subscribers, with their sender" in lines(out)
    code, _, err = relay("check", settings='[[topics]]\nclient_events = ["presence_*"]')
    assert code == 2 and "'presence_*' never matches" in err


def test_check_says_what_is_sent_to_webhooks_and_no_secret(relay: Command) -> None:
    hook = (
        f'[[webhooks]]\nmatch = "room:*"\non = ["join"]\nsecrets = ["{SECRET * 4}"]\n'
        f'url = "https://ada:{SECRET}@app.example/{SECRET}?key={SECRET}"\n'
    )
    code, out, _ = relay("check", settings=hook)
    assert code == 0 and SECRET not in out
    text = "join on room:* are sent to https://app.example, and without an answer refused; 1 secret(s)"
    assert f"webhooks {text}" in lines(out)
    code, out, err = relay("check", settings=hook.replace("https:", "http:"))
    assert code == 2 and "webhooks.0" in err and "expected https://" in err and SECRET not in err
    code, out, _ = relay("check", settings=hook.replace("https:", "http:") + 'insecure = true\non_failure = "allow"')
    assert code == 1 and SECRET not in out
    assert any(line.startswith("warning webhooks.0: url is not https") for line in lines(out))
    assert any(line.startswith("note webhooks.0: on_failure") for line in lines(out))
    code, _, err = relay("check", settings=hook.replace(SECRET * 4, "short"))
    assert code == 2 and "webhooks.0.secrets: expected a secret of 32 bytes at least, got 5" in err


OLD_NAMES = "page = false # for development\n\n[limits]\nrate_limited_max = 5\n"
NEW_NAMES = "demo_page = false # for development\n\n[limits]\nrate_limit_violations_max = 5\n"


def test_check_warns_of_old_names_and_prints_the_file_with_the_new_ones(relay: Command) -> None:
    code, out, err = relay("check", settings=OLD_NAMES)
    told = [json.loads(line) for line in out.splitlines()]
    (warning,) = [line["text"] for line in told if line["about"] == "warning"]
    assert "page (now demo_page), limits.rate_limited_max (now limits.rate_limit_violations_max)" in warning
    assert [line["text"] for line in told if line["about"] == "file"] == [NEW_NAMES]
    assert (code, err) == (1, "")
    code, out, _ = relay("check", settings=NEW_NAMES)
    assert code == 0
    assert '"file"' not in out


def test_check_prints_the_renamed_file_without_its_secrets(relay: Command, tmp_path: Path) -> None:
    secrets = (
        f'redis_url = "redis://ada:{SECRET}@127.0.0.1"\n[rest]\napi_key = "{SECRET}"\n[auth]\nkeys = ["{SECRET}"]\n'
    )
    code, out, _ = relay("check", settings=f"page = false\n{secrets}")
    assert code == 1 and SECRET not in out
    (text,) = [line["text"] for line in map(json.loads, out.splitlines()) if line["about"] == "file"]
    assert 'api_key = "<rest.api_key>"' in text
    file = tmp_path / "relay.toml"
    file.write_text(f"page = false\n{secrets}")
    command = [sys.executable, "-m", "relay", "check", "--config", str(file)]
    _, shown = run_on_terminal(command, cwd=tmp_path, env=os.environ | {"TERM": "dumb"})
    assert "with the new names, and without its secrets: fill in what stands in <…>:" in shown
    assert SECRET not in shown


def test_check_prints_the_renamed_file_as_it_is_on_a_terminal(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text(OLD_NAMES)
    command = [sys.executable, "-m", "relay", "check", "--config", str(file)]
    code, text = run_on_terminal(command, cwd=tmp_path, env=os.environ | {"TERM": "dumb"})
    assert code == 1
    assert text.replace("\r\n", "\n").endswith(f"with the new names:\n\n{NEW_NAMES}\n")


def test_serve_warns_once_of_old_names_also_with_workers(tmp_path: Path) -> None:
    """Workers are told by variables what the first process has decided: under the names that the file has."""
    file = tmp_path / "relay.toml"
    file.write_text('origins = ["https://a.example"]\n[metrics]\nfolder = ""\n')
    arguments = ("--config", str(file), "--workers", "2", "--origin", "https://b.example")
    with RelayProcess(*arguments, environ={"RELAY_PAGE": "false"}) as server:
        pass
    assert server.output.count("former names of settings are in use") == 1
    for renamed in ("origins (now allowed_origins)", "metrics.folder (now metrics.dir)", "page (now demo_page)"):
        assert renamed in server.output


def test_check_says_that_the_part_in_c_is_switched_off(relay: Command) -> None:
    _, out, _ = relay("check", settings="speedups = false")
    assert "fan-out in Python; the part in C is switched off by speedups = false" in lines(out)


def test_check_says_that_nobody_operates_a_relay_for_others_without_a_key(relay: Command) -> None:
    _, out, _ = relay("check", settings="allow_anonymous = true")
    assert "rest /api, for no client; set rest.api_key" in lines(out)
    assert "metrics /metrics, for programs on this machine; set metrics.key for others" in lines(out)


def test_check_tells_the_truth_of_a_relay_behind_a_proxy_on_this_machine(relay: Command) -> None:
    """The settings that config/nginx.conf and config/Caddyfile name: the whole world may join."""
    settings = 'allow_anonymous = true\ntrusted_proxies = ["127.0.0.1"]\nallowed_hosts = ["relay.example.org"]'
    code, out, _ = relay("check", settings=settings)
    assert code == 1
    assert "address 127.0.0.1:8000; other machines can reach it through a proxy on this one" in lines(out)
    assert "hosts names of this machine, IP addresses, relay.example.org" in lines(out)
    assert "connect anybody, from any machine" in lines(out)
    assert "warning anybody can connect, from any machine (allow_anonymous = true, and no keys)" in lines(out)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("", "anybody on this machine"),
        ('trusted_proxies = ["127.0.0.1"]', "anybody on this machine"),
        ("allow_anonymous = true", "anybody on this machine, and clients that reach it through a proxy or a tunnel"),
        ('allow_anonymous = true\nallowed_hosts = ["relay.example.org"]', "anybody, from any machine"),
        ('allow_anonymous = true\nhost = "0.0.0.0"', "anybody, from any machine"),
        (
            'host = "0.0.0.0"',
            "no client: `relay serve` refuses to start; set auth.keys or auth.jwks_url, or allow_anonymous = true",
        ),
    ],
)
def test_check_says_who_may_connect(relay: Command, settings: str, said: str) -> None:
    _, out, _ = relay("check", settings=settings)
    assert f"connect {said}" in lines(out)


def test_check_says_what_each_key_was_taken_for_and_shows_none(relay: Command, tmp_path: Path) -> None:
    der = "".join(RSA_PUBLIC.split("\n")[1:-2])
    path = tmp_path / "ec.pem"
    path.write_text(EC_PRIVATE)
    keys = f'["{der}", "file:{path}", {{key = "{SECRET}", kid = "old"}}]'
    text = f'redis_url = "redis://localhost"\n[auth]\nkeys = {keys}\nissuer = "us"'
    code, out, _ = relay("check", settings=text)
    assert code == 0
    assert [json.loads(line)["text"] for line in out.splitlines() if json.loads(line)["about"] == "key"] == [
        "auth.keys.0: RSA public key, 2048 bits, for RS256",
        "auth.keys.1: P-256 private key, 256 bits, for ES256",
        f"auth.keys.2: shared secret of {len(SECRET)} bytes, for HS256, kid 'old'",
    ]
    assert der not in out and SECRET not in out


def test_check_says_who_may_do_what_and_shows_no_secret(relay: Command) -> None:
    code, out, _ = relay(
        "check",
        settings=f"""
host = "0.0.0.0"
allow_anonymous = true
redis_url = "rediss://user:hunter2@redis.example.org:6380"
allowed_origins = ["https://example.org"]
trusted_proxies = ["10.0.0.0/8", "fc00::/7"]
[rest]
api_key = "hunter2-and-nine"
[auth]
keys = ["{SECRET}"]
issuer = "https://login.example.org"
tangram = true
[[auth.anonymous]]
match = "public:*"
rights = ["join"]
[[auth.authenticated]]
match = "user:{{sub}}"
rights = ["join", "push"]
[[topics]]
match = "news:*"
push = false
""",
    )
    assert code == 0
    assert lines(out) == [
        "address 0.0.0.0:8000; other machines can reach it",
        "sockets /socket",
        "transports websocket at /socket/websocket, longpoll at /socket/longpoll, sse at /socket/sse",
        "long polls answered by this process; several processes or nodes need auth.secret",
        "bus rediss://redis.example.org:6380",
        FAN_OUT,
        "pages https://example.org",
        "proxies 10.0.0.0/8, fc00::/7; X-Forwarded-For is believed from there",
        "connect clients with a token, and clients without one",
        "tokens signed with HS256 or RS256 or ES256; 1 key here; issuer https://login.example.org; no audience",
        f"key auth.keys.0: shared secret of {len(SECRET)} bytes, for HS256",
        "rights without a token: join on public:*",
        "rights with a token: join, push on user:{sub}",
        'rights with a token besides: what its claim "topics" says',
        "rights with a token of tangram's: everything on the one topic that it names",
        "note auth.tangram_ttl_s = 3600: tangram's page renews no token; after that time it gets no events until it is "
        "loaded again (config/tangram.toml has tangram's ten years)",
        "rights no client may push to news:*, whatever a token says",
        "rest /api, for clients with the key",
        "note the relay speaks no TLS; without a proxy that does, tokens can be read on their way",
    ]
    assert "hunter2" not in out and SECRET not in out


def test_check_says_how_long_tangrams_tokens_are_good(relay: Command) -> None:
    settings = f'[auth]\nkeys = ["{SECRET}"]\ntangram = true\ntangram_ttl_s = 315360000'
    _, out, _ = relay("check", settings=settings)
    assert "note auth.tangram_ttl_s: tokens of POST /token are good for 3650 days" in "\n".join(lines(out))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ('host = "0.0.0.0"', "refuses this address"),
        ('host = "0.0.0.0"\nallow_anonymous = true', "anybody can connect, from any machine"),
        ('allowed_origins = "any"', "pages of any site"),
        ('[auth]\nkeys = ["hunter2"]', "auth.keys.0: a secret of 7 bytes"),
        (f'[auth]\nrequire_expiry = false\nkeys = ["{SECRET}"]', "without expiry stays valid until its key is removed"),
        ('[auth]\nissuer = "x"\njwks_url = "http://login.example.org/jwks"', "not https"),
        ('[auth]\njwks_url = "https://login.example.org/jwks"', "made for another service"),
        ('allow_anonymous = true\n[[auth.anonymous]]\nmatch = "*"\nrights = ["push"]', "push to every topic"),
        ('redis_url = "redis://redis.example.org"', "not rediss://"),
        ('trusted_proxies = ["10.0.0.0/8", "0.0.0.0/0"]', "0.0.0.0/0 trusts everybody"),
        ('trusted_proxies = ["128.0.0.0/1"]', "128.0.0.0/1 trusts everybody"),
        ('trusted_proxies = ["::/0"]', "::/0 trusts everybody"),
        ('[auth]\nissuer = "x"\njwks_url = "https://x.org"\nalgorithms = ["HS256"]', "no token is good"),
        (f'[auth]\nkeys = ["{SECRET}"]\nauthenticated = [{{match = "{{sub}}:*", rights = ["join"]}}]', "with {sub}"),
        ('[rest]\napi_key = "hunter2-and-eig"', "rest.api_key: 15 characters"),
        ('[metrics]\nkey = "hunter2-and-eig"', "metrics.key: 15 characters"),
        (
            f'[auth]\nkeys = ["{SECRET}"]\ntangram = "open"\ntangram_topics = [{{match = "a*", rights = ["join"]}}]',
            "any program that reaches this address, and pages of the relay's own host get tokens without a key, to "
            "join on a*",
        ),
        (
            f'[auth]\nkeys = ["{SECRET}"]\ntangram = true\ntangram_topics = [{{match = "a*", rights = ["join"]}}]',
            'auth.tangram_topics: a* has no effect unless auth.tangram = "open"',
        ),
    ],
)
def test_check_warns(relay: Command, settings: str, word: str) -> None:
    code, out, _ = relay("check", settings=with_redis(settings))
    assert code == 1
    (warning,) = [line for line in lines(out) if line.startswith("warning ")]
    assert word in warning and "hunter2" not in out


@pytest.mark.parametrize("bus", ["", 'redis_url = "embedded"\n'])
def test_check_warns_of_the_embedded_server_beside_authentication(relay: Command, bus: str) -> None:
    code, out, _ = relay("check", settings=f'{bus}[auth]\nkeys = ["{SECRET}"]\n')
    assert code == 1
    (warning,) = [line for line in lines(out) if line.startswith("warning ")]
    assert "the embedded Valkey asks for no token" in warning
    assert "the embedded Valkey" not in relay("check", settings=bus)[1]


def test_start_warns_of_the_embedded_server_beside_authentication() -> None:
    with RelayProcess(environ={"RELAY_AUTH__KEYS": json.dumps([SECRET])}) as process:
        wait_for(lambda: "the embedded Valkey asks for no token" in process.output, "the warning")


def test_check_on_a_terminal_is_for_reading(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('allowed_origins = "any"')
    command = [sys.executable, "-m", "relay", "check", "--config", str(file)]
    code, printed = run_on_terminal(command, cwd=tmp_path, env=os.environ | {"TERM": "dumb"})
    assert code == 1
    first, *_, last = printed.splitlines()
    assert first == "address    127.0.0.1:8000; only this machine can reach it"
    assert last.startswith('warning: allowed_origins = "any": ')


@pytest.mark.parametrize("settings", ['[auth]\nkeys = ["file:/nowhere"]', "[auth]\nkey = 1", "[auth]\nkeys = [7]"])
def test_check_of_bad_settings_is_exit_code_2(relay: Command, settings: str) -> None:
    code, out, err = relay("check", settings=settings)
    assert (code, out) == (2, "")
    assert "auth.key" in err


APP = """
from fastapi import FastAPI
from relay import Relay

app = FastAPI()
relay = Relay(broadcast_url="memory://", {settings})
relay.install(app)
"""


@pytest.mark.parametrize(
    ("settings", "is_served"),
    [
        ("", False),
        ("authenticate=lambda request: None", True),
        ("allow_anonymous=True", True),
        ("auth={'keys': ['x']}", True),
    ],
)
def test_app_may_be_reached_from_other_machines_once_its_relay_says_who_gets_in(settings: str, is_served: bool) -> None:
    server = AppServer("relay", APP.format(settings=settings), "--host", "0.0.0.0")
    if is_served:
        with server:
            assert server.process is not None and server.process.poll() is None
    else:
        server.start(wait=False)
        try:
            assert server.wait() == 2
            assert "authenticate=" in server.output and "allow_anonymous = true" in server.output
        finally:
            server.__exit__(None, None, None)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_key_that_cannot_be_read_stops_the_start(relay: Command, workers: str) -> None:
    code, out, err = relay("serve", "--port", "0", "--workers", workers, settings='[auth]\nkeys = ["file:/nowhere"]')
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "auth.keys.0: /nowhere" in err


@pytest.mark.parametrize("url", ["", "https://login.example.org/jwks"])
def test_relay_with_keys_may_be_reached_from_other_machines(url: str) -> None:
    keys = {"RELAY_AUTH__JWKS_URL": url} if url else {"RELAY_AUTH__KEYS": f'["{SECRET}"]'}
    with RelayProcess("--host", "0.0.0.0", environ=keys) as relay:
        assert "is ready" in relay.output


# What `relay serve` refuses, and what has no effect.


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("[limits]\npayload_max_bytes = 3000000", "expected 3001024 bytes at least"),
        ('[plugins]\npaths = ["/nowhere/plugins"]', "plugins.paths: /nowhere/plugins is not a directory"),
        ('[metrics]\ndir = "/dev/null/x"', "metrics.dir: expected a directory that can be made and written to"),
        ('[metrics]\ndir = "/proc/nonexist"', "metrics.dir: expected a directory that can be made and written to"),
        ('[[proxy]]\nprefix = "/x"\ntarget = "http://"', "expected http[s]://host[:port]"),
        ('[auth]\njwks_url = "https://:99999"', "expected http[s]://host[:port]"),
        ('[auth]\nkeys = ["file:/nowhere/key"]', "/nowhere/key: cannot be read"),
    ],
)
def test_check_refuses_what_serve_refuses(relay: Command, settings: str, told: str) -> None:
    for command in (("check",), ("serve", "--port", "0")):
        code, out, err = relay(*command, settings=settings)
        assert code == 2, (command, out)
        assert told in err
        assert not out


def test_check_refuses_a_plugin_that_cannot_be_imported(relay: Command, tmp_path: Path) -> None:
    package = tmp_path / "plugins" / "broken"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import nowhere_to_be_found")
    paths = f"[plugins]\npaths = [{str(package.parent)!r}]\n"
    code, _, err = relay("check", settings=paths)
    assert code == 2
    assert "plugin broken" in err
    assert "nowhere_to_be_found" in err
    code, out, _ = relay("check", settings=paths + 'on_error = "skip"')
    assert code == 1
    assert "plugin broken: cannot be loaded: ModuleNotFoundError" in out


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("[limits]\nbody_max_bytes = 1000", "limits.body_max_bytes = 1000 is too small"),
        ("[limits]\noutbox_total_max_bytes = 1000", "limits.outbox_total_max_bytes = 1000 is too small"),
        ("[limits]\nin_flight_total_max_bytes = 10", "limits.in_flight_total_max_bytes = 10 is too small"),
        (
            '[limits]\nrecover_max_bytes = 10\n[[topics]]\nmatch = "a"\nhistory = {}',
            "limits.recover_max_bytes = 10 is too small",
        ),
        ("[redis]\npublish_queue_max_bytes = 1000", "redis.publish_queue_max_bytes = 1000 is too small"),
        (
            f'[auth]\nkeys = ["{SECRET}"]\n[[auth.anonymous]]\nmatch = "a"\nrights = ["join"]',
            "auth.anonymous has no effect",
        ),
        ('[[topics]]\nmatch = "a"\nnotify_dropped = true', "topics.0: notify_dropped has no effect"),
        ('[[topics]]\nmatch = "*"\n[[topics]]\nmatch = "a:*"', "topics.1: a:* is never used"),
        ('[metrics]\ntopics = ["a", "a"]', "metrics.topics.1: a is never used"),
        (
            '[[proxy]]\nprefix = "/x"\ntarget = "http://h"\n[[proxy]]\nprefix = "/x/y"\ntarget = "http://i"',
            "proxy.1: /x/y is never asked",
        ),
        ('[[proxy]]\nprefix = "/api"\ntarget = "http://h"', "proxy.0: /api hides the REST interface"),
        ('[plugins]\ndisabled = ["chta"]', "plugins.disabled: there is no plugin chta"),
        (
            '[[topics]]\nmatch = "a"\noverflow = "latest"\nhistory = {}',
            'topics.0: overflow = "latest" drops events that the history has',
        ),
        (
            '[[topics]]\nmatch = "a"\noverflow = "drop-oldest"\nhistory = {}',
            'topics.0: overflow = "drop-oldest" drops events that the history has',
        ),
        (
            '[presence]\nlease_s = 12\n[[topics]]\nmatch = "a"\npresence = true',
            "presence.lease_s = 12 is less than 3 × presence.renew_s = 5",
        ),
        (
            '[presence]\nlease_s = 3\nrenew_s = 1\n[[topics]]\nmatch = "a"\npresence = true',
            "presence.lease_s = 3 is less than presence.renew_s + redis.timeout_s = 6",
        ),
        (
            '[limits]\npresence_meta_max_bytes = 2000000\n[[topics]]\nmatch = "a"\npresence = true',
            "limits.presence_meta_max_bytes = 2000000 is more than limits.presence_state_max_bytes = 1048576",
        ),
        (
            '[[topics]]\nmatch = "a"\npresence = true\npresence_max = 50000',
            "topics.0: presence_max = 50000: the list may have 5648576 bytes",
        ),
        ('[[topics]]\nmatch = "a"\npresence = "count"\npresence_max = 5', "topics.0: presence_max has no effect with"),
        ('[[topics]]\nmatch = "a"\npresence_max = 5', "topics.0: presence_max has no effect without presence"),
    ],
)
def test_settings_without_effect_are_warned_of(relay: Command, settings: str, told: str) -> None:
    code, out, _ = relay("check", settings=with_redis(settings))
    assert code == 1
    (warning,) = (line for line in map(json.loads, out.splitlines()) if line["about"] == "warning")
    assert told in warning["text"]


def test_check_lists_presence_and_notes_a_short_delay(relay: Command) -> None:
    settings = (
        '[presence]\nleave_delay_s = 0\n[[topics]]\nmatch = "room:*"\npresence = true\n'
        '[[topics]]\nmatch = "p"\npresence = "plugin"\npresence_max = 5\n[[topics]]\nmatch = "c"\npresence = "count"'
    )
    code, out, _ = relay("check", settings=with_redis(settings))
    said = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [each["text"] for each in said if each["about"] == "presence"] == [
        "room:*: subscribers receive its members, or their number if they are over 1000",
        "p: subscribers receive the members that plugins list, or their number if they are over 5",
        "c: subscribers receive the number of its members",
    ]
    (note,) = (each["text"] for each in said if each["about"] == "note")
    assert note.startswith("presence.leave_delay_s = 0: members whose page is reloaded, or who rejoin after a gap")


def test_check_lists_histories_and_notes_what_a_join_is_not_given(relay: Command) -> None:
    settings = (
        '[[topics]]\nmatch = "room:*"\nhistory = { size = 5000, ttl_s = 60 }\n[[topics]]\nmatch = "a"\nhistory = {}'
    )
    code, out, _ = relay("check", settings=with_redis(settings))
    said = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [each["text"] for each in said if each["about"] == "history"] == [
        "room:*: 5000 events of each topic, for 60 s",
        "a: 1000 events of each topic, for 3600 s",
    ]
    notes = [each["text"] for each in said if each["about"] == "note"]
    assert notes == [
        "topics.0: history.size = 5000, and a join is given 1000 events at most (limits.recover_max_events)"
    ]
