"""`relay.channels.long_poll_nodes`: requests between two nodes, over a bus that the test controls."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import msgspec

from relay.auth.sealing import Sealer
from relay.channels.long_poll import Answer, LocalSessions, Polled, SessionId
from relay.channels.long_poll_nodes import NodeSessions
from relay.config import Config
from relay.errors import BusUnavailable
from relay.log import RateLimitedLoggers
from relay.metrics import Metrics
from relay.telemetry import Telemetry
from tests.support.asgi import until

SESSION = SessionId("owner", "s-1")
FOUND = Answer(200, b'["[1]"]')


class Local:
    """Sessions of a node, as the test says what they answer."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()
        self.ended: list[bool] = []
        self.posts: list[tuple[bytes, bool]] = []
        self.lost: list[SessionId] = []
        self.unknown = 0
        self.gone = 0
        self.may_post = asyncio.Event()
        self.may_post.set()

    async def poll(self, session: SessionId, gone: asyncio.Future[None], max_bytes: int) -> Polled | None:
        getting = asyncio.ensure_future(self.answers.get())
        await asyncio.wait((getting, gone), return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            getting.cancel()
            self.gone += 1
            return None
        return Polled(getting.result(), self.ended.append)

    async def post(self, session: SessionId, body: bytes, *, is_ndjson: bool) -> Answer:
        self.posts.append((body, is_ndjson))
        await self.may_post.wait()
        return Answer(200)

    @contextmanager
    def unconfirmed(self, session: SessionId) -> Iterator[None]:
        self.unknown += 1
        yield
        self.unknown -= 1

    def lose(self, session: SessionId) -> None:
        self.lost.append(session)


class Nodes:
    """Two nodes and their bus."""

    def __init__(self, **settings: Any) -> None:
        self.config = Config(broadcast_url="memory://", **settings)
        self.fault: Exception | None = None
        self.keeps: Callable[[str], bool] = lambda node: True
        self.receivers: dict[str, NodeSessions] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.metrics = Metrics()
        self.local, self.sessions = {}, self.receivers
        for name in ("owner", "other"):
            self.local[name] = local = Local(self.config)
            telemetry = Telemetry(self.metrics, RateLimitedLoggers(), None)
            sealer, spawn = Sealer(b"k" * 32), self.spawn
            self.receivers[name] = NodeSessions(name, self, sealer, cast(LocalSessions, local), telemetry, spawn)

    @property
    def owner(self) -> Local:
        return self.local["owner"]

    @property
    def other(self) -> NodeSessions:
        return self.sessions["other"]

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def publish_to_node(self, node: str, data: bytes) -> asyncio.Future[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        receiver = self.receivers.get(node)
        if self.fault is not None:
            future.set_exception(self.fault)
        else:
            future.set_result(int(receiver is not None))
            if receiver is not None and self.keeps(node):
                receiver.receive(data)
        return future

    def gone(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()


@asynccontextmanager
async def nodes(**settings: Any) -> AsyncIterator[Nodes]:
    found = Nodes(**settings)
    yield found
    await until(lambda: not found.tasks)
    assert not found.other._pending and not found.sessions["owner"]._polls


async def test_poll_is_answered_by_the_owner_and_confirmed() -> None:
    async with nodes() as n:
        n.owner.answers.put_nowait(FOUND)
        polled = await n.other.poll(SESSION, n.gone())
        assert polled is not None and polled.answer == FOUND
        assert (n.owner.ended, n.owner.unknown) == ([], 1)
        polled.end(True)
        await until(lambda: n.owner.ended == [True])
        assert n.owner.unknown == 0


async def test_answer_that_was_not_sent_goes_back() -> None:
    async with nodes() as n:
        n.owner.answers.put_nowait(FOUND)
        polled = await n.other.poll(SESSION, n.gone())
        assert polled is not None
        polled.end(False)
        await until(lambda: n.owner.ended == [False])


async def test_empty_answer_needs_no_confirmation() -> None:
    async with nodes() as n:
        n.owner.answers.put_nowait(Answer(204))
        polled = await n.other.poll(SESSION, n.gone())
        assert polled is not None and polled.answer == Answer(204)
        polled.end(True)
        assert n.owner.unknown == 0


async def test_client_that_has_gone_ends_the_poll_at_the_owner() -> None:
    async with nodes() as n:
        gone = n.gone()
        poll = asyncio.ensure_future(n.other.poll(SESSION, gone))
        await until(lambda: n.sessions["owner"]._polls)
        gone.set_result(None)
        assert await poll is None
        await until(lambda: n.owner.gone == 1)


async def test_answer_for_a_node_that_has_ended_goes_back() -> None:
    async with nodes() as n:
        poll = asyncio.ensure_future(n.other.poll(SESSION, n.gone()))
        await until(lambda: n.sessions["owner"]._polls)
        other = n.receivers.pop("other")
        n.owner.answers.put_nowait(FOUND)
        await until(lambda: n.owner.ended == [False])
        n.receivers["other"] = other
        other.fail_all()
        found = await poll
        assert found is not None and found.answer.status == 500


async def test_session_is_lost_where_no_confirmation_comes() -> None:
    async with nodes(redis={"timeout_s": 0.02}) as n:
        n.owner.answers.put_nowait(FOUND)
        await n.other.poll(SESSION, n.gone())
        await until(lambda: n.owner.lost == [SESSION])
        assert n.owner.ended == []


async def test_node_that_does_not_exist_is_answered_at_once() -> None:
    async with nodes() as n:
        for session in (SessionId("nowhere", "s-1"),):
            polled = await n.other.poll(session, n.gone())
            assert polled is not None and polled.answer.status == 500
            assert (await n.other.post(session, b"[]", is_ndjson=True)).status == 410


async def test_bus_that_is_away_is_answered_at_once() -> None:
    async with nodes() as n:
        n.fault = BusUnavailable("away")
        polled = await n.other.poll(SESSION, n.gone())
        assert polled is not None and polled.answer.status == 500
        assert (await n.other.post(SESSION, b"[]", is_ndjson=True)).status == 410


async def test_node_that_does_not_answer_is_given_up() -> None:
    async with nodes(limits={"longpoll_window_s": 0.01}) as n:
        n.keeps = lambda node: False
        polled = await n.other.poll(SESSION, n.gone())
        assert polled is not None and polled.answer.status == 500
        assert (await n.other.post(SESSION, b"[]", is_ndjson=True)).status == 408
        assert n.metrics.refused["longpoll: no answer"] == 2


async def test_post_is_read_by_the_owner() -> None:
    async with nodes() as n:
        assert await n.other.post(SESSION, b"\xff", is_ndjson=True) == Answer(200)
        assert n.owner.posts == [(b"\xff", True)]


class Late:
    """A node that does not read yet what has come for it."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def receive(self, data: bytes) -> None:
        self.messages.append(data)


async def test_posts_of_too_many_bytes_wait_until_those_before_have_been_taken() -> None:
    async with nodes(limits={"body_max_bytes": 100}) as n:
        n.owner.may_post.clear()
        owner, late = n.receivers["owner"], Late()
        n.receivers["owner"] = cast(NodeSessions, late)
        posts = [asyncio.ensure_future(n.other.post(SESSION, b"x" * 60, is_ndjson=False)) for _ in range(3)]
        for number in range(3):
            while len(late.messages) <= number:  # noqa: ASYNC110 - the bus of the test
                await asyncio.sleep(0)
            assert len(late.messages) == number + 1, "Redis would hold the others too"
            owner.receive(late.messages[number])
        await until(lambda: len(n.owner.posts) == 3)
        n.owner.may_post.set()
        assert await asyncio.gather(*posts) == [Answer(200)] * 3
        assert not n.other._taken
        n.receivers["owner"] = owner


async def test_posts_that_take_long_to_read_hold_up_no_others() -> None:
    async with nodes() as n:
        n.owner.may_post.clear()
        slow = [asyncio.ensure_future(n.other.post(SESSION, b"slow", is_ndjson=False)) for _ in range(200)]
        await until(lambda: len(n.owner.posts) == 200)
        n.owner.may_post = asyncio.Event()
        n.owner.may_post.set()
        assert await n.other.post(SESSION, b"quick", is_ndjson=False) == Answer(200)
        for post in slow:
            post.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert not n.other._taken
        for task in tuple(n.tasks):
            task.cancel()


async def test_post_of_an_older_node_is_answered_alone() -> None:
    """It would take what it does not know for a message of a stranger."""
    async with nodes() as n:
        other, late = n.other, Late()
        n.receivers["other"] = cast(NodeSessions, late)
        post = {"type": "post", "number": 7, "sender": "other", "session": SESSION.id, "body": b"x", "is_ndjson": False}
        n.receivers["owner"].receive(Sealer(b"k" * 32).seal(msgspec.msgpack.encode(post), "owner"))
        await until(lambda: not n.tasks)
        (answer,) = late.messages
        data = Sealer(b"k" * 32).open(answer, "other")
        assert data is not None and msgspec.msgpack.decode(data)["type"] == "answer"
        n.receivers["other"] = other


async def test_message_that_cannot_be_read_is_counted() -> None:
    async with nodes() as n:
        for data in (b"", b"nonsense", Sealer(b"k" * 32).seal(b"no message", "owner")):
            n.sessions["owner"].receive(data)
        assert n.metrics.refused == {"longpoll: message not understood": 3}
