"""``relay listen``, ``push``, ``topics`` and ``presence``: a running relay, seen as its clients see it.

Owns a small client of one topic; must not know how a relay works inside. On a terminal the output is for reading;
piped, it is a line of JSON each. What goes wrong is said on standard error.
"""

import asyncio
import base64
import json
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlencode

import typer
from websockets.asyncio.client import ClientConnection

from relay.brokers.base import is_position
from relay.cli.connection import TIMEOUT_S, Lost, ask_rest, connected, rest_url, socket_url
from relay.cli.options import (
    EventName,
    Params,
    Payload,
    RelayFile,
    Token,
    Topic,
    Url,
    event_of,
    json_of,
    token_of,
    topic_of,
)
from relay.cli.output import Failed, console, fail, is_terminal, json_line, print_lines, printable
from relay.config_sources import load
from relay.errors import ConfigError
from relay.protocol.serializer import POSITION_EVENT

READABLE_PER_S = 20
"""With more events a second than this, a terminal shows rates instead."""

REJOIN_S = 1.0
"""Between a `phx_error` and the next join, between joins, and before the first new connection."""

RECONNECT_MAX_S = 10.0
"""Between connections to a relay that is away."""

_POSITION_S = 1.0
"""For the position that follows a payload which is no object; an event that is in no history has none."""

Shown = tuple[str, Any, str | None]
"""Event, payload and position."""


def listen(
    topic: Topic,
    config: RelayFile = None,
    url: Url = None,
    token: Token = None,
    params: Params = "{}",
    count: Annotated[int | None, typer.Option(min=1, metavar="N", help="End after so many events.")] = None,
    last: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Begin with the last N events of the topic's history.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="POSITION", help="Begin with the events behind this position.")
    ] = None,
) -> None:
    """Show the events of a topic as they come, until Ctrl+C; many at once as rates. Piped: a line of JSON each.

    When the relay restarts, it connects again, and says that events may have been missed.

    With --last or --since, events are shown with their positions, and what was missed while the connection was lost is
    shown too, or it is said that it is gone. The topic has to have a history; --last 0 shows no old events.
    """
    address = socket_url(load(config), url)
    name, value = topic_of(topic), json_of("--params", params)
    if since is not None and not is_position(since):
        raise ConfigError(f"--since: expected a position such as 1764150000000-17, got {since!r}")
    asks = since is not None or last is not None
    if asks and not isinstance(value, dict):
        raise ConfigError(f"--params: expected an object with --last or --since, got {params!r}")
    _run(_listen(address, token_of(token), Joining(name, value, asks, last, since), count))


def push(
    topic: Topic,
    event: EventName,
    payload: Payload,
    config: RelayFile = None,
    url: Url = None,
    token: Token = None,
    params: Params = "{}",
) -> None:
    """Join a topic as a browser does, push one event, and show the reply."""
    name, value = event_of(event), json_of("JSON", payload)
    address = socket_url(load(config), url)
    _run(_push(address, token_of(token), Joining(topic_of(topic), json_of("--params", params)), name, value))


def topics(config: RelayFile = None, url: Url = None) -> None:
    """List the topics joined in a relay, and by how many sockets; the API key is that of the settings."""
    settings = load(config)
    address = rest_url(settings, url)
    try:
        found, headers = ask_rest(settings, address, "/topics")
    except Failed as error:
        fail(str(error))
    if workers := headers["X-Relay-Workers"]:
        note = f"these are the topics of one of {workers} workers; each knows its own sockets alone"
        typer.echo(f"relay: {printable(note)}", err=True)
    if not is_terminal():
        print_lines(found)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("topic", "sockets", box=None)
    table.columns[1].justify = "right"
    for one in found:
        table.add_row(Text(printable(one["topic"])), str(one["sockets"]))
    console().print(table if found else "no topic is joined")


def presence(topic: Topic, config: RelayFile = None, url: Url = None) -> None:
    """List the members of a topic with presence, on all nodes; the API key is that of the settings.

    Where only the number of members is known or sent to subscribers, the number is shown.
    """
    settings = load(config)
    address, query = rest_url(settings, url), urlencode({"topic": topic_of(topic)})
    try:
        found, _ = ask_rest(settings, address, f"/presence?{query}")
    except Failed as error:
        fail(str(error))
    listed = found["members"]
    members = [{"key": key, "meta": meta} for key, metas in (listed or {}).items() for meta in metas]
    if not is_terminal():
        print_lines([{"count": found["count"]}] if listed is None else members)
        return
    from rich.table import Table
    from rich.text import Text

    if not members:
        console().print(f"members: {found['count']}")
        return
    table = Table("key", "meta", box=None)
    for one in members:
        table.add_row(Text(printable(one["key"])), Text(printable(json_line(one["meta"]))))
    console().print(table)


# The client.


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except Failed as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@dataclass
class Joining:
    """A topic to join, on one connection after the other, and how far its history has been shown."""

    topic: str
    params: Any
    positioned: bool = False
    """Whether positions are asked for."""
    last: int | None = None
    since: str | None = None

    def payload(self) -> Any:
        """What to join with."""
        if not self.positioned:
            return self.params
        return {**self.params, "since": self.since, **({"last": self.last} if self.last else {})}

    def accepted(self, response: Any) -> None:
        """Take the reply; say what is missing."""
        if not self.positioned:
            return
        if not isinstance(response, dict) or "_position" not in response:
            typer.echo(f"relay: {self.topic}: the topic has no history; nothing is recovered", err=True)
            return
        if response.get("recovered") is False:
            reason = printable(str(response.get("reason")))
            typer.echo(f"relay: {self.topic}: not recovered: {reason}; events may be missing", err=True)
        self.since = response["_position"] or self.since


@dataclass
class _Client:
    connection: ClientConnection
    joining: Joining
    refs: int = 0
    join_ref: str | None = None
    waiting: list[tuple[str, Any]] = field(default_factory=list)  # events that came before they were wanted

    async def join(self) -> None:
        """Join the topic. Raises Failed."""
        self.joining.accepted(await self.ask("phx_join", self.joining.payload()))

    async def ask(self, event: str, payload: Any) -> Any:
        """Send, and return the response of the ``ok`` reply. Raises Failed."""
        self.refs += 1
        ref, topic = str(self.refs), self.joining.topic
        if event == "phx_join":
            self.join_ref = ref
        await self.connection.send(json.dumps([self.join_ref, ref, topic, event, payload], ensure_ascii=False))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    came_ref, came, reply = await self.receive()
                    if came == "phx_reply" and came_ref == ref:
                        break
                    if came != "phx_reply":
                        self.waiting.append((came, reply))
        except TimeoutError:
            raise Failed(f"{event} on {topic}: no answer within {TIMEOUT_S:g} s") from None
        if reply["status"] == "ok":
            return reply["response"]
        response = reply["response"]
        raise Failed(f"{event} on {topic}: {response.get('reason') if isinstance(response, dict) else response}")

    async def receive(self) -> tuple[str | None, str, Any]:
        """Ref, event and payload of the next message; one that is meant for an earlier join is left out."""
        while isinstance(frame := await self.connection.recv(), str):
            join_ref, ref, _, event, payload = json.loads(frame)[:5]
            if join_ref in (None, self.join_ref):
                return ref, event, payload
        # 0: push, 1: reply, 2: event; so many lengths follow, and then as many names.
        lengths = frame[1 : 1 + (3, 4, 2)[frame[0]]]
        end, names = 1 + len(lengths), []
        for length in lengths:
            names.append(frame[end : end + length].decode())
            end += length
        if frame[0] == 1:
            return names[1], "phx_reply", {"status": names[3], "response": frame[end:]}
        return None, names[-1], frame[end:]

    async def next(self) -> tuple[str, Any]:
        """Event and payload of the next message that is no reply."""
        while not self.waiting:
            _, event, payload = await self.receive()
            if event != "phx_reply":
                return event, payload
        return self.waiting.pop(0)

    async def events(self) -> AsyncIterator[Shown]:
        """The topic's events; after a `phx_error` it is joined again, and that is said. Raises Failed."""
        topic = self.joining.topic
        while True:
            event, payload = await self.next()
            if event == "phx_close":
                raise Failed(f"{topic}: closed by the relay")
            if event == "phx_error":
                reason = payload.get("reason", event) if isinstance(payload, dict) else event
                typer.echo(f"relay: {topic}: {printable(str(reason))}; joining again", err=True)
                while True:
                    await asyncio.sleep(REJOIN_S)
                    with suppress(Failed):
                        await self.join()
                        break
            elif not self.joining.positioned:
                yield event, payload, None
            elif event == POSITION_EVENT:  # later than it was waited for
                self.joining.since = payload["_position"]
            else:
                position = await self._position_of(event, payload)
                self.joining.since = position or self.joining.since
                yield event, payload, position

    async def _position_of(self, event: str, payload: Any) -> str | None:
        """Take an event's position: out of its payload, or out of the message that follows one that is no object."""
        if isinstance(payload, dict):
            found = payload.pop("_position", None)
            return found if isinstance(found, str) else None
        try:
            async with asyncio.timeout(_POSITION_S):
                follows = await self.next()
        except TimeoutError:
            return None
        if follows[0] == POSITION_EVENT:
            return str(follows[1]["_position"])
        self.waiting.insert(0, follows)
        return None


@asynccontextmanager
async def _joined(url: str, token: str | None, joining: Joining) -> AsyncIterator[_Client]:
    async with connected(url, token) as connection:
        client = _Client(connection, joining)
        await client.join()
        yield client


async def _push(url: str, token: str | None, joining: Joining, event: str, payload: Any) -> None:
    async with _joined(url, token, joining) as client:
        _show_json(await client.ask(event, payload))


async def _events(url: str, token: str | None, joining: Joining) -> AsyncGenerator[Shown]:
    """The topic's events, of one connection after the other; that one is lost is said. Raises Failed."""
    pause_s = 0.0  # before the next connection; none before the first
    while True:
        try:
            async with _joined(url, token, joining) as client:
                if not pause_s and is_terminal():
                    typer.echo(f"listening to {joining.topic}; Ctrl+C ends", err=True)
                pause_s = REJOIN_S
                async for event in client.events():
                    yield event
        except Lost as error:
            if not pause_s:
                raise
            if pause_s == REJOIN_S:
                missed = "" if joining.positioned else "; events may be missed"
                typer.echo(f"relay: {printable(str(error))}{missed}; connecting again", err=True)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, RECONNECT_MAX_S)


async def _listen(url: str, token: str | None, joining: Joining, count: int | None) -> None:
    async with AsyncExitStack() as stack:
        show: Callable[[str, Any, str | None], None] = partial(_show_line, joining.topic)
        if is_terminal():
            show = (await stack.enter_async_context(_Screen())).show
        left = count
        events = await stack.enter_async_context(aclosing(_events(url, token, joining)))
        async for event, payload, position in events:
            show(event, payload, position)
            if left is not None and (left := left - 1) == 0:
                return


# What is shown.


def _fields(payload: Any) -> dict[str, Any]:
    if isinstance(payload, bytes):
        return {"payload_base64": base64.b64encode(payload).decode()}
    return {"payload": payload}


def _show_line(topic: str, event: str, payload: Any, position: str | None) -> None:
    shown = {} if position is None else {"position": position}
    print_lines([{"topic": topic, "event": event, **_fields(payload), **shown}])


def _show_json(value: Any) -> None:
    text = json_line(value if not isinstance(value, bytes) else _fields(value))
    if not is_terminal():
        typer.echo(text)
        return
    from rich.console import Console
    from rich.json import JSON

    shown = JSON(text).text
    shown.plain = printable(shown.plain, keep="\n")
    Console().print(shown, soft_wrap=True)


class _Screen:
    """Events for the eye: a line each, and of a second with too many of them, the rates of all."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, soft_wrap=True)
        self._counts: Counter[str] = Counter()
        self._since = time.monotonic()

    async def __aenter__(self) -> "_Screen":
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ticking.cancel()
        self._summarise()

    def show(self, event: str, payload: Any, position: str | None = None) -> None:
        """Show one event, at once or among its second's rates."""
        from rich.text import Text

        self._counts[event] += 1
        if self._counts.total() > READABLE_PER_S:
            return
        shown = f"{len(payload)} bytes" if isinstance(payload, bytes) else json.dumps(payload, ensure_ascii=False)
        name = (printable(event), "bold cyan")
        place = "" if position is None else f" {position}"
        self._console.print(
            Text.assemble((time.strftime("%H:%M:%S "), "dim"), name, " ", printable(shown), (printable(place), "dim"))
        )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._summarise()

    def _summarise(self) -> None:
        total, elapsed = self._counts.total(), max(time.monotonic() - self._since, 0.001)
        if total > READABLE_PER_S:
            most = (f"{printable(event)} {number / elapsed:.0f}/s" for event, number in self._counts.most_common(5))
            text = f"{total / elapsed:.0f} events/s, {total - READABLE_PER_S} not shown: {', '.join(most)}"
            self._console.print(text, style="yellow", markup=False)
        self._since = time.monotonic()
        self._counts.clear()
