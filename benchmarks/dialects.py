"""What a client and a publisher say to each kind of server.

Owns the bytes of requests and publications; must not know sockets or processes. A client's frames are masked with zeros
(RFC 6455, section 5.3, allows any key), so that the mask costs the load generator nothing.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import NamedTuple, Protocol

FRAME_BYTES = 220
"""Size of an event on a Phoenix socket, WebSocket header included; the floor writes as many."""

TOPIC = "room:1"
EVENT = "new_msg"


class Step(NamedTuple):
    """Something a client says while it joins, and what the answer must hold, ``times`` times, before the next."""

    send: bytes
    expect: bytes
    times: int = 1


class Dialect(Protocol):
    """How one kind of server is spoken to."""

    def steps(self, topics: Sequence[str]) -> list[Step]:
        """From the connection to having joined all topics."""

    def publication(self, topic: str, payload: bytes) -> tuple[bytes, bytes]:
        """The Redis channel and the message that make the server deliver ``payload``."""


def payload(number: int, time_ns: int, size: int) -> bytes:
    """A JSON object of exactly ``size`` bytes that carries its number and the time it was made."""
    head = b'{"n":"%08d","t":"%019d","x":"' % (number, time_ns)
    return head + b"y" * (size - len(head) - 2) + b'"}'


def payload_bytes(topic: str = TOPIC, frame_bytes: int = FRAME_BYTES) -> int:
    """Size of the payload that makes a Phoenix frame of ``frame_bytes``."""
    return frame_bytes - 4 - len(f'[null,null,"{topic}","{EVENT}",]')


def text_frame(data: bytes) -> bytes:
    """A client's text frame."""
    size = len(data)
    length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2)
    return b"\x81" + length + b"\0\0\0\0" + data


def upgrade(target: str) -> Step:
    """The opening handshake."""
    request = (
        f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    return Step(request.encode(), b"\r\n\r\n")


def push_frame(ref: int, topic: str, event: str, body: bytes) -> bytes:
    """A push on a subscription whose join_ref is 1."""
    return text_frame(b'["1","%d","%s","%s",%s]' % (ref, topic.encode(), event.encode(), body))


def heartbeat_frame(ref: int) -> bytes:
    """A heartbeat."""
    return text_frame(b'[null,"%d","phoenix","heartbeat",{}]' % ref)


class Bare:
    """The floor: a client connects and is there; nothing is published, since the floor has its own timer."""

    def steps(self, topics: Sequence[str]) -> list[Step]:
        """Nothing to say."""
        return []

    def publication(self, topic: str, payload: bytes) -> tuple[bytes, bytes]:
        """There is none."""
        raise NotImplementedError


class Phoenix:
    """The relay."""

    target = "/socket/websocket?vsn=2.0.0"
    params = "{}"

    def steps(self, topics: Sequence[str]) -> list[Step]:
        """Upgrade, then all joins in one write."""
        joins = [
            text_frame(f'["1","{place + 1}","{topic}","phx_join",{self.params}]'.encode())
            for place, topic in enumerate(topics)
        ]
        return [upgrade(self.target), *([Step(b"".join(joins), b'"phx_reply"', len(joins))] if joins else [])]

    def publication(self, topic: str, payload: bytes) -> tuple[bytes, bytes]:
        """Plain: ``to:<topic>:<event>``."""
        return f"to:{topic}:{EVENT}".encode(), payload


class Tangram(Phoenix):
    """tangram's `channel` service: Phoenix's frames, another path, and a token in the join."""

    target = "/websocket"

    def __init__(self, secret: str) -> None:
        claims = {"id": "benchmark", "channel": TOPIC, "exp": 4_000_000_000}
        signed = b".".join(_base64url(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
        signature = _base64url(hmac.digest(secret.encode(), signed, hashlib.sha256))
        self.params = json.dumps({"token": (signed + b"." + signature).decode()})


class SocketIO:
    """python-socketio: Engine.IO's and Socket.IO's openings; publications are what its manager's ``emit`` sends."""

    def steps(self, topics: Sequence[str]) -> list[Step]:
        """Upgrade, wait for the ``open`` packet, connect to the namespace; the server puts it into the room."""
        return [upgrade("/socket.io/?EIO=4&transport=websocket"), Step(b"", b"0{"), Step(text_frame(b"40"), b"40{")]

    def publication(self, topic: str, payload: bytes) -> tuple[bytes, bytes]:
        """As ``AsyncPubSubManager.emit`` of python-socketio 5.18 publishes it."""
        head = f'{{"method":"emit","event":"{EVENT}","binary":false,"namespace":"/","room":"{topic}",'
        return b"socketio", head.encode() + b'"skip_sid":null,"callback":null,"host_id":"load","data":[%s]}' % payload


class Broadcaster:
    """broadcaster's README: whoever connects is in the chat room."""

    def steps(self, topics: Sequence[str]) -> list[Step]:
        """Upgrade; the subscription is not confirmed."""
        return [upgrade("/")]

    def publication(self, topic: str, payload: bytes) -> tuple[bytes, bytes]:
        """The message as it is."""
        return b"chatroom", payload


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
