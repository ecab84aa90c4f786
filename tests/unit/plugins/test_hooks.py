"""What handlers are given, and who is called for a topic, in which order."""

import asyncio
import inspect
import json
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from pydantic import BaseModel, computed_field

from relay import Relay
from relay.errors import RelayError
from relay.permissions import Identity, Rights
from relay.plugins import Plugin, hooks
from relay.plugins.handlers import is_async
from relay.plugins.hooks import (
    Event,
    Hook,
    Hooks,
    HookTable,
    Join,
    Joined,
    Leave,
    Push,
    PushActions,
    RedisMessage,
    Refused,
    Socket,
)
from relay.protocol.payload import Payload

SOCKET = cast(Socket, object())
NO_ACTIONS = cast(PushActions, object())


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


@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        ("[" * 256 + "]" * 256, True),
        ("[" * 257 + "]" * 257, False),
        ('{"a":' * 257 + "1" + "}" * 257, False),
        ("[" + "[]," * 5000 + "{}]", True),
        ('{"[[": "' + "[" * 5000 + '"}', True),
        ('["\\"", "' + "[{" * 5000 + '"]', True),
        ('["\\\\", ' + "[" * 256 + "]" * 256 + "]", False),
        ("[" + "[" * 200 + "]" * 200 + "," + "[" * 200 + "]" * 200 + "]", True),
    ],
)
def test_payload_is_read_down_to_256_levels(text: str, is_read: bool) -> None:
    join = Join(SOCKET, "room:1", raw(text))
    if is_read:
        assert join.payload == json.loads(text)
        return
    for _ in range(2):
        with pytest.raises(hooks.InvalidPayload, match="256 levels"):
            _ = join.payload


def test_join_push_and_leave_say_who_acts() -> None:
    """Whose token opened the topic, else whose socket it is; without any of that nobody."""
    socket = cast(Socket, SimpleNamespace(user="alice", claims={"sub": "alice"}))
    bob = Identity("bob", Rights(), {"sub": "bob"})
    for identity, user in ((None, "alice"), (bob, "bob")):
        pushed = Push(socket, "t", "e", raw("{}"), NO_ACTIONS, identity)
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
        self.listings: list[object] = []
        self.push = Push(SOCKET, "room:1", "say", raw("{}"), self)

    @property
    def relay(self) -> str:
        return "the relay"

    def check_meta(self, meta: object) -> Payload:
        return hooks.to_payload(meta)

    def track(self, key: str, meta: object, is_update: bool = False) -> None:
        self.listings.append((key, meta, is_update))

    def untrack(self, key: str | None) -> None:
        self.listings.append(key)

    def reply(self, status: str, response: object) -> None:
        self.replies.append((status, response))

    def broadcast(self, event: str, payload: object, to_all: bool) -> Awaitable[None]:
        self.broadcasts.append((event, payload, to_all))
        return asyncio.sleep(0)


def test_push_and_accepted_join_change_how_the_subscription_is_listed() -> None:
    actions = Pushed()
    for it in (actions.push, Joined(SOCKET, "room:1", raw("{}"), None, actions)):
        it.track("ada", {"a": 1})
        it.update("ada", {"a": 2})
        it.untrack("ada")
        it.untrack()
        assert actions.listings == [("ada", {"a": 1}, False), ("ada", {"a": 2}, True), "ada", None]
        actions.listings.clear()


def test_join_keeps_what_is_to_be_listed_of_it() -> None:
    join = Join(SOCKET, "room:1", raw("{}"), None, Pushed())
    assert join.meta is None
    join.set_presence({"a": 1})
    assert join.meta == hooks.to_payload({"a": 1})


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


@pytest.mark.parametrize("status", [404, None, "", "x" * 256, "é" * 128, "ok\n"])
def test_status_that_no_frame_carries_is_refused_where_the_handler_gives_it(status: Any) -> None:
    """Text frames carried some of them to clients, and bytes none: the reply was lost, and the client waited."""
    pushed = Pushed()
    with pytest.raises(ValueError, match="status: expected text of 1 to 255 bytes"):
        pushed.push.reply(b"x", status)
    assert not pushed.push.replied


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


class Lazy(Mapping[str, object]):
    """A mapping that asks a database for each value, so many times."""

    def __init__(self, error: BaseException, times: int = 0) -> None:
        self._error = error
        self._times = times

    def __getitem__(self, key: str) -> object:
        self._times -= 1
        if self._times < 0:
            raise self._error
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])

    def __len__(self) -> int:
        return 1


class Ratio(BaseModel):
    played: int = 0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rate(self) -> float:
        return 1 / self.played


def test_payload_that_json_cannot_say_is_a_type_error_whatever_its_fault() -> None:
    endless: list[Any] = []
    endless.append(endless)
    for value in (object(), {(1, 2): 3}, "half a pair: \ud800", endless, Lazy(ConnectionError("gone")), Ratio()):
        with pytest.raises(TypeError):
            hooks.to_payload(value)


def test_payload_of_a_handler_may_be_nested_as_deep_as_python_writes_it() -> None:
    nested: object = None
    for _ in range(800):
        nested = [nested]
    assert bytes(hooks.to_payload(nested)) == b"[" * 800 + b"null" + b"]" * 800
    with pytest.raises(TypeError, match="infinite"):
        hooks.to_payload([nested, {"x": [math.nan]}])


def test_response_is_none_or_a_payload() -> None:
    assert hooks.to_response(None) is None
    assert hooks.to_response(0) == raw("0")


def test_response_to_a_join_is_added_up() -> None:
    response: dict[str, Any] = {}
    for answer in (None, {"a": 1, "b": 1}, {}, {"b": 2}):
        hooks.add_response(response, answer)
    assert response == {"a": 1, "b": 2}


def test_response_to_a_join_is_read_once() -> None:
    response: dict[str, Any] = {}
    hooks.add_response(response, Lazy(ConnectionError("gone"), times=1))
    assert hooks.to_payload(response) == raw('{"a":1}')


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
    for name in (
        "on_join",
        "on_joined",
        "on_leave",
        "on_push",
        "on_event",
        "on_redis",
        "service",
        "on_startup",
        "on_shutdown",
    ):
        text = inspect.getdoc(getattr(Plugin, name))
        assert text is not None and "function(" in text or "handler(" in str(text), name


# Mistakes are told where they are made, and every kind of callable is a handler.

HOOKS = ("on_join", "on_joined", "on_leave", "on_push", "on_event", "on_redis", "service", "on_startup", "on_shutdown")
PATTERNED = HOOKS[:6]
CALLED_BARE = HOOKS[6:]


def register(plugin: Plugin, hook: str, function: Any) -> Any:
    decorator: Any = getattr(plugin, hook)
    return decorator(function) if hook in CALLED_BARE else decorator("*")(function)


class Callables:
    """One handler of every kind; each adds its name to ``calls``, and returns its first argument."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        calls = self.calls

        async def coroutine(*arguments: Any) -> Any:
            calls.append("coroutine")
            return arguments[0]

        def plain(*arguments: Any) -> Any:
            calls.append("plain")
            return arguments[0]

        async def named(name: str, *arguments: Any) -> Any:
            calls.append(name)
            return arguments[0]

        def returning(*arguments: Any) -> Any:
            return named("returning", *arguments)

        class Async:
            async def __call__(self, *arguments: Any) -> Any:
                calls.append("async object")
                return arguments[0]

            async def method(self, *arguments: Any) -> Any:
                calls.append("method")
                return arguments[0]

            @classmethod
            async def of_class(cls, *arguments: Any) -> Any:
                calls.append("class method")
                return arguments[0]

            @staticmethod
            async def static(*arguments: Any) -> Any:
                calls.append("static method")
                return arguments[0]

        @dataclass
        class Plain:
            n: int = 0

            def __call__(self, *arguments: Any) -> Any:
                calls.append("plain object without a hash")
                return arguments[0]

        @wraps(coroutine)
        def wrapped(*arguments: Any) -> Any:
            return named("wrapped", *arguments)

        async def in_static(*arguments: Any) -> Any:
            calls.append("static method object")
            return arguments[0]

        self.of_async: dict[str, Any] = {
            "coroutine": coroutine,
            "async object": Async(),
            "method": Async().method,
            "class method": Async.of_class,
            "static method": Async.static,
            "static method object": staticmethod(in_static),
            "partial": partial(named, "partial"),
            "partial of an object": partial(Async()),
        }
        self.of_plain: dict[str, Any] = {
            "plain": plain,
            "plain object without a hash": Plain(),
            "lambda": lambda *arguments: plain(*arguments),
            "lambda of a coroutine": lambda *arguments: named("lambda of a coroutine", *arguments),
            "returning": returning,
            "wrapped": wrapped,
        }


def test_one_answer_says_what_is_async_of_every_kind_of_callable() -> None:
    callables = Callables()
    for function in callables.of_async.values():
        assert is_async(function) and Hook("p", function).is_async, function
    for function in callables.of_plain.values():
        assert not is_async(function), function
    assert hash(Hook("p", callables.of_plain["plain object without a hash"]))


def test_every_kind_of_callable_may_be_registered_for_every_hook() -> None:
    for hook in HOOKS:
        callables = Callables()
        kinds = callables.of_async | ({} if hook == "service" else callables.of_plain)
        for function in kinds.values():
            assert register(Plugin("p"), hook, function) is function


@pytest.mark.parametrize("hook", PATTERNED)
def test_decorator_without_its_parentheses_is_told(hook: str) -> None:
    async def handler(given: object) -> None: ...

    plugin = Plugin("p")
    with pytest.raises(TypeError, match=rf"{hook}: expected parentheses, @plugin\.{hook}\(…\), before .*handler"):
        getattr(plugin, hook)(handler)
    assert plugin.hooks.freeze() == Hooks()


@pytest.mark.parametrize("hook", PATTERNED)
@pytest.mark.parametrize("pattern", [None, 7, b"room:*", ["room:*"]])
def test_pattern_that_is_no_text_is_told(hook: str, pattern: Any) -> None:
    with pytest.raises(TypeError, match=f"{hook}: expected a pattern as text"):
        getattr(Plugin("p"), hook)(pattern)
    with pytest.raises(ValueError, match=f"{hook}: an empty pattern"):
        getattr(Plugin("p"), hook)("")


@pytest.mark.parametrize(
    ("patterns", "written"),
    [
        (("room:{id}",), "write 'room:*' for any text there, or '[{]' for the character"),
        (("user:{sub}:*",), "write 'user:*:*'"),
        (("room:<int:id>",), "write 'room:*' for any text there, or '[<]'"),
        (("room:[a",), "write [abc] for one of these, or '[[]' for the character"),
        (("room:*\n",), "write 'room:*'"),
        (("phoenix",), "no client can join this topic"),
        (("relay",), "no client can join this topic"),
        (("room:*", "a:b"), "write the event alone, such as 'b'"),
        (("room:*", "phx_join"), "names that begin with phx_, chan_reply_ are reserved"),
        (("room:*", "[a"), "a [ that is not closed"),
        (("room:*", ""), "an empty pattern matches nothing"),
    ],
)
def test_pattern_that_cannot_match_is_refused_with_what_to_write(patterns: tuple[str, ...], written: str) -> None:
    for hook in ("on_push", "on_event") if len(patterns) == 2 else set(PATTERNED) - {"on_redis"}:
        with pytest.raises(ValueError, match=re.escape(written)) as raised:
            getattr(Plugin("p"), hook)(*patterns)
        assert str(raised.value).startswith(f"{hook}: ")
        assert patterns[-1] == "" or repr(patterns[-1]) in str(raised.value)


def test_handler_of_pushes_that_relay_takes_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="on_push: 'access_token' never matches: relay itself takes such a push"):
        Plugin("p").on_push("*", "access_token")
    for hook, event in (("on_push", "access_*"), ("on_push", "access_tokens"), ("on_event", "access_token")):
        getattr(Plugin("p"), hook)("*", event)


@pytest.mark.parametrize(
    ("pattern", "topic"),
    [
        ("room:[{]id}", "room:{id}"),
        ("[{]sub}:*", "{sub}:1"),
        ("{42}:*", "{42}:a"),
        ("a < b", "a < b"),
        ("room:[[]a", "room:[a"),
        ("room:[]a]", "room:]"),
        ("room:[!]a]", "room:b"),
        ("phoenix*", "phoenix:1"),
        ("ROOM:*", "ROOM:1"),
    ],
)
def test_pattern_of_unusual_names_is_none_that_cannot_match(pattern: str, topic: str) -> None:
    plugin = Plugin("p")
    plugin.on_join(pattern)(lambda join: None)
    [hook] = plugin.hooks.entries["join"]
    assert hook.matches(topic)


def test_pattern_of_on_redis_is_one_of_redis() -> None:
    plugin = Plugin("p")
    plugin.on_redis("feed:{id}:[^a]\\[")(lambda message, relay: None)
    assert [hook.topic for hook in plugin.hooks.entries["redis"]] == ["feed:{id}:[^a]\\["]


async def _none() -> None: ...
async def _many(a: object, b: object, c: object) -> None: ...
async def _keyword(*, join: object) -> None: ...
async def _generator(*arguments: object) -> Any:
    yield 1


def _plain_generator(*arguments: object) -> Any:
    yield 1


class _Method:
    async def handler(self, *, given: object) -> None: ...

    async def __call__(self) -> None: ...

    async def unbound(self, join: object, relay: object) -> None: ...


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("function", "word"),
    [
        (_none, r"_none \(.*test_hooks\.py:\d+\) cannot be called as handler\("),
        (_many, r"_many \(.*test_hooks\.py:\d+\) cannot be called"),
        (_keyword, "cannot be called"),
        (_Method(), "_Method object .* cannot be called"),
        (_Method().handler, r"_Method\.handler \(.*cannot be called"),
        (partial(_none), "cannot be called"),
        (partial(_many, 1, 2, 3), "cannot be called"),
        (_generator, "has a yield"),
        (_plain_generator, "has a yield"),
        (partial(_generator), "has a yield"),
        (_Method, "is a class"),
        (None, "expected a function"),
        ("handler", "expected a function"),
        (classmethod(_many), "expected a function"),
    ],
)
def test_handler_that_cannot_be_called_is_told_where_it_is_registered(hook: str, function: Any, word: str) -> None:
    plugin = Plugin("p")
    with pytest.raises(TypeError, match=f"{hook}: .*{word}"):
        register(plugin, hook, function)
    assert plugin.hooks.freeze() == Hooks()


def test_router_that_is_none_is_told() -> None:
    with pytest.raises(TypeError, match="APIRouter"):
        Plugin("p").include_router(lambda: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [_none, _many, _generator, _Method, "module:function"])
def test_authenticate_that_cannot_be_called_is_told_where_the_relay_is_made(function: Any) -> None:
    with pytest.raises(TypeError, match="authenticate: "):
        Relay(broadcast_url="memory://", authenticate=function)


def test_what_comes_after_a_relay_has_loaded_the_plugin_is_told() -> None:
    """It would never be called, and a guard of joins would let everybody in."""
    plugin = Plugin("late")
    _ = Relay(broadcast_url="memory://", extra_plugins=(plugin,))
    with pytest.raises(RelayError, match=r"on_join: expected it before a Relay loads the plugin late"):

        @plugin.on_join("room:*")
        def guard(join: Join) -> None: ...

    with pytest.raises(RelayError, match="on_startup: expected it before"):
        _ = plugin.on_startup(lambda relay: None)
    with pytest.raises(RelayError, match="include_router: expected it before"):
        plugin.include_router(SimpleNamespace(routes=[]))  # type: ignore[arg-type]
