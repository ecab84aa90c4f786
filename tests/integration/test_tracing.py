"""Traces of a real relay, as OpenTelemetry's SDK has them."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from websockets.exceptions import InvalidStatus

from relay import Join, Plugin, Push, Refused
from relay.config_sections import Direction
from relay.errors import BusUnavailable, ConfigError
from relay.tracing import Tracer
from tests.support.client import Client
from tests.support.keys import SECRET, token
from tests.support.long_poll import Poller
from tests.support.patience import PATIENCE
from tests.support.process import RelayProcess
from tests.support.serving import Served, eventually
from tests.support.sse import Stream

ServeRelay = Callable[..., Awaitable[Served]]

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(scope="session")
def exporter() -> InMemorySpanExporter:
    """The process has one provider, which cannot be replaced."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Callable[..., list[ReadableSpan]]:
    exporter.clear()

    def find(name: str = "", **attributes: str) -> list[ReadableSpan]:
        """Spans that have ended, in this order; ``topic="x"`` stands for the attribute ``relay.topic``."""
        wanted = {f"relay.{key}": value for key, value in attributes.items()}
        return [
            span
            for span in exporter.get_finished_spans()
            if span.name.removeprefix("relay.") == (name or span.name.removeprefix("relay."))
            and dict(span.attributes or {}).items() >= wanted.items()
        ]

    return find


Spans = Callable[..., list[ReadableSpan]]


def parent_of(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def id_of(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def chat() -> Plugin:
    plugin = Plugin("chat")

    @plugin.on_join("room:*")
    async def join(join: Join) -> None:
        if join.topic == "room:closed":
            raise Refused("the secret reason")

    @plugin.on_push("room:*", "shout")
    def shout(push: Push) -> None:  # in a thread
        trace.get_tracer("team").start_span("team's own").end()

    @plugin.on_push("room:*", "fails")
    async def fails(push: Push) -> None:
        raise RuntimeError("secret")

    return plugin


@pytest.mark.parametrize("way", ["header", "query"])
async def test_traceparent_of_the_handshake_is_the_parent_of_all(
    serve_relay: ServeRelay, spans: Spans, way: str
) -> None:
    served = await serve_relay(tracing=True)
    options: dict[str, Any] = (
        {"additional_headers": {"traceparent": TRACEPARENT}}
        if way == "header"
        else {"query": f"traceparent={TRACEPARENT}"}
    )
    async with Client.connect(served.ws, **options) as client:
        ref = await client.join("room:1")
        assert (await client.push(ref, "room:1", "shout", {"text": "secret"}))["status"] == "ok"
        await client.expect_alive()
        await client.send(ref, "99", "room:1", "phx_leave", {})
        await eventually(lambda: spans("push"), "the push's span")
    (handshake,), (join,), (push,), (publish,) = (spans(name) for name in ("handshake", "join", "push", "publish"))
    assert {span.context.trace_id for span in spans() if span.context} == {int(TRACE, 16)}
    assert parent_of(handshake) == int(PARENT, 16)
    assert parent_of(join) == parent_of(push) == id_of(handshake)
    assert parent_of(publish) == id_of(push)
    assert len(spans()) == 4, "heartbeats and leaves have none"
    socket = (handshake.attributes or {})["relay.socket"]
    assert join.attributes == {"relay.socket": socket, "relay.topic": "room:1", "relay.outcome": "ok"}
    assert push.attributes == {**join.attributes, "relay.event": "shout"}
    assert publish.attributes == {"relay.topic": "room:1", "relay.event": "shout", "relay.outcome": "ok"}
    assert push.start_time and publish.end_time and push.end_time
    assert push.start_time <= publish.start_time <= publish.end_time <= push.end_time  # type: ignore[operator]


async def test_streams_have_spans_of_their_request_and_joins(serve_relay: ServeRelay, spans: Spans) -> None:
    served = await serve_relay(tracing=True)
    async with Stream.open(served.ws, "room:1", headers={"traceparent": TRACEPARENT}) as stream:
        assert stream.status == 200
    async with Stream.open(served.ws, "phoenix") as stream:
        assert stream.status == 400
    accepted, refused = spans("handshake")
    (join,) = spans("join")
    assert parent_of(accepted) == int(PARENT, 16)
    assert parent_of(join) == id_of(accepted)
    assert (refused.attributes or {})["relay.outcome"] == "topics"


async def test_long_polling_clients_have_spans_of_their_session_and_not_of_each_request(
    serve_relay: ServeRelay, spans: Spans
) -> None:
    served = await serve_relay(tracing=True)
    async with Poller.connect(served.ws, headers={"traceparent": TRACEPARENT}) as poller:
        ref = await poller.join("room:1")
        assert (await poller.push(ref, "room:1", "shout", {"text": "secret"}))["status"] == "ok"
        await poller.expect_alive()
    async with Poller.connect(served.ws, opens=False, vsn="9.0.0") as refused:
        assert (await refused.open())["status"] == 403
    await eventually(lambda: len(spans()) >= 5, "the spans to end")
    (accepted, rejected), (join,), (push,), (publish,) = (
        spans(name) for name in ("handshake", "join", "push", "publish")
    )
    assert len(spans()) == 5
    assert parent_of(accepted) == int(PARENT, 16)
    assert parent_of(join) == parent_of(push) == id_of(accepted)
    assert parent_of(publish) == id_of(push)
    assert accepted.attributes == {"relay.socket": poller.socket_id, "relay.outcome": "ok"}
    assert (rejected.attributes or {})["relay.outcome"] == "version"


async def test_handlers_have_spans_and_what_they_do_is_below(serve_relay: ServeRelay, spans: Spans) -> None:
    served = await serve_relay(tracing=True, extra_plugins=(chat(),))
    async with Client.connect(served.ws) as client:
        ref = await client.join("room:1")
        await client.push(ref, "room:1", "shout", {})
        await client.push(ref, "room:1", "fails", {})
        await client.send("1", "2", "room:closed", "phx_join", {})
        await client.receive()
        await eventually(lambda: spans("join", topic="room:closed"), "the last span")
    shout = spans("push", event="shout")[0]
    (handler,) = spans("handler", handler="chat.<locals>.shout")
    assert parent_of(handler) == id_of(shout)
    assert parent_of(spans("team's own")[0]) == id_of(handler), "also in a thread"
    assert parent_of(spans("publish")[0]) == id_of(shout)
    assert spans("handler", handler="chat.<locals>.fails", plugin="chat", outcome="HandlerError")
    assert spans("push", event="fails", outcome="internal error")
    assert spans("join", topic="room:closed", outcome="by a plugin")
    assert spans("handler", handler="chat.<locals>.join", outcome="Refused")
    for span in spans():
        assert "secret" not in span.to_json()


async def test_refusals_are_outcomes(serve_relay: ServeRelay, spans: Spans) -> None:
    served = await serve_relay(tracing=True, auth={"keys": [SECRET]})
    with pytest.raises(InvalidStatus):
        async with Client.connect(served.ws, query="token=secret"):
            pass
    assert spans("handshake", outcome="token")
    made = token("ada", {"room:1": "join"})
    async with Client.connect(served.ws, query=f"token={made}") as client:
        ref = await client.join("room:1")
        assert (await client.push(ref, "room:1", "shout", {}))["status"] == "error"
        await client.send("1", "2", "room:2", "phx_join", {"token": "secret"})
        await client.receive()
        assert (await client.push("1", "room:3", "shout", {}))["status"] == "error"
        await client.expect_alive()
    assert spans("push", topic="room:1", outcome="unauthorized")
    assert spans("join", topic="room:2", outcome="invalid token")
    assert spans("push", topic="room:3", outcome="unmatched topic")
    for span in spans():
        assert "secret" not in span.to_json() and made not in span.to_json()


async def test_publish_of_the_team_s_own_code_is_part_of_its_trace(serve_relay: ServeRelay, spans: Spans) -> None:
    served = await serve_relay(tracing=True)
    with trace.get_tracer("team").start_as_current_span("request") as request:
        await served.relay.broadcast("room:1", "new_msg", {})
    await eventually(lambda: spans("publish"), "its end")
    assert parent_of(spans("publish")[0]) == request.get_span_context().span_id


async def test_push_that_the_bus_does_not_take_says_so(spans: Spans) -> None:
    def publish(
        direction: Direction, topic: str, event: str, payload: bytes, sender: str | None
    ) -> asyncio.Future[None]:
        future = asyncio.get_running_loop().create_future()
        future.set_exception(BusUnavailable("gone"))
        return future

    with pytest.raises(BusUnavailable):
        await Tracer().around(publish)(Direction.FROM, "room:1", "shout", b"{}", None)
    await eventually(lambda: spans("publish", outcome="bus unavailable"), "its end")


async def test_no_spans_unless_asked_for(serve_relay: ServeRelay, spans: Spans) -> None:
    served = await serve_relay()
    async with Client.connect(served.ws) as client:
        ref = await client.join("room:1")
        await client.push(ref, "room:1", "shout", {})
    assert not spans()


async def test_token_that_expires_later_is_no_outcome_of_its_handshake(
    serve_relay: ServeRelay, spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve_relay(tracing=True, auth={"keys": [SECRET], "expiry_grace_s": 0.1, "leeway_s": 0})
    async with Client.connect(
        served.ws, query=f"token={token('ada', {'room:1': 'join'}, ttl_s=2 * PATIENCE)}"
    ) as client:
        await client.join("room:1")
        assert (await client.receive())[3] == "phx_error"
        await client.expect_closed()
    assert spans("handshake", outcome="ok") and spans("join", outcome="ok")
    assert "ended span" not in caplog.text


def test_relay_without_tracing_imports_nothing_for_it() -> None:
    code = "import relay.app, relay.cli, relay.node, sys; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_is_needed_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"^tracing needs OpenTelemetry: install starlette-relay\[otel\]$"):
        Tracer()


async def test_opentelemetrys_own_launcher_brings_the_spans_out() -> None:
    """``opentelemetry-instrument relay serve``, as docs/operations.md has it, with the exporter that prints."""
    environ = {
        "RELAY_TRACING": "true",
        "OTEL_SERVICE_NAME": "relay",
        "OTEL_TRACES_EXPORTER": "console",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
    }
    launcher = str(Path(sys.executable).with_name("opentelemetry-instrument"))
    with RelayProcess(environ=environ, under=(launcher,)) as relay:
        async with Client.connect(relay.ws, additional_headers={"traceparent": TRACEPARENT}) as client:
            join_ref = await client.join("room:1")
            assert (await client.push(join_ref, "room:1", "shout"))["status"] == "ok"
        assert relay.stop() == 0
    names = re.findall(r'^    "name": "relay\.(\w+)"', relay.output, re.MULTILINE)
    assert sorted(names) == ["handshake", "join", "publish", "push"]
    assert relay.output.count(f'"trace_id": "0x{TRACE}"') == 4
    assert relay.output.count('"service.name": "relay"') == 4
