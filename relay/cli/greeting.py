"""What ``relay serve`` prints once it answers: addresses and lines to paste.

Owns these lines; must not start or stop anything.
"""

import json
import logging
import os
import shutil
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import typer

from relay import redis_url
from relay.cli.connection import host_of
from relay.cli.output import is_kept
from relay.config import EMBEDDED, Config
from relay.version import __version__

if TYPE_CHECKING:
    from relay.app import Relay

_DEEP = 8
"""Apps in apps that are looked through for relays."""


def page_url(settings: Config) -> str:
    """The address of the server's own root, from here: 0.0.0.0 cannot be connected to."""
    return f"http://{host_of(settings)}/"


def relays_in(app: Any, path: str = "", deep: int = _DEEP) -> "Iterator[tuple[str, Relay]]":
    """Each relay in an ASGI app, behind middleware and below mounts too, and the path that it is mounted at."""
    from relay.app import Relay

    if isinstance(app, Relay):
        yield path, app
    elif deep:
        routes = getattr(app, "routes", None)
        for route in routes if isinstance(routes, list | tuple) else ():
            at = getattr(route, "path", "")
            yield from relays_in(getattr(route, "app", None), path + at if isinstance(at, str) else path, deep - 1)
        if not routes and (inner := getattr(app, "app", None)) is not None:  # of a middleware
            yield from relays_in(inner, path, deep - 1)


def greet(settings: Config, embedded: bool, open_page: bool, application: str | None, app: Any) -> None:
    """Wait, in a thread, until the server answers, then print what there is to know of it.

    Args: settings: of the server, and of the relay where it serves alone.
          embedded: whether the relay has a Valkey of its own, whose address is in the settings.
          open_page: open the page in a browser, too.
          application: the name of the app that is served, with ``app`` itself; None for the relay alone.
    """

    def say() -> None:
        if not _answers(settings):
            return
        root = page_url(settings).rstrip("/")
        if settings.log_format == "json":  # what is printed is no record: a collector cannot read it
            fields = {"kind": "start", "version": __version__, "url": f"{root}/"}
            logging.getLogger("relay").info("relay %s answers at %s/", __version__, root, extra=fields)
        try:
            if application is None:
                _greet(settings, embedded, root)
            else:
                typer.echo("\n".join((f"{application} is ready at {root}/", *_greet_mounted(settings, app, root))))
        except OSError as error:  # standard output is on a full disk
            logging.getLogger("relay").warning("the relay's addresses cannot be printed: %s", error.strerror)
        if open_page:
            webbrowser.open(f"{root}/")

    threading.Thread(target=say, name="relay-greeting", daemon=True).start()


def _answers(settings: Config) -> bool:
    """Wait for an answer of the server, whichever it is: an app may have no such route."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if _status(settings, "/health"):
            return True
        time.sleep(0.05)
    return False


def _status(settings: Config, path: str, timeout_s: float = 1.0) -> int:
    """The status of an answer; 0 without one."""
    try:
        with closing(HTTPConnection(host_of(settings), timeout=timeout_s)) as connection:  # past any HTTP_PROXY
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            return response.status
    except (HTTPException, OSError):
        return 0


def _awaited(settings: Config, relay: Config, path: str) -> str:
    """The bus that a relay is still waiting for, without credentials; empty where it answers."""
    # A relay that is mounted without its lifespan starts at this request, and answers once it has tried to connect.
    if _status(settings, f"{path}/ready", relay.redis.timeout_s + 5) != HTTPStatus.SERVICE_UNAVAILABLE:
        return ""
    return bus_of(relay)


def bus_of(config: Config) -> str:
    """The message bus of a relay, without credentials."""
    if config.broadcast_url:
        parts = urlsplit(config.broadcast_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    if config.redis_url in ("", EMBEDDED):
        return "its own Valkey"
    return f"Redis at {redis_url.shown(config.redis_url)}"


def _greet(settings: Config, embedded: bool, root: str) -> None:
    from relay.brokers.embedded import BESIDE_AUTH

    bus = _awaited(settings, settings, "")
    lines = [f"relay {__version__} is waiting for {bus}; it tries again" if bus else f"relay {__version__} is ready"]
    lines += _addresses(settings, root)
    if embedded:
        lines += _greet_embedded(settings)
    else:
        lines += _publish_lines(settings)
    typer.echo("\n".join(lines))
    if embedded and settings.auth.has_keys:
        logging.getLogger("relay").warning("redis_url: %s", BESIDE_AUTH)


def _greet_mounted(settings: Config, app: Any, root: str) -> Iterator[str]:
    found = list(relays_in(app))
    for path, relay in found:
        if len(found) > 1:
            yield f"  relay at {path or '/'}"
        if bus := _awaited(settings, relay.config, path):
            yield f"  waiting  for {bus}; it tries again"
        yield from _addresses(relay.config, f"{root}{path}")
        yield from _publish_lines(relay.config)


def _addresses(config: Config, root: str) -> Iterator[str]:
    """What is served below a root, as it is pasted into a browser or a page."""
    if config.demo_page:
        yield f"  page     {root}/"
    if config.console:
        yield f"  console  {root}/console"
    paths = [path.rstrip("/") for path in config.socket_paths]
    for path in paths:
        if "websocket" in config.transports:
            endpoint = f"ws{root.removeprefix('http')}{path}"
            yield f"  socket   new Socket({json.dumps(endpoint, ensure_ascii=False)})"
    for path in paths:
        if "sse" in config.transports:
            yield f"  stream   {root}{path}/sse?topic=…"


def _publish_lines(config: Config) -> Iterator[str]:
    from relay.web.pages import publish_line

    if _is_shareable(config.redis_url):
        yield f"  publish  {publish_line(config.redis_url, config.redis)}"


def _greet_embedded(settings: Config) -> list[str]:
    from relay.web.pages import publish_line

    url, bare = settings.redis_url, f"redis://127.0.0.1:{urlsplit(settings.redis_url).port}"
    # With the port: another relay may be started here meanwhile, and `publish` takes the newest. It finds the password
    # automatically, which then is not shown in the list of processes.
    own = f"""{_own_name()} publish --redis-url {bare} room:1 new_msg '{{"text":"hi"}}'"""
    if is_kept():
        why = "its password is not printed to a file or a log; `relay publish` finds it"
        return [f"  redis    {bare}  (a Valkey of the relay's own; {why})", f"  publish  {own}"]
    return [
        f"  redis    {url}  (a Valkey of the relay's own; it ends with the relay)",
        f"  publish  {publish_line(url, settings.redis)}",
        f"           or, without redis-cli:  {own}",
    ]


def _own_name() -> str:
    """How this command is called from here: by its name, or by its path where that is not on the search path."""
    if shutil.which("relay"):
        return "relay"
    own = Path(sys.argv[0])
    if own.name != "relay":
        return "python -m relay"
    try:
        return os.path.relpath(own)
    except FileNotFoundError:  # the current directory was removed
        return str(own)


def _is_shareable(address: str) -> bool:
    """Whether an address may be shown to people: on this machine, and without credentials."""
    if not address.startswith("redis://"):
        return False
    parts = urlsplit(address)
    loopback = parts.hostname in ("127.0.0.1", "::1", "localhost")
    return loopback and "@" not in parts.netloc and not parts.query
