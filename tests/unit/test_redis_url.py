"""`relay.redis_url`: the forms of ``redis_url``, Sentinel's taken apart, and what is shown of each."""

from pathlib import Path

import pytest

from relay import Config, ConfigError, Relay
from relay.redis_url import OPTIONS, TCP_OPTIONS, TLS_OPTIONS, parse, parse_cluster, parse_sentinel, shown


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


@pytest.mark.parametrize("url", ["redis://h:1/0", "unix:///run/s", "rediss://h", "embedded"])
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


# What an address says, and what it may not say.


def test_address_gives_the_connection_and_the_handshake() -> None:
    found = parse("rediss://u:p%40w@h:7/3?ssl_cert_reqs=none&client_name=relay&timeout=2&protocol=3")
    assert (found.transport, found.username, found.password, found.db) == ("tls", "u", "p@w", 3)
    assert (found.client_name, found.protocol) == ("relay", 3)
    assert found.options == {
        "host": "h",
        "port": 7,
        "ssl_cert_reqs": "none",
        "socket_timeout": 2.0,
        "socket_connect_timeout": 2.0,
    }


def test_address_of_a_unix_socket_has_no_host_and_no_keepalive() -> None:
    found = parse("unix://u:p@/run/my%20redis.sock?db=1")
    assert (found.transport, found.db, found.options) == ("unix", 1, {"path": "/run/my redis.sock"})
    assert (found.username, found.password) == ("u", "p")


@pytest.mark.parametrize("name", sorted(OPTIONS | TCP_OPTIONS | TLS_OPTIONS))
def test_option_is_documented(name: str) -> None:
    assert f"`{name}" in (Path(__file__).parents[2] / "docs" / "redis.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://h?ssl=true", "option ssl: not known; for TLS begin the address with rediss://"),
        ("redis://h?abortConnect=false", "option abortConnect: not known; expected one of client_name, db"),
        ("redis://h?socket_timeout=5s", "option socket_timeout: expected a number of seconds, got '5s'"),
        ("redis://h?socket_timeout=0", "option socket_timeout: expected a number of seconds"),
        ("redis://h?socket_timeout=nan", "option socket_timeout: expected a number of seconds"),
        ("redis://h?socket_timeout=", "option socket_timeout: expected a number of seconds"),
        ("redis://h?connectTimeout=10000", "option connectTimeout: not known; the option is socket_connect_timeout"),
        ("redis://h?defaultDatabase=1", "option defaultDatabase: not known; the database is the path"),
        ("redis://h?decode_responses=true", "option decode_responses: not known"),
        ("redis://h?db=one", "option db: expected a number, 0 or more, got 'one'"),
        ("redis://h?db=-1", "option db: expected a number"),
        ("redis://h?db=1&db=2", "option db: expected once, came twice"),
        ("redis://h/1?db=2", "option db: expected as in the path, 1, got 2"),
        ("redis://h/mymaster", "expected a database number as the path"),
        ("redis://h?protocol=4", "option protocol: expected 2 or 3, got '4'"),
        ("redis://h?socket_keepalive=perhaps", "option socket_keepalive: expected true or false"),
        ("redis://h?ssl_cert_reqs=none", "option ssl_cert_reqs: expected with rediss://"),
        ("rediss://h?ssl_cert_reqs=maybe", "option ssl_cert_reqs: expected none, optional or required"),
        ("rediss://h?ssl_min_version=TLSv1", "option ssl_min_version: expected TLSv1.2 or TLSv1.3"),
        ("rediss://h?ssl_check_hostname=maybe", "option ssl_check_hostname: expected true or false"),
        ("redis://h:0", "expected a port from 1 to 65535, got 0"),
        ("redis://h:70000", "expected scheme://user:password@host:port"),
        ("redis://h:port", "expected scheme://user:password@host:port"),
        ("redis://a:1,b:2", "expected scheme://user:password@host:port"),
        ("redis://a,b", "expected one host"),
        ("redis://.example.org", "expected a host without empty parts"),
        (f"redis://{'x' * 64}", "expected a host without empty parts, and of 63 characters"),
        ("redis://h?sentinel_password=x", "option sentinel_password: expected with redis+sentinel://"),
        ("redis+sentinel://h/m?socket_timeout=5s", "option socket_timeout: expected a number of seconds"),
        ("redis+sentinel://h/m?sentinel_timeout=5", "option sentinel_timeout: not known"),
        ("redis+sentinel://h/m/x", "expected a database number"),
        ("unix://run/redis.sock", "expected unix:///path/of/the/socket, with three slashes"),
        ("unix://", "expected unix:///path/of/the/socket"),
        ("unix:///s?socket_keepalive=true", "option socket_keepalive: expected with a host"),
        ("unix:///s?db=x", "option db: expected a number"),
        ("redis://:secret#secret@h", "special characters written as %XX"),
        ("redis://:secret?secret@h", "special characters written as %XX"),
    ],
)
def test_option_or_part_that_cannot_be_is_refused_by_name(url: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Relay(redis_url=url)
    assert text in str(caught.value)
    assert str(caught.value).startswith("Relay: redis_url: ")
    assert "secret" not in str(caught.value)


def test_address_of_a_cluster_names_some_of_its_nodes() -> None:
    url = "rediss+cluster://u:p%40@one:1,two,[::1]:3?ssl_cert_reqs=none"
    found = parse_cluster(url)
    assert found is not None
    assert found.nodes == (("one", 1), ("two", 6379), ("::1", 3))
    assert found.node_url("10.0.0.1", 7) == "rediss://u:p%40@10.0.0.1:7?ssl_cert_reqs=none"
    assert found.node_url("::2", 7) == "rediss://u:p%40@[::2]:7?ssl_cert_reqs=none"
    assert (parse(url).transport, parse(url).password) == ("tls", "p@")
    assert shown(url) == "cluster of one:1,two:6379,::1:3"
    assert Config(redis_url=url).redis_url == url


@pytest.mark.parametrize("url", ["redis://h:1/0", "unix:///run/s", "redis+sentinel://h/m", "embedded"])
def test_other_addresses_are_none_of_clusters(url: str) -> None:
    assert parse_cluster(url) is None


@pytest.mark.parametrize("rest", ["", "h,,i", ":1", "h:secret", "h:99999", "h:1/0", "h,i/0", "h?db=1"])
def test_address_of_a_cluster_that_says_too_little_or_too_much_is_refused(rest: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        parse(f"redis+cluster://{rest}")
    assert "secret" not in str(caught.value)


def test_several_hosts_are_sentinels_or_a_cluster() -> None:
    with pytest.raises(ValueError, match=r"redis\+sentinel://.*redis\+cluster://"):
        parse("redis://one,two")
