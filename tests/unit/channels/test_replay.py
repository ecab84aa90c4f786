"""What a channel is given from a history, over fakes of all around it."""

from collections.abc import Callable
from typing import cast

import msgspec

from relay.brokers.base import Place
from relay.channels.history import History
from relay.channels.history_reader import Entry
from relay.channels.hub import Hub, Subscriber
from relay.channels.replay import Replay
from relay.config import Policy
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.protocol.serializer import Version
from relay.transports.base import Transport

ENTRIES = [Entry("room:1", Place(1, n), "tick", msgspec.Raw(b'{"n":%d}' % n), 10) for n in (1, 2, 3)]


class FakeHub:
    def policy(self, topic: str) -> Policy:
        return Policy()


class FakeChannel:
    """A channel of a client that is ready, or of one for which something waits."""

    topic = "room:1"
    version, deflates = Version.V2, False

    def __init__(self, is_ready: bool) -> None:
        self.is_ready = is_ready
        self.written: list[bytes] = []
        self.queued: list[bytes] = []

    def direct_write(self) -> Callable[[bytes], object] | None:
        return self.written.append if self.is_ready else None

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        self.queued.append(frame.ws_frame)

    @property
    def subscriber(self) -> Subscriber:
        return cast(Subscriber, self)

    @property
    def transport(self) -> Transport:
        return cast(Transport, self)

    def lose_events(self) -> None:
        raise AssertionError("nothing is lost here")


def replay(channel: FakeChannel, metrics: Metrics) -> Replay:
    return Replay(channel, cast(History, None), cast(Hub, FakeHub()), metrics, positioned=True)


def frames() -> list[bytes]:
    return [frame.ws_frame for entry in ENTRIES for _, frame in entry.frames(Version.V2, True)]


def test_client_that_is_ready_gets_a_page_in_one_write() -> None:
    channel, metrics = FakeChannel(is_ready=True), Metrics()
    assert replay(channel, metrics)._send(ENTRIES)
    assert channel.written == [b"".join(frames())]
    assert not channel.queued
    assert metrics.history_replayed == 3


def test_client_for_which_something_waits_gets_a_page_through_its_queue() -> None:
    channel, metrics = FakeChannel(is_ready=False), Metrics()
    assert replay(channel, metrics)._send(ENTRIES)
    assert channel.queued == frames()
    assert not channel.written
    assert metrics.history_replayed == 3


def test_page_without_events_writes_nothing() -> None:
    channel = FakeChannel(is_ready=True)
    assert replay(channel, Metrics())._send([Entry("room:1", Place(1, 1), "", msgspec.Raw(b"{}"), 10)])
    assert not channel.written
