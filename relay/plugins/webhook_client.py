"""Requests to one webhook: in time, so many at a time, and none while it keeps failing.

Owns the way there and back over httpx2; must not know what is asked, nor what an answer means.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2 as httpx

from relay.config_webhooks import WebhookConfig
from relay.metrics import Metrics
from relay.plugins.webhook_signature import signature
from relay.version import __version__

T = TypeVar("T")

ANSWER_MAX_BYTES = 65_536
"""Largest body of an answer."""

_FAILURES_MAX = 10
"""Failures in a row after which no request is sent for a while."""

_OPEN_S = 10.0
"""That while, in seconds; then one request is tried."""

_RETRY_PAUSE_S = 0.1

_KEEPALIVE_S = 1.0
"""Seconds for which an idle connection is kept: less than servers do, or they would close it as it is used again."""

FAILURES = (
    "timeout",
    "not_connected",
    "connection_lost",
    "bad_status",
    "redirect",
    "bad_answer",
    "answer_too_large",
    "queue_full",
    "breaker_open",
)
"""Outcomes of requests that have not been answered, as they are counted."""


class WebhookError(Exception):
    """There is no answer; ``outcome`` is one of `FAILURES`, and ``str(error)`` says more, without the URL."""

    def __init__(self, outcome: str, text: str) -> None:
        self.outcome = outcome
        super().__init__(text)


class Breaker:
    """Stops requests to a server that has failed often in a row.

    After `_OPEN_S` one request is let through, and the others only once that has been answered.

    Args: clock: monotonic seconds.
          on_change: called with True when it opens, and with False when it closes.
    """

    def __init__(self, clock: Callable[[], float], on_change: Callable[[bool], object]) -> None:
        self._clock = clock
        self._on_change = on_change
        self._failures = 0
        self._open_until: float | None = None
        self._is_trying = False

    @property
    def is_open(self) -> bool:
        """Whether requests are stopped."""
        return self._open_until is not None

    def allows(self) -> bool:
        """Say whether a request may be sent; after the pause this is the one that is tried."""
        if self._open_until is None:
            return True
        if self._is_trying or self._clock() < self._open_until:
            return False
        self._is_trying = True
        return True

    def succeeded(self) -> None:
        """Take note of an answer."""
        self._failures = 0
        self._is_trying = False
        if self._open_until is not None:
            self._open_until = None
            self._on_change(False)

    def failed(self) -> None:
        """Take note of a failure."""
        self._failures += 1
        if self._is_trying or (self._open_until is None and self._failures >= _FAILURES_MAX):
            was_open, self._open_until = self.is_open, self._clock() + _OPEN_S
            self._is_trying = False
            if not was_open:
                self._on_change(True)

    def gave_up(self) -> None:
        """Take note that a request was neither answered nor failed: its socket has gone."""
        self._is_trying = False


class WebhookClient:
    """Sends signed requests to the URL of one webhook.

    Args: name: what it is counted under.
          keys: those that requests are signed with.
          metrics: where requests are counted.
          clock: monotonic seconds.
    """

    def __init__(
        self,
        config: WebhookConfig,
        name: str,
        keys: tuple[bytes, ...],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._name = name
        self._keys = keys
        self._metrics = metrics
        self.breaker: Breaker = Breaker(clock, self._breaker_changed)
        self._url = httpx.URL(config.url)
        # httpx2's transport and not its client, which follows the environment's proxies, keeps cookies and logs whole
        # addresses. Bound to the event loop that uses it first, as the semaphore is.
        self._transport: httpx.AsyncHTTPTransport | None = None
        self._room = asyncio.Semaphore(config.requests_max)
        self._waiting = 0
        metrics.webhook_open[name] = metrics.webhook_pending[name] = 0
        for outcome in FAILURES:
            # Or the first failure would be no rise of anything.
            metrics.webhook_requests[f"{name}: {outcome}"] += 0

    def open(self) -> None:
        """Get ready in the event loop that runs."""
        self._room = asyncio.Semaphore(self._config.requests_max)
        self._waiting = 0
        # Certificates as for any program: those of the system, or of SSL_CERT_FILE. No proxy of the environment.
        self._transport = httpx.AsyncHTTPTransport(
            verify=httpx.create_ssl_context(),
            trust_env=False,
            limits=httpx.Limits(
                max_connections=None,
                max_keepalive_connections=self._config.requests_max,
                keepalive_expiry=_KEEPALIVE_S,
            ),
        )

    async def close(self) -> None:
        """Close all connections."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    async def send(self, body: bytes, read: Callable[[bytes], T], *, may_retry: bool) -> T:
        """Send a request, and return what ``read`` makes of the body of the answer.

        Args:   read: raises WebhookError for an answer that makes no sense.
                may_retry: whether to try a second time where no connection was made.
        Raises: WebhookError.
        """
        if not self.breaker.allows():
            raise WebhookError("breaker_open", f"{_FAILURES_MAX} failures in a row; not asked for {_OPEN_S:g} s")
        is_sent = is_settled = False
        began = time.perf_counter()
        try:
            with self._place():
                async with asyncio.timeout(self._config.timeout_s), self._room:
                    is_sent = True
                    answer = read(await self._send(body, may_retry))
            self.breaker.succeeded()
            is_settled = True
            return answer
        except (WebhookError, TimeoutError) as error:
            if is_sent:
                self.breaker.failed()
                is_settled = True
            if isinstance(error, WebhookError):
                raise
            what = "no answer" if is_sent else f"still waiting for {self._config.requests_max} others to end"
            raise WebhookError("timeout", f"{what} after {self._config.timeout_s:g} s") from None
        finally:
            if not is_settled:
                self.breaker.gave_up()
            self._metrics.webhook_time[self._name].observe(time.perf_counter() - began)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place among those that are under way, or wait. Raises WebhookError."""
        most = self._config.requests_max + self._config.queue_max
        if self._waiting >= most:
            raise WebhookError("queue_full", f"{self._config.queue_max} requests wait already")
        self._waiting += 1
        self._metrics.webhook_pending[self._name] += 1
        try:
            yield
        finally:
            self._waiting -= 1
            self._metrics.webhook_pending[self._name] -= 1

    async def _send(self, body: bytes, may_retry: bool) -> bytes:
        message_id, timestamp = f"msg_{uuid.uuid4().hex}", int(time.time())
        headers = {
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "identity",
            "user-agent": f"relay/{__version__}",
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(self._keys, message_id, timestamp, body),
        }
        try:
            return await self._request(headers, body)
        except WebhookError as error:
            if error.outcome != "not_connected" or not may_retry:
                raise
        await asyncio.sleep(_RETRY_PAUSE_S)
        return await self._request(headers, body)

    async def _request(self, headers: dict[str, str], body: bytes) -> bytes:
        assert self._transport is not None, "opened before the first socket"
        # Half of the time, so that there is some left for a second try.
        timeout = httpx.Timeout(None, connect=self._config.timeout_s / 2)
        request = httpx.Request(
            "POST", self._url, headers=headers, content=body, extensions={"timeout": timeout.as_dict()}
        )
        if self._url.userinfo:
            request = next(httpx.BasicAuth(self._url.username, self._url.password).auth_flow(request))
        try:
            response = await self._transport.handle_async_request(request)
            try:
                return await _read(response)
            finally:
                await response.aclose()
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise WebhookError("not_connected", _words(error)) from None
        except httpx.TransportError as error:
            raise WebhookError("connection_lost", _words(error)) from None

    def _breaker_changed(self, is_open: bool) -> None:
        self._metrics.webhook_open[self._name] = int(is_open)
        self._metrics.webhook_openings[self._name] += is_open


async def _read(response: httpx.Response) -> bytes:
    status = response.status_code
    if response.is_redirect:
        raise WebhookError("redirect", f"status {status}, a redirect, which is not followed")
    if not 200 <= status < 300:
        raise WebhookError("bad_status", f"status {status}")
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise WebhookError("bad_answer", "a compressed answer, which was not asked for")
    assert isinstance(response.stream, httpx.AsyncByteStream), "an async transport answers so"
    body = bytearray()
    async for part in response.stream:
        body += part
        if len(body) > ANSWER_MAX_BYTES:
            raise WebhookError("answer_too_large", f"an answer of more than {ANSWER_MAX_BYTES} bytes")
    return bytes(body)


def _words(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
