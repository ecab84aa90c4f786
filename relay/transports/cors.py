"""Headers of answers that pages of other origins may read.

Owns these headers; must not know which origins those are.
"""

from relay.transports.base import Scope

_HEADERS = {
    "cache-control": "no-store",
    "referrer-policy": "no-referrer",
    "x-accel-buffering": "no",
    "x-content-type-options": "nosniff",
    "vary": "Origin",
}


def headers(scope: Scope, *, may_read: bool = True) -> dict[str, str]:
    """The headers of an answer.

    Args: may_read: whether the page that asks may connect, and so may read the answer.
    """
    origin = header(scope, b"origin")
    if origin is None or not may_read:
        return dict(_HEADERS)
    return {**_HEADERS, "access-control-allow-origin": origin, "access-control-allow-credentials": "true"}


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of a name, in lower case; None without one."""
    return next((value.decode("latin-1") for each, value in scope["headers"] if each == name), None)
