"""``relay config``: the settings that hold for one topic, and how other programs publish to it.

Owns these two; must not know what the settings do.
"""

import shlex
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from relay.cli.options import ConfigFile, topic_of
from relay.cli.output import console, is_terminal, print_lines
from relay.config import Config
from relay.config_sections import LimitsConfig, TopicConfig
from relay.config_sources import load

_EVENT, _PAYLOAD = "new_msg", '{"text":"hi"}'


def config(
    topic: Annotated[str, typer.Option(metavar="TOPIC", help="The topic, e.g. room:1.")], config: ConfigFile = None
) -> None:
    """Show the settings of one topic, and the commands by which other programs publish to it. Piped: a line of JSON.

    With a history these commands contain its size and its ttl_s. EVAL, for Redis 6.2 and for users without FCALL, takes
    the script from a file, here publish.lua; piped, this command prints it as "script".
    """
    settings, name = load(config), topic_of(topic)
    entry = settings.topic(name)
    commands = dict(_commands(settings, name, entry))
    if not is_terminal():
        print_lines([{"topic": name, **_settings(settings, entry), **commands, **_script(commands)}])
        return
    screen = console()
    for key, value in {"topic": name, **_settings(settings, entry)}.items():
        screen.print(f"{key:<15} {_shown(value)}")
    for key, command in commands.items():
        screen.print(f"\n{_TITLES[key]}")
        if key == "eval":
            same = ["relay", "config", "--topic", name, *(["--config", str(config)] if config else [])]
            screen.print(f"  {shlex.join(same)} | jq -r .script > publish.lua")
        screen.print(f"  {shlex.join(command)}")
    if settings.broadcast_url:
        screen.print("\nThe bus is not Redis; see docs/redis.md for others. REST publishes on every bus.")


_TITLES = {
    "publish": "Publish:",
    "fcall": "Publish, with Redis 7.0 or later, or Valkey:",
    "eval": "Publish, with Redis 6.2:",
}


def _settings(settings: Config, entry: TopicConfig) -> dict[str, Any]:
    """What holds for the topic, and which entry says it."""
    at = next((f"topics.{at}" for at, other in enumerate(settings.topics) if other is entry), "defaults")
    return {
        "from": f"{at}: {entry.match}" if at != "defaults" else at,
        **entry.model_dump(mode="json", exclude={"match"}),
    }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} = {each}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return {True: "true", False: "false", None: "none", "": '""'}.get(value, str(value))


def _commands(settings: Config, topic: str, entry: TopicConfig) -> Iterator[tuple[str, list[str]]]:
    if settings.broadcast_url:
        return
    redis, history = settings.redis, entry.history
    if history is None:
        yield "publish", ["redis-cli", "PUBLISH", f"{redis.to_prefix}{topic}:{_EVENT}", _PAYLOAD]
        return
    args = [_EVENT, _PAYLOAD, str(history.size), str(history.ttl_s)]
    if settings.limits.payload_max_bytes != LimitsConfig.model_fields["payload_max_bytes"].default:
        args += ["", str(settings.limits.payload_max_bytes)]  # behind an empty sender
    key = f"{redis.topic_prefix}{topic}"
    yield "fcall", ["redis-cli", "FCALL", "relay_publish", "1", key, *args]
    yield "eval", ["redis-cli", "--eval", "publish.lua", key, ",", *args]


def _script(commands: dict[str, list[str]]) -> dict[str, str]:
    if "eval" not in commands:
        return {}
    from relay.brokers.redis_scripts import PUBLISH

    return {"script": PUBLISH.text}
