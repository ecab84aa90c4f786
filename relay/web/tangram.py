"""``POST /token``, as tangram has it: makes a token that opens one topic.

Owns that route; must not know how tokens are checked.
"""

import secrets
import time
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from relay.auth.api_key import api_key_from
from relay.auth.tokens import sign
from relay.node import Components
from relay.web.pages import problem


class TokenRequest(BaseModel):
    """Who asks for a token, in tangram's words."""

    channel: str = Field(min_length=1, max_length=255)
    id: str | None = Field(None, min_length=1, max_length=255)


def token_route(components: Components) -> Route:
    """Make the route: ``{"channel", "id"?}`` is answered by ``{"channel", "id", "token"}``.

    A client gets a token if it may use the REST interface, and only then.
    """
    key = next(key for key in components.keys if key.algorithm == "HS256")
    auth = components.config.auth

    async def make_token(request: Request) -> Response:
        if refused := _refusal(request, components):
            return refused
        try:
            asked = TokenRequest.model_validate_json(await request.body())
        except ValidationError as error:
            faults = error.errors(include_input=False, include_url=False)
            return problem(422, "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in faults))
        claims: dict[str, Any] = {"id": asked.id or secrets.token_hex(4), "channel": asked.channel}
        claims["exp"] = int(time.time() + auth.tangram_ttl_s)
        expected = {"iss": auth.issuer, "aud": next(iter(auth.audience), "")}
        token = sign(claims | {name: value for name, value in expected.items() if value}, key)
        return JSONResponse({"channel": asked.channel, "id": claims["id"], "token": token})

    return Route("/token", make_token, methods=["POST"])


def _refusal(request: Request, components: Components) -> Response | None:
    fault = components.api_key_auth.authorize(request.scope, api_key_from(request.scope), "rest")
    if fault is None:
        return None
    components.telemetry.metrics.refused["rest: wrong key" if fault.is_wrong_key else "rest: not allowed"] += 1
    headers = {"www-authenticate": "Bearer"} if fault.status == HTTPStatus.UNAUTHORIZED else None
    return problem(fault.status, fault.text, headers)
