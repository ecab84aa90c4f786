"""The channels that one process hears from one node of a Redis Cluster, by sharded Pub/Sub.

Owns how channels come and go with their slots; must not know which node serves which slot.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from relay.brokers.redis_channels import ChannelWriter, TopicChannel, TopicChannels

Receiver = Callable[[bytes], None]


class OwnChannel(TopicChannel):
    """A channel on which nodes talk to each other."""

    __slots__ = ("receive",)

    def __init__(self, name: bytes, receive: Receiver) -> None:
        super().__init__("", name)
        self.receive: Receiver = receive
        self.is_wanted = True
        self.is_missed = True  # so that it is subscribed to whenever there is a connection


class ShardChannels(TopicChannels):
    """All of them that are subscribed to on one node, or are to be."""

    commands: tuple[str, str] = ("SSUBSCRIBE", "SUNSUBSCRIBE")

    def want(self, name: bytes, receive: Receiver) -> None:
        """Hear a channel of nodes for good; it counts as missed until it is heard."""
        if name not in self.by_name:
            self.by_name[name] = OwnChannel(name, receive)
            self._missed += 1
            self._begin_again()

    def _begin_again(self) -> None:
        """Subscribe to all that is missed, from the beginning: those on their way are passed over."""
        if self._writer is None or not self._missed:
            return
        if self._again is not None:
            self._again.cancel()
        self._again = asyncio.create_task(self._guard_again(self._writer), name="relay-redis-resubscribe")

    def attach(self, writer: ChannelWriter) -> None:
        """Learn that there is a connection: subscribe again to what was heard on the last one."""
        self._writer = writer
        self._again_since = self._clock()
        self._begin_again()

    # Channels whose slots are served by another node.

    def withdraw(self, names: Iterable[bytes]) -> list[TopicChannel]:
        """Give up channels that the server has unsubscribed unasked; those that were heard are missed now."""
        found = [channel for name in names if (channel := self.by_name.get(name)) is not None and channel.is_heard]
        self._withdraw(found)
        return found

    def withdraw_refused(self) -> TopicChannel | None:
        """Give up the channel of the oldest ``SSUBSCRIBE``, which was refused here; None where it was left."""
        channel = self._unconfirmed.popleft()
        channel.is_asked = False
        if self.by_name.get(channel.name) is not channel:
            return None
        self._withdraw([channel])
        return channel

    def withdraw_unless(self, stays: Callable[[bytes], bool]) -> list[TopicChannel]:
        """Give up all channels but some, by their names."""
        found = [channel for name, channel in self.by_name.items() if not stays(name)]
        self._withdraw(found)
        return found

    def _withdraw(self, channels: Sequence[TopicChannel]) -> None:
        # Of what has just been heard again the gap is still to be reported.
        recovered = set(self._recovered)
        topics = {channel.topic for channel in channels}
        if not recovered.isdisjoint(topics):
            self._recovered = [topic for topic in self._recovered if topic not in topics]
        for channel in channels:
            self._forget(channel)
            channel.is_missed = channel.is_heard or channel.is_missed or channel.topic in recovered
            channel.is_heard = False

    def adopt(self, channels: Sequence[TopicChannel]) -> None:
        """Subscribe to channels that another node had: those that were missed have their gap reported."""
        asked: list[TopicChannel] = []
        if not self._missed:
            self._again_since = self._clock()
        for old in channels:
            if not old.is_wanted and not old.waiters:
                continue
            channel = self.by_name.get(old.name)
            if channel is None:
                channel = OwnChannel(old.name, old.receive) if isinstance(old, OwnChannel) else None
                channel = channel or TopicChannel(old.topic, old.name)
                self._missed += channel.is_missed
                self.by_name[old.name] = channel
            channel.is_wanted |= old.is_wanted
            _ = self._lingering.pop(old.name, None)
            channel.waiters += old.waiters
            old.waiters = []
            if channel.is_heard:
                self._answer(channel, None)
                if old.is_missed:
                    self._recovered.append(channel.topic)
            elif old.is_missed and not channel.is_missed:
                channel.is_missed = True
                self._missed += 1
            if not channel.is_heard and not channel.is_missed:
                asked.append(channel)
        for channel in asked:
            if self._writer is None:
                self._forget(channel)
                self._answer(channel, self.reason)
            elif not channel.is_asked:
                self._ask_soon(channel)
        self._begin_again()

    def release(self, topic: str) -> None:
        """Let a channel go for which no join waits any more, where none had confirmed it before."""
        channel = self.by_name.get(self._name(topic))
        if channel is not None and channel.is_wanted and not (channel.waiters or channel.is_heard or channel.is_missed):
            self._let_linger(channel)
