"""Everything this client raises on purpose.

ClientError
├── ConnectError        the connection could not be made
├── PushError           a push was not answered with ``ok``
│   └── JoinError       a join was not
└── QueueOverflow       a loop was too slow for its events, and had asked to be told so
"""

from typing import Any


class ClientError(Exception):
    """The root of them all."""


class ConnectError(ClientError):
    """The connection could not be made: nobody listens, the server refused, or it took too long."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"{url}: {why}")


class PushError(ClientError):
    """A push was not answered with ``ok``.

    Attributes: status: what the server answered, ``error`` as a rule; or, where it answered nothing: ``timeout``;
                ``disconnected``, when the connection or the topic was lost meanwhile and nobody knows whether the push
                arrived;
                ``closed``, when the topic, or the whole socket, is left or closed for good.
                response: the reply's, bytes or decoded JSON; None where there was no reply.
    """

    def __init__(self, topic: str, event: str, status: str, response: Any = None) -> None:
        self.topic = topic
        self.event = event
        self.status = status
        self.response = response
        super().__init__(f"{event} on {topic!r}: {self.reason}")

    @property
    def reason(self) -> Any:
        """The response's ``reason``, or the status where it gives none."""
        return self.response.get("reason", self.status) if isinstance(self.response, dict) else self.status


class JoinError(PushError):
    """The server refused the join, or did not answer it in time."""


class QueueOverflow(ClientError):
    """A topic with ``overflow="raise"`` had more events waiting than its ``limit``."""

    def __init__(self, topic: str, limit: int) -> None:
        super().__init__(f"{topic!r}: over {limit} events were waiting")
