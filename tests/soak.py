"""An hour of churn and faults against one ``relay serve``: memory must not grow, nor an event be lost: ``make soak``.

Sockets come, join, push, leave, rejoin, go in good order, vanish with a reset, send nonsense, stop to read or are
refused, others poll, requests share connections; Redis is cut off, paused, killed and restarted. Once a minute many
stop to read at once, and the relay is suspended: what its memory grows to is decided by these peaks, which are all
alike, and not by when the machine is busy. Meanwhile followers
of a topic with a history are cut and come back with their positions, and what they got is compared with what Redis
has acknowledged. Once a minute a line says what the relay holds. Exits 1 where the relay has logged a traceback,
where a follower has seen an event twice, has missed one while it was said to have recovered, or hears nothing any
more, or where the memory has grown: the median of the last sixth of the time, minutes 50 to 60, against that of the
second sixth, minutes 10 to 20, by over 1 %. A shorter run may grow by as much more as it is shorter, by 5 % at most.
What the relay has logged is kept in ``build/soak.log``, and what those with presence have, in
``build/soak-presence.log``, if something was wrong with it.

Beside it four more relays with presence are killed, stalled and cut off, their Redis flushed and restarted, and their
members come, go and move: after quiet of one lease each client's list and each relay's state must equal the truth,
and no client may have seen somebody leave who stayed.

``--topic-mode`` is another run, in topic mode: clients join and leave under the same faults of Redis. It exits 1 where
at the end ``PUBSUB CHANNELS`` is not exactly the topics that are joined, or one of them brings its clients no event.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import httpx2 as httpx
import psutil
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Origin

from relay.errors import BusUnavailable
from tests.support import churn
from tests.support.client import TEXT, Client, RawSocket
from tests.support.follower import Follower, Source, progress
from tests.support.long_poll import Poller
from tests.support.presence_model import Times, keep_checking, kill_all
from tests.support.process import RelayProcess, Valkey

SOCKETS = 100
TOPICS = 30
EVENTS_PER_S = 100
PEAK_SOCKETS = 25
PEAK_S = 20.0
SUSPENDED_S = 2.0
FOLLOWED = "followed:1"
FOLLOWERS = 6
HISTORY = {"size": 10_000, "ttl_s": 600}
ENVIRON = {"RELAY_TOPICS": json.dumps([{"match": FOLLOWED, "history": HISTORY}])}
HOUR_MINUTES = 60.0
GROWTH_MAX = 0.01
"""Of an hour; see `growth_max`."""
SHORT_GROWTH_MAX = 0.05
LOG = Path("build/soak.log")
PRESENCE_LOG = Path("build/soak-presence.log")
NONSENSE = ("[", "{}", '["1","1","room:1"]', "\x00", "[1,2,3,4,5]", '["1","1","room:1","phx_join",{}]x')

GONE = (httpx.HTTPError, ConnectionClosed, InvalidHandshake, OSError, EOFError, TimeoutError, AssertionError)
"""What a client sees of a relay that has cut it off, or that is behind."""

done: Counter[str] = Counter()


def topic() -> str:
    return f"room:{random.randrange(TOPICS)}"


async def lead_a_life(url: str, end: float) -> None:
    """One socket after another, each with a life of its own."""
    lives = (talk, talk, talk, talk, poll, vanish, babble, dawdle, knock, ask)
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


async def dawdle(url: str, seconds: float | None = None) -> None:
    """Join and read nothing."""
    async with RawSocket.connect(url, receive_buffer=4096) as client:
        for number in range(10):
            await client.send_frame(TEXT, json.dumps([str(number), str(number), topic(), "phx_join", {}]).encode())
        await asyncio.sleep(random.uniform(0, 20) if seconds is None else seconds)


async def poll(url: str) -> None:
    """A session of long polling: join, push, listen; half of them leave without a word, a poll under way or not."""
    async with Poller.connect(url) as client:
        joined: dict[str, str] = {}
        end = time.monotonic() + random.expovariate(1 / 10)
        while time.monotonic() < end:
            name, ref = topic(), str(random.randrange(1000))
            if name not in joined:
                joined[name] = ref
                answer = await client.post(json.dumps([ref, ref, name, "phx_join", {}]))
            else:
                answer = await client.post(json.dumps([joined[name], ref, name, "shout", {"text": "x" * 200}]))
            with suppress(TimeoutError):
                async with asyncio.timeout(random.choice((0.1, 1, 12))):
                    answer = await client.poll() if answer["status"] == 200 else answer
            if answer["status"] not in (200, 204):
                return  # the session is over: it was slow, or the relay could not serve it
        if random.random() < 0.5:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.poll()


async def knock(url: str) -> None:
    """Ask for a socket from a page of another origin, which is refused."""
    with suppress(InvalidStatus):
        async with Client.connect(url, origin=Origin("http://elsewhere.example")):
            done["another origin accepted"] += 1


async def ask(url: str) -> None:
    """A few requests on one connection."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        for _ in range(5):
            writer.write(f"GET /health HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None, head
            await reader.readexactly(int(length[1]))
    finally:
        writer.close()


def growth_max(minutes: float) -> float:
    """What the memory may grow by between the two windows, as a share: what settles in an hour has no time here."""
    return min(SHORT_GROWTH_MAX, GROWTH_MAX * max(1.0, HOUR_MINUTES / minutes))


async def publish(url: str, end: float) -> None:
    """Events, most of them small."""
    async with Redis.from_url(url, socket_timeout=5) as redis:
        while time.monotonic() < end:
            size = random.choice([20, 200, 200, 200, 20_000])
            with suppress(RedisError, OSError):
                await redis.publish(f"to:{topic()}:tick", json.dumps({"text": "x" * size}))
                done["events"] += 1
            await asyncio.sleep(random.expovariate(EVENTS_PER_S))


async def follow(ws_url: str, redis_url: str, end: float) -> list[str]:
    """Follow a topic with a history over cuts of its clients; returns what was wrong with what they got."""
    source = Source()
    # An event that is sent again would come twice: no retries, and no timeout shorter than a pause.
    async with Redis.from_url(redis_url, retry=Retry(NoBackoff(), 0), socket_timeout=30) as redis:

        async def publish(payload: bytes) -> None:
            size, ttl_s = HISTORY.values()
            try:
                await redis.fcall("relay_publish", 1, f"topic:{FOLLOWED}", "tick", payload, str(size), str(ttl_s))
            except (RedisError, OSError) as error:
                done["events with history refused"] += 1
                await asyncio.sleep(0.1)
                raise BusUnavailable(str(error)) from error

        wrong: list[str] = []
        async with Follower.run([ws_url], FOLLOWED, FOLLOWERS) as followers, source.run(publish, pace_s=0.1):
            while time.monotonic() < end:
                await asyncio.sleep(random.uniform(0, 2))
                random.choice(followers).cut()
            try:
                await progress(followers, 1)
            except TimeoutError:
                wrong.append("a follower gets no events any more")
    for follower in followers:
        try:
            follower.check(source)
        except AssertionError as error:
            wrong.append(str(error))
        done["followed events"] += follower.count
        done["followers recovered"] += follower.recovered
        for reason, count in follower.lost.items():
            done[f"not recovered: {reason}"] += count
    done["events with history"] = len(source.acknowledged)
    if not done["followers recovered"]:
        wrong.append("no follower has recovered")
    return wrong


async def keep_present(end: float) -> list[str]:
    """Disturb relays with presence, and compare what is listed with the truth; returns what was wrong."""
    with tempfile.TemporaryDirectory(prefix="relay-soak-") as directory, Valkey() as server:
        try:
            if time.monotonic() + 300 < end:  # with the times that a relay has where nothing else is set
                times = Times(lease_s=15, renew_s=5, leave_delay_s=2)
                done["seconds until nothing was left"] = round(await kill_all(times, Path(directory), server, 5))
            done["presence checked"] = await keep_checking(end - 30, Path(directory), PRESENCE_LOG)
        except (AssertionError, OSError) as error:
            return [f"presence, {(end - time.monotonic()) / 60:.0f} minutes before the end: {error}"]
    return []


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


async def press(relay: RelayProcess, end: float) -> None:
    """A peak each minute: many sockets that do not read, and a process that gets no processor."""

    async def stop_reading() -> None:
        with suppress(*GONE):
            await dawdle(relay.ws, PEAK_S)

    assert relay.process is not None
    await asyncio.sleep(5)
    while time.monotonic() + PEAK_S < end:
        async with asyncio.TaskGroup() as group:
            for _ in range(PEAK_SOCKETS):
                group.create_task(stop_reading())
            await asyncio.sleep(PEAK_S / 2)
            relay.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(SUSPENDED_S)
            relay.process.send_signal(signal.SIGCONT)
        done["peaks"] += 1
        await asyncio.sleep(60 - PEAK_S)


async def watch(relay: RelayProcess, minutes: float, started: float) -> tuple[float, float]:
    """Print a line each minute; returns the median memory of the second sixth of the time and of the last, in MiB."""
    assert relay.process is not None
    process = psutil.Process(relay.process.pid)
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

    def of_sixth(number: int) -> float:
        return statistics.median(size for at, size in samples if number - 1 <= at / (minutes * 10) <= number)

    return of_sixth(2), of_sixth(6)


async def run(minutes: float) -> int:
    with Valkey() as server, RelayProcess("--redis-url", server.url, environ=ENVIRON) as relay:
        started = time.monotonic()
        end = started + minutes * 60
        async with asyncio.TaskGroup() as group:
            for _ in range(SOCKETS):
                group.create_task(lead_a_life(relay.ws, end))
            group.create_task(publish(server.url, end))
            group.create_task(break_redis(server, end))
            group.create_task(press(relay, end))
            present = group.create_task(keep_present(end))
            following = group.create_task(follow(relay.ws, server.url, end))
            watching = group.create_task(watch(relay, minutes, started))
        before, after = watching.result()
        wrong = following.result() + present.result()
    # After its end, whose tracebacks count too.
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text(relay.output)  # noqa: ASYNC240 - all others have ended
    tracebacks = relay.output.count("Traceback")
    growth = after / before - 1
    sys.stdout.write(
        f"{minutes:g} minutes: {before:.1f} MiB in minutes {minutes / 6:.3g} to {minutes / 3:.3g}, "
        f"{after:.1f} MiB in minutes {minutes * 5 / 6:.3g} to {minutes:g}, {growth:+.1%}, "
        f"{growth_max(minutes):.1%} allowed; {tracebacks} tracebacks in {LOG}; "
        f"{len(wrong)} faults of followers and of presence; {dict(done)}\n"
    )
    sys.stdout.writelines(f"wrong: {text}\n" for text in wrong)
    return 1 if growth > growth_max(minutes) or tracebacks or wrong else 0


async def run_topic_mode(minutes: float) -> int:
    with Valkey() as server, RelayProcess("--redis-url", server.url, environ=churn.ENVIRON) as relay:
        end = time.monotonic() + minutes * 60
        async with asyncio.TaskGroup() as group:
            group.create_task(break_redis(server, end))
            churning = group.create_task(churn.churn(relay.ws, server.url, end, done))
    wrong, tracebacks = churning.result(), relay.output.count("Traceback")
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text(relay.output)  # noqa: ASYNC240 - as above
    sys.stdout.write(f"{minutes:g} minutes in topic mode: {tracebacks} tracebacks in {LOG}; {dict(done)}\n")
    sys.stdout.writelines(f"wrong: {text}\n" for text in wrong)
    return 1 if tracebacks or wrong else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=HOUR_MINUTES)
    parser.add_argument("--topic-mode", action="store_true", help="churn in topic mode instead")
    arguments = parser.parse_args()
    # What it has started ends with it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(asyncio.run((run_topic_mode if arguments.topic_mode else run)(arguments.minutes)))


if __name__ == "__main__":
    main()
