"""Long polling where requests of one session reach several processes, without sticky sessions."""

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from relay.channels.long_poll import SessionId
from relay.channels.long_poll_nodes import NodeSessions
from tests.support.faults import Proxy
from tests.support.long_poll import Poller
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import Served, eventually

SECRET = "the secret that all nodes have in common"
ROOM = "room:1"

Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
def direct() -> bool:
    """Once is enough: long polling has one way to write."""
    return True


class Pair:
    """Two nodes, and a client whose session is at the first, and whose requests go to both in turn."""

    def __init__(self, first: Served, second: Served, poller: Poller) -> None:
        self.first = first
        self.second = second
        self.poller = poller

    @property
    def transport(self) -> Any:
        (found,) = self.first.relay.node.sockets.values()
        return found.transport

    def turn_to_second(self) -> None:
        """Have the next request go to the second."""
        if self.poller.path.startswith(self.first.http):
            self.poller.paths.reverse()

    @property
    def others(self) -> NodeSessions:
        found = self.second.relay.node.long_poll.others
        assert isinstance(found, NodeSessions)
        return found


@pytest.fixture
def pair(runner: asyncio.Runner, serve_relay: Serve) -> Iterator[Callable[..., Awaitable[Pair]]]:
    stack = AsyncExitStack()

    async def pair(**settings: Any) -> Pair:
        auth = {"secret": SECRET, **settings.pop("auth", {})}
        first = await serve_relay(auth=auth, **settings)
        second = await serve_relay(auth=auth, **settings)
        poller = await stack.enter_async_context(Poller.connect(first.ws, second.ws))
        assert len(first.relay.node.sockets) == 1, "the session is at the first"
        return Pair(first, second, poller)

    yield pair
    runner.run(stack.aclose())


async def test_each_request_may_reach_any_node(pair: Any, redis: Redis) -> None:
    nodes: Pair = await pair()
    poller = nodes.poller
    join_ref = await poller.join(ROOM)
    for number in range(100):
        await redis.publish(f"to:{ROOM}:e", f'{{"n":{number}}}')
        assert (await poller.receive())[4] == {"n": number}
    for number in range(10):
        assert (await poller.push(join_ref, ROOM, "hello", {"n": number}))["status"] == "ok"
    assert nodes.second.relay.metrics.sockets == 0
    for served in (nodes.first, nodes.second):
        assert not served.relay.metrics.refused and not served.relay.metrics.dropped


async def test_large_posts_and_answers_pass(pair: Any) -> None:
    nodes: Pair = await pair(limits={"outbox_max_bytes": 10_000_000})
    poller = nodes.poller
    join_ref = await poller.join(ROOM)
    text = "x" * 900_000
    nodes.turn_to_second()
    assert (await poller.push(join_ref, ROOM, "large", {"text": text}))["status"] == "ok"
    for _ in range(3):
        await nodes.first.relay.publish(ROOM, "large", {"text": text})
    nodes.turn_to_second()
    for _ in range(3):
        await poller.expect_event(ROOM, "large", {"text": text})


async def test_many_clients_at_once(pair: Any) -> None:
    """More than may have posts with another node at once; none is refused."""
    nodes: Pair = await pair()
    query = {"vsn": "2.0.0"}
    pollers = [Poller(nodes.poller.http, list(nodes.poller.paths), query) for _ in range(100)]
    for poller in pollers:
        assert (await poller.open())["status"] == 410
    await asyncio.gather(*(poller.join(ROOM) for poller in pollers))
    polls = [asyncio.create_task(poller.receive()) for poller in pollers]
    await eventually(lambda: sum(bool(each.transport._polling) for each in joined(nodes)) == 100, "the polls to wait")
    await nodes.second.relay.publish(ROOM, "e", {})
    assert await asyncio.gather(*polls) == [[None, None, ROOM, "e", {}]] * 100


def joined(nodes: Pair) -> list[Any]:
    sockets = (*nodes.first.relay.node.sockets.values(), *nodes.second.relay.node.sockets.values())
    return [socket for socket in sockets if socket.topics]


async def test_client_that_goes_in_mid_poll_at_another_node_takes_nothing(pair: Any) -> None:
    nodes: Pair = await pair()
    poller = nodes.poller
    await poller.join(ROOM)
    nodes.turn_to_second()
    parts = urlsplit(poller.path)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as connection:
        connection.sendall(
            f"GET {parts.path}?vsn=2.0.0&token={poller.token} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
        )
        await eventually(lambda: nodes.transport._polls, "the poll to wait")
    await eventually(lambda: not nodes.transport._polls, "the poll to end")
    await nodes.first.relay.publish(ROOM, "e", {})
    await poller.expect_event(ROOM, "e", {})


async def test_answer_for_a_client_that_has_gone_comes_in_the_next(pair: Any, monkeypatch: Any) -> None:
    """It was on its way to the other node when the client went."""
    nodes: Pair = await pair()
    poller = nodes.poller
    await poller.join(ROOM)
    others = nodes.others
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    session = SessionId(nodes.first.relay.node.name, poller.socket_id)
    poll = asyncio.create_task(others.poll(session, gone))
    await eventually(lambda: nodes.transport._polls, "the poll to wait")
    await nodes.first.relay.publish(ROOM, "e", {"n": 1})
    polled = await poll
    assert polled is not None and polled.answer.status == 200
    await nodes.first.relay.publish(ROOM, "e", {"n": 2})
    next_poll = asyncio.create_task(poller.receive())
    await asyncio.sleep(0.1)
    assert not next_poll.done(), "it waits until it is known what became of the first"
    polled.end(False)
    assert (await next_poll)[4] == {"n": 1}
    await poller.expect_event(ROOM, "e", {"n": 2})


async def test_session_ends_where_it_is_not_known_whether_an_answer_was_sent(pair: Any, monkeypatch: Any) -> None:
    nodes: Pair = await pair(redis={"timeout_s": 0.5 * PATIENCE})
    poller = nodes.poller
    await poller.join(ROOM)
    monkeypatch.setattr(NodeSessions, "_end_poll", lambda *args: None)  # the node is killed then
    await nodes.first.relay.publish(ROOM, "e", {})
    nodes.turn_to_second()
    assert (await poller.poll())["status"] == 200
    await poller.expect_gone()
    assert nodes.first.relay.metrics.refused["longpoll: answer lost"] == 1


async def test_session_of_a_node_that_has_ended_is_gone_at_once(valkey: Valkey) -> None:
    """Nobody receives what is published for it."""
    arguments = ("--redis-url", valkey.url)
    environ = {"RELAY_AUTH__SECRET": SECRET}
    with RelayProcess(*arguments, environ=environ) as other:
        with RelayProcess(*arguments, environ=environ) as owner:
            async with Poller.connect(f"{owner.http}/socket", f"{other.http}/socket") as poller:
                await poller.join("room:killed")
                assert owner.process is not None
                owner.process.kill()
                owner.process.wait()
                poller.paths = [path for path in poller.paths if path.startswith(other.http)]
                async with asyncio.timeout(5 * PATIENCE):
                    await poller.expect_gone()


async def test_interrupted_bus_ends_what_waits_for_another_node(pair: Any) -> None:
    """The poll would end by itself, with another status, once its window is over."""
    with Valkey() as server:
        limits = {"longpoll_window_s": 10 * PATIENCE}
        nodes: Pair = await pair(redis_url=server.url, redis={"backoff_max_s": 0.1}, limits=limits)
        await nodes.poller.join(ROOM)
        nodes.turn_to_second()
        poll = asyncio.create_task(nodes.poller.poll())
        await eventually(lambda: nodes.transport._polls, "the poll to wait")
        server.kill()
        await eventually(lambda: not nodes.second.relay.link.live, "the link to be lost")
        server.start()
        async with asyncio.timeout(8 * PATIENCE):
            assert (await poll)["status"] == 500


async def test_node_with_another_secret_reads_no_token(pair: Any, serve_relay: Serve, caplog: Any) -> None:
    nodes: Pair = await pair()
    stranger = await serve_relay(auth={"secret": "another secret that is as long as the first"})
    nodes.poller.paths = [stranger.ws.replace("ws:", "http:") + "/longpoll"]
    await nodes.poller.expect_gone()
    assert stranger.relay.metrics.refused == {"longpoll: token": 2}
    assert "of a relay with another auth.secret" in caplog.text


async def test_without_a_secret_the_setting_is_named(serve_relay: Serve, caplog: Any) -> None:
    first, second = await serve_relay(), await serve_relay()
    async with Poller.connect(first.ws, second.ws) as poller:
        await poller.expect_gone()
    assert "set auth.secret to the same value in all of them" in caplog.text


async def test_messages_between_nodes_are_sealed(pair: Any, redis: Redis) -> None:
    nodes: Pair = await pair()
    heard: list[bytes] = []
    async with redis.pubsub() as subscription:
        await subscription.psubscribe("relay:node:*")
        nodes.turn_to_second()
        await nodes.poller.send("1", "1", ROOM, "phx_join", {"token": "a-secret-of-the-client"})
        while len(heard) < 2:
            message = await subscription.get_message(timeout=20)
            assert message is not None
            if message["type"] == "pmessage":
                heard.append(message["data"])
    assert b"secret-of-the-client" not in b"".join(heard) and b"phx_join" not in b"".join(heard)


async def test_message_that_is_not_sealed_harms_nobody(pair: Any, redis: Redis, caplog: Any) -> None:
    nodes: Pair = await pair()
    await nodes.poller.join(ROOM)
    node = nodes.first.relay.node
    for data in (b"", b"nonsense", b"x" * 1000):
        assert await redis.publish(f"relay:node:{node.name}", data) == 1
    await eventually(lambda: node.connections.metrics.refused["longpoll: message not understood"] == 3, "the messages")
    assert "not sealed with this auth.secret" in caplog.text
    await nodes.first.relay.publish(ROOM, "e", {})
    await nodes.poller.expect_event(ROOM, "e", {})


def limited(server: Valkey, *rules: str) -> str:
    """The address of a server, as a user with these rights."""
    with SyncRedis(port=server.port) as admin:
        assert admin.execute_command("ACL", "SETUSER", "limited", "on", ">pass", *rules)
    return server.url.replace("redis://", "redis://limited:pass@")


@pytest.mark.parametrize(
    "redis_settings", [{}, {"subscribe": "topic", "publish_form": "topic"}], ids=["pattern", "topic"]
)
async def test_documented_permissions_are_enough(pair: Any, redis_settings: dict[str, str], caplog: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "redis.md").read_text("utf-8")
    rules, topic_rules = re.findall(r"^ACL SETUSER relay on >secret (.*)$", page, re.MULTILINE)
    with Valkey() as server:
        url = limited(server, *(topic_rules if redis_settings else rules).split())
        nodes: Pair = await pair(redis_url=url, redis=redis_settings)
        join_ref = await nodes.poller.join(ROOM)
        for number in range(4):
            await nodes.second.relay.publish(ROOM, "e", {"n": number})
            assert (await nodes.poller.receive())[4] == {"n": number}
            assert (await nodes.poller.push(join_ref, ROOM, "hello", {}))["status"] == "ok"
        assert "no permission for" not in caplog.text


@pytest.mark.parametrize(
    ("rule", "said"), [("&relay:node:*", "&relay:node:*"), ("+subscribe", "+subscribe &relay:node:*")]
)
async def test_user_without_a_permission_of_the_node_hears_events_all_the_same(
    serve_relay: Serve, caplog: Any, rule: str, said: str
) -> None:
    with Valkey() as server:
        rules = (
            "resetchannels &to:* &from:* &relay:control &relay:node:* -@all +psubscribe +subscribe +publish +ping +role"
        )
        url = limited(server, *(each for each in rules.split() if each != rule))
        served = await serve_relay(redis_url=url, auth={"secret": SECRET})
        assert served.relay.link.live
        assert f"allow it with {said}\n" in caplog.text
        async with Poller.connect(served.ws) as poller:
            await poller.join(ROOM)
            await served.relay.publish(ROOM, "e", {})
            await poller.expect_event(ROOM, "e", {})


# As processes.


async def converse(poller: Poller, redis: Redis, topic: str, rounds: int = 30) -> None:
    """Join, push, and hear events, each once and in order."""
    join_ref = await poller.join(topic)
    for number in range(rounds):
        await redis.publish(f"to:{topic}:e", json.dumps({"n": number}))
        assert (await poller.receive())[4] == {"n": number}
        assert (await poller.push(join_ref, topic, "hello", {}))["status"] == "ok"


async def test_workers_answer_for_each_other(valkey: Valkey, redis: Redis) -> None:
    """Their parent makes the secret."""
    with RelayProcess("--redis-url", valkey.url, "--workers", "2") as relay:
        for number in range(3):
            async with Poller.connect(f"{relay.http}/socket") as poller:
                await converse(poller, redis, f"room:workers:{number}", 20)
        assert "auth.secret" not in relay.output


async def test_two_nodes_behind_a_balancer(valkey: Valkey, redis: Redis) -> None:
    environ = {"RELAY_AUTH__SECRET": SECRET}
    arguments = ("--redis-url", valkey.url)
    with RelayProcess(*arguments, environ=environ) as one, RelayProcess(*arguments, environ=environ) as two:
        ports = [int(relay.http.rpartition(":")[2]) for relay in (one, two)]
        async with (
            Proxy.open(*ports) as proxy,
            Poller.connect(f"http://127.0.0.1:{proxy.port}/socket") as poller,
        ):
            await converse(poller, redis, "room:balanced")
