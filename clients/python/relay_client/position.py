"""Where a channel stands in the history of its topic: what its joins ask for, and what each event says.

The server ends the payload of an event with ``"_position"``. After a payload that is not an object an event
``relay:position`` has it.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from relay_client.events import Event, EventQueue

POSITION_EVENT = "relay:position"

WAIT_S = 0.05
"""How long an event is kept whose position may be the next message. One that has no position is not followed by one."""


class Tracker:
    """Gives events to a queue, each with its position, and remembers the last one that the queue has taken.

    An event whose position has not come yet waits for it: if the connection is lost in between, the server sends the
    event again.

    Args:       position: of the last event of an earlier run.
                last: number of the newest events that a join without a position asks for.
    Attributes: position: where the next join continues.
    """

    def __init__(self, queue: EventQueue, position: str | None, last: int | None) -> None:
        self.position = position
        self._queue = queue
        self._last = last
        # Whether the server sends positions: else a member of that name belongs to the application.
        self._is_positioned = False
        self._waiting: Event | None = None  # for its position
        self._timer: asyncio.TimerHandle | None = None
        # Whether the queue has taken the last event that was given to it without a position.
        self._was_taken = True

    def params(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Params of the next join."""
        asked = {**params, "since": self.position}
        return asked if self._last is None else {**asked, "last": self._last}

    def enter(self, response: Any) -> bool:
        """Take the response to a join; returns whether every event since the last position follows."""
        self.forget()
        self._is_positioned = isinstance(response, dict) and "_position" in response
        if not self._is_positioned:
            return False
        self._keep(response["_position"])
        return response.get("recovered") is True

    def receive(self, event: Event) -> None:
        """Take an event, and give it on: at once, unless its position is still to come."""
        payload = event.payload
        if not self._is_positioned:
            self._queue.put(event)
        elif event.event == POSITION_EVENT:
            position = payload.get("_position") if isinstance(payload, dict) else None
            self._receive_position(position)
        else:
            self.flush()
            if isinstance(payload, dict):
                self._give(event, payload.pop("_position", None))
            else:
                self._waiting = event
                self._timer = asyncio.get_running_loop().call_later(WAIT_S, self.flush)

    def _receive_position(self, position: Any) -> None:
        event = self._take_waiting()
        if event is not None:
            self._give(event, position)
        elif self._was_taken:
            self._keep(position)
        else:
            self._queue.recover_dropped()

    def _give(self, event: Event, position: Any) -> None:
        if isinstance(position, str):
            event = replace(event, position=position)
        self._was_taken = self._queue.put(event)
        if self._was_taken:
            self._keep(position)

    def _keep(self, position: Any) -> None:
        if isinstance(position, str):
            self.position = position

    def flush(self) -> None:
        """Give on the event that waits for its position: it has none."""
        event = self._take_waiting()
        if event is not None:
            self._give(event, None)

    def forget(self) -> None:
        """Drop the event that waits for its position: if it has one, the next join recovers it."""
        self._take_waiting()

    def _take_waiting(self) -> Event | None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        event, self._waiting = self._waiting, None
        return event
