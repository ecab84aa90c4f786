"""The keys that tokens are signed with: from text in the settings, in any form, to a key for one algorithm.

Owns the forms of keys; must not know tokens, nor where published keys are fetched.

A secret is text that an attacker cannot know. A public key can be known by anyone, so none may be taken for a secret:
text that looks like a key in any form is read as that key, or refused with the form that is expected.

Source: RFC 7468 (PEM), 5280 and 5958 (DER), 7517 (JWK), 4253 section 6.6 (OpenSSH); RFC 8725, section 3.1.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize
from urllib.parse import unquote

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    load_der_private_key,
    load_der_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509 import load_der_x509_certificate
from jwt.exceptions import PyJWTError

from relay.config_sections import check_secret
from relay.errors import ConfigError

_FILE = "file:"
_FILE_MAX_BYTES = 1_048_576

_FORMS = "a secret, or a public key as PEM, base64 of DER, JWK or OpenSSH"
_FAULTS = (PyJWTError, UnsupportedAlgorithm, ValueError, TypeError, OverflowError, RecursionError)

_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----(.*?)-----END \1-----", re.DOTALL)
_PEM_TRACE = re.compile(r"-{2,}\s*(?i:BEGIN|END)\b|\b(?:BEGIN|END)\W.{0,40}(?:KEY|CERTIFICATE)|PuTTY-User-Key-File")
"""What is left of a PEM whose lines were damaged on their way, and its relatives."""
_SSH = re.compile(r"(?:^|\s)((?i:ssh-|ecdsa-sha2-|sk-)[A-Za-z0-9@.-]+)\s+(AAAA[A-Za-z0-9+/=]*)")
_SSH_WIRE = re.compile(rb"\0\0\0[\x07-\x40](?:ssh-|ecdsa-sha2-|sk-)")
_WRAPPED = re.compile(rb"-----BEGIN |\"kty\"|^(?:ssh-|ecdsa-sha2-)")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
_HEX = re.compile(r"(?:0[xX])?(?:[0-9a-fA-F]{2}:?){16,}")
_OIDS = tuple(
    bytes.fromhex(oid)
    for oid in (
        "06092a864886f70d0101",  # PKCS #1: RSA, with PSS and OAEP
        "06072a8648ce3d0201",  # elliptic curves
        "06082a8648ce3d0301",  # the curve P-256
        "06032b65",  # Ed25519 and its kin
        "06052b8104",  # other curves
        "06072a8648ce3804",  # DSA
    )
)
_XML = re.compile(r"<[\w:]*(?:KeyValue|KeyInfo|Modulus|X509|EntityDescriptor)\b")
_PATH = re.compile(r"\S+\.(?:pem|key|pub|crt|cer|der|jwks?|json|txt)", re.IGNORECASE)
_JWT = re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*")
_NAMED = re.compile(
    r"(?:public|private|ssh)[ _-]?key|\b(?:modulus|kty|certificate)\b|did:key:", re.IGNORECASE | re.ASCII
)
"""How a key is named in text beside it."""
_ENCODED = re.compile(r"[A-Za-z0-9+/_-]{12,}")
_LONG = re.compile(r"[A-Za-z0-9+/_-]{32}|(?:[0-9a-fA-F]{2}[\s:]+){16}")
_BYTE = re.compile(r"(?:0x|\\x|\\u00|%)([0-9a-f]{1,2})", re.IGNORECASE)
_DECIMAL = re.compile(r"-?\d{1,3}\b")
_DECIMALS = re.compile(r"(?:[a-zA-Z\[\](){}.:=\s]*)(?:-?\d{1,3}[\s,;:]+){31,}-?\d{1,3}[\s,;\])}]*")
"""Bytes as decimal numbers, and nothing else beside what declares an array; a random secret has other characters."""
_NUMBER = re.compile(r"\d{150,}")
_MODULUS = re.compile(r"[\w+/-]{170,}", re.ASCII)
_EXPONENT = re.compile(r"\bAQAB\b|\bAwEAA")
"""65537 in base64: beside the modulus, as JWKs have it, or before it, as DNS has it."""
_COORDINATE = re.compile(r"[\w-]{43,88}", re.ASCII)
_RSA_END = b"\x02\x03\x01\x00\x01"
"""65537 in DER, with which an RSA public key ends."""
_BLOBS = re.compile(rb"(?:RSA[1-3]|EC[SK][1-6])..\0\0|\x21\x58\x20.{32}\x22\x58\x20", re.DOTALL)
"""How keys of Windows begin, and what stands in those of COSE."""
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile("[\0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")
_LAYERS = 4
"""Encodings that are looked through, one inside another."""
_POINTS = {64: (ec.SECP256R1(), ec.SECP256K1()), 96: (ec.SECP384R1(),), 132: (ec.SECP521R1(),)}
"""Curves by the length of both coordinates, a public key as it is. Random bytes are on none of them."""
_KEYSTORES = (b"\xfe\xed\xfe\xed", b"\xce\xce\xce\xce")  # of Java


class Key(NamedTuple):
    """A key and the one algorithm it is for; ``private`` is what signs, if that is known here."""

    kid: str
    algorithm: str
    public: Any
    private: Any = None

    def __repr__(self) -> str:
        return f"Key({self.kid!r}, {self.algorithm})"

    def describe(self) -> str:
        """What it was taken for, without showing it: ``RSA public key, 2048 bits, for RS256``."""
        if self.algorithm == "HS256":
            text = f"shared secret of {len(self.public)} bytes"
        else:
            kind = "RSA" if self.algorithm == "RS256" else "P-256"
            text = f"{kind} {'public' if self.private is None else 'private'} key, {self.public.key_size} bits"
        return f"{text}, for {self.algorithm}" + (f", kid {self.kid!r}" if self.kid else "")


def read_key(text: str, kid: str, where: str) -> Key:
    """Make a key of a secret, of a key in any usual form, or of ``file:`` with either in it.

    White space around it does not count, nor do quotes around a key.

    Args:   where: the setting or flag it comes from, for the error.
    Raises: ConfigError, which repeats no key: no such file, or a key that cannot be used.
    """
    try:
        if text[: len(_FILE)].lower() == _FILE:
            return _read_file(text[len(_FILE) :], kid)
        return _read(text, kid)
    except _Unusable as error:
        raise ConfigError(f"{where}: {error}") from None


def key_of_jwk(entry: Mapping[str, Any], *, with_private: bool = False) -> Key | None:
    """The key of a JWK: RSA or P-256, for signatures; None for any other. Raises what PyJWT does for a broken one."""
    if entry.get("kty") not in ("RSA", "EC") or entry.get("use", "sig") != "sig":
        return None
    public = jwt.PyJWK({name: value for name, value in entry.items() if name != "d"}).key
    private = jwt.PyJWK(dict(entry)).key if with_private and "d" in entry else None
    algorithm = _algorithm_of(public)
    kid = entry.get("kid")
    if algorithm is None or entry.get("alg", algorithm) != algorithm:
        return None
    return Key(kid if isinstance(kid, str) else "", algorithm, public, private)


class _Unusable(Exception):
    """Why a key cannot be used, in words for the settings' author."""


def _read_file(path: str, kid: str) -> Key:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_FILE_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _Unusable(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    try:
        if len(data) > _FILE_MAX_BYTES:
            raise _Unusable(f"expected a key, got over {_FILE_MAX_BYTES} bytes")
        if _is_der(data):
            return _usable(_load_der(data), kid)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise _Unusable(f"cannot be read: no text in UTF-8 and no DER; expected {_FORMS}") from None
        return _read(text, kid)
    except _Unusable as error:
        raise _Unusable(f"{path}: {error}") from None


def _read(text: str, kid: str) -> Key:
    text = text.strip().lstrip("\ufeff").strip()
    if not text:
        raise _Unusable("expected a key, got an empty one")
    bare = text.strip("\"'`, \t\r\n")
    key = _parse(bare, kid)
    if key is not None:
        return key
    _check_secret(bare)
    try:
        secret = text.encode()
    except UnicodeEncodeError:
        raise _Unusable("expected a secret that UTF-8 can encode") from None
    return Key(kid, "HS256", secret, secret)


def _parse(text: str, kid: str) -> Key | None:
    """The key that ``text`` shows, in whatever form; None where it looks like none. Raises _Unusable."""
    if _PEM_TRACE.search(text):
        return _usable(_load_pem(text), kid)
    if text.startswith(("{", "[")) and (found := _parse_json(text, kid)) is not None:
        return found
    if (match := _SSH.search(text)) is not None:
        return _usable(_load_ssh(match[1], match[2]), kid)
    data = _decoded(text)
    if data is None:
        return None
    if _WRAPPED.search(data):  # base64 of text, as some environments carry it
        try:
            return _parse(data.decode().strip(), kid)
        except UnicodeDecodeError:
            return None
    if _SSH_WIRE.match(data):
        name = data[4 : 4 + data[3]].decode("ascii", "replace")
        return _usable(_load_ssh(name, base64.b64encode(data).decode()), kid)
    if data.startswith(_KEYSTORES):
        raise _Unusable(f"a keystore of Java; expected {_FORMS}")
    if _is_der(data) or any(oid in data for oid in _OIDS) or _begins_as_der(data):
        return _usable(_load_der(data), kid)
    if len(data) == 65 and data[0] == 4:  # an uncompressed point, as Web Push has its keys
        try:
            return _usable((ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), data), None), kid)
        except ValueError:  # not on the curve: any bytes
            return None
    return None


def _check_secret(text: str) -> None:
    """Refuse what is not secret. Raises _Unusable."""
    if _CONTROL.search(text):
        raise _Unusable(f"has control characters, as data or UTF-16 have; expected {_FORMS}")
    if _JWT.search(text):
        raise _Unusable(f"a token, which is no key; expected {_FORMS}")
    if _XML.search(text):
        raise _Unusable(f"a key in XML; expected {_FORMS}")
    if re.match(r"(?i)https?://", text):
        raise _Unusable("an address, which is no secret; for keys that are published there set auth.jwks_url")
    if _shows_key(text):
        raise _Unusable(f"looks like a key in a form that is not known, or cut; expected {_FORMS}")
    if "\n" not in text and (_PATH.fullmatch(text) or ("/" in text and _is_file(text))):
        raise _Unusable("a path, which is no secret; write file: before it")
    try:
        _ = check_secret(text)
    except ValueError as error:
        raise _Unusable(str(error)) from None


def _shows_key(text: str, layers: int = _LAYERS) -> bool:
    """Say whether a key is to be seen in ``text``: beside other text, in part, or under further encodings."""
    text = normalize("NFKC", _INVISIBLE.sub("", text))
    written = chain(_written_bytes(text), _coordinates(text))
    text = unquote(text)
    if _NUMBER.fullmatch(text) or _PEM_TRACE.search(text) or (_NAMED.search(text) and _LONG.search(text)):
        return True
    if _EXPONENT.search(text) and _MODULUS.search(text):
        return True
    joined = re.sub(r"\s", "", text)
    # Once more without what may stand between the pieces.
    pure = (re.sub(f"[^{alphabet}]", "", text) for alphabet in ("0-9a-fA-F", "A-Za-z0-9+/", r"A-Za-z0-9_\-"))
    parts = dict.fromkeys((*_ENCODED.findall(text), *_ENCODED.findall(joined), *pure))
    return any(_holds_key(data, layers) for data in chain(written, _decodings(joined), *map(_bytes_of, parts)))


def _holds_key(data: bytes, layers: int) -> bool:
    if _is_der(data) or _begins_as_der(data) or any(oid in data for oid in _OIDS) or _SSH_WIRE.search(data):
        return True
    if _RSA_END in data[-8:] or _BLOBS.search(data):
        return True
    point = data[1:] if len(data) % 2 and data[0] == 4 else data
    if any(_is_point(b"\x04" + point, curve) for curve in _POINTS.get(len(point), ())):
        return True
    if len(data) < 16 or not data.isascii():
        return False
    text = data.replace(b"\0", b"").decode("ascii")
    if not (text.isprintable() or "\n" in text):
        return False
    return layers == 0 or bool(_XML.search(text)) or _shows_key(text, layers - 1)


def _is_point(data: bytes, curve: ec.EllipticCurve) -> bool:
    try:
        _ = ec.EllipticCurvePublicKey.from_encoded_point(curve, data)
    except _FAULTS:
        return False
    return True


def _bytes_of(text: str) -> Iterator[bytes]:
    """What a run of letters may stand for: hex; base64, of which up to three letters may be missing at the front."""
    with suppress(ValueError):
        yield bytes.fromhex(text[len(text) % 2 :])
    text = text.replace("+", "-").replace("/", "_")
    for missing in range(4):
        part = text[missing:]
        with suppress(ValueError):
            yield base64.urlsafe_b64decode(part[: len(part) - (len(part) % 4 == 1)] + "==")


def _written_bytes(text: str) -> Iterator[bytes]:
    """What text stands for that writes bytes one by one: in hex with a mark, in decimal, or in a literal of Python."""
    yield bytes(int(digits, 16) for digits in _BYTE.findall(text))
    if _DECIMALS.fullmatch(text):
        yield bytes(int(number) % 256 for number in _DECIMAL.findall(text))
    if "\\" in text:
        with suppress(ValueError):
            yield text.encode("latin-1", "ignore").decode("unicode_escape").encode("latin-1", "ignore")


def _coordinates(text: str) -> Iterator[bytes]:
    """Each two numbers in base64 that follow one another, as ``x`` and ``y`` of a JWK do."""
    for both in pairwise(_COORDINATE.findall(text)):
        with suppress(ValueError):
            yield b"".join(base64.urlsafe_b64decode(number + "==") for number in both)


def _decodings(text: str) -> Iterator[bytes]:
    """What text as a whole may stand for, in rarer encodings."""
    letters = text.rstrip("=").upper()
    letters += "=" * (-len(letters) % 8)
    for decode, form in (
        (base64.b32decode, letters),
        (base64.b32hexdecode, letters),
        (base64.a85decode, text),
        (base64.b85decode, text),
    ):
        with suppress(ValueError):
            yield decode(form)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long a name, a null byte
        return False


def _decoded(text: str) -> bytes | None:
    """The bytes that hex or base64 stands for, line breaks and their escapes left out; None where it is neither."""
    text = re.sub(r"\\[rnt]|\s", "", text)
    if _HEX.fullmatch(text):
        data = bytes.fromhex(text.lower().removeprefix("0x").replace(":", ""))
        if _is_der(data) or any(oid in data for oid in _OIDS):
            return data  # hex is base64 too; what is no key in it may be one there
    if not _BASE64.fullmatch(text):
        return None
    text = text.rstrip("=").replace("+", "-").replace("/", "_")
    try:
        # A letter too many, of a text that was cut, is left out.
        return base64.urlsafe_b64decode(text[: len(text) - (len(text) % 4 == 1)] + "==")
    except binascii.Error:
        return None


def _is_der(data: bytes) -> bool:
    """Whether ``data`` is one DER sequence that begins with a sequence or an integer, as all forms of keys do."""
    if len(data) < 16 or data[0] != 0x30:
        return False
    count = data[1] & 0x7F if data[1] & 0x80 else 0
    length = int.from_bytes(data[2 : 2 + count]) if count else data[1]
    return count <= 4 and 2 + count + length == len(data) and data[2 + count] in (0x30, 0x02)


def _begins_as_der(data: bytes) -> bool:
    """Whether ``data`` begins as a key of over 255 bytes does, wherever it may have been cut."""
    return data[:2] == b"\x30\x82" and data[4:5] in (b"\x30", b"\x02")


# From a form to a key: each returns the public and the private one.


def _load_pem(text: str) -> tuple[Any, Any]:
    # Line breaks may be missing, or escaped, where an environment variable held the text.
    blocks = _PEM.findall(re.sub(r"\\r|\\n", "\n", text))
    label, body = next((block for block in blocks if not block[0].endswith("PARAMETERS")), ("", ""))
    if "ENCRYPTED" in label or "ENCRYPTED" in body:
        raise _Unusable("under a passphrase, which cannot be given here; expected a key without one")
    try:
        data = base64.b64decode(re.sub(r"\s", "", body), validate=True)
    except ValueError:
        data = b""
    if label == "OPENSSH PRIVATE KEY" and data:
        wrapped = base64.encodebytes(data)
        try:
            private = load_ssh_private_key(
                b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + wrapped + b"-----END OPENSSH PRIVATE KEY-----\n", None
            )
            return private.public_key(), private
        except _FAULTS:
            data = b""
    if not data or not re.search(r"KEY$|CERTIFICATE$", label):
        raise _Unusable(
            "cannot be read as PEM; expected -----BEGIN PUBLIC KEY-----, its lines and -----END PUBLIC KEY-----, "
            "or the same with a private key, without a passphrase, or a certificate"
        )
    try:
        return _load_der(data)
    except _Unusable as error:
        raise _Unusable(f"cannot be read as PEM: {error}") from None


def _load_der(data: bytes) -> tuple[Any, Any]:
    loaded: Any
    for load in (load_der_public_key, _load_private, _load_certificate):
        try:
            loaded = load(data)
        except _FAULTS:
            continue
        return (loaded.public_key(), loaded) if load is _load_private else (loaded, None)
    raise _Unusable(
        "looks like a key in DER and cannot be read; expected all of a public key, a private key without a passphrase, "
        "or a certificate"
    )


def _load_private(data: bytes) -> Any:
    return load_der_private_key(data, None)


def _load_certificate(data: bytes) -> Any:
    return load_der_x509_certificate(data).public_key()


def _load_ssh(name: str, body: str) -> tuple[Any, Any]:
    try:
        return load_ssh_public_key(f"{name} {body}".encode()), None
    except _FAULTS:
        raise _Unusable(f"looks like a key of OpenSSH and cannot be read; expected {_FORMS}") from None


def _parse_json(text: str, kid: str) -> Key | None:
    """The key of a JWK; None where ``text`` is no JSON and speaks of no key."""
    try:
        entry = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        if re.search(r"\b(?:kty|keys|private_key|public_key)\b", text):
            raise _Unusable(f"looks like a JWK and is no JSON; expected {_FORMS}") from None
        return None
    if not isinstance(entry, dict):
        raise _Unusable(f"a list in JSON; expected {_FORMS}")
    if "keys" in entry:
        raise _Unusable("a key set; expected one of its keys in each entry, or auth.jwks_url where they are published")
    if "kty" not in entry:
        raise _Unusable(f"an object in JSON that is no JWK; expected {_FORMS}")
    if entry["kty"] == "oct":
        return _secret_of_jwk(entry, kid)
    try:
        found = key_of_jwk(entry, with_private=True)
    except _FAULTS:
        raise _Unusable("cannot be read as a JWK") from None
    if found is None:
        raise _Unusable("expected a JWK for signatures: an RSA key for RS256, or one on the curve P-256 for ES256")
    return found._replace(kid=kid or found.kid)


def _secret_of_jwk(entry: Mapping[str, Any], kid: str) -> Key:
    secret = _decoded(entry["k"]) if isinstance(entry.get("k"), str) else None
    if not secret or entry.get("alg", "HS256") != "HS256":
        raise _Unusable('expected a JWK with a secret for HS256 in "k", of 12 bytes at the least')
    own = entry.get("kid")
    return Key(kid or (own if isinstance(own, str) else ""), "HS256", secret, secret)


def _usable(loaded: tuple[Any, Any], kid: str) -> Key:
    public, private = loaded
    algorithm = _algorithm_of(public)
    if algorithm is None:
        raise _Unusable("expected an RSA key, or one on the curve P-256")
    return Key(kid, algorithm, public, private)


def _algorithm_of(key: object) -> str | None:
    if isinstance(key, rsa.RSAPublicKey):
        return "RS256"
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return "ES256"
    return None
