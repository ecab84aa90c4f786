"""`relay.channels.replay`: what one client is given from a history, as fast as it reads."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from relay.brokers.base import Place
from relay.channels.replay import Asked, asked
from relay.config_sections import Overflow
from relay.errors import NotRecovered, Reason
from relay.protocol.serializer import Version
from tests.support.clock import runner, until
from tests.support.history import HISTORY, TOPIC, HistoryNode, events, instant_history
from tests.support.transport import Client

__all__ = ["runner"]

pytestmark = pytest.mark.usefixtures(instant_history.__name__)

SMALL = {"payload_max_bytes": 1024, "frame_max_bytes": 4096, "outbox_max_bytes": 4096}
RECOVER = [HISTORY | {"overflow": Overflow.RECOVER}]


@asynccontextmanager
async def node_of(**settings: Any) -> AsyncIterator[HistoryNode]:
    node = HistoryNode(**settings)
    try:
        yield node
    finally:
        await node.end()
    assert list(node.hub.pairs()) == []


async def join(client: Client, ref: str = "1", topic: str = TOPIC, **params: Any) -> dict[str, Any]:
    """Join; returns the response."""
    status, response = await client.join(topic, ref, params)
    assert status == "ok", response
    return dict(response)


async def settled(node: HistoryNode) -> None:
    """Let everything run that does not wait for the test, or for long."""
    await node.heard()
    await asyncio.sleep(0.4)


def places(frames: list[list[Any]]) -> list[int]:
    """The numbers in the positions of the events in what a client was sent."""
    return [Place.of(payload["_position"]).n for payload in events(frames)]


class Reading:
    """A client whose frames come when it reads."""

    def __init__(self, node: HistoryNode, buffer_bytes: int = 2048) -> None:
        self.client, self.transport = node.connect_slow(buffer_bytes)
        self.frames: list[list[Any]] = []
        self.most = 0
        """Most bytes that waited for it beside the connection's buffer."""

    async def read(self) -> None:
        """Read until nothing more comes."""
        while True:
            await asyncio.sleep(0.01)
            self.most = max(self.most, self.transport.queued_bytes)
            if not (found := self.transport.read()):
                return
            self.frames += found

    async def join(self, ref: str = "1", **params: Any) -> dict[str, Any]:
        """Join, and read up to the reply; returns the response."""
        self.client.send(ref, ref, TOPIC, "phx_join", params)
        while True:
            for frame in self.frames:
                if frame[1] == ref and frame[3] == "phx_reply":
                    assert frame[4]["status"] == "ok", frame
                    return dict(frame[4]["response"])
            await asyncio.sleep(0.01)
            self.frames += self.transport.read()


# What a join asks for.


@pytest.mark.parametrize(
    ("params", "found"),
    [
        (b"{}", None),
        (b'{"since":null}', Asked(None, None)),
        (b'{"since":"1-1"}', Asked("1-1", None)),
        (b'{"last":3,"token":"t"}', Asked(None, 3)),
        (b'{"since":[1],"last":"x"}', Asked([1], "x")),
        (b"[]", None),
        (b'"since"', None),
    ],
)
def test_params_of_a_join(params: bytes, found: Asked | None) -> None:
    assert asked(msgspec.Raw(params)) == found


def test_params_that_are_nested_deep_are_no_position() -> None:
    """Older versions of the decoder read them."""
    found = asked(msgspec.Raw(b'{"since":' + b"[" * 5000 + b"]" * 5000 + b"}"))
    assert found is None or not isinstance(found.since, str)


def test_binary_params_ask_for_nothing() -> None:
    assert asked(b"\x00") is None


# Pages.


async def test_events_follow_the_reply_in_order_and_the_live_ones_follow_them() -> None:
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        node.publish(*({"n": n} for n in range(200)))
        await settled(node)
        client = node.connect()
        assert (await join(client, since=since)) == {"_position": since, "recovered": True}
        node.publish({"n": 200})
        await settled(node)
        assert places(client.transport.written) == list(range(1, 202))
        assert node.metrics.history_recovered == 1


async def test_client_that_reads_fast_does_not_keep_others_waiting() -> None:
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        node.publish(*({"n": n} for n in range(900)))
        await settled(node)
        for _ in range(2):  # the second time all pages are in memory
            client = node.connect()
            await join(client, since=since)
            turns = 0
            while len(places(client.transport.written)) < 900:
                turns += 1
                await asyncio.sleep(0)
            assert turns >= 10
        assert len({about for kind, about in node.store.calls if kind == "read"}) < 25


@pytest.mark.parametrize("overflow", [Overflow.DISCONNECT, Overflow.DROP_OLDEST, Overflow.LATEST, Overflow.RECOVER])
@pytest.mark.parametrize("payload", [{"t": "x" * 600}, ["x" * 600]])
async def test_recovered_events_are_no_reason_to_drop_events(overflow: Overflow, payload: Any) -> None:
    """A page has more than an outbox may hold; it is written as the client reads."""
    async with node_of(topics=[HISTORY | {"overflow": overflow}], limits=SMALL) as node:
        since = (await join(node.connect(), since=None))["_position"]
        rows = node.publish(*[payload] * 100)
        await settled(node)
        slow = Reading(node)
        assert (await slow.join(since=since))["recovered"] is True
        await slow.read()
        assert [payload["_position"] for payload in events(slow.frames) if "_position" in payload] == rows
        assert slow.client.transport.closes == []
        assert slow.most <= 4096
        assert not node.metrics.dropped


async def test_large_events_are_written_one_by_one() -> None:
    """As many rows as fit into a page are known of the topic's earlier events alone."""
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        rows = node.publish(*[{"t": "x" * 1_000_000}] * 6)
        await settled(node)
        slow = Reading(node)
        await slow.join(since=since)
        await slow.read()
        assert [payload["_position"] for payload in events(slow.frames)] == rows
        assert slow.most < 1_100_000
        assert (slow.client.transport.closes, node.metrics.dropped) == ([], {})


async def test_recent_events_are_written_as_fast_as_the_client_reads() -> None:
    """They are in memory; more came by the time that it has read them."""
    async with node_of(limits=SMALL) as node:
        since = (await join(node.connect(), since=None))["_position"]
        await settled(node)
        rows = node.publish(*[{"t": "x" * 600}] * 50)
        await settled(node)
        slow = Reading(node)
        await slow.join(since=since)
        rows += node.publish(*[{"t": "x" * 600}] * 20)
        await settled(node)
        await slow.read()
        rows += node.publish(*[{"t": "x" * 600}] * 2)
        await settled(node)
        await slow.read()
        assert [payload["_position"] for payload in events(slow.frames)] == rows
        assert slow.most <= 4096
        assert "read" not in [kind for kind, about in node.store.calls if about != since]
        assert not node.metrics.dropped


async def test_history_that_cannot_be_read_for_long_is_lost() -> None:
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        await settled(node)
        node.publish(*[{"t": "x" * 500}] * 300)
        await settled(node)
        client = node.connect()
        await join(client, since=since)
        node.store.fault = "away"
        await until(lambda: client.transport.written[-1][3] == "phx_error")
        assert node.metrics.rejoins_requested == 1
        node.store.fault = ""
        assert (await join(client, "2", since=since))["recovered"] is True
        await settled(node)
        assert places(client.transport.written)[-1] == 300


async def test_rows_that_are_trimmed_meanwhile_are_lost() -> None:
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        await settled(node)
        node.publish(*[{"t": "x" * 500}] * 300)
        await settled(node)
        slow = Reading(node)
        assert (await slow.join(since=since))["recovered"] is True
        node.store.trim(10)
        await slow.read()
        assert slow.frames[-1][3:] == ["phx_error", {"reason": Reason.EVENTS_MISSED}]
        assert places(slow.frames) == list(range(1, len(places(slow.frames)) + 1))


async def test_store_that_is_behind_is_read_again() -> None:
    async with node_of() as node:
        one = node.connect()
        since = (await join(one, since=None))["_position"]
        await settled(node)
        rows = node.store._rows(TOPIC)
        node.publish({"n": 1})
        await settled(node)
        rows.append(late := rows.pop())
        rows.pop()
        client = node.connect()
        node.history._rings.clear(node.history._followed[TOPIC])
        await join(client, since=since)
        await settled(node)
        assert places(client.transport.written) == []
        rows.append(late)
        await until(lambda: places(client.transport.written) == [1])


async def test_store_that_stays_behind_is_lost() -> None:
    async with node_of() as node:
        one = node.connect()
        since = (await join(one, since=None))["_position"]
        await settled(node)
        node.publish({"n": 1})
        await settled(node)
        node.history._rings.clear(node.history._followed[TOPIC])
        node.store._rows(TOPIC).pop()
        client = node.connect()
        await join(client, since=since)
        await until(lambda: client.transport.written[-1][3] == "phx_error")


async def test_client_that_is_ready_gets_a_page_in_one_write() -> None:
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        await settled(node)
        node.publish(*({"n": n} for n in range(50)))
        await settled(node)
        ready = Reading(node, 65_536)
        pipe, writes = ready.transport._pipe, list[int]()
        write = pipe.write

        def note(data: bytes) -> None:
            writes.append(data.count(b"_position"))
            write(data)

        ready.transport.writer.write = note
        await ready.join(since=since)
        await ready.read()
        assert writes == [1, 50], "the reply, and all events"
        assert places(ready.frames) == list(range(1, 51))
        assert node.metrics.history_replayed == 50


async def test_page_without_events_writes_nothing() -> None:
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        await settled(node)
        node.publish({"n": 1}, event="phx_reply")
        await settled(node)
        client = node.connect()
        await join(client, since=since)
        await settled(node)
        assert [frame[3] for frame in client.transport.written] == ["phx_reply"]
        assert node.metrics.history_replayed == 0


# The newest events.


async def test_newest_events_are_found_again_where_they_are_trimmed_before_they_are_read() -> None:
    """A topic that keeps its last value alone, and has a new one each millisecond."""
    async with node_of() as node:
        node.publish(*({"n": n} for n in range(1, 4)))
        client = node.connect()
        gate = node.store.hold_questions("read")
        client.send("1", "1", TOPIC, "phx_join", {"last": 2})
        await client.reply("1")
        await settled(node)
        node.publish({"n": 4}, {"n": 5})
        node.store.trim(2)
        gate.set()
        await settled(node)
        node.publish({"n": 6})
        await settled(node)
        assert places(client.transport.written) == [4, 5, 6]


async def test_join_of_a_topic_that_keeps_one_event_waits_for_what_is_on_its_way() -> None:
    async with node_of() as node:
        await join(node.connect())
        node.publish({"n": 1}, {"n": 2})
        await settled(node)
        row = node.store.append(b'{"n":3}')
        client = node.connect()
        assert (await join(client, since=None))["_position"] == row.position
        node.hear(row)
        node.publish({"n": 4})
        node.store.trim(1)
        await settled(node)
        assert places(client.transport.written) == [4]
        assert node.metrics.rejoins_requested == 0


async def test_position_that_never_comes_is_lost_with_the_topic() -> None:
    async with node_of() as node:
        await join(node.connect())
        node.publish({"n": 1})
        await settled(node)
        node.store.append(b'{"n":2}')
        client = node.connect()
        await join(client, since=None)
        node.history.unfollow(TOPIC)
        await until(lambda: client.transport.written[-1][3] == "phx_error")


# Slow readers.


@pytest.mark.parametrize("payload", [{"t": "x" * 900}, ["x" * 900]])
async def test_slow_reader_gets_each_event_once(payload: Any) -> None:
    async with node_of(topics=RECOVER, limits=SMALL | {"outbox_max_bytes": 100_000}) as node:
        slow = Reading(node)
        await slow.join(since=None)
        await settled(node)
        rows = []
        for _ in range(30):
            rows += node.publish(*[payload] * 10)
            await settled(node)
            slow.frames += slow.transport.read()
        await slow.read()
        found = [payload["_position"] for payload in events(slow.frames) if "_position" in payload]
        assert found == rows
        assert len(events(slow.frames)) == len(rows) * (1 if isinstance(payload, dict) else 2)
        assert node.metrics.history_catch_ups["slow reader"] >= 1
        assert not node.metrics.dropped


@pytest.mark.parametrize("since", [None, "1-1"])
async def test_slow_reader_keeps_its_positions_although_the_history_could_not_be_read_when_it_joined(
    since: str | None,
) -> None:
    async with node_of(topics=RECOVER) as node:
        node.store.fault = "away"
        slow = Reading(node)
        answer = await slow.join(since=since)
        assert answer["_position"] is None
        assert node.metrics.history_not_recovered == ({} if since is None else {NotRecovered.UNAVAILABLE: 1})
        node.store.fault = ""
        await settled(node)
        rows = node.publish(*[{"t": "x" * 900}] * 100)
        await settled(node)
        assert node.metrics.history_catch_ups["slow reader"] == 1
        await slow.read()
        assert [payload["_position"] for payload in events(slow.frames)] == rows


async def test_connection_that_is_lost_does_not_stop_the_event_loop() -> None:
    """Its end is still to be noticed by its reader, which is busy."""
    async with node_of(topics=RECOVER) as node:
        slow = Reading(node)
        await slow.join()
        await settled(node)
        node.publish(*[{"t": "x" * 900}] * 200)
        await settled(node)
        assert node.metrics.history_catch_ups["slow reader"] == 1
        sent = 0
        send_event = slow.transport.send_event

        def count(*args: Any) -> None:
            nonlocal sent
            sent += 1
            if sent == 1000:
                raise AssertionError("it goes on and on")
            send_event(*args)

        slow.client.socket.send_event = count
        gate = node.store.hold_questions("read")
        slow.transport.read()
        await asyncio.sleep(0.1)
        slow.transport.writer.end()
        gate.set()
        await asyncio.sleep(1)
        assert sent < 100 and node.hub.count(TOPIC) == 1
        await slow.client.end()
        assert node.hub.count(TOPIC) == 0


async def test_what_waits_of_an_earlier_subscription_is_not_given_to_a_later_one() -> None:
    """The client comes back with a position that is gone: it is given what follows its join."""
    async with node_of(topics=RECOVER) as node:
        slow = Reading(node)
        await slow.join(since=None)
        await settled(node)
        node.publish(*[{"t": "x" * 900}] * 20)
        await settled(node)
        slow.client.send("2", "2", TOPIC, "phx_join", {"since": "1-1"})
        await settled(node)
        node.publish(*[{"t": "x" * 900}] * 40)
        await settled(node)
        await slow.read()
        (at,) = [at for at, frame in enumerate(slow.frames) if frame[:2] == ["2", "2"]]
        answer = slow.frames[at][4]["response"]
        assert Place.of(answer["_position"]).n == 20
        assert places(slow.frames[at:]) == list(range(21, 61))


# Its end.


@pytest.mark.parametrize("how", ["leave", "kick", "close", "rejoin"])
async def test_replay_ends_with_its_subscription(how: str) -> None:
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        node.publish(*[{"t": "x" * 900}] * 200)
        await settled(node)
        slow = Reading(node)
        await slow.join(since=since)
        await asyncio.sleep(0.1)
        assert slow.transport.writer.paused
        channel = slow.client.socket.subscription(TOPIC)
        assert channel is not None and channel.replay is not None
        match how:
            case "leave":
                slow.client.send("1", "2", TOPIC, "phx_leave")
            case "kick":
                channel.end(None)
            case "close":
                slow.client.socket.close(1001, "bye")
            case "rejoin":
                slow.client.send("2", "2", TOPIC, "phx_join", {})
        await asyncio.sleep(0.1)
        await slow.read()
        assert len(places(slow.frames)) < 200 or how == "close"
        node.publish({"n": 1})
        await settled(node)
        await slow.read()
        live = [payload for payload in events(slow.frames) if payload == {"n": 1}]
        assert len(live) == (how == "rejoin")


@pytest.mark.parametrize("version", [Version.V1, Version.V2])
async def test_positions_are_given_in_both_versions(version: Version) -> None:
    async with node_of() as node:
        since = (await join(node.connect(), since=None))["_position"]
        node.publish({"n": 1})
        client = node.connect(version)
        await join(client, since=since)
        await settled(node)
        assert places(client.transport.written) == [1]
