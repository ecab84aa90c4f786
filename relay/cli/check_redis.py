"""What ``relay check --connect`` asks Redis.

Owns when which question is asked; leaves the questions to `relay.brokers`.
"""

import asyncio

import typer

from relay import runtime_dir
from relay.cli.output import is_terminal
from relay.config import EMBEDDED, Config
from relay.errors import ConfigError


def ask_redis(settings: Config, seconds: float) -> list[tuple[str, str]]:
    """Say what was found out, a word and a sentence each.

    Args:   seconds: how long events are counted that relays in topic mode do not receive. They are not counted where
                relays publish in the same form.
    Raises: ConfigError: the bus is no Redis that is there already.
    """
    if settings.broadcast_url or settings.redis_url in ("", EMBEDDED):
        came = "the relay's own Valkey" if not settings.broadcast_url else settings.broadcast_url.partition("://")[0]
        raise ConfigError(f"--connect: expected redis_url, the address of a Redis; got {came}")
    from relay.brokers.cluster_check import examine_cluster
    from relay.brokers.redis_check import examine
    from relay.brokers.redis_unheard import count_unheard

    address = runtime_dir.with_password(settings.redis_url)
    asked = settings.model_copy(update={"redis_url": address})
    found = asyncio.run((examine_cluster if settings.is_cluster else examine)(asked))
    if seconds and asked.redis.publish_form == "topic":
        if is_terminal():
            typer.echo(f"counting events on {asked.redis.to_prefix}* for {seconds:g} s", err=True)
        found += asyncio.run(count_unheard(asked, seconds))
    return [(each.about, each.text) for each in found]
