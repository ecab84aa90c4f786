"""Nonsense for the decoder, the protocol and the HTTP side, for a set time: ``make fuzz``; a few seconds in a test run.

What ever failed stays as a vector in ``tests/vectors/nonsense.json`` and is fed first. The time for each target is
``TESTS_FUZZ_S``, in seconds.
"""

import asyncio
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.errors import WireError
from relay.protocol.frame import Frame
from relay.protocol.payload import Payload, classify_payload
from relay.protocol.serializer import Version, decode, encode_broadcast
from relay.protocol.state import ChannelsProtocol, Join, Leave, Push, Send, Subscription
from relay.protocol.topics import from_redis_channel
from tests.support.client import BINARY, TEXT, Client, RawSocket, client_frame
from tests.support.patience import PATIENCE
from tests.support.serving import Served

FUZZ_S = float(os.environ.get("TESTS_FUZZ_S", "2"))
PORTION = 100
VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "vectors" / "nonsense.json").read_text("utf-8"))


@pytest.fixture
def direct() -> bool:
    """Our own protocol class: it is what faces the internet."""
    return True


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No nonsense is worth more than a warning, or a traceback."""
    yield
    loud = [record for record in caplog.get_records("call") if record.levelno > logging.WARNING or record.exc_info]
    assert not loud, [(record.name, record.getMessage()) for record in loud]


def vectors(kind: str) -> list[str | bytes]:
    found: list[str | bytes] = []
    for vector in VECTORS:
        if vector["for"] == kind:
            repeat = vector.get("repeat")
            text = vector.get("text") if repeat is None else repeat[0] * repeat[1]
            found.append(text if text is not None else bytes.fromhex(vector["hex"]))
    assert found
    return found


def feed(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], first: list[Any]) -> None:
    """Call ``check`` with the vectors, then with what the strategy makes, until the time is over."""
    fed = 0

    def count(value: Any) -> None:
        nonlocal fed
        fed += 1
        check(value)

    @settings(max_examples=PORTION, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def portion(value: Any) -> None:
        count(value)

    for value in first:
        count(value)
    end = time.monotonic() + FUZZ_S
    while time.monotonic() < end:
        portion()
    sys.stdout.write(f"{fed} inputs in {FUZZ_S:g} s\n")
    assert fed >= len(first) + PORTION


HALF_PAIR = re.compile("[\ud800-\udfff]")

# What to feed.

texts = st.text(st.characters(exclude_categories=["Cs"]))
names = st.one_of(st.sampled_from(["phoenix", "heartbeat", "phx_join", "phx_leave", "phx_reply", "room:1"]), texts)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.sampled_from(["\ud83d", "\udc00x"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
refs = st.one_of(st.none(), texts, st.integers())
messages_v2 = st.one_of(
    st.tuples(refs, refs, names, names, values).map(list), st.lists(st.one_of(names, values), max_size=7)
)
messages_v1 = st.fixed_dictionaries(
    {}, optional={"topic": names, "event": names, "payload": values, "ref": refs, "join_ref": refs, "x": values}
)


@st.composite
def bent(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few places cut out, doubled or overwritten."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(data)))
        end = min(len(data), place + draw(st.integers(0, 8)))
        data[place:end] = draw(st.one_of(st.binary(max_size=8), st.just(bytes(data[place:end]) * 2)))
    return bytes(data)


json_frames = st.one_of(messages_v2, messages_v1).map(json.dumps)
binary_pushes = st.tuples(*[st.binary(max_size=20)] * 4, st.binary(max_size=50)).map(
    lambda parts: bytes((0, *(len(part) for part in parts[:4]))) + b"".join(parts)
)
frames: st.SearchStrategy[str | bytes] = st.one_of(
    json_frames,
    bent(json_frames.map(str.encode)).map(lambda data: data.decode(errors="replace")),
    binary_pushes,
    bent(binary_pushes),
    bent(json_frames.map(str.encode)),
)


# The decoder and the protocol, by themselves.


def check_frame(frame: Frame, version: Version) -> None:
    """What goes to a client must be what its version speaks."""
    if frame.is_text:
        message = json.loads(frame.text)
        assert len(message) == 5 if version is Version.V2 else {"topic", "event", "payload", "ref"} <= message.keys()
    else:
        assert version is Version.V2 and frame.data[0] in (0, 1, 2)


@pytest.mark.parametrize("version", [Version.V1, Version.V2])
def test_decoder_and_protocol_survive_any_frames(version: Version) -> None:
    """A message, or a WireError that says why; and whatever a socket says, its answers are well formed."""
    protocol = ChannelsProtocol(Subscription, version, topics_max=3, payload_max_bytes=50)
    turn = 0

    def check(frame: str | bytes) -> None:
        nonlocal protocol, turn
        turn += 1
        if turn % 50 == 0:
            protocol = ChannelsProtocol(Subscription, version, topics_max=3, payload_max_bytes=50)
        try:
            message = decode(frame, version)
        except WireError as error:
            assert 0 < len(str(error).encode()) <= 123
            return
        if version is Version.V2 and isinstance(frame, str):
            told = [HALF_PAIR.sub("\ufffd", name) if isinstance(name, str) else name for name in json.loads(frame)[:4]]
            assert [message.join_ref, message.ref, message.topic, message.event] == told
        action = protocol.receive(message)
        answers: list[Frame | None] = []
        if isinstance(action, Send):
            answers = [action.frame]
        elif isinstance(action, Join):
            answers = list(protocol.accept(action) if turn % 3 else protocol.refuse(action, classify_payload(b"{}")))
        elif isinstance(action, Leave):
            answers = list(protocol.leave(action))
        elif isinstance(action, Push):
            answers = [protocol.reply(action, "ok", action.payload)]
        for answer in answers:
            if answer is not None:
                check_frame(answer, version)

    feed(frames, check, vectors("frame"))


def test_whatever_is_published_reaches_the_client_as_it_is() -> None:
    """JSON stays JSON and anything else stays its bytes; no payload breaks the frame around it."""

    def check(data: bytes | str) -> None:
        payload: Payload = classify_payload(data if isinstance(data, bytes) else data.encode())
        raw = bytes(payload)
        frame = encode_broadcast(Version.V2, "room:1", "tick", payload)
        if frame.is_text:
            assert frame.data == b'[null,null,"room:1","tick",' + raw + b"]"
            assert len(json.loads(frame.text)) == 5
        else:
            assert frame.data == b"\x02\x06\x04room:1tick" + raw
        assert json.loads(encode_broadcast(Version.V1, "room:1", "tick", payload).text)["topic"] == "room:1"
        _ = from_redis_channel(b"to:", raw)

    payloads = st.one_of(
        st.binary(), values.map(json.dumps).map(str.encode), bent(values.map(json.dumps).map(str.encode))
    )
    feed(payloads, check, vectors("payload"))


# The server, over its socket.

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = (
    b"GET /socket/websocket?vsn=2.0.0 HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nUpgrade: websocket\r\n"
    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: phoenix\r\n"
    b"Sec-WebSocket-Key: " + KEY + b"\r\n\r\n"
)
PUBLISH = b'{"topic":"room:1","event":"tick","payload":{}}'
REQUESTS = [
    UPGRADE,
    b"GET /api/topics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /api/publish HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(PUBLISH), PUBLISH),
]


async def speak(port: int, data: bytes) -> bytes:
    """Send bytes and no more; returns the first of what comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(10 * PATIENCE):
            return await reader.read(200)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.usefixtures("quiet")
def test_http_side_survives_any_requests(runner: asyncio.Runner, served: Served) -> None:
    """A status, or an end; never a 500, and the next request is answered."""

    def check(data: bytes | str) -> None:
        answer = runner.run(speak(served.port, data if isinstance(data, bytes) else data.encode()))
        assert answer == b"" or answer.startswith(b"HTTP/1.1 "), answer
        assert not answer.startswith(b"HTTP/1.1 5"), answer

    feed(bent(st.sampled_from(REQUESTS)), check, vectors("http"))
    assert runner.run(speak(served.port, REQUESTS[1])).startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("quiet")
def test_socket_survives_any_frames_and_no_other_notices(runner: asyncio.Runner, served: Served) -> None:
    """An answer or a close; a bystander on the same topic gets each event of the meanwhile, and nothing else."""
    chunk = st.one_of(
        frames.map(lambda f: client_frame(TEXT, f.encode()) if isinstance(f, str) else client_frame(BINARY, f)),
        bent(json_frames.map(lambda text: client_frame(TEXT, text.encode()))),
        st.builds(client_frame, st.integers(0, 15), st.binary(max_size=130)),
    )

    stack, numbers = AsyncExitStack(), itertools.count()
    bystander: Client = runner.run(stack.enter_async_context(Client.connect(served.ws)))
    runner.run(bystander.join("room:1"))

    async def say(chunks: list[bytes]) -> None:
        async with RawSocket.connect(served.ws) as client:
            try:
                await client.send_frame(TEXT, b'["1","1","room:1","phx_join",{}]')
                for data in chunks:
                    await client.send_bytes(data)
                await client.read_frame()
            except (OSError, EOFError):
                pass
            await bystander_is_well()
            client.reset()

    async def bystander_is_well() -> None:
        number = next(numbers)
        await served.relay.broadcast("room:1", "tick", number)
        async with asyncio.timeout(5 * PATIENCE):
            await bystander.expect_event("room:1", "tick", number)

    try:
        feed(st.lists(chunk, max_size=5), lambda chunks: runner.run(say(chunks)), [])
        runner.run(bystander_is_well())
    finally:
        runner.run(stack.aclose())
    assert not any(topic.startswith("\x00") for topic in served.relay.topics)
