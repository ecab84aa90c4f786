"""What the REST interface says of topics' members.

Owns the form of the answer; must not know routes, or where members come from.
"""

import msgspec
from fastapi import HTTPException
from pydantic import BaseModel, Field, JsonValue
from starlette.responses import Response

from relay.errors import BusUnavailable
from relay.node import Node
from relay.protocol.presence import metas_by_key
from relay.protocol.topics import is_topic


class TopicPresence(BaseModel):
    """The members of a topic."""

    topic: str = Field(examples=["room:1"])
    count: int = Field(description="members, on all nodes: one for each join of a socket, or as plugins list them")
    members: dict[str, list[dict[str, JsonValue]]] | None = Field(
        examples=[{"alice": [{"user": "alice", "meta": {"name": "Al"}}]}],
        description="what is said of the members under each key; null where subscribers are sent their number alone: "
        'with presence = "count", and with more members than presence_max',
    )


async def read_presence(node: Node, topic: str) -> Response:
    """Answer with a topic's members, as a `TopicPresence`. Raises HTTPException."""
    if not is_topic(topic):
        raise HTTPException(422, f"topic {topic!r} cannot be")
    settings, members = node.config.topic(topic), None
    if not settings.presence:
        raise HTTPException(404, f"topic {topic!r} has no presence; set presence for it in [[topics]]")
    try:
        if settings.presence == "count":
            count = await node.presence_count(topic)
        else:
            found = await node.presence_members(topic)
            count = len(found)
            members = metas_by_key(found.values()) if count <= settings.presence_max else None
    except BusUnavailable as error:
        raise HTTPException(503, f"presence unavailable: {error}") from None
    # Verbatim: Python would change numbers.
    answer = msgspec.json.encode({"topic": topic, "count": count, "members": members})
    return Response(answer, media_type="application/json")
