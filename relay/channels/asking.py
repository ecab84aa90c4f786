"""Asking a plugin's handlers about a join or a push, in their order; and the one push that no handler sees.

Owns what follows from their answers; leaves to the socket how it is said on the wire.
"""

from collections.abc import Awaitable
from functools import partial
from typing import Any, Protocol

from relay.auth.session import SocketAuth, tokens_in
from relay.channels.hub import Subscriber
from relay.channels.pubsub import PubSub
from relay.errors import BusUnavailable, Reason
from relay.metrics import Metrics
from relay.plugins import hooks
from relay.plugins.dispatcher import HandlerError
from relay.plugins.hooks import Hook
from relay.protocol.payload import EMPTY, Payload
from relay.protocol.state import Push


class Asker(hooks.Socket, Subscriber, Protocol):
    """What a socket offers while a push of its own is dealt with."""

    def reply(self, push: Push, status: str, response: Payload) -> None:
        """Answer a push."""

    def refuse_push(self, push: Push, reason: str, response: Payload | None = None) -> None:
        """Answer a push with an error, and count it."""

    def stop_push(self, push: Push) -> bool:
        """Refuse a push that had to wait and has no right any more to go on; False where it has."""


async def ask_about_join(pubsub: PubSub, request: hooks.Join, found: tuple[Hook, ...]) -> Payload:
    """What the join's reply says once all handlers allow it. Raises Refused, InvalidPayload, HandlerError."""
    response: dict[str, Any] = {}
    for hook in found:
        await pubsub.caller.call_with_result(hook, request, partial(hooks.add_response, response))
    return hooks.to_payload(response)


async def ask_about_push(socket: Asker, pubsub: PubSub, metrics: Metrics, push: Push, found: tuple[Hook, ...]) -> None:
    """Have handlers deal with a push, then pass it on to the bus unless one of them stopped it."""
    topic = push.subscription.topic

    def reply(status: str, response: object) -> None:  # handlers may run in threads
        pubsub.call_in_loop(partial(socket.reply, push, status, hooks.to_payload(response)))

    def broadcast(event: str, payload: object, to_all: bool) -> Awaitable[None]:
        hooks.check_event(event)
        data = hooks.to_payload(payload)
        return pubsub.start_call(partial(pubsub.broadcast, topic, event, data, None if to_all else socket))

    request = hooks.Push(socket, topic, push.event, push.payload, reply, broadcast, push.subscription.identity)
    answer: Payload | None = None
    for hook in found:
        if socket.stop_push(push):
            return
        try:
            value = await pubsub.caller.call_with_result(hook, request, hooks.to_response)
            answer = value if answer is None else answer
        except hooks.Refused as refusal:
            socket.refuse_push(push, refusal.reason, refusal.response)
            return
        except hooks.InvalidPayload:
            socket.refuse_push(push, Reason.INVALID_PAYLOAD)
            return
        except HandlerError:
            socket.refuse_push(push, Reason.INTERNAL)
            return
    if socket.stop_push(push):  # again: handlers may have taken their time
        return
    if request.forwarded and not await _forward(pubsub, metrics, push, request.user, socket.id):
        socket.refuse_push(push, Reason.BUS_UNAVAILABLE)
    elif answer is not None:
        socket.reply(push, "ok", answer)
    elif not request.replied:
        socket.reply(push, "ok", EMPTY)


async def renew(socket: Asker, access: SocketAuth | None, push: Push) -> None:
    """Take the token that a push brings for the one that was given before."""
    _, token = tokens_in(push.payload)
    reason = None if access is None else await access.renew(token, push.subscription)
    if reason is None:
        socket.reply(push, "ok", EMPTY)
    else:
        socket.refuse_push(push, reason)


async def _forward(pubsub: PubSub, metrics: Metrics, push: Push, user: str | None, socket_id: str) -> bool:
    if not pubsub.can_publish:
        return False
    try:
        await pubsub.publish_push(push.subscription.topic, push.event, push.payload, user, socket_id)
    except BusUnavailable:
        return False
    metrics.pushes_out += 1
    return True
