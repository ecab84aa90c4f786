"""What the relay answers over plain HTTP: health, readiness, metrics, the pages and the browser client.

Owns these few routes; must not know sockets or Redis.
"""

import html
import shlex
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from relay.auth.api_key import ApiKeyAuth, api_key_from
from relay.brokers.base import Link
from relay.config import Config
from relay.config_redis import RedisConfig
from relay.extras import describe
from relay.metrics import Metrics
from relay.paths import segments
from relay.redis_url import parse_cluster
from relay.transports import plain_sockets
from relay.version import __version__

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
        source = _STATIC.parents[2] / "clients" / "browser"
        if not (_STATIC / _CLIENT).exists() and (source / _CLIENT).exists():
            self.all_directories.append(source)


def routes(
    config: Config,
    metrics: Metrics,
    operators: ApiKeyAuth,
    link: Callable[[], Link],
    refusal: Callable[[], str],
    degraded: Callable[[], str],
    metrics_text: Callable[[], Awaitable[bytes]] | None,
    publish_command: Callable[[], str],
) -> list[BaseRoute]:
    """Make the HTTP routes.

    Args: operators: who may use the console.
          link: the broker's state, read for each request.
          refusal: why no client should be sent here; empty if the relay is ready.
          degraded: what does not work although it is; empty if all does.
          metrics_text: all metrics, in Prometheus's text format; None where they cannot be written.
          publish_command: a line to paste, for the page.
    """

    async def health(request: Request) -> Response:
        """The process lives."""
        state = {"status": "ok", "version": __version__, "sockets": metrics.sockets}
        return JSONResponse({**state, "fan_out": plain_sockets.form(config.speedups)})

    async def ready(request: Request) -> Response:
        """The subscription is live, and the relay does not end; 503 otherwise, with the reason for operators alone."""
        reason = refusal()
        status, code = ("not ready", 503) if reason else ("ready", 200)
        if not reason and (reason := degraded()):
            status = "degraded"
        body = {"status": status}
        if reason and operators.may_know_reasons(request.scope):
            body["reason"] = reason
        return JSONResponse(body, code)

    async def prometheus(request: Request) -> Response:
        """All metrics, of all workers, in Prometheus's text format."""
        fault = operators.admit_to_metrics(request.scope)
        if fault is not None:
            metrics.refused["metrics: wrong key" if fault.is_wrong_key else "metrics: not allowed"] += 1
            headers = {"www-authenticate": "Bearer"} if fault.status == HTTPStatus.UNAUTHORIZED else None
            return problem(fault.status, fault.text, headers)
        if metrics_text is None:
            return problem(404, describe("metrics", "/metrics"))
        return Response(await metrics_text(), headers={"content-type": _TEXT_FORMAT})

    def show(file: str) -> Response:
        return _filled(
            file,
            socket_path=config.socket_paths[0].lstrip("/") or ".",
            console="console" if config.console else "",
            publish_command=publish_command(),
        )

    async def page(request: Request) -> Response:
        """The page that lets people try the relay."""
        if not request.url.path.endswith("/"):  # mounted: without the slash its relative addresses would miss
            return RedirectResponse(f"./{request.url.path.rpartition('/')[2]}/")
        return show("index.html")

    async def console(request: Request) -> Response:
        """The console: the page alone, which holds no data; those it asks for on a socket of its own."""
        return show("console.html")

    async def access(request: Request) -> Response:
        """Whether the console's socket will let this client in: a browser does not learn why a handshake fails."""
        fault = operators.authorize(request.scope, api_key_from(request.scope), "console")
        if fault is not None and fault.is_wrong_key:  # the page asks without one first
            metrics.refused["handshake: console"] += 1
        return JSONResponse(
            {"detail": "welcome"} if fault is None else {"detail": fault.text}, fault.status if fault else 200
        )

    static = Mount("/static", _Static())
    common: list[BaseRoute] = [Route("/health", health), Route("/ready", ready), Route("/metrics", prometheus), static]
    if config.demo_page:
        common.append(Route("/", page))
    if config.console:
        common += [Route("/console", console), Route("/console/access", access)]
    return common


def docs_routes(rest_path: str) -> list[BaseRoute]:
    """Make the page that shows the REST interface, which loads nothing from elsewhere: a key is typed there."""
    to_root = "/".join(".." for _ in segments(rest_path)) or "."

    async def docs(request: Request) -> Response:
        """The routes of the schema, each with a form to try it."""
        schema = f"{request.scope.get('root_path', '').rstrip('/')}{rest_path}/openapi.json"
        return _filled("docs.html", schema=schema, static=f"{to_root}/static")

    async def redoc(request: Request) -> Response:
        """Where FastAPI would have its other page."""
        return RedirectResponse("docs", HTTPStatus.PERMANENT_REDIRECT)

    return [Route(f"{rest_path}/docs", docs), Route(f"{rest_path}/redoc", redoc)]


def _filled(file: str, **values: str) -> Response:
    text = (_STATIC / file).read_text(encoding="utf-8")
    for name, value in {**values, "version": __version__}.items():
        text = text.replace(f"{{{{{name}}}}}", html.escape(value))
    return HTMLResponse(text, headers=_HEADERS)


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """An answer that says what is wrong, as RFC 9457 has it."""
    content = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    return JSONResponse(content, status, headers, media_type="application/problem+json")


def publish_line(redis_url: str, redis: RedisConfig) -> str:
    """A command that publishes one event, to be pasted into a shell; the URL in it may hold a password."""
    channel, message = map(shlex.quote, redis.published("room:1", "new_msg", '{"text":"hi"}'))
    cluster = parse_cluster(redis_url)
    if cluster is not None:
        return f"redis-cli -c -u {cluster.node_url(*cluster.nodes[0])} SPUBLISH {channel} {message}"
    return f"redis-cli -u {redis_url} PUBLISH {channel} {message}"
