"""Messages on the channel of a topic, which bears the name of the topic's history.

Owns their form; must not know connections::

    new_msg:{"text":"hi"}                          an event: its name, a colon, the payload verbatim
    ::[new]:{"text":"hi"}                          the same, where the name begins like JSON
    :*6f1c2a9e.7:new_msg:{"text":"hi"}             the same with its sender
    :1764150000000-17:new_msg:{"text":"hi"}        the same with its position; publish.lua alone writes it
    :1764150000000-17*6f1c2a9e.7:new_msg:{}        the same with its sender
    :1764150000000-17:                             a notice: this is the newest position; check.lua writes it

The name of an event is never empty, so that a colon in the first place cannot be mistaken.
"""

from relay.brokers.base import Event, is_position

NO_NAME = b'{["'
"""What payloads begin with, where a publisher has forgotten the event's name."""


def pack(event: str, payload: bytes, sender: str | None = None) -> bytes:
    """Write a live event; the caller has checked the name."""
    name = event.encode()
    if sender is not None:
        head = f":*{sender}:".encode()
    else:
        head = b"::" if name[0] in NO_NAME else b""
    return b"%b%b:%b" % (head, name, payload)


def unpack(topic: str, data: bytes) -> Event | None:
    """Read a message; None where it names no event."""
    head = data.find(b":")
    position: str | None = None
    sender: str | None = None
    start = 0
    if head == 0:
        head = data.find(b":", 1)
        if head < 0:
            return None
        place, star, name = data[1:head].decode(errors="replace").partition("*")
        position = place or None
        sender = name if star else None
        if position is not None and not is_position(position):
            return None
        start = head + 1
        if start == len(data):  # a notice
            return None if position is None else Event(topic, "", b"", position)
        head = data.find(b":", start)
    if head <= start or (not start and data[0] in NO_NAME):
        return None
    return Event(topic, data[start:head].decode(errors="replace"), data[head + 1 :], position, sender)
