"""Aircraft on topics ``aircraft:<latitude>:<longitude>``, one for each tile of 5°, with a map at ``/api/aircraft/``.

The feed, another Redis channel ``jet1090-full*`` (or what AIRCRAFT_CHANNEL says), has a report on each line:
``{"icao24": "39de4f", "latitude": 45.7, …}``. Events ``positions`` and join replies say ``{"aircraft": [report, …]}``.
"""

import os
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.staticfiles import StaticFiles

from relay import Join, Plugin, RedisMessage, Relay

plugin = Plugin("aircraft")
router = APIRouter(prefix="/aircraft", tags=["aircraft"])
plugin.include_router(router)
page = StaticFiles(directory=Path(__file__).parent / "page", html=True)
TILE_DEG, KEPT_S = 5, 30.0


class Report(msgspec.Struct, omit_defaults=True):
    """What is taken of a line; all else in it is ignored."""

    icao24: Annotated[str, msgspec.Meta(min_length=1, max_length=24)]
    latitude: Annotated[float, msgspec.Meta(ge=-90, le=90)]
    longitude: Annotated[float, msgspec.Meta(ge=-180, le=180)]
    altitude: float | None = None  # feet
    callsign: str | None = None
    track: float | None = None  # degrees
    groundspeed: float | None = None  # knots


decoder = msgspec.json.Decoder(Report)
seen: dict[str, tuple[float, str, Report]] = {}  # icao24 → when, topic, report; oldest first
lines = Counter(positions=0, ignored=0)


@plugin.on_redis(os.environ.get("AIRCRAFT_CHANNEL", "jet1090-full*"))
async def hear(message: RedisMessage, relay: Relay) -> None:
    """Sort reports into tiles. Every process of a relay hears the feed, so each tells its own sockets alone."""
    now, tiles = time.monotonic(), defaultdict(list)
    for line in message.data.splitlines():
        try:
            report = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            lines["ignored"] += 1  # no JSON, or no position: most of what transponders say has none
            continue
        lines["positions"] += 1
        south, west = (int(degrees // TILE_DEG) * TILE_DEG for degrees in (report.latitude, report.longitude))
        tiles[topic := f"aircraft:{south}:{west}"].append(report)
        _ = seen.pop(report.icao24, None)
        seen[report.icao24] = now, topic, report
    for topic, reports in tiles.items():
        relay.local_broadcast(topic, "positions", {"aircraft": reports})
    while seen and seen[oldest := next(iter(seen))][0] < now - KEPT_S:
        del seen[oldest]


@plugin.on_join("aircraft:*")
async def welcome(join: Join) -> dict[str, list[Report]]:
    """Show known aircraft at once, not only with the next report."""
    return {"aircraft": [report for _, topic, report in seen.values() if topic == join.topic]}


@router.get("/lines")
async def count() -> dict[str, int]:
    """How many lines held a position, and how many were ignored."""
    return lines


@router.get("/{path:path}", include_in_schema=False)
async def show(path: str, request: Request) -> Response:
    """The page, and the files it needs."""
    return await page.get_response(path or ".", request.scope)
