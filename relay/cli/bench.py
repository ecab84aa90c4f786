"""``relay bench``: loads a running relay as clients and a backend do; says how late events came, and how many did not.

Owns the load and the results; must not know how a relay works inside. Events carry their number and the time at which
they were published, by one clock: that of this process. So the times are those of the relay, of its bus, and of this
client, which is one process of Python: where it cannot keep up, it is itself what is measured.
"""

import asyncio
import json
import math
import signal
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit
from uuid import uuid4

import typer
from websockets.asyncio.client import ClientConnection

from relay import runtime_dir
from relay.cli.connection import TIMEOUT_S, ask_rest, connected, socket_url
from relay.cli.options import Params, RedisUrl, RelayFile, Token, Url, finite, json_of
from relay.cli.output import Failed, console, fail, is_terminal, print_lines, printable
from relay.cli.stats import Listener, latencies_ms
from relay.config import EMBEDDED, Config
from relay.config_sources import load
from relay.errors import BusUnavailable, ConfigError

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from rich.table import Table

JOINING_AT_ONCE = 50
"""Connections under way at a time."""

TOPICS = 10
"""Unless --topics says another number."""

INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl+C, as shells have it."""

LOOK_S = 0.1
"""At least so often the publishing looks whether it shall end."""

EVENTS_AT_ONCE = 1000
"""Most events in one call of the bus; REST takes no more."""

SETTLE_S = 5.0
"""Without any event for so long, what has not come by now is lost."""

FAULTS = ("lost", "duplicated", "out_of_order", "closed")
"""Results that must be 0."""

RECENT = 2000
"""Latencies that are shown live: those of the newest events."""

EVENT = "tick"

Publish = Callable[[Sequence[tuple[str, Any]]], Awaitable[None]]
"""Publishes topics and payloads, in order. Raises Failed and BusUnavailable."""


def bench(
    address: Annotated[
        str | None, typer.Argument(metavar="URL", help="The same as --url.", show_default="http://127.0.0.1:8000")
    ] = None,
    url: Url = None,
    sockets: Annotated[int, typer.Option(min=1, metavar="N", help="Sockets, each joined to one topic.")] = 100,
    topics: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Topics; at most as many as sockets.", show_default="10, or --sockets"),
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0.1, metavar="R", callback=finite, help="Events published per second, in all.")
    ] = 100.0,
    seconds: Annotated[float, typer.Option(min=0.1, metavar="S", callback=finite, help="How long to publish.")] = 10.0,
    config: RelayFile = None,
    redis_url: RedisUrl = None,
    token: Token = None,
    params: Params = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON, on a terminal too.")] = False,
) -> None:
    """Load a running relay: join sockets, publish events, and check that each arrives once, in order, and how late.

    Topics are bench:…; a token needs the right to join bench:*. Events are published to --redis-url or the settings'
    Redis; else to that of a relay with an embedded one, on this machine; else by REST, with the settings' API key.

    Ctrl+C ends the publishing, with a report of what there was.
    """
    topics = topics or min(TOPICS, sockets)
    if topics > sockets:
        raise ConfigError(f"--topics: expected at most as many as --sockets, {sockets}, got {topics}")
    from relay.fd_limit import raise_descriptor_limit

    settings = load(config, {"redis_url": redis_url})
    run = f"bench:{uuid4().hex[:8]}"
    if address and url:
        raise ConfigError("URL: expected once, got it as the first argument and as --url")
    target = socket_url(settings, address or url, "URL" if address else "--url")
    payload = json_of("--params", params)
    listeners = [Listener(f"{run}:{number % topics}") for number in range(sockets)]
    load_of = _Load(target, listeners, rate, seconds)
    is_shown = is_terminal() and not as_json
    raise_descriptor_limit()
    try:
        results = asyncio.run(_bench(load_of, token, payload, _bus(settings, target), is_shown))
    except (Failed, BusUnavailable) as error:
        fail(str(error))
    if is_shown:
        console().print(_report(results))
    else:
        print_lines([results])
    if load_of.is_interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(results[name] for name in FAULTS):
        raise typer.Exit(1)


class _Load:
    """What is done to the relay, and what came of it so far."""

    def __init__(self, url: str, listeners: list[Listener], rate: float, seconds: float) -> None:
        self.url = url
        self.listeners = listeners
        self.rate = rate
        self.seconds = seconds
        self.topics = list(dict.fromkeys(listener.topic for listener in listeners))
        self.published = dict.fromkeys(self.topics, 0)  # events of each topic
        self.latencies_ns = array("q")  # of each event at each socket
        self.joined = 0
        self.joining_s = 0.0
        self.publishing_s = 0.0
        self.is_interrupted = False
        self.changed = asyncio.Event()
        """Set when all have joined, or one has ended."""

    @property
    def published_in_all(self) -> int:
        return sum(self.published.values())

    @property
    def is_over(self) -> bool:
        """Whether all listeners are closed, or Ctrl+C was pressed."""
        return self.is_interrupted or all(one.closed for one in self.listeners)

    @property
    def is_complete(self) -> bool:
        """Whether every listener that still can has heard every event."""
        return all(one.closed or one.received == self.published[one.topic] for one in self.listeners)

    async def listen(self, listener: Listener, token: str | None, params: Any, joining: asyncio.Semaphore) -> None:
        """Join and hear events until cancelled; an end before that is noted."""
        try:
            async with AsyncExitStack() as stack:
                async with joining:
                    connection = await stack.enter_async_context(connected(self.url, token, compression=None))
                    await _join(connection, listener.topic, params)
                self.joined += 1
                if self.joined == len(self.listeners):
                    self.changed.set()
                await self._hear(connection, listener)
        except Failed as error:
            listener.closed = str(error)
            self.changed.set()

    async def _hear(self, connection: ClientConnection, listener: Listener) -> None:
        while True:
            _, _, topic, event, payload = await _receive(connection)
            if event == EVENT and topic == listener.topic:
                self.latencies_ns.append(time.perf_counter_ns() - payload["at"])
                listener.hear(payload["number"])
            elif event in ("phx_error", "phx_close"):
                raise Failed(f"{topic}: {payload.get('reason', 'closed by the relay')}")

    async def publish_all(self, publish: Publish) -> None:
        """Publish at the rate, one event on each topic in turn, for so many seconds."""
        sent, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < self.seconds and not self.is_over:
            due = min(math.ceil(elapsed * self.rate), sent + EVENTS_AT_ONCE)
            events: list[tuple[str, Any]] = []
            for number in range(sent, due):
                topic = self.topics[number % len(self.topics)]
                events.append((topic, {"number": self.published[topic], "at": time.perf_counter_ns()}))
                self.published[topic] += 1
            if events:
                await publish(events)
            sent = due
            await asyncio.sleep(min(max(start + sent / self.rate - time.perf_counter(), 0), LOOK_S))
        self.publishing_s = time.perf_counter() - start

    def interrupt(self) -> None:
        """End the publishing; what is under way is still waited for, unless Ctrl+C is pressed again."""
        self.is_interrupted = True
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)

    async def settle(self) -> None:
        """Wait for what is under way, for as long as anything comes."""
        heard, since = -1, time.perf_counter()
        while not self.is_complete and time.perf_counter() - since < SETTLE_S:
            if len(self.latencies_ns) != heard:
                heard, since = len(self.latencies_ns), time.perf_counter()
            await asyncio.sleep(0.02)

    def results(self) -> dict[str, Any]:
        """All there is to report; ``problem`` is the first there was, or None."""
        expected = sum(self.published[one.topic] for one in self.listeners)
        received = sum(one.received for one in self.listeners)
        problem = next((one.closed for one in self.listeners if one.closed), None)
        if not received and problem is None:
            problem = "no event arrived: this relay listens to another Redis; give its --redis-url"
        return {
            "url": self.url.partition("/websocket")[0],
            "sockets": len(self.listeners),
            "topics": len(self.topics),
            "joins_per_s": round(self.joined / self.joining_s, 1),
            "published": self.published_in_all,
            "published_per_s": round(self.published_in_all / self.publishing_s, 1),
            "received": received,
            "received_per_s": round(received / self.publishing_s, 1),
            "lost": expected - received,
            "duplicated": sum(one.duplicated for one in self.listeners),
            "out_of_order": sum(one.out_of_order for one in self.listeners),
            "closed": sum(bool(one.closed) for one in self.listeners),
            "latency_ms": latencies_ms(self.latencies_ns),
            "problem": problem,
        }


async def _receive(connection: ClientConnection) -> list[Any]:
    """The next text frame, decoded: join_ref, ref, topic, event, payload; binary ones are not for this client."""
    while not isinstance(frame := await connection.recv(), str):
        pass
    message: list[Any] = json.loads(frame)
    return message[:5]


async def _join(connection: ClientConnection, topic: str, params: Any) -> None:
    await connection.send(json.dumps(["1", "1", topic, "phx_join", params]))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while (message := await _receive(connection))[3] != "phx_reply":
                pass
    except TimeoutError:
        raise Failed(f"phx_join on {topic}: no answer within {TIMEOUT_S:g} s") from None
    reply = message[4]
    if reply["status"] != "ok":
        raise Failed(f"phx_join on {topic}: {reply['response'].get('reason', reply['response'])}")


async def _bench(
    load_of: _Load, token: str | None, params: Any, bus: "AbstractAsyncContextManager[Publish]", is_shown: bool
) -> dict[str, Any]:
    joining = asyncio.Semaphore(JOINING_AT_ONCE)
    tasks: list[asyncio.Task[None]] = []
    try:
        with _joining_shown(load_of) if is_shown else nullcontext():
            start = time.perf_counter()
            tasks += [asyncio.create_task(load_of.listen(one, token, params, joining)) for one in load_of.listeners]
            await load_of.changed.wait()
            load_of.joining_s = time.perf_counter() - start
        if why := next((one.closed for one in load_of.listeners if one.closed), ""):
            hint = (
                "; the relay's settings `limits` say how many may come"
                if "HTTP 429" in why or "HTTP 503" in why
                else ""
            )
            raise Failed(f"{load_of.joined} of {len(load_of.listeners)} sockets joined, then {why}{hint}")
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, load_of.interrupt)
        with _publishing_shown(load_of) if is_shown else nullcontext():
            async with bus as publish:
                await load_of.publish_all(publish)
            await load_of.settle()
        return load_of.results()
    finally:
        for task in tasks:
            task.cancel()
        _ = await asyncio.gather(*tasks, return_exceptions=True)


# The bus.


def _bus(settings: Config, url: str) -> "AbstractAsyncContextManager[Publish]":
    """How to publish: to a Redis that is known, or else by REST, under the same address as the socket."""
    parts = urlsplit(url)
    page = f"http://{parts.netloc.replace('localhost', '127.0.0.1')}/"
    redis_url = runtime_dir.with_password(settings.redis_url) if settings.redis_url != EMBEDDED else ""
    if found := redis_url or (not settings.broadcast_url and runtime_dir.redis_of(page)):
        return _redis(settings.model_copy(update={"redis_url": found}))
    mount = parts.path.removesuffix("/websocket").rpartition("/")[0]
    return _rest(settings, f"http{parts.scheme.removeprefix('ws')}://{parts.netloc}{mount}{settings.rest.path}")


@asynccontextmanager
async def _redis(settings: Config) -> AsyncIterator[Publish]:
    from relay.publisher import AsyncPublisher

    heard = False
    async with AsyncPublisher(settings) as publisher:

        async def publish(events: Sequence[tuple[str, Any]]) -> None:
            published = await publisher.publish_many([(topic, EVENT, payload) for topic, payload in events])
            nonlocal heard
            heard = heard or any(each.listening != 0 for each in published)
            if not heard:
                raise Failed("no relay listens to this Redis; give the --redis-url of the one to load")

        yield publish


@asynccontextmanager
async def _rest(settings: Config, address: str) -> AsyncIterator[Publish]:
    async def ask(path: str, body: Any = None) -> None:
        try:
            await asyncio.to_thread(ask_rest, settings, address, path, body)
        except Failed as error:
            raise Failed(f"{error}; events are published there, unless you give --redis-url") from None

    async def publish(events: Sequence[tuple[str, Any]]) -> None:
        await ask("/publish", {"events": [{"topic": topic, "event": EVENT, "payload": each} for topic, each in events]})

    await ask("/topics")  # relay makes its REST API for the first request, which must not count
    yield publish


# What is shown.


@contextmanager
def _joining_shown(load_of: _Load) -> Iterator[None]:
    from rich.live import Live
    from rich.progress import Progress

    progress = Progress(console=console())
    task = progress.add_task("joining", total=len(load_of.listeners))

    def show() -> Progress:
        progress.update(task, completed=load_of.joined)
        return progress

    with Live(get_renderable=show, console=progress.console, transient=True):
        yield


@contextmanager
def _publishing_shown(load_of: _Load) -> Iterator[None]:
    from rich.console import Group
    from rich.live import Live
    from rich.progress import Progress

    start = time.perf_counter()
    progress = Progress(console=console())
    task = progress.add_task("publishing", total=load_of.seconds)

    def show() -> Group:
        elapsed = load_of.publishing_s or max(time.perf_counter() - start, 0.001)
        progress.update(task, completed=elapsed)
        if load_of.publishing_s:
            progress.update(task, description="waiting for what is under way")
        received = len(load_of.latencies_ns)
        now = _grid(
            ("published", f"{load_of.published_in_all}, {load_of.published_in_all / elapsed:.0f}/s"),
            ("received", f"{received}, {received / elapsed:.0f}/s"),
            ("latency now", _latency(latencies_ms(load_of.latencies_ns[-RECENT:]))),
        )
        return Group(progress, now)

    with Live(get_renderable=show, console=progress.console, transient=True):
        yield


def _report(results: dict[str, Any]) -> "Table":
    faults = ", ".join(f"{results[name]} {name.replace('_', ' ')}" for name in FAULTS)
    rows = [
        ("relay", results["url"]),
        ("joined", f"{results['sockets']} sockets to {results['topics']} topics, {results['joins_per_s']:g}/s"),
        ("published", f"{results['published']} events, {results['published_per_s']:g}/s"),
        ("received", f"{results['received']} events, {results['received_per_s']:g}/s"),
        ("latency", _latency(results["latency_ms"])),
        ("faults", faults),
    ]
    return _grid(*rows, *([("problem", results["problem"])] if results["problem"] else ()))


def _latency(latency_ms: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} ms" for name, value in latency_ms.items())


def _grid(*rows: tuple[str, str]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for name, text in rows:
        grid.add_row(
            Text(name, style="bold cyan"), Text(printable(text), style="bold red" if name == "problem" else "")
        )
    return grid
