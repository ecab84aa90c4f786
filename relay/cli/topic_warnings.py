"""What `relay check` says of presence and histories: settings that work against each other.

Owns the sentences; must not know how they are shown.
"""

from collections.abc import Iterator

from relay.config import Config
from relay.config_sections import Overflow

_MEMBER_BYTES = 92
"""What a member takes on the wire beside its meta: its key, of 36 bytes, and its ref."""


def topic_facts(config: Config) -> Iterator[tuple[str, str]]:
    """What topics with presence show, and notes: a word and a sentence each."""
    for entry in config.topics:
        if entry.presence:
            what = {"count": "the number of its members", "plugin": "the members that plugins list"}
            shown = what.get(str(entry.presence), "its members")
            most = "" if entry.presence == "count" else f", or their number if they are over {entry.presence_max}"
            yield "presence", f"{entry.match}: subscribers receive {shown}{most}"
    if config.has_presence and config.presence.leave_delay_s < 1:
        yield (
            "note",
            f"presence.leave_delay_s = {config.presence.leave_delay_s:g}: members whose page is reloaded, or who "
            "rejoin after a gap, are seen to leave; phoenix.js rejoins after 1 s",
        )


def topic_warnings(config: Config) -> Iterator[str]:
    """Settings of presence and histories that cannot work well together."""
    if config.has_presence:
        yield from _lease_warnings(config)
        yield from _size_warnings(config)
    for at, entry in enumerate(config.topics):
        if entry.history is not None and entry.overflow in (Overflow.DROP_OLDEST, Overflow.LATEST):
            yield (
                f'topics.{at}: overflow = "{entry.overflow}" drops events that the history has, and a client does not '
                'recover them; use "recover"'
            )
        if not entry.presence and "presence_max" in entry.model_fields_set:
            yield f"topics.{at}: presence_max has no effect without presence"
        if entry.presence == "count" and "presence_max" in entry.model_fields_set:
            yield f'topics.{at}: presence_max has no effect with presence = "count"'


def _lease_warnings(config: Config) -> Iterator[str]:
    lease_s, renew_s = config.presence.lease_s, config.presence.renew_s
    if lease_s < 3 * renew_s:
        yield (
            f"presence.lease_s = {lease_s:g} is less than 3 × presence.renew_s = {renew_s:g}: one renewal that fails, "
            "and members are seen to leave"
        )
    if not config.broadcast_url and lease_s < renew_s + config.redis.timeout_s:
        yield (
            f"presence.lease_s = {lease_s:g} is less than presence.renew_s + redis.timeout_s = "
            f"{renew_s + config.redis.timeout_s:g}: a renewal that Redis answers late ends the lease"
        )


def _size_warnings(config: Config) -> Iterator[str]:
    limits = config.limits
    if limits.presence_meta_max_bytes > limits.presence_state_max_bytes:
        yield (
            f"limits.presence_meta_max_bytes = {limits.presence_meta_max_bytes} is more than "
            f"limits.presence_state_max_bytes = {limits.presence_state_max_bytes}: one member, and none are listed"
        )
    for at, entry in enumerate(config.topics):
        size = limits.presence_state_max_bytes + _MEMBER_BYTES * entry.presence_max
        if entry.presence and entry.presence != "count" and size > limits.outbox_max_bytes:
            yield (
                f"topics.{at}: presence_max = {entry.presence_max}: the list may have {size} bytes, more than "
                f"limits.outbox_max_bytes = {limits.outbox_max_bytes}: clients that read slowly are disconnected"
            )
