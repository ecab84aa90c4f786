"""`relay.channels.control`: messages between nodes, and data that is not one."""

import asyncio
from collections.abc import Callable

import pytest

from relay.channels.control import RECALL_S, ControlMessage, ControlMessages, decode, encode
from relay.errors import BusUnavailable


@pytest.mark.parametrize(
    "message",
    [
        ControlMessage("disconnect", "alice", "n1"),
        ControlMessage("disconnect", "é", "n1", reason="banned"),
        ControlMessage("kick", "a", "n", "room:1"),
        ControlMessage("recall", "", "n1"),
        ControlMessage("repeat", "a", "n1", "room:1", number=7, age_s=1.5),
    ],
)
def test_message_comes_back_as_it_was(message: ControlMessage) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"do":"reboot","user":"alice","sender":"n"}',
        b'{"do":"disconnect","user":"","sender":"n"}',
        b'{"do":"repeat","user":"","sender":"n"}',
        b'{"do":"disconnect","user":7,"sender":"n"}',
        b'{"do":"disconnect","user":"alice"}',
        b'{"do":"kick","user":"alice","sender":"n"}',
        b"[" * 100_000,
        b'{"do":"kick","x":' + b"[" * 100_000,
    ],
)
def test_data_that_is_not_a_message_is_ignored(data: bytes) -> None:
    assert decode(data) is None


def test_message_of_a_later_version_with_more_fields_is_understood() -> None:
    data = b'{"do":"disconnect","user":"alice","sender":"n","until":5}'
    assert decode(data) == ControlMessage("disconnect", "alice", "n")


@pytest.fixture(autouse=True)
def repeats_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.channels.control._REPEAT_AFTER_S", 0.0)


async def recalled(node: ControlMessages) -> None:
    """Have a node ask the others, and wait for their answers."""
    await node.recall()
    await repeated()


async def repeated() -> None:
    """Let the timers run that are due: those of a turn of the loop are behind what was ready before."""
    for _ in range(3):
        await asyncio.sleep(0)


class Bus:
    """Nodes with a clock of their own, and what they send to each other."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.nodes: dict[str, ControlMessages] = {}
        self.applied: dict[str, list[ControlMessage]] = {}
        self.sent: list[ControlMessage] = []
        self.deaf: set[str] = set()
        self.fault: BusUnavailable | None = None

    def add(self, name: str) -> ControlMessages:
        applied: Callable[[ControlMessage], None] = self.applied.setdefault(name, []).append
        self.nodes[name] = ControlMessages(name, self.publish, applied, lambda: self.now)
        return self.nodes[name]

    def publish(self, message: ControlMessage) -> "asyncio.Future[None]":
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.fault is not None:
            future.set_exception(self.fault)
            return future
        self.sent.append(message)
        for name, node in self.nodes.items():
            if name not in self.deaf:
                node.receive(message)
        future.set_result(None)
        return future

    def seen(self, name: str) -> list[tuple[str, str, str]]:
        return [(message.action, message.user, message.topic) for message in self.applied[name]]


async def test_node_that_has_missed_messages_is_sent_them_again_and_no_other_applies_them_twice() -> None:
    bus = Bus()
    one, two, _ = (bus.add(name) for name in ("one", "two", "three"))
    await one.send("disconnect", "alice")
    bus.deaf.add("two")
    await one.send("kick", "bob", "room:1")
    bus.deaf.clear()
    bus.now += 2.5
    await recalled(two)
    assert bus.seen("one") == bus.seen("three") == [("disconnect", "alice", ""), ("kick", "bob", "room:1")]
    assert bus.seen("two") == [("disconnect", "alice", ""), ("repeat", "bob", "room:1")]
    assert bus.applied["two"][-1].age_s == 2.5
    await recalled(two)
    assert [len(applied) for applied in bus.applied.values()] == [2, 2, 2]


async def test_old_messages_and_those_that_failed_are_not_sent_again() -> None:
    bus = Bus()
    one, two = bus.add("one"), bus.add("two")
    bus.deaf.add("two")
    await one.send("kick", "old", "room:1")
    bus.now += RECALL_S + 1
    bus.fault = BusUnavailable("away")
    with pytest.raises(BusUnavailable):
        await one.send("disconnect", "failed")
    bus.fault = None
    for number in range(1001):
        await one.send("disconnect", f"user {number}")
    bus.deaf.clear()
    await recalled(two)
    assert [message.user for message in bus.applied["two"]] == [f"user {number}" for number in range(1, 1001)]


async def test_node_that_is_back_last_sends_its_own_again() -> None:
    """The other has asked already, and was not heard."""
    bus = Bus()
    one, two = bus.add("one"), bus.add("two")
    bus.deaf |= {"one", "two"}
    await one.send("disconnect", "alice")
    bus.deaf.remove("two")
    await recalled(two)
    assert bus.applied["two"] == []
    bus.deaf.clear()
    await recalled(one)
    assert bus.seen("two") == [("repeat", "alice", "")]


async def test_recall_waits_for_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.channels.control._RECALL_PAUSES_S", (0.0, 0.0, 0.0))
    bus = Bus()
    one, two = bus.add("one"), bus.add("two")
    bus.deaf.add("two")
    await one.send("disconnect", "alice")
    bus.deaf.clear()
    bus.fault = BusUnavailable("away")
    recalling = asyncio.create_task(two.recall())
    await asyncio.sleep(0)
    assert not recalling.done()
    bus.fault = None
    await recalling
    await repeated()
    assert bus.seen("two") == [("repeat", "alice", "")]


async def test_answer_to_one_node_is_that_to_all_that_ask_meanwhile() -> None:
    bus = Bus()
    nodes = [bus.add(str(number)) for number in range(4)]
    for user in ("alice", "bob"):
        await nodes[0].send("disconnect", user)
    await asyncio.gather(*(recalled(node) for node in nodes))
    assert [message.action for message in bus.sent].count("recall") == 4
    assert [message.user for message in bus.sent if message.action == "repeat"] == ["alice", "bob"]
