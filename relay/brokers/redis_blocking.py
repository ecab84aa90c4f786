"""Commands to Redis from code without an event loop: connections of redis-py, one for each thread that waits.

Owns the connections, which any thread may use, and which a forked process does not share; must not know what is sent.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import hiredis
from redis import ConnectionPool, RedisError
from redis.backoff import NoBackoff
from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    ResponseError,
    TryAgainError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from relay.brokers.redis_connection import LinkLost, connection_settings, packed, words
from relay.redis_url import RedisAddress

_IDLE_S = 30
"""Seconds without a command after which the next one is sent on a new connection: a firewall may have forgotten it."""

_CODES: dict[type[ResponseError], str] = {
    NoPermissionError: "NOPERM ",
    NoScriptError: "NOSCRIPT ",
    ReadOnlyError: "READONLY ",
    MovedError: "MOVED ",
    AskError: "ASK ",
    ClusterDownError: "CLUSTERDOWN ",
    TryAgainError: "TRYAGAIN ",
}
"""What redis-py cuts off the beginning of errors."""

_Connection: TypeAlias = Any
"""A connection of redis-py, which leaves it untyped."""

Ask: TypeAlias = Callable[[Sequence[Sequence[Any]]], list[Any]]
"""Sends commands together and returns their replies, errors among them. Raises LinkLost."""


class _Sentinels(Sentinel):
    """Sentinels whose list survives discoveries in several threads; see `relay.brokers.redis_connection`."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """Ask in order; the one that answered is asked first the next time."""
        own = copy.copy(self)
        own.sentinels = list(self.sentinels)
        found: tuple[str, int] = Sentinel.discover_master(own, service_name)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        self.sentinels = own.sentinels
        return found


class BlockingConnections:
    """Connections to one Redis, whichever is meant by the address at that moment.

    Args: timeout_s: seconds for a connection to be made, and for each reply.
          prepare: is called with each new connection, before it is used. May raise LinkLost.
    """

    def __init__(self, address: RedisAddress, timeout_s: float, prepare: Callable[[Ask], None]) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._prepare = prepare
        self._pool, self._sentinels = self._make_pool()

    def _make_pool(self) -> tuple[ConnectionPool, Sequence[Any]]:
        address = self._address
        settings = connection_settings(address, self._timeout_s) | {
            "protocol": 2,
            "username": address.username,
            "password": address.password,
            "db": address.db,
            "client_name": address.client_name or None,
            "health_check_interval": _IDLE_S,
            "retry": Retry(NoBackoff(), 0),  # a retried PUBLISH could be delivered twice
            "redis_connect_func": self._greet,
        }
        if address.sentinel is None:
            kind = {"tcp": Connection, "tls": SSLConnection, "unix": UnixDomainSocketConnection}[address.transport]
            return ConnectionPool(connection_class=kind, **settings), ()
        tls = {"ssl": True} if address.transport == "tls" else {}
        theirs = connection_settings(address, self._timeout_s) | tls | {"protocol": 2}
        theirs |= {"username": address.sentinel.username, "password": address.sentinel.password}
        sentinel = _Sentinels(address.sentinel.hosts, sentinel_kwargs=theirs)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
        pool = SentinelConnectionPool(address.sentinel.service, sentinel, **settings, **tls)  # type: ignore[no-untyped-call]
        return pool, tuple(sentinel.sentinels)

    def _greet(self, connection: _Connection) -> None:
        try:
            connection.on_connect()
            self._prepare(lambda commands: _ask(connection, commands))
        except BaseException:
            connection.disconnect()  # or the pool would give it out as it is
            raise

    @contextmanager
    def connection(self) -> Iterator[Ask]:
        """A connection for the block, which no other thread uses meanwhile.

        Yields: what sends commands on it.
        Raises: LinkLost: there is no connection; where the block raises it, the connection is closed.
        """
        try:
            connection = self._take()
        except (RedisError, OSError) as error:
            raise LinkLost(words(error, len(self._sentinels), self._address.transport)) from error
        try:
            yield lambda commands: _ask(connection, commands)
        except LinkLost:
            connection.disconnect()
            raise
        finally:
            self._pool.release(connection)

    def _take(self) -> _Connection:
        connection: _Connection = self._pool.get_connection()
        try:
            # 0 before the first reply. redis-py would send PING now, and fail without a new connection.
            if 0 < connection.next_health_check < time.monotonic():
                connection.disconnect()
                connection.connect()
        except BaseException:
            self._pool.release(connection)
            raise
        return connection

    def close(self) -> None:
        """Close the connections that no thread uses now; later commands make new ones."""
        self._pool.disconnect(inuse_connections=False)
        for client in self._sentinels:
            client.close()


def _ask(connection: _Connection, commands: Sequence[Sequence[Any]]) -> list[Any]:
    try:
        connection.send_packed_command([packed(commands)])
        return [_reply(connection) for _ in commands]
    except BaseException as error:
        # What is still to come on it would be taken for the reply to a later command.
        connection.disconnect()
        if isinstance(error, RedisError | OSError):
            raise LinkLost(words(error)) from error
        raise


def _reply(connection: _Connection) -> Any:
    try:
        return connection.read_response()
    except ResponseError as error:
        return hiredis.ReplyError(f"{_CODES.get(type(error), '')}{error}")
