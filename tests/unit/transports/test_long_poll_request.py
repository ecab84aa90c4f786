"""`relay.transports.long_poll_request`: what requests say, how they are answered, and the bound of their bodies."""

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.responses import Response

from relay.config_sections import LimitsConfig
from relay.protocol.serializer import Version
from relay.transports.handshake import HandshakeRejected
from relay.transports.long_poll import PollRequest
from relay.transports.long_poll_request import (
    Bodies,
    BodyRefused,
    answer,
    answer_options,
    check,
    is_ndjson,
    refuse,
    session_token,
    wait_until_gone,
    wrong_method,
)
from tests.support.asgi import Connection

ORIGIN = ("origin", "https://shop.example")


def scope(query: str = "vsn=2.0.0", *headers: tuple[str, str], method: str = "GET") -> dict[str, Any]:
    pairs: Iterable[tuple[str, str]] = [("host", "relay.example.org"), *headers]
    return Connection("/socket/longpoll", query, pairs, kind="http", method=method).scope


def content(response: Response) -> Any:
    return json.loads(bytes(response.body))


# What requests say.


@pytest.mark.parametrize(
    ("query", "version"), [("vsn=2.0.0", Version.V2), ("vsn=1.0.0&", Version.V1), ("", Version.V1)]
)
def test_version_is_that_of_the_socket(query: str, version: Version) -> None:
    assert check(scope(query)) == PollRequest(version, None)


def test_unknown_version_is_refused() -> None:
    found = check(scope("vsn=3.0.0"))
    assert isinstance(found, HandshakeRejected) and (found.status, found.kind) == (403, "version")


def test_users_token_is_in_a_header() -> None:
    """The `authToken` of phoenix.js 1.8."""
    assert check(scope("vsn=2.0.0", ("x-phoenix-authtoken", "a.b.c"))) == PollRequest(Version.V2, "a.b.c")


@pytest.mark.parametrize(
    ("query", "headers", "token"),
    [
        ("vsn=2.0.0&", (), None),
        ("token=eyJ.users.own&vsn=2.0.0&", (), None),
        ("vsn=2.0.0&token=lp-a.b.c", (), "lp-a.b.c"),
        ("token=eyJ.users.own&vsn=2.0.0&token=lp-a.b.c", (), "lp-a.b.c"),
        ("vsn=2.0.0", (("x-phoenix-longpoll-token", "lp-a.b.c"),), "lp-a.b.c"),
    ],
)
def test_sessions_token_is_told_from_a_users(
    query: str, headers: tuple[tuple[str, str], ...], token: str | None
) -> None:
    assert session_token(scope(query, *headers)) == token


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("application/x-ndjson", True),
        ("Application/X-NDJSON; charset=utf-8", True),
        ("application/json", False),
        ("", False),
    ],
)
def test_content_type_says_whether_each_line_is_a_frame(kind: str, expected: bool) -> None:
    assert is_ndjson(scope("", *([("content-type", kind)] if kind else []))) is expected


# Answers.


def test_answer_to_a_poll() -> None:
    found = answer(scope("", ORIGIN), 200, token="lp-a.b.c", messages=b'["[1]"]')
    assert (found.status_code, found.media_type) == (200, "application/json")
    assert content(found) == {"status": 200, "token": "lp-a.b.c", "messages": ["[1]"]}
    assert found.headers["cache-control"] == "no-store"
    assert found.headers["access-control-allow-origin"] == ORIGIN[1]
    assert found.headers["vary"] == "Origin"
    assert content(answer(scope(), 204, token="lp-a.b.c")) == {"status": 204, "token": "lp-a.b.c", "messages": []}


def test_answer_to_a_post() -> None:
    assert content(answer(scope(), 200)) == {"status": 200}
    assert content(answer(scope(), 410, reason="gone")) == {"status": 410, "reason": "gone"}


@pytest.mark.parametrize(
    ("status", "http", "shown"),
    [(403, 200, 403), (401, 200, 403), (400, 400, 403), (404, 404, 403), (429, 200, 500), (503, 200, 500)],
)
def test_refusal_has_a_status_that_phoenix_js_knows(status: int, http: int, shown: int) -> None:
    found = refuse(scope("", ORIGIN), HandshakeRejected(status, "why", "kind"), may_read=False)
    assert (found.status_code, content(found)) == (http, {"status": shown, "reason": "why"})
    assert "access-control-allow-origin" not in found.headers


def test_other_methods_are_bad_requests() -> None:
    assert wrong_method(scope(method="PUT")).status == 400


def test_options_allow_the_headers_that_are_asked_for() -> None:
    asks = scope("", ORIGIN, ("access-control-request-headers", "x-phoenix-authtoken, content-type"), method="OPTIONS")
    found = answer_options(asks, may_read=True)
    assert found.status_code == 204
    assert found.headers["access-control-allow-headers"] == "x-phoenix-authtoken, content-type"
    assert found.headers["access-control-allow-methods"] == "get, post, options"
    assert found.headers["access-control-max-age"] == "3600"
    assert found.headers["access-control-allow-origin"] == ORIGIN[1]
    closed = answer_options(asks, may_read=False)
    assert not [name for name in closed.headers if name.startswith("access-control")]


async def test_client_has_gone_when_the_server_says_so() -> None:
    connection = Connection(kind="http")
    waiting = asyncio.create_task(wait_until_gone(connection.receive))
    await asyncio.sleep(0)
    assert not waiting.done()
    connection.disconnect()
    await waiting


async def test_client_has_gone_when_receiving_fails() -> None:
    async def receive() -> dict[str, Any]:
        raise OSError("gone")

    await wait_until_gone(receive)


# Bodies.

LIMITS = LimitsConfig(body_max_bytes=100, in_flight_total_max_bytes=250)


class Posts:
    """Bodies under way."""

    def __init__(self) -> None:
        self.bodies = Bodies(LIMITS)

    def begin(self, session: str, size: int = 0, *, ends: bool = False) -> tuple[Connection, asyncio.Task[bytes]]:
        connection = Connection(kind="http", method="POST")
        _ = connection._incoming.get_nowait()
        connection.put("http.request", body=b"x" * size, more_body=not ends)
        read = self.bodies.read(session, connection.scope, connection.receive, 20)
        return connection, asyncio.create_task(read)


async def refusal(task: asyncio.Task[bytes]) -> int:
    with pytest.raises(BodyRefused) as caught:
        await task
    return caught.value.status


async def test_body_is_read_in_parts_and_held_until_it_is_released() -> None:
    posts = Posts()
    connection, task = posts.begin("s", 60)
    connection.put("http.request", body=b"y" * 40, more_body=False)
    assert await task == b"x" * 60 + b"y" * 40
    assert len(posts.bodies) == 1
    posts.bodies.release("s", 100)
    assert len(posts.bodies) == 0


async def test_body_over_the_limit_is_refused() -> None:
    posts = Posts()
    assert await refusal(posts.begin("s", 101, ends=True)[1]) == 413
    large = Connection(kind="http", method="POST", headers=[("content-length", "101")])
    with pytest.raises(BodyRefused, match="at most 100 bytes"):
        await posts.bodies.read("s", large.scope, large.receive, 20)
    assert len(posts.bodies) == 0


async def test_posts_of_one_session_share_a_limit() -> None:
    posts = Posts()
    first, task = posts.begin("s", 60)
    await asyncio.sleep(0)
    assert await refusal(posts.begin("s", 60, ends=True)[1]) == 429
    assert await posts.begin("other", 60, ends=True)[1] == b"x" * 60
    first.put("http.request", body=b"", more_body=False)
    assert await task == b"x" * 60


async def test_past_the_limit_of_all_those_with_much_are_refused() -> None:
    posts = Posts()
    held = [posts.begin(name, 90) for name in "ab"]
    await asyncio.sleep(0)
    assert await posts.begin("little", 20, ends=True)[1] == b"x" * 20
    assert await refusal(posts.begin("c", 90, ends=True)[1]) == 503
    assert await posts.begin("tiny", 59, ends=True)[1] == b"x" * 59, "less than its share passes"
    for connection, task in held:
        connection.disconnect()
        with pytest.raises(ConnectionError):
            await task
    assert len(posts.bodies) == 2


async def test_body_that_does_not_come_is_refused() -> None:
    connection = Connection(kind="http", method="POST")
    _ = connection._incoming.get_nowait()
    bodies = Bodies(LIMITS)
    with pytest.raises(BodyRefused, match=r"within 0\.01 s") as caught:
        await bodies.read("s", connection.scope, connection.receive, 0.01)
    assert (caught.value.status, len(bodies)) == (408, 0)
