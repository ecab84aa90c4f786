"""The bridge between hub and broker: subscriptions and pushes to the broker, events and gaps from it.

Owns what the broker is asked for; must not know transports or the wire's frames.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Collection, Coroutine, Hashable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from functools import partial
from itertools import count

from relay.auth.decisions import Decisions
from relay.brokers.base import Broker, Event
from relay.channels import control
from relay.channels.batch_pause import BatchPause
from relay.channels.control import ControlMessage
from relay.channels.event_faults import EventFaults
from relay.channels.event_filter import EventFilter, Origin
from relay.channels.groups import Subscriber
from relay.channels.history import History
from relay.channels.hub import JOINED_MAX_BYTES, Hub, Outgoing
from relay.channels.rejoins import Rejoins
from relay.channels.subscriptions import TopicSubscriptions
from relay.channels.tangram import classifier
from relay.concurrency import JOB_BYTES, Continuation, InFlight, KeyedQueue
from relay.config import Config
from relay.config_sections import Direction
from relay.errors import BusUnavailable, Reason, RelayError
from relay.plugins.dispatcher import HandlerError, HandlerRunner
from relay.plugins.hooks import Event as HookedEvent
from relay.plugins.hooks import Hook, Hooks, InvalidPayload, RedisMessage, matching
from relay.plugins.hooks import Leave as HookedLeave
from relay.protocol import topics
from relay.protocol.payload import EMPTY, Payload, identified
from relay.telemetry import Telemetry
from relay.threadsafe import Call, Home

_HEARD = nullcontext()
"""Around a join where the broker carries every topic."""

_EVENTS_WAITING = 10_000
"""Events of one topic, or messages for one on_redis handler, that may wait for a plugin; further ones are dropped.

More than one read from Redis brings, so that a handler which keeps up loses none. To read the bus no further
instead would make everybody wait for one handler.
"""

_ROWS_WAITING = 1_000
"""The same for events that are read from a history: so many may wait, and further ones are read later."""


class PubSub:
    """The bridge between the hub of one process and the broker, with the plugins' handlers on the way.

    Args: config: limits, topic settings and the pace of rejoins.
          broker: where events come from and pushes go to.
          hub: who is to hear them here.
          runner: the plugins' handlers, and what calls them.
          telemetry: where it reports to.
          pause: what follows a fan-out that took long.
    """

    def __init__(
        self,
        config: Config,
        broker: Broker,
        hub: Hub,
        runner: HandlerRunner,
        telemetry: Telemetry,
        pause: BatchPause | None = None,
    ) -> None:
        metrics, tracer = telemetry.metrics, telemetry.tracer
        self.hooks: Hooks = runner.hooks
        self.runner: HandlerRunner = runner
        self._event_filter = EventFilter(runner)
        self._pause = BatchPause() if pause is None else pause
        self._log = telemetry.loggers.get("relay.node")
        self._faults = EventFaults(metrics, self._log)
        self._publish = broker.publish if tracer is None else tracer.around(broker.publish)
        self.on_control: Callable[[ControlMessage], None] = lambda message: None
        """Called for each control message of another node."""
        self.receivers: dict[str, Callable[[bytes], None]] = {}  # by Redis channel, for messages between nodes
        self.after_gap: list[Callable[[], object]] = []
        """Called when messages between nodes may have been lost."""
        self.home: Home = Home()
        """The event loop that all of this lives in."""
        # Events that have to wait for a handler, by topic, and raw Redis messages, by handler.
        self.in_flight: InFlight = InFlight(config.limits.in_flight_total_max_bytes, metrics)
        """What waits for handlers, of all sockets and here."""
        self._queue = KeyedQueue(self.in_flight)
        # Subscribers that an event shall not reach, by its sender; see broadcast().
        self._skips: dict[str, Subscriber] = {}
        self._senders = map(f"{uuid.uuid4().hex[:8]}.{{}}".format, count(1))
        self._config = config
        self._broker = broker
        self._hub = hub
        self._metrics = metrics
        self._classify = classifier(config.tangram)
        self.history: History | None = None
        """What is known here of topics' histories; None where no topic has one."""
        if config.has_history:
            self.history = History(config, lambda: broker.history, self, metrics, self._log)
        self._hub_idle = asyncio.Event()
        hub.on_idle = self._hub_idle.set
        self._tasks: set[asyncio.Task[None]] = set()
        self._leftovers: set[asyncio.Task[None]] = set()
        self.decisions: Decisions = Decisions()
        """Joins and handshakes that take their time, and the control messages that overtake them."""
        self._rejoins = Rejoins(config, hub, metrics, self.spawn)
        self._subscriptions = TopicSubscriptions(broker, hub, self.spawn)

    async def start(self) -> None:
        """Start to hear the bus."""
        await self._broker.start(self)

    async def stop(self) -> None:
        """Stop to hear the bus."""
        timeout_s = self._config.limits.close_timeout_s
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:  # not longer: a handler may ignore its cancellation
            _ = await asyncio.wait(tuple(self._tasks), timeout=timeout_s)
        await self._queue.close(timeout_s)
        if self.history is not None:
            await self.history.close()
        await self._broker.stop()
        self.runner.close()

    def call_in_loop(self, call: Callable[[], object]) -> None:
        """Call now, or, from a handler in a thread, at the event loop's next turn."""
        if self.home.is_here:
            call()
        elif fault := self.home.fault:
            raise RelayError(fault)
        else:
            self.home.loop.call_soon_threadsafe(call)

    def start_call(self, begin: Callable[[], asyncio.Future[None]]) -> Call:
        """Start what goes over the bus, from any thread and loop; see `Home.call`. Raises BusUnavailable."""
        return self.home.call(begin, self._config.redis.timeout_s)

    def finish_in_background(self, queue: KeyedQueue) -> asyncio.Task[None] | None:
        """Let the handlers that a socket leaves behind come to their end, each within its time; None without any."""
        if not queue.running:
            return None
        task = self.spawn(self._finish(queue))
        self._leftovers.add(task)
        task.add_done_callback(self._leftovers.discard)
        return task

    async def _finish(self, queue: KeyedQueue) -> None:
        try:
            await queue.wait()
        finally:
            await queue.close()

    async def join_background(self, deadline_s: float) -> None:
        """Wait for what `finish_in_background` was given, and no longer than ``deadline_s``."""
        if self._leftovers:
            _ = await asyncio.wait(self._leftovers, timeout=deadline_s)

    # From the bus.

    async def receive_events(self, events: Sequence[Event]) -> None:
        """Deliver a batch to the local subscribers; returns when the hub can take more."""
        began = self._pause.clock()
        # Notices are no events.
        self._metrics.events_in += sum(1 for each in events if each.event or each.position is None)
        self._deliver_events(events, self.history)
        if self._hub.busy:
            await self._wait_for_hub()
        if pause_s := self._pause.length_s(began, len(events)):
            await self._pause.sleep(pause_s)

    async def _wait_for_hub(self) -> None:
        while self._hub.busy:
            self._hub_idle.clear()
            await self._hub_idle.wait()

    def _deliver_events(self, events: Sequence[Event], checked_by: History | None) -> None:
        """Deliver events to the local subscribers.

        Args: checked_by: what decides whether an event with a position follows on those before it; None where each
                          does.
        """
        hub, metrics, filtered, history = self._hub, self._metrics, bool(self.hooks.event), self.history
        # Events of one topic that follow each other go to its sockets together.
        run: list[Outgoing] = []
        run_topic, run_bytes = "", 0
        for each in events:
            topic, event, data, position = each.topic, each.event, each.payload, each.position
            if topic not in hub:
                metrics.events_without_subscribers += bool(event)
                self._forget_sender(each)
                continue
            if position is not None and checked_by is not None:
                if filtered and not self._may_wait(topic, data):
                    checked_by.check_soon(topic)  # it is read from the history, once there is room
                    continue
                if not checked_by.accept(each):
                    continue
            skip = self._skips.pop(each.sender, None) if each.sender is not None else None
            if (fault := self._fault(event, data)) is not None:
                self._faults.count_invalid(topic, fault)
                self._note(topic, position)
            elif filtered and not self._may_wait(topic, data):
                self._faults.count_waiting(topic)
                self._note(topic, position)
            else:
                payload = self._classify(data)
                if payload is data:
                    self._faults.note_binary(topic, event, data)
                if filtered:
                    epoch = None if history is None or position is None else history.epoch(topic)
                    origin = Origin(topic, position, epoch, skip)
                    self._queue.run(topic, partial(self._filter, origin, event, payload), len(data))
                    continue
                run_bytes += len(data)
                if run and (topic != run_topic or skip is not None or run_bytes > JOINED_MAX_BYTES):
                    hub.fan_out_all(run_topic, run)
                    run, run_bytes = [], len(data)
                run_topic = topic
                if skip is None:
                    run.append((event, payload, position))
                else:
                    hub.fan_out(topic, event, payload, skip, position)
                if position is not None and history is not None:
                    history.note(topic, position, event, payload, len(data))
        if run:
            hub.fan_out_all(run_topic, run)

    def _forget_sender(self, event: Event) -> None:
        if event.sender is not None:
            _ = self._skips.pop(event.sender, None)

    def _note(self, topic: str, position: str | None) -> None:
        """Tell the history of an event that no subscriber is given."""
        if position is not None and self.history is not None:
            self.history.note(topic, position, "", EMPTY, 0)

    # From histories.

    def deliver_rows(self, rows: Sequence[Event]) -> int:
        """Deliver events to the topic's subscribers, as if they came from the bus; returns how many were taken."""
        if not self.hooks.event:
            self._deliver_events(rows, None)
            return len(rows)
        taken = 0
        while taken < len(rows) and self._may_wait(rows[taken].topic, rows[taken].payload):
            self._deliver_events(rows[taken : taken + 1], None)
            taken += 1
        return taken

    async def room_for_rows(self, topic: str, payload: bytes = b"") -> None:
        """Return when hub and handlers can take more of a topic, an event with this payload at least."""
        await self._wait_for_hub()
        while self._queue.waiting(topic) > _ROWS_WAITING or not self._may_wait(topic, payload):  # noqa: ASYNC110  # rare, and the end of a job sets no event
            await asyncio.sleep(0.01)

    async def filter_row(self, row: Event) -> tuple[str, Payload] | None:
        """What handlers and limits leave of an event; None for nothing."""
        if (fault := self._fault(row.event, row.payload)) is not None:
            self._faults.count_invalid(row.topic, fault)
            return None
        payload = self._classify(row.payload)
        if not self.hooks.event:
            return row.event, payload
        try:
            left = self._event_filter.filter(HookedEvent(row.topic, row.event, payload))
            if left is not None and not isinstance(left, HookedEvent):
                left = await left
        except InvalidPayload as error:
            self._faults.count_unreadable(row.topic, error)
            return None
        if left is None:
            self._faults.count_dropped_by_plugin()
        return None if left is None or left.topic != row.topic else (left.event, left.data)

    def request_rejoins_of(self, topic: str) -> None:
        """Tell the subscribers of a topic, at a pace, that they may have missed events."""
        self._rejoins.request(self._hub.pairs([topic]))

    def _filter(self, origin: Origin, name: str, data: Payload) -> Continuation:
        """Pass an event through the handlers for it and deliver what is left of it."""
        try:
            left = self._event_filter.filter(HookedEvent(origin.topic, name, data))
        except InvalidPayload as error:
            self._drop_unreadable(origin, error)
            return None
        if left is not None and not isinstance(left, HookedEvent):
            return self._deliver_later(origin, left)
        self._deliver(origin, left)
        return None

    async def _deliver_later(self, origin: Origin, filtering: Awaitable[HookedEvent | None]) -> None:
        try:
            left = await filtering
        except InvalidPayload as error:
            self._drop_unreadable(origin, error)
        else:
            self._deliver(origin, left)

    def _drop_unreadable(self, origin: Origin, error: InvalidPayload) -> None:
        self._faults.count_unreadable(origin.topic, error)
        if not self._is_over(origin):
            self._note(origin.topic, origin.position)

    def _deliver(self, origin: Origin, event: HookedEvent | None) -> None:
        topic, position = origin.topic, origin.position
        if self._is_over(origin):
            if topic in self._hub:
                self._metrics.dropped[Reason.EVENTS_MISSED] += 1
            return
        if event is None:
            self._faults.count_dropped_by_plugin()
            self._note(topic, position)
        elif event.topic != topic:
            self._hub.fan_out(event.topic, event.event, event.data, origin.skip)
            self._note(topic, position)
        else:
            self._hub.fan_out(topic, event.event, event.data, origin.skip, position)
            if position is not None and self.history is not None:
                self.history.note(topic, position, event.event, event.data, len(bytes(event.data)))

    def _is_over(self, origin: Origin) -> bool:
        """Whether an event waited for handlers while its topic was left, or lost what lay before it.

        Who has joined since got what he is to get from the history; the event would come after younger ones.
        """
        history = self.history
        return history is not None and origin.position is not None and history.epoch(origin.topic) is not origin.epoch

    def receive_message(self, pattern: str, channel: str, data: bytes) -> None:
        """Hand a message on a raw Redis channel to the handlers that listen to ``pattern``, in order for each."""
        if pattern in self.receivers:
            self.receivers[pattern](data)
        message = RedisMessage(channel, data)
        for hook in self.hooks.redis:
            if hook.topic == pattern:
                if not self._may_wait(hook, data):
                    self._metrics.dropped["on_redis handler too slow"] += 1
                    self._log.warning(hook.plugin, "message on %s dropped: plugin %s is too slow", pattern, hook.plugin)
                else:
                    self._queue.run(hook, partial(self._call_redis_hook, hook, message), len(data))

    def _may_wait(self, key: Hashable, data: bytes) -> bool:
        """Say whether an event or a message may queue for a handler that is busy with others of its key."""
        queue = self._queue
        return queue.waiting(key) < _EVENTS_WAITING and self.in_flight.has_room(queue, key, len(data) + JOB_BYTES)

    def receive_control(self, data: bytes) -> None:
        """Take a control message from another node; an invalid one is dropped."""
        message = control.decode(data)
        if message is None:
            self._metrics.dropped["control message not understood"] += 1
            self._log.warning("control", "control message dropped: not understood")
        else:
            self.on_control(message)

    async def _call_redis_hook(self, hook: Hook, message: RedisMessage) -> None:
        with suppress(HandlerError):  # logged and counted there
            await self.runner.call(hook, message, self.runner.relay)

    async def call_leave_handlers(self, leave: HookedLeave) -> None:
        """Tell the handlers for it, in order, that a subscription has ended."""
        for hook in matching(self.hooks.leave, leave.topic):
            with suppress(HandlerError):  # logged and counted there
                await self.runner.call(hook, leave)

    def _fault(self, event: str, data: bytes) -> str | None:
        if not topics.is_event(event):
            return Reason.INVALID_EVENT
        if len(data) > self._config.limits.payload_max_bytes:
            return Reason.PAYLOAD_TOO_LARGE
        return None

    def local_broadcast(self, topic: str, event: str, payload: Payload) -> bool:
        """Deliver an event of this process to its own sockets, past the bus; False where there is no subscriber."""
        return self._hub.fan_out(topic, event, payload)

    def on_gap(self, reason: str, topics: Collection[str] | None = None) -> None:
        """Have the subscribers of all topics, or of some, rejoin at a pace: they may have missed events.

        Each gets a ``phx_error``, rejoins automatically and refetches what it needs, unless its topic ignores gaps.
        """
        if not topics:
            for call in self.after_gap:
                call()
        history = self.history
        if history is not None:
            history.forget_unheard(self._broker.hears, topics)
        pairs = (
            (topic, each)
            for topic, each in self._hub.pairs(topics)
            # Those that wait still for their turn after an earlier gap get no events, whatever is known by now.
            if history is None or not history.follows(topic) or self._hub.is_held(topic, each)
        )
        if topics is None:
            self._rejoins.request_all(pairs)
        else:
            self._rejoins.request(pairs)
        if history is not None:
            history.after_gap(topics)

    def count_subscribers(self, topic: str) -> int:
        """How many subscribers a topic has here."""
        return self._hub.count(topic)

    # From sockets.

    def refuse_join(self) -> Reason | None:
        """Say why no client can join now; None when they can."""
        return None if self._broker.link.live else Reason.BUS_UNAVAILABLE

    def must_subscribe(self, topic: str) -> bool:
        """Whether events of a topic are heard only after `subscribe`."""
        return self._broker.needs_subscribe and not self._subscriptions.is_heard(topic)

    def subscribe(self, topic: str) -> AbstractAsyncContextManager[None]:
        """Hear events of ``topic`` in the block; see `TopicSubscriptions.subscribe`."""
        return self._subscriptions.subscribe(topic) if self._broker.needs_subscribe else _HEARD

    def unsubscribe(self, topic: str) -> None:
        """Stop to hear ``topic`` unless it is subscribed to again: it has no local subscriber any more."""
        if self.history is not None:
            self.history.unfollow(topic)
        self._subscriptions.unsubscribe(topic)

    @property
    def can_publish(self) -> bool:
        """Whether the link to the bus is live, and takes what is published."""
        return self._broker.link.live and not self._broker.refusal

    def broadcast(
        self,
        topic: str,
        event: str,
        payload: Payload,
        skip: Subscriber | None = None,
        direction: Direction = Direction.TO,
    ) -> asyncio.Future[None]:
        """Send an event to all subscribers of a topic on every node, except ``skip``; see `Broker.publish`.

        The event goes over the bus like any other, with a sender of its own: the node remembers whom the event with
        this sender shall pass over. It forgets that when the event has come back, when publishing has failed, or
        ``redis.timeout_s`` after the bus has taken the event, which then was lost. A gap changes nothing: an event of
        another publisher never has this sender.

        Args: direction: `Direction.LIVE` for an event that no history keeps.
        """
        sender = None if skip is None else next(self._senders)
        if skip is not None and sender is not None:
            self._skips[sender] = skip
        future = self.publish(direction, topic, event, payload, sender)
        future.add_done_callback(partial(self._broadcast_done, sender))
        return future

    def _broadcast_done(self, sender: str | None, future: asyncio.Future[None]) -> None:
        has_failed = not future.cancelled() and future.exception() is not None
        if has_failed:
            self._metrics.dropped[Reason.BUS_UNAVAILABLE] += 1
        if sender not in self._skips:  # the common case: the event has come back before the bus's answer
            return
        if has_failed:
            del self._skips[sender]
        else:
            _ = future.get_loop().call_later(self._config.redis.timeout_s, self._skips.pop, sender, None)

    def publish(
        self, direction: Direction, topic: str, event: str, payload: Payload, sender: str | None = None
    ) -> asyncio.Future[None]:
        """Publish one message on the bus; see `Broker.publish`."""
        future = self._publish(direction, topic, event, bytes(payload), sender)
        future.add_done_callback(self._log_failure)
        return future

    def publish_push(
        self, topic: str, event: str, payload: Payload, user: str | None, socket_id: str
    ) -> asyncio.Future[None]:
        """Publish a client's push; with ``redis.push_identity`` a second message says whose it is.

        Returns: a future that is done when the bus has taken both, or fails with `BusUnavailable`.
        """
        push = self.publish(Direction.FROM, topic, event, payload)
        if not self._config.redis.push_identity:
            return push
        return _all_of(push, self.publish(Direction.FROM_USER, topic, event, identified(user, socket_id, payload)))

    def publish_control_message(self, message: ControlMessage) -> asyncio.Future[None]:
        """Have all nodes disconnect or kick a user; see `Broker.publish_control`."""
        future = self._broker.publish_control(control.encode(message))
        future.add_done_callback(self._log_failure)
        future.add_done_callback(self._control_done)
        return future

    def _control_done(self, future: asyncio.Future[None]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self._metrics.dropped["control message not sent"] += 1

    def _log_failure(self, future: asyncio.Future[None]) -> None:
        if not future.cancelled() and isinstance(error := future.exception(), BusUnavailable):
            self._log.warning("bus", "publish failed: %s", error)

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Run something until it ends or the relay stops."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _all_of(*futures: asyncio.Future[None]) -> asyncio.Future[None]:
    """A future that is done when all of these are, and fails as the first of them that has failed."""
    whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def settle(_: asyncio.Future[None]) -> None:
        if whole.done() or not all(future.done() for future in futures):
            return
        error = next((future.exception() for future in futures if future.exception() is not None), None)
        if error is None:
            whole.set_result(None)
        else:
            whole.set_exception(error)

    for future in futures:
        future.add_done_callback(settle)
    return whole
