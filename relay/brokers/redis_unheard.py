"""Which events are still published in a form that relays in topic mode do not receive: ``PUBLISH to:room:1:new_msg …``.

On a cluster also ``PUBLISH topic:room:1 …``, which they receive, but without order and reports of gaps.

Owns the count of `relay check --connect`; must not know who reads it. Listening costs Redis what one relay in pattern
mode costs it.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import hiredis

from relay import redis_url
from relay.brokers.redis_check import Finding, connected
from relay.brokers.redis_connection import Connections, LinkLost, RedisConnection, words
from relay.brokers.redis_marker import Markers
from relay.config import Config
from relay.protocol.topics import glob_escape
from relay.redis_url import RedisAddress

_NAMED = 5
"""Channels that are named, those with most events first."""

_KEPT = 1000
"""Channels that are counted one by one; events of further channels are counted together."""


class _Unheard:
    """What has come.

    Args: probes: the channel of probes, which are no events.
    """

    def __init__(self, probes: bytes) -> None:
        self._probes = probes
        self.is_subscribed: bool = False
        self.events: int = 0
        self.by_channel: Counter[str] = Counter()

    def take(self, reply: Any) -> None:
        """Count a message; other replies are passed over."""
        if not isinstance(reply, list) or reply[0] != b"pmessage" or reply[2] == self._probes:
            return
        self.events += 1
        channel = reply[2].decode(errors="replace")
        if channel in self.by_channel or len(self.by_channel) < _KEPT:
            self.by_channel[channel] += 1


async def count_unheard(config: Config, seconds: float) -> list[Finding]:
    """Listen for so long to what relays in topic mode do not receive, and say what came; nothing is raised.

    A server that cannot be reached is passed over: `examine` has said so.
    """
    redis = config.redis
    prefixes = [redis.to_prefix]
    if config.is_cluster:  # `PUBLISH` instead of `SPUBLISH`, which all nodes pass on to each other
        prefixes.append(redis.topic_prefix)
    unheard = _Unheard(Markers(redis).fallback)
    for address in _addresses(config.redis_url):
        try:
            async with connected(Connections(address, redis.timeout_s), redis.timeout_s) as connection:
                if refused := await _subscribe(connection, prefixes):
                    return [refused]
                unheard.is_subscribed = True
                await _count(connection, unheard, seconds)
                return list(_findings(config, unheard, prefixes, seconds))
        except LinkLost as lost:
            if unheard.is_subscribed:
                return [Finding("warning", f"redis: counting events on {_named(prefixes)} has ended: {lost}")]
    return []


def _addresses(url: str) -> list[RedisAddress]:
    """The server; of a cluster its nodes, one of which is enough."""
    cluster = redis_url.parse_cluster(url)
    if cluster is None:
        return [redis_url.parse(url)]
    return [redis_url.parse(cluster.node_url(*node)) for node in cluster.nodes]


async def _subscribe(connection: RedisConnection, prefixes: Sequence[str]) -> Finding | None:
    """Subscribe; returns what is to be said where that is refused. Raises LinkLost."""
    for prefix in prefixes:
        reply = await connection.ask("PSUBSCRIBE", f"{glob_escape(prefix)}*")
        if isinstance(reply, hiredis.ReplyError):
            rules = " ".join(f"&{prefix}*" for prefix in prefixes)
            text = f"events on {_named(prefixes)} are not counted ({words(reply)}): allow +psubscribe {rules}"
            return Finding("redis", f"{text} for this check")
    return None


async def _count(connection: RedisConnection, unheard: _Unheard, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                unheard.take(await connection.reply())


def _findings(config: Config, unheard: _Unheard, prefixes: Sequence[str], seconds: float) -> Iterator[Finding]:
    redis, where, within = config.redis, _named(prefixes), f"within {seconds:g} s"
    if not unheard.events:
        yield Finding("redis", f"no events on {where} {within}")
        return
    channels = len(unheard.by_channel)
    count = f"{unheard.events} event{'s' * (unheard.events > 1)} on {where} {within}"
    more = "more than " * (channels == _KEPT)
    shown = ", ".join(channel for channel, _ in unheard.by_channel.most_common(_NAMED))
    such_as = f"{more}{channels} channels such as {shown}" if channels > _NAMED else shown
    publish = "SPUBLISH" if config.is_cluster else "PUBLISH"
    instead = f"publish them with {publish} {redis.topic_prefix}<topic> '<event>:<payload>'"
    means = "which relays in topic mode do not receive"
    if config.is_cluster:
        means = (
            f"of which relays receive those on {redis.topic_prefix}* without order and reports of gaps, and no others"
        )
    yield Finding("warning", f"redis: {count}, {means} ({such_as}): {instead}")


def _named(prefixes: Sequence[str]) -> str:
    return " and ".join(f"{prefix}*" for prefix in prefixes)
