"""Presence on four nodes that are killed, stalled and cut off: in the end everybody knows who is there.

A model keeps the truth: who has joined where. After quiet of one lease every client's list equals it, and no client
was told that somebody had left who stayed.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import jwt
import pytest
from redis.asyncio import Redis

from tests.support.client import Client
from tests.support.process import RelayProcess, Valkey

LEASE_S, RENEW_S, DELAY_S = 1.5, 0.5, 0.5
TOPIC = "room:1"

SETTINGS = f"""
system_topic = false
[limits]
joins_per_s = 0
[redis]
backoff_min_s = 0.02
backoff_max_s = 0.1
timeout_s = 2
ping_interval_s = 0.5
ping_timeout_s = 1
[presence]
lease_s = {LEASE_S}
renew_s = {RENEW_S}
leave_delay_s = {DELAY_S}
[[topics]]
match = "room:*"
presence = true
"""


class Member:
    """A client that joins, comes back after each cut, and keeps the list as phoenix.js does."""

    def __init__(self, name: str, key: str = "") -> None:
        self.name = name
        self._query = f"token={jwt.encode({'sub': name, 'exp': time.time() + 600}, key)}" if key else ""
        self.metas: dict[str, str] | None = None
        """Name by ref."""
        self.left: list[str] = []
        """Names that were told to have left while this member was connected."""
        self.node: RelayProcess | None = None
        self._task: asyncio.Task[None] | None = None

    def go_to(self, node: RelayProcess) -> None:
        self.node = node
        self._task = asyncio.create_task(self._run(node))

    async def go(self) -> None:
        if self._task is not None:
            self._task.cancel()
            _ = await asyncio.gather(self._task, return_exceptions=True)
        self.node = self._task = self.metas = None

    async def _run(self, node: RelayProcess) -> None:
        while True:
            self.metas = None
            try:
                async with Client.connect(node.ws, query=self._query) as client:
                    await self._serve(client)
            except Exception:  # cut, refused, stalled: it comes back
                await asyncio.sleep(0.05)

    async def _serve(self, client: Client) -> None:
        ref = "1"
        await client.send(ref, ref, TOPIC, "phx_join", {"presence": {"name": self.name}})
        while True:
            _, _, _, event, payload = await client.receive()
            if event == "phx_error" or (event == "phx_reply" and payload["status"] == "error"):
                await asyncio.sleep(0.05)
                ref = str(int(ref) + 1)
                await client.send(ref, ref, TOPIC, "phx_join", {"presence": {"name": self.name}})
            elif event == "presence_state":
                self.metas = _metas(payload)
            elif event == "presence_diff" and self.metas is not None:
                before = set(self.metas.values())
                self.metas |= _metas(payload["joins"])
                for gone in _metas(payload["leaves"]):
                    _ = self.metas.pop(gone, None)
                self.left += before - set(self.metas.values())

    @property
    def names(self) -> list[str] | None:
        return None if self.metas is None else sorted(self.metas.values())


def _metas(entries: dict[str, Any]) -> dict[str, str]:
    return {meta["phx_ref"]: meta["meta"]["name"] for entry in entries.values() for meta in entry["metas"]}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "relay.toml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture
def server() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


async def settled(members: list[Member], deadline_s: float) -> None:
    """Every member that is there knows exactly those that are."""
    expected = sorted(member.name for member in members if member.node is not None)
    try:
        async with asyncio.timeout(deadline_s):
            while any(member.names != expected for member in members if member.node is not None):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        wrong = {
            member.name: member.names for member in members if member.node is not None and member.names != expected
        }
        raise AssertionError(f"expected {expected}, got {wrong}") from None


@pytest.mark.parametrize("seed", [1])
async def test_every_list_equals_the_truth_in_the_end(config: Path, server: Valkey, seed: int) -> None:
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        nodes = [RelayProcess("--config", str(config), "--redis-url", server.url) for _ in range(4)]
        for node in nodes:
            stack.enter_context(node)
        members = [Member(f"m{number}") for number in range(12)]
        stack.push_async_callback(lambda: asyncio.gather(*(member.go() for member in members)))
        admin = await stack.enter_async_context(Redis(port=server.port))
        for member in members:
            member.go_to(chance.choice(nodes))
        await settled(members, 10)

        def start() -> RelayProcess:
            return stack.enter_context(RelayProcess("--config", str(config), "--redis-url", server.url))

        for _ in range(6):
            for _ in range(chance.randrange(1, 4)):
                await disturb(chance, nodes, members, server, admin, start)
            await settled(members, 15)
        stayed = chance.choice(members)
        if stayed.node is None:
            stayed.go_to(nodes[0])
        await settled(members, 15)


async def disturb(
    chance: random.Random,
    nodes: list[RelayProcess],
    members: list[Member],
    server: Valkey,
    admin: Any,
    start: Callable[[], RelayProcess],
) -> None:
    """Let something happen to a member, a node, or Redis."""
    kind = chance.choice(["come", "go", "move", "kill", "stall", "cut", "flush", "restart"])
    member, node = chance.choice(members), chance.choice(nodes)
    if kind == "come" and member.node is None:
        member.go_to(node)
    elif kind == "go":
        await member.go()
    elif kind == "move":
        await member.go()
        member.go_to(node)
    elif kind == "kill":
        assert node.process is not None
        for each in members:
            if each.node is node:
                await each.go()
        node.process.kill()
        nodes[nodes.index(node)] = await asyncio.to_thread(start)
    elif kind == "stall":
        assert node.process is not None
        node.process.send_signal(19)  # SIGSTOP
        await asyncio.sleep(LEASE_S + RENEW_S)
        node.process.send_signal(18)  # SIGCONT
    elif kind == "cut":
        for kind_of_client in ("normal", "pubsub"):
            await admin.client_kill_filter(_type=kind_of_client, skipme=True)
    elif kind == "flush":
        await admin.flushall()
    elif kind == "restart":
        server.kill()
        await asyncio.sleep(chance.random() / 2)
        await asyncio.to_thread(server.start)


async def test_killed_node_is_gone_within_lease_renewal_and_delay(config: Path, server: Valkey) -> None:
    async with AsyncExitStack() as stack:
        first, second = (
            stack.enter_context(RelayProcess("--config", str(config), "--redis-url", server.url)) for _ in range(2)
        )
        members = [Member(f"m{number}") for number in range(30)]
        stack.push_async_callback(lambda: asyncio.gather(*(member.go() for member in members)))
        for number, member in enumerate(members):
            member.go_to(first if number < 3 else second)
        await settled(members, 10)
        assert second.process is not None
        second.process.kill()
        for member in members[3:]:
            await member.go()
        # Measured from here, with what a test machine under load takes besides.
        await settled(members, LEASE_S + RENEW_S + DELAY_S + 3)


KEY = "a secret of thirty-two bytes or more"


@pytest.fixture
def config_with_users(tmp_path: Path) -> Path:
    grants = '[[auth.authenticated]]\nmatch = "*"\nrights = ["join", "presence"]\n'
    path = tmp_path / "relay.toml"
    path.write_text(
        SETTINGS.replace(f"leave_delay_s = {DELAY_S}", "leave_delay_s = 10") + f'[auth]\nkeys = ["{KEY}"]\n{grants}'
    )
    return path


async def test_rolling_restart_does_not_flicker(config_with_users: Path, server: Valkey) -> None:
    """Two nodes end in good order, one after the other; their users find the other one within the delay."""
    async with AsyncExitStack() as stack:

        def start() -> RelayProcess:
            return stack.enter_context(RelayProcess("--config", str(config_with_users), "--redis-url", server.url))

        nodes = [start() for _ in range(3)]
        bystander = Member("bystander", KEY)
        members = [bystander, *(Member(f"m{number}", KEY) for number in range(10))]
        stack.push_async_callback(lambda: asyncio.gather(*(member.go() for member in members)))
        bystander.go_to(nodes[0])
        for member in members[1:]:
            member.go_to(nodes[1])
        await settled(members, 10)
        for old, new in ((1, 2), (2, 1)):
            for member in members[1:]:
                await member.go()
                member.go_to(nodes[new])
            nodes[old].stop()
            await settled(members, 10)
            nodes[old] = await asyncio.to_thread(start)
        assert bystander.left == []
