"""What ``relay check --connect`` finds out of a Redis Cluster: each master is examined as one Redis is.

Owns the questions about the cluster as a whole; must not know who reads the answers.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import count
from typing import Any

import hiredis

from relay import redis_url
from relay.brokers.base import PRESENCE_CHANNEL
from relay.brokers.cluster_commands import ask_map
from relay.brokers.cluster_map import SLOTS, Endpoint, Row, slot_of
from relay.brokers.cluster_session import NEEDS, PROBES
from relay.brokers.redis_check import Examination, Finding, connected
from relay.brokers.redis_connection import Connections, LinkLost, RedisConnection, is_denied, words
from relay.brokers.redis_marker import Markers
from relay.config import Config
from relay.protocol.topics import glob_escape


async def examine_cluster(config: Config) -> list[Finding]:
    """Ask the cluster of a configuration; what cannot be found out is said too, and nothing is raised."""
    address = redis_url.parse_cluster(config.redis_url)
    assert address is not None, "expected the address of a cluster"
    found: list[Finding] = []
    rows: list[Row] = []
    for endpoint in (Endpoint(*node) for node in address.nodes):
        try:
            said, isolation = await ask_map(address, endpoint, config.redis.timeout_s)
        except LinkLost as lost:
            found.append(Finding("warning", f"redis: {endpoint}: {lost}"))
            continue
        rows = rows or said
        if isolation:
            found.append(Finding("warning", f"redis: {endpoint} {isolation}: publishing there is refused"))
    found += _whole(rows)
    for master in dict.fromkeys(row.master for row in rows):
        connections = Connections(redis_url.parse(address.node_url(*master)), config.redis.timeout_s)
        slots = {slot for row in rows if row.master == master for slot in range(row.first, row.last + 1)}
        try:
            async with connected(connections, config.redis.timeout_s) as connection:
                async for each in _ShardExamination(config, connections, connection, str(master), slots).findings():
                    found.append(each)
        except LinkLost as lost:
            found.append(Finding("warning", f"redis: {master}: {lost}"))
    return list(dict.fromkeys(found))  # what is true of all masters is said once


def _whole(rows: Sequence[Row]) -> Iterator[Finding]:
    if not rows:
        return
    masters = {row.master for row in rows}
    replicas = {replica for row in rows for replica in row.replicas}
    served = sum(row.last + 1 - row.first for row in rows)
    yield Finding("redis", f"a cluster of {len(masters)} masters and {len(replicas)} replicas")
    if served < SLOTS:
        yield Finding("warning", f"redis: {SLOTS - served} of {SLOTS} slots are not served: their topics are refused")
    lonely = sorted(str(row.master) for row in rows if not row.replicas)
    if lonely:
        yield Finding("redis", f"without a replica: {', '.join(dict.fromkeys(lonely))}")


class _ShardExamination(Examination):
    """The questions to one master."""

    publish = "SPUBLISH"

    def __init__(
        self,
        config: Config,
        connections: Connections,
        connection: RedisConnection,
        address: str,
        slots: set[int],
    ) -> None:
        super().__init__(config, connections, connection, address)
        self._slots = slots
        self._is_too_old = False

    def _commands(self) -> Iterator[tuple[Sequence[str], str, str]]:
        yield from super()._commands()
        for command in ("SLOTS", "NODES"):
            yield ("CLUSTER", command), f"+cluster|{command.lower()}", "who serves which slots is not known"

    async def _permissions(self) -> AsyncIterator[Finding]:
        """Nothing where it cannot be used at all."""
        if not self._is_too_old:
            async for each in super()._permissions():
                yield each

    async def _probe(self) -> AsyncIterator[Finding]:
        """See that a message comes back, and which channels may be heard."""
        redis = self._config.redis
        probe_channel = next(name for n in count() if slot_of((name := f"{PROBES}{n}").encode()) in self._slots)
        tried = {probe_channel: f"{PROBES}*", f"{redis.topic_prefix}relay:check": f"{redis.topic_prefix}*"}
        if redis.control_channel:
            tried[redis.control_channel] = redis.control_channel
        if self._config.has_presence:
            tried[PRESENCE_CHANNEL] = PRESENCE_CHANNEL
        subscription = await self._connections.open()
        subscription.limit_s = redis.timeout_s
        try:
            for channel, pattern in tried.items():
                reply = await _subscribed(subscription, "SSUBSCRIBE", channel)
                if isinstance(reply, hiredis.ReplyError) and "unknown command" in str(reply).lower():
                    yield Finding("warning", f"redis: {self._address}: {NEEDS}")
                    self._is_too_old = True
                    return
                if is_denied(reply):
                    text = f"redis: SSUBSCRIBE {pattern} is refused, so something is not heard"
                    yield Finding("warning", f"{text}: allow +ssubscribe &{pattern}")
            topics = f"{redis.topic_prefix}*"
            if is_denied(await _subscribed(subscription, "PSUBSCRIBE", glob_escape(redis.topic_prefix) + "*")):
                text = f"redis: PSUBSCRIBE {topics} is refused, so events that are published by PUBLISH are not heard"
                yield Finding("warning", f"{text}: allow +psubscribe &{topics}")
            async for each in self._round_trip(subscription, probe_channel):
                yield each
        finally:
            await subscription.close()

    @property
    def _connections_each(self) -> int:
        """Those to each master, and the one to any of them for what is published by ``PUBLISH``."""
        return super()._connections_each + 1

    async def _round_trip(self, subscription: RedisConnection, channel: str) -> AsyncIterator[Finding]:
        probe = Markers(self._config.redis).next_probe()
        sent_at = time.monotonic()
        reply = await self._connection.ask("SPUBLISH", channel, probe)
        if isinstance(reply, hiredis.ReplyError):
            yield Finding("warning", f"redis: {self._address}: SPUBLISH {channel}: {words(reply)}")
            return
        limit_s = self._config.redis.ping_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                while (await subscription.reply())[-1] != probe:
                    pass
        except TimeoutError:
            yield Finding("warning", f"redis: {self._address}: a probe did not come back within {limit_s:g} s")
            return
        took_ms = 1000 * (time.monotonic() - sent_at)
        yield Finding("probe", f"{self._address}: published and heard again after {took_ms:.1f} ms")


async def _subscribed(subscription: RedisConnection, command: str, name: str) -> Any:
    """Subscribe, and wait for the answer: what comes on other channels meanwhile is passed over."""
    reply = await subscription.ask(command, name)
    while isinstance(reply, list) and reply[0] != command.lower().encode():
        reply = await subscription.reply()
    return reply
