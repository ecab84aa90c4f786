"""Traces by OpenTelemetry: what a socket's handshake, joins and pushes led to, and how long each step took.

Owns the spans, their names and attributes; must not know how they are exported: the operator's SDK does that. Nothing
here is used unless the setting `tracing` is on. Attributes never hold a payload, a token or an address.

All spans of a socket belong to the trace that its handshake names by ``traceparent``, or to one of their own.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qs

from relay.concurrency import Continuation
from relay.errors import BusUnavailable, ConfigError
from relay.extras import describe
from relay.protocol.serializer import Message
from relay.version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

    from relay.config_sections import Direction

Publish: TypeAlias = "Callable[[Direction, str, str, bytes, str | None], asyncio.Future[None]]"

TOPIC = "relay.topic"
EVENT = "relay.event"
SOCKET = "relay.socket"
PLUGIN = "relay.plugin"
HANDLER = "relay.handler"
OUTCOME = "relay.outcome"
"""``ok``, or why not, in the words of the counters."""

_NAME_MAX = 255
"""Characters of a topic or an event that a client sent: what is longer is refused, and not worth more memory."""


class Tracer:
    """Makes spans. Raises ConfigError where the package for it is not there."""

    def __init__(self) -> None:
        try:
            from opentelemetry import context, propagate, trace
        except ImportError:
            raise ConfigError(describe("otel", "tracing")) from None
        self.api: Any = trace
        self.context: Any = context
        self._propagate = propagate
        self._tracer = trace.get_tracer("relay", __version__)

    def start(self, name: str, context: "Context | None", kind: str, attributes: Mapping[str, str]) -> "Span":
        """Start a span under the one in ``context``, or, with None, under the current one."""
        return self._tracer.start_span(
            f"relay.{name}", context, kind=self.api.SpanKind[kind], attributes={OUTCOME: "ok", **attributes}
        )

    def note(self, outcome: str) -> None:
        """Say how the current step went, where it did not go well."""
        span = self.api.get_current_span()
        if span.is_recording():  # a token's end, say, is noticed long after the handshake that it came with
            span.set_attribute(OUTCOME, outcome)

    def begin(self, scope: Mapping[str, Any]) -> "Trace":
        """Begin with a handshake; its headers, or else its query, name the trace it belongs to.

        A page cannot set headers of a WebSocket: it says ``new Socket(url, {params: {traceparent}})``.
        """
        query = parse_qs(scope["query_string"].decode("latin-1"))
        carrier = {name: query[name][-1] for name in ("traceparent", "tracestate") if name in query}
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        return Trace(self, self._propagate.extract(headers if "traceparent" in headers else headers | carrier))

    @contextmanager
    def handler(self, plugin: str, name: str) -> Iterator[None]:
        """Around a plugin's handler: what it does meanwhile, also in its thread, is part of this span."""
        span = self.start("handler", None, "INTERNAL", {PLUGIN: plugin, HANDLER: name})
        token = self.context.attach(self.api.set_span_in_context(span))
        try:
            yield
        except BaseException as error:
            span.set_attribute(OUTCOME, type(error).__name__)  # its text may hold anything
            raise
        finally:
            self.context.detach(token)
            span.end()

    def around(self, publish: Publish) -> Publish:
        """Make of a broker's ``publish`` one that has a span until the bus has taken the message."""

        def traced(
            direction: "Direction", topic: str, event: str, payload: bytes, sender: str | None
        ) -> asyncio.Future[None]:
            span = self.start("publish", None, "PRODUCER", {TOPIC: topic, EVENT: event})
            future = publish(direction, topic, event, payload, sender)
            future.add_done_callback(partial(_published, span))
            return future

        return traced


class Trace:
    """The spans of one socket, all below its handshake's."""

    __slots__ = ("_handshake", "_socket", "_token", "_tracer", "_until", "context")

    def __init__(self, tracer: Tracer, parent: "Context") -> None:
        self._tracer = tracer
        self._socket = ""
        self._until: asyncio.Future[None] | None = None
        self._handshake: Span | None = tracer.start("handshake", parent, "SERVER", {})
        self.context: Context = tracer.api.set_span_in_context(self._handshake, parent)
        self._token = tracer.context.attach(self.context)

    def accepted(self, socket_id: str) -> None:
        """End the handshake: there is a socket."""
        self._socket = socket_id
        if self._handshake is not None:
            self._handshake.set_attribute(SOCKET, socket_id)
        self.end_handshake()

    def end_handshake(self) -> None:
        """End the handshake's span, unless it has ended; in the task that began it."""
        if self._handshake is not None:
            self._tracer.context.detach(self._token)
            self._handshake.end()
            self._handshake = None

    def note(self, outcome: str) -> None:
        """See `Tracer.note`."""
        self._tracer.note(outcome)

    def until(self, future: asyncio.Future[None]) -> None:
        """Let the span of the message that is being handled last until ``future`` is done."""
        self._until = future

    def handle(self, handle: Callable[[Message], Continuation], message: Message) -> Continuation:
        """Handle a message, with a span for a join or a push; heartbeats and leaves have none."""
        if message.topic == "phoenix" or message.event == "phx_leave":
            return handle(message)
        attributes = {SOCKET: self._socket, TOPIC: message.topic[:_NAME_MAX]}
        if message.event == "phx_join":
            span = self._tracer.start("join", self.context, "SERVER", attributes)
        else:
            attributes[EVENT] = message.event[:_NAME_MAX]
            span = self._tracer.start("push", self.context, "SERVER", attributes)
        context = self._tracer.api.set_span_in_context(span, self.context)
        token, self._until = self._tracer.context.attach(context), None
        try:
            rest = handle(message)
        finally:
            self._tracer.context.detach(token)
        if rest is not None:
            return self._finish(span, context, rest)
        if self._until is None:
            span.end()
        else:
            self._until.add_done_callback(lambda _: span.end())
        return None

    async def _finish(self, span: "Span", context: "Context", rest: Any) -> None:
        token = self._tracer.context.attach(context)
        try:
            await rest
        finally:
            self._tracer.context.detach(token)
            span.end()


def _published(span: "Span", future: asyncio.Future[None]) -> None:
    if future.cancelled() or isinstance(future.exception(), BusUnavailable):
        span.set_attribute(OUTCOME, "bus unavailable")
    span.end()
