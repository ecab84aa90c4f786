"""``relay config``: all settings and where each comes from; or those of one topic, and how others publish to it.

Owns what is shown of them; must not know what the settings do.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from relay.cli.masking import masked_settings
from relay.cli.options import ConfigFile, RedisUrl, topic_of
from relay.cli.output import console, is_terminal, json_line, print_lines, printable
from relay.config import Config
from relay.config_sections import LimitsConfig, TopicConfig
from relay.config_sources import holds, load_with_sources, variable
from relay.renamed_settings import RENAMED, rename

_EVENT, _PAYLOAD = "new_msg", '{"text":"hi"}'


def config(
    topic: Annotated[
        str | None, typer.Option(metavar="TOPIC", help="Show what holds for one topic, e.g. room:1.")
    ] = None,
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(metavar="HOST", help="As of relay serve.")] = None,
    port: Annotated[int | None, typer.Option(metavar="PORT", help="As of relay serve.")] = None,
    redis_url: RedisUrl = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="As of relay serve.")] = None,
) -> None:
    """Show all settings, without secrets, and where each comes from; or those of one topic. Piped: lines of JSON.

    A setting comes from an option of the command line, a variable, the file, or is the default.

    With --topic, it shows the settings of that topic, and the commands by which other programs publish to it. With a
    history these commands contain its size and its ttl_s. EVAL, for Redis 6.2 and for users without FCALL, takes the
    script from a file, here publish.lua; piped, this command prints it as "script".
    """
    flags = {"host": host, "port": port, "redis_url": redis_url, "workers": workers}
    settings, sources = load_with_sources(config, flags)
    if topic is not None:
        _show_topic(settings, topic_of(topic), config)
        return
    lines = list(_all_settings(settings, sources))
    if not is_terminal():
        print_lines(lines)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", "source", box=None)
    for line in lines:
        source = line["source"] if line["from"] is None else f"{line['source']} {line['from']}"
        style = "dim" if line["source"] == "default" else ""
        table.add_row(*(Text(text, style) for text in (line["setting"], printable(json_line(line["value"])), source)))
    console().print(table)


def _all_settings(settings: Config, sources: list[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """A line for each setting: name, value, the kind of its source, and the file, variable or option itself."""
    (file, in_file), (_, in_variables), (_, in_flags) = [(name, rename(values)[0]) for name, values in sources]
    for place, value in masked_settings(settings):
        name = ".".join(map(str, place))
        if place[:2] == ("auth", "keys") and place[-1] == "key":
            place = place[:-1]  # an entry may be the key alone
        source: tuple[str, str | None] = ("default", None)
        if holds(in_flags, place):
            source = ("flag", f"--{name.replace('_', '-')}")
        elif holds(in_variables, place):
            source = ("variable", _variable_of(place))
        elif holds(in_file, place):
            source = ("file", file)
        yield {"setting": name, "value": value, "source": source[0], "from": source[1]}


def _variable_of(place: tuple[int | str, ...]) -> str:
    """The variable that holds a setting: its own, or that of a table that it is in."""
    names = {name.upper(): name for name in os.environ}
    for end in range(len(place), 0, -1):
        name = ".".join(map(str, place[:end]))
        own = [variable(name), *(variable(old) for old, new in RENAMED.items() if new == name)]
        if found := next((names[each] for each in own if each in names), None):
            return found
    raise AssertionError("the environment holds it")


def _show_topic(settings: Config, name: str, config: Path | None) -> None:
    entry = settings.topic(name)
    commands = dict(_commands(settings, name, entry))
    if not is_terminal():
        print_lines([{"topic": name, **_settings(settings, entry), **commands, **_script(settings, commands)}])
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
        publish = ["redis-cli", "-c", "SPUBLISH"] if settings.is_cluster else ["redis-cli", "PUBLISH"]
        yield "publish", [*publish, *redis.published(topic, _EVENT, _PAYLOAD)]
        return
    args = [_EVENT, _PAYLOAD, str(history.size), str(history.ttl_s)]
    if settings.limits.payload_max_bytes != LimitsConfig.model_fields["payload_max_bytes"].default:
        args += ["", str(settings.limits.payload_max_bytes)]  # behind an empty sender
    key = f"{redis.topic_prefix}{topic}"
    client = ["redis-cli", "-c"] if settings.is_cluster else ["redis-cli"]
    yield "fcall", [*client, "FCALL", "relay_publish", "1", key, *args]
    yield "eval", [*client, "--eval", "publish.lua", key, ",", *args]


def _script(settings: Config, commands: dict[str, list[str]]) -> dict[str, str]:
    if "eval" not in commands:
        return {}
    from relay.brokers.redis_scripts import PUBLISH, SHARDED_PUBLISH

    return {"script": (SHARDED_PUBLISH if settings.is_cluster else PUBLISH).text}
