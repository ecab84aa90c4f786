"""Upgrade requests: which need no second parser, what is answered to them, and what is wrong with the others.

Owns which requests are plain, by their heads as httptools has read them. websockets judges the others, but for what it
would answer in the wrong words. Source: RFC 6455, sections 4.2 and 4.4.
"""

import re
from base64 import b64decode
from binascii import Error, b2a_base64
from collections.abc import Iterable, Sequence
from hashlib import sha1
from typing import TypeAlias

from websockets.datastructures import Headers

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""Source: RFC 6455, section 1.3."""

# Well below the bounds of websockets (8 KiB and 128), which refuses what is larger.
_LINE_MAX_BYTES = 4096
_HEADERS_MAX = 100

_VERSION = "13"

_ONCE = frozenset(
    (
        b"upgrade",
        b"connection",
        b"origin",
        b"sec-websocket-version",
        b"sec-websocket-key",
        b"sec-websocket-protocol",
        b"sec-websocket-extensions",
    )
)
_NEVER = frozenset((b"content-length", b"transfer-encoding"))
_CONNECTIONS = (b"upgrade", b"keep-alive, upgrade", b"upgrade, keep-alive")

_TOKENS = re.compile(rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]+(, ?[-!#$%&'*+.^_`|~0-9a-zA-Z]+)*")

RawHeaders: TypeAlias = Sequence[tuple[bytes, bytes]]
"""Names in lower case, and values."""


def accept_plain(target: bytes, headers: RawHeaders, negotiates: bool) -> bytes | None:
    """Value of ``Sec-WebSocket-Accept`` for a plain request; None where websockets has to judge it.

    Args: target: of a GET request without a body whose ``Connection`` contains ``upgrade``.
          negotiates: whether the server has extensions, such as compression.
    """
    if len(headers) > _HEADERS_MAX or len(target) > _LINE_MAX_BYTES or not target.isascii():
        return None
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if len(name) + len(value) > _LINE_MAX_BYTES or name in _NEVER:
            return None
        if name in _ONCE:
            if name in found:
                return None
            found[name] = value
    if negotiates and b"sec-websocket-extensions" in found:
        return None
    key = found.get(b"sec-websocket-key", b"")
    is_plain = (
        found.get(b"sec-websocket-version") == _VERSION.encode()
        and found.get(b"upgrade", b"").lower() == b"websocket"
        and found.get(b"connection", b"").lower() in _CONNECTIONS
        and _TOKENS.fullmatch(found.get(b"sec-websocket-protocol", b"none")) is not None
        and _is_key(key)
    )
    if not is_plain:
        return None
    return b2a_base64(sha1(key + _GUID, usedforsecurity=False).digest(), newline=False)


def _is_key(key: bytes) -> bool:
    try:
        return len(key) == 24 and len(b64decode(key, validate=True)) == 16
    except Error:
        return False


def switching_protocols(accept: bytes, headers: Iterable[tuple[bytes, bytes]], subprotocol: str | None) -> bytes:
    """The answer that ends the handshake.

    Args: accept: what `accept_plain` has given.
          headers: further ones, of the server and of the application.
    """
    lines = [
        b"HTTP/1.1 101 Switching Protocols",
        b"upgrade: websocket",
        b"connection: Upgrade",
        b"sec-websocket-accept: " + accept,
        *(name + b": " + value for name, value in headers),
    ]
    if subprotocol:
        lines.append(b"sec-websocket-protocol: " + subprotocol.encode())
    return b"\r\n".join((*lines, b"", b""))


def _elements(headers: Headers, name: str) -> list[str]:
    """The elements of a header that is a list, in one line or several."""
    values = ",".join(headers.get_all(name)).split(",")
    return [element for each in values if (element := each.strip(" \t"))]


def refusal(headers: Headers) -> tuple[int, str, str, *tuple[str, ...]] | None:
    """Why an upgrade request cannot pass, as the protocol class refuses it; RFC 6455, section 4.2."""
    versions = headers.get_all("Sec-WebSocket-Version")
    if versions != [_VERSION]:
        text = f"expected Sec-WebSocket-Version: {_VERSION}, got {', '.join(versions)[:100] or 'none'}"
        known = f"Sec-WebSocket-Version: {_VERSION}"
        return (426, text, "websocket version", known, "Upgrade: websocket")
    keys = headers.get_all("Sec-WebSocket-Key")
    if len(keys) != 1 or not _is_key(keys[0].encode()):
        text = f"expected one Sec-WebSocket-Key, the base64 of 16 bytes, got {', '.join(keys)[:100] or 'none'}"
        return (400, text, "malformed")
    return None


def tidy(headers: Headers) -> None:
    """Write the lists as websockets takes them: one protocol to upgrade to, and no header without an element."""
    if "websocket" in (element.lower() for element in _elements(headers, "Upgrade")):
        del headers["Upgrade"]
        headers["Upgrade"] = "websocket"
    for name in ("Connection", "Sec-WebSocket-Protocol", "Sec-WebSocket-Extensions"):
        if name in headers:
            elements = _elements(headers, name)
            del headers[name]
            if elements:
                headers[name] = ", ".join(elements)
