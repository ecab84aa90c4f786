"""``POST /token``, as tangram has it: makes a token that opens one topic.

Owns that route, beside each socket path and at the root; must not know how tokens are checked.

A client gets a token if it may use the REST interface. With ``auth.tangram = "open"`` pages of the origins that may
connect get one without the API key too: for topics of ``[[auth.tangram_topics]]``, under an id that is chosen here.
"""

import secrets
import time
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from relay.auth.api_key import api_key_from
from relay.auth.tangram import OPEN_CLAIM, TangramTopics
from relay.auth.tokens import sign
from relay.node import Components
from relay.permissions import Right
from relay.proxy_headers import rate_limit_key
from relay.rate_limit import AddressBuckets
from relay.transports.handshake import check_origin
from relay.web.own_paths import token_paths
from relay.web.pages import problem

_BODY_MAX_BYTES = 4_096
"""Two names of at most 255 characters each, and what surrounds them."""

_BURST = 10
"""So many times ``limits.tokens_per_s`` may come at once: a page asks for a token for each of its topics."""

_MAX_AGE_S = 600
"""Seconds for which a browser remembers that it may send the request."""


class TokenRequest(BaseModel):
    """Who asks for a token, in tangram's words."""

    channel: str = Field(min_length=1, max_length=255)
    id: str | None = Field(None, min_length=1, max_length=255)


class _Refused(Exception):
    """Why no token is made: the answer, and a short word for the counter."""

    def __init__(self, status: int, text: str, kind: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.kind, self.headers = status, text, kind, headers


def token_routes(components: Components) -> list[Route]:
    """Make the routes: ``{"channel", "id"?}`` is answered by ``{"channel", "id", "token"}``."""
    maker = _TokenMaker(components)
    methods = ["POST", "OPTIONS"] if maker.is_open else ["POST"]
    paths = token_paths(components.config)
    return [Route("/" + "/".join(path), maker.answer, methods=methods) for path in sorted(paths)]


class _TokenMaker:
    """Makes tokens for those who may have them."""

    def __init__(self, components: Components) -> None:
        self._components = components
        self._auth = components.config.auth
        self._key = next(key for key in components.keys if key.algorithm == "HS256")
        self._topics = TangramTopics(self._auth)
        self._metrics = components.telemetry.metrics
        self._log = components.telemetry.loggers.get("relay.operators")
        self.is_open: bool = self._auth.tangram == "open"
        """Whether clients without the API key get tokens too."""
        per_s = components.config.limits.tokens_per_s
        self._rates = AddressBuckets(per_s, per_s * _BURST, time.monotonic()) if per_s else None

    async def answer(self, request: Request) -> Response:
        """Answer a request for a token, or a browser's question whether its page may send one."""
        headers: dict[str, str] = {}
        try:
            if self.is_open:
                self._check_origin(request, headers)
            if request.method == "OPTIONS":
                return Response(status_code=HTTPStatus.NO_CONTENT, headers=headers)
            return await self._make(request, headers)
        except _Refused as refused:
            self._metrics.refused[refused.kind] += 1
            if refused.kind.startswith("token: "):  # a wrong key is logged where it is found
                address = request.client.host if request.client else None
                text = "token refused: %s; address %s"
                self._log.warning(refused.kind, text, refused.text, address, address=address)
            return problem(refused.status, refused.text, {**headers, **(refused.headers or {})})

    def _check_origin(self, request: Request, headers: dict[str, str]) -> None:
        """Let pages read the answer that may connect; pages of other origins are refused, as by the handshake."""
        headers["vary"] = "Origin"
        config, scope = self._components.config, request.scope
        local = self._components.network_access.has_local_pages(scope)
        refused = check_origin(scope, config.allowed_origins, has_local_pages=local)
        if refused is not None:
            raise _Refused(refused.status, refused.text, "token: origin")
        if (origin := request.headers.get("origin")) is not None:
            headers["access-control-allow-origin"] = origin
        if request.method == "OPTIONS":
            headers["access-control-allow-methods"] = "POST"
            headers["access-control-allow-headers"] = "Content-Type, Authorization, X-API-Key"
            headers["access-control-max-age"] = str(_MAX_AGE_S)

    async def _make(self, request: Request, headers: dict[str, str]) -> Response:
        is_open = self._authorize(request)
        asked = await _read(request)
        claims: dict[str, Any] = {"id": asked.id or secrets.token_hex(4), "channel": asked.channel}
        if is_open:
            if not self._topics.rights_on(asked.channel) & Right.JOIN:
                text = f"no token for channel {asked.channel!r}: no entry of [[auth.tangram_topics]] permits it"
                raise _Refused(403, text, "token: topic")
            # Another client's id would open what is for that one.
            claims = {"id": secrets.token_hex(16), "channel": asked.channel, OPEN_CLAIM: True}
        claims["exp"] = int(time.time() + self._auth.tangram_ttl_s)
        expected = {"iss": self._auth.issuer, "aud": next(iter(self._auth.audience), "")}
        token = sign(claims | {name: value for name, value in expected.items() if value}, self._key)
        answer = TokenAnswer(channel=asked.channel, id=claims["id"], token=token)
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    def _authorize(self, request: Request) -> bool:
        """Say whether the token is given without the API key. Raises _Refused."""
        given = api_key_from(request.scope)
        if not self.is_open or given:
            fault = self._components.api_key_auth.authorize(request.scope, given, "rest")
            if fault is not None:
                kind = "rest: wrong key" if fault.is_wrong_key else "rest: not allowed"
                unauthorized = fault.status == HTTPStatus.UNAUTHORIZED
                raise _Refused(fault.status, fault.text, kind, {"www-authenticate": "Bearer"} if unauthorized else None)
            return False
        address = rate_limit_key(request.client.host) if request.client else ""
        if self._rates is not None and not self._rates.take(address, time.monotonic()):
            text = "too many tokens of this address at once; try again"
            raise _Refused(429, text, "token: rate", {"retry-after": "1"})
        return True


class TokenAnswer(BaseModel):
    """A token, in tangram's words."""

    channel: str
    id: str
    token: str


async def _read(request: Request) -> TokenRequest:
    """Read what is asked for, and no more than that may take. Raises _Refused."""
    body = b""
    try:
        async with aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > _BODY_MAX_BYTES:
                    raise _Refused(413, f"body: expected at most {_BODY_MAX_BYTES} bytes", "token: body too large")
    except ClientDisconnect:
        raise _Refused(400, "the body did not come in full", "token: no body") from None
    try:
        return TokenRequest.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False)
        text = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'body'}: {each['msg']}" for each in faults)
        raise _Refused(422, text, "token: malformed") from None
