"""The envelope: an event with its names, as text, for every bus that carries one channel per topic.

Owns its format; must not know buses. An envelope is a JSON object::

    {"topic": "room:1", "event": "new_msg", "payload": {"text": "hi"}}      payload is any JSON
    {"topic": "room:1", "event": "photo", "base64": "AP8="}                 payload was no JSON
    {"topic": "room:1", "event": "typing", "payload": {}, "sender": "6f1c2a9e.7"}

    {"topic": "room:1", "event": "typing", "payload": {}, "position": "1764150000000-17"}

``sender`` is there where `Broker.publish` was given one, ``position`` where the topic has a history. Members that are
not known are ignored, so that relays of different versions understand each other.
"""

import binascii
from base64 import b64decode, b64encode

import msgspec

from relay.brokers.base import Event
from relay.protocol.payload import classify_payload


class _Envelope(msgspec.Struct, omit_defaults=True):
    topic: str
    event: str
    payload: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    base64: str | msgspec.UnsetType = msgspec.UNSET
    sender: str | None = None
    position: str | None = None


_decode = msgspec.json.Decoder(_Envelope).decode


def pack(topic: str, event: str, payload: bytes, sender: str | None = None, position: str | None = None) -> str:
    """Put an event into an envelope."""
    checked = classify_payload(payload)
    envelope = _Envelope(topic, event, sender=sender, position=position)
    # Half a surrogate pair, as an escape, is JSON but not for the decoder of the envelope.
    if isinstance(checked, msgspec.Raw) and b"\\ud" not in payload.lower():
        envelope.payload = checked
    else:
        envelope.base64 = b64encode(payload).decode()
    return msgspec.json.encode(envelope).decode()


def unpack(text: str) -> Event:
    """Take an event out of an envelope. Raises ValueError where the text is not an envelope."""
    try:
        envelope = _decode(text)
        if isinstance(envelope.base64, str):
            payload = b64decode(envelope.base64, validate=True)
            return Event(envelope.topic, envelope.event, payload, envelope.position, envelope.sender)
    except (msgspec.DecodeError, RecursionError, UnicodeError, binascii.Error) as error:
        raise ValueError(str(error)) from error
    if isinstance(envelope.payload, msgspec.UnsetType):
        raise ValueError("expected `payload` or `base64`")
    return Event(envelope.topic, envelope.event, bytes(envelope.payload), envelope.position, envelope.sender)
