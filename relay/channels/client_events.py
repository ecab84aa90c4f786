"""Client events: pushes that go to the other subscribers of their topic, and to nothing else.

Owns which pushes these are and what may be in them; must not know how they travel. They are live-only: no handler of
on_push, no ``from:`` channel and no history gets them.
"""

from fnmatch import fnmatchcase

import msgspec

from relay.config_sections import RESERVED_CLIENT_EVENT_PREFIXES, LimitsConfig, TopicConfig
from relay.errors import Reason
from relay.protocol.payload import Payload, add_members
from relay.protocol.state import payload_size

SENDER_KEY = "_user"
"""The member of a payload that says who has sent it, where ``client_events_sender`` is set."""

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def is_client_event(settings: TopicConfig, event: str) -> bool:
    """Say whether a push of this name goes to the other subscribers. Reserved names never do, whatever the pattern."""
    return not event.startswith(RESERVED_CLIENT_EVENT_PREFIXES) and any(
        fnmatchcase(event, pattern) for pattern in settings.client_events
    )


def outgoing_payload(
    payload: Payload, settings: TopicConfig, limits: LimitsConfig, user: str | None
) -> Payload | Reason:
    """What the other subscribers are sent, or why the push is refused.

    With ``client_events_sender`` the user is the last member of the payload. So the payload has to be an object without
    a member of that name, however its key is written: clients take the last of several members, and others the first.
    """
    if payload_size(payload) > limits.client_events_max_bytes:
        return Reason.PAYLOAD_TOO_LARGE
    if not settings.client_events_sender:
        return payload
    if not isinstance(payload, msgspec.Raw):
        return Reason.INVALID_PAYLOAD
    try:
        members = _decode_object(payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return Reason.INVALID_PAYLOAD
    if SENDER_KEY in members:
        return Reason.INVALID_PAYLOAD
    return add_members(payload, {SENDER_KEY: user})
