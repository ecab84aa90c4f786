"""How an upgrade request is answered: by 101, or by an HTTP error with a sentence in it.

Owns these answers; must not know what they depend on.
"""

from relay.handshake import Refused
from relay.transport import ReceiveCallable, Scope, SendCallable


async def accept(receive: ReceiveCallable, send: SendCallable, subprotocol: str | None) -> None:
    """Answer an upgrade request with 101."""
    await receive()
    await send({"type": "websocket.accept", "subprotocol": subprotocol})


async def refuse(scope: Scope, receive: ReceiveCallable, send: SendCallable, refused: Refused) -> None:
    """Answer an upgrade request with an HTTP error: the ASGI denial response where the server has it, else 403."""
    await receive()
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1008, "reason": refused.text})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.retry_after_s:
        headers.append((b"retry-after", str(refused.retry_after_s).encode()))
    await send({"type": "websocket.http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": f"{refused.text}\n".encode()})


async def ask_for_upgrade(scope: Scope, receive: ReceiveCallable, send: SendCallable) -> None:
    """Answer a plain HTTP request for a socket with 426, and say what it lacks."""
    headers = [(b"upgrade", b"websocket"), (b"connection", b"Upgrade"), (b"sec-websocket-version", b"13")]
    text = f"this is a WebSocket: {_lack(scope)}\n".encode()
    headers += [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 426, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def _lack(scope: Scope) -> str:
    """What keeps a request from being an upgrade; RFC 6455, section 4.1."""
    version, method = scope.get("http_version", "1.1"), scope["method"]
    if version != "1.1":
        return f"expected HTTP/1.1, got HTTP/{version}; a proxy in between has to pass HTTP/1.1 on"
    if method != "GET":
        return f"expected GET, got {method}"
    if "websocket" not in _elements(scope, b"upgrade"):
        return "expected the header Upgrade: websocket; a proxy in between has to pass it on"
    if "upgrade" not in _elements(scope, b"connection"):
        return "expected the header Connection: Upgrade; a proxy in between has to pass it on"
    return "expected an upgrade request without a body"


def _elements(scope: Scope, wanted: bytes) -> list[str]:
    lines = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == wanted]
    return [element.strip(" \t") for element in ",".join(lines).split(",")]
