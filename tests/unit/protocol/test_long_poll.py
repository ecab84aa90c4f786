"""`relay.protocol.long_poll`: the bodies of requests and responses."""

import base64
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.errors import CloseCode, WireError
from relay.protocol import serializer
from relay.protocol.long_poll import as_text, decode_body, encode_frames
from relay.protocol.serializer import Version

MOST = 1000


def lines(body: bytes, most: int = MOST) -> list[str | bytes]:
    return list(decode_body(body, most, is_ndjson=True))


def test_lines_are_json_or_base64_of_binary_frames() -> None:
    body = b'["1","1","a","phx_join",{}]\r\n\n ' + base64.b64encode(b"\x00\xff") + b'\n{"topic":"a"}\n'
    assert lines(body) == ['["1","1","a","phx_join",{}]', b"\x00\xff", '{"topic":"a"}']


def test_lines_may_be_more_than_phoenix_reads() -> None:
    """phoenix.js before 1.8.6 sends all that it has; Phoenix passes over those after the hundredth."""
    assert len(lines(b"\n".join([b"[1]"] * 101))) == 101


@pytest.mark.parametrize(
    ("body", "found"), [(b"[1]", ["[1]"]), (b"", []), (b"nonsense", ["nonsense"]), (b"\x00\x01", [b"\x00\x01"])]
)
def test_body_of_another_type_is_one_frame(body: bytes, found: list[str | bytes]) -> None:
    """phoenix.js 1.6 sends a binary frame as it is."""
    assert list(decode_body(body, MOST, is_ndjson=False)) == found


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        (b"[\xff]", CloseCode.INVALID_PAYLOAD, "expected UTF-8 text"),
        (b"no base64!", CloseCode.INVALID_PAYLOAD, "expected a line of JSON, or the base64 of a binary frame"),
        (b"AAA", CloseCode.INVALID_PAYLOAD, "expected a line of JSON, or the base64 of a binary frame"),
        (b"[" + b"1" * MOST, CloseCode.TOO_BIG, "expected frames of at most 1000 bytes"),
        (base64.b64encode(bytes(MOST + 1)), CloseCode.TOO_BIG, "expected frames of at most 1000 bytes"),
    ],
)
def test_line_that_is_no_frame_is_an_error_after_those_before_it(line: bytes, code: CloseCode, text: str) -> None:
    frames = decode_body(b"[1]\n" + line, MOST, is_ndjson=True)
    assert next(frames) == "[1]"
    with pytest.raises(WireError, match=text) as caught:
        next(frames)
    assert caught.value.code == code


def test_frames_of_just_the_limit_pass() -> None:
    assert lines(base64.b64encode(bytes(MOST))) == [bytes(MOST)]
    assert lines(b"[" + b"1" * (MOST - 1)) == ["[" + "1" * (MOST - 1)]
    with pytest.raises(WireError):
        list(decode_body(bytes(MOST + 1), MOST, is_ndjson=False))


@given(st.lists(st.binary(min_size=1) | st.text(min_size=1).map(json.dumps).map(lambda text: f"[{text}]")))
def test_what_phoenix_js_sends_is_read(frames: list[str | bytes]) -> None:
    body = "\n".join(each if isinstance(each, str) else base64.b64encode(each).decode() for each in frames)
    assert lines(body.encode(), 1_000_000) == frames


BYTES = b"\xff\x00"
BASE64 = {"base64": "/wA="}


def test_binary_frames_are_sent_as_text() -> None:
    v2 = Version.V2
    frames = [
        serializer.encode_broadcast(v2, "a", "e", BYTES),
        serializer.encode_push(v2, "7", "a", "e", BYTES),
        serializer.encode_push(v2, None, "a", "e", BYTES),
        serializer.encode_reply(v2, "7", "8", "a", "ok", BYTES),
        serializer.encode_reply(v2, None, None, "a", "ok", BYTES),
        serializer.encode_broadcast(v2, "ä", "ö", b""),
    ]
    assert [json.loads(as_text(each).text) for each in frames] == [
        [None, None, "a", "e", BASE64],
        ["7", None, "a", "e", BASE64],
        [None, None, "a", "e", BASE64],
        ["7", "8", "a", "phx_reply", {"status": "ok", "response": BASE64}],
        [None, None, "a", "phx_reply", {"status": "ok", "response": BASE64}],
        [None, None, "ä", "ö", {"base64": ""}],
    ]


def test_response_holds_texts() -> None:
    frames = [
        serializer.encode_broadcast(Version.V2, "a", 'e"', msgspec.Raw(b'{"n":9007199254740993}')),
        serializer.encode_broadcast(Version.V2, "a", "e", BYTES),
    ]
    texts = json.loads(encode_frames(frames))
    assert texts[0] == '[null,null,"a","e\\"",{"n":9007199254740993}]'
    assert json.loads(texts[1])[4] == BASE64
    assert encode_frames([]) == b"[]"
