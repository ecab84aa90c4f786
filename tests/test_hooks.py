"""What handlers are given, and who is called for a topic, in which order."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from relay import hooks
from relay.hooks import Event, Hook, Hooks, HookTable, Join, Leave, Push, RedisMessage, Refused, Socket
from relay.plugins import Plugin
from relay.rights import Identity, Rights

SOCKET = cast(Socket, object())


def raw(text: str) -> msgspec.Raw:
    return msgspec.Raw(text.encode())


# Who is called.


def hook(plugin: str = "p", topic: str = "*", event: str = "*", function: Callable[..., Any] = print) -> Hook:
    return Hook(plugin, function, topic, event)


@pytest.mark.parametrize(
    ("pattern", "topic", "matches"),
    [
        ("*", "room:1", True),
        ("room:*", "room:1", True),
        ("room:*", "room:", True),
        ("room:*", "rooms:1", False),
        ("room:?", "room:1", True),
        ("room:?", "room:12", False),
        ("room:[ab]", "room:b", True),
        ("room:[ab]", "room:c", False),
        ("Room:*", "room:1", False),
        ("room:1", "room:1", True),
    ],
)
def test_topic_pattern_says_which_topics_a_handler_is_for(pattern: str, topic: str, matches: bool) -> None:
    assert hook(topic=pattern).matches(topic, "any") is matches


@pytest.mark.parametrize(
    ("pattern", "event", "matches"),
    [("*", "new", True), ("new", "new", True), ("n*", "new", True), ("n*", "old", False)],
)
def test_event_pattern_says_which_events_a_handler_is_for(pattern: str, event: str, matches: bool) -> None:
    assert hook(topic="room:*", event=pattern).matches("room:1", event) is matches
    assert not hook(topic="room:*", event=pattern).matches("other", event)


def test_handlers_are_called_in_the_order_in_which_they_were_added() -> None:
    table = HookTable()
    for name in ("b", "a", "c"):
        table.add("push", hook(name, "room:*"))
    table.add("push", hook("other", "system"))
    table.add("leave", hook("a"))
    frozen = table.freeze()
    assert [found.plugin for found in hooks.matching(frozen.push, "room:1", "new")] == ["b", "a", "c"]
    assert [found.plugin for found in frozen.leave] == ["a"]
    assert frozen.join == frozen.event == frozen.redis == frozen.services == frozen.startup == frozen.shutdown == ()


def test_empty_table_has_no_handlers() -> None:
    assert HookTable().freeze() == Hooks()


def test_handler_is_called_by_its_name_or_what_stands_for_it() -> None:
    def handler() -> None: ...

    assert hook(function=handler).name.endswith("handler")
    assert hook(function=partial(handler)).name.startswith("functools.partial(")


# What they are given.


def test_payload_is_decoded_when_first_asked_for_and_once() -> None:
    join = Join(SOCKET, "room:1", raw('{"a":[1]}'))
    assert bytes(join.data) == b'{"a":[1]}'
    first = join.payload
    assert first == {"a": [1]}
    assert join.payload is first
    assert (join.socket, join.topic) == (SOCKET, "room:1")


def test_join_push_and_leave_say_who_acts() -> None:
    """Whose token opened the topic, else whose socket it is; without any of that nobody."""
    socket = cast(Socket, SimpleNamespace(user="alice", claims={"sub": "alice"}))
    bob = Identity("bob", Rights(), {"sub": "bob"})
    for identity, user in ((None, "alice"), (bob, "bob")):
        pushed = Push(socket, "t", "e", raw("{}"), lambda *_: None, lambda *_: asyncio.sleep(0), identity)
        for given in (Join(socket, "t", raw("{}"), identity), Leave(socket, "t", identity), pushed):
            assert (given.user, given.claims) == (user, {"sub": user})
    assert "bob" not in repr(Leave(socket, "t", bob)), "no claim is shown by accident"


def test_binary_payload_stays_bytes() -> None:
    assert Event("room:1", "blob", b"\x00\xff").payload == b"\x00\xff"


def test_leave_and_redis_message_say_what_they_are_about() -> None:
    assert (Leave(SOCKET, "t").socket, Leave(SOCKET, "t").topic) == (SOCKET, "t")
    message = RedisMessage("feed", b"line")
    assert (message.channel, message.data) == ("feed", b"line")


class Pushed:
    """A push, and what its handler did with it."""

    def __init__(self) -> None:
        self.replies: list[tuple[str, object]] = []
        self.broadcasts: list[tuple[str, object, bool]] = []
        self.push = Push(SOCKET, "room:1", "say", raw("{}"), self._reply, self._broadcast)

    def _reply(self, status: str, response: object) -> None:
        self.replies.append((status, response))

    def _broadcast(self, event: str, payload: object, to_all: bool) -> Awaitable[None]:
        self.broadcasts.append((event, payload, to_all))
        return asyncio.sleep(0)


def test_push_is_forwarded_and_not_answered_until_a_handler_says_otherwise() -> None:
    push = Pushed().push
    assert (push.socket, push.topic, push.event, push.payload) == (SOCKET, "room:1", "say", {})
    assert push.forwarded
    assert not push.replied
    push.stop()
    assert not push.forwarded


def test_push_may_be_answered_several_times_or_never() -> None:
    pushed = Pushed()
    pushed.push.reply()
    pushed.push.reply({"a": 1}, "error")
    pushed.push.reply([], status="later")
    assert pushed.push.replied
    assert pushed.replies == [("ok", {}), ("error", {"a": 1}), ("later", [])]
    silent = Pushed()
    silent.push.no_reply()
    assert silent.push.replied
    assert silent.replies == []


async def test_push_is_broadcast_to_all_or_to_all_others() -> None:
    pushed = Pushed()
    await pushed.push.broadcast("said", 1)
    await pushed.push.broadcast_from("said", 2)
    assert pushed.broadcasts == [("said", 1, True), ("said", 2, False)]


def test_event_is_replaced_by_a_copy() -> None:
    event = Event("room:1", "new", raw('{"a":1}'))
    assert bytes(event.replace({"b": 2}).data) == b'{"b":2}'
    assert event.replace(None).payload is None
    renamed = event.replace(event="newer")
    assert (renamed.topic, renamed.event, renamed.data) == ("room:1", "newer", event.data)
    assert event.event == "new"
    with pytest.raises(TypeError):
        event.replace(object())


# What they give.


def test_refusal_carries_its_reason_and_details() -> None:
    refused = Refused("full", seats=3)
    assert str(refused) == refused.reason == "full"
    assert refused.response == raw('{"reason":"full","seats":3}')


@pytest.mark.parametrize(
    ("reason", "details"), [(3, {}), ({"a": 1}, {}), ("full", {"seats": object()}), ("\ud800", {})]
)
def test_refusal_that_cannot_be_sent_raises_where_it_is_made(reason: Any, details: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Refused(reason, **details)


@pytest.mark.parametrize(
    ("value", "payload"),
    [
        ({"a": 1}, raw('{"a":1}')),
        ("text", raw('"text"')),
        (None, raw("null")),
        (b"\x00", b"\x00"),
        (raw('{"as":"it is"}'), raw('{"as":"it is"}')),
    ],
)
def test_payload_is_made_of_what_a_handler_gives(value: object, payload: object) -> None:
    assert hooks.to_payload(value) == payload


def test_payload_that_json_cannot_say_is_a_type_error_whatever_its_fault() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value in (object(), {(1, 2): 3}, "half a pair: \ud800", endless):
        with pytest.raises(TypeError):
            hooks.to_payload(value)


def test_response_is_none_or_a_payload() -> None:
    assert hooks.to_response(None) is None
    assert hooks.to_response(0) == raw("0")


def test_response_to_a_join_is_added_up() -> None:
    response: dict[str, Any] = {}
    for answer in (None, {"a": 1, "b": 1}, {}, {"b": 2}):
        hooks.add_response(response, answer)
    assert response == {"a": 1, "b": 2}


@pytest.mark.parametrize("answer", [False, True, 0, "", [], [("a", 1)], {"a": object()}])
def test_answer_to_a_join_that_is_no_dict_for_json_is_a_fault(answer: object) -> None:
    """``return False`` must not let anybody in."""
    response: dict[str, Any] = {}
    with pytest.raises(TypeError):
        hooks.add_response(response, answer)
    assert response == {}


def test_event_names_are_checked() -> None:
    hooks.check_event("new_msg")
    for event in ("", "a:b", "phx_reply", "chan_reply_3", "x" * 256):
        with pytest.raises(ValueError, match="expected an event"):
            hooks.check_event(event)
        with pytest.raises(ValueError, match="expected an event"):
            hooks.Event("t", "e", b"").replace(event=event)


# How they are registered.


def test_plugin_collects_its_handlers_by_kind_in_order() -> None:
    plugin = Plugin("my-chat_2")

    @plugin.on_join("room:*")
    def join(join: Join) -> None: ...

    @plugin.on_leave()
    def leave(leave: Leave) -> None: ...

    @plugin.on_push("room:*", "say")
    def say(push: Push) -> None: ...

    @plugin.on_push("room:*")
    async def other(push: Push) -> None: ...

    @plugin.on_event(event="new")
    def event(event: Event) -> Event | None:
        return event

    @plugin.on_redis("feed*")
    def feed(message: RedisMessage, relay: object) -> None: ...

    @plugin.service
    async def service(relay: object) -> None: ...

    @plugin.on_startup
    def startup(relay: object) -> None: ...

    @plugin.on_shutdown
    async def shutdown(relay: object) -> None: ...

    assert plugin.hooks.freeze() == Hooks(
        join=(Hook("my-chat_2", join, "room:*"),),
        leave=(Hook("my-chat_2", leave),),
        push=(Hook("my-chat_2", say, "room:*", "say"), Hook("my-chat_2", other, "room:*")),
        event=(Hook("my-chat_2", event, event="new"),),
        redis=(Hook("my-chat_2", feed, "feed*"),),
        services=(Hook("my-chat_2", service),),
        startup=(Hook("my-chat_2", startup),),
        shutdown=(Hook("my-chat_2", shutdown),),
    )
    assert repr(plugin).startswith("<Plugin my-chat_2 (join: 1, leave: 1, push: 2, ")


@pytest.mark.parametrize("name", ["", "two words", "1st", "a.b", "a/b"])
def test_plugin_name_that_could_not_be_a_label_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a plugin name"):
        Plugin(name)


def test_plain_function_is_refused_as_a_service() -> None:
    """It could neither be waited for nor cancelled."""
    plugin = Plugin("p")

    def plain(relay: object) -> None: ...

    with pytest.raises(TypeError, match="coroutine function"):
        plugin.service(plain)  # type: ignore[type-var]
    assert plugin.hooks.freeze() == Hooks()


def test_every_hook_says_in_its_docstring_what_it_calls() -> None:
    for name in ("on_join", "on_leave", "on_push", "on_event", "on_redis", "service", "on_startup", "on_shutdown"):
        text = inspect.getdoc(getattr(Plugin, name))
        assert text is not None and "function(" in text or "handler(" in str(text), name
