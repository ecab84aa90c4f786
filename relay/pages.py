"""What the relay answers over plain HTTP: health, readiness, metrics, the page and the browser client.

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

_STATIC = Path(__file__).parent / "static"
_CLIENT = "relay.js"

_TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"

# Nothing from elsewhere, nothing inline; sockets to this very place.
_POLICY = "default-src 'self'; connect-src 'self' ws: wss:; base-uri 'none'; frame-ancestors 'self'; form-action 'none'"


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
    link: Callable[[], Link],
    refusal: Callable[[], str],
    figures: Callable[[], bytes],
    publish_command: Callable[[], str],
) -> list[BaseRoute]:
    """Make the HTTP routes.

    Args: link: the broker's state, asked anew for each request.
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

    async def page(request: Request) -> Response:
        """The page that lets people try the relay."""
        if not request.url.path.endswith("/"):  # mounted: without the slash its relative addresses would miss
            return RedirectResponse(request.url.replace(path=request.url.path + "/"))
        text = (_STATIC / "index.html").read_text(encoding="utf-8")
        for name, value in (
            ("socket_path", config.socket_paths[0].lstrip("/")),
            ("publish_command", publish_command()),
            ("version", __version__),
        ):
            text = text.replace(f"{{{{{name}}}}}", html.escape(value))
        return HTMLResponse(text, headers={"content-security-policy": _POLICY, "x-content-type-options": "nosniff"})

    static = Mount("/static", _Static())
    common: list[BaseRoute] = [Route("/health", health), Route("/ready", ready), Route("/metrics", prometheus), static]
    return [*common, Route("/", page)] if config.page else common


def publish_line(redis_url: str, to_prefix: str) -> str:
    """A command that publishes one event, to be pasted into a shell; shows the URL, which must hold no secret."""
    channel, payload = shlex.quote(f"{to_prefix}room:1:new_msg"), shlex.quote('{"text":"hi"}')
    return f"redis-cli -u {redis_url} PUBLISH {channel} {payload}"
