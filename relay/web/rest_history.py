"""What the REST interface says of topics' histories.

Owns the form of the answers; must not know routes, or where histories are kept.
"""

from functools import partial

import msgspec
from fastapi import HTTPException
from pydantic import BaseModel, Field, JsonValue
from starlette.responses import Response

from relay.brokers.base import Event, is_position
from relay.channels.history_reader import HistoryReader, Stored
from relay.errors import BusUnavailable
from relay.node import Node
from relay.protocol.payload import as_json, classify_payload
from relay.protocol.topics import is_topic

_DEFAULT_LIMIT = 100


class StoredEvent(BaseModel):
    """An event as it is stored."""

    event: str = Field(examples=["new_msg"])
    payload: JsonValue = Field(
        examples=[{"text": "hi"}], description='as published; a payload that is not JSON is {"base64": "…"}'
    )
    position: str = Field(examples=["1764150000000-17"])


class History(BaseModel):
    """Events of a topic's history, the oldest first."""

    topic: str = Field(examples=["room:1"])
    events: list[StoredEvent]
    position: str = Field(
        examples=["1764150000000-17"], description="of the last event here: later ones are behind this `since`"
    )
    more: bool = Field(description="whether there are more events behind `position`")
    recovered: bool | None = Field(
        description="whether every event behind `since` is here or, with `more`, behind `position`; "
        "null without `since`. If not, there are no events here"
    )
    reason: str | None = Field(examples=[None], description="why not all of them are there")


class HistoryDetails(BaseModel):
    """What a topic's history holds."""

    size: int = Field(description="most events that are kept")
    ttl_s: int = Field(description="seconds for which an event is kept")
    events: int | None = Field(description="events that are kept now; null while the history cannot be read")
    first: str | None = Field(description="position of the oldest")
    last: str | None = Field(description="position of the newest")
    bytes: int | None = Field(description="memory it takes in Redis, approximately")
    unavailable: str | None = Field(description="why the history cannot be read")


async def read_history(node: Node, topic: str, since: str | None, limit: int | None) -> Response:
    """Answer with the events behind ``since``, or the newest, as a `History`. Raises HTTPException."""
    if not is_topic(topic):
        raise HTTPException(422, f"topic {topic!r} cannot be")
    reader = node.history_of(topic)
    if reader is None:
        raise HTTPException(404, f"topic {topic!r} has no history; set history for it in [[topics]]")
    if since is not None and not is_position(since):
        raise HTTPException(422, f"since: expected a position such as 1764150000000-17, got {since!r:.100}")
    most = node.config.limits.recover_max_events
    if limit is not None and limit > most:
        raise HTTPException(422, f"limit: expected at most {most} (limits.recover_max_events), got {limit}")
    count = min(_DEFAULT_LIMIT, most) if limit is None else limit
    try:
        stored = await node.pubsub.home.run(partial(_read, reader, topic, since, count))
    except BusUnavailable as error:
        raise HTTPException(503, f"history unavailable: {error}") from None
    answer = {
        "topic": topic,
        "events": [_as_stored(event) for event in stored.events],
        "position": stored.position,
        "more": stored.has_more,
        "recovered": None if since is None else stored.fault is None,
        "reason": stored.fault,
    }
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _read(reader: HistoryReader, topic: str, since: str | None, limit: int) -> Stored:
    return await (reader.newest(topic, limit) if since is None else reader.behind(topic, since, limit))


def _as_stored(event: Event) -> dict[str, object]:
    payload = as_json(classify_payload(event.payload))  # verbatim: Python would change numbers
    return {"event": event.event, "payload": payload, "position": event.position}


async def describe(node: Node, topic: str) -> HistoryDetails | None:
    """What a topic's history holds; None where it has none."""
    reader = node.history_of(topic)
    if reader is None:
        return None
    return HistoryDetails(**(await node.pubsub.home.run(partial(reader.describe, topic)))._asdict())
