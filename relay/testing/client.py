"""`Socket` and `Channel`: one client of a relay in the same process, over ASGI.

Owns one connection, and what came of each topic and was not expected yet; must not know how the application is started.
"""

import asyncio
import json
from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from itertools import count
from typing import Any
from urllib.parse import urlencode

from relay.errors import RelayError
from relay.plugins.hooks import Refused, to_payload
from relay.protocol.serializer import BinaryKind

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

WITHIN_S = 5.0
"""Seconds for an answer or an event, unless a test says otherwise."""

NOTHING_S = 0.1
"""Seconds in which nothing may come, unless a test says otherwise."""

_SHOWN_MAX = 10


class ConnectionRefused(RelayError):
    """The relay has refused the connection, with an HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status: int = status
        """Such as 401 for a wrong token, 403 for an origin."""


class Socket:
    """One client: `join` gives its topics. Made by `connect`."""

    def __init__(self, app: App, scope: Message, within_s: float) -> None:
        self.within_s: float = within_s
        """Seconds for an answer or an event."""
        self.closed_with: int | None = None
        """The close code, once the relay has closed the connection."""
        self._app = app
        self._scope = scope
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refusal: tuple[int, list[bytes]] | None = None
        self._channels: dict[str, Channel] = {}
        self._replies: dict[str, asyncio.Future[tuple[str, Any]]] = {}
        self._refs = map(str, count(1))
        self._closed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def _open(self) -> None:
        """Connect. Raises ConnectionRefused."""
        self._incoming.put_nowait({"type": "websocket.connect"})
        self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(self.within_s):
                await self._accepted
        except BaseException:
            await self.close()
            raise

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._incoming.get, self._send)
        except Exception as error:
            if self._accepted.done():
                raise
            self._accepted.set_exception(error)
        finally:
            self._end(None)
            if not self._accepted.done():
                self._accepted.set_exception(RelayError("the application answered no WebSocket at this path"))

    async def close(self) -> None:
        """Close the connection, as a browser that is closed does."""
        task, self._task = self._task, None
        if task is not None:
            self._incoming.put_nowait({"type": "websocket.disconnect", "code": 1001, "reason": ""})
            await task

    async def join(self, topic: str, payload: object = None) -> "Channel":
        """Join a topic; ``payload`` are the join's params. Raises Refused, with the reply's reason."""
        channel = Channel(self, topic, next(self._refs))
        previous = self._channels.get(topic)
        self._channels[topic] = channel
        try:
            channel.response = await channel._ask("phx_join", {} if payload is None else payload, channel._join_ref)
        except BaseException:
            del self._channels[topic]
            if previous is not None:
                self._channels[topic] = previous
            raise
        return channel

    async def expect_closed(self, code: int | None = None) -> int:
        """Wait until the relay closes the connection. Returns the close code. Raises AssertionError."""
        try:
            async with asyncio.timeout(self.within_s):
                await self._closed.wait()
        except TimeoutError:
            raise AssertionError(f"expected the connection to be closed within {self.within_s:g} s") from None
        found = self.closed_with or 1006
        assert code is None or found == code, f"expected close code {code}, got {found}"
        return found

    # What goes and comes.

    async def _ask(self, join_ref: str, ref: str, topic: str, event: str, payload: object) -> Any:
        if self._closed.is_set():
            raise RelayError("the connection is closed")
        reply = self._replies[ref] = asyncio.get_running_loop().create_future()
        data = to_payload(payload)
        if isinstance(data, bytes):
            fields = [part.encode() for part in (join_ref, ref, topic, event)]
            head = bytes((BinaryKind.PUSH, *map(len, fields)))
            self._incoming.put_nowait({"type": "websocket.receive", "bytes": head + b"".join(fields) + data})
        else:
            text = f"{json.dumps([join_ref, ref, topic, event])[:-1]},{bytes(data).decode()}]"
            self._incoming.put_nowait({"type": "websocket.receive", "text": text})
        try:
            async with asyncio.timeout(self.within_s):
                status, response = await reply
        except TimeoutError:
            raise AssertionError(
                f"expected a reply to {event!r} on topic {topic!r} within {self.within_s:g} s"
            ) from None
        finally:
            del self._replies[ref]
        if status != "ok":
            details = dict(response) if isinstance(response, dict) else {"response": response}
            raise Refused(str(details.pop("reason", status)), **details)
        return response

    async def _send(self, message: Message) -> None:
        match message["type"]:
            case "websocket.accept":
                self._accepted.set_result(None)
            case "websocket.send":
                self._receive(message)
            case "websocket.close":
                code = message.get("code", 1000)
                if not self._accepted.done():
                    self._accepted.set_exception(ConnectionRefused(403, message.get("reason") or f"closed with {code}"))
                else:
                    self._incoming.put_nowait({"type": "websocket.disconnect", "code": code, "reason": ""})
                self._end(code)
            case "websocket.http.response.start":
                self._refusal = message["status"], []
            case "websocket.http.response.body" if self._refusal is not None:
                status, body = self._refusal
                body.append(message.get("body", b""))
                if not message.get("more_body", False):
                    text = b"".join(body).decode(errors="replace").strip()
                    self._accepted.set_exception(ConnectionRefused(status, text))

    def _end(self, code: int | None) -> None:
        self.closed_with = self.closed_with if code is None else code
        self._closed.set()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(RelayError(f"the connection was closed with {self.closed_with or 1006}"))
        for channel in self._channels.values():
            channel._wake()

    def _receive(self, message: Message) -> None:
        text, data = message.get("text"), message.get("bytes")
        join_ref, ref, topic, event, payload = json.loads(text) if text is not None else _decode_binary(data or b"")
        if event == "phx_reply" and ref in self._replies:
            if not self._replies[ref].done():
                self._replies[ref].set_result((payload["status"], payload["response"]))
            return
        channel = self._channels.get(topic)
        if channel is not None and join_ref in (None, channel._join_ref):
            channel._receive(event, payload)


def _decode_binary(data: bytes) -> tuple[str | None, str | None, str, str, Any]:
    kind = BinaryKind(data[0])
    lengths = {BinaryKind.PUSH: 3, BinaryKind.REPLY: 4, BinaryKind.BROADCAST: 2}[kind]
    parts: list[str] = []
    at = 1 + lengths
    for length in data[1 : 1 + lengths]:
        parts.append(data[at : at + length].decode())
        at += length
    if kind is BinaryKind.REPLY:
        return parts[0], parts[1], parts[2], "phx_reply", {"status": parts[3], "response": data[at:]}
    join_ref = parts.pop(0) if kind is BinaryKind.PUSH else None
    return join_ref, None, parts[0], parts[1], data[at:]


class Channel:
    """One joined topic. Events wait here until they are expected."""

    def __init__(self, socket: Socket, topic: str, join_ref: str) -> None:
        self.topic: str = topic
        self.response: Any = None
        """What the reply to the join said."""
        self.received: list[tuple[str, Any]] = []
        """Events that came and were not expected yet: name and payload."""
        self._socket = socket
        self._join_ref = join_ref
        self._arrived = asyncio.Event()

    async def push(self, event: str, payload: object = None) -> Any:
        """Push an event; ``payload`` as of `Relay.publish`. Returns the reply's response. Raises Refused."""
        return await self._ask(event, {} if payload is None else payload)

    async def leave(self) -> None:
        """Leave the topic."""
        await self._ask("phx_leave", {})

    async def _ask(self, event: str, payload: object, ref: str | None = None) -> Any:
        return await self._socket._ask(self._join_ref, ref or next(self._socket._refs), self.topic, event, payload)

    async def expect(self, event: str, *payload: Any, within_s: float | None = None, **members: Any) -> Any:
        """Wait for an event; those that came before it and are something else stay for later.

        ``expect("new_msg", text="hi")`` takes the first ``new_msg`` whose payload has this member;
        ``expect("new_msg", {"text": "hi"})`` one with exactly this payload. The end of a subscription is the event
        ``phx_error`` or ``phx_close``.

        Returns: the payload: JSON, decoded, or bytes.
        Raises:  AssertionError: it has not come within ``within_s``; the text lists what came instead.
        """
        limit_s = self._socket.within_s if within_s is None else within_s
        try:
            async with asyncio.timeout(limit_s):
                while (found := self._take(event, payload, members)) is None:
                    if self._socket._closed.is_set():
                        break
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            found = None
        if found is None:
            closed = self._socket._closed.is_set()
            end = f"; the connection was closed with {self._socket.closed_with or 1006}" if closed else ""
            raise AssertionError(
                f"expected {_describe(event, payload, members)} on topic {self.topic!r} within {limit_s:g} s, "
                f"got {self._list()}{end}"
            )
        return found[0]

    async def expect_nothing(
        self, event: str | None = None, *payload: Any, within_s: float = NOTHING_S, **members: Any
    ) -> None:
        """Check that no event comes, or none like this; of those that came and were not expected, too.

        Raises: AssertionError: one has come.
        """
        try:
            async with asyncio.timeout(within_s):
                while not (self.received if event is None else self._find(event, payload, members)):
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return
        what = "no event" if event is None else f"no {_describe(event, payload, members)}"
        raise AssertionError(f"expected {what} on topic {self.topic!r}, got {self._list()}")

    def _receive(self, event: str, payload: Any) -> None:
        self.received.append((event, payload))
        self._wake()

    def _wake(self) -> None:
        self._arrived.set()

    def _find(self, event: str, payload: tuple[Any, ...], members: Mapping[str, Any]) -> list[int]:
        return [
            at
            for at, (name, came) in enumerate(self.received)
            if name == event
            and (not payload or came == payload[0])
            and (
                not members
                or (
                    isinstance(came, dict) and all(key in came and came[key] == value for key, value in members.items())
                )
            )
        ]

    def _take(self, event: str, payload: tuple[Any, ...], members: Mapping[str, Any]) -> tuple[Any] | None:
        found = self._find(event, payload, members)
        return (self.received.pop(found[0])[1],) if found else None

    def _list(self) -> str:
        if not self.received:
            return "nothing"
        shown = [f"{event} {payload!r}" for event, payload in self.received[-_SHOWN_MAX:]]
        return ", ".join(shown)


def _describe(event: str, payload: tuple[Any, ...], members: Mapping[str, Any]) -> str:
    parts = [*(repr(one) for one in payload), *(f"{name}={value!r}" for name, value in members.items())]
    return f"event {event!r}" + (f" with {', '.join(parts)}" if parts else "")


def make_scope(
    path: str, params: Mapping[str, str], headers: Mapping[str, str], token: str | None
) -> MutableMapping[str, Any]:
    """The ASGI scope of an upgrade request."""
    given = {"host": "localhost", **{name.lower(): value for name, value in headers.items()}}
    subprotocols: list[str] = []
    if token is not None:
        encoded = urlsafe_b64encode(token.encode()).decode().rstrip("=")
        subprotocols = ["phoenix", f"base64url.bearer.phx.{encoded}"]
        given["sec-websocket-protocol"] = ", ".join(subprotocols)
    return {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": urlencode({"vsn": "2.0.0", **params}).encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 50000),
        "server": ("localhost", 80),
        "subprotocols": subprotocols,
        "state": {},
        "extensions": {"websocket.http.response": {}},
    }
