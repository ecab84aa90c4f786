"""`relay.brokers.cluster_shard`: what a master is sent by which command."""

import pytest

from relay.brokers.cluster import ClusterBroker
from relay.brokers.cluster_map import Endpoint
from relay.brokers.cluster_shard import Shard
from relay.config import Config
from relay.metrics import Metrics


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
