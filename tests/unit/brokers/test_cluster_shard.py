"""`relay.brokers.cluster_shard`: what a master is sent by which command, and how its topics are counted."""

import asyncio

import pytest

from relay.brokers.cluster import ClusterBroker
from relay.brokers.cluster_map import SLOTS, Endpoint
from relay.brokers.cluster_shard import Shard
from relay.config import Config
from relay.metrics import Metrics, ShardTopics
from tests.unit.brokers.test_cluster_channels import Writer, heard


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (b"from:",)),
        ({"from_user_prefix": "topic:"}, (b"from:",)),
        ({"push_identity": True}, (b"from:", b"from-user:")),
    ],
    ids=["default", "prefix not in use", "with identity"],
)
async def test_only_pushes_go_out_by_publish(settings: dict[str, object], expected: tuple[bytes, ...]) -> None:
    config = Config(redis_url="redis+cluster://one:6379", redis=settings)
    assert Shard(ClusterBroker(config, Metrics()), Endpoint("one", 6379)).push_prefixes == expected


async def test_topics_that_linger_are_counted_apart_and_channels_of_nodes_not_at_all() -> None:
    broker = ClusterBroker(Config(redis_url="redis+cluster://one:6379"), Metrics())
    shard = broker.shards[Endpoint("one", 6379)] = Shard(broker, Endpoint("one", 6379))
    for slot in range(SLOTS):
        broker.map.move(slot, shard.endpoint)
    broker._own[b"relay:control"] = lambda data: None
    assert broker.shard_topics == {"one:6379": ShardTopics(0, 0)}
    shard.channels.attach(Writer())
    shard.channels.want(b"relay:control", lambda data: None)
    await asyncio.sleep(0.01)
    shard.channels.confirm()
    await heard(shard.channels, "a", "b", "c")
    shard.channels.unsubscribe("b")
    assert broker.shard_topics == {"one:6379": ShardTopics(2, 1)}
    shard.channels.close()
    assert ClusterBroker(broker.config, Metrics()).shard_topics == {}
