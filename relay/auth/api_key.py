"""Access to REST and the console: clients with the API key; without a key in the settings, this machine alone.

Owns that decision and the one about access to the metrics, as pure functions of an ASGI scope, and the log line about
a wrong key; must not know what is then done.
"""

import hmac
from collections.abc import Mapping
from typing import Any, NamedTuple

from relay.config import Config
from relay.log import RateLimitedLoggers
from relay.transports.network_access import NetworkAccess, is_foreign_page, is_this_machine, why_not_local_host


class AccessDenied(NamedTuple):
    """Why a client has no access: HTTP status, and a sentence for the client."""

    status: int
    text: str
    is_wrong_key: bool = False
    """Whether a key was given, and is not the one."""


def api_key_from(scope: Mapping[str, Any]) -> bytes:
    """The key that a request brings, as ``X-API-Key: <key>`` or ``Authorization: Bearer <key>``; empty for none.

    The former comes first: the latter may be a token of a gateway or of the application.
    """
    headers: dict[bytes, bytes] = dict(scope["headers"])
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    return headers.get(b"x-api-key") or (bearer.strip(b" ") if scheme.lower() == b"bearer" else b"")


class ApiKeyAuth:
    """Decides which requests may use REST and the console of one relay, and which may read its metrics.

    Args: config: ``rest.api_key`` decides, where it is set; for metrics ``metrics.key`` and ``metrics.public``.
          authenticates: whether clients are asked who they are, by keys or by a function.
          loggers: the relay's, where wrong keys are logged.
    """

    def __init__(self, config: Config, authenticates: bool, loggers: RateLimitedLoggers | None = None) -> None:
        self._api_key = config.rest.api_key.encode()
        self._metrics_key = (config.metrics.key or config.rest.api_key).encode()
        self._metrics_are_public = config.metrics.public
        self._reach = NetworkAccess(config, authenticates)
        # Where others are let in, all clients may come from a proxy on this machine.
        self._openings = config.exposure(authenticates).openings
        self._log = (loggers or RateLimitedLoggers()).get("relay.operators")

    def authorize(self, scope: Mapping[str, Any], given: bytes, door: str) -> AccessDenied | None:
        """As `check`, and say in the log from where a wrong key came, never which. To be counted by the caller.

        Args: door: where it was tried.
        """
        return self._logged(scope, self.check(scope, given), door)

    def _logged(self, scope: Mapping[str, Any], fault: AccessDenied | None, door: str) -> AccessDenied | None:
        if fault is not None and fault.is_wrong_key:
            address = (scope.get("client") or (None,))[0]
            self._log.warning(door, "wrong API key refused (%s); address %s", door, address, address=address)
        return fault

    def check(self, scope: Mapping[str, Any], given: bytes) -> AccessDenied | None:
        """Say why a request may not operate the relay; None where it may.

        Args: given: the key that it brings.
        """
        if self._api_key:
            if hmac.compare_digest(given, self._api_key):
                return None
            return AccessDenied(401, "expected the API key", is_wrong_key=given != b"")
        if self._openings:
            named = ", ".join(self._openings)
            return AccessDenied(
                403, f"an API key is required because other clients are allowed ({named}); set rest.api_key"
            )
        if not is_this_machine(scope):
            named = why_not_local_host(scope)
            return AccessDenied(
                403, f"only clients on this machine are answered{named}; set rest.api_key to let others in"
            )
        if is_foreign_page(scope):
            return AccessDenied(403, "pages of other origins are not answered; set rest.api_key")
        return None

    def has_key(self, scope: Mapping[str, Any]) -> bool:
        """Say whether a request brings the API key."""
        return bool(self._api_key) and hmac.compare_digest(api_key_from(scope), self._api_key)

    def may_know_reasons(self, scope: Mapping[str, Any]) -> bool:
        """Say whether a request may learn why the relay is not ready: it may name what is behind the relay."""
        return self.has_key(scope) or (is_this_machine(scope) and not is_foreign_page(scope))

    def admit_to_metrics(self, scope: Mapping[str, Any]) -> AccessDenied | None:
        """Say why a request may not read the metrics; None where it may. A wrong key is logged."""
        given = api_key_from(scope)
        if self._metrics_are_public or (self._metrics_key and hmac.compare_digest(given, self._metrics_key)):
            return None
        if is_this_machine(scope) if self._openings else self._reach.check(scope) is None:
            return None
        what = "set metrics.key and send it as a bearer key, or set metrics.public = true"
        if not self._metrics_key:
            return AccessDenied(403, f"/metrics answers this machine alone; {what}")
        text = f"expected the key of /metrics (metrics.key, else rest.api_key); or {what}"
        return self._logged(scope, AccessDenied(401, text, is_wrong_key=given != b""), "metrics")
