"""Who may operate the relay, by REST or at the console: whoever has the API key; without one, this machine alone.

Owns that decision, as a pure function of an ASGI scope, and the line about a key that was wrong; must not know what is
then done.
"""

import hmac
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from relay.config import Config
from relay.handshake import is_allowed_origin, is_loopback
from relay.logs import Throttle

# What proxies write, most of them. One that writes nothing is not to be told from a client on this machine.
_FORWARDED = frozenset(
    b"forwarded via x-forwarded-for x-forwarded-host x-forwarded-proto x-real-ip cf-connecting-ip".split()
)


class NotAllowed(NamedTuple):
    """Why somebody may not: HTTP status, and a sentence for the client."""

    status: int
    text: str
    is_wrong_key: bool = False
    """Whether a key was given, and is not the one."""


def key_in(scope: Mapping[str, Any]) -> bytes:
    """The key that a request brings, as ``Authorization: Bearer <key>`` or ``X-API-Key: <key>``; empty for none."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    return bearer if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def needs_key(config: Config, authenticates: bool) -> bool:
    """Whether nobody may operate a relay without a key: its clients, whoever they are, may all come from a proxy here.

    Args: authenticates: whether it asks them who they are, by keys or by a function.
    """
    return config.lets_others_in(authenticates) or bool(config.trusted_proxies)


class Operators:
    """Says who may operate one relay.

    Args: config: ``rest.api_key`` decides, where it is set.
          authenticates: as of `needs_key`.
    """

    def __init__(self, config: Config, authenticates: bool) -> None:
        self._api_key = config.rest.api_key.encode()
        self._needs_key = needs_key(config, authenticates)
        self._throttle = Throttle(logging.getLogger("relay.operators"))

    def admit(self, scope: Mapping[str, Any], given: bytes, door: str) -> NotAllowed | None:
        """As `check`, and say in the log from where a wrong key came, never which. To be counted by the caller.

        Args: door: where it was tried.
        """
        fault = self.check(scope, given)
        if fault is not None and fault.is_wrong_key:
            address = (scope.get("client") or (None,))[0]
            self._throttle.warning(door, "%s: refused a wrong API key; address %s", door, address, address=address)
        return fault

    def check(self, scope: Mapping[str, Any], given: bytes) -> NotAllowed | None:
        """Say why a request may not operate the relay; None where it may.

        Args: given: the key that it brings.
        """
        if self._api_key:
            if hmac.compare_digest(given, self._api_key):
                return None
            return NotAllowed(401, "expected the API key", is_wrong_key=given != b"")
        if self._needs_key:
            return NotAllowed(403, "this relay lets others in: nobody is answered without a key; set rest.api_key")
        headers = dict(scope["headers"])
        client = scope.get("client")
        # `Host` too: behind a proxy on this machine all clients come from here, and under a name that its owner
        # points here (DNS rebinding) any page of the web does.
        asked = headers.get(b"host", b"").decode("latin-1")
        if not is_loopback(client[0] if client else "") or not is_loopback(asked) or not _FORWARDED.isdisjoint(headers):
            return NotAllowed(403, "only clients on this machine are answered; set rest.api_key to let others in")
        # A page from elsewhere, open in a browser on this machine, is not a client on this machine.
        origin = headers.get(b"origin")
        if origin is not None and not is_allowed_origin(origin.decode("latin-1"), asked, "same"):
            return NotAllowed(403, "pages of other origins are not answered; set rest.api_key")
        return None
