"""`relay.brokers.address`: the forms of ``redis_url``, Sentinel's taken apart, and what is shown of each."""

import pytest

from relay import Config
from relay.brokers.address import parse_sentinel, shown


def test_address_of_sentinels_names_them_the_master_and_its_credentials() -> None:
    found = parse_sentinel("redis+sentinel://u:p%40w@one:1,two:2/mymaster/3?ssl_cert_reqs=none&sentinel_password=s%26")
    assert found is not None
    assert found.hosts == (("one", 1), ("two", 2))
    assert found.service == "mymaster"
    assert found.master_url == "redis://u:p%40w@one:1/3?ssl_cert_reqs=none"
    assert (found.username, found.password) == (None, "s&")


def test_sentinels_port_need_not_be_said() -> None:
    found = parse_sentinel("rediss+sentinel://one,[::1]:7,two/my%20master")
    assert found is not None
    assert found.hosts == (("one", 26379), ("::1", 7), ("two", 26379))
    assert found.service == "my master"
    assert found.master_url == "rediss://one/"


def test_sentinels_may_have_ipv6_addresses_wherever_they_stand() -> None:
    """Newer Pythons' urllib refuses brackets but at the beginning of a host."""
    for url, master_url in (
        ("redis+sentinel://[::1]:7,one/m", "redis://[::1]:7/"),
        ("redis+sentinel://u:p%40@one,[::1]:7/m/3?timeout=5", "redis://u:p%40@one/3?timeout=5"),
    ):
        found = parse_sentinel(url)
        assert found is not None
        assert ("::1", 7) in found.hosts
        assert found.master_url == master_url
        assert Config(redis_url=url).redis_url == url


@pytest.mark.parametrize("url", ["redis://h:1/0", "unix:///tmp/s", "rediss://h", "embedded"])
def test_other_addresses_are_none_of_sentinels(url: str) -> None:
    assert parse_sentinel(url) is None


@pytest.mark.parametrize(
    "rest",
    ["h:26379", "h/", "/m", "h,,i/m", ":1/m", "h:secret/m", "h:99999/m", "h/m/0/1"],
)
def test_address_that_says_too_little_is_refused_without_repeating_it(rest: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_sentinel(f"redis+sentinel://{rest}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://user:secret@h:7/0?password=secret", "h:7"),
        ("rediss://h", "h:6379"),
        ("redis://", "localhost:6379"),
        ("unix://user:secret@/run/redis.sock?db=1", "unix:///run/redis.sock"),
        ("redis+sentinel://:secret@a:1,b/m/0?sentinel_password=secret", "m of Sentinel a:1,b:26379"),
    ],
)
def test_what_is_shown_holds_no_secret(url: str, text: str) -> None:
    assert shown(url) == text
