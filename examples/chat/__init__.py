"""A chat room on each topic ``chat:<room>``, with a page at ``/api/chat/``.

    join  chat:lobby  {"nick": "Ada"}                          reply {"nick": "Ada"}
    push  new_msg     {"text": "Hello"}                        reply {"at": "2026-05-04T09:30:00Z"}
    event new_msg     {"nick": "Ada", "text": "Hello", "at": "2026-05-04T09:30:00Z"}, the sender hears it too

The settings of the topic do the rest: ``presence = "plugin"`` lists the members, each with its nick, and
``client_events = ["typing"]`` sends who is typing from browser to browser, ``{"nick": "Ada", "typing": true}``.

Nothing is kept: who joins later hears what is said from then on. A nick is held by one socket of a room; where a relay
has several workers, by one in each.
"""

from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.staticfiles import StaticFiles

from relay import Join, Leave, Plugin, Push, Refused

plugin = Plugin("chat")
router = APIRouter(prefix="/chat", tags=["chat"])
plugin.include_router(router)

NICK_MAX, TEXT_MAX = 24, 2000  # characters

nicks: defaultdict[str, dict[str, str]] = defaultdict(dict)
"""Who is in a room: topic → id of the socket → nick."""


@plugin.on_join("chat:*")
async def enter(join: Join) -> dict[str, str]:
    """Accept a join with a nick that no other member of the room uses."""
    nick = required(join.payload, "nick", NICK_MAX)
    room = nicks[join.topic]
    if nick.casefold() in map(str.casefold, room.values()):
        raise Refused("nick is taken")
    room[join.socket.id] = nick
    join.set_presence({"nick": nick})  # in the list of members
    return {"nick": nick}


@plugin.on_leave("chat:*")
async def leave(leave: Leave) -> None:
    """Free the nick, whether its owner left or was lost."""
    nicks[leave.topic].pop(leave.socket.id, None)
    if not nicks[leave.topic]:
        del nicks[leave.topic]


@plugin.on_push("chat:*", "new_msg")
async def new_msg(push: Push) -> dict[str, str]:
    """Tell everybody in the room; the returned value is the sender's reply."""
    text = required(push.payload, "text", TEXT_MAX)
    nick = nicks.get(push.topic, {}).get(push.socket.id)
    if nick is None:
        raise Refused("no longer in the room")
    at = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    await push.broadcast("new_msg", {"nick": nick, "text": text, "at": at})
    return {"at": at}


def required(payload: Any, key: str, length_max: int) -> str:
    """Take a text out of what a client sent, which may be anything. Raises Refused."""
    text = payload.get(key) if isinstance(payload, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise Refused(f"{key} is missing")
    if len(text) > length_max:
        raise Refused(f"{key} has over {length_max} characters")
    return text.strip()


page = StaticFiles(directory=Path(__file__).parent / "page", html=True)


@router.get("/{path:path}", include_in_schema=False)
async def show(path: str, request: Request) -> Response:
    """The page, and the files it needs."""
    return await page.get_response(path or ".", request.scope)
