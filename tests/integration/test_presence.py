"""Who is here: what clients are told, on one node and on several, with Redis and in memory."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any
from uuid import uuid4

import jwt
import pytest
from redis.asyncio import Redis

from relay import Joined, Leave, Push, Relay
from relay.brokers.base import PRESENCE_CHANNEL
from relay.plugins import Plugin
from tests.support.client import Client
from tests.support.patience import PATIENCE
from tests.support.process import Valkey
from tests.support.serving import Served, eventually, serve

Connect = Callable[..., Any]
ServeRelay = Callable[..., Coroutine[Any, Any, Served]]

QUICK = {"lease_s": 1.5, "renew_s": 0.5, "leave_delay_s": 0.2}
PRESENCE: dict[str, Any] = {"topics": [{"match": "room:*", "presence": True}], "presence": QUICK}


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


@pytest.fixture
def topic() -> str:
    return f"room:{uuid4().hex}"


class Person:
    """A client that keeps the presence of a topic as phoenix.js does: state, then differences."""

    def __init__(self, client: Client, topic: str) -> None:
        self.client = client
        self.topic = topic
        self.state: dict[str, dict[str, Any]] | None = None
        self.joined: list[str] = []
        """Keys that came after the first state, as `onJoin` tells it, and keys that went."""
        self.left: list[str] = []
        self.count: int | None = None
        self._task = asyncio.create_task(self._read())

    async def join(self, **params: Any) -> None:
        ref = self.client.next_ref()
        await self.client.send(ref, ref, self.topic, "phx_join", params)

    async def _read(self) -> None:
        while True:
            _, _, topic, event, payload = await self.client.receive()
            if topic != self.topic:
                continue
            if event == "presence_state":
                self.state = {key: {meta["phx_ref"]: meta for meta in entry["metas"]} for key, entry in payload.items()}
            elif event == "presence_diff":
                self._apply(payload)
            elif event == "presence_count":
                self.count = payload["count"]

    def _apply(self, diff: dict[str, Any]) -> None:
        assert self.state is not None, "a difference before the state"
        for key, entry in diff["joins"].items():
            if key not in self.state:
                self.joined.append(key)
            metas = self.state.setdefault(key, {})
            for meta in entry["metas"]:
                assert meta["phx_ref"] not in metas, "listed twice"
                metas[meta["phx_ref"]] = meta
        for key, entry in diff["leaves"].items():
            for meta in entry["metas"]:
                del self.state[key][meta["phx_ref"]]
            if not self.state[key]:
                del self.state[key]
                self.left.append(key)

    @property
    def keys(self) -> set[str]:
        return set() if self.state is None else set(self.state)

    async def expect(self, *keys: str) -> None:
        await eventually(lambda: self.keys == set(keys), f"{keys}, not {self.keys}")

    async def leave(self) -> None:
        self._task.cancel()
        _ = await asyncio.gather(self._task, return_exceptions=True)
        await self.client.connection.close()


@pytest.fixture
def enter(runner: asyncio.Runner, connect: Connect) -> Any:
    """``await enter(served, topic, presence={…})``: somebody joins."""
    people: list[Person] = []

    async def enter(served: Served, topic: str, **params: Any) -> Person:
        person = Person(await connect(served), topic)
        people.append(person)
        await person.join(**params)
        return person

    yield enter

    async def end() -> None:
        for person in people:
            await person.leave()

    runner.run(end())


def settings(bus: str, valkey: Valkey) -> dict[str, Any]:
    return PRESENCE | ({"redis_url": valkey.url} if bus == "redis" else {"broadcast_url": "memory://"})


@pytest.mark.parametrize("bus", ["redis", "memory"])
async def test_members_are_told_of_each_other(
    serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey, bus: str
) -> None:
    served = await serve_relay(**settings(bus, valkey))
    one = await enter(served, topic, presence={"name": "One"})
    await eventually(lambda: one.state is not None, "the state")
    (own,) = one.keys
    (meta,) = one.state[own].values()
    assert meta["meta"] == {"name": "One"}
    assert set(meta) == {"meta", "phx_ref"}, "an anonymous member has no user"
    two = await enter(served, topic)
    await eventually(lambda: len(one.keys) == 2 and one.keys == two.keys, "both")
    assert len(one.joined) == 1
    assert two.joined == []
    await two.leave()
    await eventually(lambda: len(one.keys) == 1, "the leave")
    assert len(one.left) == 1
    assert served.relay.metrics.presence_members == 1


async def test_members_of_all_nodes_are_told(serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey) -> None:
    first = await serve_relay(**settings("redis", valkey))
    second = await serve_relay(**settings("redis", valkey))
    one = await enter(first, topic)
    two = await enter(second, topic)
    three = await enter(second, topic)
    await eventually(lambda: len(one.keys) == 3 and one.keys == two.keys == three.keys, "all three")
    await three.leave()
    await eventually(lambda: len(one.keys) == 2 and one.keys == two.keys, "the leave")
    async with Redis(port=valkey.port) as redis:
        node = node_of(second)
        assert await redis.hlen(f"presence:{topic}|{node}") == 1
        await two.leave()
        await eventually(lambda: len(one.keys) == 1, "the leave")
        assert not await redis.exists(f"presence:{topic}|{node}", f"presence:|{node}")


@pytest.mark.parametrize("meta", [[], "text", 1, None, {"a": "x" * 2000}])
async def test_invalid_presence_refuses_the_join(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey, meta: Any
) -> None:
    served = await serve_relay(**settings("redis", valkey))
    client = await connect(served)
    ref = client.next_ref()
    await client.send(ref, ref, topic, "phx_join", {"presence": meta})
    assert await client.receive() == client.refusal(ref, ref, topic, "invalid presence")
    await client.join("other:1", {"presence": meta})


async def test_refs_in_a_meta_are_the_relays_own(
    serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey
) -> None:
    served = await serve_relay(**settings("redis", valkey))
    one = await enter(served, topic, presence={"phx_ref": "mine", "phx_ref_prev": "x", "a": 1})
    await eventually(lambda: one.state is not None, "the state")
    ((meta,),) = (metas.values() for metas in one.state.values())
    assert meta["meta"] == {"a": 1}
    assert meta["phx_ref"] != "mine"


async def test_push_of_a_presence_event_is_refused(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    served = await serve_relay(**settings("redis", valkey))
    client = await connect(served)
    await client.send("1", "1", topic, "phx_join", {})
    assert [(await client.receive())[3] for _ in range(2)] == ["phx_reply", "presence_state"]
    await client.send("1", "2", topic, "presence_diff", {"joins": {}, "leaves": {}})
    assert await client.receive() == client.refusal("1", "2", topic, "invalid event")


async def test_rejoin_within_the_delay_does_not_flicker(
    serve_relay: ServeRelay, enter: Any, connect: Connect, topic: str, valkey: Valkey
) -> None:
    """The same socket joins again: one difference has the leave and the join, and the key is never gone."""
    served = await serve_relay(**settings("redis", valkey) | {"presence": QUICK | {"leave_delay_s": 5.0}})
    bystander = await enter(served, topic)
    one = await enter(served, topic)
    await eventually(lambda: len(bystander.keys) == 2, "both")
    (key,) = bystander.joined
    assert bystander.state is not None
    (before,) = bystander.state[key]
    await one.join(presence={"again": True})
    await eventually(lambda: before not in bystander.state[key], "the new member")
    assert len(bystander.state[key]) == 1
    assert bystander.left == []
    await one.client.send(None, "99", topic, "phx_leave", {})
    await one.join()
    await eventually(lambda: one.client and bystander.joined == [key], "nothing new")
    assert bystander.left == []


async def test_only_the_number_is_told(serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey) -> None:
    shared = settings("redis", valkey) | {"topics": [{"match": "room:*", "presence": "count"}]}
    first, second = await serve_relay(**shared), await serve_relay(**shared)
    people = [await enter(served, topic) for served in (first, second, second)]
    await eventually(lambda: all(person.count == 3 for person in people), "the number")
    await people.pop().leave()
    await eventually(lambda: all(person.count == 2 for person in people), "the number")
    assert all(person.state is None for person in people)


async def test_too_many_members_are_counted(
    serve_relay: ServeRelay, enter: Any, connect: Connect, topic: str, valkey: Valkey
) -> None:
    shared = settings("redis", valkey) | {"topics": [{"match": "room:*", "presence": True, "presence_max": 10}]}
    served = await serve_relay(**shared)
    people = [await enter(served, topic) for _ in range(10)]
    await eventually(lambda: all(len(person.keys) == 10 for person in people), "all")
    people.append(await enter(served, topic))
    await eventually(lambda: all(person.count == 11 for person in people), "the number")
    assert served.relay.metrics.presence_counted == 1
    other = await connect(served)
    await other.send("1", "1", topic, "phx_join", {})
    assert await other.receive() == other.reply("1", "1", topic, response={"presence": "count"})
    await other.send("1", "2", topic, "phx_leave", {})
    for person in people[:3]:
        await person.leave()
    await eventually(lambda: all(len(person.keys) == 8 for person in people[3:]), "the members again")


async def test_members_with_large_metas_are_counted(
    serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey
) -> None:
    served = await serve_relay(**settings("redis", valkey), limits={"presence_state_max_bytes": 2000})
    people = [await enter(served, topic, presence={"text": "x" * 900}) for _ in range(2)]
    await eventually(lambda: all(len(person.keys) == 2 for person in people), "both")
    people.append(await enter(served, topic, presence={"text": "x" * 900}))
    await eventually(lambda: all(person.count == 3 for person in people), "the number")


@pytest.mark.parametrize("is_lost", [False, True], ids=["ended", "lost"])
async def test_dead_node_is_forgotten(
    serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey, is_lost: bool
) -> None:
    """Its lease ends; a member left in Redis by a node that was killed."""
    served = await serve_relay(**settings("redis", valkey))
    async with Redis(port=valkey.port) as redis:
        seconds, micros = await redis.time()
        now = seconds * 1000 + micros // 1000
        node = uuid4().hex[:12]
        await redis.zadd("presence:nodes", {node: now + 1500 * PATIENCE})
        await redis.zadd("presence:nodes:written", {node: 1})
        await redis.hset(f"presence:{topic}|{node}", "00ff", json.dumps(["ghost", {}, ""]))
        await redis.sadd(f"presence:|{node}", topic)
        presence: Any = served.relay.node.presence
        await eventually(lambda: node in presence._nodes, "the node")
        one = await enter(served, topic)
        await eventually(lambda: "ghost" in one.keys, "the ghost")
        if is_lost:
            await redis.zrem("presence:nodes", node)
        await eventually(lambda: "ghost" not in one.keys, "its end")
        assert served.relay.metrics.presence_ghosts_removed == 1
        await redis.zadd("presence:nodes", {node: now - 100_000})
        async with asyncio.timeout(20):
            while await redis.exists(f"presence:{topic}|{node}", f"presence:|{node}"):  # noqa: ASYNC110 - Redis's
                await asyncio.sleep(0.05)
        for key in ("presence:nodes", "presence:nodes:written"):
            assert await redis.zscore(key, node) is None


async def test_lost_message_is_healed(serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey) -> None:
    first, second = await serve_relay(**settings("redis", valkey)), await serve_relay(**settings("redis", valkey))
    one = await enter(first, topic)
    await eventually(lambda: len(one.keys) == 1, "the state")
    pubsub = first.relay.node.pubsub
    receive = pubsub.receivers[PRESENCE_CHANNEL]
    pubsub.receivers[PRESENCE_CHANNEL] = lambda data: None
    await enter(second, topic)
    async with Redis(port=valkey.port) as redis, asyncio.timeout(20):
        while not await redis.exists(f"presence:{topic}|{node_of(second)}"):  # noqa: ASYNC110 - Redis's
            await asyncio.sleep(0.01)
    pubsub.receivers[PRESENCE_CHANNEL] = receive
    await eventually(lambda: len(one.keys) == 2, "what was missed")


def node_of(served: Served) -> str:
    store = served.relay.node.broker.presence
    assert store is not None
    return store.node


async def test_flushed_redis_is_filled_again(serve_relay: ServeRelay, enter: Any, topic: str) -> None:
    with Valkey() as server:
        one_node, other = await serve_relay(**settings("redis", server)), await serve_relay(**settings("redis", server))
        one, two = await enter(one_node, topic), await enter(other, topic)
        await eventually(lambda: len(one.keys) == 2 and len(two.keys) == 2, "both")
        async with Redis(port=server.port) as redis:
            await redis.flushall()
        await eventually(lambda: other.relay.metrics.presence_leases_lost == 1, "the loss")
        three = await enter(other, topic)
        await eventually(lambda: len(one.keys) == len(two.keys) == len(three.keys) == 3, "all three")
        assert one.left == two.left == []


async def test_flush_does_not_flicker(serve_relay: ServeRelay, enter: Any, topic: str) -> None:
    """The first node that looks afterwards finds no lease of the other, which renews its own later."""
    with Valkey() as server:
        slow = settings("redis", server) | {"presence": {"lease_s": 3, "renew_s": 1.5, "leave_delay_s": 0}}
        nodes = [await serve_relay(**slow), await serve_relay(**slow)]
        one, two = [await enter(node, topic) for node in nodes]
        await eventually(lambda: len(one.keys) == 2 and len(two.keys) == 2, "both")
        async with Redis(port=server.port) as redis:
            await redis.flushall()
        await eventually(lambda: all(node.relay.metrics.presence_leases_lost == 1 for node in nodes), "the loss")
        three = await enter(nodes[1], topic)
        await eventually(lambda: len(one.keys) == len(two.keys) == len(three.keys) == 3, "all three")
        assert one.left == two.left == []


async def test_plugin_lists_members_and_changes_them(
    serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey
) -> None:
    plugin = Plugin("members")
    kept: list[Joined] = []

    @plugin.on_joined("room:*")
    def list_them(joined: Joined) -> None:  # in a thread
        kept.append(joined)
        joined.track(joined.payload["name"], {"status": "here"})
        joined.track("everybody", {})

    @plugin.on_leave("room:*")
    async def tell(leave: Leave) -> None:
        await leave.broadcast("left", {"relay": leave.relay is not None})

    shared = settings("redis", valkey) | {"topics": [{"match": "room:*", "presence": "plugin"}]}
    relay = Relay(extra_plugins=(plugin,), system_topic=False, **shared)
    async with serve(relay) as own:
        one, two = await enter(own, topic, name="one"), await enter(own, topic, name="two")
        await eventually(lambda: one.keys == two.keys == {"one", "two", "everybody"}, "both")
        assert one.state is not None
        assert len(one.state["everybody"]) == 2
        (before,) = one.state["one"]
        kept[0].track("one", {"status": "away"})
        await eventually(lambda: one.state and before not in one.state["one"], "the change")
        ((meta,),) = [list(one.state["one"].values())]
        assert (meta["status"], meta["phx_ref_prev"]) == ("away", before)
        kept[0].untrack("one")
        await one.expect("two", "everybody")
        await two.leave()
        await eventually(lambda: one.keys == {"everybody"}, "the leave")
        kept[1].track("ghost", {})
        for key, wrong in (
            ("", {}),
            ("__proto__", {}),
            ("a\nb", {}),
            ("a", []),
            ("a", {"x": "y" * 2000}),
            ("a", "text"),
        ):
            with pytest.raises(ValueError, match="expected"):
                kept[0].track(key, wrong)
        with pytest.raises(TypeError):
            kept[0].track("a", {"x": object()})
        kept[0].untrack()
        await one.expect()


async def test_client_that_has_gone_is_not_listed_by_the_handler_it_leaves_behind() -> None:
    plugin, gone, done = Plugin("slow"), asyncio.Event(), asyncio.Event()

    @plugin.on_joined("room:*")
    async def list_it(joined: Joined) -> None:
        await gone.wait()
        joined.track("ghost", {})
        done.set()

    relay = Relay(extra_plugins=(plugin,), system_topic=False, broadcast_url="memory://", **PRESENCE)
    async with serve(relay) as own:
        async with Client.connect(own.ws) as client:
            await client.join("room:1")
        await eventually(lambda: not relay.metrics.sockets, "the end of the socket")
        gone.set()
        async with asyncio.timeout(20 * PATIENCE):
            await done.wait()
        assert await relay.presence("room:1") == {}
        assert relay.metrics.presence_members == 0


async def test_push_changes_how_its_client_is_listed(
    serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey
) -> None:
    """More often than the limit allows: the last status is the one that stays."""
    plugin = Plugin("status")

    @plugin.on_push("room:*", "status")
    def change(push: Push) -> None:  # in a thread
        push.update("nobody", {})
        push.track(push.socket.id, {"status": push.payload})

    @plugin.on_push("room:*", "hide")
    async def hide(push: Push) -> None:
        push.untrack()

    relay = Relay(extra_plugins=(plugin,), system_topic=False, **settings("redis", valkey))
    async with serve(relay) as own:
        one, two = await enter(own, topic), await enter(own, topic)
        await eventually(lambda: len(one.keys) == len(two.keys) == 2, "both")
        (key,) = one.joined
        for number in range(40):
            await two.client.send(None, None, topic, "status", number)

        def status(person: Person) -> list[Any]:
            return [] if person.state is None else [meta.get("status") for meta in person.state[key].values()]

        await eventually(lambda: status(one) == status(two) == [39], "the last status")
        assert one.left == []
        assert own.relay.metrics.presence_held_back > 0
        assert set(await relay.presence(topic)) == one.keys
        await two.client.send(None, None, topic, "hide", {})
        await eventually(lambda: key not in one.keys, "the end of the listing")


async def test_rights_decide_on_presence(serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey) -> None:
    """Without the right a client is not listed, and is not sent the members."""
    grants = [{"match": "room:*", "rights": ["join", "push"]}]
    served = await serve_relay(**settings("redis", valkey) | {"auth": {"anonymous": grants}})
    client = await connect(served)
    await client.join(topic)
    await client.expect_alive()
    assert served.relay.metrics.presence_members == 0


async def test_plugin_lists_no_client_without_the_right(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    plugin = Plugin("lists")

    @plugin.on_joined("room:*")
    async def list_it(joined: Joined) -> None:
        joined.track("ada", {})

    @plugin.on_push("room:*", "list")
    async def list_again(push: Push) -> None:
        push.track("ada", {})

    grants = [{"match": "room:*", "rights": ["join", "push"]}]
    relay = Relay(extra_plugins=(plugin,), **settings("redis", valkey) | {"auth": {"anonymous": grants}})
    async with serve(relay) as own:
        client = await connect(own)
        join_ref = await client.join(topic)
        assert (await client.push(join_ref, topic, "list"))["status"] == "ok"
        assert own.relay.metrics.presence_members == 0
        assert own.relay.metrics.plugin_errors["lists"] == 0
        assert await relay.presence(topic) == {}


async def test_token_renewed_without_the_right_ends_the_listing(
    serve_relay: ServeRelay, connect: Connect, topic: str, valkey: Valkey
) -> None:
    key = "a secret of thirty-two bytes or more"

    def token(*rights: str) -> str:
        return jwt.encode({"sub": "alice", "exp": time.time() + 60, "topics": {"room:*": list(rights)}}, key)

    served = await serve_relay(**settings("redis", valkey) | {"auth": {"keys": [key]}})
    client = await connect(served, query=f"token={token('join', 'presence')}")
    await client.send("1", "1", topic, "phx_join", {})
    assert [(await client.receive())[3] for _ in range(2)] == ["phx_reply", "presence_state"]
    assert served.relay.metrics.presence_members == 1
    await client.send("1", "2", topic, "access_token", {"access_token": token("join")})
    assert (await client.receive())[4]["status"] == "ok"
    assert served.relay.metrics.presence_members == 0
    assert await client.push("1", topic, "shout") == {"status": "error", "response": {"reason": "unauthorized"}}


@pytest.mark.parametrize("what", ["evicted", "of another kind"])
async def test_members_of_one_topic_that_redis_has_lost_are_written_again(
    serve_relay: ServeRelay, enter: Any, topic: str, redis: Redis, what: str
) -> None:
    one, two = await serve_relay(**PRESENCE), await serve_relay(**PRESENCE)
    first = await enter(one, topic)
    await eventually(lambda: first.keys, "the state")
    key = f"presence:{topic}|{node_of(one)}"
    async with asyncio.timeout(20 * PATIENCE):
        while not await redis.delete(key):  # noqa: ASYNC110 - Redis's
            await asyncio.sleep(0.01)
    if what != "evicted":
        await redis.set(key, "x")
    second = await enter(two, topic)
    await eventually(lambda: len(second.keys) == len(first.keys) == 2, "both members")
    assert len(await redis.hgetall(key)) == 1
    assert not first.left and not second.left


async def test_what_others_write_into_redis_harms_nobody(
    serve_relay: ServeRelay, enter: Any, topic: str, valkey: Valkey
) -> None:
    served = await serve_relay(**settings("redis", valkey))
    one = await enter(served, topic)
    await eventually(lambda: len(one.keys) == 1, "the state")
    async with Redis(port=valkey.port) as redis:
        node = uuid4().hex[:12]
        now = (await redis.time())[0] * 1000
        deep = b"[" * 100_000 + b"]" * 100_000  # for Python 3.13 5000 levels are no fault yet
        for wrong in (b"", b"{}", b"\xff", b'{"node":"x","number":1,"changes":[["t",[],[1]]]}', b"[]", b"1" * 9999):
            await redis.publish("relay:presence", wrong)
        for wrong in (b'{"node":"\xff","number":1}', b'{"node":"x","number":1,"more":%b}' % deep):
            await redis.publish("relay:presence", wrong)
        wrong_members: Any = {"c": '["constructor",{},""]', "d": '["number",1,""]', "e": b'["bytes",{"a":"\xff"},""]'}
        wrong_members["f"] = b'["deep",{"a":%b},""]' % deep
        members: Any = {"a": "no JSON", b"\xff": "[1]", "b": '["there",{},""]', **wrong_members}
        await redis.hset(f"presence:{topic}|{node}", mapping=members)
        joins = [["not hex", "ghost", {}, ""], ["f1", "__proto__", {}, ""], ["f2", "list", [], ""]]
        changes = [[topic, joins, []]]
        message = json.dumps({"node": node, "number": 1, "changes": changes}).encode()
        await redis.publish("relay:presence", message.replace(b'"list", []', b'"bytes", {"a": "\xff"}'))
        digests = {topic: [1, 5]}
        await redis.publish("relay:presence", json.dumps({"node": node, "number": 1, "digests": digests}))
        leases: Any = {node: now + 60_000, b"\xff\xfe": now + 60_000}
        await redis.zadd("presence:nodes", leases)
        await redis.zadd("presence:nodes:written", leases)
        try:
            await eventually(lambda: "there" in one.keys, "what can be read")
            assert not {"__proto__", "constructor", "bytes", "deep", "number"} & one.keys
            assert served.relay.metrics.dropped["presence message not understood"] == 8
            assert served.relay.node.link.live
            assert served.relay.metrics.gaps == 0
        finally:
            for key in ("presence:nodes", "presence:nodes:written"):
                await redis.zrem(key, node, b"\xff\xfe")
            await redis.delete(f"presence:{topic}|{node}")


async def test_embedded_server_keeps_members(enter: Any, topic: str) -> None:
    """Its user may run what that needs, also when a node has ended without a word."""
    async with serve(Relay(**PRESENCE, redis_url="embedded", system_topic=False)) as served:
        store = served.relay.node.broker.presence
        assert store is not None
        one, two = await enter(served, topic), await enter(served, topic)
        await eventually(lambda: len(one.keys) == 2 and len(two.keys) == 2, "both members")
        assert await store.nodes() == [store.node]
        async with asyncio.timeout(10):
            while len(await store.read(topic, store.node, 1) or ()) < 2:  # noqa: ASYNC110 - Redis's
                await asyncio.sleep(0.01)
        await store.remove("000000000000")
        await two.client.connection.close()
        await eventually(lambda: len(one.keys) == 1, "the leave")
