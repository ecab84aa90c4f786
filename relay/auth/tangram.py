"""Tokens of tangram's: ``{"id", "channel", "exp"}``, each for one topic.

Owns what such a token permits; must not know how it is checked or made. Those that ``POST /token`` gives to pages
without the API key are marked by a claim, and permit what ``[[auth.tangram_topics]]`` says at the time they are used.
"""

from collections.abc import Mapping
from typing import Any

from relay.config_sections import AuthConfig
from relay.permissions import ALL, SUBJECT, Grant, Right, Rights, escape

ADMIN_TOPIC = "admin"
"""The topic on which tangram says who has joined what: no pattern opens it, only its name."""

OPEN_CLAIM = "open"
"""Marks a token that was given without the API key."""


class TangramTopics:
    """What tokens of tangram's permit.

    Args: config: ``tangram_topics`` is used.
    """

    def __init__(self, config: AuthConfig) -> None:
        grants = [entry.grant for entry in config.tangram_topics]
        self._for_users = tuple(grant for grant in grants if SUBJECT in grant.pattern)
        self._open = Rights(grant for grant in grants if SUBJECT not in grant.pattern)
        self._admin = Rights(grant for grant in grants if grant.pattern == ADMIN_TOPIC)

    def rights_on(self, channel: str) -> Right:
        """What a token may permit on its topic that is given without the API key; nothing where it is not given."""
        return (self._admin if channel == ADMIN_TOPIC else self._open).on(channel)

    def grants(self, claims: Mapping[str, Any], channel: str) -> tuple[Grant, ...]:
        """What a token permits: ``{sub}`` in a pattern stands for its id."""
        rights = self.rights_on(channel) if claims.get(OPEN_CLAIM) else ALL
        return (Grant(escape(channel), rights), *self._for_users)
