"""Simulated flights over Europe: publishes their positions, so that the map has something to show.

python examples/aircraft/simulate.py                                      to the relay started last on this machine
python examples/aircraft/simulate.py --redis-url redis://localhost:6379   to a Redis of your own
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from redis import Redis, RedisError

from relay import runtime_dir

AIRPORTS = (
    (52.31, 4.76), (59.65, 17.92), (37.94, 23.94), (41.30, 2.08), (52.36, 13.50),  # Amsterdam to Berlin
    (49.01, 2.55), (55.62, 12.65), (53.42, -6.27), (41.80, 12.25), (50.03, 8.56),  # Paris to Frankfurt
    (46.24, 6.11), (60.32, 24.96), (41.26, 28.74), (51.47, -0.45), (38.77, -9.13),  # Geneva to Lisbon
    (40.47, -3.56), (48.35, 11.79), (43.66, 7.22), (60.19, 11.10), (44.57, 26.08),  # Madrid to Bucharest
    (39.55, 2.74), (50.10, 14.26), (43.63, 1.37), (48.11, 16.57), (52.17, 20.97),  # Palma to Warsaw
)  # fmt: skip
AIRLINES = ("AFR", "AUA", "BAW", "DLH", "EIN", "EZY", "FIN", "IBE", "KLM", "RYR", "SAS", "SWR", "TAP", "THY", "VLG")

LINES_MAX = 100  # in one message
KM_PER_DEG = 111.2
KM_PER_NM = 1.852
CLIMB_KM, DESCENT_KM = 220, 260  # from take-off to cruise, from cruise to landing


@dataclass
class Flight:
    """One aircraft on its way; ``flown_km`` says how far it is."""

    icao24: str
    callsign: str
    start: tuple[float, float]
    end: tuple[float, float]
    cruise_ft: float
    bow: float  # how far the route bends aside, as part of its length: no two flights share a line
    flown_km: float = 0.0

    @classmethod
    def take_off(cls, icao24: str) -> "Flight":
        """A new flight between two airports that are not next to each other."""
        while True:
            start, end = random.sample(AIRPORTS, 2)
            if distance_km(start, end) > 500:
                break
        callsign = f"{random.choice(AIRLINES)}{random.randint(10, 9999)}"
        return cls(icao24, callsign, start, end, random.randrange(29, 42) * 1000.0, random.uniform(-0.08, 0.08))

    @property
    def length_km(self) -> float:
        return distance_km(self.start, self.end)

    @property
    def height(self) -> float:
        """From 0 on the ground to 1 at cruise."""
        rising, sinking = self.flown_km / CLIMB_KM, (self.length_km - self.flown_km) / DESCENT_KM
        return math.sin(max(0.0, min(1.0, rising, sinking)) * math.pi / 2)

    @property
    def speed_kt(self) -> float:
        return 150 + 310 * self.height

    def position(self, flown_km: float) -> tuple[float, float]:
        """Latitude and longitude: the straight line on the map, bent aside like a bow."""
        share = flown_km / self.length_km
        (south, west), (north, east) = self.start, self.end
        aside = self.bow * math.sin(share * math.pi)
        wide = math.cos(math.radians(south))  # degrees of longitude are shorter up here
        latitude = south + (north - south) * share + aside * (east - west) * wide
        return latitude, west + (east - west) * share - aside * (north - south) / wide

    def report(self) -> str:
        """What a receiver would say of it, as one line of JSON."""
        latitude, longitude = self.position(self.flown_km)
        ahead, beside = self.position(self.flown_km + 1)
        track = math.degrees(math.atan2((beside - longitude) * math.cos(math.radians(latitude)), ahead - latitude))
        return json.dumps(
            {
                "timestamp": round(time.time(), 3),
                "icao24": self.icao24,
                "callsign": self.callsign,
                "latitude": round(latitude, 5),
                "longitude": round(longitude, 5),
                "altitude": round(self.cruise_ft * self.height / 25) * 25,
                "groundspeed": round(self.speed_kt),
                "track": round(track % 360, 1),
            }
        )


def distance_km(start: tuple[float, float], end: tuple[float, float]) -> float:
    """Good enough on a continent."""
    wide = math.cos(math.radians((start[0] + end[0]) / 2))
    return math.hypot(end[0] - start[0], (end[1] - start[1]) * wide) * KM_PER_DEG


def fly(redis: Redis, arguments: argparse.Namespace) -> None:
    """Move all aircraft and publish where they are, at a steady pace, until stopped."""
    addresses = (f"{address:06x}" for address in itertools.count(0x3C0000, 7))
    flights = [Flight.take_off(next(addresses)) for _ in range(int(arguments.aircraft))]
    for flight in flights:
        flight.flown_km = random.uniform(0, flight.length_km)  # in the air already, somewhere
    for _ in itertools.count() if arguments.reports is None else range(arguments.reports):
        began = time.monotonic()
        reports = [flight.report() for flight in flights]
        for first in range(0, len(reports), LINES_MAX):
            redis.publish(arguments.channel, "\n".join(reports[first : first + LINES_MAX]))
        for number, flight in enumerate(flights):
            hours = arguments.interval * arguments.speed / 3600
            flight.flown_km += flight.speed_kt * KM_PER_NM * hours
            if flight.flown_km >= flight.length_km:
                flights[number] = Flight.take_off(next(addresses))
        time.sleep(max(0.0, arguments.interval - (time.monotonic() - began)))


def between(least: float, most: float) -> Callable[[str], float]:
    """A number in bounds, for argparse."""

    def check(text: str) -> float:
        value = float(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least:g} to {most:g}, got {text}")
        return value

    return check


def main() -> None:
    """Read the command line and fly."""
    parser = argparse.ArgumentParser(description="Publish made-up positions of aircraft over Europe.")
    default = runtime_dir.newest() or "redis://localhost:6379"
    parser.add_argument("--redis-url", default=default, help="[default: of the relay started last, now %(default)s]")
    parser.add_argument("--channel", default="jet1090-full", help="Redis channel [default: %(default)s]")
    parser.add_argument("--aircraft", type=between(1, 2000), default=160, help="how many [default: %(default)s]")
    parser.add_argument("--interval", type=between(0.1, 60), default=1.0, metavar="SECONDS", help="between two reports")
    parser.add_argument(
        "--speed", type=between(1, 100), default=20.0, help="times faster than real [default: %(default)g]"
    )
    parser.add_argument("--reports", type=int, help="how many of each aircraft; endless without")
    arguments = parser.parse_args()
    print(f"{arguments.aircraft:g} aircraft, each {arguments.interval:g} s, to {arguments.channel}; Ctrl+C ends it")  # noqa: T201
    try:
        with Redis.from_url(arguments.redis_url) as redis:
            fly(redis, arguments)
    except KeyboardInterrupt:
        pass
    except RedisError as error:
        sys.exit(f"Redis: {error}")


if __name__ == "__main__":
    main()
