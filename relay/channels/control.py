"""Control messages between nodes: disconnect or kick a user.

Owns the format of these messages on the bus, and which of them nodes may have missed; must not know how they travel or
who carries them out. One is a JSON object::

    {"do": "disconnect", "user": "alice", "reason": "banned", "sender": "6f1c2a9e", "number": 7}
    {"do": "kick", "user": "alice", "topic": "room:1", "sender": "6f1c2a9e", "number": 8}

A node whose link was interrupted asks the others for what it may have missed, and they send it again::

    {"do": "recall", "user": "", "sender": "b1e0c3d4"}
    {"do": "repeat", "user": "alice", "topic": "room:1", "sender": "6f1c2a9e", "number": 8, "age_s": 1.5}
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Literal, TypeVar

import msgspec

from relay.errors import BusUnavailable

T = TypeVar("T")

RECALL_S = 300.0
"""Seconds for which a control message is sent again to nodes that may have missed it."""

_OWN_MAX, _APPLIED_MAX = 1000, 10_000
"""Most messages that are kept meanwhile: of this node, and of all others."""

_RECALL_PAUSES_S = (0.2, 1.0, 5.0, 15.0, 60.0)
"""Seconds between tries to ask other nodes for control messages that may have been missed."""

_REPEAT_AFTER_S = 0.1
"""Seconds before messages are sent again: after a restart of Redis all nodes ask, and one answer is for all."""


class ControlMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One control message. The node ``sender`` has applied it already to its own sockets."""

    action: Literal["disconnect", "kick", "recall", "repeat"] = msgspec.field(name="do")
    user: str
    sender: str
    topic: str = ""
    reason: str = ""
    number: int = 0
    """Among those of its sender; 0 of a sender that repeats none."""
    age_s: float = 0.0
    """Of one that is sent again, seconds since it was sent first: what has begun since is not meant."""


_decode = msgspec.json.Decoder(ControlMessage).decode


def encode(message: ControlMessage) -> bytes:
    """Encode a control message."""
    return msgspec.json.encode(message)


def decode(data: bytes) -> ControlMessage | None:
    """Decode a control message; None where it is invalid, or of a kind that this version does not know."""
    try:
        message = _decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return None
    has_user = bool(message.user) or message.action == "recall"
    has_topic = bool(message.topic) or message.action != "kick"
    return message if has_user and has_topic else None


class ControlMessages:
    """The control messages of one node, and those of the last minutes: its own, for others, and which it has applied.

    Args: node: the name of this one.
          publish: sends one to all nodes.
          apply: carries one out here.
          clock: monotonic seconds.
    """

    def __init__(
        self,
        node: str,
        publish: Callable[[ControlMessage], asyncio.Future[None]],
        apply: Callable[[ControlMessage], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._publish = publish
        self._apply = apply
        self._clock = clock
        self._number = 0
        # When each was sent or applied first, in that order.
        self._own: dict[ControlMessage, float] = {}
        self._applied: dict[tuple[str, int], float] = {}
        self._repeat_timer: asyncio.TimerHandle | None = None

    def send(
        self, action: Literal["disconnect", "kick"], user: str, topic: str = "", reason: str = ""
    ) -> asyncio.Future[None]:
        """Apply a control message here and on all other nodes; BusUnavailable: only here."""
        self._number += 1
        message = ControlMessage(action, user, self._node, topic, reason, self._number)
        self._apply(message)
        self._own[message] = self._clock()
        self._drop_old()
        sent = self._publish(message)
        sent.add_done_callback(partial(self._sent, message))
        return sent

    def _sent(self, message: ControlMessage, sent: asyncio.Future[None]) -> None:
        if sent.cancelled() or sent.exception() is not None:  # its caller knows
            _ = self._own.pop(message, None)

    def receive(self, message: ControlMessage) -> None:
        """Take a control message that has come over the bus."""
        key = (message.sender, message.number)
        if message.sender == self._node:
            return  # it has come back to us
        if message.action == "recall":
            self._repeat_soon()
        elif message.action != "repeat" or key not in self._applied:
            self._applied[key] = self._clock() - message.age_s
            self._drop_old()
            self._apply(message)

    def _repeat_soon(self) -> None:
        if self._own and self._repeat_timer is None:
            self._repeat_timer = asyncio.get_running_loop().call_later(_REPEAT_AFTER_S, self._repeat)

    def _repeat(self) -> None:
        self._repeat_timer = None
        self._drop_old()
        now = self._clock()
        for message, at in self._own.items():
            _ = self._publish(msgspec.structs.replace(message, action="repeat", age_s=round(now - at, 3)))

    async def recall(self) -> None:
        """Have the other nodes send again what may have been missed, once the bus takes messages.

        This node's own are sent again too: one that was interrupted with it may have asked before it was heard here.
        """
        for pause_s in _RECALL_PAUSES_S:
            with suppress(BusUnavailable):
                await self._publish(ControlMessage("recall", "", self._node))
                self._repeat_soon()
                return
            await asyncio.sleep(pause_s)

    def _drop_old(self) -> None:
        oldest = self._clock() - RECALL_S
        _drop_first(self._own, _OWN_MAX, oldest)
        _drop_first(self._applied, _APPLIED_MAX, oldest)


def _drop_first(kept: dict[T, float], most: int, oldest: float) -> None:
    while kept and (len(kept) > most or next(iter(kept.values())) < oldest):
        del kept[next(iter(kept))]
