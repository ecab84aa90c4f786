"""How an upgrade request is answered: by 101, or by an HTTP error with a sentence in it.

Owns these two answers; must not know what they depend on.
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
