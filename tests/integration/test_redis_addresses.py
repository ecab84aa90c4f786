"""Every form of ``redis_url`` that the documentation shows, against a real server; and what is said where it fails."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from redis import Redis

from relay import AsyncPublisher, Config, Publisher, redis_url
from relay.brokers.base import Event
from relay.brokers.redis import RedisBroker
from relay.brokers.redis_connection import Connections
from relay.config_sections import Direction
from relay.metrics import Metrics
from tests.support.faults import Authority, Proxy, Sentinels
from tests.support.patience import PATIENCE
from tests.support.process import Valkey, free_port
from tests.support.serving import eventually
from tests.support.sink import Sink

ROOT = Path(__file__).parents[2]
FAST = {
    "backoff_min_s": 0.02,
    "backoff_max_s": 0.1,
    "ping_interval_s": 0.2,
    "ping_timeout_s": 2 * PATIENCE,
    "timeout_s": 2 * PATIENCE,
}

FORMS = (
    "redis://{host}:{port}",
    "redis://:password@{host}:{guarded}",
    "redis://user:password@{host}:{port}/1",
    "redis://{host}:{port}/0?username=user&password=password",
    "redis://{host}:{port}?protocol=3",
    "redis://user:password@{host}:{port}?protocol=3",
    "redis://{host}:{port}?client_name=relay&timeout=2&socket_keepalive=true&max_connections=9&health_check_interval=30",
    "rediss://{host}:{tls}?ssl_ca_certs={ca}",
    "rediss://user:password@{host}:{tls}/1?ssl_ca_certs={ca}",
    "rediss://{host}:{tls}?ssl_ca_certs={ca}&ssl_certfile={cert}&ssl_keyfile={key}",
    "rediss://{host}:{tls}?ssl_cert_reqs=none&ssl_check_hostname=false",
    "rediss://{host}:{tls}?ssl_ca_certs={ca}&ssl_min_version=TLSv1.2",
    "unix://{path}",
    "unix://{path}?db=1",
    "unix://{path}?db=1&username=user&password=password",
    "unix://user:password@{path}?db=1",
    "redis+sentinel://{sentinels}/main",
    "redis+sentinel://{sentinels}/main/0?sentinel_password=",
)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Valkey on TCP and on a Unix socket, a user with a password, and Sentinels; what stands for what in a form."""
    directory = tmp_path_factory.mktemp("redis")
    with ExitStack() as stack:
        valkey = stack.enter_context(Valkey("--unixsocket", str(directory / "redis.sock")))
        guarded = stack.enter_context(Valkey("--requirepass", "password"))
        sentinels = stack.enter_context(Sentinels())
        with Redis(port=valkey.port) as redis:
            redis.execute_command("ACL", "SETUSER", "user", "on", ">password", "allchannels", "+@all")
        yield {
            "port": str(valkey.port),
            "guarded": str(guarded.port),
            "path": str(directory / "redis.sock"),
            "sentinels": ",".join(f"127.0.0.1:{port}" for port in sentinels.ports),
        }


async def expect_working(url: str) -> RedisBroker:
    """Events are heard, pushes are taken, and the lag is measured."""
    metrics, sink = Metrics(), Sink()
    broker = RedisBroker(Config(redis_url=url, redis=FAST), metrics)
    await broker.start(sink)
    try:
        assert broker.link == (True, ""), broker.link
        await broker.publish(Direction.TO, "room", "e", b"1")
        await broker.publish(Direction.FROM, "room", "e", b"2")
        await sink.expect(Event("room", "e", b"1"))
        async with AsyncPublisher(url) as publisher:
            await publisher.publish("room", "e", 3)
        with Publisher(url) as blocking:
            await asyncio.to_thread(blocking.publish, "room", "e", 4)
        await sink.expect(*(Event("room", "e", payload) for payload in (b"1", b"3", b"4")))
        await eventually(lambda: metrics.link_lag_s, "the lag")
        assert metrics.link_lag_s < 2 * PATIENCE
        assert metrics.gaps == 0
    finally:
        await broker.stop()
    return broker


@pytest.mark.parametrize("form", FORMS)
async def test_form_of_address_works(servers: dict[str, str], form: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.server()
    files = {"ca": str(authority.path), "cert": str(certificate), "key": str(key)}
    async with Proxy.open(int(servers["port"]), tls=authority.context()) as proxy:
        await expect_working(form.format(**servers, **files, host="127.0.0.1", tls=proxy.port))


def test_every_form_in_the_documentation_is_tested() -> None:
    """Schemes and options of all addresses that docs, README and config show are among the forms above."""
    text = "\n".join(
        path.read_text("utf-8")
        for path in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "config").glob("*.*"))
    )
    shown = re.findall(r"\b(rediss?(?:\+sentinel)?|unix)://", text)
    tested = {form.partition("://")[0] for form in FORMS} | {"rediss+sentinel"}  # as the next test has it
    assert set(shown) <= tested
    options = set(re.findall(r"[?&](\w+)=", " ".join(re.findall(r"(?:redis|unix)\S*://\S+", text))))
    assert options <= set(re.findall(r"[?&](\w+)=", " ".join(FORMS))) | {"sentinel_username", "vsn"}


async def test_sentinels_over_tls_name_a_master_over_tls(tmp_path: Path) -> None:
    """``rediss+sentinel://``: a stand-in for a Sentinel says where the master is; both are reached over TLS."""
    authority = Authority(tmp_path)
    with Valkey() as server:
        async with Proxy.open(server.port, tls=authority.context()) as master:
            port = str(master.port)
            fields = {"name": "main", "ip": "127.0.0.1", "port": port, "flags": "master", "num-other-sentinels": "0"}
            flat = [word for pair in fields.items() for word in pair]
            words = "".join(f"${len(word)}\r\n{word}\r\n" for word in flat)
            masters = f"*1\r\n*{len(flat)}\r\n{words}".encode()

            async def stand_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                while data := await reader.read(65536):
                    writer.write(masters if b"MASTERS" in data.upper() else b"+OK\r\n" * data.count(b"*"))
                writer.close()

            sentinel = await asyncio.start_server(stand_in, "127.0.0.1", 0, ssl=authority.context())
            async with sentinel:
                place = sentinel.sockets[0].getsockname()[1]
                await expect_working(f"rediss+sentinel://127.0.0.1:{place}/main?ssl_ca_certs={authority.path}")


async def test_simultaneous_discoveries_lose_no_sentinel(servers: dict[str, str]) -> None:
    """The first Sentinel is down; two connections that ask for the master at once still know every Sentinel."""
    dead = f"127.0.0.1:{free_port()}"
    address = redis_url.parse(f"redis+sentinel://{dead},{servers['sentinels']}/main")
    connections = Connections(address, timeout_s=2)
    try:
        known = {str(client) for client in connections.sentinels}
        opened = await asyncio.gather(*(connections.open() for _ in range(4)))
        for connection in opened:
            await connection.close()
        assert {str(client) for client in connections.sentinels} == known
        assert len(known) == 4
        assert dead.partition(":")[2] not in str(connections.sentinels[0]), "the one that answered is asked first"
    finally:
        await connections.close()


# What is said where it does not work: the cause first, on one line.


async def fault_of(url: str) -> tuple[str, str]:
    """The reason of a link that does not come up, and of a message that is not taken."""
    broker = RedisBroker(Config(redis_url=url, redis=FAST | {"timeout_s": 1 * PATIENCE}), Metrics())
    await broker.start(Sink())
    try:
        answer = (await asyncio.gather(broker.publish(Direction.TO, "room:1", "e", b"1"), return_exceptions=True))[0]
        assert not broker.link.live
        return broker.link.reason, str(answer)
    finally:
        await broker.stop()


async def test_cause_comes_first_and_the_text_is_short(servers: dict[str, str], tmp_path: Path) -> None:
    port, closed = servers["port"], free_port()
    for url, cause in (
        (f"redis://127.0.0.1:{closed}", "Connection refused"),
        # The second is what a machine without a network says.
        ("redis://nohost.invalid:1", ("Name or service not known", "Temporary failure in name resolution")),
        (f"unix://{tmp_path}/none.sock", "No such file or directory"),
        (f"redis://127.0.0.1:{port}/99", "SELECT 99: DB index is out of range"),
        (f"redis://user:wrong@127.0.0.1:{port}", "WRONGPASS invalid username-password pair"),
        (f"redis+sentinel://{servers['sentinels']}/other", "the Sentinels know no master 'other' that is up"),
        (f"redis+sentinel://127.0.0.1:{closed},127.0.0.1:1/main", "no Sentinel can be reached"),
        (f"redis+sentinel://127.0.0.1:{port}/main", "unknown command 'SENTINEL'"),
        (f"redis://{servers['sentinels'].split(',')[0]}", "this is a Sentinel: expected redis+sentinel://"),
        (f"rediss://127.0.0.1:{closed}?ssl_ca_certs={tmp_path}/none.pem", "no such file, as ssl_ca_certs"),
    ):
        link, answer = await fault_of(url)
        assert link.startswith(cause)
        assert answer.startswith(cause)
        assert "\n" not in link
        assert len(link) < 320
        assert "Traceback" not in link
        assert "password" not in link.replace("username-password", "")


async def test_server_that_has_no_room_is_quoted() -> None:
    """``maxclients``: the server says so and closes at once, before or after the first command is written."""
    with Valkey() as server:
        with Redis(port=server.port) as redis:
            redis.execute_command("ACL", "SETUSER", "user", "on", ">password", "allchannels", "+@all")
            redis.config_set("maxclients", 1)
            for form in (
                "redis://127.0.0.1:{}",
                "redis://user:password@127.0.0.1:{}",
                "redis://127.0.0.1:{}?protocol=3",
            ):
                link, answer = await fault_of(form.format(server.port))
                assert link.startswith("max number of clients reached")
                assert answer.startswith("max number of clients reached")


async def test_denied_channel_is_named_first() -> None:
    with Valkey() as server:
        with Redis(port=server.port) as redis:
            rules = ("on", ">pw", "resetchannels", "&relay:control", "&from:*", "+@all")
            redis.execute_command("ACL", "SETUSER", "user", *rules)
        link, answer = await fault_of(f"redis://user:pw@127.0.0.1:{server.port}")
        assert link.startswith("PSUBSCRIBE to:*: NOPERM")
        assert answer.startswith("PUBLISH to:room:1:e: NOPERM")


@pytest.mark.parametrize("command", ["serve", "check"])
def test_option_that_is_not_known_is_refused_at_the_start(command: str) -> None:
    """By `serve` and `check` alike, with exit code 2 and one line."""
    url = {"RELAY_REDIS_URL": "redis://127.0.0.1:1?abortConnect=false"}
    program = [sys.executable, "-m", "relay", command]
    done = subprocess.run(program, env=os.environ | url, capture_output=True, timeout=60)
    assert done.returncode == 2
    assert b"redis_url: option abortConnect: not known" in b" ".join((done.stdout + done.stderr).split())
