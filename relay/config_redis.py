"""The table ``[redis]`` of the settings: names in Redis, time limits, and what is heard and published there.

Must not know who uses it.
"""

from typing import Literal

from pydantic import Field, model_validator

from relay.config_sections import Direction, Positive, Seconds, SecondsOrOff, Table


class RedisConfig(Table):
    """Connection to Redis."""

    to_prefix: str = Field("to:", min_length=1, description="Redis channels towards browsers start with this")
    from_prefix: str = Field("from:", min_length=1, description="Redis channels of browsers' pushes start with this")
    topic_prefix: str = Field(
        "topic:", min_length=1, description="topics' names in Redis start with this: streams, and channels for events"
    )
    publish_form: Literal["to", "topic"] = Field(
        "to",
        description='relay publishes events on "to", <to_prefix><topic>:<event>, "topic", <topic_prefix><topic>',
    )
    subscribe: Literal["pattern", "topic"] = Field(
        "pattern",
        description='"pattern": hear all events; "topic": of joined topics, requires publish_form = "topic"',
    )
    linger_s: SecondsOrOff = Field(
        10.0, description='with subscribe = "topic": seconds from the last leave of a topic until it is unsubscribed'
    )
    push_identity: bool = Field(False, description="publish each push a second time, with user and socket")
    from_user_prefix: str = Field(
        "from-user:", min_length=1, description="Redis channels of pushes with user and socket start with this"
    )
    timeout_s: Seconds = Field(5.0, description="seconds to connect, and for Redis to accept a message")
    ping_interval_s: Seconds = Field(10.0, description="seconds of silence before the subscription is pinged")
    ping_timeout_s: Seconds = Field(5.0, description="seconds for the answer; then the connection counts as lost")
    backoff_min_s: Seconds = Field(0.1, description="maximum seconds before the first attempt to reconnect")
    backoff_max_s: Seconds = Field(5.0, description="maximum seconds between two attempts")
    publish_queue_max: Positive = Field(10_000, description="messages waiting for Redis before pushes are refused")
    publish_queue_max_bytes: Positive = Field(67_108_864, description="the same, in bytes of all waiting messages")
    control_channel: str = Field(
        "relay:control", description='Redis channel by which nodes disconnect users on all nodes; "" for none'
    )

    def prefix(self, direction: Direction) -> str:
        """What Redis channels of a direction start with."""
        if direction in (Direction.TO, Direction.LIVE):
            return self.to_prefix
        return self.from_prefix if direction is Direction.FROM else self.from_user_prefix

    def published(self, topic: str, event: str, payload: str) -> tuple[str, str]:
        """The channel and the message by which other programs publish an event of a topic without a history."""
        if self.publish_form == "topic":
            return f"{self.topic_prefix}{topic}", f"{event}:{payload}"
        return f"{self.to_prefix}{topic}:{event}", payload

    @model_validator(mode="after")
    def _prefixes_differ(self) -> "RedisConfig":
        if self.to_prefix.startswith(self.from_prefix) or self.from_prefix.startswith(self.to_prefix):
            raise ValueError("to_prefix and from_prefix must not begin alike, or the relay would hear its own pushes")
        if self.control_channel.startswith((self.to_prefix, self.from_prefix)):
            # What starts with from_prefix is named by browsers.
            raise ValueError("control_channel must not begin with to_prefix or from_prefix")
        if self.push_identity:
            for name, other in (("to_prefix", self.to_prefix), ("from_prefix", self.from_prefix)):
                if self.from_user_prefix.startswith(other) or other.startswith(self.from_user_prefix):
                    raise ValueError(
                        f"from_user_prefix and {name} must not begin alike: a client could forge who pushed"
                    )
            if self.control_channel.startswith(self.from_user_prefix):
                raise ValueError("control_channel must not begin with from_user_prefix")
        if self.subscribe == "topic" and self.publish_form != "topic":
            raise ValueError(
                f'subscribe = "topic" requires publish_form = "topic": such relays hear nothing on {self.to_prefix}*'
            )
        if self.backoff_min_s > self.backoff_max_s:
            raise ValueError(
                f"backoff_min_s = {self.backoff_min_s:g} must not be more than backoff_max_s = {self.backoff_max_s:g}"
            )
        return self
