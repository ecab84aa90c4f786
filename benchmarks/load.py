"""The load generator: sockets that count bytes, a publisher, and the check that every frame came once and in order.

Owns sockets and time; must not know processes. It shares one core with Redis, so it does as little as it can: an epoll
loop that receives into one buffer and adds up lengths. All frames of a run are of one size, learned from a first
event, so the byte counts say how many came. A sample of the sockets keeps its bytes, which are parsed after the run:
there the numbers must be complete and in order. The sample's latency ends with the kernel's own time of arrival
(``SO_TIMESTAMPNS``), not when this process came round to reading.
"""

import re
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from benchmarks.dialects import Dialect, Step, heartbeat_frame, payload, payload_bytes, push_frame

SAMPLES = 20
"""Sockets of a group that are parsed."""

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; Python's socket module does not name it
_EVENT = re.compile(rb'"n": ?"(\d{8})", ?"t": ?"(\d{19})"')
_REPLY_TO = re.compile(rb'"(\d+)","phoenix","phx_reply"')
_BUFFER_BYTES = 1 << 18
_JOINING_AT_ONCE = 1000
"""Sockets that may be between connect and joined; Uvicorn's backlog is 2048."""


class LoadError(Exception):
    """The measurement cannot be made."""


class Publisher:
    """A connection to Redis that publishes and is never answered."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(b"CLIENT REPLY OFF\r\n")
        self.send = self._socket.sendall

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def publish_command(redis_channel: bytes, message: bytes, command: bytes = b"PUBLISH") -> bytes:
    """``PUBLISH``, or ``SPUBLISH``, as Redis wants it on the wire."""
    return b"*3\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (
        len(command),
        command,
        len(redis_channel),
        redis_channel,
        len(message),
        message,
    )


def append_command(redis_key: bytes, event: bytes, message: bytes, size: int, ttl_s: int) -> bytes:
    """``FCALL relay_publish``: a publish with history, as programs in other languages do it."""
    words = (b"FCALL", b"relay_publish", b"1", redis_key, event, message, b"%d" % size, b"%d" % ttl_s)
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class Client:
    """One socket: joining by its steps, then counting."""

    __slots__ = ("chunks", "ended", "on_data", "receive_into", "received", "skipped", "sock", "steps", "tail", "topics")

    def __init__(self, sock: socket.socket, steps: list[Step], topics: Sequence[int]) -> None:
        self.sock = sock
        self.steps = steps
        self.topics = topics
        """Its topics, as places in the list of the run's topics."""
        self.received = 0
        self.receive_into = sock.recv_into
        # Of a sampled socket: what came, and when its last byte did, in nanoseconds of the wall clock.
        self.chunks: list[tuple[bytes, int]] | None = None
        self.on_data: Callable[[bytes], None] | None = None
        self.tail = b""
        self.ended = False
        # Whether it counts for a run: slow readers and heartbeats are looked at apart.
        self.skipped = False


@dataclass
class Run:
    """What came of a run. Times in milliseconds."""

    events: int
    deliveries: int
    delivered: int
    wall_s: float
    server_cpu_s: float
    load_cpu_s: float
    frame_bytes: int
    latencies: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def cpu_us(self) -> float:
        """Microseconds of the server's CPU time for each delivered frame."""
        return 1e6 * self.server_cpu_s / max(1, self.delivered)


class Beats(NamedTuple):
    """Sockets that only send heartbeats, in turns."""

    clients: list[Client]
    interval_s: float
    sent: dict[int, int]


class Group:
    """Sockets of one server, driven by whoever calls `pump`.

    Args: address: of the server.
          dialect: how it is spoken to.
          cpu_s: CPU time of the server so far.
    """

    def __init__(self, address: tuple[str, int], dialect: Dialect, cpu_s: Callable[[], float]) -> None:
        self.address = address
        self.dialect = dialect
        self.cpu_s = cpu_s
        self.topics: list[str] = ["room:1"]
        self.clients: list[Client] = []
        self.received = 0
        self.frame_bytes = 0
        self._by_fd: dict[int, Client] = {}
        self._epoll = select.epoll()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._joining = 0

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.close(self.clients)
        self._epoll.close()

    # Joining.

    def join(
        self,
        count: int,
        *,
        topics: Callable[[int], Sequence[int]] = lambda _: (0,),
        receive_buffer: int | None = None,
        at_once: int = _JOINING_AT_ONCE,
        keep: int = 0,
    ) -> list[Client]:
        """Connect and join ``count`` sockets as fast as the server takes them.

        Args: topics: what the n-th of them joins, as places in ``self.topics``.
              receive_buffer: size of the kernel's buffer, for slow readers.
              at_once: sockets that may be between connect and joined.
              keep: of so many, spread over all, what comes with and after the reply to the join is kept.
        Raises: LoadError: one was refused, or they did not all join within two minutes.
        """
        made: list[Client] = []
        deadline = time.monotonic() + 120
        while len(made) < count or self._joining:
            while len(made) < count and self._joining < at_once:
                made.append(self._connect(topics(len(made)), receive_buffer))
                if keep and len(made) % max(1, count // keep) == 0:
                    made[-1].chunks = []
                if len(made) % 50 == 0:
                    self.pump(0)
            self.pump(0.1)
            if any(client.ended for client in made) or time.monotonic() > deadline:
                lost = sum(client.ended for client in made)
                raise LoadError(f"{lost} sockets were refused, {self._joining} of {count} have not joined")
        self.clients += made
        return made

    def _connect(self, topics: Sequence[int], receive_buffer: int | None) -> Client:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            # Segments as on a network: with loopback's, 64 kB, the kernel would buffer megabytes for this socket.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        sock.connect(self.address)
        sock.setblocking(False)
        client = Client(sock, self.dialect.steps([self.topics[place] for place in topics]), topics)
        self._by_fd[sock.fileno()] = client
        self._epoll.register(sock, select.EPOLLIN)
        if client.steps:
            self._joining += 1
            client.on_data = lambda data: self._go_on(client, data)
            sock.sendall(client.steps[0].send)
        return client

    def _go_on(self, client: Client, data: bytes) -> None:
        client.tail += data
        while client.steps:
            step = client.steps[0]
            if client.tail.count(step.expect) < step.times:
                if b"HTTP/1.1 4" in client.tail or b'"status":"error"' in client.tail:
                    raise LoadError(f"refused: {client.tail[:300]!r}")
                return
            client.tail = client.tail[client.tail.rindex(step.expect) + len(step.expect) :]
            del client.steps[0]
            if client.steps and client.steps[0].send:
                client.sock.sendall(client.steps[0].send)
        self._joining -= 1
        client.on_data = None
        if client.chunks is not None:
            client.chunks.append((client.tail, time.time_ns()))
        client.tail = b""

    def close(self, clients: Sequence[Client]) -> None:
        """Cut connections off: no TIME_WAIT is left behind, of which there would be 10 000."""
        gone = set(map(id, clients))
        for client in clients:
            self._by_fd.pop(client.sock.fileno(), None)
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sock.close()
        self.clients = [client for client in self.clients if id(client) not in gone]

    def pause(self, clients: Sequence[Client]) -> None:
        """Do not read these at all."""
        for client in clients:
            client.skipped = True
            self._epoll.unregister(client.sock)

    def resume(self, clients: Sequence[Client]) -> None:
        """Read them again, and keep what comes."""
        for client in clients:
            client.chunks = []
            self._epoll.register(client.sock, select.EPOLLIN)

    # Receiving.

    def pump(self, timeout_s: float) -> int:
        """Receive what is there; returns how many bytes came."""
        came = 0
        buffer, by_fd = self._buffer, self._by_fd
        for fd, _ in self._epoll.poll(timeout_s, 1024):
            client = by_fd[fd]
            try:
                if client.on_data is not None:
                    data = client.sock.recv(_BUFFER_BYTES)
                    size = len(data)
                    if size:
                        client.on_data(data)
                elif client.chunks is not None:
                    data, control, _, _ = client.sock.recvmsg(_BUFFER_BYTES, 64)
                    size = len(data)
                    client.chunks.append((data, _stamp(control)))
                else:
                    size = client.receive_into(buffer)
            except BlockingIOError:
                continue
            except OSError:
                size = 0
            if size:
                client.received += size
                came += size
            else:
                client.ended = True
                self._epoll.unregister(fd)
        self.received += came
        return came

    def settle(self, quiet_s: float = 0.3, limit_s: float = 30) -> None:
        """Receive until nothing has come for a while."""
        end = time.monotonic() + limit_s
        last = time.monotonic()
        while time.monotonic() - last < quiet_s and time.monotonic() < end:
            if self.pump(quiet_s / 4):
                last = time.monotonic()

    def counted(self) -> list[Client]:
        """The sockets that a run is about."""
        return [client for client in self.clients if not client.skipped]

    def reset(self) -> None:
        """Forget what came, and choose the sample, spread over all sockets."""
        clients = self.counted()
        step = max(1, len(clients) // SAMPLES)
        for place, client in enumerate(clients):
            client.received = 0
            client.chunks = None
            if place % step == step // 2:
                client.chunks = []
                client.sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.received = 0

    # Running.

    def warm_up(self, send: Callable[[int], None], quiet_s: float = 0.3) -> None:
        """Deliver one event on each topic, to learn the size of a frame and that everybody hears.

        Tried three times: a subscription that is not confirmed may be late, and a peer's ring buffer may overflow while
        it tells everybody who has joined.

        Raises: LoadError: not everybody did, or not all frames are of one size.
        """
        clients = self.counted()
        for _ in range(3):
            self.settle(quiet_s)
            self.reset()
            for number in range(len(self.topics)):
                send(number)
            end = time.monotonic() + 5 + len(self.topics) / 5000
            while any(client.received == 0 for client in clients) and time.monotonic() < end:
                self.pump(0.1)
            self.settle()
            sizes = {client.received / len(client.topics) for client in clients}
            if len(sizes) == 1 and 0 not in sizes:
                self.frame_bytes = int(sizes.pop())
                return
        deaf = sum(client.received == 0 for client in clients)
        raise LoadError(f"the first event did not reach all alike: {deaf} of {len(clients)} sockets got nothing")

    def sender(
        self, publisher: Publisher, frame_bytes: int | None = None, command: bytes = b"PUBLISH"
    ) -> Callable[[int], None]:
        """A function that publishes the n-th event, on the topics in turn."""
        dialect, topics, send = self.dialect, self.topics, publisher.send
        size = payload_bytes(topics[0]) if frame_bytes is None else payload_bytes(topics[0], frame_bytes)
        count = len(topics)

        def publish(number: int) -> None:
            body = payload(number, time.time_ns(), size)
            send(publish_command(*dialect.publication(topics[number % count], body), command))

        return publish

    def run(
        self,
        send: Callable[[int], None],
        *,
        rate: float,
        seconds: float,
        beats: Beats | None = None,
        timed: bool = True,
        numbered: bool = True,
    ) -> Run:
        """Send ``rate`` events a second and receive them all.

        Args: send: sends the n-th event; see `sender`.
              timed: whether latency is looked at.
              numbered: whether frames carry their numbers in plain; else only their bytes are counted.
        """
        count = max(1, round(rate * seconds))
        return self._run(send, count=count, rate=rate, beats=beats, timed=timed, numbered=numbered)

    def run_itself(self, start: Callable[[float, int], None], *, rate: float, seconds: float) -> Run:
        """As `run`, of a server with its own timer: the floor."""
        count = max(1, round(rate * seconds))
        return self._run(None, count=count, rate=rate, start=lambda: start(rate, count))

    def saturate(self, send: Callable[[int], None], *, seconds: float, outstanding: int) -> Run:
        """Send as many events as are delivered, for a while, with at most ``outstanding`` under way."""
        return self._run(send, count=None, seconds=seconds, outstanding=outstanding, timed=False)

    def _run(
        self,
        send: Callable[[int], None] | None,
        *,
        count: int | None,
        rate: float = 0.0,
        seconds: float = 0.0,
        outstanding: int = 0,
        beats: Beats | None = None,
        start: Callable[[], None] | None = None,
        timed: bool = True,
        numbered: bool = True,
    ) -> Run:
        clients = self.counted()
        each = sum(len(client.topics) for client in clients) / len(self.topics) * self.frame_bytes
        self.settle(0.05)
        self.reset()
        if beats is not None:
            for client in beats.clients:
                client.chunks, client.received = [], 0
        cpu, own, began = self.cpu_s(), time.process_time(), time.perf_counter()
        if start is not None:
            start()
        sent = 0
        beaten = 0
        planned = (count or 0) / rate if rate else seconds
        give_up = began + planned * 2 + 20
        beat_bytes = 0
        while True:
            now = time.perf_counter()
            if beats is not None and now >= began + beaten * beats.interval_s and now < began + planned:
                client = beats.clients[beaten % len(beats.clients)]
                beats.sent[beaten] = time.time_ns()
                client.sock.send(heartbeat_frame(beaten))
                beaten += 1
            if send is None:
                wait = 0.1
                if self.received >= (count or 0) * each:
                    break
            elif count is None:
                if now - began >= seconds:
                    if self.received >= sent * each:
                        break
                    wait = 0.05
                else:
                    room = outstanding - sent + int(self.received / each)
                    for _ in range(min(room, 64)):
                        send(sent)
                        sent += 1
                    wait = 0.0 if room > 64 else 0.05
            elif sent < count:
                wait = began + sent / rate - now
                if wait <= 0:
                    send(sent)
                    sent += 1
                    wait = 0.0
            else:
                wait = 0.05
                if beats is not None:
                    beat_bytes = sum(client.received for client in beats.clients)
                if self.received - beat_bytes >= sent * each and (beats is None or now >= began + planned + 0.2):
                    break
            if beats is not None:
                wait = min(wait, beats.interval_s / 2)
            self.pump(min(wait, 0.1))
            if now > give_up:
                break
        wall = time.perf_counter() - began
        run = Run(
            events=sent if send is not None else (count or 0),
            deliveries=0,
            delivered=0,
            wall_s=wall,
            server_cpu_s=self.cpu_s() - cpu,
            load_cpu_s=time.process_time() - own,
            frame_bytes=self.frame_bytes,
        )
        self.settle(0.1)  # a frame too many would come now
        self._verify(run, clients, timed, numbered)
        return run

    def _verify(self, run: Run, clients: Sequence[Client], timed: bool, numbered: bool) -> None:
        topics = len(self.topics)
        wrong = 0
        for client in clients:
            expected = sum(len(range(place, run.events, topics)) for place in client.topics)
            run.deliveries += expected
            run.delivered += client.received // self.frame_bytes
            wrong += client.received != expected * self.frame_bytes
            if numbered and client.chunks is not None:
                fault = self._verify_sample(run, client, timed)
                if fault:
                    run.faults.append(fault)
        if wrong:
            lost = run.deliveries - run.delivered
            run.faults.append(f"{wrong} of {len(clients)} sockets did not get every frame once; {lost} frames short")
        ended = sum(client.ended for client in clients)
        if ended:
            run.faults.append(f"{ended} sockets were closed")

    def _verify_sample(self, run: Run, client: Client, timed: bool) -> str | None:
        chunks = client.chunks or []
        found = [(int(number), int(made)) for number, made in _EVENT.findall(b"".join(data for data, _ in chunks))]
        expected = sorted(chain.from_iterable(range(place, run.events, len(self.topics)) for place in client.topics))
        if [number for number, _ in found] != expected:
            return "a sampled socket did not get every frame in order"
        if timed:
            # Of several frames read at once only the last one's arrival is known: for the others that is at most.
            begin = end = 0
            for data, stamp in chunks:
                end += len(data)
                frames = range(begin // self.frame_bytes, end // self.frame_bytes)
                run.latencies += [(stamp - found[number][1]) / 1e6 for number in frames]
                begin = end
        return None

    # Heartbeats.

    def heartbeats(self, sockets: int = SAMPLES, interval_s: float = 0.01) -> Beats:
        """Sockets of their own that ask for life signs, 100 a second together, while a run goes on."""
        clients = [self._connect((), None) for _ in range(sockets)]
        for client in clients:
            client.skipped = True
            client.sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        end = time.monotonic() + 20
        while any(client.steps for client in clients) and time.monotonic() < end:
            self.pump(0.1)
        self.clients += clients
        return Beats(clients, interval_s, {})


def heartbeat_latencies(beats: Beats) -> list[float]:
    """Milliseconds from each heartbeat to the arrival of its reply; unanswered ones are infinite."""
    arrived = {
        int(ref): stamp
        for client in beats.clients
        for data, stamp in client.chunks or []
        for ref in _REPLY_TO.findall(data)
    }
    return [(arrived[ref] - sent) / 1e6 if ref in arrived else float("inf") for ref, sent in beats.sent.items()]


def numbers(client: Client) -> list[int]:
    """The numbers of the events that a socket with kept bytes has got, in their order."""
    return [int(number) for number, _ in _EVENT.findall(b"".join(data for data, _ in client.chunks or []))]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which ``share`` of them lie; None where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def _stamp(control: list[tuple[int, int, bytes]]) -> int:
    """Nanoseconds of the wall clock at which the kernel took what was read."""
    for _, kind, data in control:
        if kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return time.time_ns()


class PushLoad:
    """Sockets that push, each again as soon as the last push is answered."""

    def __init__(self, group: Group, pushes: int, size: int = 150) -> None:
        self._left = pushes
        self.answered = 0
        self.refused = 0
        self._body = b'{"x":"' + b"y" * size + b'"}'
        self._group = group
        self._next = {id(client): 2 for client in group.clients}
        self.out_of_order = 0
        for client in group.clients:
            client.on_data = self._answer(client)

    def _answer(self, client: Client) -> Callable[[bytes], None]:
        def on_data(data: bytes) -> None:
            client.tail += data
            if not client.tail.endswith(b"}]"):
                return
            replies, client.tail = client.tail.count(b'"phx_reply"'), b""
            self.answered += replies
            self.refused += data.count(b'"status":"error"')
            # One push is under way at a time, so the reply must be the last push's.
            if b'"%d"' % (self._next[id(client)] - 1) not in data:
                self.out_of_order += 1
            self._push(client)

        return on_data

    def _push(self, client: Client) -> None:
        if self._left:
            self._left -= 1
            ref = self._next[id(client)]
            self._next[id(client)] = ref + 1
            topic = self._group.topics[client.topics[0]]
            client.sock.send(push_frame(ref, topic, "shout", self._body))

    def run(self, pushes: int, limit_s: float = 60) -> None:
        """Push and wait for all answers."""
        end = time.monotonic() + limit_s
        for client in self._group.clients:
            self._push(client)
        while self.answered < pushes and time.monotonic() < end:
            self._group.pump(0.1)
