"""Two nodes behind a balancer are replaced one by one, under five hundred clients that come back as phoenix.js does."""

import asyncio
import time
from contextlib import ExitStack

from tests.support.faults import Proxy
from tests.support.patience import PATIENCE
from tests.support.phoenix import phoenix_clients, until_joined
from tests.support.process import RelayProcess, Valkey
from tests.support.serving import eventually
from tests.support.witness import Ticker

CLIENTS = 500
PACE = 100
SETTINGS = {"RELAY_LIMITS__DRAIN_PER_S": str(PACE), "RELAY_SYSTEM_TOPIC": "false"}


async def test_rolling_restart_brings_all_clients_back_in_time_and_at_the_pace_set() -> None:
    """All are joined again within 15 s of each node's end, which takes as long as the pace of its closes says."""
    with ExitStack() as stack:
        server = stack.enter_context(Valkey())

        def node() -> RelayProcess:
            return stack.enter_context(RelayProcess("--redis-url", server.url, environ=SETTINGS))

        nodes = [node(), node()]
        async with (
            Proxy.open(*(port_of(relay) for relay in nodes)) as balancer,
            phoenix_clients(CLIENTS, balancer.port, "room:roll") as clients,
            Ticker.run(server.url, "room:roll") as ticker,
        ):
            ticker.pace_s = 0.5
            for turn in range(2):
                began = time.monotonic()
                before = sum(len(client.joined_at) for client in clients)
                old = nodes[turn]
                code = await asyncio.to_thread(old.stop)
                ended_s = time.monotonic() - began
                assert code == 0, old.output
                await until_joined(clients, 15)
                took_s = time.monotonic() - began
                nodes[turn] = await asyncio.to_thread(node)
                balancer.targets[turn] = port_of(nodes[turn])
                joins = [at for client in clients for at in client.joined_at if at >= began]
                moved = sum(len(client.joined_at) for client in clients) - before
                assert moved == len(joins)
                assert CLIENTS / 4 < moved <= CLIENTS, "each comes back once at most"
                assert took_s < 15 * PATIENCE
                # What was closed in one go would let the node end at once. When they come back does not show it: those
                # that met the node that was ending do so together, and this process may stand still for a while.
                assert ended_s > moved / PACE * 0.9
            assert {code for client in clients for code in client.codes} == {1012}
            last = ticker.taken[-1]
            await eventually(lambda: all(client.numbers[-1] >= last for client in clients), "events")
            for client in clients:
                assert client.numbers == sorted(set(client.numbers)), "in order, and nothing twice"
        for relay in nodes:
            assert "Traceback" not in relay.output


def port_of(relay: RelayProcess) -> int:
    return int(relay.http.rpartition(":")[2])
