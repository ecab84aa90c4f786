"""A Redis of the test's own, and a numbered stream through it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from tests.support.cluster import Cluster
from tests.support.cluster_stream import TOPICS, ClusterStream, Start, cluster_stream, until_whole
from tests.support.process import Valkey, wait_for
from tests.support.redis_faults import FAST, Connect, ServeRelay, Stream, stream_to
from tests.support.redis_link import WATCHFUL, is_linked


@pytest.fixture
def direct() -> bool:
    """How frames are written does not matter here."""
    return True


@pytest.fixture
def server() -> Iterator[Valkey]:
    """A Valkey of the test's own, to be maltreated."""
    with Valkey() as server:
        yield server


@pytest.fixture
def replica(server: Valkey) -> Iterator[Valkey]:
    """A replica of it, that hears it."""
    with Valkey("--replicaof", f"127.0.0.1 {server.port}", "--repl-diskless-sync-delay", "0") as replica:
        wait_for(lambda: is_linked(replica), "the replica")
        yield replica


@pytest.fixture
def stream(
    serve_relay: ServeRelay, connect: Connect, server: Valkey, caplog: pytest.LogCaptureFixture
) -> Callable[..., AbstractAsyncContextManager[Stream]]:
    """``async with stream(url=…, topics=…, vsn=…, **redis)``: break something while events flow; see `Stream`."""
    caplog.set_level(logging.INFO, "relay")

    @asynccontextmanager
    async def stream(
        url: str = "", topics: tuple[dict[str, Any], ...] = (), vsn: str = "2.0.0", **redis: Any
    ) -> AsyncIterator[Stream]:
        served = await serve_relay(redis_url=url or server.url, redis=FAST | redis, topics=topics)
        async with stream_to(served, connect, server.url, caplog, vsn=vsn) as stream:
            yield stream

    return stream


@pytest.fixture
def start(serve_relay: ServeRelay, connect: Connect, cluster: Cluster) -> Start:
    """``async with start(**redis)``: numbered events on all nodes; at the end the cluster has to be whole again."""

    @asynccontextmanager
    async def start(
        url: str = "", on: Cluster = cluster, topics: Sequence[str] = TOPICS, **redis: Any
    ) -> AsyncIterator[ClusterStream]:
        limits = {"topics_per_socket": len(topics), "joins_per_s": 0}
        served = await serve_relay(redis_url=url or on.url, redis=WATCHFUL | redis, limits=limits)
        await until_whole(served)
        async with cluster_stream(served, connect, on, topics) as stream:
            yield stream
            await asyncio.to_thread(on.wait_until_whole)
            await until_whole(served)

    return start
