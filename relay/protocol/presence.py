"""Presence: who has joined a topic, as pure functions over members.

Owns the form in which the official `Presence` class of phoenix.js takes state and differences; must not know where
members come from. A member is one join under a key; a key that has joined several times has several::

    presence_state  {"alice": {"metas": [{"user": "alice", "phx_ref": "9f2c"}]}}
    presence_diff   {"joins": {"alice": {"metas": [{…, "phx_ref": "1b07", "phx_ref_prev": "9f2c"}]}},
                     "leaves": {"alice": {"metas": [{…, "phx_ref": "9f2c"}]}}}

An update is a join under a new ref that names the one before it, and the leave of that, in one difference.

Source: Phoenix 1.8, ``presence.js: syncState, syncDiff`` and ``lib/phoenix/presence.ex``.
"""

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import NamedTuple, TypeAlias

import msgspec

from relay.protocol.payload import NESTING_MAX, Payload, is_deeper
from relay.protocol.topics import is_name

STATE_EVENT, DIFF_EVENT, COUNT_EVENT = "presence_state", "presence_diff", "presence_count"
"""Events about members. Clients may not push events that begin as they do, on topics with presence."""

EVENT_PREFIX = "presence_"

# Names that every object of JavaScript has: as keys of one they would not be what they seem.
_PROTOTYPE = frozenset(
    "__proto__ __defineGetter__ __defineSetter__ __lookupGetter__ __lookupSetter__ constructor hasOwnProperty "
    "isPrototypeOf propertyIsEnumerable toLocaleString toString valueOf".split()
)

_encode = msgspec.json.Encoder().encode
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Member(NamedTuple):
    """One join under a key."""

    ref: str
    """Unique among all members."""
    key: str
    meta: bytes
    """What is said of it: a JSON object."""
    previous: str = ""
    """The ref of the member that this one takes the place of, by an update."""


Members: TypeAlias = dict[str, Member]
"""By ref, in the order in which they came."""


class Difference(NamedTuple):
    """What has changed between two states."""

    joins: Members
    leaves: Members

    def __bool__(self) -> bool:
        return bool(self.joins or self.leaves)


NOTHING: Difference = Difference({}, {})


def is_key(key: str) -> bool:
    """Whether members may have this key: 1 to 255 bytes without control characters, and no name of a prototype."""
    return is_name(key) and key not in _PROTOTYPE


def is_member(key: str, meta: msgspec.Raw) -> bool:
    """Whether another program may list this; the meta is JSON, or would be if it is UTF-8."""
    data = bytes(meta)
    return is_key(key) and data.startswith(b"{") and _is_utf8(data) and not is_deeper(data, NESTING_MAX)


def _is_utf8(data: bytes) -> bool:
    try:
        _ = data.decode()
    except UnicodeDecodeError:
        return False
    return True


def clean_meta(data: bytes) -> bytes | None:
    """A meta without members whose names begin with ``phx_ref``, which are the protocol's.

    Returns: None for what is no object, or holds something that Python cannot read, such as ``1e999``, or too deeply.
    """
    if is_deeper(data, NESTING_MAX):
        return None
    try:
        members = _decode_object(data)
        _ = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return _encode({name: value for name, value in members.items() if not name.startswith("phx_ref")})


def difference(before: Mapping[str, Member], after: Mapping[str, Member]) -> Difference:
    """What makes one state of the other."""
    return Difference(
        {ref: member for ref, member in after.items() if ref not in before},
        {ref: member for ref, member in before.items() if ref not in after},
    )


def apply(members: Members, change: Difference) -> None:
    """Make a change to a state. To make it twice changes nothing more."""
    for ref in change.leaves:
        _ = members.pop(ref, None)
    for ref, member in change.joins.items():
        members[ref] = member


def extend(first: Difference, second: Difference) -> None:
    """Make of a change the one that it and another make one after the other, whatever the state before.

    A member that came and went is among the leaves: the first change may have reached others although it failed.
    """
    for ref, member in second.leaves.items():
        _ = first.joins.pop(ref, None)
        first.leaves[ref] = member
    for ref, member in second.joins.items():
        _ = first.leaves.pop(ref, None)
        first.joins[ref] = member


def compose(first: Difference, second: Difference) -> Difference:
    """The same as a change of its own."""
    both = Difference(dict(first.joins), dict(first.leaves))
    extend(both, second)
    return both


def split(change: Difference, most: int) -> tuple[Difference, Difference]:
    """A change as two, of which the first has ``most`` members at most; joins come first."""
    if len(change.joins) + len(change.leaves) <= most:
        return change, NOTHING
    joins, leaves = list(change.joins.items()), list(change.leaves.items())
    kept = max(0, most - len(joins))
    first = Difference(dict(joins[:most]), dict(leaves[:kept]))
    return first, Difference(dict(joins[most:]), dict(leaves[kept:]))


def digest(members: Iterable[str]) -> int:
    """A number that differs, in all likelihood, where refs differ; their order does not matter."""
    found = 0
    for ref in members:
        found ^= int.from_bytes(blake2b(ref.encode(), digest_size=8).digest())
    return found


def metas_by_key(members: Iterable[Member]) -> dict[str, list[msgspec.Raw]]:
    """What is said of the members under each key, without refs."""
    found: dict[str, list[msgspec.Raw]] = {}
    for member in members:
        found.setdefault(member.key, []).append(msgspec.Raw(member.meta))
    return found


def encode_state(members: Iterable[Member]) -> msgspec.Raw:
    """Encode a state as `presence_state` has it."""
    return msgspec.Raw(_encode_keys(members))


def encode_difference(change: Difference) -> msgspec.Raw:
    """Encode a difference as `presence_diff` has it."""
    joins, leaves = (_encode_keys(members.values()) for members in change)
    return msgspec.Raw(b'{"joins":%b,"leaves":%b}' % (joins, leaves))


def _encode_keys(members: Iterable[Member]) -> bytes:
    keys: dict[str, list[bytes]] = {}
    for member in members:
        keys.setdefault(member.key, []).append(_encode_meta(member))
    return b"{%b}" % b",".join(b'%b:{"metas":[%b]}' % (_encode(key), b",".join(metas)) for key, metas in keys.items())


def _encode_meta(member: Member) -> bytes:
    refs = b'"phx_ref":%b' % _encode(member.ref)
    if member.previous:
        refs += b',"phx_ref_prev":%b' % _encode(member.previous)
    inner = member.meta.strip()[1:-1].strip()
    return b"{%b%b%b}" % (inner, b"," if inner else b"", refs)


class _Params(msgspec.Struct):
    presence: msgspec.Raw = msgspec.Raw(b"{}")


_decode_params = msgspec.json.Decoder(_Params).decode


def presence_meta(params: Payload, user: str | None, most: int) -> bytes | None:
    """What is listed of a join: its user, and as ``meta`` what its params say under ``presence``.

    Returns: a JSON object; None where the params say something else than an object there, or one over ``most`` bytes.
    """
    own = b"{}"
    if isinstance(params, msgspec.Raw):
        try:
            own = bytes(_decode_params(params).presence)
        except msgspec.ValidationError:  # params that are no object
            own = b"{}"
        except (msgspec.MsgspecError, RecursionError):
            return None
    cleaned = None if len(own) > most else clean_meta(own)
    if cleaned is None:
        return None
    members = [] if user is None else [b'"user":%b' % _encode(user)]
    if cleaned != b"{}":
        members.append(b'"meta":%b' % cleaned)
    return b"{%b}" % b",".join(members)


def as_params(meta: Payload) -> msgspec.Raw:
    """The params of a join that says this of itself."""
    return msgspec.Raw(b'{"presence":%b}' % bytes(meta))
