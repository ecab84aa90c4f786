"""One connection to the server, kept until its ``async with`` block is left, and the topics joined over it."""

import asyncio
import base64
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from socket import inet_aton
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.http11 import Response
from websockets.typing import Subprotocol

from relay_client.channel import Channel
from relay_client.errors import ConnectError, PushError
from relay_client.events import EventQueue, Overflow
from relay_client.link import Fresh, Link, log, value_of
from relay_client.position import Tracker
from relay_client.presence import Presence
from relay_client.wire import VSN, Message, check_text, decode, names_in

NORMAL = 1000
"""The close code that means: do not come back."""

CLOSE_TIMEOUT_S = 1.0
"""How long the server may take to answer a close."""

_LATE_S = 0.01
"""A timer that is later than this was kept waiting by the event loop."""

TURN_FRAMES = 100
"""After so many frames the loops over the topics get their turn, however many more have arrived."""


def reconnect_s(tries: int) -> float:
    """Seconds before try number ``tries``: anything within a window that grows from 1 s to 10 s.

    The whole window is random: a restarted server meets its clients spread over it, and not in waves.
    """
    return random.uniform(0, min(10.0, 0.5 * 2 ** min(tries, 10)))


def rejoin_s(tries: int) -> float:
    """The same for a topic that is joined again: within 1, 2, 5, then 10 s."""
    return random.uniform(0, (1.0, 2.0, 5.0, 10.0)[min(tries, 4) - 1])


class Socket:
    """A connection to the server. Entering the block connects once; a lost connection is restored automatically.

    The socket does not reconnect if the server closes it with code 1000.

    Args:       url: address of the socket, without ``/websocket``: ``ws://localhost:8000/socket``.
                token: a secret, sent beside the subprotocol; or a function, sync or async, called for each connection.
                params: query parameters of the URL; or a function, likewise.
                timeout_s: seconds for a connection, a join, or the reply to a push.
                heartbeat_s: seconds between heartbeats; one that is not answered in time causes a reconnect.
                reconnect_s: function that returns the seconds before the n-th attempt (n from 1) to reconnect.
                rejoin_s: the same for the n-th attempt to rejoin a topic over an open connection.
                options: further options of ``websockets.connect``: ``ssl``, ``additional_headers``, ``max_size``, …
                    Unless ``proxy`` is among them, connections to this machine ignore ``HTTP_PROXY``.
    Raises:     ValueError, TypeError: an address or a header that cannot be sent.
    Attributes: reconnects: number of reconnects.
                undecodable: number of received frames that are not valid Phoenix V2; each is logged.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Fresh[str | None] = None,
        params: Fresh[Mapping[str, str] | None] = None,
        timeout_s: float = 10.0,
        heartbeat_s: float = 30.0,
        reconnect_s: Callable[[int], float] = reconnect_s,
        rejoin_s: Callable[[int], float] = rejoin_s,
        **options: Any,
    ) -> None:
        if not url.isprintable():  # half a surrogate pair is not printable either
            raise ValueError("url: expected text without control characters")
        if not (urlsplit(url).hostname and urlsplit(url).scheme in ("ws", "wss", "http", "https")):
            raise ValueError("url: expected ws://host/path or wss://host/path")
        _check_headers(options.get("additional_headers"))
        self.reconnects = 0
        self.undecodable = 0
        self._url = url
        self._token = token
        self._params = params
        self._timeout_s = timeout_s
        self._heartbeat_s = heartbeat_s
        self._reconnect_s = reconnect_s
        self._rejoin_s = rejoin_s
        self._options = options
        self._tries = 0
        self._link = Link()
        self._channels: dict[str, Channel] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def is_connected(self) -> bool:
        """Whether the socket is connected."""
        return self._link.is_open

    def join(
        self,
        topic: str,
        params: Fresh[Mapping[str, Any]] | None = None,
        *,
        limit: int = 1000,
        overflow: Overflow | None = None,
        recover: bool | str = False,
        last: int | None = None,
        presence: Mapping[str, Any] | None = None,
    ) -> Channel:
        """Return a channel, which joins its topic in an ``async with`` block. A socket joins a topic once at a time.

        Args: params: sent with the join; or a function, sync or async, called for each join and rejoin.
              limit: number of events that may be queued for the loop.
              overflow: what happens if more are queued: ``"drop-oldest"``, ``"latest"`` or ``"raise"``; by default
                  ``"drop-oldest"``, or ``"recover"`` if events are recovered.
              recover: True recovers the events that were missed from the topic's history after each rejoin, so that
                  the loop gets each event once and in order, and an event `Recovered` or `Lost` before them. A position
                  (`Event.position`) recovers those since an earlier run too.
              last: number of the newest events that the loop gets first, 1 or more; implies ``recover``.
              presence: what the other members are shown of this one, sent as ``presence`` in the params; ``{}`` for
                  nothing. `Channel.presence` has the members then, and the loop does not get the events about them.
        Raises: ValueError, TypeError: a topic that cannot be sent; ``recover`` with an ``overflow`` that drops events.
        """
        _ = check_text("topic", topic)
        recovers = recover is not False or last is not None
        overflow = overflow or ("recover" if recovers else "drop-oldest")
        if recovers and overflow in ("drop-oldest", "latest"):
            raise ValueError(f"overflow: expected recover or raise where events are recovered, got {overflow!r}")
        if overflow == "recover" and not recovers:
            raise ValueError("overflow: expected recover=True with it")
        if last is not None and last < 1:
            raise ValueError(f"last: expected 1 or more, got {last}")
        queue = EventQueue(topic, limit, overflow)
        position = recover if isinstance(recover, str) else None
        joined_with: Fresh[Mapping[str, Any]] = {} if params is None else params
        if presence:
            joined_with = partial(_with_presence, joined_with, dict(presence))
        return Channel(
            self._link,
            self._channels,
            topic,
            joined_with,
            queue=queue,
            tracker=Tracker(queue, position, last) if recovers else None,
            presence=None if presence is None else Presence(),
            timeout_s=self._timeout_s,
            rejoin_s=self._rejoin_s,
        )

    async def __aenter__(self) -> Self:
        """Connect. Raises ConnectError at the first failure: only an established connection is retried."""
        if self._task is not None:
            raise RuntimeError("a socket is entered once: connect() makes another")
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep_connected(first))
        try:
            await first
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close, and end every loop over a topic."""
        assert self._task is not None, "it was entered"
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _dial(self) -> ClientConnection:
        token, params = await value_of(self._token), await value_of(self._params)
        scheme, host, path, query, _ = urlsplit(self._url)
        fields = [*parse_qsl(query, keep_blank_values=True), *(params or {}).items(), ("vsn", VSN)]
        try:
            query = urlencode(fields)
        except UnicodeEncodeError:
            raise ValueError("params: expected text that UTF-8 can encode") from None
        path = path.rstrip("/") + "/websocket"
        options = {"ping_interval": None, "max_size": None, "close_timeout": CLOSE_TIMEOUT_S, **self._options}
        if _is_this_machine(urlsplit(self._url).hostname or ""):
            options.setdefault("proxy", None)  # else HTTP_PROXY would be given the token
        try:
            return await _Connect(
                urlunsplit((scheme.replace("http", "ws"), host, path, query, "")),
                subprotocols=_subprotocols(token),
                open_timeout=self._timeout_s,
                **options,
            )
        except InvalidStatus as error:
            location = error.response.headers.get("Location")
            why = _refusal(error.response)
            if 300 <= error.response.status_code < 400 and location is not None:
                target = _origin(urljoin(f"{scheme}://{host}{path}", location))
                why = f"HTTP {error.response.status_code}, a redirect to {target}; none is followed, since the token "
                why += "would go along: connect to the right address"
        except TimeoutError:
            why = f"no answer within {self._timeout_s:g} s"
        except (OSError, WebSocketException) as error:
            why = str(error) or type(error).__name__
        # Without query, user or cause, each of which may hold a secret.
        raise ConnectError(f"{scheme}://{host.rpartition('@')[2]}{path}", why)

    async def _keep_connected(self, first: asyncio.Future[None]) -> None:
        try:
            connection = await self._dial()
        except Exception as error:
            if not first.done():
                first.set_exception(error)
            return
        self._link.open(connection)
        if not first.done():
            first.set_result(None)
        fault = None
        try:
            while await self._serve(connection):
                connection = await self._redial()
                self.reconnects += 1
        except Exception as error:  # of our own, or of `reconnect_s`: every loop over a topic raises it
            fault = error
        finally:
            self._link.is_over = True
            for channel in list(self._channels.values()):
                channel.end(fault)

    async def _redial(self) -> ClientConnection:
        while True:
            self._tries += 1
            await asyncio.sleep(self._reconnect_s(self._tries))
            try:
                return await self._dial()
            except ConnectError as error:
                log.warning("not connected again, try %d: %s", self._tries, error)
            except Exception as error:  # token and params are anybody's code
                log.warning("not connected again, try %d: %r", self._tries, error)

    async def _serve(self, connection: ClientConnection) -> bool:
        """Use a connection until it is lost; returns whether another is to be made."""
        self._link.open(connection)
        heart = asyncio.create_task(self._beat(connection))
        try:
            await self._read(connection)
        finally:
            heart.cancel()
            self._link.lose()
            for channel in self._channels.values():
                channel.lose("connection lost")
            await asyncio.wait([heart])
            await _close(connection)
        log.info("connection lost: %s %s", connection.close_code, connection.close_reason)
        return connection.close_code != NORMAL

    async def _read(self, connection: ClientConnection) -> None:
        count = 0
        try:
            while True:
                self._receive(await connection.recv())
                count += 1
                if count % TURN_FRAMES == 0:
                    await asyncio.sleep(0)
        except ConnectionClosed:
            return

    def _receive(self, frame: str | bytes) -> None:
        try:
            message = decode(frame)
        except ValueError as error:
            self.undecodable += 1
            log.warning("a frame was not understood and is lost: %s", error)
            self._report_lost(frame)
            return
        self._tries = 0  # not before: a server may accept and close at once, again and again
        channel = self._channels.get(message.topic)
        if channel is not None:
            channel.receive(message)
        if message.event == "phx_reply":
            self._link.settle(message)

    def _report_lost(self, frame: str | bytes) -> None:
        """Tell the channel of a frame that is lost, or all that recover events where its topic is not known."""
        topic, event = names_in(frame) or (None, None)
        if event == "phx_reply":
            return  # no event: its caller has a time limit
        for channel in tuple(self._channels.values()):
            if channel.topic == topic or (topic is None and channel.recovers):
                channel.miss()

    async def _beat(self, connection: ClientConnection) -> None:
        loop, limit_s = asyncio.get_running_loop(), min(self._timeout_s, self._heartbeat_s)
        was_busy = False
        while True:
            if not was_busy:
                await asyncio.sleep(self._heartbeat_s)
            message, ends_at = Message(None, self._link.next_ref(), "phoenix", "heartbeat", {}), loop.time() + limit_s
            try:
                await self._link.ask(message, limit_s)
            except PushError as error:
                if error.status == "timeout":
                    # Where the event loop was blocked, the answer may have come and not have been read: ask once more.
                    was_busy = not was_busy and loop.time() - ends_at > _LATE_S
                    if was_busy:
                        continue
                    log.warning("a heartbeat was not answered: the connection is given up")
                    connection.transport.abort()
                    return
            was_busy = False


connect = Socket
"""Alias of `Socket`: ``async with connect("ws://localhost:8000/socket") as socket:`` connects, then closes."""


async def _with_presence(params: Fresh[Mapping[str, Any]], meta: dict[str, Any]) -> Mapping[str, Any]:
    return {**await value_of(params), "presence": meta}


async def _close(connection: ClientConnection) -> None:
    """Close, and read on meanwhile: the server's answer comes after all that it has sent before."""
    async with asyncio.TaskGroup() as group:
        group.create_task(connection.close())
        with suppress(ConnectionClosed):
            while True:
                await connection.recv()


class _Connect(connect_websocket):
    """As websockets has it, but for redirects: it would send the token to whatever host they point to."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Take a redirect for the refusal that it is."""
        return exc


def _refusal(response: Response) -> str:
    """What a server says instead of 101, in one line: the status, and the body unless it is a page of a proxy."""
    body = (response.body or b"")[:200].decode(errors="replace").strip()
    if not body or "html" in response.headers.get("Content-Type", ""):
        body = response.reason_phrase
    return f"HTTP {response.status_code}: {' '.join(body.split())}"


def _is_this_machine(host: str) -> bool:
    """Whether a host is ``localhost``, a name below it, or a loopback address in any form that connect(2) takes."""
    host = host.removesuffix(".")
    if host == "localhost" or host.endswith(".localhost") or host == "::":
        return True
    try:
        return inet_aton(host)[0] in (0, 127)
    except OSError:
        pass
    try:
        found = ip_address(host)
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _origin(url: str) -> str:
    """Scheme and host of an address: its path and its query may hold a secret."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "another address"
    text = f"{parts.scheme}://{host}"
    return text if parts.scheme and host and text.isascii() and text.isprintable() else "another address"


def _check_headers(headers: Any) -> None:
    """Check headers that come with the request. Raises ValueError, which shows no value: it may be a secret."""
    pairs = getattr(headers, "raw_items", None) or getattr(headers, "items", None) or (lambda: headers or ())
    for name, value in pairs():
        if not f"{name}{value}".isprintable():
            raise ValueError(f"additional_headers: {name!r:.60}: expected text without control characters")


def _subprotocols(token: str | None) -> list[Subprotocol] | None:
    """The token travels beside the subprotocol, as phoenix.js sends it, so that it stays out of the URL."""
    if not token:
        return None
    # A slash is not allowed in the name of a subprotocol, so that one letter is taken from the URL alphabet.
    try:
        data = token.encode()
    except (UnicodeEncodeError, AttributeError):  # its value is a secret
        raise ValueError("token: expected text that UTF-8 can encode") from None
    text = base64.b64encode(data, altchars=b"+_").rstrip(b"=").decode()
    return [Subprotocol("phoenix"), Subprotocol("base64url.bearer.phx." + text)]
