"""Commands to a Redis Cluster from programs that publish: each goes to the master that serves its key or channel.

Owns the connections, in event loops and without, and sends again what was refused because a slot has moved; must not
know what is sent.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hiredis

from relay import redis_url
from relay.brokers.cluster_map import Endpoint, Row, SlotMap, read_isolation, read_redirect, read_rows, slot_of
from relay.brokers.redis_blocking import Ask, BlockingConnections
from relay.brokers.redis_commands import FOR_PUBLISHERS, RedisCommands, Turns
from relay.brokers.redis_connection import Connections, LinkLost, words
from relay.config import SETTINGS_KEY
from relay.errors import BusUnavailable
from relay.redis_url import ClusterAddress

MAP_QUESTIONS = (("CLUSTER", "SLOTS"), ("CLUSTER", "NODES"))
"""What a node is asked for the map of slots."""

_LOOK_S = 60.0
"""Seconds for which the map counts; a program that does not publish on each node learns of new ones in no other way."""

_ATTEMPTS = 6
_AGAIN_S = 0.05
"""Seconds before commands are sent a second time; before the third twice as many, and so on."""


def rows_from(slots: object, nodes: object, asked: Endpoint) -> list[Row]:
    """Read the replies to `MAP_QUESTIONS`. Raises LinkLost, in words, where they are no map."""
    if isinstance(slots, hiredis.ReplyError):
        text = str(slots).lower()
        if "cluster support disabled" in text or "unknown command" in text:
            raise LinkLost("this server is no node of a cluster: expected redis://host:port as its address")
        allow = "; allow it with +cluster|slots" if text.startswith("noperm") else ""
        raise LinkLost(f"CLUSTER SLOTS: {words(slots)}{allow}")
    rows = read_rows(slots, nodes, asked)
    if not rows:
        raise LinkLost("the cluster serves no slots")
    return rows


async def ask_map(address: ClusterAddress, endpoint: Endpoint, limit_s: float) -> tuple[list[Row], str]:
    """Ask a node who serves which slots, and why it has no majority on its side. Raises LinkLost."""
    connections = Connections(redis_url.parse(address.node_url(*endpoint)), limit_s)
    connection = await connections.open()
    try:
        async with asyncio.timeout(limit_s):
            slots, nodes = [await connection.ask(*question) for question in MAP_QUESTIONS]
    except TimeoutError:
        raise LinkLost(f"no answer to CLUSTER SLOTS within {limit_s:g} s") from None
    finally:
        await connection.close()
        await connections.close()
    return rows_from(slots, nodes, endpoint), read_isolation(nodes)


class _Routes:
    """Which command goes where, and which have to be sent again; without I/O."""

    def __init__(self, address: ClusterAddress) -> None:
        self._address = address
        self._map = SlotMap()
        self._known_until = 0.0

    @property
    def is_known(self) -> bool:
        """Whether the map was read, and not long ago."""
        return time.monotonic() < self._known_until

    def forget(self) -> None:
        """Have the map read again before the next command."""
        self._known_until = 0.0

    def whom_to_ask(self) -> list[Endpoint]:
        """Who may know the map: masters that are known, then the nodes of the address."""
        given = (Endpoint(*node) for node in self._address.nodes)
        return list(dict.fromkeys((*self._map.masters, *given)))

    def learn(self, rows: Sequence[Row]) -> None:
        _ = self._map.learn(rows, lambda _: False)
        self._known_until = time.monotonic() + _LOOK_S

    def split(self, commands: Sequence[Sequence[Any]], which: Sequence[int]) -> dict[Endpoint, list[int]]:
        """Commands by node, in their order. Raises LinkLost."""
        found: dict[Endpoint, list[int]] = defaultdict(list)
        for number in which:
            slot = slot_of(_name(commands[number]))
            owner = self._map.owners[slot]
            if owner is None:
                raise LinkLost(f"no node serves slot {slot}")
            found[owner].append(number)
        return found


def _name(command: Sequence[Any]) -> bytes:
    """The key or channel that a command is about."""
    if command[0] in ("EVAL", "EVALSHA"):
        name = command[3]
    else:
        name = command[1] if len(command) > 1 else SETTINGS_KEY
    return name if isinstance(name, bytes) else str(name).encode()


def _refused(replies: Sequence[Any]) -> list[int]:
    """Commands that another node has to carry out."""
    return [number for number, reply in enumerate(replies) if read_redirect(reply, Endpoint("", 0)) is not None]


class ClusterCommands:
    """Sends commands in an event loop, and waits for their replies; see `RedisCommands`.

    Args: prepare: is called each time the map was asked for, because it was not known. May raise BusUnavailable.
    """

    def __init__(
        self, address: ClusterAddress, timeout_s: float, prepare: "Callable[[ClusterCommands], Awaitable[None]]"
    ) -> None:
        self._prepare = prepare
        self._address = address
        self._timeout_s = timeout_s
        self._routes = _Routes(address)
        self._learning = Turns()
        self._nodes: dict[Endpoint, tuple[Connections, RedisCommands]] = {}

    async def connect(self) -> None:
        """Learn who serves which slots, where that is not known, in the order of the calls. Raises BusUnavailable."""
        if self._routes.is_known and not self._learning.are_taken:
            return
        async with self._learning:
            if not self._routes.is_known:
                await self._learn()
                await self._prepare(self)

    async def replies(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """Send commands together and wait for all replies, errors among them. Raises BusUnavailable."""
        if not self._routes.is_known:
            await self.connect()
        found: list[Any] = [None] * len(commands)
        which = list(range(len(commands)))
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                groups = self._routes.split(commands, which)
            except LinkLost as lost:
                raise BusUnavailable(str(lost)) from lost
            asked = [self._node(node).replies([commands[n] for n in numbers]) for node, numbers in groups.items()]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            for numbers, answer in zip(groups.values(), answers, strict=True):
                if isinstance(answer, BaseException):
                    self._routes.forget()
                    raise answer
                for number, reply in zip(numbers, answer, strict=True):
                    found[number] = reply
            which = _refused(found)
            if not which or attempt == _ATTEMPTS:
                break
            await asyncio.sleep(_AGAIN_S * (attempt - 1))
            await self._learn()
        return found

    def _node(self, endpoint: Endpoint) -> RedisCommands:
        if endpoint not in self._nodes:
            connections = Connections(redis_url.parse(self._address.node_url(*endpoint)), self._timeout_s)
            self._nodes[endpoint] = connections, RedisCommands(connections, self._timeout_s, FOR_PUBLISHERS)
        return self._nodes[endpoint][1]

    async def _learn(self) -> None:
        faults: list[str] = []
        for endpoint in self._routes.whom_to_ask():
            try:
                rows, _ = await ask_map(self._address, endpoint, self._timeout_s)
                self._routes.learn(rows)
            except LinkLost as lost:
                faults.append(f"{endpoint}: {lost}")
            else:
                return
        raise BusUnavailable(faults[0])

    def reconnect(self) -> None:
        """Ask again who serves which slots before the next command."""
        self._routes.forget()

    async def close(self) -> None:
        """End the connections."""
        nodes, self._nodes = self._nodes, {}
        for connections, commands in nodes.values():
            await commands.close()
            await connections.close()


class BlockingCluster:
    """Sends commands without an event loop; see `BlockingConnections`.

    Args: timeout_s: seconds for a connection to be made, and for each reply.
          prepare: is called with what sends commands, each time the map was asked for. May raise LinkLost.
    """

    def __init__(self, address: ClusterAddress, timeout_s: float, prepare: Callable[[Ask], None]) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._prepare = prepare
        self._routes = _Routes(address)
        self._nodes: dict[Endpoint, BlockingConnections] = {}

    @contextmanager
    def connection(self) -> Iterator[Ask]:
        """What sends commands, for the block. Raises LinkLost."""
        if not self._routes.is_known:
            self._learn()
            self._prepare(self._ask)
        try:
            yield self._ask
        except LinkLost:
            self._routes.forget()
            raise

    def _ask(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        found: list[Any] = [None] * len(commands)
        which = list(range(len(commands)))
        for attempt in range(1, _ATTEMPTS + 1):
            for endpoint, numbers in self._routes.split(commands, which).items():
                with self._node(endpoint).connection() as ask:
                    for number, reply in zip(numbers, ask([commands[n] for n in numbers]), strict=True):
                        found[number] = reply
            which = _refused(found)
            if not which or attempt == _ATTEMPTS:
                break
            time.sleep(_AGAIN_S * (attempt - 1))
            self._learn()
        return found

    def _node(self, endpoint: Endpoint) -> BlockingConnections:
        found = self._nodes.get(endpoint)
        if found is None:
            address = redis_url.parse(self._address.node_url(*endpoint))
            found = self._nodes.setdefault(endpoint, BlockingConnections(address, self._timeout_s, _nothing))
        return found

    def _learn(self) -> None:
        faults: list[str] = []
        for endpoint in self._routes.whom_to_ask():
            try:
                with self._node(endpoint).connection() as ask:
                    slots, nodes = ask(MAP_QUESTIONS)
                self._routes.learn(rows_from(slots, nodes, endpoint))
            except LinkLost as lost:
                faults.append(f"{endpoint}: {lost}")
            else:
                return
        raise LinkLost(faults[0])

    def close(self) -> None:
        """Close the connections; later commands make new ones."""
        for node in tuple(self._nodes.values()):
            node.close()


def _nothing(ask: Ask) -> None:
    """A node alone needs no preparation."""
