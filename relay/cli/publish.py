"""``relay publish``: one event into Redis, as a backend does.

Owns which Redis is meant; the publishing is that of `relay.brokers.redis_publish_once`.
"""

import asyncio
from typing import TYPE_CHECKING

from relay import runtime_dir
from relay.cli.options import ConfigFile, EventName, Payload, RedisUrl, Topic, event_of, json_of, topic_of
from relay.cli.output import console, fail, is_terminal, print_lines
from relay.config import EMBEDDED, Config
from relay.config_sources import load
from relay.errors import BusUnavailable, ConfigError

if TYPE_CHECKING:
    from relay.brokers.redis_publish_once import Published


def publish(
    topic: Topic, event: EventName, payload: Payload, config: ConfigFile = None, redis_url: RedisUrl = None
) -> None:
    """Publish one event, to the configured Redis or to the embedded server of a relay running on this machine.

    If the topic has a history, the event is appended to that, and its position is printed. Which topics have one is
    read from the settings; if these have neither [[topics]] nor prefixes, from what the relays there wrote into Redis.
    """
    topic, event = topic_of(topic), event_of(event)
    _ = json_of("JSON", payload)  # it is sent as it was written
    settings = load(config, {"redis_url": redis_url})
    if not settings.redis_url or settings.redis_url == EMBEDDED:
        running = runtime_dir.newest()
        if running is None:
            raise ConfigError("no Redis is configured and no relay with an embedded one runs here; give --redis-url")
        settings = settings.model_copy(update={"redis_url": running})
    else:
        settings = settings.model_copy(update={"redis_url": runtime_dir.with_password(settings.redis_url)})
    try:
        published = asyncio.run(_publish(settings, topic, event, payload.encode()))
    except BusUnavailable as error:
        fail(f"not published: {error}")
    if published.position is not None:
        if is_terminal():
            console().print(f"published to {topic} at {published.position}")
        else:
            print_lines([{"topic": topic, "event": event, "position": published.position}])
        return
    relays = published.listening
    if is_terminal():
        console().print(f"published to {topic}; {relays} relay{'' if relays == 1 else 's'} listening")
    else:
        print_lines([{"topic": topic, "event": event, "relays": relays}])


async def _publish(settings: Config, topic: str, event: str, payload: bytes) -> "Published":
    from relay.brokers.redis_publish_once import publishing

    async with publishing(settings) as publish:
        return await publish([(topic, event, payload)])
