"""The console's own WebSocket: metrics each second, topics, sockets, and the events of a topic as they pass.

Owns what operators see, and what they may do; must not know how the page shows it.

It speaks as all sockets do, over a path of its own, ``/console/socket/websocket``, with one topic, ``console``. It is
no client of the relay: it counts as no socket, asks no plugin, needs no bus, so that it works when these do not. Who
may connect is said by `relay.auth.api_key`; phoenix.js's ``authToken`` carries the API key.
"""

import asyncio
import base64
import heapq
import logging
import os
import socket as sockets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from relay.brokers.base import Event, Place
from relay.channels.socket import Socket
from relay.config_sections import Policy
from relay.errors import BusUnavailable, CloseCode, Reason, WireError
from relay.metrics import BOUNDS_S
from relay.node import Components, Node
from relay.plugins import hooks
from relay.protocol import serializer
from relay.protocol.frame import Frame
from relay.protocol.payload import classify_payload, encode_payload
from relay.protocol.serializer import Version
from relay.protocol.state import ChannelsProtocol, Join, Leave, Push, Send, Subscription
from relay.protocol.topics import is_topic
from relay.transports import handshake
from relay.transports.base import ReceiveCallable, Scope, SendCallable, Transport, TransportServices
from relay.transports.handshake import HandshakeRejected
from relay.transports.websocket import WebSocketTransport
from relay.version import __version__
from relay.web.console_series import ConsoleSeries
from relay.web.prometheus import MetricsExporter

_logger = logging.getLogger("relay.console")

PATH = "/console"
SOCKET_PATH = f"{PATH}/socket/websocket"
TOPIC = "console"

_INTERVAL_S = 1.0
"""Seconds between two sets of metrics."""
_TAIL_INTERVAL_S = 0.2
"""Seconds between two portions of a watched topic's events."""
_TAIL_MAX = 50
"""Events in one portion; further ones are counted, and not shown: people could not read them."""
_SHOWN_MAX_BYTES = 16_384
"""Of a longer event the beginning is shown."""
_STORED_MAX = 20
"""Events of a history in one answer."""
_DESCRIBE_S = 1.0
"""Seconds to find out what a history holds."""
_LISTED_MAX = 200
"""Topics, or sockets, in one answer."""


class Console:
    """What the operators of one relay see of this process.

    Args: node: the running one. Raises RelayError while there is none.
    """

    def __init__(self, components: Components, node: Callable[[], Node], exporter: MetricsExporter) -> None:
        self._components = components
        self._node = node
        self._exporter = exporter
        self._series = ConsoleSeries(exporter.read)
        self._viewers: set[ConsoleSession] = set()
        self._numbers = 0

    async def serve(self, scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
        """Serve one ``websocket`` scope from handshake to end."""
        config, metrics = self._components.config, self._components.telemetry.metrics
        # With a key no page can be made to connect in its user's name, so that any origin will do.
        shake = handshake.check(scope, "any" if config.rest.api_key else "same")
        if not isinstance(shake, HandshakeRejected):
            fault = self._components.api_key_auth.authorize(scope, (shake.auth_token or "").encode(), "console")
            if fault is not None:
                shake = HandshakeRejected(fault.status, fault.text, "console")
        if isinstance(shake, HandshakeRejected):
            metrics.refused[f"handshake: {shake.kind}"] += 1
            await handshake.refuse(scope, receive, send, shake)
            return
        await handshake.accept(receive, send, shake.subprotocol)
        self._numbers += 1
        log = self._components.telemetry.loggers.get("relay.socket")
        services = TransportServices(self._node().config.limits, metrics, log)
        transport = WebSocketTransport(f"console-{self._numbers}", scope, receive, send, services)
        viewer = ConsoleSession(transport, shake.version, self._node, self._exporter, self._series)
        self._viewers.add(viewer)
        try:
            await viewer.run()
        finally:
            self._viewers.discard(viewer)

    def start(self) -> None:
        """Begin to keep the metrics of the last minutes."""
        self._series.start()

    async def close(self) -> None:
        """Close all connections with 1012 (come back)."""
        for viewer in self._viewers:
            viewer.close()
        await self._series.stop()


class TopicObserver:
    """A subscriber of the hub that keeps what it is sent, as far as people can read it.

    Args: topic: whose events.
    """

    version: Version = Version.V2
    deflates: bool = False

    def __init__(self, topic: str) -> None:
        self.topic: str = topic
        self.left_out: int = 0
        self._events: list[dict[str, Any]] = []

    def direct_write(self) -> None:
        """Nothing that bytes could be written to."""

    def send_event(self, frame: Frame, topic: str, event: str, policy: Policy) -> None:
        """Keep an event, or count that it was left out."""
        if len(self._events) >= _TAIL_MAX:
            self.left_out += 1
            return
        self._events.append(_shown(event, frame, round(time.time() * 1000)))

    def take(self) -> list[dict[str, Any]]:
        """What has come since the last time."""
        events, self._events = self._events, []
        return events

    def subscription(self, topic: str) -> Subscription | None:
        """Nothing that a gap could end."""
        return None

    def end_subscription(self, subscription: Subscription, reason: Reason) -> bool:
        """Nothing that could be ended."""
        return False


class ConsoleSession:
    """One connection of an operator."""

    def __init__(
        self,
        transport: Transport,
        version: Version,
        node: Callable[[], Node],
        exporter: MetricsExporter,
        series: ConsoleSeries,
    ) -> None:
        self._transport = transport
        self._version = version
        self._node = node
        self._exporter = exporter
        self._series = series
        limits = node().config.limits
        self._protocol = ChannelsProtocol(
            Subscription, version, topics_max=1, payload_max_bytes=limits.payload_max_bytes
        )
        self._observer: TopicObserver | None = None

    async def run(self) -> None:
        """Serve until the connection is closed by either side."""
        transport = self._transport
        telling = asyncio.create_task(self._tell())
        try:
            while (frame := await transport.receive()) is not None:
                try:
                    message = serializer.decode(frame, self._version)
                except WireError as error:
                    transport.reject(error.code, str(error))
                    continue
                match self._protocol.receive(message):
                    case Send(answer):
                        transport.send_control(answer)
                    case Join() as join if join.subscription.topic == TOPIC:
                        self._send(*self._protocol.accept(join))
                        self._tell_all("series", {"source": self._source, **self._series.as_json()})
                        await self._send_metrics()
                    case Join() as join:
                        self._send(*self._protocol.refuse(join, encode_payload({"reason": "unmatched topic"})))
                    case Leave() as leave:
                        self._send(*self._protocol.leave(leave))
                    case Push() as push:
                        await self._answer(push)
                    case None:
                        pass
        except asyncio.CancelledError:
            if not transport.is_own_cancellation():
                raise
        finally:
            await self._watch(None)
            transport.end()
            telling.cancel()
            with suppress(asyncio.CancelledError):
                await telling

    def close(self) -> None:
        """Close the connection with 1012."""
        self._transport.close(CloseCode.RESTART, "the relay is restarting")

    def _send(self, *frames: Frame) -> None:
        for frame in frames:
            self._transport.send_control(frame)

    def _tell_all(self, event: str, payload: object) -> None:
        subscription = self._protocol.subscriptions.get(TOPIC)
        if subscription is not None:
            data = hooks.to_payload(payload)
            self._send(serializer.encode_push(self._version, subscription.join_ref, TOPIC, event, data))

    async def _tell(self) -> None:
        due = time.monotonic() + _INTERVAL_S
        while True:
            await asyncio.sleep(_TAIL_INTERVAL_S)
            if self._observer is not None and (events := self._observer.take()):
                left_out, self._observer.left_out = self._observer.left_out, 0
                self._tell_all("events", {"topic": self._observer.topic, "events": events, "left_out": left_out})
            if time.monotonic() >= due:
                due += _INTERVAL_S
                await self._send_metrics()

    @property
    def _source(self) -> str:
        """Totals can be compared with those of the same source alone: a directory, or a node in its lifetime."""
        node = self._node()
        return node.config.metrics.dir or node.name

    async def _send_metrics(self) -> None:
        node = self._node()
        metrics = await self._exporter.current()
        self._tell_all(
            "metrics",
            {
                "node": f"{sockets.gethostname()}:{os.getpid()}",
                "version": __version__,
                "at_ms": round(time.time() * 1000),
                "source": self._source,
                # Live in every worker; why not is known of this one.
                "link": {
                    "live": bool(metrics["relay_link_live"][""]),
                    "reason": node.link.reason,
                    "degraded": node.broker.degraded,
                },
                "bounds_s": BOUNDS_S,
                "metrics": metrics,
            },
        )

    # What operators ask for.

    async def _answer(self, push: Push[Subscription]) -> None:
        asked = hooks.to_payload(push.payload)
        status, response = "ok", hooks.to_payload({})
        try:
            given = hooks.Event(TOPIC, push.event, asked).payload
            if not isinstance(given, dict):
                raise hooks.Refused("expected an object")
            response = hooks.to_payload(await self._do(push.event, given))
        except hooks.Refused as refused:
            status, response = "error", refused.response
        except hooks.InvalidPayload:
            status, response = "error", encode_payload({"reason": Reason.INVALID_PAYLOAD})
        frame = self._protocol.reply(push, status, response)
        if frame is not None:
            self._send(frame)

    async def _do(self, what: str, given: dict[str, Any]) -> object:
        match what:
            case "topics":
                return self._topics(_text(given, "search"))
            case "topic":
                return await self._topic(_text(given, "topic"))
            case "history":
                return await self._history(_text(given, "topic"))
            case "watch":
                await self._watch(_text(given, "topic") or None)
                return {}
            case "sockets":
                return self._sockets(_text(given, "search"))
            case "socket":
                return self._socket(_text(given, "id"))
            case "disconnect":
                return self._disconnect(_text(given, "id"))
            case "publish":
                return await self._publish(_text(given, "topic"), _text(given, "event"), given.get("payload", {}))
            case _:
                raise hooks.Refused("unknown")

    def _topics(self, search: str) -> object:
        """Those whose names contain ``search``, the most joined first."""
        hub, needle = self._node().hub, search.lower()
        found = [(count, name) for name, count in hub.topics().items() if needle in name.lower()]
        first = heapq.nsmallest(_LISTED_MAX, found, key=lambda one: (-one[0], one[1]))
        return {"total": len(found), "topics": [self._row(name, count) for count, name in first]}

    def _row(self, name: str, count: int) -> dict[str, Any]:
        traffic = self._node().hub.stats(name)
        events, rate = traffic or (0, 0.0)
        return {"topic": name, "sockets": count, "events": events, "events_per_s": round(rate, 2)}

    async def _topic(self, topic: str) -> object:
        joined = [socket for socket in self._node().sockets.values() if socket.subscription(topic)]
        ids = [{"id": socket.id, "address": socket.address, "user": socket.user} for socket in joined[:_LISTED_MAX]]
        row = self._row(topic, len(joined))
        history, members = await asyncio.gather(self._describe_history(topic), self._describe_members(topic))
        return {**row, "joined": ids, "history": history, "presence": members}

    async def _describe_members(self, topic: str) -> object:
        """The members on all nodes, those with the first keys; None where the topic has no presence."""
        node, presence = self._node(), self._node().config.topic(topic).presence
        if not presence:
            return None
        try:
            async with asyncio.timeout(_DESCRIBE_S):
                if presence == "count":
                    return {"count": await node.presence_count(topic), "members": [], "unavailable": None}
                found = await node.presence_members(topic)
        except (TimeoutError, BusUnavailable) as error:
            return {"count": None, "members": [], "unavailable": str(error) or f"no answer within {_DESCRIBE_S:g} s"}
        first = heapq.nsmallest(_LISTED_MAX, found.values(), key=lambda member: member.key)
        members = [{"key": member.key, "meta": member.meta.decode()} for member in first]
        return {"count": len(found), "members": members, "unavailable": None}

    async def _describe_history(self, topic: str) -> object:
        reader = self._node().history_of(topic)
        if reader is None:
            return None
        try:
            async with asyncio.timeout(_DESCRIBE_S):  # the rest is shown while Redis hangs
                return (await reader.describe(topic))._asdict()
        except TimeoutError:
            return reader.empty(topic)._replace(unavailable=f"no answer within {_DESCRIBE_S:g} s")._asdict()

    async def _history(self, topic: str) -> object:
        """The last events of a topic's history, as they are stored, the oldest first."""
        reader = self._node().history_of(topic)
        if reader is None:
            raise hooks.Refused(f"topic {topic!r} has no history")
        try:
            stored = await reader.newest(topic, _STORED_MAX)
        except BusUnavailable as error:
            raise hooks.Refused(f"history unavailable: {error}") from None
        return {"topic": topic, "events": [_stored(event) for event in stored.events]}

    async def _watch(self, topic: str | None) -> None:
        """Begin to tell the events of a topic, in place of those of another."""
        node = self._node()
        if self._observer is not None:
            observer, self._observer = self._observer, None
            if node.hub.remove(observer.topic, observer):
                node.pubsub.unsubscribe(observer.topic)
        if topic is None:
            return
        if not is_topic(topic):
            raise hooks.Refused(f"no topic: {topic!r}")
        observer = self._observer = TopicObserver(topic)
        try:
            async with node.pubsub.subscribe(topic):
                node.hub.add_observer(topic, observer)
        except BusUnavailable as error:
            self._observer = None
            raise hooks.Refused(f"bus unavailable: {error}") from None

    def _sockets(self, search: str) -> object:
        """Those whose ids, users, addresses or topics contain ``search``, those with the most waiting first."""
        needle = search.lower()
        found = [
            socket
            for socket in self._node().sockets.values()
            if not needle
            or needle in socket.id
            or needle in (socket.user or "").lower()
            or needle in (socket.address or "")
            or any(needle in topic.lower() for topic in socket.topics)
        ]
        first = heapq.nlargest(_LISTED_MAX, found, key=lambda socket: (socket.queued_bytes, socket.dropped))
        return {"total": len(found), "sockets": [self._facts(socket) for socket in first]}

    def _socket(self, socket_id: str) -> object:
        socket = self._node().socket(socket_id)
        if socket is None:
            raise hooks.Refused(f"no socket {socket_id!r} here")
        return {**self._facts(socket), "positions": self._positions(socket)}

    def _positions(self, socket: Socket) -> dict[str, object]:
        """By topic with a history, how far the socket has been given its events."""
        history = self._node().pubsub.history
        found: dict[str, object] = {}
        for topic in socket.topics[:_LISTED_MAX] if history is not None else ():
            channel = socket.subscription(topic)
            if history is not None and channel is not None and history.settings(topic) is not None:
                behind = channel.recovered_to
                place = history.delivered(topic) if behind is None else behind
                found[topic] = {"position": place and str(place), "is_catching_up": behind is not None}
        return found

    def _facts(self, socket: Socket) -> dict[str, object]:
        now = time.monotonic()
        return {
            "id": socket.id,
            "user": socket.user,
            "address": socket.address,
            "version": socket.version,
            "path": socket.write_mode,
            "outbox_bytes": socket.queued_bytes,
            "missed": socket.dropped,
            "open_s": round(now - socket.opened_at, 1),
            "idle_s": round(socket.idle_s(now), 1),
            "topics": socket.topics[:_LISTED_MAX],
        }

    def _disconnect(self, socket_id: str) -> object:
        if not self._node().disconnect(socket_id):
            raise hooks.Refused(f"no socket {socket_id!r} here")
        _logger.info("socket %s: disconnected at the console, by %s", socket_id, self._transport.address)
        return {}

    async def _publish(self, topic: str, event: str, payload: object) -> object:
        try:
            await self._node().publish(topic, event, payload)
        except ValueError as error:
            raise hooks.Refused(str(error)) from None
        except BusUnavailable as error:
            raise hooks.Refused(f"bus unavailable: {error}") from None
        _logger.info("event %r published to topic %r at the console, by %s", event, topic, self._transport.address)
        return {}


def _shown(event: str, frame: Frame, at_ms: int) -> dict[str, Any]:
    """An event, as far as people can read it."""
    shown = {"at_ms": at_ms, "event": event, "size": frame.size}
    if frame.is_text:
        shown["frame"] = frame.data[:_SHOWN_MAX_BYTES].decode(errors="ignore")
    else:
        shown["base64"] = base64.b64encode(frame.data[:_SHOWN_MAX_BYTES]).decode()
    return shown


def _stored(event: Event) -> dict[str, Any]:
    """An event of a history, with its position; the time is that of the bus."""
    frame = serializer.encode_broadcast(Version.V2, event.topic, event.event, classify_payload(event.payload))
    return {**_shown(event.event, frame, Place.of(str(event.position)).ms), "position": event.position}


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name, "")
    if not isinstance(value, str):
        raise hooks.Refused(f"{name}: expected text")
    return value
