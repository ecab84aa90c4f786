"""`relay.transports.sse_request`: which requests for a stream may pass, and how the others are answered."""

from collections.abc import Iterable
from typing import Any

import pytest

from relay.config_sections import LimitsConfig
from relay.protocol.sse import POSITIONS_MAX_BYTES
from relay.transports.handshake import HandshakeRejected
from relay.transports.sse_request import (
    StreamRequest,
    answer,
    answer_options,
    check,
    first_lines,
    last_lines,
    stream_headers,
    wrong_method,
)
from tests.support.asgi import Connection
from tests.support.sse import Parser


def scope(query: str = "topic=a", *headers: tuple[str, str], method: str = "GET") -> dict[str, Any]:
    pairs: Iterable[tuple[str, str]] = [("host", "relay.example.org"), *headers]
    return Connection("/socket/sse", query, pairs, kind="http", method=method).scope


def accepted(query: str, *headers: tuple[str, str]) -> StreamRequest:
    found = check(scope(query, *headers), "same", LimitsConfig())
    assert isinstance(found, StreamRequest), found
    return found


def refused(
    query: str = "topic=a", *headers: tuple[str, str], origins: Any = "same", **limits: int
) -> tuple[int, str, str]:
    found = check(scope(query, *headers), origins, LimitsConfig(**limits))
    assert isinstance(found, HandshakeRejected), found
    return found.status, found.kind, found.text


# Topics.


def test_topics_are_named_in_the_query() -> None:
    request = accepted("topic=room:1&topic=b%C3%BC&topic=room:1&other=x")
    assert request == StreamRequest(("room:1", "bü"), {})
    assert request.auth_token is None


@pytest.mark.parametrize("query", ["", "topics=a", "vsn=2.0.0"])
def test_request_without_topics_says_what_is_expected(query: str) -> None:
    assert refused(query) == (400, "topics", "expected topic=… in the query, once for each topic")


@pytest.mark.parametrize("topic", ["", "phoenix", "relay", "a%00b", "x" * 256])
def test_topic_that_cannot_be_joined_is_refused(topic: str) -> None:
    status, kind, text = refused(f"topic=a&topic={topic}")
    assert (status, kind) == (400, "topics")
    assert text.startswith("expected topics of 1 to 255 bytes")


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({}, 10),
        ({"topics_per_socket": 3}, 3),
        ({"joins_burst": 4}, 4),
        ({"joins_burst": 4, "joins_per_s": 0}, 10),
    ],
)
def test_more_topics_than_a_stream_may_have_are_refused(limits: dict[str, int], most: int) -> None:
    """A limit that would refuse the last of the joins each time is said at once: it does not pass."""
    query = "&".join(f"topic={number}" for number in range(most))
    assert isinstance(check(scope(query), "same", LimitsConfig(**limits)), StreamRequest)
    assert refused(f"{query}&topic=x", **limits)[2] == f"expected at most {most} topics, got {most + 1}"


def test_topics_whose_positions_would_not_fit_are_refused() -> None:
    query = "&".join(f"topic={number}{'%3A' * 254}" for number in range(10))
    assert "expected topics whose names and positions fit into 4096 bytes" in refused(query)[2]


# Positions.


def test_position_is_taken_from_the_header_or_the_query() -> None:
    assert accepted("topic=a&since=17-1").since == {"a": "17-1"}
    assert accepted("topic=a&since=17-1", ("last-event-id", "17-5")).since == {"a": "17-5"}
    assert accepted("topic=a&since=17-1", ("last-event-id", "")).since == {"a": "17-1"}
    assert accepted("topic=a:1&topic=b&since=a%253A1%3D17-1%26c%3D17-2").since == {"a:1": "17-1"}
    assert accepted("topic=a&topic=b", ("last-event-id", "b=17-1")).since == {"b": "17-1"}


@pytest.mark.parametrize("since", ["nonsense", "1" * (POSITIONS_MAX_BYTES + 1), "%ff", "a=b=c"])
def test_position_that_is_none_never_refuses_a_request(since: str) -> None:
    assert accepted(f"topic=a&since={since}").topics == ("a",)


@pytest.mark.parametrize(
    ("query", "last"),
    [("last=50", 50), ("last=0", 0), ("last=", None), ("last=-5", None), ("last=" + "9" * 5000, None)],
)
def test_newest_events_may_be_asked_for(query: str, last: int | None) -> None:
    assert accepted(f"topic=a&{query}").last == last


# Pages.


def test_page_of_another_origin_is_refused() -> None:
    assert refused("topic=a", ("origin", "https://evil.example"))[:2] == (403, "origin")
    assert refused("", ("origin", "https://evil.example"))[:2] == (403, "origin"), "before anything else is said"


@pytest.mark.parametrize("origins", ["same", "any", ("https://relay.example.org",)])
@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_request_without_origin_from_another_site_is_refused(site: str, origins: Any) -> None:
    """Such as that of an image: `EventSource` of another origin sends Origin."""
    status, kind, text = refused("topic=a", ("sec-fetch-site", site), origins=origins)
    assert (status, kind) == (403, "origin")
    assert text == f"expected Sec-Fetch-Site same-origin or none in a request without Origin, got {site!r}"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("sec-fetch-site", "same-origin")],
        [("sec-fetch-site", "none")],
        [("origin", "http://relay.example.org"), ("sec-fetch-site", "same-origin")],
    ],
)
def test_page_of_the_same_origin_may_connect(headers: list[tuple[str, str]]) -> None:
    """`EventSource` sends no Origin there."""
    assert accepted("topic=a", *headers).topics == ("a",)


def test_allowed_page_of_another_site_may_connect() -> None:
    asked = scope("topic=a", ("origin", "https://shop.example"), ("sec-fetch-site", "cross-site"))
    assert isinstance(check(asked, ("https://shop.example",), LimitsConfig()), StreamRequest)


# Answers.


def headers_of(asked: dict[str, Any]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in stream_headers(asked)}


def test_stream_may_be_read_by_its_page_alone_and_is_kept_nowhere() -> None:
    assert headers_of(scope()) == {
        "cache-control": "no-store",
        "content-type": "text/event-stream; charset=utf-8",
        "referrer-policy": "no-referrer",
        "vary": "Origin",
        "x-accel-buffering": "no",
        "x-content-type-options": "nosniff",
    }
    cors = headers_of(scope("topic=a", ("origin", "https://shop.example")))
    assert cors["access-control-allow-origin"] == "https://shop.example", "never *, since cookies count"
    assert (cors["access-control-allow-credentials"], cors["vary"]) == ("true", "Origin")


async def answered(asked: dict[str, Any], rejected: HandshakeRejected, **options: bool) -> Connection:
    connection = Connection(kind="http")
    await answer(asked, rejected, **options)(asked, connection.receive, connection.send)
    return connection


@pytest.mark.parametrize("status", [429, 503])
async def test_reason_that_passes_is_a_stream_that_ends(status: int) -> None:
    shop = ("origin", "https://shop.example")
    connection = await answered(scope("topic=a", shop), HandshakeRejected(status, "no room", "x", 10))
    assert (connection.status, connection.is_complete) == (200, True)
    assert [(event.event, event.data) for event in connection.events] == [("relay:error", '{"reason":"no room"}')]
    assert connection.header("content-type") == "text/event-stream; charset=utf-8"
    assert connection.header("access-control-allow-origin") == shop[1], "else the browser would not come back"
    assert connection.header("cache-control") == "no-store"


@pytest.mark.parametrize("status", [400, 401, 403, 404])
async def test_reason_that_stays_is_a_status(status: int) -> None:
    connection = await answered(scope(), HandshakeRejected(status, "no", "x"))
    assert (connection.status, connection.body) == (status, "no\n")
    assert connection.header("www-authenticate") == ("Bearer" if status == 401 else None)
    assert connection.header("cache-control") == "no-store"


async def test_page_that_may_not_connect_may_not_read_why() -> None:
    asked = scope("topic=a", ("origin", "https://evil.example"))
    connection = await answered(asked, HandshakeRejected(403, "no", "origin"), may_read=False)
    assert connection.header("access-control-allow-origin") is None
    assert connection.header("vary") == "Origin"


async def test_other_methods_are_refused() -> None:
    asked = scope(method="POST")
    connection = await answered(asked, wrong_method(asked))
    assert (connection.status, connection.header("allow")) == (405, "GET, OPTIONS")
    assert connection.body == "expected GET for a stream of server-sent events, got POST\n"


@pytest.mark.parametrize("may_read", [True, False])
async def test_browsers_ask_first_whether_a_token_may_be_sent(may_read: bool) -> None:
    asked = scope("topic=a", ("origin", "https://shop.example"), method="OPTIONS")
    connection = Connection(kind="http")
    await answer_options(asked, may_read=may_read)(asked, connection.receive, connection.send)
    assert (connection.status, connection.body, connection.header("allow")) == (204, "", "GET, OPTIONS")
    assert connection.header("access-control-allow-origin") == ("https://shop.example" if may_read else None)
    allowed = connection.header("access-control-allow-headers")
    assert allowed == ("authorization, cache-control, last-event-id" if may_read else None)


def test_clients_come_back_at_different_times() -> None:
    first, last = set(), set()
    for _ in range(100):
        parser = Parser()
        parser.feed(first_lines(b"17-1"))
        assert parser.last_id == "17-1"
        first.add(parser.retry_ms or 0)
        parser.feed(last_lines(b""))
        last.add(parser.retry_ms or 0)
    assert 1000 <= min(first) < 1500 and 2500 < max(first) <= 3000
    assert 1000 <= min(last) < 2000 and 4000 < max(last) <= 5000
    assert Parser().feed(first_lines(b"")) == []
