"""`relay.protocol.serializer`: all frames byte for byte, bad input, and round trips through a decoder of the test's."""

import base64
import json
import random
import time
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode
from websockets.streams import StreamReader

from relay.errors import CloseCode, WireError
from relay.protocol.frame import Frame
from relay.protocol.payload import EMPTY, Payload, classify_payload, encode_payload, fault_of_json
from relay.protocol.serializer import (
    Message,
    Ref,
    Version,
    decode,
    encode_broadcast,
    encode_close,
    encode_error,
    encode_push,
    encode_reply,
    negotiate,
)

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "vectors" / "frames.json").read_text("utf-8"))
CLIENT_VECTORS = [vector for vector in VECTORS if vector["direction"] == "client"]
SERVER_VECTORS = [vector for vector in VECTORS if vector["direction"] == "server"]

DEEP = "[" * 10_000 + "]" * 10_000


def by_name(vector: dict[str, Any]) -> str:
    return str(vector["name"])


def raw(vector: dict[str, Any]) -> str | bytes:
    return vector["text"] if "text" in vector else bytes.fromhex(vector["hex"])


def plain(payload: Payload) -> Any:
    """A payload as the test compares it: bytes as they are, JSON decoded by Python's own decoder."""
    return json.loads(bytes(payload)) if isinstance(payload, msgspec.Raw) else payload


def field(vector: dict[str, Any], name: str) -> Any:
    return bytes.fromhex(vector[f"{name}_hex"]) if f"{name}_hex" in vector else vector[name]


def payload_of(value: Any) -> Payload:
    return value if isinstance(value, bytes) else encode_payload(value)


def encode_vector(vector: dict[str, Any]) -> Frame:
    """Call the function that makes a frame of the server's, by what the frame says."""
    version = Version(vector["version"])
    join_ref, ref, topic, event = (vector[name] for name in ("join_ref", "ref", "topic", "event"))
    if event == "phx_reply":
        return encode_reply(version, join_ref, ref, topic, vector["status"], payload_of(field(vector, "response")))
    if event == "phx_close":
        return encode_close(version, join_ref, topic)
    if event == "phx_error":
        return encode_error(version, join_ref, topic, vector["payload"]["reason"])
    payload = payload_of(field(vector, "payload"))
    # Only its first byte tells a push without join_ref from a broadcast.
    if join_ref is not None or vector.get("hex", "").startswith("00"):
        return encode_push(version, join_ref, topic, event, payload)
    return encode_broadcast(version, topic, event, payload)


def read_names(data: bytes, count: int, at: int) -> list[str]:
    """Read ``count`` names behind their one-byte lengths, as phoenix.js does; the rest follows them."""
    names: list[str] = []
    start = at + count
    for length in data[at : at + count]:
        names.append(data[start : start + length].decode())
        start += length
    return [*names, data[start:].hex()]


def client_sees(frame: Frame, version: Version) -> dict[str, Any]:
    """Decode a frame of the server's, independently of the relay's, after phoenix.js's ``serializer.js``."""
    if version is Version.V1:
        assert frame.is_text, "V1 has no binary frames"
        message = json.loads(frame.data)
        assert list(message) == ["topic", "event", "ref", "payload"]
        return {"join_ref": None, **message}
    if frame.is_text:
        return dict(zip(("join_ref", "ref", "topic", "event", "payload"), json.loads(frame.data), strict=True))
    kind = frame.data[0]
    if kind == 0:
        join_ref, topic, event, rest = read_names(frame.data, 3, 1)
        return {
            "join_ref": join_ref,
            "ref": None,
            "topic": topic,
            "event": event,
            "payload": bytes.fromhex(rest),
        }
    if kind == 1:
        join_ref, ref, topic, status, rest = read_names(frame.data, 4, 1)
        payload = {"status": status, "response": bytes.fromhex(rest)}
        return {"join_ref": join_ref, "ref": ref, "topic": topic, "event": "phx_reply", "payload": payload}
    assert kind == 2
    topic, event, rest = read_names(frame.data, 2, 1)
    return {"join_ref": None, "ref": None, "topic": topic, "event": event, "payload": bytes.fromhex(rest)}


# The table of frames.


@pytest.mark.parametrize("vector", CLIENT_VECTORS, ids=by_name)
def test_clients_frame_is_decoded_as_the_table_says(vector: dict[str, Any]) -> None:
    message = decode(raw(vector), Version(vector["version"]))
    assert [message.join_ref, message.ref, message.topic, message.event, plain(message.payload)] == [
        vector["join_ref"],
        vector["ref"],
        vector["topic"],
        vector["event"],
        field(vector, "payload"),
    ]


@pytest.mark.parametrize("vector", SERVER_VECTORS, ids=by_name)
def test_servers_frame_is_encoded_as_the_table_says(vector: dict[str, Any]) -> None:
    frame = encode_vector(vector)
    assert frame.is_text == ("text" in vector)
    assert (frame.text if frame.is_text else frame.data) == raw(vector)
    assert frame.size == len(frame.data)


@pytest.mark.parametrize("vector", SERVER_VECTORS, ids=by_name)
def test_servers_frame_is_understood_by_a_client(vector: dict[str, Any]) -> None:
    version = Version(vector["version"])
    seen = client_sees(encode_vector(vector), version)
    assert (seen["topic"], seen["event"]) == (vector["topic"], vector["event"])
    if version is Version.V2:
        assert (seen["join_ref"] or None) == (vector["join_ref"] or None)
    assert (seen["ref"] or None) == (vector["ref"] or None)


def test_table_has_no_two_frames_of_one_name_and_says_where_each_is_from() -> None:
    assert len({vector["name"] for vector in VECTORS}) == len(VECTORS)
    assert all(vector["origin"] for vector in VECTORS)


# What clients send.


@pytest.mark.parametrize("ref", ["007", "", "0", "ünïcode ✓", "a b", "\\", '"', 0, -1, 12, 2**63, -(2**70), None])
@pytest.mark.parametrize("version", [Version.V1, Version.V2])
def test_refs_come_back_as_they_came(ref: Ref, version: Version) -> None:
    """Source: phoenix.js, ``channel.js`` compares refs with ``===``."""
    if version is Version.V2:
        message = decode(json.dumps([ref, ref, "t", "e", {}]), version)
    else:
        message = decode(json.dumps({"topic": "t", "event": "e", "payload": {}, "ref": ref, "join_ref": ref}), version)
    assert (message.join_ref, message.ref) == (ref, ref)
    seen = client_sees(encode_reply(version, message.join_ref, message.ref, "t", "ok", EMPTY), version)
    assert (seen["ref"], type(seen["ref"])) == (ref, type(ref))
    if version is Version.V2:
        assert (seen["join_ref"], type(seen["join_ref"])) == (ref, type(ref))


def test_elements_past_the_fifth_are_ignored() -> None:
    """Source: Phoenix 1.9, ``V2.JSONSerializer.decode!/2`` matches ``[join_ref, ref, topic, event, payload | _]``."""
    message = decode('["1","2","t","e",{},6,[7]]', Version.V2)
    assert message == Message("1", "2", "t", "e", message.payload)
    assert bytes(message.payload) == b"{}"


def test_whitespace_around_a_message_is_allowed_and_that_within_a_payload_is_kept() -> None:
    message = decode(' [ null , "2" ,"t","e", {"a" :\n1.50 } ] ', Version.V2)
    assert bytes(message.payload) == b'{"a" :\n1.50 }'


def test_payload_of_a_binary_push_is_not_looked_at() -> None:
    assert decode(b"\x00\x00\x00\x01\x01te" + bytes(range(256)), Version.V2).payload == bytes(range(256))


def test_v1_message_may_come_in_a_binary_frame() -> None:
    """Source: some V1 clients send their JSON so."""
    text = '{"topic":"ü","event":"e","payload":{},"ref":"1"}'
    from_bytes, from_text = decode(text.encode(), Version.V1), decode(text, Version.V1)
    assert (from_bytes.topic, from_bytes.ref) == (from_text.topic, from_text.ref) == ("ü", "1")


def test_v1_ignores_keys_it_does_not_know() -> None:
    message = decode('{"vsn":1,"topic":"t","event":"e","payload":[],"ref":null}', Version.V1)
    assert (message.join_ref, message.ref, message.topic, message.event) == (None, None, "t", "e")


MALFORMED: dict[str, tuple[str | bytes, Version, CloseCode]] = {
    "nothing": ("", Version.V2, CloseCode.INVALID_PAYLOAD),
    "no JSON": ("hello", Version.V2, CloseCode.INVALID_PAYLOAD),
    "truncated JSON": ('["1","2","t","e",{"a":', Version.V2, CloseCode.INVALID_PAYLOAD),
    "trailing characters": ('["1","2","t","e",{}]]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "trailing comma": ('["1","2","t","e",[1,]]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "NaN in the payload": ('["1","2","t","e",NaN]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "bad escape in the payload": ('["1","2","t","e","\\x"]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "control character in the payload": ('["1","2","t","e","a\nb"]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "bad JSON past the fifth element": ('["1","2","t","e",{},tru]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "byte order mark": ('\ufeff["1","2","t","e",{}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "four elements": ('["1","2","t","e"]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "no element": ("[]", Version.V2, CloseCode.INVALID_PAYLOAD),
    "a number": ("1", Version.V2, CloseCode.INVALID_PAYLOAD),
    "null": ("null", Version.V2, CloseCode.INVALID_PAYLOAD),
    "topic is a number": ('["1","2",3,"e",{}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "topic is null": ('["1","2",null,"e",{}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "event is an object": ('["1","2","t",{},{}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "ref is an array": ('["1",[],"t","e",{}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "ref is a fraction": ('["1",2.5,"t","e",{}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "ref is a boolean": ('["1",true,"t","e",{}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "ref of 5000 digits": (f'["1",{"9" * 5000},"t","e",{{}}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "join_ref is an object": ('[{},"2","t","e",{}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "text that has no UTF-8": ('["1","2","\ud83d","e",{}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "V1 map on a V2 socket": (
        '{"topic":"t","event":"e","payload":{},"ref":"1"}',
        Version.V2,
        CloseCode.INVALID_PAYLOAD,
    ),
    "message nested 10 000 deep": (DEEP, Version.V2, CloseCode.INVALID_PAYLOAD),
    "payload nested 10 000 deep": (f'["1","2","t","e",{DEEP}]', Version.V2, CloseCode.INVALID_PAYLOAD),
    "payload of 10 000 objects": (
        '["1","2","t","e",{}1{}]'.format('{"a":' * 10_000, "}" * 10_000),
        Version.V2,
        CloseCode.INVALID_PAYLOAD,
    ),
    "text in a binary frame": (b'["1","2","t","e",{}]', Version.V2, CloseCode.UNSUPPORTED),
    "empty binary frame": (b"", Version.V2, CloseCode.UNSUPPORTED),
    "binary reply": (b"\x01\x01\x01\x01\x0212tok", Version.V2, CloseCode.UNSUPPORTED),
    "binary broadcast": (b"\x02\x01\x01te", Version.V2, CloseCode.UNSUPPORTED),
    "Supabase's binary push": (b"\x03\x01\x01\x01\x01\x00\x0112te{}", Version.V2, CloseCode.UNSUPPORTED),
    "unknown kind": (b"\xff\x01\x01\x01\x0112te", Version.V2, CloseCode.UNSUPPORTED),
    "binary push without lengths": (b"\x00", Version.V2, CloseCode.INVALID_PAYLOAD),
    "binary push with three lengths": (b"\x00\x00\x00\x00", Version.V2, CloseCode.INVALID_PAYLOAD),
    "binary push one byte short": (b"\x00\x01\x01\x05\x0512topiceven", Version.V2, CloseCode.INVALID_PAYLOAD),
    "binary push with bad UTF-8": (b"\x00\x01\x01\x01\x0112\xffe", Version.V2, CloseCode.INVALID_PAYLOAD),
    "binary push cut within a character": (b"\x00\x00\x00\x01\x01\xc3\xa9", Version.V2, CloseCode.INVALID_PAYLOAD),
    "V2 array on a V1 socket": ('["1","2","t","e",{}]', Version.V1, CloseCode.INVALID_PAYLOAD),
    "V1 without ref": ('{"topic":"t","event":"e","payload":{}}', Version.V1, CloseCode.INVALID_PAYLOAD),
    "V1 without topic": ('{"event":"e","payload":{},"ref":"1"}', Version.V1, CloseCode.INVALID_PAYLOAD),
    "V1 without event": ('{"topic":"t","payload":{},"ref":"1"}', Version.V1, CloseCode.INVALID_PAYLOAD),
    "V1 without payload": ('{"topic":"t","event":"e","ref":"1"}', Version.V1, CloseCode.INVALID_PAYLOAD),
    "V1 topic is a number": ('{"topic":1,"event":"e","payload":{},"ref":"1"}', Version.V1, CloseCode.INVALID_PAYLOAD),
    "V1 malformed": ("{", Version.V1, CloseCode.INVALID_PAYLOAD),
    "V1 bytes that are not UTF-8": (
        b'{"topic":"\xff","event":"e","payload":{},"ref":1}',
        Version.V1,
        CloseCode.INVALID_PAYLOAD,
    ),
    "V1 payload with bad UTF-8": (
        b'{"topic":"t","event":"e","payload":"\xff","ref":1}',
        Version.V1,
        CloseCode.INVALID_PAYLOAD,
    ),
    "V1 nested 10 000 deep": (
        f'{{"topic":"t","event":"e","payload":{DEEP},"ref":1}}',
        Version.V1,
        CloseCode.INVALID_PAYLOAD,
    ),
    "V1 binary push": (b"\x00\x01\x01\x01\x0112te", Version.V1, CloseCode.INVALID_PAYLOAD),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_frame_is_a_wire_error_with_its_close_code(name: str) -> None:
    """The text says what was expected, in 123 bytes at most. Source: RFC 6455, section 5.5."""
    frame, version, code = MALFORMED[name]
    with pytest.raises(WireError) as caught:
        decode(frame, version)
    assert caught.value.code is code
    text = str(caught.value)
    assert "expected" in text or "cut short" in text
    assert len(text.encode()) <= 123
    assert text.isprintable()


def test_wire_error_is_cut_between_characters() -> None:
    """Source: RFC 6455, section 5.5.1: the reason of a close frame is UTF-8."""
    assert str(WireError(CloseCode.UNSUPPORTED, "é" * 100)) == "é" * 61


@given(st.one_of(st.text(), st.binary()), st.sampled_from(Version))
@example("\ud800", Version.V1)
@example(b"\x00\xff\xff\xff\xff", Version.V2)
def test_any_frame_is_decoded_or_refused(frame: str | bytes, version: Version) -> None:
    """No input raises anything else: the reader loop knows this one error."""
    try:
        message = decode(frame, version)
    except WireError as error:
        assert len(str(error).encode()) <= 123
    else:
        assert isinstance(message, Message)


@given(st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just({})), max_size=7))
def test_any_array_is_decoded_or_refused(values: list[Any]) -> None:
    try:
        message = decode(json.dumps(values), Version.V2)
    except WireError:
        return
    assert [message.join_ref, message.ref, message.topic, message.event] == values[:4]
    assert plain(message.payload) == values[4]


# Which version.


@pytest.mark.parametrize(
    ("vsn", "version"),
    [
        ("1.0.0", Version.V1),
        ("1.0.5", Version.V1),
        ("1.0.10", Version.V1),
        ("1.1.0", None),
        ("1.10.0", None),
        ("2.0.0", Version.V2),
        ("2.0.9", Version.V2),
        ("2.1.0", None),
        ("3.0.0", None),
        ("0.0.0", None),
        ("123.1.1", None),
        ("10.0.0", None),
        ("x", None),
        ("", None),
        ("2", None),
        ("2.0", None),
        ("2.0.0.0", None),
        ("2.0.x", None),
        ("2.0.-1", None),
        ("-2.0.0", None),
        (" 2.0.0", None),
        ("2.0.0\n", None),
        ("02.0.0", None),
        ("2.0.00", None),
        ("٢.0.0", None),
        ("²0.0", None),
        ("2.0.²", None),
    ],
)
def test_version_is_negotiated_from_vsn(vsn: str, version: Version | None) -> None:
    """Source: Phoenix 1.9, ``socket.ex: negotiate_serializer``: V1 for ``~> 1.0.0``, V2 for ``~> 2.0.0``."""
    assert negotiate(vsn) is version


@pytest.mark.parametrize("vsn", [f"{'1' * 5000}.0.0", f"2.{'0' * 5000}1.0", f"2.0.{'9' * 5000}"])
def test_vsn_of_5000_digits_does_no_harm(vsn: str) -> None:
    """Python's ``int`` raises ValueError for more than 4300 digits."""
    assert negotiate(vsn) in (None, Version.V2)


# What the relay sends.

refs = st.one_of(st.none(), st.text(), st.integers())
short_refs = st.one_of(st.none(), st.text(min_size=1, max_size=60))
names = st.text(max_size=60)
json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=10,
)
versions = st.sampled_from([Version.V1, Version.V2])
payloads = st.one_of(json_values, st.binary())


def expected_payload(value: Any, version: Version) -> Any:
    """What a client is to see of a payload: V1 has no binary frames, bytes travel in base64."""
    if isinstance(value, bytes) and version is Version.V1:
        return {"base64": base64.b64encode(value).decode()}
    return value


@given(versions, names, names, payloads)
def test_broadcast_round_trips_with_both_refs_null(version: Version, topic: str, event: str, value: Any) -> None:
    """Source: Phoenix 1.9, ``V2.JSONSerializer.fastlane!/1``."""
    frame = encode_broadcast(version, topic, event, payload_of(value))
    assert client_sees(frame, version) == {
        "join_ref": None,
        "ref": None,
        "topic": topic,
        "event": event,
        "payload": expected_payload(value, version),
    }


@given(versions, short_refs, names, names, payloads)
def test_push_round_trips_with_its_join_ref_and_no_ref(
    version: Version, join_ref: Ref, topic: str, event: str, value: Any
) -> None:
    """phoenix.js takes any message with the heartbeat's ref for its answer, so that a push must have none."""
    frame = encode_push(version, join_ref, topic, event, payload_of(value))
    seen = client_sees(frame, version)
    assert (seen["ref"], seen["topic"], seen["event"]) == (None, topic, event)
    assert seen["payload"] == expected_payload(value, version)
    if version is Version.V2:
        assert (seen["join_ref"] or None) == join_ref


@given(versions, short_refs, short_refs, names, names, payloads)
def test_reply_round_trips(version: Version, join_ref: Ref, ref: Ref, topic: str, status: str, value: Any) -> None:
    frame = encode_reply(version, join_ref, ref, topic, status, payload_of(value))
    seen = client_sees(frame, version)
    assert ((seen["ref"] or None), seen["topic"], seen["event"]) == (ref, topic, "phx_reply")
    assert seen["payload"] == {"status": status, "response": expected_payload(value, version)}
    if version is Version.V2:
        assert (seen["join_ref"] or None) == join_ref


@given(versions, refs, names, st.text())
def test_close_and_error_carry_the_join_ref_in_both_places(
    version: Version, join_ref: Ref, topic: str, reason: str
) -> None:
    """Source: Phoenix 1.9, ``socket.ex: encode_on_exit``; V1 has one place for it, the ref."""
    for frame, event, payload in (
        (encode_close(version, join_ref, topic), "phx_close", {}),
        (encode_error(version, join_ref, topic, reason), "phx_error", {"reason": reason}),
    ):
        assert client_sees(frame, version) == {
            "join_ref": join_ref if version is Version.V2 else None,
            "ref": join_ref,
            "topic": topic,
            "event": event,
            "payload": payload,
        }


@given(short_refs, short_refs, names, names, st.binary())
def test_binary_push_of_a_client_round_trips(join_ref: Ref, ref: Ref, topic: str, event: str, payload: bytes) -> None:
    """Encoded here after phoenix.js, ``serializer.js: binaryEncode``."""
    fields = [("" if name is None else str(name)).encode() for name in (join_ref, ref, topic, event)]
    message = decode(b"".join((b"\0", bytes(map(len, fields)), *fields, payload)), Version.V2)
    assert message == Message(join_ref, ref, topic, event, payload)


@given(versions, refs, refs, names, names, json_values)
def test_text_message_of_a_client_round_trips(
    version: Version, join_ref: Ref, ref: Ref, topic: str, event: str, value: Any
) -> None:
    if version is Version.V2:
        text = json.dumps([join_ref, ref, topic, event, value])
    else:
        keys = {"topic": topic, "event": event, "payload": value, "ref": ref, "join_ref": join_ref}
        text = json.dumps(keys, ensure_ascii=False)
    message = decode(text, version)
    assert (message.join_ref, message.ref, message.topic, message.event) == (join_ref, ref, topic, event)
    assert plain(message.payload) == value


Encoder = Callable[[str], Frame]
NAMED_IN_BINARY: dict[str, Encoder] = {
    "topic of a broadcast": lambda name: encode_broadcast(Version.V2, name, "e", b"!"),
    "event of a broadcast": lambda name: encode_broadcast(Version.V2, "t", name, b"!"),
    "topic of a push": lambda name: encode_push(Version.V2, "1", name, "e", b"!"),
    "event of a push": lambda name: encode_push(Version.V2, "1", "t", name, b"!"),
    "topic of a reply": lambda name: encode_reply(Version.V2, "1", "2", name, "ok", b"!"),
    "status of a reply": lambda name: encode_reply(Version.V2, "1", "2", "t", name, b"!"),
}


@pytest.mark.parametrize("place", NAMED_IN_BINARY)
@pytest.mark.parametrize("name", ["x" * 255, "é" * 127 + "x"], ids=["ascii", "two bytes each"])
def test_name_of_255_bytes_fits_a_binary_frame(place: str, name: str) -> None:
    """Source: protocol of V2, every length is one byte; it counts bytes, not characters."""
    seen = client_sees(NAMED_IN_BINARY[place](name), Version.V2)
    payload = seen["payload"]
    found = (seen["topic"], seen["event"], payload["status"] if isinstance(payload, dict) else None)
    assert name in found


@pytest.mark.parametrize("place", NAMED_IN_BINARY)
@pytest.mark.parametrize("name", ["x" * 256, "é" * 128], ids=["ascii", "two bytes each"])
def test_name_of_256_bytes_never_wraps_around_in_a_binary_frame(place: str, name: str) -> None:
    """Names are checked when they come in; one that slips through must not spoil the frame around it."""
    with pytest.raises(AssertionError, match="checked when they come in"):
        NAMED_IN_BINARY[place](name)


@pytest.mark.parametrize("ref", ["x" * 256, "x" * 1000])
def test_ref_over_255_bytes_is_cut_in_a_binary_frame(ref: str) -> None:
    """Only such a ref's own sender is hurt: a text reply has it whole."""
    seen = client_sees(encode_reply(Version.V2, ref, ref, "t", "ok", b"!"), Version.V2)
    assert (seen["join_ref"], seen["ref"], seen["topic"]) == ("x" * 255, "x" * 255, "t")
    assert client_sees(encode_reply(Version.V2, ref, ref, "t", "ok", EMPTY), Version.V2)["ref"] == ref


@pytest.mark.parametrize("topic", ["x" * 256, "x" * 70_000])
def test_text_frame_has_no_bound_on_names(topic: str) -> None:
    """An ``unmatched topic`` reply repeats whatever topic came."""
    assert client_sees(encode_reply(Version.V2, None, "1", topic, "error", EMPTY), Version.V2)["topic"] == topic


def test_integer_refs_are_written_as_digits_in_a_binary_frame() -> None:
    seen = client_sees(encode_reply(Version.V2, 1, 23, "t", "ok", b""), Version.V2)
    assert (seen["join_ref"], seen["ref"]) == ("1", "23")


@pytest.mark.parametrize("version", [Version.V1, Version.V2])
def test_published_json_is_spliced_in_verbatim(version: Version) -> None:
    payload = classify_payload(b'{"a" : 1.0, "b":"\\u00e9"}')
    for frame in (
        encode_broadcast(version, "t", "e", payload),
        encode_push(version, "1", "t", "e", payload),
        encode_reply(version, "1", "2", "t", "ok", payload),
    ):
        assert b'{"a" : 1.0, "b":"\\u00e9"}' in frame.data


def test_json_payload_refuses_what_json_cannot_say() -> None:
    with pytest.raises(TypeError):
        encode_payload(object())


def test_number_that_json_cannot_say_is_null() -> None:
    """Source: ECMAScript, ``JSON.stringify``, does the same."""
    assert bytes(encode_payload([float("nan"), float("inf")])) == b"[null,null]"


# Frames.


def parse(wire: bytes) -> WebSocketFrame:
    """Let the ``websockets`` library read one frame, as a client would."""
    reader = StreamReader()
    reader.feed_data(wire)
    reader.feed_eof()
    reading: Generator[None, None, WebSocketFrame] = WebSocketFrame.parse(reader.read_exact, mask=False)
    with pytest.raises(StopIteration) as done:
        next(reading)
    assert not reader.buffer, "nothing is left over"
    assert isinstance(done.value.value, WebSocketFrame)
    return done.value.value


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
@pytest.mark.parametrize("is_text", [True, False])
def test_wire_is_what_a_websocket_client_expects(size: int, is_text: bool) -> None:
    """Source: RFC 6455, section 5.2, at the edges of its three lengths."""
    data = bytes(size) if not is_text else b"x" * size
    frame = Frame(data, is_text)
    parsed = parse(frame.ws_frame)
    assert (parsed.opcode, bytes(parsed.data), parsed.fin) == (Opcode.TEXT if is_text else Opcode.BINARY, data, True)
    assert frame.size == size
    assert len(frame.ws_frame) == size + (2 if size < 126 else 4 if size < 65536 else 10)


def test_frame_is_made_once_for_all_sockets() -> None:
    frame = encode_broadcast(Version.V2, "t", "é", EMPTY)
    assert frame.ws_frame is frame.ws_frame
    assert frame.text is frame.text
    assert frame.text == '[null,null,"t","é",{}]'


def inflate(wire: bytes) -> tuple[int, bytes]:
    """The first byte and the message of one frame, as RFC 7692, section 7.2.2, takes it apart."""
    size, begin = wire[1], 2
    if size > 125:
        begin = 4 if size == 126 else 10
        size = int.from_bytes(wire[2:begin])
    assert len(wire) == begin + size, "one whole frame, not masked"
    return wire[0], zlib.decompressobj(wbits=-12).decompress(wire[begin:] + b"\x00\x00\xff\xff")


@pytest.mark.parametrize("size", [128, 500, 5000, 200_000, 8_000_000])
@pytest.mark.parametrize("is_text", [True, False])
def test_deflated_is_what_a_client_that_negotiated_it_expects(size: int, is_text: bool) -> None:
    """Source: RFC 7692, section 6 (RSV1 beside FIN and opcode) and 7.2.1; a window of 4 kB."""
    data = (b'{"icao24":"3c6500","lat":48.1}' * (size // 30 + 1))[:size]
    frame = Frame(data, is_text)
    assert inflate(frame.ws_frame_compressed) == (0xC1 if is_text else 0xC2, data)
    assert len(frame.ws_frame_compressed) < size
    assert frame.ws_frame_compressed is frame.ws_frame_compressed, "once for all sockets"


@pytest.mark.parametrize("data", [b"", b"x" * 127, random.Random(1).randbytes(1000)])
def test_what_deflating_does_not_shorten_is_sent_as_it_is(data: bytes) -> None:
    """Source: RFC 7692, section 6: an endpoint may leave any message uncompressed."""
    frame = Frame(data, False)
    assert frame.ws_frame_compressed == frame.ws_frame


def test_frame_shows_what_it_holds() -> None:
    assert repr(Frame(b"[]", True)) == "Frame(b'[]', is_text=True)"


# What publishers send.


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"[]",
        b"1",
        b"-0",
        b"1.50e+3",
        b"1e999",
        b"null",
        b"true",
        b'"text"',
        b'""',
        b'{"a" : [1, 2 ],\r\n\t"b":{ }}',
        '{"müde":"☕"}'.encode(),
        b'"\\ud83d\\ude00"',
        b'"\\/\\b\\f\\n\\r\\t\\"\\\\"',
        b'"\x7f"',
        b'{"a":1,"a":2}',
        b"1" * 5000,
        b"[" * 100 + b"]" * 100,
    ],
)
@pytest.mark.parametrize("around", [b"%b", b" \t%b\r\n"], ids=["bare", "whitespace around"])
def test_valid_json_is_json_verbatim(data: bytes, around: bytes) -> None:
    """Even the whitespace around it, such as the newline of ``redis-cli -x``."""
    payload = classify_payload(around % data)
    assert isinstance(payload, msgspec.Raw)
    assert bytes(payload) == around % data


def test_half_a_surrogate_pair_in_a_push_is_replaced() -> None:
    """``JSON.stringify`` writes it for a string cut within an emoji; it must not cost the client its socket."""
    cut = r'["1","2","t","e",{"a":"\ud83d","b":"\ude00\ud83d\ude00 \\ud83d \\\ud83d"}]'
    payload = decode(cut, Version.V2).payload
    assert bytes(payload) == rb'{"a":"\ufffd","b":"\ufffd\ud83d\ude00 \\ud83d \\\ufffd"}'
    assert json.loads(bytes(payload))["b"] == "\ufffd\U0001f600 \\ud83d \\\ufffd"


def test_half_a_surrogate_pair_in_a_published_payload_is_json_verbatim() -> None:
    """JSON's grammar allows it (RFC 8259, section 8.2), and browsers parse it."""
    for data in (rb'{"a":"\ud83d"}', rb'"\udfff\ud800"'):
        payload = classify_payload(data)
        assert isinstance(payload, msgspec.Raw)
        assert bytes(payload) == data
    assert classify_payload(rb'{"a":"\ud83d"') == rb'{"a":"\ud83d"'
    assert classify_payload(b'"\xff \\ud83d"') == b'"\xff \\ud83d"'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"hello",
        b"NaN",
        b"Infinity",
        b'{"a":1',
        b'"abc',
        b"[1,]",
        b"{'a':1}",
        b"01",
        b"1.",
        b"+1",
        b"1 2",
        b"tru",
        b"\x00",
        b"1\x00",
        b'"a\nb"',
        b'"\\x"',
        b'"\\u12"',
        b'"\xff"',
        b'{"a":"\xc3"}',
        b'{"\xff":1}',
        b'"\xed\xa0\x80"',
        b'"\xc0\x80"',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe",
        b"[" * 10_000 + b"]" * 10_000,
        b"[" * 10_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    ],
)
def test_anything_else_is_bytes(data: bytes) -> None:
    """Nothing published can break the frame around it, or the process that reads it."""
    assert classify_payload(data) is data


def is_strict_json(data: bytes) -> bool:
    """Ask Python's own decoder, without its leniency for NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(data.decode(), parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


nearly_json = st.one_of(
    st.binary(max_size=40),
    st.text(alphabet='[]{},:"\\ \n019.eE+-truefalsn/ubé\x00', max_size=14).map(str.encode),
    json_values.map(lambda value: json.dumps(value, ensure_ascii=False).encode()),
    st.tuples(json_values, st.integers(0, 60), st.binary(max_size=2)).map(
        lambda parts: (text := json.dumps(parts[0]).encode())[: parts[1]] + parts[2] + text[parts[1] + 1 :]
    ),
)


@given(nearly_json)
def test_check_payload_agrees_with_pythons_decoder(data: bytes) -> None:
    r"""JSON is taken for JSON, and nothing else is.

    One exception: ``"\ud83d"``, half a surrogate pair, travels as bytes; Python reads it, a strict decoder does not.
    """
    taken = isinstance(classify_payload(data), msgspec.Raw)
    if b"\\u" in data.lower():
        assert not taken or is_strict_json(data)
    else:
        assert taken == is_strict_json(data)


@given(nearly_json, versions)
def test_nothing_published_breaks_the_frame_around_it(data: bytes, version: Version) -> None:
    frame = encode_broadcast(version, "t", "e", classify_payload(data))
    seen = client_sees(frame, version)
    assert (seen["topic"], seen["event"]) == ("t", "e")
    if not is_strict_json(data):
        assert seen["payload"] == expected_payload(data, version)


@pytest.mark.parametrize("unit", ["a", r"\\\\", r"\n", r"\u0061", r"\\ud800"])
def test_half_a_pair_is_replaced_in_linear_time(unit: str) -> None:
    """A frame of the largest size holds up the loop for milliseconds, whatever stands behind the half."""
    body = r"\ud800" + unit * (1_000_000 // len(unit))
    frame = f'["1","2","phoenix","heartbeat",{{"a":"{body}"}}]'
    best = float("inf")
    for _ in range(5):
        began = time.process_time()
        assert decode(frame, Version.V2).event == "heartbeat"
        best = min(best, time.process_time() - began)
    assert best < 0.03


@given(st.lists(st.sampled_from(["\\\\", '\\"', r"\ud83d", r"\uDE00", r"\n", "ud83d", "a", "é"])))
def test_halves_alone_are_replaced_wherever_they_stand(parts: list[str]) -> None:
    text = f'"{"".join(parts)}"'
    payload = bytes(decode(f'["1","2","t","e",{text}]', Version.V2).payload)
    said = "".join("\ufffd" if 0xD800 <= ord(char) < 0xE000 else char for char in json.loads(text))
    assert json.loads(payload) == said


@pytest.mark.parametrize(
    ("frame", "version"),
    [
        ('["{}","2","t","e",{{}}]', Version.V2),
        ('["1","{}","t","e",{{}}]', Version.V2),
        ('{{"topic":"t","event":"e","payload":{{}},"ref":"{}"}}', Version.V1),
        ('{{"topic":"t","event":"e","payload":{{}},"ref":"1","join_ref":"{}"}}', Version.V1),
    ],
)
def test_ref_of_more_than_255_bytes_is_refused(frame: str, version: Version) -> None:
    """It is kept for as long as its topic is joined."""
    for ref in ("a" * 255, "é" * 127):
        message = decode(frame.format(ref), version)
        assert ref in (message.join_ref, message.ref)
    for ref in ("a" * 256, "é" * 128, "\U0001f600" * 64):
        with pytest.raises(WireError, match="expected refs of at most 255 bytes") as caught:
            decode(frame.format(ref), version)
        assert caught.value.code == CloseCode.INVALID_PAYLOAD


@pytest.mark.parametrize(
    ("frame", "version"),
    [
        ('[{},"2","t","e",{{}}]', Version.V2),
        ('["1",{},"t","e",{{}}]', Version.V2),
        ('{{"topic":"t","event":"e","payload":{{}},"ref":{}}}', Version.V1),
        ('{{"topic":"t","event":"e","payload":{{}},"ref":"1","join_ref":{}}}', Version.V1),
    ],
)
def test_ref_that_is_a_number_is_bounded_as_text_is(frame: str, version: Version) -> None:
    for digits in ("7", "9" * 20, "9" * 255, "-" + "9" * 254):
        message = decode(frame.format(digits), version)
        assert int(digits) in (message.join_ref, message.ref)
    for digits in ("9" * 256, "-" + "9" * 255, "9" * 4300, "9" * 5000, "1e999"):
        with pytest.raises(WireError) as caught:
            decode(frame.format(digits), version)
        assert caught.value.code == CloseCode.INVALID_PAYLOAD


# Meant as JSON.


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b'{"x":NaN}', "NaN and Infinity are no JSON"),
        (b"[1, -Infinity]", "NaN and Infinity are no JSON"),
        (b'\xef\xbb\xbf{"x":1}', "it begins with a byte order mark"),
        (b'{"x":1,}', "trailing comma in object (byte 7)"),
        (b"{'x':1}", "(byte 1)"),
        (b'{"x":', "truncated"),
        (b"  [1,2] and more", "trailing characters"),
        ('{"x":"ö"}'.encode("latin-1"), "expected UTF-8"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b"\x00\x01", None),
        (b"not json", None),
        (b"NaN", None),
        (b"", None),
        (b"[\x00\xff\xfe", None),
        (b"{\x00\x01\x02", None),
        ("{\u00f6".encode("latin-1"), None),
    ],
)
def test_text_that_was_meant_as_json_is_told_from_bytes(data: bytes, fault: str | None) -> None:
    assert classify_payload(data) is data
    found = fault_of_json(data)
    assert (found is None) is (fault is None), found
    assert fault is None or fault in str(found)
