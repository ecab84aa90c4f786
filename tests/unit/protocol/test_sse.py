"""`relay.protocol.sse`: events, ends and positions as ``text/event-stream``."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import Reason
from relay.protocol import sse
from relay.protocol.payload import EMPTY, Payload, classify_payload, encode_payload
from relay.protocol.serializer import Version, encode_broadcast, encode_close, encode_error, encode_push, encode_reply
from tests.support.sse import Parser, StreamEvent

names = st.text(st.characters(blacklist_categories=("Cc", "Cs")), min_size=1, max_size=60)


def parse(data: bytes) -> list[StreamEvent]:
    return Parser().feed(data)


def test_event_is_a_block_of_lines() -> None:
    frame = encode_broadcast(Version.SSE, "room:1", "new_msg", encode_payload({"text": "hi"}))
    assert frame.data == b'event: new_msg\ndata: {"text":"hi"}\n\n'
    assert frame.is_text


def test_position_is_the_events_id() -> None:
    frame = encode_broadcast(Version.SSE, "room:1", "e", EMPTY, "1764150000000-17")
    assert frame.data == b"id: 1764150000000-17\nevent: e\ndata: {}\n\n"
    assert isinstance(frame, sse.StreamFrame)
    assert (frame.topic, frame.body, frame.position) == ("room:1", b"event: e\ndata: {}\n\n", "1764150000000-17")


def test_push_of_a_plugin_is_an_event() -> None:
    frame = encode_push(Version.SSE, "1", "room:1", "e", EMPTY)
    assert frame.data == b"event: e\ndata: {}\n\n"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_payload_of_several_lines_is_split_at_their_ends(line_end: str) -> None:
    """Any of the three ends a line of the stream; the client joins the parts by a line feed."""
    payload = classify_payload(f'{{{line_end}  "a": 1{line_end}}}'.encode())
    [event] = parse(encode_broadcast(Version.SSE, "t", "e", payload).data)
    assert event.data == '{\n  "a": 1\n}'


def test_bytes_stand_in_base64() -> None:
    [event] = parse(encode_broadcast(Version.SSE, "t", "e", b"\x00\xff").data)
    assert event.data == '{"base64":"AP8="}'


@given(names, st.binary(max_size=80), st.one_of(st.none(), st.from_regex(r"[0-9]{1,13}-[0-9]{1,20}", fullmatch=True)))
def test_any_payload_comes_back(event: str, data: bytes, position: str | None) -> None:
    payload: Payload = classify_payload(data)
    [seen] = parse(encode_broadcast(Version.SSE, "t", event, payload, position).data)
    assert (seen.event, seen.id) == (event, position or "")
    if isinstance(payload, bytes):
        assert list(json.loads(seen.data)) == ["base64"]
    else:
        assert json.loads(seen.data) == json.loads(data)


def test_chunk_of_the_response_is_made_once() -> None:
    frame = encode_broadcast(Version.SSE, "t", "e", encode_payload("x" * 300))
    size, _, rest = frame.ws_frame.partition(b"\r\n")
    assert int(size, 16) == frame.size == len(rest) - 2
    assert rest == frame.data + b"\r\n"
    assert frame.ws_frame is frame.ws_frame


@pytest.mark.parametrize(
    ("payload", "found"),
    [('{"k": "a", "n": 1}', b'"a"'), ('{\n"k":\n5}', b"5"), ("{}", None), ("[1]", None), ("5", None)],
)
def test_value_of_a_payload_is_found_for_slow_readers(payload: str, found: bytes | None) -> None:
    frame = encode_broadcast(Version.SSE, "t", "e", classify_payload(payload.encode()))
    assert frame.payload_value("k") == found
    assert frame.payload_value("k") == found, "and remembered"
    assert frame.payload_value("other") is None


def test_ends_and_replies_say_what_they_are() -> None:
    error, close = encode_error(Version.SSE, "1", 'a:"b', Reason.EVENTS_MISSED), encode_close(Version.SSE, "1", "t")
    assert isinstance(error, sse.ChannelEnd) and isinstance(close, sse.ChannelEnd)
    assert (error.topic, error.reason, close.reason) == ('a:"b', Reason.EVENTS_MISSED, None)
    data = {"topic": 'a:"b', "reason": "events may have been missed"}
    assert parse(error.data) == [StreamEvent("relay:error", json.dumps(data, separators=(",", ":")), "")]
    assert parse(close.data) == [StreamEvent("relay:close", '{"topic":"t"}', "")]
    reply = encode_reply(Version.SSE, "1", "1", "t", "ok", EMPTY)
    assert isinstance(reply, sse.JoinReply)
    assert (reply.topic, reply.status, reply.response, reply.data) == ("t", "ok", EMPTY, b"")


def test_relays_own_events() -> None:
    assert parse(sse.encode_failure("x")) == [StreamEvent("relay:error", '{"reason":"x"}', "")]
    assert parse(sse.encode_lost("t", "x")) == [StreamEvent("relay:lost", '{"topic":"t","reason":"x"}', "")]
    [joined] = parse(sse.encode_join("t", encode_payload({"a": 1})))
    assert joined == StreamEvent("relay:join", '{"topic":"t","response":{"a":1}}', "")
    assert parse(sse.COMMENT) == []
    parser = Parser()
    assert parser.feed(sse.retry(1500) + b"\n") == []
    assert parser.retry_ms == 1500


# Positions.


def test_one_topic_has_its_position_alone() -> None:
    assert sse.decode_positions("17-1", ("a:b",)) == {"a:b": "17-1"}
    assert sse.decode_positions("no position", ("a:b",)) == {"a:b": "no position"}, "the history refuses it"


@given(st.lists(names, min_size=1, max_size=10, unique=True), st.data())
def test_positions_of_several_topics_come_back(topics: list[str], data: st.DataObject) -> None:
    known = data.draw(st.lists(st.sampled_from(topics), min_size=1, unique=True))
    positions = {topic: f"{number}-{number}" for number, topic in enumerate(known)}
    text = sse.encode_positions(positions)
    assert text.isascii() and b"\n" not in text and b"\r" not in text
    assert sse.decode_positions(text.decode(), tuple(topics)) == positions


@pytest.mark.parametrize("text", ["", "17-1", "c=17-1", "=17-1", "a=", "&&", "%=&=%", "a" * 5000])
def test_positions_that_cannot_be_read_are_none(text: str) -> None:
    assert sse.decode_positions(text, ("a", "b")) == {}


def test_positions_of_topics_with_long_names_do_not_fit() -> None:
    assert sse.fits_positions(("x" * 255,))
    assert sse.fits_positions(tuple(f"{n}" * 255 for n in range(10)))
    assert not sse.fits_positions(tuple(f"{n}{':' * 254}" for n in range(10)))


# Refusals.


def test_refused_joins_have_a_status() -> None:
    assert {reason: sse.status_of(reason) for reason in Reason if sse.status_of(reason) == 503} == dict.fromkeys(
        (
            Reason.AUTH_UNAVAILABLE,
            Reason.WEBHOOK_UNAVAILABLE,
            Reason.BUS_UNAVAILABLE,
            Reason.INTERNAL,
            Reason.JOIN_CRASHED,
            Reason.RATE_LIMITED,
            Reason.REMOVED,
        ),
        503,
    )
    assert [sse.status_of(reason) for reason in ("invalid topic", "token expired", "unmatched topic")] == [
        400,
        401,
        404,
    ]
    assert [sse.status_of(reason) for reason in ("unauthorized", "a plugin's own words")] == [403, 403]
