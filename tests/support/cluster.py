"""Redis Clusters of real servers on loopback, made without a command line tool."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from tests.support.patience import PATIENCE
from tests.support.process import Started, Valkey, free_port, wait_for

SLOTS = 16384
NODE_TIMEOUT_MS = 1000


class Node(Valkey):
    """One server of a cluster."""

    def __init__(self, *arguments: str, binary: str | None = None) -> None:
        settings = ("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        timing = ("--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--cluster-replica-validity-factor", "0")
        super().__init__(
            *settings,
            *timing,
            "--repl-diskless-sync-delay",
            "0",
            "--enable-debug-command",
            "yes",
            *arguments,
            binary=binary,
        )
        self.bus_port = int(settings[-1])
        self._id = ""

    @property
    def announced(self) -> tuple[int, int]:
        """The ports that other nodes name: for clients and for the bus."""
        return self.port, self.bus_port

    def ask(self, *command: str | int) -> Any:
        """A command, on a connection of its own."""
        with Redis(port=self.port, decode_responses=True, socket_timeout=5) as redis:
            execute: Any = redis.execute_command
            return execute(*command)

    def raw(self, *command: str | int) -> str:
        """The same, without the callbacks of redis-py, which make objects of the text."""
        with Redis(port=self.port, decode_responses=True, socket_timeout=5) as redis:
            redis.response_callbacks.clear()
            execute: Any = redis.execute_command
            return str(execute(*command))

    def ask_all(self, commands: Sequence[Sequence[str | int]]) -> list[Any]:
        """Many commands in one round trip; their replies, errors among them."""
        with Redis(port=self.port, socket_timeout=20) as redis, redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = pipeline.execute(raise_on_error=False)
            return replies

    def slots(self) -> Any:
        """``CLUSTER SLOTS``, as it comes."""
        with Redis(port=self.port, decode_responses=True, socket_timeout=2 * PATIENCE) as redis:
            redis.response_callbacks.clear()
            execute: Any = redis.execute_command
            return execute("CLUSTER SLOTS")

    @property
    def id(self) -> str:
        """Its name among the nodes; it stays over restarts."""
        self._id = self._id or str(self.ask("CLUSTER", "MYID"))
        return self._id

    @property
    def is_master(self) -> bool:
        """Whether it says so itself; False where it does not answer."""
        try:
            with Redis(port=self.port, decode_responses=True, socket_timeout=5) as redis:
                return str(redis.info("replication")["role"]) == "master"
        except (RedisError, OSError):
            return False

    def knows(self, text: str) -> bool:
        """Whether ``CLUSTER INFO`` or ``CLUSTER NODES`` says something."""
        return text in self.raw("CLUSTER INFO") + self.raw("CLUSTER NODES")


class Cluster(Started):
    """Masters that share all slots, and as many replicas for each.

    Args: masters: how many.
          replicas: of each.
    """

    def __init__(self, masters: int = 3, replicas: int = 1, *arguments: str, binary: str | None = None) -> None:
        self._arguments = arguments
        self._binary = binary
        self._shape = masters, replicas
        self.nodes: list[Node] = []

    @property
    def url(self) -> str:
        """For relay: all nodes."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.announced[0]}" for node in self.nodes)

    @property
    def masters(self) -> list[Node]:
        """Those that were made masters at the start, the owner of the first slots first."""
        return self.nodes[: self._shape[0]]

    def replicas(self, master: Node) -> list[Node]:
        """Those that were made its replicas at the start."""
        masters = self._shape[0]
        return self.nodes[masters + self.masters.index(master) :: masters]

    def start(self) -> None:
        """Start all servers and wait until each knows the whole cluster."""
        masters, replicas = self._shape
        for node in self.nodes:
            node.start()
        while len(self.nodes) < masters * (1 + replicas):
            self.nodes.append(self.make_node())
            self.nodes[-1].start()
        bounds = [SLOTS * number // masters for number in range(masters + 1)]
        for number, node in enumerate(self.masters):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.ask("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for node in self.nodes[1:]:
            self.meet(node)
        self.wait_until_known()
        for master in self.masters:
            for replica in self.replicas(master):
                replicate(replica, master)
        self.wait_until_whole()

    def make_node(self) -> Node:
        """A server to be started, with the settings of the others."""
        return Node(*self._arguments, binary=self._binary)

    def meet(self, node: Node) -> None:
        """Make a server known to the others."""
        self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", *node.announced)

    def add(self) -> Node:
        """Start one more server, without slots; wait until all know it."""
        node = self.make_node()
        self.nodes.append(node)
        node.start()
        self.meet(node)
        self.wait_until_known()
        return node

    def remove(self, node: Node) -> None:
        """End a server that serves no slots, and have the others forget it."""
        name = node.id
        self.nodes.remove(node)
        node.__exit__(None, None, None)
        for other in self.nodes:
            other.ask("CLUSTER", "FORGET", name)

    def wait_until_known(self) -> None:
        """Wait until all servers know each other."""
        wait_for(lambda: all(node.knows(f"cluster_known_nodes:{len(self.nodes)}") for node in self.nodes), "nodes")

    def wait_until_whole(self) -> None:
        """Wait until all servers that run agree who serves the slots, and replicas follow their masters."""
        wait_for(self._is_whole, "the cluster")

    def _is_whole(self) -> bool:
        views = set()
        for node in self.nodes:
            try:
                if node.process is None or node.process.poll() is not None:
                    continue
                if not node.knows("cluster_state:ok") or not node.knows(f"cluster_slots_ok:{SLOTS}"):
                    return False
                if not node.is_master and "master_link_status:up" not in node.raw("INFO", "replication"):
                    return False
                views.add(tuple(sorted((row[0], row[1], row[2][1]) for row in node.slots())))
            except (RedisError, OSError):
                return False
        return len(views) == 1

    def owners(self) -> list[Node | None]:
        """Who serves each slot, as one that runs says."""
        found: list[Node | None] = [None] * SLOTS
        by_id = {node.id: node for node in self.nodes}
        for node in self.nodes:
            try:
                for first, last, (_, _, name, *_), *_ in node.slots():
                    found[first : last + 1] = [by_id[name]] * (last + 1 - first)
                return found
            except (RedisError, OSError):
                continue
        return found

    def owner(self, slot: int) -> Node:
        """Who serves a slot, as one that runs says."""
        found = self.owners()[slot]
        assert found is not None, f"no node serves slot {slot}"
        return found

    def slots_of(self, node: Node) -> list[int]:
        """The slots that a server serves."""
        return [slot for slot, owner in enumerate(self.owners()) if owner is node]

    def move_slot(self, slot: int, to: Node) -> None:
        """Give a slot without keys to another master, as ``redis-cli --cluster reshard`` does."""
        self.move_slots([slot], self.owner(slot), to)

    def move_slots(self, slots: Sequence[int], source: Node, to: Node) -> None:
        """Give slots without keys to another master, all of them in the same steps."""
        steps = ((to, "IMPORTING", source), (source, "MIGRATING", to), (to, "NODE", to), (source, "NODE", to))
        for number, (asked, state, other) in enumerate(steps):
            replies = asked.ask_all([("CLUSTER", "SETSLOT", slot, state, other.id) for slot in slots])
            # In the last step the source may have no slot left, and be a replica by now.
            faults = [reply for reply in replies if isinstance(reply, RedisError)]
            assert not faults or number == len(steps) - 1, faults[0]

    def migrate_slots(self, slots: Sequence[int], source: Node, to: Node) -> None:
        """Give slots with their keys to another master, at once; Valkey 9 alone can do that."""
        ends = [n for n, slot in enumerate(slots) if n + 1 == len(slots) or slots[n + 1] != slot + 1]
        first = 0
        for end in ends:
            source.ask("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slots[first], slots[end], "NODE", to.id)
            first = end + 1
        wait_for(lambda: not set(self.slots_of(source)) & set(slots), "the slots to be migrated")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for node in self.nodes:
            node.__exit__(kind, error, traceback)


def replicate(replica: Node, master: Node) -> None:
    """Make a server a replica of a master that it knows."""
    name, end = master.id, time.monotonic() + 20 * PATIENCE
    while True:
        try:
            replica.ask("CLUSTER", "REPLICATE", name)
        except RedisError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return
