"""``relay publish``: one event into Redis, as a backend does.

Owns what is printed; which Redis is meant, and the publishing, is that of `relay.publisher`.
"""

from relay.cli.options import ConfigFile, EventName, Payload, RedisUrl, Topic, event_of, json_of, topic_of
from relay.cli.output import console, fail, is_terminal, print_lines
from relay.config_sources import load
from relay.errors import BusUnavailable


def publish(
    topic: Topic, event: EventName, payload: Payload, config: ConfigFile = None, redis_url: RedisUrl = None
) -> None:
    """Publish one event, to the configured Redis or to the embedded server of a relay running on this machine.

    If the topic has a history, the event is appended to that, and its position is printed. Which topics have one is
    read from the settings; if these have neither [[topics]] nor prefixes, from what the relays there wrote into Redis.
    """
    from relay.publisher import Publisher

    topic, event = topic_of(topic), event_of(event)
    _ = json_of("JSON", payload)  # it is sent as it was written
    settings = load(config, {"redis_url": redis_url})
    try:
        with Publisher(settings) as publisher:
            published = publisher.publish(topic, event, payload.encode())
    except (BusUnavailable, ValueError) as error:
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
