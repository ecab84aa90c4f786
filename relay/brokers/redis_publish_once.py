"""Publishing from a program that does nothing else: ``relay publish``.

Owns a connection for as long as that takes; must not know sockets.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import hiredis

from relay import redis_url
from relay.brokers.redis_connection import Connections, LinkLost, RedisConnection, name_of, packed, words
from relay.brokers.redis_publisher import not_published
from relay.brokers.redis_scripts import PUBLISH
from relay.brokers.redis_settings import RENEW_EVERY_S, Settings, history_args, own_settings, read_settings
from relay.config import Config
from relay.errors import BusUnavailable
from relay.protocol.topics import to_redis_channel


class Published(NamedTuple):
    """What Redis answered to the last of several events."""

    listening: int | None
    """Subscriptions that took it, which is the relays that listen; None where it was kept in a history."""
    position: str | None
    """Its position in the history."""


@asynccontextmanager
async def publishing(
    config: Config,
) -> AsyncIterator[Callable[[Sequence[tuple[str, str, bytes]]], Awaitable[Published]]]:
    """Publish events towards browsers for the duration of the block, from a program that does nothing else.

    An event of a topic with a history is appended to that. Which topics have one says the configuration, or if it says
    nothing of topics, the relays on this Redis do.

    Yields: a function of topics, events and payloads, which publishes them in order. It raises BusUnavailable where
            Redis took them not.
    """
    where = redis_url.shown(config.redis_url)
    connections = Connections(redis_url.parse(config.redis_url), config.redis.timeout_s)
    connection: RedisConnection | None = None
    settings = own_settings(config)
    read_at = 0.0

    async def publish(events: Sequence[tuple[str, str, bytes]]) -> Published:
        nonlocal connection, settings, read_at
        try:
            async with asyncio.timeout(config.redis.timeout_s):
                if connection is None:
                    connection = await connections.open()
                    role = await connection.role()
                    if role is not None and not role.is_master:
                        raise BusUnavailable(not_published(where, role))
                if not read_at or time.monotonic() - read_at > RENEW_EVERY_S:
                    settings = await read_settings(connection, config)
                    read_at = time.monotonic()
                return await _publish_all(connection, settings, events)
        except LinkLost as lost:
            raise BusUnavailable(f"{lost} ({where})") from lost
        except TimeoutError:
            raise BusUnavailable(f"no answer within {config.redis.timeout_s:g} s ({where})") from None

    try:
        yield publish
    finally:
        if connection is not None:
            await connection.close()
        await connections.close()


async def _publish_all(
    connection: RedisConnection, settings: Settings, events: Sequence[tuple[str, str, bytes]]
) -> Published:
    published = Published(0, None)
    fault = ""
    for topic, event, payload in events:
        connection.write(packed([_command(settings, topic, event, payload)]))
    for topic, event, _ in events:
        reply = await connection.reply()
        if isinstance(reply, hiredis.ReplyError):
            fault = fault or f"PUBLISH {name_of(_channel(settings, topic, event))}: {words(reply)}"
        elif isinstance(reply, int):
            published = Published(reply, None)
        else:
            published = Published(None, reply.decode())
    if fault:
        raise BusUnavailable(fault)
    return published


def _channel(settings: Settings, topic: str, event: str) -> bytes:
    if settings.history(topic) is None:
        return to_redis_channel(settings.to_prefix, topic, event)
    return f"{settings.topic_prefix}{topic}".encode()


def _command(settings: Settings, topic: str, event: str, payload: bytes) -> tuple[bytes | str, ...]:
    channel, history = _channel(settings, topic, event), settings.history(topic)
    if history is None:
        return ("PUBLISH", channel, payload)
    # The whole script: a program that publishes now and then need not know whether Redis remembers it.
    return (
        "EVAL",
        PUBLISH.text,
        "1",
        channel,
        *history_args(event, payload, history, None, settings.payload_max_bytes),
    )
