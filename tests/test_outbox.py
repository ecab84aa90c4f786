"""`relay.outbox`: what waits for a slow reader, its bound, and the three policies."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.outbox import Outbox, Overflow
from relay.wire import Frame


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
    assert outbox.add_event(frame("one"), "a", "e", Overflow.DISCONNECT) == 0
    assert outbox.add_event(frame("two"), "b", "e", Overflow.DROP_OLDEST) == 0
    outbox.add_control(frame("close"))
    assert outbox.add_event(frame("three"), "a", "e", Overflow.LATEST) == 0
    assert len(outbox) == 5
    assert drain(outbox) == ["reply", "one", "two", "close", "three"]
    assert (len(outbox), outbox.event_bytes) == (0, 0)


def test_empty_outbox_has_nothing_to_take() -> None:
    with pytest.raises(IndexError):
        Outbox(10).pop()


@pytest.mark.parametrize("overflow", Overflow)
def test_events_fill_the_bound_to_the_last_byte(overflow: Overflow) -> None:
    outbox = Outbox(20)
    assert outbox.add_event(frame("a", 10), "t", "one", overflow) == 0
    assert outbox.add_event(frame("b", 10), "t", "two", overflow) == 0
    assert outbox.event_bytes == 20


def test_policy_disconnect_asks_for_the_end_of_the_socket() -> None:
    """Its topics' events must not have holes: the client comes back and starts afresh."""
    outbox = Outbox(20)
    assert outbox.add_event(frame("a", 15), "t", "e", Overflow.DISCONNECT) == 0
    assert outbox.add_event(frame("b", 6), "t", "e", Overflow.DISCONNECT) is None
    assert drain(outbox) == ["a"]


def test_policy_disconnect_holds_for_a_single_event_over_the_bound() -> None:
    assert Outbox(20).add_event(frame("a", 21), "t", "e", Overflow.DISCONNECT) is None


def test_policy_drop_oldest_makes_room_within_its_topic() -> None:
    outbox = Outbox(30)
    for text in ("1", "2", "3"):
        assert outbox.add_event(frame(text, 10), "t", "e", Overflow.DROP_OLDEST) == 0
    assert outbox.add_event(frame("4", 15), "t", "e", Overflow.DROP_OLDEST) == 2
    assert outbox.event_bytes == 25
    assert drain(outbox) == ["3", "4"]


def test_policy_drop_oldest_spares_control_frames_and_other_topics() -> None:
    outbox = Outbox(30)
    outbox.add_control(frame("reply"))
    outbox.add_event(frame("other 1", 10), "other", "e", Overflow.DISCONNECT)
    outbox.add_event(frame("1", 10), "t", "e", Overflow.DROP_OLDEST)
    outbox.add_event(frame("other 2", 10), "other", "e", Overflow.DISCONNECT)
    assert outbox.add_event(frame("2", 10), "t", "e", Overflow.DROP_OLDEST) == 1
    assert drain(outbox) == ["reply", "other 1", "other 2", "2"]


@pytest.mark.parametrize("overflow", [Overflow.DROP_OLDEST, Overflow.LATEST])
def test_new_event_is_dropped_where_other_topics_fill_the_outbox(overflow: Overflow) -> None:
    outbox = Outbox(30)
    outbox.add_event(frame("other", 25), "other", "e", Overflow.DISCONNECT)
    outbox.add_event(frame("1", 5), "t", "e", Overflow.DROP_OLDEST)
    assert outbox.add_event(frame("2", 10), "t", "e", overflow) == 2
    assert outbox.event_bytes == 25
    assert drain(outbox) == ["other"]


@pytest.mark.parametrize("overflow", [Overflow.DROP_OLDEST, Overflow.LATEST])
def test_event_that_can_never_fit_costs_no_other_its_place(overflow: Overflow) -> None:
    outbox = Outbox(30)
    outbox.add_event(frame("1", 10), "t", "e", overflow)
    assert outbox.add_event(frame("2", 31), "t", "e", overflow) == 1
    assert drain(outbox) == ["1"]


def test_policy_latest_keeps_the_newest_in_the_place_of_the_oldest() -> None:
    outbox = Outbox(100)
    outbox.add_event(frame("position 1", 20), "t", "position", Overflow.LATEST)
    outbox.add_event(frame("speed 1", 20), "t", "speed", Overflow.LATEST)
    outbox.add_event(frame("elsewhere", 20), "u", "position", Overflow.LATEST)
    assert outbox.add_event(frame("position 2", 30), "t", "position", Overflow.LATEST) == 1
    assert outbox.event_bytes == 70
    assert drain(outbox) == ["position 2", "speed 1", "elsewhere"]


def test_policy_latest_starts_anew_once_its_value_was_sent() -> None:
    outbox = Outbox(100)
    outbox.add_event(frame("1"), "t", "e", Overflow.LATEST)
    assert outbox.pop().text == "1"
    assert outbox.add_event(frame("2"), "t", "e", Overflow.LATEST) == 0
    assert outbox.add_event(frame("3"), "t", "e", Overflow.LATEST) == 1
    assert drain(outbox) == ["3"]


def test_policy_latest_stays_within_the_bound_when_values_grow() -> None:
    """A thousand small values, each replaced by a large one, must not hold a thousand times the bound."""
    outbox = Outbox(100)
    for number in range(10):
        assert outbox.add_event(frame(f"small {number}", 10), "t", f"e{number}", Overflow.LATEST) == 0
    assert outbox.add_event(frame("large 5", 50), "t", "e5", Overflow.LATEST) == 5
    assert outbox.event_bytes == 100
    assert drain(outbox) == ["small 4", "small 6", "small 7", "small 8", "small 9", "large 5"]


def test_event_of_another_policy_is_not_replaced() -> None:
    """A topic's policy is one; but two sockets' topics may have been joined under different settings."""
    outbox = Outbox(100)
    outbox.add_event(frame("1"), "t", "e", Overflow.DROP_OLDEST)
    assert outbox.add_event(frame("2"), "t", "e", Overflow.LATEST) == 0
    assert outbox.pop().text == "1"
    assert outbox.add_event(frame("3"), "t", "e", Overflow.LATEST) == 1
    assert drain(outbox) == ["3"]


def test_control_frames_are_never_dropped_and_do_not_count() -> None:
    outbox = Outbox(10)
    for number in range(100):
        outbox.add_control(frame(f"reply {number}", 50))
    assert outbox.event_bytes == 0
    assert outbox.add_event(frame("event", 10), "t", "e", Overflow.DISCONNECT) == 0
    assert len(outbox) == 101


def test_clearing_says_how_many_events_were_lost() -> None:
    outbox = Outbox(100)
    outbox.add_control(frame("reply"))
    outbox.add_event(frame("1"), "t", "e", Overflow.LATEST)
    outbox.add_event(frame("2"), "t", "f", Overflow.DISCONNECT)
    assert outbox.clear() == 2
    assert (len(outbox), outbox.event_bytes, outbox.clear()) == (0, 0, 0)
    assert outbox.add_event(frame("3"), "t", "e", Overflow.LATEST) == 0, "what was cleared is not replaced either"


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
    policies = {"t": Overflow.DROP_OLDEST, "u": Overflow.LATEST, "v": Overflow.DISCONNECT}
    outbox = Outbox(max_bytes)
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
    sent += drain(outbox)
    assert outbox.event_bytes == 0
    assert len(sent) == added - dropped + controls
    assert len(set(sent)) == len(sent)
    for kind in "ctv":
        order = [int(text[1:]) for text in sent if text[0] == kind]
        assert order == sorted(order)
