"""`relay.web.tangram`: who gets a token, from where, for what; and how a page is answered."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx2 as httpx
import jwt
import pytest

from relay import Relay
from relay.rate_limit import AddressBuckets
from tests.support.keys import SECRET

TOPICS = [{"match": "system", "rights": ["join", "push"]}, {"match": "streaming-*", "rights": ["join"]}]
PAGE = "http://localhost:2346"


@asynccontextmanager
async def served(auth: dict[str, Any] | None = None, **settings: Any) -> AsyncIterator[tuple[Relay, httpx.AsyncClient]]:
    """A relay that gives tokens to pages, and a client on this machine."""
    settings = {"broadcast_url": "memory://", "system_topic": False, "allowed_origins": [PAGE], **settings}
    relay = Relay(auth={"keys": [SECRET], "tangram": "open", "tangram_topics": TOPICS, **(auth or {})}, **settings)
    transport = httpx.ASGITransport(relay, client=("127.0.0.1", 50_000))
    async with relay.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield relay, client


async def ask(client: httpx.AsyncClient, channel: str = "system", **options: Any) -> httpx.Response:
    body = {"channel": channel, **options.pop("body", {})}
    return await client.post(options.pop("path", "/token"), json=body, **options)


async def test_page_gets_a_token_under_an_id_that_is_not_its_choice() -> None:
    async with served() as (relay, client):
        answer = await ask(client, body={"id": "victim"}, headers={"origin": PAGE})
        made = answer.json()
        claims = jwt.decode(made["token"], SECRET, ["HS256"])
        assert (answer.status_code, made["channel"], len(made["id"])) == (200, "system", 32)
        assert (claims["id"], claims["channel"], claims["open"]) == (made["id"], "system", True)
        assert (await ask(client)).json()["id"] != made["id"]
        assert relay.metrics.refused == {}


async def test_topic_that_no_pattern_permits_gets_no_token() -> None:
    topics = [*TOPICS, {"match": "*", "rights": ["push"]}, {"match": "a*", "rights": ["join"]}]
    async with served({"tangram_topics": topics}) as (relay, client):
        for channel in ("room:1", "admin", "system*"):
            answer = await ask(client, channel, headers={"origin": PAGE})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (403, PAGE)
            assert f"no token for channel {channel!r}" in answer.json()["detail"]
        assert (await ask(client, "streaming-*")).status_code == 200, "a topic of this very name"
        assert relay.metrics.refused == {"token: topic": 3}


async def test_api_key_opens_any_topic_under_any_id_and_a_wrong_one_none() -> None:
    async with served(rest={"api_key": "the-operators-key"}) as (relay, client):
        made = (await ask(client, "room:1", body={"id": "me"}, headers={"x-api-key": "the-operators-key"})).json()
        claims = jwt.decode(made["token"], SECRET, ["HS256"])
        assert (claims["id"], claims["channel"], "open" in claims) == ("me", "room:1", False)
        assert (await ask(client, headers={"x-api-key": "wrong"})).status_code == 401
        assert relay.metrics.refused == {"rest: wrong key": 1}


async def test_pages_of_other_origins_get_neither_an_answer_nor_a_token() -> None:
    async with served() as (relay, client):
        for method in ("POST", "OPTIONS"):
            answer = await client.request(method, "/token", headers={"origin": "https://evil.example"})
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        assert relay.metrics.refused == {"token: origin": 2}
        question = {"origin": PAGE, "access-control-request-method": "POST"}
        answer = await client.options("/token", headers={**question, "access-control-request-headers": "content-type"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, PAGE)
        assert answer.headers["access-control-allow-methods"] == "POST"
        assert "Content-Type" in answer.headers["access-control-allow-headers"]
        assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize(("origins", "origin"), [("any", "https://x.example"), ("same", "http://localhost")])
async def test_origins_are_those_that_may_connect(origins: str, origin: str) -> None:
    async with served(allowed_origins=origins) as (_, client):
        answer = await ask(client, headers={"origin": origin})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)


async def test_token_stands_beside_each_socket_path() -> None:
    async with served(socket_paths=["/", "/live"]) as (_, client):
        for path in ("/token", "/live/token", "//live//token/"):
            assert (await ask(client, path=path)).status_code == 200, path
        assert (await ask(client, path="/socket/token")).status_code == 404
        assert (await client.get("/websocket")).status_code == 426
        assert (await client.get("/sse")).status_code == 400, "a stream, which names no topic"
        assert (await client.get("/health")).status_code == 200
        assert 'name="relay-socket" content="."' in (await client.get("/")).text


@pytest.mark.parametrize("tangram", ["open", True])
async def test_body_is_read_no_further_than_two_names_take(tangram: Any) -> None:
    read = 0

    async def body() -> AsyncGenerator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield b"x" * 1000
            await asyncio.sleep(0)

    key = {"x-api-key": "the-operators-key"}
    topics = TOPICS if tangram == "open" else []
    async with served({"tangram": tangram, "tangram_topics": topics}, rest={"api_key": key["x-api-key"]}) as (
        _,
        client,
    ):
        async with aclosing(body()) as pieces:
            answer = await client.post("/token", content=pieces, headers=key)
        assert (answer.status_code, answer.json()["detail"]) == (413, "body: expected at most 4096 bytes")
        for content in (b"", b"[]", b'{"channel": ""}', b'{"channel": 1}', b'{"channel": "\xff"}'):
            assert (await client.post("/token", content=content, headers=key)).status_code == 422


async def test_tokens_are_rated_by_address() -> None:
    async with served(limits={"tokens_per_s": 1}) as (relay, client):
        statuses = [(await ask(client)).status_code for _ in range(11)]
        assert statuses == [200] * 10 + [429]
        answer = await ask(client, headers={"origin": PAGE})
        assert (answer.headers["retry-after"], answer.headers["access-control-allow-origin"]) == ("1", PAGE)
        other = httpx.ASGITransport(relay, client=("192.0.2.7", 50_000))
        async with httpx.AsyncClient(transport=other, base_url="http://localhost") as stranger:
            assert (await ask(stranger)).status_code == 200
        assert relay.metrics.refused == {"token: rate": 2}
    async with served(limits={"tokens_per_s": 0}) as (_, client):
        assert {(await ask(client)).status_code for _ in range(120)} == {200}


def test_address_is_forgotten_once_it_has_all_its_tokens_again() -> None:
    buckets = AddressBuckets(2, 20, now=0)
    assert [buckets.take("a", 0) for _ in range(21)] == [True] * 20 + [False]
    assert buckets.take("b", 10)
    assert len(buckets) == 2
    assert buckets.take("b", 20)
    assert len(buckets) == 1
    assert [buckets.take("a", 21) for _ in range(21)] == [True] * 20 + [False]


async def test_without_open_nothing_is_given_without_the_key() -> None:
    async with served({"tangram": True, "tangram_topics": []}) as (_, client):
        assert (await ask(client, headers={"origin": PAGE})).status_code == 403
        assert (await client.options("/token", headers={"origin": PAGE})).status_code == 405
