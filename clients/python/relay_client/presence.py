"""Who has joined a topic: a mapping that the server keeps up to date."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from relay_client.link import log

STATE_EVENT, DIFF_EVENT, COUNT_EVENT = "presence_state", "presence_diff", "presence_count"
EVENTS = frozenset({STATE_EVENT, DIFF_EVENT, COUNT_EVENT})

Metas: TypeAlias = tuple[Mapping[str, Any], ...]
"""What is said of the members under one key: one entry for each join, without ``phx_ref``."""


@dataclass(frozen=True, slots=True)
class PresenceChange:
    """What has changed since the change before.

    Attributes: joined: keys that are new, each with its entries.
                updated: keys with other entries than before: a further tab, a new status.
                left: keys that have gone, each with its last entries.
    """

    joined: dict[str, Metas] = field(default_factory=dict)
    updated: dict[str, Metas] = field(default_factory=dict)
    left: dict[str, Metas] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.joined or self.updated or self.left)


class Presence(Mapping[str, Metas]):
    """The members of a topic by key, as of now: ``{"alice": ({"user": "alice", "meta": {…}},)}``.

    While the topic is being rejoined it stays as it was.
    """

    def __init__(self) -> None:
        self._members: dict[str, dict[str, dict[str, Any]]] = {}  # metas by ref, by key
        self._shown: dict[str, Metas] = {}
        self._count: int | None = None
        self._pending: list[Any] = []  # differences that came before the state
        self._has_state = False
        self._is_over = False
        self._wakes: set[asyncio.Event] = set()

    def __getitem__(self, key: str) -> Metas:
        return self._shown[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shown)

    def __len__(self) -> int:
        return len(self._shown)

    def __repr__(self) -> str:
        return f"<Presence {self._shown}>"

    @property
    def count(self) -> int:
        """Number of members, which counts each join under a key; also where the server sends only the number."""
        return sum(map(len, self._shown.values())) if self._count is None else self._count

    async def changes(self) -> AsyncIterator[PresenceChange]:
        """Yield what has changed: first all members as joined, then each change, until the topic is left or closed.

        A loop that is slow receives several changes as one; nothing is queued.
        """
        wake, before = asyncio.Event(), dict[str, Metas]()
        wake.set()
        self._wakes.add(wake)
        try:
            while True:
                if not self._is_over:
                    await wake.wait()
                    wake.clear()
                now = dict(self._shown)
                if change := _between(before, now):
                    before = now
                    yield change
                elif self._is_over:
                    return
        finally:
            self._wakes.discard(wake)

    def enter(self) -> None:
        """Expect a new state: the topic was joined. Called by the channel."""
        self._has_state = False
        self._pending.clear()

    def receive(self, event: str, payload: Any) -> None:
        """Take an event about members. Called by the channel."""
        try:
            if event == COUNT_EVENT:
                self._count = int(payload["count"])
                self._members = {}
            elif event == STATE_EVENT:
                self._members = {key: _by_ref(entry) for key, entry in payload.items()}
                self._has_state, self._count = True, None
                for diff in self._pending:
                    self._apply(diff)
                self._pending.clear()
            elif self._has_state:
                self._apply(payload)
            else:
                self._pending.append(payload)
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            log.warning("%s was not understood: %r", event, error)
        self._shown = {key: tuple(map(_without_refs, metas.values())) for key, metas in self._members.items() if metas}
        self._wake()

    def end(self) -> None:
        """End all loops over changes. Called by the channel."""
        self._is_over = True
        self._wake()

    def _wake(self) -> None:
        for wake in self._wakes:
            wake.set()

    def _apply(self, diff: Any) -> None:
        joins = {key: _by_ref(entry) for key, entry in diff["joins"].items()}
        leaves = {key: _by_ref(entry) for key, entry in diff["leaves"].items()}
        for key, metas in joins.items():
            self._members.setdefault(key, {}).update(metas)
        for key, metas in leaves.items():
            known = self._members.get(key, {})
            for ref in metas:
                known.pop(ref, None)
            if not known:
                self._members.pop(key, None)


def _by_ref(entry: Any) -> dict[str, dict[str, Any]]:
    return {meta["phx_ref"]: meta for meta in entry["metas"]}


def _without_refs(meta: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in meta.items() if not name.startswith("phx_ref")}


def _between(before: dict[str, Metas], now: dict[str, Metas]) -> PresenceChange:
    return PresenceChange(
        {key: metas for key, metas in now.items() if key not in before},
        {key: metas for key, metas in now.items() if key in before and before[key] != metas},
        {key: metas for key, metas in before.items() if key not in now},
    )
