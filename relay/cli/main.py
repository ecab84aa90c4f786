"""The command line: ``relay serve``, and the commands of `relay.cli`.

Owns what is said of wrong usage, and the exit codes; leaves the work to the modules below it. Exit codes: 0
done, 1 failed, 2 wrong usage or settings.
"""

import gc
import json
import logging
import logging.config
import os
import shutil
import signal
import socket as sockets
import sys
import threading
import time
import traceback
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from relay import runtime_dir
from relay.cli.auth import check, token
from relay.cli.bench import bench
from relay.cli.client import listen, presence, push, topics
from relay.cli.connection import host_of
from relay.cli.help import Command, Group
from relay.cli.options import ConfigFile, RedisUrl, epilog
from relay.cli.output import is_kept
from relay.cli.plugins import new_plugin, plugins
from relay.cli.publish import publish
from relay.cli.topic_config import config as topic_config
from relay.config import CONFIG_VARIABLE, EMBEDDED, Config
from relay.config_sources import load, variable
from relay.errors import ConfigError
from relay.extras import require
from relay.service_links import log_service_links
from relay.version import __version__

_logger = logging.getLogger("relay")

app: typer.Typer = typer.Typer(
    name="relay",
    cls=Group,
    help="Redis channels to WebSocket topics, in the manner of Phoenix Channels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What Typer raises for wrong usage; it exports no name for it."""


def main() -> None:
    """Run the command line."""
    try:
        code = app(prog_name="relay", standalone_mode=False)
    except ConfigError as error:
        _say(*error.problems)
        code = 2
    except UsageError as error:
        code = _wrong_usage(error)
    except typer.Abort:
        code = 1
    sys.exit(code)


def _wrong_usage(error: Any) -> int:
    """Say what is wrong in one line, and where to look it up; returns the exit code."""
    if type(error).__name__ != "NoArgsIsHelpError":  # then the help has been shown
        text = " ".join(error.format_message().split()).rstrip(".")
        command = error.ctx.command_path if error.ctx else "relay"
        _say(f"{text[:1].lower()}{text[1:]}; `{command} --help` shows how")
    return 2


def _say(*problems: str) -> None:
    for problem in problems:
        print(f"relay: {problem}", file=sys.stderr)  # noqa: T201 - the terminal is what this module is for


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(cls=Command, epilog=epilog("serve"))
def serve(
    application: Annotated[
        str | None, typer.Argument(metavar="MODULE:APP", help="Your own ASGI app, with a relay installed in it.")
    ] = None,
    config: ConfigFile = None,
    host: Annotated[
        str | None, typer.Option(metavar="HOST", help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port to listen on; 0 picks a free one.", show_default="8000")
    ] = None,
    redis_url: RedisUrl = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Processes to serve with.", show_default="1")] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Pages of this origin may connect, besides those that already may; repeatable."
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve browsers: a relay alone, or your own app with the server settings a relay wants.

    Alone, and without a Redis in the settings, a Valkey server of the relay's own is started, and ended with it.

    Your own app makes its relay itself: of the settings here, only those of the server serve it (host, port, workers,
    allow_anonymous, log_level, log_format, compression, trusted_proxies, limits.frame_max_bytes,
    limits.handshake_timeout_s).
    """
    for option, given in (("--redis-url", redis_url), ("--origin", origin)):
        if application is not None and given:
            raise ConfigError(f"command line: {option}: {application} makes its relay itself; give it to Relay() there")
    require("server", "relay serve")
    flags: dict[str, Any] = {"host": host, "port": port, "redis_url": redis_url, "workers": workers}
    settings = load(config, flags)
    if origin:
        settings = load(
            config, {**flags, settings.old_names.name_in_use("allowed_origins"): _with_origins(settings, origin)}
        )
    settings = _apply_web_concurrency(settings)
    if application is None:
        settings.check_exposure()
    logging.config.dictConfig(_logging(settings))
    log_service_links()
    settings.old_names.log()
    code = 0
    with ExitStack() as stack:
        stack.enter_context(_stop_on_sigterm())
        if application is not None:
            sys.path.insert(0, "")  # as `python -m uvicorn` does
            settings.check_exposure(authenticates=_authenticates(_import(application)))
        listener = _listen(settings)
        stack.callback(listener.close)
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        embedded = application is None and (
            settings.redis_url == EMBEDDED or not (settings.redis_url or settings.broadcast_url)
        )
        own = stack.enter_context(ExitStack())
        if embedded:
            from relay.brokers.embedded import EmbeddedValkey

            valkey = EmbeddedValkey("relay serve without redis_url")
            own.callback(valkey.stop)
            settings = settings.model_copy(update={"redis_url": valkey.url})
        own.enter_context(runtime_dir.announce(_page_url(settings), settings.redis_url if embedded else None))
        if application is not None:
            _when_ready(settings, lambda: typer.echo(f"{application} is ready at {_page_url(settings)}"))
        else:
            _when_ready(settings, lambda: _greet(settings, embedded, open_page))
        code = _run(settings, application, config, listener, own.close)
    sys.exit(code)


def _run(
    settings: Config, application: str | None, file: Path | None, listener: sockets.socket, clean_up: Callable[[], None]
) -> int:
    """Run Uvicorn until it is stopped; one process here, or several under its supervisor."""
    import uvicorn

    from relay.transports import uvicorn_server
    from relay.transports.uvicorn_http import RelayHTTPProtocol

    options: dict[str, Any] = {
        "ws": "relay.server:RelayWebSocketProtocol",
        "ws_max_size": settings.limits.frame_max_bytes,
        # Heartbeats prove life already, one coarse sweep finds idle sockets; a ping per socket doubled the CPU.
        "ws_ping_interval": None,
        "ws_per_message_deflate": settings.compression,
        "http": partial(
            RelayHTTPProtocol,
            handshake_timeout_s=settings.limits.handshake_timeout_s,
            close_timeout_s=settings.limits.close_timeout_s,
        ),
        # The relay looks behind proxies itself, mounted or not; an app around it has it done by the server. No proxy is
        # believed that the settings do not name: Uvicorn's own default believes whatever runs on this machine.
        "proxy_headers": application is not None and bool(settings.trusted_proxies),
        "forwarded_allow_ips": list(settings.trusted_proxies),
        "access_log": False,
        "log_config": _logging(settings),
        "timeout_graceful_shutdown": round(settings.limits.close_timeout_s) + 1,
        "server_header": False,
        "lifespan": "on" if application is None else "auto",
    }
    if os.environ.get("FORWARDED_ALLOW_IPS"):
        _logger.warning("FORWARDED_ALLOW_IPS ignored: `trusted_proxies` names the proxies to believe")
    _collect_rarely()
    app = application or _alone(settings)  # workers make their own; what is wrong is said here, once for all of them
    if settings.workers == 1:
        return uvicorn_server.run(
            uvicorn.Config(app, workers=1, **options), listener, clean_up
        )  # without, it reads WEB_CONCURRENCY
    # The workers read the same sources again; what this process has decided travels as variables.
    os.environ.update(RELAY_HOST=settings.host, RELAY_PORT=str(settings.port), RELAY_WORKERS=str(settings.workers))
    if file is not None:
        os.environ[CONFIG_VARIABLE] = str(file)
    with ExitStack() as stack:
        if application is None:  # a user's own app configures its relay
            os.environ["RELAY_REDIS_URL"] = settings.redis_url
            names = settings.old_names  # both names of a setting would be an error
            if not isinstance(settings.allowed_origins, str):
                os.environ[variable(names.name_in_use("allowed_origins"))] = json.dumps(settings.allowed_origins)
            if not settings.metrics.dir:
                os.environ[variable(names.name_in_use("metrics.dir"))] = stack.enter_context(_metrics_directory())
            application, options["factory"] = "relay.cli.main:_worker_app", True
        return uvicorn_server.run(uvicorn.Config(application, workers=settings.workers, **options), listener, clean_up)


def _with_origins(settings: Config, added: list[str]) -> list[str] | str:
    """The setting with further origins in it."""
    if settings.allowed_origins == "any":
        return "any"
    named = ("same",) if isinstance(settings.allowed_origins, str) else settings.allowed_origins
    return list(dict.fromkeys((*named, *added)))


@contextmanager
def _metrics_directory() -> Iterator[str]:
    """Make a directory for what the workers count, and remove it. Raises ConfigError where none can be written."""
    places = (None, os.environ.get("XDG_RUNTIME_DIR") or None, "/dev/shm")
    for place in dict.fromkeys(places):
        try:
            directory = TemporaryDirectory(prefix="relay-", dir=place, ignore_cleanup_errors=True)
        except OSError:
            continue
        with directory as path:
            yield path
        return
    raise ConfigError(
        "metrics.dir: workers share their metrics in a directory, and none for temporary files can be written; "
        "set metrics.dir, or the variable TMPDIR, to one that can, or workers = 1"
    )


def _apply_web_concurrency(settings: Config) -> Config:
    """Take the number of workers from ``WEB_CONCURRENCY``, as Uvicorn and gunicorn do, where no setting says it.

    Platforms set it for every Python service; so it is passed over where the bus reaches one process only.
    Raises: ConfigError: it is no number.
    """
    text = os.environ.get("WEB_CONCURRENCY", "").strip()
    if "workers" in settings.model_fields_set or not text:
        return settings
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"environment: WEB_CONCURRENCY: expected a number of workers, 1 or more, got {text!r}")
    if settings.broadcast_url.startswith("memory"):
        return settings
    return settings.model_copy(update={"workers": int(text)})


def _authenticates(app: Any) -> bool:
    """Whether all relays in a user's app authenticate clients or allow anonymous ones; False without a relay."""
    from relay.app import Relay

    apps = [app, *(getattr(route, "app", None) for route in getattr(app, "routes", ()))]
    relays = [found for found in apps if isinstance(found, Relay)]
    return bool(relays) and all(relay.authenticates or relay.config.allow_anonymous for relay in relays)


def _import(application: str) -> Any:
    """Import a user's app here, where its faults can be reported in one line. Raises ConfigError."""
    from uvicorn.importer import ImportFromStringError, import_from_string

    try:
        app = import_from_string(application)
    except ConfigError:
        raise  # of the relay in it, which says all
    except ImportFromStringError as error:
        raise ConfigError(f"MODULE:APP: {error}") from None
    except Exception as error:  # an import may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        where = "" if place.filename.startswith("<") else f" ({place.filename}, line {place.lineno})"
        raise ConfigError(f"MODULE:APP: {application} cannot be imported: {reason}{where}") from None
    if not callable(app):
        raise ConfigError(f"MODULE:APP: expected an ASGI app, got {app!r} for {application}")
    return app


def _collect_rarely() -> None:
    """Look for garbage seldom: a socket makes hundreds of objects that stay.

    With Python's own thresholds a burst of joins spent a fifth of its time on going through them. A closed connection
    leaves no cycle behind, so that its memory does not wait for a collection.
    """
    gc.set_threshold(10_000, 20, 100)


def _worker_app() -> Any:
    _collect_rarely()
    settings = load()
    settings.old_names.is_logged = True  # by the process that has started the workers
    return _alone(settings)


def _alone(settings: Config) -> Any:
    from relay.app import Relay

    return Relay(settings)


def _listen(settings: Config) -> sockets.socket:
    """Bind the address before anything else is started. Raises ConfigError where that fails."""
    family = sockets.AF_INET6 if ":" in settings.host else sockets.AF_INET
    # With its protocol: asyncio sets TCP_NODELAY only then. Without, a write may wait 40 ms for the client's ACK.
    listener = sockets.socket(family, sockets.SOCK_STREAM, sockets.IPPROTO_TCP)
    listener.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"port: cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another with --port"
        ) from None
    listener.set_inheritable(True)
    return listener


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Turn a SIGTERM that comes outside of Uvicorn's own handling into an orderly exit, and a closed terminal too."""

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    def hang_up(number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, stop)
    # A terminal that is closed says so by SIGHUP, which Valkey ignores: it would be left behind.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else nohup is asked for
        signal.signal(signal.SIGHUP, hang_up)
    try:
        yield
    except KeyboardInterrupt:
        pass  # Uvicorn has shut down in good order and raises the signal again
    finally:
        signal.signal(signal.SIGTERM, previous)


def _page_url(settings: Config) -> str:
    return f"http://{host_of(settings)}/"  # from here: 0.0.0.0 is nowhere to go


def _when_ready(settings: Config, then: Any) -> None:
    """Call ``then`` in a thread once the relay answers."""

    def wait() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                with closing(HTTPConnection(host_of(settings), timeout=1)) as connection:  # past any HTTP_PROXY
                    connection.request("GET", "/health")
                    connection.getresponse().read()  # whatever it says: an app may have no such route
            except (HTTPException, OSError):
                time.sleep(0.05)
            else:
                then()
                return

    threading.Thread(target=wait, daemon=True).start()


def _greet(settings: Config, embedded: bool, open_page: bool) -> None:
    from relay.brokers.embedded import BESIDE_AUTH
    from relay.web.pages import publish_line

    page = _page_url(settings)
    root = page.rstrip("/")
    lines = [f"relay {__version__} is ready"]
    if settings.demo_page:
        lines.append(f"  page     {page}")
    if settings.console:
        lines.append(f"  console  {page}console")
    if "websocket" in settings.transports:
        lines += [
            f"  socket   ws{root.removeprefix('http')}{path.rstrip('/')}/websocket" for path in settings.socket_paths
        ]
    if "sse" in settings.transports:
        lines += [f"  stream   {root}{path.rstrip('/')}/sse?topic=…" for path in settings.socket_paths]
    if embedded:
        lines += _greet_embedded(settings)
    elif _is_shareable(settings.redis_url):
        lines.append(f"  publish  {publish_line(settings.redis_url, settings.redis.to_prefix)}")
    typer.echo("\n".join(lines))
    if embedded and settings.auth.has_keys:
        logging.getLogger("relay").warning("redis_url: %s", BESIDE_AUTH)
    if open_page:
        webbrowser.open(page)


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
        f"  publish  {publish_line(url, settings.redis.to_prefix)}",
        f"           or, without redis-cli:  {own}",
    ]


def _own_name() -> str:
    """How this command is called from here: by its name, or by its path where that is not on the search path."""
    if shutil.which("relay"):
        return "relay"
    own = Path(sys.argv[0])
    return os.path.relpath(own) if own.name == "relay" else "python -m relay"


def _logging(settings: Config) -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": f"relay.log.{settings.log_format.capitalize()}Formatter"}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "loggers": {
            "relay": {"handlers": ["stderr"], "level": settings.log_level.upper(), "propagate": False},
            # Uvicorn's own lines about its start and stop say nothing that ours do not.
            "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        },
    }


for _name, _command in (
    ("publish", publish),
    ("listen", listen),
    ("push", push),
    ("topics", topics),
    ("presence", presence),
    ("bench", bench),
    ("token", token),
    ("check", check),
    ("config", topic_config),
    ("plugins", plugins),
    ("new-plugin", new_plugin),
):
    app.command(_name, cls=Command, epilog=epilog(_name))(_command)


def _is_shareable(redis_url: str) -> bool:
    """Whether an address may be shown to people: on this machine, and without credentials."""
    if not redis_url.startswith("redis://"):
        return False
    parts = urlsplit(redis_url)
    loopback = parts.hostname in ("127.0.0.1", "::1", "localhost")
    return loopback and "@" not in parts.netloc and not parts.query
