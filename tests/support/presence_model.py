"""Real nodes with presence, clients that keep the list as phoenix.js does, and the truth to compare them with.

Used by ``tests/integration/faults/test_presence_faults.py``, for seconds, and by ``tests/soak.py``, for an hour.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import jwt
from redis.asyncio import Redis

from tests.support.client import Client
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey

TOPIC = "room:1"
KEY = "a secret of thirty-two bytes or more"
API_KEY = "the key of the tests"


@dataclass(frozen=True)
class Times:
    """Settings of presence, in seconds; short ones unless told otherwise."""

    lease_s: float = 1.5
    renew_s: float = 0.5
    leave_delay_s: float = 2.0

    @property
    def dead_s(self) -> float:
        """After which all have forgotten a node that was killed, its keys in Redis too."""
        return 4 * self.lease_s + 2 * self.renew_s

    @property
    def gone_s(self) -> float:
        """After which no client lists the members of a node that was killed."""
        return self.lease_s + self.renew_s + self.leave_delay_s


def settings(times: Times, on_gap: str = "ignore", more: str = "") -> str:
    """The settings of a node; its clients are authenticated, so that their keys outlive their sockets."""
    return f"""
system_topic = false
[rest]
api_key = "{API_KEY}"
[auth]
keys = ["{KEY}"]
authenticated = [{{ match = "*", rights = ["join", "push", "presence"] }}]
[limits]
joins_per_s = 0
presence_per_s = 0
[redis]
backoff_min_s = 0.02
backoff_max_s = 0.1
timeout_s = 2
ping_interval_s = 0.5
ping_timeout_s = 1
[presence]
lease_s = {times.lease_s}
renew_s = {times.renew_s}
leave_delay_s = {times.leave_delay_s}
[[topics]]
match = "room:*"
presence = true
presence_max = 5000
on_gap = "{on_gap}"
{more}"""


class Member:
    """A client that joins, comes back after each cut, and keeps the list as phoenix.js does.

    Args: reads: whether it keeps the list, or throws away what comes.
          params: of its join, besides what it says of itself.
    """

    def __init__(self, name: str, *, reads: bool = True, params: dict[str, Any] | None = None) -> None:
        self.name = name
        self._params = {"presence": {"name": name}, **(params or {})}
        self._query = f"token={jwt.encode({'sub': name, 'exp': time.time() + 86_400}, KEY)}"
        self._reads = reads
        self.refs: dict[str, str] = {}
        """Keys by ref, as shown last, over all connections."""
        self.is_current = False
        """Whether the list is that of the present join."""
        self.is_joined = False
        self.left: list[tuple[str, float]] = []
        """Keys that `onLeave` was called for with nothing left, each with when."""
        self.nodes: list[RelayProcess] = []
        self._task: asyncio.Task[None] | None = None

    def go_to(self, *nodes: RelayProcess) -> None:
        """Connect to the first of these that lets it in, and stay connected until `go`."""
        self.nodes = list(nodes)
        self.refs.clear()  # a page that was opened now
        self._task = asyncio.create_task(self._run())

    async def go(self) -> None:
        if self._task is not None:
            self._task.cancel()
            _ = await asyncio.gather(self._task, return_exceptions=True)
        self.nodes, self._task = [], None
        self.is_current = self.is_joined = False

    async def _run(self) -> None:
        while True:
            self.is_current = self.is_joined = False
            try:
                async with Client.connect(self.nodes[0].ws, query=self._query) as client:
                    await self._serve(client)
            except Exception:  # cut, refused, stalled: it comes back, elsewhere where it can
                self.nodes.append(self.nodes.pop(0))
                await asyncio.sleep(random.uniform(0.01, 0.1))

    async def _serve(self, client: Client) -> None:
        ref = 1
        await client.send("1", "1", TOPIC, "phx_join", self._params)
        while True:
            frame = await client.connection.recv()
            if self.is_joined and not self._reads and b"phx_" not in frame[:80].encode():  # type: ignore[union-attr]
                continue
            _, _, _, event, payload = json.loads(frame)
            if event == "phx_error" or (event == "phx_reply" and payload["status"] == "error"):
                self.is_current = self.is_joined = False
                await asyncio.sleep(0.05)
                ref += 1
                await client.send(str(ref), str(ref), TOPIC, "phx_join", self._params)
            elif event == "phx_reply":
                self.is_joined = True
            elif event == "presence_state":
                self._show(_keys(payload))
                self.is_current = True
            elif event == "presence_diff":
                gone = _keys(payload["leaves"])
                now = self.refs | _keys(payload["joins"])
                self._show({ref: key for ref, key in now.items() if ref not in gone})

    def _show(self, refs: dict[str, str]) -> None:
        before, self.refs = set(self.refs.values()), refs
        self.left += ((key, time.monotonic()) for key in before - set(refs.values()))

    @property
    def keys(self) -> list[str] | None:
        """What it lists, each key as often as it has entries; None without a list."""
        return sorted(self.refs.values()) if self.is_current else None


def _keys(entries: dict[str, Any]) -> dict[str, str]:
    found = {}
    for key, entry in entries.items():
        for meta in entry["metas"]:
            assert meta["user"] == key
            found[meta["phx_ref"]] = key
    return found


async def until(condition: Callable[[], bool], what: Callable[[], object], deadline_s: float) -> None:
    try:
        async with asyncio.timeout(deadline_s * PATIENCE):
            while not condition():  # noqa: ASYNC110 - what is awaited differs
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(what()) from None


def members_of(node: RelayProcess) -> list[str] | None:
    """What a node itself says of the topic, each key as often as it has entries; None where it does not know now."""
    request = Request(f"{node.http}/api/presence?topic={TOPIC}", headers={"authorization": f"Bearer {API_KEY}"})
    try:
        with urlopen(request, timeout=30) as answer:
            found = json.loads(answer.read())["members"]
    except HTTPError as error:
        if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
            raise
        return None
    return sorted(key for key, metas in found.items() for _ in metas)


class World:
    """Four nodes on one Redis, members on them, and what happens to all of these.

    Args: seed: what happens by chance is the same for the same seed.
          config: of the nodes.
    """

    def __init__(self, seed: int, times: Times, config: Path, stack: AsyncExitStack) -> None:
        self._chance = random.Random(seed)
        self._times = times
        self._stack = stack
        self._server = stack.enter_context(Valkey())
        self._redis: Any = Redis(port=self._server.port)
        self._arguments = ("--config", str(config), "--redis-url", self._server.url)
        self.nodes: list[RelayProcess] = []
        self.members = [Member(f"m{number}") for number in range(12)]
        self.done: list[str] = []
        # Who has left or was held up, and until when others may see it leave: a list that is right in the meantime may
        # be one that has not heard of it yet.
        self._disturbed: dict[str, float] = {}

    @classmethod
    @asynccontextmanager
    async def run(
        cls, seed: int, directory: Path, times: Times | None = None, on_gap: str = "ignore"
    ) -> AsyncIterator["World"]:
        """Four nodes, with members that have settled."""
        times = times or Times()
        config = directory / f"relay-{seed}.toml"
        config.write_text(settings(times, on_gap))
        async with AsyncExitStack() as stack:
            self = cls(seed, times, config, stack)
            stack.push_async_callback(self._redis.aclose)
            self.nodes = await asyncio.gather(*(asyncio.to_thread(self._start) for _ in range(4)))
            stack.push_async_callback(lambda: asyncio.gather(*(member.go() for member in self.members)))
            for member in self.members:
                member.go_to(self._chance.choice(self.nodes))
            await self.check()
            yield self

    def _start(self) -> RelayProcess:
        return self._stack.enter_context(RelayProcess(*self._arguments))

    async def disturb(self) -> None:
        """Let something happen to a member, a node, or Redis."""
        kind = self._chance.choice(["come", "go", "move", "kill", "stall", "cut", "flush", "restart"])
        member, node = self._chance.choice(self.members), self._chance.choice(self.nodes)
        on_node = [each for each in self.members if node in each.nodes]
        self.done.append(kind)
        if kind == "come" and not member.nodes:
            member.go_to(node)
        elif kind == "go":
            await self._leave(member)
        elif kind == "move":
            await self._leave(member)
            member.go_to(node)
        elif kind == "kill":
            assert node.process is not None
            for each in on_node:
                await self._leave(each)
            node.process.kill()
            self.nodes[self.nodes.index(node)] = await asyncio.to_thread(self._start)
        elif kind == "stall":
            assert node.process is not None
            node.process.send_signal(19)  # SIGSTOP
            await asyncio.sleep(self._times.lease_s + self._times.renew_s)
            node.process.send_signal(18)  # SIGCONT
            for each in on_node:
                self._disturb(each)
        elif kind == "cut":
            for kind_of_client in ("normal", "pubsub"):
                await self._redis.client_kill_filter(_type=kind_of_client, skipme=True)
        elif kind == "flush":
            await self._redis.flushall()
        elif kind == "restart":
            self._server.kill()
            await asyncio.sleep(self._chance.random() / 2)
            await asyncio.to_thread(self._server.start)

    def _disturb(self, member: Member) -> None:
        self._disturbed[member.name] = time.monotonic() + self._times.gone_s + 2 * PATIENCE

    async def _leave(self, member: Member) -> None:
        self._disturb(member)
        await member.go()

    async def check(self, patience_s: float = 10) -> None:
        """Each client and each node lists exactly those who are there, and nobody who stayed was seen to leave.

        Args: patience_s: seconds for a slow machine, besides one lease with all that follows it.
        """
        expected = sorted(member.name for member in self.members if member.nodes)
        there = [member for member in self.members if member.nodes]

        def wrong() -> dict[str, list[str] | None]:
            return {member.name: member.keys for member in there if member.keys != expected}

        deadline_s = self._times.gone_s + self._times.renew_s + patience_s
        end = time.monotonic() + deadline_s * PATIENCE
        states: list[list[str] | None] = []
        while not states or wrong() or any(state != expected for state in states):
            assert not states or time.monotonic() < end, f"{self.done}: expected {expected}, nodes have {states}"
            await until(lambda: not wrong(), lambda: f"{self.done}: expected {expected}, got {wrong()}", deadline_s)
            states = [await asyncio.to_thread(members_of, node) for node in self.nodes]
        names = {member.name for member in there}
        for member in there:
            seen = {name for name, at in member.left if at > self._disturbed.get(name, 0)} & names
            assert not seen, f"{self.done}: {member.name} saw {seen} leave, who stayed"
        for member in self.members:
            member.left.clear()


async def keep_checking(end: float, directory: Path, log: Path) -> int:
    """Disturb a world and check it until a time; returns how often it was checked.

    Args:   log: what the nodes have logged is written there if something is wrong.
    Raises: AssertionError.
    """
    rounds, seed = 0, random.randrange(10**6)
    async with World.run(seed, directory) as world:
        while time.monotonic() < end:
            for _ in range(random.randrange(1, 4)):
                await world.disturb()
            try:
                await world.check(patience_s=30)
            except AssertionError:
                text = "\n".join(f"{node.http}\n{node.output}" for node in world.nodes)
                await asyncio.to_thread(log.write_text, text, encoding="utf-8")
                raise
            rounds += 1
            world.done = world.done[-20:]
    return rounds


class Nodes:
    """Starts nodes of one configuration, and ends them with the test."""

    def __init__(self, stack: AsyncExitStack, directory: Path, server: Valkey, text: str) -> None:
        self._stack = stack
        config = directory / "relay.toml"
        config.write_text(text)
        self._arguments = ("--config", str(config), "--redis-url", server.url)

    async def start(self, count: int = 1) -> list[RelayProcess]:
        def start() -> RelayProcess:
            return self._stack.enter_context(RelayProcess(*self._arguments))

        return await asyncio.gather(*(asyncio.to_thread(start) for _ in range(count)))


async def kill_all(times: Times, directory: Path, server: Valkey, patience_s: float) -> float:
    """Kill three nodes with members, and start one: it lists none of them, and none of their keys is left in the end.

    Returns: seconds from the kill to the last key.
    """
    async with AsyncExitStack() as stack:
        maker = Nodes(stack, directory, server, settings(times))
        nodes = await maker.start(3)
        members = [Member(f"m{number}") for number in range(9)]
        stack.push_async_callback(lambda: asyncio.gather(*(member.go() for member in members)))
        for place, member in enumerate(members):
            member.go_to(nodes[place % 3])
        names = [member.name for member in members]
        await until(lambda: all(member.keys == names for member in members), lambda: "not all have come", 20)
        redis = await stack.enter_async_context(Redis(port=server.port, decode_responses=True))
        assert len(await keys(redis)) == 8, "a hash and a set for each node, the leases and the numbers of writes"
        for node in nodes:
            assert node.process is not None
            node.process.kill()
        began = time.monotonic()
        for member in members:
            await member.go()
        (survivor,) = await maker.start()
        members[0].go_to(survivor)
        await until(lambda: members[0].keys == ["m0"], lambda: f"listed: {members[0].keys}", times.gone_s + patience_s)
        assert await asyncio.to_thread(members_of, survivor) == ["m0"]
        name = str((await redis.zrange("presence:nodes", -1, -1))[0])
        expected = {"presence:nodes", "presence:nodes:written", f"presence:{TOPIC}|{name}", f"presence:|{name}"}
        async with asyncio.timeout((times.dead_s + patience_s) * PATIENCE):
            # A dead node's lease is removed last.
            while await keys(redis) != expected or await redis.zrange("presence:nodes", 0, -1) != [name]:  # noqa: ASYNC110 - Redis's
                await asyncio.sleep(0.1)
        took_s = time.monotonic() - began
        (value,) = (await redis.hgetall(f"presence:{TOPIC}|{name}")).values()
        assert json.loads(value)[0] == "m0"
    return took_s


async def keys(redis: Any) -> set[str]:
    """All keys of presence, without the locks of those who remove them: these expire after 30 s."""
    return {key for key in await redis.keys("presence:*") if not key.startswith("presence:nodes:sweep:")}
