"""A connection to a running relay, as its clients make it.

Owns the address, the token on the way there, and the words for a connection that is refused or lost.
"""

import base64
import errno
import json
import socket as sockets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException
from ssl import SSLCertVerificationError
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from relay.cli.output import Failed
from relay.config import Config
from relay.errors import ConfigError
from relay.proxy_headers import is_this_machine, origin_of, parse_ip

TIMEOUT_S = 10.0
"""For the connection, and for each reply."""


class Lost(Failed):
    """The connection has ended, or could not be made; another one may be."""


def host_of(settings: Config) -> str:
    """Host and port at which a program on this machine reaches a relay with these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"


_FORM = "expected http(s)://host[:port], and where the relay is mounted, such as http://localhost:8000/relay"


def base_url(settings: Config, url: str | None, name: str = "--url") -> str:
    """The address of a relay, ``http(s)://host[:port][/mount]`` without a slash at its end; of the settings by default.

    The addresses of its socket and of its REST interface are taken too, and shortened.

    Raises: ConfigError: ``name`` is that of the argument.
    """
    if not url:
        return f"http://{host_of(settings)}"
    scheme, _, rest = url.partition("://")
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        is_wrong = scheme not in ("http", "https", "ws", "wss") or not host or bool(parts.query or parts.fragment)
        _ = parts.port, url.encode(), host.encode("idna")
    except ValueError:  # a port that is no number, a host with an empty part
        is_wrong = True
    if is_wrong:
        raise ConfigError(f"{name}: {_FORM}, got {url!r}")
    rest = rest.rstrip("/")
    for end in (settings.rest.path, *settings.socket_paths):
        if end.strip("/") and rest.endswith(end):
            rest = rest.removesuffix(end)
            break
    return f"http{scheme.removeprefix('http').removeprefix('ws')}://{rest}"


def socket_url(settings: Config, url: str | None, name: str = "--url") -> str:
    """The address of a relay's socket, with that of the relay as in `base_url`. Raises ConfigError.

    An address with ``ws://`` or ``wss://`` is that of the socket, whichever its path.
    """
    if url and url.startswith(("ws://", "wss://")) and urlsplit(url).path.strip("/"):
        _ = base_url(settings, url, name)
        return f"{url.rstrip('/')}/websocket?vsn=2.0.0"
    base = base_url(settings, url, name)
    paths = [path.rstrip("/") for path in settings.socket_paths]
    path = next((path for path in paths if path and (url or "").rstrip("/").endswith(path)), paths[0])
    return f"ws{base.removeprefix('http')}{path}/websocket?vsn=2.0.0"


@asynccontextmanager
async def connected(url: str, token: str | None, **options: Any) -> AsyncIterator[ClientConnection]:
    """Connect for the duration of the block.

    Args:   url: as of `socket_url`.
            options: further ones of websockets.
    Raises: Failed: it was refused, with status and reason; Lost: it was lost, in the block too.
    """
    subprotocols = None
    if token:
        text = base64.b64encode(token.encode(), altchars=b"+_").rstrip(b"=").decode()
        subprotocols = [Subprotocol("phoenix"), Subprotocol(f"base64url.bearer.phx.{text}")]
    address = url.partition("?")[0]
    try:
        # Its pings keep the connection; a relay's own limit is on frames that come from clients.
        async with _Connect(
            url,
            subprotocols=subprotocols,
            open_timeout=TIMEOUT_S,
            max_size=None,
            close_timeout=1.0,
            proxy=None if _is_here(url) else True,
            **options,
        ) as connection:
            try:
                yield connection
            finally:
                await connection.close()  # with 1000; websockets tells of an error here (1011) where Ctrl+C was pressed
    except BrokenPipeError:
        raise  # of standard output, whose reader has gone: Typer ends without a word then
    except InvalidStatus as error:
        status = error.response.status_code
        if (location := error.response.headers.get("Location")) is not None and status in range(300, 400):
            raise Failed(f"{address}: {_redirect(status, address, location)}") from None
        is_page = "html" in error.response.headers.get("Content-Type", "")  # of a proxy
        body = (
            error.response.reason_phrase if is_page else (error.response.body or b"").decode(errors="replace").strip()
        )
        kind = Lost if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR else Failed
        raise kind(f"{address}: HTTP {status}{body and f': {body}'}") from None
    except ConnectionClosed as error:
        closed = error.rcvd
        raise Lost(f"{address}: connection lost{f': {closed.code} {closed.reason}' if closed else ''}") from None
    except TimeoutError:
        raise Lost(f"{address}: no answer within {TIMEOUT_S:g} s") from None
    except (OSError, WebSocketException) as error:
        raise Lost(f"{address}: {_reason(error)}") from None


class _Connect(connect_websocket):
    """As websockets has it, but for redirects: it would send the token to whatever host they point to."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Take a redirect for the refusal that it is."""
        return exc


def _is_here(url: str) -> bool:
    """Whether an address is this machine's, which no proxy is asked for: it would be given tokens and keys.

    Besides loopback these are the machine's own name and addresses, such as the one that a relay listens on.
    """
    host = urlsplit(url).hostname or ""
    if is_this_machine(host) or host == sockets.gethostname().lower():
        return True
    ip = parse_ip(host)
    if ip is None:
        return False
    with sockets.socket(sockets.AF_INET6 if ip.version == 6 else sockets.AF_INET) as probe:
        try:
            probe.bind((str(ip), 0))
        except OSError:
            return False
    return True


class _NoRedirects(HTTPRedirectHandler):
    """Takes a redirect for the refusal that it is: urllib would send the API key along."""

    def redirect_request(self, *_: Any) -> None:
        """Make no request of it."""


def _redirect(status: int, address: str, location: str) -> str:
    """What to say of a redirect."""
    target = origin_of(urljoin(address, location))
    return f"HTTP {status}, a redirect to {target}; none is followed, since tokens and keys would go along: set --url"


def _reason(error: object) -> str:
    """What the system says, and for its commonest word a plainer one."""
    if f"[Errno {errno.ECONNREFUSED}]" in str(error):  # asyncio makes one text of those of several addresses
        return "no server listens there; does `relay serve` run?"
    if isinstance(error, SSLCertVerificationError):
        return f"{error.verify_message}; SSL_CERT_FILE can name a file with the certificate of the authority"
    return str(error)


def rest_url(settings: Config, url: str | None) -> str:
    """The address of a relay's REST interface, with that of the relay as in `base_url`. Raises ConfigError."""
    return base_url(settings, url) + settings.rest.path


def ask_rest(settings: Config, address: str, path: str, body: Any = None) -> tuple[Any, Message]:
    """Ask the REST interface, with the API key of the settings; a body is posted.

    Returns: the answer, and its headers.
    Raises:  Failed: with what the relay says is wrong.
    """
    headers = {"Accept": "application/json"}
    if settings.rest.api_key:
        headers["Authorization"] = f"Bearer {settings.rest.api_key}"
    data = None
    if body is not None:
        data = json.dumps(body, ensure_ascii=False).encode()
        headers["Content-Type"] = "application/json"
    try:
        handlers = (_NoRedirects(), ProxyHandler({})) if _is_here(address) else (_NoRedirects(),)
        opened = build_opener(*handlers).open(Request(f"{address}{path}", data, headers), timeout=TIMEOUT_S)
        with opened as response:
            return json.load(response), response.headers
    except HTTPError as error:
        if (location := error.headers.get("Location")) is not None and error.code in range(300, 400):
            error.close()
            raise Failed(f"{address}: {_redirect(error.code, address, location)}") from None
        with error:
            detail = _detail(error.read())
        if error.code == HTTPStatus.UNAUTHORIZED:
            detail = f"{detail or error.reason}; set rest.api_key or RELAY_REST__API_KEY as it is set there"
        raise Failed(f"{address}: HTTP {error.code}: {detail or error.reason}") from None
    except (OSError, ValueError, HTTPException) as error:
        raise Failed(f"{address}: {_reason(getattr(error, 'reason', error))}") from None


def _detail(body: bytes) -> str:
    """What problem details (RFC 9457) say is wrong; empty for any other body."""
    try:
        return str(json.loads(body)["detail"])
    except (ValueError, TypeError, KeyError):
        return ""
