"""A long-polling client that says exactly what it is told, and shows each answer."""

import asyncio
import itertools
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2 as httpx

from tests.support.patience import PATIENCE

DEADLINE_S = 20.0 * PATIENCE

Answer = dict[str, Any]


class Poller:
    """One session. Its join_refs and refs start apart, as those of `tests.support.client.Client`."""

    def __init__(self, http: httpx.AsyncClient, paths: list[str], query: dict[str, str]) -> None:
        self.http = http
        self.paths = paths
        """Where it may ask; each request goes to the next of them."""
        self.query = query
        self.token = ""
        self.last: Answer = {}
        """The last answer to a poll."""
        self._messages: deque[Any] = deque()
        self._refs = itertools.count(7)
        self._join_refs = itertools.count(100)

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, *bases: str, headers: dict[str, str] | None = None, opens: bool = True, **query: str
    ) -> AsyncIterator["Poller"]:
        """A client of the sockets at ``bases``, as `Served.ws` has it. Each request has a connection of its own.

        Args: opens: whether a session is opened, which has to succeed.
        """
        paths = [base.replace("ws://", "http://", 1) + "/longpoll" for base in bases]
        apart = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(trust_env=False, headers=headers, timeout=DEADLINE_S, limits=apart) as http:
            self = cls(http, paths, {"vsn": "2.0.0", **query})
            if opens:
                answer = await self.open()
                assert answer["status"] == 410, answer
            yield self

    @property
    def path(self) -> str:
        """Where the next request goes."""
        return self.paths[0]

    async def ask(self, method: str, body: str | bytes = b"", headers: dict[str, str] | None = None) -> httpx.Response:
        """Make one request, with the token of the session where there is one."""
        # As phoenix.js does it: the session's token follows the other parameters, one of which may have its name.
        query = httpx.QueryParams([*self.query.items(), *([("token", self.token)] if self.token else [])])
        path = self.path
        self.paths.append(self.paths.pop(0))
        return await self.http.request(method, path, params=query, content=body, headers=headers)

    async def open(self) -> Answer:
        """Ask for a session."""
        self.token = ""
        answer: Answer = (await self.ask("GET")).json()
        self.token = str(answer.get("token", ""))
        return answer

    async def poll(self) -> Answer:
        """Poll once."""
        self.last = (await self.ask("GET")).json()
        return self.last

    async def post(self, *lines: str, kind: str = "application/x-ndjson") -> Answer:
        """Post frames, one a line."""
        answer: Answer = (await self.ask("POST", "\n".join(lines), {"Content-Type": kind})).json()
        return answer

    async def send(self, *message: Any) -> None:
        """Post one message, which has to be taken."""
        answer = await self.post(json.dumps(message))
        assert answer == {"status": 200}, answer

    async def receive(self) -> Any:
        """The next message, of this poll or a later one."""
        async with asyncio.timeout(DEADLINE_S):
            while not self._messages:
                answer = await self.poll()
                assert answer["status"] in (200, 204), answer
                self._messages.extend(map(json.loads, answer["messages"]))
        return self._messages.popleft()

    async def join(self, topic: str, params: Any = None) -> str:
        """Join, expect the ok reply next, and return the join_ref."""
        join_ref, ref = str(next(self._join_refs)), str(next(self._refs))
        await self.send(join_ref, ref, topic, "phx_join", params or {})
        reply = await self.receive()
        assert reply[:4] == [join_ref, ref, topic, "phx_reply"] and reply[4]["status"] == "ok", reply
        return join_ref

    async def push(self, join_ref: str, topic: str, event: str, payload: Any) -> Any:
        """Push, expect its reply next, and return that reply's payload."""
        ref = str(next(self._refs))
        await self.send(join_ref, ref, topic, event, payload)
        reply = await self.receive()
        assert reply[:4] == [join_ref, ref, topic, "phx_reply"], reply
        return reply[4]

    @property
    def socket_id(self) -> str:
        """The id of its socket, at the node."""
        return self.token.split(".")[1]

    async def expect_alive(self) -> None:
        """The next message is the answer to a heartbeat."""
        ref = str(next(self._refs))
        await self.send(None, ref, "phoenix", "heartbeat", {})
        assert await self.receive() == [None, ref, "phoenix", "phx_reply", {"status": "ok", "response": {}}]

    async def expect_event(self, topic: str, event: str, payload: Any) -> None:
        """The next message is this broadcast."""
        assert await self.receive() == [None, None, topic, event, payload]

    async def expect_gone(self, reason: str | None = None) -> None:
        """The session has ended, or ends once its client has had what waits: 500 for a poll, 410 for a post."""
        while (answer := await self.poll())["status"] == 200:
            self._messages.extend(map(json.loads, answer["messages"]))
        assert answer["status"] == 500
        assert reason is None or answer["reason"] == reason, answer
        assert (await self.post("[]"))["status"] == 410
