"""One connection to Redis: made by redis-py, greeted, read and written by the relay itself.

Owns the handshake, the server's role, and the words for what goes wrong; must not know what is published or heard.

redis-py makes the transport: TCP, TLS, a Unix socket, the master that Sentinels name. Whatever goes wrong on a
connection, and whatever exception the event loop makes of it, is `LinkLost` here: a fault of that connection alone.
"""

import asyncio
import copy
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Any, NamedTuple

import hiredis
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff

from relay.redis_url import RedisAddress

_READ_BYTES = 256 * 1024
"""Most bytes taken from the socket at a time: some 1 000 events of 220 bytes."""

_WORDS_MAX = 240
"""Longest text of a fault, in characters."""


class LinkLost(Exception):
    """A connection could not be made, or has ended; ``str(error)`` says why, the cause first, without secrets."""


class Role(NamedTuple):
    """What a server says of itself."""

    is_master: bool
    is_linked: bool
    """Of a replica: whether it hears its master, so that what is published there is heard here."""

    def __str__(self) -> str:
        if self.is_master:
            return "a master"
        return "a replica" if self.is_linked else "a replica that has lost its master"


MASTER = Role(True, True)


def read_role(reply: object) -> Role:
    """Read the reply to ``ROLE``. Raises LinkLost for that of a Sentinel.

    Source: Redis ``replication.c: roleCommand`` – ``["master", offset, […]]``, or
            ``["slave", host, port, "connected", offset]`` with another state while it is not linked.
    """
    if isinstance(reply, list) and reply and reply[0] == b"sentinel":
        raise LinkLost("this is a Sentinel: expected redis+sentinel://host:port/master as the address")
    if isinstance(reply, list) and len(reply) >= 4 and reply[0] == b"slave":
        return Role(False, reply[3] == b"connected")
    return MASTER


def is_denied(reply: object) -> bool:
    """Whether a command was refused for good on this connection: no permission, or no such command."""
    text = str(reply).lower()
    return isinstance(reply, hiredis.ReplyError) and (text.startswith("noperm") or "unknown command" in text)


def is_channel_denied(reply: object) -> bool:
    """Whether a user may not hear one channel, but others; else it may not use the command at all.

    Source: Redis ``acl.c: getAclErrorMessage``; a command is "… permissions to run the 'subscribe' command".
    """
    return str(reply).startswith("NOPERM") and "permissions to run the" not in str(reply)


class RedisConnection:
    """One open connection. `open` makes it; `close` must be called.

    `replies` holds what has been read: its ``gets()`` returns one reply, or False where none is complete.
    """

    def __init__(self, made: AbstractConnection, protocol: int, clock: Callable[[], float] = time.monotonic) -> None:
        # The streams are private in redis-py. To use them is safe: nothing is in flight, since the handshake is ours.
        # Should they move, the tests fail.
        reader, writer = made._reader, made._writer
        if reader is None or writer is None:
            raise LinkLost("the connection was closed while it was made")
        self._made = made
        self._reader = reader
        self._writer = writer
        self._clock = clock
        self.protocol = protocol
        self.replies: hiredis.Reader = hiredis.Reader()
        self.read_at: float = clock()
        """When bytes came last."""
        self.limit_s: float | None = None
        """Seconds for the reply to `ask`; without them the caller has a limit of its own."""

    @property
    def idle_s(self) -> float:
        """Seconds since bytes came last."""
        return self._clock() - self.read_at

    async def read(self, most: int = _READ_BYTES) -> None:
        """Wait for bytes and feed them to `replies`. Raises LinkLost at the connection's end."""
        try:
            data = await self._reader.read(most)
        except Exception as error:
            raise LinkLost(self._last_words() or words(error)) from error
        if not data:
            raise LinkLost("the connection was closed by Redis")
        self.read_at = self._clock()
        self.replies.feed(data)

    async def reply(self) -> Any:
        """The next reply, an error among them. Raises LinkLost."""
        try:
            while (reply := self.replies.gets()) is False:
                await self.read()
        except hiredis.HiredisError as error:
            raise LinkLost(words(error)) from error
        return reply

    async def ask(self, *command: Any) -> Any:
        """Send one command and wait for its reply, while nothing else is under way. Raises LinkLost."""
        self.write(hiredis.pack_command(command))
        try:
            async with nullcontext() if self.limit_s is None else limited(self.limit_s):
                return await self.reply()
        except TimeoutError:
            raise LinkLost(f"no answer to {command[0]} within {self.limit_s:g} s") from None

    def write(self, data: bytes) -> None:
        """Send bytes. Raises LinkLost where the connection has ended, whatever exception the event loop makes of it."""
        try:
            self._writer.write(data)
        except Exception as error:  # uvloop: RuntimeError, for a transport that it has closed
            raise LinkLost(self._last_words() or words(error)) from error

    async def role(self) -> Role | None:
        """What the server is; None where it does not say. Raises LinkLost, for any other error too."""
        reply = await self.ask("ROLE")
        if is_denied(reply):
            return None
        if isinstance(reply, hiredis.ReplyError):
            raise LinkLost(words(reply))
        return read_role(reply)

    def abort(self) -> None:
        """End the connection at once; `read` raises then."""
        try:
            self._writer.transport.abort()
        except Exception:  # it has ended already
            self._reader.feed_eof()

    async def close(self) -> None:
        """End the connection in good order."""
        await _close(self._made)

    def _last_words(self) -> str:
        """What the server said before it ended the connection, where that was an error: maxclients, for one.

        A stream that has failed gives nothing of what came before; its buffer still has it.
        """
        self.replies.feed(bytes(getattr(self._reader, "_buffer", b"")))
        try:
            while (reply := self.replies.gets()) is not False:
                if isinstance(reply, hiredis.ReplyError):
                    return words(reply)
        except hiredis.HiredisError:
            pass  # its bytes were no Redis's
        return ""


@asynccontextmanager
async def limited(limit_s: float) -> AsyncIterator[None]:
    """Limit the time that the block takes; what comes while the event loop is blocked is read before the limit counts.

    Raises TimeoutError.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        timer = loop.call_later(limit_s, lambda: limit.reschedule(loop.time() + limit_s / 20))
        try:
            yield
        finally:
            timer.cancel()


def _check_cancelled() -> None:
    """Raise CancelledError where redis-py has swallowed one, as its waits do at times under Python 3.11."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def _close(made: AbstractConnection) -> None:
    try:
        await made.disconnect(nowait=True)
    except Exception:  # it is broken already; redis-py expects OSError alone
        made._reader = made._writer = None


class Connections:
    """Makes connections to one Redis, whichever is meant by the address at that moment.

    Args: address: where, and with which credentials.
          timeout_s: seconds for a connection to be made, its handshake included.
    """

    def __init__(self, address: RedisAddress, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._clock = clock
        self._pool, self._sentinels = _make_pool(address, timeout_s)

    @property
    def sentinels(self) -> tuple[Redis, ...]:
        """The clients that ask Sentinels for the master, in the order they are asked; empty without Sentinels."""
        return () if self._sentinels is None else tuple(self._sentinels.sentinels)

    @property
    def asks_sentinels(self) -> bool:
        """Whether Sentinels say where the master is: a replica is never what is meant then."""
        return self._sentinels is not None

    async def open(self) -> RedisConnection:
        """Connect and introduce oneself. Raises LinkLost."""
        made = self._pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        try:
            async with asyncio.timeout(self._timeout_s):
                await made.connect()
                opened = RedisConnection(made, self._address.protocol, self._clock)
                await self._greet(opened)
                _check_cancelled()
        except BaseException as error:
            await _close(made)
            _check_cancelled()
            if isinstance(error, LinkLost) or not isinstance(error, Exception):
                raise
            if isinstance(error, TimeoutError):
                raise LinkLost(f"no answer within {self._timeout_s:g} s") from None
            raise LinkLost(words(error, len(self.sentinels), self._address.transport)) from error
        return opened

    async def _greet(self, opened: RedisConnection) -> None:
        address = self._address
        user, password = address.username, address.password or ""
        commands: list[tuple[str, ...]] = []
        if address.protocol == 3:
            commands.append(("HELLO", "3", *(("AUTH", user or "default", password) if user or password else ())))
        elif user or password:
            commands.append(("AUTH", user, password) if user else ("AUTH", password))
        if address.client_name:
            commands.append(("CLIENT", "SETNAME", address.client_name))
        if address.db:
            commands.append(("SELECT", str(address.db)))
        for command in commands:
            reply = await opened.ask(*command)
            if isinstance(reply, hiredis.ReplyError):
                prefix = "" if command[0] in ("AUTH", "HELLO") else f"{' '.join(command)}: "
                raise LinkLost(prefix + words(reply))

    async def close(self) -> None:
        """Close what asks the Sentinels."""
        for client in self.sentinels:
            await client.aclose()


class _Bare:
    """A connection whose handshake is ours: redis-py makes the transport, and says nothing on it."""

    async def on_connect(self) -> None:
        """Nothing."""

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Nothing."""


class _Tcp(_Bare, Connection):
    """Over TCP."""


class _Tls(_Bare, SSLConnection):
    """Over TLS."""


class _Unix(_Bare, UnixDomainSocketConnection):
    """Over a Unix socket."""


class _Master(_Bare, SentinelManagedConnection):
    """To the master that Sentinels name, over TCP."""


class _MasterTls(_Bare, SentinelManagedSSLConnection):
    """To the master that Sentinels name, over TLS."""


class _Sentinels(Sentinel):
    """Sentinels whose list survives discoveries that overlap.

    redis-py swaps the one that answered to the front of the list while it walks it. Two discoveries at once, as those
    of the link and of the publisher after a failover, then wrote one client over another: a Sentinel was never asked
    again and its connection stayed open.
    """

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Ask in order; the one that answered is asked first the next time."""
        own = copy.copy(self)
        own.sentinels = list(self.sentinels)
        found: tuple[str, int] = await Sentinel.discover_master(own, service_name)
        self.sentinels.sort(key=lambda client: client is not own.sentinels[0])
        return found


def connection_settings(address: RedisAddress, timeout_s: float) -> dict[str, Any]:
    """What redis-py's connections are made with, in event loops and without."""
    settings: dict[str, Any] = {"socket_connect_timeout": timeout_s, "socket_timeout": timeout_s}
    if address.transport != "unix":
        settings["socket_keepalive"] = True
    return settings | dict(address.options)


def _make_pool(address: RedisAddress, timeout_s: float) -> tuple[ConnectionPool, _Sentinels | None]:
    """Make what connections come from, and the Sentinels behind it, whose clients are to be closed.

    A connection to a master that Sentinels know asks them for its address each time it is made.
    """
    # A retried PUBLISH could be delivered twice; a retried connect is our supervisor's business.
    settings = connection_settings(address, timeout_s) | {"protocol": 2, "retry": Retry(NoBackoff(), 0)}
    if address.sentinel is None:
        kind = {"tcp": _Tcp, "tls": _Tls, "unix": _Unix}[address.transport]
        return ConnectionPool(connection_class=kind, **settings), None
    tls = {"ssl": True} if address.transport == "tls" else {}
    theirs = settings | tls | {"username": address.sentinel.username, "password": address.sentinel.password}
    sentinel = _Sentinels(address.sentinel.hosts, sentinel_kwargs=theirs)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
    kind = _MasterTls if tls else _Master
    pool: ConnectionPool = SentinelConnectionPool(address.sentinel.service, sentinel, connection_class=kind, **settings)  # type: ignore[no-untyped-call]
    return pool, sentinel


# Words.


def words(error: BaseException, sentinels: int = 0, transport: str = "") -> str:
    """What has gone wrong, the cause first, on one line, in `_WORDS_MAX` characters at most.

    Args: sentinels: how many are asked for the master.
          transport: of the connection that could not be made.
    """
    return _shortened(_words(error, sentinels, transport))


def _words(error: BaseException, sentinels: int, transport: str) -> str:
    if isinstance(error, MasterNotFoundError):
        return _no_master(str(error), sentinels)
    if isinstance(error, hiredis.ReplyError):
        text = str(error).removeprefix("ERR ")
        return f"{text} (of a cluster, whose address is redis+cluster://…)" if text.startswith("MOVED ") else text
    if isinstance(error, hiredis.HiredisError):
        return f"this is no Redis: {error}"
    root = error
    while (cause := root.__cause__ or (None if root.__suppress_context__ else root.__context__)) is not None:
        if isinstance(root, OSError) and not isinstance(cause, OSError):
            break
        root = cause
    if isinstance(root, ssl.SSLError):
        return re.sub(r"^\[[^\]]*\] | \(_ssl\.c:\d+\)$", "", str(root.args[-1] if root.args else root))
    if isinstance(root, TimeoutError):
        return str(root) or "no answer in time"
    if isinstance(root, FileNotFoundError) and transport == "tls":
        return "no such file, as ssl_ca_certs, ssl_certfile or ssl_keyfile names one"
    if isinstance(root, OSError) and root.errno is not None and not isinstance(root, ConnectionAbortedError):
        return os.strerror(root.errno) if root.errno > 0 else str(root.strerror)
    if isinstance(root, OSError) and (found := re.search(r"\[Errno (\d+)\]", str(root))):
        return os.strerror(int(found[1]))  # of several addresses asyncio makes one text
    if isinstance(root, RuntimeError | AttributeError | AssertionError):
        return "the connection was closed"  # what event loops and redis-py make of a transport that has ended
    return str(root) or type(root).__name__


def _no_master(text: str, sentinels: int) -> str:
    """What redis-py tells of Sentinels that named no master: a list of clients, each with the kind of its error."""
    name = text.partition("No master found for ")[2].partition(" : ")[0]
    errors = re.findall(r" - (?:\w+:)?\w*Error\b", text)
    if errors and len(errors) >= sentinels:
        return "no Sentinel can be reached"
    silent = f"; {len(errors)} of {sentinels} cannot be reached" if errors else ""
    return f"the Sentinels know no master {name} that is up{silent}"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WORDS_MAX else f"{line[: _WORDS_MAX - 1]}…"


def not_published(where: str, role: Role) -> str:
    """Why nothing can be published on a replica."""
    return f"{where} is {role}: what is published there does not reach its master's clients"


def name_of(channel: bytes) -> str:
    """A Redis channel as a text may name it."""
    text = channel.decode(errors="replace")
    return text if len(text) <= 80 else f"{text[:79]}…"


def packed(commands: Sequence[Sequence[Any]]) -> bytes:
    """Commands as the bytes that go to Redis."""
    return b"".join(hiredis.pack_command(tuple(command)) for command in commands)
