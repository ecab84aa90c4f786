"""`relay.cli.options`: what is said of arguments that cannot be used."""

import pytest

from relay.cli.options import json_of
from relay.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("hi", "; got 'hi'; a text has quotes of its own: '\"hi\"'"),
        ("it's", "; a text has quotes of its own: '\"it'\"'\"'s\"'"),
        ("{'a': 1}", "; got \"{'a': 1}\""),
        ("", "; got ''"),
        ("x" * 81, f"; got '{'x' * 81}'"),
    ],
)
def test_text_without_quotes_is_shown_with_them(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        json_of("JSON", text)
    assert str(caught.value).endswith(hint)
    assert str(caught.value).startswith("JSON: ")
