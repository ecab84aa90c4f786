"""One topic, joined over one socket, and joined again whenever it was lost."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from relay_client.errors import ClientError, JoinError, PushError
from relay_client.events import REJOINED, Event, EventQueue, Lost, Recovered
from relay_client.link import Fresh, Link, log, value_of
from relay_client.position import Tracker
from relay_client.presence import EVENTS as PRESENCE_EVENTS
from relay_client.presence import Presence
from relay_client.wire import Message, check_text, encode_payload

NOT_UNDERSTOOD = "frame not understood"
"""Why an event is missing that Python cannot read."""

LEAVE_TIMEOUT_S = 1.0
"""Seconds for sending a leave; its reply is not awaited."""


class Channel:
    """One topic: ``async with`` joins and leaves it, ``async for`` receives its events, `push` sends one.

    Created by `Socket.join`, to be entered once. Two loops over one channel share its events.

    Attributes: topic: name of the topic.
                response: the server's response to the last join.
    """

    def __init__(
        self,
        link: Link,
        channels: dict[str, "Channel"],
        topic: str,
        params: Fresh[Mapping[str, Any]],
        *,
        queue: EventQueue,
        tracker: Tracker | None,
        presence: Presence | None,
        timeout_s: float,
        rejoin_s: Callable[[int], float],
    ) -> None:
        self.topic = topic
        self.response: Any = None
        self._link = link
        self._channels = channels  # the socket's, by topic
        self._params = params
        self._queue = queue
        self._tracker = tracker  # of its position in the topic's history; None if it does not recover events
        self._presence = presence  # None if its events are for the loop
        self._timeout_s = timeout_s
        self._rejoin_s = rejoin_s
        self._join_ref: str | None = None
        self._is_over = False
        self._joined = asyncio.Event()  # or over
        self._lost = asyncio.Event()  # since the last join
        self._lost_to = ""
        self._rejoins_at_once = False
        self._answer: asyncio.Future[None] | None = None  # to the first join
        self._task: asyncio.Task[None] | None = None

    @property
    def is_joined(self) -> bool:
        """Whether the topic is joined, so that events arrive."""
        return self._joined.is_set() and not self._is_over

    @property
    def dropped(self) -> int:
        """Number of events that the queue has dropped."""
        return self._queue.dropped

    @property
    def presence(self) -> Presence:
        """The members of the topic. Raises RuntimeError if the topic was joined without ``presence``."""
        if self._presence is None:
            raise RuntimeError(f"{self.topic!r} was joined without presence; expected presence={{}} there")
        return self._presence

    async def __aenter__(self) -> Self:
        """Join. Raises JoinError where the server refuses, or does not answer in time, and what the params raise."""
        if self._link.is_over:
            raise JoinError(self.topic, "phx_join", "closed")
        if self._task is not None or self.topic in self._channels:
            raise RuntimeError(f"{self.topic!r} is joined already")
        self._channels[self.topic] = self
        self._answer = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(self._answer))
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._answer
        except TimeoutError:
            await self._leave()
            raise JoinError(self.topic, "phx_join", "timeout") from None
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave; events that wait in the queue can still be had."""
        await self._leave()

    async def push(self, event: str, payload: Any = None, *, timeout_s: float | None = None, reply: bool = True) -> Any:
        """Send an event, and return the response of its ``ok`` reply.

        If the topic is being rejoined, the push waits for that.

        Args:   payload: a JSON-serializable value, or bytes; ``{}`` by default.
                timeout_s: seconds for the whole push; by default those of the socket.
                reply: False sends the push without requesting a reply; the call returns None once it is sent.
        Raises: PushError: the server refused the push, or did not answer in time; contains the reason.
                ValueError, TypeError: a payload that cannot be sent; raised at once, without effect on the connection.
        """
        _ = check_text("event", event)
        data = encode_payload({} if payload is None else payload)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await self._joined.wait()
                if self._is_over:
                    raise PushError(self.topic, event, "closed")
                ref = self._link.next_ref() if reply else None
                message = Message(self._join_ref, ref, self.topic, event, data)
                return await (self._link.ask(message, timeout_s) if reply else self._link.tell(message))
        except TimeoutError:
            raise PushError(self.topic, event, "timeout") from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Return the next event. The loop ends when the topic is left, closed by the server, or with QueueOverflow."""
        if self._queue.is_behind and self._queue.is_empty:
            self._catch_up()
        return await self._queue.get()

    def receive(self, message: Message) -> None:
        """Take a message of this topic; called by the socket."""
        if message.join_ref is not None and message.join_ref != self._join_ref:
            return  # meant for an earlier join
        if message.event == "phx_reply":
            # At once: what follows in the same packet belongs to this join.
            if message.ref is not None and message.ref == self._join_ref and message.payload["status"] == "ok":
                self._enter(message.payload["response"])
        elif message.event == "phx_close":
            self.end()
        elif message.event == "phx_error":
            reason = message.payload.get("reason") if isinstance(message.payload, dict) else None
            self.lose(str(reason or "phx_error"))
        elif self.is_joined and self._presence is not None and message.event in PRESENCE_EVENTS:
            self._presence.receive(message.event, message.payload)
        elif self.is_joined:
            event = Event(message.topic, message.event, message.payload, message.ref)
            if self._tracker is None:
                self._queue.put(event)
            else:
                self._tracker.receive(event)

    @property
    def recovers(self) -> bool:
        """Whether missed events are recovered from the topic's history."""
        return self._tracker is not None

    def miss(self) -> None:
        """Report an event that came and was not understood; called by the socket.

        To rejoin would not help: the history has the same event.
        """
        if not self.is_joined:
            return
        position = None
        if self._tracker is not None:
            self._tracker.flush()
            position = self._tracker.position
        payload = {"reason": NOT_UNDERSTOOD, "response": {"reason": NOT_UNDERSTOOD}}
        self._queue.put(Lost(self.topic, REJOINED, payload, position=position))

    def lose(self, why: str) -> None:
        """Join again: events may be missed from now on. Called by the socket."""
        if self.is_joined:
            self._joined.clear()
            if self._tracker is not None:
                self._tracker.forget()
            self._lost_to = why
            self._lost.set()

    def _catch_up(self) -> None:
        """Join again, to be given from the history what was not queued."""
        if self.is_joined:
            self._rejoins_at_once = True
            self.lose("the loop was too slow")

    def end(self, error: BaseException | None = None) -> None:
        """Let the loop end after what waits in its queue, with ``error`` or without. Called by the socket."""
        if self._is_over:
            return
        self._is_over = True
        self._joined.set()
        if self._tracker is not None:
            self._tracker.flush()
        self._queue.end(error)
        if self._presence is not None:
            self._presence.end()
        self._link.fail("closed", self.topic)
        if self._channels.get(self.topic) is self:
            del self._channels[self.topic]
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or JoinError(self.topic, "phx_join", "closed"))
        if self._task is not None:
            self._task.cancel()

    def _enter(self, response: Any) -> None:
        self.response = response
        payload = {"reason": self._lost_to or "joined", "response": response}
        if self._tracker is not None:
            self._queue.is_behind = False
            had_position = self._tracker.position is not None
            is_recovered = self._tracker.enter(response)
            if self._lost_to or had_position:
                mark = Recovered if is_recovered else Lost
                self._queue.put(mark(self.topic, REJOINED, payload, position=self._tracker.position))
        elif self._lost_to:
            self._queue.put(Event(self.topic, REJOINED, payload))
        if self._presence is not None:
            self._presence.enter()
        self._joined.set()

    async def _run(self, answer: asyncio.Future[None]) -> None:
        try:
            await self._keep_joined(answer)
        except Exception as error:  # of our own, or of `rejoin_s`
            self.end(error)

    async def _keep_joined(self, answer: asyncio.Future[None]) -> None:
        tries = 0
        while True:
            await self._link.opened()
            self._lost.clear()
            try:
                await self._join()
            except Exception as error:  # params are anybody's code
                self._join_ref = None
                if isinstance(error, PushError) and error.status == "disconnected":
                    await asyncio.sleep(0)  # the socket may not have seen it yet, and must have its turn
                    continue
                if not answer.done():
                    answer.set_exception(error)
                    return
                log.warning("not joined again: %s", error if isinstance(error, ClientError) else repr(error))
            else:
                tries = 0
                if not answer.done():
                    answer.set_result(None)
                await self._lost.wait()
                if self._rejoins_at_once:
                    self._rejoins_at_once = False
                    await self._link.answered(self.topic)
                    continue
                if not self._link.is_open:
                    continue  # it takes a random time to come back already
            tries += 1
            await asyncio.sleep(self._rejoin_s(tries))

    async def _join(self) -> None:
        self._link.fail("disconnected", self.topic)  # a reply to a push of the last join will not come any more
        params = await value_of(self._params)
        if self._tracker is not None:
            params = self._tracker.params(params)
        self._join_ref = self._link.next_ref()
        message = Message(self._join_ref, self._join_ref, self.topic, "phx_join", params)
        try:
            await self._link.ask(message, self._timeout_s)
        except JoinError as error:
            if error.status == "timeout":
                await self._say_leave()  # the server may have joined us all the same
            raise

    async def _leave(self) -> None:
        was_over, task = self._is_over, self._task
        self.end()
        if task is not None:
            await asyncio.wait([task])
        if self._answer is not None and self._answer.done() and not self._answer.cancelled():
            self._answer.exception()  # seen
        if not was_over:
            await self._say_leave()

    async def _say_leave(self) -> None:
        if self._join_ref is None:
            return
        message = Message(self._join_ref, self._link.next_ref(), self.topic, "phx_leave", {})
        with suppress(PushError, TimeoutError):
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await self._link.tell(message)
