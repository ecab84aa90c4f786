"""`relay_client.wire`: the server's table of frames, byte for byte, and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest

from relay_client.wire import Message, decode, encode, names_in

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "vectors" / "frames.json").read_text("utf-8"))


def of(direction: str) -> list[dict[str, Any]]:
    return [vector for vector in VECTORS if vector["version"] == 2 and vector["direction"] == direction]


def by_name(vector: dict[str, Any]) -> str:
    return str(vector["name"])


def frame_of(vector: dict[str, Any]) -> str | bytes:
    return vector["text"] if "text" in vector else bytes.fromhex(vector["hex"])


def field(vector: dict[str, Any], name: str) -> Any:
    return bytes.fromhex(vector[f"{name}_hex"]) if f"{name}_hex" in vector else vector[name]


def message_of(vector: dict[str, Any]) -> Message:
    if "status" in vector:
        payload = {"status": vector["status"], "response": field(vector, "response")}
    else:
        payload = field(vector, "payload")
    return Message(vector["join_ref"], vector["ref"], vector["topic"], vector["event"], payload)


@pytest.mark.parametrize("vector", of("client"), ids=by_name)
def test_message_becomes_the_frame_of_the_table(vector: dict[str, Any]) -> None:
    assert encode(message_of(vector)) == frame_of(vector)


@pytest.mark.parametrize("vector", of("server"), ids=by_name)
def test_frame_of_the_table_becomes_the_message(vector: dict[str, Any]) -> None:
    assert decode(frame_of(vector)) == message_of(vector)


@pytest.mark.parametrize("payload", [bytearray(b"efg"), memoryview(b"-efg")[1:]])
def test_all_kinds_of_bytes_are_sent_as_bytes(payload: Any) -> None:
    assert encode(Message("1", "2", "t", "e", payload)) == bytes((0, 1, 1, 1, 1)) + b"12teefg"


@pytest.mark.parametrize(
    "message",
    [
        Message("1", "2", "é" * 128, "e", b""),
        Message("1", "2", "t", "e", float("nan")),
    ],
)
def test_what_has_no_frame_is_refused(message: Message) -> None:
    with pytest.raises(ValueError):
        encode(message)


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "{",
        "{}",
        "[1,2,3,4]",
        '[null,null,7,"e",{}]',
        '[null,null,"t",null,{}]',
        '[[],null,"t","e",{}]',
        '[null,"1","t","phx_reply",{}]',
        '[null,"1","t","phx_reply",{"status":"ok"}]',
        "[" * 100_000,
        b"",
        b"\3\1",
        b"\0\1\1",
        b"\2\5\5to",
        b"\2\1\1\xff\xff",
    ],
    ids=repr,
)
def test_what_is_no_frame_is_a_value_error_and_nothing_else(frame: str | bytes) -> None:
    with pytest.raises(ValueError):
        decode(frame)


@pytest.mark.parametrize(
    ("frame", "names"),
    [
        (f'[null,null,"room:1","n",{"9" * 5000}]', ("room:1", "n")),
        ('[ "1" , -2 , "a\\"\\u00e9" , "n" ,', ('a"é', "n")),
        ('[null,null,"\\x","n",1]', None),
        ('[null,null,7,"n",1]', None),
        ('[null,null,"' + "\\" * 100_000, None),
        ("", None),
        (b"\2\1\1tn", None),
    ],
    ids=range(7),
)
def test_names_are_found_in_what_cannot_be_decoded(frame: str | bytes, names: tuple[str, str] | None) -> None:
    assert names_in(frame) == names
