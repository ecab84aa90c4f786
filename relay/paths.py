"""Paths of requests: by segments, and as the client has encoded them.

Owns how an ASGI scope is read for its path; must not know which routes there are.
"""

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes


def route_path(scope: Mapping[str, Any]) -> str:
    """The path below the place where an app is mounted; empty for the place itself without a slash."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    rest = path.removeprefix(root)
    return rest if path.startswith(root) and (not rest or rest.startswith("/")) else path


def segments(path: str) -> tuple[str, ...]:
    """The parts of a path that are not empty: ``/socket//websocket/`` is ``("socket", "websocket")``."""
    return tuple(part for part in path.split("/") if part)


def below(path: str, count: int) -> str | None:
    """What follows the first ``count`` segments of a path, with one slash before it; None where there are fewer."""
    found = re.match(rf"(?:/+[^/]+){{{count}}}(?=/|\Z)", path)
    rest = None if found is None else path[found.end() :]
    return rest and "/" + rest.lstrip("/")


def split_raw(scope: Mapping[str, Any]) -> tuple[str, bytes, bool]:
    """Split a path into the mount, decoded, and what follows it, encoded.

    Returns: mount; rest; whether the rest is as the client has sent it. Where the server gives no raw path, or one of
             another request, the path is encoded here, and a ``/`` may have been a ``%2F``.
    """
    rest = route_path(scope)
    mount: str = scope["path"].removesuffix(rest) if rest else scope["path"]
    raw: bytes = scope.get("raw_path") or b""
    length, position = len(mount.encode()), 0
    while length and position < len(raw):
        position += 3 if raw[position] == ord("%") else 1
        length -= 1
    raw_rest = raw[position:]
    is_of_it = unquote_to_bytes(raw[:position]) == mount.encode() and unquote(raw_rest.decode("latin-1")) == rest
    if is_of_it and (not rest or raw_rest.startswith(b"/")):
        return mount, raw_rest, True
    return mount, quote(rest, safe="/:@!$&'()*+,;=~").encode(), False


def replace_route_path(scope: Mapping[str, Any], path: str, raw: bytes) -> dict[str, Any]:
    """A copy of a scope with another path below its mount."""
    mount, _, _ = split_raw(scope)
    return {**scope, "path": mount + path, "raw_path": quote(mount).encode() + raw}
