"""What the relay answers over plain HTTP: health, readiness, metrics, the pages and the browser client.

Owns these few routes; must not know sockets or Redis.
"""

import html
import shlex
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from relay import __version__
from relay.brokers.base import Link
from relay.config import Config
from relay.metrics import Metrics
from relay.operators import Operators, key_in

_STATIC = Path(__file__).parent / "static"
_CLIENT = "relay.js"

_TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"

# Nothing from elsewhere, nothing inline; sockets to this very place.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class _Static(StaticFiles):
    """The package's own files; in a source checkout the browser client is still where it is developed."""

    def __init__(self) -> None:
        super().__init__(directory=_STATIC)
        source = _STATIC.parents[1] / "clients" / "browser"
        if not (_STATIC / _CLIENT).exists() and (source / _CLIENT).exists():
            self.all_directories.append(source)


def routes(
    config: Config,
    metrics: Metrics,
    operators: Operators,
    link: Callable[[], Link],
    refusal: Callable[[], str],
    figures: Callable[[], bytes],
    publish_command: Callable[[], str],
) -> list[BaseRoute]:
    """Make the HTTP routes.

    Args: operators: who may use the console.
          link: the broker's state, asked anew for each request.
          refusal: why nobody should be sent here; empty when all is well.
          figures: all figures, in Prometheus's text format.
          publish_command: a line to paste, for the page.
    """

    async def health(request: Request) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok", "version": __version__, "sockets": metrics.sockets})

    async def ready(request: Request) -> Response:
        """The subscription is live, and the relay does not end; 503 with the reason otherwise."""
        reason = refusal()
        if not reason:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)

    async def prometheus(request: Request) -> Response:
        """All figures, of all workers, in Prometheus's text format."""
        return Response(figures(), headers={"content-type": _TEXT_FORMAT})

    def show(file: str) -> Response:
        text = (_STATIC / file).read_text(encoding="utf-8")
        for name, value in (
            ("socket_path", config.socket_paths[0].lstrip("/")),
            ("console", "console" if config.console else ""),
            ("publish_command", publish_command()),
            ("version", __version__),
        ):
            text = text.replace(f"{{{{{name}}}}}", html.escape(value))
        return HTMLResponse(text, headers=_HEADERS)

    async def page(request: Request) -> Response:
        """The page that lets people try the relay."""
        if not request.url.path.endswith("/"):  # mounted: without the slash its relative addresses would miss
            return RedirectResponse(request.url.replace(path=request.url.path + "/"))
        return show("index.html")

    async def console(request: Request) -> Response:
        """The console: the page alone, which holds no data; those it asks for on a socket of its own."""
        return show("console.html")

    async def access(request: Request) -> Response:
        """Whether the console's socket will let this client in: a browser is not told why a handshake fails."""
        fault = operators.admit(request.scope, key_in(request.scope), "console")
        if fault is not None and fault.is_wrong_key:  # the page asks without one first
            metrics.refused["handshake: console"] += 1
        return JSONResponse(
            {"detail": "welcome"} if fault is None else {"detail": fault.text}, fault.status if fault else 200
        )

    static = Mount("/static", _Static())
    common: list[BaseRoute] = [Route("/health", health), Route("/ready", ready), Route("/metrics", prometheus), static]
    if config.page:
        common.append(Route("/", page))
    if config.console:
        common += [Route("/console", console), Route("/console/access", access)]
    return common


def publish_line(redis_url: str, to_prefix: str) -> str:
    """A command that publishes one event, to be pasted into a shell; shows the URL, which must hold no secret."""
    channel, payload = shlex.quote(f"{to_prefix}room:1:new_msg"), shlex.quote('{"text":"hi"}')
    return f"redis-cli -u {redis_url} PUBLISH {channel} {payload}"
