"""``relay serve``: the relay alone, or a team's own app with the server settings that a relay wants.

Owns what is started before Uvicorn and ended after it; must not know how a relay works inside.
"""

import errno
import gc
import json
import logging
import logging.config
import os
import secrets
import signal
import socket as sockets
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Annotated, Any, NamedTuple

import typer

from relay import runtime_dir
from relay.auth.sealing import WORKERS_SECRET
from relay.cli.greeting import greet, page_url, relays_in
from relay.cli.options import ConfigFile, RedisUrl
from relay.config import CONFIG_VARIABLE, EMBEDDED, WORKERS_MAX, Config
from relay.config_sources import empty_bus, load, unread_file, variable
from relay.errors import ConfigError
from relay.extras import require
from relay.service_links import log_service_links

_logger = logging.getLogger("relay")


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
    factory: Annotated[
        bool, typer.Option("--factory", help="MODULE:APP is a function that makes the app, e.g. main:create_app.")
    ] = False,
    reload: Annotated[
        bool,
        typer.Option(
            "--reload", help="Start again when a .py file here or the settings file changes: for development."
        ),
    ] = False,
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
    if factory and application is None:
        raise ConfigError("command line: --factory: expected MODULE:FUNCTION, the function that makes your app")
    require("server", "relay serve")
    flags: dict[str, Any] = {"host": host, "port": port, "redis_url": redis_url, "workers": workers}
    settings = load(config, flags)
    if origin:
        settings = load(
            config, {**flags, settings.old_names.name_in_use("allowed_origins"): _with_origins(settings, origin)}
        )
    if not reload:
        settings = _apply_web_concurrency(settings)
    if reload and settings.workers > 1:
        raise ConfigError(f"command line: --reload: expected one process, got workers = {settings.workers}")
    _check_host(settings)
    if application is None:
        settings.check_exposure()
    logging.config.dictConfig(_logging(settings))
    log_service_links()
    settings.old_names.log()
    for fault in (unread_file(config), empty_bus(settings)):
        if application is None and fault:
            _logger.warning(fault)
    code, app = 0, None
    with ExitStack() as stack:
        stack.enter_context(_stop_on_sigterm())
        if application is not None:
            sys.path.insert(0, "")  # as `python -m uvicorn` does
            app = _import(application, factory)
            settings.check_exposure(authenticates=_authenticates(app))
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
        own.enter_context(runtime_dir.announce(page_url(settings), settings.redis_url if embedded else None))
        greet(settings, embedded, open_page, application, app)
        served = None if application is None else Served(application, factory, app)
        code = _run(settings, served, config, listener, own.close, reload)
    sys.exit(code)


class Served(NamedTuple):
    """A user's own app."""

    name: str
    """As the command line has it, ``module:app``."""
    is_factory: bool
    """Whether the name is that of a function that makes the app."""
    app: Any
    """The app itself."""


def _run(
    settings: Config,
    served: Served | None,
    file: Path | None,
    listener: sockets.socket,
    clean_up: Callable[[], None],
    reload: bool,
) -> int:
    """Run Uvicorn until it is stopped; one process here, or one or several under a supervisor."""
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
        "proxy_headers": served is not None and bool(settings.trusted_proxies),
        "forwarded_allow_ips": list(settings.trusted_proxies),
        "access_log": False,
        "log_config": _logging(settings),
        "timeout_graceful_shutdown": round(settings.limits.close_timeout_s) + 1,
        "server_header": False,
        "lifespan": "on" if served is None else "auto",
        "workers": settings.workers,  # without, it reads WEB_CONCURRENCY
        # Seconds after which Uvicorn kills a worker that does not answer. Its own 5 are too few on a slow machine while
        # the worker imports; SIGTERM waits for as long at most.
        "timeout_worker_healthcheck": 20,
    }
    if os.environ.get("FORWARDED_ALLOW_IPS"):
        _logger.warning("FORWARDED_ALLOW_IPS ignored: `trusted_proxies` names the proxies to believe")
    _collect_rarely()
    # Workers make their own; what is wrong is said here, once for all of them.
    app = _alone(settings) if served is None else served.app if served.is_factory else served.name
    if settings.workers == 1 and not reload:
        return uvicorn_server.run(uvicorn.Config(app, **options), listener, clean_up)
    # The workers read the same sources again; what this process has decided travels as variables.
    os.environ.update(RELAY_HOST=settings.host, RELAY_PORT=str(settings.port), RELAY_WORKERS=str(settings.workers))
    if file is not None:
        os.environ[CONFIG_VARIABLE] = str(file)
    if not settings.auth.secret and settings.workers > 1:  # by it the workers answer long polls for each other
        os.environ[variable("auth.secret") if served is None else WORKERS_SECRET] = secrets.token_hex(32)
    with ExitStack() as stack:
        if served is None:  # a user's own app configures its relay
            read = load(file) if reload else None  # what stands there may change
            if read is None or settings.redis_url != read.redis_url:
                os.environ["RELAY_REDIS_URL"] = settings.redis_url
            names = settings.old_names  # both names of a setting would be an error
            if not isinstance(settings.allowed_origins, str) and (
                read is None or settings.allowed_origins != read.allowed_origins
            ):
                os.environ[variable(names.name_in_use("allowed_origins"))] = json.dumps(settings.allowed_origins)
            if not settings.metrics.dir and not reload:
                os.environ[variable(names.name_in_use("metrics.dir"))] = stack.enter_context(_metrics_directory())
        name, is_factory = (served.name, served.is_factory) if served else ("relay.cli.serve:_worker_app", True)
        config = uvicorn.Config(name, factory=is_factory, **options)
        if reload:
            path = os.environ.get(CONFIG_VARIABLE)
            return uvicorn_server.run_reloading(config, listener, [Path(path)] if path else [])
        return uvicorn_server.run(config, listener, clean_up)


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
    Raises: ConfigError: it is no such number.
    """
    text = os.environ.get("WEB_CONCURRENCY", "").strip()
    if "workers" in settings.model_fields_set or not text:
        return settings
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= WORKERS_MAX:
        raise ConfigError(
            f"environment: WEB_CONCURRENCY: expected a number of workers, 1 to {WORKERS_MAX}, got {text!r:.60}"
        )
    if settings.broadcast_url.startswith("memory"):
        return settings
    return settings.model_copy(update={"workers": int(text)})


def _authenticates(app: Any) -> bool:
    """Whether all relays in a user's app authenticate clients or allow anonymous ones; False without a relay."""
    relays = [relay for _, relay in relays_in(app)]
    return bool(relays) and all(relay.authenticates or relay.config.allow_anonymous for relay in relays)


def _import(application: str, is_factory: bool) -> Any:
    """Import a user's app here, where its faults can be reported in one line. Raises ConfigError."""
    from uvicorn.importer import ImportFromStringError, import_from_string

    try:
        app = import_from_string(application)
        if is_factory:
            if not callable(app):
                raise ConfigError(f"MODULE:APP: expected a function that makes an app, got {app!r} for {application}")
            app = app()
    except ConfigError:
        raise  # of the relay in it, which says all
    except ImportFromStringError as error:
        raise ConfigError(f"MODULE:APP: {error}") from None
    except Exception as error:  # an import may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        where = "" if place.filename.startswith("<") else f" ({place.filename}, line {place.lineno})"
        failed = "cannot be called without arguments, or fails" if is_factory else "cannot be imported"
        raise ConfigError(f"MODULE:APP: {application} {failed}: {reason}{where}") from None
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


def _family(host: str) -> sockets.AddressFamily:
    return sockets.AF_INET6 if ":" in host else sockets.AF_INET


def _check_host(settings: Config) -> None:
    """Resolve the name before anything is said of who could reach it. Raises ConfigError where it has no address."""
    try:
        _ = sockets.getaddrinfo(settings.host, settings.port, _family(settings.host))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigError(
            f"host: {settings.host} is no address of this machine, nor the name of one ({reason})"
        ) from None


def _listen(settings: Config) -> sockets.socket:
    """Bind the address before anything else is started. Raises ConfigError where that fails."""
    family = _family(settings.host)
    # With its protocol: asyncio sets TCP_NODELAY only then. Without, a write may wait 40 ms for the client's ACK.
    listener = sockets.socket(family, sockets.SOCK_STREAM, sockets.IPPROTO_TCP)
    listener.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"host: {settings.host} is no address of this machine ({error.strerror})") from None
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
