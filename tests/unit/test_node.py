"""`relay.node`: handshakes, drain, control messages, services, start and stop, with sockets of no server."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from relay import BusUnavailable, ConfigError, Plugin, Refused, Relay, UpgradeRequest
from relay import node as module
from relay.errors import CloseCode, RelayError
from relay.node import Node
from relay.plugins.hooks import Push
from tests.support.asgi import Connection, until
from tests.support.panic import Panic
from tests.support.patience import PATIENCE

USERS = {"auth": {"authenticated": [{"match": "*", "rights": ["join", "push"]}]}}


async def by_query(request: UpgradeRequest) -> Mapping[str, Any] | None:
    """The user is the value of ``user`` in the query; without one the client is refused."""
    user = request.query_params.get("user")
    if not user:
        raise Refused("who are you?")
    return {"sub": user}


@asynccontextmanager
async def running(*plugins: Plugin, authenticate: Any = None, **settings: Any) -> AsyncIterator[Relay]:
    """A relay on memory://, stopped at the end; quick to close what does not answer."""
    limits = {"close_timeout_s": 0.2, **settings.pop("limits", {})}
    relay = Relay(
        broadcast_url="memory://",
        system_topic=False,
        rest={"path": ""},
        console=False,
        extra_plugins=plugins,
        authenticate=authenticate,
        limits=limits,
        **settings,
    )
    async with relay.lifespan():
        yield relay


class Client:
    """One connection and the task that serves it."""

    def __init__(self, relay: Relay, connection: Connection) -> None:
        self.connection = connection
        self._relay = relay
        self.task = asyncio.create_task(relay(connection.scope, connection.receive, connection.send))

    @property
    def id(self) -> str:
        query = self.connection.scope["query_string"]
        return next(id for id, socket in self._relay.node.sockets.items() if socket.transport.query_string is query)

    @property
    def messages(self) -> list[list[Any]]:
        return [json.loads(entry) for entry in self.connection.sent if isinstance(entry, str)]

    @property
    def closed_with(self) -> int | None:
        return next((entry for entry in self.connection.sent if isinstance(entry, int)), None)

    def say(self, *message: Any) -> None:
        self.connection.text(json.dumps(message))

    async def join(self, topic: str) -> "Client":
        count = len(self.messages)
        self.say("1", "1", topic, "phx_join", {})
        await until(lambda: len(self.messages) > count)
        assert self.messages[-1][4]["status"] == "ok", self.messages
        return self

    async def leave(self) -> None:
        self.connection.disconnect()
        await self.task


async def connect(relay: Relay, query: str = "", **options: Any) -> Client:
    """A client; its handshake has been answered."""
    client = Client(relay, Connection(query=f"vsn=2.0.0&{query}", **options))
    await until(lambda: client.connection.status is not None)
    if client.connection.status == 101:
        await until(lambda: relay.metrics.sockets == len(relay.node.sockets) or client.task.done())
    return client


def stream(relay: Relay, query: str = "topic=room:1", **options: Any) -> Client:
    """A client of server-sent events."""
    return Client(relay, Connection("/socket/sse", query, kind="http", **options))


# Streams of server-sent events.


@pytest.mark.parametrize("direct", [True, False])
async def test_stream_is_a_socket_from_its_request_to_its_end(direct: bool) -> None:
    async with running() as relay:
        client = stream(relay, direct=direct)
        await until(lambda: client.connection.events)
        assert relay.node.state.sockets == {"direct": 0, "asgi": 0, "sse": 1, "longpoll": 0}
        assert relay.topics == {"room:1": 1}
        await relay.publish("room:1", "e", {"a": 1})
        await until(lambda: len(client.connection.events) == 2)
        assert client.connection.events[1].data == '{"a":1}'
        await client.leave()
        assert (relay.topics, relay.node.state.sockets["sse"]) == ({}, 0)


async def test_refused_stream_is_counted_and_its_page_may_read_why_where_it_may_connect() -> None:
    shop = ("origin", "https://shop.example")
    async with running(allowed_origins=[shop[1]], limits={"sockets_max": 1}) as relay:
        one = stream(relay, headers=[("host", "localhost")])
        await until(lambda: one.connection.events)
        for origin, query, method, status, allowed in (
            (shop, "topic=a", "GET", 200, shop[1]),
            (shop, "topic=a", "POST", 405, shop[1]),
            (shop, "topic=a", "OPTIONS", 204, shop[1]),
            (("origin", "https://evil.example"), "topic=a", "OPTIONS", 204, None),
            (("origin", "https://evil.example"), "topic=a", "GET", 200, None),
        ):
            other = stream(relay, query, headers=[("host", "localhost"), origin], method=method)
            await other.task
            assert other.connection.status == status
            assert other.connection.header("access-control-allow-origin") == allowed
        assert relay.metrics.refused == {"handshake: sockets in all": 2, "handshake: method": 1}
        await one.leave()
        wrong = stream(relay, "", headers=[("host", "localhost")])
        await wrong.task
        assert wrong.connection.status == 400
        assert relay.metrics.refused["handshake: topics"] == 1


async def test_stream_is_authenticated_as_a_socket() -> None:
    async with running(authenticate=by_query, **USERS) as relay:
        alice, nobody = stream(relay, "topic=a&user=alice"), stream(relay, "topic=a")
        await until(lambda: alice.connection.events)
        (socket,) = relay.node.sockets.values()
        assert socket.user == "alice"
        await nobody.task
        assert (nobody.connection.status, nobody.connection.body) == (403, "who are you?\n")
        await relay.disconnect(user="alice", reason="bye")
        await alice.task
        assert alice.connection.events[-1].data == '{"reason":"bye"}'


async def test_streams_end_when_uvicorn_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uvicorn waits for them at its end, before the lifespan's."""
    is_ending = False
    monkeypatch.setattr(module, "is_server_ending", lambda: is_ending)
    async with running(limits={"idle_timeout_s": 0.08}) as relay:
        client = stream(relay)
        await until(lambda: client.connection.events)
        is_ending = True
        await client.task
        assert client.connection.events[-1].data == '{"reason":"the relay is restarting"}'
        assert relay.node.is_draining
        late = stream(relay)
        await late.task
        assert (late.connection.status, late.connection.is_complete) == (200, True)


# Handshakes.


async def test_socket_is_known_by_its_id_as_long_as_it_is_open() -> None:
    async with running() as relay:
        one, two = await connect(relay), await connect(relay, direct=True)
        assert len(relay.node.sockets) == 2
        socket = relay.node.socket(one.id)
        assert socket is not None
        assert socket.write_mode == "asgi"
        assert relay.node.state.sockets == {"direct": 1, "asgi": 1, "sse": 0, "longpoll": 0}
        assert socket.id.rpartition("-")[0] == two.id.rpartition("-")[0], "ids of one node have its part in common"
        await one.leave()
        assert relay.node.socket(socket.id) is None
        assert relay.node.state.sockets == {"direct": 1, "asgi": 0, "sse": 0, "longpoll": 0}
        await two.leave()


@pytest.mark.parametrize(
    ("query", "headers", "status", "kind"),
    [
        ("vsn=3.0.0", [], 403, "version"),
        ("vsn=2.0.0", [("origin", "https://evil.example")], 403, "origin"),
        ("vsn=2.0.0", [("sec-websocket-protocol", "chat")], 403, "subprotocol"),
    ],
)
async def test_refused_handshake_is_answered_and_counted(
    query: str, headers: list[tuple[str, str]], status: int, kind: str
) -> None:
    async with running() as relay:
        connection = Connection(query=query, headers=[("host", "localhost"), *headers])
        await relay(connection.scope, connection.receive, connection.send)
        assert connection.status == status
        assert relay.metrics.refused == {f"handshake: {kind}": 1}
        assert not relay.node.sockets


async def test_client_that_authentication_refuses_gets_its_reason() -> None:
    async with running(authenticate=by_query, **USERS) as relay:
        stranger = await connect(relay)
        await stranger.task
        assert (stranger.connection.status, "who are you?" in stranger.connection.body) == (403, True)
        alice = await connect(relay, "user=alice")
        socket = relay.socket(alice.id)
        assert socket is not None
        assert socket.user == "alice"
        await alice.leave()


async def test_one_socket_too_many_is_refused_and_its_place_is_free_again_afterwards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(limits={"sockets_per_address": 1}) as relay:
        first = await connect(relay, client=("10.0.0.1", 1), headers=[("host", "localhost")])
        assert first.connection.status == 403, "from another machine"
    async with running(allow_anonymous=True, limits={"sockets_per_address": 1}) as relay:
        first = await connect(relay, client=("10.0.0.1", 1))
        second = await connect(
            relay, client=("10.0.0.1", 2), headers=[("host", "10.0.0.2"), ("x-forwarded-for", "10.9.9.9")]
        )
        assert (first.connection.status, second.connection.status) == (101, 429)
        assert "is this a proxy that `trusted_proxies` should name?" in caplog.text
        await first.leave()
        third = await connect(relay, client=("10.0.0.1", 3))
        assert third.connection.status == 101
        await third.leave()
        assert relay.metrics.refused.total() == 1


async def test_place_of_a_client_that_goes_during_its_handshake_is_free_again() -> None:
    async with running(allow_anonymous=True, limits={"sockets_max": 1}) as relay:
        gone = Connection()
        gone.fault = OSError("gone")
        with pytest.raises(OSError, match="gone"):
            await relay(gone.scope, gone.receive, gone.send)
        client = await connect(relay)
        assert client.connection.status == 101
        await client.leave()


async def test_server_is_given_what_to_do_at_its_shutdown() -> None:
    async with running() as relay:
        client = await connect(relay, direct=True)
        writer = client.connection.writer
        assert writer is not None
        assert (writer.close_timeout_s, writer.on_shutdown) == (0.2, relay.node.connections.drain)
        assert writer.on_shutdown is not None
        writer.on_shutdown()
        await client.task
        assert client.closed_with == CloseCode.RESTART


# The drain.


async def test_drain_closes_sockets_in_the_order_they_came_and_refuses_new_ones() -> None:
    async with running(limits={"drain_per_s": 20}) as relay:
        closed: list[str] = []
        clients = {name: await connect(relay, f"name={name}") for name in "abc"}

        async def note(name: str, client: Client) -> None:
            await client.task
            closed.append(name)

        notes = [asyncio.create_task(note(name, client)) for name, client in clients.items()]
        relay.node.drain()
        relay.node.drain()
        await until(lambda: closed)
        assert closed == ["a"], "the others at a pace"
        late = await connect(relay)
        await late.task
        assert (late.connection.status, relay.metrics.refused["handshake: restarting"]) == (503, 1)
        await asyncio.gather(*notes)
        assert closed == ["a", "b", "c"]
        assert [client.closed_with for client in clients.values()] == [CloseCode.RESTART] * 3
        assert relay.metrics.drained == 3


async def test_socket_that_has_left_before_its_turn_is_not_counted_as_drained() -> None:
    async with running(limits={"drain_per_s": 20}) as relay:
        first, second = await connect(relay), await connect(relay)
        relay.node.drain()
        await second.leave()
        await first.task
        await relay.stop()
        assert relay.metrics.drained == 1


@asynccontextmanager
async def authenticating() -> AsyncIterator[tuple[Relay, Client, asyncio.Event]]:
    """A client whose authentication, as alice, waits for the event."""
    go, asked = asyncio.Event(), asyncio.Event()

    async def slow(request: UpgradeRequest) -> Mapping[str, Any]:
        asked.set()
        await go.wait()
        return {"sub": "alice"}

    async with running(authenticate=slow) as relay:
        client = Client(relay, Connection())
        await asked.wait()
        yield relay, client, go


async def test_handshake_that_the_drain_overtakes_is_closed_with_1012() -> None:
    async with authenticating() as (relay, client, go):
        relay.node.drain()
        go.set()
        await client.task
        assert (client.connection.status, client.closed_with, relay.metrics.drained) == (101, CloseCode.RESTART, 1)


# Control messages.


async def test_disconnect_closes_one_socket_of_this_process() -> None:
    async with running() as relay:
        one, two = await connect(relay), await connect(relay)
        id = one.id
        assert relay.disconnect(id, "bye")
        await one.task
        assert one.closed_with == CloseCode.GOING_AWAY
        assert (relay.disconnect(id), two.closed_with) == (False, None)
        await two.leave()


async def test_disconnect_of_a_user_closes_its_sockets_alone() -> None:
    async with running(authenticate=by_query, **USERS) as relay:
        alice, also, bob = [await connect(relay, f"user={user}") for user in ("alice", "alice", "bob")]
        await relay.disconnect(user="alice", reason="banned")
        await asyncio.gather(alice.task, also.task)
        assert [client.closed_with for client in (alice, also, bob)] == [1001, 1001, None]
        assert alice.connection.log[-1]["reason"] == "banned"
        assert relay.metrics.disconnects_by_control == 2, (
            "the message that comes back over the bus is not applied twice"
        )
        await bob.leave()


async def test_kick_ends_one_topic_of_a_user() -> None:
    async with running(authenticate=by_query, **USERS) as relay:
        alice, bob = await connect(relay, "user=alice"), await connect(relay, "user=bob")
        for client in (alice, bob):
            await client.join("room:1")
        await alice.join("room:2")
        await relay.kick("room:1", user="alice")
        assert alice.messages[-1][2:4] == ["room:1", "phx_close"]
        assert relay.topics == {"room:1": 1, "room:2": 1}
        for client in (alice, bob):
            await client.leave()


async def test_user_whose_name_is_a_number_is_kicked_and_disconnected() -> None:
    async def by_number(request: UpgradeRequest) -> dict[str, Any]:
        return {"sub": 42, "topics": {"*": "join"}}

    async with running(authenticate=by_number) as relay:
        client = await connect(relay)
        await client.join("room:1")
        await relay.kick("room:1", user=42)
        assert (client.messages[-1][2:4], relay.topics) == (["room:1", "phx_close"], {})
        await relay.disconnect(user=42)
        await client.task
        assert client.closed_with == CloseCode.GOING_AWAY


@pytest.mark.parametrize("user", ["", "\ud83d", True, 4.2, b"alice", {"id": 1}])
async def test_user_that_cannot_be_is_no_success(user: Any) -> None:
    async with running(authenticate=by_query, **USERS) as relay:
        for act in (relay.disconnect, partial(relay.kick, "room:1")):
            with pytest.raises(ValueError, match="user"):
                _ = act(user=user)
        with pytest.raises(ValueError, match="user"):
            _ = relay.kick("room:1", user=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", [7, b"banned", "\ud83d"])
async def test_reason_that_is_no_text_is_an_error_before_anything_is_done(reason: Any) -> None:
    async with running(authenticate=by_query, **USERS) as relay:
        alice = await connect(relay, "user=alice")
        for who in ({"user": "alice"}, {"socket_id": alice.id}):
            with pytest.raises(ValueError, match="reason: expected text"):
                _ = relay.disconnect(reason=reason, **who)
        assert alice.closed_with is None
        await alice.leave()


@pytest.mark.parametrize("topic", ["", "phoenix", "a\n", "x" * 256])
async def test_kick_from_no_topic_is_no_disconnect(topic: str) -> None:
    async with running(authenticate=by_query, **USERS) as relay:
        alice = await connect(relay, "user=alice")
        with pytest.raises(ValueError, match="topic: expected"):
            _ = relay.kick(topic, user="alice")
        assert alice.closed_with is None
        await alice.leave()


@pytest.mark.parametrize("reason", ["", None])  # reason=form.get("reason")
async def test_control_message_of_another_node_is_applied(reason: Any) -> None:
    async with running(authenticate=by_query, **USERS) as one, running(authenticate=by_query, **USERS) as other:
        alice = await connect(one, "user=alice")
        taken: list[bytes] = []
        send = other.node.broker.publish_control

        def record(data: bytes) -> "asyncio.Future[None]":
            taken.append(data)
            return send(data)

        other.node.broker.publish_control = record  # type: ignore[method-assign]
        await other.disconnect(user="alice", reason=reason)
        assert alice.closed_with is None, "each memory:// is a bus of its own"
        one.node.pubsub.receive_control(taken[0])
        async with asyncio.timeout(20 * PATIENCE):
            await alice.task
        assert alice.closed_with == 1001


async def test_user_disconnected_while_it_is_authenticated_is_refused() -> None:
    async with authenticating() as (relay, client, go):
        await relay.disconnect(user="alice")
        go.set()
        await client.task
        assert client.connection.status != 101
        assert "this user was disconnected in the meantime" in client.connection.body


async def test_user_disconnected_while_it_is_accepted_does_not_stay() -> None:
    async with running(authenticate=by_query) as relay:
        connection = Connection(query="vsn=2.0.0&user=alice")
        accepting = connection.take_frames
        accepting.clear()
        client = Client(relay, connection)
        await until(lambda: connection.is_sending)
        await relay.disconnect(user="alice")
        accepting.set()
        await client.task
        assert (connection.status, client.closed_with) == (101, CloseCode.GOING_AWAY)
        assert relay.metrics.disconnects_by_control == 1


async def test_push_that_a_disconnected_user_left_behind_is_not_published() -> None:
    plugin, go, began = Plugin("p"), asyncio.Event(), asyncio.Event()

    @plugin.on_push("room:*")
    async def slow(push: Push) -> None:
        began.set()
        await go.wait()

    async with running(plugin, authenticate=by_query, **USERS) as relay:
        alice = await (await connect(relay, "user=alice")).join("room:1")
        alice.say("1", "2", "room:1", "msg", {})
        await began.wait()
        await alice.leave()
        assert not relay.node.sockets
        await relay.disconnect(user="alice")
        go.set()
        await until(lambda: relay.metrics.refused["subscription ended"] == 1)
        assert relay.metrics.pushes_out == 0


# Publishing.


async def test_event_reaches_the_subscribers_by_the_bus_or_past_it() -> None:
    async with running() as relay:
        client = await (await connect(relay)).join("room:1")
        await relay.node.publish("room:1", "by_bus", {"n": 1})
        await until(lambda: len(client.messages) == 2)
        assert relay.node.local_broadcast("room:1", "past_it", {"n": 2})
        assert not relay.node.local_broadcast("room:2", "past_it", {})
        await until(lambda: len(client.messages) == 3)
        assert [message[3:] for message in client.messages[1:]] == [["by_bus", {"n": 1}], ["past_it", {"n": 2}]]
        await client.leave()
        await until(lambda: relay.topics == {})


@pytest.mark.parametrize(("topic", "event"), [("", "e"), ("t" * 256, "e"), ("t", "phx_join"), ("t", "")])
async def test_names_that_no_client_could_receive_are_refused(topic: str, event: str) -> None:
    async with running() as relay:
        for send in (relay.node.publish, relay.node.local_broadcast):
            with pytest.raises(ValueError, match="expected a topic of 1 to 255 bytes"):
                send(topic, event, {})


# What it watches.


async def test_idle_socket_is_closed_with_1001_and_one_without_topic_with_1008() -> None:
    async with running(limits={"idle_timeout_s": 0.08}) as relay:
        joined = await (await connect(relay)).join("room:1")
        await joined.task
        assert joined.closed_with == CloseCode.GOING_AWAY
        assert relay.metrics.refused == {"idle": 1}
    async with running(limits={"first_join_timeout_s": 0.04}) as relay:
        joinless = await connect(relay)
        await joinless.task
        assert joinless.closed_with == CloseCode.POLICY_VIOLATION
        assert relay.metrics.refused == {"no join in time": 1}


async def test_event_loop_that_stood_still_is_counted_and_spares_the_sockets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Heartbeats that came meanwhile have not been read yet."""
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    async with running(limits={"idle_timeout_s": 0.04}) as relay:
        client = await connect(relay)
        await until(lambda: relay.metrics.sockets == 1)
        clock[0] += 100.0
        await until(lambda: relay.metrics.event_loop_stalls == 1)
        assert client.closed_with is None
        assert "event loop blocked for" in caplog.text
        await client.leave()


async def test_workers_metrics_are_written_regularly_and_a_full_disk_is_no_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    monkeypatch.setattr(module, "_WRITE_INTERVAL_S", 0.001)
    async with running(metrics={"dir": str(tmp_path / "metrics")}) as relay:
        writes: list[str] = []

        async def full() -> None:
            writes.append("full")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(relay.node._exporter, "save", full)
        await until(lambda: len(writes) >= 2)
    assert "writing metrics.dir failed" in caplog.text


async def test_metrics_directory_that_cannot_be_written_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    relay = Relay(broadcast_url="memory://", system_topic=False, metrics={"dir": str(tmp_path / "metrics")})

    async def read_only() -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(relay.exporter, "save", read_only)
    with pytest.raises(ConfigError, match=r"metrics\.dir: .* cannot be written: Read-only file system"):
        await relay.start()


# Plugins.


async def test_start_and_stop_call_the_plugins_around_everything_else() -> None:
    plugin, steps = Plugin("p"), list[str]()

    @plugin.on_startup
    async def startup(relay: Relay) -> None:
        steps.append(f"startup, link live: {relay.link.live}")

    @plugin.service
    async def service(relay: Relay) -> None:
        steps.append("service")
        try:
            await asyncio.Event().wait()
        finally:
            steps.append(f"service ends, sockets: {len(relay.node.sockets)}")

    @plugin.on_shutdown
    async def broken(relay: Relay) -> None:
        raise ValueError("broken")

    @plugin.on_shutdown
    async def shutdown(relay: Relay) -> None:
        steps.append(f"shutdown, link live: {relay.link.live}")

    async with running(plugin) as relay:
        client = await connect(relay)
        await until(lambda: "service" in steps)
    assert client.closed_with == CloseCode.RESTART
    assert steps == ["startup, link live: True", "service", "service ends, sockets: 0", "shutdown, link live: True"]
    assert relay.metrics.plugin_errors["p"] == 1
    await client.task


@pytest.mark.parametrize("hook", ["on_startup", "on_shutdown"])
async def test_handler_that_ignores_its_cancellation_is_left_behind(
    hook: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("relay.plugins.dispatcher._IGNORED_S", 0.05)
    plugin, steps, may_end = Plugin("p"), list[str](), asyncio.Event()

    async def stubborn(relay: Relay) -> None:
        while not may_end.is_set():
            with suppress(asyncio.CancelledError):
                await may_end.wait()

    getattr(plugin, hook)(stubborn)

    @plugin.on_shutdown
    async def second(relay: Relay) -> None:
        steps.append("second")

    fails = pytest.raises(ConfigError, match="plugin p failed to start: .* ignores that it was cancelled")
    limit = asyncio.get_running_loop().call_later(10 * PATIENCE, may_end.set)
    with fails if hook == "on_startup" else nullcontext():
        async with running(plugin, plugins={"timeout_s": 0.05}):
            pass
    assert steps == ["second"]
    assert not may_end.is_set(), "it was waited for"
    limit.cancel()
    may_end.set()
    assert "stubborn ignores that it was cancelled; going on without it" in caplog.text


async def test_plugin_that_fails_to_start_stops_the_start_and_is_shut_down() -> None:
    plugin, steps = Plugin("p"), list[str]()

    @plugin.on_startup
    async def startup(relay: Relay) -> None:
        raise ValueError("broken")

    @plugin.on_shutdown
    async def shutdown(relay: Relay) -> None:
        steps.append("shutdown")

    relay = Relay(broadcast_url="memory://", system_topic=False, extra_plugins=(plugin,))
    with pytest.raises(ConfigError, match="plugin p failed to start"):
        await relay.start()
    assert steps == ["shutdown"]
    with pytest.raises(RelayError, match="not running"):
        _ = relay.node


@pytest.mark.parametrize("error", [ValueError("broken"), Panic("broken")], ids=lambda error: type(error).__name__)
async def test_service_that_raises_or_ends_is_started_again(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SERVICE_BACKOFF_S", 0.001)
    plugin, runs = Plugin("p"), list[int]()

    @plugin.service
    async def service(relay: Relay) -> None:
        runs.append(len(runs))
        if len(runs) == 1:
            raise error
        if len(runs) == 2:
            return
        await asyncio.Event().wait()

    async with running(plugin) as relay:
        await until(lambda: len(runs) == 3)
        assert (relay.metrics.plugin_calls["p"], relay.metrics.plugin_errors["p"]) == (3, 1)
    assert "has ended; starting it again" in caplog.text


async def test_service_that_raises_while_it_is_cancelled_is_counted() -> None:
    plugin, began = Plugin("p"), asyncio.Event()

    @plugin.service
    async def service(relay: Relay) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("cleaning up failed")

    @plugin.service
    async def quiet(relay: Relay) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    async with running(plugin) as relay:
        await began.wait()
    assert relay.metrics.plugin_errors["p"] == 1


async def test_stop_waits_for_hanging_handlers_and_services_no_longer_than_the_time_limit() -> None:
    plugin, hanging, go = Plugin("p"), asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue

    @plugin.on_push("room:*")
    async def handler(push: Push) -> None:
        hanging.set()
        await hang()

    @plugin.service
    async def service(relay: Relay) -> None:
        await hang()

    before = asyncio.all_tasks()
    async with running(plugin, limits={"close_timeout_s": 0.02}) as relay:
        client = await (await connect(relay)).join("room:1")
        client.say("1", "2", "room:1", "msg", {})
        await hanging.wait()
    left = asyncio.all_tasks() - before
    assert left, "they ignore their cancellation"
    go.set()
    await asyncio.wait(left)
    assert client.task.done()


async def test_raw_redis_handlers_need_redis() -> None:
    plugin = Plugin("p")
    plugin.on_redis("a")(lambda message, relay: None)
    with pytest.raises(ConfigError, match="plugin p listens with on_redis, which needs redis_url"):
        async with running(plugin):
            pass


async def test_raw_redis_handlers_need_one_redis() -> None:
    plugin = Plugin("p")
    plugin.on_redis("a")(lambda message, relay: None)
    relay = Relay(redis_url="redis+cluster://127.0.0.1:1", extra_plugins=(plugin,))
    with pytest.raises(ConfigError, match=r"plugin p listens with on_redis, which does not work with redis\+cluster"):
        async with relay.lifespan():
            pass


# The bus.


async def test_bus_that_is_away_makes_the_node_not_ready() -> None:
    async with running() as relay:
        node: Node = relay.node
        assert (node.link.live, node.state.link_live, node.state.link_pushes) == (True, True, True)
        await node.broker.stop()
        assert (node.link.live, node.state.link_live, node.state.link_pushes) == (False, False, False)
        with pytest.raises(BusUnavailable):
            await relay.publish("t", "e", {})
        with pytest.raises(BusUnavailable):
            await relay.disconnect(user="alice")
        await until(lambda: relay.metrics.dropped)
        assert relay.metrics.dropped == {"bus unavailable": 1, "control message not sent": 1}
