"""What tangram's channel service does on the wire and Phoenix does not; all of it is off without ``[tangram]``.

A join's reply has an ``id``; topic ``admin`` receives who has joined and left what in this process; JSON that is
neither an object nor an array is delivered as bytes.

Source: tangram 0.6.0, ``packages/tangram_core/rust/src/channel/``.
"""

from collections.abc import Callable

import msgspec

from relay.auth.tangram import ADMIN_TOPIC
from relay.config_sections import TangramConfig
from relay.protocol.payload import Payload, add_members, classify_payload, encode_payload
from relay.protocol.state import Subscription

_LISTED_MAX = 200
"""Names in one event at most; tangram sends all of them at each join."""


class TangramWire:
    """The ids of joins, and what is published about them on topic ``admin``.

    Args: publish: sends an event to all nodes.
    """

    def __init__(self, publish: Callable[[str, str, Payload], object]) -> None:
        self._publish = publish
        self._joins: dict[str, dict[Subscription, str]] = {}

    def accept(
        self, socket_id: str, subscription: Subscription, response: Payload, replaces: Subscription | None = None
    ) -> Payload:
        """Note a join that is about to be accepted; returns its reply with the id of the join.

        Args: replaces: what it ends: an earlier join of the same socket.
        """
        if replaces is not None:
            self.left(replaces)
        topic = subscription.topic
        joins = self._joins.setdefault(topic, {})
        if not joins:
            self._tell("add", {"channel": topic, "channels": self._topics})
        agent = joins[subscription] = f"{socket_id}:{topic}:{subscription.join_ref}"
        self._tell("join", {"agent": agent, "channel": topic, "agents": self._agents(topic)})
        # What a plugin's handler answers counts more.
        return response if has_member(response, "id") else add_members(response, {"id": agent})

    def joined(self, topic: str) -> None:
        """Tell who has joined what, if it is topic ``admin`` that has been joined."""
        if topic == ADMIN_TOPIC:
            for name in self._topics:
                self._tell("list", {"channel": name, "agents": self._agents(name)})

    def left(self, subscription: Subscription) -> None:
        """Note the end of a join, if it was accepted."""
        topic = subscription.topic
        agent = self._joins.get(topic, {}).pop(subscription, None)
        if agent is None:
            return
        self._tell("leave", {"agent": agent, "channel": topic, "agents": self._agents(topic)})
        if not self._joins[topic]:
            del self._joins[topic]
            self._tell("remove", {"channel": topic, "channels": self._topics})

    @property
    def _topics(self) -> list[str]:
        return [topic for _, topic in zip(range(_LISTED_MAX), self._joins, strict=False)]

    def _agents(self, topic: str) -> list[str]:
        return [agent for _, agent in zip(range(_LISTED_MAX), self._joins[topic].values(), strict=False)]

    def _tell(self, what: str, meta: dict[str, object]) -> None:
        self._publish(ADMIN_TOPIC, f"channel.{what}", encode_payload(meta))


def has_member(response: Payload, name: str) -> bool:
    """Say whether an object has a member of this name."""
    if name.encode() not in bytes(response):
        return False
    try:
        found = msgspec.json.decode(bytes(response))
    except msgspec.DecodeError:
        return False
    return isinstance(found, dict) and name in found


def classifier(config: TangramConfig) -> Callable[[bytes], Payload]:
    """What tells JSON from bytes in published payloads: for tangram, JSON begins with ``{`` or ``[``."""
    return _objects_alone if config.binary_scalars else classify_payload


def _objects_alone(data: bytes) -> Payload:
    return classify_payload(data) if data[:1] in (b"{", b"[") else data
