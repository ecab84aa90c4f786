"""The REST interface: publish, look at topics and sockets, disconnect sockets; and the plugins' own routes.

Owns the routes under ``rest.path``; must not know how events travel. Errors are problem details (RFC 9457),
``application/problem+json``. With an API key set, clients send it as ``Authorization: Bearer <key>`` or
``X-API-Key: <key>``; with none set, only clients on this machine are answered.
"""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from http import HTTPStatus
from http.client import responses as phrases
from typing import Annotated, Any
from urllib.parse import quote, unquote

from fastapi import APIRouter, FastAPI, HTTPException, Path, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from pydantic import AfterValidator, BaseModel, Discriminator, Field, JsonValue, Tag
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from relay.auth.api_key import api_key_from
from relay.config_redis import RedisConfig
from relay.errors import BusUnavailable
from relay.metrics import Metrics
from relay.node import Components, Node
from relay.paths import split_raw
from relay.plugins.hooks import to_payload
from relay.protocol.payload import Payload
from relay.protocol.topics import is_event, is_topic
from relay.version import __version__
from relay.web.rest_history import History, HistoryDetails, describe, read_history
from relay.web.rest_presence import TopicPresence, read_presence

# What a schema can say of names; `relay.protocol.topics` says all.
_TOPIC = r"^[^\x00-\x1f\x7f-\x9f]*$"
_EVENT = r"^[^:\x00-\x1f\x7f-\x9f]*$"


class Problem(BaseModel):
    """What is wrong, as RFC 9457 has it."""

    title: str
    status: int
    detail: str


class Event(BaseModel, extra="forbid"):
    """One event to publish."""

    topic: str = Field(examples=["room:1"], min_length=1, max_length=255, pattern=_TOPIC)
    event: str = Field(examples=["new_msg"], min_length=1, max_length=255, pattern=_EVENT)
    payload: JsonValue = Field(default_factory=dict, examples=[{"text": "hi"}])


class Events(BaseModel, extra="forbid"):
    """Several events to publish, in this order."""

    events: list[Event] = Field(min_length=1, max_length=1000)


def _kind_of_body(body: object) -> str:
    return "Events" if isinstance(body, dict) and "events" in body else "Event"


# Distinguished by one key, so that an error speaks of the form that was meant, and not of both.
EventOrEvents = Annotated[
    Annotated[Event, Tag("Event")] | Annotated[Events, Tag("Events")], Discriminator(_kind_of_body)
]


class Published(BaseModel):
    """How many events the bus has taken."""

    published: int


class Topic(BaseModel):
    """A topic joined in this process."""

    topic: str
    sockets: int


class TopicDetails(Topic):
    """A topic with its traffic and the ids of its sockets."""

    events: int
    events_per_s: float
    socket_ids: list[str]
    history: HistoryDetails | None = Field(description="of the whole topic, not of this process; null without one")


class SocketDetails(BaseModel):
    """A socket of this process."""

    id: str
    address: str | None
    version: int = Field(description="of the protocol: 1 or 2; 3 for server-sent events")
    user: str | None = Field(description="the subject of its token; null for an anonymous one")
    path: str = Field(
        description='how frames are written: "direct" to the transport, "asgi" through ASGI, "sse" to a stream, or '
        '"longpoll" to the next poll'
    )
    topics: list[str]
    outbox_bytes: int = Field(description="waiting, because it reads too slowly")
    held_bytes: int = Field(description="the same, and what the server has not written to its connection yet")
    dropped: int = Field(description="events it missed, because it reads too slowly")


def _described(status: int, description: str) -> dict[int | str, dict[str, Any]]:
    # Not as FastAPI's `model`, which it would describe as application/json.
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": description, "content": content}}


_PROBLEMS = {
    **_described(401, "An API key is expected"),
    **_described(403, "Only clients on this machine are answered, since no API key is set"),
    **_described(422, "The request is not as described"),
}
_NOT_FOUND = _described(404, "There is no such thing here")
_NOT_READ = {
    **_described(404, "The topic has no history"),
    **_described(503, "The history cannot be read now"),
}
_NO_MEMBERS = {
    **_described(404, "The topic has no presence"),
    **_described(503, "The members of other nodes cannot be read now"),
}
_NOT_TOLD = {
    **_described(404, "A name with a line break in it has no route"),
    **_described(503, "It was done here, and the bus did not take it to the other nodes"),
}
_NOT_PUBLISHED = {
    **_described(400, "The body cannot be read"),
    **_described(413, "The body is larger than the relay reads, or a payload or a batch larger than it can publish"),
    **_described(503, "The bus did not take it; of a batch, not all of it"),
}

TopicName = Annotated[str, Path(description="topic; may contain colons and slashes")]
UserName = Annotated[
    str, Path(min_length=1, description="the subject of tokens, or what `authenticate` returns as `sub`")
]
SocketId = Annotated[str, Path(description="id of a socket, as its topics list it")]

# In a path with two names, which `_TwoNames` has left encoded.
EncodedTopic = Annotated[TopicName, AfterValidator(unquote)]
EncodedUser = Annotated[UserName, AfterValidator(unquote)]
EncodedSocketId = Annotated[SocketId, AfterValidator(unquote)]


class OfUser(BaseModel, extra="forbid"):
    """Which user to disconnect, or to take out of a topic. Unknown names are refused: without the topic it is all."""

    user: str = Field(min_length=1, description="the subject of tokens, or what `authenticate` returns as `sub`")
    topic: str | None = Field(None, min_length=1, description="the topic to take it out of; without one, all")


class OfSocket(BaseModel, extra="forbid"):
    """Which socket to close, or to take out of a topic."""

    id: str = Field(min_length=1, description="id of a socket, as its topics list it")
    topic: str | None = Field(None, min_length=1, description="the topic to take it out of; without one, all")


_TWO_NAMES = (re.compile("/topics/(.*)/sockets/([^/]+)", re.DOTALL), re.compile("/topics/(.*)/users/(.*)", re.DOTALL))
"""Paths with two names in them, in the order of their routes."""

_SEPARATOR = re.compile("/(?=(?:users|sockets)/)")


class _TwoNames:
    """Splits paths of two names before they are decoded: a ``/`` in a name, written ``%2F``, is no end of it.

    Routes are found in decoded paths, in which ``/topics/room/users/x%2Fusers%2Fvictim`` names another user. So the
    names are handed on encoded. A path that can be read in two ways is refused where the server does not give it as it
    came.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "DELETE":
            mount, raw, is_raw = split_raw(scope)
            path = raw.decode("latin-1")
            for form in _TWO_NAMES:
                found = form.fullmatch(path)
                if found is None:
                    continue
                if not is_raw and len(_SEPARATOR.findall(path)) > 1:
                    text = "the path can be read in two ways; name topic and user in the query of DELETE /users"
                    await _problem(422, text)(scope, receive, send)
                    return
                scope = {**scope, "path": mount + _encoded(found, path)}
                break
        await self._app(scope, receive, send)


def _encoded(found: re.Match[str], path: str) -> str:
    """The path with each name in it encoded as a whole."""
    parts, end = [], 0
    for group in range(1, (found.lastindex or 0) + 1):
        parts += [path[end : found.start(group)], quote(unquote(found[group]), safe="")]
        end = found.end(group)
    return "".join(parts)


class _Bounded(Request):
    """A request whose body is read no further than to a bound. Raises HTTPException where it is longer."""

    def __init__(self, request: Request, max_bytes: int, metrics: Metrics) -> None:
        super().__init__(request.scope, request.receive)
        self._metrics = metrics
        self._max_bytes = max_bytes

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The body, chunk by chunk."""
        declared = self.headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        if size <= self._max_bytes:
            size = 0
            async for chunk in super().stream():
                size += len(chunk)
                if size > self._max_bytes:
                    break
                yield chunk
        if size > self._max_bytes:
            self._metrics.refused["rest: body too large"] += 1
            raise HTTPException(413, f"body: expected at most {self._max_bytes} bytes")


def make_rest(components: Components, node: Callable[[], Node]) -> FastAPI:
    """Make the REST app of a relay.

    Args: node: the running one. Raises RelayError while there is none.
    """
    app = FastAPI(
        title="relay",
        version=__version__,
        description="Publish events, and see and manage topics and sockets. Topics and sockets are those of the "
        "process that answers; events reach the subscribers of all.",
        # Addresses in the schema are relative to where the app is mounted; FastAPI finds that out.
        redirect_slashes=False,
        docs_url=None,  # a page of the relay's own, with no scripts from elsewhere: `relay.web.pages`
        redoc_url=None,
    )
    answer_problems(app)
    app.add_middleware(_TwoNames)
    app.include_router(_routes(components, node))
    return app


def answer_problems(app: FastAPI) -> None:
    """Have an app answer errors with problem details, as the REST interface does."""
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(StarletteHTTPException, _http_problem)
    app.add_exception_handler(Exception, _internal_error)


def _routes(components: Components, node: Callable[[], Node]) -> APIRouter:
    config = components.config

    class GuardedRoute(APIRoute):
        """Authenticates the client before anything else; FastAPI's dependencies would have read the body by then."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def authorize_and_handle(request: Request) -> Response:
                _authorize(request, components)
                return await handle(_Bounded(request, config.limits.body_max_bytes, components.telemetry.metrics))

            return authorize_and_handle

    # These only describe the two headers, for the schema and the button "Authorize" of /docs.
    schemes = (HTTPBearer(auto_error=False), APIKeyHeader(name="X-API-Key", auto_error=False))
    described = [Security(scheme) for scheme in schemes if config.rest.api_key]
    router = APIRouter(tags=["relay"], route_class=GuardedRoute, dependencies=described, responses=_PROBLEMS)

    @router.post("/publish", responses=_NOT_PUBLISHED)
    async def publish(body: EventOrEvents) -> Published:
        """Publish one event, or several in order. Either all of them can be published, or nothing is."""
        events = body.events if isinstance(body, Events) else [body]
        payloads = [_encode(event, config.limits.payload_max_bytes) for event in events]
        if len(events) > 1:
            _check_batch(payloads, config.redis)
        # All start in this turn of the event loop: the bus gets them in order, and they share one round trip.
        calls = [node().publish(event.topic, event.event, data) for event, data in zip(events, payloads, strict=True)]
        return Published(published=await _wait_for(calls))

    @router.get("/topics")
    async def topics(response: Response) -> list[Topic]:
        """All topics joined in this process; with several workers the header ``X-Relay-Workers`` says how many."""
        if config.workers > 1:
            response.headers["X-Relay-Workers"] = str(config.workers)
        return [Topic(topic=topic, sockets=sockets) for topic, sockets in sorted(node().topics.items())]

    @router.delete("/topics/{topic:path}/sockets/{socket_id}", status_code=HTTPStatus.NO_CONTENT, responses=_NOT_FOUND)
    async def remove_from_topic(topic: EncodedTopic, socket_id: EncodedSocketId) -> Response:
        """Take a socket out of a topic with ``phx_close``: its client does not rejoin automatically."""
        socket = node().socket(socket_id)
        if socket is None or not socket.leave(topic):
            raise HTTPException(404, f"socket {socket_id!r} has not joined {topic!r} here")
        return Response(status_code=HTTPStatus.NO_CONTENT)

    @router.get("/topics/{topic:path}", responses=_NOT_FOUND)
    async def topic(topic: TopicName) -> TopicDetails:
        """One topic: its sockets, the events it had since its first subscriber came, and what its history holds."""
        traffic, history = node().hub.stats(topic), await describe(node(), topic)
        if traffic is None and (history is None or not history.events):
            why = "" if history is None else f", and its history is {history.unavailable or 'empty'}"
            raise HTTPException(404, f"no socket has joined {topic!r} in this process{why}")
        ids = [socket.id for socket in node().sockets.values() if socket.subscription(topic)]
        return TopicDetails(
            topic=topic,
            sockets=len(ids),
            events=traffic.events if traffic else 0,
            events_per_s=round(traffic.events_per_s, 2) if traffic else 0.0,
            socket_ids=ids,
            history=history,
        )

    @router.get("/history", response_model=History, responses=_NOT_READ)
    async def history(
        topic: Annotated[str, Query(min_length=1, max_length=255, examples=["room:1"])],
        since: Annotated[
            str | None, Query(description="a position: the events behind it; without it, the newest events")
        ] = None,
        limit: Annotated[
            int | None, Query(ge=1, description="most events, limits.recover_max_events at most; 100 if not given")
        ] = None,
    ) -> Response:
        """The history of a topic, as it is stored: what `on_event` handlers make of events is not seen here.

        At most ``limits.recover_max_bytes`` of payloads are returned, and ``more`` says that there are further events.
        """
        return await read_history(node(), topic, since, limit)

    @router.get("/presence", response_model=TopicPresence, responses=_NO_MEMBERS)
    async def presence(
        topic: Annotated[str, Query(min_length=1, max_length=255, examples=["room:1"])],
    ) -> Response:
        """The members of a topic with presence, on all nodes."""
        return await read_presence(node(), topic)

    @router.get("/sockets/{socket_id}", responses=_NOT_FOUND)
    async def socket(socket_id: SocketId) -> SocketDetails:
        """One socket."""
        found = node().socket(socket_id)
        if found is None:
            raise HTTPException(404, f"no socket {socket_id!r} here")
        return SocketDetails(
            id=found.id,
            address=found.address,
            version=found.version,
            user=found.user,
            path=found.write_mode,
            topics=list(found.topics),
            outbox_bytes=found.queued_bytes,
            held_bytes=found.held_bytes,
            dropped=found.dropped,
        )

    @router.delete("/sockets", status_code=HTTPStatus.NO_CONTENT, responses=_NOT_FOUND)
    async def disconnect_by_query(asked: Annotated[OfSocket, Query()]) -> Response:
        """Close a socket with 1001; with ``topic``, take it out of that topic alone."""
        if asked.topic is not None:
            return await remove_from_topic(asked.topic, asked.id)
        return await disconnect(asked.id)

    @router.delete("/users", status_code=HTTPStatus.NO_CONTENT, responses=_NOT_TOLD)
    async def disconnect_user_by_query(asked: Annotated[OfUser, Query()]) -> Response:
        """Close all sockets of a user with 1001, on every node; with ``topic``, take it out of that topic alone."""
        return await _answer_control(
            node().disconnect_user(asked.user) if asked.topic is None else _kick(node(), asked.topic, asked.user)
        )

    @router.delete("/sockets/{socket_id}", status_code=HTTPStatus.NO_CONTENT, responses=_NOT_FOUND)
    async def disconnect_by_path(socket_id: SocketId, request: Request) -> Response:
        """Close a socket with 1001; its client reconnects unless it is kept out."""
        _refuse_topic(request)
        return await disconnect(socket_id)

    async def disconnect(socket_id: str) -> Response:
        if not node().disconnect(socket_id):
            raise HTTPException(404, f"no socket {socket_id!r} here")
        return Response(status_code=HTTPStatus.NO_CONTENT)

    @router.delete("/users/{user:path}", status_code=HTTPStatus.NO_CONTENT, responses=_NOT_TOLD)
    async def disconnect_user(user: UserName, request: Request) -> Response:
        """Close all sockets of a user with 1001, on every node; whether there are any is not known here."""
        _refuse_topic(request)
        return await _answer_control(node().disconnect_user(user))

    @router.delete("/topics/{topic:path}/users/{user:path}", status_code=HTTPStatus.NO_CONTENT, responses=_NOT_TOLD)
    async def kick(topic: EncodedTopic, user: EncodedUser) -> Response:
        """Take a user out of a topic with ``phx_close``, on every node; whether it is there is not known here."""
        return await _answer_control(_kick(node(), topic, user))

    return router


def _refuse_topic(request: Request) -> None:
    """Refuse a topic in the query of a path that names none: it would be ignored. Raises HTTPException."""
    if "topic" in request.query_params:
        raise HTTPException(422, "a topic in the query goes with ?user=… or ?id=… there; expected no topic here")


def _kick(node: Node, topic: str, user: str) -> Awaitable[None]:
    try:
        return node.kick(topic, user)
    except ValueError as error:
        raise HTTPException(422, str(error)) from None


async def _answer_control(call: Awaitable[None]) -> Response:
    try:
        await call
    except BusUnavailable as error:
        text = f"done in this process; publishing to the other nodes failed: bus unavailable: {error}"
        raise HTTPException(503, text) from None
    return Response(status_code=HTTPStatus.NO_CONTENT)


def _encode(event: Event, payload_max_bytes: int) -> Payload:
    """Encode the payload of an event that can be delivered. Raises HTTPException for any other."""
    if not is_topic(event.topic) or not is_event(event.event):
        raise HTTPException(422, f"topic {event.topic!r} or event {event.event!r} cannot be")
    try:
        data = to_payload(event.payload)
    except TypeError:  # Python reads NaN, Infinity and halves of surrogate pairs as JSON
        raise HTTPException(422, f"payload of {event.event!r}: holds what JSON cannot say, in UTF-8") from None
    if (size := len(data)) > payload_max_bytes:
        raise HTTPException(413, f"payload of {event.event!r}: {size} bytes; expected at most {payload_max_bytes}")
    return data


def _check_batch(payloads: list[Payload], queue: RedisConfig) -> None:
    """Check that a batch fits into the queue to the bus, which takes it as a whole. Raises HTTPException."""
    size, most, most_bytes = sum(map(len, payloads)), queue.publish_queue_max, queue.publish_queue_max_bytes
    if len(payloads) > most or size > most_bytes:
        text = f"expected at most {most} (redis.publish_queue_max) and {most_bytes} (redis.publish_queue_max_bytes)"
        raise HTTPException(413, f"events: {len(payloads)} events of {size} bytes; {text}")


async def _wait_for(calls: Sequence[Awaitable[None]]) -> int:
    """Wait until the bus has answered for each event; returns how many there are.

    Raises: HTTPException: it did not take all of them; says why of the first, and how many it did take.
    """
    faults: list[BusUnavailable] = []
    for call in calls:
        try:
            await call
        except BusUnavailable as error:
            faults.append(error)
    if faults:
        taken = f"; it has confirmed {len(calls) - len(faults)} of {len(calls)} events" if len(calls) > 1 else ""
        raise HTTPException(503, f"bus unavailable: {faults[0]}{taken}")
    return len(calls)


def _authorize(request: Request, components: Components) -> None:
    """Let a request pass. Raises HTTPException."""
    fault = components.api_key_auth.authorize(request.scope, api_key_from(request.scope), "rest")
    if fault is not None:
        components.telemetry.metrics.refused["rest: wrong key" if fault.is_wrong_key else "rest: not allowed"] += 1
        headers = {"WWW-Authenticate": "Bearer"} if fault.status == HTTPStatus.UNAUTHORIZED else None
        raise HTTPException(fault.status, fault.text, headers=headers)


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    problem = Problem(title=phrases.get(status, "Error"), status=status, detail=detail)
    return JSONResponse(problem.model_dump(), status, headers, media_type="application/problem+json")


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for no other"
    # Where and what, never the input: it may hold anything.
    detail = "; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
    content_type = request.headers.get("content-type", "none")
    if not content_type.split(";")[0].strip().endswith("json") and error.body:
        detail += f"; expected content-type application/json, got {content_type}"
    return _problem(422, detail)


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException), "registered for no other"
    return _problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def _internal_error(request: Request, error: Exception) -> Response:
    # Starlette raises it again for the server's log; the client learns nothing about the inside.
    return _problem(500, "internal error")
