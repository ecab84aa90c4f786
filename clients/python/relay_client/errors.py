"""Exceptions of this client.

ClientError
├── ConnectError        the connection could not be made
├── PushError           a push was not answered with ``ok``
│   └── JoinError       a join was not
└── QueueOverflow       a loop with ``overflow="raise"`` was too slow for its events
"""

from typing import Any


class ClientError(Exception):
    """Base class of all exceptions of this client."""


class ConnectError(ClientError):
    """The connection failed: no server listens, the server refused it, or it took too long."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"{url}: {why}")


class PushError(ClientError):
    """A push was not answered with ``ok``.

    Attributes: topic, event: of the push.
                status: the status of the reply, usually ``error``; or, without a reply: ``timeout``;
                ``disconnected`` if the connection or the topic was lost, so that the push may have arrived or not;
                ``closed`` if the topic or the socket has been left or closed.
                response: the response in the reply, bytes or decoded JSON; None without a reply.
    """

    def __init__(self, topic: str, event: str, status: str, response: Any = None) -> None:
        self.topic = topic
        self.event = event
        self.status = status
        self.response = response
        super().__init__(f"{event} on {topic!r}: {self.reason}")

    @property
    def reason(self) -> Any:
        """The ``reason`` in the response, or the status if there is none."""
        return self.response.get("reason", self.status) if isinstance(self.response, dict) else self.status


class JoinError(PushError):
    """The server refused the join, or did not answer it in time."""


class QueueOverflow(ClientError):
    """A topic with ``overflow="raise"`` had more events waiting than its ``limit``."""

    def __init__(self, topic: str, limit: int) -> None:
        super().__init__(f"{topic!r}: over {limit} events were waiting")
