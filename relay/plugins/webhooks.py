"""Webhooks: another program decides on joins and pushes, and receives leaves, over HTTP.

Owns what is asked and what an answer means; must not know how requests travel. It is a plugin like any other, on the
hooks that all plugins have. It comes last, so that a program is asked about what all others allow::

    {"type": "join", "topic": "room:1", "payload": {…}, "user": "alice", "socket": "6f1c2a9e-7"}
    {"type": "push", "topic": "room:1", "event": "new_msg", "payload": {…}, "user": "alice", "socket": "6f1c2a9e-7"}
    {"type": "leave", "topic": "room:1", "user": "alice", "socket": "6f1c2a9e-7"}

    {"allow": true}                                            also with "reply", and for a join with "presence"
    {"allow": false, "reason": "not a member"}
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NoReturn

import msgspec

from relay.config_webhooks import WebhookConfig
from relay.errors import ConfigError, Reason
from relay.plugins import Plugin
from relay.plugins.hooks import InvalidPayload, Join, Leave, Push, Refused
from relay.plugins.webhook_client import WebhookClient, WebhookError
from relay.plugins.webhook_signature import read_secret
from relay.protocol.payload import NESTING_MAX, as_json, is_deeper
from relay.proxy_headers import origin_of
from relay.telemetry import Telemetry

_TOKENS = ("token", "access_token")
"""Members of a join's params that may be tokens."""

_REASON = "refused"
"""The reason sent to a client where the answer gives none."""

_REASON_MAX_BYTES = 255


class _Verdict(msgspec.Struct):
    """What every answer has."""

    allow: bool
    reason: Any = None


class _Allowed(msgspec.Struct, forbid_unknown_fields=True):
    """An answer that allows a push; a member that is not known is a mistake of the program's."""

    allow: bool
    reason: Any = None
    reply: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _AllowedJoin(msgspec.Struct, forbid_unknown_fields=True):
    """An answer that allows a join."""

    allow: bool
    reason: Any = None
    reply: dict[str, Any] = {}
    presence: dict[str, Any] | None = None


_decode_verdict = msgspec.json.Decoder(_Verdict).decode
_decode_allowed = msgspec.json.Decoder(_Allowed).decode
_decode_allowed_join = msgspec.json.Decoder(_AllowedJoin).decode
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def make_plugin(webhooks: tuple[WebhookConfig, ...], telemetry: Telemetry) -> Plugin:
    """The plugin of all webhooks of a relay. Raises ConfigError: a secret cannot be read, or a pattern cannot match."""
    plugin = Plugin("webhooks")
    for at, config in enumerate(webhooks):
        webhook = _Webhook(config, _keys(config, at), telemetry)
        try:
            webhook.register(plugin)
        except ValueError as error:
            raise ConfigError(f"webhooks.{at}: {error}") from None
    return plugin


def _keys(config: WebhookConfig, at: int) -> tuple[bytes, ...]:
    try:
        return tuple(map(read_secret, config.secrets))
    except ValueError as error:
        raise ConfigError(f"webhooks.{at}.secrets: {error}") from None


class _Webhook:
    """One entry of ``[[webhooks]]``."""

    def __init__(self, config: WebhookConfig, keys: tuple[bytes, ...], telemetry: Telemetry) -> None:
        self._config = config
        self._name = config.label
        self._metrics = telemetry.metrics
        self._log = telemetry.loggers.get("relay.webhooks")
        self._client = WebhookClient(config, self._name, keys, telemetry.metrics)

    def register(self, plugin: Plugin) -> None:
        """Add the handlers that the settings ask for."""
        match, where = self._config.match, origin_of(self._config.url)

        async def open_client(relay: Any) -> None:
            self._client.open()

        async def close_client(relay: Any) -> None:
            await self._client.close()

        async def join(join: Join) -> dict[str, Any] | None:
            return await self._join(join)

        async def push(push: Push, *, before: tuple[str, ...]) -> Any:
            # One that several patterns match is asked about once.
            return None if any(fnmatchcase(push.event, pattern) for pattern in before) else await self._push(push)

        async def leave(leave: Leave) -> None:
            await self._leave(leave)

        for function in (open_client, close_client, join, leave):
            function.__qualname__ = where  # `relay plugins` shows it
        _ = plugin.on_startup(open_client)
        if "join" in self._config.on:
            _ = plugin.on_join(match)(join)
        if "push" in self._config.on:
            for at, event in enumerate(self._config.events):
                handler = partial(push, before=self._config.events[:at])
                handler.__qualname__ = where  # type: ignore[attr-defined]  # a partial takes any attribute
                _ = plugin.on_push(match, event)(handler)
        if "leave" in self._config.on:
            _ = plugin.on_leave(match)(leave)
        _ = plugin.on_shutdown(close_client)

    # The hooks.

    async def _join(self, join: Join) -> dict[str, Any] | None:
        said = await self._ask("join", join, {"payload": _without_tokens(join)}, _decode_allowed_join)
        if said is None:
            return None
        if said.presence is not None:
            try:
                join.set_presence(said.presence)
            except (ValueError, TypeError) as error:
                self._fail("join", WebhookError("bad_answer", f'"presence": {error}'))
                return None
        self._count("allowed")
        return said.reply or None

    async def _push(self, push: Push) -> Any:
        members = {"event": push.event, "payload": as_json(push.data)}
        said = await self._ask("push", push, members, _decode_allowed)
        if said is None:
            return None
        self._count("allowed")
        return None if said.reply is msgspec.UNSET else said.reply

    async def _leave(self, leave: Leave) -> None:
        try:
            await self._client.send(self._body("leave", leave, {}), lambda body: None, may_retry=True)
        except WebhookError as error:
            self._report("leave", error)
        else:
            self._count("delivered")

    # What is asked, and what is answered.

    async def _ask(
        self, kind: str, request: Join | Push, members: dict[str, Any], decode: Callable[[bytes], Any]
    ) -> Any:
        """Ask the program; None where it gives no answer and that is to allow. Raises Refused."""

        def read(body: bytes) -> Any:
            return _read(body, decode)

        try:
            said = await self._client.send(self._body(kind, request, members), read, may_retry=kind == "join")
        except WebhookError as error:
            self._fail(kind, error)
            return None
        if not said.allow:
            self._count("refused")
            raise Refused(_reason(said.reason))
        return said

    def _body(self, kind: str, request: Join | Push | Leave, members: dict[str, Any]) -> bytes:
        body = {"type": kind, "topic": request.topic, **members, "user": request.user, "socket": request.socket.id}
        if self._config.send_claims:
            body["claims"] = request.claims
        return _encode(body)

    def _fail(self, kind: str, error: WebhookError) -> None:
        """Do as the settings say where there is no answer. Raises Refused."""
        self._report(kind, error)
        if self._config.on_failure == "refuse":
            raise Refused(Reason.WEBHOOK_UNAVAILABLE)

    def _report(self, kind: str, error: WebhookError) -> None:
        self._count(error.outcome)
        self._log.warning(f"{self._name}: {error.outcome}", "webhook %s: %s not answered: %s", self._name, kind, error)

    def _count(self, outcome: str) -> None:
        self._metrics.webhook_requests[f"{self._name}: {outcome}"] += 1


def _without_tokens(join: Join) -> msgspec.Raw:
    """The params of a join without the tokens that it may bring. Raises InvalidPayload."""
    params = as_json(join.data)
    if not bytes(params).lstrip().startswith(b"{"):
        return params
    try:
        members = _decode_members(params)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise InvalidPayload(join, str(error)) from None
    if not any(name in members for name in _TOKENS):
        return params
    return msgspec.Raw(_encode({name: value for name, value in members.items() if name not in _TOKENS}))


def _read(body: bytes, decode: Callable[[bytes], Any]) -> Any:
    """Read an answer. What refuses is read leniently: it refuses, whatever else it says. Raises WebhookError."""
    try:
        _ = body.decode()
        verdict = _decode_verdict(body)
        if not verdict.allow:
            return verdict
        if is_deeper(body, NESTING_MAX):
            _bad(f"nested deeper than {NESTING_MAX} levels")
        return decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        _bad(str(error))


def _bad(text: str) -> NoReturn:
    raise WebhookError("bad_answer", f'expected {{"allow": true}} or {{"allow": false, "reason": "…"}}: {text:.200}')


def _reason(reason: object) -> str:
    text = reason.strip() if isinstance(reason, str) else ""
    return text.encode()[:_REASON_MAX_BYTES].decode(errors="ignore") or _REASON
