"""`in_memory`: keeps a relay from Redis and from published keys while it is tested.

Owns what is changed of a relay's settings, and changes it back.
"""

import secrets
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from time import time
from types import TracebackType
from typing import Any, Self

from relay.app import Relay
from relay.config import Config
from relay.config_sections import KeyConfig
from relay.errors import RelayError

_KID = "relay.testing"
_TOKEN_TTL_S = 3600


def in_memory(relay: Relay) -> "InMemory":
    """Put a relay that does not run yet on ``memory://`` instead of Redis; call it, or use it with ``with``.

        with in_memory(relay), TestClient(app) as client: ...

    Histories and presence work in memory. If tokens are checked, a key of this test is accepted besides those of the
    settings, for ``connect(…, user=…)``, and ``auth.jwks_url`` is not fetched. The end of the block restores all.

    Raises: RelayError: the relay is running; TypeError: it is no `Relay`.
    """
    return InMemory(relay)


class InMemory:
    """What `in_memory` returns."""

    def __init__(self, relay: Relay) -> None:
        if not hasattr(relay, "components"):
            raise TypeError(f"in_memory: expected a Relay, got a {type(relay).__name__}")
        if relay.is_running:
            raise RelayError("the relay is running already; expected in_memory(relay) before its start")
        self._relay = relay
        self._before = relay.config, relay.components
        config = relay.config
        update: dict[str, Any] = {}
        if not config.broadcast_url.startswith("memory"):
            update |= {"redis_url": "", "broadcast_url": "memory://"}
        keys = relay.components.keys
        if config.auth.has_keys and key_of(relay) is None:
            from relay.auth.keys import Key

            secret = secrets.token_hex(32)
            keys = (*keys, Key(_KID, "HS256", secret.encode(), secret.encode()))
            changes: dict[str, Any] = {
                "jwks_url": "",
                "keys": config.auth.keys or (KeyConfig(key=secret, kid=_KID),),
                "algorithms": tuple(dict.fromkeys((*config.auth.algorithms, "HS256"))),
            }
            update["auth"] = config.auth.model_copy(update=changes)
        relay.config = config = config.model_copy(update=update)
        relay.components = replace(relay.components, config=config, keys=keys, without_redis=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._relay.config, self._relay.components = self._before


def key_of(relay: Relay) -> Any:
    """The key of this test; None without one."""
    return next((key for key in relay.components.keys if key.kid == _KID), None)


def make_token(relay: Relay, user: str, claims: Mapping[str, Any]) -> str:
    """A token that this relay accepts. Raises RelayError where it checks none."""
    config: Config = relay.config
    if not config.auth.has_keys:
        how = "by a function: pass headers=… or params=…" if relay.authenticates else "no client: set auth.keys"
        raise RelayError(f"user: expected a relay that checks tokens; this one authenticates {how}")
    key = key_of(relay)
    if key is None:
        raise RelayError("user: the relay was started before; expected in_memory(relay) first")
    from relay.auth.tokens import sign

    auth = config.auth
    given: dict[str, Any] = {"sub": user, "exp": int(time()) + _TOKEN_TTL_S}
    if auth.issuer:
        given["iss"] = auth.issuer
    if auth.audience:
        given["aud"] = auth.audience[0]
    return sign({**given, **claims}, key)


def send_redis_message(relay: Relay, channel: str, data: str | bytes) -> None:
    """Hand a message on a raw Redis channel to the ``on_redis`` handlers of a running relay, as Redis would.

    Raises: RelayError: no handler listens to this channel, or the relay does not run.
    """
    node = relay.node
    patterns = dict.fromkeys(hook.topic for hook in relay.plugins.hooks.redis)
    matching = [pattern for pattern in patterns if fnmatchcase(channel, pattern.replace("[^", "[!"))]
    if not matching:
        raise RelayError(f"no on_redis handler listens to {channel!r}; expected one of {', '.join(patterns) or 'some'}")
    encoded = data.encode() if isinstance(data, str) else data
    for pattern in matching:
        node.pubsub.call_in_loop(partial(node.pubsub.receive_message, pattern, channel, encoded))
