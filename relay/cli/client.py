"""``relay listen``, ``relay push`` and ``relay topics``: a running relay, seen as its clients see it.

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

import typer
from websockets.asyncio.client import ClientConnection

from relay.cli.connection import TIMEOUT_S, Lost, ask_rest, connected, rest_url, socket_url
from relay.cli.options import EventName, Params, Payload, RelayFile, Token, Topic, event_of, json_of, token_of, topic_of
from relay.cli.output import Failed, console, fail, is_terminal, json_line, print_lines, printable
from relay.config_sources import load

READABLE_PER_S = 20
"""With more events a second than this, a terminal shows rates instead."""

REJOIN_S = 1.0
"""Between a `phx_error` and the next join, between joins, and before the first new connection."""

RECONNECT_MAX_S = 10.0
"""Between connections to a relay that is away."""

Url = Annotated[
    str | None, typer.Option(metavar="URL", help="The relay's socket.", show_default="ws://127.0.0.1:8000/socket")
]


def listen(
    topic: Topic,
    config: RelayFile = None,
    url: Url = None,
    token: Token = None,
    params: Params = "{}",
    count: Annotated[int | None, typer.Option(min=1, metavar="N", help="End after so many events.")] = None,
) -> None:
    """Show the events of a topic as they come, until Ctrl+C; many at once as rates. Piped: a line of JSON each.

    When the relay restarts, it connects again, and says that events may have been missed.
    """
    address = socket_url(load(config), url)
    _run(_listen(address, token_of(token), topic_of(topic), json_of("--params", params), count))


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
    _run(_push(address, token_of(token), topic_of(topic), name, value, json_of("--params", params)))


def topics(
    config: RelayFile = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="REST interface.", show_default="http://127.0.0.1:8000/api")
    ] = None,
) -> None:
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


# The client.


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.run(work)
    except Failed as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@dataclass
class _Client:
    connection: ClientConnection
    topic: str
    params: Any
    refs: int = 0
    join_ref: str | None = None
    waiting: list[tuple[str, Any]] = field(default_factory=list)  # events that came before a reply

    async def ask(self, event: str, payload: Any) -> Any:
        """Send, and return the response of the ``ok`` reply. Raises Failed."""
        self.refs += 1
        ref = str(self.refs)
        if event == "phx_join":
            self.join_ref = ref
        await self.connection.send(json.dumps([self.join_ref, ref, self.topic, event, payload], ensure_ascii=False))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    came_ref, came, reply = await self.receive()
                    if came == "phx_reply" and came_ref == ref:
                        break
                    if came != "phx_reply":
                        self.waiting.append((came, reply))
        except TimeoutError:
            raise Failed(f"{event} on {self.topic}: no answer within {TIMEOUT_S:g} s") from None
        if reply["status"] == "ok":
            return reply["response"]
        response = reply["response"]
        raise Failed(f"{event} on {self.topic}: {response.get('reason') if isinstance(response, dict) else response}")

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

    async def events(self) -> AsyncIterator[tuple[str, Any]]:
        """The topic's events; after a `phx_error` it is joined again, and that is said. Raises Failed."""
        while True:
            while self.waiting:
                yield self.waiting.pop(0)
            _, event, payload = await self.receive()
            if event == "phx_close":
                raise Failed(f"{self.topic}: closed by the relay")
            if event == "phx_error":
                reason = payload.get("reason", event) if isinstance(payload, dict) else event
                typer.echo(f"relay: {self.topic}: {printable(str(reason))}; joining again", err=True)
                while True:
                    await asyncio.sleep(REJOIN_S)
                    with suppress(Failed):
                        await self.ask("phx_join", self.params)
                        break
            elif event != "phx_reply":
                yield event, payload


@asynccontextmanager
async def _joined(url: str, token: str | None, topic: str, params: Any) -> AsyncIterator[_Client]:
    async with connected(url, token) as connection:
        client = _Client(connection, topic, params)
        await client.ask("phx_join", params)
        yield client


async def _push(url: str, token: str | None, topic: str, event: str, payload: Any, params: Any) -> None:
    async with _joined(url, token, topic, params) as client:
        _show_json(await client.ask(event, payload))


async def _events(url: str, token: str | None, topic: str, params: Any) -> AsyncGenerator[tuple[str, Any]]:
    """The topic's events, of one connection after the other; that one is lost is said. Raises Failed."""
    pause_s = 0.0  # before the next connection; none before the first
    while True:
        try:
            async with _joined(url, token, topic, params) as client:
                if not pause_s and is_terminal():
                    typer.echo(f"listening to {topic}; Ctrl+C ends", err=True)
                pause_s = REJOIN_S
                async for event in client.events():
                    yield event
        except Lost as error:
            if not pause_s:
                raise
            if pause_s == REJOIN_S:
                typer.echo(f"relay: {printable(str(error))}; events may be missed; connecting again", err=True)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s = min(2 * pause_s, RECONNECT_MAX_S)


async def _listen(url: str, token: str | None, topic: str, params: Any, count: int | None) -> None:
    async with AsyncExitStack() as stack:
        show: Callable[[str, Any], None] = partial(_show_line, topic)
        if is_terminal():
            show = (await stack.enter_async_context(_Screen())).show
        left = count
        events = await stack.enter_async_context(aclosing(_events(url, token, topic, params)))
        async for event, payload in events:
            show(event, payload)
            if left is not None and (left := left - 1) == 0:
                return


# What is shown.


def _fields(payload: Any) -> dict[str, Any]:
    if isinstance(payload, bytes):
        return {"payload_base64": base64.b64encode(payload).decode()}
    return {"payload": payload}


def _show_line(topic: str, event: str, payload: Any) -> None:
    print_lines([{"topic": topic, "event": event, **_fields(payload)}])


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

    def show(self, event: str, payload: Any) -> None:
        """Show one event, at once or among its second's rates."""
        from rich.text import Text

        self._counts[event] += 1
        if self._counts.total() > READABLE_PER_S:
            return
        shown = f"{len(payload)} bytes" if isinstance(payload, bytes) else json.dumps(payload, ensure_ascii=False)
        name = (printable(event), "bold cyan")
        self._console.print(Text.assemble((time.strftime("%H:%M:%S "), "dim"), name, " ", printable(shown)))

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
