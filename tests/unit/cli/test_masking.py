"""`relay.cli.masking`: a file of settings keeps its form and loses its secrets."""

import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from relay.cli.masking import mask_secrets
from relay.config import Config

SECRET = "hunter2-hunter2-hunter2-hunter2"

FILE = f"""\
# redis_url = "redis://{SECRET}@old"
demo_page = false # was "{SECRET}"
redis_url = 'redis://ada:{SECRET}@redis.example:6379/0?protocol=3&password={SECRET}'
"broadcast_url" = ""

[rest]
api_key = \"\"\"
{SECRET}\"\"\"   # "quoted", and # a second mark

[auth]
issuer = "https://login.example" # not secret
jwks_url = "https://login.example/keys?token={SECRET}"
keys = [
    # "{SECRET}",
    "{SECRET}2", # the newest
    {{ key = "{SECRET}1", kid = "one" }},
    "file:/run/secrets/key",
]

[[proxy]]
prefix = "/billing"
target = "http://user:{SECRET}@127.0.0.1:9"

[[proxy]]
prefix = "/open"
target = "http://127.0.0.1:10"
"""

MASKED = """\
# redis_url = …
demo_page = false # was "…"
redis_url = "redis://<redis_url>@redis.example:6379/0?protocol=3&password=<redis_url>"
"broadcast_url" = ""

[rest]
api_key = "<rest.api_key>"   # "quoted", and # a second mark

[auth]
issuer = "https://login.example" # not secret
jwks_url = "https://login.example/keys?token=<auth.jwks_url>"
keys = [
    # "…",
    "<auth.keys>", # the newest
    { key = "<auth.keys.key>", kid = "one" },
    "file:/run/secrets/key",
]

[[proxy]]
prefix = "/billing"
target = "http://<proxy.target>@127.0.0.1:9"

[[proxy]]
prefix = "/open"
target = "http://127.0.0.1:10"
"""


def test_secrets_are_replaced_by_what_to_fill_in_and_all_else_stays() -> None:
    assert mask_secrets(FILE) == MASKED
    assert mask_secrets(MASKED) == MASKED


def secrets(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Settings that are not shown by `repr`, by their dotted names."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from secrets(field.annotation, f"{prefix}{name}.")
        elif not field.repr:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("name", list(secrets(Config)))
def test_each_secret_setting_is_masked(name: str) -> None:
    is_address = name.endswith("url")
    value = f"https://user:{SECRET}@host" if is_address else SECRET
    table, _, key = name.rpartition(".")
    header = f"[{table}]\n" if table else ""
    given = f'["{value}"]' if name.endswith("keys") else f'"{value}"'
    masked = mask_secrets(f"{header}{key} = {given}")
    assert SECRET not in masked
    assert f"<{name}>" in masked


@pytest.mark.parametrize("password", ["a/b", "a@b", "a?b", "a#b", "a=b&c", "a b"])
def test_no_part_of_a_password_in_an_address_is_left(password: str) -> None:
    masked = mask_secrets(f'redis_url = "redis://ada:{password}@host:6379/0"')
    assert masked == 'redis_url = "redis://<redis_url>@host:6379/0"'


@pytest.mark.parametrize("url", ["embedded", "memory://", "redis://localhost:6379/0", "unix:///run/redis.sock?db=1"])
def test_addresses_without_credentials_stay(url: str) -> None:
    name = "broadcast_url" if url == "memory://" else "redis_url"
    assert mask_secrets(f"{name} = '{url}'") == f"{name} = '{url}'"


def test_key_that_looks_like_an_address_or_a_file_is_masked_as_a_whole() -> None:
    for value in (f"https://{SECRET}", f"file:{SECRET}"):
        assert mask_secrets(f'rest.api_key = "{value}"') == 'rest.api_key = "<rest.api_key>"'


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=8), st.sampled_from(["'", '"']))
def test_any_key_is_masked_however_it_is_written(value: str, quote: str) -> None:
    if quote == "'":
        written = f"'{value.replace(quote, '')}'"
    else:
        written = '"' + "".join(f"\\U{ord(character):08x}" for character in value) + '"'
    text = f"[rest]\napi_key = {written} # '\n"
    kept: Any = tomllib.loads(text)["rest"]["api_key"]
    masked = mask_secrets(text)
    assert masked == (text if kept == "" else '[rest]\napi_key = "<rest.api_key>" # \'\n')
