"""A client of server-sent events: the parser of the standard, and a connection that reads by it."""

import codecs
from typing import NamedTuple


class StreamEvent(NamedTuple):
    """What a page is given: the event's name, its data, and the last id until then."""

    event: str
    data: str
    id: str


class Parser:
    """Reads a stream piece by piece. Source: WHATWG HTML, section 9.2.6."""

    def __init__(self) -> None:
        self.retry_ms: int | None = None
        self.last_id = ""
        self.comments = 0
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._rest = ""
        self._event = ""
        self._data: list[str] = []

    def feed(self, data: bytes) -> list[StreamEvent]:
        """The events that are complete by now."""
        text = self._rest + self._decode(data)
        held = "\r" if text.endswith("\r") else ""  # half of a line end, perhaps
        lines = (text[: len(text) - len(held)]).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._rest = lines.pop() + held
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: str) -> StreamEvent | None:
        if not line:
            event, data = self._event or "message", self._data
            self._event, self._data = "", []
            return StreamEvent(event, "\n".join(data), self.last_id) if data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "":
                self.comments += 1
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self.last_id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_ms = int(value)
        return None
