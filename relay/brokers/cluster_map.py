"""Which node of a Redis Cluster serves which of its 16384 slots, as its nodes say; without I/O.

Owns the map, and how names become slots; must not know connections.

Nodes disagree for a while after a failover, and one that is cut off from the others says what was true before. The
configuration epoch of a slot's owner says whose word is younger, so an older one changes nothing.
"""

import binascii
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

SLOTS = 16384

_FAILING = {b"fail", b"fail?"}
"""Flags of a node that does not answer the one that was asked, or most others."""


class Endpoint(NamedTuple):
    """Where a node is."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def slot_of(name: bytes) -> int:
    """The slot of a key, or of a sharded channel. Source: Redis Cluster specification, hash tags."""
    start = name.find(b"{")
    if start >= 0 and (end := name.find(b"}", start + 1)) > start + 1:
        name = name[start + 1 : end]
    return binascii.crc_hqx(name, 0) % SLOTS  # CRC-16/XMODEM


class Redirect(NamedTuple):
    """The answer of a node that does not serve a slot."""

    slot: int
    endpoint: Endpoint
    asks: bool
    """Whether it is ``ASK``: for this one command, before which ``ASKING`` has to be sent."""


def read_redirect(error: object, asked: Endpoint) -> Redirect | None:
    """Read ``MOVED 3999 host:port`` or ``ASK 3999 host:port``; None for another error.

    Args: asked: whose answer it is: an empty host means the same.
    """
    kind, _, rest = str(error).partition(" ")
    slot, _, place = rest.partition(" ")
    host, _, port = place.rpartition(":")
    if kind not in ("MOVED", "ASK") or not slot.isdecimal() or not port.isdecimal():
        return None
    return Redirect(int(slot), Endpoint(host.strip("[]") or asked.host, int(port)), kind == "ASK")


class Row(NamedTuple):
    """Slots that follow each other, and who serves them."""

    first: int
    last: int
    master: Endpoint
    epoch: int
    replicas: tuple[Endpoint, ...]


def read_rows(slots: Any, nodes: object, asked: Endpoint) -> list[Row]:
    """Read the replies to ``CLUSTER SLOTS`` and ``CLUSTER NODES``; the latter may be an error.

    Args: asked: whose answer it is: a node that gives no host means the same.
    """
    epochs: dict[bytes, int] = {}
    for line in nodes.splitlines() if isinstance(nodes, bytes) else ():
        words = line.split()
        if len(words) > 6 and words[6].isdigit():
            epochs[words[0]] = int(words[6])
    found: list[Row] = []
    for first, last, *servers in slots:
        places = [_endpoint(server, asked) for server in servers]
        if places and (master := places[0]) is not None:
            epoch = epochs.get(servers[0][2], 0) if len(servers[0]) > 2 else 0
            found.append(Row(int(first), int(last), master, epoch, tuple(filter(None, places[1:]))))
    return found


def read_isolation(nodes: object) -> str:
    """Read the reply to ``CLUSTER NODES``: why the node that was asked has no majority of the masters on its side.

    Empty where it has, and for an error. What such a node serves, the others may have given to a replica.
    Source: Redis ``cluster.c: clusterUpdateState``, without its check for slots that are not served.
    """
    lines = [line.split() for line in nodes.splitlines()] if isinstance(nodes, bytes) else []
    # Behind the slots of a node are those that are on their way to it, in brackets.
    masters = [words[2] for words in lines if len(words) > 8 and b"master" in words[2] and words[8][:1] != b"["]
    reached = sum(_FAILING.isdisjoint(flags.split(b",")) for flags in masters)
    return "" if not masters or reached > len(masters) // 2 else f"sees {reached} of {len(masters)} masters"


def _endpoint(server: Any, asked: Endpoint) -> Endpoint | None:
    host = (server[0] or b"").decode(errors="replace")
    if host == "?" or not server[1]:  # a node whose address is not known yet
        return None
    return Endpoint(host or asked.host, int(server[1]))


class SlotMap:
    """Who serves each slot, as far as is known."""

    def __init__(self) -> None:
        self.owners: list[Endpoint | None] = [None] * SLOTS
        self.replicas: tuple[Endpoint, ...] = ()
        self._epochs = [0] * SLOTS
        self._last: list[Row] = []

    @property
    def masters(self) -> tuple[Endpoint, ...]:
        """All that serve some slot."""
        return tuple(dict.fromkeys(each for each in self.owners if each is not None))

    def learn(self, rows: Iterable[Row], is_alive: Callable[[Endpoint], bool]) -> bool:
        """Take what a node says; whether it has changed something.

        Args: is_alive: whether a node answers: an older word counts against one that does not.
        """
        rows = list(rows)
        if rows == self._last:
            return False
        self.replicas = tuple(dict.fromkeys(replica for row in rows for replica in row.replicas))
        owners, epochs, changed, is_older = self.owners, self._epochs, False, False
        for row in rows:
            for slot in range(row.first, min(row.last + 1, SLOTS)):
                owner = owners[slot]
                if owner == row.master:
                    epochs[slot] = max(epochs[slot], row.epoch)
                elif owner is None or row.epoch >= epochs[slot] or not is_alive(owner):
                    owners[slot], epochs[slot], changed = row.master, row.epoch, True
                else:
                    is_older = True
        self._last = [] if is_older else rows
        return changed

    def move(self, slot: int, owner: Endpoint) -> None:
        """Take the word of a node that has refused a command, until the next `learn`."""
        self.owners[slot] = owner
        self._last = []

    def slots(self, owner: Endpoint) -> Iterable[int]:
        """The slots that a node serves."""
        return (slot for slot, each in enumerate(self.owners) if each == owner)
