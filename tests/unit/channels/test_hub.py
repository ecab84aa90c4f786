"""`relay.channels.hub`: subscribers and the sliced loop, with a clock and an event loop that the test runs by hand."""

import zlib
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.channels import hub as hub_module
from relay.channels.hub import SLICE_S, Hub
from relay.config_sections import Overflow, Policy
from relay.errors import Reason
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.protocol.payload import EMPTY, Payload, encode_payload
from relay.protocol.serializer import Version, encode_broadcast
from relay.protocol.state import Subscription

STEP = 32
"""Subscribers between two looks at the clock."""


class Loop:
    """A clock, and callables put off to the next turn."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waiting: deque[Callable[[], None]] = deque()

    def clock(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.waiting.append(callback)

    def turn(self) -> None:
        """Run what was put off before this turn, as asyncio does."""
        for _ in range(len(self.waiting)):
            self.waiting.popleft()()

    def run(self) -> int:
        """Turn until nothing is left; say how often."""
        turns = 0
        while self.waiting:
            self.turn()
            turns += 1
        return turns


def read_frames(data: bytes) -> list[Frame]:
    """Take what was written apart again: RFC 6455, section 5.2, and RFC 7692 where RSV1 is set."""
    found: list[Frame] = []
    while data:
        size, begin = data[1], 2
        if size > 125:
            begin = 4 if size == 126 else 10
            size = int.from_bytes(data[2:begin])
        first, body, data = data[0], data[begin : begin + size], data[begin + size :]
        assert len(body) == size, "a whole frame"
        if first & 0x40:
            body = zlib.decompressobj(wbits=-15).decompress(body + b"\x00\x00\xff\xff")
        found.append(Frame(body, first & 0x0F == 1))
    return found


def read_chunk(data: bytes) -> list[Frame]:
    """The one event in a chunk of an HTTP response: RFC 9112, section 7.1."""
    size, _, rest = data.partition(b"\r\n")
    assert len(rest) == int(size, 16) + 2 and rest.endswith(b"\r\n")
    return [Frame(rest[:-2], True)]


class Reader:
    """A subscriber that notes what it is sent; each write takes ``cost_s`` of the loop's time.

    One that is ``ready`` takes bytes by `direct_write`, as the direct path does; else frames come by `send_event`.
    """

    def __init__(
        self,
        loop: Loop,
        version: Version = Version.V2,
        cost_s: float = 0.0,
        ready: bool = False,
        deflates: bool = False,
    ) -> None:
        self.version = version
        self.ready = ready
        self.deflates = deflates
        self.wire: list[bytes] = []
        self.got: list[Frame] = []
        self.policies: list[Policy] = []
        self.on_event: Callable[[], None] = lambda: None
        self._loop = loop
        self._cost_s = cost_s

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        self.got.append(frame)
        self.policies.append(policy)
        self._loop.now += self._cost_s
        self.on_event()

    def direct_write(self) -> Callable[[bytes], object] | None:
        return self._write if self.ready else None

    def _write(self, data: bytes) -> None:
        self.wire.append(data)
        self.got += read_chunk(data) if self.version is Version.SSE else read_frames(data)
        self._loop.now += self._cost_s
        self.on_event()

    def subscription(self, topic: str) -> Subscription | None:
        raise AssertionError("the hub does not ask")

    def end_subscription(self, subscription: Subscription, reason: Reason) -> bool:
        raise AssertionError("the hub does not end subscriptions")

    @property
    def texts(self) -> list[str]:
        return [frame.text for frame in self.got]


class Fixture:
    """A hub with its surroundings."""

    def __init__(self, policy_of: Callable[[str], Policy] = lambda topic: Policy(), ready: bool = False) -> None:
        self.ready = ready
        self.loop = Loop()
        self.metrics = Metrics()
        self.hub = Hub(self.metrics, policy_of, self.loop.call_soon, self.loop.clock)
        self.idle = 0

        def count() -> None:
            self.idle += 1

        self.hub.on_idle = count

    def reader(self, *topics: str, version: Version = Version.V2, cost_s: float = 0.0) -> Reader:
        reader = Reader(self.loop, version, cost_s, self.ready)
        for topic in topics:
            self.hub.add(topic, reader)
        return reader

    def slow_readers(self, count: int) -> list[Reader]:
        """So slow that each slice ends at its first look at the clock."""
        return [self.reader("t", cost_s=SLICE_S) for _ in range(count)]


@pytest.fixture(params=[False, True], ids=["queued", "ready"])
def fixture(request: pytest.FixtureRequest) -> Fixture:
    """All subscribers not ready, or all ready: the two ways that the loop takes."""
    return Fixture(ready=request.param)


def text(event: str, payload: Payload = EMPTY) -> str:
    return encode_broadcast(Version.V2, "t", event, payload).text


# Who is subscribed.


def test_first_and_last_subscriber_of_a_topic_are_told(fixture: Fixture) -> None:
    hub, one, two = fixture.hub, fixture.reader(), fixture.reader()
    assert hub.add("t", one) is True
    assert hub.add("t", two) is False
    assert hub.remove("t", one) is False
    assert hub.remove("t", two) is True
    assert hub.add("t", one) is True


def test_adding_twice_and_removing_a_stranger_change_nothing(fixture: Fixture) -> None:
    hub, one, stranger = fixture.hub, fixture.reader("t"), fixture.reader()
    assert hub.add("t", one) is False
    assert hub.remove("t", stranger) is False
    assert hub.remove("u", one) is False
    assert hub.topics() == {"t": 1}
    assert hub.remove("t", one) is True


def test_topics_are_listed_with_their_subscribers(fixture: Fixture) -> None:
    hub = fixture.hub
    one, two = fixture.reader("t", "u"), fixture.reader("t")
    assert hub.topics() == {"t": 2, "u": 1}
    assert (len(hub), "t" in hub, "v" in hub) == (2, True, False)
    assert (hub.count("t"), hub.count("v")) == (2, 0)
    assert set(hub.pairs()) == {("t", one), ("t", two), ("u", one)}


def test_who_only_looks_on_is_delivered_to_and_makes_no_topic_joined(fixture: Fixture) -> None:
    hub, one, observer = fixture.hub, fixture.reader("t"), fixture.reader()
    hub.add_observer("t", observer)
    hub.add_observer("u", another := fixture.reader())
    assert (hub.topics(), len(hub), hub.count("t")) == ({"t": 1}, 1, 2)
    assert hub.fan_out("t", "e", EMPTY) and hub.fan_out("u", "e", EMPTY)
    assert len(observer.got) == len(another.got) == 1
    assert hub.remove("t", one) is False, "the topic is still heard"
    assert (hub.topics(), len(hub), "t" in hub) == ({}, 0, True)
    assert hub.remove("t", observer) is True
    hub.add("u", observer)
    assert (hub.topics(), len(hub)) == ({"u": 1}, 1), "a former observer may join"


def test_topic_is_forgotten_with_its_last_subscriber(fixture: Fixture) -> None:
    one = fixture.reader("t")
    fixture.hub.remove("t", one)
    assert (len(fixture.hub), fixture.hub.topics(), "t" in fixture.hub) == (0, {}, False)
    assert fixture.hub.fan_out("t", "e", EMPTY) is False
    assert fixture.metrics.deliveries == 0


def test_policy_is_asked_for_once_when_the_first_subscriber_comes() -> None:
    asked: list[str] = []

    def policy_of(topic: str) -> Policy:
        asked.append(topic)
        return Policy(Overflow.LATEST)

    fixture = Fixture(policy_of)
    one, _two = fixture.reader("t"), fixture.reader("t")
    fixture.hub.fan_out("t", "e", EMPTY)
    fixture.hub.fan_out("t", "e", EMPTY)
    assert asked == ["t"]
    assert one.policies == [Policy(Overflow.LATEST)] * 2


# Delivering.


def test_event_reaches_all_subscribers_of_its_topic_and_no_other(fixture: Fixture) -> None:
    one, two, other = fixture.reader("t"), fixture.reader("t", "u"), fixture.reader("u")
    assert fixture.hub.fan_out("t", "e", encode_payload({"a": 1})) is True
    expected = ['[null,null,"t","e",{"a":1}]']
    assert (one.texts, two.texts, other.texts) == (expected, expected, [])
    assert fixture.metrics.deliveries == 2
    assert not fixture.hub.busy
    assert not fixture.loop.waiting


def test_event_on_a_topic_nobody_has_joined_goes_nowhere(fixture: Fixture) -> None:
    assert fixture.hub.fan_out("t", "e", EMPTY) is False


def test_event_is_encoded_once_for_each_version_that_somebody_speaks(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: Phoenix 1.9, ``fastlane!``: once per serializer, not once per socket."""
    encoded: list[Version] = []

    def counting(version: Version, topic: str, event: str, payload: Payload, position: str | None) -> Frame:
        encoded.append(version)
        return encode_broadcast(version, topic, event, payload, position)

    monkeypatch.setattr(hub_module, "encode_broadcast", counting)
    readers = [fixture.reader("t") for _ in range(100)]
    fixture.hub.fan_out("t", "e", EMPTY)
    assert encoded == [Version.V2]
    written = [(reader.wire or reader.got)[0] for reader in readers]
    assert all(one is written[0] for one in written)
    old = fixture.reader("t", version=Version.V1)
    fixture.hub.fan_out("t", "e", EMPTY)
    assert sorted(encoded) == [Version.V1, Version.V2, Version.V2]
    assert old.texts == ['{"topic":"t","event":"e","ref":null,"payload":{}}']


def test_streams_of_one_topic_share_their_bytes_with_the_events_position(fixture: Fixture) -> None:
    streams = [fixture.reader("t", version=Version.SSE) for _ in range(100)]
    phoenix = fixture.reader("t")
    fixture.hub.fan_out("t", "e", EMPTY, position="17-1")
    written = [(stream.wire or stream.got)[0] for stream in streams]
    assert all(one is written[0] for one in written)
    assert streams[0].texts == ["id: 17-1\nevent: e\ndata: {}\n\n"]
    assert phoenix.texts == ['[null,null,"t","e",{}]']


def test_ready_and_queued_subscribers_get_the_same(fixture: Fixture) -> None:
    one, two = fixture.reader("t"), fixture.reader("t")
    two.ready = not one.ready
    for event in ("a", "b"):
        fixture.hub.fan_out("t", event, EMPTY)
    assert one.texts == two.texts == [text("a"), text("b")]
    assert sorted((len(one.wire), len(two.wire))) == [0, 2]


def test_events_of_a_topic_that_come_together_are_one_write(fixture: Fixture) -> None:
    reader, old = fixture.reader("t"), fixture.reader("t", version=Version.V1)
    assert (
        fixture.hub.fan_out_all(
            "t", [("a", EMPTY, None), ("b", encode_payload({"x": "y" * 200}), None), ("c", b"bytes", None)]
        )
        is True
    )
    assert len(reader.wire) == (1 if fixture.ready else 0)
    assert [frame.is_text for frame in reader.got] == [True, True, False]
    assert reader.texts[:2] == [text("a"), text("b", encode_payload({"x": "y" * 200}))]
    assert len(old.got) == 3
    assert (fixture.metrics.deliveries, fixture.hub.stats("t")) == (6, (3, 0.0))


def test_compressed_and_plain_subscribers_get_the_same(fixture: Fixture) -> None:
    """A frame is compressed once, and only for those that negotiated it."""
    payload = encode_payload({"value": "telemetry " * 50})
    plain, one, two = (fixture.reader() for _ in range(3))
    one.deflates = two.deflates = True
    for reader in (plain, one, two):
        fixture.hub.add("t", reader)
    fixture.hub.fan_out("t", "e", payload)
    assert plain.texts == one.texts == two.texts == [text("e", payload)]
    if fixture.ready:
        assert one.wire[0] is two.wire[0]
        assert len(one.wire[0]) < len(plain.wire[0]) / 2


def test_one_that_is_no_longer_ready_is_queued_for_from_the_next_event_on(fixture: Fixture) -> None:
    one, two = fixture.reader("t"), fixture.reader("t")
    for _ in range(2):
        fixture.hub.fan_out("t", "e", EMPTY)
    one.ready = not one.ready
    fixture.hub.refresh(["t", "nobody has joined this"])
    for _ in range(3):
        fixture.hub.fan_out("t", "e", EMPTY)
    assert len(one.got) == len(two.got) == 5
    assert (len(one.wire), len(two.wire)) == ((2, 5) if fixture.ready else (3, 0))


def test_one_that_fills_up_in_mid_delivery_is_queued_for(fixture: Fixture) -> None:
    """What was put off finds each subscriber as it is then."""
    readers = fixture.slow_readers(3 * STEP)
    fixture.hub.fan_out("t", "e", EMPTY)
    last = readers[-1]
    last.ready = False
    fixture.hub.refresh(["t"])
    fixture.loop.run()
    assert (last.wire, last.texts) == ([], [text("e")])
    assert all(len(reader.got) == 1 for reader in readers)
    assert fixture.metrics.deliveries == 3 * STEP


def test_one_subscriber_can_be_left_out(fixture: Fixture) -> None:
    """Source: Phoenix ``broadcast_from``: all but the sender."""
    one, two = fixture.reader("t"), fixture.reader("t")
    assert fixture.hub.fan_out("t", "e", EMPTY, skip=one) is True
    assert (one.texts, two.texts) == ([], [text("e")])
    assert fixture.metrics.deliveries == 1


def test_fast_subscribers_are_all_served_at_once(fixture: Fixture) -> None:
    readers = [fixture.reader("t") for _ in range(10 * STEP + 1)]
    fixture.hub.fan_out("t", "e", EMPTY)
    assert all(len(reader.got) == 1 for reader in readers)
    assert not fixture.hub.busy


def test_delivery_that_takes_too_long_goes_on_in_later_turns(fixture: Fixture) -> None:
    """Else no heartbeat would be answered meanwhile."""
    readers = fixture.slow_readers(3 * STEP)
    assert fixture.hub.fan_out("t", "e", EMPTY) is True
    assert [len(reader.got) for reader in readers] == [1] * STEP + [0] * 2 * STEP
    assert (fixture.hub.busy, fixture.metrics.deliveries) == (True, STEP)
    fixture.loop.turn()
    assert [len(reader.got) for reader in readers] == [1] * 2 * STEP + [0] * STEP
    assert (fixture.hub.busy, fixture.idle) == (True, 0)
    fixture.loop.turn()
    assert [len(reader.got) for reader in readers] == [1] * 3 * STEP
    assert (fixture.hub.busy, fixture.idle, fixture.metrics.deliveries) == (False, 1, 3 * STEP)
    assert not fixture.loop.waiting


def test_slice_moves_on_however_late_it_is(fixture: Fixture) -> None:
    readers = fixture.slow_readers(3 * STEP)
    fixture.hub.fan_out("t", "e", EMPTY)
    while fixture.loop.waiting:
        fixture.loop.now += 1000
        fixture.loop.turn()
    assert all(len(reader.got) == 1 for reader in readers)


def test_last_slice_that_ends_exactly_leaves_nothing_over(fixture: Fixture) -> None:
    readers = fixture.slow_readers(STEP)
    fixture.hub.fan_out("t", "e", EMPTY)
    assert all(reader.got for reader in readers)
    assert not fixture.hub.busy
    assert fixture.idle == 0, "nothing had to wait, so nobody waits for this"


def test_later_events_wait_behind_an_unfinished_delivery(fixture: Fixture) -> None:
    """Also those of other topics: one queue keeps the order of every socket that has joined both."""
    slow = fixture.slow_readers(2 * STEP)
    both = fixture.reader("t", "u")
    fixture.hub.fan_out("t", "one", EMPTY)
    fixture.hub.fan_out("u", "two", EMPTY)
    fixture.hub.fan_out("t", "three", EMPTY)
    assert both.texts == []
    fixture.loop.run()
    assert both.texts == [text("one"), '[null,null,"u","two",{}]', text("three")]
    assert all(reader.texts == [text("one"), text("three")] for reader in slow)
    assert fixture.idle == 1


def test_many_small_deliveries_are_sliced_like_a_large_one(fixture: Fixture) -> None:
    fixture.slow_readers(STEP + 1)
    few = fixture.reader("u", cost_s=SLICE_S)
    fixture.hub.fan_out("t", "e", EMPTY)
    for _ in range(10):
        fixture.hub.fan_out("u", "e", EMPTY)
    fixture.loop.turn()
    assert few.got == [], "the first turn ends with the rest of the large one"
    for turn in range(10):
        fixture.loop.turn()
        assert len(few.got) == turn + 1
    assert (fixture.hub.busy, fixture.idle) == (False, 1)


def test_one_that_leaves_in_mid_delivery_gets_nothing_more(fixture: Fixture) -> None:
    """It has been told ``phx_close``, and nothing may follow that."""
    readers = fixture.slow_readers(2 * STEP)
    fixture.hub.fan_out("t", "e", EMPTY)
    fixture.hub.remove("t", readers[-1])
    fixture.loop.run()
    assert readers[-1].got == []
    assert fixture.metrics.deliveries == 2 * STEP - 1


def test_one_that_leaves_because_of_anothers_event_gets_nothing_more() -> None:
    """A write to a transport that is ready makes nobody leave: the event loop takes no turn in it."""
    fixture = Fixture()
    one, two = fixture.reader("t"), fixture.reader("t")

    def leave() -> None:
        fixture.hub.remove("t", two)

    one.on_event = leave
    fixture.hub.fan_out("t", "e", EMPTY)
    assert (len(one.got), len(two.got)) == (1, 0)


def test_delivery_to_a_topic_that_all_have_left_ends(fixture: Fixture) -> None:
    readers = fixture.slow_readers(2 * STEP)
    fixture.hub.fan_out("t", "e", EMPTY)
    for reader in readers:
        fixture.hub.remove("t", reader)
    late = fixture.reader("t")
    fixture.loop.run()
    assert late.got == [], "whoever joined after the event has not missed it"
    assert (fixture.metrics.deliveries, fixture.idle, fixture.hub.busy) == (STEP, 1, False)


def test_one_that_joins_in_mid_delivery_gets_the_next_event_only(fixture: Fixture) -> None:
    fixture.slow_readers(2 * STEP)
    fixture.hub.fan_out("t", "one", EMPTY)
    late = fixture.reader("t")
    fixture.hub.fan_out("t", "two", EMPTY)
    fixture.loop.run()
    assert late.texts == [text("two")]


def test_hub_is_quiet_where_nobody_listens_for_idle() -> None:
    loop = Loop()
    hub = Hub(Metrics(), lambda topic: Policy(), loop.call_soon, loop.clock)
    for _ in range(2 * STEP):
        hub.add("t", Reader(loop, cost_s=SLICE_S))
    hub.fan_out("t", "e", EMPTY)
    assert loop.run() == 1
    assert not hub.busy


step = st.one_of(
    st.tuples(st.just("fan_out"), st.sampled_from("tu"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["add", "remove", "ready"]), st.sampled_from("tu"), st.integers(0, 79)),
    st.tuples(st.just("turn"), st.just(""), st.just(0)),
)


@given(st.lists(step, max_size=40), st.sampled_from([0.0, SLICE_S / 40, SLICE_S]), st.booleans())
def test_every_subscriber_hears_its_topics_in_order_whatever_happens(
    steps: list[tuple[str, str, int]], cost_s: float, ready: bool
) -> None:
    """Who stays joined hears every event in order; who comes and goes hears none twice, and none out of order."""
    fixture = Fixture(ready=ready)
    readers = [fixture.reader("t", "u", cost_s=cost_s) for _ in range(80)]
    steady = set(range(80)) - {number for name, _, number in steps if name == "remove"}
    events: list[tuple[str, int]] = []
    for name, topic, number in steps:
        if name == "fan_out":
            together = range(len(events), len(events) + number)
            if fixture.hub.fan_out_all(topic, [(f"e{event}", EMPTY, None) for event in together]):
                events += [(topic, event) for event in together]
        elif name == "ready":
            readers[number].ready = not readers[number].ready
            fixture.hub.refresh("tu")
        elif name == "add":
            fixture.hub.add(topic, readers[number])
        elif name == "remove":
            fixture.hub.remove(topic, readers[number])
        else:
            fixture.loop.turn()
    fixture.loop.run()
    every = [encode_broadcast(Version.V2, topic, f"e{number}", EMPTY).text for topic, number in events]
    for number, reader in enumerate(readers):
        heard = [every.index(text) for text in reader.texts]
        assert heard == sorted(set(heard))
        if number in steady:
            assert reader.texts == every
    assert fixture.metrics.deliveries == sum(len(reader.got) for reader in readers)
    assert not fixture.hub.busy


# Metrics.


def test_traffic_of_a_topic_nobody_has_joined_is_unknown(fixture: Fixture) -> None:
    assert fixture.hub.stats("t") is None


def test_traffic_counts_events_not_deliveries(fixture: Fixture) -> None:
    fixture.reader("t")
    fixture.reader("t")
    assert fixture.hub.stats("t") == (0, 0.0)
    for _ in range(3):
        fixture.hub.fan_out("t", "e", EMPTY)
    assert fixture.hub.stats("t") == (3, 0.0), "no second is over yet"


def test_traffic_tells_the_rate_of_the_last_full_second_with_events(fixture: Fixture) -> None:
    fixture.reader("t")
    for _ in range(10):
        fixture.hub.fan_out("t", "e", EMPTY)
    fixture.loop.now += 2
    fixture.hub.fan_out("t", "e", EMPTY)
    assert fixture.hub.stats("t") == (11, 5.0)
    fixture.loop.now += 0.5
    assert fixture.hub.stats("t") == (11, 5.0)


def test_traffic_of_a_quiet_topic_fades(fixture: Fixture) -> None:
    fixture.reader("t")
    fixture.loop.now += 1
    fixture.hub.fan_out("t", "e", EMPTY)
    fixture.loop.now += 4
    assert fixture.hub.stats("t") == (1, 0.25)
    fixture.loop.now += 96
    assert fixture.hub.stats("t") == (1, 0.01)


def test_bytes_delivered_are_counted_for_each_version(fixture: Fixture) -> None:
    sender = fixture.reader("t")
    readers = [fixture.reader("t"), fixture.reader("t", version=Version.V1), fixture.reader("t", version=Version.V1)]
    fixture.hub.fan_out("t", "e", EMPTY, skip=sender)
    assert fixture.metrics.delivered_bytes == sum(frame.size for reader in readers for frame in reader.got)
    assert fixture.metrics.deliveries == 3


def test_bytes_of_events_that_come_together_are_counted_as_of_each(fixture: Fixture) -> None:
    reader = fixture.reader("t")
    fixture.hub.fan_out_all("t", [("e", EMPTY, None), ("f", EMPTY, None)])
    fixture.hub.fan_out("t", "e", EMPTY)
    assert fixture.metrics.delivered_bytes == sum(frame.size for frame in reader.got)
    assert fixture.metrics.deliveries == fixture.metrics.fan_out.count == 3


@pytest.mark.parametrize("count", [1, STEP * 3])
def test_fan_out_is_timed_from_arrival_to_last_delivery(fixture: Fixture, count: int) -> None:
    """Once for each event, however many turns it takes."""
    fixture.slow_readers(count)
    fixture.hub.fan_out("t", "e", EMPTY)
    fixture.loop.run()
    assert fixture.metrics.fan_out.count == 1
    assert fixture.metrics.fan_out.sum_s == pytest.approx(count * SLICE_S)


def test_events_that_were_meant_for_a_subscriber_are_known(fixture: Fixture) -> None:
    """From its coming on, without its own; joining again begins nothing anew."""
    early = fixture.reader("t")
    fixture.hub.fan_out("t", "e", EMPTY)
    late = fixture.reader("t")
    fixture.hub.fan_out_all("t", [("e", EMPTY, None), ("f", EMPTY, None)])
    fixture.hub.fan_out("t", "e", EMPTY, skip=late)
    _ = fixture.hub.add("t", early)
    assert [fixture.hub.events_for("t", reader) for reader in (early, late)] == [4, 2]
    assert [len(reader.got) for reader in (early, late)] == [4, 2]
    fixture.hub.remove("t", late)
    assert fixture.hub.events_for("t", late) == fixture.hub.events_for("u", early) == 0


def test_topics_with_a_label_are_counted_under_it(fixture: Fixture) -> None:
    hub = Hub(
        fixture.metrics,
        lambda topic: Policy(),
        fixture.loop.call_soon,
        fixture.loop.clock,
        lambda topic: "room:*" if topic.startswith("room:") else "",
    )
    for topic in ("room:1", "room:2", "other"):
        for _ in range(2):
            hub.add(topic, Reader(fixture.loop, ready=fixture.ready))
        hub.fan_out(topic, "e", EMPTY)
    assert fixture.metrics.topic_events == {"room:*": 2}
    assert fixture.metrics.topic_deliveries == {"room:*": 4}


# Held back.


def test_held_subscriber_gets_nothing_until_it_is_added_again_and_its_loss_is_counted() -> None:
    loop = Loop()
    metrics = Metrics()
    hub = Hub(metrics, lambda topic: Policy(), loop.call_soon, loop.clock)
    one, two = Reader(loop, ready=True), Reader(loop, ready=True)
    for reader in (one, two):
        hub.add("t", reader)
    hub.fan_out("t", "a", EMPTY)
    hub.hold("t", one)
    hub.hold("t", one)  # a second gap
    hub.fan_out_all("t", [("b", EMPTY, None), ("c", EMPTY, None)])
    assert hub.count("t") == 2, "it is still subscribed"
    assert metrics.deliveries == 4
    assert not metrics.dropped, "counted at the end of the hold, so that deliveries cost what they did"
    hub.add("t", one)
    assert metrics.dropped == {Reason.EVENTS_MISSED: 2}
    hub.fan_out("t", "d", EMPTY)
    hub.hold("t", two)
    hub.fan_out("t", "e", EMPTY)
    hub.remove("t", two)
    assert metrics.dropped == {Reason.EVENTS_MISSED: 3}
    hub.hold("t", one)
    assert hub.fan_out("t", "f", EMPTY), "a topic whose subscribers are all held"
    assert hub.remove("t", one)
    hub.hold("t", one)
    hub.hold("other", one)
    assert metrics.dropped == {Reason.EVENTS_MISSED: 4}
    assert "t" not in hub


def test_event_in_no_history_reaches_those_that_are_given_the_history(fixture: Fixture) -> None:
    hub = fixture.hub
    one, two = fixture.reader("t"), fixture.reader("t")
    hub.hold("t", one, is_lost=False)
    hub.hold("t", two, is_lost=False)
    hub.add("t", two)
    hub.fan_out_all("t", [("a", EMPTY, "1-1"), ("b", EMPTY, None), ("c", EMPTY, "1-2")])
    assert (one.texts, two.texts) == ([text("b")], [text("a"), text("b"), text("c")])
    hub.hold("t", two)
    hub.fan_out("t", "d", EMPTY)
    assert one.texts == [text("b"), text("d")]
    assert two.texts[3:] == [], "it misses what it is not given from the history"
    hub.fan_out("t", "e", EMPTY, one)
    assert one.texts == [text("b"), text("d")]


@pytest.mark.parametrize("overflow", Overflow)
def test_delivery_under_way_gives_nothing_of_a_history_twice(overflow: Overflow) -> None:
    """Whether its subscriber has joined again since, or has been given the history up to its end."""
    fixture = Fixture(lambda topic: Policy(overflow))
    hub = fixture.hub
    slow = fixture.slow_readers(STEP)
    held, entered = fixture.reader("t"), fixture.reader("t")
    hub.fan_out_all("t", [("a", EMPTY, "1-1"), ("b", EMPTY, None)])
    assert slow[0].texts and not held.texts, "the rest is put off"
    for reader in (held, entered):
        hub.hold("t", reader, is_lost=False)
    hub.add("t", entered)
    fixture.loop.run()
    assert held.texts == entered.texts == [text("b")]


def test_hub_says_who_misses_what_comes(fixture: Fixture) -> None:
    hub = fixture.hub
    one, two = fixture.reader("t"), fixture.reader("t")
    assert not hub.is_held("t", one) and not hub.is_held("elsewhere", one)
    hub.hold("t", one)
    hub.hold("t", two, is_lost=False)
    assert hub.is_held("t", one) and not hub.is_held("t", two)
    hub.hold("t", two)
    assert hub.is_held("t", two), "what it misses now is lost"


def test_watcher_of_a_topic_is_called_for_each_that_comes() -> None:
    fixture = Fixture()
    calls: list[int] = []
    fixture.hub.watch("t", lambda: calls.append(fixture.hub.count("t")))
    first = fixture.reader("t", "other")
    fixture.reader("t")
    fixture.hub.remove("t", first)
    assert calls == [1, 2]
    fixture.hub.watch("t", None)
    fixture.reader("t")
    assert calls == [1, 2]
