"""`relay.auth.sealing`: the common secret, and messages sealed with a key of it."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from relay import ConfigError
from relay.auth.sealing import Sealer, derive, load_secret
from relay.config_sections import AuthConfig

SECRET = "s" * 32


def test_message_is_read_by_those_with_the_key_and_by_its_receiver() -> None:
    one, other = Sealer(derive(SECRET.encode(), "messages")), Sealer(derive(b"x" * 32, "messages"))
    sealed = one.seal(b"hello", "node")
    assert b"hello" not in sealed
    assert one.open(sealed, "node") == b"hello"
    assert one.open(sealed, "another") is None
    assert other.open(sealed, "node") is None
    assert one.seal(b"hello", "node") != sealed


@pytest.mark.parametrize("data", [b"", b"short", b"x" * 12, b"x" * 100])
def test_what_is_no_message_is_not_read(data: bytes) -> None:
    assert Sealer(derive(SECRET.encode(), "messages")).open(data, "node") is None


def test_changed_message_is_not_read() -> None:
    sealer = Sealer(derive(SECRET.encode(), "messages"))
    sealed = bytearray(sealer.seal(b"hello", "node"))
    sealed[-1] ^= 1
    assert sealer.open(bytes(sealed), "node") is None


def test_each_purpose_has_a_key_of_its_own() -> None:
    keys = {derive(SECRET.encode(), purpose) for purpose in ("messages", "long poll tokens")}
    assert len(keys) == 2 and {len(key) for key in keys} == {32}


def test_secret_is_text_or_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    assert load_secret(SECRET) == load_secret(f"file:{path}") == SECRET.encode()


def test_secret_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    with pytest.raises(ConfigError, match=r"auth\.secret: .*: cannot be read: No such file"):
        load_secret(f"file:{path}")
    path.write_text("too short")
    with pytest.raises(ConfigError, match="expected 32 bytes at least, got 9") as caught:
        load_secret(f"file:{path}")
    assert "too short" not in str(caught.value)


def test_setting_is_as_long() -> None:
    assert AuthConfig(secret=SECRET).secret == SECRET
    assert AuthConfig(secret="file:/run/secret").secret == "file:/run/secret"
    with pytest.raises(ValidationError, match="expected 32 bytes at least"):
        AuthConfig(secret="s" * 31)
    assert SECRET not in repr(AuthConfig(secret=SECRET))
