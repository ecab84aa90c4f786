"""Who may operate the relay, by REST or at the console: whoever has the API key; without one, this machine alone.

Owns that decision, as a pure function of an ASGI scope; must not know what is then done.
"""

import hmac
import ipaddress
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from relay.handshake import is_allowed_origin


class NotAllowed(NamedTuple):
    """Why somebody may not: HTTP status, and a sentence for the client."""

    status: int
    text: str


def key_in(scope: Mapping[str, Any]) -> bytes:
    """The key that a request brings, as ``Authorization: Bearer <key>`` or ``X-API-Key: <key>``; empty for none."""
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    return bearer if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


def check(scope: Mapping[str, Any], given: bytes, api_key: str) -> NotAllowed | None:
    """Say why a request may not operate the relay; None where it may.

    Args: given: the key that it brings.
          api_key: the setting of that name.
    """
    if api_key:
        if hmac.compare_digest(given, api_key.encode()):
            return None
        return NotAllowed(401, "expected the API key")
    headers = dict(scope["headers"])
    client = scope.get("client")
    # `Host` too: behind a proxy on this machine all clients come from here, and under a name that its owner
    # points here (DNS rebinding) any page of the web does.
    asked = headers.get(b"host", b"").decode("latin-1")
    forwarded = any(name in headers for name in (b"forwarded", b"x-forwarded-for", b"x-real-ip"))
    if not _is_loopback(client[0] if client else "") or not _is_loopback(asked) or forwarded:
        return NotAllowed(403, "only clients on this machine are answered; set rest.api_key to let others in")
    # A page from elsewhere, open in a browser on this machine, is not a client on this machine.
    origin = headers.get(b"origin")
    if origin is not None and not is_allowed_origin(origin.decode("latin-1"), asked, "same"):
        return NotAllowed(403, "pages of other origins are not answered; set rest.api_key")
    return None


def _is_loopback(authority: str) -> bool:
    """Say whether ``host``, ``host:port`` or an address without brackets names this machine."""
    try:
        if authority.count(":") > 1 and not authority.startswith("["):
            authority = f"[{authority}]"
        host = urlsplit(f"//{authority}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
