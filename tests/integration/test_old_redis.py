"""Redis 6.2, the oldest that is supported: what works there in another way than on Redis 7, and what is refused."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from redis import Redis

from relay import Config
from relay.brokers.base import is_position
from relay.brokers.cluster_check import examine_cluster
from relay.brokers.redis_check import Finding, examine
from tests.integration.test_cli_client import run
from tests.support.client import Client
from tests.support.process import Valkey, old_cluster_node, wait_for
from tests.support.redis_faults import FAST, until_not_ready
from tests.support.serving import Served

Connect = Callable[..., Awaitable[Client]]
ServeRelay = Callable[..., Awaitable[Served]]

STORES: dict[str, Any] = {"topics": [{"match": "room:*", "history": {"size": 10, "ttl_s": 60}, "presence": True}]}
NEEDS = "redis+cluster:// needs sharded Pub/Sub: Redis 7.0 or later, or Valkey"


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


def publish_by_script(server: Valkey, topic: str, directory: Path) -> str:
    """What docs/history.md has for Redis 6.2: the script that `relay config` prints, by redis-cli if there is one."""
    settings = directory / "relay.toml"
    settings.write_text('[[topics]]\nmatch = "room:*"\nhistory = { size = 10, ttl_s = 60 }\n')
    printed = json.loads(run("config", "--topic", topic, "--config", str(settings)).stdout)
    assert printed["eval"][:3] == ["redis-cli", "--eval", "publish.lua"]
    if redis_cli := shutil.which("redis-cli"):
        (directory / "publish.lua").write_text(printed["script"])
        line = [redis_cli, "-p", str(server.port), *printed["eval"][1:]]
        return subprocess.run(line, cwd=directory, capture_output=True, text=True, check=True).stdout.strip()
    key, comma, *args = printed["eval"][3:]
    assert comma == ","
    with Redis(port=server.port, decode_responses=True) as redis:
        return str(redis.eval(printed["script"], 1, key, *args))


async def test_script_of_the_documentation_publishes_to_the_history(
    serve_relay: ServeRelay, connect: Connect, old_server: Valkey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Clients receive the event, a client that comes later recovers it, and the log names what is missing once."""
    served = await serve_relay(redis_url=old_server.url, **STORES)
    topic = f"room:{uuid4().hex}"
    client = await connect(served)
    await client.send("1", "1", topic, "phx_join", {"since": None})
    born = (await client.receive())[4]["response"]["_position"]
    assert (await client.receive())[3] == "presence_state"
    position = await asyncio.to_thread(publish_by_script, old_server, topic, tmp_path)
    assert is_position(position)
    await client.expect_event(topic, "new_msg", {"text": "hi", "_position": position})
    late = await connect(served)
    await late.send("1", "1", topic, "phx_join", {"since": born})
    assert (await late.receive())[4]["response"] == {"_position": born, "recovered": True}
    assert {(await late.receive())[3] for _ in range(2)} == {"presence_state", "new_msg"}
    with Redis(port=old_server.port) as redis, pytest.raises(Exception, match="(?i)unknown command"):
        redis.fcall("relay_publish", 1, f"topic:{topic}", "new_msg", "{}", "10", "60")
    assert caplog.text.count("it needs Redis 7.0 or later") == 1


async def test_check_says_that_other_programs_use_the_script(old_server: Valkey) -> None:
    """And that the user may do all that is needed."""
    found = await examine(Config(redis_url=old_server.url, **STORES))
    assert [each.text for each in found if each.about == "warning"] == []
    said = "no functions, which Redis 7.0 has first: other programs publish history with EVAL"
    assert Finding("redis", said) in found
    assert [each.about for each in found].count("probe") == 1


# Redis Cluster, which needs more.


async def test_cluster_without_sharded_pubsub_is_refused_in_words(serve_relay: ServeRelay) -> None:
    """By the relay, and by `relay check --connect`, which does not advise permissions for commands that are missing."""
    with old_cluster_node() as node:
        with Redis(port=node.port) as redis:
            redis.execute_command("CLUSTER ADDSLOTS", *range(16384))
            wait_for(lambda: redis.cluster("info")["cluster_state"] == "ok", "the cluster")
        url = f"redis+cluster://127.0.0.1:{node.port}"
        served = await serve_relay(redis_url=url, redis=FAST)
        assert NEEDS in await until_not_ready(served)
        warnings = [each.text for each in await examine_cluster(Config(redis_url=url)) if each.about == "warning"]
        assert warnings == [f"redis: 127.0.0.1:{node.port}: {NEEDS}"]
