"""`relay.auth.keys`: whatever form a key has, it is read as that key or refused, and never taken for a secret."""

import base64
import json
from pathlib import Path
from random import Random
from struct import pack
from textwrap import wrap
from typing import Any
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.auth.keys import read_key
from relay.errors import ConfigError
from tests.support.keys import EC_PRIVATE, EC_PUBLIC, RSA_PRIVATE, RSA_PUBLIC, SECRET, b64, jwk, token

RSA: Any = load_pem_private_key(RSA_PRIVATE.encode(), None)
EC: Any = load_pem_private_key(EC_PRIVATE.encode(), None)
SPKI, PKCS1 = PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1
PKCS8, TRADITIONAL = PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL


def public_der(key: Any, form: PublicFormat = SPKI) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.DER, form))


def private_der(key: Any, form: PrivateFormat = PKCS8) -> bytes:
    return bytes(key.private_bytes(Encoding.DER, form, NoEncryption()))


def certificate(key: Any) -> x509.Certificate:
    from datetime import UTC, datetime, timedelta

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "idp")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    return builder.sign(key, hashes.SHA256())


def plain(data: bytes) -> str:
    return base64.b64encode(data).decode()


def openssh(key: Any) -> str:
    return str(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode())


def body(pem: str) -> str:
    """The lines between the first and the last."""
    return "\n".join(pem.strip().split("\n")[1:-1])


CERTIFICATE = certificate(RSA).public_bytes(Encoding.PEM).decode()
PRIVATE_JWK = jwk(EC_PUBLIC, "own") | {"d": b64(EC.private_numbers().private_value.to_bytes(32))}
OPENSSH_PRIVATE = EC.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()

READ = {
    "base64 of SPKI": (plain(public_der(RSA)), "RS256", False),
    "base64 of SPKI, EC": (plain(public_der(EC)), "ES256", False),
    "base64url, without padding": (b64(public_der(RSA)), "RS256", False),
    "base64 in lines": (body(RSA_PUBLIC), "RS256", False),
    "base64 in lines of Windows": (body(RSA_PUBLIC).replace("\n", "\r\n"), "RS256", False),
    "base64 with escaped line breaks": (body(EC_PUBLIC).replace("\n", "\\n"), "ES256", False),
    "base64 in quotes": (f'"{plain(public_der(EC))}"', "ES256", False),
    "base64 of PKCS #1": (plain(public_der(RSA, PKCS1)), "RS256", False),
    "base64 of a certificate": (plain(certificate(EC).public_bytes(Encoding.DER)), "ES256", False),
    "base64 of PKCS #8": (plain(private_der(RSA)), "RS256", True),
    "base64 of a traditional private key": (plain(private_der(EC, TRADITIONAL)), "ES256", True),
    "base64 of a PEM": (plain(RSA_PUBLIC.encode()), "RS256", False),
    "base64 of a JWK": (plain(json.dumps(jwk(EC_PUBLIC, None)).encode()), "ES256", False),
    "hex": (public_der(RSA).hex(), "RS256", False),
    "hex with colons": (public_der(EC).hex(":").upper(), "ES256", False),
    "PEM of Windows": (RSA_PUBLIC.replace("\n", "\r\n"), "RS256", False),
    "PEM with escaped line breaks": (RSA_PUBLIC.replace("\n", "\\n"), "RS256", False),
    "PEM in one line": (RSA_PRIVATE.replace("\n", " "), "RS256", True),
    "PEM behind other text": (f"subject=CN = idp\n{CERTIFICATE}", "RS256", False),
    "PEM behind a byte order mark": (f"\ufeff{EC_PUBLIC}", "ES256", False),
    "PEM in quotes": (f"'{EC_PRIVATE}'", "ES256", True),
    "PEM of PKCS #1": (RSA.public_key().public_bytes(Encoding.PEM, PKCS1).decode(), "RS256", False),
    "PEM behind the curve's parameters": (
        "-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
        + EC.private_bytes(Encoding.PEM, TRADITIONAL, NoEncryption()).decode(),
        "ES256",
        True,
    ),
    "PEM of OpenSSH": (OPENSSH_PRIVATE, "ES256", True),
    "JWK": (json.dumps(jwk(RSA_PUBLIC, None), indent=2), "RS256", False),
    "JWK, EC": (json.dumps(jwk(EC_PUBLIC, None)), "ES256", False),
    "private JWK": (json.dumps(PRIVATE_JWK), "ES256", True),
    "OpenSSH": (openssh(RSA), "RS256", False),
    "OpenSSH with a comment": (f"{openssh(EC)} alice@example.org", "ES256", False),
    "OpenSSH behind options": (f'from="10.0.0.1" {openssh(RSA)}', "RS256", False),
    "OpenSSH, its base64 alone": (openssh(EC).split()[1], "ES256", False),
    "point on the curve": (
        b64(EC.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)),
        "ES256",
        False,
    ),
}


@pytest.mark.parametrize("form", READ)
def test_key_is_read_in_every_usual_form(form: str, tmp_path: Path) -> None:
    text, algorithm, can_sign = READ[form]
    path = tmp_path / "key"
    path.write_text(text, newline="")
    expected = (RSA if algorithm == "RS256" else EC).public_key()
    for given_as in (text, f"  {text}\n", f"file:{path}", f"FILE:{path}"):
        key = read_key(given_as, "", "here")
        assert (key.algorithm, key.private is not None) == (algorithm, can_sign)
        assert key.public == expected


@pytest.mark.parametrize(
    "data",
    [public_der(RSA), private_der(EC), certificate(RSA).public_bytes(Encoding.DER)],
    ids=["public", "private", "certificate"],
)
def test_file_with_der_is_read(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key.der"
    path.write_bytes(data)
    assert read_key(f"file:{path}", "", "here").algorithm in ("RS256", "ES256")


ED25519 = ed25519.Ed25519PrivateKey.generate()
LOCKED = RSA.private_bytes(Encoding.DER, PKCS8, BestAvailableEncryption(b"x"))

POINT = EC.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
MODULUS = RSA.public_key().public_numbers().n.to_bytes(256)


def layered(data: bytes, layers: int) -> str:
    for _ in range(layers):
        data = base64.b64encode(data)
    return data.decode()


REFUSED = {
    "base64 of DER that was cut": (plain(public_der(RSA))[:-40], "cannot be read"),
    "base64 of DER that was cut to a word": (plain(public_der(RSA))[:24], "cannot be read"),
    "base64 of DER without its start": (plain(public_der(RSA)[4:]), "cannot be read"),
    "Ed25519": (plain(public_der(ED25519)), "P-256"),
    "Ed25519 of OpenSSH": (openssh(ED25519), "P-256"),
    "DSA": (plain(public_der(dsa.generate_private_key(1024))), "P-256"),
    "P-384": (plain(public_der(ec.generate_private_key(ec.SECP384R1()))), "P-256"),
    "a private key under a passphrase": (plain(LOCKED), "without a passphrase"),
    "PEM without its end": (RSA_PUBLIC[:200], "PEM"),
    "PEM without its start": (RSA_PUBLIC[27:], "PEM"),
    "PEM with other dashes": (RSA_PUBLIC.replace("-----", "—"), "PEM"),
    "PEM with its spaces escaped": (RSA_PUBLIC.replace(" ", "%20"), "PEM"),
    "a request for a certificate": (
        "-----BEGIN CERTIFICATE REQUEST-----\nMIIB\n-----END CERTIFICATE REQUEST-----",
        "PEM",
    ),
    "SSH2": ("---- BEGIN SSH2 PUBLIC KEY ----\nAAAA\n---- END SSH2 PUBLIC KEY ----", "PEM"),
    "PuTTY": ("PuTTY-User-Key-File-3: ssh-rsa\nPublic-Lines: 6", "PEM"),
    "a key set": (json.dumps({"keys": [jwk(RSA_PUBLIC, "a")]}), "key set"),
    "a list of JWK": (json.dumps([jwk(RSA_PUBLIC, "a")]), "JSON"),
    "JWK for encryption": (json.dumps(jwk(RSA_PUBLIC, None, use="enc")), "for signatures"),
    "JWK of another kind": ('{"kty":"OKP","crv":"Ed25519","x":"AAAA"}', "for signatures"),
    "JWK that is broken": ('{"kty":"RSA","n":5}', "JWK"),
    "JWK that is no JSON": ("{'kty': 'RSA', 'n': 'AAAA'}", "no JSON"),
    "a service account": ('{"type":"service_account","client_id":"1"}', "JSON"),
    "OpenSSH that was cut": (openssh(RSA)[:100], "OpenSSH"),
    "XML": ("<RSAKeyValue><Modulus>AAAA</Modulus></RSAKeyValue>", "XML"),
    "a keystore": (plain(b"\xfe\xed\xfe\xed" + bytes(60)), "keystore"),
    "an address": ("https://login.example.org/.well-known/jwks.json", "auth.jwks_url"),
    "a path": ("/run/secrets/public.pem", "file:"),
    "a path without a directory": ("jwt.key", "file:"),
    "a token": (token(), "a token"),
    "a token behind a word": (f"Bearer {token()}", "a token"),
    "an address in capitals": ("HTTPS://LOGIN.EXAMPLE.ORG/KEYS", "auth.jwks_url"),
    "hex of a PEM": (RSA_PUBLIC.encode().hex(), "looks like a key"),
    "hex in bytes of C": (", ".join(f"0x{byte:02x}" for byte in public_der(EC)), "looks like a key"),
    "hex in bytes of Python": ("".join(f"\\x{byte:02x}" for byte in public_der(RSA)), "looks like a key"),
    "base64 of base64": (plain(plain(public_der(EC)).encode()), "looks like a key"),
    "base64 of base64 of a PEM": (plain(plain(RSA_PUBLIC.encode()).encode()), "looks like a key"),
    "base64 in URL's encoding": (quote(plain(public_der(RSA)), safe=""), "looks like a key"),
    "base64 behind a name": (f"public_key: {plain(public_der(EC))}", "looks like a key"),
    "base64 behind a scheme": (f"base64:{plain(public_der(RSA))}", "looks like a key"),
    "base64 behind an invisible character": (f"\u200b{plain(public_der(EC))}", "looks like a key"),
    "base64 with a dot behind it": (f"{plain(public_der(RSA))}.", "looks like a key"),
    "base64 without its first letters": (plain(public_der(EC))[5:], "looks like a key"),
    "base64 twice": (f"{plain(public_der(EC))} {plain(public_der(EC))}", "looks like a key"),
    "base32": (base64.b32encode(public_der(EC)).decode(), "looks like a key"),
    "a data URL": (f"data:application/x-pem-file;base64,{plain(RSA_PUBLIC.encode())}", "looks like a key"),
    "PEM in small letters": (RSA_PUBLIC.lower(), "PEM"),
    "a point in hex": (
        POINT.hex(),
        "looks like a key",
    ),
    "OpenSSH in capitals": (openssh(RSA).replace("ssh-rsa", "SSH-RSA"), "OpenSSH"),
    "JWK in URL's encoding": (quote(json.dumps(jwk(RSA_PUBLIC, None))), "looks like a key"),
    "JWK without its braces": (json.dumps(jwk(RSA_PUBLIC, None))[1:-1], "looks like a key"),
    "JWK in YAML": (f"kty: RSA\nn: {jwk(RSA_PUBLIC, None)['n']}\ne: AQAB", "looks like a key"),
    "a modulus that openssl prints": (f"Modulus={RSA.public_key().public_numbers().n:X}", "looks like a key"),
    "a modulus in decimal digits": (str(RSA.public_key().public_numbers().n), "looks like a key"),
    "XML in base64": (plain(b"<RSAKeyValue><Modulus>AAAA</Modulus></RSAKeyValue>"), "looks like a key"),
    "OpenSSL's modulus and exponent": (f"n: {jwk(RSA_PUBLIC, None)['n']}\ne: AQAB", "looks like a key"),
    "modulus and exponent of a query": (f"n={jwk(RSA_PUBLIC, None)['n']}&e=AQAB", "looks like a key"),
    "modulus and exponent with a dot": (f"{jwk(RSA_PUBLIC, None)['n']}.AQAB", "looks like a key"),
    "coordinates with names": ("x={x} y={y}".format(**jwk(EC_PUBLIC, None)), "looks like a key"),
    "a point without its first byte": (plain(POINT[1:]), "looks like a key"),
    "a point without its first byte, in hex": (POINT[1:].hex(), "looks like a key"),
    "base64 without its first line": ("\n".join(body(RSA_PUBLIC).split("\n")[1:]), "looks like a key"),
    "base64 without ten letters": (plain(public_der(RSA))[10:], "looks like a key"),
    "base32 in small letters": (base64.b32encode(public_der(EC)).decode().lower(), "looks like a key"),
    "base32 without padding": (base64.b32encode(public_der(RSA)).decode().rstrip("="), "looks like a key"),
    "base64 in many layers": (layered(public_der(EC), 9), "looks like a key"),
    "bytes of Windows": (plain(b"RSA1" + pack("<IIII", 2048, 3, 256, 0) + MODULUS), "looks like a key"),
    "bytes of Windows, older": (
        plain(b"\x06\x02\0\0\0\xa4\0\0RSA1" + pack("<II", 2048, 65537) + MODULUS[::-1]),
        "looks like a key",
    ),
    "bytes of Windows, EC": (plain(b"ECS1" + pack("<I", 32) + POINT[1:]), "looks like a key"),
    "a literal of Python": (repr(public_der(RSA)), "looks like a key"),
    "decimal numbers": (", ".join(map(str, public_der(RSA))), "looks like a key"),
    "signed decimal numbers": (str([byte - (byte > 127) * 256 for byte in public_der(EC)]), "JSON"),
    "an array of C": ("{" + ", ".join(map(hex, public_der(EC))) + "}", "looks like a key"),
    "DER in Latin 1": (public_der(RSA).decode("latin-1"), "control characters"),
    **{f"hex pairs with {mark}": (public_der(RSA).hex(mark), "looks like a key") for mark in "-,%_"},
    **{f"base64 with {mark}": (mark.join(wrap(plain(public_der(RSA)), 4)), "looks like a key") for mark in ",-:.|"},
    "half a surrogate pair": ("a secret of more than thirty-two bytes \ud83d", "UTF-8"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_looks_like_a_key_and_cannot_be_used_is_refused(form: str, tmp_path: Path) -> None:
    text, word = REFUSED[form]
    with pytest.raises(ConfigError, match=word) as caught:
        read_key(text, "", "auth.keys.0")
    assert str(caught.value).startswith("auth.keys.0: ")
    assert text not in str(caught.value)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for data in (RSA_PUBLIC.encode("utf-16"), b"\xff" * 40, public_der(RSA)[:-9]):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_key(f"file:{path}", "", "here")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_file_in_utf_16_without_mark_is_refused(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(RSA_PUBLIC.encode(encoding))
    with pytest.raises(ConfigError, match="control characters"):
        read_key(f"file:{path}", "", "here")


def test_path_of_a_file_that_exists_is_not_taken_for_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    with pytest.raises(ConfigError, match="file:"):
        read_key(str(path), "", "here")


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        "0123456789abcdef" * 4,  # hex
        "mZ2yJb3X0o0nWc8vQ1o1zvS7d3n0Jm5l7lq4sJw9t0E=",  # base64 of 32 bytes
        "/8QmZ2yJb3X0o0nWc8vQ1o1zvS7d3n0Jm5l7lq4sJw9",
        "{a secret in braces, of thirty-two bytes}",
        "the END of a sentence that is a secret",
        "{c0ffee: a secret}",
        "a secret that is no private key, and no certificate",
        "%41%42 a secret with %20 in it, of thirty-two bytes",
        "correct-horse-battery-staple-correct-horse-battery-staple",
        "1" * 64,
    ],
)
def test_secret_stays_a_secret_as_it_is_written(text: str) -> None:
    key = read_key(f" {text}\n", "", "here")
    assert (key.algorithm, key.public, key.private) == ("HS256", text.encode(), text.encode())


@settings(max_examples=300)
@given(st.binary(min_size=16, max_size=400))
def test_random_bytes_in_base64_or_hex_are_a_secret(seed: bytes) -> None:
    """None is mistaken for a key: one in some millions is, which begins as DER does."""
    data = Random(seed).randbytes(len(seed))
    forms = (
        plain(data),
        b64(data),
        data.hex(),
        data.hex("-"),
        base64.b32encode(data).decode(),
        "\n".join(wrap(plain(data))),
    )
    for text in forms:
        assert read_key(text, "", "here").algorithm == "HS256"


def test_secret_in_a_jwk_is_the_bytes_it_stands_for() -> None:
    key = read_key(json.dumps({"kty": "oct", "k": b64(SECRET.encode()), "kid": "own"}), "", "here")
    assert (key.algorithm, key.public, key.kid) == ("HS256", SECRET.encode(), "own")
    with pytest.raises(ConfigError, match="HS256"):
        read_key('{"kty":"oct","k":"AA"}', "", "here")


def test_kid_of_a_jwk_counts_where_the_settings_give_none() -> None:
    text = json.dumps(jwk(RSA_PUBLIC, "own"))
    assert (read_key(text, "", "here").kid, read_key(text, "k", "here").kid) == ("own", "k")


def test_weak_rsa_key_is_described_with_its_size() -> None:
    key = read_key(plain(public_der(rsa.generate_private_key(65537, 1024))), "", "here")
    assert key.describe() == "RSA public key, 1024 bits, for RS256"
