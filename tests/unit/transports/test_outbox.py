"""`relay.transports.outbox`: what waits for a slow reader, its bound, and the three policies."""

import gc
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config_sections import Overflow, Policy
from relay.metrics import Metrics
from relay.protocol.frame import Frame
from relay.protocol.payload import classify_payload
from relay.protocol.serializer import POSITION_EVENT, Version, encode_broadcast
from relay.transports.outbox import ENTRY_BYTES, RECOVER_BYTES, Entry, Outbox, OutboxBudget

DISCONNECT = Policy(Overflow.DISCONNECT)
DROP_OLDEST = Policy(Overflow.DROP_OLDEST)
LATEST = Policy(Overflow.LATEST)
RECOVER = Policy(Overflow.RECOVER)


def frame(text: str, size: int | None = None) -> Frame:
    """A frame that can be told from others, padded to ``size`` bytes."""
    data = text.encode()
    return Frame(data if size is None else data.ljust(size, b"."), True)


def drain(outbox: Outbox) -> list[str]:
    """All that waits, in order."""
    return [outbox.pop().text.rstrip(".") for _ in range(len(outbox))]


def test_frames_come_out_in_the_order_they_went_in() -> None:
    outbox = Outbox(1000)
    outbox.add_control(frame("reply"))
    assert outbox.add_event(frame("one"), "a", "e", DISCONNECT) == 0
    assert outbox.add_event(frame("two"), "b", "e", DROP_OLDEST) == 0
    outbox.add_control(frame("close"))
    assert outbox.add_event(frame("three"), "a", "e", LATEST) == 0
    assert len(outbox) == 5
    assert drain(outbox) == ["reply", "one", "two", "close", "three"]
    assert (len(outbox), outbox.event_bytes) == (0, 0)


def test_empty_outbox_has_nothing_to_take() -> None:
    with pytest.raises(IndexError):
        Outbox(10).pop()


@pytest.mark.parametrize("policy", [DISCONNECT, DROP_OLDEST, LATEST])
def test_events_fill_the_bound_to_the_last_byte(policy: Policy) -> None:
    outbox = Outbox(20)
    assert outbox.add_event(frame("a", 10), "t", "one", policy) == 0
    assert outbox.add_event(frame("b", 10), "t", "two", policy) == 0
    assert outbox.event_bytes == 20


def test_policy_disconnect_asks_for_the_end_of_the_socket() -> None:
    """Its topics' events must not have holes: the client comes back and starts afresh."""
    outbox = Outbox(20)
    assert outbox.add_event(frame("a", 15), "t", "e", DISCONNECT) == 0
    assert outbox.add_event(frame("b", 6), "t", "e", DISCONNECT) is None
    assert drain(outbox) == ["a"]


def test_policy_disconnect_holds_for_a_single_event_over_the_bound() -> None:
    assert Outbox(20).add_event(frame("a", 21), "t", "e", DISCONNECT) is None


def test_policy_drop_oldest_makes_room_within_its_topic() -> None:
    outbox = Outbox(30)
    for text in ("1", "2", "3"):
        assert outbox.add_event(frame(text, 10), "t", "e", DROP_OLDEST) == 0
    assert outbox.add_event(frame("4", 15), "t", "e", DROP_OLDEST) == 2
    assert outbox.event_bytes == 25
    assert drain(outbox) == ["3", "4"]


def test_policy_drop_oldest_spares_control_frames_and_other_topics() -> None:
    outbox = Outbox(30)
    outbox.add_control(frame("reply"))
    outbox.add_event(frame("other 1", 10), "other", "e", DISCONNECT)
    outbox.add_event(frame("1", 10), "t", "e", DROP_OLDEST)
    outbox.add_event(frame("other 2", 10), "other", "e", DISCONNECT)
    assert outbox.add_event(frame("2", 10), "t", "e", DROP_OLDEST) == 1
    assert drain(outbox) == ["reply", "other 1", "other 2", "2"]


@pytest.mark.parametrize("policy", [DROP_OLDEST, LATEST])
def test_new_event_is_dropped_where_other_topics_fill_the_outbox(policy: Policy) -> None:
    outbox = Outbox(30)
    outbox.add_event(frame("other", 25), "other", "e", DISCONNECT)
    outbox.add_event(frame("1", 5), "t", "e", DROP_OLDEST)
    assert outbox.add_event(frame("2", 10), "t", "e", policy) == 2
    assert outbox.event_bytes == 25
    assert drain(outbox) == ["other"]


@pytest.mark.parametrize("policy", [DROP_OLDEST, LATEST])
def test_event_that_can_never_fit_costs_no_other_its_place(policy: Policy) -> None:
    outbox = Outbox(30)
    outbox.add_event(frame("1", 10), "t", "e", policy)
    assert outbox.add_event(frame("2", 31), "t", "e", policy) == 1
    assert drain(outbox) == ["1"]


def test_policy_latest_keeps_the_newest_in_the_place_of_the_oldest() -> None:
    outbox = Outbox(100)
    outbox.add_event(frame("position 1", 20), "t", "position", LATEST)
    outbox.add_event(frame("speed 1", 20), "t", "speed", LATEST)
    outbox.add_event(frame("elsewhere", 20), "u", "position", LATEST)
    assert outbox.add_event(frame("position 2", 30), "t", "position", LATEST) == 1
    assert outbox.event_bytes == 70
    assert drain(outbox) == ["position 2", "speed 1", "elsewhere"]


def positioned(text: str, n: int, size: int | None = None) -> Frame:
    """The frame of an event of a topic with a history."""
    event = frame(text, size)
    event.position = f"1000-{n}"
    return event


def test_policy_latest_lets_no_position_go_back() -> None:
    """A client that is cut off after one would come back with it, and would not be given what stood behind it."""
    outbox = Outbox(100)
    for n, text, event in ((1, "a1", "a"), (2, "b2", "b"), (3, "a3", "a"), (4, "b4", "b"), (5, "a5", "a")):
        assert outbox.add_event(positioned(text, n, 20), "t", event, LATEST) == (0 if n < 3 else 1)
    assert outbox.event_bytes == 40
    assert drain(outbox) == ["b4", "a5"]


def test_policy_latest_lets_no_event_overtake_the_reply_to_a_further_join() -> None:
    outbox = Outbox(100)
    for topic in "tu":
        outbox.add_event(frame(f"{topic}1", 20), topic, "e", LATEST)
    outbox.settle_dropped("t", of_its_own)
    outbox.add_control(frame("close and reply"))
    for text in ("t2", "u2", "t3"):
        outbox.add_event(frame(text, 20), text[0], "e", LATEST)
    assert drain(outbox) == ["t1", "u2", "close and reply", "t3"]


def test_policy_latest_starts_anew_once_its_value_was_sent() -> None:
    outbox = Outbox(100)
    outbox.add_event(frame("1"), "t", "e", LATEST)
    assert outbox.pop().text == "1"
    assert outbox.add_event(frame("2"), "t", "e", LATEST) == 0
    assert outbox.add_event(frame("3"), "t", "e", LATEST) == 1
    assert drain(outbox) == ["3"]


def test_policy_latest_stays_within_the_bound_when_values_grow() -> None:
    """A thousand small values, each replaced by a large one, must not hold a thousand times the bound."""
    outbox = Outbox(100)
    for number in range(10):
        assert outbox.add_event(frame(f"small {number}", 10), "t", f"e{number}", LATEST) == 0
    assert outbox.add_event(frame("large 5", 50), "t", "e5", LATEST) == 5
    assert outbox.event_bytes == 100
    assert drain(outbox) == ["small 4", "small 6", "small 7", "small 8", "small 9", "large 5"]


def test_event_of_another_policy_is_not_replaced() -> None:
    """A topic's policy is one; but two sockets' topics may have been joined under different settings."""
    outbox = Outbox(100)
    outbox.add_event(frame("1"), "t", "e", DROP_OLDEST)
    assert outbox.add_event(frame("2"), "t", "e", LATEST) == 0
    assert outbox.pop().text == "1"
    assert outbox.add_event(frame("3"), "t", "e", LATEST) == 1
    assert drain(outbox) == ["3"]


def test_control_frames_are_never_dropped_and_do_not_count() -> None:
    outbox = Outbox(10)
    for number in range(100):
        outbox.add_control(frame(f"reply {number}", 50))
    assert outbox.event_bytes == 0
    assert outbox.add_event(frame("event", 10), "t", "e", DISCONNECT) == 0
    assert len(outbox) == 101


def test_clearing_says_how_many_events_were_lost() -> None:
    outbox = Outbox(100)
    outbox.add_control(frame("reply"))
    outbox.add_event(frame("1"), "t", "e", LATEST)
    outbox.add_event(frame("2"), "t", "f", DISCONNECT)
    assert outbox.clear() == {"*": 2}
    assert (len(outbox), outbox.event_bytes, outbox.clear()) == (0, 0, {})
    assert outbox.add_event(frame("3"), "t", "e", LATEST) == 0, "what was cleared is not replaced either"


# One event for each value of a key.


def broadcast(payload: str, version: Version = Version.V2, topic: str = "t") -> Frame:
    return encode_broadcast(version, topic, "position", classify_payload(payload.encode()))


@pytest.mark.parametrize("version", Version)
def test_policy_latest_keeps_one_event_for_each_value_of_its_key(version: Version) -> None:
    outbox, policy = Outbox(10_000), Policy(Overflow.LATEST, latest_key="icao24")
    frames = [
        broadcast(f'{{"icao24": "{which}", "n": {number}}}', version) for number, which in enumerate("abacb", start=1)
    ]
    assert [outbox.add_event(each, "t", "position", policy) for each in frames] == [0, 0, 1, 0, 1]
    assert [outbox.pop() for _ in range(len(outbox))] == [frames[2], frames[4], frames[3]]


@pytest.mark.parametrize("payload", ["{}", "[1]", "5", '{"other": 1}', '{"deep": {"icao24": 1}}'])
def test_events_without_the_key_replace_those_of_the_same_name(payload: str) -> None:
    outbox, policy = Outbox(10_000), Policy(Overflow.LATEST, latest_key="icao24")
    outbox.add_event(broadcast('{"icao24": 1}'), "t", "position", policy)
    assert outbox.add_event(broadcast(payload), "t", "position", policy) == 0
    assert outbox.add_event(broadcast(payload), "t", "position", policy) == 1


def test_binary_events_have_no_key() -> None:
    outbox, policy = Outbox(10_000), Policy(Overflow.LATEST, latest_key="icao24")
    binary = encode_broadcast(Version.V2, "t", "position", b"\x00\x01")
    assert binary.payload_value("icao24") is None
    assert [outbox.add_event(binary, "t", "position", policy) for _ in range(2)] == [0, 1]


def test_payload_is_looked_into_once_for_all_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr("relay.protocol.frame._find_value", lambda frame, key: found.append(key))
    event = broadcast('{"icao24": 1}')
    for _ in range(3):
        Outbox(1000).add_event(event, "t", "position", Policy(Overflow.LATEST, latest_key="icao24"))
    assert found == ["icao24"]


def test_latest_replaces_a_value_in_its_place() -> None:
    """Each name in order, and none waits longer for changing often: a1 b2 a3 arrives as a3 b2."""
    outbox = Outbox(1000)
    for text in ("a1", "b2", "a3", "c4", "a5", "b6"):
        outbox.add_event(frame(text), "t", text[0], LATEST)
    assert drain(outbox) == ["a5", "b6", "c4"]


# Telling what was dropped.

TELLING = Policy(Overflow.DROP_OLDEST, notify_dropped=True)


def telling(max_bytes: int) -> Outbox:
    return Outbox(max_bytes, notice=lambda topic, count: frame(f"{topic} dropped {count}"))


def test_what_was_dropped_is_told_before_the_next_event_of_its_topic() -> None:
    outbox = telling(20)
    outbox.add_control(frame("reply"))
    for text in "1234":
        outbox.add_event(frame(text, 10), "t", "e", TELLING)
    assert len(outbox) == 4
    assert drain(outbox) == ["reply", "t dropped 2", "3", "4"]
    assert outbox.dropped == 2


def test_what_was_dropped_is_told_at_the_end_where_no_event_of_its_topic_waits() -> None:
    """Else the next event, written past the empty outbox, would come before it."""
    outbox = telling(20)
    outbox.add_event(frame("other", 20), "other", "e", DISCONNECT)
    outbox.add_event(frame("1", 10), "t", "e", TELLING)
    assert drain(outbox) == ["other", "t dropped 1"]
    assert len(outbox) == 0


def test_what_was_dropped_is_not_told_to_those_who_do_not_ask() -> None:
    outbox = telling(10)
    for text in "12":
        outbox.add_event(frame(text, 10), "t", "e", DROP_OLDEST)
    assert (drain(outbox), outbox.dropped) == (["2"], 1)


def of_its_own(topic: str, count: int) -> Frame:
    """The note as an ended subscription has it, under its own join_ref."""
    return frame(f"own {topic} dropped {count}")


def test_note_of_an_ended_subscription_stands_before_its_waiting_events() -> None:
    """They come after the hole, though their subscription has ended: the client must be told there."""
    outbox = telling(20)
    outbox.add_control(frame("reply"))
    for text in "1234":
        outbox.add_event(frame(text, 10), "t", "e", TELLING)
    outbox.settle_dropped("t", of_its_own)
    outbox.add_control(frame("close"))
    assert outbox.waiting_bytes == sum(entry.size for entry in (frame("reply"), frame("own t dropped 2"))) + 20 + 5
    assert drain(outbox) == ["reply", "own t dropped 2", "3", "4", "close"]
    assert outbox.waiting_bytes == 0


def test_note_of_an_ended_subscription_without_waiting_events_stands_before_its_close() -> None:
    outbox = telling(20)
    outbox.add_event(frame("other", 20), "other", "e", DISCONNECT)
    outbox.add_event(frame("1", 10), "t", "e", TELLING)
    outbox.settle_dropped("t", of_its_own)
    outbox.settle_dropped("t", of_its_own)
    outbox.settle_dropped("other", of_its_own)
    outbox.add_control(frame("close"))
    assert drain(outbox) == ["other", "own t dropped 1", "close"]


def test_next_subscription_is_told_only_what_it_missed_itself() -> None:
    outbox = telling(20)
    for text in "123":
        outbox.add_event(frame(text, 10), "t", "e", TELLING)
    outbox.settle_dropped("t", of_its_own)
    assert outbox.pop().text.rstrip(".") == "own t dropped 1"
    outbox.add_event(frame("4", 10), "t", "e", TELLING)
    assert drain(outbox) == ["t dropped 1", "3", "4"]


def test_closing_a_socket_leaves_nothing_to_tell() -> None:
    outbox = telling(10)
    for text in "12":
        outbox.add_event(frame(text, 10), "t", "e", Policy(Overflow.DROP_OLDEST, "", True, "t*"))
    assert outbox.clear() == {"t*": 1}
    assert (len(outbox), outbox.dropped) == (0, 2)


# All outboxes together.


def test_largest_outbox_goes_first_when_all_hold_too_much() -> None:
    metrics = Metrics()
    together = OutboxBudget(100 + 4 * ENTRY_BYTES, metrics)
    gone: list[str] = []

    def make(name: str) -> Outbox:
        def evict() -> None:
            gone.append(name)
            outbox.clear()

        outbox = Outbox(1000, together, evict)
        return outbox

    small, large, late = make("small"), make("large"), make("late")
    small.add_event(frame("1", 30), "t", "e", DISCONNECT)
    large.add_event(frame("2", 30), "t", "e", DISCONNECT)
    large.add_control(frame("3", 10))
    assert (gone, metrics.outbox_bytes) == ([], 70)
    late.add_event(frame("4", 31), "t", "e", DISCONNECT)
    assert (gone, metrics.outbox_bytes) == (["large"], 61)
    assert (drain(small), drain(late), drain(large)) == (["1"], ["4"], [])
    late.add_event(frame("5", 101 + 4 * ENTRY_BYTES), "t", "e", DISCONNECT)
    assert (gone, metrics.outbox_bytes) == (["large", "late"], 0)


@pytest.mark.parametrize("policy", [DROP_OLDEST, LATEST])
def test_bound_of_all_outboxes_is_one_of_memory(policy: Policy) -> None:
    """The smallest of events, each with its place in a queue: five times as much as their bytes."""
    outbox, names = Outbox(1_000_000), [f"e{number}" for number in range(4_000)]
    events = [encode_broadcast(Version.V2, "t", name, classify_payload(b"1")) for name in names]
    _ = gc.collect()  # which empties the lists of free objects: what is taken from them is not traced
    tracemalloc.start()
    try:
        for event, name in zip(events, names, strict=True):
            _ = outbox.add_event(event, "t", name, policy)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(outbox) == len(events)
    assert outbox.held_bytes == pytest.approx(outbox.waiting_bytes + taken, rel=0.2)


def test_policy_recover_gives_up_what_is_in_the_history_and_says_from_where_on() -> None:
    outbox = Outbox(100_000)
    outbox.add_control(frame("reply"))
    outbox.add_event(frame("live"), "t", "e", RECOVER)
    for n in range(1, 4):
        assert outbox.add_event(positioned(str(n), n, 10_000), "t", "e", RECOVER) == 0
    outbox.add_event(positioned("other", 1), "u", "e", DROP_OLDEST)
    assert outbox.add_event(positioned("4", 4, 10_000), "t", "e", RECOVER) is None
    assert outbox.drop_recoverable("t") == "1000-1"
    assert outbox.drop_recoverable("t") is None
    assert drain(outbox) == ["reply", "live", "other"]
    assert (outbox.waiting_bytes, outbox.dropped) == (0, 0)


def test_policy_recover_drops_events_that_are_in_no_history_over_the_bound() -> None:
    outbox = Outbox(30)
    assert outbox.add_event(frame("live", 31), "t", "e", RECOVER) == 1


def test_position_goes_with_its_event_whether_that_waits_or_was_written() -> None:
    """What follows a payload that is no object: given up alone, its event would be given a second time."""
    outbox = Outbox(100_000)
    assert outbox.add_event(positioned("position 1", 1), "t", POSITION_EVENT, RECOVER) == 0
    assert outbox.add_event(positioned("2", 2, RECOVER_BYTES - 10), "t", "e", RECOVER) == 0
    assert outbox.add_event(positioned("position 2", 2, 90), "t", POSITION_EVENT, RECOVER) == 0
    assert outbox.add_event(positioned("3", 3, 90), "t", "e", RECOVER) is None
    assert outbox.drop_recoverable("t") == "1000-2"
    assert drain(outbox) == ["position 1"]


def test_no_bound_for_all_outboxes_where_it_is_zero() -> None:
    metrics = Metrics()
    outbox = Outbox(1000, OutboxBudget(0, metrics))
    outbox.add_event(frame("1", 900), "t", "e", DISCONNECT)
    assert (len(outbox), metrics.outbox_bytes) == (1, 900)


def numbers() -> Iterator[str]:
    return (str(number) for number in range(10_000))


steps = st.lists(
    st.one_of(
        st.just("pop"),
        st.just("control"),
        st.tuples(st.sampled_from("tuv"), st.sampled_from("ef"), st.integers(5, 60)),
    ),
    max_size=60,
)


@given(steps, st.integers(10, 120))
def test_every_event_is_sent_waiting_or_counted_and_the_bound_holds(steps: list[object], max_bytes: int) -> None:
    """A loss that is not counted is a bug. Order holds within all that was not replaced."""
    policies = {"t": DROP_OLDEST, "u": LATEST, "v": DISCONNECT}
    metrics = Metrics()
    outbox = Outbox(max_bytes, OutboxBudget(0, metrics))
    number = numbers()
    added = dropped = controls = 0
    sent: list[str] = []
    for step in steps:
        if step == "pop":
            if outbox:
                sent.append(outbox.pop().text.rstrip("."))
        elif step == "control":
            controls += 1
            outbox.add_control(frame(f"c{next(number)}"))
        else:
            assert isinstance(step, tuple)
            topic, event, size = step
            added += 1
            lost = outbox.add_event(frame(f"{topic}{next(number)}", size), topic, event, policies[topic])
            dropped += 1 if lost is None else lost
        assert 0 <= outbox.event_bytes <= max_bytes
        assert metrics.outbox_bytes == outbox.waiting_bytes
    sent += drain(outbox)
    assert outbox.event_bytes == metrics.outbox_bytes == 0
    assert len(sent) == added - dropped + controls
    assert len(set(sent)) == len(sent)
    for kind in "ctv":
        order = [int(text[1:]) for text in sent if text[0] == kind]
        assert order == sorted(order)


# Taking several at once.


def texts(entries: tuple[Entry, ...]) -> list[str]:
    return [entry.frame.text.rstrip(".") for entry in entries]


def test_as_many_are_taken_as_fit_and_one_at_least() -> None:
    outbox = Outbox(1000)
    for text in "123":
        outbox.add_event(frame(text, 100), "t", "e", DISCONNECT)
    assert texts(outbox.take(250)) == ["1", "2"]
    assert texts(outbox.take(50)) == ["3"]
    assert outbox.take(50) == ()
    assert outbox.waiting_bytes == 0


def test_notices_are_taken_in_their_places() -> None:
    outbox = telling(20)
    for text in "123":
        outbox.add_event(frame(text, 10), "t", "e", TELLING)
    assert texts(outbox.take(1000)) == ["t dropped 1", "2", "3"]


def test_what_is_put_back_comes_first_and_counts() -> None:
    metrics = Metrics()
    outbox = Outbox(1000, OutboxBudget(0, metrics))
    outbox.add_control(frame("reply", 10))
    outbox.add_event(frame("1", 100), "t", "e", LATEST)
    taken = outbox.take(1000)
    outbox.add_event(frame("2", 100), "t", "e", LATEST)
    outbox.put_back(taken)
    assert (outbox.control_bytes, outbox.event_bytes, metrics.outbox_bytes) == (10, 200, 210)
    assert drain(outbox) == ["reply", "1", "2"]
    assert metrics.outbox_bytes == 0
