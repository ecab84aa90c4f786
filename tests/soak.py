"""Half an hour of churn and faults against one ``relay serve``, whose memory must not grow: ``make soak``.

Sockets come, join, push, leave, rejoin, go in good order, vanish with a reset, send nonsense or stop to read; Redis is
cut off, paused, killed and restarted. Once a minute a line says what the relay holds. Exits 1 where the memory at the
end is over 5 % more than after a sixth of the time, minute 5 of 30, or where the relay has logged a traceback. What it
has logged is kept in ``build/soak.log``.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import psutil
from redis.asyncio import Redis
from redis.exceptions import RedisError
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from tests.support.client import TEXT, Client, RawSocket
from tests.support.process import RelayProcess, Valkey

SOCKETS = 100
TOPICS = 30
EVENTS_PER_S = 100
GROWTH_MAX = 0.05
LOG = Path("build/soak.log")
NONSENSE = ("[", "{}", '["1","1","room:1"]', "\x00", "[1,2,3,4,5]", '["1","1","room:1","phx_join",{}]x')

GONE = (ConnectionClosed, InvalidHandshake, OSError, EOFError, TimeoutError, AssertionError)
"""What a client sees of a relay that has cut it off, or that is behind."""

done: Counter[str] = Counter()


def topic() -> str:
    return f"room:{random.randrange(TOPICS)}"


async def lead_a_life(url: str, end: float) -> None:
    """One socket after another, each with a life of its own."""
    lives = (talk, talk, talk, talk, vanish, babble, dawdle)
    while time.monotonic() < end:
        life = random.choice(lives)
        with suppress(*GONE):
            async with asyncio.timeout(max(0.1, end - time.monotonic())):
                await life(url)
            done[life.__name__] += 1
        await asyncio.sleep(random.uniform(0, 0.5))


async def talk(url: str) -> None:
    """Join, push, leave and join again, answer to what the relay says; then close."""
    async with Client.connect(url, vsn=random.choice(["2.0.0", "1.0.0"])) as client:
        joined: dict[str, object] = {}
        end = time.monotonic() + random.expovariate(1 / 20)
        while time.monotonic() < end:
            name, ref = topic(), client.next_ref()
            if name not in joined:
                await client.send(ref, ref, name, "phx_join", {"token": "t" * random.randrange(200)})
                joined[name] = ref
            elif random.random() < 0.3:
                await client.send(joined.pop(name), ref, name, "phx_leave", {})
            else:
                await client.send(joined[name], ref, name, "shout", {"text": "x" * random.randrange(2000)})
            await client.send(None, client.next_ref(), "phoenix", "heartbeat", {})
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0.1, 1)):
                    while True:
                        message = json.loads(await client.connection.recv() or "[]")
                        name, event = (message["topic"], message["event"]) if client.v1 else message[2:4]
                        if event == "phx_error":
                            done["told of a gap"] += 1
                            joined.pop(name, None)


async def vanish(url: str) -> None:
    """Join a few topics, then a reset in the middle of a frame."""
    async with RawSocket.connect(url) as client:
        for number in range(5):
            await client.send_frame(TEXT, json.dumps([str(number), str(number), topic(), "phx_join", {}]).encode())
        await asyncio.sleep(random.uniform(0, 3))
        await client.send_bytes(b"\x81\xfe\x10\x00half a frame")
        client.reset()


async def babble(url: str) -> None:
    """Nonsense, which ends the socket."""
    async with Client.connect(url) as client:
        await client.send("1", "1", topic(), "phx_join", {})
        await client.send_raw(random.choice(NONSENSE))
        await client.expect_closed()


async def dawdle(url: str) -> None:
    """Join and read nothing."""
    async with RawSocket.connect(url, receive_buffer=4096) as client:
        for number in range(10):
            await client.send_frame(TEXT, json.dumps([str(number), str(number), topic(), "phx_join", {}]).encode())
        await asyncio.sleep(random.uniform(0, 20))


async def publish(url: str, end: float) -> None:
    """Events, most of them small."""
    while time.monotonic() < end:
        with suppress(RedisError, OSError):
            async with Redis.from_url(url, socket_timeout=5) as redis:
                while time.monotonic() < end:
                    size = random.choice([20, 200, 200, 200, 20_000])
                    await redis.publish(f"to:{topic()}:tick", json.dumps({"text": "x" * size}))
                    done["events"] += 1
                    await asyncio.sleep(random.expovariate(EVENTS_PER_S))
        await asyncio.sleep(0.1)


async def break_redis(server: Valkey, end: float) -> None:
    """A fault each 15 s."""
    while time.monotonic() + 20 < end:
        await asyncio.sleep(15)
        fault = random.choice(["cut", "cut", "paused", "killed"])
        done[f"redis {fault}"] += 1
        if fault == "cut":
            with suppress(RedisError, OSError):
                async with Redis.from_url(server.url) as redis:
                    await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")  # type: ignore[no-untyped-call]
        elif fault == "paused":
            server.pause()
            await asyncio.sleep(2)
            server.resume()
        else:
            server.kill()
            await asyncio.sleep(1)
            await asyncio.to_thread(server.start)


async def watch(relay: RelayProcess, minutes: float, started: float) -> tuple[float, float]:
    """Print a line each minute; returns the memory after a sixth of the time and at the end, in MiB.

    Each is the median of a minute's samples (of a tenth of the time, in a short run).
    """
    assert relay.process is not None
    process = psutil.Process(relay.process.pid)
    window_s = min(60.0, minutes * 6)
    samples: list[tuple[float, float]] = []
    say = 1
    while (now := time.monotonic() - started) < minutes * 60:
        samples.append((now, process.memory_info().rss / 2**20))
        if now >= say * 60:
            health = await asyncio.to_thread(lambda: urlopen(relay.http + "/health", timeout=30).read().decode())
            sockets = f"{json.loads(health)['sockets']} sockets"
            sys.stdout.write(f"minute {say:3}  RSS {samples[-1][1]:7.1f} MiB  {sockets}  {dict(done)}\n")
            sys.stdout.flush()
            say += 1
        await asyncio.sleep(1)

    def around(end_s: float) -> float:
        return statistics.median(size for at, size in samples if end_s - window_s <= at <= end_s)

    return around(minutes * 10), around(minutes * 60)


async def run(minutes: float) -> int:
    with Valkey() as server, RelayProcess("--redis-url", server.url) as relay:
        started = time.monotonic()
        end = started + minutes * 60
        async with asyncio.TaskGroup() as group:
            for _ in range(SOCKETS):
                group.create_task(lead_a_life(relay.ws, end))
            group.create_task(publish(server.url, end))
            group.create_task(break_redis(server, end))
            watching = group.create_task(watch(relay, minutes, started))
        before, after = watching.result()
    # After its end, whose tracebacks count too.
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text(relay.output)  # noqa: ASYNC240 - all others have ended
    tracebacks = relay.output.count("Traceback")
    growth = after / before - 1
    sys.stdout.write(
        f"{minutes:g} minutes: {before:.1f} MiB at minute {minutes / 6:g}, {after:.1f} MiB at the end, {growth:+.1%}; "
        f"{tracebacks} tracebacks in {LOG}; {dict(done)}\n"
    )
    return 1 if growth > GROWTH_MAX or tracebacks else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    sys.exit(asyncio.run(run(parser.parse_args().minutes)))


if __name__ == "__main__":
    main()
