"""A cluster whose network can be partitioned, so that each side takes the other for dead.

Each node is announced at ports of proxies, for its clients and for the bus, and connects from an address of its own,
127.0.0.2 and so on, by which a proxy knows whose connection it is. Programs, such as a relay, come from 127.0.0.1.
"""

import asyncio
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from tests.support.cluster import Cluster, Node

PROGRAMS = "127.0.0.1"


class _Connection:
    """One connection through the network."""

    def __init__(self, source: str, target: str) -> None:
        self.ends = {source, target}
        self.writers: list[asyncio.StreamWriter] = []
        self.over = asyncio.Event()
        task = asyncio.current_task()
        assert task is not None, "it is made by the task that serves it"
        self.task: asyncio.Task[Any] = task

    def abort(self) -> None:
        self.over.set()
        for writer in self.writers:
            writer.transport.abort()


class Network:
    """Proxies in front of nodes, in a thread of their own; between two sides everything can be lost without a word."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._servers: list[asyncio.Server] = []
        self._connections: set[_Connection] = set()
        self._side: frozenset[str] = frozenset()

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def open(self, address: str, port: int) -> int:
        """Have a port of its own lead to a port of the node that connects from ``address``; returns it."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._serve(address, port, reader, writer)

        async def listen() -> asyncio.Server:
            return await asyncio.start_server(serve, "127.0.0.1", 0)

        server = self._run(listen())
        self._servers.append(server)
        found: int = server.sockets[0].getsockname()[1]
        return found

    def part(self, side: Collection[str]) -> None:
        """From now on lose what is sent between these addresses and the others; none is one network again.

        Where something was lost, a connection cannot go on: it is cut when both its ends are on one side again.
        """

        async def part() -> None:
            former, self._side = self._side, frozenset(side)
            for connection in tuple(self._connections):
                if self._is_lost(connection, former) and not self._is_lost(connection, self._side):
                    connection.abort()

        self._run(part())

    @staticmethod
    def _is_lost(connection: _Connection, side: frozenset[str]) -> bool:
        return len(connection.ends & side) == 1 and len(connection.ends) == 2

    async def _serve(self, address: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer.get_extra_info("peername")[0], address)
        connection.writers.append(writer)
        self._connections.add(connection)
        try:
            with suppress(OSError, asyncio.CancelledError):
                if self._is_lost(connection, self._side):
                    _ = await connection.over.wait()  # as if it were still being made
                else:
                    await self._join(connection, port, reader, writer)
        finally:
            self._connections.discard(connection)
            connection.abort()

    async def _join(
        self, connection: _Connection, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        connection.writers.append(far_writer)

        async def pump(source: asyncio.StreamReader, into: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    if not self._is_lost(connection, self._side):
                        into.write(data)
            if self._is_lost(connection, self._side):
                _ = await connection.over.wait()  # its end gets lost too

        pumps = [asyncio.create_task(pump(reader, far_writer)), asyncio.create_task(pump(far_reader, writer))]
        try:
            _ = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in pumps:
                each.cancel()
            _ = await asyncio.gather(*pumps, return_exceptions=True)

    def close(self) -> None:
        """End all connections, and the thread."""

        async def end() -> None:
            # At first nothing more is accepted: of a server that is closed meanwhile the socket would stay open.
            for server in self._servers:
                for listener in server.sockets:
                    _ = self._loop.remove_reader(listener.fileno())
            # Not the tasks of asyncio that have just accepted a connection: its socket would stay open, too.
            while asyncio.all_tasks() - {asyncio.current_task()}:
                for connection in self._connections:
                    _ = connection.task.cancel()
                await asyncio.sleep(0)
            for server in self._servers:
                server.close()
            for _ in range(3):  # what was aborted closes its socket in the next turns of the loop
                await asyncio.sleep(0)

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class PartitionedNode(Node):
    """A node behind the network.

    Args: source: the address from which it connects.
    """

    def __init__(self, network: Network, source: str, *arguments: str, binary: str | None = None) -> None:
        own = ("--bind-source-addr", source, "--cluster-announce-ip", "127.0.0.1")
        super().__init__(*own, *arguments, binary=binary)
        self.source = source
        self._network = network
        self._announced = 0, 0

    @property
    def announced(self) -> tuple[int, int]:
        """The ports that other nodes name: for clients and for the bus."""
        return self._announced

    def start(self) -> None:
        """Start it, and have it announce ports of the network."""
        super().start()
        if not any(self._announced):
            port, bus_port = (self._network.open(self.source, port) for port in (self.port, self.bus_port))
            self._announced = port, bus_port
        for name, port in zip(("port", "bus-port"), self._announced, strict=True):
            self.ask("CONFIG", "SET", f"cluster-announce-{name}", port)


class PartitionedCluster(Cluster):
    """A cluster behind a network of its own."""

    def __init__(self, *, binary: str | None = None) -> None:
        super().__init__(binary=binary)
        self._network = Network()

    def make_node(self) -> Node:
        """A server to be started, with the settings of the others."""
        source = f"127.0.0.{len(self.nodes) + 2}"
        return PartitionedNode(self._network, source, *self._arguments, binary=self._binary)

    @contextmanager
    def partitioned(self, *nodes: Node, with_programs: bool) -> Iterator[None]:
        """For the block, some nodes, with all programs or without, and the other nodes take each other for dead."""
        side = {node.source for node in nodes if isinstance(node, PartitionedNode)}
        self._network.part(side | {PROGRAMS} if with_programs else side)
        try:
            yield
        finally:
            self._network.part(())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._network.close()
