"""What ``relay check`` says of tangram's tokens.

Owns these words.
"""

from collections.abc import Iterator

from relay.config import Config
from relay.config_sections import AuthConfig
from relay.permissions import SUBJECT, names_of

_DAY_S = 86_400
_LONG_DAYS = 30
"""A token that is good for longer is mentioned."""


def tangram_rights(auth: AuthConfig) -> Iterator[tuple[str, str]]:
    """What tokens of tangram's permit, and how long they are good."""
    yield "rights", "with a token of tangram's: everything on the one topic that it names"
    for entry in auth.tangram_topics:
        which = (
            "with any token of tangram's" if SUBJECT in entry.match else "with one that POST /token gives to anybody"
        )
        yield "rights", f"{which}: {', '.join(names_of(entry.grant.rights)) or 'nothing'} on {entry.match}"
    if auth.tangram_ttl_s < _DAY_S:
        yield (
            "note",
            f"auth.tangram_ttl_s = {auth.tangram_ttl_s:g}: tangram's page renews no token; after that time it gets no "
            "events until it is loaded again (config/tangram.toml has tangram's ten years)",
        )
    elif auth.tangram_ttl_s > _LONG_DAYS * _DAY_S:
        yield (
            "note",
            f"auth.tangram_ttl_s: tokens of POST /token are good for {auth.tangram_ttl_s / _DAY_S:.0f} days; another "
            "secret in auth.keys ends them all, and fewer auth.tangram_topics those that were given without a key",
        )


def open_tokens(config: Config) -> str:
    """Warn of tokens that are given without the API key: to whom, and for what."""
    topics = [entry for entry in config.auth.tangram_topics if SUBJECT not in entry.match]
    rights = [f"{' and '.join(names_of(entry.grant.rights)) or 'do nothing'} on {entry.match}" for entry in topics]
    who = "any program that reaches this address, and pages"
    pages = {"any": "any pages", "same": f"{who} of the relay's own host"}
    origins = config.allowed_origins
    named = f"{who} of {', '.join(origins)}" if not isinstance(origins, str) else pages[origins]
    return f'auth.tangram = "open": {named} get tokens without a key, to {"; ".join(rights)}'
