"""`relay.transports.admission`: token buckets, one socket's pace, and who may come in."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config_sections import LimitsConfig
from relay.proxy_headers import rate_limit_key
from relay.rate_limit import PORTION_BYTES, MessageRateLimiter, TokenBucket
from relay.transports.admission import ConnectionLimiter

# Buckets.


def test_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    bucket = TokenBucket(8, 3, now=100.0)
    assert [bucket.take(100.0) for _ in range(5)] == [True, True, True, False, False]
    assert [bucket.take(100.125), bucket.take(100.125)] == [True, False]
    assert [bucket.take(100.4) for _ in range(3)] == [True, True, False]


def test_bucket_never_holds_more_than_its_burst() -> None:
    bucket = TokenBucket(10, 3, now=0.0)
    assert [bucket.take(1e6) for _ in range(4)] == [True, True, True, False]


def test_excess_adds_up_until_the_bucket_is_full_again() -> None:
    bucket = TokenBucket(10, 2, now=0.0)
    for _ in range(5):
        bucket.take(0.0)
    assert bucket.violations == 3
    assert bucket.take(0.1)
    assert bucket.violations == 3, "one token is no pause"
    assert bucket.take(0.5)
    assert bucket.violations == 0


def test_several_tokens_are_taken_together_or_not_at_all() -> None:
    bucket = TokenBucket(10, 5, now=0.0)
    assert [bucket.take(0.0, 3), bucket.take(0.0, 3), bucket.take(0.0, 2)] == [True, False, True]
    assert bucket.violations == 3


def test_more_than_a_bucket_holds_is_taken_from_a_full_one_and_paid_off() -> None:
    """A frame may be larger than the burst of somebody's settings; it must not be refused for ever."""
    bucket = TokenBucket(10, 5, now=0.0)
    assert [bucket.take(0.0, 20), bucket.take(1.4), bucket.take(1.7)] == [True, False, True]


@given(st.lists(st.floats(0, 0.5), max_size=200), st.integers(1, 50), st.integers(1, 20))
def test_bucket_never_gives_more_than_burst_and_rate_allow(pauses: list[float], per_s: int, burst: int) -> None:
    bucket = TokenBucket(per_s, burst, now=0.0)
    times = list(itertools.accumulate(pauses))
    taken = sum(bucket.take(now) for now in times)
    assert taken <= burst + per_s * (times[-1] if times else 0) + 1e-6


# The pace of one socket.


def test_joins_and_pushes_have_rates_of_their_own() -> None:
    pace = MessageRateLimiter(LimitsConfig(joins_per_s=1, joins_burst=1, pushes_per_s=1, pushes_burst=2), 0.0)
    assert [pace.allows("phx_join", 0.0), pace.allows("phx_join", 0.0)] == [True, False]
    assert [pace.allows(event, 0.0) for event in ("shout", "heartbeat", "phx_leave")] == [True, True, False]


def test_large_message_counts_once_for_each_portion_that_has_begun() -> None:
    pace = MessageRateLimiter(LimitsConfig(pushes_per_s=1, pushes_burst=4), 0.0)
    sizes = (PORTION_BYTES - 1, PORTION_BYTES, PORTION_BYTES, 10)
    assert [pace.allows("shout", 0.0, size) for size in sizes] == [True, True, False, True]


def test_zero_lets_any_number_pass() -> None:
    pace = MessageRateLimiter(LimitsConfig(joins_per_s=0, joins_burst=1, pushes_per_s=0, pushes_burst=1), 0.0)
    assert all(pace.allows(event, 0.0) for event in ("phx_join", "shout") * 100)
    assert not pace.is_exhausted


@pytest.mark.parametrize("event", ["phx_join", "shout"])
def test_pace_is_exhausted_past_so_many_messages_over_the_rate(event: str) -> None:
    limits = LimitsConfig(joins_per_s=1, joins_burst=1, pushes_per_s=1, pushes_burst=1, rate_limit_violations_max=3)
    pace = MessageRateLimiter(limits, 0.0)
    exhausted = []
    for _ in range(5):
        pace.allows(event, 0.0)
        exhausted.append(pace.is_exhausted)
    assert exhausted == [False, False, False, False, True]
    pace.allows(event, 10.0)
    assert not pace.is_exhausted


def test_pace_is_never_exhausted_where_that_is_off() -> None:
    pace = MessageRateLimiter(LimitsConfig(pushes_per_s=1, pushes_burst=1, rate_limit_violations_max=0), 0.0)
    for _ in range(10_000):
        pace.allows("shout", 0.0)
    assert not pace.is_exhausted


# Who may come in.


def admission(sockets_max: int = 0, sockets_per_address: int = 0, handshakes_per_s: int = 0) -> ConnectionLimiter:
    return ConnectionLimiter(
        sockets_max=sockets_max, sockets_per_address=sockets_per_address, handshakes_per_s=handshakes_per_s, now=0.0
    )


def kind(admission: ConnectionLimiter, address: str | None, now: float = 0.0) -> tuple[int, str] | None:
    refused = admission.acquire(address, now)
    assert refused is None or refused.retry_after_s > 0
    return None if refused is None else (refused.status, refused.kind)


def test_sockets_in_all_are_bounded() -> None:
    full = admission(sockets_max=2)
    assert [kind(full, "a"), kind(full, None), kind(full, "b")] == [None, None, (503, "sockets in all")]
    full.release("a")
    assert kind(full, "b") is None


def test_sockets_of_one_address_are_bounded() -> None:
    doors = admission(sockets_per_address=2)
    assert [kind(doors, "a"), kind(doors, "a"), kind(doors, "b")] == [None, None, None]
    assert kind(doors, "a") == (429, "sockets per address")
    doors.release("a")
    assert kind(doors, "a") is None


def test_those_without_an_address_are_not_counted_by_it() -> None:
    doors = admission(sockets_per_address=1)
    assert [kind(doors, None) for _ in range(3)] == [None] * 3


def test_handshakes_are_bounded_in_their_rate() -> None:
    doors = admission(handshakes_per_s=2)
    assert [kind(doors, "a") for _ in range(3)] == [None, None, (503, "handshakes per second")]
    assert kind(doors, "a", now=0.5) is None


def test_zero_lets_everybody_in() -> None:
    doors = admission()
    assert [kind(doors, "a") for _ in range(5000)] == [None] * 5000


def test_addresses_that_have_left_are_forgotten() -> None:
    """Or an attacker with many of them would fill the memory."""
    doors = admission(sockets_max=1)
    for number in range(100):
        assert kind(doors, f"a{number}") is None
        assert kind(doors, f"b{number}") is not None
        doors.release(f"a{number}")
    assert (len(doors), doors.sockets) == (0, 0)


def test_one_address_cannot_use_up_the_handshakes_of_all() -> None:
    doors = admission(sockets_per_address=5000, handshakes_per_s=100)
    outcomes = [kind(doors, "a") for _ in range(1000)]
    assert outcomes == [None] * 25 + [(429, "handshakes per address")] * 975
    assert [kind(doors, "b") for _ in range(25)] == [None] * 25
    assert kind(doors, "a", now=0.5) is None, "its share comes in again"


def test_share_of_an_address_is_ten_handshakes_at_least() -> None:
    doors = admission(sockets_per_address=5000, handshakes_per_s=20)
    assert [kind(doors, "a") for _ in range(11)] == [None] * 10 + [(429, "handshakes per address")]


def test_no_address_has_a_share_where_addresses_are_not_counted() -> None:
    doors = admission(sockets_per_address=0, handshakes_per_s=100)
    assert [kind(doors, "a") for _ in range(100)] == [None] * 100


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_this_machine_has_all_handshakes(address: str) -> None:
    """A load test starts there, and so do all clients of a proxy that `trusted_proxies` does not name."""
    doors = admission(sockets_per_address=5000, handshakes_per_s=100)
    assert [kind(doors, rate_limit_key(address)) for _ in range(100)] == [None] * 100


@pytest.mark.parametrize("address", ["127.evil", "127.0.0.1x", "::/64x"])
def test_text_that_looks_like_this_machine_has_a_share_as_others(address: str) -> None:
    """A header may have set it, where the server believes that."""
    doors = admission(sockets_per_address=5000, handshakes_per_s=40)
    assert kind(doors, rate_limit_key(address)) is None
    assert (429, "handshakes per address") in [kind(doors, rate_limit_key(address)) for _ in range(20)]


def test_shares_are_forgotten_once_they_are_full_again() -> None:
    doors = admission(sockets_per_address=10, handshakes_per_s=100_000)
    for number in range(100):
        assert kind(doors, str(number)) is None
        doors.release(str(number))
    assert len(doors) == 100
    for now in (1.5, 3.0):
        assert kind(doors, "a", now) is None
        doors.release("a")
    assert len(doors) == 1


def test_share_is_not_refreshed_by_forgetting() -> None:
    doors = admission(sockets_per_address=5000, handshakes_per_s=40)
    entered = [kind(doors, "a", now=step / 100) is None for step in range(1000)]
    assert sum(entered) <= 10 + 10 * 10


def test_shares_are_bounded_in_number() -> None:
    doors = admission(sockets_per_address=10, handshakes_per_s=100_000)
    for number in range(10_500):
        assert kind(doors, str(number)) is None
        doors.release(str(number))
    assert len(doors) == 10_000
